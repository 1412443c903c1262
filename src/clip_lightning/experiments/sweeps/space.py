"""The parameters of a W&B sweep file as distributions that Optuna draws from."""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.trial import Trial

from clip_lightning.errors import UserError

INEXACT = ("normal", "q_normal", "log_normal", "q_log_normal", "beta", "q_beta")
"""Distributions of W&B's that Optuna does not have."""

Spec = Mapping[str, Any]


@dataclass(frozen=True)
class Parameter:
    """An option of `fit` that the search varies.

    Attributes:
        name: the option, with dots and without its two hyphens.
        distribution: what is drawn.
        quantum: the option is the drawn whole number times this; None where it is the drawn value itself.
        weights: probability of each choice; None where all are alike.
    """

    name: str
    distribution: BaseDistribution
    quantum: float | None = None
    weights: tuple[float, ...] | None = None

    @property
    def label(self) -> str:
        """Its name in a study: what is drawn there."""
        return self.name if self.quantum is None else f"{self.name} / {self.quantum:g}"

    def value(self, drawn: Any) -> Any:
        """The option's value."""
        if self.quantum is not None:
            drawn *= self.quantum
        return round(drawn, 12) if isinstance(drawn, float) and self._is_stepped() else drawn

    def drawn(self, value: Any) -> Any:
        """What must be drawn for the option to have this value.

        Raises:
            LookupError: it cannot be drawn.
        """
        if isinstance(self.distribution, CategoricalDistribution):
            # a whole number is the same with a point and without
            number = isinstance(value, int | float) and not isinstance(value, bool)
            same = [c for c in self.distribution.choices if word(c) == word(value)]
            same += [c for c in self.distribution.choices if number and type(c) is not bool and c == value]
            return same[0]
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise LookupError(value)
        if self.quantum is not None:
            value = round(value / self.quantum, 9)
        if isinstance(self.distribution, IntDistribution):
            if value != int(value):
                raise LookupError(value)
            value = int(value)
        if not self.distribution._contains(value):
            raise LookupError(value)
        return value

    def suggest(self, trial: Trial) -> Any:
        """Draw in a trial."""
        found = self.distribution
        if isinstance(found, CategoricalDistribution):
            return trial.suggest_categorical(self.label, found.choices)
        if isinstance(found, IntDistribution):
            return trial.suggest_int(self.label, found.low, found.high, step=found.step, log=found.log)
        assert isinstance(found, FloatDistribution)
        return trial.suggest_float(self.label, found.low, found.high, step=found.step, log=found.log)

    def every(self) -> list[Any]:
        """All that can be drawn.

        Raises:
            UserError: that is infinitely many.
        """
        found = self.distribution
        if isinstance(found, CategoricalDistribution):
            return list(found.choices)
        if isinstance(found, IntDistribution):
            return list(range(found.low, found.high + 1, found.step))
        if isinstance(found, FloatDistribution) and found.step is not None:
            return [
                found.low + i * found.step for i in range(round((found.high - found.low) / found.step) + 1)
            ]
        raise UserError(f"parameters.{self.name}: method grid needs `values`, whole numbers or `q`")

    def ends(self) -> list[Any]:
        """Drawn values that show whether `fit` takes them: all choices, or both ends."""
        if isinstance(self.distribution, CategoricalDistribution):
            return list(self.distribution.choices)
        return [self.distribution.low, self.distribution.high]  # type: ignore[attr-defined]

    def _is_stepped(self) -> bool:
        return self.quantum is not None or getattr(self.distribution, "step", None) is not None


def word(value: Any) -> str:
    """A value as a word of the command line."""
    return value if isinstance(value, str) else json.dumps(value)


def flat(parameters: Any, prefix: str = "") -> dict[str, Spec]:
    """Nested `parameters` under dotted names.

    Raises:
        UserError: something in it is no parameter.
    """
    where = f"parameters.{prefix}".rstrip(".")
    if not isinstance(parameters, dict) or not parameters:
        raise UserError(f"{where}: expected options of fit and what to try for each, got {parameters!r}")
    found: dict[str, Spec] = {}
    for name, spec in parameters.items():
        if not isinstance(spec, dict):
            raise UserError(
                f"parameters.{prefix}{name}: expected `value`, `values`, or `min` and `max`, got {spec!r}"
            )
        inner = spec.get("parameters")
        found |= {f"{prefix}{name}": spec} if inner is None else flat(inner, f"{prefix}{name}.")
    return found


def parameter(name: str, spec: Spec) -> Parameter:
    """The Optuna parameter that draws what W&B would draw.

    Raises:
        UserError: this is no parameter of W&B's, or Optuna cannot draw it.
    """
    kind = _kind(name, spec)
    if kind == "categorical":
        return _choice(name, spec)
    known = {"distribution", "min", "max", *(["q"] if kind.startswith("q_") else [])}
    if unknown := sorted(spec.keys() - known):
        raise UserError(f"parameters.{name}: {kind} has no {unknown[0]!r}")
    low, high = _number(name, spec, "min"), _number(name, spec, "max")
    if low > high:
        raise UserError(f"parameters.{name}: min {low} is more than max {high}")
    if kind == "int_uniform":
        if not (isinstance(low, int) and isinstance(high, int)):
            raise UserError(f"parameters.{name}: int_uniform needs whole numbers, got {low} and {high}")
        return Parameter(name, IntDistribution(low, high))
    if kind == "uniform":
        return Parameter(name, FloatDistribution(low, high))
    if kind == "q_uniform":
        return _stepped(name, low, high, _quantum(name, spec))
    low, high = _of_exponents(kind, low, high)
    if low <= 0:
        raise UserError(f"parameters.{name}: {kind} needs min above 0, got {low}")
    if not kind.startswith("q_"):
        return Parameter(name, FloatDistribution(low, high, log=True))
    quantum = _quantum(name, spec)
    first, last = round(low / quantum), round(high / quantum)
    if first < 1:
        raise UserError(f"parameters.{name}: {kind} would draw 0 here; give min of at least q, {quantum}")
    multiple = IntDistribution(first, last, log=True)
    return Parameter(name, multiple, None if quantum == 1 and isinstance(quantum, int) else quantum)


RANGES = (
    "int_uniform",
    "uniform",
    "q_uniform",
    "log_uniform",
    "log_uniform_values",
    "inv_log_uniform",
    "inv_log_uniform_values",
    "q_log_uniform",
    "q_log_uniform_values",
)


def _kind(name: str, spec: Spec) -> str:
    """The distribution, by the name that is given or by what else is."""
    kind = spec.get("distribution")
    if kind is None:
        if "values" in spec:
            return "categorical"
        if "min" in spec and "max" in spec:
            whole = type(spec["min"]) is int and type(spec["max"]) is int
            return "int_uniform" if whole else "uniform"
        raise UserError(
            f"parameters.{name}: expected `value`, `values`, or `min` and `max`, got {dict(spec)}"
        )
    if kind in INEXACT:
        raise UserError(
            f"parameters.{name}: distribution {kind} is W&B's alone, Optuna has none; "
            "take uniform or log_uniform_values, or search online"
        )
    if kind in ("categorical", "categorical_w_probabilities"):
        return "categorical"
    if kind not in RANGES:
        raise UserError(
            f"parameters.{name}: unknown distribution {kind!r}{near(kind, [*RANGES, 'categorical'])}"
        )
    return kind


def _choice(name: str, spec: Spec) -> Parameter:
    if unknown := sorted(spec.keys() - {"distribution", "values", "probabilities"}):
        raise UserError(f"parameters.{name}: unknown {unknown[0]!r} beside `values`")
    values, weights = spec.get("values"), spec.get("probabilities")
    if not isinstance(values, list) or not values:
        raise UserError(f"parameters.{name}.values: expected a list, got {values!r}")
    plain = (str, int, float, type(None))  # a bool is an int
    choices = [value if isinstance(value, plain) else json.dumps(value) for value in values]
    if len({word(choice) for choice in choices}) < len(choices):
        raise UserError(f"parameters.{name}.values: {values} has a value twice")
    if weights is not None and (
        len(weights) != len(values) or min(weights) < 0 or not math.isclose(sum(weights), 1, abs_tol=1e-6)
    ):
        raise UserError(
            f"parameters.{name}.probabilities: expected {len(values)} that add up to 1, got {weights}"
        )
    if weights is not None and len(set(weights)) == 1:
        weights = None
    return Parameter(name, CategoricalDistribution(choices), None, weights and tuple(weights))


def _stepped(name: str, low: float, high: float, quantum: float) -> Parameter:
    """The multiples of `quantum` that W&B rounds to; whole numbers where it is one."""
    first, last = round(low / quantum), round(high / quantum)
    if isinstance(quantum, int):
        return Parameter(name, IntDistribution(first * quantum, last * quantum, step=quantum))
    return Parameter(
        name, FloatDistribution(round(first * quantum, 12), round(last * quantum, 12), step=quantum)
    )


def _of_exponents(kind: str, low: float, high: float) -> tuple[float, float]:
    """The bounds themselves, where W&B is given their natural logarithms."""
    if kind.endswith("_values"):
        return low, high
    return (math.exp(-high), math.exp(-low)) if kind.startswith("inv_") else (math.exp(low), math.exp(high))


def _number(name: str, spec: Spec, key: str) -> Any:
    value = spec.get(key)
    if isinstance(value, str) and _is_number(value):
        raise UserError(f"parameters.{name}.{key}: YAML reads {value} as text; write {_with_point(value)}")
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise UserError(f"parameters.{name}.{key}: expected a number, got {value!r}")
    return value


def _quantum(name: str, spec: Spec) -> Any:
    quantum = _number(name, {"q": 1, **spec}, "q")
    if quantum <= 0:
        raise UserError(f"parameters.{name}.q: expected more than 0, got {quantum}")
    return quantum


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def _with_point(text: str) -> str:
    """1e-3 as YAML wants it: 1.0e-3, with the exponent's sign."""
    mantissa, mark, exponent = text.lower().partition("e")
    mantissa = mantissa if "." in mantissa else f"{mantissa}.0"
    return f"{mantissa}e{exponent if exponent[:1] in '+-' else f'+{exponent}'}" if mark else mantissa


def near(given: str, known: list[str]) -> str:
    """A question after the one of `known` that resembles `given` most, or all of them."""
    found = difflib.get_close_matches(given, known, n=1, cutoff=0.6)
    return f"; did you mean {found[0]}?" if found else f"; expected one of {', '.join(known)}"
