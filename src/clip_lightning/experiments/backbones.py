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
from clip_lightning.experiments.costs import CostRecorder
from clip_lightning.experiments.run_records import COSTS_FILE, RunRecord, flat, read_folder, run_folders
from clip_lightning.files import write_atomically
from clip_lightning.model.towers import ImageTower, TextTower
from clip_lightning.run_folder import RunFolder
from clip_lightning.training.fitting import fit, rehearse


class Pair(NamedTuple):
    """Describes one training: its display name, its towers, its seed, and the folder of its runs."""

    name: str
    towers: tuple[str, str]
    seed: int
    folder: Path


class Backbones:
    """Trains the pairs of a comparison.

    Attributes:
        folder: the folder of the comparison.
        pairs: the pairs to train, in order.
        records: the finished pairs.
        failed: the reason by the name of each failed pair.
    """

    def __init__(
        self, images: list[str], texts: list[str], options: list[str], seeds: int, out: Path | None
    ) -> None:
        """Check the options, the towers and the data before the first training.

        Args:
            images: names of image towers.
            texts: names of text towers.
            options: options of `fit` for every pair.
            seeds: number of trainings of each pair.
            out: folder of the comparison; by default a folder whose name depends on the other arguments, so
                that the same command resumes.

        Raises:
            UserError: the options or the data cannot be used.
        """
        # with several devices, each of the processes would start the complete comparison
        self._options = [*options, "--trainer.devices=1"]
        rehearsal = rehearse(options)
        config = rehearsal.config["fit"]
        _check(config)
        command = hashlib.sha256(json.dumps([images, texts, options, seeds]).encode()).hexdigest()[:8]
        self.folder = out or Path(config.trainer.default_root_dir, f"compare-{command}")
        if out is None and self.folder.exists():
            print_progress(f"resuming the comparison in {self.folder}; set --out FOLDER to start another")
        self._group = group_arguments(config, self.folder.name)
        self._unusable: dict[str, str] = {}
        for build, names, size in (
            (ImageTower.from_name, images, config.model.towers.image_size),
            (TextTower.from_name, texts, config.model.towers.max_length),
        ):
            for name in names:
                try:
                    build(name, size)
                except UserError as error:
                    self._unusable[name] = str(error)
                    print_progress(f"{name} cannot be used: {error}")
        settings = settings_of(flat(yaml.safe_load(rehearsal.config_to_save)))
        usable = [[name for name in names if name not in self._unusable] for names in (images, texts)]
        if all(usable):
            settings["data_digest"] = rehearsal.read_data(usable[0][0], usable[1][0])
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
        self.records: list[RunRecord] = []
        self.failed: dict[str, str] = {}
        self._latencies: dict[str, dict[str, Any]] = {}

    def train(self) -> None:
        """Train the pairs that have not finished.

        Raises:
            KeyboardInterrupt: Ctrl-C, after the running pair was saved.
        """
        for number, pair in enumerate(self.pairs, start=1):
            title = f"pair {number} of {len(self.pairs)}: {pair.name}"
            print_progress(title)
            try:
                record = read_folder(self._train(pair))
                self.records.append(record)
                seconds = record.values.get("training_seconds", 0)
                print_progress(f"{title}: finished, rsum {record.values['rsum']:.1f}, {seconds:.0f} s")
                continue
            except UserError as error:
                self.failed[pair.name] = str(error)
            except Exception as error:  # the other pairs are still trained
                traceback.print_exc()
                self.failed[pair.name] = f"{type(error).__name__}: {' '.join(str(error).split())}"
            print_progress(f"{title}: failed: {self.failed[pair.name]}")

    def _train(self, pair: Pair) -> Path:
        """Return the folder of the pair's finished run, after resuming or starting it if necessary."""
        for tower in pair.towers:
            if tower in self._unusable:
                raise UserError(self._unusable[tower])
        resumed: list[str] = []
        for folder in run_folders(pair.folder, depth=1):
            if (folder / COSTS_FILE).is_file():
                costs = json.loads((folder / COSTS_FILE).read_text())
                latency = {name: value for name, value in costs.items() if name.startswith("image_latency")}
                self._latencies.setdefault(pair.towers[0], latency)
                return folder
            if (last := RunFolder(folder).last).is_file():
                resumed = [f"--ckpt_path={last}"]  # of the newest run
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
        run = fit(arguments, [recorder], io.StringIO())  # the result is in the run's folder, too
        write_atomically(run / COSTS_FILE, json.dumps(recorder.costs, indent=2).encode())
        return run


def _check(config: Any) -> None:
    """Reject options of `fit` that cannot be used in a comparison."""
    one_device = config.trainer.num_nodes == 1 and str(config.trainer.devices) in ("auto", "1")
    remove = "each pair is trained on one device; remove the option"
    for is_given, message in (
        (config.ckpt_path, "--ckpt_path is for a single run; remove it, and repeat the command to resume"),
        (config.model.init_from, "--model.init_from has its own towers; use --image_towers NAMES instead"),
        (not one_device, f"--trainer.devices and --trainer.num_nodes: {remove}"),
        ("fsdp" in str(config.trainer.strategy), f"--trainer.strategy fsdp: {remove}"),
    ):
        if is_given:
            raise UserError(f"compare-backbones: {message}")


def group_arguments(config: Any, name: str) -> list[str]:
    """Return the arguments that put runs into one W&B group, by default `name`; none without W&B."""
    logger = config.trainer.logger
    if str(getattr(logger, "class_path", "")).rpartition(".")[2] not in ("RunLogger", "WandbLogger"):
        return []
    return [f"--trainer.logger.group={getattr(logger.init_args, 'group', None) or name}"]


def print_progress(line: str) -> None:
    """Print a line to stderr."""
    print(line, file=sys.stderr, flush=True)
