"""Every door in docs/extend.md opens with the code that stands there: one file, and at most one line."""

import importlib
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
import wandb

from clip_lightning import __main__ as commands
from clip_lightning.data import readers, sources
from clip_lightning.data.formats import read_captions
from clip_lightning.evaluation import metrics
from clip_lightning.evaluation.retrieval import retrieval_metrics

PAGE = (Path(__file__).resolve().parents[1] / "docs" / "extend.md").read_text(encoding="utf-8")
Load = Callable[[str], ModuleType]
Printed = pytest.CaptureFixture[str]


@pytest.fixture
def load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Load:
    """Write the page's file into a working directory of the user's, and import it."""
    files = dict(re.findall(r"^```python\n# (\w+)\.py\n(.*?)^```", PAGE, flags=re.MULTILINE | re.DOTALL))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))

    def load(name: str) -> ModuleType:
        (tmp_path / f"{name}.py").write_text(files[name])
        monkeypatch.delitem(sys.modules, name, raising=False)
        return importlib.import_module(name)

    return load


@pytest.fixture
def fit(command: Callable[..., list[str]]) -> Callable[..., Path]:
    """Train for an epoch; return the run's folder."""

    def train(**options: str) -> Path:
        small = {"data__cache": "off", "data__batch_size": 8, "trainer__max_epochs": 1}
        assert commands.main(command("fit", Path("runs"), **small, **options)) == 0
        (run,) = (run for run in Path("runs").iterdir() if (run / "metrics.json").is_file())
        return run

    return train


def test_a_loss(load: Load, fit: Callable[..., Path]) -> None:
    loss = load("losses_of_mine").MaxViolation()
    ids = torch.tensor([0, 0, 1])
    value = loss(torch.eye(3), torch.eye(3).roll(1, 0), torch.tensor(9.0), None, ids, ids)
    assert value.item() == pytest.approx((1.4 + 0 + 2.4 + 1.4 + 2.4) / 5)  # computed by hand
    run = fit(model__loss="losses_of_mine.MaxViolation", model__loss__margin="0.1")
    assert json.loads((run / "model" / "config.json").read_text())["loss"] == "MaxViolation"


def test_a_tower(load: Load, bert: Path) -> None:
    clip = load("towers_of_mine").build(f"random:{bert}")
    red = torch.zeros(1, 3, 40, 40, dtype=torch.uint8)
    red[:, 0] = 255
    assert clip.embed_images(red).shape == (1, 512)


def test_a_data_format(load: Load, tmp_path: Path, scenes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "FORMATS", (load("formats_of_mine").LINE, *readers.FORMATS))
    image = next(scenes.glob("*.jpg"))
    (tmp_path / "mine.ini").write_text(f"[image]\nimage={image}\ncaption=a circle\n")
    (record,) = read_captions(tmp_path / "mine.ini").images
    assert record.captions == ("a circle",)


def test_a_data_source(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    name, source = load("sources_of_mine").LINE
    monkeypatch.setitem(sources.KINDS, name, source)
    assert sources.find_source("share:photos").folder() == Path("/mnt/share/photos")


def test_a_metric(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(metrics.MEASURES, *load("metrics_of_mine").LINE)
    found = retrieval_metrics(torch.eye(3), torch.eye(3).roll(1, 0), torch.arange(3))
    assert found["text_to_image_mrr"] == pytest.approx(1 / 3)


def test_a_panel(load: Load, fit: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    load("panels_of_mine")
    run = fit(trainer__callbacks="panels_of_mine.Captions", trainer__logger=...)
    wandb.finish()
    (table,) = run.glob("wandb/offline-run-*/files/media/table/val/captions_*.table.json")
    assert len(json.loads(table.read_text())["data"]) == 4


def test_a_command(load: Load, scenes: Path, monkeypatch: pytest.MonkeyPatch, capsys: Printed) -> None:
    monkeypatch.setitem(sys.modules, "clip_lightning.commands.count", load("count"))
    monkeypatch.setitem(commands.COMMANDS, "count", ("commands.count", "count files"))
    assert commands.main(["count", str(scenes)]) == 0
    assert capsys.readouterr().out.strip() == str(len(list(scenes.glob("*.jpg"))))
    assert commands.main(["--help"]) == 0
    assert "count files" in capsys.readouterr().out
