"""Searches hyperparameters with Optuna: checks the options, draws trials, trains them and writes a report."""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import math
import multiprocessing
import os
import re
import signal
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
import torch
import yaml
from filelock import FileLock
from lightning.pytorch import Callback, LightningModule, Trainer
from optuna.distributions import BaseDistribution
from optuna.samplers import RandomSampler, TPESampler
from optuna.storages import RDBStorage, RetryHeartbeatStaleTrialCallback
from optuna.trial import FrozenTrial, Trial, TrialState

from clip_lightning.allocator import keep_freed_memory
from clip_lightning.arguments import flat
from clip_lightning.cores import cores
from clip_lightning.errors import Diverged, RunFailed, UserError, as_user_error
from clip_lightning.evaluation.metrics import METRICS
from clip_lightning.experiments.backbones import group_arguments
from clip_lightning.experiments.compare import settings_of
from clip_lightning.experiments.sweep_file import SweepFile
from clip_lightning.experiments.sweep_report import STATES, draw_plots, print_report, summarize, write_report
from clip_lightning.files import write_atomically
from clip_lightning.run_folder import RunFolder
from clip_lightning.terminal import one_line, public
from clip_lightning.training.fitting import fit, rehearse

HEARTBEAT_SECONDS = 10
GRACE_SECONDS = 60
"""A trial whose worker has sent no heartbeat for this long has failed, and is retried once."""
FAILURES_IN_A_ROW = 5
ATTEMPTS = 20
"""Number of draws before the first untried point is used instead."""
Drawn = dict[str, Any]

optuna.logging.set_verbosity(optuna.logging.ERROR)  # the search prints its own lines
warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)  # heartbeats


def search(
    file: SweepFile,
    given: list[str],
    trials: int | None,
    parallel: int,
    study_name: str | None,
    storage: str | None,
    as_json: bool,
) -> None:
    """Search, then write and print the results; see `sweep --help` for the arguments."""
    wanted = min(trials or file.run_cap or math.inf, file.points)
    if wanted == math.inf:
        raise UserError("the search space is infinite, and the file has no run_cap; set --trials N")
    arguments, name = [*file.base, *given], study_name or file.name
    config, settings = _checked(file, arguments)
    folder = Path(config.trainer.default_root_dir, "sweep-" + re.sub(r"[^\w.-]+", "-", name))
    folder.mkdir(parents=True, exist_ok=True)
    study = open_study(file, name, storage or f"sqlite:///{(folder / 'study.db').resolve()}", settings)
    if file.method != "grid" and not study.trials and (first := base_point(file, arguments)):
        study.enqueue_trial(first)
    print(f"search {name}: {wanted} trials in {folder}", file=sys.stderr)
    failed = {trial.number for trial in study.trials if trial.state == TrialState.FAIL}
    group = group_arguments(config, f"sweep-{name}")
    of_trials = [*group, *(["--trainer.logger.log_model=false"] if group else []), *arguments]
    try:
        _work(Worker(file, study, failed, of_trials, folder, int(wanted)), parallel)
    finally:  # also after Ctrl-C, or if too many trials fail
        report = summarize(file, study, folder)
        if best := report["best"]:
            head = f"# Trial {best['trial']} of the search {name}: {report['metric']} {best['value']:.2f}\n"
            head += f"# command:  clip-lightning fit --config {report['best_config']}\n"
            chosen = rehearse([*arguments, *file.arguments(study.trials[best["trial"]].params)])
            write_atomically(folder / "best.yaml", (head + chosen.config_to_save).encode())
        write_report(file, report, folder)
        draw_plots(file, study, folder)
        print_report(file, report, as_json)
    rows = report["trials"]
    ended = [row for row in rows if row["state"] in STATES[:3]]
    finished = len(ended) if any(row["metrics"] for row in ended) else 0  # else all of them diverged
    if finished == file.points:
        print(f"the search space is exhausted: all {finished} points have been tried", file=sys.stderr)
    least = wanted if file.method == "grid" else 1
    if finished < least:
        last = max((row for row in rows if row["error"]), key=lambda row: row["trial"], default=None)
        reason = f"; trial {last['trial']} {last['state']}: {last['error']}" if last else ""
        raise RunFailed(f"{finished} of {least} trials finished{reason}")


def _checked(file: SweepFile, arguments: list[str]) -> tuple[Any, dict[str, Any]]:
    """Let `fit` parse every choice and both ends of every range, and read the data.

    Returns:
        The configuration, and the options that all trials have in common, with the digest of the data.
    """
    ends = {name: one.ends() for name, one in file.varied.items()}
    for row in range(max(map(len, ends.values()), default=1)):
        drawn = {name: values[min(row, len(values) - 1)] for name, values in ends.items()}
        rehearsal = rehearse([*arguments, *file.arguments(drawn)])
    config = rehearsal.config["fit"].clone()
    towers = {name: config.model[name] for name in ("image_tower", "text_tower")}
    shared = settings_of(flat(yaml.safe_load(rehearsal.config_to_save)))
    shared |= {f"model.{name}": tower for name, tower in towers.items()}
    varied = {_plain(name) for name in file.varied}
    shared = {n: v for n, v in shared.items() if n not in varied and not n.startswith("trainer.callbacks")}
    return config, shared | {"data": rehearsal.read_data(**towers)}


def base_point(file: SweepFile, arguments: list[str]) -> dict[str, Any] | None:
    """Return what to draw for the options without the search, or None if the search space lacks them."""
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            rehearsal = rehearse([*arguments, *file.arguments({})])
        options = flat(yaml.safe_load(rehearsal.config_to_save))
        return {name: one.drawn(options[_plain(name)]) for name, one in file.varied.items()}
    # SystemExit: the arguments are incomplete without the parameters; YAMLError: a text that is not YAML
    except (LookupError, SystemExit, yaml.YAMLError):
        return None


def _plain(name: str) -> str:
    """Return the name of an option in a flat configuration."""
    return name.replace(".init_args", "")


def open_study(file: SweepFile, name: str, storage: str, settings: dict[str, Any]) -> optuna.Study:
    """Open the study of this name in the database at the URL `storage`; create it if it does not exist."""
    with as_user_error(f"--storage {public(storage)} cannot be opened", "try sqlite:///FILE"):
        database = RDBStorage(
            storage,
            # SQLite's writers wait for each other
            engine_kwargs={"connect_args": {"timeout": 60}} if storage.startswith("sqlite") else {},
            heartbeat_interval=HEARTBEAT_SECONDS,
            grace_period=GRACE_SECONDS,
            heartbeat_stale_trial_callback=RetryHeartbeatStaleTrialCallback(max_retry=1),
        )
    study = optuna.create_study(
        storage=database,
        study_name=name,
        pruner=file.pruner,
        direction=file.metric.goal,
        load_if_exists=True,
    )
    metric = [file.metric.name, file.maximize]
    own = {"method": file.method, "metric": metric, "parameters": file.specs, "halving": file.halving}
    identity = json.loads(json.dumps(own | settings, default=str))
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
        draws: Iterator[Drawn] = itertools.islice(self._draws(study, trial, search_space), ATTEMPTS)
        if self.file.method == "grid":  # machines that start at the same time start at different points
            first = trial.number % int(self.file.points)
            draws = map(dict, itertools.islice(itertools.product(*grid), first, None))
        trials = study.get_trials(deepcopy=False)
        tried = points_of(self.file, (t for t in trials if t.number not in self.failed))
        candidates = itertools.chain(draws, map(dict, itertools.product(*grid)))
        return next((one for one in candidates if tuple(self.file.arguments(one)) not in tried), {})

    def _draws(self, study: optuna.Study, trial: FrozenTrial, space: Any) -> Iterator[Drawn]:
        """Yield draws: from TPE, or at random for the first ten trials and for method `random`."""
        several = {name: one for name, one in space.items() if not one.single()}
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
                ended = (t for t in new if t.state in (TrialState.COMPLETE, TrialState.PRUNED))
                finished = len(points_of(self.file, ended))
                drawn = len(points_of(self.file, new))
                exhausted = TrialState.WAITING not in states and drawn >= self.file.points
                if finished >= self.wanted or (exhausted and not running):
                    return
                last = [state for state in states if state.is_finished()][-FAILURES_IN_A_ROW:]
                if last == [TrialState.FAIL] * FAILURES_IN_A_ROW:
                    raise RunFailed(f"the search stops because {len(last)} trials in a row failed")
                if not exhausted and finished + running < self.wanted:
                    train = partial(self._train, lock)
                    self.study.optimize(train, n_trials=1, catch=(Exception,), gc_after_trial=True)
                    continue
            time.sleep(1)  # until the trials of other workers end

    def _train(self, lock: FileLock, trial: Trial) -> float:
        """Train with what is drawn, and return the best value of the metric."""
        began, watch = time.perf_counter(), Watch(self.file.metric.name, trial)
        options = self.file.arguments({name: p.suggest(name, trial) for name, p in self.file.varied.items()})
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
        text = f"{watch.metric} {best:.2f}, {time.perf_counter() - began:.0f} s"
        state = "stopped early" if watch.stopped else "finished"
        _end(trial, state, text, value=best, metrics=metrics, run=os.path.relpath(run, self.folder))
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


def _work(worker: Worker, parallel: int) -> None:
    """Train trials in this process and, if the search is parallel, in others."""
    if parallel > 1:
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores() // parallel)))  # for the others
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    spawn = multiprocessing.get_context("spawn")
    processes = [spawn.Process(target=_work_beside, args=(worker,)) for _ in range(1, parallel)]
    for process in processes:
        process.start()
    try:
        worker.work()
    except BaseException:
        for process in processes:
            if process.is_alive() and process.pid:
                os.kill(process.pid, signal.SIGINT)
        raise
    finally:
        for process in processes:
            process.join()


def _work_beside(worker: Worker) -> None:
    """Work in another process group, so that Ctrl-C reaches this process only through `_work`."""
    os.setpgrp()
    keep_freed_memory()
    with contextlib.suppress(UserError, KeyboardInterrupt):  # the first process stops for the same reason
        worker.work()
