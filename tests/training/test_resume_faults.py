"""A run that is stopped at random steps and resumed has the same weights as without the interruption.

The runs train on decoded images with random crops, with and without gradient caching, on tars, and on cached
features. Each is stopped several times: SIGTERM leaves a checkpoint of the present step, and SIGKILL the last
checkpoint that the run wrote.
"""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Callback, Trainer
from processes import assert_same_state, checkpoint, clip_lightning, the_run

from clip_lightning.data.shards.convert import Settings, captioned, convert

pytestmark = pytest.mark.faults

EPOCH, EPOCHS, POINTS, EVERY = 8, 3, 10, 3
TRAINED: dict[str, Any] = {"model.freeze": "none", "data.cache": "off", "data.num_workers": 2}
WAYS: dict[str, dict[str, Any]] = {
    "folder": TRAINED,
    "folder, micro-batches": TRAINED | {"model.micro_batch_size": 2, "checkpoint.every_n_steps": EVERY},
    "tars": TRAINED | {"data.shards.window": 2},
    "tars, micro-batches": TRAINED
    | {
        "data.shards.window": 2,
        "model.micro_batch_size": 2,
        "checkpoint.every_n_steps": EVERY,
    },
    "cached features": {"model.freeze": "both", "model.heads.dropout": 0.2},
}
SIGNALS = {"SIGTERM": 143, "SIGUSR1": 143, "SIGKILL": -signal.SIGKILL}


class EndsAt(Callback):
    """Notes the steps that begin, and sends the process a signal when one of them does."""

    def __init__(self, notes: str, step: int | None = None, signum: int = 0) -> None:
        self.notes, self.step, self.signum = Path(notes), step, signum

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        with self.notes.open("a") as file:
            file.write(f"{trainer.global_step}\n")
        if trainer.global_step == self.step:
            os.kill(os.getpid(), self.signum)


@pytest.fixture(scope="module")
def fit(
    command: Callable[..., list[str]], scenes: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., int]:
    """Runs `fit` of a way in a process of its own; returns its exit status."""
    cache, shards = tmp_path_factory.mktemp("cache"), tmp_path_factory.mktemp("shards") / "tars"
    convert(captioned(scenes, 5), Settings(5), shards, 1)

    def run(way: str, folder: Path, *more: str, step: int | None = None, signum: int = 0) -> int:
        options = {
            "data.augmentation.min_scale": 0.5,
            "data.captions_per_image": 2,
            "data.cache": cache,
            "predictions.queries": 0,
            "trainer.max_epochs": EPOCHS,
            "trainer.default_root_dir": folder / "runs",
            "trainer.callbacks+": "test_resume_faults.EndsAt",
            "trainer.callbacks.notes": folder / "steps",
            **({"data.root": shards} if "tars" in way else {}),
            **WAYS[way],
            **({"data.num_workers": 1} if more and "tars" in way else {}),  # of two before
        }
        if step is not None:
            options |= {"trainer.callbacks.step": step, "trainer.callbacks.signum": signum}
        words = [*command("fit", folder), *(f"--{name}={value}" for name, value in options.items())]
        done = clip_lightning(*words, *more)
        (folder / "said").write_text(done.stderr)
        return done.returncode

    return run


def last(folder: Path) -> dict[str, Any]:
    return checkpoint(the_run(folder / "runs"))


@pytest.fixture(scope="module")
def undisturbed(
    fit: Callable[..., int], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], dict[str, Any]]:
    """The last checkpoint of a run of a way that was left alone."""
    known: dict[str, dict[str, Any]] = {}

    def of(way: str) -> dict[str, Any]:
        if way not in known:
            folder = tmp_path_factory.mktemp("undisturbed")
            assert fit(way, folder) == 0, (folder / "said").read_text()
            known[way] = last(folder)
        return known[way]

    return of


@pytest.mark.parametrize("name", SIGNALS)
@pytest.mark.parametrize("way", WAYS)
def test_a_resume_is_bit_identical(
    fit: Callable[..., int],
    undisturbed: Callable[[str], dict[str, Any]],
    tmp_path: Path,
    way: str,
    name: str,
) -> None:
    # after SIGKILL, a run can only resume from an earlier checkpoint
    every = WAYS[way].get("checkpoint.every_n_steps", EPOCH)
    first = every + 1 if name == "SIGKILL" else 1
    points = sorted(random.Random(f"{way} {name}").sample(range(first, EPOCHS * EPOCH - 1), POINTS))
    reached, begun, more = 0, 0, ()
    for step in points:
        if step < reached:  # the batch in hand was finished
            continue
        status = fit(way, tmp_path, *more, step=step, signum=int(getattr(signal, name)))
        assert status == SIGNALS[name], (tmp_path / "said").read_text()
        steps = [int(line) for line in (tmp_path / "steps").read_text().splitlines()[begun:]]
        assert steps == list(range(reached, step + 1)), "it resumes from the checkpoint"
        begun += len(steps)
        reached = last(tmp_path)["global_step"]
        saved = max(step // every * every, step // EPOCH * EPOCH)
        assert reached in ((saved,) if name == "SIGKILL" else (step, step + 1))
        more = ("--ckpt_path=last",)
    assert fit(way, tmp_path, *more) == 0, (tmp_path / "said").read_text()
    steps = [int(line) for line in (tmp_path / "steps").read_text().splitlines()[begun:]]
    assert steps == list(range(reached, EPOCHS * EPOCH)), "it resumes from the checkpoint"
    assert last(tmp_path)["global_step"] == EPOCHS * EPOCH
    assert_same_state(last(tmp_path), undisturbed(way))
