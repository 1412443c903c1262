"""Searches hyperparameters with Optuna: checks the options, draws trials, trains them and writes a report."""

from __future__ import annotations

import contextlib
import json
import math
import multiprocessing
import os
import re
import signal
import time
import warnings
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import optuna
import torch
import yaml
from filelock import FileLock
from lightning.pytorch import Callback, LightningModule, Trainer
from optuna.storages import RDBStorage, RetryHeartbeatStaleTrialCallback
from optuna.trial import Trial, TrialState, create_trial

from clip_lightning.arguments import flat
from clip_lightning.cpu import cores, keep_freed_memory
from clip_lightning.errors import Diverged, RunFailed, UserError, as_user_error
from clip_lightning.evaluation.metrics import METRICS
from clip_lightning.experiments.backbones import group_arguments, reason_of_failure
from clip_lightning.experiments.compare import settings_of
from clip_lightning.experiments.sweep_file import SweepFile, UntriedSampler, points_of
from clip_lightning.files import write_atomically
from clip_lightning.reports.tables import column, csv_text, markdown_table, print_table, write_tables
from clip_lightning.run_folder import RunFolder
from clip_lightning.terminal import json_line, note, public
from clip_lightning.training.cli import fit, rehearse

HEARTBEAT_SECONDS = 10
GRACE_SECONDS = 60
"""A trial whose worker has sent no heartbeat for this long has failed, and is retried once."""
FAILURES_IN_A_ROW = 5
FINISHED = (TrialState.COMPLETE, TrialState.PRUNED)
STATES = ("finished", "stopped early", "diverged", "running", "failed", "interrupted")
"""States of a trial, in the order of the tables."""
SHOWN_METRICS = ("rsum", "text_to_image_R@1", "image_to_text_R@1")
SHOWN_TRIALS = 10  # in the terminal

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
    note(f"search {name}: {wanted} trials in {folder}")
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
        draw_plots(file, study, folder)
        show_report(file, report, as_json)
    rows = report["trials"]
    ended = [row for row in rows if row["state"] in STATES[:3]]
    finished = len(ended) if any(row["metrics"] for row in ended) else 0  # else all of them diverged
    if finished == file.points:
        note(f"the search space is exhausted: all {finished} points have been tried")
    least = wanted if file.method == "grid" else 1
    if finished < least:
        last = max((row for row in rows if row["error"]), key=lambda row: row["trial"], default=None)
        reason = f"; trial {last['trial']} {last['state']}: {last['error']}" if last else ""
        raise RunFailed(f"{finished} of {least} trials finished{reason}")


def _checked(file: SweepFile, arguments: list[str]) -> tuple[Any, dict[str, Any]]:
    """Let `fit` parse every choice and both ends of every range, and read the data.

    Return the configuration, and the options that all trials have in common, with the digest of the data.
    """
    ends = {name: one.ends() for name, one in file.varied.items()}
    for row in range(max(map(len, ends.values()), default=1)):
        drawn = {name: values[min(row, len(values) - 1)] for name, values in ends.items()}
        rehearsal = rehearse([*arguments, *file.arguments(drawn)])
    config = rehearsal.config["fit"].clone()
    towers = {name: config.model[name] for name in ("image_tower", "text_tower")}
    shared = settings_of(flat(yaml.safe_load(rehearsal.config_to_save)))
    shared |= {f"model.{name}": tower for name, tower in towers.items()}
    varied = {name.replace(".init_args", "") for name in file.varied}  # as in a flat configuration
    shared = {n: v for n, v in shared.items() if n not in varied and not n.startswith("trainer.callbacks")}
    return config, shared | {"data": rehearsal.read_data(**towers)}


def base_point(file: SweepFile, arguments: list[str]) -> dict[str, Any] | None:
    """Return what to draw for the options without the search, or None if the search space lacks them."""
    try:
        rehearsal = rehearse([*arguments, *file.arguments({})])
        options = flat(yaml.safe_load(rehearsal.config_to_save))
        return {n: one.drawn(options[n.replace(".init_args", "")]) for n, one in file.varied.items()}
    # SystemExit: the arguments are incomplete without the parameters; YAMLError: a text that is not YAML
    except (LookupError, SystemExit, yaml.YAMLError):
        return None


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
                untried = TrialState.WAITING in states or len(points_of(self.file, new)) < self.file.points
                if finished >= self.wanted or not (untried or running):
                    return
                ended = [state for state in states if state.is_finished()]
                if ended[-FAILURES_IN_A_ROW:] == [TrialState.FAIL] * FAILURES_IN_A_ROW:
                    raise RunFailed(f"the search stops because {FAILURES_IN_A_ROW} trials in a row failed")
                if untried and finished + running < self.wanted:
                    train = partial(self._train, lock)
                    self.study.optimize(train, n_trials=1, catch=(Exception,), gc_after_trial=True)
                    continue
            time.sleep(1)  # until the trials of other workers end

    def _train(self, lock: FileLock, trial: Trial) -> float:
        """Train with what is drawn, and return the best value of the metric."""
        began, watch = time.perf_counter(), Watch(self.file.metric.name, trial)
        options = self.file.arguments({name: p.suggest(name, trial) for name, p in self.file.varied.items()})
        lock.release()  # other workers now count the trial
        note(f"trial {trial.number}: {' '.join(options)}")
        quiet = ("--trainer.enable_progress_bar=false", "--predictions.queries=0")  # defaults of trials
        root = f"--trainer.default_root_dir={self.folder / 'trials'}"
        try:
            run = fit([*quiet, *self.arguments, *options, root], [watch])
            if not watch.curve:
                raise UserError(f"the run was never validated, so it has no {watch.metric}")
        except Exception as error:
            state = "diverged" if isinstance(error, Diverged) else "failed"
            text = reason_of_failure(error)
            _end(trial, state, text, error=text)
            if state == "failed":
                raise
            return 0.0 if self.file.maximize else math.inf  # the worst result
        except (KeyboardInterrupt, SystemExit) as stop:
            RetryHeartbeatStaleTrialCallback()(self.study, self.study.trials[trial.number])
            if isinstance(stop, SystemExit):  # SIGTERM, which Optuna does not handle
                self.study.tell(trial, state=TrialState.FAIL)
            note("stopped; repeat the same command to resume the search")
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
    note(f"trial {trial.number} {state}: {text}")


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


def summarize(file: SweepFile, study: optuna.Study, folder: Path) -> dict[str, Any]:
    """Return the complete report, in which the best trial comes first."""
    rows = [
        {
            "trial": trial.number,
            "state": "running" if trial.state == TrialState.RUNNING else "interrupted",
            "value": None if trial.value == math.inf else trial.value,  # which JSON cannot represent
            "metrics": {},
            "parameters": file.values(trial.params),
            "seconds": round(trial.duration.total_seconds(), 1) if trial.duration else None,
            "run": None,
            "error": None,
            **trial.user_attrs,  # if it has ended
        }
        for trial in study.trials
        if trial.state != TrialState.WAITING
    ]
    sign = -1 if file.maximize else 1
    rows.sort(key=lambda r: (r["value"] is None, STATES.index(r["state"]), sign * (r["value"] or 0.0)))
    best = rows[0] if rows and rows[0]["state"] == "finished" else None
    return {
        "study": study.study_name,
        "folder": str(folder),
        "metric": file.metric.name,
        "goal": file.metric.goal,
        "best": best,
        "best_config": best and str(folder / "best.yaml"),
        "trials": rows,
    }


def show_report(file: SweepFile, report: dict[str, Any], as_json: bool) -> None:
    """Write `trials.json`, `trials.csv` and `trials.md`, and print the best trials, or the report as JSON."""
    rows, folder, metric = report["trials"], Path(report["folder"]), file.metric.name.removeprefix("val/")
    shown = {
        "trial": [row["trial"] for row in rows],
        "state": [row["state"] for row in rows],
        metric: [row["value"] for row in rows],
        "seconds": [row["seconds"] for row in rows],
        **{name: [row["parameters"].get(name) for row in rows] for name in file.varied},
        **{n: [row["metrics"].get(n) for row in rows] for n in SHOWN_METRICS if n != metric},
    }
    columns = [column(name, values, is_text=name == "state") for name, values in shown.items()]
    complete = shown | {name: [row[name] for row in rows] for name in ("run", "error")}
    csv = csv_text([*complete], zip(*complete.values(), strict=True))
    how = f"{file.method}, {file.metric.name} ({'more' if file.maximize else 'less'} is better)"
    markdown = f"# Search {report['study']}\n\n{how}\n\n{markdown_table(columns)}\n"
    write_tables(folder, "trials", markdown, csv, report)
    if as_json:
        print(json_line(report))
        return
    best = [c._replace(texts=c.texts[:SHOWN_TRIALS]) for c in columns]
    print_table(best, 4, f"search {report['study']}, {len(rows)} trials")
    print(f"more in {folder / 'trials.md'}")
    if report["best"]:
        print(f"best: clip-lightning fit --config {report['best_config']}")


def draw_plots(file: SweepFile, study: optuna.Study, folder: Path) -> None:
    """Write Optuna's plots as `history.png`, `importance.png` and `parallel.png`, from two trials on."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from optuna.visualization import matplotlib as plots

    # Optuna draws only complete trials, and most trials are stopped early
    ended = [trial for trial in study.trials if "value" in trial.user_attrs]
    if len(ended) < 2:
        return
    copy = optuna.create_study(direction=study.direction)
    for trial in ended:
        value, distributions = trial.user_attrs["value"], trial.distributions
        copy.add_trial(create_trial(value=value, params=trial.params, distributions=distributions))
    for name, draw in (
        ("history", plots.plot_optimization_history),
        ("importance", plots.plot_param_importances),
        ("parallel", plots.plot_parallel_coordinate),
    ):
        with warnings.catch_warnings(), matplotlib.rc_context():
            warnings.simplefilter("ignore")
            with contextlib.suppress(ValueError, RuntimeError):  # all trials are equal
                draw(copy, target_name=file.metric.name.removeprefix("val/"))
                pyplot.gcf().set_size_inches(10, 6)
                pyplot.savefig(folder / f"{name}.png", dpi=120, bbox_inches="tight")
            pyplot.close("all")
