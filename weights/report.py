"""`sdcore inspect`: what a file or folder is, and what would load where.

A model is read exactly as `load` would read it, up to the comparison of every tensor with the module that it would go into, so a
report without an error means that it loads. What is no model (a LoRA, a ControlNet, an embedding, one part alone) is named.
"""

import json
from collections import Counter
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from torch import Tensor

from sdcore.errors import CheckpointError

from . import adapters, controls, detect, files
from . import checkpoint as ck
from .assemble import check_names, check_values, skeleton


@dataclass
class Part:
    """One part of a model, or a whole file that is no model."""

    tensors: int
    parameters: int
    dtype: str
    into: str = ""  # the module that it loads into


@dataclass
class Report:
    """What a path holds."""

    path: str
    kind: str  # "model", or what else it is: "lora", "controlnet", "embedding", "vae", ...
    what: str
    loads: bool  # whether `sdcore.load` takes it
    layout: str = ""
    family: str = ""
    prediction: str = ""
    parts: dict[str, Part] = field(default_factory=dict)
    scheduler: dict = field(default_factory=dict)
    tokenizers: dict[str, str] = field(default_factory=dict)
    unused: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    metadata: dict[str, str] = field(default_factory=dict)
    adapter: dict = field(default_factory=dict)  # of a LoRA and its kin: what `LoadReport.table` says
    lines: list[str] = field(default_factory=list)  # and the same for people

    def to_json(self) -> str:
        return json.dumps(asdict(self), ensure_ascii=False)

    def to_text(self) -> str:
        lines = [f"{self.path}: {self.what}"]
        if self.kind == "model":
            lines.append(
                f"  family {self.family}, {self.layout} layout, predicts {self.prediction}, sampler {self.scheduler['sampler']}"
            )
        for name, part in self.parts.items():
            into = f" -> {part.into}" if part.into else ""
            lines.append(
                f"  {name}: {part.tensors} tensors, {part.parameters / 1e6:.1f} M parameters, {part.dtype}{into}"
            )
        lines += [f"  {name}: {where}" for name, where in self.tokenizers.items()]
        if self.unused:
            lines.append(f"  known and unused: {len(self.unused)}: {', '.join(self.unused)}")
        lines += [f"  note: {note}" for note in self.notes]
        lines += self.lines
        lines += [f"  {files.one_line(key)}: {files.one_line(value)}" for key, value in self.metadata.items()]
        return "\n".join(lines)


def inspect(path: str | Path, *, variant: str | None = None, values: bool = True) -> Report:
    """What `path` is. CheckpointError for what is damaged, or a model that would not load; `values` also looks for NaN."""
    path = Path(path)
    if path.is_dir():
        if (path / "unet").is_dir() or (path / "model_index.json").exists():
            return of_model(ck.read(path, variant=variant), values)
        inside = sorted(
            file for file in path.iterdir() if file.suffix in (".safetensors", ".bin", ".ckpt", ".pt", ".pth")
        )
        if len(inside) != 1:
            raise CheckpointError(
                f"{path}: is no model folder (no unet/) and holds {len(inside)} weight files, expected one"
            )
        path = inside[0]
    file = files.read(path)
    kind = detect.kind_of(file.tensors)
    if kind.name == "model":
        return of_model(ck.read(path), values)
    if kind.name == "ip-adapter":
        kind = replace(kind, what=detect.ip_adapter_title(file.tensors))
    if kind.name in ("controlnet", "t2i-adapter"):
        kind = replace(kind, what=controls.sort_out(path, file.tensors, {}).title())
    return of_adapter(file, kind) if kind.name == "lora" else of_other(file, kind, values)


def of_model(source: ck.Checkpoint, values: bool) -> Report:
    parts = {}
    for name, tensors in source.tensors.items():
        model = skeleton(name, source.configs[name])
        check_names(name, model.state_dict(), tensors, source.where(name))
        if values:
            check_values(name, tensors, source.where(name), thorough=True)
        parts[name] = count(tensors, type(model).__name__)
    notes = list(source.notes)
    if not source.tokenizers:
        notes.append("no tokenizer beside it: CLIP's is taken from the hub's cache, or given as tokenizer=")
    return Report(
        path=str(source.path),
        kind="model",
        what=detect.FAMILIES[source.family].title,
        loads=True,
        layout=source.layout,
        family=source.family,
        prediction=source.scheduler.prediction_type,
        parts=parts,
        scheduler=asdict(source.scheduler),
        tokenizers={name: str(folder) for name, folder in source.tokenizers.items()},
        unused=source.unused,
        notes=notes,
    )


def of_other(file: files.WeightFile, kind: detect.Kind, values: bool) -> Report:
    if values:
        check_values(
            kind.name,
            {name: tensor for name, tensor in file.tensors.items() if tensor.is_floating_point()},
            file.path,
            thorough=True,
        )
    return Report(
        path=str(file.path),
        kind=kind.name,
        what=f"{kind.what}; {kind.advice}",
        loads=False,
        layout=file.format,
        parts={"file": count(file.tensors)},
        notes=[f"pickle global left inert: {name}" for name in file.inert],
        metadata={
            key: value
            for key, value in file.metadata.items()
            if key.startswith(("modelspec.", "ss_base", "ss_network_", "format"))
        },
    )


def of_adapter(file: files.WeightFile, kind: detect.Kind) -> Report:
    """A LoRA or one of its kin, matched with the family that it is made for (which also looks at every number)."""
    found = adapters.describe(file)
    first, *lines = found.lines()
    return Report(
        path=str(file.path),
        kind=kind.name,
        what=f"{first.removeprefix(f'{file.path}: ')}; {kind.advice}",
        loads=False,
        layout=file.format,
        family=found.family if found.fits else "",
        parts={"file": count(file.tensors)},
        notes=[f"pickle global left inert: {name}" for name in file.inert],
        adapter=found.table(),
        lines=lines,
    )


def count(tensors: dict[str, Tensor], into: str = "") -> Part:
    dtypes = Counter(str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values())
    return Part(
        len(tensors),
        sum(t.numel() for t in tensors.values()),
        ", ".join(name for name, _ in dtypes.most_common()),
        into,
    )
