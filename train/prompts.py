"""Where the prompts come from that a model is rewarded on: a file, a list that others used, or the bundled model's world.

prompts("prompts.txt", 64, seed=0)      # a prompt a line; all of them, shuffled, then all again
prompts("world:two", 64, seed=0)        # captions of two things that training may show: never a held-out combination
prompts("held-out:two", 64, seed=20000) # of combinations that training never shows; also world, held-out, and :one
"""

from itertools import count
from pathlib import Path

import numpy as np
import torch

from sdcore.errors import ConfigError, TrainingError

from . import world
from .task import generator

ANIMALS = (
    "ant bat bear bee beetle bird butterfly camel cat chicken cow deer dog dolphin duck fish fly fox frog goat goose gorilla "
    "hedgehog horse kangaroo lion lizard llama monkey mouse pig rabbit raccoon rat shark sheep snake spider squirrel tiger "
    "turkey turtle whale wolf zebra"
).split()  # the 45 of DDPO's aesthetic task
OTHERS = "badger crab elephant giraffe lobster otter owl penguin snail swan walrus yak".split()
ACTIVITIES = ("washing the dishes", "riding a bike", "playing chess")
LISTS = {
    "mountain": ["a mountain with a flying bird"],  # what the chapter's notebook draws
    "animals": ANIMALS,
    "animals-held-out": OTHERS,
    "activities": [f"{world.article(animal)} {animal} {doing}" for animal in ANIMALS for doing in ACTIVITIES],
    "activities-held-out": [f"{world.article(animal)} {animal} {doing}" for animal in OTHERS for doing in ACTIVITIES],
}
COUNTS = {"": (1, 2), ":one": (1,), ":two": (2,)}  # of things, taken in turn


def prompts(source: str, n: int, seed: int) -> list[str]:
    """n prompts, a function of source and seed; more of them begin with the same. ConfigError, TrainingError: none to be had."""
    name, colon, kind = source.partition(":")
    if name in ("world", "held-out"):
        if colon + kind not in COUNTS:
            raise ConfigError(f"prompts {source}: expected {name}, {name}:one or {name}:two")
        return of_world(COUNTS[colon + kind], n, seed, held_out=name == "held-out")
    lines = LISTS.get(source) or read_lines(Path(source))
    rounds = (torch.randperm(len(lines), generator=generator(seed, k, 14)).tolist() for k in count())
    found: list[str] = []
    while len(found) < n:
        found += [lines[i] for i in next(rounds)]
    return found[:n]


def read_lines(path: Path) -> list[str]:
    """The prompts of a file. TrainingError."""
    if not path.is_file():
        raise TrainingError(
            f"prompts {path}: no such file; name one with a prompt a line, {', '.join(LISTS)}, world or held-out"
        )
    lines = [line.strip() for line in path.read_text("utf-8-sig").splitlines() if line.strip()]
    if not lines:
        raise TrainingError(f"prompts {path}: holds no prompt")
    return lines


def of_world(counts: tuple[int, ...], n: int, seed: int, held_out: bool) -> list[str]:
    """n captions that say everything, of scenes with these counts of things in turn; as `world.held_out_prompts` draws them."""
    rng, found = np.random.default_rng(seed), list[str]()
    while len(found) < n:
        text = world.caption(world.sample_scene(rng, counts[len(found) % len(counts)]), rng, full=True)
        if world.held_out(world.parse(text)) == held_out:
            found.append(text)
    return found
