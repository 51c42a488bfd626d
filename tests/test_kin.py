"""The bundled model's kin: what they start from, what they are shown, and that a few steps of each come out as its family."""

import json
from dataclasses import replace
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from sdcore.train import checker, kin, kin_lessons, loop, report, world
from sdcore.train.kin_lessons import (
    LESSONS,
    KinOptions,
    drawn,
    example,
    lesson,
    looked_at,
    maps,
    masks,
    small,
    unit,
    widened,
)
from sdcore.train.task import Part
from sdcore.weights.ip_adapters import load_image_encoder, load_ip_adapter

import sdcore
from sdcore.clip import variation_context
from sdcore.errors import ConfigError
from sdcore.guidance import Guidance
from sdcore.ip_adapter import ImagePrompt
from sdcore.voices import Conditions

ROOT = Path(__file__).parents[1]
FAMILIES = {
    "inpaint": ("sd2-inpaint", 9, "StableDiffusionInpaintPipeline"),
    "depth": ("sd2-depth", 5, "StableDiffusionDepth2ImgPipeline"),
    "instruct": ("ip2p", 8, "StableDiffusionInstructPix2PixPipeline"),
    "upscale": ("x4", 7, "StableDiffusionUpscalePipeline"),
    "refiner": ("sd2", 4, "StableDiffusionPipeline"), "variations": ("sd2", 4, "StableDiffusionPipeline"),
}  # fmt: skip
SHORT = {"steps": 2, "sampler": "ddim", "guidance": 3.0}


@pytest.fixture(scope="module")
def pipe():
    return sdcore.load("tiny", device="cpu", dtype=torch.float32)


@pytest.fixture(scope="module")
def eye(tmp_path_factory):
    """The folder of an eye that has learned nothing."""
    out = tmp_path_factory.mktemp("eye")
    lesson(options("eye", "", out)).export(out)
    return out / "image_encoder"


def options(kind: str, eye, out=Path("nowhere"), **changes) -> KinOptions:
    given = dict(
        kind=kind,
        eye=str(eye),
        out=str(out),
        examples=8,
        batch=4,
        steps=6,
        warmup=0,
        cooldown=0,
        ema=0.0,
        threads=1,
        seed=3,
    )
    return KinOptions(**given | changes)


@pytest.fixture(scope="module")
def learned(eye, tmp_path_factory):
    """Kind -> a task that has made six steps, the losses before and after them, and its folder. Made once."""
    made = {}

    def get(kind: str):
        if kind not in made:
            out = tmp_path_factory.mktemp(kind)
            task = lesson(options(kind, eye, out, seed=3))
            before = losses(task)
            assert loop.run(task, task.options) == 0
            made[kind] = task, before, losses(task), out
        return made[kind]

    return get


@torch.no_grad()
def losses(task) -> float:
    """The loss of parts that training does not draw, summed over a few."""
    return sum(task.loss(Part(9, step, 8, range(8))).mean.item() for step in range(2))


# ------------------------------------------------------------------------------------------------- what they start from


@pytest.mark.parametrize("kind", ["inpaint", "depth", "instruct", "upscale"])
def test_a_widened_unet_is_the_one_it_was(pipe, kind):
    """Where there is nothing in the further channels, and where there is something: at first the weights are zero."""
    config = replace(pipe.unet.config, **LESSONS[kind].sizes)
    wide, g = widened(pipe.unet, config), torch.Generator().manual_seed(0)
    x, context = torch.randn(2, 4, 8, 8, generator=g), torch.randn(2, 5, 128, generator=g)
    more, t = torch.randn(2, config.in_channels - 4, 8, 8, generator=g), torch.tensor([20, 700])
    labels = torch.tensor([20, 300]) if config.class_embeddings else None
    with torch.no_grad():
        was, empty = pipe.unet(x, t, context), wide(torch.cat([x, 0 * more], 1), t, context, labels=labels)
        full = wide(torch.cat([x, more], 1), t, context, labels=labels)
    assert config.in_channels == FAMILIES[kind][1] and not wide.conv_in.weight[:, 4:].any()
    if config.linear_projection:
        assert torch.equal(was, empty) and torch.equal(was, full)
    else:  # 1 x 1 convolutions add up the same products in another order
        torch.testing.assert_close(empty, was, rtol=1e-4, atol=1e-5)
        assert torch.equal(empty, full)


# ------------------------------------------------------------------------------------------------- what they are shown


@pytest.mark.parametrize("kind", LESSONS)
def test_training_never_shows_what_is_judged(kind):
    make = LESSONS[kind].make
    shown, asked = (
        [example(make, np.random.default_rng([1, i]), unseen) for i in range(80)] for unseen in (False, True)
    )
    assert not any(world.held_out(scene) for one in shown for scene in (one.scene, one.before or one.scene))
    assert all(world.held_out(one.scene) for one in asked)
    again = [example(make, np.random.default_rng([1, i])) for i in range(80)]
    assert [(one.scene, one.words) for one in shown] == [(one.scene, one.words) for one in again]


def test_an_instruction_asks_for_what_changes_and_nothing_else():
    seen = set()
    for i in range(300):
        one = example(kin_lessons.instructed, np.random.default_rng([2, i]))
        assert one.before is not None and checker.matches(one.scene, one.scene)["count"]
        wrong = [key for key, good in checker.compare(one.before, one.scene).items() if not good]
        assert wrong == [one.asked]
        pairs = zip(one.before.things, one.scene.things, strict=True)
        assert [a != b for a, b in pairs].count(True) == (one.asked != "background")
        seen.add(one.asked)
        value = one.scene.background if one.asked == "background" else getattr(one.scene.things[one.place], one.asked)
        named = "background" if one.asked == "background" else one.before.things[one.place].shape
        assert one.words.split()[:3] == ["make", "the", named] and one.words.split()[-1] == value
        assert one.asked == "background" or [t.shape for t in one.before.things].count(named) == 1
    assert seen == set(kin_lessons.CHANGES)


def test_masks_cover_a_thing_and_depth_is_nearest_where_things_are_large():
    around = 0
    for i in range(60):
        one = example(kin_lessons.masked, np.random.default_rng([3, i]))
        thing, (mask,) = one.scene.things[one.place], masks([one])[:, 0].numpy()
        with_it = world.coverage(
            world.OUTLINES[thing.shape](world.PIXELS[None] - thing.x, world.PIXELS[:, None] - thing.y, thing.r)
        )
        around += bool((mask[with_it > 0] == 1).all())
        assert 0 < mask.mean() < 1 and set(np.unique(mask)) == {0, 1}
    assert 40 <= around  # three in four, and some by chance
    things = (
        world.Thing("circle", "red", "small", "plain", 16, 32, 8.5),
        world.Thing("square", "blue", "large", "plain", 48, 32, 12.5),
    )
    near = maps([kin_lessons.Example(world.Scene(things), "")])[0, 0]
    assert near[32, 16] == 8.5 and near[32, 48] == 12.5 and near[4, 4] == 0


def test_guidance_towards_words_and_picture_is_learned_from_examples_without(learned):
    """Of dropped examples a third lacks the words, a third the picture, a third both; the others lack nothing."""
    task, *_ = learned("instruct")
    rows, luck = torch.tensor([0, 1, 2, 3]), torch.tensor([0.02, 0.07, 0.12, 0.5])
    seen = []
    unet, task.unet = task.unet, lambda x, t, context: seen.append(x)
    task.network(rows, luck, [])(torch.zeros(4, 4, 8, 8), None, None)
    task.unet = unet
    assert [bool(x[4:].any()) for x in seen[0]] == [True, False, False, True]
    assert torch.equal(seen[0][3, 4:], task.beside[3])
    told, empty = task.context(rows, luck), task.pipe.text_encoders[0](task.pipe.tokenizers[0]([""])).last
    assert [torch.equal(one, empty[0]) for one in told] == [True, True, False, False]


def test_the_upscaler_is_told_how_much_noise_there_is(learned):
    """What is added to the small pictures, over what its level says, is standard normal."""
    task, *_ = learned("upscale")
    rows, seen = torch.arange(8).repeat(16), []
    unet, task.unet = task.unet, lambda x, t, context, labels: seen.append((x, labels))
    task.network(rows, rows * 0.0, [torch.Generator().manual_seed(i) for i in range(len(rows))])(
        torch.zeros(128, 4, 8, 8), 0, 0
    )
    task.unet = unet
    ((x, levels),) = seen
    kept = task.alpha_bar[levels][:, None, None, None]
    noise = (x[:, 4:] - kept.sqrt() * small(drawn([task.shown[row].scene for row in rows]))) / (1 - kept).sqrt()
    assert noise.std() == pytest.approx(1, abs=0.02) and noise.mean() == pytest.approx(
        0, abs=0.02
    )  # of 24,576: 4 deviations
    assert noise.std((1, 2, 3)).sub(1).abs().max() < 0.3 and levels.min() < 30 and 320 < levels.max() <= 350


def test_what_looks_hears_the_eye_and_now_and_then_nothing(learned, eye):
    tower, luck, rows = load_image_encoder(eye, "cpu", torch.float32), torch.tensor([0.5, 0.05]), torch.tensor([2, 2])
    for kind in ("variations", "ip-adapter"):
        task, *_ = learned(kind)
        seen, nothing = variation_context(tower, unit(looked_at(task.shown[2:3])))
        heard = []
        if kind == "variations":
            heard = [task.context(rows, luck)]
        else:
            tokens, task.adapter.tokens = task.adapter.tokens, lambda e: (heard.append(e[:, None]), tokens(e))[1]  # noqa: B023
            task.network(rows, luck, [])
            del task.adapter.tokens
        torch.testing.assert_close(heard[0], torch.cat([seen, nothing]), rtol=1e-4, atol=1e-5)


def test_what_lies_beside_the_latent_is_what_a_user_hands_in(learned, pipe):
    """The channels that training shows are those that a call of the pipeline makes of the same pictures."""
    for kind, given in {
        "depth": lambda one: {"depth": maps([one])},
        "instruct": lambda one: {"image": looked_at([one])},
        "inpaint": lambda one: {"image": drawn([one.scene]), "mask": masks([one])},
    }.items():
        task, _, _, out = learned(kind)
        model = sdcore.load(out / "model", device="cpu", dtype=torch.float32)
        one, found = task.shown[1], []
        model.unet.step = lambda x, *rest, found=found: (found.append(x), x[:, :4])[1]
        model("a red circle", seed=task.options.seed + 1, **SHORT | {"guidance": 1.0}, **given(one))
        apart = (found[0][-1:, 4:] - task.beside[1:2]).abs()
        if (
            kind == "inpaint"
        ):  # each a draw from what the encoder says, by other random numbers: 8 deviations, for two of them
            with torch.no_grad():
                spread = pipe.vae.encode(drawn([one.scene]) * (1 - masks([one]))).logvar.div(2).exp()
            apart[:, 1:] -= 8 * spread
        assert apart.max() <= 1e-4, kind


# ------------------------------------------------------------------------------------------------- a few steps, and the result


@pytest.mark.parametrize("kind", sorted(LESSONS.keys() - {"refiner"}))  # which goes on where training had ended
def test_a_few_steps_lower_the_loss(learned, kind):
    _, before, after, _ = learned(kind)
    assert after < before


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_kin_is_a_folder_of_its_family(learned, pipe, kind):
    """It loads as what it is, here and at diffusers', and draws with its family's arguments; the rest is as it was."""
    task, _, _, out = learned(kind)
    family, channels, name = FAMILIES[kind]
    model = sdcore.load(out / "model", device="cpu", dtype=torch.float32)
    assert (model.family, model.unet.config.in_channels) == (family, channels)
    assert json.loads((out / "model/model_index.json").read_text())["_class_name"] == name
    for part in ("vae", "text_encoder"):
        for file in (ROOT / "weights/tiny" / part).glob("*.safetensors"):
            assert file.read_bytes() == (out / "model" / part / file.name).read_bytes()
    with torch.no_grad():
        trained = {key: value.half().float() for key, value in task.unet.state_dict().items()}
    assert all(torch.equal(value, trained[key]) for key, value in model.unet.state_dict().items())
    assert not any(
        torch.equal(model.unet.conv_in.weight[:, c], 0 * pipe.unet.conv_in.weight[:, 0]) for c in range(channels)
    )
    theirs = diffusers.UNet2DConditionModel.from_pretrained(out / "model/unet").float()
    assert theirs.config.in_channels == channels

    picture = drawn([task.shown[0].scene])
    given = {
        "inpaint": {"image": picture, "mask": masks(task.shown[:1])}, "depth": {"depth": maps(task.shown[:1])},
        "instruct": {"image": picture}, "upscale": {"image": small(picture)}, "refiner": {"image": picture, "strength": 0.2},
        "variations": {},
    }[kind]  # fmt: skip
    steps = {"steps": 10} if kind == "refiner" else {}
    pixels = kin.draw(model, ["a red circle"], **{**SHORT, **steps, **given})
    assert pixels.shape == (1, 3, 64, 64) and np.isfinite(pixels).all()
    if kind == "inpaint":
        kept = masks(task.shown[:1]).expand(-1, 3, -1, -1) == 0
        assert torch.equal(torch.from_numpy(pixels)[kept], picture[kept])


def test_an_adapter_leaves_the_unet_alone_and_is_a_file_of_its_kind(learned, pipe, eye):
    task, _, _, out = learned("ip-adapter")
    assert all(torch.equal(a, b) for a, b in zip(task.unet.parameters(), pipe.unet.parameters(), strict=True))
    adapter = load_ip_adapter(out / "ip-adapter.safetensors", pipe, eye)
    picture = unit(looked_at(task.shown[:1]))
    with_it, without = (
        kin.draw(pipe, [""], image_prompts=[ImagePrompt(adapter, picture, scale)], **SHORT) for scale in (1.0, 0.0)
    )
    assert np.array_equal(without, kin.draw(pipe, [""], **SHORT)) and not np.array_equal(with_it, without)


def test_a_variation_hears_one_vector(learned, eye):
    """The public call takes it as it is: the same vector said 32 times is the same to an attention."""
    _, _, _, out = learned("variations")
    model, tower = (
        sdcore.load(out / "model", device="cpu", dtype=torch.float32),
        load_image_encoder(eye, "cpu", torch.float32),
    )
    scenes = [example(kin_lessons.told, np.random.default_rng(i)).scene for i in range(2)]
    told = variation_context(tower, unit(drawn(scenes)))
    once, often = (
        kin.draw(model, *(Conditions(one.repeat(1, n, 1), None) for one in told[:1]), **SHORT,
                 negative=Conditions(told[1].repeat(1, n, 1), None)) for n in (1, 32)
    )  # fmt: skip
    assert once.shape == (2, 3, 64, 64) and np.abs(once[0] - once[1]).max() > 1e-3
    np.testing.assert_allclose(once, often, atol=2e-4)


def test_an_instruction_without_guidance_is_the_branch_that_hears_it(learned):
    """The model answers once, for words and picture, where guidance is off; at a scale just above it is nearly that."""
    task, _, _, out = learned("instruct")
    model, picture = sdcore.load(out / "model", device="cpu", dtype=torch.float32), looked_at(task.shown[:2])
    words = [one.words for one in task.shown[:2]]
    off, on, none = (
        kin.draw(model, words, image=picture, **SHORT | {"guidance": scale})
        for scale in (1.0, Guidance(1.0001, image=1.0), 0.0)
    )
    np.testing.assert_allclose(off, on, atol=2e-3)
    assert np.array_equal(off, none) and np.abs(off[0] - off[1]).max() > 0.1


def test_the_eye_is_to_say_what_the_text_encoder_says_at_the_end(eye, pipe):
    task = lesson(options("eye", eye, examples=3))
    words = [world.caption(one.scene) for one in task.shown]
    ids = pipe.tokenizers[0](words)
    ends = (ids == pipe.tokenizers[0]([""])[0, 1]).int().argmax(dim=1)
    with torch.no_grad():
        said = pipe.text_encoders[0](ids).last[torch.arange(3), ends]
        torch.testing.assert_close(task.said, said)
        task.shown, task.said = task.shown[1:2], task.said[1:2]
        found = task.eye.see(unit(drawn([task.shown[0].scene]))).embedding
        assert task.loss(Part(0, 0, 4, range(4))).mean.item() == pytest.approx(
            (found - said[1]).square().mean().item(), rel=1e-4
        )


def test_a_refiner_learns_the_last_fifth_alone(learned):
    task, *_ = learned("refiner")
    t = task.times(4000, torch.Generator().manual_seed(0))
    assert t.min() == 0 and t.max() == 199


# ------------------------------------------------------------------------------------------------- the report


def test_the_measures(pipe):
    """On true pictures, whose truth is known."""
    shown = [example(kin_lessons.instructed, np.random.default_rng([5, i])) for i in range(8)]
    scenes, before, after = [one.scene for one in shown], looked_at(shown), drawn([one.scene for one in shown])
    assert kin.right(after.numpy(), scenes) == 1 and kin.right(before.numpy(), scenes) == 0
    asked = [kin.right(before[i : i + 1].numpy(), [one.scene], [one.asked]) for i, one in enumerate(shown)]
    assert asked == [0.0] * 8 and kin.right(before.numpy(), scenes, ["count"]) == 1
    assert kin.chance(after.numpy(), scenes) < 0.2
    assert kin.psnr(after.numpy(), after) == pytest.approx(99, abs=0.01)
    assert kin.psnr(after.numpy() * 0, after * 0 + 0.2) == pytest.approx(20, abs=0.01)
    assert kin.rest(before.numpy(), shown) == 0 and kin.rest(after.numpy(), shown) < 0.01
    assert kin.rest(1 - 0 * after.numpy(), shown) > 5


def test_one_is_replaced_under_its_mask():
    for i in range(20):
        one = kin.replaced(example(kin_lessons.masked, np.random.default_rng([6, i]), True), np.random.default_rng(i))
        was, now = one.before.things[one.place], one.scene.things[one.place]
        assert was.colour != now.colour and was.shape != now.shape
        apart = np.abs(world.draw(one.before) - world.draw(one.scene)).max(0)
        assert apart[one.mask == 0].max() < 0.02  # a shadow's last breath reaches a little further


def test_an_entry_is_made_once_and_reported(tmp_path, monkeypatch, capsys):
    words = ["--only", "depth", "--steps", "2", "--prompts", "2", "--threads", "1", "--out", str(tmp_path / "runs")]
    monkeypatch.setattr(KinOptions, "__init__", small_options(KinOptions.__init__))
    assert kin.main(words) == 0
    assert "edges followed" in capsys.readouterr().out
    folder = tmp_path / "runs/depth"
    found = report.load(folder)
    assert found.processor > 0 and found.commands == ("python -m sdcore.train.kin --only depth",)
    monkeypatch.setattr(
        kin, "lesson", None
    )  # not called again, neither for what is there nor for a judgement that was lost
    (folder / "result.json").unlink()
    assert kin.main(words) == 0 == kin.main(words)
    assert report.load(folder) == found
    report.record([(found, folder)], tmp_path / "docs", "kin.md", kin.ABOUT, "kin")
    text = (tmp_path / "docs/reports/kin.md").read_text()
    assert "# The bundled model's kin" in text and "](../kin-depth-drawn.png)" in text
    assert (tmp_path / "docs/kin-depth-drawn.png").exists()
    with pytest.raises(ConfigError, match="--only widht: expected some of instruct, depth"):
        kin.main(["--only", "widht"])


def small_options(init):
    """KinOptions with few examples."""
    return lambda self, **given: init(self, **given | {"examples": 4, "batch": 2})


def test_an_unknown_kind_is_refused():
    with pytest.raises(ConfigError, match="--kind: expected one of instruct, depth"):
        lesson(KinOptions(kind="depht"))
