"""Samples and batches: one picture with its captions, and many of them as tensors.

B pictures, N captions, K captions a picture, L tokens, H height, W width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from clip_lightning.data.captions import CaptionedImage
from clip_lightning.data.features import Features
from clip_lightning.data.images import (
    RETRY_SECONDS,
    Augmentation,
    BrokenImage,
    ImageTransform,
    augment,
    decode_image,
)
from clip_lightning.errors import UserError

MOST_BROKEN_IN_A_ROW = 100


@dataclass(frozen=True)
class Samples:
    """Pictures, each with captions of its own.

    Attributes:
        pictures: B times pixels uint8 (3, H, W), or cached features (D,); broken pictures are not among them.
        image_id: (B,) in training the same for pictures with the same bytes, in evaluation one a picture.
        counts: (B,) how many of the captions belong to each picture.
        captions: of all these pictures, picture after picture.
        caption_rows: (N,) for each of them its row among all captions of the split.
        broken: path → reason, of the pictures that could not be decoded on the way to these samples.
        names: of each picture, where its number among all pictures does not say which it is.
    """

    pictures: list[Tensor]
    image_id: np.ndarray
    counts: np.ndarray
    captions: list[str]
    caption_rows: np.ndarray
    broken: dict[str, str]
    names: list[str] | None = None


class _Captions:
    """The captions of a split, picture after picture, and where those of each picture begin."""

    def __init__(self, images: Sequence[CaptionedImage]) -> None:
        self.texts = [caption for image in images for caption in image.captions]
        self.counts = np.array([len(image.captions) for image in images], dtype=np.int64)
        self.first_rows = np.cumsum(self.counts) - self.counts

    def __getitem__(self, rows: np.ndarray) -> list[str]:
        return [self.texts[row] for row in rows.tolist()]


class TrainDataset(Dataset[Samples]):
    """Pictures with K random captions of their own: pure functions of (seed, epoch, index)."""

    def __init__(
        self,
        images: Sequence[CaptionedImage],
        image_ids: Sequence[int],
        transform: ImageTransform,
        augmentation: Augmentation,
        *,
        captions_per_image: int,
        seed: int,
        views: Sequence[Features] = (),
    ) -> None:
        """Give `captions_per_image` captions with each picture, one `image_ids` a picture.

        With cached `views`, each of them features of every picture, one is drawn instead of decoding.

        Raises:
            UserError: when `captions_per_image` is below one.
        """
        if captions_per_image < 1:
            raise UserError(f"--data.captions_per_image is {captions_per_image}; expected 1 or more")
        self.images, self.image_ids, self.captions = images, np.array(image_ids), _Captions(images)
        self.transform, self.augmentation = transform, augmentation
        self.captions_per_image, self.seed, self.views = captions_per_image, seed, views

    def __len__(self) -> int:
        """The number of pictures."""
        return len(self.images)

    def __getitems__(self, keys: Sequence[tuple[int, int]]) -> Samples:
        """The samples of these (epoch, index); in place of a broken picture the next readable one.

        Raises:
            UserError: when a hundred pictures in a row, or all of them, are broken.
        """
        pictures: dict[int, Tensor] = {}  # by their place among the keys
        broken: dict[str, str] = {}
        keys, missing = list(keys), list(range(len(keys)))
        most = min(len(self), MOST_BROKEN_IN_A_ROW)
        for _ in range(most):
            for place, picture in zip(missing, self._pictures([keys[i] for i in missing]), strict=True):
                if isinstance(picture, Tensor):
                    pictures[place] = picture
                    continue
                epoch, index = keys[place]
                broken[str(self.images[index].path)] = str(picture)
                keys[place] = epoch, (index + 1) % len(self)
            missing = [place for place in missing if place not in pictures]
            if not missing:
                return self._samples(keys, [pictures[place] for place in range(len(keys))], broken)
        path, reason = next(iter(broken.items()))
        raise UserError(
            f"{most} pictures in a row cannot be decoded, the first is {path}: {reason}; "
            "mend the pictures below --data.root"
        )

    def _pictures(self, keys: Sequence[tuple[int, int]]) -> Sequence[Tensor | BrokenImage]:
        if not self.views:
            return [self._augmented(epoch, index) for epoch, index in keys]
        index = np.array(keys)[:, 1]
        view = _random_words(self.seed, keys, 1)[:, 0] % len(self.views)
        found: dict[int, Tensor | BrokenImage] = {}
        for number, features in enumerate(self.views):
            places = np.flatnonzero(view == number)
            found |= zip(places.tolist(), _cached(features, index[places]), strict=True)
        return [found[place] for place in range(len(keys))]

    def _augmented(self, epoch: int, index: int) -> Tensor | BrokenImage:
        rng = np.random.default_rng((self.seed, epoch, index))
        try:
            pixels = decode_image(self.images[index].path, pauses=RETRY_SECONDS)
            return augment(pixels, self.transform, self.augmentation, rng)
        except BrokenImage as error:
            return error

    def _samples(
        self, keys: Sequence[tuple[int, int]], pictures: list[Tensor], broken: dict[str, str]
    ) -> Samples:
        """Draw captions: all different while there are enough, else each as often as any other."""
        index = np.array(keys)[:, 1]
        counts = self.captions.counts[index, None]
        words = _random_words(self.seed, keys, 1 + counts.max())[:, 1:]  # the first is the view's
        words[np.arange(words.shape[1]) >= counts] = np.iinfo(np.uint64).max
        order = words.argsort(axis=1, kind="stable")
        chosen = np.take_along_axis(order, np.arange(self.captions_per_image) % counts, axis=1)
        rows = (self.captions.first_rows[index, None] + chosen).ravel()
        each = np.full(len(index), self.captions_per_image)
        return Samples(pictures, self.image_ids[index], each, self.captions[rows], rows, broken)


class EvalDataset(Dataset[Samples]):
    """Every picture, unaugmented, with all its captions."""

    def __init__(
        self, images: Sequence[CaptionedImage], transform: ImageTransform, features: Features | None = None
    ) -> None:
        """Read `images` in their order; an `image_id` is the position here, so that no two share it.

        With cached `features` of every picture nothing is decoded.
        """
        self.images, self.transform, self.features = images, transform, features
        self.captions = _Captions(images)

    def __len__(self) -> int:
        """The number of pictures."""
        return len(self.images)

    def __getitems__(self, indices: Sequence[int]) -> Samples:
        """The pictures at these `indices`, without those that are broken."""
        found = dict(zip(indices, self._pictures(indices), strict=True))
        pictures = {i: picture for i, picture in found.items() if isinstance(picture, Tensor)}
        broken = {str(self.images[i].path): str(found[i]) for i in indices if i not in pictures}
        index = np.array([*pictures], dtype=np.int64)
        first, counts = self.captions.first_rows[index], self.captions.counts[index]
        rows = [np.arange(start, start + count) for start, count in zip(first, counts, strict=True)]
        flat = np.concatenate([np.empty(0, np.int64), *rows])
        return Samples([*pictures.values()], index, counts, self.captions[flat], flat, broken)

    def _pictures(self, indices: Sequence[int]) -> Sequence[Tensor | BrokenImage]:
        if self.features is not None:
            return _cached(self.features, indices)
        return [self._decoded(index) for index in indices]

    def _decoded(self, index: int) -> Tensor | BrokenImage:
        try:
            return self.transform(decode_image(self.images[index].path, pauses=RETRY_SECONDS))
        except BrokenImage as error:
            return error


def _cached(features: Features, rows: Sequence[int] | np.ndarray) -> list[Tensor | BrokenImage]:
    """Rows (D,); one is NaN where the picture could not be read when its features were computed."""
    values = features.rows(rows)
    why = BrokenImage("it could not be decoded when its features were cached")
    broken = values.isnan().any(dim=1).tolist()
    return [why if bad else row for row, bad in zip(values, broken, strict=True)]


def _random_words(seed: int, keys: Sequence[tuple[int, int]], count: int) -> np.ndarray:
    """64 random bits (len(keys), count), each a function of seed, epoch, index and column.

    numpy's generators would be seeded one a sample, which takes longer than all else a cached sample needs.
    """
    epoch, index = np.array(keys, dtype=np.uint64).T
    state = _mixed(_mixed(_mixed(np.full(len(keys), seed, np.uint64)) + epoch) + index)
    return _mixed(state[:, None] + np.arange(count, dtype=np.uint64))


def _mixed(words: np.ndarray) -> np.ndarray:
    """SplitMix64's output function (Steele, Lea, Flood 2014): each word to another, all bits stirred."""
    words = words + np.uint64(0x9E3779B97F4A7C15)
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))


@dataclass(frozen=True)
class Collate:
    """Makes a batch of samples.

    Attributes:
        tokenize: from N captions to `input_ids` and `attention_mask`, (N, L) padded to the longest.
        text_features: cached features of all captions of the split; with them nothing is tokenized.
    """

    tokenize: Callable[[list[str]], dict[str, Tensor]]
    text_features: Features | None = None

    def __call__(self, samples: Samples) -> dict[str, Any]:
        """The batch.

        `pixel_values` uint8 (B, 3, H, W) or `image_features` (B, D), `input_ids` and `attention_mask` (N, L)
        or `text_features` (N, D), `image_id` (B,), `text_image_id` (N,), `text_id` (N,) the captions' rows,
        all int64, and `broken` path → reason; of shards `names`, B of them. Where every picture is broken, B
        and N are 0.
        """
        named = {} if samples.names is None else {"names": samples.names}
        return {
            **named,
            **_stack(samples.pictures),
            **self._texts(samples),
            "image_id": torch.from_numpy(samples.image_id),
            "text_image_id": torch.from_numpy(samples.image_id.repeat(samples.counts)),
            "text_id": torch.from_numpy(samples.caption_rows),
            "broken": samples.broken,
        }

    def _texts(self, samples: Samples) -> dict[str, Tensor]:
        if self.text_features is not None:
            return {"text_features": self.text_features.rows(samples.caption_rows)}
        # Tokenizers fail on an empty list: tokenize something, and keep none of it.
        tokens = self.tokenize(samples.captions or [""])
        return {name: tokens[name][: len(samples.captions)] for name in ("input_ids", "attention_mask")}


def _stack(pictures: list[Tensor]) -> dict[str, Tensor]:
    """Pixels (3, H, W) as one (B, 3, H, W), channels last as the decoders left them; or features (B, D)."""
    if not pictures:
        return {"pixel_values": torch.empty((0, 3, 0, 0), dtype=torch.uint8)}
    if pictures[0].ndim == 1:
        return {"image_features": torch.stack(pictures)}
    return {"pixel_values": torch.stack([pixels.permute(1, 2, 0) for pixels in pictures]).permute(0, 3, 1, 2)}
