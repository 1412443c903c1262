"""Kills: a conversion ends the same, training from tars loses no sample, a lost loader is one line."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from lightning.pytorch import Callback, Trainer
from processes import assert_same_state, checkpoint, clip_lightning, the_run

from clip_lightning.data.shards.index import FILE

Command = Callable[..., list[str]]
pytestmark = pytest.mark.faults

KILLS = 20
EPOCH, EPOCHS = 8, 2  # 32 images in batches of 4


def test_a_killed_conversion_resumes_to_the_same_result(tmp_path: Path) -> None:
    from clip_lightning.data.scenes import write_scenes

    write_scenes(tmp_path / "scenes", count=3000, size=64, seed=0)
    options = ["--samples_per_shard", "40", "--short_side", "48", "--out"]
    arguments = ["data", "convert", str(tmp_path / "scenes"), *options]
    began = time.monotonic()
    assert clip_lightning(*arguments, tmp_path / "undisturbed").returncode == 0
    seconds = time.monotonic() - began
    chance, killed = random.Random(0), 0
    for _ in range(KILLS):
        line = [sys.executable, "-m", "clip_lightning", *arguments, str(tmp_path / "killed")]
        process = subprocess.Popen(line, start_new_session=True, stderr=subprocess.DEVNULL)
        try:
            process.wait(seconds * chance.uniform(0.3, 0.6))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            killed += 1
        if (tmp_path / "killed" / FILE).exists():
            break
    assert killed >= 2
    done = clip_lightning(*arguments, tmp_path / "killed")
    assert done.returncode == 0, done.stderr
    contents = [
        {str(path.relative_to(folder)): path.is_file() and path.read_bytes() for path in folder.rglob("*")}
        for folder in (tmp_path / "undisturbed", tmp_path / "killed")
    ]
    assert contents[0] == contents[1], "nothing is left of what was begun"


class NotesNames(Callback):
    """Notes what each step sees, and ends the process at one."""

    def __init__(self, folder: str, step: int | None = None) -> None:
        self.folder, self.step = Path(folder), step

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == self.step and trainer.is_global_zero:  # which tells the other ranks
            os.kill(os.getpid(), signal.SIGTERM)
        keys = [name.rpartition("#")[2] for name in batch["names"]]
        with (self.folder / f"names-{os.getpid()}").open("a") as file:
            file.write(json.dumps([trainer.global_step, keys]) + "\n")


def seen(folder: Path) -> dict[int, list[str]]:
    """Step → the keys of its samples on all ranks."""
    steps: dict[int, list[str]] = {}
    for file in folder.glob("names-*"):
        for step, keys in map(json.loads, file.read_text().splitlines()):
            steps[step] = sorted([*steps.get(step, []), *keys])
    return steps


def test_resuming_on_fewer_ranks_loses_no_sample(command: Command, scenes: Path, tmp_path: Path) -> None:
    tars = tmp_path / "tars"
    words = ("data", "convert", scenes, "--samples_per_shard", 5, "--out", tars)
    assert clip_lightning(*words).returncode == 0

    def fit(name: str, *more: str, **changes: Any) -> subprocess.CompletedProcess[str]:
        (tmp_path / name).mkdir(exist_ok=True)
        options = {"data__root": tars, "data__shards__window": 2, "data__captions_per_image": 2}
        options |= {"data__cache": "off", "model__freeze": "none", "trainer__max_epochs": EPOCHS}
        options |= {"trainer__callbacks+": "test_shard_faults.NotesNames"}
        options |= {"trainer__callbacks__folder": tmp_path / name}
        return clip_lightning(*command("fit", tmp_path / name / "runs", **options | changes), *more)

    two = {"trainer__devices": 2, "trainer__strategy": "ddp", "data__batch_size": 2, "data__num_workers": 1}
    assert fit("undisturbed").returncode == 0
    ended = fit("resumed", trainer__callbacks__step=5, **two)
    assert ended.returncode == 143, ended.stderr
    reached = checkpoint(the_run(tmp_path / "resumed" / "runs"))["global_step"]
    before = {step: keys for step, keys in seen(tmp_path / "resumed").items() if step < reached}
    for file in (tmp_path / "resumed").glob("names-*"):
        file.unlink()
    ended = fit("resumed", "--ckpt_path=last", data__num_workers=2)
    assert ended.returncode == 0, ended.stderr
    after = seen(tmp_path / "resumed")
    assert list(after) == list(range(reached, EPOCH * EPOCHS)), "it continued where it was"
    assert before | after == seen(tmp_path / "undisturbed")
    epoch = [key for step in range(EPOCH) for key in (before | after)[step]]
    assert len(epoch) == len(set(epoch)) == 32


class KillsWorker(Callback):
    """Ends a loader process when the twelfth step begins."""

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == 11:
            loaders = [c for c in psutil.Process().children() if "clip_lightning" in " ".join(c.cmdline())]
            loaders[0].send_signal(signal.SIGKILL)


def test_a_loader_process_is_killed(command: Command, tmp_path: Path) -> None:
    def fit(folder: Path, *more: str) -> subprocess.CompletedProcess[str]:
        options = {"data__cache": "off", "model__freeze": "none", "data__num_workers": 2}
        options |= {"predictions__queries": 0, "trainer__max_epochs": 3}
        return clip_lightning(*command("fit", folder, **options), *more)

    whole = fit(tmp_path / "whole")
    assert whole.returncode == 0, whole.stderr
    killed = fit(tmp_path / "killed", "--trainer.callbacks+=test_shard_faults.KillsWorker")
    assert killed.returncode == 1
    assert "Traceback" not in killed.stderr
    message = killed.stderr.splitlines()[-1]
    assert "another process of this run has ended" in message and "exited unexpectedly" in message
    assert "--ckpt_path last" in message
    assert EPOCH <= checkpoint(the_run(tmp_path / "killed"))["global_step"] <= 16
    again = fit(tmp_path / "killed", "--ckpt_path=last")
    assert again.returncode == 0, again.stderr
    one, other = (checkpoint(the_run(tmp_path / name)) for name in ("whole", "killed"))
    assert one["global_step"] == 3 * EPOCH
    assert_same_state(one, other)
