"""Implements gradient caching: any batch in the memory of one micro-batch (GradCache, Gao et al. 2021).

A contrastive loss needs the embeddings of the complete batch at once, but not their graphs. Each micro-batch
is encoded under non-reentrant checkpointing: the forward pass keeps only its inputs and embeddings. The
backward pass, when the gradient of every embedding is known, encodes it again with the same dropout and
backpropagates through it. The gradients equal those of the same micro-batches in one graph, so clipping, bf16
and data-parallel training work as usual.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial

import psutil
import torch
import torch.nn.functional as F
from lightning.pytorch import Trainer
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from clip_lightning.errors import UserError
from clip_lightning.model.clip import CLIP

SMALLEST = 8
"""Smaller micro-batches are not worth their overhead."""


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
    """
    if not torch.is_grad_enabled() or len(inputs[0]) <= micro_batch_size:
        return encode(*inputs)
    norms = training_norms(module)
    recomputed = partial(
        checkpoint, encode, use_reentrant=False, context_fn=lambda: (nullcontext(), statistics_kept(norms))
    )
    chunks = zip(*(tensor.split(micro_batch_size) for tensor in inputs), strict=True)
    return torch.cat([recomputed(*chunk) for chunk in chunks])


def training_norms(module: nn.Module) -> list[_BatchNorm]:
    """Return the batch norms that update their statistics."""
    return [m for m in module.modules() if isinstance(m, _BatchNorm) and m.training]


@contextmanager
def statistics_kept(norms: list[_BatchNorm]) -> Iterator[None]:
    """Let batch norms normalize by the batch as in training, without updating their statistics.

    The buffers are replaced by copies, which is also safe if a recomputation stops early.
    """
    kept = [(norm, dict(norm.named_buffers(recurse=False))) for norm in norms]
    try:
        for norm, buffers in kept:
            norm._buffers.update({name: buffer.clone() for name, buffer in buffers.items()})
        yield
    finally:
        for norm, buffers in kept:
            norm._buffers.update(buffers)


def largest_micro_batch(clip: CLIP, batch: dict[str, Tensor], trainer: Trainer) -> int | None:
    """Return how many rows every rank has memory for, or None if no tower is trained."""
    parts: list[tuple[Callable[..., Tensor], list[Tensor]]] = []
    if not clip.image_tower.frozen:
        parts.append((clip.encode_image, [batch["pixel_values"]]))
    if not clip.text_tower.frozen:
        longer = clip.tokenize.max_length - batch["input_ids"].shape[1]  # as later captions may be
        tokens = [F.pad(batch[name], (0, longer)) for name in ("input_ids", "attention_mask")]
        parts.append((clip.encode_text, tokens))
    if not parts:
        return None
    rows = max(len(inputs[0]) for _, inputs in parts)
    own = search(
        lambda size: torch.cat([encode(*(x[:size] for x in inputs)) for encode, inputs in parts]),
        rows,
        clip,
        # gradients and AdamW's moments
        reserve=3 * sum(p.nbytes for p in clip.parameters() if p.requires_grad),
        ranks=trainer.num_devices,
    )
    on_device = torch.tensor(own, device=trainer.strategy.root_device)
    size = int(trainer.strategy.reduce(on_device, reduce_op="min"))
    if size == 0:
        raise UserError(
            f"--model.micro_batch_size auto: there is no memory for {min(SMALLEST, rows)} images and "
            "captions at a time; freeze a tower (--model.freeze), or lower --model.towers.image_size"
        )
    if trainer.is_global_zero:
        print(f"--model.micro_batch_size auto: {size:,} of {rows:,} rows at a time", file=sys.stderr)
    return size


def search(
    encode: Callable[[int], Tensor], rows: int, module: nn.Module, *, reserve: int = 0, ranks: int = 1
) -> int:
    """Find how many rows fit in half of the free memory: a power of two from `SMALLEST` on, all rows, or 0.

    The activations of two and of four rows are measured. The state of the random number generators and
    batch-norm statistics do not change.

    Args:
        encode: runs `module` on the first rows, given their number.
        rows: the rows of the complete batch.
        module: the module that is measured.
        reserve: bytes that training will allocate later.
        ranks: the number of processes that share this machine's memory (on a CPU).
    """
    device = next(module.parameters()).device
    on_gpu = device.type == "cuda"
    with torch.random.fork_rng([device] if on_gpu else []), statistics_kept(training_norms(module)):
        two, four = (saved_bytes(encode, size, module) for size in (2, 4))
    if on_gpu:
        torch.cuda.empty_cache()
        available = torch.cuda.mem_get_info(device)[0]
    else:
        available = psutil.virtual_memory().available // ranks
    return within_budget(two, four, rows, available // 2 - reserve)


def within_budget(two: int, four: int, rows: int, budget: int) -> int:
    """Return the largest size within the budget, given the bytes of two and of four rows, or 0."""
    sizes = [*(2**k for k in range(rows.bit_length()) if SMALLEST <= 2**k < rows), rows]
    per_row = (four - two) / 2
    return max((size for size in sizes if two + (size - 2) * per_row <= budget), default=0)


def saved_bytes(encode: Callable[[int], Tensor], size: int, module: nn.Module) -> int:
    """Return the bytes that autograd saves for the backward pass of `size` rows, without the weights."""
    held = {}
    weights = {tensor.untyped_storage().data_ptr() for tensor in module.parameters()}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        held[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        graph = encode(size)  # kept alive, since freed memory would be reused and counted once
    del graph
    return sum(count for place, count in held.items() if place not in weights)
