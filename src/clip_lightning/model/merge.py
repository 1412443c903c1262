"""Averages models: WiSE-FT, model soups (both Wortsman et al. 2022) and RegMean (Jin et al. 2023)."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from clip_lightning.arguments import flat
from clip_lightning.errors import UserError
from clip_lightning.model.clip import CLIP

RIDGE = 0.1
Weights = Mapping[str, Tensor]
MAY_DIFFER = re.compile(r"\w+_tower\.name|dropout|.*\.transformers_version")


def average(models: Sequence[Weights], fractions: Sequence[float]) -> dict[str, Tensor]:
    """Return a new state dict, the mean of several, with `fractions` that add up to 1.

    It is computed in fp64, so that weights that are equal in all models stay the same, bit for bit. The
    statistics of batch norms are averaged as well; integer buffers are those of the first model.
    """
    mean = {name: tensor.clone() for name, tensor in models[0].items()}
    for name, tensor in mean.items():
        if tensor.is_floating_point():
            parts = [f * model[name].double() for f, model in zip(fractions, models, strict=True)]
            tensor.copy_(sum(parts[1:], parts[0]))
    return mean


def average_linear(layers: Sequence[Tensor], fractions: Sequence[float], grams: Sequence[Tensor]) -> Tensor:
    """Return one linear layer that treats the inputs of each of several much as that layer does.

    It minimises the sum over the layers of fraction * |X W' - X V'|², where a layer has the weights V and its
    inputs are the rows of X (RegMean, Jin et al. 2023). Each Gram matrix X' X is divided by the mean of its
    diagonal, and RIDGE times the identity is added, which averages the weights where there are no inputs.

    Args:
        layers: weights of shape (outputs, inputs).
        fractions: one for each layer, which add up to 1.
        grams: the Gram matrix of the inputs of each layer, of shape (inputs, inputs).
    """
    identity = torch.eye(len(grams[0]), dtype=torch.float64)
    scaled = [f * (g / g.diagonal().mean() + RIDGE * identity) for f, g in zip(fractions, grams, strict=True)]
    targets = [gram @ layer.double().T for gram, layer in zip(scaled, layers, strict=True)]
    return torch.linalg.solve(sum(scaled, 0 * identity), torch.stack(targets).sum(0)).T


def load_for_merge(base: str, tuned: Sequence[str]) -> tuple[CLIP, Weights, Weights]:
    """Load models, and return the model `base`, a copy of its weights, and the mean weights of the others.

    Raise UserError with the first difference if the architecture, the transform or the tokenizer differ.
    """
    clip, *others = (_load(name) for name in (base, *tuned))
    expected = _described(clip)
    for name, about in zip(tuned, map(_described, others), strict=True):
        for part in expected | about:
            if (given := about.get(part)) != (wanted := expected.get(part)):
                raise UserError(
                    f"{name} has {part} {given}, but {base} has {wanted}; give models with the same "
                    "architecture, transform and tokenizer, such as a model and one that was trained from it"
                )
    mean = average([other.state_dict() for other in others], [1 / len(others)] * len(others))
    return clip, average([clip.state_dict()], [1]), mean


def _load(name: str) -> CLIP:
    clip = CLIP.from_pretrained(name)
    if clip.image_tower.adapted or clip.text_tower.adapted:  # saving merges adapters into the weights
        with tempfile.TemporaryDirectory() as folder:
            return CLIP.from_pretrained(clip.save_pretrained(folder))
    return clip


def _described(clip: CLIP) -> dict[str, Any]:
    """Return everything that must be the same in two models, named as in the config.json of a bundle."""
    config = flat(json.loads(json.dumps(clip.config())))
    about = {name: value for name, value in config.items() if not MAY_DIFFER.fullmatch(name)}
    shapes = {f"the shape of {name}": [*weight.shape] for name, weight in clip.state_dict().items()}
    return about | {"tokenizer": clip.tokenize.digest()} | shapes
