"""`fit`, `validate`, `test` as a person runs them: what they leave, how they stop, go on and complain."""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch import Callback, LightningModule, Trainer

from clip_lightning import __version__
from clip_lightning.__main__ import main
from clip_lightning.errors import UserError
from clip_lightning.model.clip import CLIP
from clip_lightning.training.cli import RunCLI, run_as
from clip_lightning.training.fitting import rehearse

# Lightning 2.6 calls jsonargparse by names that its newest versions deprecate.
pytestmark = pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning")

Command = Callable[..., list[str]]
EPOCH = 8  # batches of 4 of the 32 training scenes
METRICS = {
    f"{direction}_{metric}"
    for direction in ("text_to_image", "image_to_text")
    for metric in ("R@1", "R@5", "R@10", "median_rank", "mean_rank")
}


class At(Callback):
    """Does something when a step begins: Ctrl-C, or a note that it is time for a signal, then slow steps."""

    def __init__(self, step: int, note: str | None = None) -> None:
        self.step, self.note = step, note

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, index: int
    ) -> None:
        if self.note and trainer.global_step >= self.step:
            Path(self.note).touch()
            time.sleep(0.3)
        elif trainer.global_step == self.step:
            raise KeyboardInterrupt


class Asks(Callback):
    """Presses Ctrl-C when a step begins."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, index: int
    ) -> None:
        if trainer.global_step == self.step:
            signal.raise_signal(signal.SIGINT)


class InValidation(Callback):
    """Ctrl-C while the first epoch is scored."""

    def on_validation_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        raise KeyboardInterrupt


def the_run(root: Path) -> Path:
    (folder,) = root.iterdir()
    return folder


def checkpoint(folder: Path, name: str = "last") -> dict[str, Any]:
    return torch.load(folder / "checkpoints" / f"{name}.ckpt", weights_only=True)


def assert_same_weights(folder: Path, other: Path) -> None:
    """Bit for bit, the optimiser's state too."""
    a, b = checkpoint(folder), checkpoint(other)
    assert a["global_step"] == b["global_step"]
    for name, tensor in a["state_dict"].items():
        assert torch.equal(tensor, b["state_dict"][name]), name
    (first,), (second,) = a["optimizer_states"], b["optimizer_states"]
    for key, state in first["state"].items():
        assert all(torch.equal(value, second["state"][key][name]) for name, value in state.items())


# what a run leaves


@pytest.fixture(scope="module")
def finished(command: Command, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A run with everything on, the W&B logger too."""
    import wandb

    root = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_DATA_DIR", "")  # so that what the logger sets is taken back
        patch.delenv("WANDB_DATA_DIR")
        assert main(command("fit", root, trainer__logger=..., trainer__enable_progress_bar=...)) == 0
        wandb.finish()
    yield the_run(root)


def test_metrics_are_flat_and_complete(finished: Path) -> None:
    assert re.fullmatch(r"\d{8}-\d{6}-[0-9a-f]{8}", finished.name)
    metrics = json.loads((finished / "metrics.json").read_text())
    assert METRICS < set(metrics)
    assert all(0 <= metrics[name] <= 100 for name in METRICS if "R@" in name)
    recalls = sum(metrics[name] for name in METRICS if "R@" in name)
    assert metrics["rsum"] == pytest.approx(recalls, abs=0.01)
    assert metrics["step"] == EPOCH * (metrics["epoch"] + 1)
    assert min(metrics[name] for name in ("seconds", "samples_per_second", "peak_memory_bytes")) > 0
    assert re.fullmatch("[0-9a-f]{64}", metrics["data_digest"])
    assert metrics["version_clip_lightning"] == __version__
    assert metrics["version_torch"].startswith(torch.__version__.partition("+")[0])
    assert all(isinstance(value, int | float | str) for value in metrics.values())


def test_checkpoints_load_and_hold_no_frozen_tower(finished: Path) -> None:
    last, best = checkpoint(finished), checkpoint(finished, "best")
    metrics = json.loads((finished / "metrics.json").read_text())
    assert last["global_step"] == 2 * EPOCH
    assert best["global_step"] == metrics["step"]
    assert set(last["frozen_towers"]) == {"clip.image_tower", "clip.text_tower"}
    assert not [name for name in last["state_dict"] if "tower" in name]


def test_the_bundle_is_the_best_epoch(finished: Path) -> None:
    clip = CLIP.from_pretrained(finished / "model")
    stored = checkpoint(finished, "best")["state_dict"]
    assert torch.equal(clip.heads.image[1].weight, stored["clip.heads.image.1.weight"])
    assert clip.embed_texts(["a red circle"]).shape == (1, 16)
    config = json.loads((finished / "model" / "config.json").read_text())
    metrics = json.loads((finished / "metrics.json").read_text())
    assert config["metrics"]["rsum"] == metrics["rsum"]
    assert config["training_data"]["digest"] == metrics["data_digest"]


def test_predictions_can_be_looked_at(finished: Path) -> None:
    page = (finished / "predictions.html").read_text()
    assert "<html" in page.lower()
    assert 'id="misses"' in page


def test_the_wandb_run_has_the_config_and_the_digest(finished: Path) -> None:
    (record,) = finished.glob(f"wandb/offline-run-*/run-{finished.name}.wandb")
    content = record.read_bytes()
    digest = json.loads((finished / "metrics.json").read_text())["data_digest"]
    for wanted in ("data_digest", digest, "random:test_resnet", "val/rsum", "val/predictions", "train/loss"):
        assert wanted.encode() in content, wanted


def test_nothing_else_is_left(finished: Path) -> None:
    """W&B's own folders apart."""
    found = {path.name for path in finished.iterdir()} - {"wandb", "artifacts"}
    bundle = {"model", "metrics.json", "config.yaml"}
    assert found == {*bundle, "checkpoints", "predictions", "predictions.html"}
    names = {path.name for path in (finished / "checkpoints").iterdir()}
    assert names == {"last.ckpt", "previous.ckpt", "best.ckpt"}


def test_the_config_starts_the_same_run_anew(finished: Path, tmp_path: Path) -> None:
    config = yaml.safe_load((finished / "config.yaml").read_text())
    assert config["model"]["heads"]["embed_dim"] == 16
    assert config["data"]["splits"]["val_fraction"] == 0.1  # defaults are written out
    assert config["ckpt_path"] is None
    again = ["--trainer.default_root_dir", str(tmp_path), "--trainer.logger", "false"]
    assert main(["fit", "--config", str(finished / "config.yaml"), *again]) == 0
    folder = the_run(tmp_path)
    assert folder.name != finished.name
    assert_same_weights(folder, finished)
    rerun = yaml.safe_load((folder / "config.yaml").read_text())
    assert rerun["model"] == config["model"]
    assert rerun["data"] == config["data"]


@pytest.mark.parametrize(("fast", "precision"), [(True, "bf16-mixed"), (False, "32-true")])
def test_a_cpu_without_fast_bf16_trains_in_fp32(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fast: bool, precision: str
) -> None:
    monkeypatch.setattr("clip_lightning.training.cli.cpu_computes_in_bf16", lambda: fast)
    words = command("fit", tmp_path, trainer__precision="bf16-mixed", trainer__fast_dev_run="true")
    ran = run_as(RunCLI, words)
    assert ran.trainer.precision == precision
    assert yaml.safe_load(ran.config_to_save)["trainer"]["precision"] == "bf16-mixed"


def test_a_loss_of_ones_own_is_found_in_the_working_directory(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "ownloss.py").write_text(
        "from clip_lightning.training.losses import InfoNCE\n\n\nclass Focal(InfoNCE):\n    pass\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [place for place in sys.path if place not in ("", str(tmp_path))])
    words = command("fit", tmp_path / "runs", model__loss="ownloss.Focal", trainer__max_epochs=1)
    assert main(words) == 0
    (run,) = (tmp_path / "runs").iterdir()
    assert json.loads((run / "model" / "config.json").read_text())["loss"] == "Focal"


def test_validate_and_test_print_and_leave_nothing(
    finished: Path, command: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    metrics = json.loads((finished / "metrics.json").read_text())
    for name, given in (
        ("validate", "best"),
        ("test", "last"),
        ("validate", finished / "checkpoints/best.ckpt"),
    ):
        capsys.readouterr()
        assert main(command(name, finished.parent, ckpt_path=given, trainer__logger=...)) == 0
        printed = capsys.readouterr().out
        (rsum,) = re.findall(r"^rsum ([\d.]+)$", printed, flags=re.MULTILINE)
        assert name == "test" or float(rsum) == pytest.approx(metrics["rsum"], abs=0.05)
        assert ("val" if name == "validate" else "test") in printed.splitlines()[0]
        assert the_run(finished.parent) == finished


def test_keys_in_a_url_are_recorded_nowhere(
    command: Command, scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path))
    archive = Path(shutil.make_archive(str(tmp_path / "scenes"), "zip", scenes))
    words = command(
        "fit",
        tmp_path / "runs",
        data__root=...,
        trainer__logger=...,
        trainer__max_epochs=1,
    )
    words += [
        f"--data.root=file://{archive}?X-Signature=secret"
        f"#sha256={hashlib.sha256(archive.read_bytes()).hexdigest()}"
    ]
    monkeypatch.setattr(sys, "argv", ["clip-lightning", *words])
    assert main(words) == 0
    wandb = importlib.import_module("wandb")
    wandb.finish()
    assert sys.argv[1:] == words
    files = [file for file in tmp_path.rglob("*") if file.is_file()]
    (log,) = (file for file in files if file.suffix == ".wandb")
    assert b"scenes.zip" in log.read_bytes()
    assert not [file for file in files if b"X-Signature" in file.read_bytes()]


@pytest.mark.parametrize("words", [["--data.root", ""], ["--data.root="], ["--data.cache="]])
def test_an_empty_option_is_no_folder(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", *words]) == 2
    assert f"{words[0].rstrip('=')} is empty; give a value" in capsys.readouterr().err


def test_home_is_found_wherever_a_path_is_given(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "c.yaml"
    file.write_text("data: {root: ~/scenes}\nzero_shot: {data: ~/classes, names: ~/names.txt}")
    config = rehearse([f"--config={file}", *command("", Path("~/runs"), data__root=...)[1:]]).config["fit"]
    assert (config.data.root, config.zero_shot.data) == (f"{tmp_path}/scenes", f"{tmp_path}/classes")
    assert config.zero_shot.names == tmp_path / "names.txt"
    assert main(command("fit", Path("~/runs"), model__image_tower="test_vit=~/weights.pth")) == 2
    assert f"no weights file '{tmp_path}/weights.pth'" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c.yaml", "runs"]
    file.write_text("data: {root: ''}")
    with pytest.raises(UserError, match=r"^--data\.root is empty in a configuration"):
        rehearse([f"--config={file}", *command("", tmp_path, data__root=...)[1:]])


def test_a_csv_logger(command: Command, tmp_path: Path) -> None:
    options = {"trainer__logger": "CSVLogger", "trainer__log_every_n_steps": 2}
    assert main(command("fit", tmp_path, **options)) == 0
    header, *rows = (the_run(tmp_path) / "metrics.csv").read_text().splitlines()
    assert {"train/loss", "train/samples_per_second", "val/rsum", "step"} < set(header.split(","))
    assert len(rows) >= 2 * EPOCH / 2


def test_a_way_of_ones_own_to_write_checkpoints(command: Command, tmp_path: Path) -> None:
    plugin = "lightning.fabric.plugins.TorchCheckpointIO"
    assert main(command("fit", tmp_path, trainer__plugins=plugin, trainer__max_epochs=1)) == 0
    assert (the_run(tmp_path) / "checkpoints" / "last.ckpt").is_file()


def test_metrics_with_and_without_the_cache_are_nearly_equal(command: Command, tmp_path: Path) -> None:
    weights = []
    for cache in ("off", tmp_path / "cache"):
        options = {
            "data__cache": cache,
            "data__augmentation.flip": "false",
            "model__image_tower": "random:test_vit",
        }
        assert main(command("fit", tmp_path / Path(cache).name / "runs", **options)) == 0
        weights.append(checkpoint(the_run(tmp_path / Path(cache).name / "runs"))["state_dict"])
    assert list((tmp_path / "cache").glob("*/manifest.json"))
    for name, tensor in weights[0].items():
        difference = (tensor - weights[1][name]).norm() / tensor.norm().clamp(min=1e-6)
        assert difference < 0.02, name


# stopping and going on

WHOLE = {"trainer__max_epochs": 3}


@pytest.fixture(scope="module")
def undisturbed(command: Command, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """The run that nobody stops, once for each set of options."""
    runs: dict[str, Path] = {}

    def get(**options: Any) -> Path:
        key = repr(sorted(options.items()))
        if key not in runs:
            root = tmp_path_factory.mktemp("undisturbed")
            assert main(command("fit", root, **WHOLE, **options)) == 0
            runs[key] = the_run(root)
        return runs[key]

    return get


TRAINED = {"model__freeze": "none", "data__cache": "off"}
WAYS: dict[str, dict[str, Any]] = {
    "cached features": {},
    "trained towers": TRAINED,
    "workers": TRAINED | {"data__num_workers": 2},
    "image tower cached": {"model__freeze": "image"},
    "accumulated gradients": {"trainer__accumulate_grad_batches": 2},
}


MOMENTS = [("cached features", 3), ("cached features", EPOCH)]
MOMENTS += [("workers", EPOCH), *((way, EPOCH + 3) for way in WAYS)]


@pytest.mark.parametrize(("way", "step"), MOMENTS)
def test_going_on_is_bit_identical(
    command: Command, undisturbed: Callable[..., Path], tmp_path: Path, way: str, step: int
) -> None:
    """Stopped in the middle of an epoch, of the first one, and at the start of the second."""
    options = WAYS[way]
    step //= options.get("trainer__accumulate_grad_batches", 1)
    words = command("fit", tmp_path, **WHOLE, **options)
    assert main([*words, "--trainer.callbacks", "test_cli.At", "--trainer.callbacks.step", str(step)]) == 130
    folder = the_run(tmp_path)
    assert checkpoint(folder)["global_step"] == step
    assert CLIP.from_pretrained(folder / "model")
    assert "seconds" in json.loads((folder / "metrics.json").read_text())
    assert main([*words, "--ckpt_path", "last"]) == 0
    assert the_run(tmp_path) == folder
    assert_same_weights(folder, undisturbed(**options))
    ours, theirs = (
        json.loads((run / "metrics.json").read_text()) for run in (folder, undisturbed(**options))
    )
    assert {name: ours[name] for name in METRICS} == {name: theirs[name] for name in METRICS}


AT = ["--trainer.callbacks", "test_cli.At", "--trainer.callbacks.step"]


def test_stopped_twice(command: Command, undisturbed: Callable[..., Path], tmp_path: Path) -> None:
    words = command("fit", tmp_path, **WHOLE)
    again = [*words, "--ckpt_path", "last"]
    assert main([*words, *AT, "3"]) == 130
    assert main([*again, *AT, "6"]) == 130
    folder = the_run(tmp_path)
    assert checkpoint(folder)["global_step"] == 6
    assert main(again) == 0
    assert_same_weights(folder, undisturbed())


@pytest.mark.parametrize(("asked", "stopped"), [(2, 3), (EPOCH - 1, EPOCH + 1)])
def test_ctrl_c_finishes_the_batch_and_an_epochs_validation(
    command: Command, undisturbed: Callable[..., Path], tmp_path: Path, asked: int, stopped: int
) -> None:
    words = command("fit", tmp_path, **WHOLE)
    ask = ["--trainer.callbacks", "test_cli.Asks", "--trainer.callbacks.step", str(asked)]
    assert main([*words, *ask]) == 130
    folder = the_run(tmp_path)
    assert checkpoint(folder)["global_step"] == stopped
    assert main([*words, "--ckpt_path", "last"]) == 0
    assert_same_weights(folder, undisturbed())
    ours, theirs = (json.loads((run / "metrics.json").read_text()) for run in (folder, undisturbed()))
    assert {name: ours[name] for name in METRICS} == {name: theirs[name] for name in METRICS}
    assert "ckpt_path: null" in (folder / "config.yaml").read_text()


def test_a_run_that_was_moved_keeps_its_best_epoch(command: Command, tmp_path: Path) -> None:
    assert main(command("fit", tmp_path / "here", **WHOLE)) == 0
    folder = the_run(tmp_path / "here")
    before = json.loads((folder / "metrics.json").read_text())
    (tmp_path / "here").rename(tmp_path / "there")
    longer = {**WHOLE, "trainer__max_epochs": 3, "model__optimizer.lr": 0}
    assert main([*command("fit", tmp_path / "there", **longer), "--ckpt_path", "last"]) == 0
    folder = the_run(tmp_path / "there")
    after = json.loads((folder / "metrics.json").read_text())
    assert after["rsum"] >= before["rsum"]
    assert checkpoint(folder, "best")["global_step"] == after["step"]


# Lightning does not make up for that validation: the epoch has no score.
@pytest.mark.filterwarnings("ignore:.*could not find the monitored key:UserWarning")
def test_stopped_in_a_validation(command: Command, undisturbed: Callable[..., Path], tmp_path: Path) -> None:
    words = command("fit", tmp_path, **WHOLE)
    assert main([*words, "--trainer.callbacks", "test_cli.InValidation"]) == 130
    assert checkpoint(the_run(tmp_path))["global_step"] == EPOCH
    assert main([*words, "--ckpt_path", "last"]) == 0
    assert_same_weights(the_run(tmp_path), undisturbed())


@dataclass
class Stopped:
    """A process that a signal stopped."""

    status: int
    errors: str
    folder: Path
    words: list[str]


@pytest.fixture(scope="module", params=["SIGINT", "SIGTERM"])
def stopped(
    request: pytest.FixtureRequest, command: Command, tmp_path_factory: pytest.TempPathFactory
) -> Stopped:
    """A real process with the W&B logger, sent a signal from outside in the middle of its second epoch."""
    base = tmp_path_factory.mktemp(request.param)
    words = command("fit", base / "runs", **WHOLE, trainer__logger=...)
    note = base / "now"
    at = ["--trainer.callbacks", "test_cli.At", f"--trainer.callbacks.step={EPOCH + 2}"]
    path = os.pathsep.join([str(Path(__file__).parent), os.environ["PYTHONPATH"]])
    # a W&B service of its own, as a command of its own has
    environment = {name: value for name, value in os.environ.items() if name != "WANDB_SERVICE"}
    environment["PYTHONPATH"] = path
    process = subprocess.Popen(
        [sys.executable, "-m", "clip_lightning", *words, *at, f"--trainer.callbacks.note={note}"],
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    deadline = time.monotonic() + 60
    while not note.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    time.sleep(0.1)
    process.send_signal(getattr(signal, request.param))
    errors = process.communicate(timeout=60)[1]
    expected = {"SIGINT": 130, "SIGTERM": 143}[request.param]
    assert process.returncode == expected, errors
    return Stopped(process.returncode, errors, the_run(base / "runs"), words)


def test_a_stopped_run_goes_on_where_it_was(
    stopped: Stopped, undisturbed: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    import wandb

    folder = stopped.folder
    assert "--ckpt_path last goes on from here" in stopped.errors
    assert "Traceback" not in stopped.errors
    step = checkpoint(folder)["global_step"]
    assert EPOCH + 2 < step < 2 * EPOCH  # a whole batch more, and in the middle
    assert CLIP.from_pretrained(folder / "model")
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["step"] == EPOCH  # of the one validation there was
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_DATA_DIR", "")
        patch.delenv("WANDB_DATA_DIR")
        assert main([*stopped.words, "--ckpt_path", "last"]) == 0
        assert wandb.run.id == folder.name
        wandb.finish()
    assert the_run(folder.parent) == folder
    assert f"going on from {folder / 'checkpoints' / 'last.ckpt'}" in capsys.readouterr().err
    assert len(list(folder.glob(f"wandb/offline-run-*/run-{folder.name}.wandb"))) == 2
    assert_same_weights(folder, undisturbed())
    assert json.loads((folder / "metrics.json").read_text())["seconds"] > metrics["seconds"]


@pytest.mark.parametrize("given", ["last", "best"])
def test_without_a_run_nothing_starts(
    command: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str], given: str
) -> None:
    (tmp_path / "runs" / "stray" / "checkpoints").mkdir(parents=True)
    assert main(command("fit", tmp_path / "runs", ckpt_path=given)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"clip-lightning: error: --ckpt_path {given}: no run")
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["stray"]


def test_last_is_the_newest_run(command: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, age in (("newer", 10), ("older", 1000)):
        file = tmp_path / name / "checkpoints" / "last.ckpt"
        file.parent.mkdir(parents=True)
        file.write_bytes(b"")
        (tmp_path / name / "config.yaml").write_text("trainer:\n")
        os.utime(tmp_path / name / "config.yaml", (time.time() - age, time.time() - age))
    assert main(command("fit", tmp_path, ckpt_path="last")) == 2
    assert f"{tmp_path / 'newer'}/checkpoints/last.ckpt is damaged (it is cut off" in capsys.readouterr().err
    (tmp_path / "newer" / "checkpoints" / "last.ckpt").unlink()
    assert main(command("fit", tmp_path, ckpt_path="last")) == 2
    assert f"the newest run, {tmp_path / 'newer'}, has no last.ckpt" in capsys.readouterr().err
    # of another program: a run that resumes there would overwrite it
    (tmp_path / "newer" / "config.yaml").write_text("title: my pages\n")
    assert main(command("fit", tmp_path, ckpt_path="last")) == 2
    assert f"{tmp_path / 'older'}/checkpoints/last.ckpt is damaged" in capsys.readouterr().err


# wrong input


@dataclass(frozen=True)
class Wrong:
    """Words, and what the one line says: the option or the thing, and the remedy."""

    says: str
    options: dict[str, Any]
    more: tuple[str, ...] = ()


def wrong(says: str, *more: str, **options: Any) -> Wrong:
    return Wrong(says, options, more)


WRONG: dict[str, Wrong] = {
    "no such folder": wrong(r"no folder or file /nowhere; give .* --data\.root", data__root="/nowhere"),
    "empty folder": wrong(r"FILES/empty holds no image .* check --data\.root", data__root="FILES/empty"),
    "no data": wrong(r"give --data\.root a folder, .* or give --data\.dataset scenes", data__root=...),
    "no caption column": wrong(
        r"no caption column: found image, remark, expected one of caption, .*--data\.root",
        data__root="FILES/remarks.csv",
    ),
    "unknown image tower": wrong(r"'resnet8'; near names: resnet18", model__image_tower="resnet8"),
    "no image tower": wrong(r"give --model\.image_tower and", model__image_tower=...),
    "hub tower offline": wrong(
        r"'bert-base-uncasd' .*hub.*pypi:minilm-l6; did you mean bert-base-uncased\?",
        model__text_tower="bert-base-uncasd",
    ),
    "image weights offline": wrong(
        r"weights of image tower 'resnet18' .*random:", model__image_tower="resnet18"
    ),
    "max_length too long": wrong(
        r"--model\.towers\.max_length 65 .* 64 positions, give 3 to 64", model__towers__max_length=65
    ),
    "no image size": wrong(r"--data\.image_size 0: expected", data__image_size=0),
    "unknown key in YAML": wrong(
        r"'model\.embd_dim'; did you mean --model\.heads\.embed_dim", "--config", "FILES/key.yaml"
    ),
    "no YAML": wrong(r"--config FILES/broken\.yaml is not YAML", "--config", "FILES/broken.yaml"),
    "unknown config": wrong(r"no configuration 'headz': .*heads", "--config", "headz"),
    "a folder as config": wrong(r"no configuration 'FILES'", "--config=FILES"),
    "misspelt option": wrong(r"--data\.batchsize; did you mean --data\.batch_size", "--data.batchsize", "4"),
    "misspelt short option": wrong(r"--ckptpath; did you mean --ckpt_path\?", "--ckptpath", "last"),
    "abbreviated option": wrong(
        r"--trainer\.max_ep; did you mean --trainer\.max_epochs", "--trainer.max_ep", "3"
    ),
    "abbreviated plain option": wrong(r"--ckpt; did you mean --ckpt_path", "--ckpt", "last"),
    "stray word": wrong(r"unrecognized arguments: heads", "heads"),
    "batch of none": wrong(r"--data\.batch_size 0: expected 1 or more", data__batch_size=0),
    "batch of words": wrong(
        r"--data\.batch_size: expected a whole number, got many", data__batch_size="many"
    ),
    "fewer than no workers": wrong(r"--data\.num_workers -1: expected 0", data__num_workers=-1),
    "share beyond one": wrong(
        r"--data\.splits\.val_fraction 2.0: expected a fraction", data__splits__val_fraction=2
    ),
    "cache below nothing": wrong(
        r"--data\.cache_options\.gigabytes -1: expected", data__cache_options__gigabytes=-1
    ),
    "cache is a file": wrong(r"cache at FILES/key\.yaml .* --data\.cache off", data__cache="FILES/key.yaml"),
    "dropout": wrong(r"--model\.heads\.dropout 2.0: expected", model__heads__dropout=2),
    "embedding of none": wrong(r"--model\.heads\.embed_dim 0", model__heads__embed_dim=0),
    "micro-batch of none": wrong(r"--model\.micro_batch_size 0", model__micro_batch_size=0),
    "warm-up": wrong(r"--model\.optimizer\.warmup 3.0: expected", **{"model__optimizer.warmup": 3}),
    "learning rate": wrong(r"--model\.optimizer\.lr -1.0: expected", **{"model__optimizer.lr": -1}),
    "unknown freeze": wrong(
        r"--model\.freeze: expected none or image or text or both, got all", model__freeze="all"
    ),
    "unknown loss": wrong(r"--model\.loss: expected the name of a class", model__loss="Nonsense"),
    "unknown precision": wrong(
        r"--trainer\.precision: expected .*bf16-mixed.*got bf17", trainer__precision="bf17"
    ),
    "unknown logger": wrong(r"--trainer\.logger: expected the name of a class", trainer__logger="Nonsense"),
    "no such device": wrong(r"--trainer: .*accelerator.*abacus", trainer__accelerator="abacus"),
    "no devices": wrong(r"devices", trainer__devices=0),
    "no end": wrong(r"--trainer\.max_epochs or --trainer\.max_steps", trainer__max_epochs=-1),
    "seed": wrong(r"--seed_everything: -5", seed_everything=-5),
    "runs in a file": wrong(
        r"--trainer\.default_root_dir .* another folder", trainer__default_root_dir="FILES/key.yaml"
    ),
    "checkpoint is a folder": wrong(r"--ckpt_path FILES/empty is a folder", ckpt_path="FILES/empty"),
    "no such checkpoint": wrong(r"--ckpt_path FILES/none\.ckpt: no such file", ckpt_path="FILES/none.ckpt"),
    "no checkpoint at all": wrong(r"key\.yaml is damaged .it is cut off or no", ckpt_path="FILES/key.yaml"),
    "sharded": wrong(
        r"--trainer\.strategy fsdp shards the weights of trained towers, and none is trained",
        trainer__strategy="fsdp",
    ),
    "another frozen tower": wrong(
        r"another frozen image_tower than .*--model options", ckpt_path="LAST", seed_everything=7
    ),
    "frozen there, not here": wrong(
        r"--ckpt_path .* trained with image_tower and text_tower frozen; give the same --model options",
        ckpt_path="LAST",
        model__freeze="image",
    ),
    "another batch": wrong(
        r"trained with --data\.batch_size × ranks 4, this is 8; give the same",
        ckpt_path="LAST",
        data__batch_size=8,
    ),
    "another split": wrong(
        r"trained with data \(digest\) .* give the same data", data__root="FILES/changed", ckpt_path="LAST"
    ),
    "a loss with a bias": wrong(
        r"of another model \(it lacks clip\.logit_bias\)", ckpt_path="LAST", model__loss="SigLIP"
    ),
    "another length": wrong(
        r"its longest text is 64, here 32; give", ckpt_path="LAST", model__towers__max_length=32
    ),
    "another width": wrong(
        r"is of another model .*\(16, .*--model options", ckpt_path="LAST", model__heads__embed_dim=8
    ),
    "another head": wrong(
        r"is of another model \(it has .*--model options", ckpt_path="LAST", model__heads__kind="mlp"
    ),
}


@pytest.fixture(scope="module")
def files(scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What wrong input needs."""
    folder = tmp_path_factory.mktemp("files")
    (folder / "empty").mkdir()
    (folder / "remarks.csv").write_text("image,remark\na.jpg,nice\n")
    (folder / "key.yaml").write_text("model:\n  embd_dim: 3\n")
    (folder / "broken.yaml").write_text("model: [1,\n")
    shutil.copytree(scenes, folder / "changed")
    table = folder / "changed" / "captions.csv"
    table.write_text(table.read_text().replace("circle", "disc"))
    return folder


def assert_one_line(errors: str, says: str) -> None:
    lines = [line for line in errors.splitlines() if line.startswith("clip-lightning: error:")]
    assert len(lines) == 1, errors
    assert re.search(says, lines[0]), lines[0]
    assert errors.splitlines()[-1] == lines[0]
    assert "Traceback" not in errors
    progress = ("Seed set to", "training ", "run folder:", "going on from", "GPU available", "")
    for line in errors.splitlines()[:-1]:
        assert line.startswith(progress) or "row/s" in line, line


@pytest.mark.parametrize("name", WRONG)
def test_a_mistake_is_one_line(
    command: Command,
    files: Path,
    finished: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    name: str,
) -> None:
    case = WRONG[name]

    def place(text: Any) -> Any:
        if not isinstance(text, str):
            return text
        return text.replace("FILES", str(files)).replace("LAST", str(finished / "checkpoints" / "last.ckpt"))

    options = {key: place(value) for key, value in case.options.items()}
    status = main([*command("fit", tmp_path / "runs", **options), *map(place, case.more)])
    captured = capsys.readouterr()
    assert status == 2
    assert captured.out == ""
    assert_one_line(captured.err, place(case.says))
    assert not list(tmp_path.glob("runs/*/checkpoints"))
    assert not Path("lightning_logs").exists()


COMMANDS = {
    "unknown command": (["fitt"], r"unknown command 'fitt'; did you mean fit"),
    "no options": (["fit"], r"give --model\.image_tower and --model\.text_tower"),
    "no word for the config": (["fit", "--config"], r"--config: expected one argument"),
    "cache alone": (["cache"], r"list,prune"),
    "unknown part of cache": (["cache", "lst"], r"'lst'.*list"),
    "nothing to keep": (["cache", "prune"], r"missing: --keep_gb"),
    "no number": (["cache", "prune", "--keep_gb", "x"], r"--keep_gb: expected a number, got x"),
    "misspelt": (["cache", "list", "--foldr", "x"], r"--foldr x; did you mean --folder\?"),
    "abbreviated": (["cache", "list", "--fold", "x"], r"--fold x; did you mean --folder\?"),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_a_wrong_command_is_one_line(capsys: pytest.CaptureFixture[str], name: str) -> None:
    words, says = COMMANDS[name]
    assert main(words) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert len(captured.err.splitlines()) == 1
    assert_one_line(captured.err, says)


def test_no_words_show_what_there_is(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "usage: clip-lightning COMMAND" in capsys.readouterr().out
    assert main(["--help"]) == 0
    assert "fit --config quickstart" in capsys.readouterr().out
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"{__version__}\n"


def test_scoring_a_split_that_is_not_there(
    command: Command, scenes: Path, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "scenes"
    shutil.copytree(scenes, folder)
    rows = (folder / "captions.csv").read_text().splitlines()
    (folder / "captions.csv").write_text("\n".join(row for row in rows if not row.endswith(",test")))
    last = finished / "checkpoints" / "last.ckpt"
    assert main(command("test", tmp_path / "runs", data__root=folder, ckpt_path=last)) == 2
    assert_one_line(capsys.readouterr().err, r"has no test split; give data that has one")


def test_too_many_broken_pictures_stop_the_run(
    command: Command, scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "scenes"
    shutil.copytree(scenes, folder)
    for name in ("00000.jpg", "00001.jpg"):
        (folder / name).write_bytes(b"")
    assert main(command("fit", tmp_path / "strict", data__root=folder, trainer__max_epochs=1)) == 2
    assert "--data.max_broken 0.01; fix them" in capsys.readouterr().err.splitlines()[-1]
    with pytest.warns(UserWarning, match="left out"):
        assert main(command("fit", tmp_path / "mild", data__root=folder, data__max_broken=0.1)) == 0
    broken = json.loads((the_run(tmp_path / "mild") / "broken.json").read_text())
    assert sorted(Path(path).name for path in broken) == ["00000.jpg", "00001.jpg"]


def test_a_name_does_not_steer_the_terminal(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "check", "\x1b[2Jx"]) == 2
    assert "\x1b" not in capfd.readouterr().err
