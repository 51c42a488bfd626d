"""Attention without the matrix of scores, of every head width. In the graphs of a whole UNet: test_kernel_unet.py.

Numbers are judged against fp64, by the rule of `kernels/judge.py`. Sizes are the least that still have a whole tile, a ragged
end, and several of each; the kernels know no others.
"""

import pytest
import torch
from sdcore.kernels import attention as file
from sdcore.kernels import common
from sdcore.kernels.attention import HEADS, accepts, attention, pieces
from torch import Tensor

from sdcore import ops
from tests.interpreted import (
    DEVICE,
    check,
    check_tracing,
    compiled,
    each,
    inspect,
    interpreted,
    run_in_interpreter,
)

test_in_the_interpreter = run_in_interpreter(__file__)
FLOATS = pytest.mark.parametrize("dtype", common.FLOATS, ids=common.name_of)
HALVES = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=common.name_of)
REFERENCE = ops.REFERENCES["attention"]


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0, scale: float = 1.0) -> Tensor:
    generator = torch.Generator("cpu").manual_seed(seed)
    return (torch.randn(shape, generator=generator) * scale).to(DEVICE, dtype)


def inputs(d: int, queries: int, keys: int, dtype: torch.dtype, heads: int = 2, batch: int = 1) -> list[Tensor]:
    """q, k, v that ask for gradients."""
    shapes = [(batch, n, heads * d) for n in (queries, keys, keys)]
    return [normal(*shape, dtype=dtype, seed=i).requires_grad_() for i, shape in enumerate(shapes)]


# ---------------------------------------------------------------------------------------------------------------------- numbers


@interpreted
@FLOATS
@pytest.mark.parametrize("d", HEADS)
def test_head_widths_of_the_released_models(d, dtype):
    """The 77 tokens of a text: a whole tile of keys and a ragged end; two heads, as many as can be confused."""
    q, k, v = inputs(d, 21, 77, dtype)
    assert accepts(q, k, v, 2) == (dtype != torch.float32 or d <= 128)
    check(attention, REFERENCE, q, k, v, 2)


@interpreted
@pytest.mark.parametrize("d", [8, 24, 32, 104, 128, 192])
def test_other_head_widths(d):
    """Less than a piece, two pieces that make one, one exactly, a vision tower's, the widest."""
    q, k, v = inputs(d, 9, 20, torch.float16)
    assert accepts(q, k, v, 2)
    check(attention, REFERENCE, q, k, v, 2)


@interpreted
@HALVES
@pytest.mark.parametrize("queries, keys", [(1, 2), (17, 16), (128, 64), (129, 65), (3, 144)], ids=str)
def test_lengths(queries, keys, dtype):
    """Hardly anything, whole tiles without an end, tiles and one more, two tiles and a step."""
    q, k, v = inputs(40, queries, keys, dtype, heads=1)
    check(attention, REFERENCE, q, k, v, 1)


def lengths_of_a_single_key():
    """One query in every dtype; two tiles of them in one, and in the others among the long proofs."""
    for dtype in common.FLOATS:
        for queries in (1, 130):
            always = queries == 1 or dtype == torch.bfloat16
            marks = [] if always else [pytest.mark.check]
            yield pytest.param(queries, dtype, id=f"{queries}-{common.name_of(dtype)}", marks=marks)


@interpreted
@pytest.mark.parametrize("queries, dtype", lengths_of_a_single_key())
def test_a_single_key(queries, dtype):
    """Every query gets its value; the scores decide nothing, so that nothing but rounding comes back to q and k."""
    q, k, v = inputs(40, queries, 1, dtype)
    check(attention, REFERENCE, q.detach(), k.detach(), v, 2)
    assert torch.equal(attention(q, k, v, 2), v.expand_as(q))
    for gradient in torch.autograd.grad(attention(q, k, v, 2).sum(), (q, k)):
        assert gradient.abs().max() < 1e-5 * queries


@interpreted
@FLOATS
def test_batches_of_long_self_attention(dtype):
    """Several tiles of queries and of keys in both directions (fp32 has smaller ones), two pictures, three heads."""
    tokens = 50 if dtype == torch.float32 else 150
    q, k, v = inputs(16, tokens, tokens, dtype, heads=3, batch=2)
    check(attention, REFERENCE, q, k, v, 3)


@interpreted
@HALVES
def test_text_sees_only_what_came_before(dtype):
    q, k, v = inputs(64, 77, 77, dtype)
    check(attention, REFERENCE, q, k, v, 2, causal=True)


@interpreted
@pytest.mark.parametrize("queries, keys", [(5, 40), (140, 20)], ids=str)
def test_causal_with_other_lengths_counts_from_the_first_token(queries, keys):
    """As PyTorch has it: query i sees the keys up to i, wherever either ends."""
    q, k, v = inputs(16, queries, keys, torch.float32)
    check(attention, REFERENCE, q, k, v, 2, causal=True)


@interpreted
@HALVES
def test_upcast_is_as_good_as_fp32(dtype):
    """The rule holds against a reference whose only roundings are those of the results."""
    q, k, v = inputs(64, 40, 77, dtype)
    check(attention, REFERENCE, q, k, v, 2, upcast=True)


@interpreted
@HALVES
def test_probabilities_that_half_precision_would_round_are_exact_under_upcast(dtype):
    """Twelve equal scores: 1 / 12 each. A value and its negative cancel to the last bit only if nothing was lost on the way."""
    q, k, v = inputs(16, 3, 24, dtype, heads=1)
    plain, exact = (attention(q, k, v, 1, False, upcast).double() for upcast in (False, True))
    truth = REFERENCE(*(x.double() for x in (q, k, v)), 1)
    rounded = truth.to(dtype).double()
    assert (exact == rounded).double().mean() >= 0.97  # a few lie within 1e-5 of the middle between two numbers
    assert (plain == rounded).double().mean() < 0.97


@interpreted
@FLOATS
def test_scores_beyond_half_precision(dtype):
    """All scores are near 65536, where fp16 has ended, and near 8192 after the scale, where exponentials are infinite."""
    q, k, v = inputs(64, 6, 40, dtype)
    with torch.no_grad():
        q[..., 63::64] = 256
        k[..., 63::64] = 256
    check(attention, REFERENCE, q, k, v, 2)


@interpreted
@FLOATS
@pytest.mark.parametrize("size", [30, 180])
def test_one_key_far_above_the_others(size, dtype):
    """Scores t of thousands, or a hundred thousand. The output obeys the rule; gradients cannot.

    Backward works p = 2^(t - lse) out again from one fp32 number a query, which at this height is rounded to steps of 2^-24 |t|,
    as is t itself: p is off by that much, relatively, where PyTorch may find p = 1 to the last bit. What is asserted is the bound
    that follows, number by number:

        |error of p| <= e p             e = 2^-24 (4 + sqrt(d)) T + 1.5 eps,  T = max_k sum_d |q k| / sqrt(d): four roundings of t
                                        and lse, those of a sum of d products, and of p and ds to the dtype
        |error of ds| <= e |ds| + p (eps + 2^-24 d) (sum_d |dout v| + sum_d |dout out|),  where ds = p (dp - delta)
    """
    q, k, v = inputs(64, 6, 40, dtype, heads=1)
    with torch.no_grad():
        q *= size
        k *= size
    check(attention, REFERENCE, q.detach(), k.detach(), v.detach(), 1)
    push = normal(1, 6, 64, dtype=dtype, seed=3)
    found = torch.autograd.grad(attention(q, k, v, 1), (q, k, v), push)

    d, eps, unit = 64, torch.finfo(dtype).eps, 2.0**-24
    wide = [x.detach().double().requires_grad_() for x in (q, k, v)]
    exact = torch.autograd.grad(REFERENCE(*wide, 1), wide, push.double())
    (Q, K, V), D = (x.detach()[0] for x in wide), push.double()[0]
    p, dp = (Q @ K.T / d**0.5).softmax(-1), D @ V.T
    ds = p * (dp - (p * dp).sum(-1, keepdim=True))
    T = (Q.abs() @ K.abs().T).amax(-1, keepdim=True) / d**0.5
    e = unit * (4 + d**0.5) * T + 1.5 * eps
    slack = e * ds.abs() + p * (eps + unit * d) * (
        D.abs() @ V.abs().T + (D.abs() * (p @ V).abs()).sum(-1, keepdim=True)
    )
    bounds = slack @ K.abs() / d**0.5, slack.T @ Q.abs() / d**0.5, (e * p).T @ D.abs()
    for got, want, bound in zip(found, exact, bounds, strict=True):
        assert ((got.double() - want)[0].abs() <= bound + eps * want[0].abs() + 1e-20).all()


@interpreted
def test_the_largest_score_may_come_last_or_first():
    """The sums shrink when a larger score turns up in a later tile, and do not when it came before."""
    rising = torch.linspace(-2, 2, 140, device=DEVICE)
    for scores in (rising, rising.flip(0)):
        q, k, v = inputs(16, 4, 140, torch.float32, heads=1)
        with torch.no_grad():
            q.fill_(1.0)
            k.copy_(scores[None, :, None].expand_as(k))
        check(attention, REFERENCE, q, k, v, 1)


@interpreted
def test_all_scores_far_below_zero():
    """Then the zeros that stand in for keys beyond the end would be the largest by far, and 2^(0 - lse) infinite."""
    q, k, v = inputs(16, 20, 20, torch.float32, heads=1)
    with torch.no_grad():
        q.abs_().add_(5)
        k.abs_().add_(5).neg_()
    check(attention, REFERENCE, q, k, v, 1)


# ----------------------------------------------------------------------------------------------------------------------- layouts


@interpreted
@HALVES
def test_views_of_a_fused_projection(dtype):
    """q, k and v side by side in one tensor, every second row of a longer one: read where they are."""
    fused = normal(2, 44, 3 * 80, dtype=dtype)[:, ::2]
    q, k, v = (x.requires_grad_() for x in fused.chunk(3, dim=-1))
    assert not q.is_contiguous() and accepts(q, k, v, 2)
    check(attention, REFERENCE, q, k, v, 2)


@interpreted
def test_each_input_has_its_own_strides():
    """Queries on their own, keys every second row of something longer, values beside something else."""
    q = normal(2, 30, 80, dtype=torch.float16)
    k = normal(2, 40, 80, dtype=torch.float16, seed=1)[:, ::2]
    v = normal(2, 20, 240, dtype=torch.float16, seed=2)[:, :, 80:160]
    check(attention, REFERENCE, *(x.requires_grad_() for x in (q, k, v)), 2)


@interpreted
def test_keys_and_values_shared_by_the_batch():
    """An expanded tensor has a batch stride of 0."""
    q, k, v = (x.detach() for x in inputs(40, 12, 77, torch.float32, batch=2))
    k, v = k[:1].expand(2, -1, -1), v[:1].expand(2, -1, -1)
    assert accepts(q, k, v, 2)
    ours, theirs = attention(q, k, v, 2), REFERENCE(q.double(), k.double(), v.double(), 2)
    assert (ours - theirs).abs().max() < 1e-6 * 4


@interpreted
@pytest.mark.parametrize("push", ["one number everywhere", "transposed"])
def test_gradients_of_any_layout(push):
    q, k, v = inputs(16, 10, 12, torch.float32)

    def gradients(function):
        given = [x.detach().clone().requires_grad_() for x in (q, k, v)]
        out = function(*given, 2)
        loss = out.sum() if push == "one number everywhere" else (out.mT * normal(1, 32, 10, seed=9)).sum()
        return torch.autograd.grad(loss, given)

    for ours, theirs in zip(gradients(attention), gradients(REFERENCE), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-5)


@interpreted
def test_gradients_of_a_text_are_summed_over_parts_of_the_picture():
    """Few keys, many queries: several programs share the queries of one tile of keys, and the last has a ragged end."""
    q, k, v = inputs(40, 600, 20, torch.bfloat16, heads=1)
    check(attention, REFERENCE, q, k, v, 1)


@interpreted
def test_refused():
    """What the kernel does not read is left to the definition."""
    q, k, v = inputs(40, 8, 8, torch.float16)
    assert accepts(q, k, v, 2)
    assert not accepts(q, k, v.float(), 2)
    assert not accepts(q.double(), k.double(), v.double(), 2)
    assert not accepts(*inputs(12, 8, 8, torch.float16), 2)  # 12 is no multiple of 8
    assert not accepts(*inputs(40, 8, 8, torch.float16, heads=3), 7)
    assert not accepts(q, k, v[:, :4], 2)
    assert not accepts(q, k[:, :0], v[:, :0], 2)
    assert not accepts(q.mT.contiguous().mT, k, v, 2)  # a row's numbers lie apart
    assert not accepts(*(x.to("meta") for x in (q, k, v)), 2)


@interpreted
def test_what_is_refused_runs_as_defined():
    x = torch.randn(1, 5, 24, device=DEVICE)
    with ops.using(attention=attention):
        assert torch.equal(ops.attention(x, x, x, 2), REFERENCE(x, x, x, 2))


def test_pieces():
    """Every width is covered, by at most half as much again; those of the released models by their own sum."""
    assert [pieces(d) for d in (40, 64, 80, 160)] == [(32, 16), (64, 0), (64, 16), (128, 32)]
    for d in range(8, 193, 8):
        main, rest = pieces(d)
        assert d <= main + rest < max(17, 1.6 * d)
        assert all(n == 0 or (n >= 16 and n & (n - 1) == 0) for n in (main, rest)) and rest < main


@compiled
@pytest.mark.skipif(torch.cuda.is_available(), reason="about the CPU")
def test_the_cpu_runs_the_definition():
    assert not accepts(*(torch.randn(1, 8, 80) for _ in range(3)), 2)


# ------------------------------------------------------------------------------------------------------------------------ graphs


@interpreted
def test_registered_operations():
    """PyTorch's own examination: schema, shapes without numbers, autograd, dynamic shapes."""
    q, k, v = inputs(16, 10, 12, torch.float32)
    torch.library.opcheck(file.forward, (q, k, v, 2, False, False))
    with torch.no_grad():
        out, lse = file.forward(q, k, v, 2, False, False)
        torch.library.opcheck(file.backward, (torch.ones_like(out), q, k, v, out, lse, 2, False, False))


@interpreted
def test_one_node_of_a_graph():
    check_tracing("attention", attention, *inputs(16, 10, 12, torch.float16), 2)


# ------------------------------------------------------------------------------------------------------------------------ builds


@compiled
@each(file.builds())
def test_builds(build):
    """No spills, shared memory within bounds, warp-group products on Hopper."""
    inspect(build)


@compiled
def test_builds_cover_what_is_launched():
    """Every operation, dtype and head width of the released models."""
    names = [b.name for b in file.builds()]
    assert len(set(names)) == len(names)
    for kernel in ("forward", "queries", "keys", "keys in parts"):
        for dtype in common.FLOATS:
            for d in HEADS:
                refused = dtype == torch.float32 and d > 128
                assert (f"attention {kernel} {common.name_of(dtype)} {d}" in names) != refused
