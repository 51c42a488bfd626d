"""ControlNet training on the bundled model: the measure of edges, the judgement of a run, Control-LoRAs, the bundled ControlNet.

That a step equals diffusers' and that a run resumes exactly is in test_methods.py; here are what is measured and what is shipped.
"""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from sdcore.train import loop, tuning, world
from sdcore.train.control_lora import factors
from sdcore.train.controlnet import ControlNetOptions, TrainControlNet
from sdcore.train.edges import edge_f1
from sdcore.train.task import Part
from sdcore.weights import files
from sdcore.weights.controls import load_control

import sdcore
from sdcore.controlnet import ControlNet
from sdcore.errors import ConfigError
from sdcore.image import open_picture
from tests.test_train import final

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
        assert np.array_equal(open_picture(path).pixels, world.levels(world.draw(scene)))
    assert len(paths) == 6
    for text in (path.read_text().strip() for path in (place / "unseen").glob("*.txt")):
        assert world.held_out(world.parse(text))


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
    edges = [edge_f1(255 * c[0].numpy(), 255 * c[0].numpy()) for c in controls]
    assert edges == [1.0, 1.0] and begun["edge_f1"] == begun["edge_f1_uncontrolled"] < 1
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
    assert not np.array_equal(task.drawn(0, controls[0]).pixels, task.uncontrolled[0].pixels)
    sheet = open_picture(out / "samples/controls-00000002.png").pixels
    assert sheet.shape[1] // 64 == 3 and sheet.shape[0] // 64 == 2
    white = (sheet[:64, :64] == 255).all(-1)
    assert white.mean() >= controls[0][0].mean() > 0.005  # the control is in the first column


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
