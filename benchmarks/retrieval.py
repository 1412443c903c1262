"""Time and memory of the retrieval metrics, both ways, with ties.

    python benchmarks/retrieval.py [--images 1000 5000] [--width 512] [--rounds 5] [--threads 2]

Every size runs in a process of its own, because peak memory (VmHWM) never falls. Writes Markdown and JSON
into benchmarks/results.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import report
import torch
from torch.nn import functional

from clip_lightning.evaluation.retrieval import retrieval_metrics


def memory(field: str) -> float:
    """`VmRSS` (resident now) or `VmHWM` (its peak so far) of this process, in MB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field + ":")) / 1024


def measure(images: int, captions: int, width: int, rounds: int, threads: int) -> dict[str, object]:
    torch.set_num_threads(threads)
    generator = torch.Generator().manual_seed(0)
    owner = torch.arange(images).repeat_interleave(captions)
    image = functional.normalize(torch.randn(images, width, generator=generator), dim=-1)
    noise = functional.normalize(torch.randn(images * captions, width, generator=generator), dim=-1)
    text = functional.normalize(image[owner] + 4 * noise, dim=-1)
    retrieval_metrics(image[:100], text[: 100 * captions], owner[: 100 * captions])  # starts the threads
    before = memory("VmRSS")
    wall, cpu = [], []
    for _ in range(rounds):
        began, cpu_began = time.perf_counter(), time.process_time()
        metrics = retrieval_metrics(image, text, owner)
        wall.append(time.perf_counter() - began)
        cpu.append(time.process_time() - cpu_began)
    return {
        "images": images,
        "captions": len(text),
        "seconds": wall,
        "cpu_seconds": cpu,
        "growth_mb": memory("VmHWM") - before,
        "rsum": metrics["rsum"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--images", type=int, nargs="+", default=[1000, 5000])
    parser.add_argument("--captions", type=int, default=5, help="of each image")
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=report.RESULTS)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(measure(args.images[0], args.captions, args.width, args.rounds, args.threads)))
        return
    rows = []
    for images in args.images:
        command = [sys.executable, __file__, "--child", "--images", str(images)]
        for name in ("captions", "width", "rounds", "threads"):
            command += [f"--{name}", str(getattr(args, name))]
        rows.append(json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout))
        print(rows[-1], flush=True)
    write(rows, args)


def write(rows: list[dict], args: argparse.Namespace) -> None:
    header = report.header("torch", width=args.width, threads=args.threads, rounds=args.rounds)
    lines = [
        "# Retrieval metrics",
        "",
        f"{header['date']}, {header['machine']}, {args.threads} threads, torch {torch.__version__}",
        "",
        f"`retrieval_metrics`, width {args.width}, scores in float64; medians of {args.rounds} rounds.",
        "Memory: peak resident memory above what the process held with the embeddings loaded.",
        "",
        "| images × captions | s | s of CPU time | memory added MB |",
        "|---|---|---|---|",
    ]
    for row in rows:
        seconds, cpu = statistics.median(row["seconds"]), statistics.median(row["cpu_seconds"])
        size = f"{row['images']:,} × {row['captions']:,}"
        lines.append(f"| {size} | {seconds:.2f} | {cpu:.2f} | {row['growth_mb']:.0f} |")
    report.save(args.out, "retrieval", header, rows, lines)


if __name__ == "__main__":
    main()
