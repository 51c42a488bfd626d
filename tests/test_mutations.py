"""The tests can see: each planted fault makes at least one of them fail.

Each is a slip that somebody made in a published reimplementation, or easily could. A copy of the project gets one line changed,
and the named test must fail there (while it passes on the unchanged copy).
"""

import multiprocessing
import os
import shutil
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
PEERS = ["diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl", "scipy.stats", "sqlite3"]


class Fault(NamedTuple):
    """One line made wrong, and the test that must notice."""

    name: str
    file: str
    right: str
    wrong: str
    test: str


FAULTS = [
    Fault("transformer norm eps 1e-5 for 1e-6", "sdcore/unet.py", "d, eps=1e-6", "d, eps=1e-5",
          "test_small.py::test_unet[SD15-even]"),
    Fault("residual block norm eps 1e-6 for 1e-5", "sdcore/unet.py", "c_in, eps=1e-5", "c_in, eps=1e-6",
          "test_small.py::test_unet[SD15-even]"),
    Fault("autoencoder norm eps 1e-5 for 1e-6", "sdcore/vae.py", "EPS = 1e-6", "EPS = 1e-5", "test_small.py::test_vae"),
    Fault("tanh for erf GELU", "sdcore/ops.py", "F.gelu(gate)", 'F.gelu(gate, approximate="tanh")',
          "test_small.py::test_unet[SD15-even]"),
    Fault("swapped GEGLU halves", "sdcore/ops.py", "value * F.gelu(gate)", "gate * F.gelu(value)",
          "test_small.py::test_unet[SD15-even]"),
    Fault("sines before cosines", "sdcore/unet.py", "[angles.cos(), angles.sin()]", "[angles.sin(), angles.cos()]",
          "test_small.py::test_unet[SD15-even]"),
    Fault("symmetric padding in the encoder", "sdcore/vae.py", "(0, 1, 0, 1)", "(1, 0, 1, 0)", "test_small.py::test_vae"),
    Fault("self-attention in the upscaler", "sdcore/unet.py", "config.context_dim if cross_only else None", "None",
          "test_small.py::test_unet[X4-even]"),
    Fault("size of odd latents", "sdcore/unet.py", "size=size, mode", "scale_factor=2.0, mode",
          "test_small.py::test_unet[SD15-odd]"),
    Fault("text that sees what follows", "sdcore/clip.py", "causal=self.causal", "causal=False",
          "test_small.py::test_text[quick_gelu-0]"),
    Fault("1.7 for 1.702", "sdcore/clip.py", "1.702 * x)\n", "1.7 * x)\n", "test_small.py::test_text[quick_gelu-0]"),
    Fault("pooled at the last token", "sdcore/clip.py", "[torch.arange(len(ids), device=ids.device), end]", "[:, -1]",
          "test_small.py::test_text[gelu-24]"),
    Fault("residuals before the middle is added", "sdcore/unet.py", "x = x + residuals[-1]", "x = x + residuals[-1] * 0",
          "test_small.py::test_unet_residuals[SD15]"),
    Fault("latents multiplied by the scaling factor", "sdcore/pipeline.py", "(latents / self", "(latents * self",
          "test_pipeline.py::test_equals_diffusers[sd1-plain-fp64]"),
    Fault("last layer for SDXL", "sdcore/pipeline.py", "out.states[-2 - clip", "out.states[-1 - clip",
          "test_pipeline.py::test_equals_diffusers[sdxl-plain-fp64]"),
    Fault("width before height in the sizes", "sdcore/pipeline.py", "(H, W, 0, 0, H, W) if exp", "(W, H, 0, 0, W, H) if exp",
          "test_pipeline.py::test_own_noise_is_diffusers_noise[sdxl]"),
    Fault("empty negative encoded on SDXL", "sdcore/voices.py", "self.pipe.zero_negative and", "False and",
          "test_pipeline.py::test_equals_diffusers[sdxl-plain-fp64]"),
    Fault("negative and positive swapped", "sdcore/guidance.py", "negative, positive = answers", "positive, negative = answers",
          "test_pipeline.py::test_equals_diffusers[sd1-negative-fp64]"),
    Fault("sign of v", "sdcore/solvers.py", "= signal * scale**2, -noise * scale", "= signal * scale**2, noise * scale",
          "test_pipeline.py::test_equals_diffusers[sd2-plain-fp64]"),
    Fault("off-by-one timestep", "sdcore/scheduler.py", "+ config.steps_offset)", "+ config.steps_offset - 1)",
          "test_pipeline.py::test_equals_diffusers[sd1-plain-fp64]"),
    Fault("betas in fp64", "sdcore/scheduler.py", "end**0.5, n, dtype=torch.float32) ** 2",
          "end**0.5, n, dtype=torch.float64) ** 2", "test_scheduler.py"),
    Fault("wrong pad token", "sdcore/tokenizer.py", "vocab[END], vocab[pad]", "vocab[END], vocab[END]",
          "test_pipeline.py::test_equals_diffusers[sd2-plain-fp64]"),
    Fault("a schedule a step late", "sdcore/prompt.py", "i + 1 <= last", "i <= last", "test_prompt.py::test_table[48]"),
    Fault("emphasis by another norm", "sdcore/prompt.py", "(z.mean(dim=(1, 2), keepdim=True) /",
          "(z.std(dim=(1, 2), keepdim=True) /", "test_prompt.py::test_emphasis_against_its_definitions"),
    Fault("another embedding's vector", "sdcore/clip.py", "(ids - size).clamp(min=0)", "(ids - size - 1).clamp(min=0)",
          "test_embeddings.py::test_pictures_equal_diffusers[sd1]"),
]  # fmt: skip


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """The project, with the four folders inside one package as they are installed."""
    root = tmp_path_factory.mktemp("copy")
    skip = shutil.ignore_patterns("__pycache__", "tiny", "results")
    shutil.copytree(ROOT / "sdcore", root / "sdcore", ignore=skip)
    for folder in ("kernels", "train", "weights"):
        shutil.copytree(ROOT / folder, root / "sdcore" / folder, ignore=skip)
    shutil.copytree(ROOT / "tests", root / "tests", ignore=skip)
    shutil.copy(ROOT / "pyproject.toml", root)
    if (ROOT / "weights/tiny").exists():
        (root / "sdcore/weights/tiny").symlink_to(ROOT / "weights/tiny")
    return root


def child(root: Path, tests: tuple[str, ...], output: Path) -> None:
    """Run tests of a copy in this process, which has nothing of the project yet; what they print goes to a file."""
    with open(output, "wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.chdir(root)
    for name in [name for name in sys.modules if name.split(".")[0] in ("tests", "sdcore")]:
        del sys.modules[name]
    sys.path.insert(0, str(root))
    sys.dont_write_bytecode = True
    raise SystemExit(pytest.main(["-x", "-p", "no:cacheprovider", *(f"tests/{test}" for test in tests)]))


def run(root: Path, *tests: str) -> tuple[int, str]:
    """The named tests on a copy: exit status, and what they printed.

    Processes are forked from a server that has imported the peers once, which takes longer than most of these tests.
    """
    forks = multiprocessing.get_context("forkserver")
    forks.set_forkserver_preload(PEERS)
    process = forks.Process(target=child, args=(root, tests, root / "output.txt"))
    process.start()
    process.join()
    return process.exitcode, (root / "output.txt").read_text(errors="replace")


def test_the_unchanged_copy_passes(copy):
    status, printed = run(copy, *sorted({fault.test for fault in FAULTS}))
    assert status == 0, printed[-3000:]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_planted_fault_is_seen(copy, fault):
    path = copy / fault.file
    text = path.read_text()
    assert text.count(fault.right) == 1, f"{fault.right!r} stands {text.count(fault.right)} times in {fault.file}"
    path.write_text(text.replace(fault.right, fault.wrong))
    try:
        status, printed = run(copy, fault.test)
    finally:
        path.write_text(text)
    assert status == 1, f"exit {status}: not seen by {fault.test}\n" + printed[-2000:]
