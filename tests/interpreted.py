"""Tests of Triton kernels on a machine without a GPU.

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

Numbers are judged by `kernels/judge.py`, builds by `kernels/aot.py`. A single test of the first
kind: `TRITON_INTERPRET=1 python -m pytest tests/test_kernel_x.py -k numbers`.
"""

import os
import subprocess
import sys
from collections.abc import Callable
from inspect import signature
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import triton.language as tl
from sdcore.kernels import aot, common
from sdcore.kernels.judge import FACTOR, Case, compare, results
from torch import Tensor
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

DEVICE = "cpu" if common.INTERPRETED else "cuda"
RUNS_KERNELS = common.INTERPRETED or torch.cuda.is_available()


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


def _patch_once() -> None:
    """Have the interpreter put its versions into `triton.language` once for each function. By itself it does so at every launch,
    and again at every call of a device function, `tl.sum` too, which costs more than what is computed there."""
    patch, seen = interpreter._patch_lang, set()

    def once(function):
        if function not in seen:
            seen.add(function)
            patch(function)
        return interpreter._LangPatchScope()  # nothing to take back: in this process nothing is compiled

    interpreter._patch_lang = once


if common.INTERPRETED:
    _round_bf16()
    _patch_once()


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


def check(
    kernel: Callable, reference: Callable, *args: Any, seed: int = 0, factor: float = FACTOR, **kwargs: Any
) -> None:
    """Assert the rule of `kernels/judge.py`, for the outputs and for gradients of the inputs that ask for one."""
    inputs = signature(reference).bind(*args, **kwargs).arguments
    verdict = Case(reference, inputs, seed=seed).judge(kernel, factor)
    assert verdict.right, verdict.why


def within(ours: Tensor, theirs: Tensor, exact: Tensor) -> None:
    """Assert the rule for one tensor."""
    verdict = compare("output", ours, theirs, exact)
    assert verdict.right, verdict.why


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
    given = {str(i): t for i, t in enumerate(tensors)}
    plain, traced = (results(lambda f=f, **named: f(*named.values()), given, False, 1) for f in (Model(), graph))
    assert plain.keys() == traced.keys()
    # A traced backward may be handed its gradient in another layout, and add up in another order.
    for name, x in plain.items():
        assert torch.allclose(x, traced[name], rtol=1e-5, atol=1e-5 * ("gradient" in name) * float(x.abs().max())), name
    exported = torch.export.export(Model(), tuple(t.detach().clone() for t in tensors))
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


def inspect(build: common.Build) -> None:
    """Compile a build for every target and assert that nothing is wrong with it: see `kernels/aot.py`."""
    for arch in (arch for arch in aot.SHARED if arch >= build.least):
        found = aot.inspect(build, arch)
        assert not found.faults, f"{build.name} on sm_{arch}: {'; '.join(found.faults)}"
