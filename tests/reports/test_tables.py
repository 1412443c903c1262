"""Pictures of every validation and of the end: on disk, in W&B, through a resume, never worth a run."""

import contextlib
import json
import re
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.loggers import WandbLogger
from PIL import Image
from small_runs import trainer
from small_splits import perfect, records
from wandb_server import WandbServer

from clip_lightning.data.captions import CaptionedImage, content_groups
from clip_lightning.evaluation.retrieval import Embeddings
from clip_lightning.reports.pages import thumbnail
from clip_lightning.tracking.prediction_panel import PredictionTable


def draw_pictures(folder: Path, count: int) -> list[CaptionedImage]:
    """Images of one color each, with two captions that say whose they are."""
    for n in range(count):
        Image.new("RGB", (60, 40), (200, 12 * n, 40)).save(folder / f"{n}.png")
    return records([2] * count, folder)


class Stub(LightningModule):
    """Embeds nothing: its embeddings are given, and made in the hook where the real module makes them."""

    def __init__(self, embeddings: Embeddings) -> None:
        super().__init__()
        self.given = embeddings
        self.validation_embeddings: Embeddings | None = None
        self.weight = torch.nn.Parameter(torch.zeros(()))

    def training_step(self, batch: object, index: int) -> torch.Tensor:
        return self.weight * 1

    def validation_step(self, batch: object, index: int) -> None:
        pass

    def on_validation_epoch_end(self) -> None:
        self.validation_embeddings = self.given
        self.log_dict({"val/text_to_image_R@1": 100.0, "val/image_to_text_R@1": 50.0, "val/rsum": 600.0})

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


class Pictures(LightningDataModule):
    def __init__(self, images: list[CaptionedImage]) -> None:
        super().__init__()
        self.images = {"val": images}.__getitem__

    def content_ids(self, split: str) -> list[int]:
        return content_groups(self.images(split))

    def train_dataloader(self) -> list[int]:
        return [0, 1]

    val_dataloader = train_dataloader


def stub_trainer(
    images: list[CaptionedImage], root: Path, *, epoch: int = 0, **changes: object
) -> SimpleNamespace:
    metrics = {"val/text_to_image_R@1": torch.tensor(25.0), "val/rsum": torch.tensor(300.0)}
    state = {"state": SimpleNamespace(fn="fit"), "sanity_checking": False, "is_global_zero": True}
    state |= {"datamodule": Pictures(images), "current_epoch": epoch, "global_step": 10 * epoch}
    state |= {"default_root_dir": str(root), "loggers": [], "callback_metrics": metrics}
    return SimpleNamespace(**{**state, **changes})


def validate(
    panel: PredictionTable, found: Embeddings | None, images: list[CaptionedImage], root: Path, **changes: Any
) -> None:
    """Show what a validation found."""
    stub = stub_trainer(images, root, **changes)
    panel.on_validation_end(stub, SimpleNamespace(validation_embeddings=found))


def test_nothing_is_written_outside_a_fit_and_on_other_ranks(tmp_path: Path) -> None:
    images, root = draw_pictures(tmp_path, 3), tmp_path / "run"
    changes = {"sanity_checking": True, "is_global_zero": False, "datamodule": None}
    for name, value in (changes | {"state": SimpleNamespace(fn="validate")}).items():
        validate(PredictionTable(), perfect([2] * 3), images, root, **{name: value})
    validate(PredictionTable(queries=0), perfect([2] * 3), images, root)
    validate(PredictionTable(), None, images, root)
    assert not root.exists()


def test_history_survives_a_resume(tmp_path: Path) -> None:
    images, folder = draw_pictures(tmp_path, 3), tmp_path / "run"
    for epoch in (0, 1, 2, 3, 2):  # stopped after epoch 3, gone on from the checkpoint of epoch 1
        validate(PredictionTable(folder=folder), perfect([2] * 3), images, tmp_path, epoch=epoch)
    history = json.loads((folder / "predictions" / "history.json").read_text())
    assert history.keys() == {"text_to_image", "image_to_text", "recall"}
    for part in history.values():
        assert list(part) == ["0", "1", "2"]
    for direction in ("text_to_image", "image_to_text"):
        ranks = list(history[direction].values())
        assert len(ranks[0]) == 3 and set(ranks[0].values()) == {1}
        assert ranks == ranks[:1] * 3  # the same rows in every epoch
    assert history["recall"]["2"] == {"text_to_image_R@1": 25.0}
    page = (folder / "predictions.html").read_text(encoding="utf-8")
    assert page.count("epoch 0: <b>1</b> → 1: <b>1</b> → 2: <b>1</b>") == 6
    assert not list(folder.rglob(".*"))


def shuffled(count: int) -> Embeddings:
    """Images on axes of their own, captions on those of others."""
    whole = perfect([2] * count)
    return replace(whole, text=whole.text.roll(2, 0))


@pytest.mark.parametrize("end", ["finished", "interrupted"])
def test_the_whole_split_is_shown_once_at_the_end(tmp_path: Path, end: str) -> None:
    images, callback = draw_pictures(tmp_path, 12), PredictionTable(queries=3, top_k=2)
    for epoch in range(2):
        validate(callback, shuffled(12), images, tmp_path, epoch=epoch)
    assert 'id="misses"' not in (tmp_path / "predictions.html").read_text(encoding="utf-8")
    stub = stub_trainer(images, tmp_path, epoch=2)
    module = SimpleNamespace(validation_embeddings=None)  # an unfinished validation changes nothing
    if end == "finished":
        callback.on_train_end(stub, module)
    else:
        callback.on_exception(stub, module, KeyboardInterrupt())
    page = (tmp_path / "predictions.html").read_text(encoding="utf-8")
    assert "Predictions, epoch 1" in page
    assert page.count("data:image/png;base64,") == 3
    assert page[page.index('id="misses"') :].count("<article>") == 3

    (tmp_path / "predictions.html").unlink()
    callback.on_exception(stub, module, RuntimeError("after the end"))
    assert not (tmp_path / "predictions.html").exists()


@pytest.mark.parametrize("count", [0, 1])
def test_one_picture_and_none(tmp_path: Path, count: int) -> None:
    images, callback = draw_pictures(tmp_path, count), PredictionTable()
    validate(callback, perfect([2] * count), images, tmp_path)
    problem = pytest.warns(UserWarning, match="with I and N above 0")
    with contextlib.nullcontext() if count else problem:
        callback.on_train_end(stub_trainer(images, tmp_path), LightningModule())
    page = (tmp_path / "predictions.html").read_text()
    assert page.count("data:image/png;base64,") == 2 * count


def test_what_cannot_be_shown_is_told_once(tmp_path: Path) -> None:
    images, whole, callback = draw_pictures(tmp_path, 3), perfect([2] * 3), PredictionTable()
    wrong = replace(whole, text_image_id=whole.text_image_id.flip(0))
    with pytest.warns(UserWarning, match="could not be shown: ValueError: the embeddings assign") as caught:
        for epoch in range(2):
            validate(callback, wrong, images, tmp_path, epoch=epoch)
    assert len(caught) == 1
    (tmp_path / "predictions").write_text("a file where the folder should be")
    with pytest.warns(UserWarning, match="could not be shown: .*Error") as caught:
        validate(PredictionTable(), whole, images, tmp_path)
    assert len(caught) == 1


def test_the_table_reaches_wandb_and_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = draw_pictures(tmp_path, 8)
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path / "staged"))
    logger = WandbLogger(save_dir=tmp_path, mode="offline", project="tables")
    table = PredictionTable(queries=4, top_k=3, folder=tmp_path / "run")
    options = {"max_epochs": 2, "logger": logger, "num_sanity_val_steps": 1}
    trainer(tmp_path, table, **options).fit(Stub(perfect([2] * 8)), datamodule=Pictures(images))
    logger.experiment.finish()

    assert [path.name for path in (tmp_path / "run" / "predictions").iterdir()] == ["history.json"]
    # the table and its images wait for `wandb sync` in an artifact
    staged = {sha256(path.read_bytes()).hexdigest(): path for path in (tmp_path / "staged").rglob("tmp*")}
    tables = [json.loads(path.read_text()) for path in staged.values() if path.read_bytes()[:1] == b"{"]
    columns = ["epoch", "query", "rank", "hit@3", "true image", *FOUND]
    (shown,) = (table for table in tables if table.get("columns") == columns)
    assert len(shown["data"]) == 4
    for epoch, query, rank, hit, wanted, *found in shown["data"]:
        assert (epoch, rank, hit) == (1, 1, True)  # the last epoch
        path = tmp_path / f"{query.split()[1]}.png"
        assert (wanted["caption"], found[0]["caption"]) == (path.name, "1.000")
        assert len({image["sha256"] for image in found}) == 3
        for cell in (wanted, found[0]):
            with Image.open(staged[cell["sha256"]]) as image:
                pixel, color = image.getpixel((99, 99)), thumbnail(path).getpixel((99, 99))
                assert all(abs(a - b) < 5 for a, b in zip(pixel, color, strict=True))


def test_a_refusing_wandb_warns_once_and_stops_nothing(tmp_path: Path) -> None:
    refusing = WandbLogger.__new__(WandbLogger)
    refusing.log_metrics = Mock(side_effect=ConnectionError("server away"))
    images, callback = draw_pictures(tmp_path, 3), PredictionTable()
    with pytest.warns(UserWarning, match="server away") as caught:
        for epoch in range(2):
            validate(callback, perfect([2] * 3), images, tmp_path, epoch=epoch, loggers=[refusing])
    assert len(caught) == 1
    assert "epoch 1" in (tmp_path / "predictions.html").read_text()


def test_everything_reaches_the_server(wandb_server: WandbServer, tmp_path: Path) -> None:
    images = draw_pictures(tmp_path, 6)
    logger = WandbLogger(save_dir=tmp_path, project="p", id="one")
    fit = trainer(tmp_path, PredictionTable(queries=2, top_k=3), max_epochs=2, logger=logger)
    fit.fit(Stub(shuffled(6)), datamodule=Pictures(images))
    logger.experiment.finish()

    (run,) = wandb_server.runs.values()
    for name, times in {
        "val/predictions": 1,
        "val/predictions_image_to_text": 1,
        "val/similarity_matched": 2,
        "val/similarity_unmatched": 2,
        "val/worst_misses": 1,
        "val/similarities": 1,
        "val/recall": 1,
        "val/recall_history": 1,
    }.items():
        assert len([row for row in run.history if name in row]) == times, name
    for name, bins in {"matched": {100: 12}, "unmatched": {100: 48, 199: 12}}.items():
        histogram = run.summary[f"val/similarity_{name}"]  # own captions are all at right angles
        assert {n: count for n, count in enumerate(histogram["values"]) if count} == bins
        assert histogram["bins"] == pytest.approx([n / 100 - 1 for n in range(201)])
    pictures = [name for name in run.files if re.fullmatch("media/images/val/.*png", name)]
    assert len(pictures) == 3
    (table,) = [json.loads(content) for name, content in run.files.items() if f"{CAPTIONS}_" in name]
    assert table["columns"] == ["epoch", "image", "rank", "hit@3", "own captions", *FOUND]
    assert len(table["data"]) == 2
    for epoch, _image, rank, hit, own, *found in table["data"]:
        number = int(own.split()[1])
        assert own == f"picture {number} caption 0\npicture {number} caption 1"
        # The captions of the next image are on its axis; all others are tied with its own, and win.
        assert [answer.split()[2] for answer in found[:2]] == [str((number + 1) % 6)] * 2
        assert (epoch, rank, hit) == (1, 11, False)  # the last epoch
        assert not any("✓" in answer for answer in found)


CAPTIONS = "media/table/val/predictions_image_to_text"
FOUND = [f"prediction {n}" for n in (1, 2, 3)]
