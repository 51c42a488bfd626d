"""The command line: `sdcore generate | canny | train | rate | bench | inspect | convert`.

Each command is a function over its parsed words, below the table that declares them (`generate`, the long one, has generate.py
and given.py to itself); `main` parses, runs, and turns what goes wrong into the exit code: 0 done; 2 the user can mend it, one
line on stderr says what and how; 130 stopped by Ctrl-C; anything else is a defect of ours and shows its traceback (1). Results
go to stdout (with --json one document as the last line), everything else to stderr. This folder is one of the two doors of the
core: only inside functions does it reach for `sdcore.weights` and `sdcore.train`, and torch too is imported there, so that
`sdcore --help` answers at once.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from typing import Any

import sdcore
from sdcore.errors import ConfigError, SdcoreError

from . import generate
from .words import Parser, one_line, share, size

METHODS = (
    "lora",
    "finetune",
    "dreambooth",
    "textual-inversion",
    "controlnet",
    "ddpo",
    "draft",
    "dpo",
    "text2image",
    "text",
    "vae",
    "eye",
)
BENCHES = ("kernels", "unet", "pipeline", "train", "compile")
NO_MEMORY = ("out of memory", "can't allocate memory")


def parser() -> Parser:
    """Every command and option."""
    top = Parser(prog="sdcore", description="Stable Diffusion from scratch: from a prompt to a picture.")
    top.add_argument("--version", action="version", version=f"sdcore {sdcore.__version__}")
    commands = top.add_subparsers(metavar="COMMAND", required=True)

    def command(name: str, run, text: str, **options: Any) -> Parser:
        made = commands.add_parser(name, help=text, description=text, **options)
        made.set_defaults(run=run)
        return made

    c = command("generate", generate.generate, "Draw a picture of a prompt.")
    generate.declare(c)

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

    c = command("rate", rate, "Let a person rate pictures, on a page of this machine, until Ctrl-C.")
    c.add_argument("folder", metavar="RUN", help="folder of a run; questions and answers lie in RUN/rating")
    c.add_argument("--pairs", type=int, metavar="N", help="draw so many pairs first, or what is missing of them")
    c.add_argument(
        "--prompts", default="world:two", metavar="F",
        help="their prompts, one a line of a file; world, world:two: the bundled model's (%(default)s)",
    )  # fmt: skip
    c.add_argument("--model", default="tiny", metavar="NAME", help="who draws them: name, folder, file (%(default)s)")
    c.add_argument("--steps", type=int, default=30, metavar="N", help="steps of the sampler (%(default)s)")
    c.add_argument("--guidance", type=float, default=3.0, metavar="G", help="how closely to follow (%(default)s)")
    c.add_argument("--seed", type=int, default=0, metavar="N", help="of the first picture (%(default)s)")
    c.add_argument("--pictures", metavar="FOLDER", help="score the pictures of this folder")
    c.add_argument("--port", type=int, metavar="N", help="port of the page (the one it had before, or any)")

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


def rate(args: argparse.Namespace) -> int:
    from sdcore.train import rate as rate_

    return rate_.rate(args)


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
