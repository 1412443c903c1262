"""Finds the largest micro-batch that fits in memory, for `--model.micro_batch_size auto`."""

from __future__ import annotations

from collections.abc import Callable

import psutil
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clip_lightning.model.clip import CLIP
from clip_lightning.training.gradcache import statistics_kept, training_norms

SMALLEST = 8
"""Smaller micro-batches are not worth their overhead."""


def largest_for_batch(clip: CLIP, batch: dict[str, Tensor], ranks: int) -> tuple[int, int] | None:
    """Return how many rows this process has memory for, and the rows of a batch; None if no tower is trained.

    Args:
        clip: the model, on the device that it will be trained on.
        batch: `pixel_values` (B, 3, H, W) and `input_ids` and `attention_mask` (N, L) of the towers that are
            trained. The captions are padded to the maximum length.
        ranks: the number of processes that share this machine's memory (on a CPU).
    """
    parts: list[tuple[Callable[..., Tensor], list[Tensor]]] = []
    if not clip.image_tower.frozen:
        parts.append((clip.encode_image, [batch["pixel_values"]]))
    if not clip.text_tower.frozen:
        longer = clip.tokenize.max_length - batch["input_ids"].shape[1]
        tokens = [F.pad(batch[name], (0, longer)) for name in ("input_ids", "attention_mask")]
        parts.append((clip.encode_text, tokens))
    if not parts:
        return None
    rows = max(len(inputs[0]) for _, inputs in parts)
    size = largest_micro_batch(
        lambda size: torch.cat([encode(*(x[:size] for x in inputs)) for encode, inputs in parts]),
        rows,
        clip,
        # gradients and AdamW's moments
        reserve=3 * sum(p.nbytes for p in clip.parameters() if p.requires_grad),
        ranks=ranks,
    )
    return size, rows


def largest_micro_batch(
    encode: Callable[[int], Tensor], rows: int, module: nn.Module, *, reserve: int = 0, ranks: int = 1
) -> int:
    """Find how many rows fit in memory in a forward and backward pass: a power of two, or all rows.

    On a GPU, growing sizes are tried until the memory runs out, and half of the largest that fits is used. On
    a CPU, where running out of memory ends the process, the activations of a few rows are measured and
    compared with half of the free memory. Weights, gradients, batch-norm statistics and the state of the
    random number generators do not change.

    Args:
        encode: returns the embeddings of the first rows, given their number.
        rows: the rows of the complete batch.
        module: the module that `encode` runs.
        reserve: bytes that training will allocate later, for example for the optimizer's moments.
        ranks: the number of processes that share this machine's memory (on a CPU).

    Returns:
        The number of rows, or 0 if not even `SMALLEST` rows fit.
    """
    device = next(module.parameters()).device
    parameters = [p for p in module.parameters() if p.requires_grad]
    norms = training_norms(module)

    def backward(size: int) -> None:
        # .backward() would leave gradients behind, and synchronize them between ranks
        torch.autograd.grad(encode(size).sum(), parameters, allow_unused=True)

    with torch.random.fork_rng([] if device.type == "cpu" else [device]), statistics_kept(norms):
        if device.type == "cpu":
            budget = psutil.virtual_memory().available // (2 * ranks) - reserve
            return within_budget(lambda size: saved_bytes(encode, size, module), rows, budget)
        held = torch.empty(reserve, dtype=torch.uint8, device=device)
        size = by_trying(backward, rows)
        del held
    torch.cuda.empty_cache()
    return size


def sizes(rows: int) -> list[int]:
    """Return the possible sizes in ascending order: powers of two from `SMALLEST` on, and all rows."""
    powers = [2**k for k in range(rows.bit_length()) if SMALLEST <= 2**k < rows]
    return [*powers, rows]


def by_trying(run: Callable[[int], object], rows: int) -> int:
    """Return `rows` if they fit, else half of the largest size that fits, or 0 if none does."""
    fits = 0
    for size in sizes(rows):
        try:
            run(size)
        except torch.OutOfMemoryError:
            return fits // 2 if fits > SMALLEST else fits
        fits = size
    return fits


def within_budget(measure: Callable[[int], int], rows: int, budget: int) -> int:
    """Return the largest size within the budget of bytes, extrapolated from two and four rows, or 0."""
    two, four = measure(2), measure(4)
    per_row = (four - two) / 2
    return max((size for size in sizes(rows) if two + (size - 2) * per_row <= budget), default=0)


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
