"""Implements gradient caching: any batch in the memory of one micro-batch (GradCache, Gao et al. 2021).

A contrastive loss needs the embeddings of the complete batch at once, but not their graphs. Each micro-batch
is encoded under non-reentrant checkpointing: the forward pass keeps only its inputs and embeddings, and the
backward pass encodes it again with the same dropout. The gradients equal those of the same micro-batches in
one graph, so clipping, bf16 and data-parallel training work as usual.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial

import psutil
import torch
import torch.nn.functional as F
from lightning.pytorch import Trainer
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from clip_lightning.model.clip import CLIP
from clip_lightning.terminal import note

SMALLEST = 8  # smaller micro-batches are not worth their overhead


def encode_in_micro_batches(
    encode: Callable[..., Tensor], inputs: tuple[Tensor, ...], micro_batch_size: int, module: nn.Module
) -> Tensor:
    """Return `encode(*inputs)` (B, D) of B rows, with the activations of one micro-batch in memory at a time.

    Each embedding may depend only on its own row, except for batch norm in training mode: its statistics are
    those of the micro-batch, and those of `module` are not updated again in the backward pass.
    """
    if not torch.is_grad_enabled():
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
    """Return how many rows every rank has memory for: the batch, or a half, a quarter, ... of it.

    Their activations may take half of the free memory. They are estimated from those of two and of four rows,
    which changes neither random numbers nor batch-norm statistics. None if no tower is trained.
    """
    parts: list[tuple[Callable[..., Tensor], list[Tensor]]] = []
    if not clip.image_tower.frozen:
        parts.append((clip.encode_image, [batch["pixel_values"]]))
    if not clip.text_tower.frozen:
        longer = clip.tokenize.max_length - batch["input_ids"].shape[1]  # as later captions may be
        tokens = [F.pad(batch[name], (0, longer)) for name in ("input_ids", "attention_mask")]
        parts.append((clip.encode_text, tokens))
    if not parts:
        return None
    device = trainer.strategy.root_device
    on_gpu = device.type == "cuda"
    with torch.random.fork_rng([device] if on_gpu else []), statistics_kept(training_norms(clip)):
        two, four = (
            sum(saved_bytes(encode, [x[:rows] for x in inputs], clip) for encode, inputs in parts)
            for rows in (2, 4)
        )
    if on_gpu:
        torch.cuda.empty_cache()  # else memory that frozen towers have used counts as taken
    free = torch.cuda.mem_get_info(device)[0] if on_gpu else psutil.virtual_memory().available
    shared_by = 1 if on_gpu else trainer.num_devices
    trained = sum(parameter.nbytes for parameter in clip.parameters() if parameter.requires_grad)
    budget = free / shared_by / 2 - 3 * trained  # less the gradients and AdamW's moments
    size = rows = max(len(inputs[0]) for _, inputs in parts)
    while size > SMALLEST and two + (size - 2) * (four - two) / 2 > budget:
        size = -(-size // 2)
    size = int(trainer.strategy.reduce(torch.tensor(size, device=device), reduce_op="min"))
    if trainer.is_global_zero:
        note(f"--model.micro_batch_size auto: {size:,} of {rows:,} rows at a time")
    return size


def saved_bytes(encode: Callable[..., Tensor], inputs: Iterable[Tensor], module: nn.Module) -> int:
    """Return the bytes that autograd saves for the backward pass of `encode(*inputs)`, without weights."""
    held = {}

    def hold(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        held[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(hold, lambda tensor: tensor):
        graph = encode(*inputs)  # kept alive, since freed memory would be reused and counted once
    del graph
    weights = {tensor.untyped_storage().data_ptr() for tensor in module.parameters()}
    return sum(count for place, count in held.items() if place not in weights)
