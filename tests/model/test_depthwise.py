"""Depthwise convolutions: the same forward pass, gradients nearer to the exact ones, nothing else touched."""

from typing import Any
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from clip_lightning.model.towers import ImageTower
from clip_lightning.model.towers.depthwise import DepthwiseBackwardInFloat32, _Depthwise

BF16 = torch.bfloat16


def run(
    *, ours: bool, exact: bool = False, bias: bool = True, filters: int = 1, **settings: Any
) -> list[Tensor]:
    """Output and gradients of input, weight and bias."""
    chance = torch.Generator().manual_seed(0)
    pixels = torch.randn(2, 6, 9, 8, generator=chance).to(BF16)
    weight = torch.randn(6 * filters, 1, 3, 3, generator=chance).to(BF16).float()
    tensors = [pixels.double() if exact else pixels.float(), weight.double() if exact else weight]
    tensors += [torch.ones_like(tensors[1][:, 0, 0, 0])] if bias else []
    tensors = [tensor.requires_grad_() for tensor in tensors]
    context = DepthwiseBackwardInFloat32() if ours else torch.enable_grad()
    with torch.autocast("cpu", BF16, enabled=not exact), context:
        layer = nn.Conv2d(6, 6 * filters, 3, groups=6, bias=bias, **settings)
        output = functional_call(layer, dict(zip(("weight", "bias"), tensors[1:], strict=False)), tensors[0])
    gradient = torch.randn(output.shape, generator=chance).to(BF16)
    output.backward(gradient.to(output.dtype))
    return [output.detach(), *(tensor.grad for tensor in tensors if tensor.grad is not None)]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    "settings",
    [{}, {"stride": 2}, {"stride": (2, 1), "padding": (1, 2)}, {"padding": 2, "dilation": 2}, {"filters": 2}],
)
def test_the_values_of_conv2d(settings: dict[str, Any], bias: bool) -> None:
    ours, torchs, exact = (run(bias=bias, **settings, **way) for way in
                           ({"ours": True}, {"ours": False}, {"ours": False, "exact": True}))  # fmt: skip
    assert len(ours) == len(torchs) == 3 + bias
    assert [tensor.dtype for tensor in ours] == [tensor.dtype for tensor in torchs]
    assert torch.equal(ours[0], torchs[0])
    for own, other, truth in zip(ours[1:], torchs[1:], exact[1:], strict=True):
        error, allowed = (own - truth).abs().max(), (other - truth).abs().max()
        assert error <= max(allowed, 4e-3 * truth.abs().max())


def calls(monkeypatch: pytest.MonkeyPatch) -> Mock:
    """Counts the convolutions that we take over from now on."""
    spy = Mock(wraps=_Depthwise.apply)
    monkeypatch.setattr(_Depthwise, "apply", spy)
    return spy


def test_an_image_tower_uses_it_where_it_is_trained(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = calls(monkeypatch)
    tower = ImageTower.from_name("random:tf_efficientnet_lite0", 32)
    depthwise = [m for m in tower.modules() if isinstance(m, nn.Conv2d) and m.groups == m.in_channels > 1]
    pixels = torch.zeros(2, 3, 32, 32, dtype=torch.uint8)
    tower(pixels)
    assert not seen.called  # fp32
    with torch.autocast("cpu", BF16):
        with torch.no_grad():
            tower(pixels)
        assert not seen.called  # no gradients wanted
        tower(pixels).sum().backward()
        assert seen.call_count == len(depthwise) == 16
        tower.freeze()(pixels)
    assert seen.call_count == 16
    for module in depthwise:
        assert module.weight.grad is not None and module.weight.grad.dtype == torch.float32


@pytest.mark.parametrize(("groups", "out"), [(1, 6), (2, 6), (3, 3)])
def test_other_convolutions_are_left_alone(groups: int, out: int, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = calls(monkeypatch)
    layer = nn.Conv2d(6, out, 3, groups=groups)
    with torch.autocast("cpu", BF16), DepthwiseBackwardInFloat32():
        layer(torch.zeros(1, 6, 8, 8)).sum().backward()
        nn.Conv2d(6, 6, 3, groups=6, padding="same")(torch.zeros(1, 6, 8, 8))
        nn.Conv2d(6, 6, 3, groups=6)(torch.zeros(6, 8, 8))
    assert not seen.called
