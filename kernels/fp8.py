"""Linear layers and convolutions in 8-bit floating point: twice the arithmetic of bf16, half its traffic. Lossy.

What they compute stands in `quantised.py`: weights as e4m3 codes with a scale an output channel, activations coded on the fly.
Here a kernel codes each token of a linear layer (its largest size, its scale, its codes: one read); a convolution's picture takes
two (the largest size of all, then the codes). The products are the kernels of `gemm` and `conv`, on codes: they multiply by the
scales before they add the bias. Hopper's tensor cores add fp8 products up in about 14 bits, so what a tile along k has summed
there is added to fp32 (`common.dot`). There is no backward: this is for drawing.

Source: Micikevicius et al. 2022 (2209.05433) for e4m3; DeepSeek-V3 (2412.19437), section 3.3.2, for the sums.

Legend: m rows of x (tokens of the batch), k width of x, n width of y; b pictures, c o channels, h w height and width, p c h w.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from sdcore.kernels import conv, gemm
from sdcore.kernels.common import FLOATS, INTERPRETED, Build, build, can_run, empty, name_of, row_stride
from sdcore.kernels.gemm import TOGETHER, Tile
from sdcore.kernels.quantised import E4M3
from torch import Tensor

ADA = (8, 9)  # compute capability of the first tensor cores that multiply fp8
TILES = (
    Tile(128, 128, 128, 8, 3, 1.0, least=89),
    Tile(128, 64, 128, 4, 4, 0.8, least=89),
    Tile(64, 64, 128, 4, 4, 0.6, least=89),
)
BLOCK, WARPS = 4096, 8  # numbers that a program codes: 16 a thread
_GRID = tl.constexpr(INTERPRETED)


# ------------------------------------------------------------------------------------------------------------- the kernels


@triton.jit
def power(top):
    """(s, 1 / s) of the least power of two s with top / s <= 448."""
    exponent = tl.maximum((top.to(tl.int32, bitcast=True) + 0x1FFFFF) >> 23, 16)
    return ((exponent - 8) << 23).to(tl.float32, bitcast=True), ((262 - exponent) << 23).to(tl.float32, bitcast=True)


@triton.jit
def to_e4m3(y):
    """Numbers of at most 448 to the nearest codes, ties to even. The interpreter's cast is right only where nothing is rounded,
    so there they are put on the grid of the codes first."""
    if _GRID:
        bits = y.to(tl.int32, bitcast=True)
        normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) & -0x100000).to(tl.float32, bitcast=True)
        small = (y + 24576.0) - 24576.0  # below 2^-6 the grid is 2^-9, which is what fp32 has at 1.5 * 2^14
        y = tl.where(tl.abs(y) < 0.015625, small, normal)
    return y.to(tl.float8e4nv)


@triton.jit
def encode_rows(x, codes, scale, k, stride_x, WIDTH: tl.constexpr):
    """Codes and scale of one row, all of it at once."""
    row, column = tl.program_id(0).to(tl.int64), tl.arange(0, WIDTH)
    value = tl.load(x + row * stride_x + column, column < k, 0.0).to(tl.float32)
    s, inverse = power(tl.max(tl.abs(value), 0))
    tl.store(codes + row * k + column, to_e4m3(value * inverse), column < k)
    tl.store(scale + row, s)


@triton.jit
def tops(x, top, p, BLOCK: tl.constexpr):
    """The largest size in each picture, as the bits of fp32: those of positive numbers are in the order of the numbers."""
    picture, at = tl.program_id(1).to(tl.int64), tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + picture * p + at, at < p, 0.0).to(tl.float32)
    tl.atomic_max(top + picture, tl.max(tl.abs(value), 0).to(tl.int32, bitcast=True))


@triton.jit
def encode_pictures(x, top, codes, scale, p, BLOCK: tl.constexpr):
    """Codes of a part of a picture, and its scale."""
    picture, at = tl.program_id(1).to(tl.int64), tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + picture * p + at, at < p, 0.0).to(tl.float32)
    s, inverse = power(tl.load(top + picture).to(tl.float32, bitcast=True))
    tl.store(codes + picture * p + at, to_e4m3(value * inverse), at < p)
    tl.store(scale + picture, s)


# ----------------------------------------------------------------------------------------------------------------- launchers


def coded_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """`quantised.encode(x, -1)` by a kernel: codes [..., k] contiguous, scales [m]."""
    k = x.shape[-1]
    m = x.numel() // k
    codes, scale = torch.empty(x.shape, dtype=E4M3, device=x.device), empty((m,), x, torch.float32)
    encode_rows[(m,)](x, codes, scale, k, row_stride(x), triton.next_power_of_2(k), num_warps=WARPS)
    return codes, scale


def coded_pictures(x: Tensor) -> tuple[Tensor, Tensor]:
    """`quantised.encode(x, (1, 2, 3))` by kernels, for pictures channels last: codes likewise, scales [b]."""
    b, p = len(x), x[0].numel()
    codes, scale = torch.empty_like(x, dtype=E4M3), empty((b,), x, torch.float32)
    top = torch.zeros(b, dtype=torch.int32, device=x.device)
    grid = (triton.cdiv(p, BLOCK), b)
    tops[grid](x, top, p, BLOCK, num_warps=WARPS)
    encode_pictures[grid](x, top, codes, scale, p, BLOCK, num_warps=WARPS)
    return codes, scale


@torch.library.custom_op("sdcore::fp8_linear", mutates_args=())
def linear_forward(x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    n, k = codes.shape
    m = x.numel() // k
    y = empty((*x.shape[:-1], n), x)
    seen, scale_x = coded_rows(x)
    tile = gemm.choose(m, n, TILES, gemm.processors_of(x))
    grid = (triton.cdiv(m, tile.m) * triton.cdiv(n, tile.n),)
    gemm.gemm_forward[grid](
        seen, codes, y if bias is None else bias, y, y, scale_x, scale, m, n, k, k, n,
        BIAS=bias is not None, RESIDUAL=False, GATED=False, SCALED=True, WHOLE=k % tile.k == 0,
        **tile.constants, TOGETHER=TOGETHER, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return y


@linear_forward.register_fake
def _(x, codes, scale, bias):
    return x.new_empty((*x.shape[:-1], len(codes)))


@torch.library.custom_op("sdcore::fp8_conv", mutates_args=())
def conv_forward(x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None, stride: int) -> Tensor:
    seen, scale_x = coded_pictures(x)
    return conv.launch(seen, codes, bias, None, None, stride, 1, (scale_x, scale), x.dtype, TILES)


@conv_forward.register_fake
def _(x, codes, scale, bias, stride):
    (b, _, h, w), o = x.shape, len(codes)
    shape = (b, o, (h - 1) // stride + 1, (w - 1) // stride + 1)
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


def fp8_linear(x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """`quantised.linear` in two kernels; x and bias in fp16, bf16 or fp32, rows of x at equal distances."""
    return linear_forward(x, codes, scale, bias)


def fp8_conv(x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None = None, stride: int = 1) -> Tensor:
    """`quantised.convolve` in three kernels; x and codes channels last, x and bias in fp16, bf16 or fp32."""
    return conv_forward(x, codes, scale, bias, stride)


def can_multiply(x: Tensor) -> bool:
    """Whether the device of x multiplies fp8: from Ada (sm_89) on, or the interpreter."""
    return can_run(x) and x.dtype in FLOATS and (not x.is_cuda or torch.cuda.get_device_capability(x.device) >= ADA)


def accepts_linear(x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None = None) -> bool:
    """A device that multiplies fp8, tokens that a program can hold, a contiguous weight."""
    n, k = codes.shape
    return (
        can_multiply(x)
        and x.shape[-1] == k
        and k <= 2**14
        and x.numel() > 0
        and row_stride(x) is not None
        and (codes.dtype, scale.dtype) == (E4M3, torch.float32)
        and codes.is_contiguous()
        and scale.is_contiguous()
        and codes.numel() < 2**31
        and (bias is None or (bias.shape == (n,) and bias.dtype == x.dtype and bias.is_contiguous()))
    )


def accepts_conv(x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None = None, stride: int = 1) -> bool:
    """A device that multiplies fp8, 3 x 3 taps on at least 16 channels, channels last."""
    return (
        can_multiply(x)
        and codes.shape[1:] == (x.shape[1], 3, 3)
        and x.shape[1] >= 16
        and x.is_contiguous(memory_format=torch.channels_last)
        and (codes.dtype, scale.dtype) == (E4M3, torch.float32)
        and codes.is_contiguous(memory_format=torch.channels_last)
        and scale.is_contiguous()
        and 0 < x.numel() // len(x) < 2**31
        and (bias is None or (bias.shape == codes.shape[:1] and bias.dtype == x.dtype and bias.is_contiguous()))
    )


fp8_linear.accepts = accepts_linear  # type: ignore[attr-defined]
fp8_conv.accepts = accepts_conv  # type: ignore[attr-defined]


def scaled_mm(x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """`quantised.linear` with the product by cuBLAS. Not yet run: it needs a GPU."""
    seen, scale_x = coded_rows(x)
    y = torch._scaled_mm(
        seen.flatten(0, -2), codes.T, scale_x[:, None], scale[None], bias=bias, out_dtype=x.dtype, use_fast_accum=False
    )
    return y.view(*x.shape[:-1], len(codes))


def accepts_scaled_mm(x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None = None) -> bool:
    """What PyTorch takes with a scale a row: results in bf16, on Hopper and later."""
    on_hopper = x.is_cuda and torch.cuda.get_device_capability(x.device) >= (9, 0)
    whole = all(n % 16 == 0 for n in codes.shape)
    return on_hopper and x.dtype == torch.bfloat16 and whole and accepts_linear(x, codes, scale, bias)


scaled_mm.accepts = accepts_scaled_mm  # type: ignore[attr-defined]


# --------------------------------------------------------------------------------------------------------------- ahead of time


def builds() -> list[Build]:
    """What may be launched: the two ways to code, and the products, with a width that their tiles divide and with another."""
    found = []
    for dtype in FLOATS:
        t = name_of(dtype)
        pointers = {"x": f"*{t}", "codes": "*fp8e4nv", "scale": "*fp32", "top": "*i32"}
        how: dict[str, Any] = {"warps": WARPS, "least": 89}
        for width in (512, 2048, 8192):
            rows = {"x": f"*{t}", "codes": "*fp8e4nv", "scale": "*fp32"}
            found.append(build(f"fp8 rows {t} {width}", encode_rows, {"WIDTH": width}, **how, **rows))
        found.append(build(f"fp8 tops {t}", tops, {"BLOCK": BLOCK}, **how, x=f"*{t}", top="*i32"))
        found.append(build(f"fp8 pictures {t}", encode_pictures, {"BLOCK": BLOCK}, **how, **pointers))
        coded = dict.fromkeys(("x", "weight"), "*fp8e4nv") | dict.fromkeys(("scale_x", "scale_w"), "*fp32")
        coded |= dict.fromkeys(("bias", "residual", "y"), f"*{t}")
        for tile in TILES:
            size = f"{tile.m}x{tile.n}x{tile.k}"
            own: dict[str, Any] = {"warps": tile.warps, "stages": tile.stages, "least": tile.least}
            own |= {"expects": ("wgmma.mma_async",)}
            shared = {"BIAS": True, "RESIDUAL": False, "SCALED": True, **tile.constants, "TOGETHER": TOGETHER}
            for whole in (True, False):
                part = "" if whole else " part"
                name = f"fp8 linear {t} {size}{part}"
                constants = {**shared, "GATED": False, "WHOLE": whole}
                found.append(build(name, gemm.gemm_forward, constants, odd=["m"], **own, **coded))
                constants = {**shared, "SHIFT": False, "WHOLE": whole, "TAPS": 3, "STRIDE": 1, "UP": 1}
                odd = ["b", "h", "w", "height", "width"]
                name = f"fp8 conv {t} {size}{part}"
                found.append(build(name, conv.conv_forward, constants, odd=odd, shift=f"*{t}", **own, **coded))
    return found


if __name__ == "__main__":
    from sdcore.kernels import bench

    bench.show("fp8_linear")
    bench.show("fp8_conv")
