"""Contrastive losses as pure functions of embeddings, and thin modules to choose one by name.

B images, N texts, D the embedding's width. Embeddings have unit length, `scale` is already exponentiated.
No loss knows of ranks: what is gathered from other devices is simply more rows.

Nor is a loss what limits the batch: beyond `BLOCK` similarities they are computed for a block of images at a
time, and once more in the backward pass, so that no (B, N) array is ever held.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from clip_lightning.errors import UserError

BLOCK = 2**22
"""Similarities held at a time: 16 MB an array, of which a loss needs two to seven."""

T = TypeVar("T")


def info_nce(
    image: Tensor,
    text: Tensor,
    scale: Tensor | float,
    *,
    image_id: Tensor | None = None,
    text_image_id: Tensor | None = None,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Symmetric cross-entropy over similarities (van den Oord et al. 2018; CLIP, Radford et al. 2021).

    Every text of an image is a positive of it: with several positives in a row, the mean of −log p over
    them. Rows without a positive count for nothing. Computed in fp32 whatever the autocast state.

    Args:
        image: (B, D).
        text: (N, D).
        scale: inverse temperature.
        image_id: (B,) which picture each row of `image` shows; by default all differ.
        text_image_id: (N,) the picture that each text describes; by default `image_id`, which needs N = B.
        label_smoothing: share of each target spread evenly over all candidates.

    Returns:
        The mean of both directions, a scalar.

    Raises:
        ValueError: shapes that do not belong together.
    """
    image, text, image_id, text_image_id = _checked(image, text, image_id, text_image_id)
    if image.shape[0] * text.shape[0] > BLOCK:
        return _info_nce_in_blocks(image, text, scale, image_id, text_image_id, label_smoothing)
    positive = image_id[:, None] == text_image_id
    logits = _similarities(image, text) * scale
    one_way = _cross_entropy(logits, positive, label_smoothing)
    return (one_way + _cross_entropy(logits.T, positive.T, label_smoothing)) / 2


def _cross_entropy(logits: Tensor, positive: Tensor, label_smoothing: float) -> Tensor:
    """Mean over the rows that have a positive."""
    count = positive.sum(dim=1, keepdim=True)
    target = positive / count.clamp(min=1) * (1 - label_smoothing) + label_smoothing / logits.shape[1]
    per_row = -(target * logits.log_softmax(dim=1)).sum(dim=1)
    return _mean_where(per_row, count.squeeze(1) > 0)


def _info_nce_in_blocks(
    image: Tensor,
    text: Tensor,
    scale: Tensor | float,
    image_id: Tensor,
    text_image_id: Tensor,
    label_smoothing: float,
) -> Tensor:
    """`info_nce` from −Σ target · log p = log Σ exp(logit) − Σ target · logit.

    Only the first term needs all logits. In the second, a row's mean logit is the product of its embedding
    with the mean of the others' embeddings.
    """
    present, member = torch.cat([image_id, text_image_id]).unique(return_inverse=True)
    image_id, text_image_id = member.split([len(image), len(text)])

    def one_way(log_sum: Tensor, rows: Tensor, columns: Tensor, row_id: Tensor, column_id: Tensor) -> Tensor:
        count = column_id.bincount(minlength=len(present))[row_id]
        total = columns.new_zeros(len(present), columns.shape[1]).index_add(0, column_id, columns)
        mean = total[row_id] / count.clamp(min=1)[:, None]
        target = (1 - label_smoothing) * mean + label_smoothing * columns.mean(dim=0)
        return _mean_where(log_sum - (rows * target).sum(dim=1), count > 0)

    image = image * scale
    row_sums, column_sums = _LogSumExps.apply(image, text)
    to_text = one_way(row_sums, image, text, image_id, text_image_id)
    return (to_text + one_way(column_sums, text, image, text_image_id, image_id)) / 2


class _LogSumExps(torch.autograd.Function):
    """log Σ exp over the rows (B,) and over the columns (N,) of a bᵀ, which is computed twice and never held.

    Blocks share their memory: allocated anew, they leave holes in the CPU's heap that none of them fits.
    """

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        row_max, row_sum = a.new_empty(2, len(a))
        column_max, column_sum = a.new_full((len(b),), -torch.inf), a.new_zeros(len(b))
        for block, logits, spare in _LogSumExps.blocks(a, b):
            row_max[block] = logits.amax(dim=1)
            row_sum[block] = torch.sub(logits, row_max[block, None], out=spare).exp_().sum(dim=1)
            largest = torch.maximum(column_max, logits.amax(dim=0))
            column_sum *= (column_max - largest).exp_()
            column_sum += torch.sub(logits, largest, out=spare).exp_().sum(dim=0)
            column_max = largest
        ctx.save_for_backward(a, b, row_max, row_sum, column_max, column_sum)
        return row_max + row_sum.log(), column_max + column_sum.log()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_rows: Tensor, grad_columns: Tensor) -> tuple[Tensor, Tensor]:
        a, b, row_max, row_sum, column_max, column_sum = ctx.saved_tensors
        row_weight, column_weight = grad_rows / row_sum, grad_columns / column_sum
        grad_a, grad_b = torch.empty_like(a), torch.zeros_like(b)
        for block, logits, spare in _LogSumExps.blocks(a, b):
            # the gradient of a log-sum-exp is the softmax
            torch.sub(logits, row_max[block, None], out=spare).exp_().mul_(row_weight[block, None])
            grad_logits = logits.sub_(column_max).exp_().mul_(column_weight).add_(spare)
            with torch.autocast(a.device.type, enabled=False):
                grad_a[block] = grad_logits @ b
                grad_b.addmm_(grad_logits.T, a[block])
        return grad_a, grad_b

    @staticmethod
    def blocks(a: Tensor, b: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Which rows, their part of a bᵀ, and as much memory again."""
        size = min(len(a), max(1, BLOCK // len(b)))
        space = a.new_empty(2, size, len(b))
        for start in range(0, len(a), size):
            block = slice(start, start + size)
            logits, spare = space[:, : len(a[block])]
            with torch.autocast(a.device.type, enabled=False):
                torch.mm(a[block], b.T, out=logits)
            yield block, logits, spare


def siglip_loss(
    image: Tensor,
    text: Tensor,
    scale: Tensor | float,
    bias: Tensor | float,
    *,
    image_id: Tensor | None = None,
    text_image_id: Tensor | None = None,
) -> Tensor:
    """Pairwise sigmoid loss (SigLIP, Zhai et al. 2023), summed over pairs and divided by B.

    Arguments and errors as for `info_nce`; `bias` is added to every scaled similarity.
    """
    image, text, image_id, text_image_id = _checked(image, text, image_id, text_image_id)

    def block(image: Tensor, image_id: Tensor) -> Tensor:
        logits = _similarities(image, text) * scale + bias
        sign = (image_id[:, None] == text_image_id).to(logits.dtype) * 2 - 1
        return -F.logsigmoid(sign * logits).sum()

    return torch.stack(_for_blocks(block, len(text), image, image_id)).sum() / len(image)


def max_violation_loss(
    image: Tensor,
    text: Tensor,
    margin: float = 0.2,
    *,
    image_id: Tensor | None = None,
    text_image_id: Tensor | None = None,
) -> Tensor:
    """Hinge of each pair against its hardest negative, both ways (VSE++, Faghri et al. 2018).

    Arguments and errors as for `info_nce`, without a scale: cosines are compared with the `margin`. The mean
    over all positive pairs; a row or column without a negative has no violation.
    """
    image, text, image_id, text_image_id = _checked(image, text, image_id, text_image_id)
    pairs = _count(image_id, text_image_id).sum()
    one_way = _violations(image, text, image_id, text_image_id, margin)
    other_way = _violations(text, image, text_image_id, image_id, margin)
    return (one_way + other_way) / pairs.clamp(min=1)


def _violations(rows: Tensor, columns: Tensor, row_id: Tensor, column_id: Tensor, margin: float) -> Tensor:
    """Sum over all positive pairs of the hinge against the row's hardest negative."""

    def block(rows: Tensor, row_id: Tensor) -> Tensor:
        positive = row_id[:, None] == column_id
        cosine = _similarities(rows, columns)
        hardest = cosine.masked_fill(positive, -torch.inf).amax(dim=1, keepdim=True)
        return (margin - cosine + hardest).relu()[positive].sum()

    return torch.stack(_for_blocks(block, len(columns), rows, row_id)).sum()


def _for_blocks(block: Callable[..., T], columns: int, *rows: Tensor) -> list[T]:
    """`block` of as many rows at a time as make `BLOCK` similarities, run again in the backward pass.

    Where all rows make one block it is not run again.
    """
    size = max(1, BLOCK // max(1, columns))
    if len(rows[0]) <= size:
        return [block(*rows)]
    parts = zip(*(tensor.split(size) for tensor in rows), strict=True)
    return [checkpoint(block, *part, use_reentrant=False, preserve_rng_state=False) for part in parts]


def _similarities(image: Tensor, text: Tensor) -> Tensor:
    """Cosines (B, N) in fp32 under autocast too."""
    with torch.autocast(image.device.type, enabled=False):
        return image @ text.T


def _checked(
    image: Tensor, text: Tensor, image_id: Tensor | None, text_image_id: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The arguments of a loss with ids, (B,) and (N,): where they are equal, text describes image.

    Embeddings become fp32: bf16 has 3 digits, too few for the logits of close candidates and for sums of
    gradients over blocks.
    """
    if image.ndim != 2 or text.ndim != 2 or image.shape[1] != text.shape[1]:
        raise ValueError(
            f"expected (B, D) and (N, D) embeddings, got {tuple(image.shape)} and {tuple(text.shape)}"
        )
    if image_id is None:
        image_id = torch.arange(len(image), device=image.device)
    if text_image_id is None:
        text_image_id = image_id
    if len(image_id) != len(image) or len(text_image_id) != len(text):
        raise ValueError(
            f"{len(image)} images with {len(image_id)} ids and {len(text)} texts with {len(text_image_id)} "
            "ids; with other than one text an image, give text_image_id (N,)"
        )
    return image.float(), text.float(), image_id, text_image_id


def _count(ids: Tensor, among: Tensor) -> Tensor:
    """How often each of `ids` (R,) occurs in `among`."""
    ordered = among.sort().values
    return torch.searchsorted(ordered, ids, right=True) - torch.searchsorted(ordered, ids)


def _mean_where(values: Tensor, chosen: Tensor) -> Tensor:
    return (values * chosen).sum() / chosen.sum().clamp(min=1)


class ContrastiveLoss(nn.Module):
    """What `--model.loss` chooses: a subclass by its name, or one of your own by its class path.

    Attributes:
        init_scale: where the learnable scale starts.
        init_bias: where the learnable bias starts; None for a loss without one.
    """

    init_scale: float = 1 / 0.07
    init_bias: float | None = None

    def forward(
        self,
        image: Tensor,
        text: Tensor,
        scale: Tensor,
        bias: Tensor | None,
        image_id: Tensor,
        text_image_id: Tensor,
    ) -> Tensor:
        """The loss of `image` (B, D) and `text` (N, D) with the ids of the pictures they belong to."""
        raise NotImplementedError


class InfoNCE(ContrastiveLoss):
    """CLIP's loss; see `info_nce`.

    Args:
        label_smoothing: share of each target spread evenly over all candidates, 0 to 1.
    """

    def __init__(self, label_smoothing: float = 0.0) -> None:
        super().__init__()
        if not 0 <= label_smoothing < 1:
            raise UserError(
                f"--model.loss.label_smoothing {label_smoothing}: expected 0 or more, and less than 1"
            )
        self.label_smoothing = label_smoothing

    def forward(
        self,
        image: Tensor,
        text: Tensor,
        scale: Tensor,
        bias: Tensor | None,
        image_id: Tensor,
        text_image_id: Tensor,
    ) -> Tensor:
        """See `info_nce`; `bias` is not used."""
        return info_nce(
            image,
            text,
            scale,
            image_id=image_id,
            text_image_id=text_image_id,
            label_smoothing=self.label_smoothing,
        )


class SigLIP(ContrastiveLoss):
    """The sigmoid loss; see `siglip_loss`. Scale and bias start where the paper has them."""

    init_scale = 10.0
    init_bias = -10.0

    def forward(
        self,
        image: Tensor,
        text: Tensor,
        scale: Tensor,
        bias: Tensor | None,
        image_id: Tensor,
        text_image_id: Tensor,
    ) -> Tensor:
        """See `siglip_loss`."""
        offset = 0.0 if bias is None else bias
        return siglip_loss(image, text, scale, offset, image_id=image_id, text_image_id=text_image_id)


class MaxViolation(ContrastiveLoss):
    """The triplet loss of VSE++; see `max_violation_loss`.

    Args:
        margin: by how much a pair's cosine should exceed that of its hardest negative.
    """

    def __init__(self, margin: float = 0.2) -> None:
        super().__init__()
        if not 0 < margin <= 2:
            raise UserError(f"--model.loss.margin {margin}: expected more than 0 and at most 2")
        self.margin = margin

    def forward(
        self,
        image: Tensor,
        text: Tensor,
        scale: Tensor,
        bias: Tensor | None,
        image_id: Tensor,
        text_image_id: Tensor,
    ) -> Tensor:
        """See `max_violation_loss`; `scale` and `bias` are not used, but keep a zero gradient."""
        loss = max_violation_loss(image, text, self.margin, image_id=image_id, text_image_id=text_image_id)
        return loss + 0 * scale  # data-parallel training waits for every parameter's gradient
