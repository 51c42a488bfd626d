"""`make gpu`: everything that needs an NVIDIA GPU, in parts of under nine minutes, the most telling first.

    make gpu                    all parts
    make gpu PART=attention     one of them: attention norms unet unet-xl pipeline train train-lora

Each part first proves (the kernels of the part against fp64 on every shape, forward and backward; the bundled model against the
CPU; compute-sanitizer's memcheck where it is installed), then measures, and adds what it found to
kernels/results/<gpu>-<date>.json, which is written whole after each part. The README's table is made from those files only
(`chart`). Needs torch and triton; without diffusers its columns are left out, and the file says so.
"""

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from sdcore.kernels import bench, chart, measure, models
from sdcore.kernels.shapes import Call
from sdcore.kernels.subjects import SUBJECTS

ROOT = Path(__file__).parents[1]
PARTS = ("attention", "norms", "unet", "unet-xl", "pipeline", "train", "train-lora")
OF = {
    "attention": ("attention",),
    "norms": ("group_norm_silu", "layer_norm", "geglu", "add_layer_norm", "group_norm", "guidance_step", "upsample_conv",
              "gemm", "conv", "lora_linear", "fp8_linear", "fp8_conv"),
}  # fmt: skip
MINUTES = 8.5  # a part
PROOF = 3.5  # of these, at most, before anything is measured
SANITIZER = 1.5


def run(part: str, device: torch.device) -> dict[str, Any]:
    """Prove, then measure one part."""
    began = time.monotonic()
    deadline = began + 60 * MINUTES
    found: dict[str, Any] = {"proof": prove(part)}
    if part in OF:
        found["memcheck"] = memcheck(OF[part])
        document = kernels(part, device, deadline)
    elif part == "train-lora":
        document = lora(device)
    elif part.startswith("unet"):
        document = models.bench(
            "unet", [models.ON_GPU[part == "unet-xl"]], device, torch.bfloat16, deadline=deadline, say=say
        )
    else:
        document = models.bench(part, [], device, torch.bfloat16, deadline=deadline, say=say)
    for known in ("machine", "versions", "commit", "date"):  # said once for the whole file
        document.pop(known)
    return found | document | {"seconds": round(time.monotonic() - began, 1)}


def kernels(part: str, device: torch.device, deadline: float) -> dict[str, Any]:
    """Forward on every shape beside all rivals; then, in what time is left, forward and backward beside PyTorch."""
    document = bench.try_kernels(OF[part], device, torch.bfloat16, deadline=deadline - 90, say=say)
    more = bench.try_kernels(OF[part], device, torch.bfloat16, training=True, most=3, deadline=deadline, say=say)
    document["rows"] += more["rows"]
    document["left_out"] += [f"training: {name}" for name in more["left_out"]]
    return document


def lora(device: torch.device) -> dict[str, Any]:
    """Steps of LoRA training beside diffusers with PEFT, which train/bench.py measures, in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.json"
        words = ["-m", "sdcore.train.bench", "--minutes", str(MINUTES - 1.5), "--json", str(path)]
        done = finished([sys.executable, *words], 60 * MINUTES)
        rows = json.loads(path.read_text()) if path.exists() else []
    left_out = [] if rows else [f"all of it: exit {done['exit']}"]
    return {"what": "train-lora", **measure.header(device), "dtype": "bf16", "rows": rows, "left_out": left_out}


def prove(part: str) -> dict[str, Any]:
    """Run the tests of a part on the GPU, in a process of their own."""
    names = " or ".join(OF[part]) if part in OF else "pictures" if part == "unet" else ""
    if not names:
        return {"tests": "those of the parts before"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/test_gpu.py", "-k", names]
    return finished(command, 60 * PROOF)


def memcheck(names: Sequence[str]) -> dict[str, Any]:
    """Every kernel on small shapes under compute-sanitizer, which sees each access outside its tensor."""
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        return {"memcheck": "compute-sanitizer is not installed"}
    command = [
        tool,
        "--tool",
        "memcheck",
        "--error-exitcode",
        "9",
        sys.executable,
        "-m",
        "sdcore.kernels.gpu",
        "--small",
    ]
    return finished([*command, *names], 60 * SANITIZER)


def finished(command: Sequence[str], seconds: float) -> dict[str, Any]:
    """The end of a command's output and its exit status; None where it took too long."""
    say("$ " + " ".join(command))
    try:
        done = subprocess.run(
            command, cwd=ROOT, timeout=seconds, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
    except subprocess.TimeoutExpired:
        say(f"not done within {seconds:.0f} s")
        return {"exit": None, "output": f"not done within {seconds:.0f} s"}
    say(done.stdout[-3000:])
    return {"exit": done.returncode, "output": done.stdout[-3000:] if done.returncode else done.stdout[-300:]}


def small(names: Sequence[str]) -> int:
    """Run the named kernels once, forward and backward, on the small shapes: what memcheck watches."""
    from sdcore.kernels import subjects
    from sdcore.kernels.judge import results

    device = torch.device("cuda")
    for name in names:
        subject = subjects.subject(name)
        for shape in dict.fromkeys(call.shape.small() for call in subject.rows()):
            inputs = subject.make(Call(name, "", shape, 1), torch.bfloat16, device)
            results(subject.kernel, inputs, subject.trains, 0)
    torch.cuda.synchronize()
    return 0


def failures(found: dict[str, Any]) -> list[str]:
    """What went wrong in a part."""
    proofs = {name: found.get(name, {}).get("exit", 0) for name in ("proof", "memcheck")}
    return [f"{name}: exit {status}" for name, status in proofs.items() if status != 0] + bench.faults(found)


def say(text: str) -> None:
    print(text, flush=True)


def where(device: torch.device) -> Path:
    """The file of today's run on this GPU."""
    name = re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name(device).lower()).strip("-")
    return chart.RESULTS / f"{name}-{time.strftime('%Y-%m-%d', time.gmtime())}.json"


def add(path: Path, header: dict[str, Any], part: str, found: dict[str, Any]) -> dict[str, Any]:
    """Put a part into a file of results, which is replaced whole. Parts of another commit are not kept beside it."""
    before = json.loads(path.read_text()) if path.exists() else {}
    parts = before.get("parts", {}) if before.get("commit") == header["commit"] else {}
    whole = header | {"parts": parts | {part: found}}
    beside = path.with_name(f".{path.name}")
    path.parent.mkdir(parents=True, exist_ok=True)
    beside.write_text(json.dumps(whole, indent=1) + "\n")
    beside.replace(path)
    return whole


def main(words: Sequence[str]) -> int:
    """0 where everything was right; 1 where something was not; 2 without a GPU."""
    options = argparse.ArgumentParser(prog="make gpu", description="Prove and measure on an NVIDIA GPU.")
    options.add_argument("parts", nargs="*", help=f"of {' '.join(PARTS)} (all)")
    options.add_argument(
        "--small", action="store_true", help="only run the named kernels on small shapes (for memcheck)"
    )
    args = options.parse_args(words)
    if not torch.cuda.is_available():
        print("make gpu: no NVIDIA GPU here; the tests that need none are `make test`", file=sys.stderr)
        return 2
    unknown = sorted(set(args.parts) - set(SUBJECTS if args.small else PARTS))
    if unknown:
        options.error(f"no such part: {', '.join(unknown)}; there are {', '.join(SUBJECTS if args.small else PARTS)}")
    if args.small:
        return small(args.parts)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    device = torch.device("cuda")
    path, wrong = where(device), []
    for part in args.parts or PARTS:
        say(f"--- {part}")
        found = run(part, device)
        add(path, measure.header(device), part, found)
        if found["rows"]:
            chart.draw(found | measure.header(device), path.with_name(f"{path.stem}-{part}.png"))
        wrong += [f"{part}: {failure}" for failure in failures(found)]
        say(f"--- {part}: {found['seconds']} s, written to {path}")
    for failure in wrong:
        print(f"WRONG  {failure}", file=sys.stderr)
    say(chart.readme())
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
