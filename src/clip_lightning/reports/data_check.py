"""Renders the results of `data check` as text and as a self-contained HTML page."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path

from clip_lightning.data.check import Entry, Report
from clip_lightning.files import write_atomically
from clip_lightning.reports.pages import embedded, template
from clip_lightning.reports.plots import Plot, plot_counts
from clip_lightning.terminal import printable

MOST_SHOWN = 40


def as_text(found: Report) -> str:
    """Render the results for a terminal."""
    splits = ", ".join(f"{name} {split['images']:,}" for name, split in found["splits"].items())
    how = "official splits" if found["official_splits"] else "random splits, as in fit by default"
    per_image, words = _range(found["captions_per_image"]), _range(found["words_per_caption"])
    lines = [
        found["root"],
        f"  read      {found['source']}, {len(found['left_out']):,} rows or images left out",
        f"  images    {found['images']:,}: {splits} ({how})",
        f"  captions  {found['captions']:,}: {per_image} per image, {words} words each",
        f"  pixels    {_range(found['short_side'])} on the short side",
    ]
    if (cut := found["captions_cut"]) and not cut["count"]:
        lines.append(f"  tokens    no caption has more than {cut['max_length']}")
    lines += [f"{kind}: {line}" for kind in ("error", "warning") for line in found[f"{kind}s"]]
    return printable("\n".join(lines if found["errors"] else [*lines, "no errors"]))


def _range(spread: dict[str, float] | None) -> str:
    if spread is None:
        return "none"
    low, middle, high = (f"{spread[name]:g}" for name in ("lowest", "median", "highest"))
    return low if low == high else f"{low} to {high} (median {middle})"


def write_report(found: Report, entries: Sequence[Entry], folder: Path) -> None:
    """Write `check.json` and `check.html` into the folder."""
    readable = [entry for entry in entries if entry.broken is None]
    sides = [entry.short_side for entry in readable]
    words = [len(caption.split()) for entry in entries for caption in entry.image.captions]
    counted = (sides, "Short side in pixels", "images"), (words, "Words per caption", "captions")
    leaks = found["leaks"] + found["alike_leaks"]
    sample = random.Random(0).sample(readable, min(MOST_SHOWN, len(readable)))
    html = template("check.html.j2").render(
        root=found["root"],
        text=as_text(found).splitlines(),
        plots=[Plot(plot_counts(*arguments), arguments[1]) for arguments in counted if arguments[0]],
        galleries={
            "Identical files in different splits": found["leaks"],
            "Near duplicates in different splits": found["alike_leaks"],
            "Near duplicates in one split": [group for group in found["alike"] if group not in leaks],
            "Random sample": [[entry.name] for entry in sample],
        },
        tables={
            "Images that cannot be used": found["broken"] | found["left_out"],
            "Captions shared by several images": found["most_shared"],
        },
        entries={entry.name: entry for entry in entries},
        embedded=embedded,
        most=MOST_SHOWN,
    )
    write_atomically(folder / "check.json", json.dumps(found, indent=2).encode() + b"\n")
    write_atomically(folder / "check.html", html.encode(errors="replace"))
