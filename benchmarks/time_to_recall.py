"""Time until text→image R@1 on Flickr8k's dev split reaches a target: ours, open_clip, the ancestor's recipe.

    python benchmarks/time_to_recall.py --root FLICKR8K [--cap-minutes 45] [--target 20] [--only ARM ...]
    python benchmarks/time_to_recall.py --root FLICKR8K --search  # open_clip's rate, on held-out pictures

Each arm is a process of its own on an idle machine, with the same towers (EfficientNet-Lite0, MiniLM-L6). The
clock starts with the process. Ours includes its own validations; the others store their weights at intervals
and are scored afterwards, off the clock, by the same code (plain view, 1,000 pictures × 5 captions, bf16). An
arm that is not done after the cap is ended. The first weights that reach the target count. To use the machine
in between, stop the running arm with SIGUSR1 to this process, and let it go on with SIGUSR2: the clock stands
still meanwhile.

Writes Markdown and JSON into benchmarks/results after every arm, into the file of the same day if it exists.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import open_clip_trainer
import report
import time_to_recall_report
import torch
from ablation import held_out_root
from clock import Process, python, run_capped, step_times, steps_per_second
from scorer import GOAL, Scorer, new_clip
from time_to_recall_report import COLD, NAME, WARM
from torch import Tensor

from clip_lightning import CaptionDataModule
from clip_lightning.data.images import Augmentation
from clip_lightning.files import cache_folder
from clip_lightning.model.clip import CLIP
from clip_lightning.training.extract import Extractor

WARM_RUNS = 3
CHECKPOINTS = 22  # of an arm that runs until the cap
# Chosen with --search, see its result in benchmarks/results.
LEARNING_RATE = 1e-3
SEARCHED, SEARCH_STEPS = (1e-4, 3e-4, 1e-3, 3e-3), 100
BATCH, WARMUP = 256, 0.1
# Of open_clip's flags those that make it faster here; it has none for channels_last.
BEST = [
    *("--precision", "amp_bf16", "--torchcompile", "--workers", "1"),
    # 999 of 1,000 captions have at most 33 tokens; the default pads each to 77
    *("--force-context-length", "32"),
    *("--batch-size", str(BATCH), "--lr", str(LEARNING_RATE)),
]  # fmt: skip
# Not --lock-image-freeze-bn-stats: with open_clip 3.3 it loses the activations in timm's batch norms.
LOCK_IMAGE = ["--lock-image"]
# With both towers locked only the projections learn, at the rate that configs/heads.yaml has for them.
LOCK_TEXT = ["--lock-text", "--lock-text-freeze-layer-norm", "--lr", "0.001"]


@dataclass
class Bench:
    """What all arms share."""

    root: Path
    cap: float
    target: float
    work: Path
    dev: Scorer


def ours(bench: Bench, name: str) -> dict[str, Any]:
    """`fit --config heads`, with an empty cache once or with a full one several times."""
    cache = bench.work / "cache"
    if name == COLD:
        shutil.rmtree(cache, ignore_errors=True)
        return fit(bench, cache, bench.cap)
    fit(bench, cache, None)  # off the clock: nothing but a full cache may be warm
    runs = [fit(bench, cache, bench.cap) for _ in range(WARM_RUNS)]
    runs.sort(key=lambda run: run["seconds"] or math.inf)
    return {**runs[len(runs) // 2], "runs": [run["seconds"] for run in runs]}


def fit(bench: Bench, cache: Path, cap: float | None) -> dict[str, Any]:
    """One run of ours."""
    folder = Path(tempfile.mkdtemp(dir=bench.work))
    options = {
        "config": "heads",
        "data.root": bench.root,
        "data.cache": cache,
        "trainer.default_root_dir": folder / "runs",
        "trainer.callbacks+": "fit_clock.RecordRun",
        "trainer.callbacks.folder": folder / "record",
    }
    words = [f"--{name}={value}" for name, value in options.items()]
    command = [sys.executable, "-m", "clip_lightning", "fit", *words]
    process = run_capped(command, folder / "log", cap)
    file = folder / "record" / "validations.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    curve = [
        (
            process.at(line["time"]),
            line["metrics"][f"val/{GOAL}"],
            line["metrics"]["val/image_to_text_R@1"],
        )
        for line in lines
    ]
    files = list((folder / "runs").glob("*/metrics.json"))  # none where it was ended before it trained
    rate = json.loads(files[0].read_text())["samples_per_second"] if files else 0.0
    return result(bench, process, curve, folder / "record") | {"samples_per_second": rate}


def open_clip_defaults(bench: Bench, name: str) -> dict[str, Any]:
    """open_clip's trainer as it is, with every caption, until the cap.

    Its default precision is fp16 by autocast, which few processors are good at: fp32 is another arm.
    """
    folder = Path(tempfile.mkdtemp(dir=bench.work))
    open_clip_trainer.write_rows(folder / "rows.csv", bench.dev.train)
    flags = ["--lock-image", *(["--precision", "fp32"] if "fp32" in name else [])]
    process = open_clip(bench, folder, flags, bench.cap)
    return scored(bench, process, folder, batch=64, load=open_clip_trainer.load_into, heads={})


def open_clip_best(bench: Bench, name: str) -> dict[str, Any]:
    """open_clip's trainer with its best flags; its cosine ends when the time is up."""
    folder = Path(tempfile.mkdtemp(dir=bench.work))
    best = [*LOCK_IMAGE, *BEST, *(LOCK_TEXT if "both" in name else [])]
    steps = planned_steps(bench, best)
    rows = folder / "rows.csv"
    open_clip_trainer.write_rows(rows, bench.dev.train, steps * BATCH)
    flags = [*best, "--warmup", str(max(1, round(WARMUP * steps))), "--epochs", "1"]
    process = open_clip(bench, folder, flags, bench.cap)
    row = scored(bench, process, folder, batch=BATCH, load=open_clip_trainer.load_into, heads={})
    return row | {"planned_steps": steps}


def planned_steps(bench: Bench, flags: list[str]) -> int:
    """How many steps fit under the cap, from a short run before it, off the clock."""
    folder = Path(tempfile.mkdtemp(dir=bench.work))
    open_clip_trainer.write_rows(folder / "rows.csv", bench.dev.train, BATCH * 20)
    process = open_clip(bench, folder, [*flags, "--warmup", "1", "--epochs", "1"], None)
    times = step_times(folder / "record", process)
    # the first step is slow where it compiles, the last ones find batches that were read meanwhile
    start, rate = times[0], steps_per_second(times, 4)
    shutil.rmtree(folder)
    return max(10, int((0.95 * bench.cap - start) * rate))


def open_clip(bench: Bench, folder: Path, flags: list[str], cap: float | None, *own: str) -> Process:
    """Run it on `folder/rows.csv`, with its notes in `folder/record`."""
    model = folder / "model"
    every = [] if cap is None else ["--every", f"{bench.cap / CHECKPOINTS:.1f}"]
    words = open_clip_trainer.words(
        open_clip_trainer.write_model(model, new_clip()), folder / "rows.csv", folder
    )
    command = python("open_clip_trainer.py", "--record", folder / "record", *every, *own, *words, *flags)
    return run_capped(command, folder / "log", cap)


def ancestor(bench: Bench, name: str) -> dict[str, Any]:
    """The soft-target recipe, until the cap."""
    folder = Path(tempfile.mkdtemp(dir=bench.work))
    open_clip_trainer.write_rows(folder / "rows.csv", bench.dev.train)
    every = f"{bench.cap / CHECKPOINTS:.1f}"
    options = ["--rows", folder / "rows.csv", "--record", folder / "record", "--every", every]
    process = run_capped(python("baseline_soft_targets.py", *options), folder / "log", bench.cap)

    def load(clip: CLIP, state: dict[str, Tensor]) -> None:
        answer = clip.load_state_dict(state, strict=False)
        if answer.unexpected_keys or set(answer.missing_keys) - {"logit_scale"}:
            raise ValueError(f"unexpected {answer.unexpected_keys[:3]}, missing {answer.missing_keys[:3]}")

    heads = {"head": "mlp", "embed_dim": 256}
    return scored(bench, process, folder, batch=64, load=load, heads=heads)


def scored(
    bench: Bench,
    process: Process,
    folder: Path,
    *,
    batch: int,
    load: Callable[[CLIP, dict[str, Tensor]], None],
    heads: dict[str, Any],
) -> dict[str, Any]:
    """Score the stored weights of a finished process, and remove them."""
    clip, curve = new_clip(**heads), []
    for file in sorted((folder / "record").glob("*.pt")):
        stored = torch.load(file, map_location="cpu", weights_only=True)
        load(clip, stored["state"])
        curve.append((process.at(stored["time"]), *bench.dev.score(clip)))
        print(f"  {curve[-1][0]:.0f} s, step {stored['step']}: {curve[-1][1]:.1f}", flush=True)
    row = result(bench, process, curve, folder / "record")
    row["samples_per_second"] = batch * steps_per_second(step_times(folder / "record", process), 4)
    shutil.rmtree(folder)
    return row


def result(
    bench: Bench, process: Process, curve: list[tuple[float, float, float]], record: Path
) -> dict[str, Any]:
    """What is kept of every arm."""
    times = step_times(record, process)
    return {
        "ran": time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(process.began)),
        "cap": bench.cap,
        "target": bench.target,
        "seconds": next((seconds for seconds, recall, _ in curve if recall >= bench.target), None),
        "reached": max((recall for _, recall, _ in curve), default=None),
        "process_seconds": process.seconds,
        "capped": process.capped,
        "paused_seconds": sum(end - start for start, end in process.pauses),
        "first_step": times[0] if times else None,
        "steps": len(times),
        "curve": [[round(value, 2) for value in point] for point in curve],
    }


ARMS: dict[str, Callable[[Bench, str], dict[str, Any]]] = {
    COLD: ours,
    WARM: ours,
    "open_clip, defaults, image locked": open_clip_defaults,
    "open_clip, defaults but fp32, image locked": open_clip_defaults,
    "open_clip, best flags, image locked": open_clip_best,
    "open_clip, best flags, both locked": open_clip_best,
    "ancestor's recipe": ancestor,
}


def search(bench: Bench, out: Path) -> None:
    """open_clip's learning rate with the image tower locked, on 1,000 pictures held out of train.

    Its own trainer, with stored features of the plain view in place of the trunk, which spares most of the
    time; the other flags are those of the arm.
    """
    clip = new_clip()
    extractor = Extractor(CaptionDataModule(clip.transform, clip.tokenize, root=bench.root).cache, CPU, BF16)
    features = extractor.image_features(clip.image_tower, bench.dev.train, 0, Augmentation(), "train")
    rows = features.rows(range(len(bench.dev.train)))
    names = [image.path.name for image in bench.dev.train]
    file = bench.work / "features.pt"
    torch.save(dict(zip(names, rows.unbind(), strict=True)), file)
    found = {}
    for rate in SEARCHED:
        folder = Path(tempfile.mkdtemp(dir=bench.work))
        open_clip_trainer.write_rows(folder / "rows.csv", bench.dev.train, SEARCH_STEPS * BATCH)
        warmup = str(round(WARMUP * SEARCH_STEPS))
        flags = [*LOCK_IMAGE, *BEST, "--lr", str(rate), "--warmup", warmup, "--epochs", "1"]
        process = open_clip(bench, folder, flags, 3600, "--features", str(file))
        row = scored(bench, process, folder, batch=BATCH, load=open_clip_trainer.load_into, heads={})
        found[str(rate)] = row
        print(rate, row["curve"][-1], flush=True)
    head = report.header("torch", "open_clip_torch", steps=SEARCH_STEPS, flags=BEST)
    lines = [
        "# open_clip's learning rate, image tower locked",
        "",
        f"{head['date']}, {head['machine']}; `python benchmarks/time_to_recall.py --root FLICKR8K --search`",
        "",
        f"{SEARCH_STEPS} steps of {BATCH} captions, then scored on 1,000 pictures held out of train.",
        "",
        "| learning rate | text→image R@1 | image→text R@1 | seconds |",
        "|---|---|---|---|",
    ]
    for rate, row in found.items():
        _, there, back = row["curve"][-1]
        lines.append(f"| {rate} | {there:.1f} | {back:.1f} | {row['process_seconds']:.0f} |")
    report.save(out, f"{NAME}-search", head, found, lines)


CPU, BF16 = torch.device("cpu"), torch.bfloat16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--root", type=Path, required=True)
    parser.add_argument("--cap-minutes", type=float, default=45)
    parser.add_argument("--target", type=float, default=20, help="text→image R@1 in percent")
    parser.add_argument("--only", nargs="*", choices=ARMS, metavar="ARM", help=", ".join(ARMS))
    parser.add_argument("--search", action="store_true", help="open_clip's learning rate instead of the arms")
    parser.add_argument("--out", type=Path, default=report.RESULTS)
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    root = args.root.resolve()
    if args.search:
        root = held_out_root(root, cache_folder("flickr8k-held-out"))
    with tempfile.TemporaryDirectory(prefix="time-to-recall-") as work:
        bench = Bench(root, 60 * args.cap_minutes, args.target, Path(work), Scorer(root))
        if args.search:
            search(bench, args.out)
            return
        flags = (
            f"open_clip's best flags: `{' '.join(LOCK_IMAGE)} {' '.join(BEST)}`, "
            f"both locked: also `{' '.join(LOCK_TEXT)}`."
        )
        for image in bench.dev.train:  # all arms find the pictures in memory
            image.path.read_bytes()
        for name in args.only or ARMS:
            print(name, flush=True)
            time_to_recall_report.add({name: ARMS[name](bench, name)}, list(ARMS), flags, args.out)


if __name__ == "__main__":
    main()
