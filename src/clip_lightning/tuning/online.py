"""A search on W&B's server: the sweep, an agent that trains in this process, and the runs as a study."""

from __future__ import annotations

from typing import Any

import optuna
from optuna.trial import TrialState

from clip_lightning.errors import UserError
from clip_lightning.tuning.file import option_words
from clip_lightning.tuning.study import Search


def create(search: Search, words: tuple[str, ...], entity: str | None, project: str) -> str:
    """Make the sweep on the server, with the words of all trials in its command; ENTITY/PROJECT/ID."""
    from clip_lightning.tracking.sweeps import create_sweep

    quiet = ["--trainer.logger.log_model=false", "--predictions.queries=0"]  # as in trials of our own
    command = ["clip-lightning", "fit", *search.file.base, *quiet, *words, "${args}"]
    content = search.file.content | {"command": command, "name": search.study}
    if search.file.method != "grid":
        content["run_cap"] = search.trials
    return create_sweep(content, content.get("entity") or entity, content.get("project") or project)


def work(search: Search, sweep: str, count: int | None) -> None:
    """Be an agent of the sweep until that has no more trials, or for `count` of them."""
    from clip_lightning.tracking.sweeps import run_agent

    run_agent(sweep, lambda options: train(search, options), count)


def train(search: Search, options: dict[str, Any]) -> None:
    """Train with the options that the server has chosen.

    Raises:
        UserError: `fit` refuses them.
    """
    from clip_lightning.cli import fit

    try:
        fit(search.trial_words(option_words(options)))
    except SystemExit as stop:
        if not stop.code:  # terminated
            raise
        raise UserError("fit refuses these options") from stop


STATES = {"finished": TrialState.COMPLETE, "running": TrialState.RUNNING}


def as_study(search: Search, sweep: str) -> optuna.Study:
    """The sweep's runs as trials of a study in memory, so that they are told and drawn alike."""
    from clip_lightning.tracking.sweeps import sweep_runs

    file = search.file
    study = optuna.create_study(
        study_name=search.study, direction="maximize" if file.maximize else "minimize"
    )
    for run in sweep_runs(sweep):
        value = run.metrics.get(file.metric)
        state = STATES.get(run.state, TrialState.FAIL)
        if state == TrialState.COMPLETE and value is None:
            state = TrialState.FAIL
        drawn = {one: one.drawn(run.options.get(one.name)) for one in file.parameters}
        known = {one.label: raw for one, raw in drawn.items() if raw is not None}
        plain = {name.removeprefix("val/"): number for name, number in run.metrics.items()}
        study.add_trial(
            optuna.trial.create_trial(
                state=state,
                value=value if state == TrialState.COMPLETE else None,
                params=known,
                distributions={one.label: one.distribution for one in drawn if one.label in known},
                user_attrs={"run": run.path, "metrics": plain, "best": value},
            )
        )
    return study
