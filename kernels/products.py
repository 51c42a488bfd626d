"""Products with weights, as the engine's layers ask for them, and who runs them: definitions in PyTorch, and their seam.

`sdcore.ops` is the seam for operations on activations. What takes a weight belongs to the engine (an adapter on it would be lost
otherwise), and so has a seam of its own: a layer of `fused.py` holds a `Products` and calls what stands there. What PyTorch
would run as further kernels behind a product (bias, GEGLU, the time's shift, the shortcut) is handed over with it:

    PyTorch      the definitions below, one kernel after the other
    kernels      `gemm`, `conv` and the four parities of `conv.upsample`, where they accept a call
    measured     whichever of both was measured to be faster for the shape (`choice.Choice`)

`keep` makes of a weight what the products want to be given; a product of lower precision keeps a rounded one (`quantised.py`).

Legend: m rows of x, k width of x, n width of y; b batch, c o channels, h w height and width.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from sdcore.kernels.upsample_conv import upsample_conv
from torch import Tensor

from sdcore import ops


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, residual: Tensor | None = None, gated: bool = False
) -> Tensor:
    """A linear layer with what follows it.

    x [..., k], weight [n, k], bias [n], residual [..., n] -> [..., n]; gated: weight [2 n, k] and bias [2 n], values first.
    """
    y = F.linear(x, weight, bias)
    if gated:
        y = ops.geglu(y)
    return y if residual is None else y + residual


def conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    shift: Tensor | None = None,
    residual: Tensor | None = None,
    stride: int = 1,
    padding: int = 1,
) -> Tensor:
    """A convolution with what follows it: x [b, c, h, w], weight [o, c, 3, 3], bias [o], shift [b, o, 1, 1], residual like the
    result [b, o, h / stride, w / stride], halves rounded up."""
    y = F.conv2d(x, weight, bias, stride, padding)
    if shift is not None:
        y = y + shift
    return y if residual is None else y + residual


@dataclass(frozen=True)
class Products:
    """Who runs the products of a model's layers."""

    linear: Callable[..., Tensor] = linear
    conv: Callable[..., Tensor] = conv
    upsample: Callable[..., Tensor] = upsample_conv
    keep: Callable[[Tensor], Any] = lambda weight: weight  # a weight [o, ...] -> what `linear` and `conv` are given
    winograd: bool = True  # whether convolutions in fp32 on a CPU are `winograd`'s
    asks: tuple[Callable, ...] = ()  # whom these ask in turn
    spares: "Products | None" = None  # where these lose precision: who runs what must not

    @property
    def exact(self) -> "Products":
        """Those that lose nothing."""
        return self.spares or self

    @property
    def runs(self) -> tuple[Callable, ...]:
        """All of them, for a table."""
        return self.linear, self.conv, self.upsample, *self.asks


PYTORCH = Products()


def where_accepted(kernel: Callable[..., Tensor], otherwise: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A kernel where its `accepts` says so, something else where not."""

    def run(*args: Any, **options: Any) -> Tensor:
        return (kernel if kernel.accepts(*args, **options) else otherwise)(*args, **options)  # type: ignore[attr-defined]

    return run
