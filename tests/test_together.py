"""All at once, as people use it: two LoRAs, an embedding and a long weighted prompt, from files, against diffusers."""

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from sdcore.weights.adapters import read_adapter, write_adapter
from sdcore.weights.embeddings import read_embeddings

import sdcore
from sdcore import embeddings, lora
from tests.peers import bytes_of
from tests.test_embeddings import FEW, WIDE, peer_takes
from tests.test_lora import pipeline_lora
from tests.test_prompt import models, noise, peer_embeds, peer_of  # noqa: F401 (a fixture)

PIECES = [  # the embedding, of three vectors, in a weighted piece and in a plain one; more than 77 tokens
    ("photo of a", 1.0), ("red <cat-toy> <cat-toy>_1 <cat-toy>_2 in", 1.8), ("the green background,", 1.0),
    ("large dog", 0.3), ("blue circle " * 15 + ", " + "square " * 35, 0.3), ("a <cat-toy> <cat-toy>_1 <cat-toy>_2", 1.0),
]  # fmt: skip
STRENGTHS = {"style": 0.7, "subject": -0.4}
OPTIONS = dict(steps=4, guidance=7.5)


def written(pieces) -> str:
    """The prompt as a person writes it; its second and third vector diffusers calls by names of their own."""
    text = " ".join(f"({words}:{weight})" if weight != 1 else words for words, weight in pieces)
    return text.replace(" <cat-toy>_1 <cat-toy>_2", "")


def files_of(folder, family, pipe):
    """One LoRA as kohya's file with an alpha that is not its rank, one as PEFT's, and the embedding."""
    style = pipeline_lora(pipe, "style", 4, 10, scale=0.5)
    subject = pipeline_lora(pipe, "subject", 2, 20, pick=lambda name: "attn" in name)
    write_adapter(folder / "style.safetensors", style, "kohya", pipe)
    write_adapter(folder / "subject.safetensors", subject, "peft", pipe)
    save_file({"<cat-toy>": FEW} if family == "sd1" else {"clip_l": FEW, "clip_g": WIDE}, folder / "toy.safetensors")


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_all_at_once_equals_diffusers(tmp_path, models, family):  # noqa: F811
    """The same files into both; pictures from the same noise within 1/255.

    Each part there by the peers' means: PEFT holds the LoRAs at their weights on UNet and text encoders, diffusers' loader the
    vectors, transformers encodes row by row, A1111's formula is worked out in `peer_embeds`. And every part counts: without
    any one of them the picture is another.
    """
    pipe, theirs = sdcore.load(str(models(family)), device="cpu"), peer_of(models(family), family)
    files_of(tmp_path, family, pipe)
    for name in STRENGTHS:
        theirs.load_lora_weights(str(tmp_path), weight_name=f"{name}.safetensors", adapter_name=name)
    theirs.set_adapters(list(STRENGTHS), list(STRENGTHS.values()))
    peer_takes(theirs, tmp_path / "toy.safetensors")
    context, pooled, rows = peer_embeds(theirs, PIECES)
    negative, negative_pooled, _ = peer_embeds(theirs, [("blue <cat-toy> <cat-toy>_1 <cat-toy>_2", 1.3)], rows)
    words = theirs.tokenizer(" ".join(words for words, _ in PIECES), add_special_tokens=False).input_ids
    assert len(words) > 77 and rows >= 4 and context.shape[1] == rows * 24
    embeds = dict(prompt_embeds=context, negative_prompt_embeds=negative)
    if family == "sdxl":
        embeds |= dict(pooled_prompt_embeds=pooled, negative_pooled_prompt_embeds=negative_pooled)
    want = bytes_of(theirs(num_inference_steps=4, guidance_scale=7.5, latents=noise(), **embeds).images)

    (embedding,) = read_embeddings(tmp_path / "toy.safetensors")
    embeddings.attach(pipe, embedding, "<cat-toy>")
    text, avoid = written(PIECES), "(blue <cat-toy>:1.3)"
    for name, strength in STRENGTHS.items():
        lora.attach(pipe, read_adapter(tmp_path / f"{name}.safetensors", pipe)[0], strength)

    def draw(prompt=text, negative=avoid):
        return bytes_of(pipe(prompt, negative, noise=noise(), **OPTIONS).images)

    found = draw()
    torch.testing.assert_close(pipe.encode([text]).context, context, rtol=1e-4, atol=5e-5)
    assert np.abs(found - want).max() <= 1

    without = {
        "weights": draw(text.replace(":1.8", ":1").replace(":0.3", ":1")),
        "embedding": draw(text.replace("<cat-toy>", "cat")),
        "all rows but the first": draw(written(PIECES[:3])),
    }
    for name, strength in STRENGTHS.items():
        lora.set_strength(pipe, name, 0.0)
        without[name] = draw()
        lora.set_strength(pipe, name, strength)
    assert all(np.abs(other - want).max() >= 8 for other in without.values()), {
        part: np.abs(other - want).max() for part, other in without.items()
    }
    assert np.array_equal(draw(), found)

    lora.detach(pipe)  # called by the prompt instead, the adapters at hand
    pipe.adapters |= {name: read_adapter(tmp_path / f"{name}.safetensors", pipe)[0] for name in STRENGTHS}
    called = "".join(f"<lora:{name}:{strength}>" for name, strength in STRENGTHS.items())
    assert np.array_equal(draw(text + called), found)
