"""AdamW with a rate for each part of the model, and warm-up followed by a cosine."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import get_total_norm
from torch.optim.lr_scheduler import LambdaLR

from clip_lightning.errors import UserError
from clip_lightning.model.clip import CLIP


@dataclass(frozen=True)
class OptimizerConfig:
    """How the weights are updated.

    Args:
        lr: peak learning rate of the projection heads, the scale and the bias.
        image_lr: peak learning rate of the image tower, where it is not frozen.
        text_lr: peak learning rate of the text tower, where it is not frozen.
        weight_decay: of matrices; norms, biases and the scale have none.
        layer_decay: the rate of each layer of a tower is this share of that of the layer above it, 0 to 1
            (Clark et al. 2020, BEiT); the top layer has the tower's whole rate.
        freeze_below: layers whose rate would be less than this share of the tower's are not trained, which
            saves the backward pass through them.
        warmup: share of all steps in which the rates rise from 0 to their peak.
        betas: decay rates of AdamW's running averages.
    """

    lr: float = 1e-3
    image_lr: float = 1e-5
    text_lr: float = 1e-5
    weight_decay: float = 0.1
    layer_decay: float = 1.0
    freeze_below: float = 0.0
    warmup: float = 0.1
    betas: tuple[float, float] = (0.9, 0.98)

    def __post_init__(self) -> None:
        """Check the ranges."""
        for name in ("lr", "image_lr", "text_lr", "weight_decay"):
            if not 0 <= getattr(self, name) < math.inf:
                raise UserError(f"--model.optimizer.{name} {getattr(self, name)}: expected 0 or more")
        for name in ("layer_decay", "freeze_below"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(
                    f"--model.optimizer.{name} {getattr(self, name)}: expected a share of the rate, 0 to 1"
                )
        if not 0 <= self.warmup <= 1:
            raise UserError(f"--model.optimizer.warmup {self.warmup}: expected a share of all steps, 0 to 1")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise UserError(f"--model.optimizer.betas {list(self.betas)}: expected two numbers, 0 to below 1")


def freeze_lower_layers(clip: CLIP, config: OptimizerConfig) -> None:
    """Fix the weights of the layers that `layer_decay` brings under `freeze_below`."""
    for name, share in _layer_shares(clip, config).items():
        if share < config.freeze_below:
            clip.get_parameter(name).requires_grad_(False)
    clip.train(clip.training)  # batch norms among them keep their statistics


def param_groups(clip: CLIP, config: OptimizerConfig) -> list[dict[str, Any]]:
    """Trainable parameters by part (`image_tower`, `text_tower`, `heads`), by layer, and by decay.

    What has fewer than two dimensions (norms, biases, scale) and what timm names in `no_weight_decay` is
    not decayed. Groups without a parameter are left out.
    """
    rates = {"image_tower": config.image_lr, "text_tower": config.text_lr, "heads": config.lr}
    undecayed_names = _no_weight_decay(clip)
    shares = _layer_shares(clip, config)
    groups: dict[str, dict[str, Any]] = {}
    for name, parameter in clip.named_parameters():
        if not parameter.requires_grad:
            continue
        part = name.partition(".")[0]
        part = part if part in rates else "heads"
        share = shares.get(name, 1.0)
        decayed = parameter.ndim >= 2 and name not in undecayed_names
        key = part + (f"_{share:.2g}" if share != 1 else "") + ("" if decayed else "_no_decay")
        weight_decay = config.weight_decay if decayed else 0.0
        group = groups.setdefault(
            key, {"name": key, "params": [], "lr": rates[part] * share, "weight_decay": weight_decay}
        )
        group["params"].append(parameter)
    return list(groups.values())


def _layer_shares(clip: CLIP, config: OptimizerConfig) -> dict[str, float]:
    """Name of each parameter of a tower → share of the tower's rate that it has."""
    shares: dict[str, float] = {}
    for part, tower in (("image_tower", clip.image_tower), ("text_tower", clip.text_tower)):
        if config.layer_decay == 1 or tower.frozen:
            continue
        layers = tower.layers()
        top = max(layers.values())
        shares |= {f"{part}.{name}": config.layer_decay ** (top - layer) for name, layer in layers.items()}
    return shares


def _no_weight_decay(model: nn.Module) -> set[str]:
    """Full names of what a submodule itself exempts (timm: position embeddings and tokens)."""
    names: set[str] = set()
    for prefix, module in model.named_modules():
        exempt = getattr(module, "no_weight_decay", None)
        if callable(exempt):
            names |= {f"{prefix}.{name}" for name in exempt()}
    return names


def clip_gradients(parameters: Iterable[nn.Parameter], limit: float, by_value: bool = False) -> Tensor:
    """Clip gradients in place, sharded ones together with the others.

    Args:
        parameters: with a gradient each.
        limit: of the 2-norm of all together, or of each number; infinity for none.
        by_value: whether `limit` is that of each number.

    Returns:
        The norm before. Where it is not finite, so may be the gradients now.
    """
    found = [parameter.grad for parameter in parameters if parameter.grad is not None]
    whole = [gradient for gradient in found if not isinstance(gradient, DTensor)]
    shares = [gradient.to_local() for gradient in found if isinstance(gradient, DTensor)]
    norm = get_total_norm(whole)
    if shares:
        squares = get_total_norm(shares).square()
        torch.distributed.all_reduce(squares)
        norm = (norm.square() + squares).sqrt()
    if by_value:
        torch._foreach_clamp_min_(whole + shares, -limit)
        torch._foreach_clamp_max_(whole + shares, limit)
    else:
        torch._foreach_mul_(whole + shares, (limit / (norm + 1e-6)).clamp(max=1.0))
    return norm


class WarmupCosine(LambdaLR):
    """Scale the rates of all groups by `warmup_cosine`.

    A resumed run takes only its position from the checkpoint. Peak rates, warm-up and the number of steps are
    those of its own options, so the next step has the rate that they give, and a change of it is printed.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, *, warmup_steps: int, total_steps: int) -> None:
        self.total_steps = total_steps
        super().__init__(
            optimizer, lambda step: warmup_cosine(step, warmup_steps=warmup_steps, total_steps=total_steps)
        )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue at the step of the checkpoint."""
        self.last_epoch, self._step_count = state_dict["last_epoch"], state_dict["_step_count"]
        factor = self.lr_lambdas[0](self.last_epoch)
        self._last_lr = [rate * factor for rate in self.base_lrs]
        for group, rate in zip(self.optimizer.param_groups, self._last_lr, strict=True):
            group["lr"] = rate
        before, now = max(state_dict["_last_lr"]), max(self._last_lr)
        is_first = not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0
        if before != now and is_first:
            print(
                f"the learning rate of step {self.last_epoch} of {self.total_steps} is {now:.3g}; the "
                f"checkpoint had {before:.3g}, since its options or its number of steps were others",
                file=sys.stderr,
            )


def keep_own_options(optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    """Replace the options in a stored optimizer state by those of `optimizer`: only the moments are restored.

    To be registered with `register_load_state_dict_pre_hook`.
    """
    own = ({name: group[name] for name in group if name != "params"} for group in optimizer.param_groups)
    stored = state_dict["param_groups"]
    groups = [{**options, "params": group["params"]} for options, group in zip(own, stored, strict=True)]
    return {**state_dict, "param_groups": groups}


def warmup_cosine(step: int, *, warmup_steps: int, total_steps: int) -> float:
    """Factor on the peak rate at `step` (from 0): linear rise, then half a cosine down to 0 at the end.

    The rise is counted so that no step has a rate of 0: step 0 has 1 / (warmup_steps + 1), and step
    `warmup_steps` is the first with the whole rate.
    """
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
