"""Gradient caching: any effective batch in the memory of one micro-batch (GradCache, Gao et al. 2021).

A contrastive loss needs the embeddings of the whole batch at once, but not their graphs. Each micro-batch is
encoded under non-reentrant checkpointing: the forward pass keeps its inputs and its embeddings only, and the
backward pass, which then knows the gradient of every embedding, encodes it once more with the same dropout
and backpropagates through it. The gradients are those of the same micro-batches held in one graph, so
clipping, bf16 and data-parallel training need to know nothing of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint


def encode_in_micro_batches(
    encode: Callable[..., Tensor], inputs: tuple[Tensor, ...], micro_batch_size: int, module: nn.Module
) -> Tensor:
    """`encode(*inputs)`, with the activations of one micro-batch in memory at a time.

    Args:
        encode: maps tensors with B rows to embeddings (B, D); must be a function of its rows alone, except
            for batch norm in training mode, whose statistics are then those of the micro-batch.
        inputs: tensors with B rows each.
        micro_batch_size: rows encoded at a time.
        module: what `encode` runs; its batch-norm statistics are updated once, not again in the backward
            pass.

    Returns:
        Embeddings (B, D), differentiable.
    """
    if not torch.is_grad_enabled() or len(inputs[0]) <= micro_batch_size:
        return encode(*inputs)
    norms = training_norms(module)

    def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return nullcontext(), statistics_kept(norms)

    chunks = zip(*(tensor.split(micro_batch_size) for tensor in inputs), strict=True)
    parts = [checkpoint(encode, *chunk, use_reentrant=False, context_fn=contexts) for chunk in chunks]
    return torch.cat(parts)


def training_norms(module: nn.Module) -> list[_BatchNorm]:
    """Batch norms that would note the statistics of a batch."""
    return [m for m in module.modules() if isinstance(m, _BatchNorm) and m.training]


@contextmanager
def statistics_kept(norms: list[_BatchNorm]) -> Iterator[None]:
    """Let batch norms normalise by the batch as in training, without recording it a second time.

    The buffers are swapped for copies, so that a recomputation that stops early leaves no trace either.
    """
    kept = [(norm.running_mean, norm.running_var, norm.num_batches_tracked) for norm in norms]
    for norm in norms:
        for name in ("running_mean", "running_var", "num_batches_tracked"):
            buffer = getattr(norm, name)
            if buffer is not None:
                setattr(norm, name, buffer.clone())
    try:
        yield
    finally:
        for norm, (mean, var, tracked) in zip(norms, kept, strict=True):
            norm.running_mean, norm.running_var, norm.num_batches_tracked = mean, var, tracked
