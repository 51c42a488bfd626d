"""Every format's effective change of a weight, against its definition, LyCORIS and PEFT: to 1e-6, mostly in fp64.

The definitions here are written another way than in `sdcore/changes.py`: as what the layer would compute, or entry by entry.
"""

import math

import peft
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sdcore.changes import IA3, DoRA, Full, GLoRA, Hadamard, Kronecker, LowRank, Orthogonal, Replace, Sum
from sdcore.errors import AdapterError

O, N, R = 32, 24, 4  # outputs, inputs, rank
SHAPES = {"linear": (O, N), "1x1": (O, N, 1, 1), "3x3": (O, N, 3, 3)}


@pytest.fixture(params=SHAPES)
def weight(request):
    return random(*SHAPES[request.param], seed=99)


def random(*shape: int, seed: int = 0, dtype=torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype) / 4


def kernel(weight) -> list[int]:
    return list(weight.shape[2:])


def layer(x, weight):
    """What a layer with this weight computes."""
    return F.linear(x, weight) if weight.ndim == 2 else F.conv2d(x, weight, padding=weight.shape[-1] // 2)


def inputs(weight):
    return random(2, N, seed=7) if weight.ndim == 2 else random(2, N, 5, 5, seed=7)


def close(found, expected, tolerance=1e-6):
    assert found.shape == expected.shape
    assert (found - expected).abs().max().item() <= tolerance * max(1.0, expected.abs().max().item())


def low_rank(weight, **options) -> LowRank:
    return LowRank(random(R, N, *kernel(weight), seed=1), random(O, R, *[1] * (weight.ndim - 2), seed=2), **options)


# ---------------------------------------------------------------- the definitions


def test_low_rank_is_two_layers_in_a_row(weight):
    change = low_rank(weight, scale=0.5)
    x = inputs(weight)
    expected = 0.5 * layer(layer(x, change.down), change.up)
    close(layer(x, change.delta(weight)), expected, 1e-12)
    close(layer(x, change.delta(weight, -0.3)), -0.3 * expected, 1e-12)


def test_tucker_is_three_convolutions_in_a_row():
    weight = random(*SHAPES["3x3"])
    change = LowRank(random(R, N, 1, 1, seed=1), random(O, R, 1, 1, seed=2), random(R, R, 3, 3, seed=3), scale=2.0)
    x = inputs(weight)
    close(layer(x, change.delta(weight)), 2 * layer(layer(layer(x, change.down), change.mid), change.up), 1e-12)


def test_linear_layers_and_1x1_convolutions_are_one(weight):
    """What is written for one fits the other: SD 1.x has convolutions where 2.x and XL have linear layers."""
    if weight.shape[-1] == 3:
        return
    down, up = random(R, N, seed=1), random(O, R, seed=2)
    flat, deep = LowRank(down, up), LowRank(down[:, :, None, None], up[:, :, None, None])
    for change in (flat, deep):
        change.check(weight, None)
        close(change.delta(weight).flatten(1), up @ down, 1e-12)
    full = random(O, N, 1, 1)
    for change in (Full(full), Full(full[:, :, 0, 0]), Replace(full), Replace(full[:, :, 0, 0])):
        change.check(weight, None)
    close(Full(full).delta(weight).flatten(), full.flatten(), 0)


def test_hadamard_entry_by_entry(weight):
    size = math.prod(kernel(weight))
    a1, b1, a2, b2 = random(O, R), random(R, N * size, seed=1), random(O, R, seed=2), random(R, N * size, seed=3)
    delta = Hadamard(a1, b1, a2, b2, scale=0.25).delta(weight).flatten(1)
    for o, n in ((0, 0), (O - 1, N * size - 1), (5, 7)):
        expected = 0.25 * sum(a1[o, r] * b1[r, n] for r in range(R)) * sum(a2[o, r] * b2[r, n] for r in range(R))
        close(delta[o, n], expected, 1e-12)


def test_hadamard_tucker_entry_by_entry():
    weight = random(*SHAPES["3x3"])
    wa, wb = ([random(R, side, seed=i) for i in range(2)] for side in (O, N))
    t = [random(R, R, 3, 3, seed=i) for i in (5, 6)]
    delta = Hadamard(wa[0], wb[0], wa[1], wb[1], t[0], t[1], scale=0.5).delta(weight)
    for o, n, y, x in ((0, 0, 0, 0), (O - 1, 3, 2, 1)):
        one, two = (
            sum(t[f][i, j, y, x] * wa[f][i, o] * wb[f][j, n] for i in range(R) for j in range(R)) for f in (0, 1)
        )
        close(delta[o, n, y, x], 0.5 * one * two, 1e-12)


def test_kronecker_entry_by_entry(weight):
    w1, w2 = random(4, 3), random(8, 8, *kernel(weight), seed=1)
    delta = Kronecker(w1=w1, w2=w2).delta(weight)
    for o1, n1, o2, n2 in ((0, 0, 0, 0), (3, 2, 7, 7), (1, 2, 5, 3)):
        close(delta[o1 * 8 + o2, n1 * 8 + n2], w1[o1, n1] * w2[o2, n2], 1e-12)


def test_kronecker_of_products_is_that_of_the_wholes(weight):
    size = math.prod(kernel(weight))
    a1, b1, a2, b2 = random(4, 2), random(2, 3, seed=1), random(8, R, seed=2), random(R, 8 * size, seed=3)
    whole = Kronecker(w1=a1 @ b1, w2=(a2 @ b2).reshape(8, 8, *kernel(weight))).delta(weight)
    close(Kronecker(w1_a=a1, w1_b=b1, w2_a=a2, w2_b=b2, scale=0.5).delta(weight), 0.5 * whole, 1e-12)


def test_full_replace_and_sum(weight):
    diff, bias, here = random(*weight.shape, seed=1), random(O, seed=2), random(O, seed=3)
    assert Full(bias=bias).delta(weight) is None and Full(diff).bias_delta(here) is None
    close(Full(diff, bias).delta(weight, 0.5), 0.5 * diff, 0)
    close(Full(diff, bias).bias_delta(here, 0.5), 0.5 * bias, 0)
    close(weight + Replace(diff, bias).delta(weight), diff, 1e-15)
    close(here + Replace(diff, bias).bias_delta(here), bias, 1e-15)
    both = Sum((low_rank(weight), Full(diff, bias)))
    close(both.delta(weight, 0.5), 0.5 * (low_rank(weight).delta(weight) + diff), 1e-15)
    close(both.bias_delta(here, 0.5), 0.5 * bias, 0)


def test_ia3_scales_inputs_or_outputs(weight):
    x, bias = inputs(weight), random(O, seed=3)
    ins, outs = random(N, seed=1), random(O, seed=2)
    wide = [-1, *[1] * (x.ndim - 2)]
    close(layer(x, weight + IA3(ins, True).delta(weight)), layer(x * (1 + ins.reshape(wide)), weight), 1e-12)
    close(layer(x, weight + IA3(outs, False).delta(weight)), layer(x, weight) * (1 + outs.reshape(wide)), 1e-12)
    assert IA3(outs, False).bias_delta(bias) is None
    close(IA3(outs, False, bias=True).bias_delta(bias, 0.5), 0.5 * bias * outs, 0)


def test_glora_is_a_change_before_the_layer_and_one_beside(weight):
    a1, a2 = random(N, R, seed=1), random(R, N, seed=2)
    beside = low_rank(weight)
    change = GLoRA(a1, a2, beside.up, beside.down, scale=0.5)
    x = inputs(weight)
    before = torch.einsum("nr,rm,bm...->bn...", a1, a2, x)
    close(
        layer(x, change.delta(weight)), 0.5 * (layer(before, weight) + layer(layer(x, beside.down), beside.up)), 1e-12
    )


def test_oft_turns_runs_of_outputs(weight):
    blocks = random(4, 8, 8, seed=1)
    new = weight + Orthogonal(blocks).delta(weight)
    for k in range(4):
        q = blocks[k] - blocks[k].T
        turn = torch.linalg.solve(torch.eye(8) - q, torch.eye(8) + q).double()  # the two factors commute
        rows = slice(8 * k, 8 * k + 8)
        close(new[rows].flatten(1), turn.T @ weight[rows].flatten(1), 1e-6)
        close(turn.T @ turn, torch.eye(8, dtype=torch.float64), 1e-6)
    turns = torch.stack([torch.linalg.qr(block)[0] for block in blocks])  # early files hold the turns themselves
    turned = (turns.mT @ weight.flatten(1).unflatten(0, (4, 8))).reshape(weight.shape)
    close(weight + Orthogonal(turns, cayley=False).delta(weight), turned, 1e-12)
    half = weight + Orthogonal(blocks).delta(weight, 0.5)
    close(half, (weight + new) / 2, 1e-12)
    rescale = 1 + random(O, seed=2)
    scaled = weight + Orthogonal(blocks, rescale).delta(weight)
    close(scaled.flatten(1), rescale[:, None] * new.flatten(1), 1e-12)
    close(Orthogonal(blocks, rescale).delta(weight, 0.0), torch.zeros_like(weight), 0)


def test_oft_constraint_bounds_the_norm_of_all_blocks_together(weight):
    blocks = random(4, 8, 8, seed=1)
    norm = (blocks - blocks.mT).norm().item()
    close(Orthogonal(blocks, constraint=2 * norm).delta(weight), Orthogonal(blocks).delta(weight), 1e-7)
    close(Orthogonal(blocks, constraint=norm / 2).delta(weight), Orthogonal(blocks / 2).delta(weight), 1e-7)


def test_boft_is_a_product_of_turned_permutations(weight):
    """Each stage as one matrix: P^T · blocks · P, P puts outputs that lie 2^i · s/2 apart beside each other."""
    stages, size = 3, 8
    blocks = random(stages, O // size, size, size, seed=1)
    total = torch.eye(O, dtype=torch.float64)
    for i in range(stages):
        reach = 2**i * size // 2
        order = [c * 2 * reach + g * reach + k for c in range(O // (2 * reach)) for k in range(reach) for g in range(2)]
        p = torch.eye(O, dtype=torch.float64)[order]
        turns = []
        for block in blocks[i]:
            q = block - block.T
            turns.append((torch.eye(size) + q) @ torch.linalg.inv(torch.eye(size).double() - q))
        total = p.T @ torch.block_diag(*turns) @ p @ total
    expected = (total @ weight.flatten(1)).reshape(weight.shape)
    close(weight + Orthogonal(blocks, boft=True).delta(weight), expected, 1e-12)
    close(Orthogonal(blocks, boft=True).delta(weight, 0.0), torch.zeros_like(weight), 0)


def lengths(weight, axis):
    others = [i for i in range(weight.ndim) if i != axis]
    return (weight**2).sum(dim=others, keepdim=True).sqrt()


@pytest.mark.parametrize("axis", [0, 1], ids=["outputs", "inputs"])
def test_dora_as_comfyui_computes_it(weight, axis):
    """A number an output: the norm is that of W. A number an input: that of W + Δ. The strength interpolates."""
    change = low_rank(weight)
    shape = [1] * weight.ndim
    shape[axis] = weight.shape[axis]
    magnitude = lengths(weight, axis) * (1 + random(*shape, seed=5))
    new = weight + change.delta(weight)
    full = new * magnitude / lengths(weight if axis == 0 else new, axis)
    close(weight + DoRA(change, magnitude).delta(weight), full, 1e-12)
    close(DoRA(change, magnitude).delta(weight, 0.3), 0.3 * (full - weight), 1e-12)


def test_the_two_rules_of_dora_differ(weight):
    change, magnitude = low_rank(weight), lengths(weight, 0)
    comfy, theirs = (DoRA(change, magnitude, rule).delta(weight) for rule in ("comfy", "peft"))
    assert (comfy - theirs).abs().max() > 0.05
    close(lengths(weight + theirs, 0), magnitude, 1e-12)  # PEFT's keeps the length that was learnt
    assert not DoRA(change, magnitude, "peft").delta(weight, 0.0).any()


def test_half_precision_is_multiplied_out_in_fp32(weight):
    """Definition in fp64 from the same half-precision tensors: to the rounding of fp32, a thousandth of that of fp16."""
    half = weight.half()
    change = LowRank(random(R, N, *kernel(weight), seed=1).half(), random(O, R, seed=2).half())
    delta = change.delta(half)
    assert delta.dtype == torch.float32
    exact = (change.up.double() @ change.down.double().flatten(1)).reshape(weight.shape)
    close(delta.double(), exact, 1e-6)


# ---------------------------------------------------------------- the peers


@pytest.fixture(scope="module")
def lycoris():
    pytest.importorskip("lycoris", reason="lycoris-lora is not installed")
    from lycoris import functional, modules

    return functional, modules


def module_of(weight) -> nn.Module:
    if weight.ndim == 2:
        made = nn.Linear(N, O, bias=False)
    else:
        made = nn.Conv2d(N, O, weight.shape[-1], padding=weight.shape[-1] // 2, bias=False)
    made.weight.data = weight.clone()
    return made


def test_lycoris_low_rank_and_tucker(lycoris, weight):
    diff = lycoris[0].locon.diff_weight
    change = low_rank(weight, scale=0.5)
    close(change.delta(weight), diff(change.down, change.up, None, gamma=0.5).reshape(weight.shape))
    if weight.shape[-1] == 3:
        tucker = LowRank(random(R, N, 1, 1, seed=1), random(O, R, 1, 1, seed=2), random(R, R, 3, 3, seed=3), 0.5)
        close(tucker.delta(weight), diff(tucker.down, tucker.up, tucker.mid, gamma=0.5))


def test_lycoris_hadamard(lycoris, weight):
    size = math.prod(kernel(weight))
    a1, b1, a2, b2 = random(O, R), random(R, N * size, seed=1), random(O, R, seed=2), random(R, N * size, seed=3)
    expected = lycoris[0].loha.diff_weight(b1, a1, b2, a2, None, None, gamma=torch.tensor(0.5))
    close(Hadamard(a1, b1, a2, b2, scale=0.5).delta(weight), expected.reshape(weight.shape))
    if size > 1:
        t1, t2 = random(R, R, 3, 3, seed=4), random(R, R, 3, 3, seed=5)
        b1, b2 = b1[:, :N], b2[:, :N]
        expected = lycoris[0].loha.diff_weight(b1, a1.T, b2, a2.T, t1, t2, gamma=torch.tensor(0.5))
        close(Hadamard(a1.T, b1, a2.T, b2, t1, t2, scale=0.5).delta(weight), expected)


def test_lycoris_kronecker(lycoris, weight):
    kron = lycoris[0].lokr.kron_weight
    size = math.prod(kernel(weight))
    w1, w2 = random(4, 3), random(8, 8, *kernel(weight), seed=1)
    close(Kronecker(w1=w1, w2=w2).delta(weight), kron(w1, None, None, w2, None, None, None))
    a2, b2 = random(8, R, seed=2), random(R, 8, *kernel(weight), seed=3)
    expected = kron(w1, None, None, None, a2, b2, None, scale=0.5)
    close(Kronecker(w1=w1, w2_a=a2, w2_b=b2, scale=0.5).delta(weight), expected)
    a1, b1 = random(4, R, seed=4), random(R, 3, seed=5)
    expected = kron(None, a1, b1, None, a2, b2, None, scale=0.5)
    close(Kronecker(w1_a=a1, w1_b=b1, w2_a=a2, w2_b=b2, scale=0.5).delta(weight), expected)
    if size > 1:
        t2, flat = random(R, R, 3, 3, seed=6), random(R, 8, seed=7)
        expected = kron(w1, None, None, None, a2.T, flat, t2, scale=0.5)
        close(Kronecker(w1=w1, w2_a=a2.T, w2_b=flat, t2=t2, scale=0.5).delta(weight), expected)


def test_lycoris_ia3_and_glora(lycoris, weight):
    for on_input, count in ((True, N), (False, O)):
        theirs = lycoris[1].ia3.IA3Module("x", module_of(weight), train_on_input=on_input)
        vector = random(count, seed=1)
        theirs.weight.data = vector.reshape(theirs.weight.shape)
        if (
            weight.ndim == 4 and not on_input
        ):  # theirs transposes the weight but not the vector, which has shape [1, o, 1, 1]
            theirs.weight.data = vector.reshape(-1, 1, 1)[None]
        close(IA3(vector, on_input).delta(weight, 0.5), theirs.get_diff_weight(0.5)[0])
    theirs = lycoris[1].glora.GLoRAModule("x", module_of(weight), 1.0, R, R / 2).double()
    for i, name in enumerate(("a1", "a2", "b1", "b2")):
        part = getattr(theirs, name)
        part.weight.data = random(*part.weight.shape, seed=i)
    found = GLoRA(*(getattr(theirs, name).weight.data for name in ("a1", "a2", "b1", "b2")), scale=0.5)
    found.check(weight, None)
    close(found.delta(weight, 0.7), theirs.get_diff_weight(0.7)[0])


@pytest.mark.parametrize("constraint", [0.0, 0.01])
@pytest.mark.parametrize("rescaled", [False, True])
def test_lycoris_oft_and_boft(lycoris, weight, rescaled, constraint):
    """In fp32, in which theirs works. With `rescale` only at strength 1: theirs does not weaken it with the strength."""
    weight = weight.float()
    rescale = 1 + random(O, *[1] * (weight.ndim - 1), seed=3, dtype=torch.float32) if rescaled else None
    for boft in (False, True):
        kind = lycoris[1].boft.ButterflyOFTModule if boft else lycoris[1].diag_oft.DiagOFTModule
        theirs = kind("x", module_of(weight), lora_dim=8, constraint=constraint, rescaled=rescaled)
        blocks = theirs.oft_blocks.data = random(*theirs.oft_blocks.shape, seed=2, dtype=torch.float32) / 4
        if rescaled:
            theirs.rescale.data = rescale
        ours = Orthogonal(blocks, rescale, constraint * O, boft)
        ours.check(weight, None)
        close(ours.delta(weight), theirs.get_diff_weight(1.0)[0].detach())
        if not rescaled:
            close(ours.delta(weight, 0.5), theirs.get_diff_weight(0.5)[0].detach())


def test_lycoris_trains_dora_on_outputs_by_the_other_rule(lycoris, weight):
    """At strength 1 what its trainer computes is PEFT's rule, not ComfyUI's: said in the docstring of `DoRA`."""
    change, magnitude = low_rank(weight), 1 + random(O, *[1] * (weight.ndim - 1), seed=5)
    theirs = lycoris[0].general.weight_decompose(weight + change.delta(weight), magnitude)
    close(weight + DoRA(change, magnitude, "peft").delta(weight), theirs)


class Model(nn.Module):
    def __init__(self, weight):
        super().__init__()
        self.layer = module_of(weight)
        self.layer.bias = nn.Parameter(random(O, seed=8))


PEFT = {
    "lora": lambda: peft.LoraConfig(r=R, lora_alpha=2, target_modules=["layer"]),
    "rslora": lambda: peft.LoraConfig(r=R, lora_alpha=2, use_rslora=True, target_modules=["layer"]),
    "dora": lambda: peft.LoraConfig(r=R, lora_alpha=2, use_dora=True, target_modules=["layer"]),
    "bias": lambda: peft.LoraConfig(r=R, lora_alpha=2, lora_bias=True, target_modules=["layer"]),
    "loha": lambda: peft.LoHaConfig(r=R, alpha=2, target_modules=["layer"]),
    "lokr": lambda: peft.LoKrConfig(r=R, alpha=2, target_modules=["layer"]),
    "ia3": lambda: peft.IA3Config(target_modules=["layer"], feedforward_modules=[]),
    "ia3 in": lambda: peft.IA3Config(target_modules=["layer"], feedforward_modules=["layer"]),
}


@pytest.mark.parametrize("kind", PEFT)
def test_peft(weight, kind):
    """The weight and bias of PEFT's own merge, in fp64."""
    model = peft.get_peft_model(Model(weight), PEFT[kind]()).double()
    state = {}
    for i, (name, parameter) in enumerate(model.named_parameters()):
        if "base_layer" not in name:
            parameter.data = random(*parameter.shape, seed=20 + i) + (1 if "magnitude" in name or "ia3" in name else 0)
            state[name.removeprefix("base_model.model.layer.").replace(".default", "")] = parameter.data
    base = Model(weight).layer
    if kind in ("lora", "rslora", "dora", "bias"):
        scale = 2 / math.sqrt(R) if kind == "rslora" else 2 / R
        change = LowRank(state["lora_A.weight"], state["lora_B.weight"], scale=scale)
        if kind == "dora":
            change = DoRA(change, state["lora_magnitude_vector.weight"], "peft")
        if kind == "bias":
            change = Sum((change, Full(bias=state["lora_B.bias"] * scale)))
    elif kind == "loha":
        t1, t2 = state.get("hada_t1"), state.get("hada_t2")
        w = (state[f"hada_w{i}_{side}"] for i in (1, 2) for side in "ab")
        change = Hadamard(*w, t1, t2, scale=2 / R)
    elif kind == "lokr":
        change = Kronecker(**{name.removeprefix("lokr_"): tensor for name, tensor in state.items()}, scale=2 / R)
    else:
        on_input = kind == "ia3 in"
        change = IA3(state["ia3_l"] - 1, on_input, bias=not on_input)
    change.check(weight, base.bias)
    merged = model.merge_and_unload().layer
    close(weight + change.delta(weight), merged.weight.detach())
    bias = change.bias_delta(base.bias)
    close(base.bias + (0 if bias is None else bias), merged.bias.detach())


@pytest.mark.parametrize("strength", [1.0, 0.4])
def test_peft_dora_at_a_strength(weight, strength):
    """PEFT weakens Δ within the norm."""
    model = peft.get_peft_model(Model(weight), PEFT["dora"]()).double()
    state = {}
    for i, (name, parameter) in enumerate(model.named_parameters()):
        if "base_layer" not in name:
            parameter.data = random(*parameter.shape, seed=20 + i) + ("magnitude" in name)
            state[name.split(".default")[0].rsplit(".", 1)[-1]] = parameter.data
    model.base_model.model.layer.scale_layer(strength)
    change = DoRA(LowRank(state["lora_A"], state["lora_B"], scale=2 / R), state["lora_magnitude_vector"], "peft")
    x = inputs(weight)
    bias = Model(weight).layer.bias.reshape([-1, *[1] * (x.ndim - 2)])
    close(layer(x, weight + change.delta(weight, strength)) + bias, model.base_model.model.layer(x))


# ---------------------------------------------------------------- what does not fit


@pytest.mark.parametrize(
    "change, words",
    [
        (LowRank(torch.zeros(4, N), torch.zeros(O, 8)), "ranks differ: down .4, 24., up .32, 8."),
        (LowRank(torch.zeros(4, N + 1), torch.zeros(O, 4)), "changes a weight of .32, 25."),
        (LowRank(torch.zeros(4, N), torch.zeros(O + 1, 4)), "changes a weight of .33, 24."),
        (LowRank(torch.zeros(4, N, 3, 3), torch.zeros(O, 4, 1, 1)), "the weight here is .32, 24."),
        (LowRank(torch.zeros(4, N), torch.zeros(O, 4), torch.zeros(4, 5, 3, 3)), "ranks differ: down .4, 24., mid"),
        (LowRank(torch.full((4, N), torch.nan), torch.zeros(O, 4)), "down holds NaN"),
        (LowRank(torch.zeros(4, N), torch.tensor([[-torch.inf] + [0.0] * 3] * O)), "up holds NaN or infinity"),
        (LowRank(torch.zeros(0, N), torch.zeros(O, 0)), "down is empty"),
        (Hadamard(*[torch.zeros(O, 4), torch.zeros(3, N)] * 2), "ranks differ: w1_a"),
        (Hadamard(*[torch.zeros(O, 4), torch.zeros(4, N + 2)] * 2), "changes a weight of .32, 26."),
        (Kronecker(w1=torch.zeros(4, 3), w2=torch.zeros(8, 7)), "changes a weight of .32, 21."),
        (Kronecker(w1=torch.zeros(4, 3), w2_a=torch.zeros(8, 2)), "w2 is missing"),
        (Full(torch.zeros(O, N + 1)), "changes a weight"),
        (Full(bias=torch.zeros(3)), "bias of 3 numbers, here there are 32"),
        (Full(bias=torch.full((O,), torch.inf)), "bias holds NaN"),
        (Replace(torch.zeros(N, O)), "changes a weight of .24, 32."),
        (IA3(torch.zeros(O), True), "each of 32 inputs"),
        (IA3(torch.zeros(N), False), "each of 24 outputs"),
        (GLoRA(torch.zeros(N, 4), torch.zeros(4, N + 1), torch.zeros(O, 4), torch.zeros(4, N)), "a1 .* do not fit 24"),
        (GLoRA(torch.zeros(N, 4), torch.zeros(4, N), torch.zeros(O, 4), torch.zeros(5, N)), "ranks differ"),
        (Orthogonal(torch.zeros(4, 8, 7)), "no square blocks"),
        (Orthogonal(torch.zeros(5, 8, 8)), "turn 40 outputs, there are 32"),
        (Orthogonal(torch.zeros(4, 4, 8, 8), boft=True), "4 stages of 8 reach over more than 32"),
        (Orthogonal(torch.zeros(4, 8, 8), torch.ones(31)), "rescale has 31 numbers"),
        (DoRA(LowRank(torch.zeros(4, N), torch.zeros(O, 4)), torch.ones(7)), "magnitude .7. fits neither"),
        (DoRA(LowRank(torch.zeros(4, N), torch.zeros(O, 4)), torch.ones(1, N), "peft"), "magnitude .1, 24. fits"),
        (DoRA(LowRank(torch.full((4, N), torch.nan), torch.zeros(O, 4)), torch.ones(O)), "change.down holds NaN"),
        (Sum((Full(torch.zeros(O, N)), Full(bias=torch.full((O,), torch.nan)))), "changes.1.bias holds NaN"),
    ],
)
def test_what_does_not_fit_is_named(change, words):
    with pytest.raises(AdapterError, match=words) as caught:
        change.check(torch.zeros(O, N), torch.zeros(O))
    assert "\n" not in str(caught.value)


def test_a_bias_where_there_is_none():
    with pytest.raises(AdapterError, match="this layer has none"):
        Full(bias=torch.zeros(O)).check(torch.zeros(O, N), None)
