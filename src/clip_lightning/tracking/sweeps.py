"""Sweeps on W&B's server: making one, working for one in this process, reading its runs."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import yaml

from clip_lightning.errors import UserError
from clip_lightning.tracking.account import stays_offline


@dataclass(frozen=True)
class SweepRun:
    """A run of a sweep.

    Attributes:
        path: ENTITY/PROJECT/ID.
        state: `finished`, `running`, `failed`, `crashed`, ...
        options: of `fit`, as the sweep chose them, under dotted names.
        metrics: the best values of the validations, as they were logged.
    """

    path: str
    state: str
    options: dict[str, Any]
    metrics: dict[str, float]


def is_online(offline: bool | None) -> bool:
    """Whether a run with this wish is sent to the server as it goes."""
    import wandb

    return not stays_offline(offline) and wandb.setup().settings.mode == "online"


def create_sweep(content: dict[str, Any], entity: str | None, project: str) -> str:
    """Make the sweep; ENTITY/PROJECT/ID.

    Raises:
        UserError: the server refuses it.
    """
    import wandb

    try:
        with contextlib.redirect_stdout(sys.stderr):
            sweep_id = wandb.sweep(content, entity=entity, project=project)
            owner = entity or wandb.Api().default_entity
    except (wandb.Error, ValueError) as error:
        raise UserError(f"W&B did not make the sweep: {error}") from error
    return f"{owner}/{project}/{sweep_id}"


def run_agent(sweep: str, train: Callable[[dict[str, Any]], None], count: int | None) -> None:
    """Train what the server chooses, one run after another, until it has no more or for `count` runs.

    W&B trains in a thread of its own, and swallows Ctrl-C after it has stopped that.

    Raises:
        UserError: there is no such sweep.
        KeyboardInterrupt: Ctrl-C.
    """
    import wandb

    if sweep.count("/") != 2:
        raise UserError(f"--sweep_id {sweep}: expected ENTITY/PROJECT/ID")
    pressed = False

    def press(signum: int, frame: FrameType | None) -> None:
        nonlocal pressed
        pressed = True
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, press)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            wandb.agent(sweep, lambda: train(_chosen()), count=count)
    except (wandb.Error, ValueError) as error:
        raise UserError(f"W&B has no work for an agent of {sweep}: {error}") from error
    finally:
        signal.signal(signal.SIGINT, before)
    if pressed:
        raise KeyboardInterrupt


def _chosen() -> dict[str, Any]:
    """What the agent was told to try, from the file that it has written."""
    content = yaml.safe_load(Path(os.environ["WANDB_SWEEP_PARAM_PATH"]).read_text())
    return _dotted({name: entry["value"] for name, entry in content.items() if isinstance(entry, dict)})


def _dotted(nested: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in nested.items():
        found |= _dotted(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return found


def sweep_runs(sweep: str) -> list[SweepRun]:
    """The sweep's runs, the oldest first."""
    import wandb

    runs = sorted(wandb.Api().sweep(sweep).runs, key=lambda run: run.created_at)
    return [
        SweepRun("/".join(run.path), run.state, _dotted(dict(run.config)), _numbers(run.summary))
        for run in runs
    ]


def _numbers(summary: Any) -> dict[str, float]:
    """The numbers of a summary; of one that is kept as its best, that."""
    found = {}
    for name, value in dict(summary).items():
        if hasattr(value, "items"):
            value = next((value[kind] for kind in ("max", "min") if kind in value), None)
        if isinstance(value, int | float) and not isinstance(value, bool):
            found[name] = float(value)
    return found
