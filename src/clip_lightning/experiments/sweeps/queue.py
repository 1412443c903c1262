"""What a study is still to try: points of a grid, and again what was interrupted or has failed."""

from __future__ import annotations

import itertools
import socket
import time
import warnings
from collections.abc import Iterable
from typing import Any

import optuna
import psutil
from optuna.trial import FrozenTrial, TrialState

from clip_lightning.experiments.sweeps.file import SweepFile

FINISHED = (TrialState.COMPLETE, TrialState.PRUNED)
IDENTITY = "identity"
"""The study's attribute with what must stay the same; there as soon as its first points are queued."""
QUEUING_SECONDS = 30


def begun_with(study: optuna.Study) -> dict[str, Any] | None:
    """What the study was begun with, waiting for whoever begins it now; None if that one has died."""
    deadline = time.monotonic() + QUEUING_SECONDS
    while (found := study.user_attrs.get(IDENTITY)) is None and time.monotonic() < deadline:
        time.sleep(0.2)
    return dict(found) if found else None


def first_points(file: SweepFile, first: dict[str, Any] | None) -> list[dict[str, Any]]:
    """All points of a grid, in order; or the one to begin with."""
    if file.method == "grid":
        labels = [one.label for one in file.parameters]
        points = itertools.product(*(one.every() for one in file.parameters))
        return [dict(zip(labels, point, strict=True)) for point in points]
    return [first] if first else []


def enqueue(study: optuna.Study, points: Iterable[dict[str, Any]]) -> None:
    """Queue points, each by what is to be drawn, that were not queued before."""
    queued = [_point(trial) for trial in study.get_trials(deepcopy=False)]
    for point in points:
        if point not in queued:
            study.enqueue_trial(point)


def try_failed_again(study: optuna.Study) -> None:
    """Put the points of a grid that have failed, and nothing else has tried since, back into the queue."""
    trials = study.get_trials(deepcopy=False)
    done = [_point(trial) for trial in trials if trial.state != TrialState.FAIL]
    for trial in trials:
        if trial.state == TrialState.FAIL and (point := _point(trial)) and point not in done:
            done.append(point)
            study.enqueue_trial(point)


def _point(trial: FrozenTrial) -> dict[str, Any]:
    """What a trial has drawn, or is to draw."""
    return dict(trial.params or trial.system_attrs.get("fixed_params", {}))


def try_again(study: optuna.Study, trial: FrozenTrial, *, always: bool = False) -> None:
    """Put what a stopped trial tried back into the queue; once, unless `always`: it may be what kills."""
    study.set_user_attr(f"interrupted {trial.number}", True)  # a finished trial takes no attributes
    if trial.params and (always or "again" not in trial.user_attrs):
        study.enqueue_trial(trial.params, user_attrs={"again": trial.number})


def interrupted(study: optuna.Study) -> set[int]:
    """Numbers of the trials that were stopped, and did not fail."""
    return {int(name.split()[1]) for name in study.user_attrs if name.startswith("interrupted ")}


def give_up_dead(study: optuna.Study) -> None:
    """Give up trials whose process on this machine is gone, without waiting for their hearts to be missed."""
    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        host, pid, began = trial.user_attrs.get("worker", ("", 0, 0))
        if host == socket.gethostname() and _began(pid) != began:
            study.tell(trial.number, state=TrialState.FAIL, skip_if_finished=True)
            try_again(study, trial)


def give_up_silent(study: optuna.Study) -> None:
    """Give up trials, here or elsewhere, that nobody has heard of for a while."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        optuna.storages.fail_stale_trials(study)


def _began(pid: int) -> float | None:
    try:
        return psutil.Process(pid).create_time()
    except psutil.Error:
        return None
