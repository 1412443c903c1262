"""The end of a run, and resuming it with other options."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Callback, LightningModule, Trainer
from processes import assert_same_state, checkpoint, the_run

from clip_lightning.__main__ import main
from clip_lightning.data.scenes import write_scenes
from clip_lightning.training.runs import changed_options

# Lightning 2.6 calls jsonargparse by names that its newest versions deprecate.
pytestmark = pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning")
Command = Callable[..., list[str]]
EPOCH = 8  # batches of 4 of the 32 training scenes
validated: list[int] = []


class Notes(Callback):
    """Notes the step of each validation."""

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        validated.append(trainer.global_step)


class WithinWindow(Callback):
    """Asks for the end, as Ctrl-C does, while the gradients of step 1 are accumulated."""

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if trainer.global_step == 1 and trainer.fit_loop.epoch_loop.batch_progress.current.ready == 4:
            signal.raise_signal(signal.SIGINT)


def metrics(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "metrics.json").read_text())


def contents(*folders: Path) -> dict[Path, bytes]:
    return {file: file.read_bytes() for folder in folders for file in folder.rglob("*") if file.is_file()}


NOTES = ["--trainer.callbacks", "test_resume.Notes"]


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({"trainer__check_val_every_n_epoch": 4, "trainer__max_epochs": 1}, [EPOCH]),
        ({"trainer__check_val_every_n_epoch": 2, "trainer__max_epochs": 3}, [2 * EPOCH, 3 * EPOCH]),
        ({"trainer__check_val_every_n_epoch": 4, "trainer__max_steps": EPOCH + 3}, [EPOCH + 3]),
        ({"trainer__val_check_interval": 5, "trainer__max_epochs": 1}, [5, EPOCH]),
    ],
)
def test_the_last_step_is_validated(
    command: Command, tmp_path: Path, options: dict[str, Any], steps: list[int]
) -> None:
    validated.clear()
    assert main([*command("fit", tmp_path, predictions__queries=0, **options), *NOTES]) == 0
    assert validated == steps
    assert metrics(the_run(tmp_path))["step"] in steps
    assert (the_run(tmp_path) / "checkpoints" / "best.ckpt").is_file()


@pytest.mark.filterwarnings("ignore:.*could not find the monitored key:UserWarning")
def test_a_run_without_validation_prints_it(
    command: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command("fit", tmp_path, trainer__max_epochs=1, trainer__limit_val_batches=0)) == 0
    assert "no epoch was validated" in capsys.readouterr().err
    assert "rsum" not in metrics(the_run(tmp_path))
    assert not (the_run(tmp_path) / "checkpoints" / "best.ckpt").exists()


@pytest.fixture(scope="module")
def begun(command: Command, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The runs folder with one finished run of trained towers, whose learning rate of 0 ended it early."""
    root = tmp_path_factory.mktemp("begun")
    assert main(command("fit", root / "runs", **STOPS)) == 0
    folder = the_run(root / "runs")
    (folder / "wandb").mkdir()
    (folder / "wandb" / f"history-{folder.name}.jsonl").write_text("{}\n")
    yield root / "runs"


RATES = {f"model__optimizer.{name}": 0 for name in ("lr", "image_lr", "text_lr")}
STOPS = {
    "model__freeze": "image",
    "data__batch_size": 16,
    "predictions__queries": 0,
    "early_stopping__patience": 1,
    "trainer__max_epochs": 9,
    **RATES,
}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"data__root": ...}, "the checkpoint was trained with data (digest)"),
        ({"seed_everything": 5}, "another frozen image_tower"),  # which is drawn from it
        ({"data__batch_size": 8}, "--data.batch_size × ranks 16, but this run has 8"),
        ({"model__optimizer.layer_decay": 0.5}, "with the parameter groups"),
    ],
)
@pytest.mark.parametrize("name", ["last", "best"])
def test_a_rejected_resume_writes_and_computes_nothing(
    command: Command,
    begun: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    options: dict[str, Any],
    message: str,
    name: str,
) -> None:
    if "data__root" in options:
        write_scenes(tmp_path / "other", count=40, size=32, seed=1)
        options = {"data__root": tmp_path / "other"}
    words = command("fit", begun, **{**STOPS, **options, "data__cache": tmp_path / "cache"})
    before = contents(begun)
    assert main([*words, "--ckpt_path", name]) == 2
    assert message in capsys.readouterr().err
    assert contents(begun) == before
    assert not (tmp_path / "cache").exists()


def test_a_run_that_stopped_early_stays_finished(
    command: Command, begun: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = checkpoint(the_run(begun))
    assert before["global_step"] < 9 * 2, "it has stopped early"
    assert main([*command("fit", begun, **STOPS), "--ckpt_path=auto"]) == 0
    assert "the run has stopped early" in capsys.readouterr().err
    assert checkpoint(the_run(begun))["global_step"] == before["global_step"]
    assert metrics(the_run(begun))["finished"]


def test_changed_options_apply_after_a_resume(
    command: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = command("fit", tmp_path, predictions__queries=0, data__batch_size=16, trainer__max_epochs=2)
    assert main([*words, "--model.optimizer.lr=0.002", "--early_stopping.patience=3"]) == 0
    capsys.readouterr()
    changed = {"lr": 0.004, "weight_decay": 0.3, "betas": [0.8, 0.9]}
    changes = [f"--model.optimizer.{name}={value}" for name, value in changed.items()]
    changes += ["--trainer.max_epochs=4", "--early_stopping.patience=7"]
    assert main([*words, *changes, "--ckpt_path=last"]) == 0
    said = capsys.readouterr().err
    for line in ("--model.optimizer.lr 0.004 (was 0.002)", "--early_stopping.patience 7 (was 3)"):
        assert f"changed: {line}\n" in said
    assert "the learning rate of step 4 of 8 is now 0.00" in said
    after = checkpoint(the_run(tmp_path))
    for group in after["optimizer_states"][0]["param_groups"]:
        assert group["initial_lr"] == 0.004
        assert tuple(group["betas"]) == (0.8, 0.9)
        assert group["weight_decay"] in (0.3, 0.0)
    (stopping,) = (state for key, state in after["callbacks"].items() if key.startswith("EarlyStopping"))
    assert stopping["patience"] == 7


def test_options_that_a_resume_ignores_are_listed() -> None:
    before = "model: {init_from: a, loss: {init_args: {init_scale: 1, smoothing: 0}}}"
    now = "model: {init_from: b, loss: {init_args: {init_scale: 2, smoothing: 1}}, lora: {r: 2}}"
    ignored = "; ignored, since the checkpoint contains the weights"
    assert changed_options(before, now) == [
        f'--model.init_from "b" (was "a"){ignored}',
        f"--model.loss.init_args.init_scale 2 (was 1){ignored}",
        "--model.loss.init_args.smoothing 1 (was 0)",
        "--model.lora.r 2 (was null)",
    ]


def test_a_stop_within_accumulated_gradients_is_bit_identical(command: Command, tmp_path: Path) -> None:
    options = {"trainer__accumulate_grad_batches": 3, "trainer__max_epochs": 2, "predictions__queries": 0}
    assert main(command("fit", tmp_path / "whole", **options)) == 0
    words = command("fit", tmp_path / "stopped", **options)
    assert main([*words, "--trainer.callbacks", "test_resume.WithinWindow"]) == 130
    stopped = the_run(tmp_path / "stopped")
    assert checkpoint(stopped)["global_step"] == 2
    assert main([*words, "--ckpt_path=last"]) == 0
    assert_same_state(checkpoint(the_run(tmp_path / "whole")), checkpoint(stopped))
