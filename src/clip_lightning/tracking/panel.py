"""Shows results in W&B: the base class of panels, and the runs of `evaluate --wandb PROJECT`."""

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

from clip_lightning.errors import UserError, reason_of
from clip_lightning.reports.tables import ClassReport, Row
from clip_lightning.run_folder import RunFolder
from clip_lightning.terminal import printable
from clip_lightning.wandb_fetch import stays_offline

MOST_CONFUSED = 200


class Panel(Callback):
    """Base class of panels, which show results of each validation, and more when the training ends."""

    folder: Path | None = None  # of the run, by default that of the trainer

    def __init__(self) -> None:
        self._warned: set[str] = set()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.show_rest(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
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


def class_media(report: ClassReport, prefix: str = "") -> dict[str, Any]:
    """Return W&B's tables of the classes and of the most frequent confusions, and two plots, by name."""
    import wandb

    classes = [[printable(name), *numbers] for name, *numbers in report.classes()]
    confused = [[printable(true), printable(taken), n] for true, taken, n in report.confused(MOST_CONFUSED)]
    title = printable(report.title)
    return {
        f"{prefix}zero_shot_classes": wandb.Table(["class", "images", "right", "accuracy"], classes),
        f"{prefix}zero_shot_confused": wandb.Table(["class", "taken for", "images"], confused),
        **{f"{prefix}zero_shot_{name}": png_image(png, title) for name, png in report.plots().items()},
    }


def track_evaluation(project: str, row: Row, folder: Path, report: ClassReport | None = None) -> str:
    """Log the scores of one model on one data set as a W&B run, offline if no API key is configured.

    The scores in the row are the run's summary, and everything else is its configuration. Return the URL of
    the run, or the command that uploads it.
    """
    import wandb

    entity, _, name = project.rpartition("/")
    if not name or "/" in entity:
        raise UserError(f"--wandb {project}: expected PROJECT or ENTITY/PROJECT")
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with wandb.init(
            project=name,
            entity=entity or None,
            job_type="evaluate",
            name=f"{row['model']} on {row['data']}"[:120],
            config={key: value for key, value in row.items() if not isinstance(value, float)},
            dir=str(folder),
            reinit="finish_previous",
            mode="offline" if stays_offline(None) else None,
        ) as run:
            run.summary.update({key: value for key, value in row.items() if isinstance(value, float)})
            if report is not None:
                run.log(class_media(report))
            return run.url or f"offline; `wandb sync {Path(run.dir).parent}` uploads it"
    except Exception as error:  # the SDK raises a dozen types
        raise UserError(
            f"W&B rejected the evaluation ({reason_of(error)}); its scores are printed above; "
            "set WANDB_MODE=offline to keep the run on disk"
        ) from error
