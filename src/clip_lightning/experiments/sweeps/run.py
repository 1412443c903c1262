"""Runs a search: checks the options before the first trial, trains, and writes a report."""

from __future__ import annotations

import contextlib
import json
import math
import multiprocessing
import os
import re
import signal
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import optuna
import torch
import yaml
from optuna.trial import TrialState, create_trial

from clip_lightning.cpu import cores, keep_freed_memory
from clip_lightning.errors import RunFailed, UserError
from clip_lightning.experiments.backbones import group_arguments
from clip_lightning.experiments.compare import settings_of
from clip_lightning.experiments.run_records import flat
from clip_lightning.experiments.sweeps.file import SweepFile
from clip_lightning.experiments.sweeps.study import Worker, open_study
from clip_lightning.experiments.tables import Column, column, markdown_table, print_columns
from clip_lightning.files import write_atomically
from clip_lightning.reports.tables import csv_text
from clip_lightning.terminal import console, json_line
from clip_lightning.training.cli import Rehearsal, rehearse

STATES = ("finished", "stopped early", "diverged", "running", "failed", "interrupted")
"""States of a trial, in the order of the tables."""
METRICS = ("rsum", "text_to_image_R@1", "image_to_text_R@1")
SHOWN = 10


def search(
    file: SweepFile,
    given: list[str],
    trials: int | None,
    parallel: int,
    study: str | None,
    storage: str | None,
    as_json: bool,
) -> None:
    """Search, then write and print the results; see `sweep --help` for the arguments."""
    wanted = min(trials or file.run_cap or math.inf, file.points)
    if wanted == math.inf:
        raise UserError("the search space is infinite, and the file has no run_cap; set --trials N")
    arguments, name = [*file.base, *given], study or file.name
    config, settings = _checked(file, arguments)
    folder = Path(config.trainer.default_root_dir, "sweep-" + re.sub(r"[^\w.-]+", "-", name))
    folder.mkdir(parents=True, exist_ok=True)
    opened = open_study(file, name, storage or f"sqlite:///{(folder / 'study.db').resolve()}", settings)
    if file.method != "grid" and not opened.trials and (first := base_point(file, arguments)):
        opened.enqueue_trial(first)
    print(f"search {name}: {wanted} trials in {folder}", file=sys.stderr)
    failed = {trial.number for trial in opened.trials if trial.state == TrialState.FAIL}
    group = group_arguments(config, f"sweep-{name}")
    of_trials = [*group, *(["--trainer.logger.log_model=false"] if group else []), *arguments]
    try:
        _work(Worker(file, opened, failed, of_trials, folder, int(wanted)), parallel)
    finally:  # also after Ctrl-C, or if too many trials fail
        report = summarize(file, opened, folder)
        if best := report["best"]:
            head = f"# Trial {best['trial']} of the search {name}: {report['metric']} {best['value']:.2f}\n"
            head += f"# command:  clip-lightning fit --config {report['best_config']}\n"
            chosen = rehearse([*arguments, *file.arguments(opened.trials[best["trial"]].params)])
            write_atomically(folder / "best.yaml", (head + chosen.config_to_save).encode())
        write_tables(file, report, folder)
        draw_plots(file, opened, folder)
        if as_json:
            print(json_line(report))
        else:
            print_table(file, report)
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
    shared = settings_of(_options(rehearsal)) | {f"model.{name}": tower for name, tower in towers.items()}
    varied = {_plain(name) for name in file.varied}
    varied |= {name for name in shared if name.startswith("trainer.callbacks")}
    shared = {name: value for name, value in shared.items() if name not in varied}
    return config, shared | {"data": rehearsal.read_data(**towers)}


def base_point(file: SweepFile, arguments: list[str]) -> dict[str, Any] | None:
    """Return what to draw for the options without the search, or None if the search space lacks them."""
    try:
        options = _options(rehearse([*arguments, *file.arguments({})]))
        return {name: one.drawn(options[_plain(name)]) for name, one in file.varied.items()}
    # SystemExit: the arguments are incomplete without the parameters; YAMLError: a text that is not YAML
    except (LookupError, SystemExit, yaml.YAMLError):
        return None


def _options(rehearsal: Rehearsal) -> dict[str, Any]:
    return flat(yaml.safe_load(rehearsal.config_to_save))


def _plain(name: str) -> str:
    """Return the name of an option in a flat configuration."""
    return name.replace(".init_args", "")


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
    try:
        worker.work()
    except (UserError, KeyboardInterrupt):  # the first process stops for the same reason
        sys.exit(1)


def summarize(file: SweepFile, study: optuna.Study, folder: Path) -> dict[str, Any]:
    """Return the complete report, in which the best trial comes first."""
    rows = []
    for trial in study.get_trials(states=[state for state in TrialState if state != TrialState.WAITING]):
        stored, is_running = trial.user_attrs, trial.state == TrialState.RUNNING
        value = stored.get("best", trial.value)
        row = {
            "trial": trial.number,
            "state": stored.get("state", "running" if is_running else "interrupted"),
            "value": None if value == math.inf else value,  # the worst rank, which JSON cannot represent
            "metrics": stored.get("metrics", {}),
            "parameters": file.values(trial.params),
            "seconds": round(trial.duration.total_seconds(), 1) if trial.duration else None,
            "run": stored.get("run"),
            "error": stored.get("error"),
        }
        rows.append(row)
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


def _columns(file: SweepFile, rows: list[dict[str, Any]], metrics: Sequence[str] = ()) -> list[Column]:
    metric = file.metric.name.removeprefix("val/")
    return [
        *(column(name, [row[name] for row in rows]) for name in ("trial", "state")),
        column(metric, [row["value"] for row in rows]),
        *(column(name, [row["metrics"].get(name) for row in rows]) for name in metrics if name != metric),
        column("seconds", [row["seconds"] for row in rows]),
        *(column(name, [row["parameters"].get(name) for row in rows]) for name in file.varied),
    ]


def write_tables(file: SweepFile, report: dict[str, Any], folder: Path) -> None:
    """Write the report as `trials.json`, `trials.csv` and `trials.md`."""
    columns = _columns(file, report["trials"], METRICS)
    complete = [
        *columns,
        *(column(name, [row[name] for row in report["trials"]]) for name in ("run", "error")),
    ]
    how = f"{file.method}, {file.metric.name} ({'more' if file.maximize else 'less'} is better)"
    for kind, content in {
        "json": json.dumps(report, indent=2, ensure_ascii=False) + "\n",
        "csv": csv_text([c.title for c in complete], [*zip(*(c.values for c in complete), strict=True)]),
        "md": f"# Search {report['study']}\n\n{how}\n\n{markdown_table(columns)}\n",
    }.items():
        write_atomically(folder / f"trials.{kind}", content.encode())


def print_table(file: SweepFile, report: dict[str, Any]) -> None:
    """Print the best trials."""
    rows, out = report["trials"], console()
    title = f"search {report['study']}, {len(rows)} trials"
    always = ("trial", "state", file.metric.name.removeprefix("val/"), "seconds")
    print_columns(_columns(file, rows[:SHOWN]), always, title, out)
    out.print(f"more in {Path(report['folder'], 'trials.md')}", soft_wrap=True)
    if report["best"]:
        out.print(f"best: clip-lightning fit --config {report['best_config']}", soft_wrap=True)


def draw_plots(file: SweepFile, study: optuna.Study, folder: Path) -> None:
    """Write Optuna's plots as `history.png`, `importance.png` and `parallel.png`, from two trials on."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from optuna.visualization import matplotlib as plots

    # Optuna draws only complete trials, and most trials are stopped early
    copy = optuna.create_study(direction=study.direction)
    for trial in study.trials:
        if "best" in trial.user_attrs:
            value, distributions = trial.user_attrs["best"], trial.distributions
            copy.add_trial(create_trial(value=value, params=trial.params, distributions=distributions))
    if len(copy.trials) < 2:
        return
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
