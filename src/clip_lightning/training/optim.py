"""Builds the optimizer, with a learning rate for each part of the model, and the schedule of the rates."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from timm.optim import create_optimizer_v2, get_optimizer_info, list_optimizers
from torch import Tensor, nn
from torch.nn.utils import get_total_norm
from torch.optim.lr_scheduler import LambdaLR

from clip_lightning.errors import UserError, as_user_error
from clip_lightning.model.clip import CLIP
from clip_lightning.terminal import note

Schedule = Literal["cosine", "constant", "cooldown"]


@dataclass(frozen=True)
class OptimizerConfig:
    """Options of the optimizer and of the schedule of its learning rates.

    Args:
        lr: peak learning rate of the heads, the scale and the bias.
        image_lr: peak learning rate of the image tower, if it is trained.
        text_lr: peak learning rate of the text tower, if it is trained.
        weight_decay: weight decay of matrices; norms, biases and the scale have none.
        layer_decay: learning rate of each layer of a tower as a fraction of that of the layer above it, 0 to
            1 (Clark et al. 2020, BEiT); the top layer has the full rate of the tower.
        freeze_below: layers whose rate would be less than this fraction of the tower's rate are not trained,
            which saves the backward pass through them.
        warmup: fraction of all steps during which the rates rise from 0 to their peak.
        betas: decay rates of the optimizer's running averages, if it has two.
        name: `adamw`, or the name of another optimizer in timm, such as `muon`, `lion` or `lamb`.
        schedule: the rates after the warm-up: `cosine` falls to 0 along half a cosine; `constant` stays at
            the peak; `cooldown` stays at the peak and falls linearly to 0 over the last fifth of all steps.
    """

    lr: float = 1e-3
    image_lr: float = 1e-5
    text_lr: float = 1e-5
    weight_decay: float = 0.1
    layer_decay: float = 1.0
    freeze_below: float = 0.0
    warmup: float = 0.1
    betas: tuple[float, float] = (0.9, 0.98)
    name: str = "adamw"
    schedule: Schedule = "cosine"

    def __post_init__(self) -> None:
        for name in ("lr", "image_lr", "text_lr", "weight_decay", "layer_decay", "freeze_below", "warmup"):
            value, is_fraction = getattr(self, name), name in ("layer_decay", "freeze_below", "warmup")
            if not 0 <= value <= (1 if is_fraction else sys.float_info.max):
                expected = "a fraction from 0 to 1" if is_fraction else "a number of 0 or more"
                raise UserError(f"--model.optimizer.{name} {value}: expected {expected}")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise UserError(f"--model.optimizer.betas {list(self.betas)}: expected two fractions below 1")
        if self.name not in list_optimizers():
            raise UserError(f"--model.optimizer.name {self.name}: expected adamw or a name in timm.optim")


def build_optimizer(clip: CLIP, config: OptimizerConfig, *, fused: bool) -> torch.optim.Optimizer:
    """Build the optimizer of the trainable parameters: AdamW of torch, or an optimizer in timm."""
    groups = param_groups(clip, config)
    if config.name == "adamw":
        return torch.optim.AdamW(groups, betas=config.betas, fused=fused)
    has_betas = get_optimizer_info(config.name).num_betas == 2
    betas: dict[str, Any] = {"betas": config.betas} if has_betas else {}
    with as_user_error(f"--model.optimizer.name {config.name} cannot be used here", "choose another"):
        return create_optimizer_v2(groups, config.name, lr=config.lr, **betas)


def freeze_lower_layers(clip: CLIP, config: OptimizerConfig) -> None:
    """Freeze the layers whose `layer_decay` is below `freeze_below`."""
    for name, fraction in _layer_fractions(clip, config).items():
        if fraction < config.freeze_below:
            clip.get_parameter(name).requires_grad_(False)
    clip.train(clip.training)  # so that their batch norms keep their statistics


def param_groups(clip: CLIP, config: OptimizerConfig) -> list[dict[str, Any]]:
    """Group the trainable parameters by part (`image_tower`, `text_tower`, `heads`), layer and weight decay.

    Parameters with fewer than two dimensions (norms, biases, the scale) and those that modules list in
    `no_weight_decay` (in timm, position embeddings and tokens) have no weight decay.
    """
    rates = {"image_tower": config.image_lr, "text_tower": config.text_lr, "heads": config.lr}
    undecayed = {
        f"{prefix}.{name}"
        for prefix, module in clip.named_modules()
        if callable(exempt := getattr(module, "no_weight_decay", None))
        for name in exempt()
    }
    fractions = _layer_fractions(clip, config)
    groups: dict[str, dict[str, Any]] = {}
    for name, parameter in clip.named_parameters():
        if not parameter.requires_grad:
            continue
        part = name.partition(".")[0]
        part = part if part in rates else "heads"
        fraction = fractions.get(name, 1.0)
        decayed = parameter.ndim >= 2 and name not in undecayed
        key = part + (f"_{fraction:.2g}" if fraction != 1 else "") + ("" if decayed else "_no_decay")
        options = {"lr": rates[part] * fraction, "weight_decay": config.weight_decay if decayed else 0.0}
        groups.setdefault(key, {"name": key, "params": [], **options})["params"].append(parameter)
    return list(groups.values())


def _layer_fractions(clip: CLIP, config: OptimizerConfig) -> dict[str, float]:
    """Return the fraction of the tower's rate for the name of each parameter, if `layer_decay` changes it."""
    fractions: dict[str, float] = {}
    for part, tower in (("image_tower", clip.image_tower), ("text_tower", clip.text_tower)):
        if config.layer_decay != 1 and not tower.frozen:
            layers = tower.layers()
            top = max(layers.values())
            fractions |= {f"{part}.{name}": config.layer_decay ** (top - at) for name, at in layers.items()}
    return fractions


def clip_gradients(parameters: Iterable[nn.Parameter], limit: float, by_value: bool = False) -> Tensor:
    """Clip gradients in place, and return their 2-norm before.

    `limit` is for the 2-norm of all gradients together, or for each absolute value, and may be infinite.
    """
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norm = get_total_norm(gradients)
    if by_value:
        torch._foreach_clamp_min_(gradients, -limit)
        torch._foreach_clamp_max_(gradients, limit)
    else:
        torch._foreach_mul_(gradients, (limit / (norm + 1e-6)).clamp(max=1.0))
    return norm


class WarmupSchedule(LambdaLR):
    """Multiplies all rates by a factor; a resumed run restores only the step, and prints a changed rate."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.last_epoch, self._step_count = state_dict["last_epoch"], state_dict["_step_count"]
        factor = self.lr_lambdas[0](self.last_epoch)
        self._last_lr = [rate * factor for rate in self.base_lrs]
        for group, rate in zip(self.optimizer.param_groups, self._last_lr, strict=True):
            group["lr"] = rate
        before, now = max(state_dict["_last_lr"]), max(self._last_lr)
        if before != now:
            change = f"is now {now:.3g} instead of {before:.3g}"
            rank_zero_only(note)(f"the learning rate of step {self.last_epoch} {change}")


def keep_own_options(optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    """Replace the options in a stored state by those of `optimizer`: only the moments are restored."""
    own = ({name: group[name] for name in group if name != "params"} for group in optimizer.param_groups)
    stored = state_dict["param_groups"]
    groups = [{**options, "params": group["params"]} for options, group in zip(own, stored, strict=True)]
    return {**state_dict, "param_groups": groups}


def rate_factor(step: int, warmup_steps: int, total_steps: int, schedule: Schedule = "cosine") -> float:
    """Return the factor of the peak rate at `step`, counted from 0: a linear warm-up, then the schedule.

    It is 1 / (warmup_steps + 1) at step 0, so that no step is lost, and 1 from step `warmup_steps`.
    """
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    if schedule == "constant":
        return 1.0
    if schedule == "cooldown":  # over the last fifth
        return min(1.0, max(0.0, (total_steps - step) / max(1.0, 0.2 * total_steps)))
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
