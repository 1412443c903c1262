"""Defines contrastive losses as pure functions of embeddings, and modules to choose one by name.

Shapes: B images, N texts, embeddings of width D. Embeddings have unit length; `scale` is exponentiated.

Each rank computes its own rows against the columns of all ranks. The mean of the results over the ranks is
the loss of all pairs. Similarities are computed in blocks of rows, so that no (B, N) array of a large batch
is ever in memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from clip_lightning.errors import UserError
from clip_lightning.model.clip import unit_length

Scalar = Tensor | float
BLOCK, GPU_BLOCK = 2**22, 2**25
"""Similarities in memory at a time: 16 MB per array, or 128 MB on a GPU. A loss needs two to seven arrays."""


@dataclass(frozen=True)
class Pairs:
    """Holds embeddings of unit length and the images they belong to, of one rank or of all ranks.

    Attributes:
        image: (B, D), embeddings of images.
        text: (N, D), embeddings of texts.
        image_id: (B,), the image of each row of `image`.
        text_image_id: (N,), the image that each text describes.
    """

    image: Tensor
    text: Tensor
    image_id: Tensor
    text_image_id: Tensor

    @classmethod
    def checked(
        cls, image: Tensor, text: Tensor, image_id: Tensor | None = None, text_image_id: Tensor | None = None
    ) -> Pairs:
        """Check the shapes, fill in ids, and convert to fp32, since bf16 cannot sum gradients over blocks."""
        if image_id is None:
            image_id = torch.arange(len(image), device=image.device)
        if text_image_id is None:
            text_image_id = image_id
        shapes = [tuple(tensor.shape) for tensor in (image, text, image_id, text_image_id)]
        if image.ndim != 2 or shapes[1:] != [(len(text), image.shape[1]), (len(image),), (len(text),)]:
            raise ValueError(
                "expected image (B, D), text (N, D), image_id (B,) and text_image_id (N,), which may be "
                f"omitted if N = B, got {', '.join(map(str, shapes))}"
            )
        return cls(image.float(), text.float(), image_id, text_image_id)

    def swapped(self) -> Pairs:
        """Swap images and texts."""
        return Pairs(self.text, self.image, self.text_image_id, self.image_id)

    def shortened(self, dims: int) -> Pairs:
        """Keep the first `dims` numbers of each embedding, with unit length."""
        image, text = (unit_length(rows[:, :dims]) for rows in (self.image, self.text))
        return replace(self, image=image, text=text)


def info_nce(
    image: Tensor,
    text: Tensor,
    scale: Scalar,
    *,
    image_id: Tensor | None = None,
    text_image_id: Tensor | None = None,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Compute the symmetric cross-entropy (van den Oord et al. 2018; CLIP, Radford et al. 2021).

    Every text of an image is a positive. If a row has several positives, its loss is the mean of −log p over
    them. Rows without a positive are ignored. The loss is computed in fp32, also under autocast.

    Args:
        image: (B, D), embeddings of images.
        text: (N, D), embeddings of texts.
        scale: inverse temperature.
        image_id: (B,), the image of each row of `image`; by default all differ.
        text_image_id: (N,), the image that each text describes; by default `image_id`, which requires N = B.
        label_smoothing: fraction of each target that is spread evenly over all candidates.

    Returns:
        The mean of both directions, a scalar.

    Raises:
        ValueError: the shapes do not match.
    """
    pairs = Pairs.checked(image, text, image_id, text_image_id)
    return InfoNCE(label_smoothing).rows(pairs, pairs, scale, None)


def siglip_loss(
    image: Tensor,
    text: Tensor,
    scale: Scalar,
    bias: Scalar,
    *,
    image_id: Tensor | None = None,
    text_image_id: Tensor | None = None,
) -> Tensor:
    """Compute the pairwise sigmoid loss (SigLIP, Zhai et al. 2023), summed over pairs and divided by B.

    `bias` is added to every scaled similarity. The other arguments and the errors are those of `info_nce`.
    """
    pairs = Pairs.checked(image, text, image_id, text_image_id)
    return SigLIP().rows(pairs, pairs, scale, bias)


class ContrastiveLoss(nn.Module):
    """Base class of the losses: `--model.loss` takes the name of ours, or the class path of your own.

    A subclass defines `forward`, or `rows` if the loss is a sum over rows, of which each rank then computes
    only its own. It stores the arguments of its constructor as attributes of the same names, so that
    checkpoints contain them.

    Attributes:
        init_scale: initial value of the learnable scale.
        init_bias: initial value of the learnable bias, or None for a loss without a bias.
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
        """Return the loss of `image` (B, D) and `text` (N, D), whose images have the ids (B,) and (N,)."""
        pairs = Pairs.checked(image, text, image_id, text_image_id)
        return self.rows(pairs, pairs, scale, bias)

    def share(self, own: Pairs, everyone: Pairs, scale: Tensor, bias: Tensor | None) -> Tensor:
        """Return this rank's part, so that the mean over the ranks is the loss of all pairs.

        If a subclass overrides `forward`, every rank computes the loss of all pairs with it.

        Args:
            own: the pairs of this rank.
            everyone: the pairs of all ranks, which have equally many. Gradients flow back to the rank of each
                pair. With one rank, it is `own` itself.
            scale: as in `forward`.
            bias: as in `forward`.
        """
        if type(self).forward is ContrastiveLoss.forward:
            return self.rows(own, everyone, scale, bias)
        return self(everyone.image, everyone.text, scale, bias, everyone.image_id, everyone.text_image_id)

    def rows(self, own: Pairs, everyone: Pairs, scale: Scalar, bias: Scalar | None) -> Tensor:
        """Return the part of own rows, as `share` defines it."""
        raise NotImplementedError


def share_of_prefixes(
    loss: ContrastiveLoss,
    prefixes: Sequence[int],
    own: Pairs,
    everyone: Pairs,
    scale: Tensor,
    bias: Tensor | None,
) -> Tensor:
    """Return the mean of `loss.share` over prefixes of the embeddings and the complete embeddings.

    This is Matryoshka representation learning with equal weights (Kusupati et al. 2022, equation 1). Every
    prefix is normalized again. The other arguments are those of `ContrastiveLoss.share`.
    """
    shares = [loss.share(own, everyone, scale, bias)]
    for dims in prefixes:
        short = own.shortened(dims)
        all_short = short if everyone is own else everyone.shortened(dims)
        shares.append(loss.share(short, all_short, scale, bias))
    return torch.stack(shares).mean()


class InfoNCE(ContrastiveLoss):
    """The loss of CLIP; see `info_nce`.

    Args:
        label_smoothing: fraction of each target that is spread evenly over all candidates, 0 to 1.
    """

    def __init__(self, label_smoothing: float = 0.0) -> None:
        super().__init__()
        if not 0 <= label_smoothing < 1:
            raise UserError(
                f"--model.loss.label_smoothing {label_smoothing}: expected a number from 0 to below 1"
            )
        self.label_smoothing = label_smoothing

    def rows(self, own: Pairs, everyone: Pairs, scale: Scalar, bias: Scalar | None) -> Tensor:
        if own is everyone and _is_one_block(own.image, own.text):
            positive = own.image_id[:, None] == own.text_image_id
            logits = _similarities(own.image, own.text) * scale
            return (self._cross_entropy(logits, positive, 1) + self._cross_entropy(logits, positive, 0)) / 2
        both = self._rows_cross_entropy(own, everyone, scale)
        both += self._rows_cross_entropy(own.swapped(), everyone.swapped(), scale)
        return both / 2 * (len(everyone.image) / len(own.image))

    def _cross_entropy(self, logits: Tensor, positive: Tensor, dim: int) -> Tensor:
        """Return the mean over the rows (dim 1) or the columns (dim 0) that have a positive."""
        count = positive.sum(dim, keepdim=True)
        weight = (count > 0) / (count > 0).sum().clamp(min=1)
        even = weight * (self.label_smoothing / logits.shape[dim])
        target = torch.addcmul(
            even, positive.float(), weight * (1 - self.label_smoothing) / count.clamp(min=1)
        )
        return -(target * logits.log_softmax(dim)).sum()

    def _rows_cross_entropy(self, own: Pairs, everyone: Pairs, scale: Scalar) -> Tensor:
        """Compute `_cross_entropy` of own rows from −Σ target · log p = log Σ exp(logit) − Σ target · logit.

        Only the first term needs all logits. In the second, the mean logit of a row is the product of its
        embedding with the mean embedding of the columns.
        """
        columns, column_id = everyone.text, everyone.text_image_id
        present, member = torch.cat([own.image_id, column_id]).unique(return_inverse=True)
        row_member, column_member = member.split([len(own.image), len(columns)])
        count = column_member.bincount(minlength=len(present))[row_member]
        total = columns.new_zeros(len(present), columns.shape[1]).index_add(0, column_member, columns)
        mean = total[row_member] / count.clamp(min=1)[:, None]
        target = (1 - self.label_smoothing) * mean + self.label_smoothing * columns.mean(dim=0)
        rows = own.image * scale
        per_row = _log_sum_exp(rows, columns) - (rows * target).sum(dim=1)
        counted = torch.isin(everyone.image_id, column_id).sum().clamp(min=1)
        return (per_row * (count > 0)).sum() / counted


class SigLIP(ContrastiveLoss):
    """The sigmoid loss; see `siglip_loss`. Scale and bias start at the values of the paper."""

    init_scale = 10.0
    init_bias = -10.0

    def rows(self, own: Pairs, everyone: Pairs, scale: Scalar, bias: Scalar | None) -> Tensor:
        def total(image: Tensor, image_id: Tensor) -> Tensor:
            logits = _similarities(image, everyone.text) * scale + (0.0 if bias is None else bias)
            sign = (image_id[:, None] == everyone.text_image_id).to(logits.dtype) * 2 - 1
            return -F.logsigmoid(sign * logits).sum()

        size = max(1, _block(everyone.text) // max(1, len(everyone.text)))
        if len(own.image) <= size:
            return total(own.image, own.image_id) / len(own.image)
        # the backward pass computes each block again instead of storing its activations
        blocks = zip(own.image.split(size), own.image_id.split(size), strict=True)
        sums = [checkpoint(total, *block, use_reentrant=False, preserve_rng_state=False) for block in blocks]
        return torch.stack(sums).sum() / len(own.image)


def affinity_mimicking(
    own: Pairs,
    everyone: Pairs,
    teacher_own: Pairs,
    teacher_everyone: Pairs,
    scale: Scalar,
    teacher_scale: Scalar,
) -> Tensor:
    """Compute how far a student's affinities are from those of a teacher, as this rank's part.

    For each image, the affinities are the softmax over all texts, and for each text the one over all images.
    The loss is the mean over rows of their Kullback-Leibler divergence KL(teacher ‖ student), averaged over
    the directions; but for the entropy of the teacher, it is the affinity mimicking of TinyCLIP (Wu et al.
    2023) and the contrastive relational distillation of CLIP-KD (Yang et al. 2024).

    Args:
        own: the student's pairs of this rank.
        everyone: the student's pairs of all ranks, which have equally many.
        teacher_own: the teacher's embeddings of `own`, which may have another width.
        teacher_everyone: the teacher's embeddings of `everyone`.
        scale: inverse temperature of the student.
        teacher_scale: inverse temperature of the teacher.
    """

    def divergence(own: Pairs, everyone: Pairs, teacher_own: Pairs, teacher_everyone: Pairs) -> Tensor:
        student = (_similarities(own.image, everyone.text) * scale).log_softmax(dim=1)
        target = (_similarities(teacher_own.image, teacher_everyone.text) * teacher_scale).log_softmax(dim=1)
        return F.kl_div(student, target, reduction="batchmean", log_target=True)

    pairs = own, everyone, teacher_own, teacher_everyone
    return (divergence(*pairs) + divergence(*(part.swapped() for part in pairs))) / 2


def _similarities(rows: Tensor, columns: Tensor) -> Tensor:
    """Return the products (B, N) of (B, D) and (N, D), in fp32 also under autocast."""
    with torch.autocast(rows.device.type, enabled=False):
        return rows @ columns.T


def _is_one_block(rows: Tensor, columns: Tensor) -> bool:
    return len(rows) * len(columns) <= _block(rows)


def _block(embeddings: Tensor) -> int:
    return GPU_BLOCK if embeddings.is_cuda else BLOCK


def _log_sum_exp(rows: Tensor, columns: Tensor) -> Tensor:
    """Return log Σ exp (B,) over the rows of the similarities of (B, D) and (N, D)."""
    if _is_one_block(rows, columns):
        return _similarities(rows, columns).logsumexp(dim=1)
    result: Tensor = _LogSumExp.apply(rows, columns)
    return result


class _LogSumExp(torch.autograd.Function):
    """Computes `_log_sum_exp` in blocks, once forward and once backward.

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
        size = min(len(a), max(1, _block(b) // len(b)))
        space = a.new_empty(size, len(b))
        for start in range(0, len(a), size):
            block = slice(start, start + size)
            logits = space[: len(a[block])]
            with torch.autocast(a.device.type, enabled=False):
                torch.mm(a[block], b.T, out=logits)
            yield block, logits
