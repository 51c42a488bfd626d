"""The bench refuses what is wrong, times what is right, and says only what it measured."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from sdcore.kernels import FILES, KERNELS, bench, chart, gpu, measure, models, subjects
from sdcore.kernels.judge import Case
from sdcore.kernels.measure import Roof
from sdcore.kernels.subjects import Subject

from sdcore import cli, ops
from sdcore.errors import ConfigError

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")
ROOF = Roof(1.0, 0.1)


def right(x):
    value, gate = x.chunk(2, dim=-1)
    return value * F.gelu(gate)


def forgets_the_end(x):
    """Leaves the last value as it was: NaN, since outputs are poisoned."""
    from sdcore.kernels.common import empty

    out = empty((*x.shape[:-1], x.shape[-1] // 2), x)
    out[..., :-1] = right(x)[..., :-1]
    return out


class GradientOff(torch.autograd.Function):
    """Right forward, 1 % too much backward."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return right(x)

    @staticmethod
    def backward(ctx, dy):
        (x,) = ctx.saved_tensors
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            return 1.01 * torch.autograd.grad(right(x), x, dy)[0]


WRONG = {
    "off by a thousandth": (lambda x: 1.001 * right(x), "error .* times, 2 allowed"),
    "halves swapped": (lambda x: right(torch.cat(x.chunk(2, dim=-1)[::-1], dim=-1)), "2 allowed"),
    "tanh GELU": (lambda x: x.chunk(2, -1)[0] * F.gelu(x.chunk(2, -1)[1], approximate="tanh"), "2 allowed"),
    "forgets the end": (forgets_the_end, "not written"),
    "another dtype": (lambda x: right(x).double(), "float64"),
    "another shape": (lambda x: right(x)[..., :-1], "expected"),
    "two outputs": (lambda x: (right(x), right(x)), "output 1"),
}


def rows_of(kernel, training=False, roof: Roof | None = ROOF, rivals=False, dtype=torch.float32):
    subject = subjects.subject("geglu", kernel)
    call = list(subject.rows("SD1.5 512"))[-1]
    return list(bench.try_row(subject, call, dtype, CPU, roof, training, 0.0, rivals))


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_kernel_is_not_timed(name):
    kernel, why = WRONG[name]
    (row,) = rows_of(kernel)
    assert row.ms is None and row.why.startswith(bench.WRONG) and re.search(why, row.why), row


def test_a_wrong_gradient_is_seen_only_by_training():
    """And training does see it."""
    (forward,), (both,) = rows_of(GradientOff.apply), rows_of(GradientOff.apply, training=True)
    assert forward.ms is not None
    assert both.ms is None and "gradient of x" in both.why


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("training", [False, True], ids=["forward", "training"])
def test_a_right_kernel_is_timed(training, dtype):
    (row,) = rows_of(right, training, dtype=dtype)
    assert row.why == "" and row.ms > 0 and row.ratio == pytest.approx(1.0, abs=0.2)
    size = 3 * 2 * 64 * 5120 * dtype.itemsize * (2.5 if training else 1)
    assert row.tbs == pytest.approx(size / row.ms / 1e9)
    assert row.percent == pytest.approx(100 * size / 0.1e12 * 1e3 / row.ms)


def test_without_a_roof_nothing_is_timed():
    (row,) = rows_of(right, roof=None)
    assert row.ms is None and row.why.startswith("right; not timed")


def test_a_kernel_that_refuses_or_fails_does_not_stop_the_others(monkeypatch):
    def choosy(x):
        raise AssertionError("must not be called")

    def broken(x):
        raise RuntimeError("no such tile")

    choosy.accepts = lambda x: False
    monkeypatch.setattr(Subject, "rivals", lambda self: {"torch": right, "other": broken})
    refused, *rivals = rows_of(choosy, rivals=True)
    assert refused.ms is None and "GPU" in refused.why
    assert [(row.by, row.ms is not None) for row in rivals] == [("torch", True), ("other", False)]
    assert rivals[1].why.startswith("refuses: RuntimeError: no such tile")
    failed, fine, _ = rows_of(broken, rivals=True)
    assert failed.why.startswith(bench.FAILED) and fine.ms is not None


def test_faults_are_ours_alone():
    """A rival may be wrong, and a kernel may refuse; one of ours that is wrong or fails makes the exit code 1."""
    row = {"op": "geglu", "shape": "1x2", "by": "sdcore", "why": f"{bench.WRONG}: output 0"}
    assert len(bench.faults({"rows": [row, row | {"why": f"{bench.FAILED}: RuntimeError"}]})) == 2
    assert not bench.faults(
        {"rows": [row | {"by": "compile"}, row | {"why": "its accepts() refuses"}, row | {"why": ""}]}
    )
    assert bench.faults({"builds": [{"name": "a", "faults": ["spills"]}]}) == ["a: spills"]


def test_upcast_does_not_spoil_what_is_exact():
    """The reference of SD 2.1 works in fp32 inside; in fp64 it must not go down to that."""
    subject = subjects.subject("attention")
    call = next(call for call in subject.rows("SD2.1 768"))
    assert call.shape.upcast
    inputs = subjects.shapes.Attention(1, 5, 5, 16, 2, True).make(torch.float32, CPU, torch.Generator().manual_seed(0))
    case = Case(subject.reference, inputs)
    exact = ops.REFERENCES["attention"](*(inputs[n].double() for n in "qkv"), heads=2)
    assert torch.equal(case.exact["output 0"], exact)


# ---------------------------------------------------------------------------------------------------------- the subjects


def test_every_kernel_is_on_trial():
    """Each name of KERNELS has a launcher, and a subject (the autoencoder's attention is reached through `attention`)."""
    assert set(KERNELS) == set(subjects.SUBJECTS) | {"vae_attention"}
    assert all(callable(KERNELS[name]) for name in FILES)
    with pytest.raises(KeyError):
        KERNELS["attentoin"]


@pytest.mark.parametrize("name", subjects.SUBJECTS)
def test_subjects_make_what_their_reference_takes(name):
    """On every small shape the reference equals itself; the one with the most work comes first."""
    subject = subjects.subject(name)
    calls = list(subject.rows())
    assert calls and all(subject.fits(call.shape) for call in calls)
    shape = min((call.shape.small() for call in calls), key=lambda shape: shape.elements)
    inputs = subject.make(subjects.Call(name, "small", shape, 1), torch.float32, CPU)
    verdict = Case(subject.reference, inputs, subject.trains).judge(subject.reference)
    assert verdict.right and verdict.ratio <= 1, verdict
    work = [call.times * (call.shape.flop or call.shape.elements) for call in calls]
    assert work == sorted(work, reverse=True)


def test_names_that_are_none():
    with pytest.raises(ConfigError, match="no kernel called 'gelu'"):
        subjects.subject("gelu")
    with pytest.raises(ConfigError, match="your own kernel may replace attention"):
        subjects.subject("gemm", right)
    with pytest.raises(ConfigError, match="no model called 'SD9'"):
        models.bench("unet", ["SD9"], CPU, torch.float32)


# ---------------------------------------------------------------------------------------------------------------- the clock


def test_the_clock():
    timing = measure.milliseconds([lambda: None], CPU, 0.0)
    assert 0 <= timing.ms < 5 and timing.spread >= 0
    assert measure.summary([3.0, 1.0, 2.0, 100.0, 2.0]).ms == 2.0
    assert measure.sets(1, CPU) == 1
    assert Roof(2.0, 0.5).floor(4e12, 1e9) == 2000.0
    assert Roof(2.0, 0.5).floor(4e9, 1e12) == 2000.0


def test_contestants_take_turns():
    order: list[str] = []
    samples = models.turns({"a": "a", "b": "b"}, lambda one: order.append(one) or float(len(order)), 3)
    assert order == list("ababab") and samples == {"a": [1.0, 3.0, 5.0], "b": [2.0, 4.0, 6.0]}


def test_a_contestant_that_takes_too_long_is_left_out():
    """Or that fails; the others go on."""

    def endless():
        while True:
            pass

    def broken():
        raise ValueError("cannot")

    able, unable = models.ready({"broken": broken, "fine": dict}, lambda one: None, models.time.monotonic() + 600)
    assert set(able) == {"fine"} and unable == {"broken": "FAILED: ValueError: cannot"}
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)  # nobody is interrupted later
    able, unable = models.ready({"slow": endless}, lambda one: None, models.time.monotonic() + 0.3)
    assert able == {} and unable == {"slow": "FAILED: OutOfTimeError: no time left"}


# ---------------------------------------------------------------------------------------------------------- the whole thing


def test_the_command(tmp_path, capsys, monkeypatch):
    """A table, then one line of JSON; the same in the file; bars in the picture; 1 where a kernel of ours is wrong."""
    monkeypatch.setattr(measure, "roof", lambda device, dtype: ROOF)
    monkeypatch.setitem(subjects.SUBJECTS, "geglu", lambda: Subject("geglu", "geglu", right, ops.REFERENCES["geglu"]))
    files = [tmp_path / "k.json", tmp_path / "k.png"]
    words = ["bench", "kernels", "geglu", "--model", "VAE decode 512", "--most", "1", "--alone"]
    assert cli.main([*words[:3], "--model", "nonsense"]) == 2
    assert cli.main(["bench", "kernels", "gelu"]) == 2
    assert "there are attention" in capsys.readouterr().err
    words[4] = "SD1.5 512"
    assert cli.main([*words, "--json", str(files[0]), "--plot", str(files[1])]) == 0
    out, err = capsys.readouterr()
    table, document = out.splitlines()[:-1], json.loads(out.splitlines()[-1])
    assert "no speed of a kernel is claimed" in err
    assert any("geglu 2x4096x2560" in line and "sdcore" in line for line in table)
    assert json.loads(files[0].read_text()) == document
    assert {"what", "machine", "versions", "commit", "date", "dtype", "roof", "rows", "left_out"} == set(document)
    assert document["machine"]["name"] and document["versions"]["torch"] == torch.__version__
    assert any(pixel == (31, 78, 153) for _, pixel in Image.open(files[1]).convert("RGB").getcolors(2**20))
    wrong = Subject("geglu", "geglu", WRONG["off by a thousandth"][0], ops.REFERENCES["geglu"])
    monkeypatch.setitem(subjects.SUBJECTS, "geglu", lambda: wrong)
    assert cli.main(words) == 1


def test_no_time_left_is_said(monkeypatch):
    monkeypatch.setattr(measure, "roof", lambda device, dtype: ROOF)
    document = bench.try_kernels(["geglu"], CPU, torch.float32, model="SD1.5 512", deadline=0.0)
    assert document["rows"] == [] and len(document["left_out"]) == 4


def test_models_on_a_cpu(monkeypatch):
    """UNet and training step of the small model; diffusers draws the same latents from the same weights."""
    monkeypatch.setattr(measure, "roof", lambda device, dtype: ROOF)
    monkeypatch.setattr(models, "SHORT", 2)
    monkeypatch.setattr(models, "LONG", 5)
    document = models.bench("unet", ["small"], CPU, torch.float32, rounds=1)
    rows = {row["by"]: row for row in document["rows"]}
    lossy = {name for name in rows if name.startswith("sdcore lossy")}
    assert set(rows) == {"sdcore accelerated", "sdcore", "diffusers"} | lossy, rows
    assert lossy and all(1e-4 < rows[name]["relative"] < 1 for name in lossy)
    assert all(row["its"] == pytest.approx(1e3 / row["ms"]) for row in rows.values())
    assert rows["sdcore"]["relative"] == 0
    assert rows["diffusers"]["relative"] < 1e-4 and rows["sdcore accelerated"]["relative"] < 1e-4
    document = models.bench("train", ["small"], CPU, torch.float32, rounds=1, rivals=False)
    assert [row["by"] for row in document["rows"]] == ["sdcore"]
    assert document["rows"][0]["samples_s"] == pytest.approx(2e3 / document["rows"][0]["ms"])


def test_pictures_on_a_cpu(monkeypatch):
    monkeypatch.setattr(measure, "roof", lambda device, dtype: ROOF)
    monkeypatch.setattr(models, "IMAGE", 2)
    document = models.bench("pipeline", ["small"], CPU, torch.float32, rounds=1, rivals=False)
    assert [row["by"] for row in document["rows"]] == ["sdcore accelerated", "sdcore", "text encoders"]
    assert all(0 < row["decode_ms"] for row in document["rows"][:2])
    assert document["precision"]["most"] < 1 and document["precision"]["psnr"] > 60


def test_the_page_on_kernels_runs(tmp_path):
    """Its kernel of ten lines, judged in Triton's interpreter, and what it does to a picture."""
    page = (ROOT / "docs/kernels.md").read_text()
    (example,) = (block for block in re.findall(r"```python\n(.*?)```", page, re.S) if "mine.py" in block)
    (tmp_path / "mine.py").write_text(example)
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "mine.py"], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith("geglu ")]
    assert lines and all("right; not timed" in line for line in lines), done.stdout
    assert re.search(r"(\d+) of \1 calls ran here; pixels differ by 0\.0", done.stdout), done.stdout


# ------------------------------------------------------------------------------------------------- results and the README


def result(**parts) -> dict:
    return {
        "machine": {"name": "NVIDIA H200"},
        "versions": {"torch": "2.11", "triton": "3.6"},
        "commit": "0123",
        "date": "2026-01-02",
        "parts": parts,
    }


KERNEL = {"op": "geglu", "shape": "2x4", "training": False, "ms": 0.5, "percent": 80.0, "ratio": 1.0, "by": "sdcore"}
STEP = {"model": "SD1.5 512", "by": "sdcore", "ms": 10.0, "its": 100.0}


def test_the_readme_says_nothing_that_was_not_measured(tmp_path):
    assert chart.readme(tmp_path) == chart.NOT_MEASURED + "\n"
    parts = {
        "norms": {"rows": [KERNEL, KERNEL | {"by": "torch", "ms": 1.0}, KERNEL | {"by": "compile", "ms": None}]},
        "unet": {"rows": [STEP, STEP | {"by": "sdcore accelerated", "ms": 4.0, "its": 250.0}, STEP | {"ms": None}]},
    }
    (tmp_path / "nvidia-h200-2026-01-02.json").write_text(json.dumps(result(**parts)))
    (tmp_path / "nvidia-h200-2025-12-31.json").write_text(json.dumps(result() | {"commit": "older"}))
    text = chart.readme(tmp_path)
    assert "older" not in text and "commit 0123" in text
    assert "| geglu | 2x4 | 0.5000 | 80 % | 1.00 | torch | 2.00 |" in text
    assert "| SD1.5 512 | sdcore accelerated | 250 | 2.50 |" in text
    assert "| train |" not in text and "| pipeline |" not in text


def test_the_readme_has_the_section():
    """What stands between the two marks of the README, where they are, is what the results say."""
    between = re.search(r"<!-- speed -->\n(.*?)<!-- /speed -->", (ROOT / "README.md").read_text(), re.S)
    if between is None:
        pytest.skip("the README has no section on speed")
    assert between[1] == chart.readme()


def test_results_of_one_commit_are_joined(tmp_path):
    path, header = tmp_path / "r" / "gpu.json", {"commit": "a", "date": "today"}
    gpu.add(path, header, "norms", {"rows": []})
    assert set(gpu.add(path, header, "unet", {"rows": [1]})["parts"]) == {"norms", "unet"}
    assert set(json.loads(path.read_text())["parts"]) == {"norms", "unet"}
    assert set(gpu.add(path, header | {"commit": "b"}, "unet", {"rows": []})["parts"]) == {"unet"}
    assert [p.name for p in path.parent.iterdir()] == ["gpu.json"]


def test_what_goes_wrong_on_a_gpu_is_not_lost():
    wrong = {"op": "geglu", "shape": "1", "by": "sdcore", "why": f"{bench.WRONG}: output"}
    found = {"proof": {"exit": 1}, "memcheck": {"exit": 9}, "rows": [wrong]}
    assert gpu.failures(found) == ["proof: exit 1", "memcheck: exit 9", f"geglu 1: {bench.WRONG}: output"]
    assert gpu.failures({"proof": {"tests": "before"}, "memcheck": {"memcheck": "not installed"}, "rows": []}) == []


def test_parts_cover_everything():
    assert set(gpu.OF["attention"]) | set(gpu.OF["norms"]) == set(subjects.SUBJECTS)
    assert gpu.MINUTES < 9 and gpu.PROOF + gpu.SANITIZER < gpu.MINUTES


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_make_gpu_says_so(capsys):
    assert gpu.main([]) == 2
    assert "no NVIDIA GPU" in capsys.readouterr().err
