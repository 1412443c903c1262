"""Reads and checks a W&B sweep file."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from clip_lightning.arguments import packaged_config
from clip_lightning.errors import UserError
from clip_lightning.evaluation.metrics import METRICS
from clip_lightning.experiments.sweeps import space

METHODS = ("grid", "random", "bayes")
KEYS = ("name", "description", "project", "entity", "method", "metric", "parameters", "early_terminate",
    "run_cap", "command", "program")  # fmt: skip


@dataclass(frozen=True)
class SweepFile:
    """Represents a W&B sweep file.

    Attributes:
        name: name of the study.
        method: `grid`, `random` or `bayes`.
        metric: metric as the run logs it, `val/rsum`.
        maximize: whether a greater value is better.
        parameters: the options that vary.
        constants: options of `fit` with the same value in every trial.
        base: arguments of `fit` in the file's `command`.
        halving: (n, eta): the best 1/eta of the trials continue after n validations, after n * eta, and so on
            (W&B's `hyperband`); None if no trial is stopped early.
        run_cap: number of trials; None if the file has no limit.
        identity: the parts that must not change when a study is resumed.
    """

    name: str
    method: str
    metric: str
    maximize: bool
    parameters: tuple[space.Parameter, ...]
    constants: dict[str, Any]
    base: tuple[str, ...]
    halving: tuple[int, int] | None
    run_cap: int | None
    identity: dict[str, Any]

    @property
    def points(self) -> float:
        """The number of points in the search space; may be infinite."""
        return math.prod(math.inf if one.every is None else len(one.every) for one in self.parameters)

    def values(self, drawn: Mapping[str, Any]) -> dict[str, Any]:
        """Return the values of the options for what was drawn, by the names of the parameters."""
        return {one.name: one.value(drawn[one.name]) for one in self.parameters if one.name in drawn}

    def arguments(self, drawn: Mapping[str, Any]) -> list[str]:
        """Return the arguments of `fit` for what was drawn, and the constants."""
        options = self.constants | self.values(drawn)
        return [f"--{name}={space.argument(value)}" for name, value in options.items()]


def read_sweep(given: str) -> SweepFile:
    """Read a sweep file, or the packaged one of this name; raise a UserError if it cannot be searched."""
    path = Path(packaged_config(given, "sweeps"))
    try:
        return _sweep(yaml.safe_load(path.read_text()), path.stem)
    except (UserError, yaml.YAMLError, UnicodeDecodeError) as error:
        why = error if isinstance(error, UserError) else f"it is not valid YAML: {error}"
        raise UserError(f"{path}: {why}") from error


def _sweep(content: Any, stem: str) -> SweepFile:
    space.check_keys(content, KEYS, "a W&B sweep file")
    method = space.one_of(content.get("method"), METHODS, "method")
    constants: dict[str, Any] = {}
    parameters: list[space.Parameter] = []
    for name, spec in (specs := space.flatten(content.get("parameters"))).items():
        try:
            if "value" in spec:
                space.check_keys(spec, ("value", "distribution"), "a constant")
                constants[name] = spec["value"]
            else:
                parameters.append(space.parameter(name, spec, method))
        except ValueError as error:  # ours, or Optuna's
            raise UserError(f"parameters.{name}: {error}") from error
    metric, maximize = _metric(content.get("metric", {"name": "val/rsum", "goal": "maximize"}))
    halving = _halving(content.get("early_terminate"))
    return SweepFile(
        name=str(content.get("name") or stem),
        method=method,
        metric=metric,
        maximize=maximize,
        parameters=tuple(parameters),
        constants=constants,
        base=_base(content.get("command")),
        halving=halving,
        run_cap=_count(content, "run_cap"),
        identity={"method": method, "metric": [metric, maximize], "parameters": specs, "halving": halving},
    )


def _metric(given: Any) -> tuple[str, bool]:
    space.check_keys(given, ("name", "goal"), "metric")
    name = space.one_of(given.get("name"), [f"val/{metric}" for metric in METRICS], "metric.name")
    goal = space.one_of(given.get("goal", "minimize"), ("minimize", "maximize"), "metric.goal")
    return name, goal == "maximize"


def _base(command: Any) -> tuple[str, ...]:
    """Return the arguments that the command gives `fit` besides the parameters."""
    if command is None:
        return ()
    arguments = [str(item) for item in command[command.index("fit") + 1 :]] if "fit" in command else []
    macros = [item for item in arguments if item.startswith("${")]
    if not isinstance(command, list) or macros != ["${args}"]:
        example = "such as [clip-lightning, fit, --config, heads, '${args}']"
        raise UserError(
            f"command: expected `fit` followed by no macro but ${{args}}, {example}; got {command}"
        )
    return tuple(item for item in arguments if item != "${args}")


def _halving(given: Any) -> tuple[int, int] | None:
    if given is None:
        return None
    keys = ("type", "min_iter", "max_iter", "s", "eta", "strict")
    space.check_keys(given, keys, "early_terminate")
    space.one_of(given.get("type"), ["hyperband"], "early_terminate.type")
    eta = _count({"eta": 3, **given}, "eta", least=2) or 3
    first, last, steps = (_count(given, key) for key in ("min_iter", "max_iter", "s"))
    if (first is None) == (last is None or steps is None):
        raise UserError("early_terminate: give either min_iter, or max_iter and s")
    return first or max(1, (last or 1) // eta ** (steps or 0)), eta


def _count(given: Mapping[str, Any], name: str, least: int = 1) -> int | None:
    value = given.get(name)
    if value is not None and (type(value) is not int or value < least):
        raise UserError(f"{name}: expected a whole number of {least} or more, got {value!r}")
    return value
