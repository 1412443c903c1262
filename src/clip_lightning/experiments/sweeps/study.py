"""The study of a search, and the workers that train its trials."""

from __future__ import annotations

import io
import itertools
import json
import math
import os
import sys
import time
import traceback
import warnings
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import optuna
from filelock import FileLock
from lightning.pytorch import Callback, LightningModule, Trainer
from optuna.storages import RDBStorage, RetryHeartbeatStaleTrialCallback
from optuna.trial import Trial, TrialState
from sqlalchemy.exc import ArgumentError, OperationalError

from clip_lightning.errors import Diverged, RunFailed, UserError
from clip_lightning.evaluation.metrics import METRICS
from clip_lightning.experiments.sweeps.file import SweepFile
from clip_lightning.experiments.sweeps.sampler import UntriedSampler
from clip_lightning.terminal import one_line
from clip_lightning.training.fitting import fit

HEARTBEAT_SECONDS = 10
GRACE_SECONDS = 60
"""A trial whose worker has sent no heartbeat for this long has failed, and is tried once more."""
FAILURES_AT_START = 3
FAILURES_IN_A_ROW = 10

optuna.logging.set_verbosity(optuna.logging.ERROR)  # the search prints its own lines
warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)  # heartbeats


def open_study(file: SweepFile, name: str, storage: str) -> optuna.Study:
    """Open the study of this name in the database at the URL `storage`; create it if it does not exist.

    Raises:
        UserError: the database cannot be opened.
    """
    # SQLite's writers wait for each other
    options = {"connect_args": {"timeout": 60}} if storage.startswith("sqlite") else {"pool_pre_ping": True}
    try:
        database = RDBStorage(
            storage,
            engine_kwargs=options,
            heartbeat_interval=HEARTBEAT_SECONDS,
            grace_period=GRACE_SECONDS,
            heartbeat_stale_trial_callback=RetryHeartbeatStaleTrialCallback(max_retry=1),
        )
    except (ArgumentError, OperationalError, ImportError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"--storage {storage.partition('://')[0]}://... does not open ({reason}); "
            "expected the URL of a database whose driver is installed, such as sqlite:///FILE"
        ) from error
    pruner = optuna.pruners.SuccessiveHalvingPruner(*file.halving) if file.halving else None
    return optuna.create_study(
        storage=database,
        study_name=name,
        pruner=pruner or optuna.pruners.NopPruner(),
        direction="maximize" if file.maximize else "minimize",
        load_if_exists=True,
    )


def count_finished(file: SweepFile, study: optuna.Study) -> int:
    """Count the finished trials; trials of the same point of a finite space count as one."""
    finished = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.PRUNED))
    points = {tuple(file.arguments(trial.params)) for trial in finished}
    return len(finished) if file.points == math.inf else len(points)


@dataclass(frozen=True)
class Worker:
    """Trains trials of a study.

    Attributes:
        file: the sweep file.
        study: the study.
        failed: numbers of the trials that had failed before the command began.
        arguments: arguments of `fit` for every trial.
        folder: folder of the results.
        wanted: how many finished trials the study is to have.
    """

    file: SweepFile
    study: optuna.Study
    failed: set[int]
    arguments: tuple[str, ...]
    folder: Path
    wanted: int

    def work(self) -> None:
        """Train one trial after another until the study has as many as are wanted.

        Raises:
            RunFailed: trials fail, and none finishes.
            KeyboardInterrupt: Ctrl-C, after the running trial was saved and queued again.
        """
        self.study.sampler = sampler = UntriedSampler(self.file, self.failed)
        lock, waits = FileLock(self.folder / ".claim.lock"), False
        while True:
            with lock:  # no other worker on this machine may begin a trial while the trials are counted
                optuna.storages.fail_stale_trials(self.study)
                trials = self.study.get_trials(deepcopy=False)
                states = [trial.state for trial in trials]
                running, queued = states.count(TrialState.RUNNING), states.count(TrialState.WAITING)
                finished = count_finished(self.file, self.study)
                exhausted = not queued and len(sampler.tried(self.study)) >= self.file.points
                if finished >= self.wanted or (exhausted and not running):
                    return
                new = [t.state for t in trials if t.state.is_finished() and t.number not in self.failed]
                failures = len([*itertools.takewhile(lambda state: state == TrialState.FAIL, reversed(new))])
                if failures >= (FAILURES_IN_A_ROW if finished else FAILURES_AT_START):
                    raise RunFailed(f"the search stops because {failures} trials in a row failed")
                waited, waits = waits, exhausted or finished + running >= self.wanted
                if not waits:
                    train = partial(self._train, lock)
                    self.study.optimize(train, n_trials=1, catch=(Exception,), gc_after_trial=True)
            if waits and not waited:
                print("waiting for trials that other workers have begun", file=sys.stderr)
            if waits:
                time.sleep(1)

    def _train(self, lock: FileLock, trial: Trial) -> float:
        """Train with what is drawn, and return the best value of the metric."""
        began, say = time.perf_counter(), partial(print, f"trial {trial.number}", sep="", file=sys.stderr)
        options = self.file.arguments({one.name: one.suggest(trial) for one in self.file.parameters})
        lock.release()  # from here on the trial counts
        say(f": {' '.join(options)}")
        watch = Watch(self.file, trial)
        try:
            best = self._fit(options, watch)
        except Diverged as error:  # a result: nothing is worse
            trial.set_user_attr("error", one_line(str(error)))
            say(f" diverged: {error}")
            return 0.0 if self.file.maximize else math.inf
        except Exception as error:
            kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
            if kind:
                traceback.print_exc()
            trial.set_user_attr("error", one_line(f"{kind}{error}")[:1000])
            say(f" failed: {kind}{error}")
            raise
        except (KeyboardInterrupt, SystemExit) as stop:
            RetryHeartbeatStaleTrialCallback()(self.study, self.study.trials[trial.number])
            if isinstance(stop, SystemExit):  # SIGTERM; Optuna only knows Ctrl-C
                self.study.tell(trial, state=TrialState.FAIL)
            print("stopped; the same command again resumes the search", file=sys.stderr)
            raise
        state, seconds = "stopped early" if watch.stopped else "finished", time.perf_counter() - began
        say(f" {state}: {self.file.metric} {best:.2f}, {seconds:.0f} s")
        if watch.stopped:
            raise optuna.TrialPruned
        return best

    def _fit(self, options: list[str], watch: Watch) -> float:
        """Train, store the results in the trial, and return the best value of the metric."""
        quiet = ("--trainer.enable_progress_bar=false", "--predictions.queries=0")  # defaults of trials
        root = f"--trainer.default_root_dir={self.folder / 'trials'}"
        try:
            # what `fit` prints as the result is in the run's folder
            run = fit([*quiet, *self.arguments, *options, root], [watch], io.StringIO())
        except SystemExit as stop:
            if not stop.code:  # SIGTERM
                raise
            raise UserError("fit refuses these options") from stop
        if not watch.curve:
            raise UserError(f"the run was never validated, so it has no {self.file.metric}")
        best = (max if self.file.maximize else min)(watch.curve)
        found = json.loads((run / "metrics.json").read_text())
        metrics = {name: found[name] for name in ("epoch", *METRICS) if name in found}
        stored = {"run": os.path.relpath(run, self.folder), "metrics": metrics, "best": best}
        for name, value in stored.items():
            watch.trial.set_user_attr(name, value)
        return best


class Watch(Callback):
    """Keeps the metric of each validation as `curve`, and ends the run if the pruner asks for it.

    Args:
        file: the sweep file, which names the metric.
        trial: the trial that is trained.
    """

    def __init__(self, file: SweepFile, trial: Trial) -> None:
        self.file, self.trial = file, trial
        self.curve: list[float] = []
        self.stopped = False

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Report the value to the pruner."""
        if trainer.sanity_checking or self.file.metric not in trainer.callback_metrics:
            return
        self.curve.append(float(trainer.callback_metrics[self.file.metric]))
        self.trial.report(self.curve[-1], len(self.curve))
        if self.trial.should_prune():
            self.stopped = True
            # all ranks have early stopping and agree on it: its goal counts as reached
            stopping: Any = trainer.early_stopping_callback
            stopping.stopping_threshold = -math.inf if stopping.mode == "max" else math.inf
