"""The report of a search: the best configuration, tables and plots in its folder, and a table on stdout."""

from __future__ import annotations

import csv
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
from rich.table import Table

from clip_lightning.experiments.sweeps.file import SweepFile
from clip_lightning.files import write_atomically

STATES = ("finished", "stopped early", "diverged", "running", "failed", "interrupted")
"""States of a trial, in the order of the tables."""
COLUMNS = ("rsum", "text_to_image_R@1", "image_to_text_R@1")
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
    has_error = "error" in trial.user_attrs
    value = trial.user_attrs.get("best", trial.value)
    states = {
        TrialState.COMPLETE: "diverged" if has_error else "finished",
        TrialState.PRUNED: "stopped early",
        TrialState.RUNNING: "running",
        TrialState.FAIL: "failed" if has_error else "interrupted",
    }
    return {
        "trial": trial.number,
        "state": states[trial.state],
        "value": None if value == math.inf else value,  # the worst rank, which JSON cannot hold
        "metrics": trial.user_attrs.get("metrics", {}),
        "parameters": file.values(trial.params),
        "seconds": None if trial.duration is None else round(trial.duration.total_seconds(), 1),
        "run": trial.user_attrs.get("run"),
        "error": trial.user_attrs.get("error"),
    }


def write_tables(file: SweepFile, report: Report, folder: Path) -> None:
    """Write the report as `trials.json`, `trials.csv` and `trials.md`."""
    metrics = [name for name in COLUMNS if f"val/{name}" != file.metric]
    names = [one.name for one in file.parameters]
    table = [["trial", "state", file.metric, *metrics, "seconds", *names, "run", "error"]]
    for row in report["trials"]:
        numbers = [row["value"], *map(row["metrics"].get, metrics), row["seconds"]]
        options = map(row["parameters"].get, names)
        table.append([row["trial"], row["state"], *numbers, *options, row["run"], row["error"]])
    text = io.StringIO()
    csv.writer(text).writerows(table)
    lines = [[_shown(cell) for cell in line[:-2]] for line in table]
    lines.insert(1, ["---"] * len(lines[0]))
    how = f"{file.method}, {file.metric} ({'more' if file.maximize else 'less'} is better)"
    rows = "".join(f"| {' | '.join(line)} |\n" for line in lines)
    for kind, content in {
        "json": json.dumps(report, indent=2, ensure_ascii=False) + "\n",
        "csv": text.getvalue(),
        "md": f"# Search {report['study']}\n\n{how}\n\n{rows}",
    }.items():
        write_atomically(folder / f"trials.{kind}", content.encode())


def print_table(file: SweepFile, report: Report) -> None:
    """Print the best trials."""
    trials, console = report["trials"], Console(markup=False)
    table = Table(title=f"search {report['study']}, {len(trials)} trials", title_justify="left")
    for column in ("trial", "state", file.metric, "seconds", "options"):
        right = column not in ("state", "options")
        table.add_column(column, justify="right" if right else "left", no_wrap=column != "options")
    for row in trials[:SHOWN]:
        short = file.short_names()
        options = ", ".join(f"{short[name]} {_shown(value)}" for name, value in row["parameters"].items())
        table.add_row(*map(_shown, (row["trial"], row["state"], row["value"], row["seconds"], options)))
    console.print(table)
    if len(trials) > SHOWN:
        console.print(f"and {len(trials) - SHOWN} more in {Path(report['folder'], 'trials.md')}")
    if report["best"]:
        console.print(f"best: clip-lightning fit --config {report['best_config']}", soft_wrap=True)


def draw_plots(file: SweepFile, study: optuna.Study, folder: Path) -> None:
    """Write Optuna's plots as `history.png`, `importance.png` and `parallel.png`, from two trials on."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from optuna.visualization import matplotlib as plots

    # most trials were stopped early, and Optuna draws complete ones only
    short, copy = file.short_names(), optuna.create_study(direction=study.direction)
    for trial in study.trials:
        if "best" in trial.user_attrs:
            params = {short[name]: drawn for name, drawn in trial.params.items()}
            space = {short[name]: found for name, found in trial.distributions.items()}
            copy.add_trial(create_trial(value=trial.user_attrs["best"], params=params, distributions=space))
    drawings: dict[str, Callable[..., Any]] = {
        "history": plots.plot_optimization_history,
        "importance": plots.plot_param_importances,
        "parallel": plots.plot_parallel_coordinate,
    }
    for name, draw in drawings.items():
        path, image = folder / f"{name}.png", io.BytesIO()
        path.unlink(missing_ok=True)
        if len(copy.trials) < 2:
            continue
        with warnings.catch_warnings(), matplotlib.rc_context():
            warnings.simplefilter("ignore")
            try:
                draw(copy, target_name=file.metric.removeprefix("val/"))
                pyplot.gcf().set_size_inches(10, 6)
                pyplot.savefig(image, format="png", dpi=120, bbox_inches="tight")
                write_atomically(path, image.getvalue())
            except (ValueError, RuntimeError) as error:  # all trials are alike
                print(f"no {path.name}: {error}", file=sys.stderr)
            finally:
                pyplot.close("all")


def _shown(value: Any) -> str:
    """Return a value for people: short numbers, and an empty string for None."""
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)
