"""LoRA: small trainable matrices beside the frozen layers of a tower, with PEFT (Hu et al. 2022).

An adapted layer returns `layer(x) + alpha / rank · B(A(x))`. B is initialized with zeros, so that training
starts from the output of the tower without adapters.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook
from transformers.pytorch_utils import Conv1D

from clip_lightning.errors import UserError
from clip_lightning.model.towers import ImageTower, TextTower
from clip_lightning.model.towers.base import optional_module


@dataclass(frozen=True)
class LoRAConfig:
    """Configuration of the adapters; the weights of adapted towers are frozen, regardless of `freeze`.

    Args:
        towers: towers that get adapters. Their learning rates are `optimizer.image_lr` and
            `optimizer.text_lr`, whose defaults are meant for complete towers.
        rank: rank of the matrices that the adapters add to the weights.
        alpha: scale of the adapters, whose output is multiplied by alpha / rank.
        dropout: fraction of an adapter's input that is dropped in training.
        layers: endings of the names of the layers to adapt, such as `[query, value]`; by default, all linear
            layers and all convolutions without groups or dilation.
    """

    towers: Literal["image", "text", "both"] = "text"
    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    layers: list[str] | None = None


def add_lora(towers: Mapping[str, ImageTower | TextTower], config: LoRAConfig) -> None:
    """Freeze those of the towers `image` and `text` that `config` selects, and add trainable adapters."""
    rank, alpha, dropout = config.rank, config.alpha, config.dropout
    if not (rank >= 1 and alpha > 0 and 0 <= dropout < 1):
        raise UserError(
            f"lora.rank {rank}, alpha {alpha} and dropout {dropout}: expected a rank of 1 or more, an alpha "
            "above 0, and a dropout of at least 0 and below 1"
        )
    peft = optional_module("peft", "peft", "LoRA")
    chosen = [tower.freeze() for which, tower in towers.items() if config.towers in (which, "both")]
    adaptable = [_adaptable_layers(tower) for tower in chosen]
    names = [name for layers in adaptable for name in layers]
    endings = [f".{ending}" for ending in config.layers or ()] or [""]  # every name ends with ""
    selected = [[name for name in layers if f".{name}".endswith(tuple(endings))] for layers in adaptable]
    unknown = [ending for ending in endings if not any(f".{name}".endswith(ending) for name in names)]
    if unknown or not all(selected):
        last = sorted({name.rpartition(".")[2] for name in names})
        raise UserError(
            f"lora.layers {config.layers} does not fit lora.towers {config.towers}: each tower needs layers "
            f"that can be adapted, and their names end in {', '.join(last) or '(there are none)'}"
        )
    for tower, layers in zip(chosen, selected, strict=True):
        settings = peft.LoraConfig(
            r=rank,
            lora_alpha=alpha,
            lora_dropout=dropout,
            # a regular expression, because PEFT also matches names in a list as endings of other names
            target_modules="|".join(map(re.escape, layers)),
        )
        peft.inject_adapter_in_model(settings, tower.backbone)
        tower.frozen, tower.adapted = False, True


def merged_state(model: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Merge the adapters in a state dict of the model into the weights; the model is not changed."""
    merged = dict(state)
    if not any(".lora_" in name for name in state):
        return merged
    from peft.tuners.lora import LoraLayer

    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            layer: Any = copy.deepcopy(module)
            layer.load_state_dict({key: merged.pop(f"{name}.{key}") for key in layer.state_dict()})
            layer.merge()
            merged |= {f"{name}.{key}": value for key, value in layer.get_base_layer().state_dict().items()}
    return merged


def _adaptable_layers(tower: Any) -> list[str]:
    """Return the names of the layers in the backbone that can be adapted.

    Some models use the weight of a layer without calling it, so that an adapter would have no effect.
    """
    called: set[nn.Module] = set()
    is_image = isinstance(tower, ImageTower)
    inputs = [torch.zeros(1, 3, *tower.transform.size)] if is_image else tower.tokenize(["a"]).values()
    with register_module_forward_hook(lambda layer, *_: called.add(layer)), torch.no_grad():
        tower(*inputs)
    layers = tower.backbone.named_modules()
    return sorted(name for name, layer in layers if layer in called and _is_plain(layer))


def _is_plain(layer: Any) -> bool:
    """Return whether PEFT's adapter of a layer is exact and can be merged.

    Subclasses may standardize their weights or pad dynamically, and PEFT ignores dilation and padding modes.
    """
    if type(layer) in (nn.Conv1d, nn.Conv2d):
        return layer.groups == 1 and set(layer.dilation) == {1} and layer.padding_mode == "zeros"
    return type(layer) in (nn.Linear, Conv1D)
