"""The run in Weights & Biases: online where a key is configured, on disk otherwise."""

from __future__ import annotations

import netrc
import os
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import urlparse

from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_only

BEST = {"rsum": "max", "R@1": "max", "R@5": "max", "R@10": "max", "median_rank": "min", "mean_rank": "min"}


class RunLogger(WandbLogger):
    """Lightning's WandbLogger, offline by itself when nobody is logged in, with the best values as summary.

    Args:
        project: W&B project.
        entity: W&B user or team; your default one if not given.
        name: the run's display name; W&B invents one if not given.
        group: runs that belong together.
        job_type: what kind of run this is.
        tags: labels to filter by.
        notes: a sentence about the run.
        offline: keep the run on disk, for `wandb sync` later; by default only when no API key is configured.
        save_dir: where W&B's own folder is made.
        id: the run's id; the same id goes on with the same run.
    """

    def __init__(
        self,
        project: str = "clip-lightning",
        entity: str | None = None,
        name: str | None = None,
        group: str | None = None,
        job_type: str | None = None,
        tags: list[str] | None = None,
        notes: str | None = None,
        offline: bool | None = None,
        save_dir: str | None = None,
        id: str | None = None,
    ) -> None:
        folder = save_dir or "."
        # the pictures of tables wait there to be uploaded; in the run's folder they travel with it.
        # W&B reads its environment only once, when it is first asked for anything
        os.environ.setdefault("WANDB_DATA_DIR", str(Path(folder, "wandb")))
        if offline is None:
            offline = not can_reach_server()
        super().__init__(
            project=project,
            entity=entity,
            name=name,
            group=group,
            job_type=job_type,
            tags=tags,
            notes=notes,
            save_dir=folder,
            id=id,
            **({"mode": "offline"} if offline else {}),
        )
        self._wandb_init.pop("anonymous", None)  # W&B no longer knows it, and warns
        self._defined: set[str] = set()

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Log, and let the run's summary show the best value of a recall or rank instead of the last."""
        for name in set(metrics) - self._defined:
            self._defined.add(name)
            goal = next((goal for ending, goal in BEST.items() if name.endswith(ending)), None)
            if goal is not None:
                self.experiment.define_metric(name, step_metric="trainer/global_step", summary=goal)
        super().log_metrics(metrics, step)


def can_reach_server() -> bool:
    """Whether W&B is switched on and a key for its server is configured (environment or netrc)."""
    import wandb

    settings = wandb.setup().settings
    if settings.mode in ("offline", "dryrun", "disabled", "shared"):
        return False
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = urlparse(settings.base_url).hostname or ""
    candidates = (
        [Path(os.environ["NETRC"])] if "NETRC" in os.environ else [Path("~/.netrc"), Path("~/_netrc")]
    )
    for file in candidates:
        try:
            if netrc.netrc(file.expanduser()).authenticators(host):
                return True
        except (OSError, netrc.NetrcParseError):
            continue
    return False
