"""The ahead-of-time report: real builds pass it, and each kind of fault is seen.

Compiling needs no GPU. `make test` compiles one build of every kernel family for Hopper; `make check` compiles all of them for
all targets and writes docs/reports/kernels-aot.md.
"""

from dataclasses import replace
from pathlib import Path

import pytest
import triton
import triton.language as tl
from sdcore.kernels import aot
from sdcore.kernels.aot import Compiled
from sdcore.kernels.common import Build, build

from sdcore import cli

REPORT = Path(__file__).parents[1] / "docs/reports/kernels-aot.md"
FAMILIES = [file for file in aot.files() if file != "upsample_conv"]  # that one is PyTorch alone


@triton.jit
def greedy(x, y, N: tl.constexpr):
    """Keeps N numbers in the registers of one warp while it adds them up."""
    at = tl.arange(0, N)
    v = tl.load(x + at)
    tl.store(y + at, v * tl.sum(v * v, 0))


@triton.jit
def product(x, y, out, N: tl.constexpr, K: tl.constexpr):
    """One tile of a matrix product."""
    row, column, depth = tl.arange(0, N)[:, None], tl.arange(0, N)[None, :], tl.arange(0, K)
    a = tl.load(x + row * K + depth[None, :])
    b = tl.load(y + depth[:, None] * N + column)
    tl.store(out + row * N + column, tl.dot(a, b))


def greedy_build(n: int) -> Build:
    return build(f"greedy {n}", greedy, {"N": n}, warps=1, x="*fp32", y="*fp32")


PRODUCT = build("product", product, {"N": 64, "K": 64}, expects=("wgmma",), x="*bf16", y="*bf16", out="*fp32")


@pytest.mark.parametrize("file", FAMILIES)
def test_a_build_of_every_family(file):
    """The first bf16 build of each file compiles for Hopper without fault."""
    _, first = next((name, b) for name, b in aot.builds([file]) if "bf16" in b.name)
    result = aot.inspect(first, 90, file)
    assert result.faults == [] and result.spills == 0 and 16 <= result.registers <= 255, result
    assert bool(result.matrix) >= bool(first.expects)


@pytest.mark.parametrize("arch, kind", [(80, "HMMA"), (90, "HGMMA"), (100, "UTC")])
def test_tensor_cores_are_seen(arch, kind):
    """Each generation has its own instruction for the same product."""
    result = aot.inspect(PRODUCT, arch)
    assert any(name.startswith(kind) for name in result.matrix), result
    assert result.faults == [] and result.shared > 0


def test_a_build_that_spills_is_at_fault():
    modest, result = aot.inspect(greedy_build(1024), 90), aot.inspect(greedy_build(8192), 90)
    assert modest.faults == [] and modest.spills == 0
    assert result.spills > 0 and "spills" in result.faults[0]


def test_a_build_without_what_it_expects_is_at_fault():
    """On Hopper the instruction by name, elsewhere any tensor core."""
    plain = replace(greedy_build(1024), expects=("wgmma",))
    assert aot.inspect(plain, 90).faults == ["no wgmma"]
    assert "no tensor core instruction" in aot.inspect(plain, 80).faults[0]


def test_a_build_that_does_not_fit_is_at_fault():
    fits = Compiled("f", "n", 90, 100, 0, 227 * 1024, {})
    assert aot.faults(fits, (), "") == []
    assert "shared memory" in aot.faults(replace(fits, shared=227 * 1024 + 1), (), "")[0]
    assert "shared memory" in aot.faults(replace(fits, arch=80), (), "")[0]  # Ampere has less


def test_a_build_is_compiled_from_its_least_capability_on(monkeypatch):
    monkeypatch.setattr(
        aot, "builds", lambda names=None: [("f", greedy_build(1024)), ("f", replace(PRODUCT, least=90))]
    )
    monkeypatch.setattr(aot, "inspect", lambda build, arch, file: (build.name, arch))
    assert list(aot.compile_all()) == [
        *(("greedy 1024", arch) for arch in (80, 90, 100)),
        ("product", 90),
        ("product", 100),
    ]


def test_the_report_says_what_is_wrong(tmp_path):
    good = Compiled("geglu", "geglu forward", 90, 32, 0, 2048, {"HGMMA": 4})
    bad = replace(good, arch=80, name="geglu backward", spills=7, faults=["spills: 7 instructions to local memory"])
    text = aot.report([good, bad])
    assert "2 builds, 1 at fault" in text and "sm_80 geglu backward: spills: 7" in text
    assert "| geglu | sm_90 | 1 | 32 | 0 | 2.0 KiB | 1 (HGMMA) | 0 |" in text
    assert "| geglu forward | 32 | 2.0 KiB | 4 HGMMA |" in text
    assert "At fault" not in aot.report([good])
    aot.write_report([good, bad], tmp_path / "page.md")
    assert (tmp_path / "page.md").read_text() == text and len(list(tmp_path.iterdir())) == 1


def test_a_part_is_added_to_a_report(tmp_path):
    """Rows of the same file and build are replaced, all others stay as they are, sums are of the whole."""
    geglu = Compiled("geglu", "geglu forward", 90, 32, 0, 2048, {})
    bad = replace(geglu, arch=80, spills=7, faults=["spills: 7 instructions to local memory"])
    gemm = Compiled("gemm", "gemm bf16", 90, 160, 0, 4096, {"HGMMA": 4})
    page = tmp_path / "page.md"
    aot.write_report([geglu, bad], page)
    aot.write_report([gemm], page, add=True)
    text = page.read_text()
    assert "3 builds, 1 at fault" in text and "sm_80 geglu forward: spills: 7" in text
    assert all(row in text for table in aot.rows(aot.report([geglu, bad])) for row in table.values())
    assert "| gemm bf16 | 160 | 4.0 KiB | 4 HGMMA |" in text and "gemm: `sdcore bench compile`" in text
    aot.write_report([replace(geglu, registers=40), replace(bad, spills=0, faults=[])], page, add=True)
    text = page.read_text()
    assert "3 builds, 0 at fault" in text and "| geglu forward | 40 |" in text and "At fault" not in text
    assert text.count("geglu forward") == 1 and text.count("| gemm | sm_90 |") == 1 and text.count(", commit ") == 3
    aot.write_report([gemm, geglu], page, add=True)  # sm_80 of geglu is still of the commit before
    assert [line.partition(":")[0] for line in page.read_text().splitlines() if ", commit " in line][1:] == [
        "geglu",
        "gemm, geglu",
    ]
    aot.write_report([gemm, geglu, bad], page, add=True)
    assert page.read_text().count(", commit ") == 2
    aot.write_report([gemm], page)
    assert page.read_text() == aot.report([gemm])


def test_the_command(monkeypatch, capsys):
    """One line a build and, with --json, the document; 1 where a build is at fault, 2 for a file that is none."""
    builds = [greedy_build(1024)]
    monkeypatch.setattr(aot, "builds", lambda names=None: (("greedy", b) for b in builds))
    assert cli.main(["bench", "compile", "geglu", "--target", "90", "--json"]) == 0
    out = capsys.readouterr().out
    assert "sm_90" in out and "greedy 1024" in out and '"what": "compile"' in out.splitlines()[-1]
    builds[:] = [greedy_build(8192)]
    assert cli.main(["bench", "compile", "--target", "90"]) == 1
    assert cli.main(["bench", "compile", "gelu"]) == 2


@pytest.mark.check
def test_every_build_for_every_target():
    """No build of any kernel spills, outgrows shared memory or misses its tensor cores. Writes the report."""
    results = list(aot.compile_all())
    aot.write_report(results, REPORT)
    assert {r.file for r in results} == set(FAMILIES)
    assert [f"sm_{r.arch} {r.name}: {r.faults}" for r in results if r.faults] == []
    hopper = [r for r in results if r.arch == 90 and r.file in ("attention", "gemm") and "fp32" not in r.name]
    assert hopper and all("HGMMA" in r.matrix for r in hopper)
