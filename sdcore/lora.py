"""Adapters: attach a LoRA (or any of its kin) to a model from outside, and take it off again without a trace.

    adapter, report = read_adapter("style.safetensors", pipe)   # sdcore.weights.adapters; or build an `Adapter` yourself
    lora.attach(pipe, adapter, 0.8)                             # a number, or a function of the progress 0..1 of the steps
    lora.merge(pipe)                                            # into the weights: no cost a step
    lora.detach(pipe)                                           # the weights are bit for bit what they were

How. A model keeps one table, of which adapters are on it and how strongly. Every operation here edits that table and then
writes each touched layer anew, from its original weight and the table alone: what happened before leaves nothing behind. A
layer with a change gets buffers beside its weight (never saved, they move with the model) and a `forward` of its own, an
attribute of that one module, which computes with them: LoRA as two thin layers beside the base weight, which is not copied;
every other change as a weight worked out once. No module is wrapped, no name, class or parameter changes. Merging puts
the sum in the place of the weight and keeps the original tensor itself.

Why not hooks: a model that was compiled by `torch.compile` before a hook came does not notice the hook (its guards leave hooks
out, in torch 2.13), and draws as if nothing were attached. It does notice a `forward`. Exchanging adapters under
`torch.compile` without recompiling: `reserve` first; then attach and detach only rewrite buffers in place.

Legend: o output channels, n input channels, k k kernel, r rank.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import MethodType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sdcore import ops
from sdcore.changes import Change, LowRank, Sum
from sdcore.errors import AdapterError, ConfigError

# How strongly an adapter acts: a number, or a function of how far the steps are (0 at the first, towards 1 at the last).
Strength = float | Callable[[float], float]


@dataclass(frozen=True)
class Adapter:
    """One adapter as it was read: what it changes, by part of the pipeline and full name of the layer in that part."""

    name: str
    parts: Mapping[str, Mapping[str, Change]]  # "unet", "text_encoder", "text_encoder_2" -> layer -> change
    metadata: Mapping[str, str] = field(default_factory=dict)


@dataclass
class Use:
    """An adapter in the table of one model."""

    changes: Mapping[str, Change]
    strength: Strength
    scales: Mapping[str, float]  # layer -> factor on the strength, where it is not 1
    merged: bool = False
    progress: float = 0.0

    @property
    def now(self) -> float:
        """The strength at the present step."""
        return float(self.strength(self.progress) if callable(self.strength) else self.strength)

    def at(self, layer: str) -> float:
        return self.now * self.scales.get(layer, 1.0)


@dataclass
class Room:
    """What a layer keeps free for adapters to come, so that exchanging them changes no shape."""

    rank: int = 0
    weight: bool = False
    bias: bool = False


@dataclass
class Table:
    """All that a model knows of its adapters."""

    uses: dict[str, Use] = field(default_factory=dict)
    rooms: dict[str, Room] = field(default_factory=dict)
    originals: dict[str, Tensor] = field(default_factory=dict)  # parameter -> its tensor before anything was merged
    version: int = 0


_versions = itertools.count(1)  # over all models: a version never returns, not even on a copy of a model


# ---------------------------------------------------------------- attach, detach


def models(target: Any) -> dict[str, nn.Module]:
    """The parts that adapters can change, by name. `target` is a pipeline, or such a dict already.

    An XL pipeline with one text encoder (the refiner) has the second of the two.
    """
    if isinstance(target, Mapping):
        return dict(target)
    encoders = list(target.text_encoders)
    names = ["text_encoder", "text_encoder_2"]
    if len(encoders) == 1 and target.unet.config.added_dim:
        names = names[1:]
    return {"unet": target.unet, **dict(zip(names, encoders, strict=False))}


def attach(target: Any, adapter: Adapter, strength: Strength = 1.0, scales: Mapping[str, float] | None = None) -> None:
    """Let an adapter act on a pipeline (or on {"unet": unet, ...}), beside those that already do.

    strength   1 is as trained. A function of the progress is asked at each step; the text encoders, which run before the steps,
               take its value at 0. Cheap for LoRA; other changes are worked out anew whenever the strength changes.
    scales     factors on the strength by part or block: {"text_encoder": 0.5, "unet.down_blocks.1": 0}; the longest name that
               is a layer's name or a part of its path counts

    Raises AdapterError, and changes nothing, where the adapter's name is taken, a layer is not there, a shape does not fit or a
    tensor holds NaN; ConfigError for a strength that is no number, or a scale that names nothing.
    """
    parts = models(target)
    check(parts, adapter)
    factors = _scales(adapter, scales or {})
    _check_strength(strength)
    for part, changes in adapter.parts.items():
        if changes:
            _table(parts[part]).uses[adapter.name] = Use(changes, strength, factors[part])
            _write(parts[part], changes)


def detach(target: Any, *names: str) -> None:
    """Take adapters off, merged ones too; all of them when none is named. AdapterError where a name is not attached."""
    for model, table, chosen in _chosen(target, names):
        touched = [layer for name in chosen for layer in table.uses.pop(name).changes]
        _write(model, touched)


@contextmanager
def using(
    target: Any, adapter: Adapter, strength: Strength = 1.0, scales: Mapping[str, float] | None = None
) -> Iterator[None]:
    """Attach for the length of a `with` block."""
    attach(target, adapter, strength, scales)
    try:
        yield
    finally:
        detach(target, adapter.name)


def merge(target: Any, *names: str) -> None:
    """Put attached adapters (all when none is named) into the weights: they cost no time a step, but a copy of each weight.

    The original tensors are kept, so that `unmerge` and `detach` are exact. ConfigError for a strength by step.
    """
    chosen = _chosen(target, names)
    for _, table, uses in chosen:
        for name in uses:
            if callable(table.uses[name].strength):
                raise ConfigError(f"adapter {name!r}: its strength changes by step, so it cannot be merged; attach it")
    _set_merged(chosen, True)


def unmerge(target: Any, *names: str) -> None:
    """Take merged adapters (all when none is named) out of the weights again; they stay attached."""
    _set_merged(_chosen(target, names), False)


def set_strength(target: Any, name: str, strength: Strength) -> None:
    """Change how strongly an attached or merged adapter acts; its scales stay. Errors as of `attach`."""
    _check_strength(strength)
    uses = [(model, table.uses[name]) for model, table, there in _chosen(target, (name,)) if there]
    if callable(strength) and any(use.merged for _, use in uses):
        raise ConfigError(f"adapter {name!r}: is merged, so its strength cannot change by step; unmerge it first")
    for model, use in uses:
        use.strength = strength
        _write(model, use.changes)


def strengths(target: Any) -> dict[str, float]:
    """The adapters that act, in the order in which they came, with their present strengths."""
    found: dict[str, float] = {}
    for model in models(target).values():
        for name, use in _table(model).uses.items():
            found.setdefault(name, use.now)
    return found


def at_step(model: nn.Module, progress: float) -> bool:
    """Set the strengths that change by step. True where one did: keys and values worked out before are then out of date.

    `progress` is the number of the step over the count of steps.
    """
    touched: dict[str, None] = {}
    for use in _table(model).uses.values():
        if callable(use.strength):
            before, use.progress = use.now, progress
            if use.now != before:
                touched |= dict.fromkeys(use.changes)
    if touched:
        _write(model, touched)
    return bool(touched)


def keyframes(*frames: tuple[float, float]) -> Callable[[float], float]:
    """A strength by step from (progress, strength) pairs: each holds from its progress on; before the first it is 0."""

    def strength(progress: float) -> float:
        return next((value for start, value in sorted(frames, reverse=True) if start <= progress), 0.0)

    return strength


# ---------------------------------------------------------------- what acts on a layer (read by the kernels' engine)


def version(model: nn.Module) -> int:
    """A number that changes whenever anything about the model's adapters does; 0 where there never were any."""
    return _table(model).version


def base_weights(model: nn.Module) -> dict[str, Tensor]:
    """The model's own tensors by their names in its state dict, themselves: without anything that was merged into them."""
    return {name: _table(model).originals.get(name, tensor) for name, tensor in model.state_dict().items()}


def is_attached(module: nn.Module) -> bool:
    """Whether this layer computes with something beside its own parameters."""
    return "adapter_up" in module._buffers


def factors(module: nn.Module) -> tuple[Tensor, Tensor] | None:
    """(down [r, n, ...], up [o, r]) where the layer adds up(down(x)) to what its weight gives: all LoRAs on it in one."""
    return (module.adapter_down, module.adapter_up) if is_attached(module) and module.adapter_up is not None else None  # type: ignore


def effective_weight(module: nn.Module) -> Tensor:
    """The weight that a layer acts with, in the weight's shape and dtype; the parameter itself where nothing is attached."""
    weight = module.adapter_weight if is_attached(module) and module.adapter_weight is not None else module.weight
    if (pair := factors(module)) is not None:
        down, up = (x.to(_wide_dtype(weight)) for x in pair)  # type: ignore
        weight = (weight.to(up.dtype) + (up.flatten(1) @ down.flatten(1)).reshape(weight.shape)).to(weight.dtype)  # type: ignore
    return weight.detach()  # type: ignore


def effective_bias(module: nn.Module) -> Tensor | None:
    """The bias that a layer acts with; None where it has none."""
    bias = module.adapter_bias if is_attached(module) and module.adapter_bias is not None else module.bias
    return None if bias is None else bias.detach()  # type: ignore


# ---------------------------------------------------------------- room, for torch.compile


def reserve(target: Any, adapters: Iterable[Adapter], together: int = 1) -> None:
    """Make room for any of these adapters, at most `together` at once, so that exchanging them changes no shape.

    Every layer that one of them changes then has buffers of the largest rank from the start (zeros where an adapter has less),
    and attaching rewrites them in place: `torch.compile` has nothing to recompile, and a captured graph stays valid. The room
    is kept until `release`. It costs its memory, and time as the largest of the adapters would.
    """
    parts, adapters = models(target), list(adapters)
    for adapter in adapters:
        check(parts, adapter, known=True)
    for part, model in parts.items():
        table = _table(model)
        for layer in dict.fromkeys(layer for adapter in adapters for layer in adapter.parts.get(part, {})):
            changes = [adapter.parts[part][layer] for adapter in adapters if layer in adapter.parts.get(part, {})]
            flat = [list(_flat(change)) for change in changes]
            ranks = sorted((sum(c.rank for c in one if isinstance(c, LowRank)) for one in flat), reverse=True)
            module = model.get_submodule(layer)
            table.rooms[layer] = Room(
                rank=sum(ranks[:together]),
                weight=any(c.on_weight and not isinstance(c, LowRank) for one in flat for c in one),
                bias=getattr(module, "bias", None) is not None and any(c.on_bias for one in flat for c in one),
            )
        _write(model, table.rooms)


def release(target: Any) -> None:
    """Give back the room that `reserve` keeps. What is attached stays so."""
    for model in models(target).values():
        rooms, _table(model).rooms = _table(model).rooms, {}
        _write(model, rooms)


# ---------------------------------------------------------------- checks: everything, before anything changes


def check(target: Any, adapter: Adapter, known: bool = False) -> None:
    """AdapterError where the adapter does not fit: part, layer, shape, NaN, or (unless `known`) a name that is taken."""
    parts = models(target)
    for part, changes in adapter.parts.items():
        if not changes:
            continue
        where = f"adapter {adapter.name!r}"
        if part not in parts:
            raise AdapterError(
                f"{where}: changes {len(changes)} layers of {part}, and this model has {', '.join(parts)}: it was made for "
                "another family"
            )
        model = parts[part]
        if not known and adapter.name in _table(model).uses:
            raise AdapterError(f"{where}: one of that name is attached already; detach it, or rename this one")
        layers = dict(model.named_modules())
        missing = [name for name in changes if name not in layers]
        if missing:
            raise AdapterError(
                f"{where}: {len(missing)} of its {len(changes)} layers are not in this {part}, such as {missing[0]}: it was "
                "made for another family, or some of its names are unknown"
            )
        for name, change in changes.items():
            module = layers[name]
            try:
                if _forward_of(module) is None:
                    raise AdapterError(
                        f"is a {type(module).__name__}; only linear layers, convolutions and norms can be changed"
                    )
                if "forward" in vars(module) and not is_attached(module):
                    raise AdapterError("its forward was replaced by something else; take that off first")
                change.check(module.weight, getattr(module, "bias", None))  # type: ignore
            except AdapterError as error:
                raise AdapterError(f"{where}: {part}.{name}: {error}") from None


def _check_strength(strength: Strength) -> None:
    value = strength(0.0) if callable(strength) else strength
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ConfigError(f"strength: expected a finite number, or a function of the progress 0..1, found {value!r}")


def _scales(adapter: Adapter, scales: Mapping[str, float]) -> dict[str, dict[str, float]]:
    """Part -> layer -> factor, from the longest given name that the layer lies under."""
    unused = {name: scale for name, scale in scales.items() if name not in adapter.parts}
    found: dict[str, dict[str, float]] = {part: {} for part in adapter.parts}
    for part, changes in adapter.parts.items():
        for layer in changes:
            path = f"{part}.{layer}".split(".")
            prefixes = [".".join(path[: i + 1]) for i in range(len(path))]
            for prefix in prefixes:
                if prefix in scales:
                    found[part][layer] = float(scales[prefix])
                    unused.pop(prefix, None)
    if unused:
        parts = ", ".join(adapter.parts)
        raise ConfigError(
            f"scales: {next(iter(unused))!r} names nothing that adapter {adapter.name!r} changes; a name is a part ({parts}), "
            "or part.block such as unet.down_blocks.1"
        )
    return found


# ---------------------------------------------------------------- the table, and writing layers from it


def _table(model: nn.Module) -> Table:
    if "_adapters" not in vars(model):
        vars(model)["_adapters"] = Table()
    return vars(model)["_adapters"]


def _chosen(target: Any, names: Sequence[str]) -> list[tuple[nn.Module, Table, list[str]]]:
    """(model, table, the named adapters that are on it) for every part; AdapterError where a name is on none."""
    tables = [(model, _table(model)) for model in models(target).values()]
    there = dict.fromkeys(name for _, table in tables for name in table.uses)
    for name in names:
        if name not in there:
            raise AdapterError(f"adapter {name!r}: is not attached; attached are: {', '.join(there) or 'none'}")
    return [(model, table, [n for n in table.uses if n in names or not names]) for model, table in tables]


def _set_merged(chosen: list[tuple[nn.Module, Table, list[str]]], merged: bool) -> None:
    for model, table, names in chosen:
        for name in names:
            table.uses[name].merged = merged
        _write(model, [layer for name in names for layer in table.uses[name].changes])


class Place(NamedTuple):
    """A layer, its full name, and the table of its model."""

    table: Table
    layer: str
    module: Any

    def original(self, kind: str) -> Tensor | None:
        """The "weight" or "bias" without anything merged, on the device and in the dtype of the present one; None without one."""
        present = getattr(self.module, kind, None)
        kept = self.table.originals.get(f"{self.layer}.{kind}")
        if kept is not None:
            return kept.to(present.device, present.dtype)  # type: ignore
        return None if present is None else present.detach()

    def changed(self, kind: str, uses: list[tuple[Change, float]]) -> Tensor | None:
        """The original with the changes added in fp32 or fp64, rounded once; None where there is nothing to add."""
        original, total = self.original(kind), None
        for change, strength in uses:
            act = change.delta if kind == "weight" else change.bias_delta
            delta = act(original, strength)  # type: ignore
            if delta is not None:
                total = delta if total is None else total + delta
        return None if total is None or original is None else (original.to(total.dtype) + total).to(original.dtype)

    def with_changes(self, kind: str, uses: list[tuple[Change, float]]) -> Tensor:
        """`changed`, or a copy of the present one where there is nothing to add."""
        changed = self.changed(kind, uses)
        return getattr(self.module, kind).detach().clone() if changed is None else changed


@torch.no_grad()
def _write(model: nn.Module, layers: Iterable[str]) -> None:
    """Bring the parameters and buffers of these layers to what the table says."""
    table, modules, layers = _table(model), dict(model.named_modules()), dict.fromkeys(layers)
    for layer in layers:
        place = Place(table, layer, modules[layer])
        uses = [use for use in table.uses.values() if layer in use.changes]
        merged = [(use.changes[layer], use.at(layer)) for use in uses if use.merged]
        attached = [(use.changes[layer], use.at(layer)) for use in uses if not use.merged]
        for kind in ("weight", "bias"):
            _write_parameter(place, kind, merged)
        _write_buffers(place, merged, attached)
        if is_attached(place.module):
            vars(place.module)["forward"] = MethodType(_forward_of(place.module), place.module)  # type: ignore
        else:
            vars(place.module).pop("forward", None)
    if layers:
        table.version = next(_versions)


def _write_parameter(place: Place, kind: str, merged: list[tuple[Change, float]]) -> None:
    """Merge into a weight or bias, or put the original tensor back."""
    originals, name = place.table.originals, f"{place.layer}.{kind}"
    new = place.changed(kind, merged) if merged else None
    parameter = getattr(place.module, kind, None)
    if new is not None:
        originals.setdefault(name, parameter.data)  # type: ignore
        parameter.data = new  # type: ignore
    elif name in originals:  # the model may have moved since
        parameter.data = originals.pop(name).to(parameter.device, parameter.dtype)  # type: ignore


def _write_buffers(place: Place, merged: list[tuple[Change, float]], attached: list[tuple[Change, float]]) -> None:
    """What a layer computes with beside its parameters: LoRAs side by side as one, or else the changed weight; the bias."""
    module, room = place.module, place.table.rooms.get(place.layer, Room())
    flat = [(one, strength) for change, strength in attached for one in _flat(change)]
    low = [(one, strength) for one, strength in flat if isinstance(one, LowRank)]
    others = any(one.on_weight and not isinstance(one, LowRank) for one, _ in flat)
    thin = isinstance(module, nn.Linear | nn.Conv2d) and not others and not room.weight
    down = up = weight = bias = None
    if thin and (low or room.rank):
        down, up = _side_by_side(module, low, room.rank)
    elif not thin and (low or others or room.weight):
        weight = place.with_changes("weight", merged + attached)
    if room.bias or any(one.on_bias for one, _ in flat):
        bias = place.with_changes("bias", merged + attached)
    new = {"adapter_down": down, "adapter_up": up, "adapter_weight": weight, "adapter_bias": bias}
    if all(tensor is None for tensor in new.values()):
        for name in new:
            module._buffers.pop(name, None)
            module._non_persistent_buffers_set.discard(name)
        return
    for name, tensor in new.items():
        old = module._buffers.get(name)
        if old is not None and tensor is not None and old.shape == tensor.shape and old.dtype == tensor.dtype:
            old.copy_(tensor)  # in place: nothing that was compiled or captured has to know
        else:
            module.register_buffer(name, tensor, persistent=False)


def _side_by_side(module: nn.Module, low: list[tuple[LowRank, float]], rank: int) -> tuple[Tensor, Tensor]:
    """Several LoRAs as one, (down [r, n, ...], up [o, r]) in the weight's dtype, padded with zeros to `rank`.

    Σ s_i up_i @ down_i is one product of the ups beside each other and the downs above each other.
    """
    weight: Tensor = module.weight  # type: ignore
    total = max(sum(change.rank for change, _ in low), rank)
    down = weight.new_zeros(total, *weight.shape[1:])
    up = weight.new_zeros(weight.shape[0], total)
    at = 0
    for change, strength in low:
        thin_down, thin_up = change.factors(weight)
        down[at : at + change.rank], up[:, at : at + change.rank] = thin_down, thin_up * strength
        at += change.rank
    return down, up


def _flat(change: Change) -> Iterator[Change]:
    """A change in its parts."""
    if isinstance(change, Sum):
        for one in change.changes:
            yield from _flat(one)
    else:
        yield change


def _wide_dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


# ---------------------------------------------------------------- how a changed layer computes


def _weight(module: Any) -> Tensor:
    return module.weight if module.adapter_weight is None else module.adapter_weight


def _bias(module: Any) -> Tensor | None:
    return module.bias if module.adapter_bias is None else module.adapter_bias


def _linear(self: Any, x: Tensor) -> Tensor:
    y = F.linear(x, _weight(self), _bias(self))
    return y if self.adapter_up is None else y + F.linear(F.linear(x, self.adapter_down), self.adapter_up)


def _conv(self: Any, x: Tensor) -> Tensor:
    y = self._conv_forward(x, _weight(self), _bias(self))
    if self.adapter_up is None:
        return y
    return y + F.conv2d(self._conv_forward(x, self.adapter_down, None), self.adapter_up[:, :, None, None])


def _group_norm(self: Any, x: Tensor, silu: bool = False) -> Tensor:
    norm = ops.group_norm_silu if silu else ops.group_norm
    return norm(x, self.num_groups, _weight(self), _bias(self), self.eps)  # type: ignore


def _layer_norm(self: Any, x: Tensor) -> Tensor:
    return ops.layer_norm(x, _weight(self), _bias(self), self.eps)  # type: ignore


_FORWARDS: dict[type, Callable] = {
    nn.Linear: _linear,
    nn.Conv2d: _conv,
    nn.GroupNorm: _group_norm,
    nn.LayerNorm: _layer_norm,
}


def _forward_of(module: nn.Module) -> Callable | None:
    """The forward of a changed layer; None for a kind that cannot be changed."""
    return next((forward for kind, forward in _FORWARDS.items() if isinstance(module, kind)), None)


# ---------------------------------------------------------------- new adapters from models and from adapters


@torch.no_grad()
def extract(base: Any, tuned: Any, rank: int, name: str = "extracted") -> Adapter:
    """The LoRA that comes closest, of at most `rank`, to what was trained between two models of one family.

    For each linear layer and convolution that differs: the `rank` largest singular values of W_tuned - W_base, worked out in
    fp64, each shared evenly by up and down. Norms and biases are left out. `base`, `tuned`: pipelines, or {"unet": unet, ...}.
    AdapterError where the layers are not the same.
    """
    parts: dict[str, dict[str, Change]] = {}
    tuned_parts = models(tuned)
    for part, model in models(base).items():
        layers, other = _layers(model), _layers(tuned_parts[part]) if part in tuned_parts else {}
        shapes, others = ({n: m.weight.shape for n, m in each.items()} for each in (layers, other))
        if shapes != others:
            raise AdapterError(f"extract: {part} of the two models has other layers or shapes: not of one family")
        parts[part] = {}
        for layer, module in layers.items():
            difference = other[layer].weight.to(torch.float64) - module.weight.to(torch.float64)
            if difference.any():
                parts[part][layer] = _low_rank(difference, rank)
    return Adapter(name, {part: changes for part, changes in parts.items() if changes}, {})


@torch.no_grad()
def join(adapters: Sequence[tuple[Adapter, float]], name: str = "joined", rank: int | None = None) -> Adapter:
    """Several LoRAs as one, each with its weight: at strength 1 it does what they do together at these strengths.

    Exactly, with the ranks added up; or, with `rank`, what comes closest of that rank. AdapterError for other kinds of change:
    merge such an adapter and `extract` a LoRA first.
    """
    joined: dict[str, dict[str, Change]] = {}
    for part in dict.fromkeys(part for adapter, _ in adapters for part in adapter.parts):
        joined[part] = {}
        for layer in dict.fromkeys(layer for adapter, _ in adapters for layer in adapter.parts.get(part, {})):
            downs, ups = [], []
            for adapter, weight in adapters:
                change = adapter.parts.get(part, {}).get(layer)
                if change is None:
                    continue
                if not isinstance(change, LowRank):
                    raise AdapterError(
                        f"adapter {adapter.name!r}: {part}.{layer} is a {type(change).__name__}, and only LoRAs can be joined; "
                        "merge it and extract a LoRA from the difference"
                    )
                down, up = _own_factors(change)
                downs.append(down)
                ups.append(up * weight)
            joined[part][layer] = _truncate(torch.cat(downs), torch.cat(ups, dim=1), rank)
    return Adapter(name, joined, {})


def _layers(model: nn.Module) -> dict[str, Any]:
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)}


def _low_rank(difference: Tensor, rank: int) -> LowRank:
    """The closest LoRA to a difference [o, n, k, k] in fp64: singular vectors of the shorter side, from its Gram matrix."""
    d = difference.flatten(1)
    wide = d.shape[0] <= d.shape[1]
    squares, vectors = torch.linalg.eigh(d @ d.T if wide else d.T @ d)  # in rising order
    vectors = vectors.flip(1)[:, :rank]
    root = squares.flip(0)[:rank].clamp(min=0) ** 0.25  # the square root of a singular value
    share = torch.where(root > 0, 1 / root, 0)
    up, down = (vectors * root, (vectors * share).T @ d) if wide else (d @ (vectors * share), (vectors * root).T)
    return _as_change(down.reshape(-1, *difference.shape[1:]), up)


def _own_factors(change: LowRank) -> tuple[Tensor, Tensor]:
    """`LowRank.factors` without a weight at hand: in the layer's own shape, fp64."""
    kernel = () if change.down.ndim == 2 else (change.down if change.mid is None else change.mid).shape[2:]
    like = torch.empty(change.up.shape[0], change.down.shape[1], *kernel, dtype=torch.float64, device=change.up.device)
    return change.factors(like)


def _truncate(down: Tensor, up: Tensor, rank: int | None) -> LowRank:
    """The closest LoRA of that rank to up @ down, by the singular values of a matrix no larger than the present rank."""
    if rank is None or up.shape[1] <= rank:
        return _as_change(down, up)
    q_up, r_up = torch.linalg.qr(up)
    q_down, r_down = torch.linalg.qr(down.flatten(1).T)
    u, s, v = torch.linalg.svd(r_up @ r_down.T)
    root = s[:rank].sqrt()
    new_down = ((q_down @ v.T[:, :rank]) * root).T
    return _as_change(new_down.reshape(-1, *down.shape[1:]), q_up @ u[:, :rank] * root)


def _as_change(down: Tensor, up: Tensor) -> LowRank:
    """In fp32 and in the shapes of files: up of a convolution is [o, r, 1, 1]."""
    up = up.reshape(*up.shape, *[1] * (down.ndim - 2))
    return LowRank(down.float().contiguous(), up.float().contiguous())
