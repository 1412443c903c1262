"""Runs beside each other: a ranked table, as Markdown, CSV and JSON."""

from __future__ import annotations

import csv
import io
import json
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from clip_lightning.tracking.run_records import COSTS, METRICS, RECALLS, LeftOut, RunRecord

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
# What differs from run to run without making another experiment. The data's digest says whether data differ.
BOOKKEEPING = re.compile(
    r"seed_everything|config|ckpt_path|model\.(image|text)_tower|predictions\..*|trainer\.(logger|default_root_dir|"
    r"enable_|log_every|devices$|num_nodes$).*|data\.(root|artifact|hub|url|sha256|num_workers|cache|cache_gb|seed)"
)


@dataclass(frozen=True)
class Row:
    """A pair of towers with certain settings: one run, or several that differ in the seed only.

    Attributes:
        name: short names of the towers, `A × B`.
        records: the runs.
        means: of the values of `METRICS` and `COSTS` that are known.
        deviations: their standard deviations, where there are two runs or more.
        options: those in which the rows differ.
        data: index of the data set, 0 the one with the most rows.
        rank: by rsum among the rows of the same data; equal ones share it.
    """

    name: str
    records: tuple[RunRecord, ...]
    means: Mapping[str, float]
    deviations: Mapping[str, float]
    options: Mapping[str, Any]
    data: int = 0
    rank: int = 0

    @property
    def digest(self) -> str:
        """Of the data."""
        return self.records[0].data_digest


@dataclass(frozen=True)
class Comparison:
    """Everything that a page or a file shows.

    Attributes:
        title: a headline.
        rows: by data set and rank.
        options: dotted names of the options in which rows differ.
        failed: pairs that could not be trained.
        left_out: runs without results.
        warnings: what a reader must know before comparing two rows.
    """

    title: str
    rows: Sequence[Row]
    options: Sequence[str]
    failed: Sequence[LeftOut]
    left_out: Sequence[LeftOut]
    warnings: Sequence[str]

    @property
    def data_sets(self) -> list[list[Row]]:
        """The rows of each data set."""
        count = max((row.data for row in self.rows), default=-1) + 1
        return [[row for row in self.rows if row.data == index] for index in range(count)]

    @property
    def latency_conditions(self) -> list[str]:
        """With what the latencies were measured."""
        return sorted({r.latency_conditions for row in self.rows for r in row.records} - {""})

    def columns(self) -> list[str]:
        """The values that at least one row has."""
        return [name for name in (*METRICS, *COSTS) if any(name in row.means for row in self.rows)]

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "title": self.title,
            "warnings": list(self.warnings),
            "latency_conditions": self.latency_conditions,
            "rows": [_plain_row(row) for row in self.rows],
            "failed": [{"name": each.place, "reason": each.reason} for each in self.failed],
            "left_out": [{"name": each.place, "reason": each.reason} for each in self.left_out],
        }


def compared(
    records: Iterable[RunRecord],
    title: str,
    *,
    failed: Sequence[LeftOut] = (),
    left_out: Sequence[LeftOut] = (),
) -> Comparison:
    """Rank runs by rsum, each data set by itself; runs that differ in the seed only are one row."""
    experiments: dict[str, list[RunRecord]] = {}
    for record in records:
        key = [
            record.image_tower,
            record.text_tower,
            record.data_digest,
            sorted(settings_of(record.options).items()),
        ]
        experiments.setdefault(json.dumps(key, default=str), []).append(record)
    groups = list(experiments.values())
    differing = _differing([settings_of(group[0].options) for group in groups])
    names = short_names(name for group in groups for name in (group[0].image_tower, group[0].text_tower))
    rows = [_row(group, names, differing) for group in groups]
    ranked = _ranked(rows)
    return Comparison(title, ranked, differing, failed, left_out, _warnings(ranked))


def settings_of(options: Mapping[str, Any]) -> dict[str, Any]:
    """Of a run's options by dotted names those that make the experiment, without towers, seed and data.

    An option without a value is as good as none: earlier versions had fewer.
    """
    return {
        name: value
        for name, value in options.items()
        if value is not None and not BOOKKEEPING.fullmatch(name)
    }


def _differing(settings: Sequence[Mapping[str, Any]]) -> list[str]:
    """Names with more than one value; that one lacks counts as one."""
    names = dict.fromkeys(name for each in settings for name in each)
    return [name for name in names if len({json.dumps(each.get(name), default=str) for each in settings}) > 1]


def short_names(names: Iterable[str]) -> dict[str, str]:
    """Name of a tower → the same without scheme, owner and folders, where that leaves it different."""
    full = list(dict.fromkeys(names))
    short = [re.sub(r"^(random:|pypi:|hf-hub:|local-dir:)?(?:.*/)?", _kept_scheme, name) for name in full]
    return {name: s if short.count(s) == 1 else name for name, s in zip(full, short, strict=True)}


def _kept_scheme(found: re.Match[str]) -> str:
    """That weights are fresh is worth saying."""
    return found[1] if found[1] == "random:" else ""


def _row(records: Sequence[RunRecord], names: Mapping[str, str], differing: Sequence[str]) -> Row:
    means, deviations = {}, {}
    for name in (*METRICS, *COSTS):
        values = [record.values[name] for record in records if name in record.values]
        if values:
            means[name] = statistics.fmean(values)
        if len(values) > 1:
            deviations[name] = statistics.stdev(values)
    first = records[0]
    name = f"{names[first.image_tower]} × {names[first.text_tower]}"
    options = {option: first.options.get(option) for option in differing}
    return Row(name, tuple(records), means, deviations, options)


def _ranked(rows: Sequence[Row]) -> list[Row]:
    digests = [row.digest for row in rows]
    order = sorted(dict.fromkeys(digests), key=lambda digest: -digests.count(digest))
    ranked = []
    for index, digest in enumerate(order):
        same = [row for row in rows if row.digest == digest]
        for row in sorted(same, key=lambda row: (-row.means["rsum"], row.name)):
            better = sum(other.means["rsum"] > row.means["rsum"] for other in same)
            ranked.append(replace(row, data=index, rank=better + 1))
    return ranked


def _warnings(rows: Sequence[Row]) -> list[str]:
    found = []
    digests = list(dict.fromkeys(row.digest for row in rows))
    if len(digests) > 1:
        named = ", ".join(data_name(digest) for digest in digests)
        found.append(
            f"these runs were scored on {len(digests)} different data sets or splits ({named}): each has a "
            "table and ranks of its own, and their figures cannot be compared with each other"
        )
    elif digests == [""] and len(rows) > 1:
        found.append("the runs do not say what data they were scored on")
    conditions = {record.latency_conditions for row in rows for record in row.records} - {""}
    if len(conditions) > 1:
        found.append(f"image latencies were measured differently: {'; '.join(sorted(conditions))}")
    return found


def data_name(digest: str) -> str:
    """What a table calls data of this digest."""
    return f"data {digest[:8]}" if digest else "unknown data"


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
    """An option's value for people."""
    if value is None:
        return "–"
    return value if isinstance(value, str) else json.dumps(value, default=str)


def header(comparison: Comparison) -> list[str]:
    """Titles of the columns that `cells` fills."""
    several = any(len(row.records) > 1 for row in comparison.rows)
    values = [TITLES[name] for name in comparison.columns()]
    return ["rank", "towers", *comparison.options, *values, *(["runs"] if several else [])]


def cells(comparison: Comparison, row: Row) -> list[tuple[str, float | str]]:
    """For each column of `header` its text, and what it is sorted by."""
    several = any(len(each.records) > 1 for each in comparison.rows)
    options = [(option_text(row.options[name]), _sortable(row.options[name])) for name in comparison.options]
    values = [(shown(row, name), row.means.get(name, "")) for name in comparison.columns()]
    runs = [(str(len(row.records)), float(len(row.records)))] if several else []
    return [(str(row.rank), float(row.rank)), (row.name, row.name), *options, *values, *runs]


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
        lines += [[_escaped(text) for text, _ in cells(comparison, row)] for row in rows]
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
    if any(len(row.records) > 1 for row in comparison.rows):
        found.append("Several seeds: mean ± standard deviation.")
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
    rows = [_plain_row(row) for row in comparison.rows]
    lines = [{k: v for k, v in row.items() if k not in ("std", "options", "places")} for row in rows]
    for line, row in zip(lines, rows, strict=True):
        line |= {f"{name}_std": value for name, value in row["std"].items()}
        line |= {name: option_text(value) for name, value in row["options"].items()}
        line["places"] = " ".join(row["places"])
    names = list(dict.fromkeys(name for line in lines for name in line))
    writer = csv.DictWriter(stream, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return stream.getvalue()


def _plain_row(row: Row) -> dict[str, Any]:
    first = row.records[0]
    return {
        "rank": row.rank,
        "name": row.name,
        "image_tower": first.image_tower,
        "text_tower": first.text_tower,
        "runs": len(row.records),
        **{name: _rounded(value) for name, value in row.means.items()},
        "std": {name: _rounded(value) for name, value in row.deviations.items()},
        "options": dict(row.options),
        "data_digest": row.digest,
        "places": [record.place for record in row.records],
    }


def _rounded(value: float) -> float | int:
    return int(value) if value == int(value) else round(value, 4)
