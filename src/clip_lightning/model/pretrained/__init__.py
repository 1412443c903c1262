"""Converts models of other libraries into a `CLIP`."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from clip_lightning.model.clip import CLIP, SideHeadKind
from clip_lightning.model.towers import ImageTower, TextTower


@torch.no_grad()
def assemble(
    image_tower: ImageTower,
    text_tower: TextTower,
    projections: dict[str, nn.Module | None],
    embed_dim: int,
    model: Any,
) -> CLIP:
    """Combine towers without projections, their projections, and the scale and bias of the original model."""
    kinds = {side: _head_kind(layer) for side, layer in projections.items()}
    head: Any = "linear" if {*kinds.values()} == {"linear"} else kinds
    bias = getattr(model, "logit_bias", None)
    clip = CLIP(
        image_tower,
        text_tower,
        embed_dim=embed_dim,
        head=head,
        init_bias=None if bias is None else bias.item(),
    )
    for side, layer in projections.items():
        if layer is not None:  # the head begins with a dropout
            layers = layer if isinstance(layer, nn.Sequential) else [layer]
            clip.heads[side].load_state_dict(nn.Sequential(nn.Identity(), *layers).state_dict())
    clip.logit_scale.fill_(model.logit_scale.item())
    # Copied, as the alignment of memory-mapped weights can change the last bit of a product.
    for tensor in (*clip.parameters(), *clip.buffers()):
        tensor.data = tensor.data.clone()
    return clip


def _head_kind(layer: nn.Module | None) -> SideHeadKind:
    if layer is None:
        return "none"
    if isinstance(layer, nn.Linear):
        return "linear" if layer.bias is None else "affine"
    return "gelu"
