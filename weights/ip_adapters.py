"""Reading IP-Adapters in their released layout (h94/IP-Adapter): one file, and the folder of the vision tower that looks for it.

    adapter = load_ip_adapter("models/ip-adapter_sd15.safetensors", pipe, image_encoder="models/image_encoder")

| file | kind | image encoder |
|---|---|---|
| `models/ip-adapter_sd15`, `_light`; `sdxl_models/ip-adapter_sdxl_vit-h` | base | `models/image_encoder` (ViT-H/14) |
| `models/ip-adapter-plus_sd15`, `-plus-face_sd15` | Plus | ViT-H/14 |
| `sdxl_models/ip-adapter-plus_sdxl_vit-h`, `-plus-face_sdxl_vit-h` | Plus | ViT-H/14 |
| `models/ip-adapter-full-face_sd15` | full face | ViT-H/14 |
| `sdxl_models/ip-adapter_sdxl`; `models/ip-adapter_sd15_vit-G` | base | `sdxl_models/image_encoder` (ViT-bigG/14) |

`.safetensors` has the names `image_proj.*` and `ip_adapter.N.*`, `.bin` two tables of these names, which reads as the same. The
numbers N are explained in `sdcore.ip_adapter.places`. FaceID files look at a face recogniser's numbers and are refused by name.
"""

from pathlib import Path

from sdcore.clip import CLIPVision
from sdcore.errors import AdapterError
from sdcore.ip_adapter import IPAdapter, places
from sdcore.pipeline import Pipeline

from . import detect, files
from .assemble import fill
from .load import load_image_encoder


def load_ip_adapter(
    path: str | Path, pipe: Pipeline, image_encoder: str | Path | CLIPVision | None = None
) -> IPAdapter:
    """The IP-Adapter in a file, for the UNet of `pipe`, in its dtype and on its device.

    `image_encoder`: the released folder, a file, or a tower that is loaded already (adapters may share one); None for prompts
    that bring their embeds. CheckpointError where a file is damaged; AdapterError where it is no IP-Adapter, one of a kind that
    is not supported, or where UNet, adapter and encoder do not fit each other. `pipe` stays as it is.
    """
    path, weight = Path(path), next(pipe.unet.parameters())
    tensors = files.read(path).tensors
    kind = detect.kind_of(tensors)
    if kind.name != "ip-adapter":
        raise AdapterError(f"{path}: is {kind.what}, expected an IP-Adapter; {kind.advice}")
    unet = pipe.unet.config
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items() if name.endswith(".to_k_ip.weight")}
    try:
        config = detect.ip_adapter_from_shapes(tensors, unet)
    except AdapterError as error:
        raise AdapterError(f"{path}: {error}") from None
    wanted = {f"ip_adapter.{place.number}.to_k_ip.weight": (place.width, unet.context_dim) for place in places(unet)}
    if any(unet.cross_only) or shapes != wanted:
        raise AdapterError(
            f"{path}: is {detect.ip_adapter_title(tensors)} (layers for {len(shapes)} attentions); this {pipe.family} model has "
            f"{len(wanted)} that look at a text of width {unet.context_dim}; take one that was made for it"
        )
    adapter = fill("ip_adapter", config, tensors, path, weight.device, weight.dtype)
    assert isinstance(adapter, IPAdapter)
    if image_encoder is not None:
        if not isinstance(image_encoder, CLIPVision):
            image_encoder = load_image_encoder(image_encoder, weight.device, weight.dtype)
        tower = image_encoder.config
        given = tower.projection if config.kind == "base" else tower.width
        if given != config.embed:
            raise AdapterError(
                f"{path}: sees pictures as {config.embed} numbers{made_by(config.embed)}, this image encoder gives {given}"
                f"{made_by(given)}; take the encoder that the adapter was trained with"
            )
        adapter.image_encoder = image_encoder
    return adapter


def made_by(width: int) -> str:
    return {768: " (ViT-L/14)", 1024: " (ViT-H/14)", 1664: " (ViT-bigG/14)"}.get(width, "")


__all__ = ["load_image_encoder", "load_ip_adapter"]
