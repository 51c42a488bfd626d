"""On an NVIDIA GPU (`make gpu`): every kernel against fp64, and the bundled model against what it draws on the CPU.

Skipped where there is none.
"""

import numpy as np
import pytest
import sdcore.kernels
import torch
from sdcore.kernels import subjects
from sdcore.kernels.judge import Case
from sdcore.kernels.shapes import Call
from sdcore.kernels.subjects import SUBJECTS

import sdcore

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
PROMPTS = ["a small red circle left of a large blue square", "a large yellow star"]
LARGEST = 3  # real shapes a kernel whose gradients are judged; the bench judges the forward of all others


def calls(name: str) -> list[Call]:
    """Every shape of a kernel made small, and those with the most work as they are."""
    rows = list(subjects.subject(name).rows()) if torch.cuda.is_available() else []
    small = dict.fromkeys(call.shape.small() for call in rows)
    return [*rows[:LARGEST], *(Call(name, "small", shape, 1) for shape in small)]


@pytest.fixture(autouse=True)
def exact():
    """No TF32: fp32 means fp32."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("name", SUBJECTS)
def test_kernel(name, dtype):
    """Outputs and gradients are within twice PyTorch's own error, on all shapes."""
    subject, wrong, taken = subjects.subject(name), [], 0
    for call in calls(name):
        inputs = subject.make(call, dtype, torch.device("cuda"))
        accepts = getattr(subject.kernel, "accepts", None)
        if accepts is not None and not accepts(**inputs):
            continue
        taken += 1
        verdict = Case(subject.reference, inputs, subject.trains).judge(subject.kernel)
        wrong += [] if verdict.right else [f"{call.shape}: {verdict.why}"]
    assert not wrong and taken, wrong or "no shape was accepted"


def pictures(**options) -> np.ndarray:
    pipe = sdcore.load("tiny", **options)
    return np.stack([np.asarray(p, dtype=np.int16) for p in pipe(PROMPTS, steps=20, seed=3).images])


def test_pictures_in_fp32_equal_the_cpu():
    """Same noise, same arithmetic, other order of sums: off by the rounding of 20 steps."""
    difference = np.abs(pictures(device="cuda", dtype="fp32") - pictures(device="cpu", dtype="fp32"))
    print(f"fp32: max {difference.max()}/255, mean {difference.mean():.3f}/255")
    assert difference.max() <= 2


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_pictures_in_half_precision_show_the_same_things(dtype):
    """The same picture to the eye: 30 dB."""
    a, b = pictures(device="cuda", dtype=dtype), pictures(device="cpu", dtype="fp32")
    psnr = 10 * np.log10(255**2 / ((a - b) ** 2).mean())
    print(f"{dtype}: {psnr:.1f} dB from fp32 on the CPU")
    assert psnr >= 30


def test_pictures_with_offload_are_the_same():
    assert np.array_equal(pictures(device="cuda", dtype="fp32", offload=True), pictures(device="cuda", dtype="fp32"))


def test_pictures_accelerated_are_the_same():
    """The engine on the GPU, in fp32: its graphs and kernels add up in another order, no more."""
    pipe = sdcore.load("tiny", device="cuda", dtype="fp32")
    plain, fast = (
        np.stack([np.asarray(p, dtype=np.int16) for p in one(PROMPTS, steps=20, seed=3).images])
        for one in (pipe, sdcore.kernels.accelerate(pipe))
    )
    assert np.abs(plain - fast).max() <= 2
