"""The table after every validation: on disk, in W&B, through a resume."""

from __future__ import annotations

import json
from hashlib import sha256
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.loggers import WandbLogger
from PIL import Image

from clip_lightning.data.captions import CaptionedImage, content_groups
from clip_lightning.errors import UserError
from clip_lightning.evaluation.retrieval import Embeddings
from clip_lightning.tracking.pages import thumbnail
from clip_lightning.tracking.tables import PredictionTable


def draw_pictures(folder: Path, count: int) -> list[CaptionedImage]:
    """Pictures of one colour each, with two captions that say whose they are."""
    images = []
    for n in range(count):
        images.append(CaptionedImage(folder / f"{n}.png", (f"picture {n} first", f"picture {n} second")))
        Image.new("RGB", (60, 40), (200, 12 * n, 40)).save(images[n].path)
    return images


def perfect(count: int) -> Embeddings:
    """Every picture on an axis of its own, with its two captions."""
    axes, pictures = torch.eye(count), torch.arange(count)
    owner = pictures.repeat_interleave(2)
    return Embeddings(axes, axes[owner], pictures, owner, torch.arange(2 * count))


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

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


class Pictures(LightningDataModule):
    def __init__(self, images: list[CaptionedImage]) -> None:
        super().__init__()
        self.given = images

    def images(self, split: str) -> list[CaptionedImage]:
        assert split == "val"
        return self.given

    def content_ids(self, split: str) -> list[int]:
        return content_groups(self.images(split))

    def train_dataloader(self) -> list[int]:
        return [0, 1]

    val_dataloader = train_dataloader


def stub_trainer(
    images: list[CaptionedImage], root: Path, *, epoch: int = 0, **changes: object
) -> SimpleNamespace:
    return SimpleNamespace(
        **{
            "state": SimpleNamespace(fn="fit"),
            "sanity_checking": False,
            "is_global_zero": True,
            "datamodule": Pictures(images),
            "current_epoch": epoch,
            "global_step": 10 * epoch,
            "default_root_dir": str(root),
            "loggers": [],
        }
        | changes
    )


def test_nothing_is_written_outside_a_fit_and_on_other_ranks(tmp_path: Path) -> None:
    images = draw_pictures(tmp_path, 3)
    module = SimpleNamespace(validation_embeddings=perfect(3))
    root = tmp_path / "run"
    for change in (
        {"sanity_checking": True},
        {"is_global_zero": False},
        {"state": SimpleNamespace(fn="validate")},
        {"datamodule": None},
    ):
        PredictionTable().on_validation_end(stub_trainer(images, root, **change), module)
    PredictionTable(queries=0).on_validation_end(stub_trainer(images, root), module)
    PredictionTable().on_validation_end(
        stub_trainer(images, root), SimpleNamespace(validation_embeddings=None)
    )
    assert not root.exists()
    for arguments, name in (({"queries": -1}, "queries"), ({"top_k": 0}, "top_k")):
        with pytest.raises(UserError, match=f"--predictions.{name}"):
            PredictionTable(**arguments)


def test_history_survives_a_resume(tmp_path: Path) -> None:
    images = draw_pictures(tmp_path, 3)
    module = SimpleNamespace(validation_embeddings=perfect(3))
    folder = tmp_path / "run"
    for epoch in (0, 1, 2, 3, 2):  # stopped after epoch 3, gone on from the checkpoint of epoch 1
        PredictionTable(folder=folder).on_validation_end(stub_trainer(images, tmp_path, epoch=epoch), module)
    history = json.loads((folder / "predictions" / "history.json").read_text())
    assert list(history) == ["0", "1", "2"]
    assert all(set(ranks.values()) == {1} and len(ranks) == 3 for ranks in history.values())
    page = (folder / "predictions.html").read_text(encoding="utf-8")
    assert page.count("epoch 0: <b>1</b> → 1: <b>1</b> → 2: <b>1</b>") == 3
    assert not list(folder.rglob(".*"))


def test_the_table_reaches_wandb_and_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = draw_pictures(tmp_path, 8)
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path / "staged"))
    logger = WandbLogger(save_dir=tmp_path, mode="offline", project="tables")
    trainer = Trainer(
        max_epochs=2,
        accelerator="cpu",
        default_root_dir=tmp_path,
        logger=logger,
        callbacks=[PredictionTable(queries=4, top_k=3, folder=tmp_path / "run")],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=1,
    )
    trainer.fit(Stub(perfect(8)), datamodule=Pictures(images))
    logger.experiment.finish()

    names = sorted(path.name for path in (tmp_path / "run" / "predictions").iterdir())
    assert names == ["epoch=00.png", "epoch=01.png", "history.json"]
    run = next(tmp_path.glob("wandb/offline-run-*/files"))
    shown = [json.loads(path.read_text()) for path in run.glob("media/table/val/predictions_*.table.json")]
    columns = [
        "epoch",
        "query",
        "rank",
        "hit@3",
        "true image",
        "prediction 1",
        "prediction 2",
        "prediction 3",
    ]
    assert [table["columns"] for table in shown] == [columns] * 2
    assert sorted(row[0] for table in shown for row in table["data"]) == [0] * 4 + [1] * 4
    # The pictures themselves wait for `wandb sync` in an artifact.
    files = {sha256(path.read_bytes()).hexdigest(): path for path in (tmp_path / "staged").rglob("tmp*")}
    staged = [json.loads(path.read_text()) for path in files.values() if path.read_bytes().startswith(b"{")]
    rows = [row for table in staged if table.get("_type") == "table" for row in table["data"]]
    assert len(rows) == 8
    for _epoch, query, rank, hit, wanted, *found in rows:
        assert (rank, hit) == (1, True)
        path = tmp_path / f"{query.split()[1]}.png"
        assert (wanted["caption"], found[0]["caption"]) == (path.name, "1.000")
        assert len({picture["sha256"] for picture in found}) == 3
        for picture in (wanted, found[0]):
            with Image.open(files[picture["sha256"]]) as image:
                pixel, colour = image.getpixel((99, 99)), thumbnail(path).getpixel((99, 99))
                assert all(abs(a - b) < 5 for a, b in zip(pixel, colour, strict=True))


def test_a_refusing_wandb_warns_once_and_stops_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Refusing(WandbLogger):
        def __init__(self) -> None:
            pass

        @property
        def experiment(self) -> object:
            raise ConnectionError("server away")

    images = draw_pictures(tmp_path, 3)
    module = SimpleNamespace(validation_embeddings=perfect(3))
    callback = PredictionTable()
    with pytest.warns(UserWarning, match="server away") as caught:
        for epoch in range(2):
            trainer = stub_trainer(images, tmp_path, epoch=epoch, loggers=[Refusing()])
            callback.on_validation_end(trainer, module)
    assert len(caught) == 1
    assert (tmp_path / "predictions" / "epoch=01.png").exists()
