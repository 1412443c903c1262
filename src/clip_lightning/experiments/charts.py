"""Draws the plots of a comparison: a heat map, and recall against latency."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence

from clip_lightning.experiments.compare import Comparison, short_names, short_tower
from clip_lightning.reports.plots import GREEN, MUTED, Plot, styled_axes

MAX_LABEL = 60  # characters
MARKERS = "osD^vP*X"


def heatmap(comparison: Comparison) -> Plot | None:
    """Draw the best rsum of each image tower and text tower on the first data set."""
    if not comparison.rows:
        return None
    rows = comparison.data_sets[0]  # from best to worst
    best = {row.first.towers: row for row in reversed(rows)}
    images, texts = ([*dict.fromkeys(row.first.towers[kind] for row in rows)] for kind in (0, 1))
    cells = [[best.get((image, text)) for text in texts] for image in images]
    values = [[row.means["rsum"] if row else math.nan for row in line] for line in cells]
    low, high = rows[-1].means["rsum"], rows[0].means["rsum"]
    size = (1.5 * len(texts) + 4, 0.72 * len(images) + 2)
    with styled_axes(f"rsum{comparison.scope}", size) as (axes, buffer):
        axes.grid(visible=False)
        axes.imshow(values, cmap="YlGn", aspect="auto", vmin=low - 0.1, vmax=high + 0.8 * (high - low) + 0.1)
        for (y, line), x in itertools.product(enumerate(cells), range(len(texts))):
            row = line[x]
            text = row.shown("rsum").replace(" ± ", "\n± ") if row else "–"
            weight = "bold" if row and row.rank == 1 else "normal"
            axes.text(x, y, text, ha="center", va="center", fontsize=12, fontweight=weight)
        axes.set_xticks(range(len(texts)), _labels(texts), rotation=20, ha="right")
        axes.set_yticks(range(len(images)), _labels(images))
    return Plot(buffer.getvalue(), "rsum of each image tower with each text tower")


def recall_latency(comparison: Comparison) -> Plot | None:
    """Draw mean recall against image latency with the Pareto front; return None without latencies."""
    rows = [r for rows in comparison.data_sets[:1] for r in rows if "image_latency_ms" in r.means]
    if not rows:
        return None
    points = [(row.means["image_latency_ms"], row.means["rsum"] / 6) for row in rows]
    images, texts = ([*dict.fromkeys(row.first.towers[kind] for row in rows)] for kind in (0, 1))
    markers = dict(zip(texts, itertools.cycle(MARKERS)))
    title = f"Recall against latency, with ranks{comparison.scope}"
    with styled_axes(title, (9.6, 6)) as (axes, buffer):
        front = zip(*pareto_front(points), strict=True)
        axes.plot(*front, color=GREEN, alpha=0.6, drawstyle="steps-post", label="Pareto front")
        for i, label in enumerate(_labels(images)):
            axes.plot([], [], "s", color=f"C{i}", label=label)
        for text, label in zip(texts, _labels(texts), strict=True):
            axes.plot([], [], markers[text], color=MUTED, label=label)
        for row, point in zip(rows, points, strict=True):
            image, text = row.first.towers
            axes.plot(*point, markers[text], color=f"C{images.index(image)}", markersize=10)
            axes.annotate(str(row.rank), point, (7, 5), textcoords="offset points", color=MUTED)
        axes.figure.legend(loc="outside right upper")
        axes.margins(0.1)
        axes.set(xlabel="image latency, ms", ylabel="mean of the six recalls, %")
    return Plot(buffer.getvalue(), "recall against image latency, with the Pareto front")


def pareto_front(points: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return the points (latency, recall) that no other point beats in one without losing in the other."""
    front: list[tuple[float, float]] = []
    for point in sorted(points, key=lambda point: (point[0], -point[1])):
        if not front or point[1] > front[-1][1]:
            front.append(point)
    return front


def _labels(towers: Sequence[str]) -> list[str]:
    """Shorten names, and replace half emojis, which no font contains."""
    names = (" ".join(name.split())[:MAX_LABEL] for name in short_names(towers, short_tower).values())
    return [name.encode(errors="replace").decode() for name in names]
