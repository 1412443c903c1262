"""LoRA: small trainable matrices beside the frozen layers of a tower, with PEFT (Hu et al. 2022).

An adapted layer returns `layer(x) + alpha / rank · B(A(x))`. B is initialized with zeros, so that training
starts from the output of the tower without adapters.
"""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from clip_lightning.errors import UserError
from clip_lightning.model.towers import ImageTower, TextTower, Tower


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

    def __post_init__(self) -> None:
        """Accept a single name as a list."""
        if isinstance(self.layers, str):
            object.__setattr__(self, "layers", [self.layers])  # type: ignore[unreachable]

    def check(self) -> None:
        """Check the ranges; at construction, jsonargparse would hide the message.

        Raises:
            UserError: a value is out of its range.
        """
        for name, is_valid, expected in (
            ("rank", self.rank >= 1, "1 or more"),
            ("alpha", self.alpha > 0, "more than 0"),
            ("dropout", 0 <= self.dropout < 1, "at least 0 and below 1"),
        ):
            if not is_valid:
                raise UserError(f"lora.{name} {getattr(self, name)}: expected {expected}")


def add_lora(towers: Mapping[str, Tower], config: LoRAConfig) -> None:
    """Freeze the towers that `config` selects, and add trainable adapters to them.

    Args:
        towers: the towers by the names `image` and `text`.
        config: configuration of the adapters.

    Raises:
        UserError: PEFT is not installed, a number is out of range, or a tower has no such layer.
    """
    config.check()
    try:
        import peft
    except ModuleNotFoundError as error:
        raise UserError("LoRA needs the package peft; pip install peft, or leave LoRA out") from error
    chosen = {which: tower.freeze() for which, tower in towers.items() if config.towers in (which, "both")}
    adaptable = {which: _adaptable_layers(tower) for which, tower in chosen.items()}
    names = [name for layers in adaptable.values() for name in layers]
    for ending in config.layers or []:
        if not _with_endings(names, [ending]):
            raise UserError(f"lora.layers: no layer that can be adapted ends in {ending!r}; {_remedy(names)}")
    for which, tower in chosen.items():
        layers = _with_endings(adaptable[which], config.layers)
        if not layers:
            wanted = f" that ends in {' or '.join(config.layers)}" if config.layers else ""
            raise UserError(
                f"lora.towers {config.towers}: {which} tower {tower.spec['name']!r} has no linear layer or "
                f"plain convolution{wanted}; {_remedy(adaptable[which])}"
            )
        settings = peft.LoraConfig(
            r=config.rank,
            lora_alpha=config.alpha,  # type: ignore[arg-type]  # it is only divided by the rank
            lora_dropout=config.dropout,
            # a regular expression, because PEFT also matches names in a list as endings of other names
            target_modules="|".join(map(re.escape, layers)),
        )
        with warnings.catch_warnings():
            warnings.filterwarnings(
                "ignore", "fan_in_fan_out is set to False"
            )  # PEFT corrects this for GPT-2
            peft.inject_adapter_in_model(settings, tower.backbone)
        tower.frozen, tower.adapted = False, True


def adapter_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the part of a state dict that belongs to adapters."""
    return {name: tensor for name, tensor in state.items() if ".lora_" in name}


def merged_state(model: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Merge the adapters in a state dict into the weights, with the names of a model without adapters.

    Args:
        model: model with adapters, which is not changed.
        state: current or other state dict of that model.
    """
    from peft.tuners.lora import LoraLayer

    merged = dict(state)
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            layer: Any = copy.deepcopy(module)
            layer.load_state_dict({key: merged.pop(f"{name}.{key}") for key in layer.state_dict()})
            layer.merge()
            merged |= {f"{name}.{key}": value for key, value in layer.get_base_layer().state_dict().items()}
    return merged


def _adaptable_layers(tower: Tower) -> list[str]:
    """Return the names of the layers in the backbone that can be adapted.

    Only layers that are called in a forward pass are included: some models use the weight of a layer without
    calling it, so that an adapter would have no effect.
    """
    called: set[str] = set()
    hooks = [
        layer.register_forward_hook(lambda *_, name=name: called.add(name))
        for name, layer in tower.backbone.named_modules()
        if _is_plain(layer)
    ]
    try:
        with torch.no_grad():
            if isinstance(tower, ImageTower):
                tower(torch.zeros(1, 3, *tower.transform.size))
            elif isinstance(tower, TextTower):
                tower(**tower.tokenize(["a"]))
    finally:
        for hook in hooks:
            hook.remove()
    return sorted(called)


def _is_plain(layer: nn.Module) -> bool:
    """Return whether PEFT's adapter of a layer is exact and can be merged.

    Subclasses may standardize their weights or pad dynamically, and PEFT ignores dilation and padding modes.
    """
    if type(layer) not in (nn.Linear, nn.Conv1d, nn.Conv2d, Conv1D):
        return False
    if isinstance(layer, nn.Conv1d | nn.Conv2d):
        return layer.groups == 1 and set(layer.dilation) == {1} and layer.padding_mode == "zeros"
    return True


def _with_endings(names: list[str], endings: list[str] | None) -> list[str]:
    """Return the names with one of the endings, which start at a dot; all names if `endings` is None."""
    if endings is None:
        return names
    return [name for name in names if f".{name}".endswith(tuple(f".{ending}" for ending in endings))]


def _remedy(layers: list[str]) -> str:
    endings = sorted({name.rpartition(".")[2] for name in layers})
    return f"expected one of {', '.join(endings)}" if endings else "choose another tower, or leave LoRA out"
