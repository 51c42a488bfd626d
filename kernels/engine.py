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
from sdcore.kernels import fused
from sdcore.kernels.fused import weight_of
from sdcore.kernels.lossy import DeepCache
from torch import Tensor, nn

from sdcore import lora, ops
from sdcore.clip import CLIPText, TextOutput
from sdcore.errors import ConfigError
from sdcore.guidance import Denoiser
from sdcore.pipeline import Conditions, Pipeline, Run, check_finite
from sdcore.samplers import Step
from sdcore.unet import KeysValues, UNet

if TYPE_CHECKING:
    from sdcore.kernels.loop import Captured, Loops

__all__ = ["Accelerated", "accelerate", "weight_of"]

Operations = Mapping[str, Callable]


def accelerate(pipe: Pipeline, kernels: str = "measured", *, deep_every: int = 1) -> "Accelerated":
    """A pipeline of the same parts, with the same call and the same pictures, that draws faster.

    `pipe` stays as it is and may be used beside it; adapters attached to either are attached to both. Memory: a second copy of
    the convolutions, on a CPU 16/9 of them. `kernels` says what runs the operations of `sdcore.ops`: "triton", "torch", or, on
    CUDA, whichever is "measured" to be faster.

    Lossy, other pictures: `deep_every` above 1 runs the deep levels of the UNet at every so many steps only (lossy.py).

    Raises ConfigError for a pipeline that offloads its parts, for kernels that are unknown or cannot run on the pipeline's
    device, and for a `deep_every` that is no whole number from 1.
    """
    if pipe.offload:
        raise ConfigError(
            "offload: parts that leave the device cannot be prepared on it; load the model without offload"
        )
    if isinstance(deep_every, bool) or not isinstance(deep_every, int) or deep_every < 1:
        raise ConfigError(f"deep_every: expected a whole number from 1, found {deep_every!r:.80}")
    parts = {f.name: getattr(pipe, f.name) for f in fields(Pipeline)}
    half = weight_of(pipe.unet.conv_in).dtype != torch.float32
    if pipe.device.type == "cuda" and half and weight_of(pipe.vae.decoder.conv_in).dtype != torch.bfloat16:
        parts["vae"] = copy.deepcopy(pipe.vae).to(torch.bfloat16)  # fp16 overflows in some decoders, fp32 is slow
    return Accelerated(**parts, operations=operations(kernels, pipe.device), deep_every=deep_every)


def operations(kernels: str, device: torch.device) -> Operations:
    """What `ops.using` is given: nothing for "torch", the kernels for "triton", a `Choice` of all for "measured" on CUDA.

    Raises ConfigError for another name, and for "triton" where Triton cannot run.
    """
    if kernels not in ("measured", "triton", "torch"):
        raise ConfigError(f"kernels: expected measured, triton or torch, found {kernels!r:.80}")
    if kernels == "torch" or (kernels == "measured" and device.type != "cuda"):
        return {}
    from sdcore.kernels import KERNELS, common, for_ops

    if device.type != "cuda" and not common.INTERPRETED:
        raise ConfigError(
            f"kernels: triton needs an NVIDIA GPU, the model is on {device.type}; use torch, or leave it out"
        )
    if kernels == "triton":
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


@dataclass
class Accelerated(Pipeline):
    """What `accelerate` gives: a `Pipeline` in every respect, that draws with the mirrors of its models."""

    operations: Operations = field(default_factory=dict, repr=False)
    deep_every: int = 1
    mirrors: dict[int, "Mirror"] = field(default_factory=dict, repr=False)  # id of a model -> its mirror

    def mirror(self, model: nn.Module) -> "Mirror":
        """The fast twin of one of the models, up to date with its weights and adapters."""
        if id(model) not in self.mirrors:
            self.mirrors[id(model)] = Mirror(model, fused.mirror(model), self.operations)
        self.mirrors[id(model)].refresh()
        return self.mirrors[id(model)]

    def table(self) -> str:
        """What was measured so far for the choice between implementations, a line a shape; empty on a CPU."""
        from sdcore.kernels import choice

        return choice.table(run for run in self.operations.values() if isinstance(run, choice.Choice))

    def steps(self, *args: Any, **options: Any) -> Run:
        """As `Pipeline.steps`."""
        run = super().steps(*args, **options)
        assert isinstance(run.denoise, Denoiser) and isinstance(run.denoise.network, Network)
        run.denoise.network.pictures = len(run.start)
        if self.device.type != "cuda":
            return run
        from sdcore.kernels.loop import CapturedRun, fits

        return CapturedRun(**{f.name: getattr(run, f.name) for f in fields(Run)}) if fits(run) else run

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """As `Pipeline.decode`."""
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

    def _network(
        self, conditions: Conditions | Sequence[Conditions], sizes: Sequence[int], way: Sequence[Step]
    ) -> "Network":
        told = [conditions] * len(way) if isinstance(conditions, Conditions) else list(conditions)
        time_ids = None if told[0].pooled is None else self._time_ids(sizes, told[0].pooled)
        return Network(self.mirror(self.unet), told, time_ids, way, self.deep_every)


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


class Network:
    """The UNet told of everything but the latent: `network(x, step)`, as `guidance.denoiser` asks for it.

    `keys_values` and `shifts` are worked out when it is made, for all steps, and anew only where adapters change on the way.
    `constant`: one text and one strength for all steps.
    """

    def __init__(
        self,
        mirror: Mirror,
        conditions: list[Conditions],
        time_ids: Tensor | None,
        way: Sequence[Step],
        deep_every: int = 1,
    ):
        model, twin = mirror.model, mirror.twin
        assert isinstance(model, UNet) and isinstance(twin, UNet)
        self.deep = DeepCache(twin, deep_every) if deep_every > 1 else None
        self.mirror, self.model, self.conditions, self.time_ids, self.way = mirror, model, conditions, time_ids, way
        self.dtype, self.device = weight_of(model.conv_in).dtype, weight_of(model.conv_in).device
        self.pictures = 0  # how many are drawn; 0 where not known: then nothing is shared between the branches
        self.keys_values: dict[int, list[KeysValues]] = {}  # step -> for every attention to the text, two [r, k, d]
        self.shifts: dict[int, list[Tensor]] = {}  # step -> for every residual block [r, c, 1, 1], or [1, c, 1, 1]
        n = len(way)
        strengths_change = any([lora.at_step(model, i / n) for i in range(1, n)])
        lora.at_step(model, 0.0)
        self.constant = not strengths_change and all(told is conditions[0] for told in conditions)
        self.work_out(range(n))

    @torch.no_grad()
    def work_out(self, steps: Sequence[int]) -> None:
        """Keys and values, once for each of the different conditions of these steps; shifts, in one batch for each."""
        self.mirror.refresh()
        self.state = self.mirror.state
        groups: dict[int, list[int]] = {}
        for i in steps:
            groups.setdefault(id(self.conditions[i]), []).append(i)
        for indices in groups.values():
            told = self.conditions[indices[0]]
            kv = self.mirror.call("keys_values", told.context.to(self.dtype))
            t = torch.tensor([self.way[i].t for i in indices], dtype=torch.float32, device=self.device)
            shifts = self._shifts(t, told.pooled)
            for i, own in zip(indices, shifts, strict=True):
                self.keys_values[i], self.shifts[i] = kv, own

    def follow(self, i: int) -> bool:
        """Set the strengths of step i. True where adapters have changed since, here or by the user: then what was worked out
        for this and later steps is worked out anew, and graphs captured before are gone."""
        lora.at_step(self.model, i / len(self.way))
        if self.state is self.mirror.state and self.state.version == lora.version(self.model):
            return False
        self.work_out(range(i, len(self.way)))
        return True

    def _shifts(self, t: Tensor, pooled: Tensor | None) -> list[list[Tensor]]:
        """What the residual blocks hear at times [n]: n lists of one tensor a block."""
        added = None
        if pooled is not None and self.time_ids is not None:  # XL hears of the text and the sizes too: r rows a step
            n, r = len(t), len(pooled)
            t, added = t.repeat_interleave(r), (pooled.repeat(n, 1), self.time_ids.expand(n * r, -1))
        blocks = self.model.time_shifts(self.model.embed_time(t, added))
        return [list(step) for step in zip(*(block.split(1 if added is None else r) for block in blocks), strict=True)]

    def __call__(self, x: Tensor, step: Step) -> Tensor:
        """x [n, c, h, w] -> prediction [n, c, h, w], where n is r, or fewer for the last rows of the conditions."""
        self.follow(step.i)
        n = len(x)
        # Every branch sees the same latents: they go in once.
        x = x[: self.pictures or n].to(self.dtype).contiguous(memory_format=torch.channels_last)
        kv = [(k[-n:], v[-n:]) for k, v in self.keys_values[step.i]]
        shifts = [shift[-n:] for shift in self.shifts[step.i]]
        if self.deep is None:
            return self.mirror.call("step", x, shifts, kv)
        with ops.using(**self.mirror.operations):
            return self.deep.step(x, shifts, kv, step.i)
