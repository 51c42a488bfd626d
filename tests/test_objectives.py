"""Objectives against their formulas, written out here once more in numpy and fp64."""

import dataclasses

import numpy as np
import pytest
import torch
from scipy import stats
from sdcore.train import objectives as ob

from sdcore.errors import ConfigError
from sdcore.scheduler import SD2_V_SCHEDULER, SD15_SCHEDULER, alpha_bars

T = [0, 1, 17, 250, 500, 801, 998, 999]


def latents(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(len(T), *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def bars(zero: bool) -> np.ndarray:
    """alpha_bar of every timestep from the papers' formulas, fp64."""
    root = np.sqrt(np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2))
    if zero:
        root = (root - root[-1]) * root[0] / (root[0] - root[-1])
    return root**2


def clean(prediction: str, x_t, said, a):
    """The clean latent that a prediction amounts to."""
    if prediction == "epsilon":
        return (x_t - np.sqrt(1 - a) * said) / np.sqrt(a)
    return said if prediction == "sample" else np.sqrt(a) * x_t - np.sqrt(1 - a) * said


@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_every_prediction_and_its_min_snr_weight(prediction, zero):
    """A perfect prediction amounts to the clean latent; a wrong one counts min(snr, 5) times its error of the clean latent."""
    a = bars(zero)[T]
    x0, noise, wrong = (latents(4, 3, 5, seed=s).numpy() for s in range(3))
    found = ob.noised(torch.tensor(x0), torch.tensor(noise), torch.tensor(a)).numpy()
    each = a.reshape(-1, 1, 1, 1)
    np.testing.assert_allclose(found, np.sqrt(each) * x0 + np.sqrt(1 - each) * noise, rtol=1e-12, atol=1e-12)
    said = ob.target(prediction, torch.tensor(x0), torch.tensor(noise), torch.tensor(a)).numpy()
    weights = ob.min_snr(prediction, torch.tensor(a), 5.0).numpy()
    assert np.isfinite(weights).all()
    for i, bar in enumerate(a):
        if bar == 0:  # pure noise: the limit of the formula
            assert weights[i] == {"epsilon": 1, "v_prediction": 0, "sample": 0}[prediction]
            continue
        snr = bar / (1 - bar)
        formula = {"epsilon": min(snr, 5) / snr, "v_prediction": min(snr, 5) / (snr + 1), "sample": min(snr, 5)}[
            prediction
        ]
        np.testing.assert_allclose(weights[i], formula, rtol=1e-9)
        np.testing.assert_allclose(clean(prediction, found[i], said[i], bar), x0[i], rtol=0, atol=1e-8)
        off = clean(prediction, found[i], said[i] + wrong[i], bar) - x0[i]
        np.testing.assert_allclose(weights[i] * (wrong[i] ** 2).sum(), min(snr, 5) * (off**2).sum(), rtol=1e-6)


def test_zero_terminal_snr_of_the_table():
    """The table that --zero-snr chooses, against algorithm 1 of the paper."""
    found = alpha_bars(dataclasses.replace(SD2_V_SCHEDULER, zero_snr=True)).double().numpy()
    np.testing.assert_allclose(np.sqrt(found), np.sqrt(bars(True)), rtol=0, atol=3e-6)  # the table's sums are fp32
    assert found[-1] == 0 and found[0] == pytest.approx(bars(False)[0], rel=1e-6)


@pytest.mark.parametrize("schedule", ["constant", "exponential", "snr"])
def test_huber(schedule):
    a, t = torch.tensor(bars(True)[T]), torch.tensor(T)
    found, wanted = latents(4, 3, 5, seed=1), latents(4, 3, 5, seed=2)
    delta = ob.huber_delta(0.1, schedule, a, t, 1000)
    error = ob.huber(found, wanted, delta).numpy()
    for i in range(len(T)):
        with np.errstate(divide="ignore"):
            sigma = np.sqrt((1 - bars(True)[T[i]]) / bars(True)[T[i]])
        d = {"constant": 0.1, "exponential": np.exp(np.log(0.1) * T[i] / 1000), "snr": 0.9 / (1 + sigma) ** 2 + 0.1}[
            schedule
        ]
        e = (found[i] - wanted[i]).numpy()
        np.testing.assert_allclose(error[i], 2 * d * (np.sqrt(e**2 + d**2) - d), rtol=1e-9)
    small = ob.huber(
        torch.full((1, 1, 1, 1), 1e-4, dtype=torch.float64), torch.zeros(1, 1, 1, 1), torch.tensor([0.5]).double()
    )
    assert small.item() == pytest.approx(1e-8, rel=1e-5)  # the parabola


def test_masked_average_and_batches_cut_anywhere():
    """sum(mask * weight * error) / sum(mask), and parts averaged by their counts give the whole."""
    error, weights = latents(4, 6, 6, seed=3).square(), latents(seed=4).abs()
    mask = (latents(1, 6, 6, seed=5) > 0.3).double() * latents(1, 6, 6, seed=6).sigmoid()
    mask[2] = 0
    found, count = ob.average(error, weights, mask)
    e, w, m = error.numpy(), weights.numpy().reshape(-1, 1, 1, 1), mask.numpy()
    expected = (e * w * m).sum() / (m.sum() * 4)  # 4 channels
    assert found.item() == pytest.approx(expected, rel=1e-12)
    parts = [ob.average(error[s], weights[s], mask[s]) for s in (slice(0, 3), slice(3, 4), slice(4, 8))]
    assert sum(p.item() * c.item() for p, c in parts) / sum(c.item() for _, c in parts) == pytest.approx(
        expected, rel=1e-6
    )
    assert ob.average(error[2:3], weights[2:3], mask[2:3])[1].item() == 0
    plain, count = ob.average(error, weights)
    assert plain.item() == pytest.approx((e * w).mean(), rel=1e-12) and count == len(T)


def test_offset_changes_the_target_and_perturbation_does_not():
    """Worked out from what `prepare` gives: the noise it put in and the noise it asks for."""
    alpha_bar = torch.tensor(bars(False))
    x0, t = latents(4, 8, 8, seed=7), torch.tensor(T)

    def streams():
        return [torch.Generator().manual_seed(i) for i in range(len(T))]

    def parts(options):
        noisy = ob.prepare(options, "epsilon", x0, t, alpha_bar, streams())
        a = alpha_bar[t].view(-1, 1, 1, 1)
        return (noisy.x - a.sqrt() * x0) / (1 - a).sqrt(), noisy.wanted

    put, asked = parts(ob.ObjectiveOptions())
    torch.testing.assert_close(put, asked, rtol=0, atol=1e-9)
    torch.testing.assert_close(asked[3], torch.randn(4, 8, 8, generator=streams()[3]).double())

    put_o, asked_o = parts(ob.ObjectiveOptions(noise_offset=0.5))
    torch.testing.assert_close(put_o, asked_o, rtol=0, atol=1e-9)
    shift = asked_o - asked  # one number a channel, of deviation 0.5
    assert (shift.flatten(2).std(dim=2) < 1e-6).all() and 0.3 < shift.mean(dim=(2, 3)).std() < 0.7

    put_p, asked_p = parts(ob.ObjectiveOptions(perturbation=0.5))
    assert torch.equal(asked_p, asked) and 0.45 < (put_p - asked).std() < 0.55


def test_weigh_is_all_of_it():
    """Min-SNR, Huber and a mask of pixels together, from the formulas."""
    options = ob.ObjectiveOptions(min_snr=5.0, huber=0.2, huber_schedule="exponential")
    alpha_bar = torch.tensor(bars(False), dtype=torch.float32)
    x0, said, t = latents(4, 4, 4, seed=8).float(), latents(4, 4, 4, seed=9).float(), torch.tensor(T)
    noisy = ob.prepare(
        options, "v_prediction", x0, t, alpha_bar, [torch.Generator().manual_seed(i) for i in range(len(T))]
    )
    mask = (latents(1, 32, 32, seed=10) > 0).float()
    loss, count = ob.weigh(noisy, said, mask)
    small = mask.double().view(len(T), 1, 4, 8, 4, 8).mean(dim=(3, 5)).numpy()
    total = 0.0
    for i in range(len(T)):
        bar = bars(False)[T[i]]
        noise = torch.randn(4, 4, 4, generator=torch.Generator().manual_seed(i)).double().numpy()
        x = x0[i].double().numpy()
        e = said[i].double().numpy() - (np.sqrt(bar) * noise - np.sqrt(1 - bar) * x)
        d, snr = 0.2 ** (T[i] / 1000), bar / (1 - bar)
        total += (2 * d * (np.sqrt(e**2 + d**2) - d) * min(snr, 5) / (snr + 1) * small[i]).sum()
    assert loss.item() == pytest.approx(total / (small.sum() * 4), rel=1e-5)
    assert count.item() == pytest.approx(small.mean(axis=(1, 2, 3)).sum(), rel=1e-5)


def test_draws_of_timesteps():
    """Shares of 20 stretches over many batches against each distribution; strata: one in each stretch of a batch."""
    edges = np.arange(1, 20) / 20
    for draw, cut in (
        ("uniform", edges),
        ("strata", edges),
        ("logit-normal", 1 / (1 + np.exp(-stats.norm.ppf(edges)))),
    ):
        rng, found = torch.Generator().manual_seed(0), []
        for _ in range(500):
            t = ob.timesteps(ob.ObjectiveOptions(draw=draw), 20, 1000, rng)
            stretch = np.searchsorted(cut * 1000, t.numpy() + 0.5)
            if draw == "strata":
                assert sorted(stretch) == list(range(20))
            found.append(stretch)
        counts = np.bincount(np.concatenate(found), minlength=20)
        assert (np.abs(counts - 500) < 5 * np.sqrt(500)).all(), draw
    t = ob.timesteps(ob.ObjectiveOptions(range=(0.2, 0.5)), 1000, 1000, torch.Generator().manual_seed(0))
    assert t.min() == 200 and t.max() == 499


@pytest.mark.parametrize(
    "wrong, words",
    [
        (dict(prediction="noise"), "--prediction"), (dict(draw="x"), "--draw"), (dict(huber=-1.0), "--huber"),
        (dict(min_snr=float("nan")), "--min-snr"), (dict(range=(0.5, 0.5)), "--range"), (dict(zero_snr=True), "--zero-snr"),
        (dict(huber_schedule="x"), "--huber-schedule"),
    ],
)  # fmt: skip
def test_choices_are_checked(wrong, words):
    with pytest.raises(ConfigError, match=words):
        ob.check(ob.ObjectiveOptions(**wrong), SD15_SCHEDULER)
    ob.check(ob.ObjectiveOptions(zero_snr=True, prediction="v_prediction"), SD15_SCHEDULER)
