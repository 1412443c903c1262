"""Opens the study of a search, draws its trials, and trains them."""

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
import zlib
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from filelock import FileLock
from lightning.pytorch import Callback, LightningModule, Trainer
from optuna.distributions import BaseDistribution
from optuna.samplers import RandomSampler, TPESampler
from optuna.storages import RDBStorage, RetryHeartbeatStaleTrialCallback
from optuna.trial import FrozenTrial, Trial, TrialState
from sqlalchemy.exc import ArgumentError, OperationalError

from clip_lightning.errors import Diverged, RunFailed, UserError
from clip_lightning.evaluation.metrics import METRICS
from clip_lightning.experiments.sweeps.file import SweepFile
from clip_lightning.run_folder import RunFolder
from clip_lightning.terminal import one_line
from clip_lightning.training.cli import fit

HEARTBEAT_SECONDS = 10
GRACE_SECONDS = 60
"""A trial whose worker has sent no heartbeat for this long has failed, and is retried once."""
FAILURES_IN_A_ROW = 5
FINISHED = (TrialState.COMPLETE, TrialState.PRUNED)
ATTEMPTS = 20
"""Number of draws before the first untried point is used instead."""
Drawn = dict[str, Any]

optuna.logging.set_verbosity(optuna.logging.ERROR)  # the search prints its own lines
warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)  # heartbeats


def open_study(file: SweepFile, name: str, storage: str, settings: dict[str, Any]) -> optuna.Study:
    """Open the study of this name in the database at the URL `storage`; create it if it does not exist."""
    try:
        database = RDBStorage(
            storage,
            # SQLite's writers wait for each other
            engine_kwargs={"connect_args": {"timeout": 60}} if storage.startswith("sqlite") else {},
            heartbeat_interval=HEARTBEAT_SECONDS,
            grace_period=GRACE_SECONDS,
            heartbeat_stale_trial_callback=RetryHeartbeatStaleTrialCallback(max_retry=1),
        )
    except (ArgumentError, OperationalError, ImportError) as error:
        reason = str(error).splitlines()[0]
        url = f"{storage.partition('://')[0]}://..."  # without the password
        raise UserError(f"--storage {url} cannot be opened ({reason}); try sqlite:///FILE") from error
    study = optuna.create_study(
        storage=database,
        study_name=name,
        pruner=file.pruner,
        direction="maximize" if file.maximize else "minimize",
        load_if_exists=True,
    )
    identity = json.loads(json.dumps(file.identity | settings, default=str))
    begun = study.user_attrs.get("identity", identity)
    if changed := [key for key in begun | identity if begun.get(key) != identity.get(key)]:
        raise UserError(
            f"the study {name!r} was started with different {', '.join(sorted(changed))}; "
            "set --study NAME to start another study"
        )
    study.set_user_attr("identity", identity)
    return study


def points_of(file: SweepFile, trials: Iterable[FrozenTrial]) -> set[tuple[str, ...]]:
    """Return the points that the trials have drawn, each as the arguments of `fit`."""
    return {tuple(file.arguments(t.params)) for t in trials if len(t.params) == len(file.varied)}


class UntriedSampler(RandomSampler):
    """Draws all parameters of a trial at once, by the method of the sweep file.

    A draw depends only on the results so far, the name of the study and the number of the trial. A resumed
    study therefore draws the same points as without the interruption, and parallel workers draw different
    points. The points of `failed` trials, those of earlier commands, may be drawn again.
    """

    def __init__(self, file: SweepFile, failed: Collection[int] = ()) -> None:
        super().__init__()
        self.file, self.failed = file, failed

    def infer_relative_search_space(self, *_: Any) -> dict[str, BaseDistribution]:
        """Return the complete space."""
        return {name: one.space for name, one in self.file.varied.items()}

    def sample_relative(self, study: optuna.Study, trial: FrozenTrial, search_space: Any) -> Drawn:
        """Draw a point; if the space is finite, a point that has not been tried."""
        grid = [[(name, drawn) for drawn in one.every or []] for name, one in self.file.varied.items()]
        draws: Iterator[Drawn] = itertools.islice(self._draws(study, trial), ATTEMPTS)
        if self.file.method == "grid":  # machines that start at the same time start at different points
            first = trial.number % int(self.file.points)
            draws = map(dict, itertools.islice(itertools.product(*grid), first, None))
        trials = study.get_trials(deepcopy=False)
        tried = points_of(self.file, (t for t in trials if t.number not in self.failed))
        candidates = itertools.chain(draws, map(dict, itertools.product(*grid)))
        return next((one for one in candidates if tuple(self.file.arguments(one)) not in tried), {})

    def _draws(self, study: optuna.Study, trial: FrozenTrial) -> Iterator[Drawn]:
        """Yield draws: from TPE, or at random for the first ten trials and for method `random`."""
        for attempt in itertools.count():
            seed = zlib.crc32(f"{study.study_name} {trial.number} {attempt}".encode())
            generator, uniform = np.random.default_rng(seed), RandomSampler(seed=seed)
            drawn = {
                name: generator.choice(np.array(one.every, object), p=one.weights)
                if one.weights
                else uniform.sample_independent(study, trial, name, one.space)
                for name, one in self.file.varied.items()
            }
            if self.file.method == "bayes":
                spaces = self.infer_relative_search_space()
                several = {name: space for name, space in spaces.items() if not space.single()}
                drawn |= TPESampler(seed=seed).sample_relative(study, trial, several)
            yield drawn


@dataclass(frozen=True)
class Worker:
    """Trains trials of a study."""

    file: SweepFile
    study: optuna.Study
    failed: set[int]  # numbers of the trials that had failed before the command started
    arguments: list[str]  # arguments of `fit` for every trial
    folder: Path
    wanted: int  # number of finished trials that the study should have

    def work(self) -> None:
        """Train one trial after another until the study has the wanted number."""
        self.study.sampler = UntriedSampler(self.file, self.failed)
        lock = FileLock(self.folder / ".claim.lock")
        while True:
            with lock:  # so that no other worker on this machine starts a trial meanwhile
                optuna.storages.fail_stale_trials(self.study)
                trials = self.study.get_trials(deepcopy=False)
                new = [trial for trial in trials if trial.number not in self.failed]
                states = [trial.state for trial in new]
                running = states.count(TrialState.RUNNING)
                finished = len(points_of(self.file, (t for t in new if t.state in FINISHED)))
                drawn = len(points_of(self.file, new))
                exhausted = TrialState.WAITING not in states and drawn >= self.file.points
                if finished >= self.wanted or (exhausted and not running):
                    return
                ended = [state for state in states if state.is_finished()][-FAILURES_IN_A_ROW:]
                if ended == [TrialState.FAIL] * FAILURES_IN_A_ROW:
                    raise RunFailed(f"the search stops because {len(ended)} trials in a row failed")
                if not exhausted and finished + running < self.wanted:
                    train = partial(self._train, lock)
                    self.study.optimize(train, n_trials=1, catch=(Exception,), gc_after_trial=True)
                    continue
            time.sleep(1)  # until the trials of other workers end

    def _train(self, lock: FileLock, trial: Trial) -> float:
        """Train with what is drawn, and return the best value of the metric."""
        began, watch = time.perf_counter(), Watch(self.file.metric.name, trial)
        drawn = {name: one.suggest(name, trial) for name, one in self.file.varied.items()}
        options = self.file.arguments(drawn)
        lock.release()  # other workers now count the trial
        print(f"trial {trial.number}: {' '.join(options)}", file=sys.stderr)
        quiet = ("--trainer.enable_progress_bar=false", "--predictions.queries=0")  # defaults of trials
        root = f"--trainer.default_root_dir={self.folder / 'trials'}"
        try:
            # the result that `fit` prints is in the run's folder, too
            run = fit([*quiet, *self.arguments, *options, root], [watch], io.StringIO())
            if not watch.curve:
                raise UserError(f"the run was never validated, so it has no {watch.metric}")
        except Exception as error:
            state = "diverged" if isinstance(error, Diverged) else "failed"
            text = one_line(str(error))
            if not isinstance(error, UserError):
                traceback.print_exc()
                text = f"{type(error).__name__}: {text}"
            _end(trial, state, text, error=text)
            if state == "failed":
                raise
            return 0.0 if self.file.maximize else math.inf  # the worst result
        except (KeyboardInterrupt, SystemExit) as stop:
            RetryHeartbeatStaleTrialCallback()(self.study, self.study.trials[trial.number])
            if isinstance(stop, SystemExit):  # SIGTERM, which Optuna does not handle
                self.study.tell(trial, state=TrialState.FAIL)
            print("stopped; repeat the same command to resume the search", file=sys.stderr)
            raise
        best = (max if self.file.maximize else min)(watch.curve)
        stored = json.loads(RunFolder(run).metrics.read_text())
        metrics = {name: stored[name] for name in ("epoch", *METRICS) if name in stored}
        state = "stopped early" if watch.stopped else "finished"
        text = f"{watch.metric} {best:.2f}, {time.perf_counter() - began:.0f} s"
        _end(trial, state, text, best=best, metrics=metrics, run=os.path.relpath(run, self.folder))
        if watch.stopped:
            raise optuna.TrialPruned
        return best


def _end(trial: Trial, state: str, text: str, **results: Any) -> None:
    """Store the state and the results in the trial, and print a line."""
    for name, value in {"state": state, **results}.items():
        trial.set_user_attr(name, value)
    print(f"trial {trial.number} {state}: {text}", file=sys.stderr)


class Watch(Callback):
    """Collects the values of a metric in `curve`, and ends the run (`stopped`) if the pruner decides so."""

    def __init__(self, metric: str, trial: Trial) -> None:
        self.metric, self.trial = metric, trial
        self.curve: list[float] = []
        self.stopped = False

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Report the value to the pruner."""
        if trainer.sanity_checking or self.metric not in trainer.callback_metrics:
            return
        self.curve.append(float(trainer.callback_metrics[self.metric]))
        self.trial.report(self.curve[-1], len(self.curve))
        if self.trial.should_prune():
            self.stopped = True
            # early stopping agrees across ranks, so it is told that its threshold is reached
            stopping: Any = trainer.early_stopping_callback
            stopping.stopping_threshold = -math.inf if stopping.mode == "max" else math.inf
