"""Whether a kernel is right: its largest error against fp64 may be twice that of PyTorch in the same dtype, and no more.

Rounding cannot be avoided, and how much of it there is depends on the dtype, the shape and the depth of the sum. So no tolerance
is written down anywhere. Exact is the reference run in fp64; the reference run in the dtype of the inputs has some error against
that; a kernel may have twice as much, counting one rounding of the largest value (half a unit in its last place) as the
reference's in any case: where there are few numbers, or exact ones, it may have been lucky in the last rounding.
Outputs and gradients are held to the same rule. Outputs start as NaN, so that what a kernel forgets to write shows; inputs lie
amid NaN, so that it shows who reads too far.

Source: the error rule of the FlashAttention tests (Dao et al. 2022), made two-sided by fp64.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from sdcore.kernels import common
from torch import Tensor

FACTOR = 2.0
MARGIN = 32  # NaN before and after what a kernel is given: a multiple of what its loads are aligned to


class Verdict(NamedTuple):
    """What came of judging: `right`, the worst error as a multiple of the reference's own, and, where wrong, why."""

    right: bool
    ratio: float
    why: str


class Case:
    """One set of inputs, by name, with what is exact and what PyTorch makes of them; judges any number of kernels.

    Gradients under random output gradients are compared too: of inputs that ask for one; with `gradients`, of all floating ones.
    """

    def __init__(self, reference: Callable, inputs: dict[str, Any], gradients: bool = False, seed: int = 0):
        self.inputs, self.gradients, self.seed = inputs, gradients, seed
        self.exact = results(reference, inputs, gradients, seed, torch.float64)
        self.theirs = results(reference, inputs, gradients, seed)

    def judge(self, kernel: Callable, factor: float = FACTOR) -> Verdict:
        """Run a kernel on copies of the inputs and compare; says what came out worst."""
        before, common.poison = common.poison, True
        try:
            ours = results(kernel, self.inputs, self.gradients, self.seed)
        finally:
            common.poison = before
        if ours.keys() != self.exact.keys():
            return Verdict(False, float("inf"), f"gives {', '.join(ours)}; the reference gives {', '.join(self.exact)}")
        verdicts = [compare(name, ours[name], self.theirs[name], self.exact[name], factor) for name in self.exact]
        return max(verdicts, key=lambda verdict: (not verdict.right, verdict.ratio))


def compare(name: str, ours: Tensor, theirs: Tensor, exact: Tensor, factor: float = FACTOR) -> Verdict:
    """The rule for one tensor."""
    if ours.shape != theirs.shape or ours.dtype != theirs.dtype:
        found, expected = (f"{x.dtype} {list(x.shape)}" for x in (ours, theirs))
        return Verdict(False, float("inf"), f"{name}: {found}, expected {expected}")
    if not bool(torch.isfinite(ours).all()):
        missing = int((~torch.isfinite(ours)).sum())
        return Verdict(False, float("inf"), f"{name}: {missing} of {ours.numel()} values not written, NaN or infinite")
    if not ours.numel():
        return Verdict(True, 0.0, "")
    error, own = (float((x.double() - exact).abs().max()) for x in (ours, theirs))
    ulp = float(exact.abs().max()) * torch.finfo(ours.dtype).eps
    bound = factor * (own + ulp / 2)
    ratio = error / max(own, ulp / factor) if bound else float(error > 0)
    why = (
        ""
        if error <= bound
        else f"{name}: error {error:.3g}, PyTorch's own is {own:.3g}: {ratio:.1f} times, {factor:g} allowed"
    )
    return Verdict(error <= bound, ratio, why)


def results(
    function: Callable, inputs: dict[str, Any], gradients: bool, seed: int, dtype: torch.dtype | None = None
) -> dict[str, Tensor]:
    """The outputs of a function and the gradients that are asked for; in `dtype` where one is given."""
    given = {name: leaf(value, gradients, dtype) for name, value in inputs.items()}
    if dtype is torch.float64 and "upcast" in given:
        given["upcast"] = False  # it would go down to fp32
    wanted = {name: x for name, x in given.items() if isinstance(x, Tensor) and x.requires_grad}
    with torch.set_grad_enabled(bool(wanted)):
        out = function(**given)
    outs = [out] if isinstance(out, Tensor) else list(out)
    found = {f"output {i}": x.detach() for i, x in enumerate(outs)}
    if wanted:
        pushed = torch.autograd.grad(outs, list(wanted.values()), pushes(outs, inputs, seed))
        found |= {f"gradient of {name}": g for name, g in zip(wanted, pushed, strict=True)}
    return found


def pushes(outs: list[Tensor], inputs: dict[str, Any], seed: int) -> list[Tensor]:
    """Random gradients of the outputs: the same numbers for every function and dtype, rounded to the dtype of the inputs."""
    low = next(x.dtype for x in inputs.values() if isinstance(x, Tensor) and x.is_floating_point())
    generator = torch.Generator(outs[0].device).manual_seed(seed)
    drawn = [torch.randn(x.shape, generator=generator, device=x.device) for x in outs]
    return [g.to(low).to(x) for g, x in zip(drawn, outs, strict=True)]


def leaf(value: Any, gradient: bool, dtype: torch.dtype | None) -> Any:
    """A copy of a tensor with the same strides, in `dtype` where one is given, amid NaN: a kernel that reads too far shows, also
    where it multiplies what it read by 0. What is no floating tensor is passed on."""
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return value
    length = 1 + sum((n - 1) * stride for n, stride in zip(value.shape, value.stride(), strict=True) if n)
    memory = torch.full((length + 2 * MARGIN,), torch.nan, dtype=dtype or value.dtype, device=value.device)
    copy = memory.as_strided(value.shape, value.stride(), MARGIN).copy_(value.detach())
    return copy.detach().requires_grad_(gradient or value.requires_grad)
