"""The command line: `sdcore generate | train | bench | inspect | convert`.

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
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import sdcore
from sdcore.errors import ConfigError, ImageError, PromptError, SdcoreError

METHODS = ("text2image", "text", "vae")
BENCHES = ("kernels", "unet", "pipeline", "train", "compile")
MAX_COUNT = 100
# What decides how a picture comes out, kept in its PNG under these names; each is also the name of an option.
RECORDED = (
    "model", "revision", "variant", "tokenizer", "negative", "steps", "guidance", "sampler", "schedule", "seed", "count",
    "size", "device", "dtype", "engine", "kernels", "prompt2", "negative2", "emphasis", "clip_skip",
)  # fmt: skip
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
    c.add_argument("--steps", type=int, default=30, metavar="N", help="steps of the sampler (%(default)s)")
    c.add_argument(
        "--guidance", type=float, default=7.5, metavar="G", help="how closely to follow the prompt (%(default)s)"
    )
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
    kernels: dict[str, Any] = {}
    if args.engine == "fast":
        pipe = sdcore.accelerate(pipe, kernels=args.kernels or "measured")
    elif args.kernels not in (None, "torch"):
        from sdcore.kernels.engine import operations

        kernels |= operations(args.kernels, pipe.device)
    loaded = time.perf_counter()
    settings = describe(args, pipe) | loading
    for name in ("model_id", "torch", "device", "dtype"):
        if name in recorded and recorded[name] != settings[name]:
            tell(f"the picture was made with {name} {recorded[name]}, here it is {settings[name]}: it may differ")

    seeds = [args.seed + i for i in range(args.count)]
    previews: list[tuple[image.Picture, str]] | None = [] if args.strip else None
    with ops.using(**kernels):
        made = [draw(pipe, args, settings, seed, previews if seed == args.seed else None) for seed in seeds]
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
    for target in targets:
        image.check_target(target)
    if len({target.resolve() for target in targets}) < len(targets):
        raise ImageError(f"{args.strip}: the strip would replace the picture; give --strip another name")
    return targets


def draw(pipe, args: argparse.Namespace, settings: dict[str, Any], seed: int, previews: list | None):
    """Return the picture from `seed` and what is to say of it; with `previews`, decode every step's guess into it too."""
    from tqdm import tqdm

    from sdcore import image

    run = pipe.steps(
        args.prompt, args.negative, steps=args.steps, guidance=args.guidance, sampler=args.sampler,
        schedule=args.schedule, seed=seed, size=args.size, prompt2=args.prompt2, negative2=args.negative2,
        emphasis=args.emphasis, clip_skip=args.clip_skip,
    )  # fmt: skip
    # disable=None: a bar only where stderr is a terminal
    for progress in tqdm(run, total=len(run.steps), desc=f"seed {seed}", disable=None, leave=False, file=sys.stderr):
        if previews is not None:
            label = f"step {progress.step.i + 1}/{progress.total}\nnoise {progress.step.sigma:.3g}"
            previews.append((image.to_pictures(pipe.decode(progress.x0))[0], label))
    picture = image.to_pictures(pipe.decode(progress.x))[0]
    picture.metadata = settings | {"seed": seed, "size": f"{picture.size[0]}x{picture.size[1]}"}
    return picture, run.notices


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
    if ours:  # before there was a choice, brackets were read literally
        recorded.setdefault("emphasis", "none")
    known = [name for name in (RECORDED if ours else FOREIGN) if recorded.get(name) is not None]
    words = [f"--{name.replace('_', '-')}={recorded[name]}" for name in known]
    for name in ("lora", "embedding"):
        if ours and not getattr(args, name) and isinstance(recorded.get(name), list):
            words += [f"--{name}={file}" for file in recorded[name]]
    at = args.words.index("generate") + 1
    again = parser().parse_args([*args.words[:at], *words, *args.words[at:]])
    vars(args).update(vars(again))
    args.prompt = str(recorded["prompt"]) if args.prompt is None else args.prompt
    return recorded if ours else {}


def describe(args: argparse.Namespace, pipe) -> dict[str, Any]:
    """Everything that decides how the picture comes out."""
    import torch

    names = (
        "model", "prompt", "negative", "prompt2", "negative2", "emphasis", "clip_skip", "steps", "guidance", "schedule", "engine",
        "kernels",
    )  # fmt: skip
    given = {name: getattr(args, name) for name in names}
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


def train(args: argparse.Namespace) -> int:
    from sdcore.train import text, text2image, vae

    return {"text": text, "text2image": text2image, "vae": vae}[args.method].main(args.rest)


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
