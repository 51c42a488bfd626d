"""The eye: what it is shown and told, what its reward is, that it learns in seconds, that bad files are refused."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from sdcore.train import aligned, chapter, eye, loop, report, rewards, world
from sdcore.train.ranks import Ranks
from sdcore.train.state import State
from sdcore.weights import files

import sdcore
from sdcore.errors import CheckpointError, ConfigError


def named(row: torch.Tensor) -> list[list[int]]:
    """The classes that have a share in one row [k], by attribute."""
    return [part.nonzero()[:, 0].tolist() for part in row.split(eye.CLASSES)]


@pytest.fixture
def file(tmp_path):
    torch.manual_seed(0)
    files.write(tmp_path / "eye.safetensors", eye.Eye().state_dict())
    return tmp_path / "eye.safetensors"


def pictures(n: int) -> tuple[torch.Tensor, list[str]]:
    rng = np.random.default_rng(3)
    scenes = [world.training_scene(rng, 2) for _ in range(n)]
    return eye.shown(scenes)[0], [world.caption(one) for one in scenes]


# ----------------------------------------------------------------------------------------------------------- what there is to say


def test_what_a_caption_says():
    """In reading order, whichever end it begins at; what is not said has no share, the number of things always has."""
    shapes, colours = list(world.SHAPES), list(world.COLOURS)
    (row,) = eye.said(["a small red circle below a dotted blue star on grey"])
    assert torch.equal(row, eye.said(["a heart", "a small red circle below a dotted blue star on grey"])[1])
    star = [[1], [1 + shapes.index("star")], [1 + colours.index("blue")], [], [3]]
    circle = [[1], [1 + shapes.index("circle")], [1 + colours.index("red")], [1], []]
    assert named(row) == [*star, *circle, [2], [1 + list(world.BACKGROUNDS).index("grey")], [1]]
    (row,) = eye.said(["a heart"])
    assert named(row) == [[1], [1 + shapes.index("heart")], [], [], [], [0], [], [], [], [], [], [], [1]]


def test_scenes_are_shown_as_they_are():
    rng = np.random.default_rng(0)
    scenes = [eye.scene(rng) for _ in range(200)]
    assert not any(world.held_out(one) for one in scenes)
    assert 0.65 < np.mean([len(one.things) == 2 for one in scenes]) < 0.85
    moved = [any(t.x % 8 or t.y % 8 for t in one.things) for one in scenes]
    assert 0.25 < np.mean(moved) < 0.55
    drawn, truths = eye.shown(scenes[:5])
    assert torch.equal(drawn * 2 - 1, torch.from_numpy(world.draw_batch(scenes[:5]) / 2 + 0.5) * 2 - 1)
    assert torch.equal(truths, eye.said([world.caption(one) for one in scenes[:5]]))


def test_an_altered_scene_stays_in_its_place_and_shows_nothing_held_out():
    rng = np.random.default_rng(1)
    changed = []
    for _ in range(60):
        before = eye.scene(rng)
        after = eye.altered(before, rng)
        assert not world.held_out(after) and after.relation == before.relation
        for a, b in zip(before.things, after.things, strict=True):
            assert (a.x, a.y) == (b.x, b.y) and b.r == world.SIZES[b.size]
            changed += [getattr(a, name) != getattr(b, name) for name in eye.THING]
    assert 0.1 < np.mean(changed) < 0.4


def test_a_spoiled_picture_has_a_thing_too_many_and_nothing_else_to_say():
    rng = np.random.default_rng(2)
    scenes = [world.training_scene(rng, 2) for _ in range(200)]
    found = [eye.doubled(one, rng) for one in scenes]
    same = 0
    for before, after in zip(scenes, found, strict=True):
        (extra,) = [thing for thing in after.things if not any(thing is old for old in before.things)]
        away = min((abs(extra.x - t.x), abs(extra.y - t.y)) for t in before.things)
        assert max(away) in (8, 16) and len(after.things) == 3
        same += any(replace(extra, x=t.x, y=t.y) == t for t in before.things)
    assert 80 < same < 160
    assert {named(row)[-1][0] for row in eye.shown(found)[1]} == {0}
    assert (eye.shown(found)[1].sum(1) == 1).all() and (eye.shown(scenes)[1].split(eye.CLASSES, 1)[-1][:, 1] == 1).all()
    some = [eye.spoiled(scenes[0], rng) for _ in range(200)]
    assert 0.2 < np.mean([one is not None for one in some]) < 0.4
    assert not any(eye.spoiled(world.training_scene(rng, 1), rng) for _ in range(40))


def test_worn_pictures_are_labelled_by_their_shares(monkeypatch):
    """Without noise, of two scenes a share each: the latents' mixture, decoded, and the same mixture of what they show."""
    monkeypatch.setattr(eye, "NOISE", 0.0)
    monkeypatch.setattr(eye, "MIXED", 1.0)
    pipe = sdcore.load("tiny", device="cpu", dtype=torch.float32)
    drawn, truths = eye.worn(pipe, 4, seed=5)
    rng = np.random.default_rng(5)
    a = [eye.scene(rng) for _ in range(32)]
    b = [eye.spoiled(one, rng) or eye.altered(one, rng) for one in a]
    share, _, _, noisy = torch.rand(4, 32, 1, 1, 1, generator=eye.generator(5))[:, :4]
    (x, of_x), (y, of_y) = eye.shown(a[:4]), eye.shown(b[:4])
    torch.testing.assert_close(truths, of_x + share[:, 0, 0] * (of_y - of_x))
    with torch.no_grad():
        z, other = (pipe.vae.encode(some * 2 - 1).mean for some in (x, y))
        wanted = (pipe.vae.decode(z + share * (other - z)) / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(drawn, wanted, atol=1e-4, rtol=0)
    assert 0.1 < share.min() and share.max() < 0.98  # this seed tells the two scenes apart
    monkeypatch.setattr(eye, "NOISE", 2.0)
    apart = (eye.worn(pipe, 4, seed=5)[0] - drawn).abs().mean(dim=(1, 2, 3))
    assert ((apart > 1e-3) == (noisy.flatten() < 0.7)).all() and (apart > 1e-3).any()  # seven in ten are noisy
    monkeypatch.setattr(eye, "MIXED", 0.0)
    assert (eye.worn(pipe, 4, seed=5)[1] == of_x).all()


# ------------------------------------------------------------------------------------------------------------------- the reward


def test_the_reward_is_the_mean_log_p_of_what_is_demanded(file, tmp_path):
    """Against the definition in fp64; its gradient against differences in fp64."""
    reward = rewards.make(f"eye:{file}", tmp_path)
    assert reward.differentiable and reward.identity()[1] == loop.sha256(file)
    x, texts = pictures(3)
    texts[1], texts[2] = "a red circle left of a blue star", "a heart"
    net = eye.Eye().double()
    net.load_state_dict(files.read(file).tensors)

    def wanted(x):
        found = []
        for parts, row in zip(zip(*net(x).split(eye.CLASSES, 1), strict=True), eye.said(texts), strict=True):
            p = [part.exp() / part.exp().sum() for part in parts]
            found.append(torch.stack([p[a][c].log() for a, one in enumerate(named(row)) for c in one]).mean())
        return torch.stack(found)

    exact = wanted(x.double())
    torch.testing.assert_close(reward(x, texts), exact.float(), atol=1e-5, rtol=1e-5)
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(reward(x, texts).sum(), x)
    way = torch.randn(x.shape, generator=torch.Generator().manual_seed(0)).double()
    with torch.no_grad():
        slope = (wanted(x.double() + 1e-5 * way) - wanted(x.double() - 1e-5 * way)).sum() / 2e-5
    assert (gradient.double() * way).sum().item() == pytest.approx(slope.item(), rel=1e-4)


def test_bad_files_and_pictures_are_refused(file, tmp_path):
    tensors = {name: tensor.clone() for name, tensor in files.read(file).tensors.items()}
    with pytest.raises(ConfigError, match="eye needs files behind a colon"):
        rewards.make("eye", tmp_path)
    with pytest.raises(CheckpointError, match=r"none\.safetensors: no such file"):
        rewards.make(f"eye:{tmp_path}/none.safetensors", tmp_path)
    bias = tensors.pop("say.2.bias")
    files.write(tmp_path / "short.safetensors", tensors)
    with pytest.raises(CheckpointError, match="say.2.bias"):
        rewards.make(f"eye:{tmp_path}/short.safetensors", tmp_path)
    files.write(tmp_path / "wide.safetensors", tensors | {"say.2.bias": torch.zeros(3)})
    with pytest.raises(CheckpointError, match=r"say.2.bias has shape \[3\], expected \[60\]"):
        rewards.make(f"eye:{tmp_path}/wide.safetensors", tmp_path)
    files.write(tmp_path / "nan.safetensors", tensors | {"say.2.bias": bias * float("nan")})
    with pytest.raises(CheckpointError, match="say.2.bias"):
        rewards.make(f"eye:{tmp_path}/nan.safetensors", tmp_path)
    with pytest.raises(ConfigError, match=r"64 pixels square, found \[1, 3, 32, 64\]"):
        rewards.make(f"eye:{file}", tmp_path)(torch.zeros(1, 3, 32, 64), ["a heart"])


# ------------------------------------------------------------------------------------------------------------------ it learns


def options(out, **changes) -> eye.EyeOptions:
    given = dict(
        out=str(out), steps=4, batch=8, worn=32, warmup=0, cooldown=0, ema=0.0, eval_every=0, save_every=2, threads=1
    )
    return eye.EyeOptions(**(given | changes))


@pytest.mark.parametrize("wrong", [{"worn": 0}, {"worn": -3}, {"grain": -0.1}, {"grain": 1.1}, {"grain": float("nan")}])
def test_options_that_cannot_be_are_refused(tmp_path, wrong):
    with pytest.raises(
        ConfigError, match=r"--worn -?\d+, --grain \S+: expected at least one picture, and noise from 0 to 1"
    ):
        eye.TrainEye(options(tmp_path / "x", **wrong))


def test_it_learns_and_a_resumed_run_has_the_same_bits(tmp_path):
    whole = options(tmp_path / "whole", steps=40, batch=32, save_every=20, log_every=1)
    assert loop.run(eye.TrainEye(whole), whole) == 0
    x, texts = pictures(64)
    untrained = tmp_path / "untrained.safetensors"
    torch.manual_seed(0)
    files.write(untrained, eye.Eye().state_dict())
    before, after = (
        rewards.make(f"eye:{path}", tmp_path)(x, texts).mean()
        for path in (untrained, tmp_path / "whole/eye.safetensors")
    )
    assert before < -1.4 and after > before + 0.35
    cut = options(tmp_path / "cut", steps=20, batch=32, save_every=20)
    assert loop.run(eye.TrainEye(cut), cut) == 0
    again = replace(cut, steps=40, resume=True)
    assert loop.run(eye.TrainEye(again), again) == 0
    a, b = (files.read(tmp_path / name / "eye.safetensors").tensors for name in ("whole", "cut"))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_the_loss_is_minus_the_log_p_of_half_fresh_and_half_worn_pictures(tmp_path):
    """Passes do not change the gradient; noise on the pixels does."""
    found = []
    for changes in ({}, {"accumulate": 2}, {"grain": 0.0}):
        task = eye.TrainEye(options(tmp_path / "x", **changes))
        task.prepare(Ranks())
        state = State(task, task.options, Ranks())
        state.gradients(0)
        found.append(torch.cat([p.grad.flatten() for p in state.trained.values()]))
    assert (found[0] - found[1]).norm() < 1e-4 * found[0].norm()
    assert (found[0] - found[2]).norm() > 1e-3 * found[0].norm()


def test_what_it_says_is_judged_by_everything():
    """One wrong attribute of a picture makes it wrong; what is not there is not asked."""

    class Oracle(torch.nn.Module):
        """Says what there is to say; of the second and the third picture, another background."""

        def forward(self, x):
            scores = self.truths.clone()
            backgrounds = scores.split(eye.CLASSES, dim=1)[-2]
            backgrounds[1:3] = backgrounds[1:3].roll(1, dims=1)
            scores[:, sum(eye.CLASSES[:6]) + 1] += (
                0.5  # of the second thing's shape it says something even where there is none
            )
            return scores

    rng = np.random.default_rng(0)
    scenes = [world.training_scene(rng, 1 if i > 6 else 2) for i in range(10)]
    task = eye.TrainEye(options("x"))
    task.eye = Oracle()
    task.eye.truths = eye.shown(scenes)[1]
    assert task.right(scenes) == pytest.approx(0.8)


def test_ranked_is_the_share_of_pairs_in_order():
    assert aligned.ranked(torch.tensor([3.0, 1.0, 2.0, 0.0]), torch.tensor([1.0, 1.0, 0.0, 0.0])) == 0.75


@pytest.mark.check
def test_draft_gains_what_ddpo_gains_from_a_third_of_the_pictures(tmp_path):
    """The entry of `make chapter`, from the beginning, on as many threads as its report: every aim met."""
    assert chapter.main(["--only", "draft", "--out", str(tmp_path), "--threads", "1"]) == 0
    found = report.load(tmp_path / "draft")
    print(report.table([found]))
    assert all(row.met for row in found.rows), [row for row in found.rows if not row.met]
    assert sum(row.aim is not None for row in found.rows) == 3
