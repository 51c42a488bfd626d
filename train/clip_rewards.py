"""Rewards of a CLIP that looks at the picture: how it likes it, and how well it fits the prompt. All have gradients.

    Aesthetic   score = head(e / |e|)           e: what CLIP ViT-L/14 sees; head: five linear layers, nothing between them
    Alignment   cosine of picture and prompt    times CLIP's logit scale for PickScore; HPSv2 is the cosine alone

The numbers are those of pictures prepared as CLIP was trained to see them: rounded to 256 levels, scaled by Pillow's bicubic in
two rounded passes (`sdcore.clip.prepare_pixels`). Rounding has no gradient, so the gradient is that of the same scaling
unrounded: `prepared` is the former in value, the latter in slope.

Source: the LAION aesthetic predictor (improved-aesthetic-predictor, sac+logos+ava1-l14-linearMSE; its dropouts do nothing once it
is trained); Radford et al. 2021; Kirstain et al. 2023 (PickScore); Wu et al. 2023 (HPSv2).
Legend: n pictures, h w their size, p width of CLIP's shared space.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from sdcore.weights import files
from sdcore.weights.assemble import check_names, check_values
from sdcore.weights.clips import CLIP, load_clip, load_open_clip
from sdcore.weights.load import load_image_encoder
from torch import Tensor, nn

from sdcore.clip import DEVIATION, MEAN, bicubic, prepare_pixels
from sdcore.errors import CheckpointError

from .caches import fingerprint
from .rewards import Reward

WIDTHS = {"0": (768, 1024), "2": (1024, 128), "4": (128, 64), "6": (64, 16), "7": (16, 1)}  # 1, 3, 5 were dropouts


class Head(nn.Module):
    """The predictor's layers, named as in the released file: layers.0.weight ..."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleDict({name: nn.Linear(*sizes) for name, sizes in WIDTHS.items()})

    def forward(self, x: Tensor) -> Tensor:
        """[n, 768] -> [n]."""
        for layer in self.layers.values():
            x = layer(x)
        return x[:, 0]


def load_head(path: Path, device: str | torch.device) -> Head:
    """The head in a released .pth or a .safetensors, in fp32. CheckpointError."""
    tensors, head = files.read(path).tensors, Head()
    check_names("aesthetic predictor", head.state_dict(), tensors, path)
    check_values("aesthetic predictor", tensors, path)
    head.load_state_dict(tensors)
    return head.float().to(device).eval().requires_grad_(False)


class Aesthetic(Reward):
    """The LAION aesthetic predictor: about 1 to 10. `clip` is a folder with CLIP ViT-L/14, `head` the predictor's file."""

    differentiable = True

    def __init__(self, clip: Path, head: Path, device: str | torch.device):
        self.name = "aesthetic"
        self.vision = load_image_encoder(clip, device, torch.float32)
        self.head = load_head(head, device)
        if self.vision.config.projection != WIDTHS["0"][0]:
            raise CheckpointError(
                f"{clip}: sees pictures as {self.vision.config.projection} numbers, the aesthetic predictor reads those of "
                f"CLIP ViT-L/14 ({WIDTHS['0'][0]})"
            )

    def __call__(self, pictures: Tensor, prompts: list[str]) -> Tensor:
        seen = self.vision(prepared(pictures, self.vision.config.image_size).to(next(self.head.parameters()).device))
        return self.head(F.normalize(seen.embedding, dim=-1))

    def identity(self) -> object:
        return [self.name, fingerprint(self.vision, self.head)]


class Alignment(Reward):
    """How near picture and prompt lie in CLIP's shared space: their cosine, times its logit scale where `scaled`."""

    differentiable = True

    def __init__(self, name: str, clip: CLIP, scaled: bool):
        self.name, self.clip, self.factor = name, clip, clip.scale if scaled else 1.0

    def __call__(self, pictures: Tensor, prompts: list[str]) -> Tensor:
        clip = self.clip
        device = next(clip.vision.parameters()).device
        with torch.no_grad():
            said = clip.text(clip.tokenizer(prompts).to(device)).pooled
        seen = clip.vision(prepared(pictures, clip.vision.config.image_size).to(device)).embedding
        return self.factor * F.cosine_similarity(seen, said, dim=-1)

    def identity(self) -> object:
        return [self.name, fingerprint(self.clip.vision, self.clip.text)]


def alignment(name: str, folder: Path, device: str | torch.device) -> Alignment:
    """`clip`, the cosine, or `pick`, scaled, of a CLIP in transformers' layout. CheckpointError."""
    return Alignment(name, load_clip(folder, device), scaled=name == "pick")


def open_alignment(file: Path, tokenizer: Path, device: str | torch.device) -> Alignment:
    """`hps`: the cosine of a ViT-H/14 in OpenCLIP's layout. CheckpointError."""
    return Alignment("hps", load_open_clip(file, tokenizer, device), scaled=False)


def prepared(pictures: Tensor, side: int) -> Tensor:
    """Pictures [n, 3, h, w] in 0..1 as CLIP sees them [n, 3, side, side]: exactly `prepare_pixels`, with a gradient.

    ImageError as of `prepare_pixels`; what lies outside 0..1 is an error there too, so clamp before.
    """
    exact = prepare_pixels(pictures.float(), side)
    if not pictures.requires_grad:
        return exact
    h, w = pictures.shape[-2:]
    height, width = side * h // min(h, w), side * w // min(h, w)
    top, left = (height - side) // 2, (width - side) // 2
    down = bicubic(h, height)[top : top + side].to(pictures)
    across = bicubic(w, width)[left : left + side].to(pictures)
    mean, deviation = (pictures.new_tensor(numbers)[:, None, None] for numbers in (MEAN, DEVIATION))
    smooth = (down @ pictures @ across.T - mean) / deviation
    return exact + (smooth - smooth.detach())
