"""The bundled model: what the folder promises, that diffusers draws the same picture from it, and that it follows prompts."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from sdcore.train import judge

import sdcore

TINY = Path(__file__).parents[1] / "weights" / "tiny"


@pytest.fixture(scope="module")
def pipe():
    return sdcore.load("tiny", device="cpu", dtype=torch.float32)


def test_the_folder_is_small_and_is_what_its_version_says():
    paths = [file for file in TINY.rglob("*") if file.is_file() and "controlnet" not in file.parts]  # which is apart
    assert sum(file.stat().st_size for file in paths) <= 12e6
    version = json.loads((TINY / "version.json").read_text())
    assert judge.fingerprint(TINY) == {key: version[key] for key in ("hash", "files")}
    weights = {"unet/diffusion_pytorch_model", "vae/diffusion_pytorch_model", "text_encoder/model"}
    assert {f"{name}.safetensors" for name in weights} <= set(version["files"])
    for page in (TINY / "README.md", TINY.parents[1] / "README.md"):  # the figures shown are the figures recorded
        assert judge.card(version) in page.read_text(), page
    assert version["hash"][:16] in (TINY / "README.md").read_text()


@pytest.mark.parametrize("sampler, peer", [("ddim", "DDIMScheduler"), ("dpmpp_2m", "DPMSolverMultistepScheduler")])
def test_diffusers_draws_the_same_picture(pipe, sampler, peer):
    """From the same noise: at most one step of 255, and nearly all pixels equal."""
    diffusers = pytest.importorskip("diffusers")
    theirs = diffusers.StableDiffusionPipeline.from_pretrained(TINY, safety_checker=None, local_files_only=True)
    theirs.scheduler = getattr(diffusers, peer).from_config(theirs.scheduler.config)
    theirs.set_progress_bar_config(disable=True)
    prompts = ["a red circle above a blue square", "a large striped yellow star on a purple background"]
    negative = ["", "green"]
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    settings = {"num_inference_steps": 12, "guidance_scale": 4.0}
    expected = theirs(prompts, negative_prompt=negative, latents=noise, output_type="np", **settings).images
    found = pipe(prompts, negative, steps=12, guidance=4.0, sampler=sampler, noise=noise).pixels
    found = (found / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()
    assert np.abs(found - expected).max() <= 1 / 255
    assert expected.std() > 0.05  # a picture, not a plain


def test_prompts_are_followed_about_as_well_as_recorded(pipe):
    """48 prompts at 12 steps: every rate within 3.5 standard errors (and what fewer steps cost) of the recorded one."""
    version = json.loads((TINY / "version.json").read_text())
    recorded = version["prompts"]
    found = judge.prompts(pipe, 48, steps=12, sampler="dpmpp_2m", guidance=version["judged"]["guidance"])
    for key, n in (("one_object", 24), ("two_objects", 24), ("colour", 40), ("shape", 40), ("background", 20)):
        share = recorded[key]
        allowed = 3.5 * (max(share * (1 - share), 0.02) / n) ** 0.5 + 0.05
        assert found[key] >= share - allowed, (key, found[key], share)
    assert recorded["colour"] > recorded["chance_colour"] + 0.2


def test_pictures_survive_the_autoencoder(pipe):
    recorded = json.loads((TINY / "version.json").read_text())["autoencoder"]
    found = judge.autoencoder(pipe.vae, 24)
    assert found["psnr"] >= recorded["psnr"] - 1.0 and found["read_shape"] >= recorded["read_shape"] - 0.15


@pytest.mark.check
def test_the_recorded_figures_are_made_again(pipe):
    version = json.loads((TINY / "version.json").read_text())
    settings = version["judged"]
    found = judge.prompts(
        pipe, settings["prompts"], settings["steps"], settings["guidance"], settings["sampler"], settings["seed"]
    )
    for key, share in version["prompts"].items():
        assert found[key] == pytest.approx(share, abs=0.01), key
    assert judge.autoencoder(pipe.vae, settings["pictures"])["psnr"] == pytest.approx(
        version["autoencoder"]["psnr"], abs=0.05
    )
