"""Kernels that touch every number once: GEGLU, and guidance with the sampler's move. And the folded upsampling convolution.

Numbers are judged against fp64, by the rule of `kernels/judge.py`.
"""

import pytest
import torch
from sdcore.kernels import common, geglu, guidance_step, upsample_conv

from sdcore import ops
from sdcore.guidance import denoiser
from sdcore.samplers import SAMPLERS, make_steps, memory, sample
from sdcore.scheduler import SchedulerConfig
from tests.interpreted import (
    DEVICE,
    check,
    check_tracing,
    compiled,
    each,
    inspect,
    interpreted,
    run_in_interpreter,
    within,
)

test_in_the_interpreter = run_in_interpreter(__file__)
FLOATS = pytest.mark.parametrize("dtype", common.FLOATS, ids=common.name_of)


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0, grad: bool = True) -> torch.Tensor:
    """Normal numbers that may ask for a gradient."""
    x = torch.randn(shape, generator=torch.Generator("cpu").manual_seed(seed))
    return x.to(DEVICE, dtype).requires_grad_(grad)


# ------------------------------------------------------------------------------------------------------------------ GEGLU


@interpreted
@FLOATS
@pytest.mark.parametrize("shape", [(2, 3, 2 * 1280), (1, 1, 2 * 2560), (5, 2 * 384), (2, 2, 2 * 37), (2,)], ids=str)
def test_geglu(shape, dtype):
    """Widths of SD1.5 and SDXL, a ragged one, a single number."""
    x = normal(*shape, dtype=dtype)
    assert geglu.accepts(x)
    check(geglu.geglu, ops.REFERENCES["geglu"], x)


@interpreted
def test_geglu_strided():
    """Rows that are part of wider ones; what has no rows at equal distances is refused."""
    wide = normal(2, 5, 400, dtype=torch.float16, grad=False)
    check(geglu.geglu, ops.REFERENCES["geglu"], wide[..., 100:300].requires_grad_())
    assert not geglu.accepts(wide[:, :3].transpose(0, 1))
    assert not geglu.accepts(wide.transpose(1, 2)) and not geglu.accepts(wide.double())
    assert not geglu.accepts(wide[..., :3])


@interpreted
def test_geglu_traces():
    x = normal(2, 3, 40)
    check_tracing("geglu", geglu.geglu, x)
    torch.library.opcheck(geglu.forward, (x,))


# ---------------------------------------------------------------------------------------------------------- guidance step


@interpreted
@FLOATS
@pytest.mark.parametrize("pairs", [0, 1, 4])
@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("noisy", [False, True])
def test_guidance_step(dtype, pairs, guided, noisy):
    """All results and gradients, from an output in either layout. The size is no multiple of a block."""
    shape = (2, 4, 9, 11)
    output = normal(2 * (1 + guided), *shape[1:], dtype=dtype, seed=1, grad=False)
    if noisy:
        output = output.contiguous(memory_format=torch.channels_last)
    row = torch.linspace(-1.3, 1.7, 7 + 2 * pairs, device=DEVICE)
    history = normal(pairs, 2, *shape, seed=2)
    args = [output.requires_grad_(), normal(*shape), row, history, normal(*shape, seed=3) if noisy else None]
    assert guidance_step.guidance_step.accepts(*args)
    check(guidance_step.guidance_step, guidance_step.reference, *args)
    entry = guidance_step.guidance_step(*args)[2]
    assert entry.dtype == dtype and entry.is_contiguous(memory_format=torch.channels_last) == noisy


@interpreted
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler(sampler):
    """A whole run through the kernel is bit-equal to `denoiser` and `sample`, of which it is one step."""
    steps = make_steps(SchedulerConfig(), 5, sampler)
    x = start = normal(1, 2, 4, 4, grad=False)
    noises = [normal(1, 2, 4, 4, seed=i, grad=False) for i in range(len(steps))]

    def network(entry, step):
        return torch.sin(entry * (1 + torch.arange(len(entry), device=DEVICE).view(-1, 1, 1, 1)) + step.i)

    draws = iter([n for n, step in zip(noises, steps, strict=True) if step.std])
    wanted = list(sample(denoiser(network, guidance=3.0), start, steps, noise=lambda x: next(draws)))
    table = guidance_step.rows(steps, 3.0).to(DEVICE)
    history = torch.zeros(memory(steps), 2, *x.shape, device=DEVICE)
    entry = x * steps[0].input_scale
    for step, row, noise in zip(steps, table, noises, strict=True):
        output = network(torch.cat([entry, entry]), step)
        x, x0, entry, history = guidance_step.guidance_step(output, x, row, history, noise if step.std else None)
        assert torch.equal(x0, wanted[step.i][2]) and torch.equal(x, wanted[step.i][1]), step.i


@interpreted
def test_guidance_step_traces():
    args = (normal(4, 3, 2, 2), normal(2, 3, 2, 2, seed=1), torch.linspace(-1, 1, 9), normal(1, 2, 2, 3, 2, 2, seed=2))
    check_tracing("guidance_step", guidance_step.guidance_step, *args)
    torch.library.opcheck(guidance_step.forward, (*args, None))


# ------------------------------------------------------------------------------------------- folded upsampling convolution


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("size", [(5, 3), (1, 1), (8, 8)], ids=str)
def test_upsample_conv_is_exact(size, last):
    """In fp64 the folded convolution is the plain one to rounding, gradients too; the layout stays."""
    x = torch.randn(2, 6, *size, dtype=torch.float64)
    x = x.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format).requires_grad_()
    weight = torch.randn(7, 6, 3, 3, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(7, dtype=torch.float64, requires_grad=True)
    plain = upsample_conv.reference(x, weight, bias)
    folded = upsample_conv.upsample_conv(x, upsample_conv.fold(weight), bias)
    push = torch.randn_like(plain)
    assert torch.allclose(folded, plain, rtol=0, atol=1e-13)
    for ours, theirs in zip(*(torch.autograd.grad(y, (x, weight, bias), push) for y in (folded, plain)), strict=True):
        assert torch.allclose(ours, theirs, rtol=0, atol=1e-12)
    if size != (1, 1):
        assert folded.is_contiguous(memory_format=torch.channels_last) == last


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_upsample_conv_rounds_no_worse(dtype):
    """Against fp64, at the width of the autoencoder: at most twice the error of the plain convolution."""
    x, weight = torch.randn(1, 256, 8, 8).to(dtype), (torch.randn(32, 256, 3, 3) / 48).to(dtype)
    exact = upsample_conv.reference(x.double(), weight.double())
    folded = upsample_conv.upsample_conv(x, upsample_conv.fold(weight))
    within(folded, upsample_conv.reference(x, weight), exact)


def test_fold_rounds_once():
    """bf16 weights are added exactly and rounded once."""
    weight = torch.randn(3, 2, 3, 3).bfloat16()
    assert torch.equal(upsample_conv.fold(weight), upsample_conv.fold(weight.double()).bfloat16())


# -------------------------------------------------------------------------------------------------------------- compiling


@compiled
@each([*geglu.builds(), *guidance_step.builds()])
def test_builds(build):
    inspect(build)
