"""Towers of open_clip without their projections, and its cleaning of texts.

B images, N texts, H, W pixels, L tokens.
"""

from __future__ import annotations

import importlib
from functools import cache
from typing import Any, Self

from torch import Tensor, nn

from clip_lightning.errors import UserError

WORDS = "+words"


def open_clip_package(part: str = "open_clip") -> Any:
    """Import open_clip, or one of its modules."""
    try:
        return importlib.import_module(part)
    except ModuleNotFoundError as error:
        raise UserError("this needs the package open_clip_torch; pip install open_clip_torch") from error


def clean_text(text: str, name: str) -> str:
    """Clean a text as open_clip does before it is tokenized.

    Args:
        text: the text.
        name: function of open_clip: `lower`, `whitespace` or `canonicalize`. With the suffix `+words`, the
            text is also split into words, separated by spaces, as open_clip's own tokenizer does: tokenizers
            differ in their version of Unicode, and so in which characters are letters.
    """
    tokenizer = open_clip_package("open_clip.tokenizer")
    cleaned: str = tokenizer.get_clean_fn(name.removesuffix(WORDS))(text)
    return " ".join(_word_pattern().findall(cleaned)) if name.endswith(WORDS) else cleaned


@cache
def _word_pattern() -> Any:
    return open_clip_package("open_clip.tokenizer").SimpleTokenizer().pat


class OpenCLIPImage(nn.Module):
    """An image tower of open_clip: its own ViT or ResNet, or a timm model."""

    ARCHITECTURE = "open_clip"  # in a spec, whose arguments are those of open_clip's models

    def __init__(self, visual: Any) -> None:
        super().__init__()
        self.visual = visual

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Return features (B, width) of normalized `pixel_values` (B, 3, H, W)."""
        return self.visual(pixel_values)

    def take_projection(self) -> nn.Linear | None:
        """Remove and return the linear projection, if there is one."""
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
        """Build the architecture with random weights, without its projection."""
        build = open_clip_package("open_clip.model")._build_vision_tower
        tower = cls(build(arguments["embed_dim"], arguments["vision_cfg"], arguments["quick_gelu"]))
        tower.take_projection()
        return tower


class OpenCLIPText(nn.Module):
    """The text transformer of open_clip."""

    ARCHITECTURE = "open_clip"  # the `model_type` in a spec, whose other values are those of open_clip

    def __init__(self, text: Any) -> None:
        super().__init__()
        self.text = text
        self.width = int(text.width)
        # A causal transformer has a mask for the maximum length, to which open_clip pads all texts.
        text.transformer.register_forward_pre_hook(_shorten_mask, with_kwargs=True)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Return features (N, width) of tokens (N, L); the attention mask is not used."""
        return self.text(input_ids)

    def take_projection(self) -> nn.Linear | None:
        """Remove and return the projection, if there is one."""
        projection = self.text.text_projection
        self.text.text_projection = None
        return _linear(projection) if isinstance(projection, nn.Parameter) else projection

    @classmethod
    def from_config(cls, arguments: dict[str, Any]) -> Self:
        """Build the architecture with random weights, without its projection."""
        build = open_clip_package("open_clip.model")._build_text_tower
        tower = cls(build(arguments["embed_dim"], arguments["text_cfg"], arguments["quick_gelu"]))
        tower.take_projection()
        return tower


def _linear(matrix: nn.Parameter) -> nn.Linear:
    """Return the linear layer that multiplies by a matrix (width, embed_dim)."""
    layer = nn.Linear(matrix.shape[0], matrix.shape[1], bias=False)
    layer.weight = nn.Parameter(matrix.detach().T.contiguous())
    return layer


def _shorten_mask(module: nn.Module, inputs: tuple[Tensor], options: dict[str, Any]) -> Any:
    mask, length = options.get("attn_mask"), inputs[0].shape[1]
    if mask is not None:
        options["attn_mask"] = mask[..., :length, :length]
    return inputs, options
