"""A convolution as one GEMM whose left matrix is never made, with the time shift and the residual added before it is rounded.

Channels last, a 3 x 3 convolution is a sum of nine products: the picture, moved by one of nine offsets, times that tap's [c, o]
matrix. A program owns a tile of output pixels x output channels and walks along taps and channels; which pixels a tap needs is
worked out on the way (im2col without the col), those beyond the border are loaded as zeros. Behind a residual block's first
convolution stands the addition of the time, behind the second that of the shortcut: both happen here, in registers.

    y[p] = sum over taps t of x[p stride + t - 1] W[t] + bias + shift[image] + residual[p]

The nearest upsampling with a convolution behind it (`sdcore.kernels.upsample_conv`) is the same loop with 2 x 2 taps: each of the
four parities has its own taps, looks up and left or down and right, and writes every other pixel.

There is nothing to fuse in the backward, so its convolutions are PyTorch's.

Source: Chetlur et al. 2014 (1410.0759), section 3, for the implicit GEMM.

Legend: b batch, c input channels, o output channels, h w input height and width; x [b, c, h, w] and W [o, c, 3, 3] channels
last in memory.
"""

from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from sdcore.kernels import products
from sdcore.kernels.common import FLOATS, Build, build, can_run, dot, name_of, poison_if_asked
from sdcore.kernels.gemm import TOGETHER, Tile, choose, processors_of, tile_of
from torch import Tensor

reference = products.conv  # what `conv` means
LAST = torch.channels_last
# One step smaller than those of `gemm`: where the pixels lie takes registers too.
HALF = (Tile(128, 128, 64, 8, 3, 1.0), Tile(128, 64, 64, 4, 4, 0.8), Tile(64, 64, 64, 8, 4, 0.6))
FULL = (Tile(64, 64, 32, 4, 3, 1.0),)  # fp32


@triton.jit
def conv_forward(
    x, weight, bias, shift, residual, y, scale_x, scale_w, b, h, w, c, o, height, width,
    BIAS: tl.constexpr, SHIFT: tl.constexpr, RESIDUAL: tl.constexpr, SCALED: tl.constexpr, WHOLE: tl.constexpr,
    TAPS: tl.constexpr, STRIDE: tl.constexpr, UP: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, TOGETHER: tl.constexpr,
):  # fmt: skip
    """One tile of y, of the parity that is this program's second number where UP is 2. WHOLE says that K divides c. SCALED: x
    and weight are codes, to be multiplied by a number a picture and one an output channel (fp8.py).

    height and width count the pixels of one parity: y has UP times as many each way.
    """
    m = b * height * width
    down, across = tile_of(tl.program_id(0), m, o, M, N, TOGETHER)
    parity_y, parity_x = tl.program_id(1) // UP, tl.program_id(1) % UP
    row, column, depth = down * M + tl.arange(0, M), across * N + tl.arange(0, N), tl.arange(0, K)
    image, place_y, place_x = row // (height * width), row // width % height, row % width
    first_y, first_x = place_y * STRIDE + parity_y - 1, place_x * STRIDE + parity_x - 1  # the pixel of the first tap
    picture = x + (image.to(tl.int64) * h * w * c)[:, None]
    matrix = weight + ((tl.program_id(1) * o + column % o) * (TAPS * TAPS * c))[None, :]
    blocks = tl.cdiv(c, K)
    out = tl.zeros([M, N], tl.float32)
    for step in range(TAPS * TAPS * blocks):
        tap, channel = step // blocks, step % blocks * K + depth
        pixel_y, pixel_x = first_y + tap // TAPS, first_x + tap % TAPS
        seen = (row < m) & (pixel_y >= 0) & (pixel_y < h) & (pixel_x >= 0) & (pixel_x < w)
        at = ((pixel_y * w + pixel_x) * c)[:, None] + channel[None, :]
        if WHOLE:
            a = tl.load(picture + at, seen[:, None], 0.0)
            d = tl.load(matrix + (tap * c + channel)[:, None])
        else:
            a = tl.load(picture + at, seen[:, None] & (channel < c)[None, :], 0.0)
            d = tl.load(matrix + (tap * c + channel)[:, None], (channel < c)[:, None], 0.0)
        out = dot(a, d, out)
    if SCALED:
        out *= tl.load(scale_x + image, row < m, 0.0)[:, None] * tl.load(scale_w + column, column < o, 0.0)[None, :]
    if BIAS:
        out += tl.load(bias + column, column < o, 0.0).to(tl.float32)[None, :]
    inside = (row < m)[:, None] & (column < o)[None, :]
    if SHIFT:
        out += tl.load(shift + (image * o)[:, None] + column[None, :], inside, 0.0).to(tl.float32)
    line = (image * height + place_y) * UP + parity_y
    there = (line.to(tl.int64) * (width * UP) + place_x * UP + parity_x)[:, None] * o + column[None, :]
    if RESIDUAL:
        out += tl.load(residual + there, inside, 0.0).to(tl.float32)
    tl.store(y + there, out, inside)


def launch(
    x: Tensor, weight: Tensor, bias: Tensor | None, shift: Tensor | None, residual: Tensor | None, stride: int, up: int,
    scales: tuple[Tensor, Tensor] | None = None, dtype: torch.dtype | None = None, tiles: tuple[Tile, ...] | None = None,
) -> Tensor:  # fmt: skip
    """Run the kernel: up 1 is `conv`, up 2 is `upsample_conv.convolve`, with the weights of the four parities in a row.

    Where x and weight are codes: their scales, the dtype of the result, and the ways to cut.
    """
    (b, c, h, w), o, taps = x.shape, len(weight) // up**2, weight.shape[-1]
    height, width = ((h - 1) // stride + 1, (w - 1) // stride + 1) if up == 1 else (h, w)
    y = torch.empty((b, o, height * up, width * up), dtype=dtype or x.dtype, device=x.device, memory_format=LAST)
    poison_if_asked(y)
    m = b * height * width
    tile = choose(m * up**2, o, tiles or (FULL if x.dtype == torch.float32 else HALF), processors_of(x))
    grid = (triton.cdiv(m, tile.m) * triton.cdiv(o, tile.n), up**2)
    conv_forward[grid](
        x, weight, y if bias is None else bias, y if shift is None else shift, y if residual is None else residual, y,
        *(scales or (y, y)), b, h, w, c, o, height, width,
        BIAS=bias is not None, SHIFT=shift is not None, RESIDUAL=residual is not None, SCALED=scales is not None,
        WHOLE=c % tile.k == 0, TAPS=taps, STRIDE=stride, UP=up, **tile.constants, TOGETHER=TOGETHER,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return y


@torch.library.custom_op("sdcore::conv", mutates_args=())
def forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, shift: Tensor | None, residual: Tensor | None, stride: int
) -> Tensor:
    return launch(x, weight, bias, shift, residual, stride, up=1)


@forward.register_fake
def _(x, weight, bias, shift, residual, stride):
    (b, _, h, w), o = x.shape, len(weight)
    shape = (b, o, (h - 1) // stride + 1, (w - 1) // stride + 1)
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=LAST)


def keep(ctx, inputs, output) -> None:
    """What the backward needs."""
    x, weight, _, shift, _, ctx.stride = inputs
    ctx.shape = None if shift is None else shift.shape
    ctx.save_for_backward(x, weight)


def differentiate(ctx, dy):
    """Gradients of x, W, bias, shift, residual, stride (none)."""
    x, weight = ctx.saved_tensors
    for_x, for_weight, for_bias, for_shift, for_residual, _ = ctx.needs_input_grad
    stride, wanted = [ctx.stride] * 2, [for_x, for_weight, False]
    dx, dw, _ = torch.ops.aten.convolution_backward(
        dy, x, weight, None, stride, [1, 1], [1, 1], False, [0, 0], 1, wanted
    )
    return (
        dx if for_x else None,
        dw if for_weight else None,
        dy.sum((0, 2, 3)) if for_bias else None,
        dy.sum((2, 3)).view(ctx.shape) if for_shift else None,
        dy if for_residual else None,
        None,
    )


forward.register_autograd(differentiate, setup_context=keep)


@torch.library.custom_op("sdcore::upsample_conv", mutates_args=())
def upsample_forward(x: Tensor, folded: Tensor, bias: Tensor | None) -> Tensor:
    return launch(x, folded, bias, None, None, stride=1, up=2)


@upsample_forward.register_fake
def _(x, folded, bias):
    b, _, h, w = x.shape
    shape = (b, len(folded) // 4, 2 * h, 2 * w)
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=LAST)


def upsample_keep(ctx, inputs, output) -> None:
    """What the backward needs."""
    ctx.save_for_backward(*inputs[:2])


def upsample_differentiate(ctx, dy):
    """Gradients of x, folded, bias. Those of the four parities, each in its place among zeros, are the gradient of one
    convolution with the zeros of both sides (see `upsample_conv.upsample_conv`)."""
    x, folded = ctx.saved_tensors
    for_x, for_weight, for_bias = ctx.needs_input_grad
    parts = [
        F.pad(dy[:, :, row::2, column::2], (column, 1 - column, row, 1 - row)) for row in (0, 1) for column in (0, 1)
    ]
    dx, dw, _ = torch.ops.aten.convolution_backward(
        torch.cat(parts, 1), x, folded, None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1, [for_x, for_weight, False]
    )
    return dx if for_x else None, dw if for_weight else None, dy.sum((0, 2, 3)) if for_bias else None


upsample_forward.register_autograd(upsample_differentiate, setup_context=upsample_keep)


def upsample(x: Tensor, folded: Tensor, bias: Tensor | None = None) -> Tensor:
    """`upsample_conv.upsample_conv` in one kernel: x [b, c, h, w] and folded [4 o, c, 2, 2] channels last, bias [o]."""
    return upsample_forward(x, folded, bias)


def accepts_upsample(x: Tensor, folded: Tensor, bias: Tensor | None = None) -> bool:
    """As `accepts`, for the folded weights."""
    given = [t for t in (x, folded, bias) if t is not None]
    return (
        can_run(*given)
        and x.dtype in FLOATS
        and all(t.dtype == x.dtype for t in given)
        and folded.shape[1:] == (x.shape[1], 2, 2)
        and x.shape[1] >= 16
        and x.is_contiguous(memory_format=LAST)
        and folded.is_contiguous(memory_format=LAST)
        and (bias is None or bias.is_contiguous())
        and 0 < x.numel() // len(x) < 2**31
    )


upsample.accepts = accepts_upsample  # type: ignore[attr-defined]


def conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    shift: Tensor | None = None,
    residual: Tensor | None = None,
    stride: int = 1,
    padding: int = 1,
) -> Tensor:
    """`reference` in one kernel; shapes as there, fp16, bf16 or (exact) fp32, pictures and weight channels last."""
    return forward(x, weight, bias, shift, residual, stride)


def accepts(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    shift: Tensor | None = None,
    residual: Tensor | None = None,
    stride: int = 1,
    padding: int = 1,
) -> bool:
    """3 x 3 with a padding of 1, at least 16 channels, everything channels last and of one dtype, where Triton runs."""
    given = [t for t in (x, weight, bias, shift, residual) if t is not None]
    pictures = [t for t in (x, weight, residual) if t is not None]
    b, c, h, w = x.shape
    return (
        can_run(*given)
        and x.dtype in FLOATS
        and all(t.dtype == x.dtype for t in given)
        and weight.shape[1:] == (c, 3, 3)
        and padding == 1
        and c >= 16
        and all(t.is_contiguous(memory_format=LAST) for t in pictures)
        and (bias is None or bias.is_contiguous())
        and (shift is None or (shift.shape == (b, len(weight), 1, 1) and shift.is_contiguous()))
        and 0 < x.numel() // b < 2**31
    )


conv.accepts = accepts  # type: ignore[attr-defined]


def builds() -> list[Build]:
    """What may be launched in the released models: with the time, with the shortcut, with neither, by 2, and upsampling."""
    found = []
    kinds = {
        "bias shift": (True, False, 3, 1, 1),
        "bias residual": (False, True, 3, 1, 1),
        "bias": (False, False, 3, 1, 1),
        "bias by 2": (False, False, 3, 2, 1),
        "bias upsample": (False, False, 2, 1, 2),
    }
    for dtype in FLOATS:
        t = name_of(dtype)
        pointers = dict.fromkeys(("x", "weight", "bias", "shift", "residual", "y", "scale_x", "scale_w"), f"*{t}")
        for kind, (shift, residual, taps, stride, up) in kinds.items():
            for tile in FULL if dtype == torch.float32 else HALF:
                constants: dict[str, Any] = {"BIAS": True, "SHIFT": shift, "RESIDUAL": residual, "SCALED": False}
                constants |= {
                    "WHOLE": True,
                    "TAPS": taps,
                    "STRIDE": stride,
                    "UP": up,
                    **tile.constants,
                    "TOGETHER": TOGETHER,
                }
                wgmma = () if dtype == torch.float32 else ("wgmma.mma_async",)
                odd = ["b", "h", "w", "height", "width"]
                how = {"warps": tile.warps, "stages": tile.stages, "odd": odd, "expects": wgmma}
                name = f"conv {t} {kind} {tile.m}x{tile.n}x{tile.k}"
                found.append(build(name, conv_forward, constants, **how, **pointers))
    return found


if __name__ == "__main__":
    from sdcore.kernels import bench

    bench.show("conv")
