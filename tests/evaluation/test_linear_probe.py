"""Linear probes: the fit against the condition of its optimum, the draws by counting."""

import torch
import torch.nn.functional as F

from clip_lightning.evaluation.linear_probe import (
    count_right,
    few_shot,
    held_out,
    linear_probe,
    logistic_regression,
)


def clusters(each: int, spread: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(3).repeat_interleave(each)
    return 4 * torch.eye(3, 6)[labels] + spread * torch.randn(3 * each, 6, generator=generator), labels


def test_the_fit_is_an_optimum():
    features, labels = clusters(20)
    weight, bias = logistic_regression(features, labels, 3, penalty=0.1)
    # with the gradient of cross-entropy written out
    wrong = F.linear(features, weight, bias).softmax(1) - F.one_hot(labels)
    gradient = wrong.T @ features / len(labels) + 0.1 * weight
    assert gradient.abs().max().item() < 1e-4
    assert wrong.mean(0).abs().max().item() < 1e-4


def test_units_of_the_features_do_not_matter():
    (train, labels), (test, same) = clusters(10, spread=3.0), clusters(30, spread=3.0)
    counts = {
        count_right((train * unit + 7, labels), (test * unit + 7, same), 0.01) for unit in (1.0, 1000.0)
    }
    assert len(counts) == 1


def test_held_out_is_a_share_of_each_class():
    labels = torch.tensor([0] * 10 + [1] * 5 + [2] * 2 + [3])
    chosen = held_out(labels, 0.4)
    assert torch.bincount(labels[chosen], minlength=4).tolist() == [4, 2, 1, 0]
    assert torch.equal(chosen, held_out(labels, 0.4))


def test_a_probe_learns_what_can_be_learnt():
    train, test = clusters(20), clusters(40)
    found = linear_probe(train, test)
    assert found["linear_probe_top1"] > 90
    assert found["linear_probe_top1_low"] < found["linear_probe_top1"] < found["linear_probe_top1_high"]
    shuffled = train[0], train[1][torch.randperm(60, generator=torch.Generator().manual_seed(0))]
    assert linear_probe(shuffled, test)["linear_probe_top1"] < 70


def test_few_shots():
    train, test = clusters(4), clusters(40)
    found = few_shot(train, test, shots=(1, 4, 8), seeds=3)
    assert found.keys() == {"few_shot_1", "few_shot_1_sd", "few_shot_4"}  # of four images, four are one draw
    assert found["few_shot_1_sd"] > 0
    assert few_shot(train, test, shots=(1,), seeds=1).keys() == {"few_shot_1"}
