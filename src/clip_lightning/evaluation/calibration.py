"""Whether probabilities mean what they say: the expected calibration error and the reliability diagram.

I images, B bins.
"""

from __future__ import annotations

import textwrap
from dataclasses import dataclass
from io import BytesIO

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


def plot_calibration(found: Calibration, title: str) -> bytes:
    """The reliability diagram as PNG: how often answers are right, by their probability; without pyplot."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    bins = len(found.images)
    middles, width = [100 * (i + 0.5) / bins for i in range(bins)], 100 / bins
    buffer = BytesIO()
    with matplotlib.rc_context({"font.size": 10}):
        figure = Figure((5.5, 6), 150, facecolor="white", layout="constrained")
        FigureCanvasAgg(figure)
        upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
        upper.plot((0, 100), (0, 100), color="0.6", linestyle="--", label="perfectly calibrated")
        filled = (found.images > 0).tolist()
        shown = [i for i in range(bins) if filled[i]]
        upper.bar([middles[i] for i in shown], [100 * found.accuracy[i].item() for i in shown], 0.9 * width)
        upper.plot(
            [100 * found.confidence[i].item() for i in shown],
            [100 * found.accuracy[i].item() for i in shown],
            "o",
            color="black",
            markersize=4,
            clip_on=False,
            label="mean probability of the bin",
        )
        upper.set(ylabel="right answers, %", xlim=(0, 100), ylim=(0, 100))
        upper.legend(loc="upper left", frameon=False)
        lower.bar(middles, found.images.tolist(), 0.9 * width, color="0.6")
        lower.set(xlabel="the model's probability for its answer, %", ylabel="images")
        shown_title = f"{textwrap.fill(title, 64)}\nexpected calibration error {found.error:.1f} %"
        figure.suptitle(shown_title.replace("$", r"\$"), x=0.02, ha="left", fontsize=10, fontweight="bold")
        figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()
