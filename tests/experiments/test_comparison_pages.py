"""The table ranks fairly; pictures and page take any names, and show what they should."""

from __future__ import annotations

import csv
import io
import itertools
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from matplotlib.text import Text
from PIL import Image
from rich.console import Console

from clip_lightning.experiments import charts as comparison_pictures
from clip_lightning.experiments.charts import pareto_front, recall_latency
from clip_lightning.experiments.compare import Comparison, compared, short_names
from clip_lightning.experiments.pages import page, write_comparison
from clip_lightning.experiments.run_records import RECALLS, LeftOut, RunRecord, flat
from clip_lightning.experiments.tables import cells, csv_table, header, markdown, shown
from clip_lightning.experiments.terminal import print_tables

CONDITIONS = "one picture, fp32, CPU with 2 threads"


def record(rsum: float, image: str = "a", text: str = "x", **changes: Any) -> RunRecord:
    """A run whose recalls are all alike."""
    latency = changes.pop("latency", 10.0)
    values = {
        **dict.fromkeys(RECALLS, rsum / 6),
        "rsum": rsum,
        "parameters": 4_652_008,
        "feature_bytes": 2560,
    }
    known = values if latency is None else values | {"image_latency_ms": latency}
    given = {"data_digest": "d" * 64, "latency_conditions": CONDITIONS, **changes}
    place = given.pop("place", f"runs/{image}-{text}-{rsum}")
    return RunRecord(place, image, text, known, **given)


def ranks(comparison: Comparison) -> list[tuple[int, str]]:
    return [(row.rank, row.name) for row in comparison.rows]


# the table


def test_rows_are_ranked_by_rsum_and_equal_ones_share_a_rank() -> None:
    pairs = {("a", "x"): 100, ("a", "y"): 200, ("b", "x"): 200, ("b", "y"): 50}
    comparison = compared([record(rsum, *pair) for pair, rsum in pairs.items()], "t")
    assert ranks(comparison) == [(1, "a × y"), (1, "b × x"), (3, "a × x"), (4, "b × y")]
    assert comparison.warnings == []


def test_seeds_are_one_row_with_mean_and_sample_deviation() -> None:
    options = [{"seed_everything": seed, "model.heads.dropout": 0.3} for seed in range(3)]
    records = [record(rsum, options=each) for rsum, each in zip((90, 100, 110), options, strict=True)]
    comparison = compared([*records, record(95, options=options[0] | {"model.heads.dropout": 0.5})], "t")
    best, other = comparison.rows
    assert (best.means["rsum"], best.deviations["rsum"]) == (100, 10)
    assert other.deviations == {}
    assert shown(best, "rsum") == "100.0 ± 10.0"
    assert shown(other, "rsum") == "95.0"
    assert comparison.options == ["model.heads.dropout"]
    line, _ = cells(comparison, comparison.rows)
    assert dict(zip(header(comparison), (text for text, _ in line), strict=True)) == {
        "rank": "1",
        "towers": "a × x",
        "model.heads.dropout": "0.3",
        "rsum": "100.0 ± 10.0",
        **{f"{way} R@{k}": "16.7 ± 1.7" for way in ("text→image", "image→text") for k in (1, 5, 10)},
        "parameters": "4.65 M",
        "image latency, ms": "10.0",  # which has nothing to do with the seed
        "features in all": "2.56 kB",
        "run": "3 seeds",
    }


def test_a_seed_that_was_run_twice_is_no_second_seed() -> None:
    records = [record(rsum, options={"seed_everything": 0}) for rsum in (90, 110)]
    (row,) = compared(records, "t").rows
    assert (row.seeds, len(row.records), row.means["rsum"], row.deviations) == (1, 2, 100, {})
    text = markdown(compared(records, "t"))
    assert "±" not in text and "1 seed, repeated" in text and "Several" not in text and "2 runs" not in text
    assert any("1 seed, repeated 100.0" in line for line in printed(compared(records, "t"), 60))
    several = [*records, record(120, options={"seed_everything": 1})]
    (row,) = compared(several, "t").rows
    assert shown(row, "rsum") == "110.0 ± 14.1" and "2 seeds, repeated" in markdown(compared(several, "t"))


def test_only_options_that_make_an_experiment_are_columns() -> None:
    kept = {"model.loss": "SigLIP", "model.loss.bias": 1, "trainer.max_epochs": 3}
    ours = {"trainer.default_root_dir": "a", "data.root": "a", "trainer.logger.id": "a", "data.cache": "a"}
    comparison = compared([record(1, options=kept | ours), record(2, options={"model.loss": "InfoNCE"})], "t")
    assert comparison.options == ["model.loss", "model.loss.bias", "trainer.max_epochs"]
    assert [row.options["model.loss.bias"] for row in comparison.rows] == [None, 1]


def test_an_option_of_a_later_version_without_a_value_is_no_difference() -> None:
    comparison = compared([record(1, options={"model.new": None}), record(3, options={})], "t")
    assert [(row.means["rsum"], len(row.records)) for row in comparison.rows] == [(2, 2)]


def test_what_wandb_adds_or_writes_otherwise_is_no_difference() -> None:
    local = {
        "model.heads.dropout": 1.0,
        "model.betas": [0.9, 1.0],
        "data.dataset": "auto",
        "data.read.image_column": "image",
    }
    online = {"model.heads.dropout": 1, "model.betas": [0.9, 1], "data_digest": "d", "data_artifact": "a:v0"}
    (row,) = compared([record(100, options=local), record(110, options=online)], "t").rows
    assert len(row.records) == 2


def test_an_option_is_a_column_if_it_differs_on_the_same_data() -> None:
    def comparison(digest: str) -> Comparison:
        others = record(3, options={"a": 2, "b": 1}, data_digest=digest)
        return compared(
            [record(1, options={"a": 1, "b": 1}), record(2, options={"a": 1, "b": 2}), others], "t"
        )

    assert comparison("d" * 64).options == ["a", "b"]
    assert comparison("e" * 64).options == ["b"]


def test_unfinished_runs_are_marked_and_no_seeds_of_finished_ones() -> None:
    records = [record(100), record(120), *(record(300 + n, unfinished="interrupted") for n in range(4))]
    comparison = compared(records, "t")
    assert [(row.means["rsum"], row.unfinished) for row in comparison.rows] == [
        (301.5, "interrupted"),
        (110, ""),
    ]
    (warning,) = comparison.warnings
    assert "runs/a-x-300 (interrupted)" in warning and warning.endswith("and 1 more")
    state = header(comparison).index("state")
    assert [line[state][0] for line in cells(comparison, comparison.rows)] == ["interrupted", "–"]
    assert [row["unfinished"] for row in comparison.as_dict()["rows"]] == ["interrupted", ""]
    assert "state" not in header(compared([record(100)], "t"))


def test_a_configuration_is_flattened() -> None:
    loss = {"class_path": "clip_lightning.training.losses.SigLIP", "init_args": {"bias": -10}}
    config = {"model": {"loss": loss, "lora": None, "betas": [0.9, 0.98]}, "seed": 0}
    assert flat(config) == {
        "model.loss": "SigLIP",
        "model.loss.bias": -10,
        "model.lora": None,
        "model.betas": [0.9, 0.98],
        "seed": 0,
    }


def test_different_data_are_ranked_apart_and_loudly() -> None:
    records = [
        record(100),
        record(90, "b"),
        record(300, "c", data_digest="e" * 64),
        record(5, data_digest=""),
    ]
    comparison = compared(records, "t")
    assert ranks(comparison) == [(1, "a × x"), (2, "b × x"), (1, "c × x"), (1, "a × x")]
    (warning,) = comparison.warnings
    assert "3 different data sets" in warning
    text = markdown(comparison)
    assert warning in text
    assert re.findall("^## (.*)$", text, re.MULTILINE) == ["Data dddddddd", "Data eeeeeeee", "Unknown data"]


def test_latencies_of_different_machines_are_told() -> None:
    comparison = compared([record(1), record(2, "b", latency_conditions="one picture, fp32, GPU")], "t")
    assert "measured differently" in comparison.warnings[0]


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["pypi:efficientnet-lite0", "owner/model@cls"], ["efficientnet-lite0", "model@cls"]),
        (["random:/home/me/bert@cls", "/home/me/bert"], ["random:bert@cls", "bert"]),
        (["one/model", "two/model"], ["one/model", "two/model"]),  # shorter, they would be the same
        (["resnet18=/weights/a.safetensors"], ["a.safetensors"]),
    ],
)
def test_names_are_short_where_they_stay_different(names: list[str], expected: list[str]) -> None:
    assert list(short_names(names).values()) == expected


def test_csv_and_json_have_plain_numbers() -> None:
    comparison = compared([record(100, options={"seed_everything": 0, "a,b": '"'}), record(110)], "t")
    (line, other) = csv.DictReader(io.StringIO(csv_table(comparison)))
    assert (line["rank"], line["rsum"], line["parameters"]) == ("1", "110", "4652008")
    assert (line["a,b"], other["a,b"]) == ("–", '"')
    row = json.loads(json.dumps(comparison.as_dict()))["rows"][1]
    assert (row["rank"], row["rsum"], row["data_digest"]) == (2, 100, "d" * 64)
    assert row["places"] == ["runs/a-x-100"]
    assert row["options"] == {"a,b": '"'}


def test_rows_of_the_same_towers_name_their_runs() -> None:
    places = ["one/a", "two/a", "wandb:e/p/b"]
    records = [record(100 - n, place=place, options={"model.lr": n / 7}) for n, place in enumerate(places)]
    comparison = compared(records, "t")
    lines = [dict(zip(header(comparison), line, strict=True)) for line in cells(comparison, comparison.rows)]
    assert [line["run"][0] for line in lines] == ["one/a", "two/a", "p/b"]
    assert [line["model.lr"] for line in lines] == [("0", 0), ("0.1429", 1 / 7), ("0.2857", 2 / 7)]
    assert "run" not in header(compared([record(100), record(90, "b")], "t"))


# the terminal


def printed(comparison: Comparison, width: int = 80) -> list[str]:
    console = Console(file=io.StringIO(), width=width, markup=False)
    print_tables(comparison, console)
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert all(len(line) <= width for line in lines)
    return [" ".join(line.split()) for line in lines]


def sweep(towers: int = 1) -> list[RunRecord]:
    """Runs with six options drawn from ranges."""
    names = ["embed_dim", "dropout", "loss.label_smoothing", "optimizer.lr", "optimizer.weight_decay", "c"]
    return [
        record(
            280.0 - n,
            "pypi:efficientnet-lite0" if n % towers == 0 else "pypi:efficientnet-lite1",
            "pypi:minilm-l6",
            place=f"runs/sweep/20261124-15480{n}-2649",
            options={f"model.{name}": (n + 1) / 7 ** (i + 1) for i, name in enumerate(names)},
        )
        for n in range(4)
    ]


def test_a_sweep_fits_into_80_columns() -> None:
    lines = printed(compared(sweep(), "t"))
    assert lines[0] == "efficientnet-lite0 × minilm-l6"
    assert "rank run embed_dim dropout lr rsum R@1 R@1" in lines
    assert "1 20261124-154800-2649 0.1429 0.02041 0.0004165 280.0 46.7 46.7" in lines
    assert any(line.startswith("more in index.html: model.loss.label_smoothing, model.opt") for line in lines)


@pytest.mark.parametrize("width", [60, 80, 200])
def test_rank_towers_run_and_rsum_are_there_at_any_width(width: int) -> None:
    lines = printed(compared(sweep(towers=2), "t"), width)
    text = "".join(lines)
    assert all(f"20261124-15480{n}-2649" in text for n in range(4))
    assert all(f"{280 - n}.0" in text for n in range(4))
    assert text.count("efficientnet-lite1") == 2 and "…" not in text


def test_what_seeds_spread_is_shown_before_other_values() -> None:
    records = [
        record(rsum, image, options={"seed_everything": rsum})
        for rsum in (100, 120)
        for image in ("a", "b" * 30)
    ]
    lines = printed(compared([*records, record(90, unfinished="crashed")], "t"), 60)
    assert any("2 seeds 110.0 ± 14.1" in line for line in lines)
    assert any("90.0" in line and line.endswith("crashed") for line in lines)


# pictures


def test_the_front_is_what_nothing_beats() -> None:
    points = [(1, 1), (2, 3), (2, 2), (3, 3), (4, 5), (1, 1)]
    assert pareto_front(points) == [0, 1, 4, 5]


def many_records() -> list[RunRecord]:
    images = [f"some_image_tower_{n}" for n in range(6)]
    pairs = list(itertools.product(enumerate(images), enumerate(("text-one", "text-two", "text-three"))))
    return [record(300 + 9 * i + 4 * t, a, b, latency=10 + 2 * i) for (i, a), (t, b) in pairs]


def test_labels_are_inside_and_over_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[Any] = []
    axes_of = comparison_pictures._axes
    monkeypatch.setattr(comparison_pictures, "_axes", lambda *given: kept.append(axes_of(*given)) or kept[-1])
    assert recall_latency(compared(many_records(), "t")) is not None
    ((figure, axes),) = kept
    renderer = figure.canvas.get_renderer()
    inside = axes.get_window_extent(renderer)
    labels = [text for text in axes.texts if type(text) is Text]
    boxes = [text.get_window_extent(renderer) for text in labels]
    assert len(boxes) >= 12  # of 18: none of the front is missing
    front = {row.name for row in compared(many_records(), "t").rows if row.name.endswith("three")}
    assert front <= {text.get_text() for text in labels}
    assert not [(a, b) for a, b in itertools.combinations(boxes, 2) if a.overlaps(b)]
    for box in boxes:
        assert inside.x0 <= box.x0 and box.x1 <= inside.x1 and inside.y0 <= box.y0 and box.y1 <= inside.y1


def test_without_a_latency_there_is_no_scatter_and_none_from_before(tmp_path: Path) -> None:
    write_comparison(compared([record(100)], "t"), tmp_path)
    files = {path.name for path in tmp_path.iterdir()}
    pictures = {"heatmap.png", "recall_latency.png"}
    assert files == pictures | {"comparison.md", "comparison.csv", "comparison.json", "index.html"}
    for name in pictures:
        with Image.open(tmp_path / name) as picture:
            picture.load()
    write_comparison(compared([record(100, latency=None)], "t"), tmp_path)
    assert files - {path.name for path in tmp_path.iterdir()} == {"recall_latency.png"}
    assert "image latency" not in (tmp_path / "comparison.md").read_text()


def test_nothing_but_failures_can_be_written_too(tmp_path: Path) -> None:
    write_comparison(compared([], "t", failed=[LeftOut("a × x", "no such tower")]), tmp_path)
    assert "a × x" in (tmp_path / "index.html").read_text()
    assert "- a × x: no such tower" in (tmp_path / "comparison.md").read_text()


# the page

STRANGE = '<script>alert("1")</script> & | 日本語 🐶 $x_1$ \ud83d ' + "w" * 300


class Page(HTMLParser):
    """Tags with their attributes, and the text of table cells."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.cells: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "td":
            self.cells.append("")

    def handle_data(self, data: str) -> None:
        if self.cells and self.lasttag == "td":
            self.cells[-1] += data


def test_any_name_is_shown_as_it_is(tmp_path: Path) -> None:
    records = [record(100, STRANGE, STRANGE, options={"o": STRANGE}), record(90, "b", options={"o": 1})]
    failed = [LeftOut(STRANGE, STRANGE)]
    write_comparison(compared(records, STRANGE, failed=failed, left_out=failed), tmp_path)
    html = (tmp_path / "index.html").read_text()
    parsed = Page(html)
    assert [tag for tag, _ in parsed.tags].count("script") == 1  # the one that sorts
    assert "alert(&#34;1&#34;)" in html
    assert STRANGE.replace("\ud83d", "?") in parsed.cells
    table = [line for line in (tmp_path / "comparison.md").read_text().splitlines() if line.startswith("|")]
    assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table}) == 1  # as many cells in each line
    assert "<script>" not in "".join(table)


def test_the_page_stands_alone_and_can_be_sorted() -> None:
    comparison = compared([record(100), record(90, "b", latency=None)], "t")
    html = page(comparison, {"a picture": b"\x89PNG", "another": b"\x89PNG"})
    parsed = Page(html)
    places = [a.get(name) or "" for _, a in parsed.tags for name in ("src", "href") if name in a]
    assert len(places) == 2
    assert all(place.startswith("data:image/png;base64,") for place in places)
    assert "http" not in html and "@import" not in html
    assert ("meta", {"name": "viewport", "content": "width=device-width, initial-scale=1"}) in parsed.tags
    values = [attributes["data-value"] for tag, attributes in parsed.tags if tag == "td"]
    columns = len(header(comparison))
    assert len(values) == 2 * columns
    latency = header(comparison).index("image latency, ms")
    assert [values[latency], values[columns + latency]] == ["10.0", ""]
    assert [tag for tag, _ in parsed.tags].count("button") == columns
