"""Guidance: what the network is asked, how its answers are mixed, and what x0 they amount to."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from sdcore.errors import ConfigError
from sdcore.guidance import Guidance, denoiser, rescaled, to_x0
from sdcore.samplers import add_noise, make_steps
from sdcore.scheduler import SD15_SCHEDULER

STEPS = make_steps(SD15_SCHEDULER, 10, "euler")


class Recorder:
    """A network that answers `negative` and `positive` constants times its input, and remembers what it was asked."""

    def __init__(self, negative=1.0, positive=2.0, dtype=None):
        self.negative, self.positive, self.dtype, self.asked = negative, positive, dtype, []

    def __call__(self, x, step):
        self.asked.append((x.clone(), step))
        half = len(x) // 2 if len(x) == 4 else 0
        out = torch.cat([x[:half] * self.negative, x[half:] * self.positive])
        return out.to(self.dtype) if self.dtype else out


def latents():
    return torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_both_conditions_go_in_one_batch_the_negative_ones_first():
    network, x, step = Recorder(), latents(), STEPS[3]
    x0 = denoiser(network, guidance=7.5)(x, step)
    (asked, told), entry = network.asked[0], x * step.input_scale
    assert told is step and torch.equal(asked, torch.cat([entry, entry]))
    output = entry + 7.5 * (2 * entry - entry)
    assert torch.allclose(x0, x - step.sigma * output, rtol=1e-12)
    assert step.input_scale == pytest.approx(1 / math.sqrt(step.sigma**2 + 1))


@pytest.mark.parametrize("guidance", [1.0, 0.5, 0.0, -2.0])
def test_guidance_of_one_and_below_asks_once(guidance):
    network, x, step = Recorder(), latents(), STEPS[3]
    x0 = denoiser(network, guidance=guidance)(x, step)
    assert [len(asked) for asked, _ in network.asked] == [2]
    assert torch.allclose(x0, x - step.sigma * 2 * x * step.input_scale, rtol=1e-12)


def test_guidance_acts_inside_its_interval_of_sigmas_only():
    network = Recorder()
    denoise = denoiser(network, guidance=Guidance(3.0, interval=(0.5, 5.0)))
    for step in STEPS:
        denoise(latents(), step)
    doubled = [len(asked) == 4 for asked, _ in network.asked]
    assert doubled == [0.5 <= step.sigma <= 5.0 for step in STEPS] and any(doubled) and not all(doubled)


def test_rescale_restores_the_standard_deviation_of_the_positive_output_image_by_image():
    generator = torch.Generator().manual_seed(1)
    positive = torch.randn(3, 4, 8, 8, generator=generator) * torch.tensor([1.0, 2.0, 5.0]).reshape(3, 1, 1, 1)
    guided = positive * 3 + torch.randn(3, 4, 8, 8, generator=generator)
    full, half = rescaled(guided, positive, 1.0), rescaled(guided, positive, 0.5)
    assert torch.allclose(full.std(dim=(1, 2, 3)), positive.std(dim=(1, 2, 3)), rtol=1e-5)
    for k in range(3):  # the formula of the paper, by numpy
        g, p = guided[k].numpy().astype(float), positive[k].numpy().astype(float)
        expected = 0.5 * g * (p.std(ddof=1) / g.std(ddof=1)) + 0.5 * g
        assert np.allclose(half[k].numpy(), expected, rtol=1e-5)
    assert torch.equal(rescaled(guided, positive, 0.0), guided)


def test_rescale_is_of_the_guided_output_not_of_x0():
    network, x, step = Recorder(negative=-1.0), latents(), STEPS[3]
    entry = x * step.input_scale
    guided = -entry + 4.0 * (2 * entry + entry)
    x0 = denoiser(network, guidance=Guidance(4.0, rescale=0.7))(x, step)
    assert torch.allclose(x0, x - step.sigma * rescaled(guided, 2 * entry, 0.7), rtol=1e-12)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("sampler", ["euler", "dpmpp_2m", "ddim"])
def test_a_perfect_prediction_gives_back_the_clean_latent(prediction, sampler):
    """In both spaces, with v = sqrt(alpha_bar) eps - sqrt(1 - alpha_bar) x0 of the latent as the network sees it."""
    clean, noise = latents(), latents().flip(0)
    for step in make_steps(replace(SD15_SCHEDULER, prediction_type=prediction), 10, sampler):
        x = add_noise(clean, noise, step)
        a, s = math.sqrt(1 / (step.sigma**2 + 1)), step.sigma / math.sqrt(step.sigma**2 + 1)
        output = {"epsilon": noise, "v_prediction": a * noise - s * clean, "sample": clean}[prediction]
        assert torch.allclose(to_x0(x, output, step), clean, rtol=1e-9, atol=1e-9)
        assert torch.allclose(x * step.input_scale, a * clean + s * noise, rtol=1e-9, atol=1e-9)


def test_the_arithmetic_stays_in_the_precision_of_x():
    x, step = latents().float(), STEPS[0]
    x0 = denoiser(Recorder(negative=0.3, positive=0.7, dtype=torch.bfloat16), guidance=5.0)(x, step)
    entry = x * step.input_scale
    negative, positive = (entry * 0.3).bfloat16().float(), (entry * 0.7).bfloat16().float()
    assert x0.dtype == torch.float32
    assert torch.equal(x0, to_x0(x, negative + 5.0 * (positive - negative), step))


# ------------------------------------------------------------------------------------------------ towards a picture


def answers_of(*constants):
    """A network that answers so many constants times its input, row by row of the batch, and remembers how many it was asked."""

    def network(x, step):
        asked.append(len(x))
        parts = x.chunk(len(x) // 2)
        return torch.cat([part * c for part, c in zip(parts, constants[-len(parts) :], strict=True)])

    asked = []
    network.asked = asked
    return network


def test_two_guidances_are_those_of_instruct_pix2pix():
    """2211.09800 eq. 3: e(0, 0) + s_I (e(I, 0) - e(0, 0)) + s_T (e(I, T) - e(I, 0)); the three in this order in one batch."""
    network, x, step = answers_of(0.3, 0.7, 1.9), latents(), STEPS[3]
    x0 = denoiser(network, guidance=Guidance(7.5, image=1.5))(x, step)
    output = x * step.input_scale * (0.3 + 1.5 * (0.7 - 0.3) + 7.5 * (1.9 - 0.7))
    assert network.asked == [6]
    assert torch.allclose(x0, x - step.sigma * output, rtol=1e-12)


def test_a_guidance_towards_a_picture_of_one_is_the_plain_one():
    x, step = latents(), STEPS[3]
    plain = denoiser(answers_of(0.7, 1.9), guidance=7.5)(x, step)
    assert torch.allclose(
        denoiser(answers_of(0.3, 0.7, 1.9), guidance=Guidance(7.5, image=1.0))(x, step), plain, rtol=1e-12
    )


def test_a_guidance_towards_a_picture_keeps_to_scale_and_interval():
    """As diffusers, it is off where the text's is: then the positive answer alone is asked for."""
    network = answers_of(0.3, 0.7, 1.9)
    denoiser(network, guidance=Guidance(1.0, image=1.5))(latents(), STEPS[3])
    denoise = denoiser(network, guidance=Guidance(3.0, image=1.5, interval=(0.5, 5.0)))
    for step in STEPS:
        denoise(latents(), step)
    assert network.asked == [2] + [6 if 0.5 <= step.sigma <= 5.0 else 2 for step in STEPS]


def test_several_prompts_are_composed_before_they_are_guided_towards_a_picture():
    network, x, step = answers_of(0.3, 0.7, 1.9, 1.1), latents(), STEPS[3]
    x0 = denoiser(network, guidance=Guidance(7.5, image=1.5), shares=[0.6, 0.5])(x, step)
    text = 0.6 * (1.9 - 0.7) + 0.5 * (1.1 - 0.7)
    output = x * step.input_scale * (0.3 + 1.5 * (0.7 - 0.3) + 7.5 * text)
    assert torch.allclose(x0, x - step.sigma * output, rtol=1e-12)


@pytest.mark.parametrize(
    "arguments",
    [
        dict(rescale=-0.1),
        dict(rescale=1.5),
        dict(rescale=float("nan")),
        dict(interval=(2.0, 1.0)),
        dict(interval=(-1.0, 1.0)),
        dict(interval=(float("nan"), 1.0)),
        dict(scale=float("nan")),
        dict(scale=math.inf),
        dict(scale=True),
        dict(scale="7.5"),
        dict(image=0.9),
        dict(image=float("nan")),
        dict(pag=-1.0),
        dict(pag=math.inf),
        dict(apg=0.0),
        dict(apg=float("nan")),
        dict(apg=15.0, plus_plus=True),
        dict(apg=15.0, rescale=0.5),
        dict(apg=15.0, image=1.5),
        dict(plus_plus=True, pag=3.0),
    ],
    ids=str,
)
def test_refuses_what_has_no_meaning(arguments):
    with pytest.raises(ConfigError):
        Guidance(**arguments)
