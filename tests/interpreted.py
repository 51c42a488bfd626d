"""Tests of Triton kernels on a machine without a GPU, and the rule by which a kernel's numbers are judged.

Triton decides when it is imported whether `@triton.jit` makes something to compile or something that its interpreter runs on the
CPU, so one process can do one of the two. A file of kernel tests therefore has tests of two kinds, and runs itself once more:

    from tests.interpreted import check, compiled, interpreted, run_in_interpreter

    test_in_the_interpreter = run_in_interpreter(__file__)

    @interpreted                # runs a kernel: on the CPU in the interpreter's process, on CUDA where there is a GPU
    @pytest.mark.parametrize(...)
    def test_numbers(...):
        check(geglu, ops.REFERENCES["geglu"], x)

    @compiled                   # compiles a kernel: needs no GPU, but the process without the interpreter
    def test_builds(...):
        inspect(build, 90)

A single test of the first kind: `TRITON_INTERPRET=1 python -m pytest tests/test_kernel_x.py -k numbers`.
"""

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from sdcore.kernels import common
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource

DEVICE = "cpu" if common.INTERPRETED else "cuda"
RUNS_KERNELS = common.INTERPRETED or torch.cuda.is_available()
SHARED = {80: 163, 90: 227, 100: 227}  # KiB of shared memory that one block may have, by compute capability


def interpreted(test: Callable) -> Callable:
    """Collected only where a kernel can be run: in the interpreter's process, or on a machine with a GPU."""
    test.__test__ = RUNS_KERNELS  # type: ignore[attr-defined]
    return test


def compiled(test: Callable) -> Callable:
    """Collected only in the process without the interpreter, the one that can compile."""
    test.__test__ = not common.INTERPRETED  # type: ignore[attr-defined]
    return test


def run_in_interpreter(file: str) -> Callable:
    """A test that runs the `interpreted` tests of this file, in a process of their own."""

    def test_in_the_interpreter(request):
        command = [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", file]
        if request.config.getoption("--check"):
            command.append("--check")
        done = subprocess.run(
            command,
            env={**os.environ, "TRITON_INTERPRET": "1"},
            cwd=Path(__file__).parents[1],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert done.returncode == 0, "\n" + done.stdout

    return compiled(test_in_the_interpreter)


# ---------------------------------------------------------------------------------------------------- the rule for numbers


def leaf(value: Any, dtype: torch.dtype | None = None) -> Any:
    """A copy of a tensor with the same strides and the same wish for a gradient, floating ones in `dtype`; others as they are."""
    if not isinstance(value, Tensor):
        return value
    copy = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device)
    copy.copy_(value.detach())
    if dtype is not None and value.is_floating_point():
        copy = copy.to(dtype)
    return copy.requires_grad_(value.requires_grad)


def results(
    function: Callable, args: tuple, kwargs: dict, seed: int, dtype: torch.dtype | None = None
) -> dict[str, Tensor]:
    """The outputs of a function and, where an argument asks for it, gradients under random output gradients, all by name."""
    names = [*map(str, range(len(args))), *kwargs]
    given = [leaf(value, dtype) for value in (*args, *kwargs.values())]
    out = function(*given[: len(args)], **dict(zip(kwargs, given[len(args) :], strict=True)))
    outs = [out] if isinstance(out, Tensor) else list(out)
    found = {f"output {i}": x.detach() for i, x in enumerate(outs)}
    wanted = {name: x for name, x in zip(names, given, strict=True) if isinstance(x, Tensor) and x.requires_grad}
    if wanted:
        # Drawn once in the dtype of the kernel's inputs, so that all three runs see the same numbers.
        generator = torch.Generator("cpu").manual_seed(seed)
        low = next(x for x in (*args, *kwargs.values()) if isinstance(x, Tensor) and x.is_floating_point()).dtype
        pushes = [torch.randn(x.shape, generator=generator).to(low).to(x) for x in outs]
        gradients = torch.autograd.grad(outs, list(wanted.values()), pushes)
        found |= {f"gradient of {name}": g for name, g in zip(wanted, gradients, strict=True)}
    return found


def check(kernel: Callable, reference: Callable, *args: Any, seed: int = 0, **kwargs: Any) -> dict[str, float]:
    """Assert that outputs and gradients of `kernel` are as near to the exact ones as those of `reference` in the same dtype.

    Exact is the reference in fp64. The largest error may be twice the reference's own, or, where that is nothing, one ulp of the
    largest value: twice what a single correct rounding costs. Outputs start as NaN. Returns error / bound by name.
    """
    ratios = {}
    exact = results(reference, args, kwargs, seed, torch.float64)
    theirs = results(reference, args, kwargs, seed)
    common.poison = True
    try:
        ours = results(kernel, args, kwargs, seed)
    finally:
        common.poison = False
    assert ours.keys() == exact.keys(), f"{list(ours)} for {list(exact)}"
    for name, x in ours.items():
        assert x.shape == theirs[name].shape and x.dtype == theirs[name].dtype, (
            f"{name}: {x.dtype} {list(x.shape)} for {theirs[name].dtype} {list(theirs[name].shape)}"
        )
        ratios[name] = within(x, theirs[name], exact[name], name)
    return ratios


def within(ours: Tensor, theirs: Tensor, exact: Tensor, name: str = "output", factor: float = 2.0) -> float:
    """Assert the rule of `check` for one tensor; returns error / bound."""
    assert not ours.isnan().any(), (
        f"{name}: {int(ours.isnan().sum())} of {ours.numel()} values were not written, or are NaN"
    )
    error, reference = (float((x.double() - exact).abs().max()) for x in (ours, theirs))
    bound = max(factor * reference, float(exact.abs().max()) * torch.finfo(ours.dtype).eps)
    assert error <= bound, f"{name}: error {error:.3g} exceeds {bound:.3g} (the reference's own is {reference:.3g})"
    return error / bound if bound else 0.0


# -------------------------------------------------------------------------------------------------- compiling without a GPU


@dataclass(frozen=True)
class Compiled:
    """What the compiler made of a build."""

    registers: int  # a thread
    spills: int  # bytes
    shared: int  # bytes a block
    ptx: str


def inspect(build: common.Build, arch: int) -> Compiled:
    """Compile a build for sm_80, sm_90 or sm_100; asserts that nothing spills, that shared memory suffices, and, on sm_90, that
    the instructions which the build expects are there."""
    source = ASTSource(
        fn=build.kernel,
        signature=build.signature,
        constexprs=build.constants,
        attrs={
            (build.kernel.arg_names.index(name),): [["tt.divisibility", divisor]]
            for name, divisor in build.attributes.items()
        },
    )
    options = {"num_warps": build.warps, "num_stages": build.stages}
    made = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    ptx = made.asm["ptx"]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.ptx"
        file.write_text(ptx)
        target = re.search(r"\.target (sm_\w+)", ptx).group(1)  # type: ignore[union-attr]
        command = [get_ptxas(arch).path, "-v", f"--gpu-name={target}", str(file), "-o", str(file.with_suffix(".cubin"))]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    registers = int(re.search(r"Used (\d+) registers", report).group(1))  # type: ignore[union-attr]
    spills = sum(map(int, re.findall(r"(\d+) bytes spill", report)))
    result = Compiled(registers, spills, made.metadata.shared, ptx)
    assert not spills, f"{build.name} on sm_{arch}: {spills} bytes spilled"
    assert result.shared <= SHARED[arch] * 1024, f"{build.name} on sm_{arch}: {result.shared} bytes of shared memory"
    if arch == 90:
        missing = [name for name in build.expects if name not in ptx]
        assert not missing, f"{build.name} on sm_90: no {', '.join(missing)} in its ptx"
    return result
