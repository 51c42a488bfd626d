"""What training changes: the weights, their moving average, the optimiser's memory and the loss scaler; and one step of it.

`State.take` is a training step from end to end. `collect` and `restore` are exact inverses by way of a checkpoint.

With --fused-step a parameter makes its step in the midst of the backward pass, as soon as its gradient is there, and lets that
go: there are never more than a few gradients in memory, where otherwise they take as much as the weights. The step is the same,
to the bit; but nothing can look at all gradients first. So none is shortened, and one that is not finite ends the run.
(Source: Lv et al. 2023, LOMO; torch's `register_post_accumulate_grad_hook`.)
"""

import contextlib
import math
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from sdcore.errors import NonFiniteError, TrainingError

from . import optimisers
from .checkpoints import Checkpoints
from .ranks import Ranks
from .task import LoopOptions, Part, Task

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Average:
    """Exponential moving average of the trained parameters (EMA); young averages forget faster, so the start does not linger."""

    def __init__(self, parameters: dict[str, nn.Parameter], decay: float):
        self.parameters, self.decay = parameters if decay else {}, decay
        self.values = {name: p.detach().clone() for name, p in self.parameters.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        if self.values:
            decay = min(self.decay, (1 + step) / (10 + step))
            torch._foreach_lerp_(list(self.values.values()), [p.detach() for p in self.parameters.values()], 1 - decay)

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """The parameters hold the average inside the `with`, and their own values, bit for bit, after it."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for name, p in self.parameters.items():
            own = p.detach().clone()
            p.copy_(self.values[name])
            self.values[name].copy_(own)


class State:
    """What training changes, and how it takes a step."""

    def __init__(self, task: Task, options: LoopOptions, ranks: Ranks):
        if options.precision not in PRECISIONS:
            raise TrainingError(f"--precision: expected {', '.join(PRECISIONS)}, found {options.precision!r}")
        self.task, self.options, self.ranks = task, options, ranks
        self.shares = ranks.shares(options.batch, options.accumulate)
        self.whole = ranks.world == options.accumulate == 1  # one pass looks at the whole batch
        self.modules = nn.ModuleDict(task.modules)
        if options.shard:
            from . import sharding

            sharding.cut(self.modules, ranks.world, options.optimiser)
        self.trained = {name: p for name, p in self.modules.named_parameters() if p.requires_grad}
        self.optimiser = optimisers.build(self.trained, task.rate_of, options)
        self.begin = [numbers(group) for group in self.optimiser.param_groups]
        self.average = Average(self.trained, options.ema)
        self.device = next(iter(self.trained.values())).device.type
        self.scaler = torch.amp.GradScaler(self.device, enabled=options.precision == "fp16")
        self.norms: list[Tensor] = []  # of the gradients that are gone already, with --fused-step
        if options.fused_step:
            self.step_in_backward()

    # ------------------------------------------------------------------------------------------------------------- a step

    def take(self, step: int, rate: float) -> dict[str, float]:
        """One step at learning rate `rate`. Its figures for the log; none, and nothing changed, where NaN appeared."""
        for group in self.optimiser.param_groups:
            group["lr"] = rate * group["factor"]
        figures = self.gradients(step)
        norm = self.shorten()
        finite = bool(torch.isfinite(norm)) and figures["loss"] * 0 == 0
        if self.options.fused_step and not finite:
            raise NonFiniteError(
                f"--fused-step: loss or gradient of step {step} was not finite, and the step has been made; "
                "the last checkpoint is from before; resume it with a lower --lr, or without --fused-step and --accept-changes"
            )
        if finite:
            self.optimiser.step()  # with --fused-step there is nothing left to do
            self.average.update(step)
        self.scaler.update()
        self.optimiser.zero_grad(set_to_none=True)
        return {**figures, "norm": norm.item()} if finite else {}

    def shorten(self) -> Tensor:
        """Scale all gradients down where together they are longer than --clip; how long they were."""
        if self.options.fused_step:
            gone, self.norms = self.norms, []
            return torch.stack(gone).norm()
        norm = nn.utils.clip_grad_norm_(self.trained.values(), self.options.clip or math.inf)
        return norm.full_tensor() if self.options.shard else norm  # type: ignore[attr-defined]

    def step_in_backward(self) -> None:
        """Have every parameter make its step as soon as it has its gradient. TrainingError where that cannot be the same step."""
        o = self.options
        if (o.accumulate, self.ranks.world, o.clip) != (1, 1, 0) or o.precision == "fp16" or o.optimiser == "prodigy":
            raise TrainingError(
                "--fused-step: no gradient waits for another, so it goes with one process, --accumulate 1, --clip 0, fp32 or "
                f"bf16, and not with prodigy; found {self.ranks.world} processes, --accumulate {o.accumulate}, --clip {o.clip}, "
                f"--precision {o.precision}, --optimiser {o.optimiser}"
            )
        for group in self.optimiser.param_groups:
            for p in group["params"]:
                p.register_post_accumulate_grad_hook(lambda p, group=group: self.step_one(p, group))

    def step_one(self, p: nn.Parameter, group: dict) -> None:
        """The optimiser's step on a single parameter of one of its groups."""
        self.norms.append(p.grad.norm())  # type: ignore[union-attr]
        groups, self.optimiser.param_groups = self.optimiser.param_groups, [group | {"params": [p]}]
        self.optimiser.step()
        self.optimiser.param_groups, p.grad = groups, None

    def gradients(self, step: int) -> dict[str, float]:
        """Leave in every parameter the gradient of the mean over the whole batch; return its figures, `loss` first.

        Each pass's mean weighs as much as its count. Sum over passes and processes first, divide by the counts of all last.
        """
        sums: dict[str, float] = {"count": 0.0}
        for places in self.shares:
            with torch.autocast(
                self.device, PRECISIONS[self.options.precision], enabled=self.options.precision != "fp32"
            ):
                loss = self.task.loss(Part(self.options.seed, step, self.options.batch, places))
            count = 1.0 if self.whole else float(loss.count)
            self.scaler.scale(loss.mean * count).backward()
            sums["count"] += count
            for name, value in {"loss": loss.mean.item(), **loss.figures}.items():
                sums[name] = sums.get(name, 0.0) + value * count
        grads = [p.grad for p in self.trained.values() if p.grad is not None]
        if not self.options.shard:  # in shards they have been added up on the way
            self.ranks.add_up(grads)
        sums = dict(zip(sums, self.ranks.totals(list(sums.values())), strict=True))
        total = sums.pop("count") or 1.0  # masks that show nothing at all: a gradient of zero
        self.scaler.unscale_(self.optimiser)
        if total != 1.0:
            torch._foreach_div_(grads, total)
        return {name: value / total for name, value in sums.items()}

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """Inside the `with`, the task's modules are what is evaluated and exported: averaged, and whole. All processes enter."""
        with contextlib.ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            stack.enter_context(self.task.together())
            stack.enter_context(self.average.in_place())
            if self.options.shard:
                from . import sharding

                stack.enter_context(sharding.whole(self.modules))
            yield

    # ------------------------------------------------------------------------------------------------ to and from a checkpoint

    def checkpoints(self, folder: Path, keep: int) -> Checkpoints:
        """A folder for the last `keep` of what `collect` gives."""
        if self.options.shard:
            from . import sharding

            return sharding.ShardedCheckpoints(folder, keep, self.ranks, self.like)
        return Checkpoints(folder, keep)

    def like(self, name: str, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        """What the tensor `name` of a checkpoint can be read into: in shards where its parameter is."""
        kind, _, rest = name.partition("/")
        p = dict(self.modules.named_parameters()).get(rest.rpartition("/")[0] if kind == "optimiser" else rest)
        return (
            torch.empty_like(p, dtype=dtype).detach()
            if p is not None and p.shape == shape
            else torch.empty(shape, dtype=dtype)
        )

    def collect(self) -> tuple[dict[str, Tensor], dict]:
        """Every tensor under a flat name (weights/…, average/…, optimiser/…/exp_avg), and the numbers beside them.

        The numbers: what the optimiser keeps as such for a parameter, what it has changed in its groups (prodigy's estimate of
        the rate), and the scaler's.
        """
        tensors = {f"weights/{k}": v for k, v in self.modules.state_dict().items()}
        tensors |= {f"average/{k}": v for k, v in self.average.values.items()}
        values: dict[str, dict] = {}
        for name, p in self.trained.items():
            for key, value in self.optimiser.state[p].items():
                if isinstance(value, Tensor):
                    tensors[f"optimiser/{name}/{key}"] = value
                elif isinstance(value, int | float):
                    values.setdefault(name, {})[key] = value
        groups = [
            {k: v for k, v in numbers(group).items() if v != begin.get(k)}
            for group, begin in zip(self.optimiser.param_groups, self.begin, strict=True)
        ]
        return tensors, {"values": values, "groups": groups, "scaler": self.scaler.state_dict()}

    @torch.no_grad()
    def restore(self, tensors: dict[str, Tensor], kept: dict) -> None:
        """The inverse of `collect`; the optimiser's tensors take the layout of their parameter, which files do not keep."""
        self.modules.load_state_dict(
            {k.removeprefix("weights/"): v for k, v in tensors.items() if k.startswith("weights/")}
        )
        for name, value in self.average.values.items():
            value.copy_(tensors.get(f"average/{name}", self.trained[name]))
        found: dict[str, dict] = {name: dict(kept["values"].get(name, {})) for name in self.trained}
        for key, tensor in tensors.items():
            if key.startswith("optimiser/"):
                name, _, what = key.removeprefix("optimiser/").rpartition("/")
                p = self.trained[name]
                like = p if tensor.shape == p.shape else tensor
                found[name][what] = torch.empty_like(like, dtype=tensor.dtype, device=p.device).copy_(tensor)
        for name, table in found.items():
            if table:
                self.optimiser.state[self.trained[name]] = table
        for group, changed in zip(self.optimiser.param_groups, kept["groups"], strict=True):
            group.update(changed)
        if self.scaler.is_enabled() and kept["scaler"]:
            self.scaler.load_state_dict(kept["scaler"])


def numbers(group: dict) -> dict[str, float]:
    """What an optimiser's group holds as plain numbers, but for the learning rate, which is set at every step."""
    return {k: v for k, v in group.items() if isinstance(v, int | float) and k != "lr"}
