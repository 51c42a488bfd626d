"""The solvers: how each sampler gets from one noise level to the next.

How to read this file. A sampler asks the network at some noise level for its best guess x0 of the clean latent
(`look`), and moves x a little towards it (`go`). Whatever the method, the next x is a *weighted sum* of the x's and
x0's seen so far, plus fresh noise for the stochastic ones: methods differ in the weights alone. So each one is
written here as the equations of its paper, over symbols (`Sum`), and run once before sampling starts; the weights
that come out, Python floats, are kept in a list of `Step`s, and running them is a few lines in samplers.py, the
same for all. Euler's method, say:

    for here, there in plan.pairs():                          # two neighbouring noise levels
        x, x0 = plan.look(here)                               # one evaluation of the network
        slope = (x - x0) / here.sigma
        plan.go(x + slope * (there.sigma - here.sigma))       # the next x

`look` may be called several times on the way (heun, dpm2, ...), and what it returned earlier may be used again (the
multistep methods). The parts: `Sum` and `Plan`; the solvers, one function each; the arithmetic that several of them
share.
"""

import inspect
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import reduce
from typing import Any

import numpy as np
import torch

from sdcore.errors import ConfigError
from sdcore.scheduler import (
    DIFFUSION,
    EXPONENTIAL,
    KARRAS,
    KARRAS_DOUBLE,
    KARRAS_ROUNDED,
    Family,
    Point,
    SchedulerConfig,
    Step,
    check_choice,
    check_count,
    check_share,
    sigmas,
    table_point,
    timestep_of,
)


class Sum:
    """A weighted sum of x's and x0's that do not exist yet: {(evaluation, "x" or "x0"): weight}. Add them, scale
    them."""

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
    """What a sampler writes into while it is run over symbols: `look` is one evaluation of the network, `go` the
    move after it.

    `points` is the way down; `space` says in which way x is written ("ve" or "vp", see scheduler.py). After `look`,
    `out` is what the network itself predicted (epsilon or v), and `eps` the noise, both as sums of x and x0.
    """

    config: SchedulerConfig
    points: list[Point]
    space: str
    n: int  # steps of the whole way, also where it is entered further down
    stride: int  # timesteps from one point to the next where they are evenly spaced, else 0
    start_at_sigma: bool  # a VE way begins with noise of standard deviation sigma, rather than sqrt(sigma^2 + 1)
    above: list[Point] = field(
        default_factory=list
    )  # points of the whole way that were left out: it is entered below them
    steps: list[Step] = field(default_factory=list)
    eps: Sum = ZERO
    out: Sum = ZERO

    def pairs(self) -> Iterator[tuple[Point, Point]]:
        """Each point with the next one."""
        return zip(self.points[:-1], self.points[1:], strict=True)

    def scales(self, at: Point) -> tuple[float, float]:
        """(signal, noise) with which x is written at this level: x = signal * x0 + noise * n."""
        if self.space == "ve":
            return 1.0, at.sigma
        return math.sqrt(at.alpha_bar), math.sqrt(1 - at.alpha_bar)

    def look(self, at: Point) -> tuple[Sum, Sum]:
        """Evaluates the network at this noise level. Returns x and x0 as symbols."""
        signal, noise = self.scales(at)
        scale = 1 / math.sqrt(at.sigma**2 + 1) if self.space == "ve" else 1.0
        kind = self.config.prediction_type
        if kind == "epsilon" and not signal:
            raise ConfigError(
                "an epsilon model says nothing where no signal is left (zero_snr): it must predict v or the sample"
            )
        if kind == "epsilon":  # x = signal x0 + noise eps
            from_x, from_out = 1 / signal, -noise / signal
        elif kind == "v_prediction":  # v = a eps - s x0 in VP form (2202.00512, appendix D), so x0 = a x - s v
            from_x, from_out = signal * scale**2, -noise * scale
        else:
            from_x, from_out = 0.0, 1.0
        # Starting from pure noise where the signal would not be lost yet (leading), its variance stands in for the signal's too.
        start = 1.0 if self.space == "vp" else at.sigma if self.start_at_sigma else math.sqrt(at.sigma**2 + 1)
        i = len(self.steps)
        self.steps.append(Step(i, at.t, at.sigma, at.alpha_bar, signal, noise, scale, from_x, from_out, start))
        x, x0 = Sum({(i, "x"): 1.0}), Sum({(i, "x0"): 1.0})
        self.eps = (x - x0 * signal) / noise
        self.out = {"epsilon": self.eps, "v_prediction": (x0 - x * from_x) / from_out, "sample": x0}[kind]
        return x, x0

    def point(self, sigma: float) -> Point:
        """The noise level of a sigma of one's own, with its fractional timestep."""
        t = timestep_of(np.array(sigma), np.log(sigmas(self.config)))
        return Point(float(t), sigma, 1 / (sigma**2 + 1))

    def middles(self, upper: list[Point], lower: list[Point] | None = None) -> list[Point]:
        """Halfway in log sigma between each point and the next one (of `lower`). In fp32 and on the whole list at once, as
        diffusers does it, so that sigmas and timesteps come out equal to the last bit."""
        above = torch.tensor([p.sigma for p in upper])
        below = torch.tensor([p.sigma for p in lower or upper])
        middle = below.log().lerp(above.roll(1).log(), 0.5).exp()[1:]
        t = timestep_of(middle.numpy(), np.log(sigmas(self.config)))
        return [Point(t, s, 1 / (s * s + 1)) for t, s in zip(t.tolist(), middle.tolist(), strict=True)]

    def below(self, here: Point, stride: int | None = None) -> Point:
        """The noise level one stride below an integer timestep."""
        return table_point(self.config, int(here.t) - (self.stride if stride is None else stride))

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
    """One entry of SAMPLERS: the function that fills a plan, in which space, over which points."""

    solve: Callable[..., None]
    space: str
    family: Family
    points: str = "any"  # any | even (no curve of sigmas) | distilled
    last: str = "zero"  # where the way ends: see `scheduler.grid`
    last_of_curve: str = "zero"

    @property
    def options(self) -> dict[str, Any]:
        """Its options and their defaults."""
        return {k: p.default for k, p in inspect.signature(self.solve).parameters.items() if k != "plan"}


SAMPLERS: dict[str, Sampler] = {}


def sampler(space: str, family: Family, **how: str) -> Callable:
    """Enters a function into SAMPLERS under its own name."""

    def enter(solve: Callable[..., None]) -> Callable[..., None]:
        SAMPLERS[solve.__name__] = Sampler(solve, space, family, **how)
        return solve

    return enter


# ------------------------------------------------------------------------------------------------------------------------
# The samplers. h is a step of the clock lambda = log(signal / noise); eps is the noise that x seems to contain.


@sampler("vp", DIFFUSION)
def ddpm(plan: Plan, *, variance: str = "small") -> None:
    """Ancestral sampling: the posterior q(x_next | x, x0). 2006.11239 eq. 6 and 7, on a subset of the timesteps.
    `variance` "small" is that posterior's own, "large" is beta: the two extremes of section 3.2. Follows diffusers."""
    check_choice("variance", variance, ("small", "large"))
    for here, there in plan.pairs():
        x, x0 = plan.look(here)
        a, b = here.alpha_bar, there.alpha_bar
        beta = 1 - a / b
        var = beta if variance == "large" else (1 - b) / (1 - a) * beta
        mean = math.sqrt(b) * beta / (1 - a) * x0 + math.sqrt(a / b) * (1 - b) / (1 - a) * x
        plan.go(mean, math.sqrt(var) if here.t > 0 else 0.0)


@sampler("vp", DIFFUSION)
def ddim(plan: Plan, *, eta: float = 0.0) -> None:
    """Denoising diffusion implicit models: x0 now, with the same eps put back at the next level. 2010.02502 eq. 12
    and 16; eta = 1 is as random as ddpm. Follows diffusers, where every move spans train_steps // n timesteps
    whatever the spacing."""
    check_share("eta", eta)
    for here, there in plan.pairs():
        x, x0 = plan.look(here)
        there = plan.below(here) if plan.stride else there
        a, b = here.alpha_bar, there.alpha_bar
        std = eta * math.sqrt((1 - b) / (1 - a) * (1 - a / b))
        plan.go(math.sqrt(b) * x0 + math.sqrt(1 - b - std**2) * plan.eps, std)


@sampler("vp", DIFFUSION, points="even")
def ddim_inverse(plan: Plan) -> None:
    """ddim backwards: from a clean latent, given in the place of noise, to the noise from which ddim draws it again. 2010.02502
    section 4.3. Each move asks the network at the level that it goes to, with an x that is not there yet: exact as the steps
    grow small. Follows diffusers' DDIMInverseScheduler."""
    if plan.config.prediction_type == "sample":
        raise ConfigError("ddim_inverse needs an epsilon or v_prediction model: found one that predicts the sample")
    for there in reversed(plan.points[:-1]):
        here = plan.below(there)
        x, _ = plan.look(there)
        # What was answered is taken for an x at the level that it really has.
        (signal, noise), (signal_next, noise_next), out = plan.scales(here), plan.scales(there), plan.out
        if plan.config.prediction_type == "epsilon":
            x0, eps = (x - noise * out) / signal, out
        else:
            x0, eps = signal * x - noise * out, signal * out + noise * x
        plan.go(signal_next * x0 + noise_next * eps)


@sampler("vp", DIFFUSION, points="even")
def pndm(plan: Plan) -> None:
    """Pseudo linear multistep, "PLMS": ddim's move along an eps extrapolated from the last four (2202.09778, with the
    Adams-Bashforth weights). It warms up with formulas of rising order, of which the first looks twice; or, with
    `skip_prk_steps=False`, with Runge-Kutta over the first three intervals. Follows diffusers, which mixes the network's raw
    outputs (v for a v model); and which, where a way is entered further down, counts the level of two looks as two levels. So it
    enters one level early and skips the second look, but not the move after it: from the third look on, the network is told
    of one level less noise than x has."""
    outs: list[Sum] = []
    points = plan.points[:-1]
    whole = [*plan.above, *points]
    looks = [*whole[:2], *whole[1:]][len(plan.above) :]

    def move(x: Sum, out: Sum, here: Point, there: Point) -> Sum:
        a, b = here.alpha_bar, there.alpha_bar
        if plan.config.prediction_type == "v_prediction":
            out = math.sqrt(a) * out + math.sqrt(1 - a) * x
        return math.sqrt(b / a) * x - out * ((b - a) / (a * math.sqrt(1 - b) + math.sqrt(a * (1 - a) * b)))

    if plan.config.prediction_type == "sample":
        raise ConfigError(
            "pndm needs an epsilon or v_prediction model: choose another sampler for a model that predicts x0"
        )
    if not plan.config.skip_prk_steps:
        if len(points) < 4:
            raise ConfigError(
                f"pndm with Runge-Kutta needs at least 4 steps, found {len(points)}: use more or another sampler"
            )
        for here, there in zip(points[:3], points[1:4], strict=True):
            middle = table_point(plan.config, int(there.t) + plan.stride // 2)
            x, _ = plan.look(here)
            k1 = plan.out
            plan.go(move(x, k1, here, plan.below(here, plan.stride // 2)))
            plan.look(middle)
            k2 = plan.out
            plan.go(move(x, k2, here, middle))
            plan.look(middle)
            k3 = plan.out
            plan.go(move(x, k3, here, there))
            plan.look(there)
            plan.go(move(x, k1 / 6 + k2 / 3 + k3 / 3 + plan.out / 6, here, there))
            outs.append(k1)
        looks = points[3:]
    mixes = {1: (1,), 2: (3 / 2, -1 / 2), 3: (23 / 12, -16 / 12, 5 / 12), 4: (55 / 24, -59 / 24, 37 / 24, -9 / 24)}
    warm = bool(outs)
    first = ZERO
    for i, here in enumerate(looks):
        x, _ = plan.look(here)
        first = x if i == 0 else first
        if i == 1 and not warm:  # the first move once more, now along the average of its two ends
            plan.go(move(first, (plan.out + outs[0]) / 2, plan.below(here, -plan.stride), here))
            continue
        outs = [*outs, plan.out][-4:]
        out = total(o * w for o, w in zip(reversed(outs), mixes[len(outs)], strict=True))
        plan.go(move(x, out, here, plan.below(here)))


@sampler("ve", KARRAS)
def lms(plan: Plan, *, order: int = 4) -> None:
    """Linear multistep (Adams-Bashforth) in sigma: integrates the polynomial through the last slopes. k-diffusion
    `sample_lms`; Hairer, Norsett & Wanner, Solving ODEs I, III.1. Follows diffusers; but where a way is entered further down
    the order rises from 1 as in k-diffusion (diffusers weighs the one slope it has as the first of four)."""
    check_count(order, 4, "order")
    slopes: list[Sum] = []
    for i, (here, there) in enumerate(plan.pairs()):
        x, x0 = plan.look(here)
        slopes = [(x - x0) / here.sigma, *slopes][:order]
        nodes = [plan.points[i - k].sigma for k in range(len(slopes))]
        weights = [float(np.diff(np.polyval(np.polyint(p), (here.sigma, there.sigma)))[0]) for p in lagrange(nodes)]
        plan.go(x + total(d * w for d, w in zip(slopes, weights, strict=True)))


@sampler("ve", KARRAS)
def euler(
    plan: Plan, *, s_churn: float = 0.0, s_tmin: float = 0.0, s_tmax: float = math.inf, s_noise: float = 1.0
) -> None:
    """Euler's method on the probability flow dx/dsigma = (x - x0) / sigma. 2206.00364 algorithm 2 without its
    second half. s_churn adds noise before the move. Follows diffusers, which asks the network before it adds that
    noise (the paper and k-diffusion: after)."""
    for here, there in plan.pairs():
        x, x0 = plan.look(here)
        gamma = min(s_churn / plan.n, math.sqrt(2) - 1) if s_tmin <= here.sigma <= s_tmax else 0.0
        hat = here.sigma * (1 + gamma)
        # The noise n moves x0 too, by x0_from_x * n; an epsilon model's slope (x + n - x0) / hat is its output whatever n.
        epsilon = plan.config.prediction_type == "epsilon"
        reach = 0.0 if epsilon else (1 - plan.steps[-1].x0_from_x) * (there.sigma - hat) / hat
        slope = (x - x0) / (here.sigma if epsilon else hat)
        plan.go(x + slope * (there.sigma - hat), s_noise * math.sqrt(hat**2 - here.sigma**2) * (1 + reach))


@sampler("ve", KARRAS)
def euler_a(plan: Plan, *, eta: float = 1.0, s_noise: float = 1.0) -> None:
    """Euler ancestral: a step further down than asked, then noise back up to it. k-diffusion
    `sample_euler_ancestral`; diffusers is the same at eta = 1, which it does not let you choose."""
    for here, there in plan.pairs():
        x, x0 = plan.look(here)
        down, up = ancestral(here.sigma, there.sigma, eta)
        plan.go(x + (x - x0) / here.sigma * (down - here.sigma), up * s_noise)


@sampler("ve", KARRAS)
def heun(plan: Plan) -> None:
    """Heun's method: Euler there, look again, go the average slope. 2206.00364 algorithm 1. Two looks per level,
    order 2."""
    for here, there in plan.pairs():
        x, x0 = plan.look(here)
        slope = (x - x0) / here.sigma
        plan.go(x + slope * (there.sigma - here.sigma))
        if there.sigma:
            x_end, x0_end = plan.look(there)
            slope_end = (x_end - x0_end) / there.sigma
            plan.go(x + (slope + slope_end) / 2 * (there.sigma - here.sigma))


@sampler("ve", KARRAS_ROUNDED)
def dpm2(plan: Plan) -> None:
    """The midpoint method, its middle halfway in log sigma. DPM-Solver-2, 2206.00927 algorithm 1, in the form of
    k-diffusion `sample_dpm_2`. Follows diffusers (KDPM2), which does not drop the last but one sigma as
    k-diffusion's callers do."""
    for (here, there), middle in zip(plan.pairs(), plan.middles(plan.points), strict=True):
        x, x0 = plan.look(here)
        if not there.sigma:
            plan.go(x0)
            continue
        plan.go(x + (x - x0) / here.sigma * (middle.sigma - here.sigma))
        x_mid, x0_mid = plan.look(middle)
        plan.go(x + (x_mid - x0_mid) / middle.sigma * (there.sigma - here.sigma))


@sampler("ve", KARRAS_ROUNDED)
def dpm2_a(plan: Plan, *, eta: float = 1.0, s_noise: float = 1.0) -> None:
    """`dpm2` to a level further down, then noise back up. k-diffusion `sample_dpm_2_ancestral`; diffusers the same
    at eta = 1."""
    downs = [ancestral(here.sigma, there.sigma, eta) for here, there in plan.pairs()]
    lower = [plan.points[0], *(Point(0.0, down, 1 / (down**2 + 1)) for down, _ in downs)]
    for (here, there), middle, (down, up) in zip(plan.pairs(), plan.middles(plan.points, lower), downs, strict=True):
        x, x0 = plan.look(here)
        if not there.sigma:
            plan.go(x0)
            continue
        plan.go(x + (x - x0) / here.sigma * (middle.sigma - here.sigma))
        x_mid, x0_mid = plan.look(middle)
        plan.go(x + (x_mid - x0_mid) / middle.sigma * (down - here.sigma), up * s_noise)


@sampler("vp", EXPONENTIAL)
def dpmpp_2m(
    plan: Plan,
    *,
    order: int = 2,
    solver: str = "midpoint",
    lower_order_final: bool = True,
    euler_at_final: bool = False,
) -> None:
    """DPM-Solver++ (2M). 2211.01095 algorithm 2 (order 1 is ddim; order 3 as diffusers). `solver` is how the slope of x0
    enters at order 2. Follows diffusers, which falls back to order 1 on the last step and, below 15 steps, to order
    2 on the last but one."""
    exponential(plan, order, solver, 0.0, 0.0, lower_order_final, euler_at_final)


@sampler("vp", EXPONENTIAL)
def dpmpp_2m_sde(
    plan: Plan,
    *,
    eta: float = 1.0,
    s_noise: float = 1.0,
    solver: str = "midpoint",
    lower_order_final: bool = True,
    euler_at_final: bool = False,
) -> None:
    """SDE-DPM-Solver++ (2M). 2211.01095 section 5; eta from k-diffusion `sample_dpmpp_2m_sde`. At eta = 1 as
    diffusers' `sde-dpmsolver++`. One independent normal per step: increments of a Brownian path over intervals that
    do not overlap."""
    exponential(plan, 2, solver, eta, s_noise, lower_order_final, euler_at_final)


@sampler("ve", KARRAS)
def dpmpp_3m_sde(plan: Plan, *, eta: float = 1.0, s_noise: float = 1.0) -> None:
    """DPM-Solver++ (3M) SDE. k-diffusion `sample_dpmpp_3m_sde` (diffusers has none: its `sde-dpmsolver++` of order
    3 has the last term's sign the other way). Points as for euler; noise as in `dpmpp_2m_sde`."""
    exponential(plan, 3, "heun", eta, s_noise, lower_order_final=False, euler_at_final=False)


def exponential(
    plan: Plan, order: int, solver: str, eta: float, s_noise: float, lower_order_final: bool, euler_at_final: bool
) -> None:
    """The multistep DPM-Solver++ family: the linear part is solved exactly and x0, as a function of lambda, is
    extrapolated by a polynomial through the last `order` values. With eta the way is walked (1 + eta) times as far,
    and noise makes up for it:

        x' = (noise'/noise) e^(-eta h) x + signal' (1 - e^-H) D0 + signal' phi_2 D1 - signal' phi_3 D2,    H = (1 + eta) h
    """
    check_count(order, 3, "order")
    check_choice("solver", solver, ("midpoint", "heun"))
    clocks: list[float] = []
    guesses: list[Sum] = []
    short = lower_order_final and plan.n < 15
    for i, (here, there) in enumerate(plan.pairs()):
        x, x0 = plan.look(here)
        guesses, clocks = [x0, *guesses][:3], [clock(here), *clocks][:3]
        (_, noise), (signal, noise_next) = plan.scales(here), plan.scales(there)
        h = clock(there) - clocks[0]
        if h <= 0:  # the way ends where it already is
            plan.go(x)
            continue
        left = len(plan.points) - 1 - i  # moves, this one included
        k = min(order, i + 1, 2 if left == 2 and short else 3)
        if not there.sigma or (left == 1 and (short or euler_at_final)):
            k = 1
        far = (1 + eta) * h
        fall = -math.expm1(-far)
        mean = x * (noise_next / noise * (math.exp(-eta * h) if eta else 1.0)) + x0 * (signal * fall)
        if k > 1:
            phi_2 = 1 - fall / far
            r0 = (clocks[0] - clocks[1]) / h
            d1 = (guesses[0] - guesses[1]) / r0
            if k == 2:
                mean = mean + d1 * (signal * (phi_2 if solver == "heun" else fall / 2))
            else:
                r1 = (clocks[1] - clocks[2]) / h
                d1_old = (guesses[1] - guesses[2]) / r1
                d2 = (d1 - d1_old) / (r0 + r1)
                mean = mean + (d1 + d2 * r0) * (signal * phi_2) - d2 * (signal * (phi_2 / far - 0.5))
        plan.go(mean, s_noise * noise_next * math.sqrt(-math.expm1(-2 * eta * h)) if eta else 0.0)


@sampler("ve", KARRAS)
def dpmpp_2s_a(plan: Plan, *, eta: float = 1.0, s_noise: float = 1.0) -> None:
    """DPM-Solver++ (2S) ancestral: 2211.01095 algorithm 1 with r = 1/2, to a level further down, then noise back
    up. k-diffusion `sample_dpmpp_2s_ancestral` (diffusers has none). Points as for euler."""
    for here, there in plan.pairs():
        x, x0 = plan.look(here)
        down, up = ancestral(here.sigma, there.sigma, eta)
        if not down:
            plan.go(x0)
            continue
        middle = plan.point(math.sqrt(here.sigma * down))
        plan.go(mixed(x, x0, middle.sigma / here.sigma))
        _, x0_mid = plan.look(middle)
        plan.go(mixed(x, x0_mid, down / here.sigma), up * s_noise)


@sampler("ve", KARRAS_DOUBLE)
def dpmpp_sde(plan: Plan, *, eta: float = 1.0, s_noise: float = 1.0) -> None:
    """DPM-Solver++ SDE, single step, r = 1/2. k-diffusion `sample_dpmpp_sde`, diffusers' DPMSolverSDE (eta = 1).

    Its two noises per level are increments of one Brownian path W(sigma): over [middle, here], then over [there,
    here], which contains the first. The peers read them off a path that they refine with torchsde; here the second
    is put together from the first and a fresh normal for the rest of the interval, which is the same law."""
    for here, there in plan.pairs():
        x, x0 = plan.look(here)
        if not there.sigma:
            plan.go(x0)
            continue
        middle = plan.point(math.sqrt(here.sigma * there.sigma))
        down, up = ancestral(here.sigma, middle.sigma, eta)
        halfway = mixed(x, x0, down / here.sigma)
        plan.go(halfway, up * s_noise)
        x_mid, x0_mid = plan.look(middle)
        down, up_far = ancestral(here.sigma, there.sigma, eta)
        mean, std = mixed(x, x0_mid, down / here.sigma), up_far * s_noise
        if up * s_noise:
            share = (here.sigma - middle.sigma) / (here.sigma - there.sigma)
            mean = mean + (x_mid - halfway) * (std * math.sqrt(share) / (up * s_noise))
            std *= math.sqrt(1 - share)
        plan.go(mean, std)


@sampler("vp", EXPONENTIAL)
def unipc(
    plan: Plan, *, order: int = 2, variant: str = "bh2", corrector: bool = True, lower_order_final: bool = True
) -> None:
    """UniPC: a multistep predictor of x0, and a corrector that reuses its evaluation for the step before.
    2302.04867, multistep with data prediction; `variant` is its B(h): bh1 = h, bh2 = e^h - 1. Follows diffusers
    (bh2, order 2; A1111 has bh1, order 3)."""
    check_count(order, 3, "order")
    check_choice("variant", variant, ("bh1", "bh2"))
    clocks: list[float] = []
    guesses: list[Sum] = []
    added, k = ZERO, 1  # what the last prediction added to its first-order part, and its order
    for i, (here, there) in enumerate(plan.pairs()):
        x, x0 = plan.look(here)
        if i and corrector:
            # Predictor and corrector share the first-order part: the better x is x with one addition in place of the other.
            better = unipc_addition(clocks, guesses, clock(here), x0, k, variant)
            x = x - added + better * math.sqrt(here.alpha_bar)
        guesses, clocks = [x0, *guesses][:3], [clock(here), *clocks][:3]
        left = len(plan.points) - 1 - i  # moves, this one included
        k = min(order, i + 1, left if lower_order_final else order) if there.sigma else 1
        h = clock(there) - clocks[0]
        signal = math.sqrt(there.alpha_bar)
        added = unipc_addition(clocks, guesses, clock(there), None, k, variant) * signal if k > 1 and h > 0 else ZERO
        (_, noise), (_, noise_next) = plan.scales(here), plan.scales(there)
        plan.go(x * (noise_next / noise) + x0 * (-signal * math.expm1(-h)) + added)


def unipc_addition(
    clocks: list[float], guesses: list[Sum], end: float, x0_end: Sum | None, order: int, variant: str
) -> Sum:
    """What UniPC adds to its first-order part, per unit of signal, on the way from clocks[0] to `end`: -B(h) sum
    rho_k D_k. With `x0_end`, the guess at the end itself, it is the corrector."""
    h = end - clocks[0]
    ratios = [(clocks[k] - clocks[0]) / h for k in range(1, order)]
    slopes = [(guesses[k] - guesses[0]) / r for k, r in enumerate(ratios, start=1)]
    b_h = -h if variant == "bh1" else math.expm1(-h)
    phi, factorial, rhs = math.expm1(-h) / -h - 1, 1, []
    for k in range(2, order + 2):
        rhs.append(phi * factorial / b_h)
        factorial *= k
        phi = phi / -h - 1 / factorial
    if x0_end is not None:
        ratios, slopes = [*ratios, 1.0], [*slopes, x0_end - guesses[0]]
    if len(ratios) == 1 and order <= 2:
        rhos = [0.5]  # the paper's choice for one unknown, instead of solving for it
    else:
        rows = [[r**k for r in ratios] for k in range(len(ratios))]
        rhos = np.linalg.solve(np.array(rows), np.array(rhs[: len(ratios)])).tolist()
    return total(d * (-b_h * rho) for d, rho in zip(slopes, rhos, strict=True))


@sampler("vp", EXPONENTIAL, last="sigma_min", last_of_curve="repeat")
def deis(plan: Plan, *, order: int = 2, lower_order_final: bool = True) -> None:
    """DEIS, log-rho multistep: eps extrapolated as a polynomial of log sigma. 2204.13902, its rho being the
    sigma here. Follows diffusers, which ends at the smallest sigma of the table, not at zero (and on a curve of
    sigmas wastes the last step)."""
    check_count(order, 3, "order")
    eps: list[Sum] = []
    nodes: list[float] = []
    short = lower_order_final and plan.n < 15
    for i, (here, there) in enumerate(plan.pairs()):
        x, _ = plan.look(here)
        eps, nodes = [plan.eps, *eps][:3], [math.log(here.sigma), *nodes][:3]
        left = len(plan.points) - 1 - i
        k = min(order, i + 1, left if short else 3)
        ends = (here.sigma, there.sigma)
        weights = [integral_of_log(p, *ends) for p in lagrange(nodes[:k])]
        (signal, _), (signal_next, _) = plan.scales(here), plan.scales(there)
        plan.go((x / signal + total(e * w for e, w in zip(eps, weights, strict=False))) * signal_next)


@sampler("vp", DIFFUSION, points="distilled")
def lcm(plan: Plan) -> None:
    """Latent consistency: jump to x0, add fresh noise of the next level. 2310.04378; the boundary
    condition c_skip, c_out of consistency models, 2303.01469 appendix C. Follows diffusers."""
    for i, (here, there) in enumerate(plan.pairs()):
        x, x0 = plan.look(here)
        scaled = here.t * plan.config.timestep_scaling
        c_skip, c_out = 0.25 / (scaled**2 + 0.25), scaled / math.sqrt(scaled**2 + 0.25)
        clean = c_out * x0 + c_skip * x
        if i == len(plan.points) - 2:
            plan.go(clean)
        else:
            plan.go(math.sqrt(there.alpha_bar) * clean, math.sqrt(1 - there.alpha_bar))


@sampler("vp", DIFFUSION, points="distilled")
def tcd(plan: Plan, *, eta: float = 0.3) -> None:
    """Trajectory consistency: ddim down to a level between the next one and zero, noise back up to the next.
    2402.19159, its strategic stochastic sampling; eta = 0 is deterministic, 1 is lcm-like. Follows diffusers."""
    check_share("eta", eta)
    for i, (here, there) in enumerate(plan.pairs()):
        x, x0 = plan.look(here)
        final = i == len(plan.points) - 2
        s = table_point(plan.config, 0 if final else math.floor((1 - eta) * there.t)).alpha_bar
        mean = math.sqrt(s) * x0 + math.sqrt(1 - s) * plan.eps
        if final or not eta:
            plan.go(mean)
        else:
            plan.go(math.sqrt(there.alpha_bar / s) * mean, math.sqrt(1 - there.alpha_bar / s))


# ------------------------------------------------------------------------------------------------------------------------
# Arithmetic that several samplers share


def clock(at: Point) -> float:
    """lambda = log(signal / noise), in which exponential integrators measure; infinite where there is no noise."""
    return -math.log(at.sigma) if at.sigma else math.inf


def mixed(x: Sum, x0: Sum, keep: float) -> Sum:
    """x with its noise scaled down to `keep` of what it was, if x0 is right."""
    return x * keep + x0 * (1 - keep)


def ancestral(here: float, there: float, eta: float) -> tuple[float, float]:
    """Splits a way from sigma `here` to `there` into one down to (first) and one of fresh noise back up (second):
    down^2 + up^2 = there^2. At eta = 1 the joint distribution is that of the diffusion itself. k-diffusion
    `get_ancestral_step`."""
    up = min(there, eta * math.sqrt(there**2 * (here**2 - there**2) / here**2))
    return math.sqrt(there**2 - up**2), up


def lagrange(nodes: list[float]) -> list[np.ndarray]:
    """The polynomials that are 1 at one node and 0 at the others, highest power first."""
    basis = []
    for k, node in enumerate(nodes):
        others = np.array(nodes[:k] + nodes[k + 1 :])
        basis.append(np.atleast_1d(np.poly(others) / np.prod(node - others)))
    return basis


def integral_of_log(p: np.ndarray, low: float, high: float) -> float:
    """Integral of p(log s) ds: its antiderivative is s (p - p' + p'' - ...)(log s)."""
    anti = derivative = p
    for k in range(1, len(p)):
        derivative = np.polyder(derivative)
        anti = np.polyadd(anti, (-1) ** k * derivative)

    def value(s: float) -> float:
        return float(s * np.polyval(anti, math.log(s))) if s else 0.0

    return value(high) - value(low)


def total(sums: Iterable[Sum]) -> Sum:
    """Their sum."""
    return reduce(Sum.__add__, sums, ZERO)
