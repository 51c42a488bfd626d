"""Noise levels: the released tables, and the grids of every sampler family, equal to diffusers' bit by bit."""

from dataclasses import replace

import diffusers
import numpy as np
import pytest
import scipy.stats
import torch

from sdcore.errors import ConfigError
from sdcore.samplers import SAMPLERS, make_steps
from sdcore.scheduler import (
    DIFFUSION,
    EXPONENTIAL,
    KARRAS,
    LCM_SCHEDULER,
    SCHEDULES,
    SD2_SCHEDULER,
    SD2_V_SCHEDULER,
    SD15_INPAINT_SCHEDULER,
    SD15_SCHEDULER,
    SDXL_SCHEDULER,
    TURBO_SCHEDULER,
    X4_SCHEDULER,
    SchedulerConfig,
    alpha_bars,
    beta_quantile,
    betas,
    grid,
    sigmas,
    table_point,
)

OFFICIAL = {
    "sd15": SD15_SCHEDULER,
    "sd15-inpaint": SD15_INPAINT_SCHEDULER,
    "sd2": SD2_SCHEDULER,
    "sd2-v": SD2_V_SCHEDULER,
    "sdxl": SDXL_SCHEDULER,
    "turbo": TURBO_SCHEDULER,
    "lcm": LCM_SCHEDULER,
    "x4": X4_SCHEDULER,
}


def peer(config, cls=diffusers.DDIMScheduler, **options):
    spacing = {} if config.spacing is None else dict(timestep_spacing=config.spacing)
    return cls(
        beta_start=config.beta_start,
        beta_end=config.beta_end,
        beta_schedule=config.beta_schedule,
        prediction_type=config.prediction_type,
        steps_offset=config.steps_offset,
        **spacing,
        **options,
    )


@pytest.mark.parametrize("name", OFFICIAL)
def test_tables_equal_diffusers_bit_by_bit(name):
    config = OFFICIAL[name]
    assert torch.equal(betas(config), peer(config).betas)
    assert torch.equal(alpha_bars(config), peer(config).alphas_cumprod)


@pytest.mark.parametrize("kind", ["linear", "scaled_linear", "squaredcos_cap_v2"])
@pytest.mark.parametrize("zero_snr", [False, True])
def test_every_beta_schedule_equals_diffusers_bit_by_bit(kind, zero_snr):
    config = replace(SD15_SCHEDULER, beta_schedule=kind, zero_snr=zero_snr)
    other = peer(config, rescale_betas_zero_snr=zero_snr)
    assert torch.equal(alpha_bars(config), other.alphas_cumprod)
    assert not zero_snr or alpha_bars(config)[-1] == 0
    karras = peer(config, diffusers.EulerDiscreteScheduler, rescale_betas_zero_snr=zero_snr)
    assert sigmas(config)[::-1].tolist() == karras.sigmas[:-1].tolist()


def test_published_ends_of_the_tables():
    """Known figures of the released models; they were printed by programs that compute the table in fp64, 1.3e-5 off."""
    assert sigmas(SD15_SCHEDULER)[[0, -1]] == pytest.approx([0.0291672, 14.6146412], rel=2e-5)
    assert sigmas(X4_SCHEDULER)[[0, -1]] == pytest.approx([0.0100, 36.912], abs=1e-3)
    assert sigmas(replace(SD15_SCHEDULER, zero_snr=True))[-1] == 4096


def test_each_official_model_has_its_own_sampler():
    firsts = {name: (config.sampler, config.prediction_type, config.spacing) for name, config in OFFICIAL.items()}
    assert firsts == {
        "sd15": ("pndm", "epsilon", None),
        "sd15-inpaint": ("ddim", "epsilon", None),
        "sd2": ("pndm", "epsilon", None),
        "sd2-v": ("ddim", "v_prediction", None),
        "sdxl": ("euler", "epsilon", "leading"),
        "turbo": ("euler_a", "epsilon", "trailing"),
        "lcm": ("lcm", "epsilon", None),
        "x4": ("ddim", "v_prediction", None),
    }
    assert [step.t for step in make_steps(TURBO_SCHEDULER, 4)] == [999, 749, 499, 249]
    assert [step.t for step in make_steps(TURBO_SCHEDULER, 1)] == [999]
    assert [step.t for step in make_steps(LCM_SCHEDULER, 4)] == [999, 759, 499, 259]
    assert [step.t for step in make_steps(SDXL_SCHEDULER, 4)] == [751, 501, 251, 1]
    assert [step.t for step in make_steps(SD15_SCHEDULER, 4)] == [751, 501, 501, 251, 1]


FAMILIES = [
    (DIFFUSION, diffusers.DDIMScheduler),
    (KARRAS, diffusers.EulerDiscreteScheduler),
    (EXPONENTIAL, diffusers.DPMSolverMultistepScheduler),
]


@pytest.mark.parametrize("family,cls", FAMILIES, ids=["diffusion", "karras", "exponential"])
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_spacings_equal_diffusers_for_every_count(family, cls, spacing):
    other = peer(SD15_SCHEDULER, cls, timestep_spacing=spacing)
    for n in [*range(1, 60), 77, 100, 125, 333, 500, 700, 769, 998, 999]:
        other.set_timesteps(n)
        theirs = other.timesteps.tolist()
        if spacing == "trailing" and len(theirs) == n + 1:  # the rounding of its float range lets in a timestep -1
            assert theirs.pop() == -1
        if spacing == "leading" and theirs[0] > 999:  # beyond the table
            with pytest.raises(ConfigError, match="use fewer"):
                grid(SD15_SCHEDULER, n, family, spacing)
            continue
        assert [point.t for point in grid(SD15_SCHEDULER, n, family, spacing)[:-1]] == theirs, n


def test_sgm_uniform_is_even_in_timesteps_and_leaves_the_last_out():
    points = grid(SD15_SCHEDULER, 9, KARRAS, "sgm_uniform")
    assert [point.t for point in points[:-1]] == pytest.approx([999 * (1 - k / 9) for k in range(9)], rel=1e-6)
    log_table = np.log(sigmas(SD15_SCHEDULER).astype(float))
    expected = [
        np.exp(log_table[int(t)] * (1 - t % 1) + log_table[min(int(t) + 1, 999)] * (t % 1)) for t in (999.0, 777.0)
    ]
    assert [points[0].sigma, points[2].sigma] == pytest.approx(expected, rel=1e-6)
    whole = grid(SD15_SCHEDULER, 9, EXPONENTIAL, "sgm_uniform")
    assert all(point.t == round(point.t) for point in whole)
    assert [p.sigma for p in whole[:-1]] == pytest.approx(
        [sigmas(SD15_SCHEDULER)[int(p.t)] for p in whole[:-1]], rel=1e-6
    )


def test_quantiles_of_the_beta_distribution_equal_scipy():
    for p in [0.0, 1e-8, 1e-4, 0.01, *np.linspace(0.05, 1, 20)]:
        assert beta_quantile(float(p)) == pytest.approx(scipy.stats.beta.ppf(p, 0.6, 0.6), rel=1e-13)


def test_table_point_below_the_table():
    clean = table_point(replace(SD15_SCHEDULER, set_alpha_to_one=True), -1)
    assert (clean.alpha_bar, clean.sigma) == (1.0, 0.0)
    assert table_point(SD15_SCHEDULER, -1).alpha_bar == table_point(SD15_SCHEDULER, 0).alpha_bar


@pytest.mark.parametrize("n", [0, -1, 2.5, True, 1001, "20", None, float("nan")])
@pytest.mark.parametrize("sampler", ["ddim", "euler", "dpmpp_2m", "lcm"])
def test_refuses_impossible_counts(n, sampler):
    with pytest.raises(ConfigError, match="steps"):
        make_steps(SD15_SCHEDULER, n, sampler)


def test_refuses_unknown_names_and_says_the_nearest():
    for wrong, near in (("dpmpp2m", "dpmpp_2m"), ("eular", "euler"), ("DDIM", "ddim"), ("unipcm", "unipc")):
        with pytest.raises(ConfigError, match=near):
            make_steps(SD15_SCHEDULER, 20, wrong)
    with pytest.raises(ConfigError, match="choose one of"):
        make_steps(SD15_SCHEDULER, 20, "zzz")
    with pytest.raises(ConfigError, match="karras"):
        make_steps(SD15_SCHEDULER, 20, "euler", "karas")
    with pytest.raises(ConfigError, match="s_churn"):
        make_steps(SD15_SCHEDULER, 20, "euler", churn=1.0)
    with pytest.raises(ConfigError, match="midpoint"):
        make_steps(SD15_SCHEDULER, 20, "dpmpp_2m", solver="middpoint")
    with pytest.raises(ConfigError, match="v_prediction"):
        make_steps(replace(SD15_SCHEDULER, prediction_type="v-prediction"), 20)
    with pytest.raises(ConfigError, match="scaled_linear"):
        make_steps(replace(SD15_SCHEDULER, beta_schedule="scaled"), 20)


@pytest.mark.parametrize(
    "arguments",
    [
        dict(sampler="euler", s_churn=-1.0),
        dict(sampler="euler", s_churn="1"),
        dict(sampler="euler_a", eta=float("nan")),
        dict(sampler="ddim", eta=1.5),
        dict(sampler="tcd", n=4, eta=1.5),
        dict(sampler="dpmpp_2m", order=4),
        dict(sampler="dpmpp_2m", order=0),
        dict(sampler="dpmpp_2m", lower_order_final=1),
        dict(sampler="pndm", schedule="karras"),
        dict(sampler="lcm", schedule="karras"),
        dict(sampler="lcm", n=51),
        dict(sampler="euler", start=20),
        dict(sampler="euler", start=-1),
        dict(sampler="euler", start=True),
        dict(sampler="euler", final_sigma="tiny"),
        dict(sampler="euler", sigma_list=[1.0, 2.0]),
        dict(sampler="euler", sigma_list=[]),
        dict(sampler="euler", sigma_list=[float("nan")]),
        dict(sampler="euler", timesteps=[1500, 3]),
        dict(sampler="euler", timesteps=[500, 500]),
        dict(sampler="euler", config=replace(SD15_SCHEDULER, beta_start=0.5, beta_end=0.1)),
        dict(sampler="euler", config=replace(SD15_SCHEDULER, spacing="even")),
        dict(sampler="euler", config=replace(SD15_SCHEDULER, ays="sd3")),
        dict(sampler="pndm", config=replace(SD15_SCHEDULER, prediction_type="sample")),
        dict(sampler="pndm", n=3, config=replace(SD15_SCHEDULER, skip_prk_steps=False)),
    ],
    ids=str,
)
def test_refuses_what_has_no_meaning(arguments):
    arguments = dict(config=SD15_SCHEDULER, n=20) | arguments
    with pytest.raises(ConfigError):
        make_steps(**arguments)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler_takes_every_count_and_schedule_it_offers(sampler):
    schedules = {"distilled": [None], "even": [None, "leading", "trailing", "linspace"], "any": [None, *SCHEDULES]}
    for schedule in schedules[SAMPLERS[sampler].points]:
        for n in (1, 2, 3, 10):
            steps = make_steps(SDXL_SCHEDULER, n, sampler, schedule)
            numbers = [v for s in steps for v in (s.t, s.sigma, s.std, s.start_scale, *np.ravel(s.weights))]
            assert np.isfinite(numbers).all() and all(len(s.weights) for s in steps)
            assert [s.i for s in steps] == list(range(len(steps)))
            assert n <= len(steps) <= max(2 * n - 1, 1) if sampler != "pndm" else len(steps) == n + (n > 1)


@pytest.mark.parametrize("sampler", [name for name in SAMPLERS if SAMPLERS[name].points == "any"])
@pytest.mark.parametrize("end", ["zero", "sigma_min"])
def test_every_sampler_takes_both_ends(sampler, end):
    for schedule in (None, "karras"):
        steps = make_steps(SD15_SCHEDULER, 10, sampler, schedule, final_sigma=end)
        assert np.isfinite([v for s in steps for v in (s.std, *np.ravel(s.weights))]).all()


def test_a_step_is_made_of_python_numbers():
    for sampler in SAMPLERS:
        for step in make_steps(SchedulerConfig(), 4, sampler):
            values = [v for k, v in vars(step).items() if k not in ("i", "weights")] + [
                v for w in step.weights for v in w
            ]
            assert {type(v) for v in values} == {float}, sampler
