"""The names in adapter files, all of them: where a change belongs (the path) and what it is (the ending). This is the spec.

A key in a LoRA file, or in one of its kin, is a path and an ending:

    lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q . lora_down.weight
    [---------------- a path: a prefix and a module -------------------]  [-- an ending --]

`SPELLINGS` lists every way in use to write the path, `KINDS` every ending and what its tensors mean. The reader
(`adapters.py`), the report of `sdcore inspect`, the writer and the page docs/adapters.md (`python -m
sdcore.weights.adapter_names` prints it) all go by these two tables, so none of them can disagree with another.

Paths are never taken apart. An underscore in kohya's spelling was a dot or an underscore, and nothing tells which; so the names
of all modules of the model are written out in every spelling and a path is looked up among them (`Places`). What is not there
is not known, and is refused by name.

Sources: the writers themselves: kohya-ss sd-scripts, LyCORIS, PEFT, diffusers, SimpleTuner, cloneofsimo/lora.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from .names import follow, unet_modules

# ---------------------------------------------------------------- where: the paths


Paths = Iterator[tuple[str, str]]  # (how it is written, the module's name)


def dotted(names: Iterable[str], unet) -> Paths:
    """The name itself; for text encoders also without `text_model.`, which transformers leaves out since 5.6."""
    for name in names:
        yield name, name
        if name.startswith("text_model."):
            yield name.removeprefix("text_model."), name


def underscored(names: Iterable[str], unet) -> Paths:
    """Every dot an underscore."""
    return ((name.replace(".", "_"), name) for name in names)


def sgm(names: Iterable[str], unet) -> Paths:
    """The name that the module has in the original single file, every dot an underscore."""
    modules = unet_modules(unet)
    return ((follow(name, modules).replace(".", "_"), name) for name in names)


def processors(names: Iterable[str], unet) -> Paths:
    """The attention's projections, mostly said to belong to its `processor`; the output projection without its `.0`."""
    for name in names:
        attention, found, projection = name.removesuffix(".0").rpartition(".to_")
        if found and attention.endswith(("attn1", "attn2")):
            yield f"{attention}.processor.to_{projection}", name
            yield f"{attention}.to_{projection}", name


PATHS: dict[str, tuple[Callable[[Iterable[str], Any], Paths], str]] = {
    "dotted": (dotted, "the module's name"),
    "underscored": (underscored, "the module's name, `.` as `_`"),
    "sgm": (sgm, "the module's name in the original single file, `.` as `_`"),
    "processors": (processors, "the attention's name, `.processor` or not, its projection (`to_out` without `.0`)"),
}


class Spelling(NamedTuple):
    """One way to write where a change belongs."""

    title: str
    prefix: str
    part: str  # of the model
    path: str  # a key of PATHS


KOHYA, KOHYA_SGM, PEFT, OLD = "kohya", "kohya (sgm names)", "PEFT / diffusers", "old diffusers"
SPELLINGS = (
    Spelling(KOHYA, "lora_unet_", "unet", "underscored"),
    Spelling(KOHYA_SGM, "lora_unet_", "unet", "sgm"),
    Spelling(KOHYA, "lora_te_", "text_encoder", "underscored"),
    Spelling(KOHYA, "lora_te1_", "text_encoder", "underscored"),
    Spelling(KOHYA, "lora_te2_", "text_encoder_2", "underscored"),
    Spelling("kohya (its own OFT)", "oft_unet_", "unet", "underscored"),
    Spelling("kohya (its own OFT)", "oft_unet_", "unet", "sgm"),
    Spelling("SimpleTuner (LyCORIS)", "lycoris_", "unet", "underscored"),
    Spelling(PEFT, "unet.", "unet", "dotted"),
    Spelling(PEFT, "unet.base_model.model.", "unet", "dotted"),
    Spelling(PEFT, "base_model.model.unet.", "unet", "dotted"),
    Spelling(PEFT, "base_model.model.", "unet", "dotted"),
    Spelling(PEFT, "", "unet", "dotted"),
    Spelling(PEFT, "text_encoder.", "text_encoder", "dotted"),
    Spelling(PEFT, "text_encoder.base_model.model.", "text_encoder", "dotted"),
    Spelling(PEFT, "base_model.model.", "text_encoder", "dotted"),
    Spelling(PEFT, "", "text_encoder", "dotted"),
    Spelling(PEFT, "text_encoder_2.", "text_encoder_2", "dotted"),
    Spelling(PEFT, "text_encoder_2.base_model.model.", "text_encoder_2", "dotted"),
    Spelling(OLD, "unet.", "unet", "processors"),
    Spelling(OLD, "", "unet", "processors"),
)


class Place(NamedTuple):
    """A module of the model, and the spelling in which it was named."""

    part: str
    module: str
    spelling: Spelling


def places(modules: Mapping[str, Iterable[str]], unet) -> dict[str, Place]:
    """Every path by which a file may name one of `modules` (part -> names), for a UNet of config `unet`.

    Where two spellings agree on a path they mean the same module; that no path means two is checked here.
    """
    found: dict[str, Place] = {}
    for spelling in SPELLINGS:
        names = list(modules.get(spelling.part, ()))
        for path, module in PATHS[spelling.path][0](names, unet):
            place = found.setdefault(spelling.prefix + path, Place(spelling.part, module, spelling))
            if place[:2] != (spelling.part, module):
                raise ValueError(f"{spelling.prefix + path} names both {place.module} and {module}")
    return found


def path_of(place: tuple[str, str], layout: str, modules: Mapping[str, Iterable[str]], unet) -> str:
    """How a module is called in files of `layout`, "kohya" or "peft": as their own writers do for that family."""
    part, module = place
    if layout == "peft":
        return f"{part}.{module}"
    if part == "unet":  # kohya's trainer holds XL under the original names, 1.x and 2.x under those of diffusers
        return "lora_unet_" + (follow(module, unet_modules(unet)) if unet.added_dim else module).replace(".", "_")
    both = {"text_encoder", "text_encoder_2"} <= set(modules)
    prefix = "lora_te_" if not both else "lora_te1_" if part == "text_encoder" else "lora_te2_"
    return prefix + module.replace(".", "_")


# ---------------------------------------------------------------- what: the endings


@dataclass(frozen=True, eq=False)
class Kind:
    """One kind of change: the endings of its tensors by role, and what they mean. In an ending `*` is any name without a dot."""

    title: str
    endings: dict[str, tuple[str, ...]]
    shapes: str
    meaning: str
    scale: str


RANK_SCALE = "alpha / rank"
NONE = "none: only by the strength that the user gives"
LORA = Kind(
    "LoRA, LoCon",
    {
        "down": (".lora_down.weight", ".lora_A.weight", ".lora_A.*.weight", ".lora_A", ".lora.down.weight",
                 "_lora.down.weight", ".lora_linear_layer.down.weight"),
        "up": (".lora_up.weight", ".lora_B.weight", ".lora_B.*.weight", ".lora_B", ".lora.up.weight",
               "_lora.up.weight", ".lora_linear_layer.up.weight"),
        "mid": (".lora_mid.weight",),
        "up_bias": (".lora_B.bias", ".lora_B.*.bias"),
    },
    "down [r, n] or [r, n, k, k], up [o, r] or [o, r, 1, 1]; with mid [r, r, k, k] (Tucker) down is [r, n, 1, 1]",
    "ΔW = scale · up @ down; with mid: Σ up[o, i] mid[i, j] down[j, n]; up_bias: Δb = scale · up_bias",
    f"{RANK_SCALE}, rank = down.shape[0]",
)  # fmt: skip
LOHA = Kind(
    "LoHa",
    {
        "w1_a": (".hada_w1_a",), "w1_b": (".hada_w1_b",), "w2_a": (".hada_w2_a",), "w2_b": (".hada_w2_b",),
        "t1": (".hada_t1",), "t2": (".hada_t2",),
    },
    "w_a [o, r], w_b [r, n·k·k]; with t [r, r, k, k] (Tucker) w_a is [r, o] and w_b [r, n]",
    "ΔW = scale · (w1_a @ w1_b) ∘ (w2_a @ w2_b), entry by entry",
    f"{RANK_SCALE}, rank = w1_b.shape[0]",
)  # fmt: skip
LOKR = Kind(
    "LoKr",
    {
        "w1": (".lokr_w1",), "w1_a": (".lokr_w1_a",), "w1_b": (".lokr_w1_b",),
        "w2": (".lokr_w2",), "w2_a": (".lokr_w2_a",), "w2_b": (".lokr_w2_b",), "t2": (".lokr_t2",),
    },
    "w1 [o1, n1] or w1_a [o1, r], w1_b [r, n1]; w2 [o2, n2, (k, k)] or w2_a [o2, r], w2_b [r, n2·k·k], or Tucker with t2",
    "ΔW = scale · w1 ⊗ w2, o = o1·o2, n = n1·n2",
    f"{RANK_SCALE} **only where a factor is a product** (rank = w2_b.shape[0], else w1_b.shape[0]); 1 where both are whole "
    "(but in PEFT's own files alpha / r of the configuration there too)",
)  # fmt: skip
FULL = Kind(
    "full difference, norm",
    {"diff": (".diff", ".w_norm"), "bias": (".diff_b", ".b_norm")},
    "the shape of W; [o]",
    "ΔW = diff; Δb = bias",
    NONE,
)
REPLACE = Kind(
    "replacement",
    {"set_weight": (".set_weight",)},
    "the shape of W",
    "ΔW = set_weight - W",
    NONE,
)
IA3 = Kind(
    "IA3",
    {"vector": (".weight",), "on_input": (".on_input",)},
    "vector [n] or [o] (convolution [1, n, 1, 1]); on_input 1 or 0",
    "ΔW = W · vector, along the inputs where on_input is 1, else along the outputs",
    NONE,
)
GLORA = Kind(
    "GLoRA",
    {"a1": (".a1.weight",), "a2": (".a2.weight",), "b1": (".b1.weight",), "b2": (".b2.weight",), "bm": (".bm.weight",)},
    "a1 [n, r], a2 [r, n], b1 [o, r], b2 [r, n, (k, k)]; old files: a1 and a2 exchanged, b1 and b2 exchanged",
    "ΔW = scale · (W @ a1 @ a2 + b1 @ b2)",
    f"{RANK_SCALE}, rank = a2.shape[0] (old files: a1.shape[0])",
)
OFT = Kind(
    "OFT, BOFT",
    {"blocks": (".oft_blocks",), "turns": (".oft_diag",), "rescale": (".rescale",)},
    "OFT blocks [m, s, s], BOFT [stages, m, s, s], m·s = o; turns [m, s, s]; rescale o numbers",
    "W' = rescale · Rᵀ W in blocks (BOFT: a butterfly of R); R = (I + Q)(I - Q)⁻¹, Q = blocks - blocksᵀ, shortened to the norm "
    "alpha · o where alpha > 0. Early files hold turns: R itself, or R - I where their diagonal is nearer to 0 than to 1",
    "**alpha is no scale but a constraint**",
)
KINDS = (LORA, LOHA, LOKR, FULL, REPLACE, IA3, GLORA, OFT)

# Endings that may stand beside any kind.
ALPHA, SCALE, DORA, MAGNITUDE, RESHAPE = "alpha", "scale", "dora_scale", "magnitude", "reshape"
BESIDE: dict[str, tuple[tuple[str, ...], str]] = {
    ALPHA: ((".alpha",), "a number; divided by the rank it is the scale. A file without has scale 1 (alpha = rank)"),
    SCALE: ((".scale",), "a number: the scale itself, in place of alpha / rank"),
    DORA: (
        (".dora_scale",),
        "DoRA, as ComfyUI computes it: [o, 1...]: W' = (W + ΔW) · dora_scale / ‖W‖ of each row; "
        "[1, n...]: ... / ‖W + ΔW‖ of each column",
    ),
    MAGNITUDE: (
        (
            ".lora_magnitude_vector",
            ".lora_magnitude_vector.weight",
            ".lora_magnitude_vector.*.weight",
        ),
        "DoRA, as PEFT computes it: [o]: W' = (W + ΔW) · magnitude / ‖W + ΔW‖ of each row",
    ),
    RESHAPE: ((".reshape_weight",), "the shape that W is enlarged to; refused where W has another"),
}
Ending = tuple[Kind | None, str]  # None: one of BESIDE
ENDINGS: dict[str, Ending] = {
    **{ending: (kind, role) for kind in KINDS for role, endings in kind.endings.items() for ending in endings},
    **{ending: (None, role) for role, (endings, _) in BESIDE.items() for ending in endings},
}
_MEANINGS = list(ENDINGS.values())
_ENDING = re.compile(
    "|".join(f"({re.escape(ending).replace(re.escape('*'), '[^.]+')})" for ending in ENDINGS)  # one group each
)


def split(key: str) -> tuple[str, Ending] | None:
    """A key as (path, its ending), the ending being the longest that is known; None where none is."""
    for start in re.finditer(r"\.|_lora\.", key):
        if match := _ENDING.fullmatch(key, start.start()):
            return key[: start.start()], _MEANINGS[match.lastindex - 1]  # type: ignore[operator]
    return None


# ---------------------------------------------------------------- cloneofsimo's numbers, and what rides along

# The first LoRA files for Stable Diffusion name no modules: they number them in the order in which diffusers 0.11 listed them.
INDEXED = re.compile(r"(?P<part>unet|text_encoder):(?P<index>\d{1,4}):(?P<role>up|down)")
EMBED = "<embed>"  # the metadata of a tensor that is a textual-inversion vector
IN_LAYER = ("attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0", "ff.net.0.proj",
            "attn2.to_q", "attn2.to_k", "attn2.to_v", "attn2.to_out.0")  # fmt: skip
IN_TEXT_LAYER = ("self_attn.k_proj", "self_attn.v_proj", "self_attn.q_proj", "self_attn.out_proj")


def index_walk(part: str, modules: Iterable[str]) -> list[str]:
    """The modules that cloneofsimo's numbers 0, 1, 2... mean: the way down, the way up, and **the middle last**.

    In a transformer layer the first half of the feed-forward stands between the attentions; a text layer's order is k, v, q, out
    (all square: nothing but the order tells them apart).
    """
    last, inside = (".attn1.to_q", IN_LAYER) if part == "unet" else (".self_attn.q_proj", IN_TEXT_LAYER)
    layers = [name.removesuffix(last) for name in modules if name.endswith(last)]
    layers.sort(key=lambda name: (name.startswith("mid_block"), name.startswith("up_blocks")))
    return [f"{layer}.{name}" for layer in layers for name in inside]


# ---------------------------------------------------------------- the page


def page() -> str:
    """docs/adapters.md, from the tables above."""

    def code(endings: Iterable[str]) -> str:
        return " ".join(f"`{ending}`" for ending in endings)

    parts = {"unet": "UNet", "text_encoder": "text encoder", "text_encoder_2": "second text encoder"}
    lines = [PAGE_HEAD.strip(), "", "| written by | prefix | goes to | then |", "|---|---|---|---|"]
    lines += [
        f"| {title} | {f'`{prefix}`' if prefix else '(none)'} | {parts[part]} | {PATHS[path][1]} |"
        for title, prefix, part, path in SPELLINGS
    ]
    lines += ["", PAGE_KINDS.strip(), ""]
    for kind in KINDS:
        lines += [f"### {kind.title}", "", "| tensor | endings |", "|---|---|"]
        lines += [f"| {role} | {code(endings)} |" for role, endings in kind.endings.items()]
        lines += ["", f"- shapes: {kind.shapes}", f"- meaning: {kind.meaning}", f"- scale: {kind.scale}", ""]
    lines += ["### Beside any of these", "", "| tensor | endings | meaning |", "|---|---|---|"]
    lines += [f"| {role} | {code(endings)} | {meaning} |" for role, (endings, meaning) in BESIDE.items()]
    index = {"IN_LAYER": code(IN_LAYER), "IN_TEXT_LAYER": code(IN_TEXT_LAYER)}
    lines += ["", PAGE_REST.strip().format(**index)]
    return "\n".join(lines) + "\n"


PAGE_HEAD = """
# Adapter files: the spec

This page is printed by `python -m sdcore.weights.adapter_names` from the tables that the reader itself goes by; a test keeps it
up to date. It says, for every adapter format that goes round for Stable Diffusion 1.x, 2.x and XL, which keys it has, where each
belongs and what number it adds to which weight.

A key is a **path** (which module) and an **ending** (which tensor). Modules are named as in the diffusers layout, such as
`down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q` or `text_model.encoder.layers.0.self_attn.q_proj`. o are a module's
outputs, n its inputs, k its kernel, r the rank, W its weight, b its bias.

## Paths

A path is never guessed at: the modules of the model are written out in every spelling below, and a path is looked up among them.
A linear layer and a 1 x 1 convolution are the same thing (1.x has convolutions where 2.x and XL have linear layers), so `[r, n]`
fits `[r, n, 1, 1]` and the other way round.
"""
PAGE_KINDS = """ Trainers write kohya's spelling of the UNet with diffusers' names for 1.x and 2.x, and with the original
("sgm") names for XL; some keep diffusers' names for XL. Both are read for every family. `lora_te2_text_projection` (OneTrainer)
is the second encoder's projection.

## Endings

The scale comes from the first of these that the file has: a `.scale` of the module; its `.alpha`, divided by the rank; PEFT's
configuration (`lora_adapter_metadata` in the file's metadata, or `adapter_config.json` beside it): `lora_alpha` / r, or
`lora_alpha` / √r with `use_rslora`, each with `rank_pattern` and `alpha_pattern`; else it is 1. Files of LyCORIS with rsLoRA
hold an alpha that is already multiplied by √r.
"""
PAGE_REST = """
## DoRA: which of the two a file gets

A file with `dora_scale` gets ComfyUI's formula, for which such files are made; one with `lora_magnitude_vector` gets PEFT's. On
outputs they differ: ComfyUI divides by the length of the rows of W, PEFT by that of W + ΔW. LyCORIS itself trains with the
latter. A file that `sdcore convert` wrote says in its metadata (`sdcore.dora_rule`) which it was.

## cloneofsimo's numbered files

Safetensors with `unet:<i>:up` [o, r] and `unet:<i>:down` [r, n] (and `text_encoder:<i>:…`), or a `.pt` that is one flat list,
up, down, up, down …; no alpha: ΔW = up @ down. i counts the layers of down_blocks, then up_blocks, and **mid_block last**, and
in each {IN_LAYER}; in a text layer {IN_TEXT_LAYER}. The metadata's `unet:<i>:rank` is compared; a tensor whose metadata is
`<embed>` is a textual-inversion vector. Files that also train convolutions ("extended") count other modules and are refused.

## What rides along

`bundle_emb.<name>.…` is a textual-inversion embedding called `<name>`; it is handed on. LCM-LoRA and its kin are kohya files.

## What is said, and what is refused

Reading is strict: a key that has no place, a shape that does not fit, ranks that differ, a NaN, a file for another family are
an `AdapterError` that names the first of them, and nothing is loaded. `strict=False` loads what fits and says aloud what was
left out. A file for which no model is at hand is compared with 1.x, 2.x, XL and the XL refiner, and belongs to the one whose
modules and shapes it fits; metadata (`ss_base_model_version`, `ss_v2`, `modelspec.architecture`) only says which is tried
first. `sdcore inspect FILE` prints the outcome; `sdcore convert IN OUT --layout kohya|peft` writes it anew.

Of PEFT's own adapters LoRA (with DoRA and rsLoRA), LoHa and LoKr are read. Its IA3, OFT, BOFT and the others (`.ia3_l`,
`.oft_R`, `.boft_R`, ...) are refused by name: merge such a one into its model with PEFT.
"""

if __name__ == "__main__":
    print(page(), end="")
