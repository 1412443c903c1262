"""Findings as text, as a page that stands alone, and as a sheet of pictures to look over."""

from __future__ import annotations

import base64
import json
import math
import random
from collections.abc import Sequence
from functools import lru_cache
from io import BytesIO
from pathlib import Path

from PIL import Image, ImageDraw

from clip_lightning.data.checking.findings import Entry, Findings, shortened
from clip_lightning.files import write_atomically
from clip_lightning.reports.grids import MUTED, font, rounded, thumbnail
from clip_lightning.reports.pages import template
from clip_lightning.reports.plots import Plot, plot_counts
from clip_lightning.terminal import printable

SHEET, COLUMNS, TILE, GAP, LABEL, MARGIN = 48, 8, 150, 12, 36, 16
MOST_GROUPS, MOST_ROWS, MOST_SHARED = 24, 200, 20


def as_text(findings: Findings) -> str:
    """The findings for a terminal."""
    about = findings.as_dict()
    splits = ", ".join(f"{name} {n:,}" for name, (n, _) in findings.splits.items())
    how = "official splits" if findings.official else "drawn as fit does by default"
    lines = [
        f"{findings.root}",
        f"  read      {findings.source}, {len(findings.left_out):,} rows or images left out",
        f"  pictures  {about['pictures']:,}: {splits} ({how})",
        f"  captions  {about['captions']:,}: {_range(about['captions_per_picture'])} a picture, "
        f"{_range(about['words_per_caption'])} words each",
        f"  pixels    {_range(about['short_side'])} on the short side",
    ]
    if findings.cut is not None and not findings.cut.count:
        lines.append(f"  tokens    no caption has more than {findings.cut.max_length}")
    lines += [f"error: {line}" for line in findings.errors()]
    lines += [f"warning: {line}" for line in findings.warnings()]
    return printable("\n".join(lines if findings.errors() else [*lines, "no errors"]))


def _range(spread: dict[str, float] | None) -> str:
    if spread is None:
        return "none"
    low, middle, high = (f"{spread[name]:g}" for name in ("lowest", "median", "highest"))
    return low if low == high else f"{low} to {high} (median {middle})"


def write_report(findings: Findings, folder: Path) -> None:
    """Write `check.json`, `check.html` and `contact-sheet.png` into the folder."""
    write_atomically(folder / "check.json", json.dumps(findings.as_dict(), indent=2).encode() + b"\n")
    sheet = contact_sheet(findings.entries)
    write_atomically(folder / "contact-sheet.png", sheet)
    write_atomically(folder / "check.html", _page(findings, sheet).encode(errors="replace"))


def _page(findings: Findings, sheet: bytes) -> str:
    sides = [entry.picture.short_side for entry in findings.entries if entry.readable]
    words = [len(caption.split()) for entry in findings.entries for caption in entry.captions]
    drawn = (("Short side in pixels", sides, "pictures"), ("Words of a caption", words, "captions"))
    told = {tuple(group) for group in [*findings.leaks, *findings.alike_leaks]}
    kinds = {
        "The same bytes in more than one split": findings.leaks,
        "Alike, in more than one split": findings.alike_leaks,
        "Alike, within a split": [group for group in findings.alike if tuple(group) not in told],
    }
    groups = [
        (title, len(found), [[findings.entries[row] for row in group] for group in found[:MOST_GROUPS]])
        for title, found in kinds.items()
        if found
    ]
    bad = list((findings.broken | findings.left_out).items())
    return template("check.html.j2", Path(__file__).parent).render(
        root=findings.root.name,
        summary=as_text(findings).splitlines(),
        errors=findings.errors(),
        warnings=findings.warnings(),
        plots=[Plot(plot_counts(values, title, of), title) for title, values, of in drawn if values],
        sheet=Plot(sheet, "Pictures drawn at random"),
        groups=groups,
        bad=bad[:MOST_ROWS],
        bad_count=len(bad),
        shared=findings.shared.most_common(MOST_SHARED),
        shortened=shortened,
        embedded=_embedded,
    )


def contact_sheet(entries: Sequence[Entry], count: int = SHEET, seed: int = 0) -> bytes:
    """A PNG of pictures drawn at random, each with the first words of a caption."""
    readable = [entry for entry in entries if entry.readable]
    chosen = random.Random(seed).sample(readable, min(count, len(readable)))
    rows = max(1, math.ceil(len(chosen) / COLUMNS))
    size = 2 * MARGIN + COLUMNS * (TILE + GAP) - GAP, 2 * MARGIN + rows * (TILE + LABEL) - GAP
    canvas = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(canvas)
    for number, entry in enumerate(chosen):
        row, column = divmod(number, COLUMNS)
        at = MARGIN + column * (TILE + GAP), MARGIN + row * (TILE + LABEL)
        canvas.paste(_tile(entry.path), at, rounded(TILE, 8))
        caption = shortened(" ".join(printable(entry.captions[0] if entry.captions else "").split()), 24)
        draw.text((at[0] + 2, at[1] + TILE + 6), caption, MUTED, font(12))
    buffer = BytesIO()
    canvas.save(buffer, "PNG")
    return buffer.getvalue()


def _tile(path: Path) -> Image.Image:
    return thumbnail(path).resize((TILE, TILE), Image.Resampling.LANCZOS)


@lru_cache(1024)
def _embedded(path: Path) -> str:
    buffer = BytesIO()
    _tile(path).save(buffer, "JPEG", quality=80)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
