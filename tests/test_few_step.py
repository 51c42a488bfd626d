"""Few-step models: a UNet that hears the guidance scale; presets as the model cards have them; what is known of a model."""

import json
import re
import sys
import types
from dataclasses import replace
from unittest import mock

import diffusers
import numpy as np
import pytest
import torch
from sdcore.weights.configs import unet_config, unet_table

import sdcore
from sdcore.errors import ConfigError
from sdcore.few_step import PRESETS, few_step, recognised
from sdcore.guidance import denoiser
from sdcore.samplers import initial, make_steps, sample
from sdcore.scheduler import LCM_SCHEDULER, SDXL_SCHEDULER, TURBO_SCHEDULER
from sdcore.unet import SD15, UNet, scale_sinusoids
from tests.peers import inputs, randomise, small
from tests.tiny_models import write_folder

# ------------------------------------------------------------------------------------------------ a UNet that hears the scale

LCM = replace(small(SD15), guidance_dim=24)


@pytest.fixture(scope="module")
def twins():
    """A UNet of LCM's kind, ours and diffusers', with the same weights."""
    with torch.device("meta"):
        theirs, ours = diffusers.UNet2DConditionModel.from_config(unet_table(LCM)), UNet(LCM)
    randomise(theirs)
    ours.load_state_dict(theirs.state_dict(), strict=True, assign=True)
    return ours.eval(), theirs.eval()


@torch.no_grad()
def test_a_unet_that_hears_the_guidance_scale_is_bit_equal_to_diffusers(twins):
    """LCM_Dreamshaper_v7's kind: sinusoids of scale - 1, through cond_proj, beside those of the time."""
    ours, theirs = twins
    (x, t, context, _, _), _ = inputs(LCM, size=(16, 16))
    scale = torch.tensor([8.0, 1.5])
    embed = diffusers.LatentConsistencyModelPipeline.get_guidance_scale_embedding
    want = theirs(x, t, encoder_hidden_states=context, timestep_cond=embed(None, scale - 1, LCM.guidance_dim)).sample
    assert torch.equal(ours(x, t, context, scale=scale), want)
    assert not torch.equal(ours(x, t, context, scale=scale.flip(0)), want)


def test_the_embedding_of_a_scale_is_diffusers():
    scale = torch.tensor([1.0, 1.7, 7.5, 8.0, 14.0])
    embed = diffusers.LatentConsistencyModelPipeline.get_guidance_scale_embedding
    assert torch.equal(scale_sinusoids(scale, 256), embed(None, scale - 1, 256))


def test_a_unet_that_hears_the_scale_says_so_when_it_is_not_told(twins):
    x, t, context, *_ = inputs(LCM)[0]
    with pytest.raises(ConfigError, match="scale"):
        twins[0](x, t, context)


def test_the_width_of_the_embedding_goes_round_through_config_json():
    assert unet_table(LCM)["time_cond_proj_dim"] == 24 and unet_config(unet_table(LCM)) == LCM
    assert "time_cond_proj_dim" not in unet_table(small(SD15))


# ------------------------------------------------------------------------------------------------ presets

SDXL = dict(
    beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", num_train_timesteps=1000, clip_sample=False,
    set_alpha_to_one=False, steps_offset=1, timestep_spacing="leading", prediction_type="epsilon",
)  # fmt: skip
CARDS = {  # how each card makes its scheduler of SDXL's, and what it gives `step` beside
    "lcm": (diffusers.LCMScheduler, {}, {}),
    "lcm-guided": (diffusers.LCMScheduler, {}, {}),
    "tcd": (diffusers.TCDScheduler, {}, {"eta": 0.3}),
    "turbo": (diffusers.EulerAncestralDiscreteScheduler, {"timestep_spacing": "trailing"}, {}),
    "lightning": (diffusers.EulerDiscreteScheduler, {"timestep_spacing": "trailing"}, {}),
    "hyper-1": (diffusers.TCDScheduler, {}, {"eta": 1.0}),
    "hyper": (diffusers.DDIMScheduler, {"timestep_spacing": "trailing"}, {}),
}
GUIDED = {"lcm-guided": 8.0, "hyper-8-cfg": 5.0, "hyper-12-cfg": 5.0}  # all others: off


def student(x, t):
    """Stands in for a UNet: smooth, bounded, nonlinear."""
    return torch.tanh(0.7 * x + float(t) / 1500) * 1.1


def as_the_card_says(name, steps):
    """diffusers' timesteps, noise levels (sigma, or alpha_bar where it keeps those) and final latent."""
    kind, changes, options = CARDS.get(name) or CARDS[name.split("-")[0]]
    peer = kind.from_config(SDXL | changes)
    peer.set_timesteps(steps)
    drawn = iter(noise_of(20))
    x = next(drawn) * peer.init_noise_sigma
    with mock.patch.object(sys.modules[kind.__module__], "randn_tensor", lambda *a, **k: next(drawn), create=True):
        for t in peer.timesteps:
            x = peer.step(student(peer.scale_model_input(x, t), t), t, x, **options).prev_sample
    levels = peer.sigmas[:-1] if hasattr(peer, "sigmas") else peer.alphas_cumprod[peer.timesteps]
    return peer.timesteps.tolist(), levels.tolist(), x


def noise_of(count):
    g = torch.Generator().manual_seed(4)
    return [torch.randn(1, 4, 8, 8, generator=g) for _ in range(count)]


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_what_its_model_card_says(name):
    options = few_step(name)
    guidance, n = options.pop("guidance"), options.pop("steps")
    assert guidance == GUIDED.get(name, 1.0)
    assert n == int((re.findall(r"\d+", name) or [1 if name == "turbo" else 4])[0])
    for count in {n, 4} if "eta" in options else {n}:  # a last step draws nothing, whatever eta
        steps = make_steps(SDXL_SCHEDULER, count, **options)
        timesteps, levels, theirs = as_the_card_says(name, count)
        drawn = iter(noise_of(20))
        start, denoise = initial(next(drawn), steps), denoiser(lambda z, step: student(z, step.t))
        walk = sample(denoise, start, steps, noise=lambda x: next(drawn))  # noqa: B023 (called here)
        assert [step.t for step in steps] == timesteps
        assert [step.sigma if options["sampler"].startswith("euler") else step.alpha_bar for step in steps] == levels
        assert (([x for _, x, _ in walk][-1] - theirs).abs().max() / theirs.abs().max()).item() <= 1e-5


def test_an_unknown_preset_names_the_nearest():
    with pytest.raises(ConfigError, match="lightning-4"):
        few_step("lightening-4")


def pipe_with(scheduler=SDXL_SCHEDULER, **unet):
    """As much of a pipeline as is looked at."""
    return types.SimpleNamespace(scheduler=scheduler, unet=types.SimpleNamespace(config=replace(SD15, **unet)))


KNOWN = [  # the released names
    ("ByteDance/SDXL-Lightning/sdxl_lightning_4step_unet.safetensors", "lightning-4"),
    ("sdxl_lightning_8step_lora.safetensors", "lightning-8"),
    ("sdxl_lightning_2step.safetensors", "lightning-2"),
    ("Hyper-SDXL-8steps-lora.safetensors", "hyper-8"),
    ("Hyper-SDXL-8steps-CFG-lora.safetensors", "hyper-8-cfg"),
    ("Hyper-SD15-12steps-CFG-lora.safetensors", "hyper-12-cfg"),
    ("Hyper-SDXL-1step-lora.safetensors", "hyper-1"),
    ("Hyper-SD15-2steps-lora.safetensors", "hyper-2"),
    ("sd_xl_turbo_1.0_fp16.safetensors", "turbo"),
    ("stabilityai/sdxl-turbo", "turbo"),
    ("stabilityai/sd-turbo", "turbo"),
    ("latent-consistency/lcm-lora-sdv1-5", "lcm"),
    ("lcm-lora-sdxl/pytorch_lora_weights.safetensors", "lcm"),
    ("C:\\loras\\lcm_sd15.safetensors", "lcm"),
    ("h1t/TCD-SDXL-LoRA", "tcd"),
    ("SimianLuo/LCM_Dreamshaper_v7", "lcm"),
    # and none of these
    ("sdxl_lightning_1step_x0_unet.safetensors", None),
    ("sd_xl_base_1.0.safetensors", None),
    ("v1-5-pruned-emaonly.safetensors", None),
    ("realvisxl_turbocharged.safetensors", None),
    ("/home/hyper/lcm/models/sd15/model.safetensors", None),
    ("lightning_strikes_style.safetensors", None),
]


@pytest.mark.parametrize("name,preset", KNOWN)
def test_released_names_are_recognised(name, preset):
    found = recognised(pipe_with(), ["tiny", name])
    assert found == (preset and (preset, f"by the name {name}"))


def test_what_was_shipped_with_a_model_is_recognised():
    assert recognised(pipe_with()) is None
    assert recognised(pipe_with(guidance_dim=256))[0] == "lcm-guided"
    assert recognised(pipe_with(LCM_SCHEDULER))[0] == "lcm"
    assert recognised(pipe_with(replace(LCM_SCHEDULER, sampler="tcd")))[0] == "tcd"
    assert recognised(pipe_with(TURBO_SCHEDULER))[0] == "turbo"
    assert recognised(pipe_with(replace(TURBO_SCHEDULER, sampler="euler"))) is None  # trailing alone says nothing


# ------------------------------------------------------------------------------------------------ in the pipeline


def test_a_latent_consistency_model_draws_as_in_diffusers(tmp_path):
    """LCM_Dreamshaper_v7's kind, small: the scale is heard, the batch not doubled; 4 steps, the same noise, 1/255."""
    folder = write_folder(tmp_path / "lcm", "sd1")
    table = json.loads((folder / "unet/config.json").read_text()) | {"time_cond_proj_dim": 32}
    torch.manual_seed(0)
    diffusers.UNet2DConditionModel.from_config(table).save_pretrained(folder / "unet")
    scheduler = diffusers.LCMScheduler.from_config(SDXL)
    scheduler.save_pretrained(folder / "scheduler")
    theirs = diffusers.LatentConsistencyModelPipeline.from_pretrained(folder, scheduler=scheduler, safety_checker=None)
    theirs.set_progress_bar_config(disable=True)
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    generator = torch.Generator().manual_seed(5)
    want = theirs("a red circle", 64, 64, 4, guidance_scale=8.0, latents=noise, generator=generator).images[0]
    ours = sdcore.load(str(folder), device="cpu")
    assert recognised(ours)[0] == "lcm-guided"
    got = ours("a red circle", noise=noise, seed=5, **few_step("lcm-guided")).images[0]
    other = ours("a red circle", noise=noise, seed=5, **few_step("lcm-guided") | {"guidance": 2.0}).images[0]
    assert np.abs(np.asarray(got, dtype=np.int16) - np.asarray(want, dtype=np.int16)).max() <= 1
    assert np.abs(np.asarray(got, dtype=np.int16) - np.asarray(other, dtype=np.int16)).max() > 1


def test_the_command_line_samples_a_few_step_model_as_it_wants(tmp_path, monkeypatch, capsys):
    """By its name, unless the user says otherwise; and it says so."""
    from sdcore import cli, image

    folder = write_folder(tmp_path / "sd_turbo", "sd1")
    monkeypatch.chdir(tmp_path)

    def settings(*words):
        assert cli.main(["generate", "cat", "--model", str(folder), *words]) == 0
        found = image.read_metadata("out.png")
        return (found["sampler"], found["schedule"], found["steps"], found["guidance"]), capsys.readouterr().err

    known, said = settings()
    assert known == ("euler_a", "trailing", 1, 1.0) and "turbo" in said and "--few-step off" in said
    assert settings("--steps", "3", "--guidance", "2")[0] == ("euler_a", "trailing", 3, 2.0)
    assert settings("--sampler", "ddim", "--steps", "2")[0] == ("ddim", None, 2, 1.0)
    assert settings("--few-step", "hyper-2")[0] == ("ddim", "trailing", 2, 1.0)
    usual, said = settings("--few-step", "off", "--steps", "2")
    assert usual == ("pndm", None, 2, 7.5) and "turbo" not in said
