"""Linear layers with epilogues: bias, GEGLU, residual, and a low-rank adapter; and convolutions as GEMMs.

Numbers are judged against fp64, by the rule of `kernels/judge.py`. Widths are those of the released models scaled down, and
ragged ones; `tile` sees to it that every way to cut the work is taken.
"""

import pytest
import torch
from sdcore.kernels import common, conv, gemm, lora_linear, upsample_conv

from tests.interpreted import DEVICE, check, check_tracing, compiled, each, inspect, interpreted, run_in_interpreter

test_in_the_interpreter = run_in_interpreter(__file__)
FLOATS = pytest.mark.parametrize("dtype", common.FLOATS, ids=common.name_of)
LAST = torch.channels_last


def normal(*shape: int, dtype: torch.dtype, seed: int, grad: bool = True) -> torch.Tensor:
    """Normal numbers, those of a weight divided by the root of its width, that may ask for a gradient."""
    x = torch.randn(shape, generator=torch.Generator("cpu").manual_seed(seed))
    return x.to(DEVICE, dtype).requires_grad_(grad)


def layer(m: tuple[int, ...], k: int, n: int, dtype: torch.dtype, gated: bool = False) -> dict[str, torch.Tensor]:
    """Everything that a linear layer is given, drawn at random."""
    rows = n * (1 + gated)
    weight = (normal(rows, k, dtype=torch.float32, seed=1, grad=False) / k**0.5).to(dtype).requires_grad_()
    return {
        "x": normal(*m, k, dtype=dtype, seed=0),
        "weight": weight,
        "bias": normal(rows, dtype=dtype, seed=2),
        "residual": normal(*m, n, dtype=dtype, seed=3),
    }


EPILOGUES = {
    "plain": ({"bias", "residual"}, False),
    "bias": ({"residual"}, False),
    "residual": (set(), False),
    "gated": ({"residual"}, True),
    "gated, residual": (set(), True),
}


@interpreted
@FLOATS
@pytest.mark.parametrize("epilogue", EPILOGUES)
@pytest.mark.parametrize("shape", [((2, 65), 320, 160), ((3,), 77, 33)], ids=["even", "ragged"])
def test_gemm(shape, epilogue, dtype):
    m, k, n = shape
    without, gated = EPILOGUES[epilogue]
    given = {name: t for name, t in layer(m, k, n, dtype, gated).items() if name not in without}
    assert gemm.gemm.accepts(**given, gated=gated)
    check(gemm.gemm, gemm.reference, **given, gated=gated)


@interpreted
@pytest.mark.parametrize("gated", [False, True])
def test_every_tile(gated, monkeypatch):
    """Several tiles in both directions, so that their numbering is a permutation: what no program writes is NaN."""
    for tile in gemm.tiles(torch.bfloat16, gated):
        monkeypatch.setattr(gemm, "choose", lambda *_, tile=tile: tile)
        given = layer((2 * tile.m + 5,), 2 * tile.k, 2 * tile.n + 3, torch.bfloat16, gated)
        with torch.no_grad():
            given = {name: t.detach() for name, t in given.items()}
            check(gemm.gemm, gemm.reference, **given, gated=gated)


@interpreted
def test_many_rows_of_tiles(monkeypatch):
    """More rows of tiles than are walked together, the last band of them lower."""
    monkeypatch.setattr(gemm, "TOGETHER", 2)
    given = {name: t.detach() for name, t in layer((5 * 64,), 32, 3 * 64, torch.float32).items()}
    check(gemm.gemm, gemm.reference, **given)


@interpreted
def test_gemm_strided():
    """x and residual as parts of wider rows: queries beside keys beside values."""
    wide = normal(2, 9, 3 * 64, dtype=torch.float16, seed=0, grad=False)
    given = layer((2, 9), 64, 64, torch.float16)
    given |= {"x": wide[..., 64:128].requires_grad_(), "residual": wide[..., :64].requires_grad_()}
    assert gemm.gemm.accepts(**given)
    check(gemm.gemm, gemm.reference, **given)


@interpreted
@pytest.mark.parametrize("gated", [False, True])
def test_gemm_reads_nothing_else(gated):
    """A width that no tile divides, in rows amid NaN."""
    given = layer((3,), 77, 33, torch.float32, gated)
    given["x"] = normal(3, 200, dtype=torch.float32, seed=0, grad=False)[:, 50:127]
    check(gemm.gemm, gemm.reference, **{name: t.detach() for name, t in given.items()}, gated=gated)


@interpreted
def test_gemm_refuses():
    given = layer((2, 9), 64, 64, torch.float16)
    assert not gemm.gemm.accepts(given["x"], given["weight"].T)
    assert not gemm.gemm.accepts(given["x"], given["weight"].float())
    assert not gemm.gemm.accepts(given["x"][..., ::2], given["weight"][:, :32].contiguous())
    assert not gemm.gemm.accepts(**given, gated=True)


def test_choice():
    """The choice ends no later than any other would, by its own estimate, and large work gets large tiles."""
    assert gemm.choose(65536, 5120, gemm.HALF, 132) is gemm.HALF[0]
    assert gemm.choose(128, 1280, gemm.HALF, 132) is gemm.HALF[-1]
    assert gemm.choose(65536, 5120, gemm.HALF_GATED, 132) is gemm.HALF_GATED[0]


# ------------------------------------------------------------------------------------------------------------------- LoRA


def adapted(m: tuple[int, ...], k: int, n: int, r: int, dtype: torch.dtype) -> dict:
    """A linear layer with an adapter that asks for gradients; the layer itself is frozen."""
    given = layer(m, k, n, dtype)
    down = (normal(r, k, dtype=torch.float32, seed=4, grad=False) / k**0.5).to(dtype).requires_grad_()
    return {
        "x": given["x"],
        "weight": given["weight"].detach(),
        "bias": given["bias"].detach(),
        "down": down,
        "up": (normal(n, r, dtype=torch.float32, seed=5, grad=False) / r**0.5).to(dtype).requires_grad_(),
        "scale": 0.75,
    }


@interpreted
@FLOATS
@pytest.mark.parametrize("shape", [((2, 33), 320, 96, 4), ((70,), 64, 130, 16), ((3,), 77, 33, 20)], ids=str)
def test_lora_linear(shape, dtype):
    """Ranks below, at and above 16, the least that the matrix units take; ragged sizes."""
    given = adapted(*shape, dtype)
    assert lora_linear.lora_linear.accepts(**given)
    check(lora_linear.lora_linear, lora_linear.reference, **given)


@interpreted
def test_lora_linear_trains_the_layer_too():
    given = adapted((9,), 64, 32, 8, torch.float32)
    given["weight"].requires_grad_()
    check(lora_linear.lora_linear, lora_linear.reference, **{**given, "bias": None})
    given["bias"].requires_grad_()
    check(lora_linear.lora_linear, lora_linear.reference, **given)


@interpreted
def test_every_tile_of_lora_linear(monkeypatch):
    for tile in lora_linear.HALF:
        monkeypatch.setattr(lora_linear, "choose", lambda *_, tile=tile: tile)
        given = adapted((tile.m + 5,), tile.k, tile.n + 3, 4, torch.bfloat16)
        check(lora_linear.lora_linear, lora_linear.reference, **given)


# ------------------------------------------------------------------------------------------------------------ convolution


def filters(b: int, c: int, h: int, w: int, o: int, dtype: torch.dtype, stride: int = 1) -> dict[str, torch.Tensor]:
    """Everything that a 3 x 3 convolution of a residual block is given, channels last."""
    out = (b, o, (h - 1) // stride + 1, (w - 1) // stride + 1)
    weight = (normal(o, c, 3, 3, dtype=torch.float32, seed=1, grad=False) / (9 * c) ** 0.5).to(dtype)
    pictures = {"x": normal(b, c, h, w, dtype=dtype, seed=0, grad=False), "weight": weight}
    pictures["residual"] = normal(*out, dtype=dtype, seed=3, grad=False)
    return {
        **{name: t.contiguous(memory_format=torch.channels_last).requires_grad_() for name, t in pictures.items()},
        "bias": normal(o, dtype=dtype, seed=2),
        "shift": normal(b, o, 1, 1, dtype=dtype, seed=4),
    }


@interpreted
@FLOATS
@pytest.mark.parametrize("shape", [(2, 64, 5, 4, 48), (1, 20, 3, 1, 5), (1, 32, 1, 1, 16)], ids=str)
@pytest.mark.parametrize("without", [("residual",), ("shift",), ("bias", "shift", "residual")], ids=str)
def test_conv(shape, without, dtype):
    """First and second convolution of a residual block, and a bare one; channels that are no multiple of a tile."""
    given = {name: t for name, t in filters(*shape, dtype).items() if name not in without}
    assert conv.conv.accepts(**given)
    check(conv.conv, conv.reference, **given)
    assert conv.conv(**given).is_contiguous(memory_format=torch.channels_last)


@interpreted
@pytest.mark.parametrize("size", [(5, 4), (6, 7)], ids=str)
def test_conv_by_two(size):
    """The downsampling convolutions of the UNet, on even and odd sides."""
    given = {n: t for n, t in filters(1, 32, *size, 16, torch.float32, 2).items() if n in ("x", "weight", "bias")}
    check(conv.conv, conv.reference, **given, stride=2)


@interpreted
def test_every_tile_of_conv(monkeypatch):
    for tile in conv.HALF:
        monkeypatch.setattr(conv, "choose", lambda *_, tile=tile: tile)
        given = {name: t.detach() for name, t in filters(2, 64, 9, 8, tile.n + 3, torch.bfloat16).items()}
        check(conv.conv, conv.reference, **given)


@interpreted
def test_conv_refuses():
    given = filters(1, 32, 4, 4, 16, torch.float16)
    assert not conv.conv.accepts(given["x"].detach().contiguous(), given["weight"])
    assert not conv.conv.accepts(given["x"], given["weight"], padding=0)
    assert not conv.conv.accepts(given["x"], given["weight"][..., :1, :1])
    assert not conv.conv.accepts(*(given[n][:, :8].contiguous(memory_format=LAST) for n in ("x", "weight")))


@interpreted
@FLOATS
def test_upsample_conv(dtype):
    """The four parities in one launch."""
    given = {n: t for n, t in filters(2, 24, 3, 5, 20, dtype).items() if n in ("x", "weight", "bias")}
    folded = upsample_conv.fold(given.pop("weight").detach()).contiguous(memory_format=torch.channels_last)
    given["folded"] = folded.requires_grad_()
    assert conv.upsample.accepts(**given)
    check(conv.upsample, upsample_conv.upsample_conv, **given)


# ---------------------------------------------------------------------------------------------------- tracing, compiling


@interpreted
def test_tracing():
    given = layer((2, 3), 32, 16, torch.float32, gated=True)
    check_tracing("gemm", gemm.gemm, *given.values(), True)
    torch.library.opcheck(gemm.forward, (*given.values(), True))
    given = layer((2, 3), 32, 16, torch.float32)
    check_tracing("gemm", gemm.gemm, *given.values())
    given = adapted((2, 3), 32, 16, 4, torch.float32)
    check_tracing("lora_linear", lora_linear.lora_linear, *given.values())
    torch.library.opcheck(lora_linear.forward, tuple(given.values()))
    given = filters(1, 16, 3, 2, 8, torch.float32)
    x, weight, residual, bias, shift = given.values()
    check_tracing("conv", conv.conv, x, weight, bias, shift, residual)
    torch.library.opcheck(conv.forward, (x, weight, bias, shift, residual, 1))
    folded = upsample_conv.fold(weight.detach()).contiguous(memory_format=torch.channels_last).requires_grad_()
    check_tracing("upsample_conv", conv.upsample, x, folded, bias)
    torch.library.opcheck(conv.upsample_forward, (x, folded, bias))


@compiled
@each([*gemm.builds(), *lora_linear.builds(), *conv.builds()])
def test_builds(build):
    inspect(build)
