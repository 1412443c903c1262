"""Comparisons as pictures: a heat map, and recall against latency."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from io import BytesIO
from typing import Any

from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.patheffects import withStroke
from matplotlib.transforms import Bbox

from clip_lightning.experiments.compare import Comparison, Row, data_name, short_names
from clip_lightning.experiments.tables import shown

INK, MUTED, LINE, GREEN = "#18181b", "#71717a", "#e4e4e7", "#16a34a"
LONGEST = 60  # characters of a label in a picture
COLOURS = ["#2563eb", "#ea580c", "#7c3aed", "#0891b2", "#db2777", "#65a30d", "#92400e", "#475569"]


def heatmap(comparison: Comparison) -> bytes | None:
    """PNG of image towers × text towers, each cell the best rsum; of the data set with the most rows."""
    if not comparison.rows:
        return None
    rows = comparison.data_sets[0]
    best: dict[tuple[str, str], Row] = {}
    for row in rows:  # the best first
        best.setdefault(row.towers, row)
    images = _by_best(rows, 0)
    texts = _by_best(rows, 1)
    # the axes are inches themselves: a cell is as large in every map
    width, height = max(1.5 * len(texts), 1.5), max(0.72 * len(images), 0.72)
    figure, axes = _axes(width + 4, height + 2, (3 / (width + 4), 0.9 / (height + 2)), (width, height))
    values = [row.means["rsum"] for row in rows]
    low, spread = min(values), max(max(values) - min(values), 1e-9)
    for (y, image), (x, text) in itertools.product(enumerate(images), enumerate(texts)):
        _draw_cell(axes, x, y, best.get((image, text)), low, spread)
    names = short_names([*images, *texts])
    axes.set_xlim(-0.5, len(texts) - 0.5)
    axes.set_ylim(len(images) - 0.5, -0.5)
    axes.set_xticks(range(len(texts)), [_label(names[text]) for text in texts], parse_math=False)
    axes.set_yticks(range(len(images)), [_label(names[image]) for image in images], parse_math=False)
    crowded = len(texts) > 1 and max(len(_label(names[text])) for text in texts) > 16
    axes.tick_params(axis="x", length=0, labelrotation=25 if crowded else 0)
    for label in axes.get_xticklabels() if crowded else []:
        label.set_ha("right")
    axes.tick_params(axis="y", length=0)
    _title(axes, f"rsum{_of_what(comparison)}")
    return _png(figure)


def _by_best(rows: Sequence[Row], which: int) -> list[str]:
    """Towers of one kind, the one with the best row first."""
    return list(dict.fromkeys(row.towers[which] for row in rows))


def _draw_cell(axes: Any, x: int, y: int, row: Row | None, low: float, spread: float) -> None:
    level = None if row is None else (row.means["rsum"] - low) / spread
    colour = LINE if level is None else colormaps["YlGn"](0.1 + 0.7 * level)
    axes.add_patch(Rectangle((x - 0.48, y - 0.47), 0.96, 0.94, color=colour, linewidth=0))
    if row is None:
        axes.text(x, y, "–", ha="center", va="center", color=MUTED, fontsize=12)
        return
    ink = "white" if level is not None and level > 0.75 else INK
    weight = "bold" if row.rank == 1 else "normal"
    text = shown(row, "rsum").replace(" ± ", "\n± ")
    axes.text(x, y, text, ha="center", va="center", color=ink, fontsize=12, fontweight=weight)


def recall_latency(comparison: Comparison) -> bytes | None:
    """PNG of mean recall against image latency with the Pareto front; None where no latency is known."""
    rows = [row for row in comparison.data_sets[0] if _point(row)] if comparison.rows else []
    if not rows:
        return None
    figure, axes = _axes(9.6, 6, (0.09, 0.12), (9.6 * 0.87, 6 * 0.76))
    points = [_point(row) or (0.0, 0.0) for row in rows]
    lowest, highest = _limits([x for x, _ in points], room=0.3)
    axes.set_xlim(max(lowest, 0), highest)
    axes.set_ylim(*_limits([y for _, y in points], room=0.2))
    axes.grid(color=LINE, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.set_xlabel("image latency, ms", color=MUTED)
    axes.set_ylabel("mean of the six recalls, %", color=MUTED)
    front = pareto_front(points)
    corners = _steps(sorted(points[i] for i in front))
    axes.plot(*zip(*corners, strict=True), color=GREEN, linewidth=1.5, alpha=0.6, zorder=1)
    colours = dict(zip(_by_best(rows, 0), itertools.cycle(COLOURS), strict=False))
    for i, (row, (x, y)) in enumerate(zip(rows, points, strict=True)):
        edge, width = (GREEN, 2.2) if i in front else ("white", 1)
        colour = colours[row.towers[0]]
        axes.scatter([x], [y], s=90, color=colour, edgecolors=edge, linewidths=width, zorder=3)
    first = sorted(range(len(rows)), key=lambda i: (i not in front, rows[i].rank))
    labels = [(_name(rows, rows[i]), points[i]) for i in first]
    missed = _place_labels(axes, labels, corners)
    without = len(comparison.data_sets[0]) - len(rows)
    told = ["green: Pareto front"]
    told += [f"{without} without a latency"] * bool(without) + [f"{missed} without a label"] * bool(missed)
    _title(axes, f"Recall against latency{_of_what(comparison)}", "; ".join(told))
    return _png(figure)


def _steps(corners: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """With the corners between them: what is reached at one latency holds up to the next."""
    pairs = itertools.pairwise(corners)
    return [corners[0], *(point for (_, y), after in pairs for point in ((after[0], y), after))]


def _point(row: Row) -> tuple[float, float] | None:
    latency = row.means.get("image_latency_ms")
    return None if latency is None else (latency, row.means["rsum"] / 6)


def pareto_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Positions of the points for which no other is at least as quick and as good, and better in one."""
    return [
        i
        for i, (x, y) in enumerate(points)
        if not any(a <= x and b >= y and (a, b) != (x, y) for a, b in points)
    ]


def _limits(values: Sequence[float], room: float) -> tuple[float, float]:
    """Of an axis, with room for labels on both sides."""
    low, high = min(values), max(values)
    margin = room * (high - low) or max(0.1 * abs(high), 0.5)
    return low - margin, high + margin


def _place_labels(
    axes: Any, labels: Sequence[tuple[str, tuple[float, float]]], line: Sequence[tuple[float, float]]
) -> int:
    """Write each label near its point, within the axes and over no other label or point, nor the line.

    Returns:
        How many labels found no such place and are left out.
    """
    renderer = axes.figure.canvas.get_renderer()
    inside = axes.get_window_extent(renderer)
    pixels = [tuple(axes.transData.transform(point)) for _, point in labels]
    taken = [Bbox.from_extents(x - 9, y - 9, x + 9, y + 9) for x, y in pixels]
    corners = [tuple(axes.transData.transform(point)) for point in line]
    taken += [
        Bbox.from_extents(min(a, c), min(b, d), max(a, c), max(b, d)).padded(1)
        for (a, b), (c, d) in itertools.pairwise(corners)
    ]
    missed = 0
    for (x, y), (label, point) in zip(pixels, labels, strict=True):
        text = axes.text(
            0, 0, _label(label), transform=None, parse_math=False, fontsize=10, color=INK, zorder=4
        )
        text.set_path_effects([withStroke(linewidth=3, foreground="white")])
        size = text.get_window_extent(renderer)
        box = next((b for b in _places(x, y, size) if _is_free(b, taken, inside)), None)
        if box is None:
            text.remove()
            missed += 1
            continue
        # in the data's coordinates: pixels move when the picture is cropped
        text.set_transform(axes.transData)
        text.set_position(axes.transData.inverted().transform((box.x0, box.y0 - size.y0)))
        taken.append(box)
        near_x, near_y = min(max(x, box.x0), box.x1), min(max(y, box.y0), box.y1)
        if abs(near_x - x) + abs(near_y - y) > 24:
            end = axes.transData.inverted().transform((near_x, near_y))
            axes.plot([point[0], end[0]], [point[1], end[1]], color=MUTED, linewidth=0.7, zorder=2)
    return missed


def _places(x: float, y: float, size: Bbox) -> list[Bbox]:
    """Boxes for a label around (x, y), the nearest first, on the right first."""
    w, h = size.width, size.height
    found = []
    for away in (14, 26, 44, 66, 92, 124):
        for dx, dy in ((1, 0), (0, 1), (0, -1), (-1, 0), (1, 1), (1, -1), (-1, 1), (-1, -1)):
            left = x + dx * away - (w if dx < 0 else w / 2 if dx == 0 else 0)
            low = y + dy * away - (h if dy < 0 else h / 2 if dy == 0 else 0)
            found.append(Bbox.from_bounds(left, low, w, h))
    return found


def _is_free(box: Bbox, taken: Sequence[Bbox], inside: Bbox) -> bool:
    padded = box.padded(3)
    within = (
        inside.x0 <= padded.x0
        and inside.y0 <= padded.y0
        and padded.x1 <= inside.x1
        and padded.y1 <= inside.y1
    )
    return within and not any(padded.overlaps(other) for other in taken)


def _name(rows: Sequence[Row], row: Row) -> str:
    """The row's name, with its rank where other rows have the same."""
    return row.name if sum(other.name == row.name for other in rows) == 1 else f"#{row.rank} {row.name}"


def _of_what(comparison: Comparison) -> str:
    sets = comparison.data_sets
    return f", {data_name(sets[0][0].digest)} only" if len(sets) > 1 else ""


def _label(text: str) -> str:
    text = " ".join(text.split()).encode(errors="replace").decode()  # no font takes half an emoji
    return text if len(text) <= LONGEST else text[: LONGEST - 1] + "…"


def _axes(
    width: float, height: float, corner: tuple[float, float], size: tuple[float, float]
) -> tuple[Figure, Any]:
    """A figure of `width` × `height` inches and axes without a frame, `size` in inches."""
    figure = Figure(figsize=(width, height), dpi=150, facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.add_axes((*corner, size[0] / width, size[1] / height))
    axes.tick_params(colors=MUTED, labelsize=10)
    for side in axes.spines.values():
        side.set_visible(False)
    return figure, axes


def _title(axes: Any, title: str, below: str = "") -> None:
    above = 26 if below else 10
    axes.annotate(title, (0, 1), (0, above), "axes fraction", "offset points", color=INK, fontsize=14)
    axes.annotate(below, (0, 1), (0, 10), "axes fraction", "offset points", color=MUTED, fontsize=10)


def _png(figure: Figure) -> bytes:
    buffer = BytesIO()
    figure.savefig(buffer, format="png", bbox_inches="tight", pad_inches=0.25)
    return buffer.getvalue()
