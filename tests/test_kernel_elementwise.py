"""Kernels that touch every number once: GEGLU.

Numbers are judged against fp64, by the rule of `tests/interpreted.py`.
"""

import pytest
import torch
from sdcore.kernels import common, geglu

from sdcore import ops
from tests.interpreted import DEVICE, check, compiled, inspect, interpreted, run_in_interpreter

test_in_the_interpreter = run_in_interpreter(__file__)
FLOATS = pytest.mark.parametrize("dtype", common.FLOATS, ids=common.name_of)


def normal(*shape: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """Normal numbers that ask for a gradient."""
    generator = torch.Generator("cpu").manual_seed(seed)
    return torch.randn(shape, generator=generator).to(DEVICE, dtype).requires_grad_()


@interpreted
@FLOATS
@pytest.mark.parametrize("shape", [(2, 3, 2 * 1280), (1, 1, 2 * 2560), (5, 2 * 384), (2, 2, 2 * 37), (2,)], ids=str)
def test_geglu(shape, dtype):
    """Widths of SD1.5 and SDXL, a ragged one, a single number."""
    x = normal(*shape, dtype=dtype)
    assert geglu.accepts(x)
    check(geglu.geglu, ops.REFERENCES["geglu"], x)


@compiled
@pytest.mark.parametrize("arch", [80, 90, 100])
@pytest.mark.parametrize("build", geglu.builds(), ids=lambda build: build.name)
def test_builds(build, arch):
    inspect(build, arch)
