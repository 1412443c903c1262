"""Where the time of a run went."""

from __future__ import annotations

import time

PARTS_OF_STEP = ("towers", "loss", "optimiser")
PARTS = ("preparation", "waiting_for_data", *PARTS_OF_STEP, "evaluation", "other")


class Stopwatch:
    """Divides the time since it was created among `PARTS`.

    On a GPU, which computes asynchronously, only the sum of the parts of a step is meaningful.
    """

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(PARTS, 0.0)
        self._lap_began = time.perf_counter()

    def lap(self, part: str) -> None:
        """Count the time since the last lap as this part."""
        now = time.perf_counter()
        self.seconds[part] += now - self._lap_began
        self._lap_began = now

    @property
    def step_seconds(self) -> float:
        """Seconds spent in training steps, without waiting for data."""
        return sum(self.seconds[part] for part in PARTS_OF_STEP)
