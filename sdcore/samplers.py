"""Samplers: from noise to a latent, one noise level after the other.

How to read this file. A sampler asks the network again and again for its best guess x0 of the clean latent, and moves x a little
towards it. All of them have one thing in common: the next x is a *weighted sum* of the x's and x0's seen so far, plus fresh noise
for the stochastic ones. They differ in the weights alone. So each sampler below is written once, as the equations of its paper,
over symbols (`Sum`), and is run once before sampling starts (`make_steps`); what comes out is a list of `Step`s that hold the
weights as Python floats. While sampling, `advance` is then the same five lines for every sampler: pure, easy to capture in a
graph, and the Gaussian that it draws from, `mean_std`, is at hand for whoever needs its density.

    steps = make_steps(SD15_SCHEDULER, 20, "dpmpp_2m", "karras")
    noise = Noise([seed_of_image_0, seed_of_image_1])
    x = initial(noise.draw(4, 64, 64), steps)
    for step, x, x0 in sample(denoise, x, steps, noise=noise): ...

The parts: `Step`, `advance`, `sample`, `Noise` (what runs); `Sum`, `Plan`, `make_steps` (what prepares); then the samplers.
x is [b, c, h, w], in fp32 whatever the network computes in: at small noise levels a half-precision x would round the picture away.
"""

import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from sdcore.errors import ConfigError
from sdcore.scheduler import (
    DIFFUSION,
    EXPONENTIAL,
    KARRAS,
    KARRAS_DOUBLE,
    KARRAS_ROUNDED,
    SCHEDULES,
    SPACINGS,
    Family,
    Point,
    SchedulerConfig,
    alpha_bars,
    check_config,
    check_count,
    distilled,
    grid,
    sigmas,
    table_point,
    timestep_of,
    unknown,
)

Denoise = Callable[[Tensor, "Step"], Tensor]  # (x, step) -> x0
History = Sequence[tuple[Tensor, Tensor]]  # earlier (x, x0), the latest first

# ------------------------------------------------------------------------------------------------------------------------
# What runs


@dataclass(frozen=True)
class Step:
    """One evaluation of the network and the move after it. All numbers are Python floats, worked out beforehand.

    On entering, x = signal * x0 + noise * n with n ~ N(0, 1). The network is handed x * input_scale and the timestep t, and its
    output turns into x0 = x0_from_x * x + x0_from_out * output, whatever it was trained to predict.
    """

    i: int  # index into the list of steps
    t: float  # timestep for the network; fractional for some samplers
    sigma: float  # noise per unit of signal (VE noise level)
    alpha_bar: float  # the signal's share of the power (VP noise level)
    signal: float
    noise: float
    input_scale: float
    x0_from_x: float
    x0_from_out: float
    start_scale: float  # unit noise times this is an x to start from here
    weights: tuple[tuple[float, float], ...] = ()  # of (x, x0): now, one step ago, two steps ago, ...
    std: float = 0.0  # of the fresh noise


def mean_std(x: Tensor, x0: Tensor, step: Step, history: History = ()) -> tuple[Tensor, float]:
    """The Gaussian that the next x is drawn from: its mean, like x, and its standard deviation (0 where nothing is drawn)."""
    # Separate multiplications and additions: a fused one would round differently in the vectorised and the scalar part of a
    # loop, and so make an image depend on its place in the batch.
    total = None
    for (wx, w0), (old_x, old_x0) in zip(step.weights, [(x, x0), *history], strict=False):
        for weight, tensor in ((wx, old_x), (w0, old_x0)):
            if weight:
                total = tensor * weight if total is None else total + tensor * weight
    assert total is not None
    return total, step.std


def advance(x: Tensor, x0: Tensor, step: Step, history: History = (), noise: Tensor | None = None) -> Tensor:
    """The next x. `noise` is standard normal, like x, and needed where step.std > 0. Pure."""
    mean, std = mean_std(x, x0, step, history)
    return mean + noise * std if std else mean


def memory(steps: Sequence[Step]) -> int:
    """How many earlier (x, x0) the steps look back to."""
    return max(len(step.weights) for step in steps) - 1


def initial(noise: Tensor, steps: Sequence[Step]) -> Tensor:
    """The x to start from, out of standard normal noise: noise scaled to the level of the first step."""
    return noise * steps[0].start_scale


def add_noise(x0: Tensor, noise: Tensor, step: Step) -> Tensor:
    """The clean latent x0 with noise as at the entry of `step` (image-to-image starts from this, masks blend with it)."""
    return x0 * step.signal + noise * step.noise


def sample(
    denoise: Denoise,
    x: Tensor,
    steps: Sequence[Step],
    *,
    noise: Callable[[Tensor], Tensor] | None = None,
    edit: Callable[[Tensor, Step | None], Tensor] | None = None,
) -> Iterator[tuple[Step, Tensor, Tensor]]:
    """Walks down the steps; yields (step, x after the step, x0 that the network saw in it). The last x is the result.

    denoise   (x, step) -> x0
    noise     x -> standard normal noise like x, such as a `Noise`; needed by stochastic samplers only
    edit      (next x, the step it enters or None at the end) -> x: a last word on every x, for masks

    Gradients flow if the caller lets them. Raises ConfigError when the sampler draws noise and none is given.
    """
    if noise is None and any(step.std for step in steps):
        raise ConfigError("this sampler draws noise: pass noise=Noise(seeds), one seed per image")
    depth = memory(steps)
    history: list[tuple[Tensor, Tensor]] = []
    for step in steps:
        x0 = denoise(x, step)
        fresh = noise(x) if step.std and noise is not None else None
        new = advance(x, x0, step, history, fresh)
        history = [(x, x0), *history][:depth]
        x = new if edit is None else edit(new, steps[step.i + 1] if step.i + 1 < len(steps) else None)
        yield step, x, x0


class Noise:
    """Standard normal noise from one CPU generator per image, so that image k of a batch draws exactly what it would draw
    alone with its seed, on whatever device it is computed. fp32; ConfigError for seeds that are no integers."""

    def __init__(self, seeds: Sequence[int]):
        if not len(seeds):
            raise ConfigError("noise needs at least one seed")
        for seed in seeds:
            if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**64:
                raise ConfigError(f"a seed must be a whole number from 0 to 2**64 - 1, found {seed!r}")
        self.generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]

    def draw(self, *shape: int) -> Tensor:
        """[len(seeds), *shape] fp32 on the CPU: the next numbers of every image's own stream."""
        return torch.stack([torch.randn(shape, generator=g) for g in self.generators])

    def __call__(self, x: Tensor) -> Tensor:
        """Noise like x, whose first dimension counts the images."""
        if len(x) != len(self.generators):
            raise ConfigError(f"{len(self.generators)} seeds were given for {len(x)} images: give one seed per image")
        return self.draw(*x.shape[1:]).to(x)


# ------------------------------------------------------------------------------------------------------------------------
# What prepares


class Sum:
    """A weighted sum of x's and x0's that do not exist yet: {(evaluation, "x" or "x0"): weight}. Add them, scale them."""

    def __init__(self, weights: dict[tuple[int, str], float]):
        self.weights = weights

    def __add__(self, other: "Sum") -> "Sum":
        names = self.weights | other.weights
        return Sum({name: self.weights.get(name, 0.0) + other.weights.get(name, 0.0) for name in names})

    def __mul__(self, factor: float) -> "Sum":
        return Sum({name: weight * factor for name, weight in self.weights.items()})

    __rmul__ = __mul__

    def __sub__(self, other: "Sum") -> "Sum":
        return self + other * -1.0

    def __truediv__(self, divisor: float) -> "Sum":
        return self * (1.0 / divisor)


ZERO = Sum({})


@dataclass
class Plan:
    """What a sampler writes into while it is run over symbols: `look` is one evaluation of the network, `go` the move after it.

    `points` is the way down; `space` says in which way x is written ("ve" or "vp", see scheduler.py). After `look`, `out` is what
    the network itself predicted (epsilon or v), and `eps` the noise, both as sums of x and x0.
    """

    config: SchedulerConfig
    points: list[Point]
    space: str
    start_at_sigma: bool = True
    stride: int = 0  # timesteps from one point to the next, where they are evenly spaced
    steps: list[Step] = field(default_factory=list)
    eps: Sum = ZERO
    out: Sum = ZERO

    def pairs(self) -> Iterator[tuple[Point, Point]]:
        """Each point with the next one."""
        return zip(self.points[:-1], self.points[1:], strict=True)

    def look(self, at: Point) -> tuple[Sum, Sum]:
        """Evaluates the network at this noise level. Returns x and x0 as symbols."""
        a, s = math.sqrt(at.alpha_bar), math.sqrt(1 - at.alpha_bar)
        signal, noise, scale = (a, s, 1.0) if self.space == "vp" else (1.0, at.sigma, 1 / math.sqrt(at.sigma**2 + 1))
        kind = self.config.prediction_type
        if kind == "epsilon" and not signal:
            raise ConfigError("an epsilon model says nothing at zero signal (zero_snr): its prediction_type must be v or sample")
        # epsilon: x = signal x0 + noise eps.   v = a eps - s x0 (2202.00512, app. D), so x0 = a (x scaled to VP) - s v.
        from_x, from_out = {
            "epsilon": lambda: (1 / signal, -noise / signal),
            "v_prediction": lambda: (signal * scale**2, -noise * scale),
            "sample": lambda: (0.0, 1.0),
        }[kind]()
        # Noise of unit variance starts a VE sampler at the noisiest level of the table; a grid that begins below it (leading)
        # starts from x of the full variance sigma^2 + 1 instead, as diffusers does.
        start = 1.0
        if self.space == "ve":
            start = at.sigma if self.start_at_sigma else math.sqrt(at.sigma**2 + 1)
        i = len(self.steps)
        step = Step(i, at.t, at.sigma, at.alpha_bar, signal, noise, scale, from_x, from_out, start)
        self.steps.append(step)
        x, x0 = Sum({(i, "x"): 1.0}), Sum({(i, "x0"): 1.0})
        self.eps = (x - x0 * signal) / noise
        self.out = {"epsilon": self.eps, "v_prediction": (x * from_x - x0) / -from_out, "sample": x0}[kind]
        return x, x0

    def below(self, here: Point) -> Point:
        """The noise level one stride below an integer timestep."""
        return table_point(self.config, int(here.t) - self.stride)

    def go(self, mean: Sum, std: float = 0.0) -> None:
        """The next x is drawn from N(mean, std^2)."""
        i = len(self.steps) - 1
        first = min(k for (k, _), weight in mean.weights.items() if weight)
        weights = tuple(
            (mean.weights.get((k, "x"), 0.0), mean.weights.get((k, "x0"), 0.0)) for k in range(i, first - 1, -1)
        )
        self.steps[i] = replace(self.steps[i], weights=weights, std=std)


@dataclass(frozen=True)
class Sampler:
    """One entry of SAMPLERS: the function that fills a plan, its space, and how its points are laid."""

    plan: Callable[..., None]
    space: str
    family: Family
    last: str = "zero"
    distilled: bool = False
    spacings: bool = False  # takes the even spacings only, no curve of sigmas

    @property
    def options(self) -> dict[str, object]:
        """Its options and their defaults."""
        return {k: p.default for k, p in inspect.signature(self.plan).parameters.items() if k != "plan"}


SAMPLERS: dict[str, Sampler] = {}


def sampler(space: str, family: Family, **how) -> Callable:
    """Enters a function into SAMPLERS under its own name."""

    def enter(plan: Callable[..., None]) -> Callable[..., None]:
        SAMPLERS[plan.__name__] = Sampler(plan, space, family, **how)
        return plan

    return enter


def make_steps(
    config: SchedulerConfig,
    n: int,
    sampler: str | None = None,
    schedule: str | None = None,
    *,
    start: int = 0,
    timesteps: Sequence[float] | None = None,
    sigma_list: Sequence[float] | None = None,
    final_sigma: str | None = None,
    **options: float | str | bool,
) -> list[Step]:
    """The steps of an n-step run: everything about sampling that does not depend on the picture.

    sampler      a name of SAMPLERS; None is the model's own
    schedule     a name of SCHEDULES; None is exactly what diffusers' `from_config` gives for this model and sampler
    start        leave out the first `start` of the n noise levels (image-to-image); multistep samplers start afresh there
    timesteps, sigma_list   levels of your own, falling, in place of n and schedule
    final_sigma  "zero" or "sigma_min": where the way ends; None is the sampler's own
    options      the sampler's own: `SAMPLERS[name].options`

    Second-order single-step samplers look twice per level: they return up to 2n - 1 steps. Raises ConfigError for a name or option
    that is not known (with the nearest ones that are) and for a count outside 1 .. train_steps.
    """
    check_config(config)
    name = sampler or config.sampler
    if name not in SAMPLERS:
        raise unknown("sampler", name, SAMPLERS)
    if schedule is not None and schedule not in SCHEDULES:
        raise unknown("schedule", schedule, SCHEDULES)
    entry = SAMPLERS[name]
    for key in options:
        if key not in entry.options:
            raise unknown(f"option of {name}", key, entry.options)
    own = timesteps if timesteps is not None else sigma_list
    n = check_count(n if own is None else len(own), config.train_steps)
    if start:
        check_count(start, n - 1, "start")
    if entry.spacings and (schedule not in (None, *SPACINGS) or own is not None):
        raise ConfigError(f"{name} needs evenly spaced timesteps, not {schedule or 'levels of your own'}: use {', '.join(SPACINGS)}")
    if entry.distilled and (schedule is not None or own is not None):
        raise ConfigError(f"{name} keeps to the timesteps its model was distilled on: leave schedule, timesteps and sigmas out")
    if entry.distilled:
        points = [table_point(config, t) for t in distilled(config, n)]
        points.append(points[-1])
    else:
        last = final_sigma or entry.last
        points = grid(config, n, entry.family, schedule, last=last, timesteps=timesteps, sigma_list=sigma_list)
    spacing = schedule if schedule in SPACINGS else config.spacing or entry.family.spacing
    even = own is None and schedule in (None, *SPACINGS)
    if entry.family is DIFFUSION and even:
        points = [table_point(config, int(p.t)) for p in points[:-1]] + [Point(0.0, 0.0, 1.0)]
    plan = Plan(config, points[start:], entry.space, start_at_sigma=spacing != "leading")
    plan.stride = config.train_steps // n if even else 0
    entry.plan(plan, **options)
    return plan.steps


# ------------------------------------------------------------------------------------------------------------------------
# The samplers


@sampler("vp", DIFFUSION)
def ddim(plan: Plan, *, eta: float = 0.0) -> None:
    """Denoising diffusion implicit models, 2010.02502 eq. 12 and 16; eta = 1 is as random as ddpm. Follows diffusers, where
    every step spans train_steps // n timesteps, whatever the spacing."""
    for here, there in plan.pairs():
        x, x0 = plan.look(here)
        there = plan.below(here) if plan.stride else there
        a, b = here.alpha_bar, there.alpha_bar
        std = eta * math.sqrt((1 - b) / (1 - a) * (1 - a / b))
        plan.go(math.sqrt(b) * x0 + math.sqrt(1 - b - std**2) * plan.eps, std)


@sampler("ve", KARRAS)
def euler(plan: Plan, *, s_churn: float = 0.0, s_tmin: float = 0.0, s_tmax: float = math.inf, s_noise: float = 1.0) -> None:
    """Euler's method on the probability flow, Karras et al. 2206.00364 algorithm 2 without the correction. With s_churn noise
    is added before the move; follows diffusers, which evaluates the network before it adds the noise (the paper: after)."""
    for here, there in plan.pairs():
        x, x0 = plan.look(here)
        churned = s_tmin <= here.sigma <= s_tmax
        hat = here.sigma * (1 + (min(s_churn / len(plan.points), math.sqrt(2) - 1) if churned else 0.0))
        d = (x - x0) / here.sigma
        plan.go(x + d * (there.sigma - hat), s_noise * math.sqrt(hat**2 - here.sigma**2))


@sampler("vp", EXPONENTIAL)
def dpmpp_2m(plan: Plan, *, order: int = 2, solver: str = "midpoint", lower_order_final: bool = True) -> None:
    """DPM-Solver++ (2M): 2211.01095 algorithm 2. Follows diffusers."""
    seen: list[tuple[float, Sum]] = []
    for i, (here, there) in enumerate(plan.pairs()):
        x, x0 = plan.look(here)
        seen.append((half_log_snr(here), x0))
        h = half_log_snr(there) - half_log_snr(here)
        ahead, fall = math.sqrt(there.alpha_bar), -math.expm1(-h)
        mean = vp_noise(there) / vp_noise(here) * x + ahead * fall * x0
        if i > 0 and there.sigma > 0:
            (l1, x01) = seen[-2]
            r = (half_log_snr(here) - l1) / h
            mean = mean + 0.5 * ahead * fall / r * (x0 - x01)
        plan.go(mean)


def half_log_snr(at: Point) -> float:
    """lambda = log(signal / noise), the clock of the exponential integrators; infinite where there is no noise."""
    return -math.log(at.sigma) if at.sigma else math.inf


def vp_noise(at: Point) -> float:
    """Standard deviation of the noise in VP form."""
    return at.sigma * math.sqrt(at.alpha_bar)
