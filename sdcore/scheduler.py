"""Noise levels: how much noise each timestep of a model carries, and at which of those levels a sampler stops on
its way down.

Three things, in the order of this file. `SchedulerConfig` is what a model was trained with (its betas, and what its
network predicts), with a named constant for every official model. `alpha_bars` and `sigmas` turn the betas into the
table of noise levels. `grid` picks n of them, from the noisiest to the cleanest: evenly spaced timesteps
(`leading`, `trailing`, `linspace`) or a curve of sigmas (`karras`, `exponential`, `beta`, `sgm_uniform`, `ays`).
What a sampler does between two such points is written in samplers.py.

Two ways to write the same noisy latent run through everything: with n ~ N(0, 1),

    VP  x = sqrt(alpha_bar) * x0 + sqrt(1 - alpha_bar) * n      "variance preserving": what the network sees
    VE  x = x0 + sigma * n                                      "variance exploding":  VP divided by sqrt(alpha_bar)

so sigma^2 = (1 - alpha_bar) / alpha_bar.
"""

import difflib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import torch

from sdcore.errors import ConfigError

SPACINGS = ("leading", "trailing", "linspace")
SCHEDULES = SPACINGS + ("karras", "exponential", "beta", "sgm_uniform", "ays")
PREDICTIONS = ("epsilon", "v_prediction", "sample")


@dataclass(frozen=True)
class SchedulerConfig:
    """What a model was trained with, and the choices its publisher shipped for sampling.

    The defaults are Stable Diffusion 1.x. `spacing=None` means that the published file names none, and each family
    of samplers then uses its own (as in diffusers: `leading` for ddpm, ddim, pndm, lcm and tcd; `linspace` for all
    others).
    """

    beta_start: float = 0.00085
    beta_end: float = 0.012
    beta_schedule: str = "scaled_linear"  # linear | scaled_linear | squaredcos_cap_v2
    train_steps: int = 1000
    prediction_type: str = "epsilon"  # epsilon | v_prediction | sample
    spacing: str | None = None  # leading | trailing | linspace
    steps_offset: int = 1  # added to every timestep of `leading`
    set_alpha_to_one: bool = False  # after the last step alpha_bar is 1, instead of that of timestep 0 (ddim, pndm)
    zero_snr: bool = False  # rescale the betas so that the last timestep is pure noise
    sampler: str = "pndm"  # the model's own default
    skip_prk_steps: bool = True  # pndm: start with multistep formulas of rising order instead of Runge-Kutta
    original_steps: int = 50  # lcm, tcd: length of the schedule that the student was distilled on
    timestep_scaling: float = 10.0  # lcm: sharpness of the boundary condition
    ays: str = "sd"  # whose "align your steps" table: sd | sdxl


SD15_SCHEDULER = SchedulerConfig()
SD15_INPAINT_SCHEDULER = replace(SD15_SCHEDULER, sampler="ddim")
SD2_SCHEDULER = SD15_SCHEDULER
SD2_V_SCHEDULER = SchedulerConfig(prediction_type="v_prediction", sampler="ddim")
SDXL_SCHEDULER = SchedulerConfig(spacing="leading", sampler="euler", ays="sdxl")
TURBO_SCHEDULER = SchedulerConfig(spacing="trailing", sampler="euler_a", ays="sdxl")
LCM_SCHEDULER = SchedulerConfig(sampler="lcm")
X4_SCHEDULER = SchedulerConfig(beta_start=0.0001, beta_end=0.02, prediction_type="v_prediction", sampler="ddim")


def unknown(kind: str, name: object, known: Iterable[str]) -> ConfigError:
    """The error for a name that is not on the list: it says which ones come nearest."""
    known = list(known)
    near = difflib.get_close_matches(str(name), known, n=3, cutoff=0.4)
    hint = f"did you mean {' or '.join(near)}?" if near else f"choose one of {', '.join(known)}"
    return ConfigError(f"unknown {kind} {name!r}: {hint}")


def check_choice(kind: str, name: object, known: Sequence[str]) -> None:
    """Raises ConfigError when `name` is not one of `known`."""
    if name not in known:
        raise unknown(kind, name, known)


def check_share(kind: str, value: float) -> None:
    """Raises ConfigError when `value` is not between 0 and 1."""
    if not 0 <= value <= 1:
        raise ConfigError(f"{kind} must lie between 0 and 1, found {value}")


def check_config(config: SchedulerConfig) -> None:
    """Raises ConfigError when a field of `config` is outside its range."""
    if config.prediction_type not in PREDICTIONS:
        raise unknown("prediction_type", config.prediction_type, PREDICTIONS)
    if config.spacing is not None and config.spacing not in SPACINGS:
        raise unknown("spacing", config.spacing, SPACINGS)
    if config.ays not in AYS:
        raise unknown("ays table", config.ays, AYS)
    if not 0 < config.beta_start <= config.beta_end < 1:
        raise ConfigError(f"betas must satisfy 0 < start <= end < 1, found {config.beta_start} and {config.beta_end}")


# ------------------------------------------------------------------------------------------------------------------------
# The table of noise levels: one per training timestep


def betas(config: SchedulerConfig) -> torch.Tensor:
    """Noise added at each training step, [train_steps] fp32. Computed in fp32 because the released models were:
    in fp64 the last sigma comes out 1.3e-5 different. Source: DDPM (2006.11239) eq. 2; LDM `make_beta_schedule`;
    `squaredcos_cap_v2` is Nichol & Dhariwal (2102.09672) eq. 17. Raises ConfigError for an unknown `beta_schedule`."""
    start, end, n = config.beta_start, config.beta_end, config.train_steps
    if config.beta_schedule == "linear":
        b = torch.linspace(start, end, n, dtype=torch.float32)
    elif config.beta_schedule == "scaled_linear":
        b = torch.linspace(start**0.5, end**0.5, n, dtype=torch.float32) ** 2
    elif config.beta_schedule == "squaredcos_cap_v2":
        level = [math.cos((i / n + 0.008) / 1.008 * math.pi / 2) ** 2 for i in range(n + 1)]
        b = torch.tensor([min(1 - level[i + 1] / level[i], 0.999) for i in range(n)], dtype=torch.float32)
    else:
        raise unknown("beta_schedule", config.beta_schedule, ("linear", "scaled_linear", "squaredcos_cap_v2"))
    return zero_terminal_snr(b) if config.zero_snr else b


def zero_terminal_snr(b: torch.Tensor) -> torch.Tensor:
    """Betas whose last alpha_bar is exactly zero: sqrt(alpha_bar) shifted to end at 0, stretched to start where it did.
    Source: Lin et al. (2305.08891), algorithm 1."""
    root = torch.cumprod(1 - b, dim=0).sqrt()
    first, last = root[0].clone(), root[-1].clone()
    root = (root - last) * (first / (first - last))
    level = root**2
    return 1 - torch.cat([level[:1], level[1:] / level[:-1]])


def alpha_bars(config: SchedulerConfig) -> torch.Tensor:
    """Share of the signal's power that is left at each timestep, [train_steps] fp32: the product of 1 - beta so far."""
    return torch.cumprod(1 - betas(config), dim=0)


def sigmas(config: SchedulerConfig) -> np.ndarray:
    """Noise per unit of signal at each timestep, [train_steps] fp32, rising. With zero terminal SNR the last one
    would be infinite; as diffusers does, it is set to 4096 (alpha_bar = 2^-24), the largest that fp32 arithmetic
    survives."""
    level = alpha_bars(config)
    if config.zero_snr:
        level[-1] = 2**-24
    return ((1 - level) / level).sqrt().numpy()


def timestep_of(sigma: np.ndarray, log_table: np.ndarray) -> np.ndarray:
    """Fractional timestep of a sigma: linear interpolation in log sigma between the two neighbours in the table.
    Works in the precision of its arguments. Source: k-diffusion `DiscreteSchedule.sigma_to_t`."""
    log_sigma = np.log(np.maximum(sigma, 1e-10))
    below = np.clip(np.searchsorted(log_table, log_sigma, side="right") - 1, 0, len(log_table) - 2)
    low, high = log_table[below], log_table[below + 1]
    w = np.clip((low - log_sigma) / (low - high), 0, 1)
    below = below.astype(log_sigma.dtype)
    return (1 - w) * below + w * (below + 1)


# ------------------------------------------------------------------------------------------------------------------------
# The grid: where a sampler stops


@dataclass(frozen=True)
class Point:
    """One noise level on the way down. `t` is what the network is told (a timestep, fractional for some samplers);
    `sigma` is the VE noise level, `alpha_bar` the VP one."""

    t: float
    sigma: float
    alpha_bar: float


@dataclass(frozen=True)
class Family:
    """How one family of samplers lays its points; the differences are historical, and change the picture.

    whole       timesteps are rounded to integers
    one_more    `leading` and `linspace` lay n + 1 points and drop the cleanest, since the way ends at sigma 0 anyway
    full_range  karras, exponential and beta span the whole table, instead of the range of the model's own spacing
    """

    spacing: str  # where the model names none
    whole: bool
    one_more: bool
    full_range: bool
    double: bool = False  # fractional timesteps are kept in fp64, not fp32
    round_karras: bool = False  # the karras curve rounds its timesteps


DIFFUSION = Family("leading", whole=True, one_more=False, full_range=False)  # ddpm, ddim, pndm
KARRAS = Family("linspace", whole=False, one_more=False, full_range=False)  # euler, heun, lms, ... of k-diffusion
KARRAS_ROUNDED = replace(KARRAS, round_karras=True)  # dpm2, dpm2_a
KARRAS_DOUBLE = replace(KARRAS, double=True)  # dpmpp_sde
EXPONENTIAL = Family("linspace", whole=True, one_more=True, full_range=True, round_karras=True)  # dpmpp_2m, unipc, deis

# "Align your steps" (2404.14507), the authors' published ten-step tables; the eleventh level is where they end.
AYS = {
    "sd": (14.615, 6.475, 3.861, 2.697, 1.886, 1.396, 0.963, 0.652, 0.399, 0.152, 0.029),
    "sdxl": (14.615, 6.315, 3.771, 2.181, 1.342, 0.862, 0.555, 0.380, 0.234, 0.113, 0.029),
}


def check_count(n: object, most: int, what: str = "steps") -> int:
    """`n` itself when it is a whole number from 1 to `most`; ConfigError otherwise."""
    if isinstance(n, bool) or not isinstance(n, int):
        raise ConfigError(f"{what} must be a whole number, found {n!r}: pass an int from 1 to {most}")
    if not 1 <= n <= most:
        raise ConfigError(f"{what} must lie between 1 and {most}, found {n}")
    return n


def spaced(config: SchedulerConfig, n: int, spacing: str, family: Family) -> np.ndarray:
    """n evenly spaced timesteps, falling, fp64. `leading` starts every interval at its cleaner end and so never
    reaches pure noise, `trailing` at its noisier end; `linspace` touches both ends. Source: Lin et al.
    (2305.08891), table 2."""
    total, m = config.train_steps, n + family.one_more
    if spacing == "linspace":
        t = np.linspace(0, total - 1, m)[::-1][:n]
        return t.round() if family.whole else t
    if spacing == "leading":
        return (np.arange(m) * (total // m) + config.steps_offset)[::-1][:n].astype(float)
    return np.arange(total, 0, -total / n)[:n].round() - 1  # trailing


def curve(config: SchedulerConfig, n: int, name: str, high: float, low: float) -> np.ndarray:
    """n sigmas from `high` to `low`, fp64, on one of the curves that place them directly.

    karras       even in sigma^(1/7): Karras et al. (2206.00364) eq. 5
    exponential  even in log sigma
    beta         quantiles of the Beta(0.6, 0.6) distribution, in sigma (2407.12173; diffusers and Forge, not ComfyUI,
                 which takes the same quantiles of the timestep)
    ays          the published table of the model, interpolated in log sigma for n other than 10
    """
    ramp = np.linspace(0, 1, n)
    if name == "karras":
        top, bottom = high ** (1 / 7), low ** (1 / 7)
        return (top + ramp * (bottom - top)) ** 7.0
    if name == "exponential":
        return np.exp(np.linspace(math.log(high), math.log(low), n))
    if name == "beta":
        return np.array([low + beta_quantile(1 - r) * (high - low) for r in ramp])
    table = AYS[config.ays]
    if n + 1 == len(table):
        return np.array(table[:-1], dtype=np.float32).astype(float)
    return np.exp(np.interp(np.linspace(0, 1, n + 1), np.linspace(0, 1, len(table)), np.log(table)))[:-1]


def grid(
    config: SchedulerConfig,
    n: int,
    family: Family,
    schedule: str | None = None,
    *,
    last: str = "zero",
    timesteps: Sequence[float] | None = None,
    sigma_list: Sequence[float] | None = None,
) -> list[Point]:
    """The points of an n-step way down, noisiest first, and one more: where it ends. (n is ignored with explicit
    lists.)

    `schedule` is a name of SCHEDULES, or None for the model's own. `last` is the noise level of the end: "zero",
    "sigma_min" (that of timestep 0) or "repeat" (that of the last point). `timesteps` or `sigma_list` (without the
    final zero) take its place. Sigmas are fp32 values, as released. Raises ConfigError for unknown names, and when
    there is no room for n points.
    """
    table = sigmas(config)
    log_table = np.log(table)
    spacing = schedule if schedule in SPACINGS else config.spacing or family.spacing
    check_choice("final_sigma", last, ("zero", "sigma_min", "repeat"))
    own = timesteps is not None or sigma_list is not None
    if sigma_list is not None:
        sigma = np.asarray(sigma_list, dtype=np.float32)
        t = timestep_of(sigma.astype(float), log_table)
        t = t.round() if family.whole else t
    elif timesteps is not None:
        t = np.asarray(timesteps, dtype=float)
        if not ((t >= 0) & (t < len(table))).all():
            raise ConfigError(f"timesteps must lie between 0 and {len(table) - 1}, found {timesteps}")
        sigma = np.interp(t, np.arange(len(table)), table)
    elif schedule == "sgm_uniform":
        t = np.linspace(config.train_steps - 1, 0, n + 1)[:-1]
        t = t.round() if family.whole else t
        sigma = np.exp(np.interp(t, np.arange(len(table)), log_table))
    else:
        t = spaced(config, n, spacing, family)
        t = t if family.double else t.astype(np.float32)
        sigma = np.interp(t, np.arange(len(table)), table)
        if schedule not in SPACINGS and schedule is not None:
            high, low = (table[-1], table[0]) if family.full_range else (sigma[0], sigma[-1])
            sigma = curve(config, n, schedule, float(high), float(low))
            t = timestep_of(sigma, log_table)
            if schedule == "karras" and family.round_karras:
                t = t.round()
            t = np.trunc(t) if family.whole else t
    if not family.double and not family.round_karras:
        t = t.astype(np.float32)
    sigma = sigma.astype(np.float32)
    if not (len(sigma) and sigma[-1] > 0 and (np.diff(sigma) < 0).all()):
        where = "levels of your own" if own else f"the schedule {schedule or spacing!r}"
        raise ConfigError(
            f"{len(sigma)} steps do not fit {where}: the noise levels must fall from each to the next; use fewer"
        )
    points = [Point(t, s, 1 / (s * s + 1)) for t, s in zip(t.tolist(), sigma.tolist(), strict=True)]
    end = {"zero": 0.0, "sigma_min": min(float(table[0]), points[-1].sigma), "repeat": points[-1].sigma}[last]
    return points + [Point(0.0, end, 1 / (end * end + 1))]


def table_point(config: SchedulerConfig, t: int) -> Point:
    """The noise level of an integer timestep, alpha_bar as in the table (it may be exactly 0, and sigma infinite).
    Below timestep 0 lies the clean end; or, as `set_alpha_to_one=False` says, the level of timestep 0 once more."""
    level = 1.0 if t < 0 and config.set_alpha_to_one else levels(config)[max(t, 0)]
    return Point(float(t), math.sqrt((1 - level) / level) if level else math.inf, level)


@lru_cache(maxsize=64)
def levels(config: SchedulerConfig) -> tuple[float, ...]:
    """`alpha_bars` as floats."""
    return tuple(alpha_bars(config).tolist())


def distilled(config: SchedulerConfig, n: int) -> list[int]:
    """Timesteps of lcm and tcd, falling: n of the `original_steps` that the student saw. Source: LCM (2310.04378)
    sec. 4.3."""
    check_count(n, config.original_steps, "steps of a distilled sampler")
    seen = [k * (config.train_steps // config.original_steps) - 1 for k in range(config.original_steps, 0, -1)]
    return [seen[math.floor(i)] for i in np.linspace(0, len(seen), n, endpoint=False)]


@dataclass(frozen=True)
class Step:
    """One evaluation of the network and the move after it. All numbers are Python floats, worked out beforehand.

    On entering, x = signal * x0 + noise * n with n ~ N(0, 1). The network is handed x * input_scale and the
    timestep t, and its output turns into x0 = x0_from_x * x + x0_from_out * output, whatever it was trained to
    predict.
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


def beta_quantile(p: float, a: float = 0.6) -> float:
    """The value below which a share p of the symmetric Beta(a, a) distribution lies, to fp64 rounding.

    Newton's method on the distribution function I_x(a, a), kept inside a shrinking bracket; the lower half is
    enough since the distribution is symmetric. I_x is the continued fraction of DLMF 8.17.22."""
    if p <= 0 or p >= 1:
        return float(p >= 1)
    if p > 0.5:
        return 1 - beta_quantile(1 - p, a)
    log_norm = 2 * math.lgamma(a) - math.lgamma(2 * a)
    low, high = 0.0, 0.5
    x = min(0.5, (p * a * math.exp(log_norm)) ** (1 / a))  # exact as x -> 0
    for _ in range(100):
        density = math.exp((a - 1) * (math.log(x) + math.log1p(-x)) - log_norm)
        f = 1.0  # the fraction 1 / (1 + d1 / (1 + d2 / ...)), evaluated from its tail
        for m in range(60, 0, -1):
            odd = -(a + m) * (2 * a + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
            even = m * (a - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
            f = 1 + even / (1 + odd / f)
        f = 1 - 2 * a * x / ((a + 1) * f)  # d1 = -a (2a) x / (a (a + 1))
        share = density * x * (1 - x) / (a * f)
        low, high = (x, high) if share < p else (low, x)
        step = x - (share - p) / density
        new = step if low < step < high else (low + high) / 2
        if abs(new - x) <= 1e-16 * x:
            break
        x = new
    return x
