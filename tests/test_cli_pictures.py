"""The command line on pictures: the documented commands, what stays to the bit through PNG files, one line for every mistake."""

import os
import re
import shlex
from pathlib import Path

import cv2
import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

from sdcore.cli import main
from sdcore.image import open_picture, read_metadata
from tests import tiny_models
from tests.test_tasks import half, picture, pil_mask, seeded

DOCS = Path(__file__).parents[1] / "docs/control.md"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_models.write_folder(tmp_path_factory.mktemp("models") / "sd1", "sd1")


@pytest.fixture(scope="module")
def nets(model):
    """Random ControlNets in the official layout: two for the small model, one of the other family."""
    written = []
    xl = tiny_models.write_folder(model.parent / "sdxl", "sdxl")
    for number, base in enumerate((model, model, xl)):
        unet = diffusers.UNet2DConditionModel.from_pretrained(base / "unet")
        net = diffusers.ControlNetModel.from_unet(unet)
        generator = torch.Generator().manual_seed(number)
        with torch.no_grad():
            for parameter in net.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.03)
        written.append(model.parent / f"net{number}")
        net.save_pretrained(written[-1])
    return written


@pytest.fixture
def run(model, tmp_path, monkeypatch, capsys):
    """`run("generate", ...)` in an empty folder -> (exit code, stdout, stderr); generate gets the small model, 2 steps."""
    monkeypatch.chdir(tmp_path)

    def call(*words):
        words = [str(word) for word in words]
        if words[0] == "generate":
            for option, value in (("--model", model), ("--steps", "2")):
                words += [] if option in words else [option, str(value)]
        code = main(words)
        return code, *capsys.readouterr()

    return call


def pixels(path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB"), dtype=np.int16)


# ------------------------------------------------------------------------------------------------ the documented commands


def commands(section: str) -> list[list[str]]:
    """The commands of a section of the page, words of a shell."""
    page = DOCS.read_text().split(section, 1)[1]
    block = re.search(r"```sh\n(.*?)```", page, re.DOTALL)[1].replace("\\\n", " ")
    return [words for line in block.splitlines() if (words := shlex.split(line, comments=True))]


def test_the_two_control_tasks(run, model, nets):
    """Canny at two sizes with a negative prompt; edges with their middle half zeroed beside a pose, at scales 1.0 and 0.8: the
    commands of the page, on a small random model and ControlNets in the official layout, equal OpenCV and diffusers."""
    for name, seed, side in (("dog", 1, 64), ("car", 2, 96), ("landscape", 3, 64), ("pose", 4, 64)):
        picture(side, seed).save(f"{name}.png")
    cv2.imwrite("car-edges.png", cv2.Canny(cv2.imread("car.png"), 100, 200))
    smaller = {"512x512": "64x64", "768x768": "96x96", "sd15": str(model)}
    canny, pose, _ = map(str, nets)
    drawn = []
    for n, words in enumerate(commands("## Controls")):
        words = [
            smaller.get(w, w).replace("canny-sd15=", f"{canny}=").replace("openpose-sd15=", f"{pose}=")
            for w in words[1:]
        ]
        if words[0] == "generate":
            # the small vocabulary spells words by letters; diffusers cuts off what does not fit one row of tokens
            words += ["--guidance", "3", "--emphasis", "none", "--out", f"{n}.png"]
            drawn.append(f"{n}.png")
        code, _, err = run(*words)
        assert code == 0, err
    edges = {name: cv2.Canny(cv2.imread(f"{name}.png"), 100, 200) for name in ("dog", "car", "landscape")}
    edges["landscape"][:, 16:48] = 0
    assert np.array_equal(pixels("edges.png")[..., 0], edges["dog"])
    assert np.array_equal(pixels("around.png")[..., 0], edges["landscape"])

    first, second = (diffusers.ControlNetModel.from_pretrained(net) for net in nets[:2])
    tasks = [
        (first, ["dog"], "a dog in a meadow", "", 1.0, 0, 64),
        (first, ["car"], "a sports car", "blurry, low quality, deformed", 1.0, 0, 96),
        ([first, second], ["landscape", "pose"], "a person in a landscape", "blurry, low quality", [1.0, 0.8], 1, 64),
    ]
    for (net, names, prompt, negative, scale, seed, side), path in zip(tasks, drawn, strict=True):
        theirs = diffusers.StableDiffusionControlNetPipeline.from_pretrained(model, controlnet=net, safety_checker=None)
        theirs.set_progress_bar_config(disable=True)
        maps = [Image.fromarray(np.stack([edges[n]] * 3, -1)) if n in edges else Image.open(f"{n}.png") for n in names]
        want = theirs(
            prompt, image=maps if len(maps) > 1 else maps[0], negative_prompt=negative, num_inference_steps=20,
            guidance_scale=3.0, controlnet_conditioning_scale=scale, generator=seeded(seed), height=side, width=side,
        ).images[0]  # fmt: skip
        assert np.abs(pixels(path) - np.asarray(want, dtype=np.int16)).max() <= 1
        assert read_metadata(path)["control"]


def test_the_commands_on_pictures(run):
    """Those at the head of the page."""
    picture().save("in.png")
    pil_mask(half()).save("mask.png")
    Image.fromarray(np.tile(np.linspace(0, 255, 64).astype(np.uint8), (64, 1))).save("map.png")
    sizes = []
    for n, words in enumerate(commands("# Drawing from pictures")):
        code, _, err = run(*words[1:], "--out", f"{n}.png")
        assert code == 0, err
        sizes.append(open_picture(f"{n}.png").size)
    assert sizes == [(64, 64), (64, 64), (128, 64), (64, 64), (128, 128)]


# ------------------------------------------------------------------------------------------------ through files


@pytest.mark.parametrize("seed", range(4))
def test_what_is_not_masked_stays_to_the_bit_through_files(run, seed):
    """PNG in, PNG out, sizes that are no multiple of 8; and the picture can be made again from its own settings."""
    rng = np.random.default_rng(seed)
    width, height = (int(side) for side in rng.integers(40, 70, 2))
    start = picture(width, seed, height)
    start.save("in.png")
    mask = rng.random((height, width)) < 0.3
    Image.fromarray(mask.astype(np.uint8) * 255).save("mask.png")
    options = ["--image", "in.png", "--mask", "mask.png", "--seed", seed, "--guidance", "1"]
    assert run("generate", "a cat", *options)[0] == 0
    done = pixels("out.png")
    assert np.array_equal(done[~mask], start.pixels[~mask]) and not np.array_equal(done, start.pixels)
    assert main(["generate", "--from", "out.png", "--out", "again.png"]) == 0
    assert np.array_equal(pixels("again.png"), done)


def test_preview_is_kept_while_drawing(run):
    """The last guess stands in the file, near the finished picture."""
    assert run("generate", "a cat", "--steps", "3", "--preview", "now.png")[0] == 0
    assert np.abs(pixels("now.png") - pixels("out.png")).mean() < 32


# ------------------------------------------------------------------------------------------------ mistakes


@pytest.mark.parametrize("words, says", [
    ("--image missing.png", "No such file"),
    ("--image cut.png", "cut"),
    ("--image text.png", "text.png"),
    ("--image dot.png", "1 x 1"),
    ("--image wide.png", "50000"),
    ("--image in.png --mask small.png", "32 x 32"),
    ("--image in.png --mask black.png", "white"),
    ("--image in.png --strength 0", "strength"),
    ("--image in.png --strength 0.1", "less than one"),
    ("--image in.png --strength nan", "strength"),
    ("--image in.png --strength lots", "lots"),
    ("--mask in.png", "--image"),
    ("--image in.png --outpaint 8,8", "four whole numbers"),
    ("--control edges.png", "NET=PICTURE"),
    ("--control NET=missing.png", "No such file"),
    ("--control missing=in.png", "missing"),
    ("--control NET=in.png:nan", "finite"),
    ("--control NET=in.png:1:0.9-0.2", "A < B"),
    ("--control NET@canny=in.png", "Union"),
    ("--control XL=in.png", "this model is Stable Diffusion 1.x"),
    ("--depth in.png", "depth"),
    ("--image in.png --image-guidance 1.5", "instructions"),
    ("--image-prompt x=in.png", "--image-encoder"),
    ("--hires 1", "above 1"),
    ("--hires much", "expected a number"),
    ("--refiner missing", "missing"),
    ("--taesd missing", "missing"),
    ("--few-step missing", "missing"),
    ("--refiner tiny:2", "between 0 and 1"),
    ("--preview now.jpg", "PNG"),
])  # fmt: skip
def test_one_line_for_every_mistake(run, nets, words, says):
    """Exit code 2, one line on stderr, nothing written."""
    picture().save("in.png")
    Image.new("RGB", (32, 32), "white").save("small.png")
    Image.new("RGB", (64, 64)).save("black.png")
    Image.new("RGB", (1, 1)).save("dot.png")
    Image.new("1", (50_000, 8)).save("wide.png")
    Path("text.png").write_text("no picture")
    Path("cut.png").write_bytes(Path("in.png").read_bytes()[:200])
    before = sorted(os.listdir("."))
    code, out, err = run("generate", "a cat", *words.replace("NET", str(nets[0])).replace("XL", str(nets[2])).split())
    assert code == 2 and not out and err.count("\n") == 1 and err.startswith("sdcore: ")
    assert re.search(says, err), err
    assert sorted(os.listdir(".")) == before


@pytest.mark.parametrize("words, says", [
    ("missing.png edges.png", "No such file"),
    ("in.png edges.jpg", "PNG"),
    ("in.png edges.png --low 300 --high 200", "low <= high"),
    ("in.png edges.png --low nan", "low <= high"),
    ("in.png edges.png --blank 0.75-0.25", "A < B"),
    ("in.png edges.png --blank half", "A-B such as"),
])  # fmt: skip
def test_one_line_for_every_mistake_about_edges(run, words, says):
    """The same for `sdcore canny`."""
    picture().save("in.png")
    code, out, err = run("canny", *words.split())
    assert code == 2 and not out and err.count("\n") == 1 and re.search(says, err), err
    assert sorted(os.listdir(".")) == ["in.png"]
