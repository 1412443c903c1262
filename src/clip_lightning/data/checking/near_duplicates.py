"""Pictures that look the same: a hash of what a picture shows coarsely, and hashes that differ in few bits.

N pictures; every hash has 256 bits, kept as booleans.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

SIDE, KEPT = 32, 16
# On 250 photographs, halved and encoded again at quality 50: at most 14 bits, made brighter by 15 %: at most
# 20. Of 1,500 different photographs no two were closer than 84.
MOST_DIFFERENT = 40
PLAINEST = 2.0
BLOCK = 4096
_DCT = np.cos(np.pi / SIDE * (np.arange(SIDE) + 0.5) * np.arange(KEPT)[:, None])


def perceptual_hash(pixels: Tensor) -> np.ndarray | None:
    """Which of the 16 × 16 lowest frequencies of a small grey copy are above their median (pHash).

    Args:
        pixels: uint8 (3, H, W).

    Returns:
        256 booleans; None where the picture is so plain that only noise would decide.
    """
    red, green, blue = pixels.to(torch.float32)
    grey = 0.299 * red + 0.587 * green + 0.114 * blue
    small = functional.interpolate(grey[None, None], (SIDE, SIDE), mode="bilinear", antialias=True)
    copy = small[0, 0].numpy()
    if copy.std() < PLAINEST:
        return None
    frequencies = (_DCT @ copy @ _DCT.T).ravel()
    return frequencies > np.median(frequencies)


def alike(hashes: Sequence[np.ndarray | None]) -> list[tuple[int, int]]:
    """Pairs of positions, the lower one first, whose hashes differ in at most `MOST_DIFFERENT` bits.

    Every pair is compared: N² / 2 × 512 operations, half a minute for 100,000 pictures.
    """
    rows = [row for row, bits in enumerate(hashes) if bits is not None]
    if len(rows) < 2:
        return []
    # ±1, so that the product of two hashes is 256 minus twice the bits that differ
    signs = torch.from_numpy(np.stack([hashes[row] for row in rows])).float() * 2 - 1  # type: ignore[misc]
    least = signs.shape[1] - 2 * MOST_DIFFERENT
    found = []
    for start in range(0, len(rows), BLOCK):
        left = signs[start : start + BLOCK]
        for other in range(start, len(rows), BLOCK):
            near = (left @ signs[other : other + BLOCK].T >= least).nonzero().tolist()
            found += [(rows[start + a], rows[other + b]) for a, b in near if start + a < other + b]
    return sorted(found)


def groups(pairs: Sequence[tuple[int, int]]) -> list[list[int]]:
    """Positions that pairs connect, directly or by way of others; each group and the list ascending."""
    parent: dict[int, int] = {}

    def root(row: int) -> int:
        while parent.setdefault(row, row) != row:
            parent[row] = parent[parent[row]]
            row = parent[row]
        return row

    for a, b in pairs:
        first, second = sorted((root(a), root(b)))
        parent[second] = first
    members: dict[int, list[int]] = {}
    for row in sorted(parent):
        members.setdefault(root(row), []).append(row)
    return sorted(members.values())
