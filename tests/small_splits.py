"""Records, embeddings and images of small splits."""

from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch.nn.functional import normalize

from clip_lightning.data.captions import CaptionedImage
from clip_lightning.evaluation.retrieval import Embeddings


def records(counts: list[int], folder: Path = Path()) -> list[CaptionedImage]:
    """Image n with as many captions as counts[n]; each caption says whose it is."""
    return [
        CaptionedImage(folder / f"{n}.png", tuple(f"picture {n} caption {c}" for c in range(count)))
        for n, count in enumerate(counts)
    ]


def embedded(image: Any, text: Any, owner: Any) -> Embeddings:
    """All images and captions of a split, with normalized vectors."""
    vectors = (normalize(torch.as_tensor(rows, dtype=torch.float32)) for rows in (image, text))
    return Embeddings(*vectors, torch.arange(len(image)), torch.as_tensor(owner), torch.arange(len(text)))


def perfect(counts: list[int]) -> Embeddings:
    """Every image on an axis of its own, with its captions."""
    owner = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts, dtype=torch.long))
    axes = torch.eye(len(counts))
    return embedded(axes, axes[owner], owner)


def noisy(images: int, each: int) -> Embeddings:
    """Random images, with captions near them."""
    generator = torch.Generator().manual_seed(0)
    owner = torch.arange(images).repeat_interleave(each)
    image = normalize(torch.randn(images, 16, generator=generator))
    return embedded(image, image[owner] + torch.randn(len(owner), 16, generator=generator), owner)


def write_classes(root: Path, colours: dict[str, tuple[int, int, int]], count: int) -> Path:
    """Write a folder for each class, with images of its colour, each darker than the one before."""
    for name, colour in colours.items():
        (root / name).mkdir(parents=True)
        for i in range(count):
            darker = tuple(max(value - 20 * i, 0) for value in colour)
            Image.new("RGB", (40, 32), darker).save(root / name / f"{i}.png")
    return root
