"""A whole CLIP, both towers: a folder as transformers writes it, or a file as OpenCLIP does.

    clip = load_clip("clip-vit-large-patch14")          # config.json, model.safetensors, vocab.json, merges.txt; PickScore's
    clip = load_open_clip("HPS_v2_compressed.pt", "tokenizer")  # ViT-H/14; OpenCLIP's files hold no tokenizer

The names of the vision tower in OpenCLIP's files are those of its text tower (weights/names.py) behind `visual.`, but for the few
in `VISION`.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from sdcore.clip import CLIP_H_VISION, CLIPText, CLIPTextConfig, CLIPVision, CLIPVisionConfig
from sdcore.errors import CheckpointError
from sdcore.tokenizer import Tokenizer

from . import checkpoint as ck
from . import detect, files, names
from .assemble import fill
from .names import Tensors

TEXT = ("text_model.", "text_projection.")
VISION = {  # OpenCLIP's modules and parameters -> ours
    "class_embedding": "vision_model.embeddings.class_embedding",
    "conv1": "vision_model.embeddings.patch_embedding",
    "ln_pre": "vision_model.pre_layrnorm",
    "ln_post": "vision_model.post_layernorm",
}
# ViT-H/14 whole: SD 2.x leaves out the last layer of its text tower and the projection.
CLIP_H = CLIPTextConfig(width=1024, layers=24, heads=16, mlp=4096, activation="gelu", projection=1024)


@dataclass
class CLIP:
    """Both towers, what spells the texts, and the released scale of their cosines (a factor, about 100)."""

    text: CLIPText
    vision: CLIPVision
    tokenizer: Tokenizer
    scale: float


def load_clip(folder: str | Path, device: str | torch.device = "cpu") -> CLIP:
    """The CLIP of a folder with config.json, weights and tokenizer, in fp32. CheckpointError: what is missing or wrong."""
    folder = Path(folder)
    where = folder / "config.json"
    values = ck.configs.read_json(where)
    if not isinstance(values.get("text_config"), dict) or not isinstance(values.get("vision_config"), dict):
        raise CheckpointError(f"{where}: has no text_config and vision_config; expected a whole CLIP (CLIPModel)")
    tokenizer = Tokenizer.from_folder(folder)
    tensors = ck.read_weights(folder, None, "image_encoder")
    text = ck.projected(ck.configs.text_config(values["text_config"], where), tensors, where)
    return assemble(
        tensors, text, ck.configs.vision_config(ck.configs.vision_values(values), where), tokenizer, folder, device
    )


def load_open_clip(file: str | Path, tokenizer: str | Path, device: str | torch.device = "cpu") -> CLIP:
    """The ViT-H/14 of a file of OpenCLIP's, in fp32; `tokenizer` is a folder with CLIP's. CheckpointError."""
    tensors = from_open(files.read(file).tensors, CLIP_H, CLIP_H_VISION)
    return assemble(tensors, CLIP_H, CLIP_H_VISION, Tokenizer.from_folder(tokenizer, 77), Path(file), device)


def from_open(tensors: Tensors, text: CLIPTextConfig, vision: CLIPVisionConfig) -> Tensors:
    """OpenCLIP's names -> those of transformers' CLIPModel, for both towers. A name that is unknown is passed through."""
    seen = {name.removeprefix("visual."): value for name, value in tensors.items() if name.startswith("visual.")}
    read = {name: value for name, value in tensors.items() if not name.startswith("visual.")}
    projection = {"visual_projection.weight": seen.pop("proj").T.contiguous()} if "proj" in seen else {}
    seen = names.rename(names.clip_from_open(seen, vision.layers), VISION)
    seen = {name.replace("text_model.", "vision_model.", 1): value for name, value in seen.items()}
    return names.join(names.join(names.clip_from_open(read, text.layers), seen), projection)


def assemble(
    tensors: Tensors,
    text: CLIPTextConfig,
    vision: CLIPVisionConfig,
    tokenizer: Tokenizer,
    where: Path,
    device: str | torch.device,
) -> CLIP:
    """The towers with these tensors in them. CheckpointError where one is missing, too many or of another shape."""
    scale = tensors.get("logit_scale")
    if scale is None or scale.numel() != 1 or text.projection != vision.projection:
        raise CheckpointError(
            f"{where}: expected a logit_scale, and one width of both projections; is it a whole CLIP?"
        )
    if tokenizer.vocab_size > text.vocab:
        raise CheckpointError(
            f"{where}: its tokenizer knows {tokenizer.vocab_size} tokens, the text tower {text.vocab}"
        )
    kept = {name: tensor for name, tensor in tensors.items() if not detect.UNUSED.search(name)}
    read: dict[str, Tensor] = {name: tensor for name, tensor in kept.items() if name.startswith(TEXT)}
    seen = {name: tensor for name, tensor in kept.items() if name not in read}
    place = torch.device(device)
    encoder = fill("text_encoder", text, read, where, place, torch.float32)
    eye = fill("image_encoder", vision, seen, where, place, torch.float32)
    assert isinstance(encoder, CLIPText) and isinstance(eye, CLIPVision)
    return CLIP(encoder, eye, tokenizer, float(scale.float().exp()))
