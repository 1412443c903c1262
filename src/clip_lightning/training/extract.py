"""Runs frozen towers once over a split and hands their features to the data module.

R rows, D the tower's width.
"""

from __future__ import annotations

import hashlib
import warnings
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from clip_lightning.cores import cores
from clip_lightning.data.captions import CaptionedImage, unreadable
from clip_lightning.data.features import FeatureCache, Features
from clip_lightning.data.images import (
    RETRY_SECONDS,
    Augmentation,
    BrokenImage,
    ImageTransform,
    UnreadableFile,
    augment,
    decode_image,
)
from clip_lightning.errors import RunFailed
from clip_lightning.model.clip import CLIP
from clip_lightning.model.towers import ImageTower, TextTower

IMAGE_BATCH, TEXT_BATCH = 64, 128
# Part of every key: to be raised with any change to the values that decode_image, augment, ImageTransform,
# `_view` or the pooling of a tower give.
VERSION = 1


@dataclass(frozen=True)
class Extractor:
    """Where features are kept, and how they are computed.

    Attributes:
        cache: looked into before anything is computed.
        device: where the towers run.
        precision: of autocast; None for fp32.
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
        """Return features (R, D) of one view of every image; a row of NaN if it cannot be decoded.

        View 0 is plain and, where flips are on, view 1 its mirror image; the others are cropped and coloured
        as functions of (view, row), the odd ones mirrored where flips are on. Names, sizes and times of
        change of the images are part of the key.

        Raises:
            RunFailed: a file cannot be read at the moment; nothing is cached of it.
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

        def picture(row: int) -> Tensor | None:
            return _view(images[row], row, view, tower.transform, augmentation)

        def compute(rows: range) -> np.ndarray:
            values = np.full((len(rows), tower.width), np.nan, np.float32)
            # decoding hides warnings, which is not safe in threads: what is left over ends here
            with warnings.catch_warnings(), ThreadPoolExecutor(cores()) as pool:
                starts = range(0, len(rows), IMAGE_BATCH)
                # two batches at a time, so that one is decoded while the tower works on the other
                batches = (pool.map(picture, rows[start : start + IMAGE_BATCH]) for start in starts)
                ahead = deque(islice(batches, 2))
                for start in starts:
                    try:
                        batch = list(ahead.popleft())
                    except RunFailed:
                        pool.shutdown(cancel_futures=True)
                        raise
                    ahead.extend(islice(batches, 1))
                    readable = [i for i, pixels in enumerate(batch) if pixels is not None]
                    if readable:
                        pixels = torch.stack([pixels for pixels in batch if pixels is not None])
                        values[[start + i for i in readable]] = self._run(tower, pixels)
            return values

        return self.cache.get(key, len(images), compute, title)

    def text_features(self, tower: TextTower, captions: Sequence[str], title: str) -> Features:
        """Features (R, D) of every caption."""
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
            values = np.empty((len(rows), tower.width), np.float32)
            # neighbours of similar length, so that little is padding
            order = sorted(range(len(rows)), key=lambda i: len(captions[rows[i]]))
            for start in range(0, len(order), TEXT_BATCH):
                chosen = order[start : start + TEXT_BATCH]
                tokens = tower.tokenize([captions[rows[i]] for i in chosen])
                values[chosen] = self._run(tower, tokens["input_ids"], tokens["attention_mask"])
            return values

        return self.cache.get(key, len(captions), compute, title)

    @torch.inference_mode()
    def _run(self, tower: nn.Module, *inputs: Tensor) -> np.ndarray:
        training = tower.training
        tower.to(self.device).eval()  # a batch's statistics would be in the features, and the key not say so
        try:
            with torch.autocast(self.device.type, self.precision, enabled=self.precision is not None):
                return tower(*(tensor.to(self.device) for tensor in inputs)).float().cpu().numpy()
        finally:
            tower.train(training)


def cache_frozen_towers(extractor: Extractor, clip: CLIP, data: Any, split: str) -> None:
    """Give the data module the features of `split` from each frozen tower.

    Args:
        extractor: where features are kept and computed.
        clip: the towers.
        data: a `CaptionDataModule` after its setup.
        split: `train` has all views, the others the plain one.
    """
    images = data.images(split)
    if not images:
        return
    pictures, texts = None, None
    if clip.image_tower.frozen:
        views = data.views if split == "train" else 1
        if data.augmentation.min_scale == 1 and data.augmentation.colour == 0:
            views = min(views, 2)  # there is nothing but the plain one and its mirror image
        pictures = [
            extractor.image_features(
                clip.image_tower,
                images,
                view,
                data.augmentation,
                f"{split} pictures, view {view + 1} of {views}",
            )
            for view in range(views)
        ]
    if clip.text_tower.frozen:
        texts = extractor.text_features(clip.text_tower, data.captions(split), f"{split} captions")
    data.use_features(split, pictures=pictures, texts=texts)


def _view(
    image: CaptionedImage, row: int, view: int, transform: ImageTransform, augmentation: Augmentation
) -> Tensor | None:
    """Return the pixels uint8 (3, H, W) of one view, or None if the image cannot be decoded."""
    try:
        pixels = decode_image(image.path, pauses=RETRY_SECONDS)
    except UnreadableFile as error:
        raise unreadable(image.path, error) from error
    except BrokenImage:
        return None
    if _is_plain(view, augmentation):
        seen = transform(pixels)
    else:
        rng = np.random.default_rng((view, row))
        seen = augment(pixels, transform, replace(augmentation, flip=False), rng)
    return seen.flip(-1) if augmentation.flip and view % 2 else seen


def _is_plain(view: int, augmentation: Augmentation) -> bool:
    """Whether the view is the whole picture as it is, or its mirror image."""
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
