"""Attention without the matrix of scores: forward, and backward by working the scores out again.

Attention is out = softmax(q k^T / sqrt(d)) v for every head. The scores of a large picture would be gigabytes; they never leave
the chip. A program holds one tile of queries and walks over the keys, tile by tile, keeping for each query the largest score seen
so far, the sum of exponentials and the weighted sum of the values; when a larger score turns up, both sums shrink accordingly.
Powers are of 2, with log2(e) folded into the scale: the hardware has no other.

    s = scale q k^T,  scale = log2(e) / sqrt(d);   p = 2^(s - lse),  lse = log2(sum_k 2^s);   out = p v

Backward keeps only `lse`, one number a query, and works p out again, once by tiles of queries and once by tiles of keys:

    delta = sum_d(dout * out);   ds = p * (dout v^T - delta);   dq = ds k / sqrt(d),  dk = ds^T q / sqrt(d),  dv = p^T dout

Layout. Heads lie side by side in the width, as the projections write them; a program finds its head by its columns, so nothing
is transposed, and any row and batch stride will do: q, k and v may be views of one fused projection.

Width. Tiles are powers of two, the heads of the released models are 40, 64, 80 and 160 wide. A head is cut into two such pieces
where that is less than the next power of two: 80 = 64 + 16, 160 = 128 + 32, and 40 -> 32 + 16 with the last 8 columns empty. The
scores are the sum of the products of the pieces, the output has an accumulator for each. (40 as 64 would need no second product,
but a third more multiplications and shared memory: 512 against 384 cycles of the tensor cores for a tile of 128 x 64 on sm_90.)

Ragged ends. Whole tiles are read without a mask; what remains is walked in steps of 16: the 77 tokens of a text are 64 + 16.

Source: Vaswani et al. 2017, equation 1; Milakov & Gimelshein 2018 (online softmax), algorithm 3; Dao 2023 (FlashAttention-2),
algorithms 1 and 2.

Legend: b batch, s queries, k keys, n heads, d width of a head; q, out [b, s, n d], k, v [b, k, n d], lse, delta [b, n, s].
"""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from sdcore.kernels import vae_attention
from sdcore.kernels.common import FLOATS, Build, build, can_run, dot, empty, name_of
from torch import Tensor

COUNTS = ["heads", "queries", "keys"]  # arguments whose divisors make no faster code
EDGE = tl.constexpr(16)  # step of the walk over a ragged end: the least that tensor cores take

# ----------------------------------------------------------------------------------------- a tile of a head, in one or two pieces


@triton.jit
def _head(x, batch_stride, heads, D: tl.constexpr):
    """Where the head of this program begins."""
    which = tl.program_id(1)
    return x + (which // heads).to(tl.int64) * batch_stride + which % heads * D


@triton.jit
def _row_of_numbers(x, queries):
    """Where the numbers of this program's head begin: one a query, [b, n, s]."""
    return x + tl.program_id(1).to(tl.int64) * queries


@triton.jit
def _load_piece(
    x, rows, stride, length, D: tl.constexpr, FIRST: tl.constexpr, WIDTH: tl.constexpr, RAGGED: tl.constexpr
):
    """[r, WIDTH] from column FIRST on; zero outside the head and, where the tile is ragged, from row `length` on."""
    columns = FIRST + tl.arange(0, WIDTH)
    pointers = x + rows[:, None] * stride + columns[None, :]
    inside = columns[None, :] < D
    if RAGGED:
        inside = inside & (rows[:, None] < length)
    if RAGGED or FIRST + WIDTH > D:
        return tl.load(pointers, mask=inside, other=0.0)
    else:
        return tl.load(pointers)


@triton.jit
def _load(x, rows, stride, length, D: tl.constexpr, MAIN: tl.constexpr, REST: tl.constexpr, RAGGED: tl.constexpr):
    """Rows of a head: (main piece,) or (main piece, rest)."""
    main = _load_piece(x, rows, stride, length, D, 0, MAIN, RAGGED)
    if REST:
        return (main, _load_piece(x, rows, stride, length, D, MAIN, REST, RAGGED))
    else:
        return (main,)


@triton.jit
def _store_piece(x, rows, stride, length, piece, D: tl.constexpr, FIRST: tl.constexpr):
    columns = FIRST + tl.arange(0, piece.shape[1])
    inside = (rows[:, None] < length) & (columns[None, :] < D)
    tl.store(x + rows[:, None] * stride + columns[None, :], piece.to(x.dtype.element_ty), mask=inside)


@triton.jit
def _store(x, rows, stride, length, pieces, D: tl.constexpr):
    """The inverse of `_load`."""
    _store_piece(x, rows, stride, length, pieces[0], D, 0)
    if len(pieces) == 2:
        _store_piece(x, rows, stride, length, pieces[1], D, pieces[0].shape[1])


@triton.jit
def _zeros(ROWS: tl.constexpr, MAIN: tl.constexpr, REST: tl.constexpr):
    if REST:
        return (tl.zeros([ROWS, MAIN], tl.float32), tl.zeros([ROWS, REST], tl.float32))
    else:
        return (tl.zeros([ROWS, MAIN], tl.float32),)


@triton.jit
def _scaled(x, factor):
    if len(x) == 2:
        return (x[0] * factor, x[1] * factor)
    else:
        return (x[0] * factor,)


@triton.jit
def _across(a, b):
    """a b^T over the width of the head: rows of a [r, d] against rows of b [c, d] -> [r, c]."""
    x = dot(a[0], tl.trans(b[0]), tl.zeros([a[0].shape[0], b[0].shape[0]], tl.float32))
    if len(a) == 2:
        x = dot(a[1], tl.trans(b[1]), x)
    return x


@triton.jit
def _add_piece(acc, p, x, EXACT: tl.constexpr):
    rounded = p.to(x.dtype)
    acc = dot(rounded, x, acc)
    if EXACT:
        acc = dot((p - rounded.to(tl.float32)).to(x.dtype), x, acc)
    return acc


@triton.jit
def _add(acc, p, x, EXACT: tl.constexpr):
    """acc + p x, with p [r, c] in fp32 and rows x [c, d]. p is rounded to the dtype of x; EXACT adds what was lost by that."""
    if len(x) == 2:
        return (_add_piece(acc[0], p, x[0], EXACT), _add_piece(acc[1], p, x[1], EXACT))
    else:
        return (_add_piece(acc[0], p, x[0], EXACT),)


# ---------------------------------------------------------------------------------------------------------------------- forward


@triton.jit
def _look(
    query, acc, total, top, rows, k, v, start, k_row, v_row, keys, scale,
    D: tl.constexpr, MAIN: tl.constexpr, REST: tl.constexpr, CAUSAL: tl.constexpr, EXACT: tl.constexpr,
    WIDTH: tl.constexpr, RAGGED: tl.constexpr,
):  # fmt: skip
    """One tile of WIDTH keys seen by a tile of queries: the sums with it."""
    columns = start + tl.arange(0, WIDTH)
    scores = _across(query, _load(k, columns, k_row, keys, D, MAIN, REST, RAGGED))
    if RAGGED:
        seen = columns[None, :] < keys
        if CAUSAL:
            seen = seen & (columns[None, :] <= rows[:, None])
        scores = tl.where(seen, scores, float("-inf"))
    higher = tl.maximum(top, tl.max(scores, 1) * scale)  # never -inf: every query sees the first key
    p = tl.exp2(scores * scale - higher[:, None])
    shrink = tl.exp2(top - higher)
    total = total * shrink + tl.sum(p, 1)
    acc = _add(_scaled(acc, shrink[:, None]), p, _load(v, columns, v_row, keys, D, MAIN, REST, RAGGED), EXACT)
    return acc, total, higher


@triton.jit(do_not_specialize=COUNTS)
def attention_forward(
    q, k, v, out, lse, scale, heads, queries, keys, q_batch, q_row, k_batch, k_row, v_batch, v_row,
    D: tl.constexpr, MAIN: tl.constexpr, REST: tl.constexpr, CAUSAL: tl.constexpr, EXACT: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """`out` and `lse` of M queries of one head."""
    q, k, v = _head(q, q_batch, heads, D), _head(k, k_batch, heads, D), _head(v, v_batch, heads, D)
    out = _head(out, queries * heads * D, heads, D)
    first = tl.program_id(0) * M
    rows = first + tl.arange(0, M)
    query = _load(q, rows, q_row, queries, D, MAIN, REST, True)
    acc, total = _zeros(M, MAIN, REST), tl.zeros([M], tl.float32)
    top = tl.full([M], float("-inf"), tl.float32)

    whole = 0 if CAUSAL else keys // N * N
    for start in range(0, whole, N):
        acc, total, top = _look(
            query, acc, total, top, rows, k, v, start, k_row, v_row, keys, scale,
            D, MAIN, REST, CAUSAL, EXACT, N, False,
        )  # fmt: skip
    end = tl.minimum(keys, first + M) if CAUSAL else keys  # no query of this tile sees further
    for start in tl.range(whole, end, EDGE, num_stages=1):
        acc, total, top = _look(
            query, acc, total, top, rows, k, v, start, k_row, v_row, keys, scale,
            D, MAIN, REST, CAUSAL, EXACT, EDGE, True,
        )  # fmt: skip

    _store(out, rows, heads * D, queries, _scaled(acc, 1 / total[:, None]), D)
    tl.store(_row_of_numbers(lse, queries) + rows, top + tl.log2(total), mask=rows < queries)


# --------------------------------------------------------------------------------------------------------------------- backward


@triton.jit
def _look_back(
    query, dout, dq, lse, delta, rows, k, v, start, k_row, v_row, keys, scale,
    D: tl.constexpr, MAIN: tl.constexpr, REST: tl.constexpr, CAUSAL: tl.constexpr, EXACT: tl.constexpr,
    WIDTH: tl.constexpr, RAGGED: tl.constexpr,
):  # fmt: skip
    """What one tile of WIDTH keys adds to dq."""
    columns = start + tl.arange(0, WIDTH)
    key = _load(k, columns, k_row, keys, D, MAIN, REST, RAGGED)
    p = tl.exp2(_across(query, key) * scale - lse[:, None])
    if RAGGED:
        seen = columns[None, :] < keys
        if CAUSAL:
            seen = seen & (columns[None, :] <= rows[:, None])
        p = tl.where(seen, p, 0.0)
    dp = _across(dout, _load(v, columns, v_row, keys, D, MAIN, REST, RAGGED))
    return _add(dq, p * (dp - delta[:, None]), key, EXACT)


@triton.jit(do_not_specialize=COUNTS)
def attention_backward_queries(
    q, k, v, out, dout, lse, delta, dq, scale, shrink, heads, queries, keys,
    q_batch, q_row, k_batch, k_row, v_batch, v_row, dout_batch, dout_row,
    D: tl.constexpr, MAIN: tl.constexpr, REST: tl.constexpr, CAUSAL: tl.constexpr, EXACT: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """dq of M queries of one head, and their `delta`, which the other half of backward needs. `shrink` is 1 / sqrt(d)."""
    q, k, v = _head(q, q_batch, heads, D), _head(k, k_batch, heads, D), _head(v, v_batch, heads, D)
    out, dq = _head(out, queries * heads * D, heads, D), _head(dq, queries * heads * D, heads, D)
    first = tl.program_id(0) * M
    rows = first + tl.arange(0, M)
    query = _load(q, rows, q_row, queries, D, MAIN, REST, True)
    push = _load(_head(dout, dout_batch, heads, D), rows, dout_row, queries, D, MAIN, REST, True)
    sums = _dots(push, _load(out, rows, heads * D, queries, D, MAIN, REST, True))
    tl.store(_row_of_numbers(delta, queries) + rows, sums, mask=rows < queries)
    logs = tl.load(_row_of_numbers(lse, queries) + rows, mask=rows < queries, other=0.0)
    acc = _zeros(M, MAIN, REST)

    whole = 0 if CAUSAL else keys // N * N
    for start in range(0, whole, N):
        acc = _look_back(
            query, push, acc, logs, sums, rows, k, v, start, k_row, v_row, keys, scale,
            D, MAIN, REST, CAUSAL, EXACT, N, False,
        )  # fmt: skip
    end = tl.minimum(keys, first + M) if CAUSAL else keys
    for start in tl.range(whole, end, EDGE, num_stages=1):
        acc = _look_back(
            query, push, acc, logs, sums, rows, k, v, start, k_row, v_row, keys, scale,
            D, MAIN, REST, CAUSAL, EXACT, EDGE, True,
        )  # fmt: skip
    _store(dq, rows, heads * D, queries, _scaled(acc, shrink), D)


@triton.jit
def _dots(a, b):
    """The dot product of each row of a with the same row of b, in fp32."""
    x = tl.sum(a[0].to(tl.float32) * b[0].to(tl.float32), 1)
    if len(a) == 2:
        x += tl.sum(a[1].to(tl.float32) * b[1].to(tl.float32), 1)
    return x


@triton.jit
def _be_seen(
    key, value, dk, dv, columns, q, dout, lse, delta, start, q_row, dout_row, queries, scale,
    D: tl.constexpr, MAIN: tl.constexpr, REST: tl.constexpr, CAUSAL: tl.constexpr, EXACT: tl.constexpr,
    M: tl.constexpr,
):  # fmt: skip
    """What one tile of M queries adds to dk and dv; p and ds are transposed here, [keys, queries].

    No score needs a mask: beyond the last query dout and delta are read as zero, so that p, then no probability, adds nothing.
    """
    rows = start + tl.arange(0, M)
    query = _load(q, rows, q_row, queries, D, MAIN, REST, True)
    push = _load(dout, rows, dout_row, queries, D, MAIN, REST, True)
    inside = rows < queries
    p = tl.exp2(_across(key, query) * scale - tl.load(lse + rows, mask=inside, other=0.0)[None, :])
    if CAUSAL:
        p = tl.where(columns[:, None] <= rows[None, :], p, 0.0)
    dv = _add(dv, p, push, EXACT)
    dp = _across(value, push)
    dk = _add(dk, p * (dp - tl.load(delta + rows, mask=inside, other=0.0)[None, :]), query, EXACT)
    return dk, dv


@triton.jit(do_not_specialize=COUNTS)
def attention_backward_keys(
    q, k, v, dout, lse, delta, dk, dv, scale, shrink, heads, queries, keys, share, part_stride,
    q_batch, q_row, k_batch, k_row, v_batch, v_row, dout_batch, dout_row,
    D: tl.constexpr, MAIN: tl.constexpr, REST: tl.constexpr, CAUSAL: tl.constexpr, EXACT: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """dk and dv of N keys of one head, from a share of the queries: the sum over `program_id(2)` is taken by the launcher."""
    q, k, v = _head(q, q_batch, heads, D), _head(k, k_batch, heads, D), _head(v, v_batch, heads, D)
    dout, lse, delta = _head(dout, dout_batch, heads, D), _row_of_numbers(lse, queries), _row_of_numbers(delta, queries)
    part = tl.program_id(2)
    dk = _head(dk + part.to(tl.int64) * part_stride, keys * heads * D, heads, D)
    dv = _head(dv + part.to(tl.int64) * part_stride, keys * heads * D, heads, D)
    columns = tl.program_id(0) * N + tl.arange(0, N)
    key = _load(k, columns, k_row, keys, D, MAIN, REST, True)
    value = _load(v, columns, v_row, keys, D, MAIN, REST, True)
    dkey, dvalue = _zeros(N, MAIN, REST), _zeros(N, MAIN, REST)

    for start in range(part * share, tl.minimum(queries, (part + 1) * share), M):
        dkey, dvalue = _be_seen(
            key, value, dkey, dvalue, columns, q, dout, lse, delta, start, q_row, dout_row, queries, scale,
            D, MAIN, REST, CAUSAL, EXACT, M,
        )  # fmt: skip
    _store(dk, columns, heads * D, keys, _scaled(dkey, shrink), D)
    _store(dv, columns, heads * D, keys, dvalue, D)


# -------------------------------------------------------------------------------------------------------------------- launchers


class Tile(NamedTuple):
    """How a kernel is cut: queries and keys of a tile, warps, and how many tiles ahead the loop reads."""

    M: int
    N: int
    warps: int
    stages: int


def pieces(d: int) -> tuple[int, int]:
    """The powers of two, at least 16, that a head is cut into: 64 -> (64, 0), 80 -> (64, 16), 40 -> (32, 16)."""
    main = max(16, 2 ** int(math.log2(d)))
    rest = 0 if d <= main else max(16, triton.next_power_of_2(d - main))
    return (2 * main, 0) if rest == main else (main, rest)


def tile(kernel: str, d: int, dtype: torch.dtype, exact: bool) -> Tile:
    """The tile of "forward", "queries" or "keys" (the halves of backward)."""
    widest = next(width for width in WIDTHS if sum(pieces(d)) <= width)
    cut = TILES[kernel, widest, dtype.itemsize]
    if exact:  # what rounding lost needs registers of its own
        return cut._replace(M=32) if kernel == "keys" else cut._replace(warps=8)
    return cut


# Chosen by what the compiler makes of them for sm_90 (registers, shared memory, instructions of the loop), not yet by a clock.
# 128 queries a tile halve what is read of the keys; 64 where a wide head leaves no registers for more, or where 128 would leave
# processors idle. fp32 does not use the tensor cores; its tiles and warps are those with which no register spills on any target.
WIDTHS = (48, 64, 96, 192)
TILES = {  # (kernel, width of the pieces up to, bytes a number)
    **{("forward", width, 2): Tile(128, 64, 4, 3) for width in (48, 64)},
    ("forward", 96, 2): Tile(128, 64, 8, 3),
    ("forward", 192, 2): Tile(64, 64, 4, 2),
    **{("queries", width, 2): Tile(128, 64, 8, 2) for width in (48, 64)},
    ("queries", 96, 2): Tile(64, 64, 4, 2),
    ("queries", 192, 2): Tile(64, 32, 4, 2),
    **{("keys", width, 2): Tile(64, 128, 8, 2) for width in (48, 64)},
    ("keys", 96, 2): Tile(32, 64, 4, 2),
    ("keys", 192, 2): Tile(16, 64, 8, 2),
    **{("forward", width, 4): Tile(32, 16, 8, 1) for width in WIDTHS},
    ("queries", 48, 4): Tile(16, 16, 8, 1),
    ("queries", 64, 4): Tile(16, 16, 16, 1),
    **{("queries", width, 4): Tile(16, 16, 8, 2) for width in (96, 192)},
    **{("keys", width, 4): Tile(16, 32, 8, 1) for width in WIDTHS},
}
WIDEST, WIDEST_FP32 = 192, 128  # heads; wider ones would not fit the registers
PROGRAMS = 256  # the keys of a text are few: about so many programs share the queries that look at them


def plan(kernel: str, d: int, dtype: torch.dtype, causal: bool, upcast: bool) -> tuple[Tile, dict]:
    """The tile of a kernel and its constexpr arguments."""
    main, rest = pieces(d)
    exact = upcast and dtype != torch.float32
    cut = tile(kernel, d, dtype, exact)
    return cut, dict(D=d, MAIN=main, REST=rest, CAUSAL=causal, EXACT=exact, M=cut.M, N=cut.N)


def strides(*tensors: Tensor) -> list[int]:
    """Batch and row stride of each."""
    return [stride for x in tensors for stride in x.stride()[:2]]


@torch.library.custom_op("sdcore::attention", mutates_args=())
def forward(q: Tensor, k: Tensor, v: Tensor, heads: int, causal: bool, upcast: bool) -> tuple[Tensor, Tensor]:
    """The output and, for backward, `lse`."""
    b, s, width = q.shape
    d = width // heads
    cut, constants = plan("forward", d, q.dtype, causal, upcast)
    out, lse = empty(q.shape, q), empty((b, heads, s), q, torch.float32)
    attention_forward[triton.cdiv(s, cut.M), b * heads](
        q, k, v, out, lse, math.log2(math.e) / math.sqrt(d), heads, s, k.shape[1], *strides(q, k, v),
        **constants, num_warps=cut.warps, num_stages=cut.stages,
    )  # fmt: skip
    return out, lse


@torch.library.custom_op("sdcore::attention_backward", mutates_args=())
def backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, heads: int, causal: bool, upcast: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv."""
    if dout.stride(-1) != 1:  # such as the gradient of a sum, which is one number seen everywhere
        dout = dout.contiguous()
    (b, s, width), keys = q.shape, k.shape[1]
    d = width // heads
    scale, shrink = math.log2(math.e) / math.sqrt(d), 1 / math.sqrt(d)
    dq, delta = empty(q.shape, q), empty(lse.shape, lse)
    cut, constants = plan("queries", d, q.dtype, causal, upcast)
    attention_backward_queries[triton.cdiv(s, cut.M), b * heads](
        q, k, v, out, dout, lse, delta, dq, scale, shrink, heads, s, keys, *strides(q, k, v, dout),
        **constants, num_warps=cut.warps, num_stages=cut.stages,
    )  # fmt: skip

    cut, constants = plan("keys", d, q.dtype, causal, upcast)
    tiles = triton.cdiv(keys, cut.N)
    parts = max(1, min(PROGRAMS // (tiles * b * heads), s // (4 * cut.M)))
    share = triton.cdiv(s, parts * cut.M) * cut.M  # queries of a part: whole tiles, but for the last part
    parts = triton.cdiv(s, share)
    dk, dv = (empty((parts, *k.shape), k, k.dtype if parts == 1 else torch.float32) for _ in range(2))
    attention_backward_keys[tiles, b * heads, parts](
        q, k, v, dout, lse, delta, dk, dv, scale, shrink, heads, s, keys, share, k.numel(), *strides(q, k, v, dout),
        **constants, num_warps=cut.warps, num_stages=cut.stages,
    )  # fmt: skip
    if parts == 1:
        return dq, dk[0], dv[0]
    return dq, dk.sum(0).to(k.dtype), dv.sum(0).to(k.dtype)


@forward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, heads: int, causal: bool, upcast: bool) -> tuple[Tensor, Tensor]:
    b, s, _ = q.shape
    return q.new_empty(q.shape), q.new_empty((b, heads, s), dtype=torch.float32)


@backward.register_fake
def _(dout, q, k, v, out, lse, heads, causal, upcast):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx, inputs, output) -> None:
    q, k, v, ctx.heads, ctx.causal, ctx.upcast = inputs
    out, lse = output
    ctx.save_for_backward(q, k, v, out, lse)
    ctx.mark_non_differentiable(lse)


def _gradients(ctx, dout: Tensor, _) -> tuple:
    return *backward(dout, *ctx.saved_tensors, ctx.heads, ctx.causal, ctx.upcast), None, None, None


forward.register_autograd(_gradients, setup_context=_save)


def attention(q: Tensor, k: Tensor, v: Tensor, heads: int, causal: bool = False, upcast: bool = False) -> Tensor:
    """`ops.attention`; heads wider than 192 (the autoencoder's) go to `vae_attention`.

    q [b, s, n d], k and v [b, k, n d] in fp16, bf16 or fp32, numbers of a row next to each other -> [b, s, n d].
    Scores, exponentials and sums are in fp32 always; `upcast` also keeps the probabilities from being rounded to half precision.
    """
    if q.shape[-1] // heads > WIDEST:
        return vae_attention.vae_attention(q, k, v, heads, causal, upcast)
    return forward(q, k, v, heads, causal, upcast)[0]


def accepts(q: Tensor, k: Tensor, v: Tensor, heads: int, causal: bool = False, upcast: bool = False) -> bool:
    """Heads of a multiple of 8 up to 192 (fp32: 128), rows of numbers next to each other, on a device where Triton runs."""
    d = q.shape[-1] // heads
    if d > WIDEST:
        return vae_attention.accepts(q, k, v, heads, causal, upcast)
    return (
        can_run(q, k, v)
        and q.dtype == k.dtype == v.dtype
        and q.dtype in FLOATS
        and q.ndim == k.ndim == 3
        and k.shape == v.shape
        and d % 8 == 0
        and (d <= WIDEST_FP32 or q.dtype != torch.float32)
        and d * heads == q.shape[-1]
        and q.numel() > 0
        and k.numel() > 0
        and all(x.stride(-1) == 1 and x.shape[1] * x.stride(1) < 2**31 for x in (q, k, v))
    )


attention.accepts = accepts  # type: ignore[attr-defined]


HEADS = (40, 64, 80, 160)  # widths in the released UNets; the text towers have 64
KERNELS = {
    "forward": attention_forward,
    "queries": attention_backward_queries,
    "keys": attention_backward_keys,
    "keys in parts": attention_backward_keys,  # sums of a share of the queries, in fp32
}


def builds() -> list[Build]:
    """What may be launched for the released models. Heads of 64 also see causally (text towers) and under upcast (SD 2.1)."""
    kinds = [(d, dtype, False, False) for dtype in FLOATS for d in HEADS if d <= WIDEST_FP32 or dtype != torch.float32]
    kinds += [(64, dtype, True, False) for dtype in FLOATS] + [(64, dtype, False, True) for dtype in FLOATS[:2]]
    return [_build(kernel, *kind) for kernel in KERNELS for kind in kinds]


def _build(kernel: str, d: int, dtype: torch.dtype, causal: bool, upcast: bool) -> Build:
    t, part = name_of(dtype), kernel == "keys in parts"
    cut, constants = plan(kernel.split()[0], d, dtype, causal, upcast)
    types = dict.fromkeys(("q", "k", "v", "out", "dout", "dq"), f"*{t}")
    types |= dict.fromkeys(("dk", "dv"), "*fp32" if part else f"*{t}")
    types |= {"lse": "*fp32", "delta": "*fp32", "scale": "fp32", "shrink": "fp32"}
    return build(
        f"attention {kernel} {t} {d}{' causal' * causal}{' upcast' * upcast}",
        KERNELS[kernel],
        constants,
        odd=COUNTS,
        warps=cut.warps,
        stages=cut.stages,
        expects=() if dtype == torch.float32 else ("wgmma",),
        **types,
    )


if __name__ == "__main__":
    from sdcore.kernels import bench

    bench.show("attention")
