"""The bench: is a kernel right, how fast is it, how far from the roof. `sdcore bench kernels|unet|pipeline|train|compile`.

Every implementation is judged against fp64 first (`judge`), and what is wrong is not timed. Then it is timed (`measure`) on the
shapes of the models (`shapes`), beside everything else that computes the same (`subjects`). Percent of the roof is the time that
the arithmetic or the memory traffic needs at least, whichever is longer, over the time taken; both ceilings are measured in the
same run. Without a GPU, kernels are judged in Triton's interpreter (TRITON_INTERPRET=1), or PyTorch's own times are shown: no
speed of a kernel is claimed there.

Your own kernel joins like this; docs/kernels.md goes through it:

    from sdcore.kernels import bench
    bench.show("geglu", my_geglu)
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from sdcore.kernels import common, measure, subjects
from sdcore.kernels.judge import Case, leaf, pushes
from sdcore.kernels.measure import Roof
from sdcore.kernels.shapes import MODELS, Call, Inputs
from sdcore.kernels.subjects import SUBJECTS, Subject
from torch import Tensor

from sdcore.errors import ConfigError

WRONG, FAILED = "WRONG, not timed", "FAILED"
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
# Forward and backward together, as multiples of forward: matrix products are three, not counting any that is done twice; of the
# bandwidth-bound, forward reads one and writes one, backward reads two and writes one.
TRAINING_FLOP, TRAINING_BYTES = 3.0, 2.5


@dataclass(frozen=True)
class Row:
    """One implementation on one shape. Without a time there is a reason."""

    op: str
    model: str
    shape: str
    dtype: str
    training: bool  # forward and backward; else forward alone
    times: int  # how often the model calls it
    by: str  # whose implementation: "sdcore", "torch", "sdpa flash", ...
    ratio: float | None = None  # largest error against fp64, as a multiple of PyTorch's own
    ms: float | None = None
    spread: float | None = None
    tflops: float | None = None
    tbs: float | None = None
    percent: float | None = None  # of the roof
    why: str = ""  # not timed because


def try_row(
    subject: Subject,
    call: Call,
    dtype: torch.dtype,
    device: torch.device,
    roof: Roof | None,
    training: bool = False,
    seconds: float = 0.2,
    rivals: bool = True,
) -> Iterator[Row]:
    """Judge and time all implementations on one shape, ours first. Without a roof nothing is timed."""
    inputs = subject.make(call, dtype, device)
    case = Case(subject.reference, inputs, training)
    contestants = {subject.by: subject.kernel} | (subject.rivals() if rivals else {})
    known: dict[str, Any] = {
        "op": subject.name, "model": call.model, "shape": str(call.shape), "dtype": common.name_of(dtype),
        "training": training, "times": call.times,
    }  # fmt: skip
    for by, function in contestants.items():
        if by == subject.by and (refusal := refused(function, inputs)):
            yield Row(**known, by=by, why=refusal)
            continue
        try:
            verdict = case.judge(function)
            if not verdict.right:
                yield Row(**known, by=by, ratio=finite(verdict.ratio), why=f"{WRONG}: {verdict.why}")
            elif roof is None:
                yield Row(
                    **known, by=by, ratio=verdict.ratio, why="right; not timed: no speed is claimed without a GPU"
                )
            else:
                found = timed(subject, function, call, dtype, device, roof, training, seconds)
                yield Row(**known, by=by, ratio=verdict.ratio, **found)
        except (
            Exception
        ) as error:  # one that fails, or a rival that is not made for this shape, must not cost the others
            said = (str(error).strip().splitlines() or [""])[0][:120]
            word = FAILED if by == subject.by else "refuses"
            yield Row(**known, by=by, why=f"{word}: {type(error).__name__}: {said}")


def refused(function: Callable, inputs: Inputs) -> str:
    """Why our kernel does not run on these inputs; empty where it does."""
    accepts = getattr(function, "accepts", None)
    if accepts is None or accepts(**inputs):
        return ""
    if all(x.device.type == "cpu" for x in inputs.values() if isinstance(x, Tensor)) and not common.INTERPRETED:
        return "needs an NVIDIA GPU; TRITON_INTERPRET=1 judges it here"
    return "its accepts() refuses this shape"


def timed(
    subject: Subject, function: Callable, call: Call, dtype: torch.dtype, device: torch.device, roof: Roof,
    training: bool, seconds: float,
) -> dict[str, Any]:  # fmt: skip
    """Milliseconds and what they amount to."""
    flop, size = float(call.shape.flop), float(call.shape.elements * dtype.itemsize)
    if training:
        flop, size = TRAINING_FLOP * flop, TRAINING_BYTES * size
    makes = [subject.make(call, dtype, device, seed) for seed in range(measure.sets(int(size), device))]
    bind = trained if training else subject.bind
    with torch.set_grad_enabled(training):
        ms, spread = measure.milliseconds([bind(function, inputs) for inputs in makes], device, seconds)
    return {
        "ms": ms,
        "spread": spread,
        "tflops": flop / ms / 1e9,
        "tbs": size / ms / 1e9,
        "percent": 100 * roof.floor(flop, size) / ms,
    }


def trained(function: Callable, inputs: Inputs) -> Callable[[], Any]:
    """Forward and backward, as something to time."""
    given = {name: leaf(value, True, None) for name, value in inputs.items()}
    wanted = [x for x in given.values() if isinstance(x, Tensor) and x.requires_grad]
    out = function(**given)
    given_back = pushes([out] if isinstance(out, Tensor) else list(out), inputs, seed=0)

    def run() -> Any:
        out = function(**given)
        return torch.autograd.grad([out] if isinstance(out, Tensor) else list(out), wanted, given_back)

    return run


def finite(x: float) -> float | None:
    """JSON knows no infinity."""
    return x if x < float("inf") else None


# ------------------------------------------------------------------------------------------------------------ many of them


def try_kernels(
    names: Sequence[str],
    device: torch.device,
    dtype: torch.dtype,
    *,
    model: str | None = None,
    training: bool = False,
    rivals: bool = True,
    most: int | None = None,
    deadline: float = float("inf"),
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Rows of the named kernels, most work first, as a document: header, roof, rows, and what there was no time for.

    most      shapes a kernel; None is all
    deadline  of `time.monotonic()`: a shape that has not begun by then is left out, and named
    """
    interpreted = common.INTERPRETED and device.type == "cpu"
    roof = None if interpreted else measure.roof(device, dtype)
    rows: list[Row] = []
    left_out: list[str] = []
    say(heading(training))
    for name in names:
        subject = subjects.subject(name)
        if training and not subject.trains:
            continue
        for call in list(subject.rows(model))[:most]:
            if interpreted:
                call = Call(call.op, call.model, call.shape.small(), call.times)
            if time.monotonic() > deadline:
                left_out.append(f"{name} {call.shape}")
                continue
            for row in try_row(subject, call, dtype, device, roof, training, rivals=rivals and not interpreted):
                rows.append(row)
                say(line(row))
    return {
        "what": "kernels",
        **measure.header(device),
        "dtype": common.name_of(dtype),
        "roof": roof and roof._asdict(),
        "rows": [asdict(row) for row in rows],
        "left_out": left_out,
    }


def heading(training: bool) -> str:
    what = "forward and backward" if training else "forward"
    return f"{what:52} {'by':16} {'ms':>9} {'TFLOP/s':>8} {'TB/s':>6} {'roof':>5} {'error':>6}"


def line(row: Row) -> str:
    """A row for people. Error: as a multiple of PyTorch's own."""
    name = f"{row.op} {row.shape}"
    ratio = "" if row.ratio is None else f"{row.ratio:6.3g}"
    if row.ms is None:
        return f"{name:52} {row.by:16} {ratio:>38}  {row.why}"
    tflops = f"{row.tflops:8.1f}" if row.tflops else " " * 8
    return f"{name:52} {row.by:16} {row.ms:9.4f} {tflops} {row.tbs:6.2f} {row.percent:4.0f}% {ratio:>6}"


# ------------------------------------------------------------------------------------------------------------- one of them


def show(name: str, kernel: Callable | None = None, pictures: bool = True) -> list[Row]:
    """Judge and time one kernel, or your own in its place, and print its rows; what `python -m sdcore.kernels.geglu` does.

    Runs on the first GPU in bf16; without one on the CPU in fp32, on a few shapes, and in Triton's interpreter on small ones.
    With `pictures`, and for an operation of `sdcore.ops`, also says what the kernel does to a real image of the bundled
    model. Raises ConfigError for a name that is no kernel's.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    subject = subjects.subject(name, kernel)
    roof = None if common.INTERPRETED and device.type == "cpu" else measure.roof(device, dtype)
    print(title(device, roof))
    print(heading(False))
    rows: list[Row] = []
    calls = list(subject.rows()) if device.type == "cuda" else list(subject.rows("SD1.5 512"))[-4:]
    if roof is None:
        calls = list(dict.fromkeys(Call(c.op, c.model, c.shape.small(), 1) for c in calls))
    for call in calls:
        for row in try_row(subject, call, dtype, device, roof, rivals=device.type == "cuda"):
            print(line(row), flush=True)
            rows.append(row)
    from sdcore import ops

    ran = [row for row in rows if row.by == subject.by and row.ratio is not None]
    if pictures and name in ops.REFERENCES and ran and not any(row.why.startswith(WRONG) for row in ran):
        print(picture_line(name, subject.kernel, device))
    return rows


def title(device: torch.device, roof: Roof | None) -> str:
    """On what, in one line."""
    versions = measure.versions()
    ceiling = f", measured roof {roof.tflops:.3g} TFLOP/s, {roof.tbs:.2f} TB/s" if roof else ""
    return (
        f"{measure.machine(device)['name']}{ceiling}; torch {versions['torch']}, triton {versions['triton']}, "
        f"commit {measure.commit()}"
    )


def picture_line(name: str, kernel: Callable, device: torch.device, steps: int = 5) -> str:
    """What a kernel does to a real image: the bundled model draws the same picture with and without it, in fp32."""
    import sdcore
    from sdcore import ops

    pipe = sdcore.load("tiny", device=str(device), dtype="float32")
    calls, taken = 0, 0

    def counted(*args: Any, **options: Any) -> Any:
        nonlocal calls, taken
        calls += 1
        accepts = getattr(kernel, "accepts", None)
        if accepts is not None and not accepts(*args, **options):
            return ops.REFERENCES[name](*args, **options)
        taken += 1
        return kernel(*args, **options)

    def draw() -> Tensor:
        return pipe("a small red circle left of a large blue square", steps=steps, seed=3).pixels

    plain = draw()
    with ops.using(**{name: counted}):
        ours = draw()
    difference = 127.5 * (ours - plain).abs()
    return (
        f"a picture of the bundled model, {steps} steps in fp32: {taken} of {calls} calls ran here; pixels differ by "
        f"{difference.max():.3g}/255 at most, {difference.mean():.2g}/255 on average"
    )


# -------------------------------------------------------------------------------------------------------- the command line


def options() -> argparse.ArgumentParser:
    """`sdcore bench`."""
    from sdcore.cli import BENCHES, Parser

    top = Parser(
        prog="sdcore bench", description="Judge and time: kernels, one UNet step, whole pictures, one training step."
    )
    top.add_argument("what", choices=BENCHES)
    top.add_argument(
        "names", nargs="*", help="kernels, compile: only these kernels; unet, pipeline, train: these models"
    )
    top.add_argument("--model", metavar="NAME", help=f"kernels: shapes of one model: {', '.join(MODELS)}")
    top.add_argument("--dtype", choices=DTYPES, help="bf16 on a GPU, fp32 on a CPU")
    top.add_argument("--device", help="cuda where there is one, else cpu")
    top.add_argument("--training", action="store_true", help="kernels: forward and backward")
    top.add_argument("--alone", action="store_true", help="nobody else's implementations")
    top.add_argument("--most", type=int, metavar="N", help="kernels: only the N shapes with the most work of each")
    top.add_argument("--minutes", type=float, default=float("inf"), metavar="M", help="begin nothing after so long")
    top.add_argument("--target", type=int, nargs="*", choices=(80, 90, 100), help="compile: sm_80, sm_90, sm_100 (all)")
    top.add_argument("--report", metavar="F", help="compile: also write a page of Markdown")
    top.add_argument("--add", action="store_true", help="compile: the report keeps its rows of other files")
    top.add_argument("--plot", metavar="F", help="draw a PNG")
    top.add_argument(
        "--json", nargs="?", const="", metavar="F", help="one JSON document as the last line, and in file F"
    )
    return top


def main(words: Sequence[str]) -> int:
    """`sdcore bench ...`: 0, or 1 where a kernel is wrong or a build at fault."""
    args = options().parse_args(words)
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = DTYPES[args.dtype or ("bf16" if device.type == "cuda" else "fp32")]
    deadline = time.monotonic() + 60 * args.minutes
    if args.what == "compile":
        document = compiled(args, deadline)
    elif args.what == "kernels":
        document = kernels(args, device, dtype, deadline)
    else:
        from sdcore.kernels import models

        document = models.bench(
            args.what, args.names, device, dtype, rivals=not args.alone, deadline=deadline, say=tell
        )
    if args.plot:
        from sdcore.kernels import chart

        chart.draw(document, Path(args.plot))
    if args.json is not None:
        text = json.dumps(document)
        if args.json:
            Path(args.json).write_text(text + "\n")
        print(text)
    return int(bool(faults(document)))


def tell(text: str) -> None:
    print(text, flush=True)


def kernels(args: argparse.Namespace, device: torch.device, dtype: torch.dtype, deadline: float) -> dict[str, Any]:
    """`sdcore bench kernels`."""
    if args.model is not None and args.model not in MODELS:
        raise ConfigError(f"--model: {args.model!r} is not among {', '.join(MODELS)}")
    for name in args.names:
        subjects.subject(name)
    if device.type == "cpu":
        how = "kernels are judged in Triton's interpreter" if common.INTERPRETED else "PyTorch's own times"
        print(f"no GPU: {how}; no speed of a kernel is claimed", file=sys.stderr)
    tell(title(device, None))
    return try_kernels(
        args.names or list(SUBJECTS), device, dtype, model=args.model, training=args.training, rivals=not args.alone,
        most=args.most, deadline=deadline, say=tell,
    )  # fmt: skip


def compiled(args: argparse.Namespace, deadline: float) -> dict[str, Any]:
    """`sdcore bench compile`."""
    from sdcore.kernels import aot

    for name in args.names:
        if name not in aot.files():
            raise ConfigError(f"no kernel file called {name!r}; there are {', '.join(aot.files())}")
    tell(aot.HEADER)
    results = []
    for result in aot.compile_all(args.names or None, args.target or tuple(aot.SHARED), deadline - time.monotonic()):
        tell(aot.line(result))
        results.append(result)
    if args.report:
        aot.write_report(results, Path(args.report), args.add)
    return aot.document(results)


def faults(document: dict[str, Any]) -> list[str]:
    """What is wrong in a document: kernels of ours that miscompute, builds at fault."""
    wrong = [
        f"{row.get('op', row.get('model'))} {row.get('shape', '')}: {row['why']}"
        for row in document.get("rows", [])
        if row["by"].startswith("sdcore") and row.get("why", "").startswith((WRONG, FAILED))
    ]
    return wrong + [f"{build['name']}: {fault}" for build in document.get("builds", []) for fault in build["faults"]]
