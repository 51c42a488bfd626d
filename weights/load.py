"""Loading a model: a name, folder or file becomes a pipeline, or an error of one line; never half a model.

    pipe = load("tiny")                                   # the bundled model; or an alias, a hub id
    pipe = load("folder-in-diffusers-layout")
    pipe = load("v1-5-pruned-emaonly.safetensors")        # the original layout, .safetensors or .ckpt
    vae = load_vae(path); eye = load_image_encoder(path)  # one part alone

The modules are built on the meta device, where parameters have shapes but no memory, and the file's mapped tensors are put in
their place. So loading costs neither the time nor the memory of a copy until a dtype or device other than the file's is asked
for. Every tensor of the file has its place in a module or is listed as known to be unused. NaN is looked for at the start of
every tensor here, and everywhere by `inspect`.
"""

from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from sdcore.clip import CLIP_BIGG_VISION, CLIP_H_VISION, CLIP_L_VISION, CLIPText, CLIPVision
from sdcore.errors import CheckpointError, ConfigError
from sdcore.pipeline import Pipeline
from sdcore.scheduler import SchedulerConfig
from sdcore.tokenizer import Tokenizer
from sdcore.unet import UNet
from sdcore.vae import VAE, VAEConfig

from . import checkpoint as ck
from . import detect, fetch, files, names
from .assemble import fill
from .report import Report, inspect

PADS = {"text_encoder": "<|endoftext|>", "text_encoder_2": "!"}  # 2.x and x4 pad their only encoder with "!" too


@dataclass
class Parts:
    """A loaded model in its parts, from which a pipeline is made."""

    unet: UNet
    vae: VAE
    text_encoders: list[CLIPText]
    tokenizers: list[Tokenizer]
    scheduler: SchedulerConfig
    family: str
    zero_negative: bool = False  # an empty negative prompt is zeros, not the encoding of ""
    unused: list[str] = field(default_factory=list)  # names of the tensors that were known to be unused


def load(
    name: str | Path,
    device: str | torch.device | None = None,
    dtype: torch.dtype | str | None = None,
    *,
    offload: bool = False,
    **options,
) -> Pipeline:
    """A `Pipeline` from an alias, hub id, folder or file; see `load_parts` for the other arguments and the errors.

    With `offload` the parts stay in main memory, and the pipeline takes to the device only the one that is at work.
    """
    device, dtype = choose(device, dtype)
    parts = load_parts(name, "cpu" if offload else device, dtype, **options)
    return Pipeline(
        parts.unet,
        parts.vae,
        parts.text_encoders,
        parts.tokenizers,
        parts.scheduler,
        parts.family,
        zero_negative=parts.zero_negative,
        device=device,
        offload=offload,
    )


def load_parts(
    name: str | Path,
    device: str | torch.device | None = None,
    dtype: torch.dtype | str | None = None,
    *,
    revision: str | None = None,
    variant: str | None = None,
    ema: bool = False,
    tokenizer: str | Path | None = None,
) -> Parts:
    """The parts of a model, on `device` (default: cuda, mps, cpu, whichever is there) in `dtype` (default: `default_dtype`).

    `revision` and `variant` ("fp16") choose among a hub repository's files, `ema` takes the averaged weights of an original
    training file, `tokenizer` is a folder with vocab.json and merges.txt for single files, which hold none.
    CheckpointError, NonFiniteError: what is wrong with which file, and what to do. ConfigError: no such device or dtype.
    """
    device, dtype = choose(device, dtype)
    path = fetch.resolve(name, revision=revision, variant=variant)
    source = ck.read(path, variant=variant, ema=ema, tokenizer=Path(tokenizer) if tokenizer else None)
    texts = ck.text_parts(source)
    tokenizers = [read_tokenizer(source, part) for part in texts]  # the small files first: one may be missing
    unet = build("unet", source, device, dtype)
    vae = build("vae", source, device, dtype)
    encoders = [build(part, source, device, dtype) for part in texts]
    return Parts(
        unet, vae, encoders, tokenizers, source.scheduler, source.family, bool(source.zero_negative), source.unused
    )


def load_vae(path: str | Path, device=None, dtype=None, *, scaling_factor: float | None = None) -> VAE:
    """An autoencoder alone, from its folder (with config.json) or a file in either spelling (released sizes).

    A file does not say its scaling factor: SD 1.x and 2.x have 0.18215, XL 0.13025; without one, 1.x is assumed and said.
    """
    device, dtype = choose(device, dtype)
    path = Path(path)
    if path.is_dir():
        config = ck.READERS["vae"](ck.configs.read_json(path / "config.json"), path / "config.json")
        tensors = ck.read_weights(path, None)
    else:
        file = files.read(path)
        kind = detect.kind_of(file.tensors)
        if kind.name != "vae":
            raise CheckpointError(f"{path}: is {kind.what}, expected an autoencoder alone; {kind.advice}")
        tensors = {
            key.removeprefix("first_stage_model.").removeprefix("vae."): value for key, value in file.tensors.items()
        }
        config = VAEConfig(scaling_factor=scaling_factor or 0.18215)
        if scaling_factor is None:
            ck.say_once(
                f"{path}: scaling factor not known from the file, assuming {config.scaling_factor} (SD 1.x and 2.x)"
            )
        if "encoder.down.0.block.0.conv1.weight" in tensors:
            tensors = names.vae_from_ldm(tensors, config)
    tensors = {key: value for key, value in tensors.items() if not key.startswith(("loss.", "model_ema."))}
    vae = fill("vae", config, names.vae_spelling(tensors), path, device, dtype)
    assert isinstance(vae, VAE)
    return vae


def load_image_encoder(path: str | Path, device=None, dtype=None) -> CLIPVision:
    """A CLIP vision tower with its projection, for IP-Adapters and rewards: from a folder with config.json, or a file alone.

    The folder may be that of a complete CLIP (openai/clip-vit-large-patch14), whose text tower is then left out. A file alone
    has the released sizes of the tower of its width: ViT-L/14, ViT-H/14 or bigG/14. CheckpointError as `load_parts`.
    """
    device, dtype = choose(device, dtype)
    path = Path(path)
    if path.is_dir():
        where = path / "config.json"
        values = ck.configs.read_json(where)
        config = ck.configs.vision_config(ck.configs.vision_values(values), where)
        found = ck.read_weights(path, None, "image_encoder")
    else:
        found = files.read(path).tensors
        embedding = found.get("vision_model.embeddings.class_embedding")
        towers = {tower.width: tower for tower in (CLIP_L_VISION, CLIP_H_VISION, CLIP_BIGG_VISION)}
        if embedding is None or embedding.numel() not in towers:
            what = detect.kind_of(found).what if embedding is None else f"a vision tower of width {embedding.numel()}"
            raise CheckpointError(
                f"{path}: is {what}, expected a CLIP vision tower of width {', '.join(map(str, towers))}"
            )
        config = towers[embedding.numel()]
    kept = {
        name: tensor
        for name, tensor in found.items()
        if not name.startswith(("text_model.", "text_projection.")) and not detect.UNUSED.search(name)
    }
    encoder = fill("image_encoder", config, kept, path, device, dtype)
    assert isinstance(encoder, CLIPVision)
    return encoder


def read_file(path: str | Path) -> dict[str, Tensor]:
    """All tensors of one weight file by name, mapped; for adapters and tools. CheckpointError when it is none."""
    return files.read(path).tensors


# ---------------------------------------------------------------- where and in what


def choose(device, dtype) -> tuple[torch.device, torch.dtype]:
    try:
        device = torch.device(device) if device is not None else default_device()
    except RuntimeError:
        raise ConfigError(f"device {device!r}: expected cpu, cuda, cuda:N or mps") from None
    if (
        device.type == "cuda"
        and not torch.cuda.is_available()
        or device.type == "mps"
        and not torch.backends.mps.is_available()
    ):
        raise ConfigError(f"device {device}: not there on this machine; leave it out, or say cpu")
    if isinstance(dtype, str):
        table = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
        table |= {str(value).removeprefix("torch."): value for value in table.values()}
        if dtype not in table:
            raise ConfigError(f"dtype {dtype!r}: expected one of {', '.join(table)}")
        dtype = table[dtype]
    if dtype not in (None, torch.float32, torch.float16, torch.bfloat16, torch.float64):
        raise ConfigError(f"dtype {dtype}: expected float32, float16 or bfloat16")
    return device, dtype or default_dtype(device)


def default_device() -> torch.device:
    """cuda before mps before cpu."""
    return torch.device("cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu")


def default_dtype(device: torch.device) -> torch.dtype:
    """bf16 where the hardware has it (it cannot overflow), fp16 on older GPUs and Apple's, fp32 on the CPU."""
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16
    return torch.float16 if device.type == "mps" else torch.float32


# ---------------------------------------------------------------- the parts


def build(part: str, source: ck.Checkpoint, device: torch.device, dtype: torch.dtype):
    """One part as a module; its tensors are taken out of `source`, so that what was converted can be freed."""
    return fill(part, source.configs[part], source.tensors.pop(part), source.where(part), device, dtype)


def read_tokenizer(source: ck.Checkpoint, part: str) -> Tokenizer:
    """The tokenizer of one text encoder, padding as its family was trained; it must not know more tokens than the encoder."""
    config = source.configs[part]
    name = part.replace("text_encoder", "tokenizer")
    folder = source.tokenizers.get(name)
    if source.layout == "diffusers" and folder is not None and folder.parent == source.path:
        tokenizer = Tokenizer.from_folder(folder, max_length=config.positions)
    else:
        folder = folder or (fetch.cached_tokenizer() if config.vocab == 49408 else None)
        if folder is None:
            raise CheckpointError(
                f"{source.path}: no {name} (single files hold none); put vocab.json and merges.txt beside it or give "
                f"their folder as tokenizer=; CLIP's come with: hf download {fetch.TOKENIZER_REPO} vocab.json merges.txt"
            )
        pad = "!" if source.family.startswith("sd2") or source.family == "x4" else PADS[part]
        tokenizer = Tokenizer.from_files(
            folder / "vocab.json", folder / "merges.txt", pad=pad, max_length=config.positions
        )
    if tokenizer.vocab_size > config.vocab:
        raise CheckpointError(
            f"{folder}: knows {tokenizer.vocab_size} tokens, {part} has room for {config.vocab}; it belongs to another model"
        )
    return tokenizer


__all__ = ["Parts", "Report", "inspect", "load", "load_image_encoder", "load_parts", "load_vae", "read_file"]
