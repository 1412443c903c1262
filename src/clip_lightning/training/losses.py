"""Defines contrastive losses as pure functions of embeddings, and modules to choose one by name.

Shapes: B images, N texts, embeddings of width D. Embeddings have unit length; `scale` is exponentiated.

Each rank computes its own rows against the columns of all ranks. The mean of the results over the ranks is
the loss of all pairs. The memory does not grow with the square of the batch: see `similarities`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clip_lightning.errors import UserError
from clip_lightning.training.similarities import fits_in_a_block, for_blocks, log_sum_exp, similarities


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
        """Check the shapes, fill in ids, and convert to fp32, since bf16 cannot sum gradients over blocks.

        Args:
            image: (B, D), embeddings of images.
            text: (N, D), embeddings of texts.
            image_id: (B,), by default all images differ.
            text_image_id: (N,), by default `image_id`, which requires N = B.

        Raises:
            ValueError: the shapes do not match.
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
                f"expected one id per image and text, got {len(image_id)} ids for {len(image)} images and "
                f"{len(text_image_id)} ids for {len(text)} texts; pass text_image_id (N,) unless N = B"
            )
        return cls(image.float(), text.float(), image_id, text_image_id)

    def swapped(self) -> Pairs:
        """Swap images and texts."""
        return Pairs(self.text, self.image, self.text_image_id, self.image_id)


def info_nce(
    image: Tensor,
    text: Tensor,
    scale: Tensor | float,
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
    return _info_nce(pairs, pairs, scale, label_smoothing)


def _info_nce(own: Pairs, everyone: Pairs, scale: Tensor | float, label_smoothing: float) -> Tensor:
    if own is everyone and fits_in_a_block(own.image, own.text):
        positive = own.image_id[:, None] == own.text_image_id
        logits = similarities(own.image, own.text) * scale
        one_way = _cross_entropy(logits, positive, label_smoothing)
        return (one_way + _cross_entropy(logits.T, positive.T, label_smoothing)) / 2
    both = _rows_cross_entropy(own, everyone, scale, label_smoothing)
    both += _rows_cross_entropy(own.swapped(), everyone.swapped(), scale, label_smoothing)
    return both / 2 * _ranks(own, everyone)


def _cross_entropy(logits: Tensor, positive: Tensor, label_smoothing: float) -> Tensor:
    """Return the mean over the rows that have a positive."""
    count = positive.sum(dim=1, keepdim=True)
    target = positive / count.clamp(min=1) * (1 - label_smoothing) + label_smoothing / logits.shape[1]
    per_row = -(target * logits.log_softmax(dim=1)).sum(dim=1)
    chosen = count.squeeze(1) > 0
    return (per_row * chosen).sum() / chosen.sum().clamp(min=1)


def _rows_cross_entropy(own: Pairs, everyone: Pairs, scale: Tensor | float, label_smoothing: float) -> Tensor:
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
    target = (1 - label_smoothing) * mean + label_smoothing * columns.mean(dim=0)
    rows = own.image * scale
    per_row = log_sum_exp(rows, columns) - (rows * target).sum(dim=1)
    counted = (_count(everyone.image_id, column_id) > 0).sum().clamp(min=1)
    return (per_row * (count > 0)).sum() / counted


def siglip_loss(
    image: Tensor,
    text: Tensor,
    scale: Tensor | float,
    bias: Tensor | float,
    *,
    image_id: Tensor | None = None,
    text_image_id: Tensor | None = None,
) -> Tensor:
    """Compute the pairwise sigmoid loss (SigLIP, Zhai et al. 2023), summed over pairs and divided by B.

    `bias` is added to every scaled similarity. The other arguments and the errors are those of `info_nce`.
    """
    pairs = Pairs.checked(image, text, image_id, text_image_id)
    return _siglip(pairs, pairs, scale, bias)


def _siglip(own: Pairs, everyone: Pairs, scale: Tensor | float, bias: Tensor | float) -> Tensor:
    def block(image: Tensor, image_id: Tensor) -> Tensor:
        logits = similarities(image, everyone.text) * scale + bias
        sign = (image_id[:, None] == everyone.text_image_id).to(logits.dtype) * 2 - 1
        return -F.logsigmoid(sign * logits).sum()

    sums = for_blocks(block, len(everyone.text), own.image, own.image_id)
    return torch.stack(sums).sum() / len(own.image)


def _violations(own: Pairs, everyone: Pairs, margin: float) -> Tensor:
    """Return the sum over all positive pairs of own images of the hinge against the hardest negative."""

    def block(rows: Tensor, row_id: Tensor) -> Tensor:
        positive = row_id[:, None] == everyone.text_image_id
        cosine = similarities(rows, everyone.text)
        hardest = cosine.masked_fill(positive, -torch.inf).amax(dim=1, keepdim=True)
        return (margin - cosine + hardest).relu()[positive].sum()

    return torch.stack(for_blocks(block, len(everyone.text), own.image, own.image_id)).sum()


def _ranks(own: Pairs, everyone: Pairs) -> float:
    """Return the number of ranks, since all have equally many images."""
    return len(everyone.image) / len(own.image)


def _count(ids: Tensor, among: Tensor) -> Tensor:
    """Return how often each of `ids` (R,) occurs in `among`."""
    ordered = among.sort().values
    return torch.searchsorted(ordered, ids, right=True) - torch.searchsorted(ordered, ids)


class ContrastiveLoss(nn.Module):
    """Base class of the losses: `--model.loss` takes the name of ours, or the class path of your own.

    A subclass defines `forward`, and stores the arguments of its constructor as attributes of the same names,
    so that checkpoints contain them.

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
        raise NotImplementedError

    def share(self, own: Pairs, everyone: Pairs, scale: Tensor, bias: Tensor | None) -> Tensor:
        """Return this rank's part, so that the mean over the ranks is the loss of all pairs.

        By default every rank computes the loss of all pairs; see `SumOverRows` for a cheaper way.

        Args:
            own: the pairs of this rank.
            everyone: the pairs of all ranks, which have equally many. Gradients flow back to the rank of each
                pair. With one rank, it is `own` itself.
            scale: as in `forward`.
            bias: as in `forward`.
        """
        return self(everyone.image, everyone.text, scale, bias, everyone.image_id, everyone.text_image_id)


class SumOverRows(ContrastiveLoss):
    """Base class of losses that are sums over rows, so that each rank computes only its own rows.

    A subclass defines `rows`. If it overrides `forward`, every rank computes the loss of all pairs with it.
    """

    def forward(
        self,
        image: Tensor,
        text: Tensor,
        scale: Tensor,
        bias: Tensor | None,
        image_id: Tensor,
        text_image_id: Tensor,
    ) -> Tensor:
        """Return the loss of all rows of the batch."""
        pairs = Pairs.checked(image, text, image_id, text_image_id)
        return self.rows(pairs, pairs, scale, bias)

    def share(self, own: Pairs, everyone: Pairs, scale: Tensor, bias: Tensor | None) -> Tensor:
        """Return the part of this rank's rows."""
        if type(self).forward is not SumOverRows.forward:
            return super().share(own, everyone, scale, bias)
        return self.rows(own, everyone, scale, bias)

    def rows(self, own: Pairs, everyone: Pairs, scale: Tensor, bias: Tensor | None) -> Tensor:
        """Return the part of own rows, as `ContrastiveLoss.share` defines it."""
        raise NotImplementedError


class InfoNCE(SumOverRows):
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

    def rows(self, own: Pairs, everyone: Pairs, scale: Tensor, bias: Tensor | None) -> Tensor:
        """Compare own images and texts with those of all ranks; `bias` is not used."""
        return _info_nce(own, everyone, scale, self.label_smoothing)


class SigLIP(SumOverRows):
    """The sigmoid loss; see `siglip_loss`. Scale and bias start at the values of the paper."""

    init_scale = 10.0
    init_bias = -10.0

    def rows(self, own: Pairs, everyone: Pairs, scale: Tensor, bias: Tensor | None) -> Tensor:
        """Compare own images with the texts of all ranks."""
        return _siglip(own, everyone, scale, 0.0 if bias is None else bias)


class MaxViolation(SumOverRows):
    """The hinge loss of each pair against its hardest negatives (VSE++, Faghri et al. 2018).

    It is the mean over all positive pairs in both directions, and uses cosines without the scale. A row or
    column without a negative has a loss of 0.

    Args:
        margin: how much the cosine of a pair should exceed that of its hardest negative.
    """

    def __init__(self, margin: float = 0.2) -> None:
        super().__init__()
        if not 0 < margin <= 2:
            raise UserError(f"--model.loss.margin {margin}: expected a number greater than 0 and at most 2")
        self.margin = margin

    def rows(self, own: Pairs, everyone: Pairs, scale: Tensor, bias: Tensor | None) -> Tensor:
        """Compare own images and texts with those of all ranks; the gradient of `scale` is 0."""
        both = _violations(own, everyone, self.margin)
        both += _violations(own.swapped(), everyone.swapped(), self.margin)
        pairs = _count(everyone.image_id, everyone.text_image_id).sum().clamp(min=1)
        # data-parallel training expects a gradient of every parameter
        return both / pairs * _ranks(own, everyone) + 0 * scale
