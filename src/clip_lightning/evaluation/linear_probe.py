"""Linear classifiers on frozen features, trained on all training images or on k images per class.

Dimensions: I images, C classes, D width of the features.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from clip_lightning.evaluation.intervals import accuracy

REGULARIZERS = (1.0, 1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6)
FEW_SHOT_REGULARIZER = 1e-2  # a few images per class are not enough to choose one
Labelled = tuple[Tensor, Tensor]  # features (I, D) and labels (I,)


def held_out(labels: Tensor, fraction: float) -> Tensor:
    """Return a mask (I,) that holds out a random fraction of each class, the same in every call.

    At least one image of a class is held out and at least one is kept; a single image is kept.
    """
    generator = torch.Generator().manual_seed(0)
    chosen = torch.zeros(len(labels), dtype=torch.bool)
    for label in labels.unique().tolist():
        rows = (labels == label).nonzero()[:, 0]
        count = min(max(round(fraction * len(rows)), 1), len(rows) - 1)
        chosen[rows[torch.randperm(len(rows), generator=generator)[:count]]] = True
    return chosen


def logistic_regression(
    inputs: Tensor, labels: Tensor, classes: int, penalty: float
) -> tuple[Tensor, Tensor]:
    """Minimize mean cross-entropy + penalty / 2 × squared weights by L-BFGS from zero.

    Return the weights (C, D) and biases (C,).
    """
    weight = torch.zeros(classes, inputs.shape[1], requires_grad=True)
    bias = torch.zeros(classes, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [weight, bias], max_iter=200, tolerance_grad=1e-6, line_search_fn="strong_wolfe"
    )

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = F.cross_entropy(F.linear(inputs, weight, bias), labels)
        value = value + penalty / 2 * weight.square().sum()
        value.backward()
        return value

    with torch.enable_grad():
        optimizer.step(loss)
    return weight.detach(), bias.detach()


def count_right(train: Labelled, test: Labelled, penalty: float) -> int:
    """Train a classifier, and count the test images that it classifies correctly.

    Features are centered and divided by one common standard deviation, so that a penalty has the same effect
    for every tower. Classes without training images take part in the softmax, too.
    """
    classes = int(max(train[1].max(), test[1].max())) + 1
    mean = train[0].mean(0)
    deviation = (train[0] - mean).square().mean().sqrt().clamp(min=1e-12)
    weight, bias = logistic_regression((train[0] - mean) / deviation, train[1], classes, penalty)
    scores = F.linear((test[0] - mean) / deviation, weight, bias)
    return int((scores.argmax(1) == test[1]).sum())


def linear_probe(train: Labelled, test: Labelled) -> dict[str, float]:
    """Train a classifier on all training images, with a penalty that is chosen on a fifth of them.

    Return the accuracy in percent with the bounds of Wilson's interval, and the logarithm of the penalty.
    """
    valid = held_out(train[1], 1 / 5)
    kept, chosen_on = ((train[0][rows], train[1][rows]) for rows in (~valid, valid))
    chosen = FEW_SHOT_REGULARIZER
    if valid.any():  # of equals the first, which is the strongest
        chosen = max(REGULARIZERS, key=lambda penalty: count_right(kept, chosen_on, penalty))
    scores = accuracy("linear_probe_top1", count_right(train, test, chosen), len(test[1]))
    return scores | {"log10_regulariser": math.log10(chosen)}


def few_shot(train: Labelled, test: Labelled, *, shots: Sequence[int], seeds: int = 3) -> dict[str, float]:
    """Train on k randomly drawn images per class, with a fixed penalty.

    Return the mean accuracy in percent and its standard deviation over the draws for every k for which each
    class has enough images. A single draw has no standard deviation.
    """
    features, labels = train
    present, counts = labels.unique(return_counts=True)
    metrics: dict[str, float] = {}
    for k in (k for k in shots if k <= counts.min()):
        scores = []
        for seed in range(seeds):
            order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
            rows = torch.cat([order[labels[order] == label][:k] for label in present])
            right = count_right((features[rows], labels[rows]), test, FEW_SHOT_REGULARIZER)
            scores.append(100 * right / len(test[1]))
        metrics[f"few_shot_{k}"] = statistics.fmean(scores)
        if seeds > 1 and k < counts.max():
            metrics[f"few_shot_{k}_sd"] = statistics.stdev(scores)
    return metrics
