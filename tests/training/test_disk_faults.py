"""A full disk while a run saves prints one line, loses no earlier file, and the run can be resumed."""

from __future__ import annotations

import errno
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Callback, Trainer
from processes import assert_same_state, checkpoint, clip_lightning, the_run

pytestmark = pytest.mark.faults

EPOCH, EPOCHS, EVERY = 8, 2, 3
# when the disk is filled → the step of the last checkpoint that was saved before
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


@pytest.mark.parametrize("strategy", ["auto", "fsdp"])
@pytest.mark.parametrize("moment", MOMENTS)
def test_a_full_disk_while_saving(
    command: Callable[..., list[str]],
    disk: Callable[[int], Path],
    tmp_path: Path,
    moment: str,
    strategy: str,
) -> None:
    small = disk(64)
    options = {
        **({"trainer__strategy": strategy, "trainer__devices": 2} if strategy == "fsdp" else {}),
        "data__batch_size": 2 if strategy == "fsdp" else 4,
        "data__cache": "off",
        "model__freeze": "none",
        "predictions__queries": 0,
        "trainer__max_epochs": EPOCHS,
        "checkpoint__every_n_steps": EVERY,
    }
    whole = clip_lightning(*command("fit", tmp_path / "undisturbed", **options))
    assert whole.returncode == 0, whole.stderr
    fills = {
        "trainer__callbacks+": "test_disk_faults.Fills",
        "trainer__callbacks__file": small / "filler",
        "trainer__callbacks__moment": moment,
    }
    done = clip_lightning(*command("fit", small / "runs", **options | fills))
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    said = done.stderr.splitlines()[-1]
    assert "cannot be written" in said and "No space left" in said and "--ckpt_path last" in said
    run = the_run(small / "runs")
    assert checkpoint(run)["global_step"] == MOMENTS[moment]
    assert not list(small.rglob("*.tmp")), "nothing half-written takes up room"
    (small / "filler").unlink()
    again = clip_lightning(*command("fit", small / "runs", **options), "--ckpt_path=last")
    assert again.returncode == 0, again.stderr
    assert checkpoint(run)["global_step"] == EPOCH * EPOCHS
    assert_same_state(checkpoint(the_run(tmp_path / "undisturbed")), checkpoint(run))
    assert json.loads((run / "metrics.json").read_text())["finished"]
    assert (run / "model" / "model.safetensors").is_file()
