"""What the methods that tune a model on pictures have in common: `Tune`, a task over a pipeline and a folder.

A method is a subclass that says in `begin` what trains, and where its step differs overrides one of the stages

    visits -> latents -> noised to timesteps -> [ context of the captions ] -> [ predict ] -> weigh

in brackets those that methods replace: a trained text encoder or embedding overrides `context`, a ControlNet `predict`. With
nothing overridden this is the ordinary fine-tuning of a UNet. Frozen parts stay in the dtype they were loaded in and in eval
mode; what trains is fp32 (`begin` makes it so), the computation runs in --precision.

Legend: b examples, s tokens, d width of the text, c h w latent.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from sdcore.weights import checkpoint, fetch
from torch import Tensor, nn
from tqdm import tqdm

from sdcore import image, lora
from sdcore.clip import CLIPText
from sdcore.errors import TrainingError
from sdcore.pipeline import Pipeline
from sdcore.scheduler import alpha_bars
from sdcore.tokenizer import Tokenizer
from sdcore.voices import Conditions, zeroed

from . import memory, objectives
from .caches import Latents, Texts, fingerprint
from .data import DataOptions, Pictures, Visit
from .objectives import Noisy, ObjectiveOptions
from .options import option
from .ranks import Ranks
from .task import LoopOptions, Loss, Part, Task, generator


@dataclass(frozen=True)
class TuneOptions(ObjectiveOptions, DataOptions, LoopOptions):
    """Which model, validated how."""

    batch: int = option(4, "examples a step, over all passes and processes")
    lr: float = option(1e-4, "peak learning rate; about a third of it for lion, 1 for prodigy, which finds it itself")
    model: str = option(
        "tiny", "what is tuned: the bundled model, an alias, a folder, a file or a hub id, as in `sdcore.load`"
    )
    device: str | None = option(None, "cpu, cuda, mps; the best there is where it is not given")
    dtype: str = option(
        "float32", "of the frozen parts in memory: float32, bfloat16 or float16 (the autoencoder stays float32)"
    )
    cache: str | None = option(
        "runs/cache", "folder of encoded pictures and captions, shared by all runs; '' keeps none", free=True
    )
    validation: str | None = option(
        None, "folder of pictures, captioned alike, for the validation loss at each evaluation"
    )
    validation_draws: int = option(4, "timesteps, evenly spread, at which each of them is looked at")
    prompts: str | None = option(
        None, "file with a prompt a line; each evaluation draws them, above the untuned model's pictures"
    )
    guidance: float = option(7.5, "guidance scale of these; the bundled model wants 3")
    memory: str | None = option(
        None,
        "what a step may take, such as 8GiB: as many blocks as that asks for are recomputed in the backward pass, and what "
        "cannot fit is refused (train/memory.py)",
        free=True,
    )
    offload: bool = option(
        False,
        "encode every picture and caption before the first step; then what encoded them leaves the device until an evaluation",
        free=True,
    )


class Tune(Task):
    """A pipeline, a folder, and how a UNet learns from it."""

    def __init__(self, options: TuneOptions, pipe: Pipeline):
        """`pipe` is the model of the options (`load`). ConfigError, TrainingError: bad options or pictures."""
        objectives.check(options, pipe.scheduler)
        self.options, self.pipe = options, pipe
        self.scheduler = replace(
            pipe.scheduler,
            prediction_type=options.prediction or pipe.scheduler.prediction_type,
            zero_snr=options.zero_snr or pipe.scheduler.zero_snr,
        )
        self.alpha_bar = alpha_bars(self.scheduler).float().to(pipe.device)
        self.parts: list[nn.Module] = [pipe.unet, pipe.vae, *pipe.text_encoders]
        for part in self.parts:
            part.eval().requires_grad_(False)
        self.model = fingerprint(*self.parts)  # before anything of it trains
        folder = Path(options.cache) if options.cache else None
        self.pictures = self.gather(options, options.batch)
        self.latents = Latents(pipe.vae, folder)
        self.texts = Texts(self.read, list(pipe.text_encoders), folder)
        self.held_out = None
        if options.validation:
            plain = replace(
                options,
                data=options.validation,
                variants=1,
                flip=False,
                crop="center",
                repeats=1,
                dropout=0.0,
                shuffle_tags=False,
            )
            self.held_out = self.gather(plain, 1)
        self.away: dict[str, nn.Module] = {}  # what has left the device
        self.base = self.draw() if options.prompts else []  # by the untuned model
        self.begin()

    # --------------------------------------------------------------------------------------------- what methods say or replace

    def gather(self, options: TuneOptions, batch: int) -> Pictures:
        """What is learned from, or with other `options` held out; called before `begin`, by the untuned model's side."""
        return Pictures(options, options.seed, batch)

    reads: tuple[str, ...] = ("texts",)  # of what a step calls: what reads files

    def begin(self) -> None:
        """Set `modules` and let train (fp32, requires_grad) what is to. Here: the whole UNet."""
        self.pipe.unet.float().requires_grad_(True)
        self.modules = {"unet": self.pipe.unet}

    def context(self, captions: list[str]) -> Conditions:
        """What the UNet is told of captions, on its device. Here: from the cache, without gradient."""
        found = self.texts(captions)
        device = self.pipe.device
        return Conditions(found["context"].to(device), found["pooled"].to(device) if "pooled" in found else None)

    def listens(self) -> bool:
        """Whether text encoders are at work in every step. Here they are not, once each caption has been encoded."""
        return False

    def predict(self, x: Tensor, t: Tensor, told: Conditions, visits: list[Visit]) -> Tensor:
        """What the network says of noised latents x [b, c, h, w] at timesteps t [b]."""
        return self.pipe.unet(self.as_unet(x), t, self.as_unet(told.context), self.added(told, visits))

    # ------------------------------------------------------------------------------------------------------------- the loss

    def loss(self, part: Part) -> Loss:
        o = self.options
        visits = self.pictures.visits(part.step, part.places)
        t = part.of(objectives.timesteps(o, part.batch, len(self.alpha_bar), part.common()))
        return self.loss_of(visits, t, part.own())

    def loss_of(self, visits: list[Visit], t: Tensor, rngs: list[torch.Generator]) -> Loss:
        """The loss of visits at timesteps t [b]; noise, of the latents and of the way, from each one's own stream."""
        noisy, mask = self.noised(visits, t, rngs)
        found = self.predict(noisy.x, noisy.t, self.context([visit.caption for visit in visits]), visits)
        return Loss(*objectives.weigh(noisy, found, mask))

    def noised(self, visits: list[Visit], t: Tensor, rngs: list[torch.Generator]) -> tuple[Noisy, Tensor | None]:
        """Latents of visits noised to timesteps t [b], and their masks [b, 1, H, W] where there are any, on the device."""
        mean, std, mask = self.latents(visits)
        draw = torch.stack([torch.randn(m.shape, generator=rng) for m, rng in zip(mean, rngs, strict=True)])
        x0, t = (mean + std * draw).to(self.pipe.device), t.to(self.pipe.device)
        noisy = objectives.prepare(self.options, self.scheduler.prediction_type, x0, t, self.alpha_bar, rngs)
        return noisy, None if mask is None else mask.to(self.pipe.device)

    def validate(self) -> float | None:
        """The mean loss over the validation pictures, each at the same timesteps and with the same noise at every evaluation."""
        if self.held_out is None:
            return None
        draws, total, weight = self.options.validation_draws, 0.0, 0.0
        t = ((torch.arange(draws) + 0.5) / draws * len(self.alpha_bar)).long()
        for i in range(len(self.held_out.items)):
            visit = self.held_out.visit(i, 0, 0)
            loss = self.loss_of([visit] * draws, t, [generator(self.options.seed, i, k, 2) for k in range(draws)])
            total, weight = total + loss.mean.item() * float(loss.count), weight + float(loss.count)
        return total / max(weight, 1e-12)

    def evaluate(self, step: int, out: Path) -> dict[str, float]:
        """Draw --prompts: a sheet samples/step-….png, the untuned model's pictures above the tuned one's."""
        if self.options.prompts:
            (out / "samples").mkdir(exist_ok=True)
            drawn = self.draw()
            sheet = image.grid([*self.base, *drawn], columns=len(drawn))
            sheet.save(out / "samples" / f"step-{step:08d}.png")
        return {}

    def draw(self) -> list[image.Picture]:
        """The pictures of --prompts as the pipeline draws them now, seed by line."""
        return [
            self.pipe(text, seed=i, steps=25, guidance=self.options.guidance).images[0]
            for i, text in enumerate(self.prompt_lines())
        ]

    def prompt_lines(self) -> list[str]:
        """The prompts of --prompts. TrainingError: none."""
        assert self.options.prompts
        texts = [line.strip() for line in Path(self.options.prompts).read_text().splitlines() if line.strip()]
        if not texts:
            raise TrainingError(f"--prompts {self.options.prompts}: holds no prompt")
        return texts

    def identity(self) -> dict[str, object]:
        return {"model": self.model, **self.pictures.identity()} | (
            {"validation": self.held_out.identity()["content"]} if self.held_out else {}
        )

    # --------------------------------------------------------------------------------------------------------------- memory

    def prepare(self, ranks: Ranks) -> None:
        if self.options.offload:
            self.encode_everything()
            self.leave()
        if self.options.memory:
            memory.fit(self, ranks)

    def encode_everything(self) -> None:
        """Fill the cache with all that steps will ask of it. TrainingError: there is no cache."""
        if not self.options.cache:
            raise TrainingError("--offload: needs a --cache, in which what pictures and captions become is kept")
        seen = [value for value in vars(self).values() if isinstance(value, Pictures)]
        for pictures in tqdm(seen, desc="encoding", disable=None):
            for i, item in enumerate(pictures.items):
                for variant in range(pictures.options.variants):
                    self.latents.one(Visit(item, variant, pictures.view(i, variant), ""))
                for caption in ("", *item.captions):
                    self.texts.one(caption)

    def leave(self) -> None:
        """Send away what encodes: from a GPU to the CPU, from the CPU altogether. Text encoders that are needed stay."""
        self.away = {"vae": self.pipe.vae}
        if not self.listens() and not self.options.shuffle_tags:  # shuffled captions are new ones at every visit
            self.away |= {name: part for name, part in lora.models(self.pipe).items() if name != "unet"}
        for part in self.away.values():
            part.to("meta" if self.pipe.device.type == "cpu" else "cpu")

    @contextmanager
    def together(self) -> Iterator[None]:
        """What has left comes back for as long as the `with` lasts: evaluations draw."""
        if not self.away:
            yield
            return
        on_cpu = self.pipe.device.type == "cpu"
        tensors = checkpoint.read(fetch.resolve(self.options.model)).tensors if on_cpu else {}
        for name, part in self.away.items():
            if on_cpu:
                part.to_empty(device="cpu").load_state_dict(tensors[name])
            else:
                part.to(self.pipe.device)
        yield
        self.leave()

    # --------------------------------------------------------------------------------------------------------------- helpers

    def as_unet(self, x: Tensor) -> Tensor:
        """In the dtype of the UNet's weights."""
        return x.to(next(self.pipe.unet.parameters()).dtype)

    def added(self, told: Conditions, visits: list[Visit]) -> tuple[Tensor, Tensor] | None:
        """What XL models hear beside the text: the pooled vector [b, p] and the sizes [b, 6]; None for the others."""
        if told.pooled is None:
            return None
        sizes = torch.tensor([visit.sizes for visit in visits], dtype=torch.float32, device=self.pipe.device)
        return self.as_unet(told.pooled), sizes

    def hear(
        self, captions: list[str], ids: Sequence[Tensor] | None = None, extra: Sequence[Tensor | None] | None = None
    ) -> Conditions:
        """What the encoders say of captions as they are now, with gradients; `ids` and `extra` as in `encode`.

        Where the pipeline takes zeros for an empty prompt (SDXL base), so does a dropped caption: guidance will ask for that.
        """
        xl = bool(self.pipe.unet.config.added_dim)
        told = encode(self.pipe.text_encoders, self.pipe.tokenizers, captions, xl, ids, extra)
        dropped = [caption == "" and self.pipe.zero_negative for caption in captions]
        return zeroed(told, dropped if any(dropped) else ())

    def read(self, caption: str) -> dict[str, Tensor]:
        """What the frozen encoders say of one caption: "context" [s, d], and for XL "pooled" [p]."""
        told = self.hear([caption])
        return {"context": told.context[0]} | ({} if told.pooled is None else {"pooled": told.pooled[0]})


def encode(
    encoders: Sequence[CLIPText],
    tokenizers: Sequence[Tokenizer],
    captions: list[str],
    xl: bool,
    ids: Sequence[Tensor] | None = None,
    extra: Sequence[Tensor | None] | None = None,
) -> Conditions:
    """Captions, taken literally, -> what the UNet is told of them; with gradients where something of it trains.

    SD 1.x and 2.x read their encoder after the last layer; XL reads the layer before, all encoders side by side, and the last
    one's pooled vector. `ids` [b, s] an encoder replace the tokenizers', `extra` are rows for numbers beyond the table
    (sdcore/clip.py).
    """
    contexts, pooled = [], None
    for e, (encoder, tokenizer) in enumerate(zip(encoders, tokenizers, strict=True)):
        tokens = tokenizer(captions) if ids is None else ids[e]
        out = encoder(tokens.to(next(encoder.parameters()).device), None if extra is None else extra[e])
        contexts.append(out.states[-2] if xl else out.last)
        pooled = out.pooled if xl else None
    return Conditions(torch.cat(contexts, dim=-1), pooled)


def load(options: TuneOptions) -> Pipeline:
    """The model of the options, its autoencoder in fp32 (SDXL's overflows in fp16). Errors as of `sdcore.load`."""
    import sdcore

    torch.set_num_threads(options.threads)
    pipe = sdcore.load(options.model, device=options.device, dtype=options.dtype)
    pipe.vae.float()
    return pipe
