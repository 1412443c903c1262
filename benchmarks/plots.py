"""Draw what lies in benchmarks/results: the newest run of each benchmark, into docs/images.

    python benchmarks/plots.py

`time_to_recall.py` draws its own curves while it runs.
"""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

import matplotlib
import report

matplotlib.use("Agg")
from matplotlib import pyplot

IMAGES = Path(__file__).parents[1] / "docs/images"
BLUE, GREY = "#3465a4", "#888888"


def runs_of(name: str) -> list[dict[str, Any]]:
    """All results of a benchmark, the oldest first."""
    return [json.loads(file.read_text()) for file in sorted(report.RESULTS.glob(f"{name}_cpu_*.json"))]


def ablation(study: str) -> None:
    """rsum of every setting, mean and standard deviation, the baseline as a line."""
    rows: dict[str, Any] = {}
    for run in runs_of(f"ablation-{study}"):
        rows |= run["rows"]
    if not rows:
        return
    found = []
    for name, row in rows.items():
        values = [run["rsum"] for run in row["runs"]]
        found.append((statistics.mean(values), statistics.stdev(values), name))
    baseline = found[0][0]
    found.sort()
    means, deviations, names = zip(*found, strict=True)
    figure, axes = pyplot.subplots(figsize=(8, 0.8 + 0.26 * len(names)), layout="constrained")
    axes.errorbar(means, names, xerr=deviations, fmt="o", color=BLUE, ecolor=GREY, capsize=2, markersize=4)
    axes.axvline(baseline, color=GREY, linewidth=0.8, linestyle="--")
    axes.set(xlabel="rsum on held-out pictures, mean ± sd (dashed: baseline)", ylim=(-1, len(names)))
    axes.grid(axis="x", alpha=0.3)
    axes.tick_params(axis="y", labelsize="small")
    save(figure, f"ablation-{study}")


def gradient_cache() -> None:
    """Peak memory over the size of the batch."""
    if not (runs := runs_of("gradient_cache")):
        return
    rows = runs[-1]["rows"]
    batches = [row["batch"] for row in rows]
    peaks = [row["peak_bytes"] / 2**30 for row in rows]
    figure, axes = pyplot.subplots(figsize=(6, 3.4), layout="constrained")
    axes.plot(batches, peaks, "o-", color=BLUE)
    axes.set(xscale="log", ylim=(0, None), xlabel="batch, in micro-batches of 128", ylabel="peak memory, GiB")
    axes.set_xticks(batches, [f"{batch:,}" for batch in batches], rotation=30)
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    save(figure, "gradient-cache")


def save(figure: Any, name: str) -> None:
    """Write a figure as PNG."""
    IMAGES.mkdir(parents=True, exist_ok=True)
    figure.savefig(IMAGES / f"{name}.png", dpi=110, metadata={"Software": None})
    pyplot.close(figure)
    print(IMAGES / f"{name}.png")


def main() -> None:
    for study in ("heads", "text"):
        ablation(study)
    gradient_cache()


if __name__ == "__main__":
    main()
