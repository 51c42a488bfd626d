"""The UNet told of everything but the latent: `network(x, step)`, which is what guidance asks for.

A call of the pipeline brings much that is the same in every step: the text, the picture's size, channels that lie beside the
latent (a mask and what it leaves, a depth map, a small picture), controls, picture prompts. `Network` works all that out once,
when it is made, and adds what belongs to the step: the time, and what the controls say of the latent as it is now.

    once a picture   keys and values of the text for the UNet and every ControlNet, hints, features, picture prompts
    every step       time, ControlNets that are at work now (their residuals are summed), the UNet

Rows: guidance hands in its branches in one batch, the negative one first and the positive ones last, b pictures each. Where it
hands in fewer rows than there are conditions, they are the last ones.

Legend: b pictures, r rows of conditions, n rows of this call, c channels, h w latent height and width, k text tokens, d width.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sdcore import lora, variants
from sdcore.controlnet import Control, ControlNet, ControlNetUnion
from sdcore.errors import ConfigError
from sdcore.samplers import Step
from sdcore.unet import KeysValues, UNet
from sdcore.voices import Conditions

if TYPE_CHECKING:
    from sdcore.ip_adapter import ImagePrompt


@dataclass(frozen=True)
class Scene:
    """What the networks are shown beside text and time, the same in every step."""

    time_ids: Tensor | None = None  # XL: the numbers of size and crop [r, 6], of the refiner [r, 5]
    beside: Tensor | None = None  # further channels of the UNet's input [1 or r, c', h, w]
    labels: Tensor | None = None  # the upscaler: noise level of the small picture, int64 [1]
    scale: Tensor | None = None  # latent consistency models: the guidance that they imitate [1]
    controls: Sequence[Control] = ()
    image_prompts: Sequence["ImagePrompt"] = ()
    negatives: int = 0  # rows of conditions that come first and see no picture prompt
    latent: tuple[int, int] | None = None  # height and width, which the masks of picture prompts are scaled to

    @property
    def bare(self) -> bool:
        """Whether there is nothing but text, time and size."""
        return self.beside is None and self.labels is None and not self.controls and not self.image_prompts


class Network:
    """`network(x [n, c, h, w], step) -> prediction [n, c, h, w]`.

    told       what the UNet is told of the texts, one entry a step; the same object where nothing changes
    way        the steps; keys and values are worked out anew only where an adapter's strength changes between two of them
    pictures   b, how many of the rows belong to one branch of guidance
    place      brings modules to the device before they work (see `Pipeline.offload`)
    """

    def __init__(
        self,
        unet: UNet,
        told: Sequence[Conditions],
        way: Sequence[Step],
        scene: Scene,
        pictures: int,
        place: Callable[..., None] = lambda *modules: None,
    ):
        self.unet, self.told, self.way, self.scene, self.pictures, self.place = unet, told, way, scene, pictures, place
        self.eye = unet  # what looks at the latent: the UNet itself, or a twin of it
        self.dtype = next(unet.parameters()).dtype
        self.acts = together(scene.controls)
        self.nets = [act[0].net for act in self.acts if isinstance(act[0].net, ControlNet)]
        self.labels = {id(unet): scene.labels}  # what a network hears beside the time
        place(unet, *(c.net for c in scene.controls), *(prompt.adapter for prompt in scene.image_prompts))
        lora.at_step(unet, 0.0)
        with torch.no_grad():
            self.shown = [self.show(act) for act in self.acts]
            self.seen = [prompt.keys_values(self.rows, scene.negatives, scene.latent) for prompt in scene.image_prompts]
        self.keys_values: dict[tuple[int, int], list[KeysValues]] = {}  # of (network, conditions), by their id
        self.work_out(range(len(way)))

    def run(self, module: nn.Module, name: str, *args: Any) -> Any:
        """A method of one of the networks. The fast engine calls its twin instead."""
        return getattr(module, name)(*args)

    # ------------------------------------------------------------------------------------------------ once a picture

    def show(self, act: Sequence[Control]) -> Any:
        """What a network makes of its pictures: the hint of a ControlNet, the features of a T2I-Adapter."""
        net = act[0].net
        pixels = [control.image.to(next(net.parameters())) for control in act]
        if isinstance(net, ControlNetUnion):
            self.labels[id(net)] = net.shown(act).to(pixels[0].device)
            scales = [control.scale if len(act) > 1 else 1.0 for control in act]
            hints = [
                self.run(net, "embed_hint", x, c.kind, scale) for x, c, scale in zip(pixels, act, scales, strict=True)
            ]
            return sum(hints[1:], hints[0])
        if isinstance(net, ControlNet):
            return self.run(net, "embed_hint", *pixels)
        return [feature * act[0].scale for feature in self.run(net, "forward", *pixels)]

    @property
    def rows(self) -> int:
        """r, how many rows of conditions there are."""
        return len(self.told[0].context)

    @torch.no_grad()
    def work_out(self, steps: Sequence[int]) -> None:
        """Keys and values of all that is told in these steps."""
        self.version = lora.version(self.unet)
        for told in {id(self.told[i]): self.told[i] for i in steps}.values():
            for net in (self.unet, *self.nets):
                self.keys_values[id(net), id(told)] = self.run(net, "keys_values", told.context.to(self.dtype))
            if self.seen:
                own = self.keys_values[id(self.unet), id(told)]
                self.keys_values[id(self.unet), id(told)] = [
                    sum(both, ()) for both in zip(own, *self.seen, strict=True)
                ]

    def perturbed(self) -> "Network":
        """The same with a perturbed UNet, which `Guidance.pag` leads away from."""
        other = copy.copy(self)
        other.eye = variants.perturbed(self.eye)
        return other

    # ------------------------------------------------------------------------------------------------ every step

    def follow(self, i: int) -> bool:
        """Set the adapters' strengths of step i; True where adapters changed since, here or by the user: then what hangs on them
        was worked out anew."""
        lora.at_step(self.unet, i / len(self.way))
        if self.version == lora.version(self.unet):
            return False
        self.work_out(range(i, len(self.way)))
        return True

    def __call__(self, x: Tensor, step: Step) -> Tensor:
        self.place(self.unet, *(act[0].net for act in self.acts))  # a preview may have taken their place
        self.follow(step.i)
        n, x = len(x), self.entry(x)
        residuals, features = self.controlled(x, step, n)
        if self.scene.beside is not None:
            x = torch.cat([expand(x, n), expand(self.scene.beside.to(x)[-n:], n)], dim=1)
        return self.predict(
            x, self.shifts(self.unet, step, n), self.heard(self.unet, step, n), residuals, features, step
        )

    def entry(self, x: Tensor) -> Tensor:
        """What the networks take in [n, c, h, w]; [b, c, h, w] where they may share what is equal in all branches."""
        return x.to(self.dtype)

    def predict(self, x: Tensor, shifts: list[Tensor], kv: list[KeysValues], residuals, features, step: Step) -> Tensor:
        return self.eye.step(x, shifts, kv, residuals, features)

    def heard(self, net: nn.Module, step: Step, n: int) -> list[KeysValues]:
        """Keys and values of the last n rows."""
        return [tuple(t[-n:] for t in entry) for entry in self.keys_values[id(net), id(self.told[step.i])]]

    def shifts(self, net: Any, step: Step, n: int) -> list[Tensor]:
        """What the residual blocks of a network hear of the time in the last n rows."""
        told, time_ids = self.told[step.i], self.scene.time_ids
        t = torch.full((n,), step.t, dtype=torch.float32, device=told.context.device)
        added = None if told.pooled is None or time_ids is None else (told.pooled[-n:], time_ids[-n:])
        return net.time_shifts(net.embed_time(t, added, self.labels.get(id(net)), self.scene.scale))

    def controlled(self, x: Tensor, step: Step, n: int) -> tuple[list[Tensor] | None, list[Tensor] | None]:
        """Residuals and features of the controls that are at work in this step, each summed; None where there are none."""
        residuals: list[Tensor] | None = None
        features: list[Tensor] | None = None
        for act, shown in zip(self.acts, self.shown, strict=True):
            if not act[0].active(step.i, len(self.way)):
                continue
            if isinstance(act[0].net, ControlNet):
                residuals = total(residuals, self.residuals(act, shown, x, step, n))
            else:
                features = total(features, [expand(feature, len(x)) for feature in shown])
        return residuals, features

    def residuals(self, act: Sequence[Control], hint: Tensor, x: Tensor, step: Step, n: int) -> list[Tensor]:
        """What one ControlNet adds to the UNet's kept results. Guessing, it hears the positive texts alone."""
        control, net = act[0], act[0].net
        silent = self.pictures if control.guesses and n > self.pictures else 0
        rows = n - silent
        x = x if len(x) < n else x[-rows:]
        kv, shifts = self.heard(net, step, rows), self.shifts(net, step, rows)
        made = self.run(net, "step", x, shifts, kv, expand(hint, len(x)))
        made = control.weigh(made, 1.0 if len(act) > 1 else None)  # several maps: weighed in the hints
        if control.mask is not None:
            made = [r * F.interpolate(control.mask.to(r), size=r.shape[-2:], mode="area") for r in made]
        return [torch.cat([r.new_zeros(silent, *r.shape[1:]), r]) for r in made] if silent else made


def together(controls: Sequence[Control]) -> list[list[Control]]:
    """Controls by who looks at them: a Union's maps together, since it runs once for all; any other one alone."""
    acts: list[list[Control]] = []
    for control in controls:
        mates = [act for act in acts if act[0].net is control.net and isinstance(control.net, ControlNetUnion)]
        if not mates:
            acts.append([control])
            continue
        first = mates[0][0]
        if (first.start, first.end, first.guess) != (
            control.start,
            control.end,
            control.guess,
        ) or control.mask is not None:
            raise ConfigError("control: the maps that one Union is shown act over the same steps, and without a mask")
        mates[0].append(control)
    return acts


def expand(x: Tensor, n: int) -> Tensor:
    """x [m, ...] over and over until there are n rows."""
    return x if len(x) == n else x.repeat(n // len(x), *[1] * (x.ndim - 1))


def total(one: list[Tensor] | None, other: list[Tensor]) -> list[Tensor]:
    """The sum, tensor by tensor."""
    return other if one is None else [a + b for a, b in zip(one, other, strict=True)]
