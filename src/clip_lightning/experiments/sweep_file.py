"""Reads a W&B sweep file, whose parameters become distributions, and draws trials from them with Optuna."""

from __future__ import annotations

import itertools
import json
import math
import zlib
from argparse import ArgumentError
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jsonargparse
import numpy as np
import optuna
import yaml
from jsonargparse.typing import NonNegativeFloat, NonNegativeInt, PositiveInt
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution
from optuna.pruners import BasePruner, NopPruner, SuccessiveHalvingPruner
from optuna.samplers import RandomSampler, TPESampler
from optuna.trial import FrozenTrial, Trial

from clip_lightning.arguments import packaged_config, plain_message
from clip_lightning.errors import UserError
from clip_lightning.evaluation.metrics import METRICS

ATTEMPTS = 20
"""Number of draws before the first untried point is used instead."""
MAX_POINTS = 100_000
"""Number of values up to which a range is finite, so that its points are listed."""
OF_SERVER = ("description", "project", "entity", "program")  # keys that only W&B's server needs
Drawn = dict[str, Any]


@dataclass(frozen=True)
class Metric:
    """The metric of a sweep file, as the run logs it: `val/rsum`."""

    name: str
    goal: Literal["minimize", "maximize"] = "minimize"


@dataclass(frozen=True)
class Hyperband:
    """When W&B stops trials early, counted in validations."""

    type: Literal["hyperband"]
    min_iter: NonNegativeInt = 0
    max_iter: NonNegativeInt = 0
    s: NonNegativeInt = 0
    eta: PositiveInt = 3
    strict: bool = False


Kind = Literal["categorical", "categorical_w_probabilities", "int_uniform", "uniform", "q_uniform",
    "log_uniform", "log_uniform_values", "inv_log_uniform", "inv_log_uniform_values", "q_log_uniform",
    "q_log_uniform_values"]  # fmt: skip


@dataclass
class Parameter:
    """A parameter of a sweep file: `values`, or the bounds of a range."""

    distribution: Kind | None = None
    values: list | None = None  # of list[Any], jsonargparse would parse the items
    probabilities: list[NonNegativeFloat] | None = None
    # numbers, checked below: as int | float, jsonargparse may read 1 as 1.0
    min: Any = None
    max: Any = None
    q: Any = None

    def __post_init__(self) -> None:
        for name, value, least in (
            ("min", self.min, -math.inf),
            ("max", self.max, -math.inf),
            ("q", self.q, 0),
        ):
            if value is not None and not (type(value) in (int, float) and value > least):
                raise UserError(f"{name}: expected a number{' above 0' * (least == 0)}, got {value!r}")
        self.space: CategoricalDistribution | FloatDistribution
        self.quantum: float | None = None  # the option's value is the multiple of it that is nearest
        self.weights: list[float] | None = None  # of each choice, if they are not equally likely
        self.every: list[Any] | None = None  # what can be drawn, once per value; None if it is infinite
        kind, low, high = self.distribution or "", self.min, self.max
        if self.values is not None and kind in ("", "categorical", "categorical_w_probabilities"):
            self._set_choices(self.values)
        elif low is not None and high is not None and not kind.startswith("categorical"):
            integers = type(low) is type(high) is int
            kind = kind or ("int_uniform" if integers else "uniform")
            if kind == "int_uniform" and not integers:
                raise UserError(f"int_uniform requires whole numbers, got {low} and {high}")
            if kind.endswith("log_uniform"):  # W&B expects the natural logarithms of the bounds
                low, high = (-high, -low) if kind.startswith("inv_") else (low, high)
                low, high = math.exp(low), math.exp(high)
            step = 1 if kind == "int_uniform" else None
            self.space = FloatDistribution(low, high, log="log" in kind, step=step)
            if quantum := self.q or (1 if kind.startswith("q_") else step):
                self.quantum = quantum
                multiples = range(round(low / quantum), round(high / quantum) + 1)
                if len(multiples) <= MAX_POINTS:
                    self.every = [min(max(n * quantum, low), high) for n in multiples]
        else:
            raise UserError("expected `value`, `values`, or `min` and `max`")

    def _set_choices(self, values: list[Any]) -> None:
        # Optuna stores text, numbers, true, false and null
        plain = [v if isinstance(v, str | int | float | None) else json.dumps(v) for v in values]
        choices = [*{argument(value): value for value in plain}.values()]  # each of them once
        if (weights := self.probabilities) is not None:
            if len(weights) != len(choices) or not math.isclose(sum(weights), 1, abs_tol=1e-6):
                raise UserError(f"probabilities: expected {len(choices)} that add up to 1, got {weights}")
            # NumPy, which draws, requires a sum that is closer to 1
            likely = [(choice, w / sum(weights)) for choice, w in zip(choices, weights, strict=True) if w]
            choices, self.weights = map(list, zip(*likely, strict=True))
        self.space, self.every = CategoricalDistribution(choices), choices

    def value(self, drawn: Any) -> Any:
        """Return the option's value for what was drawn."""
        if self.quantum is None:
            return drawn
        value = round(drawn / self.quantum) * self.quantum
        return round(value, 12) if isinstance(value, float) else value

    def drawn(self, value: Any) -> Any:
        """Return what must be drawn for a value of the option; raise a LookupError if it cannot be drawn."""
        if self.every is not None:
            # as `fit` parses them, 1 and 1.0 are equal, and lists are not text
            given = yaml.safe_load(argument(value))
            return [one for one in self.every if yaml.safe_load(argument(self.value(one))) == given].pop()
        low, high = self.ends()
        if not isinstance(value, int | float) or not low <= value <= high:
            raise LookupError(value)
        return value

    def ends(self) -> list[Any]:
        """Return all choices, or both ends of a range: if `fit` accepts these, it accepts every draw."""
        space = self.space
        return [*space.choices] if isinstance(space, CategoricalDistribution) else [space.low, space.high]

    def suggest(self, name: str, trial: Trial) -> Any:
        """Draw in a trial."""
        space = self.space
        if isinstance(space, CategoricalDistribution):
            return trial.suggest_categorical(name, space.choices)
        return trial.suggest_float(name, space.low, space.high, step=space.step, log=space.log)


@dataclass
class SweepFile:
    """A W&B sweep file: its keys, and what a search derives from them."""

    name: str
    metric: Metric
    method: Literal["grid", "random", "bayes"]
    parameters: Any = None
    early_terminate: Any = None
    run_cap: NonNegativeInt = 0
    command: Sequence[Any] = ("fit",)

    def __post_init__(self) -> None:
        known = [f"val/{name}" for name in METRICS]
        if self.metric.name not in known:
            raise UserError(f"metric.name: expected one of {', '.join(known)}, got {self.metric.name}")
        self.maximize = self.metric.goal == "maximize"
        self.specs = flatten(self.parameters)
        self.constants: dict[str, Any] = {}  # options with the same value in every trial
        self.varied: dict[str, Parameter] = {}
        for name, spec in self.specs.items():
            if "value" in spec:
                self.constants[name] = spec["value"]
                continue
            self.varied[name] = parameter = _read(f"parameters.{name}", Parameter, spec)
            if self.method == "grid" and parameter.every is None:
                raise UserError(f"parameters.{name}: a grid requires `values`, whole numbers or `q`")
            if self.method != "random" and parameter.weights:
                raise UserError(f"parameters.{name}: probabilities require method random")
        sizes = (math.inf if one.every is None else len(one.every) for one in self.varied.values())
        self.points = math.prod(sizes)  # of the search space; may be infinite
        command = [str(item) for item in self.command]
        if "fit" not in command:
            example = "[clip-lightning, fit, --config, heads, '${args}']"
            raise UserError(f"command: expected `fit` and its arguments, such as {example}; got {command}")
        self.base = [item for item in command[command.index("fit") + 1 :] if item != "${args}"]
        # (n, eta): the best 1/eta of the trials continue after n validations, after n * eta, ...
        self.halving: tuple[int, int] | None = None
        self.pruner: BasePruner = NopPruner()
        if self.early_terminate is not None:
            stop: Hyperband = _read("early_terminate", Hyperband, self.early_terminate)
            first = stop.min_iter or stop.max_iter // stop.eta**stop.s
            if not first:
                given = self.early_terminate
                raise UserError(f"early_terminate: expected min_iter, or max_iter and s, got {given}")
            self.halving = first, stop.eta
            self.pruner = SuccessiveHalvingPruner(*self.halving)

    def values(self, drawn: Mapping[str, Any]) -> dict[str, Any]:
        """Return the values of the options for what was drawn, by the names of the parameters."""
        return {name: one.value(drawn[name]) for name, one in self.varied.items() if name in drawn}

    def arguments(self, drawn: Mapping[str, Any]) -> list[str]:
        """Return the arguments of `fit` for what was drawn, and the constants."""
        options = self.constants | self.values(drawn)
        return [f"--{name}={argument(value)}" for name, value in options.items()]


def read_sweep(given: str) -> SweepFile:
    """Read a sweep file, or the packaged one of this name; raise a UserError if it cannot be searched."""
    path = Path(packaged_config(given, "sweeps"))
    try:
        content = yaml.safe_load(path.read_text())
        if not isinstance(content, dict):
            raise UserError(f"expected a W&B sweep file with `method` and `parameters`, got {content!r}")
        usual = {"name": path.stem, "metric": {"name": "val/rsum", "goal": "maximize"}}
        known = {key: value for key, value in content.items() if key not in OF_SERVER and value is not None}
        return _read("file", SweepFile, usual | known)
    except (UserError, yaml.YAMLError, UnicodeDecodeError) as error:
        why = error if isinstance(error, UserError) else f"it is not valid YAML: {error}"
        raise UserError(f"{path}: {why}") from error


def _read(name: str, kind: Any, content: Any) -> Any:
    """Check the content of a mapping by the types of a dataclass, and return its instance."""
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_argument(f"--{name}", type=kind)
    try:
        return parser.instantiate(parser.parse_object({name: content}))[name]
    except ArgumentError as error:
        message = plain_message(" ".join(str(error).split()))
        raise UserError(message.removeprefix("--").replace("file.", "", 1)) from error
    except (ValueError, OverflowError) as error:  # ours, Optuna's, or of exp
        raise UserError(f"{name}: {error}".removeprefix("file: ")) from error


def argument(value: Any) -> str:
    """Return a value as it is written on the command line."""
    return value if isinstance(value, str) else json.dumps(value, default=str)


def flatten(parameters: Any, prefix: str = "") -> dict[str, Any]:
    """Return nested `parameters` under dotted names."""
    if not isinstance(parameters, dict) or not parameters:
        raise UserError(f"parameters: expected options of fit and the values to try, got {parameters!r}")
    specs: dict[str, Any] = {}
    for name, spec in parameters.items():
        spec = spec if isinstance(spec, dict) else {}
        is_nested = "parameters" in spec
        specs |= flatten(spec["parameters"], f"{prefix}{name}.") if is_nested else {f"{prefix}{name}": spec}
    return specs


def points_of(file: SweepFile, trials: Iterable[FrozenTrial]) -> set[tuple[str, ...]]:
    """Return the points that the trials have drawn, each as the arguments of `fit`."""
    return {tuple(file.arguments(t.params)) for t in trials if len(t.params) == len(file.varied)}


class UntriedSampler(RandomSampler):
    """Draws all parameters of a trial at once, by the method of the sweep file.

    A draw depends only on the results so far, the name of the study and the number of the trial. A resumed
    study therefore draws the same points as without the interruption, and parallel workers draw different
    points. The points of `failed` trials, those of earlier commands, may be drawn again.
    """

    def __init__(self, file: SweepFile, failed: Collection[int] = ()) -> None:
        super().__init__()
        self.file, self.failed = file, failed

    def infer_relative_search_space(self, *_: Any) -> dict[str, BaseDistribution]:
        """Return the complete space."""
        return {name: one.space for name, one in self.file.varied.items()}

    def sample_relative(self, study: optuna.Study, trial: FrozenTrial, search_space: Any) -> Drawn:
        """Draw a point; if the space is finite, a point that has not been tried."""
        grid = [[(name, drawn) for drawn in one.every or []] for name, one in self.file.varied.items()]
        draws: Iterator[Drawn] = itertools.islice(self._draws(study, trial, search_space), ATTEMPTS)
        if self.file.method == "grid":  # machines that start at the same time start at different points
            first = trial.number % int(self.file.points)
            draws = map(dict, itertools.islice(itertools.product(*grid), first, None))
        trials = study.get_trials(deepcopy=False)
        tried = points_of(self.file, (t for t in trials if t.number not in self.failed))
        candidates = itertools.chain(draws, map(dict, itertools.product(*grid)))
        return next((one for one in candidates if tuple(self.file.arguments(one)) not in tried), {})

    def _draws(self, study: optuna.Study, trial: FrozenTrial, space: Any) -> Iterator[Drawn]:
        """Yield draws: from TPE, or at random for the first ten trials and for method `random`."""
        several = {name: one for name, one in space.items() if not one.single()}
        for attempt in itertools.count():
            seed = zlib.crc32(f"{study.study_name} {trial.number} {attempt}".encode())
            generator, uniform = np.random.default_rng(seed), RandomSampler(seed=seed)
            drawn = {
                name: generator.choice(np.array(one.every, object), p=one.weights)
                if one.weights
                else uniform.sample_independent(study, trial, name, one.space)
                for name, one in self.file.varied.items()
            }
            if self.file.method == "bayes":
                drawn |= TPESampler(seed=seed).sample_relative(study, trial, several)
            yield drawn
