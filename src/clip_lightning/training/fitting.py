"""Run `fit` from within a process, or only parse and check its options: for what trains many times."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TextIO

import torch
from jsonargparse import Namespace
from lightning.pytorch import Callback

from clip_lightning.errors import UserError
from clip_lightning.tracking.logger import finished_run
from clip_lightning.training.cli import RunCLI, run_as


def fit(words: list[str], callbacks: Sequence[Callback] = (), out: TextIO | None = None) -> Path:
    """Train once within this process, as `clip-lightning fit` with these words does.

    Stdout stays the caller's own. A W&B run that it began is finished.

    Args:
        words: the options of `fit`.
        callbacks: of the caller's own, beside those of every run.
        out: where its result is printed; stderr by default.

    Returns:
        The run's folder.

    Raises:
        UserError: what was asked for cannot be done.
        KeyboardInterrupt: Ctrl-C, after the run was saved.
    """
    with contextlib.redirect_stdout(out or sys.stderr), finished_run(), _ranks_of_its_own(["fit", *words]):
        try:
            return run_as(RunCLI, ["fit", *words], callbacks).run.path
        except SystemExit as stop:  # how Lightning ends after Ctrl-C
            if isinstance(stop.__context__, KeyboardInterrupt):
                raise KeyboardInterrupt from stop
            raise


# What Lightning leaves in the environment of the process that has started other ranks.
_LAUNCHED = ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK", "LOCAL_RANK", "WORLD_SIZE")


@contextlib.contextmanager
def _ranks_of_its_own(words: list[str]) -> Iterator[None]:
    """Ranks that Lightning starts within get these words; at the end, the next run can start its own."""
    before = {name: os.environ.get(name) for name in _LAUNCHED}
    given = sys.argv[1:]
    sys.argv[1:] = words  # Lightning starts the program of this process again
    try:
        yield
    finally:
        sys.argv[1:] = given
        if before["LOCAL_RANK"] is None and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


class Rehearsal(RunCLI):
    """What `fit` makes of its words, without a run: the complete configuration, and the data."""

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Only `fit`: to build a parser takes a while."""
        return {"fit": RunCLI.subcommands()["fit"]}

    def instantiate_classes(self) -> None:
        """Nothing is built before it is asked for."""

    def after_instantiate_classes(self) -> None:
        """There is no model yet."""

    def _run_subcommand(self, subcommand: str) -> None:
        """Nothing is run."""

    def read_data(self, image_tower: str, text_tower: str) -> str:
        """Build everything with these towers, which shows what else is wrong; the data's digest."""
        config = self.config["fit"]
        config.model.image_tower, config.model.text_tower = image_tower, text_tower
        config.trainer.logger = False
        super().instantiate_classes()
        self.datamodule.prepare_data()
        self.datamodule.setup("fit")
        return str(self.datamodule.digest)


def check_validates(config: Namespace) -> None:
    """Refuse options of `fit` with which there is nothing to compare runs by.

    Raises:
        UserError: the run would not be validated.
    """
    if config.trainer.fast_dev_run or config.trainer.limit_val_batches == 0:
        option = "fast_dev_run" if config.trainer.fast_dev_run else "limit_val_batches"
        raise UserError(
            f"--trainer.{option} {config.trainer[option]}: a run without validation has no result to compare "
            "with others; leave it out"
        )


def rehearse(words: list[str]) -> Rehearsal:
    """Read the options of `fit` without running it.

    Raises:
        UserError: what was asked for cannot be done.
    """
    return run_as(Rehearsal, ["fit", *words])
