"""Draws that depend on the study's name and the trial's number alone, besides what trials have found."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution
from optuna.samplers import BaseSampler, RandomSampler, TPESampler
from optuna.trial import FrozenTrial, TrialState


class NumberedSampler(BaseSampler):
    """TPE or random draws, seeded anew for each trial.

    A study that goes on then neither repeats what it drew before nor draws otherwise than it would have,
    and workers side by side draw different things.

    Args:
        method: `bayes` or `random`.
        weights: the probabilities of a parameter's choices, by its label.
    """

    def __init__(self, method: str, weights: Mapping[str, Sequence[float]]) -> None:
        self.method = method
        self.weights = weights
        self._sampler: BaseSampler = RandomSampler()
        self._random = np.random.default_rng(0)

    def before_trial(self, study: optuna.Study, trial: FrozenTrial) -> None:
        """Seed."""
        seed = zlib.crc32(f"{study.study_name} {trial.number}".encode())
        self._random = np.random.default_rng(seed)
        self._sampler = TPESampler(seed=seed) if self.method == "bayes" else RandomSampler(seed=seed)
        self._sampler.before_trial(study, trial)

    def infer_relative_search_space(
        self, study: optuna.Study, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        return self._sampler.infer_relative_search_space(study, trial)

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        return self._sampler.sample_relative(study, trial, search_space)

    def sample_independent(
        self,
        study: optuna.Study,
        trial: FrozenTrial,
        param_name: str,
        param_distribution: BaseDistribution,
    ) -> Any:
        if param_name in self.weights and isinstance(param_distribution, CategoricalDistribution):
            weights = np.asarray(self.weights[param_name], dtype=float)
            row = self._random.choice(len(weights), p=weights / weights.sum())
            return param_distribution.choices[row]
        return self._sampler.sample_independent(study, trial, param_name, param_distribution)

    def after_trial(
        self,
        study: optuna.Study,
        trial: FrozenTrial,
        state: TrialState,
        values: Sequence[float] | None,
    ) -> None:
        self._sampler.after_trial(study, trial, state, values)
