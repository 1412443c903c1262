"""Draws plots as PNG: similarities of pairs, recall, confusions of classes, calibration.

Matplotlib is imported when something is drawn, and without pyplot, whose state belongs to the user.
"""

from __future__ import annotations

import base64
import math
import textwrap
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from typing import Any

import numpy as np
import torch
from torch import Tensor

from clip_lightning.evaluation.metrics import BEST, DIRECTIONS
from clip_lightning.evaluation.predictions import EDGES, histogram, recall_curve, separation
from clip_lightning.evaluation.retrieval import Embeddings, retrieval_ranks
from clip_lightning.evaluation.zero_shot import Calibration

INK, MUTED, LINE, GREEN, BLUE = "#18181b", "#71717a", "#e4e4e7", "#16a34a", "#2563eb"
COLOURS = {"text_to_image": GREEN, "image_to_text": BLUE}
MOST_K = 100
MOST_NAMES = 120  # class names; more would not be legible
SIZE, DPI = (5.0, 3.5), 200  # inches; small, so that text is legible on a phone
STYLE: Any = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": MUTED,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": LINE,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
    "text.parse_math": False,  # names may contain dollar signs
}
History = Mapping[int, Mapping[str, float]]  # epoch → metric → value in percent


@dataclass(frozen=True)
class Plot:
    """A plot as PNG, with a description."""

    png: bytes
    words: str

    @property
    def embedded(self) -> str:
        """The PNG as a `data:` URL."""
        return "data:image/png;base64," + base64.b64encode(self.png).decode()


def plots_of_split(
    embeddings: Embeddings, pairs: tuple[Tensor, Tensor], history: History, epoch: int
) -> dict[str, Plot]:
    """Draw `similarities`, `recall`, and `recall_history` if there is more than one epoch.

    `pairs` are the cosines of matched and unmatched pairs.
    """
    ranks = retrieval_ranks(
        embeddings.image, embeddings.text, embeddings.text_image_id, image_id=embeddings.image_id
    )
    plots = {
        "similarities": plot_similarities(*pairs, epoch),
        "recall": plot_recall(dict(zip(DIRECTIONS, ranks, strict=True)), len(embeddings.image), epoch),
    }
    return plots | ({"recall_history": plot_history(history)} if len(history) > 1 else {})


def plot_similarities(matched: Tensor, unmatched: Tensor, epoch: int) -> Plot:
    """Draw histograms of the cosines of matched and unmatched pairs."""
    with styled_axes(f"Similarity of pairs, epoch {epoch}") as (axes, buffer):
        for name, cosines, colour in (("matched", matched, GREEN), ("unmatched", unmatched, MUTED)):
            percent = 100 * histogram(cosines).numpy() / max(len(cosines), 1)
            label = f"{name}, mean {cosines.mean():z.2f}" if len(cosines) else f"no {name} pairs"
            axes.stairs(percent, EDGES, fill=True, color=colour, alpha=0.4, label=label)
        used = EDGES[:-1][histogram(torch.cat([matched, unmatched])).numpy() > 0]
        axes.set_xlim(used.min() - 0.02, used.max() + 0.03)
        axes.locator_params(axis="x", nbins=6)
        axes.set(xlabel="cosine similarity", ylabel="% of pairs per bin of 0.01")
        # between the title and the axes, where it covers nothing
        axes.legend(loc="lower left", bbox_to_anchor=(-0.03, 1.0), ncols=3, handlelength=1.4)
    words = (
        f"Cosine similarity: {matched.mean():z.2f} on average for matched pairs, {unmatched.mean():z.2f} for "
        "unmatched ones; a matched pair is more similar than an unmatched one in "
        f"{separation(matched, unmatched):.1f} % of comparisons"
    )
    return Plot(buffer.getvalue(), words)


def plot_recall(ranks: Mapping[str, Tensor], candidates: int, epoch: int) -> Plot:
    """Draw R@1, R@2, ... in percent for the ranks in both directions, and the chance level."""
    most, words = min(MOST_K, candidates), []
    with styled_axes(f"Recall at k, epoch {epoch}") as (axes, buffer):
        for name, title in DIRECTIONS.items():
            curve = recall_curve(ranks[name], most)
            label = f"{title}, R@1 {curve[0]:.1f}"
            axes.plot(range(1, most + 1), curve, color=COLOURS[name], label=label)
            recalls = (f"R@{k} {curve[k - 1]:.1f}" for k in (1, 5, 10, 50, 100) if k <= most)
            words.append(f"{title}: {', '.join(recalls)}")
        chance = [100 * k / candidates for k in range(1, most + 1)]
        axes.plot(range(1, most + 1), chance, "--", color=MUTED, linewidth=1, label="chance")
        axes.set_xscale("log")
        ticks = [k for k in (1, 2, 5, 10, 20, 50, 100) if k <= most]
        axes.set_xticks(ticks, ticks)
        axes.minorticks_off()
        axes.set(xlabel="k", ylabel="R@k, %", ylim=(0, 104), xlim=(0.9, 1.1 * max(most, 2)))
        axes.legend(loc="best", fontsize="small")
    return Plot(buffer.getvalue(), "; ".join(words))


def plot_history(history: History) -> Plot:
    """Draw R@1, R@5 and R@10 over the epochs in both directions."""
    epochs = sorted(history)
    with styled_axes("Recall over the epochs", ncols=2, sharey=True) as (panels, buffer):
        for axes, (direction, name) in zip(panels, DIRECTIONS.items(), strict=True):
            for k, style in ((10, ":"), (5, "--"), (1, "-")):
                values = [history[epoch].get(f"{direction}_R@{k}", math.nan) for epoch in epochs]
                label = f"R@{k} {values[-1]:.1f}"
                axes.plot(epochs, values, style, color=COLOURS[direction], marker="o", ms=3, label=label)
            axes.set(xlabel="epoch", ylim=(0, 104))
            axes.set_title(name, loc="left", fontsize="medium", color=COLOURS[direction])
            axes.locator_params(axis="x", integer=True, nbins=4)
            axes.legend(loc="best", fontsize="small")
        panels[0].set_ylabel("%")
    words = f"R@1, R@5 and R@10 from epoch {epochs[0]} to epoch {epochs[-1]}, in both directions"
    return Plot(buffer.getvalue(), words)


def plot_counts(values: Sequence[int], title: str, counted: str) -> bytes:
    """Draw a histogram of one or more integers, with `counted` as label of the y-axis."""
    with styled_axes(title) as (axes, buffer):
        low, high = min(values) - 0.5, max(values) + 0.5
        axes.hist(values, min(40, int(high - low)), range=(low, high), color=GREEN, alpha=0.8)
        axes.set_ylabel(counted)
        axes.locator_params(axis="both", integer=True)
    return buffer.getvalue()


def plot_confusion(confusion: Tensor, names: Sequence[str], title: str) -> bytes:
    """Draw the percentage of each true class (rows) that was classified as each class (columns).

    `confusion` (C, C) has the numbers of images; rows without images are white.
    """
    fractions = 100 * confusion.double() / confusion.sum(1, keepdim=True).clamp(min=1)
    side = min(max(5.0, 0.2 * len(names) + 3), 25.0)
    with styled_axes(title, (side, side)) as (axes, buffer):
        axes.grid(visible=False)
        drawn = axes.imshow(fractions.numpy(), cmap="Blues", vmin=0, vmax=100, interpolation="nearest")
        if len(names) <= MOST_NAMES:
            places, small = range(len(names)), 8 if len(names) > 30 else 9
            axes.set_xticks(places, names, rotation=90, fontsize=small)
            axes.set_yticks(places, names, fontsize=small)
        axes.set(xlabel="predicted class", ylabel="true class")
        axes.figure.colorbar(drawn, ax=axes, label="% of the true class", shrink=0.6)
    return buffer.getvalue()


def plot_calibration(found: Calibration, title: str) -> bytes:
    """Draw a reliability diagram: the fraction of right answers by their probability."""
    images, bins = found.images.numpy(), len(found.images)
    middles, filled, width = 100 * (np.arange(bins) + 0.5) / bins, images > 0, 90 / bins
    right, mean = 100 * found.accuracy.numpy()[filled], 100 * found.confidence.numpy()[filled]
    title = f"{textwrap.fill(title, 52)}\nexpected calibration error {found.error:.1f} %"
    layout = {"nrows": 2, "sharex": True, "height_ratios": (3, 1)}
    with styled_axes(title, (5.5, 6), **layout) as ((upper, lower), buffer):
        upper.plot((0, 100), (0, 100), "--", color=MUTED, linewidth=1, label="perfectly calibrated")
        upper.bar(middles[filled], right, width, color=BLUE, alpha=0.6)
        dots = {"color": INK, "markersize": 4, "clip_on": False, "label": "mean probability of the bin"}
        upper.plot(middles[filled], mean, "o", **dots)
        upper.set(ylabel="right answers, %", xlim=(0, 100), ylim=(0, 100))
        upper.legend(loc="upper left")
        lower.bar(middles, images, width, color=MUTED)
        lower.set(xlabel="probability of the answer, %", ylabel="images")
    return buffer.getvalue()


def plot_merge(points: Sequence[Mapping[str, float]], metrics: Mapping[str, str], chosen: float) -> bytes:
    """Draw the scores of averaged models over `alpha`, in percent of the best possible ones."""
    with styled_axes(f"Merged model, alpha {chosen:g}") as (axes, buffer):
        for name, metric in metrics.items():
            values = [100 * point[name] / BEST.get(metric, 100) for point in points]
            axes.plot([point["alpha"] for point in points], values, "o-", label=f"--{name}: {metric}")
        axes.axvline(chosen, linestyle="--", color=MUTED, linewidth=1)
        axes.set(xlabel="alpha (0: BASE, 1: TUNED)", ylabel="% of the best possible")
        axes.legend()
    return buffer.getvalue()


@contextmanager
def styled_axes(title: str, size: tuple[float, float] = SIZE, **layout: Any) -> Iterator[tuple[Any, BytesIO]]:
    """Yield the axes of a styled figure, and a buffer to which it is saved as PNG on exit."""
    import matplotlib
    from matplotlib.figure import Figure

    buffer = BytesIO()
    with matplotlib.rc_context(STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from")  # no font for some scripts
        figure = Figure(size, DPI, facecolor="white", layout="constrained")
        figure.suptitle(title, x=0.02, ha="left", fontsize="large", fontweight="bold")
        yield figure.subplots(**layout), buffer
        figure.savefig(buffer, format="png", metadata={"Software": None})
