"""The losses match open_clip and loops that follow the definitions, and are finite at their limits."""

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from open_clip.loss import ClipLoss, SigLipLoss
from torch import Tensor
from torch.distributions import Categorical, kl_divergence

from clip_lightning import ContrastiveLoss, info_nce, siglip_loss
from clip_lightning.training import losses
from clip_lightning.training.losses import InfoNCE, Pairs, SigLIP, affinity_mimicking, share_of_prefixes

Case = tuple[Tensor, Tensor, list[int], list[int]]
Patch = pytest.MonkeyPatch
SIZES = {"count": st.integers(1, 17), "width": st.integers(1, 20), "seed": st.integers(0, 2**32 - 1)}


def unit(count: int, width: int, seed: int) -> Tensor:
    rows = torch.randn(count, width, generator=torch.Generator().manual_seed(seed))
    return F.normalize(rows, dim=-1)


def of_ranks(ranks: int, everyone: Pairs) -> list[Pairs]:
    """Return the pairs of each rank."""
    tensors = everyone.image, everyone.text, everyone.image_id, everyone.text_image_id
    return [Pairs(*part) for part in zip(*(tensor.chunk(ranks) for tensor in tensors), strict=True)]


def kept_sizes(loss: Callable[..., Tensor], *arguments: Any) -> list[int]:
    """Return the sizes of the tensors that the loss keeps for its backward pass."""
    kept: list[int] = []

    def note(tensor: Tensor) -> Tensor:
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss(*arguments)
    return kept


def value_and_gradients(loss: Callable[..., Tensor], *inputs: Tensor) -> list[Tensor]:
    leaves = [tensor.clone().requires_grad_() for tensor in inputs]
    value = loss(*leaves)
    return [value.detach(), *torch.autograd.grad(value, leaves)]


def assert_equal_but_for_rounding(ours: list[Tensor], theirs: list[Tensor], size: float = 0.0) -> None:
    """Relative to the tensor's own size, or to `size`, the terms of which a gradient near 0 is made."""
    for one, other in zip(ours, theirs, strict=True):
        assert one.dtype == other.dtype == torch.float32
        assert (one - other).norm() <= 1e-6 * max(other.norm().item(), size)


def logits_by_hand(image: Tensor, text: Tensor, scale: float) -> list[list[float]]:
    return [
        [scale * sum(x * y for x, y in zip(a, b, strict=True)) for b in text.tolist()] for a in image.tolist()
    ]


def info_nce_by_hand(image: Tensor, text: Tensor, scale: float, ids: list[int], text_ids: list[int]) -> float:
    """For each row with positives the mean of -log p over them; of these rows the mean; both ways."""

    def one_way(logits: list[list[float]], mine: list[int], others: list[int]) -> float:
        rows = []
        for row, own in zip(logits, mine, strict=True):
            total = sum(math.exp(x - max(row)) for x in row)
            minus_log_p = [math.log(total) + max(row) - x for x in row]
            positives = [p for p, other in zip(minus_log_p, others, strict=True) if other == own]
            if positives:
                rows.append(sum(positives) / len(positives))
        return sum(rows) / len(rows) if rows else 0.0

    logits = logits_by_hand(image, text, scale)
    transposed = [list(column) for column in zip(*logits, strict=True)]
    return (one_way(logits, ids, text_ids) + one_way(transposed, text_ids, ids)) / 2


def siglip_by_hand(
    image: Tensor, text: Tensor, scale: float, bias: float, ids: list[int], text_ids: list[int]
) -> float:
    total = 0.0
    for i, row in enumerate(logits_by_hand(image, text, scale)):
        for j, logit in enumerate(row):
            signed = (logit + bias) * (1 if ids[i] == text_ids[j] else -1)
            total += max(-signed, 0) + math.log1p(math.exp(-abs(signed)))
    return total / len(ids)


@st.composite
def multi_positive(draw: st.DrawFn) -> Case:
    """Draw images that repeat, with any number of captions, and captions of absent images."""
    ids = draw(st.lists(st.integers(0, 5), min_size=1, max_size=8))
    text_ids = draw(st.lists(st.integers(0, 7), min_size=1, max_size=12))
    seed = draw(st.integers(0, 2**32 - 1))
    return unit(len(ids), 4, seed), unit(len(text_ids), 4, seed + 1), ids, text_ids


@given(case=multi_positive(), scale=st.floats(0.5, 100))
@settings(max_examples=60, deadline=None)
def test_several_positives_against_loops(case: Case, scale: float) -> None:
    image, text, ids, text_ids = case
    options = {"image_id": torch.tensor(ids), "text_image_id": torch.tensor(text_ids)}
    ours = info_nce(image, text, scale, **options).item()
    assert ours == pytest.approx(info_nce_by_hand(image, text, scale, ids, text_ids), rel=1e-5, abs=1e-5)
    ours = siglip_loss(image, text, scale, -3.0, **options).item()
    assert ours == pytest.approx(siglip_by_hand(image, text, scale, -3.0, ids, text_ids), rel=1e-5, abs=1e-5)


@given(case=multi_positive(), seed=st.integers(0, 100))
@settings(max_examples=40, deadline=None)
def test_the_order_of_a_batch_does_not_matter(case: Case, seed: int) -> None:
    image, text, ids, text_ids = case[0], case[1], torch.tensor(case[2]), torch.tensor(case[3])
    torch.manual_seed(seed)
    i, j = torch.randperm(len(image)), torch.randperm(len(text))
    for loss in (InfoNCE(), InfoNCE(0.1), SigLIP()):
        scale, bias = torch.tensor(20.0), torch.tensor(-5.0)
        straight = loss(image, text, scale, bias, ids, text_ids)
        shuffled = loss(image[i], text[j], scale, bias, ids[i], text_ids[j])
        torch.testing.assert_close(shuffled, straight, rtol=1e-5, atol=1e-5)


def in_blocks(loss: Callable[..., Tensor], block: int) -> Callable[..., Tensor]:
    """The loss with at most so many similarities held at a time."""

    def wrapped(*args: Any, **options: Any) -> Tensor:
        with Patch.context() as patch:
            patch.setattr(losses, "BLOCK", block)
            return loss(*args, **options)

    return wrapped


@given(**SIZES, scale=st.floats(0.5, 100), bias=st.floats(-20, 20), block=st.integers(1, 100))
@settings(max_examples=60, deadline=None)
def test_values_and_gradients_match_open_clip_in_one_block_and_in_several(
    count: int, width: int, seed: int, scale: float, bias: float, block: int
) -> None:
    inputs = unit(count, width, seed), unit(count, width, seed + 1), torch.tensor(scale)
    wanted = value_and_gradients(ClipLoss(), *inputs)
    assert_equal_but_for_rounding(value_and_gradients(info_nce, *inputs), wanted, size=max(1, scale))
    found = value_and_gradients(in_blocks(info_nce, block), *inputs)
    # sums over several blocks round more often, which shows at large scales
    size = max(1, scale) if scale <= 5 else 5 * scale
    assert_equal_but_for_rounding(found, wanted, size=size)
    inputs = *inputs, torch.tensor(bias)
    wanted = value_and_gradients(SigLipLoss(), *inputs)
    for loss in (siglip_loss, in_blocks(siglip_loss, block)):
        assert_equal_but_for_rounding(value_and_gradients(loss, *inputs), wanted, size=max(1, scale))


@pytest.mark.parametrize("loss", [InfoNCE(0.1), SigLIP()])
def test_blocks_under_autocast_have_the_same_gradients(loss: ContrastiveLoss) -> None:
    ids = torch.arange(64) % 50

    @torch.autocast("cpu", torch.bfloat16)
    def mixed(image: Tensor, text: Tensor) -> Tensor:
        return loss(image, text, torch.tensor(100.0), torch.tensor(-10.0), ids, ids)

    inputs = unit(64, 32, 0), unit(64, 32, 1)
    plain, blocks = (value_and_gradients(form, *inputs) for form in (mixed, in_blocks(mixed, 500)))
    assert_equal_but_for_rounding(blocks, plain, size=100)
    # gradients of embeddings in bf16 are rounded once, not once for each block
    rounded = [tensor.bfloat16().float() for tensor in inputs]
    _, *exact = value_and_gradients(mixed, *rounded)
    _, *blocks = value_and_gradients(in_blocks(lambda a, b: mixed(a.bfloat16(), b.bfloat16()), 500), *rounded)
    for one, other in zip(blocks, exact, strict=True):
        assert (one - other).norm() <= 2**-9 * other.norm()


@pytest.mark.parametrize("loss", [InfoNCE(0.1), SigLIP()])
def test_only_a_block_or_the_rows_of_a_rank_are_kept(loss: ContrastiveLoss) -> None:
    image, text, ids = unit(64, 4, 0).requires_grad_(), unit(48, 4, 1), torch.arange(64)
    arguments = image, text, torch.tensor(10.0), torch.tensor(-3.0), ids, ids[:48]
    assert max(kept_sizes(in_blocks(loss, 256), *arguments)) < 64 * 48 / 4
    assert max(kept_sizes(loss, *arguments)) == 64 * 48
    everyone = Pairs(image, unit(64, 4, 1), ids, ids)
    own = Pairs(everyone.image[:16], everyone.text[:16], ids[:16], ids[:16])
    assert max(kept_sizes(loss.share, own, everyone, *arguments[2:4])) == 16 * 64


class Custom(ContrastiveLoss):
    """A custom loss that every rank computes completely."""

    def forward(
        self, image: Tensor, text: Tensor, scale: Tensor, bias: Tensor | None, *ids: Tensor
    ) -> Tensor:
        return (image @ text.T * scale).exp().mean()


class Squared(InfoNCE):
    """A custom loss that extends `InfoNCE` and is no sum over rows."""

    def forward(self, *arguments: Any) -> Tensor:
        return super().forward(*arguments) ** 2


@given(
    ranks=st.integers(1, 4),
    images=st.integers(1, 4),
    texts=st.integers(1, 5),
    seed=st.integers(0, 2**32 - 1),
    block=st.sampled_from([3, 20, 2**22]),
    data=st.data(),
)
@settings(max_examples=60, deadline=None)
def test_the_mean_over_ranks_is_the_loss(
    ranks: int, images: int, texts: int, seed: int, block: int, data: st.DataObject
) -> None:
    ids, text_ids = (
        torch.tensor(data.draw(st.lists(st.integers(0, 5), min_size=count, max_size=count)))
        for count in (ranks * images, ranks * texts)
    )
    inputs = unit(ranks * images, 4, seed), unit(ranks * texts, 4, seed + 1), torch.tensor(5.0)

    def joined(loss: ContrastiveLoss, image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
        everyone = Pairs(image, text, ids, text_ids)
        shares = [loss.share(own, everyone, scale, None) for own in of_ranks(ranks, everyone)]
        return torch.stack(shares).mean()

    for loss in (InfoNCE(), InfoNCE(0.1), SigLIP(), Custom(), Squared()):
        whole = value_and_gradients(lambda *x, loss=loss: loss(*x, None, ids, text_ids), *inputs)
        shares = value_and_gradients(in_blocks(partial(joined, loss), block), *inputs)
        assert_equal_but_for_rounding(shares, whole, size=5)


@given(case=multi_positive(), ranks=st.integers(1, 3), block=st.sampled_from([3, 2**22]))
@settings(max_examples=40, deadline=None)
def test_the_loss_of_prefixes_is_the_mean_of_the_losses(case: Case, ranks: int, block: int) -> None:
    """Each prefix is normalized again, and the mean over the ranks is the mean over the prefixes."""
    ids, text_ids = (torch.tensor(each * ranks) for each in case[2:])
    inputs = *(unit(len(each), 4, seed) for seed, each in enumerate((ids, text_ids))), torch.tensor(5.0)

    def by_hand(loss: ContrastiveLoss, image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
        pairs = [(image, text)]
        pairs += [tuple(x[:, :d] / x[:, :d].norm(dim=1, keepdim=True) for x in (image, text)) for d in (2, 3)]
        return sum(loss(*pair, scale, torch.tensor(-3.0), ids, text_ids) for pair in pairs) / 3

    def joined(loss: ContrastiveLoss, image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
        everyone = Pairs(image, text, ids, text_ids)
        own = [everyone] if ranks == 1 else of_ranks(ranks, everyone)
        bias = torch.tensor(-3.0)
        shares = [share_of_prefixes(loss, [2, 3], each, everyone, scale, bias) for each in own]
        return torch.stack(shares).mean()

    for loss in (InfoNCE(0.1), SigLIP(), Custom(), Squared()):
        wanted = value_and_gradients(partial(by_hand, loss), *inputs)
        found = value_and_gradients(in_blocks(partial(joined, loss), block), *inputs)
        assert_equal_but_for_rounding(found, wanted, size=100)


def test_ranks_under_autocast_keep_the_small_gradients_of_a_good_model() -> None:
    """The gradients of the softmax and of the positives almost cancel."""
    image = unit(128, 32, 0)
    text = F.normalize(image + 0.1 * unit(128, 32, 1), dim=-1)
    ids, scale = torch.arange(128), torch.tensor(20.0)

    def mean_over_ranks(image: Tensor, text: Tensor) -> Tensor:
        everyone = Pairs(image, text, ids, ids)
        return sum(InfoNCE().share(own, everyone, scale, None) for own in of_ranks(2, everyone)) / 2

    loss, *exact = value_and_gradients(mean_over_ranks, image, text)
    in_training = torch.autocast("cpu", torch.bfloat16)(mean_over_ranks)
    _, *mixed = value_and_gradients(in_training, image, text)
    assert loss < 0.05
    for ours, theirs in zip(mixed, exact, strict=True):
        assert (ours - theirs).norm() < 0.01 * theirs.norm()


def teacher_and_student(images: int, captions: int) -> Iterator[Pairs]:
    ids = torch.arange(images)
    owner = ids.repeat_interleave(captions)
    for width in (9, 6):
        yield Pairs(unit(images, width, width), unit(len(owner), width, width + 1), ids, owner)


@pytest.mark.parametrize(("images", "captions", "scales"), [(1, 1, (5, 5)), (4, 1, (20, 5)), (5, 3, (3, 30))])
@pytest.mark.parametrize("autocast", [False, True])
def test_affinity_mimicking_is_the_divergence_of_both_directions(
    images: int, captions: int, scales: tuple[float, float], autocast: bool
) -> None:
    """Compare with the means of torch's divergences over the texts of an image and the images of a text."""
    teacher, student = teacher_and_student(images, captions)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = affinity_mimicking(student, student, teacher, teacher, *scales)
        same = affinity_mimicking(student, student, student, student, scales[0], scales[0])
    parts = zip((student, teacher), scales, strict=True)
    q, p = (each.image.double() @ each.text.double().T * scale for each, scale in parts)
    ways = ((Categorical(logits=a), Categorical(logits=b)) for a, b in ((p, q), (p.T, q.T)))
    expected = sum(kl_divergence(*way).mean().item() for way in ways) / 2
    assert loss.item() == pytest.approx(expected, rel=1e-4, abs=1e-6)
    assert same.item() == pytest.approx(0, abs=1e-6)


def test_the_mean_over_ranks_is_the_affinity_mimicking_of_all_pairs() -> None:
    teacher, student = teacher_and_student(6, 2)

    def joined(ranks: int, image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
        everyone = Pairs(image, text, student.image_id, student.text_image_id)
        parts = zip(of_ranks(ranks, everyone), of_ranks(ranks, teacher), strict=True)
        losses = [affinity_mimicking(own, everyone, its, teacher, scale, 9.0) for own, its in parts]
        return torch.stack(losses).mean()

    inputs = student.image, student.text, torch.tensor(7.0)
    one, three = (value_and_gradients(partial(joined, ranks), *inputs) for ranks in (1, 3))
    torch.testing.assert_close(three, one, rtol=1e-5, atol=1e-6)


def test_the_loss_without_positives_is_zero() -> None:
    image, text = unit(3, 4, 0).requires_grad_(), unit(2, 4, 1)
    loss = info_nce(image, text, 10.0, image_id=torch.arange(3), text_image_id=torch.tensor([7, 8]))
    loss.backward()
    assert loss == 0
    assert image.grad is not None and not image.grad.any()


@given(**SIZES, smoothing=st.floats(0, 0.9))
@settings(max_examples=30, deadline=None)
def test_label_smoothing_matches_torch(count: int, width: int, seed: int, smoothing: float) -> None:
    image, text, target = unit(count, width, seed), unit(count, width, seed + 1), torch.arange(count)
    logits = 30 * image @ text.T
    expected = sum(F.cross_entropy(x, target, label_smoothing=smoothing) for x in (logits, logits.T)) / 2
    ours = info_nce(image, text, 30.0, label_smoothing=smoothing)
    torch.testing.assert_close(ours, torch.as_tensor(expected), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("block", [losses.BLOCK, 1000])
@pytest.mark.parametrize("loss", [InfoNCE(), InfoNCE(0.1), SigLIP()])
def test_bf16_rounds_nothing_but_embeddings(loss: ContrastiveLoss, block: int, monkeypatch: Patch) -> None:
    monkeypatch.setattr(losses, "BLOCK", block)
    image, text, ids = unit(64, 32, 0), unit(64, 32, 1), torch.arange(64)
    image = F.normalize(0.5 * image + 0.5 * text, dim=-1)
    scale, bias = torch.tensor(100.0), torch.tensor(-10.0)
    exact = loss(image, text, scale, bias, ids, ids)
    rounded = loss(image.bfloat16().float(), text.bfloat16().float(), scale, bias, ids, ids)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = loss(image.bfloat16(), text.bfloat16(), scale, bias, ids, ids)
        inside = loss(image, text, scale, bias, ids, ids)
    assert mixed.dtype == torch.float32
    assert mixed == rounded
    assert inside == exact
    torch.testing.assert_close(mixed, exact, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("loss", [InfoNCE(), InfoNCE(0.1), SigLIP()])
@pytest.mark.parametrize("scale", [100.0, 1e4])
def test_identical_and_opposite_embeddings_give_finite_numbers(loss: ContrastiveLoss, scale: float) -> None:
    same = unit(1, 8, 0).expand(16, -1)
    for text in (same, -same):
        leaves = [same.clone().requires_grad_(), text.clone().requires_grad_()]
        factor, bias = torch.tensor(scale, requires_grad=True), torch.tensor(-10.0, requires_grad=True)
        value = loss(*leaves, factor, bias, torch.arange(16), torch.arange(16))
        value.backward()
        assert value.isfinite()
        for leaf in (*leaves, factor, bias):
            assert leaf.grad is None or leaf.grad.isfinite().all()
    assert info_nce(same, same, 100.0).item() == pytest.approx(math.log(16), rel=1e-6)


def test_losses_start_at_the_values_of_the_papers() -> None:
    assert (InfoNCE().init_bias, SigLIP().init_scale, SigLIP().init_bias) == (None, 10.0, -10.0)
    assert InfoNCE().init_scale == pytest.approx(14.2857, rel=1e-4)


@pytest.mark.parametrize(
    ("image", "text", "options"),
    [
        ((3, 4), (3, 5), {}),
        ((3, 4), (2, 4), {}),
        ((12,), (3, 4), {}),
        ((3, 4), (3, 4, 1), {}),
        ((3, 4), (3, 4), {"image_id": torch.arange(2)}),
        ((3, 4), (5, 4), {"image_id": torch.arange(3)}),
        ((3, 4), (5, 4), {"image_id": torch.arange(3), "text_image_id": torch.arange(3)}),
    ],
)
def test_mismatched_shapes(image: tuple[int, ...], text: tuple[int, ...], options: dict[str, Tensor]) -> None:
    with pytest.raises(ValueError, match=r"expected image \(B, D\)"):
        info_nce(torch.zeros(image), torch.zeros(text), 1.0, **options)
