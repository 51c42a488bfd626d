"""GroupNorm, alone or with the SiLU that mostly follows, on channels-last or contiguous pictures; forward and backward.

The trouble with group norm is its shape: a group of 10 to 80 channels is no multiple of anything a GPU likes, and there are only
32 groups to a picture, too few to keep 132 multiprocessors busy. So for all but small pictures no program here works on a group:

    1. `moments`   a program takes a slab of positions and 64 neighbouring channels (128 bytes of bf16, a cache line, whatever the
                   size of a group) and keeps the mean and the sum of squared deviations of every channel;
    2. `combine`   one small program a group merges what was found for its channels and slabs into mean and 1 / std;
    3. `apply`     again tiles of 64 channels: normalise, scale, shift, SiLU, store; each channel looks up its group's statistics.

x is read twice, which is the least where a picture does not fit on the chip; the second time it mostly still lies in the L2
cache. A picture whose groups fit into a program's registers is done in one launch, by `small`: it reads x once.

Deviations are always taken from a mean that is already known, and merged by the formula of Chan et al.: sums of squares, which
lose everything to cancellation where the mean is large, appear nowhere. All arithmetic is in fp32.

    n = (x - mean) rstd,  u = n w + b,  y = u or u sigmoid(u)
    du = dy or dy sigmoid(u) (1 + u (1 - sigmoid(u))),  dw = sum of du n,  db = sum of du
    dx = rstd (w du - avg(w du) - n avg(w du n)), averages over the group

The backward has the same three parts: sums by channel and slab, merging (a few hundred numbers: plain PyTorch), dx.

Source: Wu & He 2018 (1803.08494), equation 1; Chan, Golub & LeVeque 1983, equation 2.1.

Legend: b batch, c channels, s positions (height x width), j channels of a group; x [b, c, s] or, channels last, [b, s, c].
"""

from typing import Any

import torch
import triton
import triton.language as tl
from sdcore.kernels.common import FLOATS, Build, build, can_run, empty, empty_like, name_of
from torch import Tensor

TILES = {
    True: (128, 64),
    False: (256, 16),
}  # channels last? -> positions, channels of a tile: the long side lies in memory
WARPS = 4
MANY_WARPS = 8  # for `moments` and `combine`, which hold more numbers at once
SMALL = {
    True: 16384,
    False: 8192,
}  # channels last? -> numbers of a group, rounded up to powers of two, that registers hold
PROGRAMS = 1056  # wanted for a picture: eight for each of the 132 multiprocessors of an H100 or H200
MERGED = 8192  # numbers that `combine` holds in registers


@triton.jit
def place(position, channel, c, s, LAST: tl.constexpr):
    """Where a number of a picture lies, from the picture's first."""
    if LAST:
        return position * c + channel
    else:
        return channel * s + position


@triton.jit
def moments(
    x, mean, m2, c, s, slab_size,
    LAST: tl.constexpr, POSITIONS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Mean and sum of squared deviations of every channel over one slab of positions; results [b, slabs, c]."""
    slab, picture = tl.program_id(0), tl.program_id(2).to(tl.int64)
    x += picture * c * s
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    end = tl.minimum(s, (slab + 1) * slab_size)
    mu = tl.zeros([CHANNELS], tl.float32)
    squares = tl.zeros([CHANNELS], tl.float32)
    seen = 0.0
    for start in range(slab * slab_size, end, POSITIONS):
        position = start + tl.arange(0, POSITIONS)[:, None]
        inside = (position < end) & (channel[None, :] < c)
        v = tl.load(x + place(position, channel[None, :], c, s, LAST), inside, 0.0).to(tl.float32)
        count = tl.minimum(POSITIONS, end - start).to(tl.float32)
        mu_here = tl.sum(v, 0) / count
        rest = tl.where(inside, v - mu_here[None, :], 0.0)
        # Two sets of numbers become one (Chan et al., equation 2.1).
        away, total = mu_here - mu, seen + count
        squares += tl.sum(rest * rest, 0) + away * away * (seen * count / total)
        mu += away * (count / total)
        seen = total
    at = (picture * tl.num_programs(0) + slab) * c + channel
    tl.store(mean + at, mu, channel < c)
    tl.store(m2 + at, squares, channel < c)


@triton.jit
def combine(
    mean, m2, group_mean, group_rstd, c, s, j, slabs, slab_size, eps,
    SLABS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Mean and 1 / std of one group from those of its channels and slabs."""
    group, picture = tl.program_id(0), tl.program_id(1).to(tl.int64)
    slab = tl.arange(0, SLABS)[:, None]
    channel = tl.arange(0, CHANNELS)[None, :]
    inside = (slab < slabs) & (channel < j)
    at = (picture * slabs + slab) * c + group * j + channel
    means = tl.load(mean + at, inside, 0.0)
    squares = tl.load(m2 + at, inside, 0.0)
    count = tl.where(inside, tl.minimum(slab_size, s - slab * slab_size), 0).to(tl.float32)
    total = s * j * 1.0
    mu = tl.sum(tl.sum(means * (count / total), 1), 0)
    away = means - mu
    variance = tl.sum(tl.sum(squares + count * away * away, 1), 0) / total
    out = picture * tl.num_programs(0) + group
    tl.store(group_mean + out, mu)
    tl.store(group_rstd + out, 1.0 / tl.sqrt(variance + eps))


@triton.jit
def apply(
    x, y, weight, bias, group_mean, group_rstd, c, s, j,
    LAST: tl.constexpr, SILU: tl.constexpr, POSITIONS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """y for one tile."""
    picture = tl.program_id(2).to(tl.int64)
    x += picture * c * s
    y += picture * c * s
    position = tl.program_id(0) * POSITIONS + tl.arange(0, POSITIONS)[:, None]
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    known = channel < c
    inside = (position < s) & known[None, :]
    at = place(position, channel[None, :], c, s, LAST)
    group = picture * (c // j) + channel // j
    mu = tl.load(group_mean + group, known, 0.0)
    r = tl.load(group_rstd + group, known, 0.0)
    w = tl.load(weight + channel, known, 0.0).to(tl.float32)
    b = tl.load(bias + channel, known, 0.0).to(tl.float32)
    v = tl.load(x + at, inside, 0.0).to(tl.float32)
    u = (v - mu[None, :]) * (r * w)[None, :] + b[None, :]
    if SILU:
        u *= tl.sigmoid(u)
    tl.store(y + at, u, inside)


@triton.jit
def small(
    x, y, weight, bias, group_mean, group_rstd, c, s, j, eps,
    LAST: tl.constexpr, SILU: tl.constexpr, POSITIONS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """y for one whole group, held in registers."""
    group, picture = tl.program_id(0), tl.program_id(1).to(tl.int64)
    x += picture * c * s
    y += picture * c * s
    position = tl.arange(0, POSITIONS)[:, None]
    within = tl.arange(0, CHANNELS)
    channel = group * j + within
    inside = (position < s) & (within < j)[None, :]
    at = place(position, channel[None, :], c, s, LAST)
    v = tl.load(x + at, inside, 0.0).to(tl.float32)
    total = s * j * 1.0
    mu = tl.sum(tl.sum(v, 1), 0) / total
    rest = tl.where(inside, v - mu, 0.0)
    r = 1.0 / tl.sqrt(tl.sum(tl.sum(rest * rest, 1), 0) / total + eps)
    w = tl.load(weight + channel, within < j, 0.0).to(tl.float32)
    b = tl.load(bias + channel, within < j, 0.0).to(tl.float32)
    u = rest * (r * w)[None, :] + b[None, :]
    if SILU:
        u *= tl.sigmoid(u)
    tl.store(y + at, u, inside)
    out = picture * tl.num_programs(0) + group
    tl.store(group_mean + out, mu)
    tl.store(group_rstd + out, r)


@triton.jit
def before_silu(push, u):
    """The gradient of u, given that of u sigmoid(u)."""
    gate = tl.sigmoid(u)
    return push * gate * (1.0 + u * (1.0 - gate))


@triton.jit
def gradient_sums(
    x, dy, weight, bias, group_mean, group_rstd, sum_n, sum_one, c, s, j, slab_size,
    LAST: tl.constexpr, SILU: tl.constexpr, POSITIONS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Sums of du n and of du for every channel over one slab of positions; results [b, slabs, c]."""
    slab, picture = tl.program_id(0), tl.program_id(2).to(tl.int64)
    x += picture * c * s
    dy += picture * c * s
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    known = channel < c
    group = picture * (c // j) + channel // j
    mu = tl.load(group_mean + group, known, 0.0)[None, :]
    r = tl.load(group_rstd + group, known, 0.0)[None, :]
    w = tl.load(weight + channel, known, 0.0).to(tl.float32)[None, :]
    b = tl.load(bias + channel, known, 0.0).to(tl.float32)[None, :]
    along_n = tl.zeros([CHANNELS], tl.float32)
    along_one = tl.zeros([CHANNELS], tl.float32)
    end = tl.minimum(s, (slab + 1) * slab_size)
    for start in range(slab * slab_size, end, POSITIONS):
        position = start + tl.arange(0, POSITIONS)[:, None]
        inside = (position < end) & known[None, :]
        at = place(position, channel[None, :], c, s, LAST)
        n = (tl.load(x + at, inside, 0.0).to(tl.float32) - mu) * r
        du = tl.load(dy + at, inside, 0.0).to(tl.float32)
        if SILU:
            du = before_silu(du, n * w + b)
        along_n += tl.sum(du * n, 0)
        along_one += tl.sum(du, 0)
    at = (picture * tl.num_programs(0) + slab) * c + channel
    tl.store(sum_n + at, along_n, known)
    tl.store(sum_one + at, along_one, known)


@triton.jit
def gradient_apply(
    x, dy, dx, weight, bias, group_mean, group_rstd, average_n, average_one, c, s, j,
    LAST: tl.constexpr, SILU: tl.constexpr, POSITIONS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """dx for one tile, given the group's averages of w du n and of w du."""
    picture = tl.program_id(2).to(tl.int64)
    x += picture * c * s
    dy += picture * c * s
    dx += picture * c * s
    position = tl.program_id(0) * POSITIONS + tl.arange(0, POSITIONS)[:, None]
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    known = channel < c
    inside = (position < s) & known[None, :]
    at = place(position, channel[None, :], c, s, LAST)
    group = picture * (c // j) + channel // j
    mu = tl.load(group_mean + group, known, 0.0)[None, :]
    r = tl.load(group_rstd + group, known, 0.0)[None, :]
    along_n = tl.load(average_n + group, known, 0.0)[None, :]
    along_one = tl.load(average_one + group, known, 0.0)[None, :]
    w = tl.load(weight + channel, known, 0.0).to(tl.float32)[None, :]
    b = tl.load(bias + channel, known, 0.0).to(tl.float32)[None, :]
    n = (tl.load(x + at, inside, 0.0).to(tl.float32) - mu) * r
    du = tl.load(dy + at, inside, 0.0).to(tl.float32)
    if SILU:
        du = before_silu(du, n * w + b)
    tl.store(dx + at, r * (w * du - along_one - n * along_n), inside)


# ------------------------------------------------------------------------------------------------------------- launching


def is_channels_last(x: Tensor) -> bool:
    """True where the channels of a position lie next to each other (and not also the positions of a channel)."""
    return x.ndim == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)


def sizes(x: Tensor, groups: int) -> tuple[int, int, int, int]:
    """(b, c, s, j) of a picture."""
    b, c = x.shape[:2]
    return b, c, x.numel() // (b * c), c // groups


def whole_group(s: int, j: int, last: bool) -> dict[str, int] | None:
    """The tile with which `small` holds a group; None where it is too large."""
    tile = {"POSITIONS": triton.next_power_of_2(s), "CHANNELS": triton.next_power_of_2(j)}
    return tile if tile["POSITIONS"] * tile["CHANNELS"] <= SMALL[last] else None


def small_warps(tile: dict[str, int]) -> int:
    """At most 32 numbers a thread; 16 where a large tile is also wide, for otherwise registers spill."""
    numbers = tile["POSITIONS"] * tile["CHANNELS"]
    wide = numbers > 8192 and tile["CHANNELS"] >= 64
    return 32 if wide else min(16, max(4, numbers // 1024))


def slabs_of(b: int, c: int, s: int, j: int, last: bool) -> tuple[int, int]:
    """(slabs, positions of a slab): enough programs for the GPU, few enough numbers for `combine`; a slab is whole tiles."""
    positions, channels = TILES[last]
    wanted = triton.cdiv(PROGRAMS, b * triton.cdiv(c, channels))
    slabs = max(1, min(triton.cdiv(s, positions), wanted, MERGED // triton.next_power_of_2(j)))
    size = triton.cdiv(triton.cdiv(s, positions), slabs) * positions
    return triton.cdiv(s, size), size


def tile_of(last: bool) -> dict[str, int | bool]:
    """Constants of the kernels that work in slabs and tiles."""
    positions, channels = TILES[last]
    return {"LAST": last, "POSITIONS": positions, "CHANNELS": channels}


@torch.library.custom_op("sdcore::group_norm", mutates_args=())
def forward(
    x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float, silu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    b, c, s, j = sizes(x, groups)
    last = is_channels_last(x)
    y = empty_like(x)
    mean, rstd = empty((b, groups), x, torch.float32), empty((b, groups), x, torch.float32)
    group = whole_group(s, j, last)
    if group:
        small[(groups, b)](
            x, y, weight, bias, mean, rstd, c, s, j, eps, LAST=last, SILU=silu, **group, num_warps=small_warps(group)
        )
        return y, mean, rstd
    tile = tile_of(last)
    slabs, size = slabs_of(b, c, s, j, last)
    columns = triton.cdiv(c, tile["CHANNELS"])
    means, squares = (empty((b, slabs, c), x, torch.float32) for _ in range(2))
    moments[(slabs, columns, b)](x, means, squares, c, s, size, **tile, num_warps=MANY_WARPS)
    combine[(groups, b)](
        means, squares, mean, rstd, c, s, j, slabs, size, eps,
        SLABS=triton.next_power_of_2(slabs), CHANNELS=triton.next_power_of_2(j), num_warps=MANY_WARPS,
    )  # fmt: skip
    grid = (triton.cdiv(s, tile["POSITIONS"]), columns, b)
    apply[grid](x, y, weight, bias, mean, rstd, c, s, j, SILU=silu, **tile, num_warps=WARPS)
    return y, mean, rstd


@torch.library.custom_op("sdcore::group_norm_backward", mutates_args=())
def backward(
    x: Tensor, dy: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, rstd: Tensor, silu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    groups = mean.shape[1]
    b, c, s, j = sizes(x, groups)
    last = is_channels_last(x)
    dy = dy.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
    tile = tile_of(last)
    slabs, size = slabs_of(b, c, s, j, last)
    columns = triton.cdiv(c, tile["CHANNELS"])
    sum_n, sum_one = (empty((b, slabs, c), x, torch.float32) for _ in range(2))
    given = (x, dy, weight, bias, mean, rstd)
    gradient_sums[(slabs, columns, b)](*given, sum_n, sum_one, c, s, j, size, SILU=silu, **tile, num_warps=WARPS)
    sum_n, sum_one = sum_n.sum(1), sum_one.sum(1)  # b c
    average_n, average_one = (
        (sums * weight).view(b, groups, j).sum(-1).div(s * j).contiguous() for sums in (sum_n, sum_one)
    )
    dx = empty_like(x)
    grid = (triton.cdiv(s, tile["POSITIONS"]), columns, b)
    gradient_apply[grid](
        x, dy, dx, weight, bias, mean, rstd, average_n, average_one, c, s, j, SILU=silu, **tile, num_warps=WARPS
    )
    return dx, sum_n.sum(0).to(weight.dtype), sum_one.sum(0).to(bias.dtype)


@forward.register_fake
def _(x, groups, weight, bias, eps, silu):
    statistics = [x.new_empty((x.shape[0], groups), dtype=torch.float32) for _ in range(2)]
    return torch.empty_like(x), *statistics


@backward.register_fake
def _(x, dy, weight, bias, mean, rstd, silu):
    return torch.empty_like(x), torch.empty_like(weight), torch.empty_like(bias)


def keep(ctx, inputs, output) -> None:
    """What the backward needs: x, what scales it, and the statistics."""
    x, _, weight, bias, _, ctx.silu = inputs
    ctx.save_for_backward(x, weight, bias, *output[1:])


def differentiate(ctx, dy, _mean, _rstd):
    """Gradients of x, groups, weight, bias, eps, silu."""
    x, *others = ctx.saved_tensors
    dx, dw, db = backward(x, dy, *others, ctx.silu)
    return dx, None, dw, db, None, None


forward.register_autograd(differentiate, setup_context=keep)


def group_norm(x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """`ops.group_norm`; the layout of x, channels last or contiguous, stays.

    x [b, c, ...] in fp16, bf16 or fp32; weight and bias [c] in the same dtype.
    """
    return forward(x, groups, weight, bias, eps, False)[0]


def group_norm_silu(x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """`ops.group_norm_silu`, one pass more saved. As `group_norm`."""
    return forward(x, groups, weight, bias, eps, True)[0]


def accepts(x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float) -> bool:
    """Contiguous or channels last, one dtype, groups of up to 128 channels, a device where Triton runs."""
    return (
        can_run(x, weight, bias)
        and x.dtype in FLOATS
        and weight.dtype == bias.dtype == x.dtype
        and x.ndim >= 2
        and 0 < x.numel() < 2**31 * x.shape[0]
        and x.shape[1] % groups == 0
        and x.shape[1] // groups <= 128
        and (x.is_contiguous() or is_channels_last(x))
        and weight.is_contiguous()
        and bias.is_contiguous()
    )


group_norm.accepts = accepts  # type: ignore[attr-defined]
group_norm_silu.accepts = accepts  # type: ignore[attr-defined]


# channels, side of the picture: every norm of SD 1.x, 2.x at 64 and 96, of SDXL at 128, and of the autoencoder.
SHAPES = [
    *((c, side) for side in (64, 96, 128) for c in (320, 640, 960)),
    *((c, side) for side in (32, 48, 64) for c in (320, 640, 960, 1280, 1920)),
    *((c, side) for side in (16, 24, 32) for c in (640, 1280, 1920, 2560)),
    *((c, side) for side in (8, 12) for c in (1280, 2560)),
    *((c, side) for side in (64, 128, 256, 512, 1024) for c in (128, 256, 512)),
]


def builds() -> list[Build]:
    """What may be launched on the shapes of the released models; those with the same constants share a build."""
    found: dict[str, Build] = {}
    for dtype in FLOATS:
        t = name_of(dtype)
        types = {
            **dict.fromkeys(("x", "y", "dy", "dx", "weight", "bias"), f"*{t}"),
            **dict.fromkeys(("mean", "m2", "group_mean", "group_rstd", "sum_n", "sum_one"), "*fp32"),
            **dict.fromkeys(("average_n", "average_one"), "*fp32"),
            "eps": "fp32",
        }

        def add(kernel: Any, warps: int, constants: dict[str, Any], t: str = t, types: dict[str, str] = types) -> None:
            words = [str(v) if not isinstance(v, bool) else k.lower() * v for k, v in constants.items()]
            name = " ".join(filter(None, [f"group_norm {kernel.fn.__name__}", t, *words]))
            found[name] = build(name, kernel, constants, odd=["s", "j", "slabs"], warps=warps, **types)

        for last in (True, False):
            tile = tile_of(last)
            add(moments, MANY_WARPS, tile)
            for silu in (True, False):
                for kernel in (apply, gradient_sums, gradient_apply):
                    add(kernel, WARPS, {"SILU": silu, **tile})
            for c, side in SHAPES:
                j, s = c // 32, side * side
                group = whole_group(s, j, last)
                if group:
                    for silu in (True, False):
                        add(small, small_warps(group), {"LAST": last, "SILU": silu, **group})
                elif dtype == torch.float32:  # `combine` works on fp32 alone
                    for b in (1, 2):
                        slabs = triton.next_power_of_2(slabs_of(b, c, s, j, last)[0])
                        add(combine, MANY_WARPS, {"SLABS": slabs, "CHANNELS": triton.next_power_of_2(j)})
    return list(found.values())


if __name__ == "__main__":
    from sdcore.kernels import bench

    bench.show("group_norm_silu")
