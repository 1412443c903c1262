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
    """What a search tries.

    Attributes:
        name: name of the study.
        method: `grid`, `random` or `bayes`.
        metric: metric as the run logs it, `val/rsum`.
        maximize: whether a greater value is better.
        parameters: the options that vary.
        constants: options of `fit` that are the same in every trial.
        base: arguments of `fit` in the file's `command`.
        halving: (n, eta): the best 1/eta of the trials continue after n validations, after n * eta, and so on
            (W&B's `hyperband`); None if no trial is stopped early.
        run_cap: how many trials the file asks for.
        identity: what must not change while a study is resumed.
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
        """How many points the search space has; may be infinite."""
        return math.prod(math.inf if one.every is None else len(one.every) for one in self.parameters)

    def values(self, drawn: Mapping[str, Any]) -> dict[str, Any]:
        """Return the values of the options for what was drawn, by the names of the parameters."""
        return {one.name: one.value(drawn[one.name]) for one in self.parameters if one.name in drawn}

    def arguments(self, drawn: Mapping[str, Any]) -> list[str]:
        """Return the arguments of `fit` for what was drawn, and the constants."""
        return option_arguments(self.constants | self.values(drawn))

    def short_names(self) -> dict[str, str]:
        """Return the last part of each parameter's name, or all of it if another name ends like it."""
        ends = {one.name: one.name.rpartition(".")[2] for one in self.parameters}
        return {name: end if [*ends.values()].count(end) == 1 else name for name, end in ends.items()}


def option_arguments(options: Mapping[str, Any]) -> list[str]:
    """Return options of `fit` as arguments of the command line."""
    return [f"--{name}={space.argument(value)}" for name, value in options.items()]


def read_sweep(given: str) -> SweepFile:
    """Read a sweep file, or the packaged sweep file of this name.

    Raises:
        UserError: the file does not exist, or something in it is wrong or cannot be searched.
    """
    path = Path(packaged_config(given, "sweeps"))
    try:
        return _sweep(yaml.safe_load(path.read_text()), path.stem)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid YAML: {error}") from error
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def _sweep(content: Any, stem: str) -> SweepFile:
    if not isinstance(content, dict):
        raise UserError("expected a W&B sweep file, with `method` and `parameters`")
    space.refuse_unknown(content, KEYS)
    method = content.get("method")
    if method not in METHODS:
        wrong = "method is missing" if method is None else f"unknown method {method!r}"
        raise UserError(f"{wrong}{space.did_you_mean(str(method), METHODS)}")
    if "parameters" not in content:
        raise UserError("parameters is missing")
    constants: dict[str, Any] = {}
    parameters: list[space.Parameter] = []
    for name, spec in (specs := space.flatten(content["parameters"])).items():
        try:
            if "value" in spec or spec.get("distribution") == "constant":
                constants[name] = _constant(spec)
            else:
                parameters.append(space.parameter(name, spec, method))
        except UserError as error:
            raise UserError(f"parameters.{name}: {error}") from error
    metric, maximize = _metric(content.get("metric", {"name": "val/rsum", "goal": "maximize"}))
    return SweepFile(
        name=str(content.get("name") or stem),
        method=method,
        metric=metric,
        maximize=maximize,
        parameters=tuple(parameters),
        constants=constants,
        base=_base(content.get("command")),
        halving=_halving(content.get("early_terminate")),
        run_cap=_count(content, "run_cap"),
        identity={
            "method": method,
            "metric": [metric, maximize],
            "parameters": specs,
            "early_terminate": content.get("early_terminate"),
        },
    )


def _constant(spec: space.Spec) -> Any:
    space.refuse_unknown(spec, ("value", "distribution"), "a constant: ")
    if "value" not in spec or spec.get("distribution", "constant") != "constant":
        raise UserError(f"a constant has `value`, got {spec}")
    return spec["value"]


def _metric(given: Any) -> tuple[str, bool]:
    if not isinstance(given, dict):
        raise UserError(f"metric: expected `{{name: val/rsum, goal: maximize}}`, got {given}")
    space.refuse_unknown(given, ("name", "goal"), "metric: ")
    name, goal = given.get("name"), given.get("goal", "minimize")
    known = [f"val/{metric}" for metric in METRICS]
    if name not in known:
        raise UserError(f"metric.name: no run logs {name!r}{space.did_you_mean(str(name), known)}")
    if goal not in ("maximize", "minimize"):
        raise UserError(f"metric.goal: expected maximize or minimize, got {goal!r}")
    return name, goal == "maximize"


def _base(command: Any) -> tuple[str, ...]:
    """Return the arguments that the command gives `fit` besides the parameters."""
    if command is None:
        return ()
    arguments = [str(item) for item in command[command.index("fit") + 1 :]] if "fit" in command else []
    macros = [item for item in arguments if item.startswith("${")]
    if not isinstance(command, list) or macros != ["${args}"]:
        example = "[clip-lightning, fit, --config, heads, '${args}']"
        raise UserError(
            f"command: expected a list with `fit` and only ${{args}} after it, {example}; got {command}"
        )
    return tuple(item for item in arguments if item != "${args}")


def _halving(given: Any) -> tuple[int, int] | None:
    if given is None:
        return None
    if not isinstance(given, dict) or given.get("type") != "hyperband":
        raise UserError(f"early_terminate: expected `type: hyperband`, got {given}")
    space.refuse_unknown(given, ("type", "min_iter", "max_iter", "s", "eta", "strict"), "early_terminate: ")
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
