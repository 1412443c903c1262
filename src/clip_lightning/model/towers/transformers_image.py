"""The vision model of a transformers CLIP, behaving like a timm model without its classifier.

B pictures, H, W pixels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel

from clip_lightning.model.towers.base import numbered_layers, own_values


class TransformersImage(nn.Module):
    """The pooled output of a vision model of transformers, before the projection."""

    ARCHITECTURE = "transformers"
    """Name in an image tower's spec; its arguments are the vision model's configuration."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Features (B, width) of normalised `pixel_values` (B, 3, H, W)."""
        return self.model(pixel_values=pixel_values).pooler_output

    def group_matcher(self, coarse: bool = False) -> Callable[[str], int]:
        """A parameter's layer, for timm's `group_parameters`."""
        return numbered_layers(name for name, _ in self.named_parameters()).__getitem__

    @classmethod
    def from_config(cls, arguments: dict[str, Any]) -> Self:
        """The architecture with fresh weights in fp32, whatever precision its own weights were saved in."""
        values = own_values(arguments)
        config = AutoConfig.for_model(values.pop("model_type"), **values)
        return cls(AutoModel.from_config(config, dtype=torch.float32))
