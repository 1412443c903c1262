"""Converts models of other libraries into a `CLIP`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from clip_lightning.model.towers import ImageTower, TextTower

if TYPE_CHECKING:
    from clip_lightning.model.clip import CLIP, SideHeadKind


class Parts(NamedTuple):
    """Towers without their projections, the projections, and one value each of the scale and the bias."""

    image_tower: ImageTower
    text_tower: TextTower
    projections: dict[str, nn.Module | None]
    embed_dim: int
    logit_scale: Tensor
    logit_bias: Tensor | None


@torch.no_grad()
def assemble(clip_class: type[CLIP], parts: Parts) -> CLIP:
    """Assemble the model of another library."""
    kinds = {side: _head_kind(layer) for side, layer in parts.projections.items()}
    head: Any = "linear" if {*kinds.values()} == {"linear"} else kinds
    bias = None if parts.logit_bias is None else parts.logit_bias.item()
    clip = clip_class(
        parts.image_tower, parts.text_tower, embed_dim=parts.embed_dim, head=head, init_bias=bias
    )
    for side, layer in parts.projections.items():
        if layer is not None:  # the head begins with a dropout
            layers = layer if isinstance(layer, nn.Sequential) else [layer]
            clip.heads[side].load_state_dict(nn.Sequential(nn.Identity(), *layers).state_dict())
    clip.logit_scale.fill_(parts.logit_scale.item())
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
