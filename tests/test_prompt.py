"""The prompt grammar against a table, emphasis against its written definitions, and prompts in a pipeline against diffusers.

Expected tokens come from transformers' tokenizer on the words of each piece; which pieces there are, with which weights and at
which steps, is written down by hand (the lines marked # A1111 are examples from that program's own documentation).
"""

import math
import random

import diffusers
import numpy as np
import pytest
import torch

import sdcore
from sdcore import lora
from sdcore import prompt as grammar
from sdcore.changes import LowRank
from sdcore.errors import ConfigError, PromptError
from sdcore.pipeline import Conditions, Region
from sdcore.samplers import make_steps
from sdcore.tokenizer import Tokenizer
from tests import tiny_models
from tests.peers import bytes_of
from tests.timing import fastest

B = "/"  # a row ends here
LOW = 1 / 1.1


def always(*pieces):
    """One prompt, the same in all ten steps. A piece is its words, or (words, weight)."""
    return [(1.0, {10: pieces})]


def until(changes):
    """One prompt: {last step, counted from 1: pieces}."""
    return [(1.0, changes)]


def turns(*forms):
    """One prompt whose forms take turns."""
    return [(1.0, {i + 1: forms[i % len(forms)] for i in range(10)})]


RED, BLUE, GREEN, NONE = ("red",), ("blue",), ("green",), ()
TABLE = [
    ("", always()),
    ("a cat", always("a cat")),
    ("  a \t cat \n", always("a cat")),
    ("(cat)", always(("cat", 1.1))),
    ("((cat))", always(("cat", 1.21))),
    ("(((cat)))", always(("cat", 1.331))),
    ("[cat]", always(("cat", LOW))),
    ("[[cat]]", always(("cat", LOW**2))),
    ("([cat])", always("cat")),
    ("[(cat)]", always("cat")),
    ("(cat:1.3)", always(("cat", 1.3))),
    ("(cat:0.5)", always(("cat", 0.5))),
    ("(cat:.5)", always(("cat", 0.5))),
    ("(cat:2.)", always(("cat", 2.0))),
    ("(cat:0)", always(("cat", 0.0))),
    ("(cat:-1)", always(("cat", -1.0))),
    ("(cat:+1.5)", always(("cat", 1.5))),
    ("(cat: 1.3 )", always(("cat", 1.3))),
    ("((cat:1.3))", always(("cat", 1.43))),
    ("((cat):1.3)", always(("cat", 1.43))),
    ("(a (red:1.5) cat:0.5)", always(("a", 0.5), ("red", 0.75), ("cat", 0.5))),
    ("a (red) cat", always("a", ("red", 1.1), "cat")),
    ("a (red circle:1.2), blue", always("a", ("red circle", 1.2), ", blue")),
    ("a (((circle:1.3)) [on] a (dog:0.5), red, (((cat))).",  # A1111
     always("a", ("circle", 1.573), "on", ("a", 1.1), ("dog", 0.55), (", red,", 1.1), ("cat", 1.4641), (".", 1.1))),
    ("an (blue) word", always("an", ("blue", 1.1), "word")),  # A1111
    ("(unbalanced", always(("unbalanced", 1.1))),  # A1111
    (r"\(literal\]", always("(literal]")),  # A1111
    ("(unnecessary)(parens)", always(("unnecessaryparens", 1.1))),  # A1111
    ("((cat", always(("cat", 1.21))),
    ("(a [cat", always(("a", 1.1), "cat")),
    ("[cat", always(("cat", LOW))),
    ("cat)", always("cat)")),
    ("cat]", always("cat]")),
    ("cat :1.2)", always("cat :1.2)")),
    ("(a [b) c]", always(("a", 1.1), "b", ("c", LOW))),
    (r"\(cat\)", always("(cat)")),
    (r"(\(cat\):1.2)", always(("(cat)", 1.2))),
    (r"\[cat\] \\ dog", always("[cat] \\ dog")),
    (r"re\d cat", always("red cat")),
    ("(cat:dog)", always(("cat:dog", 1.1))),
    ("(cat:1.2:1.3)", always(("cat:1.2", 1.3))),
    ("(cat:1.2.3)", always(("cat:1.2.3", 1.1))),
    ("cat:1.2", always("cat:1.2")),
    ("photo, 16:9", always("photo, 16:9")),
    ("(a) (cat)", always(("a", 1.1), ("cat", 1.1))),
    ("() (:1.2) (( )) cat", always("cat")),
    ("( cat , dog )", always(("cat , dog", 1.1))),
    ("[cat:1.3]", until({10: NONE})),  # no weight: a share of the steps beyond the last
    ("[red:blue:0.5]", until({5: RED, 10: BLUE})),
    ("[red:blue:3]", until({3: RED, 10: BLUE})),
    ("[red:blue:0.29]", until({2: RED, 10: BLUE})),
    ("[red:0.5]", until({5: NONE, 10: RED})),
    ("[:red:0.5]", until({5: NONE, 10: RED})),
    ("[red::0.5]", until({5: RED, 10: NONE})),
    ("[red::1]", until({1: RED, 10: NONE})),
    ("[red:blue:0]", until({10: BLUE})),
    ("[red:blue:-3]", until({10: BLUE})),
    ("[red:blue:10]", until({10: RED})),
    ("[red:blue:99]", until({10: RED})),
    ("[red:blue:1.0]", until({10: RED})),
    ("a [red:blue: 3 ] cat", until({3: ("a red cat",), 10: ("a blue cat",)})),
    ("[(red:1.2):blue:5]", until({5: (("red", 1.2),), 10: BLUE})),
    ("([red:blue:5]:1.2)", until({5: (("red", 1.2),), 10: (("blue", 1.2),)})),
    ("(cat:[1:1.5:5])", until({5: ("cat",), 10: (("cat", 1.5),)})),
    ("[[red:blue:2]:green:5]", until({2: RED, 5: BLUE, 10: GREEN})),
    ("a[b:[c:d:2]:1]e", until({1: ("abe",), 2: ("ace",), 10: ("ade",)})),  # A1111
    ("a [[[b]]:2]", until({2: ("a",), 10: ("a", ("b", LOW**2))})),  # A1111
    ("a [b : c : 1] d", until({1: ("a b d",), 10: ("a c d",)})),  # A1111
    ("((a][:b:c [d:3]", until({3: (("a]", 1.21), (":b:c", 1.1)), 10: (("a]", 1.21), (":b:c d", 1.1))})),  # A1111
    ("a [{b|d{:.5] c", until({5: ("a c",), 10: ("a {b|d{ c",)})),  # A1111
    (r"[a\:b:red:5]", until({5: ("a:b",), 10: RED})),
    ("[red|blue]", turns(RED, BLUE)),
    ("[red|blue|green] cat", turns(("red cat",), ("blue cat",), ("green cat",))),
    ("[re|]d", turns(("red",), ("d",))),
    ("[fe|||]male", turns(("female",), ("male",), ("male",), ("male",))),  # A1111
    ("[red|(blue:1.1)]", turns(RED, (("blue", 1.1),))),  # A1111
    ("[[red|blue]:green:2]", until({1: RED, 2: BLUE, 10: GREEN})),
    ("[red:blue]", always(("red:blue", LOW))),
    ("[red:blue:green:5]", always(("red:blue:green:5", LOW))),
    ("red | blue", always("red | blue")),
    ("a BREAK cat", always("a", B, "cat")),
    ("(cat BREAK dog:1.2), red", always(("cat", 1.2), B, ("dog", 1.2), ", red")),
    ("BREAK cat", always(B, "cat")),
    ("a BREAK", always("a")),
    ("aBREAK break cat", always("abreak break cat")),
    ("[a BREAK:3] cat", until({3: ("cat",), 10: ("a", B, "cat")})),
    ("a cat AND a dog", [(1.0, {10: ("a cat",)}), (1.0, {10: ("a dog",)})]),
    ("cat :1.2 AND a dog:0.5 AND blue: -1",
     [(1.2, {10: ("cat",)}), (0.5, {10: ("a dog",)}), (-1.0, {10: ("blue",)})]),
    ("[red:blue:5] AND (dog:1.2)", [(1.0, {5: RED, 10: BLUE}), (1.0, {10: (("dog", 1.2),)})]),
    ("RANDOM and cat", always("random and cat")),
    ("<lora:style:0.8> cat", always("cat"), ("style", 0.8, 0.8)),
    ("cat <lora:my style> dog", always("cat  dog"), ("my style", 1.0, 1.0)),
    ("<lora:style:0.5:0.8>", always(), ("style", 0.8, 0.5)),
    ("<lyco:style:te=0.2:unet=0.7>", always(), ("style", 0.7, 0.2)),
    ("<cat> (&lt;dog&gt;) &amp;", always("<cat>", ("<dog>", 1.1), "&")),
    ("red " * 80, always("red " * 75, B, "red " * 5)),
    ("red " * 60 + ", " + "blue " * 30, always("red " * 60 + ",", B, "blue " * 30)),  # 14 blue ones go along
    ("red " * 50 + ", " + "blue " * 30, always("red " * 50 + "," + "blue " * 24, B, "blue " * 6)),  # the comma is too far
    ("red " * 74 + ", blue", always("red " * 74 + ",", B, "blue")),
    ("red " * 75 + ", blue", always("red " * 75, B, ", blue")),
    ("red " * 70 + ", (blue:1.2) " + "a " * 9, always("red " * 70 + ",", B, ("blue", 1.2), "a " * 9)),
    ("red " * 60 + ", " + "blue " * 100, always("red " * 60 + ",", B, "blue " * 75, B, "blue " * 25)),  # its own comma
]  # fmt: skip


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    """Ours and transformers', on one folder: rows of 77."""
    from transformers import CLIPTokenizer

    folder = tmp_path_factory.mktemp("tokenizer")
    tiny_models.write_tokenizer(folder, *tiny_models.vocabulary(), "!", positions=77)
    return Tokenizer.from_folder(folder), CLIPTokenizer.from_pretrained(folder)


def expected_rows(pieces, peer, length=77):
    """Rows of (token, weight) as they should be: start, the words of the pieces, end, padding."""
    rows = [[]]
    for piece in pieces:
        words, weight = (piece, 1.0) if isinstance(piece, str) else piece
        if words == B:
            rows.append([])
        else:
            rows[-1] += [(token, weight) for token in peer(words, add_special_tokens=False, truncation=False).input_ids]
    start, end, pad = (peer.bos_token_id, 1.0), (peer.eos_token_id, 1.0), (peer.pad_token_id, 1.0)
    return [[start, *row, end, *[pad] * (length - 2 - len(row))] for row in rows]


def test_table_has_enough_rows():
    assert len(TABLE) >= 80 and len({row[0] for row in TABLE}) == len(TABLE)


@pytest.mark.parametrize("text, parts, tags", [(*row, *[()] * (3 - len(row))) for row in TABLE], ids=range(len(TABLE)))
def test_table(tokenizers, text, parts, tags):
    ours, peer = tokenizers
    found = grammar.parse(text, 10)
    assert [tuple(tag) for tag in found.loras] == ([tags] if tags else [])
    assert [part.weight for part in found.parts] == [weight for weight, _ in parts]
    for part, (_, changes) in zip(found.parts, parts, strict=True):
        assert len(part.texts) == 10
        for i, text_now in enumerate(part.texts):
            want = expected_rows(changes[min(last for last in changes if last > i)], peer)
            rows = grammar.chunk(grammar.weigh(text_now), ours)
            assert [row.ids for row in rows] == [[token for token, _ in row] for row in want], (i + 1, text_now)
            weights = [weight for row in rows for weight in row.weights]
            assert weights == pytest.approx([w for row in want for _, w in row], rel=1e-12), (i + 1, text_now)


def test_negative_prompts_know_no_and():
    assert [part.texts for part in grammar.parse("a AND b", 2, compose=False).parts] == [["a AND b"] * 2]


def test_released_vocabulary_and_a_plain_prompt(tokenizers):
    """A plain prompt is one piece of weight 1: the row is the tokenizer's own."""
    ours, _ = tokenizers
    rng = random.Random(0)
    for _ in range(50):
        text = " ".join(
            rng.choices([*tiny_models.WORDS, "naïve", "35mm", "it's", "16:9", "a,b", "-"], k=rng.randrange(1, 24))
        )
        (piece,) = grammar.weigh(grammar.parse(text, 3).parts[0].texts[0])
        (row,) = grammar.chunk([piece], ours)
        assert piece == (text, 1.0) and row.ids == ours([text])[0].tolist()


@pytest.mark.parametrize("text, says", [
    (None, "expected a text"), (7, "expected a text"), (b"cat", "expected a text"),
    ("x" * 65537, "65536 bytes, found 65537"), ("é" * 40000, "found 80000"),
    ("(cat:101)", "weight of 101"), ("(" * 60 + "cat", "weight of 304"), ("(cat:-1000)", "weight of -1000"),
    ("a AND b:500", "weight of 500"), ("(cat:" + "9" * 400 + ")", "weight of inf"),
    ("[a:b:1]" * 257, "at most 256"), ("[" * 40 + "a" + ":1]" * 40, "at most 32"),
    ("<lora:x:much>", "expected a strength"), ("<lora:x:1:2:3>", "at most two"), ("<lora:x:dyn=3>", "expected a strength"),
    ("<hypernet:x:1>", "hypernetworks"),
])  # fmt: skip
def test_prompts_that_are_refused(text, says):
    with pytest.raises(PromptError, match=says) as caught:
        for part in grammar.parse(text, 10).parts:
            grammar.weigh(part.texts[0])
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300


# ---------------------------------------------------------------- time


def whole(text, tokenizer):
    try:
        for now in set(grammar.parse(text, 10).parts[0].texts):
            grammar.chunk(grammar.weigh(now), tokenizer)
    except PromptError:
        pass


@pytest.mark.parametrize("sign", ["x", "(", "[", "word ", "[a|b]", "\\(", "é"])
def test_a_million_characters_are_refused_at_once(pipes, sign):
    text = (sign * 1_000_000)[:1_000_000]

    def refused():
        with pytest.raises(PromptError, match="at most 65536 bytes, found 1000000"):
            pipes("sd1")(text)

    assert fastest(refused) < 0.05


@pytest.mark.parametrize("text", [
    "".join(random.Random(0).choices("abcdefghijklmnopqrstuvwxyz", k=16_000)), "(" * 8000 + "a" + ")" * 7999, "(a)" * 5333,
    "[:" * 5333 + "]" * 5333, "[|" * 8000, "\\(" * 8000, ":" + "1" * 15_999, "<lora:" * 2666, "<lora:a" + ":a" * 8000,
    "a BREAK " * 2000, "a AND " * 2666, ", a" * 5333, ":   " * 4000, "[a:b:0.5]" * 1000 + " x" * 3500,
])  # fmt: skip
def test_time_grows_no_faster_than_the_text(tokenizers, text):
    """16,000 signs, the word of one's own letters first, against a quarter of them: four times as long, give or take."""
    short = fastest(lambda: whole(text[:4000], tokenizers[0]))
    long = fastest(lambda: whole(text, tokenizers[0]))
    assert long < 10 * short + 0.02, f"{long:.3f} s for 16,000, {short:.3f} s for 4,000"  # quadratic would be 16 times


# ---------------------------------------------------------------- emphasis


def some_rows(tokenizer):
    pieces = grammar.weigh("a (red:1.4) circle [above:2] (blue:0.6), [green] (square:1.7) BREAK plain words")
    return grammar.chunk(pieces, tokenizer)


def fake_encode(tokenizer, width=6):
    """An encoder whose tokens hear of all before them, in fp64."""
    table = torch.randn(tokenizer.vocab_size, width, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return lambda ids: table[ids].cumsum(1) / 5 + 0.3


def test_emphasis_against_its_definitions(tokenizers):
    """Each formula, token by token in plain Python, from what its program does."""
    tokenizer = tokenizers[0]
    encode, rows = fake_encode(tokenizer), some_rows(tokenizer)
    z = encode(torch.tensor([row.ids for row in rows]))
    empty = encode(torch.tensor([[tokenizer.bos_id, tokenizer.eos_id] + [tokenizer.pad_id] * 75]))[0]
    assert len(rows) == 2 and len({w for row in rows for w in row.weights}) == 5

    def scaled(z_row, weights):  # ComfyUI
        return torch.stack([e + (v - e) * w for v, e, w in zip(z_row, empty, weights, strict=True)])

    want = {"a1111": [], "no-norm": [], "comfyui": [], "compel": []}
    for z_row, row in zip(z, rows, strict=True):
        plain = torch.stack([v * w for v, w in zip(z_row, row.weights, strict=True)])
        want["no-norm"].append(plain)
        want["a1111"].append(plain * (z_row.sum() / plain.sum()))
        want["comfyui"].append(scaled(z_row, row.weights))
        mixed, total = scaled(z_row, row.weights), 1.0
        for piece in sorted({p for p, w in zip(row.pieces, row.weights, strict=True) if w < 1}):
            weight = row.weights[row.pieces.index(piece)]
            kept = [(t, w) for t, w, p in zip(row.ids, row.weights, row.pieces, strict=True) if p not in (piece, -1)]
            ids = [tokenizer.bos_id, *[t for t, _ in kept], tokenizer.eos_id] + [tokenizer.pad_id] * (75 - len(kept))
            weights = [1.0, *[w for _, w in kept]] + [1.0] * (76 - len(kept))
            without = scaled(encode(torch.tensor([ids]))[0], weights)
            mixed, total = (
                mixed + math.tan((1 - weight) * math.pi / 2) * without,
                total + math.tan((1 - weight) * math.pi / 2),
            )
        want["compel"].append(mixed / total)
    for how, rows_wanted in want.items():
        found = grammar.emphasise(z, rows, how, encode, tokenizer)
        torch.testing.assert_close(found, torch.stack(rows_wanted), rtol=1e-12, atol=1e-12)
        assert torch.equal(found[1], z[1]) and not torch.allclose(found[0], z[0])  # the second row has no weights
    assert len({round(grammar.emphasise(z, rows, how, encode, tokenizer).sum().item(), 6) for how in want}) == 4


def test_compel_at_weight_zero_is_without(tokenizers):
    tokenizer = tokenizers[0]
    encode = fake_encode(tokenizer)
    rows = grammar.chunk(grammar.weigh("a (red:0) cat"), tokenizer)
    without = encode(torch.tensor([row.ids for row in grammar.chunk(grammar.weigh("a cat"), tokenizer)]))
    found = grammar.emphasise(encode(torch.tensor([row.ids for row in rows])), rows, "compel", encode, tokenizer)
    torch.testing.assert_close(found, without, rtol=0, atol=1e-3)  # the share of "with" is 1 / (1 + tan) = 1.6e-5


# ---------------------------------------------------------------- in a pipeline


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    root, written = tmp_path_factory.mktemp("models"), {}

    def folder(family):
        if family not in written:
            written[family] = tiny_models.write_folder(root / family, family)
        return written[family]

    return folder


@pytest.fixture(scope="session")
def pipes(models):
    loaded = {}

    def pipe(family):
        if family not in loaded:
            loaded[family] = sdcore.load(str(models(family)), device="cpu")
        return loaded[family]

    return pipe


def peer_of(folder, family):
    options = {"add_watermarker": False} if family == "sdxl" else {"safety_checker": None}
    pipe = getattr(diffusers, tiny_models.PIPELINES[family]).from_pretrained(folder, **options)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def noise(count=1):
    return torch.randn(count, 4, 8, 8, generator=torch.Generator().manual_seed(3))


PIECES = [  # 110 tokens, in five or six rows of 22
    ("a red circle above a blue square,", 1.0), ("photo of a cat", 1.4), ("and a dog in the green background", 1.0),
    ("large small triangle,", 0.6), ("red " * 30 + ", " + "blue circle " * 14, 1.0), ("square " * 25, 1.2), ("cat", 1.0),
]  # fmt: skip
LONG = " ".join(f"({words}:{weight})" if weight != 1 else words for words, weight in PIECES)


def peer_embeds(pipe, pieces, rows=None):
    """What diffusers should be given: transformers' encoders row by row, A1111's formula, and the rows side by side."""
    encoders = [(pipe.tokenizer, pipe.text_encoder)]
    if hasattr(pipe, "text_encoder_2"):
        encoders.append((pipe.tokenizer_2, pipe.text_encoder_2))
    contexts, pooled = [], None
    for tokenizer, encoder in encoders:
        comma = tokenizer(",", add_special_tokens=False).input_ids
        lines, line = [], []
        for words, weight in pieces:
            for token in tokenizer(words, add_special_tokens=False, truncation=False).input_ids:
                commas = [i for i, (t, _) in enumerate(line) if [t] == comma]
                if len(line) == 22 and [token] != comma and commas and 22 - commas[-1] <= 20:
                    lines.append(line[: commas[-1] + 1])
                    line = line[commas[-1] + 1 :]
                if len(line) == 22:
                    lines.append(line)
                    line = []
                line.append((token, weight))
        lines.append(line)
        lines += [[]] * ((rows or len(lines)) - len(lines))
        states = []
        for line in lines:
            fill = 22 - len(line)
            ids = [
                tokenizer.bos_token_id,
                *[t for t, _ in line],
                tokenizer.eos_token_id,
                *[tokenizer.pad_token_id] * fill,
            ]
            weights = torch.tensor([1.0, *[w for _, w in line], 1.0, *[1.0] * fill])[None, :, None]
            with torch.no_grad():
                out = encoder(torch.tensor([ids]), output_hidden_states=True)
            z = out.hidden_states[-2] if len(encoders) == 2 else out.last_hidden_state
            states.append(z * weights * (z.mean() / (z * weights).mean()))
            if len(states) == 1:
                pooled = out[0]
        contexts.append(torch.cat(states, dim=1))
    return torch.cat(contexts, dim=-1), pooled, len(lines)


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_a_long_weighted_prompt_equals_diffusers(models, pipes, family):
    """More than 77 tokens with weights, against prompt_embeds from transformers and the written formula: within 1/255."""
    theirs = peer_of(models(family), family)
    context, pooled, rows = peer_embeds(theirs, PIECES)
    negative, negative_pooled, _ = peer_embeds(theirs, [("blue", 1.3), ("square", 1.0)], rows)
    assert rows >= 5 and context.shape[1] == rows * 24
    embeds = dict(prompt_embeds=context, negative_prompt_embeds=negative)
    if family == "sdxl":
        embeds |= dict(pooled_prompt_embeds=pooled, negative_pooled_prompt_embeds=negative_pooled)
    want = theirs(num_inference_steps=4, guidance_scale=3.0, latents=noise(), **embeds).images
    pipe = pipes(family)
    ours = pipe(LONG, "(blue:1.3) square", steps=4, guidance=3.0, noise=noise())
    torch.testing.assert_close(pipe.encode([LONG]).context, context, rtol=1e-4, atol=2e-5)
    assert np.abs(bytes_of(ours.images) - bytes_of(want)).max() <= 1
    assert not ours.notices


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
@pytest.mark.parametrize("skip", [0, 1])
def test_taken_literally_equals_diffusers(models, pipes, family, skip):
    """emphasis="none": brackets, AND and too many words as diffusers reads them; clip skip as diffusers counts it."""
    prompt = "a (red circle:1.3) AND [blue|green] square, " + "photo of a cat " * 5
    theirs = peer_of(models(family), family)
    vars(theirs.text_encoder).setdefault(
        "text_model", theirs.text_encoder
    )  # diffusers 0.42 still asks transformers 5 for it
    options = dict(clip_skip=skip) if skip else {}
    want = theirs(prompt, num_inference_steps=3, guidance_scale=3.0, latents=noise(), **options).images
    pipe = pipes(family)
    common = dict(steps=3, guidance=3.0, noise=noise(), emphasis="none")
    # Clip skip acts on both prompts here, as in A1111; diffusers leaves the negative one out.
    ours = pipe(prompt, pipe.encode([""]) if skip and family == "sd1" else "", clip_skip=skip, **common)
    assert np.abs(bytes_of(ours.images) - bytes_of(want)).max() <= 1 and len(ours.notices) == len(pipe.tokenizers)
    assert not torch.equal(ours.latents, pipe(prompt, clip_skip=1 - skip, **common).latents)


def test_a_prompt_of_its_own_for_the_second_encoder_equals_diffusers(models, pipes):
    theirs = peer_of(models("sdxl"), "sdxl")
    texts = dict(
        prompt="a red circle", prompt_2="photo of a cat", negative_prompt="dog", negative_prompt_2="blue square"
    )
    want = theirs(**texts, num_inference_steps=3, guidance_scale=3.0, latents=noise()).images
    ours = pipes("sdxl")(
        "a red circle", "dog", prompt2="photo of a cat", negative2="blue square", steps=3, guidance=3.0, noise=noise()
    )
    assert np.abs(bytes_of(ours.images) - bytes_of(want)).max() <= 1
    same = pipes("sdxl").encode(["a red circle"], prompts2=["a red circle"])
    assert torch.equal(same.context, pipes("sdxl").encode(["a red circle"]).context)


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_a_plain_prompt_is_the_same_with_and_without_the_grammar(pipes, family):
    """Bit for bit, alone and in a batch: so all that was proven of plain prompts holds."""
    for prompts in (["a red circle above a blue square, 35mm"], ["photo of a cat", "", "it's a dog - 16:9"]):
        plain, read = (pipes(family).encode(prompts, emphasis=how) for how in ("none", "a1111"))
        assert torch.equal(plain.context, read.context)
        assert plain.pooled is None or torch.equal(plain.pooled, read.pooled)
        for how in ("no-norm", "comfyui", "compel"):
            assert torch.equal(pipes(family).encode(prompts, emphasis=how).context, read.context)


def test_emphasis_changes_the_picture(pipes):
    prompt = "a (red circle:1.4) above [blue] square"
    drawn = {how: pipes("sd1")(prompt, steps=2, noise=noise(), emphasis=how).latents for how in grammar.EMPHASIS}
    for one in drawn:
        for other in drawn:
            assert one == other or not torch.equal(drawn[one], drawn[other]), (one, other)


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_conditions_out_and_in(pipes, family):
    """What `encode` gives can be given in the place of a prompt; a text beside it is filled up to as many rows."""
    pipe = pipes(family)
    options = dict(steps=3, guidance=3.0, seed=5)
    want = pipe(LONG, "dog", **options).latents
    positive, negative = pipe.encode([LONG]), pipe.encode(["dog"])
    assert torch.equal(pipe(positive, "dog", **options).latents, want)
    for prompt in (positive, LONG):  # the rows that fill the negative up are encoded apart: equal to rounding
        torch.testing.assert_close(pipe(prompt, negative, **options).latents, want, rtol=1e-4, atol=1e-4)
    twice = pipe(pipe.encode(["cat", "dog"]), negative, count=2, **options).latents
    torch.testing.assert_close(twice, pipe(["cat", "dog"], "dog", count=2, **options).latents, rtol=1e-4, atol=1e-4)


def first_x0(pipe, prompt, negative="blue", **options):
    """The guess at the first step, whose arithmetic can be followed."""
    options = dict(steps=2, sampler="euler", guidance=1.0, noise=noise()) | options
    return next(iter(pipe.steps(prompt, negative, **options))).x0.double()


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_and_is_the_sum_from_the_negative(pipes, family):
    """x0 is linear in the network's answer: negative + guidance * sum w (answer - negative), from single runs."""
    pipe = pipes(family)
    cat, dog, negative = (first_x0(pipe, text) for text in ("a cat", "dog", "blue"))
    want = negative + 3.0 * (1.2 * (cat - negative) - 0.5 * (dog - negative))
    found = first_x0(pipe, "a cat :1.2 AND dog :-0.5", guidance=3.0)
    torch.testing.assert_close(found, want, rtol=0, atol=2e-5 * want.abs().max().item())
    want = negative + 1.2 * (cat - negative) - 0.5 * (dog - negative)  # where guidance is off
    for options in (dict(guidance=1.0), dict(guidance=3.0, guidance_interval=(0.0, 1e-3))):
        found = first_x0(pipe, "a cat :1.2 AND dog :-0.5", **options)
        torch.testing.assert_close(found, want, rtol=0, atol=2e-5 * want.abs().max().item())


def test_and_in_a_batch(pipes):
    """Pictures with one, two and three prompts in one call: each as alone."""
    prompts = ["a cat", "red :0.7 AND dog", "a AND red AND blue :0.3"]
    start = noise(3)
    batch = pipes("sd1")(prompts, "dog", steps=3, guidance=3.0, noise=start).images
    for k, prompt in enumerate(prompts):
        alone = pipes("sd1")(prompt, "dog", steps=3, guidance=3.0, noise=start[k : k + 1]).images
        assert np.abs(bytes_of(alone)[0] - bytes_of(batch)[k]).max() <= 1


def test_regions(pipes):
    """Where a mask is 1 its prompt alone counts, where it is 0 the main one, and in between both by their shares."""
    pipe = pipes("sd1")
    left = torch.zeros(64, 64)
    left[:, :32] = 1
    main, cat, dog = (first_x0(pipe, text) for text in ("red circle", "a cat", "dog"))
    found = first_x0(pipe, "red circle", regions=[Region("a cat", left)])
    scale = main.abs().max().item()
    torch.testing.assert_close(found[..., :4], cat[..., :4], rtol=0, atol=1e-5 * scale)
    torch.testing.assert_close(found[..., 4:], main[..., 4:], rtol=0, atol=1e-5 * scale)
    assert (found[..., :4] - main[..., :4]).abs().max() > 1e-2 * scale
    both = [
        Region("a cat", left * 0.5),
        Region(["dog"], torch.ones(3, 5)),
    ]  # 1.5 claimed on the left: a third and two thirds
    found = first_x0(pipe, "red circle", regions=both)
    torch.testing.assert_close(found[..., :4], (cat / 3 + dog * 2 / 3)[..., :4], rtol=0, atol=1e-5 * scale)
    torch.testing.assert_close(found[..., 4:], dog[..., 4:], rtol=0, atol=1e-5 * scale)
    guided = first_x0(pipe, "red circle", guidance=3.0, regions=[Region("a cat", left)])
    torch.testing.assert_close(
        guided[..., :4], first_x0(pipe, "a cat", guidance=3.0)[..., :4], rtol=0, atol=3e-5 * scale
    )


def test_a_schedule_switches_what_the_unet_is_told(pipes):
    """[a:b:0.5]: as "a" up to the middle bit for bit, keys and values worked out twice, and the end is the hand-made one."""
    pipe, calls = pipes("sd1"), []
    options = dict(steps=4, sampler="euler", guidance=3.0, noise=noise())
    layer = pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn2.to_k
    handle = layer.register_forward_hook(lambda *_: calls.append(1))
    found = [progress.x for progress in pipe.steps("[a cat:dog:0.5]", "blue", **options)]
    handle.remove()
    assert len(calls) == 2
    before = [progress.x for progress in pipe.steps("a cat", "blue", **options)]
    assert (
        torch.equal(found[0], before[0]) and torch.equal(found[1], before[1]) and not torch.equal(found[2], before[2])
    )
    way = make_steps(pipe.scheduler, 4, "euler")
    cat, dog = (pipe.encode(["blue"]).then(pipe.encode([text])) for text in ("a cat", "dog"))
    x = before[1]
    for step in way[2:]:
        with torch.no_grad():
            out = pipe.unet(
                torch.cat([x, x]) * step.input_scale, torch.full((2,), step.t), (cat if step.i < 2 else dog).context
            )
        guess = x * step.x0_from_x + step.x0_from_out * (out[:1] + 3.0 * (out[1:] - out[:1]))
        (wx, w0), *_ = step.weights
        x = x * wx + guess * w0
    torch.testing.assert_close(found[3], x, rtol=1e-4, atol=1e-4)


def test_turns_and_negative_schedules(pipes):
    pipe = pipes("sd1")
    options = dict(steps=4, sampler="euler", guidance=3.0, noise=noise())
    found = [progress.x for progress in pipe.steps("[a cat|dog]", "[:blue:1]", **options)]
    first = next(iter(pipe.steps("a cat", "", **options))).x
    assert torch.equal(found[0], first)
    assert not torch.equal(found[1], [p.x for p in pipe.steps("a cat", "blue", **options)][1])
    # Samplers that look twice per level: a share of the steps is a share of the looks.
    twice = [p.x for p in pipe.steps("[a cat:dog:0.5]", "blue", steps=4, sampler="heun", guidance=3.0, noise=noise())]
    plain = [p.x for p in pipe.steps("a cat", "blue", steps=4, sampler="heun", guidance=3.0, noise=noise())]
    assert [torch.equal(a, b) for a, b in zip(twice, plain, strict=True)] == [True] * 4 + [False] * 3


def test_adapters_by_name(pipes):
    """<lora:name:0.5> is the adapter attached by hand; without it the next picture is the plain one, bit for bit."""
    pipe = pipes("sd1")
    g = torch.Generator().manual_seed(0)
    where = {
        "unet": "mid_block.attentions.0.transformer_blocks.0.attn2.to_k",
        "text_encoder": "text_model.encoder.layers.1.mlp.fc1",
    }
    parts = {}
    for part, name in where.items():
        o, n = (pipe.unet if part == "unet" else pipe.text_encoders[0]).get_submodule(name).weight.shape
        parts[part] = {name: LowRank(torch.randn(2, n, generator=g), torch.randn(o, 2, generator=g))}
    adapter = lora.Adapter("from a file", parts)
    before = {k: v.clone() for k, v in pipe.unet.state_dict().items()}
    plain = pipe("a cat", steps=2, noise=noise()).latents
    wanted = {}
    for name, scales in {"both": {}, "text": {"unet": 0.0}}.items():
        with lora.using(pipe, adapter, 0.5, scales):
            wanted[name] = pipe("a cat", steps=2, noise=noise()).latents
    pipe.adapters["style"] = adapter
    try:
        assert torch.equal(pipe("a cat", steps=2, noise=noise()).latents, plain)
        assert torch.equal(pipe("a cat<lora:style:0.5>", steps=2, noise=noise()).latents, wanted["both"])
        assert torch.equal(pipe("<lora:style:0.5:0>a cat", steps=2, noise=noise()).latents, wanted["text"])
        assert not torch.equal(wanted["both"], wanted["text"]) and not torch.equal(wanted["text"], plain)
        for texts, says in {
            ("<lora:other:1>", ""): "no such adapter at hand; there are: style",
            ("cat", "<lora:style:1>"): "whole picture",
        }.items():
            with pytest.raises(PromptError, match=says):
                pipe(*texts, steps=1)
        with pytest.raises(PromptError, match="same <lora"):
            pipe(["cat <lora:style:1>", "dog"], steps=1)
        assert torch.equal(pipe("a cat", steps=2, noise=noise()).latents, plain)
    finally:
        pipe.adapters.clear()
    after = pipe.unet.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)


def test_a_strength_by_step_reaches_the_keys_and_values(pipes):
    pipe, calls = pipes("sd1"), []
    name = "mid_block.attentions.0.transformer_blocks.0.attn2.to_k"
    layer = pipe.unet.get_submodule(name)
    o, n = layer.weight.shape
    g = torch.Generator().manual_seed(0)
    adapter = lora.Adapter(
        "x", {"unet": {name: LowRank(torch.randn(2, n, generator=g), torch.randn(o, 2, generator=g))}}
    )
    options = dict(steps=4, sampler="euler", noise=noise())
    with lora.using(pipe, adapter, 1.0):
        on = [p.x for p in pipe.steps("a cat", **options)]
    with lora.using(pipe, adapter, lora.keyframes((0.0, 1.0), (0.5, 0.0))):
        handle = layer.register_forward_hook(lambda *_: calls.append(1))
        found = [p.x for p in pipe.steps("a cat", **options)]
        handle.remove()
    assert [torch.equal(a, b) for a, b in zip(on, found, strict=True)] == [True, True, False, False] and len(calls) == 2


@pytest.mark.parametrize("options, error, says", [
    (dict(emphasis="loud"), ConfigError, "a1111, no-norm, comfyui, compel, none, found 'loud'"),
    (dict(clip_skip=3), ConfigError, "from 0 to 2"),
    (dict(clip_skip=-1), ConfigError, "clip_skip"),
    (dict(clip_skip=True), ConfigError, "clip_skip"),
    (dict(prompt2="cat"), ConfigError, "has one text encoder"),
    (dict(negative2="cat"), ConfigError, "has one text encoder"),
    (dict(prompt="[a|b] " * 300), PromptError, "at most 256"),
    (dict(prompt="".join(f"[a:b:{i}]" for i in range(1, 140)), steps=200), PromptError, "at most 128"),
    (dict(prompt=Conditions(torch.zeros(1, 24, 7), None)), ConfigError, r"\[b, tokens, 32\] alone, found \[1, 24, 7\]"),
    (dict(prompt=Conditions(torch.zeros(1, 24, 32), torch.zeros(1, 3))), ConfigError, "and a pooled vector"),
    (dict(prompt=Conditions(torch.zeros(1, 25, 32), None)), ConfigError, "25 tokens beside a text of 48"),
    (dict(negative=Conditions(torch.zeros(3, 24, 32), None)), ConfigError, "for 1 pictures, found 3"),
    (dict(regions=[Region("a", torch.full((4, 4), 2.0))]), ConfigError, "from 0 to 1"),
    (dict(regions=[Region("a", torch.full((4, 4), float("nan")))]), ConfigError, "from 0 to 1"),
    (dict(regions=[Region("a", torch.zeros(4))]), ConfigError, "mask"),
    (dict(regions=[Region("<lora:x:1>", torch.zeros(4, 4))]), PromptError, "whole picture"),
])  # fmt: skip
def test_bad_arguments(pipes, options, error, says):
    with pytest.raises(error, match=says) as caught:
        pipes("sd1")(**{"prompt": "cat", "steps": 2, **options})
    assert "\n" not in str(caught.value)


def test_encode_refuses_what_is_more_than_one_text(pipes):
    for text in ("a AND b", "[a:b:0.5]", "[a|b]", "<lora:x:1>"):
        with pytest.raises(PromptError, match="more than one text"):
            pipes("sd1").encode([text])
    with pytest.raises(PromptError, match="prompt2"):
        pipes("sdxl")("a AND b", prompt2="a", steps=1)
