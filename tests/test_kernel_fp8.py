"""8-bit floating point: the codes, the products on them, and what the definition says of both.

Coding is exact up to one rounding, so the kernels' codes are those of `quantised.encode`, bit for bit. What the products make of
them is judged against the definition in fp64, by the rule of `kernels/judge.py`: the error of the codes is in both.
"""

import pytest
import torch
from sdcore.kernels import common, fp8, quantised
from torch import Tensor

from tests import interpreted as where
from tests.interpreted import check, compiled, each, inspect, interpreted, run_in_interpreter

test_in_the_interpreter = run_in_interpreter(__file__)
FLOATS = pytest.mark.parametrize("dtype", common.FLOATS, ids=common.name_of)
DEVICE = where.DEVICE if where.RUNS_KERNELS else "cpu"  # the definition needs neither interpreter nor GPU
LAST = torch.channels_last
EVERY = torch.arange(256, dtype=torch.uint8).view(quantised.E4M3).float()
EVERY = EVERY[EVERY.isfinite()]  # all 254 codes


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator("cpu").manual_seed(seed)).to(DEVICE, dtype)


def layer(m: tuple[int, ...], k: int, n: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """A coded linear layer, and tokens whose sizes differ by six orders of magnitude."""
    codes, scale = quantised.keep(normal(n, k, seed=1, dtype=dtype) / k**0.5)
    sizes = torch.logspace(-4, 2, m[-1]).to(DEVICE)[:, None]
    return {
        "x": (normal(*m, k) * sizes).to(dtype),
        "codes": codes,
        "scale": scale,
        "bias": normal(n, seed=2, dtype=dtype),
    }


def filters(b: int, c: int, h: int, w: int, o: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """A coded convolution, and pictures of very different sizes."""
    weight = (normal(o, c, 3, 3, seed=1) / (9 * c) ** 0.5).to(dtype).contiguous(memory_format=LAST)
    codes, scale = quantised.keep(weight)
    sizes = torch.logspace(-3, 1, b).to(DEVICE)[:, None, None, None]
    x = (normal(b, c, h, w) * sizes).to(dtype).contiguous(memory_format=LAST)
    return {"x": x, "codes": codes, "scale": scale, "bias": normal(o, seed=2, dtype=dtype)}


# ------------------------------------------------------------------------------------------------------- the definition


@compiled
@FLOATS
def test_a_scale_is_the_least_power_of_two_that_serves(dtype):
    """Also at 448 itself, just above it, and for what is all zeros."""
    tops = torch.tensor([448.0, 450.0, 224.0, 1.0, 1e-3, 3e4]).to(dtype)
    codes, scale = quantised.encode(torch.stack([tops, -tops / 3, tops * 0], dim=1), 1)
    reached = tops.double() / scale[:, 0].double()
    assert ((reached > 224) & (reached <= 448)).all() and scale[0, 0] == 1 and scale[1, 0] == 2 and scale[2, 0] == 0.5
    assert (torch.frexp(scale).mantissa == 0.5).all()
    assert torch.equal(quantised.decode(*quantised.encode(torch.zeros(2, 3, dtype=dtype), 1)), torch.zeros(2, 3))


@compiled
@FLOATS
def test_a_number_moves_by_half_a_step_at_most(dtype):
    """A step is an eighth of the power of two below; the smallest is 2^-9 of the scale."""
    x = (torch.randn(64, 300, generator=torch.Generator().manual_seed(0)) ** 3).to(dtype)
    codes, scale = quantised.encode(x, 1)
    step = torch.exp2(torch.floor(torch.log2(x.double().abs())) - 3).maximum(scale.double() / 2**9)
    assert ((quantised.decode(codes, scale.double()) - x.double()).abs() <= step / 2).all()


@compiled
def test_codes_are_the_same_in_every_dtype():
    """What can be said in bf16 has the same codes in all; codes decoded and coded again stay."""
    x = torch.randn(5, 7, 16, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    codes, scale = quantised.encode(x, (1, 2))
    for dtype in (torch.float32, torch.float64):
        again, same = quantised.encode(x.to(dtype), (1, 2))
        assert torch.equal(codes.float(), again.float()) and torch.equal(scale, same)
    again, same = quantised.encode(quantised.decode(codes, scale), (1, 2))
    assert torch.equal(quantised.decode(again, same), quantised.decode(codes, scale))
    assert torch.equal(quantised.encode(EVERY, 0)[0].float(), EVERY)


@compiled
def test_the_definition_is_the_formula():
    given = layer((3,), 32, 8, torch.float64)
    x, codes, scale, bias = given.values()
    cx, sx = quantised.encode(x, -1)
    want = (cx.double() @ codes.double().T) * sx.double() * scale.double() + bias
    torch.testing.assert_close(quantised.linear(x, codes, scale.double(), bias), want, rtol=1e-13, atol=1e-13)
    x, codes, scale, bias = filters(2, 16, 5, 4, 8, torch.float64).values()
    cx, sx = quantised.encode(x, (1, 2, 3))
    sums = torch.nn.functional.conv2d(cx.double(), codes.double(), stride=2, padding=1)
    want = sums * sx.double() * scale.double()[:, None, None] + bias[:, None, None]
    got = quantised.convolve(x, codes, scale.double(), bias, stride=2)
    torch.testing.assert_close(got, want, rtol=1e-13, atol=1e-13)


@compiled
def test_what_follows_a_product_follows_it():
    """Gate, shift and residual, as `products` has them."""
    from sdcore.kernels import products

    x, residual, shift = normal(2, 3, 32), normal(2, 3, 8, seed=4), normal(2, 8, 1, 1, seed=5)
    weight, bias = normal(16, 32, seed=1), normal(16, seed=2)
    lossy, seen = quantised.Lossy(), quantised.decode(*quantised.encode(x, -1))
    kept = quantised.keep(weight)
    told = quantised.decode(kept.codes, kept.scale[:, None])
    want = products.linear(seen, told, bias, residual, gated=True)
    torch.testing.assert_close(lossy.linear(x, kept, bias, residual, gated=True), want)
    picture, weight, bias = normal(2, 16, 4, 4), normal(8, 16, 3, 3, seed=1), normal(8, seed=2)
    kept, beside = quantised.keep(weight), normal(2, 8, 2, 2, seed=6)
    told = quantised.decode(kept.codes, kept.scale[:, None, None, None])
    seen = quantised.decode(*quantised.encode(picture, (1, 2, 3)))
    want = products.conv(seen, told, bias, shift, beside, stride=2)
    torch.testing.assert_close(lossy.conv(picture, kept, bias, shift, beside, 2), want)


# ---------------------------------------------------------------------------------------------------------- the kernels


@interpreted
@FLOATS
def test_codes_equal_the_definition(dtype):
    """Rows and pictures, every code, ties, what is too small for a code, zeros, more numbers than a program takes."""
    ties = torch.cat([(EVERY[1:] + EVERY[:-1]) / 2, EVERY, EVERY / 2**7, EVERY * 0]).to(DEVICE)
    for x in (layer((2, 9), 77, 8, dtype)["x"], ties.view(1, -1).to(dtype), layer((5,), 640, 8, dtype)["x"][:, 3:500]):
        codes, scale = fp8.coded_rows(x)
        want, same = quantised.encode(x, -1)
        assert torch.equal(codes.float(), want.float()) and torch.equal(scale, same.flatten())
    x = filters(3, 48, 10, 12, 8, dtype)["x"]
    assert x[0].numel() > fp8.BLOCK
    x[0, 0, 0, 0] = -16 * x[0].abs().max()  # the largest is negative, and in the part of the first program
    x[1, -1, -1, -1] = 16 * x[1].abs().max()  # in that of the last
    codes, scale = fp8.coded_pictures(x)
    want, same = quantised.encode(x, (1, 2, 3))
    assert torch.equal(codes.float(), want.float()) and torch.equal(scale, same.flatten())


@interpreted
@FLOATS
@pytest.mark.parametrize("shape", [((2, 33), 320, 96), ((5,), 48, 33), ((3, 4), 256, 16)], ids=str)
def test_linear(shape, dtype):
    given = layer(*shape, dtype)
    assert fp8.fp8_linear.accepts(**given)
    check(fp8.fp8_linear, quantised.linear, **given)
    check(fp8.fp8_linear, quantised.linear, **{**given, "bias": None})


@interpreted
@FLOATS
@pytest.mark.parametrize(
    "shape, stride", [((2, 48, 5, 4, 40), 1), ((3, 128, 2, 3, 16), 1), ((2, 32, 6, 7, 8), 2)], ids=str
)
def test_conv(shape, stride, dtype):
    given = filters(*shape, dtype)
    assert fp8.fp8_conv.accepts(**given, stride=stride)
    check(fp8.fp8_conv, quantised.convolve, **given, stride=stride)
    assert fp8.fp8_conv(**given).is_contiguous(memory_format=LAST)


@interpreted
def test_every_tile(monkeypatch):
    for tile in fp8.TILES:
        monkeypatch.setattr(fp8.gemm, "choose", lambda *_, tile=tile: tile)
        monkeypatch.setattr(fp8.conv, "choose", lambda *_, tile=tile: tile)
        check(fp8.fp8_linear, quantised.linear, **layer((tile.m + 5,), 2 * tile.k, tile.n + 3, torch.bfloat16))
        check(fp8.fp8_conv, quantised.convolve, **filters(2, 32, 9, 8, tile.n + 3, torch.bfloat16))


@interpreted
def test_refused():
    given = layer((4,), 64, 32, torch.float16)
    assert not fp8.fp8_linear.accepts(**{**given, "x": given["x"].double()})
    assert not fp8.fp8_linear.accepts(**{**given, "codes": given["codes"].half()})
    assert not fp8.fp8_linear.accepts(given["x"][:, ::2], given["codes"][:, ::2].contiguous(), given["scale"])
    assert not fp8.fp8_linear.accepts(given["x"][:, :32], given["codes"], given["scale"])
    assert not fp8.fp8_linear.accepts(**{**given, "bias": given["bias"].float()})
    assert not fp8.scaled_mm.accepts(**given)
    given = filters(1, 32, 4, 4, 16, torch.float16)
    assert not fp8.fp8_conv.accepts(**{**given, "x": given["x"].contiguous()})
    assert not fp8.fp8_conv.accepts(**{**given, "codes": given["codes"][..., :1, :1]})
    few = {name: given[name][:, :8].contiguous(memory_format=LAST) for name in ("x", "codes")}
    assert not fp8.fp8_conv.accepts(**{**given, **few})


@interpreted
def test_registered_operations():
    """All of PyTorch's own examination but that of the schema, which would compare codes, and has no arithmetic for them."""
    parts = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    given = layer((3,), 32, 16, torch.float32)
    torch.library.opcheck(fp8.linear_forward, tuple(given.values()), test_utils=parts)
    given = filters(1, 16, 3, 2, 8, torch.float32)
    torch.library.opcheck(fp8.conv_forward, (*given.values(), 1), test_utils=parts)
    traced = torch.compile(lambda *a: fp8.fp8_conv(*a) * 2, fullgraph=True, backend="aot_eager")(*given.values())
    assert torch.equal(traced, 2 * fp8.fp8_conv(*given.values()))


@compiled
@each(fp8.builds())
def test_builds(build):
    """No spills, shared memory within bounds, warp-group products on Hopper."""
    inspect(build)
