"""Steps whose gradient is not finite: left out, counted, told, and the end after too many."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer

from clip_lightning.data.datamodule import CaptionDataModule
from clip_lightning.data.formats import read_captions
from clip_lightning.data.shards.convert import Settings, captioned, convert
from clip_lightning.errors import RunFailed
from clip_lightning.training.guard import NonFinite
from clip_lightning.training.module import CLIPModule

pytestmark = pytest.mark.filterwarnings(r"ignore:Found \d+ module\(s\) in eval mode:UserWarning")
Fit = Callable[..., tuple[CLIPModule, NonFinite]]


class Poison(Callback):
    """Makes a head's gradient NaN after the backward passes of some batches."""

    def __init__(self, batches: set[int], value: float = math.nan) -> None:
        self.batches, self.value, self.batch = batches, value, 0

    def on_train_batch_start(self, trainer: Trainer, module: Any, batch: Any, batch_idx: int) -> None:
        self.batch = batch_idx

    def on_after_backward(self, trainer: Trainer, pl_module: Any) -> None:
        if self.batch in self.batches:
            pl_module.clip.heads.text[1].weight.grad[0, 0] = self.value


class Weights(Callback):
    """All weights and both moments after each step."""

    def __init__(self) -> None:
        self.after: list[torch.Tensor] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
        parts = list(pl_module.parameters())
        for state in trainer.optimizers[0].state.values():
            parts += [state["exp_avg"], state["exp_avg_sq"]]
        self.after.append(torch.cat([part.detach().flatten() for part in parts]))


@pytest.fixture
def fit(make_module: Callable[..., CLIPModule], scenes: Path, tmp_path: Path) -> Fit:
    def run(
        *callbacks: Callback,
        in_a_row: int = 3,
        image_tower: str = "random:test_vit",
        root: Path = scenes,
        dataset: Any = "auto",
        **options: Any,
    ) -> tuple[CLIPModule, NonFinite]:
        module = make_module(freeze="none", image_tower=image_tower)
        data = CaptionDataModule(
            module.transform,
            module.tokenize,
            root,
            dataset=dataset,
            batch_size=8,
            num_workers=0,
            cache="off",
        )
        guard = NonFinite(tmp_path, in_a_row)
        settings: dict[str, Any] = {"max_epochs": 1, "limit_val_batches": 0, "gradient_clip_val": 1.0}
        settings |= {"accelerator": "cpu", "devices": 1, "logger": False, "enable_checkpointing": False}
        settings |= {"enable_progress_bar": False, "enable_model_summary": False}
        Trainer(**settings | options, default_root_dir=tmp_path, callbacks=[*callbacks, guard]).fit(
            module, datamodule=data
        )
        return module, guard

    return run


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.filterwarnings("ignore:step 2 is left out")
def test_a_step_is_left_out_and_the_next_is_taken(fit: Fit, value: float, precision: str) -> None:
    weights = Weights()
    module, guard = fit(Poison({1}, value), weights, precision=precision)
    first, poisoned, third, _ = weights.after
    assert torch.equal(first, poisoned), "neither weights nor moments"
    assert not torch.equal(poisoned, third)
    assert third.isfinite().all()
    assert (guard.left_out, guard.row) == (1, 0)
    assert module.trainer.callback_metrics["train/steps_left_out"] == 1


def test_it_is_said_once(fit: Fit) -> None:
    with pytest.warns(UserWarning, match=r"step 2 is left out, its gradient is not finite \(nan\)") as said:
        fit(Poison({1, 2}))
    assert sum("left out" in str(warning.message) for warning in said) == 1


class PoisonForward(Callback):
    """Makes a picture infinite, which the batch norms' statistics then are, too."""

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 1:
            batch["pixel_values"] = torch.full_like(batch["pixel_values"], math.inf, dtype=torch.float32)


@pytest.mark.filterwarnings("ignore:step . is left out")
def test_batch_norms_forget_what_was_not_finite(fit: Fit) -> None:
    module, guard = fit(PoisonForward(), image_tower="random:test_resnet")
    assert guard.left_out == 1
    statistics = [b for name, b in module.named_buffers() if "running" in name]
    assert statistics
    assert all(statistic.isfinite().all() for statistic in statistics)


@pytest.mark.filterwarnings("ignore:step . is left out")
def test_several_in_a_row_end_the_run_and_name_the_samples(fit: Fit, tmp_path: Path, scenes: Path) -> None:
    with pytest.raises(RunFailed, match="3 steps in a row had a gradient that is not finite, up to step 4"):
        fit(Poison({1, 2, 3}))
    batches = json.loads((tmp_path / "non-finite.json").read_text())
    assert [batch["batch"] for batch in batches] == [1, 2, 3]
    for batch in batches:
        assert len(batch["captions"]) == 8
        for sample in batch["captions"]:
            assert Path(sample["picture"]).is_file()
            assert sample["caption"] in (scenes / "captions.csv").read_text()


@pytest.mark.filterwarnings("ignore:step . is left out")
def test_samples_of_shards_are_named_too(
    fit: Fit, tmp_path: Path, scenes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    how = Settings("litdata", 5, None, 92, ())
    shares = {"val_share": 0.1, "test_share": 0.1, "split_seed": 0}
    convert(captioned(read_captions(scenes), how, **shares), how, tmp_path / "shards", 1)
    with pytest.raises(RunFailed, match="3 steps in a row"):
        fit(Poison({1, 2, 3}), root=tmp_path / "shards", dataset="shards")
    batches = json.loads((tmp_path / "non-finite.json").read_text())
    names = [name for batch in batches for name in batch["names"]]
    assert len(set(names)) == 24 and all(".bin#" in name for name in names)


@pytest.mark.filterwarnings("ignore:step . is left out")
def test_steps_apart_do_not_end_it(fit: Fit, tmp_path: Path) -> None:
    _, guard = fit(Poison({0, 1, 3}))
    assert guard.left_out == 3
    assert not (tmp_path / "non-finite.json").exists()


@pytest.mark.filterwarnings("ignore:step . is left out")
def test_an_accumulated_step_is_one(fit: Fit) -> None:
    weights = Weights()
    _, guard = fit(Poison({0}), weights, accumulate_grad_batches=2)
    assert (guard.left_out, guard.row) == (1, 0)
    assert torch.equal(weights.after[0], weights.after[1])
    assert not torch.equal(weights.after[2], weights.after[3])


@pytest.mark.filterwarnings("ignore:step . is left out")
def test_the_count_travels_in_the_checkpoint(fit: Fit, tmp_path: Path) -> None:
    module, _ = fit(Poison({1}))
    module.trainer.save_checkpoint(tmp_path / "a.ckpt")
    stored = torch.load(tmp_path / "a.ckpt", weights_only=True)["callbacks"]["NonFinite"]
    again = NonFinite(tmp_path)
    again.load_state_dict(stored)
    assert again.left_out == 1


# Lightning 2.6 calls jsonargparse by names that its newest versions deprecate.
@pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*could not find the monitored key:UserWarning")
@pytest.mark.filterwarnings("ignore:the scale has collapsed:UserWarning")
def test_the_command_ends_with_status_1_and_a_checkpoint(
    scenes: Path, bert: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from clip_lightning.__main__ import main

    poisoned = tmp_path / "poisoned"
    shutil.copytree(scenes, poisoned)
    options = {
        "model.image_tower": "random:test_resnet",
        "model.text_tower": f"random:{bert}",
        "model.freeze": "none",
        "model.optimizer.lr": 1e38,
        "model.optimizer.warmup": 0.0,
        "data.root": poisoned,
        "data.image_size": 32,
        "data.batch_size": 4,
        "data.num_workers": 0,
        "data.cache": "off",
        "trainer.accelerator": "cpu",
        "trainer.logger": "false",
        "trainer.enable_progress_bar": "false",
        "trainer.max_epochs": 20,
        "trainer.limit_val_batches": 0,
        "trainer.default_root_dir": tmp_path / "runs",
    }
    few_steps = {"trainer.limit_val_batches": 1.0, "trainer.default_root_dir": tmp_path / "few-steps"}
    with pytest.warns(UserWarning, match="not finite"):
        assert main(["fit", *(f"--{name}={value}" for name, value in (options | few_steps).items())]) == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert "training has diverged: at step 8, 4 of 4 image embeddings are not finite; lower --model" in line
    with pytest.warns(UserWarning, match="not finite"):
        assert main(["fit", *(f"--{name}={value}" for name, value in options.items())]) == 1
    assert "20 steps in a row had a gradient that is not finite" in capsys.readouterr().err
    (run,) = (tmp_path / "runs").iterdir()
    assert (run / "non-finite.json").is_file()
    assert (run / "checkpoints" / "last.ckpt").is_file()
