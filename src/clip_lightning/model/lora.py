"""LoRA: small trainable matrices beside the fixed layers of a tower, through PEFT (Hu et al. 2022).

An adapted layer gives `layer(x) + alpha / rank · B(A(x))`; B starts at zero, so training starts from what the
tower gives without adapters.
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
    """Adapters in towers whose own weights stay as they are, whatever `freeze` says of them.

    Args:
        towers: that get adapters. Their rates are `optimizer.image_lr` and `optimizer.text_lr`, whose
            defaults are meant for whole towers.
        rank: of the matrix that an adapter adds to its layer's.
        alpha: what an adapter adds is multiplied by alpha / rank.
        dropout: share of an adapter's input that is dropped in training.
        layers: ends of the names of the layers that get one, as `[query, value]`; by default all linear
            layers and all convolutions without groups or dilation.
    """

    towers: Literal["image", "text", "both"] = "text"
    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    layers: list[str] | None = None

    def __post_init__(self) -> None:
        """Take one name for a list of one."""
        if isinstance(self.layers, str):
            object.__setattr__(self, "layers", [self.layers])  # type: ignore[unreachable]

    def check(self) -> None:
        """Check the ranges; not at construction, where jsonargparse would hide the message.

        Raises:
            UserError: names the option.
        """
        if self.rank < 1:
            raise UserError(f"--model.lora.rank {self.rank}: expected 1 or more")
        if self.alpha <= 0:
            raise UserError(f"--model.lora.alpha {self.alpha}: expected more than 0")
        if not 0 <= self.dropout < 1:
            raise UserError(f"--model.lora.dropout {self.dropout}: expected at least 0 and below 1")


def add_lora(towers: Mapping[str, Tower], config: LoRAConfig) -> None:
    """Fix the weights of the towers that `config` chooses and put trainable adapters into them.

    Args:
        towers: `image` and `text`.
        config: which towers and layers, and how large the adapters are.

    Raises:
        UserError: PEFT is not installed, a number out of range, or a tower has no such layer.
    """
    config.check()
    try:
        import peft
    except ModuleNotFoundError as error:
        raise UserError("--model.lora needs the package peft; pip install peft, or leave LoRA out") from error
    chosen = {which: tower.freeze() for which, tower in towers.items() if config.towers in (which, "both")}
    adaptable = {which: _adaptable_layers(tower) for which, tower in chosen.items()}
    for end in config.layers or []:
        if not any(_ends(name, [end]) for names in adaptable.values() for name in names):
            raise UserError(f"--model.lora.layers: no layer to adapt ends in {end!r}; {_ends_of(adaptable)}")
    for which, tower in chosen.items():
        layers = [name for name in adaptable[which] if config.layers is None or _ends(name, config.layers)]
        if not layers:
            wanted = f" that ends in {' or '.join(config.layers)}" if config.layers else ""
            raise UserError(
                f"--model.lora.towers {config.towers}: {which} tower {tower.spec['name']!r} has no "
                f"linear layer or plain convolution{wanted}; {_ends_of({which: adaptable[which]})}"
            )
        settings = peft.LoraConfig(
            r=config.rank,
            lora_alpha=config.alpha,  # type: ignore[arg-type]  # only ever divided by the rank
            lora_dropout=config.dropout,
            # an expression: PEFT takes a name in a list for the end of others too
            target_modules="|".join(map(re.escape, layers)),
        )
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "fan_in_fan_out is set to False")  # it knows better for GPT-2
            peft.inject_adapter_in_model(settings, tower.backbone)
        tower.frozen, tower.adapted = False, True


def adapter_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What of a state dict belongs to adapters."""
    return {name: tensor for name, tensor in state.items() if ".lora_" in name}


def merged_state(model: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`state` with the adapters added to the weights beside them, under the names of a model without any.

    Args:
        model: has the adapters; it is left as it is.
        state: of that model, its present one or another.
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
    """Names of the backbone's layers that can have an adapter.

    A layer counts only if a forward pass calls it: some models take its weight and multiply by themselves, so
    that an adapter around it would never be asked.
    """
    called: set[str] = set()
    hooks = [
        layer.register_forward_hook(lambda *_, name=name: called.add(name))
        for name, layer in tower.backbone.named_modules()
        if _is_plain(layer)
    ]
    try:
        with torch.no_grad():
            tower(*_example(tower))
    finally:
        for hook in hooks:
            hook.remove()
    return sorted(called)


def _is_plain(layer: nn.Module) -> bool:
    """Whether PEFT's adapter of the layer is exact, and can be merged.

    Subclasses standardise their weights, or pad by their input; PEFT forgets dilation and kinds of padding.
    """
    if type(layer) not in (nn.Linear, nn.Conv1d, nn.Conv2d, Conv1D):
        return False
    if isinstance(layer, nn.Conv1d | nn.Conv2d):
        return layer.groups == 1 and set(layer.dilation) == {1} and layer.padding_mode == "zeros"
    return True


def _example(tower: Tower) -> tuple[Tensor, ...]:
    """The smallest input of a tower."""
    if isinstance(tower, ImageTower):
        return (torch.zeros(1, 3, *tower.transform.size),)
    assert isinstance(tower, TextTower)
    tokens = tower.tokenize(["a"])
    return tokens["input_ids"], tokens["attention_mask"]


def _ends(name: str, ends: list[str]) -> bool:
    """Whether `name` is one of `ends`, or ends in one at a dot."""
    return f".{name}".endswith(tuple(f".{end}" for end in ends))


def _ends_of(layers: Mapping[str, list[str]]) -> str:
    """The remedy: what --model.lora.layers can name."""
    ends = sorted({name.rpartition(".")[2] for names in layers.values() for name in names})
    return f"there are {', '.join(ends)}" if ends else "choose another tower, or leave LoRA out"
