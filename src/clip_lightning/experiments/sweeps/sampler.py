"""Draws the points of a search with Optuna's samplers, and no point of a finite space twice."""

from __future__ import annotations

import itertools
import math
import zlib
from collections.abc import Collection, Iterator
from typing import Any

import numpy as np
from optuna import Study
from optuna.distributions import BaseDistribution
from optuna.samplers import RandomSampler, TPESampler
from optuna.trial import FrozenTrial, TrialState

from clip_lightning.experiments.sweeps.file import SweepFile

ATTEMPTS = 20
"""How often a point that has been tried is drawn again, before the next untried point is taken."""
Space = dict[str, BaseDistribution]
Drawn = dict[str, Any]


class UntriedSampler(RandomSampler):
    """Draws all parameters of a trial at once, by the method of the sweep file.

    A draw depends on the results so far, the study's name and the trial's number alone. A resumed study draws
    what it would have drawn without the interruption, and parallel workers draw different points.

    Args:
        file: the sweep file.
        failed: numbers of the failed trials whose points may be drawn again: those of earlier commands.
    """

    def __init__(self, file: SweepFile, failed: Collection[int] = ()) -> None:
        super().__init__()
        self.file, self.failed = file, failed

    def tried(self, study: Study) -> set[tuple[str, ...]]:
        """Return the points that need no further trial, each as the arguments of `fit`."""
        return {
            tuple(self.file.arguments(trial.params))
            for trial in study.get_trials(deepcopy=False)
            if len(trial.params) == len(self.file.parameters)
            and not (trial.state == TrialState.FAIL and trial.number in self.failed)
        }

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> Space:
        """Return the complete space."""
        return {one.name: one.distribution for one in self.file.parameters}

    def sample_relative(self, study: Study, trial: FrozenTrial, search_space: Space) -> Drawn:
        """Draw a point; if the space is finite, a point that has not been tried."""
        points, wishes = self.file.points, self._draws(study, trial, search_space)
        if points == math.inf:
            return next(wishes)
        grid = [[(one.name, drawn) for drawn in one.every or []] for one in self.file.parameters]
        if self.file.method == "grid":  # several machines that begin a grid at once begin at different points
            wishes = map(dict, itertools.islice(itertools.product(*grid), trial.number % int(points), None))
        tried = self.tried(study)
        candidates = itertools.chain(itertools.islice(wishes, ATTEMPTS), map(dict, itertools.product(*grid)))
        return next((one for one in candidates if tuple(self.file.arguments(one)) not in tried), {})

    def _draws(self, study: Study, trial: FrozenTrial, space: Space) -> Iterator[Drawn]:
        """Draw again and again, from TPE or at random: the first ten trials and those of method `random`."""
        several = {name: found for name, found in space.items() if not found.single()}
        for attempt in itertools.count():
            seed = zlib.crc32(f"{study.study_name} {trial.number} {attempt}".encode())
            generator, uniform = np.random.default_rng(seed), RandomSampler(seed=seed)
            drawn = {name: uniform.sample_independent(study, trial, name, space[name]) for name in space}
            if self.file.method == "bayes":
                drawn |= TPESampler(seed=seed).sample_relative(study, trial, several)
            for one in self.file.parameters:
                if one.weights and one.every:
                    drawn[one.name] = generator.choice(np.array(one.every, object), p=one.weights)
            # a quantised value as itself, and not as the number that was rounded
            yield {one.name: one.drawn(one.value(drawn[one.name])) for one in self.file.parameters}
