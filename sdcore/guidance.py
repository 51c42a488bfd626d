"""Guidance: from a network and its conditions to `denoise(x, step) -> x0`, the one function that samplers ask for.

A network predicts noise (epsilon), velocity (v) or the clean latent for a *given* text. Classifier-free guidance
(2207.12598) asks it twice, with the prompt and with the negative prompt, and extrapolates from the second answer
beyond the first:

    output = negative + guidance * (positive - negative)

Both answers come out of one batch of twice the size, the negative half first.

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
from sdcore.samplers import Step
from sdcore.scheduler import check_share

# (network input [n, c, h, w], step) -> output [n, c, h, w]; n is b, or 2b with the b negative conditions first, or with several
# prompts an image (1 + p) b: the negative conditions, then prompt by prompt. The conditions
# are the caller's to hold: a closure over them, and over what was computed once per image or once per step (index step.i).
Network = Callable[[Tensor, Step], Tensor]


@dataclass(frozen=True)
class Denoiser:
    """`denoise(x, step) -> x0`, with what it is made of in plain sight. Made by `denoiser`, which says what the fields mean."""

    network: Network
    guidance: float
    rescale: float
    interval: tuple[float, float]
    shares: Sequence[float | Tensor] | None

    def guided(self, step: Step) -> bool:
        """Whether guidance acts in this step."""
        low, high = self.interval
        return self.guidance > 1 and low <= step.sigma <= high

    def __call__(self, x: Tensor, step: Step) -> Tensor:
        entry = x * step.input_scale
        guided = self.guided(step)
        if self.shares is not None:
            prompts = 1 + len(self.shares)
            negative, *answers = self.network(torch.cat([entry] * prompts), step).to(x.dtype).chunk(prompts)
            wanted = composed(negative, answers, self.shares)
        elif guided:
            negative, wanted = self.network(torch.cat([entry, entry]), step).to(x.dtype).chunk(2)
        else:
            wanted = self.network(entry, step).to(x.dtype)
        output = wanted
        if guided:
            output = negative + self.guidance * (wanted - negative)
            if self.rescale:
                output = rescaled(output, wanted, self.rescale)
        return to_x0(x, output, step)


def denoiser(
    network: Network,
    *,
    guidance: float = 1.0,
    rescale: float = 0.0,
    interval: tuple[float, float] = (0.0, math.inf),
    shares: Sequence[float | Tensor] | None = None,
) -> Denoiser:
    """Turns a network into `denoise(x, step) -> x0`.

    network   called with a batch of 2b (negative conditions first) while guidance acts, and of b (the positive ones) where it
              does not: it looks at the size of its batch
    guidance  1 and below: off, and the batch is not doubled (as diffusers)
    rescale   share of the way by which the guided output is brought back to the positive one's standard deviation: see `rescaled`
    interval  sigmas (low, high): guidance acts only at noise levels low <= sigma <= high (2404.07724: at very high noise it costs
              variety, at very low noise it does nothing but cost time)
    shares    with several prompts an image, the share of each: a number, or what multiplies [b, c, h, w] (an image's own number
              [b, 1, 1, 1], a region [1, 1, h, w]). They are composed in every step, guided or not, so the batch is (1 + p) b

    The arithmetic after the network runs in x's dtype. Raises ConfigError for values outside their range.
    """
    low, high = interval
    check_share("guidance rescale", rescale)
    if not 0 <= low <= high:
        raise ConfigError(f"a guidance interval must satisfy 0 <= low <= high (sigmas), found {interval}")
    return Denoiser(network, guidance, rescale, interval, shares)


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
