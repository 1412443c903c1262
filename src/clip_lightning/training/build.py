"""The model that `--model.*` describes: towers with fresh heads, or a trained model, ready for training."""

from __future__ import annotations

from dataclasses import dataclass

from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from clip_lightning.errors import UserError
from clip_lightning.model.clip import CLIP, Freeze, HeadKind
from clip_lightning.model.lora import LoRAConfig
from clip_lightning.model.towers import ImageTower, TextTower
from clip_lightning.training.losses import ContrastiveLoss
from clip_lightning.training.optim import OptimizerConfig, freeze_lower_layers


@dataclass(frozen=True)
class HeadOptions:
    """Projections from the towers' features into the shared space.

    Args:
        embed_dim: width of the shared embedding.
        kind: `linear`, or `mlp` with one residual block.
        dropout: fraction of features (linear) or hidden units (mlp) dropped in training.
    """

    embed_dim: int = 512
    kind: HeadKind = "linear"
    dropout: float = 0.0


@dataclass(frozen=True)
class TowerOptions:
    """What the towers accept, and how those run that are trained.

    Args:
        max_length: longest text in tokens; 77 by default, or the text tower's limit if that is less.
        fix_statistics: whether batch norms of a trained image tower keep the statistics that they came
            with, and use them in training too; for pretrained towers.
        activation_checkpointing: whether trained towers keep only the inputs of their layers and run each
            once more in the backward pass: less memory, a third more time.
        compile: whether trained towers go through torch.compile, a minute or two at the start.
    """

    max_length: int | None = None
    fix_statistics: bool = False
    activation_checkpointing: bool = False
    compile: bool = False


def build(
    image_tower: str | None,
    text_tower: str | None,
    init_from: str | None,
    *,
    heads: HeadOptions,
    loss: ContrastiveLoss,
    image_size: int | None,
    max_length: int | None,
) -> CLIP:
    """Build the model from towers by name, or load a trained one.

    Raises:
        UserError: a tower or a model is missing or cannot be read, or an option contradicts the model.
    """
    if init_from is not None:
        clip = CLIP.from_pretrained(init_from).train()
        _check_options(clip, init_from, image_tower, text_tower, loss, image_size, max_length)
        return clip
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


def _check_options(
    clip: CLIP,
    init_from: str,
    image_tower: str | None,
    text_tower: str | None,
    loss: ContrastiveLoss,
    image_size: int | None,
    max_length: int | None,
) -> None:
    if (loss.init_bias is None) != (clip.logit_bias is None):
        had, remedy = ("without", "InfoNCE") if clip.logit_bias is None else ("with", "SigLIP")
        raise UserError(
            f"--model.init_from {init_from} was trained {had} a bias and does not fit {type(loss).__name__}; "
            f"give --model.loss {remedy}"
        )
    size = clip.transform.size
    options: dict[str, tuple[object, object]] = {
        "model.image_tower": (image_tower, clip.image_tower.spec["name"]),
        "model.text_tower": (text_tower, clip.text_tower.spec["name"]),
        "data.image_size": (image_size, size[0] if size[0] == size[1] else size),
        "model.towers.max_length": (max_length, clip.tokenize.max_length),
    }
    for option, (given, own) in options.items():
        if given is not None and given != own:
            raise UserError(
                f"--{option} {given} is not that of --model.init_from {init_from}, which is {own}; "
                "leave the option out"
            )


def prepare_towers(
    clip: CLIP, freeze: Freeze, lora: LoRAConfig | None, towers: TowerOptions, optimizer: OptimizerConfig
) -> None:
    """Fix what is not trained, and have what is trained run as the options say.

    Raises:
        UserError: a tower does not support an option.
    """
    clip.freeze(freeze)
    if towers.fix_statistics:
        clip.image_tower.fix_statistics()
    if lora is not None:
        clip.add_lora(lora)
    freeze_lower_layers(clip, optimizer)
    trained = [tower for tower in (clip.image_tower, clip.text_tower) if not tower.frozen]
    if not trained and (towers.activation_checkpointing or towers.compile):
        option = "activation_checkpointing" if towers.activation_checkpointing else "compile"
        rank_zero_warn(f"--model.towers.{option} does nothing: it is for towers that are trained")
    for tower in trained:
        if towers.activation_checkpointing:
            tower.checkpoint_activations()
        if towers.compile:
            tower.compile_backbone()
