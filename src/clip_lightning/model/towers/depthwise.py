"""Computes gradients of depthwise convolutions on the CPU in fp32, up to 20 times faster than in bf16.

In bf16, the forward pass is faster, but the backward pass is much slower for nearly all shapes: it takes two
thirds of a training step of EfficientNet-Lite0 with torch 2.15 (docs/log.md).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.overrides import TorchFunctionMode


class DepthwiseBackwardInFloat32(TorchFunctionMode):
    """A context in which `conv2d` with one channel per group computes its gradients in fp32.

    This applies only on the CPU, under bf16 autocast, and if gradients are needed. The results of the forward
    pass do not change.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Replace depthwise convolutions, and pass on everything else."""
        output = _depthwise(*args, **(kwargs or {})) if func is torch.conv2d else None
        return func(*args, **(kwargs or {})) if output is None else output


def _depthwise(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Tensor | None:
    """Return `torch.conv2d` of the same arguments, or None if the default should be used."""
    has_gradient = torch.is_grad_enabled() and (input.requires_grad or weight.requires_grad)
    bf16 = torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == torch.bfloat16
    depthwise = groups > 1 and weight.shape[1] == 1 and input.ndim == 4 and not isinstance(padding, str)
    if not (has_gradient and bf16 and depthwise and input.device.type == "cpu"):
        return None
    pairs = [[n, n] if isinstance(n, int) else list(n) for n in (stride, padding, dilation)]
    output: Tensor = _Depthwise.apply(input.to(torch.bfloat16), weight, bias, *pairs)
    return output


class _Depthwise(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        stride: list[int],
        padding: list[int],
        dilation: list[int],
    ) -> Tensor:
        weight = weight.to(torch.bfloat16)
        ctx.save_for_backward(input, weight)
        ctx.settings = None if bias is None else list(bias.shape), stride, padding, dilation
        return torch.conv2d(input, weight, bias, stride, padding, dilation, input.shape[1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        input, weight = ctx.saved_tensors
        bias_shape, stride, padding, dilation = ctx.settings
        d_input, d_weight, d_bias = torch.ops.aten.convolution_backward(
            gradient.float(), input.float(), weight.float(), bias_shape, stride, padding, dilation,
            False, [0, 0], input.shape[1], ctx.needs_input_grad[:3],
        )  # fmt: skip
        return d_input if d_input is None else d_input.to(input.dtype), d_weight, d_bias, None, None, None
