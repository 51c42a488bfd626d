"""Reading TAESD, the tiny autoencoder for previews, in the layouts that go round.

    taesd = load_taesd("taesd")                          # a folder in the diffusers layout: config.json beside the weights
    taesd = load_taesd("taesd_decoder.safetensors")      # an original file; the encoder's, if it lies beside, is read with it
    taesd = load_taesd("folder/with/both/original/files")

Original files hold one half each, as layers numbered in a row: `0.weight`, `1.conv.0.weight`. In the decoder's row a clamp comes
first, which diffusers does not count, so its numbers are one higher.
"""

from pathlib import Path

import torch

from sdcore.errors import CheckpointError
from sdcore.taesd import TAESD, TAESDConfig

from . import checkpoint, configs, files
from .assemble import Tensors, fill
from .load import choose

FIXED = {
    "act_fn": "relu", "force_upcast": False, "in_channels": 3, "latent_magnitude": 3, "latent_shift": 0.5, "out_channels": 3,
    "scaling_factor": 1.0, "shift_factor": 0.0, "upsample_fn": "nearest", "upsampling_scaling_factor": 2,
}  # fmt: skip
SUFFIXES = (".safetensors", ".pth", ".pt", ".ckpt", ".bin")


def load_taesd(
    path: str | Path, device: str | torch.device | None = None, dtype: torch.dtype | str | None = None
) -> TAESD:
    """A TAESD or TAESDXL from a folder or file; `device` and `dtype` as in `load`. CheckpointError when it is anything else."""
    device, dtype = choose(device, dtype)
    path = Path(path)
    if (path / "config.json").is_file():
        config, tensors = (
            taesd_config(configs.read_json(path / "config.json"), path),
            checkpoint.read_weights(path, None),
        )
    else:
        config, tensors = read_halves(path)
    taesd = fill("taesd", config, tensors, path, device, dtype)
    assert isinstance(taesd, TAESD)
    return taesd


def taesd_config(values: dict, where: Path) -> TAESDConfig:
    """AutoencoderTiny's config.json. CheckpointError for what TAESD is not."""
    table = configs.Table(values, where / "config.json")
    if table.get("_class_name") != "AutoencoderTiny":
        raise table.wrong("_class_name", "AutoencoderTiny")
    widths: list[int] = []
    blocks: list[tuple[int, ...]] = []
    for half, usual in (("encoder", TAESDConfig.encoder_blocks), ("decoder", TAESDConfig.decoder_blocks)):
        blocks.append(table.levels(f"num_{half}_blocks", usual, 4, configs.between(1, 16)))
        widths += table.levels(f"{half}_block_out_channels", 64, 4, configs.between(1, 1024))
    if len(set(widths)) > 1:
        raise table.wrong("decoder_block_out_channels", "one width for all blocks of both halves")
    latent_channels = table.whole("latent_channels", 4, 1, 64)
    table.close(FIXED, {"block_out_channels"})  # (diffusers writes the decoder's twice)
    return TAESDConfig(widths[0], latent_channels, *blocks)


def read_halves(path: Path) -> tuple[TAESDConfig, Tensors]:
    """Original files, under our names: both halves, or the decoder alone."""
    tensors: Tensors = {}
    found = half_files(path)
    for half, file in found.items():
        for name, tensor in files.read(file).tensors.items():
            number, _, rest = name.partition(".")
            if not number.isdigit():
                raise CheckpointError(
                    f"{file}: {files.one_line(name)} is no layer of a TAESD {half}; expected 0.weight and the like"
                )
            tensors[f"{half}.layers.{int(number) - (half == 'decoder')}.{rest}"] = tensor
    return (TAESDConfig() if "encoder" in found else TAESDConfig(encoder_blocks=())), tensors


def half_files(path: Path) -> dict[str, Path]:
    """The original files at a folder, or at a file and beside it. The decoder must be there."""
    if path.is_dir():
        lying = sorted(file for file in path.iterdir() if file.suffix in SUFFIXES)
        found = {half: [file for file in lying if file.stem.endswith(f"_{half}")] for half in ("encoder", "decoder")}
        for half, those in found.items():
            if len(those) > 1:
                names = ", ".join(file.name for file in those)
                raise CheckpointError(
                    f"{path}: more than one TAESD {half} ({files.one_line(names)}); name the one to use"
                )
        halves = {half: those[0] for half, those in found.items() if those}
    else:
        stem, _, half = path.stem.rpartition("_")
        if half not in ("encoder", "decoder"):
            raise CheckpointError(
                f"{path}: expected a TAESD's folder, or a file whose name ends in _decoder or _encoder"
            )
        other = "encoder" if half == "decoder" else "decoder"
        beside = path.with_name(f"{stem}_{other}{path.suffix}")
        halves = {half: path} | ({other: beside} if beside.exists() else {})
    if "decoder" not in halves:
        raise CheckpointError(
            f"{path}: no TAESD decoder here; expected a config.json, or taesd_decoder.safetensors and the like"
        )
    return halves
