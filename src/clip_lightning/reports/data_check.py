"""Renders the results of `data check` as a self-contained HTML page."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path

from clip_lightning.data.check import Entry, Report, as_text
from clip_lightning.files import write_atomically
from clip_lightning.reports.pages import embedded, template
from clip_lightning.reports.plots import Plot, plot_counts

MOST_SHOWN = 40


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
