"""How alike two towers are, against definitions written out in full."""

import pytest
import torch

from clip_lightning.evaluation.alignment import NEIGHBORS, linear_cka, mutual_neighbors, nearest_neighbors


def features(width: int, seed: int, items: int = 40) -> torch.Tensor:
    return torch.randn(items, width, generator=torch.Generator().manual_seed(seed))


def test_linear_cka_is_hsic_of_centred_kernels():
    one, other = features(6, 0).double(), features(9, 1).double() + 3
    other[:, 0] += 2 * one[:, 0]
    centring = torch.eye(40).double() - 1 / 40
    k, m = (centring @ x @ x.T @ centring for x in (one, other))
    expected = (k * m).sum() / ((k * k).sum() * (m * m).sum()).sqrt()
    assert linear_cka(one, other) == pytest.approx(expected.item(), rel=1e-9)
    assert linear_cka(one.float(), other.float()) == pytest.approx(expected.item(), rel=1e-4)
    rotation = torch.linalg.qr(features(6, 2, items=6).double())[0]
    assert linear_cka(one, 5 * one @ rotation + 1) == pytest.approx(1)


def test_mutual_neighbours_are_counted_without_the_item_itself():
    one, other = features(4, 3), features(5, 4)
    shared = 0
    for item in range(40):
        found = []
        for values in (one, other):
            cosine = torch.nn.functional.cosine_similarity(values, values[item, None])
            ranked = [row for row in cosine.argsort(descending=True).tolist() if row != item]
            found.append({*ranked[:NEIGHBORS]})
        shared += len(found[0] & found[1])
    pair = nearest_neighbors(one), nearest_neighbors(other)
    assert mutual_neighbors(*pair) == pytest.approx(100 * shared / (40 * NEIGHBORS))
    assert 0 < mutual_neighbors(*pair) < 50, "about 26 by chance"
    assert mutual_neighbors(pair[0], nearest_neighbors(7 * one)) == 100
