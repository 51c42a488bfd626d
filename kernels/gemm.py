"""A linear layer with what follows it done in its last breath: bias, GEGLU, residual.

The product stays in fp32 registers until everything that PyTorch would run as further kernels has been applied, and is rounded
once. What that saves is traffic: the feed-forward of one SDXL step writes and reads 6.7 GB between its projection and its GEGLU.

    y = x W^T + b                       plain
    y = (x Wv^T + bv) gelu(x Wg^T + bg)   gated: W holds the value half above the gate half; a program computes both tiles
    y = ... + residual

A program owns a tile of y and walks along k; Triton turns the loads into an asynchronous pipeline, and on Hopper the products
into wgmma. Tiles are numbered so that programs which run together share rows of x and W in the L2 cache. How large a tile is
best depends on how evenly the tiles fill the multiprocessors: `choose` estimates that.

The backward has no epilogue to fuse, so its products are PyTorch's: dx = dy W, dW = dy^T x, db = sum of dy; where the layer is
gated, the product is computed again and `sdcore.kernels.geglu` gives the gradient of both halves.

Source: the tiling is Kung & Leiserson's blocking as in every GEMM; Shazeer 2020 (2002.05202) for GEGLU.

Legend: m rows of x (tokens of the batch), k width of x, n width of y; x [m, k], W [n, k] or gated [2 n, k], y [m, n].
"""

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from sdcore.kernels import geglu, products
from sdcore.kernels.common import FLOATS, Build, build, can_run, dot, empty, name_of, row_stride
from torch import Tensor

reference = products.linear  # what `gemm` means
TOGETHER = 8  # rows of tiles that are walked column by column


@dataclass(frozen=True)
class Tile:
    """One way to cut the work: rows and columns of y, the stride along k, and how a program runs."""

    m: int
    n: int
    k: int
    warps: int
    stages: int
    rate: float  # of the best one, where all multiprocessors are busy: assumed until measured, since larger tiles load less
    least: int = 80  # compute capability whose registers hold it

    @property
    def constants(self) -> dict[str, int]:
        return {"M": self.m, "N": self.n, "K": self.k}


HALF = (
    Tile(128, 128, 64, 8, 3, 1.0),  # 128 x 256 spills where a residual is added
    Tile(128, 64, 64, 4, 4, 0.8),
    Tile(64, 64, 64, 8, 4, 0.6),
)
HALF_GATED = (  # n counts twice: value and gate
    Tile(128, 128, 64, 8, 3, 1.0, least=90),
    Tile(128, 64, 64, 8, 4, 0.9),
    Tile(64, 64, 64, 4, 4, 0.75),
)
FULL = (Tile(64, 64, 32, 8, 3, 1.0),)  # fp32 in true fp32 is not what anybody calls for speed


@triton.jit
def tile_of(program, m, n, M: tl.constexpr, N: tl.constexpr, TOGETHER: tl.constexpr):
    """Which tile a program owns: down a few rows of tiles, then on to the next column."""
    down, across = tl.cdiv(m, M), tl.cdiv(n, N)
    band = program // (TOGETHER * across)
    first = band * TOGETHER
    height = tl.minimum(down - first, TOGETHER)
    return first + program % (TOGETHER * across) % height, program % (TOGETHER * across) // height


@triton.jit
def gemm_forward(
    x, weight, bias, residual, y, scale_x, scale_w, m, n, k, stride_x, stride_residual,
    BIAS: tl.constexpr, RESIDUAL: tl.constexpr, GATED: tl.constexpr, SCALED: tl.constexpr, WHOLE: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, TOGETHER: tl.constexpr,
):  # fmt: skip
    """One tile of y. WHOLE says that K divides k, so that no load along it needs a mask. SCALED: x and weight are codes, to be
    multiplied by a number a row (fp8.py)."""
    down, across = tile_of(tl.program_id(0), m, n, M, N, TOGETHER)
    row, column, depth = down * M + tl.arange(0, M), across * N + tl.arange(0, N), tl.arange(0, K)
    # Rows and columns beyond the end begin again at the front: their products are never stored, and no mask is needed.
    x_at = x + (row % m).to(tl.int64)[:, None] * stride_x + depth[None, :]
    w_at = weight + (column % n).to(tl.int64)[None, :] * k + depth[:, None]
    g_at = w_at + n * k
    value = tl.zeros([M, N], tl.float32)
    gate = tl.zeros([M, N], tl.float32)
    for start in range(0, k, K):
        if WHOLE:
            a, b = tl.load(x_at), tl.load(w_at)
        else:
            a = tl.load(x_at, (depth < k - start)[None, :], 0.0)
            b = tl.load(w_at, (depth < k - start)[:, None], 0.0)
        value = dot(a, b, value)
        if GATED:
            b = tl.load(g_at) if WHOLE else tl.load(g_at, (depth < k - start)[:, None], 0.0)
            gate = dot(a, b, gate)
            g_at += K
        x_at += K
        w_at += K
    if SCALED:
        value *= tl.load(scale_x + row, row < m, 0.0)[:, None] * tl.load(scale_w + column, column < n, 0.0)[None, :]
    if BIAS:
        value += tl.load(bias + column, column < n, 0.0).to(tl.float32)[None, :]
        if GATED:
            gate += tl.load(bias + n + column, column < n, 0.0).to(tl.float32)[None, :]
    if GATED:
        value *= gate * geglu.normal_cdf(gate)
    inside = (row < m)[:, None] & (column < n)[None, :]
    if RESIDUAL:
        there = residual + row.to(tl.int64)[:, None] * stride_residual + column[None, :]
        value += tl.load(there, inside, 0.0).to(tl.float32)
    tl.store(y + row.to(tl.int64)[:, None] * n + column[None, :], value, inside)


def tiles(dtype: torch.dtype, gated: bool) -> tuple[Tile, ...]:
    """The ways to cut that a dtype has."""
    if dtype == torch.float32:
        return FULL
    return HALF_GATED if gated else HALF


def choose(m: int, n: int, tiles: tuple[Tile, ...], processors: int) -> Tile:
    """The tile that ends first: rounds of tiles over the multiprocessors, times the work of a tile, over its rate."""

    def time(tile: Tile) -> float:
        rounds = triton.cdiv(triton.cdiv(m, tile.m) * triton.cdiv(n, tile.n), processors)
        return rounds * tile.m * tile.n / tile.rate

    return min(tiles, key=time)


def held_by(x: Tensor, tiles: tuple[Tile, ...]) -> tuple[Tile, ...]:
    """The tiles for which the device has the registers; under the interpreter all."""
    if not x.is_cuda:
        return tiles
    major, minor = torch.cuda.get_device_capability(x.device)
    return tuple(tile for tile in tiles if tile.least <= 10 * major + minor)


def processors_of(x: Tensor) -> int:
    """Multiprocessors of the device; under the interpreter those of an H100 or H200."""
    return torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 132


@torch.library.custom_op("sdcore::gemm", mutates_args=())
def forward(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, gated: bool) -> Tensor:
    k, n = x.shape[-1], len(weight) // (1 + gated)
    m = x.numel() // k
    y = empty((*x.shape[:-1], n), x)
    tile = choose(m, n, held_by(x, tiles(x.dtype, gated)), processors_of(x))
    grid = (triton.cdiv(m, tile.m) * triton.cdiv(n, tile.n),)
    gemm_forward[grid](
        x, weight, weight if bias is None else bias, y if residual is None else residual, y, y, y, m, n, k, row_stride(x),
        n if residual is None else row_stride(residual),
        BIAS=bias is not None, RESIDUAL=residual is not None, GATED=gated, SCALED=False, WHOLE=k % tile.k == 0,
        **tile.constants, TOGETHER=TOGETHER, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return y


@forward.register_fake
def _(x, weight, bias, residual, gated):
    return x.new_empty((*x.shape[:-1], len(weight) // (1 + gated)))


def keep(ctx, inputs, output) -> None:
    """What the backward needs: x, W, and where gated the bias too, since the product is computed again."""
    x, weight, bias, _, ctx.gated = inputs
    ctx.save_for_backward(x, weight, bias if ctx.gated else None)


def differentiate(ctx, dy):
    """Gradients of x, W, bias, residual, gated."""
    x, weight, bias = ctx.saved_tensors
    for_x, for_weight, for_bias, for_residual, _ = ctx.needs_input_grad
    pushed = geglu.backward(forward(x, weight, bias, None, False), dy) if ctx.gated else dy
    rows = pushed.flatten(0, -2)
    return (
        pushed @ weight if for_x else None,
        rows.T @ x.flatten(0, -2) if for_weight else None,
        rows.sum(0) if for_bias else None,
        dy if for_residual else None,
        None,
    )


forward.register_autograd(differentiate, setup_context=keep)


def gemm(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, residual: Tensor | None = None, gated: bool = False
) -> Tensor:
    """`reference` in one kernel; shapes as there, fp16, bf16 or (exact) fp32, rows of x and residual at equal distances."""
    return forward(x, weight, bias, residual, gated)


def accepts(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, residual: Tensor | None = None, gated: bool = False
) -> bool:
    """One dtype, a contiguous weight, rows of numbers next to each other, a device where Triton runs."""
    given = [t for t in (x, weight, bias, residual) if t is not None]
    n = len(weight) // (1 + gated)
    return (
        can_run(*given)
        and x.dtype in FLOATS
        and all(t.dtype == x.dtype for t in given)
        and weight.shape == (n * (1 + gated), x.shape[-1])
        and weight.is_contiguous()
        and x.numel() > 0
        and weight.numel() < 2**31
        and row_stride(x) is not None
        and (bias is None or (bias.shape == weight.shape[:1] and bias.is_contiguous()))
        and (residual is None or (residual.shape == (*x.shape[:-1], n) and row_stride(residual) is not None))
    )


gemm.accepts = accepts  # type: ignore[attr-defined]


def builds() -> list[Build]:
    """What may be launched in the released models: their linear layers are plain, with bias, with bias and residual, or gated."""
    found = []
    for dtype in FLOATS:
        t = name_of(dtype)
        pointers = dict.fromkeys(("x", "weight", "bias", "residual", "y", "scale_x", "scale_w"), f"*{t}")
        for bias, residual, gated in (
            (False, False, False),
            (True, False, False),
            (True, True, False),
            (True, False, True),
        ):
            for tile in tiles(dtype, gated):
                name = f"gemm {t}{' bias' * bias}{' residual' * residual}{' gated' * gated} {tile.m}x{tile.n}x{tile.k}"
                constants: dict[str, Any] = {"BIAS": bias, "RESIDUAL": residual, "GATED": gated, "SCALED": False}
                constants |= {"WHOLE": True, **tile.constants, "TOGETHER": TOGETHER}
                wgmma = () if dtype == torch.float32 else ("wgmma.mma_async",)
                how = {"warps": tile.warps, "stages": tile.stages, "odd": ["m"], "expects": wgmma, "least": tile.least}
                found.append(build(name, gemm_forward, constants, **how, **pointers))
    return found


if __name__ == "__main__":
    from sdcore.kernels import bench

    bench.show("gemm")
