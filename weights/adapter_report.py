"""What there is to say about an adapter file: what it is, what it is made for, what it touches, what was left out.

`LoadReport` comes with every adapter that is read, and `sdcore inspect` prints it. Its lines are for a person: first what the
file is, then each part of the model it touches, its words, where it comes from, and at the end, aloud, what does not fit.
"""

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from sdcore import changes
from sdcore.changes import Change
from sdcore.embeddings import Embedding

from . import adapter_names as an
from .files import one_line

KIND_OF: dict[type, an.Kind] = {
    changes.LowRank: an.LORA, changes.Hadamard: an.LOHA, changes.Kronecker: an.LOKR, changes.Full: an.FULL,
    changes.Replace: an.REPLACE, changes.IA3: an.IA3, changes.GLoRA: an.GLORA, changes.Orthogonal: an.OFT,
}  # fmt: skip
TOUCHED = (  # the first pattern that a module's name holds says what it is
    (r"attn1\.|self_attn\.", "self-attention"), (r"attn2\.", "attention to the text"), (r"\.ff\.|\.mlp\.", "feed-forward"),
    (r"proj_(in|out)$", "around the transformers"), (r"norm", "norms"), (r"\.resnets\.", "residual blocks"),
    (r"samplers\.", "down- and upsampling"), (r"", "other layers"),
)  # fmt: skip
SOURCES = {  # metadata that tells where a file comes from
    "modelspec.title": "title", "modelspec.author": "by", "modelspec.license": "licence", "ss_output_name": "named",
    "ss_base_model_version": "base", "ss_sd_model_name": "trained on", "ss_network_module": "made with",
    "modelspec.architecture": "architecture", "ss_num_train_images": "pictures", "ss_steps": "steps",
    "ss_resolution": "resolution", "ss_clip_skip": "clip skip",
}  # fmt: skip


@dataclass
class PartReport:
    """What an adapter changes in one part of the model."""

    modules: int
    kinds: dict[str, int]
    ranks: dict[int, int]
    touched: dict[str, int]


@dataclass
class LoadReport:
    """One adapter file against one model (or the family that it is made for)."""

    path: str
    family: str  # of the model that it was compared with
    title: str
    dtype: str
    spellings: dict[str, int]  # whose spelling, and how many keys have it
    scales: dict[str, int]  # "0.5 (alpha 8 / rank 16)", and how many modules have it
    parts: dict[str, PartReport]
    modules: dict[str, list[str]]  # matched, by part
    unmatched: list[str]  # keys that belong nowhere
    mismatched: dict[str, str]  # modules that do not fit, and why
    embeddings: list[Embedding]  # that came bundled with it
    triggers: list[tuple[str, int]]  # words of its training captions, the most frequent first
    metadata: Mapping[str, str] = field(default_factory=dict)

    @property
    def matched(self) -> int:
        """How many modules it changes."""
        return sum(len(names) for names in self.modules.values())

    @property
    def fits(self) -> bool:
        """Whether all of it has a place."""
        return not self.unmatched and not self.mismatched

    def kinds(self) -> str:
        return ", ".join(dict.fromkeys(kind for part in self.parts.values() for kind in part.kinds))

    def to_text(self) -> str:
        return "\n".join(self.lines())

    def lines(self) -> Iterator[str]:
        fit = f"for {self.title}" if self.fits else f"that does not fit {self.title} as it is"
        yield f"{self.path}: {self.kinds() or 'LoRA or one of its kin'} {fit}"
        yield f"  spelling {', '.join(self.spellings) or 'unknown'}; {self.dtype}"
        for name, part in self.parts.items():
            ranks = ", ".join(f"rank {rank} ({count})" for rank, count in part.ranks.items())
            yield f"  {name}: {some(part.modules, 'module')}{f', {ranks}' if ranks else ''}"
            yield f"    {', '.join(f'{what} {count}' for what, count in part.touched.items())}"
            if len(part.kinds) > 1:
                yield f"    {', '.join(f'{kind} {count}' for kind, count in part.kinds.items())}"
        if self.scales:
            shown = [f"{how}: {some(count, 'module')}" for how, count in list(self.scales.items())[:4]]
            yield f"  scale {'; '.join(shown)}{'; ...' if len(self.scales) > 4 else ''}"
        for embedding in self.embeddings:
            vectors = some(len(embedding.vectors[0]), "vector")
            yield f"  with the embedding {one_line(embedding.name)}: {vectors}, for {embedding.family}"
        if self.triggers:
            yield f"  words of its captions: {', '.join(f'{one_line(w)} ({n})' if n else one_line(w) for w, n in self.triggers)}"
        yield from (
            f"  {label}: {one_line(self.metadata[key])}" for key, label in SOURCES.items() if self.metadata.get(key)
        )
        if self.unmatched:
            yield f"  NO PLACE for {some(len(self.unmatched), 'key')}: {', '.join(one_line(key) for key in self.unmatched[:5])}"
        if self.mismatched:
            yield f"  DOES NOT FIT, {some(len(self.mismatched), 'module')}:"
            yield from (f"    {one_line(key)}: {one_line(why)}" for key, why in list(self.mismatched.items())[:5])

    def table(self) -> dict:
        """For --json: everything but the tensors."""
        return {
            "family": self.family, "spellings": self.spellings, "scales": self.scales, "matched": self.matched,
            "fits": self.fits, "unmatched": self.unmatched, "mismatched": self.mismatched, "triggers": self.triggers,
            "parts": {name: vars(part) for name, part in self.parts.items()}, "modules": self.modules,
            "embeddings": {one.name: [list(vectors.shape) for vectors in one.vectors] for one in self.embeddings},
        }  # fmt: skip


def part_report(own: Mapping[str, Change]) -> PartReport:
    kinds: Counter[str] = Counter()
    ranks: Counter[int] = Counter()
    touched: Counter[str] = Counter()
    for name, change in own.items():
        touched[next(what for pattern, what in TOUCHED if re.search(pattern, name))] += 1
        kinds[kind_of(change)] += 1
        if rank := rank_of(change):
            ranks[rank] += 1
    return PartReport(len(own), dict(kinds.most_common()), dict(ranks.most_common()), dict(touched.most_common()))


def some(count: int, what: str) -> str:
    """1 module, 2 modules."""
    return f"{count} {what}{'' if count == 1 else 's'}"


def kind_of(change: Change) -> str:
    """What people call it: finer than the spec's sections, which keep together what has the same endings."""
    match change:
        case changes.DoRA():
            return f"{kind_of(change.change)} with DoRA ({'ComfyUI' if change.rule == 'comfy' else 'PEFT'}'s rule)"
        case changes.Sum():
            return " + ".join(kind_of(one) for one in change.changes)
        case changes.LowRank():
            kernel = change.down if change.mid is None else change.mid
            name = "LoCon" if kernel.ndim == 4 and kernel.shape[2:] != (1, 1) else "LoRA"
            return name if change.mid is None else f"{name} (Tucker)"
        case changes.Full():
            return "bias" if change.diff is None else "norm" if change.diff.ndim == 1 else "full difference"
        case changes.Orthogonal():
            return "BOFT" if change.boft else "OFT"
    return KIND_OF[type(change)].title


def rank_of(change: Change) -> int | None:
    """The rank by which alpha is divided; None where there is none."""
    match change:
        case changes.DoRA():
            return rank_of(change.change)
        case changes.Sum():
            return next((rank for one in change.changes if (rank := rank_of(one))), None)
        case changes.LowRank():
            return change.down.shape[0]
        case changes.Hadamard():
            return change.w1_b.shape[0]
        case changes.Kronecker():
            factor = change.w2_b if change.w2_b is not None else change.w1_b
            return None if factor is None else factor.shape[0]
        case changes.GLoRA():
            return change.a2.shape[0]
    return None


def trigger_words(metadata: Mapping[str, str], count: int = 10) -> list[tuple[str, int]]:
    """The words that the file says it listens to (count 0), then the most frequent of its training captions."""
    words = [(metadata["modelspec.trigger_phrase"], 0)] if metadata.get("modelspec.trigger_phrase") else []
    try:
        folders = json.loads(metadata.get("ss_tag_frequency", "{}"))
    except (ValueError, RecursionError):
        return words
    tags: Counter[str] = Counter()
    for folder in folders.values() if isinstance(folders, dict) else ():
        for tag, times in folder.items() if isinstance(folder, dict) else ():
            if type(times) is int and tag.strip():
                tags[tag.strip()] += times
    return words + tags.most_common(count)
