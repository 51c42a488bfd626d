"""Memory of a training step: what is rehearsed is what happens, recomputing changes no bit, plans fit, what cannot is refused.

The rehearsal is held to the real step twice: by the same meter, which sees every tensor, to the byte; and in a process of its
own by the resident memory that the system reports. `make check` does that at SD 1.5's size and writes docs/reports/memory.md.
"""

import json
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from sdcore.train import loop, memory, optimisers, tuning
from sdcore.train.caches import fingerprint
from sdcore.train.controlnet import ControlNetOptions, TrainControlNet
from sdcore.train.dreambooth import DreamBooth, DreamBoothOptions
from sdcore.train.finetune import Finetune, FinetuneOptions
from sdcore.train.lora import LoRAOptions, TrainLoRA
from sdcore.train.options import free_names
from sdcore.train.ranks import Ranks
from sdcore.train.state import State
from sdcore.train.textual_inversion import InversionOptions, TextualInversion

import sdcore
from sdcore.errors import TrainingError
from tests.runs import assert_same_bits, final

ROOT = Path(__file__).parents[1]
REPORT = ROOT / "docs/reports/memory.md"
METHODS = {
    "finetune": (Finetune, FinetuneOptions, {}),
    "finetune in bf16, two passes": (Finetune, FinetuneOptions, dict(precision="bf16", accumulate=2)),
    "lora": (TrainLoRA, LoRAOptions, {}),
    "lora of the text encoder too": (TrainLoRA, LoRAOptions, dict(text_encoder=True, dora=True)),
    "textual inversion": (TextualInversion, InversionOptions, dict(token="<it>", initial="circle", captions="object")),
    "dreambooth": (DreamBooth, DreamBoothOptions, dict(prior="prediction", class_prompt="a red circle")),
    "controlnet": (TrainControlNet, ControlNetOptions, dict(stem=(8, 8, 16, 16))),
}  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with two pictures of 128 px and their captions."""
    folder = tmp_path_factory.mktemp("memory")
    (folder / "pictures").mkdir()
    for i, caption in enumerate(["a red circle", "a large blue square"]):
        pixels = np.random.default_rng(i).integers(0, 256, (128, 128, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"pictures/{i}.png")
        (folder / f"pictures/{i}.txt").write_text(caption)
    return SimpleNamespace(folder=folder, pictures=str(folder / "pictures"))


def task(place, method: str = "finetune", **changes) -> tuning.Tune:
    """A method on the bundled model and the two pictures."""
    kind, described, own = METHODS[method]
    given = dict(
        data=place.pictures, out=str(place.folder / "run"), cache=str(place.folder / "cache"), device="cpu", resolution=128,
        buckets=False, batch=2, steps=3, warmup=0, cooldown=0, save_every=2, log_every=1, seed=3, threads=1, lr=1e-4,
    )  # fmt: skip
    o = described(**(given | own | changes))
    return kind(o, tuning.load(o))


class Real(memory.Meter):
    """Counts a step that really runs: it may look at numbers."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._local_scalar_dense.default:
            return func(*args)
        return super().__torch_dispatch__(func, types, args, kwargs)


def step(found: tuning.Tune) -> tuple[list[torch.Tensor], int]:
    """The gradients of a task's first step, really worked out, and at most how many bytes there were for it."""
    state, meter = State(found, found.options, Ranks()), Real()
    for part in memory.networks(found).values():
        for x in (*part.parameters(), *part.buffers()):
            meter.know(x.untyped_storage())
    with ExitStack() as stack:
        for name in ("latents", *found.reads):
            stack.enter_context(memory.replaced(found, name, memory.outside(getattr(found, name))))
        stack.enter_context(memory.replaced(found, "pictures", memory.Outside(found.pictures)))
        with meter:
            state.gradients(0)
    gradients = [torch.zeros(()) if p.grad is None else p.grad for p in state.trained.values()]
    for p in state.trained.values():
        p.grad = None
    assert any(g.abs().sum() > 0 for g in gradients)
    return gradients, meter.peak


@pytest.mark.parametrize("method", METHODS)
def test_a_rehearsal_counts_what_the_real_step_takes_and_recomputing_changes_no_bit(place, method):
    """Kept and recomputed, by the same meter. The step also holds a few numbers for the log: under 64 bytes."""
    found = task(place, method)
    found.latents(found.pictures.visits(0, range(2)))  # in the cache: what encodes pictures is not in either count
    found.latents.vae.to("meta")
    before = {name: vars(block).get("forward") for name, block in memory.blocks(memory.networks(found))}
    kept = memory.rehearse(found, Ranks(), set())
    everything = {name for name, block in kept.blocks.items() if block.saved}
    assert everything and all(p.grad is None for m in found.modules.values() for p in m.parameters())
    recomputed = memory.rehearse(found, Ranks(), everything)
    assert before == {name: vars(block).get("forward") for name, block in memory.blocks(memory.networks(found))}

    gradients, peak = step(found)
    assert abs(peak - kept.extra) <= 64, (peak, kept.extra)
    memory.apply(found, everything)
    again, lower = step(found)
    assert abs(lower - recomputed.extra) <= 64, (lower, recomputed.extra)
    assert lower < peak
    assert len(gradients) == len(again) and all(torch.equal(a, b) for a, b in zip(gradients, again, strict=True))


def test_a_plan_recomputes_no_more_than_the_budget_asks_for(place):
    found = task(place, batch=2)
    kept = memory.rehearse(found, Ranks(), set())
    assert memory.plan(found, Ranks(), kept.peak).recomputed == set()
    least = memory.rehearse(found, Ranks(), set(kept.blocks))
    budget = (kept.peak + least.peak) // 2
    plan = memory.plan(found, Ranks(), budget)
    assert plan.planned.peak <= budget and 0 < len(plan.recomputed) < len(kept.blocks)
    worth = {name: block.saved / (block.flop + 1) for name, block in kept.blocks.items()}
    left = set(worth) - plan.recomputed
    assert min(worth[name] for name in plan.recomputed) >= max(worth[name] for name in left)
    fewer = plan.recomputed - {min(plan.recomputed, key=lambda name: worth[name])}
    assert memory.rehearse(found, Ranks(), fewer).peak > budget
    table = plan.table()
    assert table.count(" recomputed\n") == len(plan.recomputed) and table.count(" kept\n") == len(left)
    assert f"predicted peak {plan.planned.peak / 2**20:,.0f} MiB" in table


def test_what_cannot_fit_is_refused_before_the_first_step(place, capsys):
    found = task(place, memory="40MiB", out=str(place.folder / "refused"))
    kept = memory.rehearse(found, Ranks(), set())
    least = memory.rehearse(found, Ranks(), {name for name, block in kept.blocks.items() if block.saved})
    with pytest.raises(TrainingError) as refused:
        loop.run(found, found.options)
    words = str(refused.value)
    assert (
        "--memory 40MiB" in words and f"{kept.peak / 2**20:,.0f} MiB" in words and f"{least.peak / 2**20:,.0f}" in words
    )
    assert "--accumulate 2" in words and "--ema 0" in words and "--offload" in words
    assert not (place.folder / "refused/checkpoints").exists()
    with pytest.raises(TrainingError, match="--shard"):
        memory.plan(task(place, shard=True), Ranks(), 2**40)


@pytest.mark.parametrize(
    "words, expected",
    [("8GiB", 8 * 2**30), ("1.5 GB", 1_500_000_000), ("600mib", 600 * 2**20), ("1024", 1024), ("0GiB", None), ("8 apples", None),
     ("", None), ("-1GiB", None)],
)  # fmt: skip
def test_sizes(words, expected):
    if expected is None:
        with pytest.raises(TrainingError, match="expected a size such as 8GiB"):
            memory.size(words)
    else:
        assert memory.size(words) == expected


@pytest.mark.parametrize("name", optimisers.OPTIMISERS)
def test_what_optimisers_keep(name):
    """The formulas against what each really holds after a step, but for a few numbers a parameter."""
    pytest.importorskip(optimisers.NEEDS.get(name, "torch"))
    parameters = {"a": torch.nn.Parameter(torch.randn(96, 80)), "b": torch.nn.Parameter(torch.randn(4, 80, 3, 3)),
                  "c": torch.nn.Parameter(torch.randn(72))}  # fmt: skip
    built = optimisers.build(parameters, lambda name: 1.0, loop.LoopOptions(optimiser=name, lr=1.0))
    for p in parameters.values():
        p.grad = torch.randn_like(p)
    built.step()
    tensors = [x for p in parameters.values() for x in built.state[p].values() if isinstance(x, torch.Tensor)]
    once = {x.data_ptr(): x.nbytes for x in tensors if x.numel() != 256}  # not the tables that all share
    kept, said = sum(once.values()), sum(memory.KEPT[name](p) for p in parameters.values())
    assert said <= kept <= said + 0.002 * said + 3 * 16, (said, kept)


def test_a_block_that_runs_again_takes_the_same_from_what_it_shares():
    taken = memory.Taken(iter([1, 2, 3]))
    first = iter(taken)
    assert [next(first), next(first)] == [1, 2]
    assert [x for _, x in zip(range(2), taken, strict=False)] == [1, 2]
    assert next(taken.source) == 3


def test_with_memory_and_without_a_run_ends_in_the_same_bits(place, tmp_path):
    """Through the loop: kept throughout; recomputed, in fewer bytes; and cut in the middle, the rest with another budget."""
    assert {"memory", "offload"} <= free_names(tuning.TuneOptions())
    plain = task(place, out=str(tmp_path / "plain"))
    kept = memory.rehearse(plain, Ranks(), set())
    budget = (kept.peak + memory.rehearse(plain, Ranks(), set(kept.blocks)).peak) // 2
    loop.run(plain, plain.options)
    fitted = task(place, out=str(tmp_path / "fitted"), memory=f"{budget}B")
    loop.run(fitted, fitted.options)
    assert any("forward" in vars(block) for _, block in memory.blocks({"unet": fitted.pipe.unet}))
    assert_same_bits(final(tmp_path / "plain"), final(tmp_path / "fitted"))


@pytest.mark.parametrize("method", ["lora", "textual inversion"])
def test_offload_leaves_nothing_behind_that_a_step_does_not_need(place, tmp_path, method):
    """The same bits as without; what has left is back, bit for bit, while the run is evaluated."""
    plain = task(place, method, out=str(tmp_path / "plain"), steps=2)
    loop.run(plain, plain.options)
    (tmp_path / "prompts.txt").write_text("a red circle\n")
    less = task(
        place, method, out=str(tmp_path / "less"), steps=2, offload=True, eval_every=1, prompts=str(tmp_path / "prompts.txt"),
        cache=str(tmp_path / "cache"),
    )  # fmt: skip
    parts = [less.pipe.vae, *less.pipe.text_encoders]
    prints, seen = [fingerprint(part) for part in parts], []
    draw, loss = less.draw, less.loss
    less.draw = lambda: seen.append([fingerprint(part) for part in parts]) or draw()
    less.loss = lambda part: seen.append([next(p.parameters()).is_meta for p in parts]) or loss(part)
    loop.run(less, less.options)
    gone = [True, method == "lora"]
    assert seen == [gone, prints, gone, prints]
    assert [next(p.parameters()).is_meta for p in parts] == gone
    assert len(list((tmp_path / "less/samples").iterdir())) == 2
    assert_same_bits(final(tmp_path / "plain"), final(tmp_path / "less"))


def test_offload_and_a_cache(place, tmp_path):
    with pytest.raises(TrainingError, match="--offload: needs a --cache"):
        task(place, "lora", offload=True, cache="").prepare(Ranks())
    found = task(
        place, "lora", offload=True, cache=str(tmp_path / "cache"), variants=3, crop="random", flip=True, resolution=96
    )
    found.prepare(Ranks())
    for step_ in range(4):  # every look at every picture is there
        found.latents(found.pictures.visits(step_, range(2)))
    assert memory.rehearse(found, Ranks(), set()).held["frozen weights"] == sum(
        p.nbytes for p in found.pipe.unet.parameters()
    )
    for file in (tmp_path / "cache").rglob("*.safetensors"):
        file.unlink()
    with pytest.raises(TrainingError, match="has gone from the cache"):
        found.latents(found.pictures.visits(0, [0]))
    shuffled = task(place, "lora", offload=True, cache=str(tmp_path / "cache"), shuffle_tags=True)
    shuffled.prepare(Ranks())
    assert list(shuffled.away) == ["vae"]


def test_fine_tuning_of_a_whole_unet_writes_a_model(place, tmp_path):
    """By the command's words, which `text2image` takes too; the result loads, and it is what was trained."""
    words = (
        f"--data {place.pictures} --model tiny --out {tmp_path / 'run'} --cache {place.folder / 'cache'} --device cpu "
        "--resolution 64 --batch 2 --steps 2 --lr 0.001 --warmup 0 --cooldown 0 --threads 1 --ema 0"
    ).split()
    from sdcore.train import text2image

    assert text2image.main(words) == 0
    tuned, base = sdcore.load(str(tmp_path / "run/model"), device="cpu"), sdcore.load("tiny", device="cpu")
    weights = {
        name.removeprefix("weights/unet."): x for name, x in final(tmp_path / "run").items() if "weights/" in name
    }
    for name, p in tuned.unet.named_parameters():
        stored = weights[name].to(torch.float16).float()  # the precision of the bundled model's file
        assert torch.equal(p.float(), stored), name
        assert not torch.equal(p.float(), base.unet.get_parameter(name).float()), name
    assert fingerprint(tuned.vae) == fingerprint(base.vae)


def weigh(**asked) -> dict:
    """`tests.weigh_step` in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.weigh_step", json.dumps(asked)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=7000,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.check
def test_a_small_model_takes_what_it_was_said_to_take():
    """Half its blocks recomputed or so. The system counts whole pages, and libraries have their work space: within 10 %."""
    found = weigh(size="small", method="full", memory="between", pixels=256, batch=2)
    assert 0 < found["recomputed"] < found["blocks"]
    assert abs(found["planned"] / found["took"] - 1) <= 0.1, found


SIZES = [
    dict(size="sd15", method="lora", memory="none", rank=8),
    dict(size="sd15", method="lora", memory="between", rank=8),
    dict(size="sd15", method="lora", memory="all", rank=8),
    dict(size="small", method="full", memory="none", batch=2),
    dict(size="small", method="full", memory="all", batch=2),
]
HEAD = """# Memory of a training step, planned and taken

`python -m pytest --check -m check tests/test_memory.py -s` writes this page. {where}

Two real optimiser steps on the CPU, one thread, fp32, random weights. sd15: the official size with autoencoder and text encoder,
a LoRA of rank 8 on all attentions, one picture of 256 px; small: a UNet of SD 1.5's shape, all of whose weights train, two
pictures of 256 px. Planned: predicted before the first step (`--memory`). Taken: VmHWM of a process of its own over both steps,
less what it had before the model was made, glibc told to hand back what is freed. MiB. The last two columns leave out what is
held throughout (weights, average, optimiser): there the plan has no weights to hide behind.

| model | trained | budget | recomputed | planned | taken | off by | on top of what is held: planned | taken |
|---|---|---|---|---|---|---|---|---|
"""


@pytest.mark.check
def test_a_step_at_sd15_size_takes_what_it_was_said_to_take():
    """Planned peak within 10 % of the measured one, for every block kept, all recomputed, and a budget in between."""
    lines, wrong = [], []
    for asked in SIZES:
        row = weigh(**asked)
        off, held = row["planned"] / row["took"] - 1, row["held"]
        what = f"{row['size']} | {row['method']} | {row['memory']} | {row['recomputed']} of {row['blocks']}"
        whole = f"{row['planned']:,.0f} | {row['took']:,.0f} | {100 * off:+.1f} %"
        lines.append(f"| {what} | {whole} | {row['planned'] - held:,.0f} | {row['took'] - held:,.0f} |")
        print(lines[-1], f"planning {row['planning']:.1f} processor s, a step {row['seconds']:.1f}")
        if abs(off) > 0.1 or (asked["memory"] == "between" and not 0 < row["recomputed"] < row["blocks"]):
            wrong.append(row)
    where = f"torch {torch.__version__}, Linux, {time.strftime('%Y-%m-%d', time.gmtime())}."
    REPORT.write_text(HEAD.format(where=where) + "\n".join(lines) + "\n")
    assert not wrong, wrong
