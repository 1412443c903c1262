"""Writes and prints the results of a search."""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import TrialState, create_trial

from clip_lightning.experiments.sweep_file import SweepFile
from clip_lightning.reports.tables import Column, column, csv_text, markdown_table, print_table, write_tables
from clip_lightning.terminal import json_line

STATES = ("finished", "stopped early", "diverged", "running", "failed", "interrupted")
"""States of a trial, in the order of the tables."""
METRICS = ("rsum", "text_to_image_R@1", "image_to_text_R@1")
SHOWN = 10  # trials in the terminal


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


def write_report(file: SweepFile, report: dict[str, Any], folder: Path) -> None:
    """Write the report as `trials.json`, `trials.csv` and `trials.md`."""
    rows = report["trials"]
    columns = _columns(file, rows, METRICS)
    ends = [column(name, [row[name] for row in rows]) for name in ("run", "error")]
    values = zip(*(c.values for c in (*columns, *ends)), strict=True)
    csv = csv_text([c.title for c in (*columns, *ends)], values)
    how = f"{file.method}, {file.metric.name} ({'more' if file.maximize else 'less'} is better)"
    markdown = f"# Search {report['study']}\n\n{how}\n\n{markdown_table(columns)}\n"
    write_tables(folder, "trials", markdown, csv, report)


def print_report(file: SweepFile, report: dict[str, Any], as_json: bool) -> None:
    """Print the best trials, or the complete report as JSON."""
    if as_json:
        print(json_line(report))
        return
    rows = report["trials"]
    print_table(_columns(file, rows[:SHOWN]), 4, f"search {report['study']}, {len(rows)} trials")
    print(f"more in {Path(report['folder'], 'trials.md')}")
    if report["best"]:
        print(f"best: clip-lightning fit --config {report['best_config']}")


def _columns(file: SweepFile, rows: Sequence[dict[str, Any]], metrics: Sequence[str] = ()) -> list[Column]:
    metric = file.metric.name.removeprefix("val/")
    return [
        column("trial", [row["trial"] for row in rows]),
        column("state", [row["state"] for row in rows], is_text=True),
        column(metric, [row["value"] for row in rows]),
        *(column(name, [row["metrics"].get(name) for row in rows]) for name in metrics if name != metric),
        column("seconds", [row["seconds"] for row in rows]),
        *(column(name, [row["parameters"].get(name) for row in rows]) for name in file.varied),
    ]


def draw_plots(file: SweepFile, study: optuna.Study, folder: Path) -> None:
    """Write Optuna's plots as `history.png`, `importance.png` and `parallel.png`, from two trials on."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from optuna.visualization import matplotlib as plots

    # Optuna draws only complete trials, and most trials are stopped early
    copy = optuna.create_study(direction=study.direction)
    for trial in study.trials:
        if "value" in trial.user_attrs:
            value, distributions = trial.user_attrs["value"], trial.distributions
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
