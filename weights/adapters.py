"""Reading and writing adapter files: LoRA and all its kin, whoever wrote them, to the numbers they mean or to an error.

    adapter, report = read_adapter("style.safetensors", pipe)

A file is read in four steps, and nothing of it is handed out before the last: its keys are split into paths and endings
(`adapter_names.py`, the spec); every path is looked up among the modules of the model (`Target`); the tensors of each module
become one `Change` (`sdcore/changes.py`, the formulas), with its scale worked out and its shapes and values checked; what found
no place or did not fit is an `AdapterError` that names it. Tensors are mapped, not copied. `write_adapter` is the way back.

Legend: o outputs, n inputs, k k kernel, r rank.
"""

import functools
import json
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sdcore import changes, lora
from sdcore.changes import Change
from sdcore.embeddings import Embedding
from sdcore.errors import AdapterError, ConfigError
from sdcore.lora import Adapter

from . import adapter_names as an
from . import detect, embeddings, files
from .adapter_report import KIND_OF, LoadReport, part_report, rank_of, trigger_words
from .assemble import skeleton

Tensors = dict[str, Tensor]
Weight = tuple[Tensor, Tensor | None]  # a module's weight and bias; their shapes are all that is used
PEFT_KEY = "lora_adapter_metadata"  # the metadata entry in which diffusers keeps PEFT's configuration
RULE_KEY = "sdcore.dora_rule"  # the metadata entry that says which DoRA a file of ours was
BASES = ("sd1", "sd2-base", "sdxl", "refiner")  # what a file may be made for; their kin have the same modules


# ---------------------------------------------------------------- the model's side


@dataclass(frozen=True)
class Target:
    """The modules that an adapter may change, and every path by which a file may name them."""

    family: str
    unet: Any  # its config
    weights: dict[str, dict[str, Weight]]  # part -> module -> weight and bias
    places: dict[str, an.Place]

    @property
    def title(self) -> str:
        return detect.FAMILIES[self.family].title if self.family in detect.FAMILIES else "this model"


def target_of(model) -> Target:
    """The target that a pipeline is, or that the name of a released family stands for. AdapterError for an unknown name."""
    if isinstance(model, Target):
        return model
    if isinstance(model, str):
        if model not in detect.FAMILIES:
            raise AdapterError(f"family {files.one_line(model)}: expected one of {', '.join(detect.FAMILIES)}")
        return released(model)
    return target(model.family, model.unet.config, lora.models(model))


@functools.cache
def released(family: str) -> Target:
    """A released family, with shapes and no memory."""
    release = detect.FAMILIES[family]
    configs = {"unet": release.unet, **release.text}
    return target(family, release.unet, {part: skeleton(part, config) for part, config in configs.items()})


def target(family: str, unet, modules: dict[str, nn.Module]) -> Target:
    weights: dict[str, dict[str, Weight]] = {
        part: {
            name: (module.weight, module.bias)  # type: ignore[misc]
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear | nn.Conv2d | nn.GroupNorm | nn.LayerNorm)
        }
        for part, model in modules.items()
    }
    return Target(family, unet, weights, an.places(weights, unet))


# ---------------------------------------------------------------- reading


def read_adapter(path: str | Path, model=None, strict: bool = True) -> tuple[Adapter, LoadReport]:
    """The adapter in a file (or in PEFT's folder), and what there is to say about it.

    `model` is a pipeline, or the name of a released family ("sd1", "sdxl", ...); without it, the file says what it is made for.
    AdapterError where a key has no place, a shape or rank does not fit, a number is NaN, or the family is another one; with
    `strict=False` such modules are left out, and the report says which. CheckpointError where the file itself is damaged.
    """
    file, config = open_file(Path(path))
    if model is None:
        match = best(file, config)
    else:
        match = Match(file, config, target_of(model))
        if match.misfits:
            match.refuse_other_family()
    if match.misfits and (strict or not match.parts):
        raise AdapterError(f"{file.path}: {match.complaint()}")
    adapter = Adapter(file.path.stem, match.parts, dict(file.metadata))
    return adapter, match.report()


def describe(file: files.WeightFile) -> LoadReport:
    """The report on a file that may fit no released family: for `sdcore inspect`, which has no model at hand."""
    return best(file, peft_config(file)).report()


def open_file(path: Path) -> tuple[files.WeightFile, dict]:
    """The weight file that `path` is, or the one in the folder that it is; and PEFT's configuration where there is one."""
    if path.is_dir():
        inside = sorted(f for f in path.iterdir() if f.suffix in (".safetensors", ".bin", ".pt", ".ckpt"))
        if len(inside) != 1:
            raise AdapterError(f"{path}: holds {len(inside)} weight files, expected one adapter; name the file itself")
        path = inside[0]
    file = files.read(path)
    kind = detect.kind_of(file.tensors)
    if kind.name != "lora":
        raise AdapterError(f"{path}: is {kind.what}, expected a LoRA or one of its kin; {kind.advice}")
    return file, peft_config(file)


def peft_config(file: files.WeightFile) -> dict:
    """PEFT's settings by part ("" where the file says none): from the metadata, or from adapter_config.json beside the file."""
    beside = file.path.with_name("adapter_config.json")
    text = file.metadata.get(PEFT_KEY)
    if text is None and file.path.stem == "adapter_model" and beside.is_file():
        text = beside.read_text(encoding="utf-8", errors="replace")
    if text is None:
        return {}
    try:
        table = json.loads(text)
    except (ValueError, RecursionError):
        table = None
    if not isinstance(table, dict):
        raise AdapterError(f"{file.path}: its PEFT configuration is no table; the file is damaged")
    settings: dict[str, dict] = {}
    for key, value in table.items():
        part, dot, name = key.partition(".")
        settings.setdefault(part if dot else "", {})[name if dot else key] = value
    for own in settings.values():
        own["alpha_pattern"] = plain_names(file.path, own.get("alpha_pattern") or {})
    return settings


def plain_names(path: Path, patterns: object) -> dict:
    """PEFT's patterns are regular expressions on the end of a module's name; they are read where they are just names."""
    plain = {}
    for pattern, value in patterns.items() if isinstance(patterns, dict) else ():
        name = pattern.removeprefix("^").removesuffix("$").replace("\\.", ".")
        if not re.fullmatch(r"[\w.-]+", name):
            raise AdapterError(
                f"{path}: PEFT's alpha_pattern {files.one_line(pattern)} is no plain name, which is not read"
            )
        plain[name] = value
    return plain


def best(file: files.WeightFile, config: dict) -> "Match":
    """The file matched with the family that it is made for: the first released one that takes all of it, else most of it."""
    matches = []
    for family in candidates(file):
        match = Match(file, config, released(family))
        if not match.misfits:
            return match
        matches.append(match)
    return max(matches, key=lambda match: (match.fits, match.named))


TEXT_WIDTHS = {768: "sd1", 1024: "sd2-base", 2048: "sdxl", 1280: "refiner"}


def candidates(file: files.WeightFile) -> list[str]:
    """The families, likeliest first: by the width of the text that a change of attn2.to_k reads, by names, by metadata."""
    said = " ".join(file.metadata.get(key, "") for key in ("ss_base_model_version", "modelspec.architecture")).lower()
    likely = ["sdxl"] if "xl" in said else ["sd2-base"] if "v2" in said or file.metadata.get("ss_v2") == "True" else []
    for name, tensor in file.tensors.items():
        if re.search(r"attn2[._](processor[._])?to_k\b.*(down|lora_A|w1_b|diff)", name) and tensor.ndim > 1:
            likely.insert(0, TEXT_WIDTHS.get(tensor.shape[1], "sd1"))
            break
    if any(re.search(r"(in|out)put_blocks_|lora_te[12]_|text_encoder_2", name) for name in file.tensors):
        likely.append("sdxl")
    return list(dict.fromkeys([*likely, *BASES]))


class Misfit(Exception):
    """Why one module's tensors make no change. Never leaves this file."""


class Match:
    """One file against one target: what goes where, and what does not.

    `misfits` maps each path that cannot be used to the reason; empty where everything fits.
    """

    def __init__(self, file: files.WeightFile, config: dict, target: Target):
        self.file, self.config, self.target = file, config, target
        self.parts: dict[str, dict[str, Change]] = {}
        self.misfits: dict[str, str] = {}
        self.unmatched: list[str] = []  # keys, of the misfits those that have no place at all
        self.spellings: Counter[str] = Counter()
        self.scales: Counter[str] = Counter()
        self.bundled: Tensors = {}
        groups = self.group()
        self.named = len(groups)
        for (part, module), tensors in groups.items():
            try:
                self.parts.setdefault(part, {})[module] = self.change(part, module, tensors)
            except (Misfit, AdapterError) as error:
                self.misfits[f"{part}.{module}"] = str(error)
        self.parts = {part: own for part, own in self.parts.items() if own}
        self.fits = sum(len(own) for own in self.parts.values())

    # The keys.

    def group(self) -> dict[tuple[str, str], dict[tuple[an.Kind | None, str], tuple[str, Tensor]]]:
        """(part, module) -> (kind, role) -> key and tensor; what belongs nowhere goes to `misfits`."""
        groups: dict = {}
        for key, tensor, place, ending in self.located():
            group = groups.setdefault(place[:2], {})
            if ending in group:
                self.misfits[key] = f"says the same as {group[ending][0]}: two adapters in one file"
                continue
            group[ending] = (key, tensor)
        return groups

    def located(self) -> Iterator[tuple[str, Tensor, an.Place, an.Ending]]:
        """Every tensor that has a place."""
        numbered = self.numbered()
        for key, tensor in self.file.tensors.items():
            if key in numbered:
                yield key, tensor, *numbered[key]
            elif embeddings.BUNDLED.match(key) or self.file.metadata.get(key) == an.EMBED:
                self.bundled[key] = tensor
            else:
                path, ending = an.split(key) or (key, (None, ""))
                place = self.target.places.get(path)
                if place is None or ending == (None, ""):
                    self.unmatched.append(key)
                    self.misfits[key] = "has no place in it" if place is None else "has an ending that is not known"
                    continue
                self.spellings[place.spelling.title] += 1
                yield key, tensor, place, ending

    def numbered(self) -> dict[str, tuple[an.Place, an.Ending]]:
        """cloneofsimo's keys, `unet:7:up` or in a flat list 15: place and role of each."""
        found: dict[tuple[str, int, str], str] = {}
        if all(key.isdecimal() for key in self.file.tensors):
            order = sorted(self.file.tensors, key=int)
            part = "text_encoder" if len(order) == 2 * len(self.walk("text_encoder")) else "unet"
            found = {(part, i // 2, ("up", "down")[i % 2]): key for i, key in enumerate(order)}
        else:
            for key in self.file.tensors:
                if match := an.INDEXED.fullmatch(key):
                    found[match["part"], int(match["index"]), match["role"]] = key
        placed: dict[str, tuple[an.Place, an.Ending]] = {}
        for part in {part for part, _, _ in found}:
            walk, own = self.walk(part), {index for owner, index, _ in found if owner == part}
            if own != set(range(len(walk))):
                have = f"numbers {len(own)} modules up to {max(own)}, {self.target.title} has {len(walk)} of that kind"
                self.misfits[f"{part}:{max(own)}"] = f"{have} (files with convolutions, called extended, are not read)"
                continue
            spelling = an.Spelling("cloneofsimo (numbered)", f"{part}:", part, "numbered")
            for (owner, index, role), key in found.items():
                if owner == part:
                    said = self.file.metadata.get(f"{part}:{index}:rank")
                    if role == "down" and said not in (None, str(len(self.file.tensors[key]))):
                        self.misfits[key] = f"has another rank than the metadata says ({files.one_line(said)})"
                    placed[key] = (an.Place(part, walk[index], spelling), (an.LORA, role))
                    self.spellings[spelling.title] += 1
        return placed

    def walk(self, part: str) -> list[str]:
        return an.index_walk(part, self.target.weights.get(part, ()))

    # The tensors.

    def change(self, part: str, module: str, group: dict) -> Change:
        """The change that a module's tensors make. Misfit, AdapterError."""
        weight, bias = self.target.weights[part][module]
        tensors = {ending: readable(key, ending[1], tensor) for ending, (key, tensor) in group.items()}
        beside = {role: tensors.pop((None, role)) for role in an.BESIDE if (None, role) in tensors}
        kinds = [kind for kind in an.KINDS if any(owner is kind for owner, _ in tensors)]
        key = next(iter(group.values()))[0]
        made: list[Change] = []
        for kind in kinds:
            own = {role: tensor for (owner, role), tensor in tensors.items() if owner is kind}
            if kind is an.OFT and an.ALPHA in beside:  # a constraint, no scale
                own[an.ALPHA] = beside[an.ALPHA]
            made += BUILDERS[kind.title](own, weight, functools.partial(self.scale, part, key, beside))
        if not made:
            raise Misfit(f"has {', '.join(beside)} and nothing that it belongs to")
        change = made[0] if len(made) == 1 else changes.Sum(tuple(made))
        if an.RESHAPE in beside and beside[an.RESHAPE].tolist() != list(weight.shape):
            raise Misfit(f"enlarges its weight {list(weight.shape)} to {files.one_line(beside[an.RESHAPE].tolist())}")
        for role, rule in ((an.DORA, self.file.metadata.get(RULE_KEY, "comfy")), (an.MAGNITUDE, "peft")):
            if role in beside:
                change = changes.DoRA(change, beside[role], "peft" if rule == "peft" else "comfy")
        change.check(weight, bias)
        return change

    def scale(self, part: str, key: str, beside: Tensors, rank: int | None) -> float:
        """alpha / rank, by the first rule that the file follows, and a line of the report for it.

        Rank None is a LoKr of whole factors: its scale is 1, except in PEFT's own files, whose configuration has a rank.
        """
        settings = self.config.get(part, self.config.get("", {}))
        if rank is None:
            rank = settings.get("r", 0)
            if not rank:
                return 1.0
            if settings.get("rank_pattern"):
                raise Misfit("is a LoKr of whole factors, and PEFT's rank_pattern for it is not read")
            beside = {}
        if type(rank) is not int or rank < 1:
            raise Misfit(f"has rank {files.one_line(rank)}")
        if an.SCALE in beside:
            scale, how = number(beside[an.SCALE]), "given as it is"
        elif an.ALPHA in beside:
            alpha = number(beside[an.ALPHA])
            scale, how = alpha / rank, f"alpha {alpha:g} / rank {rank}"
        elif settings:
            scale, how = peft_scale(settings, key, rank)
        else:
            scale, how = 1.0, f"no alpha: taken as the rank {rank}"
        self.scales[f"{scale:.6g} ({how})"] += 1
        return scale

    # The outcome.

    def complaint(self) -> str:
        """The first misfits, and how many there are, in one line."""
        if not self.named:
            key = files.one_line(next(iter(self.file.tensors), "none"))
            return f"none of its {len(self.file.tensors)} keys (such as {key}) names a module of {self.target.title}"
        shown = [f"{files.one_line(key)}: {reason}" for key, reason in list(self.misfits.items())[:3]]
        more = f"; and {len(self.misfits) - 3} more" if len(self.misfits) > 3 else ""
        return (
            f"{len(self.misfits)} of its modules or keys do not fit {self.target.title} ({self.fits} modules do): "
            f"{'; '.join(shown)}{more}; nothing was loaded"
        )

    def refuse_other_family(self) -> None:
        """AdapterError where the file fits a released family altogether: not this model's, or this model has other sizes."""
        other = best(self.file, self.config)
        if not other.misfits:
            same = other.target.title == self.target.title
            raise AdapterError(
                f"{self.file.path}: is made for {other.target.title}, the model is "
                f"{'one of other sizes' if same else self.target.title}; nothing was loaded"
            )

    def report(self) -> LoadReport:
        file = self.file
        floats = [tensor for tensor in file.tensors.values() if tensor.ndim and tensor.is_floating_point()]
        dtypes = Counter(str(tensor.dtype).removeprefix("torch.") for tensor in floats)
        return LoadReport(
            path=str(file.path),
            family=self.target.family,
            title=self.target.title,
            dtype=", ".join(name for name, _ in dtypes.most_common()),
            spellings=dict(self.spellings.most_common()),
            scales=dict(self.scales.most_common()),
            parts={part: part_report(own) for part, own in self.parts.items()},
            modules={part: list(own) for part, own in self.parts.items()},
            unmatched=self.unmatched,
            mismatched={key: reason for key, reason in self.misfits.items() if key not in self.unmatched},
            embeddings=self.embeddings(),
            triggers=trigger_words(file.metadata),
            metadata=file.metadata,
        )

    def embeddings(self) -> list[Embedding]:
        """The textual inversions that came with it."""
        simo = {key: tensor for key, tensor in self.bundled.items() if not embeddings.BUNDLED.match(key)}
        tables = [{key: tensor for key, tensor in self.bundled.items() if key not in simo}, simo]
        return [one for table in tables if table for one in embeddings.from_tensors(table, self.file.path)]


NUMBERS = (an.ALPHA, an.SCALE, "on_input")


def readable(key: str, role: str, tensor: Tensor) -> Tensor:
    """The tensor as it is; eight-bit floats, with which nothing can be computed, in half precision (which holds each of them)."""
    if not tensor.numel() or (tensor.ndim == 0 and role not in NUMBERS):
        raise Misfit(f"{files.one_line(key)} has shape {list(tensor.shape)}, which is no change")
    if not tensor.is_floating_point() and role not in (*NUMBERS, an.RESHAPE):
        raise Misfit(f"{files.one_line(key)} is {tensor.dtype}, expected floating-point numbers")
    return tensor.to(torch.float16) if tensor.is_floating_point() and tensor.dtype.itemsize == 1 else tensor


def number(tensor: Tensor) -> float:
    if tensor.numel() != 1 or not torch.isfinite(tensor.float()).all():
        raise Misfit(f"its alpha or scale is {files.one_line(tensor.flatten()[:4].tolist())}, expected one number")
    return tensor.item()


def peft_scale(settings: dict, key: str, rank: int) -> tuple[float, str]:
    """lora_alpha / rank, or / √rank with use_rslora; `alpha_pattern` gives some modules, by the end of their name, their own."""
    ends = [(an.split(key) or (key, None))[0]]
    while "." in ends[-1]:
        ends.append(ends[-1].partition(".")[2])
    patterns = settings["alpha_pattern"]
    usual = settings.get("lora_alpha", settings.get("alpha", rank))  # LoHa and LoKr call it alpha
    alpha = next((patterns[end] for end in ends if end in patterns), usual)
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not abs(alpha) < 1e9:
        raise Misfit(f"PEFT's alpha {files.one_line(alpha)} is no number")
    if settings.get("use_rslora") is True:
        return alpha / rank**0.5, f"alpha {alpha:g} / √rank {rank}, rsLoRA"
    return alpha / rank, f"alpha {alpha:g} / rank {rank}"


# ---------------------------------------------------------------- tensors to changes, kind by kind


def need(own: Tensors, *roles: str) -> list[Tensor]:
    missing = [role for role in roles if role not in own]
    if missing:
        raise Misfit(f"lacks {' and '.join(missing)} beside {', '.join(own)}")
    for role in roles:
        if own[role].ndim < 2:
            raise Misfit(f"{role} has shape {list(own[role].shape)}, expected a matrix or a kernel")
    return [own[role] for role in roles]


def shaped(tensor: Tensor, weight: Tensor) -> Tensor:
    """[r, n] for linear layers, [r, n, 1, 1] for convolutions, whichever was written."""
    if weight.ndim == 2 and tensor.ndim == 4 and tensor.shape[2:] == (1, 1):
        return tensor.flatten(1)
    if weight.ndim == 4 and tensor.ndim == 2 and weight.shape[2:] == (1, 1):
        return tensor[:, :, None, None]
    return tensor


def low_rank(own: Tensors, weight: Tensor, scale) -> Iterator[Change]:
    down, up = need(own, "down", "up")
    factor = scale(down.shape[0])
    up = up[:, :, None, None] if weight.ndim == 4 and up.ndim == 2 else shaped(up, weight)
    yield changes.LowRank(shaped(down, weight), up, own.get("mid"), factor)
    if "up_bias" in own:
        yield changes.Full(bias=own["up_bias"] * factor)


def hadamard(own: Tensors, weight: Tensor, scale) -> Iterator[Change]:
    need(own, "w1_a", "w1_b", "w2_a", "w2_b")
    if ("t1" in own) != ("t2" in own):
        raise Misfit("has one of t1 and t2, expected both or none")
    yield changes.Hadamard(**own, scale=scale(own["w1_b"].shape[0]))


def kronecker(own: Tensors, weight: Tensor, scale) -> Iterator[Change]:
    factor = next((own[role] for role in ("w2_b", "w1_b") if role in own), None)
    for which in ("w1", "w2"):
        need(own, which) if which in own else need(own, f"{which}_a", f"{which}_b")
    yield changes.Kronecker(**own, scale=scale(None if factor is None else factor.shape[0]))


def full(own: Tensors, weight: Tensor, scale) -> Iterator[Change]:
    yield changes.Full(own.get("diff"), own.get("bias"))


def replacement(own: Tensors, weight: Tensor, scale) -> Iterator[Change]:
    yield changes.Replace(own["set_weight"])


def ia3(own: Tensors, weight: Tensor, scale) -> Iterator[Change]:
    if set(own) != {"vector", "on_input"}:
        raise Misfit(f"has {', '.join(own)} alone, expected IA3's weight and on_input")
    yield changes.IA3(own["vector"].flatten(), number(own["on_input"]) != 0)


def glora(own: Tensors, weight: Tensor, scale) -> Iterator[Change]:
    a1, a2, b1, b2 = need(own, "a1", "a2", "b1", "b2")
    if weight.ndim < 2:
        raise Misfit(f"changes a matrix, the weight here is {list(weight.shape)}")
    new = a1.shape[0] == a2.shape[1] == weight.shape[1] and b1.shape[0] == weight.shape[0]
    if not new:  # old files number each pair the other way round
        a1, a2, b1, b2 = a2, a1, b2, b1
    yield changes.GLoRA(a1, a2, b1, b2, own.get("bm"), scale(a2.shape[0]))


def orthogonal(own: Tensors, weight: Tensor, scale) -> Iterator[Change]:
    if ("blocks" in own) == ("turns" in own):
        raise Misfit(f"has {', '.join(own)}, expected oft_blocks, or oft_diag")
    if "turns" in own:
        (turns,) = need(own, "turns")
        if turns.ndim != 3 or turns.shape[1] != turns.shape[2]:
            raise Misfit(f"oft_diag has shape {list(turns.shape)}, expected square blocks")
        if turns.float().diagonal(dim1=1, dim2=2).mean() < 0.5:  # R - I
            turns = turns + torch.eye(turns.shape[-1], dtype=turns.dtype)
        yield changes.Orthogonal(turns, own.get("rescale"), cayley=False)
        return
    (blocks,) = need(own, "blocks")
    constraint = number(own[an.ALPHA]) * weight.shape[0] if an.ALPHA in own else 0.0
    yield changes.Orthogonal(blocks, own.get("rescale"), constraint, boft=blocks.ndim == 4)


BUILDERS = {
    an.LORA.title: low_rank, an.LOHA.title: hadamard, an.LOKR.title: kronecker, an.FULL.title: full,
    an.REPLACE.title: replacement, an.IA3.title: ia3, an.GLORA.title: glora, an.OFT.title: orthogonal,
}  # fmt: skip


# ---------------------------------------------------------------- writing

LAYOUTS = ("kohya", "peft")
BASE_VERSIONS = {
    "sd1": "sd_v1",
    "sd2-base": "sd_v2",
    "sd2": "sd_v2_v",
    "sdxl": "sdxl_base_v1-0",
}  # as kohya's trainer says them


def write_adapter(path: str | Path, adapter: Adapter, layout: str, model, dtype: torch.dtype | None = None) -> None:
    """An adapter as a `.safetensors` file, named as kohya's trainer ("kohya") or PEFT and diffusers ("peft") name it.

    `model` is a pipeline, or the name of a family, and decides the spelling. Tensors keep their bits, or go to `dtype`; scales
    become alphas. What the adapter's metadata said is kept. AdapterError where the layout has no way to say a change: PEFT's
    has only LoRA without a middle, with or without PEFT's DoRA. ConfigError for an unknown layout or another ending than
    .safetensors.
    """
    path, target = Path(path), target_of(model)
    if layout not in LAYOUTS:
        raise ConfigError(f"layout {layout!r}: expected {' or '.join(LAYOUTS)} for an adapter")
    if path.suffix.lower() != ".safetensors":
        raise ConfigError(f"{path}: an adapter is written as .safetensors, expected that ending")
    endings = kohya_endings if layout == "kohya" else peft_endings
    tensors: Tensors = {}
    rules = set()
    for part, own in adapter.parts.items():
        for module, change in own.items():
            if module not in target.weights.get(part, {}):
                raise AdapterError(
                    f"{path}: {target.title} has no {part}.{module}; write it for the family it was made for"
                )
            spelled = an.path_of((part, module), layout, target.weights, target.unet)
            if isinstance(change, changes.DoRA):
                rules.add(change.rule)
            for ending, tensor in endings(change, target.weights[part][module][0]):
                if spelled + ending in tensors:
                    raise AdapterError(f"{path}: {part}.{module} has two {ending}, and a file of this layout holds one")
                tensors[spelled + ending] = tensor
    if len(rules) > 1:
        raise AdapterError(
            f"{path}: the adapter has DoRA by two rules ({', '.join(sorted(rules))}), and a file has one"
        )
    about = {key: text for key, text in adapter.metadata.items() if key not in (PEFT_KEY, RULE_KEY)}
    about |= peft_metadata(adapter) if layout == "peft" else kohya_metadata(adapter, target.family)
    about |= {RULE_KEY: rules.pop()} if rules and layout == "kohya" else {}
    files.write(path, tensors, {"format": "pt"} | about, dtype)


def kohya_endings(change: Change, weight: Tensor) -> Iterator[tuple[str, Tensor]]:
    """The tensors of one module, by ending: the first ending of each role in the table, and its alpha."""
    if isinstance(change, changes.Sum):
        for one in change.changes:
            yield from kohya_endings(one, weight)
        return
    if isinstance(change, changes.DoRA):
        yield from kohya_endings(change.change, weight)
        outputs = change.rule == "peft" or change.magnitude.shape[0] == weight.shape[0]
        shape = [-1, *[1] * (weight.ndim - 1)] if outputs else [1, -1, *[1] * (weight.ndim - 2)]
        yield an.BESIDE[an.DORA][0][0], change.magnitude.reshape(shape)
        return
    tensors = dict(change.tensors())
    match change:
        case changes.Replace(bias=Tensor()):
            raise AdapterError("a replaced bias has no name in kohya's files")
        case changes.Replace():
            tensors = {"set_weight": tensors["weight"]}
        case changes.IA3():
            if change.on_bias:
                raise AdapterError("an IA3 that scales biases too (PEFT's) has no name in kohya's files")
            vector = change.vector.reshape(1, -1, *[1] * (weight.ndim - 2)) if weight.ndim > 2 else change.vector
            tensors = {"vector": vector, "on_input": torch.tensor(int(change.on_input))}
        case changes.Kronecker() if rank_of(change) is None and change.scale != 1:
            tensors["w1"] = tensors["w1"] * change.scale  # PEFT's; kohya's files have no scale for whole factors
        case changes.Orthogonal():
            tensors = ({} if change.cayley else {"turns": tensors.pop("blocks")}) | tensors
            yield ".alpha", torch.tensor(change.constraint / weight.shape[0])
    endings = KIND_OF[type(change)].endings
    for role, tensor in tensors.items():
        yield endings[role][-1 if weight.ndim == 1 else 0], tensor  # of norms the last: w_norm, b_norm
    if rank := rank_of(change):
        yield ".alpha", torch.tensor(change.scale * rank, dtype=torch.float32)  # type: ignore[attr-defined]


def peft_endings(change: Change, weight: Tensor) -> Iterator[tuple[str, Tensor]]:
    """The tensors of one module as PEFT names them."""
    if isinstance(change, changes.DoRA) and change.rule == "peft":
        shape = [-1] if weight.ndim == 2 else [1, -1, *[1] * (weight.ndim - 2)]
        yield an.BESIDE[an.MAGNITUDE][0][0], change.magnitude.reshape(shape)
        change = change.change
    if not isinstance(change, changes.LowRank) or change.mid is not None:
        what = "a DoRA by ComfyUI's rule" if isinstance(change, changes.DoRA) else KIND_OF[type(change)].title
        what = "a LoCon with a middle (Tucker)" if isinstance(change, changes.LowRank) else what
        raise AdapterError(
            f"{what} cannot be said in PEFT's layout, which has only LoRA and PEFT's DoRA; write it as kohya"
        )
    yield ".lora_A.weight", change.down
    yield ".lora_B.weight", change.up


def peft_metadata(adapter: Adapter) -> dict[str, str]:
    """PEFT's configuration of every part, from which readers of this layout take alpha."""
    table: dict[str, object] = {}
    for part, own in adapter.parts.items():
        low: dict[str, changes.LowRank] = {}
        for module, change in own.items():
            inner = change.change if isinstance(change, changes.DoRA) else change
            assert isinstance(inner, changes.LowRank)  # `peft_endings` let nothing else through
            low[module.removeprefix("text_model.")] = inner
        ranks = {module: change.down.shape[0] for module, change in low.items()}
        alphas = {module: whole(change.scale * ranks[module]) for module, change in low.items()}
        rank, alpha = (Counter(numbers.values()).most_common(1)[0][0] for numbers in (ranks, alphas))
        settings = {
            "r": rank,
            "lora_alpha": alpha,
            "rank_pattern": {module: own for module, own in ranks.items() if own != rank},
            "alpha_pattern": {module: own for module, own in alphas.items() if own != alpha},
            "target_modules": sorted(low),
            "use_dora": any(isinstance(change, changes.DoRA) for change in own.values()),
            "use_rslora": False,
            "lora_bias": False,
        }
        table |= {f"{part}.{name}": value for name, value in settings.items()}
    return {PEFT_KEY: json.dumps(table, sort_keys=True)}


def kohya_metadata(adapter: Adapter, family: str) -> dict[str, str]:
    """What readers of kohya's files look for, where the adapter's own metadata does not say it."""
    made = [change for own in adapter.parts.values() for change in own.values()]
    plain = all(isinstance(change, changes.LowRank) and change.mid is None for change in made)
    said = {"ss_network_module": "networks.lora" if plain else "lycoris.kohya", "modelspec.title": adapter.name}
    if ranks := {(rank, change.scale) for change in made if (rank := rank_of(change)) and hasattr(change, "scale")}:
        one = len(ranks) == 1
        rank, scale = next(iter(ranks))
        said |= (
            {"ss_network_dim": str(rank), "ss_network_alpha": str(whole(rank * scale))}
            if one
            else {"ss_network_dim": "Dynamic"}
        )
    if family in BASE_VERSIONS:
        said |= {"ss_base_model_version": BASE_VERSIONS[family], "ss_v2": str(family.startswith("sd2"))}
        said["modelspec.architecture"] = f"{detect.FAMILIES[family].spec}/lora"
    return {key: text for key, text in said.items() if key not in adapter.metadata}


def whole(number: float) -> int | float:
    return int(number) if number == int(number) else number


def convert_adapter(
    source: str | Path, target: str | Path, layout: str, dtype: torch.dtype | None = None
) -> LoadReport:
    """Read an adapter file, and write it in the other layout, for the family that it is made for. Errors as of both."""
    adapter, report = read_adapter(source)
    if report.embeddings:
        raise AdapterError(
            f"{source}: came with an embedding ({report.embeddings[0].name}), which this layout does not hold"
        )
    write_adapter(target, adapter, layout, report.family, dtype)
    return report
