"""CLIP as a library: a model from towers by name or of one's own, its embeddings, and its answers.

python examples/library.py                       # untrained, but for its towers
python examples/library.py runs/ID a.jpg b.jpg   # a trained model and images of yours
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor, nn

from clip_lightning import CLIP


class Colours(nn.Module):
    """An image tower of one's own: all that it needs is a `width`."""

    width = 48

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(3 * 4 * 4, self.width)

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.project(nn.functional.adaptive_avg_pool2d(pixel_values, 4).flatten(1))


def main(model: str | None, images: list[str]) -> None:
    clip = (
        CLIP.from_pretrained(model) if model else CLIP.from_towers(Colours(), "pypi:minilm-l6", image_size=32)
    )
    print(clip)
    seen = images or list(torch.randint(256, (2, 3, 40, 60), dtype=torch.uint8))
    labels = ["a dog", "two children", "a beach"]
    for name, row in zip(images or ["noise", "more noise"], clip.classify(seen, labels), strict=True):
        print(name, {label: round(value, 3) for label, value in zip(labels, row.tolist(), strict=True)})


if __name__ == "__main__":
    main(next(iter(sys.argv[1:]), None), sys.argv[2:])
