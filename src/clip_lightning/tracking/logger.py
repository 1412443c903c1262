"""Logs a run to Weights & Biases, online if an API key is configured and on disk otherwise."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.loggers.logger import rank_zero_experiment
from lightning.pytorch.utilities.rank_zero import rank_zero_only, rank_zero_warn

from clip_lightning.arguments import changed_strings
from clip_lightning.errors import reason_of
from clip_lightning.run_folder import RunFolder
from clip_lightning.terminal import public
from clip_lightning.tracking.artifacts import REGISTRY, check_name
from clip_lightning.wandb_fetch import default_project, stays_offline

TRAINER_OPTIONS = ("max_epochs", "max_steps", "precision", "accumulate_grad_batches", "gradient_clip_val")
ENDED = "ended"  # an empty file in W&B's folder of each part of a run that was not killed
# Seconds: for an absent server at the end, and until a row is on disk.
WAITS = {"finish_timeout": 600.0, "x_transaction_log_flush_interval": 1.0}


def history_file(folder: Path, run_id: str) -> Path:
    """Return the file with the history of a run that writes to `folder`."""
    return RunFolder(folder).wandb / f"history-{run_id}.jsonl"


def go_back(file: Path) -> None:
    """Mark that the run resumes from an earlier checkpoint, so that all further rows are new."""
    if file.exists():
        _append(file, {})


class History:
    """Stores the rows of a run on disk before W&B gets them, which may lose the last ones in a kill.

    A row that a resumed run repeats (the same metrics at the same step) is not logged again. Several rows of
    one step, even with the same metrics, are all logged.

    Attributes:
        rows: step and metrics (None if not a number) of every row of the earlier parts of the run. In the
            file, an empty object marks that the run was resumed from an earlier checkpoint.
    """

    def __init__(self, file: Path) -> None:
        self._file = file
        self.rows: list[tuple[int, dict[str, Any]]] = []
        self._earlier: Counter[tuple[int, frozenset[str]]] = Counter()
        for line in file.read_text(errors="replace").splitlines() if file.exists() else ():
            with contextlib.suppress(ValueError):  # truncated by a kill or a full disk
                row = json.loads(line)
                if row:
                    step = row.pop("step")
                    self.rows.append((step, row))
                    self._earlier[step, frozenset(row)] += 1
                else:
                    self._earlier.clear()

    def is_new(self, metrics: Mapping[str, Any], step: int) -> bool:
        """Return whether no earlier part of the run has logged this row, and store it if so."""
        row = step, frozenset(metrics)
        if self._earlier[row]:
            self._earlier[row] -= 1
            return False
        numbers = {n: value if isinstance(value, int | float) else None for n, value in metrics.items()}
        with contextlib.suppress(OSError):  # the disk is full, and W&B may write to another one
            _append(self._file, {"step": step, **numbers})
        return True


def _append(file: Path, row: Mapping[str, Any]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a") as stream:
        stream.write("\n" + json.dumps(row))  # first the line break, so that a truncated row spoils no other


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

    _latest_run: Any = None  # of a logger in this process
    _data_dir: str | None = None  # the value of WANDB_DATA_DIR that a logger in this process has set

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
        import wandb

        check_name("--trainer.logger.model_name", model_name)
        check_name("--trainer.logger.link_to", link_to, REGISTRY, "wandb-registry-REGISTRY/COLLECTION")
        self.logs_model, self.model_name, self.link_to = log_model, model_name, link_to
        self._folder = Path(save_dir or ".")
        if os.environ.get("WANDB_DATA_DIR") in (None, RunLogger._data_dir):  # else the user has chosen it
            # images of tables stay there until they are uploaded
            os.environ["WANDB_DATA_DIR"] = RunLogger._data_dir = str(RunFolder(self._folder).wandb)
        if name is None and id is not None and not history_file(self._folder, id).exists():
            name = os.environ.get("WANDB_NAME") or id  # a resumed run keeps its name
        # W&B reads its environment once, often before there is a logger, and refuses settings that it lacks
        given = {wait for wait in WAITS if f"WANDB_{wait.upper()}" in os.environ}
        waits = {wait: WAITS[wait] for wait in (WAITS.keys() & wandb.Settings.model_fields.keys()) - given}
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
            mode="offline" if stays_offline(offline) else None,
            settings=waits,
        )
        self._wandb_init.pop("anonymous", None)  # a deprecated argument, about which W&B warns
        self._defined: set[str] = set()
        self._history: History | None = None
        self._failures: set[str] = set()

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """The W&B run: offline if the server does not answer, and disabled if the disk is full."""
        import wandb

        if self._experiment is not None:
            return self._experiment
        if wandb.run is not None and wandb.run is RunLogger._latest_run:
            wandb.finish()  # Lightning would reuse it, as it does if the user has started a run
        is_users, run = wandb.run is not None, None
        original, sys.argv = sys.argv, [*map(public, sys.argv)]  # W&B records the arguments
        try:
            for fallback in ("offline", "disabled"):
                with self.sparing(f"start the run, which is {fallback} instead"):
                    run = super().experiment
                if run is not None:
                    return run
                self._wandb_init["mode"] = fallback
                wandb.teardown()  # else the run's ID stays in use
            return super().experiment
        finally:
            sys.argv = original
            if not is_users:
                RunLogger._latest_run = self._experiment

    def _log_earlier_rows(self) -> None:
        """Log the rows of a resumed run that W&B lacks: those just before a kill, or of its offline parts.

        The files of these parts are then renamed, so that `wandb sync` skips them: it would send their rows
        again, and would stop at a row that was truncated by a kill.
        """
        run: Any = self.experiment
        if self._history is not None or self._id is None or run.settings.mode in ("disabled", "shared"):
            return
        self._history = History(history_file(self._folder, self._id))
        folder, now = RunFolder(self._folder).wandb, Path(run.dir).parent.name
        logs = [log for log in folder.glob(f"offline-run-*-{self._id}/*.wandb") if log.parent.name != now]
        sent = [log for log in logs if log.with_name(f"{log.name}.synced").exists()]
        sent += folder.glob(f"run-*-{self._id}")
        was_killed = not all((log.parent / ENDED).exists() for log in logs)
        if run.offline and (sent or not was_killed):
            return  # only the server knows which rows it has, or the files have all of them
        for step, metrics in self._history.rows[run.starting_step :]:
            self._log_row({name: value for name, value in metrics.items() if value is not None}, step)
        for log in logs:
            log.rename(log.with_suffix(".superseded"))

    @contextlib.contextmanager
    def sparing(self, what: str) -> Iterator[None]:
        """Turn a failure of W&B to do something into a warning, once per run."""
        try:
            yield
        except Exception as error:  # the SDK raises a dozen types
            if what not in self._failures:
                self._failures.add(what)
                rank_zero_warn(
                    f"W&B failed to {what} ({reason_of(error)}); training continues, and you can "
                    "upload what is missing later with --ckpt_path last, or, if the run was offline from the "
                    f"start, with `wandb sync {self._folder / 'wandb'}/offline-run-*`"
                )

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Log a row of metrics or tables, unless it was logged before the run was resumed."""
        with self.sparing("log metrics"):
            self._log_earlier_rows()
            if self._history is None or step is None or self._history.is_new(metrics, step):
                self._log_row(metrics, step)

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
        with self.sparing("log the configuration"):
            super().log_hyperparams(params)

    @rank_zero_only
    def log_graph(self, model: LightningModule, input_array: Any = None) -> None:
        """Log the options of the data and the trainer, unless the command line has done so.

        Lightning passes the module to no other method of a logger.
        """
        with self.sparing("log the rows of the earlier part"):
            self._log_earlier_rows()  # also if the run was finished, and logs no metrics
        if "data" in dict(self.experiment.config):
            return
        trainer, seed = model.trainer, os.environ.get("PL_GLOBAL_SEED")
        data: Any = getattr(trainer, "datamodule", None)
        options = {
            "seed_everything": None if seed is None else int(seed),
            "data": getattr(data, "options", {}),
            "trainer": {name: getattr(trainer, name) for name in TRAINER_OPTIONS},
            "data_digest": getattr(data, "digest", ""),
        }
        self.log_hyperparams(changed_strings(json.loads(json.dumps(options, default=_plain)), public))

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Mark that this part of the run was not killed."""
        with self.sparing("mark its end"):
            if self._history is not None:
                (Path(self.experiment.dir).parent / ENDED).touch()

    @rank_zero_only
    def summarize(self, values: Mapping[str, Any], obsolete: Iterable[str] = ()) -> None:
        """Set values of the run's summary, and remove the obsolete ones."""
        with self.sparing("update the summary"):
            summary: Any = self.experiment.summary
            for name in set(obsolete) & set(summary.keys()):
                del summary[name]
            summary.update(dict(values))


def _plain(value: Any) -> Any:
    """Return an option in a form that JSON can store: the fields of a dataclass, or the name of a class."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    return str(value) if isinstance(value, Path) else type(value).__name__


@contextlib.contextmanager
def finished_run() -> Iterator[None]:
    """Finish the W&B run at the end of the block, so that the next one is a new run."""
    import wandb

    status = 1
    try:
        yield
        status = 0
    finally:
        try:
            wandb.finish(status)
        except Exception as error:  # of its service, which has ended
            rank_zero_warn(f"W&B failed to finish the run ({reason_of(error)})")
