"""A training step calls functions in few files."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from lightning.pytorch import Callback, Trainer
from small_runs import data, trainer

import clip_lightning
from clip_lightning.training.module import CLIPModule

PACKAGE = Path(clip_lightning.__file__).parent


class TracesOneStep(Callback):
    """Notes each of our files of which a function is called, from reading a batch to the end of its step."""

    def __init__(self, step: int) -> None:
        self.step = step
        self.files: set[str] = set()

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        # the first step allocates and compares; a later one is what all others are
        sys.setprofile(self._note if trainer.global_step == self.step else None)

    def _note(self, frame: FrameType, event: str, argument: object) -> None:
        place = Path(frame.f_code.co_filename)
        if event == "call" and place.is_relative_to(PACKAGE):
            self.files.add(place.relative_to(PACKAGE).as_posix())


@pytest.mark.filterwarnings("ignore:.*module.s. in eval mode")
def test_a_step_on_cached_features_passes_through_few_files(
    make_module: Callable[..., CLIPModule], scenes: Path, tmp_path: Path
) -> None:
    module = make_module(freeze="both")
    traces = TracesOneStep(2)
    options = {"max_steps": 4, "limit_val_batches": 0, "gradient_clip_val": 1.0}
    trainer(tmp_path, traces, **options).fit(module, data(module, scenes, cache=str(tmp_path / "cache")))
    print(*sorted(traces.files), sep="\n")
    assert {"data/datasets.py", "training/module.py", "training/losses.py", "model/clip.py"} <= traces.files
    assert len(traces.files) <= 10, sorted(traces.files)
