"""SIGKILL at random moments: whatever a run is doing, it goes on from its last checkpoint and ends in the same bits.

A run of a few steps, which saves at each, is forked, killed at a random moment after its first step has begun, and resumed;
killed again, and so on, until it ends. Its last checkpoint, every file of its result and every figure of its log must be those of
a run that nobody killed. `make check` kills every method 20 times and writes docs/reports/kills.md; here one is killed twice.
(That a save can be killed before each single call it makes, and find no room at each write: tests/test_train.py.)
"""

import json
import mmap
import os
import platform
import random
import shutil
import signal
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from sdcore.train import checkpoints, loop, policy, text, text2image, tuning, vae
from sdcore.train.ddpo import DDPO, DDPOOptions
from sdcore.train.finetune import Finetune, FinetuneOptions
from sdcore.train.loop import LoopOptions, Task

from tests.runs import assert_same_bits, final
from tests.test_methods import RUNS, options, place  # noqa: F401  (a fixture)
from tests.test_train import (
    SMALL_TEXT,
    SMALL_UNET,
    SMALL_VAE,
    text_options,
    vae_options,
    word_options,
)

KILLS, STEPS = 20, 12
REPORT = Path(__file__).parents[1] / "docs/reports/kills.md"
Method = Callable[
    [Path, bool], tuple[Task, LoopOptions]
]  # (folder of the run, whether to resume) -> what `loop.run` takes


# ---------------------------------------------------------------------------------------------------------------- the methods


def tuned(kind: Callable[..., Task], described: Callable[..., LoopOptions], changes: dict) -> Callable[..., Method]:
    """A method that tunes the small SD 1.5 on pictures."""

    def make(place, folder: Path) -> Method:  # noqa: F811
        def method(out: Path, resume: bool):
            given = dict(resolution=64, steps=STEPS, log_every=2, ema=0.9, cache=str(folder / "cache")) | changes
            o = options(described, place, out, resume=resume, **given)
            return kind(o, tuning.load(o)), o

        return method

    return make


def from_nothing(place, folder: Path) -> Method:  # noqa: F811
    """text2image as it has made the bundled model, with tiny networks."""
    vae.CONFIG, vae.MEASURED, text2image.UNET, text.CONFIG, text2image.SHARD = SMALL_VAE, 16, SMALL_UNET, SMALL_TEXT, 32
    vae.TrainVAE.evaluate = text2image.TextToImage.evaluate = lambda *_: {}
    for described, kind, name in ((vae_options, vae.TrainVAE, "vae"), (word_options, text.TrainText, "text")):
        o = described(folder / name, steps=1)
        loop.run(kind(o), o)

    def method(out: Path, resume: bool):
        places = {name: str(folder / name) for name in ("vae", "text", "cache")}
        o = text_options(out, resume=resume, steps=STEPS, save_every=1, log_every=2, **places)
        return text2image.TextToImage(o), o

    return method


def rewarded(place, folder: Path) -> Method:  # noqa: F811
    """DDPO, an epoch of which is four steps: kills fall within. Its tracker is in the checkpoint, its rewards in the log."""
    (folder / "prompts.txt").write_text("a red circle\na green square\nphoto of a cat")

    def method(out: Path, resume: bool):
        o = DDPOOptions(
            out=str(out), resume=resume, model=place.model("sd1"), device="cpu", prompts=str(folder / "prompts.txt"),
            draw_steps=3, guidance=3.0, batch=4, updates=2, inner=2, tracked=4, least=2, rank=2, lr=1e-2, steps=STEPS,
            save_every=1, seed=5, threads=1,
        )  # fmt: skip
        return DDPO(o, policy.load(o)), o

    return method


METHODS: dict[str, Callable[..., Method]] = {
    "dreambooth": tuned(*RUNS["dreambooth"]),
    "lora": tuned(*RUNS["lora"]),
    "textual-inversion": tuned(*RUNS["textual-inversion"]),
    "controlnet": tuned(*RUNS["controlnet"]),
    "finetune": tuned(Finetune, FinetuneOptions, dict(dropout=0.3)),
    "text2image": from_nothing,
    "ddpo": rewarded,
}


# ------------------------------------------------------------------------------------------------------------------- the kills


class Kill(NamedTuple):
    saving: bool  # in the midst of a save
    redone: int  # steps that had begun and had to be taken again


class Child:
    """The run in a forked process. `step`: the last that has begun, -1 before; `saving`: whether a save is going on."""

    def __init__(self, method: Method, out: Path, resume: bool):
        self.told = mmap.mmap(-1, 16)
        self.tell(-1, 0)
        self.pid = os.fork()
        if self.pid == 0:
            code = 99
            try:
                torch.set_num_threads(1)
                os.dup2(os.open(out.with_suffix(".stderr"), os.O_CREAT | os.O_WRONLY | os.O_TRUNC), 2)
                code = self.run(*method(out, resume))
            finally:
                os._exit(code)

    def run(self, task: Task, o: LoopOptions) -> int:
        loss, save = task.loss, checkpoints.Checkpoints.save

        def begun(part):
            self.tell(part.step, 0)
            return loss(part)

        def saved(*args):
            self.tell(self.step, 1)
            save(*args)
            self.tell(self.step, 0)

        task.loss, checkpoints.Checkpoints.save = begun, saved  # type: ignore[method-assign]
        return loop.run(task, o)

    def tell(self, step: int, saving: int) -> None:
        self.told[:] = struct.pack("qq", step, saving)

    @property
    def step(self) -> int:
        return struct.unpack("qq", self.told[:])[0]

    def ended(self) -> int | None:
        pid, status = os.waitpid(self.pid, os.WNOHANG)
        return os.waitstatus_to_exitcode(status) if pid else None

    def kill_after(self, seconds: float) -> bool:
        """SIGKILL so long after its first step has begun; False where it has ended by itself."""
        until = None
        while until is None or time.perf_counter() < until:
            if until is None and self.step >= 0:
                until = time.perf_counter() + seconds
            if (code := self.ended()) is not None:
                assert code == 0
                return False
            time.sleep(0.001)
        os.kill(self.pid, signal.SIGKILL)
        code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        assert code in (0, -signal.SIGKILL)
        return code != 0


def newest(out: Path) -> int:
    return max((int(c.name[5:]) for c in (out / "checkpoints").glob("step-*")), default=0)


def results(out: Path) -> tuple[dict[str, bytes], dict[tuple, dict]]:
    """Every file of the result, and every line of the log as it was written last, without its seconds."""
    files = {
        str(path.relative_to(out)): path.read_bytes()
        for path in out.rglob("*.safetensors")
        if "checkpoints" not in path.parts
    }
    lines: dict[tuple, dict] = {}
    for text_ in (out / "log.jsonl").read_text().splitlines():
        line = json.loads(text_)
        line.pop("seconds", None)
        if line.get("event") != "resumed":
            lines[line["step"], line.get("event")] = line
    return files, lines


def sweep(method: Method, folder: Path, count: int, seed: int) -> tuple[list[Kill], int]:
    """Kill `count` times, over as many runs as it takes, and compare each of them; the kills, and how many runs."""
    rng, kills, runs = random.Random(seed), [], 0
    out = folder / "run"  # always the same folder: results carry its name
    child, began = Child(method, out, False), time.perf_counter()  # the run that nobody kills
    while (code := child.ended()) is None:
        if child.step <= 0:
            began = time.perf_counter()
        time.sleep(0.001)
    assert code == 0, out.with_suffix(".stderr").read_text()
    a_step = (time.perf_counter() - began) / (STEPS - 1)
    whole, (files, lines) = final(out), results(out)
    assert files and len(lines) >= STEPS // 2
    shutil.rmtree(out)
    while len(kills) < count:
        runs += 1
        going = True
        while going:
            child = Child(method, out, resume=newest(out) > 0)
            going = child.kill_after(rng.uniform(0, 2 * a_step) if len(kills) < count else 1e9)
            if going:
                step, saving = struct.unpack("qq", child.told[:])
                kills.append(Kill(bool(saving), max(step + 1 - newest(out), 0)))
        assert_same_bits(whole, final(out))
        assert results(out) == (files, lines)
        shutil.rmtree(out)
    return kills, runs


def test_a_run_that_was_killed_twice_ends_in_the_same_bits(place, tmp_path):  # noqa: F811
    kills, _ = sweep(METHODS["textual-inversion"](place, tmp_path), tmp_path, 2, seed=1)
    assert len(kills) == 2


@pytest.mark.check
@pytest.mark.parametrize("name", METHODS)
def test_every_method_survives_twenty_kills(place, tmp_path, name):  # noqa: F811
    began = os.times()
    kills, runs = sweep(METHODS[name](place, tmp_path), tmp_path, KILLS, seed=2)
    seconds = sum(os.times()[:4]) - sum(began[:4])
    assert len(kills) == KILLS
    inside, redone = sum(kill.saving for kill in kills), [kill.redone for kill in kills]
    record(name, KILLS, inside, KILLS - inside, sum(redone), max(redone), runs, "equal, bit for bit", round(seconds))


def record(name: str, *cells: object) -> None:
    """Put a method's row into the report, in the place of an older one."""
    old = REPORT.read_text().splitlines() if REPORT.exists() else []
    rows = {line.split("|")[1].strip(): line for line in old if line.startswith("| ")}
    rows[name] = "| " + " | ".join(map(str, (name, *cells))) + " |"
    head = HEAD.format(steps=STEPS, system=f"{platform.machine()}, torch {torch.__version__}")
    REPORT.write_text(head + "".join(rows[name] + "\n" for name in METHODS if name in rows))


HEAD = """# Killed, and the same bits

`pytest --check -m check tests/test_kills.py` ({system}, one thread). Each run takes {steps} steps of a small model and saves
after every one. It is killed by SIGKILL at a random moment up to two steps' time after its first step has begun, resumed, and
killed again until it ends; then another one begins, until there are 20 kills. What is compared with a run that nobody killed:
every tensor of the last checkpoint (weights, average, optimiser), every byte of the exported files, every figure of the log.

| method | kills | in a save | between saves | steps redone | most at once | runs | end | processor seconds |
|---|---|---|---|---|---|---|---|---|
"""
