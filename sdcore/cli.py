"""The command line: `sdcore generate | canny | train | bench | inspect | convert`.

Each command is a function over its parsed words, below the table that declares them; `main` parses, runs, and turns what goes
wrong into the exit code: 0 done; 2 the user can mend it, one line on stderr says what and how; 130 stopped by Ctrl-C;
anything else is a defect of ours and shows its traceback (1). Results go to stdout (with --json one document as the last
line), everything else to stderr. This file is one of the two doors of the core: only inside functions does it reach for
`sdcore.weights` and `sdcore.train`, and torch too is imported there, so that `sdcore --help` answers at once.
"""

from __future__ import annotations

import argparse
import json
import logging
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import sdcore
from sdcore.errors import ConfigError, ImageError, PromptError, SdcoreError

METHODS = ("lora", "dreambooth", "textual-inversion", "controlnet", "text2image", "text", "vae")
BENCHES = ("kernels", "unet", "pipeline", "train", "compile")
MAX_COUNT = 100
# What decides how a picture comes out, kept in its PNG under these names; each is also the name of an option.
RECORDED = (
    "model", "revision", "variant", "tokenizer", "negative", "steps", "guidance", "sampler", "schedule", "seed", "count",
    "size", "device", "dtype", "engine", "kernels", "prompt2", "negative2", "emphasis", "clip_skip", "few_step", "image",
    "strength", "mask", "feather", "outpaint", "depth", "noise_level", "image_guidance", "image_encoder", "refiner", "hires",
    "tiling",
)  # fmt: skip
LISTED = ("lora", "embedding", "control", "image_prompt")  # the same of options that may be given more than once
NO_MEMORY = ("out of memory", "can't allocate memory")
# Of these from another tool's PNG, and what it may say beside them that is not followed here.
FOREIGN = ("negative", "steps", "guidance", "sampler", "schedule", "seed", "size", "emphasis", "clip_skip")
UNFOLLOWED = (
    "VAE", "Lora hashes", "TI hashes", "Denoising strength", "Hires upscale", "Hires resize", "Variation seed",
    "Variation seed strength", "ENSD", "Eta", "Refiner", "Tiling", "Face restoration", "Token merging ratio",
)  # fmt: skip


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, without the usage."""

    def error(self, message: str):
        raise ConfigError(f"{message}; see {self.prog} --help")


def parser() -> Parser:
    """Every command and option."""
    top = Parser(prog="sdcore", description="Stable Diffusion from scratch: from a prompt to a picture.")
    top.add_argument("--version", action="version", version=f"sdcore {sdcore.__version__}")
    commands = top.add_subparsers(metavar="COMMAND", required=True)

    def command(name: str, run, text: str, **options: Any) -> Parser:
        made = commands.add_parser(name, help=text, description=text, **options)
        made.set_defaults(run=run)
        return made

    c = command("generate", generate, "Draw a picture of a prompt.")
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
        "--offload", action="store_true", help="keep on the device only the part at work: needs less of its memory"
    )
    c.add_argument("--json", action="store_true", help="one JSON document as the last line on stdout")

    c = command("canny", canny, "Draw the edges of a picture, as a ControlNet looks at them.")
    c.add_argument("picture", metavar="IN", help="a PNG, JPEG or WebP")
    c.add_argument("out", metavar="OUT", help="the edges, a PNG")
    c.add_argument(
        "--low", type=float, default=100, metavar="N", help="gradient from which a pixel may be an edge (%(default)s)"
    )
    c.add_argument("--high", type=float, default=200, metavar="N", help="gradient from which it is one (%(default)s)")
    c.add_argument("--size", type=size, metavar="WxH", help="scale and crop the picture to this first")
    c.add_argument(
        "--blank",
        type=share,
        metavar="A-B",
        help="leave columns out, as shares of the width: 0.25-0.75 is the middle half",
    )

    c = command("train", train, "Train a model; each method has its own --help.", add_help=False)
    c.add_argument("method", choices=METHODS)
    c.add_argument("rest", nargs=argparse.REMAINDER, help="options of the method")

    c = command("bench", bench, "Judge and time kernels, UNets, pictures; each has its own --help.", add_help=False)
    c.add_argument("what", choices=BENCHES)
    c.add_argument("rest", nargs=argparse.REMAINDER, help="options of the bench")

    c = command("inspect", inspect, "Say what a weight file or model folder is, and what would load where.")
    c.add_argument("model", metavar="FILE", help="a file, a folder, or a model's name")
    c.add_argument("--variant", metavar="NAME", help="fp16: that variant of a folder's files")
    c.add_argument("--json", action="store_true", help="one JSON document as the last line on stdout")

    c = command("convert", convert, "Write a model or a LoRA in another layout: a folder as a single file, or back.")
    c.add_argument("model", metavar="IN", help="a file, a folder, or a model's name")
    c.add_argument("target", metavar="OUT", help="what to write: a .safetensors file, or a folder")
    c.add_argument(
        "--layout",
        choices=("diffusers", "ldm", "kohya", "peft"),
        help="of OUT: a folder, or one file (the other one than IN's); of a LoRA: kohya or peft",
    )
    c.add_argument("--dtype", metavar="NAME", help="float32, float16 or bfloat16 (as it is)")
    c.add_argument("--ema", action="store_true", help="take the averaged weights of a training file")
    c.add_argument("--variant", metavar="NAME", help="fp16: that variant of a folder's files")
    c.add_argument("--tokenizer", metavar="F", help="folder with vocab.json and merges.txt, for single files without")
    return top


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


def share(text: str) -> tuple[float, float]:
    """`0.25-0.75` -> (0.25, 0.75), shares of a whole."""
    low, _, high = text.partition("-")
    try:
        begin, end = float(low), float(high)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected A-B such as 0.25-0.75, found {text!r}") from None
    if not 0 <= begin < end <= 1:
        raise argparse.ArgumentTypeError(f"expected 0 <= A < B <= 1, found {text!r}")
    return begin, end


def margins(text: str) -> tuple[int, ...]:
    """`64,0,64,0` -> (64, 0, 64, 0)."""
    try:
        sides = tuple(int(side) for side in text.split(","))
    except ValueError:
        sides = ()
    if len(sides) != 4 or min(sides) < 0:
        raise argparse.ArgumentTypeError(f"expected four whole numbers of pixels such as 64,0,64,0, found {text!r}")
    return sides


def assigned(text: str, option: str) -> tuple[str, str, list[str]]:
    """`NET=picture.png:0.8:0-0.5` -> (NET, picture.png, [0.8, 0-0.5]): what follows the last colons, as far as it is numbers."""
    net, equals, rest = text.partition("=")
    if not net or not rest:
        raise ConfigError(f"{option}: expected NET=PICTURE such as canny-sd15=edges.png:0.8, found {text!r:.200}")
    numbers: list[str] = []
    while ":" in rest and len(numbers) < 2:
        path, _, last = rest.rpartition(":")
        if not path or not re.fullmatch(r"[-+.\deE]+|nan|inf", last):
            break
        numbers, rest = [last, *numbers], path
    return net, rest, numbers


def number(text: str, option: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ConfigError(f"{option}: expected a number, found {text!r:.80}") from None


def weighted(text: str) -> tuple[str, float | None]:
    """`style.safetensors:0.8` or `style.safetensors` -> (file, strength or None)."""
    path, colon, weight = text.rpartition(":")
    try:
        return (path, float(weight)) if colon else (text, None)
    except ValueError:  # a colon in the file's name
        return text, None


def size(text: str) -> tuple[int, int]:
    """`512x768` or `512` -> (width, height)."""
    width, _, height = text.lower().partition("x")
    try:
        return int(width), int(height or width)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected WIDTHxHEIGHT such as 512x768, found {text!r}") from None


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0 done, 2 the user can mend it, 130 stopped; defects raise."""
    words = list(sys.argv[1:] if argv is None else argv)
    say = logging.StreamHandler()  # to stderr: what the loader and the pipeline have to tell
    say.setFormatter(logging.Formatter("note: %(message)s"))
    say.addFilter(Once())
    logging.getLogger("sdcore").addHandler(say)
    try:
        args = parser().parse_args(words)
        args.words = words
        return args.run(args) or 0
    except SdcoreError as error:
        return complain(str(error))
    except KeyboardInterrupt:
        print("sdcore: stopped", file=sys.stderr)
        return 130
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] == "sdcore":
            return complain(f"{error}: this copy of the core stands alone; install the whole package")
        raise
    except (MemoryError, RuntimeError) as error:  # torch raises RuntimeErrors: of its own kind on a GPU, bare on a CPU
        if not isinstance(error, MemoryError) and not any(words in str(error) for words in NO_MEMORY):
            raise
        return complain("not enough memory for this; try a smaller --size, --dtype float16, or --offload")
    finally:
        logging.getLogger("sdcore").removeHandler(say)


class Once(logging.Filter):
    """Every notice once: all pictures of many have the same to say."""

    def __init__(self) -> None:
        super().__init__()
        self.said: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        new = record.getMessage() not in self.said
        self.said.add(record.getMessage())
        return new


def complain(message: str) -> int:
    print(f"sdcore: {one_line(message)}", file=sys.stderr)
    return 2


def one_line(text: str) -> str:
    """No line breaks, and nothing that a terminal would obey: prompts and file names come from strangers."""
    return "".join(c if c.isprintable() else " " if c in "\n\t" else repr(c)[1:-1] for c in text)


# --- generate


def generate(args: argparse.Namespace) -> None:
    """Load, draw one picture after the other (so that each can be made again alone, bit for bit), write all at the end."""
    recorded = take_settings(args) if args.source else {}
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
    loading |= take_embeddings(pipe, args) | take_loras(pipe, args)
    args.sampler_options = take_few_step(pipe, args)
    kernels: dict[str, Any] = {}
    if args.engine == "fast":
        pipe = sdcore.accelerate(pipe, kernels=args.kernels or "measured")
    elif args.kernels not in (None, "torch"):
        from sdcore.kernels.engine import operations

        kernels |= operations(args.kernels, pipe.device)
    pipe.tiling = args.tiling
    shown = take_pictures(pipe, args)
    further = take_passes(pipe, args, shown)
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
            refiner = sdcore.accelerate(refiner, kernels=args.kernels or "measured")
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
    known = [name for name in (RECORDED if ours else FOREIGN) if recorded.get(name) is not None]
    words = [f"--{name.replace('_', '-')}={recorded[name]}" for name in known]
    for name in LISTED:
        if ours and not getattr(args, name) and isinstance(recorded.get(name), list):
            words += [f"--{name.replace('_', '-')}={file}" for file in recorded[name]]
    at = args.words.index("generate") + 1
    again = parser().parse_args([*args.words[:at], *words, *args.words[at:]])
    vars(args).update(vars(again))
    args.prompt = str(recorded["prompt"]) if args.prompt is None else args.prompt
    return recorded if ours else {}


def describe(args: argparse.Namespace, pipe) -> dict[str, Any]:
    """Everything that decides how the picture comes out."""
    import torch

    names = (
        "model", "prompt", "negative", "prompt2", "negative2", "emphasis", "clip_skip", "steps", "guidance", "schedule",
        "few_step", "engine", "kernels", "image", "strength", "mask", "depth", "image_guidance", "image_encoder", "refiner",
        "hires", "tiling",
    )  # fmt: skip
    given = {name: getattr(args, name) for name in names}
    if args.outpaint:
        given["outpaint"] = ",".join(map(str, args.outpaint))
    for name in ("feather", "noise_level"):
        if args.image:
            given[name] = getattr(args, name)
    given |= {name: getattr(args, name) for name in ("control", "image_prompt") if getattr(args, name)}
    return given | {
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


def tell(message: str) -> None:
    logging.getLogger("sdcore").warning(one_line(message))


# --- the others


def canny(args: argparse.Namespace) -> None:
    """Edges as white lines on black."""
    from sdcore import canny as canny_
    from sdcore import image

    target = image.check_target(args.out)
    if not 0 <= args.low <= args.high:
        raise ConfigError(f"--low, --high: expected 0 <= low <= high, found {args.low:g} and {args.high:g}")
    picture = image.open_picture(args.picture)
    picture = image.fit(picture, *args.size) if args.size else picture
    edges = canny_.canny(picture.pixels, args.low, args.high)
    if args.blank:
        width = edges.shape[1]
        edges[:, int(args.blank[0] * width) : int(args.blank[1] * width)] = 0
    image.Picture(edges[..., None].repeat(3, axis=2)).save(target)
    print(target)


def train(args: argparse.Namespace) -> int:
    import importlib

    return importlib.import_module(f"sdcore.train.{args.method.replace('-', '_')}").main(args.rest)


def bench(args: argparse.Namespace) -> int:
    from sdcore.kernels import bench as bench_

    return bench_.main([args.what, *args.rest])


def inspect(args: argparse.Namespace) -> None:
    from sdcore.weights import fetch, report

    found = report.inspect(fetch.resolve(args.model, variant=args.variant), variant=args.variant)
    print(found.to_json() if args.json else found.to_text())


def convert(args: argparse.Namespace) -> None:
    from sdcore.weights import fetch
    from sdcore.weights.convert import convert as convert_
    from sdcore.weights.load import choose

    dtype = choose("cpu", args.dtype)[1] if args.dtype else None
    source = fetch.resolve(args.model, variant=args.variant)
    print(
        convert_(source, args.target, args.layout, dtype, ema=args.ema, variant=args.variant, tokenizer=args.tokenizer)
    )
