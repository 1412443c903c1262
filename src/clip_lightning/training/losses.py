"""Contrastive losses as pure functions of embeddings, and thin modules to choose one by name.

B images, N texts, D the embedding's width. Embeddings have unit length, `scale` is already exponentiated.

With several ranks each computes its own rows against everybody's columns: a `share`, of which the mean over
the ranks is the loss of all pairs together. Nor is a loss what limits the batch: see `similarities`.
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
    """Embeddings of unit length and the pictures they belong to: of one rank, or of all.

    Attributes:
        image: (B, D).
        text: (N, D).
        image_id: (B,) which picture each row of `image` shows.
        text_image_id: (N,) the picture that each text describes.
    """

    image: Tensor
    text: Tensor
    image_id: Tensor
    text_image_id: Tensor

    def float(self) -> Pairs:
        """In fp32: bf16 has 3 digits, too few for close candidates and for sums of gradients over blocks."""
        return Pairs(self.image.float(), self.text.float(), self.image_id, self.text_image_id)

    def turned(self) -> Pairs:
        """Texts in place of images, and images in place of texts."""
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
    pairs = _checked(image, text, image_id, text_image_id)
    if not fits_in_a_block(image, text):
        return _info_nce_share(pairs, pairs, scale, label_smoothing)
    positive = pairs.image_id[:, None] == pairs.text_image_id
    logits = similarities(pairs.image, pairs.text) * scale
    one_way = _cross_entropy(logits, positive, label_smoothing)
    return (one_way + _cross_entropy(logits.T, positive.T, label_smoothing)) / 2


def _cross_entropy(logits: Tensor, positive: Tensor, label_smoothing: float) -> Tensor:
    """Mean over the rows that have a positive."""
    count = positive.sum(dim=1, keepdim=True)
    target = positive / count.clamp(min=1) * (1 - label_smoothing) + label_smoothing / logits.shape[1]
    per_row = -(target * logits.log_softmax(dim=1)).sum(dim=1)
    chosen = count.squeeze(1) > 0
    return (per_row * chosen).sum() / chosen.sum().clamp(min=1)


def _info_nce_share(own: Pairs, everyone: Pairs, scale: Tensor | float, label_smoothing: float) -> Tensor:
    """`info_nce` of these rows from −Σ target · log p = log Σ exp(logit) − Σ target · logit.

    Only the first term needs all logits. In the second, a row's mean logit is the product of its embedding
    with the mean of the others' embeddings.
    """

    def one_way(own: Pairs, everyone: Pairs) -> Tensor:
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

    both = one_way(own, everyone) + one_way(own.turned(), everyone.turned())
    return both / 2 * _ranks(own, everyone)


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
    pairs = _checked(image, text, image_id, text_image_id)
    return _siglip_share(pairs, pairs, scale, bias)


def _siglip_share(own: Pairs, everyone: Pairs, scale: Tensor | float, bias: Tensor | float) -> Tensor:
    def block(image: Tensor, image_id: Tensor) -> Tensor:
        logits = similarities(image, everyone.text) * scale + bias
        sign = (image_id[:, None] == everyone.text_image_id).to(logits.dtype) * 2 - 1
        return -F.logsigmoid(sign * logits).sum()

    sums = for_blocks(block, len(everyone.text), own.image, own.image_id)
    return torch.stack(sums).sum() / len(own.image)


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
    pairs = _checked(image, text, image_id, text_image_id)
    return _max_violation_share(pairs, pairs, margin)


def _max_violation_share(own: Pairs, everyone: Pairs, margin: float) -> Tensor:
    pairs = _count(everyone.image_id, everyone.text_image_id).sum()
    both = _violations(own, everyone, margin) + _violations(own.turned(), everyone.turned(), margin)
    return both / pairs.clamp(min=1) * _ranks(own, everyone)


def _violations(own: Pairs, everyone: Pairs, margin: float) -> Tensor:
    """Sum over the positive pairs of all own images of the hinge against the row's hardest negative."""

    def block(rows: Tensor, row_id: Tensor) -> Tensor:
        positive = row_id[:, None] == everyone.text_image_id
        cosine = similarities(rows, everyone.text)
        hardest = cosine.masked_fill(positive, -torch.inf).amax(dim=1, keepdim=True)
        return (margin - cosine + hardest).relu()[positive].sum()

    return torch.stack(for_blocks(block, len(everyone.text), own.image, own.image_id)).sum()


def _checked(image: Tensor, text: Tensor, image_id: Tensor | None, text_image_id: Tensor | None) -> Pairs:
    """The arguments of a loss with ids, (B,) and (N,): where they are equal, text describes image."""
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
    return Pairs(image, text, image_id, text_image_id).float()


def _ranks(own: Pairs, everyone: Pairs) -> float:
    """How many there are, each with as many images as the others."""
    return len(everyone.image) / len(own.image)


def _count(ids: Tensor, among: Tensor) -> Tensor:
    """How often each of `ids` (R,) occurs in `among`."""
    ordered = among.sort().values
    return torch.searchsorted(ordered, ids, right=True) - torch.searchsorted(ordered, ids)


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

    def share(self, own: Pairs, everyone: Pairs, scale: Tensor, bias: Tensor | None) -> Tensor:
        """This rank's share of the loss; the mean of all ranks' shares is the loss of all pairs together.

        Here every rank computes the whole; a loss that is a sum over rows needs only its own.

        Args:
            own: of this rank.
            everyone: of all ranks, as many of each; with gradients, which return to the rank they are of.
            scale: as for `forward`.
            bias: likewise.
        """
        return self(everyone.image, everyone.text, scale, bias, everyone.image_id, everyone.text_image_id)


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

    def share(self, own: Pairs, everyone: Pairs, scale: Tensor, bias: Tensor | None) -> Tensor:
        """Of its own images and its own texts, against all."""
        return _info_nce_share(own.float(), everyone.float(), scale, self.label_smoothing)


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

    def share(self, own: Pairs, everyone: Pairs, scale: Tensor, bias: Tensor | None) -> Tensor:
        """Of its own images, against all texts."""
        return _siglip_share(own.float(), everyone.float(), scale, 0.0 if bias is None else bias)


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

    def share(self, own: Pairs, everyone: Pairs, scale: Tensor, bias: Tensor | None) -> Tensor:
        """Of its own images and its own texts, against all."""
        return _max_violation_share(own.float(), everyone.float(), self.margin) + 0 * scale
