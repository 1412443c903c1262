"""Logs a run to Weights & Biases, online if an API key is configured and on disk otherwise."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.loggers.logger import rank_zero_experiment
from lightning.pytorch.utilities.rank_zero import rank_zero_only, rank_zero_warn

from clip_lightning.run_folder import RunFolder
from clip_lightning.terminal import public
from clip_lightning.tracking.artifacts import check_names
from clip_lightning.tracking.history import History, cut_torn_records, history_file
from clip_lightning.wandb_fetch import default_project, has_api_key, stays_offline

TRAINER_OPTIONS = ("max_epochs", "max_steps", "precision", "accumulate_grad_batches", "gradient_clip_val")
SYNC_SECONDS = FINISH_SECONDS = 600


class RunLogger(WandbLogger):
    """Lightning's WandbLogger, offline if no API key is configured, with the best epoch as summary.

    A failure of W&B never ends a run: you get a warning, and the rows stay on disk. A resumed run, even a
    finished one, sends W&B the rows that it lacks and repeats none: `wandb/history-ID.jsonl` contains all of
    them. W&B's environment variables (WANDB_PROJECT, WANDB_JOB_TYPE, ...) apply if the argument is not given,
    except for WANDB_DIR.

    Args:
        project: the W&B project; by default `clip-lightning`.
        entity: the W&B user or team; by default yours.
        name: the run's display name; by default the name of its folder.
        group: the name of a group of runs.
        tags: labels to filter runs by.
        notes: a description of the run.
        offline: whether to keep the run on disk, for `wandb sync` later; by default as in WANDB_MODE or W&B's
            settings, else only if no API key is configured. The modes `disabled` and `shared`, and
            WANDB_MODE=offline, take precedence.
        log_model: whether to log the bundle of the best epoch and the last checkpoint as artifacts when the
            run ends.
        model_name: the name of the model's artifact; by default `model-` and the run's ID.
        link_to: a registry to link the model to, as `wandb-registry-REGISTRY/COLLECTION`.
        save_dir: the folder in which W&B creates its own.
        id: the run's ID; the same ID continues the same run.
    """

    def __init__(
        self,
        project: str | None = None,
        entity: str | None = None,
        name: str | None = None,
        group: str | None = None,
        tags: str | list[str] | None = None,
        notes: str | None = None,
        offline: bool | None = None,
        log_model: bool = True,
        model_name: str | None = None,
        link_to: str | None = None,
        save_dir: str | None = None,
        id: str | None = None,
    ) -> None:
        check_names(model_name, link_to)
        self.logs_model, self.model_name, self.link_to = log_model, model_name, link_to
        self._folder = Path(save_dir or ".")
        _set_data_dir(RunFolder(self._folder).wandb)
        if name is None and id is not None and not history_file(self._folder, id).exists():
            name = os.environ.get("WANDB_NAME") or id  # a resumed run keeps its name
        super().__init__(
            project=project or default_project(),
            entity=entity,
            name=name,
            group=group,
            job_type=os.environ.get("WANDB_JOB_TYPE") or "train",
            tags=[tags] if isinstance(tags, str) else tags,
            notes=notes,
            save_dir=str(self._folder),
            id=id,
            settings=_settings(),
            **({"mode": "offline"} if stays_offline(offline) else {}),
        )
        self._wandb_init.pop("anonymous", None)  # a deprecated argument, about which W&B warns
        self._defined: set[str] = set()
        self._history: History | None = None
        self._failures: set[str] = set()

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """The W&B run: offline if the server does not answer, and disabled if the disk is full."""
        if self._experiment is None:
            global _our_run
            is_users = _finish_our_run()
            self._prepare_earlier_parts()
            self._begin()
            if not is_users:
                _our_run = self._experiment
            if self._id is not None and self._mode() in ("online", "offline"):
                self._log_lost_rows()
        return self._experiment

    def _mode(self) -> str:
        """Return the W&B mode of the run."""
        import wandb

        mode = self._wandb_init.get("mode") or wandb.setup().settings.mode
        return {"dryrun": "offline", "run": "online"}.get(mode, mode)

    def _begin(self) -> None:
        import wandb

        original = sys.argv
        for fallback in ("offline", "disabled"):
            try:
                sys.argv = [*map(public, original)]  # W&B records the arguments
                _ = super().experiment
                return
            except Exception as error:  # the SDK raises a dozen types
                mode, self._wandb_init["mode"] = self._mode(), fallback
                self.complain(f"start the run {mode}", error)
                wandb.teardown()  # else the run's ID stays in use
            finally:
                sys.argv = original
        _ = super().experiment

    def _log_lost_rows(self) -> None:
        """Send the server the rows of a resumed run that it lacks: those logged just before a kill."""
        run: Any = self._experiment
        try:
            self._history = History(history_file(self._folder, str(self._id)))
            if not run.offline:
                for step, metrics in itertools.islice(self._history.rows(), run.starting_step, None):
                    self._log_row({name: value for name, value in metrics.items() if value is not None}, step)
        except Exception as error:
            self.complain("log the rows of the earlier part", error)

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Log a row of metrics or tables, unless it was logged before the run was resumed."""
        try:
            _ = self.experiment
            if self._history is None or step is None or self._history.is_new(metrics, step):
                self._log_row(metrics, step)
        except Exception as error:
            self.complain("log metrics", error)

    def _log_row(self, content: Mapping[str, Any], step: int | None) -> None:
        """Log one row without `step=`, since W&B drops rows of earlier steps.

        The summary contains only those metrics of a validation that `summarize` sets.
        """
        run: Any = self._experiment
        for name in set(content) - self._defined:
            self._defined.add(name)
            if name.startswith("val/") and isinstance(content[name], int | float):
                run.define_metric(name, step_metric="trainer/global_step", summary="none")
        run.log({**content, **({} if step is None else {"trainer/global_step": step})})

    @rank_zero_only
    def log_hyperparams(self, params: Any) -> None:
        """Log the configuration."""
        try:
            super().log_hyperparams(params)
        except Exception as error:
            self.complain("log the configuration", error)

    @rank_zero_only
    def log_graph(self, model: LightningModule, input_array: Any = None) -> None:
        """Log the options of the data and the trainer, unless the command line has done so.

        Lightning passes the module to no other method of a logger.
        """
        if "data" in dict(self.experiment.config):
            return
        trainer = model.trainer
        data: Any = getattr(trainer, "datamodule", None)
        seed = os.environ.get("PL_GLOBAL_SEED")
        options = {
            "seed_everything": None if seed is None else int(seed),
            "data": _plain(getattr(data, "options", {})),
            "trainer": {name: _plain(getattr(trainer, name)) for name in TRAINER_OPTIONS},
            "data_digest": getattr(data, "digest", ""),
        }
        self.log_hyperparams(options)

    @rank_zero_only
    def summarize(self, values: Mapping[str, Any], obsolete: Iterable[str] = ()) -> None:
        """Set values of the run's summary, and remove the obsolete ones."""
        try:
            summary: Any = self.experiment.summary
            for name in obsolete:
                if name in summary.keys():
                    del summary[name]
            summary.update(dict(values))
        except Exception as error:
            self.complain("update the summary", error)

    @rank_zero_only
    def complain(self, what: str, error: BaseException) -> None:
        """Warn once that W&B failed to do something, and how to send it later."""
        if what not in self._failures:
            self._failures.add(what)
            # the history contains rows of online parts that W&B lacks, and `wandb sync` does not read it
            offline = self._mode() == "offline" and not self._online_parts()
            remedy = f"`wandb sync {self._folder / 'wandb'}/offline-run-*`" if offline else "--ckpt_path last"
            rank_zero_warn(
                f"W&B failed to {what} ({' '.join(str(error).split())}); training continues, and you can "
                f"upload what is missing later with {remedy}"
            )

    def _prepare_earlier_parts(self) -> None:
        """Upload the offline parts of the run before this part.

        If that fails, this part stays offline, too. If there is an earlier online part, its last rows may be
        missing on the server, and uploaded offline parts would take their place. In this case the rows are
        logged from the history instead.
        """
        try:
            cut_torn_records(self._folder, str(self._id))
        except OSError as error:
            self.complain("read its files of the earlier part of the run", error)
        parts = [part for part in self._folder.glob(f"wandb/offline-run-*-{self._id}") if not _was_sent(part)]
        if self._mode() != "online" or not parts or not has_api_key():
            return
        if self._online_parts():
            for log in (log for part in parts for log in part.glob("*.wandb")):
                log.with_name(f"{log.name}.synced").touch()
            return
        command = [sys.executable, "-m", "wandb", "sync", *map(str, sorted(parts))]
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=SYNC_SECONDS
            )
            errors = [line for line in (done.stdout + done.stderr).splitlines() if "ERROR" in line]
            failure: Exception | None = None if all(map(_was_sent, parts)) else RuntimeError(*errors[:1])
        except subprocess.TimeoutExpired as error:
            failure = error
        if failure is not None:
            self.complain("upload the earlier part of the run, so this part stays offline, too", failure)
            self._wandb_init["mode"] = "offline"

    def _online_parts(self) -> list[Path]:
        return list(self._folder.glob(f"wandb/run-*-{self._id}")) if self._id else []


def _plain(value: Any) -> Any:
    """Return an option in a form that W&B can show: the fields of a dataclass, or the name of a class."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = dataclasses.asdict(value)
    if isinstance(value, Mapping):
        return {name: _plain(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    if value is None or isinstance(value, bool | int | float):
        return value
    return public(str(value)) if isinstance(value, str | Path) else type(value).__name__


def _was_sent(part: Path) -> bool:
    """Return whether `wandb sync` has uploaded this part of a run."""
    return any(part.glob("*.synced"))


@contextlib.contextmanager
def finished_run() -> Iterator[None]:
    """Finish the W&B run at the end of the block, so that the next one is a new run."""
    import wandb

    exit_code = 1
    try:
        yield
        exit_code = 0
    finally:
        if wandb.run is not None:
            wandb.finish(exit_code)


def _settings() -> dict[str, Any]:
    """Return settings that lose at most a second when killed, and limit the wait for an absent server."""
    import wandb

    os.environ.setdefault("WANDB_FINISH_TIMEOUT", str(FINISH_SECONDS))
    wanted = {"x_transaction_log_flush_interval": 1.0}
    return {name: value for name, value in wanted.items() if name in wandb.Settings.model_fields}


_our_run: Any = None
"""The last run that a logger of this process has started."""


def _finish_our_run() -> bool:
    """Finish our last run, which Lightning would reuse; return whether the user has started a run."""
    import wandb

    if wandb.run is not None and wandb.run is _our_run:
        wandb.finish()
    return wandb.run is not None


_our_data_dir: str | None = None
"""The value of WANDB_DATA_DIR that `_set_data_dir` has set."""


def _set_data_dir(folder: Path) -> None:
    """Store the images of tables in `folder` until they are uploaded, unless the user has chosen a folder."""
    global _our_data_dir
    if os.environ.get("WANDB_DATA_DIR") in (None, _our_data_dir):
        os.environ["WANDB_DATA_DIR"] = _our_data_dir = str(folder)
