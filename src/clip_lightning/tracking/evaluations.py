"""Logs the results of `clip-lightning evaluate --wandb PROJECT` as a W&B run."""

from __future__ import annotations

from pathlib import Path

from clip_lightning.errors import UserError
from clip_lightning.reports.tables import ClassReport, Row
from clip_lightning.tracking.zero_shot_panel import class_media
from clip_lightning.wandb_fetch import stays_offline


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
            f"W&B rejected the evaluation ({' '.join(str(error).split())}); its scores are printed above; "
            "set WANDB_MODE=offline to keep the run on disk"
        ) from error
