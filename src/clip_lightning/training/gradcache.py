"""Implements gradient caching: any batch in the memory of one micro-batch (GradCache, Gao et al. 2021).

A contrastive loss needs the embeddings of the complete batch at once, but not their graphs. Each micro-batch
is encoded under non-reentrant checkpointing: the forward pass keeps only its inputs and embeddings. The
backward pass, when the gradient of every embedding is known, encodes it again with the same dropout and
backpropagates through it. The gradients equal those of the same micro-batches in one graph, so clipping, bf16
and data-parallel training work as usual.
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
    """Return `encode(*inputs)`, with the activations of one micro-batch in memory at a time.

    Args:
        encode: maps tensors with B rows to embeddings (B, D). Each embedding may depend only on its own row,
            except for batch norm in training mode, whose statistics are then those of the micro-batch.
        inputs: tensors with B rows each.
        micro_batch_size: the number of rows to encode at a time.
        module: the module that `encode` runs. Its batch-norm statistics are updated once, and not again in
            the backward pass.

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
    """Return the batch norms that update their statistics."""
    return [m for m in module.modules() if isinstance(m, _BatchNorm) and m.training]


@contextmanager
def statistics_kept(norms: list[_BatchNorm]) -> Iterator[None]:
    """Let batch norms normalize by the batch as in training, without updating their statistics.

    The buffers are replaced by copies, which is also safe if a recomputation stops early.
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
