"""The largest micro-batch that fits, and that the search for it changes nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from small_runs import data, trainer
from torch import Tensor, nn

from clip_lightning.errors import UserError
from clip_lightning.model.clip import CLIP
from clip_lightning.training import micro_batch
from clip_lightning.training.build import HeadOptions
from clip_lightning.training.gradcache import encode_in_micro_batches
from clip_lightning.training.losses import info_nce
from clip_lightning.training.micro_batch import (
    by_trying,
    largest_micro_batch,
    saved_bytes,
    sizes,
    within_budget,
)
from clip_lightning.training.module import CLIPModule

MakeClip = Callable[..., CLIP]
ROWS, LENGTH = 10, 7


def batch() -> tuple[Tensor, Tensor, Tensor]:
    chance = torch.Generator().manual_seed(3)
    pixels = torch.randint(0, 256, (ROWS, 3, 32, 32), generator=chance, dtype=torch.uint8)
    ids = torch.randint(5, 30, (ROWS, LENGTH), generator=chance)
    return pixels, ids, torch.ones_like(ids)


def test_which_sizes_are_tried() -> None:
    assert sizes(128) == [8, 16, 32, 64, 128]
    assert sizes(100) == [8, 16, 32, 64, 100]
    assert (sizes(8), sizes(9), sizes(3)) == ([8], [8, 9], [3])


@pytest.mark.parametrize(
    ("room", "expected"), [(1000, 100), (100, 100), (99, 32), (40, 16), (16, 8), (8, 8), (7, 0)]
)
def test_half_of_the_largest_size_that_fits_is_used(room: int, expected: int) -> None:
    tried = []

    def run(size: int) -> None:
        tried.append(size)
        if size > room:
            raise torch.OutOfMemoryError("as a GPU does")

    assert by_trying(run, 100) == expected
    assert tried == sizes(100)[: len(tried)]
    with pytest.raises(RuntimeError, match="another"):
        by_trying(lambda size: (_ for _ in ()).throw(RuntimeError("another mistake")), 100)


@pytest.mark.parametrize(
    ("budget", "expected"),
    [(10_100, 100), (10_099, 64), (7_000, 64), (6_500, 64), (6_499, 32), (900, 8), (899, 0)],
)
def test_the_largest_size_within_a_budget_is_used(budget: int, expected: int) -> None:
    """A graph of 100 bytes, and 100 more a row."""
    assert within_budget(lambda rows: 100 + 100 * rows, 100, budget) == expected


def test_saved_bytes_are_those_of_the_activations() -> None:
    layer = nn.Sequential(nn.Linear(64, 32), nn.GELU(), nn.Linear(32, 8), nn.Sigmoid())
    rows = torch.zeros(40, 64)
    # the input, what GELU and the second layer took in, what the sigmoid gave; in fp32, without the weights
    assert saved_bytes(lambda size: layer(rows[:size].clone()), 10, layer) == 10 * (64 + 32 + 32 + 8) * 4


def encode_both(clip: CLIP) -> Callable[[int], Tensor]:
    pixels, *tokens = batch()
    return lambda size: torch.cat(
        [clip.encode_image(pixels[:size]), clip.encode_text(*(x[:size] for x in tokens))]
    )


@pytest.mark.parametrize("precision", [None, torch.bfloat16])
def test_the_search_for_a_size_changes_nothing(
    make_clip: MakeClip, precision: torch.dtype | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    clip = make_clip(image="random:test_resnet", dropout=0.3).train()
    before = {name: tensor.clone() for name, tensor in clip.state_dict().items()}
    chance = torch.get_rng_state()

    def found(available: int, **options: int) -> int:
        memory = type("Memory", (), {"available": available})
        monkeypatch.setattr(micro_batch.psutil, "virtual_memory", lambda: memory)
        with torch.autocast("cpu", precision, enabled=precision is not None):
            return largest_micro_batch(encode_both(clip), ROWS, clip, **options)

    assert found(2**40) == ROWS
    needed = next(size for size in (2**k for k in range(10, 40)) if found(size) == ROWS)
    assert found(needed // 2) < ROWS
    assert found(4 * needed, ranks=4) == ROWS and found(4 * needed, ranks=8) < ROWS
    assert found(2 * needed, reserve=needed) < found(4 * needed, reserve=needed) == ROWS
    assert found(0) == 0

    assert torch.equal(torch.get_rng_state(), chance)
    assert all(p.grad is None for p in clip.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in clip.state_dict().items())
    # and what is trained next is what would have been
    ours, theirs = (
        gradients(c, precision) for c in (clip, make_clip(image="random:test_resnet", dropout=0.3))
    )
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def gradients(clip: CLIP, precision: torch.dtype | None) -> dict[str, Tensor]:
    """Of one step in micro-batches, with dropout and batch norms in training mode."""
    clip.train()
    torch.manual_seed(0)
    pixels, *tokens = batch()
    with torch.autocast("cpu", precision, enabled=precision is not None):
        image = encode_in_micro_batches(clip.encode_image, (pixels,), 4, clip)
        loss = info_nce(image, clip.encode_text(*tokens), clip.scale)
    loss.backward()
    return {name: p.grad for name, p in clip.named_parameters() if p.grad is not None}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_search_for_a_size_on_a_gpu(make_clip: MakeClip) -> None:
    clip = make_clip(image="random:test_resnet", dropout=0.3).train().cuda()
    before = {name: tensor.clone() for name, tensor in clip.state_dict().items()}
    chance = torch.cuda.get_rng_state()
    pixels = batch()[0].cuda()
    assert largest_micro_batch(lambda size: clip.encode_image(pixels[:size]), ROWS, clip) == ROWS
    assert torch.equal(torch.cuda.get_rng_state(), chance)
    assert all(p.grad is None for p in clip.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in clip.state_dict().items())
    many = pixels[:1].expand(2**24, -1, -1, -1)
    fits = largest_micro_batch(lambda size: clip.encode_image(many[:size]), len(many), clip)
    assert 8 <= fits < len(many)
    clip.encode_image(many[:fits]).sum().backward()


@pytest.mark.parametrize(("available", "expected"), [(2**40, 8), (0, None)])
def test_auto_in_training(
    make_module: Callable[..., CLIPModule],
    scenes: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    available: int,
    expected: int | None,
) -> None:
    monkeypatch.setattr(
        micro_batch.psutil, "virtual_memory", lambda: type("Memory", (), {"available": available})
    )
    steps = []
    for size in ("auto", 8):
        module = make_module(freeze="none", micro_batch_size=size, heads=HeadOptions(16, dropout=0.2))
        fit = trainer(tmp_path, max_steps=1, limit_val_batches=0).fit
        if expected is None:
            with pytest.raises(UserError, match=r"micro_batch_size auto: .* no memory for 8 images"):
                fit(module, data(module, scenes))
            return
        fit(module, data(module, scenes))
        assert module.micro_batch_size == expected
        steps.append(module.state_dict())
    assert "--model.micro_batch_size auto: 8 of 8 rows at a time\n" in capsys.readouterr().err
    assert all(torch.equal(tensor, steps[1][name]) for name, tensor in steps[0].items())


@pytest.mark.parametrize("size", [0, -3, "foo", 2.5])
def test_invalid_sizes(make_module: Callable[..., CLIPModule], size: Any) -> None:
    with pytest.raises(UserError, match=rf"--model\.micro_batch_size {size}: expected 1 or more, or auto"):
        make_module(micro_batch_size=size)
