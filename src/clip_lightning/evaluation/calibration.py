"""Whether probabilities mean what they say: the expected calibration error and the reliability diagram.

I images, B bins.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

BINS = 15


@dataclass(frozen=True)
class Calibration:
    """Answers in bins of equal width by the probability that the model gave them.

    Attributes:
        images: (B,) int64, answers in each bin.
        confidence: (B,) float64, their mean probability, 0 to 1; 0 where there are none.
        accuracy: (B,) float64, the share of them that is right; likewise.
    """

    images: Tensor
    confidence: Tensor
    accuracy: Tensor

    @property
    def error(self) -> float:
        """Expected calibration error in percent: the bins' gaps, weighted by images (Guo et al. 2017)."""
        gaps = self.images * (self.confidence - self.accuracy).abs()
        return 100 * gaps.sum().item() / max(int(self.images.sum()), 1)


def calibration(confidence: Tensor, right: Tensor, bins: int = BINS) -> Calibration:
    """Put probabilities (I,) of answers into bins; `right` (I,) says which answers are."""
    place = (confidence.double() * bins).ceil().long().clamp(1, bins) - 1
    images = torch.bincount(place, minlength=bins)
    sums = torch.zeros(2, bins, dtype=torch.float64)
    sums[0].index_add_(0, place, confidence.double())
    sums[1].index_add_(0, place, right.double())
    return Calibration(images, *(sums / images.clamp(min=1)))
