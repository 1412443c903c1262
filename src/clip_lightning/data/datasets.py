"""Samples and batches: one picture with its captions, and many of them as tensors.

B pictures, N captions, K captions a picture, L tokens, H height, W width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from clip_lightning.data.captions import CaptionedImage
from clip_lightning.data.transforms import Augmentation, BrokenImage, ImageTransform, augment, decode_image
from clip_lightning.errors import UserError
from clip_lightning.features import Features

_MOST_BROKEN_IN_A_ROW = 100


@dataclass(frozen=True)
class Sample:
    """One picture and captions of it.

    Attributes:
        picture: pixels uint8 (3, H, W), or cached features (D,); None where the picture is broken.
        captions: those of the picture that belong to this sample.
        caption_rows: for each of them its row among all captions of the split.
        image_id: in training the same for pictures with the same bytes, in evaluation one a picture.
        broken: path → reason, of the pictures that could not be decoded on the way to this sample.
    """

    picture: Tensor | None
    captions: tuple[str, ...]
    caption_rows: tuple[int, ...]
    image_id: int
    broken: dict[str, str] = field(default_factory=dict)


def first_rows(images: Sequence[CaptionedImage]) -> list[int]:
    """The row of each picture's first caption among all captions, picture after picture."""
    return list(accumulate((len(image.captions) for image in images), initial=0))[:-1]


class TrainDataset(Dataset[Sample]):
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
        self.images, self.image_ids, self.first_rows = images, image_ids, first_rows(images)
        self.transform, self.augmentation = transform, augmentation
        self.captions_per_image, self.seed, self.views = captions_per_image, seed, views

    def __len__(self) -> int:
        """The number of pictures."""
        return len(self.images)

    def __getitem__(self, key: tuple[int, int]) -> Sample:
        """The sample of (epoch, index); for a broken picture that of the next readable one.

        Raises:
            UserError: when a hundred pictures in a row, or all of them, are broken.
        """
        epoch, index = key
        broken: dict[str, str] = {}
        for step in range(min(len(self), _MOST_BROKEN_IN_A_ROW)):
            position = (index + step) % len(self)
            try:
                return self._sample(epoch, position, broken)
            except BrokenImage as error:
                broken[str(self.images[position].path)] = str(error)
        path, reason = next(iter(broken.items()))
        raise UserError(
            f"{len(broken)} pictures in a row cannot be decoded, the first is {path}: {reason}; "
            "mend the pictures below --data.root"
        )

    def _sample(self, epoch: int, index: int, broken: dict[str, str]) -> Sample:
        image = self.images[index]
        rng = np.random.default_rng((self.seed, epoch, index))
        count = len(image.captions)
        chosen = rng.choice(count, self.captions_per_image, replace=count < self.captions_per_image).tolist()
        return Sample(
            picture=self._picture(index, rng),
            captions=tuple(image.captions[row] for row in chosen),
            caption_rows=tuple(self.first_rows[index] + row for row in chosen),
            image_id=self.image_ids[index],
            broken=broken,
        )

    def _picture(self, index: int, rng: np.random.Generator) -> Tensor:
        if self.views:
            return _cached(self.views[int(rng.integers(len(self.views)))], index)
        return augment(decode_image(self.images[index].path), self.transform, self.augmentation, rng)


class EvalDataset(Dataset[Sample]):
    """Every picture, unaugmented, with all its captions."""

    def __init__(
        self, images: Sequence[CaptionedImage], transform: ImageTransform, features: Features | None = None
    ) -> None:
        """Read `images` in their order; an `image_id` is the position here, so that no two share it.

        With cached `features` of every picture nothing is decoded.
        """
        self.images, self.transform, self.features = images, transform, features
        self.first_rows = first_rows(images)

    def __len__(self) -> int:
        """The number of pictures."""
        return len(self.images)

    def __getitem__(self, index: int) -> Sample:
        """The picture at `index`; without pixels, but with the reason, where it is broken."""
        image, first = self.images[index], self.first_rows[index]
        rows = tuple(range(first, first + len(image.captions)))
        try:
            picture = (
                self.transform(decode_image(image.path))
                if self.features is None
                else _cached(self.features, index)
            )
        except BrokenImage as error:
            return Sample(None, image.captions, rows, index, {str(image.path): str(error)})
        return Sample(picture, image.captions, rows, index)


def _cached(features: Features, index: int) -> Tensor:
    """One row (D,); it is NaN where the picture could not be read when its features were computed."""
    row = features.rows([index])[0]
    if row.isnan().any():
        raise BrokenImage("it could not be decoded when its features were cached")
    return row


@dataclass(frozen=True)
class Collate:
    """Makes a batch of samples; captions of broken pictures are left out with them.

    Attributes:
        tokenize: from N captions to `input_ids` and `attention_mask`, (N, L) padded to the longest.
        text_features: cached features of all captions of the split; with them nothing is tokenized.
    """

    tokenize: Callable[[list[str]], dict[str, Tensor]]
    text_features: Features | None = None

    def __call__(self, samples: Sequence[Sample]) -> dict[str, Any]:
        """The batch.

        `pixel_values` uint8 (B, 3, H, W) or `image_features` (B, D), `input_ids` and `attention_mask` (N, L)
        or `text_features` (N, D), `image_id` (B,), `text_image_id` (N,), `text_id` (N,) the captions' rows,
        all int64, and `broken` path → reason. Where every picture is broken, B and N are 0.
        """
        whole = [sample for sample in samples if sample.picture is not None]
        pictures = [sample.picture for sample in samples if sample.picture is not None]
        rows = [row for sample in whole for row in sample.caption_rows]
        text_image_id = [sample.image_id for sample in whole for _ in sample.captions]
        return {
            **_stack(pictures),
            **self._texts([caption for sample in whole for caption in sample.captions], rows),
            "image_id": torch.tensor([sample.image_id for sample in whole], dtype=torch.int64),
            "text_image_id": torch.tensor(text_image_id, dtype=torch.int64),
            "text_id": torch.tensor(rows, dtype=torch.int64),
            "broken": {path: why for sample in samples for path, why in sample.broken.items()},
        }

    def _texts(self, captions: list[str], rows: list[int]) -> dict[str, Tensor]:
        if self.text_features is not None:
            return {"text_features": self.text_features.rows(rows)}
        # Tokenizers fail on an empty list: tokenize something, and keep none of it.
        tokens = self.tokenize(captions or [""])
        return {name: tokens[name][: len(captions)] for name in ("input_ids", "attention_mask")}


def _stack(pictures: list[Tensor]) -> dict[str, Tensor]:
    """Pixels (3, H, W) as one (B, 3, H, W), channels last as the decoders left them; or features (B, D)."""
    if not pictures:
        return {"pixel_values": torch.empty((0, 3, 0, 0), dtype=torch.uint8)}
    if pictures[0].ndim == 1:
        return {"image_features": torch.stack(pictures)}
    return {"pixel_values": torch.stack([pixels.permute(1, 2, 0) for pixels in pictures]).permute(0, 3, 1, 2)}
