"""The parameters of a W&B sweep file, as distributions that Optuna draws from."""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import yaml
from optuna.distributions import CategoricalDistribution, FloatDistribution
from optuna.trial import Trial

from clip_lightning.errors import UserError

CHOICES = ("categorical", "categorical_w_probabilities")
QUANTIZED = ("q_uniform", "q_log_uniform", "q_log_uniform_values")
RANGES = ("int_uniform", "uniform", "log_uniform", "log_uniform_values", "inv_log_uniform",
    "inv_log_uniform_values", *QUANTIZED)  # fmt: skip

Spec = Mapping[str, Any]


@dataclass(frozen=True)
class Parameter:
    """An option of `fit` that the search varies.

    Attributes:
        name: name of the option, with dots and without the two hyphens.
        distribution: distribution that Optuna draws from.
        quantum: the option's value is the multiple of this that is nearest to the drawn number; None if the
            value is what was drawn.
        weights: probability of each choice; None if all are equally likely.
    """

    name: str
    distribution: CategoricalDistribution | FloatDistribution
    quantum: float | None = None
    weights: tuple[float, ...] | None = None

    def value(self, drawn: Any) -> Any:
        """Return the option's value for what was drawn."""
        if self.quantum is None:
            return drawn
        value = round(drawn / self.quantum) * self.quantum
        return round(value, 12) if isinstance(value, float) else value

    def drawn(self, value: Any) -> Any:
        """Return what must be drawn for a value of the option; raise a LookupError if it cannot be drawn."""
        space = self.distribution
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if isinstance(space, CategoricalDistribution):
            same = [c for c in space.choices if argument(c) == argument(value)]
            # 1 and 1.0 are the same number to `fit`
            return (same + [c for c in space.choices if is_number and c == value and type(c) is not bool])[0]
        drawn = min(max(value, space.low), space.high) if is_number else None
        if drawn is None or self.value(drawn) != value:
            raise LookupError(value)
        return drawn

    @cached_property
    def every(self) -> list[Any] | None:
        """Everything that can be drawn, once per value; None if there are infinitely many values."""
        if isinstance(self.distribution, CategoricalDistribution):
            return list(self.distribution.choices)
        if self.quantum is None:
            return None
        low, high = self.distribution.low, self.distribution.high
        first, last = round(low / self.quantum), round(high / self.quantum)
        return [min(max(n * self.quantum, low), high) for n in range(first, last + 1)]

    def ends(self) -> list[Any]:
        """Return all choices, or both ends of a range: if `fit` accepts these, it accepts every draw."""
        space = self.distribution
        return [*space.choices] if isinstance(space, CategoricalDistribution) else [space.low, space.high]

    def suggest(self, trial: Trial) -> Any:
        """Draw in a trial."""
        space = self.distribution
        if isinstance(space, CategoricalDistribution):
            return trial.suggest_categorical(self.name, space.choices)
        return trial.suggest_float(self.name, space.low, space.high, step=space.step, log=space.log)


def argument(value: Any) -> str:
    """Return a value as it is written on the command line."""
    return value if isinstance(value, str) else json.dumps(value)


def flatten(parameters: Any, prefix: str = "parameters") -> dict[str, Spec]:
    """Return nested `parameters` under dotted names."""
    if not isinstance(parameters, dict) or not parameters:
        raise UserError(f"{prefix}: expected options of fit and the values to try, got {parameters!r}")
    specs: dict[str, Spec] = {}
    for name, spec in parameters.items():
        if not isinstance(spec, dict):
            raise UserError(f"{prefix}.{name}: expected `value`, `values`, or `min` and `max`, got {spec!r}")
        inner = flatten(spec["parameters"], f"{prefix}.{name}") if "parameters" in spec else {"": spec}
        specs |= {f"{name}.{end}".rstrip("."): one for end, one in inner.items()}
    return specs


def parameter(name: str, spec: Spec, method: str) -> Parameter:
    """Return a parameter that Optuna draws as W&B would; raise a UserError if Optuna cannot."""
    kind = spec.get("distribution")
    if kind is None and "values" not in spec and not {"min", "max"} <= spec.keys():
        raise UserError(f"expected `value`, `values`, or `min` and `max`, got {spec}")
    if kind is None:
        integers = type(spec.get("min")) is type(spec.get("max")) is int
        kind = "categorical" if "values" in spec else "int_uniform" if integers else "uniform"
    if kind == "constant":
        raise UserError(f"a constant has `value`, got {spec}")
    one_of(kind, (*CHOICES, *RANGES), "distribution that Optuna draws from")
    keys = ("values", "probabilities") if kind in CHOICES else ("min", "max")
    check_keys(spec, ("distribution", *keys, *(["q"] if kind in QUANTIZED else [])), kind)
    result = _choice(name, spec) if kind in CHOICES else _range(name, kind, spec)
    if method == "grid" and result.every is None:
        raise UserError("method grid requires `values`, whole numbers or `q`")
    if method != "random" and result.weights is not None:
        raise UserError(f"probabilities: method {method} does not use them; set method random")
    return result


def _choice(name: str, spec: Spec) -> Parameter:
    values, weights = spec.get("values"), spec.get("probabilities")
    if not isinstance(values, list) or not values:
        raise UserError(f"values: expected a list, got {values!r}")
    # Optuna stores text, numbers, true, false and null
    choices = [v if isinstance(v, str | int | float | None) else json.dumps(v) for v in values]
    if len(set(map(argument, choices))) < len(choices):
        raise UserError(f"values: {values} contains a value twice")
    if weights is None:
        return Parameter(name, CategoricalDistribution(choices))
    numbers = isinstance(weights, list) and all(isinstance(w, int | float) and w >= 0 for w in weights)
    if not numbers or len(weights) != len(values) or not math.isclose(sum(weights), 1, abs_tol=1e-6):
        raise UserError(f"probabilities: expected {len(values)} numbers that add up to 1, got {weights}")
    choices = [choice for choice, weight in zip(choices, weights, strict=True) if weight]
    likely = tuple(weight / sum(weights) for weight in weights if weight)
    return Parameter(name, CategoricalDistribution(choices), None, likely if len({*likely}) > 1 else None)


def _range(name: str, kind: str, spec: Spec) -> Parameter:
    low, high, quantum = (_number(spec, key) for key in ("min", "max", "q"))
    if quantum <= 0:
        raise UserError(f"q: expected a number greater than 0, got {quantum}")
    if kind == "int_uniform":
        if not type(low) is type(high) is int:
            raise UserError(f"int_uniform requires whole numbers, got {low} and {high}")
        return Parameter(name, FloatDistribution(low, high, step=1), quantum=1)
    logarithmic = "log_uniform" in kind
    if logarithmic and not kind.endswith("_values"):  # W&B expects the natural logarithms of the bounds
        low, high = (-high, -low) if kind.startswith("inv_") else (low, high)
        low, high = math.exp(low), math.exp(high)
    if kind not in QUANTIZED:
        return Parameter(name, FloatDistribution(low, high, log=logarithmic))
    if logarithmic and round(low / quantum) < 1:
        raise UserError(f"{kind} would draw 0; set min to q, which is {quantum}, or more")
    return Parameter(name, FloatDistribution(low, high, log=logarithmic), quantum)


def _number(spec: Spec, key: str) -> Any:
    value = spec.get(key, 1 if key == "q" else None)
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if isinstance(value, str) and math.isfinite(number):
        raise UserError(f"{key}: YAML reads {value} as text; write {yaml.safe_dump(number).split()[0]}")
    if isinstance(value, bool) or not math.isfinite(number):
        raise UserError(f"{key}: expected a number, got {value!r}")
    return value


def check_keys(given: Any, known: Sequence[str], what: str) -> None:
    """Raise a UserError if `given` is not a mapping with no keys but the known ones."""
    if not isinstance(given, dict):
        raise UserError(f"{what}: expected a mapping with {', '.join(known)}, got {given!r}")
    for key in given:
        one_of(key, known, f"key of {what}")


def one_of(given: Any, known: Sequence[str], what: str) -> str:
    """Return what is given; raise a UserError that suggests the most similar name if it is not known."""
    if given in known:
        return str(given)
    similar = difflib.get_close_matches(str(given), known, n=1, cutoff=0.6)
    expected = f"did you mean {similar[0]}?" if similar else f"expected one of {', '.join(known)}"
    raise UserError(f"{what}: {'it is missing' if given is None else f'unknown {given!r}'}; {expected}")
