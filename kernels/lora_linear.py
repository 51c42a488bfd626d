"""A linear layer with a low-rank adapter on it, in one kernel: the adapter rides along on tiles that are loaded anyway.

PyTorch reads x twice and y three times: for the layer, for the adapter's way down, and for the sum. Here a program that owns a
tile of y multiplies every tile of x which it loads for the layer by the way down as well. At the end the small result, r numbers
a row, goes up and is added before y is rounded. Each column of tiles repeats the way down: r / 128 more products, little for the
ranks in use.

    u = x D^T                     [m, r], rounded to the dtype, as between two layers
    y = x W^T + b + scale u U^T

    dx = dy W + scale (dy U) D    the same kernel, with W, U, D turned over
    dD = scale (dy U)^T x,  dU = scale dy^T u,  dW = dy^T x,  db = sum of dy    narrow products: PyTorch's

An adapter that stays is better merged into W; this is for training, and for adapters whose strength changes.

Source: Hu et al. 2021 (2106.09685), equation 3.

Legend: m rows, k width of x, n width of y, r rank; x [m, k], W [n, k], down D [r, k], up U [n, r], y [m, n].
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from sdcore.kernels.common import FLOATS, Build, build, can_run, dot, empty, name_of, row_stride
from sdcore.kernels.gemm import TOGETHER, Tile, choose, held_by, processors_of, tile_of
from torch import Tensor

WIDEST, NARROW = 128, 64  # ranks: wider ones would not fit the registers; the second in fp32, and before Hopper
HOPPER = 90  # compute capability
HALF = (Tile(128, 128, 64, 8, 3, 1.0, least=90), Tile(128, 64, 64, 8, 3, 0.8), Tile(64, 64, 64, 4, 3, 0.6))
FULL = (Tile(32, 32, 32, 8, 2, 1.0),)


@triton.jit
def lora_linear_forward(
    x, weight, bias, down, up, y, m, n, k, r, scale, stride_x,
    stride_wn, stride_wk, stride_dr, stride_dk, stride_un, stride_ur,
    BIAS: tl.constexpr, WHOLE: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, R: tl.constexpr, TOGETHER: tl.constexpr,
):  # fmt: skip
    """One tile of y. WHOLE says that K divides k."""
    tile_down, tile_across = tile_of(tl.program_id(0), m, n, M, N, TOGETHER)
    row, column = tile_down * M + tl.arange(0, M), tile_across * N + tl.arange(0, N)
    depth, rank = tl.arange(0, K), tl.arange(0, R)
    # Rows and columns beyond the end begin again at the front (never stored); ranks beyond the end are zeros.
    x_at = x + (row % m).to(tl.int64)[:, None] * stride_x + depth[None, :]
    w_at = weight + (column % n).to(tl.int64)[None, :] * stride_wn + depth[:, None] * stride_wk
    d_at = down + rank[None, :] * stride_dr + depth[:, None] * stride_dk
    out = tl.zeros([M, N], tl.float32)
    low = tl.zeros([M, R], tl.float32)
    for start in range(0, k, K):
        left = k - start
        if WHOLE:
            a, b = tl.load(x_at), tl.load(w_at)
            d = tl.load(d_at, (rank < r)[None, :], 0.0)
        else:
            a = tl.load(x_at, (depth < left)[None, :], 0.0)
            b = tl.load(w_at, (depth < left)[:, None], 0.0)
            d = tl.load(d_at, (rank < r)[None, :] & (depth < left)[:, None], 0.0)
        out = dot(a, b, out)
        low = dot(a, d, low)
        x_at += K
        w_at += K * stride_wk
        d_at += K * stride_dk
    u_at = up + (column % n).to(tl.int64)[None, :] * stride_un + rank[:, None] * stride_ur
    u = tl.load(u_at, (rank < r)[:, None], 0.0)
    out += scale * dot(low.to(u.dtype), u, tl.zeros([M, N], tl.float32))
    if BIAS:
        out += tl.load(bias + column, column < n, 0.0).to(tl.float32)[None, :]
    inside = (row < m)[:, None] & (column < n)[None, :]
    tl.store(y + row.to(tl.int64)[:, None] * n + column[None, :], out, inside)


def widest(x: Tensor) -> int:
    """The widest rank whose factors the device's registers hold beside a tile; under the interpreter as on Hopper."""
    older = x.is_cuda and torch.cuda.get_device_capability(x.device) < divmod(HOPPER, 10)
    return NARROW if older or x.dtype == torch.float32 else WIDEST


def width(rank: int) -> int:
    """The rank as the matrix units see it."""
    return max(16, triton.next_power_of_2(rank))


@torch.library.custom_op("sdcore::lora_linear", mutates_args=())
def forward(x: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor, up: Tensor, scale: float) -> Tensor:
    (n, k), r = weight.shape, len(down)
    m = x.numel() // k
    y = empty((*x.shape[:-1], n), x)
    tile = choose(m, n, FULL if x.dtype == torch.float32 else held_by(x, HALF), processors_of(x))
    grid = (triton.cdiv(m, tile.m) * triton.cdiv(n, tile.n),)
    lora_linear_forward[grid](
        x, weight, weight if bias is None else bias, down, up, y, m, n, k, r, scale, row_stride(x),
        *weight.stride(), *down.stride(), *up.stride(),
        BIAS=bias is not None, WHOLE=k % tile.k == 0, **tile.constants, R=width(r), TOGETHER=TOGETHER,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return y


@forward.register_fake
def _(x, weight, bias, down, up, scale):
    return x.new_empty((*x.shape[:-1], len(weight)))


def keep(ctx, inputs, output) -> None:
    """What the backward needs."""
    x, weight, _, down, up, ctx.scale = inputs
    ctx.save_for_backward(x, weight, down, up)


def differentiate(ctx, dy):
    """Gradients of x, W, bias, D, U, scale (none)."""
    x, weight, down, up = ctx.saved_tensors
    for_x, for_weight, for_bias, for_down, for_up, _ = ctx.needs_input_grad
    dy = dy.contiguous()
    pushed, seen = dy.flatten(0, -2), x.flatten(0, -2)
    return (
        forward(dy, weight.T, None, up.T, down.T, ctx.scale) if for_x else None,
        pushed.T @ seen if for_weight else None,
        pushed.sum(0) if for_bias else None,
        ctx.scale * ((pushed @ up).T @ seen) if for_down else None,
        ctx.scale * (pushed.T @ (seen @ down.T)) if for_up else None,
        None,
    )


forward.register_autograd(differentiate, setup_context=keep)


def reference(x: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor, up: Tensor, scale: float) -> Tensor:
    """What `lora_linear` means: x [..., k], weight [n, k], bias [n], down [r, k], up [n, r] -> [..., n]."""
    return F.linear(x, weight, bias) + scale * F.linear(F.linear(x, down), up)


def lora_linear(x: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor, up: Tensor, scale: float) -> Tensor:
    """`reference` in one kernel; shapes as there, fp16, bf16 or (exact) fp32, rows of x at equal distances."""
    return forward(x, weight, bias, down, up, scale)


def accepts(x: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor, up: Tensor, scale: float) -> bool:
    """One dtype, a rank of at most 128 (fp32: 64), a device where Triton runs."""
    given = [t for t in (x, weight, bias, down, up) if t is not None]
    n, k = weight.shape
    return (
        can_run(*given)
        and x.dtype in FLOATS
        and all(t.dtype == x.dtype for t in given)
        and x.shape[-1] == k
        and down.shape == (len(down), k)
        and up.shape == (n, len(down))
        and 0 < len(down) <= widest(x)
        and x.numel() > 0
        and row_stride(x) is not None
        and (bias is None or bias.is_contiguous())
    )


lora_linear.accepts = accepts  # type: ignore[attr-defined]


def builds() -> list[Build]:
    """What may be launched: forward (all contiguous) and the gradient of x (all turned over), for ranks up to 16, 64 and 128."""
    found = []
    forward_strides = {"stride_wk": 1, "stride_dk": 1, "stride_ur": 1}
    turned = {"stride_wn": 1, "stride_dr": 1, "stride_un": 1}
    for dtype in FLOATS:
        t = name_of(dtype)
        types = {**dict.fromkeys(("x", "weight", "bias", "down", "up", "y"), f"*{t}"), "scale": "fp32"}
        for kind, strides in (("forward", forward_strides), ("backward", turned)):
            for tile in FULL if dtype == torch.float32 else HALF:
                for rank in (16, 64) if dtype == torch.float32 else (16, 64, 128):
                    name = f"lora_linear {kind} {t} {tile.m}x{tile.n}x{tile.k} rank {rank}"
                    constants = {"BIAS": kind == "forward", "WHOLE": True, **tile.constants, **strides}
                    constants |= {"R": rank, "TOGETHER": TOGETHER}
                    wgmma = () if dtype == torch.float32 else ("wgmma.mma_async",)
                    how = {
                        "warps": tile.warps,
                        "stages": tile.stages,
                        "odd": ["m", "r"],
                        "expects": wgmma,
                        "least": tile.least if rank <= NARROW else HOPPER,
                    }
                    found.append(build(name, lora_linear_forward, constants, **how, **types))
    return found


if __name__ == "__main__":
    from sdcore.kernels import bench

    bench.show("lora_linear")
