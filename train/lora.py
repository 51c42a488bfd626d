"""LoRA and its kin: teach a model with a small change beside each of its weights, which stay as they are.

    sdcore train lora --data pictures --model sd15 --rank 16 --out runs/style

What trains: for each chosen layer the few small tensors of a `Change` (sdcore/changes.py), in fp32. The formula by which they act
is the same one that later reads them from a file, so what was trained is what is drawn:

    lora    up @ down, thin layers beside the base weight; on convolutions (--layers all) it is called LoCon
    loha    (w1_a @ w1_b) * (w2_a @ w2_b), entry by entry
    lokr    w1 ⊗ (w2_a @ w2_b), or w1 ⊗ w2 where that is as small
    --dora  the length of each row of the changed weight is learnt apart, around any of them

Each begins as no change at all: one factor is zero. The loss is the method's own (train/tuning.py): with nothing but the
parameters exchanged, this is ordinary fine-tuning. `TrainLoRA` is the method, `LoRA` the module, `Learned` one layer of it.

Source: Hu et al. 2021; Yeh et al. 2023 (LoCon, LoHa, LoKr, with LyCORIS' starting values); Liu et al. 2024 (DoRA; the norm is a
constant in the gradient, section 4.3); Kalajdzievski 2023 (rsLoRA: alpha / √r); Hayou et al. 2024 (LoRA+: up learns faster).
Legend: o outputs, n inputs, k k kernel, r rank.
"""

import dataclasses
import json
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from sdcore.weights.adapters import write_adapter
from torch import Tensor, nn

from sdcore import lora
from sdcore.changes import Change, DoRA, Hadamard, Kronecker, LowRank
from sdcore.errors import ConfigError
from sdcore.pipeline import Pipeline
from sdcore.voices import Conditions

from .options import option, parse
from .task import generator
from .tuning import Tune, TuneOptions, load

KINDS: dict[str, type[Change]] = {"lora": LowRank, "loha": Hadamard, "lokr": Kronecker}
LAYERS = {  # which linear layers and convolutions, by their names
    "attention": r"\.(to_q|to_k|to_v|to_out\.0|q_proj|k_proj|v_proj|out_proj)$",
    "transformer": r"attentions\.|encoder\.layers\.",
    "all": r"attentions\.|resnets\.|samplers\.|encoder\.layers\.",
    "full": "",
}
LATE = ("up", "w2", "w2_a")  # begin as zero; LoRA+ has them learn faster
# No business of who gets the file:
FOLDERS = {"out", "resume", "accept_changes", "data", "labels", "captions", "cache", "validation", "prompts", "masks"}


@dataclass(frozen=True)
class ChangeOptions:
    """What a LoRA is and which layers have one: of every method that can train one."""

    kind: str = option("lora", "lora, loha or lokr")
    dora: bool = option(False, "learn the length of each row of the weights apart (DoRA)")
    rank: int = option(16, "rank of the change of each layer")
    alpha: float | None = option(None, "the change is scaled by alpha / rank; by 1 where it is not given")
    rslora: bool = option(False, "scaled by alpha / √rank instead, so that high ranks learn as fast as low ones")
    layers: str = option(
        "attention",
        "attention: its four projections; transformer: all in the transformers; all: convolutions too (LoCon); full: also the "
        "first and the last one and what reads the time",
    )
    ranks: tuple[str, ...] = option(
        (),
        "NAME=RANK,...: another rank, or 0 for none, where NAME is in a layer's path: mid_block=0,attn2=32; the last counts",
    )
    text_encoder: bool = option(False, "change the text encoders too")


@dataclass(frozen=True)
class LoRAOptions(ChangeOptions, TuneOptions):
    """Teach a model by a LoRA or one of its kin."""

    warmup: int = option(0, "steps in which the learning rate rises to its peak")
    cooldown: int = option(0, "last steps, in which it falls linearly to nearly nothing; constant in between")
    text_rate: float = option(1.0, "factor on the learning rate of the text encoders' part")
    plus: float = option(1.0, "LoRA+: factor on the learning rate of what begins as zero (up); 16 is usual")
    trigger: str | None = option(None, "the words that call what was learnt, noted in the file for whoever gets it")


# ---------------------------------------------------------------------------------------------------------- what one layer learns


class Learned(nn.Module):
    """The change of one layer, as parameters: `change()` is the `Change` that they make, and what the layer computes with."""

    def __init__(self, layer: nn.Module, kind: str, rank: int, scale: float, dora: bool, rng: torch.Generator):
        super().__init__()
        weight: Tensor = layer.weight.detach()  # type: ignore[operator]
        tensors, scale = STARTS[kind](weight.shape, rank, scale, rng)
        self.kind, self.scale = KINDS[kind], scale
        for name, tensor in tensors.items():
            self.register_parameter(name, nn.Parameter(tensor.to(weight.device)))
        self.magnitude = nn.Parameter(weight.float().flatten(1).norm(dim=1)) if dora else None

    def change(self) -> Change:
        """What is learnt so far, of the parameters themselves: gradients go through it."""
        tensors = {name: p for name, p in self.named_parameters() if name != "magnitude"}
        change = self.kind(**tensors, scale=self.scale)  # type: ignore[call-arg]
        return change if self.magnitude is None else DoRA(change, self.magnitude, "peft")

    def act(self, layer: nn.Linear | nn.Conv2d, x: Tensor) -> Tensor:
        """What the layer gives with the change: LoRA beside the weight, every other one in a weight worked out here."""
        change = self.change()
        if isinstance(change, LowRank):
            down, up = change.down.to(x.dtype), change.up.to(x.dtype)
            if isinstance(layer, nn.Linear):
                return type(layer).forward(layer, x) + F.linear(F.linear(x, down), up) * self.scale
            thin = layer._conv_forward(x, down, None)
            return type(layer).forward(layer, x) + F.conv2d(thin, up) * self.scale
        with torch.autocast(x.device.type, enabled=False):
            weight = (layer.weight.float() + change.delta(layer.weight)).to(x.dtype)  # type: ignore[operator]
        if isinstance(layer, nn.Linear):
            return F.linear(x, weight, layer.bias)
        return layer._conv_forward(x, weight, layer.bias)


# What the tensors of each kind begin as, for a weight of a shape, and what their product is scaled by.


def start_lora(shape: torch.Size, rank: int, scale: float, rng: torch.Generator) -> tuple[dict[str, Tensor], float]:
    kernel = [1] * (len(shape) - 2)
    return {"down": spread((rank, *shape[1:]), rng), "up": torch.zeros(shape[0], rank, *kernel)}, scale


def start_loha(shape: torch.Size, rank: int, scale: float, rng: torch.Generator) -> tuple[dict[str, Tensor], float]:
    o, n = shape[0], math.prod(shape[1:])
    return {
        "w1_a": 0.1 * torch.randn(o, rank, generator=rng), "w1_b": torch.randn(rank, n, generator=rng),
        "w2_a": torch.zeros(o, rank), "w2_b": torch.randn(rank, n, generator=rng),
    }, scale  # fmt: skip


def start_lokr(shape: torch.Size, rank: int, scale: float, rng: torch.Generator) -> tuple[dict[str, Tensor], float]:
    (o1, o2), (n1, n2) = halves(shape[0]), halves(shape[1])
    n2, w1 = n2 * math.prod(shape[2:]), spread((o1, n1), rng)
    if rank * (o2 + n2) >= o2 * n2:  # a product would save nothing, and has no scale
        return {"w1": w1, "w2": torch.zeros(o2, n2 // math.prod(shape[2:]), *shape[2:])}, 1.0
    return {"w1": w1, "w2_a": torch.zeros(o2, rank), "w2_b": spread((rank, n2), rng)}, scale


STARTS = {"lora": start_lora, "loha": start_loha, "lokr": start_lokr}


def spread(shape: tuple[int, ...], rng: torch.Generator) -> Tensor:
    """Uniform within 1 / √inputs, as linear layers begin."""
    return (torch.rand(shape, generator=rng) * 2 - 1) / math.sqrt(math.prod(shape[1:]))


def halves(n: int) -> tuple[int, int]:
    """n as a product of two numbers, as near to each other as it can be, the smaller one first."""
    small = next(d for d in range(math.isqrt(n), 0, -1) if n % d == 0)
    return small, n // small


# ------------------------------------------------------------------------------------------------------------ what a model learns


class LoRA(nn.Module):
    """The changes of all chosen layers of a pipeline, acting on it from now on through each layer's `forward`.

    Parameters are called part.layer.name, slashes for the dots of the layer. ConfigError for a choice that means nothing.
    """

    def __init__(self, pipe: Pipeline, options: ChangeOptions, seed: int):
        super().__init__()
        self.on = True
        parts = lora.models(pipe)
        for i, (path, rank) in enumerate(chosen(parts, options).items()):
            part, _, name = path.partition(".")
            layer = parts[part].get_submodule(name)
            alpha = rank if options.alpha is None else options.alpha
            scale = alpha / (math.sqrt(rank) if options.rslora else rank)
            rng = generator(seed, i, 0, 10)
            learned = Learned(layer, options.kind, rank, scale, options.dora, rng)
            if part not in self._modules:
                self.add_module(part, nn.ModuleDict())
            self.get_submodule(part).add_module(name.replace(".", "/"), learned)
            vars(layer)["forward"] = partial(self.forward_of, layer, learned)

    def forward_of(self, layer: Any, learned: Learned, x: Tensor) -> Tensor:
        return learned.act(layer, x) if self.on else type(layer).forward(layer, x)

    @contextmanager
    def off(self) -> Iterator[None]:
        """Inside the `with`, the model is the one that it was."""
        self.on = False
        try:
            yield
        finally:
            self.on = True

    def adapter(self, name: str, metadata: dict[str, str]) -> lora.Adapter:
        """What was learnt so far, to be attached or written."""
        parts = {
            part: {layer.replace("/", "."): detached(learned.change()) for layer, learned in layers.items()}  # type: ignore
            for part, layers in self.named_children()
        }
        return lora.Adapter(name, parts, metadata)


def chosen(parts: dict[str, nn.Module], options: ChangeOptions) -> dict[str, int]:
    """part.layer -> rank, of every layer that is to learn."""
    for option_, value, known in (("kind", options.kind, KINDS), ("layers", options.layers, LAYERS)):
        if value not in known:
            raise ConfigError(f"--{option_}: expected one of {', '.join(known)}, found {value!r}")
    paths = {
        f"{part}.{name}": options.rank
        for part, model in parts.items()
        for name, module in model.named_modules()
        if (part == "unet" or options.text_encoder)
        and isinstance(module, nn.Linear | nn.Conv2d)
        and re.search(LAYERS[options.layers], name)
    }
    for word in options.ranks:
        name, _, rank = word.partition("=")
        within = [path for path in paths if f".{name}." in f".{path}."]
        if not rank.isdigit() or not within:
            raise ConfigError(
                f"--ranks {word}: expected NAME=RANK, NAME in the path of a layer such as {next(iter(paths))}"
            )
        paths |= dict.fromkeys(within, int(rank))
    paths = {path: rank for path, rank in paths.items() if rank}
    if not paths or min(paths.values()) < 1:
        raise ConfigError(f"--rank {options.rank}, --ranks {','.join(options.ranks)}: leave no layer a rank from 1 up")
    return paths


def detached(change: Change) -> Change:
    """The change as it is now, on the CPU."""
    values = {field.name: getattr(change, field.name) for field in dataclasses.fields(change)}  # type: ignore[arg-type]
    for name, value in values.items():
        if isinstance(value, Tensor):
            values[name] = value.detach().cpu().clone()
        elif isinstance(value, Change):
            values[name] = detached(value)
    return type(change)(**values)


# -------------------------------------------------------------------------------------------------------------------- the method


class TrainLoRA(Tune):
    """Fine-tuning in which a LoRA is all that trains."""

    options: LoRAOptions

    def begin(self) -> None:
        self.lora = LoRA(self.pipe, self.options, self.options.seed)
        self.modules = {"lora": self.lora}

    def rate_of(self, name: str) -> float:
        text = self.options.text_rate if name.startswith("lora.text_encoder") else 1.0
        return text * (self.options.plus if name.rpartition(".")[2] in LATE else 1.0)

    def listens(self) -> bool:
        return self.options.text_encoder

    def context(self, captions: list[str]) -> Conditions:
        return self.hear(captions) if self.options.text_encoder else super().context(captions)

    def export(self, out: Path) -> None:
        """NAME.safetensors as kohya, ComfyUI and A1111 read it; what diffusers can hold also as its own file."""
        adapter = self.lora.adapter(out.name, self.metadata())
        write_adapter(out / f"{out.name}.safetensors", adapter, "kohya", self.pipe)
        if self.options.kind == "lora":
            write_adapter(out / "pytorch_lora_weights.safetensors", adapter, "peft", self.pipe)

    def metadata(self) -> dict[str, str]:
        """How it came about: the options, and by hash the model and the pictures."""
        recipe = {name: value for name, value in dataclasses.asdict(self.options).items() if name not in FOLDERS}
        about = {"sdcore.recipe": json.dumps(recipe), "sdcore.data": json.dumps(self.identity())}
        return about | ({"modelspec.trigger_phrase": self.options.trigger} if self.options.trigger else {})


def main(argv: list[str] | None = None) -> int:
    """`sdcore train lora`."""
    from .loop import run

    options = parse(LoRAOptions, argv, prog="sdcore train lora")
    return run(TrainLoRA(options, load(options)), options)
