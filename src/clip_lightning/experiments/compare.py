"""Runs beside each other: those that are one experiment as a row, and the rows ranked."""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from clip_lightning.experiments.run_records import COSTS, METRICS, LeftOut, RunRecord

# What differs from run to run without making another experiment. The data's digest says whether data differ.
BOOKKEEPING = re.compile(
    r"seed_everything|config|ckpt_path|model\.(image|text)_tower|predictions\..*|trainer\.(logger|default_root_dir|"
    r"enable_|log_every|devices$|num_nodes$).*|data\.(root|dataset|"
    r"read\..*|num_workers|cache|cache_options\.gigabytes|seed)|data_digest|data_artifact"
)
NAMED = 3  # unfinished runs that a warning names


@dataclass(frozen=True)
class Row:
    """A pair of towers with certain settings: one run, or several that do not differ in more than the seed.

    Attributes:
        name: short names of the towers, `A × B`.
        records: the runs.
        seeds: how many different ones they have; further runs with one of them are repetitions.
        means: of the values of `METRICS` and `COSTS` that are known; every seed counts once.
        deviations: standard deviations over the seeds of what varies with them, if there are two or more.
        options: those in which the rows differ.
        data: index of the data set, 0 the one with the most rows.
        rank: by rsum among the rows of the same data; equal ones share it.
    """

    name: str
    records: tuple[RunRecord, ...]
    seeds: int
    means: Mapping[str, float]
    deviations: Mapping[str, float]
    options: Mapping[str, Any]
    data: int = 0
    rank: int = 0

    @property
    def digest(self) -> str:
        """Of the data."""
        return self.records[0].data_digest

    @property
    def towers(self) -> tuple[str, str]:
        """Full names of the image tower and the text tower."""
        return self.records[0].image_tower, self.records[0].text_tower

    @property
    def unfinished(self) -> str:
        """As in `RunRecord`: runs that came to their end and others are never one row."""
        return self.records[0].unfinished


@dataclass(frozen=True)
class Comparison:
    """Everything that a page or a file shows.

    Attributes:
        title: a headline.
        rows: by data set and rank.
        options: dotted names of the options in which rows of the same data differ.
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
            "rows": [plain_row(row) for row in self.rows],
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
        settings = {name: _text(value) for name, value in settings_of(record.options).items()}
        key = [record.image_tower, record.text_tower, record.data_digest, record.unfinished, settings]
        experiments.setdefault(json.dumps(key, sort_keys=True), []).append(record)
    groups = list(experiments.values())
    differing = _differing([group[0] for group in groups])
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


def _differing(records: Sequence[RunRecord]) -> list[str]:
    """Names of settings with more than one value on the same data; that one lacks counts as one."""
    settings = [(record.data_digest, settings_of(record.options)) for record in records]
    found = []
    for name in dict.fromkeys(name for _, each in settings for name in each):
        values = {(digest, _text(each.get(name))) for digest, each in settings}
        if len(values) > len({digest for digest, _ in values}):
            found.append(name)
    return found


def _text(value: Any) -> str:
    """A value as JSON; W&B gives 1.0 back as 1."""
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_text, value))}]"
    whole = isinstance(value, float) and value.is_integer()
    return json.dumps(int(value) if whole else value, default=str)


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
    seeds: dict[str, list[RunRecord]] = {}
    for record in records:
        seeds.setdefault(_text(record.options.get("seed_everything")), []).append(record)
    for name in (*METRICS, *COSTS):
        known = [[run.values[name] for run in runs if name in run.values] for runs in seeds.values()]
        values = [statistics.fmean(repetitions) for repetitions in known if repetitions]
        if values:
            means[name] = statistics.fmean(values)
        if len(values) > 1 and name in (*METRICS, "training_seconds"):
            deviations[name] = statistics.stdev(values)
    first = records[0]
    name = f"{names[first.image_tower]} × {names[first.text_tower]}"
    options = {option: first.options.get(option) for option in differing}
    return Row(name, tuple(records), len(seeds), means, deviations, options)


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
    unfinished = [f"{r.place} ({r.unfinished})" for row in rows for r in row.records if r.unfinished]
    if unfinished:
        more = f" and {len(unfinished) - NAMED} more" if len(unfinished) > NAMED else ""
        found.append(
            f"ranked by what they had reached before their end: {', '.join(unfinished[:NAMED])}{more}"
        )
    conditions = {record.latency_conditions for row in rows for record in row.records} - {""}
    if len(conditions) > 1:
        found.append(f"image latencies were measured differently: {'; '.join(sorted(conditions))}")
    return found


def data_name(digest: str) -> str:
    """What a table calls data of this digest."""
    return f"data {digest[:8]}" if digest else "unknown data"


def plain_row(row: Row) -> dict[str, Any]:
    """A row as plain JSON values, under the names that `metrics.json` has."""
    image_tower, text_tower = row.towers
    return {
        "rank": row.rank,
        "name": row.name,
        "image_tower": image_tower,
        "text_tower": text_tower,
        "runs": len(row.records),
        "seeds": row.seeds,
        **{name: _rounded(value) for name, value in row.means.items()},
        "std": {name: _rounded(value) for name, value in row.deviations.items()},
        "options": dict(row.options),
        "data_digest": row.digest,
        "unfinished": row.unfinished,
        "places": [record.place for record in row.records],
    }


def _rounded(value: float) -> float | int:
    return int(value) if value == int(value) else round(value, 4)
