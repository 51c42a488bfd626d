"""Guidance: what the network is asked, how its answers are mixed, and what x0 they amount to."""

import math
from dataclasses import replace

import diffusers
import numpy as np
import pytest
import torch
from diffusers.guiders.adaptive_projected_guidance import normalized_guidance

import sdcore
from sdcore import lora
from sdcore.changes import LowRank
from sdcore.errors import ConfigError
from sdcore.guidance import Guidance, denoiser, orthogonal, rescaled, to_x0
from sdcore.samplers import add_noise, make_steps, sample
from sdcore.scheduler import SD2_V_SCHEDULER, SD15_SCHEDULER
from sdcore.variants import freeu, perturbed
from tests import tiny_models

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


# ------------------------------------------------------------------------------------------------ APG


@pytest.mark.parametrize("longest", [3.0, 15.0, math.inf])
def test_the_projection_is_diffusers(longest):
    clean, difference = latents(), latents().roll(1, -1) * torch.tensor([0.3, 3.0]).reshape(2, 1, 1, 1)
    limit = 0.0 if longest == math.inf else longest  # 0 is diffusers' word for no limit
    want = normalized_guidance(
        clean + difference, clean, 1.0, None, 0.0, limit
    )  # one of two answers to tell the sign by
    ours = clean + orthogonal(difference, clean + difference, longest)
    assert torch.allclose(ours, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("config", [SD15_SCHEDULER, SD2_V_SCHEDULER], ids=["epsilon", "v"])
def test_apg_is_the_papers_in_clean_latents(config):
    """2410.02416, algorithm 1: D = D_c + (w - 1) (Δ - the part of Δ along D_c), Δ = D_c - D_u cut to its longest norm."""

    def network(x, step):  # answers that point in different directions
        return torch.cat([x[:2].roll(1, -1) * 0.4, torch.tanh(x[2:])])

    for step in make_steps(config, 10, "ddim")[1::4]:
        x = latents()
        uncond, cond = (to_x0(x, out, step) for out in network(torch.cat([x, x]), step).chunk(2))
        for k, got in enumerate(denoiser(network, guidance=Guidance(9.0, apg=4.0))(x, step)):
            c, u = cond[k].numpy(), uncond[k].numpy()
            delta = (c - u) * min(1.0, 4.0 / np.linalg.norm(c - u))
            want = c + 8.0 * (delta - (delta * c).sum() / (c * c).sum() * c)
            assert np.allclose(got.numpy(), want, rtol=1e-10, atol=1e-10)


# ------------------------------------------------------------------------------------------------ CFG++


def waves(x, step):
    """A network of two answers that differ in more than size."""
    t = step.t / 1500
    return torch.cat([torch.tanh(0.5 * x[:2] + t), torch.tanh(0.9 * x[2:].roll(1, -1) - t)])


@pytest.mark.parametrize("config", [SD15_SCHEDULER, SD2_V_SCHEDULER], ids=["epsilon", "v"])
def test_cfg_plus_plus_is_the_papers_ddim(config):
    """2406.08070, algorithm 2: x' = signal' x0_guided + noise' eps_negative, in fp64."""
    steps, x = make_steps(config, 10, "ddim"), latents()
    walk = sample(denoiser(waves, guidance=Guidance(0.6, plus_plus=True)), x, steps)
    for (step, after, _), end in zip(walk, [*steps[1:], None], strict=True):
        negative, positive = (to_x0(x, out, step) for out in waves(torch.cat([x, x]), step).chunk(2))
        eps = (x - step.signal * negative) / step.noise
        a = end.alpha_bar if end else float(sdcore.scheduler.levels(config)[0])
        x = math.sqrt(a) * (negative + 0.6 * (positive - negative)) + math.sqrt(1 - a) * eps
        assert torch.allclose(after, x, rtol=1e-9, atol=1e-9)


def test_cfg_plus_plus_with_euler_is_that_of_ddim():
    """Euler is ddim with x divided by signal, so they end at the same clean latent; euler's sigmas are rounded to fp32."""
    ends = []
    for name in ("ddim", "euler"):
        steps = make_steps(replace(SD15_SCHEDULER, set_alpha_to_one=True), 10, name, "leading")
        start = latents() * math.sqrt(1 if name == "euler" else steps[0].alpha_bar)
        ends.append(
            [x for _, x, _ in sample(denoiser(waves, guidance=Guidance(0.6, plus_plus=True)), start, steps)][-1]
        )
    assert torch.allclose(ends[0], ends[1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "euler", "euler_a", "tcd"])
def test_cfg_plus_plus_knows_the_samplers_that_it_is_defined_for(sampler):
    Guidance(0.6, plus_plus=True).check(make_steps(SD15_SCHEDULER, 8, sampler))


@pytest.mark.parametrize("sampler", ["lms", "pndm", "heun", "dpm2", "dpmpp_2m", "dpmpp_2s_a", "unipc", "deis", "lcm"])
def test_cfg_plus_plus_refuses_other_samplers(sampler):
    steps = make_steps(SD15_SCHEDULER, 8, sampler)
    with pytest.raises(ConfigError, match="ddim"):
        Guidance(0.6, plus_plus=True).check(steps)
    Guidance(7.5).check(steps)


# ------------------------------------------------------------------------------------------------ twins: PAG and FreeU

PROMPT = "a red circle above a blue square"


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Family -> (our pipeline on a small random model, its folder), made on first use. Latents of 16 x 16: a middle of more than
    one token, or there would be nothing to perturb."""
    root, made = tmp_path_factory.mktemp("models"), {}

    def model(family):
        if family not in made:
            folder = tiny_models.write_folder(root / family, family, sample_size=16)
            made[family] = sdcore.load(str(folder), device="cpu"), folder
        return made[family]

    return model


def drawn_by_diffusers(name, folder, prepare=lambda pipe: None, **options):
    kind = getattr(diffusers, name)
    pipe = kind.from_pretrained(folder, **({"add_watermarker": False} if "XL" in name else {"safety_checker": None}))
    pipe.set_progress_bar_config(disable=True)
    prepare(pipe)
    noise = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(3))
    return noise, pipe(PROMPT, num_inference_steps=3, latents=noise, output_type="latent", **options).images


def both_draw(pipe, want, *args, **options):
    """Plain and accelerated, the pipeline draws these latents."""
    for one in (pipe, sdcore.accelerate(pipe)):
        got = one(*args, **options)
        assert (got.latents - want).abs().max() < 1e-4
        assert (got.pixels - pipe.decode(want)).abs().max() <= 2 / 255  # of -1..1: one step of 255


@pytest.mark.parametrize("scale", [3.0, 0.0], ids=["guided", "alone"])
@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_pag_equals_diffusers(models, family, scale):
    ours, folder = models(family)
    name = {"sd1": "StableDiffusionPAGPipeline", "sdxl": "StableDiffusionXLPAGPipeline"}[family]
    noise, want = drawn_by_diffusers(name, folder, guidance_scale=scale, pag_scale=2.0)
    _, without = drawn_by_diffusers(name, folder, guidance_scale=scale, pag_scale=0.0)
    assert (want - without).abs().max() > 0.01  # it does something: a hundred times what rounding may do
    both_draw(ours, want, PROMPT, noise=noise, steps=3, guidance=Guidance(scale, pag=2.0))


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_freeu_equals_diffusers(models, family):
    ours, folder = models(family)
    factors = dict(s1=0.9, s2=0.2, b1=1.3, b2=1.4)
    name = {"sd1": "StableDiffusionPipeline", "sdxl": "StableDiffusionXLPipeline"}[family]
    noise, want = drawn_by_diffusers(name, folder, lambda pipe: pipe.enable_freeu(**factors), guidance_scale=3.0)
    _, without = drawn_by_diffusers(name, folder, guidance_scale=3.0)
    assert (want - without).abs().max() > 0.01
    both_draw(replace(ours, unet=freeu(ours.unet, **factors)), want, PROMPT, noise=noise, steps=3, guidance=3.0)


@torch.no_grad()
@pytest.mark.parametrize("variant", [perturbed, freeu])
def test_a_twin_shares_everything_and_leaves_the_unet_as_it_is(models, variant):
    """Parameters are the same objects; adapters that come, and go, act on both."""
    unet = models("sd1")[0].unet
    g = torch.Generator().manual_seed(0)
    x, context = torch.randn(1, 4, 16, 16, generator=g), torch.randn(1, 24, unet.config.context_dim, generator=g)

    def seen(net):
        return net(x, torch.tensor([500]), context)

    before, twin = seen(unet), variant(unet)
    other = seen(twin)
    ours, theirs = dict(unet.named_parameters()), dict(twin.named_parameters())
    assert list(ours) == list(theirs) and all(theirs[name] is p for name, p in ours.items())
    assert torch.equal(seen(unet), before) and not torch.allclose(other, before, atol=1e-3)
    layer = "mid_block.attentions.0.transformer_blocks.0.attn1.to_v"
    width = unet.get_submodule(layer).weight.shape[0]
    change = LowRank(torch.randn(2, width, generator=g), torch.randn(width, 2, generator=g))
    with lora.using({"unet": twin}, lora.Adapter("style", {"unet": {layer: change}})):
        assert not torch.equal(seen(unet), before) and not torch.equal(seen(twin), other)
        assert lora.strengths({"unet": unet}) == {"style": 1.0}
    assert torch.equal(seen(unet), before) and torch.equal(seen(twin), other)


def test_pag_is_asked_of_the_positive_conditions_inside_the_interval():
    network, blind, x = answers_of(0.7, 1.9), answers_of(1.1), latents()
    denoise = denoiser(network, guidance=Guidance(7.5, pag=2.0, interval=(0.5, 5.0)), perturbed=blind)
    inside = [step for step in STEPS if 0.5 <= step.sigma <= 5.0]
    for step in STEPS:
        x0 = denoise(x, step)
        factor = 0.7 + 7.5 * (1.9 - 0.7) + 2.0 * (1.9 - 1.1) if step in inside else 1.9
        assert torch.allclose(x0, x - step.sigma * x * step.input_scale * factor, rtol=1e-12)
    assert blind.asked == [2] * len(inside)


def test_pag_needs_its_network_and_one_prompt():
    with pytest.raises(ConfigError, match="perturbed"):
        denoiser(Recorder(), guidance=Guidance(7.5, pag=3.0))
    with pytest.raises(ConfigError, match="AND"):
        denoiser(Recorder(), guidance=Guidance(7.5, pag=3.0), perturbed=Recorder(), shares=[0.5, 0.5])


@pytest.mark.parametrize("factors", [dict(b1=0.0), dict(s2=-1.0), dict(s1=float("nan")), dict(b2=math.inf)], ids=str)
def test_freeu_refuses_what_is_no_factor(models, factors):
    with pytest.raises(ConfigError, match=next(iter(factors))):
        freeu(models("sd1")[0].unet, **factors)


# ------------------------------------------------------------------------------------------------ refusals


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
