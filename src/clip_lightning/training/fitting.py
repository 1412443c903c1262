"""Runs `fit` within another command, or only parses and checks its options."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TextIO

import torch
from lightning.pytorch import Callback

from clip_lightning.errors import UserError
from clip_lightning.tracking.logger import finished_run
from clip_lightning.training.cli import RunCLI, run_as


def fit(options: list[str], callbacks: Sequence[Callback] = (), out: TextIO | None = None) -> Path:
    """Train once within this process, as `clip-lightning fit` does, and return the run's folder.

    Nothing is printed to stdout, and the W&B run is finished at the end.

    Args:
        options: the options of `fit`.
        callbacks: additional callbacks.
        out: where the result is printed; stderr by default.
    """
    _hide_repeated_messages()
    args = ["fit", *options]
    with contextlib.redirect_stdout(out or sys.stderr), finished_run(), _separate_ranks(args):
        try:
            return run_as(RunCLI, args, callbacks).run.path
        except SystemExit as stop:
            if isinstance(stop.__context__, KeyboardInterrupt):  # Lightning exits after Ctrl-C
                raise KeyboardInterrupt from stop
            if isinstance(stop.code, str):  # the parser's message
                raise UserError(stop.code) from stop
            raise


@contextlib.contextmanager
def _separate_ranks(args: list[str]) -> Iterator[None]:
    """Pass `args` to the ranks that Lightning starts, and let the next run start ranks of its own."""
    # the variables that Lightning sets in the process that starts the other ranks
    launched = ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK", "LOCAL_RANK", "WORLD_SIZE")
    before = {name: os.environ[name] for name in launched if name in os.environ}
    original = sys.argv[1:]
    sys.argv[1:] = args  # Lightning starts each rank with the arguments of this process
    try:
        yield
    finally:
        sys.argv[1:] = original
        if "LOCAL_RANK" not in before and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
        for name in launched:
            os.environ.pop(name, None)
        os.environ |= before


class Rehearsal(RunCLI):
    """Parses the options of `fit` into the complete configuration, and reads the data, without training."""

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Return only `fit`, since building a parser is slow."""
        return {"fit": RunCLI.subcommands()["fit"]}

    def instantiate_classes(self) -> None:
        """Leave this to `read_data`."""

    def after_instantiate_classes(self) -> None:
        """Check nothing, since there is no model yet."""

    def _run_subcommand(self, subcommand: str) -> None:
        """Run nothing."""

    def read_data(self, image_tower: str, text_tower: str) -> str:
        """Build the model and the data with these towers, which may find errors; return the data's digest."""
        config = self.config["fit"]
        config.model.image_tower, config.model.text_tower = image_tower, text_tower
        config.trainer.logger = False
        super().instantiate_classes()
        self.datamodule.prepare_data()
        self.datamodule.setup("fit")
        return str(self.datamodule.digest)


def rehearse(options: list[str]) -> Rehearsal:
    """Parse the options of `fit` without training, for runs whose results will be compared."""
    _hide_repeated_messages()
    rehearsal = run_as(Rehearsal, ["fit", *options])
    trainer = rehearsal.config["fit"].trainer
    if trainer.fast_dev_run or trainer.limit_val_batches == 0:
        option = "fast_dev_run" if trainer.fast_dev_run else "limit_val_batches"
        raise UserError(
            f"--trainer.{option} {trainer[option]}: a run without a validation has no result to compare; "
            "remove the option"
        )
    return rehearsal


def _hide_repeated_messages() -> None:
    os.environ.setdefault("WANDB_SILENT", "true")
    logging.getLogger("lightning.fabric.utilities.seed").setLevel(logging.WARNING)  # configs have the seed
