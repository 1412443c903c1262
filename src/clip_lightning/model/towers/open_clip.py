"""open_clip's towers without projections, and the way it cleans texts; for the package open_clip_torch.

B pictures, N texts, H, W pixels, L tokens.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable
from functools import cache
from typing import Any, Self

from timm.models import group_parameters
from torch import Tensor, nn

from clip_lightning.errors import UserError
from clip_lightning.model.towers.base import numbered_layers

WORDS = "+words"


def open_clip_package(part: str = "open_clip") -> Any:
    """The package, or a module of it.

    Raises:
        UserError: it is not installed.
    """
    try:
        return importlib.import_module(part)
    except ModuleNotFoundError as error:
        raise UserError(
            "an open_clip model needs the package open_clip_torch; pip install open_clip_torch"
        ) from error


def clean_text(text: str, way: str) -> str:
    """What open_clip makes of a text before it looks for tokens.

    Args:
        text: as it was written.
        way: open_clip's name (`lower`, `whitespace`, `canonicalize`); with `+words` behind it, the text
            is also split into words, with blanks between them, as its own tokenizer does. Which characters
            are letters changes with the version of Unicode, which is another one in other tokenizers.
    """
    tokenizer = open_clip_package("open_clip.tokenizer")
    cleaned: str = tokenizer.get_clean_fn(way.removesuffix(WORDS))(text)
    return " ".join(_word_pattern().findall(cleaned)) if way.endswith(WORDS) else cleaned


@cache
def _word_pattern() -> Any:
    return open_clip_package("open_clip.tokenizer").SimpleTokenizer().pat


class OpenCLIPImage(nn.Module):
    """open_clip's image tower (its own ViT or ResNet, or timm's), behaving like a timm model."""

    ARCHITECTURE = "open_clip"
    """Name in an image tower's spec; its arguments are those of open_clip's models."""

    def __init__(self, visual: Any) -> None:
        super().__init__()
        self.visual = visual

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Features (B, width) of normalised `pixel_values` (B, 3, H, W)."""
        return self.visual(pixel_values)

    def group_matcher(self, coarse: bool = False) -> Callable[[str], int]:
        """A parameter's layer, for timm's `group_parameters`."""
        names = [name for name, _ in self.named_parameters()]
        trunk = getattr(self.visual, "trunk", None)
        if trunk is None:
            # the stages of open_clip's ResNet are numbered without a dot: layer1.0.conv1
            as_numbers = {name: re.sub(r"\blayer(\d)\.\d+\.", r"layer.\1.", name) for name in names}
            layers = numbered_layers(as_numbers.values())
            return lambda name: layers[as_numbers[name]]
        groups = group_parameters(trunk, trunk.group_matcher(coarse=False))
        inside = {f"visual.trunk.{name}": layer for layer, those in groups.items() for name in those}
        return lambda name: inside.get(name, max(groups))

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """As timm's models have it."""
        self.visual.set_grad_checkpointing(enable)

    def take_projection(self) -> nn.Linear | None:
        """Take the linear projection off, so that features come before it; None where there is none."""
        visual = self.visual
        if isinstance(getattr(visual, "proj", None), nn.Parameter):
            projection: nn.Linear | None = _linear(visual.proj)
            visual.proj = None
            return projection
        projection = getattr(getattr(visual, "head", None), "proj", None)
        if projection is not None:
            visual.head.proj = nn.Identity()
        return projection

    @classmethod
    def from_config(cls, arguments: dict[str, Any]) -> Self:
        """The architecture with fresh weights, without its projection."""
        build = open_clip_package("open_clip.model")._build_vision_tower
        tower = cls(build(arguments["embed_dim"], arguments["vision_cfg"], arguments["quick_gelu"]))
        tower.take_projection()
        return tower


class OpenCLIPText(nn.Module):
    """open_clip's own text transformer."""

    ARCHITECTURE = "open_clip"
    """`model_type` in the configuration of a text tower; the rest is what open_clip's models take."""

    def __init__(self, text: Any) -> None:
        super().__init__()
        self.text = text
        # A causal one has a mask for its longest text, and open_clip pads them all to it.
        text.transformer.register_forward_pre_hook(_shorten_mask, with_kwargs=True)

    @property
    def width(self) -> int:
        """Of the features."""
        return int(self.text.width)

    @property
    def reads_padding(self) -> bool:
        """Whether what follows a text's end changes its features."""
        return self.text.attn_mask is None or self.text.pool_type not in ("argmax", "eos")

    def forward(self, input_ids: Tensor) -> Tensor:
        """Features (N, width) of tokens (N, L)."""
        return self.text(input_ids)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """As timm's models have it."""
        self.text.set_grad_checkpointing(enable)

    def take_projection(self) -> nn.Linear | None:
        """Take the projection off, so that features come before it; None where there is none."""
        projection = self.text.text_projection
        self.text.text_projection = None
        return _linear(projection) if isinstance(projection, nn.Parameter) else projection

    @classmethod
    def from_config(cls, arguments: dict[str, Any]) -> Self:
        """The architecture with fresh weights, without its projection."""
        build = open_clip_package("open_clip.model")._build_text_tower
        tower = cls(build(arguments["embed_dim"], arguments["text_cfg"], arguments["quick_gelu"]))
        tower.take_projection()
        return tower


def _linear(matrix: nn.Parameter) -> nn.Linear:
    """The layer that multiplies with this (width, embed_dim) matrix."""
    layer = nn.Linear(matrix.shape[0], matrix.shape[1], bias=False)
    layer.weight = nn.Parameter(matrix.detach().T.contiguous())
    return layer


def _shorten_mask(module: nn.Module, inputs: tuple[Tensor], options: dict[str, Any]) -> Any:
    mask, length = options.get("attn_mask"), inputs[0].shape[1]
    if mask is not None:
        options["attn_mask"] = mask[..., :length, :length]
    return inputs, options
