"""Renders tables in the terminal, as Markdown, CSV and JSON, and those of evaluations and classifications."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from clip_lightning.evaluation.zero_shot import Classification
from clip_lightning.files import write_atomically, write_json
from clip_lightning.reports.plots import plot_calibration, plot_confusion
from clip_lightning.terminal import json_line, one_line, printable

Row = dict[str, Any]
"""Results of a model on a data set: `model`, `data`, and values with bounds `NAME_low` and `NAME_high`."""


class Column(NamedTuple):
    """A column of a table."""

    name: str
    title: str
    texts: Sequence[str]
    is_text: bool = False  # aligned to the left


def column(name: str, values: Sequence[Any], *, is_text: bool = False) -> Column:
    """Return a column of options or other values as they are."""
    return Column(name, name, [option_text(value) for value in values], is_text)


def option_text(value: Any) -> str:
    """Return the value of an option as text, with four digits of a number."""
    if value is None or isinstance(value, str):
        return value or "–"
    return f"{value:.4g}" if isinstance(value, float) else json.dumps(value, default=str)


def short_names(names: Iterable[str], shorten: Callable[[str], str]) -> dict[str, str]:
    """Map each name to its short name, or to itself if the short name is not unique."""
    short = {name: shorten(name) for name in names}
    return {name: s if [*short.values()].count(s) == 1 else name for name, s in short.items()}


def markdown_table(columns: Sequence[Column]) -> str:
    """Render a table as Markdown."""
    lines = [[escaped(column.title) for column in columns]]
    lines.append([":--" if column.is_text else "--:" for column in columns])
    lines += [[*map(escaped, line)] for line in zip(*(column.texts for column in columns), strict=True)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def escaped(text: str) -> str:
    """Return a text as one line of Markdown without markup."""
    line = " ".join(text.split()).replace("&", "&amp;").replace("<", "&lt;")
    return re.sub(r"([\\|*`\[\]])", r"\\\1", line)


def csv_text(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Render a CSV with a header."""
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerows([header, *rows])
    return buffer.getvalue()


def csv_of_records(records: Sequence[Row]) -> str:
    """Render a CSV with a line per record, whose missing values are empty."""
    names = list(dict.fromkeys(name for record in records for name in record))
    return csv_text(names, ([record.get(name, "") for name in names] for record in records))


def print_table(columns: Sequence[Column], always: int, title: str = "") -> list[str]:
    """Print the first `always` columns and as many others as fit; return the names of the rest."""
    fits = sys.stdout.isatty() or "COLUMNS" in os.environ  # a table in a file or a pipe is complete
    console = Console(markup=False, highlight=False, width=None if fits else 1000)
    shown, hidden = list(columns[:always]), list[Column]()
    for column in columns[always:]:
        table = _table([*shown, column], title)
        width = console.measure(table, options=console.options.update(width=10_000)).maximum
        (shown if width <= console.width else hidden).append(column)
    console.print(_table(shown, title))
    return [column.name for column in hidden]


def _table(columns: Sequence[Column], title: str) -> Table:
    table = Table(title=printable(title) or None, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    short = short_names((c.name for c in columns if "." in c.name), lambda name: name.rpartition(".")[2])
    for column in columns:
        table.add_column(
            printable(short.get(column.name, column.title)),
            justify="left" if column.is_text else "right",
            overflow="fold",
            no_wrap=not column.title,  # names of metrics
        )
    for line in zip(*(column.texts for column in columns), strict=True):
        table.add_row(*map(one_line, line))
    return table


def tables_of_results(rows: Sequence[Row]) -> dict[str, list[Column]]:
    """Return a table for each data set, with a line per value and a column per model."""
    tables = {}
    for data in dict.fromkeys(row["data"] for row in rows):
        group = [row for row in rows if row["data"] == data]
        names = dict.fromkeys(name for row in group for name in row if name not in ("model", "data"))
        shown = [name for name in names if not name.endswith(("_low", "_high", "_p"))]
        titles = [name.replace("_", " ") for name in shown]
        models = (Column("", row["model"], [_cell(row, name) for name in shown]) for row in group)
        tables[data] = [Column("", "", titles, is_text=True), *models]
    return tables


def _cell(row: Row, name: str) -> str:
    value = row.get(name)
    if value is None:
        return ""
    if not isinstance(value, float):
        return f"{value:,}" if isinstance(value, int) else str(value)
    text = f"{value:.1f}"
    if f"{name}_low" in row:
        text += f" ({row[f'{name}_low']:.1f} to {row[f'{name}_high']:.1f})"
    p = row.get(f"{name}_p")
    return text if p is None else f"{text}, p < 0.001" if p < 0.001 else f"{text}, p = {p:.3f}"


def markdown(rows: Sequence[Row]) -> str:
    """Render a heading and a table per data set."""
    tables = tables_of_results(rows).items()
    return "\n\n".join(f"## {data}\n\n{markdown_table(columns)}" for data, columns in tables) + "\n"


def write_tables(folder: Path, name: str, markdown: str, csv: str, record: Any) -> None:
    """Write NAME.md, NAME.csv and NAME.json into the folder."""
    for kind, text in (("md", markdown), ("csv", csv)):
        write_atomically(folder / f"{name}.{kind}", text.encode(errors="replace"))
    write_json(folder / f"{name}.json", record, default=str)


def write_results(rows: Sequence[Row], folder: Path) -> None:
    """Write `results.md`, `results.csv` and `results.json` into the folder."""
    write_tables(folder, "results", markdown(rows), csv_of_records(rows), list(rows))


def print_results(rows: Sequence[Row], *, as_json: bool) -> None:
    """Print a JSON object (or a list of several rows), or one table per data set."""
    if as_json:
        print(json_line(rows[0] if len(rows) == 1 else list(rows)))
        return
    for data, columns in tables_of_results(rows).items():
        print_table(columns, len(columns), data)


@dataclass(frozen=True)
class ClassReport:
    """A classification with the names of its classes, and a title for plots and the summary."""

    title: str
    names: Sequence[str]
    result: Classification

    def classes(self) -> list[tuple[str, int, int, float | None]]:
        """Return (name, images, right, percentage or None without images) of each class, in order."""
        confusion = self.result.confusion
        counts = zip(self.names, confusion.sum(1).tolist(), confusion.diag().tolist(), strict=True)
        return [(name, asked, right, 100 * right / asked if asked else None) for name, asked, right in counts]

    def confused(self, most: int | None = None) -> list[tuple[str, str, int]]:
        """Return (true class, predicted class, images) of the most frequent mistakes, in that order."""
        wrong = self.result.confusion.clone().fill_diagonal_(0)
        found = [(self.names[i], self.names[j], int(wrong[i, j])) for i, j in wrong.nonzero().tolist()]
        return sorted(found, key=lambda mistake: -mistake[2])[:most]

    def summary(self) -> str:
        """Summarize the worst classes and mistakes in a few lines."""
        ranked = sorted((percent, name) for name, _, _, percent in self.classes() if percent is not None)
        worst = ", ".join(f"{name} {percent:.0f} %" for percent, name in ranked[:5])
        pairs = ", ".join(f"{true} as {taken} ({count})" for true, taken, count in self.confused(5))
        return f"{self.title}\n  worst classes: {worst}\n  most frequent confusions: {pairs or 'none'}"

    def plots(self) -> dict[str, bytes]:
        """Draw `confusion` and `reliability` as PNG."""
        return {
            "confusion": plot_confusion(self.result.confusion, self.names, self.title),
            "reliability": plot_calibration(self.result.calibration, self.title),
        }

    def write(self, folder: Path) -> None:
        """Write `classes.csv`, `confused.csv`, `calibration.csv` and the plots into the folder."""
        bins = self.result.calibration
        columns = bins.images, 100 * bins.confidence, 100 * bins.accuracy
        rows = zip(*(column.tolist() for column in columns), strict=True)
        classes = [(*row, "" if percent is None else f"{percent:.2f}") for *row, percent in self.classes()]
        calibration = [(images, f"{mean:.2f}", f"{right:.2f}") for images, mean, right in rows]
        for name, header, table in (
            ("classes", "class images right accuracy", classes),
            ("confused", "class taken_for images", self.confused()),
            ("calibration", "images mean_probability accuracy", calibration),
        ):
            write_atomically(folder / f"{name}.csv", csv_text(header.split(), table).encode())
        for name, png in self.plots().items():
            write_atomically(folder / f"{name}.png", png)
