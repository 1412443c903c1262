"""A search on W&B's server: the sweep, an agent that trains in this process, and the runs as a study."""

from __future__ import annotations

import contextlib
import datetime
import io
import json
import math
from typing import Any, Literal

import optuna
from optuna.trial import FrozenTrial, TrialState

from clip_lightning.errors import UserError
from clip_lightning.experiments.sweeps.checks import wanted_trials
from clip_lightning.experiments.sweeps.file import SweepFile, option_words
from clip_lightning.experiments.sweeps.study import Search
from clip_lightning.experiments.sweeps.wandb_sweep import (
    SweepRun,
    create_sweep,
    run_agent,
    sweep_runs,
    sweep_state,
)
from clip_lightning.experiments.sweeps.watch import NotesStop
from clip_lightning.files import write_atomically


def begin(search: Search, words: tuple[str, ...], entity: str | None, project: str) -> str:
    """The sweep that an earlier command has made, else a new one; ENTITY/PROJECT/ID.

    Args:
        search: what and where.
        words: those of the command, for `wandb agent` elsewhere.
        entity: W&B user or team, if the sweep file names none.
        project: likewise.

    Raises:
        UserError: it was made for another search, or the server cannot make it.
    """
    note = search.folder / "sweep.json"
    if note.is_file():
        begun = json.loads(note.read_text())
        search.must_be(begun["identity"])
        if search.trials != begun["trials"]:
            raise UserError(
                f"--trials {search.trials}: the sweep {begun['sweep']} was made for {begun['trials']}, and "
                "W&B does not change that; give --study NAME to begin another"
            )
        return str(begun["sweep"])
    made = _create(search, words, entity, project)
    search.folder.mkdir(parents=True, exist_ok=True)
    content = {"sweep": made, "trials": search.trials, "identity": search.identity()}
    write_atomically(note, json.dumps(content, indent=2).encode())
    return made


def _create(search: Search, words: tuple[str, ...], entity: str | None, project: str) -> str:
    """Make the sweep, with the words of all trials in its command."""
    file = search.file
    quiet = ["--trainer.logger.log_model=false", "--predictions.queries=0"]  # as in trials of our own
    command = ["clip-lightning", "fit", *file.base, *quiet, *words, "${args}"]
    content = file.content | {"command": command, "name": search.study}
    if file.method != "grid" or search.trials < wanted_trials(file, None):
        content["run_cap"] = search.trials
    return create_sweep(content, content.get("entity") or entity, content.get("project") or project)


def has_work(sweep: str) -> bool:
    """Whether the server still has trials to give."""
    return sweep_state(sweep) in ("RUNNING", "PENDING", "PAUSED")


def work(search: Search, sweep: str, count: int | None) -> None:
    """Be an agent of the sweep until that has no more trials, or for `count` of them."""
    run_agent(sweep, lambda options: train(search, options), count)


def train(search: Search, options: dict[str, Any]) -> None:
    """Train with the options that the server has chosen.

    Raises:
        UserError: `fit` refuses them.
    """
    from clip_lightning.training.fitting import fit

    try:
        fit(search.trial_words(option_words(options)), [NotesStop()], io.StringIO())
    except SystemExit as stop:
        if not stop.code:  # terminated
            raise
        raise UserError("fit refuses these options") from stop


def as_study(search: Search, sweep: str) -> optuna.Study:
    """The sweep's runs as trials of a study in memory, so that they are told and drawn alike.

    Raises:
        UserError: the server cannot be read.
    """
    optuna.logging.set_verbosity(optuna.logging.ERROR)  # what it says we say
    file = search.file
    direction: Literal["maximize", "minimize"] = "maximize" if file.maximize else "minimize"
    study = optuna.create_study(study_name=search.study, direction=direction)
    for run in sweep_runs(sweep):
        study.add_trial(_trial(file, run))
    return study


def _trial(file: SweepFile, run: SweepRun) -> FrozenTrial:
    value = run.metrics.get(file.metric, math.nan)
    state = {"finished": TrialState.COMPLETE, "running": TrialState.RUNNING}.get(run.state, TrialState.FAIL)
    if run.stopped and not math.isnan(value):
        state = TrialState.PRUNED
    attributes: dict[str, Any] = {"run": run.path, "best": None if math.isnan(value) else value}
    attributes["metrics"] = {name.removeprefix("val/"): number for name, number in run.metrics.items()}
    if state == TrialState.COMPLETE and math.isnan(value):
        state, attributes["error"] = TrialState.FAIL, f"{file.metric} was never a number in this run"
    elif state == TrialState.FAIL:
        attributes["error"] = f"W&B calls the run {run.state}, its log is at {run.url}"
    known = {}
    for one in file.parameters:
        with contextlib.suppress(LookupError):
            known[one.label] = one.drawn(run.options[one.name])
    trial = optuna.trial.create_trial(
        state=state,
        value=value if state == TrialState.COMPLETE else None,
        params=known,
        distributions={one.label: one.distribution for one in file.parameters if one.label in known},
        user_attrs=attributes,
    )
    if trial.datetime_start and trial.datetime_complete:
        trial.datetime_start = trial.datetime_complete - datetime.timedelta(seconds=run.seconds)
    return trial
