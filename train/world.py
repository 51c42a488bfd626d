"""A small procedural world: 64 x 64 pictures of shapes, and captions for them.

It gives the bundled model endless training pairs; `checker.py` reads pictures back and is its exact judge. Read it in three
parts: (1) the words of the world and the one type `Scene` that serves as the truth to draw, as what a caption demands and as
what the checker read; (2) drawing, by signed distance functions; (3) sampling scenes, with attribute combinations held out of
training, and captions both ways (`caption` writes, `parse` reads). `python -m sdcore.train.world --out
sheet.png` draws a sheet and times the drawing; `--folder pictures --count 4000` writes a folder that the methods train on.

Three things are reserved for later lessons, which teach them to the finished model: a subject (the rocket), a style (night:
dark sky, things with a pale rim) and a look (teal stripes). `vae_scene` draws them now and then, `training_scene` never does.

Shapes: pictures are float32 [3, 64, 64] (channel, row, column) in -1..1; u, v are pixels right of and below a thing's centre.
"""

from __future__ import annotations

import functools
import hashlib
import re
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

SIDE = 64
Array = np.ndarray

# ---------------------------------------------------------------------------------------------- 1. the words of the world

COLOURS = {  # RGB in 0..1
    "red": (0.88, 0.22, 0.22),
    "orange": (0.97, 0.56, 0.14),
    "yellow": (0.98, 0.84, 0.20),
    "green": (0.26, 0.66, 0.32),
    "blue": (0.22, 0.46, 0.88),
    "purple": (0.55, 0.32, 0.76),
    "pink": (0.98, 0.52, 0.74),
}
DARK = 0.4  # the second tone, that of stripes and dots, is the colour times this
BACKGROUNDS = {  # light tints, so that every colour stands out on every one of them
    "white": (0.97, 0.97, 0.96),
    "grey": (0.73, 0.75, 0.78),
    "green": (0.73, 0.89, 0.72),
    "blue": (0.71, 0.86, 0.97),
    "yellow": (0.99, 0.94, 0.70),
    "purple": (0.83, 0.78, 0.95),
}
SIZES = {"small": 8.5, "large": 12.5}  # name: radius in pixels
RELATIONS = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}  # where the first thing lies
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}

SUBJECT, STYLE, LOOK = "rocket", "night", ("teal", "striped")  # reserved; the look is a colour together with a texture
LOOK_TONE = (0.10, 0.66, 0.66)
NIGHT, RIM, RIM_WIDTH = (0.13, 0.15, 0.30), (1.0, 0.97, 0.82), 1.6


@dataclass(frozen=True)
class Thing:
    """One thing of a scene. None: not said (in a demand) or not applicable. x, y, r in pixels."""

    shape: str | None = None
    colour: str | None = None
    size: str | None = None
    texture: str | None = None
    x: float = SIDE / 2
    y: float = SIDE / 2
    r: float = SIZES["large"]


@dataclass(frozen=True)
class Scene:
    """A picture's content: the truth to draw, what a caption demands (None = free), or what the checker read.

    `relation` says where things[0] lies as seen from things[1]; `style` is "" or the reserved STYLE.
    """

    things: tuple[Thing, ...]
    relation: str | None = None
    background: str | None = None
    style: str = ""


# ------------------------------------------------------------------------------------------------------------ 2. drawing


def circle(u: Array, v: Array, r: float) -> Array:
    """Signed distance in pixels, negative inside (as of all shapes here; each fits into a square of side 2r)."""
    return np.hypot(u, v) - 0.95 * r


def square(u: Array, v: Array, r: float) -> Array:
    """An upright square."""
    return np.maximum(np.abs(u), np.abs(v)) - 0.85 * r


def triangle(u: Array, v: Array, r: float) -> Array:
    """A triangle, point up: below its base line, beside its slanted line (the other one mirrored by |u|)."""
    return np.maximum(v - 0.8 * r, 0.879 * np.abs(u) - 0.477 * (v + 0.95 * r))


def star(u: Array, v: Array, r: float) -> Array:
    """A five-pointed star: fold the plane into one tenth of a turn, where a single line bounds it."""
    fifth = 2 * np.pi / 5
    v = v - 0.06 * r
    angle = np.abs((np.arctan2(u, -v) + fifth / 2) % fifth - fifth / 2)
    distance = np.hypot(u, v)
    along, across = distance * np.cos(angle), distance * np.sin(angle)
    inner = 0.46  # the notches' radius, in units of the tips'
    dx, dy = 1 - inner * np.cos(fifth / 2), inner * np.sin(fifth / 2)
    return (dy * (along - 1.05 * r) + dx * across) / np.hypot(dx, dy)


def cross(u: Array, v: Array, r: float) -> Array:
    """An upright plus sign: the nearer of two bars."""
    a, b = np.abs(u), np.abs(v)
    return np.maximum(np.minimum(a, b) - 0.36 * r, np.maximum(a, b) - 0.95 * r)


def heart(u: Array, v: Array, r: float) -> Array:
    """A square standing on its corner, with a disc on each upper side."""
    side = 1.14 * r
    a, v = np.abs(u), v - 0.07 * side
    corner = (a + np.abs(v)) / np.sqrt(2.0) - side / 2
    disc = np.hypot(a - side / np.sqrt(8.0), v + side / np.sqrt(8.0)) - side / 2
    return np.minimum(corner, disc)


def rocket(u: Array, v: Array, r: float) -> Array:
    """The reserved subject's outline: the nearest of its parts."""
    return functools.reduce(np.minimum, [sdf(u, v, r) for sdf, _ in ROCKET])


def hull(u: Array, v: Array, r: float) -> Array:
    """A pointed oval, the overlap of two discs, cut off below."""
    return np.maximum(np.hypot(np.abs(u) + 0.72 * r, v) - 1.2 * r, v - 0.62 * r)


def fins(u: Array, v: Array, r: float) -> Array:
    """Two fins: a wedge that opens downwards."""
    a = np.abs(u)
    return np.maximum(np.maximum(v - 0.95 * r, 0.25 * r - a), (a - 0.75 * (v + 0.1 * r)) * 0.8)


Sdf = Callable[[Array, Array, float], Array]
SHAPES: dict[str, Sdf] = {s.__name__: s for s in (circle, square, triangle, star, cross, heart)}
OUTLINES: dict[str, Sdf] = {**SHAPES, SUBJECT: rocket}
ROCKET: list[tuple[Sdf, tuple[float, float, float]]] = [  # painted in this order
    (fins, (0.88, 0.22, 0.22)),
    (hull, (0.33, 0.37, 0.52)),
    (lambda u, v, r: np.maximum(hull(u, v, r), v + 0.45 * r), (0.88, 0.22, 0.22)),  # the nose
    (lambda u, v, r: np.hypot(u, v + 0.05 * r) - 0.27 * r, (0.98, 0.84, 0.20)),  # the window
]


# Textures are as broad as their thing: a small autoencoder paints over anything finer.


def plain(u: Array, v: Array, r: float) -> Array:
    """No second tone. Textures give the share of the second tone, 0..1, at each pixel."""
    return np.zeros(np.broadcast_shapes(u.shape, v.shape), np.float32)


def striped(u: Array, v: Array, r: float) -> Array:
    """One broad stripe across the middle, slanted, so that upright edges and bars cannot hide it."""
    return coverage(np.abs(u + v) * np.float32(0.7071) - 0.28 * r)


def dotted(u: Array, v: Array, r: float) -> Array:
    """One round dot in the middle."""
    return coverage(np.hypot(u, v) - 0.38 * r)


TEXTURES: dict[str, Sdf] = {t.__name__: t for t in (plain, striped, dotted)}
PIXELS = np.arange(SIDE, dtype=np.float32) + np.float32(0.5)  # pixel centres


@functools.cache
def backdrop(name: str) -> Array:
    """The empty background, [3, 64, 64] in 0..1: its colour, a trifle lighter at the top."""
    tone = np.array(NIGHT if name == STYLE else BACKGROUNDS[name], np.float32)
    light = 1.03 - 0.06 * PIXELS / SIDE
    return np.clip(tone[:, None, None] * light[None, :, None], 0, 1) * np.ones((1, 1, SIDE), np.float32)


def tones(colour: str) -> tuple[Array, Array]:
    """The main and the second tone of a colour, each [3, 1, 1]."""
    main = np.array(LOOK_TONE if colour == LOOK[0] else COLOURS[colour], np.float32)[:, None, None]
    return main, DARK * main


def coverage(distance: Array) -> Array:
    """How much of each pixel lies inside, from its signed distance: the antialiasing."""
    return np.clip(0.5 - distance, 0, 1)


def paint(canvas: Array, thing: Thing, style: str) -> None:
    """Paint a thing and its soft shadow (at night: its rim) onto the canvas [3, 64, 64] in 0..1, in place."""
    reach = int(thing.r) + 5  # only this window of the canvas changes
    top, left = max(int(thing.y) - reach, 0), max(int(thing.x) - reach, 0)
    area = canvas[:, top : top + 2 * reach + 1, left : left + 2 * reach + 1]
    u = (PIXELS[left : left + area.shape[2]] - np.float32(thing.x))[None, :]
    v = (PIXELS[top : top + area.shape[1]] - np.float32(thing.y))[:, None]
    distance = OUTLINES[thing.shape or ""](u, v, thing.r)
    if style == STYLE:
        area += coverage(distance - RIM_WIDTH) * (np.array(RIM, np.float32)[:, None, None] - area)
    else:  # the shadow is the shape again, a pixel to the right and two down, with a wide soft edge
        area[:, 2:, 1:] *= 1 - 0.16 * coverage(distance[:-2, :-1] / 3)
    if thing.shape == SUBJECT:
        for sdf, rgb in ROCKET:
            area += coverage(sdf(u, v, thing.r)) * (np.array(rgb, np.float32)[:, None, None] - area)
    else:
        main, second = tones(thing.colour or "")
        area += coverage(distance) * (main + TEXTURES[thing.texture or "plain"](u, v, thing.r) * (second - main) - area)


def draw(scene: Scene) -> Array:
    """A scene's picture, float32 [3, 64, 64] in -1..1. The same scene always gives the same bits."""
    canvas = backdrop(scene.style or scene.background or "white").copy()
    for thing in scene.things:
        paint(canvas, thing, scene.style)
    return np.clip(canvas, 0, 1) * 2 - 1


def draw_batch(scenes: Sequence[Scene]) -> Array:
    """Pictures of several scenes, float32 [b, 3, 64, 64] in -1..1."""
    return np.stack([draw(scene) for scene in scenes])


# ------------------------------------------------------------------------------ 3. scenes, the held-out split, and captions

# Colour and shape pairs never seen in training: each shape lacks one colour, so every single value is still seen.
HELD_OUT_PAIRS = frozenset(
    {
        ("red", "star"),
        ("orange", "cross"),
        ("yellow", "square"),
        ("green", "triangle"),
        ("blue", "heart"),
        ("purple", "circle"),
    }
)


def held_out(scene: Scene) -> bool:
    """True where a scene holds a combination kept from training: a colour with a shape, or two things in a relation.

    Of the (colour, shape, relation, colour, shape) combinations one in five is held out, by a checksum of its name;
    "a left of b" is "b right of a", so the name is that of the left-of or above order.
    """
    if any((thing.colour, thing.shape) in HELD_OUT_PAIRS for thing in scene.things):
        return True
    if len(scene.things) < 2:
        return False
    if scene.relation in ("right of", "below"):
        scene = mirrored(scene)
    (a, b), relation = scene.things, scene.relation
    return zlib.crc32(f"{a.colour} {a.shape} {relation} {b.colour} {b.shape}".encode()) % 5 == 0


def mirrored(scene: Scene) -> Scene:
    """The same two-thing scene told from the other end."""
    relation = OPPOSITE[scene.relation] if scene.relation else None
    return replace(scene, things=scene.things[::-1], relation=relation)


def pick(chance: float, options: Any) -> Any:
    """The option at `chance` (0 <= chance < 1). One vector of random numbers a scene is far cheaper than many calls."""
    return list(options)[int(chance * len(options))]


# Where the middles of things lie: on the lattice of the latents, one value for 8 pixels. So a shape has the same latents
# wherever it stands, and a UNet this small has one pattern a shape to learn instead of one for every shift in between.
MIDDLES = (24, 32, 40)
PLACES = ((16, 40), (16, 48), (24, 48))  # of two things in line


def sample_scene(rng: np.random.Generator, count: int | None = None) -> Scene:
    """A random scene of one or two things (`count`; None: either, evenly), held-out combinations included."""
    luck = rng.random(24)
    if count is None:
        count = 1 + int(luck[0] * 2)
    things = []
    for i in range(count):
        a, b, c, d = luck[1 + 4 * i : 5 + 4 * i]
        size = pick(c, SIZES)
        texture = pick(d, ("plain", "plain", "striped", "dotted"))
        things.append(Thing(pick(a, SHAPES), pick(b, COLOURS), size, texture, r=SIZES[size]))
    background = pick(luck[9], BACKGROUNDS)
    if count == 1:
        thing = replace(things[0], x=float(pick(luck[10], MIDDLES)), y=float(pick(luck[11], MIDDLES)))
        return Scene((thing,), None, background)
    first, second = things
    if (first.colour, first.shape) == (second.colour, second.shape):  # nothing could tell them apart
        return sample_scene(rng, count)
    # Two things stand in line along the axis of their relation, so which relation holds is never in doubt.
    relation = pick(luck[10], RELATIONS)
    along = 0 if RELATIONS[relation][0] else 1
    places = pick(luck[11], [(a, b) for a, b in PLACES if b - a > first.r + second.r + 5])
    if RELATIONS[relation][along] > 0:
        places = places[::-1]
    across = pick(luck[12], MIDDLES)
    first, second = (
        replace(thing, x=float(across if along else place), y=float(place if along else across))
        for thing, place in zip(things, places, strict=True)
    )
    return Scene((first, second), relation, background)


def training_scene(rng: np.random.Generator, count: int | None = None) -> Scene:
    """A random scene without any held-out combination and without anything reserved."""
    while held_out(scene := sample_scene(rng, count)):
        pass
    return scene


def vae_scene(rng: np.random.Generator) -> Scene:
    """For the autoencoder only: a training scene, or (15 %) one with the reserved subject, style or look in it.

    One in three is moved off the lattice and drawn a little larger or smaller, so that pictures from elsewhere survive as well.
    """
    scene, luck = training_scene(rng), rng.random(6)
    if luck[2] < 1 / 3:
        dx, dy, scale = 3 * (2 * luck[3] - 1), 3 * (2 * luck[4] - 1), 0.96 + 0.06 * luck[5]
        scene = replace(scene, things=tuple(replace(t, x=t.x + dx, y=t.y + dy, r=t.r * scale) for t in scene.things))
    if luck[0] >= 0.15:
        return scene
    return reserve(
        scene, pick(luck[1], ("subject", "style", "style", "look"))
    )  # the night changes most, so it needs most


def reserve(scene: Scene, what: str) -> Scene:
    """The scene with "subject", "style" or "look" in it; the subject and the look befall its first thing."""
    if what == "style":
        return replace(scene, style=STYLE, background=None)
    thing = scene.things[0]
    if what == "subject":
        thing = replace(thing, shape=SUBJECT, colour=None, texture=None)
    else:
        thing = replace(thing, colour=LOOK[0], texture=LOOK[1])
    return replace(scene, things=(thing, *scene.things[1:]))


SAYINGS = {  # what is said for a value; the first wording is the canonical one
    "small": ("small", "little"),
    "large": ("large", "big"),
    "striped": ("striped", "with stripes"),
    "dotted": ("dotted", "spotted", "with dots"),
    "plain": ("plain",),
    "left of": ("left of", "to the left of"),
    "right of": ("right of", "to the right of"),
    "above": ("above", "over"),
    "below": ("below", "under"),
}
OPENINGS = ("", "", "", "", "a picture of ", "there is ")
GROUNDS = (
    "on a {} background",
    "on a {} background",
    "against a {} background",
    "in front of a {} background",
    "on {}",
)
VOCABULARY = tuple(  # every word a caption can hold: the closed list that the bundled tokenizer is trained on
    sorted(
        {*COLOURS, *BACKGROUNDS, *SHAPES, "shape", "a", "an", "and"}
        | {word for text in (*OPENINGS, *GROUNDS, *sum(SAYINGS.values(), ())) for word in re.findall("[a-z]+", text)}
    )
)


def caption(scene: Scene, rng: np.random.Generator | None = None, full: bool = False) -> str:
    """Words for a scene: lower case, from VOCABULARY. What is not named is free.

    rng None: the canonical caption, which names everything. Otherwise the wording varies, two things may be told from
    either end, and attributes are left out at random; `full` keeps every colour, shape and relation.
    """
    luck = iter(np.zeros(24) if rng is None else rng.random(24))
    keep = 1.0 if full or rng is None else 0.93  # for what is nearly always said

    def say(value: str) -> str:
        return pick(next(luck), SAYINGS[value])

    if len(scene.things) == 2 and next(luck) >= 0.5:
        scene = mirrored(scene)
    opening = pick(next(luck), OPENINGS)
    phrases = []
    for thing in scene.things:
        size = [say(thing.size)] if thing.size and next(luck) < 0.6 else []
        colour = [thing.colour] if thing.colour and next(luck) < keep else []
        shape = thing.shape if thing.shape and next(luck) < keep + 0.03 else "shape"
        texture: list[str] = []
        behind: list[str] = []
        if thing.texture and next(luck) < (0.3 if thing.texture == "plain" else 0.7):
            said = say(thing.texture)
            (behind if said.startswith("with") else texture).append(said)
        described = colour + texture if next(luck) < 0.6 else texture + colour
        words = size + described + [shape]
        phrases.append(" ".join([article(words[0]), *words, *behind]))
    text = opening + phrases[0]
    if len(phrases) == 2:
        joint = say(scene.relation) if scene.relation and next(luck) < keep else "and"
        text += f" {joint} {phrases[1]}"
    if scene.background and next(luck) < 0.6:
        text += " " + pick(next(luck), GROUNDS).format(scene.background)
    return text


def article(word: str) -> str:
    """a or an."""
    return "an" if word[0] in "aeiou" else "a"


MEANINGS: dict[str, tuple[str, Any]] = {  # word: the attribute and the value it names
    **{word: ("colour", word) for word in (*COLOURS, LOOK[0])},
    **{word: ("shape", word) for word in (*SHAPES, SUBJECT)},
    **{saying.split()[-1]: (attribute, value) for attribute, values in (("size", SIZES), ("texture", TEXTURES))
       for value in values for saying in SAYINGS[value]},
}  # fmt: skip
GROUND = re.compile(r" (?:on|against|in front of) (?:an? )?([a-z]+)(?: background)?$")
JOINT = {saying: value for value in RELATIONS for saying in SAYINGS[value]} | {"and": None}
JOINTS = re.compile(" (" + "|".join(sorted(JOINT, key=len, reverse=True)) + ") ")


def parse(text: str) -> Scene:
    """What a caption of this world demands, None where it says nothing; the inverse of `caption`. Positions mean nothing."""
    ground = GROUND.search(text)
    background = ground[1] if ground and ground[1] in BACKGROUNDS else None
    first, joint, second = (JOINTS.split(GROUND.sub("", text), maxsplit=1) + [None, None])[:3]
    phrases = [first] if second is None else [first, second]
    things = tuple(Thing(**dict(MEANINGS[w] for w in phrase.split() if w in MEANINGS)) for phrase in phrases)
    return Scene(things, JOINT[joint] if joint else None, background)


def held_out_scenes(n: int, seed: int) -> list[tuple[str, Scene]]:
    """n captions and their scenes, alternately of one and two things; each names a combination never seen in training."""
    rng = np.random.default_rng(seed)
    found: list[tuple[str, Scene]] = []
    while len(found) < n:
        scene = sample_scene(rng, 1 + len(found) % 2)
        text = caption(scene, rng, full=True)
        if held_out(parse(text)):
            found.append((text, scene))
    return found


def held_out_prompts(n: int, seed: int) -> list[tuple[str, Scene]]:
    """The captions of n held-out scenes with what they demand."""
    return [(text, parse(text)) for text, _ in held_out_scenes(n, seed)]


def training_pairs(rng: np.random.Generator, n: int) -> tuple[Array, list[str]]:
    """A training batch: pictures float32 [n, 3, 64, 64] in -1..1 and their captions."""
    scenes = [training_scene(rng) for _ in range(n)]
    return draw_batch(scenes), [caption(scene, rng) for scene in scenes]


def write_folder(folder: Path, n: int, seed: int, unseen: bool = False) -> None:
    """n pictures with their captions as a folder that the methods take: 00000.png and 00000.txt, four wordings, a line each.

    `unseen`: the scenes are held-out ones, with the one wording that names what is held out.
    """
    from PIL import Image

    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    held = held_out_scenes(n, seed) if unseen else []
    for i in range(n):
        scene = held[i][1] if unseen else training_scene(rng)
        texts = [held[i][0]] if unseen else [caption(scene, rng) for _ in range(4)]
        Image.fromarray(levels(draw(scene))).save(folder / f"{i:05}.png")
        (folder / f"{i:05}.txt").write_text("\n".join(texts) + "\n")


def vae_pictures(rng: np.random.Generator, n: int) -> Array:
    """A batch for the autoencoder, float32 [n, 3, 64, 64] in -1..1."""
    return draw_batch([vae_scene(rng) for _ in range(n)])


def fingerprint() -> str:
    """A hash of what is drawn and said, so that a run is not resumed in a world that has changed."""
    rng = np.random.default_rng(0)
    scenes = [training_scene(rng) for _ in range(32)] + [vae_scene(rng) for _ in range(32)]
    reserved = [reserve(scene, what) for scene in scenes[:8] for what in ("subject", "style", "look")]
    words = "\n".join([*VOCABULARY, *(caption(scene, rng) for scene in scenes[:32])])
    pixels = np.rint(draw_batch(scenes + reserved) * 127).astype(
        np.int8
    )  # rounded: the last bits depend on the machine
    return hashlib.sha256(words.encode() + pixels.tobytes()).hexdigest()


# ------------------------------------------------------------------------------------------------------- the sheet, by hand


def levels(picture: Array) -> Array:
    """A picture [3, H, W] in -1..1 as a file has it, uint8 [H, W, 3]."""
    return np.rint((picture.transpose(1, 2, 0) + 1) * 127.5).astype(np.uint8)


def sheet(pictures: Array, columns: int = 8, scale: int = 1) -> Array:
    """Pictures [b, 3, 64, 64] in -1..1 side by side, uint8 [H, W, 3], each pixel `scale` times as large."""
    b, _, h, w = pictures.shape
    rows = -(-b // columns)
    grid = np.full((rows * (h + 2), columns * (w + 2), 3), 255, np.uint8)
    for i, picture in enumerate(pictures):
        y, x = i // columns * (h + 2), i % columns * (w + 2)
        grid[y : y + h, x : x + w] = levels(picture)
    return grid.repeat(scale, 0).repeat(scale, 1)


def main() -> None:
    """Draw a sheet of 8 x 8 pictures, print their captions, time the drawing; or write a folder of pictures and captions."""
    import argparse
    import time

    from PIL import Image

    options = argparse.ArgumentParser(description=main.__doc__)
    options.add_argument("--out", default="sheet.png")
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--reserved", action="store_true", help="with the subject, the style and the look in turn")
    options.add_argument("--folder", type=Path, help="write pictures with captions here instead, to train on")
    options.add_argument("--count", type=int, default=4000, help="how many")
    options.add_argument("--held-out", action="store_true", help="of the scenes that are kept from training")
    args = options.parse_args()
    if args.folder:
        return write_folder(args.folder, args.count, args.seed, args.held_out)
    rng = np.random.default_rng(args.seed)
    scenes = [training_scene(rng) for _ in range(64)]
    if args.reserved:
        scenes = [reserve(scene, ("subject", "style", "look")[i % 3]) for i, scene in enumerate(scenes)]
    for scene in scenes[:8]:
        print(caption(scene, rng))
    Image.fromarray(sheet(draw_batch(scenes), scale=2)).save(args.out)
    start = time.perf_counter()
    training_pairs(rng, 1000)
    print(f"{args.out}: 64 pictures; scene, picture and caption take {time.perf_counter() - start:.2f} ms each")


if __name__ == "__main__":
    main()
