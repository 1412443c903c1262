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

import psutil
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

SMALLEST = 8
"""Rows below which a micro-batch is not worth its overhead."""


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
    norms = [m for m in module.modules() if isinstance(m, _BatchNorm) and m.training]

    def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return nullcontext(), _statistics_kept(norms)

    chunks = zip(*(tensor.split(micro_batch_size) for tensor in inputs), strict=True)
    parts = [checkpoint(encode, *chunk, use_reentrant=False, context_fn=contexts) for chunk in chunks]
    return torch.cat(parts)


def largest_micro_batch(
    encode: Callable[[int], Tensor], rows: int, module: nn.Module, *, reserve: int = 0, ranks: int = 1
) -> int:
    """How many rows a forward and backward pass has room for now: a power of two, or all of them.

    A GPU tries sizes until its memory runs out, then takes half of the largest that fits; on a CPU, where
    running out ends the process, the activations of a few rows are measured and set against half of the
    memory that is free. Weights, gradients, batch-norm statistics and the state of the random numbers stay
    as they are.

    Args:
        encode: embeddings of so many rows.
        rows: of the whole batch.
        module: what `encode` runs.
        reserve: bytes that training will allocate and has not yet, for the optimiser's moments, say.
        ranks: processes that share this machine's memory (on a CPU).

    Returns:
        The number, or 0 where not even `SMALLEST` rows fit.
    """
    device = next(module.parameters()).device
    parameters = [p for p in module.parameters() if p.requires_grad]
    norms = [m for m in module.modules() if isinstance(m, _BatchNorm) and m.training]

    def backward(size: int) -> None:
        # not .backward(): it would leave gradients, and start the exchange between ranks
        torch.autograd.grad(encode(size).sum(), parameters, allow_unused=True)

    with torch.random.fork_rng([] if device.type == "cpu" else [device]), _statistics_kept(norms):
        if device.type == "cpu":
            budget = psutil.virtual_memory().available // (2 * ranks) - reserve
            return within_budget(lambda size: saved_bytes(encode, size, module), rows, budget)
        held = torch.empty(reserve, dtype=torch.uint8, device=device)
        size = by_trying(backward, rows)
        del held
    torch.cuda.empty_cache()
    return size


def sizes(rows: int) -> list[int]:
    """What may be chosen, in ascending order: powers of two from `SMALLEST` on, and last all rows."""
    powers = [2**k for k in range(rows.bit_length()) if SMALLEST <= 2**k < rows]
    return [*powers, rows]


def by_trying(run: Callable[[int], object], rows: int) -> int:
    """`rows` if they fit, else half of the largest size that does; 0 where none does."""
    fits = 0
    for size in sizes(rows):
        try:
            run(size)
        except torch.OutOfMemoryError:
            return fits // 2 if fits > SMALLEST else fits
        fits = size
    return fits


def within_budget(measure: Callable[[int], int], rows: int, budget: int) -> int:
    """The largest size whose bytes, by what two and four rows take, stay within the budget; or 0."""
    two, four = measure(2), measure(4)
    each = (four - two) / 2
    return max((size for size in sizes(rows) if two + (size - 2) * each <= budget), default=0)


def saved_bytes(encode: Callable[[int], Tensor], size: int, module: nn.Module) -> int:
    """What the graph of so many rows holds for its backward pass, without the weights."""
    held = {}
    weights = {tensor.untyped_storage().data_ptr() for tensor in module.parameters()}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        held[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        graph = encode(size)  # kept until all is counted: freed memory is handed out again
    del graph
    return sum(count for place, count in held.items() if place not in weights)


@contextmanager
def _statistics_kept(norms: list[_BatchNorm]) -> Iterator[None]:
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
