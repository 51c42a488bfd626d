"""Attention of the autoencoder: one head as wide as the channels (512), over every position of the latent.

A head this wide does not fit the walk of `attention.py`: its accumulator alone would fill the registers. Nor does it need to. A
score costs 1024 multiplications, so two plain matrix products with a softmax in between are near the best there is. The queries
are taken in chunks, so that the scores never need more than 256 MiB, however large the picture.

    s = scale q k^T,  scale = log2(e) / sqrt(d)       one product, its result kept in fp32: half precision would cost two digits
    p = 2^(s - lse),  lse = log2(sum_k 2^s)           the softmax of a row, in one kernel
    out = p v                                         the other product

Backward keeps `lse` and works s and p out again, chunk by chunk:

    delta = sum_d(dout * out);   ds = p * (dout v^T - delta);   dq = ds k / sqrt(d),  dk = ds^T q / sqrt(d),  dv = p^T dout

The kernel `product` is the matrix product whose result is wider than its factors: s, dout v^T, and all that goes into a gradient.
Where both are of one dtype, the product is PyTorch's.

Source: Vaswani et al. 2017, equation 1; Rabe & Staats 2021 (chunks of queries).

Legend: b batch, s queries, r queries of a chunk, k keys, d width; q, out [b, s, d], k, v [b, k, d], scores [b, r, k].
"""

import math
from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from sdcore.kernels.common import FLOATS, Build, build, can_run, dot, empty, name_of
from torch import Tensor

CHUNK = 256 * 2**20  # bytes of fp32 scores at a time
LOG2_E = math.log2(math.e)


@triton.jit
def product(
    a, b, c, factor, m, n, depth, a_batch, a_m, a_k, b_batch, b_k, b_n, c_batch, c_m,
    ADD: tl.constexpr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """c = factor a b, or c += factor a b, for one tile [M, N] of fp32 c; a [b, m, k] and b [b, k, n] with any strides."""
    # Programs that run at the same time share rows and columns: eight tiles down, then one to the right.
    down, across = tl.cdiv(m, M), tl.cdiv(n, N)
    group = tl.program_id(0) // (8 * across)
    height = tl.minimum(down - group * 8, 8)
    inside = tl.program_id(0) % (8 * across)
    row = (group * 8 + inside % height) * M + tl.arange(0, M)
    column = inside // height * N + tl.arange(0, N)
    step = tl.arange(0, K)
    batch = tl.program_id(1).to(tl.int64)
    a += batch * a_batch + row.to(tl.int64)[:, None] * a_m + step[None, :] * a_k
    b += batch * b_batch + column.to(tl.int64)[None, :] * b_n + step[:, None] * b_k
    acc = tl.zeros([M, N], tl.float32)
    for start in range(0, depth, K):
        left = tl.load(a, mask=(row < m)[:, None] & (step < depth - start)[None, :], other=0.0)
        right = tl.load(b, mask=(column < n)[None, :] & (step < depth - start)[:, None], other=0.0)
        acc = dot(left, right, acc)
        a += K * a_k
        b += K * b_k
    c += batch * c_batch + row.to(tl.int64)[:, None] * c_m + column[None, :]
    stored = (row < m)[:, None] & (column < n)[None, :]
    acc *= factor
    if ADD:
        acc += tl.load(c, mask=stored, other=0.0)
    tl.store(c, acc, mask=stored)


@triton.jit
def softmax(s, p, lse, keys, rows, lse_batch, WIDTH: tl.constexpr):
    """A row of probabilities and its `lse` from a row of scores. The row is read three times, but only once from afar."""
    row = tl.program_id(1).to(tl.int64) * rows + tl.program_id(0)
    column = tl.arange(0, WIDTH)
    top = tl.full([WIDTH], float("-inf"), tl.float32)
    for start in range(0, keys, WIDTH):
        top = tl.maximum(top, tl.load(s + row * keys + start + column, mask=start + column < keys, other=float("-inf")))
    highest = tl.max(top, 0)
    total = tl.zeros([WIDTH], tl.float32)
    for start in range(0, keys, WIDTH):
        x = tl.load(s + row * keys + start + column, mask=start + column < keys, other=float("-inf"))
        total += tl.exp2(x - highest)
    log = highest + tl.log2(tl.sum(total, 0))
    for start in range(0, keys, WIDTH):
        x = tl.load(s + row * keys + start + column, mask=start + column < keys, other=float("-inf"))
        tl.store(p + row * keys + start + column, tl.exp2(x - log), mask=start + column < keys)
    tl.store(lse + tl.program_id(1).to(tl.int64) * lse_batch + tl.program_id(0), log)


@triton.jit
def softmax_backward(s, dp, lse, delta, p, ds, keys, rows, lse_batch, WIDTH: tl.constexpr):
    """p and ds from a piece of a row of the scores, of dp = dout v^T, and the row's `lse` and `delta`."""
    row = tl.program_id(1).to(tl.int64) * rows + tl.program_id(0)
    number = tl.program_id(1).to(tl.int64) * lse_batch + tl.program_id(0)
    column = tl.program_id(2) * WIDTH + tl.arange(0, WIDTH)
    at = row * keys + column
    probability = tl.exp2(tl.load(s + at, mask=column < keys, other=0.0) - tl.load(lse + number))
    slope = probability * (tl.load(dp + at, mask=column < keys, other=0.0) - tl.load(delta + number))
    tl.store(p + at, probability, mask=column < keys)
    tl.store(ds + at, slope, mask=column < keys)


# -------------------------------------------------------------------------------------------------------------------- launchers

TILE = dict(M=128, N=128, K=64)
PRODUCT = dict(num_warps=8, num_stages=3)
WIDTH, WARPS = 2048, 8  # of a row, for the softmax: 8 numbers a thread


def _multiply(a: Tensor, b: Tensor, c: Tensor, factor: float = 1.0, add: bool = False) -> None:
    """c = factor a b, or c += factor a b: a [b, m, k] and b [b, k, n] of one dtype, c [b, m, n] in fp32, rows contiguous."""
    if a.dtype == torch.float32:  # nothing to widen
        torch.baddbmm(c, a, b, beta=float(add), alpha=factor, out=c)
        return
    batch, m, n = c.shape
    grid = triton.cdiv(m, TILE["M"]) * triton.cdiv(n, TILE["N"]), batch
    product[grid](
        a, b, c, factor, m, n, a.shape[2], *a.stride(), *b.stride(), *c.stride()[:2], add, **TILE, **PRODUCT
    )  # fmt: skip


def _chunks(q: Tensor, k: Tensor) -> Iterator[slice]:
    """Slices of the queries, whole tiles but for the last, whose scores stay below CHUNK bytes (and one tile at least)."""
    rows = max(TILE["M"], CHUNK // (4 * k.shape[0] * k.shape[1]) // TILE["M"] * TILE["M"])
    return (slice(start, min(start + rows, q.shape[1])) for start in range(0, q.shape[1], rows))


@torch.library.custom_op("sdcore::vae_attention", mutates_args=())
def forward(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """The output and, for backward, `lse` [b, s]."""
    (b, s, d), keys = q.shape, k.shape[1]
    out, lse = empty(q.shape, q), empty((b, s), q, torch.float32)
    for rows in _chunks(q, k):
        shape = (b, rows.stop - rows.start, keys)
        scores, p = empty(shape, q, torch.float32), empty(shape, q)
        _multiply(q[:, rows], k.mT, scores, LOG2_E / math.sqrt(d))
        softmax[shape[1], b](scores, p, lse[:, rows], keys, shape[1], s, WIDTH, num_warps=WARPS)
        torch.bmm(p, v, out=out[:, rows])
    return out, lse


@torch.library.custom_op("sdcore::vae_attention_backward", mutates_args=())
def backward(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv."""
    (b, s, d), keys = q.shape, k.shape[1]
    shrink = 1 / math.sqrt(d)
    delta = (dout.float() * out.float()).sum(-1)
    dq = empty(q.shape, q, torch.float32)
    dk, dv = (empty(k.shape, k, torch.float32).zero_() for _ in range(2))
    for rows in _chunks(q, k):
        shape = (b, rows.stop - rows.start, keys)
        scores, dp = (empty(shape, q, torch.float32) for _ in range(2))
        p, ds = (empty(shape, q) for _ in range(2))
        _multiply(q[:, rows], k.mT, scores, LOG2_E * shrink)
        _multiply(dout[:, rows], v.mT, dp)
        softmax_backward[shape[1], b, triton.cdiv(keys, WIDTH)](
            scores, dp, lse[:, rows], delta[:, rows], p, ds, keys, shape[1], s, WIDTH, num_warps=WARPS
        )
        _multiply(ds, k, dq[:, rows], shrink)
        _multiply(ds.mT, q[:, rows], dk, shrink, add=True)
        _multiply(p.mT, dout[:, rows], dv, add=True)
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)


@forward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape[:2], dtype=torch.float32)


@backward.register_fake
def _(dout, q, k, v, out, lse):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs, *output)
    ctx.mark_non_differentiable(output[1])


forward.register_autograd(lambda ctx, dout, _: backward(dout, *ctx.saved_tensors), setup_context=_save)


def vae_attention(q: Tensor, k: Tensor, v: Tensor, heads: int, causal: bool = False, upcast: bool = False) -> Tensor:
    """`ops.attention` with one head of any width.

    q [b, s, d], k and v [b, k, d] in fp16, bf16 or fp32, any strides -> [b, s, d]. Scores, exponentials and sums are in fp32.
    """
    return forward(q, k, v)[0]


def accepts(q: Tensor, k: Tensor, v: Tensor, heads: int, causal: bool = False, upcast: bool = False) -> bool:
    """One head that sees every key, on a device where Triton runs."""
    return (
        can_run(q, k, v)
        and q.dtype == k.dtype == v.dtype
        and q.dtype in FLOATS
        and q.ndim == k.ndim == 3
        and k.shape == v.shape
        and heads == 1
        and not causal
        and not (upcast and q.dtype != torch.float32)
        and q.numel() > 0
        and k.numel() > 0
    )


vae_attention.accepts = accepts  # type: ignore[attr-defined]


def builds() -> list[Build]:
    """What may be launched: products whose factors lie along the depth (s, dout v^T), beside it (the sums of dk, dv), or each in
    its way (dq); and the two softmax kernels. Products of fp32 are PyTorch's."""
    found = []
    strides = {"s": ("a_k", "b_k"), "dq": ("a_k", "b_n"), "dk": ("a_m", "b_n")}
    for dtype in (torch.float16, torch.bfloat16):
        t = name_of(dtype)
        types = dict(a=f"*{t}", b=f"*{t}", c="*fp32", factor="fp32")
        for what, ones in strides.items():
            constants = TILE | dict.fromkeys(ones, 1) | {"ADD": what == "dk"}
            found.append(
                build(f"vae_attention {what} {t}", product, constants, warps=8, stages=3, expects=("wgmma",), **types)
            )
    for dtype in FLOATS:
        t = name_of(dtype)
        types = dict(s="*fp32", dp="*fp32", lse="*fp32", delta="*fp32", p=f"*{t}", ds=f"*{t}")
        for name, kernel in (("softmax", softmax), ("softmax_backward", softmax_backward)):
            found.append(build(f"vae_attention {name} {t}", kernel, {"WIDTH": WIDTH}, warps=WARPS, **types))
    return found


if __name__ == "__main__":
    from sdcore.kernels import bench

    bench.show("vae_attention")
