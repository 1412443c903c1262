"""SugarCrepe's accuracy and Winoground's scores, with expected values worked out by hand."""

import pytest
import torch

from clip_lightning.evaluation.compositional import compositional_metrics
from clip_lightning.evaluation.intervals import wilson


def embeddings(similarity: list) -> tuple[torch.Tensor, torch.Tensor]:
    """Images (E, M, 2) and captions (E, 2, 2) whose products are the similarities (E, M, 2)."""
    image = torch.tensor(similarity, dtype=torch.float64)
    return image, torch.eye(2, dtype=torch.float64).expand(len(image), 2, 2)


def test_one_image_must_prefer_the_first_caption():
    pairs = embeddings([[[0.5, 0.4]], [[0.4, 0.5]], [[0.3, 0.3]], [[0.2, 0.1]], [[0.2, -0.9]]])
    found = compositional_metrics(*pairs, ["swap", "swap", "swap", "add", "add"])
    assert found["accuracy"] == pytest.approx(60)
    assert found["swap_accuracy"] == pytest.approx(100 / 3), "a tie is wrong"
    assert found["add_accuracy"] == 100
    assert found["mean_accuracy"] == pytest.approx((100 / 3 + 100) / 2)
    assert (found["accuracy_low"], found["accuracy_high"]) == pytest.approx(wilson(3, 5))
    assert (found["swap_accuracy_low"], found["swap_accuracy_high"]) == pytest.approx(wilson(1, 3))


# similarities of image 0, then of image 1, with captions 0 and 1
WINOGROUND = {
    "all right": ([[0.9, 0.1], [0.2, 0.8]], (1, 1, 1)),
    "image 1 is closer to everything": ([[0.5, 0.4], [0.6, 0.9]], (1, 0, 0)),
    "caption 0 is closer to everything": ([[0.9, 0.5], [0.7, 0.6]], (0, 1, 0)),
    "all wrong": ([[0.1, 0.9], [0.8, 0.2]], (0, 0, 0)),
    "all the same": ([[0.5, 0.5], [0.5, 0.5]], (0, 0, 0)),
    "a tie of the captions of image 0": ([[0.5, 0.5], [0.1, 0.9]], (0, 1, 0)),
    "a tie of the images of caption 0": ([[0.5, 0.1], [0.5, 0.9]], (1, 0, 0)),
}


@pytest.mark.parametrize("case", WINOGROUND)
def test_scores_of_two_images(case: str):
    similarity, expected = WINOGROUND[case]
    found = compositional_metrics(*embeddings([similarity]), ["Object"])
    names = [f"{name}_score" for name in ("text", "image", "group")]
    assert tuple(found[name] / 100 for name in names) == expected
    assert tuple(found[f"Object_{name}"] / 100 for name in names) == expected
    assert "mean_accuracy" not in found
