"""Folds the batch norms of a convolutional image tower into its convolutions, for faster inference."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import fuse_conv_bn_eval

from clip_lightning.model.towers.image import ImageTower

LARGEST_ERROR = 0.01  # of the features, relative; more than rounding, also in TF32


@torch.no_grad()
def fold_batch_norms(tower: ImageTower) -> ImageTower:
    """Return a copy for inference in which each batch norm is part of the convolution before it.

    The features are equal but for rounding. The tower itself is returned if it has no batch norms, if it is
    in training mode, if it cannot be folded, or if the features differ, as where something else uses the
    output of a convolution.
    """
    if tower.training or not any(isinstance(module, nn.BatchNorm2d) for module in tower.modules()):
        return tower
    count = 3 * tower.transform.size[0] * tower.transform.size[1]
    pixels = (torch.arange(count, device=tower.device) % 251).byte().view(1, 3, *tower.transform.size)
    folded = deepcopy(tower)
    with torch.autocast(tower.device.type, enabled=False):
        try:
            expected, pairs = _run_and_find_pairs(folded, pixels)
            for convolution, name in pairs:
                norm: Any = folded.get_submodule(name)
                fused = fuse_conv_bn_eval(convolution, norm)
                convolution.weight, convolution.bias = fused.weight, fused.bias
                rest = [norm.drop, norm.act] if hasattr(norm, "act") else []  # a BatchNormAct2d of timm
                folded.set_submodule(name, nn.Sequential(*rest))
            error = (folded(pixels) - expected).norm()
        except Exception:  # a tower of your own may read its batch norms itself, for example
            return tower
    return folded if error <= LARGEST_ERROR * expected.norm() else tower


def _run_and_find_pairs(tower: ImageTower, pixels: Tensor) -> tuple[Tensor, list[tuple[nn.Conv2d, str]]]:
    """Return the features, and the convolutions whose output goes to a batch norm, with its name."""
    outputs: dict[int, tuple[Any, Tensor]] = {}  # by id; the tensors are kept, so that no id occurs twice
    pairs: list[tuple[nn.Conv2d, str]] = []
    hooks = []
    for name, module in tower.named_modules():

        def note_output(module: nn.Module, _: Any, output: Tensor) -> None:
            outputs[id(output)] = module, output

        def note_pair(_: nn.Module, inputs: tuple[Tensor], name: str = name) -> None:
            if inputs and id(inputs[0]) in outputs:
                pairs.append((outputs[id(inputs[0])][0], name))

        if isinstance(module, nn.Conv2d):
            hooks.append(module.register_forward_hook(note_output))
        elif isinstance(module, nn.BatchNorm2d):
            hooks.append(module.register_forward_pre_hook(note_pair))
    features = tower(pixels)
    for hook in hooks:
        hook.remove()
    return features, pairs
