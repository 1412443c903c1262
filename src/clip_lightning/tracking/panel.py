"""Defines the base class of panels, which show results of validations in files and in W&B."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from PIL import Image

from clip_lightning.run_folder import RunFolder


class Panel(Callback):
    """Base class of panels, which show results of each validation, and more when the training ends.

    A failure to show something is a warning and does not end the run.

    Attributes:
        folder: the folder of the run, by default that of the trainer.
    """

    folder: Path | None = None

    def __init__(self) -> None:
        self._warned: set[str] = set()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show the remaining results of the last validation."""
        self.show_rest(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Show the remaining results of the last validation when the run is interrupted."""
        self.show_rest(trainer)

    def show_rest(self, trainer: Trainer) -> None:
        """Show those results of the last validation that are shown only once; by default, there are none."""

    def run_folder(self, trainer: Trainer) -> RunFolder:
        """Return the folder of the run."""
        return RunFolder(Path(self.folder or trainer.default_root_dir))

    @contextmanager
    def sparing(self, failure: str) -> Iterator[None]:
        """Turn an error into a warning, once per run, so that it does not end the run."""
        try:
            yield
        except Exception as error:
            if failure not in self._warned:
                self._warned.add(failure)
                rank_zero_warn(f"{failure}: {type(error).__name__}: {error}")

    def log_media(self, trainer: Trainer, step: int, make: Callable[[], dict[str, Any]]) -> None:
        """Log what `make` returns, W&B's types by name, to every W&B run of the trainer, if there is one.

        Lightning counts the metrics of a validation at the step `trainer.global_step - 1`.
        """
        runs = [logger for logger in trainer.loggers if isinstance(logger, WandbLogger)]
        with self.sparing(f"W&B did not log what {type(self).__name__} shows"):
            content = make() if runs else {}
            for logger in runs:
                logger.log_metrics(content, step)


def png_image(png: bytes, caption: str) -> Any:
    """Return a PNG as a `wandb.Image`."""
    import wandb

    return wandb.Image(Image.open(BytesIO(png)), caption=caption)
