"""`--model.init_from`: a model to go on training, and options that would contradict it."""

from __future__ import annotations

from clip_lightning.errors import UserError
from clip_lightning.model.clip import CLIP
from clip_lightning.training.losses import ContrastiveLoss


def load_to_train(
    bundle: str,
    *,
    image_tower: str | None,
    text_tower: str | None,
    loss: ContrastiveLoss,
    image_size: int | None,
    max_length: int | None,
) -> CLIP:
    """A trained model to go on with: a bundle, or one of transformers or open_clip.

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
        had, remedy = (
            ("without", "InfoNCE") if clip.logit_bias is None else ("with", "SigLIP, the sigmoid loss")
        )
        raise UserError(
            f"--model.init_from {bundle} was trained {had} a bias and does not fit {type(loss).__name__}; "
            f"give --model.loss {remedy}"
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
