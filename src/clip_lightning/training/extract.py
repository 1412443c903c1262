"""Runs frozen towers once over a split, and passes their features to the data module.

Shapes: R rows of features of width D.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from clip_lightning.data.captions import CaptionedImage, unreadable
from clip_lightning.data.features import FeatureCache, Features
from clip_lightning.data.images import (
    RETRY_SECONDS,
    Augmentation,
    ImageTransform,
    UnreadableFile,
    augment,
    decode_image,
)
from clip_lightning.model.clip import CLIP
from clip_lightning.model.encode import encode_images, encode_texts
from clip_lightning.model.towers import ImageTower, TextTower

# Part of every key. Raise it whenever decode_image, augment, ImageTransform, `_view` or the pooling of a
# tower returns different values.
VERSION = 1


@dataclass(frozen=True)
class Extractor:
    """Computes features of frozen towers, or reads them from the cache.

    Attributes:
        cache: the cache of features.
        device: the device that the towers run on.
        precision: the type of autocast; None for fp32.
    """

    cache: FeatureCache
    device: torch.device
    precision: torch.dtype | None

    def image_features(
        self,
        tower: ImageTower,
        images: Sequence[CaptionedImage],
        view: int,
        augmentation: Augmentation,
        title: str,
    ) -> Features:
        """Return the features (R, D) of one view of every image; NaN for an image that cannot be decoded.

        View 0 is the image itself. The crop and the colors of later views are functions of (view, row). If
        flips are on, odd views are mirrored, and view 1 is the mirror image of view 0. The key contains the
        path, size and modification time of every image.

        Raises:
            RunFailed: a file cannot be read at the moment; its features are not cached.
        """
        key = {
            "version": VERSION,
            "kind": "image",
            "name": tower.spec["name"],
            "tower": tower.digest(),
            "architecture": [tower.spec["architecture"], tower.spec["arguments"]],
            "transform": tower.transform.as_dict(),
            "view": view,
            "augmentation": None if _is_plain(view, augmentation) else asdict(augmentation),
            "precision": str(self.precision),
            "pictures": _digest(map(_identity, images)),
        }

        def compute(rows: range) -> np.ndarray:
            values = np.full((len(rows), tower.width), np.nan, np.float32)
            decode = partial(_view, images, view, tower.transform, augmentation)
            with self._evaluation_mode(tower):
                for batch in encode_images(tower, rows, decode, precision=self.precision):
                    values[batch.rows] = batch.features
            return values

        return self.cache.get(key, len(images), compute, title)

    def text_features(self, tower: TextTower, captions: Sequence[str], title: str) -> Features:
        """Return the features (R, D) of every caption."""
        key = {
            "version": VERSION,
            "kind": "text",
            "name": tower.spec["name"],
            "tower": tower.digest(),
            "architecture": [tower.spec["config"], tower.spec["pooling"], tower.spec["max_length"]],
            "tokenizer": tower.tokenize.digest(),
            "precision": str(self.precision),
            "captions": _digest(captions),
        }

        def compute(rows: range) -> np.ndarray:
            with self._evaluation_mode(tower):
                return encode_texts(tower, [captions[row] for row in rows], precision=self.precision).numpy()

        return self.cache.get(key, len(captions), compute, title)

    @contextmanager
    def _evaluation_mode(self, tower: nn.Module) -> Iterator[None]:
        """Run the tower in evaluation mode, so that features do not depend on the statistics of a batch."""
        training = tower.training
        tower.to(self.device).eval()
        try:
            yield
        finally:
            tower.train(training)


def cache_frozen_towers(extractor: Extractor, clip: CLIP, data: Any, split: str) -> None:
    """Pass the features of a split from each frozen tower to the data module.

    Args:
        extractor: computes the features.
        clip: the model with the towers.
        data: a `CaptionDataModule` after its `setup`.
        split: the split; `train` has all views, and the others only the first.
    """
    images = data.images(split)
    if not images:
        return
    image_features, text_features = None, None
    if clip.image_tower.frozen:
        views = data.views if split == "train" else 1
        if data.augmentation.min_scale == 1 and data.augmentation.colour == 0:
            views = min(views, 2)  # the image and its mirror image
        image_features = [
            extractor.image_features(
                clip.image_tower,
                images,
                view,
                data.augmentation,
                f"{split} images, view {view + 1} of {views}",
            )
            for view in range(views)
        ]
    if clip.text_tower.frozen:
        text_features = extractor.text_features(clip.text_tower, data.captions(split), f"{split} captions")
    data.use_features(split, images=image_features, texts=text_features)


def _view(
    images: Sequence[CaptionedImage],
    view: int,
    transform: ImageTransform,
    augmentation: Augmentation,
    row: int,
) -> Tensor:
    """Return the pixels, uint8 (3, H, W), of one view of the image in this row.

    Raises:
        BrokenImage: the image cannot be decoded.
        RunFailed: the file cannot be read at the moment.
    """
    path = images[row].path
    try:
        pixels = decode_image(path, pauses=RETRY_SECONDS)
    except UnreadableFile as error:
        raise unreadable(path, error) from error
    if _is_plain(view, augmentation):
        pixels = transform(pixels)
    else:
        rng = np.random.default_rng((view, row))
        pixels = augment(pixels, transform, replace(augmentation, flip=False), rng)
    return pixels.flip(-1) if augmentation.flip and view % 2 else pixels


def _is_plain(view: int, augmentation: Augmentation) -> bool:
    """Return whether the view is the image itself or its mirror image."""
    return view == 0 or (view == 1 and augmentation.flip)


def _identity(image: CaptionedImage) -> str:
    try:
        status = image.path.stat()
    except OSError as error:
        raise unreadable(image.path, error.strerror) from error
    return f"{image.path}\0{status.st_size}\0{status.st_mtime_ns}"


def _digest(texts: Any) -> str:
    sha = hashlib.sha256()
    for text in texts:
        sha.update(text.encode() + b"\n\0")
    return sha.hexdigest()
