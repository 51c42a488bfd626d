"""Optimisers by name, each from the library that keeps it, and the learning rate of a step.

AdamW, Adafactor and SGD are torch's. The others are installed by who wants them: `adamw8bit` is bitsandbytes', `prodigy` is
prodigyopt's, `lion` is lion-pytorch's; where one is missing the error says so. Nothing here has a state of its own.

Source: Loshchilov & Hutter 2019 (AdamW), Dettmers et al. 2022 (8 bit), Shazeer & Stern 2018 (Adafactor), Mishchenko & Defazio
2023 (Prodigy), Chen et al. 2023 (Lion).
"""

import importlib.util
import math
from collections.abc import Callable

import torch
from torch import nn

from sdcore.errors import TrainingError

from .task import LoopOptions

NEEDS = {
    "adamw8bit": "bitsandbytes",
    "prodigy": "prodigyopt",
    "lion": "lion_pytorch",
}  # optimiser: what it is imported from
OPTIMISERS = ("adamw", "adamw8bit", "adafactor", "prodigy", "lion", "sgd")
SCHEDULES = ("constant", "linear", "cosine")


def check(options: LoopOptions) -> None:
    """TrainingError where the optimiser or schedule is unknown, its library is missing, or its learning rate makes no sense."""
    for name, known in (("optimiser", OPTIMISERS), ("schedule", SCHEDULES)):
        if getattr(options, name) not in known:
            raise TrainingError(f"--{name}: expected one of {', '.join(known)}, found {getattr(options, name)!r}")
    library = NEEDS.get(options.optimiser)
    if library and importlib.util.find_spec(library) is None:
        raise TrainingError(
            f"--optimiser {options.optimiser}: needs {library}, which is not installed; "
            f"`pip install {library.replace('_', '-')}`, or choose another"
        )
    if options.optimiser == "prodigy" and options.lr < 0.1:
        raise TrainingError(
            f"--lr: prodigy finds the rate itself and is multiplied by --lr, usually 1; found {options.lr}"
        )


def build(
    parameters: dict[str, nn.Parameter], rate_of: Callable[[str], float], options: LoopOptions
) -> torch.optim.Optimizer:
    """The optimiser over named parameters. Its groups carry `factor`, by which `rate_of` multiplies their learning rate.

    Vectors (biases, norms) do not decay. TrainingError as of `check`, and for prodigy with more than one factor.
    """
    check(options)
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for decay, dims in ((options.weight_decay, range(2, 99)), (0.0, range(2))):
        for name, p in parameters.items():
            if p.ndim in dims:
                groups.setdefault((rate_of(name), decay), []).append(p)
    tables: list[dict] = [
        {"params": ps, "weight_decay": decay, "factor": factor} for (factor, decay), ps in groups.items()
    ]
    lr, betas = options.lr, (0.9, options.beta2)
    if options.optimiser == "adamw":
        return torch.optim.AdamW(tables, lr=lr, betas=betas, fused=True)
    if options.optimiser == "adafactor":
        return torch.optim.Adafactor(tables, lr=lr)
    if options.optimiser == "sgd":  # no momentum; its decay is part of the gradient
        return torch.optim.SGD(tables, lr=lr)
    if options.optimiser == "lion":
        from lion_pytorch import Lion

        return Lion(tables, lr=lr, betas=betas)
    if options.optimiser == "prodigy":
        if len({factor for factor, _ in groups}) > 1:
            raise TrainingError("--optimiser prodigy: keeps one rate for all; leave out the options that set several")
        from prodigyopt import Prodigy

        return Prodigy(tables, lr=lr, betas=betas, use_bias_correction=True, safeguard_warmup=True)
    from bitsandbytes.optim import AdamW8bit

    return AdamW8bit(tables, lr=lr, betas=betas)


def learning_rate(o: LoopOptions, step: int) -> float:
    """Linear warm-up, the schedule, linear cooldown. A constant one does not know the run's length before the cooldown."""
    rise = (step + 1) / max(o.warmup, 1)
    fall = (o.steps - step) / max(o.cooldown, 1)
    gone = min(max(step - o.warmup, 0) / max(o.steps - o.warmup, 1), 1.0)
    shape = {"constant": 1.0, "linear": 1 - gone, "cosine": (1 + math.cos(math.pi * gone)) / 2}[o.schedule]
    return o.lr * min(1.0, rise, fall) * shape
