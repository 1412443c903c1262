"""A search on Optuna: the study, and the workers that try one trial after another."""

from __future__ import annotations

import io
import json
import math
import os
import socket
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import optuna
import psutil
from filelock import FileLock
from optuna.trial import FrozenTrial, Trial, TrialState
from sqlalchemy.exc import ArgumentError, OperationalError

from clip_lightning.errors import Diverged, UserError
from clip_lightning.experiments.sweeps.file import SweepFile, metric_names, option_words
from clip_lightning.experiments.sweeps.queue import (
    FINISHED,
    IDENTITY,
    begun_with,
    enqueue,
    first_points,
    give_up_dead,
    give_up_silent,
    try_again,
)
from clip_lightning.experiments.sweeps.sampler import NumberedSampler
from clip_lightning.run_folder import RunFolder

HEARTBEAT_SECONDS = 15
GRACE_SECONDS = 90
"""A trial whose worker has not been heard of for this long is given up, and its place tried again."""
FAILURES_AT_START = 3
FAILURES_IN_A_ROW = 10


@dataclass(frozen=True)
class Search:
    """One search: what is tried, with which words, and where it is kept.

    Attributes:
        file: the sweep file.
        words: of `fit`, for every trial.
        folder: where results lie.
        study: its name in the storage.
        storage: the database's URL; None for a file in the folder.
        trials: how many finished trials are wanted.
        parallel: worker processes on this machine.
        settings: the options, by name, that all trials share and that make the experiment, and the data.
    """

    file: SweepFile
    words: tuple[str, ...]
    folder: Path
    study: str
    storage: str | None
    trials: int
    parallel: int
    settings: dict[str, Any]

    @property
    def url(self) -> str:
        """The database's."""
        return self.storage or f"sqlite:///{(self.folder / 'study.db').resolve()}"

    def trial_words(self, varied: list[str]) -> list[str]:
        """The words of `fit` for one trial; those given come after what suits trials in general."""
        here = option_words({"trainer.default_root_dir": str(self.folder / "trials")})
        return ["--trainer.enable_progress_bar=false", "--predictions.queries=0", *self.words, *varied, *here]

    def identity(self) -> dict[str, Any]:
        """What must stay the same while the study goes on: else its trials could not be compared."""
        plain: dict[str, Any] = json.loads(json.dumps(self.file.identity() | self.settings, default=str))
        return plain

    def must_be(self, begun: dict[str, Any]) -> None:
        """Compare with the identity that the study was begun with.

        Raises:
            UserError: it is another; names what differs.
        """
        now = self.identity()
        if changed := [key for key in begun.keys() | now.keys() if begun.get(key) != now.get(key)]:
            raise UserError(
                f"the study {self.study!r} was begun with other {', '.join(sorted(changed))}; "
                "give --study NAME to begin another"
            )


class TooManyFailures(Exception):
    """The search stops; says why."""


def open_study(search: Search, first: dict[str, Any] | None = None) -> optuna.Study:
    """The study, made now if it is new.

    Args:
        search: what and where.
        first: drawn values to begin a new study with.

    Raises:
        UserError: the storage does not open, or the study there is of another search.
    """
    optuna.logging.set_verbosity(optuna.logging.ERROR)  # what it says we say
    search.folder.mkdir(parents=True, exist_ok=True)
    file = search.file
    storage = _open_storage(search.url)
    direction: Literal["maximize", "minimize"] = "maximize" if file.maximize else "minimize"
    try:  # on several machines at once one makes it, and queues what is to be tried
        optuna.create_study(storage=storage, study_name=search.study, direction=direction)
        is_new = True
    except optuna.exceptions.DuplicatedStudyError:
        is_new = False
    weights = {one.label: one.weights for one in file.parameters if one.weights}
    sampler = NumberedSampler(file.method, weights)
    study = optuna.load_study(study_name=search.study, storage=storage, sampler=sampler, pruner=_pruner(file))
    begun = None if is_new else begun_with(study)
    if begun is None:
        enqueue(study, first_points(file, first))
        study.set_user_attr(IDENTITY, search.identity())  # last: now the queue is complete
    else:
        search.must_be(begun)
    return study


def _open_storage(url: str) -> optuna.storages.RDBStorage:
    # SQLite's writers wait for each other
    options = {"connect_args": {"timeout": 60}} if url.startswith("sqlite") else {"pool_pre_ping": True}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)  # heartbeats
            return optuna.storages.RDBStorage(
                url,
                engine_kwargs=options,
                heartbeat_interval=HEARTBEAT_SECONDS,
                grace_period=GRACE_SECONDS,
                heartbeat_stale_trial_callback=try_again,
            )
    except (ArgumentError, OperationalError, ImportError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"--storage {url.partition('://')[0]}://... does not open ({reason}); "
            "expected the URL of a database whose driver is installed, such as sqlite:///FILE"
        ) from error


def _pruner(file: SweepFile) -> optuna.pruners.BasePruner:
    if file.early is None:
        return optuna.pruners.NopPruner()
    return optuna.pruners.SuccessiveHalvingPruner(
        min_resource=file.early.first, reduction_factor=file.early.eta, min_early_stopping_rate=0
    )


def work(search: Search) -> None:
    """Try one trial after another until the study has as many as are wanted.

    Raises:
        TooManyFailures: trials fail, and none finishes.
        KeyboardInterrupt: Ctrl-C, after the trial in hand was saved and queued again.
    """
    study = open_study(search)
    worker = Worker(study, search)
    lock = FileLock(search.folder / ".claim.lock")
    while (step := worker.next_step(lock)) != "done":
        if step == "wait":
            time.sleep(1)


class Worker:
    """Tries trials of a study in this process."""

    def __init__(self, study: optuna.Study, search: Search) -> None:
        self.study = study
        self.search = search
        self._failures = 0
        self._trial: Trial | None = None
        self._release: Callable[[], None] = lambda: None

    def next_step(self, lock: FileLock) -> str:
        """Try a trial, unless there are enough: then say `done`, or `wait` for those that others try."""
        with lock:  # on this machine nobody else begins a trial while it is counted
            if self.search.storage is None:
                give_up_dead(self.study)
            give_up_silent(self.study)
            step = self._what_next()
            if step != "go":
                return step
            self._release = lock.release
            try:
                self.study.optimize(self._objective, n_trials=1, catch=(Exception,), gc_after_trial=True)
            except KeyboardInterrupt:
                if self._trial is not None:
                    try_again(self.study, self._frozen(), always=True)
                print("stopped; the same command again goes on with the search", file=sys.stderr)
                raise
        self._count_failures()
        return step

    def _what_next(self) -> str:
        trials = self.study.get_trials(deepcopy=False)
        count = Counter(trial.state for trial in trials)
        finished, running = sum(count[state] for state in FINISHED), count[TrialState.RUNNING]
        none_left = self.search.file.method == "grid" and not count[TrialState.WAITING]
        if finished >= self.search.trials or (none_left and not running):
            return "done"
        return "wait" if none_left or finished + running >= self.search.trials else "go"

    def _objective(self, trial: Trial) -> float:
        self._trial = trial
        try:
            return self._try(trial)
        except optuna.TrialPruned:
            raise
        except Exception as error:
            trial.set_user_attr("error", f"{type(error).__name__}: {' '.join(str(error).split())}"[:1000])
            if not isinstance(error, UserError):
                traceback.print_exc()
            raise

    def _try(self, trial: Trial) -> float:
        """Train with what is drawn; the best value of the metric."""
        from clip_lightning.experiments.sweeps.watch import Watch
        from clip_lightning.training.fitting import fit

        began, file, me = time.perf_counter(), self.search.file, psutil.Process()
        trial.set_user_attr("worker", [socket.gethostname(), me.pid, me.create_time()])
        drawn = {one.label: one.suggest(trial) for one in file.parameters}
        self._release()
        print(f"trial {trial.number}: {' '.join(file.words(drawn))}", file=sys.stderr)

        def stops(value: float, validations: int) -> bool:
            if file.early is None or not math.isfinite(value):
                return False
            trial.report(value, validations)
            return trial.should_prune()

        watch = Watch(file.metric, file.maximize, stops)
        folder = None
        try:
            # what it prints is in the run's folder
            folder = fit(self.search.trial_words(file.words(drawn)), [watch], io.StringIO())
        except Diverged as error:
            trial.set_user_attr("error", str(error))
        except SystemExit as stop:
            if not stop.code:  # terminated
                raise
            raise UserError("fit refuses these options") from stop
        if math.isnan(watch.best):
            raise UserError(f"{file.metric} was never a number in this run")
        if folder is not None:
            trial.set_user_attr("run", os.path.relpath(folder, self.search.folder))
            trial.set_user_attr("metrics", best_epoch(folder))
        trial.set_user_attr("best", watch.best)
        state = "diverged" if folder is None else "stopped early" if watch.stopped else "finished"
        seconds = time.perf_counter() - began
        print(
            f"trial {trial.number} {state}: {file.metric} {watch.best:.2f}, {seconds:.0f} s", file=sys.stderr
        )
        if watch.stopped:
            raise optuna.TrialPruned
        return watch.best

    def _frozen(self) -> FrozenTrial:
        assert self._trial is not None
        return self.study.get_trials(deepcopy=False)[self._trial.number]

    def _count_failures(self) -> None:
        """Tell of a failed trial; stop when nothing else happens.

        Raises:
            TooManyFailures: says why the last one failed.
        """
        trial, self._trial = self._frozen(), None
        if trial.state != TrialState.FAIL:
            self._failures = 0
            return
        self._failures += 1
        reason = trial.user_attrs.get("error", "unknown")
        print(f"trial {trial.number} failed: {reason}", file=sys.stderr)
        some = any(other.state in FINISHED for other in self.study.get_trials(deepcopy=False))
        if self._failures >= (FAILURES_IN_A_ROW if some else FAILURES_AT_START):
            raise TooManyFailures(f"{self._failures} trials in a row failed, the last one so: {reason}")


def best_epoch(folder: Path) -> dict[str, float]:
    """The metrics of a run's best epoch, by their plain names."""
    found = json.loads(RunFolder(folder).metrics.read_text())
    names = [name.removeprefix("val/") for name in metric_names()]
    return {name: found[name] for name in ["epoch", *names] if name in found}
