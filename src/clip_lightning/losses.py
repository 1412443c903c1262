"""Contrastive losses as pure functions of embeddings, and thin modules to choose one by name.

B images, N texts, D the embedding's width. Embeddings have unit length, `scale` is already exponentiated.
No loss knows of ranks: what is gathered from other devices is simply more rows.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clip_lightning.errors import UserError


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
    positive = _positives(image, text, image_id, text_image_id)
    logits = _similarities(image, text) * scale
    one_way = _cross_entropy(logits, positive, label_smoothing)
    return (one_way + _cross_entropy(logits.T, positive.T, label_smoothing)) / 2


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
    positive = _positives(image, text, image_id, text_image_id)
    logits = _similarities(image, text) * scale + bias
    sign = positive.to(logits.dtype) * 2 - 1
    return -F.logsigmoid(sign * logits).sum() / len(image)


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
    positive = _positives(image, text, image_id, text_image_id)
    cosine = _similarities(image, text)
    negative = cosine.masked_fill(positive, -torch.inf)
    hardest_text, hardest_image = negative.amax(dim=1, keepdim=True), negative.amax(dim=0, keepdim=True)
    violation = (margin - cosine + hardest_text).relu() + (margin - cosine + hardest_image).relu()
    return violation[positive].sum() / positive.sum().clamp(min=1)


def _similarities(image: Tensor, text: Tensor) -> Tensor:
    """Cosines (B, N) in fp32: bf16 has 3 digits, too few for the logits of close candidates."""
    with torch.autocast(image.device.type, enabled=False):
        return image.float() @ text.float().T


def _positives(image: Tensor, text: Tensor, image_id: Tensor | None, text_image_id: Tensor | None) -> Tensor:
    """Boolean (B, N): which text describes which image."""
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
    return image_id[:, None] == text_image_id[None, :]


def _cross_entropy(logits: Tensor, positive: Tensor, label_smoothing: float) -> Tensor:
    """Mean over the rows that have a positive."""
    count = positive.sum(dim=1, keepdim=True)
    target = positive / count.clamp(min=1) * (1 - label_smoothing) + label_smoothing / logits.shape[1]
    per_row = -(target * logits.log_softmax(dim=1)).sum(dim=1)
    has_positive = count.squeeze(1) > 0
    return (per_row * has_positive).sum() / has_positive.sum().clamp(min=1)


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
