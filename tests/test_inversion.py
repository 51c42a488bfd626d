"""DDIM inversion: against diffusers' inverse scheduler, against theory, and back again on the bundled model."""

from dataclasses import replace

import diffusers
import pytest
import torch

import sdcore
from sdcore.errors import ConfigError
from sdcore.guidance import denoiser
from sdcore.samplers import make_steps, sample
from sdcore.scheduler import SD2_V_SCHEDULER, SD15_SCHEDULER

RELEASED = dict(
    beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", num_train_timesteps=1000, clip_sample=False,
    set_alpha_to_one=False, steps_offset=1, timestep_spacing="leading",
)  # fmt: skip


def network(x, t):
    """Stands in for a UNet: smooth, bounded, nonlinear, and neighbours mix."""
    return torch.tanh(0.5 * x + 0.2 * x.roll(1, -1) + float(t) / 1500) * 1.1


def clean():
    return torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def walked(steps, x, ask=network):
    """Every x of a walk."""
    return [after for _, after, _ in sample(denoiser(lambda z, step: ask(z, step.t)), x, steps)]


@pytest.mark.parametrize("to_one", [False, True])
@pytest.mark.parametrize("spacing", ["leading", "trailing"])
@pytest.mark.parametrize("config", [SD15_SCHEDULER, SD2_V_SCHEDULER], ids=["epsilon", "v"])
@pytest.mark.parametrize("n", [7, 50])
def test_equals_diffusers(n, config, spacing, to_one):
    """In fp64, with diffusers' tables turned to it: to rounding."""
    peer = diffusers.DDIMInverseScheduler.from_config(
        RELEASED | dict(prediction_type=config.prediction_type, timestep_spacing=spacing, set_alpha_to_one=to_one)
    )
    peer.set_timesteps(n)
    peer.alphas_cumprod, peer.initial_alpha_cumprod = peer.alphas_cumprod.double(), peer.initial_alpha_cumprod.double()
    x, theirs = clean(), []
    for t in peer.timesteps:
        x = peer.step(network(x, t), t, x).prev_sample
        theirs.append(x)
    steps = make_steps(replace(config, set_alpha_to_one=to_one), n, "ddim_inverse", spacing)
    assert [step.t for step in steps] == peer.timesteps.tolist()
    for ours, want in zip(walked(steps, clean()), theirs, strict=True):
        assert ((ours - want).abs().max() / want.abs().max()).item() < 1e-12


def way_back(n, start=0):
    noise = walked(make_steps(SD15_SCHEDULER, n, "ddim_inverse", start=start), clean())[-1]
    again = walked(make_steps(SD15_SCHEDULER, n, "ddim", start=start), noise)[-1]
    return ((again - clean()).abs().max() / clean().abs().max()).item()


def test_there_and_back_is_exact_as_steps_grow_small():
    """Of order 1: five times the steps, a fifth of the error."""
    errors = [way_back(n) for n in (20, 100, 500)]
    assert errors[0] / errors[1] == pytest.approx(5, rel=0.3) and errors[1] / errors[2] == pytest.approx(5, rel=0.3)


def test_half_the_way_and_back_is_closer():
    """`start` leaves out the noisiest levels of both: an edit that keeps more."""
    steps = make_steps(SD15_SCHEDULER, 20, "ddim_inverse", start=10)
    assert [step.t for step in steps] == [step.t for step in make_steps(SD15_SCHEDULER, 20, "ddim", start=10)][::-1]
    assert way_back(20, start=10) < way_back(20)


@torch.no_grad()
def test_the_bundled_model_draws_its_picture_again_from_the_inverted_noise():
    """A picture that it drew, to noise and back without guidance. At 50 steps latents come back to 6 % (5/255 a pixel), at 200 to
    1.3 % (0.4/255): closer by the factor by which there are more steps."""
    pipe, prompt = sdcore.load("tiny"), "a red circle above a blue square"
    drawn = pipe(prompt, steps=25, guidance=3, seed=1, output="latent").latents

    def there_and_back(n):
        options = dict(steps=n, guidance=1.0, output="latent")
        noise = pipe(prompt, sampler="ddim_inverse", noise=drawn, **options).latents
        assert not torch.allclose(noise, drawn, atol=0.5)
        return pipe(prompt, sampler="ddim", noise=noise, **options).latents

    again, closer = there_and_back(50), there_and_back(200)
    assert (again - drawn).norm() < 0.06 * drawn.norm()
    assert (pipe.decode(closer) - pipe.decode(drawn)).abs().mean() / 2 < 1 / 255
    assert (again - drawn).norm() / (closer - drawn).norm() == pytest.approx(4, rel=0.3)


def test_refuses_a_model_that_predicts_the_sample():
    with pytest.raises(ConfigError, match="ddim_inverse"):
        make_steps(replace(SD15_SCHEDULER, prediction_type="sample"), 20, "ddim_inverse")
