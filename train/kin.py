"""The bundled model's kin, one for each official family that draws from something beside words: made, drawn with, judged, shown.

    python -m sdcore.train.kin                          # all of them; stop it as you like, it goes on
    python -m sdcore.train.kin --only depth --again     # one of them, from the beginning
    python -m sdcore.train.kin --record                 # also docs/reports/kin.md and its pictures

Each is a lesson of train/kin_lessons.py, some minutes long, and comes out as a folder in its family's own layout (an adapter as a
file). From there on nothing here knows more than a user: `sdcore.load`, one call with the family's arguments, pictures. These are
read by the exact checker, beside what the bundled model makes of the same words and beside true pictures. What is asked for are
combinations that no training showed. The workshop, its results and the report are the chapter's (train/chapter.py, report.py).
"""

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from sdcore.weights.ip_adapters import load_image_encoder, load_ip_adapter
from torch import Tensor

import sdcore
from sdcore.clip import variation_context
from sdcore.guidance import Guidance
from sdcore.ip_adapter import ImagePrompt
from sdcore.pipeline import Pipeline
from sdcore.voices import Conditions

from . import chapter, checker, follow, report, world
from .chapter import ChapterOptions, Entry, Workshop
from .kin_lessons import (
    LESSONS,
    Example,
    KinOptions,
    drawn,
    example,
    lesson,
    looked_at,
    maps,
    masks,
    rectangle,
    shapes,
    small,
    unit,
)
from .loop import run
from .options import option, parse
from .report import Result, Row
from .world import Array, Scene

DRAWING: dict[str, Any] = {"steps": chapter.STEPS, "sampler": chapter.SAMPLER, "guidance": chapter.GUIDANCE}
ABOUT = """# The bundled model's kin

Written by `python -m sdcore.train.kin --record`: the bundled model, taught for some minutes to take what each official family
takes (`train/kin_lessons.py`), loaded back and drawn with as a user does. Figures are the exact checker's. Untuned: what the
bundled model draws for the same words. Ceiling: true pictures behind the autoencoder. Chance: the pictures held against other
demands.
"""


@dataclass(frozen=True)
class AllOptions(ChapterOptions):
    """Make the bundled model's kin, draw with each, and report."""

    out: str = option("runs/kin", "folder of the runs and of report.html")
    prompts: int = option(48, "examples that each figure is of")
    record: bool = option(False, "also write docs/reports/kin.md and the sheets to docs/")


# ------------------------------------------------------------------------------------------------ making and measuring


def taught(shop: Workshop, kind: str, steps: int, **more: Any) -> Path:
    """The folder of a lesson's run, which goes on where it was stopped. A run that is stopped ends the program, saved."""
    out, o = shop.folder / "run", shop.options
    steps = o.steps or steps
    shop.commands.append(f"python -m sdcore.train.kin --only {shop.folder.name}")
    if chapter.complete(out):
        return out
    options = KinOptions(
        kind=kind, out=str(out), steps=steps, cooldown=steps // 2, resume=any((out / "checkpoints").glob("step-*")),
        threads=o.threads, eye=str(eye_of(shop)), **more,
    )  # fmt: skip
    begun, start = time.process_time(), time.time()
    code = run(lesson(options), options)
    spent = {"processor": time.process_time() - begun, "clock": time.time() - start, "threads": o.threads}
    with open(shop.folder / "times.jsonl", "a") as file:
        file.write(json.dumps({"run": kind, **spent}) + "\n")
    if code:
        raise SystemExit(code)
    return out


def eye_of(shop: Workshop) -> Path:
    """Where the entry `eye` leaves its tower."""
    return shop.folder.parent / "eye" / "run" / "image_encoder"


def loaded(folder: Path) -> Pipeline:
    """A model as a user loads it."""
    return sdcore.load(str(folder / "model"), device="cpu", dtype=torch.float32)


def unseen(shop: Workshop, kind: str) -> list[Example]:
    """The examples that a kind is judged by: combinations that no training showed."""
    seeds = range(shop.options.prompts)
    return [example(LESSONS[kind].make, np.random.default_rng([shop.options.seed, i]), unseen=True) for i in seeds]


def draw(pipe: Pipeline, words: Sequence[str] | Conditions, **given: Any) -> Array:
    """What a call makes, the k-th picture from seed k [n, 3, 64, 64] in -1..1."""
    seeds = list(range(len(words.context if isinstance(words, Conditions) else words)))
    pixels = pipe(words, seed=seeds, **DRAWING | given).pixels
    assert pixels is not None
    return pixels.clamp(-1, 1).numpy()


def behind(pipe: Pipeline, pixels: Tensor) -> Array:
    """Pictures as the autoencoder gives them back: no model can draw them better."""
    return pipe.decode(pipe.encode_image(pixels)).clamp(-1, 1).numpy()


def right(pixels: Array, demands: Sequence[Scene], keys: Sequence[str] = ()) -> float:
    """The share of pictures that show all that is demanded, or what of it these `keys` of `checker.matches` name."""
    verdicts = [checker.matches(checker.read(one), demand) for one, demand in zip(pixels, demands, strict=True)]
    return float(np.mean([all(v for key, v in verdict.items() if not keys or key in keys) for verdict in verdicts]))


def chance(pixels: Array, demands: Sequence[Scene]) -> float:
    """The same of every picture held against the demands of others, mean of three ways."""
    return float(np.mean([right(np.roll(pixels, k, axis=0), demands) for k in (1, 2, 3)]))


def psnr(found: Array, wanted: Tensor) -> float:
    """In dB, mean over pictures; 99 where nothing differs."""
    errors = ((found - wanted.numpy()) ** 2).mean((1, 2, 3))
    return float(np.mean(10 * np.log10(4 / np.maximum(errors, 4 * 10**-9.9))))


def judged(what: str, found: Array, base: Array, true: Array, demands: Sequence[Scene]) -> Row:
    """How many pictures are right, beside the untuned model's, the ceiling and chance."""
    return Row(
        what, right(found, demands), None, False, right(base, demands), right(true, demands), chance(found, demands)
    )


def finished(shop: Workshop, title: str, about: str, rows: Sequence[Row], shown: str, *sheet: Array | Tensor) -> Result:
    """A result with one sheet: rows of eight pictures."""
    pictures = [np.asarray(row, np.float32) * np.ones((1, 3, 1, 1), np.float32) for row in sheet]
    how = {
        "examples": shop.options.prompts,
        "seed": shop.options.seed,
        **{k: v for k, v in DRAWING.items() if k != "sampler"},
    }
    return shop.result(title, about, rows, [shop.sheet("drawn", shown, pictures)], how)


def listed(words: Sequence[str]) -> str:
    """The words under the columns of a sheet."""
    return "; ".join(words[:8])


# ------------------------------------------------------------------------------------------------ the kin


def instruct(shop: Workshop) -> Result:
    """instruct-pix2pix: a picture, and what is to be done to it."""
    pipe = loaded(taught(shop, "instruct", 1000))
    shown = unseen(shop, "instruct")
    words, before, scenes = [one.words for one in shown], looked_at(shown), [one.scene for one in shown]
    found = draw(pipe, words, image=before, guidance=Guidance(chapter.GUIDANCE, image=2.0))
    base, true = draw(shop.base, words, image=before, strength=0.8), behind(shop.base, drawn(scenes))
    done = [right(found[i : i + 1], [one.scene], [one.asked]) for i, one in enumerate(shown)]
    return finished(
        shop, "instruct-pix2pix (8 channels)",
        'A picture and an instruction, such as "make the star blue"; half of its words the bundled text encoder has never seen. '
        "It learns from scenes drawn twice, one attribute changed. Untuned: image to image at strength 0.8 from the same words.",
        [
            Row("what was asked is done", float(np.mean(done))),
            judged("everything right: what was asked and all the rest", found, base, true, scenes),
            Row("the rest of the picture, mean change", rest(found, shown), None, True, rest(base, shown), rest(true, shown),
                unit="of 255"),
        ],
        "Before, after: " + listed(words), before, found,
    )  # fmt: skip


def rest(found: Array, shown: Sequence[Example]) -> float:
    """How far pixels are from what they were, beyond the surroundings of the thing that was to change; of 255."""
    changes = []
    for after, one in zip(found, shown, strict=True):
        if one.before is not None and one.asked != "background":
            thing = one.before.things[one.place]
            reach = thing.r + 5
            away = 1 - rectangle(thing.x - reach, thing.y - reach, thing.x + reach, thing.y + reach)
            changes.append((np.abs(after - world.draw(one.before)).mean(0) * away).sum() / away.sum())
    return float(np.mean(changes)) * 127.5


def depth(shop: Workshop) -> Result:
    """Words along a depth map."""
    pipe = loaded(taught(shop, "depth", 400))
    shown = unseen(shop, "depth")
    words, near, scenes = [one.words for one in shown], maps(shown), [one.scene for one in shown]
    demands, edges = [world.parse(text) for text in words], follow.outlines(world.draw_batch(scenes))
    found, base, true = draw(pipe, words, depth=near), draw(shop.base, words), behind(shop.base, drawn(scenes))
    return finished(
        shop, "depth2img (5 channels)",
        "Words, and how near things are: the larger the nearer. Edges: F1 within a pixel of the drawn picture's against those of "
        "the true picture behind the map, as the bundled ControlNet is judged.",
        [
            Row("edges followed, F1 within a pixel", follow.follows(found, edges), None, False, follow.follows(base, edges),
                follow.follows(true, edges), follow.follows(np.roll(found, 1, axis=0), edges), unit=""),
            judged("words right: everything that was said", found, base, true, demands),
        ],
        "Depth, drawn along it: " + listed(words), near / near.amax((1, 2, 3), keepdim=True) * 2 - 1, found,
    )  # fmt: skip


def inpaint(shop: Workshop) -> Result:
    """Inpainting with a UNet that is shown the mask and what it leaves."""
    pipe = loaded(taught(shop, "inpaint", 450))
    shown = [
        replaced(one, np.random.default_rng([shop.options.seed, i])) for i, one in enumerate(unseen(shop, "inpaint"))
    ]
    words, scenes, area = [one.words for one in shown], [one.scene for one in shown], masks(shown)
    demands, before = [world.parse(text) for text in words], looked_at(shown)
    found, base = (draw(model, words, image=before, mask=area) for model in (pipe, shop.base))
    changed = float((np.abs(found - before.numpy()) * (1 - area.numpy())).max())
    return finished(
        shop, "inpainting (9 channels)",
        "A mask around one thing, and words for the picture with another in its place. Untuned: the bundled model inpaints the "
        "same with its 4 channels, where what stays is put back after every step.",
        [
            judged("words right: everything that was said", found, base, behind(shop.base, drawn(scenes)), demands),
            Row("unmasked pixels, largest change", changed * 127.5, 0.0, True, unit="of 255"),
        ],
        "Before, the mask on it, painted: " + listed(words), before, before * (1 - area) + area, found,
    )  # fmt: skip


def replaced(one: Example, rng: np.random.Generator) -> Example:
    """A picture of which one thing, which is masked, was another."""
    thing = one.scene.things[one.place]
    luck, reach = rng.random(2), thing.r + 4
    colour = world.pick(luck[0], [other for other in world.COLOURS if other != thing.colour])
    shape = world.pick(luck[1], [other for other in world.SHAPES if other != thing.shape])
    was = replace(thing, colour=colour, shape=shape)
    before = replace(one.scene, things=tuple(was if t is thing else t for t in one.scene.things))
    area = rectangle(thing.x - reach, thing.y - reach, thing.x + reach, thing.y + reach)
    return replace(one, before=before, mask=area)


def upscale(shop: Workshop) -> Result:
    """The upscaler: a picture of 8 x 8 pixels, and words, to one of 64 x 64."""
    pipe = loaded(taught(shop, "upscale", 350))
    shown = unseen(shop, "upscale")
    words, scenes = [one.words for one in shown], [one.scene for one in shown]
    true, demands = drawn(scenes), [world.parse(text) for text in words]
    less = small(true)
    large = F.interpolate(less, scale_factor=8, mode="bicubic").clamp(-1, 1).numpy()
    found, base, best = draw(pipe, words, image=less), draw(shop.base, words), behind(shop.base, true)
    silent = draw(pipe, [""] * len(words), image=less, guidance=1.0)
    return finished(
        shop, "upscaler (7 channels, and a noise level)",
        "A picture of 8 x 8 pixels with noise on it (level 20), and words, to 64 x 64. Untuned: drawn from the same words alone. "
        "In the last two figures there are no words, so all that is known is in the 64 pixels.",
        [
            Row("PSNR", psnr(found, true), None, False, psnr(base, true), psnr(best, true), unit="dB"),
            Row("PSNR of the small picture scaled by cubics", psnr(large, true), unit="dB"),
            judged("words right: everything that was said", found, base, best, demands),
            Row("PSNR, without words", psnr(silent, true), unit="dB"),
            judged("everything right, without words", silent, large, best, scenes),
        ],
        "The small picture, drawn from it and words, from it alone, true: " + listed(words),
        F.interpolate(less, scale_factor=8), found, silent, true,
    )  # fmt: skip


def refiner(shop: Workshop) -> Result:
    """A second model for the end of the way."""
    pipe = loaded(taught(shop, "refiner", 80, lr=2e-4, examples=768))
    shown = unseen(shop, "refiner")
    words, true = [one.words for one in shown], drawn([one.scene for one in shown])
    demands, best = [world.parse(text) for text in words], behind(shop.base, true)
    begun = shop.base(words, seed=list(range(len(words))), **DRAWING, span=(0.0, 0.8), output="latent").latents
    alone, found = draw(shop.base, words), draw(pipe, words, image=begun, span=(0.8, 1.0))
    ends = [psnr(draw(model, words, image=true, strength=0.2), true) for model in (pipe, shop.base)]
    apart = np.abs(found - alone)
    return finished(
        shop, "base, then refiner",
        "The bundled model walks the first four fifths of the way and hands on the latent; the refiner has learned the last "
        "fifth alone. Untuned: the bundled model walks all of it. The difference is shown eight times as large, on grey.",
        [
            Row("a true picture, noised to the last fifth and finished: PSNR", ends[0], None, False, ends[1], psnr(best, true),
                unit="dB"),
            judged("words right: everything that was said", found, alone, best, demands),
            Row("handed on against not, mean difference", float(apart.mean()) * 127.5, unit="of 255"),
        ],
        "The bundled model alone, handed on, the difference: " + listed(words), alone, found, (8 * (found - alone)).clip(-1, 1),
    )  # fmt: skip


def eye(shop: Workshop) -> Result:
    """The vision tower that the next two look with."""
    tower = load_image_encoder(
        taught(shop, "eye", 450, batch=24, examples=4096) / "image_encoder", "cpu", torch.float32
    )
    shown = unseen(shop, "eye")
    text, tokens = shop.base.text_encoders[0], shop.base.tokenizers[0]([world.caption(one.scene) for one in shown])
    with torch.no_grad():
        seen, said = tower.see(unit(looked_at(shown))).embedding, text(tokens).pooled
    nearest = torch.cdist(seen, said).argmin(dim=1)
    met = float((nearest == torch.arange(len(shown))).float().mean())
    return finished(
        shop, "a small CLIP vision tower",
        "It says of a picture what the bundled text encoder says, at its end token, of its words. The next two look with it.",
        [Row("the nearest of all captions is its own", met, None, chance=1 / len(shown))],
        "What it looks at", looked_at(shown),
    )  # fmt: skip


def variations(shop: Workshop) -> Result:
    """Image variations: the picture's vector in the place of the words."""
    pipe = loaded(taught(shop, "variations", 300, examples=1536))
    tower = load_image_encoder(eye_of(shop), "cpu", torch.float32)
    shown = unseen(shop, "variations")
    scenes, true = [one.scene for one in shown], looked_at(shown)
    seen, nothing = (Conditions(each, None) for each in variation_context(tower, unit(true)))
    found = draw(pipe, seen, negative=nothing)
    base, best = draw(shop.base, seen, negative=nothing), behind(shop.base, true)
    things = ("count", "shape", "colour")
    return finished(
        shop, "image variations",
        "A picture as one vector, no words. What was seen is to be there again, wherever. Untuned: the bundled model, told so.",
        [
            judged("everything right that the picture shows", found, base, best, scenes),
            Row("shapes and colours right", right(found, scenes, things), None, False, right(base, scenes, things),
                right(best, scenes, things)),
        ],
        "The picture, a variation: ", true, found,
    )  # fmt: skip


def ip_adapter(shop: Workshop) -> Result:
    """IP-Adapter: a picture beside the words."""
    run = taught(shop, "ip-adapter", 200, examples=1024)
    adapter = load_ip_adapter(run / "ip-adapter.safetensors", shop.base, eye_of(shop))
    shown = unseen(shop, "ip-adapter")[: max(8, shop.options.prompts // 2)]
    grounds = [list(world.BACKGROUNDS)[i % len(world.BACKGROUNDS)] for i in range(len(shown))]
    words = [f"{shapes(one.scene)} on a {ground} background" for one, ground in zip(shown, grounds, strict=True)]
    scenes, true = [one.before or one.scene for one in shown], looked_at(shown)
    wanted = [replace(scene, background=ground) for scene, ground in zip(scenes, grounds, strict=True)]

    def prompted(said: Sequence[str]) -> Array:
        calls = zip(said, unit(true).split(1), strict=True)  # a picture prompt is a call's, so one call each
        return np.concatenate(
            [draw(shop.base, [one], image_prompts=[ImagePrompt(adapter, seen)]) for one, seen in calls]
        )

    alone, both, base = prompted([""] * len(shown)), prompted(words), draw(shop.base, words)
    best, new = behind(shop.base, true), behind(shop.base, drawn(wanted))
    neither = draw(shop.base, [""] * len(shown))
    return finished(
        shop, "IP-Adapter",
        "The bundled model as it is, and a picture beside the words: without words what it shows is to be there again; with "
        "them, on the background that they name. Untuned: the same words without the picture.",
        [
            judged("everything right that the picture shows, without words", alone, neither, best, scenes),
            judged("the picture's things on the words' background", both, base, new, wanted),
            *(
                Row(f"{what} right, without words", right(alone, scenes, [what]), None, False, right(neither, scenes, [what]))
                for what in ("count", "colour", "shape", "background")
            ),
            Row("background right, with words", right(both, wanted, ["background"]), None, False,
                right(base, wanted, ["background"])),
        ],
        "The picture, drawn without words, with: " + listed(words), true, alone, both,
    )  # fmt: skip


def inversion(shop: Workshop) -> Result:
    """DDIM backwards, and from there again with other words. Nothing is learned."""
    shop.commands.append("python -m sdcore.train.kin --only inversion")
    pipe, shown = shop.base, [one for one in unseen(shop, "instruct") if one.before is not None]
    before, scenes = looked_at(shown), [one.scene for one in shown]
    was, now = (
        [world.caption(scene) for scene in each] for each in ([one.before or one.scene for one in shown], scenes)
    )
    way: dict[str, Any] = {"steps": 50, "guidance": 1.0}
    noise = pipe(was, noise=pipe.encode_image(before), sampler="ddim_inverse", output="latent", **way).latents
    again, changed = (draw(pipe, words, noise=noise, sampler="ddim", **way) for words in (was, now))
    fresh, best = draw(pipe, now, sampler="ddim", **way), behind(pipe, drawn(scenes))
    other = draw(pipe, was, sampler="ddim", **way)
    return finished(
        shop, "inversion (DDIM)",
        "A picture walked back to the noise that it would come from, then drawn from it again: with its own words, and with one "
        "changed. Untuned: the changed words from any noise. 50 steps, without guidance.",
        [
            Row("drawn again with its own words, PSNR", psnr(again, before), None, False, psnr(other, before),
                psnr(behind(pipe, before), before), unit="dB"),
            judged("changed words right", changed, fresh, best, scenes),
            Row("the rest of the picture, mean change", rest(changed, shown), None, True, rest(fresh, shown), rest(best, shown),
                unit="of 255"),
        ],
        "The picture, drawn again, with other words: " + listed(now), before, again, changed,
    )  # fmt: skip


ENTRIES = (
    Entry("instruct", instruct), Entry("depth", depth), Entry("inpaint", inpaint), Entry("upscale", upscale),
    Entry("refiner", refiner), Entry("eye", eye), Entry("variations", variations), Entry("ip-adapter", ip_adapter),
    Entry("inversion", inversion),
)  # fmt: skip


# ------------------------------------------------------------------------------------------------ from the shell


def main(argv: list[str] | None = None) -> int:
    """`python -m sdcore.train.kin`."""
    options = parse(AllOptions, argv, prog="python -m sdcore.train.kin")
    done = chapter.go_all(ENTRIES, options)
    if options.record:
        report.record(done, Path("docs"), "kin.md", ABOUT, "kin")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
