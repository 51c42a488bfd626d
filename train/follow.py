"""Judge a canny ControlNet of the bundled model: does the picture follow the edges, and still do what the words say?

    python -m sdcore.train.follow runs/canny/controlnet                             # or canny-tiny, the bundled one
    python -m sdcore.train.follow runs/canny/controlnet --ship weights/tiny/controlnet      # in fp16, with its verdict and card

Held-out prompts, as the model itself is judged by (train/judge.py), each with one true picture of it, whose edges are the
control. Every prompt is drawn with its control and without, from the same noise. Then two readings of both: F1 of the drawn
picture's edges against the control, within a pixel (train/edges.py), and the checker's, of everything that the prompt says.
The autoencoder's own figures stand beside, for no picture can follow its edges better than the true one behind it; and chance,
the edges of other pictures.

Legend: n pictures, H W pixels.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from sdcore.weights import fetch, files
from sdcore.weights.controls import load_control, write_control
from torch import Tensor

import sdcore
from sdcore.canny import canny
from sdcore.controlnet import Control, ControlNet
from sdcore.errors import AdapterError
from sdcore.image import to_tensor
from sdcore.pipeline import Pipeline

from . import judge, lessons, world
from .edges import edge_f1
from .lessons import Asked
from .log import draw_curve
from .options import option, parse
from .report import Result, Row, Sheet

if TYPE_CHECKING:
    from .chapter import Workshop

THRESHOLDS = (100.0, 200.0)  # Canny's, as in training
DRAWING = {"steps": 25, "guidance": 3.0}  # how every picture is drawn
SHIPPED = ("config.json", "diffusion_pytorch_model.safetensors")
ROWS = {  # of the card, and their words
    "edge_f1": "edges followed: F1 within a pixel",
    "everything": "prompts right: everything that was said",
    "one_object": "one object: colour and shape",
    "two_objects": "two objects: everything that was said",
}


@dataclass(frozen=True)
class FollowOptions:
    """Judge a canny ControlNet of the bundled model on held-out prompts."""

    prompts: int = option(120, "held-out prompts, alternately of one and of two objects")
    seed: int = option(30_000, "seed of the prompts; settings were chosen on others")
    threads: int = option(2, "CPU threads")
    sheet: str | None = option(None, "PNG file for a sheet: control, drawn with it, without")
    ship: str | None = option(None, "folder to write the ControlNet to, in fp16, with verdict and card")
    json: bool = option(False, "print one JSON document instead of the table")


def load_net(name: str | Path, pipe: Pipeline) -> ControlNet:
    """The ControlNet of a name, folder or file. AdapterError: it is another control; other errors as of `load_control`."""
    net = load_control(name, pipe)
    if not isinstance(net, ControlNet):
        raise AdapterError(f"{name}: is no ControlNet; this judges ControlNets that look at canny edges")
    return net


def outlines(pixels: np.ndarray) -> Tensor:
    """Canny's edges of pictures [n, 3, H, W] in -1..1: controls [n, 3, H, W], 0 or 1."""
    edges = np.stack([canny(world.levels(one), *THRESHOLDS) for one in pixels])
    return torch.from_numpy(edges).float().div(255)[:, None].expand(-1, 3, -1, -1)


def drawn(pipe: Pipeline, asked: Sequence[Asked], net: ControlNet | None, controls: Tensor) -> np.ndarray:
    """The prompts drawn [n, 3, H, W] in -1..1, the k-th from seed k, with their controls where there is a net."""
    parts = []
    for i in range(0, len(asked), judge.PART):
        part = slice(i, i + judge.PART)
        control = [] if net is None else [Control(net, controls[part])]
        parts.append(judge.drawn(pipe, [one.text for one in asked[part]], i, control=control, **DRAWING))
    return torch.cat(parts).numpy()


def follows(pixels: np.ndarray, controls: Tensor) -> float:
    """The mean F1 of the pictures' edges against their controls'."""
    pairs = zip(outlines(pixels).numpy(), controls.numpy(), strict=True)
    return float(np.mean([edge_f1(found[0], wanted[0]) for found, wanted in pairs]))


def reading(pixels: np.ndarray, asked: Sequence[Asked], controls: Tensor) -> dict[str, float]:
    """All figures of pictures of these prompts."""
    seen = lessons.read(pixels)
    rates = judge.rates(seen, [one.demand for one in asked])
    everything = lessons.share(asked, seen, lessons.everything)
    return {"edge_f1": follows(pixels, controls), "everything": everything, **rates}


@torch.no_grad()
def verdict(
    pipe: Pipeline, net: ControlNet, n: int, seed: int, sheet: Path | None = None
) -> dict[str, dict[str, float]]:
    """Figures of n prompts "controlled", "uncontrolled", of the "autoencoder" and by "chance"."""
    asked = lessons.prompts("class", n, seed)
    true = world.draw_batch([one.scene for one in asked])
    controls = outlines(true)
    with_, without = (drawn(pipe, asked, one, controls) for one in (net, None))
    behind = torch.cat([pipe.vae.decode(pipe.vae.encode(part).mean) for part in torch.from_numpy(true).split(16)])
    if sheet is not None:
        rows = [controls.numpy()[:8] * 2 - 1, with_[:8], without[:8]]
        Image.fromarray(world.sheet(np.concatenate(rows), scale=2)).save(sheet)
    others = np.roll(with_, 2, axis=0)  # a picture of another prompt of the same kind
    found = {
        "controlled": reading(with_, asked, controls),
        "uncontrolled": reading(without, asked, controls),
        "autoencoder": reading(behind.clamp(-1, 1).numpy(), asked, controls),
        "chance": reading(others, asked, controls),
    }
    return {name: {key: round(value, 4) for key, value in figures.items()} for name, figures in found.items()}


@torch.no_grad()
def tasks(pipe: Pipeline, net: ControlNet, seed: int = 40_000) -> np.ndarray:
    """What control does to each task, four rows of six pictures [24, 3, H, W] in -1..1.

    A picture of two things; the edges of one in which the second thing is another; that drawn from words along them; the picture
    drawn over along them; a mask around the second thing; what is painted there along them.
    """
    rng = np.random.default_rng(seed)
    pairs: list[tuple[world.Scene, world.Scene]] = []
    while len(pairs) < 4:
        scene, luck = world.training_scene(rng, 2), rng.random(2)
        shape, colour = world.pick(luck[0], world.SHAPES), world.pick(luck[1], world.COLOURS)
        other = replace(scene, things=(scene.things[0], replace(scene.things[1], shape=shape, colour=colour)))
        if shape != scene.things[1].shape and colour != scene.things[1].colour and not world.held_out(other):
            pairs.append((scene, other))
    before = torch.from_numpy(world.draw_batch([scene for scene, _ in pairs]))
    edges = outlines(world.draw_batch([other for _, other in pairs]))
    masks = torch.zeros(len(pairs), 1, world.SIDE, world.SIDE)
    for mask, (scene, _) in zip(masks, pairs, strict=True):
        x, y, r = (int(value) for value in (scene.things[1].x, scene.things[1].y, scene.things[1].r + 4))
        mask[:, max(y - r, 0) : y + r, max(x - r, 0) : x + r] = 1
    texts = [world.caption(other) for _, other in pairs]
    given: dict[str, Any] = {"control": [Control(net, edges)], "seed": [0, 1, 2, 3], **DRAWING}
    ways: list[dict[str, Any]] = [{}, {"image": before, "strength": 0.8}, {"image": before, "mask": masks}]
    along, over, within = (to_tensor(pipe(texts, **given, **way).images) for way in ways)
    shown = [before, edges * 2 - 1, along, over, masks.expand(-1, 3, -1, -1) * 2 - 1, within]
    return torch.stack(shown, dim=1).flatten(0, 1).numpy()


# ---------------------------------------------------------------------------------------------- the chapter's entry, and words


def controlnet(shop: "Workshop") -> Result:
    """The bundled ControlNet as it was made: canny edges, learned from pictures of the world (an entry of train/chapter.py)."""
    data, unseen = shop.folder / "pictures", shop.folder / "unseen"
    if not data.exists():
        world.write_folder(data, 2400, seed=1)
        world.write_folder(unseen, 12, seed=31, unseen=True)
    run = shop.train(
        "controlnet", "canny",
        f"--data {data} --validation {unseen} --validation-draws 2 --judged 12 --eval-every 50 --steps 800 --cooldown 300 "
        "--seed 1 --warmup 50 --batch 16 --lr 1e-3 --stem 8,16,32,64 --depths 1,0 --mid-depth 0",
    )  # fmt: skip
    shipped = shop.folder / "shipped"
    ship(load_net(run / "controlnet", shop.base), shipped)
    net = load_net(shipped, shop.base)
    found = verdict(shop.base, net, shop.options.prompts, shop.options.seed, shop.folder / "edges.png")
    record(shipped, found, {"prompts": shop.options.prompts, "seed": shop.options.seed, **DRAWING})
    Image.fromarray(world.sheet(tasks(shop.base, net), columns=6, scale=2)).save(shop.folder / "tasks.png")
    draw_curve(run / "log.jsonl", shop.folder / "f1.png", "edge_f1", smoothing=0.0)
    best, base, ceiling, chance = (found[name] for name in ("controlled", "uncontrolled", "autoencoder", "chance"))
    size = (shipped / SHIPPED[1]).stat().st_size / 1e6
    return shop.result(
        "ControlNet: canny edges",
        "Pictures of scenes that training never showed, drawn along the edges of one true picture each. Half of the captions "
        "were dropped in training. What is judged is the file that ships with the model, in fp16: "
        "a copy of the UNet's encoder without the transformers of its lower level and middle, so that it stays small.",
        [
            Row("edges followed, F1 within a pixel", best["edge_f1"], 0.75, False, base["edge_f1"], ceiling["edge_f1"],
                chance["edge_f1"], unit=""),
            Row("the same, drawn without the control", base["edge_f1"], 0.35, True, unit=""),
            Row("prompts right", best["everything"], None, False, base["everything"], ceiling["everything"],
                chance["everything"]),
            Row("prompts lost", base["everything"] - best["everything"], 0.05, True, unit="points"),
            Row("size", size, 3.0, True, unit="MB"),
        ],
        [
            Sheet("edges.png", "Edges of a true picture, drawn along them, drawn without: "
                  + "; ".join(one.text for one in lessons.prompts("class", 8, shop.options.seed))),
            Sheet("tasks.png", "A picture; the edges of another; drawn from words along them; drawn over along them; a mask; "
                  "painted there along them"),
            Sheet("f1.png", "F1 of twelve validation pictures over the steps: for a while nothing, then all at once"),
        ],
    )  # fmt: skip


def card(found: dict[str, dict[str, float]]) -> str:
    """The verdict as a Markdown table, word for word what the ControlNet's card shows."""
    columns = ("controlled", "uncontrolled", "autoencoder", "chance")
    lines = ["| | with the control | without | autoencoder | chance |", "|---|---|---|---|---|"]
    for key, words in ROWS.items():
        shown = (f"{found[c][key]:.3f}" if key == "edge_f1" else f"{found[c][key]:.1%}" for c in columns)
        lines.append(f"| {words} | " + " | ".join(shown) + " |")
    return "\n".join(lines) + "\n"


def ship(net: ControlNet, folder: Path) -> None:
    """Write a ControlNet in fp16, as diffusers has it."""
    write_control(folder, net, torch.float16)


def record(folder: Path, found: dict[str, dict[str, float]], judged: dict[str, object]) -> None:
    """version.json beside what was shipped: the hash of every file, of the model it belongs to, and the verdict."""
    model = judge.fingerprint(Path(fetch.resolve("tiny")))["hash"]
    weights = {p.name: judge.sha256(p) for p in sorted(folder.glob("*")) if p.name in SHIPPED}
    with files.replacing(folder / "version.json") as file:
        text = json.dumps({"model": model, "files": weights, "judged": judged, **found}, indent=1)
        file.write((text + "\n").encode())


def main(argv: list[str] | None = None) -> int:
    """`python -m sdcore.train.follow NAME`."""
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0].startswith("-"):
        print("usage: python -m sdcore.train.follow CONTROLNET [--prompts N ...]", file=sys.stderr)
        return 0 if "--help" in words or "-h" in words else 2
    options = parse(FollowOptions, words[1:], prog="python -m sdcore.train.follow CONTROLNET")
    torch.set_num_threads(options.threads)
    pipe = sdcore.load("tiny", device="cpu", dtype=torch.float32)
    net = load_net(words[0], pipe)
    if options.ship:  # what is judged is what is shipped, rounded as it is
        ship(net, Path(options.ship))
        net = load_net(options.ship, pipe)
    sheet = Path(options.sheet) if options.sheet else None
    found = verdict(pipe, net, options.prompts, options.seed, sheet)
    if options.ship:
        record(Path(options.ship), found, {"prompts": options.prompts, "seed": options.seed, **DRAWING})
    print(json.dumps(found) if options.json else card(found), end="\n" if options.json else "")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
