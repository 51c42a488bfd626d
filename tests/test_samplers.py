"""Samplers against their peers (diffusers, k-diffusion), against theory on a Gaussian, and against themselves in batches."""

import importlib.util
import math
import sys
import types
import warnings
from dataclasses import replace
from unittest import mock

import diffusers
import numpy as np
import pytest
import torch

from sdcore.errors import ConfigError
from sdcore.guidance import denoiser
from sdcore.samplers import SAMPLERS, Noise, add_noise, advance, initial, make_steps, mean_std, memory, sample
from sdcore.scheduler import (
    SD2_V_SCHEDULER,
    SD15_SCHEDULER,
    SDXL_SCHEDULER,
    TURBO_SCHEDULER,
    SchedulerConfig,
)

# The released scheduler_config.json files, as diffusers reads them.
RELEASED = dict(
    beta_start=0.00085,
    beta_end=0.012,
    beta_schedule="scaled_linear",
    num_train_timesteps=1000,
    clip_sample=False,
    set_alpha_to_one=False,
    skip_prk_steps=True,
    steps_offset=1,
    trained_betas=None,
)
MODELS = {
    "sd15": (SD15_SCHEDULER, RELEASED),
    "sd21v": (SD2_V_SCHEDULER, RELEASED | dict(prediction_type="v_prediction")),
    "sdxl": (
        SDXL_SCHEDULER,
        RELEASED | dict(timestep_spacing="leading", prediction_type="epsilon", sample_max_value=1.0),
    ),
}
PEERS = {
    "ddpm": diffusers.DDPMScheduler,
    "ddim": diffusers.DDIMScheduler,
    "pndm": diffusers.PNDMScheduler,
    "lms": diffusers.LMSDiscreteScheduler,
    "euler": diffusers.EulerDiscreteScheduler,
    "euler_a": diffusers.EulerAncestralDiscreteScheduler,
    "heun": diffusers.HeunDiscreteScheduler,
    "dpm2": diffusers.KDPM2DiscreteScheduler,
    "dpm2_a": diffusers.KDPM2AncestralDiscreteScheduler,
    "dpmpp_2m": diffusers.DPMSolverMultistepScheduler,
    "dpmpp_2m_sde": diffusers.DPMSolverMultistepScheduler,
    "dpmpp_sde": diffusers.DPMSolverSDEScheduler,
    "unipc": diffusers.UniPCMultistepScheduler,
    "deis": diffusers.DEISMultistepScheduler,
    "lcm": diffusers.LCMScheduler,
    "tcd": diffusers.TCDScheduler,
}
DETERMINISTIC = ["ddim", "pndm", "lms", "euler", "heun", "dpm2", "dpmpp_2m", "unipc", "deis"]
STOCHASTIC = ["ddpm", "euler_a", "dpm2_a", "dpmpp_2m_sde", "dpmpp_sde", "lcm", "tcd"]
FLAGS = {"karras": "use_karras_sigmas", "exponential": "use_exponential_sigmas", "beta": "use_beta_sigmas"}
SHAPE = (1, 4, 8, 8)
TOLERANCE = 1e-5  # relative to the largest latent: what the project promises


def network(x, t):
    """Stands in for a UNet: a smooth, bounded, nonlinear function of the picture and the timestep."""
    return torch.tanh(0.7 * x + float(t) / 1500) * 1.1


def draws(seed, count=200):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(SHAPE, generator=g) for _ in range(count)]


def peer_for(name, released, schedule=None, **options):
    options = {"algorithm_type": "sde-dpmsolver++"} | options if name == "dpmpp_2m_sde" else options
    if schedule in FLAGS:
        options |= {FLAGS[schedule]: True}
    elif schedule:
        options |= {"timestep_spacing": schedule}
    return PEERS[name].from_config(released | options)


def brownian(noises):
    """The noise of our dpmpp_sde as a path that diffusers can ask: the second of two increments contains the first."""
    start = {}

    def increment(sigma, sigma_next):
        fresh = next(noises)
        if start.get("sigma") != float(sigma):
            start.update(sigma=float(sigma), middle=float(sigma_next), noise=fresh)
            return fresh
        share = (start["sigma"] - start["middle"]) / (start["sigma"] - float(sigma_next))
        return math.sqrt(share) * start["noise"] + math.sqrt(1 - share) * fresh

    return increment


def run_peer(name, peer, n, noises, **step_options):
    """diffusers' loop. Returns its timesteps, the sigmas that it handed to the network, and its latents."""
    peer.set_timesteps(n)
    noises = iter(noises)
    x = next(noises) * peer.init_noise_sigma
    if name == "dpmpp_sde":
        peer.noise_sampler = brownian(noises)
    module = sys.modules[type(peer).__module__]
    with mock.patch.object(module, "randn_tensor", lambda *a, **k: next(noises), create=True):
        for t in peer.timesteps:
            x = peer.step(network(peer.scale_model_input(x, t), t), t, x, **step_options).prev_sample
    return peer.timesteps.tolist(), x


def run_ours(steps, noises):
    noises = iter(noises)
    x = initial(next(noises), steps)
    for _, x, _ in sample(denoiser(lambda z, step: network(z, step.t)), x, steps, noise=lambda x: next(noises)):  # noqa: B007
        pass
    return x


def peer_sigmas(name, peer):
    """The sigma of every evaluation, out of the arrays in which diffusers keeps them."""
    if name in ("dpm2", "dpm2_a"):
        shift = name == "dpm2_a"
        return [float(peer.sigmas_interpol[i - shift] if i % 2 else peer.sigmas[i]) for i in range(len(peer.timesteps))]
    if hasattr(peer, "sigmas"):
        return peer.sigmas[: len(peer.timesteps)].tolist()
    level = peer.alphas_cumprod[peer.timesteps]
    return None, level.tolist()


def error(ours, theirs):
    assert ours.isfinite().all() and theirs.isfinite().all()
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


def compare(name, model, n, schedule=None, peer_options=None, step_options=None, tolerance=TOLERANCE, **options):
    config, released = MODELS[model] if isinstance(model, str) else model
    peer = peer_for(name, released, schedule, **(peer_options or {}))
    noises = draws(n)
    timesteps, theirs = run_peer(name, peer, n, noises, **(step_options or {}))
    steps = make_steps(config, n, name, schedule, **options)
    if name in ("dpmpp_sde", "dpm2_a"):  # its inner points are worked out here from sigmas rounded to fp32
        assert [s.t for s in steps] == pytest.approx(timesteps, abs=2e-3)
    else:
        assert [s.t for s in steps] == timesteps
    sigmas = peer_sigmas(name, peer)
    if isinstance(sigmas, tuple):
        assert [s.alpha_bar for s in steps] == sigmas[1]
    elif name not in ("dpmpp_sde", "dpm2_a"):
        assert [s.sigma for s in steps] == sigmas
    off = error(run_ours(steps, noises), theirs)
    assert off <= tolerance, f"{name} {model} {n} {schedule}: {off:.2e}"
    return off


@pytest.mark.parametrize("name", DETERMINISTIC)
@pytest.mark.parametrize("model", MODELS)
def test_deterministic_samplers_equal_diffusers(name, model):
    for n in (20, 30, 50):
        compare(name, model, n)


@pytest.mark.parametrize("name", STOCHASTIC)
@pytest.mark.parametrize("model", MODELS)
def test_stochastic_samplers_equal_diffusers_given_the_noise(name, model):
    for n in (4, 8, 50) if name in ("lcm", "tcd") else (20, 30, 50):
        compare(name, model, n)
