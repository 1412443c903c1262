"""A W&B sweep file, read and checked."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from clip_lightning.arguments import packaged_config
from clip_lightning.errors import UserError
from clip_lightning.evaluation.metrics import METRICS
from clip_lightning.experiments.sweeps.space import Parameter, flat, near, parameter, word

METHODS = ("grid", "random", "bayes")
KEYS = (
    "name", "description", "project", "entity", "method", "metric", "parameters", "early_terminate",
    "run_cap", "command", "program",
)  # fmt: skip
DEFAULT_METRIC = {"name": "val/rsum", "goal": "maximize"}
ARGS = "${args}"


@dataclass(frozen=True)
class Halving:
    """Which runs go on after which validation: the best 1/`eta` of those that got so far (W&B's `hyperband`).

    Attributes:
        first: validations before the first decision; the next come after `eta` times as many each.
        eta: see above.
    """

    first: int
    eta: int


@dataclass(frozen=True)
class SweepFile:
    """What a search tries.

    Attributes:
        name: of the study.
        method: `grid`, `random` or `bayes`.
        metric: as the run logs it, `val/rsum`.
        maximize: whether more of it is better.
        parameters: what is varied.
        constants: options of `fit` that are the same in every trial.
        base: the words of `fit` that the file's `command` fixes.
        early: whether and how runs are stopped early.
        run_cap: how many trials the file asks for.
        content: the file, as W&B takes it.
    """

    name: str
    method: str
    metric: str
    maximize: bool
    parameters: tuple[Parameter, ...]
    constants: dict[str, Any]
    base: tuple[str, ...]
    early: Halving | None
    run_cap: int | None
    content: dict[str, Any] = field(repr=False)

    def words(self, drawn: dict[str, Any]) -> list[str]:
        """The words of `fit` for a trial, constants and what was drawn, by the parameters' labels."""
        varied = {one.name: one.value(drawn[one.label]) for one in self.parameters if one.label in drawn}
        return option_words(self.constants | varied)

    def short_names(self) -> dict[str, str]:
        """The last part of each parameter's name, where no other ends alike."""
        ends = [one.name.rpartition(".")[2] for one in self.parameters]
        return {
            one.name: end if ends.count(end) == 1 else one.name
            for one, end in zip(self.parameters, ends, strict=True)
        }

    def identity(self) -> dict[str, Any]:
        """What must stay the same while a study goes on."""
        return {
            "method": self.method,
            "metric": [self.metric, self.maximize],
            "parameters": flat(self.content["parameters"]),
            "early_terminate": self.content.get("early_terminate"),
        }


def option_words(options: dict[str, Any]) -> list[str]:
    """Options of `fit` by their names, as words."""
    return [f"--{name}={word(value)}" for name, value in options.items()]


def read_sweep(given: str) -> SweepFile:
    """Read a sweep file, or the packaged one of this name.

    Raises:
        UserError: there is none, or something in it is wrong or cannot be searched; says what.
    """
    path = Path(packaged_config(given, "sweeps"))
    try:
        return _sweep(yaml.safe_load(path.read_text()), path.stem)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is no YAML: {error}") from error
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def _sweep(content: Any, stem: str) -> SweepFile:
    if not isinstance(content, dict):
        raise UserError("expected a W&B sweep file, with `method` and `parameters`")
    for key in content:
        if key not in KEYS:
            raise UserError(f"unknown key {key!r}{near(str(key), list(KEYS))}")
    for key in ("method", "parameters"):
        if key not in content:
            raise UserError(
                f"{key} is missing" + (f"; give one of {', '.join(METHODS)}" if key == "method" else "")
            )
    method = content["method"]
    if method not in METHODS:
        raise UserError(f"unknown method {method!r}{near(str(method), list(METHODS))}")
    specs = flat(content["parameters"])
    constants = {name: spec["value"] for name, spec in specs.items() if _is_constant(name, spec)}
    parameters = tuple(parameter(name, spec) for name, spec in specs.items() if name not in constants)
    for one in parameters:
        if method == "grid":
            one.every()
        if method != "random" and one.weights is not None:
            raise UserError(
                f"parameters.{one.name}.probabilities: {method} does not draw by them, only random does"
            )
    metric, maximize = _metric(content.get("metric", DEFAULT_METRIC))
    return SweepFile(
        name=str(content.get("name") or stem),
        method=method,
        metric=metric,
        maximize=maximize,
        parameters=parameters,
        constants=constants,
        base=_base(content.get("command")),
        early=_early(content.get("early_terminate")),
        run_cap=_count(content.get("run_cap"), "run_cap"),
        content=content,
    )


def _is_constant(name: str, spec: Any) -> bool:
    if "value" not in spec and spec.get("distribution") != "constant":
        return False
    if unknown := sorted(spec.keys() - {"value", "distribution"}):
        raise UserError(f"parameters.{name}: unknown {unknown[0]!r} beside `value`")
    if "value" not in spec or spec.get("distribution", "constant") != "constant":
        raise UserError(f"parameters.{name}: a constant has `value`, got {spec}")
    return True


def _metric(given: Any) -> tuple[str, bool]:
    if not isinstance(given, dict) or not isinstance(given.get("name"), str):
        raise UserError(
            f"metric: expected name and goal, as in `metric: {{name: val/rsum, goal: maximize}}`, got {given}"
        )
    if unknown := sorted(given.keys() - {"name", "goal"}):
        raise UserError(f"metric.{unknown[0]} is not supported; name and goal are")
    goal = given.get("goal", "minimize")
    if goal not in ("maximize", "minimize"):
        raise UserError(f"metric.goal: expected maximize or minimize, got {goal!r}")
    known = metric_names()
    if given["name"] not in known:
        raise UserError(f"metric.name: no run logs {given['name']!r}{near(given['name'], known)}")
    return given["name"], goal == "maximize"


def metric_names() -> list[str]:
    """Return what every validation logs."""
    return [f"val/{name}" for name in METRICS]


def _base(command: Any) -> tuple[str, ...]:
    """The words that the command gives `fit` beside the parameters."""
    if command is None:
        return ()
    remedy = "; write `command: [clip-lightning, fit, --config, heads, '${args}']`"
    if not isinstance(command, list) or "fit" not in command:
        raise UserError(f"command: expected a list with `fit` in it, got {command}{remedy}")
    words = [str(item) for item in command[command.index("fit") + 1 :]]
    if ARGS not in words:
        raise UserError(f"command: nothing says where the parameters go, {command}{remedy}")
    if other := [item for item in words if item.startswith("${") and item != ARGS]:
        raise UserError(f"command: {other[0]} is not supported, ${{args}} is{remedy}")
    return tuple(item for item in words if item != ARGS)


def _early(given: Any) -> Halving | None:
    if given is None:
        return None
    if not isinstance(given, dict) or given.get("type") != "hyperband":
        raise UserError(f"early_terminate: expected `type: hyperband`, got {given}")
    known = ["type", "min_iter", "max_iter", "s", "eta", "strict"]
    for key in given:
        if key not in known:
            raise UserError(f"early_terminate: unknown key {key!r}{near(str(key), known)}")
    eta = _count(given.get("eta", 3), "early_terminate.eta", least=2) or 3
    first = _count(given.get("min_iter"), "early_terminate.min_iter")
    last = _count(given.get("max_iter"), "early_terminate.max_iter")
    if (first is None) == (last is None):
        raise UserError("early_terminate: give either min_iter, or max_iter and s")
    if last is not None:
        steps = _count(given.get("s"), "early_terminate.s")
        if steps is None:
            raise UserError("early_terminate.s is missing: how often max_iter is divided by eta")
        first = max(1, last // eta**steps)
    return Halving(first or 1, eta)


def _count(given: Any, name: str, least: int = 1) -> int | None:
    if given is not None and (type(given) is not int or given < least):
        raise UserError(f"{name}: expected a whole number of {least} or more, got {given!r}")
    return given
