"""Zero-shot accuracy during `fit`: what `evaluate zero-shot` says of the bundle, on any number of ranks.

Run as a program, this file validates with one process and with two, for the test of ranks.
"""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
import wandb
from lightning.pytorch import Callback, LightningModule, Trainer
from small_runs import data, trainer
from small_splits import write_classes
from wandb_server import WandbServer

from clip_lightning.errors import UserError
from clip_lightning.tracking import zero_shot_panel as zero_shot
from clip_lightning.tracking.logger import RunLogger
from clip_lightning.tracking.zero_shot_panel import METRICS, ZeroShot
from clip_lightning.training.build import HeadOptions, TowerOptions
from clip_lightning.training.module import CLIPModule

MakeModule = Callable[..., CLIPModule]
COLOURS = {"red": (220, 0, 0), "green": (0, 200, 0), "blue": (0, 0, 220), "yellow": (230, 220, 0)}
COLOURS |= {"white": (250, 250, 250), "black": (5, 5, 5), "purple": (150, 0, 160)}


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Seven classes of plain colors, with three images each."""
    return write_classes(tmp_path / "colours", COLOURS, 3)


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> Mock:
    """Counts the passes through the image tower."""
    spy = Mock(wraps=zero_shot.encode_images)
    monkeypatch.setattr(zero_shot, "encode_images", spy)
    return spy


class Note(Callback):
    """Remembers the figures after each validation, and writes the last ones of each rank to a folder."""

    def __init__(self, out: Path | None = None) -> None:
        self.seen: list[dict[str, float]] = []
        self.out = out

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        logged = trainer.callback_metrics
        self.seen.append({name: float(logged[f"val/{name}"]) for name in METRICS if f"val/{name}" in logged})
        if self.out is not None:
            file = self.out / f"{trainer.world_size}-{trainer.global_rank}.json"
            file.write_text(json.dumps(self.seen[-1]))


class Swap(Callback):
    """Puts other weights in for the validation, as averaging does."""

    def _swap(self, module: Any) -> None:
        with torch.no_grad():
            module.clip.heads.text[1].weight.neg_()

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._swap(pl_module)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._swap(pl_module)


def test_fit_and_evaluate_agree(
    command: Callable[..., Any], pictures: Path, tmp_path: Path, encoded: Mock, ran: Any, printed: Any
):
    zero_shot = [f"--zero_shot.data={pictures}", "--zero_shot.templates=none"]
    words = command("fit", tmp_path / "runs", data__cache=tmp_path / "cache", trainer__max_epochs=3)
    assert "zero-shot top-1" in ran(*words, *zero_shot).out
    images = [len(call.args[1]) for call in encoded.mock_calls]
    assert images == [21], "the frozen tower ran once for all validations"
    (run,) = (tmp_path / "runs").iterdir()
    metrics = json.loads((run / "metrics.json").read_text())
    found = printed("evaluate", "zero-shot", run / "model", pictures, "--templates", "none")
    assert {name: metrics[name] for name in METRICS} == pytest.approx({name: found[name] for name in METRICS})
    assert {path.name for path in (run / "zero_shot").iterdir()} == {
        *("classes.csv", "confused.csv", "confusion.png", "calibration.csv", "reliability.png")
    }
    assert (run / "zero_shot" / "classes.csv").read_text().count("\n") == 8
    best = run / "checkpoints" / "best.ckpt"
    said = ran("validate", f"--config={run / 'config.yaml'}", f"--ckpt_path={best}").out
    assert f"zero-shot top-1 {metrics['zero_shot_top1']:.1f}" in said


def test_every_second_validation_and_a_trained_tower(
    make_module: MakeModule, scenes: Path, pictures: Path, tmp_path: Path, encoded: Mock
):
    module, note = make_module(freeze="none"), Note()
    callback = ZeroShot(str(pictures), every=2)
    trainer(tmp_path, callback, note, max_epochs=3).fit(module, data(module, scenes))
    assert [sorted(seen) for seen in note.seen] == [[], sorted(METRICS), sorted(METRICS)]
    assert [len(call.args[1]) for call in encoded.mock_calls] == [21, 21]


def test_the_weights_of_the_validation(make_module: MakeModule, scenes: Path, pictures: Path, tmp_path: Path):
    def figures(*callbacks: Callback) -> dict[str, float]:
        module, note = make_module(), Note()
        trainer(tmp_path, *callbacks, note).validate(module, data(module, scenes), verbose=False)
        return note.seen[0]

    plain = figures(ZeroShot(str(pictures)))
    swapped = figures(ZeroShot(str(pictures)), Swap())
    assert swapped == figures(Swap(), ZeroShot(str(pictures))) != plain


def test_tables_in_wandb(
    wandb_server: WandbServer, make_module: MakeModule, scenes: Path, pictures: Path, tmp_path: Path
):
    module = make_module(freeze="none")
    logger = RunLogger(project="p", id="one", save_dir=str(tmp_path), log_model=False)
    trainer(tmp_path, ZeroShot(str(pictures)), logger=logger, max_epochs=1).fit(module, data(module, scenes))
    wandb.finish()
    (run,) = wandb_server.runs.values()
    assert run.summary["val/zero_shot_classes"]["nrows"] == 7
    assert run.summary["val/zero_shot_confused"]["_type"] == "table-file"
    assert run.summary["val/zero_shot_reliability"]["_type"] == "image-file"
    assert len([row for row in run.history if "val/zero_shot_top1" in row]) == 1


def test_invalid_options():
    with pytest.raises(UserError, match="the folder or file nothing does not exist"):
        ZeroShot("nothing")
    with pytest.raises(UserError, match="--templates odd"):
        ZeroShot(".", templates="odd")


@pytest.mark.parametrize("split", ["test", "dev"])
def test_a_missing_split(make_module: MakeModule, scenes: Path, pictures: Path, tmp_path: Path, split: str):
    module = make_module()
    fit = trainer(tmp_path, ZeroShot(str(pictures), split=split), max_epochs=1)
    with pytest.raises(UserError, match=rf"--zero_shot\.split {split}: .* has no such split"):
        fit.fit(module, data(module, scenes))


# Ranks ----------------------------------------------------------------------------------------------------


def validate_on_ranks(scenes: Path, bert: Path, pictures: Path, out: Path) -> None:
    for devices in (2, 1):
        torch.manual_seed(0)
        small = {"heads": HeadOptions(embed_dim=16), "towers": TowerOptions(image_size=32)}
        module = CLIPModule("random:test_vit", f"random:{bert}", **small)
        options = {"devices": devices, "strategy": "ddp_fork" if devices > 1 else "auto"}
        ranks = trainer(out, ZeroShot(str(pictures)), Note(out), **options)
        ranks.validate(module, data(module, scenes), verbose=False)


@pytest.mark.slow
def test_two_ranks_match_one(scenes: Path, bert: Path, pictures: Path, tmp_path: Path):
    (pictures / "red" / "broken.png").write_bytes(b"")
    command = [sys.executable, __file__, str(scenes), str(bert), str(pictures), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert "It is recommended to use" not in done.stderr
    one = json.loads((tmp_path / "1-0.json").read_text())
    assert set(one) == set(METRICS)
    for rank in range(2):
        assert json.loads((tmp_path / f"2-{rank}.json").read_text()) == one


if __name__ == "__main__":
    validate_on_ranks(*map(Path, sys.argv[1:]))
