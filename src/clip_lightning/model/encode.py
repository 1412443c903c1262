"""Encodes images and texts as features or embeddings: decoding, batching and the forward pass.

I images, N texts, D the width of the features or embeddings.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor
from tqdm import tqdm

from clip_lightning.cpu import cores
from clip_lightning.data.images import BrokenImage, to_pixels
from clip_lightning.model.towers import ImageTower, TextTower, Tower
from clip_lightning.model.towers.folding import fold_batch_norms

BATCH_SIZE, TEXT_BATCH_SIZE = 64, 128
GPU_BATCH_SIZE = 256  # a half of what the feature cache asks for, so that one half is decoded ahead
WORTH_FOLDING = 64  # images, from which on folding batch norms takes less time than it saves
Project = Callable[[Tensor], Tensor]


class Encoded(NamedTuple):
    """Encoded images: one batch, or several that were joined.

    Attributes:
        size: number of images, including the broken ones.
        rows: positions, among all images, of those that went through the tower, in ascending order.
        features: (len(rows), D) float32 on the CPU.
        broken: position, name and reason of each image that cannot be decoded.
    """

    size: int
    rows: list[int]
    features: Tensor
    broken: list[tuple[int, str, BrokenImage]]

    @classmethod
    def join(cls, batches: Iterable[Encoded]) -> Self:
        """Join the batches of `encode_images` into one."""
        sizes, rows, features, broken = zip(*batches, strict=True)
        return cls(sum(sizes), [*chain(*rows)], torch.cat(features), [*chain(*broken)])


def encode_images(
    tower: ImageTower,
    images: Iterable[Any],
    decode: Callable[[Any], Tensor | None] | None = None,
    *,
    project: Project | None = None,
    batch_size: int | None = None,
    threads: int | None = None,
    precision: torch.dtype | None = None,
    progress: str = "",
) -> Iterator[Encoded]:
    """Decode images in threads, two batches ahead, and yield the features of one batch after another.

    If there are no images, one empty batch is yielded.

    Args:
        tower: image tower in eval mode, on the device on which it should run.
        images: anything that `decode` accepts.
        decode: function that returns the pixels of an image, uint8 (3, H, W), or None to leave the image out,
            or raises `BrokenImage`; any other exception stops the iteration. It is called in threads. By
            default, images are read by `to_pixels` and transformed as the tower expects.
        project: function that turns features into embeddings, such as `CLIP.project_image`.
        batch_size: number of images per forward pass; by default 64, or 256 on a GPU.
        threads: number of decoding threads; by default, one per core.
        precision: data type for autocast; by default, fp32.
        progress: title of a progress bar, if there is to be one.
    """
    batch_size = _checked_batch_size(batch_size, tower, BATCH_SIZE)
    decode = decode or (lambda image: tower.transform(to_pixels(image)))

    def attempt(image: Any) -> Tensor | BrokenImage | None:
        try:
            return decode(image)
        except BrokenImage as error:
            return error

    position, waiting, folded = 0, iter(images), None
    chunks = iter(lambda: list(islice(waiting, batch_size)), [])
    with (
        ThreadPoolExecutor(threads or cores()) as pool,
        tqdm(images, desc=progress, disable=not progress) as bar,
    ):
        try:
            batches = ((chunk, pool.map(attempt, chunk)) for chunk in chunks)
            ahead = deque(islice(batches, 2)) or deque([([], iter(()))])
            while ahead:
                chunk, decoded = ahead.popleft()
                pixels: dict[int, Tensor] = {}
                broken: list[tuple[int, str, BrokenImage]] = []
                for row, (image, result) in enumerate(zip(chunk, decoded, strict=True), position):
                    if isinstance(result, BrokenImage):
                        broken.append((row, _name(image, row), result))
                    elif result is not None:
                        pixels[row] = result.permute(1, 2, 0)  # channels last, as the decoders leave them
                ahead.extend(islice(batches, 1))
                inputs = [torch.stack([*pixels.values()]).permute(0, 3, 1, 2)] if pixels else []
                if position + len(pixels) >= WORTH_FOLDING:
                    folded = folded or fold_batch_norms(tower)
                features = _run(folded or tower, inputs, project, precision)
                yield Encoded(len(chunk), [*pixels], features, broken)
                position += len(chunk)
                bar.update(len(chunk))
        finally:  # a consumer that stops early does not wait for the images ahead
            pool.shutdown(cancel_futures=True)


def encode_texts(
    tower: TextTower,
    texts: Sequence[str],
    *,
    project: Project | None = None,
    batch_size: int | None = None,
    precision: torch.dtype | None = None,
    progress: str = "",
) -> Tensor:
    """Return features or embeddings (N, D) of texts, float32 on the CPU; the arguments are the same.

    Texts of similar length are encoded together to reduce padding; by default 128, or 256 on a GPU.
    """
    batch_size = _checked_batch_size(batch_size, tower, TEXT_BATCH_SIZE)
    order = sorted(range(len(texts)), key=lambda row: len(texts[row]))
    parts = [_run(tower, [], project, precision)]
    with tqdm(texts, desc=progress, disable=not progress) as bar:
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            tokens = tower.tokenize([texts[row] for row in rows])
            parts.append(_run(tower, tokens.values(), project, precision))
            bar.update(len(rows))
    return torch.cat(parts)[torch.tensor(order, dtype=torch.long).argsort()]


def _checked_batch_size(batch_size: int | None, tower: Tower, default: int) -> int:
    if batch_size is None:
        return GPU_BATCH_SIZE if tower.device.type == "cuda" else default
    if batch_size < 1:
        raise ValueError(f"batch_size {batch_size}: expected 1 or more")
    return batch_size


@torch.inference_mode()
def _run(
    tower: Tower, inputs: Collection[Tensor], project: Project | None, precision: torch.dtype | None
) -> Tensor:
    """Return the features or embeddings of a batch, or (0, D) if there are no inputs.

    A batch for which the GPU has too little memory is halved.
    """
    device = tower.device
    try:
        with torch.autocast(device.type, dtype=precision, enabled=precision is not None):
            if inputs:
                features = tower(*(tensor.to(device, non_blocking=True) for tensor in inputs))
            else:
                features = torch.empty(0, tower.width, device=device)
            return (features if project is None else project(features)).float().cpu()
    except torch.OutOfMemoryError:
        if not (half := len(next(iter(inputs), ())) // 2):
            raise
    parts = ([tensor[rows] for tensor in inputs] for rows in (slice(half), slice(half, None)))
    return torch.cat([_run(tower, part, project, precision) for part in parts])


def best_device() -> torch.device:
    """Return the GPU if there is one, for fp32 products in TF32, else the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    torch.set_float32_matmul_precision("high")
    return torch.device("cuda")


def one_or_many(images: Any) -> Iterable[Any]:
    """Return the images themselves, or a list of one if it is a single image."""
    content = isinstance(images, str | bytes | bytearray | memoryview) or hasattr(images, "read")
    single = content or not hasattr(images, "__iter__") or getattr(images, "ndim", 1) in (2, 3)
    return [images] if single else images


def _name(image: Any, position: int) -> str:
    """Return the name of an image in messages: its file if it has one, else its position."""
    known = isinstance(image, str | Path)
    file = image if known else getattr(image, "name", "") or getattr(image, "filename", "")
    return str(file or f"image {position}")
