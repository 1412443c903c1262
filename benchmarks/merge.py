"""How much of a fine-tuning `merge --alpha auto` keeps, and how much it forgets: three cases, several seeds.

    python benchmarks/merge.py --root FLICKR8K --classes CALTECH101 [--seeds 0 1 2] [--work FOLDER]

Both towers are frozen and cached; heads are trained on one data set and then fine-tuned on another. Alpha is
chosen on 1,000 photographs held out of Flickr8k's train split, on the val split of the scenes and on two
images of each class. Only then are BASE, TUNED and the result scored on other images: Flickr8k's dev split,
the test split of the scenes and the other images of the classes. Writes Markdown and JSON into
benchmarks/results.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import io
import json
import statistics
from pathlib import Path
from typing import Any

import report
from ablation import held_out_root

from clip_lightning.__main__ import main as clip_lightning
from clip_lightning.data.captions import Splits, split_by_image
from clip_lightning.data.formats import read_captions
from clip_lightning.data.scenes import write_scenes
from clip_lightning.data.sources import SCENE_SIZE
from clip_lightning.data.sources import SCENES as COUNT
from clip_lightning.experiments.merge import Merger, held_out
from clip_lightning.model.merge import load_for_merge
from clip_lightning.training.cli import fit


def trained(folder: Path, data: str, cache: str, seed: int, start: Path | None = None) -> Path:
    """The bundle of heads that were trained on the data, from those of `start`; once."""
    if not folder.exists():
        options = {"config": "heads", "data.root": data, "data.cache": cache, "seed_everything": seed}
        options |= {
            "predictions.queries": 0,
            "trainer.logger": "false",
            "trainer.default_root_dir": f"{folder}-runs",
        }
        if start:
            options |= {"model.image_tower": "null", "model.text_tower": "null", "model.init_from": start}
        (fit([f"--{name}={value}" for name, value in options.items()], []) / "model").rename(folder)
    return folder


def write_table(file: Path, header: str, rows: list[tuple]) -> str:
    """Write a CSV, and return its name."""
    with file.open("w") as opened:
        csv.writer(opened).writerows([header.split(), *rows])
    return str(file)


def data_sets(args: argparse.Namespace) -> dict[str, tuple[str, str]]:
    """Each data set as two: its val split is what alpha is chosen on, and what is reported."""
    scenes = args.work / "scenes"
    write_scenes(scenes, COUNT, SCENE_SIZE, seed=0)
    test = split_by_image(read_captions(scenes), Splits())["test"]
    rows = [(image.path, caption, "val") for image in test for caption in image.captions]
    shown = write_table(args.work / "scenes-test.csv", "image caption split", rows)
    folders = sorted(path for path in args.classes.resolve().iterdir() if path.is_dir())
    labelled = [[(image, folder.name) for image in sorted(folder.iterdir())] for folder in folders]
    halves = [[row for rows in labelled for row in rows[part]] for part in (slice(2), slice(2, None))]
    names = [args.work / f"classes-{part}.csv" for part in ("val", "test")]
    classes = [write_table(name, "image label", half) for name, half in zip(names, halves, strict=True)]
    photos = held_out_root(args.root, args.work / "held-out")
    return {
        "photos": (str(photos), str(args.root)),
        "scenes": (f"scenes:{scenes}", shown),
        "classes": (classes[0], classes[1]),
    }


def merged(
    models: tuple[Path, Path], data: tuple[str, str], keep: tuple[str, str], out: Path
) -> dict[str, Any]:
    """Choose alpha on the first of each data set, and score BASE, TUNED and the result on the second."""
    words = ["merge", *map(str, models), "--alpha", "auto", "--data", data[0], "--keep", keep[0]]
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        assert clip_lightning([*words, "--out", str(out), "--json"]) == 0
    found = json.loads(printed.getvalue())
    sets = {"data": held_out(data[1], classes=False), "keep": held_out(keep[1], classes=True)}
    both, one = (Merger(*load_for_merge(str(models[0]), [str(other)]), sets) for other in (models[1], out))
    base, tuned, result = both.score(0), both.score(1), one.score(1) | {"alpha": found["alpha"]}
    return {
        "alpha": found["alpha"],
        "curve": found["curve"],
        "base": base,
        "tuned": tuned,
        "merged": result,
        "won": 100 * (result["data"] - base["data"]) / (tuned["data"] - base["data"]),
        "lost": 100 * (base["keep"] - result["keep"]) / (base["keep"] - tuned["keep"]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--root", type=Path, required=True)
    parser.add_argument("--classes", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--work", type=Path, default=Path("runs/merge"), help="keeps bundles and features")
    parser.add_argument("--cache", help="of features; by default in --work")
    parser.add_argument("--out", type=Path, default=report.RESULTS)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    args.work, args.root = args.work.resolve(), args.root.resolve()
    sets, heads = data_sets(args), args.work / "heads"
    rows: dict[str, list[dict[str, Any]]] = {}
    for seed in args.seeds:
        for first, second, keeps in (
            ("scenes", "photos", ["scenes"]),
            ("photos", "scenes", ["photos", "classes"]),
        ):
            base = trained(
                heads / f"{first}-{seed}", sets[first][0], args.cache or str(args.work / "cache"), seed
            )
            tuned = trained(
                heads / f"{first}-{second}-{seed}",
                sets[second][0],
                args.cache or str(args.work / "cache"),
                seed,
                base,
            )
            for keep in keeps:
                out = args.work / "merged" / f"{first}-{keep}-{seed}"
                row = merged((base, tuned), sets[second], sets[keep], out)
                rows.setdefault(f"{first}, then {second}; keep {keep}", []).append(row)
                print(seed, first, keep, json.dumps(row), flush=True)
    write(rows, args)


def write(rows: dict[str, list[dict[str, Any]]], args: argparse.Namespace) -> None:
    head = report.header("torch", "lightning", seeds=args.seeds)
    lines = ["# Merging a model with what was trained from it", "", report.provenance(head), ""]
    lines += [f"Mean ± deviation of the seeds {args.seeds}; of what was won and lost, each seed too.", ""]
    names = (
        "alpha",
        *(f"{model}, {data}" for data in ("new", "keep") for model in ("BASE", "TUNED", "merged")),
    )
    lines += [f"| | {' | '.join(names)} | won, % | lost, % |", f"|---{'|---' * 9}|"]
    for name, found in rows.items():
        columns = [
            [row[model][data] for row in found]
            for data in ("data", "keep")
            for model in ("base", "tuned", "merged")
        ]
        cells = [", ".join(f"{row['alpha']:g}" for row in found), *map(spread, columns)]
        cells += [
            f"{spread([row[key] for row in found])} ({', '.join(f'{row[key]:.1f}' for row in found)})"
            for key in ("won", "lost")
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    report.save(args.out, "merge", head, rows, lines)
    print("\n".join(lines))


def spread(values: list[float]) -> str:
    """Mean ± deviation."""
    return f"{statistics.mean(values):.1f} ± {statistics.stdev(values) if len(values) > 1 else 0:.1f}"


if __name__ == "__main__":
    main()
