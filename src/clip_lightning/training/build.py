"""Builds the model that `--model.*` describes: towers with new heads, or a trained model to continue."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import asdict, dataclass, is_dataclass
from typing import Any

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from clip_lightning.errors import UserError
from clip_lightning.model.clip import CLIP, Freeze, HeadKind
from clip_lightning.model.lora import LoRAConfig
from clip_lightning.training.gradcache import statistics_kept, training_norms
from clip_lightning.training.losses import ContrastiveLoss
from clip_lightning.training.optim import OptimizerConfig, freeze_lower_layers


@dataclass(frozen=True)
class HeadOptions:
    """Options of the heads, which project the towers' features into the shared embedding space.

    Args:
        embed_dim: width of the shared embedding space.
        kind: `linear`, or `mlp` with one residual block.
        dropout: fraction of the features (linear) or hidden units (mlp) that are dropped in training.
    """

    embed_dim: int = 512
    kind: HeadKind = "linear"
    dropout: float = 0.0


@dataclass(frozen=True)
class TowerOptions:
    """Options of the towers: the size of their inputs, and how trained towers run.

    Args:
        image_size: side of the square input in pixels; by default the size the image tower was trained on.
        max_length: maximum number of tokens of a text; by default 77, or the text tower's limit if that is
            lower.
        fix_statistics: whether the batch norms of a trained image tower use their pretrained statistics in
            training and leave them unchanged.
        activation_checkpointing: whether trained towers store only the inputs of their layers and recompute
            the activations in the backward pass, which saves memory and takes a third more time.
        compile: whether to compile trained towers with torch.compile, which takes a minute or two at the
            start.
    """

    image_size: int | None = None
    max_length: int | None = None
    fix_statistics: bool = False
    activation_checkpointing: bool = False
    compile: bool = False


def build(
    image_tower: str | None,
    text_tower: str | None,
    init_from: str | None,
    *,
    towers: TowerOptions,
    heads: HeadOptions,
    loss: ContrastiveLoss,
) -> CLIP:
    """Build the model from the names of two towers, or load a trained model.

    Raises:
        UserError: a tower or a model cannot be found or read, or an option contradicts the trained model.
    """
    if init_from is None:
        if image_tower is None or text_tower is None:
            raise UserError(
                "the model has no towers: set image_tower and text_tower (--model.image_tower, "
                "--model.text_tower), or init_from"
            )
        return CLIP.from_towers(
            image_tower,
            text_tower,
            image_size=towers.image_size,
            max_length=towers.max_length,
            embed_dim=heads.embed_dim,
            head=heads.kind,
            dropout=heads.dropout,
            init_scale=loss.init_scale,
            init_bias=loss.init_bias,
        )
    clip = CLIP.from_pretrained(init_from).train()
    if (loss.init_bias is None) != (clip.logit_bias is None):
        had, remedy = ("without", "InfoNCE") if clip.logit_bias is None else ("with", "SigLIP")
        raise UserError(
            f"--model.init_from {init_from} was trained {had} a bias, which {type(loss).__name__} cannot "
            f"continue; set --model.loss {remedy}"
        )
    size = clip.transform.size
    options: dict[str, tuple[object, object]] = {
        "model.image_tower": (image_tower, clip.image_tower.spec["name"]),
        "model.text_tower": (text_tower, clip.text_tower.spec["name"]),
        "model.towers.image_size": (towers.image_size, size[0] if size[0] == size[1] else size),
        "model.towers.max_length": (towers.max_length, clip.tokenize.max_length),
    }
    for option, (given, own) in options.items():
        if given is not None and given != own:
            raise UserError(
                f"--{option} {given} contradicts --model.init_from {init_from}, which has {own}; "
                "remove the option"
            )
    return clip


def prepare_towers(
    clip: CLIP, freeze: Freeze, lora: LoRAConfig | None, towers: TowerOptions, optimizer: OptimizerConfig
) -> None:
    """Freeze what is not trained, and apply the options to the trained towers.

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
        rank_zero_warn(f"--model.towers.{option} has no effect, since both towers are frozen")
    for tower in trained:
        if towers.activation_checkpointing:
            tower.checkpoint_activations()
        if towers.compile:
            tower.compile_backbone()


def check_batch_norms(clip: CLIP, batch_size: int, micro_batch_size: int | str | None) -> None:
    """Reject batch sizes that leave a batch norm of the image tower a single value per channel.

    A single image is enough if the feature maps of the last layers have more than one position.

    Raises:
        UserError: a batch norm would have a single value to normalize.
    """
    size = micro_batch_size if isinstance(micro_batch_size, int) else max(batch_size, 2)
    norms = training_norms(clip.image_tower)
    if not norms or (size > 1 and batch_size % size != 1):
        return
    image = torch.zeros(1, 3, *clip.transform.size, dtype=torch.uint8, device=clip.logit_scale.device)
    try:
        with torch.no_grad(), statistics_kept(norms):
            clip.image_tower(image)
    except ValueError as error:
        given = f"--model.micro_batch_size {micro_batch_size} with " if size == micro_batch_size else ""
        raise UserError(
            f"{given}--data.batch_size {batch_size} leaves a single image for the batch norms of "
            f"{clip.image_tower.spec['name']!r}; choose sizes that leave at least two, or set "
            "--model.towers.fix_statistics true"
        ) from error


def plain_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of a module in the form of a configuration file, for checkpoints and loggers."""

    def listed(items: list[tuple[str, Any]]) -> dict[str, Any]:
        return {name: list(value) if isinstance(value, tuple) else value for name, value in items}

    plain = {
        name: asdict(value, dict_factory=listed) if is_dataclass(value) else value  # type: ignore[arg-type]
        for name, value in options.items()
    }
    if isinstance(loss := plain.get("loss"), ContrastiveLoss):
        names = inspect.signature(type(loss)).parameters
        arguments = {name: getattr(loss, name) for name in names if hasattr(loss, name)}
        path = f"{type(loss).__module__}.{type(loss).__qualname__}"
        plain["loss"] = {"class_path": path, "init_args": arguments}
    return plain
