"""The table, the curves and the picture of `time_to_recall.py`."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import report

NAME = "time-to-recall"
COLD, WARM = "ours, cold", "ours, warm"


def add(new: dict[str, Any], order: list[str], note: str, out: Path) -> None:
    """Add to the rows of the last run on such a machine, sort by `order`, and write with a note below.

    All arms take hours: a run may be gone on with on another day. Each row says when it ran.
    """
    head = report.header("torch", "lightning", "open_clip_torch", "timm", "transformers")
    earlier = [json.loads(file.read_text()) for file in out.glob(f"{NAME}_cpu_*.json")]
    same = [run for run in earlier if all(run[key] == head[key] for key in ("machine", "versions"))]
    rows = max(same, key=lambda run: str(run["date"]), default={"rows": {}})["rows"] | new
    rows = {name: rows[name] for name in order if name in rows}
    lines = [
        "# Time to recall",
        "",
        report.provenance(head),
        "",
        "EfficientNet-Lite0 × MiniLM-L6 on Flickr8k; from the start of the process to the first weights that",
        "reach the target on dev (1,000 pictures × 5 captions). Evaluation is on our clock alone.",
        "× cold, × warm: how many times as long as ours.",
        "",
        "| | target R@1 | time | best R@1 | samples a second | × cold | × warm | ran |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, row in rows.items():
        ratios = [ratio(row, rows.get(other)) for other in (COLD, WARM)]
        best = "" if row["reached"] is None else f"{row['reached']:.1f}"
        cells = [f"{row['target']:g}", duration(row), best, f"{row['samples_per_second']:.0f}", *ratios]
        lines.append(f"| {name} | {' | '.join(cells)} | {row['ran']} |")
    lines += ["", "Curves: seconds, text→image R@1, image→text R@1."]
    for name, row in rows.items():
        points = "; ".join(f"{t:.0f}: {there:.1f} / {back:.1f}" for t, there, back in row["curve"])
        lines += ["", f"- {name}: {points}"]
    lines += ["", note]
    report.save(out, NAME, head, rows, lines)
    print("\n".join(lines[8 : 10 + len(rows)]), flush=True)
    if importlib.util.find_spec("matplotlib"):
        plot(rows, out.parent.parent / "docs/images" if out == report.RESULTS else out)


def duration(row: dict[str, Any]) -> str:
    """Seconds to the target, or what was reached instead."""
    if row["seconds"] is not None:
        return f"{row['seconds']:.0f} s"
    return f"> {row['cap'] / 60:g} min" if row["capped"] else f"not in {row['process_seconds'] / 60:.0f} min"


def ratio(row: dict[str, Any], ours: dict[str, Any] | None) -> str:
    """How many times as long as ours, at least."""
    if ours is None or ours["seconds"] is None or ours["target"] != row["target"]:
        return ""
    if row["seconds"] is None:
        return f"> {row['process_seconds'] / ours['seconds']:.1f}"
    return f"{row['seconds'] / ours['seconds']:.1f}"


def plot(rows: dict[str, Any], folder: Path) -> None:
    """Recall over minutes."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    for name, row in rows.items():
        if row["curve"]:
            axes.plot([t / 60 for t, *_ in row["curve"]], [r for _, r, _ in row["curve"]], ".-", label=name)
    axes.axhline(next(iter(rows.values()))["target"], color="grey", linewidth=0.8)
    axes.set(xscale="log", xlabel="minutes since the start of the process", ylabel="text→image R@1 on dev, %")
    axes.legend(fontsize="small")
    folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(folder / f"{NAME}.png", dpi=120)
