"""`sdcore generate`: its options, from loading to the saved pictures, and what a picture keeps of its making."""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import sdcore
from sdcore.errors import ConfigError, ImageError, PromptError

from . import given
from .words import Parser, margins, size, tell, weighted

MAX_COUNT = 100


def declare(c: Parser) -> None:
    """Every option of the command."""
    c.add_argument("prompt", nargs="?", help="what to draw (left out only with --from)")
    c.add_argument(
        "--out", default="out.png", metavar="F", help="the picture, a PNG that keeps all settings (%(default)s)"
    )
    c.add_argument("--negative", default="", metavar="TEXT", help="what to keep away from")
    c.add_argument("--prompt2", metavar="TEXT", help="XL: what the second text encoder reads (the prompt)")
    c.add_argument("--negative2", metavar="TEXT", help="XL: the same of --negative")
    c.add_argument(
        "--emphasis", default="a1111", metavar="NAME",
        help="how weights such as (this:1.3) act: a1111, no-norm, comfyui, compel; none takes brackets literally (%(default)s)",
    )  # fmt: skip
    c.add_argument(
        "--clip-skip",
        type=int,
        default=0,
        metavar="N",
        help="layers of the text encoder to leave out at the end (%(default)s)",
    )
    c.add_argument("--steps", type=int, metavar="N", help="steps of the sampler (30; few-step models: theirs)")
    c.add_argument(
        "--guidance", type=float, metavar="G", help="how closely to follow the prompt (7.5; few-step models: theirs)"
    )
    c.add_argument(
        "--few-step", metavar="NAME",
        help="sample as lcm, tcd, turbo, lightning-4, hyper-8, ... is to be; off: as any model (what its files say)",
    )  # fmt: skip
    c.add_argument("--sampler", metavar="NAME", help="ddim, euler, euler_a, dpmpp_2m, unipc, ... (the model's own)")
    c.add_argument("--schedule", metavar="NAME", help="leading, trailing, karras, ... (the model's own)")
    c.add_argument("--seed", type=int, default=0, metavar="N", help="which noise to start from (%(default)s)")
    c.add_argument("--size", type=size, metavar="WxH", help="in pixels (the size that the model was trained at)")
    c.add_argument(
        "--count", type=int, default=1, metavar="N", help="so many, from seeds N, N+1, ..., and a sheet of all"
    )
    c.add_argument(
        "--lora", action="append", type=weighted, default=[], metavar="F[:W]",
        help="an adapter's file and strength (1), again for more; one that the prompt calls by <lora:name:W> acts as that says",
    )  # fmt: skip
    c.add_argument(
        "--embedding",
        action="append",
        default=[],
        metavar="F",
        help="a textual-inversion file, to be named in the prompt; again for more",
    )
    picture_options(c)
    c.add_argument("--strip", metavar="F", help="also a PNG of the model's guess at every step")
    c.add_argument(
        "--from", "--like", dest="source", metavar="F",
        help="a PNG whose settings to take, of this program or of A1111's kin; options given here win",
    )  # fmt: skip
    model_options(c)
    c.add_argument("--device", metavar="NAME", help="cuda, cuda:1, mps or cpu (the first that is there)")
    c.add_argument("--dtype", metavar="NAME", help="float32, float16 or bfloat16 (what is fast and safe on the device)")
    c.add_argument(
        "--engine", choices=("plain", "fast"), default="plain",
        help="fast draws the same picture sooner, equal but for rounding (%(default)s)",
    )  # fmt: skip
    c.add_argument(
        "--kernels", choices=("torch", "triton", "measured"),
        help="what runs the operations; measured: the faster for every shape (torch; the fast engine on a GPU: measured)",
    )  # fmt: skip
    c.add_argument(
        "--deep-every", type=int, metavar="N", help="fast, lossy: the deep levels of the UNet at every N-th step only"
    )
    c.add_argument(
        "--fp8", action=argparse.BooleanOptionalAction,
        help="fast, lossy: the UNet's products in 8-bit floating point; sooner on Ada GPUs and later, slower on a CPU",
    )  # fmt: skip
    c.add_argument(
        "--merge",
        type=float,
        metavar="SHARE",
        help="fast, lossy: this share of the tokens merged, 0 to 0.75, where many",
    )
    c.add_argument(
        "--offload", action="store_true", help="keep on the device only the part at work: needs less of its memory"
    )
    c.add_argument("--json", action="store_true", help="one JSON document as the last line on stdout")


def model_options(c: Parser) -> None:
    c.add_argument(
        "--model", default="tiny", metavar="M", help="a name, hub id, folder or file (%(default)s, the bundled one)"
    )
    c.add_argument("--revision", metavar="NAME", help="of a hub repository")
    c.add_argument("--variant", metavar="NAME", help="fp16: that variant of the files")
    c.add_argument("--tokenizer", metavar="F", help="folder with vocab.json and merges.txt, for single files without")


def picture_options(c: Parser) -> None:
    """What a picture is drawn from beside a prompt."""
    c.add_argument(
        "--image", metavar="F", help="a picture to start from, or to follow an instruction on, or to enlarge"
    )
    c.add_argument(
        "--strength",
        metavar="S",
        help="share of the way to walk from it, 0 to 1; or a picture of that, white is 1 (0.8)",
    )
    c.add_argument("--mask", metavar="F", help="what of it to paint, white; the rest stays to the bit")
    c.add_argument(
        "--feather", type=int, default=0, metavar="N", help="pixels inside the mask to pass over (%(default)s)"
    )
    c.add_argument(
        "--outpaint", type=margins, metavar="L,T,R,B", help="paint so many pixels beyond its left, top, right, bottom"
    )
    c.add_argument("--depth", metavar="F", help="a depth map, near is white, for models that look at one")
    c.add_argument(
        "--noise-level",
        type=int,
        default=20,
        metavar="N",
        help="the upscaler: noise on the small picture (%(default)s)",
    )
    c.add_argument(
        "--image-guidance",
        type=float,
        metavar="G",
        help="models that follow instructions: how closely to keep to it (1.5)",
    )
    c.add_argument(
        "--control", action="append", default=[], metavar="NET=F[:S[:A-B]]",
        help="a ControlNet or T2I-Adapter, its map, scale (1) and share of the steps (0-1); again for more; NET@KIND for a Union",
    )  # fmt: skip
    c.add_argument(
        "--image-prompt", action="append", default=[], metavar="NET=F[:S]",
        help="an IP-Adapter, a picture that acts like words, scale (1); again for more",
    )  # fmt: skip
    c.add_argument("--image-encoder", metavar="F", help="the folder of the vision tower that IP-Adapters look with")
    c.add_argument(
        "--refiner", metavar="M[:S]", help="another model that draws the rest of the way from share S of it (0.8)"
    )
    c.add_argument("--hires", metavar="N[:S]", help="draw once more, N times as large, at strength S (0.5)")
    c.add_argument("--tiling", choices=("exact", "fast"), help="decode large pictures by tiles, in less memory")
    c.add_argument("--preview", metavar="F", help="keep a PNG of how far the picture is, new at every step")
    c.add_argument("--taesd", metavar="F", help="the small decoder that previews are made with (the model's own)")


def generate(args: argparse.Namespace) -> None:
    """Load, draw one picture after the other (so that each can be made again alone, bit for bit), write all at the end."""
    recorded = given.take_settings(args) if args.source else {}
    targets = check(args)
    import torch

    from sdcore import image, ops

    if recorded.get("device") == "cpu" and isinstance(threads := recorded.get("threads"), int) and 1 <= threads <= 256:
        torch.set_num_threads(threads)  # the order of a CPU's sums, and so their rounding, hangs on it
    begin = time.perf_counter()
    loading = {name: getattr(args, name) for name in ("revision", "variant", "tokenizer") if getattr(args, name)}
    pipe = sdcore.load(args.model, device=args.device, dtype=args.dtype, offload=args.offload, **loading)
    if (
        args.source
        and not recorded
        and args.clip_skip
        and (pipe.family.startswith("sd2") or pipe.unet.config.added_dim)
    ):
        tell(f"clip skip {args.clip_skip} is left out: the program that made the picture has none for such a model")
        args.clip_skip = 0
    loading |= given.take_embeddings(pipe, args) | given.take_loras(pipe, args)
    args.sampler_options = given.take_few_step(pipe, args)
    kernels: dict[str, Any] = {}
    if args.engine == "fast":
        pipe = given.accelerated(pipe, args)
    elif args.kernels not in (None, "torch"):
        from sdcore.kernels.engine import operations

        kernels |= operations(args.kernels, pipe.device)
    pipe.tiling = args.tiling
    shown = given.take_pictures(pipe, args)
    further = given.take_passes(pipe, args, shown)
    loaded = time.perf_counter()
    settings = describe(args, pipe) | loading
    for name in ("model_id", "torch", "device", "dtype"):
        if name in recorded and recorded[name] != settings[name]:
            tell(f"the picture was made with {name} {recorded[name]}, here it is {settings[name]}: it may differ")

    seeds = [args.seed + i for i in range(args.count)]
    previews: list[tuple[image.Picture, str]] | None = [] if args.strip else None
    with ops.using(**kernels):
        made = [
            draw(pipe, args, settings, seed, shown, further, previews if seed == args.seed else None) for seed in seeds
        ]
    pictures, notices = [picture for picture, _ in made], made[0][1]
    drawn = time.perf_counter()
    if args.count > 1:
        sheet = image.grid(pictures)
        sheet.metadata = pictures[0].metadata | {"count": args.count}
        pictures = [sheet, *pictures]
    if previews:
        strip = image.strip([picture for picture, _ in previews], [label for _, label in previews])
        strip.metadata = pictures[0].metadata
        pictures.append(strip)
    for picture, target in zip(pictures, targets, strict=True):
        picture.save(target)

    names = [str(target) for target in targets]
    report = {
        "images": names[1 : args.count + 1] if args.count > 1 else names[:1],
        "grid": names[0] if args.count > 1 else None,
        "strip": args.strip,
        "seeds": seeds,
        "settings": pictures[0].metadata,
        "notices": notices,
        "seconds": {"load": round(loaded - begin, 3), "draw": round(drawn - loaded, 3)},
    }
    print(json.dumps(report) if args.json else "\n".join(names))


def check(args: argparse.Namespace) -> list[Path]:
    """Return where the pictures go: the one or the sheet, then each of many, then the strip. What can fail, fails now."""
    if args.prompt is None:
        raise PromptError("prompt: missing; say what to draw, or give --from a PNG that sdcore made")
    if not args.prompt.strip():
        raise PromptError("prompt: empty; say what to draw")
    if not 1 <= args.count <= MAX_COUNT:
        raise ConfigError(f"--count: expected 1 to {MAX_COUNT}, found {args.count}")
    for name in given.LOSSY:
        if getattr(args, name) is not None and args.engine != "fast":
            raise ConfigError(
                f"{given.option(name)}: a way of the fast engine alone; add --engine fast, or leave it out"
            )
    from sdcore import image

    out = Path(args.out)
    targets = [out]
    if args.count > 1:
        targets += [out.with_name(f"{out.stem}-{i + 1}{out.suffix}") for i in range(args.count)]
    if args.strip:
        targets.append(Path(args.strip))
    if args.preview:
        image.check_target(args.preview)
    for target in targets:
        image.check_target(target)
    if len({target.resolve() for target in targets}) < len(targets):
        raise ImageError(f"{args.strip}: the strip would replace the picture; give --strip another name")
    return targets


def draw(
    pipe,
    args: argparse.Namespace,
    settings: dict[str, Any],
    seed: int,
    shown: dict,
    further: list,
    previews: list | None,
):
    """Return the picture from `seed` and what is to say of it; with `previews`, decode every step's guess into it too."""
    from tqdm import tqdm

    from sdcore import image, taesd

    words = dict(
        negative=args.negative, steps=args.steps, guidance=args.guidance, sampler=args.sampler, schedule=args.schedule,
        seed=seed, prompt2=args.prompt2, negative2=args.negative2, emphasis=args.emphasis, clip_skip=args.clip_skip,
        **args.sampler_options,
    )  # fmt: skip
    notices: list[str] = []
    latents: Any = None
    pixels: Any = None
    for which, (model, options) in enumerate([(pipe, lambda *_: shown), *further]):
        run = model.steps(args.prompt, **words | options(latents, pixels))
        name = f"seed {seed}" + (f", pass {which + 1}" if further else "")
        # disable=None: a bar only where stderr is a terminal
        for progress in tqdm(run, total=len(run.steps), desc=name, disable=None, leave=False, file=sys.stderr):
            if args.preview:
                now = taesd.preview(model, progress.x0, args.taesd)
                image.to_pictures(now)[0].save(args.preview)
            if previews is not None:
                label = f"step {progress.step.i + 1}/{progress.total}\nnoise {progress.step.sigma:.3g}"
                previews.append((image.to_pictures(model.decode(progress.x0))[0], label))
        latents = progress.x
        if which == len(further) or further[which][0] is pipe:  # an unfinished latent is handed on as it is
            pixels = run.decode(latents)
        notices += run.notices
    picture = image.to_pictures(pixels)[0]
    picture.metadata = settings | {"seed": seed, "size": f"{picture.size[0]}x{picture.size[1]}"}
    return picture, notices


def describe(args: argparse.Namespace, pipe) -> dict[str, Any]:
    """Everything that decides how the picture comes out."""
    import torch

    names = (
        "model", "prompt", "negative", "prompt2", "negative2", "emphasis", "clip_skip", "steps", "guidance", "schedule",
        "few_step", "engine", "kernels", "image", "strength", "mask", "depth", "image_guidance", "image_encoder", "refiner",
        "hires", "tiling",
    )  # fmt: skip
    said = {name: getattr(args, name) for name in names}
    if args.outpaint:
        said["outpaint"] = ",".join(map(str, args.outpaint))
    for name in ("feather", "noise_level"):
        if args.image:
            said[name] = getattr(args, name)
    said |= {name: getattr(args, name) for name in ("control", "image_prompt", *given.LOSSY) if getattr(args, name)}
    return said | {
        "sampler": args.sampler or pipe.scheduler.sampler,
        "device": pipe.device.type,
        "dtype": str(next(pipe.unet.parameters()).dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "model_id": model_id(pipe),
        "version": f"sdcore {sdcore.__version__}",
    }


def model_id(pipe) -> str:
    """Ten hex digits over the names, shapes and first values of all weights: two models do not share it."""
    import hashlib

    digest = hashlib.sha256()
    for part in (pipe.unet, pipe.vae, *pipe.text_encoders):
        for name, tensor in part.state_dict().items():
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.flatten()[:8].tolist()}".encode())
    return digest.hexdigest()[:10]
