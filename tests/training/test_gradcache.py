"""Gradient caching and activation checkpointing have the gradients of one graph; which micro-batch fits."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from small_runs import data, trainer
from torch import Tensor, nn

from clip_lightning.model.clip import CLIP
from clip_lightning.model.towers import Tower
from clip_lightning.model.towers.open_clip import OpenCLIPImage, OpenCLIPText, build_tower
from clip_lightning.training import gradcache
from clip_lightning.training.build import HeadOptions, TowerOptions
from clip_lightning.training.gradcache import encode_in_micro_batches, largest_micro_batch, saved_bytes
from clip_lightning.training.losses import info_nce
from clip_lightning.training.module import CLIPModule

Printed = pytest.CaptureFixture[str]
MakeModule = Callable[..., CLIPModule]
MakeClip = Callable[..., CLIP]
ROWS, LENGTH = 10, 7
NAMES = ("pixel_values", "input_ids", "attention_mask")
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
def test_gradients_match_micro_batches_in_one_graph(make_clip: MakeClip, tower: str, size: int) -> None:
    if size == 1 and tower != "test_vit":
        size = 2  # one image has no statistics
    options = {"image": f"random:{tower}", "dropout": 0.3, "head": "mlp"}
    ours = gradients(make_clip(**options).train(), cached, size)
    theirs = gradients(make_clip(**options).train(), chunked, size)
    assert largest_error(ours, theirs) <= 1e-6


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
    layer = nn.Sequential(nn.Linear(64, 32), nn.GELU(), nn.Linear(32, 8), nn.Sigmoid())
    rows = torch.randn(40, 64)
    # the input, what GELU and the second layer took in, what the sigmoid gave; in fp32, without the weights
    assert saved_bytes(layer, [rows], layer) == 40 * (64 + 32 + 32 + 8) * 4
    micro = saved_bytes(lambda x: encode_in_micro_batches(layer, (x,), 4, layer), [rows], layer)
    assert micro < saved_bytes(layer, [rows], layer) * 0.7


ON_GPU = pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))


@pytest.mark.parametrize("device", ["cpu", ON_GPU])
@pytest.mark.parametrize("precision", [None, torch.bfloat16])
def test_auto_halves_the_batch_until_it_fits_and_changes_nothing(
    make_clip: MakeClip, precision: torch.dtype | None, monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    make = {"image": "random:test_resnet", "dropout": 0.3}
    clip = make_clip(**make).train().to(device)
    before = {name: tensor.clone() for name, tensor in clip.state_dict().items()}
    chance = torch.get_rng_state()
    rows = {name: x.repeat(4, *[1] * (x.ndim - 1)).to(device) for name, x in zip(NAMES, batch(), strict=True)}
    strategy = SimpleNamespace(root_device=torch.device(device), reduce=lambda size, reduce_op: size)

    def found(available: int, ranks: int = 1) -> int | None:
        monkeypatch.setattr(gradcache.psutil, "virtual_memory", lambda: SimpleNamespace(available=available))
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (available, available))
        trainer: Any = SimpleNamespace(strategy=strategy, num_devices=ranks, is_global_zero=False)
        with torch.autocast(device, precision, enabled=precision is not None):
            return largest_micro_batch(clip, rows, trainer)

    sizes = {available: found(available) for available in (round(2 ** (k / 4)) for k in range(60, 120))}
    assert set(sizes.values()) == {40, 20, 10, 5}
    assert [*sizes.values()] == sorted(sizes.values())
    needed = next(available for available, size in sizes.items() if size == 40)
    assert found(4 * needed, ranks=4) == 40
    assert (found(4 * needed, ranks=8) == 40) == (device == "cuda"), "ranks share the memory of a machine"
    reserved = 6 * sum(p.nbytes for p in clip.parameters())
    assert found(reserved) == 5, "gradients and moments have no room beside activations"
    clip.freeze("both")
    assert found(2**40) is None
    clip.freeze("none")

    assert torch.equal(torch.get_rng_state(), chance)
    assert all(p.grad is None for p in clip.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in clip.state_dict().items())


def test_auto_in_training(make_module: MakeModule, scenes: Path, tmp_path: Path, capsys: Printed) -> None:
    steps = []
    for size in ("auto", 8):
        module = make_module(freeze="none", micro_batch_size=size, heads=HeadOptions(16, dropout=0.2))
        trainer(tmp_path, max_steps=1, limit_val_batches=0).fit(module, data(module, scenes))
        assert module.micro_batch_size == 8
        steps.append(module.state_dict())
    assert "--model.micro_batch_size auto: 8 of 8 rows at a time\n" in capsys.readouterr().err
    assert all(torch.equal(tensor, steps[1][name]) for name, tensor in steps[0].items())


# activation checkpointing


@pytest.mark.parametrize("image", ["random:test_vit", "random:test_convnext"])
def test_the_same_gradients_with_less_in_memory(make_clip: MakeClip, image: str) -> None:
    clips = [make_clip(image).train() for _ in range(2)]
    for tower in (clips[1].image_tower, clips[1].text_tower):
        tower.checkpoint_activations()
    plain, again = (gradients(clip, whole, ROWS) for clip in clips)
    assert plain.keys() == again.keys()
    assert all(torch.equal(gradient, again[name]) for name, gradient in plain.items())
    pixels, *tokens = batch()
    for kind, inputs in (("image", [pixels]), ("text", tokens)):
        much, little = (saved_bytes(getattr(clip, f"encode_{kind}"), inputs, clip) for clip in clips)
        assert little < 0.7 * much


def test_activation_checkpointing_of_open_clip_towers() -> None:
    vision = {"layers": 2, "width": 32, "patch_size": 16, "image_size": 32, "head_width": 16}
    text = {"context_length": 16, "vocab_size": 50, "width": 32, "heads": 2, "layers": 2}
    pixels, tokens = torch.randn(2, 3, 32, 32), torch.randint(1, 50, (2, 16))
    for kind, side, config, inputs in (
        (OpenCLIPImage, "vision", vision, (pixels,)),
        (OpenCLIPText, "text", text, (tokens, torch.ones_like(tokens))),
    ):
        arguments = {"embed_dim": 8, f"{side}_cfg": config, "quick_gelu": False}
        torch.manual_seed(0)
        tower = Tower()
        tower.backbone, tower.spec = kind(build_tower(side, arguments)).train(), {"name": "tiny"}
        tower.backbone(*inputs).sum().backward()
        plain = {name: p.grad.clone() for name, p in tower.named_parameters() if p.grad is not None}
        tower.zero_grad()
        tower.checkpoint_activations()
        tower.backbone(*inputs).sum().backward()
        assert plain and all(torch.equal(plain[n], p.grad) for n, p in tower.named_parameters() if n in plain)


def test_fixed_batch_norms_can_be_recomputed(make_module: MakeModule) -> None:
    towers = TowerOptions(image_size=32, activation_checkpointing=True)
    fixed = replace(towers, fix_statistics=True)
    make_module(image_tower="random:test_resnet", freeze="none", towers=fixed)
    module = make_module(freeze="image", towers=towers)
    text = module.clip.text_tower.backbone  # earlier versions of transformers have the old name only
    assert getattr(text, "is_activation_checkpointing", None) or text.is_gradient_checkpointing
    assert not module.clip.image_tower.backbone.grad_checkpointing
