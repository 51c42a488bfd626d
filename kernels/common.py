"""What every kernel file shares: where a kernel can run, fresh outputs, and the description of a build.

A kernel file holds, in this order: the Triton kernels, a launcher with the exact signature of its reference in `sdcore.ops`
(registered with `torch.library`, so that it traces), the predicate `accepts`, and `builds()`, which lists every configuration
it may launch, for the ahead-of-time report.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.interpreter import InterpretedFunction

# TRITON_INTERPRET=1 was set when Triton was imported: kernels run on the CPU, slowly.
INTERPRETED = triton.knobs.runtime.interpret
FLOATS = (torch.float16, torch.bfloat16, torch.float32)  # what kernels compute on
poison = False  # set by tests: outputs start as NaN, so that what a kernel forgets to write shows
_WIDEN = tl.constexpr(INTERPRETED)


@triton.jit
def dot(a, b, acc):
    """acc + a @ b, summed in fp32 and without rounding fp32 inputs to tf32.

    Hopper's tensor cores add up products of fp8 in about 14 bits: what a tile along k has summed there goes into fp32, so that no
    longer sum is rounded so. The interpreter would multiply the bits of bf16 numbers, not their values: there both are widened
    first, which changes nothing.
    """
    if a.dtype == tl.float8e4nv:
        return tl.dot(a, b, acc, max_num_imprecise_acc=a.shape[1])
    if _WIDEN:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


def can_run(*tensors: Tensor) -> bool:
    """True where Triton can be launched on all of these: on CUDA, or anywhere under the interpreter. None of them on `meta`."""
    kinds = {"cpu", "cuda"} if INTERPRETED else {"cuda"}
    return all(tensor.device.type in kinds for tensor in tensors)


def empty(shape: Sequence[int], like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """A fresh contiguous output on the device of `like`; full of NaN while `poison` is set."""
    return poison_if_asked(torch.empty(tuple(shape), dtype=dtype or like.dtype, device=like.device))


def empty_like(x: Tensor) -> Tensor:
    """A fresh output with the layout of `x` (channels-last stays so); full of NaN while `poison` is set."""
    return poison_if_asked(torch.empty_like(x))


def poison_if_asked(out: Tensor) -> Tensor:
    """Fill a fresh output with NaN while `poison` is set."""
    return out.fill_(torch.nan) if poison else out


def name_of(dtype: torch.dtype) -> str:
    """Triton's name of a dtype, such as "bf16"."""
    return {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}[dtype]


def row_stride(x: Tensor) -> int | None:
    """The distance between the rows of x [..., d] when all its dimensions but the last are seen as one.

    None where they are not equally far apart, or where the numbers of a row do not lie next to each other.
    """
    if x.stride(-1) != 1 and x.shape[-1] > 1:
        return None
    rows, distance = 1, x.shape[-1]
    for size, stride in zip(reversed(x.shape[:-1]), reversed(x.stride()[:-1]), strict=True):
        if size == 1:
            continue
        if rows == 1:
            distance = stride
        elif stride != rows * distance:
            return None
        rows *= size
    return distance


@dataclass(frozen=True)
class Build:
    """One configuration of one kernel, complete enough to compile it without a GPU."""

    name: str  # such as "geglu forward bf16 2560"
    kernel: Any  # the @triton.jit function
    signature: dict[str, str]  # argument -> "*bf16", "i32", "fp32", "constexpr"
    constants: dict[str, Any]  # the constexpr arguments
    warps: int = 4
    stages: int = 3
    attributes: dict[str, int] = field(default_factory=dict)  # argument -> divisor known of it, such as 16
    expects: tuple[str, ...] = ()  # instructions that must appear on sm_90, such as "wgmma"
    least: int = 80  # compute capability from which on it is launched


def build(
    name: str,
    kernel: Any,
    constants: dict[str, Any],
    *,
    odd: Sequence[str] = (),
    warps: int = 4,
    stages: int = 3,
    expects: tuple[str, ...] = (),
    least: int = 80,
    **types: str,
) -> Build:
    """A build of a kernel whose arguments are `constants`, those with `types`, and otherwise integers.

    Pointers and integers are multiples of 16, as the launcher will find them on every real shape, except the `odd` ones.
    """
    signature = {
        argument: "constexpr" if argument in constants else types.get(argument, "i32") for argument in kernel.arg_names
    }
    aligned = {a: 16 for a, t in signature.items() if (t[0] == "*" or t[0] == "i") and a not in odd}
    return Build(name, kernel, signature, constants, warps, stages, aligned, expects, least)


def is_interpreted(kernel: Any) -> bool:
    """True where this kernel was made for the interpreter, and so cannot be compiled."""
    return isinstance(kernel, InterpretedFunction)
