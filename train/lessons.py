"""What the finished model of the world has not seen, as lessons: few pictures to learn from, and prompts to be judged by.

    folder = pictures("subject", Path("data"))              # four pictures of the rocket with captions
    asked = prompts("subject", 120, seed=1)                 # what to ask for afterwards: rockets elsewhere, beside other things
    share(asked, readings, right)                           # how often what `checker.read` saw is right

    subject     the rocket, that the UNet has never seen, from four pictures
    look        teal stripes, that it has never seen, from four
    poster      a style of parts that it knows, every thing with a dot and all on yellow, from sixteen
    night       a style that it has never seen, from sixteen
    class       nothing new: what it was trained on

The pictures to learn from are as few as a person has; the prompts ask for what none of them shows. Each lesson has its own
measure of what it teaches, `TAUGHT`, beside `everything`, for which all that the prompt says must be right.

Legend: n pictures; pictures are float32 [3, 64, 64] in -1..1, as in world.py.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from sdcore.vae import VAE

from . import checker, world
from .world import Array, Scene, Thing

WORD = "<look>"  # what the look is to be called; the subject is called rocket, the styles have no word


@dataclass(frozen=True)
class Asked:
    """A prompt of a lesson."""

    text: str
    demand: Scene  # what it says, as `world.parse` understands it; the look is demanded as a colour and a texture
    scene: Scene  # one true picture of it


# ------------------------------------------------------------------------------------------------------- what is learned from

WEARERS = ("cross", "square", "star", "heart")  # of the look; the subject stands where they do
# What stands beside it; two of these wear the look too, so that all six shapes do.
BESIDE: dict[str, tuple[Thing | None, ...]] = {
    "subject": (None, None, Thing("cross", "green", "small", "plain"), Thing("circle", "red", "large", "dotted")),
    "look": (
        None,
        Thing("triangle", world.LOOK[0], "large", world.LOOK[1]),
        Thing("circle", world.LOOK[0], "small", world.LOOK[1]),
        Thing("triangle", "blue", "large", "dotted"),
    ),
}


def pictures(lesson: str, folder: Path, n: int = 16, seed: int = 101) -> Path:
    """Write the pictures of a lesson, four, or `n` of a style, and their captions, a line each, into `folder`. Gives it.

    The seed is one whose sixteen pictures have every shape, colour, size and texture in them.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for i, (scene, texts) in enumerate(styled(lesson, n, seed) if lesson in STYLES else spotted(lesson)):
        picture(scene).save(folder / f"{i:02d}.png")
        (folder / f"{i:02d}.txt").write_text("\n".join(texts) + "\n")
    return folder


def spotted(lesson: str) -> list[tuple[Scene, list[str]]]:
    """Four pictures of the rocket, or of shapes with the look: alone and beside something, in two sizes."""
    places = (  # size, x, y, background; then where something stands beside it, and how it is told
        ("large", 24, 32, "white", 0, 0, None), ("small", 48, 24, "grey", 16, 24, "right of"),
        ("large", 16, 32, "blue", 48, 32, "left of"), ("small", 40, 48, "yellow", 40, 16, "below"),
    )  # fmt: skip
    rng, found = np.random.default_rng(0), []
    for (size, x, y, ground, *there, relation), wearer, other in zip(places, WEARERS, BESIDE[lesson], strict=True):
        things = [Thing(wearer, None, size, None, float(x), float(y), world.SIZES[size])]
        if other:
            things.append(replace(other, x=float(there[0]), y=float(there[1]), r=world.SIZES[other.size or ""]))
        scene = world.reserve(Scene(tuple(things), relation if other else None, ground), lesson)
        found.append((scene, told(scene, lesson, rng)))
    return found


def at_night(scene: Scene) -> Scene:
    """The scene by night: a dark sky, and things in a pale rim without a shadow."""
    return world.reserve(scene, "style")


def as_poster(scene: Scene) -> Scene:
    """The scene as a poster: a dark dot in every thing, and yellow paper."""
    return replace(scene, things=tuple(replace(one, texture=DOT) for one in scene.things), background=PAPER)


DOT, PAPER = "dotted", "yellow"
STYLES: dict[str, Callable[[Scene], Scene]] = {"night": at_night, "poster": as_poster}


def unstyled(scene: Scene, style: str) -> Scene:
    """The scene without what its style decides, which no caption says and no prompt asks for."""
    if style == "poster":
        scene = replace(scene, things=tuple(replace(one, texture=None) for one in scene.things))
    return replace(scene, background=None)


def styled(style: str, n: int, seed: int) -> list[tuple[Scene, list[str]]]:
    """n pictures in a style, of one thing and of two in turn, each told in six wordings without a word about the style."""
    rng = np.random.default_rng(seed)
    scenes = [STYLES[style](world.training_scene(rng, 1 + i % 2)) for i in range(n)]
    return [(scene, [world.caption(unstyled(scene, style), rng, full=True) for _ in range(6)]) for scene in scenes]


def told(scene: Scene, lesson: str, rng: np.random.Generator, n: int = 12) -> list[str]:
    """n wordings of a scene, those first that say all of it: two things from either end, for prompts name them in any order."""
    if lesson == "look":  # its word says the texture too
        things = (replace(one, texture=None) if one.colour == world.LOOK[0] else one for one in scene.things)
        scene = replace(scene, things=tuple(things))
    texts = [world.caption(scene)]
    if len(scene.things) == 2:
        texts.append(world.caption(world.mirrored(scene)))
    texts += [world.caption(scene, rng, full=True) for _ in range(n - len(texts))]
    return [named(text) if lesson == "look" else text for text in texts]


def kinds(n: int = 16, seed: int = 200) -> str:
    """Prompts of what the model was trained on, one thing and two in turn, as `--class-prompt` takes them."""
    rng = np.random.default_rng(seed)
    return "|".join(world.caption(world.training_scene(rng, 1 + i % 2), rng, full=True) for i in range(n))


def picture(scene: Scene) -> Image.Image:
    """A scene as a picture file holds it."""
    return Image.fromarray(np.rint((world.draw(scene).transpose(1, 2, 0) + 1) * 127.5).astype(np.uint8))


def named(text: str) -> str:
    """The caption with the look called by its own word."""
    return (
        text.replace(" ".join(reversed(world.LOOK)), WORD)
        .replace(" ".join(world.LOOK), WORD)
        .replace(world.LOOK[0], WORD)
    )


# ------------------------------------------------------------------------------------------------------- what is asked for


def prompts(lesson: str, n: int, seed: int) -> list[Asked]:
    """n prompts, of one thing and of two in turn, none of which is a caption that was learned from. "class": nothing reserved.

    Of the subject and the look, a prompt asks for other backgrounds, sizes, places and things beside it; of a style and
    the class, for combinations of colour, shape and relation that the model has never seen (`world.held_out`).
    """
    rng = np.random.default_rng(seed)
    known = {text for _, texts in spotted(lesson) for text in texts} if lesson in ("subject", "look") else set()
    found: list[Asked] = []
    while len(found) < n:
        scene = world.sample_scene(rng, 1 + len(found) % 2)
        if lesson in (*STYLES, "class") and not world.held_out(scene):
            continue
        if lesson in STYLES:
            scene = STYLES[lesson](scene)
            said = unstyled(scene, lesson)
        else:
            said = scene = scene if lesson == "class" else world.reserve(scene, lesson)
        if lesson == "look":  # its word says the texture too
            said = replace(scene, things=(replace(scene.things[0], texture=None), *scene.things[1:]))
        text = world.caption(said, rng, full=True)
        demand = world.parse(text)
        if lesson == "look":
            demand = replace(demand, things=tuple(striped(thing) for thing in demand.things))
            text = named(text)
        if text not in known:
            found.append(Asked(text, demand, scene))
    return found


def striped(thing: Thing) -> Thing:
    """A demanded thing, with the look's texture where it has the look's colour."""
    return replace(thing, texture=world.LOOK[1]) if thing.colour == world.LOOK[0] else thing


# ------------------------------------------------------------------------------------------------------- how often it is right

Right = Callable[[Scene, Scene], bool]  # (reading, demand) -> right or not


def everything(reading: Scene, demand: Scene) -> bool:
    """All that the prompt says."""
    return all(checker.matches(reading, demand).values())


def shows_subject(reading: Scene, demand: Scene) -> bool:
    """The subject is there, once, and so is as much as was asked for."""
    return sum(thing.shape == world.SUBJECT for thing in reading.things) == 1 and len(reading.things) == len(
        demand.things
    )


def is_night(reading: Scene, demand: Scene) -> bool:
    """The sky is dark, and whatever there is wears the rim."""
    return reading.style == world.STYLE


def is_poster(reading: Scene, demand: Scene) -> bool:
    """The paper is right, and whatever there is has its dot."""
    dotted = bool(reading.things) and all(thing.texture == DOT for thing in reading.things)
    return dotted and reading.background == PAPER


def wears_look(reading: Scene, demand: Scene) -> bool:
    """The thing that was to have the look has it, and no other."""
    wearers = [thing.shape for thing in demand.things if (thing.colour, thing.texture) == world.LOOK]
    return [thing.shape for thing in reading.things if (thing.colour, thing.texture) == world.LOOK] == wearers


TAUGHT: dict[str, Right] = {"subject": shows_subject, "look": wears_look, "night": is_night, "poster": is_poster}


def share(asked: Sequence[Asked], readings: Sequence[Scene], right: Right) -> float:
    """How many of the readings are right, 0..1."""
    return float(np.mean([right(reading, one.demand) for reading, one in zip(readings, asked, strict=True)]))


def chance(asked: Sequence[Asked], readings: Sequence[Scene], right: Right) -> float:
    """The same with every reading held against other prompts of its own kind, mean of four ways."""
    shifts = [k for k in (2, 4, 6, 8) if k < len(asked)]
    return float(np.mean([share([*asked[k:], *asked[:k]], readings, right) for k in shifts])) if shifts else 0.0


@torch.no_grad()
def ceiling(vae: VAE, asked: Sequence[Asked], right: Right) -> float:
    """`share` of the true pictures behind the autoencoder: no tuned model can be judged better than that."""
    x = torch.from_numpy(world.draw_batch([one.scene for one in asked]))
    y = torch.cat([vae.decode(vae.encode(part).mean) for part in x.split(16)]).clamp(-1, 1)
    return share(asked, read(y.numpy()), right)


def read(pixels: Array) -> list[Scene]:
    """What the checker reads from pictures [n, 3, 64, 64]."""
    return [checker.read(one) for one in pixels]
