"""LayerNorm over tokens, alone or behind the addition that always stands before it; forward and backward in one pass each.

A program holds whole rows in registers, so x is read once: the mean is taken first and the squares of what is left second, which
loses nothing to cancellation. Statistics and arithmetic are in fp32 whatever the dtype.

    n = (x - mean) rstd,  y = n w + b
    dx = rstd (w dy - avg(w dy) - n avg(w dy n)),  dw = sum over rows of dy n,  db = sum over rows of dy

The backward lets a fixed number of programs walk over the rows; each keeps its own sums for dw and db, which are added up at the
end. Nothing is atomic, so the result is the same on every run. Where the norm is frozen (LoRA) these sums are left out.

`add_layer_norm` is what the transformer layer does between two of its parts: h = x + residual, y = LayerNorm(h), in one pass
instead of two. It is no operation of `sdcore.ops`; the engine calls it. `reference` says what it means.

Source: Ba et al. 2016 (1607.06450), equation 3; the gradient by differentiating it.

Legend: m rows (all tokens of the batch), d width.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from sdcore.kernels.common import FLOATS, Build, build, can_run, empty, name_of, row_stride
from torch import Tensor

WIDEST = 4096  # numbers of a row that a program can hold
WALKERS = 528  # programs of the backward: four for each of the 132 multiprocessors of an H100 or H200
WIDTHS = (320, 640, 768, 1024, 1280)  # of the released models


@triton.jit
def layer_norm_forward(
    x, residual, weight, bias, h, y, mean, rstd, m, d, stride_x, stride_residual, eps,
    ADD: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Norm of some whole rows; with ADD, of x + residual, which is stored in h."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)[None, :]
    inside = (row[:, None] < m) & (column < d)
    at = row[:, None] * d + column
    v = tl.load(x + row[:, None] * stride_x + column, inside, 0.0).to(tl.float32)
    if ADD:
        v += tl.load(residual + row[:, None] * stride_residual + column, inside, 0.0).to(tl.float32)
        v = v.to(h.dtype.element_ty)  # the sum goes on in the dtype of the model, and is what the norm must see
        tl.store(h + at, v, inside)
        v = v.to(tl.float32)
    mu = tl.sum(v, 1) / d
    rest = tl.where(inside, v - mu[:, None], 0.0)
    r = 1.0 / tl.sqrt(tl.sum(rest * rest, 1) / d + eps)
    w = tl.load(weight + column, column < d, 0.0).to(tl.float32)
    b = tl.load(bias + column, column < d, 0.0).to(tl.float32)
    tl.store(y + at, rest * r[:, None] * w + b, inside)
    tl.store(mean + row, mu, row < m)
    tl.store(rstd + row, r, row < m)


@triton.jit
def layer_norm_backward(
    h, dy, dh, weight, mean, rstd, dx, dw, db, m, d, stride_h, stride_dy, stride_dh,
    ADD: tl.constexpr, AFFINE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """dx of every so-many-th block of rows, and with AFFINE this program's share of dw and db. With ADD, dh joins dx."""
    walker, walkers = tl.program_id(0), tl.num_programs(0)
    column = tl.arange(0, COLUMNS)[None, :]
    w = tl.load(weight + column, column < d, 0.0).to(tl.float32)
    sum_w = tl.zeros([ROWS, COLUMNS], tl.float32)
    sum_b = tl.zeros([ROWS, COLUMNS], tl.float32)
    for block in range(walker, tl.cdiv(m, ROWS), walkers):
        row = (block * ROWS + tl.arange(0, ROWS)).to(tl.int64)
        inside = (row[:, None] < m) & (column < d)
        mu = tl.load(mean + row, row < m, 0.0)[:, None]
        r = tl.load(rstd + row, row < m, 0.0)[:, None]
        v = tl.load(h + row[:, None] * stride_h + column, inside, 0.0).to(tl.float32)
        push = tl.load(dy + row[:, None] * stride_dy + column, inside, 0.0).to(tl.float32)
        n = tl.where(inside, (v - mu) * r, 0.0)
        wdy = push * w
        along_one = tl.sum(wdy, 1)[:, None] / d
        along_n = tl.sum(wdy * n, 1)[:, None] / d
        out = (wdy - along_one - n * along_n) * r
        if ADD:
            out += tl.load(dh + row[:, None] * stride_dh + column, inside, 0.0).to(tl.float32)
        tl.store(dx + row[:, None] * d + column, out, inside)
        if AFFINE:
            sum_w += push * n
            sum_b += push
    if AFFINE:
        at = walker * d + column
        tl.store(dw + at, tl.sum(sum_w, 0)[None, :], column < d)
        tl.store(db + at, tl.sum(sum_b, 0)[None, :], column < d)


def tile(d: int) -> dict[str, int]:
    """Rows and columns of a tile: whole rows, about 2048 numbers."""
    columns = triton.next_power_of_2(d)
    return {"ROWS": max(1, 2048 // columns), "COLUMNS": columns}


def warps(d: int) -> int:
    """About 16 numbers a thread."""
    return 8 if d > 2048 else 4


@torch.library.custom_op("sdcore::layer_norm", mutates_args=())
def forward(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    d, add = x.shape[-1], residual is not None
    m = x.numel() // d
    y, mean, rstd = empty(x.shape, x), empty((m,), x, torch.float32), empty((m,), x, torch.float32)
    h = empty(x.shape if add else (0,), x)
    residual = x if residual is None else residual
    t = tile(d)
    layer_norm_forward[(triton.cdiv(m, t["ROWS"]),)](
        x, residual, weight, bias, h, y, mean, rstd, m, d, row_stride(x), row_stride(residual), eps,
        ADD=add, **t, num_warps=warps(d),
    )  # fmt: skip
    return h, y, mean, rstd


@torch.library.custom_op("sdcore::layer_norm_backward", mutates_args=())
def backward(
    h: Tensor, dy: Tensor, dh: Tensor | None, weight: Tensor, mean: Tensor, rstd: Tensor, affine: bool
) -> tuple[Tensor, Tensor, Tensor]:
    d, m = h.shape[-1], mean.numel()
    t = tile(d)
    walkers = min(WALKERS, triton.cdiv(m, t["ROWS"]))
    dy = dy if row_stride(dy) is not None else dy.contiguous()
    add, dh = dh is not None, dy if dh is None else dh if row_stride(dh) is not None else dh.contiguous()
    dx = empty(h.shape, h)
    shares = [empty((walkers, d) if affine else (0,), h, torch.float32) for _ in range(2)]
    layer_norm_backward[(walkers,)](
        h, dy, dh, weight, mean, rstd, dx, *shares, m, d, row_stride(h), row_stride(dy), row_stride(dh),
        ADD=add, AFFINE=affine, **t, num_warps=warps(d),
    )  # fmt: skip
    dw, db = (share.sum(0).to(weight.dtype) for share in shares)
    return dx, dw, db


@forward.register_fake
def _(x, residual, weight, bias, eps):
    m = x.numel() // x.shape[-1]
    statistics = [x.new_empty((m,), dtype=torch.float32) for _ in range(2)]
    return x.new_empty((0,) if residual is None else x.shape), x.new_empty(x.shape), *statistics


@backward.register_fake
def _(h, dy, dh, weight, mean, rstd, affine):
    of_weight = weight.new_empty(weight.shape if affine else ())
    return h.new_empty(h.shape), of_weight, torch.empty_like(of_weight)


def keep(ctx, inputs, output) -> None:
    """What the backward needs: the sum (or x where nothing was added) and the statistics."""
    x, residual, weight, _, _ = inputs
    h, _, mean, rstd = output
    ctx.add = residual is not None
    ctx.save_for_backward(h if ctx.add else x, weight, mean, rstd)


def differentiate(ctx, dh, dy, _mean, _rstd):
    """Gradients of x, residual, weight, bias, eps."""
    h, weight, mean, rstd = ctx.saved_tensors
    affine = ctx.needs_input_grad[2] or ctx.needs_input_grad[3]
    dx, dw, db = backward(h, dy, dh if ctx.add else None, weight, mean, rstd, affine)
    return dx, dx if ctx.add else None, dw if affine else None, db if affine else None, None


forward.register_autograd(differentiate, setup_context=keep)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """`ops.layer_norm` in one pass.

    x [..., d] in fp16, bf16 or fp32, rows at equal distances; weight and bias [d] in the same dtype.
    """
    return forward(x, None, weight, bias, eps)[1]


def accepts(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> bool:
    """Whole rows that fit into a program, one dtype, a device where Triton runs."""
    return (
        can_run(x, weight, bias)
        and x.dtype in FLOATS
        and weight.dtype == bias.dtype == x.dtype
        and weight.shape == bias.shape == x.shape[-1:]
        and 0 < x.shape[-1] <= WIDEST
        and x.numel() > 0
        and row_stride(x) is not None
        and weight.is_contiguous()
        and bias.is_contiguous()
    )


layer_norm.accepts = accepts  # type: ignore[attr-defined]


def reference(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """What `add_layer_norm` means: (h, y) with h = x + residual and y the layer norm of h; both [..., d]."""
    h = x + residual
    return h, F.layer_norm(h, weight.shape, weight, bias, eps)


def add_layer_norm(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """`reference` in one pass: (x + residual, its layer norm). Shapes and dtypes as in `layer_norm`."""
    return forward(x, residual, weight, bias, eps)[:2]


def accepts_both(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float) -> bool:
    """As `accepts`, and the residual is like x."""
    same = residual.shape == x.shape and residual.dtype == x.dtype and residual.device == x.device
    return same and accepts(x, weight, bias, eps) and row_stride(residual) is not None


add_layer_norm.accepts = accepts_both  # type: ignore[attr-defined]


def builds() -> list[Build]:
    """What may be launched at the widths of the released models; those with one tile share a build."""
    found = []
    for columns in sorted({triton.next_power_of_2(d) for d in WIDTHS}):
        for dtype in FLOATS:
            t = name_of(dtype)
            types = {
                **dict.fromkeys(("x", "residual", "weight", "bias", "h", "y", "dy", "dh", "dx"), f"*{t}"),
                **dict.fromkeys(("mean", "rstd", "dw", "db"), "*fp32"),
                "eps": "fp32",
            }
            how = {"odd": ["m"], "warps": warps(columns), **types}
            for add in (False, True):
                name = f"{'add_' * add}layer_norm {{}} {t} {columns}"
                constants = {"ADD": add, **tile(columns)}
                found.append(build(name.format("forward"), layer_norm_forward, constants, **how))
                for affine in (False, True):
                    kind = "backward" if affine else "backward, frozen"
                    found.append(build(name.format(kind), layer_norm_backward, {"AFFINE": affine, **constants}, **how))
    return found


if __name__ == "__main__":
    from sdcore.kernels import bench

    bench.show("layer_norm")
