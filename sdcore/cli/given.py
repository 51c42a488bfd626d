"""What `sdcore generate` was given beside its prompt: pictures, adapters, further passes, the settings of another picture.

Each `take_` function reads what its options name, so that what is wrong with a file is said before anything is drawn.
"""

from __future__ import annotations

import argparse
from typing import Any

import sdcore
from sdcore.errors import ConfigError, ImageError

from .words import assigned, number, share, tell, weighted

# What decides how a picture comes out, kept in its PNG under these names; each is also the name of an option.
RECORDED = (
    "model", "revision", "variant", "tokenizer", "negative", "steps", "guidance", "sampler", "schedule", "seed", "count",
    "size", "device", "dtype", "engine", "kernels", "prompt2", "negative2", "emphasis", "clip_skip", "few_step", "image",
    "strength", "mask", "feather", "outpaint", "depth", "noise_level", "image_guidance", "image_encoder", "refiner", "hires",
    "tiling",
)  # fmt: skip
LOSSY = ("deep_every", "fp8", "merge")  # the same, of the fast engine alone: ways to another picture, sooner
LISTED = ("lora", "embedding", "control", "image_prompt")  # the same of options that may be given more than once
# Of these from another tool's PNG, and what it may say beside them that is not followed here.
FOREIGN = ("negative", "steps", "guidance", "sampler", "schedule", "seed", "size", "emphasis", "clip_skip")
UNFOLLOWED = (
    "VAE", "Lora hashes", "TI hashes", "Denoising strength", "Hires upscale", "Hires resize", "Variation seed",
    "Variation seed strength", "ENSD", "Eta", "Refiner", "Tiling", "Face restoration", "Token merging ratio",
)  # fmt: skip


def option(name: str) -> str:
    """`deep_every` -> `--deep-every`."""
    return f"--{name.replace('_', '-')}"


def accelerated(pipe, args: argparse.Namespace):
    """The fast engine of a pipeline, as lossy as the options ask."""
    lossy = {name: getattr(args, name) for name in LOSSY if getattr(args, name) is not None}
    return sdcore.accelerate(pipe, kernels=args.kernels or "measured", **lossy)


def take_pictures(pipe, args: argparse.Namespace) -> dict[str, Any]:
    """Read the pictures that the options name; what of `Pipeline.steps` they come to."""
    from sdcore import image, tasks
    from sdcore.controlnet import Control
    from sdcore.guidance import Guidance
    from sdcore.weights.controls import load_control

    shown: dict[str, Any] = {"feather": args.feather, "noise_level": args.noise_level}
    if args.image_guidance is not None:
        shown["guidance"] = Guidance(args.guidance, image=args.image_guidance)
    size = args.size

    def fitted(picture):
        return picture if size is None or picture.size == size else image.fit(picture, *size)

    if args.image:
        picture = image.open_picture(args.image)
        mask = image.open_mask(args.mask, picture) if args.mask else None
        if tasks.kind_of(pipe) == "upscale":
            size = None  # it says itself how large the picture becomes
        shown["image"], shown["mask"] = fitted(picture), mask and fitted(mask)
        if args.outpaint:
            if mask:
                raise ConfigError("--outpaint: makes a mask of its own; leave --mask out")
            shown["image"], shown["mask"] = tasks.outpaint(image.to_tensor(shown["image"]), *args.outpaint)
        else:
            size = shown["image"].size
    elif args.mask or args.outpaint or args.strength:
        raise ConfigError("--mask, --outpaint, --strength: act on a picture; name it with --image")
    if args.strength:
        try:
            shown["strength"] = float(args.strength)
        except ValueError:
            shown["strength"] = image.to_mask(fitted(image.open_picture(args.strength)))
    if args.depth:
        shown["depth"] = image.to_mask(fitted(image.open_picture(args.depth)))
    controls: list[Control] = []
    nets: dict[str, Any] = {}  # one for all maps that name it
    for text in args.control:
        net, path, numbers = assigned(text, "--control")
        picture = image.open_picture(path)
        if size is None:  # what is drawn is as large as the first map
            factor = pipe.vae.config.factor
            size = tuple(max(side // factor * factor, factor) for side in picture.size)
        net, _, kind = net.partition("@")
        if net not in nets:
            nets[net] = load_control(net, pipe)
        try:
            begin, end = share(numbers[1]) if len(numbers) > 1 else (0.0, 1.0)
        except argparse.ArgumentTypeError as error:
            raise ConfigError(f"--control {text}: {error}") from None
        scale = number(numbers[0], "--control") if numbers else 1.0
        controls.append(Control(nets[net], image.to_unit(fitted(picture)), scale, begin, end, kind=kind or None))
    prompts = image_prompts(pipe, args)
    return shown | {"control": controls, "image_prompts": prompts} | ({"size": size} if not args.image else {})


def image_prompts(pipe, args: argparse.Namespace) -> list:
    """The picture prompts of `--image-prompt`."""
    from sdcore import image
    from sdcore.ip_adapter import ImagePrompt
    from sdcore.weights.ip_adapters import load_ip_adapter

    made: list[ImagePrompt] = []
    for text in args.image_prompt:
        net, path, numbers = assigned(text, "--image-prompt")
        if not args.image_encoder:
            raise ConfigError(
                "--image-prompt: needs the vision tower that it looks with; name its folder with --image-encoder"
            )
        pixels = image.to_unit(image.open_picture(path))
        adapter = load_ip_adapter(net, pipe, made[0].adapter.image_encoder if made else args.image_encoder)
        made.append(ImagePrompt(adapter, pixels, number(numbers[0], "--image-prompt") if numbers else 1.0))
    return made


def take_passes(pipe, args: argparse.Namespace, shown: dict[str, Any]) -> list:
    """What is drawn after the first pass: (pipeline, what to say to it of the pass before). A refiner has `shown` end sooner."""
    from sdcore import image

    further: list = []
    if args.taesd:
        from sdcore.weights.taesd import load_taesd

        args.taesd = load_taesd(args.taesd)
    if args.refiner:
        name, at = weighted(args.refiner)
        at = 0.8 if at is None else at
        if not 0 < at < 1:
            raise ConfigError(f"--refiner: expected a share of the way between 0 and 1, found {at:g}")
        refiner = sdcore.load(name, device=args.device, dtype=args.dtype, offload=args.offload)
        if args.engine == "fast":
            refiner = accelerated(refiner, args)
        shown["span"] = (0.0, at)
        further.append((refiner, lambda latents, pixels: {"image": latents, "span": (at, 1.0)}))
    if args.hires:
        text, wanted = weighted(args.hires)
        times, strength = number(text, "--hires"), 0.5 if wanted is None else wanted
        if not 1 < times <= 8:
            raise ConfigError(f"--hires: expected a number above 1 and up to 8, found {times:g}")

        def larger(latents, pixels):
            picture, factor = image.to_pictures(pixels)[0], pipe.vae.config.factor
            w, h = (round(side * times / factor) * factor for side in picture.size)
            return {"image": image.fit(picture, w, h, "stretch"), "strength": strength}

        further.append((pipe, larger))
    return further


def take_few_step(pipe, args: argparse.Namespace) -> dict[str, Any]:
    """Fill in what the user left open, for a few-step model as it wants it, and say so; return other options of its sampler."""
    from sdcore.few_step import few_step, recognised

    found = recognised(pipe, [args.model, *(path for path, _ in args.lora)]) if args.few_step is None else None
    args.few_step = found[0] if found else args.few_step or "off"
    wanted = {} if args.few_step == "off" else few_step(args.few_step)
    if found:
        said = ", ".join(f"{name} {value}" for name, value in wanted.items())
        tell(f"a few-step model, {found[1]}: {said}, but for what you give; --few-step off draws as with any model")
    sampled = args.sampler is None  # with another sampler, its schedule and options mean nothing
    for name, usual in (("steps", 30), ("guidance", 7.5), ("sampler", None), ("schedule", None)):
        value = wanted.pop(name, usual)
        if getattr(args, name) is None and (sampled or name != "schedule"):
            setattr(args, name, value)
    return wanted if sampled else {}


def take_embeddings(pipe, args: argparse.Namespace) -> dict[str, list[str]]:
    """Attach the embeddings of `--embedding`; what to record of them."""
    from sdcore import embeddings
    from sdcore.weights.embeddings import read_embeddings

    for path in args.embedding:
        for embedding in read_embeddings(path):
            embeddings.attach(pipe, embedding)
    return {"embedding": list(args.embedding)} if args.embedding else {}


def take_loras(pipe, args: argparse.Namespace) -> dict[str, list[str]]:
    """Attach the adapters of `--lora`, or have them at hand where the prompt calls them; what to record of them."""
    from sdcore import embeddings, lora
    from sdcore.weights.adapters import read_adapter

    for path, weight in args.lora:
        adapter, found = read_adapter(path, pipe)
        for embedding in found.embeddings:  # words that came with it
            embeddings.attach(pipe, embedding)
        if f"<lora:{adapter.name}:" not in args.prompt and f"<lora:{adapter.name}>" not in args.prompt:
            lora.attach(pipe, adapter, 1.0 if weight is None else weight)
        elif weight is None:
            pipe.adapters[adapter.name] = adapter
        else:
            raise ConfigError(
                f"--lora {path}:{weight:g}: the prompt calls {adapter.name!r} too; give its strength once"
            )
    return {"lora": [path if w is None else f"{path}:{w}" for path, w in args.lora]} if args.lora else {}


def take_settings(args: argparse.Namespace) -> dict[str, Any]:
    """Read the settings of `--from` into `args`, under what the user gave, and return them.

    They become words of the command line and are parsed like any: a stranger's PNG can say no more than a user could type.
    """
    from sdcore import image

    recorded = image.read_metadata(args.source)
    if "prompt" not in recorded:
        raise ImageError(
            f"{args.source}: has no settings in it; only PNGs keep them, and many web sites strip them off"
        )
    ours = str(recorded.get("version", "")).startswith("sdcore ")
    if not ours:
        tell(
            f"{args.source}: made by another program; its settings are taken, not its model, and the picture will differ"
        )
    for name, value in ({} if ours else image.read_parameters(args.source)).items():
        if name in UNFOLLOWED or (name == "RNG" and value != "CPU"):
            tell(f"{args.source}: says {name}: {value[:80]}, which is not followed")
    if ours:  # before there was a choice, brackets were read literally, and few-step models drew as any
        recorded.setdefault("emphasis", "none")
        recorded.setdefault("few_step", "off")
    known = [name for name in ((*RECORDED, *LOSSY) if ours else FOREIGN) if recorded.get(name) is not None]
    words = [option(name) if recorded[name] is True else f"{option(name)}={recorded[name]}" for name in known]
    for name in LISTED:
        if ours and not getattr(args, name) and isinstance(recorded.get(name), list):
            words += [f"{option(name)}={file}" for file in recorded[name]]
    from . import parser

    at = args.words.index("generate") + 1
    again = parser().parse_args([*args.words[:at], *words, *args.words[at:]])
    if again.engine == "plain":  # by the user's wish: ways of the fast engine are not taken over
        vars(again).update({name: getattr(args, name) for name in LOSSY})
    vars(args).update(vars(again))
    args.prompt = str(recorded["prompt"]) if args.prompt is None else args.prompt
    return recorded if ours else {}
