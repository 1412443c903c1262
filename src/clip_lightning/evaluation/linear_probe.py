"""Linear classifiers on frozen features, trained on all training images or on k images per class.

Dimensions: I images, D width of the features.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from clip_lightning.evaluation.intervals import wilson

REGULARIZERS = (1.0, 1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6)
FEW_SHOT_REGULARIZER = 1e-2  # a few images per class are not enough to choose one


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


class LogisticRegression:
    """Multinomial logistic regression with an L2 penalty, fitted by L-BFGS from zero in fp32.

    Features are centered and divided by one common standard deviation, so that a penalty has the same effect
    for every tower.
    """

    def __init__(self, features: Tensor, labels: Tensor, classes: int, penalty: float) -> None:
        """Minimize mean cross-entropy + penalty / 2 × squared weights on features (I, D), labels (I,)."""
        features = features.float()
        self._mean = features.mean(0)
        self._deviation = (features - self._mean).square().mean().sqrt().clamp(min=1e-12)
        inputs = self._scaled(features)
        self._weight = torch.zeros(classes, inputs.shape[1], requires_grad=True)
        self._bias = torch.zeros(classes, requires_grad=True)
        optimizer = torch.optim.LBFGS(
            [self._weight, self._bias],
            max_iter=200,
            tolerance_grad=1e-6,
            tolerance_change=1e-9,
            line_search_fn="strong_wolfe",
        )

        def loss() -> Tensor:
            optimizer.zero_grad()
            value = F.cross_entropy(F.linear(inputs, self._weight, self._bias), labels)
            value = value + penalty / 2 * self._weight.square().sum()
            value.backward()
            return value

        with torch.enable_grad():
            optimizer.step(loss)

    @torch.no_grad()
    def right(self, features: Tensor, labels: Tensor) -> int:
        """Count the features (I, D) that are classified as their labels (I,)."""
        scores = F.linear(self._scaled(features.float()), self._weight, self._bias)
        return int((scores.argmax(1) == labels).sum())

    def _scaled(self, features: Tensor) -> Tensor:
        return (features - self._mean) / self._deviation


def linear_probe(train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor) -> dict[str, float]:
    """Train a classifier on all training images, with a penalty that is chosen on a fifth of them.

    Returns:
        `linear_probe_top1` in percent with the bounds of Wilson's 95 % interval, and the logarithm of the
        penalty as `log10_regulariser`.
    """
    classes = int(torch.cat([train_labels, test_labels]).max()) + 1
    valid = held_out(train_labels, 1 / 5)

    def right_with(penalty: float) -> int:
        probe = LogisticRegression(train[~valid], train_labels[~valid], classes, penalty)
        return probe.right(train[valid], train_labels[valid])

    # of equals the first, which is the strongest
    chosen = max(REGULARIZERS, key=right_with) if valid.any() else FEW_SHOT_REGULARIZER
    right = LogisticRegression(train, train_labels, classes, chosen).right(test, test_labels)
    low, high = wilson(right, len(test))
    return {
        "linear_probe_top1": 100 * right / len(test),
        "linear_probe_top1_low": low,
        "linear_probe_top1_high": high,
        "log10_regulariser": torch.tensor(chosen).log10().item(),
    }


def few_shot(
    train: Tensor,
    train_labels: Tensor,
    test: Tensor,
    test_labels: Tensor,
    *,
    shots: Sequence[int],
    seeds: int = 3,
) -> dict[str, float]:
    """Train on k randomly drawn images per class, with a fixed penalty, and return the accuracy.

    Returns:
        `few_shot_k` and `few_shot_k_sd`, mean and standard deviation in percent over the draws, for every k
        for which each class has enough images. A single draw has no standard deviation.
    """
    classes = int(torch.cat([train_labels, test_labels]).max()) + 1
    counts = torch.unique(train_labels, return_counts=True)[1]
    metrics: dict[str, float] = {}
    for k in shots:
        if k > counts.min():
            continue
        scores = []
        for seed in range(seeds):
            order = torch.randperm(len(train_labels), generator=torch.Generator().manual_seed(seed))
            rows = torch.cat([order[train_labels[order] == label][:k] for label in train_labels.unique()])
            probe = LogisticRegression(train[rows], train_labels[rows], classes, FEW_SHOT_REGULARIZER)
            scores.append(100 * probe.right(test, test_labels) / len(test))
        metrics[f"few_shot_{k}"] = statistics.fmean(scores)
        if seeds > 1 and k < counts.max():
            metrics[f"few_shot_{k}_sd"] = statistics.stdev(scores)
    return metrics
