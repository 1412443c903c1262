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
from typing import Any, TypeVar

import yaml

from clip_lightning.errors import UserError
from clip_lightning.wandb_fetch import stays_offline

Answer = TypeVar("Answer")


@dataclass(frozen=True)
class SweepRun:
    """A run of a sweep.

    Attributes:
        path: ENTITY/PROJECT/ID.
        state: `finished`, `running`, `failed`, `crashed`, ...
        options: of `fit`, as the sweep chose them, under dotted names.
        metrics: the best values of the validations, as they were logged.
        seconds: how long it took.
        stopped: whether the sweep has ended it early.
        url: of its page.
    """

    path: str
    state: str
    options: dict[str, Any]
    metrics: dict[str, float]
    seconds: float
    stopped: bool
    url: str


STOPPED = "stopped_early"
"""In a run's summary: that the sweep has ended it."""


def is_online(offline: bool | None) -> bool:
    """Whether a run with this wish is sent to the server as it goes."""
    import wandb

    return not stays_offline(offline) and wandb.setup().settings.mode == "online"


def silence() -> None:
    """Let W&B print nothing about runs, in this process and in those that it starts."""
    import wandb

    os.environ.setdefault("WANDB_SILENT", "true")
    wandb.teardown()  # it has read the environment before


def create_sweep(content: dict[str, Any], entity: str | None, project: str) -> str:
    """Make the sweep; ENTITY/PROJECT/ID.

    Raises:
        UserError: the server refuses it.
    """
    import wandb

    server = wandb.setup().settings.base_url
    print(f"making the sweep on {server}", file=sys.stderr)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            sweep_id = wandb.sweep(content, entity=entity, project=project)
            owner = entity or wandb.Api().default_entity
    except Exception as error:  # the SDK has a dozen kinds
        raise UserError(
            f"{server} did not make the sweep ({_line(error)}); try again later, or search on this machine: "
            "--trainer.logger.offline true"
        ) from error
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
        raise UserError(f"W&B has no work for an agent of {sweep}: {_line(error)}") from error
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


def note_stop() -> None:
    """Note in the summary of this process's run that the sweep has ended it."""
    import wandb

    if wandb.run is not None:
        wandb.run.summary[STOPPED] = True


def sweep_state(sweep: str) -> str:
    """`RUNNING`, `FINISHED`, ...

    Raises:
        UserError: there is no such sweep, or no answer.
    """
    return str(_read(sweep, lambda found: found.state))


def sweep_runs(sweep: str) -> list[SweepRun]:
    """The sweep's runs, the oldest first.

    Raises:
        UserError: there is no such sweep, or no answer.
    """

    def read(found: Any) -> list[SweepRun]:
        return [_sweep_run(run) for run in sorted(found.runs, key=lambda run: run.created_at)]

    return _read(sweep, read)


def _read(sweep: str, read: Callable[[Any], Answer]) -> Answer:
    import wandb

    try:
        return read(wandb.Api().sweep(sweep))
    except Exception as error:  # the SDK has a dozen kinds
        raise UserError(
            f"the sweep {sweep} cannot be read from W&B ({_line(error)}); the same command again reads it, "
            "and --study NAME begins another"
        ) from error


def _sweep_run(run: Any) -> SweepRun:
    summary = dict(run.summary)
    stopped = bool(summary.get(STOPPED)) or run.state in ("killed", "stopped")
    seconds = float(summary.get("_runtime") or 0)
    options, numbers = _dotted(dict(run.config)), _numbers(summary)
    return SweepRun("/".join(run.path), run.state, options, numbers, seconds, stopped, run.url)


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())


def _numbers(summary: dict[str, Any]) -> dict[str, float]:
    """The numbers of a summary; of one that is kept as its best, that."""
    found = {}
    for name, value in summary.items():
        if hasattr(value, "items"):
            value = next((value[kind] for kind in ("max", "min") if kind in value), None)
        if isinstance(value, int | float) and not isinstance(value, bool):
            found[name] = float(value)
    return found
