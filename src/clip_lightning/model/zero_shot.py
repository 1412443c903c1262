"""Zero-shot classification: from similarities to probabilities.

I images, C classes.
"""

from __future__ import annotations

from torch import Tensor


def probabilities(similarity: Tensor, scale: float, bias: float | None) -> Tensor:
    """Convert similarities (I, C) to probabilities, as the model was trained.

    A model without a bias was trained to choose one of several texts: the result is a softmax over the
    classes, which sums to 1. A model with a bias (SigLIP) was trained to judge each pair independently: the
    result is a sigmoid, whose sum is between 0 and C.
    """
    logits = similarity.double() * scale
    return logits.softmax(-1) if bias is None else (logits + bias).sigmoid()
