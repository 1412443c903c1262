"""Draws the plots of a comparison: a heat map, and recall against latency."""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Sequence
from io import BytesIO
from typing import Any

from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from clip_lightning.experiments.compare import Comparison, short_names, short_tower
from clip_lightning.reports.plots import GREEN, INK, LINE, MUTED

MAX_LABEL = 60  # characters
COLORS = ("#2563eb", "#ea580c", "#7c3aed", "#0891b2", "#db2777", "#65a30d", "#92400e", "#475569")
MARKERS = "osD^vP*X"


def heatmap(comparison: Comparison) -> bytes | None:
    """Return a PNG with the best rsum of each image tower and text tower on the first data set."""
    if not comparison.rows:
        return None
    rows = comparison.data_sets[0]
    best = {row.first.towers: row for row in reversed(rows)}  # rows are sorted from best to worst
    images, texts = ([*dict.fromkeys(row.first.towers[kind] for row in rows)] for kind in (0, 1))
    figure = Figure((1.5 * len(texts) + 4, 0.72 * len(images) + 2), layout="constrained")
    axes = figure.subplots()
    cells = [[best.get((image, text)) for text in texts] for image in images]
    values = [[row.means["rsum"] if row else math.nan for row in line] for line in cells]
    low, high = min(row.means["rsum"] for row in rows), max(row.means["rsum"] for row in rows)
    axes.imshow(values, cmap="YlGn", aspect="auto", vmin=low - 0.1, vmax=high + 0.8 * (high - low) + 0.1)
    for (y, line), (x, _) in itertools.product(enumerate(cells), enumerate(texts)):
        row = line[x]
        text = row.shown("rsum").replace(" ± ", "\n± ") if row else "–"
        weight = "bold" if row and row.rank == 1 else "normal"
        axes.text(x, y, text, ha="center", va="center", color=INK, fontsize=12, fontweight=weight)
    names = short_names([*images, *texts], short_tower)
    axes.set_xticks(range(len(texts)), [_label(names[text]) for text in texts], rotation=20, ha="right")
    axes.set_yticks(range(len(images)), [_label(names[image]) for image in images])
    return _png(figure, axes, "rsum", comparison)


def recall_latency(comparison: Comparison) -> bytes | None:
    """Return a PNG of mean recall against image latency with the Pareto front, or None without latencies."""
    rows = [r for rows in comparison.data_sets[:1] for r in rows if "image_latency_ms" in r.means]
    if not rows:
        return None
    points = [(row.means["image_latency_ms"], row.means["rsum"] / 6) for row in rows]
    images, texts = ([*dict.fromkeys(row.first.towers[kind] for row in rows)] for kind in (0, 1))
    colors, markers = dict(zip(images, itertools.cycle(COLORS))), dict(zip(texts, itertools.cycle(MARKERS)))
    figure = Figure((9.6, 6), layout="constrained")
    axes = figure.subplots()
    front = sorted(points[i] for i in pareto_front(points))
    axes.plot(*zip(*front, strict=True), color=GREEN, alpha=0.6, drawstyle="steps-post", zorder=1)
    for row, point in zip(rows, points, strict=True):
        color, marker = colors[row.first.towers[0]], markers[row.first.towers[1]]
        edge = GREEN if point in front else "white"
        axes.scatter(*point, s=90, color=color, marker=marker, edgecolors=edge, linewidths=2, zorder=3)
        axes.annotate(str(row.rank), point, (7, 5), textcoords="offset points", color=MUTED, fontsize=9)
    names = short_names([*images, *texts], short_tower)
    keys: list[Any] = [Line2D([], [], color=GREEN, alpha=0.6, label="Pareto front")]
    keys += [Line2D([], [], ls="", marker="s", color=colors[i], label=_label(names[i])) for i in images]
    keys += [Line2D([], [], ls="", marker=markers[t], color=MUTED, label=_label(names[t])) for t in texts]
    figure.legend(handles=keys, loc="outside right upper", frameon=False)
    axes.margins(0.1)
    axes.grid(color=LINE)
    axes.set_axisbelow(True)
    axes.set(xlabel="image latency, ms", ylabel="mean of the six recalls, %")
    unmeasured = len(comparison.data_sets[0]) - len(rows)
    note = f"; {unmeasured} without a latency" if unmeasured else ""
    return _png(figure, axes, f"Recall against latency, with ranks{note}", comparison)


def pareto_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Return the points for which no other point is as fast and as good, and better in one of the two."""
    return [
        i
        for i, (x, y) in enumerate(points)
        if not any(a <= x and b >= y and (a, b) != (x, y) for a, b in points)
    ]


def _label(text: str) -> str:
    """Shorten a name, and replace `$`, which starts a formula, and half emojis, which no font contains."""
    text = " ".join(text.split()).encode(errors="replace").decode()
    return (text if len(text) <= MAX_LABEL else text[: MAX_LABEL - 1] + "…").replace("$", r"\$")


def _png(figure: Figure, axes: Any, title: str, comparison: Comparison) -> bytes:
    several = len(comparison.data_sets) > 1
    axes.set_title(title + (f", {comparison.rows[0].data} only" if several else ""), loc="left", color=INK)
    axes.tick_params(colors=MUTED, length=0)
    axes.spines[:].set_visible(False)
    buffer = BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about characters that the font lacks, which are drawn as boxes
        figure.savefig(buffer, format="png", dpi=150)
    return buffer.getvalue()
