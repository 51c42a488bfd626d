"""Linear layers and convolutions in 8-bit floating point, as definitions in PyTorch. Lossy.

A number of e4m3 has a sign, four bits of exponent and three of mantissa: eight steps from each power of two to the next, 448 at
most. So everything is divided by a scale first, and the sum of products of codes is multiplied by the scales:

    y[m, n] = (sum over k of cx[m, k] cw[n, k]) sx[m] sw[n] + bias[n]        cx = e4m3(x / sx),  cw = e4m3(W / sw)

The weight has a scale an output channel, found once a model. Activations are coded on the fly: a linear layer's with a scale a
token, a convolution's with one a picture (its taps look at many pixels, so no smaller part could leave the sum). A scale is the
least power of two that brings the largest value to 448 or below. Being a power of two it costs no digit of a floating-point
number, dividing and multiplying by it are exact, and so the codes are the same in every dtype: the only roundings are those to
e4m3 and the last one of y.

This file runs anywhere, without Triton and no faster than PyTorch's own; `fp8.py` has the kernels, for which it is the truth.

    fast = sdcore.accelerate(pipe, fp8=True)       # which layers stay as they are: `fused.replacement`; the loss: docs/engine.md

Source: Micikevicius et al. 2022 (2209.05433) for e4m3.

Legend: m rows of x (tokens of the batch), k width of x, n width of y; b pictures, c o channels, h w height and width.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from sdcore import ops

E4M3 = torch.float8_e4m3fn


def encode(x: Tensor, dims: int | tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """(codes, scales) of x: one fp32 scale, a power of two, for all numbers along `dims`, which have size 1 in the scales."""
    top = x.abs().amax(dims, keepdim=True).float().view(torch.int32)
    exponent = ((top + 0x1FFFFF) >> 23).clamp(min=16)  # 448 is 1.75 * 2^8: a mantissa above 1.75 counts as 2
    scale = ((exponent - 8) << 23).view(torch.float32)
    return (x.float() / scale).to(E4M3), scale


def decode(codes: Tensor, scale: Tensor) -> Tensor:
    """The numbers that codes stand for, in the dtype of the scale, which broadcasts."""
    return codes.to(scale.dtype) * scale


def linear(x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """A linear layer on codes: x [..., k], codes [n, k] and scale [n] of the weight, bias [n] -> [..., n]."""
    return F.linear(decode(*encode(x, -1)).to(x.dtype), decode(codes, scale[:, None]).to(x.dtype), bias)


def convolve(x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None = None, stride: int = 1) -> Tensor:
    """A convolution on codes, with padding 1.

    x [b, c, h, w], codes [o, c, 3, 3] and scale [o] of the weight, bias [o] -> [b, o, h', w'].
    """
    seen, weight = decode(*encode(x, (1, 2, 3))), decode(codes, scale[:, None, None, None])
    return F.conv2d(seen.to(x.dtype), weight.to(x.dtype), bias, stride, padding=1)


class Weight(NamedTuple):
    """A weight [o, ...] as codes of its shape and layout, and a scale an output channel [o]."""

    codes: Tensor
    scale: Tensor


def keep(weight: Tensor) -> Weight:
    """A weight of a linear layer or a convolution, coded."""
    codes, scale = encode(weight, tuple(range(1, weight.ndim)))
    return Weight(codes, scale.flatten())


class Lossy(NamedTuple):
    """`products.linear` and `products.conv` by way of codes; what follows the product is done as it is there."""

    by_linear: Callable[..., Tensor] = linear  # who runs `linear`
    by_conv: Callable[..., Tensor] = convolve  # and `convolve`

    def linear(
        self, x: Tensor, weight: Weight, bias: Tensor | None = None, residual: Tensor | None = None, gated: bool = False
    ) -> Tensor:
        y = self.by_linear(x, *weight, bias)
        y = ops.geglu(y) if gated else y
        return y if residual is None else y + residual

    def conv(
        self, x: Tensor, weight: Weight, bias: Tensor | None = None, shift: Tensor | None = None,
        residual: Tensor | None = None, stride: int = 1, padding: int = 1,
    ) -> Tensor:  # fmt: skip
        y = self.by_conv(x, *weight, bias, stride)
        y = y if shift is None else y + shift
        return y if residual is None else y + residual
