"""What is worked out from pictures and captions once, kept on disk under the hash of everything it depends on.

A latent's key is the hash of the picture's bytes, the window and flip it is seen through and the autoencoder's weights; a
text's, of its words and the encoders' weights. So nothing is paired by its position: a latent and a text meet only because one
visit (train/data.py) names both, and another order, another folder or another model cannot mix them up. A file says what it was
made from and carries the hash of its tensors; what does not agree is made again, with a warning. Runs may share a folder, at
once too.
"""

import hashlib
import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path

import torch
from sdcore.weights import files
from torch import Tensor, nn

from sdcore.errors import CheckpointError, TrainingError
from sdcore.pipeline import check_finite
from sdcore.vae import VAE

from .data import Visit, open_visit


def fingerprint(*modules: nn.Module) -> str:
    """The sha256 of every tensor of these modules: names, dtypes, shapes, bytes."""
    digest = hashlib.sha256()
    for module in modules:
        for name, tensor in module.state_dict().items():
            digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
            digest.update(_bytes(tensor))
    return digest.hexdigest()


class Kept:
    """Tables of tensors by the hash of what they were made from, a safetensors file each. `folder` None: nothing is kept."""

    def __init__(self, folder: Path | None):
        self.folder = folder

    def get(self, origin: Mapping[str, object], make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """What was made from `origin`, which must name everything it depends on; made now where it is not there yet."""
        if self.folder is None:
            return make()
        text = json.dumps(origin, sort_keys=True)
        key = hashlib.sha256(text.encode()).hexdigest()
        path = self.folder / key[:2] / f"{key}.safetensors"
        if path.exists():
            try:
                found = files.read(path)
                if found.metadata == {"origin": text, "sha256": content(found.tensors)}:
                    return {name: tensor.clone() for name, tensor in found.tensors.items()}
                fault = "its content is not what it says"
            except CheckpointError as error:
                fault = str(error).removeprefix(f"{path}: ")
            print(f"WARNING: {path}: {fault}; it is made again", file=sys.stderr)
        tensors = make()
        path.parent.mkdir(parents=True, exist_ok=True)
        files.write(path, tensors, {"origin": text, "sha256": content(tensors)})
        return tensors


class Latents:
    """Visits -> the mean and deviation of their latents, times the autoencoder's scaling factor, and their masks.

    Each picture is encoded alone, in the autoencoder's own dtype, so its latent does not depend on its company.
    """

    def __init__(self, vae: VAE, folder: Path | None):
        self.vae, self.kept, self.identity = vae, Kept(folder), fingerprint(vae)

    def __call__(self, visits: list[Visit]) -> tuple[Tensor, Tensor, Tensor | None]:
        """mean, std [b, c, h, w] fp32; mask [b, 1, H, W] in 0..1, None where no visit has one. On the CPU."""
        found = [self.one(visit) for visit in visits]
        mean, std = (torch.stack([one[name] for one in found]) for name in ("mean", "std"))
        if not any("mask" in one for one in found):
            return mean, std, None
        W, H = visits[0].view.size
        return mean, std, torch.stack([one.get("mask", torch.ones(1, H, W)) for one in found])

    def one(self, visit: Visit) -> dict[str, Tensor]:
        """mean and std [c, h, w], and mask [1, H, W] where the picture has one."""
        origin = {
            "picture": visit.item.sha256, "mask": visit.item.mask_sha256, "view": asdict(visit.view),
            "autoencoder": self.identity, "resize": "lanczos", "scale": self.vae.config.scaling_factor,
        }  # fmt: skip
        return self.kept.get(origin, lambda: self.encode(visit))

    @torch.no_grad()
    def encode(self, visit: Visit) -> dict[str, Tensor]:
        """`one`, worked out."""
        if next(self.vae.parameters()).is_meta:
            raise TrainingError(
                f"{visit.item.path}: has gone from the cache, and the autoencoder has left (--offload); resume"
            )
        pixels, mask = open_visit(visit)
        like = next(self.vae.parameters())
        with torch.autocast(like.device.type, enabled=False):
            moments = self.vae.encode(pixels[None].to(like))
        scale = self.vae.config.scaling_factor
        found = {"mean": moments.mean[0] * scale, "std": (moments.logvar[0] / 2).exp() * scale}
        for name, tensor in found.items():
            check_finite(tensor, f"the autoencoder, of {visit.item.path} ({name})")
        found = {name: tensor.float().cpu() for name, tensor in found.items()}
        return found if mask is None else found | {"mask": mask}


class Texts:
    """Captions -> what the text encoders say of them. `read` says it of one caption, in tensors without a batch."""

    def __init__(self, read: Callable[[str], dict[str, Tensor]], encoders: list[nn.Module], folder: Path | None):
        self.read, self.kept, self.identity = read, Kept(folder), fingerprint(*encoders)
        self.met: dict[str, dict[str, Tensor]] = {}  # of this run, in memory

    def __call__(self, captions: list[str]) -> dict[str, Tensor]:
        """The tensors of all captions, stacked: "context" [b, s, d] and, of XL models, "pooled" [b, p]."""
        found = [self.one(caption) for caption in captions]
        return {name: torch.stack([one[name] for one in found]) for name in found[0]}

    @torch.no_grad()
    def one(self, caption: str) -> dict[str, Tensor]:
        """The tensors of one caption, on the CPU."""
        if caption not in self.met:
            origin = {"caption": caption, "encoders": self.identity}
            self.met[caption] = self.kept.get(
                origin, lambda: {name: tensor.float().cpu() for name, tensor in self.read(caption).items()}
            )
        return self.met[caption]


def content(tensors: dict[str, Tensor]) -> str:
    """The sha256 of tensors by name: shapes and bytes."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(f"{name} {tensors[name].dtype} {list(tensors[name].shape)}".encode())
        digest.update(_bytes(tensors[name]))
    return digest.hexdigest()


def _bytes(tensor: Tensor) -> memoryview:
    return memoryview(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
