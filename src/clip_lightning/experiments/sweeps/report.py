"""Writes the report of a search as tables and plots, and prints a table."""

from __future__ import annotations

import io
import json
import math
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState, create_trial
from rich.console import Console

from clip_lightning.experiments.sweeps.file import SweepFile
from clip_lightning.experiments.tables import Column, markdown_table, option_text, print_columns
from clip_lightning.files import write_atomically
from clip_lightning.reports.tables import csv_text

STATES = ("finished", "stopped early", "diverged", "running", "failed", "interrupted")
"""States of a trial, in the order of the tables."""
METRICS = ("rsum", "text_to_image_R@1", "image_to_text_R@1")
SHOWN = 10
Report = dict[str, Any]


def summarize(file: SweepFile, study: optuna.Study, folder: Path) -> Report:
    """Return the complete report, in which the best trial comes first."""
    sign = -1 if file.maximize else 1
    rows = sorted(
        (_row(file, trial) for trial in study.trials if trial.state != TrialState.WAITING),
        key=lambda row: (row["value"] is None, STATES.index(row["state"]), sign * (row["value"] or 0.0)),
    )
    best = rows[0] if rows and rows[0]["state"] == "finished" else None
    return {
        "study": study.study_name,
        "folder": str(folder),
        "metric": file.metric,
        "goal": "maximize" if file.maximize else "minimize",
        "best": best,
        "best_config": best and str(folder / "best.yaml"),
        "trials": rows,
    }


def _row(file: SweepFile, trial: FrozenTrial) -> dict[str, Any]:
    stored = trial.user_attrs
    value = stored.get("best", trial.value)
    return {
        "trial": trial.number,
        "state": stored.get("state", "running" if trial.state == TrialState.RUNNING else "interrupted"),
        "value": None if value == math.inf else value,  # the worst rank, which JSON cannot represent
        "metrics": stored.get("metrics", {}),
        "parameters": file.values(trial.params),
        "seconds": None if trial.duration is None else round(trial.duration.total_seconds(), 1),
        "run": stored.get("run"),
        "error": stored.get("error"),
    }


def _columns(file: SweepFile, rows: list[dict[str, Any]], metrics: tuple[str, ...]) -> list[Column]:
    values = {"trial": [row["trial"] for row in rows], "state": [row["state"] for row in rows]}
    values[file.metric] = [row["value"] for row in rows]
    for name in metrics:
        values.setdefault(f"val/{name}", [row["metrics"].get(name) for row in rows])
    values["seconds"] = [row["seconds"] for row in rows]
    for one in file.parameters:
        values[one.name] = [row["parameters"].get(one.name) for row in rows]
    return [
        Column(name, name.removeprefix("val/"), [(option_text(value), value) for value in column])
        for name, column in values.items()
    ]


def write_tables(file: SweepFile, report: Report, folder: Path) -> None:
    """Write the report as `trials.json`, `trials.csv` and `trials.md`."""
    rows = report["trials"]
    columns = _columns(file, rows, METRICS)
    lines = [[*(c.cells[i][1] for c in columns), row["run"], row["error"]] for i, row in enumerate(rows)]
    how = f"{file.method}, {file.metric} ({'more' if file.maximize else 'less'} is better)"
    for kind, content in {
        "json": json.dumps(report, indent=2, ensure_ascii=False) + "\n",
        "csv": csv_text([*(column.title for column in columns), "run", "error"], lines),
        "md": f"# Search {report['study']}\n\n{how}\n\n{markdown_table(columns)}\n",
    }.items():
        write_atomically(folder / f"trials.{kind}", content.encode())


def print_table(file: SweepFile, report: Report) -> None:
    """Print the best trials."""
    rows, console = report["trials"], Console(markup=False, highlight=False)
    title = f"search {report['study']}, {len(rows)} trials"
    always = ("trial", "state", file.metric, "seconds")
    print_columns(_columns(file, rows[:SHOWN], ()), always, title, console)
    console.print(f"more in {Path(report['folder'], 'trials.md')}", soft_wrap=True)
    if report["best"]:
        console.print(f"best: clip-lightning fit --config {report['best_config']}", soft_wrap=True)


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
            drawn, value = trial.params, trial.user_attrs["best"]
            copy.add_trial(create_trial(value=value, params=drawn, distributions=trial.distributions))
    drawings: dict[str, Callable[..., Any]] = {
        "history": plots.plot_optimization_history,
        "importance": plots.plot_param_importances,
        "parallel": plots.plot_parallel_coordinate,
    }
    for name, draw in drawings.items() if len(copy.trials) > 1 else ():
        image = io.BytesIO()
        with warnings.catch_warnings(), matplotlib.rc_context():
            warnings.simplefilter("ignore")
            try:
                draw(copy, target_name=file.metric.removeprefix("val/"))
                pyplot.gcf().set_size_inches(10, 6)
                pyplot.savefig(image, format="png", dpi=120, bbox_inches="tight")
                write_atomically(folder / f"{name}.png", image.getvalue())
            except (ValueError, RuntimeError) as error:  # all trials are equal
                print(f"{name}.png cannot be drawn: {error}", file=sys.stderr)
            finally:
                pyplot.close("all")
