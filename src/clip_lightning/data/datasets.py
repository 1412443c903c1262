"""Read samples, which are images with their captions, and collate them to batches of tensors.

B images, N captions, K captions per image, L tokens, H height, W width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from clip_lightning.data.captions import CaptionedImage
from clip_lightning.data.features import Features
from clip_lightning.data.images import Augmentation, BrokenImage, ImageTransform, augment, decode_image
from clip_lightning.errors import UserError

MOST_BROKEN_IN_A_ROW = 100
MANY_TEXTS, TEXT_GROUPS = 1024, 4  # so many texts are padded in so many groups of similar length
_NOT_CACHED = BrokenImage("it could not be decoded when its features were cached")


@dataclass(frozen=True)
class Samples:
    """Several images with their captions.

    Attributes:
        images: B tensors: pixels uint8 (3, H, W), or cached features (D,), which may also be one tensor;
            broken images are not included.
        image_id: (B,) in training, equal for images with the same bytes; in evaluation, unique per image.
        counts: (B,) number of captions per image.
        captions: the captions of all these images, image by image.
        caption_rows: (N,) the row of each caption among all captions of the split.
        broken: path → reason, for images that could not be decoded while these samples were read.
        names: names of the images, if `image_id` does not identify them.
    """

    images: list[Tensor] | Tensor
    image_id: np.ndarray
    counts: np.ndarray
    captions: list[str]
    caption_rows: np.ndarray
    broken: dict[str, str]
    names: list[str] | None = None


class _CaptionedImages(Dataset[Samples]):
    """Images, and the captions of all of them, image by image."""

    def __init__(self, images: Sequence[CaptionedImage], transform: ImageTransform) -> None:
        self.images, self.transform = images, transform
        self.captions = [caption for image in images for caption in image.captions]
        self.counts = np.array([len(image.captions) for image in images], dtype=np.int64)
        self.first_rows = np.cumsum(self.counts) - self.counts

    def __len__(self) -> int:
        return len(self.images)


class TrainDataset(_CaptionedImages):
    """Images with K random captions each: samples are pure functions of (seed, epoch, index)."""

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
        """Return `captions_per_image` captions with each image, which has one of the `image_ids`.

        If there are cached `views`, each with the features of every image, a random view replaces decoding.
        """
        super().__init__(images, transform)
        self.image_ids, self.augmentation = np.array(image_ids), augmentation
        self.captions_per_image, self.seed, self.views = captions_per_image, seed, views
        self._broken = np.array([features.broken for features in views])

    def __getitems__(self, keys: Sequence[tuple[int, int]]) -> Samples:
        """Return the samples of these (epoch, index); a broken image is replaced by the next readable one."""
        places, pixels, broken = np.array(keys), dict[int, Any](), dict[str, str]()
        most = min(len(self), MOST_BROKEN_IN_A_ROW)
        for _ in range(most):
            failed = self._decode(places, pixels)
            if not failed:
                return self._samples(places, self._images(places, pixels), broken)
            broken |= {str(self.images[places[row, 1]].path): str(failed[row]) for row in failed}
            places[[*failed], 1] = (places[[*failed], 1] + 1) % len(self)
        path, reason = next(iter(broken.items()))
        raise UserError(
            f"{most} consecutive images cannot be decoded (first {path}: {reason}); fix the images in "
            "--data.root"
        )

    def _decode(self, places: np.ndarray, pixels: dict[int, Any]) -> dict[int, Any]:
        """Add the missing rows to `pixels` unless they are cached, and return why others are broken."""
        if self.views:
            broken = self._broken[self._view(places), places[:, 1]]
            return dict.fromkeys(broken.nonzero()[0].tolist(), _NOT_CACHED)
        failed: dict[int, Any] = {}
        for row, (epoch, index) in enumerate(places.tolist()):
            if row not in pixels:
                rng = np.random.default_rng((self.seed, epoch, index))
                change = partial(augment, transform=self.transform, augmentation=self.augmentation, rng=rng)
                result = _decoded(self.images[index], change)
                (failed if isinstance(result, BrokenImage) else pixels)[row] = result
        return failed

    def _images(self, places: np.ndarray, pixels: dict[int, Tensor]) -> Tensor | list[Tensor]:
        """Return the decoded images in order, or the features of a random view of each image."""
        if not self.views:
            return [pixels[row] for row in range(len(places))]
        view, index = self._view(places), places[:, 1]
        rows = [features.rows(index[view == number]) for number, features in enumerate(self.views)]
        order = torch.from_numpy(view.argsort(kind="stable").argsort())
        return torch.cat(rows).index_select(0, order.to(rows[0].device, non_blocking=True))

    def _view(self, places: np.ndarray) -> np.ndarray:
        return (_random_words(self.seed, places, 1)[:, 0] % len(self.views)).astype(np.int64)

    def _samples(self, keys: np.ndarray, images: Any, broken: dict[str, str]) -> Samples:
        """Draw captions without repetition, or, if an image has too few, each equally often."""
        index = keys[:, 1]
        counts = self.counts[index, None]
        random = _random_words(self.seed, keys, 1 + counts.max())[:, 1:]  # the first chooses the view
        random[np.arange(random.shape[1]) >= counts] = np.iinfo(np.uint64).max
        order = random.argsort(axis=1, kind="stable")
        chosen = np.take_along_axis(order, np.arange(self.captions_per_image) % counts, axis=1)
        rows = (self.first_rows[index, None] + chosen).ravel()
        drawn = np.full(len(index), self.captions_per_image)
        captions = [self.captions[row] for row in rows.tolist()]
        return Samples(images, self.image_ids[index], drawn, captions, rows, broken)


class EvalDataset(_CaptionedImages):
    """All images, without augmentation, with all their captions."""

    def __init__(
        self, images: Sequence[CaptionedImage], transform: ImageTransform, features: Features | None = None
    ) -> None:
        """Read `images` in order; the `image_id` is the position in the list, so it is unique.

        If there are cached `features` of every image, nothing is decoded.
        """
        super().__init__(images, transform)
        self.features = features

    def __getitems__(self, indices: Sequence[int]) -> Samples:
        """Return the images at these `indices`, except broken ones."""
        results: dict[int, Tensor | BrokenImage]
        if self.features is None:
            results = {i: _decoded(self.images[i], self.transform) for i in indices}
        else:
            rows, broken_rows = self.features.rows(indices), self.features.broken
            pairs = zip(indices, rows, strict=True)
            results = {i: _NOT_CACHED if broken_rows[i] else row for i, row in pairs}
        images = {i: image for i, image in results.items() if isinstance(image, Tensor)}
        broken = {str(self.images[i].path): str(results[i]) for i in indices if i not in images}
        index = np.array([*images], dtype=np.int64)
        first, counts = self.first_rows[index], self.counts[index]
        # the rows of an image are consecutive
        rows = np.arange(counts.sum()) + (first - counts.cumsum() + counts).repeat(counts)
        captions = [self.captions[row] for row in rows.tolist()]
        return Samples([*images.values()], index, counts, captions, rows, broken)


def _decoded(image: CaptionedImage, transform: Callable[[Tensor], Tensor]) -> Tensor | BrokenImage:
    try:
        return transform(decode_image(image.path))
    except BrokenImage as error:
        return error


def _random_words(seed: int, keys: np.ndarray, count: int) -> np.ndarray:
    """Return 64 random bits (len(keys), count), each a function of seed, epoch, index and column.

    Seeding a numpy generator per sample would take longer than everything else that a cached sample needs.
    """
    epoch, index = keys.astype(np.uint64).T
    state = _mixed(_mixed(_mixed(np.full(len(keys), seed, np.uint64)) + epoch) + index)
    return _mixed(state[:, None] + np.arange(count, dtype=np.uint64))


def _mixed(words: np.ndarray) -> np.ndarray:
    """Mix the bits of each word with the output function of SplitMix64 (Steele, Lea, Flood 2014)."""
    words = words + np.uint64(0x9E3779B97F4A7C15)
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))


@dataclass(frozen=True)
class Collate:
    """Collates samples to a batch.

    Attributes:
        tokenize: maps N captions to `input_ids` and `attention_mask` (N, L), padded to the longest caption.
        text_features: cached features of all captions of the split, which replace tokens.
        teacher: cached embeddings of a teacher of all images and of all captions of the training split.
    """

    tokenize: Callable[[list[str]], dict[str, Tensor]]
    text_features: Features | None = None
    teacher: tuple[Features, Features] | None = None

    def __call__(self, samples: Samples) -> dict[str, Any]:
        """Return the batch.

        It has `pixel_values` uint8 (B, 3, H, W) or `image_features` (B, D); `input_ids` and `attention_mask`
        (N, L) or `text_features` (N, D); `image_id` (B,), `text_image_id` (N,) and `text_id` (N,), the rows
        of the captions, all int64; `broken`, path → reason; for tars B `names`; and with a teacher
        `teacher_image` (B, D) and `teacher_text` (N, D). If every image is broken, B and N are 0. Many
        tokenized texts have `length_groups`, too.
        """
        images = samples.images
        if not len(images):  # nothing can be stacked or tokenized, so add an image and drop it
            images = [torch.empty((3, 0, 0), dtype=torch.uint8)]
        batch: dict[str, Any] = {
            "image_id": torch.from_numpy(samples.image_id),
            "text_image_id": torch.from_numpy(samples.image_id.repeat(samples.counts)),
            "text_id": torch.from_numpy(samples.caption_rows),
            "broken": samples.broken,
        }
        if samples.names is not None:
            batch["names"] = samples.names
        if self.teacher is not None:
            images_of_teacher, texts_of_teacher = self.teacher
            # in training, `image_id` is the row of an image with the same bytes
            batch["teacher_image"] = images_of_teacher.rows(samples.image_id)
            batch["teacher_text"] = texts_of_teacher.rows(samples.caption_rows)
        if images[0].ndim == 1:
            batch["image_features"] = images if isinstance(images, Tensor) else torch.stack(list(images))
        else:  # channels last in memory, as in decoded images
            pixels = torch.stack([pixels.permute(1, 2, 0) for pixels in images]).permute(0, 3, 1, 2)
            batch["pixel_values"] = pixels[: len(samples.images)]
        if self.text_features is not None:
            batch["text_features"] = self.text_features.rows(samples.caption_rows)
        else:
            tokens = self.tokenize(samples.captions or [""])
            for name in ("input_ids", "attention_mask"):
                batch[name] = tokens[name][: len(samples.captions)]
            batch |= length_groups(batch["attention_mask"])
        return batch


def length_groups(attention_mask: Tensor) -> dict[str, Any]:
    """Return `text_order` and `text_lengths` of texts (N, L), or nothing if there are fewer than 1,024.

    `text_order` (N,) sorts them by length. `text_lengths` is a list of the number of tokens, rounded up to a
    multiple of 8, that each quarter of them (`Tensor.chunk`) needs.
    """
    if len(attention_mask) < MANY_TEXTS:
        return {}
    needed, order = attention_mask.sum(dim=1).sort(stable=True)
    longest = (int(part[-1]) for part in needed.chunk(TEXT_GROUPS))
    return {"text_order": order, "text_lengths": [8 * max(1, -(-length // 8)) for length in longest]}
