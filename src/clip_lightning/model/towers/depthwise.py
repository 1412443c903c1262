"""Depthwise convolutions on the CPU under bf16: backwards in fp32, which is up to 20 times as fast.

Their forward pass is faster in bf16; their gradients, for nearly all shapes that we tried, much slower: two
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
    """Within this context, `conv2d` of one channel a group computes its gradients in fp32.

    Only on the CPU, under bf16 autocast, and where gradients are wanted; all else stays as it is. The results
    of the forward pass are the same.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Take over what is such a convolution; hand on everything else."""
        kwargs = kwargs or {}
        if func is torch.conv2d:
            output = _depthwise(*args, **kwargs)
            if output is not None:
                return output
        return func(*args, **kwargs)


def _depthwise(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Tensor | None:
    """`torch.conv2d` of the same arguments, or None where it is not for us."""
    wanted = torch.is_grad_enabled() and (input.requires_grad or weight.requires_grad)
    bf16 = torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == torch.bfloat16
    depthwise = groups > 1 and weight.shape[1] == 1 and input.ndim == 4 and not isinstance(padding, str)
    if not (wanted and bf16 and depthwise and input.device.type == "cpu"):
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
