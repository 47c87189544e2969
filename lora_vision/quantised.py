"""A frozen base in 8 bits: whole numbers and one scale for each output, computed with in the input's precision.

The numbers are LLM.int8()'s of the weights (Dettmers et al. 2022, arXiv 2208.07339, sec. 2.1: by row, absolute maximum
to 127). What the backward pass needs of a weight is made anew there, since autograd would keep every weight that was
opened in the forward pass (as it does with torchao 0.18's tensors). The input is not kept: frozen layers need not.

Shapes: B batch, I/O input/output features, K kernel.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.grad import conv2d_input

LEAST = 16
"""Layers with fewer channels in or out are left alone: they weigh nothing, and all the rest depends on them."""


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, numbers: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(numbers, scale)
        return F.linear(x, opened(numbers, scale, x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        numbers, scale = ctx.saved_tensors
        return gradient @ opened(numbers, scale, gradient.dtype), None, None, None


class _Conv2d(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, numbers: Tensor, scale: Tensor, bias: Tensor | None, *how: Any) -> Tensor:
        ctx.save_for_backward(numbers, scale)
        ctx.shape, ctx.how = x.shape, how
        return F.conv2d(x, opened(numbers, scale, x.dtype), bias, *how)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        numbers, scale = ctx.saved_tensors
        found = conv2d_input(ctx.shape, opened(numbers, scale, gradient.dtype), gradient, *ctx.how)
        return found, None, None, None, *(None for _ in ctx.how)


class QuantisedLinear(nn.Linear):
    """A linear layer whose weight [O, I] is int8, with scale [O, 1]. Input [..., I], output [..., O]."""

    scale: Tensor

    def forward(self, input: Tensor) -> Tensor:
        x, bias = _cast(input, self.bias)
        return cast(Tensor, _Linear.apply(x, self.weight, self.scale, bias))  # type: ignore[no-untyped-call]


class QuantisedConv2d(nn.Conv2d):
    """A convolution whose weight [O, I, K, K] is int8, with scale [O, 1, 1, 1]. Input [B, I, H, W]."""

    scale: Tensor

    def forward(self, input: Tensor) -> Tensor:
        x, bias = _cast(input, self.bias)
        how = self.stride, self.padding, self.dilation, self.groups
        return cast(Tensor, _Conv2d.apply(x, self.weight, self.scale, bias, *how))  # type: ignore[no-untyped-call]


Quantised = QuantisedLinear | QuantisedConv2d


def opened(numbers: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The weight that int8 numbers [O, ...] and their scales [O, 1, ...] stand for."""
    return numbers.to(dtype, copy=True).mul_(scale.to(dtype))


@torch.no_grad()
def quantise(model: nn.Module) -> list[str]:
    """The names of the linear layers and convolutions whose weights are int8 now; they are frozen and lose precision.

    Names of modules and ``isinstance`` stay. It is meant for training: what ``save_pretrained`` would write of it does
    not come back. Left alone is what has fewer than LEAST channels, and what is no plain layer padded with zeros.
    """
    found = []
    for name, module in model.named_modules():
        kind = {nn.Linear: QuantisedLinear, nn.Conv2d: QuantisedConv2d}.get(type(module))
        zeros = getattr(module, "padding_mode", "zeros") == "zeros" and not isinstance(
            getattr(module, "padding", 0), str
        )
        if kind is None or not zeros or min(module.weight.shape[:2]) < LEAST:
            continue
        weight = cast(Tensor, module.weight)
        kinds = torch.finfo(weight.dtype)
        least = kinds.tiny * kinds.eps  # rounds the scale up, never to 0, where fp16 grows coarse
        scale = (weight.flatten(1).abs().amax(1).float() / 127 + least).to(weight.dtype)
        scale = scale.view(-1, *(1,) * (weight.dim() - 1))
        numbers = (weight.float() / scale.float()).round_().clamp_(-127, 127).to(torch.int8)
        module.__class__ = kind
        module.weight = nn.Parameter(numbers, requires_grad=False)
        module.register_buffer("scale", scale)
        module.requires_grad_(False)
        found.append(name)
    return found


def _cast(x: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Input and bias in the dtype to compute in: autocast's, which does not look into our products, or the input's."""
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    return x, None if bias is None else bias.to(x.dtype)
