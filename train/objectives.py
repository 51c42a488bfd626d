"""What a diffusion model is asked to predict, and how its error is weighed: each choice one small function.

    x_t = noised(x0, noise, a)                  a: alpha_bar of each example's timestep
    wanted = target("v_prediction", x0, noise, a)
    each = huber(network(x_t, t), wanted, delta) or squared(...)
    loss = (each * min_snr("v_prediction", a, 5)) averaged over what the mask shows: `average`

`ObjectiveOptions` are these choices as options of a method, `prepare` draws what an example needs from its own random stream,
`weigh` turns a prediction into the loss. Timesteps are drawn for a whole batch at once (`timesteps`), so that the strata spread
over it, however the batch is then cut into passes and processes.

snr = a / (1 - a). An error of v is 1 / sqrt(1 - a) times that of x0 and one of epsilon sqrt(snr) times it, so the same weight
w of the clean latent's squared error is w / snr on epsilon, w / (snr + 1) on v, w on x0; min-SNR is w = min(snr, gamma).

Source: Ho et al. 2020, equation 4 (noising); Salimans & Ho 2022, appendix D (v); Hang et al. 2023, section 3.4 (min-SNR);
Lin et al. 2023 (zero terminal SNR: `scheduler.zero_terminal_snr`, chosen by `--zero-snr`); Guttenberg 2023 (noise offset); Ning
et al. 2023, algorithm 1 (input perturbation); Khrapov et al. 2024, section 3 (scheduled pseudo-Huber); Esser et al. 2024,
equation 19 (logit-normal timesteps).
Legend: b examples, c channels, h w latent size; a [b] or anything that broadcasts.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from sdcore.errors import ConfigError
from sdcore.scheduler import PREDICTIONS, SchedulerConfig

from .options import option

DRAWS = ("uniform", "strata", "logit-normal")
HUBERS = ("constant", "exponential", "snr")


@dataclass(frozen=True)
class ObjectiveOptions:
    """What is predicted and how errors are weighed."""

    prediction: str | None = option(
        None, "epsilon, v_prediction or sample; what the model predicts, where it is not given"
    )
    zero_snr: bool = option(False, "rescale the noise levels so that the last one is pure noise (not with epsilon)")
    min_snr: float = option(0.0, "gamma of min-SNR weights, usually 5; 0: every timestep counts the same")
    noise_offset: float = option(0.0, "noise common to all places of a channel, which teaches brightness; 0.1 is usual")
    perturbation: float = option(0.0, "more noise in the input than in the target, which teaches to mend; 0.1 is usual")
    huber: float = option(
        0.0, "pseudo-Huber error instead of the squared one: where the parabola ends, 0.1 is usual; 0: squared"
    )
    huber_schedule: str = option("snr", "how that place moves with the noise: constant, exponential or snr")
    draw: str = option(
        "strata",
        "how timesteps are drawn: uniform, strata (uniform, spread over the batch), logit-normal (also spread)",
    )
    range: tuple[float, float] = option(
        (0.0, 1.0), "share of the timesteps that is trained: 0 the cleanest, 1 the noisiest"
    )


def check(options: ObjectiveOptions, scheduler: SchedulerConfig) -> None:
    """ConfigError where a choice does not exist, is out of range, or does not go with another."""
    for name, value, known in (
        ("prediction", options.prediction or scheduler.prediction_type, PREDICTIONS),
        ("draw", options.draw, DRAWS), ("huber-schedule", options.huber_schedule, HUBERS),
    ):  # fmt: skip
        if value not in known:
            raise ConfigError(f"--{name}: expected one of {', '.join(known)}, found {value!r}")
    for name in ("min_snr", "noise_offset", "perturbation", "huber"):
        if not 0 <= getattr(options, name) < float("inf"):
            raise ConfigError(
                f"--{name.replace('_', '-')}: expected a number from 0 up, found {getattr(options, name)}"
            )
    if len(options.range) != 2 or not 0 <= options.range[0] < options.range[1] <= 1:
        raise ConfigError(f"--range: expected two shares in order such as 0,0.5, found {options.range}")
    if (options.zero_snr or scheduler.zero_snr) and (options.prediction or scheduler.prediction_type) == "epsilon":
        raise ConfigError(
            "--zero-snr: epsilon says nothing of the picture where there is only noise; use --prediction v_prediction"
        )


# -------------------------------------------------------------------------------------------------- the noise, and what is wanted


def noised(x0: Tensor, noise: Tensor, a: Tensor) -> Tensor:
    """x_t = sqrt(a) x0 + sqrt(1 - a) noise, for latents [b, c, h, w] and a [b]."""
    a = _like(a, x0)
    return a.sqrt() * x0 + (1 - a).sqrt() * noise


def target(prediction: str, x0: Tensor, noise: Tensor, a: Tensor) -> Tensor:
    """What the network is to say: the noise (epsilon), the clean latent (sample), or v = sqrt(a) noise - sqrt(1 - a) x0."""
    a = _like(a, x0)
    return (
        {"epsilon": noise, "sample": x0}[prediction]
        if prediction != "v_prediction"
        else a.sqrt() * noise - (1 - a).sqrt() * x0
    )


def offset(noise: Tensor, common: Tensor, strength: float) -> Tensor:
    """Noise [b, c, h, w] plus strength times `common` [b, c, 1, 1]. The sum *is* the noise: of the input and of the target."""
    return noise + strength * common


def perturbed(noise: Tensor, more: Tensor, strength: float) -> Tensor:
    """The noise of the input alone: the target keeps `noise`."""
    return noise + strength * more


# ------------------------------------------------------------------------------------------------------------------- weights


def min_snr(prediction: str, a: Tensor, gamma: float) -> Tensor:
    """Weights [b] of the squared error such that the clean latent's error counts min(snr, gamma).

    epsilon min(snr, gamma) / snr, v min(snr, gamma) / (snr + 1), x0 min(snr, gamma). Written in a alone, so that pure noise
    (a = 0: epsilon 1, v 0, x0 0) and no noise (a = 1: epsilon 0, v 0, x0 gamma) come out without dividing by zero.
    """
    if prediction == "sample":
        return torch.where(
            a > gamma * (1 - a), gamma * torch.ones_like(a), a / (1 - a).clamp(min=torch.finfo(a.dtype).tiny)
        )
    if prediction == "v_prediction":
        return torch.minimum(a, gamma * (1 - a))  # times (1 - a): 1 / (snr + 1)
    return (gamma * (1 - a) / a.clamp(min=torch.finfo(a.dtype).tiny)).clamp(max=1.0)


def capped_v(a: Tensor, gamma: float) -> Tensor:
    """Weights of the squared error of v such that the clean latent's error counts min(snr + 1, gamma).

    Min-SNR silences the noisiest timesteps of v, the ones where the text decides what appears; this does not.
    """
    return (gamma * (1 - a)).clamp(max=1.0)  # 1 / (snr + 1) is 1 - a


def huber_delta(delta: float, schedule: str, a: Tensor, t: Tensor, steps: int) -> Tensor:
    """Where the parabola of the pseudo-Huber error ends [b]: from 1 (clean) down to `delta` (all noise), or `delta` throughout.

    exponential: delta^(t / steps); snr: delta + (1 - delta) / (1 + sigma)^2, sigma = sqrt((1 - a) / a).
    """
    if schedule == "constant":
        return torch.full_like(a, delta)
    if schedule == "exponential":
        return delta ** (t.to(a.dtype) / steps)
    root, rest = a.sqrt(), (1 - a).sqrt()
    return delta + (1 - delta) * (root / (root + rest)) ** 2  # 1 / (1 + sigma), without dividing by a


# ------------------------------------------------------------------------------------------------------------------ the error


def squared(found: Tensor, wanted: Tensor) -> Tensor:
    """Squared error at every place [b, c, h, w]."""
    return (found - wanted).square()


def huber(found: Tensor, wanted: Tensor, delta: Tensor) -> Tensor:
    """Pseudo-Huber error 2 d (sqrt(e^2 + d^2) - d), delta [b]: e^2 where e is much below d, 2 d |e| far above."""
    d = _like(delta, found)
    return 2 * d * (((found - wanted).square() + d**2).sqrt() - d)


def average(error: Tensor, weights: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(loss, count): the weighted error over all that counts, and how many examples' worth of places that was.

    error [b, c, h, w], weights [b] (of timesteps; they scale the loss, not the count), mask [b, 1, h, w] in 0..1. Every place
    that the mask shows counts the same, whichever example it is of: sum(mask * weight * error) / sum(mask), so batches whose
    losses are averaged *by their counts* give the loss of all of them together. A mask that shows nothing counts 0.
    """
    each = weights.view(-1, 1, 1, 1) * error
    if mask is None:
        return each.mean(), torch.tensor(float(len(error)))
    count = mask.mean(dim=(1, 2, 3)).sum()
    return (each * mask).mean(dim=(1, 2, 3)).sum() / count.clamp(min=1e-12), count.detach().cpu().float()


# --------------------------------------------------------------------------------------------------------------- timesteps


def uniform(count: int, of: int, rng: torch.Generator, spread: bool) -> Tensor:
    """`count` timesteps in 0..of-1, each as likely as any; `spread`: one in each of `count` equal stretches, in random order."""
    if not spread:
        return torch.randint(of, (count,), generator=rng)
    chance = (torch.arange(count) + torch.rand(count, generator=rng, dtype=torch.float64)) / count
    return (chance * of).long().clamp(max=of - 1)[torch.randperm(count, generator=rng)]


def logit_normal(count: int, of: int, rng: torch.Generator, middle: float = 0.0, width: float = 1.0) -> Tensor:
    """`count` timesteps in 0..of-1 from a logit-normal distribution, one of every stretch of equal chance, in random order.

    The logit of t / of has this mean and deviation: most of the work goes to the middle of the way.
    """
    chance = (torch.arange(count) + torch.rand(1, generator=rng)) / count
    place = torch.sigmoid(middle + width * torch.special.ndtri(chance.double()))
    return (place * of).long().clamp(max=of - 1)[torch.randperm(count, generator=rng)]


def timesteps(options: ObjectiveOptions, count: int, of: int, rng: torch.Generator) -> Tensor:
    """The timesteps of a whole batch [count], drawn as the options say."""
    low, high = round(options.range[0] * of), round(options.range[1] * of)
    inside = max(high - low, 1)
    if options.draw == "logit-normal":
        return low + logit_normal(count, inside, rng)
    return low + uniform(count, inside, rng, spread=options.draw == "strata")


# ------------------------------------------------------------------------------------------------------ all of it together


@dataclass(frozen=True)
class Noisy:
    """Examples ready for the network: the noised latents, their timesteps, what is wanted, and the weights of the error."""

    x: Tensor  # [b, c, h, w]
    t: Tensor  # [b]
    wanted: Tensor  # [b, c, h, w]
    weights: Tensor  # [b]
    delta: Tensor | None  # [b], of the pseudo-Huber error


def prepare(
    options: ObjectiveOptions, prediction: str, x0: Tensor, t: Tensor, alpha_bar: Tensor, rngs: list[torch.Generator]
) -> Noisy:
    """Noise clean latents [b, c, h, w] to timesteps [b], each example by its own stream. alpha_bar [steps], on x0's device."""

    def draw(*shape: int) -> Tensor:
        return torch.stack([torch.randn(shape, generator=rng) for rng in rngs]).to(x0)

    a = alpha_bar[t]
    noise = draw(*x0.shape[1:])
    if options.noise_offset:
        noise = offset(noise, draw(x0.shape[1], 1, 1), options.noise_offset)
    added = perturbed(noise, draw(*x0.shape[1:]), options.perturbation) if options.perturbation else noise
    weights = min_snr(prediction, a, options.min_snr) if options.min_snr else torch.ones_like(a)
    delta = huber_delta(options.huber, options.huber_schedule, a, t, len(alpha_bar)) if options.huber else None
    return Noisy(noised(x0, added, a), t, target(prediction, x0, noise, a), weights, delta)


def weigh(noisy: Noisy, found: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(loss, count) of a prediction [b, c, h, w], worked out in fp32; see `average`. A mask of pixels is averaged to latents."""
    error = (
        squared(found.float(), noisy.wanted) if noisy.delta is None else huber(found.float(), noisy.wanted, noisy.delta)
    )
    if mask is not None and mask.shape[2:] != error.shape[2:]:
        mask = F.adaptive_avg_pool2d(mask, (error.shape[2], error.shape[3]))
    return average(error, noisy.weights, mask)


def _like(a: Tensor, x: Tensor) -> Tensor:
    """[b] -> [b, 1, 1, 1], to multiply x [b, c, h, w] with."""
    return a.view(-1, *[1] * (x.ndim - 1))
