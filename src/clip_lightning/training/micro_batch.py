"""How many rows a trained tower can hold in memory at a time: `--model.micro_batch_size auto`."""

from __future__ import annotations

from collections.abc import Callable

import psutil
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clip_lightning.model.clip import CLIP
from clip_lightning.training.gradcache import statistics_kept, training_norms

SMALLEST = 8
"""Rows below which a micro-batch is not worth its overhead."""


def largest_for_batch(clip: CLIP, batch: dict[str, Tensor], ranks: int) -> tuple[int, int] | None:
    """The rows that this process has memory for at a time, and the rows of a batch; None: nothing is trained.

    Args:
        clip: on the device that it will be trained on.
        batch: `pixel_values` (B, 3, H, W) and `input_ids` and `attention_mask` (N, L) of the towers that are
            trained; the captions are taken to be as long as they may become.
        ranks: processes that share this machine's memory (on a CPU).
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
    norms = training_norms(module)

    def backward(size: int) -> None:
        # not .backward(): it would leave gradients, and start the exchange between ranks
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
