"""GEGLU: the first half of the width, gated by the GELU of the second half; forward and backward in one pass each.

PyTorch runs it as two kernels with a rounded intermediate in between: five reads and writes of half the tensor where three are
needed. Here a program takes a tile of rows and columns, reads both halves, and writes their product: nothing but the bandwidth of
the memory limits it. All arithmetic is in fp32, so a half-precision result is rounded once.

    y = v gelu(g),  gelu(g) = g Phi(g),  Phi(g) = (1 + erf(g / sqrt 2)) / 2
    dv = dy gelu(g),  dg = dy v (Phi(g) + g phi(g)),  phi(g) = exp(-g^2 / 2) / sqrt(2 pi)

Source: Shazeer 2020 (2002.05202), equation 6; Hendrycks & Gimpel 2016 for GELU.

Legend: m rows (all tokens of the batch), d width of one half; x [m, 2 d], y [m, d].
"""

import torch
import triton
import triton.language as tl
from sdcore.kernels.common import FLOATS, Build, build, can_run, empty, name_of, row_stride
from torch import Tensor

ROWS, COLUMNS, WARPS = (
    4,
    256,
    4,
)  # of a tile: 8 numbers a thread; every hidden width of the released models is a multiple of 256


@triton.jit
def normal_cdf(x):
    """Phi: the share of a standard normal below x."""
    return 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))


@triton.jit
def geglu_forward(x, y, m, d, stride_x, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """y = v gelu(g) for one tile."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    inside = (row < m) & (column < d)
    v = tl.load(x + row * stride_x + column, inside, 0.0).to(tl.float32)
    g = tl.load(x + row * stride_x + d + column, inside, 0.0).to(tl.float32)
    tl.store(y + row * d + column, v * g * normal_cdf(g), inside)


@triton.jit
def geglu_backward(x, dy, dx, m, d, stride_x, stride_dy, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Both halves of dx for one tile; GELU is worked out again rather than kept."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    inside = (row < m) & (column < d)
    v = tl.load(x + row * stride_x + column, inside, 0.0).to(tl.float32)
    g = tl.load(x + row * stride_x + d + column, inside, 0.0).to(tl.float32)
    push = tl.load(dy + row * stride_dy + column, inside, 0.0).to(tl.float32)
    phi = 0.3989422804014327 * tl.exp(-0.5 * g * g)
    tl.store(dx + row * 2 * d + column, push * g * normal_cdf(g), inside)
    tl.store(dx + row * 2 * d + d + column, push * v * (normal_cdf(g) + g * phi), inside)


def grid(m: int, d: int) -> tuple[int, int]:
    """Programs that cover [m, d]."""
    return triton.cdiv(m, ROWS), triton.cdiv(d, COLUMNS)


@torch.library.custom_op("sdcore::geglu", mutates_args=())
def forward(x: Tensor) -> Tensor:
    d = x.shape[-1] // 2
    y = empty((*x.shape[:-1], d), x)
    m = y.numel() // d
    geglu_forward[grid(m, d)](x, y, m, d, row_stride(x), ROWS, COLUMNS, num_warps=WARPS)
    return y


@torch.library.custom_op("sdcore::geglu_backward", mutates_args=())
def backward(x: Tensor, dy: Tensor) -> Tensor:
    d = x.shape[-1] // 2
    if row_stride(dy) is None:  # such as the gradient of a sum, which is one number seen everywhere
        dy = dy.contiguous()
    dx = empty(x.shape, x)
    m = dy.numel() // d
    geglu_backward[grid(m, d)](x, dy, dx, m, d, row_stride(x), row_stride(dy), ROWS, COLUMNS, num_warps=WARPS)
    return dx


@forward.register_fake
def _(x: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:-1], x.shape[-1] // 2))


@backward.register_fake
def _(x: Tensor, dy: Tensor) -> Tensor:
    return x.new_empty(x.shape)


forward.register_autograd(
    lambda ctx, dy: backward(*ctx.saved_tensors, dy),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)


def geglu(x: Tensor) -> Tensor:
    """`ops.geglu` in one pass.

    x [..., 2 d] in fp16, bf16 or fp32, rows at equal distances -> [..., d].
    """
    return forward(x)


def accepts(x: Tensor) -> bool:
    """Rows of numbers next to each other, on a device where Triton runs."""
    return can_run(x) and x.dtype in FLOATS and x.shape[-1] % 2 == 0 and x.numel() > 0 and row_stride(x) is not None


geglu.accepts = accepts  # type: ignore[attr-defined]


def builds() -> list[Build]:
    """What may be launched: one build of each direction and dtype serves every shape."""
    found = []
    tile = {"ROWS": ROWS, "COLUMNS": COLUMNS}
    for dtype in FLOATS:
        t = name_of(dtype)
        pointers = dict.fromkeys(("x", "y", "dy", "dx"), f"*{t}")
        found.append(build(f"geglu forward {t}", geglu_forward, tile, odd=["m"], warps=WARPS, **pointers))
        found.append(build(f"geglu backward {t}", geglu_backward, tile, odd=["m"], warps=WARPS, **pointers))
    return found


if __name__ == "__main__":
    from sdcore.kernels import bench

    bench.show("geglu")
