"""Ten thousand steps need no more memory than two thousand."""

from __future__ import annotations

import gc
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from lightning.pytorch import Callback, Trainer
from processes import clip_lightning

pytestmark = pytest.mark.faults

STEPS, EVERY, MOST_GROWTH = 10_000, 50, 12e6
WAYS: dict[str, dict[str, Any]] = {
    "cached features": {"model__freeze": "both"},
    "pictures": {"model__freeze": "none", "data__cache": "off", "data__num_workers": 1},
    "tars": {"model__freeze": "none", "data__cache": "off", "data__num_workers": 1},
}


class NotesMemory(Callback):
    """Resident bytes of the process and its workers, every few steps."""

    def __init__(self, file: str) -> None:
        self.file = Path(file)

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
        if trainer.global_step % EVERY == 0:
            gc.collect()
            me = psutil.Process()
            workers = [child for child in me.children() if "clip_lightning" in " ".join(child.cmdline())]
            sizes = [process.memory_info().rss for process in (me, *workers)]
            with self.file.open("a") as file:
                file.write(json.dumps([trainer.global_step, sizes]) + "\n")


@pytest.mark.parametrize("way", WAYS)
def test_memory_is_flat(command: Callable[..., list[str]], scenes: Path, tmp_path: Path, way: str) -> None:
    options = {
        "data__cache": tmp_path / "cache",
        "trainer__max_epochs": -1,
        "trainer__max_steps": STEPS,
        "trainer__check_val_every_n_epoch": 100,
        "early_stopping__patience": 1000,
        "trainer__log_every_n_steps": 10,
        "trainer__logger": "true",
        "trainer__callbacks+": "test_memory_faults.NotesMemory",
        "trainer__callbacks__file": tmp_path / "memory",
        "checkpoint__every_n_steps": 500,
        **WAYS[way],
    }

    def run(words: list[str]) -> None:
        done = clip_lightning(*words, timeout=1800)
        assert done.returncode == 0, done.stderr

    if way == "tars":
        out = str(tmp_path / "shards")
        run(["data", "convert", str(scenes), "--out", out, "--samples_per_shard", "5"])
        options |= {"data__root": tmp_path / "shards"}
    run(command("fit", tmp_path / "runs", **options))
    notes = [json.loads(line) for line in (tmp_path / "memory").read_text().splitlines()]
    assert notes[-1][0] == STEPS
    for place in range(len(notes[0][1])):
        early = statistics.median(sizes[place] for step, sizes in notes if 2000 <= step < 3000)
        late = statistics.median(sizes[place] for step, sizes in notes if step >= 9000)
        print(f"{way}, process {place}: {early / 1e6:.1f} MB, then {late / 1e6:.1f} MB")
        assert late - early < MOST_GROWTH
