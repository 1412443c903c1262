"""Gradient caching against the same micro-batches in one graph, and against one large batch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn

from clip_lightning import gradcache
from clip_lightning.data.datamodule import CaptionDataModule
from clip_lightning.errors import UserError
from clip_lightning.gradcache import (
    by_trying,
    encode_in_micro_batches,
    largest_micro_batch,
    saved_bytes,
    sizes,
    within_budget,
)
from clip_lightning.losses import info_nce
from clip_lightning.model import CLIP
from clip_lightning.module import CLIPModule

MakeClip = Callable[..., CLIP]
ROWS, LENGTH = 10, 7
Run = Callable[[CLIP, Callable[..., Tensor], tuple[Tensor, ...], int], Tensor]


def batch() -> tuple[Tensor, Tensor, Tensor]:
    chance = torch.Generator().manual_seed(3)
    pixels = torch.randint(0, 256, (ROWS, 3, 32, 32), generator=chance, dtype=torch.uint8)
    ids = torch.randint(5, 30, (ROWS, LENGTH), generator=chance)
    lengths = torch.randint(1, LENGTH + 1, (ROWS, 1), generator=chance)
    return pixels, ids, (torch.arange(LENGTH) < lengths).long()


def cached(clip: CLIP, encode: Callable[..., Tensor], inputs: tuple[Tensor, ...], size: int) -> Tensor:
    return encode_in_micro_batches(encode, inputs, size, clip)


def chunked(clip: CLIP, encode: Callable[..., Tensor], inputs: tuple[Tensor, ...], size: int) -> Tensor:
    return torch.cat([encode(*(x[i : i + size] for x in inputs)) for i in range(0, ROWS, size)])


def whole(clip: CLIP, encode: Callable[..., Tensor], inputs: tuple[Tensor, ...], size: int) -> Tensor:
    return encode(*inputs)


def gradients(clip: CLIP, run: Run, size: int, precision: torch.dtype | None = None) -> dict[str, Tensor]:
    """Of every parameter, from one seed for dropout; the buffers afterwards are under their own names."""
    torch.manual_seed(7)
    pixels, *tokens = batch()
    with torch.autocast("cpu", precision, enabled=precision is not None):
        image = run(clip, clip.encode_image, (pixels,), size)
        text = run(clip, clip.encode_text, tuple(tokens), size)
        loss = info_nce(image, text, clip.scale)
    loss.backward()
    found = {name: p.grad for name, p in clip.named_parameters() if p.grad is not None}
    assert found
    return found | {f"buffer {name}": b.clone() for name, b in clip.named_buffers()} | {"loss": loss.detach()}


def largest_error(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    """Relative to the norm of all gradients together, or of the buffer."""
    assert ours.keys() == theirs.keys()
    size = torch.cat([g.flatten() for name, g in theirs.items() if not name.startswith("buffer")]).norm()
    errors = []
    for name in ours:
        norm = theirs[name].double().norm().clamp(min=1e-9) if name.startswith("buffer") else size
        errors.append(((ours[name].double() - theirs[name].double()).norm() / norm).item())
    return max(errors)


@pytest.mark.parametrize("tower", ["test_vit", "test_resnet", "test_efficientnet"])
@pytest.mark.parametrize("size", [1, 4, 5])
def test_gradients_are_those_of_the_same_chunks_in_one_graph(
    make_clip: MakeClip, tower: str, size: int
) -> None:
    if size == 1 and tower != "test_vit":
        size = 2  # one picture has no statistics
    options = {"image": f"random:{tower}", "dropout": 0.3, "head": "mlp"}
    ours = gradients(make_clip(**options).train(), cached, size)
    theirs = gradients(make_clip(**options).train(), chunked, size)
    assert largest_error(ours, theirs) <= 1e-6


def test_dropout_was_on_in_that_comparison(make_clip: MakeClip) -> None:
    clip = make_clip(dropout=0.3).train()
    tokens = batch()[1:]
    with torch.no_grad():
        assert not torch.equal(clip.encode_text(*tokens), clip.encode_text(*tokens))


@pytest.mark.parametrize("tower", ["test_vit", "test_resnet"])
def test_gradients_are_those_of_one_large_batch(make_clip: MakeClip, tower: str) -> None:
    options = {"image": f"random:{tower}"}
    ours = gradients(make_clip(**options).eval(), cached, 4)
    theirs = gradients(make_clip(**options).eval(), whole, 4)
    assert largest_error(ours, theirs) <= 2e-6


def test_batch_norm_records_each_micro_batch_once(make_clip: MakeClip) -> None:
    clips = [make_clip(image="random:test_resnet").train() for _ in range(3)]
    before = {name: b.clone() for name, b in clips[0].named_buffers()}
    gradients(clips[0], cached, 4)
    gradients(clips[1], chunked, 4)
    with torch.no_grad():
        chunked(clips[2], clips[2].encode_image, batch()[:1], 4)
    ours, in_a_graph, forward_only = (dict(clip.named_buffers()) for clip in clips)
    norms = [name for name in ours if "running_" in name or "num_batches" in name]
    assert norms
    for name in norms:
        assert torch.equal(ours[name], in_a_graph[name])
        assert torch.equal(ours[name], forward_only[name])
        assert not torch.equal(ours[name], before[name])
        if name.endswith("num_batches_tracked"):
            assert ours[name] == 3
    # the buffers are still the module's own: what is saved is what is used
    state = clips[0].state_dict()
    assert all(state[name].data_ptr() == ours[name].data_ptr() for name in norms)


def test_a_frozen_tower_stays_untouched(make_clip: MakeClip) -> None:
    clip = make_clip(image="random:test_resnet")
    clip.freeze("image")
    before = {name: tensor.clone() for name, tensor in clip.image_tower.state_dict().items()}
    found = gradients(clip.train(), cached, 4)
    assert not any(name.startswith("image_tower") for name in found)
    assert all(torch.equal(before[name], tensor) for name, tensor in clip.image_tower.state_dict().items())


def test_bf16(make_clip: MakeClip) -> None:
    ours = gradients(make_clip().train(), cached, 4, torch.bfloat16)
    theirs = gradients(make_clip().train(), chunked, 4, torch.bfloat16)
    assert largest_error(ours, theirs) <= 1e-6
    exact = gradients(make_clip().train(), cached, 4)
    assert 1e-5 < largest_error(ours, exact) < 0.2, "autocast was on, in the recomputation too"


def test_without_gradients_and_in_one_piece(make_clip: MakeClip) -> None:
    clip = make_clip().eval()
    pixels = batch()[:1]
    with torch.no_grad():
        assert torch.equal(cached(clip, clip.encode_image, pixels, 4), clip.encode_image(*pixels))
    assert torch.equal(cached(clip, clip.encode_image, pixels, ROWS), clip.encode_image(*pixels))


def test_memory_holds_the_activations_of_one_micro_batch() -> None:
    layer, held = nn.Sequential(nn.Linear(4, 4), nn.GELU(), nn.Linear(4, 2)), []
    rows = torch.randn(ROWS, 4)

    def note(tensor: Tensor) -> Tensor:
        held.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        encode_in_micro_batches(layer, (rows,), 2, layer)
        kept = sum(held)
        held.clear()
        layer(rows)
    assert kept < sum(held) / 3


def test_which_sizes_are_tried() -> None:
    assert sizes(128) == [8, 16, 32, 64, 128]
    assert sizes(100) == [8, 16, 32, 64, 100]
    assert (sizes(8), sizes(9), sizes(3)) == ([8], [8, 9], [3])


@pytest.mark.parametrize(
    ("room", "expected"), [(1000, 100), (100, 100), (99, 32), (40, 16), (16, 8), (8, 8), (7, 0)]
)
def test_trying_ends_at_half_of_what_fits(room: int, expected: int) -> None:
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
def test_a_budget_is_kept_to(budget: int, expected: int) -> None:
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
def test_looking_for_the_largest_leaves_no_trace(
    make_clip: MakeClip, precision: torch.dtype | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    clip = make_clip(image="random:test_resnet", dropout=0.3).train()
    before = {name: tensor.clone() for name, tensor in clip.state_dict().items()}
    chance = torch.get_rng_state()

    def found(available: int, **options: int) -> int:
        memory = type("Memory", (), {"available": available})
        monkeypatch.setattr(gradcache.psutil, "virtual_memory", lambda: memory)
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
    ours = gradients(clip, chunked, 4, precision)
    theirs = gradients(make_clip(image="random:test_resnet", dropout=0.3).train(), chunked, 4, precision)
    assert largest_error(ours, theirs) == 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_tries(make_clip: MakeClip) -> None:
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
        gradcache.psutil, "virtual_memory", lambda: type("Memory", (), {"available": available})
    )
    steps = []
    for size in ("auto", 8):
        module = make_module(freeze="none", micro_batch_size=size, dropout=0.2)
        data = CaptionDataModule(
            module.transform, module.tokenize, scenes, batch_size=8, num_workers=0, cache="off"
        )
        trainer = Trainer(
            accelerator="cpu", max_steps=1, logger=False, enable_checkpointing=False, limit_val_batches=0,
            enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path,
        )  # fmt: skip
        if expected is None:
            with pytest.raises(UserError, match=r"micro_batch_size auto: .* no memory for 8 pictures"):
                trainer.fit(module, datamodule=data)
            return
        trainer.fit(module, datamodule=data)
        assert module.micro_batch_size == expected
        steps.append(module.state_dict())
    assert "--model.micro_batch_size auto: 8 of 8 rows at a time\n" in capsys.readouterr().err
    assert all(torch.equal(tensor, steps[1][name]) for name, tensor in steps[0].items())


def test_auto_has_nothing_to_do_for_frozen_towers(make_module: Callable[..., CLIPModule]) -> None:
    assert make_module(freeze="both", micro_batch_size="auto")._largest_micro_batch({}) is None


@pytest.mark.parametrize("size", [0, -3, "foo", 2.5])
def test_what_is_no_size(make_module: Callable[..., CLIPModule], size: Any) -> None:
    with pytest.raises(UserError, match=rf"--model\.micro_batch_size {size}: expected 1 or more, or auto"):
        make_module(micro_batch_size=size)
