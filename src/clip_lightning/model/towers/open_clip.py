"""Towers of open_clip without their projections, and its cleaning of texts.

B images, N texts, H, W pixels, L tokens.
"""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor, nn

from clip_lightning.model.towers.base import optional_module

WORDS = "+words"


def open_clip_package(part: str = "open_clip") -> Any:
    """Import open_clip, or one of its modules."""
    return optional_module(part, "open_clip_torch", "this")


def clean_text(text: str, name: str) -> str:
    """Clean a text with a function of open_clip: `lower`, `whitespace` or `canonicalize`.

    With the suffix `+words`, the text is also split into words, separated by spaces, as by open_clip's own
    tokenizer: tokenizers differ in their version of Unicode, and so in which characters are letters.
    """
    tokenizer = open_clip_package("open_clip.tokenizer")
    cleaned: str = tokenizer.get_clean_fn(name.removesuffix(WORDS))(text)
    return " ".join(tokenizer._tokenizer.pat.findall(cleaned)) if name.endswith(WORDS) else cleaned


def take_projection(tower: Any) -> nn.Linear | None:
    """Remove and return the linear projection of an image or text tower of open_clip, if there is one."""
    head = getattr(tower, "head", None)  # of a timm model
    for owner, name in (tower, "proj"), (tower, "text_projection"), (head, "proj"):
        if (projection := getattr(owner, name, None)) is not None:
            setattr(owner, name, None if owner is tower else nn.Identity())
            if isinstance(projection, nn.Parameter):  # a matrix (width, embed_dim)
                layer = nn.Linear(projection.shape[0], projection.shape[1], bias=False)
                layer.weight = nn.Parameter(projection.detach().T.contiguous())
                return layer
            return projection
    return None


def build_tower(side: Literal["vision", "text"], arguments: dict[str, Any]) -> Any:
    """Build a tower of open_clip with random weights and without its projection."""
    build = getattr(open_clip_package("open_clip.model"), f"_build_{side}_tower")
    tower = build(arguments["embed_dim"], arguments[f"{side}_cfg"], arguments["quick_gelu"])
    take_projection(tower)
    return tower


class OpenCLIPImage(nn.Module):
    """An image tower of open_clip without its projection: its own ViT or ResNet, or a timm model."""

    ARCHITECTURE = "open_clip"  # in a spec, whose arguments are those of open_clip's models

    def __init__(self, visual: Any) -> None:
        super().__init__()
        self.visual = visual

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Return features (B, width) of normalized `pixel_values` (B, 3, H, W)."""
        return self.visual(pixel_values)


class OpenCLIPText(nn.Module):
    """The text transformer of open_clip without its projection."""

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


def _shorten_mask(module: nn.Module, inputs: tuple[Tensor], options: dict[str, Any]) -> Any:
    if (mask := options.get("attn_mask")) is not None:
        options["attn_mask"] = mask[..., : inputs[0].shape[1], : inputs[0].shape[1]]
    return inputs, options
