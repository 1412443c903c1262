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
    """A context in which convolution layers with one channel per group compute their gradients in fp32.

    This applies only on the CPU, under bf16 autocast, and if gradients are needed. The results of the forward
    pass do not change.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Replace depthwise convolutions, and pass on everything else."""
        if func is torch.conv2d and len(args) == 7:  # as layers call it
            input, weight, bias, stride, padding, dilation, groups = args
            has_gradient = torch.is_grad_enabled() and (input.requires_grad or weight.requires_grad)
            bf16 = torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == torch.bfloat16
            depthwise = groups > 1 and weight.shape[1] == 1 and input.ndim == 4 and isinstance(padding, tuple)
            if has_gradient and bf16 and depthwise and input.device.type == "cpu":
                return _Depthwise.apply(input.to(torch.bfloat16), weight, bias, (stride, padding, dilation))
        return func(*args, **(kwargs or {}))


class _Depthwise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, bias: Tensor | None, geometry: Any) -> Tensor:
        weight = weight.to(torch.bfloat16)
        ctx.save_for_backward(input, weight)
        ctx.settings = None if bias is None else list(bias.shape), *geometry
        stride, padding, dilation = geometry
        return torch.conv2d(input, weight, bias, stride, padding, dilation, groups=input.shape[1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        input, weight = ctx.saved_tensors
        d_input, d_weight, d_bias = torch.ops.aten.convolution_backward(
            gradient.float(), input.float(), weight.float(), *ctx.settings, False, [0, 0], input.shape[1],
            ctx.needs_input_grad[:3],
        )  # fmt: skip
        return d_input if d_input is None else d_input.to(input.dtype), d_weight, d_bias, None
