"""Gradient caching against the same micro-batches in one graph, and against one large batch."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from clip_lightning.model.clip import CLIP
from clip_lightning.training.gradcache import encode_in_micro_batches
from clip_lightning.training.losses import info_nce

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
def test_gradients_match_the_same_micro_batches_in_one_graph(
    make_clip: MakeClip, tower: str, size: int
) -> None:
    if size == 1 and tower != "test_vit":
        size = 2  # one image has no statistics
    options = {"image": f"random:{tower}", "dropout": 0.3, "head": "mlp"}
    ours = gradients(make_clip(**options).train(), cached, size)
    theirs = gradients(make_clip(**options).train(), chunked, size)
    assert largest_error(ours, theirs) <= 1e-6


def test_dropout_is_active_in_training(make_clip: MakeClip) -> None:
    clip = make_clip(dropout=0.3).train()
    tokens = batch()[1:]
    with torch.no_grad():
        assert not torch.equal(clip.encode_text(*tokens), clip.encode_text(*tokens))


@pytest.mark.parametrize("tower", ["test_vit", "test_resnet"])
def test_gradients_match_one_large_batch(make_clip: MakeClip, tower: str) -> None:
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


def test_a_frozen_tower_does_not_change(make_clip: MakeClip) -> None:
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


def test_without_gradients_or_in_one_micro_batch(make_clip: MakeClip) -> None:
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
