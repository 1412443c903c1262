"""Parameter groups, the schedule and one step, each against an independent reference."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import get_cosine_schedule_with_warmup

from clip_lightning.errors import UserError
from clip_lightning.model.clip import CLIP
from clip_lightning.training import optim
from clip_lightning.training.losses import siglip_loss
from clip_lightning.training.optim import OptimizerConfig, param_groups, rate_factor

MakeClip = Callable[..., CLIP]
CONFIG = OptimizerConfig(lr=1e-3, image_lr=2e-4, text_lr=3e-5, weight_decay=0.2)


def expected_of(name: str, parameter: torch.nn.Parameter) -> tuple[float, float]:
    """Rate and decay that a parameter should have, from its name alone."""
    rate = {"image_tower": 2e-4, "text_tower": 3e-5}.get(name.split(".")[0], 1e-3)
    norms = ("norm.weight", "norm1.weight", "norm2.weight", "LayerNorm.weight")
    own = (".bias", "logit_scale", "logit_bias", "pos_embed", "cls_token", "reg_token")
    undecayed = name.endswith((*norms, *own)) or ".bn" in name or "downsample.1" in name
    assert undecayed or parameter.ndim >= 2, f"{name}: the test does not know it"
    return rate, 0.0 if undecayed else 0.2


@pytest.mark.parametrize("tower", ["test_vit", "test_vit@cls"])
@pytest.mark.parametrize("freeze", ["none", "image", "text", "both"])
def test_each_trainable_parameter_is_in_one_group(make_clip: MakeClip, tower: str, freeze: str) -> None:
    clip = make_clip(image=f"random:{tower}", head="mlp", init_bias=-10.0)
    clip.freeze(freeze)  # type: ignore[arg-type]
    groups = param_groups(clip, CONFIG)
    placed = {id(p): (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}
    assert len(placed) == sum(len(group["params"]) for group in groups)
    expected = {id(p): expected_of(n, p) for n, p in clip.named_parameters() if p.requires_grad}
    assert placed == expected
    assert all(group["params"] for group in groups)
    names = [group["name"] for group in groups]
    assert len(set(names)) == len(names)
    for part in ("image", "text"):
        assert (f"{part}_tower" in names) == (freeze not in (part, "both"))
    assert {"heads", "heads_no_decay"} <= set(names)


def test_rates_fall_from_layer_to_layer(make_clip: MakeClip) -> None:
    clip = make_clip(image="random:resnet18")
    groups = param_groups(clip, replace(CONFIG, layer_decay=0.5))
    rates = {id(p): group["lr"] for group in groups for p in group["params"]}
    placed = {name: rates[id(p)] for name, p in clip.named_parameters()}
    assert len(rates) == len(placed) == sum(len(group["params"]) for group in groups)
    assert placed["image_tower.backbone.layer4.1.conv2.weight"] == 2e-4
    assert placed["image_tower.backbone.layer4.0.conv2.weight"] == 1e-4
    assert placed["image_tower.backbone.conv1.weight"] == 2e-4 / 2**8
    assert placed["text_tower.backbone.encoder.layer.1.output.dense.weight"] == 3e-5
    assert placed["text_tower.backbone.embeddings.word_embeddings.weight"] == 3e-5 / 4
    assert placed["heads.text.1.weight"] == placed["logit_scale"] == 1e-3


def test_layers_below_the_threshold_are_frozen(make_clip: MakeClip) -> None:
    clip = make_clip(image="random:resnet18")
    config = replace(CONFIG, layer_decay=0.5, freeze_below=0.25)
    optim.freeze_lower_layers(clip, config)
    trained = {name for name, p in clip.named_parameters() if p.requires_grad}
    image = {".".join(name.split(".")[2:4]) for name in trained if name.startswith("image_tower")}
    assert image == {"layer3.1", "layer4.0", "layer4.1"}  # fractions of 1/4, 1/2 and 1
    assert "text_tower.backbone.embeddings.word_embeddings.weight" in trained  # 1/4
    grouped = {id(p) for group in param_groups(clip, config) for p in group["params"]}
    assert grouped == {id(p) for p in clip.parameters() if p.requires_grad}


def test_weights_after_one_step_by_hand(make_clip: MakeClip) -> None:
    clip = make_clip(init_bias=-10.0, init_scale=10.0).eval()
    tokens = clip.tokenize(["a large red circle", "a star above a heart", "a square"])
    image = clip.encode_image(torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0)))
    siglip_loss(image, clip.encode_text(**tokens), clip.scale, clip.logit_bias).backward()
    expected = {}
    for name, parameter in clip.named_parameters():
        rate, decay = expected_of(name, parameter)
        assert parameter.grad is not None, name
        weights, gradient = parameter.detach().double(), parameter.grad.double()
        # both running averages, corrected for their start at 0, are the first gradient and its square
        expected[name] = weights * (1 - rate * decay) - rate * gradient / (gradient.abs() + 1e-8)
    torch.optim.AdamW(param_groups(clip, CONFIG), betas=CONFIG.betas).step()
    for name, parameter in clip.named_parameters():
        found = parameter.detach().double()
        torch.testing.assert_close(found, expected[name], rtol=1e-5, atol=2e-7, msg=name)


@given(total=st.integers(1, 60), fraction=st.floats(0, 1))
def test_the_schedule_matches_transformers_shifted_by_one_in_the_warm_up(total: int, fraction: float) -> None:
    warmup = round(fraction * total)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)

    def theirs(warmup: int, step: int) -> float:
        schedule = get_cosine_schedule_with_warmup(optimizer, warmup, total)
        return schedule.lr_lambdas[0](step)

    for step in range(total):
        ours = rate_factor(step, warmup_steps=warmup, total_steps=total)
        assert 0 < ours <= 1
        assert ours == pytest.approx(theirs(warmup + 1, step + 1) if step < warmup else theirs(warmup, step))


def test_the_other_schedules_warm_up_and_then_stay_or_cool_down() -> None:
    steps = {"warmup_steps": 10, "total_steps": 100}
    for schedule in ("constant", "cooldown"):
        for step in range(10):
            assert rate_factor(step, **steps, schedule=schedule) == rate_factor(step, **steps)
        assert {rate_factor(step, **steps, schedule=schedule) for step in range(10, 81)} == {1.0}
    assert rate_factor(99, **steps, schedule="constant") == 1.0
    assert [rate_factor(step, **steps, schedule="cooldown") for step in (90, 100)] == [0.5, 0.0]


@pytest.mark.parametrize("name", ["muon", "lion", "lamb", "sgd"])
def test_any_optimizer_in_timm_uses_the_rates_of_the_parts(make_clip: Callable[..., CLIP], name: str) -> None:
    clip = make_clip()
    config = OptimizerConfig(name=name, lr=0.01, image_lr=0.02, text_lr=0.03)
    optimizer = optim.build_optimizer(clip, config, fused=True)
    assert {group["lr"] for group in optimizer.param_groups} == {0.01, 0.02, 0.03}
    before = clip.heads["image"][1].weight.detach().clone()
    for parameter in clip.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert not torch.equal(before, clip.heads["image"][1].weight)


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"name": "adamm"}, "name"),
        ({"lr": math.nan}, "lr"),
        ({"image_lr": math.inf}, "image_lr"),
        ({"text_lr": -1e-9}, "text_lr"),
        ({"weight_decay": math.nan}, "weight_decay"),
        ({"layer_decay": 1.1}, "layer_decay"),
        ({"freeze_below": -0.1}, "freeze_below"),
        ({"betas": (1.0, 0.9)}, "betas"),
    ],
)
def test_values_out_of_range(options: dict[str, float], name: str) -> None:
    with pytest.raises(UserError, match=rf"--model\.optimizer\.{name} "):
        OptimizerConfig(**options)  # type: ignore[arg-type]


def test_a_resumed_optimizer_keeps_its_options_and_restores_the_moments() -> None:
    change = {"lr": 0.3, "weight_decay": 0.5, "betas": (0.5, 0.6)}

    def build(steps: int, options: dict[str, Any]) -> tuple[torch.optim.AdamW, optim.WarmupSchedule]:
        group = {"params": [torch.nn.Parameter(torch.ones(3))]}
        optimizer = torch.optim.AdamW([group], **{"lr": 0.1, "weight_decay": 0.2, **options})
        optimizer.register_load_state_dict_pre_hook(optim.keep_own_options)
        return optimizer, optim.WarmupSchedule(optimizer, lambda step: rate_factor(step, 2, steps))

    before, schedule = build(10, {})
    for _ in range(4):
        before.param_groups[0]["params"][0].grad = torch.tensor([1.0, 2.0, 3.0])
        before.step()
        schedule.step()
    after, resumed = build(20, change)
    after.load_state_dict(before.state_dict())
    resumed.load_state_dict(schedule.state_dict())
    (group,), (old,) = after.param_groups, before.param_groups
    for name in ("weight_decay", "betas"):
        assert group[name] == change[name]
    expected = 0.3 * rate_factor(4, warmup_steps=2, total_steps=20)
    assert group["lr"] == resumed.get_last_lr()[0] == expected
    assert torch.equal(after.state[group["params"][0]]["exp_avg"], before.state[old["params"][0]]["exp_avg"])
    resumed.step()
    assert group["lr"] == 0.3 * rate_factor(5, warmup_steps=2, total_steps=20)
