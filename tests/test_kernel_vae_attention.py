"""The autoencoder's attention: one wide head as two matrix products and a softmax.

Numbers are judged against fp64, by the rule of `kernels/judge.py`.
"""

import pytest
import torch
from sdcore.kernels import attention as narrow
from sdcore.kernels import common
from sdcore.kernels import vae_attention as file
from sdcore.kernels.vae_attention import accepts, vae_attention
from torch import Tensor

from sdcore import ops
from tests.interpreted import DEVICE, check, check_tracing, compiled, each, inspect, interpreted, run_in_interpreter

test_in_the_interpreter = run_in_interpreter(__file__)
FLOATS = pytest.mark.parametrize("dtype", common.FLOATS, ids=common.name_of)
REFERENCE = ops.REFERENCES["attention"]


def inputs(d: int, queries: int, keys: int, dtype: torch.dtype, batch: int = 1, scale: float = 1.0) -> list[Tensor]:
    """q, k, v that ask for gradients."""
    generator = torch.Generator("cpu").manual_seed(0)
    drawn = (torch.randn(batch, n, d, generator=generator) * scale for n in (queries, keys, keys))
    return [x.to(DEVICE, dtype).requires_grad_() for x in drawn]


LENGTHS = [
    pytest.param(d, queries, keys, dtype, id=f"{d}-{queries}-{keys}-{common.name_of(dtype)}", marks=marks)
    for d, queries, keys in ((512, 9, 9), (136, 130, 70))
    for dtype in common.FLOATS
    for marks in [[pytest.mark.check] if d == 136 and dtype == torch.float16 else []]  # bf16 has the same tiles
]


@interpreted
@pytest.mark.parametrize("d, queries, keys, dtype", LENGTHS)
def test_lengths(d, queries, keys, dtype):
    """The width of the released models; a tile and a ragged end. Two pictures."""
    q, k, v = inputs(d, queries, keys, dtype, batch=2)
    assert accepts(q, k, v, 1)
    check(vae_attention, REFERENCE, q, k, v, 1)


@interpreted
@FLOATS
def test_a_single_key(dtype):
    """Every query gets its value; the scores decide nothing, so that nothing but rounding comes back to q and k."""
    q, k, v = inputs(136, 3, 1, dtype, batch=2)
    check(vae_attention, REFERENCE, q.detach(), k.detach(), v, 1)
    for gradient in torch.autograd.grad(vae_attention(q, k, v, 1).sum(), (q, k)):
        assert gradient.abs().max() < 3e-5  # of sums of 136 numbers near 1, in fp32


@interpreted
@pytest.mark.parametrize("d", [200, 264])
def test_other_widths(d):
    """The depth of the products ends in the middle of a tile."""
    q, k, v = inputs(d, 20, 20, torch.bfloat16)
    check(vae_attention, REFERENCE, q, k, v, 1)


@interpreted
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=common.name_of)
def test_chunks(dtype, monkeypatch):
    """Three chunks of queries, the last of them ragged: gradients of keys and values are sums over all three."""
    monkeypatch.setattr(file, "CHUNK", 1)  # byte: one tile of rows at a time
    q, k, v = inputs(40, 265, 20, dtype, batch=2)
    assert [(c.start, c.stop) for c in file._chunks(q, k)] == [(0, 128), (128, 256), (256, 265)]
    check(vae_attention, REFERENCE, q, k, v, 1)


def test_chunks_bound_the_memory():
    """256 MiB of scores for 2048 px; all rows at once for 512 px."""

    def chunks(side: int) -> list[slice]:
        x = torch.empty(1, side * side, 512, device="meta")
        return list(file._chunks(x, x))

    assert len(chunks(64)) == 1
    large = chunks(256)
    assert sum(c.stop - c.start for c in large) == 256**2
    assert all(4 * (c.stop - c.start) * 256**2 <= 256 * 2**20 for c in large)


@interpreted
def test_rows_longer_than_a_program_reads_at_once(monkeypatch):
    """The softmax walks along a row; its gradient is cut into pieces."""
    monkeypatch.setattr(file, "WIDTH", 32)
    q, k, v = inputs(24, 6, 100, torch.float32)
    check(vae_attention, REFERENCE, q, k, v, 1)


@interpreted
@FLOATS
def test_large_scores(dtype):
    """Scores beyond the range of fp16 (65504): they are kept in fp32, and their exponentials are at most 1."""
    q, k, v = inputs(512, 6, 20, dtype, scale=60.0)
    assert (q.float() @ k.float().mT).max() > 65504
    check(vae_attention, REFERENCE, q, k, v.detach().div(60).requires_grad_(), 1)


@interpreted
def test_views_of_a_fused_projection():
    fused = torch.randn(2, 10, 3 * 256, generator=torch.Generator("cpu").manual_seed(1)).to(DEVICE, torch.float16)
    q, k, v = (x.requires_grad_() for x in fused.chunk(3, dim=-1))
    assert not q.is_contiguous() and accepts(q, k, v, 1)
    check(vae_attention, REFERENCE, q, k, v, 1)


@interpreted
def test_wide_heads_come_here_from_the_attention_of_narrow_ones():
    q, k, v = (x.detach() for x in inputs(200, 5, 5, torch.float16))
    assert narrow.accepts(q, k, v, 1) and not narrow.accepts(q, k, v, 1, causal=True)
    assert torch.equal(narrow.attention(q, k, v, 1), vae_attention(q, k, v, 1))


@interpreted
def test_refused():
    q, k, v = inputs(512, 4, 4, torch.float16)
    assert accepts(q, k, v, 1)
    assert not accepts(q, k, v, 2)
    assert not accepts(q, k, v, 1, causal=True)
    assert not accepts(q, k, v, 1, upcast=True)
    assert accepts(q.float(), k.float(), v.float(), 1, upcast=True)
    assert not accepts(q, k, v.float(), 1)
    assert not accepts(q, k, v[:, :2], 1)
    assert not accepts(q[:, :0], k, v, 1)
    assert not accepts(*(x.to("meta") for x in (q, k, v)), 1)


@interpreted
def test_registered_operations():
    """PyTorch's own examination: schema, shapes without numbers, autograd, dynamic shapes."""
    q, k, v = inputs(24, 6, 7, torch.float32)
    torch.library.opcheck(file.forward, (q, k, v))
    with torch.no_grad():
        out, lse = file.forward(q, k, v)
        torch.library.opcheck(file.backward, (torch.ones_like(out), q, k, v, out, lse))


@interpreted
def test_one_node_of_a_graph():
    check_tracing("vae_attention", vae_attention, *inputs(24, 6, 7, torch.bfloat16), 1)


@compiled
@each(file.builds())
def test_builds(build):
    """No spills, shared memory within bounds, warp-group products on Hopper."""
    inspect(build)
