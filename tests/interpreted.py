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
    @each(geglu.builds())
    def test_builds(build):
        inspect(build)

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

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from sdcore.kernels import common
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

DEVICE = "cpu" if common.INTERPRETED else "cuda"
RUNS_KERNELS = common.INTERPRETED or torch.cuda.is_available()
SHARED = {80: 163, 90: 227, 100: 227}  # KiB of shared memory that one block may have, by compute capability


def _round_bf16() -> None:
    """Make the interpreter round to bf16 as the hardware does, to the nearest: by itself it cuts, which doubles every error."""
    cut = InterpreterBuilder.cast_impl

    def cast(self, value, to):
        if (value.dtype.scalar, to.scalar) == (tl.float32, tl.bfloat16):
            rounded = torch.as_tensor(np.asarray(value.data)).to(torch.bfloat16)
            return TensorHandle(rounded.view(torch.uint16).numpy(), to.scalar)
        if (value.dtype.scalar, to.scalar) == (tl.bfloat16, tl.float32):  # right as it is, but slow
            return TensorHandle((np.asarray(value.data).astype(np.uint32) << 16).view(np.float32), to.scalar)
        return cut(self, value, to)

    InterpreterBuilder.cast_impl = cast


if common.INTERPRETED:
    _round_bf16()


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
    """A copy of a tensor with the same strides and the same wish for a gradient, floating ones in `dtype`; others as they are.

    It lies amid NaN: a kernel that reads too far shows, also where it multiplies what it read by 0.
    """
    if not isinstance(value, Tensor):
        return value
    dtype = dtype if dtype is not None and value.is_floating_point() else value.dtype
    length = 1 + sum((n - 1) * stride for n, stride in zip(value.shape, value.stride(), strict=True) if n)
    memory = torch.full((length + 64,), torch.nan if dtype.is_floating_point else 0, dtype=dtype, device=value.device)
    copy = memory.as_strided(value.shape, value.stride(), 32)  # what lies between and around is NaN: who reads it shows
    copy.copy_(value.detach())
    return copy.detach().requires_grad_(value.requires_grad)


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


def check(
    kernel: Callable, reference: Callable, *args: Any, seed: int = 0, factor: float = 2.0, **kwargs: Any
) -> dict[str, float]:
    """Assert that outputs and gradients of `kernel` are as near to the exact ones as those of `reference` in the same dtype.

    Exact is the reference in fp64. The largest error may be `factor` times the reference's own and one ulp of the largest value,
    which is twice what a single correct rounding costs. Outputs start as NaN. Returns error / bound by name.
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
        ratios[name] = within(x, theirs[name], exact[name], name, factor)
    return ratios


def within(ours: Tensor, theirs: Tensor, exact: Tensor, name: str = "output", factor: float = 2.0) -> float:
    """Assert the rule of `check` for one tensor; returns error / bound."""
    assert not ours.isnan().any(), (
        f"{name}: {int(ours.isnan().sum())} of {ours.numel()} values were not written, or are NaN"
    )
    if not ours.numel():
        return 0.0
    error, reference = (float((x.double() - exact).abs().max()) for x in (ours, theirs))
    bound = factor * reference + float(exact.abs().max()) * torch.finfo(ours.dtype).eps
    assert error <= bound, f"{name}: error {error:.3g} exceeds {bound:.3g} (the reference's own is {reference:.3g})"
    return error / bound if bound else 0.0


def check_tracing(operation: Any, kernel: Callable, *args: Any, **kwargs: Any) -> None:
    """Assert that `kernel` is one node of a graph: under `torch.compile(fullgraph=True)`, with its backward, and under
    `torch.export`. `operation` is the name of the node; what the graphs compute is what the kernel computes by itself."""

    class Model(torch.nn.Module):
        def forward(self, *tensors):
            given = iter(tensors)
            return kernel(*(next(given) if isinstance(a, Tensor) else a for a in args), **kwargs)

    tensors = tuple(a for a in args if isinstance(a, Tensor))
    torch._dynamo.reset()
    graph = torch.compile(Model(), fullgraph=True, backend="aot_eager")
    plain, traced = (results(f, tensors, {}, seed=1) for f in (Model(), graph))
    assert plain.keys() == traced.keys()
    for (
        name,
        x,
    ) in plain.items():  # a traced backward may be handed its gradient in another layout, and add up in another order
        assert torch.allclose(x, traced[name], rtol=1e-5, atol=1e-5 * ("gradient" in name) * float(x.abs().max())), name
    exported = torch.export.export(Model(), tuple(leaf(t).detach() for t in tensors))
    names = [str(node.target) for node in exported.graph.nodes if node.op == "call_function"]
    assert any(f"sdcore.{operation}." in name for name in names), names
    outs = exported.module()(*(t.detach() for t in tensors))
    for i, out in enumerate([outs] if isinstance(outs, Tensor) else outs):
        assert torch.equal(out, plain[f"output {i}"])


# -------------------------------------------------------------------------------------------------- compiling without a GPU


def each(builds: list[common.Build]) -> Any:
    """Parametrises a test with builds: the first of each kernel in every run, all others among the long proofs."""
    first = list({id(b.kernel): b for b in reversed(builds)}.values())
    marks = [[] if b in first else [pytest.mark.check] for b in builds]
    return pytest.mark.parametrize(
        "build", [pytest.param(b, id=b.name, marks=m) for b, m in zip(builds, marks, strict=True)]
    )


@dataclass(frozen=True)
class Compiled:
    """What the compiler made of a build."""

    registers: int  # a thread
    spills: int  # bytes
    shared: int  # bytes a block
    ptx: str


def inspect(build: common.Build) -> dict[int, Compiled]:
    """Compile a build for sm_80, sm_90 and sm_100; assert that nothing spills, that shared memory suffices, and, on sm_90, that
    the instructions which the build expects are there. Returns what came out, by compute capability."""
    made = {arch: compile_for(build, arch) for arch in SHARED}
    for arch, result in made.items():
        assert not result.spills, f"{build.name} on sm_{arch}: {result.spills} bytes spilled"
        assert result.shared <= SHARED[arch] * 1024, (
            f"{build.name} on sm_{arch}: {result.shared} bytes of shared memory"
        )
    missing = [name for name in build.expects if name not in made[90].ptx]
    assert not missing, f"{build.name} on sm_90: no {', '.join(missing)} in its ptx"
    return made


def compile_for(build: common.Build, arch: int) -> Compiled:
    """Compile a build for one compute capability."""
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
    return Compiled(registers, spills, made.metadata.shared, ptx)
