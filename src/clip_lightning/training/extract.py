"""Runs frozen towers once over a split, and passes their features to the data module.

Shapes: R rows of features of width D.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from clip_lightning.data.captions import CaptionedImage, reading
from clip_lightning.data.features import Compute, FeatureCache, Features
from clip_lightning.data.images import Augmentation, augment, decode_image
from clip_lightning.errors import UserError
from clip_lightning.model.checkpoint import model_identity
from clip_lightning.model.clip import CLIP
from clip_lightning.model.encode import WORTH_FOLDING, Project, encode_images, encode_texts
from clip_lightning.model.towers import ImageTower, TextTower, Tower
from clip_lightning.model.towers.folding import fold_batch_norms

# Part of every key. Raise it whenever decode_image, augment, ImageTransform, `image_features` or the pooling
# of a tower returns different values.
VERSION = 1
GPU_LEAST_FREE = 4
"""Features for training are kept on the GPU if this many times their size is free."""


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

    @classmethod
    def of_trainer(cls, cache: FeatureCache, trainer: Any) -> Self:
        """Run the towers on the device of a Lightning trainer, and in its precision, in fp32 by default."""
        autocast = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}.get(trainer.precision)
        return cls(cache, trainer.strategy.root_device, autocast)

    def cache_frozen_towers(self, clip: CLIP, data: Any, split: str) -> None:
        """Pass the features of a split from each frozen tower to a `CaptionDataModule` after its `setup`."""
        images = data.images(split)
        if not images:
            return
        image_features, text_features = None, None
        if clip.image_tower.frozen:
            views = data.views if split == "train" else 1  # only training images are augmented
            if data.augmentation.min_scale == 1 and data.augmentation.colour == 0:
                views = min(views, 2)  # the image and its mirror image
            titles = [f"{split} images, view {view + 1} of {views}" for view in range(views)]
            image_features = [
                self.image_features(clip.image_tower, images, view, data.augmentation, title)
                for view, title in enumerate(titles)
            ]
        if clip.text_tower.frozen:
            text_features = self.text_features(clip.text_tower, data.captions(split), f"{split} captions")
        if split == "train" and image_features and text_features:
            self._keep_on_gpu([*image_features, text_features])
        data.use_features(split, images=image_features, texts=text_features)

    def _keep_on_gpu(self, entries: Sequence[Features]) -> None:
        """Copy the entries to the GPU, if there is one, as long as they leave most of its memory free."""
        size = sum(features.nbytes for features in entries)
        if self.device.type == "cuda" and size * GPU_LEAST_FREE <= torch.cuda.mem_get_info(self.device)[0]:
            for features in entries:
                features.move_to(self.device)

    def cache_teacher(self, teacher: CLIP, data: Any) -> None:
        """Pass a teacher's embeddings of all training images and captions to a `CaptionDataModule`.

        The images are not augmented, whatever the student's images are. The features of the teacher's towers
        are cached as those of frozen towers, with which they may be shared.
        """
        images, captions = data.images("train"), data.captions("train")
        if not images:
            raise UserError(
                "--model.teacher needs image files, since tars have no cached embeddings; give --data.root a "
                "folder or a table, or remove --model.teacher"
            )
        titles = "train images, teacher", "train captions, teacher"
        image_features = self.image_features(teacher.image_tower, images, 0, Augmentation(), titles[0])
        text_features = self.text_features(teacher.text_tower, captions, titles[1])
        teacher.to(self.device).eval()
        about = {"version": VERSION, "model": model_identity(teacher), "precision": str(self.precision)}

        def embeddings(kind: str, project: Project, features: Features, names: Iterable[str]) -> Features:
            rows = [*names]

            @torch.inference_mode()
            def compute(part: range) -> np.ndarray:
                return project(features.rows(part).to(self.device)).cpu().numpy()

            key = {"kind": f"{kind} embedding", "name": "teacher", "data": _digest(rows), **about}
            return self.cache.get(key, len(rows), compute, f"{kind} embeddings of the teacher")

        data.use_teacher(
            embeddings("image", teacher.project_image, image_features, map(_identity, images)),
            embeddings("text", teacher.project_text, text_features, captions),
        )

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
        path, size and modification time of every image. A file that cannot be read at the moment raises
        `RunFailed`, and its features are not cached.
        """
        # the image itself or its mirror image
        is_plain = view == 0 or (view == 1 and augmentation.flip)
        key = {
            "kind": "image",
            "architecture": [tower.spec["architecture"], tower.spec["arguments"]],
            "transform": tower.transform.as_dict(),
            "view": view,
            "augmentation": None if is_plain else asdict(augmentation),
            "pictures": _digest(map(_identity, images)),
        }

        def decode(row: int) -> Tensor:
            with reading(images[row].path):
                pixels = decode_image(images[row].path)
            if is_plain:
                pixels = tower.transform(pixels)
            else:
                rng = np.random.default_rng((view, row))
                pixels = augment(pixels, tower.transform, replace(augmentation, flip=False), rng)
            return pixels.flip(-1) if augmentation.flip and view % 2 else pixels

        @cache
        def fastest() -> ImageTower:
            return fold_batch_norms(tower) if len(images) >= WORTH_FOLDING else tower

        def compute(rows: range) -> np.ndarray:
            values = np.full((len(rows), tower.width), np.nan, np.float32)
            for batch in encode_images(fastest(), rows, decode, precision=self.precision):
                values[batch.rows] = batch.features
            return values

        return self._features(tower, key, len(images), compute, title)

    def text_features(self, tower: TextTower, captions: Sequence[str], title: str) -> Features:
        """Return the features (R, D) of every caption."""
        key = {
            "kind": "text",
            "architecture": [tower.spec["config"], tower.spec["pooling"], tower.spec["max_length"]],
            "tokenizer": tower.tokenize.digest(),
            "captions": _digest(captions),
        }

        def compute(rows: range) -> np.ndarray:
            return encode_texts(tower, [captions[row] for row in rows], precision=self.precision).numpy()

        return self._features(tower, key, len(captions), compute, title)

    def _features(
        self, tower: Tower, key: dict[str, Any], rows: int, compute: Compute, title: str
    ) -> Features:
        """Compute what is not in the cache, in evaluation mode, so that no feature depends on its batch."""
        key |= {"version": VERSION, "name": tower.spec["name"], "tower": tower.digest()}
        training = tower.training
        tower.to(self.device).eval()
        try:
            return self.cache.get({**key, "precision": str(self.precision)}, rows, compute, title)
        finally:
            tower.train(training)


def _identity(image: CaptionedImage) -> str:
    with reading(image.path):
        status = image.path.stat()
    return f"{image.path}\0{status.st_size}\0{status.st_mtime_ns}"


def _digest(texts: Iterable[str]) -> str:
    sha = hashlib.sha256()
    for text in texts:
        sha.update(text.encode() + b"\n\0")
    return sha.hexdigest()
