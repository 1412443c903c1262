"""The base class of both towers, and helpers that they share."""

from __future__ import annotations

import importlib
import itertools
import json
import re
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Self

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from clip_lightning.digest import weights_digest
from clip_lightning.errors import UserError

OWN = "module of one's own"
"""The architecture in the spec of a custom module, which a bundle cannot rebuild."""


class Tower(nn.Module):
    """A backbone that can be frozen: it then runs without gradients and always in eval mode.

    Attributes:
        frozen: whether no part of the tower is trained.
        adapted: whether only LoRA adapters are trained (`lora.py`).
        fixed_statistics: whether batch norms use their running statistics in training, too.
    """

    width: int
    spec: dict[str, Any]
    backbone: nn.Module
    frozen = False
    adapted = False
    fixed_statistics = False
    _frozen_digest: str | None = None

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return next(itertools.chain(self.parameters(), self.buffers())).device

    def freeze(self) -> Self:
        """Freeze the weights, and disable dropout and updates of batch-norm statistics."""
        self.requires_grad_(False)
        self.frozen = True
        self._frozen_digest = None
        return self.eval()

    def train(self, mode: bool = True) -> Self:
        """Set training mode; frozen towers and batch norms with frozen weights stay in eval mode."""
        super().train(mode and not self.frozen)
        fixed = self.adapted or self.fixed_statistics
        for module in self.modules():
            if isinstance(module, _BatchNorm) and (
                fixed or (module.weight is not None and not module.weight.requires_grad)
            ):
                module.eval()
        return self

    def fix_statistics(self) -> None:
        """Make batch norms keep their running statistics, and normalize with them in training, too."""
        self.fixed_statistics = True
        self.train(self.training)

    def layers(self) -> dict[str, int]:
        """Return the layer of each parameter, counted from 0 at the input."""
        raise NotImplementedError

    def compile_backbone(self) -> None:
        """Compile the backbone; if compilation fails, a warning is issued and it runs uncompiled."""
        self.backbone.compile()

    def checkpoint_activations(self) -> None:
        """Store only the inputs of each layer in training, and recompute the rest in the backward pass."""
        option = "--model.towers.activation_checkpointing"
        if any(isinstance(module, _BatchNorm) and module.training for module in self.modules()):
            raise UserError(
                f"{option} would update the batch-norm statistics of {self.spec['name']!r} twice per batch; "
                "give --model.towers.fix_statistics true as well, or --model.micro_batch_size N instead"
            )
        try:
            self._checkpoint_layers()
        except (AssertionError, AttributeError, NotImplementedError, TypeError, ValueError) as error:
            raise UserError(
                f"{option} is not supported by {self.spec['name']!r}; leave it out, or give "
                "--model.micro_batch_size N instead"
            ) from error

    def _checkpoint_layers(self) -> None:
        raise NotImplementedError

    def run_backbone(self, *args: Any, **kwargs: Any) -> Any:
        """Run the backbone, without torch.compile if that fails."""
        try:
            return self.backbone(*args, **kwargs)
        except torch._dynamo.exc.TorchDynamoException as error:
            self.backbone._compiled_call_impl = None  # undoes compile()
            warnings.warn(
                f"--model.towers.compile: torch.compile failed for the {type(self).__name__}, which now runs "
                f"uncompiled: {first_line(error)}",
                stacklevel=2,
            )
            return self.backbone(*args, **kwargs)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        """Forget the digest whenever weights are loaded; torch calls this for every module."""
        self._frozen_digest = None
        super()._load_from_state_dict(*args, **kwargs)

    def digest(self) -> str:
        """Return SHA-256 (hex) of the names and values of all weights and buffers, without adapters."""
        if (self.frozen or self.adapted) and self._frozen_digest is not None:
            return self._frozen_digest
        state = self.state_dict()
        if self.adapted:
            state = {n.replace(".base_layer.", "."): state[n] for n in state if ".lora_" not in n}
        self._frozen_digest = weights_digest(state)
        return self._frozen_digest


def numbered_layers(names: Iterable[str]) -> dict[str, int]:
    """Return the layer of each parameter, counted from 0 at the input, as numbered in the names.

    Parameters before the first number belong to layer 0, and later parameters without a number (a final norm,
    a pooler) to the top layer.

    Args:
        names: names of all parameters, in the order of the model.
    """
    layers, top = {}, 0
    for name in names:
        number = re.search(r"\.(\d+)\.", name)
        top = int(number[1]) + 1 if number else top
        layers[name] = top
    return layers


def plain_config(config: Any) -> dict[str, Any]:
    """Return a configuration of transformers as JSON values, without the folder that it was read from."""
    values: dict[str, Any] = json.loads(config.to_json_string(use_diff=False))
    values.pop("_name_or_path", None)
    return values


def own_values(config: dict[str, Any]) -> dict[str, Any]:
    """Return an untrusted configuration without the keys for which transformers downloads attention code."""
    return {name: value for name, value in config.items() if "attn_implementation" not in name}


def refuse_own(architecture: str, name: str) -> None:
    """Raise `UserError` for a custom module, which cannot be rebuilt."""
    if architecture == OWN:
        raise UserError(
            f"the tower {name} is a custom module, which a bundle does not contain; build the model with "
            "CLIP.from_towers again, and load model.safetensors of the bundle"
        )


def pypi_folder(package: str) -> Path:
    """Return the folder of an installed package."""
    try:
        module = importlib.import_module(package)
    except ModuleNotFoundError as error:
        name = package.replace("_", "-")
        raise UserError(f"the tower needs the package {name}; pip install {name}") from error
    return Path(str(module.__file__)).parent


def first_line(error: Exception) -> str:
    """Return the first line of an error's message, to be quoted in another message.

    If it ends with a colon, as in torch's errors about state dicts, the second line is included.
    """
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return " ".join(lines[:2] if lines[0].endswith(":") else lines[:1]).rstrip(".")
