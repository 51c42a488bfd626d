"""What the compiler makes of every kernel, found out without a GPU: `sdcore bench compile`.

Triton compiles for a target by name, so registers, spills, shared memory and the use of tensor cores can be read off a machine
that has no GPU at all. Every `Build` of every kernel file is compiled for Ampere (sm_80), Hopper (sm_90) and Blackwell (sm_100),
and its machine code is disassembled with the `cuobjdump` that ships inside the triton package. A build is at fault if

    it spills                  Triton has no arrays in local memory: an LDL or STL instruction is a register that did not fit
    it does not fit            more shared memory than a block may have
    it lacks an instruction    such as wgmma on Hopper, where the build says that it expects it; any tensor core elsewhere

What this cannot see is speed: that is measured on a GPU (`make gpu`).
"""

import re
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

import triton
from sdcore.kernels import FILES
from sdcore.kernels.common import INTERPRETED, Build
from sdcore.kernels.measure import commit
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from sdcore.errors import ConfigError

SHARED = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}  # bytes of shared memory that one block may have, by target
MATRIX = re.compile(
    r"\b(HMMA|HGMMA|QGMMA|IGMMA|QMMA|IMMA|DMMA|UTC\w*MMA)\b"
)  # what tensor cores are told, by generation
WARP = 32


@dataclass(frozen=True)
class Compiled:
    """One build for one target."""

    file: str  # such as "geglu"
    name: str
    arch: int
    registers: int  # a thread
    spills: int  # instructions that go to local memory
    shared: int  # bytes a block
    matrix: dict[str, int]  # tensor core instruction -> how often it stands in the machine code
    faults: list[str] = field(default_factory=list)


def files() -> list[str]:
    """Names of the kernel files, each once."""
    return list(dict.fromkeys(FILES.values()))


def builds(names: Iterable[str] | None = None) -> Iterator[tuple[str, Build]]:
    """(file, build) of all files or the named ones. A file that is PyTorch alone has none."""
    for name in files() if names is None else names:
        for build in getattr(import_module(f"sdcore.kernels.{name}"), "builds", list)():
            yield name, build


def inspect(build: Build, arch: int, file: str = "") -> Compiled:
    """Compile a build for sm_80, sm_90 or sm_100 and say what came out.

    Raises ConfigError in a process that interprets kernels, and what the compiler raises where a build does not compile.
    """
    if INTERPRETED:
        raise ConfigError("TRITON_INTERPRET: set, so kernels are interpreted and cannot be compiled; unset it")
    places = {name: build.kernel.arg_names.index(name) for name in build.attributes}
    source = ASTSource(
        fn=build.kernel,
        signature=build.signature,
        constexprs=build.constants,
        attrs={(places[name],): [["tt.divisibility", divisor]] for name, divisor in build.attributes.items()},
    )
    options = {"num_warps": build.warps, "num_stages": build.stages}
    made = triton.compile(source, target=GPUTarget("cuda", arch, WARP), options=options)
    registers, spills, matrix = read(made.asm["cubin"])
    result = Compiled(file, build.name, arch, registers, spills, made.metadata.shared, matrix)
    return Compiled(**{**asdict(result), "faults": faults(result, build.expects, made.asm["ptx"])})


def read(cubin: bytes) -> tuple[int, int, dict[str, int]]:
    """(registers a thread, instructions to local memory, tensor core instructions) of a compiled kernel."""
    tool = triton.knobs.nvidia.cuobjdump.path
    with tempfile.NamedTemporaryFile(suffix=".cubin") as f:
        f.write(cubin)
        f.flush()
        usage, code = (
            subprocess.run([tool, what, f.name], capture_output=True, text=True, check=True).stdout
            for what in ("-res-usage", "-sass")
        )
    found = re.search(r"REG:(\d+)", usage)
    assert found and "/*0000*/" in code, f"cuobjdump says something new: {usage[:200]}"
    local = re.findall(r"\b(?:LDL|STL)\b", code)
    return int(found[1]), len(local), dict(Counter(MATRIX.findall(code)))


def faults(result: Compiled, expects: Sequence[str], ptx: str) -> list[str]:
    """What is wrong with a compiled build, in words; empty where nothing is."""
    found = []
    if result.spills:
        found.append(f"spills: {result.spills} instructions to local memory")
    if result.shared > SHARED[result.arch]:
        found.append(f"{result.shared} bytes of shared memory, a block may have {SHARED[result.arch]}")
    if result.arch == 90:
        found += [f"no {name}" for name in expects if name not in ptx]
    elif expects and not result.matrix:
        found.append(f"no tensor core instruction, where Hopper has {', '.join(expects)}")
    return found


def compile_all(
    names: Iterable[str] | None = None, targets: Sequence[int] = tuple(SHARED), seconds: float = float("inf")
) -> Iterator[Compiled]:
    """Every build of the files for every target, as they are done; stops early when `seconds` are over."""
    end = time.monotonic() + seconds
    for file, build in builds(names):
        for arch in targets:
            if time.monotonic() > end:
                return
            if arch >= build.least:
                yield inspect(build, arch, file)


def line(result: Compiled) -> str:
    """A row for people."""
    matrix = ", ".join(f"{n} {name}" for name, n in result.matrix.items()) or "-"
    verdict = "; ".join(result.faults) or "ok"
    return (
        f"sm_{result.arch:<4} {result.name:64} {result.registers:4} {result.spills:4} {result.shared / 1024:7.1f}  "
        f"{matrix:20} {verdict}"
    )


HEADER = f"{'target':8}{'build':64} {'reg':>4}{'spill':>5}{'KiB':>8}  {'tensor cores':20} verdict"


def report(results: Sequence[Compiled], before: str = "") -> str:
    """The results as a page of Markdown: a summary by file and target, then each build on Hopper.

    `before`: a page to which they are added; its rows of the same files and builds are replaced.
    """
    summary, hopper, bad = rows(before)
    for file, arch in dict.fromkeys((r.file, r.arch) for r in results):
        these = [r for r in results if (r.file, r.arch) == (file, arch)]
        kinds = sorted({kind for r in these for kind in r.matrix})
        tensor = f"{sum(bool(r.matrix) for r in these)} ({', '.join(kinds)})" if kinds else "0"
        summary[f"{file} sm_{arch}"] = (
            f"| {file} | sm_{arch} | {len(these)} | {max(r.registers for r in these)} | {sum(r.spills for r in these)} "
            f"| {max(r.shared for r in these) / 1024:.1f} KiB | {tensor} | {sum(bool(r.faults) for r in these)} |"
        )
    for r in results:
        bad.pop(f"sm_{r.arch} {r.name}", None)
        if r.faults:
            bad[f"sm_{r.arch} {r.name}"] = f"- sm_{r.arch} {r.name}: {'; '.join(r.faults)}"
        if r.arch == 90:
            matrix = ", ".join(f"{n} {name}" for name, n in r.matrix.items()) or "-"
            hopper[r.name] = f"| {r.name} | {r.registers} | {r.shared / 1024:.1f} KiB | {matrix} |"
    counts = [[int(cell) for cell in (row.split("|")[3], row.split("|")[8])] for row in summary.values()]
    since = heads(before, results)
    names = f"{', '.join(dict.fromkeys(r.file for r in results))}: " if since else ""
    return "\n".join([
        "# Kernels, compiled ahead of time",
        "",
        *since,
        f"{names}`sdcore bench compile` on a machine without a GPU, triton {triton.__version__}, commit {commit()}:",
        f"{sum(n for n, _ in counts)} builds, {sum(n for _, n in counts)} at fault.",
        "",
        "Spill: instructions that go to local memory. A block may have 163 KiB of shared memory on sm_80, 227 KiB on sm_90 and",
        "sm_100. Tensor cores: builds whose machine code uses them, and with which instructions.",
        "",
        "| file | target | builds | most registers | spills | most shared memory | tensor cores | at fault |",
        "|---|---|---|---|---|---|---|---|",
        *summary.values(),
        *(["", "## At fault", "", *bad.values()] if bad else []),
        "",
        "## Every build on sm_90",
        "",
        "| build | registers | shared memory | tensor cores |",
        "|---|---|---|---|",
        *hopper.values(),
    ]) + "\n"  # fmt: skip


def heads(page: str, results: Sequence[Compiled]) -> list[str]:
    """The lines of a page that say of which commit its rows are; without those of files all of whose rows the results replace."""
    files = {r.file for r in results}
    kept = {row.split()[0] for row in rows(page)[0].keys() - {f"{r.file} sm_{r.arch}" for r in results}}
    found = []
    for line in re.findall(r"^.*, commit .*$", page, re.M):
        about = set(line.partition(": `")[0].split(", "))
        if not (about <= files and about.isdisjoint(kept)):
            found.append(line.rstrip(":;") + ";")
    return found


def rows(page: str) -> tuple[dict[str, str], dict[str, str], dict[str, str]]:
    """The lines of a page by what they are about: of the summary, of the builds on Hopper, of what is at fault."""
    summary, hopper, bad = {}, {}, {}
    for line in page.splitlines():
        cells = [cell.strip() for cell in line.split("|")[1:-1]]
        if line.startswith("- sm_"):
            bad[line[2:].partition(":")[0]] = line
        elif len(cells) == 8 and cells[1].startswith("sm_"):
            summary[f"{cells[0]} {cells[1]}"] = line
        elif len(cells) == 4 and cells[1].isdigit():
            hopper[cells[0]] = line
    return summary, hopper, bad


def document(results: Sequence[Compiled]) -> dict[str, Any]:
    """The results as a document."""
    return {"what": "compile", "triton": triton.__version__, "builds": [asdict(r) for r in results]}


def write_report(results: Sequence[Compiled], path: Path, add: bool = False) -> None:
    """Replace a report, whole or not at all; `add` keeps its rows of other files."""
    page = report(results, path.read_text() if add and path.exists() else "")
    beside = path.with_name(f".{path.name}")
    beside.write_text(page)
    beside.replace(path)
