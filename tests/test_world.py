"""The world: the same seed draws the same bits, nothing held out or reserved reaches training, and the checker reads right."""

import re

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter
from sdcore.train import checker, world

N = 150  # pictures for each figure: 10 ms each


def scenes(n: int, seed: int, **options) -> list[world.Scene]:
    rng = np.random.default_rng(seed)
    return [world.sample_scene(rng, **options) for _ in range(n)]


def degraded(pictures: np.ndarray, seed: int) -> np.ndarray:
    """Blur of 1.4 pixels and white noise, each some 30 dB below the picture: 27 dB together, like a poor reconstruction."""
    noise = np.random.default_rng(seed).normal(0, np.sqrt(4e-3), pictures.shape)
    return (gaussian_filter(pictures, (0, 0, 1.4, 1.4)) + noise).astype(np.float32)


def right(pictures: np.ndarray, wanted: list[world.Scene]) -> float:
    """The share of pictures in which everything that is wanted is read."""
    verdicts = [checker.matches(checker.read(x), demand) for x, demand in zip(pictures, wanted, strict=True)]
    return float(np.mean([all(verdict.values()) for verdict in verdicts]))


def alike(text: str, scene: world.Scene) -> bool:
    return all(checker.matches(scene, world.parse(text)).values())


def test_same_seed_same_bits():
    def batch(seed: int):
        rng = np.random.default_rng(seed)
        return *world.training_pairs(rng, 20), world.vae_pictures(rng, 20)

    (x, texts, y), (x2, texts2, y2) = batch(3), batch(3)
    assert x.tobytes() == x2.tobytes() and y.tobytes() == y2.tobytes() and texts == texts2
    assert batch(4)[0].tobytes() != x.tobytes()
    assert x.dtype == np.float32 and x.shape == (20, 3, 64, 64) and -1 <= x.min() < x.max() <= 1


def test_another_world_has_another_fingerprint(monkeypatch):
    own = world.fingerprint()
    assert own == world.fingerprint()
    for name, value in (
        ("DARK", 0.42),
        ("SIZES", {"small": 8.5, "large": 12.0}),
        ("OPENINGS", ("there is ",)),
        ("RIM_WIDTH", 2.0),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(world, name, value)
            assert world.fingerprint() != own, name


def test_batch_equals_single():
    some = [*scenes(20, 1), *(world.reserve(s, what) for s in scenes(4, 2) for what in ("subject", "style", "look"))]
    before = [world.draw(scene).tobytes() for scene in some]
    assert [picture.tobytes() for picture in world.draw_batch(some)] == before


def test_things_keep_apart_and_relations_hold():
    for scene in scenes(3000, 5):
        for thing in scene.things:  # room for the shadow and the night's rim, and an empty frame two pixels wide
            assert 2 + thing.r < min(thing.x, thing.y) and max(thing.x, thing.y) + thing.r < world.SIDE - 2
        if scene.relation:
            a, b = scene.things
            offset = np.array([a.x - b.x, a.y - b.y])
            axis = int(np.abs(offset).argmax())
            assert np.sign(offset[axis]) == world.RELATIONS[scene.relation][axis]
            assert abs(offset[axis]) > a.r + b.r + 5 and offset[1 - axis] == 0
        assert all(thing.x % 8 == 0 and thing.y % 8 == 0 for thing in scene.things)  # the lattice of the latents


def test_every_pixel_of_a_thing_is_covered_as_its_shape_says():
    """The antialiased area of each shape against its area counted on a grid 8 times finer."""
    fine = np.arange(-20, 20, 0.125) + 0.0625
    coarse = np.arange(-20, 20) + 0.5
    for name, sdf in world.OUTLINES.items():
        for r in world.SIZES.values():
            true = (sdf(fine[None, :], fine[:, None], r) < 0).sum() / 64
            drawn = world.coverage(sdf(coarse[None, :], coarse[:, None], r)).sum()
            assert abs(drawn - true) < 0.04 * true, name
            outside = np.maximum(abs(fine)[None, :], abs(fine)[:, None]) > 1.06 * r
            assert (sdf(fine[None, :], fine[:, None], r)[outside] > 0).all(), name


def test_training_never_sees_what_is_held_out_or_reserved():
    rng, seen = np.random.default_rng(7), set()
    for _ in range(20_000):
        scene = world.training_scene(rng)
        assert not world.held_out(scene) and scene.style == ""
        for thing in scene.things:
            assert (thing.colour, thing.shape) not in world.HELD_OUT_PAIRS
            assert thing.shape != world.SUBJECT and thing.colour != world.LOOK[0]
            seen |= {thing.colour, thing.shape, thing.size, thing.texture, (thing.colour, thing.shape)}
        seen |= {scene.relation, scene.background}
    for values in (world.COLOURS, world.SHAPES, world.SIZES, world.TEXTURES, world.RELATIONS, world.BACKGROUNDS):
        assert seen.issuperset(values)  # every single value is learned
    pairs = {(colour, shape) for colour in world.COLOURS for shape in world.SHAPES}
    assert pairs - seen == world.HELD_OUT_PAIRS and len(world.HELD_OUT_PAIRS) == len(world.SHAPES)


def test_a_combination_is_held_out_from_either_end():
    two = scenes(2000, 8, count=2)
    assert [world.held_out(scene) for scene in two] == [world.held_out(world.mirrored(scene)) for scene in two]
    pairless = [s for s in two if not any((t.colour, t.shape) in world.HELD_OUT_PAIRS for t in s.things)]
    assert 0.15 < np.mean([world.held_out(scene) for scene in pairless]) < 0.25


def test_held_out_prompts_name_what_was_held_out():
    prompts = world.held_out_prompts(300, 0)
    assert prompts == world.held_out_prompts(300, 0) != world.held_out_prompts(300, 1)
    assert [len(demand.things) for _, demand in prompts] == [1, 2] * 150
    for text, demand in prompts:
        assert world.parse(text) == demand and world.held_out(demand)
        assert all(thing.colour and thing.shape for thing in demand.things)
        assert len(demand.things) == 1 or demand.relation


def test_autoencoder_sees_the_reserved_now_and_then():
    rng = np.random.default_rng(9)
    drawn = [world.vae_scene(rng) for _ in range(4000)]
    share = {what: np.mean([checker.shows(scene, what) for scene in drawn]) for what in ("subject", "style", "look")}
    assert min(share.values()) > 0.02 and 0.10 <= sum(share.values()) <= 0.17
    pure = [scene for scene in drawn if not any(checker.shows(scene, what) for what in share)]
    moved = np.mean([thing.x % 8 != 0 for scene in drawn for thing in scene.things])
    assert 0.28 < moved < 0.38  # off the lattice
    assert len(pure) > 3000 and not any(world.held_out(scene) for scene in pure)


def test_captions_tell_the_truth_in_known_words():
    rng, wordings = np.random.default_rng(10), set()
    for scene in scenes(3000, 11):
        text = world.caption(scene, rng)
        assert set(text.split()) <= set(world.VOCABULARY) and not re.search(r"\ba [aeiou]|\ban [^aeiou]", text)
        assert alike(text, scene), (text, scene)
        wordings.add(text)
    assert len(wordings) > 2500
    words = set(" ".join(wordings).split())
    assert words == set(world.VOCABULARY)


def test_canonical_caption_names_everything():
    for scene in scenes(500, 12):
        said = world.parse(world.caption(scene))
        assert alike(world.caption(scene), scene)
        assert None not in [getattr(t, a) for t in said.things for a in checker.ATTRIBUTES] and said.background
        assert (said.relation is None) == (len(scene.things) == 1)


def test_matches_judges_only_what_is_named():
    scene = world.parse("a small red plain star left of a large blue plain cross on a grey background")
    judged = checker.matches(scene, world.parse("a blue cross right of a large star"))
    assert judged == {"count": True, "shape": True, "colour": True, "size": False, "relation": True}
    assert not all(checker.matches(scene, world.parse("a blue star left of a red cross")).values())
    assert not checker.matches(scene, world.parse("a red star"))["count"]
    assert not checker.matches(world.Scene(()), world.parse("a red star"))["colour"]


def test_checker_reads_truth():
    wanted = scenes(2 * N, 13)
    rate = right(world.draw_batch(wanted), wanted)
    print(f"ground truth: every attribute right in {rate:.1%}")
    assert rate >= 0.995


def test_checker_reads_through_blur_and_noise():
    wanted = scenes(N, 14)
    x = world.draw_batch(wanted)
    y = degraded(x, 0)
    psnr = np.mean(10 * np.log10(4 / ((x - y) ** 2).mean((1, 2, 3))))
    rate = right(y, wanted)
    print(f"{psnr:.1f} dB: every attribute right in {rate:.1%}")
    assert 26.5 < psnr < 27.5 and rate >= 0.97


def test_checker_says_no_to_shuffled_captions():
    """Chance: what a picture of another prompt scores. Here for prompts that name colour and shape alone."""
    wanted = scenes(4 * N, 15, count=1)
    demands = [world.Scene((world.Thing(s.things[0].shape, s.things[0].colour),)) for s in wanted]
    readings = [checker.read(x) for x in world.draw_batch(wanted[:N])]
    chance = np.mean([all(checker.matches(r, d).values()) for i, r in enumerate(readings) for d in demands[i + 1 :: 7]])
    expected = 1 / (len(world.COLOURS) * len(world.SHAPES))
    full = np.mean([all(checker.matches(r, d).values()) for i, r in enumerate(readings) for d in wanted[i + 1 :: 7]])
    print(f"shuffled captions: colour and shape {chance:.1%} (1/42 = {expected:.1%}), everything {full:.2%}")
    assert abs(chance - expected) < 0.01 and full < 0.005


@pytest.mark.parametrize("what", ["subject", "style", "look"])
def test_checker_knows_the_reserved(what):
    plain = scenes(N // 2, 16)
    asked = [world.reserve(scene, what) for scene in plain]
    x = world.draw_batch(asked)
    assert np.mean([checker.shows(checker.read(picture), what) for picture in x]) >= 0.99
    assert np.mean([checker.shows(checker.read(picture), what) for picture in degraded(x, 1)]) >= 0.93
    assert not any(checker.shows(checker.read(picture), what) for picture in world.draw_batch(plain))
    assert right(x, asked) >= 0.98  # the rest of the picture is read as well as ever


def test_checker_survives_anything():
    rng = np.random.default_rng(17)
    flat = [np.full((3, 64, 64), value) for value in (-1, 0, 1, np.nan, np.inf)]
    for picture in (
        *flat,
        rng.normal(size=(3, 64, 64)),
        np.where(rng.random((1, 64, 64)) < 0.5, np.ones((3, 1, 1)), -1),
    ):
        reading = checker.read(picture)
        assert not all(checker.matches(reading, world.parse("a red circle")).values())
