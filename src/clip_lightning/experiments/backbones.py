"""Trains every pair of an image tower and a text tower, and resumes interrupted pairs."""

from __future__ import annotations

import hashlib
import io
import json
import re
import sys
import traceback
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from clip_lightning.errors import UserError
from clip_lightning.experiments.compare import settings_of, short_names, short_tower
from clip_lightning.experiments.run_records import COSTS_FILE, CostRecorder, RunRecord, flat, read_folder
from clip_lightning.files import write_atomically
from clip_lightning.model.towers import ImageTower, TextTower
from clip_lightning.run_folder import RunFolder
from clip_lightning.training.cli import fit, rehearse


class Pair(NamedTuple):
    """Describes one training: its display name, its towers, its seed, and the folder of its runs."""

    name: str
    towers: tuple[str, str]
    seed: int
    folder: Path


class Backbones:
    """Trains the pairs of a comparison."""

    def __init__(
        self, images: list[str], texts: list[str], options: list[str], seeds: int, out: Path | None
    ) -> None:
        """Check the options of `fit`, the towers and the data before the first training."""
        # with several devices, each of the processes would start the complete comparison
        self._options = [*options, "--trainer.devices=1"]
        rehearsal = rehearse(options)
        config = rehearsal.config["fit"]
        _check(config)
        # the same command finds its folder again
        command = hashlib.sha256(json.dumps([images, texts, options, seeds]).encode()).hexdigest()[:8]
        self.folder = out or Path(config.trainer.default_root_dir, f"compare-{command}")
        if out is None and self.folder.exists():
            print_progress(f"resuming the comparison in {self.folder}; set --out FOLDER to start another")
        self._group = group_arguments(config, self.folder.name)
        for image in images:
            ImageTower.from_name(image, config.model.towers.image_size)
        for text in texts:
            TextTower.from_name(text, config.model.towers.max_length)
        settings = settings_of(flat(yaml.safe_load(rehearsal.config_to_save)))
        settings["data_digest"] = rehearsal.read_data(images[0], texts[0])
        short = short_names([*images, *texts], short_tower)
        self.pairs: list[Pair] = []
        for image, text, n in product(images, texts, range(seeds)):
            seed = int(config.seed_everything) + n
            key = json.dumps([settings, image, text, seed], sort_keys=True, default=str)
            digest = hashlib.sha256(key.encode()).hexdigest()[:8]
            readable = re.sub(r"[^\w.@-]+", "_", f"{short[image]}_x_{short[text]}")[:80]
            folder = self.folder / "runs" / f"{readable}-{seed}-{digest}"
            name = f"{short[image]} × {short[text]}" + (f", seed {seed}" if seeds > 1 else "")
            self.pairs.append(Pair(name, (image, text), seed, folder))
        self.records: list[RunRecord] = []  # the finished pairs
        self.failed: dict[str, str] = {}  # the reason by the name of each pair
        self._latencies: dict[str, dict[str, Any]] = {}

    def train(self) -> None:
        """Train the pairs that have not finished; after Ctrl-C, the running pair has been saved."""
        for number, pair in enumerate(self.pairs, start=1):
            title = f"pair {number} of {len(self.pairs)}: {pair.name}"
            print_progress(title)
            try:
                record = read_folder(self._train(pair))
            except Exception as error:  # the other pairs are still trained
                reason = " ".join(str(error).split())
                if not isinstance(error, UserError):
                    traceback.print_exc()
                    reason = f"{type(error).__name__}: {reason}"
                self.failed[pair.name] = reason
                print_progress(f"{title}: failed: {reason}")
                continue
            self.records.append(record)
            seconds = record.values.get("training_seconds", 0)
            print_progress(f"{title}: finished, rsum {record.values['rsum']:.1f}, {seconds:.0f} s")

    def _train(self, pair: Pair) -> Path:
        """Return the folder of the pair's finished run, after resuming or starting it if necessary."""
        resumed: list[str] = []
        for run in RunFolder.runs(pair.folder):
            if (run.path / COSTS_FILE).is_file():
                costs = json.loads((run.path / COSTS_FILE).read_text())
                latency = {name: value for name, value in costs.items() if name.startswith("image_latency")}
                self._latencies.setdefault(pair.towers[0], latency)
                return run.path
            if run.last.is_file():
                resumed = [f"--ckpt_path={run.last}"]  # of the newest run
        arguments = [
            *self._options,
            f"--model.image_tower={pair.towers[0]}",
            f"--model.text_tower={pair.towers[1]}",
            f"--seed_everything={pair.seed}",
            f"--trainer.default_root_dir={pair.folder}",
            *([*self._group, f"--trainer.logger.name={pair.name}"] if self._group else []),
            *resumed,
        ]
        recorder = CostRecorder(self._latencies)
        folder = fit(arguments, [recorder], io.StringIO())  # the result is in the run's folder, too
        write_atomically(folder / COSTS_FILE, json.dumps(recorder.costs, indent=2).encode())
        return folder


def _check(config: Any) -> None:
    """Reject options of `fit` that cannot be used in a comparison."""
    trainer = config.trainer
    one_device = trainer.num_nodes == 1 and str(trainer.devices) in ("auto", "1")
    if config.ckpt_path:
        problem = "--ckpt_path is for a single run; remove it, and repeat the command to resume"
    elif config.model.init_from:
        problem = "--model.init_from has its own towers; use --image_towers NAMES instead"
    elif not one_device or "fsdp" in str(trainer.strategy):
        several = "--trainer.devices, --trainer.num_nodes, --trainer.strategy fsdp"
        problem = f"each pair is trained on one device; remove {several}"
    else:
        return
    raise UserError(f"compare-backbones: {problem}")


def group_arguments(config: Any, name: str) -> list[str]:
    """Return the arguments that put runs into one W&B group, by default `name`; none without W&B."""
    logger = config.trainer.logger
    if str(getattr(logger, "class_path", "")).rpartition(".")[2] not in ("RunLogger", "WandbLogger"):
        return []
    return [f"--trainer.logger.group={getattr(logger.init_args, 'group', None) or name}"]


def print_progress(line: str) -> None:
    """Print a line to stderr."""
    print(line, file=sys.stderr, flush=True)
