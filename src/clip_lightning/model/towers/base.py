"""The base class of both towers, and helpers that they share."""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import itertools
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from transformers import PreTrainedModel
from transformers.utils.logging import EmptyTqdm, set_tqdm_hook

from clip_lightning.errors import UserError, as_user_error

OWN = "module of one's own"  # the architecture of a custom module, which a bundle cannot rebuild


class Tower(nn.Module):
    """A backbone that can be frozen: it then runs without gradients and always in eval mode.

    Attributes:
        spec: the JSON values from which `from_spec` builds the same architecture again.
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
            if isinstance(module, _BatchNorm):
                frozen = module.weight is not None and not module.weight.requires_grad
                module.train(module.training and not (fixed or frozen))
        return self

    def fix_statistics(self) -> None:
        """Make batch norms keep their running statistics, and normalize with them in training, too."""
        self.fixed_statistics = True
        self.train(self.training)

    def layers(self) -> dict[str, int]:
        """Return the layer of each parameter, from 0 at the input, by names like `layers.0.` or `layer1.0.`.

        Parameters before the first number are in layer 0, and later ones without a number in the top layer.
        """
        layers, top = {}, 0
        for name, _ in self.named_parameters():
            number = re.search(r"(?:\.|\blayer)(\d+)\.", name)
            top = int(number[1]) + 1 if number else top
            layers[name] = top
        consecutive = {number: layer for layer, number in enumerate(sorted({*layers.values()}))}
        return {name: consecutive[number] for name, number in layers.items()}

    def compile_backbone(self) -> None:
        """Compile the backbone; what cannot be compiled runs uncompiled, and torch logs the reason."""
        torch._dynamo.config.suppress_errors = True
        self.backbone.compile()

    def checkpoint_activations(self) -> None:
        """Store only the inputs of each layer in training, and recompute the rest in the backward pass."""
        option, name = "--model.towers.activation_checkpointing", self.spec["name"]
        if any(isinstance(module, _BatchNorm) and module.training for module in self.modules()):
            raise UserError(
                f"{option} would update the batch-norm statistics of {name!r} twice per batch; "
                "give --model.towers.fix_statistics true as well, or --model.micro_batch_size N instead"
            )
        layered = (module for module in self.modules() if hasattr(module, "set_grad_checkpointing"))
        backbone: Any = next(layered, self.backbone)
        remedy = "leave it out, or give --model.micro_batch_size N instead"
        with as_user_error(f"{option} is not supported by {name!r}", remedy):
            if isinstance(backbone, PreTrainedModel):
                old = backbone.gradient_checkpointing_enable  # before transformers 5.23
                getattr(backbone, "activation_checkpointing_enable", old)({"use_reentrant": False})
            else:
                backbone.set_grad_checkpointing(True)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        """Forget the digest whenever weights are loaded; torch calls this for every module."""
        self._frozen_digest = None
        super()._load_from_state_dict(*args, **kwargs)

    def digest(self) -> str:
        """Return SHA-256 (hex) of the names and values of all weights and buffers, without adapters."""
        if self._frozen_digest is None or not (self.frozen or self.adapted):
            state = self.state_dict()
            own = {n.replace(".base_layer.", "."): state[n] for n in state if ".lora_" not in n}
            self._frozen_digest = weights_digest(own if self.adapted else state)
        return self._frozen_digest


def weights_digest(state: Mapping[str, Tensor]) -> str:
    """SHA-256 (hex) over names, shapes, types and values, in the order of the names."""
    sha = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        sha.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        sha.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()


def plain_config(config: Any) -> dict[str, Any]:
    """Return a configuration of transformers as JSON values, without the folder that it was read from."""
    values: dict[str, Any] = json.loads(config.to_json_string(use_diff=False))
    values.pop("_name_or_path", None)
    return values


def own_values(config: dict[str, Any]) -> dict[str, Any]:
    """Return an untrusted configuration without the keys for which transformers downloads attention code."""
    return {name: value for name, value in config.items() if "attn_implementation" not in name}


@contextlib.contextmanager
def without_weight_bars() -> Iterator[None]:
    """Hide transformers' bars of loaded weights, but not those of downloads, which huggingface_hub shows."""
    previous = set_tqdm_hook(lambda _, args, options: EmptyTqdm(*args, **options))
    try:
        yield
    finally:
        set_tqdm_hook(previous)


def optional_module(module: str, package: str, user: str) -> Any:
    """Import a module of a package that may not be installed and that `user` needs."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise UserError(f"{user} needs the package {package}; pip install {package}") from error


def pypi_folder(package: str) -> Path:
    """Return the folder of an installed package."""
    return Path(optional_module(package, package.replace("_", "-"), "the tower").__file__).parent
