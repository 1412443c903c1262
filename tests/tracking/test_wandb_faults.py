"""What W&B's failures do to a run: nothing. Minutes long, so for `make test-faults` alone."""

import contextlib
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Callback, Trainer
from processes import the_run
from test_lineage import EPOCHS, STEPS, Start, curve, finish, kill_at, start_fixture, sync  # noqa: F401
from wandb_server import WandbServer

pytestmark = [pytest.mark.faults, pytest.mark.slow]


class Pace(Callback):
    """Takes its time over each step, and says when the third epoch begins."""

    def __init__(self, seconds: float, note: str) -> None:
        self.seconds, self.note = seconds, note

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step == 2 * STEPS:
            Path(self.note).touch()
        time.sleep(self.seconds)


def finish_with(
    fault: Callable[[], object], start: Start, root: Path, *more: str, seconds: float, **environment: str
) -> str:
    """Run to the end, with a fault that begins with the third epoch; gives what stderr says."""
    note = root.parent / "third-epoch"

    def wait() -> None:
        while not note.exists():
            time.sleep(0.05)
        fault()

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    pace = [f"--trainer.callbacks.{name}={value}" for name, value in (("seconds", seconds), ("note", note))]
    words = ["--trainer.callbacks+=test_wandb_faults.Pace", *pace, *more]
    said = finish(start, root, *words, **environment)
    thread.join()
    return " ".join(said.split())


def assert_whole_on_disk(folder: Path) -> None:
    assert (folder / "metrics.json").is_file()
    assert (folder / "model" / "model.safetensors").is_file()
    assert (folder / "checkpoints" / "last.ckpt").is_file()


def assert_arrived(server: WandbServer, folder: Path) -> None:
    run = server.runs["tester", "clip-lightning", folder.name]
    assert [step for step, _ in curve(run, "train/loss")] == [*range(EPOCHS * STEPS)]
    assert server.artifact(f"tester/clip-lightning/model-{folder.name}:best").logged_by == run.key
    assert server.artifact(f"tester/clip-lightning/model-{folder.name}-checkpoint:last").committed


@pytest.mark.parametrize("status", [500, None], ids=["500 for a minute", "hangs up for a minute"])
def test_an_outage_loses_nothing(
    wandb_server: WandbServer, start: Start, tmp_path: Path, status: int | None
) -> None:
    finish_with(lambda: wandb_server.fail(60, status=status), start, tmp_path / "runs", seconds=0.5)
    assert_whole_on_disk(the_run(tmp_path / "runs"))
    assert_arrived(wandb_server, the_run(tmp_path / "runs"))


def test_missing_rows_are_sent_afterwards(wandb_server: WandbServer, start: Start, tmp_path: Path) -> None:
    said = finish_with(wandb_server.stop, start, tmp_path / "runs", seconds=0.2, WANDB_FINISH_TIMEOUT="20")
    folder = the_run(tmp_path / "runs")
    assert_whole_on_disk(folder)
    assert "W&B failed to log the model" in said
    assert "upload what is missing later with --ckpt_path last" in said
    wandb_server.recover()
    finish(start, tmp_path / "runs", "--ckpt_path=last")
    assert_arrived(wandb_server, folder)


def fill(disk: Path) -> None:
    """Write until nothing fits any more."""
    time.sleep(2)  # W&B writes every second
    with contextlib.suppress(OSError), (disk / "filler").open("wb", buffering=0) as file:
        while file.write(bytes(4096)):
            pass


@pytest.mark.parametrize("mode", ["online", "offline"])
def test_a_full_disk_under_wandb_does_not_end_training(
    wandb_server: WandbServer, start: Start, disk: Callable[[int], Path], tmp_path: Path, mode: str
) -> None:
    root, small_disk = tmp_path / "runs", disk(8)
    kill_at(start, root, STEPS + 1, WANDB_MODE=mode)
    folder = the_run(root)
    shutil.move(folder / "wandb", small_disk / "wandb")
    (folder / "wandb").symlink_to(small_disk / "wandb")
    given = {"WANDB_MODE": mode, "WANDB_FINISH_TIMEOUT": "20"}
    finish_with(lambda: fill(small_disk), start, root, "--ckpt_path=last", seconds=0.5, **given)
    assert_whole_on_disk(folder)
    (small_disk / "filler").unlink()
    if mode == "offline":
        sync(folder)
    run = wandb_server.runs["tester", "clip-lightning", folder.name]
    steps = [step for step, _ in curve(run, "train/loss")]
    assert steps == [*range(len(steps))]
    assert len(steps) >= 2 * STEPS, "what was logged before the disk was full"
