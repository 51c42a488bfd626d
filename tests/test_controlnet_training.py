"""ControlNet training on the bundled model: the measure of edges, the judgement of a run, Control-LoRAs, the bundled ControlNet.

That a step equals diffusers' and that a run resumes exactly is in test_methods.py; here are what is measured and what is shipped.
"""

import json
from dataclasses import replace
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from sdcore.train import chapter, follow, judge, lessons, loop, tuning, world
from sdcore.train.checkpoints import sha256
from sdcore.train.control_lora import factors
from sdcore.train.controlnet import ControlNetOptions, TrainControlNet
from sdcore.train.edges import edge_f1
from sdcore.train.task import Part
from sdcore.weights import files
from sdcore.weights.controls import load_control

import sdcore
from sdcore import image
from sdcore.canny import canny
from sdcore.cli import main
from sdcore.controlnet import Control, ControlNet
from sdcore.errors import ConfigError
from sdcore.image import open_picture
from tests.runs import final
from tests.test_cli_pictures import commands

TINY = Path(__file__).parents[1] / "weights" / "tiny"


@pytest.fixture(scope="module")
def pipe():
    return sdcore.load("tiny", device="cpu", dtype=torch.float32)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """pictures/ of the world to train on, unseen/ of what training never shows."""
    folder = tmp_path_factory.mktemp("control")
    world.write_folder(folder / "pictures", 6, seed=1)
    world.write_folder(folder / "unseen", 2, seed=2, unseen=True)
    return folder


def options(place, **changes) -> ControlNetOptions:
    given = dict(
        data=str(place / "pictures"), validation=str(place / "unseen"), out=str(place / "run"), cache="", resolution=64, batch=2,
        stem=(4, 4, 8, 8), depths=(1, 0), mid_depth=0, threads=1, guidance=3.0, judged=0, validation_draws=1, seed=7, warmup=0,
        cooldown=0, ema=0.0, steps=2, lr=1e-2, device="cpu",
    )  # fmt: skip
    return ControlNetOptions(**given | changes)


# ------------------------------------------------------------------------------------------------------------ F1, and the folder


def brute_f1(found: np.ndarray, wanted: np.ndarray) -> float:
    """The definition, pixel by pixel."""
    a, b = (list(zip(*np.nonzero(edges), strict=True)) for edges in (found, wanted))
    if not a and not b:
        return 1.0

    def share(these, those):
        near = [any(max(abs(y - v), abs(x - u)) <= 1 for v, u in those) for y, x in these]
        return sum(near) / len(near) if near else 0.0

    p, r = share(a, b), share(b, a)
    return 2 * p * r / (p + r) if p + r else 0.0


def test_edge_f1_is_its_definition():
    rng = np.random.default_rng(0)
    for density in (0.0, 0.02, 0.1, 0.5):
        for shape in ((9, 14), (1, 20), (12, 12)):
            found, wanted = (255 * (rng.random(shape) < d).astype(np.uint8) for d in (density, 0.05))
            assert edge_f1(found, wanted) == pytest.approx(brute_f1(found, wanted), abs=1e-12)
    line = np.zeros((16, 16), np.uint8)
    line[:, 8] = 255
    moved = [edge_f1(np.roll(line, k, 1), line) for k in (0, 1, -1, 2)]
    assert moved == [1.0, 1.0, 1.0, 0.0] and edge_f1(np.zeros_like(line), np.zeros_like(line)) == 1.0
    assert edge_f1(line, np.zeros_like(line)) == edge_f1(np.zeros_like(line), line) == 0.0
    assert edge_f1(line // 255, line) == 1.0  # whatever is not 0
    half = line.copy()
    half[8:] = 0  # of eight rows that are found, one more is met below the end
    assert edge_f1(half, line) == pytest.approx(2 * (9 / 16) / (1 + 9 / 16))


def test_a_folder_of_the_world_is_pictures_with_captions(place):
    paths = sorted((place / "pictures").glob("*.png"))
    rng = np.random.default_rng(1)
    for path in paths:
        scene = world.training_scene(rng)
        texts = [world.caption(scene, rng) for _ in range(4)]
        assert path.with_suffix(".txt").read_text().splitlines() == texts
        wanted = (world.draw(scene).transpose(1, 2, 0) + 1) * 127.5
        assert np.abs(open_picture(path).pixels - wanted).max() <= 0.5001
    assert len(paths) == 6
    unseen = [path.with_suffix(".txt").read_text() for path in sorted((place / "unseen").glob("*.png"))]
    assert unseen == [f"{text}\n" for text, _ in world.held_out_scenes(2, 2)]


# -------------------------------------------------------------------------------------------------------------------- judgement


def test_a_run_is_judged_by_what_it_draws_along_edges(place, pipe):
    """At first what is drawn with the control is what is drawn without, to the bit; then not. The log and a sheet say so."""
    o = options(place, judged=2, eval_every=2, out=str(place / "judged"))
    task = TrainControlNet(o, pipe)
    out = Path(o.out)
    out.mkdir()
    with torch.no_grad():
        begun = task.evaluate(0, out)
    controls = [task.control(task.held_out.visit(i, 0, 0)) for i in range(2)]
    for i, control in enumerate(controls):
        assert np.array_equal(task.drawn(i, control).pixels, task.uncontrolled[i].pixels)
    assert (task.net.config.depths, task.net.config.mid_depth) == ((1, 0), 0)
    text = task.held_out.items[1].captions[0]
    plain = pipe(text, seed=1, steps=25, guidance=3.0).images[0]
    assert np.array_equal(task.uncontrolled[1].pixels, plain.pixels)
    assert begun["edge_f1"] == begun["edge_f1_uncontrolled"] < 1
    true = [open_picture(item.path) for item in task.held_out.items]
    assert task.follows(true, controls) == 1.0  # the pictures that the controls were made of
    for path in out.rglob("*"):
        if path.is_file():
            path.unlink()
    assert loop.run(task, o) == 0
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    figures = [line for line in lines if line.get("event") == "evaluated"]
    assert [line["step"] for line in figures] == [2]
    assert all(line["edge_f1_uncontrolled"] == begun["edge_f1_uncontrolled"] for line in figures)
    drawn = task.drawn(0, controls[0]).pixels
    assert not np.array_equal(drawn, task.uncontrolled[0].pixels)
    sheet = open_picture(out / "samples/controls-00000002.png").pixels
    assert sheet.shape[1] // 64 == 3 and sheet.shape[0] // 64 == 2
    white = (sheet[:64, :64] == 255).all(-1)
    assert white.mean() >= controls[0][0].mean() > 0.005  # the control is in the first column
    row = image.grid(
        [image.to_pictures(controls[0][None] * 2 - 1)[0], image.Picture(drawn), task.uncontrolled[0]], columns=3
    )
    assert np.array_equal(sheet[:64], row.pixels)


def test_controls_of_a_folder_serve_validation_too(place, pipe):
    """A folder of control pictures for both; no figure of edges, since these may be of anything."""
    both = place / "both"
    both.mkdir()
    for name in ("pictures", "unseen"):
        for path in (place / name).glob("*.png"):
            open_picture(path).save(both / path.name)
    task = TrainControlNet(options(place, control=str(both), judged=1), pipe)
    (place / "sheets").mkdir()
    with torch.no_grad():
        assert task.evaluate(0, place / "sheets") == {}
    assert (place / "sheets/samples/controls-00000000.png").exists() and task.validate() is not None


# ---------------------------------------------------------------------------------------------------------------- Control-LoRA


def lora_task(place, pipe, **changes):
    return TrainControlNet(options(place, depths=None, mid_depth=None, control_lora=3, **changes), pipe)


def shake(net, seed: int = 0):
    """Away from the beginning, where zeros hide most gradients."""
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(torch.randn(p.shape, generator=rng) * 0.05)


def test_a_control_lora_begins_as_nothing_and_borrows_every_matrix(place, pipe):
    task = lora_task(place, pipe, judged=1)
    begun = task.evaluate(0, place)
    assert begun["edge_f1"] == begun["edge_f1_uncontrolled"]
    whole = ControlNet.from_unet(pipe.unet, stem=task.options.stem)
    base = pipe.unet.state_dict()
    for name, layer in task.net.named_modules():
        if name in factors(task.net):
            assert layer.weight.data_ptr() == base[f"{name}.weight"].data_ptr()
    matrices = {name for name, t in whole.state_dict().items() if name in base and t.ndim > 1}
    assert {f"{name}.weight" for name in factors(task.net)} == matrices
    kept = {name for name in task.net.state_dict() if ".change." not in name}
    assert kept == set(whole.state_dict()) - matrices  # and these alone are in checkpoints
    assert all(p.requires_grad for p in task.net.parameters()) and not any(
        p.requires_grad for p in pipe.unet.parameters()
    )


def test_gradients_of_a_control_lora_are_those_of_the_whole_weights(place, pipe):
    """W = W_base + up @ down: d/d up = dW downᵀ, d/d down = upᵀ dW, and all that is not a matrix has the same gradient."""
    task = lora_task(place, pipe, dropout=0.0)
    shake(task.net)
    part = Part(7, 0, 2, range(2))
    task.loss(part).mean.backward()
    mine, learned = dict(task.net.named_parameters()), factors(task.net)

    full = TrainControlNet(options(place, depths=None, mid_depth=None, dropout=0.0), pipe)
    wanted = {name: t for name, t in task.net.state_dict().items() if ".change." not in name}
    for layer, change in learned.items():
        base = pipe.unet.state_dict()[f"{layer}.weight"]
        wanted[f"{layer}.weight"] = base + (change.up.flatten(1) @ change.down.flatten(1)).reshape(base.shape).detach()
    full.net.load_state_dict(wanted)
    full.loss(part).mean.backward()
    grads = {name: p.grad for name, p in full.net.named_parameters()}
    worst = 0.0
    for name, p in mine.items():
        layer, _, side = name.rpartition(".change.")
        if layer:
            whole, change = grads[f"{layer}.weight"].flatten(1), learned[layer]
            wanted_grad = whole @ change.down.flatten(1).T if side == "up" else change.up.flatten(1).T @ whole
        else:
            wanted_grad = grads[name]
        scale = wanted_grad.abs().max().clamp_min(1e-3 * max(g.abs().max() for g in grads.values()))
        worst = max(worst, ((p.grad.flatten() - wanted_grad.flatten()).abs().max() / scale).item())
    assert worst < 2e-3 and max(g.abs().max() for g in grads.values()) > 0  # fp32, sums over 4096 pixels in two orders


def test_a_control_lora_is_read_back(place, pipe):
    o = options(place, depths=None, mid_depth=None, control_lora=3, out=str(place / "lora-run"))
    task = TrainControlNet(o, pipe)
    assert loop.run(task, o) == 0
    written = Path(o.out) / "control-lora.safetensors"
    tensors = files.read(written).tensors
    assert "lora_controlnet" in tensors and "input_blocks.1.1.transformer_blocks.0.attn1.to_q.up" in tensors
    assert not any(name.endswith("to_q.weight") for name in tensors)
    saved = [name for name in final(Path(o.out)) if name.startswith("weights/")]
    assert not any(name.endswith("to_q.weight") for name in saved) and any(".change.up" in name for name in saved)
    net = load_control(written, pipe)
    x, t = torch.randn(2, 4, 8, 8), torch.tensor([10, 800])
    context, pixels = torch.randn(2, 77, 128), torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        for mine, theirs in zip(task.net(x, t, context, pixels), net(x, t, context, pixels), strict=True):
            assert mine.abs().max() > 0
            torch.testing.assert_close(theirs, mine, rtol=1e-4, atol=1e-5 * mine.abs().max().item())


def test_control_loras_that_cannot_be(place, pipe):
    for words, changes in (("--control-lora -1", dict(control_lora=-1)), ("--depths", dict(depths=(1, 0)))):
        with pytest.raises(ConfigError, match=words):
            lora = dict(depths=None, mid_depth=None, control_lora=2)
            TrainControlNet(replace(options(place), **lora | changes), pipe)
    o = replace(options(place), depths=None, mid_depth=None, control_lora=2, dtype="float16")
    with pytest.raises(ConfigError, match="--dtype"):
        TrainControlNet(o, tuning.load(o))


# ------------------------------------------------------------------------------------------------------- the bundled ControlNet


@pytest.fixture(scope="module")
def bundled(pipe):
    return load_control("canny-tiny", pipe)


def test_the_bundled_controlnet_is_what_its_version_says(pipe, bundled):
    folder = TINY / "controlnet"
    version = json.loads((folder / "version.json").read_text())
    assert sum(file.stat().st_size for file in folder.iterdir()) <= 3e6
    assert version["files"] == {name: sha256(folder / name) for name in follow.SHIPPED}
    assert version["model"] == judge.fingerprint(TINY)["hash"]  # of the model that it was made for
    with_, without = version["controlled"], version["uncontrolled"]
    assert with_["edge_f1"] >= 0.75 and without["edge_f1"] <= 0.35
    assert with_["everything"] >= without["everything"] - 0.05
    page = (folder / "README.md").read_text()
    assert follow.card(version) in page and all(digest[:16] in page for digest in version["files"].values())
    assert isinstance(bundled, ControlNet)
    stored = files.read(folder / follow.SHIPPED[1]).tensors
    assert {t.dtype for t in stored.values()} == {torch.float16}
    assert stored.keys() == bundled.state_dict().keys()


def test_what_ships_is_what_was_judged(pipe, bundled, tmp_path):
    """Written again it is the same file, and its record the same page."""
    version = json.loads((TINY / "controlnet/version.json").read_text())
    follow.ship(bundled, tmp_path)
    assert {name: sha256(tmp_path / name) for name in follow.SHIPPED} == version["files"]
    figures = {name: version[name] for name in ("controlled", "uncontrolled", "autoencoder", "chance")}
    follow.record(tmp_path, figures, version["judged"])
    assert json.loads((tmp_path / "version.json").read_text()) == version


def test_prompts_and_controls_stay_together_in_parts(pipe, bundled, monkeypatch):
    asked = lessons.prompts("class", 3, 70)
    controls = follow.outlines(world.draw_batch([one.scene for one in asked]))
    whole = follow.drawn(pipe, asked, bundled, controls)
    monkeypatch.setattr(judge, "PART", 2)
    parts = follow.drawn(pipe, asked, bundled, controls)
    assert np.abs(whole - parts).max() < 0.05 and whole.std() > 0.1


def test_the_bundled_controlnet_is_followed(pipe, bundled):
    found = follow.verdict(pipe, bundled, 8, seed=50)
    assert found["controlled"]["edge_f1"] >= 0.75 > found["uncontrolled"]["edge_f1"] + 0.25
    assert found["autoencoder"]["edge_f1"] >= 0.95 and found["chance"]["edge_f1"] <= 0.5
    assert found["controlled"]["everything"] >= 0.6


def test_the_bundled_controlnet_draws_the_same_in_diffusers_and_accelerated(pipe, bundled):
    net = diffusers.ControlNetModel.from_pretrained(TINY / "controlnet")
    theirs = diffusers.StableDiffusionControlNetPipeline.from_pretrained(TINY, controlnet=net, safety_checker=None)
    theirs.set_progress_bar_config(disable=True)
    asked = lessons.prompts("class", 2, 60)
    hints, noise = follow.outlines(world.draw_batch([one.scene for one in asked])), torch.randn(2, 4, 8, 8)
    texts = [one.text for one in asked]
    want = theirs(
        texts, image=hints, num_inference_steps=8, guidance_scale=3.0, latents=noise, output_type="np", height=64, width=64
    ).images  # fmt: skip
    for one in (pipe, sdcore.accelerate(pipe)):
        control = [Control(bundled, hints)]
        found = one(texts, steps=8, guidance=3.0, noise=noise, control=control, emphasis="none").pixels
        found = (found / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()
        assert np.abs(found - want).max() <= 1 / 255
    plain = pipe(texts, steps=8, guidance=3.0, noise=noise, emphasis="none").pixels
    assert (
        plain - pipe(texts, steps=8, guidance=3.0, noise=noise, control=control, emphasis="none").pixels
    ).abs().max() > 0.2


def test_the_commands_of_the_page(tmp_path, monkeypatch):
    """Those of docs/control.md that use the bundled ControlNet, as they stand there, by its name."""
    monkeypatch.chdir(tmp_path)
    scene = world.held_out_scenes(2, 3)[1][1]
    Image.fromarray(world.levels(world.draw(scene))).save("in.png")
    mask = np.zeros((64, 64), np.uint8)
    mask[:, 32:] = 255
    Image.fromarray(mask).save("mask.png")
    drawn = []
    for i, words in enumerate(commands("## Along edges, on the bundled model")):
        words += ["--steps", "3", "--out", f"{i}.png"] if words[1] == "generate" else []
        assert main(words[1:]) == 0
        drawn += [open_picture(f"{i}.png").pixels] if words[1] == "generate" else []
    assert np.array_equal(open_picture("edges.png").pixels[..., 0], canny(open_picture("in.png").pixels))
    assert len(drawn) == 3 and len({one.tobytes() for one in drawn}) == 3
    assert np.array_equal(
        drawn[2][:, :32], open_picture("in.png").pixels[:, :32]
    )  # inpainted: the rest stays to the bit


@pytest.mark.check
def test_the_figures_of_the_bundled_controlnet_are_made_again(pipe, bundled):
    version = json.loads((TINY / "controlnet/version.json").read_text())
    found = follow.verdict(pipe, bundled, version["judged"]["prompts"], version["judged"]["seed"])
    for who, figures in found.items():
        for key, value in figures.items():
            assert value == pytest.approx(version[who][key], abs=0.01), (who, key)


@pytest.mark.check
def test_training_reaches_the_aims_again(tmp_path):
    """`make chapter` from nothing: every aim met, in fifteen minutes on two cores; convergence is sudden."""
    options = chapter.ChapterOptions(out=str(tmp_path), threads=1)
    result = chapter.go(next(entry for entry in chapter.ENTRIES if entry.name == "controlnet"), options)
    assert [row for row in result.rows if not row.met] == [] and result.processor <= 15 * 60 * 2
    log = (tmp_path / "controlnet/canny/log.jsonl").read_text().splitlines()
    curve = [line["edge_f1"] for line in map(json.loads, log) if "edge_f1" in line]
    rises = [after - before for before, after in zip(curve, curve[2:], strict=False)]
    assert max(rises) > 0.5 * (max(curve) - min(curve))  # within 100 of 900 steps
