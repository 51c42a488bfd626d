"""A complete model on disk, before any module is built: a diffusers folder or an original single file, as one `Checkpoint`.

Both layouts end in the same thing: for every part its config and its tensors under our names (mapped, not copied), where the
tokenizer lies, and by name what the files hold that nothing here uses. `load.py` builds modules from it, `convert.py` writes it
in the other layout, `report.py` describes it. Parts that do not belong together are refused here.
"""

import functools
import json
import logging
import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from sdcore.errors import CheckpointError
from sdcore.scheduler import SchedulerConfig

from . import configs, detect, files, names
from .assemble import listed

Tensors = dict[str, Tensor]
logger = logging.getLogger("sdcore")

TEXT_PARTS = ("text_encoder", "text_encoder_2")
LEFT_OUT = ("safety_checker", "feature_extractor", "image_encoder", "depth_estimator", "low_res_scheduler", "vae_1_0")
READERS: dict[str, Callable[[dict, str | Path], Any]] = {
    "unet": configs.unet_config, "vae": configs.vae_config,
    "text_encoder": configs.text_config, "text_encoder_2": configs.text_config, "scheduler": configs.scheduler_config,
}  # fmt: skip
WRITERS: dict[str, Callable[[Any], dict]] = {
    "unet": configs.unet_table, "vae": configs.vae_table,
    "text_encoder": configs.text_table, "text_encoder_2": configs.text_table, "scheduler": configs.scheduler_table,
}  # fmt: skip
CONFIG_KEY = "sdcore.configs"  # the metadata entry in which our own single files keep the sizes that shapes do not show


@dataclass
class Checkpoint:
    """What a model on disk is: its family, and by part ("unet", "vae", "text_encoder", ...) configs and tensors."""

    path: Path
    layout: str  # "diffusers" (folder) or "ldm" (single file)
    family: str
    configs: dict[str, Any]  # part -> its config dataclass
    tensors: dict[str, Tensors]
    tokenizers: dict[str, Path]  # folder with vocab.json and merges.txt; empty when none was found
    zero_negative: bool | None = None  # whether an empty negative prompt is zeros; None: as is usual for the family
    unused: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def scheduler(self) -> SchedulerConfig:
        return self.configs["scheduler"]

    def where(self, part: str) -> Path:
        """What to name in an error about `part`."""
        return self.path / part if self.layout == "diffusers" else self.path


@functools.cache
def say_once(message: str) -> None:
    logger.warning(message)


def read(path: Path, *, variant: str | None = None, ema: bool = False, tokenizer: Path | None = None) -> Checkpoint:
    """The model in a folder or file; nothing is copied. CheckpointError when it is none, incomplete or of mixed families."""
    path = Path(path)
    checkpoint = read_folder(path, variant) if path.is_dir() else read_single(path, ema)
    if tokenizer is not None:
        checkpoint.tokenizers = {
            part.replace("text_encoder", "tokenizer"): Path(tokenizer) for part in text_parts(checkpoint)
        }
    if checkpoint.family.startswith("sd1") or checkpoint.family.startswith("sd2"):
        # As diffusers' pipelines of 1.x and 2.x do: the first released files lack the offset that the models were meant for.
        checkpoint.configs["scheduler"] = replace(checkpoint.scheduler, steps_offset=1)
    if checkpoint.family.startswith(("sdxl", "refiner")):
        checkpoint.configs["scheduler"] = replace(checkpoint.scheduler, ays="sdxl")
    if checkpoint.zero_negative is None:
        checkpoint.zero_negative = checkpoint.family.startswith("sdxl")
    return checkpoint


def text_parts(checkpoint: Checkpoint) -> list[str]:
    return [part for part in TEXT_PARTS if part in checkpoint.tensors]


# ---------------------------------------------------------------- diffusers folder


def read_folder(folder: Path, variant: str | None) -> Checkpoint:
    found = sorted(entry.name for entry in folder.iterdir() if entry.is_dir())
    index = configs.read_json(folder / "model_index.json") if (folder / "model_index.json").exists() else {}
    check_pipeline(folder, index)
    if "unet" not in found:
        raise CheckpointError(
            f"{folder}: no unet/ in it (found: {files.one_line(', '.join(found)) or 'no folder'}); "
            "expected a model folder with unet, vae, text_encoder, tokenizer and scheduler"
        )
    kinds = {part: folder / part for part in ("unet", "vae", "scheduler", *TEXT_PARTS) if part in found}
    read_configs = {
        part: READERS[part](configs.read_json(config_file(where)), config_file(where)) for part, where in kinds.items()
    }
    named = [part for part in TEXT_PARTS if isinstance(index.get(part), list) and any(index[part])]
    needed = ["unet", "vae", "scheduler", *named]
    missing = [part for part in needed if part not in kinds] or (
        ["text_encoder"] if not set(TEXT_PARTS) & set(kinds) else []
    )
    if missing:
        raise CheckpointError(
            f"{folder}: no {missing[0]}/ in it (found: {', '.join(kinds)}); download the model completely"
        )
    unused: list[str] = []
    tensors = {}
    for part, where in kinds.items():
        if part != "scheduler":
            own = names.vae_spelling if part == "vae" else names.clip_spelling if part in TEXT_PARTS else dict
            tensors[part] = known(part, own(read_weights(where, variant)), unused)
            if part in TEXT_PARTS:
                read_configs[part] = projected(read_configs[part], tensors[part], where)
    left = [name for name in found if name in LEFT_OUT and list((folder / name).iterdir())]
    if left:
        say_once(f"{folder}: {', '.join(left)} left out (not needed to draw)")
    tokenizers: dict[str, Path] = {n: folder / n for n in ("tokenizer", "tokenizer_2") if n in found}
    zeros = index.get("force_zeros_for_empty_prompt") is True if "force_zeros_for_empty_prompt" in index else None
    checkpoint = Checkpoint(folder, "diffusers", "", read_configs, tensors, tokenizers, zeros, unused + left)
    checkpoint.family = family_of_parts(checkpoint)
    return checkpoint


def check_pipeline(folder: Path, index: dict) -> None:
    """model_index.json names classes; they are only compared, to refuse early what is another kind of model."""
    name = index.get("_class_name", "StableDiffusionPipeline")
    unet = index.get("unet")
    if "transformer" in index or (isinstance(unet, list) and unet[1:] not in ([], ["UNet2DConditionModel"])):
        raise CheckpointError(
            f"{folder}: is a {files.one_line(name)}; only Stable Diffusion 1.x, 2.x and XL are supported"
        )


def config_file(folder: Path) -> Path:
    return folder / ("scheduler_config.json" if folder.name == "scheduler" else "config.json")


def weight_names(part: str, variant: str | None) -> list[str]:
    """What a part's weights may be called, best first: plain before fp16 (unless a variant is named), then safetensors first."""
    text = part in (*TEXT_PARTS, "image_encoder")  # those that transformers wrote
    kinds = [
        ("model" if text else "diffusion_pytorch_model", ".safetensors"),
        ("pytorch_model" if text else "diffusion_pytorch_model", ".bin"),
    ]
    return [
        name
        for middle in ([f".{variant}"] if variant else ["", ".fp16"])
        for stem, suffix in kinds
        for name in (f"{stem}{middle}{suffix}", f"{stem}{suffix}.index{middle}.json")
    ]


def read_weights(folder: Path, variant: str | None, part: str = "") -> Tensors:
    """The tensors of one part's folder, from one file or from its shards. The folder's name says which part, or `part` does."""
    wanted = weight_names(part or folder.name, variant)
    for file in (folder / name for name in wanted):
        if file.exists():
            return read_shards(file) if file.suffix == ".json" else files.read(file).tensors
    found = ", ".join(sorted(file.name for file in folder.iterdir())) or "nothing"
    raise CheckpointError(
        f"{folder}: no {wanted[0]} in it (found: {files.one_line(found)}); download the model completely"
    )


def read_shards(index: Path) -> Tensors:
    table = configs.read_json(index).get("weight_map")
    if not isinstance(table, dict) or not all(
        isinstance(file, str) and re.fullmatch(r"[\w.-]+", file) for file in table.values()
    ):
        raise CheckpointError(f"{index}: no table of plain file names in it; the file is damaged")
    tensors: Tensors = {}
    for file in sorted(set(table.values())):
        tensors = names.join(tensors, files.read(index.parent / file).tensors)
    if set(tensors) != set(table):
        raise CheckpointError(
            f"{index}: lists {len(table)} tensors, its files hold {len(tensors)}; download the model again"
        )
    return tensors


def known(part: str, tensors: Tensors, unused: list[str]) -> Tensors:
    """The tensors without those that are known to be unused, whose names are added to `unused`."""
    extra = {name for name in tensors if detect.UNUSED.search(name)}
    unused += [f"{part}: {name}" for name in sorted(extra)]
    return {name: tensor for name, tensor in tensors.items() if name not in extra}


def projected(config, tensors: Tensors, where: Path):
    """Old configs do not say whether the tower has its projection; the tensors do."""
    weight = tensors.get("text_projection.weight")
    if weight is not None and not config.projection:
        return replace(config, projection=weight.shape[0] if weight.ndim == 2 else 0)
    return config


# ---------------------------------------------------------------- original single file


def read_single(path: Path, ema: bool) -> Checkpoint:
    file = files.read(path)
    kind = detect.kind_of(file.tensors)
    if kind.name != "model":
        raise CheckpointError(f"{path}: is {kind.what}, expected a complete model; {kind.advice}")
    try:
        return single(file, ema)
    except CheckpointError as error:
        text = str(error)
        raise CheckpointError(text if text.startswith(str(path)) else f"{path}: {text}") from None


def single(file: files.WeightFile, ema: bool) -> Checkpoint:
    tensors = detect.averaged(file.tensors) if ema else file.tensors
    parts, unused, unknown = detect.split(tensors)
    if unknown:
        raise CheckpointError(f"{listed(unknown)} belong to no part that is known here")
    found = {part for part, _ in parts}
    if len(found) != len(parts):
        raise CheckpointError("it holds a text encoder in two spellings; it was merged wrongly")
    if "unet" not in found:
        raise CheckpointError("it holds no UNet but only its EMA copy; load it with ema")
    ldm = parts["unet", "ldm"]
    sizes = detect.unet_from_shapes(ldm)
    prediction, reason = detect.prediction_of(file, ldm, sizes)
    known_configs, family = own_configs(file), ""
    if not known_configs:
        family = detect.family_of(sizes, prediction)
        release = detect.FAMILIES[family]
        sampling = replace(release.scheduler, prediction_type=prediction, zero_snr="ztsnr" in file.tensors)
        known_configs = {"unet": release.unet, "vae": release.vae, **release.text, "scheduler": sampling}
    missing = [part for part in known_configs if part not in found and part != "scheduler"]
    if missing:
        raise CheckpointError(
            f"it holds no {missing[0]} (found: {', '.join(sorted(found))}), expected a complete model"
        )
    ours = {}
    for (part, spelling), own in parts.items():
        if part not in known_configs:
            raise CheckpointError(f"it holds a {part}, which {family or 'its own configuration'} does not have")
        ours[part] = known(part, from_single(part, spelling, own, known_configs[part]), unused)
    notes = [f"prediction type {prediction}: {reason}"] + [f"pickle global left inert: {name}" for name in file.inert]
    beside = tokenizers_beside(file.path)
    tokenizers = {part.replace("text_encoder", "tokenizer"): beside for part in TEXT_PARTS if part in ours and beside}
    checkpoint = Checkpoint(file.path, "ldm", family, known_configs, ours, tokenizers, None, sorted(unused), notes)
    checkpoint.family = family or family_of_parts(checkpoint)
    return checkpoint


def from_single(part: str, spelling: str, tensors: Tensors, config) -> Tensors:
    if part == "unet":
        return names.unet_from_ldm(tensors, config)
    if part == "vae":
        return names.vae_from_ldm(tensors, config)
    return names.clip_from_open(tensors, config.layers) if spelling == "open_clip" else names.clip_spelling(tensors)


def own_configs(file: files.WeightFile) -> dict[str, Any]:
    """The configs that our own writer left in the metadata; empty for anybody else's file."""
    if CONFIG_KEY not in file.metadata:
        return {}
    where = f"{file.path} (metadata {CONFIG_KEY})"
    try:
        table = json.loads(file.metadata[CONFIG_KEY])
    except (ValueError, RecursionError):
        table = None
    if not isinstance(table, dict) or not {"unet", "vae", "scheduler"} <= set(table) <= set(READERS):
        raise CheckpointError(f"{where}: is no table of the parts' configurations; the file is damaged")
    return {part: READERS[part](value, f"{where} {part}") for part, value in table.items()}


def tokenizers_beside(path: Path) -> Path | None:
    """A tokenizer next to a single file: NAME.tokenizer/, tokenizer/, or vocab.json and merges.txt themselves."""
    for folder in (path.with_suffix(".tokenizer"), path.parent / "tokenizer", path.parent):
        if (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
            return folder
    return None


# ---------------------------------------------------------------- do the parts fit?


def family_of_parts(checkpoint: Checkpoint) -> str:
    """The family, from configs alone (any width). CheckpointError when the parts are not of one family."""
    unet, vae = checkpoint.configs["unet"], checkpoint.configs["vae"]
    texts = {part: checkpoint.configs[part] for part in TEXT_PARTS if part in checkpoint.configs}
    width = sum(text.width for text in texts.values())
    if unet.context_dim != width:
        given = " + ".join(f"{part} {text.width}" for part, text in texts.items()) or "no text encoder"
        raise CheckpointError(
            f"{checkpoint.path}: parts of different families: unet reads text of width {unet.context_dim}"
            f"{like(unet.context_dim)}, found {given}{like(width)}; take both from one model"
        )
    extra = unet.in_channels - vae.latent_channels
    if unet.out_channels != vae.latent_channels or extra not in (0, 1, 3, 4, 5):
        raise CheckpointError(
            f"{checkpoint.path}: parts of different families: unet works on {unet.in_channels} -> {unet.out_channels} "
            f"channels, vae has {vae.latent_channels}; take both from one model"
        )
    if unet.added_dim:
        pooled = next((text.projection for part, text in texts.items() if part == "text_encoder_2"), 0)
        numbers = (unet.added_dim - pooled) / max(1, unet.added_time_dim)
        family = {(6, 0): "sdxl", (6, 5): "sdxl-inpaint", (5, 0): "refiner"}.get((numbers, extra))
    elif unet.class_embeddings:
        family = "x4" if extra == 3 else None
    elif unet.linear_projection:
        v = checkpoint.scheduler.prediction_type == "v_prediction"
        family = {0: "sd2" if v else "sd2-base", 5: "sd2-inpaint", 1: "sd2-depth"}.get(extra)
    else:
        family = {0: "sd1", 5: "sd1-inpaint", 4: "ip2p"}.get(extra)
    if family is None:
        raise CheckpointError(
            f"{checkpoint.path}: a UNet with {unet.in_channels} input channels, text width {unet.context_dim} and "
            f"{unet.added_dim} added numbers is none of the families {', '.join(detect.FAMILIES)}"
        )
    usual = detect.FAMILIES[family].vae
    if vae.channels == usual.channels and vae.scaling_factor != usual.scaling_factor:  # a small model has its own
        say_once(
            f"{checkpoint.path}: vae has scaling factor {vae.scaling_factor}, {family} usually {usual.scaling_factor}: "
            "of another model?"
        )
    return family


def like(width: int) -> str:
    known_widths = {768: " (1.x)", 1024: " (2.x)", 2048: " (XL)", 1280: " (XL refiner)"}
    return known_widths.get(width, "")
