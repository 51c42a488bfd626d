"""The fast denoising loop: `accelerate(pipe)` gives a pipeline with the same call that draws the same pictures sooner.

    fast = sdcore.accelerate(sdcore.load("tiny"))
    fast("a red circle", seed=3).images[0].save("out.png")

Nothing is approximated; sums are added up in another order, so latents agree to rounding. What is done, from the picture inwards:

    once a picture   keys and values of the text for all attentions; the time's shifts of all steps in one pass
    once a step      what comes before the first look at the text, once for all branches of guidance (`UNet.step`)
    every layer      channels last; fused q, k and v; convolutions in fewer multiplications (fused.py, winograd.py)
    on CUDA          the whole loop in one graph, or a graph a step where the steps are iterated (loop.py); decoder and text
                     encoders in graphs; a half-precision model's decoder in bf16; every operation by whichever
                     implementation was measured to be fastest for its shape (choice.py): `print(fast.table())`

The models are not copied: a mirror of each shares its layers, and follows when adapters come, go or change their strength.
What is said of CUDA here was written without one at hand and never ran; everything but capture and replay is tested on a CPU.

Legend: b pictures, r rows of conditions (b for every branch of guidance, the positive one last), n steps.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from sdcore.kernels import fused, merging, quantised
from sdcore.kernels.fused import weight_of
from sdcore.kernels.lossy import DeepCache
from sdcore.kernels.products import PYTORCH, Products, where_accepted
from torch import Tensor, nn

from sdcore import lora, ops
from sdcore.clip import CLIPText, TextOutput
from sdcore.errors import ConfigError
from sdcore.guidance import Denoiser
from sdcore.network import Network, Scene
from sdcore.pipeline import Conditions, Pipeline, Run, check_finite
from sdcore.samplers import Step
from sdcore.unet import KeysValues, UNet

if TYPE_CHECKING:
    from sdcore.kernels.loop import Captured, Loops

__all__ = ["Accelerated", "accelerate", "weight_of"]

Operations = Mapping[str, Callable]


def accelerate(
    pipe: Pipeline, kernels: str = "measured", *, deep_every: int = 1, fp8: bool = False, merge: float = 0.0
) -> "Accelerated":
    """A pipeline of the same parts, with the same call and the same pictures, that draws faster.

    `pipe` stays as it is and may be used beside it; adapters attached to either are attached to both. Memory: a second copy of
    the convolutions, on a CPU 16/9 of them. `kernels` says what runs the operations of `sdcore.ops` and the products with
    weights: "triton", "torch", or, on CUDA, whichever is "measured" to be faster.

    Lossy, other pictures: `deep_every` above 1 runs the deep levels of the UNet at every so many steps only (lossy.py); `fp8`
    multiplies in 8-bit floating point, which a CPU emulates and does not do any faster (quantised.py); `merge` is the share of
    tokens that are merged before the self-attentions of the highest resolution, 0 to 0.75 (merging.py).

    Raises ConfigError for a pipeline that offloads its parts, for kernels that are unknown or cannot run on the pipeline's
    device, for a `deep_every` that is no whole number from 1, for `fp8` on a GPU that does not multiply it, and for a `merge`
    outside its range.
    """
    if pipe.offload:
        raise ConfigError(
            "offload: parts that leave the device cannot be prepared on it; load the model without offload"
        )
    if isinstance(deep_every, bool) or not isinstance(deep_every, int) or deep_every < 1:
        raise ConfigError(f"deep_every: expected a whole number from 1, found {deep_every!r:.80}")
    if isinstance(merge, bool) or not isinstance(merge, int | float) or not 0 <= merge <= merging.MOST:
        raise ConfigError(f"merge: expected a share from 0 to {merging.MOST}, found {merge!r:.80}")
    on_gpu = pipe.device.type == "cuda"
    if fp8 and on_gpu and torch.cuda.get_device_capability(pipe.device) < (8, 9):
        raise ConfigError("fp8: this GPU does not multiply 8-bit floating point; Ada (8.9) and later do")
    parts = {f.name: getattr(pipe, f.name) for f in fields(Pipeline)}
    half = weight_of(pipe.unet.conv_in).dtype != torch.float32
    if on_gpu and half and weight_of(pipe.vae.decoder.conv_in).dtype != torch.bfloat16:
        parts["vae"] = copy.deepcopy(pipe.vae).to(torch.bfloat16)  # fp16 overflows in some decoders, fp32 is slow
    runs, multiplies = operations(kernels, pipe.device), products(kernels, pipe.device)
    if fp8:
        multiplies = lossy_products(kernels, pipe.device, multiplies)
    return Accelerated(**parts, operations=runs, products=multiplies, deep_every=deep_every, merge=merge)


def who(kernels: str, device: torch.device) -> str:
    """Who runs things: "torch", "triton" or, on CUDA, "measured".

    Raises ConfigError for another name, and for "triton" where Triton cannot run.
    """
    if kernels not in ("measured", "triton", "torch"):
        raise ConfigError(f"kernels: expected measured, triton or torch, found {kernels!r:.80}")
    if kernels == "torch" or (kernels == "measured" and device.type != "cuda"):
        return "torch"
    from sdcore.kernels import common

    if device.type != "cuda" and not common.INTERPRETED:
        raise ConfigError(
            f"kernels: triton needs an NVIDIA GPU, the model is on {device.type}; use torch, or leave it out"
        )
    return kernels


def operations(kernels: str, device: torch.device) -> Operations:
    """What `ops.using` is given: nothing for "torch", the kernels for "triton", a `Choice` of all for "measured"; see `who`."""
    by = who(kernels, device)
    if by == "torch":
        return {}
    from sdcore.kernels import KERNELS, for_ops

    if by == "triton":
        return for_ops()
    from sdcore.kernels.choice import Choice, sdpa_with
    from torch.nn.attention import SDPBackend

    backends = (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION)
    others = {"attention": {backend.name.lower(): sdpa_with(backend) for backend in backends}}
    others["attention"]["vae_kernel"] = KERNELS["vae_attention"]
    return {
        name: Choice(name, {"kernel": kernel, "torch": ops.REFERENCES[name], **others.get(name, {})})
        for name, kernel in for_ops().items()
    }


def products(kernels: str, device: torch.device) -> Products:
    """What runs products with weights, and what follows them: PyTorch, kernels, or a `Choice` of both; see `who`."""
    by = who(kernels, device)
    if by == "torch":
        return PYTORCH
    from sdcore.kernels import conv, gemm

    ours = {"linear": gemm.gemm, "conv": conv.conv, "upsample": conv.upsample}
    if by == "triton":
        run = {name: where_accepted(kernel, getattr(PYTORCH, name)) for name, kernel in ours.items()}
    else:
        from sdcore.kernels.choice import Choice

        run = {name: Choice(name, {"kernel": ours[name], "torch": getattr(PYTORCH, name)}) for name in ours}
    return Products(**run, winograd=False)  # type: ignore[arg-type]


def lossy_products(kernels: str, device: torch.device, exact: Products) -> Products:
    """The products in fp8: by its definition, which a CPU can run, by kernels, or by a `Choice` that has cuBLAS too."""
    by, linear, conv = who(kernels, device), quantised.linear, quantised.convolve
    if by != "torch":
        from sdcore.kernels import fp8

        if by == "triton":
            linear, conv = where_accepted(fp8.fp8_linear, linear), where_accepted(fp8.fp8_conv, conv)
        else:
            from sdcore.kernels.choice import Choice

            linear = Choice("fp8_linear", {"kernel": fp8.fp8_linear, "scaled_mm": fp8.scaled_mm, "torch": linear})
            conv = Choice("fp8_conv", {"kernel": fp8.fp8_conv, "torch": conv})
    lossy = quantised.Lossy(linear, conv)
    return Products(
        lossy.linear, lossy.conv, exact.upsample, quantised.keep, winograd=False, asks=(linear, conv), spares=exact
    )


@dataclass
class Accelerated(Pipeline):
    """What `accelerate` gives: a `Pipeline` in every respect, that draws with the mirrors of its models."""

    operations: Operations = field(default_factory=dict, repr=False)
    products: Products = PYTORCH
    deep_every: int = 1
    merge: float = 0.0
    mirrors: dict[int, "Mirror"] = field(default_factory=dict, repr=False)  # id of a model -> its mirror

    def mirror(self, model: nn.Module) -> "Mirror":
        """The fast twin of one of the models, up to date with its weights and adapters."""
        if id(model) not in self.mirrors:
            self.mirrors[id(model)] = Mirror(model, self.twin(model), self.operations)
        self.mirrors[id(model)].refresh()
        return self.mirrors[id(model)]

    def twin(self, model: nn.Module) -> nn.Module:
        """The fast twin of a model; what is lossy acts on the UNet alone."""
        if not isinstance(model, UNet):
            return fused.mirror(model, fused.replacement(self.products.exact))
        twin = fused.mirror(model, fused.replacement(self.products))
        return merging.merging(twin, self.merge) if self.merge else twin  # type: ignore[arg-type]

    def table(self) -> str:
        """What was measured so far for the choice between implementations, a line a shape; empty on a CPU."""
        from sdcore.kernels import choice

        asked = (*self.operations.values(), *self.products.exact.runs, *self.products.runs)
        return choice.table(run for run in dict.fromkeys(asked) if isinstance(run, choice.Choice))

    def steps(self, *args: Any, **options: Any) -> Run:
        """As `Pipeline.steps`."""
        run = super().steps(*args, **options)
        assert isinstance(run.denoise, Denoiser) and isinstance(run.denoise.network, FastNetwork)
        if self.device.type != "cuda":
            return run
        from sdcore.kernels.loop import CapturedRun, fits

        return CapturedRun(**{f.name: getattr(run, f.name) for f in fields(Run)}) if fits(run) else run

    @torch.no_grad()
    def decode(self, latents: Tensor, notices: list[str] | None = None, *, tiling: str | None = None) -> Tensor:
        """As `Pipeline.decode`; tiles and fp16 go its way, without graphs."""
        if (tiling or self.tiling) is not None or next(self.vae.parameters()).dtype == torch.float16:
            return super().decode(latents, notices, tiling=tiling)
        mirror, dtype = self.mirror(self.vae), next(self.vae.parameters()).dtype
        z = (latents / self.vae.config.scaling_factor).to(self.device, dtype)
        pixels = []
        for one in z.split(1):
            one = one.contiguous(memory_format=torch.channels_last)
            decoded = mirror.captured("decode", z=one)(z=one).float()
            pixels.append(decoded.clone(memory_format=torch.contiguous_format))  # a graph overwrites what it returned
        check_finite(torch.cat(pixels), f"the decoder, running in {str(dtype).removeprefix('torch.')}")
        return torch.cat(pixels)

    def _read(self, encoder: CLIPText, ids: Tensor, extra: Tensor | None) -> TextOutput:
        if self.device.type != "cuda" or extra is not None:
            return super()._read(encoder, ids, extra)
        out = self.mirror(encoder).captured("forward", ids=ids)(ids=ids)
        return TextOutput([state.clone() for state in out.states], out.last.clone(), out.pooled.clone())

    def _network(self, told: Sequence[Conditions], way: Sequence[Step], scene: Scene, pictures: int) -> "FastNetwork":
        return FastNetwork(self, told, way, scene, pictures)


class State(NamedTuple):
    """What a model computed with when it was looked at."""

    version: int  # of its adapters
    addresses: list[int]
    tensors: list[Tensor]  # held: no graph reads freed memory, and no address is another tensor's meanwhile


class Mirror:
    """A model, its fast twin, and the graphs that were captured of the twin."""

    def __init__(self, model: nn.Module, twin: nn.Module, operations: Operations):
        self.model, self.twin, self.operations = model, twin, operations
        self.graphs: dict[Any, Any] = {}
        self.state = self.now()

    def now(self) -> State:
        """What the model computes with: graphs read the memory that they were captured with."""
        tensors = [t.detach() for t in (*self.model.parameters(), *self.model.buffers())]
        return State(lora.version(self.model), [t.data_ptr() for t in tensors], tensors)

    def refresh(self) -> None:
        """Follow changed weights and adapters: what was prepared from others, and every graph, is made anew when next needed."""
        now = self.now()
        if fused.refresh(self.twin) or self.state[:2] != now[:2]:
            self.graphs.clear()
            self.state = now

    def call(self, name: str, *args: Any) -> Any:
        """A method of the twin, run by the chosen operations."""
        with ops.using(**self.operations):
            return getattr(self.twin, name)(*args)

    def captured(self, name: str, **tensors: Tensor) -> "Captured | Callable":
        """A method of the twin that takes these tensors: called by name, captured on CUDA."""
        if next(iter(tensors.values())).device.type != "cuda":
            return lambda **given: self.call(name, *given.values())
        from sdcore.kernels.loop import Captured

        key = (name, *((tuple(t.shape), t.dtype) for t in tensors.values()))
        if key not in self.graphs:
            self.graphs[key] = Captured(lambda held: self.call(name, *held.values()), tensors)
        return self.graphs[key]

    def loops(self) -> "Loops":
        """The loops of a UNet; what was captured of them goes with the other graphs."""
        from sdcore.kernels.loop import Loops

        return Loops(lambda *args: self.call("step", *args), self.graphs)


class FastNetwork(Network):
    """`network.Network` that draws with mirrors, works out the times of all steps at once, and hands the latents in once for all
    branches of guidance.

    `constant`: one text and one strength for all steps.
    """

    def __init__(
        self, pipe: "Accelerated", told: Sequence[Conditions], way: Sequence[Step], scene: Scene, pictures: int
    ):
        nets = [pipe.unet, *(control.net for control in scene.controls)]
        self.mirrors = {id(net): pipe.mirror(net) for net in nets}
        self.mirror = self.mirrors[id(pipe.unet)]
        if pipe.deep_every > 1 and (scene.controls or scene.beside is not None):
            raise ConfigError("deep_every: keeps what controls and masks act on; draw this with deep_every=1")
        twin = self.mirror.twin
        assert isinstance(twin, UNet)
        self.deep = DeepCache(twin, pipe.deep_every) if pipe.deep_every > 1 else None
        self.times: dict[
            tuple[int, int], list[Tensor]
        ] = {}  # (id of a network, step) -> [r or 1, c, 1, 1] a residual block
        strengths_change = any([lora.at_step(pipe.unet, i / len(way)) for i in range(1, len(way))])
        self.constant = not strengths_change and all(one is told[0] for one in told)
        super().__init__(pipe.unet, told, way, scene, pictures)
        self.eye = twin

    def run(self, module: nn.Module, name: str, *args: Any) -> Any:
        return self.mirrors[id(module)].call(name, *args)

    @torch.no_grad()
    def work_out(self, steps: Sequence[int]) -> None:
        """Keys and values, once for each of the different conditions of these steps; times, in one batch for each."""
        self.mirror.refresh()
        self.state = self.mirror.state
        super().work_out(steps)
        groups: dict[int, list[int]] = {}
        for i in steps:
            groups.setdefault(id(self.told[i]), []).append(i)
        for net in (self.unet, *self.nets):
            for indices in groups.values():
                t = torch.tensor([self.way[i].t for i in indices], device=self.told[0].context.device)
                for i, own in zip(indices, self._shifts(net, t, self.told[indices[0]].pooled), strict=True):
                    self.times[id(net), i] = own

    def follow(self, i: int) -> bool:
        """Set the strengths of step i. True where adapters have changed since, here or by the user, or before the first step the
        weights themselves: then what was worked out for this and later steps is worked out anew, and graphs captured before
        are gone."""
        lora.at_step(self.unet, i / len(self.way))
        if i == 0:
            self.mirror.refresh()
        if self.state is self.mirror.state and self.state.version == lora.version(self.unet):
            return False
        self.work_out(range(i, len(self.way)))
        return True

    def _shifts(self, net: Any, t: Tensor, pooled: Tensor | None) -> list[list[Tensor]]:
        """What the residual blocks of a network hear at times [n]: n lists of one tensor a block."""
        added, rows = None, 1
        if (
            pooled is not None and self.scene.time_ids is not None
        ):  # XL hears of the text and the sizes too: r rows a step
            n, rows = len(t), len(pooled)
            t, added = t.repeat_interleave(rows), (pooled.repeat(n, 1), self.scene.time_ids.repeat(n, 1))
        blocks = net.time_shifts(net.embed_time(t, added, self.labels.get(id(net)), self.scene.scale))
        return [list(step) for step in zip(*(block.split(rows) for block in blocks), strict=True)]

    def shifts(self, net: Any, step: Step, n: int) -> list[Tensor]:
        return [shift[-n:] for shift in self.times[id(net), step.i]]

    def entry(self, x: Tensor) -> Tensor:
        return x[: self.pictures].to(self.dtype).contiguous(memory_format=torch.channels_last)

    def predict(self, x: Tensor, shifts: list[Tensor], kv: list[KeysValues], residuals, features, step: Step) -> Tensor:
        with ops.using(**self.mirror.operations):
            if self.deep is None or self.eye is not self.mirror.twin:
                return super().predict(x, shifts, kv, residuals, features, step)
            return self.deep.step(x, shifts, kv, step.i)
