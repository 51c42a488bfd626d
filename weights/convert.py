"""`sdcore convert`: a diffusers folder into one original-layout file, and back, tensor by tensor, bit by bit.

Both ways go through `Checkpoint`. Nothing is computed: names change, OpenCLIP's q/k/v are packed or unpacked. A file is written
beside its target and renamed when complete; a folder likewise. The single file carries the configs in its metadata, so that
sizes that shapes do not show (and models of unusual size) come back; other readers ignore them and go by the shapes.
"""

import json
import os
import secrets
import shutil
from pathlib import Path

import torch

from sdcore.errors import CheckpointError, ConfigError

from . import adapters, detect, files, names
from . import checkpoint as ck
from .assemble import check_names, skeleton

SINGLE_SUFFIX = ".safetensors"


def convert(
    source: str | Path,
    target: str | Path,
    layout: str | None = None,
    dtype: torch.dtype | None = None,
    *,
    ema: bool = False,
    variant: str | None = None,
    tokenizer: str | Path | None = None,
) -> Path:
    """Write the model at `source` to `target` in `layout` ("diffusers" or "ldm"; default: the other one). Returns the target.

    A LoRA or one of its kin is written with layout "kohya" or "peft" (`adapters.write_adapter`; AdapterError).

    `dtype` (float16, bfloat16, float32) changes the precision; without it every tensor keeps its bits. A target file is
    replaced only by a complete one; a target folder must not exist or be empty. CheckpointError, ConfigError.
    """
    source, target = Path(source), Path(target)
    if layout in adapters.LAYOUTS:
        if (source / "unet").is_dir():
            raise ConfigError(f"layout {layout!r}: is for adapters, and {source} is a model; expected diffusers or ldm")
        adapters.convert_adapter(source, target, layout, dtype)
        return target
    checkpoint = ck.read(source, variant=variant, ema=ema, tokenizer=Path(tokenizer) if tokenizer else None)
    layout = layout or {"diffusers": "ldm", "ldm": "diffusers"}[checkpoint.layout]
    if layout not in ("diffusers", "ldm"):
        raise ConfigError(
            f"layout {layout!r}: expected diffusers (a folder) or ldm (one original-layout file) for a model"
        )
    for part, tensors in checkpoint.tensors.items():  # what would not load is not written either
        check_names(part, skeleton(part, checkpoint.configs[part]).state_dict(), tensors, checkpoint.where(part))
    if layout == "ldm":
        write_single(checkpoint, target, dtype)
    else:
        write_folder(checkpoint, target, dtype)
    return target


# ---------------------------------------------------------------- one file


def write_single(checkpoint: ck.Checkpoint, path: Path, dtype: torch.dtype | None = None) -> None:
    """One `.safetensors` in the original layout, with modelspec metadata; the tokenizer goes beside it as NAME.tokenizer/."""
    if path.suffix.lower() != SINGLE_SUFFIX:
        raise ConfigError(f"{path}: a single file is written as {SINGLE_SUFFIX}, expected that ending")
    family = checkpoint.family
    tensors: ck.Tensors = {}
    for part, own in checkpoint.tensors.items():
        prefix, spelling = prefix_of(part, family)
        named = to_single(part, spelling, own, checkpoint.configs[part])
        tensors |= {f"{prefix}{name}": tensor for name, tensor in named.items()}
    prediction = checkpoint.scheduler.prediction_type
    if family.startswith("sdxl") and prediction == "v_prediction":  # the marks by which XL files of this kind are known
        tensors["v_pred"] = torch.zeros(0)
        tensors |= {"ztsnr": torch.zeros(0)} if checkpoint.scheduler.zero_snr else {}
    metadata = {
        "format": "pt",
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": detect.FAMILIES[family].spec,
        "modelspec.title": checkpoint.path.name,
        "modelspec.prediction_type": {"v_prediction": "v"}.get(prediction, prediction),
        ck.CONFIG_KEY: json.dumps({part: ck.WRITERS[part](config) for part, config in checkpoint.configs.items()}),
    }
    files.write(path, tensors, metadata, dtype)
    folder = next(iter(checkpoint.tokenizers.values()), None)
    beside = path.with_suffix(".tokenizer")
    if folder is not None and (folder / "vocab.json").exists() and not beside.exists():
        publish(
            beside, lambda part: [shutil.copyfile(folder / name, part / name) for name in ("vocab.json", "merges.txt")]
        )


def prefix_of(part: str, family: str) -> tuple[str, str]:
    """Where a part lives in the original file of its family, and in which spelling."""
    if part in ("unet", "vae"):
        return next((prefix, spelling) for prefix, owner, spelling in detect.PREFIXES if owner == part)
    if family.startswith("sdxl"):
        return {
            "text_encoder": ("conditioner.embedders.0.transformer.", "clip"),
            "text_encoder_2": ("conditioner.embedders.1.model.", "open_clip"),
        }[part]
    if family == "refiner":
        return "conditioner.embedders.0.model.", "open_clip"
    old = family.startswith("sd1") or family == "ip2p"
    return ("cond_stage_model.transformer.", "clip") if old else ("cond_stage_model.model.", "open_clip")


def to_single(part: str, spelling: str, tensors: ck.Tensors, config) -> ck.Tensors:
    if part == "unet":
        return names.unet_to_ldm(tensors, config)
    if part == "vae":
        return names.vae_to_ldm(tensors, config)
    return names.clip_to_open(tensors, config.layers) if spelling == "open_clip" else tensors


# ---------------------------------------------------------------- a folder


def write_folder(checkpoint: ck.Checkpoint, target: Path, dtype: torch.dtype | None = None) -> None:
    """The diffusers layout: a folder a part, each with its config.json, tokenizers, and model_index.json."""
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise CheckpointError(f"{target}: exists; choose a new folder")
    missing = [
        part
        for part in ck.text_parts(checkpoint)
        if part.replace("text_encoder", "tokenizer") not in checkpoint.tokenizers
    ]
    if missing:
        raise CheckpointError(
            f"{checkpoint.path}: no tokenizer beside it, which a folder needs; give a folder with vocab.json as tokenizer="
        )

    def fill(folder: Path) -> None:
        for part, tensors in checkpoint.tensors.items():
            write_json(folder / part / "config.json", ck.WRITERS[part](checkpoint.configs[part]))
            files.write(folder / part / ck.weight_names(part, None)[0], tensors, {"format": "pt"}, dtype)
        write_json(folder / "scheduler" / "scheduler_config.json", ck.WRITERS["scheduler"](checkpoint.scheduler))
        for name, source in checkpoint.tokenizers.items():
            write_tokenizer(folder / name, source, checkpoint)
        write_json(folder / "model_index.json", index(checkpoint))

    publish(target, fill)


def write_tokenizer(folder: Path, source: Path, checkpoint: ck.Checkpoint) -> None:
    """Copies the tokenizer's files; the two small ones that say how to pad are written where the source has none."""
    folder.mkdir()
    for name in ("vocab.json", "merges.txt", "tokenizer.json", "special_tokens_map.json", "tokenizer_config.json"):
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
    start, end = "<|startoftext|>", "<|endoftext|>"
    second = folder.name == "tokenizer_2" or checkpoint.family.startswith("sd2") or checkpoint.family == "x4"
    special = {"bos_token": start, "eos_token": end, "unk_token": end, "pad_token": "!" if second else end}
    config = checkpoint.configs[folder.name.replace("tokenizer", "text_encoder")]
    length = {
        "model_max_length": config.positions,
        "tokenizer_class": "CLIPTokenizer",
        "do_lower_case": True,
        "errors": "replace",
    }
    if not (folder / "special_tokens_map.json").exists():
        write_json(folder / "special_tokens_map.json", special)
    if not (folder / "tokenizer_config.json").exists():
        write_json(folder / "tokenizer_config.json", special | length)


def index(checkpoint: ck.Checkpoint) -> dict:
    """model_index.json, with which diffusers finds the classes."""
    family = detect.FAMILIES[checkpoint.family]
    table: dict[str, object] = {"_class_name": family.pipeline, "_diffusers_version": "0.30.0"}
    table["scheduler"] = ["diffusers", ck.WRITERS["scheduler"](checkpoint.scheduler)["_class_name"]]
    table |= {"unet": ["diffusers", "UNet2DConditionModel"], "vae": ["diffusers", "AutoencoderKL"]}
    xl = bool(checkpoint.configs["unet"].added_dim)
    for part in ck.TEXT_PARTS:
        projected = part in checkpoint.configs and checkpoint.configs[part].projection
        classes = ["CLIPTextModelWithProjection" if projected else "CLIPTextModel", "CLIPTokenizer"]
        for name, kind in zip((part, part.replace("text_encoder", "tokenizer")), classes, strict=True):
            if part in checkpoint.tensors:
                table[name] = ["transformers", kind]
            elif xl:
                table[name] = [None, None]
    if xl:
        table["force_zeros_for_empty_prompt"] = checkpoint.zero_negative
        table |= {"requires_aesthetics_score": True} if checkpoint.family == "refiner" else {}
    elif checkpoint.family != "x4":
        table |= {"safety_checker": [None, None], "feature_extractor": [None, None], "requires_safety_checker": False}
    return table


def write_json(path: Path, table: dict) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(table, indent=2) + "\n", encoding="utf-8")


def publish(target: Path, fill) -> None:
    """Fill a new folder beside `target`, then put it there in one step; on any error nothing is left behind."""
    part = target.with_name(f".{target.name}.{secrets.token_hex(4)}.part")
    try:
        part.mkdir(parents=True)
        fill(part)
        for file in part.rglob("*"):
            if file.is_file():
                with open(file, "rb") as handle:
                    os.fsync(handle.fileno())
        if target.exists():
            target.rmdir()
        os.rename(part, target)
        files.sync_folder(target.parent)
    except OSError as error:
        raise CheckpointError(f"{target}: cannot be written ({files.one_line(error.strerror or error)})") from None
    finally:
        shutil.rmtree(part, ignore_errors=True)
