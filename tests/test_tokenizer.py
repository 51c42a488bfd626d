"""The tokenizer against transformers' CLIPTokenizer, its cleaning, its limits, and folders that are damaged."""

import gzip
import json
import random
from pathlib import Path

import pytest
import torch

from sdcore.errors import CheckpointError, PromptError
from sdcore.tokenizer import Tokenizer, clean, clip_vocabulary
from tests import tiny_models
from tests.timing import fastest

CLIP_MERGES = Path(__file__).parents[2] / "shared" / "data" / "clip_bpe_merges.txt.gz"

ORDINARY = [
    "", " ", "a", "a photo of a cat", "A small red striped circle left of a large blue square on a green background.",
    "portrait of an astronaut riding a horse, oil painting, 8k, trending", "it's we're I'll you'd they've I'm don't",
    "35mm f/1.8 1920x1080 (masterpiece:1.2), [blurry]", "naïve café, Zürich, Ærøskøbing", "ultra_detailed -- v2.0",
]  # fmt: skip
NASTY = [
    "\t a \n\n red\r\n circle  ", "ＦＵＬＬ ｗｉｄｔｈ", "e\u0301 = é", "Ω≈ç√∫˜µ≤≥÷", "部落格 漢字かな交じり文 한국어",
    "مرحبا بالعالم \u202eabc", "👩‍👩‍👧‍👦 family 🏳️‍🌈", "Z̸̢̛͙a̷l̶g̵o̴", "\x00 nul \x07 bell \x1b[31m", "'s's'S 'RE''ll",
    "!!!???...,,,;;;",
    "<|startoftext|> in the middle <|endoftext|>", "a<|endoftext|>b", "İstanbul Straße ŒUVRE ǅ", "١٢٣ ½ Ⅷ ²",
    "\u00a0\u2003\u3000wide spaces\u00a0", "\u200bzero\u200bwidth\ufeff", "a" * 300, "ab" * 500, "1234567890" * 10,
    "-" * 200, "\U0010ffff \ufffd \ue000", "नमस्ते สวัสดี ქართული", "don’t “quote” — dash…", "😀" * 50, "\n",
    "</w> the</w>", "Ġ ġ Ċ", "_" * 10 + "a_b", "x" * 76 + " y", " ".join("red" for _ in range(200)),
]  # fmt: skip
# By design unlike transformers, which does not resolve HTML entities and lowers Σ without looking at the word's end.
DIFFERENT = {"fish &amp;amp; chips": "fish & chips", "&lt;b&gt; &eacute;": "<b> é", "ΟΔΟΣ": "οδος"}


def released():
    """The merges of OpenAI's vocabulary."""
    if not CLIP_MERGES.exists():
        pytest.skip(f"CLIP's merges are not beside the checkout ({CLIP_MERGES})")
    lines = gzip.open(CLIP_MERGES, "rt", encoding="utf-8").read().split("\n")
    return [tuple(line.split()) for line in lines[1:48895]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    vocab, merges = tiny_models.vocabulary()
    path = tmp_path_factory.mktemp("tokenizer")
    tiny_models.write_tokenizer(path, vocab, merges, "!", positions=24)
    return path


@pytest.fixture(params=["released", "own"])
def both(request, tmp_path, folder):
    """Our tokenizer and the peer's, read from the same folder: the released vocabulary, and a small one of our own."""
    from transformers import CLIPTokenizer

    if request.param == "released":
        merges = released()
        folder = tmp_path
        tiny_models.write_tokenizer(
            folder, clip_vocabulary(merges), [f"{a} {b}" for a, b in merges], "<|endoftext|>", 77
        )
    return Tokenizer.from_folder(folder), CLIPTokenizer.from_pretrained(folder)


def test_equals_transformers(both):
    ours, peer = both
    for text in ORDINARY + NASTY:
        assert ours.encode(text) == peer(text, add_special_tokens=False).input_ids, text
    rows = peer(
        ORDINARY + NASTY, padding="max_length", max_length=ours.max_length, truncation=True, return_tensors="pt"
    )
    assert torch.equal(ours(ORDINARY + NASTY), rows.input_ids)


def test_differs_from_transformers_only_as_stated(both):
    ours, peer = both
    for text, cleaned in DIFFERENT.items():
        assert clean(text) == cleaned
        assert ours.encode(text) != peer(text, add_special_tokens=False).input_ids
        assert ours.encode(text) == ours.encode(cleaned)


def test_released_vocabulary():
    merges = released()
    vocab = clip_vocabulary(merges)
    assert (
        len(vocab) == 49408
        and vocab["!"] == 0
        and vocab["<|startoftext|>"] == 49406
        and vocab["<|endoftext|>"] == 49407
    )
    for pad, pad_id in (("<|endoftext|>", 49407), ("!", 0)):
        row = Tokenizer(vocab, merges, pad)(["a photo of a cat"])[0].tolist()
        assert row == [49406, 320, 1125, 539, 320, 2368, 49407] + [pad_id] * 70


@pytest.mark.parametrize(
    "in_map, in_config", [("!", "<|endoftext|>"), ("<|endoftext|>", "!"), (None, "!"), (None, None)]
)
def test_pad_token_as_transformers_reads_it(tmp_path, in_map, in_config):
    from transformers import CLIPTokenizer

    tiny_models.write_tokenizer(tmp_path, *tiny_models.vocabulary(), "!", positions=24)
    for name, pad in (("special_tokens_map.json", in_map), ("tokenizer_config.json", in_config)):
        values = json.loads((tmp_path / name).read_text()) | {"pad_token": pad}
        (tmp_path / name).write_text(json.dumps({key: value for key, value in values.items() if value}))
    ours, peer = Tokenizer.from_folder(tmp_path), CLIPTokenizer.from_pretrained(tmp_path)
    assert ours.pad_id == peer.pad_token_id == (0 if (in_map or in_config) == "!" else 587)


def test_reads_what_transformers_writes(folder, tmp_path):
    from transformers import CLIPTokenizer

    CLIPTokenizer.from_pretrained(folder).save_pretrained(tmp_path)  # tokenizer.json, no vocab.json
    assert not (tmp_path / "vocab.json").exists()
    ours = Tokenizer.from_folder(tmp_path)
    assert ours.max_length == 24 and ours.vocab_size == 588
    assert torch.equal(ours(ORDINARY), Tokenizer.from_folder(folder)(ORDINARY))


def test_attributes_come_from_the_folder(folder):
    tok = Tokenizer.from_folder(folder)
    assert (tok.bos_id, tok.eos_id, tok.pad_id, tok.vocab_size, tok.max_length) == (586, 587, 0, 588, 24)
    assert tok(["a", ""]).shape == (2, 24) and tok(["a"]).dtype == torch.int64
    assert Tokenizer.from_folder(folder, max_length=16)(["a"]).shape == (1, 16)
    assert tok.encode("<|ENDOFTEXT|>") == [
        587
    ]  # lowered first, as in the original; transformers: by the folder's flags


def test_what_does_not_fit_is_named(folder):
    tok = Tokenizer.from_folder(folder)
    fits, cut = "red " * 22, "red " * 22 + "Blue &amp;  green \n"
    ids, dropped = tok.encode_batch([fits, cut, ""])
    assert dropped == ["", "blue & green", ""]
    assert torch.equal(ids[0], ids[1]) and ids[1, -1] == tok.eos_id and ids[2, 1] == tok.eos_id


@pytest.mark.parametrize("wrong", [None, 7, b"red", ["red"], "\ud800 red", "red \udfff", "x" * 65537, "é" * 40000])
def test_no_prompt(folder, wrong):
    with pytest.raises(PromptError, match="prompt"):
        Tokenizer.from_folder(folder).encode(wrong)


@pytest.mark.parametrize("wrong", [[], "a bare text", None, 5, ["red", None]])
def test_no_list_of_prompts(folder, wrong):
    with pytest.raises(PromptError, match="expected a"):
        Tokenizer.from_folder(folder)(wrong)


def test_time_stays_linear(folder):
    """A quadratic step anywhere (merging, sorting accents) takes seconds at 64 KiB; linear ones take milliseconds."""
    tok = Tokenizer.from_folder(folder)

    def refused():
        with pytest.raises(PromptError):
            tok.encode("word " * 200_000)

    assert fastest(refused) < 0.05
    letters = random.Random(0).choices("abcdefghijklmnopqrstuvwxyz", k=65536)
    assert len(set(zip(letters, letters[1:], strict=False))) == 26 * 26  # really random, not one letter repeated
    for text in (
        "".join(letters),
        " ".join(letters[:32768]),
        "a" + "\u0301\u0323" * 16000,
        "&amp" * 16000,
        "&" * 65536,
    ):
        assert fastest(lambda text=text: tok.encode(text), tries=2) < 1.0, text[:20]


def damage(name, text):
    return lambda folder: (folder / name).write_text(text, encoding="utf-8")


def gpt2(folder):
    """Another model's byte-pair file: valid, but its words have no end mark, so every id would be wrong."""
    (folder / "vocab.json").unlink()
    model = {"type": "BPE", "vocab": {"<|startoftext|>": 0, "<|endoftext|>": 1, "!": 2}, "merges": []}
    (folder / "tokenizer.json").write_text(json.dumps({"model": model}))


@pytest.mark.parametrize("harm, says", [
    (lambda folder: (folder / "merges.txt").unlink(), "merges.txt"),
    (lambda folder: (folder / "vocab.json").unlink(), "vocab.json"),
    (damage("vocab.json", "{"), "vocab.json: not valid JSON"),
    (damage("vocab.json", "[" * 100_000), "vocab.json: not valid JSON"),
    (damage("vocab.json", "[]"), "expected a JSON object"),
    (damage("vocab.json", '{"a": "b"}'), "expected a table"),
    (damage("vocab.json", '{"a": 0}'), "startoftext"),
    (damage("vocab.json", '{"<|startoftext|>": 0, "<|endoftext|>": 1, "!": 9}'), "each once"),
    (damage("merges.txt", "a b c\n"), "merge 0 is"),
    (damage("merges.txt", "q zz\n"), "not of one model"),
    (damage("tokenizer_config.json", '{"model_max_length": 1e30}'), "model_max_length"),
    (damage("tokenizer_config.json", '{"model_max_length": 2}'), "model_max_length"),
    (damage("special_tokens_map.json", '{"pad_token": "<pad>"}'), "'<pad>'"),
    (gpt2, "words end in '</w>'"),
    (lambda folder: (folder / "vocab.json").write_bytes(b"\xff\xfe{}"), "UTF-8"),
])  # fmt: skip
def test_damaged_folder(tmp_path, harm, says):
    tiny_models.write_tokenizer(tmp_path, *tiny_models.vocabulary(), "!", positions=24)
    harm(tmp_path)
    with pytest.raises(CheckpointError, match=says) as error:
        Tokenizer.from_folder(tmp_path)
    assert "\n" not in str(error.value)
