"""On an NVIDIA GPU (`make gpu`): the bundled model draws there what it draws on the CPU, in fp32 and in bf16.

Skipped where there is none.
"""

import numpy as np
import pytest
import torch

import sdcore

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
PROMPTS = ["a small red circle left of a large blue square", "a large yellow star"]


def pictures(**options) -> np.ndarray:
    pipe = sdcore.load("tiny", **options)
    return np.stack([np.asarray(p, dtype=np.int16) for p in pipe(PROMPTS, steps=20, seed=3).images])


def test_fp32_equals_the_cpu():
    """Same noise, same arithmetic, other order of sums: off by the rounding of 20 steps."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    difference = np.abs(pictures(device="cuda", dtype="fp32") - pictures(device="cpu", dtype="fp32"))
    print(f"fp32: max {difference.max()}/255, mean {difference.mean():.3f}/255")
    assert difference.max() <= 2


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_half_precision_draws_the_same_things(dtype):
    """The same picture to the eye: 30 dB."""
    a, b = pictures(device="cuda", dtype=dtype), pictures(device="cpu", dtype="fp32")
    psnr = 10 * np.log10(255**2 / ((a - b) ** 2).mean())
    print(f"{dtype}: {psnr:.1f} dB from fp32 on the CPU")
    assert psnr >= 30


def test_offload_draws_the_same():
    assert np.array_equal(pictures(device="cuda", dtype="fp32", offload=True), pictures(device="cuda", dtype="fp32"))
