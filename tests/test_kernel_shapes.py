"""Every kernel, forward and backward, on every shape of `kernels/shapes.py`, made small by that file's own rule (`small`).

    stays    the width of a head, the channels of a group, the 77 tokens of a text, the width of a norm, the kind of a
             convolution, of an epilogue and of a layout (q, k and v are views of one projection, pictures channels last)
    shrinks  the batch to 1 (norms of pictures: 2), heads to 2, lengths to 77, 45 or 19, pictures to 7 x 5, channels of products

Shapes that are then alike are judged once. Each is judged in one dtype in every run, in the others among the long proofs. The
rule is that of `kernels/judge.py`: every output and every gradient within twice PyTorch's own error against fp64, outputs that
start as NaN, inputs amid NaN.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from sdcore.kernels import common, conv, subjects, upsample_conv
from sdcore.kernels.judge import Case
from sdcore.kernels.shapes import Attention, Call
from sdcore.kernels.subjects import SUBJECTS, Subject

from tests.interpreted import DEVICE, interpreted, run_in_interpreter

test_in_the_interpreter = run_in_interpreter(__file__)
FROZEN = {"row"}  # numbers of a sampler: no gradient is defined for them
FOR_DRAWING = {"fp8_linear", "fp8_conv"}  # codes have no gradient


def parities(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """`conv.upsample`, the four convolutions of a doubling in one launch, with what is done once a model."""
    return conv.upsample(x, upsample_conv.fold(weight).contiguous(memory_format=torch.channels_last), bias)


def subject(name: str) -> Subject:
    """What the bench puts on trial, and the one kernel that it reaches by another's name."""
    if name == "parities":
        return replace(subjects.subject("upsample_conv"), kernel=parities)
    return subjects.subject(name)


NAMES = [*SUBJECTS, "parities"]


def small(name: str) -> list[Any]:
    """The different small shapes of a kernel; a text of a single token for each with a text."""
    shapes = [call.shape.small() for call in subject(name).rows()]
    shapes += [shape._replace(k=1) for shape in shapes if isinstance(shape, Attention) and shape.k != shape.s]
    return list(dict.fromkeys(shapes))


def cases() -> Iterator[Any]:
    for name in NAMES:
        for i, shape in enumerate(small(name)):
            for k, dtype in enumerate(common.FLOATS):
                marks = [] if i % len(common.FLOATS) == k else [pytest.mark.check]
                yield pytest.param(name, shape, dtype, id=f"{name} {shape} {common.name_of(dtype)}", marks=marks)


@interpreted
@pytest.mark.parametrize("name, shape, dtype", cases())
def test_outputs_and_gradients(name, shape, dtype):
    one = subject(name)
    inputs = one.make(Call(one.kind, "small", shape, 1), dtype, torch.device(DEVICE))
    accepts = getattr(one.kernel, "accepts", None)
    if accepts is not None and not accepts(**inputs):
        assert isinstance(shape, Attention) and dtype == torch.float32, (
            "only the widest heads of the UNet, and only in fp32"
        )
        pytest.skip("left to PyTorch: see `attention.accepts`")
    alone = isinstance(shape, Attention) and shape.k == 1  # scores that decide nothing: q and k hear only rounding
    for key, x in inputs.items():
        trained = isinstance(x, torch.Tensor) and key not in FROZEN and name not in FOR_DRAWING
        if trained and not (alone and key in "qk"):
            x.requires_grad_()
    verdict = Case(one.reference, inputs).judge(one.kernel)
    assert verdict.right, verdict.why


def test_no_shape_is_left_out():
    """Every row of the table is some kernel's, but for what PyTorch keeps: products of one row, convolutions of few channels or
    one tap, and those that pad one side only."""
    from sdcore.kernels import shapes

    seen = {id(call.shape): call for name in NAMES for call in subject(name).rows()}
    met = Counter((call.op, call.model, call.shape) for call in seen.values())
    for call in shapes.calls():
        left = call.op in ("linear", "conv") and not (
            call.shape.s > 1
            if call.op == "linear"
            else call.shape.side == 3 and call.shape.padded and call.shape.c >= 16
        )
        assert left or (call.op, call.model, call.shape) in met, call


def test_head_widths_and_groups_are_all_there():
    heads = {shape.d // shape.heads for shape in small("attention")}
    groups = {shape.c // 32 for shape in [*small("group_norm_silu"), *small("group_norm")]}
    assert heads == {40, 64, 80, 160, 512} and {1, 77} <= {shape.k for shape in small("attention")}
    assert groups >= {4, 8, 10, 16, 20, 30, 40, 60, 80}
