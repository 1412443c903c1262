"""The commands `compare-backbones` and `compare`."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import DEFAULT, Mock

import pytest
import torch
import yaml
from lightning.pytorch import Callback
from processes import At
from wandb_server import WandbServer

from clip_lightning.__main__ import main
from clip_lightning.data.features import FeatureCache
from clip_lightning.data.formats import read_captions
from clip_lightning.evaluation.predictions import spaced
from clip_lightning.experiments import backbones, run_records
from clip_lightning.experiments.run_records import RECALLS, image_latency
from clip_lightning.model.clip import CLIP
from clip_lightning.model.encode import encode_texts
from clip_lightning.model.towers import TextTower
from clip_lightning.training.cli import rehearse

Refused = Callable[..., str]
Run = Callable[..., dict]
Printed = pytest.CaptureFixture[str]
Patch = pytest.MonkeyPatch
Words = Callable[..., list[str]]
IMAGES = "random:test_resnet,random:test_vit"
FILES = {"comparison.md", "comparison.csv", "comparison.json", "index.html"}


@pytest.fixture(scope="session")
def words(bert: Path, command: Words) -> Words:
    """Builds the options of a small comparison of 2 × 2 towers; keywords with two underscores for dots."""

    def build(out: Path | None, **changes: Any) -> list[str]:
        options = {"model__image_tower": ..., "model__text_tower": ..., "image_towers": IMAGES}
        options |= {"text_towers": f"{bert},{bert}@cls", "data__batch_size": 8, "data__captions_per_image": 1}
        options |= {"trainer__precision": 32, "trainer__max_epochs": 1, "predictions__queries": 0}
        options |= {"trainer__check_val_every_n_epoch": 1, "trainer__default_root_dir": "runs"}
        options |= {} if out is None else {"out": out, "data__cache": out.parent / "features"}
        return command("compare-backbones", Path(), **(options | changes))

    return build


def result(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "comparison.json").read_text())


def runs_of(folder: Path) -> dict[str, Path]:
    """Name of a pair's folder without the digest → its only run."""
    return {config.parents[1].name[:-9]: config.parent for config in folder.glob("runs/*/*/config.yaml")}


# every pair of towers


@pytest.fixture(scope="module")
def finished(words: Words, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A comparison of 2 × 2 towers."""
    folder = tmp_path_factory.mktemp("comparison") / "finished"
    assert main(words(folder)) == 0
    yield folder


def test_every_pair_is_trained_once_on_features_computed_once(finished: Path) -> None:
    assert {path.name for path in finished.iterdir()} == FILES | {"runs"}
    resnet, vit = (f"random_test_{name}_x_bert" for name in ("resnet", "vit"))
    assert sorted(runs_of(finished)) == [f"{resnet}-0", f"{resnet}@cls-0", f"{vit}-0", f"{vit}@cls-0"]
    keys = [entry.key for entry in FeatureCache(finished.parent / "features").entries()]
    images = [(key["name"], key["view"]) for key in keys if key["kind"] == "image"]
    trained_and_validated = [(name, view) for name in IMAGES.split(",") for view in (0, 0, 1)]
    assert sorted(images) == sorted(trained_and_validated)
    texts = [key["name"].rpartition("/")[2] for key in keys if key["kind"] == "text"]
    assert sorted(texts) == ["bert", "bert", "bert@cls", "bert@cls"]


def test_the_table_matches_the_runs(finished: Path) -> None:
    rows = result(finished)["rows"]
    assert [row["rsum"] for row in rows] == sorted((row["rsum"] for row in rows), reverse=True)
    for row in rows:
        (place,) = row["places"]
        metrics = json.loads(Path(place, "metrics.json").read_text())
        clip = CLIP.from_pretrained(Path(place, "model"))
        assert {name: row[name] for name in RECALLS} == {name: round(metrics[name], 4) for name in RECALLS}
        assert row["parameters"] == sum(p.numel() for p in clip.parameters())
        trained = [*clip.heads.parameters(), clip.logit_scale]
        assert row["parameters_trained"] == sum(p.numel() for p in trained)
        assert row["feature_bytes_per_picture"] == 2 * clip.image_tower.width
        # 32 training images in two views, and 4 validation images; all have five captions
        features = 2 * (clip.image_tower.width * (2 * 32 + 4) + clip.text_tower.width * 5 * 36)
        assert features < row["feature_bytes"] <= features + 5 * 128  # a header a file
        assert 0 <= row["training_seconds"] <= metrics["seconds"]
    latencies = {row["image_tower"]: row["image_latency_ms"] for row in rows}
    assert all(row["image_latency_ms"] == latencies[row["image_tower"]] > 0 for row in rows)
    assert result(finished)["latency_conditions"] == ["one image, fp32, CPU with 1 threads"]


def test_nothing_is_trained_twice(finished: Path, words: Words, monkeypatch: Patch, capsys: Printed) -> None:
    monkeypatch.setattr(backbones, "fit", lambda *_: pytest.fail("trained again"))
    before = result(finished)
    assert main([*words(finished), "--json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out) == before | {"folder": str(finished)}
    assert "pair 3 of 4: random:test_vit × bert: finished, rsum " in err


def test_other_settings_or_data_are_trained_again(
    finished: Path, words: Words, monkeypatch: Patch, scenes: Path, tmp_path: Path
) -> None:
    asked: list[list[str]] = []
    monkeypatch.setattr(backbones, "fit", lambda words, *_: asked.append(words))
    folder, fewer = tmp_path / "c", tmp_path / "fewer"
    shutil.copytree(finished, folder)
    shutil.copytree(scenes, fewer)
    for changes, trainings in (
        ({}, 0),  # the folder of the cache is another one
        ({"data__num_workers": 1, "predictions__queries": 3}, 0),
        ({"seeds": 2}, 4),
        ({"model__heads__dropout": 0.2}, 4),
        ({"image_towers": "random:test_resnet@max,random:test_vit"}, 2),
        ({"data__root": fewer}, 0),  # the same data elsewhere
        ({"data__read__splits__val_fraction": 0.2}, 4),
    ):
        asked.clear()
        main(words(folder, **changes))
        assert len(asked) == trainings, changes


def test_a_folder_is_found_again(words: Words, tmp_path: Path, monkeypatch: Patch, capsys: Printed) -> None:
    """And two lines per pair, besides the progress of features, are all that is printed."""
    monkeypatch.chdir(tmp_path)
    given = words(None, image_towers="random:test_resnet", data__cache=tmp_path / "features")
    assert main(given) == 0
    err = capsys.readouterr().err.replace("\r", "\n").splitlines()
    said = [line.partition(":")[0] for line in err if line and "row/s]" not in line]
    assert said[0].startswith("read captions.csv")
    assert said[1:] == ["pair 1 of 2"] * 2 + ["pair 2 of 2"] * 2
    (folder,) = Path("runs").iterdir()
    assert main(given) == 0
    assert list(Path("runs").iterdir()) == [folder]
    assert f"resuming the comparison in {folder}" in capsys.readouterr().err


def test_failed_pairs_are_listed_and_retried(
    words: Words, bert: Path, tmp_path: Path, monkeypatch: Patch, capsys: Any
) -> None:
    fit = Mock(wraps=backbones.fit, side_effect=[RuntimeError("the disk\nis full"), DEFAULT, DEFAULT])
    monkeypatch.setattr(backbones, "fit", fit)
    given = words(tmp_path / "c", text_towers=bert)
    assert main(given) == 1
    out, err = capsys.readouterr()
    assert "1 of 2 pairs failed" in err and "Traceback" in err
    assert "random:test_vit × bert" in out
    broken = {"name": "random:test_resnet × bert", "reason": "RuntimeError: the disk is full"}
    assert result(tmp_path / "c")["failed"] == [broken]
    assert "the disk is full" in (tmp_path / "c" / "index.html").read_text()
    assert main(given) == 0
    assert fit.call_count == 3
    assert len(result(tmp_path / "c")["rows"]) == 2


def test_ctrl_c_saves_and_is_resumed(words: Words, bert: Path, tmp_path: Path, monkeypatch: Patch) -> None:
    fit, asked = backbones.fit, []

    def interrupted_second(words: list[str], callbacks: list[Callback]) -> Path:
        asked.append(words)
        return fit(words, [*callbacks, *([At(6)] if len(asked) == 2 else [])])

    monkeypatch.setattr(backbones, "fit", interrupted_second)
    given = words(tmp_path / "c", text_towers=bert, trainer__max_epochs=2)
    assert main(given) == 130
    assert [row["name"] for row in result(tmp_path / "c")["rows"]] == ["random:test_resnet × bert"]
    assert main(given) == 0
    assert len(asked) == 3  # the finished pair is not asked for again
    stopped = runs_of(tmp_path / "c")["random_test_vit_x_bert-0"]
    assert asked[2][-1] == f"--ckpt_path={stopped / 'checkpoints' / 'last.ckpt'}"
    assert torch.load(stopped / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 8
    assert len(result(tmp_path / "c")["rows"]) == 2


def test_scores_without_training(
    words: Words, finished: Path, tmp_path: Path, monkeypatch: Patch, ran: Any, printed: Run
) -> None:
    monkeypatch.setattr(backbones, "fit", lambda *_: pytest.fail("trained"))
    cache = finished.parent / "features"
    before = {entry.path for entry in FeatureCache(cache).entries()}
    given = [*words(tmp_path / "s", data__cache=cache), "--score=true"]
    found = printed(*given)
    assert found["images"] == 32 and found["seconds_per_pair"] >= 0
    shares = [row["mutual_neighbors"] for row in found["rows"]]
    assert len(shares) == 4 and shares == sorted(shares, reverse=True)
    assert all(0 <= row["cka"] <= 1 and 0 <= row["mutual_neighbors"] <= 100 for row in found["rows"])
    assert {path.name for path in (tmp_path / "s").iterdir()} == {"scores.md", "scores.csv", "scores.json"}
    assert json.loads((tmp_path / "s" / "scores.json").read_text()) == found
    entries = FeatureCache(cache).entries()
    assert {entry.key["kind"] for entry in entries if entry.path not in before} <= {"image"}
    assert "32 images" in ran(*given).out
    assert {entry.path for entry in FeatureCache(cache).entries()} == {entry.path for entry in entries}


def test_scores_are_those_of_the_features(
    words: Words, bert: Path, scenes: Path, tmp_path: Path, monkeypatch: Patch, printed: Run
) -> None:
    """With a broken image, and more images than are scored."""
    monkeypatch.setattr(backbones, "MOST_IMAGES", 20)
    root = shutil.copytree(scenes, tmp_path / "scenes")
    train = [image for image in read_captions(root).images if image.split == "train"]
    chosen = [train[row] for row in spaced(32, 20).tolist()]
    chosen.pop(3).path.write_bytes(b"nothing")
    towers = {"image_towers": "random:test_vit", "text_towers": bert, "data__root": root}
    cka = Mock(wraps=backbones.linear_cka)
    monkeypatch.setattr(backbones, "linear_cka", cka)
    assert printed(*words(tmp_path / "s", **towers), "--score=true", "--seed_everything=5")["images"] == 19
    image, text = cka.call_args.args
    features = encode_texts(TextTower.from_name(str(bert)), [image.captions[0] for image in chosen])
    assert torch.allclose(text, features, atol=2e-3)  # half precision
    assert len(image) == 19 and image.isfinite().all()


def test_a_configuration_and_precedence_of_the_command_line(
    words: Words, tmp_path: Path, monkeypatch: Patch
) -> None:
    asked: list[list[str]] = []
    monkeypatch.setattr(backbones, "fit", lambda words, *_: asked.append(words))
    loss = {"class_path": "InfoNCE", "init_args": {"label_smoothing": 0.2}}
    content = {"seed_everything": 5, "model": {"heads": {"embed_dim": 16}, "loss": loss}}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(content))
    given = words(tmp_path / "c", seeds=2, image_towers="random:test_vit", model__heads__embed_dim=8)
    main(["compare-backbones", f"--config={tmp_path / 'mine.yaml'}", *given[1:]])
    assert len(asked) == 4
    config = rehearse(asked[1]).config["fit"]
    assert (config.seed_everything, config.model.image_tower) == (6, "random:test_vit")
    assert config.model.heads.embed_dim == 8
    assert config.model.loss.init_args.label_smoothing == 0.2


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"image_towers": ...}, "--image_towers: expected names separated by commas"),
        ({"text_towers": "a,,b"}, "--text_towers: expected names separated by commas"),
        ({"image_towers": f"random:nosuch,{IMAGES}"}, "is not an architecture of timm"),
        ({"model__init_from": "bundle"}, "remove --model.init_from"),
        ({"ckpt_path": "last"}, "--ckpt_path last"),
        ({"trainer__devices": 2}, "on one device; remove --trainer.devices"),
        ({"score": "true", "data__cache": "off"}, "remove --data.cache off"),
    ],
)
def test_invalid_options_print_one_line(
    words: Words, tmp_path: Path, refused: Refused, changes: dict[str, Any], expected: str
) -> None:
    assert expected in refused(*words(tmp_path / "c", **changes))


# finished runs


def write_run(folder: Path, rsum: float | None, digest: str = "d" * 64, **model: Any) -> Path:
    """What a run leaves behind, as far as a comparison reads it."""
    folder.mkdir(parents=True)
    config = {"seed_everything": 0, "model": {"image_tower": "a", "text_tower": "x", **model}}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    if rsum is not None:
        recalls = dict.fromkeys(RECALLS, rsum / 6)
        times = {"seconds": 50.0, "seconds_preparation": 30.0, "data_digest": digest}
        (folder / "metrics.json").write_text(json.dumps({**recalls, "rsum": rsum, **times}))
    return folder


def test_finished_runs_are_measured_and_compared(finished: Path, tmp_path: Path) -> None:
    """Of a run that was no part of a comparison, only the bundle is there to be measured."""
    plain = tmp_path / "plain"
    shutil.copytree(next(iter(runs_of(finished).values())), plain)
    (plain / "costs.json").unlink()
    assert main(["compare", str(finished), str(plain), f"--out={tmp_path / 'c'}"]) == 0
    assert {path.name for path in (tmp_path / "c").iterdir()} == FILES
    rows = {row["name"]: row for row in result(tmp_path / "c")["rows"]}
    assert len(rows) == 4
    (twice,) = (row for row in rows.values() if row["runs"] == 2)
    assert str(plain) in twice["places"]
    alone = {row["name"]: row for row in result(finished)["rows"]}[twice["name"]]
    assert twice["rsum"] == alone["rsum"] and twice["seeds"] == 1 and twice["std"] == {}
    assert twice["parameters"] == alone["parameters"]
    assert twice["parameters_trained"] == alone["parameters_trained"]
    assert twice["image_latency_ms"] > 0


def test_options_and_data_that_differ_are_shown_and_runs_without_results_are_left_out(
    tmp_path: Path, monkeypatch: Patch, capsys: Printed
) -> None:
    for n, dropout in ((1, 0.1), (2, 0.3)):
        loss = {"class_path": "b.SigLIP", "init_args": {}}
        write_run(tmp_path / "runs" / str(n), 100 * n, heads={"dropout": dropout}, loss=loss)
    write_run(tmp_path / "runs" / "3", None)
    write_run(tmp_path / "runs" / "6", 300, digest="e" * 64)
    (write_run(tmp_path / "runs" / "4", 1) / "metrics.json").write_text('{"seconds": 1}')
    (write_run(tmp_path / "runs" / "5", 1) / "metrics.json").write_text("{")
    (write_run(tmp_path / "runs" / "7", 1) / "config.yaml").write_text("a text")
    monkeypatch.chdir(tmp_path)  # every run counts once, whatever the spelling of its path
    assert main(["compare", "--json", str(tmp_path / "runs"), "runs", "--out", str(tmp_path / "c")]) == 0
    out, err = capsys.readouterr()
    table = json.loads(out)
    rows = [(row["rank"], row["rsum"], row["options"]["model.heads.dropout"]) for row in table["rows"]]
    assert rows == [(1, 200, 0.3), (2, 100, 0.1), (1, 300, None)], "one run has other data"
    assert {row["training_seconds"] for row in table["rows"]} == {20}
    assert "WARNING: these runs were scored on 2 different data sets" in err
    reasons = [each["reason"] for each in table["left_out"]]
    assert [reason.split()[0] for reason in reasons] == ["it", "it", "its", "its"]
    assert err.count("left out") == 4 and {row["runs"] for row in table["rows"]} == {1}
    assert "model.heads.dropout" in (tmp_path / "c" / "comparison.md").read_text()


def test_interrupted_runs_are_marked(
    words: Words, bert: Path, finished: Path, tmp_path: Path, capsys: Printed
) -> None:
    pair = {"image_towers": ..., "text_towers": ..., "model__image_tower": "random:test_vit"}
    pair |= {"model__text_tower": bert, "trainer__max_epochs": 2, "data__cache": tmp_path}
    at = ["--trainer.callbacks=processes.At", "--trainer.callbacks.step=6"]
    fit = words(None, **pair, trainer__default_root_dir=tmp_path / "runs")[1:]
    assert main(["fit", "--config=heads", *fit, *at]) == 130
    capsys.readouterr()
    assert main(["compare", "--json", str(tmp_path / "runs"), str(finished), f"--out={tmp_path / 'c'}"]) == 0
    out, err = capsys.readouterr()
    rows = {row["unfinished"]: row for row in json.loads(out)["rows"]}
    assert rows.keys() == {"interrupted", ""} and str(tmp_path) in rows["interrupted"]["places"][0]
    assert "(interrupted)" in err
    costs = {"parameters", "parameters_trained", "training_seconds", "image_latency_ms"}
    assert rows["interrupted"].keys() > costs, "which no comparison has trained"


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ([], "there is nothing to compare; give run folders"),
        (["unfinished"], "left out unfinished: it has no results, as it has just begun or"),
        (["run", "--group=g"], "--group selects runs of a W&B project"),
        (["run", "--out=file"], "--out file is a file; give a folder"),
        (["--out", "--json", "run"], "--out"),
        (["wandb:project"], "expected wandb:ENTITY/PROJECT"),
        (["wandb:entity/project"], "no W&B API key is configured"),
    ],
)
def test_invalid_runs_print_one_line(
    tmp_path: Path, monkeypatch: Patch, refused: Refused, given: list[str], expected: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    write_run(Path("unfinished"), None)
    write_run(Path("run"), 1)
    assert expected in refused("compare", *given)


# Weights & Biases


def test_pairs_are_runs_of_one_group_which_can_be_compared(
    words: Words, bert: Path, wandb_server: WandbServer, tmp_path: Path, printed: Run, refused: Refused
) -> None:
    given = words(tmp_path / "ours", text_towers=bert, trainer__logger=..., trainer__max_epochs=2)
    assert main(given) == 0
    runs = list(wandb_server.runs.values())
    assert [run.display_name for run in runs] == ["random:test_resnet × bert", "random:test_vit × bert"]
    assert {(run.group, run.state) for run in runs} == {("ours", "finished")}
    theirs = ["compare", f"--out={tmp_path / 'theirs'}"]
    table = printed(*theirs, "wandb:tester/clip-lightning", "--group=ours")
    local = result(tmp_path / "ours")
    for ours, online in zip(local["rows"], table["rows"], strict=True):
        same = ours.keys() - {"places", "training_seconds"}
        assert {name: online[name] for name in same} == {name: ours[name] for name in same}
        difference = online["training_seconds"] - ours["training_seconds"]
        assert difference > -0.11, "it is measured after it, and both are rounded to tenths"
    (row,) = printed(*theirs, f"wandb:tester/clip-lightning/{runs[0].id}")["rows"]
    mixed = printed(*theirs, tmp_path / "ours", "wandb:tester/clip-lightning")["rows"]  # the same runs twice
    assert [(row["runs"], row["seeds"], row["options"], row["std"]) for row in mixed] == [(2, 1, {}, {})] * 2
    wandb_server.runs["tester", "clip-lightning", runs[0].id].state = "crashed"
    found = printed(*theirs, f"wandb:tester/clip-lightning/{runs[0].id}")
    assert found["rows"][0]["unfinished"] == "crashed"
    assert row["places"] == [f"wandb:tester/clip-lightning/{runs[0].id}"]
    for place, group in (("tester/nosuch", []), ("tester/clip-lightning", ["--group=nosuch"])):
        assert f"wandb:{place}" in refused(*theirs, f"wandb:{place}", *group)


# costs


def test_measuring_does_not_change_the_model(make_clip: Callable[..., CLIP], monkeypatch: Patch) -> None:
    monkeypatch.setattr(run_records, "_latencies", {})  # those that other tests have measured
    clip = make_clip().train()
    before = {name: value.clone() for name, value in clip.state_dict().items()}
    measured = image_latency(clip)
    assert 0 < measured["image_latency_ms"] < 1000
    assert measured["image_latency_conditions"] == "one image, fp32, CPU with 1 threads"
    assert clip.training
    assert all(torch.equal(value, before[name]) for name, value in clip.state_dict().items())
    assert clip.logit_scale.grad is None
