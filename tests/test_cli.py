"""The command line: what it draws and writes, that the same picture can be made again, and one line for every mistake."""

import json
import os
import pickle
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin
from safetensors.torch import load_file, save_file

from sdcore.cli import main
from sdcore.image import open_picture, read_metadata
from tests import tiny_models

PROMPT = "a red circle above a blue square"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_models.write_folder(tmp_path_factory.mktemp("models") / "sd1", "sd1")


@pytest.fixture(scope="module")
def xl(tmp_path_factory):
    return tiny_models.write_folder(tmp_path_factory.mktemp("models") / "sdxl", "sdxl")


@pytest.fixture
def run(model, tmp_path, monkeypatch, capsys):
    """`run("generate", ...)` in an empty folder -> (exit code, stdout, stderr); generate gets the small model, 2 steps."""
    monkeypatch.chdir(tmp_path)

    def call(*words):
        if words[0] == "generate" and "--from" not in words:
            words = ("generate", "--model", model, "--steps", "2", *words[1:])
        code = main([str(word) for word in words])
        return code, *capsys.readouterr()

    return call


def files(folder="."):
    return sorted(os.listdir(folder))


# --- generate


def test_generate_writes_a_picture_with_its_settings(run):
    code, out, err = run("generate", PROMPT, "--seed", "3", "--guidance", "5", "--negative", "dog")
    assert (code, out, err) == (0, "out.png\n", "") and files() == ["out.png"]
    picture = open_picture("out.png")
    assert picture.size == (64, 64) and np.asarray(picture).std() > 5
    wanted = {
        "prompt": PROMPT,
        "negative": "dog",
        "steps": 2,
        "guidance": 5.0,
        "seed": 3,
        "sampler": "pndm",
        "size": "64x64",
    }
    assert picture.metadata.items() >= wanted.items()
    assert (
        Image.open("out.png")
        .info["parameters"]
        .startswith(f"{PROMPT}\nNegative prompt: dog\nSteps: 2, Sampler: PLMS, ")
    )


def test_generate_is_the_pipeline(run, model):
    """The words of the command line arrive: the same picture as from Python, with nothing at its default."""
    import sdcore

    words = "--sampler euler_a --schedule karras --steps 3 --guidance 4 --seed 5 --size 72x48 --negative dog --dtype bfloat16"
    assert run("generate", PROMPT, *words.split())[0] == 0
    pipe = sdcore.load(str(model), dtype="bfloat16")
    options = dict(sampler="euler_a", schedule="karras", steps=3, guidance=4.0, seed=5, size=(72, 48))
    assert np.array_equal(open_picture("out.png"), pipe(PROMPT, "dog", **options).images[0])


def test_the_same_picture_again(run):
    """`--from` a picture, one of many, or a sheet of many: the same bytes; what the user adds wins."""
    words = "--sampler euler_a --schedule karras --steps 3 --guidance 4 --seed 5 --size 72x48 --negative dog --count 3"
    assert run("generate", PROMPT, *words.split(), "--out", "a.png")[0] == 0
    assert files() == ["a-1.png", "a-2.png", "a-3.png", "a.png"]
    for name in ("a-2.png", "a.png"):
        code, _, err = run("generate", "--from", name, "--out", f"again-{name}")
        assert (code, err) == (0, "")
        assert open(name, "rb").read() == open(f"again-{name}", "rb").read()
    assert open("a-3.png", "rb").read() == open("again-a-3.png", "rb").read()
    assert run("generate", "--from", "a-2.png", "--seed", "7", "--steps", "2", "a cat", "--out", "b.png")[0] == 0
    assert read_metadata("b.png") == read_metadata("a-2.png") | {"seed": 7, "steps": 2, "prompt": "a cat"}


def test_the_same_picture_with_another_thread_count(run, monkeypatch):
    """The count of threads orders a CPU's sums; it is kept, and taken up again."""
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert run("generate", PROMPT, "--out", "a.png")[0] == 0
        torch.set_num_threads(3)
        assert run("generate", "--from", "a.png", "--out", "b.png")[0] == 0
        assert torch.get_num_threads() == 1 and open("a.png", "rb").read() == open("b.png", "rb").read()
    finally:
        torch.set_num_threads(before)


def test_from_another_model_is_said(run, model, tmp_path):
    run("generate", PROMPT, "--out", "a.png")
    other = tmp_path / "other"
    other.mkdir()
    for part in model.iterdir():
        if part.name != "unet":
            (other / part.name).symlink_to(part)
    (other / "unet").mkdir()
    (other / "unet" / "config.json").symlink_to(model / "unet" / "config.json")
    weights = load_file(model / "unet" / "diffusion_pytorch_model.safetensors")
    weights["conv_in.bias"] = weights["conv_in.bias"] + 1
    save_file(weights, other / "unet" / "diffusion_pytorch_model.safetensors")
    code, _, err = run("generate", "--from", "a.png", "--model", other, "--out", "b.png")
    assert code == 0 and "model_id" in err and "may differ" in err


def test_from_another_program(run, model, monkeypatch):
    """Another tool's settings are taken, but its model's name is not looked up here."""
    import sdcore

    info = PngImagePlugin.PngInfo()
    info.add_text(
        "parameters", f"{PROMPT}\nSteps: 3, Sampler: Euler a, CFG scale: 4, Seed: 5, Size: 72x48, Model: v1-5-pruned"
    )
    Image.new("RGB", (8, 8)).save("theirs.png", pnginfo=info)
    code, _, err = run("generate", "--from", "theirs.png", "--model", model)
    assert code == 0 and "another program" in err
    wanted = {"prompt": PROMPT, "steps": 3, "sampler": "euler_a", "guidance": 4.0, "seed": 5, "size": "72x48"}
    assert read_metadata("out.png").items() >= wanted.items() and read_metadata("out.png")["model"] == str(model)
    asked = []

    def load(name, **_):
        asked.append(name)
        raise KeyboardInterrupt

    monkeypatch.setattr(sdcore, "load", load)
    assert run("generate", "--from", "theirs.png")[0] == 130 and asked == ["tiny"]


def test_count_strip_and_json(run, model):
    import sdcore
    from sdcore.image import to_pictures

    code, out, err = run(
        "generate", PROMPT, "--count", "2", "--strip", "steps.png", "--steps", "3", "--sampler", "euler", "--json"
    )
    report = json.loads(out.splitlines()[-1])
    assert (code, err) == (0, "") and report["images"] == ["out-1.png", "out-2.png"] and report["seeds"] == [0, 1]
    assert (report["grid"], report["strip"]) == ("out.png", "steps.png") and report["seconds"]["draw"] > 0
    assert report["settings"]["prompt"] == PROMPT and report["notices"] == []
    one, two, sheet = (np.asarray(open_picture(f"out{i}.png")) for i in ("-1", "-2", ""))
    assert np.array_equal(sheet[:, :64], one) and np.array_equal(sheet[:, 68:], two) and not np.array_equal(one, two)
    strip = np.asarray(open_picture("steps.png"))
    assert strip.shape == (64 + 28, 3 * 64 + 2 * 4, 3)
    assert np.array_equal(strip[:64, -64:], one)  # Euler ends where its last guess is
    pipe = sdcore.load(str(model))
    first = next(iter(pipe.steps(PROMPT, steps=3, sampler="euler")))
    assert np.array_equal(strip[:64, :64], to_pictures(pipe.decode(first.x0))[0])  # the guess, not the noisy latent


def test_lossy_ways_of_the_fast_engine(run, model):
    """Each draws what `accelerate` draws with it; the settings are kept, taken up by --from, and given up again."""
    import sdcore

    plain = sdcore.load(str(model), device="cpu")
    ways = {"exact": {}, "fp8": {"fp8": True}, "merge": {"merge": 0.5}, "deep": {"deep_every": 2}}
    ways["all"] = ways["fp8"] | ways["merge"] | ways["deep"]
    words = {"fp8": ["--fp8"], "merge": ["--merge", "0.5"], "deep": ["--deep-every", "2"]}
    words |= {"exact": [], "all": [*words["fp8"], *words["merge"], *words["deep"]]}
    asked, seen = ["--engine", "fast", "--steps", "4", "--seed", "3"], []
    for name, options in ways.items():
        assert run("generate", PROMPT, *asked, *words[name], "--out", f"{name}.png")[0] == 0
        want = sdcore.accelerate(plain, **options)(PROMPT, steps=4, seed=3).images[0]
        got = open_picture(f"{name}.png")
        assert np.array_equal(got.pixels, want.pixels) and not any(np.array_equal(got.pixels, other) for other in seen)
        assert {key: value for key, value in got.metadata.items() if key in ways["all"]} == options
        seen.append(got.pixels)
    assert run("generate", "--from", "all.png", "--out", "again.png")[0] == 0
    assert open("all.png", "rb").read() == open("again.png", "rb").read()
    assert (
        run("generate", "--from", "all.png", "--no-fp8", "--merge", "0", "--deep-every", "1", "--out", "b.png")[0] == 0
    )
    assert np.array_equal(open_picture("exact.png").pixels, open_picture("b.png").pixels)
    assert run("generate", "--from", "all.png", "--engine", "plain", "--out", "c.png")[0] == 0
    assert read_metadata("c.png").keys().isdisjoint(ways["all"])


def test_words_that_do_not_fit_are_named_once(run):
    code, out, err = run("generate", "red " * 22 + "elephant", "--count", "2", "--json", "--emphasis", "none")
    assert code == 0 and err.count("elephant") == 1 and "22 tokens" in err
    assert "elephant" in json.loads(out)["notices"][0]


def test_called_from_python_it_leaves_no_trace(run):
    """Tests and notebooks call `main`: afterwards the log goes where it went before."""
    import logging

    log = logging.getLogger("sdcore")
    before = (list(log.handlers), log.propagate, log.level)
    run("generate", "")
    assert (log.handlers, log.propagate, log.level) == before


# --- the other commands


def test_inspect_and_convert(run, model):
    code, out, _ = run("inspect", model)
    assert code == 0 and "sd1" in out and "UNet" in out
    assert json.loads(run("inspect", model, "--json")[1])["family"] == "sd1"
    assert run("convert", model, "one.safetensors")[0] == 0
    assert json.loads(run("inspect", "one.safetensors", "--json")[1])["layout"] == "ldm"
    assert run("convert", "one.safetensors", "back")[0] == 0
    name = "unet/diffusion_pytorch_model.safetensors"
    back, there = load_file(f"back/{name}"), load_file(model / name)
    assert back.keys() == there.keys() and all(torch.equal(back[key], there[key]) for key in there)
    assert (
        run("generate", PROMPT, "--out", "a.png")[0]
        == run("generate", PROMPT, "--model", "one.safetensors", "--out", "b.png")[0]
        == 0
    )
    a, b = (np.asarray(open_picture(name), dtype=int) for name in ("a.png", "b.png"))
    assert abs(a - b).max() <= 1  # the same weights at other addresses: sums may be added up in another order


def test_train_hands_its_words_to_the_method(run, monkeypatch):
    for method in ("text2image", "vae"):
        module = pytest.importorskip(f"sdcore.train.{method}")
        seen = []
        monkeypatch.setattr(module, "main", lambda argv, seen=seen: seen.append(argv) or 0)
        assert run("train", method, "--steps", "5", "--help")[0] == 0 and seen == [["--steps", "5", "--help"]]


# --- mistakes: one line, exit 2, nothing written


def refused(result, *says):
    code, out, err = result
    assert code == 2 and out == "", (code, out)
    assert err.startswith("sdcore: ") and err.count("\n") == 1 and err.endswith("\n") and len(err) < 500, err
    for words in says:
        assert words in err, err


@pytest.mark.parametrize("words, says", [
    ([], ["prompt: missing"]),
    ([""], ["prompt: empty"]),
    ([" \n"], ["prompt: empty"]),
    (["x" * 70000], ["65536 bytes", "70000"]),
    (["red \udc80"], ["surrogate"]),
    ([PROMPT, "--steps", "0"], ["steps", "1", "1000", "0"]),
    ([PROMPT, "--steps", "-1"], ["steps", "-1"]),
    ([PROMPT, "--steps", "1001"], ["steps", "1000", "1001"]),
    ([PROMPT, "--steps", "2.5"], ["--steps", "2.5"]),
    ([PROMPT, "--size", "100x64"], ["100x64", "96", "104"]),
    ([PROMPT, "--size", "0"], ["0x0", "8"]),
    ([PROMPT, "--size", "-8x64"], ["--size"]),
    ([PROMPT, "--size=-8x64"], ["-8x64", "8"]),
    ([PROMPT, "--size", "8000000"], ["8192"]),
    ([PROMPT, "--size", "big"], ["--size", "512x768", "big"]),
    ([PROMPT, "--sampler", "eular"], ["'eular'", "euler"]),
    ([PROMPT, "--schedule", "karas"], ["'karas'", "karras"]),
    ([PROMPT, "--guidance", "nan"], ["guidance", "nan"]),
    ([PROMPT, "--guidance", "inf"], ["guidance", "inf"]),
    ([PROMPT, "--seed", "-1"], ["seed", "-1"]),
    ([PROMPT, "--seed", str(2**64)], ["seed", str(2**64)]),
    ([PROMPT, "--seed", "x"], ["--seed", "'x'"]),
    ([PROMPT, "--count", "0"], ["--count"]),
    ([PROMPT, "--count", "101"], ["--count", "100"]),
    ([PROMPT, "--device", "tpu"], ["tpu", "cpu"]),
    ([PROMPT, "--dtype", "int8"], ["int8", "float32"]),
    ([PROMPT, "--model", "tinny"], ["tinny", "tiny"]),
    ([PROMPT, "--model", "missing.safetensors"], ["missing.safetensors", "no such file"]),
    ([PROMPT, "--out", "nowhere/a.png"], ["nowhere"]),
    ([PROMPT, "--out", "a.jpg"], ["a.jpg", "PNG"]),
    ([PROMPT, "--out", "a\x1b[31m\n.jpg"], ["a\\x1b[31m .jpg"]),
    ([PROMPT, "--out", "."], ["."]),
    ([PROMPT, "--strip", "out.png"], ["--strip"]),
    ([PROMPT, "--lora", "a.safetensors"], ["a.safetensors", "no such file"]),
    ([PROMPT, "--fp8"], ["--fp8", "--engine fast"]),
    ([PROMPT, "--merge", "0.5"], ["--merge", "--engine fast"]),
    ([PROMPT, "--deep-every", "2", "--engine", "plain"], ["--deep-every", "--engine fast"]),
    ([PROMPT, "--engine", "fast", "--merge", "0.9"], ["merge", "0.75", "0.9"]),
    ([PROMPT, "--engine", "fast", "--merge", "half"], ["--merge", "'half'"]),
    ([PROMPT, "--engine", "fast", "--deep-every", "0"], ["deep_every", "0"]),
    (["a", "red", "circle"], ["red circle"]),
    (["--from", "missing.png"], ["missing.png", "No such file"]),
])  # fmt: skip
def test_mistakes(run, words, says):
    refused(run("generate", *words), *says)
    assert files() == []


@pytest.mark.parametrize("words, says", [
    (["paint", "kernels"], ["'paint'", "generate"]),
    (["bench"], ["what"]),
    (["bench", "colours"], ["'colours'", "kernels"]),
    ([""], ["invalid choice"]),
    (["train"], ["method"]),
    (["train", "colours"], ["'colours'", "text2image"]),
    (["inspect"], ["FILE"]),
    (["inspect", "missing.ckpt"], ["missing.ckpt"]),
    (["convert", "missing.ckpt", "out"], ["missing.ckpt"]),
    (["convert", "a", "b", "--layout", "flux"], ["flux", "peft"]),
])  # fmt: skip
def test_mistakes_of_other_commands(run, words, says):
    refused(run(*words), *says)
    assert files() == []


def test_an_unwritable_folder(run, tmp_path, monkeypatch):
    """Said before the model is loaded, not after the picture is drawn."""
    import sdcore

    (tmp_path / "locked").mkdir(mode=0o500)
    monkeypatch.setattr(os, "access", lambda path, mode: "locked" not in str(path))  # root may write anywhere
    monkeypatch.setattr(sdcore, "load", lambda *_, **__: pytest.fail("too late"))
    refused(run("generate", PROMPT, "--out", "locked/a.png"), "locked", "may not be written")
    refused(run("generate", PROMPT, "--strip", "nowhere/a.png"), "nowhere")
    assert files() == ["locked"] and files("locked") == []


def test_settings_that_are_none(run):
    """--from: no settings, and settings that a stranger made up, are refused like the same words typed in."""
    Image.new("RGB", (8, 8)).save("plain.png")
    refused(run("generate", "--from", "plain.png"), "plain.png", "no settings")
    for settings in (
        {"steps": [1]},
        {"size": "x"},
        {"seed": "--help"},
        {"sampler": {"a": 1}},
        {"guidance": "nan"},
        {"model": "\x1b[31m"},
    ):
        info = PngImagePlugin.PngInfo()
        info.add_text("sdcore", json.dumps({"version": "sdcore 0.1.0", "prompt": "p", "model": "tinny"} | settings))
        Image.new("RGB", (8, 8)).save("made-up.png", pnginfo=info)
        result = run("generate", "--from", "made-up.png")
        refused(result)
        assert "\x1b" not in result[2]
    assert files() == ["made-up.png", "plain.png"]


class Danger:
    def __reduce__(self):
        return os.system, ("touch marker",)


def pickled(path):
    with open(path, "wb") as file:
        pickle.dump({"state_dict": {"model.diffusion_model.x": Danger()}}, file, protocol=2)


def zipped(path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(Danger(), protocol=2))
        archive.writestr("archive/version", "3\n")


def lora(path):
    key = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
    save_file({f"{key}.lora_down.weight": torch.zeros(4, 320), f"{key}.lora_up.weight": torch.zeros(320, 4)}, path)


@pytest.mark.parametrize("make, name, says", [
    (pickled, "a.ckpt", []),
    (zipped, "a.ckpt", []),
    (pickled, "a.safetensors", []),
    (lora, "a.safetensors", ["LoRA"]),
    (lambda path: open(path, "w").write("hello, I am a text\n" * 99), "a.safetensors", []),
    (lambda path: open(path, "w").write("hello"), "a.txt", []),
    (lambda path: open(path, "wb").close(), "a.safetensors", ["empty"]),
    (lambda path: open(path, "wb").write(b"<!DOCTYPE html><html>login</html>" * 9), "a.ckpt", ["HTML"]),
])  # fmt: skip
def test_files_that_are_no_model(run, make, name, says):
    make(name)
    refused(run("generate", PROMPT, "--model", name), name, *says)
    assert files() == [name]  # neither a picture nor the marker


@pytest.mark.parametrize("harm, says", [
    (lambda folder: cut(folder / "unet/diffusion_pytorch_model.safetensors", 5000), ["diffusion_pytorch_model.safetensors"]),
    (lambda folder: flip(folder / "vae/diffusion_pytorch_model.safetensors"), ["diffusion_pytorch_model.safetensors"]),
    (lambda folder: os.rename(folder / "vae", folder / "old"), ["vae"]),
    (lambda folder: os.rename(folder / "text_encoder", folder / "old"), ["text_encoder"]),
    (lambda folder: os.rename(folder / "tokenizer", folder / "old"), ["tokenizer"]),
    (lambda folder: os.rename(folder / "scheduler", folder / "old"), ["scheduler"]),
    (lambda folder: os.remove(folder / "unet/config.json"), ["unet", "config.json"]),
    (lambda folder: without(folder / "unet/diffusion_pytorch_model.safetensors", "conv_in.weight"), ["conv_in.weight"]),
])  # fmt: skip
def test_damaged_folders(run, model, tmp_path_factory, harm, says):
    import shutil

    folder = tmp_path_factory.mktemp("damaged") / "model"
    shutil.copytree(model, folder)
    harm(folder)
    refused(run("generate", PROMPT, "--model", folder), *says)
    assert files() == []


def cut(file, keep):
    file.write_bytes(file.read_bytes()[:keep])


def flip(file):
    data = bytearray(file.read_bytes())
    data[20] ^= 0x10
    file.write_bytes(data)


def without(file, key):
    weights = load_file(file)
    del weights[key]
    save_file(weights, file)


def test_parts_of_two_families(run, model, xl, tmp_path):
    """An SD 1 folder with SDXL's second text encoder does not load by half."""
    mixed = tmp_path / "mixed"
    mixed.mkdir()
    for part in model.iterdir():
        (mixed / part.name).symlink_to(xl / "text_encoder_2" if part.name == "text_encoder" else part)
    refused(run("generate", PROMPT, "--model", mixed), "text_encoder")
    assert files() == ["mixed"]


def test_nan_gives_no_picture(run, monkeypatch):
    from sdcore.vae import VAE

    decode = VAE.decode
    monkeypatch.setattr(VAE, "decode", lambda self, z: decode(self, z) * float("nan"))
    refused(run("generate", PROMPT), "NaN", "decoder")
    assert files() == []


def test_no_memory_is_no_defect(run, monkeypatch):
    from sdcore.vae import VAE

    def full(*_):
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes")

    monkeypatch.setattr(VAE, "decode", full)
    refused(run("generate", PROMPT), "memory", "--offload")


def test_a_defect_of_ours_shows_itself(run, monkeypatch):
    from sdcore.vae import VAE

    monkeypatch.setattr(VAE, "decode", lambda self, z: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run("generate", PROMPT)
    assert files() == []


def test_stopped_in_the_loop(run, monkeypatch):
    from sdcore.vae import VAE

    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(VAE, "decode", stop)
    code, out, err = run("generate", PROMPT)
    assert (code, out) == (130, "") and err.count("\n") == 1 and files() == []


# --- as a program


def program(*words, **options):
    command = [sys.executable, "-m", "sdcore", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=600, **options)


def test_help_and_mistakes_need_no_torch(tmp_path):
    """`--help` answers at once, and by itself: nothing heavy is imported for it."""
    (tmp_path / "torch.py").write_text("raise SystemExit('torch was imported')")
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    for words in (["--help"], ["generate", "--help"], ["--version"]):
        done = program(*words, env=environment)
        assert done.returncode == 0 and done.stdout.startswith(("usage: sdcore", "sdcore 0.")), done.stderr
    done = program("generate", "x", "--steps", "many", env=environment)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "many" in done.stderr


def test_a_signal_stops_it_cleanly(model, tmp_path):
    words = [sys.executable, "-m", "sdcore", "generate", PROMPT, "--model", model, "--steps", "999"]
    child = subprocess.Popen(
        list(map(str, words)), stderr=subprocess.PIPE, text=True, cwd=tmp_path,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it, and so would we
    )  # fmt: skip
    while child.poll() is None and str(model) not in Path(f"/proc/{child.pid}/maps").read_text():
        time.sleep(0.05)  # until it has the weights: all is imported, and the 999 steps are to come
    time.sleep(1)  # most machines are among them then
    child.send_signal(signal.SIGINT)
    _, err = child.communicate(timeout=120)
    assert child.returncode == 130 and err == "sdcore: stopped\n" and files(tmp_path) == []
