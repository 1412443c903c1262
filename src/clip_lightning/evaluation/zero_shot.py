"""Scores zero-shot classification: accuracies, confusions and calibration.

Dimensions: I images, C classes, D embedding width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from clip_lightning.evaluation.intervals import accuracy
from clip_lightning.evaluation.retrieval import TIE, check_finite
from clip_lightning.model.clip import probabilities

BINS = 15


@dataclass(frozen=True)
class Calibration:
    """Answers grouped into B bins of equal width by the probability that the model assigned to them."""

    images: Tensor  # (B,) int64, number of answers in each bin
    confidence: Tensor  # (B,) float64, mean probability of each bin from 0 to 1, and 0 for an empty bin
    accuracy: Tensor  # (B,) float64, fraction of correct answers in each bin, and 0 for an empty bin

    @property
    def error(self) -> float:
        """Expected calibration error in percent: the mean gap, weighted by images (Guo et al. 2017)."""
        gaps = self.images * (self.confidence - self.accuracy).abs()
        return 100 * gaps.sum().item() / max(int(self.images.sum()), 1)


def calibration(confidence: Tensor, right: Tensor, bins: int = BINS) -> Calibration:
    """Group answers into bins by their probabilities (I,); `right` (I,) marks the correct answers."""
    place = (confidence.double() * bins).ceil().long().clamp(1, bins) - 1
    images = torch.bincount(place, minlength=bins)
    sums = (torch.bincount(place, values.double(), bins) for values in (confidence, right))
    return Calibration(images, *(total / images.clamp(min=1) for total in sums))


@dataclass(frozen=True)
class Classification:
    """The result of classifying images.

    The metrics, in percent, are `zero_shot_top1` and `zero_shot_top5`, each with the `_low` and `_high` ends
    of Wilson's 95 % interval; `mean_per_class_accuracy`; and `expected_calibration_error`.
    """

    metrics: dict[str, float]
    confusion: Tensor  # (C, C) int64, number of images of each true class (rows) by predicted class (columns)
    calibration: Calibration  # of the model's answers


def classify(
    image: Tensor, classifier: Tensor, labels: Tensor, *, scale: float, bias: float | None = None
) -> Classification:
    """Score the classification of unit-length embeddings (I, D) by a classifier (C, D).

    Ties count against the model, as in retrieval: if the true class of an image ties with another class, the
    other class is the answer. `labels` (I,) int64 are the true classes; `scale` and `bias` are the model's.
    """
    classes = len(classifier)
    check_finite({"image": image, "class": classifier})  # NaN would rank first
    scores = image.double() @ classifier.double().T
    rank = (scores >= scores.gather(1, labels[:, None]) - TIE).sum(1)  # from 1: it counts the true class
    others = scores.scatter(1, labels[:, None], -torch.inf)
    answer = labels.where(rank == 1, others.argmax(1))
    confusion = torch.bincount(labels * classes + answer, minlength=classes**2).view(classes, classes)
    metrics = dict[str, float]()
    for k in (1, 5):
        metrics |= accuracy(f"zero_shot_top{k}", int((rank <= k).sum()), len(rank))
    present = confusion.sum(1) > 0
    accuracies = confusion.diag()[present].double() / confusion.sum(1)[present]
    metrics["mean_per_class_accuracy"] = 100 * accuracies.mean().item()
    confidence = probabilities(scores, scale, bias).gather(1, answer[:, None])[:, 0]
    calibrated = calibration(confidence, answer == labels)
    metrics["expected_calibration_error"] = calibrated.error
    return Classification(metrics, confusion, calibrated)
