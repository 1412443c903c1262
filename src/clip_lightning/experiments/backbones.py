"""Every pair of an image tower and a text tower, trained one after the other, and gone on with."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import yaml

from clip_lightning.errors import UserError
from clip_lightning.experiments.compare import settings_of, short_names
from clip_lightning.experiments.costs import CostRecorder
from clip_lightning.experiments.run_records import (
    COSTS_FILE,
    LeftOut,
    RunRecord,
    flat,
    make_folder,
    read_folder,
    run_folders,
)
from clip_lightning.files import write_atomically
from clip_lightning.model.towers import ImageTower, TextTower
from clip_lightning.terminal import public
from clip_lightning.training.fitting import fit, rehearse


@dataclass(frozen=True)
class Pair:
    """One training: an image tower, a text tower, a seed.

    Attributes:
        name: for people, `A × B`.
        folder: where its run lies; another one for other settings or data.
    """

    image_tower: str
    text_tower: str
    seed: int
    name: str
    folder: Path

    def words(self) -> list[str]:
        """The options of `fit` in which the pairs differ."""
        return [
            f"--model.image_tower={self.image_tower}",
            f"--model.text_tower={self.text_tower}",
            f"--seed_everything={self.seed}",
            f"--trainer.default_root_dir={self.folder}",
        ]


class Backbones:
    """The trainings of a comparison.

    Attributes:
        folder: where everything goes.
        pairs: what is to be trained, in order.
        records: of the pairs that are finished so far.
        failed: the pairs that are not, and why.
    """

    def __init__(
        self, images: list[str], texts: list[str], options: list[str], seeds: int, out: Path | None
    ) -> None:
        """Look at everything that can be wrong before the first training.

        Args:
            images: names of image towers.
            texts: names of text towers.
            options: words of `fit` for every pair.
            seeds: trainings of each pair.
            out: where everything goes; by default the folder of the same command, if it was begun before.

        Raises:
            UserError: the options, the data or the folder cannot be used.
        """
        rehearsal = rehearse(options)
        config = rehearsal.config["fit"]
        _check(config)
        # several devices would mean several processes, each of which began the whole comparison again
        self._options = [*options, "--trainer.devices=1"]
        self._has_group = _is_wandb(config.trainer.logger)
        self._wrong = _wrong_towers(images, texts, config)
        recorded = [*map(public, options)]
        command = {"image_towers": images, "text_towers": texts, "options": recorded, "seeds": seeds}
        self.folder = make_folder(out or _earlier(Path(config.trainer.default_root_dir), command))
        settings = settings_of(flat(yaml.safe_load(rehearsal.config_to_save)))
        usable_images, usable_texts = (
            [n for n in names if n not in self._wrong] for names in (images, texts)
        )
        if usable_images and usable_texts:
            settings["data_digest"] = rehearsal.read_data(usable_images[0], usable_texts[0])
        write_atomically(self.folder / "command.json", json.dumps(command, indent=2).encode())
        first = int(config.seed_everything)
        self.pairs = _pairs(images, texts, range(first, first + seeds), settings, self.folder)
        self.records: list[RunRecord] = []
        self.failed: list[LeftOut] = []
        self._latencies: dict[str, dict[str, Any]] = {}

    def train(self) -> None:
        """Train what is not finished.

        Raises:
            KeyboardInterrupt: Ctrl-C, after the running pair was saved.
        """
        for number, pair in enumerate(self.pairs, start=1):
            say(title := f"pair {number} of {len(self.pairs)}: {pair.name}")
            result = self._result(pair)
            if isinstance(result, RunRecord):
                self.records.append(result)
            else:
                say(f"{title}: failed: {result.reason}")
                self.failed.append(LeftOut(pair.name, result.reason))

    def _result(self, pair: Pair) -> RunRecord | LeftOut:
        for tower in (pair.image_tower, pair.text_tower):
            if tower in self._wrong:
                return LeftOut(pair.name, self._wrong[tower])
        try:
            return read_folder(self._run_of(pair))
        except UserError as error:
            return LeftOut(pair.name, str(error))
        except Exception as error:  # one pair that cannot be trained is no reason to lose the others
            traceback.print_exc()
            return LeftOut(pair.name, f"{type(error).__name__}: {' '.join(str(error).split())}")

    def _run_of(self, pair: Pair) -> Path:
        """The folder of the pair's finished run: one that is there, gone on with, or new."""
        resumed: list[str] = []
        for folder in run_folders(pair.folder, depth=1):
            if (folder / COSTS_FILE).is_file():
                say("finished before")
                costs = json.loads((folder / COSTS_FILE).read_text())
                latency = {name: value for name, value in costs.items() if name.startswith("image_latency")}
                self._latencies.setdefault(pair.image_tower, latency)
                return folder
            if (last := folder / "checkpoints" / "last.ckpt").is_file():
                resumed = [f"--ckpt_path={last}"]  # the newest of several
        named = [f"--trainer.logger.group={self.folder.name}", f"--trainer.logger.name={pair.name}"]
        recorder = CostRecorder(self._latencies)
        folder = fit(
            [*self._options, *pair.words(), *(named if self._has_group else []), *resumed], [recorder]
        )
        write_atomically(folder / COSTS_FILE, json.dumps(recorder.costs, indent=2).encode())
        return folder


def _pairs(
    images: Sequence[str], texts: Sequence[str], seeds: range, settings: dict[str, Any], folder: Path
) -> list[Pair]:
    names = short_names([*images, *texts])
    pairs = []
    for image, text, seed in product(images, texts, seeds):
        key = json.dumps([settings, image, text, seed], sort_keys=True, default=str)
        digest = hashlib.sha256(key.encode()).hexdigest()[:8]
        readable = re.sub(r"[^\w.@-]+", "_", f"{names[image]}_x_{names[text]}")[:80]
        name = f"{names[image]} × {names[text]}" + (f", seed {seed}" if len(seeds) > 1 else "")
        pairs.append(Pair(image, text, seed, name, folder / "runs" / f"{readable}-{seed}-{digest}"))
    return pairs


def _check(config: Any) -> None:
    """Refuse options of `fit` that a comparison cannot have."""
    if config.ckpt_path is not None:
        raise UserError("--ckpt_path belongs to one run; the same comparison again goes on by itself")
    if config.model.init_from is not None:
        raise UserError("--model.init_from has towers already; compare-backbones takes --image_towers NAMES")
    if config.trainer.num_nodes != 1 or str(config.trainer.devices) not in ("auto", "1"):
        raise UserError(
            "compare-backbones trains one pair after the other on one device; leave --trainer.devices and "
            "--trainer.num_nodes out"
        )


def _wrong_towers(images: list[str], texts: list[str], config: Any) -> dict[str, str]:
    """Towers that cannot be had, and why: asked now, not after an hour of other pairs."""
    wrong = {}
    for build, names, size in (
        (ImageTower.from_name, images, config.data.image_size),
        (TextTower.from_name, texts, config.model.max_length),
    ):
        for name in names:
            try:
                build(name, size)
            except UserError as error:
                wrong[name] = str(error)
                say(f"{name} cannot be compared: {error}")
    return wrong


def _is_wandb(logger: Any) -> bool:
    """Whether it has a group and a name to set; several loggers at once are left as they are."""
    return str(getattr(logger, "class_path", "")).rpartition(".")[2] in ("RunLogger", "WandbLogger")


def _earlier(root: Path, command: dict[str, Any]) -> Path:
    """The folder in which the same command was begun, else a new one."""
    for folder in sorted(root.glob("compare-*"), reverse=True):
        with contextlib.suppress(OSError, ValueError):
            if json.loads((folder / "command.json").read_text()) == command:
                say(f"going on in {folder}; --out FOLDER begins anew")
                return folder
    return root / time.strftime("compare-%Y%m%d-%H%M%S")


def say(line: str) -> None:
    """Progress, on stderr."""
    print(line, file=sys.stderr, flush=True)
