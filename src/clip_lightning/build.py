"""The model that a training starts from: two towers by name with fresh heads, or a bundle."""

from __future__ import annotations

from dataclasses import dataclass

from clip_lightning.errors import UserError
from clip_lightning.losses import ContrastiveLoss
from clip_lightning.model import CLIP, HeadKind
from clip_lightning.towers import ImageTower, TextTower


@dataclass(frozen=True)
class Heads:
    """What the projections of a new model are.

    Attributes:
        embed_dim: width of the shared embedding.
        kind: `linear`, or `mlp` with one residual block.
        dropout: share of features (linear) or hidden units (mlp) dropped in training.
    """

    embed_dim: int
    kind: HeadKind
    dropout: float


def build_from_names(
    image_tower: str | None,
    text_tower: str | None,
    *,
    heads: Heads,
    loss: ContrastiveLoss,
    image_size: int | None,
    max_length: int | None,
) -> CLIP:
    """Pretrained towers, fresh heads, and the scale and bias that the loss starts from.

    Raises:
        UserError: a name is missing or wrong, or a tower cannot have these sizes.
    """
    if image_tower is None or text_tower is None:
        raise UserError("no towers: give --model.image_tower and --model.text_tower, or --model.init_from")
    return CLIP(
        ImageTower.from_name(image_tower, image_size),
        TextTower.from_name(text_tower, max_length),
        embed_dim=heads.embed_dim,
        head=heads.kind,
        dropout=heads.dropout,
        init_scale=loss.init_scale,
        init_bias=loss.init_bias,
    )


def build_from_bundle(
    bundle: str,
    *,
    image_tower: str | None,
    text_tower: str | None,
    loss: ContrastiveLoss,
    image_size: int | None,
    max_length: int | None,
) -> CLIP:
    """A trained model to go on with.

    Raises:
        UserError: it cannot be read, or another option contradicts it.
    """
    clip = CLIP.from_pretrained(bundle).train()
    named = {"image_tower": (image_tower, clip.image_tower), "text_tower": (text_tower, clip.text_tower)}
    for option, (name, tower) in named.items():
        if name is not None and name != tower.spec["name"]:
            raise UserError(
                f"--model.{option} {name} is not the tower of --model.init_from {bundle}, which is "
                f"{tower.spec['name']}; leave the option out"
            )
    if (loss.init_bias is None) != (clip.logit_bias is None):
        raise UserError(
            f"--model.init_from {bundle} was trained {'with' if clip.logit_bias is not None else 'without'} "
            f"a bias and does not fit {type(loss).__name__}; choose another --model.loss"
        )
    if image_size is not None and clip.transform.size != (image_size, image_size):
        raise UserError(
            f"--data.image_size {image_size} is not that of --model.init_from {bundle}, which is "
            f"{clip.transform.size[0]}; leave the option out"
        )
    if max_length is not None and max_length != clip.tokenize.max_length:
        raise UserError(
            f"--model.max_length {max_length} is not that of --model.init_from {bundle}, which is "
            f"{clip.tokenize.max_length}; leave the option out"
        )
    return clip
