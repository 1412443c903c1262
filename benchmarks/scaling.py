"""The parts of a data-parallel step on one and on two processes, beside what docs/scaling.md predicts.

    python benchmarks/scaling.py [--batch 64] [--steps 8] [--ranks 1 2 4]

Both towers are trained on synthetic input; every process has one thread and `--batch` pairs. Memory of the
loss is measured in one process with the embeddings of all `--ranks`, for batches of 2048 pairs a rank.
Writes Markdown and JSON into benchmarks/results.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import resource
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import report
import torch
from gradient_cache import EMBED_DIM, IMAGE_SIZE, IMAGE_TOWER, Pairs, text_folder

LOSS_BATCH = 2048
WARM_UP = 2
PARTS = ("towers", "loss", "optimiser")


def step(batch: int, steps: int, ranks: int, folder: Path) -> None:
    """Train on `ranks` processes, and note the bytes and seconds of the first one's steps in `row.json`."""
    from lightning.pytorch import Callback, seed_everything
    from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
    from trainer import plain_trainer

    from clip_lightning import CLIPModule
    from clip_lightning.training.build import HeadOptions

    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    seed_everything(0, verbose=False)
    counted = {"reduced": 0, "gathered": 0}

    class Meter(Callback):
        def on_train_start(self, trainer: Any, module: Any) -> None:
            if ranks == 1:
                return
            gather = module.all_gather

            def counting_gather(tensor: torch.Tensor, **options: Any) -> torch.Tensor:
                everyones = gather(tensor, **options)
                counted["gathered"] += everyones.nbytes - tensor.nbytes
                return everyones

            def counting_reduce(group, bucket):  # type: ignore[no-untyped-def]  # torch looks at annotations
                counted["reduced"] += bucket.buffer().nbytes
                return default_hooks.allreduce_hook(group, bucket)

            module.all_gather = counting_gather
            trainer.strategy.model.register_comm_hook(None, counting_reduce)

        def on_train_batch_start(self, trainer: Any, module: Any, *_: Any) -> None:
            module.stopwatch.lap("waiting_for_data")

        def on_train_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
            module.stopwatch.lap("optimiser")
            self.now = {**counted, **module.stopwatch.seconds}
            if trainer.global_step == WARM_UP:
                self.began = self.now

        def on_train_end(self, trainer: Any, module: Any) -> None:  # forked: only files come back
            if trainer.is_global_zero:
                row = {name: (self.now[name] - self.began[name]) / steps for name in (*counted, *PARTS)}
                parameters = sum(p.numel() for p in module.parameters() if p.requires_grad)
                whole = {"ranks": ranks, "parameters": parameters, **row}
                (folder / "row.json").write_text(json.dumps(whole))

    module = CLIPModule(
        IMAGE_TOWER,
        f"random:{text_folder(folder)}",
        freeze="none",
        heads=HeadOptions(EMBED_DIM),
        image_size=IMAGE_SIZE,
    )
    trainer = plain_trainer(
        accelerator="cpu",
        devices=ranks,
        strategy="ddp_fork" if ranks > 1 else "auto",
        callbacks=[Meter()],
    )
    total = batch * ranks * (WARM_UP + steps)
    trainer.fit(module, torch.utils.data.DataLoader(Pairs(total), batch_size=batch))


def loss(ranks: int, own_rows: bool) -> dict[str, Any]:
    """The peak memory, above that of the embeddings, of InfoNCE forward and backward on one rank."""
    from clip_lightning.training import losses

    torch.set_num_threads(1)
    torch.manual_seed(0)
    info_nce = losses.InfoNCE()

    def run(batch: int) -> None:
        count = batch * ranks
        image, text = torch.nn.functional.normalize(torch.randn(2, count, EMBED_DIM), dim=-1).requires_grad_()
        ids = torch.arange(count)
        everyone = losses.Pairs(image, text, ids, ids)
        own = losses.Pairs(image[:batch], text[:batch], ids[:batch], ids[:batch])
        scale = torch.tensor(14.0)
        if own_rows:
            info_nce.share(own, everyone, scale, None).backward()
        else:
            info_nce(image, text, scale, None, ids, ids).backward()

    run(8)  # what a first call loads
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    run(LOSS_BATCH)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    return {"ranks": ranks, "own_rows": own_rows, "peak_bytes": 1024 * peak}


def measured(*words: str, folder: Path | None = None) -> dict[str, Any]:
    """What a process of its own has found out."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, __file__, *words], env=environment, stdout=subprocess.PIPE, text=True
    )
    done.check_returncode()
    row = json.loads((folder / "row.json").read_text() if folder else done.stdout.splitlines()[-1])
    print(row, flush=True)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4], help="of the loss's memory")
    parser.add_argument("--out", type=Path, default=report.RESULTS)
    parser.add_argument("--step", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--loss", choices=("own", "whole"), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.step:
        step(args.batch, args.steps, args.step, args.folder)
        return
    if args.loss:
        print(json.dumps(loss(args.ranks[0], args.loss == "own")))
        return
    load = os.getloadavg()[0]
    steps = []
    for ranks in (1, 2):
        with tempfile.TemporaryDirectory() as name:
            words = ["--step", str(ranks), "--batch", str(args.batch), "--steps", str(args.steps)]
            steps.append(measured(*words, "--folder", name, folder=Path(name)))
    memory = [measured("--loss", way, "--ranks", str(r)) for r in args.ranks for way in ("own", "whole")]
    write(steps, memory, load, args)


def write(
    steps: list[dict[str, Any]], memory: list[dict[str, Any]], load: float, args: argparse.Namespace
) -> None:
    settings = {"batch": args.batch, "steps": args.steps, "loss_batch": LOSS_BATCH, "load_before": load}
    head = report.header("torch", "lightning", **settings)
    millions = steps[0]["parameters"] / 1e6
    lines = [
        "# A data-parallel step on one and on two processes",
        "",
        report.provenance(head, f", load average {load:.1f} before; gloo, one thread a process, fp32"),
        "",
        f"{args.batch} pairs a process, {args.steps} steps after {WARM_UP}; {IMAGE_TOWER} at {IMAGE_SIZE} px",
        f"and a BERT with 2 layers, embeddings {EMBED_DIM} wide, {millions:.1f} M parameters trained.",
        "Expected: 4 bytes a parameter reduced; from every other process 4 × D bytes a picture and a text,",
        "and 16 of ids. Waiting for the other is within `towers` (gradients) and `loss` (embeddings).",
        "",
        "| processes | MB reduced a step | expected | MB gathered a step | expected | towers s | loss s "
        "| optimiser s | efficiency |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    alone = sum(steps[0][part] for part in PARTS)
    for row in steps:
        others = row["ranks"] - 1
        reduced = 4 * row["parameters"] * (others > 0)
        gathered = others * args.batch * (2 * 4 * EMBED_DIM + 16)
        seconds = " | ".join(f"{row[part]:.3f}" for part in PARTS)
        counts = (row["reduced"], reduced, row["gathered"], gathered)
        megabytes = " | ".join(f"{count / 1e6:.3f}" for count in counts)
        efficiency = alone / sum(row[part] for part in PARTS)
        lines.append(f"| {row['ranks']} | {megabytes} | {seconds} | {efficiency:.2f} |")
    lines += [
        "",
        f"InfoNCE, {LOSS_BATCH} pairs a rank, on one rank: peak memory of the process above that before,",
        "embeddings and their gradients included. Whole: the loss of all pairs on every rank.",
        "",
        "| ranks | own rows MB | whole MB |",
        "|---|---|---|",
    ]
    for own, whole in zip(memory[::2], memory[1::2], strict=True):
        lines.append(f"| {own['ranks']} | {own['peak_bytes'] / 1e6:.0f} | {whole['peak_bytes'] / 1e6:.0f} |")
    report.save(args.out, "scaling", head, {"steps": steps, "loss": memory}, lines)


if __name__ == "__main__":
    main()
