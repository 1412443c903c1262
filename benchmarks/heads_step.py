"""A step of `fit --config heads` on cached features, beside a bare loop with the same mathematics.

    python benchmarks/heads_step.py --root FLICKR8K [--cache FOLDER] [--repeats 5]

Each way runs in a process of its own with one thread, in turn; the figure is the median CPU time of a step.
The bare loop has the batches, heads, loss, clipping and optimizer of the config, written in plain PyTorch:
features of the same shapes lie in memory as one tensor each, and nothing is logged, validated or saved. The
first run fills the cache.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import Callback
from report import RESULTS, header, provenance, save
from torch import Tensor, nn

HERE = Path(__file__).parent
IMAGES, CAPTIONS, WIDTHS, EMBED_DIM = 6000, 5, (1280, 384), 1024
BATCH, TEXTS, DROPOUT, SMOOTHING = 256, 3, 0.3, 0.1
STEPS, SKIPPED = 200, 20


class StepTimes(Callback):
    """Writes the median CPU time of the steps after the first ones, in seconds."""

    def __init__(self, file: str) -> None:
        self.file, self.times, self.began = Path(file), [], 0.0

    def on_train_epoch_start(self, *_: Any) -> None:
        self.began = 0.0  # a step after a validation is not measured

    def on_train_batch_end(self, *_: Any) -> None:
        now = time.process_time()
        if self.began:
            self.times.append(now - self.began)
        self.began = now

    def on_train_end(self, *_: Any) -> None:
        self.file.write_text(str(statistics.median(self.times[SKIPPED:])))


def contrastive_loss(image: Tensor, text: Tensor, scale: Tensor, owner: Tensor) -> Tensor:
    """InfoNCE in both directions with label smoothing; all captions of an image are its positives."""
    logits = scale * image @ text.T
    positive = (torch.arange(len(image))[:, None] == owner).float()
    loss = logits.new_zeros(())
    for way, target in ((logits, positive), (logits.T, positive.T)):
        target = (1 - SMOOTHING) * target / target.sum(1, keepdim=True) + SMOOTHING / target.shape[1]
        loss = loss + F.cross_entropy(way, target) / 2
    return loss


def bare_loop() -> float:
    """Return the median CPU time of a step in seconds."""
    generator = torch.Generator().manual_seed(0)
    images, texts = (
        torch.randn(rows, width, generator=generator).half()
        for rows, width in zip((2 * IMAGES, CAPTIONS * IMAGES), WIDTHS, strict=True)
    )
    heads = [nn.Sequential(nn.Dropout(DROPOUT), nn.Linear(width, EMBED_DIM, bias=False)) for width in WIDTHS]
    log_scale = nn.Parameter(torch.tensor(2.66))
    weights = [heads[0][1].weight, heads[1][1].weight, log_scale]
    optimizer = torch.optim.AdamW(weights, lr=2e-3, weight_decay=0.1, fused=True)
    owner, times = torch.arange(BATCH).repeat_interleave(TEXTS), []
    for _ in range(STEPS):
        began = time.process_time()
        rows = torch.randperm(IMAGES)[:BATCH]
        views = rows + IMAGES * torch.randint(2, (BATCH,))
        chosen = rows[:, None] * CAPTIONS + torch.rand(BATCH, CAPTIONS).argsort(1)[:, :TEXTS]
        with torch.autocast("cpu", torch.bfloat16):
            image = heads[0](images[views].float())
            text = heads[1](texts[chosen.flatten()].float())
        image, text = F.normalize(image.float(), dim=1), F.normalize(text.float(), dim=1)
        contrastive_loss(image, text, log_scale.exp(), owner).backward()
        nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        times.append(time.process_time() - began)
    return statistics.median(times[SKIPPED:])


def fit(root: Path, cache: Path, folder: Path) -> float:
    """Return the median CPU time of a step of the command in seconds."""
    options = [f"--data.root={root}", f"--data.cache={cache}", "--trainer.logger=false"]
    options += [f"--trainer.default_root_dir={folder}", "--trainer.callbacks+=heads_step.StepTimes"]
    options += [f"--trainer.callbacks.file={folder / 'step.txt'}"]
    command = [sys.executable, "-m", "clip_lightning", "fit", "--config=heads", *options]
    subprocess.run(command, check=True, env=environment(), stdout=subprocess.DEVNULL)
    return float((folder / "step.txt").read_text())


def environment() -> dict[str, str]:
    path = os.pathsep.join(filter(None, (str(HERE), os.environ.get("PYTHONPATH"))))
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--root", type=Path)
    parser.add_argument("--cache", type=Path, default=Path("runs/heads-step"))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--bare", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.bare:
        from clip_lightning.cpu import keep_freed_memory

        keep_freed_memory()
        print(json.dumps(bare_loop()))
        return
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        fit(given.root, given.cache, Path(folder))
        for _ in range(given.repeats):
            ours = fit(given.root, given.cache, Path(folder))
            command = [sys.executable, __file__, "--bare"]
            bare = float(subprocess.run(command, check=True, env=environment(), stdout=-1).stdout)
            rows.append({"fit_ms": 1e3 * ours, "bare_ms": 1e3 * bare, "ratio": ours / bare})
            print(rows[-1], flush=True)
    head = header("torch", "lightning", repeats=given.repeats)
    lines = [provenance(head), "", "| run | `fit`, ms | bare loop, ms | ratio |", "|---|---|---|---|"]
    for number, row in enumerate(rows, 1):
        lines.append(f"| {number} | {row['fit_ms']:.1f} | {row['bare_ms']:.1f} | {row['ratio']:.2f} |")
    medians = (statistics.median(row[key] for row in rows) for key in ("fit_ms", "bare_ms", "ratio"))
    lines.append("| median | {:.1f} | {:.1f} | {:.2f} |".format(*medians))
    print("\n".join(lines))
    save(given.out, "heads-step", head, rows, lines)


if __name__ == "__main__":
    main()
