"""Shards and kills: a conversion that is killed ends the same, and training from litdata loses no sample."""

from __future__ import annotations

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

import pytest
import torch
from lightning.pytorch import Callback, Trainer

from clip_lightning.data.shards.manifest import FILE, Manifest

pytestmark = pytest.mark.faults

KILLS = 20
EPOCH, EPOCHS = 8, 2  # 32 pictures in batches of 4


def run(words: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(Path(__file__).parent), os.environ["PYTHONPATH"]])
    line = [sys.executable, "-m", "clip_lightning", *words]
    env = {**os.environ, "PYTHONPATH": path}
    return subprocess.run(line, env=env, capture_output=True, text=True, timeout=300, **options)


@pytest.mark.parametrize("kind", ["litdata", "webdataset"])
def test_a_conversion_killed_at_random_moments_ends_the_same(tmp_path: Path, kind: str) -> None:
    from clip_lightning.data.scenes import write_scenes

    write_scenes(tmp_path / "scenes", count=3000, size=64, seed=0)

    def words(out: str) -> list[str]:
        options = [
            "--to",
            kind,
            "--out",
            str(tmp_path / out),
            "--samples_per_shard",
            "40",
            "--short_side",
            "48",
        ]
        return ["data", "convert", str(tmp_path / "scenes"), *options]

    began = time.monotonic()
    assert run(words("undisturbed")).returncode == 0
    whole = time.monotonic() - began
    chance, killed = random.Random(kind), 0
    for _ in range(KILLS):
        line = [sys.executable, "-m", "clip_lightning", *words("killed")]
        process = subprocess.Popen(line, start_new_session=True, stderr=subprocess.DEVNULL)
        try:
            process.wait(whole * chance.uniform(0.3, 0.6))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            killed += 1
        if (tmp_path / "killed" / FILE).exists():
            break
    assert killed >= 2
    done = run(words("killed"))
    assert done.returncode == 0, done.stderr
    once, again = (Manifest.find(str(tmp_path / name)) for name in ("undisturbed", "killed"))
    assert once is not None and again is not None and once.splits == again.splits
    files = [
        sorted(str(path.relative_to(tmp_path / name)) for path in (tmp_path / name).rglob("*"))
        for name in ("undisturbed", "killed")
    ]
    assert files[0] == files[1], "nothing is left of what was begun"
    for file in ("train/fields.parquet", *(["train/index.json"] if kind == "litdata" else [])):
        assert (tmp_path / "undisturbed" / file).read_bytes() == (tmp_path / "killed" / file).read_bytes()


class NotesNames(Callback):
    """Writes down what each step sees, and ends the process at one."""

    def __init__(self, folder: str, step: int | None = None) -> None:
        self.folder, self.step = Path(folder), step

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == self.step and trainer.is_global_zero:  # which tells the other ranks
            os.kill(os.getpid(), signal.SIGTERM)
        keys = [name.rpartition("#")[2] for name in batch["names"]]
        line = json.dumps([trainer.current_epoch, trainer.global_step, keys])
        with (self.folder / f"names-{os.getpid()}").open("a") as file:
            file.write(f"{line}\n")


@pytest.fixture(scope="module")
def litdata(scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("shards") / "litdata"
    done = run(
        ["data", "convert", str(scenes), "--to", "litdata", "--out", str(out), "--samples_per_shard", "5"]
    )
    assert done.returncode == 0, done.stderr
    return out


@pytest.fixture
def fit(command: Callable[..., list[str]], litdata: Path, tmp_path: Path) -> Callable[..., int]:
    """Runs `fit` from litdata's shards in a folder; returns its exit status."""

    def do(name: str, *more: str, step: int | None = None, **changes: Any) -> int:
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        options = {
            "data__dataset": "shards",
            "data__root": litdata,
            "data__shards__window": 2,
            "data__captions_per_image": 2,
            "data__augmentation__min_scale": 0.5,
            "data__cache": "off",
            "model__freeze": "none",
            "trainer__max_epochs": EPOCHS,
            "trainer__callbacks+": "test_shard_faults.NotesNames",
            "trainer__callbacks__folder": folder,
            **({} if step is None else {"trainer__callbacks__step": step}),
        }
        done = run([*command("fit", folder / "runs", **options | changes), *more])
        (folder / "said").write_text(done.stderr)
        return done.returncode

    return do


def seen(folder: Path) -> dict[int, list[str]]:
    """Step → the keys of its samples on all ranks; of a step that was begun twice those of the last time."""
    steps: dict[int, list[str]] = {}
    files = sorted(folder.glob("names-*"), key=lambda file: file.stat().st_mtime)
    lines = [[json.loads(line) for line in file.read_text().splitlines()] for file in files]
    for part in lines:
        for _, step, keys in part:
            steps[step] = sorted([*steps.get(step, []), *keys])
    return steps


def last(folder: Path) -> dict[str, Any]:
    (file,) = folder.glob("runs/*/checkpoints/last.ckpt")
    return torch.load(file, weights_only=True)


def test_from_two_workers_to_one_the_weights_are_those_of_an_undisturbed_run(
    fit: Callable[..., int], tmp_path: Path
) -> None:
    assert fit("undisturbed", data__num_workers=0) == 0
    assert fit("resumed", step=5, data__num_workers=2) == 143
    reached = last(tmp_path / "resumed")["global_step"]
    assert reached in (5, 6)
    assert fit("resumed", "--ckpt_path=last", data__num_workers=1) == 0, (
        tmp_path / "resumed/said"
    ).read_text()
    one, other = last(tmp_path / "undisturbed"), last(tmp_path / "resumed")
    assert one["global_step"] == other["global_step"] == EPOCH * EPOCHS
    assert all(torch.equal(value, other["state_dict"][name]) for name, value in one["state_dict"].items())


def test_from_two_ranks_to_one_no_sample_is_lost_or_repeated(fit: Callable[..., int], tmp_path: Path) -> None:
    two = {"trainer__devices": 2, "trainer__strategy": "ddp", "data__batch_size": 2}
    assert fit("undisturbed") == 0
    assert fit("resumed", step=5, **two) == 143, (tmp_path / "resumed/said").read_text()
    reached = last(tmp_path / "resumed")["global_step"]
    before = {step: keys for step, keys in seen(tmp_path / "resumed").items() if step < reached}
    for file in (tmp_path / "resumed").glob("names-*"):
        file.unlink()
    assert fit("resumed", "--ckpt_path=last") == 0, (tmp_path / "resumed/said").read_text()
    after = seen(tmp_path / "resumed")
    assert list(after) == list(range(reached, EPOCH * EPOCHS)), "it went on from where it was"
    assert before | after == seen(tmp_path / "undisturbed")
    epoch = [key for step in range(EPOCH) for key in (before | after)[step]]
    assert len(epoch) == len(set(epoch)) == 32
