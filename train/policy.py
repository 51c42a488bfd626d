"""What the methods that learn from pictures of their own have in common: `Policy`, a task over a pipeline, prompts and a reward.

    prompts -> [ UNet under guidance -> sampler ] x steps -> decoder -> what the reward says of the pictures (rewards.py)

A method (ddpo.py, draft.py) turns what the reward says into a loss. Drawing and learning call the same `denoiser`: the network
under guidance, told of the prompts, in plain forwards, so what is learnt from is bit for bit what was drawn. What trains is a
LoRA (train/lora.py) or, with `--adapter none`, the whole UNet. Guards (guards.py) watch beside it.

Which pictures a step draws is a function of its number: prompt and noise of each come from streams of their own.

Legend: n pictures, c h w latent, H W pixels, s tokens, d width of the text, p of its pooled vector.
"""

import copy
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from sdcore.weights.adapters import write_adapter
from torch import Tensor, nn

import sdcore
from sdcore import guidance
from sdcore.errors import ConfigError
from sdcore.pipeline import Pipeline
from sdcore.samplers import Denoise, Noise, Step, make_steps
from sdcore.voices import Conditions, zeroed

from . import guards, rewards
from .caches import fingerprint
from .lora import ChangeOptions, LoRA
from .options import option
from .prompts import LISTS, prompts
from .task import LoopOptions, Task, generator
from .tuning import encode
from .twin import replaced_by, write_model


@dataclass(frozen=True)
class PolicyOptions(ChangeOptions, LoopOptions):
    """Which model, what it draws, and what is wanted of it."""

    batch: int = option(16, "pictures a step, over all passes and processes")
    lr: float = option(3e-4, "peak learning rate; about a third of it for lion, 1 for prodigy, which finds it itself")
    warmup: int = option(0, "steps in which the learning rate rises to its peak")
    cooldown: int = option(0, "last steps, in which it falls linearly to nearly nothing; constant in between")
    beta2: float = option(
        0.999, "decay of the squared gradient in adamw, adamw8bit and prodigy, of the direction in lion"
    )
    ema: float = option(0.0, "decay of the moving average of what trains, which is what is exported; 0: no average")
    log_every: int = option(1, "steps between lines of log.jsonl", free=True)
    model: str = option(
        "tiny", "what is tuned: the bundled model, an alias, a folder, a file or a hub id, as in `sdcore.load`"
    )
    device: str | None = option(None, "cpu, cuda, mps; the best there is where it is not given")
    dtype: str = option(
        "float32", "of the frozen parts in memory: float32, bfloat16 or float16 (the autoencoder stays float32)"
    )
    adapter: str = option("lora", "lora: a LoRA trains beside the weights; none: all weights of the UNet")
    reward: str = option("compressibility", "what the pictures are worth: one of train/rewards.py, or a weighted sum")
    prompts: str = option(
        "world:two", "a file with a prompt a line, or animals, activities, mountain, world, world:one, world:two"
    )
    draw_steps: int = option(50, "steps of the sampler for a picture")
    spacing: str | None = option(None, "leading, trailing or linspace timesteps; the model's own where it is not given")
    guidance: float = option(5.0, "guidance scale, in drawing and in learning; 1 is none, at half the time")
    resolution: int | None = option(None, "side of the pictures; the model's own where it is not given")
    watch: str | None = option(
        None,
        "prompts for the guards at each evaluation: held-out:two, animals-held-out, activities-held-out, or a file",
    )
    watch_reward: str | None = option(None, "another reward for the guards to report, which nothing is tuned to")
    watch_prompts: int = option(16, "how many of them, where they are of the bundled world")
    watch_pictures: int = option(4, "pictures of each of these prompts, two at least")
    stop: tuple[str, ...] = option(
        (), "rules on the guards' figures, any of which ends the run: diversity<0.5,distance>1.2"
    )


# ------------------------------------------------------------------------------------------------------------------ the prompts

WORLD = 512  # prompts of the bundled world to learn from
TRAINED, WATCHED = 30_000, 31_000  # seeds of its prompts; train/judge.py asks for those of 20,000


def read_prompts(where: str, n: int, seed: int) -> list[str]:
    """All prompts of a list or a file, or n of the bundled world. ConfigError, TrainingError as of train/prompts.py."""
    if where in LISTS:
        return list(LISTS[where])
    if Path(where).is_file():
        n = len([line for line in Path(where).read_text("utf-8-sig").splitlines() if line.strip()])
    return prompts(where, n, seed)


# ------------------------------------------------------------------------------------------------------------------- the policy


class Policy(Task):
    """A model that draws, and is changed by what a reward says of its pictures."""

    eta = 1.0  # of ddim: how random its way is

    def __init__(self, options: PolicyOptions, pipe: Pipeline):
        """`pipe` is the model of the options (`load`). ConfigError, TrainingError: options that have no meaning."""
        o = self.options = options
        self.pipe, self.out = pipe, Path(o.out)
        check(o, pipe)
        for part in (pipe.unet, pipe.vae, *pipe.text_encoders):
            part.eval().requires_grad_(False)
        self.model = fingerprint(pipe.unet, pipe.vae, *pipe.text_encoders)  # before anything of it trains
        self.prompts = read_prompts(o.prompts, WORLD, TRAINED)
        self.reward = rewards.make(o.reward, self.out, pipe.device)
        self.steps = self.way()
        W, H = self.size = pipe.full_size((o.resolution, o.resolution) if o.resolution else None)
        factor = pipe.vae.config.factor
        self.latent = (pipe.unet.config.in_channels, H // factor, W // factor)
        self.read = cache(self.read_one)
        self.guards = guards.Guards(self) if o.watch and o.eval_every else None  # draws what the model draws now
        self.lora = LoRA(pipe, o, o.seed) if o.adapter == "lora" else None
        if self.lora is not None:
            self.modules: dict[str, nn.Module] = {"lora": self.lora}
        else:
            self.frozen = copy.deepcopy(pipe.unet)
            pipe.unet.float().requires_grad_(True)
            self.modules = {"unet": pipe.unet}
        self.trained = [p for module in self.modules.values() for p in module.parameters()]

    def way(self) -> list[Step]:
        """The steps of a picture."""
        return make_steps(self.pipe.scheduler, self.options.draw_steps, "ddim", self.options.spacing, eta=self.eta)

    def untuned(self) -> AbstractContextManager[None]:
        """Inside the `with`, the model is the one that it was."""
        return self.lora.off() if self.lora is not None else replaced_by(self.pipe, self.frozen)

    # ---------------------------------------------------------------------------------------------------------------- drawing

    def noise(self, *keys: tuple[int, ...]) -> Noise:
        """The noise of pictures, a stream for each key."""
        return Noise([generator(self.options.seed, *key).initial_seed() for key in keys])

    def start(self, noise: Noise) -> Tensor:
        """What the sampler begins with [n, c, h, w], the first that is drawn from each picture's stream."""
        return (noise.draw(*self.latent) * self.steps[0].start_scale).to(self.pipe.device)

    def denoiser(self, prompts: Sequence[str]) -> Denoise:
        """`denoise(x [n, c, h, w], step) -> x0` of n prompts under guidance; gradients go to whatever trains."""
        guided = self.options.guidance > 1
        told = self.context([""] * (len(prompts) * guided) + list(prompts))
        context, added = self.as_unet(told.context), self.added(told)

        def network(x: Tensor, step: Step) -> Tensor:
            t = torch.full((len(x),), step.t, dtype=torch.float32, device=x.device)
            return self.pipe.unet(self.as_unet(x), t, context, added)

        return guidance.denoiser(network, guidance=self.options.guidance)

    @torch.no_grad()
    def pictures(self, latents: Tensor) -> Tensor:
        """Finished latents [n, c, h, w] -> pictures [n, 3, H, W] in 0..1, fp32."""
        with torch.autocast(latents.device.type, enabled=False):
            return (self.pipe.decode(latents) / 2 + 0.5).clamp(0, 1)

    # ------------------------------------------------------------------------------------------------ what the UNet is told

    def context(self, prompts: Sequence[str]) -> Conditions:
        """What the UNet is told of prompts, on its device; with gradients where the text encoders' part trains."""
        if self.options.text_encoder and self.lora is not None:
            return self.hear(prompts)
        found = [self.read(prompt) for prompt in prompts]
        pooled = [one.pooled for one in found if one.pooled is not None]
        return Conditions(torch.cat([one.context for one in found]), torch.cat(pooled) if pooled else None)

    def read_one(self, prompt: str) -> Conditions:
        """What the frozen encoders say of one prompt."""
        with torch.no_grad(), torch.autocast(self.pipe.device.type, enabled=False):
            return self.hear([prompt])

    def hear(self, prompts: Sequence[str]) -> Conditions:
        """What the encoders say of prompts now; zeros for the empty one where the pipeline has it so (SDXL base)."""
        pipe = self.pipe
        told = encode(pipe.text_encoders, pipe.tokenizers, list(prompts), bool(pipe.unet.config.added_dim))
        empty = [prompt == "" and pipe.zero_negative for prompt in prompts]
        return zeroed(told, empty if any(empty) else ())

    def as_unet(self, x: Tensor) -> Tensor:
        """In the dtype of the UNet's weights."""
        return x.to(next(self.pipe.unet.parameters()).dtype)

    def added(self, told: Conditions) -> tuple[Tensor, Tensor] | None:
        """What XL models hear beside the text: the pooled vector [n, p] and the size of a picture that is not cut [n, 6]."""
        if told.pooled is None:
            return None
        (W, H), n = self.size, len(told.pooled)
        sizes = torch.tensor([(H, W, 0, 0, H, W)] * n, dtype=torch.float32, device=told.pooled.device)
        return self.as_unet(told.pooled), sizes

    # ---------------------------------------------------------------------------------------------------- guards and the result

    def validate(self) -> float | None:
        return None

    def evaluate(self, step: int, out: Path) -> dict[str, float]:
        """What the guards see; a rule that holds ends the run. Pictures and curves go to `out`."""
        if self.guards is None:
            return {}
        figures = self.guards.figures(step, out)
        self.ended = guards.broken(self.options.stop, figures)
        guards.draw_curves(out, self.guards.base, figures | {"step": step})
        return figures

    def export(self, out: Path) -> None:
        """The LoRA, NAME.safetensors and as diffusers has it; or model/, a folder in the precision that the model came in."""
        o = self.options
        if self.lora is not None:
            adapter = self.lora.adapter(out.name, {"sdcore.reward": o.reward, "sdcore.model": self.model})
            write_adapter(out / f"{out.name}.safetensors", adapter, "kohya", self.pipe)
            if o.kind == "lora":
                write_adapter(out / "pytorch_lora_weights.safetensors", adapter, "peft", self.pipe)
            return
        write_model(out, o.model, {"unet": self.modules["unet"]})

    def identity(self) -> dict[str, object]:
        return {"model": self.model, "prompts": self.prompts, "reward": self.reward.identity()}


def check(o: PolicyOptions, pipe: Pipeline) -> None:
    """ConfigError for options that have no meaning, or none for this model."""
    if o.adapter not in ("lora", "none"):
        raise ConfigError(f"--adapter: expected lora or none, found {o.adapter!r}")
    if o.shard:
        raise ConfigError("--shard: a network in pieces cannot draw by itself; leave it out, or tune a LoRA")
    if o.adapter == "none" and o.text_encoder:
        raise ConfigError("--text-encoder: the text encoders' change is a LoRA; leave out --adapter none")
    if pipe.unet.config.in_channels != pipe.vae.config.latent_channels or pipe.unet.config.guidance_dim:
        raise ConfigError(f"--model {o.model}: {pipe.family} does not draw from a prompt alone; choose one that does")
    if o.watch and o.watch_pictures < 2:
        raise ConfigError(
            f"--watch-pictures {o.watch_pictures}: the diversity of a prompt's pictures needs two at least"
        )
    guards.check(o.stop)
    if o.stop and not (o.watch and o.eval_every):
        raise ConfigError("--stop: rules are on the guards' figures; add --watch and --eval-every")


def load(options: PolicyOptions) -> Pipeline:
    """The model of the options, its autoencoder in fp32 (SDXL's overflows in fp16). Errors as of `sdcore.load`."""
    torch.set_num_threads(options.threads)
    pipe = sdcore.load(options.model, device=options.device, dtype=options.dtype)
    pipe.vae.float()
    return pipe
