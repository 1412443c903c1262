"""The run in Weights & Biases: online where a key is configured, on disk otherwise."""

from __future__ import annotations

import contextlib
import netrc
import os
from collections.abc import Iterator, Mapping
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
        offline: keep the run on disk, for `wandb sync` later; by default as WANDB_MODE or W&B's settings say,
            else only when no API key is configured. The modes `disabled` and `shared` stay whatever is given.
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
        _set_data_dir(Path(folder, "wandb"))
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
            **({"mode": "offline"} if _stays_offline(offline) else {}),
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


@contextlib.contextmanager
def finished_run() -> Iterator[None]:
    """At the end, the W&B run that was begun within is finished, so that the next one is another."""
    try:
        yield
    except BaseException:
        _finish(exit_code=1)
        raise
    _finish(exit_code=0)


def _finish(exit_code: int) -> None:
    import wandb

    if wandb.run is not None:
        wandb.finish(exit_code)


_our_data_dir: str | None = None
"""What `_set_data_dir` has put into the environment."""


def _set_data_dir(folder: Path) -> None:
    """Let the pictures of tables wait in `folder` to be uploaded: in the run's own they travel with it.

    What the user has set stays; what an earlier run of this process has set gives way.
    """
    global _our_data_dir
    if os.environ.get("WANDB_DATA_DIR") in (None, _our_data_dir):
        os.environ["WANDB_DATA_DIR"] = _our_data_dir = str(folder)


def _stays_offline(offline: bool | None) -> bool:
    """Whether to make the run an offline one ourselves, over what W&B would choose."""
    import wandb

    mode = wandb.setup().settings.mode
    if mode in ("disabled", "shared"):
        return False
    if offline is not None:
        return offline
    # online is also W&B's default: only in the environment is it somebody's word
    decided = mode != "online" or os.environ.get("WANDB_MODE") == "online"
    return not decided and not has_api_key()


def has_api_key() -> bool:
    """Whether a key for W&B's server is configured (environment or netrc)."""
    import wandb

    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = urlparse(wandb.setup().settings.base_url).hostname or ""
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
