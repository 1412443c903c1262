"""Comparisons for a terminal, as much as its width has room for."""

from __future__ import annotations

from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from clip_lightning.experiments.compare import Comparison, Row, data_name
from clip_lightning.experiments.tables import (
    names_runs,
    option_text,
    repeats_towers,
    run_names,
    shown,
)

VALUES = {
    "rsum": "rsum",
    "text_to_image_R@1": "t→i\nR@1",
    "image_to_text_R@1": "i→t\nR@1",
    "image_latency_ms": "latency\nms",
}
MOST_OPTIONS = 3
LONGEST_RUN = 24  # characters of a run's name that are kept in one line


def print_tables(comparison: Comparison, console: Console) -> None:
    """A table of each data set; what is the same in all rows, and what has no room, is left to the page."""
    for rows in comparison.data_sets:
        values = [name for name in VALUES if name in comparison.columns() and _tells(name, rows)]
        while len(values) > 1 and not _fits(_table(comparison, rows, [], values), console):
            values.pop()
        options: list[str] = []
        differing = [name for name in comparison.options if len({str(r.options[name]) for r in rows}) > 1]
        for name in differing:
            more = [*options, name]
            if len(more) <= MOST_OPTIONS and _fits(_table(comparison, rows, more, values), console):
                options = more
        console.print(_table(comparison, rows, options, values))
        if hidden := [name for name in differing if name not in options]:
            console.print(f"more in index.html: {', '.join(hidden)}\n")


def _tells(name: str, rows: Sequence[Row]) -> bool:
    """Whether a value is worth a column."""
    return name == "rsum" or len(rows) == 1 or len({shown(row, name) for row in rows}) > 1


def _fits(table: Table, console: Console) -> bool:
    """Whether no word has to be cut."""
    return console.measure(table, options=console.options.update(width=10_000)).minimum <= console.width


def _table(
    comparison: Comparison, rows: Sequence[Row], options: Sequence[str], values: Sequence[str]
) -> Table:
    """Rank, towers (in the title where all rows have the same), run, options, values and state."""
    repeated = repeats_towers(rows)
    one_pair = repeated and len({row.towers for row in rows}) == 1
    titles = [data_name(rows[0].digest)] if len(comparison.data_sets) > 1 else []
    titles += [rows[0].name] if one_pair else []
    table = Table(
        title="\n".join(titles) or None, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0)
    )
    table.add_column("rank", justify="right", min_width=4)
    if not one_pair:
        table.add_column("towers", overflow="fold", min_width=12)
    names = run_names(rows)
    named = names_runs(rows)
    if named:
        table.add_column("run", overflow="fold", no_wrap=max(map(len, names)) <= LONGEST_RUN, min_width=8)
    for title in [*_short(options), *(VALUES[name] for name in values)]:
        table.add_column(title, justify="right", no_wrap=True, min_width=5 if title == "rsum" else None)
    unfinished = any(row.unfinished for row in rows)
    if unfinished:
        table.add_column("state", no_wrap=True)
    for row, run in zip(rows, names, strict=True):
        line = [str(row.rank), *([] if one_pair else [row.name]), *([run] if named else [])]
        line += [option_text(row.options[name]) for name in options]
        line += [shown(row, name) for name in values]
        table.add_row(*line, *([row.unfinished] if unfinished else []))
    return table


def _short(options: Sequence[str]) -> list[str]:
    """The last part of each name, where that is no other's."""
    ends = [name.rpartition(".")[2] for name in options]
    return [name if ends.count(end) > 1 else end for name, end in zip(options, ends, strict=True)]
