"""How many swapped captions `data audit` finds, and what training gains without them.

    python benchmarks/audit.py --root FLICKR8K [--seeds 3] [--fits] [--cache FOLDER] [--out FOLDER]

A tenth of the captions of train and dev are swapped between images. `--fits` also trains `--config heads` on
the clean, the swapped and the cleaned train split, and scores all three on the same clean dev split.
"""

from __future__ import annotations

import argparse
import csv
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from report import RESULTS, header, provenance, save

from clip_lightning.data.captions import SPLITS, split_by_image
from clip_lightning.data.formats import read_captions
from clip_lightning.data.readers import RECOGNIZED

Row = tuple[str, str, str]


def command(*args: str) -> str:
    """Run clip-lightning, and return what it prints to stdout."""
    words = [sys.executable, "-m", "clip_lightning", *args]
    return subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True).stdout


def read_rows(root: Path, per_image: int, rng: np.random.Generator) -> list[Row]:
    """Image, caption and split of train and dev, with so many random captions of each image."""
    parts = split_by_image(read_captions(root, RECOGNIZED), RECOGNIZED.splits)
    return [
        (str(image.path), image.captions[i], split)
        for split in SPLITS
        for image in parts[split]
        for i in sorted(rng.permutation(len(image.captions))[:per_image])
    ]


def swap(rows: list[Row], fraction: float, rng: np.random.Generator, splits: tuple[str, ...]) -> list[Row]:
    """Exchange the captions of a random fraction of the rows of some splits, within each split."""
    result = list(rows)
    for split in splits:
        own = [i for i, row in enumerate(rows) if row[2] == split]
        chosen = rng.permutation(own)[: round(fraction * len(own))]
        while any(rows[a][0] == rows[b][0] for a, b in zip(chosen, np.roll(chosen, 1), strict=True)):
            chosen = rng.permutation(chosen)
        for a, b in zip(chosen, np.roll(chosen, 1), strict=True):
            result[a] = (rows[a][0], rows[b][1], split)
    return result


def write(rows: list[Row], path: Path) -> Path:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([("image", "caption", "split"), *rows])
    return path


def audited(name: str, rows: list[Row], wrong: set[Row], folder: Path, cache: list[str]) -> dict[str, float]:
    table = write(rows, folder / f"{name}.csv")
    found = json.loads(
        command("data", "audit", str(table), *cache, f"--fix={folder / f'{name}-fixed.csv'}", "--json")
    )
    paths = {(str((table.parent / one["image"]).resolve()), one["caption"]) for one in found["suspects"]}
    right = len(paths & {(image, caption) for image, caption, _ in wrong})
    return {
        "accused": 100 * found["accused"] / len(rows),
        "estimated": 100 * found["wrong_fraction"],
        "found": 100 * right / max(1, len(wrong)),
        "precision": 100 * right / max(1, found["accused"]),
    }


def trained(table: Path, seed: int, folder: Path, cache: list[str]) -> float:
    """Sum of the recalls on dev of the heads that are trained on a table."""
    options = [f"--data.root={table}", f"--seed_everything={seed}", "--trainer.logger=false"]
    options += [f"--data.cache={cache[0].partition('=')[2]}"] if cache else []
    runs = folder / f"{table.stem}-{seed}"
    command("-q", "fit", "--config=heads", *options, f"--trainer.default_root_dir={runs}")
    return float(json.loads(next(runs.glob("*/metrics.json")).read_text())["rsum"])


def fits(rows: list[Row], swapped: list[Row], seed: int, folder: Path, cache: list[str]) -> dict[str, float]:
    """Scores of training on clean, swapped and cleaned captions of train, on the clean ones of dev."""
    fixed = folder / f"swapped-5-{seed}-fixed.csv"
    with fixed.open(newline="") as file:
        kept = {(str((folder / row["image"]).resolve()), row["caption"]) for row in csv.DictReader(file)}
    dev = [row for row in rows if row[2] != "train"]
    arms = {"clean": rows, "swapped": swapped, "cleaned": [row for row in swapped if row[:2] in kept]}
    scores = {}
    for arm, captions in arms.items():
        train = [row for row in captions if row[2] == "train"]
        scores[arm] = trained(write(train + dev, folder / f"{arm}-{seed}.csv"), seed, folder, cache)
    return scores


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--root", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first_seed", type=int, default=100)
    parser.add_argument("--fits", action="store_true")
    parser.add_argument("--cache", type=Path)
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args()
    cache = [f"--cache={given.cache}"] if given.cache else []
    head = header("torch", seeds=given.seeds, first_seed=given.first_seed)
    results: dict[str, list[dict[str, float]]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name).resolve()
        for seed in range(given.first_seed, given.first_seed + given.seeds):
            for per_image in (5, 1):
                for kind, fraction in (("swapped", 0.1), ("clean", 0.0)):
                    rng = np.random.default_rng((seed, per_image))
                    rows = read_rows(given.root.resolve(), per_image, rng)
                    new = swap(rows, fraction, rng, SPLITS)
                    wrong = {*new} - {*rows}
                    arm = f"{kind}, {per_image} per image"
                    results.setdefault(arm, []).append(
                        audited(f"{kind}-{per_image}-{seed}", new, wrong, folder, cache)
                    )
                    print(arm, seed, results[arm][-1], flush=True)
                    if given.fits and per_image == 5 and kind == "swapped":
                        results.setdefault("rsum", []).append(fits(rows, new, seed, folder, cache))
                        print("rsum", seed, results["rsum"][-1], flush=True)
    lines = [provenance(head), "", "| data | value | mean | deviation | seeds |", "|---|---|---|---|---|"]
    for arm, values in results.items():
        for key in values[0]:
            each = [value[key] for value in values]
            spread = statistics.stdev(each) if len(each) > 1 else 0.0
            listed = ", ".join(f"{value:.1f}" for value in each)
            lines.append(f"| {arm} | {key} | {statistics.mean(each):.1f} | {spread:.1f} | {listed} |")
    print("\n".join(lines))
    save(given.out, "audit", head, results, lines)


if __name__ == "__main__":
    main()
