"""Training for an hour while things are killed and broken; every start goes on where the last one had saved.

    python benchmarks/soak.py [--minutes 60] [--seed 0]

A small model trains on drawn scenes, with crops and two loader processes, one command again and again:
`fit ... --ckpt_path auto`. After some seconds something happens: SIGKILL, SIGTERM or SIGUSR1 to the run,
SIGKILL to one of its loaders, a picture overwritten while it trains, or SIGKILL and then a flipped byte in
`last.ckpt`. Checked every time: the exit status, no traceback, one run folder, and that the next process
begins with the very step of the checkpoint. Writes Markdown and JSON into benchmarks/results.
"""

from __future__ import annotations

import argparse
import collections
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import report
import torch
from lightning.pytorch import Callback, Trainer

from clip_lightning.data.scenes import write_scenes
from clip_lightning.training.checkpoints import damage

SIGNALS = {"SIGTERM": 143, "SIGUSR1": 143, "SIGKILL": -signal.SIGKILL}
FAULTS = (*SIGNALS, "a loader killed", "a picture overwritten", "last.ckpt flipped")
LONGEST_WAIT, MOST_OVERWRITTEN = 180, 20


class Notes(Callback):
    """Writes down the step that each process begins with, and every step after it."""

    def __init__(self, file: str) -> None:
        self.file = Path(file)

    def note(self, what: str, trainer: Trainer) -> None:
        with self.file.open("a") as file:
            file.write(f"{what} {trainer.global_step}\n")

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        self.note("begins", trainer)

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
        self.note("step", trainer)


@dataclass
class Soak:
    """A run that is ended again and again."""

    work: Path
    chance: random.Random
    counts: collections.Counter[str] = field(default_factory=collections.Counter)
    memory: list[int] = field(default_factory=list)
    overwritten: int = 0

    def command(self) -> list[str]:
        options = {
            "model.image_tower": "random:test_resnet",
            "model.text_tower": "pypi:minilm-l6",
            "model.freeze": "text",
            "data.root": self.work / "scenes",
            "model.towers.image_size": 32,
            "data.batch_size": 16,
            "data.num_workers": 2,
            "data.read.max_broken": 0.2,
            "data.augmentation.min_scale": 0.5,
            "checkpoint.every_n_steps": 25,
            "early_stopping.patience": 1_000_000,
            "predictions.queries": 0,
            "trainer.accelerator": "cpu",
            "trainer.max_epochs": 100_000,
            "trainer.check_val_every_n_epoch": 5,
            "trainer.enable_progress_bar": "false",
            "trainer.default_root_dir": self.work / "runs",
            "trainer.callbacks+": "soak.Notes",
            "trainer.callbacks.file": self.work / "notes",
            "ckpt_path": "auto",
        }
        words = [f"--{name}={value}" for name, value in options.items()]
        return [sys.executable, "-m", "clip_lightning", "fit", *words]

    def notes(self) -> list[tuple[str, int]]:
        file = self.work / "notes"
        lines = file.read_text().splitlines() if file.exists() else []
        return [(what, int(step)) for what, step in map(str.split, lines)]

    def saved(self) -> int:
        """The step of the checkpoint that the next process should begin with."""
        folders = list((self.work / "runs").iterdir())
        assert len(folders) == 1, f"one run, not {len(folders)}"
        last = folders[0] / "checkpoints" / "last.ckpt"
        if damage(last) is not None:
            last = last.with_name("previous.ckpt")
        return int(torch.load(last, weights_only=True)["global_step"])

    def round(self, fault: str) -> None:
        """One process, from its start to its end by the fault."""
        begun = len(self.notes())
        expected = self.saved() if begun else 0
        with (self.work / "said").open("w") as said:
            env = {**os.environ, "PYTHONPATH": str(Path(__file__).parent), "WANDB_MODE": "offline"}
            run = subprocess.Popen(self.command(), stdout=said, stderr=said, env=env)
        self.wait_until(lambda: len(self.notes()) > begun + 30, run)
        time.sleep(self.chance.uniform(0, 15))
        process = psutil.Process(run.pid)
        self.memory.append(process.memory_info().rss)
        status = self.break_something(fault, process)
        assert run.wait(LONGEST_WAIT) == status, f"{fault}: status {run.returncode}: {self.said()}"
        if status >= 0:  # the loaders of a process that was killed may say that nobody answers them
            assert "Traceback" not in self.said(), self.said()
        what, step = self.notes()[begun]
        assert (what, step) == ("begins", expected), f"{fault}: {what} {step}, the checkpoint has {expected}"
        steps = [number for kind, number in self.notes()[begun:] if kind == "step"]
        assert steps == list(range(expected + 1, expected + 1 + len(steps))), "steps come one after the other"
        if fault == "last.ckpt flipped":
            self.flip()
        self.counts[fault] += 1

    def break_something(self, fault: str, process: psutil.Process) -> int:
        """Do it, and say with which status the process should end."""
        if fault in SIGNALS:
            process.send_signal(getattr(signal, fault))
            return SIGNALS[fault]
        if fault == "a loader killed":
            loaders = [child for child in process.children() if "clip_lightning" in " ".join(child.cmdline())]
            self.chance.choice(loaders).kill()
            return 1
        if fault == "a picture overwritten" and self.overwritten < MOST_OVERWRITTEN:
            pictures = sorted((self.work / "scenes").rglob("*.jpg"))
            picture = self.chance.choice(pictures)
            picture.write_bytes(b"\0" * picture.stat().st_size)
            self.overwritten += 1
            time.sleep(10)
            process.send_signal(signal.SIGTERM)
            return SIGNALS["SIGTERM"]
        process.kill()
        return SIGNALS["SIGKILL"]

    def flip(self) -> None:
        """One byte of the last checkpoint, in the middle of it."""
        (last,) = (self.work / "runs").glob("*/checkpoints/last.ckpt")
        content = bytearray(last.read_bytes())
        content[len(content) // 2] ^= 1
        last.write_bytes(content)

    def wait_until(self, done: Any, run: subprocess.Popen[Any]) -> None:
        end = time.monotonic() + LONGEST_WAIT
        while not done():
            assert run.poll() is None, f"it ended by itself with {run.returncode}: {self.said()}"
            assert time.monotonic() < end, f"nothing happens: {self.said()}"
            time.sleep(0.1)

    def said(self) -> str:
        return (self.work / "said").read_text()[-3000:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=report.RESULTS)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="soak-") as folder:
        os.environ["XDG_CACHE_HOME"] = f"{folder}/cache"
        soak = Soak(Path(folder), random.Random(args.seed))
        write_scenes(soak.work / "scenes", count=500, size=64, seed=args.seed)
        end = time.monotonic() + 60 * args.minutes
        queue: list[str] = []
        while time.monotonic() < end:
            queue = queue or soak.chance.sample(FAULTS, len(FAULTS))  # each once before any comes again
            fault = queue.pop()
            soak.round(fault)
            print(f"{fault}: step {soak.saved()}, {sum(soak.counts.values())} faults", flush=True)
        left = [path for path in (soak.work / "runs").rglob("*.tmp")]
        assert not left, f"nothing half-written stays: {left}"
        write(soak, args)


def write(soak: Soak, args: argparse.Namespace) -> None:
    """Markdown and JSON."""
    head = report.header("torch", "lightning", minutes=args.minutes, seed=args.seed)
    half = len(soak.memory) // 2
    early, late = statistics.median(soak.memory[:half]), statistics.median(soak.memory[half:])
    rows = {"faults": soak.counts, "last_step": soak.saved(), "memory": [early, late]}
    lines = [
        "# Soak",
        "",
        report.provenance(head),
        "",
        f"{args.minutes:g} minutes, {sum(soak.counts.values())} faults, {soak.saved():,} steps saved at the "
        "end. Every process began with the step of the checkpoint; none left a traceback or another run "
        "folder.",
        "",
        "| fault | times |",
        "|---|---|",
        *(f"| {fault} | {count} |" for fault, count in sorted(soak.counts.items())),
        "",
        f"Resident memory when the fault came, medians of both halves: {early / 1e6:,.0f} MB, "
        f"{late / 1e6:,.0f} MB.",
    ]
    report.save(args.out, "soak", head, rows, lines)


if __name__ == "__main__":
    main()
