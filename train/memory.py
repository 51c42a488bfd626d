"""How much memory a training step takes, known before the first one; and how to make it fit.

    sdcore train lora --memory 8GiB --model sd15 --data pictures

A step is *rehearsed*: the method's own loss and its backward pass run on tensors that have a shape and a place but no numbers
(torch's FakeTensorMode), in seconds. A `Meter` sees every operation and counts the bytes that come to be and are let go, so the
peak is that of the very graph that will run, whatever the method; only what the optimiser keeps is a formula (`KEPT`).

What does not fit is made smaller by *recomputing* blocks (residual blocks, transformer layers, ...): of such a block only the
input is kept, and in the backward pass it runs once more. The same operations on the same numbers: gradients are equal to the
bit. Which blocks: those that free most bytes for an operation that is done twice, as many as are needed. How far that reaches is
worked out from the first rehearsal (`Rehearsal.peak_with`), and a second one, of the plan itself, confirms it. If not even
recomputing every block is enough, the run is refused before its first step.

The figures are bytes of tensors. What else a process has (the interpreter and its libraries, a GPU's context, what an
allocator's rounding loses, the work space inside single operations) comes on top.

Source: Griewank & Walther 2000 (recomputing), Chen et al. 2016 (by blocks of a network).
"""

import math
import re
import sys
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial, wraps
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import flop_registry

from sdcore import clip, lora, unet
from sdcore.errors import TrainingError

from .caches import Latents
from .data import Pictures, Visit
from .ranks import Ranks
from .state import PRECISIONS
from .task import Part

if TYPE_CHECKING:
    from .tuning import Tune

BLOCKS = (unet.Resnet, unet.TransformerLayer, unet.Upsample, clip.Layer)  # what may be recomputed, as a whole
UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
MiB = 2**20


def size(words: str) -> int:
    """Words such as 8GiB or 6000 MB -> bytes. TrainingError where it is no size."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", words)
    unit = found[2].upper() if found else "?"
    if found is None or unit not in UNITS or not float(found[1]):
        raise TrainingError(f"--memory {words}: expected a size such as 8GiB, 6000MiB or 8GB")
    return int(float(found[1]) * UNITS[unit])


# ------------------------------------------------------------------------------------------------- what the optimiser remembers


def _adafactor(p: Tensor) -> int:
    """A number a row and one a column; a vector's all."""
    return 4 * (p.numel() if p.ndim < 2 else p.numel() // p.shape[-1] + p.numel() // p.shape[-2])


KEPT: dict[str, Callable[[Tensor], int]] = {  # optimiser -> bytes that it keeps for a parameter
    "sgd": lambda p: 0,
    "adamw": lambda p: 8 * p.numel(),
    # A scale for every 256 numbers beside the bytes; what is small it keeps in fp32.
    "adamw8bit": lambda p: 2 * p.numel() + 8 * -(-p.numel() // 256) if p.numel() >= 4096 else 8 * p.numel(),
    "lion": lambda p: 4 * p.numel(),
    "adafactor": _adafactor,
    "prodigy": lambda p: 16 * p.numel(),
}


# ------------------------------------------------------------------------------------------------------------- counting bytes


@dataclass
class Block:
    """What a block of a network costs to keep, over all its calls in a pass."""

    saved: int = 0  # bytes of what it alone keeps for the backward pass, which recomputing would let go
    flop: int = 0  # that recomputing does again


@dataclass
class Segment:
    """A stretch of the step."""

    peak: int  # bytes
    alive: dict[int, tuple[str, int]]  # of blocks whose results are kept just then: call -> block, bytes


class Meter(TorchDispatchMode):
    """Inside the `with`, every operation's results are counted until they are let go."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = self.flop = 0
        self.born: weakref.WeakKeyDictionary[torch.UntypedStorage, int] = weakref.WeakKeyDictionary()  # in this order
        self.births = 0
        self.alive: dict[int, tuple[str, int]] = {}
        self.segments: list[Segment] = []
        self.blocks: dict[str, Block] = {}
        self.calls = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func is torch.ops.prim.device.default and hasattr(args[0], "fake_device"):
            return args[0].fake_device
        if func is torch.ops.aten._local_scalar_dense.default:
            return 1.0  # a number for the log: there is none
        out = func(*args, **(kwargs or {}))
        packet = func._overloadpacket
        for i, x in enumerate(tree_leaves(out)):
            if isinstance(x, Tensor):
                self.count(x.untyped_storage(), 2 if i and understated(packet, args, x) else 1)
        if packet in flop_registry:
            self.flop += flop_registry[packet](*args, **(kwargs or {}), out_val=out)
        elif packet is torch.ops.aten._scaled_dot_product_flash_attention_for_cpu:
            q, k = args[:2]
            self.flop += 4 * q.numel() * k.shape[-2]
        return out

    def count(self, storage: torch.UntypedStorage, times: int = 1) -> None:
        if storage in self.born:
            return
        self.know(storage)
        self.now += times * storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self.gone, times * storage.nbytes())

    def know(self, storage: torch.UntypedStorage) -> None:
        """Do not count this one: it was there before."""
        self.births += 1
        self.born[storage] = self.births

    def gone(self, size: int) -> None:
        self.now -= size

    def cut(self) -> None:
        """A new segment begins."""
        self.segments.append(Segment(self.peak, dict(self.alive)))
        self.peak = self.now

    @contextmanager
    def block(self, name: str, outputs: list[Tensor]) -> Iterator[None]:
        """Inside the `with`, what is saved for the backward pass is this block's; `outputs` are filled in before it ends."""
        self.calls += 1
        call, births, begun, again = self.calls, self.births, self.flop, 0
        saved: dict[int, int] = {}  # storages that came to be in here, by their order

        def pack(x: Tensor) -> Tensor:
            nonlocal again
            order = self.born.get(x.untyped_storage(), 0)
            if order > births:
                saved[order] = x.untyped_storage().nbytes()
            again = self.flop - begun  # what comes behind the last saved tensor need not run again
            return x

        def unpack(x: Tensor) -> Tensor:
            if call in self.alive:
                self.cut()
                del self.alive[call]
            return x

        with saved_tensors_hooks(pack, unpack):
            yield
        for x in outputs:
            saved.pop(self.born.get(x.untyped_storage(), 0), None)
        self.cut()
        self.alive[call] = name, sum(saved.values())
        total = self.blocks.setdefault(name, Block())
        total.saved, total.flop = total.saved + sum(saved.values()), total.flop + again


def outside(function: Callable) -> Callable:
    """A function that reads files or draws lots: it runs really also while a step is rehearsed."""

    @wraps(function)
    def run(*args: Any, **options: Any) -> Any:
        with _disable_current_modes():
            return function(*args, **options)

    return run


def understated(packet: Any, args: tuple, x: Tensor) -> bool:
    """Whether these are statistics of a norm that a CPU keeps in fp32, where PyTorch's stand-in says half precision."""
    norms = torch.ops.aten.native_layer_norm, torch.ops.aten.native_group_norm
    if packet not in norms or x.device.type != "cpu" or x.dtype == torch.float32:
        return False
    weight = args[2] if packet is norms[0] else args[1]
    return weight is not None and weight.dtype == torch.float32


# ------------------------------------------------------------------------------------------------------------------ rehearsing


@dataclass
class Rehearsal:
    """What a step takes, in bytes."""

    held: dict[str, int]  # throughout: frozen weights, trained weights, average, optimiser
    extra: int  # on top of it at the worst moment
    segments: list[Segment] = field(default_factory=list)
    blocks: dict[str, Block] = field(default_factory=dict)

    @property
    def peak(self) -> int:
        return sum(self.held.values()) + self.extra

    def peak_with(self, recomputed: set[str]) -> int:
        """What the peak should be if these blocks were recomputed, worked out from a rehearsal in which none was.

        At every moment all is gone that they keep by then, but for the block that is at work: that is there again.
        """
        return sum(self.held.values()) + max(
            s.peak - sum(saved for name, saved in s.alive.values() if name in recomputed) for s in self.segments
        )


def rehearse(task: "Tune", ranks: Ranks, recomputed: set[str]) -> Rehearsal:
    """What a step of a task takes with these blocks recomputed; the task is as before afterwards."""
    o, parts = task.options, networks(task)
    trained = {p for m in task.modules.values() for p in m.parameters() if p.requires_grad}
    passes = ranks.shares(o.batch, o.accumulate)[:2]  # from the second one on the gradients are there before it begins
    step = largest(task.pictures)
    meter, fakes = Meter(), FakeTensorMode(allow_non_fake_inputs=True)
    with fakes:
        there = [x for part in parts.values() for x in (*part.parameters(), *part.buffers()) if not x.is_meta]
        known = [fakes.from_tensor(x) for x in there]
    for x in known:
        meter.know(x.untyped_storage())
    with ExitStack() as stack:
        stack.callback(forget, trained)
        for name, block in blocks(parts):
            stack.enter_context(replaced(block, "forward", metered(meter, name, block, name in recomputed)))
        stack.enter_context(replaced(task, "latents", partial(blank, task.latents)))
        for name in task.reads:
            stack.enter_context(replaced(task, name, outside(getattr(task, name))))
        for name, value in list(vars(task).items()):
            if isinstance(value, Pictures):
                stack.enter_context(replaced(task, name, Outside(value)))
        if o.fused_step:
            for p in trained:
                stack.callback(p.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None)).remove)
        stack.enter_context(fakes)
        stack.enter_context(meter)
        for places in passes:
            dtype = PRECISIONS[o.precision]
            with torch.autocast(task.pipe.device.type, dtype, enabled=o.precision != "fp32"):
                loss = task.loss(Part(o.seed, step, o.batch, places))  # there until the next one is, as in `State`
            loss.mean.backward()
        meter.cut()
    weights, whole = sum(p.nbytes for p in trained), on_device(parts.values(), task.pipe.device)
    held = {
        "frozen weights": whole - weights, "trained weights": weights, "average": weights if o.ema else 0,
        "optimiser": sum(KEPT[o.optimiser](p) for p in trained),
    }  # fmt: skip
    return Rehearsal(held, max(s.peak for s in meter.segments), meter.segments, meter.blocks)


def forget(trained: Iterable[nn.Parameter]) -> None:
    """Let gradients go."""
    for p in trained:
        p.grad = None


def networks(task: "Tune") -> dict[str, nn.Module]:
    """All networks that a task holds, each once, by name."""
    own = {name: value for name, value in vars(task).items() if isinstance(value, nn.Module)}
    found = {**lora.models(task.pipe), "vae": task.pipe.vae, **task.modules, **own}
    return {name: part for i, (name, part) in enumerate(found.items()) if part not in list(found.values())[:i]}


def on_device(parts: Iterable[nn.Module], device: torch.device) -> int:
    """Bytes of what these networks keep on a device; what is shared counts once."""
    storages = [x.untyped_storage() for part in parts for x in (*part.parameters(), *part.buffers())]
    return sum({s.data_ptr(): s.nbytes() for s in storages if s.device.type == device.type}.values())


def blocks(parts: Mapping[str, nn.Module]) -> list[tuple[str, nn.Module]]:
    """Blocks that may be recomputed, each once, by names."""
    found: dict[int, tuple[str, nn.Module]] = {}
    for part, network in parts.items():
        for name, block in network.named_modules():
            if isinstance(block, BLOCKS):
                found.setdefault(id(block), (f"{part}.{name}", block))
    return list(found.values())


def largest(pictures: Pictures) -> int:
    """The step of an epoch that sees the largest pictures."""

    def pixels(step: int) -> int:
        return math.prod(pictures.visits(step, [0])[0].view.size)

    return max(range(pictures.epoch_length), key=pixels)


def blank(latents: Latents, visits: list[Visit]) -> tuple[Tensor, Tensor, Tensor | None]:
    """What `latents` would give for visits, without looking at a picture; the autoencoder, where it has to, encodes one."""
    config, like, (W, H) = latents.vae.config, next(latents.vae.parameters()), visits[0].view.size
    if not like.is_meta:
        with torch.no_grad(), torch.autocast(like.device.type, enabled=False):
            latents.vae.encode(torch.zeros(1, 3, H, W).to(like))
    mean, std = (torch.zeros(len(visits), config.latent_channels, H // config.factor, W // config.factor) for _ in "ab")
    masked = any(visit.item.mask for visit in visits)
    return mean, std, torch.ones(len(visits), 1, H, W) if masked else None


class Outside:
    """An object whose methods run really also while a step is rehearsed."""

    def __init__(self, inner: object):
        self.inner = inner

    def __getattr__(self, name: str) -> Any:
        value = getattr(self.inner, name)
        return outside(value) if callable(value) else value


@contextmanager
def replaced(owner: object, name: str, value: object) -> Iterator[None]:
    """Inside the `with`, an attribute of this one object is another."""
    table = vars(owner)
    before = table.get(name)
    table[name] = value
    try:
        yield
    finally:
        if before is None:
            del table[name]
        else:
            table[name] = before


def metered(meter: Meter, name: str, block: nn.Module, again: bool) -> Callable[..., Any]:
    """The block's forward as the meter is to see it: one that is kept, or one that is recomputed."""
    forward = block.forward
    if again:
        return recomputing(forward)

    def run(*args: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args)
        outputs: list[Tensor] = []
        with meter.block(name, outputs):
            out = forward(*args)
            outputs += [x for x in tree_leaves(out) if isinstance(x, Tensor)]
        return out

    return run


# ----------------------------------------------------------------------------------------------------------------- recomputing


class Taken:
    """What a block takes from an iterator that it shares with others: when it runs again, it takes the same once more."""

    def __init__(self, source: Iterator):
        self.source, self.items = source, []  # type: ignore[var-annotated]

    def __iter__(self) -> Iterator:
        for i in range(sys.maxsize):
            if i == len(self.items):
                self.items.append(next(self.source))
            yield self.items[i]


def recomputing(forward: Callable[..., Any]) -> Callable[..., Any]:
    """A block's forward that keeps its arguments alone for the backward pass. Blocks draw no random numbers."""

    def run(*args: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args)
        given = [Taken(x) if isinstance(x, Iterator) else x for x in args]
        once = lambda *xs: forward(*(iter(x) if isinstance(x, Taken) else x for x in xs))  # noqa: E731
        return checkpoint(once, *given, use_reentrant=False, preserve_rng_state=False)

    return run


# --------------------------------------------------------------------------------------------------------------------- planning


@dataclass
class Plan:
    """Which blocks are recomputed, and what a step then takes."""

    recomputed: set[str]
    kept: Rehearsal  # with all blocks kept
    planned: Rehearsal  # with these recomputed

    def table(self) -> str:
        """For people: what is held, block by block what it keeps, the peak."""
        lines = [f"{'block':64} {'MiB':>9} {'GFLOP':>8}"]
        for name, block in self.kept.blocks.items():
            what = "recomputed" if name in self.recomputed else "kept"
            lines.append(f"{name:64} {block.saved / MiB:9.1f} {block.flop / 1e9:8.1f}  {what}")
        held = ", ".join(f"{name} {bytes_ / MiB:,.0f}" for name, bytes_ in self.planned.held.items())
        lines.append(f"held, in MiB: {held}; besides, at most {self.planned.extra / MiB:,.0f}")
        count = f"{len(self.recomputed)} of {len(self.kept.blocks)} blocks recomputed"
        lines.append(f"predicted peak {self.planned.peak / MiB:,.0f} MiB, {count}")
        return "\n".join(lines)


def plan(task: "Tune", ranks: Ranks, budget: int) -> Plan:
    """Recompute as little as fits the budget, in bytes. TrainingError where nothing does."""
    if task.options.shard:
        raise TrainingError("--memory: plans for whole networks, not for the shares of --shard; leave one of them out")
    kept = rehearse(task, ranks, set())
    if kept.peak <= budget:
        return Plan(set(), kept, kept)
    ranked = sorted(kept.blocks, key=lambda name: kept.blocks[name].saved / (kept.blocks[name].flop + 1), reverse=True)
    ranked = [name for name in ranked if kept.blocks[name].saved]
    error = 0  # by how much the worked out peak was too low
    for count in range(1, len(ranked) + 1):
        chosen = set(ranked[:count])
        if kept.peak_with(chosen) + error <= budget or count == len(ranked):
            planned = rehearse(task, ranks, chosen)
            if planned.peak <= budget:
                return Plan(chosen, kept, planned)
            error = planned.peak - kept.peak_with(chosen)
    raise TrainingError(refusal(task, budget, kept, planned if ranked else kept))


def refusal(task: "Tune", budget: int, kept: Rehearsal, least: Rehearsal) -> str:
    """What was asked, what is needed, and what would help."""
    o = task.options
    ways = []
    if o.batch > o.accumulate:
        ways.append(f"--accumulate {o.batch} (one picture a pass)")
    ways.append("a smaller --resolution")
    if not o.offload:
        ways.append("--offload")
    if o.ema:
        ways.append("--ema 0")
    if o.dtype == "float32":
        ways.append("--dtype bfloat16")
    if least.held["optimiser"]:
        ways.append("--optimiser adafactor")
    return (
        f"--memory {o.memory}: a step of this run takes {kept.peak / MiB:,.0f} MiB, with every block recomputed still "
        f"{least.peak / MiB:,.0f} MiB, of which {sum(least.held.values()) / MiB:,.0f} are weights, average and optimiser; "
        f"{budget / MiB:,.0f} are allowed. Try {', '.join(ways)}, or allow more"
    )


def apply(task: "Tune", recomputed: set[str]) -> None:
    """Have these blocks of a task's networks be recomputed from now on."""
    for name, block in blocks(networks(task)):
        if name in recomputed:
            vars(block)["forward"] = recomputing(block.forward)


def fit(task: "Tune", ranks: Ranks) -> Plan:
    """Plan for --memory, print the plan, apply it. TrainingError where a step cannot fit, or --memory is no size."""
    found = plan(task, ranks, size(task.options.memory or ""))
    apply(task, found.recomputed)
    if ranks.first:
        print(found.table(), file=sys.stderr)
    return found
