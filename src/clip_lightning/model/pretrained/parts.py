"""What a model of others is taken apart into."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from clip_lightning.model.towers import ImageTower, TextTower


@dataclass(frozen=True)
class Parts:
    """All that a `CLIP` is made of.

    Attributes:
        image_tower: gives features before the projection, where the model has one.
        text_tower: likewise.
        projections: for `image` and `text`: the model's own layer, None for none.
        embed_dim: width of the shared space.
        logit_scale: logarithm of the inverse temperature, one value of any shape.
        logit_bias: likewise; None for none.
    """

    image_tower: ImageTower
    text_tower: TextTower
    projections: Mapping[str, nn.Module | None]
    embed_dim: int
    logit_scale: Tensor
    logit_bias: Tensor | None

    @property
    def head(self) -> Any:
        """The kind of head that takes these projections: one for both, or one for each."""
        kinds = {side: _kind(layer) for side, layer in self.projections.items()}
        return "linear" if set(kinds.values()) == {"linear"} else kinds

    @property
    def heads(self) -> dict[str, Tensor]:
        """The projections' weights as the heads name them: behind the dropout."""
        behind = {
            side: nn.Sequential(nn.Identity(), *(layer if isinstance(layer, nn.Sequential) else [layer]))
            for side, layer in self.projections.items()
            if layer is not None
        }
        return nn.ModuleDict(behind).state_dict()


def _kind(layer: nn.Module | None) -> str:
    if layer is None:
        return "none"
    if isinstance(layer, nn.Linear):
        return "linear" if layer.bias is None else "affine"
    return "gelu"
