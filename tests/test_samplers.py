"""Samplers against their peers (diffusers, k-diffusion), against theory on a Gaussian, and against themselves in batches."""

import importlib
import importlib.util
import math
import sys
import types
from dataclasses import replace
from functools import lru_cache
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


@lru_cache
def draws(seed, count=101):
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
    if (
        name == "deis"
    ):  # its coefficients cancel: in fp32 they alone put diffusers 9e-6 off (SD 2.1, 50 steps; order 3: more)
        peer.sigmas = peer.sigmas.double()
    noises = iter(noises)
    x = next(noises) * peer.init_noise_sigma
    if name == "dpmpp_sde":
        peer.noise_sampler = brownian(noises)
    module = sys.modules[type(peer).__module__]
    with mock.patch.object(module, "randn_tensor", lambda *a, **k: next(noises), create=True):
        for t in peer.timesteps:
            x = peer.step(network(peer.scale_model_input(x, t), t), t, x, **step_options).prev_sample
    return peer.timesteps.tolist(), x


def last(walk):
    """The x that a walk ends with."""
    return [x for _, x, _ in walk][-1]


def run_ours(steps, noises):
    noises = iter(noises)
    start = initial(next(noises), steps)
    return last(sample(denoiser(lambda z, step: network(z, step.t)), start, steps, noise=lambda x: next(noises)))


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
    elif (name, schedule) == (
        "dpm2",
        "beta",
    ):  # the only timesteps kept in fp64: the last bits of scipy's quantiles show
        assert [s.t for s in steps] == pytest.approx(timesteps, rel=1e-12)
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


@pytest.mark.parametrize("name", ["ddim", "pndm", "lms", "heun", "dpm2", "unipc", "deis"])
def test_in_fp64_the_samplers_equal_diffusers_to_a_hundred_billionth(name):
    """The 1e-5 above leaves room for the peers' fp32 coefficients (deis on SD 2.1 at 50 steps is off by 9e-6 of its own). With
    their tables turned to fp64 the two must agree to rounding: 1e-16, grown by at most 1e5 over the steps."""
    for config, released in MODELS.values():
        peer = peer_for(name, released)
        set_timesteps = peer.set_timesteps

        def in_double(n, peer=peer, set_timesteps=set_timesteps):
            set_timesteps(n)
            for table in ("sigmas", "sigmas_interpol", "alphas_cumprod", "final_alpha_cumprod"):
                if hasattr(peer, table):
                    setattr(peer, table, getattr(peer, table).double())

        peer.set_timesteps = in_double
        noises = [noise.double() for noise in draws(5, 1)]
        _, theirs = run_peer(name, peer, 30, noises)
        assert error(run_ours(make_steps(config, 30, name), noises), theirs) < 1e-11


CURVES = ["karras", "exponential", "beta"]
SPACED = ["leading", "trailing", "linspace"]


@pytest.mark.parametrize("schedule", CURVES)
@pytest.mark.parametrize(
    "name", ["lms", "euler", "heun", "dpm2", "dpmpp_2m", "dpmpp_2m_sde", "dpmpp_sde", "unipc", "deis"]
)
def test_curves_of_sigmas_equal_diffusers(name, schedule):
    compare(name, "sdxl", 20, schedule)
    compare(name, "sd21v", 10, schedule)
    if schedule != "beta":  # whose first two timesteps are the same integer there, over which diffusers stumbles
        compare(name, "sd15", 37, schedule)


@pytest.mark.parametrize("schedule", SPACED)
@pytest.mark.parametrize("name", [name for name in PEERS if name not in ("lcm", "tcd")])
def test_spacings_equal_diffusers(name, schedule):
    compare(name, "sd15", 20, schedule)
    compare(name, "sd21v", 7, schedule)


OPTIONS = [
    ("ddim", {}, dict(eta=0.5), dict(eta=0.5)),
    ("ddim", {}, dict(eta=1.0), dict(eta=1.0)),
    ("ddim", dict(set_alpha_to_one=True), {}, {}),
    ("pndm", dict(set_alpha_to_one=True), {}, {}),
    ("pndm", dict(skip_prk_steps=False), {}, {}),
    ("ddpm", dict(variance_type="fixed_large"), {}, dict(variance="large")),
    ("lms", {}, dict(order=2), dict(order=2)),
    ("euler", {}, dict(s_churn=8.0, s_tmin=0.1, s_tmax=10.0, s_noise=1.003), {}),
    ("dpmpp_2m", dict(solver_order=1), {}, dict(order=1)),
    ("dpmpp_2m", dict(solver_order=3), {}, dict(order=3)),
    ("dpmpp_2m", dict(solver_type="heun"), {}, dict(solver="heun")),
    ("dpmpp_2m", dict(solver_order=3, lower_order_final=False), {}, dict(order=3, lower_order_final=False)),
    ("dpmpp_2m", dict(final_sigmas_type="sigma_min"), {}, dict(final_sigma="sigma_min")),
    (
        "dpmpp_2m",
        dict(final_sigmas_type="sigma_min", euler_at_final=True),
        {},
        dict(final_sigma="sigma_min", euler_at_final=True),
    ),
    ("dpmpp_2m_sde", dict(solver_type="heun"), {}, dict(solver="heun")),
    ("unipc", dict(solver_order=1), {}, dict(order=1)),
    ("unipc", dict(solver_order=3), {}, dict(order=3)),
    # diffusers' bh1 divides infinity by infinity on its way to sigma 0
    ("unipc", dict(solver_type="bh1", final_sigmas_type="sigma_min"), {}, dict(variant="bh1", final_sigma="sigma_min")),
    (
        "unipc",
        dict(solver_order=3, lower_order_final=False, final_sigmas_type="sigma_min"),
        {},
        dict(order=3, lower_order_final=False, final_sigma="sigma_min"),
    ),
    ("unipc", dict(disable_corrector=list(range(100))), {}, dict(corrector=False)),
    ("deis", dict(solver_order=1), {}, dict(order=1)),
    ("deis", dict(solver_order=3), {}, dict(order=3)),
    ("deis", dict(solver_order=3, lower_order_final=False), {}, dict(order=3, lower_order_final=False)),
    ("tcd", {}, dict(eta=0.0), dict(eta=0.0)),
    ("tcd", {}, dict(eta=1.0), dict(eta=1.0)),
]


@pytest.mark.parametrize("name,peer_options,step_options,ours", OPTIONS, ids=lambda value: str(value)[:60])
def test_options_equal_diffusers(name, peer_options, step_options, ours):
    fields = {key: peer_options[key] for key in ("set_alpha_to_one", "skip_prk_steps") if key in peer_options}
    if name == "euler":
        ours = step_options
    for config, released in (MODELS["sd15"], MODELS["sd21v"]):
        for n in (10, 20):
            model = (replace(config, **fields), released)
            compare(name, model, n, peer_options=dict(peer_options), step_options=step_options, **ours)


@pytest.mark.parametrize("name", ["ddpm", "ddim", "lms", "euler", "heun", "dpmpp_2m", "unipc", "deis", "lcm", "tcd"])
def test_models_that_predict_the_sample_equal_diffusers(name):
    model = (replace(SD15_SCHEDULER, prediction_type="sample"), RELEASED | dict(prediction_type="sample"))
    compare(name, model, 20)


@pytest.mark.parametrize(
    "name", ["ddpm", "ddim", "euler", "euler_a", "dpmpp_2m", "dpmpp_2m_sde", "unipc", "lcm", "tcd"]
)
def test_zero_terminal_snr_equals_diffusers(name):
    config = replace(SD2_V_SCHEDULER, zero_snr=True, spacing="trailing")
    released = MODELS["sd21v"][1] | dict(rescale_betas_zero_snr=True, timestep_spacing="trailing")
    compare(name, (config, released), 20)
    first = make_steps(config, 20, name)[0]
    assert first.t == 999 and (first.sigma == 4096 if SAMPLERS[name].space == "ve" else first.sigma >= 4096)


def test_zero_terminal_snr_refuses_an_epsilon_model():
    with pytest.raises(ConfigError, match="v or the sample"):
        make_steps(replace(SD15_SCHEDULER, zero_snr=True, spacing="trailing"), 20, "ddim")


# ------------------------------------------------------------------------------------------------------------------------
# Image to image: noise to an inner level, and on from there; a mask keeps what is known in every step


def mixing(x, t):
    """`network`, but of its neighbours too: what a mask keeps is seen by what it does not."""
    return network(0.6 * x + 0.4 * x.roll(1, -1), t)


KEPT = (torch.arange(SHAPE[-1]) % 3 == 0).float().expand(SHAPE)


def peer_image_to_image(name, model, n, start, schedule=None, masked=False):
    """diffusers' image-to-image loop: `get_timesteps` and `add_noise` of its pipelines, and the blend of the inpainting one."""
    peer = peer_for(name, MODELS[model][1], schedule)
    peer.set_timesteps(n)
    timesteps = peer.timesteps[start * peer.order :]
    if hasattr(peer, "set_begin_index"):
        peer.set_begin_index(start * peer.order)
    if name == "deis":
        peer.sigmas = peer.sigmas.double()  # see `run_peer`
    image, noise, *more = draws(11, 101)
    x, fresh = peer.add_noise(image, noise, timesteps[:1]).float(), iter(more)
    if name == "dpmpp_sde":
        peer.noise_sampler = brownian(fresh)
    module = sys.modules[type(peer).__module__]
    with mock.patch.object(module, "randn_tensor", lambda *a, **k: next(fresh), create=True):
        for i, t in enumerate(timesteps):
            # Entered at step 8, diffusers takes the only slope it has for the first of four; k-diffusion's order rises from 1.
            options = dict(order=min(i + 1, 4)) if name == "lms" else {}
            x = peer.step(mixing(peer.scale_model_input(x, t), t), t, x, **options).prev_sample
            if masked:
                known = peer.add_noise(image, noise, timesteps[i + 1 : i + 2]) if i + 1 < len(timesteps) else image
                if name in ("dpm2", "dpmpp_sde") and not peer.state_in_first_order:
                    # Before a look at a middle, diffusers blends in the noise of the level below; x has that of the middle.
                    middle = peer.sigmas_interpol[peer.step_index] if name == "dpm2" else peer.mid_point_sigma
                    known = image + noise * middle
                x = KEPT * known + (1 - KEPT) * x
    return timesteps.tolist(), x


def our_image_to_image(steps, masked):
    image, noise, *more = draws(11, 101)
    fresh = iter(more)

    def blend(x, step):
        return KEPT * (image if step is None else add_noise(image, noise, step)) + (1 - KEPT) * x

    denoise = denoiser(lambda z, step: mixing(z, step.t))
    walk = sample(
        denoise,
        add_noise(image, noise, steps[0]),
        steps,
        noise=lambda y: next(fresh),
        edit=blend if masked else None,
    )
    return last(walk)


@pytest.mark.parametrize("name", PEERS)
@pytest.mark.parametrize("model", MODELS)
def test_entered_further_down_equals_diffusers(name, model):
    """With all strengths that diffusers turns into another first timestep of these; with a mask, and without one."""
    for n, start in [(8, 1), (8, 3), (4, 3)] if name in ("lcm", "tcd") else [(20, 1), (20, 8), (7, 2), (20, 19)]:
        steps = make_steps(MODELS[model][0], n, name, start=start)
        for masked in (False, True):
            timesteps, theirs = peer_image_to_image(name, model, n, start, masked=masked)
            loose = name in ("dpmpp_sde", "dpm2_a")  # see `compare`
            assert [step.t for step in steps] == (pytest.approx(timesteps, abs=2e-3) if loose else timesteps)
            assert error(our_image_to_image(steps, masked), theirs) <= TOLERANCE, (n, start, masked)


@pytest.mark.parametrize("name", ["euler", "heun", "dpm2", "dpmpp_2m", "unipc"])
def test_a_curve_entered_further_down_equals_diffusers(name):
    steps = make_steps(SDXL_SCHEDULER, 20, name, "karras", start=8)
    timesteps, theirs = peer_image_to_image(name, "sdxl", 20, 8, "karras", masked=True)
    assert [step.t for step in steps] == timesteps
    assert error(our_image_to_image(steps, masked=True), theirs) <= TOLERANCE


@pytest.mark.parametrize("name", [name for name in SAMPLERS if name not in ("pndm", "ddim_inverse")])
def test_a_way_entered_further_down_is_the_rest_of_the_way(name):
    """The same levels, looked at as often. (Not pndm: it does as diffusers. Not ddim_inverse: what it leaves out is its end.)"""
    for n, start in [(8, 1), (8, 7), (20, 7)]:
        whole, rest = (make_steps(SD15_SCHEDULER, n, name, start=k) for k in (0, start))
        assert [(s.t, s.sigma, s.signal, s.noise) for s in rest] == [
            (s.t, s.sigma, s.signal, s.noise) for s in whole[-len(rest) :]
        ]
        assert len(rest) == len(make_steps(SD15_SCHEDULER, n - start, name))


@pytest.mark.parametrize("table,config", [("StableDiffusion", SD15_SCHEDULER), ("StableDiffusionXL", SDXL_SCHEDULER)])
def test_align_your_steps_equals_diffusers(table, config):
    from diffusers.schedulers import AysSchedules

    peer = peer_for("euler", RELEASED)
    peer.set_timesteps(sigmas=AysSchedules[table + "Sigmas"])
    steps = make_steps(config, 10, "euler", "ays")
    assert [step.sigma for step in steps] == peer.sigmas[:-1].tolist()
    assert [step.t for step in steps] == pytest.approx(peer.timesteps.tolist(), abs=1e-3)  # there in fp32
    published = AysSchedules[table + "Timesteps"]
    assert [step.t for step in steps] == pytest.approx(published, abs=1.0)
    assert [step.sigma for step in make_steps(config, 20, "euler", "ays")][::2] == pytest.approx(
        peer.sigmas[:-1].tolist()
    )


def test_explicit_levels_equal_diffusers():
    sigmas = [14.0, 5.5, 2.25, 0.7, 0.1]
    peer = peer_for("euler", RELEASED)
    peer.set_timesteps(sigmas=[*sigmas, 0.0])
    steps = make_steps(SD15_SCHEDULER, 0, "euler", sigma_list=sigmas)
    assert [step.t for step in steps] == pytest.approx(peer.timesteps.tolist(), abs=1e-3)
    assert [step.sigma for step in steps] == peer.sigmas[:-1].tolist()
    for name in ("euler", "heun", "dpmpp_2m"):
        peer = peer_for(name, RELEASED)
        peer.set_timesteps(timesteps=[999, 700, 300, 50])
        steps = make_steps(SD15_SCHEDULER, 0, name, timesteps=[999, 700, 300, 50])
        assert [step.t for step in steps] == peer.timesteps.tolist()
        assert [step.sigma for step in steps] == peer.sigmas[:-1].tolist()[: len(steps)]


# ------------------------------------------------------------------------------------------------------------------------
# k-diffusion, for what diffusers does not have


@lru_cache
def k_diffusion():
    """Its sampling.py alone: the package's __init__ imports torchvision and more."""
    spec = importlib.util.find_spec("k_diffusion")
    if spec is None:
        pytest.skip("k-diffusion is not installed")
    package = types.ModuleType("k_diffusion")
    package.__path__ = list(spec.submodule_search_locations)
    package.utils = types.ModuleType("k_diffusion.utils")
    package.utils.append_dims = lambda x, n: x[(...,) + (None,) * (n - x.ndim)]
    odeint = types.ModuleType("torchdiffeq")
    odeint.odeint = None
    stubs = {"k_diffusion": package, "k_diffusion.utils": package.utils, "torchdiffeq": odeint}
    with mock.patch.dict(sys.modules, stubs):
        return importlib.import_module("k_diffusion.sampling")


K_DIFFUSION = [
    ("dpmpp_2s_a", "sample_dpmpp_2s_ancestral", {}),
    ("dpmpp_2s_a", "sample_dpmpp_2s_ancestral", dict(eta=0.4, s_noise=1.1)),
    ("dpmpp_3m_sde", "sample_dpmpp_3m_sde", {}),
    ("dpmpp_3m_sde", "sample_dpmpp_3m_sde", dict(eta=0.0)),
    ("dpmpp_3m_sde", "sample_dpmpp_3m_sde", dict(eta=0.4, s_noise=1.1)),
    ("dpmpp_2m_sde", "sample_dpmpp_2m_sde", dict(eta=0.4, s_noise=1.1, solver="heun")),
    ("dpmpp_sde", "sample_dpmpp_sde", dict(eta=0.4, s_noise=1.1)),
    ("dpmpp_sde", "sample_dpmpp_sde", dict(eta=0.0)),
    ("euler_a", "sample_euler_ancestral", dict(eta=0.4, s_noise=1.1)),
    ("dpm2_a", "sample_dpm_2_ancestral", dict(eta=0.4, s_noise=1.1)),
    ("lms", "sample_lms", dict(order=3)),
]


@pytest.mark.parametrize("schedule", [None, "karras"])
@pytest.mark.parametrize("name,function,options", K_DIFFUSION, ids=lambda value: str(value))
def test_samplers_equal_k_diffusion(name, function, options, schedule):
    """In fp64, with a network that does not look at t."""
    levels = [step.sigma for step in make_steps(SD15_SCHEDULER, 20, "euler", schedule)]
    steps = make_steps(SD15_SCHEDULER, 0, name, sigma_list=levels, **options)
    noises = [noise.double() for noise in draws(17, 60)]
    ours = run_ours_without_t(steps, noises)

    def model(x, sigma):
        s = sigma[0]
        return x - s * network(x / (s**2 + 1).sqrt(), 0)

    fresh = iter(noises[1:])
    sampler = brownian(fresh) if name == "dpmpp_sde" else lambda *_: next(fresh)
    theirs = {"solver_type" if key == "solver" else key: value for key, value in options.items()}
    if name != "lms":
        theirs["noise_sampler"] = sampler
    x = initial(noises[0], steps) / steps[0].signal
    sigmas = torch.tensor([*levels, 0.0], dtype=torch.float64)
    expected = getattr(k_diffusion(), function)(model, x, sigmas, disable=True, **theirs)
    assert error(ours, expected) < (1e-6 if name == "dpm2_a" else 1e-9)  # dpm2_a: its middles are fp32, as diffusers'


def run_ours_without_t(steps, noises):
    start, fresh = initial(noises[0], steps), iter(noises[1:])
    return last(sample(denoiser(lambda z, step: network(z, 0)), start, steps, noise=lambda x: next(fresh)))


# ------------------------------------------------------------------------------------------------------------------------
# Theory: data ~ N(MU, S^2), for which the perfect network and the exact way down are known

MU, S = 0.7, 0.5


def gaussian_x0(x, step):
    """E[x0 | x], for x = signal * x0 + noise * n."""
    a, s = step.signal, step.noise
    return (x * (a * S**2) + MU * s**2) / (a**2 * S**2 + s**2)


def global_error(name, n, **options):
    """Distance from the exact flow after n moves from sigma 10 to sigma 0.2, levels even in log sigma."""
    levels = np.exp(np.linspace(math.log(10), math.log(0.2), n + 1)).tolist()
    steps = make_steps(SD15_SCHEDULER, 0, name, sigma_list=levels, **options)
    x = torch.tensor([-8.0, 3.0, 11.0], dtype=torch.float64).reshape(3, 1, 1, 1) * steps[0].signal

    def flow(x, start, end):  # the distance from the mean shrinks as the standard deviation of the noisy data
        return MU + (x - MU) * math.sqrt((S**2 + end**2) / (S**2 + start**2))

    exact = flow(x / steps[0].signal, steps[0].sigma, steps[-1].sigma)
    before_the_last = [x for _, x, _ in sample(gaussian_x0, x, steps)][-2]
    return (before_the_last / steps[-1].signal - exact).abs().max().item()


ORDERS = [
    ("ddim", {}, 1),
    ("euler", {}, 1),
    ("euler_a", dict(eta=0.0), 1),
    ("heun", {}, 2),
    ("dpm2", {}, 2),
    ("dpm2_a", dict(eta=0.0), 2),
    ("dpmpp_2s_a", dict(eta=0.0), 2),
    ("dpmpp_sde", dict(eta=0.0), 2),
    ("dpmpp_2m", {}, 2),
    ("dpmpp_2m", dict(solver="heun"), 2),
    ("dpmpp_2m", dict(order=1), 1),
    ("dpmpp_2m_sde", dict(eta=0.0), 2),
    ("unipc", dict(corrector=False), 2),
    ("unipc", dict(variant="bh1", corrector=False), 2),
    ("deis", {}, 2),
    ("deis", dict(order=1), 1),
    ("lms", dict(order=2), 2),
    ("lms", dict(order=1), 1),
    ("unipc", dict(order=1), 2),  # the corrector is worth one order
    ("unipc", {}, 3),
    ("dpmpp_3m_sde", dict(eta=0.0), 2),  # of order 3 but for its first step, whose error stays
    ("deis", dict(order=3), 2),  # likewise
]


@pytest.mark.parametrize("name,options,order", ORDERS, ids=lambda value: str(value))
def test_order_of_convergence_on_a_gaussian(name, options, order):
    """Twice the steps, 2^order less error."""
    coarse, fine = global_error(name, 100, **options), global_error(name, 200, **options)
    assert math.log2(coarse / fine) == pytest.approx(order, abs=0.2)


def consistent_x0(x, step):
    """Where the exact flow ends: what a distilled network predicts."""
    return MU + (x / step.signal - MU) * (S / math.sqrt(S**2 + step.sigma**2))


STOCHASTIC_OPTIONS = [  # methods of order 1 need more steps until their bias is lost in the interval
    ("ddpm", 400, {}),
    ("ddpm", 400, dict(variance="large")),
    ("ddim", 400, dict(eta=1.0)),
    ("euler_a", 400, {}),
    ("dpm2_a", 100, {}),
    ("dpmpp_2s_a", 100, {}),
    ("dpmpp_sde", 100, {}),
    ("dpmpp_2m_sde", 100, {}),
    ("dpmpp_3m_sde", 100, {}),
    ("lcm", 8, {}),
]


@pytest.mark.parametrize("name,n,options", STOCHASTIC_OPTIONS, ids=lambda value: str(value))
def test_stochastic_samplers_reproduce_mean_and_variance(name, n, options):
    """40,000 draws, within four standard errors. (Not tcd: with a perfect network its eps still depends on its x0.)"""
    steps = make_steps(SD15_SCHEDULER, n, name, None if name == "lcm" else "karras", **options)
    noise = Noise([5])
    start = add_noise(MU + S * noise.draw(1, 200, 200), noise.draw(1, 200, 200), steps[0])
    x = last(sample(consistent_x0 if name == "lcm" else gaussian_x0, start, steps, noise=noise))
    count = x.numel()
    assert x.mean().item() == pytest.approx(MU, abs=4 * S / math.sqrt(count))
    assert x.var().item() == pytest.approx(S**2, rel=4 * math.sqrt(2 / count))


def test_order_of_convergence_of_pndm_on_a_gaussian():
    """On its own evenly spaced timesteps, and so more slowly: order 2, that of its first move."""

    def error_of(n):
        steps = make_steps(SD15_SCHEDULER, n, "pndm")
        first, final = steps[0], steps[-1]
        x = torch.tensor([-1.5, 0.3, 2.0], dtype=torch.float64).reshape(3, 1, 1, 1)
        shrink = math.sqrt((S**2 + final.sigma**2) / (S**2 + first.sigma**2))
        exact = MU + (x / first.signal - MU) * shrink
        return ([x for _, x, _ in sample(gaussian_x0, x, steps)][-2] / final.signal - exact).abs().max().item()

    assert math.log2(error_of(160) / error_of(320)) == pytest.approx(2, abs=0.3)


def test_the_two_noises_of_dpmpp_sde_are_one_brownian_path():
    """Its second increment over [there, here] contains the first over [middle, here]: covariance and variance as such."""
    steps = make_steps(SD15_SCHEDULER, 10, "dpmpp_sde")
    first, second = steps[4], steps[5]  # the two looks of one level
    here, middle, there = first.sigma, second.sigma, steps[6].sigma
    # With x = x0 = 0 at the first look, x at the middle is its noise alone, and the second mean is the part carried over.
    zero = torch.zeros(1, dtype=torch.float64)
    middle_x = advance(zero, zero, first, (), zero + 1)
    carried, std = mean_std(middle_x, zero, second, [(zero, zero)])
    up = there * math.sqrt(1 - there**2 / here**2)
    share = (here - middle) / (here - there)
    assert carried.item() == pytest.approx(up * math.sqrt(share), rel=1e-12)
    assert std**2 + carried.item() ** 2 == pytest.approx(up**2, rel=1e-12)


# ------------------------------------------------------------------------------------------------------------------------
# What every sampler promises


@pytest.mark.parametrize("name", SAMPLERS)
def test_image_k_of_a_batch_is_bit_equal_to_the_image_alone(name):
    """Noise and arithmetic; an odd number of values per image, so that vectorised loops have remainders in different places."""
    seeds, shape = [11, 7, 23], (3, 5, 7)
    options = dict(eta=0.6) if name == "ddim" else dict(s_churn=2.0) if name == "euler" else {}
    for model in (SD15_SCHEDULER, SD2_V_SCHEDULER):
        steps = make_steps(model, 6, name, **options)

        def denoise(x, step):  # the network's own rounding is not the matter here: one image at a time
            return torch.stack([torch.tanh(image.clone() + step.t / 1500) for image in x])

        def run(seeds, steps=steps, denoise=denoise):
            noise = Noise(seeds)
            start = initial(noise.draw(*shape), steps)
            return [start, *(x for _, x, _ in sample(denoise, start, steps, noise=noise))]

        together = run(seeds)
        for k, seed in enumerate(seeds):
            assert all(torch.equal(a[k], b[0]) for a, b in zip(together, run([seed]), strict=True))


@pytest.mark.parametrize("name", SAMPLERS)
def test_advance_is_pure_and_draws_from_its_mean_and_std(name):
    steps = make_steps(SD15_SCHEDULER, 6, name)
    tensors = draws(29)
    x, x0, noise = tensors[:3]
    history = [(tensors[3 + 2 * k], tensors[4 + 2 * k]) for k in range(memory(steps))]
    before = [t.clone() for t in tensors[:20]]
    for step in steps:
        mean, std = mean_std(x, x0, step, history)
        out = advance(x, x0, step, history, noise)
        assert torch.equal(out, mean + noise * std)
        assert torch.equal(out, advance(x, x0, step, history, noise))
        if std:
            with pytest.raises(ConfigError, match="noise"):
                advance(x, x0, step, history)
    assert all(torch.equal(a, b) for a, b in zip(before, tensors[:20], strict=True))


def test_gradients_flow_through_the_loop():
    steps = make_steps(SD15_SCHEDULER, 4, "euler_a")
    weight = torch.tensor(0.7, requires_grad=True)
    start = initial(Noise([1]).draw(4, 8, 8), steps)
    last(sample(lambda x, step: x * weight, start, steps, noise=Noise([2]))).sum().backward()
    assert weight.grad.isfinite() and weight.grad != 0


def test_the_loop_keeps_no_state_outside_itself():
    """Two walks over the same steps, one step of each in turn, do not disturb each other."""
    steps = make_steps(SD15_SCHEDULER, 6, "unipc")
    xs = [initial(Noise([seed]).draw(4, 8, 8), steps) for seed in (1, 2)]
    apart = [last(sample(lambda z, s: torch.tanh(z), x, steps)) for x in xs]
    walks = [sample(lambda z, s: torch.tanh(z), x, steps) for x in xs]
    for pair in zip(*walks, strict=True):
        turns = pair
    assert all(torch.equal(a, b[1]) for a, b in zip(apart, turns, strict=True))
    assert torch.is_grad_enabled()


def test_edit_has_the_last_word_on_every_x():
    steps = make_steps(SD15_SCHEDULER, 4, "dpmpp_2m")
    entered, seen = [], []

    def edit(x, step):
        entered.append(step)
        return x * 0 + len(entered)

    def denoise(x, step):
        seen.append(x.mean().item())
        return x

    xs = [x.mean().item() for _, x, _ in sample(denoise, torch.zeros(SHAPE), steps, edit=edit)]
    assert entered == [*steps[1:], None] and seen == [0, 1, 2, 3] and xs == [1, 2, 3, 4]


def test_noise_is_diffusers_per_image_noise():
    from diffusers.utils.torch_utils import randn_tensor

    generators = [torch.Generator().manual_seed(seed) for seed in (3, 4)]
    noise = Noise([3, 4])
    for _ in range(2):
        assert torch.equal(noise.draw(4, 8, 8), randn_tensor((2, 4, 8, 8), generator=generators))
    assert noise(torch.zeros(2, 4, 8, 8, dtype=torch.bfloat16)).dtype == torch.bfloat16


@pytest.mark.parametrize("seeds", [[], [-1], [2**64], [1.0], [True], ["1"]], ids=str)
def test_refuses_what_is_no_seed(seeds):
    with pytest.raises(ConfigError, match="seed"):
        Noise(seeds)


def test_refuses_to_draw_without_noise_or_for_another_number_of_images():
    steps = make_steps(SD15_SCHEDULER, 4, "euler_a")
    with pytest.raises(ConfigError, match="noise"):
        next(sample(lambda x, step: pytest.fail("the network was asked first"), torch.zeros(SHAPE), steps))
    with pytest.raises(ConfigError, match="one seed per image"):
        next(sample(lambda x, step: x, torch.zeros(2, 4, 8, 8), steps, noise=Noise([1])))
