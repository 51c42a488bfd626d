"""What a step of LoRA training costs, beside diffusers and PEFT: `python -m sdcore.train.bench`, and in `make gpu PART=train`.

The same step for everyone: one latent with its noise, timestep and text, all at hand; a LoRA of rank 16 in fp32 on the four
projections of every attention of a frozen UNet in bf16; forward, backward, clipping, AdamW; no block recomputed. Ours is
`State.take`, the step of every run of ours; theirs is written as in diffusers' training scripts. The models are the released ones
in every size, with random weights (kernels/models.py) that all share; everyone takes turns, and medians are reported.

On a GPU: SD1.5 at 512 px and SDXL at 1024 px, with the peak of memory. On a CPU: a model small enough for a test.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from sdcore.kernels import common, measure, models, peers
from torch import Tensor, nn

from sdcore import kernels, ops
from sdcore.pipeline import Pipeline

from .lora import ChangeOptions, LoRA
from .ranks import Ranks
from .state import State
from .task import LoopOptions, Loss, Part, Task

RANK = 16
OURS, THEIRS = "sdcore", "diffusers + PEFT"
Step = Callable[[], None]


@dataclass(frozen=True)
class Given:
    """What everybody's step is given."""

    x: Tensor  # [1, c, h, w], noised
    noise: Tensor
    t: Tensor  # [1]
    context: Tensor  # [1, s, d]
    added: tuple[Tensor, Tensor] | None  # XL: pooled text [1, p], sizes [1, 6]

    def loss(self, unet: Callable[..., Tensor]) -> Tensor:
        return F.mse_loss(unet(self.x, self.t, self.context, self.added).float(), self.noise)


def given(pipe: Pipeline) -> Given:
    """Random numbers of the model's sizes, on its device, in its dtype."""
    like, told, x = next(pipe.unet.parameters()), models.told(pipe, 1), models.start(pipe)
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(8)).to(like.device)
    sizes = None if told.pooled is None else (told.pooled.to(like), torch.full((1, 6), 1024.0, device=like.device))
    return Given(x.to(like), noise, torch.tensor([500], device=like.device), told.context.to(like), sizes)


class Fed(Task):
    """A LoRA's loss on what is given."""

    def __init__(self, unet: Callable[..., Tensor], learned: nn.Module, fed: Given):
        self.unet, self.fed, self.modules = unet, fed, {"lora": learned}

    def loss(self, part: Part) -> Loss:
        return Loss(self.fed.loss(self.unet))


def ours(pipe: Pipeline, learned: LoRA, unet: Callable[..., Tensor], by_kernels: bool, precision: str) -> Step:
    """The step of our loop."""
    state = State(Fed(unet, learned, given(pipe)), LoopOptions(batch=1, precision=precision, ema=0.0), Ranks())

    def step() -> None:
        with ops.using(**(kernels.for_ops() if by_kernels else {})):
            state.take(0, 1e-4)

    return step


def theirs(pipe: Pipeline, compiled: bool, dtype: torch.dtype) -> Step:
    """The step of diffusers' training scripts (train_text_to_image_lora.py), on the same weights."""
    import peft

    twin: Any = peers.twin(pipe.unet, peers.unet_of)
    twin.add_adapter(peft.LoraConfig(r=RANK, lora_alpha=RANK, target_modules=["to_k", "to_q", "to_v", "to_out.0"]))
    trained = [p for p in twin.parameters() if p.requires_grad]
    for p in trained:
        p.data = p.data.float()
    optimiser, fed = torch.optim.AdamW(trained, lr=1e-4), given(pipe)
    more = None if fed.added is None else {"text_embeds": fed.added[0], "time_ids": fed.added[1]}
    network = torch.compile(twin) if compiled else twin

    def unet(x: Tensor, t: Tensor, context: Tensor, _added: object) -> Tensor:
        return network(x, t, context, added_cond_kwargs=more).sample

    def step() -> None:
        with torch.autocast(fed.x.device.type, dtype, enabled=dtype != torch.float32):
            loss = fed.loss(unet)
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimiser.step()
        optimiser.zero_grad()

    return step


def contestants(pipe: Pipeline, dtype: torch.dtype, rivals: bool) -> dict[str, Callable[[], Step]]:
    """Who takes part, each still to be made; the quick ones first."""
    precision = {torch.bfloat16: "bf16", torch.float32: "fp32"}[dtype]
    learned = LoRA(pipe, ChangeOptions(rank=RANK), seed=0)
    unet, gpu = pipe.unet, pipe.device.type == "cuda"
    found: dict[str, Callable[[], Step]] = {OURS: lambda: ours(pipe, learned, unet, False, precision)}
    if common.can_run(unet.conv_in.weight):
        found[f"{OURS} with kernels"] = lambda: ours(pipe, learned, unet, True, precision)
    if rivals:
        found[THEIRS] = lambda: theirs(pipe, False, dtype)
    if gpu:
        found[f"{OURS} compiled"] = lambda: ours(pipe, learned, torch.compile(unet), False, precision)
        found[f"{OURS} compiled, in graphs"] = lambda: ours(
            pipe, learned, torch.compile(unet, mode="reduce-overhead"), False, precision
        )
        if rivals:
            found[f"{THEIRS} compiled"] = lambda: theirs(pipe, True, dtype)
    return found


def rows(
    name: str, device: torch.device, dtype: torch.dtype, rivals: bool, rounds: int, deadline: float
) -> list[dict[str, Any]]:
    """What a step costs each contestant: ms, steps a second, how many times that of diffusers with PEFT, GiB at most."""
    pipe = models.build(name, device, dtype)
    able, unable = models.ready(contestants(pipe, dtype, rivals), lambda step: [step() for _ in range(3)], deadline)
    found = []
    times = {
        by: statistics.median(ms) for by, ms in models.turns(able, lambda s: measure.once(s, device), rounds).items()
    }
    for by, ms in times.items():
        row: dict[str, Any] = {"model": name, "by": by, "ms": ms, "its": 1e3 / ms}
        if THEIRS in times:
            row["times"] = times[THEIRS] / ms
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            able[by]()
            row["peak_gib"] = torch.cuda.max_memory_allocated(device) / 2**30
        found.append(row)
    return found + [{"model": name, "by": by, "why": why} for by, why in unable.items()]


def bench(
    names: Sequence[str], device: torch.device, dtype: torch.dtype, rivals: bool, rounds: int, deadline: float
) -> list[dict[str, Any]]:
    """The rows of the named models, of those that fit the device where none is named; printed as they come."""
    found = []
    for name in names or (models.ON_GPU if device.type == "cuda" else models.ON_CPU):
        print(f"{name}, a LoRA of rank {RANK}, {common.name_of(dtype)}", flush=True)
        for row in rows(name, device, dtype, rivals, rounds, deadline):
            found.append(row)
            print(models.line(row), flush=True)
    return found


def main(argv: list[str] | None = None) -> int:
    """`python -m sdcore.train.bench`: prints rows, and writes them to a file as one JSON list."""
    options = argparse.ArgumentParser(prog="python -m sdcore.train.bench", description="Time a step of LoRA training.")
    options.add_argument("names", nargs="*", help=f"of {', '.join(models.MODELS)}")
    options.add_argument("--alone", action="store_true", help="nobody else's implementations")
    options.add_argument("--minutes", type=float, default=float("inf"), metavar="M", help="make nobody after so long")
    options.add_argument("--rounds", type=int, default=10, metavar="N", help="steps that are timed of each")
    options.add_argument("--json", metavar="F", help="file for the rows")
    args = options.parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    found = bench(args.names, device, dtype, not args.alone, args.rounds, time.monotonic() + 60 * args.minutes)
    if args.json:
        Path(args.json).write_text(json.dumps(found) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
