"""Guidance: from a network and its conditions to `denoise(x, step) -> x0`, the one function that samplers ask for.

A network predicts noise (epsilon), velocity (v) or the clean latent for a *given* text. Classifier-free guidance
(2207.12598) asks it twice, with the prompt and with the negative prompt, and extrapolates from the second answer
beyond the first:

    output = negative + scale * (positive - negative)

All answers come out of one batch, the negative half first. What else can be done with two answers, or with a third one, is
`Guidance`: each of its fields is one paper.

A picture may have several prompts at once, joined by AND or each with a region of its own. Then there are p positive answers,
and what stands for "the positive one" above is their sum with shares, measured from the negative answer (2206.01714, eq. 11):

    positive = negative + sum_k share_k * (answer_k - negative)

b images, p prompts an image, x [b, c, h, w].
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sdcore.errors import ConfigError
from sdcore.samplers import Step, memory
from sdcore.scheduler import check_share

# (network input [n, c, h, w], step) -> output [n, c, h, w]; n is b, or 2b with the b negative conditions first, or with several
# prompts an image (1 + p) b: the negative conditions, then prompt by prompt. With a guidance towards a picture b more come before
# all others: nothing at all. The conditions are the caller's to hold: a closure over them, and over what was computed once per
# image or once per step (index step.i).
Network = Callable[[Tensor, Step], Tensor]


@dataclass(frozen=True)
class Guidance:
    """How the answers are mixed. `Guidance(7.5)` is plain classifier-free guidance, and the number 7.5 means the same.

    scale      1 and below: off, and the batch is not doubled (as diffusers)
    rescale    share of the way by which the guided output is brought back to the positive one's standard deviation (`rescaled`)
    interval   sigmas (low, high): guidance acts only at noise levels low <= sigma <= high (2404.07724: at very high noise it
               costs variety, at very low noise it does nothing but cost time)
    image      instruct-pix2pix: a second scale, by which the negative answer is extrapolated beyond one that was shown neither
               text nor picture (2211.09800, eq. 3):
               output = nothing + image * (negative - nothing) + scale * (positive - negative)
    pag        perturbed-attention guidance: scale of positive - perturbed, the answer of a network whose self-attentions in the
               middle look at nothing but themselves (2403.17377, eq. 16); acts with any `scale`
    apg        adaptive projected guidance: of positive - negative, as clean latents, only what is at right angles to the positive
               one counts, which does not oversaturate; its norm, a picture's, is cut to `apg` (15 for XL, `math.inf`: not cut).
               Without the paper's momentum, which would need a memory between steps (2410.02416, algorithm 1, eta = 0)
    plus_plus  CFG++: `scale`, now between 0 and 1, acts on x0 alone, and the noise put back is the negative answer's
               (2406.08070, algorithm 2): see `at`

    Raises ConfigError for values outside their range, and for `apg` or `plus_plus` beside anything but scale and interval.
    """

    scale: float = 7.5
    rescale: float = 0.0
    interval: tuple[float, float] = (0.0, math.inf)
    image: float | None = None
    pag: float = 0.0
    apg: float | None = None
    plus_plus: bool = False

    def __post_init__(self) -> None:
        low, high = self.interval
        check_share("guidance rescale", self.rescale)
        if not 0 <= low <= high:
            raise ConfigError(f"a guidance interval must satisfy 0 <= low <= high (sigmas), found {self.interval}")
        if isinstance(self.scale, bool) or not isinstance(self.scale, (int, float)) or not math.isfinite(self.scale):
            raise ConfigError(f"guidance: expected a finite number such as 7.5, found {self.scale!r}")
        if self.image is not None and not 1 <= self.image < math.inf:
            raise ConfigError(f"image guidance: expected a finite number from 1 (off), such as 1.5, found {self.image}")
        if not 0 <= self.pag < math.inf:
            raise ConfigError(f"pag: expected a finite number from 0 (off), such as 3, found {self.pag}")
        if self.apg is not None and not self.apg > 0:
            raise ConfigError(f"apg: expected the largest norm of a difference, above 0, found {self.apg}")
        others = bool(self.rescale) or self.image is not None or bool(self.pag)
        if (self.apg is not None) + self.plus_plus + others > 1:
            raise ConfigError("apg and plus_plus each go with scale and interval alone: leave the other fields out")

    @property
    def before(self) -> int:
        """How many answers it needs beside the positive ones: none, the negative one, or that and the one to nothing at all."""
        return (1 + (self.image is not None)) if self.scale > 1 or self.plus_plus else 0

    def inside(self, step: Step) -> bool:
        """Whether the step lies in the interval."""
        low, high = self.interval
        return low <= step.sigma <= high

    def at(self, step: Step) -> float:
        """The scale in this step.

        CFG++ moves to signal' x0_guided + noise' eps_negative where a sampler of one look moves to a x + b x0, with eps = (x -
        signal x0) / noise; so b = signal' - a signal, and the move is the sampler's own along negative + (scale signal' / b)
        (positive - negative): the same guidance with a scale that falls from step to step.
        """
        if not self.plus_plus or not step.weights[0][1]:
            return self.scale
        a, b = step.weights[0]
        return self.scale * (b + a * step.signal) / b

    def check(self, steps: Sequence[Step]) -> None:
        """Raises ConfigError where CFG++ is not defined: for samplers that look back, or do not put noise back as ddim does."""
        moves = zip(steps, steps[1:], strict=False)
        if self.plus_plus and not (
            memory(steps) == 0
            and all(math.isclose(s.weights[0][1] + s.weights[0][0] * s.signal, end.signal) for s, end in moves)
        ):
            raise ConfigError(
                "plus_plus: only with ddpm, ddim, euler, euler_a and tcd; choose one of them as the sampler"
            )


@dataclass(frozen=True)
class Denoiser:
    """`denoise(x, step) -> x0`, with what it is made of in plain sight. Made by `denoiser`, which says what the fields mean."""

    network: Network
    guide: Guidance
    shares: Sequence[float | Tensor] | None = None
    perturbed: Network | None = None

    @property
    def plain(self) -> bool:
        """Whether output = negative + scale * (positive - negative), one scale in all steps, is all there is to it."""
        return self.shares is None and self.guide == Guidance(self.guide.scale, interval=self.guide.interval)

    def guided(self, step: Step) -> bool:
        """Whether there is a negative answer in this step."""
        return self.guide.before > 0 and self.guide.inside(step)

    def __call__(self, x: Tensor, step: Step) -> Tensor:
        entry, guide, guided = x * step.input_scale, self.guide, self.guided(step)
        voices = 1 if self.shares is None else len(self.shares)
        rows = voices + (guide.before if guided else int(self.shares is not None))
        answers = self.network(torch.cat([entry] * rows), step).to(x.dtype).chunk(rows)
        negative, positive = answers[max(rows - voices - 1, 0)], answers[-1]
        if self.shares is not None:
            positive = composed(negative, answers[-voices:], self.shares)
        if guided and guide.apg is not None:
            clean = to_x0(x, positive, step)
            return clean + (guide.scale - 1) * orthogonal((positive - negative) * step.x0_from_out, clean, guide.apg)
        output = positive
        if guided:
            start = negative if guide.image is None else answers[0] + guide.image * (negative - answers[0])
            output = start + guide.at(step) * (positive - negative)
        if self.perturbed and guide.inside(step):
            output = output + guide.pag * (positive - self.perturbed(entry, step).to(x.dtype))
        if guide.rescale and output is not positive:
            output = rescaled(output, positive, guide.rescale)
        return to_x0(x, output, step)


def denoiser(
    network: Network,
    *,
    guidance: float | Guidance = 1.0,
    shares: Sequence[float | Tensor] | None = None,
    perturbed: Network | None = None,
) -> Denoiser:
    """Turns a network into `denoise(x, step) -> x0`.

    network    called with a batch of 2b (negative conditions first) while guidance acts, and of b (the positive ones) where it
               does not: it looks at the size of its batch
    guidance   a scale, or a `Guidance`
    shares     with several prompts an image, the share of each: a number, or what multiplies [b, c, h, w] (an image's own number
               [b, 1, 1, 1], a region [1, 1, h, w]). They are composed in every step, guided or not, so the batch is (1 + p) b
    perturbed  for `Guidance.pag`: the network with its self-attentions perturbed (`variants.perturbed`), asked of the positive
               conditions alone

    The arithmetic after the network runs in x's dtype. Raises ConfigError for values outside their range.
    """
    guide = guidance if isinstance(guidance, Guidance) else Guidance(guidance)
    if guide.pag and shares is not None:
        raise ConfigError("pag: one prompt a picture, found several (AND, regions); leave one of the two out")
    if guide.pag and perturbed is None:
        raise ConfigError("pag: needs a second network; pass perturbed=")
    return Denoiser(network, guide, shares, perturbed if guide.pag else None)


def composed(negative: Tensor, answers: Sequence[Tensor], shares: Sequence[float | Tensor]) -> Tensor:
    """One answer [b, c, h, w] out of one for every prompt. Source: Liu et al. 2022 (2206.01714), equation 11."""
    return negative + sum(share * (answer - negative) for share, answer in zip(shares, answers, strict=True))


def to_x0(x: Tensor, output: Tensor, step: Step) -> Tensor:
    """The clean latent that the network's output (epsilon, v or x0) amounts to."""
    part = output * step.x0_from_out
    return x * step.x0_from_x + part if step.x0_from_x else part


def rescaled(guided: Tensor, positive: Tensor, share: float) -> Tensor:
    """Guidance makes outputs too wide, hence pictures overexposed: brings each image's standard deviation back to
    that of the positive output, `share` of the way. Source: Lin et al. (2305.08891) eq. 15 and 16."""
    axes = tuple(range(1, guided.ndim))
    narrow = guided * (positive.std(dim=axes, keepdim=True) / guided.std(dim=axes, keepdim=True))
    return share * narrow + (1 - share) * guided


def orthogonal(difference: Tensor, clean: Tensor, longest: float) -> Tensor:
    """The part of each image's `difference`, cut to a norm of `longest`, that is at right angles to `clean`: what lies along it
    only makes the picture more contrasty. Source: Sadat et al. (2410.02416), section 4."""
    axes = tuple(range(1, difference.ndim))
    norm = difference.square().sum(dim=axes, keepdim=True).sqrt()
    cut = difference * (longest / norm.clamp(min=1e-30)).clamp(max=1)
    share = (cut * clean).sum(dim=axes, keepdim=True) / clean.square().sum(dim=axes, keepdim=True).clamp(min=1e-30)
    return cut - share * clean
