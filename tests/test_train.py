"""The training loop and its first three methods: exact resume, stopping, damage, the loss formulas, the cache, the vocabulary.

Everything runs on networks of a few thousand parameters; that the methods learn is shown by the bundled model they made.
"""

import dataclasses
import io
import itertools
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from scipy import stats
from sdcore.train import (
    checker,
    checkpoints,
    log,
    loop,
    objectives,
    optimisers,
    ranks,
    state,
    text,
    text2image,
    vae,
    vocabulary,
    world,
)
from sdcore.train.task import generator
from sdcore.weights import files

from sdcore.errors import NonFiniteError, TrainingError
from sdcore.tokenizer import Tokenizer
from tests import weighed
from tests.runs import Cut, Line, assert_same_bits, cut_at, final, line_options

SMALL_VAE = dataclasses.replace(vae.CONFIG, channels=(32, 32, 32, 32))  # narrower ones run slower on a CPU
SMALL_UNET = dataclasses.replace(text2image.UNET, channels=(16, 16), heads=(2, 2), context_dim=16)
SMALL_TEXT = dataclasses.replace(text.CONFIG, width=16, layers=1, heads=2, mlp=32)


@pytest.fixture
def small(monkeypatch):
    """The methods with tiny networks and tiny cache files."""
    monkeypatch.setattr(vae, "CONFIG", SMALL_VAE)
    monkeypatch.setattr(vae, "MEASURED", 16)
    monkeypatch.setattr(text2image, "UNET", SMALL_UNET)
    monkeypatch.setattr(text, "CONFIG", SMALL_TEXT)
    monkeypatch.setattr(text2image, "SHARD", 32)
    monkeypatch.setattr(vae.TrainVAE, "evaluate", lambda *_: {})
    monkeypatch.setattr(text2image.TextToImage, "evaluate", lambda *_: {})


def vae_options(out: Path, **changes) -> vae.VAEOptions:
    defaults = dict(
        steps=6, batch=2, warmup=2, cooldown=2, save_every=2, log_every=2, eval_every=0, close_steps=3, seed=3
    )
    return vae.VAEOptions(out=str(out), **(defaults | changes))


def word_options(out: Path, **changes) -> text.TextOptions:
    defaults = dict(steps=6, batch=8, warmup=2, cooldown=2, save_every=2, log_every=2, eval_every=0, seed=3, threads=1)
    return text.TextOptions(out=str(out), **(defaults | changes))


def text_options(out: Path, **changes) -> text2image.TextToImageOptions:
    defaults = dict(
        steps=6, batch=8, warmup=2, cooldown=2, save_every=2, log_every=2, eval_every=0, shards=1, seed=3, threads=1
    )
    places = {name: str(out.parent / name) for name in ("vae", "text", "cache")}
    return text2image.TextToImageOptions(out=str(out), **(defaults | places | changes))


# ------------------------------------------------------------------------------------------------- a task small enough to see


class Halts(Line):
    """Says that it has come to a step, and goes on when told to."""

    def __init__(self, step: int, say: int, told: int):
        super().__init__()
        self.step, self.say, self.told = step, say, told

    def loss(self, part):
        if part.step == self.step:
            os.write(self.say, b"here")
            os.read(self.told, 1)
        return super().loss(part)


class Child:
    """A run in a process of its own, forked so that it need not import anything first. What it says on stderr goes to a file.

    It halts within the step `at`, if one is given, until `kill` has sent it a signal, so that it is there when that comes."""

    def __init__(self, out: Path, resume: bool = False, at: int = -1):
        self.errors = out.with_suffix(".stderr")
        self.heard, say = os.pipe()
        told, self.tell = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            code = 99
            try:
                os.dup2(os.open(self.errors, os.O_CREAT | os.O_WRONLY | os.O_TRUNC), 2)
                sys.stderr = os.fdopen(2, "w", buffering=1)
                code = loop.run(Halts(at, say, told), line_options(out, steps=60, resume=resume))
            finally:
                os._exit(code)
        os.close(say)  # so that a child that ends early is heard

    def kill(self, number: int, times: int = 1) -> None:
        """Send a signal at the step where it halts."""
        assert os.read(self.heard, 4) == b"here", self.errors.read_text()
        for _ in range(times):
            os.kill(self.pid, number)
        os.write(self.tell, b".")

    def end(self) -> int:
        """Wait; the exit code, negative for a signal."""
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


def test_killed_runs_end_in_the_same_bits(tmp_path):
    """SIGKILL at three moments; the resumed run ends where the uninterrupted one does."""
    assert loop.run(Line(), line_options(tmp_path / "whole", steps=60)) == 0
    for resume, moment in ((False, 7), (True, 20), (True, 39)):
        child = Child(tmp_path / "cut", resume, at=moment)
        child.kill(signal.SIGKILL)
        assert child.end() == -signal.SIGKILL, child.errors.read_text()
    assert Child(tmp_path / "cut", resume=True).end() == 0
    assert_same_bits(final(tmp_path / "whole"), final(tmp_path / "cut"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_once_and_the_exit_code_tells(tmp_path, number):
    child = Child(tmp_path / "run", at=12)
    child.kill(number, times=2)  # the second one changes nothing
    assert child.end() == 128 + number
    step = json.loads((tmp_path / "run/log.jsonl").read_text().splitlines()[-1])["step"]
    assert f"stopped and saved at step {step}" in child.errors.read_text()
    assert checkpoints.Checkpoints(tmp_path / "run/checkpoints", 2).newest()[1]["step"] == step
    assert Child(tmp_path / "run", resume=True).end() == 0
    loop.run(Line(), line_options(tmp_path / "whole", steps=60))
    assert_same_bits(final(tmp_path / "whole"), final(tmp_path / "run"))


@pytest.mark.parametrize("damage", ["flip", "cut", "no manifest"])
def test_damaged_newest_checkpoint_is_passed_over_aloud(tmp_path, capfd, damage):
    loop.run(Line(), line_options(tmp_path / "run", keep=3))
    whole = final(tmp_path / "run")
    newest = sorted((tmp_path / "run/checkpoints").glob("step-*"))[-1]
    file = newest / "state.safetensors"
    data = bytearray(file.read_bytes())
    if damage == "flip":
        data[-3] ^= 1
        file.write_bytes(data)
    elif damage == "cut":
        file.write_bytes(data[:-8])
    else:
        (newest / "manifest.json").unlink()
    _, found = checkpoints.Checkpoints(tmp_path / "run/checkpoints", 3).newest()
    assert found["step"] == 35 and str(newest) in capfd.readouterr().err
    assert loop.run(Line(), line_options(tmp_path / "run", keep=3, resume=True)) == 0  # writes step 40 anew
    assert_same_bits(whole, final(tmp_path / "run"))


@pytest.mark.parametrize("call", ["fsync", "rename", "replace"])
def test_a_save_that_fails_leaves_what_was_there(tmp_path, monkeypatch, call):
    """Every flush and rename of a save fails in turn: a TrainingError, and the older checkpoint still verifies."""
    folder = checkpoints.Checkpoints(tmp_path, keep=1)
    tensors = {"weights/a": torch.arange(4.0)}
    folder.save(1, tensors, {"step": 1})
    real, fired = getattr(os, call), 0
    for failing in range(20):
        calls = 0

        def fail(*args, failing=failing):
            nonlocal calls
            calls += 1
            if calls == failing + 1:
                raise OSError(28, "No space left on device")
            return real(*args)

        with monkeypatch.context() as patch:
            patch.setattr(os, call, fail)
            try:
                folder.save(failing + 2, tensors, {"step": failing + 2})
            except TrainingError as error:
                fired += 1
                assert "No space left" in str(error)
            else:
                assert calls <= failing  # every call has had its turn
                break
        assert folder.newest()[1]["step"] in (1, failing + 2)
    assert fired >= (4 if call == "fsync" else 1)
    assert list(tmp_path.glob(".writing-*")) == []


def test_what_was_left_half_written_is_removed(tmp_path):
    """Even of a step at which this run saves nothing, so that no save comes over it."""
    with pytest.raises(Cut):
        loop.run(cut_at(Line(), 12), line_options(tmp_path))
    stale = tmp_path / "checkpoints/.writing-00000011"
    stale.mkdir()
    (stale / "state.safetensors").write_bytes(bytes(100))
    assert loop.run(Line(), line_options(tmp_path, resume=True)) == 0
    assert not stale.exists() and (tmp_path / "checkpoints/step-00000040").is_dir()


def test_refusals(tmp_path):
    with pytest.raises(TrainingError, match="no checkpoint here verifies"):
        loop.run(Line(), line_options(tmp_path / "none", resume=True))
    loop.run(Line(), line_options(tmp_path / "run"))
    with pytest.raises(TrainingError, match="holds a run already"):
        loop.run(Line(), line_options(tmp_path / "run"))
    with pytest.raises(TrainingError, match=r"lr: was 0.001, is 0.5"):
        loop.run(Line(), line_options(tmp_path / "run", resume=True, lr=0.5))
    with pytest.raises(TrainingError, match="cooldown had begun"):
        loop.run(Line(), line_options(tmp_path / "run", resume=True, steps=50))
    assert loop.run(Line(), line_options(tmp_path / "run", resume=True, steps=50, accept_changes=True)) == 0
    with checkpoints.sole_user(tmp_path / "run"), pytest.raises(TrainingError, match=f"process {os.getpid()}"):
        loop.run(Line(), line_options(tmp_path / "run", resume=True))


CALLS = {"open", "write", "flush", "fsync", "close", "rename", "replace", "mkdir", "unlink", "rmdir"}


def test_sigkill_at_every_call_of_a_save(tmp_path, monkeypatch):
    """Before each call that a save makes to change the disk, until there is none left; then the run goes on to the same bits."""
    short = dict(steps=6, save_every=2, keep=1, cooldown=2)
    loop.run(Line(), line_options(tmp_path / "whole", **short))
    whole, save, kills = final(tmp_path / "whole"), checkpoints.Checkpoints.save, 0
    steps = set()
    for moment in range(200):
        out = tmp_path / f"at-{moment}"
        pid = os.fork()
        if pid == 0:
            calls = 0

            def count(_frame, event, what, moment=moment):
                nonlocal calls
                if event == "c_call" and getattr(what, "__name__", "") in CALLS:
                    calls += 1
                    if calls > moment:
                        os.kill(os.getpid(), signal.SIGKILL)

            def killed(self, step, *rest):
                if step == 4:
                    sys.setprofile(count)
                done = save(self, step, *rest)
                sys.setprofile(None)
                return done

            checkpoints.Checkpoints.save = killed
            code = 99
            try:
                code = loop.run(Line(), line_options(out, **short))
            finally:
                os._exit(code)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        if code == 0:
            break
        assert code == -signal.SIGKILL
        kills += 1
        steps.add(checkpoints.Checkpoints(out / "checkpoints", 1).newest()[1]["step"])
        if moment % 3 == 0:
            loop.run(Line(), line_options(out, resume=True, **short))
            assert_same_bits(whole, final(out))
            assert [c.name for c in (out / "checkpoints").iterdir()] == ["step-00000006"]
    assert kills > 25 and steps == {2, 4}


def test_a_full_disk_at_every_write_leaves_the_last_checkpoint(tmp_path, monkeypatch):
    """Each write of a save in turn finds no room: the run ends and says so, and with room again it goes on to the same bits."""
    short = dict(steps=4, save_every=2, cooldown=2)
    loop.run(Line(), line_options(tmp_path / "whole", **short))
    whole, fired = final(tmp_path / "whole"), 0
    for failing in range(100):
        out, writes = tmp_path / f"at-{failing}", 0

        class Full(io.FileIO):
            def write(self, data, failing=failing):
                nonlocal writes
                writes += 1
                if writes > failing:
                    raise OSError(28, "No space left on device")
                return super().write(data)

        def narrow(path, mode="r", full=Full):
            return (
                full(path, mode)
                if "step-00000004" not in str(path) and "writing-00000004" in str(path)
                else open(path, mode)
            )

        with monkeypatch.context() as patch:
            patch.setattr(files, "open", narrow, raising=False)
            try:
                loop.run(Line(), line_options(out, **short))
            except TrainingError as error:
                assert "No space left" in str(error) and "older checkpoints are intact" in str(error)
                fired += 1
            else:
                break
        assert [c.name for c in (out / "checkpoints").iterdir()] == ["step-00000002"]
        loop.run(Line(), line_options(out, resume=True, **short))
        assert_same_bits(whole, final(out))
    assert fired >= 10


def test_changed_data_is_refused_with_a_difference(tmp_path):
    class Pictures(Line):
        count = 4

        def identity(self):
            return {"pictures": self.count, "content": "abc"}

    loop.run(Pictures(), line_options(tmp_path / "run"))
    Pictures.count = 5
    with pytest.raises(TrainingError, match=r"\(pictures: was 4, is 5\);"):
        loop.run(Pictures(), line_options(tmp_path / "run", resume=True))


def test_older_checkpoints_are_retired(tmp_path):
    loop.run(Line(), line_options(tmp_path / "run", keep=2))
    assert sorted(c.name for c in (tmp_path / "run/checkpoints").iterdir()) == ["step-00000035", "step-00000040"]


def test_a_run_can_be_extended_before_its_cooldown(tmp_path):
    """The learning rate does not know the end before the cooldown: stopped at 20 of 40 and extended equals 60 from the start."""

    class Stops(Line):
        def loss(self, part):
            if part.step == 20:
                for _ in range(2):  # each is handled before the next is sent; the second changes nothing
                    os.kill(os.getpid(), signal.SIGINT)
            return super().loss(part)

    assert loop.run(Stops(), line_options(tmp_path / "run")) == 130
    assert loop.run(Line(), line_options(tmp_path / "run", resume=True, steps=60)) == 0
    loop.run(Line(), line_options(tmp_path / "whole", steps=60))
    assert_same_bits(final(tmp_path / "whole"), final(tmp_path / "run"))


def test_steps_that_are_not_finite_are_not_applied(tmp_path):
    task = Line(poison=range(3, 5))
    assert loop.run(task, line_options(tmp_path / "two", steps=8, save_every=1, keep=9)) == 0
    states = [load_file(tmp_path / f"two/checkpoints/step-{n:08d}/state.safetensors") for n in (3, 5)]
    assert_same_bits(*states)
    with pytest.raises(NonFiniteError, match="5 steps in a row"):
        loop.run(Line(poison=range(10, 40)), line_options(tmp_path / "many"))
    assert checkpoints.Checkpoints(tmp_path / "many/checkpoints", 2).newest()[1]["step"] == 10


def test_passes_are_averaged_by_what_they_are_means_over(tmp_path):
    """7 examples whole and in 2, 3 and 7 passes, of 3 and 4 examples, with weights that differ tenfold: the same gradient."""
    whole = weighed.gradients(weighed.options(tmp_path), ranks.Ranks())
    for accumulate in (2, 3, 7):
        found = weighed.gradients(weighed.options(tmp_path, accumulate=accumulate), ranks.Ranks())
        for name, expected in whole.items():
            torch.testing.assert_close(found[name], expected, rtol=1e-12, atol=1e-13)
    with pytest.raises(TrainingError, match="--batch 7: cannot be cut into 8"):
        weighed.gradients(weighed.options(tmp_path, accumulate=8), ranks.Ranks())


def test_two_processes_train_as_one(tmp_path):
    """torchrun with gloo: either process has the gradients of one alone, and a run that is cut and resumed its weights."""
    words = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "-m",
        "tests.weighed",
    ]
    done = subprocess.run(
        [*words, tmp_path], cwd=Path(__file__).parents[1], capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    whole = weighed.gradients(weighed.options(tmp_path), ranks.Ranks())
    for rank in (0, 1):
        found = load_file(tmp_path / f"gradients-{rank}.safetensors")
        for name, expected in whole.items():
            torch.testing.assert_close(found[name], expected, rtol=1e-12, atol=1e-13)
    with pytest.raises(InterruptedError):
        loop.run(weighed.Weighed(dies=5), weighed.options(tmp_path / "one"))
    loop.run(weighed.Weighed(), weighed.options(tmp_path / "one", resume=True))
    one, two = final(tmp_path / "one"), final(tmp_path / "run")
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=1e-9, atol=1e-11)
    lines = [len((tmp_path / f"{run}/log.jsonl").read_text().splitlines()) for run in ("run", "one")]
    assert lines[0] == lines[1]  # one process writes
    with pytest.raises(TrainingError, match="processes: was 2, is 1"):
        loop.run(weighed.Weighed(), weighed.options(tmp_path / "run", resume=True))


@pytest.mark.parametrize(
    "optimiser, precision",
    [("adamw", "bf16"), ("adamw", "fp16"), ("adafactor", "fp32"), ("prodigy", "fp16"), ("lion", "bf16")],
)
def test_every_optimiser_and_precision_resumes_to_the_same_bits(tmp_path, optimiser, precision):
    if library := optimisers.NEEDS.get(optimiser):
        pytest.importorskip(library)
    o = dict(
        optimiser=optimiser,
        precision=precision,
        lr=1.0 if optimiser == "prodigy" else 1e-2,
        steps=12,
        schedule="cosine",
    )
    loop.run(Line(), line_options(tmp_path / "whole", **o))
    for step in (3, 8):
        with pytest.raises(Cut):
            loop.run(cut_at(Line(), step), line_options(tmp_path / "cut", resume=step > 3, save_every=1, **o))
    loop.run(Line(), line_options(tmp_path / "cut", resume=True, **o))
    assert_same_bits(final(tmp_path / "whole"), final(tmp_path / "cut"))
    kept = [
        json.loads((tmp_path / f"{run}/checkpoints/step-00000012/state.json").read_text())["numbers"]
        for run in ("whole", "cut")
    ]
    assert kept[0] == kept[1] and bool(kept[0]["scaler"]) == (precision == "fp16")
    weights = final(tmp_path / "whole")["weights/line.weight"]
    assert not torch.equal(weights, Line().modules["line"].weight) and weights.dtype == torch.float32


def test_the_scaler_finds_its_scale_and_is_kept(tmp_path):
    """A loss that overflows at 65536: halved until it does not, no step of those applied; the scale comes back on resume."""

    class Steep(Line):
        def loss(self, part):
            found = super().loss(part)
            return loop.Loss(found.mean.clamp(min=1e-3) * 1e34, found.count)

    task, o = Steep(), line_options(tmp_path / "run", precision="fp16", steps=12, save_every=12, clip=1e-3)
    loop.run(task, o)
    kept = checkpoints.Checkpoints(tmp_path / "run/checkpoints", 1).newest()[1]["numbers"]["scaler"]
    assert 2 <= kept["scale"] < 65536
    lines = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    skipped = sum("not applied" in line.get("event", "") for line in lines)
    assert kept["scale"] == 65536 / 2**skipped and skipped >= 2
    with pytest.raises(TrainingError, match="--precision"):
        loop.run(Line(), line_options(tmp_path / "other", precision="fp64"))


def test_optimisers_are_refused_with_a_reason(tmp_path, monkeypatch):
    for wrong, words in (
        (dict(optimiser="sgdd"), "--optimiser: expected one of adamw"), (dict(schedule="steps"), "--schedule: expected one of"),
        (dict(optimiser="prodigy", lr=1e-3), "usually 1"), (dict(best="loss"), "--best loss"),
    ):  # fmt: skip
        with pytest.raises(TrainingError, match=words):
            loop.run(Line(), line_options(tmp_path / "run", **wrong))
    monkeypatch.setattr(optimisers.importlib.util, "find_spec", lambda name: None)
    for name, library in (("adamw8bit", "bitsandbytes"), ("lion", "lion-pytorch"), ("prodigy", "prodigyopt")):
        with pytest.raises(TrainingError, match=f"pip install {library}"):
            loop.run(Line(), line_options(tmp_path / "run", optimiser=name))
    with pytest.raises(TrainingError, match="pip install tensorboard"):
        loop.run(Line(), line_options(tmp_path / "run", tensorboard=True))


def test_rates_by_parameter_and_decay_by_kind(tmp_path):
    """AdamW's first step is the rate, in the gradient's sign: a factor shows; matrices decay, vectors do not."""

    class Two(Line):
        def rate_of(self, name):
            return {"line.weight": 3.0, "line.bias": 0.0}[name]

    task, before = Two(), Line().modules["line"]
    now = state.State(task, line_options(tmp_path, lr=1e-2, weight_decay=0.0), ranks.Ranks())
    now.take(0, 1e-2)
    moved = task.modules["line"].weight - before.weight
    torch.testing.assert_close(moved.abs(), torch.full((1, 3), 3e-2), rtol=1e-3, atol=0)
    assert torch.equal(task.modules["line"].bias, before.bias)
    decays = {group["params"][0].ndim: group["weight_decay"] for group in now.optimiser.param_groups}
    now = state.State(Line(), line_options(tmp_path, weight_decay=0.5), ranks.Ranks())
    assert {group["params"][0].ndim: group["weight_decay"] for group in now.optimiser.param_groups} == {2: 0.5, 1: 0.0}
    assert decays == {2: 0.0, 1: 0.0}


class Deep(Line):
    """Line, through a few layers and one weight that is used twice."""

    def __init__(self, poison: range = range(0)):
        super().__init__(poison=poison)
        torch.manual_seed(1)
        self.deep = torch.nn.Sequential(*(torch.nn.Linear(3, 3) for _ in range(4)))
        self.deep[2].weight = self.deep[0].weight
        self.modules["deep"] = self.deep

    def loss(self, part):
        x = part.of(torch.randn(part.batch, 3, generator=part.common()))
        loss = (self.modules["line"](self.deep(x).tanh()) - x.sum(dim=1, keepdim=True)).square().mean()
        return loop.Loss(loss * (float("nan") if part.step in self.poison else 1.0), len(x))


@pytest.mark.parametrize("optimiser", ["adamw", "adafactor", "lion", "sgd"])
def test_a_step_in_the_backward_pass_is_the_same_step(tmp_path, optimiser):
    """The same bits as with all gradients first, of which there is never more than one; resumed as well."""
    o = dict(optimiser=optimiser, clip=0.0, lr=1e-2, steps=12, save_every=4, weight_decay=0.1)
    loop.run(Deep(), line_options(tmp_path / "all", **o))
    most, task = 0, Deep()
    for p in task.deep.parameters():
        p.register_post_accumulate_grad_hook(lambda _: count())

    def count():
        nonlocal most
        most = max(most, sum(p.grad is not None for module in task.modules.values() for p in module.parameters()))

    with pytest.raises(Cut):
        loop.run(cut_at(task, 6), line_options(tmp_path / "fused", fused_step=True, **o))
    loop.run(Deep(), line_options(tmp_path / "fused", fused_step=True, resume=True, **o))
    assert_same_bits(final(tmp_path / "all"), final(tmp_path / "fused"))
    assert most == 1
    norms = [
        [line["norm"] for line in log_lines(tmp_path / run) if "norm" in line and line["step"] == 12]
        for run in ("all", "fused")
    ]
    assert norms[1] == pytest.approx(norms[0], rel=1e-5)


def test_a_step_in_the_backward_pass_is_refused_where_it_would_be_another(tmp_path):
    for wrong, words in (
        (dict(clip=1.0), "--clip 1.0"), (dict(accumulate=2, clip=0.0), "--accumulate 2"),
        (dict(precision="fp16", clip=0.0), "--precision fp16"),
    ):  # fmt: skip
        with pytest.raises(TrainingError, match=f"--fused-step: .*{words}"):
            loop.run(Line(), line_options(tmp_path / "run", fused_step=True, **wrong))
    with pytest.raises(NonFiniteError, match="step 7 was not finite, and the step has been made"):
        loop.run(Deep(poison=range(7, 8)), line_options(tmp_path / "run", fused_step=True, clip=0.0))
    assert checkpoints.Checkpoints(tmp_path / "run/checkpoints", 2).newest()[1]["step"] == 5


def test_gradients_are_shortened_together_or_not_at_all(tmp_path):
    """SGD moves by the rate times the gradient, which with --clip is as long as that, over all parameters."""
    moved = {}
    for clip in (0.0, 0.5):
        task, start = Line(), torch.cat([p.detach().flatten() for p in Line().modules["line"].parameters()])
        now = state.State(task, line_options(tmp_path, optimiser="sgd", clip=clip, weight_decay=0.0), ranks.Ranks())
        figures = now.take(0, 0.1)
        moved[clip] = torch.cat([p.detach().flatten() for p in task.modules["line"].parameters()]) - start
    assert figures["norm"] > 1 and moved[0.0].norm().item() == pytest.approx(0.1 * figures["norm"], rel=1e-5)
    assert moved[0.5].norm().item() == pytest.approx(0.05, rel=1e-4)


def log_lines(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def test_every_seed_step_and_place_has_a_stream_of_its_own():
    keys = [*itertools.product(range(3), repeat=3), *itertools.product(range(3), repeat=2), (1, 23), (12, 3), (123,)]
    first, again = ([torch.rand(2, generator=generator(*key)).tolist() for key in keys] for _ in range(2))
    assert first == again and len({number for pair in first for number in pair}) == 2 * len(keys)


def test_the_log_of_a_resumed_run_is_that_of_the_whole(tmp_path):
    """Means over steps before and after the cut; a line that a kill cut short spoils no other."""
    o = dict(steps=20, save_every=3, log_every=5)
    loop.run(Line(), line_options(tmp_path / "whole", **o))
    with pytest.raises(Cut):
        loop.run(cut_at(Line(), 8), line_options(tmp_path / "cut", **o))
    with open(tmp_path / "cut/log.jsonl", "a") as file:
        file.write('{"step": 8, "lo')
    loop.run(Line(), line_options(tmp_path / "cut", resume=True, **o))
    text_ = (tmp_path / "cut/log.jsonl").read_text()
    assert '{"step": 8, "lo\n{"step": 6, "event": "resumed"' in text_
    found = [json.loads(line) for line in text_.splitlines() if line != '{"step": 8, "lo']
    figures = [
        {line["step"]: (line["loss"], line["norm"]) for line in lines if "loss" in line}
        for lines in (log_lines(tmp_path / "whole"), found)
    ]
    assert figures[0] == figures[1] and len(figures[0]) == 4
    loop.run(Line(), line_options(tmp_path / "each", **o | {"log_every": 1}))
    each = [line["loss"] for line in log_lines(tmp_path / "each") if "loss" in line]
    for step, (loss, _) in figures[0].items():  # both are rounded to six places
        assert loss == pytest.approx(sum(each[step - 5 : step]) / 5, rel=0, abs=1.001e-6)


class Judged(Line):
    """Evaluations whose figures are given, and an export that writes what it was given."""

    figures: dict[int, float] = {}

    def evaluate(self, step, out):
        return {"right": self.figures[step]}

    def validate(self):
        return self.modules["line"].weight.detach().sum().item()

    def export(self, out):
        torch.save({k: v.clone() for k, v in self.modules["line"].state_dict().items()}, out / "result.pt")


def test_the_best_checkpoint_is_kept_and_exported(tmp_path):
    Judged.figures = {5: 0.1, 10: 0.7, 15: 0.3, 20: 0.7, 25: 0.6, 30: 0.2, 35: 0.5, 40: 0.4}
    o = dict(best="right:max", eval_every=5, save_every=5, keep=1)
    with pytest.raises(Cut):
        loop.run(cut_at(Judged(), 23), line_options(tmp_path / "run", **o))
    assert loop.run(Judged(), line_options(tmp_path / "run", resume=True, **o)) == 0
    kept = tmp_path / "run/best"
    assert [c.name for c in kept.iterdir()] == ["step-00000010"]
    assert [c.name for c in (tmp_path / "run/checkpoints").iterdir()] == ["step-00000040"]
    best = load_file(kept / "step-00000010/state.safetensors")
    result = torch.load(tmp_path / "run/result.pt")
    assert all(torch.equal(result[name], best[f"average/line.{name}"]) for name in ("weight", "bias"))
    lines = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    assert lines[-1]["exported"] == 10 and all(
        "validation_loss" in line for line in lines if line.get("event") == "evaluated"
    )
    loop.run(Judged(), line_options(tmp_path / "low", **o | {"best": "right:min"}))
    assert [c.name for c in (tmp_path / "low/best").iterdir()] == ["step-00000005"]
    with pytest.raises(TrainingError, match="no such figure, only validation_loss, right"):
        loop.run(Judged(), line_options(tmp_path / "none", **o | {"best": "wrong:min"}))


def test_without_an_average_the_weights_themselves_are_exported(tmp_path):
    loop.run(Judged(), line_options(tmp_path / "run", ema=0.0))
    kept = final(tmp_path / "run")
    assert not any(name.startswith("average/") for name in kept)
    assert torch.equal(torch.load(tmp_path / "run/result.pt")["weight"], kept["weights/line.weight"])


def test_tensorboard_has_the_figures_of_the_log(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    loop.run(Line(), line_options(tmp_path / "run", tensorboard=True))
    board = EventAccumulator(str(tmp_path / "run/tensorboard"))
    board.Reload()
    lines = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    expected = [(line["step"], line["loss"]) for line in lines if "loss" in line]
    assert [(s.step, pytest.approx(s.value, rel=1e-5)) for s in board.Scalars("train/loss")] == expected and len(
        expected
    ) == 10


def test_average_is_the_formula_and_comes_back(tmp_path):
    p = torch.nn.Parameter(torch.zeros(2, dtype=torch.float64))
    average, expected = state.Average({"p": p}, 0.9), np.zeros(2)
    for step in range(50):
        p.data = torch.tensor([step + 1.0, -step], dtype=torch.float64)
        average.update(step)
        decay = min(0.9, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * p.detach().numpy()
    np.testing.assert_allclose(average.values["p"].numpy(), expected, rtol=1e-12)
    own = p.detach().clone()
    with average.in_place():
        np.testing.assert_allclose(p.detach().numpy(), expected, rtol=1e-12)
    assert torch.equal(p, own)


def test_learning_rate(tmp_path):
    o = line_options(tmp_path, steps=100, warmup=10, cooldown=20, lr=1.0)
    assert [loop.learning_rate(o, s) for s in (0, 4, 9, 50, 80, 90, 99)] == [0.1, 0.5, 1.0, 1.0, 1.0, 0.5, 0.05]

    for schedule, middle in (("linear", 0.5), ("cosine", 0.5)):
        o = line_options(tmp_path, steps=110, warmup=10, cooldown=0, lr=1.0, schedule=schedule)
        assert [loop.learning_rate(o, s) for s in (0, 9, 10, 60)] == pytest.approx([0.1, 1.0, 1.0, middle])
        assert loop.learning_rate(o, 35) == pytest.approx(0.75 if schedule == "linear" else (1 + 2**-0.5) / 2)
        assert 0 < loop.learning_rate(o, 109) < 0.011
    loop.run(Line(), line_options(tmp_path / "run", schedule="cosine", steps=8, cooldown=0))
    with pytest.raises(TrainingError, match="the cosine schedule depends on it"):
        loop.run(Line(), line_options(tmp_path / "run", schedule="cosine", steps=9, cooldown=0, resume=True))


def test_the_curve_is_drawn_from_a_log_with_a_torn_line(tmp_path):
    lines = [json.dumps({"step": s, "loss": 1 / (s + 1)}) for s in range(50)]
    (tmp_path / "log.jsonl").write_text("\n".join(lines) + '\n{"step": 50, "lo')
    log.draw_curve(tmp_path / "log.jsonl", tmp_path / "loss.png")
    from PIL import Image

    picture = np.asarray(Image.open(tmp_path / "loss.png").convert("RGB")).astype(int)
    blue = np.argwhere((picture[..., 2] - picture[..., 0]) > 60)
    assert blue[:, 1].min() < 100 and blue[:, 1].max() > 700  # it spans the picture
    assert blue[blue[:, 1] < 100, 0].mean() < blue[blue[:, 1] > 700, 0].mean()  # and falls


# --------------------------------------------------------------------------------------------------------- the two methods


def test_every_method_resumes_to_the_same_bits_and_export(tmp_path, small):
    o = vae_options(tmp_path / "vae")
    assert loop.run(vae.TrainVAE(o), o) == 0
    p = vae_options(tmp_path / "vae2")
    with pytest.raises(Cut):
        loop.run(cut_at(vae.TrainVAE(p), 3), p)
    p = dataclasses.replace(p, resume=True)
    assert loop.run(vae.TrainVAE(p), p) == 0
    assert_same_bits(final(tmp_path / "vae"), final(tmp_path / "vae2"))

    o = word_options(tmp_path / "text")
    assert loop.run(text.TrainText(o), o) == 0
    p = word_options(tmp_path / "text2")
    with pytest.raises(Cut):
        loop.run(cut_at(text.TrainText(p), 3), p)
    p = dataclasses.replace(p, resume=True)
    assert loop.run(text.TrainText(p), p) == 0
    assert_same_bits(final(tmp_path / "text"), final(tmp_path / "text2"))

    q = text_options(tmp_path / "unet")
    assert loop.run(text2image.TextToImage(q), q) == 0
    r = text_options(tmp_path / "unet2")
    with pytest.raises(Cut):
        loop.run(cut_at(text2image.TextToImage(r), 5), r)  # in the second epoch: 4 batches make one
    r = dataclasses.replace(r, resume=True)
    assert loop.run(text2image.TextToImage(r), r) == 0
    assert_same_bits(final(tmp_path / "unet"), final(tmp_path / "unet2"))

    import sdcore

    pipe = sdcore.load(str(tmp_path / "unet/model"), dtype=torch.float32)
    assert pipe.scheduler == text2image.SCHEDULER and pipe.tokenizers[0].max_length == vocabulary.LENGTH
    assert torch.isfinite(pipe("a red circle", steps=2).pixels).all()
    learned = load_file(tmp_path / "text/text_encoder/model.safetensors")  # it stays as it is
    kept = load_file(tmp_path / "unet/model/text_encoder/model.safetensors")
    assert learned.keys() == kept.keys() and all(torch.equal(learned[k].half(), kept[k]) for k in learned)

    s = text_options(tmp_path / "unet3", start=str(tmp_path / "unet/model"))
    found, expected = text2image.TextToImage(s).unet.state_dict(), pipe.unet.state_dict()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_decoder_only_leaves_the_encoder_alone(tmp_path, small):
    o = vae_options(tmp_path / "vae", steps=2)
    loop.run(vae.TrainVAE(o), o)
    p = vae_options(tmp_path / "decoder", steps=3, start=str(tmp_path / "vae"), decoder_only=True)
    loop.run(vae.TrainVAE(p), p)
    old, new = (load_file(tmp_path / run / "vae/diffusion_pytorch_model.safetensors") for run in ("vae", "decoder"))
    same = {name for name in old if torch.equal(old[name], new[name])}
    assert same == {name for name in old if name.startswith(("encoder.", "quant_conv."))}


def test_standardised_latents_reconstruct_the_same():
    torch.manual_seed(0)
    model = vae.VAE(SMALL_VAE).double()
    x = torch.randn(4, 3, 16, 16, dtype=torch.float64)
    noise = torch.randn(4, 4, 2, 2, dtype=torch.float64)
    with torch.no_grad():
        before, (mean, _) = model(x, noise)
        vae.standardise(model, mean.mean(dim=(0, 2, 3)), mean.std(dim=(0, 2, 3)))
        after, (mean, _) = model(x, noise)
    torch.testing.assert_close(before, after, rtol=0, atol=1e-10)
    torch.testing.assert_close(mean.mean(dim=(0, 2, 3)), torch.zeros(4, dtype=torch.float64), rtol=0, atol=1e-9)
    torch.testing.assert_close(mean.std(dim=(0, 2, 3)), torch.ones(4, dtype=torch.float64), rtol=0, atol=1e-9)


def test_close_windows_hold_a_thing():
    x = vae.pictures(np.random.default_rng(0), 50, close=True)
    assert x.shape == (100, 3, 32, 32)
    assert min(window.std(axis=(1, 2)).max() for window in x) > 0.05


def test_diffusion_loss_against_the_formula_in_fp64():
    """Elementwise in numpy, fp64, with a stand-in network that looks at x and t."""
    rng = torch.Generator().manual_seed(0)
    x, noise = (torch.randn(5, 4, 2, 2, generator=rng) for _ in range(2))
    t = torch.tensor([0, 10, 400, 800, 999])
    alpha_bar = text2image.alpha_bars(text2image.SCHEDULER)
    weights = objectives.capped_v(alpha_bar, 5.0)

    def network(x_t, t, context):
        return 0.3 * x_t + (t.to(x_t.dtype) / 1000).view(-1, 1, 1, 1) + context.mean()

    context = torch.ones(1, dtype=torch.float64)
    found = text2image.diffusion_loss(
        network, x.double(), t, noise.double(), context, alpha_bar.double(), weights.double()
    )
    expected = 0.0
    beta = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    bars = np.cumprod(1 - beta)
    for i in range(5):
        a = bars[t[i]]
        x_t = np.sqrt(a) * x[i].double().numpy() + np.sqrt(1 - a) * noise[i].double().numpy()
        guess = 0.3 * x_t + float(t[i]) / 1000 + 1
        clean = np.sqrt(a) * x_t - np.sqrt(1 - a) * guess  # what the predicted v says the clean latent is
        snr = a / (1 - a)
        expected += min(snr + 1, 5.0) * ((clean - x[i].double().numpy()) ** 2).mean() / 5
    assert found.item() == pytest.approx(expected, rel=1e-5)  # the table of alphas is fp32


def test_timesteps_are_spread():
    """One in every twentieth of the distribution, and all together the logit-normal of the paper, worked out by scipy."""
    rng, edges = torch.Generator().manual_seed(0), np.arange(1001) / 1000
    with np.errstate(divide="ignore"):
        below = stats.norm.cdf((np.log(edges / (1 - edges)) - text2image.MIDDLE) / text2image.WIDTH)  # P(t < 1000 edge)
    counts = torch.zeros(1000)
    for _ in range(2000):
        t = objectives.logit_normal(20, 1000, rng, text2image.MIDDLE, text2image.WIDTH)
        for k, i in enumerate(sorted(t.tolist())):
            assert below[i] * 20 < k + 1 and below[i + 1] * 20 > k
        counts[t] += 1
    # A timestep that is p of the distribution is drawn in about 40,000 p of 40,000, with less spread than chance has.
    expected = 40_000 * np.diff(below)
    assert (np.abs(counts.numpy() - expected) < 4 * np.sqrt(expected) + 1).all()


def test_every_epoch_sees_every_picture_once_with_its_own_caption(tmp_path, small):
    o = vae_options(tmp_path / "vae", steps=1)
    loop.run(vae.TrainVAE(o), o)
    p = word_options(tmp_path / "text", steps=1)
    loop.run(text.TrainText(p), p)
    task = text2image.TextToImage(text_options(tmp_path / "unet", shards=2))
    rows = [torch.cat([task.rows(epoch * 8 + i) for i in range(8)]) for epoch in range(2)]
    assert [sorted(r.tolist()) for r in rows] == [list(range(64))] * 2 and not torch.equal(*rows)

    tokens = {i: token for token, i in json.loads((tmp_path / "unet/model/tokenizer/vocab.json").read_text()).items()}
    encoder = text2image.load_vae(str(tmp_path / "vae"))
    for shard in range(2):
        rng = np.random.default_rng([3, shard])
        scenes = [world.training_scene(rng) for _ in range(32)]
        mean = encoder.encode(torch.from_numpy(world.draw_batch(scenes[:16]))).mean * encoder.config.scaling_factor
        torch.testing.assert_close(
            task.mean[shard * 32 : shard * 32 + 16].float(), mean, rtol=2e-3, atol=2e-3
        )  # stored in fp16
        for scene, ids in zip(scenes, task.ids[shard * 32 :], strict=False):
            for row in ids.tolist():
                words = (
                    "".join(tokens[i] for i in row[1 : row.index(task.tokenizer.eos_id)]).replace("</w>", " ").strip()
                )
                demand = world.parse(words)
                assert all(checker.matches(scene, demand).values()), (words, scene)

    with pytest.raises(TrainingError, match="another autoencoder"):
        text2image.TextToImage(text_options(tmp_path / "unet", seed=4))


def test_text_labels_say_what_a_caption_demands_from_either_end():
    rng = np.random.default_rng(0)
    for scene in (world.training_scene(rng) for _ in range(300)):
        words = world.caption(scene)
        found = text.labels(words)
        assert len(found) == len(text.CLASSES) and all(0 <= a < n for a, n in zip(found, text.CLASSES, strict=True))
        if len(scene.things) == 2:
            assert text.labels(world.caption(world.mirrored(scene))) == found
            first = min(scene.things, key=lambda thing: (thing.x, thing.y))
        else:
            first = scene.things[0]
        assert (found[0], found[5]) == (1, len(scene.things) - 1)
        for name, a in zip(text.THING, found[1:5], strict=True):
            assert text.THING[name][a] == getattr(first, name)
        assert (None, *world.BACKGROUNDS)[found[-1]] == scene.background
    assert text.labels("") == [0] * 12 and text.labels("a circle") == [1, 1] + [0] * 10


def test_text_learns_from_nothing_held_out_and_is_read_from_the_end_token_on(tmp_path, small):
    task = text.TrainText(word_options(tmp_path, empty=0.3))
    words = task.captions(np.random.default_rng(0), 500)
    assert 100 < words.count("") < 200
    pairs = {(thing.colour, thing.shape) for w in words for thing in world.parse(w).things}
    assert len(pairs) > 40 and not pairs & world.HELD_OUT_PAIRS
    texts = ["a red circle", "", "a small blue square above a large dotted yellow heart on grey"]
    logits, which = task.read(texts)
    lengths = [vocabulary.LENGTH - 1 - len(task.tokenizer.encode(t)) for t in texts]  # all but the start and the words
    assert torch.bincount(which).tolist() == lengths and [x.shape[1] for x in logits] == text.CLASSES


def test_vocabulary_has_a_token_for_every_word_and_spells_the_rest(tmp_path):
    vocabulary.write(tmp_path, world.VOCABULARY)
    ours = Tokenizer.from_folder(tmp_path)
    assert [word for word in world.VOCABULARY if len(ours.encode(word)) != 1] == []
    assert (ours.max_length, ours.pad_id) == (32, ours.eos_id) and len(ours.encode("rocket 7 ü")) > 3
    transformers = pytest.importorskip("transformers")
    theirs = transformers.CLIPTokenizer.from_pretrained(tmp_path)
    rng = np.random.default_rng(0)
    texts = [world.caption(world.training_scene(rng), rng) for _ in range(100)] + [
        "",
        "Rocket, 12 times!",
        "a teal-striped ü",
    ]
    rows = theirs(texts, padding="max_length", max_length=32, truncation=True).input_ids
    assert ours(texts).tolist() == rows
    assert max(len(ours.encode(text)) for text in texts) <= 30


def test_options_become_a_command_line(capsys):
    words = ["--steps", "7", "--decoder-only", "--no-resume", "--lr", "0.5", "--start", "x"]
    o = vae.parse(vae.VAEOptions, words, prog="t")
    assert (o.steps, o.decoder_only, o.resume, o.lr, o.start, o.batch) == (7, True, False, 0.5, "x", 16)
    with pytest.raises(SystemExit) as stopped:
        vae.parse(vae.VAEOptions, ["--steps", "many"], prog="t")
    assert stopped.value.code == 2


def test_the_same_words_always_give_the_same_tokens():
    words = world.VOCABULARY
    first = vocabulary.learn_merges(words)
    assert first == vocabulary.learn_merges(words[::-1]) and len(set(first)) == len(first)
    assert vocabulary.learn_merges(["abab", "ab", "cd"]) == [  # ab</w> three times, then by the alphabet
        ("a", "b</w>"),
        ("a", "b"),
        ("ab", "ab</w>"),
        ("c", "d</w>"),
    ]
