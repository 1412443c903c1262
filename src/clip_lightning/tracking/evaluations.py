"""Runs of the kind `evaluate`: what `clip-lightning evaluate --wandb PROJECT` has found."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from clip_lightning.errors import UserError
from clip_lightning.reports.class_report import ClassReport
from clip_lightning.reports.tables import Row
from clip_lightning.tracking.media import class_media
from clip_lightning.wandb_fetch import stays_offline


def track_evaluation(project: str, row: Row, folder: Path, report: ClassReport | None = None) -> str:
    """Make a W&B run of one model's figures on one data set; offline where nobody is logged in.

    Args:
        project: PROJECT or ENTITY/PROJECT.
        row: figures, which become the run's summary, and what they are of, which becomes its configuration.
        folder: where W&B's own folder is made.
        report: of classes, which adds tables and pictures.

    Returns:
        The run's page, or how it is sent there later.

    Raises:
        UserError: the name is none, or W&B did not take the run.
    """
    import wandb

    entity, _, name = project.rpartition("/")
    if not name or "/" in entity:
        raise UserError(f"--wandb {project}: expected PROJECT or ENTITY/PROJECT")
    folder.mkdir(parents=True, exist_ok=True)
    figures = {key: value for key, value in row.items() if isinstance(value, float)}
    about = {key: value for key, value in row.items() if key not in figures}
    settings: dict[str, Any] = {"mode": "offline"} if stays_offline(None) else {}
    try:
        with wandb.init(
            project=name,
            entity=entity or None,
            job_type="evaluate",
            name=f"{row['model']} on {row['data']}"[:120],
            config=about,
            dir=str(folder),
            reinit="finish_previous",
            **settings,
        ) as run:
            run.summary.update(figures)
            if report is not None:
                run.log(class_media(report))
            return run.url or f"offline; `wandb sync {Path(run.dir).parent}` sends it"
    except Exception as error:  # the SDK has a dozen kinds
        raise UserError(
            f"W&B did not take the evaluation ({' '.join(str(error).split())}); its figures are printed all "
            "the same, and WANDB_MODE=offline keeps the run on disk"
        ) from error
