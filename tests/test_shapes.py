"""The table of shapes is what the models call, no more and no less; what its rows make and count is right."""

import pytest
import torch
from sdcore.kernels import shapes
from sdcore.kernels.shapes import KINDS, MODELS, TABLE, calls
from torch.utils.flop_counter import FlopCounterMode

from sdcore import ops

# TFLOP of one UNet step at batch 2 and of one picture, counted independently by torch's FlopCounterMode at full size.
TFLOP = {
    "SD1.5 512": 1.6065,
    "SD2.1 768": 4.2982,
    "SDXL 1024": 13.5225,
    "VAE decode 512": 2.5145,
    "VAE decode 1024": 10.4704,
    "VAE encode 512": 1.1167,
    "VAE encode 1024": 4.8790,
}


@pytest.mark.parametrize("model", MODELS)
def test_the_table_is_what_the_models_call(model):
    assert TABLE[model] == MODELS[model]()


def test_a_new_operation_is_not_overlooked(monkeypatch):
    """An operation of the seam that the table does not know stops the trace, rather than being left out of it."""
    monkeypatch.setitem(ops.REFERENCES, "novel", lambda x: x)
    with pytest.raises(KeyError, match="novel"):
        shapes._noted("novel", shapes.Counter())(torch.ones(1))


@pytest.mark.parametrize("model", MODELS)
def test_the_work_adds_up(model):
    total = sum(call.shape.flop * call.times for call in calls(model=model))
    assert total / 1e12 == pytest.approx(TFLOP[model], abs=5e-5)


SOME = [next(calls(kind, "SD1.5 512")) for kind in KINDS] + [next(calls("attention", "VAE decode 512"))]


@pytest.mark.parametrize("call", SOME, ids=lambda call: f"{call.op} {call.shape}")
def test_inputs_fit_the_reference(call):
    """The small version of a row makes arguments that its reference takes, the same for the same seed, other for another."""
    shape = call.shape.small()
    first, again, other = (shape.make(torch.bfloat16, "cpu", torch.Generator().manual_seed(seed)) for seed in (0, 0, 1))
    reference = ops.REFERENCES.get(call.op)
    if reference is not None:
        with FlopCounterMode(display=False) as counted:
            out = reference(**first)
        assert out.dtype == torch.bfloat16
        assert counted.get_total_flops() in (0, shape.flop)
    tensors = [name for name, value in first.items() if isinstance(value, torch.Tensor)]
    assert all(torch.equal(first[name], again[name]) and not torch.equal(first[name], other[name]) for name in tensors)
    assert all(first[name].dtype == torch.bfloat16 for name in tensors)


def test_inputs_lie_in_memory_as_in_a_model():
    """Self-attention reads one fused projection, pictures are channels last."""
    attention, norm, conv = (
        next(calls(kind, "SD1.5 512")).shape.small() for kind in ("attention", "group_norm", "conv")
    )
    draw = torch.float32, "cpu", torch.Generator().manual_seed(0)
    made = attention.make(*draw)
    q, k, v = (made[name] for name in "qkv")
    assert q.stride(1) == k.stride(1) == v.stride(1) == 3 * attention.d
    assert k.data_ptr() == q.data_ptr() + q.element_size() * attention.d
    assert norm.make(*draw)["x"].is_contiguous(memory_format=torch.channels_last)
    assert all(conv.make(*draw)[name].is_contiguous(memory_format=torch.channels_last) for name in ("x", "weight"))


@pytest.mark.parametrize("kind", KINDS)
def test_small_keeps_what_matters(kind):
    """Head widths and channels a group stay, the work shrinks to what an interpreter can do, and lengths become ragged."""
    for call in calls(kind):
        shape, small = call.shape, call.shape.small()
        assert type(small) is type(shape) and small.elements <= min(shape.elements, 2**19)
        if kind == "attention":
            assert small.d // small.heads == shape.d // shape.heads and small.k in (min(shape.k, 77), small.s)
        if kind.startswith("group_norm"):
            assert small.c == shape.c and small.eps == shape.eps
        if kind in ("layer_norm", "geglu"):
            assert small.d == shape.d
        if kind == "linear":
            assert (small.out == 8 * small.d) == (shape.out == 8 * shape.d) and small.bias == shape.bias
        if kind == "conv":
            assert (small.side, small.stride, small.padded) == (shape.side, shape.stride, shape.padded)


def test_what_is_not_there_is_an_error():
    with pytest.raises(KeyError):
        list(calls(model="SD9"))
    with pytest.raises(KeyError):
        list(calls(op="attentoin", model="SD1.5 512"))
