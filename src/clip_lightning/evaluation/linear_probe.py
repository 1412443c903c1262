"""Linear classifiers on frozen features: logistic regression on all of train, and on k pictures a class.

Dimensions: I images, D width of the features.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from clip_lightning.evaluation.intervals import wilson

REGULARISERS = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
FEW_SHOT_REGULARISER = 1e-2  # with a picture or two of a class there is nothing to choose it on
_VALIDATION_SHARE = 0.2


def held_out(labels: Tensor, share: float, seed: int) -> Tensor:
    """(I,) bool: a seeded draw of this share of each class, at least one and never all of it.

    Of a class with a single picture nothing is held out.
    """
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.zeros(len(labels), dtype=torch.bool)
    for label in labels.unique().tolist():
        rows = (labels == label).nonzero()[:, 0]
        count = min(max(round(share * len(rows)), 1), len(rows) - 1)
        chosen[rows[torch.randperm(len(rows), generator=generator)[:count]]] = True
    return chosen


class LogisticRegression:
    """Multinomial logistic regression with a quadratic penalty, fitted by L-BFGS from zero, in fp32.

    Features are centred and divided by one common deviation, so that a penalty means the same for every
    tower.
    """

    def __init__(self, features: Tensor, labels: Tensor, classes: int, penalty: float) -> None:
        """Minimise mean cross-entropy + penalty / 2 × squared weights over (I, D) and (I,)."""
        features = features.float()
        self._mean = features.mean(0)
        self._deviation = (features - self._mean).square().mean().sqrt().clamp(min=1e-12)
        inputs = self._scaled(features)
        with torch.enable_grad():
            self._weight = torch.zeros(classes, inputs.shape[1], requires_grad=True)
            self._bias = torch.zeros(classes, requires_grad=True)
            optimiser = torch.optim.LBFGS(
                [self._weight, self._bias],
                max_iter=200,
                tolerance_grad=1e-6,
                tolerance_change=1e-9,
                line_search_fn="strong_wolfe",
            )

            def loss() -> Tensor:
                optimiser.zero_grad()
                value = F.cross_entropy(F.linear(inputs, self._weight, self._bias), labels)
                value = value + penalty / 2 * self._weight.square().sum()
                value.backward()
                return value

            optimiser.step(loss)

    def right(self, features: Tensor, labels: Tensor) -> int:
        """How many of (I, D) are classified as (I,) says."""
        with torch.no_grad():
            scores = F.linear(self._scaled(features.float()), self._weight, self._bias)
        return int((scores.argmax(1) == labels).sum())

    def _scaled(self, features: Tensor) -> Tensor:
        return (features - self._mean) / self._deviation


def linear_probe(
    train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor, *, seed: int = 0
) -> dict[str, float]:
    """Accuracy of a classifier trained on all of train, its penalty chosen on a fifth of train.

    Returns:
        `linear_probe_top1` in percent with the ends of Wilson's 95 % interval, and the `regulariser` chosen.
    """
    classes = int(torch.cat([train_labels, test_labels]).max()) + 1
    valid = held_out(train_labels, _VALIDATION_SHARE, seed)
    best, chosen = -1, FEW_SHOT_REGULARISER
    for penalty in sorted(REGULARISERS, reverse=True) if valid.any() else ():  # of equals, the strongest
        probe = LogisticRegression(train[~valid], train_labels[~valid], classes, penalty)
        right = probe.right(train[valid], train_labels[valid])
        if right > best:
            best, chosen = right, penalty
    right = LogisticRegression(train, train_labels, classes, chosen).right(test, test_labels)
    low, high = wilson(right, len(test))
    found = {"linear_probe_top1": 100 * right / len(test)}
    found |= {"linear_probe_top1_low": low, "linear_probe_top1_high": high}
    return found | {"log10_regulariser": torch.tensor(chosen).log10().item()}


def few_shot(
    train: Tensor,
    train_labels: Tensor,
    test: Tensor,
    test_labels: Tensor,
    *,
    shots: Sequence[int],
    seeds: int = 3,
) -> dict[str, float]:
    """Accuracy after learning from k pictures of each class, drawn from train; the penalty is fixed.

    Returns:
        `few_shot_k` and `few_shot_k_sd`, mean and standard deviation in percent over the draws, for every k
        that each class of train has images for. There is no deviation where there is only one draw.
    """
    classes = int(torch.cat([train_labels, test_labels]).max()) + 1
    counts = torch.unique(train_labels, return_counts=True)[1]
    found: dict[str, float] = {}
    for k in shots:
        if k > counts.min():
            continue
        scores = []
        for seed in range(seeds):
            rows = _draw(train_labels, k, seed)
            probe = LogisticRegression(train[rows], train_labels[rows], classes, FEW_SHOT_REGULARISER)
            scores.append(100 * probe.right(test, test_labels) / len(test))
        found[f"few_shot_{k}"] = statistics.fmean(scores)
        if seeds > 1 and k < counts.max():
            found[f"few_shot_{k}_sd"] = statistics.stdev(scores)
    return found


def _draw(labels: Tensor, k: int, seed: int) -> Tensor:
    """Rows of k pictures of each class."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    return torch.cat([order[labels[order] == label][:k] for label in labels.unique().tolist()])
