"""Groups runs of the same experiment into rows, ranks them, and shows them as tables, plots and a page."""

from __future__ import annotations

import itertools
import json
import math
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

from matplotlib.ticker import EngFormatter

from clip_lightning.experiments.run_records import COSTS, VALUES, RunRecord
from clip_lightning.reports import tables
from clip_lightning.reports.pages import write_html
from clip_lightning.reports.plots import GREEN, MUTED, Plot, styled_axes
from clip_lightning.terminal import json_line, note, one_line

# Options that may differ between runs of the same experiment. Data are compared by their digests.
BOOKKEEPING = re.compile(
    r"seed_everything|config|ckpt_path|model\.(image|text)_tower|predictions\..*|trainer\.(logger|default_root_dir|"
    r"enable_|log_every|devices$|num_nodes$).*|data\.(root|dataset|"
    r"read\.(?!splits).*|num_workers|cache|cache_options\.gigabytes|seed)|data_digest|data_artifact"
)
ALWAYS = ("rank", "towers", "run", "rsum", "state")  # columns that are always printed
IF_THEY_FIT = {
    "text_to_image_R@1": "t→i\nR@1",
    "image_to_text_R@1": "i→t\nR@1",
    "image_latency_ms": "latency\nms",
}
MAX_LABEL = 60  # characters
MARKERS = "osD^vP*X"


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
    short = tables.short_names((tower for runs in groups.values() for tower in runs[0].towers), short_tower)
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


def write_comparison(comparison: Comparison, folder: Path) -> None:
    """Write comparison.md, comparison.csv, comparison.json, and index.html with plots."""
    csv, record = csv_table(comparison), comparison.as_dict()
    tables.write_tables(folder, "comparison", markdown(comparison), csv, record)
    write_html(
        folder / "index.html",
        "comparison",
        title=comparison.title,
        text=[("warning", warning) for warning in comparison.warnings],
        rows=comparison.rows,
        tables=[(rows[0].data, columns_of(rows, comparison)) for rows in comparison.data_sets],
        notes=notes(comparison),
        plots=plots_of(comparison),
        lists={"Failed": comparison.failed, "Left out": comparison.left_out},
    )


def columns_of(rows: Sequence[Row], comparison: Comparison) -> list[tables.Column]:
    """Return the columns of a data set: rank, towers, run, options, values and state, without empty ones."""
    columns = [tables.column("rank", [row.rank for row in rows])]
    columns.append(tables.column("towers", [row.name for row in rows], is_text=True))
    several = any(len(row.records) > 1 for row in rows)
    if several or len(comparison.data_sets) > 1 or len({row.first.towers for row in rows}) < len(rows):
        singles = (row.first.place for row in rows if len(row.records) == 1)
        names = tables.short_names(singles, lambda place: PurePath(place).name)
        runs = [names.get(row.first.place) or _count_seeds(row) for row in rows]
        columns.append(tables.column("run", runs, is_text=True))
    columns += [tables.column(name, [row.options[name] for row in rows]) for name in rows[0].options]
    for name, title in VALUES.items():
        if any(name in row.means for row in rows):
            columns.append(tables.Column(name, title, [row.shown(name) for row in rows]))
    if any(row.first.unfinished for row in rows):
        columns.append(tables.column("state", [row.first.unfinished for row in rows], is_text=True))
    return columns


def _count_seeds(row: Row) -> str:
    counted = f"{row.seeds} seed{'s' if row.seeds > 1 else ''}"
    return f"{counted}, repeated" if len(row.records) > row.seeds else counted


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
    parts = [f"# {tables.escaped(comparison.title)}"]
    parts += [f"> **Warning:** {tables.escaped(warning)}" for warning in comparison.warnings]
    for rows in comparison.data_sets:
        heading = f"## {rows[0].data.capitalize()}\n\n" if len(comparison.data_sets) > 1 else ""
        parts.append(heading + tables.markdown_table(columns_of(rows, comparison)))
    parts.append(tables.escaped(notes(comparison)))
    for title, reasons in (("Failed", comparison.failed), ("Left out", comparison.left_out)):
        listed = [f"- {tables.escaped(name)}: {tables.escaped(reason)}" for name, reason in reasons.items()]
        parts.append(f"## {title}\n\n" + "\n".join(listed) if listed else "")
    return "\n\n".join(filter(None, parts)) + "\n"


def csv_table(comparison: Comparison) -> str:
    """Return a CSV with one line per row, with the same names as in `metrics.json`."""
    lines = []
    for row in map(Row.as_dict, comparison.rows):
        deviations, options, places = (row.pop(name) for name in ("std", "options", "places"))
        row |= {f"{name}_std": value for name, value in deviations.items()}
        row |= {name: v if isinstance(v, float) else tables.option_text(v) for name, v in options.items()}
        lines.append(row | {"places": " ".join(places)})
    return tables.csv_of_records(lines)


def report_comparison(comparison: Comparison, out: Path, as_json: bool) -> None:
    """Write all files of a comparison, warn, and print its table."""
    write_comparison(comparison, out)
    for warning in comparison.warnings:
        note(f"WARNING: {warning}")
    if as_json:
        print(json_line(comparison.as_dict() | {"folder": str(out)}))
    else:
        print_tables(comparison)
        print(f"comparison: {out / 'index.html'}")


def print_tables(comparison: Comparison) -> None:
    """Print a table of each data set, with as many columns that differ as fit into the terminal."""
    for rows in comparison.data_sets:
        columns = columns_of(rows, comparison)
        differing = [c for c in columns if len(rows) == 1 or len({*c.texts}) > 1]
        always = [c for c in columns if c.name in ALWAYS and (c in differing or c.name != "towers")]
        options = [c for c in differing if c.name in rows[0].options]
        values = [c._replace(title=IF_THEY_FIT[c.name]) for c in differing if c.name in IF_THEY_FIT]
        titles = [rows[0].data] if len(comparison.data_sets) > 1 else []
        titles += [] if columns[1] in differing else [rows[0].name]
        hidden = tables.print_table([*always, *options, *values], len(always), "\n".join(titles))
        if more := [name for name in hidden if name in rows[0].options]:
            print(f"more in index.html: {one_line(', '.join(more))}\n")


def plots_of(comparison: Comparison) -> list[Plot]:
    """Draw rsum of the first data set as a heat map, and recall against latency if that was measured."""
    if not comparison.rows:
        return []
    rows = comparison.data_sets[0]
    scope = f", {rows[0].data} only" if len(comparison.data_sets) > 1 else ""
    measured = [row for row in rows if "image_latency_ms" in row.means]
    return [_heatmap(rows, scope), *([_recall_latency(measured, scope)] if measured else [])]


def _heatmap(rows: Sequence[Row], scope: str) -> Plot:
    """Draw the best rsum of each image tower and text tower; the rows are sorted from best to worst."""
    best = {row.first.towers: row for row in reversed(rows)}
    images, texts = _labels(rows)
    cells = [[best.get((image, text)) for text in texts] for image in images]
    values = [[row.means["rsum"] if row else math.nan for row in line] for line in cells]
    low, high = rows[-1].means["rsum"], rows[0].means["rsum"]
    size = (1.5 * len(texts) + 4, 0.72 * len(images) + 2)
    with styled_axes(f"rsum{scope}", size) as (axes, buffer):
        axes.grid(visible=False)
        axes.imshow(values, cmap="YlGn", aspect="auto", vmin=low - 0.1, vmax=high + 0.8 * (high - low) + 0.1)
        for (y, line), x in itertools.product(enumerate(cells), range(len(texts))):
            row = line[x]
            text = row.shown("rsum").replace(" ± ", "\n± ") if row else "–"
            weight = "bold" if row and row.rank == 1 else "normal"
            axes.text(x, y, text, ha="center", va="center", fontsize=12, fontweight=weight)
        axes.set_xticks(range(len(texts)), texts.values(), rotation=20, ha="right")
        axes.set_yticks(range(len(images)), images.values())
    return Plot(buffer.getvalue(), "rsum of each image tower with each text tower")


def _recall_latency(rows: Sequence[Row], scope: str) -> Plot:
    """Draw mean recall against image latency with the Pareto front."""
    points = [(row.means["image_latency_ms"], row.means["rsum"] / 6) for row in rows]
    images, texts = _labels(rows)
    colours = {image: f"C{n}" for n, image in enumerate(images)}
    markers = dict(zip(texts, itertools.cycle(MARKERS)))
    with styled_axes(f"Recall against latency, with ranks{scope}", (9.6, 6)) as (axes, buffer):
        latencies, recalls = zip(*sorted(points), strict=True)
        front = list(itertools.accumulate(recalls, max))  # the best recall up to each latency
        axes.plot(latencies, front, color=GREEN, alpha=0.6, drawstyle="steps-post", label="Pareto front")
        for image, label in images.items():
            axes.plot([], [], "s", color=colours[image], label=label)
        for text, label in texts.items():
            axes.plot([], [], markers[text], color=MUTED, label=label)
        for row, point in zip(rows, points, strict=True):
            image, text = row.first.towers
            axes.plot(*point, markers[text], color=colours[image], markersize=10)
            axes.annotate(str(row.rank), point, (7, 5), textcoords="offset points", color=MUTED)
        axes.figure.legend(loc="outside right upper")
        axes.margins(0.1)
        axes.set(xlabel="image latency, ms", ylabel="mean of the six recalls, %")
    return Plot(buffer.getvalue(), "recall against image latency, with the Pareto front")


def _labels(rows: Sequence[Row]) -> list[dict[str, str]]:
    """Return the labels of the image towers and of the text towers, by their names."""
    short = (tables.short_names((row.first.towers[kind] for row in rows), short_tower) for kind in (0, 1))
    return [{name: one_line(label)[:MAX_LABEL] for name, label in names.items()} for names in short]
