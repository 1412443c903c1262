"""The prediction table shows the right pictures, on disk and in W&B, and survives what runs go through."""

from __future__ import annotations

import json
import re
from hashlib import sha256
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.loggers import WandbLogger
from PIL import Image
from torch.nn.functional import normalize, one_hot

from clip_lightning.data.captions import CaptionedImage, content_groups
from clip_lightning.errors import UserError
from clip_lightning.evaluation.retrieval import Embeddings, retrieval_ranks
from clip_lightning.tracking.pages import draw_predictions, thumbnail, write_predictions_page
from clip_lightning.tracking.predictions import Prediction, PredictionRow, choose_queries, prediction_rows
from clip_lightning.tracking.tables import PredictionTable

GREEN = (22, 163, 74)


def records(counts: list[int], folder: Path = Path("pictures")) -> list[CaptionedImage]:
    """Picture n with as many captions as counts[n]; each caption says whose it is."""
    return [
        CaptionedImage(folder / f"{n}.png", tuple(f"picture {n} caption {c}" for c in range(count)))
        for n, count in enumerate(counts)
    ]


def perfect(counts: list[int]) -> Embeddings:
    """Every picture on an axis of its own, with its captions."""
    owner = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    axes = one_hot(torch.arange(len(counts))).float()
    return Embeddings(axes, axes[owner], torch.arange(len(counts)), owner, torch.arange(len(owner)))


def taken(whole: Embeddings, pictures: list[int], captions: list[int]) -> Embeddings:
    """These rows, in this order."""
    return Embeddings(
        whole.image[pictures],
        whole.text[captions],
        whole.image_id[pictures],
        whole.text_image_id[captions],
        whole.text_id[captions],
    )


def draw_pictures(folder: Path, count: int) -> list[CaptionedImage]:
    images = records([2] * count, folder)
    for n, image in enumerate(images):
        Image.new("RGB", (60, 40), (200, 12 * n, 40)).save(image.path)
    return images


COUNTS = [1, 5, 0, 2, 7, 3]


def test_each_caption_gets_its_own_text_and_picture() -> None:
    images, whole = records(COUNTS), perfect(COUNTS)
    rows = prediction_rows(whole, images, range(6), range(18), k=3)
    assert [row.text for row in rows] == [caption for image in images for caption in image.captions]
    for row in rows:
        assert row.text.startswith(f"picture {row.true_path.stem} ")
        assert (row.rank, row.hit, row.candidates, len(row.predictions)) == (1, True, 6, 3)
        assert row.predictions[0] == Prediction(row.true_path, 1.0, right=True)
        assert not any(other.right for other in row.predictions[1:])


def test_missing_pictures_and_another_order_move_nothing() -> None:
    images, whole = records(COUNTS), perfect(COUNTS)
    captions = [row for row in range(18) if whole.text_image_id[row] != 1]  # picture 1 could not be read
    part = taken(whole, [5, 0, 4, 3, 2], captions[::-1])
    rows = prediction_rows(part, images, range(6), range(18), k=5)
    assert [row.text_id for row in rows] == captions
    for row in rows:
        assert row.text.startswith(f"picture {row.true_path.stem} ")
        assert row.predictions[0] == Prediction(row.true_path, 1.0, right=True)
        assert images[1].path not in [prediction.path for prediction in row.predictions]


def test_a_picture_is_known_by_its_id_not_by_its_place() -> None:
    """The ancestor's fault: positions among the embeddings used as positions in the whole list."""
    images, whole = records([1] * 10), perfect([1] * 10)
    (row,) = prediction_rows(taken(whole, [8, 9, 7], [9, 8, 7]), images, range(10), [9], k=3)
    assert [prediction.path.stem for prediction in row.predictions] == ["9", "7", "8"]  # 7 and 8 are level


def test_rank_is_that_of_the_metric_and_of_the_list() -> None:
    generator = torch.Generator().manual_seed(0)
    counts = [3] * 40
    exact = perfect(counts)
    image = torch.randint(-1, 2, (40, 3), generator=generator).float()  # many exact ties
    text = torch.randint(-1, 2, (120, 3), generator=generator).float()
    noisy = Embeddings(image, text, exact.image_id, exact.text_image_id, exact.text_id)
    ranks, _ = retrieval_ranks(image, text, exact.text_image_id)
    rows = prediction_rows(noisy, records(counts), range(40), range(120), k=40)
    assert [row.rank for row in rows] == ranks.tolist()
    for row in rows:
        assert row.predictions[row.rank - 1].right
        assert len({prediction.path for prediction in row.predictions}) == 40
        similarities = [prediction.similarity for prediction in row.predictions]
        assert similarities == sorted(similarities, reverse=True)


def test_identical_pictures_count_as_one() -> None:
    images, axes = records([1] * 5), torch.eye(4)
    image = axes[[0, 1, 1, 2, 3]]  # pictures 1 and 2 are the same file under two names
    text = normalize(torch.tensor([[0.0, 0.9, 0.5, 0.0]]))
    embeddings = Embeddings(image, text, torch.arange(5), torch.tensor([2]), torch.tensor([2]))
    (row,) = prediction_rows(embeddings, images, [0, 1, 1, 3, 4], [2], k=5)
    assert (row.rank, row.candidates, row.true_path.stem) == (1, 4, "2")
    assert [prediction.path.stem for prediction in row.predictions] == ["2", "3", "0", "4"]
    assert [prediction.right for prediction in row.predictions] == [True, False, False, False]


def test_disagreement_is_an_error_not_a_wrong_picture() -> None:
    images, whole = records([2, 2]), perfect([2, 2])
    shifted = Embeddings(whole.image, whole.text, whole.image_id, whole.text_image_id.flip(0), whole.text_id)
    with pytest.raises(ValueError, match="caption row 1 is of picture 0, but the embeddings say 1"):
        prediction_rows(shifted, images, range(2), [1], k=1)
    with pytest.raises(ValueError, match="outside the split's 4 captions"):
        prediction_rows(whole, images, range(2), [4], k=1)
    with pytest.raises(ValueError, match="k must be"):
        prediction_rows(whole, images, range(2), [1], k=0)


def test_queries_are_fixed_spread_and_one_a_picture() -> None:
    images = records([index % 4 for index in range(400)])
    owner = [n for n, image in enumerate(images) for _ in image.captions]
    chosen = choose_queries(images, 16, seed=3)
    assert chosen == choose_queries(images, 16, seed=3) != choose_queries(images, 16, seed=4)
    pictures = [owner[text_id] for text_id in chosen]
    assert len(set(pictures)) == 16
    assert {picture // 100 for picture in pictures} == {0, 1, 2, 3}
    assert len(choose_queries(images, 1000, seed=0)) == 300
    assert choose_queries(records([0, 0]), 4, seed=0) == choose_queries([], 4, seed=0) == []


def strange_rows(folder: Path) -> list[PredictionRow]:
    pictures = [image.path for image in draw_pictures(folder, 2)]
    texts = ["", "<script>alert(1)</script> & 🐶👩‍👩‍👧 日本語 \0 \ud83d", "word " * 10_000, "x" * 10_000]
    found = (Prediction(pictures[1], 0.5, False), Prediction(folder / "gone.png", 0.25, False))
    return [PredictionRow(n, text, pictures[0], 30, 40, found) for n, text in enumerate(texts)]


def test_drawing_takes_any_text_and_a_lost_picture(tmp_path: Path) -> None:
    rows = strange_rows(tmp_path)
    draw_predictions(rows, tmp_path / "new" / "a.png", "t" * 500)
    draw_predictions([], tmp_path / "none.png", "nothing")
    with Image.open(tmp_path / "new" / "a.png") as grid:
        grid.load()
        assert grid.height < 4 * 400  # long texts end in …
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["a.png"]  # no temporary file left


def test_the_frame_is_green_where_the_picture_is_right(tmp_path: Path) -> None:
    images = draw_pictures(tmp_path, 4)

    def greens(right: bool) -> int:
        predictions = tuple(Prediction(image.path, 0.5, right and n == 2) for n, image in enumerate(images))
        draw_predictions([PredictionRow(0, "", images[2].path, 9, 9, predictions)], tmp_path / "a.png", "")
        with Image.open(tmp_path / "a.png") as grid:
            return dict((colour, count) for count, colour in grid.getcolors(1 << 20) or []).get(GREEN, 0)

    assert greens(right=False) == 0
    assert greens(right=True) > 4 * 160 * 4


class Page(HTMLParser):
    """Tags and visible text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.sources: list[str] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.sources += [value or "" for name, value in attrs if name in ("src", "href")]

    def handle_data(self, data: str) -> None:
        self.text += data


def test_page_stands_alone_and_is_escaped(tmp_path: Path) -> None:
    rows = strange_rows(tmp_path)
    write_predictions_page(rows, {0: {1: 57}, 1: {1: 12, 9: 1}, 2: {1: 30}}, tmp_path / "p.html")
    page = Page((tmp_path / "p.html").read_text(encoding="utf-8"))
    assert "script" not in page.tags
    assert "<script>alert(1)</script> & 🐶👩‍👩‍👧 日本語" in page.text
    assert "epoch 0: 57 → 1: 12 → 2: 30" in page.text
    assert page.tags.count("polyline") == 1
    assert len(page.sources) == 4 * 3
    assert all(source.startswith("data:image/jpeg;base64,") for source in page.sources)


def test_long_histories_are_thinned(tmp_path: Path) -> None:
    history = {epoch: {0: 100 - epoch} for epoch in range(100)}
    write_predictions_page(strange_rows(tmp_path)[:1], history, tmp_path / "p.html")
    text = Page((tmp_path / "p.html").read_text(encoding="utf-8")).text
    (moves,) = re.findall("epoch 0: 100.*", text)
    assert moves.count("→") == 7 and moves.rstrip().endswith("99: 1")


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
    module = SimpleNamespace(validation_embeddings=perfect([2] * 3))
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
    module = SimpleNamespace(validation_embeddings=perfect([2] * 3))
    folder = tmp_path / "run"
    for epoch in (0, 1, 2, 3, 2):  # stopped after epoch 3, gone on from the checkpoint of epoch 1
        PredictionTable(folder=folder).on_validation_end(stub_trainer(images, tmp_path, epoch=epoch), module)
    history = json.loads((folder / "predictions" / "history.json").read_text())
    assert list(history) == ["0", "1", "2"]
    assert all(set(ranks.values()) == {1} and len(ranks) == 3 for ranks in history.values())
    assert "epoch 0: 1 → 1: 1 → 2: 1" in Page((folder / "predictions.html").read_text()).text
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
    trainer.fit(Stub(perfect([2] * 8)), datamodule=Pictures(images))
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
    module = SimpleNamespace(validation_embeddings=perfect([2] * 3))
    callback = PredictionTable()
    with pytest.warns(UserWarning, match="server away") as caught:
        for epoch in range(2):
            trainer = stub_trainer(images, tmp_path, epoch=epoch, loggers=[Refusing()])
            callback.on_validation_end(trainer, module)
    assert len(caught) == 1
    assert (tmp_path / "predictions" / "epoch=01.png").exists()
