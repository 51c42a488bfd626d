"""What a training method is to the loop: options that all methods share, and `Task`, which a method fills in.

A method says which parameters train and what the loss of a part of a batch is; `loop.run` does everything else. Two rules make a
run exact to resume and its result the same however a batch is cut:

1. Everything random is a function of (seed, step, place of the example in the batch), and the examples of a step are a
   function of the step. So the position in the random streams and in the data *is* the step number; nothing else is kept.
2. A loss is a mean together with its `count`, what it is a mean over. The loop averages the gradients of all passes and
   processes by these counts: the mean over the whole batch, also where parts weigh differently (masks, a short last part).
"""

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from .options import option
from .ranks import Ranks


@dataclass(frozen=True)
class LoopOptions:
    """What every method shares."""

    out: str = option(
        "runs/new", "folder of the run: checkpoints, log.jsonl, loss.png, and at the end the result", free=True
    )
    resume: bool = option(False, "go on from the newest checkpoint in --out that verifies", free=True)
    accept_changes: bool = option(
        False, "resume although options or data differ; the difference is written to the log", free=True
    )
    steps: int = option(
        1000, "steps of the whole run (may be changed on resume, before the cooldown has begun)", free=True
    )
    batch: int = option(64, "examples a step, over all passes and processes")
    accumulate: int = option(
        1, "passes that a step's batch is cut into, to save memory; the gradient is that of the whole"
    )
    precision: str = option(
        "fp32", "of the computation: fp32, bf16 or fp16 (with a loss scaler); what trains stays fp32"
    )
    optimiser: str = option(
        "adamw", "adamw, adamw8bit (bitsandbytes), adafactor, prodigy (prodigyopt), lion (lion-pytorch) or sgd"
    )
    fused_step: bool = option(
        False,
        "step each parameter in the backward pass, as soon as it has its gradient, and let that go; with --accumulate 1 --clip 0",
    )
    shard: bool = option(
        False, "under torchrun: each process keeps only its share of weights, average and optimiser (FSDP2)"
    )
    lr: float = option(1e-3, "peak learning rate; about a third of it for lion, 1 for prodigy, which finds it itself")
    schedule: str = option(
        "constant", "of the learning rate between warm-up and cooldown: constant, linear or cosine (to 0)"
    )
    warmup: int = option(100, "steps in which the learning rate rises to its peak")
    cooldown: int = option(200, "last steps, in which it falls linearly to nearly nothing; constant in between")
    weight_decay: float = option(0.01, "decoupled weight decay, on matrices and kernels only")
    beta2: float = option(
        0.99, "decay of the squared gradient in adamw, adamw8bit and prodigy, of the direction in lion"
    )
    clip: float = option(1.0, "longest gradient that is applied unshortened; 0: none is shortened")
    ema: float = option(
        0.999, "decay of the moving average of what trains, which is what is evaluated and exported; 0: no average"
    )
    seed: int = option(0, "seed of everything")
    threads: int = option(2, "CPU threads; part of the result's last bits")
    save_every: int = option(500, "steps between checkpoints", free=True)
    keep: int = option(2, "checkpoints kept", free=True)
    log_every: int = option(20, "steps between lines of log.jsonl", free=True)
    eval_every: int = option(0, "steps between evaluations of the averaged weights; 0: never", free=True)
    best: str | None = option(
        None,
        "figure of the evaluations, such as validation_loss:min or right:max, whose best checkpoint is kept and exported",
    )
    tensorboard: bool = option(False, "write the figures for TensorBoard too, to --out/tensorboard", free=True)


@dataclass(frozen=True)
class Part:
    """The share of a step's batch that one pass looks at: examples `places` of 0..batch-1."""

    seed: int
    step: int
    batch: int
    places: range

    def common(self) -> torch.Generator:
        """The stream of the step, the same in every pass: draw for all `batch` examples, then take the `places`."""
        return generator(self.seed, self.step)

    def own(self) -> list[torch.Generator]:
        """A stream for each example, whatever part it is in."""
        return [generator(self.seed, self.step, place) for place in self.places]

    def of(self, whole: Tensor) -> Tensor:
        """The rows of a tensor over the whole batch [batch, ...] that are this part's; the tensor itself where all are."""
        return whole if len(self.places) == self.batch else whole[self.places.start : self.places.stop]


@dataclass(frozen=True)
class Loss:
    """A mean, what it is a mean over, and figures for the log."""

    mean: Tensor  # []
    count: float | Tensor = (
        1.0  # its weight among the other parts of the batch: examples, tokens, or what masks show of them
    )
    figures: dict[str, float] = field(default_factory=dict)


class Task:
    """One method. Subclasses set `modules` and fill in `loss`; the other methods have harmless defaults."""

    modules: dict[str, nn.Module]  # everything that is saved in checkpoints; what has requires_grad is trained
    ended: str | None = None  # why no further step is wanted, such as a guard's rule; set by `evaluate`
    # Whether the run has been told to stop, for steps that may wait long; set by the loop.
    stopping: Callable[[], bool] = staticmethod(lambda: False)

    def loss(self, part: Part) -> Loss:
        """The loss of a part of the batch of step `part.step`; random numbers from `part` alone, data by step and places."""
        raise NotImplementedError

    def rate_of(self, name: str) -> float:
        """A factor on the learning rate of the parameter `name` (as in checkpoints: "unet.conv_in.weight")."""
        return 1.0

    def identity(self) -> dict[str, object]:
        """What the data and the frozen models are; a resumed run must find the same."""
        return {}

    def prepare(self, ranks: Ranks) -> None:
        """Called once, before anything is made for the first step; a run that cannot be is refused here."""

    @contextmanager
    def together(self) -> Iterator[None]:
        """Inside the `with`, in which the run is evaluated and exported, every network is where it can work."""
        yield

    def validate(self) -> float | None:
        """The loss on held-out examples at fixed noise and timesteps, the averaged weights in place; None: there are none."""
        return None

    def evaluate(self, step: int, out: Path) -> dict[str, float]:
        """Figures of the averaged weights, which are in place during the call; sheets of pictures go to `out`."""
        return {}

    def export(self, out: Path) -> None:
        """Write the result; the averaged weights are in place during the call."""


def generator(*key: int) -> torch.Generator:
    """The random stream of (seed, step, ...): seeded by a hash, so neighbouring steps and seeds share nothing."""
    digest = hashlib.sha256(" ".join(map(str, key)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def channels_last(module: nn.Module) -> None:
    """Lay out convolution weights with the channels innermost, in place: the same numbers, a fifth faster on a CPU."""
    module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
