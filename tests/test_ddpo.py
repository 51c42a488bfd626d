"""DDPO: its formulas against fp64, a peer and autograd, exact ratios, the tracker, resume within an epoch, ranks; its guards.

On small random models of SD 1.5's and SDXL's shape; that it learns is shown on the bundled model (docs/alignment.md).
"""

import copy
import json
import subprocess
import sys
from collections import deque
from dataclasses import replace
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from sdcore.train import ddpo, guards, loop, policy
from sdcore.train.ddpo import DDPO, DDPOOptions
from sdcore.train.options import parse
from sdcore.train.ranks import Ranks
from sdcore.train.state import State
from sdcore.train.task import Part

from sdcore.errors import ConfigError, TrainingError
from sdcore.scheduler import alpha_bars
from tests.runs import PROMPTS, Cut, assert_same_bits, cut_at, final, rewarded

# How red a picture is, a tenth of it by chance of its place: every picture its own number. Each asking leaves a line.
REWARD = """
from pathlib import Path

def reward(pictures, prompts):
    with open(Path(__file__).with_suffix(".asked"), "a") as file:
        file.write(f"{len(prompts)}\\n")
    return pictures[:, 0].mean(dim=(1, 2)) - pictures[:, 2].mean(dim=(1, 2))
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return rewarded(tmp_path_factory.mktemp("ddpo"), REWARD)


def options(place: Path, out: Path, family: str = "sd1", **changes) -> DDPOOptions:
    given = dict(
        out=str(out), model=str(place / family), device="cpu", prompts=str(place / "prompts.txt"), reward=str(place / "red.py"),
        draw_steps=2, guidance=3.0, batch=2, steps=4, rank=2, lr=1e-2, seed=5, save_every=1, threads=1,
        tracked=4, least=2,
    )  # fmt: skip
    return DDPOOptions(**(given | changes))


def method(o: DDPOOptions) -> DDPO:
    return DDPO(o, policy.load(o))


def updated(task: DDPO, steps: int) -> State:
    """The task after some updates."""
    state = State(task, task.options, Ranks())
    for step in range(steps):
        assert state.take(step, task.options.lr)
    return state


# ------------------------------------------------------------------------------------------------------------------ the formulas


def test_log_probability_is_the_definition(place, tmp_path):
    """Of what was drawn, in fp64 by torch's own Gaussian, at the mean and variance of diffusers' DDIM with eta 1."""
    task = method(options(place, tmp_path, updates=2))
    updated(task, 1)
    rollout = task.rollouts[range(2)]
    peer = diffusers.DDIMScheduler.from_pretrained(place / "sd1" / "scheduler", clip_sample=False)
    peer.set_timesteps(2)
    assert [step.t for step in task.steps] == peer.timesteps.tolist()
    for step in task.steps:
        x, new = rollout.x[0, :, step.i].double(), rollout.x[0, :, step.i + 1].double()
        with torch.no_grad(), task.memory.weights_of_then(task.trained):
            x0 = task.denoiser(task.words(0, range(2)))(x.float(), step).double()
        out = (x - step.signal * x0) / step.noise
        t = int(step.t)
        theirs = peer.step(out, t, x, eta=1.0, variance_noise=torch.zeros_like(x), return_dict=False)[0]
        std = peer._get_variance(t, t - 1000 // 2) ** 0.5
        assert step.std == pytest.approx(float(std), rel=1e-5) and step.std > 0.01
        log_p = torch.distributions.Normal(theirs, std.double()).log_prob(new).flatten(1).mean(dim=1)
        assert (rollout.log_p[0, :, step.i].double() - log_p).abs().max() < 1e-5


def test_formulas_by_hand():
    assert ddpo.log_probability(torch.tensor([[3.0, 1.0]]), torch.tensor([[1.0, 1.0]]), 2.0).item() == pytest.approx(
        (-0.5 + 0) / 2 - np.log(2) - 0.5 * np.log(2 * np.pi)
    )
    ratio = torch.tensor([0.5, 0.95, 1.5, 0.5, 1.05, 1.5])
    gain = torch.tensor([1.0, 1.0, 1.0, -2.0, -2.0, -2.0])
    # Beyond the clip nothing more is won: -A min(ratio, 1.1) where A > 0, -A max(ratio, 0.9) where A < 0.
    wanted = torch.tensor([-0.5, -0.95, -1.1, 1.8, 2.1, 3.0])
    torch.testing.assert_close(ddpo.clipped(ratio, gain, 0.1), wanted)
    x, y = torch.randn(2, 5, 1, 1, 3).double()
    divergence = torch.distributions.kl_divergence(
        torch.distributions.Normal(x, 0.3), torch.distributions.Normal(y, 0.3)
    )
    torch.testing.assert_close(ddpo.divergence(x, y, 0.3), divergence.flatten(1).mean(dim=1))


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_first_update_has_ratios_of_exactly_one(place, tmp_path, family):
    """In passes of two pictures, of two updates the first; in the second the weights have moved."""
    task = method(options(place, tmp_path, family, updates=2, batch=4, accumulate=2))
    seen, of_step = [], task.of_step

    def spy(words, x, new, before, *rest):
        with torch.no_grad():
            mean, std = ddpo.mean_std(x, task.denoiser(words)(x, rest[-1]), rest[-1])
        seen.append((ddpo.log_probability(new, mean, std) - before).exp())
        return of_step(words, x, new, before, *rest)

    task.of_step = spy
    state = State(task, task.options, Ranks())
    first = state.take(0, 1e-2)
    assert len(task.noisy) == {"sd1": 2, "sdxl": 1}[family]  # XL's last step goes to no noise at all
    assert len(seen) == 2 * len(task.noisy) and all((ratio == 1).all() for ratio in seen)
    assert first["ratio"] == 1 and first["clipped"] == 0 and first["moved"] == 0
    second = state.take(1, 1e-2)
    assert second["ratio"] != 1 and second["clipped"] > 0.5


@pytest.mark.parametrize("adapter", ["lora", "none"])
def test_gradient_is_that_of_the_objective(place, tmp_path, adapter):
    """Of the third update, half of the ratios clipped, with the KL: one autograd over all steps, DDIM and loss written out."""
    o = options(place, tmp_path, updates=3, batch=4, kl=2.0, adapter=adapter, lr=1e-3, clip_advantage=0.5)
    task = method(o)
    state = updated(task, 2)
    rollout, words = task.rollouts[range(4)], task.words(0, range(8, 12))
    told = task.context([""] * 4 + words).context
    advantage = task.memory.advantages[8:12].clamp(-0.5, 0.5)
    assert (task.memory.advantages[8:12].abs() > 0.5).any()
    table = alpha_bars(task.pipe.scheduler)

    def mean_of(x, step):
        out = task.pipe.unet(torch.cat([x, x]), torch.full((8,), step.t), told)
        negative, positive = out.chunk(2)
        eps = negative + 3.0 * (positive - negative)
        a, b = step.alpha_bar, float(table[max(int(step.t) - 1000 // 2, 0)])
        x0 = (x - (1 - a) ** 0.5 * eps) / a**0.5
        return b**0.5 * x0 + (1 - b - step.std**2) ** 0.5 * eps

    ratios, distances = [], []
    for step in task.steps:
        x, new = rollout.x[2, :, step.i], rollout.x[2, :, step.i + 1]
        mean = mean_of(x, step)
        with torch.no_grad(), task.untuned():
            base = mean_of(x, step)
        log_p = (-((new - mean) ** 2) / (2 * step.std**2)).mean(dim=(1, 2, 3)) - np.log(step.std * (2 * np.pi) ** 0.5)
        ratios.append((log_p - rollout.log_p[2, :, step.i]).exp())
        distances.append(((mean - base) ** 2).mean(dim=(1, 2, 3)) / (2 * step.std**2))
    ratio, distance = torch.stack(ratios), torch.stack(distances)
    moved = (ratio - 1).abs().flatten().sort().values
    clip = moved[3:5].mean().item()  # four of the eight
    surrogate = torch.minimum(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage)
    total = (-surrogate + 2.0 * distance).mean()
    total.backward()
    wanted = {name: p.grad for name, p in state.trained.items()}
    for p in state.trained.values():
        p.grad = None

    task.options = replace(o, clip_ratio=clip)
    figures = state.gradients(2)
    assert (
        figures["clipped"] == 0.5
        and figures["kl"] == pytest.approx(distance.mean().item(), rel=1e-3)
        and figures["kl"] > 0
    )
    assert figures["loss"] == pytest.approx(total.item(), abs=1e-5)
    length = torch.cat([grad.flatten() for grad in wanted.values()]).norm()
    apart = torch.cat([(p.grad - wanted[name]).flatten() for name, p in state.trained.items()]).norm()
    assert apart < 1e-4 * length


def test_passes_do_not_change_the_gradient(place, tmp_path):
    """One pass of two pictures, and two of one; the steps learnt from are the same in both."""
    found = []
    for accumulate in (1, 2):
        task = method(options(place, tmp_path / str(accumulate), accumulate=accumulate, fraction=0.6))
        state = State(task, task.options, Ranks())
        state.gradients(0)
        found.append(torch.cat([p.grad.flatten() for p in state.trained.values()]))
        learnt = task.chosen(Part(5, 0, 2, range(1)))
        assert len(learnt) == 1 and learnt == task.chosen(Part(5, 0, 2, range(1, 2)))
    assert (found[0] - found[1]).norm() < 1e-3 * found[0].norm()


def test_steps_without_noise_are_left_out(place, tmp_path):
    """A last step that goes to no noise at all draws none; nothing is learnt from it, and of one step alone nothing at all."""
    task = method(options(place, tmp_path, "sdxl", draw_steps=3))
    assert [step.std > 0 for step in task.steps] == [True, True, False] and len(task.noisy) == 2
    first = State(task, task.options, Ranks()).take(0, 1e-2)
    assert first["ratio"] == 1 and np.isfinite(first["loss"]) and torch.isfinite(task.rollouts[range(2)].log_p).all()
    with pytest.raises(ConfigError, match="--draw-steps 1: no step draws noise"):
        DDPO(replace(task.options, draw_steps=1), task.pipe)
    early = DDPO(replace(task.options, until=0.34), task.pipe)
    assert early.noisy == task.steps[:1]


# -------------------------------------------------------------------------------------------------------------------- advantages


def test_tracker_is_a_queue_a_prompt():
    """Against deques and numpy, through wrapping rings, prompts seen too seldom, and equal rewards."""
    rng = np.random.default_rng(0)
    tracker = ddpo.Tracker(prompts=4, size=5, least=3)
    queues = [deque(maxlen=5) for _ in range(4)]
    for _ in range(12):
        which = rng.integers(0, 4, 6).tolist()
        rewards = rng.normal(3, 2, 6).round(1)
        for prompt, reward in zip(which, rewards, strict=True):
            queues[prompt].append(reward)
        pools = [queues[prompt] if len(queues[prompt]) >= 3 else rewards for prompt in which]
        wanted = [(r - np.mean(pool)) / (np.std(pool) + 1e-6) for r, pool in zip(rewards, pools, strict=True)]
        found = tracker.advantages(which, torch.tensor(rewards))
        np.testing.assert_allclose(found.numpy(), wanted, rtol=1e-6, atol=1e-6)
    assert (ddpo.Tracker(1, 4, 1).advantages([0, 0], torch.ones(2)) == 0).all()


def test_an_epoch_asks_once_and_learns_from_its_own_rewards(place, tmp_path):
    """What is kept of an epoch is what the reward said of its pictures, prompt by prompt; `repeat` puts prompts in a row."""
    (asked := place / "red.asked").unlink(missing_ok=True)
    task = method(options(place, tmp_path, batch=4, updates=2, inner=2, repeat=2, tracked=8))
    updated(task, 4)
    assert asked.read_text().split() == ["4", "4"]
    which = [task.prompt_of(0, picture) for picture in range(8)]
    assert which[::2] == which[1::2] and len(set(which)) > 1
    rollout = task.rollouts[range(4)]
    seen = task.pictures(rollout.x[:, :, -1].flatten(0, 1))
    rewards = seen[:, 0].mean(dim=(1, 2)) - seen[:, 2].mean(dim=(1, 2))
    torch.testing.assert_close(rewards, task.memory.rewards, rtol=1e-5, atol=1e-7)
    tracker = ddpo.Tracker(3, 8, 2)
    assert torch.equal(tracker.advantages(which, task.memory.rewards), task.memory.advantages)
    orders = [torch.stack([task.turn(0, k) for k in range(i, i + 2)]) for i in (0, 2)]
    assert torch.equal(orders[0], torch.tensor([[0] * 4, [1] * 4]))
    later = [torch.stack([task.turn(epoch, k) for k in (2, 3)]) for epoch in range(8)]
    assert sum(not torch.equal(order, orders[0]) for order in later) > 4  # one in 16 is in order by chance
    assert torch.equal(orders[1].sort(dim=0).values, orders[0])  # every picture once
    updated_again = task.memory.epoch.item()
    task.begin_epoch(1)
    assert (updated_again, task.memory.epoch.item()) == (0, 1) and asked.read_text().split() == ["4"] * 4
    assert not torch.equal(task.rollouts[range(4)].x, rollout.x)


# ------------------------------------------------------------------------------------------------------------------ exact resume


@pytest.mark.parametrize("adapter, dies", [("lora", 2), ("lora", 3), ("none", 1)])
def test_a_cut_run_resumes_to_the_same_bits(place, tmp_path, adapter, dies):
    """Cut at an epoch's end and within it: weights, tracker, rewards; within an epoch the reward is not asked again."""

    def o(name, **changes):
        return options(place, tmp_path / name, updates=2, inner=1, steps=4, adapter=adapter, accumulate=2, **changes)

    assert loop.run(method(o("whole")), o("whole")) == 0
    with pytest.raises(Cut):
        loop.run(cut_at(method(o("cut")), dies), o("cut"))
    (asked := place / "red.asked").unlink()
    assert loop.run(method(o("cut", resume=True)), o("cut", resume=True)) == 0
    assert len(asked.read_text().split() if asked.exists() else []) == {1: 4, 2: 4, 3: 0}[dies]
    whole, cut = final(tmp_path / "whole"), final(tmp_path / "cut")
    assert any(name.startswith("weights/tracker") for name in whole)
    assert_same_bits(whole, cut)
    lines = [curve(tmp_path / name) for name in ("whole", "cut")]
    assert lines[0] == lines[1] and len(lines[0]) == 4


def curve(out: Path) -> dict[int, tuple[float, ...]]:
    """The figures by step, without the clock."""
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return {e["step"]: (e["reward"], e["reward_std"], e["loss"], e["ratio"]) for e in lines if "reward" in e}


def test_two_processes_learn_as_one(place, tmp_path):
    """torchrun: either draws half of the pictures; advantages and weights are those of one process with two passes."""
    o = options(place, tmp_path / "one", updates=2, steps=3, accumulate=2)
    assert loop.run(method(o), o) == 0
    words = ["--out", str(tmp_path / "two"), "--updates", "2", "--steps", "3"]
    same = "model device prompts reward draw_steps guidance batch rank lr seed threads tracked least save_every"
    for name in same.split():
        words += ["--" + name.replace("_", "-"), str(getattr(o, name))]
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "sdcore"]
    done = subprocess.run([*run, "train", "ddpo", *words], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    one, two = final(tmp_path / "one"), final(tmp_path / "two")
    assert one.keys() == two.keys()
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=1e-5, atol=1e-7)


# ------------------------------------------------------------------------------------------------------------------------ guards


def test_guards_see_what_the_reward_does_not(place, tmp_path):
    o = options(
        place,
        tmp_path,
        watch=str(place / "prompts.txt"),
        watch_pictures=2,
        watch_reward="compressibility",
        eval_every=2,
    )
    task = method(o)
    assert sorted(task.guards.prompts) == sorted(2 * PROMPTS) and task.guards.prompts[::2] == task.guards.prompts[1::2]
    fresh = task.evaluate(0, tmp_path)
    assert fresh["diversity"] == 1 and fresh["distance"] == 0 and task.ended is None
    assert fresh["held_out"] == task.guards.base["held_out"] and fresh["other"] == task.guards.base["other"] < 0
    updated(task, 3)
    tuned = task.evaluate(2, tmp_path)
    assert tuned["distance"] > 0 and tuned["held_out"] != fresh["held_out"] and tuned["diversity"] != 1
    with task.untuned():
        assert task.evaluate(4, tmp_path) == fresh
    assert Image.open(tmp_path / "samples/step-00000002.png").size == (3 * 64 + 2 * 4, 2 * 64 + 4)
    assert Image.open(tmp_path / "curves.png").width == 5 * 300
    # Diversity by its definition, in numpy: root mean square distances of all pairs of a prompt.
    x = torch.rand(6, 2, 3)
    pairs = [np.sqrt(((x[i] - x[j]) ** 2).mean()) for i, j in ((0, 1), (0, 2), (1, 2), (3, 4), (3, 5), (4, 5))]
    assert guards.spread(x, 3) == pytest.approx(np.mean(pairs), rel=1e-6)


def test_a_rule_ends_the_run(place, tmp_path):
    """At the evaluation where it holds: saved, exported, and said in the log."""
    o = options(
        place, tmp_path / "run", steps=9, watch=str(place / "prompts.txt"), watch_pictures=2, eval_every=2, save_every=100,
        stop=("diversity<0.01", "distance > 0.0"),
    )  # fmt: skip
    assert loop.run(method(o), o) == 0
    last = json.loads((tmp_path / "run/log.jsonl").read_text().splitlines()[-1])
    assert last["event"] == "complete" and last["step"] == 2 and last["ended"].startswith("distance > 0.0: distance is")
    assert (tmp_path / "run/run.safetensors").exists() and (tmp_path / "run/checkpoints/step-00000002").exists()
    with pytest.raises(ConfigError, match="--stop other<9: other is not watched here"):
        method(replace(o, stop=("other<9",)))
    with pytest.raises(ConfigError, match="--stop diversity<2: diversity is 1, of the untuned model already"):
        method(replace(o, stop=("diversity<2",)))
    assert guards.broken(("held_out>1", "diversity<0.5"), {"held_out": 1.0, "diversity": 0.5}) is None


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"stop": ("diversity<0.5",)}, "--stop: rules are on the guards' figures"),
        ({"stop": ("beauty<1",), "watch": "x", "eval_every": 1}, "--stop beauty<1: expected FIGURE<NUMBER"),
        ({"adapter": "some"}, "--adapter: expected lora or none"),
        ({"adapter": "none", "text_encoder": True}, "--text-encoder: .* leave out --adapter none"),
        ({"shard": True}, "--shard: a network in pieces cannot draw"),
        ({"precision": "fp16"}, "--precision fp16: .* take bf16"),
        ({"watch": "held-out:two", "eval_every": 1, "watch_pictures": 1}, "--watch-pictures 1: .* two at least"),
        ({"least": 9}, "--least 9: only --tracked 4"),
        ({"updates": 0}, "--updates 0: expected a number from 1"),
        ({"fraction": 0.0}, "--fraction 0.0, --until 1.0: expected shares above 0"),
    ],
)
def test_options_without_meaning_are_refused(place, tmp_path, pipes, changes, message):
    with pytest.raises(ConfigError, match=message):
        DDPO(options(place, tmp_path, **changes), copy.deepcopy(pipes("sd1")))


def test_a_model_that_needs_more_than_a_prompt_is_refused(tmp_path, pipes, place):
    with pytest.raises(ConfigError, match="does not draw from a prompt alone"):
        DDPO(options(place, tmp_path), pipes("sd1-inpaint"))


def test_a_reward_that_fails_stops_the_run(place, tmp_path):
    (tmp_path / "bad.py").write_text(
        "def reward(pictures, prompts):\n    return pictures.mean(dim=(1, 2, 3)) * float('nan')\n"
    )
    o = options(place, tmp_path / "run", reward=str(tmp_path / "bad.py"))
    with pytest.raises(TrainingError, match="gave nan for 2 of 2 pictures"):
        loop.run(method(o), o)
    assert len(list((tmp_path / "run/rewards-failed").glob("*.png"))) == 2


@pytest.mark.parametrize("preset", sorted(ddpo.PRESETS))
def test_presets_can_be_read(preset):
    o = parse(DDPOOptions, ["--preset", preset], prog="x", presets=ddpo.PRESETS)
    guards.check(o.stop)
    assert policy.read_prompts(o.prompts, 3, 0) and policy.read_prompts(o.watch, 3, 0)
    assert o.batch * o.updates in (256, 288) or o.reward == "people"


@pytest.mark.check
def test_an_update_at_the_size_of_sd15(tmp_path):
    """LoRA of rank 4, 128 pixels, two steps with guidance, on random weights; memory is printed (pytest -s)."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.real_ddpo", tmp_path], capture_output=True, text=True, timeout=3600
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    print(found)
    assert found["ratio"] == 1 and 0 < found["norm"] < np.inf and found["trained"] == 797_184
    assert found["peak_GiB"] < 8
