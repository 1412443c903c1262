"""Measures how alike two towers see the same items. I items, C and D widths of features, K neighbors."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

NEIGHBORS = 10


def nearest_neighbors(features: Tensor) -> Tensor:
    """Return the rows (I, K) of the other items with the highest cosine similarity of features (I, D)."""
    unit = F.normalize(features, dim=-1)
    return (unit @ unit.T).fill_diagonal_(-torch.inf).topk(NEIGHBORS).indices


def mutual_neighbors(one: Tensor, other: Tensor) -> float:
    """Return the percentage of an item's neighbors (I, K) that are the same for both towers.

    This is the mutual k-nearest-neighbor alignment of Huh et al. 2024 (The Platonic Representation
    Hypothesis). By chance, it is 100 K / (I - 1).
    """
    return 100 * int((one[:, :, None] == other[:, None]).sum()) / one.numel()


def linear_cka(one: Tensor, other: Tensor) -> float:
    """Return the linear centered kernel alignment, 0 to 1, of features (I, C) and (I, D).

    It is |XᵀY|² / (|XᵀX| |YᵀY|) of the centered features (Kornblith et al. 2019, section 3).
    """
    x, y = one - one.mean(0), other - other.mean(0)
    norm = torch.linalg.matrix_norm
    return (norm(x.T @ y).square() / (norm(x.T @ x) * norm(y.T @ y))).item()
