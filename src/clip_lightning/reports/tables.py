"""Renders the results of models on data sets as tables in the terminal, Markdown, CSV and JSON."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from clip_lightning.files import write_atomically
from clip_lightning.terminal import console, json_line

Row = dict[str, Any]
"""Results of a model on a data set: `model`, `data`, and values with bounds `NAME_low` and `NAME_high`."""
_ENDINGS = ("_low", "_high", "_p")


def lines(rows: Sequence[Row]) -> list[list[str]]:
    """Return a header and one line per value, with one column per row; all rows are of one data set."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    shown = [name for name in names if name not in ("model", "data") and not name.endswith(_ENDINGS)]
    header = ["", *(str(row["model"]) for row in rows)]
    return [header, *([name.replace("_", " "), *(_cell(row, name) for row in rows)] for name in shown)]


def _cell(row: Row, name: str) -> str:
    value = row.get(name)
    if value is None:
        return ""
    if not isinstance(value, float):
        return f"{value:,}" if isinstance(value, int) else str(value)
    text = f"{value:.1f}"
    if f"{name}_low" in row:
        text += f" ({row[f'{name}_low']:.1f} to {row[f'{name}_high']:.1f})"
    return text + (f", p {row[f'{name}_p']:.3f}" if f"{name}_p" in row else "")


def by_data(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Group the rows by data set."""
    places = [row["data"] for row in rows]
    return {place: [row for row in rows if row["data"] == place] for place in dict.fromkeys(places)}


def markdown(rows: Sequence[Row]) -> str:
    """Render a heading and a table per data set."""
    parts = []
    for data, group in by_data(rows).items():
        header, *body = [[cell.replace("|", "\\|") for cell in line] for line in lines(group)]
        table = [header, ["---", *["--:"] * len(group)], *body]
        parts.append(f"## {data}\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in table))
    return "\n\n".join(parts) + "\n"


def csv_text(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Render a CSV with a header."""
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerows([header, *rows])
    return buffer.getvalue()


def write_results(rows: Sequence[Row], folder: Path) -> None:
    """Write `results.md`, `results.csv` and `results.json` into the folder."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    texts = {
        "results.md": markdown(rows),
        "results.csv": csv_text(names, [[row.get(name, "") for name in names] for row in rows]),
        "results.json": json.dumps(list(rows), indent=2, ensure_ascii=False) + "\n",
    }
    for name, text in texts.items():
        write_atomically(folder / name, text.encode())


def print_results(rows: Sequence[Row], *, as_json: bool) -> None:
    """Print a JSON object (or a list of several rows), or one table per data set."""
    if as_json:
        print(json_line(rows[0] if len(rows) == 1 else list(rows)))
        return
    from rich.box import SIMPLE_HEAD
    from rich.table import Column, Table

    out = console()
    for data, group in by_data(rows).items():
        (_, *models), *body = lines(group)
        columns = [Column("", no_wrap=True), *(Column(model, overflow="fold") for model in models)]
        style: Any = {"title_justify": "left", "box": SIMPLE_HEAD, "padding": (0, 1, 0, 0)}
        table = Table(*columns, title=data, **style)
        for line in body:
            table.add_row(*line)
        out.print(table)
