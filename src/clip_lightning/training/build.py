"""Builds the model that `--model.*` describes: towers with new heads, or a trained model to continue."""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, is_dataclass
from typing import Any

from clip_lightning.errors import UserError, check_option
from clip_lightning.model.clip import CLIP, Freeze, HeadKind
from clip_lightning.model.lora import LoRAConfig
from clip_lightning.training.gradcache import training_norms
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


@dataclass(frozen=True)
class TeacherOptions:
    """Options of the teacher, whose similarities a model also learns from.

    Args:
        weight: weight of the teacher's loss, which is added to the contrastive loss.
        temperature: temperature of the softmax over the teacher's similarities; by default the one that the
            teacher was trained with.
    """

    weight: float = 1.0
    temperature: float | None = None

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            option = f"model.teacher_options.{name}"
            check_option(option, value, value is None or 0 < value < math.inf, "a number greater than 0")


def build(
    image_tower: str | None,
    text_tower: str | None,
    init_from: str | None,
    *,
    towers: TowerOptions,
    heads: HeadOptions,
    loss: ContrastiveLoss,
) -> CLIP:
    """Build the model from the names of two towers, or load a trained model that the options match."""
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
    size = clip.transform.size
    for option, given, own in (
        ("model.image_tower", image_tower, clip.image_tower.spec["name"]),
        ("model.text_tower", text_tower, clip.text_tower.spec["name"]),
        ("model.towers.image_size", towers.image_size, size[0] if size[0] == size[1] else size),
        ("model.towers.max_length", towers.max_length, clip.tokenize.max_length),
    ):
        if given is not None and given != own:
            raise UserError(
                f"--{option} {given} contradicts --model.init_from {init_from}, which has {own}; "
                "remove the option"
            )
    if (clip.bias is None) != (loss.init_bias is None):
        trained, right = ("without", "InfoNCE") if clip.bias is None else ("with", "SigLIP")
        raise UserError(
            f"--model.init_from {init_from} was trained {trained} a bias; set --model.loss {right}"
        )
    return clip


def prepare_towers(
    clip: CLIP, freeze: Freeze, lora: LoRAConfig | None, towers: TowerOptions, optimizer: OptimizerConfig
) -> None:
    """Freeze what is not trained, and apply the options to the trained towers."""
    clip.freeze(freeze)
    if towers.fix_statistics:
        clip.image_tower.fix_statistics()
    if lora is not None:
        clip.add_lora(lora)
    freeze_lower_layers(clip, optimizer)
    for tower in (clip.image_tower, clip.text_tower):
        if towers.activation_checkpointing and not tower.frozen:
            tower.checkpoint_activations()
        if towers.compile and not tower.frozen:
            tower.compile_backbone()


def checked_prefixes(prefixes: list[int] | None, clip: CLIP) -> list[int]:
    """Return the given widths in ascending order; they must differ and be below that of the embeddings."""
    checked = sorted({*(prefixes or [])})
    is_valid = len(checked) == len(prefixes or []) and all(0 < dims < clip.dims for dims in checked)
    expected = f"different numbers from 1 to {clip.dims - 1}, below the width of the embeddings"
    check_option("model.matryoshka", prefixes, is_valid, expected)
    return checked


def check_batch_norms(clip: CLIP, batch_size: int, micro_batch_size: int | str | None) -> None:
    """Reject batch sizes that leave a single image for the batch norms of the image tower."""
    size = micro_batch_size if isinstance(micro_batch_size, int) else max(batch_size, 2)
    if training_norms(clip.image_tower) and (size == 1 or batch_size % size == 1):
        raise UserError(
            f"--data.batch_size {batch_size} and --model.micro_batch_size {micro_batch_size or 'null'} leave "
            f"a single image for the batch norms of {clip.image_tower.spec['name']!r}; choose others, or set "
            "--model.towers.fix_statistics true"
        )


def plain_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of a module in the form of a configuration file, for checkpoints and loggers."""
    plain = {
        # JSON makes tuples lists
        name: json.loads(json.dumps(asdict(value))) if is_dataclass(value) else value  # type: ignore[arg-type]
        for name, value in options.items()
    }
    if isinstance(loss := plain.get("loss"), ContrastiveLoss):
        names = inspect.signature(type(loss)).parameters
        arguments = {name: getattr(loss, name) for name in names if hasattr(loss, name)}
        path = f"{type(loss).__module__}.{type(loss).__qualname__}"
        plain["loss"] = {"class_path": path, "init_args": arguments}
    return plain
