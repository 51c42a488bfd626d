"""Textual inversion: every file format, as its program writes it; refusals that change nothing; pictures equal to diffusers'."""

import base64
import copy
import json

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin
from safetensors.torch import load_file, save_file
from sdcore.weights.embeddings import read_embeddings

from sdcore import embeddings
from sdcore import prompt as grammar
from sdcore.embeddings import Embedding
from sdcore.errors import AdapterError, CheckpointError, PromptError
from tests.peers import bytes_of
from tests.test_prompt import models, noise, peer_embeds, peer_of, pipes  # noqa: F401 (fixtures)

G = torch.Generator().manual_seed(7)
L, H = 32, 64  # the widths of the small models' text encoders
ONE, FEW, WIDE = (torch.randn(n, d, generator=G) * 0.05 for n, d in ((1, L), (3, L), (3, H)))


def a1111(path, **kind):
    """What A1111's trainer saves, for real: string_to_token, a parameter table, and notes."""
    parameters = torch.nn.ParameterDict({"*": torch.nn.Parameter(FEW)}) if kind.get("table") else {"*": FEW}
    content = {
        "string_to_token": {"*": 265},
        "string_to_param": parameters,
        "name": kind.get("name", "my-style"),
        "step": 500,
    }
    torch.save(content | {"sd_checkpoint": "6ce0161689", "sd_checkpoint_name": "v1-5-pruned", "hash": None}, path)


def picture(path):
    """A1111's .png: the same table as base64 of JSON in a text chunk."""
    table = {"string_to_token": {"*": 265}, "string_to_param": {"*": {"TORCHTENSOR": FEW.tolist()}}, "name": "my-style"}
    chunks = PngImagePlugin.PngInfo()
    chunks.add_text("sd-ti-embedding", base64.b64encode(json.dumps(table).encode()).decode())
    Image.new("RGB", (8, 8)).save(path, pnginfo=chunks)


# file -> (how it is written, names and vectors that come out)
FORMATS = {
    "a.pt": (a1111, [("my-style", (FEW,))]),
    "b.pt": (lambda path: a1111(path, table=True), [("my-style", (FEW,))]),
    "c-style.pt": (lambda path: a1111(path, name=None), [("c-style", (FEW,))]),
    "d.png": (picture, [("my-style", (FEW,))]),
    "learned_embeds.bin": (lambda path: torch.save({"<cat-toy>": ONE[0]}, path), [("<cat-toy>", (ONE,))]),
    "learned_embeds.safetensors": (lambda path: save_file({"<cat-toy>": FEW}, path), [("<cat-toy>", (FEW,))]),
    "two.safetensors": (lambda path: save_file({"<s0>": ONE[0], "<s1>": FEW}, path), [("<s0>", (ONE,)), ("<s1>", (FEW,))]),
    "EasyNegative.safetensors": (lambda path: save_file({"emb_params": FEW}, path), [("EasyNegative", (FEW,))]),
    "half.safetensors": (lambda path: save_file({"emb_params": FEW.half()}, path), [("half", (FEW.half(),))]),
    "xl.safetensors": (lambda path: save_file({"clip_l": FEW, "clip_g": WIDE}, path), [("xl", (FEW, WIDE))]),
    "pivotal.safetensors": (
        lambda path: save_file({"text_encoders_0": FEW, "text_encoders_1": WIDE}, path),
        [("pivotal", (FEW, WIDE))],
    ),
    "list.pt": (lambda path: torch.save([{"*": FEW}, {"x": ONE[0], "y": WIDE}], path), [("list", (torch.cat([FEW, ONE]), WIDE))]),
    "lora.safetensors": (
        lambda path: save_file(
            {"lora_unet_x.alpha": torch.ones(1), "bundle_emb.hero.string_to_param.*": FEW, "bundle_emb.foe.clip_l": ONE,
             "bundle_emb.foe.clip_g": WIDE}, path
        ),
        [("foe", (ONE, WIDE)), ("hero", (FEW,))],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FORMATS)
def test_every_format(tmp_path, name):
    write, want = FORMATS[name]
    write(tmp_path / name)
    found = sorted(read_embeddings(tmp_path / name), key=lambda one: one.name)
    assert [one.name for one in found] == [one for one, _ in want]
    for one, (_, vectors) in zip(found, want, strict=True):
        assert len(one.vectors) == len(vectors)
        for mine, theirs in zip(one.vectors, vectors, strict=True):
            assert torch.equal(mine, theirs) and mine.dtype == theirs.dtype


@pytest.mark.parametrize("name", ["learned_embeds.bin", "learned_embeds.safetensors", "a.pt"])
def test_diffusers_reads_the_same(tmp_path, models, name):  # noqa: F811
    """What diffusers' own loader makes of the file: the rows that it appends to the table."""
    write, ((token, (vectors,)),) = FORMATS[name]
    write(tmp_path / name)
    theirs = peer_of(models("sd1"), "sd1")
    before = len(theirs.tokenizer)
    theirs.load_textual_inversion(str(tmp_path / name), **({"token": token} if name == "a.pt" else {}))
    rows = theirs.text_encoder.get_input_embeddings().weight[before : before + len(vectors)]
    assert torch.equal(rows.detach(), read_embeddings(tmp_path / name)[0].vectors[0])


@pytest.mark.parametrize("write, error, says", [
    (lambda path: save_file({"emb_params": FEW, "more": ONE}, path), AdapterError, "also holds more"),
    (lambda path: save_file({"clip_l": FEW}, path), AdapterError, "lacks clip_g"),
    (lambda path: save_file({"clip_l": FEW, "clip_g": WIDE, "clip_h": ONE}, path), AdapterError, "also holds clip_h"),
    (lambda path: save_file({"lora_unet_x.lora_down.weight": FEW}, path), AdapterError, "no textual-inversion embedding"),
    (lambda path: save_file({"<a>": torch.zeros(2, 2, 2)}, path), AdapterError, r"<a> is \[2, 2, 2\]"),
    (lambda path: save_file({"<a>": torch.zeros(3, dtype=torch.int64)}, path), AdapterError, "of int64"),
    (lambda path: save_file({"<a>": torch.zeros(0, 5)}, path), AdapterError, r"\[0, 5\]"),
    (lambda path: save_file({"<a>": torch.full((2, 5), float("nan"))}, path), AdapterError, "NaN"),
    (lambda path: torch.save([1, 2], path), AdapterError, "a value of type list"),
    (lambda path: torch.save({"string_to_param": {"*": FEW, "+": FEW}}, path), AdapterError, "holds 2 tensors"),
    (lambda path: torch.save({"string_to_param": 5}, path), AdapterError, "type int"),
    (lambda path: torch.save({"<a>": {"x": 1}, "y": 2}, path), AdapterError, "found 0 tensors"),
    (lambda path: torch.save({"<a>": np.zeros(3)}, path), CheckpointError, "numpy"),
    (lambda path: path.write_bytes(b""), CheckpointError, "empty"),
    (lambda path: Image.new("RGB", (8, 8)).save(path, "PNG"), AdapterError, "without an embedding"),
    (lambda path: Image.new("RGB", (8, 8)).save(path, "JPEG"), CheckpointError, "JPEG"),
])  # fmt: skip
def test_files_that_are_refused(tmp_path, write, error, says):
    write(tmp_path / "file")
    if (tmp_path / "file").read_bytes()[:1] == b"P":
        (tmp_path / "file").rename(tmp_path / "file.pt")
    with pytest.raises(error, match=says) as caught:
        read_embeddings(next(tmp_path.iterdir()))
    assert "\n" not in str(caught.value)


# fmt: off
DAMAGED = (b"[]", b'{"string_to_param": 5}', b'{"string_to_param": {"*": {"TORCHTENSOR": ["x"]}}}',
           b'{"string_to_param": {"*": {"TORCHTENSOR": 5}}}', b'{"string_to_param": {"*": {"TORCHTENSOR": [[1e400]]}}}')
# fmt: on


@pytest.mark.parametrize("text", ["!", "bm8=", *[base64.b64encode(one).decode() for one in DAMAGED]])
def test_damaged_pictures_are_refused(tmp_path, text):
    chunks = PngImagePlugin.PngInfo()
    chunks.add_text("sd-ti-embedding", text)
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png", pnginfo=chunks)
    with pytest.raises(AdapterError):
        read_embeddings(tmp_path / "a.png")


def test_nothing_in_a_pickle_runs(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    torch.save({"string_to_param": {"*": FEW}, "name": Bomb(), "<a>": Bomb()}, tmp_path / "a.pt")
    (found,) = read_embeddings(tmp_path / "a.pt")
    assert found.name == "a" and not (tmp_path / "ran").exists()


# ---------------------------------------------------------------- in a pipeline


def state(pipe):
    """Everything that could change: weights, the modules' shapes, the tokenizers, what is attached."""
    parts = [pipe.unet, pipe.vae, *pipe.text_encoders]
    weights = [{name: tensor.clone() for name, tensor in part.state_dict().items()} for part in parts]
    return weights, [repr(part) for part in parts], [t.vocab_size for t in pipe.tokenizers], dict(pipe.embeddings)


def assert_same(before, after):
    for one, other in zip(before[0], after[0], strict=True):
        assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    assert before[1:3] == after[1:3] and before[3].keys() == after[3].keys()


@pytest.mark.parametrize("family, vectors, name, says", [
    ("sd1", (torch.zeros(2, 768),), "x-y", "768 wide .SD 1.x., this sd1.* model's text encoders 32"),
    ("sd1", (FEW, WIDE), "x-y", "32 and 64 wide"),
    ("sdxl", (FEW,), "x-y", "32 wide .* encoders 32 and 64"),
    ("sdxl", (WIDE, FEW), "x-y", "64 and 32 wide"),
    ("sd1", (FEW,), "cat", "'cat': is a word that the model knows"),
    ("sd1", (FEW,), "Circle", "'Circle': is a word that the model knows"),
    ("sd1", (FEW,), "There-Already", "has this name"),
    ("sd1", (FEW,), "a:b", "cannot be written"),
    ("sd1", (FEW,), "style (old)", "cannot be written"),
    ("sd1", (FEW,), " ", "cannot be written"),
    ("sd1", (FEW,), "<>", "cannot be written"),
    ("sd1", (FEW,), "x\x1b[31m", "cannot be written"),
    ("sd1", (torch.zeros(23, L),), "x-y", "23 vectors, a row of tokens has room for 22"),
])  # fmt: skip
def test_what_does_not_fit_changes_nothing(pipes, family, vectors, name, says):  # noqa: F811
    pipe = pipes(family)
    there = Embedding("there-already", (FEW,) if family == "sd1" else (FEW, WIDE))
    embeddings.attach(pipe, there)
    try:
        before = state(pipe)
        with pytest.raises(AdapterError, match=says) as caught:
            embeddings.attach(pipe, Embedding(name, vectors))
        assert_same(before, state(pipe))
        assert "\n" not in str(caught.value)
        with pytest.raises(AdapterError, match="not attached; attached are: there-already"):
            embeddings.detach(pipe, "other")
    finally:
        embeddings.detach(pipe, "there-already")


def test_an_embedding_that_is_none():
    for vectors, says in (((), "no vectors"), ((torch.zeros(3),), "expected vectors"), (([1.0],), "list")):
        with pytest.raises(AdapterError, match=says):
            Embedding("x", vectors)


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_attach_and_detach_leave_no_trace(pipes, family):  # noqa: F811
    pipe = pipes(family)
    before = state(pipe)
    plain = pipe("a my-style cat", steps=2, noise=noise()).latents
    one = Embedding("my-style", (FEW,) if family == "sd1" else (FEW, WIDE))
    embeddings.attach(pipe, one)
    with_it = pipe("a my-style cat", steps=2, noise=noise()).latents
    attached = state(pipe)
    assert_same((*before[:3], {"my-style": one}), attached)  # not even while it acts
    assert not torch.equal(with_it, plain)
    assert torch.equal(
        pipe("a red cat", steps=2, noise=noise()).latents, pipe("a red cat", steps=2, noise=noise()).latents
    )
    assert embeddings.detach(pipe, "My-Style") is one
    assert_same(before, state(pipe))
    assert torch.equal(pipe("a my-style cat", steps=2, noise=noise()).latents, plain)
    assert copy.deepcopy(pipe).embeddings == {}


def test_two_at_once(pipes):  # noqa: F811
    """Each reads its own vectors, whichever came first."""
    pipe = pipes("sd1")
    pair = [Embedding("one-style", (FEW,)), Embedding("other-style", (ONE,))]
    alone = {}
    for one in pair:
        embeddings.attach(pipe, one)
        alone[one.name] = pipe.encode([f"a {one.name} cat"]).context
        embeddings.detach(pipe, one.name)
    assert not torch.equal(*alone.values())
    for order in (pair, pair[::-1]):
        for one in order:
            embeddings.attach(pipe, one)
        for name, want in alone.items():
            assert torch.equal(pipe.encode([f"a {name} cat"]).context, want)
        for one in order:
            embeddings.detach(pipe, one.name)


def rows_of(text, tokenizer, named):
    rows = grammar.chunk(grammar.weigh(text), tokenizer, named)
    return [[(t, w) for t, w in zip(row.ids, row.weights, strict=True) if t not in (tokenizer.bos_id,)] for row in rows]


def test_where_a_name_is_found(pipes):  # noqa: F811
    """As it is written, in any case, where no letter touches it; the longest first; as many tokens as it has vectors."""
    tokenizer = pipes("sd1").tokenizers[0]
    V = tokenizer.vocab_size
    named = {"my-style": [V, V + 1], "my-style-2": [V + 2], "two words": [V + 3], "<s0>": [V + 4], "v1_75t": [V + 5]}
    word = {name: tokenizer.encode(name) for name in ("a", "cat", ",", "x", ".", ">")}
    for text, want in {
        "a my-style cat": [*word["a"], V, V + 1, *word["cat"]],
        "a MY-STYLE,cat": [*word["a"], V, V + 1, *word[","], *word["cat"]],
        "embedding:my-style": [V, V + 1],
        "<my-style> cat": [V, V + 1, *word["cat"]],
        "my-style-2.": [V + 2, *word["."]],
        "Two  Words": [V + 3],
        "<s0> <S0>": [V + 4, V + 4],
        "a<s0>cat": [*word["a"], V + 4, *word["cat"]],
        "s0": tokenizer.encode("s0"),
        "my-styles": tokenizer.encode("my-styles"),
        "xv1_75t v1_75t": [*tokenizer.encode("xv1_75t"), V + 5],
        "(my-style:1.2) cat": [V, V + 1, *word["cat"]],
    }.items():
        (row,) = rows_of(text, tokenizer, named)
        assert [token for token, _ in row][: len(want)] == want and row[len(want)][0] == tokenizer.eos_id, text
    (row,) = rows_of("a (my-style:1.2) cat", tokenizer, named)
    assert [weight for _, weight in row][:4] == [1.0, 1.2, 1.2, 1.0]
    first, second = rows_of("red " * 21 + "my-style cat", tokenizer, named)  # its vectors are never torn apart
    assert [t for t, _ in first].count(tokenizer.eos_id) >= 1 and V not in [t for t, _ in first]
    assert [t for t, _ in second][:3] == [V, V + 1, *word["cat"]]


def peer_takes(theirs, file):
    """Load an embedding, called <cat-toy>, into diffusers' pipeline by its own loader; for SDXL its two calls."""
    if not hasattr(theirs, "text_encoder_2"):
        theirs.load_textual_inversion(str(file), token="<cat-toy>")
        return
    vectors = load_file(file)
    for key, number in (("clip_l", ""), ("clip_g", "_2")):
        tokenizer, encoder = (getattr(theirs, f"{part}{number}") for part in ("tokenizer", "text_encoder"))
        theirs.load_textual_inversion(
            {"cat-toy": vectors[key]}, token="<cat-toy>", tokenizer=tokenizer, text_encoder=encoder
        )
    # transformers pools at the largest number, which is now the added token's: see sdcore/embeddings.py.
    end = theirs.tokenizer_2.eos_token_id
    theirs.text_encoder_2.config.eos_token_id = end
    for module in theirs.text_encoder_2.modules():
        if hasattr(module, "eos_token_id"):
            module.eos_token_id = end


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_pictures_equal_diffusers(tmp_path, models, pipes, family):  # noqa: F811
    """An embedding of three vectors in a weighted prompt of more than 77 tokens, loaded by both from the same file: 1/255.

    diffusers' own loader puts the vectors into its text encoders; transformers encodes row by row, the weights act by the
    written formula, and diffusers draws from what comes out. For SDXL its two calls are one here.
    """
    theirs = peer_of(models(family), family)
    file = tmp_path / "cat-toy.safetensors"
    save_file({"<cat-toy>": FEW} if family == "sd1" else {"clip_l": FEW, "clip_g": WIDE}, file)
    peer_takes(theirs, file)
    pieces = [
        ("photo of a", 1.0), ("red <cat-toy> <cat-toy>_1 <cat-toy>_2 in", 1.4), ("the green background,", 1.0),
        ("large dog", 0.7), ("blue circle " * 15 + ", " + "square " * 30, 1.0), ("a <cat-toy> <cat-toy>_1 <cat-toy>_2", 1.0),
    ]  # fmt: skip
    context, pooled, rows = peer_embeds(theirs, pieces)
    negative, negative_pooled, _ = peer_embeds(theirs, [("blue <cat-toy> <cat-toy>_1 <cat-toy>_2", 1.0)], rows)
    assert rows >= 4
    embeds = dict(prompt_embeds=context, negative_prompt_embeds=negative)
    if family == "sdxl":
        embeds |= dict(pooled_prompt_embeds=pooled, negative_pooled_prompt_embeds=negative_pooled)
    want = theirs(num_inference_steps=4, guidance_scale=3.0, latents=noise(), **embeds).images
    pipe = pipes(family)
    for embedding in read_embeddings(file):
        embeddings.attach(pipe, embedding, "<cat-toy>")
    try:
        text = " ".join(f"({words}:{weight})" if weight != 1 else words for words, weight in pieces)
        text = text.replace(" <cat-toy>_1 <cat-toy>_2", "")
        ours = pipe(text, "blue <cat-toy>", steps=4, guidance=3.0, noise=noise())
        torch.testing.assert_close(pipe.encode([text]).context, context, rtol=1e-4, atol=2e-5)
        if family == "sdxl":
            torch.testing.assert_close(pipe.encode([text]).pooled, pooled, rtol=1e-4, atol=2e-5)
        assert np.abs(bytes_of(ours.images) - bytes_of(want)).max() <= 1
        if family == "sd1":  # read literally, diffusers' own prompt does it
            want = theirs("a <cat-toy> dog", num_inference_steps=3, guidance_scale=3.0, latents=noise()).images
            ours = pipe("a <cat-toy> dog", steps=3, guidance=3.0, noise=noise(), emphasis="none")
            assert np.abs(bytes_of(ours.images) - bytes_of(want)).max() <= 1
    finally:
        embeddings.detach(pipe, "<cat-toy>")


def test_literal_prompts_say_how_many_tokens_do_not_fit(pipes):  # noqa: F811
    pipe = pipes("sd1")
    embeddings.attach(pipe, Embedding("my-style", (FEW,)))
    try:
        result = pipe("red " * 20 + "my-style cat", steps=1, emphasis="none")
        assert "the last 2 tokens" in result.notices[0]
        with pytest.raises(PromptError, match="half of a surrogate"):
            pipe("my-style \ud800", steps=1)
    finally:
        embeddings.detach(pipe, "my-style")
