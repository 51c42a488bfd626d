"""The pipeline: from a prompt to a picture, with every stage in plain sight.

    tokenizer -> text encoder(s) -> [ UNet under guidance -> sampler ] x steps -> decoder -> picture

`Pipeline` holds the parts and nothing else. Its methods are the stages: `encode` (prompts to conditions), `steps` (the denoising
loop, one step at a time, so that progress, preview and cancelling are the caller's own `for`), `decode` (latents to pixels).
Calling the pipeline runs them all. What depends on the picture but not on the step, the keys and values of the text, is
computed once, before the loop.

Legend: b pictures, k text tokens, d text width, c latent channels, h w latent height and width (pixels / 8), H W pixels.
"""

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sdcore.clip import CLIPText
from sdcore.errors import ConfigError, NonFiniteError, PromptError
from sdcore.guidance import denoiser
from sdcore.samplers import Noise, Step, initial, make_steps, sample
from sdcore.scheduler import SchedulerConfig
from sdcore.tokenizer import Tokenizer
from sdcore.unet import UNet
from sdcore.vae import VAE

log = logging.getLogger("sdcore")

MAX_SIDE = 8192  # pixels; a larger side is a slip of the finger, and would ask for memory by the terabyte


class Conditions(NamedTuple):
    """What the UNet is told of b prompts."""

    context: Tensor  # [b, k, d]
    pooled: Tensor | None  # XL: one vector for the whole prompt [b, p]

    def then(self, other: "Conditions") -> "Conditions":
        """Both in one batch, these first."""
        pooled = (
            torch.cat([self.pooled, other.pooled]) if self.pooled is not None and other.pooled is not None else None
        )
        return Conditions(torch.cat([self.context, other.context]), pooled)


class Progress(NamedTuple):
    """One step of the loop, after it was made."""

    step: Step
    total: int  # how many steps there are
    x: Tensor  # the latent now [b, c, h, w] fp32, in the sampler's own scale
    x0: Tensor  # the finished latent as guessed at this step: `pipe.decode(p.x0)` is a preview


@dataclass
class Run:
    """A picture about to be drawn: everything that is worked out before the first step. Iterate over it to draw."""

    steps: list[Step]
    start: Tensor  # noise at the level of the first step [b, c, h, w] fp32
    denoise: Callable[[Tensor, Step], Tensor]
    noise: Noise  # for samplers that add more on the way
    seeds: list[int] | None
    notices: list[str]

    def __iter__(self) -> Iterator[Progress]:
        walk = sample(self.denoise, self.start, self.steps, noise=self.noise)
        for _ in self.steps:
            with torch.no_grad():  # closed before the yield: the caller's own gradients are not touched
                step, x, x0 = next(walk)
                # Looking at the numbers makes an accelerator wait, so there only the end is looked at.
                if x.device.type == "cpu" or step.i == len(self.steps) - 1:
                    check_finite(x, f"the UNet, at step {step.i + 1} of {len(self.steps)} (timestep {step.t:g})")
            yield Progress(step, len(self.steps), x, x0)


@dataclass
class Result:
    """What a call gives back."""

    latents: Tensor  # [b, c, h, w] fp32, multiplied by the autoencoder's scaling factor
    pixels: Tensor | None  # [b, 3, H, W] fp32, about -1..1; None with output="latent"
    seeds: list[int] | None  # one a picture; None where the noise was given
    notices: list[str] = field(default_factory=list)  # what the user should know, such as words that did not fit

    @property
    def images(self) -> list:
        """The pictures: `image.Picture`, with `.save(path)`, `.size`, and `.pil` for Pillow."""
        from sdcore import image  # here: a runtime that works on tensors alone needs no Pillow

        return [] if self.pixels is None else image.to_pictures(self.pixels)


@dataclass
class Pipeline:
    """The parts of a Stable Diffusion and how they work together. Build one with `sdcore.load`."""

    unet: UNet
    vae: VAE
    text_encoders: list[CLIPText]
    tokenizers: list[Tokenizer]
    scheduler: SchedulerConfig
    family: str = "custom"
    zero_negative: bool = False  # SDXL base: an empty negative prompt is zeros, not the encoding of ""
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    offload: bool = False  # keep on the device only the part that is at work: SDXL then fits a card of 8 GB

    # ------------------------------------------------------------------------------------------------ the whole way

    @torch.no_grad()
    def __call__(
        self, prompt: str | Sequence[str], negative: str | Sequence[str] = "", *, output: str = "image", **options: Any
    ) -> Result:
        """Draw. `options` are those of `steps`; `output="latent"` leaves the decoder out.

        Raises PromptError, ConfigError for bad arguments, NonFiniteError where NaN appears.
        """
        if output not in ("image", "latent"):
            raise ConfigError(f"output: expected 'image' or 'latent', found {output!r}")
        run = self.steps(prompt, negative, **options)
        latents = run.start
        for progress in run:
            latents = progress.x
        return Result(latents, self.decode(latents) if output == "image" else None, run.seeds, run.notices)

    def steps(
        self,
        prompt: str | Sequence[str],
        negative: str | Sequence[str] = "",
        *,
        steps: int = 30,
        guidance: float = 7.5,
        sampler: str | None = None,
        schedule: str | None = None,
        seed: int | Sequence[int] = 0,
        count: int = 1,
        size: tuple[int, int] | None = None,
        noise: Tensor | None = None,
        guidance_rescale: float = 0.0,
        guidance_interval: tuple[float, float] = (0.0, math.inf),
        sizes: Sequence[int] | None = None,
        **sampler_options: Any,
    ) -> "Run":
        """Draw one step at a time: `for progress in pipe.steps(...)`; the last one's `x` is the finished latent.

        prompt, negative   one text, or one a picture
        steps, sampler, schedule, sampler_options   see `samplers.make_steps`; None is the model's own choice
        guidance           7.5 follows the prompt closely, 1 and less ignores `negative` and is twice as fast
        seed               one number (picture i gets seed + i) or one a picture; a picture depends on its own alone
        count              pictures of every prompt
        size               (W, H) in pixels, multiples of 8; None is the size the model was trained at
        noise              standard normal noise [b, c, h, w] to start from, in place of that of the seeds
        guidance_rescale, guidance_interval   see `guidance.denoiser`
        sizes              XL: (original H, W, crop top, left, target H, W); None is (H, W, 0, 0, H, W)

        Raises at the call, before the first step, PromptError and ConfigError; in the loop NonFiniteError.
        """
        if self.unet.config.in_channels != self.unet.config.out_channels:
            raise ConfigError(
                f"this {self.family} model draws from a picture, not from a prompt alone: its UNet takes "
                f"{self.unet.config.in_channels} channels where text to image has {self.unet.config.out_channels}"
            )
        prompts = _texts(prompt, "prompt", count)
        if not isinstance(guidance, (int, float)) or not math.isfinite(guidance):
            raise ConfigError(f"guidance: expected a finite number such as 7.5, found {guidance!r}")
        way = make_steps(self.scheduler, steps, sampler, schedule, **sampler_options)
        W, H = self._size(size)
        seeds = None if noise is not None else _seeds(seed, len(prompts))
        shape = (self.unet.config.in_channels, H // self.vae.config.factor, W // self.vae.config.factor)
        draw = Noise(seeds or _seeds(seed, len(prompts)))
        if noise is None:
            noise = draw.draw(*shape)
        elif noise.shape != (len(prompts), *shape):
            raise ConfigError(
                f"noise: expected [{len(prompts)}, {', '.join(map(str, shape))}], found {list(noise.shape)}"
            )
        x = initial(noise.to(self.device, torch.float32), way)

        notices: list[str] = []
        conditions = self.encode(prompts, notices)
        if guidance > 1:
            negatives = _texts(negative, "negative", len(prompts) if isinstance(negative, str) else count)
            if len(negatives) != len(prompts):
                raise ConfigError(
                    f"negative: expected one text, or one a prompt ({len(prompts)}), found {len(negatives)}"
                )
            conditions = self._negative(negatives, notices).then(conditions)
        for notice in notices:
            log.warning(notice)
        denoise = denoiser(
            self._network(conditions, sizes or (H, W, 0, 0, H, W)),
            guidance=guidance,
            rescale=guidance_rescale,
            interval=guidance_interval,
        )
        return Run(way, x, denoise, draw, seeds, notices)

    # ------------------------------------------------------------------------------------------------ the stages

    @torch.no_grad()
    def encode(self, prompts: Sequence[str], notices: list[str] | None = None) -> Conditions:
        """Prompts -> what the UNet is told of them. Words beyond a tokenizer's length are cut off, and named in `notices`.

        SD 1.x and 2.x read their encoder after the last layer. The XL family reads the layer before, all encoders side by
        side, and takes the pooled vector of the last one. Source: Podell et al. 2023, section 2.1.
        """
        xl = bool(self.unet.config.added_dim)
        contexts, pooled = [], None
        for tokenizer, encoder in zip(self.tokenizers, self.text_encoders, strict=True):
            tokens = tokenizer.encode_batch(list(prompts))
            for dropped in tokens.dropped:
                if dropped and notices is not None:
                    notices.append(f"prompt: only {tokenizer.max_length - 2} tokens are read; left out: {dropped!r}")
            self._place(encoder)
            out = encoder(tokens.ids.to(self.device))
            contexts.append(out.states[-2] if xl else out.last)
            pooled = out.pooled if xl else None
        context = torch.cat(contexts, dim=-1)
        check_finite(context, "the text encoder")
        return Conditions(context, pooled)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Latents [b, c, h, w] -> pixels [b, 3, H, W] fp32, about -1..1. One after the other, to spare memory."""
        self._place(self.vae)
        dtype = next(self.vae.parameters()).dtype
        z = (latents / self.vae.config.scaling_factor).to(self.device, dtype)
        pixels = torch.cat([self.vae.decode(one) for one in z.split(1)]).float()
        check_finite(pixels, f"the decoder, running in {_short(dtype)}")
        return pixels

    # ------------------------------------------------------------------------------------------------ inside

    def _negative(self, negatives: list[str], notices: list[str]) -> Conditions:
        """Encode what the picture shall not show; on SDXL base an empty text is zeros."""
        negative = self.encode(negatives, notices)
        if not self.zero_negative:
            return negative
        empty = torch.tensor([not text for text in negatives], device=self.device)
        pooled = None if negative.pooled is None else negative.pooled.masked_fill(empty[:, None], 0)
        return Conditions(negative.context.masked_fill(empty[:, None, None], 0), pooled)

    def _network(self, conditions: Conditions, sizes: Sequence[int]) -> Callable[[Tensor, Step], Tensor]:
        """Close the UNet over what it is told: keys and values once, here; the time in every step."""
        unet, dtype = self.unet, next(self.unet.parameters()).dtype
        self._place(unet)
        with torch.no_grad():
            kv = unet.keys_values(conditions.context.to(dtype))
        pooled = conditions.pooled
        time_ids = None if pooled is None else self._time_ids(sizes, pooled)

        def network(x: Tensor, step: Step) -> Tensor:
            self._place(unet)  # a preview may have taken its place since the last step
            n = len(x)  # both halves, or only the positive one: it is the last
            t = torch.full((n,), step.t, dtype=torch.float32, device=x.device)
            added = None if pooled is None or time_ids is None else (pooled[-n:], time_ids.expand(n, -1))
            shifts = unet.time_shifts(unet.embed_time(t, added))
            return unet.step(x.to(dtype), shifts, [(k[-n:], v[-n:]) for k, v in kv])

        return network

    def _time_ids(self, sizes: Sequence[int], pooled: Tensor) -> Tensor:
        """The numbers that an XL model hears of the picture's size [1, 6]."""
        config = self.unet.config
        expected = (config.added_dim - pooled.shape[-1]) // config.added_time_dim
        if len(sizes) != expected:
            raise ConfigError(f"sizes: this {self.family} model hears {expected} numbers, found {len(sizes)}: {sizes}")
        return torch.tensor([sizes], dtype=torch.float32, device=self.device)

    def _size(self, size: tuple[int, int] | None) -> tuple[int, int]:
        """(W, H) in pixels, checked."""
        factor = self.vae.config.factor
        if size is None:
            return (self.unet.config.sample_size * factor,) * 2
        if (
            not isinstance(size, Sequence)
            or len(size) != 2
            or not all(isinstance(side, int) and not isinstance(side, bool) for side in size)
        ):
            raise ConfigError(f"size: expected two whole numbers (width, height), found {size!r}")
        for side in size:
            if side % factor or not factor <= side <= MAX_SIDE:
                low = min(max(side // factor * factor, factor), MAX_SIDE)
                near = sorted({low, min(low + factor, MAX_SIDE)})
                raise ConfigError(
                    f"size: {size[0]}x{size[1]} has a side of {side}; sides are multiples of {factor} from {factor} to "
                    f"{MAX_SIDE}, the nearest {' or '.join(map(str, near))}"
                )
        return size[0], size[1]

    def _place(self, part: nn.Module) -> None:
        """With `offload`: bring the part that works next to the device, and all others home to the CPU."""
        if not self.offload:
            return
        for other in [self.unet, self.vae, *self.text_encoders]:
            other.to(self.device if other is part else "cpu")


def check_finite(x: Tensor, stage: str) -> None:
    """Raise NonFiniteError, naming the stage, rather than go on to a black picture."""
    if not torch.isfinite(x).all():
        raise NonFiniteError(
            f"NaN or infinity out of {stage}: half precision overflowed or a weight file is damaged; "
            "try dtype float32, and `sdcore inspect` on the model"
        )


def _texts(text: str | Sequence[str], name: str, count: int) -> list[str]:
    """One text or several -> a list, each `count` times."""
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise ConfigError(f"count: expected a whole number from 1, found {count!r}")
    texts = [text] if isinstance(text, str) else text
    if not isinstance(texts, Sequence) or not texts or not all(isinstance(t, str) for t in texts):
        raise PromptError(f"{name}: expected a text, or a list of texts that is not empty, found {text!r}"[:300])
    return [t for t in texts for _ in range(count)]


def _seeds(seed: int | Sequence[int], count: int) -> list[int]:
    """One seed a picture."""
    seeds = [seed + i for i in range(count)] if isinstance(seed, int) and not isinstance(seed, bool) else seed
    if not isinstance(seeds, Sequence) or isinstance(seeds, str):
        raise ConfigError(f"seed: expected a whole number or one a picture, found {seed!r}")
    if len(seeds) != count:
        raise ConfigError(f"seed: expected one a picture ({count}), found {len(seeds)}")
    return list(seeds)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
