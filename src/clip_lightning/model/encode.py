"""Images to the image tower's features, for whatever evaluates or uses a model without training.

I images, width of the tower.
"""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from clip_lightning.data.images import BrokenImage, to_pixels

if TYPE_CHECKING:
    from clip_lightning.data.classes import Picture
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


class Encoded(NamedTuple):
    """A batch: positions and features (on the model's device) of the images that could be read.

    `size` is the number of all; `broken` has position, name and reason of those that could not.
    """

    size: int
    rows: list[int]
    features: Tensor
    broken: list[tuple[int, str, BrokenImage]]


def best_device() -> torch.device:
    """A GPU where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def encode_pictures(clip: CLIP, pictures: Sequence[Picture], *, progress: str = "") -> Pictures:
    """Run the image tower over pictures; those that cannot be decoded are left out and named.

    Args:
        clip: the model, in eval mode.
        pictures: files, or what else gives pixels.
        progress: what a bar on stderr says; none without it.
    """
    rows: list[int] = []
    parts = [torch.empty(0, clip.image_tower.width)]
    broken: dict[str, str] = {}
    with tqdm(total=len(pictures), desc=progress, unit="pictures", disable=not progress) as bar:
        for batch in encode_batches(clip, pictures):
            rows += batch.rows
            parts.append(batch.features.float().cpu())
            broken |= {name: str(reason) for _, name, reason in batch.broken}
            bar.update(batch.size)
    return Pictures(rows, torch.cat(parts), broken)


@torch.inference_mode()
def project_pictures(clip: CLIP, features: Tensor) -> Tensor:
    """Unit-length embeddings (I, D) of the image tower's features (I, width), on the CPU."""
    return clip.project_image(features.to(clip.logit_scale.device)).cpu()


def encode_batches(clip: CLIP, images: Iterable[Any], batch_size: int = BATCH_SIZE) -> Iterator[Encoded]:
    """Decode images in threads, two batches ahead, and run the image tower over one batch after another.

    Args:
        clip: the model, in eval mode.
        images: anything that `to_pixels` takes; a generator is not read further ahead than that.
        batch_size: images that the tower sees at once.
    """
    device = clip.logit_scale.device

    def decode(image: Any) -> Tensor | BrokenImage:
        try:
            return clip.transform(to_pixels(image))
        except BrokenImage as error:
            return error

    position, waiting = 0, iter(images)
    # decoding hides warnings, which is not safe in threads: what is left over ends here
    with warnings.catch_warnings(), ThreadPoolExecutor(torch.get_num_threads()) as threads:
        chunks = iter(lambda: list(islice(waiting, batch_size)), [])
        batches = ((chunk, threads.map(decode, chunk)) for chunk in chunks)
        ahead = deque(islice(batches, 2))
        while ahead:
            chunk, decoded = ahead.popleft()
            found = list(enumerate(decoded, position))
            ahead.extend(islice(batches, 1))
            good = [pixels for _, pixels in found if isinstance(pixels, Tensor)]
            features = torch.empty(0, clip.image_tower.width, device=device)
            if good:
                with torch.inference_mode():
                    features = clip.image_tower(torch.stack(good).to(device))
            rows = [row for row, pixels in found if isinstance(pixels, Tensor)]
            broken = [
                (row, _name(chunk[row - position], row), error)
                for row, error in found
                if isinstance(error, BrokenImage)
            ]
            yield Encoded(len(chunk), rows, features, broken)
            position += len(chunk)


def one_or_many(images: Any) -> Iterable[Any]:
    """Return the images themselves, or a list of one if it is a single image."""
    content = isinstance(images, str | bytes | bytearray | memoryview) or hasattr(images, "read")
    single = content or not hasattr(images, "__iter__") or getattr(images, "ndim", 1) in (2, 3)
    return [images] if single else images


def _name(image: Any, position: int) -> str:
    """What a message calls an image: its file, if it has one."""
    if isinstance(image, str | Path) or hasattr(image, "pixels"):
        return str(image)
    file = getattr(image, "name", None) or getattr(image, "filename", None)
    return str(file) if file else f"image {position}"
