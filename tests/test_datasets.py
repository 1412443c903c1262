from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader

from clip_lightning.data.captions import CaptionedImage
from clip_lightning.data.datasets import Collate, EvalDataset, Sample, TrainDataset
from clip_lightning.data.sampler import TrainSampler
from clip_lightning.data.scenes import draw
from clip_lightning.data.transforms import Augmentation, ImageTransform
from clip_lightning.errors import UserError

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
    augmentation = Augmentation(min_scale=0.5, colour=0.2)
    ids = options.pop("image_ids", range(len(images)))
    return TrainDataset(
        images,
        ids,
        TRANSFORM,
        augmentation,
        captions_per_image=captions_per_image,
        seed=options.get("seed", 0),
    )


def same(one: Sample, other: Sample) -> bool:
    return (one.captions, one.caption_rows, one.image_id) == (
        other.captions,
        other.caption_rows,
        other.image_id,
    ) and torch.equal(one.picture, other.picture)  # type: ignore[arg-type]


def test_a_sample_is_a_function_of_seed_epoch_and_index(tmp_path: Path) -> None:
    images = pictures(tmp_path, [5] * 4)
    one, other = train_dataset(images), train_dataset(images)
    keys = [(epoch, index) for epoch in range(3) for index in range(4)]
    expected = {key: one[key] for key in keys}
    for key in reversed(keys):
        assert same(other[key], expected[key])
    assert not same(expected[0, 1], expected[1, 1])
    assert not same(expected[0, 1], train_dataset(images, seed=1)[0, 1])


def test_batches_do_not_depend_on_the_number_of_workers(tmp_path: Path) -> None:
    dataset = train_dataset(pictures(tmp_path, [5] * 12))

    def batches(workers: int) -> list[dict[str, Any]]:
        sampler = TrainSampler(12, 3, seed=0)
        sampler.set_epoch(2)
        return list(
            DataLoader(
                dataset, batch_size=3, sampler=sampler, num_workers=workers, collate_fn=Collate(tokenize)
            )
        )

    for one, other in zip(batches(0), batches(2), strict=True):
        assert one.pop("broken") == other.pop("broken") == {}
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_captions_are_a_pictures_own_and_different_while_there_are_enough(tmp_path: Path) -> None:
    dataset = train_dataset(pictures(tmp_path, [5, 1, 3]), captions_per_image=3)
    seen: set[str] = set()
    for epoch in range(30):
        for index, count in enumerate([5, 1, 3]):
            sample = dataset[epoch, index]
            assert len(sample.captions) == 3
            assert len(set(sample.captions)) == min(3, count)
            starts = [0, 5, 6]
            assert sample.captions == tuple(f"{index}.{row - starts[index]}" for row in sample.caption_rows)
            seen.update(sample.captions)
    assert len(seen) == 9


def test_copies_of_a_picture_share_their_id(tmp_path: Path) -> None:
    dataset = train_dataset(pictures(tmp_path, [1, 1, 1]), image_ids=[0, 1, 0], captions_per_image=1)
    assert [dataset[0, index].image_id for index in range(3)] == [0, 1, 0]


def test_a_broken_picture_gives_way_to_the_next_one(tmp_path: Path) -> None:
    images = pictures(tmp_path, [2] * 5, broken={1, 2, 4})
    dataset = train_dataset(images)
    sample = dataset[3, 1]
    assert same(sample, dataset[3, 3])
    assert list(sample.broken) == [str(images[1].path), str(images[2].path)]
    assert all(sample.broken.values())
    assert dataset[3, 3].broken == {}
    assert same(dataset[0, 4], dataset[0, 0])


def test_nothing_but_broken_pictures(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"2 pictures in a row cannot be decoded.*0\.jpg.*--data\.root"):
        train_dataset(pictures(tmp_path, [1, 1], broken={0, 1}))[0, 0]
    with pytest.raises(UserError, match=r"--data\.captions_per_image is 0"):
        train_dataset([], captions_per_image=0)


def test_evaluation_has_every_picture_and_every_caption(tmp_path: Path) -> None:
    images = pictures(tmp_path, [1, 3, 2, 1], broken={2})
    dataset = EvalDataset(images, TRANSFORM)
    batch = Collate(tokenize)([dataset[index] for index in range(4)])
    assert batch["pixel_values"].shape == (3, 3, 16, 16)
    assert batch["pixel_values"].dtype == torch.uint8
    assert batch["image_id"].tolist() == [0, 1, 3]
    assert batch["text_image_id"].tolist() == [0, 1, 1, 1, 3]
    assert batch["text_id"].tolist() == [0, 1, 2, 3, 6]
    assert list(batch["broken"]) == [str(images[2].path)]
    assert batch["input_ids"].shape == batch["attention_mask"].shape == (5, 3)
    assert "".join(map(chr, batch["input_ids"][2])) == "1.1"
    assert batch["pixel_values"][1].tolist() == dataset[1].picture.tolist()  # type: ignore[union-attr]


def test_a_batch_without_a_whole_picture(tmp_path: Path) -> None:
    dataset = EvalDataset(pictures(tmp_path, [1, 3], broken={0, 1}), TRANSFORM)
    batch = Collate(tokenize)([dataset[0], dataset[1]])
    assert {name: len(value) for name, value in batch.items()} == dict.fromkeys(batch, 0) | {"broken": 2}
    types = {name: value.dtype for name, value in batch.items() if name != "broken"}
    assert types == dict.fromkeys(types, torch.int64) | {"pixel_values": torch.uint8}
    assert batch["pixel_values"].ndim == 4 and batch["input_ids"].ndim == 2


def test_datasets_and_collate_travel_to_workers(tmp_path: Path) -> None:
    images = pictures(tmp_path, [2, 2])
    for thing in (train_dataset(images), EvalDataset(images, TRANSFORM), Collate(tokenize)):
        assert type(pickle.loads(pickle.dumps(thing))) is type(thing)


def test_captions_of_any_kind_are_passed_on(tmp_path: Path) -> None:
    draw(0, 0, 24).save(tmp_path / "a.png")
    texts = ("👩‍🚒 a 'quoted' \"one\"", "word " * 10_000, "")
    dataset = EvalDataset([CaptionedImage(tmp_path / "a.png", texts)], TRANSFORM)
    assert dataset[0].captions == texts
    assert Collate(tokenize)([dataset[0]])["input_ids"].shape == (3, 50_000)


@pytest.mark.real
def test_real_photographs(shared_data: Path) -> None:
    paths = sorted((shared_data / "flickr8k" / "Images_original").iterdir())[:8]
    with Image.open(paths[0]) as image:
        assert min(image.size) > 224
    dataset = train_dataset([CaptionedImage(path, ("a", "b")) for path in paths])
    batch = Collate(tokenize)([dataset[0, index] for index in range(8)])
    assert batch["pixel_values"].shape == (8, 3, 16, 16)
    assert batch["broken"] == {}
