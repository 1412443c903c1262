"""Which classes were taken for which, as a PNG; without pyplot, whose state belongs to the user."""

from __future__ import annotations

from collections.abc import Sequence
from io import BytesIO
from typing import Any

from torch import Tensor

_MOST_NAMES = 120  # more of them could not be read


def plot_confusion(confusion: Tensor, names: Sequence[str], title: str) -> bytes:
    """The share of each true class (rows, in percent) that was taken for each class (columns), as PNG.

    Args:
        confusion: (C, C) images; rows without images stay white.
        names: of the classes.
        title: of the picture.
    """
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shares = 100 * confusion.double() / confusion.sum(1, keepdim=True).clamp(min=1)
    side = min(max(5.0, 0.16 * len(names) + 3), 20.0)
    looks: Any = {"font.size": 10}
    buffer = BytesIO()
    with matplotlib.rc_context(looks):
        figure = Figure((side, side), 150, facecolor="white", layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots()
        picture = axes.imshow(shares.numpy(), cmap="Blues", vmin=0, vmax=100, interpolation="nearest")
        if len(names) <= _MOST_NAMES:
            places, small = range(len(names)), 6 if len(names) > 30 else 9
            plain = [name.replace("$", r"\$") for name in names]  # else a pair of them begins a formula
            axes.set_xticks(places, plain, rotation=90, fontsize=small)
            axes.set_yticks(places, plain, fontsize=small)
        axes.set(xlabel="taken for", ylabel="true class")
        figure.colorbar(picture, ax=axes, label="% of the true class", shrink=0.6)
        figure.suptitle(title.replace("$", r"\$"), x=0.02, ha="left", fontweight="bold")
        figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()
