"""Zero-shot classification with captions as classes.

I images, C classes, D the width of the embeddings.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from clip_lightning.model.clip import CLIP


def zero_shot_classifier(
    clip: CLIP,
    class_names: str | Iterable[str | Iterable[str]],
    templates: str | Iterable[str] = ("a photo of a {}.",),
) -> Tensor:
    """Return unit-length embeddings (C, D) of classes, on the CPU (Radford et al. 2021, section 3.1.4).

    Args:
        clip: the model.
        class_names: one entry per class: a name, or several names.
        templates: one or several captions with `{}` in place of a name; other braces are kept. The mean of
            the unit-length embeddings of all captions of a class is normalized again.

    Raises:
        ValueError: there are no classes or no templates, or a class has no name.
    """
    classes = [class_names] if isinstance(class_names, str) else class_names
    names = [[entry] if isinstance(entry, str) else list(entry) for entry in classes]
    templates = [templates] if isinstance(templates, str) else list(templates)
    if not names or not all(names) or not templates:
        raise ValueError("expected one or more classes, each with a name, and one or more templates")
    captions = [[text.replace("{}", name) for name in entry for text in templates] for entry in names]
    embedded = clip.embed_texts([caption for entry in captions for caption in entry])
    means = [part.mean(0) for part in embedded.split([len(entry) for entry in captions])]
    return F.normalize(torch.stack(means), dim=-1)


def probabilities(similarity: Tensor, scale: float, bias: float | None) -> Tensor:
    """Convert similarities (I, C) to probabilities, as the model was trained.

    A model without a bias was trained to choose one of several texts: the result is a softmax over the
    classes, which sums to 1. A model with a bias (SigLIP) was trained to judge each pair independently: the
    result is a sigmoid, whose sum is between 0 and C.
    """
    logits = similarity.double() * scale
    return logits.softmax(-1) if bias is None else (logits + bias).sigmoid()
