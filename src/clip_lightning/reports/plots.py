"""Draws plots of a complete split as PNG: similarities of pairs, recall at every k, recall over the epochs.

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
from typing import TYPE_CHECKING, Any

from torch import Tensor

from clip_lightning.evaluation.diagnostics import MOST_K, Similarities, recall_curve, similarities
from clip_lightning.evaluation.metrics import DIRECTIONS
from clip_lightning.evaluation.retrieval import Embeddings, retrieval_ranks
from clip_lightning.evaluation.zero_shot import Calibration
from clip_lightning.reports.grids import GREEN, INK, LINE, MUTED

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BLUE = "#2563eb"
COLOURS = {"text_to_image": GREEN, "image_to_text": BLUE}
MOST_NAMES = 120  # class names; more would not be legible
SIZE, DPI = (5.0, 3.5), 200  # inches; small, so that text is legible on a phone


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
    embeddings: Embeddings, content: Sequence[int], history: Mapping[int, Mapping[str, float]], epoch: int
) -> dict[str, Plot]:
    """Draw `similarities`, `recall`, and `recall-history` if there is more than one epoch, by file name.

    Args:
        embeddings: embeddings of the split.
        content: group of byte-identical images that each image of the split belongs to.
        history: metrics such as `text_to_image_R@1` of each epoch, in percent.
        epoch: epoch of the embeddings.

    Raises:
        ValueError: there are no images or captions, or an embedding contains NaN or infinity.
    """
    found = similarities(embeddings, content)
    text_ranks, image_ranks = retrieval_ranks(
        embeddings.image, embeddings.text, embeddings.text_image_id, image_id=embeddings.image_id
    )
    candidates = len(embeddings.image)
    most = min(MOST_K, candidates)
    curves = {
        "text_to_image": recall_curve(text_ranks, most),
        "image_to_text": recall_curve(image_ranks, most),
    }
    plots = {
        "similarities": Plot(
            plot_similarities(found, f"Similarity of pairs, epoch {epoch}"),
            f"Cosine similarity: {found.matched_mean:z.2f} on average for matched pairs, "
            f"{found.unmatched_mean:z.2f} for unmatched ones; a matched pair is more similar than an "
            f"unmatched one in {found.separation:.1f} % of comparisons",
        ),
        "recall": Plot(
            plot_recall(curves, candidates, f"Recall at k, epoch {epoch}"),
            "; ".join(
                f"{DIRECTIONS[name]}: "
                + ", ".join(f"R@{k} {curve[k - 1]:.1f}" for k in (1, 5, 10, 50, 100) if k <= most)
                for name, curve in curves.items()
            ),
        ),
    }
    if len(history) > 1:
        first, *_, last = sorted(history)
        plots["recall-history"] = Plot(
            plot_history(history, "Recall over the epochs"),
            f"R@1, R@5 and R@10 from epoch {first} to epoch {last}, in both directions",
        )
    return plots


def plot_similarities(found: Similarities, title: str) -> bytes:
    """Draw histograms of the cosines of matched and unmatched pairs."""
    with styled_figure(title) as (figure, buffer):
        axes = figure.subplots()
        edges = found.edges.numpy()
        kinds = (
            ("matched", found.matched, found.matched_mean, GREEN),
            ("unmatched", found.unmatched, found.unmatched_mean, MUTED),
        )
        for name, counts, mean, colour in kinds:
            percent = 100 * counts.double().numpy() / max(int(counts.sum()), 1)
            label = f"{name}, mean {mean:z.2f}" if counts.any() else f"no {name} pairs"
            axes.stairs(percent, edges, fill=True, color=colour, alpha=0.4, label=label)
        filled = (found.matched + found.unmatched).nonzero().flatten().tolist() or [0, len(edges) - 2]
        axes.set_xlim(edges[max(filled[0] - 2, 0)], edges[min(filled[-1] + 3, len(edges) - 1)])
        axes.locator_params(axis="x", nbins=6)
        axes.set(xlabel="cosine similarity", ylabel="% of pairs per bin of 0.01")
        # between the title and the axes, where it covers nothing
        axes.legend(loc="lower left", bbox_to_anchor=(-0.03, 1.0), ncols=3, handlelength=1.4)
    return buffer.getvalue()


def plot_recall(curves: Mapping[str, Tensor], candidates: int, title: str) -> bytes:
    """Draw R@k over k, on a logarithmic axis.

    Args:
        curves: R@1, R@2, ... in percent for `text_to_image` and `image_to_text`, of the same length.
        candidates: number of images, which determines the chance level.
        title: title of the plot.
    """
    with styled_figure(title) as (figure, buffer):
        axes = figure.subplots()
        most = len(next(iter(curves.values())))
        ticks = [k for k in (1, 2, 5, 10, 20, 50, 100) if k <= most]
        for name, curve in curves.items():
            label = f"{DIRECTIONS[name]}, R@1 {curve[0]:.1f}"
            axes.plot(range(1, most + 1), curve, color=COLOURS[name], label=label)
        chance = [min(100 * k / candidates, 100) for k in range(1, most + 1)]
        axes.plot(range(1, most + 1), chance, "--", color=MUTED, linewidth=1, label="chance")
        axes.set_xscale("log")
        axes.set_xticks(ticks, [str(k) for k in ticks])
        axes.minorticks_off()
        axes.set(xlabel="k", ylabel="R@k, %", ylim=(0, 104), xlim=(0.9, 1.1 * max(most, 2)))
        axes.legend(loc="best", fontsize="small")
    return buffer.getvalue()


def plot_history(history: Mapping[int, Mapping[str, float]], title: str) -> bytes:
    """Draw R@1, R@5 and R@10 over the epochs in both directions.

    Args:
        history: metrics such as `text_to_image_R@1` of each epoch, in percent.
        title: title of the plot.
    """
    with styled_figure(title) as (figure, buffer):
        panels: Any = figure.subplots(1, 2, sharey=True)
        epochs = sorted(history)
        for axes, (direction, name) in zip(panels, DIRECTIONS.items(), strict=True):
            for k, style in ((10, ":"), (5, "--"), (1, "-")):
                values = [history[epoch].get(f"{direction}_R@{k}", math.nan) for epoch in epochs]
                label = f"R@{k} {values[-1]:.1f}"
                axes.plot(epochs, values, style, color=COLOURS[direction], marker="o", ms=3, label=label)
            axes.set(xlabel="epoch", ylim=(0, 104))
            axes.set_title(name, loc="left", fontsize="medium", color=COLOURS[direction])
            axes.set_xticks(sorted({epochs[round(part * (len(epochs) - 1) / 3)] for part in range(4)}))
            axes.legend(loc="best", fontsize="small")
        panels[0].set_ylabel("%")
    return buffer.getvalue()


def plot_counts(values: Sequence[int], title: str, counted: str) -> bytes:
    """Draw a histogram.

    Args:
        values: one or more integers.
        title: title of the plot.
        counted: label of the y-axis.
    """
    with styled_figure(title) as (figure, buffer):
        axes = figure.subplots()
        low, high = min(values), max(values)
        bins, span = min(40, high - low + 1), (low - 0.5, high + 0.5)
        axes.hist(values, bins, range=span, color=GREEN, alpha=0.8)
        axes.set_ylabel(counted)
        axes.locator_params(axis="both", integer=True)
    return buffer.getvalue()


def plot_confusion(confusion: Tensor, names: Sequence[str], title: str) -> bytes:
    """Draw the percentage of each true class (rows) that was classified as each class (columns).

    Args:
        confusion: (C, C) numbers of images; rows without images are white.
        names: names of the classes.
        title: title of the plot.
    """
    fractions = 100 * confusion.double() / confusion.sum(1, keepdim=True).clamp(min=1)
    side = min(max(5.0, 0.2 * len(names) + 3), 25.0)
    with styled_figure(title, (side, side)) as (figure, buffer):
        axes = figure.subplots()
        axes.grid(visible=False)
        drawn = axes.imshow(fractions.numpy(), cmap="Blues", vmin=0, vmax=100, interpolation="nearest")
        if len(names) <= MOST_NAMES:
            places, small = range(len(names)), 8 if len(names) > 30 else 9
            plain = [_plain(name) for name in names]
            axes.set_xticks(places, plain, rotation=90, fontsize=small)
            axes.set_yticks(places, plain, fontsize=small)
        axes.set(xlabel="predicted class", ylabel="true class")
        figure.colorbar(drawn, ax=axes, label="% of the true class", shrink=0.6)
    return buffer.getvalue()


def plot_calibration(found: Calibration, title: str) -> bytes:
    """Draw a reliability diagram: the fraction of right answers by their probability."""
    bins = len(found.images)
    middles, width = [100 * (i + 0.5) / bins for i in range(bins)], 90 / bins
    filled = [i for i, images in enumerate(found.images.tolist()) if images]
    title = f"{textwrap.fill(title, 52)}\nexpected calibration error {found.error:.1f} %"
    with styled_figure(title, (5.5, 6)) as (figure, buffer):
        upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
        upper.plot((0, 100), (0, 100), "--", color=MUTED, linewidth=1, label="perfectly calibrated")
        at, right = [middles[i] for i in filled], [100 * found.accuracy[i].item() for i in filled]
        mean = [100 * found.confidence[i].item() for i in filled]
        upper.bar(at, right, width, color=BLUE, alpha=0.6)
        upper.plot(at, mean, "o", color=INK, markersize=4, clip_on=False, label="mean probability of the bin")
        upper.set(ylabel="right answers, %", xlim=(0, 100), ylim=(0, 100))
        upper.legend(loc="upper left")
        lower.bar(middles, found.images.tolist(), width, color=MUTED)
        lower.set(xlabel="probability of the answer, %", ylabel="images")
    return buffer.getvalue()


def _plain(text: str) -> str:
    """Escape the dollar signs with which Matplotlib marks formulas."""
    return text.replace("$", r"\$")


@contextmanager
def styled_figure(title: str, size: tuple[float, float] = SIZE) -> Iterator[tuple[Figure, BytesIO]]:
    """Yield a styled figure, and a buffer to which it is saved as PNG on exit."""
    import matplotlib
    from matplotlib.figure import Figure

    looks: Any = {
        "font.size": 10,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.edgecolor": MUTED,
        "axes.labelcolor": INK,
        "xtick.color": MUTED,
        "ytick.color": MUTED,
        "xtick.labelcolor": INK,
        "ytick.labelcolor": INK,
        "text.color": INK,
        "legend.frameon": False,
        "axes.grid": True,
        "axes.grid.axis": "y",
        "axes.axisbelow": True,
        "grid.color": LINE,
        "lines.linewidth": 1.8,
    }
    buffer = BytesIO()
    with matplotlib.rc_context(looks), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from")  # no font for some scripts
        figure = Figure(size, DPI, facecolor="white", layout="constrained")
        figure.suptitle(_plain(title), x=0.02, ha="left", fontsize="large", fontweight="bold")
        yield figure, buffer
        figure.savefig(buffer, format="png", metadata={"Software": None})
