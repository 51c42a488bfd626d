"""Each task equals diffusers' pipeline for it, from the same seed; and what is to stay, stays, bit for bit.

Small random models of tests/tiny_models.py, the official family that has the task: 4, 5, 7, 8 and 9 channels, the refiner.
The seed is what both sides are given: noise is drawn in the same order, so everything else must be equal too. fp32, guidance 3:
pixels within 1/255 (tests/test_pipeline.py says why not more guidance).
"""

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

import sdcore
from sdcore import tasks
from sdcore.errors import ConfigError, ImageError
from sdcore.guidance import Guidance
from sdcore.image import Picture

SIZE = 64


def peer(folder, name: str, **parts):
    """diffusers' pipeline class of that name on a folder."""
    cls = getattr(diffusers, name)
    options = {"add_watermarker": False} if "XL" in name else {"safety_checker": None, "feature_extractor": None}
    if "Depth" in name or "Upscale" in name:
        options = {"depth_estimator": None, "feature_extractor": None} if "Depth" in name else {}
    pipe = cls.from_pretrained(folder, **options, **parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def seeded(*seeds):
    made = [torch.Generator().manual_seed(seed) for seed in seeds]
    return made if len(made) > 1 else made[0]


def picture(side: int = SIZE, seed: int = 0, height: int | None = None) -> Picture:
    """Smooth colours with an edge."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[: height or side, :side] / side
    wave = np.stack([np.sin(6 * x + a) * np.cos(5 * y + b) for a, b in rng.uniform(0, 6, (3, 2))], -1)
    wave[(x - 0.5) ** 2 + (y - 0.4) ** 2 < 0.06] = rng.uniform(-1, 1, 3)
    return Picture(((wave + 1) * 127.5).round().astype(np.uint8))


def half(side: int = SIZE) -> torch.Tensor:
    """A mask: the right half and a spot of the left one."""
    mask = torch.zeros(1, 1, side, side)
    mask[..., side // 2 :] = 1
    mask[..., 8:24, 8:24] = 1
    return mask


def pil_mask(mask: torch.Tensor) -> Image.Image:
    return Image.fromarray((mask[0, 0] * 255).byte().numpy())


def equal(ours, theirs) -> None:
    """Pictures within 1/255."""
    a = np.stack([np.asarray(p, dtype=np.int16) for p in ours])
    b = np.stack([np.asarray(p, dtype=np.int16) for p in theirs])
    assert a.shape == b.shape and np.abs(a - b).max() <= 1, f"{np.abs(a - b).max()}/255"


@pytest.mark.parametrize("strength", [0.3, 0.75, 1.0])
@pytest.mark.parametrize("family, name", [
    ("sd1", "StableDiffusionImg2ImgPipeline"), ("sdxl", "StableDiffusionXLImg2ImgPipeline"),
    ("refiner", "StableDiffusionXLImg2ImgPipeline"),
])  # fmt: skip
def test_image_to_image(folders, pipes, family, name, strength):
    start = picture()
    want = peer(folders(family), name)(
        ["a red circle", "cat"], image=start.pil, strength=strength, num_inference_steps=5, guidance_scale=3.0,
        generator=seeded(1, 2),
    ).images  # fmt: skip
    ours = pipes(family)(["a red circle", "cat"], image=start, strength=strength, steps=5, guidance=3.0, seed=[1, 2])
    equal(ours.images, want)


@pytest.mark.parametrize("strength", [0.6, 1.0])
@pytest.mark.parametrize("family, name", [
    ("sd1", "StableDiffusionInpaintPipeline"), ("sd1-inpaint", "StableDiffusionInpaintPipeline"),
    ("sd2-inpaint", "StableDiffusionInpaintPipeline"), ("sdxl", "StableDiffusionXLInpaintPipeline"),
    ("sdxl-inpaint", "StableDiffusionXLInpaintPipeline"),
])  # fmt: skip
def test_inpainting(folders, pipes, family, name, strength):
    """What is painted equals; around it stands the picture itself, where diffusers has what the decoder made of it."""
    start, mask = picture(), half()
    want = peer(folders(family), name)(
        "a red circle", image=start.pil, mask_image=pil_mask(mask), strength=strength, num_inference_steps=5,
        guidance_scale=3.0, generator=seeded(3), height=SIZE, width=SIZE,
    ).images[0]  # fmt: skip
    pipe = pipes(family)
    ours = pipe("a red circle", image=start, mask=mask, strength=strength, steps=5, guidance=3.0, seed=3)
    got, painted = np.asarray(ours.images[0], dtype=np.int16), mask[0, 0].bool().numpy()
    assert np.abs(got - np.asarray(want, dtype=np.int16))[painted].max() <= 1
    assert np.array_equal(got[~painted], start.pixels[~painted])
    equal(sdcore.image.to_pictures(pipe.decode(ours.latents)), [want])


def test_depth(folders, pipes):
    """depth2img: the map as diffusers takes it, low and high at will."""
    start, near = picture(), torch.rand(1, 1, SIZE, SIZE, generator=seeded(5)) * 7 - 2
    want = peer(folders("sd2-depth"), "StableDiffusionDepth2ImgPipeline")(
        "cat", image=start.pil, depth_map=near[0], strength=0.7, num_inference_steps=5, guidance_scale=3.0,
        generator=seeded(4),
    ).images  # fmt: skip
    ours = pipes("sd2-depth")("cat", image=start, depth=near, strength=0.7, steps=5, guidance=3.0, seed=4)
    equal(ours.images, want)


def test_instructions(folders, pipes):
    """instruct-pix2pix: two guidances, three branches."""
    start = picture()
    want = peer(folders("ip2p"), "StableDiffusionInstructPix2PixPipeline")(
        "a blue circle", image=start.pil, num_inference_steps=5, guidance_scale=3.0, image_guidance_scale=1.4,
        generator=seeded(6),
    ).images  # fmt: skip
    ours = pipes("ip2p")("a blue circle", image=start, steps=5, guidance=Guidance(3.0, image=1.4), seed=6)
    equal(ours.images, want)


def test_upscaling(folders, pipes):
    """x4: the small picture, noised, beside the latent; its noise level heard."""
    small = picture(16)
    want = peer(folders("x4"), "StableDiffusionUpscalePipeline")(
        "cat", image=small.pil, noise_level=30, num_inference_steps=5, guidance_scale=3.0, generator=seeded(7)
    ).images
    ours = pipes("x4")("cat", image=small, noise_level=30, steps=5, guidance=3.0, seed=7)
    assert ours.images[0].size == (64, 64)
    equal(ours.images, want)


def test_noise_on_the_small_picture(folders, pipes):
    """As diffusers noises it: from the picture's own stream, as much as the level says, which the UNet hears too."""
    pipe, shown = pipes("x4"), tasks.pixels_of(picture(16), "image", 3, -1.0)
    given = tasks.canvas(pipe, 1, None, shown, None, None, None, 0)
    found, level = tasks.blurred(pipe, given, sdcore.samplers.Noise([7]), 30)
    noise = sdcore.samplers.Noise([7]).draw(3, 16, 16)
    scheduler = peer(folders("x4"), "StableDiffusionUpscalePipeline").low_res_scheduler
    torch.testing.assert_close(found, scheduler.add_noise(shown, noise, torch.tensor([30])), rtol=0, atol=1e-6)
    assert level.tolist() == [30]


@pytest.mark.parametrize("share", [0.599, 0.6, 0.8])  # the first falls on a timestep
def test_hand_off_to_the_refiner(folders, pipes, share):
    """The base draws the first part of the way, the refiner the rest, with no noise added between."""
    base, refiner = (
        peer(folders("sdxl"), "StableDiffusionXLPipeline"),
        peer(folders("refiner"), "StableDiffusionXLImg2ImgPipeline"),
    )
    options = dict(num_inference_steps=10, guidance_scale=3.0)
    begun = base("cat", generator=seeded(8), denoising_end=share, output_type="latent", **options).images
    want = refiner("cat", image=begun, denoising_start=share, generator=seeded(8), **options).images
    ours = pipes("sdxl")("cat", steps=10, guidance=3.0, seed=8, span=(0, share), output="latent")
    assert (ours.latents - begun).abs().max() < 1e-4 * begun.abs().max()
    got = pipes("refiner")("cat", image=ours.latents, steps=10, guidance=3.0, seed=8, span=(share, 1.0))
    equal(got.images, want)


# ------------------------------------------------------------------------------------------------ what is to stay


def test_what_is_not_masked_stays_to_the_bit(pipes):
    """20 random masks, sizes that are no multiple of 8 among them, feathered or not."""
    pipe, rng = pipes("sd1"), np.random.default_rng(0)
    for case in range(20):
        side, height = (64, 64) if case % 2 else (int(rng.integers(33, 70)), int(rng.integers(33, 70)))
        start = picture(side, case, height)
        mask = torch.from_numpy((rng.random((height, side)) < rng.uniform(0.05, 0.95)).astype(np.float32))[None, None]
        done = pipe("cat", image=start, mask=mask, steps=1, guidance=1, seed=case, feather=case % 4).images[0]
        assert done.size == start.size
        stays = mask[0, 0].numpy() == 0
        assert np.array_equal(done.pixels[stays], start.pixels[stays])
        # a feather as broad as the spots of this mask leaves nothing of them
        assert case % 4 or not np.array_equal(done.pixels, start.pixels)


def test_a_grey_mask_is_black_or_white(pipes):
    """From the middle of grey on it is painted."""
    pipe, grey = pipes("sd1"), torch.rand(1, 1, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    given = tasks.canvas(pipe, 1, None, picture(), grey, None, None, 0)
    assert torch.equal(given.mask, (grey >= 0.5).float())


def test_feather_lies_inside_the_mask():
    """It rises from the border inwards, is 0 outside, and 1 deep inside."""
    mask = half()
    soft = tasks.feathered(mask, 4)
    assert soft[mask == 0].max() == 0 and soft[0, 0, 30, -1] == 1 and 0 < soft[0, 0, 30, SIZE // 2 + 2] < 1
    assert torch.equal(tasks.feathered(mask, 0), mask)


def test_strength_by_place(pipes):
    """Everywhere the same: as that strength. 0 stays to the bit; more strength, more change."""
    pipe, start = pipes("sd1"), picture()
    uniform = torch.full((1, 1, SIZE, SIZE), 0.6)
    options = dict(image=start, steps=5, guidance=1.0, seed=1)
    assert torch.equal(pipe("cat", strength=uniform, **options).latents, pipe("cat", strength=0.6, **options).latents)
    ramp = torch.linspace(0, 1, SIZE).expand(1, 1, SIZE, SIZE).clone()
    ramp[..., :16] = 0
    done = pipe("cat", strength=ramp, **options)
    assert np.array_equal(done.images[0].pixels[:, :16], start.pixels[:, :16])
    z = pipe.encode_image(tasks.pixels_of(start, "image", 3, -1.0), sdcore.samplers.Noise([1]))
    assert torch.equal(done.latents[..., :2], z[..., :2])
    change = (done.latents - z).abs().mean((0, 1, 2))
    assert change[1] < change[4] < change[7]


def test_outpainting(pipes):
    """The old picture lies where it lay, to the bit; around it something new."""
    start = picture()
    wide, mask = tasks.outpaint(tasks.pixels_of(start, "image", 3, -1.0), left=16, bottom=8)
    done = pipes("sd1")("cat", image=wide, mask=mask, steps=2, seed=1).images[0]
    assert done.size == (80, 72)
    assert np.array_equal(done.pixels[:64, 16:], start.pixels)


# ------------------------------------------------------------------------------------------------ what cannot be


@pytest.mark.parametrize("family, options, error, words", [
    ("sd1", dict(strength=0.5), ConfigError, "without image"),
    ("sd1", dict(image=picture(), strength=0.1, steps=5), ConfigError, "less than one"),
    ("sd1", dict(image=picture(), strength=float("nan")), ConfigError, "strength"),
    ("sd1", dict(image=picture(), strength=1.5), ConfigError, "from 0 to 1"),
    ("sd1", dict(mask=half()), ConfigError, "image: missing"),
    ("sd1", dict(image=picture(), mask=half(32)), ImageError, "32x32, expected the picture's 64x64"),
    ("sd1", dict(image=picture(), mask=half() * 0), ImageError, "all black"),
    ("sd1", dict(image=picture(), mask=half() * torch.nan), ImageError, "NaN"),
    ("sd1", dict(image=picture(), size=(32, 32)), ConfigError, "64x64 where size= says 32x32"),
    ("sd1", dict(image=picture(4)), ConfigError, "side of 4"),
    ("sd1", dict(image="file.png"), ImageError, "open_picture"),
    ("sd1", dict(image=torch.zeros(1, 3, 64, 64) + 7), ImageError, "from -1 to 1"),
    ("sd1", dict(image=torch.zeros(3, 3, 64, 64)), ConfigError, "one a picture"),
    ("sd1", dict(depth=half()), ConfigError, "no channel for it"),
    ("sd1", dict(span=(0.5, 0.5)), ConfigError, "begin < end"),
    ("sd1", dict(span=(0.5, 1.0)), ConfigError, "needs image="),
    ("sd1", dict(span=(0.999, 1.0), image=torch.zeros(1, 4, 8, 8)), ConfigError, "no step"),
    ("sd1", dict(guidance=Guidance(3.0, image=1.5)), ConfigError, "follow instructions"),
    ("sd1", dict(image=picture(), mask=half(), feather=-1), ConfigError, "feather"),
    ("sd1-inpaint", dict(), ConfigError, "give mask="),
    ("sd1-inpaint", dict(image=torch.zeros(1, 4, 8, 8), mask=half()), ConfigError, "decode them first"),
    ("ip2p", dict(), ConfigError, "give image="),
    ("ip2p", dict(image=picture(), mask=half()), ConfigError, "knows none"),
    ("sd2-depth", dict(image=picture()), ConfigError, "give depth="),
    ("sd2-depth", dict(image=picture(), depth=0 * half() + 0.5), ImageError, "the same everywhere"),
    ("x4", dict(image=picture(16), noise_level=500), ConfigError, "0 to 350"),
])  # fmt: skip
def test_refusals(pipes, family, options, error, words):
    """One line that says what was found and what to do, before anything is drawn."""
    with pytest.raises(error, match=words) as caught:
        pipes(family).steps("cat", **{"steps": 5, **options})
    assert "\n" not in str(caught.value)
