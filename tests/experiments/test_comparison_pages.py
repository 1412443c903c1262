"""The ranks and tables of a comparison, and its plots and page with any names."""

import base64
import contextlib
import csv
import io
import json
import os
import re
from html import unescape
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from PIL import Image

from clip_lightning.experiments.compare import (
    Comparison,
    columns_of,
    compared,
    csv_table,
    markdown,
    print_tables,
    short_tower,
    write_comparison,
)
from clip_lightning.experiments.run_records import RECALLS, RunRecord, flat
from clip_lightning.reports.tables import short_names

CONDITIONS = "one image, fp32, CPU with 2 threads"


def record(rsum: float, image: str = "a", text: str = "x", **changes: Any) -> RunRecord:
    """A run whose recalls are all alike."""
    latency = changes.pop("latency", 10.0)
    values = dict.fromkeys(RECALLS, rsum / 6) | {"rsum": rsum, "parameters": 4_652_008, "feature_bytes": 2560}
    values |= {} if latency is None else {"image_latency_ms": latency}
    place = changes.pop("place", f"runs/{image}-{text}-{rsum}")
    given = {"data_digest": "d" * 64, "latency_conditions": CONDITIONS, **changes}
    return RunRecord(place, (image, text), values, **given)


def table(comparison: Comparison) -> dict[str, list[str]]:
    """The texts of the first data set's columns, by their titles."""
    return {column.title: column.texts for column in columns_of(comparison.data_sets[0], comparison)}


def ranks(comparison: Comparison) -> list[tuple[int, str]]:
    return [(row.rank, row.name) for row in comparison.rows]


def test_rows_are_ranked_by_rsum_and_equal_rows_have_the_same_rank() -> None:
    pairs = {("a", "x"): 100, ("a", "y"): 200, ("b", "x"): 200, ("b", "y"): 50}
    comparison = compared([record(rsum, *pair) for pair, rsum in pairs.items()], "t")
    assert ranks(comparison) == [(1, "a × y"), (1, "b × x"), (3, "a × x"), (4, "b × y")]
    assert comparison.warnings == []
    comparison = compared([record(1), record(2, "b", latency_conditions="one image, fp32, GPU")], "t")
    assert "measured under different conditions" in comparison.warnings[0]


def test_seeds_are_one_row_with_mean_and_sample_deviation() -> None:
    options = [{"seed_everything": seed, "model.heads.dropout": 0.3} for seed in range(3)]
    records = [record(rsum, options=each) for rsum, each in zip((90, 100, 110), options, strict=True)]
    comparison = compared([*records, record(95, options=options[0] | {"model.heads.dropout": 0.5})], "t")
    best, other = comparison.rows
    assert (best.means["rsum"], best.deviations["rsum"]) == (100, 10)
    assert other.deviations == {}
    assert other.shown("rsum") == "95.0"
    assert {title: texts[0] for title, texts in table(comparison).items()} == {
        "rank": "1",
        "towers": "a × x",
        "model.heads.dropout": "0.3",
        "rsum": "100.0 ± 10.0",
        **{f"{way} R@{k}": "16.7 ± 1.7" for way in ("text → image", "image → text") for k in (1, 5, 10)},
        "parameters": "4.65 M",
        "image latency, ms": "10.0",  # which has nothing to do with the seed
        "features in all": "2.56 kB",
        "run": "3 seeds",
    }


def test_a_repeated_seed_counts_once() -> None:
    records = [record(rsum, options={"seed_everything": 0}) for rsum in (90, 110)]
    (row,) = compared(records, "t").rows
    assert (row.seeds, len(row.records), row.means["rsum"], row.deviations) == (1, 2, 100, {})
    text = markdown(compared(records, "t"))
    assert "±" not in text and "1 seed, repeated" in text and "Several" not in text and "2 runs" not in text
    assert any("1 seed, repeated 100.0" in line for line in printed(compared(records, "t"), 60))
    several = [*records, record(120, options={"seed_everything": 1})]
    (row,) = compared(several, "t").rows
    assert row.shown("rsum") == "110.0 ± 14.1" and "2 seeds, repeated" in markdown(compared(several, "t"))


def test_only_options_that_define_an_experiment_are_columns() -> None:
    kept = {"model.loss": "SigLIP", "model.loss.bias": 1, "trainer.max_epochs": 3}
    ours = {"trainer.default_root_dir": "a", "data.root": "a", "trainer.logger.id": "a", "data.cache": "a"}
    comparison = compared([record(1, options=kept | ours), record(2, options={"model.loss": "InfoNCE"})], "t")
    assert [*comparison.rows[0].options] == ["model.loss", "model.loss.bias", "trainer.max_epochs"]
    assert [row.options["model.loss.bias"] for row in comparison.rows] == [None, 1]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"model.new": None}, {}),  # of a later version, without a value
        (
            {"model.heads.dropout": 1.0, "model.betas": [0.9, 1.0]},
            {"model.heads.dropout": 1, "model.betas": [0.9, 1]},
        ),
        ({"data.read.layout": "auto", "data.read.image_column": "image"}, {"data_artifact": "a:v0"}),
    ],
)
def test_differences_of_versions_and_wandb_are_ignored(one: Any, other: Any) -> None:
    (row,) = compared([record(100, options=one), record(110, options=other)], "t").rows
    assert len(row.records) == 2


def test_an_option_is_a_column_if_it_differs_on_the_same_data() -> None:
    def comparison(digest: str) -> Comparison:
        others = record(3, options={"a": 2, "b": 1}, data_digest=digest)
        records = [record(n, options={"a": 1, "b": n}) for n in (1, 2)]
        return compared([*records, others], "t")

    assert [*comparison("d" * 64).rows[0].options] == ["a", "b"]
    assert [*comparison("e" * 64).rows[0].options] == ["b"]


def test_unfinished_runs_are_separate_marked_rows() -> None:
    records = [record(100), record(120), *(record(300 + n, unfinished="interrupted") for n in range(4))]
    comparison = compared(records, "t")
    found = [(row.means["rsum"], row.first.unfinished) for row in comparison.rows]
    assert found == [(301.5, "interrupted"), (110, "")]
    (warning,) = comparison.warnings
    assert "runs/a-x-300 (interrupted), runs/a-x-301 (interrupted)" in warning
    assert table(comparison)["state"] == ["interrupted", "–"]
    assert [row["unfinished"] for row in comparison.as_dict()["rows"]] == ["interrupted", ""]
    assert "state" not in table(compared([record(100)], "t"))


def test_a_configuration_is_flattened() -> None:
    loss = {"class_path": "clip_lightning.training.losses.SigLIP", "init_args": {"bias": -10}}
    others = {"model.lora": None, "model.betas": [0.9, 0.98], "seed": 0}
    config = {"model": {"loss": loss, "lora": None, "betas": [0.9, 0.98]}, "seed": 0}
    assert flat(config) == {"model.loss": "SigLIP", "model.loss.bias": -10} | others


def test_different_data_are_ranked_separately_with_a_warning() -> None:
    digests = {"a": "d" * 64, "b": "d" * 64, "c": "e" * 64, "d": ""}
    records = [record(100 - n, name, data_digest=digests[name]) for n, name in enumerate(digests)]
    comparison = compared(records, "t")
    assert ranks(comparison) == [(1, "a × x"), (2, "b × x"), (1, "c × x"), (1, "d × x")]
    (warning,) = comparison.warnings
    assert "3 different data sets" in warning
    text = markdown(comparison)
    assert warning in text
    assert re.findall("^## (.*)$", text, re.MULTILINE) == ["Data dddddddd", "Data eeeeeeee", "Unknown data"]


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["pypi:efficientnet-lite0", "owner/model@cls"], ["efficientnet-lite0", "model@cls"]),
        (["random:/home/me/bert@cls", "/home/me/bert"], ["random:bert@cls", "bert"]),
        (["one/model", "two/model"], ["one/model", "two/model"]),  # shorter, they would be the same
        (["resnet18=/weights/a.safetensors"], ["a.safetensors"]),
    ],
)
def test_names_are_short_if_they_are_unique(names: list[str], expected: list[str]) -> None:
    assert list(short_names(names, short_tower).values()) == expected


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
    assert table(comparison)["run"] == ["one/a", "two/a", "b"]
    assert table(comparison)["model.lr"] == ["0", "0.1429", "0.2857"]
    assert "run" not in table(compared([record(100), record(90, "b")], "t"))


def printed(comparison: Comparison, width: int = 80) -> list[str]:
    out = io.StringIO()
    with mock.patch.dict(os.environ, COLUMNS=str(width)), contextlib.redirect_stdout(out):
        print_tables(comparison)
    lines = out.getvalue().splitlines()
    assert all(len(line) <= width or line.startswith("more in index.html") for line in lines)
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
    assert "rank run rsum embed_dim dropout label_smoothing R@1" in lines
    assert "1 20261124-154800-2649 280.0 0.1429 0.02041 0.002915 46.7" in lines
    assert any(line.startswith("more in index.html: model.optimizer.lr, model.opt") for line in lines)


@pytest.mark.parametrize("width", [60, 80, 200])
def test_rank_towers_run_and_rsum_are_printed_at_any_width(width: int) -> None:
    lines = printed(compared(sweep(towers=2), "t"), width)
    text = "".join(lines)
    assert all(f"20261124-15480{n}-2649" in text for n in range(4))
    assert all(f"{280 - n}.0" in text for n in range(4))
    assert text.count("efficientnet-lite1") == 2 and "…" not in text


def test_seeds_and_states_are_printed() -> None:
    towers = ("a", "b" * 30)
    records = [record(n, image, options={"seed_everything": n}) for n in (100, 120) for image in towers]
    lines = printed(compared([*records, record(90, unfinished="crashed")], "t"), 60)
    assert any("2 seeds 110.0 ± 14.1" in line for line in lines)
    assert any("90.0" in line and "crashed" in line for line in lines)


def test_plots_are_in_the_page_and_without_latencies_there_is_no_scatter_plot(tmp_path: Path) -> None:
    for latency, plots in ((10.0, 2), (None, 1)):
        write_comparison(compared([record(100, latency=latency)], "t"), tmp_path)
        names = {path.name for path in tmp_path.iterdir()}
        assert names == {"comparison.md", "comparison.csv", "comparison.json", "index.html"}
        found = re.findall(r'base64,([^"]+)"', (tmp_path / "index.html").read_text())
        assert len(found) == plots
        for plot in found:
            with Image.open(io.BytesIO(base64.b64decode(plot))) as image:
                image.load()
    assert "image latency" not in (tmp_path / "comparison.md").read_text()
    # only failures
    write_comparison(compared([], "t", failed={"a × x": "no such tower"}), tmp_path)
    assert "a × x" in (tmp_path / "index.html").read_text()
    assert "- a × x: no such tower" in (tmp_path / "comparison.md").read_text()


STRANGE = '<script>alert("1")</script> & | 日本語 🐶 $x_1$ \ud83d ' + "w" * 300


def test_the_page_is_self_contained_and_escapes_names(tmp_path: Path) -> None:
    options = {"latency": None, "options": {"o": 1}}
    records = [record(100, STRANGE, STRANGE, options={"o": STRANGE}), record(90, "b", **options)]
    failed = {STRANGE: STRANGE}
    comparison = compared(records, STRANGE, failed=failed, left_out=failed)
    write_comparison(comparison, tmp_path)
    html = (tmp_path / "index.html").read_text()
    places = re.findall(r'(?:src|href)="([^"]*)"', html)
    assert len(places) == 2
    assert all(place.startswith("data:image/png;base64,") for place in places)
    assert "http" not in html and "@import" not in html
    assert '<meta name="viewport" content="width=device-width, initial-scale=1">' in html
    assert "<script" not in html
    shown = table(comparison)
    assert [unescape(title) for title in re.findall('<th scope="col">(.*?)</th>', html)] == [*shown]
    cells = [re.findall("<td>(.*?)</td>", line) for line in html.splitlines() if line.startswith("<tr")]
    texts = [text.encode(errors="replace").decode() for column in shown.values() for text in column]
    assert [unescape(text) for column in zip(*cells, strict=True) for text in column] == texts
    lines = [line for line in (tmp_path / "comparison.md").read_text().splitlines() if line.startswith("|")]
    assert len({len(re.findall(r"(?<!\\)\|", line)) for line in lines}) == 1  # as many cells in each line
    assert "<script>" not in "".join(lines)
