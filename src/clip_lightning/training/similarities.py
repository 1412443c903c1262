"""Computes similarities in blocks of rows, so that no (B, N) array is ever in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

BLOCK = 2**22
"""Similarities in memory at a time: 16 MB per array, and a loss needs two to seven arrays."""

T = TypeVar("T")


def similarities(rows: Tensor, columns: Tensor) -> Tensor:
    """Return the products (B, N) of (B, D) and (N, D), in fp32 also under autocast."""
    with torch.autocast(rows.device.type, enabled=False):
        return rows @ columns.T


def fits_in_a_block(rows: Tensor, columns: Tensor) -> bool:
    """Return whether all similarities fit in one block."""
    return len(rows) * len(columns) <= BLOCK


def for_blocks(block: Callable[..., T], columns: int, *rows: Tensor) -> list[T]:
    """Call `block` on as many rows at a time as make `BLOCK` similarities, and return the results.

    With several blocks, the backward pass calls it again instead of storing the activations.
    """
    size = max(1, BLOCK // max(1, columns))
    if len(rows[0]) <= size:
        return [block(*rows)]
    parts = zip(*(tensor.split(size) for tensor in rows), strict=True)
    return [checkpoint(block, *part, use_reentrant=False, preserve_rng_state=False) for part in parts]


def log_sum_exp(rows: Tensor, columns: Tensor) -> Tensor:
    """Return log Σ exp (B,) over the rows of the similarities of (B, D) and (N, D)."""
    if fits_in_a_block(rows, columns):
        return similarities(rows, columns).logsumexp(dim=1)
    return _LogSumExp.apply(rows, columns)


class _LogSumExp(torch.autograd.Function):
    """Computes `log_sum_exp` in blocks, once forward and once backward.

    The blocks share their memory, since allocating each of them would fragment the CPU's heap.
    """

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        sums = a.new_empty(len(a))
        for block, logits in _LogSumExp.blocks(a, b):
            largest = logits.amax(dim=1)
            sums[block] = logits.sub_(largest[:, None]).exp_().sum(dim=1).log() + largest
        ctx.save_for_backward(a, b, sums)
        return sums

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        a, b, sums = ctx.saved_tensors
        grad_a, grad_b = torch.empty_like(a), torch.zeros_like(b)
        for block, logits in _LogSumExp.blocks(a, b):
            # the gradient of a log-sum-exp is the softmax
            logits.sub_(sums[block, None]).exp_().mul_(grad[block, None])
            with torch.autocast(a.device.type, enabled=False):
                grad_a[block] = logits @ b
                grad_b.addmm_(logits.T, a[block])
        return grad_a, grad_b

    @staticmethod
    def blocks(a: Tensor, b: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Yield slices of rows, and their rows of a bᵀ."""
        size = min(len(a), max(1, BLOCK // len(b)))
        space = a.new_empty(size, len(b))
        for start in range(0, len(a), size):
            block = slice(start, start + size)
            logits = space[: len(a[block])]
            with torch.autocast(a.device.type, enabled=False):
                torch.mm(a[block], b.T, out=logits)
            yield block, logits
