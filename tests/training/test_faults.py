"""Runs whose processes are killed or stopped, whose disk is full, and that are long.

A run that is stopped at random steps and resumed has the same weights as without the interruption. If one of
several processes dies, the others stop with one line. A full disk loses no earlier file. Ten thousand steps
need no more memory than two thousand.
"""

import errno
import gc
import json
import random
import signal
import statistics
import subprocess
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from lightning.pytorch import Callback, Trainer
from processes import assert_same_state, checkpoint, clip_lightning, ends_at, the_run

from clip_lightning.data.shards.convert import Settings, captioned, convert
from clip_lightning.model.clip import CLIP
from clip_lightning.training.module import CLIPModule

Command = Callable[..., list[str]]
pytestmark = pytest.mark.faults

EPOCH = 8  # steps
TRAINED: dict[str, Any] = {"model__freeze": "none", "data__cache": "off", "predictions__queries": 0}
MICRO = {"model__micro_batch_size": 2, "checkpoint__every_n_steps": 3}
WAYS: dict[str, dict[str, Any]] = {
    "folder": TRAINED,
    "folder, micro-batches": TRAINED | MICRO,
    "tars": TRAINED | {"data__shards__window": 2},
    "tars, micro-batches": TRAINED | MICRO | {"data__shards__window": 2},
    "cached features": {"model__freeze": "both", "model__heads__dropout": 0.2, "predictions__queries": 0},
}
SIGNALS = {"SIGTERM": 143, "SIGUSR1": 143, "SIGKILL": -signal.SIGKILL}


def notes_of(file: Path) -> list[tuple[int, int]]:
    return [(int(pid), int(step)) for pid, step in map(str.split, file.read_text().splitlines())]


def last(folder: Path) -> dict[str, Any]:
    return checkpoint(the_run(folder / "runs"))


# a run in one process, ended at random steps


@pytest.fixture(scope="module")
def fit(command: Command, scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., int]:
    """Runs `fit` of a way in a process of its own; returns its exit status."""
    cache, shards = tmp_path_factory.mktemp("cache"), tmp_path_factory.mktemp("shards") / "tars"
    convert(captioned(scenes, 5), Settings(5), shards, 1)

    def run(way: str, folder: Path, *more: str, **ends: int) -> int:
        options = {"data__augmentation__min_scale": 0.5, "data__captions_per_image": 2, "data__cache": cache}
        options |= {"data__num_workers": 1 if more and "tars" in way else 2, "trainer__max_epochs": 3}
        options |= {"data__root": shards} if "tars" in way else {}
        options |= WAYS[way] | ends_at(folder / "steps", **ends)
        done = clip_lightning(*command("fit", folder / "runs", **options), *more)
        (folder / "said").write_text(done.stderr)
        return done.returncode

    return run


@pytest.fixture(scope="module")
def undisturbed(
    fit: Callable[..., int], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], dict[str, Any]]:
    """The last checkpoint of a run of a way that was left alone."""

    @cache
    def of(way: str) -> dict[str, Any]:
        folder = tmp_path_factory.mktemp("undisturbed")
        assert fit(way, folder) == 0, (folder / "said").read_text()
        return last(folder)

    return of


@pytest.mark.parametrize("name", SIGNALS)
@pytest.mark.parametrize("way", WAYS)
def test_a_resume_is_bit_identical(
    fit: Callable[..., int], undisturbed: Callable[[str], dict[str, Any]], tmp_path: Path, way: str, name: str
) -> None:
    # after SIGKILL, a run can only resume from an earlier checkpoint
    every = WAYS[way].get("checkpoint__every_n_steps", EPOCH)
    first = every + 1 if name == "SIGKILL" else 1
    points = sorted(random.Random(f"{way} {name}").sample(range(first, 3 * EPOCH - 1), 10))
    reached, begun, more = 0, 0, ()
    for step in points:
        if step < reached:  # the batch in hand was finished
            continue
        status = fit(way, tmp_path, *more, step=step, signum=int(getattr(signal, name)))
        assert status == SIGNALS[name], (tmp_path / "said").read_text()
        steps = [step for _, step in notes_of(tmp_path / "steps")[begun:]]
        assert steps == list(range(reached, step + 1)), "it resumes from the checkpoint"
        begun += len(steps)
        reached = last(tmp_path)["global_step"]
        saved = max(step // every * every, step // EPOCH * EPOCH)
        assert reached in ((saved,) if name == "SIGKILL" else (step, step + 1))
        more = ("--ckpt_path=last",)
    assert fit(way, tmp_path, *more) == 0, (tmp_path / "said").read_text()
    steps = [step for _, step in notes_of(tmp_path / "steps")[begun:]]
    assert steps == list(range(reached, 3 * EPOCH)), "it resumes from the checkpoint"
    assert last(tmp_path)["global_step"] == 3 * EPOCH
    assert_same_state(last(tmp_path), undisturbed(way))


# two processes, one of which dies or gets a signal

STEP, TIMEOUT = 11, 120


@pytest.fixture
def fit_on_two(command: Command, tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    def run(*more: str, root: str = "runs", **ends: Any) -> subprocess.CompletedProcess[str]:
        options = {"data__augmentation__min_scale": 0.5, "data__batch_size": 2, "data__num_workers": 1}
        options |= {"model__heads__dropout": 0.2, "trainer__devices": 2, "trainer__strategy": "ddp"}
        options |= ends_at(tmp_path / "processes", **({"step": STEP, **ends} if ends else {}))
        return clip_lightning(*command("fit", tmp_path / root, **TRAINED | options), *more, timeout=TIMEOUT)

    return run


def assert_all_gone(tmp_path: Path) -> None:
    end = time.monotonic() + TIMEOUT
    pids = {pid for pid, _ in notes_of(tmp_path / "processes")}
    while alive := [pid for pid in pids if psutil.pid_exists(pid)]:
        assert time.monotonic() < end, f"{alive} are still there"
        time.sleep(0.5)


def test_the_other_rank_stops_with_a_checkpoint(fit_on_two: Callable[..., Any], tmp_path: Path) -> None:
    done = fit_on_two(rank=1)
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    said = done.stderr.splitlines()[-1]
    assert said.startswith("clip-lightning: error: another process of this run has ended")
    assert "--ckpt_path last" in said
    assert_all_gone(tmp_path)
    reached = last(tmp_path)["global_step"]
    assert reached in (EPOCH, STEP)
    (tmp_path / "processes").unlink()
    again = fit_on_two("--ckpt_path=last")
    assert again.returncode == 0, again.stderr
    begun = notes_of(tmp_path / "processes")
    assert min(step for _, step in begun) == reached, "it resumes from the checkpoint"
    assert last(tmp_path)["global_step"] == 2 * EPOCH


def test_without_the_first_rank_the_others_stop_too(fit_on_two: Callable[..., Any], tmp_path: Path) -> None:
    assert fit_on_two(rank=0).returncode == -signal.SIGKILL
    assert_all_gone(tmp_path)
    assert last(tmp_path)["global_step"] == EPOCH


@pytest.mark.parametrize("every_rank", [False, True])
@pytest.mark.parametrize(("signum", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_and_ends_all(
    fit_on_two: Callable[..., Any], tmp_path: Path, signum: signal.Signals, status: int, every_rank: bool
) -> None:
    done = fit_on_two(rank=0, signum=int(signum), every_rank=str(every_rank).lower())
    assert done.returncode == status, done.stderr
    assert "Traceback" not in done.stderr
    assert_all_gone(tmp_path)
    assert last(tmp_path)["global_step"] in (STEP, STEP + 1)


def test_a_stopped_run_resumes_and_has_the_best_model(fit_on_two: Callable[..., Any], tmp_path: Path) -> None:
    assert fit_on_two(root="whole").returncode == 0
    assert fit_on_two(rank=1, signum=int(signal.SIGTERM)).returncode == 143
    done = fit_on_two("--ckpt_path=last")
    assert done.returncode == 0 and "Warning" not in done.stderr, done.stderr
    assert_same_state(checkpoint(the_run(tmp_path / "whole")), last(tmp_path))
    run = the_run(tmp_path / "runs")
    bundle = CLIP.from_pretrained(run / "model").state_dict()
    best = CLIPModule.load_from_checkpoint(run / "checkpoints" / "best.ckpt").clip.state_dict()
    assert bundle.keys() == best.keys()
    assert all(torch.equal(tensor, best[name]) for name, tensor in bundle.items())


# a full disk; when it is filled → the step of the last checkpoint that was saved before

MOMENTS = {"step 4": 3, "step 15": 15, "the end": 16}


class Fills(Callback):
    """Takes all the room that is left."""

    def __init__(self, file: str, moment: str) -> None:
        self.file, self.moment = Path(file), moment

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if f"step {trainer.global_step}" == self.moment and trainer.is_global_zero:
            self.fill()

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        if self.moment == "the end" and trainer.is_global_zero:
            self.fill()

    def fill(self) -> None:
        with self.file.open("wb", buffering=0) as file:
            for size in (1 << 20, 4096, 1):
                try:
                    while True:
                        file.write(b"x" * size)
                except OSError as error:
                    assert error.errno == errno.ENOSPC


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_full_disk_while_saving(
    command: Command, disk: Callable[[int], Path], tmp_path: Path, moment: str
) -> None:
    small = disk(64)
    options = TRAINED | {"checkpoint__every_n_steps": 3}
    whole = clip_lightning(*command("fit", tmp_path / "runs", **options))
    assert whole.returncode == 0, whole.stderr
    fills = {"trainer__callbacks+": "test_faults.Fills", "trainer__callbacks__file": small / "filler"}
    fills |= {"trainer__callbacks__moment": moment}
    done = clip_lightning(*command("fit", small / "runs", **options | fills))
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    said = done.stderr.splitlines()[-1]
    assert "cannot be written" in said and "No space left" in said and "--ckpt_path last" in said
    run = the_run(small / "runs")
    assert last(small)["global_step"] == MOMENTS[moment]
    assert not list(small.rglob("*.tmp")), "nothing half-written takes up room"
    (small / "filler").unlink()
    again = clip_lightning(*command("fit", small / "runs", **options), "--ckpt_path=last")
    assert again.returncode == 0, again.stderr
    assert last(small)["global_step"] == 2 * EPOCH
    assert_same_state(last(tmp_path), last(small))
    assert json.loads((run / "metrics.json").read_text())["finished"]
    assert (run / "model" / "model.safetensors").is_file()


# memory

STEPS, MOST_GROWTH = 10_000, 12e6


class NotesMemory(Callback):
    """Resident bytes of the process and its workers, every few steps."""

    def __init__(self, file: str) -> None:
        self.file = Path(file)

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
        if trainer.global_step % 50 == 0:
            gc.collect()
            me = psutil.Process()
            workers = [child for child in me.children() if "clip_lightning" in " ".join(child.cmdline())]
            sizes = [process.memory_info().rss for process in (me, *workers)]
            with self.file.open("a") as file:
                file.write(json.dumps([trainer.global_step, sizes]) + "\n")


@pytest.mark.parametrize("way", ["cached features", "images", "tars"])
def test_memory_is_flat(command: Command, scenes: Path, tmp_path: Path, way: str) -> None:
    options = {"data__cache": tmp_path / "cache", "trainer__max_epochs": -1, "trainer__max_steps": STEPS}
    options |= {"trainer__check_val_every_n_epoch": 100, "early_stopping__patience": 1000}
    options |= {"trainer__log_every_n_steps": 10, "trainer__logger": "true", "checkpoint__every_n_steps": 500}
    options |= {"trainer__callbacks+": "test_faults.NotesMemory"}
    options |= {"trainer__callbacks__file": tmp_path / "memory"}
    options |= {"model__freeze": "both"} if way == "cached features" else TRAINED | {"data__num_workers": 1}
    if way == "tars":
        convert(captioned(scenes, 5), Settings(5), tmp_path / "shards", 1)
        options |= {"data__root": tmp_path / "shards"}
    done = clip_lightning(*command("fit", tmp_path / "runs", **options), timeout=1800)
    assert done.returncode == 0, done.stderr
    notes = [json.loads(line) for line in (tmp_path / "memory").read_text().splitlines()]
    assert notes[-1][0] == STEPS
    for place in range(len(notes[0][1])):
        early = statistics.median(sizes[place] for step, sizes in notes if 2000 <= step < 3000)
        late = statistics.median(sizes[place] for step, sizes in notes if step >= 9000)
        print(f"{way}, process {place}: {early / 1e6:.1f} MB, then {late / 1e6:.1f} MB")
        assert late - early < MOST_GROWTH
