"""Whole models in the bench: `sdcore bench unet|pipeline|train`.

The models are the released ones in every size, with random weights: speed does not hang on what they know, and nothing need be
downloaded. Contestants draw the same picture, from the same noise and the same encoded text: our pipeline as written, the same
with kernels, compiled, accelerated, and diffusers' pipeline eager and compiled where it is installed.

    unet       what a step with guidance costs: the time of a long run less that of a short one, over the steps between them
    pipeline   what a picture costs (30 steps and the decoder; the text encoders apart), and what precision does to a real one
    train      what forward and backward cost, a sample

All contestants take turns in every round, so that what the machine does besides falls on all alike; medians are reported.

Legend: b pictures, k text tokens, d text width, c h w latent.
"""

import copy
import signal
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from sdcore.kernels import common, measure, peers, shapes
from sdcore.kernels.engine import Accelerated
from sdcore.kernels.peers import Contestant
from torch import Tensor, nn

from sdcore import kernels, ops
from sdcore.clip import CLIP_L, OPEN_CLIP_BIGG, OPEN_CLIP_H, CLIPText, CLIPTextConfig
from sdcore.errors import ConfigError
from sdcore.pipeline import Conditions, Pipeline
from sdcore.scheduler import SD2_V_SCHEDULER, SD15_SCHEDULER, SDXL_SCHEDULER, SchedulerConfig
from sdcore.tokenizer import END, START, Tokenizer
from sdcore.unet import SD15, SD21_V, SDXL, UNet, UNetConfig
from sdcore.vae import SD_VAE, SDXL_VAE, VAE, VAEConfig

TOKENS = 77
SHORT, LONG = 5, 25  # steps
IMAGE = 30  # steps of a whole picture
ROUNDS = 5


@dataclass(frozen=True)
class Model:
    """A released model, or one small enough for a test."""

    unet: UNetConfig
    vae: VAEConfig
    texts: tuple[CLIPTextConfig, ...]
    scheduler: SchedulerConfig
    batch: int  # samples of a training step


_SMALL = replace(
    SD15, channels=(32, 64), layers=1, depths=(1, 0), heads=(2, 2), context_dim=48, cross_only=(False, False),
    sample_size=8, norm_groups=8,
)  # fmt: skip
_SMALL_TEXT = CLIPTextConfig(width=48, layers=1, heads=2, mlp=96, vocab=100, eos_id=99)
MODELS = {
    "SD1.5 512": Model(SD15, SD_VAE, (CLIP_L,), SD15_SCHEDULER, 8),
    "SDXL 1024": Model(SDXL, SDXL_VAE, (CLIP_L, OPEN_CLIP_BIGG), SDXL_SCHEDULER, 2),
    "SD2.1 768": Model(SD21_V, SD_VAE, (OPEN_CLIP_H,), SD2_V_SCHEDULER, 4),
    "SD1.5 256": Model(replace(SD15, sample_size=32), SD_VAE, (CLIP_L,), SD15_SCHEDULER, 2),
    "small": Model(_SMALL, VAEConfig((16, 32), layers=1, norm_groups=8), (_SMALL_TEXT,), SD15_SCHEDULER, 2),
}
ON_GPU, ON_CPU = ("SD1.5 512", "SDXL 1024"), ("small",)


def bench(
    what: str,
    names: Sequence[str],
    device: torch.device,
    dtype: torch.dtype,
    *,
    rivals: bool = True,
    rounds: int = ROUNDS,
    deadline: float = float("inf"),
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """The document of `sdcore bench unet|pipeline|train` for the named models; see `bench.try_kernels` for the rest.

    Raises ConfigError for a model that is none.
    """
    for name in names:
        if name not in MODELS:
            raise ConfigError(f"no model called {name!r}; there are {', '.join(MODELS)}")
    roof = measure.roof(device, dtype)
    document: dict[str, Any] = {
        "what": what, **measure.header(device), "dtype": common.name_of(dtype), "roof": roof._asdict(), "rows": [],
        "left_out": [],
    }  # fmt: skip
    missing = [] if find_spec("diffusers") or not rivals else ["diffusers (not installed)"]
    document["left_out"] += missing
    one = {"unet": steps, "pipeline": pictures, "train": training}[what]
    for name in names or (ON_GPU if device.type == "cuda" else ON_CPU):
        say(f"{name}, {document['dtype']}, {document['machine']['name']}" + "".join(f"; without {m}" for m in missing))
        for row in one(name, device, dtype, roof, rivals and not missing, rounds, deadline):
            document["rows"].append(row)
            say(line(row))
    if what == "pipeline":
        document["precision"] = precision(device, dtype)
        say(
            f"a real picture of the bundled model, accelerated in {document['dtype']}, from fp32: {document['precision']}"
        )
    return document


def line(row: dict[str, Any]) -> str:
    """A row for people."""
    numbers = [f"{key} {value:.4g}" for key, value in row.items() if isinstance(value, float)]
    chosen = [f"    {words}" for words in row.get("chosen", [])]
    return "\n".join([f"  {row['by']:22} {', '.join(numbers)} {row.get('why', '')}", *chosen])


# ----------------------------------------------------------------------------------------------------------- contestants


def build(name: str, device: torch.device, dtype: torch.dtype, seed: int = 0) -> Pipeline:
    """A pipeline with random weights, for texts that are encoded already: its tokenizer knows no word."""
    model = MODELS[name]
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), torch.device(device):
        torch.manual_seed(seed)
        unet, vae = UNet(model.unet), VAE(model.vae)
    for part in (unet, vae):
        part.to(dtype).eval().requires_grad_(False)
    return Pipeline(unet, vae, [], [Tokenizer({START: 0, END: 1}, [])], model.scheduler, device=device)


def told(pipe: Pipeline, seed: int) -> Conditions:
    """Random conditions for one picture."""
    config, generator = pipe.unet.config, torch.Generator().manual_seed(seed)
    context = torch.randn(1, TOKENS, config.context_dim, generator=generator)
    width = config.added_dim - 6 * config.added_time_dim
    pooled = torch.randn(1, width, generator=generator).to(pipe.device) if config.added_dim else None
    return Conditions(context.to(pipe.device), pooled)


def start(pipe: Pipeline) -> Tensor:
    """The noise that everyone starts from [1, c, h, w]."""
    side = pipe.unet.config.sample_size
    return torch.randn(1, pipe.unet.config.in_channels, side, side, generator=torch.Generator().manual_seed(7))


def ours(pipe: Pipeline) -> Contestant:
    """How a pipeline of ours draws."""
    positive, negative, noise = told(pipe, 1), told(pipe, 2), start(pipe)
    side = pipe.unet.config.sample_size * pipe.vae.config.factor

    def draw(steps: int) -> Tensor:
        return pipe(
            positive, negative, steps=steps, guidance=7.5, sampler="euler", schedule="leading", noise=noise,
            size=(side, side), output="latent",
        ).latents  # fmt: skip

    return Contestant(draw, pipe.decode, pipe.table if isinstance(pipe, Accelerated) else str)


def with_kernels(plain: Contestant) -> Contestant:
    """The same, with a kernel for every operation."""

    def within(function: Callable[[Any], Tensor]) -> Callable[[Any], Tensor]:
        def run(x: Any) -> Tensor:
            with ops.using(**kernels.for_ops()):
                return function(x)

        return run

    return Contestant(within(plain.draw), within(plain.decode))


def compiled(pipe: Pipeline) -> Pipeline:
    """The same pipeline with the UNet's step and the decoder compiled."""
    unet, vae = copy.copy(pipe.unet), copy.copy(pipe.vae)
    unet.step = torch.compile(pipe.unet.step, mode="max-autotune-no-cudagraphs")  # type: ignore[method-assign]
    vae.decode = torch.compile(pipe.vae.decode, mode="max-autotune-no-cudagraphs")  # type: ignore[method-assign]
    return replace(pipe, unet=unet, vae=vae)


def contestants(pipe: Pipeline, rivals: bool) -> dict[str, Callable[[], Contestant]]:
    """Who takes part, each still to be made; the quick ones first."""
    found: dict[str, Callable[[], Contestant]] = {
        "sdcore accelerated": lambda: ours(kernels.accelerate(pipe)),
        "sdcore": lambda: ours(pipe),
    }
    if common.can_run(pipe.unet.conv_in.weight):
        found["sdcore with kernels"] = lambda: with_kernels(ours(pipe))
    if rivals:
        given = (pipe, told(pipe, 1), told(pipe, 2), start(pipe).to(pipe.device))
        found["diffusers"] = lambda: peers.pipeline(*given, fastest=False)
        if pipe.device.type == "cuda":
            found["diffusers compiled"] = lambda: peers.pipeline(*given, fastest=True)
    if pipe.device.type == "cuda":
        found["sdcore compiled"] = lambda: ours(compiled(pipe))
    return found


def lossy(pipe: Pipeline) -> dict[str, Callable[[], Contestant]]:
    """Who draws other pictures, sooner: named so, and never compared without the distance."""
    ways: dict[str, dict[str, Any]] = {
        "deep levels every 2 steps": {"deep_every": 2},
        "deep levels every 3 steps": {"deep_every": 3},
        "half the tokens merged": {"merge": 0.5},
    }
    if pipe.device.type == "cuda" and torch.cuda.get_device_capability(pipe.device) >= (8, 9):
        ways["fp8"] = {"fp8": True}  # elsewhere it is emulated: no faster
    return {
        f"sdcore lossy: {name}": lambda options=options: ours(kernels.accelerate(pipe, **options))  # type: ignore[misc]
        for name, options in ways.items()
    }


class OutOfTimeError(Exception):
    """Making or warming up a contestant took longer than there was."""


@contextmanager
def limited(deadline: float) -> Iterator[None]:
    """Inside the `with`, OutOfTimeError is raised at the deadline (of `time.monotonic`)."""
    if deadline == float("inf"):
        yield
        return

    def over(*_: object) -> None:
        raise OutOfTimeError("no time left")

    before = signal.signal(signal.SIGALRM, over)
    signal.setitimer(signal.ITIMER_REAL, max(deadline - time.monotonic(), 0.001))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def ready(
    made: dict[str, Callable[[], Any]], warm: Callable[[Any], Any], deadline: float
) -> tuple[dict, dict[str, str]]:
    """Make and warm up every contestant: (those who can, why the others cannot). One that fails must not cost the others."""
    able, unable = {}, {}
    for name, make in made.items():
        try:
            with limited(deadline):
                able[name] = make()
                warm(able[name])
        except Exception as error:  # whatever it is, it is reported
            able.pop(name, None)
            unable[name] = f"FAILED: {type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:160]}"
    return able, unable


# ----------------------------------------------------------------------------------------------------------- a UNet's step


def steps(
    name: str, device: torch.device, dtype: torch.dtype, roof: measure.Roof, rivals: bool, rounds: int, deadline: float
) -> Iterator[dict[str, Any]]:
    """What a step with guidance costs each contestant, and how far its latents are from those of fp32."""
    pipe = build(name, device, dtype)
    made = contestants(pipe, rivals) | lossy(pipe)
    able, unable = ready(made, lambda one: [one.draw(n) for n in (SHORT, LONG)], deadline)  # a graph a number of steps
    exact = ours(build(name, device, torch.float32)).draw(LONG)
    work = sum(call.shape.flop * call.times for call in shapes.calls(model=name)) if name in shapes.MODELS else 0

    def pair(one: Contestant) -> float:
        short, long = (measure.once(partial(one.draw, n), device) for n in (SHORT, LONG))
        return (long - short) / (LONG - SHORT)

    samples = turns(able, pair, rounds)
    for by, found in samples.items():
        ms = statistics.median(found)
        away = relative(able[by].draw(LONG), exact)
        row: dict[str, Any] = {"model": name, "by": by, "ms": ms, "its": 1e3 / ms, "relative": away}
        if work:
            row |= {"tflops": work / ms / 1e9, "percent": 100 * roof.floor(work, 0) / ms}
        yield row | {"chosen": able[by].chosen().splitlines()}
    yield from ({"model": name, "by": by, "why": why} for by, why in unable.items())


def turns(able: dict[str, Any], time_one: Callable[[Any], float], rounds: int) -> dict[str, list[float]]:
    """One measurement of each contestant a round."""
    samples: dict[str, list[float]] = {by: [] for by in able}
    for _ in range(rounds):
        for by, contestant in able.items():
            samples[by].append(time_one(contestant))
    return samples


def relative(x: Tensor, exact: Tensor) -> float:
    """Distance over length."""
    return float((x.double() - exact.double()).norm() / exact.double().norm())


# --------------------------------------------------------------------------------------------------------------- a picture


def pictures(
    name: str, device: torch.device, dtype: torch.dtype, roof: measure.Roof, rivals: bool, rounds: int, deadline: float
) -> Iterator[dict[str, Any]]:
    """What a picture costs each contestant, and the decoder alone; the text encoders in a row of their own."""
    pipe = build(name, device, dtype)
    able, unable = ready(contestants(pipe, rivals), lambda one: one.decode(one.draw(IMAGE)), deadline)
    latents = torch.randn_like(start(pipe)).to(device)
    drawn = turns(able, lambda one: measure.once(lambda: one.decode(one.draw(IMAGE)), device), rounds)
    decoded = turns(able, lambda one: measure.once(lambda: one.decode(latents), device), 4 * rounds)
    for by in able:
        yield {
            "model": name,
            "by": by,
            "ms": statistics.median(drawn[by]),
            "decode_ms": statistics.median(decoded[by]),
        }
    yield from ({"model": name, "by": by, "why": why} for by, why in unable.items())
    with torch.device(device):
        towers = [CLIPText(config).to(dtype).eval() for config in MODELS[name].texts]
        ids = [torch.randint(0, config.vocab, (2, config.positions)) for config in MODELS[name].texts]
    with torch.no_grad():
        text = measure.milliseconds([lambda: [tower(i) for tower, i in zip(towers, ids, strict=True)]], device)
    yield {"model": name, "by": "text encoders", "ms": text.ms}


def precision(device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """A real picture drawn accelerated in `dtype` and plainly in fp32: the pixels' differences in 1/255, and the PSNR in dB."""
    import sdcore

    def draw(fast: bool) -> Tensor:
        pipe = sdcore.load("tiny", device=str(device), dtype=dtype if fast else torch.float32)
        pipe = kernels.accelerate(pipe) if fast else pipe
        made = pipe("a small red circle left of a large blue square", steps=20, seed=3)
        return (made.pixels.clamp(-1, 1) + 1) * 127.5

    difference = (draw(True) - draw(False)).abs()
    square = float((difference**2).mean())
    psnr = 10 * torch.tensor(255**2 / max(square, 1e-12)).log10()
    return {"most": float(difference.max()), "average": float(difference.mean()), "psnr": float(psnr)}


# --------------------------------------------------------------------------------------------------------- a training step


def training(
    name: str, device: torch.device, dtype: torch.dtype, roof: measure.Roof, rivals: bool, rounds: int, deadline: float
) -> Iterator[dict[str, Any]]:
    """What forward and backward through the UNet cost each contestant, all parameters trained, no checkpointing."""
    model, pipe = MODELS[name], build(name, device, dtype)
    unet = pipe.unet.requires_grad_(True).train()
    side, n, g = model.unet.sample_size, model.batch, torch.Generator().manual_seed(0)
    x, target = (torch.randn(n, model.unet.in_channels, side, side, generator=g).to(device, dtype) for _ in range(2))
    x = x.contiguous(memory_format=torch.channels_last)
    t, one = torch.linspace(1, 990, n, device=device), told(pipe, 1)
    context = one.context.expand(n, -1, -1).to(dtype)
    added = None if one.pooled is None else (one.pooled.expand(n, -1).to(dtype), torch.ones(n, 6, device=device))

    def learning(module: nn.Module | Callable[..., Tensor], by_kernels: bool = False) -> Callable[[], None]:
        def step() -> None:
            unet.zero_grad(set_to_none=True)
            with ops.using(**(kernels.for_ops() if by_kernels else {})):
                loss = F.mse_loss(module(x, t, context, added).float(), target.float())
                loss.backward()

        return step

    def theirs() -> Callable[..., Tensor]:
        twin = peers.twin(unet, peers.unet_of).requires_grad_(True).train()
        more = None if added is None else {"text_embeds": added[0], "time_ids": added[1]}

        def forward(x: Tensor, t: Tensor, context: Tensor, _added: object) -> Tensor:
            return twin(x, t, context, added_cond_kwargs=more).sample

        return forward

    gpu = device.type == "cuda"
    made: dict[str, Callable[[], Callable[[], None]]] = {"sdcore": lambda: learning(unet)}
    if common.can_run(x):
        made["sdcore with kernels"] = lambda: learning(unet, True)
    if rivals:
        made["diffusers"] = lambda: learning(theirs())
    if gpu:
        made["sdcore with kernels compiled"] = lambda: learning(torch.compile(unet, fullgraph=True), True)
        made["sdcore compiled"] = lambda: learning(torch.compile(unet, fullgraph=True))
        if rivals:
            made["diffusers compiled"] = lambda: learning(torch.compile(theirs()))
    able, unable = ready(made, lambda step: step(), deadline)
    work = sum(call.shape.flop * call.times for call in shapes.calls(model=name)) if name in shapes.MODELS else 0
    work *= 3 * n // 2  # the table is of batch 2; backward is twice forward
    for by, found in turns(able, lambda step: measure.once(step, device), rounds).items():
        ms = statistics.median(found)
        row: dict[str, Any] = {"model": name, "by": by, "ms": ms, "samples_s": 1e3 * n / ms}
        if work:
            row |= {"tflops": work / ms / 1e9, "percent": 100 * roof.floor(work, 0) / ms}
        if gpu:
            torch.cuda.reset_peak_memory_stats(device)
            able[by]()
            row["peak_gib"] = torch.cuda.max_memory_allocated(device) / 2**30
        yield row
    yield from ({"model": name, "by": by, "why": why} for by, why in unable.items())
