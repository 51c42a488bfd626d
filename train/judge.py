"""Judge a model of the world: draw held-out prompts, let the checker read the pictures, count what is right.

    python -m sdcore.train.judge weights/tiny --prompts 300

Every prompt names a combination that training never showed. Beside each figure stands its chance level: the same pictures
read against the demands of other prompts. The autoencoder is judged too, on pictures that it never saw: PSNR, and how often
the checker reads everything right from the reconstruction; no prompt can do better than that.
"""

import hashlib
import json
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from sdcore.weights import files
from torch import Tensor

from sdcore.pipeline import Pipeline
from sdcore.vae import VAE

from . import checker, world
from .loop import sha256
from .options import option, parse

SEED = 20_000  # of the held-out prompts
PART = 50  # pictures drawn together
PARTS = ("scheduler", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "unet", "vae")  # folders of a model


@dataclass(frozen=True)
class JudgeOptions:
    """Judge a model folder on held-out prompts with the world's exact checker."""

    prompts: int = option(300, "held-out prompts, alternately of one and of two objects")
    steps: int = option(25, "denoising steps")
    guidance: float = option(4.0, "guidance scale")
    sampler: str | None = option(None, "sampler; the model's own where it is not given")
    seed: int = option(0, "seed of the first picture")
    pictures: int = option(300, "pictures for the autoencoder")
    threads: int = option(2, "CPU threads")
    sheet: str | None = option(None, "PNG file for a sheet of the first 64 pictures")
    record: str | None = option(
        None, "a version; write it, the hashes of the weights and the verdict to FOLDER/version.json and its README.md"
    )
    json: bool = option(False, "print one JSON document instead of the table")


def rates(readings: Sequence[world.Scene], wanted: Sequence[world.Scene]) -> dict[str, float]:
    """Shares of right pictures: of one object (colour and shape), of two (everything that was said), and by attribute."""
    verdicts = [checker.matches(reading, demand) for reading, demand in zip(readings, wanted, strict=True)]
    kinds: dict[str, list[bool]] = {"one_object": [], "two_objects": []}
    for verdict, demand in zip(verdicts, wanted, strict=True):
        if len(demand.things) == 1:
            kinds["one_object"].append(all(verdict.get(key, True) for key in ("count", "colour", "shape")))
        else:
            kinds["two_objects"].append(all(verdict.values()))
    for key in ("count", *checker.ATTRIBUTES, "relation", "background"):
        kinds[key] = [verdict[key] for verdict in verdicts if key in verdict]
    return {key: round(float(np.mean(found)), 4) for key, found in kinds.items() if found}


def drawn(pipe: Pipeline, texts: Sequence[str], seed: int, **options) -> Tensor:
    """The pictures of several prompts [b, 3, 64, 64] in -1..1; the k-th has seed `seed` + k."""
    parts = []
    for i in range(0, len(texts), PART):
        part = list(texts[i : i + PART])
        latents = pipe(part, seed=[seed + i + k for k in range(len(part))], output="latent", **options).latents
        parts.append(pipe.decode(latents))
    return torch.cat(parts).clamp(-1, 1)


def prompts(
    pipe: Pipeline,
    n: int,
    steps: int = 25,
    guidance: float = 4.0,
    sampler: str | None = None,
    seed: int = 0,
    sheet: Path | str | None = None,
) -> dict[str, float]:
    """The rates on n held-out prompts; every key has its chance level beside it under `chance_` + key."""
    texts, wanted = zip(*world.held_out_prompts(n, SEED), strict=True)
    pixels = drawn(pipe, texts, seed, steps=steps, guidance=guidance, sampler=sampler).numpy()
    if sheet is not None:
        Image.fromarray(world.sheet(pixels[:64], scale=2)).save(sheet)
    readings = [checker.read(picture) for picture in pixels]
    found = rates(readings, wanted)
    # Prompts of one and two things alternate, so an even shift asks each picture for another prompt of its own kind.
    others = [rates(readings[shift:] + readings[:shift], wanted) for shift in (2, 4, 6, 8) if shift < n]
    return found | {f"chance_{key}": round(float(np.mean([o.get(key, 0.0) for o in others])), 4) for key in found}


@torch.no_grad()
def autoencoder(vae: VAE, n: int) -> dict[str, float]:
    """PSNR in dB of n pictures never seen (a mean over pictures), and what the checker reads from their reconstructions."""
    rng = np.random.default_rng(10**9 + SEED)
    scenes = [world.training_scene(rng) for _ in range(n)]
    x = torch.from_numpy(world.draw_batch(scenes))
    y = torch.cat([vae.decode(vae.encode(part).mean) for part in x.split(16)]).clamp(-1, 1)
    psnr = 10 * torch.log10(4 / ((x - y) ** 2).flatten(1).mean(dim=1))
    verdicts = [checker.matches(checker.read(picture), scene) for picture, scene in zip(y.numpy(), scenes, strict=True)]
    found = {
        "psnr": round(psnr.mean().item(), 2),
        "read_right": round(float(np.mean([all(v.values()) for v in verdicts])), 4),
    }
    for key in ("count", *checker.ATTRIBUTES, "relation", "background"):
        found[f"read_{key}"] = round(float(np.mean([v[key] for v in verdicts if key in v])), 4)
    return found


def fingerprint(folder: Path) -> dict[str, object]:
    """The sha256 of every weight, vocabulary and configuration file of a model, and one hash of them all: the model's name.

    What was made for the model later, such as a ControlNet, is no part of it and has a hash of its own.
    """
    paths = sorted(
        p for part in PARTS for p in (folder / part).glob("*") if p.suffix in (".safetensors", ".json", ".txt")
    )
    files = {str(p.relative_to(folder)): sha256(p) for p in paths}
    return {"hash": hashlib.sha256(json.dumps(files).encode()).hexdigest(), "files": files}


def table(verdict: dict[str, dict[str, float]]) -> str:
    """The verdict for a person."""
    shown, vae = verdict["prompts"], verdict["autoencoder"]
    lines = [f"{'':28}{'right':>8}{'chance':>8}"]
    names = {"one_object": "one object: colour, shape", "two_objects": "two objects: everything"}
    for key in shown:
        if not key.startswith("chance_"):
            lines.append(f"{names.get(key, '  ' + key):28}{shown[key]:8.1%}{shown['chance_' + key]:8.1%}")
    lines.append(f"{'reconstruction: PSNR':28}{vae['psnr']:5.1f} dB")
    lines.append(f"{'reconstruction: everything':28}{vae['read_right']:8.1%}")
    lines += [f"  {key.removeprefix('read_'):26}{vae[key]:8.1%}" for key in vae if key not in ("psnr", "read_right")]
    return "\n".join(lines)


AIMS = {"one_object": 0.90, "two_objects": 0.70}  # shares right of 300 held-out prompts at 25 steps
ROWS = {  # of the table, and their words
    "one_object": "one object: colour and shape", "two_objects": "two objects: everything that was said",
    "count": "number of objects", "shape": "shape", "colour": "colour", "size": "size", "texture": "texture",
    "relation": "relation", "background": "background",
}  # fmt: skip


def card(version: dict) -> str:
    """The figures of a version.json as a Markdown table, word for word what the model's card and the README show."""
    shown, vae = version["prompts"], version["autoencoder"]
    lines = ["| right | this model | chance | aim |", "|---|---|---|---|"]
    for key, words in ROWS.items():
        aim = f"{AIMS[key]:.0%}" if key in AIMS else ""
        lines.append(f"| {words} | {shown[key]:.1%} | {shown['chance_' + key]:.1%} | {aim} |")
    lines.append(f"| autoencoder: PSNR | {vae['psnr']:.1f} dB | | 27 dB |")
    lines.append(f"| autoencoder: everything read right | {vae['read_right']:.1%} | | 97% |")
    return "\n".join(lines)


def write_card(version: dict, page: Path) -> None:
    """Put the table of `card` in the place of the one that `page` shows. ValueError where it shows none."""
    text = page.read_text()
    head, *rest = card(version).splitlines()
    start = text.index(head)
    end = start + len(re.match(r"(\|.*\n)+", text[start:])[0])  # type: ignore[index]
    with files.replacing(page) as file:
        file.write((text[:start] + "\n".join([head, *rest]) + "\n" + text[end:]).encode())


def main(argv: list[str] | None = None) -> int:
    """`python -m sdcore.train.judge FOLDER`."""
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0].startswith("-"):
        print("usage: python -m sdcore.train.judge FOLDER [--prompts N ...]", file=sys.stderr)
        return 0 if "--help" in words or "-h" in words else 2
    options = parse(JudgeOptions, words[1:], prog="python -m sdcore.train.judge FOLDER")
    import sdcore

    torch.set_num_threads(options.threads)
    pipe = sdcore.load(words[0], device="cpu", dtype=torch.float32)
    verdict = {
        "prompts": prompts(pipe, options.prompts, options.steps, options.guidance, options.sampler, options.seed, options.sheet),
        "autoencoder": autoencoder(pipe.vae, options.pictures),
    }  # fmt: skip
    if options.record:
        settings = {
            key: getattr(options, key) for key in ("prompts", "steps", "guidance", "sampler", "seed", "pictures")
        }
        version = {"version": options.record, **fingerprint(Path(words[0])), "judged": settings, **verdict}
        with files.replacing(Path(words[0]) / "version.json") as file:
            file.write((json.dumps(version, indent=1) + "\n").encode())
        if (page := Path(words[0]) / "README.md").exists():
            write_card(version, page)
    print(json.dumps(verdict) if options.json else table(verdict))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
