"""The training loop and its first three methods: exact resume, stopping, damage, the loss formulas, the cache, the vocabulary.

Everything runs on networks of a few thousand parameters; that the methods learn is shown by the bundled model they made.
"""

import dataclasses
import json
import os
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from scipy import stats
from sdcore.train import checker, checkpoints, log, loop, objectives, state, text, text2image, vae, vocabulary, world

from sdcore.errors import NonFiniteError, TrainingError
from sdcore.tokenizer import Tokenizer

SMALL_VAE = dataclasses.replace(vae.CONFIG, channels=(32, 32, 32, 32))  # narrower ones run slower on a CPU
SMALL_UNET = dataclasses.replace(text2image.UNET, channels=(16, 16), heads=(2, 2), context_dim=16)
SMALL_TEXT = dataclasses.replace(text.CONFIG, width=16, layers=1, heads=2, mlp=32)


@pytest.fixture
def small(monkeypatch):
    """The methods with tiny networks and tiny cache files."""
    monkeypatch.setattr(vae, "CONFIG", SMALL_VAE)
    monkeypatch.setattr(vae, "MEASURED", 16)
    monkeypatch.setattr(text2image, "UNET", SMALL_UNET)
    monkeypatch.setattr(text, "CONFIG", SMALL_TEXT)
    monkeypatch.setattr(text2image, "SHARD", 32)
    monkeypatch.setattr(vae.TrainVAE, "evaluate", lambda *_: {})
    monkeypatch.setattr(text2image.TextToImage, "evaluate", lambda *_: {})


def vae_options(out: Path, **changes) -> vae.VAEOptions:
    defaults = dict(
        steps=6, batch=2, warmup=2, cooldown=2, save_every=2, log_every=2, eval_every=0, close_steps=3, seed=3
    )
    return vae.VAEOptions(out=str(out), **(defaults | changes))


def word_options(out: Path, **changes) -> text.TextOptions:
    defaults = dict(steps=6, batch=8, warmup=2, cooldown=2, save_every=2, log_every=2, eval_every=0, seed=3, threads=1)
    return text.TextOptions(out=str(out), **(defaults | changes))


def text_options(out: Path, **changes) -> text2image.TextToImageOptions:
    defaults = dict(
        steps=6, batch=8, warmup=2, cooldown=2, save_every=2, log_every=2, eval_every=0, shards=1, seed=3, threads=1
    )
    places = {name: str(out.parent / name) for name in ("vae", "text", "cache")}
    return text2image.TextToImageOptions(out=str(out), **(defaults | places | changes))


def final(out: Path) -> dict[str, torch.Tensor]:
    """The state of a run's newest checkpoint, out of the file's reach."""
    tensors = load_file(sorted((out / "checkpoints").glob("step-*"))[-1] / "state.safetensors")
    return {name: tensor.clone() for name, tensor in tensors.items()}


def assert_same_bits(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys() and len(a) > 3
    assert [k for k in a if not torch.equal(a[k], b[k])] == []


# ------------------------------------------------------------------------------------------------- a task small enough to see


class Line(loop.Task):
    """Fit y = 2 x: what the loop does to it can be worked out by hand."""

    def __init__(self, pause: float = 0.0, poison: range = range(0)):
        torch.manual_seed(0)
        self.modules = {"line": torch.nn.Linear(3, 1)}
        self.pause, self.poison = pause, poison

    def loss(self, part):
        x = part.of(torch.randn(part.batch, 3, generator=part.common()))
        time.sleep(self.pause)
        loss = (self.modules["line"](x) - 2 * x.sum(dim=1, keepdim=True)).square().mean()
        return loop.Loss(loss * (float("nan") if part.step in self.poison else 1.0), len(x))


def line_options(out: Path, **changes) -> loop.LoopOptions:
    defaults = dict(steps=40, batch=4, warmup=4, cooldown=10, save_every=5, log_every=4, ema=0.9, threads=1)
    return loop.LoopOptions(out=str(out), **(defaults | changes))


class Child:
    """A run in a process of its own, forked so that it need not import anything first. What it says on stderr goes to a file."""

    def __init__(self, out: Path, resume: bool = False):
        self.errors = out.with_suffix(".stderr")
        self.pid = os.fork()
        if self.pid == 0:
            code = 99
            try:
                os.dup2(os.open(self.errors, os.O_CREAT | os.O_WRONLY | os.O_TRUNC), 2)
                sys.stderr = os.fdopen(2, "w", buffering=1)
                code = loop.run(Line(pause=0.005), line_options(out, steps=60, resume=resume))
            finally:
                os._exit(code)

    def end(self) -> int:
        """Wait; the exit code, negative for a signal."""
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


def wait_for_checkpoint(out: Path, number: int) -> None:
    until = time.time() + 60
    while max((int(c.name[5:]) for c in (out / "checkpoints").glob("step-*")), default=0) < number:
        assert time.time() < until
        time.sleep(0.005)


def test_killed_runs_end_in_the_same_bits(tmp_path):
    """SIGKILL at three moments; the resumed run ends where the uninterrupted one does."""
    assert loop.run(Line(), line_options(tmp_path / "whole", steps=60)) == 0
    for resume, moment in ((False, 5), (True, 20), (True, 35)):
        child = Child(tmp_path / "cut", resume)
        wait_for_checkpoint(tmp_path / "cut", moment)
        os.kill(child.pid, signal.SIGKILL)
        assert child.end() == -signal.SIGKILL, child.errors.read_text()
    assert Child(tmp_path / "cut", resume=True).end() == 0
    assert_same_bits(final(tmp_path / "whole"), final(tmp_path / "cut"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_once_and_the_exit_code_tells(tmp_path, number):
    child = Child(tmp_path / "run")
    wait_for_checkpoint(tmp_path / "run", 10)
    os.kill(child.pid, number)
    os.kill(child.pid, number)  # a second one changes nothing
    assert child.end() == 128 + number
    step = json.loads((tmp_path / "run/log.jsonl").read_text().splitlines()[-1])["step"]
    assert f"stopped and saved at step {step}" in child.errors.read_text()
    assert checkpoints.Checkpoints(tmp_path / "run/checkpoints", 2).newest()[1]["step"] == step
    assert Child(tmp_path / "run", resume=True).end() == 0
    loop.run(Line(), line_options(tmp_path / "whole", steps=60))
    assert_same_bits(final(tmp_path / "whole"), final(tmp_path / "run"))


@pytest.mark.parametrize("damage", ["flip", "cut", "no manifest"])
def test_damaged_newest_checkpoint_is_passed_over_aloud(tmp_path, capfd, damage):
    loop.run(Line(), line_options(tmp_path / "run", keep=3))
    whole = final(tmp_path / "run")
    newest = sorted((tmp_path / "run/checkpoints").glob("step-*"))[-1]
    file = newest / "state.safetensors"
    data = bytearray(file.read_bytes())
    if damage == "flip":
        data[-3] ^= 1
        file.write_bytes(data)
    elif damage == "cut":
        file.write_bytes(data[:-8])
    else:
        (newest / "manifest.json").unlink()
    _, found = checkpoints.Checkpoints(tmp_path / "run/checkpoints", 3).newest()
    assert found["step"] == 35 and str(newest) in capfd.readouterr().err
    assert loop.run(Line(), line_options(tmp_path / "run", keep=3, resume=True)) == 0  # writes step 40 anew
    assert_same_bits(whole, final(tmp_path / "run"))


@pytest.mark.parametrize("call", ["fsync", "rename", "replace"])
def test_a_save_that_fails_leaves_what_was_there(tmp_path, monkeypatch, call):
    """Every flush and rename of a save fails in turn: a TrainingError, and the older checkpoint still verifies."""
    folder = checkpoints.Checkpoints(tmp_path, keep=1)
    tensors = {"weights/a": torch.arange(4.0)}
    folder.save(1, tensors, {"step": 1})
    real, fired = getattr(os, call), 0
    for failing in range(20):
        calls = 0

        def fail(*args, failing=failing):
            nonlocal calls
            calls += 1
            if calls == failing + 1:
                raise OSError(28, "No space left on device")
            return real(*args)

        with monkeypatch.context() as patch:
            patch.setattr(os, call, fail)
            try:
                folder.save(failing + 2, tensors, {"step": failing + 2})
            except TrainingError as error:
                fired += 1
                assert "No space left" in str(error)
            else:
                assert calls <= failing  # every call has had its turn
                break
        assert folder.newest()[1]["step"] in (1, failing + 2)
    assert fired >= (4 if call == "fsync" else 1)
    assert list(tmp_path.glob(".writing-*")) == []


def test_refusals(tmp_path):
    with pytest.raises(TrainingError, match="no checkpoint here verifies"):
        loop.run(Line(), line_options(tmp_path / "none", resume=True))
    loop.run(Line(), line_options(tmp_path / "run"))
    with pytest.raises(TrainingError, match="holds a run already"):
        loop.run(Line(), line_options(tmp_path / "run"))
    with pytest.raises(TrainingError, match=r"lr: was 0.001, is 0.5"):
        loop.run(Line(), line_options(tmp_path / "run", resume=True, lr=0.5))
    with pytest.raises(TrainingError, match="cooldown had begun"):
        loop.run(Line(), line_options(tmp_path / "run", resume=True, steps=50))
    assert loop.run(Line(), line_options(tmp_path / "run", resume=True, steps=50, accept_changes=True)) == 0
    with checkpoints.sole_user(tmp_path / "run"), pytest.raises(TrainingError, match=f"process {os.getpid()}"):
        loop.run(Line(), line_options(tmp_path / "run", resume=True))


def test_older_checkpoints_are_retired(tmp_path):
    loop.run(Line(), line_options(tmp_path / "run", keep=2))
    assert sorted(c.name for c in (tmp_path / "run/checkpoints").iterdir()) == ["step-00000035", "step-00000040"]


def test_a_run_can_be_extended_before_its_cooldown(tmp_path):
    """The learning rate does not know the end before the cooldown: stopped at 20 of 40 and extended equals 60 from the start."""

    class Stops(Line):
        def loss(self, part):
            if part.step == 20:
                os.kill(os.getpid(), signal.SIGINT)
            return super().loss(part)

    assert loop.run(Stops(), line_options(tmp_path / "run")) == 130
    assert loop.run(Line(), line_options(tmp_path / "run", resume=True, steps=60)) == 0
    loop.run(Line(), line_options(tmp_path / "whole", steps=60))
    assert_same_bits(final(tmp_path / "whole"), final(tmp_path / "run"))


def test_steps_that_are_not_finite_are_not_applied(tmp_path):
    task = Line(poison=range(3, 5))
    assert loop.run(task, line_options(tmp_path / "two", steps=8, save_every=1, keep=9)) == 0
    states = [load_file(tmp_path / f"two/checkpoints/step-{n:08d}/state.safetensors") for n in (3, 5)]
    assert_same_bits(*states)
    with pytest.raises(NonFiniteError, match="5 steps in a row"):
        loop.run(Line(poison=range(10, 40)), line_options(tmp_path / "many"))
    assert checkpoints.Checkpoints(tmp_path / "many/checkpoints", 2).newest()[1]["step"] == 10


def test_average_is_the_formula_and_comes_back(tmp_path):
    p = torch.nn.Parameter(torch.zeros(2, dtype=torch.float64))
    average, expected = state.Average({"p": p}, 0.9), np.zeros(2)
    for step in range(50):
        p.data = torch.tensor([step + 1.0, -step], dtype=torch.float64)
        average.update(step)
        decay = min(0.9, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * p.detach().numpy()
    np.testing.assert_allclose(average.values["p"].numpy(), expected, rtol=1e-12)
    own = p.detach().clone()
    with average.in_place():
        np.testing.assert_allclose(p.detach().numpy(), expected, rtol=1e-12)
    assert torch.equal(p, own)


def test_learning_rate(tmp_path):
    o = line_options(tmp_path, steps=100, warmup=10, cooldown=20, lr=1.0)
    assert [loop.learning_rate(o, s) for s in (0, 4, 9, 50, 80, 90, 99)] == [0.1, 0.5, 1.0, 1.0, 1.0, 0.5, 0.05]


def test_the_curve_is_drawn_from_a_log_with_a_torn_line(tmp_path):
    lines = [json.dumps({"step": s, "loss": 1 / (s + 1)}) for s in range(50)]
    (tmp_path / "log.jsonl").write_text("\n".join(lines) + '\n{"step": 50, "lo')
    log.draw_curve(tmp_path / "log.jsonl", tmp_path / "loss.png")
    from PIL import Image

    picture = np.asarray(Image.open(tmp_path / "loss.png").convert("RGB")).astype(int)
    blue = np.argwhere((picture[..., 2] - picture[..., 0]) > 60)
    assert blue[:, 1].min() < 100 and blue[:, 1].max() > 700  # it spans the picture
    assert blue[blue[:, 1] < 100, 0].mean() < blue[blue[:, 1] > 700, 0].mean()  # and falls


# --------------------------------------------------------------------------------------------------------- the two methods


class Cut(Exception):
    pass


def cut_at(task, step: int):
    """The task, dying without warning at a step."""
    whole = task.loss

    def loss(part):
        if part.step == step:
            raise Cut
        return whole(part)

    task.loss = loss
    return task


def test_every_method_resumes_to_the_same_bits_and_export(tmp_path, small):
    o = vae_options(tmp_path / "vae")
    assert loop.run(vae.TrainVAE(o), o) == 0
    p = vae_options(tmp_path / "vae2")
    with pytest.raises(Cut):
        loop.run(cut_at(vae.TrainVAE(p), 3), p)
    p = dataclasses.replace(p, resume=True)
    assert loop.run(vae.TrainVAE(p), p) == 0
    assert_same_bits(final(tmp_path / "vae"), final(tmp_path / "vae2"))

    o = word_options(tmp_path / "text")
    assert loop.run(text.TrainText(o), o) == 0
    p = word_options(tmp_path / "text2")
    with pytest.raises(Cut):
        loop.run(cut_at(text.TrainText(p), 3), p)
    p = dataclasses.replace(p, resume=True)
    assert loop.run(text.TrainText(p), p) == 0
    assert_same_bits(final(tmp_path / "text"), final(tmp_path / "text2"))

    q = text_options(tmp_path / "unet")
    assert loop.run(text2image.TextToImage(q), q) == 0
    r = text_options(tmp_path / "unet2")
    with pytest.raises(Cut):
        loop.run(cut_at(text2image.TextToImage(r), 5), r)  # in the second epoch: 4 batches make one
    r = dataclasses.replace(r, resume=True)
    assert loop.run(text2image.TextToImage(r), r) == 0
    assert_same_bits(final(tmp_path / "unet"), final(tmp_path / "unet2"))

    import sdcore

    pipe = sdcore.load(str(tmp_path / "unet/model"), dtype=torch.float32)
    assert pipe.scheduler == text2image.SCHEDULER and pipe.tokenizers[0].max_length == vocabulary.LENGTH
    assert torch.isfinite(pipe("a red circle", steps=2).pixels).all()
    learned = load_file(tmp_path / "text/text_encoder/model.safetensors")  # it stays as it is
    kept = load_file(tmp_path / "unet/model/text_encoder/model.safetensors")
    assert learned.keys() == kept.keys() and all(torch.equal(learned[k].half(), kept[k]) for k in learned)

    s = text_options(tmp_path / "unet3", start=str(tmp_path / "unet/model"))
    found, expected = text2image.TextToImage(s).unet.state_dict(), pipe.unet.state_dict()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_decoder_only_leaves_the_encoder_alone(tmp_path, small):
    o = vae_options(tmp_path / "vae", steps=2)
    loop.run(vae.TrainVAE(o), o)
    p = vae_options(tmp_path / "decoder", steps=3, start=str(tmp_path / "vae"), decoder_only=True)
    loop.run(vae.TrainVAE(p), p)
    old, new = (load_file(tmp_path / run / "vae/diffusion_pytorch_model.safetensors") for run in ("vae", "decoder"))
    same = {name for name in old if torch.equal(old[name], new[name])}
    assert same == {name for name in old if name.startswith(("encoder.", "quant_conv."))}


def test_standardised_latents_reconstruct_the_same():
    torch.manual_seed(0)
    model = vae.VAE(SMALL_VAE).double()
    x = torch.randn(4, 3, 16, 16, dtype=torch.float64)
    noise = torch.randn(4, 4, 2, 2, dtype=torch.float64)
    with torch.no_grad():
        before, (mean, _) = model(x, noise)
        vae.standardise(model, mean.mean(dim=(0, 2, 3)), mean.std(dim=(0, 2, 3)))
        after, (mean, _) = model(x, noise)
    torch.testing.assert_close(before, after, rtol=0, atol=1e-10)
    torch.testing.assert_close(mean.mean(dim=(0, 2, 3)), torch.zeros(4, dtype=torch.float64), rtol=0, atol=1e-9)
    torch.testing.assert_close(mean.std(dim=(0, 2, 3)), torch.ones(4, dtype=torch.float64), rtol=0, atol=1e-9)


def test_close_windows_hold_a_thing():
    x = vae.pictures(np.random.default_rng(0), 50, close=True)
    assert x.shape == (100, 3, 32, 32)
    assert min(window.std(axis=(1, 2)).max() for window in x) > 0.05


def test_diffusion_loss_against_the_formula_in_fp64():
    """Elementwise in numpy, fp64, with a stand-in network that looks at x and t."""
    rng = torch.Generator().manual_seed(0)
    x, noise = (torch.randn(5, 4, 2, 2, generator=rng) for _ in range(2))
    t = torch.tensor([0, 10, 400, 800, 999])
    alpha_bar = text2image.alpha_bars(text2image.SCHEDULER)
    weights = objectives.capped_v(alpha_bar, 5.0)

    def network(x_t, t, context):
        return 0.3 * x_t + (t.to(x_t.dtype) / 1000).view(-1, 1, 1, 1) + context.mean()

    context = torch.ones(1, dtype=torch.float64)
    found = text2image.diffusion_loss(
        network, x.double(), t, noise.double(), context, alpha_bar.double(), weights.double()
    )
    expected = 0.0
    beta = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    bars = np.cumprod(1 - beta)
    for i in range(5):
        a = bars[t[i]]
        x_t = np.sqrt(a) * x[i].double().numpy() + np.sqrt(1 - a) * noise[i].double().numpy()
        guess = 0.3 * x_t + float(t[i]) / 1000 + 1
        clean = np.sqrt(a) * x_t - np.sqrt(1 - a) * guess  # what the predicted v says the clean latent is
        snr = a / (1 - a)
        expected += min(snr + 1, 5.0) * ((clean - x[i].double().numpy()) ** 2).mean() / 5
    assert found.item() == pytest.approx(expected, rel=1e-5)  # the table of alphas is fp32


def test_timesteps_are_spread():
    """One in every twentieth of the distribution, and all together the logit-normal of the paper, worked out by scipy."""
    rng, edges = torch.Generator().manual_seed(0), np.arange(1001) / 1000
    with np.errstate(divide="ignore"):
        below = stats.norm.cdf((np.log(edges / (1 - edges)) - text2image.MIDDLE) / text2image.WIDTH)  # P(t < 1000 edge)
    counts = torch.zeros(1000)
    for _ in range(2000):
        t = objectives.logit_normal(20, 1000, rng, text2image.MIDDLE, text2image.WIDTH)
        for k, i in enumerate(sorted(t.tolist())):
            assert below[i] * 20 < k + 1 and below[i + 1] * 20 > k
        counts[t] += 1
    # A timestep that is p of the distribution is drawn in about 40,000 p of 40,000, with less spread than chance has.
    expected = 40_000 * np.diff(below)
    assert (np.abs(counts.numpy() - expected) < 4 * np.sqrt(expected) + 1).all()


def test_every_epoch_sees_every_picture_once_with_its_own_caption(tmp_path, small):
    o = vae_options(tmp_path / "vae", steps=1)
    loop.run(vae.TrainVAE(o), o)
    p = word_options(tmp_path / "text", steps=1)
    loop.run(text.TrainText(p), p)
    task = text2image.TextToImage(text_options(tmp_path / "unet", shards=2))
    rows = [torch.cat([task.rows(epoch * 8 + i) for i in range(8)]) for epoch in range(2)]
    assert [sorted(r.tolist()) for r in rows] == [list(range(64))] * 2 and not torch.equal(*rows)

    tokens = {i: token for token, i in json.loads((tmp_path / "unet/model/tokenizer/vocab.json").read_text()).items()}
    encoder = text2image.load_vae(str(tmp_path / "vae"))
    for shard in range(2):
        rng = np.random.default_rng([3, shard])
        scenes = [world.training_scene(rng) for _ in range(32)]
        mean = encoder.encode(torch.from_numpy(world.draw_batch(scenes[:16]))).mean * encoder.config.scaling_factor
        torch.testing.assert_close(
            task.mean[shard * 32 : shard * 32 + 16].float(), mean, rtol=2e-3, atol=2e-3
        )  # stored in fp16
        for scene, ids in zip(scenes, task.ids[shard * 32 :], strict=False):
            for row in ids.tolist():
                words = (
                    "".join(tokens[i] for i in row[1 : row.index(task.tokenizer.eos_id)]).replace("</w>", " ").strip()
                )
                demand = world.parse(words)
                assert all(checker.matches(scene, demand).values()), (words, scene)

    with pytest.raises(TrainingError, match="another autoencoder"):
        text2image.TextToImage(text_options(tmp_path / "unet", seed=4))


def test_text_labels_say_what_a_caption_demands_from_either_end():
    rng = np.random.default_rng(0)
    for scene in (world.training_scene(rng) for _ in range(300)):
        words = world.caption(scene)
        found = text.labels(words)
        assert len(found) == len(text.CLASSES) and all(0 <= a < n for a, n in zip(found, text.CLASSES, strict=True))
        if len(scene.things) == 2:
            assert text.labels(world.caption(world.mirrored(scene))) == found
            first = min(scene.things, key=lambda thing: (thing.x, thing.y))
        else:
            first = scene.things[0]
        assert (found[0], found[5]) == (1, len(scene.things) - 1)
        for name, a in zip(text.THING, found[1:5], strict=True):
            assert text.THING[name][a] == getattr(first, name)
        assert (None, *world.BACKGROUNDS)[found[-1]] == scene.background
    assert text.labels("") == [0] * 12 and text.labels("a circle") == [1, 1] + [0] * 10


def test_text_learns_from_nothing_held_out_and_is_read_from_the_end_token_on(tmp_path, small):
    task = text.TrainText(word_options(tmp_path, empty=0.3))
    words = task.captions(np.random.default_rng(0), 500)
    assert 100 < words.count("") < 200
    pairs = {(thing.colour, thing.shape) for w in words for thing in world.parse(w).things}
    assert len(pairs) > 40 and not pairs & world.HELD_OUT_PAIRS
    texts = ["a red circle", "", "a small blue square above a large dotted yellow heart on grey"]
    logits, which = task.read(texts)
    lengths = [vocabulary.LENGTH - 1 - len(task.tokenizer.encode(t)) for t in texts]  # all but the start and the words
    assert torch.bincount(which).tolist() == lengths and [x.shape[1] for x in logits] == text.CLASSES


def test_vocabulary_has_a_token_for_every_word_and_spells_the_rest(tmp_path):
    vocabulary.write(tmp_path, world.VOCABULARY)
    ours = Tokenizer.from_folder(tmp_path)
    assert [word for word in world.VOCABULARY if len(ours.encode(word)) != 1] == []
    assert (ours.max_length, ours.pad_id) == (32, ours.eos_id) and len(ours.encode("rocket 7 ü")) > 3
    transformers = pytest.importorskip("transformers")
    theirs = transformers.CLIPTokenizer.from_pretrained(tmp_path)
    rng = np.random.default_rng(0)
    texts = [world.caption(world.training_scene(rng), rng) for _ in range(100)] + [
        "",
        "Rocket, 12 times!",
        "a teal-striped ü",
    ]
    rows = theirs(texts, padding="max_length", max_length=32, truncation=True).input_ids
    assert ours(texts).tolist() == rows
    assert max(len(ours.encode(text)) for text in texts) <= 30


def test_options_become_a_command_line(capsys):
    words = ["--steps", "7", "--decoder-only", "--no-resume", "--lr", "0.5", "--start", "x"]
    o = vae.parse(vae.VAEOptions, words, prog="t")
    assert (o.steps, o.decoder_only, o.resume, o.lr, o.start, o.batch) == (7, True, False, 0.5, "x", 16)
    with pytest.raises(SystemExit) as stopped:
        vae.parse(vae.VAEOptions, ["--steps", "many"], prog="t")
    assert stopped.value.code == 2


def test_the_same_words_always_give_the_same_tokens():
    words = world.VOCABULARY
    first = vocabulary.learn_merges(words)
    assert first == vocabulary.learn_merges(words[::-1]) and len(set(first)) == len(first)
    assert vocabulary.learn_merges(["abab", "ab", "cd"]) == [  # ab</w> three times, then by the alphabet
        ("a", "b</w>"),
        ("a", "b"),
        ("ab", "ab</w>"),
        ("c", "d</w>"),
    ]
