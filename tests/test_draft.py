"""DRaFT: its gradients against one autograd through a sampler written out, what each kind learns from, memory, exact resume.

On a small random model of SDXL's shape. (The one of SD 1.5's magnifies rounding: what is off by a millionth at the start is
off by half in the gradient through two steps, in autograd's own as well.)
"""

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from sdcore.train import draft, loop, policy
from sdcore.train.draft import DRaFT, DRaFTOptions
from sdcore.train.options import parse
from sdcore.train.ranks import Ranks
from sdcore.train.state import State
from sdcore.train.task import generator

from sdcore.errors import ConfigError
from sdcore.samplers import make_steps, sample
from sdcore.scheduler import alpha_bars
from tests.runs import PROMPTS, Cut, assert_same_bits, cut_at, final, rewarded

REWARD = """
differentiable = True

def reward(pictures, prompts):
    return (pictures[:, 0] - pictures[:, 2]).mean(dim=(1, 2)) * 10
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return rewarded(tmp_path_factory.mktemp("draft"), REWARD)


def options(place: Path, out: Path, family: str = "sdxl", **changes) -> DRaFTOptions:
    given = dict(
        out=str(out), model=str(place / family), device="cpu", prompts=str(place / "prompts.txt"), reward=str(place / "red.py"),
        draw_steps=3, guidance=3.0, batch=2, steps=3, rank=2, lr=1e-2, seed=5, save_every=1, threads=1,
    )  # fmt: skip
    return DRaFTOptions(**(given | changes))


def method(o: DRaFTOptions) -> DRaFT:
    return DRaFT(o, policy.load(o))


def gradient(state: State, step: int) -> torch.Tensor:
    """Of all that trains, in one row."""
    state.gradients(step)
    flat = torch.cat([p.grad.flatten() for p in state.trained.values()])
    for p in state.trained.values():
        p.grad = None
    return flat


def by_hand(task: DRaFT, step: int, learnt: int, copies: int = 1) -> torch.Tensor:
    """The gradient of minus the mean reward by plain autograd, DDIM written out; `copies` beyond 1: the last step anew."""
    pipe, o, n = task.pipe, task.options, task.options.batch
    table = make_steps(pipe.scheduler, o.draw_steps, "ddim")
    words = [task.prompts[task.prompt_of(step, place)] for place in range(n)]
    told = task.context([""] * n + words)
    streams = [generator(o.seed, step, place, 20) for place in range(n)]
    streams = [torch.Generator().manual_seed(rng.initial_seed()) for rng in streams]

    def draw():
        return torch.stack([torch.randn(task.latent, generator=rng) for rng in streams])

    def move(x, s):
        draw()  # the sampler's, which eta 0 has no use for
        negative, positive = pipe.unet(
            torch.cat([x, x]), torch.full((2 * n,), s.t), told.context, task.added(told)
        ).chunk(2)
        eps = negative + 3.0 * (positive - negative)
        end = table[s.i + 1].alpha_bar if s.i + 1 < len(table) else last
        x0 = (x - (1 - s.alpha_bar) ** 0.5 * eps) / s.alpha_bar**0.5
        return end**0.5 * x0 + (1 - end) ** 0.5 * eps

    last = 1.0 if pipe.scheduler.set_alpha_to_one else float(alpha_bars(pipe.scheduler)[0])
    x = draw()
    with torch.no_grad():
        for s in table[: len(table) - learnt]:
            x = move(x, s)
    total = 0.0
    for k in range(copies):
        for s in table[len(table) - learnt :]:
            x = move(x, s)
        pictures = (pipe.vae.decode(x / pipe.vae.config.scaling_factor) / 2 + 0.5).clamp(0, 1)
        total = total - (pictures[:, 0] - pictures[:, 2]).mean() * 10 / copies
        if k == 0:
            first = x.detach()
        a = table[-1].alpha_bar
        x = first * a**0.5 + draw() * (1 - a) ** 0.5
    total.backward()
    flat = torch.cat([p.grad.flatten() for p in task.trained])
    for p in task.trained:
        p.grad = None
    return flat


@pytest.mark.parametrize(
    "family, changes, learnt, copies",
    [
        ("sdxl", dict(approach="draft", last=1), 1, 1),
        ("sdxl", dict(approach="draft", last=2), 2, 1),
        ("sdxl", dict(approach="lv", copies=3), 1, 3),
        ("sdxl", dict(approach="draft", last=3), 3, 1),
    ],
)
def test_gradient_is_autograds(place, tmp_path, family, changes, learnt, copies):
    """After an update, so that the LoRA is not zero. Checkpointing works the steps out again: the same to rounding."""
    task = method(options(place, tmp_path, family, **changes))
    state = State(task, task.options, Ranks())
    assert state.take(0, 1e-2)
    found, wanted = gradient(state, 1), by_hand(task, 1, learnt, copies)
    assert wanted.norm() > 1e-5 and (found - wanted).norm() < 1e-4 * wanted.norm()


def test_alignprop_draws_the_number_of_steps(place, tmp_path):
    """From one to all of them, each about as often; the gradient is that of so many steps."""
    task = method(options(place, tmp_path, approach="alignprop"))
    counts = [task.truncation(step) for step in range(300)]
    assert sorted(set(counts)) == [1, 2, 3] and min(map(counts.count, (1, 2, 3))) > 70
    state = State(task, task.options, Ranks())
    step = counts.index(2, 1)
    state.take(0, 1e-2)
    wanted = by_hand(task, step, 2)
    assert (gradient(state, step) - wanted).norm() < 1e-4 * wanted.norm()


def test_passes_do_not_change_the_gradient(place, tmp_path):
    found = []
    for accumulate in (1, 2):
        task = method(
            options(place, tmp_path / str(accumulate), accumulate=accumulate, approach="draft", last=3, eta=1.0)
        )
        found.append(gradient(State(task, task.options, Ranks()), 0))
    assert (found[0] - found[1]).norm() < 1e-3 * found[0].norm()


def test_memory_does_not_grow_with_the_steps(place, tmp_path):
    """What autograd keeps for the way back, of one step and of three: the x's between them, not what the network did."""
    kept = []
    for last in (1, 3):
        task = method(options(place, tmp_path / str(last), approach="draft", last=last))
        size = 0

        def pack(tensor):
            nonlocal size
            size += tensor.nbytes
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            latents = task.draw(["a", "b"], task.noise((0, 0), (0, 1)), task.learnt(0))
        assert latents.requires_grad
        kept.append(size)
    assert kept[1] - kept[0] < 50_000


def test_reward_rises_and_a_cut_run_resumes_to_the_same_bits(place, tmp_path):
    def o(name, **changes):
        return options(place, tmp_path / name, "sd1", steps=6, lr=2e-2, approach="lv", **changes)

    whole = method(o("whole"))
    before = mean_reward(whole)
    assert loop.run(whole, o("whole")) == 0
    assert mean_reward(whole) > before
    with pytest.raises(Cut):
        loop.run(cut_at(method(o("cut")), 3), o("cut"))
    assert loop.run(method(o("cut", resume=True)), o("cut", resume=True)) == 0
    assert_same_bits(final(tmp_path / "whole"), final(tmp_path / "cut"))


@torch.no_grad()
def mean_reward(task: DRaFT) -> float:
    noise = task.noise(*[(99, k) for k in range(4)])
    *_, (_, x, _) = sample(task.denoiser([PROMPTS[0]] * 4), task.start(noise), task.steps, noise=noise)
    pictures = task.pictures(x)
    return task.reward(pictures, [PROMPTS[0]] * 4).mean().item()


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"reward": "compressibility"}, "--reward compressibility: has no gradients; .*ddpo"),
        ({"approach": "best"}, "--approach: expected one of draft, lv, alignprop"),
        ({"last": 4}, "--last 4, --copies 2: expected 1 to --draw-steps 3"),
        ({"copies": 0}, "--copies 0: expected 1 to"),
    ],
)
def test_options_without_meaning_are_refused(place, tmp_path, pipes, changes, message):
    with pytest.raises(ConfigError, match=message):
        DRaFT(options(place, tmp_path, **changes), copy.deepcopy(pipes("sd1")))


@pytest.mark.parametrize("preset", sorted(draft.PRESETS))
def test_presets_can_be_read(preset):
    o = parse(DRaFTOptions, ["--preset", preset], prog="x", presets=draft.PRESETS)
    assert policy.read_prompts(o.prompts, 3, 0) and policy.read_prompts(o.watch, 3, 0) and o.batch % o.accumulate == 0
    assert replace(o, approach="draft").last == 1
