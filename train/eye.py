"""An eye for the bundled world: a small network that reads a picture as the checker does, but with gradients.

    sdcore train eye --out runs/eye                             # some minutes on one core; no model draws for it
    sdcore train draft --reward eye:runs/eye/eye.safetensors --draw-steps 4 --eta 1 --guidance 1 --approach draft --last 2 ...

The checker (train/checker.py) is exact and has no gradient, for it searches. The eye is shown pictures that the world itself
drew, so their truth is known, and learns to say what the text encoder learned to read off captions (train/text.py): of each
thing, left before right and upper before lower, whether it is there, its shape, colour, size and texture; the axis that they
stand along; the background; and whether nothing is there besides. As a reward it gives, of a picture for a prompt,

    mean over all that the prompt demands of  log p(what it demands | picture)

A reader of perfect pictures alone has nothing to say about halves, which is where a gradient is wanted. So a part of what it
learns from is worn: two scenes that differ in some attributes, mixed in the latents of the bundled autoencoder, with noise,
and decoded. What is two thirds purple and one third pink is labelled so. And a part is spoiled: a thing is there once more,
beside itself, which is how small models go wrong. No picture is drawn by the model that is to be tuned.

Legend: n pictures, a attributes, k classes of all attributes together, c h w latent.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from sdcore.weights import files
from sdcore.weights.assemble import check_names, check_values
from torch import Tensor, nn

import sdcore
from sdcore.errors import ConfigError
from sdcore.pipeline import Pipeline

from . import world
from .checkpoints import sha256
from .loop import LoopOptions, Loss, Part, Task, channels_last, run
from .options import option, parse
from .ranks import Ranks
from .rewards import Reward
from .task import generator
from .text import CLASSES as CAPTION
from .text import THING, labels

CLASSES = (*CAPTION, 2)  # of each attribute; those of captions, and whether the picture is spoiled (0) or not (1)
WIDTHS = (3, 24, 48, 96)  # channels; each of these layers halves the side
HIDDEN = 256
FILE = "eye.safetensors"


class Eye(nn.Module):
    """Pictures [n, 3, 64, 64] in 0..1 -> logits of all classes [n, k]."""

    def __init__(self) -> None:
        super().__init__()
        last, side = WIDTHS[-1], world.SIDE // 2 ** (len(WIDTHS) - 1)
        layers: list[nn.Module] = []
        for before, after in zip(WIDTHS, WIDTHS[1:], strict=False):
            layers += [nn.Conv2d(before, after, 5, stride=2, padding=2), nn.GroupNorm(8, after), nn.SiLU()]
        layers += [nn.Conv2d(last, last, 3, padding=1), nn.GroupNorm(8, last), nn.SiLU()]
        self.see = nn.Sequential(*layers)
        self.say = nn.Sequential(nn.Linear(last * side**2, HIDDEN), nn.SiLU(), nn.Linear(HIDDEN, sum(CLASSES)))

    def forward(self, pictures: Tensor) -> Tensor:
        return self.say(self.see(pictures * 2 - 1).flatten(1))


def log_p(logits: Tensor) -> Tensor:
    """Logits [n, k] -> the logarithm of the probability of each class among those of its attribute [n, k]."""
    return torch.cat([part.log_softmax(dim=1) for part in logits.split(CLASSES, dim=1)], dim=1)


# Of these attributes class 0 says something: whether the thing is there. Of all others it is "not said".
THERE = (0, 1 + len(THING))
SAID = torch.cat([torch.tensor([float(a in THERE)] + [1.0] * (size - 1)) for a, size in enumerate(CLASSES)])


def said(texts: Sequence[str]) -> Tensor:
    """What captions say [n, k]: 1 at the class of each attribute that they name, at the number of things, at unspoiled."""
    columns = torch.tensor([[*labels(text), 1] for text in texts]).unbind(1)
    return torch.cat([F.one_hot(c, size) for c, size in zip(columns, CLASSES, strict=True)], dim=1) * SAID


# ------------------------------------------------------------------------------------------------------------------- the reward


class Seen(Reward):
    """How clearly the eye sees in a picture what the prompt demands: the mean log p of it; 0 is the best."""

    differentiable = True

    def __init__(self, path: Path, device: str | torch.device = "cpu"):
        self.name, self.path = f"eye:{path}", path
        tensors, eye = files.read(path).tensors, Eye()
        check_names("eye", eye.state_dict(), tensors, path)
        check_values("eye", tensors, path)
        eye.load_state_dict(tensors)
        self.eye = eye.to(device).eval().requires_grad_(False)

    def __call__(self, pictures: Tensor, prompts: list[str]) -> Tensor:
        if pictures.shape[1:] != (3, world.SIDE, world.SIDE):
            raise ConfigError(
                f"eye: reads pictures of the bundled world, {world.SIDE} pixels square, found {list(pictures.shape)}"
            )
        seen, wanted = log_p(self.eye(pictures.float())), said(prompts).to(pictures.device)
        return (seen * wanted).sum(dim=1) / wanted.sum(dim=1)

    def identity(self) -> object:
        return ["eye", sha256(self.path)]


# --------------------------------------------------------------------------------------------------------------- what it is shown

SEED = 10**9  # of the scenes that the eye is judged by
MIXED, NOISE = 0.7, 0.5  # share of worn pictures that are mixtures; the most noise, where latents have deviation 1
DOUBLED = 0.3  # share of pictures of two things that are, or are mixed with, a spoiled one
BESIDE = [(x, y) for x in (-16, -8, 0, 8, 16) for y in (-16, -8, 0, 8, 16) if x or y]  # pixels: places of the latents
SPOILED = F.one_hot(torch.tensor(sum(CAPTION)), sum(CLASSES)).float()


def scene(rng: np.random.Generator) -> world.Scene:
    """A training scene, three in four of two things, two in five a little off the lattice and of another size."""
    found = world.training_scene(rng, 1 + int(rng.random() < 0.75))
    if rng.random() < 0.6:
        return found
    dx, dy, scale = rng.uniform(-3, 3), rng.uniform(-3, 3), rng.uniform(0.94, 1.06)
    return replace(found, things=tuple(replace(t, x=t.x + dx, y=t.y + dy, r=t.r * scale) for t in found.things))


def altered(found: world.Scene, rng: np.random.Generator) -> world.Scene:
    """The scene with about a third of its things' attributes, and now and then the background, of another; nothing held out."""
    while True:
        other, things = world.training_scene(rng, 2), []
        for thing, donor in zip(found.things, other.things, strict=False):
            taken = {name: getattr(donor, name) for name in THING if rng.random() < 0.35}
            thing = replace(thing, **taken)
            things.append(replace(thing, r=world.SIZES[thing.size or ""]))
        new = replace(found, things=tuple(things), background=(other if rng.random() < 0.2 else found).background)
        if not world.held_out(new):
            return new


def doubled(found: world.Scene, rng: np.random.Generator) -> world.Scene:
    """The scene of two things with a third: one of them, or half the time another, a place or two beside one of them."""
    which, (dx, dy) = int(rng.integers(2)), rng.permutation(np.array(BESIDE))[0]
    thing = found.things[which]
    again = thing if rng.random() < 0.5 else replace(altered(found, rng).things[which], x=thing.x, y=thing.y)
    again = replace(again, x=thing.x + dx, y=thing.y + dy)
    return replace(found, things=(again, *found.things) if rng.random() < 0.5 else (*found.things, again))


def spoiled(found: world.Scene, rng: np.random.Generator) -> world.Scene | None:
    """The scene doubled, now and then, if it has two things."""
    return doubled(found, rng) if len(found.things) == 2 and rng.random() < DOUBLED else None


def shown(scenes: Sequence[world.Scene]) -> tuple[Tensor, Tensor]:
    """Pictures [n, 3, 64, 64] in 0..1 of scenes, and what there is to say of them [n, k]: of a spoiled one, that it is."""
    truths = said([world.caption(replace(one, things=one.things[:2])) for one in scenes])
    for truth, one in zip(truths, scenes, strict=True):
        if len(one.things) > 2:
            truth[:] = SPOILED
    return torch.from_numpy(world.draw_batch(scenes)) / 2 + 0.5, truths


@torch.no_grad()
def worn(pipe: Pipeline, n: int, seed: int) -> tuple[Tensor, Tensor]:
    """n pictures decoded from latents that are a mixture of two scenes, and noisy; what they show, in shares [n, k]."""
    rng, noise = np.random.default_rng(seed), generator(seed)
    parts: list[tuple[Tensor, Tensor]] = []
    while 32 * len(parts) < n:
        scenes = [scene(rng) for _ in range(32)]
        (a, of_a), (b, of_b) = shown(scenes), shown([spoiled(one, rng) or altered(one, rng) for one in scenes])
        share, mixed, strength, noisy = torch.rand(4, 32, 1, 1, 1, generator=noise)
        share, strength = share * (mixed < MIXED), NOISE * strength * (noisy < 0.7)
        z, other = (pipe.vae.encode(x * 2 - 1).mean * pipe.vae.config.scaling_factor for x in (a, b))
        z = torch.lerp(z, other, share) + strength * torch.randn(z.shape, generator=noise)
        parts.append(((pipe.decode(z) / 2 + 0.5).clamp(0, 1), torch.lerp(of_a, of_b, share[:, 0, 0])))
    pictures, truths = (torch.cat(some)[:n] for some in zip(*parts, strict=True))
    return pictures, truths


# ---------------------------------------------------------------------------------------------------------------------- the task


@dataclass(frozen=True)
class EyeOptions(LoopOptions):
    """Train an eye to read pictures of the bundled world, as a reward that has gradients."""

    out: str = option("runs/eye", f"folder of the run; the eye is written to {FILE} in it")
    steps: int = option(1200, "steps of the whole run (may be changed on resume, before the cooldown has begun)")
    lr: float = option(2e-3, "peak learning rate")
    warmup: int = option(50, "steps in which the learning rate rises to its peak")
    cooldown: int = option(400, "last steps, in which it falls linearly to nearly nothing")
    ema: float = option(0.99, "decay of the moving average of the weights, which is what is evaluated and exported")
    eval_every: int = option(200, "steps between evaluations of the averaged weights; 0: never")
    save_every: int = option(200, "steps between checkpoints")
    worn: int = option(4096, "pictures that went through the autoencoder; half of each batch is taken from them")
    grain: float = option(0.06, "most noise on the pixels of a picture, of 1")


class TrainEye(Task):
    """What trains and what the loss is. ConfigError: no worn pictures, or noise out of range."""

    def __init__(self, options: EyeOptions):
        if options.worn < 1 or not 0 <= options.grain <= 1:
            raise ConfigError(
                f"--worn {options.worn}, --grain {options.grain:g}: expected at least one picture, and noise from 0 to 1"
            )
        self.options = options
        torch.manual_seed(options.seed)
        self.eye = Eye()
        channels_last(self.eye)
        self.modules = {"eye": self.eye}

    def prepare(self, ranks: Ranks) -> None:
        self.worn = worn(sdcore.load("tiny", device="cpu", dtype=torch.float32), self.options.worn, self.options.seed)

    def identity(self) -> dict[str, object]:
        return {"world": world.fingerprint()}

    def loss(self, part: Part) -> Loss:
        """Cross entropy, summed over what there is to say of a picture."""
        o, rng = self.options, part.common()
        scenes = np.random.default_rng(int(torch.randint(2**62, (1,), generator=rng)))
        found = [scene(scenes) for _ in range(o.batch - o.batch // 2)]
        fresh = shown([spoiled(one, scenes) or one for one in found])
        chosen = torch.randint(o.worn, (o.batch // 2,), generator=rng)
        pictures, truths = (torch.cat([x, old[chosen]]) for x, old in zip(fresh, self.worn, strict=True))
        grain = o.grain * torch.rand(o.batch, 1, 1, 1, generator=rng) * torch.randn(pictures.shape, generator=rng)
        pictures, truths = part.of(pictures + grain), part.of(truths)
        seen = log_p(self.eye(pictures.contiguous(memory_format=torch.channels_last)))
        return Loss(-(seen * truths).sum(dim=1).mean(), len(part.places))

    def evaluate(self, step: int, out: Path) -> dict[str, float]:
        """Share of the world's pictures, of seen combinations and of held-out ones, of which everything is said right."""
        rng = np.random.default_rng(SEED)
        held = [one for _, one in world.held_out_scenes(500, SEED)]
        return {"right": self.right([scene(rng) for _ in range(500)]), "right_held_out": self.right(held)}

    def right(self, scenes: Sequence[world.Scene]) -> float:
        pictures, truths = shown(scenes)
        found = torch.cat([self.eye(part) for part in pictures.split(100)])
        pairs = zip(found.split(CLASSES, dim=1), truths.split(CLASSES, dim=1), strict=True)
        wrong = [(x.argmax(1) != truth.argmax(1)) & (truth.sum(1) > 0) for x, truth in pairs]
        return 1 - torch.stack(wrong).any(0).float().mean().item()

    def export(self, out: Path) -> None:
        files.write(out / FILE, {name: tensor.contiguous() for name, tensor in self.eye.state_dict().items()})


def main(argv: list[str] | None = None) -> int:
    """`sdcore train eye`."""
    options = parse(EyeOptions, argv, prog="sdcore train eye")
    return run(TrainEye(options), options)


if __name__ == "__main__":
    raise SystemExit(main())
