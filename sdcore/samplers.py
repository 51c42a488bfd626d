"""Sampling: from noise to a latent, one noise level after the other.

`make_steps` works out everything that does not depend on the picture: which noise levels, and with which weights
each move combines what was seen (solvers.py has the equations). What is left to do for a picture is the same for
every sampler: `advance`, one weighted sum, pure and easy to capture in a graph. `mean_std` is the Gaussian that it
draws from, for whoever needs its density. `sample` is the loop.

    steps = make_steps(SD15_SCHEDULER, 20, "dpmpp_2m", "karras")
    noise = Noise([seed_of_image_0, seed_of_image_1])
    x = initial(noise.draw(4, 64, 64), steps)
    for step, x, x0 in sample(denoise, x, steps, noise=noise): ...

x is [b, c, h, w], and in fp32 whatever the network computes in: at small noise levels a half-precision x would
round the picture away.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from sdcore.errors import ConfigError
from sdcore.scheduler import (
    DIFFUSION,
    SCHEDULES,
    SPACINGS,
    Point,
    SchedulerConfig,
    Step,
    check_config,
    check_count,
    distilled,
    grid,
    table_point,
    unknown,
)
from sdcore.solvers import SAMPLERS, Plan

__all__ = [
    "SAMPLERS",
    "SCHEDULES",
    "Denoise",
    "History",
    "Noise",
    "Step",
    "add_noise",
    "advance",
    "initial",
    "make_steps",
    "mean_std",
    "memory",
    "sample",
]

Denoise = Callable[[Tensor, Step], Tensor]  # (x, step) -> x0
History = Sequence[tuple[Tensor, Tensor]]  # earlier (x, x0), the latest first


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
    start        leave out the first `start` of the n noise levels (image-to-image); multistep samplers start afresh there (pndm:
                 as diffusers has it, see there)
    timesteps, sigma_list   levels of your own, falling, in place of n and schedule
    final_sigma  "zero" or "sigma_min": where the way ends; None is the sampler's own
    options      the sampler's own: `SAMPLERS[name].options`

    Second-order single-step samplers look twice per level: they return up to 2n - 1 steps; pndm looks once more. Raises
    ConfigError for a name or option that is not known (with the nearest ones that are) and for a count outside 1 .. train_steps.
    """
    check_config(config)
    name = sampler or config.sampler
    if name not in SAMPLERS:
        raise unknown("sampler", name, SAMPLERS)
    if schedule is not None and schedule not in SCHEDULES:
        raise unknown("schedule", schedule, SCHEDULES)
    entry = SAMPLERS[name]
    check_options(name, entry.options, options)
    own = timesteps if timesteps is not None else sigma_list
    n = check_count(n if own is None else len(own), config.train_steps)
    if isinstance(start, bool) or not isinstance(start, int) or not 0 <= start < n:
        raise ConfigError(f"start must be a whole number from 0 to {n - 1} (of {n} steps), found {start!r}")
    even = own is None and schedule in (None, *SPACINGS)
    if entry.points == "even" and not even:
        found = f"the schedule {schedule!r}" if own is None else "levels of your own"
        raise ConfigError(f"{name} needs evenly spaced timesteps, found {found}: use {', '.join(SPACINGS)}")
    if entry.points == "distilled":
        if schedule or own is not None:
            raise ConfigError(
                f"{name} keeps to the timesteps its model was distilled on: leave schedule and levels out"
            )
        points = [table_point(config, t) for t in distilled(config, n)]
        points.append(points[-1])
    else:
        curve = schedule in ("karras", "exponential", "beta")
        last = final_sigma or (entry.last_of_curve if curve else entry.last)
        points = grid(config, n, entry.family, schedule, last=last, timesteps=timesteps, sigma_list=sigma_list)
        if entry.family is DIFFUSION and even:
            points = [table_point(config, int(p.t)) for p in points[:-1]] + [Point(0.0, 0.0, 1.0)]
    spacing = schedule if schedule in SPACINGS else config.spacing or entry.family.spacing
    plan = Plan(
        config=config,
        points=points[start:],
        space=entry.space,
        n=n,
        stride=config.train_steps // n if even else 0,
        start_at_sigma=spacing != "leading",
        above=points[:start],
    )
    entry.solve(plan, **options)
    return plan.steps


def check_options(name: str, known: dict[str, Any], given: dict[str, Any]) -> None:
    """Raises ConfigError for an option that the sampler does not have, or of another kind than its default."""
    for key, value in given.items():
        if key not in known:
            raise unknown(f"option of {name}", key, known)
        default = known[key]
        if isinstance(default, float):
            fits = isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value <= max(default, 1e6)
            wanted = "a number that is not negative"
        else:
            fits, wanted = type(value) is type(default), f"of type {type(default).__name__}"
        if not fits:
            raise ConfigError(f"option {key} of {name} must be {wanted} (such as {default!r}), found {value!r}")


def mean_std(x: Tensor, x0: Tensor, step: Step, history: History = ()) -> tuple[Tensor, float]:
    """The Gaussian that the next x is drawn from: its mean, like x, and its standard deviation (0 where nothing is
    drawn)."""
    # A separate multiplication and addition for every term: a fused one would round differently in the vectorised and in the
    # scalar part of a loop, and so make an image depend on its place in the batch.
    seen = [(x, x0), *history]
    terms = [
        tensor * weight
        for pair, weights in zip(seen, step.weights, strict=False)
        for tensor, weight in zip(pair, weights, strict=True)
        if weight
    ]
    return reduce(torch.add, terms), step.std


def advance(x: Tensor, x0: Tensor, step: Step, history: History = (), noise: Tensor | None = None) -> Tensor:
    """The next x. `noise` is standard normal, like x, and needed where step.std > 0. Pure."""
    mean, std = mean_std(x, x0, step, history)
    if not std:
        return mean
    if noise is None:
        raise ConfigError("this step draws noise: pass noise, standard normal and like x")
    return mean + noise * std


def memory(steps: Sequence[Step]) -> int:
    """How many earlier (x, x0) the steps look back to."""
    return max(len(step.weights) for step in steps) - 1


def initial(noise: Tensor, steps: Sequence[Step]) -> Tensor:
    """The x to start from, out of standard normal noise: noise scaled to the level of the first step."""
    return noise * steps[0].start_scale


def add_noise(x0: Tensor, noise: Tensor, step: Step) -> Tensor:
    """The clean latent x0 with noise as at the entry of `step` (image-to-image starts from this, masks blend with
    it)."""
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
    if not noise and any(step.std for step in steps):
        raise ConfigError("this sampler draws noise: pass noise=Noise(seeds), one seed per image")
    depth = memory(steps)
    history: list[tuple[Tensor, Tensor]] = []
    for step in steps:
        x0 = denoise(x, step)
        new = advance(x, x0, step, history, noise(x) if noise and step.std else None)
        history = [(x, x0), *history][:depth]
        x = edit(new, steps[step.i + 1] if step.i + 1 < len(steps) else None) if edit else new
        yield step, x, x0


class Noise:
    """Standard normal noise from one CPU generator per image, so that image k of a batch draws exactly what it
    would draw alone with its seed, on whatever device it is computed. fp32; ConfigError for seeds that are no
    integers."""

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
