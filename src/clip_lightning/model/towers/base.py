"""What both towers share: freezing, a digest of the weights, and where packaged weights lie."""

from __future__ import annotations

import importlib
import json
import re
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from clip_lightning.digest import weights_digest
from clip_lightning.errors import UserError


class Tower(nn.Module):
    """A backbone that can be frozen: then it runs without gradients and always in eval mode.

    Attributes:
        frozen: whether nothing of the tower is trained.
        adapted: whether adapters beside its fixed weights are (`lora.py`).
        fixed_statistics: whether batch norms normalise in training as in evaluation.
    """

    width: int
    spec: dict[str, Any]
    backbone: nn.Module
    frozen = False
    adapted = False
    fixed_statistics = False
    _frozen_digest: str | None = None

    def freeze(self) -> Self:
        """Fix the weights: no gradients, no dropout, no drifting batch-norm statistics."""
        self.requires_grad_(False)
        self.frozen = True
        self._frozen_digest = None
        return self.eval()

    def train(self, mode: bool = True) -> Self:
        """Set training mode; what is frozen stays in eval mode, and so do batch norms with fixed weights."""
        super().train(mode and not self.frozen)
        fixed = self.adapted or self.fixed_statistics
        for module in self.modules():
            if isinstance(module, _BatchNorm) and (fixed or _is_fixed(module)):
                module.eval()
        return self

    def fix_statistics(self) -> None:
        """Let batch norms keep their statistics, and normalise by them in training too."""
        self.fixed_statistics = True
        self.train(self.training)

    def layers(self) -> dict[str, int]:
        """For each parameter the number of its layer, 0 next to the input."""
        raise NotImplementedError

    def compile_backbone(self) -> None:
        """Let torch.compile make the backbone faster; where it cannot, say so and go on without."""
        self.backbone.compile()

    def checkpoint_activations(self) -> None:
        """Keep only the inputs of each layer in training, and run it once more in the backward pass.

        Raises:
            UserError: the backbone cannot, or has batch norms that would note every batch twice.
        """
        if any(isinstance(module, _BatchNorm) and module.training for module in self.modules()):
            raise UserError(
                "--model.towers.activation_checkpointing: the batch norms of "
                f"{self.spec['name']!r} would note every batch twice; give --model.towers.fix_statistics "
                "true, or --model.micro_batch_size N instead"
            )
        try:
            self._checkpoint_layers()
        except (AssertionError, AttributeError, NotImplementedError, TypeError, ValueError) as error:
            raise UserError(
                f"--model.towers.activation_checkpointing: {self.spec['name']!r} cannot do it; leave it out, "
                "or give --model.micro_batch_size N instead"
            ) from error

    def _checkpoint_layers(self) -> None:
        raise NotImplementedError

    def run_backbone(self, *args: Any, **kwargs: Any) -> Any:
        """The backbone's output."""
        try:
            return self.backbone(*args, **kwargs)
        except torch._dynamo.exc.TorchDynamoException as error:
            self.backbone._compiled_call_impl = None  # undoes compile()
            warnings.warn(
                f"--model.towers.compile: torch.compile failed on the {type(self).__name__} and is left out: "
                f"{first_line(error)}",
                stacklevel=2,
            )
            return self.backbone(*args, **kwargs)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        """Called for each module by whichever `load_state_dict`; other weights have another digest."""
        self._frozen_digest = None
        super()._load_from_state_dict(*args, **kwargs)

    def digest(self) -> str:
        """SHA-256 (hex) over the names and values of all weights and buffers, without adapters."""
        if (self.frozen or self.adapted) and self._frozen_digest is not None:
            return self._frozen_digest
        self._frozen_digest = weights_digest(self._own_state())
        return self._frozen_digest

    def _own_state(self) -> dict[str, Tensor]:
        """Weights and buffers under the names that they have in a tower without adapters."""
        state = self.state_dict()
        if not self.adapted:
            return state
        return {name.replace(".base_layer.", "."): state[name] for name in state if ".lora_" not in name}


def _is_fixed(norm: _BatchNorm) -> bool:
    return norm.weight is not None and not norm.weight.requires_grad


def numbered_layers(names: Iterable[str]) -> dict[str, int]:
    """For each parameter the number of its layer, 0 next to the input, for models that number them in names.

    What comes before the first number is layer 0, what belongs to none and comes later (a last norm, a
    pooler) is of the top layer.

    Args:
        names: of all parameters, in the order in which the model has them.
    """
    layers, top = {}, 0
    for name in names:
        number = re.search(r"\.(\d+)\.", name)
        top = int(number[1]) + 1 if number else top
        layers[name] = top
    return layers


def plain_config(config: Any) -> dict[str, Any]:
    """A configuration of transformers as JSON values, without the folder it happened to lie in."""
    values: dict[str, Any] = json.loads(config.to_json_string(use_diff=False))
    values.pop("_name_or_path", None)
    return values


def own_values(config: dict[str, Any]) -> dict[str, Any]:
    """A stranger's configuration without what makes transformers fetch code for its attention."""
    return {name: value for name, value in config.items() if "attn_implementation" not in name}


def pypi_folder(package: str) -> Path:
    """Where an installed package lies.

    Raises:
        UserError: it is not installed.
    """
    try:
        module = importlib.import_module(package)
    except ModuleNotFoundError as error:
        name = package.replace("_", "-")
        raise UserError(f"the tower needs the package {name}; pip install {name}") from error
    return Path(str(module.__file__)).parent


def first_line(error: Exception) -> str:
    """The first line of an error's message, for a message of our own.

    With the second one where the first ends with a colon, as torch's about a state dict does.
    """
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return " ".join(lines[:2] if lines[0].endswith(":") else lines[:1]).rstrip(".")
