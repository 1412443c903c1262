"""The run in Weights & Biases: online where a key is configured, on disk otherwise."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import os
import subprocess
import sys
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.loggers.logger import rank_zero_experiment
from lightning.pytorch.utilities.rank_zero import rank_zero_only, rank_zero_warn

from clip_lightning.run_folder import RunFolder
from clip_lightning.terminal import public
from clip_lightning.tracking.artifacts import check_names
from clip_lightning.tracking.history import History, history_file, mend_parts
from clip_lightning.wandb_fetch import default_project, has_api_key, stays_offline

TRAINER_OPTIONS = ("max_epochs", "max_steps", "precision", "accumulate_grad_batches", "gradient_clip_val")
SYNC_SECONDS = FINISH_SECONDS = 600
EARLIER_PART = "take the earlier part of the run, so that this part stays offline too,"


class RunLogger(WandbLogger):
    """Lightning's WandbLogger, offline by itself when nobody is logged in, with the best epoch as summary.

    W&B never ends a run: what it refuses is said once, and stays on disk. A resumed run, also one that was
    done, gives W&B the rows that it lacks and repeats none: `wandb/history-ID.jsonl` has them all. W&B's own
    variables (WANDB_PROJECT, WANDB_NAME, ...) count wherever no argument is given, but for WANDB_DIR.

    Args:
        project: W&B project; `clip-lightning` by default.
        entity: W&B user or team; your default one if not given.
        name: the run's display name; the name of its folder by default.
        group: runs that belong together.
        job_type: what kind of run this is; `train` by default.
        tags: labels to filter by.
        notes: a sentence about the run.
        offline: keep the run on disk, for `wandb sync` later; by default as WANDB_MODE or W&B's settings say,
            else only when no API key is configured. The modes `disabled` and `shared` stay whatever is given,
            and so does WANDB_MODE=offline.
        log_model: log the bundle of the best epoch and the last checkpoint as artifacts when the run ends.
        model_name: name of the model's artifact; `model-` and the run's id if not given.
        link_to: `wandb-registry-REGISTRY/COLLECTION` to link the model to.
        save_dir: where W&B's own folder is made.
        id: the run's id; the same id goes on with the same run.
    """

    def __init__(
        self,
        project: str | None = None,
        entity: str | None = None,
        name: str | None = None,
        group: str | None = None,
        job_type: str | None = None,
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
            name = os.environ.get("WANDB_NAME") or id  # a resumed run keeps what it was called since
        super().__init__(
            project=project or default_project(),
            entity=entity,
            name=name,
            group=group,
            job_type=job_type or os.environ.get("WANDB_JOB_TYPE") or "train",
            tags=[tags] if isinstance(tags, str) else tags,
            notes=notes,
            save_dir=str(self._folder),
            id=id,
            settings=_settings(),
            **({"mode": "offline"} if stays_offline(offline) else {}),
        )
        self._wandb_init.pop("anonymous", None)  # W&B no longer knows it, and warns
        self._defined: set[str] = set()
        self._history: History | None = None
        self._failures: set[str] = set()

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """The W&B run; on disk where the server does not answer, and none at all where the disk is full."""
        if self._experiment is None:
            global _our_run
            anothers = _finish_our_run()
            earlier = self._rows_of_earlier_parts()
            if self._mode() == "online" and not self._send_earlier_parts():
                self._wandb_init["mode"] = "offline"
            self._begin()
            if not anothers:
                _our_run = self._experiment
            if self._id is not None and self._mode() in ("online", "offline"):
                self._log_lost_rows(earlier)
        return self._experiment

    def _mode(self) -> str:
        """Which of W&B's modes the run has."""
        import wandb

        mode = self._wandb_init.get("mode") or wandb.setup().settings.mode
        return {"dryrun": "offline", "run": "online"}.get(mode, mode)

    def _begin(self) -> None:
        import wandb

        given = sys.argv
        for instead in ("offline", "disabled"):
            try:
                sys.argv = [*map(public, given)]  # which W&B records
                _ = super().experiment
                return
            except Exception as error:  # the SDK has a dozen kinds
                was, self._wandb_init["mode"] = self._mode(), instead
                self.complain(f"start the run {was}", error)
                wandb.teardown()  # or the run's id stays taken
            finally:
                sys.argv = given
        _ = super().experiment

    def _rows_of_earlier_parts(self) -> int | None:
        """How many rows W&B's own files hold; None where they do not tell."""
        try:
            return mend_parts(self._folder, str(self._id)) if self._id else 0
        except Exception as error:
            self.complain("read its own files of the run's earlier part", error)
            return None

    def _log_lost_rows(self, on_disk: int | None) -> None:
        """Give a resumed run the rows that W&B has not: those logged just before it was killed."""
        run: Any = self._experiment
        try:
            self._history = History(history_file(self._folder, str(self._id)))
            kept = on_disk if run.offline else run.starting_step
            if kept is not None:
                for step, metrics in itertools.islice(self._history.rows(), kept, None):
                    self._give({name: value for name, value in metrics.items() if value is not None}, step)
        except Exception as error:
            self.complain("take the rows that it lacked", error)

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Log; a step that was logged before the run was resumed is left out."""
        self.log_row(metrics, step)

    @rank_zero_only
    def log_row(self, content: Mapping[str, Any], step: int | None = None) -> None:
        """Log a row of metrics or tables, without `step=`: W&B drops rows whose step lies behind."""
        try:
            _ = self.experiment
            if self._history is None or step is None or self._history.is_new(content, step):
                self._give(content, step)
        except Exception as error:
            self.complain("take metrics", error)

    def _give(self, content: Mapping[str, Any], step: int | None) -> None:
        """Log one row; the summary has no metrics of a validation but those that `summarise` sets."""
        run: Any = self._experiment
        for name in set(content) - self._defined:
            self._defined.add(name)
            if name.startswith("val/") and isinstance(content[name], int | float):
                run.define_metric(name, step_metric="trainer/global_step", summary="none")
        run.log({**content, **({} if step is None else {"trainer/global_step": step})})

    @rank_zero_only
    def log_hyperparams(self, params: Any) -> None:
        """Log options, but for those that a sweep has put into the run's configuration under dotted names."""
        try:
            options = vars(params) if isinstance(params, Namespace) else params
            super().log_hyperparams(_without(dict(self.experiment.config), options))
        except Exception as error:
            self.complain("take the configuration", error)

    @rank_zero_only
    def log_graph(self, model: LightningModule, input_array: Any = None) -> None:
        """Log the options of a module, its data and its trainer if no command line has done so.

        It is the one method that Lightning hands the module to.
        """
        if "model" in dict(self.experiment.config):
            return
        trainer = model.trainer
        data: Any = getattr(trainer, "datamodule", None)
        options = {
            "seed_everything": int(os.environ["PL_GLOBAL_SEED"]) if "PL_GLOBAL_SEED" in os.environ else None,
            "model": _plain(getattr(model, "options", {})),
            "data": _plain(getattr(data, "options", {})),
            "trainer": {name: _plain(getattr(trainer, name)) for name in TRAINER_OPTIONS},
            "data_digest": getattr(data, "digest", ""),
        }
        self.log_hyperparams(options)

    @rank_zero_only
    def summarise(self, values: Mapping[str, Any], gone: Iterable[str] = ()) -> None:
        """Set values of the run's summary, and remove those that are `gone`."""
        try:
            summary: Any = self.experiment.summary
            for name in gone:
                if name in summary.keys():
                    del summary[name]
            summary.update(dict(values))
        except Exception as error:
            self.complain("take the summary", error)

    @rank_zero_only
    def complain(self, what: str, error: BaseException) -> None:
        """Say once that W&B failed to do something."""
        if what not in self._failures:
            self._failures.add(what)
            # rows of an online part that never arrived are in the history, which `wandb sync` does not know
            offline = self._mode() == "offline" and not self._online_parts()
            remedy = f"`wandb sync {self._folder / 'wandb'}/offline-run-*`" if offline else "--ckpt_path last"
            rank_zero_warn(
                f"W&B did not {what} ({' '.join(str(error).split())}); training goes on, and {remedy} sends "
                "later what W&B lacks"
            )

    def _send_earlier_parts(self) -> bool:
        """Upload what earlier parts of this run have left offline, so that this part follows them.

        Where an online part came before, its last rows may be missing on the server, and offline parts that
        are uploaded would take their place: then only the history fills the gap.

        Returns:
            Whether the run may go on online.
        """
        parts = [part for part in self._folder.glob(f"wandb/offline-run-*-{self._id}") if not _was_sent(part)]
        if not parts or not has_api_key():
            return True
        if self._online_parts():
            for log in (log for part in parts for log in part.glob("*.wandb")):
                log.with_name(f"{log.name}.synced").touch()
            return True
        command = [sys.executable, "-m", "wandb", "sync", *map(str, sorted(parts))]
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=SYNC_SECONDS
            )
        except subprocess.TimeoutExpired as error:
            self.complain(EARLIER_PART, error)
            return False
        if not all(map(_was_sent, parts)):
            errors = [line for line in (done.stdout + done.stderr).splitlines() if "ERROR" in line]
            self.complain(EARLIER_PART, RuntimeError(*errors[:1]))
        return all(map(_was_sent, parts))

    def _online_parts(self) -> list[Path]:
        return list(self._folder.glob(f"wandb/run-*-{self._id}")) if self._id else []


def _plain(value: Any) -> Any:
    """An option as W&B can show it: of an object its fields, or the name of its class."""
    if isinstance(value, Mapping):
        return {name: _plain(inner) for name, inner in value.items()}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    if value is None or isinstance(value, bool | int | float):
        return value
    return public(str(value)) if isinstance(value, str | Path) else type(value).__name__


def _without(known: Mapping[str, Any], options: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested options without those that `known` has under their dotted names."""
    return {
        name: _without(known, value, f"{prefix}{name}.") if isinstance(value, Mapping) else value
        for name, value in options.items()
        if f"{prefix}{name}" not in known or "." not in f"{prefix}{name}"
    }


def _was_sent(part: Path) -> bool:
    """Whether `wandb sync` has uploaded this part of a run."""
    return any(part.glob("*.synced"))


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


def _settings() -> dict[str, Any]:
    """Lose a second at most when killed, and wait at the end for a server that is gone, but not for ever."""
    import wandb

    os.environ.setdefault("WANDB_FINISH_TIMEOUT", str(FINISH_SECONDS))
    wanted = {"x_transaction_log_flush_interval": 1.0}
    return {name: value for name, value in wanted.items() if name in wandb.Settings.model_fields}


_our_run: Any = None
"""The run that a logger of this process has begun last."""


def _finish_our_run() -> bool:
    """Finish that run, which Lightning would reuse; return whether there is one that the user began."""
    import wandb

    if wandb.run is not None and wandb.run is _our_run:
        wandb.finish()
    return wandb.run is not None


_our_data_dir: str | None = None
"""What `_set_data_dir` has put into the environment."""


def _set_data_dir(folder: Path) -> None:
    """Let the pictures of tables wait in `folder` to be uploaded, the run's own.

    What the user has set stays; what an earlier run of this process has set gives way.
    """
    global _our_data_dir
    if os.environ.get("WANDB_DATA_DIR") in (None, _our_data_dir):
        os.environ["WANDB_DATA_DIR"] = _our_data_dir = str(folder)


def log_media(trainer: Trainer, step: int, make: Callable[[], dict[str, Any]]) -> None:
    """Log tables, images or plots in every W&B run of the trainer; without one, `make` is not called.

    Args:
        trainer: of the run.
        step: as Lightning counts it: `trainer.global_step - 1` in a validation.
        make: returns W&B's own types by the names that they have in the run.
    """
    runs = [logger for logger in trainer.loggers if isinstance(logger, WandbLogger)]
    content = make() if runs else {}
    for logger in runs:
        if isinstance(logger, RunLogger):
            logger.log_row(content, step)
        else:  # no `step=`: W&B drops rows whose step is in the past, as after a resume
            logger.experiment.log({**content, "trainer/global_step": step})
