"""Voices: what the prompts of one call come to, before any of it is encoded.

A call of the pipeline may bring one text or one a picture, for one text encoder or for two, joined by AND, changing by step, in
regions, or conditions that are encoded already. `Reader` takes that apart into voices: a `Voice` is one prompt that every picture
of the call follows, with the share that it has in the answer and its texts, step by step. Most calls have one. The grammar is
prompt.py's; what a voice's texts come to is encoded by the pipeline; how answers are mixed by shares is guidance.py's.

Legend: b pictures, k text tokens, d text width, p width of the pooled vector, h w latent height and width.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from sdcore import prompt as grammar
from sdcore.errors import ConfigError, PromptError

if TYPE_CHECKING:
    from sdcore.pipeline import Pipeline


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


class Region(NamedTuple):
    """A prompt that holds in a part of the picture."""

    prompt: str | Sequence[str]  # for all pictures, or one each
    mask: Tensor  # [any height, any width], 0..1: where it holds; where regions overlap they share, the rest is the main prompt's


Texts = tuple[tuple[str, ...], ...]  # text encoder by text encoder, b texts each


class Voice(NamedTuple):
    """One of the prompts that the pictures follow at the same time, for all b of them."""

    share: float | Tensor  # see `guidance.denoiser`
    texts: list[Texts]  # one a step; empty where the conditions are given
    given: Conditions | None = None
    zeros: tuple[bool, ...] = ()  # pictures whose conditions are zeros


class Reader:
    """Takes the prompts of one call apart: into voices, by text encoder, picture and step."""

    def __init__(self, pipe: "Pipeline", pictures: int, steps: int, emphasis: str):
        self.pipe, self.pictures, self.steps, self.literal = pipe, pictures, steps, emphasis == "none"
        self.loras: list[grammar.LoraTag] = []

    def positive(self, prompt: str | Sequence[str] | Conditions, prompt2: Any, count: int) -> list[Voice]:
        """What the pictures shall show: one voice for each part that AND joins."""
        if isinstance(prompt, Conditions):
            return [self.given(prompt, prompt2, "prompt", count)]
        voices, loras = self.read(self.lines(prompt, prompt2, "prompt", count), compose=True)
        self.loras = loras
        return voices

    def negative(self, negative: str | Sequence[str] | Conditions, negative2: Any, count: int) -> list[Voice]:
        """What they shall not show: one voice. On SDXL base an empty text is zeros."""
        if isinstance(negative, Conditions):
            return [self.given(negative, negative2, "negative", count)]
        lines = self.lines(negative, negative2, "negative", self.pictures if isinstance(negative, str) else count)
        voices, loras = self.read(lines, compose=False)
        if loras:
            raise PromptError(
                f"negative: <lora:{loras[0].name}>: an adapter acts on the whole picture; name it in the prompt"
            )
        zeros = tuple(self.pipe.zero_negative and not any(texts) for texts in zip(*lines, strict=True))
        return [voices[0]._replace(zeros=zeros if any(zeros) else ())]

    def placed(self, voices: list[Voice], regions: Sequence[Region], latent: tuple[int, int]) -> list[Voice]:
        """The voices of regions beside those of the main prompt, each with its share of every place [1, 1, h, w]."""
        masks = []
        for region in regions:
            mask = region.mask
            if (
                not isinstance(mask, Tensor)
                or mask.ndim != 2
                or not mask.numel()
                or not 0 <= mask.min() <= mask.max() <= 1
            ):
                found = f"{list(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
                raise ConfigError(f"regions: expected a mask [height, width] of numbers from 0 to 1, found {found}")
            masks.append(F.interpolate(mask[None, None].to(self.pipe.device, torch.float32), size=latent, mode="area"))
        claimed = torch.stack(masks).sum(0)
        shared = [(1 - claimed).clamp(min=0), *[mask / claimed.clamp(min=1) for mask in masks]]
        placed = [voice._replace(share=voice.share * shared[0]) for voice in voices]
        for region, share in zip(regions, shared[1:], strict=True):
            repeat = self.pictures if isinstance(region.prompt, str) else 1
            mine, loras = self.read(self.lines(region.prompt, None, "regions", repeat), compose=True)
            if loras:
                raise PromptError(
                    f"regions: <lora:{loras[0].name}>: an adapter acts on the whole picture; name it in the prompt"
                )
            placed += [voice._replace(share=voice.share * share) for voice in mine]
        return placed

    def lines(
        self, text: str | Sequence[str], text2: str | Sequence[str] | None, name: str, count: int
    ) -> list[list[str]]:
        """Encoder by encoder, a text for every picture."""
        first = texts_of(text, name, count)
        if text2 is None:
            lines = [first] * len(self.pipe.text_encoders)
        elif len(self.pipe.text_encoders) == 2:
            lines = [first, texts_of(text2, f"{name}2", self.pictures if isinstance(text2, str) else count)]
        else:
            raise ConfigError(f"{name}2: this {self.pipe.family} model has one text encoder; leave it out")
        for line, which in zip(lines, (name, f"{name}2"), strict=False):
            if len(line) != self.pictures:
                raise ConfigError(f"{which}: expected one text, or one a prompt ({self.pictures}), found {len(line)}")
        return lines

    def given(self, conditions: Conditions, text2: Any, name: str, count: int) -> Voice:
        """Conditions from outside, checked."""
        width, added = self.pipe.unet.config.context_dim, bool(self.pipe.unet.config.added_dim)
        context, pooled = conditions
        if text2 is not None:
            raise ConfigError(f"{name}2: has no meaning beside conditions that are encoded already")
        if context.ndim != 3 or context.shape[-1] != width or (pooled is not None) != added:
            raise ConfigError(
                f"{name}: expected conditions [b, tokens, {width}]{' and a pooled vector' if added else ' alone'}, found "
                f"{list(context.shape)}{'' if pooled is None else ' and a pooled vector'}"
            )
        context = context.to(self.pipe.device)
        if len(context) != self.pictures:
            context = context.repeat_interleave(count if len(context) > 1 else self.pictures, dim=0)
        if len(context) != self.pictures:
            raise ConfigError(
                f"{name}: expected conditions for {self.pictures} pictures, found {len(conditions.context)}"
            )
        if pooled is not None:
            pooled = pooled.to(self.pipe.device).repeat_interleave(len(context) // len(pooled), dim=0)
        return Voice(1.0, [], Conditions(context, pooled))

    def read(self, lines: list[list[str]], compose: bool) -> tuple[list[Voice], list[grammar.LoraTag]]:
        """Texts -> voices, and the adapters that they ask for."""
        if self.literal:
            for text in (text for line in lines for text in line):
                grammar.check(text)
            return [Voice(1.0, [tuple(map(tuple, lines))])], []
        read = {text: grammar.parse(text, self.steps, compose) for line in lines for text in line}
        prompts = [[read[text] for text in line] for line in lines]  # encoder by encoder, picture by picture
        tags = [
            tuple(dict.fromkeys(tag for one in of_picture for tag in one.loras))
            for of_picture in zip(*prompts, strict=True)
        ]
        if len(set(tags)) > 1:
            raise PromptError(
                "prompt: adapters act on all pictures of a call; give every prompt the same <lora:...>, or call twice"
            )
        if any(len({len(one.parts) for one in of_picture}) > 1 for of_picture in zip(*prompts, strict=True)):
            raise PromptError("prompt2: expected as many prompts joined by AND as the first one has")
        voices = []
        for part in range(max(len(one.parts) for one in prompts[0])):
            # A picture with fewer prompts than its neighbours says its first one again, without a share.
            weights = [one.parts[part].weight if part < len(one.parts) else 0.0 for one in prompts[0]]
            parts = [[one.parts[part if part < len(one.parts) else 0] for one in line] for line in prompts]
            texts = [tuple(tuple(p.texts[i] for p in line) for line in parts) for i in range(self.steps)]
            share = (
                weights[0]
                if len(set(weights)) == 1
                else torch.tensor(weights, device=self.pipe.device)[:, None, None, None]
            )
            voices.append(Voice(share, texts))
        return voices, list(tags[0])


def zeroed(conditions: Conditions, zeros: Sequence[bool]) -> Conditions:
    """Zeros in the place of some pictures' conditions."""
    if not zeros:
        return conditions
    mask = torch.tensor(zeros, device=conditions.context.device)
    pooled = None if conditions.pooled is None else conditions.pooled.masked_fill(mask[:, None], 0)
    return Conditions(conditions.context.masked_fill(mask[:, None, None], 0), pooled)


def how_many(prompt: str | Sequence[str] | Conditions, name: str, count: int) -> int:
    """How many pictures a call draws."""
    if isinstance(prompt, Conditions):
        return len(texts_of("", name, count)) * len(prompt.context)
    return len(texts_of(prompt, name, count))


def texts_of(text: str | Sequence[str], name: str, count: int) -> list[str]:
    """One text or several -> a list, each `count` times."""
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise ConfigError(f"count: expected a whole number from 1, found {count!r}")
    texts = [text] if isinstance(text, str) else text
    if not isinstance(texts, Sequence) or not texts or not all(isinstance(t, str) for t in texts):
        raise PromptError(f"{name}: expected a text, or a list of texts that is not empty, found {text!r}"[:300])
    return [t for t in texts for _ in range(count)]
