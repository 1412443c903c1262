"""Where the time of a run went."""

from __future__ import annotations

import time

PARTS = ("preparation", "waiting_for_data", "towers", "loss", "optimiser", "evaluation", "other")
STEP = ("towers", "loss", "optimiser")


class Stopwatch:
    """Divides the time since it was made among the parts of a run.

    A step's parts are told apart as Python reaches them: on a GPU, which works behind Python's back, only
    their sum says something.

    Attributes:
        seconds: spent in each of `PARTS`.
    """

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(PARTS, 0.0)
        self._lap_began = time.perf_counter()

    def lap(self, part: str) -> None:
        """All since the last lap went into `part`."""
        now = time.perf_counter()
        self.seconds[part] += now - self._lap_began
        self._lap_began = now

    @property
    def step_seconds(self) -> float:
        """Spent in training steps, data there already."""
        return sum(self.seconds[part] for part in STEP)
