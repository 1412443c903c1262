"""Classification with captions as the classifier, and what its answers are worth.

Dimensions: I images, C classes, D embedding width.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from clip_lightning.evaluation.calibration import Calibration, calibration
from clip_lightning.evaluation.intervals import wilson
from clip_lightning.evaluation.prompts import fill
from clip_lightning.evaluation.retrieval import TIE

if TYPE_CHECKING:
    from clip_lightning.model.clip import CLIP


def zero_shot_classifier(
    clip: CLIP,
    class_names: str | Iterable[str | Iterable[str]],
    templates: str | Iterable[str] = ("a photo of a {}.",),
) -> Tensor:
    """Unit-length embeddings (C, D) of classes, on the CPU (Radford et al. 2021, section 3.1.4).

    Args:
        clip: whose text tower reads the captions.
        class_names: one entry per class: its name, or several names of it.
        templates: one caption or several, with `{}` where a name goes. All captions of a class are
            embedded, and the mean of the unit-length embeddings is brought to unit length again.

    Raises:
        ValueError: no classes, a class without a name, or no template.
    """
    classes = [class_names] if isinstance(class_names, str) else class_names
    names = [[entry] if isinstance(entry, str) else list(entry) for entry in classes]
    templates = [templates] if isinstance(templates, str) else list(templates)
    if not names or not all(names) or not templates:
        raise ValueError("expected one or more classes, each with a name, and one or more templates")
    captions = [fill(entry, templates) for entry in names]
    embedded = clip.embed_texts([caption for entry in captions for caption in entry])
    means = [part.mean(0) for part in embedded.split([len(entry) for entry in captions])]
    return F.normalize(torch.stack(means), dim=-1)


def probabilities(similarity: Tensor, scale: float, bias: float | None) -> Tensor:
    """What the model itself makes of similarities (I, C), as it was trained to read them.

    Without a bias it chose one among several texts: softmax over the classes, whose sum is 1. With a bias
    (SigLIP) it judged every pair by itself: a sigmoid each, and the sum can be anything from 0 to C.
    """
    logits = similarity.double() * scale
    return logits.softmax(-1) if bias is None else (logits + bias).sigmoid()


@dataclass(frozen=True)
class Classification:
    """How well images were classified; accuracies and the calibration error in percent.

    Attributes:
        metrics: `zero_shot_top1` and `zero_shot_top5`, each with the `_low` and `_high` ends of Wilson's
            95 % interval; `mean_per_class_accuracy`; `expected_calibration_error`.
        confusion: (C, C) int64, images of each true class (rows) by the class they were taken for.
        calibration: the model's probabilities for its answers, and how often these are right.
    """

    metrics: dict[str, float]
    confusion: Tensor
    calibration: Calibration

    def per_class(self) -> list[tuple[int, int]]:
        """For each class how many images were right, of how many."""
        return list(zip(self.confusion.diag().tolist(), self.confusion.sum(1).tolist(), strict=True))

    def confused(self, most: int = 10) -> list[tuple[int, int, int]]:
        """(true class, taken for, images) of the most frequent mistakes, the most frequent first."""
        wrong = self.confusion.clone().fill_diagonal_(0)
        pairs = [(int(row), int(column)) for row, column in wrong.nonzero()]
        found = [(row, column, int(wrong[row, column])) for row, column in pairs]
        return sorted(found, key=lambda pair: (-pair[2], pair[:2]))[:most]


def classify(
    image: Tensor, classifier: Tensor, labels: Tensor, *, scale: float, bias: float | None = None
) -> Classification:
    """Score the classification of unit-length embeddings (I, D) by a classifier (C, D).

    Ties count against the model, as in retrieval: an image whose class ties with another was taken for the
    other. The error of calibration is the mean distance, weighted by images, between the model's
    probability for its answer and how often it is right, in 15 bins of equal width (Guo et al. 2017).

    Args:
        image: embeddings of the images.
        classifier: of `zero_shot_classifier`.
        labels: (I,) int64, the right class of each image.
        scale: the model's inverse temperature.
        bias: the model's bias, None if it has none.

    Raises:
        ValueError: no images, shapes that do not fit, a label that is no class, or an embedding that is not
            finite.
    """
    if not len(image) or labels.shape != image.shape[:1] or image.shape[1:] != classifier.shape[1:]:
        raise ValueError(
            f"expected images (I, D), classes (C, D) and labels (I,), got {tuple(image.shape)}, "
            f"{tuple(classifier.shape)} and {tuple(labels.shape)}"
        )
    classes = len(classifier)
    if labels.min() < 0 or labels.max() >= classes:
        raise ValueError(f"labels must be between 0 and {classes - 1}")
    for name, values in (("image", image), ("class", classifier)):
        if broken := int((~values.isfinite().all(1)).sum()):  # no comparison with NaN would count against it
            raise ValueError(f"{broken} of {len(values)} {name} embeddings hold NaN or infinity")
    scores = image.double() @ classifier.double().T
    rank = (scores >= scores.gather(1, labels[:, None]) - TIE).sum(1)  # its own class is the 1 of the rank
    others = scores.scatter(1, labels[:, None], -torch.inf)
    answer = labels.where(rank == 1, others.argmax(1))
    confusion = torch.bincount(labels * classes + answer, minlength=classes**2).view(classes, classes)
    metrics: dict[str, float] = {}
    for k in (1, 5):
        right = int((rank <= k).sum())
        low, high = wilson(right, len(rank))
        metrics |= {f"zero_shot_top{k}": 100 * right / len(rank)}
        metrics |= {f"zero_shot_top{k}_low": low, f"zero_shot_top{k}_high": high}
    present = confusion.sum(1) > 0
    shares = confusion.diag()[present].double() / confusion.sum(1)[present]
    metrics["mean_per_class_accuracy"] = 100 * shares.mean().item()
    confidence = probabilities(scores, scale, bias).gather(1, answer[:, None])[:, 0]
    calibrated = calibration(confidence, answer == labels)
    metrics["expected_calibration_error"] = calibrated.error
    return Classification(metrics, confusion, calibrated)
