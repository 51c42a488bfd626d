"""The checker: what does a picture of the world show? It sees nothing but pixels, and judges every model of the world.

    reading = read(picture)                     # a Scene
    matches(reading, parse("a red circle above a blue square"))     # {"count": True, "shape": True, ...}

Analysis by synthesis: things are cut out by their distance from the background, each shape is laid over the cut-out with the
same area and centre of mass, the best overlap wins; then colour and texture are read from the inside. Area, centre and overlap
are sums over many pixels, so blur and noise hardly move them. Read `read` first.

Shapes: as in world.py, pictures are float32 [3, 64, 64] in -1..1; a cut-out or cover is [64, 64] in 0..1.
"""

import functools
import itertools
from dataclasses import replace

import numpy as np

from .world import (
    BACKGROUNDS,
    COLOURS,
    LOOK,
    NIGHT,
    OUTLINES,
    PIXELS,
    RIM,
    RIM_WIDTH,
    SHAPES,
    SIDE,
    SIZES,
    STYLE,
    SUBJECT,
    TEXTURES,
    Array,
    Scene,
    Thing,
    backdrop,
    coverage,
    mirrored,
    paint,
    tones,
)

OPPONENT = np.array(
    [[0.2, 0.4, 0.1], [0.7, -0.7, 0.0], [0.35, 0.35, -0.7]], np.float32
)  # light, red-green, yellow-blue
U, V = PIXELS[None, :], PIXELS[:, None]


def nearest(rgb: Array, palette: dict[str, tuple[float, float, float]], limit: float = 0.2) -> str | None:
    """The palette's name for a colour [3] in 0..1, by distance in the opponent space; None beyond `limit`."""
    distances = {
        name: float(np.linalg.norm(OPPONENT @ (rgb - np.array(tone, np.float32)))) for name, tone in palette.items()
    }
    name = min(distances, key=distances.__getitem__)
    return name if distances[name] < limit else None


def difference(rgb: Array, ground: Array) -> Array:
    """How far each pixel is from the background [3, 64, 64], not counting what a shadow does: darken it a little. [64, 64]"""
    length = np.sqrt((ground**2).sum(0))
    along = (rgb * ground).sum(0) / length
    aside = (rgb**2).sum(0) - along**2
    darker = np.maximum(np.abs(length - along) - 0.17 * length, 0)
    return np.sqrt(np.maximum(aside, 0) + darker**2)


def islands(mask: Array, least: int = 24) -> list[Array]:
    """The connected parts of a boolean [64, 64] mask (4 neighbours) with at least `least` pixels, as masks, largest first."""
    left = set(zip(*(axis.tolist() for axis in np.nonzero(mask)), strict=True))
    found = []
    while left:
        stack, part = [left.pop()], []
        while stack:
            y, x = stack.pop()
            part.append((y, x))
            for step in ((y + 1, x), (y - 1, x), (y, x + 1), (y, x - 1)):
                if step in left:
                    left.remove(step)
                    stack.append(step)
        if len(part) >= least:
            found.append(np.zeros((SIDE, SIDE), bool))
            found[-1][tuple(zip(*part, strict=True))] = True
    return sorted(found, key=np.sum, reverse=True)


def grown(mask: Array, by: int = 2) -> Array:
    """The mask with `by` more pixels all round."""
    for _ in range(by):
        wide = np.pad(mask, 1)
        mask = wide[1:-1, 1:-1] | wide[2:, 1:-1] | wide[:-2, 1:-1] | wide[1:-1, 2:] | wide[1:-1, :-2]
    return mask


REACH = 20
RADII = SIZES["small"] * 1.05 ** np.arange(-6, 15)
BLURS = (0.0, 0.8, 1.4, 2.0, 2.6)  # standard deviations in pixels


def blurred(image: Array, sigma: float) -> Array:
    """A square image behind a Gaussian of standard deviation sigma pixels (0: as it is)."""
    return kernel(len(image), sigma) @ image @ kernel(len(image), sigma) if sigma else image


@functools.cache
def kernel(side: int, sigma: float) -> Array:
    """The Gaussian as a symmetric matrix that acts on rows or columns."""
    ticks = np.arange(side, dtype=np.float32)
    return np.exp(-0.5 * ((ticks[:, None] - ticks) / sigma) ** 2) / np.float32(sigma * np.sqrt(2 * np.pi))


@functools.cache
def bank(rim: float) -> tuple[list[Thing], list[float], Array]:
    """Every shape in every radius and blur, with its centre of mass in the middle of a 41 x 41 window.

    Gives the things (x, y: where the centre lies from the centre of mass), their blurs, and the windows [n, 1681] of length 1.
    """
    ticks = np.arange(-REACH, REACH + 1, dtype=np.float32)
    things, blurs, windows = [], [], []
    for shape, r in itertools.product(OUTLINES, RADII):
        cover = coverage(OUTLINES[shape](ticks[None, :], ticks[:, None], r) - rim)
        drop = float((cover.sum(1) @ ticks) / cover.sum())
        cover = coverage(OUTLINES[shape](ticks[None, :], ticks[:, None] + drop, r) - rim)
        size = min(SIZES, key=lambda name: abs(np.log(r / SIZES[name])))
        for sigma in BLURS:
            window = blurred(cover, sigma).ravel()
            things.append(Thing(shape, None, size, None, 0.0, -drop, float(r)))
            blurs.append(sigma)
            windows.append(window / np.linalg.norm(window))
    return things, blurs, np.stack(windows).astype(np.float32)


def fits(cover: Array, rim: float) -> dict[str, tuple[float, float, Thing]]:
    """For each shape, its best likeness (0..1) to a cut-out [64, 64], in which blur, and where it lies."""
    total = cover.sum()
    x, y = float((cover * U).sum() / total), float((cover * V).sum() / total)
    wide = np.pad(cover, REACH + 1)
    left, top = int(x - 0.5), int(y - 0.5)
    fx, fy = x - 0.5 - left, y - 0.5 - top  # the centre of mass lies between pixels: interpolate
    window = wide[top + 1 : top + 2 * REACH + 3, left + 1 : left + 2 * REACH + 3]
    window = window[:-1] * (1 - fy) + window[1:] * fy
    window = window[:, :-1] * (1 - fx) + window[:, 1:] * fx
    things, blurs, windows = bank(rim)
    scores = (windows @ window.ravel() / np.linalg.norm(window)).reshape(len(OUTLINES), -1)
    best = {}
    for i, shape in enumerate(OUTLINES):
        k = i * scores.shape[1] + int(scores[i].argmax())
        best[shape] = (float(scores[i].max()), blurs[k], replace(things[k], x=x, y=y + things[k].y))
    return best


def patterns(thing: Thing) -> tuple[list[str], Array]:
    """The textures but the plain one on a thing, a little shifted this way and that: their names and [n, 64, 64]."""
    names, shares = [], []
    for name, shift in itertools.product(("striped", "dotted"), (-0.15, 0.0, 0.15)):
        names.append(name)
        shares.append(TEXTURES[name](U - thing.x, V - thing.y + shift * thing.r, thing.r))
    return names, np.stack(shares).astype(np.float32)


def surface(rgb: Array, cover: Array, thing: Thing) -> tuple[str | None, str]:
    """Colour and texture of a thing at its place, from the picture, unmixed from what surrounds it, and its cover [64, 64]."""
    inside = cover > 0.8 * min(1.0, cover.max())
    pixels, weights = rgb[:, inside], cover[inside] ** 2  # where little of the thing is left, noise was magnified
    weights /= weights.sum()
    mean = OPPONENT @ (pixels @ weights)
    distances = {}
    for colour in (*COLOURS, LOOK[0]):  # from the mean to the stretch between the main tone and an even mixture of both
        main, second = (OPPONENT @ tone[:, 0, 0] for tone in tones(colour))
        way = (second - main) / 2
        share = np.clip((mean - main) @ way / (way @ way), 0, 1)
        distances[colour] = float(np.linalg.norm(mean - main - share * way))
    colour = min(distances, key=distances.__getitem__)
    main, second = (tone[:, 0, 0] for tone in tones(colour))
    share = (second - main) @ pixels / ((second - main) @ (second - main))  # of the second tone, at each pixel
    share -= share @ weights
    names, shares = patterns(thing)
    waves = shares[:, inside]
    waves = waves - (waves @ weights)[:, None]
    power, product = waves**2 @ weights, waves @ (weights * share)
    likeness = product / np.sqrt(power * (share**2 @ weights) + 1e-9)
    best = int(likeness.argmax())
    depth = product[best] / power[best]
    texture = names[best] if likeness[best] > 0.6 and depth > 0.3 else "plain"
    return (colour if distances[colour] < 0.2 else None), texture


def read(picture: Array) -> Scene:
    """What a picture [3, 64, 64] in -1..1 shows, from its pixels alone, largest thing first. None: not recognised."""
    rgb = np.clip((np.asarray(picture, np.float32) + 1) / 2, 0, 1)
    edge = np.ones((SIDE, SIDE), bool)
    edge[2:-2, 2:-2] = False
    tone = np.median(rgb[:, edge], axis=1)
    night = nearest(tone, BACKGROUNDS | {STYLE: NIGHT}, np.inf) == STYLE
    fall = backdrop("white")[:, :, :1] / backdrop("white").mean()
    ground = tone[:, None, None] * fall
    apart = np.sqrt(((rgb - ground) ** 2).sum(0)) if night else difference(rgb, ground)
    rim = RIM_WIDTH if night else 0.0
    things, rims = [], []
    for part in islands(apart > 0.2)[:4]:
        contrast = np.quantile(apart[part], 0.5)
        cover = np.where(grown(part, 4), np.clip(apart / contrast, 0, 1), 0).astype(np.float32)
        cover[cover < 0.15] = 0  # noise and what is left of the shadow
        found = fits(cover, rim)
        likeness, blur, thing = max((found[shape] for shape in SHAPES), key=lambda one: one[0])
        if found[SUBJECT][0] > 0.85 and likeness_to_subject(rgb, found[SUBJECT][2]) < 0.2:
            likeness, blur, thing = found[SUBJECT]
        distance = OUTLINES[thing.shape or ""](U - thing.x, V - thing.y, thing.r)
        inside = blurred(coverage(distance), blur)
        if night:
            rims.append(
                is_rimmed(rgb - ground, inside, blurred(coverage(distance - rim), blur) - inside, grown(part, 4))
            )
        if thing.shape != SUBJECT:
            around = np.array(RIM, np.float32)[:, None, None] if night else ground
            colour, texture = surface(around + (rgb - around) / np.maximum(inside, 0.2), inside, thing)
            thing = replace(thing, shape=thing.shape if likeness > 0.8 else None, colour=colour, texture=texture)
        things.append(thing)
    relation = None
    if len(things) == 2:
        dx, dy = things[0].x - things[1].x, things[0].y - things[1].y
        relation = ("left of" if dx < 0 else "right of") if abs(dx) > abs(dy) else ("above" if dy < 0 else "below")
    style = STYLE if night and rims and all(rims) else ""
    return Scene(tuple(things), relation, None if night else nearest(tone, BACKGROUNDS), style)


def is_rimmed(light: Array, inside: Array, rim: Array, near: Array) -> bool:
    """Whether a thing wears the night's rim, from the light [3, 64, 64] that it adds to the ground in the mask `near`.

    The colours of the inside and of the rim are solved for together, so blur may mix them; then the rim's hue decides.
    """
    _, hue = np.linalg.lstsq(np.stack([inside[near], rim[near]], 1), light[:, near].T, rcond=None)[0]
    pale = np.array(RIM) - np.array(NIGHT)
    return bool(hue @ pale > 0.97 * np.linalg.norm(hue) * np.linalg.norm(pale) and np.linalg.norm(hue) > 0.3)


def likeness_to_subject(rgb: Array, thing: Thing) -> float:
    """Root mean square difference between the pixels and the subject painted in its place, within its outline."""
    painted = rgb.copy()
    paint(painted, thing, "")
    inside = OUTLINES[SUBJECT](U - thing.x, V - thing.y, thing.r) < -0.5
    return float(np.sqrt(((painted - rgb)[:, inside] ** 2).mean()))


def shows(reading: Scene, what: str) -> bool:
    """Whether something reserved was read: `what` is "subject", "style" or "look"."""
    if what == "style":
        return reading.style == STYLE
    return any(
        thing.shape == SUBJECT if what == "subject" else (thing.colour, thing.texture) == LOOK
        for thing in reading.things
    )


ATTRIBUTES = ("shape", "colour", "size", "texture")


def matches(reading: Scene, wanted: Scene) -> dict[str, bool]:
    """What of a demand (from `world.parse`) a reading fulfils, by attribute; what the demand leaves free is not among the keys.

    `count` is always judged. With two things, they are paired off with the demanded ones the way that fulfils most.
    """
    orders = [reading]
    if len(reading.things) == 2:
        orders.append(mirrored(reading))
    return max((compare(order, wanted) for order in orders), key=lambda verdict: sum(verdict.values()))


def compare(reading: Scene, wanted: Scene) -> dict[str, bool]:
    """`matches` for things in the given order."""
    verdict = {"count": len(reading.things) == len(wanted.things)}
    found = [*reading.things, *[Thing()] * len(wanted.things)]
    for attribute in ATTRIBUTES:
        pairs = [(getattr(a, attribute), getattr(b, attribute)) for a, b in zip(found, wanted.things, strict=False)]
        if any(demand for _, demand in pairs):
            verdict[attribute] = all(demand is None or seen == demand for seen, demand in pairs)
    for attribute in ("relation", "background"):
        if demand := getattr(wanted, attribute):
            verdict[attribute] = getattr(reading, attribute) == demand
    return verdict
