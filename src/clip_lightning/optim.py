"""AdamW with a rate for each part of the model, and warm-up followed by a cosine."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from torch import nn

from clip_lightning.errors import UserError


@dataclass(frozen=True)
class OptimizerConfig:
    """How the weights are updated.

    Args:
        lr: peak learning rate of the projection heads, the scale and the bias.
        image_lr: peak learning rate of the image tower, where it is not frozen.
        text_lr: peak learning rate of the text tower, where it is not frozen.
        weight_decay: of matrices; norms, biases and the scale have none.
        warmup: share of all steps in which the rates rise from 0 to their peak.
        betas: decay rates of AdamW's running averages.
    """

    lr: float = 1e-3
    image_lr: float = 1e-5
    text_lr: float = 1e-5
    weight_decay: float = 0.1
    warmup: float = 0.1
    betas: tuple[float, float] = (0.9, 0.98)

    def __post_init__(self) -> None:
        """Check the ranges."""
        for name in ("lr", "image_lr", "text_lr", "weight_decay"):
            if getattr(self, name) < 0:
                raise UserError(f"--model.optimizer.{name} {getattr(self, name)}: expected 0 or more")
        if not 0 <= self.warmup <= 1:
            raise UserError(f"--model.optimizer.warmup {self.warmup}: expected a share of all steps, 0 to 1")


def param_groups(model: nn.Module, config: OptimizerConfig) -> list[dict[str, Any]]:
    """Trainable parameters by part (`image_tower`, `text_tower`, `heads`), with and without decay.

    What has fewer than two dimensions (norms, biases, scale) and what timm names in `no_weight_decay` is
    not decayed. Groups without a parameter are left out.
    """
    rates = {"image_tower": config.image_lr, "text_tower": config.text_lr, "heads": config.lr}
    undecayed_names = _no_weight_decay(model)
    groups: dict[str, dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        part = name.partition(".")[0]
        part = part if part in rates else "heads"
        decayed = parameter.ndim >= 2 and name not in undecayed_names
        key = part if decayed else f"{part}_no_decay"
        weight_decay = config.weight_decay if decayed else 0.0
        group = groups.setdefault(
            key, {"name": key, "params": [], "lr": rates[part], "weight_decay": weight_decay}
        )
        group["params"].append(parameter)
    return list(groups.values())


def _no_weight_decay(model: nn.Module) -> set[str]:
    """Full names of what a submodule itself exempts (timm: position embeddings and tokens)."""
    names: set[str] = set()
    for prefix, module in model.named_modules():
        exempt = getattr(module, "no_weight_decay", None)
        if callable(exempt):
            names |= {f"{prefix}.{name}" for name in exempt()}
    return names


def warmup_cosine(step: int, *, warmup_steps: int, total_steps: int) -> float:
    """Factor on the peak rate at `step` (from 0): linear rise, then half a cosine down to 0 at the end.

    The rise is counted so that no step has a rate of 0: step 0 has 1 / (warmup_steps + 1), and step
    `warmup_steps` is the first with the whole rate.
    """
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
