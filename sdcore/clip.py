"""CLIP: the text towers that tell the UNet what to draw, and the vision tower that later parts look at pictures with.

A tower is a transformer: embeddings, a stack of equal layers, a last norm. The text tower sees only what came before (a causal
mask) and is read in three ways: SD 1.x and 2.x take every token of the last layer, SDXL every token of the layer before it, and
SDXL also one vector for the whole prompt, the last layer at the end token. Read `Layer`, then `CLIPText`.

Source: Radford et al. 2021 (CLIP), Cherti et al. 2022 (OpenCLIP). The parameter names are those of the released files.

Legend: b batch, s tokens, d width, p width of the shared picture-and-text space.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from sdcore import ops
from sdcore.errors import ImageError

EPS = 1e-5
MEAN, DEVIATION = (
    (0.48145466, 0.4578275, 0.40821073),
    (0.26862954, 0.26130258, 0.27577711),
)  # of CLIP's pictures, by channel
MAX_RATIO = 16  # of a picture's sides: a longer strip would be enlarged to gigabytes before its middle is cut out


def quick_gelu(x: Tensor) -> Tensor:
    """OpenAI's fast stand-in for GELU, x * sigmoid(1.702 x). The OpenCLIP towers were trained with the exact one."""
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"quick_gelu": quick_gelu, "gelu": F.gelu}


@dataclass(frozen=True)
class CLIPTextConfig:
    """Sizes of a text tower. The defaults are CLIP ViT-L/14, the encoder of SD 1.x and SDXL's first."""

    width: int = 768
    layers: int = 12
    heads: int = 12
    mlp: int = 3072
    activation: str = "quick_gelu"
    positions: int = 77
    vocab: int = 49408
    projection: int = 0  # width of the text projection; 0 where the released file has none
    eos_id: int = 49407


@dataclass(frozen=True)
class CLIPVisionConfig:
    """Sizes of a vision tower. The defaults are CLIP ViT-L/14."""

    width: int = 1024
    layers: int = 24
    heads: int = 16
    mlp: int = 4096
    activation: str = "quick_gelu"
    image_size: int = 224
    patch: int = 14
    projection: int = 768


CLIP_L = CLIPTextConfig()
# OpenCLIP ViT-H has 24 layers; SD 2.x reads the last but one, so the released diffusers folder holds 23.
OPEN_CLIP_H = CLIPTextConfig(width=1024, layers=23, heads=16, mlp=4096, activation="gelu")
OPEN_CLIP_BIGG = CLIPTextConfig(width=1280, layers=32, heads=20, mlp=5120, activation="gelu", projection=1280)

CLIP_L_VISION = CLIPVisionConfig()
CLIP_H_VISION = CLIPVisionConfig(width=1280, layers=32, heads=16, mlp=5120, activation="gelu", projection=1024)
CLIP_BIGG_VISION = CLIPVisionConfig(width=1664, layers=48, heads=16, mlp=8192, activation="gelu", projection=1280)


class LayerNorm(nn.LayerNorm):
    """Layer norm that runs through the seam of `ops`."""

    def forward(self, x: Tensor) -> Tensor:
        return ops.layer_norm(x, self.weight, self.bias, self.eps)


class Attention(nn.Module):
    """Multi-head self-attention; `causal` hides from every token those that follow it."""

    def __init__(self, width: int, heads: int, causal: bool):
        super().__init__()
        self.heads, self.causal = heads, causal
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(width, width) for _ in range(3))
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        return self.out_proj(ops.attention(q, k, v, self.heads, causal=self.causal))


class MLP(nn.Module):
    """Widen, bend, narrow."""

    def __init__(self, width: int, hidden: int, activation: str):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.activation = ACTIVATIONS[activation]

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.activation(self.fc1(x)))


class Layer(nn.Module):
    """Attention, then MLP, each behind a norm and around a shortcut."""

    def __init__(self, config: CLIPTextConfig | CLIPVisionConfig, causal: bool):
        super().__init__()
        self.layer_norm1 = LayerNorm(config.width, EPS)
        self.self_attn = Attention(config.width, config.heads, causal)
        self.layer_norm2 = LayerNorm(config.width, EPS)
        self.mlp = MLP(config.width, config.mlp, config.activation)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class Encoder(nn.Module):
    """The stack of layers; gives the state before the first and after every layer."""

    def __init__(self, config: CLIPTextConfig | CLIPVisionConfig, causal: bool):
        super().__init__()
        self.layers = nn.ModuleList(Layer(config, causal) for _ in range(config.layers))

    def forward(self, x: Tensor) -> list[Tensor]:
        states = [x]
        for layer in self.layers:
            states.append(layer(states[-1]))
        return states


class TextEmbeddings(nn.Module):
    """A vector for every token plus a vector for every place.

    Token numbers beyond the table stand for the rows of `extra` [n, d]: vectors that were learned for words of somebody's own
    (sdcore/embeddings.py). They stay beside the table, which is never touched.
    """

    def __init__(self, config: CLIPTextConfig):
        super().__init__()
        self.token_embedding = nn.Embedding(config.vocab, config.width)
        self.position_embedding = nn.Embedding(config.positions, config.width)

    def forward(self, ids: Tensor, extra: Tensor | None = None) -> Tensor:
        if extra is None:
            tokens = self.token_embedding(ids)
        else:
            size = self.token_embedding.num_embeddings
            known = self.token_embedding(ids.clamp(max=size - 1))
            tokens = torch.where((ids < size)[..., None], known, extra.to(known)[(ids - size).clamp(min=0)])
        return tokens + self.position_embedding.weight[: ids.shape[1]]


class TextTower(nn.Module):
    """The part of the text model that the released files call `text_model`."""

    def __init__(self, config: CLIPTextConfig):
        super().__init__()
        self.embeddings = TextEmbeddings(config)
        self.encoder = Encoder(config, causal=True)
        self.final_layer_norm = LayerNorm(config.width, EPS)


class TextOutput(NamedTuple):
    """What a text tower says about prompts."""

    states: list[Tensor]  # before the first layer and after each, layers + 1 of [b, s, d]; SDXL reads states[-2]
    last: Tensor  # final norm of states[-1] [b, s, d]; SD 1.x and 2.x read this
    pooled: Tensor  # `last` at the first end token [b, d], or its projection [b, p] where there is one


class CLIPText(nn.Module):
    """A CLIP text encoder."""

    def __init__(self, config: CLIPTextConfig = CLIP_L):
        super().__init__()
        self.config = config
        self.text_model = TextTower(config)
        if config.projection:
            self.text_projection = nn.Linear(config.width, config.projection, bias=False)

    def forward(self, ids: Tensor, extra: Tensor | None = None) -> TextOutput:
        """Token numbers [b, s] (int64, s <= positions, each row holding an end token) -> TextOutput.

        Number vocab + i is row i of `extra` [n, d], vectors from outside. See `TextEmbeddings`.
        The end token is found by its number. (transformers takes the largest number instead where a released config says
        `eos_token_id: 2`; the two agree until a token is added behind the end token.)
        """
        tower = self.text_model
        states = tower.encoder(tower.embeddings(ids, extra))
        last = tower.final_layer_norm(states[-1])
        end = (ids == self.config.eos_id).int().argmax(dim=1)  # the first one: padding may be the same token
        pooled = last[torch.arange(len(ids), device=ids.device), end]
        if self.config.projection:
            pooled = self.text_projection(pooled)
        return TextOutput(states, last, pooled)


def bicubic(n: int, m: int) -> Tensor:
    """The matrix [m, n], fp64, that scales n pixels to m as Pillow does: in whole multiples of 2^-22, as in its arithmetic.

    Scaled down, the curve (Keys 1981, a = -1/2) is as wide as the pixels are many, so that every pixel has its share.
    """
    step = n / m
    width = max(step, 1.0)
    centres = (torch.arange(m, dtype=torch.float64) + 0.5)[:, None] * step
    pixels = torch.arange(n, dtype=torch.float64)[None]
    first, end = ((centres + side * 2 * width + 0.5).floor() for side in (-1, 1))  # what the curve reaches
    x = ((pixels - centres + 0.5) / width).abs()
    curve = torch.where(x < 1, (1.5 * x - 2.5) * x * x + 1, ((-0.5 * x + 2.5) * x - 4) * x + 2)
    curve = curve.masked_fill((x >= 2) | (pixels < first) | (pixels >= end), 0)
    return (curve / curve.sum(dim=1, keepdim=True) * 2**22).round() / 2**22


def prepare_pixels(pixels: Tensor, side: int) -> Tensor:
    """Pictures [b, 3, h, w] in 0..1 as vision towers were trained to see them: [b, 3, side, side], normalised, fp32.

    In the order of transformers' CLIPImageProcessor: rounded to 256 levels, the shorter side scaled to `side`, the middle cut
    out, CLIP's mean and deviation. Worked out on the CPU, for exactness in fp64; the result is where `pixels` are.
    ImageError where they are no pictures, not from 0 to 1, or more than 16 times as long as wide.
    """
    if pixels.ndim != 4 or pixels.shape[1] != 3 or not pixels.numel():
        raise ImageError(f"pixels: expected [pictures, 3, height, width], found {list(pixels.shape)}")
    if not 0 <= pixels.min() <= pixels.max() <= 1:
        raise ImageError("pixels: expected numbers from 0 to 1, found others (or NaN)")
    h, w = pixels.shape[-2:]
    if max(h, w) > MAX_RATIO * min(h, w):
        raise ImageError(f"pixels: {w}x{h} is more than {MAX_RATIO} times as long as wide; cut it first")
    height, width = side * h // min(h, w), side * w // min(h, w)
    levels = (pixels.detach().cpu().double() * 255).round()
    levels = (levels @ bicubic(w, width).T + 0.5).floor().clamp(0, 255)  # whole levels between the two, as in Pillow
    levels = (bicubic(h, height) @ levels + 0.5).floor().clamp(0, 255)
    top, left = (height - side) // 2, (width - side) // 2
    small = levels[:, :, top : top + side, left : left + side].to(pixels.device, torch.float32) / 255
    mean, deviation = (small.new_tensor(numbers)[:, None, None] for numbers in (MEAN, DEVIATION))
    return (small - mean) / deviation


class VisionEmbeddings(nn.Module):
    """The picture cut in patches, each mapped to a vector, behind one vector that stands for the whole."""

    def __init__(self, config: CLIPVisionConfig):
        super().__init__()
        self.class_embedding = nn.Parameter(torch.zeros(config.width))
        self.patch_embedding = nn.Conv2d(3, config.width, config.patch, stride=config.patch, bias=False)
        self.position_embedding = nn.Embedding((config.image_size // config.patch) ** 2 + 1, config.width)

    def forward(self, pixels: Tensor) -> Tensor:
        patches = rearrange(self.patch_embedding(pixels), "b d h w -> b (h w) d")
        whole = self.class_embedding.expand(len(pixels), 1, -1)
        return torch.cat([whole, patches], dim=1) + self.position_embedding.weight


class VisionTower(nn.Module):
    """The part of the vision model that the released files call `vision_model` (and `pre_layrnorm`, misspelt for ever)."""

    def __init__(self, config: CLIPVisionConfig):
        super().__init__()
        self.embeddings = VisionEmbeddings(config)
        self.pre_layrnorm = LayerNorm(config.width, EPS)
        self.encoder = Encoder(config, causal=False)
        self.post_layernorm = LayerNorm(config.width, EPS)


class VisionOutput(NamedTuple):
    """What a vision tower says about pictures."""

    states: list[Tensor]  # layers + 1 of [b, 1 + patches, d]
    pooled: Tensor  # final norm of the whole-picture token [b, d]
    embedding: Tensor  # its projection into the space shared with text [b, p]


class CLIPVision(nn.Module):
    """A CLIP picture encoder."""

    def __init__(self, config: CLIPVisionConfig = CLIP_L_VISION):
        super().__init__()
        self.config = config
        self.vision_model = VisionTower(config)
        self.visual_projection = nn.Linear(config.width, config.projection, bias=False)

    def forward(self, pixels: Tensor) -> VisionOutput:
        """Pixels [b, 3, image_size, image_size], normalised with CLIP's mean and deviation -> VisionOutput."""
        tower = self.vision_model
        states = tower.encoder(tower.pre_layrnorm(tower.embeddings(pixels)))
        pooled = tower.post_layernorm(states[-1][:, 0])
        return VisionOutput(states, pooled, self.visual_projection(pooled))

    def see(self, pixels: Tensor) -> VisionOutput:
        """The same of pictures of any size [b, 3, h, w] in 0..1; see `prepare_pixels`, also for the errors."""
        small = prepare_pixels(pixels, self.config.image_size)
        return self(small.to(self.visual_projection.weight))


def variation_context(encoder: CLIPVision, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """What an image-variations UNet is told in the place of a text, and its negative: two [b, 1, p].

    Its context is the picture's vector in the space shared with text; the negative is zeros. pixels [b, 3, h, w] in 0..1.
    Source: the released sd-image-variations-diffusers, an SD 1.4 whose UNet was trained on so.
    """
    context = encoder.see(pixels).embedding[:, None]
    return context, torch.zeros_like(context)
