"""Pictures to the image tower's features, for commands that evaluate or use a model without training.

I images, width of the tower.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from clip_lightning.data.classes import Picture
from clip_lightning.data.images import BrokenImage, ImageTransform, decode_image
from clip_lightning.model.clip import CLIP

BATCH_SIZE = 64


@dataclass(frozen=True)
class Pictures:
    """What could be read of a list of pictures.

    Attributes:
        rows: positions in the list, ascending, one for each of `features`.
        features: (I, width) float32 of the image tower, on the CPU.
        broken: path → reason, of the others.
    """

    rows: list[int]
    features: Tensor
    broken: dict[str, str]


def best_device() -> torch.device:
    """A GPU where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@torch.inference_mode()
def encode_pictures(clip: CLIP, pictures: Sequence[Picture], *, progress: str = "") -> Pictures:
    """Run the image tower over pictures; those that cannot be decoded are left out and named.

    Args:
        clip: the model, in eval mode.
        pictures: files, or what else gives pixels.
        progress: what a bar on stderr says; none without it.
    """
    device = clip.logit_scale.device
    rows: list[int] = []
    parts = [torch.empty(0, clip.image_tower.width)]
    broken: dict[str, str] = {}
    with tqdm(total=len(pictures), desc=progress, unit="pictures", disable=not progress) as bar:
        for start, decoded in _decoded(pictures, clip.transform):
            good = [(start + i, found) for i, found in enumerate(decoded) if isinstance(found, Tensor)]
            broken |= {
                str(pictures[start + i]): str(found)
                for i, found in enumerate(decoded)
                if not isinstance(found, Tensor)
            }
            if good:
                rows += [row for row, _ in good]
                pixels = torch.stack([picture for _, picture in good])
                parts.append(clip.image_tower(pixels.to(device)).float().cpu())
            bar.update(len(decoded))
    return Pictures(rows, torch.cat(parts), broken)


@torch.inference_mode()
def project_pictures(clip: CLIP, features: Tensor) -> Tensor:
    """Unit-length embeddings (I, D) of the image tower's features (I, width), on the CPU."""
    return clip.project_image(features.to(clip.logit_scale.device)).cpu()


def _decoded(
    pictures: Sequence[Picture], transform: ImageTransform
) -> Iterator[tuple[int, list[Tensor | BrokenImage]]]:
    """Batches with their first position; the next one is decoded while the tower runs."""

    def decode(picture: Picture) -> Tensor | BrokenImage:
        try:
            return transform(decode_image(picture) if isinstance(picture, Path) else picture.pixels())
        except BrokenImage as error:
            return error

    with ThreadPoolExecutor(torch.get_num_threads()) as threads:
        starts = range(0, len(pictures), BATCH_SIZE)
        waiting = [threads.submit(decode, picture) for picture in pictures[:BATCH_SIZE]]
        for start in starts:
            now = waiting
            after = start + BATCH_SIZE
            waiting = [threads.submit(decode, picture) for picture in pictures[after : after + BATCH_SIZE]]
            yield start, [future.result() for future in now]
