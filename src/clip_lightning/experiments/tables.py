"""The rows of a comparison as text: columns and cells, Markdown, CSV."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Sequence
from pathlib import PurePath
from typing import Any

from clip_lightning.experiments.compare import Comparison, Row, data_name, plain_row
from clip_lightning.experiments.run_records import RECALLS

TITLES = {
    **{name: name.replace("_to_", "→").replace("_", " ") for name in RECALLS},
    "rsum": "rsum",
    "parameters": "parameters",
    "parameters_trained": "trained",
    "image_latency_ms": "image latency, ms",
    "training_seconds": "training, s",
    "feature_bytes_per_picture": "features of a picture",
    "feature_bytes": "features in all",
}


def shown(row: Row, name: str) -> str:
    """A value of `METRICS` or `COSTS` for people, with ± its standard deviation; – where it is not known."""
    if name not in row.means:
        return "–"
    mean, deviation = row.means[name], row.deviations.get(name)
    if name.startswith("parameters"):
        return _scaled(mean, "")
    if name.startswith("feature"):
        return _scaled(mean, "B")
    digits = 0 if name == "training_seconds" and mean >= 10 else 1
    spread = f" ± {deviation:.{digits}f}" if deviation is not None else ""
    return f"{mean:.{digits}f}{spread}"


def _scaled(value: float, unit: str) -> str:
    for power, letter in ((9, "G"), (6, "M"), (3, "k")):
        if value >= 0.9995 * 10**power:
            return f"{value / 10**power:.3g} {letter}{unit}"
    return f"{value:.0f} {unit}".rstrip()


def option_text(value: Any) -> str:
    """An option's value for people: of a number four digits."""
    return f"{value:.4g}" if isinstance(value, float) else _exact(value)


def _exact(value: Any) -> str:
    if value is None:
        return "–"
    return value if isinstance(value, str) else json.dumps(value, default=str)


def run_names(rows: Sequence[Row]) -> list[str]:
    """Name the run of each row by the end of its folder that no other row has, or count its seeds."""
    parts = [PurePath(row.records[0].place).parts for row in rows if len(row.records) == 1]
    longest = max(map(len, parts), default=1)
    depth = next((d for d in range(1, longest) if len({p[-d:] for p in parts}) == len(parts)), longest)
    names = iter("/".join(p[-depth:]) for p in parts)
    return [next(names) if len(row.records) == 1 else _seeds(row) for row in rows]


def _seeds(row: Row) -> str:
    counted = f"{row.seeds} seed{'s' if row.seeds > 1 else ''}"
    return f"{counted}, repeated" if len(row.records) > row.seeds else counted


def names_runs(rows: Sequence[Row]) -> bool:
    """Whether the rows need a column for their runs: towers do not tell them apart, or one has several."""
    return repeats_towers(rows) or any(len(row.records) > 1 for row in rows)


def repeats_towers(rows: Sequence[Row]) -> bool:
    """Whether towers do not tell the rows apart."""
    return len({row.towers for row in rows}) < len(rows)


def header(comparison: Comparison) -> list[str]:
    """Titles of the columns that `cells` fills."""
    values = [TITLES[name] for name in comparison.columns()]
    return ["rank", "towers", *comparison.options, *values, *_last_columns(comparison)]


def _last_columns(comparison: Comparison) -> list[str]:
    sets = comparison.data_sets
    named = any(map(names_runs, sets))
    unfinished = any(row.unfinished for row in comparison.rows)
    return [*(["run"] if named else []), *(["state"] if unfinished else [])]


def cells(comparison: Comparison, rows: Sequence[Row]) -> list[list[tuple[str, float | str]]]:
    """Of each row of a data set, for each column of `header` its text and what it is sorted by."""
    last = _last_columns(comparison)
    found = []
    for row, run in zip(rows, run_names(rows), strict=True):
        line: list[tuple[str, float | str]] = [(str(row.rank), float(row.rank)), (row.name, row.name)]
        for name in comparison.options:
            line.append((option_text(row.options[name]), _sortable(row.options[name])))
        line += [(shown(row, name), row.means.get(name, "")) for name in comparison.columns()]
        texts = {"run": run, "state": row.unfinished or "–"}
        found.append([*line, *((texts[name], texts[name]) for name in last)])
    return found


def _sortable(value: Any) -> float | str:
    return float(value) if isinstance(value, int | float) else option_text(value)


def markdown(comparison: Comparison) -> str:
    """The table of each data set, what failed and what was left out."""
    parts = [f"# {_escaped(comparison.title)}"]
    parts += [f"> **Warning:** {_escaped(warning)}" for warning in comparison.warnings]
    titles = header(comparison)
    for rows in comparison.data_sets:
        if len(comparison.data_sets) > 1:
            parts.append(f"## {data_name(rows[0].digest).capitalize()}")
        lines = [titles, [":--" if title == "towers" else "--:" for title in titles]]
        lines += [[_escaped(text) for text, _ in line] for line in cells(comparison, rows)]
        parts.append("\n".join(f"| {' | '.join(line)} |" for line in lines))
    parts.append(_escaped(notes(comparison)))
    for title, those in (("Failed", comparison.failed), ("Left out", comparison.left_out)):
        if those:
            listed = [f"- {_escaped(each.place)}: {_escaped(each.reason)}" for each in those]
            parts.append(f"## {title}\n\n" + "\n".join(listed))
    return "\n\n".join(part for part in parts if part) + "\n"


def notes(comparison: Comparison) -> str:
    """How to read the columns."""
    if not comparison.rows:
        return ""
    found = ["Recalls in percent, of the epoch with the best rsum, which is the sum of the six."]
    if any(row.seeds > 1 for row in comparison.rows):
        found.append("Several seeds: mean ± standard deviation.")
    if any(len(row.records) > row.seeds for row in comparison.rows):
        found.append("Repeated: runs with the same settings and seed count once, with their mean.")
    if conditions := comparison.latency_conditions:
        found.append(f"Image latency: {'; '.join(conditions)}, from pixels to embedding, median.")
    if "training_seconds" in comparison.columns():
        found.append("Training: without loading the towers and caching features.")
    if "feature_bytes_per_picture" in comparison.columns():
        found.append("Features of a picture: one view. In all: every view and caption of the splits used.")
    return " ".join(found)


def _escaped(text: str) -> str:
    line = " ".join(text.split()).replace("&", "&amp;").replace("<", "&lt;")
    return re.sub(r"([\\|*`\[\]])", r"\\\1", line)


def csv_table(comparison: Comparison) -> str:
    """One line a row, values unrounded, under the names that `metrics.json` has."""
    stream = io.StringIO()
    rows = [plain_row(row) for row in comparison.rows]
    lines = [{k: v for k, v in row.items() if k not in ("std", "options", "places")} for row in rows]
    for line, row in zip(lines, rows, strict=True):
        line |= {f"{name}_std": value for name, value in row["std"].items()}
        line |= {name: _exact(value) for name, value in row["options"].items()}
        line["places"] = " ".join(row["places"])
    names = list(dict.fromkeys(name for line in lines for name in line))
    writer = csv.DictWriter(stream, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return stream.getvalue()
