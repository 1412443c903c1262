"""Groups runs of the same experiment into rows, and ranks the rows."""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.ticker import EngFormatter

from clip_lightning.experiments.run_records import COSTS, VALUES, RunRecord
from clip_lightning.reports.tables import short_names

# Options that may differ between runs of the same experiment. Data are compared by their digests.
BOOKKEEPING = re.compile(
    r"seed_everything|config|ckpt_path|model\.(image|text)_tower|predictions\..*|trainer\.(logger|default_root_dir|"
    r"enable_|log_every|devices$|num_nodes$).*|data\.(root|dataset|"
    r"read\.(?!splits).*|num_workers|cache|cache_options\.gigabytes|seed)|data_digest|data_artifact"
)


@dataclass
class Row:
    """Represents one experiment: a run, or several runs that differ only in the seed."""

    records: Sequence[RunRecord]
    name: str  # short names of the towers, `A × B`
    options: Mapping[str, Any]  # those in which the rows differ
    rank: int = 0  # by rsum among the rows of the same data; equal rows have the same rank

    def __post_init__(self) -> None:
        self.first = self.records[0]  # all runs have the same towers, data and state
        self.data = f"data {self.first.data_digest[:8]}" if self.first.data_digest else "unknown data"
        seeds: dict[str, list[RunRecord]] = {}
        for record in self.records:
            seeds.setdefault(str(record.options.get("seed_everything")), []).append(record)
        self.seeds = len(seeds)  # further runs with the same seed are repetitions
        self.means: dict[str, float] = {}  # every seed counts once
        self.deviations: dict[str, float] = {}  # of values that depend on the seed
        for name in VALUES:
            known = [[run.values[name] for run in runs if name in run.values] for runs in seeds.values()]
            values = [statistics.mean(repetitions) for repetitions in known if repetitions]
            if values:
                self.means[name] = statistics.mean(values)
            if len(values) > 1 and (name not in COSTS or name == "training_seconds"):
                self.deviations[name] = statistics.stdev(values)

    def shown(self, name: str) -> str:
        """Return a value as text, with ± its standard deviation, or – if it is unknown."""
        mean, deviation = self.means.get(name), self.deviations.get(name)
        if mean is None:
            return "–"
        if name.startswith(("parameters", "feature")):
            unit = "B" if name.startswith("feature") else ""
            return EngFormatter(unit)(float(f"{mean:.3g}")).strip()
        digits = 0 if name == "training_seconds" and mean >= 10 else 1
        return f"{mean:.{digits}f}" + ("" if deviation is None else f" ± {deviation:.{digits}f}")

    def as_dict(self) -> dict[str, Any]:
        """Return JSON values, with the same names as in `metrics.json`."""
        return {
            "rank": self.rank,
            "name": self.name,
            "image_tower": self.first.towers[0],
            "text_tower": self.first.towers[1],
            "runs": len(self.records),
            "seeds": self.seeds,
            **{name: round(value, 4) for name, value in self.means.items()},
            "std": {name: round(value, 4) for name, value in self.deviations.items()},
            "options": dict(self.options),
            "data_digest": self.first.data_digest,
            "unfinished": self.first.unfinished,
            "places": [record.place for record in self.records],
        }


@dataclass
class Comparison:
    """Holds the content of the files and pages of a comparison."""

    title: str
    data_sets: Sequence[Sequence[Row]]  # by rank; the data set with the most rows comes first
    failed: Mapping[str, str]  # the reason by the name of each pair that could not be trained
    left_out: Mapping[str, str]  # the reason by the place of each run without results

    def __post_init__(self) -> None:
        self.rows = [row for rows in self.data_sets for row in rows]
        records = [record for row in self.rows for record in row.records]
        self.latency_conditions = sorted({run.latency_conditions for run in records} - {""})
        self.warnings: list[str] = []  # reasons why some rows cannot be compared
        if len(self.data_sets) > 1:
            titles = ", ".join(rows[0].data for rows in self.data_sets)
            self.warnings.append(
                f"these runs were scored on {len(self.data_sets)} different data sets or splits ({titles}); "
                "their scores cannot be compared, so each data set has its own table and ranks"
            )
        if named := ", ".join(f"{run.place} ({run.unfinished})" for run in records if run.unfinished):
            text = f"these runs did not finish, and are ranked by their best epoch so far: {named}"
            self.warnings.append(text)
        if len(self.latency_conditions) > 1:
            conditions = "; ".join(self.latency_conditions)
            self.warnings.append(f"image latencies were measured under different conditions: {conditions}")

    def as_dict(self) -> dict[str, Any]:
        """Return JSON values."""
        return {
            "title": self.title,
            "warnings": self.warnings,
            "latency_conditions": self.latency_conditions,
            "rows": [row.as_dict() for row in self.rows],
            "failed": [{"name": name, "reason": reason} for name, reason in self.failed.items()],
            "left_out": [{"name": name, "reason": reason} for name, reason in self.left_out.items()],
        }


def compared(
    records: Iterable[RunRecord],
    title: str,
    failed: Mapping[str, str] | None = None,
    left_out: Mapping[str, str] | None = None,
) -> Comparison:
    """Rank runs by rsum, separately for each data set; runs that differ only in the seed make one row."""
    groups: dict[str, list[RunRecord]] = {}
    for record in records:
        experiment = [record.data_digest, record.towers, record.unfinished, settings_of(record.options)]
        key = json.dumps(experiment, sort_keys=True, default=str)
        groups.setdefault(re.sub(r"\.0\b", "", key), []).append(record)  # W&B returns 1.0 as 1
    firsts = [(runs[0].data_digest, settings_of(runs[0].options)) for runs in groups.values()]
    base = dict(reversed(firsts))
    names = dict.fromkeys(name for _, settings in firsts for name in settings)
    differing = [n for n in names if any(s.get(n) != base[digest].get(n) for digest, s in firsts)]
    short = short_names((tower for runs in groups.values() for tower in runs[0].towers), short_tower)
    data_sets: dict[str, list[Row]] = {}
    for runs in groups.values():
        options = {name: runs[0].options.get(name) for name in differing}
        name = " × ".join(short[tower] for tower in runs[0].towers)
        data_sets.setdefault(runs[0].data_digest, []).append(Row(runs, name, options))
    for rows in data_sets.values():
        rows.sort(key=lambda row: (-row.means["rsum"], row.name))
        for row in rows:
            row.rank = 1 + sum(other.means["rsum"] > row.means["rsum"] for other in rows)
    by_size = sorted(data_sets.values(), key=len, reverse=True)
    return Comparison(title, by_size, failed or {}, left_out or {})


def settings_of(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options that define the experiment, without towers, seed and data."""
    # earlier versions did not have all options
    given = {name: value for name, value in options.items() if value is not None}
    return {name: value for name, value in given.items() if not BOOKKEEPING.fullmatch(name)}


def short_tower(name: str) -> str:
    """Return the name of a tower without scheme, owner and folders, but with `random:`."""
    short = re.sub(r"^(random:|pypi:|hf-hub:|local-dir:)", "", name).rpartition("/")[2]
    return f"random:{short}" if name.startswith("random:") else short
