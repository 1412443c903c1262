"""Every picture opened once, as the loader would: what it is, or why it cannot be read."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from clip_lightning.cores import cores
from clip_lightning.data.checking.near_duplicates import perceptual_hash
from clip_lightning.data.images import BrokenImage, decode_image


@dataclass(frozen=True, slots=True)
class Picture:
    """What was found of a picture.

    Attributes:
        reason: why it cannot be read; None if it can.
        width: pixels, upright; likewise `height`. 0 where it cannot be read.
        sha256: of the file (hex); empty where it cannot be read.
        looks: 256 bits that pictures which look the same share; None where it is too plain for that.
    """

    reason: str | None
    width: int = 0
    height: int = 0
    sha256: str = ""
    looks: np.ndarray | None = None

    @property
    def short_side(self) -> int:
        """Pixels."""
        return min(self.width, self.height)


def open_all(paths: Sequence[Path], workers: int | None = None) -> list[Picture]:
    """Open every file in `workers` threads (one a core by default), with a progress bar on stderr."""
    threads = workers or cores()
    with ThreadPoolExecutor(threads) as pool:
        try:
            bar = tqdm(pool.map(_open, paths), "pictures", len(paths), unit="picture", dynamic_ncols=True)
            return list(bar)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _open(path: Path) -> Picture:
    try:
        pixels = decode_image(path)
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
    except BrokenImage as error:
        return Picture(str(error))
    except OSError as error:
        return Picture(error.strerror or "the file cannot be read")
    return Picture(None, pixels.shape[2], pixels.shape[1], digest, perceptual_hash(pixels))
