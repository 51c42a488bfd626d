"""The pipeline: from a prompt to a picture, with every stage in plain sight.

    tokenizer -> text encoder(s) -> [ UNet under guidance -> sampler ] x steps -> decoder -> picture

`Pipeline` holds the parts and nothing else. Its methods are the stages: `encode` (prompts to conditions), `steps` (the denoising
loop, one step at a time, so that progress, preview and cancelling are the caller's own `for`), `decode` (latents to pixels).
Calling the pipeline runs them all. What depends on the picture but not on the step, the keys and values of the text, is
computed once, before the loop.

A prompt is read with the grammar of sdcore/prompt.py, `emphasis` says how its weights act, and "none" takes it literally, as
diffusers does. A prompt without a sign of the grammar and of at most 75 tokens is the same either way, bit for bit.

Legend: b pictures, k text tokens, d text width, c latent channels, h w latent height and width (pixels / 8), H W pixels.
"""

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import reduce
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn

from sdcore import embeddings, lora, tasks
from sdcore import prompt as grammar
from sdcore.clip import CLIPText, TextOutput
from sdcore.controlnet import Control
from sdcore.embeddings import Embedding
from sdcore.errors import ConfigError, NonFiniteError, PromptError
from sdcore.guidance import Guidance, denoiser
from sdcore.network import Network, Scene
from sdcore.samplers import Noise, Step, sample
from sdcore.scheduler import SchedulerConfig
from sdcore.tiling import decode_safely, encode_safely
from sdcore.tokenizer import Tokenizer
from sdcore.unet import UNet
from sdcore.vae import VAE
from sdcore.voices import Conditions, Reader, Region, Texts, Voice, how_many, zeroed

if TYPE_CHECKING:
    from sdcore.ip_adapter import ImagePrompt

log = logging.getLogger("sdcore")

MAX_SIDE = 8192  # pixels; a larger side is a slip of the finger, and would ask for memory by the terabyte
AESTHETIC, NOT_AESTHETIC = 6.0, 2.5  # scores that the XL refiner hears of what it shall show, and shall not
MAX_FORMS = 128  # different texts that a prompt may turn into over the steps: keys and values of each are kept


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
    decode: Callable[[Tensor], Tensor]  # the finished latent -> its pixels, with what was to stay back in its place
    edit: Callable[[Tensor, Step | None], Tensor] | None = None  # what keeps that while drawing; see `samplers.sample`

    def __iter__(self) -> Iterator[Progress]:
        walk = sample(self.denoise, self.start, self.steps, noise=self.noise, edit=self.edit)
        for _ in self.steps:
            with torch.no_grad():  # closed before the yield: the caller's own gradients are not touched
                step, x, x0 = next(walk)
                # Looking at the numbers makes an accelerator wait, so there only the end is looked at.
                if x.device.type == "cpu" or step.i == len(self.steps) - 1:
                    check_finite(x, f"the UNet, at step {step.i + 1} of {len(self.steps)} (timestep {step.t:g})")
            yield Progress(step, len(self.steps), x, x0)

    def finish(self) -> Tensor:
        """Draw to the end without looking: the finished latent."""
        x = self.start
        for progress in self:
            x = progress.x
        return x


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
    tiling: str | None = (
        None  # "exact" or "fast": large pictures through the autoencoder by tiles; see sdcore/tiling.py
    )
    offload: bool = False  # keep on the device only the part that is at work: SDXL then fits a card of 8 GB
    embeddings: dict[str, Embedding] = field(default_factory=dict)  # words of one's own; see sdcore/embeddings.py
    adapters: dict[str, lora.Adapter] = field(default_factory=dict)  # at hand for `<lora:name:0.8>` in a prompt

    # ------------------------------------------------------------------------------------------------ the whole way

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str] | Conditions,
        negative: str | Sequence[str] | Conditions = "",
        *,
        output: str = "image",
        **options: Any,
    ) -> Result:
        """Draw. `options` are those of `steps`; `output="latent"` leaves the decoder out.

        Raises PromptError, ConfigError for bad arguments, NonFiniteError where NaN appears.
        """
        if output not in ("image", "latent"):
            raise ConfigError(f"output: expected 'image' or 'latent', found {output!r}")
        run = self.steps(prompt, negative, **options)
        latents = run.finish()
        return Result(latents, run.decode(latents) if output == "image" else None, run.seeds, run.notices)

    def steps(
        self,
        prompt: str | Sequence[str] | Conditions,
        negative: str | Sequence[str] | Conditions = "",
        *,
        steps: int = 30,
        guidance: float | Guidance = 7.5,
        sampler: str | None = None,
        schedule: str | None = None,
        seed: int | Sequence[int] = 0,
        count: int = 1,
        size: tuple[int, int] | None = None,
        noise: Tensor | None = None,
        image: Any = None,
        strength: Any = None,
        mask: Any = None,
        feather: int = 0,
        depth: Any = None,
        noise_level: int = 20,
        span: tuple[float, float] = (0.0, 1.0),
        control: Sequence[Control] = (),
        image_prompts: Sequence["ImagePrompt"] = (),
        guidance_rescale: float = 0.0,
        guidance_interval: tuple[float, float] = (0.0, math.inf),
        sizes: Sequence[float] | None = None,
        negative_sizes: Sequence[float] | None = None,
        prompt2: str | Sequence[str] | None = None,
        negative2: str | Sequence[str] | None = None,
        emphasis: str = "a1111",
        clip_skip: int = 0,
        regions: Sequence[Region] = (),
        **sampler_options: Any,
    ) -> "Run":
        """Draw one step at a time: `for progress in pipe.steps(...)`; the last one's `x` is the finished latent.

        prompt, negative   one text, or one a picture; or what `encode` made of texts
        steps, sampler, schedule, sampler_options   see `samplers.make_steps`; None is the model's own choice
        guidance           7.5 follows the prompt closely, 1 and less ignores `negative` and is twice as fast; or a `Guidance`
        seed               one number (picture i gets seed + i) or one a picture; a picture depends on its own alone
        count              pictures of every prompt
        size               (W, H) in pixels, multiples of 8; None is that of `image`, else the size the model was trained at
        noise              standard normal noise [b, c, h, w] to start from, in place of that of the seeds
        image              a picture to start from, or what the model looks at: an `image.Picture`, pixels [m, 3, H, W] in -1..1,
                           or latents; m is 1 or a picture each (see sdcore/tasks.py for this and the next five)
        strength           share of the way that is walked from it, 0 to 1; or that by place, [m, 1, H, W]
        mask, feather      what of it to paint (1, white) and what stays, [m, 1, H, W]; pixels inside the mask to pass over
        depth              how near things are [m, 1, H, W], for models that look at it
        noise_level        the upscaler: how much noise to put on the small picture, 0 to 350
        span               part of the way (begin, end) that is walked here; another model walks the rest
        control            ControlNets and T2I-Adapters, each with its picture, scale and part of the way
        image_prompts      pictures that act like words, through IP-Adapters
        guidance_rescale, guidance_interval   as in `Guidance`, where that is not given
        sizes, negative_sizes   XL: (original H, W, crop top, left, target H, W); None is (H, W, 0, 0, H, W). The refiner:
                           (original H, W, crop top, left, aesthetic score); None is a score of 6, negative 2.5
        prompt2, negative2   XL: what the second text encoder reads; None is the same as the first
        emphasis           how weights in the prompt act: a1111, no-norm, comfyui, compel; none takes brackets, AND and BREAK
                           literally and cuts off what does not fit a row of tokens, as diffusers does
        clip_skip          layers left out at the end of the text encoders, for both prompts; 1 is what A1111 calls clip skip 2
        regions            prompts for parts of the picture, beside the main one

        Adapters that a prompt asks for (`<lora:name:0.8>`) come from `adapters`, and stay attached until the next call.

        Raises at the call, before the first step, PromptError and ConfigError; in the loop NonFiniteError.
        """
        pictures = how_many(prompt, "prompt", count)
        guide = guidance if isinstance(guidance, Guidance) else Guidance(guidance, guidance_rescale, guidance_interval)
        if emphasis not in grammar.EMPHASIS:
            raise ConfigError(f"emphasis: expected one of {', '.join(grammar.EMPHASIS)}, found {emphasis!r:.80}")
        given = tasks.canvas(self, pictures, size, image, mask, depth, strength, feather)
        guide = tasks.guide_of(given, guide)
        imitated = None
        if self.unet.config.guidance_dim:  # guidance was distilled into it: it hears the scale, and answers once
            imitated = torch.tensor([guide.scale], dtype=torch.float32, device=self.device)
            guide = replace(guide, scale=1.0)
        way = tasks.walk(self, given, steps, sampler, schedule, span, sampler_options)
        guide.check(way)
        seeds = None if noise is not None else _seeds(seed, pictures)
        draw = Noise(seeds or _seeds(seed, pictures))
        begin = tasks.begin(self, given, way, draw, noise, noise_level, begun=span[0] > 0)

        reader = Reader(self, pictures, min(steps, len(way)), emphasis)
        voices = reader.positive(prompt, prompt2, count)
        if regions:
            voices = reader.placed(voices, regions, (begin.x.shape[-2], begin.x.shape[-1]))
        composed = len(voices) > 1
        self._take(reader.loras)
        refused = reader.negative(negative, negative2, count) * max(guide.before, int(composed))
        notices: list[str] = []
        told = self._tell([*refused, *voices], len(way), emphasis, clip_skip, notices)
        for notice in notices:
            log.warning(notice)
        scene = Scene(
            time_ids=self._time_ids(given.asked, sizes, negative_sizes, told[0].pooled, pictures * len(refused)),
            beside=begin.beside,
            labels=begin.labels,
            scale=imitated,
            controls=tasks.controls(self, given, pictures, control),
            image_prompts=tasks.prompts(self, image_prompts),
            negatives=pictures * len(refused),
            latent=(begin.x.shape[-2], begin.x.shape[-1]),
        )
        network = self._network(told, way, scene, pictures)
        denoise = denoiser(
            network,
            guidance=guide,
            shares=[voice.share for voice in voices] if composed else None,
            perturbed=network.perturbed() if guide.pag else None,
        )
        return Run(
            way,
            begin.x,
            denoise,
            draw,
            seeds,
            notices,
            lambda latents: tasks.finish(given, self.decode(latents, notices)),
            begin.edit,
        )

    # ------------------------------------------------------------------------------------------------ the stages

    @torch.no_grad()
    def encode(
        self,
        prompts: Sequence[str],
        notices: list[str] | None = None,
        *,
        prompts2: Sequence[str] | None = None,
        emphasis: str = "a1111",
        clip_skip: int = 0,
    ) -> Conditions:
        """Prompts -> what the UNet is told of them, to be given to the pipeline in the place of a prompt.

        The other arguments are those of `steps`. PromptError for prompts that are more than one text: schedules, AND, adapters.
        """
        reader = Reader(self, len(prompts), 1000, emphasis)
        voices = reader.positive(prompts, prompts2, 1)
        if len(voices) > 1 or len(set(voices[0].texts)) > 1 or reader.loras:
            raise PromptError(
                "prompt: with AND, schedules or <lora:...> it is more than one text to encode; draw with it instead"
            )
        conditions = self._tell(voices, 1, emphasis, clip_skip, [] if notices is None else notices)
        return conditions[0]

    @torch.no_grad()
    def encode_image(
        self, pixels: Tensor, draw: Noise | None = None, notices: list[str] | None = None, *, tiling: str | None = None
    ) -> Tensor:
        """Pixels [b, 3, H, W] in -1..1 -> latents [b, z, h, w] fp32, multiplied by the scaling factor.

        A draw from what the encoder says of each picture, or the middle of it where there is no `draw` to take noise from.
        `notices` and `tiling` as in `decode`.
        """
        self._place(self.vae)
        moments, notice = encode_safely(self.vae, pixels.to(self.device), tiling or self.tiling)
        self._say(notice, notices)
        z = moments.mean if draw is None else moments.sample(draw.draw(*moments.mean.shape[1:]).to(moments.mean))
        check_finite(z, f"the encoder, running in {_short(next(self.vae.parameters()).dtype)}")
        return z.float() * self.vae.config.scaling_factor

    @torch.no_grad()
    def decode(self, latents: Tensor, notices: list[str] | None = None, *, tiling: str | None = None) -> Tensor:
        """Latents [b, c, h, w] -> pixels [b, 3, H, W] fp32, about -1..1. One after the other, to spare memory.

        `tiling` is as the pipeline's own. A decoder that overflows half
        precision is run in fp32, which `notices` is told. Raises NonFiniteError, ConfigError.
        """
        self._place(self.vae)
        z = (latents / self.vae.config.scaling_factor).to(self.device)
        pixels, notice = decode_safely(self.vae, z, tiling or self.tiling)
        self._say(notice, notices)
        check_finite(pixels, f"the decoder, running in {_short(next(self.vae.parameters()).dtype)}")
        return pixels

    # ------------------------------------------------------------------------------------------------ what the UNet is told

    @torch.no_grad()
    def _tell(
        self, voices: Sequence[Voice], steps: int, emphasis: str, clip_skip: int, notices: list[str]
    ) -> list[Conditions]:
        """What the UNet is told in every step: all voices in one batch, one after the other.

        Every text is encoded once, and all in the same number of rows; steps that are told the same share one object.
        """
        forms = [
            tuple(voice.texts[i * len(voice.texts) // steps] for voice in voices if voice.texts) for i in range(steps)
        ]
        if len(set(forms)) > MAX_FORMS:
            raise PromptError(f"prompt: takes {len(set(forms))} forms over {steps} steps; at most {MAX_FORMS}")
        laid = {
            texts: self._lay(texts, emphasis, notices) for texts in dict.fromkeys(t for form in forms for t in form)
        }
        length = self.tokenizers[0].max_length
        rows = max([len(rows) for lines in laid.values() for line in lines for rows in line], default=1)
        given = {voice.given.context.shape[1] for voice in voices if voice.given is not None}
        rows = max([rows, *(math.ceil(tokens / length) for tokens in given)])
        if not laid and len(given) == 1:
            rows = 0  # no text whose length they must have, such as a picture's one vector
        encoded = {texts: self._encode(lines, rows, emphasis, clip_skip) for texts, lines in laid.items()}
        told = {}
        for form in dict.fromkeys(forms):
            texts = iter(form)
            said = [
                encoded[next(texts)] if v.given is None else self._lengthen(v.given, rows, clip_skip) for v in voices
            ]
            told[form] = reduce(
                Conditions.then, [zeroed(c, voice.zeros) for c, voice in zip(said, voices, strict=True)]
            )
        return [told[form] for form in forms]

    def _lay(self, texts: Texts, emphasis: str, notices: list[str]) -> list[list[list[grammar.Chunk]]]:
        """Texts -> rows of tokens: encoder by encoder, text by text."""
        laid = []
        for e, (tokenizer, encoder) in enumerate(zip(self.tokenizers, self.text_encoders, strict=True)):
            named = embeddings.numbers(self.embeddings, e, encoder.config.vocab)
            if emphasis == "none":
                cut = [grammar.cut(text, tokenizer, named) for text in texts[e]]
                notices += [
                    f"prompt: only {tokenizer.max_length - 2} tokens are read; left out: {dropped!r}"
                    for _, dropped in cut
                    if dropped
                ]
                laid.append([[row] for row, _ in cut])
            else:
                laid.append([grammar.chunk(grammar.weigh(text), tokenizer, named) for text in texts[e]])
        return laid

    def _encode(self, laid: list[list[list[grammar.Chunk]]], rows: int, emphasis: str, clip_skip: int) -> Conditions:
        """Rows of tokens -> conditions, every text filled up to `rows` rows.

        SD 1.x and 2.x read their encoder after the last layer. The XL family reads the layer before, all encoders side by
        side, and takes the pooled vector of the last one, of the first row. Source: Podell et al. 2023, section 2.1.
        """
        xl = bool(self.unet.config.added_dim)
        contexts, pooled = [], None
        for e, (tokenizer, encoder) in enumerate(zip(self.tokenizers, self.text_encoders, strict=True)):
            layers = encoder.config.layers
            if isinstance(clip_skip, bool) or not isinstance(clip_skip, int) or not 0 <= clip_skip < layers - xl:
                raise ConfigError(
                    f"clip_skip: expected a whole number from 0 to {layers - xl - 1} (layers left out), found {clip_skip!r}"
                )
            self._place(encoder)
            extra = embeddings.table(self.embeddings, e)
            extra = None if extra is None else extra.to(self.device)

            def read(ids: Tensor, encoder: CLIPText = encoder, extra: Tensor | None = extra) -> tuple[Tensor, Tensor]:
                out = self._read(encoder, ids.to(self.device), extra)
                return _layer(encoder, out, clip_skip, xl), out.pooled

            chunks = [row for line in laid[e] for row in grammar.filled(line, rows, tokenizer)]
            z, vectors = read(torch.tensor([row.ids for row in chunks]))
            z = grammar.emphasise(z, chunks, emphasis, lambda ids: read(ids)[0], tokenizer)  # noqa: B023 (called here)
            contexts.append(rearrange(z, "(b r) s d -> b (r s) d", r=rows))
            pooled = vectors[::rows] if xl else None
        context = torch.cat(contexts, dim=-1)
        check_finite(context, "the text encoder")
        return Conditions(context, pooled)

    # ------------------------------------------------------------------------------------------------ inside

    def _read(self, encoder: CLIPText, ids: Tensor, extra: Tensor | None) -> TextOutput:
        """What a text encoder says of tokens [n, s], with the table of embeddings of one's own."""
        return encoder(ids, extra)

    def _lengthen(self, given: Conditions, rows: int, clip_skip: int) -> Conditions:
        """Conditions from outside with as many rows as the others have: filled up with rows of no words. 0: as they are."""
        length = self.tokenizers[0].max_length
        if not rows or given.context.shape[1] == rows * length:
            return given
        if given.context.shape[1] % length:
            raise ConfigError(
                f"conditions: {given.context.shape[1]} tokens beside a text of {rows * length}; expected the same number, or a "
                f"multiple of {length}"
            )
        missing = rows - given.context.shape[1] // length
        empty = self._encode(self._lay((("",),) * len(self.tokenizers), "none", []), 1, "none", clip_skip).context
        filling = empty.repeat(len(given.context), missing, 1).to(given.context)
        return Conditions(torch.cat([given.context, filling], dim=1), given.pooled)

    def _take(self, wanted: Sequence[grammar.LoraTag]) -> None:
        """Attach those of `adapters` that the prompt asks for, and take the others off."""
        if not self.adapters and not wanted:
            return
        for tag in wanted:
            if tag.name not in self.adapters:
                raise PromptError(
                    f"prompt: <lora:{tag.name}>: no such adapter at hand; there are: {', '.join(self.adapters) or 'none'}; "
                    "put it into pipe.adapters (or attach it, and leave it out of the prompt)"
                )
        attached = lora.strengths(self)
        lora_names = [name for name in self.adapters if name in attached]
        if lora_names:
            lora.detach(self, *lora_names)
        for tag in wanted:
            adapter = self.adapters[tag.name]
            by_part = {part: tag.unet if part == "unet" else tag.text for part in adapter.parts}
            lora.attach(self, replace(adapter, name=tag.name), 1.0, by_part)

    def _network(self, told: Sequence[Conditions], way: Sequence[Step], scene: Scene, pictures: int) -> Network:
        """The UNet told of everything but the latent."""
        return Network(self.unet, told, way, scene, pictures, self._place)

    def _time_ids(
        self,
        asked: tuple[int, int],
        sizes: Sequence[float] | None,
        negative_sizes: Sequence[float] | None,
        pooled: Tensor | None,
        negatives: int,
    ) -> Tensor | None:
        """The numbers that an XL model hears of the picture's size [r, 6], those of the `negatives` negative rows first."""
        config = self.unet.config
        if pooled is None:
            return None
        expected = (config.added_dim - pooled.shape[-1]) // config.added_time_dim
        W, H = asked
        usual = (H, W, 0, 0, H, W) if expected == 6 else (H, W, 0, 0, AESTHETIC)
        positive = tuple(sizes or usual)
        negative = tuple(negative_sizes or (positive if expected == 6 else (*positive[:-1], NOT_AESTHETIC)))
        for name, found in (("sizes", positive), ("negative_sizes", negative)):
            if len(found) != expected:
                raise ConfigError(
                    f"{name}: this {self.family} model hears {expected} numbers, found {len(found)}: {found}"
                )
        rows = [negative] * negatives + [positive] * (len(pooled) - negatives)
        return torch.tensor(rows, dtype=torch.float32, device=self.device)

    def full_size(self, size: tuple[int, int] | None) -> tuple[int, int]:
        """(W, H) in pixels of a picture drawn from nothing, checked; None is the size that the model was trained at."""
        factor = self.vae.config.factor
        if size is None:
            return (self.unet.config.sample_size * factor,) * 2
        if (
            not isinstance(size, Sequence)
            or len(size) != 2
            or not all(isinstance(side, int) and not isinstance(side, bool) for side in size)
        ):
            raise ConfigError(f"size: expected two whole numbers (width, height), found {size!r}")
        self.check_sides((size[0], size[1]), factor)
        return size[0], size[1]

    def check_sides(self, size: tuple[int, int], factor: int) -> None:
        """ConfigError where a side is too long, too short, or no multiple of `factor`."""
        least = self.vae.config.factor
        for side in size:
            if side % factor or not least <= side <= MAX_SIDE:
                low = min(max(side // factor * factor, least), MAX_SIDE)
                near = sorted({low, min(low + factor, MAX_SIDE)})
                raise ConfigError(
                    f"size: {size[0]}x{size[1]} has a side of {side}; sides are multiples of {factor} from {least} to "
                    f"{MAX_SIDE}, the nearest {' or '.join(map(str, near))}"
                )

    def _say(self, notice: str, notices: list[str] | None) -> None:
        """Tell the user something, if there is something to tell."""
        if notice:
            log.warning(notice)
            if notices is not None:
                notices.append(notice)

    def _place(self, *parts: nn.Module) -> None:
        """With `offload`: bring the parts that work next to the device, and all others home to the CPU."""
        if not self.offload:
            return
        for other in [self.unet, self.vae, *self.text_encoders]:
            if other not in parts:
                other.to("cpu")
        for part in parts:
            part.to(self.device)


def check_finite(x: Tensor, stage: str) -> None:
    """Raise NonFiniteError, naming the stage, rather than go on to a black picture."""
    if not torch.isfinite(x).all():
        raise NonFiniteError(
            f"NaN or infinity out of {stage}: half precision overflowed or a weight file is damaged; "
            "try dtype float32, and `sdcore inspect` on the model"
        )


def _layer(encoder: CLIPText, out: TextOutput, clip_skip: int, xl: bool) -> Tensor:
    """The layer of a text encoder that the family reads, or one so many before it [b, s, d]."""
    if xl:
        return out.states[-2 - clip_skip]
    return encoder.text_model.final_layer_norm(out.states[-1 - clip_skip]) if clip_skip else out.last


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
