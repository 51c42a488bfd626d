"""The methods teach the bundled model what they promise: figures of the world's exact checker on prompts nothing was chosen on.

The long proof runs `make chapter`'s entries whole, some minutes each, and asserts every aim; it leaves the report of the run in
docs/. The short tests take the same way in a few steps, and see that each method moves the pictures where it should.
"""

import json
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from sdcore.train import chapter, judge, lessons, report
from sdcore.weights.adapters import read_adapter
from sdcore.weights.embeddings import read_embeddings

import sdcore
from sdcore import lora

TINY = Path(__file__).parents[1] / "weights" / "tiny"
THREADS = torch.get_num_threads()


def options(out: Path, **changes) -> chapter.ChapterOptions:
    return chapter.ChapterOptions(out=str(out), threads=THREADS, **changes)


def figures(result: report.Result) -> dict[str, float]:
    return {row.what: row.got for row in result.rows}


# ------------------------------------------------------------------------------------------------------------- the long proofs


@pytest.mark.check
@pytest.mark.parametrize("name", ["dreambooth", "lora", "textual-inversion"])
def test_a_method_reaches_its_aims(tmp_path_factory, name):
    """From nothing but the bundled model: every aim met, by prompts enough, in the time that the report says."""
    root = tmp_path_factory.mktemp("chapter")
    entry = next(entry for entry in chapter.ENTRIES if entry.name == name)
    result = chapter.go(entry, options(root))
    print(report.table([result]))
    assert result.judged["prompts"] >= 100 and result.judged["seed"] == chapter.JUDGED
    assert [row for row in result.rows if not row.met] == []
    assert sum(row.aim is not None for row in result.rows) >= 2
    trainings = [json.loads(line) for line in (root / name / "times.jsonl").read_text().splitlines()]
    assert all(one["processor"] <= 15 * 60 * 2 for one in trainings)  # fifteen minutes on two cores
    if name == "dreambooth":
        found = figures(result)
        assert found["class prompts lost, without it"] > found["class prompts lost, with the prior"]
    if name == "lora":
        assert assert_peers_draw_the_same(root / "lora/poster") > 0.03


def assert_peers_draw_the_same(run: Path) -> float:
    """The trained LoRA attached, merged, and loaded by diffusers (whose LoRA layers are PEFT's): within 1/255 of each other.

    Gives how far it moves the pictures, the mean over pixels, in shares of white.
    """
    prompts = [one.text for one in lessons.prompts("poster", 4, 5)]
    noise = torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    pipe = sdcore.load(str(TINY), device="cpu", dtype=torch.float32)

    def ours() -> np.ndarray:
        pixels = pipe(prompts, steps=12, guidance=3.0, sampler="ddim", noise=noise, emphasis="none").pixels
        return (pixels / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()

    base = ours()
    lora.attach(pipe, read_adapter(run / f"{run.name}.safetensors", pipe)[0])
    attached = ours()
    lora.merge(pipe)
    merged = ours()
    theirs = diffusers.StableDiffusionPipeline.from_pretrained(TINY, safety_checker=None, local_files_only=True)
    theirs.scheduler = diffusers.DDIMScheduler.from_config(theirs.scheduler.config)
    theirs.set_progress_bar_config(disable=True)
    theirs.load_lora_weights(str(run / "pytorch_lora_weights.safetensors"))
    peer = theirs(prompts, num_inference_steps=12, guidance_scale=3.0, latents=noise, output_type="np").images
    assert np.abs(merged - attached).max() <= 1 / 255 and np.abs(peer - attached).max() <= 1 / 255
    return float(np.abs(base - attached).mean())


# --------------------------------------------------------------------------------------------------------------- the short ones


@pytest.fixture(scope="module")
def trials(tmp_path_factory):
    """Name -> folder of an entry run in few steps with few prompts, and its result."""
    root, done = tmp_path_factory.mktemp("trials"), {}

    def run(name: str) -> tuple[Path, report.Result]:
        if name not in done:
            entry = next(entry for entry in chapter.ENTRIES if entry.name == name)
            done[name] = chapter.go(entry, options(root, steps=STEPS[name], prompts=4, seed=77))
        return root / name, done[name]

    return run


STEPS = {"dreambooth": 12, "lora": 40, "lora-night": 40, "textual-inversion": 20}


def losses(run: Path) -> list[float]:
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


def test_a_lora_moves_the_pictures_in_a_few_steps(trials):
    folder, result = trials("lora")
    assert figures(result)["parameters, of the UNet's"] <= 0.02
    assert figures(result)["attached against merged, largest difference"] <= 1
    assert assert_peers_draw_the_same(folder / "poster") > 0.01


def test_a_lora_of_all_layers_darkens_the_sky_in_a_few_steps(trials):
    folder, result = trials("lora-night")
    assert figures(result)["parameters, of the UNet's"] <= 0.02
    assert assert_peers_draw_the_same(folder / "night") > 0.1
    names = (folder / "night/night.safetensors").read_bytes()[:20000]  # --layers full
    assert b"lora_unet_conv_in.lora_down" in names and b"lora_unet_time_embedding_linear_1" in names


def test_dreambooth_writes_a_model_and_keeps_the_class_or_not(trials):
    folder, result = trials("dreambooth")
    for run in ("with-prior", "without-prior"):
        assert (folder / run / "model/unet/diffusion_pytorch_model.safetensors").exists()
        assert losses(folder / run)[-1] < losses(folder / run)[0]
    lines = [json.loads(line) for line in (folder / "with-prior/log.jsonl").read_text().splitlines()]
    assert "prior" in lines[0] and "prior" not in (folder / "without-prior/log.jsonl").read_text()
    tuned, before = (judge.fingerprint(model)["files"] for model in (folder / "with-prior/model", TINY))
    changed = [name for name in before if name.endswith(".safetensors") and tuned[name] != before[name]]
    # what trains, and no more
    assert changed == ["text_encoder/model.safetensors", "unet/diffusion_pytorch_model.safetensors"]


def test_a_word_changes_nothing_else(trials):
    folder, result = trials("textual-inversion")
    assert figures(result)["files of the model that changed"] == 0
    (word,) = read_embeddings(folder / "look/look.safetensors")
    assert figures(result)["numbers that trained"] == sum(v.numel() for v in word.vectors) == 2 * 128
