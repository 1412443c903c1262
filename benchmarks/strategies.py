"""The same steps by one process, DDP and FSDP, in fp32, bf16 and compiled: where they end, and how fast.

    python benchmarks/strategies.py [--ranks 2] [--batch 32] [--steps 20] [--towers small] [--only WAY ...]
    python benchmarks/strategies.py --ranks 8 --towers base --batch 2048  # on a machine with 8 GPUs

Both towers are trained on noise that is in memory already; dropout is off. `--batch` is that of all ranks
together, and every way sees the same pairs. `small`: ViT-S/16 at 64 pixels and a BERT of 2 layers; `base`:
ViT-B/16 and a BERT of base size; all weights are random. Distance: that between the weights at the end and
those of one process in fp32, as a share of the way that these went. GPUs are used where there are any.
Writes Markdown and JSON into benchmarks/results.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import report
import torch
from fine_tuning import tower_names
from gradient_cache import text_folder
from torch import Tensor

REFERENCE = "one process, fp32"
# name → ranks (of those asked for), strategy, precision, compiled
WAYS: dict[str, tuple[bool, str, str, bool]] = {
    REFERENCE: (False, "auto", "32-true", False),
    "one process, bf16": (False, "auto", "bf16-mixed", False),
    "one process, bf16, compiled": (False, "auto", "bf16-mixed", True),
    "ddp, fp32": (True, "ddp", "32-true", False),
    "ddp, bf16": (True, "ddp", "bf16-mixed", False),
    "fsdp, fp32": (True, "fsdp", "32-true", False),
    "fsdp, bf16": (True, "fsdp", "bf16-mixed", False),
    "fsdp, bf16, compiled": (True, "fsdp", "bf16-mixed", True),
}
IMAGE_SIZE = {"small": 64, "base": 224}
TOKENS, POOL, WARM_UP = 16, 4, 3


class Batches(torch.utils.data.Dataset[dict[str, Tensor]]):
    """This rank's share of the same few batches, over and over."""

    def __init__(self, total: int, size: int, rank: int, ranks: int, steps: int) -> None:
        chance = torch.Generator().manual_seed(0)
        own = slice(rank * total // ranks, (rank + 1) * total // ranks)
        self.steps, self.pool = steps, []
        for _ in range(POOL):
            pixels = torch.randint(0, 256, (total, 3, size, size), dtype=torch.uint8, generator=chance)
            words = torch.randint(5, 1000, (total, TOKENS), generator=chance)
            ids = torch.arange(total)
            batch = {"pixel_values": pixels, "input_ids": words, "attention_mask": torch.ones_like(words)}
            batch |= {"image_id": ids, "text_image_id": ids, "text_id": ids}
            self.pool.append({name: tensor[own].clone() for name, tensor in batch.items()})

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return self.pool[index % POOL]


def train(args: argparse.Namespace) -> None:
    """One way, on this rank; the first rank writes `row.json` and the weights into `--folder`."""
    from lightning.pytorch import Callback, seed_everything
    from trainer import plain_trainer

    from clip_lightning import CLIPModule
    from clip_lightning.training.build import TowerOptions
    from clip_lightning.training.optim import OptimizerConfig
    from clip_lightning.training.sharding import ShardedStrategy, gather_on_first_rank

    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    rank, ranks = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    on_gpu = torch.cuda.is_available()
    _, strategy, precision, compiled = WAYS[args.way]
    seconds: list[float] = []

    class Clock(Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            if on_gpu:
                torch.cuda.synchronize()
            seconds.append(time.perf_counter())

    seed_everything(0, verbose=False)
    module = CLIPModule(
        args.image_tower,
        args.text_tower,
        freeze="none",
        image_size=IMAGE_SIZE[args.towers],
        optimizer=OptimizerConfig(image_lr=1e-4, text_lr=1e-4),
        towers=TowerOptions(compile=compiled),
    )
    for part in module.modules():
        if isinstance(part, torch.nn.Dropout):
            part.p = 0.0
    start = {name: tensor.detach().clone() for name, tensor in module.named_parameters()} if rank == 0 else {}
    trainer = plain_trainer(
        accelerator="gpu" if on_gpu else "cpu",
        devices=ranks,
        strategy=ShardedStrategy() if strategy == "fsdp" else strategy,
        precision=precision,
        use_distributed_sampler=False,
        callbacks=[Clock()],
    )
    data = Batches(args.batch, IMAGE_SIZE[args.towers], rank, ranks, args.steps)
    trainer.fit(module, torch.utils.data.DataLoader(data, batch_size=None))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if on_gpu:
        peak = torch.cuda.max_memory_allocated()
    gathered = gather_on_first_rank(module.state_dict())
    weights = {name: tensor.cpu() for name, tensor in gathered.items() if name in start}
    if rank == 0:
        steps = [b - a for a, b in zip(seconds[WARM_UP:], seconds[WARM_UP + 1 :], strict=False)]
        row = {
            "ranks": ranks,
            "samples_per_second": args.batch / statistics.median(steps),
            "peak_bytes": peak,
        }
        args.folder.joinpath("row.json").write_text(json.dumps(row))
        torch.save((start, weights), args.folder / "weights.pt")


def run(way: str, args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """One way, in processes of its own."""
    ranks = args.ranks if WAYS[way][0] else 1
    words = [f"--{name}={getattr(args, name)}" for name in ("towers", "batch", "steps")]
    words += [f"--way={way}", f"--folder={folder}"]
    words += [f"--image_tower={args.names[0]}", f"--text_tower={args.names[1]}"]
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    threads = str(
        max(1, (os.cpu_count() or 1) // args.ranks)
    )  # as many for one process as for each of several
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": threads}
    line = [sys.executable, *(launcher if ranks > 1 else []), __file__, *words]
    subprocess.run(line, env=environment, check=True)
    row: dict[str, Any] = json.loads(folder.joinpath("row.json").read_text())
    return row


def distance(reference: Path, other: Path) -> float:
    """Between the ends, as a share of the way from the reference's start to its end."""
    start, end = torch.load(reference / "weights.pt", weights_only=True)
    _, there = torch.load(other / "weights.pt", weights_only=True)

    def norm(one: dict[str, Tensor], two: dict[str, Tensor]) -> float:
        return sum(float((one[name] - two[name]).square().sum()) for name in start) ** 0.5

    return norm(there, end) / norm(end, start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--ranks", type=int, default=torch.cuda.device_count() or 2)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--towers", choices=IMAGE_SIZE, default="small")
    parser.add_argument("--only", nargs="*", choices=WAYS, metavar="WAY", help=", ".join(WAYS))
    parser.add_argument("--out", type=Path, default=report.RESULTS)
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--image_tower", help=argparse.SUPPRESS)
    parser.add_argument("--text_tower", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.way:
        train(args)
        return
    if args.batch % args.ranks or args.steps < WARM_UP + 2:
        parser.error(f"--batch is a multiple of --ranks {args.ranks}, --steps at least {WARM_UP + 2}")
    rows: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory(prefix="strategies-") as work:
        texts = Path(work, "text-tower")
        texts.mkdir()
        args.names = ("random:vit_small_patch16_224", f"random:{text_folder(texts)}")
        if args.towers == "base":
            args.names = tower_names("base", texts)
        for way in [REFERENCE, *(way for way in args.only or WAYS if way != REFERENCE)]:
            folder = Path(work, way)
            folder.mkdir()
            rows[way] = run(way, args, folder)
            rows[way]["distance"] = distance(Path(work, REFERENCE), folder)
            print(way, rows[way], flush=True)
            write(rows, args)


def write(rows: dict[str, dict[str, Any]], args: argparse.Namespace) -> None:
    device = "gpu" if torch.cuda.is_available() else "cpu"
    settings = {name: getattr(args, name) for name in ("towers", "batch", "steps")}
    head = report.header("torch", "lightning", "timm", "transformers", device=device, **settings)
    if device == "gpu":
        head["machine"] = f"{torch.cuda.device_count()} × {torch.cuda.get_device_name()}; {head['machine']}"
    memory = "GPU memory" if device == "gpu" else "resident memory"
    lines = [
        f"# The same {args.steps} steps, {args.towers} towers",
        "",
        report.provenance(head),
        "",
        f"{args.batch} pairs a step, over all ranks. Distance: from the end of one process in fp32, as a",
        f"share of the way it went. Median of the steps after the first {WARM_UP}; peak {memory} of the",
        "first rank.",
        "",
        "| | ranks | distance | samples a second | peak, GB |",
        "|---|---|---|---|---|",
    ]
    for name, row in rows.items():
        cells = [
            name,
            row["ranks"],
            f"{row['distance']:.1e}",
            f"{row['samples_per_second']:.1f}",
            f"{row['peak_bytes'] / 1e9:.2f}",
        ]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    report.save(args.out, f"strategies-{args.towers}", head, rows, lines)


if __name__ == "__main__":
    main()
