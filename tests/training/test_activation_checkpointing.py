"""Activation checkpointing: the same gradients, dropout included, with less in memory."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from clip_lightning.errors import UserError
from clip_lightning.model.clip import CLIP
from clip_lightning.training.build import TowerOptions
from clip_lightning.training.losses import info_nce
from clip_lightning.training.module import CLIPModule


def step(clip: CLIP) -> tuple[dict[str, Tensor], int]:
    """Gradients of a training step, and the numbers kept for its backward pass, each storage once."""
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    clip.train()
    torch.manual_seed(3)
    pixels = torch.randint(0, 256, (6, 3, 32, 32), dtype=torch.uint8)
    tokens = clip.tokenize([f"a {colour} circle" for colour in ("red", "blue", "green")] * 2)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        image = clip.encode_image(pixels)
        text = clip.encode_text(tokens["input_ids"], tokens["attention_mask"])
        info_nce(image, text, clip.scale).backward()
    return {name: p.grad for name, p in clip.named_parameters() if p.grad is not None}, sum(kept.values())


@pytest.mark.parametrize("image", ["random:test_vit", "random:test_convnext"])
def test_the_same_gradients_with_less_in_memory(make_clip: Callable[..., CLIP], image: str) -> None:
    plain, much = step(make_clip(image))
    clip = make_clip(image)
    for tower in (clip.image_tower, clip.text_tower):
        tower.checkpoint_activations()
    again, little = step(clip)
    assert plain.keys() == again.keys()
    for name, gradient in plain.items():
        assert torch.equal(gradient, again[name]), name
    assert little < 0.7 * much


def test_activation_checkpointing_of_open_clip_towers(make_clip: Callable[..., CLIP]) -> None:
    from clip_lightning.model.towers import Tower
    from clip_lightning.model.towers.open_clip import OpenCLIPImage, OpenCLIPText

    vision = {"layers": 2, "width": 32, "patch_size": 16, "image_size": 32, "head_width": 16}
    text = {"context_length": 16, "vocab_size": 50, "width": 32, "heads": 2, "layers": 2}
    pixels, tokens = torch.randn(2, 3, 32, 32), torch.randint(1, 50, (2, 16))
    for kind, name, config, inputs in (
        (OpenCLIPImage, "vision_cfg", vision, (pixels,)),
        (OpenCLIPText, "text_cfg", text, (tokens, torch.ones_like(tokens))),
    ):
        arguments = {"embed_dim": 8, name: config, "quick_gelu": False}
        torch.manual_seed(0)
        tower = Tower()
        tower.backbone, tower.spec = kind.from_config(arguments).train(), {"name": "tiny"}
        tower.backbone(*inputs).sum().backward()
        plain = {name: p.grad.clone() for name, p in tower.named_parameters() if p.grad is not None}
        tower.zero_grad()
        tower.checkpoint_activations()
        tower.backbone(*inputs).sum().backward()
        assert plain and all(torch.equal(plain[n], p.grad) for n, p in tower.named_parameters() if n in plain)


def test_batch_norms_cannot_be_recomputed(make_module: Callable[..., CLIPModule]) -> None:
    with pytest.raises(UserError, match=r"batch-norm statistics of .*test_resnet.* twice per batch"):
        make_module(
            image_tower="random:test_resnet",
            freeze="none",
            towers=TowerOptions(image_size=32, activation_checkpointing=True),
        )


def test_fixed_statistics_and_frozen_towers(make_module: Callable[..., CLIPModule]) -> None:
    make_module(
        image_tower="random:test_resnet",
        freeze="none",
        towers=TowerOptions(image_size=32, fix_statistics=True, activation_checkpointing=True),
    )
    module = make_module(freeze="image", towers=TowerOptions(image_size=32, activation_checkpointing=True))
    assert module.clip.text_tower.backbone.is_activation_checkpointing
    assert not module.clip.image_tower.backbone.grad_checkpointing
