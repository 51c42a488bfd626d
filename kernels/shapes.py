"""Every shape with which Stable Diffusion really calls each operation, and how often.

Kernels are checked and timed on these shapes and on no others. `TABLE` was written by `trace`, which runs the models on the meta
device (shapes without numbers) and notes every call; `python -m sdcore.kernels.shapes` prints it anew and a test compares the
two. UNets are counted for one step with guidance (batch 2, 77 text tokens), the autoencoder for one picture.

    for call in calls("attention", "SDXL 1024"):
        inputs = call.shape.make(torch.bfloat16, "cuda", torch.Generator("cuda").manual_seed(0))
        ops.attention(**inputs)                       # ... happens call.times times a step

Each kind of shape is a class below: its fields, its random inputs (`make`), the work it stands for (`flop`, `elements`) and a
version of it that an interpreter can run in a second (`small`): same head width, same channels a group, ragged lengths.

Legend: b batch, c channels, h w height and width, s query tokens, k key tokens, d width of all heads together.
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from sdcore import ops
from sdcore.unet import SD15, SD21_V, SDXL, UNet, UNetConfig
from sdcore.vae import SD_VAE, VAE

Inputs = dict[str, Any]  # the arguments of an operation, by name
GROUPS = 32  # of every group norm in the released models
RANK = 16  # of the adapters with which `lora_linear` is measured


class Draw:
    """Random tensors of one dtype on one device, from one generator: unit normal, weights as wide as their fan-in asks."""

    def __init__(self, dtype: torch.dtype, device: str | torch.device, generator: torch.Generator):
        self.options: Inputs = {"dtype": torch.float32, "device": device, "generator": generator}
        self.dtype = dtype

    def normal(self, *shape: int, scale: float = 1.0, mean: float = 0.0) -> Tensor:
        return (torch.randn(shape, **self.options) * scale + mean).to(self.dtype)

    def picture(self, *shape: int) -> Tensor:
        """[b, c, h, w] in channels-last layout, as the engine keeps it; not quite centred, as activations are."""
        return self.normal(*shape, mean=0.25).contiguous(memory_format=torch.channels_last)

    def weight(self, *shape: int) -> Tensor:
        fan_in = torch.Size(shape[1:]).numel()
        weight = self.normal(*shape, scale=fan_in**-0.5)
        return weight.contiguous(memory_format=torch.channels_last) if weight.ndim == 4 else weight

    def norm(self, c: int) -> Inputs:
        """Scale and shift of a norm."""
        return {"weight": self.normal(c, scale=0.2, mean=1.0), "bias": self.normal(c, scale=0.2)}


class Attention(NamedTuple):
    """q [b, s, d], k and v [b, k, d] -> [b, s, d]. `upcast`: the model asks for fp32 inside."""

    b: int
    s: int
    k: int
    d: int
    heads: int
    upcast: bool

    def make(self, dtype: torch.dtype, device: str | torch.device, generator: torch.Generator) -> Inputs:
        """q, k and v as they lie behind one fused projection (self-attention), or k and v behind theirs: strided views."""
        draw = Draw(dtype, device, generator)
        if self.s == self.k:
            q, k, v = draw.normal(self.b, self.s, 3 * self.d).chunk(3, dim=-1)
        else:
            q = draw.normal(self.b, self.s, self.d)
            k, v = draw.normal(self.b, self.k, 2 * self.d).chunk(2, dim=-1)
        return {"q": q, "k": k, "v": v, "heads": self.heads, "upcast": self.upcast}

    @property
    def flop(self) -> int:
        return 4 * self.b * self.s * self.k * self.d

    @property
    def elements(self) -> int:
        return 2 * self.b * (self.s + self.k) * self.d

    def small(self) -> Attention:
        heads, k = min(self.heads, 2), min(self.k, 77)
        s = 77 if self.s == self.k else min(self.s, 45)
        return self._replace(b=1, s=min(self.s, s), k=k, d=self.d // self.heads * heads, heads=heads)

    def __str__(self) -> str:
        keys = "itself" if self.s == self.k else f"{self.k} keys"
        return f"{self.b}x{self.s} to {keys}, {self.heads} x {self.d // self.heads}{', upcast' if self.upcast else ''}"


class GroupNorm(NamedTuple):
    """x [b, c, h, w], channels-last, in 32 groups; with or without the SiLU behind it."""

    b: int
    c: int
    h: int
    w: int
    eps: float

    def make(self, dtype: torch.dtype, device: str | torch.device, generator: torch.Generator) -> Inputs:
        draw = Draw(dtype, device, generator)
        x = draw.picture(self.b, self.c, self.h, self.w)
        return {"x": x, "groups": GROUPS, **draw.norm(self.c), "eps": self.eps}

    @property
    def flop(self) -> int:
        return 0  # a few a value: memory is what counts

    @property
    def elements(self) -> int:
        return 2 * self.b * self.c * self.h * self.w

    def small(self) -> GroupNorm:
        return self._replace(b=min(self.b, 2), h=min(self.h, 5), w=min(self.w, 7))

    def __str__(self) -> str:
        return f"{self.b}x{self.c}x{self.h}x{self.w}"


class LayerNorm(NamedTuple):
    """x [b, s, d]."""

    b: int
    s: int
    d: int

    def make(self, dtype: torch.dtype, device: str | torch.device, generator: torch.Generator) -> Inputs:
        draw = Draw(dtype, device, generator)
        return {"x": draw.normal(self.b, self.s, self.d, mean=0.25), **draw.norm(self.d), "eps": 1e-5}

    @property
    def flop(self) -> int:
        return 0

    @property
    def elements(self) -> int:
        return 2 * self.b * self.s * self.d

    def small(self) -> LayerNorm:  # the largest of few errors would be a matter of luck
        return self._replace(b=1, s=min(self.s, 19))

    def __str__(self) -> str:
        return f"{self.b}x{self.s}x{self.d}"


class GEGLU(NamedTuple):
    """x [b, s, 2 d] -> [b, s, d]."""

    b: int
    s: int
    d: int

    def make(self, dtype: torch.dtype, device: str | torch.device, generator: torch.Generator) -> Inputs:
        return {"x": Draw(dtype, device, generator).normal(self.b, self.s, 2 * self.d)}

    @property
    def flop(self) -> int:
        return 0

    @property
    def elements(self) -> int:
        return 3 * self.b * self.s * self.d

    def small(self) -> GEGLU:
        return self._replace(b=1, s=min(self.s, 3))

    def __str__(self) -> str:
        return f"{self.b}x{self.s}x{2 * self.d}"


class Linear(NamedTuple):
    """x [b, s, d] times weight [out, d], with or without a bias."""

    b: int
    s: int
    d: int
    out: int
    bias: bool

    def make(self, dtype: torch.dtype, device: str | torch.device, generator: torch.Generator) -> Inputs:
        draw = Draw(dtype, device, generator)
        x, weight = draw.normal(self.b, self.s, self.d), draw.weight(self.out, self.d)
        return {"x": x, "weight": weight, "bias": draw.normal(self.out) if self.bias else None}

    @property
    def flop(self) -> int:
        return 2 * self.b * self.s * self.d * self.out

    @property
    def elements(self) -> int:
        return self.b * self.s * (self.d + self.out) + self.d * self.out

    def small(self) -> Linear:
        if self.out == 8 * self.d:  # what GEGLU stands behind
            return self._replace(b=1, s=min(self.s, 19), d=24, out=8 * 24)
        return self._replace(b=1, s=min(self.s, 19), d=min(self.d, 80), out=min(self.out, 72))

    def __str__(self) -> str:
        return f"{self.b}x{self.s}x{self.d} -> {self.out}"


class Conv(NamedTuple):
    """x [b, c, h, w], channels-last, under weight [out, c, side, side]; padding (side - 1) / 2 where `padded`."""

    b: int
    c: int
    h: int
    w: int
    out: int
    side: int
    stride: int
    padded: bool

    def make(self, dtype: torch.dtype, device: str | torch.device, generator: torch.Generator) -> Inputs:
        draw = Draw(dtype, device, generator)
        x, weight = draw.picture(self.b, self.c, self.h, self.w), draw.weight(self.out, self.c, self.side, self.side)
        padding = self.side // 2 if self.padded else 0
        return {"x": x, "weight": weight, "bias": draw.normal(self.out), "stride": self.stride, "padding": padding}

    @property
    def pixels(self) -> int:
        """How many pixels come out."""
        pad = 2 * (self.side // 2) if self.padded else 0
        return (
            self.b * ((self.h + pad - self.side) // self.stride + 1) * ((self.w + pad - self.side) // self.stride + 1)
        )

    @property
    def flop(self) -> int:
        return 2 * self.pixels * self.c * self.out * self.side**2

    @property
    def elements(self) -> int:
        return self.b * self.c * self.h * self.w + self.pixels * self.out + self.c * self.out * self.side**2

    def small(self) -> Conv:
        return self._replace(b=1, c=min(self.c, 48), h=min(self.h, 7), w=min(self.w, 5), out=min(self.out, 40))

    def __str__(self) -> str:
        stride = f" by {self.stride}" if self.stride > 1 else ""
        return f"{self.b}x{self.c}x{self.h}x{self.w} -> {self.out}, {self.side}x{self.side}{stride}"


class UpsampleConv(NamedTuple):
    """x [b, c, h, w], channels-last -> [b, out, 2 h, 2 w]: every pixel twice each way, then a 3 x 3 convolution."""

    b: int
    c: int
    h: int
    w: int
    out: int

    def make(self, dtype: torch.dtype, device: str | torch.device, generator: torch.Generator) -> Inputs:
        draw = Draw(dtype, device, generator)
        x, weight = draw.picture(self.b, self.c, self.h, self.w), draw.weight(self.out, self.c, 3, 3)
        return {"x": x, "weight": weight, "bias": draw.normal(self.out)}

    @property
    def flop(self) -> int:
        """As the model is written: nine taps on the doubled picture. Four parity convolutions need 4/9 of it."""
        return 2 * self.b * 4 * self.h * self.w * self.c * self.out * 9

    @property
    def elements(self) -> int:
        return self.b * self.h * self.w * (self.c + 4 * self.out) + 9 * self.c * self.out

    def small(self) -> UpsampleConv:
        return self._replace(b=1, c=min(self.c, 48), h=min(self.h, 3), w=min(self.w, 5), out=min(self.out, 40))

    def __str__(self) -> str:
        return f"{self.b}x{self.c}x{self.h}x{self.w} -> {self.out}x{2 * self.h}x{2 * self.w}"


Shape = Attention | GroupNorm | LayerNorm | GEGLU | Linear | Conv | UpsampleConv
KINDS: dict[str, type[Shape]] = {
    "attention": Attention,
    "group_norm": GroupNorm,
    "group_norm_silu": GroupNorm,
    "layer_norm": LayerNorm,
    "geglu": GEGLU,
    "linear": Linear,
    "conv": Conv,
    "upsample_conv": UpsampleConv,
}


@dataclass(frozen=True)
class Call:
    """One operation on one shape, and how often a model calls it so."""

    op: str
    model: str
    shape: Shape
    times: int


def calls(op: str | None = None, model: str | None = None) -> Iterator[Call]:
    """Rows of the table, those of one operation or one model where these are given. KeyError for a name that is not there."""
    if op is not None and op not in KINDS:
        raise KeyError(op)
    for name in [model] if model else list(TABLE):
        for kind in [op] if op else list(KINDS):
            for fields, times in TABLE[name].get(kind, {}).items():
                yield Call(kind, name, KINDS[kind](*fields), times)


# ------------------------------------------------------------------------------------------------------ where the table is from


class _Watch(TorchFunctionMode):
    """Inside the `with`, linear layers and convolutions are counted, and those convolutions that stand behind a doubling."""

    def __init__(self, seen: Counter):
        super().__init__()
        self.seen, self.doubled = seen, None

    def __torch_function__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if function is F.interpolate:
            self.doubled = out
        elif function is F.linear:
            x, weight, bias = (*args, None)[:3]
            s, d = (1, *x.shape[1:])[-2:]
            self.seen["linear", Linear(x.shape[0], s, d, weight.shape[0], bias is not None)] += 1
        elif function is torch.conv2d:
            (b, c, h, w), (n, _, side, _) = args[0].shape, args[1].shape
            if args[0] is self.doubled:
                self.seen["upsample_conv", UpsampleConv(b, c, h // 2, w // 2, n)] += 1
            else:
                (stride, _), (padding, _) = args[3:5]
                self.seen["conv", Conv(b, c, h, w, n, side, stride, padding > 0)] += 1
        return out


def _noted(name: str, seen: Counter) -> Callable[..., Tensor]:
    """The reference of an operation, which notes the shape of each call."""
    reference = ops.REFERENCES[name]
    signature = inspect.signature(reference)

    def call(*args: Any, **options: Any) -> Tensor:
        seen[name, _shape(name, **signature.bind(*args, **options).arguments)] += 1
        return reference(*args, **options)

    return call


def _shape(name: str, **given: Any) -> Shape:
    """The shape of one call of an operation, from its arguments by name."""
    if name == "attention":
        (b, s, d), k = given["q"].shape, given["k"].shape[1]
        return Attention(b, s, k, d, given["heads"], given.get("upcast", False))
    if name in ("group_norm", "group_norm_silu"):
        b, c, h, w = given["x"].shape
        return GroupNorm(b, c, h, w, given["eps"])
    if name == "layer_norm":
        return LayerNorm(*given["x"].shape)
    if name == "geglu":
        b, s, d = given["x"].shape
        return GEGLU(b, s, d // 2)
    raise KeyError(f"{name}: an operation of sdcore.ops that kernels/shapes.py does not know; add its kind of shape")


def trace(run: Callable[[], Any]) -> dict[str, dict[tuple, int]]:
    """What `run` calls: operation -> the fields of a shape -> how often. Give it modules and inputs on the meta device."""
    seen: Counter = Counter()
    with torch.no_grad(), ops.using(**{name: _noted(name, seen) for name in ops.REFERENCES}), _Watch(seen):
        run()
    found = {op: {tuple(shape): n for (name, shape), n in seen.items() if name == op} for op in KINDS}
    return {op: rows for op, rows in found.items() if rows}


def _unet(config: UNetConfig) -> dict[str, dict[tuple, int]]:
    """One step of a UNet with guidance, at the size that it was trained at."""
    with torch.device("meta"):
        unet, side = UNet(config), config.sample_size
        x, t, context = torch.empty(2, 4, side, side), torch.empty(2), torch.empty(2, 77, config.context_dim)
        added = (torch.empty(2, 1280), torch.empty(2, 6)) if config.added_dim else None
        return trace(lambda: unet(x, t, context, added))


def _vae(encode: bool, side: int) -> dict[str, dict[tuple, int]]:
    """One picture of the autoencoder, `side` pixels wide."""
    with torch.device("meta"):
        vae = VAE(SD_VAE)
        if encode:
            return trace(lambda: vae.encode(torch.empty(1, 3, side, side)))
        return trace(lambda: vae.decode(torch.empty(1, 4, side // 8, side // 8)))


MODELS: dict[str, Callable[[], dict[str, dict[tuple, int]]]] = {
    "SD1.5 512": lambda: _unet(SD15),
    "SD2.1 768": lambda: _unet(SD21_V),
    "SDXL 1024": lambda: _unet(SDXL),
    "VAE decode 512": lambda: _vae(False, 512),
    "VAE decode 1024": lambda: _vae(False, 1024),
    "VAE encode 512": lambda: _vae(True, 512),
    "VAE encode 1024": lambda: _vae(True, 1024),
}


def written(name: str, traced: dict[str, dict[tuple, int]]) -> str:
    """A traced model as the lines of `TABLE`."""
    lines = [f'    "{name}": {{']
    for op, rows in traced.items():
        lines.append(f'        "{op}": {{  # {", ".join(KINDS[op]._fields)}')
        row = "           "
        for fields, times in rows.items():
            entry = f" {fields}: {times},"
            if len(row) + len(entry) > 118:
                lines, row = [*lines, row], "           "
            row += entry
        lines += [row, "        },"]
    return "\n".join([*lines, "    },"])


# fmt: off
TABLE: dict[str, dict[str, dict[tuple, int]]] = {
    "SD1.5 512": {
        "attention": {  # b, s, k, d, heads, upcast
            (2, 4096, 4096, 320, 8, False): 5, (2, 4096, 77, 320, 8, False): 5, (2, 1024, 1024, 640, 8, False): 5,
            (2, 1024, 77, 640, 8, False): 5, (2, 256, 256, 1280, 8, False): 5, (2, 256, 77, 1280, 8, False): 5,
            (2, 64, 64, 1280, 8, False): 1, (2, 64, 77, 1280, 8, False): 1,
        },
        "group_norm": {  # b, c, h, w, eps
            (2, 320, 64, 64, 1e-06): 5, (2, 640, 32, 32, 1e-06): 5, (2, 1280, 16, 16, 1e-06): 5,
            (2, 1280, 8, 8, 1e-06): 1,
        },
        "group_norm_silu": {  # b, c, h, w, eps
            (2, 320, 64, 64, 1e-05): 8, (2, 320, 32, 32, 1e-05): 1, (2, 640, 32, 32, 1e-05): 6,
            (2, 640, 16, 16, 1e-05): 1, (2, 1280, 16, 16, 1e-05): 6, (2, 1280, 8, 8, 1e-05): 11,
            (2, 2560, 8, 8, 1e-05): 3, (2, 2560, 16, 16, 1e-05): 2, (2, 1920, 16, 16, 1e-05): 1,
            (2, 1920, 32, 32, 1e-05): 1, (2, 1280, 32, 32, 1e-05): 1, (2, 960, 32, 32, 1e-05): 1,
            (2, 960, 64, 64, 1e-05): 1, (2, 640, 64, 64, 1e-05): 2,
        },
        "layer_norm": {  # b, s, d
            (2, 4096, 320): 15, (2, 1024, 640): 15, (2, 256, 1280): 15, (2, 64, 1280): 3,
        },
        "geglu": {  # b, s, d
            (2, 4096, 1280): 5, (2, 1024, 2560): 5, (2, 256, 5120): 5, (2, 64, 5120): 1,
        },
        "linear": {  # b, s, d, out, bias
            (2, 1, 320, 1280, True): 1, (2, 1, 1280, 1280, True): 13, (2, 1, 1280, 320, True): 5,
            (2, 1, 1280, 640, True): 5, (2, 77, 768, 320, False): 10, (2, 77, 768, 640, False): 10,
            (2, 77, 768, 1280, False): 12, (2, 4096, 320, 320, False): 20, (2, 4096, 320, 320, True): 10,
            (2, 4096, 320, 2560, True): 5, (2, 4096, 1280, 320, True): 5, (2, 1024, 640, 640, False): 20,
            (2, 1024, 640, 640, True): 10, (2, 1024, 640, 5120, True): 5, (2, 1024, 2560, 640, True): 5,
            (2, 256, 1280, 1280, False): 20, (2, 256, 1280, 1280, True): 10, (2, 256, 1280, 10240, True): 5,
            (2, 256, 5120, 1280, True): 5, (2, 64, 1280, 1280, False): 4, (2, 64, 1280, 1280, True): 2,
            (2, 64, 1280, 10240, True): 1, (2, 64, 5120, 1280, True): 1,
        },
        "conv": {  # b, c, h, w, out, side, stride, padded
            (2, 4, 64, 64, 320, 3, 1, True): 1, (2, 320, 64, 64, 320, 3, 1, True): 7,
            (2, 320, 64, 64, 320, 1, 1, False): 10, (2, 320, 64, 64, 320, 3, 2, True): 1,
            (2, 320, 32, 32, 640, 3, 1, True): 1, (2, 640, 32, 32, 640, 3, 1, True): 6,
            (2, 320, 32, 32, 640, 1, 1, False): 1, (2, 640, 32, 32, 640, 1, 1, False): 10,
            (2, 640, 32, 32, 640, 3, 2, True): 1, (2, 640, 16, 16, 1280, 3, 1, True): 1,
            (2, 1280, 16, 16, 1280, 3, 1, True): 6, (2, 640, 16, 16, 1280, 1, 1, False): 1,
            (2, 1280, 16, 16, 1280, 1, 1, False): 10, (2, 1280, 16, 16, 1280, 3, 2, True): 1,
            (2, 1280, 8, 8, 1280, 3, 1, True): 11, (2, 1280, 8, 8, 1280, 1, 1, False): 2,
            (2, 2560, 8, 8, 1280, 3, 1, True): 3, (2, 2560, 8, 8, 1280, 1, 1, False): 3,
            (2, 2560, 16, 16, 1280, 3, 1, True): 2, (2, 2560, 16, 16, 1280, 1, 1, False): 2,
            (2, 1920, 16, 16, 1280, 3, 1, True): 1, (2, 1920, 16, 16, 1280, 1, 1, False): 1,
            (2, 1920, 32, 32, 640, 3, 1, True): 1, (2, 1920, 32, 32, 640, 1, 1, False): 1,
            (2, 1280, 32, 32, 640, 3, 1, True): 1, (2, 1280, 32, 32, 640, 1, 1, False): 1,
            (2, 960, 32, 32, 640, 3, 1, True): 1, (2, 960, 32, 32, 640, 1, 1, False): 1,
            (2, 960, 64, 64, 320, 3, 1, True): 1, (2, 960, 64, 64, 320, 1, 1, False): 1,
            (2, 640, 64, 64, 320, 3, 1, True): 2, (2, 640, 64, 64, 320, 1, 1, False): 2,
            (2, 320, 64, 64, 4, 3, 1, True): 1,
        },
        "upsample_conv": {  # b, c, h, w, out
            (2, 1280, 8, 8, 1280): 1, (2, 1280, 16, 16, 1280): 1, (2, 640, 32, 32, 640): 1,
        },
    },
    "SD2.1 768": {
        "attention": {  # b, s, k, d, heads, upcast
            (2, 9216, 9216, 320, 5, True): 5, (2, 9216, 77, 320, 5, True): 5, (2, 2304, 2304, 640, 10, True): 5,
            (2, 2304, 77, 640, 10, True): 5, (2, 576, 576, 1280, 20, True): 5, (2, 576, 77, 1280, 20, True): 5,
            (2, 144, 144, 1280, 20, True): 1, (2, 144, 77, 1280, 20, True): 1,
        },
        "group_norm": {  # b, c, h, w, eps
            (2, 320, 96, 96, 1e-06): 5, (2, 640, 48, 48, 1e-06): 5, (2, 1280, 24, 24, 1e-06): 5,
            (2, 1280, 12, 12, 1e-06): 1,
        },
        "group_norm_silu": {  # b, c, h, w, eps
            (2, 320, 96, 96, 1e-05): 8, (2, 320, 48, 48, 1e-05): 1, (2, 640, 48, 48, 1e-05): 6,
            (2, 640, 24, 24, 1e-05): 1, (2, 1280, 24, 24, 1e-05): 6, (2, 1280, 12, 12, 1e-05): 11,
            (2, 2560, 12, 12, 1e-05): 3, (2, 2560, 24, 24, 1e-05): 2, (2, 1920, 24, 24, 1e-05): 1,
            (2, 1920, 48, 48, 1e-05): 1, (2, 1280, 48, 48, 1e-05): 1, (2, 960, 48, 48, 1e-05): 1,
            (2, 960, 96, 96, 1e-05): 1, (2, 640, 96, 96, 1e-05): 2,
        },
        "layer_norm": {  # b, s, d
            (2, 9216, 320): 15, (2, 2304, 640): 15, (2, 576, 1280): 15, (2, 144, 1280): 3,
        },
        "geglu": {  # b, s, d
            (2, 9216, 1280): 5, (2, 2304, 2560): 5, (2, 576, 5120): 5, (2, 144, 5120): 1,
        },
        "linear": {  # b, s, d, out, bias
            (2, 1, 320, 1280, True): 1, (2, 1, 1280, 1280, True): 13, (2, 1, 1280, 320, True): 5,
            (2, 1, 1280, 640, True): 5, (2, 77, 1024, 320, False): 10, (2, 77, 1024, 640, False): 10,
            (2, 77, 1024, 1280, False): 12, (2, 9216, 320, 320, True): 20, (2, 9216, 320, 320, False): 20,
            (2, 9216, 320, 2560, True): 5, (2, 9216, 1280, 320, True): 5, (2, 2304, 640, 640, True): 20,
            (2, 2304, 640, 640, False): 20, (2, 2304, 640, 5120, True): 5, (2, 2304, 2560, 640, True): 5,
            (2, 576, 1280, 1280, True): 20, (2, 576, 1280, 1280, False): 20, (2, 576, 1280, 10240, True): 5,
            (2, 576, 5120, 1280, True): 5, (2, 144, 1280, 1280, True): 4, (2, 144, 1280, 1280, False): 4,
            (2, 144, 1280, 10240, True): 1, (2, 144, 5120, 1280, True): 1,
        },
        "conv": {  # b, c, h, w, out, side, stride, padded
            (2, 4, 96, 96, 320, 3, 1, True): 1, (2, 320, 96, 96, 320, 3, 1, True): 7,
            (2, 320, 96, 96, 320, 3, 2, True): 1, (2, 320, 48, 48, 640, 3, 1, True): 1,
            (2, 640, 48, 48, 640, 3, 1, True): 6, (2, 320, 48, 48, 640, 1, 1, False): 1,
            (2, 640, 48, 48, 640, 3, 2, True): 1, (2, 640, 24, 24, 1280, 3, 1, True): 1,
            (2, 1280, 24, 24, 1280, 3, 1, True): 6, (2, 640, 24, 24, 1280, 1, 1, False): 1,
            (2, 1280, 24, 24, 1280, 3, 2, True): 1, (2, 1280, 12, 12, 1280, 3, 1, True): 11,
            (2, 2560, 12, 12, 1280, 3, 1, True): 3, (2, 2560, 12, 12, 1280, 1, 1, False): 3,
            (2, 2560, 24, 24, 1280, 3, 1, True): 2, (2, 2560, 24, 24, 1280, 1, 1, False): 2,
            (2, 1920, 24, 24, 1280, 3, 1, True): 1, (2, 1920, 24, 24, 1280, 1, 1, False): 1,
            (2, 1920, 48, 48, 640, 3, 1, True): 1, (2, 1920, 48, 48, 640, 1, 1, False): 1,
            (2, 1280, 48, 48, 640, 3, 1, True): 1, (2, 1280, 48, 48, 640, 1, 1, False): 1,
            (2, 960, 48, 48, 640, 3, 1, True): 1, (2, 960, 48, 48, 640, 1, 1, False): 1,
            (2, 960, 96, 96, 320, 3, 1, True): 1, (2, 960, 96, 96, 320, 1, 1, False): 1,
            (2, 640, 96, 96, 320, 3, 1, True): 2, (2, 640, 96, 96, 320, 1, 1, False): 2,
            (2, 320, 96, 96, 4, 3, 1, True): 1,
        },
        "upsample_conv": {  # b, c, h, w, out
            (2, 1280, 12, 12, 1280): 1, (2, 1280, 24, 24, 1280): 1, (2, 640, 48, 48, 640): 1,
        },
    },
    "SDXL 1024": {
        "attention": {  # b, s, k, d, heads, upcast
            (2, 4096, 4096, 640, 10, False): 10, (2, 4096, 77, 640, 10, False): 10,
            (2, 1024, 1024, 1280, 20, False): 60, (2, 1024, 77, 1280, 20, False): 60,
        },
        "group_norm": {  # b, c, h, w, eps
            (2, 640, 64, 64, 1e-06): 5, (2, 1280, 32, 32, 1e-06): 6,
        },
        "group_norm_silu": {  # b, c, h, w, eps
            (2, 320, 128, 128, 1e-05): 8, (2, 320, 64, 64, 1e-05): 1, (2, 640, 64, 64, 1e-05): 6,
            (2, 640, 32, 32, 1e-05): 1, (2, 1280, 32, 32, 1e-05): 10, (2, 2560, 32, 32, 1e-05): 2,
            (2, 1920, 32, 32, 1e-05): 1, (2, 1920, 64, 64, 1e-05): 1, (2, 1280, 64, 64, 1e-05): 1,
            (2, 960, 64, 64, 1e-05): 1, (2, 960, 128, 128, 1e-05): 1, (2, 640, 128, 128, 1e-05): 2,
        },
        "layer_norm": {  # b, s, d
            (2, 4096, 640): 30, (2, 1024, 1280): 180,
        },
        "geglu": {  # b, s, d
            (2, 4096, 2560): 10, (2, 1024, 5120): 60,
        },
        "linear": {  # b, s, d, out, bias
            (2, 1, 320, 1280, True): 1, (2, 1, 1280, 1280, True): 9, (2, 1, 2816, 1280, True): 1,
            (2, 1, 1280, 320, True): 5, (2, 1, 1280, 640, True): 5, (2, 77, 2048, 640, False): 20,
            (2, 77, 2048, 1280, False): 120, (2, 4096, 640, 640, True): 30, (2, 4096, 640, 640, False): 40,
            (2, 4096, 640, 5120, True): 10, (2, 4096, 2560, 640, True): 10, (2, 1024, 1280, 1280, True): 132,
            (2, 1024, 1280, 1280, False): 240, (2, 1024, 1280, 10240, True): 60, (2, 1024, 5120, 1280, True): 60,
        },
        "conv": {  # b, c, h, w, out, side, stride, padded
            (2, 4, 128, 128, 320, 3, 1, True): 1, (2, 320, 128, 128, 320, 3, 1, True): 7,
            (2, 320, 128, 128, 320, 3, 2, True): 1, (2, 320, 64, 64, 640, 3, 1, True): 1,
            (2, 640, 64, 64, 640, 3, 1, True): 6, (2, 320, 64, 64, 640, 1, 1, False): 1,
            (2, 640, 64, 64, 640, 3, 2, True): 1, (2, 640, 32, 32, 1280, 3, 1, True): 1,
            (2, 1280, 32, 32, 1280, 3, 1, True): 10, (2, 640, 32, 32, 1280, 1, 1, False): 1,
            (2, 2560, 32, 32, 1280, 3, 1, True): 2, (2, 2560, 32, 32, 1280, 1, 1, False): 2,
            (2, 1920, 32, 32, 1280, 3, 1, True): 1, (2, 1920, 32, 32, 1280, 1, 1, False): 1,
            (2, 1920, 64, 64, 640, 3, 1, True): 1, (2, 1920, 64, 64, 640, 1, 1, False): 1,
            (2, 1280, 64, 64, 640, 3, 1, True): 1, (2, 1280, 64, 64, 640, 1, 1, False): 1,
            (2, 960, 64, 64, 640, 3, 1, True): 1, (2, 960, 64, 64, 640, 1, 1, False): 1,
            (2, 960, 128, 128, 320, 3, 1, True): 1, (2, 960, 128, 128, 320, 1, 1, False): 1,
            (2, 640, 128, 128, 320, 3, 1, True): 2, (2, 640, 128, 128, 320, 1, 1, False): 2,
            (2, 320, 128, 128, 4, 3, 1, True): 1,
        },
        "upsample_conv": {  # b, c, h, w, out
            (2, 1280, 32, 32, 1280): 1, (2, 640, 64, 64, 640): 1,
        },
    },
    "VAE decode 512": {
        "attention": {  # b, s, k, d, heads, upcast
            (1, 4096, 4096, 512, 1, False): 1,
        },
        "group_norm": {  # b, c, h, w, eps
            (1, 512, 64, 64, 1e-06): 1,
        },
        "group_norm_silu": {  # b, c, h, w, eps
            (1, 512, 64, 64, 1e-06): 10, (1, 512, 128, 128, 1e-06): 6, (1, 512, 256, 256, 1e-06): 1,
            (1, 256, 256, 256, 1e-06): 5, (1, 256, 512, 512, 1e-06): 1, (1, 128, 512, 512, 1e-06): 6,
        },
        "linear": {  # b, s, d, out, bias
            (1, 4096, 512, 512, True): 4,
        },
        "conv": {  # b, c, h, w, out, side, stride, padded
            (1, 4, 64, 64, 4, 1, 1, False): 1, (1, 4, 64, 64, 512, 3, 1, True): 1,
            (1, 512, 64, 64, 512, 3, 1, True): 10, (1, 512, 128, 128, 512, 3, 1, True): 6,
            (1, 512, 256, 256, 256, 3, 1, True): 1, (1, 256, 256, 256, 256, 3, 1, True): 5,
            (1, 512, 256, 256, 256, 1, 1, False): 1, (1, 256, 512, 512, 128, 3, 1, True): 1,
            (1, 128, 512, 512, 128, 3, 1, True): 5, (1, 256, 512, 512, 128, 1, 1, False): 1,
            (1, 128, 512, 512, 3, 3, 1, True): 1,
        },
        "upsample_conv": {  # b, c, h, w, out
            (1, 512, 64, 64, 512): 1, (1, 512, 128, 128, 512): 1, (1, 256, 256, 256, 256): 1,
        },
    },
    "VAE decode 1024": {
        "attention": {  # b, s, k, d, heads, upcast
            (1, 16384, 16384, 512, 1, False): 1,
        },
        "group_norm": {  # b, c, h, w, eps
            (1, 512, 128, 128, 1e-06): 1,
        },
        "group_norm_silu": {  # b, c, h, w, eps
            (1, 512, 128, 128, 1e-06): 10, (1, 512, 256, 256, 1e-06): 6, (1, 512, 512, 512, 1e-06): 1,
            (1, 256, 512, 512, 1e-06): 5, (1, 256, 1024, 1024, 1e-06): 1, (1, 128, 1024, 1024, 1e-06): 6,
        },
        "linear": {  # b, s, d, out, bias
            (1, 16384, 512, 512, True): 4,
        },
        "conv": {  # b, c, h, w, out, side, stride, padded
            (1, 4, 128, 128, 4, 1, 1, False): 1, (1, 4, 128, 128, 512, 3, 1, True): 1,
            (1, 512, 128, 128, 512, 3, 1, True): 10, (1, 512, 256, 256, 512, 3, 1, True): 6,
            (1, 512, 512, 512, 256, 3, 1, True): 1, (1, 256, 512, 512, 256, 3, 1, True): 5,
            (1, 512, 512, 512, 256, 1, 1, False): 1, (1, 256, 1024, 1024, 128, 3, 1, True): 1,
            (1, 128, 1024, 1024, 128, 3, 1, True): 5, (1, 256, 1024, 1024, 128, 1, 1, False): 1,
            (1, 128, 1024, 1024, 3, 3, 1, True): 1,
        },
        "upsample_conv": {  # b, c, h, w, out
            (1, 512, 128, 128, 512): 1, (1, 512, 256, 256, 512): 1, (1, 256, 512, 512, 256): 1,
        },
    },
    "VAE encode 512": {
        "attention": {  # b, s, k, d, heads, upcast
            (1, 4096, 4096, 512, 1, False): 1,
        },
        "group_norm": {  # b, c, h, w, eps
            (1, 512, 64, 64, 1e-06): 1,
        },
        "group_norm_silu": {  # b, c, h, w, eps
            (1, 128, 512, 512, 1e-06): 4, (1, 128, 256, 256, 1e-06): 1, (1, 256, 256, 256, 1e-06): 3,
            (1, 256, 128, 128, 1e-06): 1, (1, 512, 128, 128, 1e-06): 3, (1, 512, 64, 64, 1e-06): 9,
        },
        "linear": {  # b, s, d, out, bias
            (1, 4096, 512, 512, True): 4,
        },
        "conv": {  # b, c, h, w, out, side, stride, padded
            (1, 3, 512, 512, 128, 3, 1, True): 1, (1, 128, 512, 512, 128, 3, 1, True): 4,
            (1, 128, 513, 513, 128, 3, 2, False): 1, (1, 128, 256, 256, 256, 3, 1, True): 1,
            (1, 256, 256, 256, 256, 3, 1, True): 3, (1, 128, 256, 256, 256, 1, 1, False): 1,
            (1, 256, 257, 257, 256, 3, 2, False): 1, (1, 256, 128, 128, 512, 3, 1, True): 1,
            (1, 512, 128, 128, 512, 3, 1, True): 3, (1, 256, 128, 128, 512, 1, 1, False): 1,
            (1, 512, 129, 129, 512, 3, 2, False): 1, (1, 512, 64, 64, 512, 3, 1, True): 8,
            (1, 512, 64, 64, 8, 3, 1, True): 1, (1, 8, 64, 64, 8, 1, 1, False): 1,
        },
    },
    "VAE encode 1024": {
        "attention": {  # b, s, k, d, heads, upcast
            (1, 16384, 16384, 512, 1, False): 1,
        },
        "group_norm": {  # b, c, h, w, eps
            (1, 512, 128, 128, 1e-06): 1,
        },
        "group_norm_silu": {  # b, c, h, w, eps
            (1, 128, 1024, 1024, 1e-06): 4, (1, 128, 512, 512, 1e-06): 1, (1, 256, 512, 512, 1e-06): 3,
            (1, 256, 256, 256, 1e-06): 1, (1, 512, 256, 256, 1e-06): 3, (1, 512, 128, 128, 1e-06): 9,
        },
        "linear": {  # b, s, d, out, bias
            (1, 16384, 512, 512, True): 4,
        },
        "conv": {  # b, c, h, w, out, side, stride, padded
            (1, 3, 1024, 1024, 128, 3, 1, True): 1, (1, 128, 1024, 1024, 128, 3, 1, True): 4,
            (1, 128, 1025, 1025, 128, 3, 2, False): 1, (1, 128, 512, 512, 256, 3, 1, True): 1,
            (1, 256, 512, 512, 256, 3, 1, True): 3, (1, 128, 512, 512, 256, 1, 1, False): 1,
            (1, 256, 513, 513, 256, 3, 2, False): 1, (1, 256, 256, 256, 512, 3, 1, True): 1,
            (1, 512, 256, 256, 512, 3, 1, True): 3, (1, 256, 256, 256, 512, 1, 1, False): 1,
            (1, 512, 257, 257, 512, 3, 2, False): 1, (1, 512, 128, 128, 512, 3, 1, True): 8,
            (1, 512, 128, 128, 8, 3, 1, True): 1, (1, 8, 128, 128, 8, 1, 1, False): 1,
        },
    },
}
# fmt: on

if __name__ == "__main__":
    for model, traced_by in MODELS.items():
        print(written(model, traced_by()), flush=True)
