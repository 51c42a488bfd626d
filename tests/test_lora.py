"""Adapters on models: exact inverses, merged equals attached, refusals change nothing, equal to diffusers and PEFT."""

import copy
import gc
import math
import random as python_random
from dataclasses import replace

import diffusers
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sdcore.weights.adapters import write_adapter
from torch import nn

import sdcore
from sdcore import image, lora
from sdcore.changes import IA3, DoRA, Full, GLoRA, Hadamard, Kronecker, LowRank, Orthogonal, Replace, Sum
from sdcore.cli import main
from sdcore.clip import LayerNorm
from sdcore.errors import AdapterError, ConfigError
from sdcore.unet import SD15, SDXL, GroupNorm, UNet, UNetConfig
from tests import peers, tiny_models
from tests.peers import bytes_of
from tests.timing import fastest

THIN = UNetConfig(channels=(16,), layers=1, depths=(1,), heads=(2,), cross_only=(False,), context_dim=16, norm_groups=4)


def random(*shape: int, generator: torch.Generator, size: float = 0.2) -> torch.Tensor:
    return torch.randn(*shape, generator=generator) * size


def low_rank(weight, rank: int, generator, size: float = 0.2, **options) -> LowRank:
    ones = [1] * (weight.ndim - 2)
    down = random(rank, *weight.shape[1:], generator=generator, size=size)
    return LowRank(down, random(weight.shape[0], rank, *ones, generator=generator, size=size), **options)


def lora_for(
    model, name: str = "a", rank: int = 4, part: str = "unet", seed: int = 0, pick=lambda name: True, **options
):
    """A random LoRA on the chosen linear layers and convolutions."""
    generator = torch.Generator().manual_seed(seed)
    layers = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear | nn.Conv2d) and pick(n)}
    return lora.Adapter(name, {part: {n: low_rank(m.weight, rank, generator, **options) for n, m in layers.items()}})


class Small(nn.Module):
    """One layer of each kind that adapters change."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(8, 16, 3, stride=2, padding=1)
        self.point = nn.Conv2d(16, 16, 1)
        self.group = GroupNorm(4, 16)
        self.norm = LayerNorm(16)
        self.linear = nn.Linear(16, 32)
        self.out = nn.Linear(32, 16, bias=False)

    def forward(self, x):
        x = self.group(self.point(self.conv(x)), silu=True)
        return self.out(torch.tanh(self.linear(self.norm(x.flatten(2).mT))))


def small(seed: int = 0, dtype=torch.float32) -> Small:
    torch.manual_seed(seed)
    return Small().to(dtype).eval()


def picture(dtype=torch.float32):
    return torch.randn(2, 8, 6, 6, generator=torch.Generator().manual_seed(5), dtype=torch.float64).to(dtype)


def every_kind(model: Small, name: str = "all", seed: int = 0) -> lora.Adapter:
    """Every kind of change, on layers of every kind."""
    g = torch.Generator().manual_seed(seed)
    r = lambda *shape: random(*shape, generator=g)  # noqa: E731
    conv, point, linear, out = (getattr(model, layer).weight for layer in ("conv", "point", "linear", "out"))
    kinds = [
        {"conv": low_rank(conv, 3, g), "linear": low_rank(linear, 2, g, scale=0.5), "point": low_rank(point, 2, g)},
        {"conv": LowRank(r(3, 8, 1, 1), r(16, 3, 1, 1), r(3, 3, 3, 3)), "out": Hadamard(r(16, 2), r(2, 32), r(16, 2), r(2, 32))},
        {"linear": Kronecker(w1=r(4, 4), w2=r(8, 4)), "point": Kronecker(w1=r(2, 2), w2=r(8, 8, 1, 1))},
        {"group": Full(r(16), r(16)), "norm": Full(r(16), r(16)), "conv": Full(r(16, 8, 3, 3), r(16))},
        {"linear": Sum((low_rank(linear, 2, g), Full(bias=r(32)))), "out": IA3(r(32), True)},
        {"linear": GLoRA(r(16, 2), r(2, 16), r(32, 2), r(2, 16)), "conv": Orthogonal(r(4, 4, 4), 1 + r(16))},
        {"linear": DoRA(low_rank(linear, 2, g), 1 + r(32, 1)), "conv": DoRA(low_rank(conv, 2, g), 1 + r(1, 8, 1, 1))},
        {"linear": DoRA(low_rank(linear, 2, g), 1 + r(32), "peft"), "out": Replace(r(16, 32)), "conv": Full(bias=r(16))},
    ]  # fmt: skip
    return [lora.Adapter(f"{name}{i}", {"unet": kind}) for i, kind in enumerate(kinds)]


def state(model) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(model, before: dict[str, torch.Tensor]) -> bool:
    now = model.state_dict()
    return list(now) == list(before) and all(
        now[name].dtype == tensor.dtype and torch.equal(now[name], tensor) for name, tensor in before.items()
    )


def with_changes(model: nn.Module, uses: list[tuple[lora.Adapter, float]]) -> nn.Module:
    """What the model must become, in fp64: a copy without adapters, every delta added to the original weights."""
    made = copy.deepcopy(model)
    lora.detach({"unet": made})
    made = made.double()
    deltas: dict[tuple[str, str], torch.Tensor] = {}
    for adapter, strength in uses:
        for name, change in adapter.parts["unet"].items():
            layer = made.get_submodule(name)
            for kind, delta in (
                ("weight", change.delta(layer.weight, strength)),
                ("bias", change.bias_delta(layer.bias, strength)),
            ):
                if delta is not None:
                    deltas[name, kind] = deltas.get((name, kind), 0) + delta
    for (name, kind), delta in deltas.items():
        getattr(made.get_submodule(name), kind).data += delta
    return made


# ---------------------------------------------------------------- attach, merge, and back


@pytest.mark.parametrize("kind", range(8))
@torch.no_grad()
def test_attached_is_what_the_definition_says(kind):
    """In fp64, against the weights with the deltas added: every kind of change on every kind of layer; then detached."""
    model = small(dtype=torch.float64)
    adapter, before, x = every_kind(model)[kind], state(model), picture(torch.float64)
    plain = model(x)
    lora.attach({"unet": model}, adapter, 0.7)
    assert same(model, before) and list(model.state_dict()) == list(before), "the parameters stay as they are"
    assert type(model.conv) is nn.Conv2d and [*dict(model.named_modules())] == [*dict(small().named_modules())]
    attached = model(x)
    assert (attached - plain).abs().max() > 1e-3
    torch.testing.assert_close(attached, with_changes(model, [(adapter, 0.7)])(x), rtol=0, atol=1e-12)
    lora.detach({"unet": model}, adapter.name)
    assert same(model, before) and torch.equal(model(x), plain)
    assert not list(model.buffers()) and not any("forward" in vars(module) for module in model.modules())


@torch.no_grad()
def test_several_at_once_add_up_in_any_order():
    model = small(dtype=torch.float64)
    kinds, x = every_kind(model), picture(torch.float64)
    uses = [(adapter, 0.3 + 0.2 * i) for i, adapter in enumerate(kinds)]
    for adapter, strength in uses:
        lora.attach({"unet": model}, adapter, strength)
    expected = with_changes(model, uses)(x)
    torch.testing.assert_close(model(x), expected, rtol=0, atol=1e-12)
    lora.merge({"unet": model}, *[adapter.name for adapter in kinds[::2]])  # half merged, half attached
    torch.testing.assert_close(model(x), expected, rtol=0, atol=1e-12)
    lora.merge({"unet": model})
    torch.testing.assert_close(model(x), expected, rtol=0, atol=1e-12)
    assert not list(model.buffers())
    assert lora.strengths({"unet": model}) == {adapter.name: strength for adapter, strength in uses}


@torch.no_grad()
def test_several_loras_run_as_one():
    """Side by side in two thin layers, of the ranks together."""
    model, x = small(dtype=torch.float64), picture(torch.float64)
    uses = [
        (lora_for(model, str(rank), rank, seed=rank), strength) for rank, strength in ((4, 0.5), (2, -0.3), (1, 2.0))
    ]
    for adapter, strength in uses:
        lora.attach({"unet": model}, adapter, strength)
    torch.testing.assert_close(model(x), with_changes(model, uses)(x), rtol=0, atol=1e-12)
    down, up = lora.factors(model.linear)
    assert down.shape == (7, 16) and up.shape == (32, 7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layer", ["linear", "conv", "point"])
@torch.no_grad()
def test_merged_equals_attached_within_rounding(layer, dtype):
    """Both against fp64. Bound: every product |x| · (|W| + |up||down|) rounded once each for the weight (or the two thin layers)
    and the output: 4 units of half an ulp of that sum, for the sum of the absolute values."""
    model = small(dtype=dtype)
    module = getattr(model, layer)
    change = low_rank(module.weight.float(), 6, torch.Generator().manual_seed(1), scale=0.5)
    x = torch.randn(4, module.weight.shape[1], *[5, 5][: 2 * (module.weight.ndim == 4)]).to(dtype)
    apply = (
        F.linear if module.weight.ndim == 2 else lambda x, w, b=None: F.conv2d(x, w, b, module.stride, module.padding)
    )
    down, up = change.down.double(), change.up.double() * 0.5
    exact_weight = module.weight.double() + (up.flatten(1) @ down.flatten(1)).reshape(module.weight.shape)
    exact = apply(x.double(), exact_weight, module.bias.double())
    absolute = module.weight.double().abs() + (up.abs().flatten(1) @ down.abs().flatten(1)).reshape(module.weight.shape)
    bound = 4 * torch.finfo(dtype).eps / 2 * apply(x.double().abs(), absolute, module.bias.double().abs())
    lora.attach({"unet": model}, lora.Adapter("a", {"unet": {layer: change}}))
    assert ((module(x).double() - exact).abs() <= bound).all(), "attached"
    weight = lora.effective_weight(module)
    lora.merge({"unet": model})
    assert ((module(x).double() - exact).abs() <= bound).all(), "merged"
    assert ((weight.double() - module.weight.double()).abs() <= absolute * 2 * torch.finfo(dtype).eps).all()


@torch.no_grad()
def test_a_hundred_random_operations_leave_nothing_behind():
    """After each: the output is that of the table's adapters on the original weights. At the end: bit-equal, no tensor more."""
    model, x = small(), picture()
    target, kinds = {"unet": model}, every_kind(model)
    before, parameters = state(model), {name: id(p) for name, p in model.named_parameters()}
    plain, dice = model(x), python_random.Random(4)

    def alive() -> tuple[int, int]:
        gc.collect()
        tensors = [o for o in gc.get_objects() if isinstance(o, torch.Tensor)]
        return len(tensors), sum(t.numel() for t in tensors)

    def walk(operations: int) -> int:
        table: dict[str, float] = {}
        done = 0
        while done < operations:
            what, adapter = (
                dice.choice(["attach", "attach", "detach", "merge", "unmerge", "strength"]),
                dice.choice(kinds),
            )
            if (what == "attach") == (adapter.name in table):
                continue
            strength = dice.uniform(-1, 1)
            if what == "attach":
                lora.attach(target, adapter, strength)
                table[adapter.name] = strength
            elif what == "detach":
                lora.detach(target, adapter.name)
                del table[adapter.name]
            elif what == "strength":
                lora.set_strength(target, adapter.name, strength)
                table[adapter.name] = strength
            else:
                (lora.merge if what == "merge" else lora.unmerge)(target, adapter.name)
            done += 1
            assert lora.strengths(target) == table
            uses = [(one, table[one.name]) for one in kinds if one.name in table]
            torch.testing.assert_close(model(x).double(), with_changes(model, uses)(x.double()), rtol=1e-4, atol=1e-4)
        lora.detach(target)
        return done

    walk(10)
    first = alive()
    assert walk(100) == 100
    assert alive() == first
    assert same(model, before) and torch.equal(model(x), plain)
    assert {name: id(p) for name, p in model.named_parameters()} == parameters
    assert lora.strengths(target) == {} and not list(model.buffers())


@torch.no_grad()
def test_merging_keeps_the_original_tensor_itself():
    """No copy is made of what was there: a mapped file stays mapped, and comes back."""
    model = small()
    pointers = {name: p.data_ptr() for name, p in model.named_parameters()}
    lora.attach({"unet": model}, lora_for(model))
    lora.merge({"unet": model})
    assert model.conv.weight.data_ptr() != pointers["conv.weight"]
    lora.unmerge({"unet": model})
    assert {name: p.data_ptr() for name, p in model.named_parameters()} == pointers


@torch.no_grad()
def test_a_model_moves_and_is_copied_with_its_adapters():
    model, x = small(), picture()
    one, two = every_kind(model)[:2]
    lora.attach({"unet": model}, one)
    lora.attach({"unet": model}, two, 0.5)
    lora.merge({"unet": model}, one.name)
    expected = model(x)
    twin = copy.deepcopy(model)
    assert torch.equal(twin(x), expected)
    lora.detach({"unet": twin})
    assert torch.equal(model(x), expected) and torch.equal(twin(x), small()(x))
    torch.testing.assert_close(model.double()(x.double()).float(), expected, rtol=1e-5, atol=1e-5)
    lora.detach({"unet": model})
    assert same(model, state(small().double()))


@torch.no_grad()
def test_using_attaches_for_a_block():
    model, x = small(), picture()
    plain = model(x)
    with pytest.raises(KeyError), lora.using({"unet": model}, lora_for(model)):
        assert not torch.equal(model(x), plain)
        raise KeyError
    assert torch.equal(model(x), plain)


# ---------------------------------------------------------------- what others read


@torch.no_grad()
def test_the_weight_that_acts():
    """`effective_weight` is what merging gives: for the engine, which multiplies by itself."""
    model = small(dtype=torch.float64)
    for i, adapter in enumerate(every_kind(model)):
        assert lora.effective_weight(model.linear) is not None and not lora.is_attached(model.linear)
        with lora.using({"unet": model}, adapter, 0.6):
            layers = {name: model.get_submodule(name) for name in adapter.parts["unet"]}
            assert all(lora.is_attached(layer) for layer in layers.values())
            found = {name: (lora.effective_weight(m), lora.effective_bias(m)) for name, m in layers.items()}
            lora.merge({"unet": model})
            for name, (weight, bias) in found.items():
                torch.testing.assert_close(weight, layers[name].weight.data, rtol=0, atol=1e-14)
                assert bias is None and layers[name].bias is None or (bias - layers[name].bias).abs().max() < 1e-14, i
                assert not lora.is_attached(layers[name])
    assert lora.factors(model.linear) is None


def test_the_version_changes_with_everything_and_never_returns():
    model = small()
    target, one = {"unet": model}, lora_for(model)
    seen = [lora.version(model)]
    assert seen == [0]
    for operation in (
        lambda: lora.attach(target, one),
        lambda: lora.set_strength(target, "a", 0.5),
        lambda: lora.merge(target),
        lambda: lora.unmerge(target),
        lambda: lora.detach(target),
        lambda: lora.attach(target, one),
        lambda: lora.set_strength(target, "a", lambda progress: 1 - progress),
        lambda: lora.at_step(model, 0.5),
        lambda: lora.detach(target),
    ):
        operation()
        assert lora.version(model) not in seen
        seen.append(lora.version(model))
    assert not lora.at_step(model, 0.7) and lora.version(model) == seen[-1]


# ---------------------------------------------------------------- strengths


def test_scales_by_part_and_block():
    """The longest name counts, whole words only; one that names nothing is refused."""
    model = peers.ours_of(peers.small(SD15)).to_empty(device="cpu")
    whole = lora_for(model, rank=1, pick=lambda n: ".attn" in n)
    lora.attach(
        {"unet": model}, whole, 2.0, {"unet": 0.5, "unet.down_blocks": 0, "unet.down_blocks.1.attentions.0": 0.25}
    )
    use = vars(model)["_adapters"].uses["a"]
    assert use.at("mid_block.attentions.0.transformer_blocks.0.attn1.to_q") == 1
    assert use.at("down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q") == 0
    assert use.at("down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q") == 0.5
    assert use.at("down_blocks.1.attentions.1.transformer_blocks.0.attn1.to_q") == 0
    for wrong in ("unet.down_block", "down_blocks.1", "text_encoder", "unet.down_blocks.1.attention"):
        with pytest.raises(ConfigError, match=wrong.replace(".", r"\.")):
            lora.attach({"unet": model}, replace(whole, name="b"), 1.0, {wrong: 1.0})


@torch.no_grad()
def test_scale_zero_is_absence():
    model, x = small(), picture()
    one = lora_for(model)
    without = lora.Adapter("a", {"unet": {n: c for n, c in one.parts["unet"].items() if n != "conv"}})
    with lora.using({"unet": model}, one, 0.8, {"unet.conv": 0}):
        found = model(x)
    with lora.using({"unet": model}, without, 0.8):
        assert torch.equal(found, model(x))


def test_keyframes_hold_from_their_place_on():
    strength = lora.keyframes((0.5, 0.2), (0.1, 1.0))
    assert [strength(p) for p in (0, 0.09, 0.1, 0.49, 0.5, 0.99)] == [0, 0, 1, 1, 0.2, 0.2]


# ---------------------------------------------------------------- refusals


def broken(model, change):
    """An adapter with two good layers and then this one."""
    good = lora_for(model, "broken").parts["unet"]
    return lora.Adapter("broken", {"unet": {"conv": good["conv"], "point": good["point"], **change}})


@pytest.mark.parametrize(
    "change, words",
    [
        (
            {"transformer.linear": Full(torch.zeros(3))},
            "1 of its 3 layers are not in this unet, such as transformer.linear",
        ),
        ({f"foreign.{i}": Full(torch.zeros(3)) for i in range(100)}, "100 of its 102 layers .* another family"),
        (
            {"linear": LowRank(torch.zeros(4, 16), torch.zeros(32, 8))},
            "unet.linear: the ranks differ: down .4, 16., up .32, 8.",
        ),
        ({"linear": LowRank(torch.zeros(4, 20), torch.zeros(32, 4))}, "unet.linear: changes a weight of .32, 20."),
        ({"linear": LowRank(torch.full((4, 16), torch.nan), torch.zeros(32, 4))}, "unet.linear: down holds NaN"),
        (
            {"linear": DoRA(LowRank(torch.zeros(4, 16), torch.zeros(32, 4)), torch.ones(5))},
            "unet.linear: the magnitude",
        ),
        ({"out": Full(bias=torch.zeros(16))}, "unet.out: changes a bias, and this layer has none"),
        ({"": Full(torch.zeros(16))}, "is a Small; only linear layers"),
    ],
)
@pytest.mark.parametrize("reserve", [False, True])
def test_what_does_not_fit_is_refused_by_name_and_changes_nothing(change, words, reserve):
    model = small()
    before, here = state(model), {name: id(p) for name, p in model.named_parameters()}
    lora.attach({"unet": model}, lora_for(model, "there"))
    version, buffers = lora.version(model), {name: b.clone() for name, b in model.named_buffers()}
    with pytest.raises(AdapterError, match=words) as caught:
        bad = broken(model, change)
        lora.reserve({"unet": model}, [bad]) if reserve else lora.attach({"unet": model}, bad)
    assert "\n" not in str(caught.value) and "'broken'" in str(caught.value)
    assert same(model, before) and {name: id(p) for name, p in model.named_parameters()} == here
    assert lora.version(model) == version and lora.strengths({"unet": model}) == {"there": 1.0}
    assert all(torch.equal(b, buffers[name]) for name, b in model.named_buffers())


def test_another_family_is_refused():
    """An SDXL LoRA on SD 1.5, and the other way round: by part, by layer, and by width where the names agree."""
    sd, xl = (peers.ours_of(peers.small(config)).to_empty(device="cpu") for config in (SD15, SDXL))
    with pytest.raises(AdapterError, match="layers are not in this unet, such as"):
        lora.attach({"unet": sd}, lora_for(xl, rank=1))
    with pytest.raises(AdapterError, match="layers are not in this unet, such as"):
        lora.attach({"unet": xl}, lora_for(sd, rank=1))
    with pytest.raises(
        AdapterError, match="changes 1 layers of text_encoder_2, and this model has unet: .* another family"
    ):
        lora.attach({"unet": sd}, lora.Adapter("a", {"text_encoder_2": {"x": Full(torch.zeros(1))}}))
    wide = peers.ours_of(replace(peers.small(SD15), context_dim=64)).to_empty(device="cpu")
    with pytest.raises(AdapterError, match=r"attn2.to_k: changes a weight of \[\d+, 64\].* is \[\d+, 48\]"):
        lora.attach({"unet": sd}, lora_for(wide, rank=1))


def test_wrong_requests():
    model = small()
    target, one = {"unet": model}, lora_for(model)
    lora.attach(target, one)
    with pytest.raises(AdapterError, match="one of that name is attached already"):
        lora.attach(target, one)
    for operation in (lora.detach, lora.merge, lora.unmerge, lambda t, n: lora.set_strength(t, n, 1.0)):
        with pytest.raises(AdapterError, match="'b': is not attached; attached are: a"):
            operation(target, "b")
    for strength in (math.nan, math.inf, "1", None, True, lambda progress: None):
        with pytest.raises(ConfigError, match="strength: expected a finite number"):
            lora.attach(target, replace(one, name="b"), strength)
    lora.set_strength(target, "a", lambda progress: progress)
    with pytest.raises(ConfigError, match="changes by step, so it cannot be merged"):
        lora.merge(target)
    lora.set_strength(target, "a", 1.0)
    lora.merge(target)
    with pytest.raises(ConfigError, match="is merged, so its strength cannot change by step"):
        lora.set_strength(target, "a", lambda progress: progress)
    lora.detach(target)
    model.linear.forward = lambda x: x
    with pytest.raises(AdapterError, match="unet.linear: its forward was replaced by something else"):
        lora.attach(target, one)


# ---------------------------------------------------------------- speed, memory, compiling


def test_attaching_an_sdxl_lora_is_quick_and_copies_no_weight():
    """Rank 16 on all 722 layers of SDXL's transformers, real sizes: under 1 s. The base weights have shapes, but no memory.

    Of processor time on one thread, so that what else runs on the machine does not count. Where the machine is slow, no longer
    than it takes to make the modules of the UNet four times (once is 0.3 s where attaching takes 0.3 s)."""

    def build():
        with torch.device("meta"):
            return UNet(SDXL)

    model, limit = build(), max(1.0, 4 * fastest(build, tries=3))
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None:
                empty = torch.zeros((), dtype=torch.float16).expand(parameter.shape)
                setattr(module, name, nn.Parameter(empty, requires_grad=False))
    pick = ("transformer_blocks", "proj_in", "proj_out")
    made, zeros = {}, lambda *shape: torch.zeros(shape, dtype=torch.float16)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and any(part in name for part in pick):
            made[name] = LowRank(zeros(16, module.in_features), zeros(module.out_features, 16), scale=0.5)
    assert len(made) == 722
    adapter = lora.Adapter("xl", {"unet": made})
    seconds = []
    for _ in range(3):
        seconds.append(fastest(lambda: lora.attach({"unet": model}, adapter, 0.8), tries=1))
        extra = sum(b.numel() for b in model.buffers())
        assert extra == sum(t.numel() for change in made.values() for _, t in change.tensors())
        lora.detach({"unet": model})
    assert min(seconds) < limit, seconds


class Counter:
    """A backend of `torch.compile` that runs the graph as it is and counts."""

    def __init__(self):
        self.graphs = 0

    def __call__(self, graph, example):
        self.graphs += 1
        return graph


@pytest.fixture
def counter():
    torch._dynamo.reset()
    yield Counter()
    torch._dynamo.reset()


@torch.no_grad()
def test_a_compiled_model_notices_what_is_attached_later(counter):
    """Compiled before: a forward hook would be overlooked (see lora.py). Attached again in the same shapes: nothing new."""
    model, x = small(), picture()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    kinds = every_kind(model)
    plain = compiled(x)
    for adapter in kinds[:1] + kinds[3:4]:
        for _ in range(2):
            with lora.using({"unet": model}, adapter):
                assert not torch.equal(compiled(x), plain)
                torch.testing.assert_close(compiled(x), model(x))
            assert torch.equal(compiled(x), plain)
    assert counter.graphs == 3


@torch.no_grad()
def test_exchanging_adapters_recompiles_nothing(counter):
    """5 LoRAs of differing rank and layers, 2 picture sizes, twice around: one graph a size, and outputs as without compiling."""
    torch._dynamo.utils.counters.clear()  # of other tests
    torch.manual_seed(0)
    model = UNet(THIN).eval()
    target = {"unet": model}
    picks = [lambda n: True, lambda n: "attn" in n, lambda n: "conv" in n, lambda n: "ff" in n, lambda n: "proj" in n]
    adapters = [
        lora_for(model, str(i), rank, seed=i, pick=pick)
        for i, (rank, pick) in enumerate(zip((4, 16, 1, 8, 12), picks, strict=True))
    ]
    inputs = [peers.inputs(THIN, size, batch=1, tokens=5)[0][:3] for size in ((8, 8), (16, 8))]
    plain = [model(*x) for x in inputs]
    lora.reserve(target, adapters)
    compiled = torch.compile(model, backend=counter, fullgraph=True, dynamic=False)
    pointers = None
    for round, adapter in enumerate(adapters * 2):
        lora.attach(target, adapter, 0.5 + 0.1 * round)
        for x, before in zip(inputs, plain, strict=True):
            found = compiled(*x)
            torch.testing.assert_close(found, model(*x), rtol=1e-5, atol=1e-5)
            assert (found - before).abs().max() > 1e-3
        now = {name: buffer.data_ptr() for name, buffer in model.named_buffers()}
        pointers = pointers or now
        assert now == pointers, "a captured graph would read elsewhere"
        lora.detach(target)
        assert counter.graphs == 2 and torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2
    for x, before in zip(inputs, plain, strict=True):
        torch.testing.assert_close(model(*x), before, rtol=0, atol=0)
    lora.release(target)
    assert not list(model.buffers())


@torch.no_grad()
def test_room_for_every_kind():
    """With room for all, every kind comes and goes in place; two LoRAs together where that was asked for."""
    model, x = small(), picture()
    target, kinds = {"unet": model}, every_kind(model)
    plain = model(x)
    expected = []
    for adapter in kinds:
        with lora.using(target, adapter, 0.5):
            expected.append(model(x))
    lora.reserve(target, kinds)
    torch.testing.assert_close(model(x), plain)
    pointers = {name: buffer.data_ptr() for name, buffer in model.named_buffers()}
    for adapter, output in zip(kinds, expected, strict=True):
        with lora.using(target, adapter, 0.5):
            torch.testing.assert_close(model(x), output, rtol=1e-5, atol=1e-5)
            assert {name: buffer.data_ptr() for name, buffer in model.named_buffers()} == pointers
    lora.release(target)
    one, two = lora_for(model, "one", 4), lora_for(model, "two", 6, seed=1)
    lora.reserve(target, [one, two], together=2)
    assert model.linear.adapter_up.shape == (32, 10)
    with lora.using(target, one), lora.using(target, two):
        assert model.linear.adapter_up.shape == (32, 10) and model.linear.adapter_up.any(dim=0).all()
    lora.release(target)
    assert torch.equal(model(x), plain) and not list(model.buffers())


# ---------------------------------------------------------------- new adapters


@torch.no_grad()
def test_extraction_finds_a_low_rank_difference_and_the_closest_otherwise():
    base = small(dtype=torch.float64)
    tuned, one = copy.deepcopy(base), lora_for(base, rank=3)
    with lora.using({"unet": tuned}, one, 0.7):
        lora.merge({"unet": tuned})
        exact = lora.extract({"unet": base}, {"unet": tuned}, rank=3)
        closest = lora.extract({"unet": base}, {"unet": tuned}, rank=2)
        for name, change in exact.parts["unet"].items():
            layer, other = base.get_submodule(name), tuned.get_submodule(name)
            difference = other.weight - layer.weight
            change.check(layer.weight, layer.bias)
            torch.testing.assert_close(change.delta(layer.weight), difference, rtol=0, atol=1e-6)
            assert change.rank == 3 and 0.5 < change.up.norm() / change.down.norm() < 2
            u, s, v = torch.linalg.svd(difference.flatten(1), full_matrices=False)
            best = (u[:, :2] * s[:2] @ v[:2]).reshape(difference.shape)
            torch.testing.assert_close(closest.parts["unet"][name].delta(layer.weight), best, rtol=0, atol=1e-6)
    assert set(exact.parts["unet"]) == {"conv", "point", "linear", "out"}
    only = copy.deepcopy(base)
    only.conv.weight += 0.1
    assert set(lora.extract({"unet": base}, {"unet": only}, rank=2).parts["unet"]) == {"conv"}
    with pytest.raises(AdapterError, match="unet of the two models has other layers"):
        lora.extract({"unet": base}, {"unet": nn.Linear(2, 2)}, rank=2)


@torch.no_grad()
def test_joining_is_all_of_them_at_their_weights():
    model, x = small(dtype=torch.float64), picture(torch.float64)
    one, two = lora_for(model, "one", 4), lora_for(model, "two", 2, seed=1, pick=lambda n: n != "out", scale=0.5)
    tucker = lora.Adapter("three", {"unet": {"conv": every_kind(model)[1].parts["unet"]["conv"]}})
    weighted = [(one, 0.5), (two, -0.3), (tucker, 1.2)]
    expected = with_changes(model, weighted)
    joined = lora.join(weighted)
    assert joined.parts["unet"]["linear"].rank == 6 and joined.parts["unet"]["conv"].rank == 9
    with lora.using({"unet": model}, joined):
        torch.testing.assert_close(model(x), expected(x), rtol=0, atol=1e-5)
    reduced = lora.join(weighted, rank=3)
    for name, change in reduced.parts["unet"].items():
        weight = model.get_submodule(name).weight
        difference = (expected.get_submodule(name).weight - weight).flatten(1)
        u, s, v = torch.linalg.svd(difference, full_matrices=False)
        torch.testing.assert_close(change.delta(weight).flatten(1), u[:, :3] * s[:3] @ v[:3], rtol=0, atol=1e-6)
        assert change.rank == 3
    with pytest.raises(AdapterError, match="'all3': unet.group is a Full, and only LoRAs can be joined"):
        lora.join([(every_kind(model)[3], 1.0)])


# ---------------------------------------------------------------- whole pipelines, against diffusers and PEFT


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made = {}

    def folder(family: str) -> str:
        if family not in made:
            made[family] = str(tiny_models.write_folder(tmp_path_factory.mktemp(family), family, seed=3))
        return made[family]

    return folder


def peer(folder: str, family: str):
    cls = getattr(diffusers, tiny_models.PIPELINES[family])
    options = {"add_watermarker": False} if "XL" in cls.__name__ else {"safety_checker": None}
    pipe = cls.from_pretrained(folder, **options)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def everywhere(name: str) -> bool:
    return "attn" in name or "ff.net" in name or "resnets" in name


def pipeline_lora(pipe, name: str, rank: int, seed: int, text: bool = True, pick=everywhere, **options) -> lora.Adapter:
    """A LoRA on chosen layers of the UNet, and on the text encoders."""
    parts = {}
    for part, model in lora.models(pipe).items():
        if part == "unet":
            parts |= lora_for(model, name, rank, part, seed, pick, **options).parts
        elif text:
            inner = lambda n: "self_attn" in n or "mlp" in n  # noqa: E731
            parts |= lora_for(model, name, rank, part, seed + 1, inner, **options).parts
    return lora.Adapter(name, parts)


def peft_keys(adapter: lora.Adapter) -> dict[str, torch.Tensor]:
    """The file that PEFT and diffusers write for it."""
    return {
        f"{part}.{layer}.lora_{letter}.weight": tensor
        for part, changes in adapter.parts.items()
        for layer, change in changes.items()
        for letter, tensor in (("A", change.down), ("B", change.up))
    }


NOISE = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_two_loras_at_different_weights_equal_diffusers(folders, family):
    """UNet and text encoders, attached here, by PEFT there: latents in fp32 to 1e-3 of their size, pictures within 1/255."""
    pipe, theirs = sdcore.load(folders(family), device="cpu"), peer(folders(family), family)
    plain = pipe("a red circle", steps=4, guidance=3.0, noise=NOISE)
    for name, rank, seed, weight in (("one", 4, 10, 0.8), ("two", 2, 20, -0.5)):
        adapter = pipeline_lora(pipe, name, rank, seed)
        lora.attach(pipe, adapter, weight)
        theirs.load_lora_weights(peft_keys(adapter), adapter_name=name)
    theirs.set_adapters(["one", "two"], [0.8, -0.5])
    options = dict(num_inference_steps=4, guidance_scale=3.0, latents=NOISE)
    ours = pipe("a red circle", steps=4, guidance=3.0, noise=NOISE)
    want = theirs("a red circle", output_type="latent", **options).images
    assert (ours.latents - want).abs().max() < 1e-3 * want.abs().max()
    assert (ours.latents - plain.latents).abs().max() > 0.1 * want.abs().max()
    want = theirs("a red circle", **options).images
    assert np.abs(bytes_of(ours.images) - bytes_of(want)).max() <= 1


def test_separate_weights_of_blocks_and_text_equal_diffusers(folders):
    pipe, theirs = sdcore.load(folders("sd1"), device="cpu"), peer(folders("sd1"), "sd1")
    adapter = pipeline_lora(pipe, "one", 4, 10, pick=lambda name: "attn2" in name)
    theirs.load_lora_weights(peft_keys(adapter), adapter_name="one")
    theirs.set_adapters(["one"], [{"unet": {"down": 0.9, "mid": 0.4, "up": 0.0}, "text_encoder": 0.3}])
    scales = {"unet.down_blocks": 0.9, "unet.mid_block": 0.4, "unet.up_blocks": 0, "text_encoder": 0.3}
    lora.attach(pipe, adapter, 1.0, scales)
    options = dict(num_inference_steps=2, guidance_scale=3.0, latents=NOISE, output_type="latent")
    want = theirs("a red circle", **options).images
    ours = pipe("a red circle", steps=2, guidance=3.0, noise=NOISE, output="latent").latents
    assert (ours - want).abs().max() < 1e-3 * want.abs().max()


def test_strength_by_step_equals_diffusers_told_at_each_step(folders):
    """Keys and values of the text are computed once a picture; where the strength changes they must be computed anew."""
    pipe, theirs = sdcore.load(folders("sd1"), device="cpu"), peer(folders("sd1"), "sd1")
    adapter = pipeline_lora(pipe, "one", 4, 10, text=False, pick=lambda name: "attn2" in name)
    theirs.load_lora_weights(peft_keys(adapter), adapter_name="one")
    theirs.scheduler = diffusers.DDIMScheduler.from_config(theirs.scheduler.config, clip_sample=False)
    by_step = [0.0, 0.7, 0.7, -0.4]
    theirs.set_adapters(["one"], [by_step[0]])

    def tell(pipeline, i, t, kwargs):
        pipeline.set_adapters(["one"], [by_step[min(i + 1, 3)]])
        return kwargs

    want = theirs(
        "a red circle",
        num_inference_steps=4,
        guidance_scale=3.0,
        latents=NOISE,
        output_type="latent",
        callback_on_step_end=tell,
    ).images
    lora.attach(pipe, adapter, lora.keyframes((0.25, 0.7), (0.75, -0.4)))
    for _ in range(2):  # the second picture starts from the beginning again
        ours = pipe("a red circle", steps=4, sampler="ddim", guidance=3.0, noise=NOISE, output="latent").latents
        assert (ours - want).abs().max() < 1e-3 * want.abs().max()


@pytest.mark.parametrize("merged", [False, True], ids=["attached", "merged"])
def test_lcm_lora_draws_in_few_steps_as_diffusers_does(folders, merged):
    """A LoRA with the LCM sampler, 4 steps, from the same noises on the way."""
    pipe, theirs = sdcore.load(folders("sd1"), device="cpu"), peer(folders("sd1"), "sd1")
    adapter = pipeline_lora(pipe, "lcm", 4, 10, text=False, pick=lambda name: "attn" in name)
    theirs.load_lora_weights(peft_keys(adapter), adapter_name="lcm")
    theirs.scheduler = diffusers.LCMScheduler.from_config(theirs.scheduler.config)
    options = dict(num_inference_steps=4, guidance_scale=1.0, generator=torch.Generator().manual_seed(6))
    want = theirs("a red circle", **options).images
    lora.attach(pipe, adapter)
    if merged:
        lora.merge(pipe)
    ours = pipe("a red circle", steps=4, sampler="lcm", guidance=1.0, seed=6)
    assert np.abs(bytes_of(ours.images) - bytes_of(want)).max() <= 1


def test_generate_takes_adapters(folders, tmp_path, capsys):
    """`--lora FILE:WEIGHT` is `attach`; the picture remembers it; the prompt may call the file by name instead, not both."""
    folder, file = folders("sd1"), tmp_path / "style.safetensors"
    pipe = sdcore.load(folder, device="cpu")
    adapter = pipeline_lora(pipe, "style", 2, 5, pick=lambda name: "attn2" in name)
    write_adapter(file, adapter, "kohya", pipe)
    lora.attach(pipe, adapter, 0.7)
    want = bytes_of(pipe("cat", steps=2, seed=3).images)

    def generate(name: str, prompt: str, *words: str) -> np.ndarray:
        out = str(tmp_path / name)
        common = ["--model", folder, "--steps", "2", "--seed", "3", "--device", "cpu", "--out", out]
        assert main(["generate", *([prompt] if prompt else []), *common, *words]) == 0
        return bytes_of([image.open_picture(out).pil])

    found = generate("one.png", "cat", "--lora", f"{file}:0.7")
    assert np.abs(found - want).max() <= 1
    assert image.read_metadata(tmp_path / "one.png")["lora"] == [f"{file}:0.7"]
    assert np.array_equal(generate("again.png", "", "--from", str(tmp_path / "one.png")), found)
    assert np.array_equal(generate("called.png", "cat<lora:style:0.7>", "--lora", str(file)), found)
    assert not np.array_equal(
        generate("other.png", "", "--from", str(tmp_path / "one.png"), "--lora", f"{file}:-1"), found
    )
    assert main(["generate", "cat <lora:style:0.7>", "--model", folder, "--lora", f"{file}:0.7"]) == 2
    assert "the prompt calls 'style' too" in capsys.readouterr().err
