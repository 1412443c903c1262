"""`--trainer.overfit_batches`: the same batch at every step, with cached features and without."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer

from clip_lightning.training.fitting import fit

pytestmark = pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning")
EPOCHS = 4


class Notes(Callback):
    """The batches that come, and their losses."""

    def __init__(self) -> None:
        self.batches: list[dict[str, Any]] = []
        self.losses: list[float] = []

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.batches.append(batch)
        self.losses.append(float(outputs["loss"]))


@pytest.mark.parametrize("cached", [True, False])
def test_the_same_batch_each_time(command: Callable[..., list[str]], tmp_path: Path, cached: bool) -> None:
    notes = Notes()
    ways = {"model__freeze": "both" if cached else "none", "data__cache": tmp_path if cached else "off"}
    options = {
        "trainer__overfit_batches": 1,
        "trainer__deterministic": "true",
        "trainer__max_epochs": EPOCHS,
        "data__augmentation__min_scale": 0.5,
        "data__captions_per_image": 2,
        "predictions__queries": 0,
        "model__optimizer__lr": 1e-3,
    }
    try:
        fit(command("fit", tmp_path / "runs", **options, **ways)[1:], [notes])
    finally:
        torch.use_deterministic_algorithms(False)
    assert len(notes.batches) == EPOCHS
    first = notes.batches[0]
    for batch in notes.batches[1:]:
        assert batch.keys() == first.keys()
        assert all(same(value, batch[name]) for name, value in first.items())
    assert notes.losses[-1] < notes.losses[0]


def same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[name], other[name]) for name in one)
    return bool(one == other)
