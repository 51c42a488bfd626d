"""What is put on trial: every kernel with its shapes, its reference, and everything else that computes the same.

A subject joins a kernel to the rows of `shapes.TABLE` that it may meet in a model, and to what it must equal. Its rivals are
other implementations of the same operation: PyTorch as the reference is written, PyTorch compiled, every backend of scaled
dot-product attention, xformers and flash-attn where they are installed. They are judged by the same rule before they are timed.

Legend: as in `shapes`.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from einops import rearrange
from sdcore.kernels import KERNELS, shapes
from sdcore.kernels.quantised import keep
from sdcore.kernels.shapes import RANK, Call, Conv, Draw, Inputs, Linear
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from sdcore import ops
from sdcore.errors import ConfigError

Function = Callable[..., Any]


def as_it_is(**inputs: Any) -> Inputs:
    return inputs


@dataclass(frozen=True)
class Subject:
    """A kernel on trial."""

    name: str
    kind: str  # of its shapes, a key of `shapes.KINDS`
    kernel: Function
    reference: Function  # the same by definition, with the same arguments
    fits: Callable[[Any], bool] = lambda shape: True  # which of these shapes it is for
    inputs: Callable[..., Inputs] = as_it_is  # from what a shape makes to the kernel's arguments; may take `draw`
    prepare: Callable[..., Inputs] | None = None  # what is done once a model, not once a call, to a kernel's arguments
    trains: bool = True  # has a backward worth timing
    by: str = "sdcore"  # whose kernel
    others: Mapping[str, Function] = field(default_factory=dict)  # rivals beside those that are found for the kind

    def rows(self, model: str | None = None) -> Iterator[Call]:
        """Its shapes, those of one model where that is given, the ones with the most work first."""
        kind = self.kind if self.kind in shapes.KINDS else None
        found = LATENTS if kind is None else [call for call in shapes.calls(kind) if self.fits(call.shape)]
        found = [call for call in found if model is None or call.model == model]
        return iter(sorted(found, key=lambda call: -call.times * (call.shape.flop or call.shape.elements)))

    def make(self, call: Call, dtype: torch.dtype, device: torch.device, seed: int = 0) -> Inputs:
        """Random arguments for a row."""
        generator = torch.Generator(device).manual_seed(seed)
        made = call.shape.make(dtype, device, generator)
        return made if self.inputs is as_it_is else self.inputs(Draw(dtype, device, generator), **made)

    def bind(self, function: Function, inputs: Inputs) -> Callable[[], Any]:
        """Something to time: what can be done once a model is done here, and not timed."""
        if self.prepare is not None and function is self.kernel:
            inputs = self.prepare(**inputs)
            function = KERNELS[self.name]
        return partial(function, **inputs)

    def rivals(self, training: bool = False) -> dict[str, Function]:
        """Name -> another implementation."""
        found = {"torch": self.reference, "compile": compiled(self.reference)}
        if self.kind == "attention":
            found |= {f"sdpa {b.name.lower().removesuffix('_attention')}": partial(sdpa, b) for b in BACKENDS}
            found |= {name: call for name, call in LIBRARIES.items() if find_spec(name)}
        return {**found, **self.others}


def compiled(function: Function) -> Function:
    """`torch.compile` at its best; graphs are left to the clock, which makes its own."""
    return torch.compile(function, dynamic=False, mode="max-autotune-no-cudagraphs")


# ---------------------------------------------------------------------------------------------------------------- attention

BACKENDS = (
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
)


def sdpa(backend: SDPBackend, **inputs: Any) -> Tensor:
    """The reference on one backend; RuntimeError where that refuses the shape or the dtype."""
    with sdpa_kernel(backend):
        return ops.REFERENCES["attention"](**inputs)


def xformers(q: Tensor, k: Tensor, v: Tensor, heads: int, causal: bool = False, upcast: bool = False) -> Tensor:
    """xformers' choice among its own kernels."""
    attention = import_module("xformers.ops").memory_efficient_attention
    q, k, v = (rearrange(x, "b s (n d) -> b s n d", n=heads) for x in (q, k, v))
    return rearrange(attention(q, k, v), "b s n d -> b s (n d)")


def flash_attn(q: Tensor, k: Tensor, v: Tensor, heads: int, causal: bool = False, upcast: bool = False) -> Tensor:
    """flash-attn 2."""
    attention = import_module("flash_attn").flash_attn_func
    q, k, v = (rearrange(x, "b s (n d) -> b s n d", n=heads) for x in (q, k, v))
    return rearrange(attention(q, k, v), "b s n d -> b s (n d)")


LIBRARIES: dict[str, Function] = {"xformers": xformers, "flash_attn": flash_attn}


# ------------------------------------------------------------------------------------------------- the others' arguments


class Latents(NamedTuple):
    """One move of a sampler on latents [b, c, h, w] that remembers `pairs` of (x, x0), under guidance."""

    b: int
    c: int
    h: int
    w: int
    pairs: int

    def make(self, dtype: torch.dtype, device: str | torch.device, generator: torch.Generator) -> Inputs:
        said, seen = Draw(dtype, device, generator), Draw(torch.float32, device, generator)
        return {
            "output": said.picture(2 * self.b, self.c, self.h, self.w),
            "x": seen.normal(self.b, self.c, self.h, self.w),
            "row": seen.normal(7 + 2 * self.pairs),
            "history": seen.normal(self.pairs, 2, self.b, self.c, self.h, self.w),
        }

    @property
    def flop(self) -> int:
        return 0

    @property
    def elements(self) -> int:
        """Counted as if all were of the network's dtype: two outputs and an entry, and x, x0, next and the history in fp32."""
        return self.b * self.c * self.h * self.w * (3 + 2 * (3 + 4 * self.pairs))

    def small(self) -> "Latents":
        return self._replace(h=min(self.h, 5), w=min(self.w, 7))

    def __str__(self) -> str:
        return f"{self.b}x{self.c}x{self.h}x{self.w}, {self.pairs} remembered"


LATENTS = [
    Call("guidance_step", name, Latents(1, 4, side, side, 1), 1)
    for name, side in (("SD1.5 512", 64), ("SD2.1 768", 96), ("SDXL 1024", 128))
]


def with_epilogue(draw: Draw, x: Tensor, weight: Tensor, bias: Tensor | None) -> Inputs:
    """A linear layer with what follows it in a transformer: GEGLU behind the projection of the feed-forward, else the shortcut
    where there is a bias (the layers without one make q, k and v)."""
    gated = len(weight) == 8 * weight.shape[1]
    residual = draw.normal(*x.shape[:2], len(weight)) if bias is not None and not gated else None
    return {"x": x, "weight": weight, "bias": bias, "residual": residual, "gated": gated}


def with_codes(draw: Draw, x: Tensor, weight: Tensor, bias: Tensor | None, **given: Any) -> Inputs:
    """A layer whose weight is coded in fp8; a convolution's padding goes without saying."""
    codes, scale = keep(weight)
    given.pop("padding", None)
    return {"x": x, "codes": codes, "scale": scale, "bias": bias, **given}


def with_adapter(draw: Draw, x: Tensor, weight: Tensor, bias: Tensor | None) -> Inputs:
    """A linear layer with a low-rank adapter."""
    down, up = draw.weight(RANK, weight.shape[1]), draw.weight(len(weight), RANK)
    return {"x": x, "weight": weight, "bias": bias, "down": down, "up": up, "scale": 0.5}


def with_residual(draw: Draw, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Inputs:
    """A layer norm behind an addition."""
    return {"x": x, "residual": draw.normal(*x.shape), "weight": weight, "bias": bias, "eps": eps}


def has_tokens(shape: Linear) -> bool:
    return shape.s > 1


def projects(shape: Linear) -> bool:
    """Makes q, k or v of the picture: where adapters sit."""
    return has_tokens(shape) and not shape.bias and shape.s != 77


def implicit(shape: Conv) -> bool:
    """3 x 3 on enough channels."""
    return shape.side == 3 and shape.padded and shape.c >= 16


# --------------------------------------------------------------------------------------------------------------- the list


def reference_of(file: str) -> Function:
    """The definition that stands in a kernel's own file, where there is no such operation in `sdcore.ops`."""
    return kernel_file(file).reference


def kernel_file(name: str) -> Any:
    """A file of this package, imported when its subject is asked for."""
    return import_module(f"sdcore.kernels.{name}")


def _for_op(name: str) -> Subject:
    return Subject(name, name, KERNELS[name], ops.REFERENCES[name])


def _gemm() -> Subject:
    return Subject("gemm", "linear", KERNELS["gemm"], reference_of("gemm"), has_tokens, with_epilogue)


def _lora_linear() -> Subject:
    return Subject("lora_linear", "linear", KERNELS["lora_linear"], reference_of("lora_linear"), projects, with_adapter)


def _add_layer_norm() -> Subject:
    kernel, reference = KERNELS["add_layer_norm"], reference_of("layer_norm")
    return Subject("add_layer_norm", "layer_norm", kernel, reference, inputs=with_residual)


def _conv() -> Subject:
    return Subject("conv", "conv", KERNELS["conv"], reference_of("conv"), implicit)


def _upsample_conv() -> Subject:
    """Folding the weights is done once a model, so it is left out of the time."""
    fold = import_module("sdcore.kernels.upsample_conv").fold
    kernel = KERNELS["upsample_conv"]

    def folded(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Inputs:
        return {"x": x, "folded": fold(weight).contiguous(memory_format=torch.channels_last), "bias": bias}

    def whole(**inputs: Any) -> Tensor:
        return kernel(**folded(**inputs))

    reference = reference_of("upsample_conv")
    return Subject("upsample_conv", "upsample_conv", whole, reference, prepare=folded)


def _fp8_linear() -> Subject:
    definition, others = kernel_file("quantised").linear, {"scaled_mm": kernel_file("fp8").scaled_mm}
    return Subject(
        "fp8_linear", "linear", KERNELS["fp8_linear"], definition, has_tokens, with_codes, trains=False, others=others
    )


def _fp8_conv() -> Subject:
    definition = kernel_file("quantised").convolve
    return Subject("fp8_conv", "conv", KERNELS["fp8_conv"], definition, implicit, with_codes, trains=False)


def _guidance_step() -> Subject:
    kernel, reference = KERNELS["guidance_step"], reference_of("guidance_step")
    return Subject("guidance_step", "guidance_step", kernel, reference, trains=False)


SUBJECTS: dict[str, Callable[[], Subject]] = {
    "attention": partial(_for_op, "attention"),
    "group_norm_silu": partial(_for_op, "group_norm_silu"),
    "group_norm": partial(_for_op, "group_norm"),
    "layer_norm": partial(_for_op, "layer_norm"),
    "add_layer_norm": _add_layer_norm,
    "geglu": partial(_for_op, "geglu"),
    "gemm": _gemm,
    "lora_linear": _lora_linear,
    "conv": _conv,
    "upsample_conv": _upsample_conv,
    "guidance_step": _guidance_step,
    "fp8_linear": _fp8_linear,
    "fp8_conv": _fp8_conv,
}


def subject(name: str, kernel: Function | None = None) -> Subject:
    """The subject of this name, or your own kernel in its place. Raises ConfigError for a name that is none."""
    if name not in SUBJECTS:
        raise ConfigError(f"no kernel called {name!r}; there are {', '.join(SUBJECTS)}")
    if kernel is None:
        return SUBJECTS[name]()
    if name not in ops.REFERENCES:
        raise ConfigError(
            f"{name}: no operation of sdcore.ops; your own kernel may replace {', '.join(ops.REFERENCES)}"
        )
    return Subject(name, name, kernel, ops.REFERENCES[name], by="yours")
