"""True recall against values computed by hand and a loop; where it is the hit rate, and where it is not."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from clip_lightning import retrieval_metrics
from clip_lightning.evaluation.retrieval import true_recall


def test_by_hand():
    # scores of the first picture 0.9, 0.8, 0.1 | 0.85, 0; its own captions are at the ranks 1, 3 and 4
    image = torch.eye(2)
    text = torch.tensor([[0.9, 0.0], [0.8, 0.0], [0.1, 0.0], [0.85, 0.5], [0.0, 0.7]])
    found = true_recall(image, text, torch.tensor([0, 0, 0, 1, 1]), ks=(1, 2, 3, 4))
    # the second picture's own are at the ranks 1 and 2
    assert found == pytest.approx(
        {
            "image_to_text_true_recall@1": 100 * (1 / 3 + 1 / 2) / 2,
            "image_to_text_true_recall@2": 100 * (1 / 3 + 1) / 2,
            "image_to_text_true_recall@3": 100 * (2 / 3 + 1) / 2,
            "image_to_text_true_recall@4": 100.0,
        }
    )


def test_ties_count_against_the_model():
    image, text = torch.eye(2), torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 1.0]])
    # the first picture's two captions tie with one of the other's: ranks 2 and 3; images without captions
    # are not asked
    found = true_recall(torch.cat([image, image[:1]]), text, torch.tensor([0, 0, 1]), ks=(1, 2, 3))
    assert list(found.values()) == [100 * (0 + 1) / 2, 100 * (0.5 + 1) / 2, 100.0]


@pytest.mark.parametrize("captions", [1, 4])
def test_a_loop(captions: int):
    generator = torch.Generator().manual_seed(0)
    image = F.normalize(torch.randn(30, 6, generator=generator), dim=1)
    text = F.normalize(torch.randn(30 * captions, 6, generator=generator), dim=1)
    owner = torch.arange(30).repeat_interleave(captions)[torch.randperm(len(text), generator=generator)]
    found = true_recall(image, text, owner, chunk_size=7)
    for k in (1, 5, 10):
        shares = []
        for row in range(30):
            order = (text @ image[row]).argsort(descending=True)[:k]
            shares.append((owner[order] == row).sum().item() / captions)
        assert found[f"image_to_text_true_recall@{k}"] == pytest.approx(100 * sum(shares) / 30)
    hits = retrieval_metrics(image, text, owner)
    same = [
        found[f"image_to_text_true_recall@{k}"] == pytest.approx(hits[f"image_to_text_R@{k}"])
        for k in (1, 5, 10)
    ]
    assert all(same) == (captions == 1)
