"""Assembles `CLIP` from the towers and projections of another model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from clip_lightning.model.towers import ImageTower, TextTower

if TYPE_CHECKING:
    from clip_lightning.model.clip import CLIP, SideHeadKind


def assemble(
    clip_class: type[CLIP],
    image_tower: ImageTower,
    text_tower: TextTower,
    projections: dict[str, nn.Module | None],
    *,
    embed_dim: int,
    logit_scale: Tensor,
    logit_bias: Tensor | None,
) -> CLIP:
    """Assemble a model from parts with pretrained weights.

    Args:
        clip_class: class of the result.
        image_tower: tower that returns features before the projection.
        text_tower: tower that returns features before the projection.
        projections: the projection layers for `image` and `text`, or None for a model without them.
        embed_dim: width of the embeddings.
        logit_scale: logarithm of the inverse temperature, one value of any shape.
        logit_bias: bias of the logits, one value of any shape, or None for a model without one.
    """
    kinds = {side: _head_kind(layer) for side, layer in projections.items()}
    head: Any = "linear" if set(kinds.values()) == {"linear"} else kinds
    clip = clip_class(
        image_tower,
        text_tower,
        embed_dim=embed_dim,
        head=head,
        init_bias=None if logit_bias is None else 0.0,
    )
    for side, layer in projections.items():
        if layer is not None:  # the head begins with a dropout
            layers = layer if isinstance(layer, nn.Sequential) else [layer]
            clip.heads[side].load_state_dict(nn.Sequential(nn.Identity(), *layers).state_dict())
    # Copied, as the alignment of memory-mapped weights can change the last bit of a product.
    for tensor in (*clip.parameters(), *clip.buffers()):
        tensor.data = tensor.data.clone()
    with torch.no_grad():
        clip.logit_scale.copy_(logit_scale.reshape(()))
        if clip.logit_bias is not None and logit_bias is not None:
            clip.logit_bias.copy_(logit_bias.reshape(()))
    return clip


def _head_kind(layer: nn.Module | None) -> SideHeadKind:
    if layer is None:
        return "none"
    if isinstance(layer, nn.Linear):
        return "linear" if layer.bias is None else "affine"
    return "gelu"
