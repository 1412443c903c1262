"""Writes comparisons as a page, Markdown, CSV and JSON, and prints them as tables."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Sequence
from pathlib import Path, PurePath
from typing import Any, NamedTuple

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from clip_lightning.experiments.charts import heatmap, recall_latency
from clip_lightning.experiments.compare import Comparison, Row, short_names
from clip_lightning.experiments.run_records import VALUES
from clip_lightning.files import write_atomically
from clip_lightning.reports.pages import template
from clip_lightning.reports.tables import csv_text
from clip_lightning.terminal import one_line

ALWAYS = ("rank", "towers", "run", "rsum", "state")  # columns that are always printed
IF_THEY_FIT = {
    "text_to_image_R@1": "t→i\nR@1",
    "image_to_text_R@1": "i→t\nR@1",
    "image_latency_ms": "latency\nms",
}
LEFT = ("towers", "run", "state")


class Column(NamedTuple):
    """Represents a column of a table: the texts are shown, and the values are sorted by."""

    name: str
    title: str
    values: Sequence[Any]
    texts: Sequence[str]


def column(name: str, values: Sequence[Any]) -> Column:
    """Return a column of options or other values as they are."""
    return Column(name, name, values, [option_text(value) for value in values])


def columns_of(rows: Sequence[Row]) -> list[Column]:
    """Return the columns of a data set: rank, towers, run, options, values and state, without empty ones."""
    columns = [column("rank", [row.rank for row in rows]), column("towers", [row.name for row in rows])]
    several = any(len(row.records) > 1 for row in rows)
    if several or len({row.first.towers for row in rows}) < len(rows):
        singles = (row.first.place for row in rows if len(row.records) == 1)
        names = short_names(singles, lambda place: PurePath(place).name)
        columns.append(column("run", [names.get(row.first.place) or _count_seeds(row) for row in rows]))
    columns += [column(name, [row.options[name] for row in rows]) for name in rows[0].options]
    for name, title in VALUES.items():
        if any(name in row.means for row in rows):
            values, texts = [row.means.get(name) for row in rows], [row.shown(name) for row in rows]
            columns.append(Column(name, title, values, texts))
    if any(row.first.unfinished for row in rows):
        columns.append(column("state", [row.first.unfinished for row in rows]))
    return columns


def _count_seeds(row: Row) -> str:
    counted = f"{row.seeds} seed{'s' if row.seeds > 1 else ''}"
    return f"{counted}, repeated" if len(row.records) > row.seeds else counted


def option_text(value: Any) -> str:
    """Return the value of an option as text, with four digits of a number."""
    if value is None or isinstance(value, str):
        return value or "–"
    return f"{value:.4g}" if isinstance(value, float) else json.dumps(value, default=str)


def notes(comparison: Comparison) -> str:
    """Return an explanation of the columns."""
    conditions = "; ".join(comparison.latency_conditions)
    explanations = {
        "rsum": "Recalls are in percent, of the epoch with the best rsum, which is their sum.",
        "image_latency_ms": f"The image latency ({conditions}) is the median time from pixels to embedding.",
        "training_seconds": "The training time excludes loading the towers and caching features.",
        "feature_bytes": "Features of an image are those of one view, and features in all those of every "
        "view and caption of the splits used.",
        "seeds": "Values over several seeds are mean ± standard deviation; repetitions are averaged first.",
    }
    shown = {name for row in comparison.rows for name in row.means}
    shown |= {"seeds" for row in comparison.rows if row.seeds > 1}
    return " ".join(text for name, text in explanations.items() if name in shown)


def markdown(comparison: Comparison) -> str:
    """Return the table of each data set, and the pairs and runs without results, as Markdown."""
    parts = [f"# {_escaped(comparison.title)}"]
    parts += [f"> **Warning:** {_escaped(warning)}" for warning in comparison.warnings]
    for rows in comparison.data_sets:
        heading = f"## {rows[0].data.capitalize()}\n\n" if len(comparison.data_sets) > 1 else ""
        parts.append(heading + markdown_table(columns_of(rows)))
    parts.append(_escaped(notes(comparison)))
    for title, reasons in (("Failed", comparison.failed), ("Left out", comparison.left_out)):
        listed = [f"- {_escaped(name)}: {_escaped(reason)}" for name, reason in reasons.items()]
        parts.append(f"## {title}\n\n" + "\n".join(listed) if listed else "")
    return "\n\n".join(filter(None, parts)) + "\n"


def markdown_table(columns: Sequence[Column]) -> str:
    """Return a table as Markdown."""
    lines = [[column.title for column in columns]]
    lines.append([":--" if column.name in LEFT else "--:" for column in columns])
    lines += [[*map(_escaped, line)] for line in zip(*(column.texts for column in columns), strict=True)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _escaped(text: str) -> str:
    line = " ".join(text.split()).replace("&", "&amp;").replace("<", "&lt;")
    return re.sub(r"([\\|*`\[\]])", r"\\\1", line)


def csv_table(comparison: Comparison) -> str:
    """Return a CSV with one line per row, with the same names as in `metrics.json`."""
    lines = []
    for row in map(Row.as_dict, comparison.rows):
        deviations, options, places = (row.pop(name) for name in ("std", "options", "places"))
        row |= {f"{name}_std": value for name, value in deviations.items()}
        row |= {name: v if isinstance(v, float) else option_text(v) for name, v in options.items()}
        lines.append(row | {"places": " ".join(places)})
    names = [*dict.fromkeys(name for line in lines for name in line)]
    return csv_text(names, [[line.get(name, "") for name in names] for line in lines])


def write_comparison(comparison: Comparison, folder: Path) -> None:
    """Write comparison.md, comparison.csv, comparison.json, and index.html with plots."""
    page = template("comparison.html.j2", Path(__file__).parent).render(
        comparison=comparison,
        tables=[(rows[0].data, columns_of(rows)) for rows in comparison.data_sets],
        notes=notes(comparison),
        plots=[plot for plot in (heatmap(comparison), recall_latency(comparison)) if plot],
    )
    for name, text in {
        "comparison.md": markdown(comparison),
        "comparison.csv": csv_table(comparison),
        "comparison.json": json.dumps(comparison.as_dict(), indent=2, ensure_ascii=False, default=str) + "\n",
        "index.html": page,
    }.items():
        write_atomically(folder / name, text.encode(errors="replace"))


def print_tables(comparison: Comparison, console: Console) -> None:
    """Print a table of each data set, with as many columns that differ as fit into the terminal."""
    for rows in comparison.data_sets:
        columns = columns_of(rows)
        differing = [c for c in columns if len(rows) == 1 or len({*c.texts}) > 1]
        titles = [rows[0].data] if len(comparison.data_sets) > 1 else []
        titles += [] if columns[1] in differing else [rows[0].name]
        shown = [c for c in columns if c.name in ALWAYS and (c in differing or c.name != "towers")]
        shown += [c for c in differing if c.name in rows[0].options]
        shown += [c for c in differing if c.name in IF_THEY_FIT]
        hidden = print_columns(shown, ALWAYS, "\n".join(titles), console)
        if options := [name for name in hidden if name in rows[0].options]:
            console.print(f"more in index.html: {', '.join(options)}\n")


def print_columns(
    columns: Sequence[Column], always: Collection[str], title: str, console: Console
) -> list[str]:
    """Print the columns in `always` and as many others as fit; return the names of the rest."""
    shown = [c for c in columns if c.name in always]
    unlimited = console.options.update(width=10_000)
    for column in columns:
        wider = [c for c in columns if c in shown or c is column]
        if console.measure(_table(wider, title), options=unlimited).maximum <= console.width:
            shown = wider
    console.print(_table(shown, title))
    return [c.name for c in columns if c not in shown]


def _table(columns: Sequence[Column], title: str) -> Table:
    table = Table(title=title or None, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    short = short_names((c.name for c in columns if "." in c.name), lambda name: name.rpartition(".")[2])
    for column in columns:
        table.add_column(
            short.get(column.name) or IF_THEY_FIT.get(column.name, column.title),
            justify="left" if column.name in LEFT else "right",
            overflow="fold",
            no_wrap=column.name not in ("towers", "run"),
        )
    for line in zip(*(column.texts for column in columns), strict=True):
        table.add_row(*map(one_line, line))
    return table
