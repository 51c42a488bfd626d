"""The `parameters` text of A1111 and its kin: read into options, written, and drawn again."""

import json

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin
from safetensors.torch import save_file

import sdcore
from sdcore.cli import main
from sdcore.image import open_picture, parameters_text, parse_parameters, read_metadata, read_parameters
from tests import tiny_models

# In the shape in which the programs write them -> what is understood.
EXAMPLES = {
    "A1111 1.6": (
        "portrait of a (red:1.2) circle, masterpiece\nNegative prompt: EasyNegative, lowres\n"
        "Steps: 20, Sampler: DPM++ 2M Karras, CFG scale: 7, Seed: 2508134317, Size: 512x768, Model hash: cc6cb27103, "
        "Model: v1-5-pruned-emaonly, Clip skip: 2, Version: v1.6.0",
        {"prompt": "portrait of a (red:1.2) circle, masterpiece", "negative": "EasyNegative, lowres", "steps": 20,
         "sampler": "dpmpp_2m", "schedule": "karras", "guidance": 7.0, "seed": 2508134317, "size": "512x768",
         "model_hash": "cc6cb27103", "model": "v1-5-pruned-emaonly", "clip_skip": 1, "version": "v1.6.0"},
    ),
    "A1111 1.10": (
        "cat <lora:detail:0.8>\nin two lines, Steps: none\nNegative prompt: a\nb\nSteps: 28, Sampler: DPM++ 2M SDE, "
        "Schedule type: Automatic, CFG scale: 6.5, Seed: 1, Size: 832x1216, Model hash: 31e35c80fc, Model: sd_xl_base_1.0, "
        'Denoising strength: 0.4, Hires upscale: 1.5, Lora hashes: "detail: 5e1c, style: 0c6e", TI hashes: "x: c74b", '
        "RNG: NV, Emphasis: No norm, Version: v1.10.1",
        {"prompt": "cat <lora:detail:0.8>\nin two lines, Steps: none", "negative": "a\nb", "steps": 28,
         "sampler": "dpmpp_2m_sde", "schedule": "exponential", "guidance": 6.5, "seed": 1, "size": "832x1216",
         "model_hash": "31e35c80fc", "model": "sd_xl_base_1.0", "emphasis": "no-norm", "version": "v1.10.1"},
    ),
    "Forge": (
        "a (cat), dog\nSteps: 8, Sampler: Euler a, Schedule type: Align Your Steps, CFG scale: 2, Seed: 99, Size: 64x64, "
        "Model hash: aaaa, Model: m, Diffusion in Low Bits: Automatic, Version: f2.0.1v1.10.1-previous-659-gc055f2d4",
        {"prompt": "a (cat), dog", "steps": 8, "sampler": "euler_a", "schedule": "ays", "guidance": 2.0, "seed": 99,
         "size": "64x64", "model_hash": "aaaa", "model": "m", "version": "f2.0.1v1.10.1-previous-659-gc055f2d4"},
    ),
    "old": (
        "cat\nNegative prompt: \nSteps: 30, Sampler: DPM++ SDE Karras, CFG scale: 7.5, Seed: 5, Size: 512x512, ENSD: 31337",
        {"prompt": "cat", "negative": "", "steps": 30, "sampler": "dpmpp_sde", "schedule": "karras", "guidance": 7.5,
         "seed": 5, "size": "512x512"},
    ),
    "uniform": (
        "cat\nSteps: 3, Sampler: Euler, Schedule type: Uniform, CFG scale: 4, Seed: 5, Size: 8x8, Emphasis: None, Clip skip: 1",
        {"prompt": "cat", "steps": 3, "sampler": "euler", "schedule": "linspace", "guidance": 4.0, "seed": 5, "size": "8x8",
         "emphasis": "none", "clip_skip": 0},
    ),
    "automatic": (
        "cat\nSteps: 3, Sampler: Euler, Schedule type: Automatic, CFG scale: 4, Seed: 5, Emphasis: Ignore, Clip skip: two",
        {"prompt": "cat", "steps": 3, "sampler": "euler", "guidance": 4.0, "seed": 5, "emphasis": "Ignore"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", EXAMPLES)
def test_read(name, tmp_path):
    text, want = EXAMPLES[name]
    assert parse_parameters(text) == want
    save(tmp_path / "a.png", text)
    assert read_metadata(tmp_path / "a.png") == want
    assert read_parameters(tmp_path / "a.png")["Steps"] == str(want["steps"])


def test_round_trip():
    """What is written is read as it was; what is as usual is not written, as by A1111."""
    settings = {
        "prompt": "a (cat:1.2)\nBREAK dog", "negative": "x", "steps": 7, "sampler": "dpmpp_2m", "schedule": "karras",
        "guidance": 4.5, "seed": 3, "size": "64x72", "clip_skip": 2, "emphasis": "no-norm", "version": "sdcore 0.1.0",
    }  # fmt: skip
    text = parameters_text(settings)
    assert "Clip skip: 3, Emphasis: No norm" in text and parse_parameters(text) == settings
    for emphasis in ("comfyui", "compel", "none"):
        assert parse_parameters(parameters_text(settings | {"emphasis": emphasis}))["emphasis"] == emphasis
    plain = parameters_text(settings | {"clip_skip": 0, "emphasis": "a1111"})
    assert "Clip skip" not in plain and "Emphasis" not in plain


# ---------------------------------------------------------------- drawn again


def save(path, text):
    info = PngImagePlugin.PngInfo()
    info.add_text("parameters", text)
    Image.new("RGB", (8, 8)).save(path, pnginfo=info)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return {family: str(tiny_models.write_folder(root / family, family)) for family in ("sd1", "sdxl")}


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)

    def call(*words):
        code = main([str(word) for word in words])
        out, err = capsys.readouterr()
        return code, out, err

    return call


TEXT = (
    "a (red circle:1.4), [cat|dog]\nNegative prompt: (blue), square\nSteps: 3, Sampler: DPM++ 2M Karras, CFG scale: 4, Seed: 5, "
    'Size: 72x48, Model: v1-5-pruned, Clip skip: 2, Lora hashes: "x: 1", Variation seed: 3, Emphasis: No norm, RNG: {rng}, '
    "Version: v1.6.0"
)


def test_a_picture_of_another_program_is_the_call_by_hand(run, folders):
    save("theirs.png", TEXT.format(rng="NV"))
    code, _, err = run("generate", "--like", "theirs.png", "--model", folders["sd1"])
    assert code == 0
    for said in ("another program", 'Lora hashes: "x: 1", which is not followed', "Variation seed: 3", "RNG: NV"):
        assert said in err, said
    pipe = sdcore.load(folders["sd1"], device="cpu")
    by_hand = pipe(
        "a (red circle:1.4), [cat|dog]", "(blue), square", steps=3, sampler="dpmpp_2m", schedule="karras", guidance=4.0,
        seed=5, size=(72, 48), clip_skip=1, emphasis="no-norm",
    ).images[0]  # fmt: skip
    assert np.array_equal(open_picture("out.png"), by_hand.pixels)
    save("theirs.png", TEXT.format(rng="CPU"))
    code, _, err = run(
        "generate", "--like", "theirs.png", "--model", folders["sd1"], "--clip-skip", "0", "--out", "b.png"
    )
    assert code == 0 and "RNG" not in err
    assert not np.array_equal(open_picture("b.png"), by_hand.pixels)  # what is given here wins


def test_our_own_picture_read_as_another_program_would(run, folders):
    """Only the `parameters` text of our file is left: the same picture comes out of it."""
    words = [
        "generate",
        "a (red:1.3) circle",
        "--negative",
        "(dog)",
        "--steps",
        "3",
        "--guidance",
        "3",
        "--clip-skip",
        "1",
    ]
    assert run(*words, "--emphasis", "compel", "--model", folders["sd1"], "--seed", "9")[0] == 0
    text = Image.open("out.png").info["parameters"].replace("Version: sdcore", "Version: other")
    save("stripped.png", text)
    assert run("generate", "--from", "stripped.png", "--model", folders["sd1"], "--out", "again.png")[0] == 0
    assert np.array_equal(open_picture("out.png"), open_picture("again.png"))


def test_clip_skip_is_left_out_where_the_other_program_has_none(run, folders):
    save("theirs.png", TEXT.format(rng="CPU"))
    code, _, err = run("generate", "--like", "theirs.png", "--model", folders["sdxl"])
    assert code == 0 and "clip skip 1 is left out" in err and read_metadata("out.png")["clip_skip"] == 0


def test_embeddings_and_the_second_prompt_on_the_command_line(run, folders):
    """They act as in a call, stand in the PNG, and come back with --from."""
    vectors = torch.randn(2, 32, generator=torch.Generator().manual_seed(1)) * 0.05
    save_file({"clip_l": vectors, "clip_g": vectors.repeat(1, 2)}, "my-style.safetensors")
    words = [
        "generate",
        "a my-style cat",
        "--steps",
        "2",
        "--model",
        folders["sdxl"],
        "--prompt2",
        "dog",
        "--negative2",
        "red",
    ]
    assert run(*words, "--embedding", "my-style.safetensors", "--json")[0] == 0
    recorded = read_metadata("out.png")
    assert recorded["embedding"] == ["my-style.safetensors"] and recorded["prompt2"] == "dog"
    assert run(*words, "--out", "without.png")[0] == 0
    assert run("generate", "--from", "out.png", "--out", "again.png")[0] == 0
    first, without, again = (np.asarray(open_picture(name)) for name in ("out.png", "without.png", "again.png"))
    assert np.array_equal(first, again) and not np.array_equal(first, without)
    code, _, err = run("generate", "cat", "--model", folders["sd1"], "--embedding", "my-style.safetensors")
    assert code == 2 and "'my-style': its vectors are 32 and 64 wide" in err and err.count("\n") == 1


def test_pictures_from_before_there_was_a_grammar(run, folders):
    """Ours without a word on emphasis were drawn with brackets taken literally, and are again."""
    assert run("generate", "a (red) circle", "--steps", "2", "--model", folders["sd1"], "--emphasis", "none")[0] == 0
    metadata = read_metadata("out.png")
    info = PngImagePlugin.PngInfo()
    info.add_text("sdcore", json.dumps({k: v for k, v in metadata.items() if k != "emphasis"}))
    Image.open("out.png").save("old.png", pnginfo=info)
    assert run("generate", "--from", "old.png", "--out", "again.png")[0] == 0
    assert np.array_equal(open_picture("out.png"), open_picture("again.png"))


@pytest.mark.parametrize("words, says", [
    (["--emphasis", "loud"], "emphasis"), (["--clip-skip", "99"], "clip_skip"), (["--prompt2", "x"], "one text encoder"),
    (["--embedding", "none.pt"], "no such file"), (["--like", "none.png"], "No such file"),
])  # fmt: skip
def test_mistakes(run, folders, words, says):
    code, out, err = run("generate", "cat", "--model", folders["sd1"], "--steps", "1", *words)
    assert (code, out) == (2, "") and says in err and err.count("\n") == 1
