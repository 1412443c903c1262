from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from clip_lightning.data import datasets
from clip_lightning.data.captions import CaptionedImage, Splits
from clip_lightning.data.datamodule import CaptionDataModule
from clip_lightning.data.datasets import Collate, EvalDataset, Samples, TrainDataset
from clip_lightning.data.features import FeatureCache, Features
from clip_lightning.data.images import Augmentation, ImageTransform
from clip_lightning.data.readers import ReadOptions
from clip_lightning.data.sampler import TrainSampler
from clip_lightning.data.scenes import draw
from clip_lightning.errors import UserError

Printed = pytest.CaptureFixture[str]
TRANSFORM = ImageTransform((16, 16), "bilinear", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


def tokenize(texts: list[str]) -> dict[str, Tensor]:
    """A token a character."""
    assert texts, "real tokenizers fail on an empty list"
    length = max(1, *map(len, texts)) if len(texts) > 1 else max(1, len(texts[0]))
    ids = torch.tensor([[ord(letter) for letter in text.ljust(length, "\0")] for text in texts])
    return {"input_ids": ids, "attention_mask": (ids > 0).long()}


def pictures(folder: Path, captions: list[int], broken: set[int] = frozenset()) -> list[CaptionedImage]:  # type: ignore[assignment]
    """As many captions a picture as `captions` says."""
    images = []
    for index, count in enumerate(captions):
        path = folder / f"{index}.jpg"
        if index in broken:
            path.write_bytes(b"\xff\xd8 broken")
        else:
            draw(0, index, 24).save(path, quality=92)
        images.append(CaptionedImage(path, tuple(f"{index}.{caption}" for caption in range(count))))
    return images


def train_dataset(images: list[CaptionedImage], captions_per_image: int = 2, **options: Any) -> TrainDataset:
    ids, augmentation = options.pop("image_ids", range(len(images))), Augmentation(min_scale=0.5, colour=0.2)
    options = {"captions_per_image": captions_per_image, "seed": 0, **options}
    return TrainDataset(images, ids, TRANSFORM, augmentation, **options)


def cached(folder: Path, values: np.ndarray) -> Features:
    key, cache = {"sum": repr(values.sum())}, FeatureCache(folder / "cache")
    return cache.get(key, len(values), lambda rows: values[rows.start : rows.stop], "rows")


def two_views(folder: Path, count: int, broken: set[int] = frozenset()) -> list[Features]:  # type: ignore[assignment]
    """Rows (3,) of two views that say whose they are: index, -index - 1."""
    values = np.arange(count, dtype=np.float32)[:, None].repeat(3, axis=1)
    values[sorted(broken), 1:] = np.nan
    return [cached(folder / "0", values), cached(folder / "1", -1 - values)]


def same(one: Samples, other: Samples) -> bool:
    names = ("captions", "image_id", "counts", "caption_rows")
    images = torch.equal(torch.stack([*one.images]), torch.stack([*other.images]))
    return images and all(np.array_equal(getattr(one, name), getattr(other, name)) for name in names)


def test_a_batch_consists_of_samples_that_are_functions_of_seed_epoch_and_index(tmp_path: Path) -> None:
    images = pictures(tmp_path, [5, 1, 3, 2, 4, 5], broken={2})
    texts = cached(tmp_path, np.arange(20, dtype=np.float32)[:, None])
    collate = Collate(tokenize, texts)

    def check(dataset: TrainDataset | EvalDataset, keys: list[Any]) -> None:
        whole = collate(dataset.__getitems__(keys))
        parts = [collate(dataset.__getitems__([key])) for key in keys]
        assert list(whole.pop("broken")) == [path for part in parts for path in part.pop("broken")]
        parts = [part for part in parts if len(part["image_id"])]
        assert whole.keys() == parts[0].keys()
        for name, values in whole.items():
            assert torch.equal(values, torch.cat([part[name] for part in parts])), name

    for views in ([], two_views(tmp_path, 6, broken={2})):
        check(train_dataset(images, 3, views=views), [(3, 4), (3, 2), (3, 0), (2, 1), (3, 5)])
        check(EvalDataset(images, TRANSFORM, views[0] if views else None), [0, 1, 2, 3, 4, 5])
        sample = train_dataset(images, 4, views=views).__getitems__([(0, 5)])
        for seed, epoch in ((0, 1), (1, 0)):
            dataset = train_dataset(images, 4, views=views, seed=seed)
            assert not same(sample, dataset.__getitems__([(epoch, 5)]))


def test_views_and_captions_are_drawn_uniformly(tmp_path: Path) -> None:
    images = pictures(tmp_path, [4] * 4)
    dataset = train_dataset(images, views=two_views(tmp_path, 4))
    drawn = [dataset.__getitems__([(epoch, index) for index in range(4)]) for epoch in range(600)]
    for index in range(4):
        views = [float(samples.images[index][0]) >= 0 for samples in drawn]
        assert 0.42 < np.mean(views) < 0.58
        ordered = [tuple(samples.caption_rows[2 * index : 2 * index + 2] - 4 * index) for samples in drawn]
        share = {pair: ordered.count(pair) / 600 for pair in set(ordered)}
        assert len(share) == 12 and all(0.04 < part < 0.13 for part in share.values())
        # the view says nothing of the captions
        assert 0.35 < np.mean([view for view, pair in zip(views, ordered, strict=True) if 0 in pair]) < 0.65
    pairs = [(samples.caption_rows[0], samples.caption_rows[2] - 4) for samples in drawn]
    assert len(set(pairs)) == 16  # nor a picture's choice of its neighbour's


def test_batches_do_not_depend_on_the_number_of_workers(tmp_path: Path) -> None:
    dataset = train_dataset(pictures(tmp_path, [5] * 12))
    sampler = TrainSampler(12, 3, seed=0)
    sampler.set_epoch(2)
    how: dict[str, Any] = {"batch_size": 3, "sampler": sampler, "collate_fn": Collate(tokenize)}
    for one, other in zip(DataLoader(dataset, **how), DataLoader(dataset, num_workers=2, **how), strict=True):
        assert one.pop("broken") == other.pop("broken") == {}
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_captions_of_an_image_are_drawn_without_repetition(tmp_path: Path) -> None:
    dataset = train_dataset(pictures(tmp_path, [5, 1, 3]), captions_per_image=4)
    seen: set[str] = set()
    for epoch in range(30):
        samples = dataset.__getitems__([(epoch, index) for index in range(3)])
        assert samples.counts.tolist() == [4, 4, 4]
        for index, count in enumerate([5, 1, 3]):
            captions = samples.captions[4 * index : 4 * index + 4]
            assert len(set(captions)) == min(4, count)
            rows = samples.caption_rows[4 * index : 4 * index + 4] - [0, 5, 6][index]
            assert captions == [f"{index}.{row}" for row in rows]
            seen.update(captions)
    assert len(seen) == 9
    copies = train_dataset(dataset.images, image_ids=[0, 1, 0], captions_per_image=2)
    batch = Collate(tokenize)(copies.__getitems__([(0, index) for index in range(3)]))
    assert batch["image_id"].tolist() == [0, 1, 0]
    assert batch["text_image_id"].tolist() == [0, 0, 1, 1, 0, 0]


def test_a_broken_image_is_replaced_by_the_next(tmp_path: Path) -> None:
    images = pictures(tmp_path, [2] * 5, broken={1, 2, 4})
    for views in ([], two_views(tmp_path, 5, broken={1, 2, 4})):
        dataset = train_dataset(images, views=views)
        samples = dataset.__getitems__([(3, 1), (3, 3), (3, 4)])
        assert same(samples, dataset.__getitems__([(3, 3), (3, 3), (3, 0)]))
        assert sorted(samples.broken) == [str(images[index].path) for index in (1, 2, 4)]
        assert all(samples.broken.values())
        assert dataset.__getitems__([(3, 3)]).broken == {}


def test_only_broken_images(tmp_path: Path) -> None:
    """The error is the same line if a loader process raises it."""
    images, keys = pictures(tmp_path, [1, 1], broken={0, 1}), [(0, 0), (0, 1)]
    message = r"^2 consecutive images cannot be decoded.*0\.jpg.*--data\.root\Z"
    with pytest.raises(UserError, match=message):
        train_dataset(images, views=two_views(tmp_path, 2, broken={0, 1})).__getitems__(keys)
    for workers in (0, 1):
        loader: Any = DataLoader(train_dataset(images), 2, sampler=keys, num_workers=workers)
        with pytest.raises(UserError, match=message):
            next(iter(loader))


def test_evaluation_has_all_images_and_captions(tmp_path: Path) -> None:
    images = pictures(tmp_path, [1, 3, 2, 1], broken={2})
    dataset = EvalDataset(images, TRANSFORM)
    batch = Collate(tokenize)(dataset.__getitems__(range(4)))
    assert batch["pixel_values"].shape == (3, 3, 16, 16)
    assert batch["pixel_values"].dtype == torch.uint8
    assert batch["image_id"].tolist() == [0, 1, 3]
    assert batch["text_image_id"].tolist() == [0, 1, 1, 1, 3]
    assert batch["text_id"].tolist() == [0, 1, 2, 3, 6]
    assert list(batch["broken"]) == [str(images[2].path)]
    assert batch["input_ids"].shape == batch["attention_mask"].shape == (5, 3)
    assert "".join(map(chr, batch["input_ids"][2])) == "1.1"
    assert torch.equal(batch["pixel_values"][1], dataset.__getitems__([1]).images[0])


def test_many_texts_are_grouped_by_length(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets, "MANY_TEXTS", 8)
    texts = ["x" * length for length in (30, 3, 9, 1, 17, 8, 2, 16)]
    pixels = [torch.zeros(3, 4, 4, dtype=torch.uint8)] * 4
    samples = Samples(pixels, np.arange(4), np.full(4, 2), texts, np.arange(8), {})
    batch = Collate(tokenize)(samples)
    assert batch["text_lengths"] == [8, 8, 16, 32]
    assert batch["text_order"].tolist() == [3, 6, 1, 5, 2, 7, 4, 0]
    assert batch["attention_mask"].sum(dim=1).tolist() == list(map(len, texts))


def test_a_batch_of_broken_images_is_empty(tmp_path: Path) -> None:
    images = pictures(tmp_path, [1, 3], broken={0, 1})
    for features in (None, two_views(tmp_path, 2, broken={0, 1})[0]):
        dataset = EvalDataset(images, TRANSFORM, features)
        batch = Collate(tokenize)(dataset.__getitems__([0, 1]))
        assert {name: len(value) for name, value in batch.items()} == dict.fromkeys(batch, 0) | {"broken": 2}
        types = {name: value.dtype for name, value in batch.items() if name != "broken"}
        assert types == dict.fromkeys(types, torch.int64) | {"pixel_values": torch.uint8}
        assert batch["pixel_values"].ndim == 4 and batch["input_ids"].ndim == 2


def test_a_small_training_set_is_one_batch(scenes: Path) -> None:
    data = CaptionDataModule(TRANSFORM, tokenize, scenes, batch_size=256)
    with pytest.warns(UserWarning, match=r"batch_size 256 is larger than the 32 training images"):
        data.setup("fit")
    assert data.batch_size == 32
    assert len(data.train_dataloader()) == 1


def test_fit_warns_about_shared_captions(make_clip: Any, tmp_path: Path, capsys: Printed) -> None:
    """Captions that the tokenizer cuts or does not know, and one caption for all images of a class."""
    clip = make_clip()
    texts = ["a red circle"] * 4 + ["\u732b \u72ac", "red square " * 40]
    texts += map("a red circle {}".format, range(6))
    pictures(tmp_path, [1] * 12)
    rows = [f"{number}.jpg,{text}" for number, text in enumerate(texts)]
    (tmp_path / "captions.csv").write_text("\n".join(["image,caption", *rows]))
    fractions = Splits(val_fraction=0, test_fraction=0)
    for read in (ReadOptions(splits=fractions), ReadOptions(splits=fractions, image_folder=tmp_path)):
        data = CaptionDataModule(clip.transform, clip.tokenize, tmp_path, read, batch_size=4)
        data.setup("fit")
    warned = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")]
    assert len(warned) == 6
    assert "8.3 % of the captions are longer than 64 tokens" in warned[0]
    assert "8.3 % of the captions have no word" in warned[1]
    assert "33 % of the captions belong to several images, most often 'a red circle' (4 images)" in warned[2]
