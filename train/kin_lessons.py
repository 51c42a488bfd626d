"""The bundled model taught to take what its official kin take: what each is shown, what it starts from, and how it learns.

    inpaint     a mask, and what it leaves: 5 channels beside the latent
    instruct    the picture that is to be changed: 4 channels
    upscale     a small picture with noise on it: 3 channels, and how much noise
    depth       how near things are: 1 channel
    refiner     nothing more, on the last fifth of the way alone
    eye         (a small CLIP vision tower)
    variations  what the eye says of a picture, in the place of the words
    ip-adapter  the same beside the words; the UNet stays as it is

All go on from the bundled UNet. Where its input becomes wider, the new weights of its first layer begin at zero (`widened`), so
that at first it draws as if nothing had been added. So began the released inpainting and depth models (their cards) and
instruct-pix2pix (Brooks et al. 2022, section 3.2). The x4 upscaler was trained from nothing; here it begins as the others do, its
table of noise levels at zero too. What lies in the channels is not made here: `sdcore.tasks.beside` puts it there in training as
in drawing. Keys and values of the IP-Adapter begin as those of the text (Ye et al. 2023, section 3.2).

The eye stands in for CLIP, which both of its users find trained: it learns to say of a picture what the bundled text encoder
says, at its end token, of the words for it. Then it stays as it is.

The examples are drawn and encoded before the first step, which is much of the work; every step visits some of them at random.

Legend: n examples in all, b of a step, c channels, h w latent size, k tokens, d width of the text, p of what the eye says.
"""

import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from sdcore.weights import checkpoint as ck
from sdcore.weights import configs, convert, fetch, files
from sdcore.weights.load import load_image_encoder
from torch import Tensor

import sdcore
from sdcore import tasks
from sdcore.clip import CLIPVision, CLIPVisionConfig, variation_context
from sdcore.errors import ConfigError
from sdcore.ip_adapter import IPAdapter, IPAdapterConfig
from sdcore.samplers import Noise
from sdcore.scheduler import alpha_bars
from sdcore.tasks import MAX_NOISE_LEVEL, Canvas
from sdcore.unet import UNet, UNetConfig

from . import objectives, world
from .loop import LoopOptions, Loss, Part, Task, channels_last
from .options import option
from .text2image import diffusion_loss
from .world import SIDE, Array, Scene

Network = Callable[[Tensor, Tensor, Tensor], Tensor]  # noisy latents, timesteps, context -> prediction
SIZE = (SIDE, SIDE)
EYE = CLIPVisionConfig(width=128, layers=3, heads=4, mlp=256, image_size=SIDE, patch=8, projection=128)
END = 0.2  # share of the timesteps that is the refiner's
MIDDLE, WIDTH = 1.0, 1.3  # of the logit of t / T: what is shown decides most where there is most noise


@dataclass(frozen=True)
class KinOptions(LoopOptions):
    """Teach the bundled model what one of its kin takes."""

    kind: str = option("instruct", "which: one of LESSONS")
    eye: str = option("runs/kin/eye/run/image_encoder", "folder of the trained eye, for what looks with it")
    examples: int = option(2048, "drawn before the first step")
    batch: int = option(12, "examples a step")
    lr: float = option(1e-3, "peak learning rate")
    warmup: int = option(30, "steps in which the learning rate rises to its peak")
    ema: float = option(0.99, "decay of the moving average of what trains, which is what is exported")
    dropout: float = option(0.1, "share of words replaced by none, for classifier-free guidance")
    gamma: float = option(5.0, "cap of the weight of nearly clean timesteps, see objectives.capped_v")
    save_every: int = option(200, "steps between checkpoints", free=True)


# ---------------------------------------------------------------------------------------------------- what is shown


@dataclass(frozen=True)
class Example:
    """A picture to be drawn, what is said of it, and what the model is shown."""

    scene: Scene
    words: str
    before: Scene | None = None  # the picture that it was, or that is looked at, where that is another one
    asked: str = ""  # what an instruction changes: an attribute of world.Thing, or background
    place: int = 0  # the thing that it changes, or around which the mask lies
    mask: Array | None = None  # [64, 64], 1 is painted


def told(rng: np.random.Generator) -> Example:
    """A scene and words for it."""
    scene = world.sample_scene(rng)
    return Example(scene, world.caption(scene, rng))


def masked(rng: np.random.Generator) -> Example:
    """The same with a rectangle to be painted: around one of the things, or (one in four) anywhere."""
    shown, luck = told(rng), rng.random(6)
    place = int(luck[0] * len(shown.scene.things))
    thing, more = shown.scene.things[place], 3 + 6 * luck[1:5]
    left, top, right, bottom = (
        thing.x - thing.r - more[0], thing.y - thing.r - more[1], thing.x + thing.r + more[2], thing.y + thing.r + more[3]
    )  # fmt: skip
    if luck[5] < 0.25:
        left, top = 40 * luck[1:3]
        right, bottom = left + 12 + 40 * luck[3], top + 12 + 40 * luck[4]
    return replace(shown, place=place, mask=rectangle(left, top, right, bottom))


def rectangle(left: float, top: float, right: float, bottom: float) -> Array:
    """A mask [64, 64] that is 1 between these pixels, as far as they lie in the picture."""
    mask = np.zeros((SIDE, SIDE), np.float32)
    mask[max(int(top), 0) : max(int(bottom), 0), max(int(left), 0) : max(int(right), 0)] = 1
    return mask


CHANGES: dict[str, Iterable[str]] = {
    "colour": world.COLOURS, "shape": world.SHAPES, "texture": world.TEXTURES, "background": world.BACKGROUNDS,
}  # fmt: skip


def instructed(rng: np.random.Generator) -> Example:
    """A scene twice, one attribute changed the second time, and words that ask for just that: "make the star blue"."""
    scene, luck = world.sample_scene(rng), rng.random(3)
    asked, place = world.pick(luck[0], CHANGES), int(luck[1] * len(scene.things))
    thing = scene.things[place]
    was = scene.background if asked == "background" else getattr(thing, asked)
    value = world.pick(luck[2], [other for other in CHANGES[asked] if other != was])
    if asked == "background":
        return Example(replace(scene, background=value), f"make the background {value}", scene, asked)
    things = tuple(replace(t, **{asked: value}) if t is thing else t for t in scene.things)
    alike = len({t.shape for t in scene.things}) < len(things) or len({(t.shape, t.colour) for t in things}) < len(
        things
    )
    if alike:  # the words, or the picture, could not tell them apart
        return instructed(rng)
    words = f"make the {thing.shape} {'a ' if asked == 'shape' else ''}{value}"
    return Example(replace(scene, things=things), words, scene, asked, place)


def prompted(rng: np.random.Generator) -> Example:
    """A picture to look at and no words; or one on another background than the words ask for."""
    scene, luck = world.sample_scene(rng), rng.random(2)
    if luck[0] < 0.5:
        return Example(scene, "", scene)
    ground = world.pick(luck[1], [name for name in world.BACKGROUNDS if name != scene.background])
    return Example(scene, f"{shapes(scene)} on a {scene.background} background", replace(scene, background=ground))


def shapes(scene: Scene) -> str:
    """Words that say no more than how many things there are."""
    return " and ".join(["a shape"] * len(scene.things))


def example(make: Callable[[np.random.Generator], Example], rng: np.random.Generator, unseen: bool = False) -> Example:
    """A random example without any combination that is kept from training; or one whose picture has such a one (`unseen`)."""
    while True:
        found = make(rng)
        known = found.before is None or not world.held_out(found.before)
        if world.held_out(found.scene) if unseen else known and not world.held_out(found.scene):
            return found


def near(scene: Scene) -> Array:
    """How near things are [64, 64]: the larger the nearer, the background farthest."""
    found = np.zeros((SIDE, SIDE), np.float32)
    for thing in scene.things:
        u, v = world.PIXELS[None, :] - np.float32(thing.x), world.PIXELS[:, None] - np.float32(thing.y)
        found = np.maximum(found, world.coverage(world.OUTLINES[thing.shape or ""](u, v, thing.r)) * thing.r)
    return found.astype(np.float32)


def drawn(scenes: Sequence[Scene]) -> Tensor:
    """Pictures of scenes [n, 3, 64, 64] in -1..1."""
    return torch.from_numpy(world.draw_batch(scenes))


def looked_at(shown: Sequence[Example]) -> Tensor:
    """The pictures that examples are shown, or are themselves [n, 3, 64, 64] in -1..1."""
    return drawn([one.before or one.scene for one in shown])


def masks(shown: Sequence[Example]) -> Tensor:
    """What is to be painted [n, 1, 64, 64]; all of it where an example does not say."""
    whole = np.ones((SIDE, SIDE), np.float32)
    return torch.from_numpy(np.stack([whole if one.mask is None else one.mask for one in shown]))[:, None]


def maps(shown: Sequence[Example]) -> Tensor:
    """Depth maps [n, 1, 64, 64]."""
    return torch.from_numpy(np.stack([near(one.scene) for one in shown]))[:, None]


def small(pixels: Tensor) -> Tensor:
    """Pictures in the size of their latents [n, 3, 8, 8]: each pixel the mean of 8 x 8."""
    return F.avg_pool2d(pixels, 8)


# ---------------------------------------------------------------------------------------------------- what it starts from


def widened(unet: UNet, config: UNetConfig) -> UNet:
    """The same UNet in another of its sizes: with further input channels and a table of noise levels, both zeros at first, or
    with 1 x 1 convolutions around its transformers where it had linear layers: 1.x has those, and instruct-pix2pix is one."""
    tensors = dict(unet.state_dict())
    more = config.in_channels - unet.config.in_channels
    tensors["conv_in.weight"] = F.pad(tensors["conv_in.weight"], (0, 0, 0, 0, 0, more))
    if not config.linear_projection:
        for name, weight in tensors.items():
            if name.endswith(("proj_in.weight", "proj_out.weight")) and weight.ndim == 2:
                tensors[name] = weight[:, :, None, None]
    if config.class_embeddings:
        tensors["class_embedding.weight"] = torch.zeros(config.class_embeddings, config.time_dim)
    wide = UNet(config)
    wide.load_state_dict(tensors)
    return wide


# ---------------------------------------------------------------------------------------------------- how it learns


class Kin(Task):
    """The bundled UNet that goes on learning to draw the world from words, shown something beside them. Subclasses say what."""

    make: Callable[[np.random.Generator], Example] = staticmethod(told)
    family = "sd2"  # of weights/detect.FAMILIES, as which the result is written
    sizes: dict[str, object] = {}  # of the UNet, where they are not the bundled one's

    def __init__(self, options: KinOptions):
        self.options = options
        self.pipe = sdcore.load("tiny", device="cpu", dtype=torch.float32)
        self.alpha_bar = alpha_bars(self.pipe.scheduler).float()
        self.weights = objectives.capped_v(self.alpha_bar, options.gamma)
        self.unet = widened(self.pipe.unet, replace(self.pipe.unet.config, **self.sizes))  # type: ignore[arg-type]
        channels_last(self.unet)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(options.seed)
            self.modules = self.begin()
        self.shown = [example(self.make, np.random.default_rng([options.seed, i])) for i in range(options.examples)]
        self.look()

    def begin(self) -> dict[str, torch.nn.Module]:
        """What trains. Here: the whole UNet."""
        return {"unet": self.unet}

    def look(self) -> None:
        """Work out once what the examples come to: what is to be drawn, and what is shown beside it."""
        self.latents = self.pipe.encode_image(drawn([one.scene for one in self.shown]))
        self.beside = self.seen()

    def seen(self) -> Tensor | None:
        """What lies beside each latent [n, c, h, w], put there by what puts it there when the pipeline draws."""
        canvas = self.canvas()
        draw = Noise([self.options.seed + i for i in range(len(self.shown))])
        return None if canvas is None else tasks.beside(self.pipe, canvas, draw, self.latents.shape[1:])

    def canvas(self) -> Canvas | None:
        """What a user would hand in."""
        return None

    # ------------------------------------------------------------------------------------------------------------- a step

    def loss(self, part: Part) -> Loss:
        rngs = part.own()
        rows = torch.cat([torch.randint(len(self.shown), (1,), generator=rng) for rng in rngs])
        luck = torch.cat([torch.rand(1, generator=rng) for rng in rngs])
        x0 = self.latents[rows]
        noise = torch.stack([torch.randn(x0.shape[1:], generator=rng) for rng in rngs])
        t = part.of(self.times(part.batch, part.common()))
        context, predict = self.context(rows, luck), self.network(rows, luck, rngs)
        return Loss(diffusion_loss(predict, x0, t, noise, context, self.alpha_bar, self.weights), len(rows))

    def times(self, b: int, rng: torch.Generator) -> Tensor:
        """Timesteps of a batch [b]."""
        return objectives.logit_normal(b, len(self.alpha_bar), rng, MIDDLE, WIDTH)

    @torch.no_grad()
    def context(self, rows: Tensor, luck: Tensor) -> Tensor:
        """What the UNet hears [b, k, d]: the words of these examples; where luck (0..1) is below --dropout, none."""
        kept = (luck >= self.options.dropout).tolist()
        words = [self.shown[row].words * keep for row, keep in zip(rows.tolist(), kept, strict=True)]
        return self.pipe.text_encoders[0](self.pipe.tokenizers[0](words)).last

    def network(self, rows: Tensor, luck: Tensor, rngs: list[torch.Generator]) -> Network:
        """The prediction from noisy latents, timesteps and context, with what is shown put beside the latents."""
        if self.beside is None:
            return self.unet
        beside = self.beside[rows]
        return lambda x, t, context: self.unet(torch.cat([x, beside], dim=1), t, context)

    def export(self, out: Path) -> None:
        """model/: a folder as diffusers has it, of the family."""
        source = ck.read(fetch.resolve("tiny"))
        source.family, source.configs["unet"] = self.family, self.unet.config
        source.tensors["unet"] = self.unet.state_dict()
        shutil.rmtree(out / "model", ignore_errors=True)
        convert.write_folder(source, out / "model", torch.float16)


class Inpaint(Kin):
    """A mask, and the picture with what it covers left out."""

    make = staticmethod(masked)
    family, sizes = "sd2-inpaint", {"in_channels": 9}

    def canvas(self) -> Canvas:
        return Canvas("inpaint", SIZE, SIZE, pixels=drawn([one.scene for one in self.shown]), mask=masks(self.shown))


class Depth(Kin):
    """A depth map."""

    family, sizes = "sd2-depth", {"in_channels": 5}

    def canvas(self) -> Canvas:
        return Canvas("depth", SIZE, SIZE, depth=maps(self.shown))


class Instruct(Kin):
    """The picture that is to be changed. Now and then without words, without the picture, and without both, each as often: it is
    guided towards either (Brooks et al. 2022, section 3.2.1)."""

    make = staticmethod(instructed)
    family, sizes = "ip2p", {"in_channels": 8, "linear_projection": False}

    def canvas(self) -> Canvas:
        return Canvas("instruct", SIZE, SIZE, pixels=looked_at(self.shown))

    def seen(self) -> Tensor:
        made = super().seen()  # of guidance's three branches; the last one's, which is shown picture and words
        assert made is not None
        return made[-len(self.shown) :]

    def network(self, rows: Tensor, luck: Tensor, rngs: list[torch.Generator]) -> Network:
        share = self.options.dropout
        shown = (luck < share / 2) | (luck >= share * 3 / 2)
        assert self.beside is not None
        beside = self.beside[rows] * shown[:, None, None, None]
        return lambda x, t, context: self.unet(torch.cat([x, beside], dim=1), t, context)


class Upscale(Kin):
    """A small picture, as large as the latent, with noise on it; how much is said beside the time."""

    family, sizes = "x4", {"in_channels": 7, "class_embeddings": 1000}

    def seen(self) -> Tensor:
        return small(looked_at(self.shown))

    def network(self, rows: Tensor, luck: Tensor, rngs: list[torch.Generator]) -> Network:
        assert self.beside is not None
        pixels = self.beside[rows]
        levels = torch.cat([torch.randint(MAX_NOISE_LEVEL + 1, (1,), generator=rng) for rng in rngs])
        noise = torch.stack([torch.randn(pixels.shape[1:], generator=rng) for rng in rngs])
        noisy = objectives.noised(pixels, noise, self.alpha_bar[levels])
        return lambda x, t, context: self.unet(torch.cat([x, noisy], dim=1), t, context, labels=levels)


class Refiner(Kin):
    """Nothing further: it is shown nearly finished pictures only (Podell et al. 2023, section 2.5)."""

    def times(self, b: int, rng: torch.Generator) -> Tensor:
        return torch.randint(int(END * len(self.alpha_bar)), (b,), generator=rng)


class Eye(Kin):
    """The vision tower alone."""

    def begin(self) -> dict[str, torch.nn.Module]:
        self.eye = CLIPVision(EYE)
        embeddings = self.eye.vision_model.embeddings
        for table in (embeddings.position_embedding.weight, embeddings.class_embedding):
            torch.nn.init.normal_(table, std=0.02)
        return {"image_encoder": self.eye}

    def look(self) -> None:
        words = self.pipe.tokenizers[0]([world.caption(one.scene) for one in self.shown])
        with torch.no_grad():
            self.said = torch.cat([self.pipe.text_encoders[0](part).pooled for part in words.split(64)])

    def loss(self, part: Part) -> Loss:
        rows = [int(torch.randint(len(self.shown), (1,), generator=rng)) for rng in part.own()]
        found = self.eye.see(unit(looked_at([self.shown[row] for row in rows]))).embedding
        return Loss(F.mse_loss(found, self.said[rows]), len(rows))

    def export(self, out: Path) -> None:
        """image_encoder/, as transformers has it."""
        folder = out / "image_encoder"
        folder.mkdir(exist_ok=True)
        convert.write_json(folder / "config.json", configs.vision_table(self.eye.config))
        files.write(folder / "model.safetensors", self.eye.state_dict(), {"format": "pt"})


class Variations(Kin):
    """The picture itself, as the eye sees it, and no words."""

    def look(self) -> None:
        super().look()
        self.told, self.nothing = seen_by(self.options.eye, self.shown)

    def context(self, rows: Tensor, luck: Tensor) -> Tensor:
        return torch.where((luck >= self.options.dropout)[:, None, None], self.told[rows], self.nothing[rows])


class Prompted(Kin):
    """The same beside the words, by an adapter; the UNet stays as it is."""

    make = staticmethod(prompted)

    def begin(self) -> dict[str, torch.nn.Module]:
        self.unet.requires_grad_(False)
        self.adapter = IPAdapter(IPAdapterConfig(embed=EYE.projection, unet=self.unet.config))
        for place in self.adapter.places:
            layer, text = self.adapter.ip_adapter[str(place.number)], self.unet.get_submodule(place.name)
            for name in ("k", "v"):
                ours, theirs = layer.get_submodule(f"to_{name}_ip"), text.get_submodule(f"to_{name}")
                ours.load_state_dict(theirs.state_dict())
        return {"ip_adapter": self.adapter}

    def look(self) -> None:
        super().look()
        self.told, self.nothing = (each[:, 0] for each in seen_by(self.options.eye, self.shown))

    def network(self, rows: Tensor, luck: Tensor, rngs: list[torch.Generator]) -> Network:
        embeds = torch.where((luck >= self.options.dropout)[:, None], self.told[rows], self.nothing[rows])
        keys_values, full = self.adapter.keys_values(self.adapter.tokens(embeds)), torch.ones(1, 1, 1)

        def predict(x: Tensor, t: Tensor, context: Tensor) -> Tensor:
            text = self.unet.keys_values(context)
            both = [(*own, k, v, full) for own, (k, v) in zip(text, keys_values, strict=True)]
            return self.unet.step(x, self.unet.time_shifts(self.unet.embed_time(t)), both)

        return predict

    def export(self, out: Path) -> None:
        """ip-adapter.safetensors, as the released ones are laid out."""
        files.write(out / "ip-adapter.safetensors", self.adapter.state_dict(), {"format": "pt"})


@torch.no_grad()
def seen_by(eye: str, shown: list[Example]) -> tuple[Tensor, Tensor]:
    """What the eye in a folder says of the pictures of examples, and of nothing: two [n, 1, p]."""
    tower = load_image_encoder(eye, "cpu", torch.float32)
    said = [variation_context(tower, unit(part)) for part in looked_at(shown).split(64)]
    return torch.cat([told for told, _ in said]), torch.cat([nothing for _, nothing in said])


def unit(pixels: Tensor) -> Tensor:
    """Pixels of -1..1 in 0..1, as vision towers take them."""
    return (pixels / 2 + 0.5).clamp(0, 1)


LESSONS: dict[str, type[Kin]] = {
    "instruct": Instruct, "depth": Depth, "inpaint": Inpaint, "upscale": Upscale, "refiner": Refiner,
    "eye": Eye, "variations": Variations, "ip-adapter": Prompted,
}  # fmt: skip


def lesson(options: KinOptions) -> Kin:
    """The task of a kind. ConfigError for one that is not in LESSONS."""
    if options.kind not in LESSONS:
        raise ConfigError(f"--kind: expected one of {', '.join(LESSONS)}, found {options.kind!r}")
    return LESSONS[options.kind](options)
