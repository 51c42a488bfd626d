"""IP-Adapter: a picture as a prompt.

A CLIP vision tower looks at the picture; a projection turns what it saw into a few tokens as wide as the text's; every attention
to the text has a second pair of key and value layers, for these tokens, and adds what it finds in them to what it finds in the
text (`unet.Attention.forward`). The UNet's own weights stay as they are, so an adapter is nothing but the projection and these
layers: `IPAdapter`. `ImagePrompt` is what a user hands in; its `keys_values` is all that a UNet needs of it, once a picture:

    adapter = load_ip_adapter("ip-adapter_sd15.safetensors", pipe, image_encoder="models/image_encoder")
    pipe("on a beach", image_prompts=[ImagePrompt(adapter, pixels, scale=0.6)])

There are three kinds. The base one is shown the one vector that stands for the whole picture; Plus is shown every patch, of which
16 learned questions take what they need; full face is shown every patch and passes each on. Under guidance the negative branch
sees nothing: see `IPAdapter.unseen`.

Source: Ye et al. 2023, section 3.2, equation 5; Alayrac et al. 2022, section 3.1 (the resampler of Plus). The parameter names are
those of the released files: one loads with `strict=True`.

Legend: b rows, m pictures of one prompt, e width of what the vision tower gives, p its tokens, t tokens of a picture, d width of
the text, h w latent height and width, s = h * w at some level.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from sdcore import ops
from sdcore.clip import CLIPVision, LayerNorm
from sdcore.errors import AdapterError, ConfigError, ImageError
from sdcore.unet import SD15, SDXL, KeysValues, UNetConfig

HEAD = 64  # width of a head of the resampler
KINDS = {"base": "", "plus": " Plus", "full": " (full face)"}


@dataclass(frozen=True)
class IPAdapterConfig:
    """Sizes of an IP-Adapter. The defaults are the base one of SD 1.x."""

    kind: str = "base"  # one of KINDS: what it is shown, and what it makes of it
    embed: int = 1024  # width of what it is shown: base 1024 (ViT-H) or 1280 (bigG), the others 1280 or 1664
    tokens: int = 4  # what a picture becomes; full face has as many as it is shown
    width: int = 0  # of the resampler
    layers: int = 0
    heads: int = 0
    unet: UNetConfig = SD15


IP_SD15 = IPAdapterConfig()
IP_PLUS_SD15 = IPAdapterConfig("plus", embed=1280, tokens=16, width=768, layers=4, heads=12)
IP_FULL_FACE_SD15 = IPAdapterConfig("full", embed=1280, tokens=257)
IP_SDXL = IPAdapterConfig(embed=1280, unet=SDXL)  # shown by bigG
IP_SDXL_H = IPAdapterConfig(unet=SDXL)
IP_PLUS_SDXL_H = IPAdapterConfig("plus", embed=1280, tokens=16, width=1280, layers=4, heads=20, unet=SDXL)


@dataclass(frozen=True)
class Place:
    """One of a UNet's attentions to the text."""

    name: str  # as in the UNet
    level: int  # 0 is the full latent, every further one half of that
    width: int
    number: int  # as in the released files, which count all attentions, those to the picture itself too


def places(config: UNetConfig) -> list[Place]:
    """A UNet's attentions to the text, in the order in which they run: down, middle, up.

    The files number them down, up, middle: the order in which diffusers' UNet happened to register its blocks.
    """
    last = len(config.channels) - 1
    down = [(f"down_blocks.{i}", i, config.layers, config.depths[i]) for i in range(last + 1)]
    middle = [("mid_block", last, 1, config.mid_depth)]
    up = [(f"up_blocks.{last - i}", i, config.layers + 1, config.depths[i]) for i in reversed(range(last + 1))]

    def names(blocks: list[tuple[str, int, int, int]]) -> list[tuple[str, int]]:
        return [
            (f"{block}.attentions.{i}.transformer_blocks.{j}.attn2", level)
            for block, level, attentions, depth in blocks
            for i in range(attentions)
            for j in range(depth)
        ]

    numbers = {name: 2 * n + 1 for n, (name, _) in enumerate(names(down + up + middle))}  # even ones: self-attention
    return [Place(name, level, config.channels[level], numbers[name]) for name, level in names(down + middle + up)]


# ------------------------------------------------------------------------------------------------ projections


class Projection(nn.Module):
    """The base kind: the picture's one vector becomes a few tokens."""

    def __init__(self, config: IPAdapterConfig):
        super().__init__()
        self.tokens, d = config.tokens, config.unet.context_dim
        self.proj = nn.Linear(config.embed, self.tokens * d)
        self.norm = LayerNorm(d)

    def forward(self, embeds: Tensor) -> Tensor:
        return self.norm(rearrange(self.proj(embeds), "b (t d) -> b t d", t=self.tokens))


class FullFace(nn.Module):
    """Every patch becomes a token of its own."""

    def __init__(self, config: IPAdapterConfig):
        super().__init__()
        e, d = config.embed, config.unet.context_dim
        self.proj = nn.Sequential(nn.Linear(e, e), nn.GELU(), nn.Linear(e, d), LayerNorm(d))

    def forward(self, embeds: Tensor) -> Tensor:
        return self.proj(embeds)


class ResamplerAttention(nn.Module):
    """Questions look at the patches and at each other."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = LayerNorm(width), LayerNorm(width)
        self.to_q = nn.Linear(width, heads * HEAD, bias=False)
        self.to_kv = nn.Linear(width, 2 * heads * HEAD, bias=False)
        self.to_out = nn.Linear(heads * HEAD, width, bias=False)

    def forward(self, x: Tensor, patches: Tensor) -> Tensor:
        x = self.norm2(x)
        context = torch.cat([self.norm1(patches), x], dim=1)
        k, v = (F.linear(context, weight) for weight in self.to_kv.weight.chunk(2))
        return self.to_out(ops.attention(self.to_q(x), k, v, self.heads))


class ResamplerLayer(nn.ModuleList):
    """Questions look, then think; both around a shortcut."""

    def __init__(self, width: int, heads: int):
        widen, narrow = nn.Linear(width, 4 * width, bias=False), nn.Linear(4 * width, width, bias=False)
        think = nn.Sequential(LayerNorm(width), widen, nn.GELU(), narrow)
        super().__init__([ResamplerAttention(width, heads), think])

    def forward(self, x: Tensor, patches: Tensor) -> Tensor:
        look, think = self
        x = look(x, patches) + x
        return think(x) + x


class Resampler(nn.Module):
    """The Plus kind: learned questions to the patches; the answers are the tokens."""

    def __init__(self, config: IPAdapterConfig):
        super().__init__()
        width, d = config.width, config.unet.context_dim
        self.latents = nn.Parameter(torch.randn(1, config.tokens, width) / math.sqrt(width))
        self.proj_in = nn.Linear(config.embed, width)
        self.layers = nn.ModuleList(ResamplerLayer(width, config.heads) for _ in range(config.layers))
        self.proj_out = nn.Linear(width, d)
        self.norm_out = LayerNorm(d)

    def forward(self, embeds: Tensor) -> Tensor:
        x, patches = self.latents.repeat(len(embeds), 1, 1), self.proj_in(embeds)
        for layer in self.layers:
            x = layer(x, patches)
        return self.norm_out(self.proj_out(x))


PROJECTIONS: dict[str, type[nn.Module]] = {"base": Projection, "plus": Resampler, "full": FullFace}


# ------------------------------------------------------------------------------------------------ the adapter


class PictureLayers(nn.Module):
    """Keys and values of a picture's tokens for one attention."""

    def __init__(self, context_dim: int, width: int):
        super().__init__()
        self.to_k_ip = nn.Linear(context_dim, width, bias=False)
        self.to_v_ip = nn.Linear(context_dim, width, bias=False)


class IPAdapter(nn.Module):
    """A projection and, for each of a UNet's attentions to the text, layers for the picture's keys and values.

    `image_encoder` is the vision tower that looks for it. Several adapters may share one; without it (None), prompts bring what
    it would have said.
    """

    def __init__(self, config: IPAdapterConfig = IP_SD15):
        super().__init__()
        self.config = config
        self.image_encoder: CLIPVision | None = None
        self.places = places(config.unet)
        self.image_proj = PROJECTIONS[config.kind](config)
        by_number = sorted(self.places, key=lambda place: place.number)
        self.ip_adapter = nn.ModuleDict(
            {str(place.number): PictureLayers(config.unet.context_dim, place.width) for place in by_number}
        )

    def embeds(self, pixels: Tensor) -> Tensor:
        """What the adapter is shown of pictures [m, 3, H, W] in 0..1: base [m, e], the others [m, p, e].

        The vector in the space shared with text, or all tokens of the layer before the last. AdapterError without an encoder.
        """
        seen = self._encoder().see(pixels)
        return seen.embedding if self.config.kind == "base" else seen.states[-2]

    def unseen(self, like: Tensor) -> Tensor:
        """What it is shown where no picture is to be seen, in the shape of embeds `like`: the negative branch of guidance.

        Base: zeros. The others: what the encoder says of a picture whose normalised pixels are all zero (CLIP's mean grey); for
        this they need the encoder even where embeds are given (AdapterError). As diffusers does.
        """
        if self.config.kind == "base":
            return torch.zeros_like(like)
        encoder = self._encoder()
        side, weight = encoder.config.image_size, encoder.visual_projection.weight
        return encoder(weight.new_zeros(1, 3, side, side)).states[-2].expand_as(like)

    def tokens(self, embeds: Tensor) -> Tensor:
        """What stands for pictures beside a text: embeds [m, e] or [m, p, e] -> tokens [m, t, d]."""
        return self.image_proj(embeds.to(next(self.image_proj.parameters())))

    def keys_values(self, tokens: Tensor) -> list[KeysValues]:
        """Keys and values of tokens [b, t, d] for each attention to the text, in the order of `unet.keys_values`."""
        layers = [self.ip_adapter[str(place.number)] for place in self.places]
        return [(layer.to_k_ip(tokens), layer.to_v_ip(tokens)) for layer in layers]  # type: ignore[operator]

    def check(self, unet: UNetConfig) -> None:
        """AdapterError where the adapter was not made for a UNet of these sizes."""
        mine = self.config.unet
        if unet.context_dim != mine.context_dim or any(unet.cross_only) or places(unet) != self.places:
            raise AdapterError(
                f"this IP-Adapter{KINDS[self.config.kind]} was made for another UNet: text width {mine.context_dim} and "
                f"{len(self.places)} attentions to it; this one has {unet.context_dim} and {len(places(unet))}"
            )

    def _encoder(self) -> CLIPVision:
        if self.image_encoder is None:
            raise AdapterError("this IP-Adapter has no image encoder to look with; load it with image_encoder=")
        return self.image_encoder


@dataclass(frozen=True, eq=False)
class ImagePrompt:
    """A picture (or several, seen together) that what is drawn shall resemble.

    image   pixels [m, 3, H, W] in 0..1; or what the adapter is shown of them, worked out before (`IPAdapter.embeds`)
    scale   how much it counts beside the text; 0 is not at all. Or numbers by part of the UNet, named as its modules are, the
            longest name deciding and parts not named having 0: {"up_blocks.0.attentions.1": 1.0} is style alone on SDXL,
            with {"down_blocks.2.attentions.1": 1.0} layout too (Wang et al. 2024, InstantStyle)
    mask    where it counts [1, 1, H, W] in 0..1, of the proportions of what is drawn; None is everywhere

    Raises ImageError, ConfigError where one of them is not so.
    """

    adapter: IPAdapter
    image: Tensor
    scale: float | Mapping[str, float] = 1.0
    mask: Tensor | None = None

    def __post_init__(self):
        config, found = self.adapter.config, list(self.image.shape)
        ndim = 2 if config.kind == "base" else 3
        if not self.image.numel() or not (
            self.image.ndim == 4 or self.image.ndim == ndim and found[-1] == config.embed
        ):
            shown = f"[pictures, {config.embed}]" if ndim == 2 else f"[pictures, tokens, {config.embed}]"
            raise ImageError(f"image: expected pixels [pictures, 3, height, width] or embeds {shown}, found {found}")
        for name, number in self._scales().items():
            if not math.isfinite(number):
                raise ConfigError(f"scale: expected numbers, found {number} for {name or 'all parts'}")
            if not any(within(place.name, name) for place in self.adapter.places):
                example = self.adapter.places[0].name
                raise ConfigError(f"scale: {name} is no part of this UNet that attends to text; one is {example}")
        if self.mask is not None:
            if self.mask.ndim != 4 or self.mask.shape[:2] != (1, 1) or not self.mask.numel():
                raise ImageError(f"mask: expected [1, 1, height, width], found {list(self.mask.shape)}")
            if not 0 <= self.mask.min() <= self.mask.max() <= 1:
                raise ImageError("mask: expected numbers from 0 to 1, found others (or NaN)")
            if not self.mask.any():
                raise ImageError("mask: all black, so the picture would count nowhere; white is where it counts")

    @torch.no_grad()
    def keys_values(self, rows: int, pictures: int, latent: tuple[int, int] | None = None) -> list[KeysValues]:
        """What goes behind the text's keys and values: for each attention (keys, values, weight), or nothing where it is 0.

        Of `rows` rows the first `pictures` see nothing where there are more than `pictures`: they are the negative branch.
        Keys and values [rows, m t, d]; the weight is [1, 1, 1], or with a mask [1, s, 1] for a `latent` of height, width, which
        must then be given. ConfigError without it, ImageError where the mask has other proportions, AdapterError as `embeds`.
        Source of the mask's scaling (bicubic, without averaging): diffusers' IPAdapterMaskProcessor.
        """
        adapter, silent = self.adapter, pictures if rows > pictures else 0
        embeds = adapter.embeds(self.image) if self.image.ndim == 4 else self.image
        tokens = adapter.tokens(embeds).flatten(0, 1).expand(rows - silent, -1, -1)
        if silent:
            nothing = adapter.tokens(adapter.unseen(embeds)).flatten(0, 1).expand(silent, -1, -1)
            tokens = torch.cat([nothing, tokens])
        weights = [self._weight(place, latent, tokens) for place in adapter.places]
        entries = zip(adapter.keys_values(tokens), weights, strict=True)
        return [() if weight is None else (k, v, weight) for (k, v), weight in entries]

    def _scales(self) -> Mapping[str, float]:
        """Scales by part of the UNet; the empty name is all of it."""
        return self.scale if isinstance(self.scale, Mapping) else {"": self.scale}

    def _weight(self, place: Place, latent: tuple[int, int] | None, like: Tensor) -> Tensor | None:
        scales = self._scales()
        name = max((name for name in scales if within(place.name, name)), key=len, default=None)
        if name is None or scales[name] == 0:
            return None
        weight = like.new_full((1, 1, 1), scales[name])
        if self.mask is None:
            return weight
        if latent is None:
            raise ConfigError("latent: a mask is scaled to the latent; give its height and width")
        if self.mask.shape[-2] * latent[1] != self.mask.shape[-1] * latent[0]:
            raise ImageError(
                f"mask: {self.mask.shape[-1]}x{self.mask.shape[-2]} has not the proportions of what is drawn "
                f"({latent[1]}x{latent[0]}); scale it to that picture's size"
            )
        h, w = (-(-side // 2**place.level) for side in latent)  # halving rounds up
        mask = F.interpolate(self.mask.float(), size=(h, w), mode="bicubic").to(like)
        return weight * rearrange(mask, "1 1 h w -> 1 (h w) 1")


def within(name: str, part: str) -> bool:
    """Whether a module is part of another one, by their names; every module is within the empty name."""
    return not part or name == part or name.startswith(f"{part}.")
