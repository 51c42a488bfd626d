"""The norms: LayerNorm (alone and behind an addition) and GroupNorm (alone and before SiLU), in both layouts.

Numbers are judged against fp64, by the rule of `kernels/judge.py`. Widths, channels and groups are those of the released
models; batches and pictures are small. `slabs` makes the path of large pictures be taken on small ones.
"""

import pytest
import torch
from sdcore.kernels import common, group_norm_silu, layer_norm

from sdcore import ops
from tests.interpreted import DEVICE, check, check_tracing, compiled, each, inspect, interpreted, run_in_interpreter

test_in_the_interpreter = run_in_interpreter(__file__)
FAR = 8.0  # the interpreter adds up one number after the other, which shows in a large mean; cancellation would cost thousands
FLOATS = pytest.mark.parametrize("dtype", common.FLOATS, ids=common.name_of)


def normal(*shape: int, dtype: torch.dtype, seed: int = 0, mean: float = 0.0, grad: bool = True) -> torch.Tensor:
    """Normal numbers around a mean, that may ask for a gradient."""
    x = mean + torch.randn(shape, generator=torch.Generator("cpu").manual_seed(seed))
    return x.to(DEVICE, dtype).requires_grad_(grad)


def affine(d: int, dtype: torch.dtype, grad: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
    """A scale around 1 and a shift around 0."""
    return normal(d, dtype=dtype, seed=1, mean=1.0, grad=grad), normal(d, dtype=dtype, seed=2, grad=grad)


# ------------------------------------------------------------------------------------------------------------- layer norm


@interpreted
@FLOATS
@pytest.mark.parametrize("shape", [(2, 7, 320), (1, 3, 640), (1, 3, 1280), (9, 768), (2, 2, 37), (1, 1)], ids=str)
def test_layer_norm(shape, dtype):
    """Widths of the released models; ragged counts of rows."""
    args = (normal(*shape, dtype=dtype), *affine(shape[-1], dtype), 1e-5)
    assert layer_norm.layer_norm.accepts(*args)
    check(layer_norm.layer_norm, ops.REFERENCES["layer_norm"], *args)


@interpreted
def test_layer_norm_of_far_numbers():
    """A mean a thousand times the deviation: squares must be taken of deviations, not of numbers."""
    x = normal(5, 320, dtype=torch.float32, mean=1000.0)
    args = (x, *affine(320, torch.float32), 1e-5)
    check(layer_norm.layer_norm, ops.REFERENCES["layer_norm"], *args, factor=FAR)


@interpreted
def test_layer_norm_strided():
    """Rows that are part of wider ones, and a width whose numbers do not lie side by side."""
    wide = normal(2, 5, 3 * 320, dtype=torch.float16, grad=False)
    x = wide[:, :, 320:640].requires_grad_()
    check(layer_norm.layer_norm, ops.REFERENCES["layer_norm"], x, *affine(320, torch.float16), 1e-5)
    assert not layer_norm.layer_norm.accepts(wide.transpose(1, 2), *affine(5, torch.float16), 1e-5)
    assert not layer_norm.layer_norm.accepts(wide[:, ::2, :320][:, :2], *affine(320, torch.float32), 1e-5)


@interpreted
def test_layer_norm_of_many_rows(monkeypatch):
    """Each program of the backward walks over several blocks of rows, the last of them ragged."""
    monkeypatch.setattr(layer_norm, "WALKERS", 3)
    x = normal(29, 320, dtype=torch.bfloat16)
    check(layer_norm.layer_norm, ops.REFERENCES["layer_norm"], x, *affine(320, torch.bfloat16), 1e-5)


@interpreted
def test_frozen_layer_norm():
    """No gradient is worked out for a norm that asks for none."""
    x = normal(5, 640, dtype=torch.bfloat16)
    args = (x, *affine(640, torch.bfloat16, grad=False), 1e-5)
    check(layer_norm.layer_norm, ops.REFERENCES["layer_norm"], *args)


@interpreted
@FLOATS
@pytest.mark.parametrize("d", [320, 640, 1280, 37])
def test_add_layer_norm(d, dtype):
    """The sum is bit-equal to PyTorch's, and what is normalised is that sum; the gradient reaches both, from both results."""
    args = (normal(2, 5, d, dtype=dtype), normal(2, 5, d, dtype=dtype, seed=3), *affine(d, dtype), 1e-5)
    assert layer_norm.add_layer_norm.accepts(*args)
    check(layer_norm.add_layer_norm, layer_norm.reference, *args)
    h, y = layer_norm.add_layer_norm(*args)
    assert torch.equal(h, args[0] + args[1]) and torch.equal(y, layer_norm.layer_norm(h, *args[2:]))


# ------------------------------------------------------------------------------------------------------------- group norm

# channels, height, width, groups: 4, 10, 20, 30, 40, 60, 80 channels a group, the tiny model's, and ragged ones
PICTURES = [
    (128, 5, 3, 32),
    (320, 3, 4, 32),
    (640, 3, 3, 32),
    (960, 3, 3, 32),
    (1280, 2, 4, 32),
    (1920, 2, 2, 32),
    (2560, 2, 1, 32),
    (32, 4, 5, 8),
    (9, 3, 7, 3),
]
LAYOUTS = pytest.mark.parametrize("last", [True, False], ids=["channels last", "contiguous"])


def pictures():
    """Every picture in every dtype, by both paths, in both layouts. Always: all of the first one; of each other one a dtype, each
    path in one layout; and without SiLU a dtype. The rest is among the long proofs."""
    for name in ("group_norm_silu", "group_norm"):
        for i, picture in enumerate(PICTURES if name == "group_norm_silu" else PICTURES[:1]):
            for k, dtype in enumerate(common.FLOATS):
                for path in ("whole", "slabs"):
                    for last in (True, False):
                        in_turn = i % 3 == k and (path == "slabs") == (last == bool(i % 2))
                        always = (i == 0 and (k == 0 or name == "group_norm_silu")) or in_turn
                        marks = [] if always else [pytest.mark.check]
                        layout = "channels last" if last else "contiguous"
                        case = f"{name} {picture} {common.name_of(dtype)} {path} {layout}"
                        yield pytest.param(name, picture, dtype, path, last, id=case, marks=marks)


@pytest.fixture(params=["whole", "slabs"])
def path(request, monkeypatch):
    """The path of small pictures, and that of large ones in several slabs of several tiles."""
    if request.param == "slabs":
        monkeypatch.setattr(group_norm_silu, "SMALL", {True: 0, False: 0})
        monkeypatch.setattr(group_norm_silu, "TILES", {True: (4, 64), False: (4, 64)})
        monkeypatch.setattr(group_norm_silu, "slabs_of", lambda b, c, s, j, last: (-(-s // 8), 8))


def picture(b: int, c: int, h: int, w: int, last: bool, dtype: torch.dtype, **options) -> torch.Tensor:
    """Random, in the layout asked for."""
    x = normal(b, c, h, w, dtype=dtype, grad=False, **options)
    return x.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format).requires_grad_()


@interpreted
@pytest.mark.parametrize("name, shape, dtype, path, last", pictures(), indirect=["path"])
def test_group_norm(name, shape, dtype, path, last):
    c, h, w, groups = shape
    x = picture(1 if c > 128 else 2, c, h, w, last, dtype)
    args = (x, groups, *affine(c, dtype), 1e-6)
    kernel = getattr(group_norm_silu, name)
    assert kernel.accepts(*args)
    check(kernel, ops.REFERENCES[name], *args)


@interpreted
@pytest.mark.usefixtures("path")
@LAYOUTS
def test_group_norm_keeps_the_layout(last):
    x = picture(2, 32, 4, 5, last, torch.float16)
    args = (x, 8, *affine(32, torch.float16), 1e-6)
    assert group_norm_silu.group_norm_silu(*args).stride() == x.stride()


@interpreted
@pytest.mark.usefixtures("path")
@LAYOUTS
def test_group_norm_of_far_numbers(last):
    """Means a thousand times the deviation, other ones for every channel: nothing is lost to cancellation."""
    x = normal(1, 64, 5, 5, dtype=torch.float32, mean=1000.0, grad=False)
    x = x + torch.arange(64, device=DEVICE).view(1, 64, 1, 1)
    x = x.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format).requires_grad_()
    args = (x, 8, *affine(64, torch.float32), 1e-5)
    check(group_norm_silu.group_norm, ops.REFERENCES["group_norm"], *args, factor=FAR)


@interpreted
def test_group_norm_as_it_is_launched():
    """A picture too large for one program, with the tiles and slabs of the launcher itself, the last tile ragged."""
    for last in (True, False):
        x = picture(1, 32, 33, 65, last, torch.bfloat16)
        assert group_norm_silu.whole_group(33 * 65, 16, last) is None
        args = (x, 2, *affine(32, torch.bfloat16), 1e-6)
        check(group_norm_silu.group_norm_silu, ops.REFERENCES["group_norm_silu"], *args)


@interpreted
@pytest.mark.parametrize("shape", [(2, 64), (2, 64, 9), (1, 64, 2, 3, 2)], ids=str)
def test_group_norm_of_other_ranks(shape):
    x = normal(*shape, dtype=torch.float32)
    check(group_norm_silu.group_norm, ops.REFERENCES["group_norm"], x, 8, *affine(64, torch.float32), 1e-5)


@interpreted
def test_group_norm_refuses():
    """A part of the channels of something wider, and dtypes that do not agree."""
    wide = normal(2, 128, 4, 4, dtype=torch.float16, grad=False).contiguous(memory_format=torch.channels_last)
    assert not group_norm_silu.accepts(wide[:, :64], 32, *affine(64, torch.float16), 1e-5)
    assert not group_norm_silu.accepts(wide, 32, *affine(128, torch.float32), 1e-5)


@pytest.mark.parametrize("last", [True, False])
@pytest.mark.parametrize("b", [1, 2, 16])
def test_slabs_cover_the_picture(b, last):
    """Whatever the picture, every position is in one slab, no slab is empty, and `combine` can hold them."""
    for c, side in group_norm_silu.SHAPES:
        s, j = side * side, c // 32
        slabs, size = group_norm_silu.slabs_of(b, c, s, j, last)
        assert (slabs - 1) * size < s <= slabs * size
        assert size % group_norm_silu.TILES[last][0] == 0
        assert slabs * j <= group_norm_silu.MERGED


# ---------------------------------------------------------------------------------------------------- tracing, compiling


@interpreted
def test_tracing():
    x, residual = normal(2, 3, 64, dtype=torch.float32), normal(2, 3, 64, dtype=torch.float32, seed=3)
    weight, bias = affine(64, torch.float32)
    check_tracing("layer_norm", layer_norm.layer_norm, x, weight, bias, 1e-5)
    check_tracing("layer_norm", layer_norm.add_layer_norm, x, residual, weight, bias, 1e-5)
    for last in (True, False):
        pixels = picture(2, 64, 3, 5, last, torch.float32)
        check_tracing("group_norm", group_norm_silu.group_norm_silu, pixels, 8, weight, bias, 1e-5)
        torch.library.opcheck(group_norm_silu.forward, (pixels, 8, weight, bias, 1e-5, True))
    torch.library.opcheck(layer_norm.forward, (x, None, weight, bias, 1e-5))
    torch.library.opcheck(layer_norm.forward, (x, residual, weight, bias, 1e-5))


@interpreted
def test_in_the_seam():
    """`ops.using` calls the kernels, also in a graph."""
    x = normal(2, 3, 64, dtype=torch.float32, grad=False)
    args = (x, *affine(64, torch.float32, grad=False), 1e-5)
    with ops.using(layer_norm=layer_norm.layer_norm):
        assert torch.equal(ops.layer_norm(*args), layer_norm.layer_norm(*args))
        check_tracing("layer_norm", ops.layer_norm, *args)


@compiled
@each([*layer_norm.builds(), *group_norm_silu.builds()])
def test_builds(build):
    inspect(build)
