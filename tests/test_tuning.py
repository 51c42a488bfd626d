"""Tuning a pipeline on a folder of pictures: one step's gradients are those of diffusers, and the run is exact to resume."""

import dataclasses
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sdcore.train import loop, ranks, state, tuning
from sdcore.train.checkpoints import Checkpoints
from sdcore.train.task import generator

from sdcore.errors import ConfigError, TrainingError
from tests import tiny_models

CAPTIONS = [
    "a red circle",
    "a large blue square on the left",
    "photo of a cat, small, green",
    "the dog above a triangle",
    "",
]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folders of small random models by family, made when first asked for."""
    made: dict[str, Path] = {}

    def folder(family: str) -> Path:
        if family not in made:
            made[family] = tiny_models.write_folder(tmp_path_factory.mktemp("models") / family, family, seed=1)
        return made[family]

    return folder


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Five pictures of noise and colour, of other sizes than they are seen at."""
    folder, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for i, caption in enumerate(CAPTIONS):
        small = rng.integers(0, 256, (6, 7, 3)).astype(np.uint8)
        Image.fromarray(small).resize((70 + 9 * i, 66 + 5 * i), Image.Resampling.BICUBIC).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(caption or "a")
    return folder


def options(model: Path, pictures: Path, out: Path, **changes) -> tuning.TuneOptions:
    defaults = dict(
        model=str(model), data=str(pictures), out=str(out), cache=str(out.parent / "cache"), device="cpu", resolution=64,
        bucket_step=64, batch=3, steps=4, warmup=1, cooldown=1, save_every=2, log_every=1, threads=1, seed=2, ema=0.9,
    )  # fmt: skip
    return tuning.TuneOptions(**(defaults | changes))


class Known(tuning.Tune):
    """Keeps what it was asked, for the peer to be asked the same."""

    def loss_of(self, visits, t, rngs):
        self.asked = visits, t
        return super().loss_of(visits, t, rngs)


def peer(folder: Path):
    import diffusers

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        kind = getattr(diffusers, tiny_models.PIPELINES[folder.name])
        return (
            kind.from_pretrained(folder, safety_checker=None)
            if "XL" not in kind.__name__
            else kind.from_pretrained(folder)
        )


@pytest.mark.parametrize(
    "family, prediction, min_snr", [("sd1", "epsilon", 0.0), ("sd2", "v_prediction", 5.0), ("sdxl", "epsilon", 5.0)]
)
def test_gradients_and_loss_of_a_step_are_those_of_diffusers(models, pictures, tmp_path, family, prediction, min_snr):
    """Loss and every gradient of the UNet, fp32, against diffusers' modules and its training scripts' formulas."""
    folder = models(family)
    o = options(folder, pictures, tmp_path / "run", min_snr=min_snr, variants=4, flip=True, crop="random", accumulate=1)
    task = Known(o, tuning.load(o))
    assert task.scheduler.prediction_type == prediction
    now = state.State(task, o, ranks.Ranks())
    figures = now.gradients(5)
    visits, t = task.asked
    rngs = [generator(o.seed, 5, place) for place in range(3)]

    pipe = peer(folder)
    pipe.unet.train()
    pixels = []
    for visit in visits:
        view = visit.view
        x = Image.open(visit.item.path).convert("RGB").resize(view.resized, Image.Resampling.LANCZOS)
        x = x.crop((view.left, view.top, view.left + 64, view.top + 64))
        x = x.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if view.flip else x
        pixels.append(torch.tensor(np.asarray(x) / 127.5 - 1).permute(2, 0, 1).float())
    with torch.no_grad():
        moments = pipe.vae.encode(torch.stack(pixels)).latent_dist
        scale = pipe.vae.config.scaling_factor
        mean, std, _ = task.latents(visits)
        torch.testing.assert_close(
            mean, moments.mean * scale, rtol=0, atol=3e-6
        )  # norms over a pixel or two magnify rounding,
        torch.testing.assert_close(
            std, moments.std * scale, rtol=1e-5, atol=3e-6
        )  # so the UNets are given the same latents
        shape = mean.shape[1:]
        x0 = mean + std * torch.stack([torch.randn(shape, generator=rng) for rng in rngs])
        noise = torch.stack([torch.randn(shape, generator=rng) for rng in rngs])
        told = pipe.encode_prompt(
            [visit.caption for visit in visits],
            device="cpu",
            num_images_per_prompt=1,
            do_classifier_free_guidance=False,
        )
    added = None
    if family == "sdxl":
        h_w = [(visit.item.size[1], visit.item.size[0]) for visit in visits]
        crops = [(v.view.top, v.view.resized[0] - v.view.left - 64 if v.view.flip else v.view.left) for v in visits]
        ids = torch.tensor([[*a, *b, 64, 64] for a, b in zip(h_w, crops, strict=True)]).float()
        added = {"text_embeds": told[2], "time_ids": ids}
    import diffusers

    scheduler = diffusers.DDPMScheduler.from_config(pipe.scheduler.config, prediction_type=prediction)
    said = pipe.unet(scheduler.add_noise(x0, noise, t), t, told[0], added_cond_kwargs=added).sample
    wanted = scheduler.get_velocity(x0, noise, t) if prediction == "v_prediction" else noise
    each = (said - wanted).square().mean(dim=(1, 2, 3))
    if min_snr:
        from diffusers.training_utils import compute_snr

        snr = compute_snr(scheduler, t)
        each = (
            each
            * torch.minimum(snr, torch.full_like(snr, min_snr))
            / (snr + 1 if prediction == "v_prediction" else snr)
        )
    loss = each.mean()
    loss.backward()
    assert figures["loss"] == pytest.approx(loss.item(), rel=1e-4)
    theirs = dict(pipe.unet.named_parameters())
    assert len(now.trained) == len(theirs)
    whole = sum(p.grad.square().sum() for p in theirs.values()).sqrt()
    for name, p in now.trained.items():  # a bias that a norm takes away again has a gradient of rounding alone
        grad = theirs[name.removeprefix("unet.")].grad
        assert (p.grad - grad).norm() <= 1e-4 * grad.norm() + 1e-6 * whole, name


def test_a_run_is_exact_to_resume_and_the_best_by_validation(models, pictures, tmp_path):
    """Cut in its second epoch; a cache that is gone changes nothing. The validation loss is the same whenever asked."""
    o = options(
        models("sd1"), pictures, tmp_path / "whole", steps=6, eval_every=2, validation=str(pictures), best="validation_loss:min",
        dropout=0.3, variants=2, flip=True, noise_offset=0.1, perturbation=0.1, huber=0.1, validation_draws=2,
    )  # fmt: skip
    task = tuning.Tune(o, tuning.load(o))
    first = task.validate()
    assert first == task.validate() and loop.run(task, o) == 0

    class Cut(tuning.Tune):
        def loss(self, part):
            if part.step == 3:
                raise InterruptedError
            return super().loss(part)

    p = dataclasses.replace(o, out=str(tmp_path / "cut"))
    with pytest.raises(InterruptedError):
        loop.run(Cut(p, tuning.load(p)), p)
    p = dataclasses.replace(p, resume=True, cache="")
    assert loop.run(tuning.Tune(p, tuning.load(p)), p) == 0
    found = [Checkpoints(tmp_path / run / "checkpoints", 1).newest()[0] for run in ("whole", "cut")]
    assert found[0].keys() == found[1].keys() and all(torch.equal(found[0][name], found[1][name]) for name in found[0])
    q = dataclasses.replace(p, data=str(tmp_path / "other"))
    (tmp_path / "other").mkdir()
    for path in pictures.iterdir():
        (tmp_path / "other" / path.name).write_bytes(path.read_bytes())
    (tmp_path / "other/0.txt").write_text("a blue circle")
    with pytest.raises(TrainingError, match="content: was "):
        loop.run(tuning.Tune(q, tuning.load(q)), q)


def test_choices_that_do_not_go_together_are_refused(models, pictures, tmp_path):
    o = options(models("sd1"), pictures, tmp_path / "run", zero_snr=True)
    with pytest.raises(ConfigError, match="--zero-snr"):
        tuning.Tune(o, tuning.load(o))
    (tmp_path / "prompts.txt").write_text("\n")
    o = options(models("sd1"), pictures, tmp_path / "run", prompts=str(tmp_path / "prompts.txt"))
    with pytest.raises(TrainingError, match="holds no prompt"):
        tuning.Tune(o, tuning.load(o))
