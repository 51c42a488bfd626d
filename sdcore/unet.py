"""The UNet: a noisy latent, a time and a text go in; what the noise is comes out.

This is the figure of the papers. On the way down, each level runs residual blocks (which hear the time) and transformers (which
hear the text) and keeps every result; on the way up, each residual block takes the kept result of its level beside its own
input. `UNet.step` at the end of the file is that figure; read it first, then the blocks in the order in which they appear.

What depends on the picture but not on the step is computed once a picture: the keys and values of the text (`keys_values`) and,
for known times, what the residual blocks hear of the time (`time_shifts`). `forward` is just these and `step` in a row. What
comes before the first look at the text is equal for both branches of guidance: `step` may be handed the latent once for both.

Source: Ho et al. 2020 (residual blocks, time), Rombach et al. 2022 (transformers, text), Podell et al. 2023 (SDXL). The
parameter names are those of the released files in the diffusers layout: a released folder loads with `strict=True`.

Legend: b batch, c channels, h w latent height and width at some level, s = h * w tokens, k text tokens, d width.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from sdcore import ops
from sdcore.errors import ConfigError

# What an attention to the text looks at: keys and values of the text, and behind them, for each picture prompt
# (sdcore/ip_adapter.py), its keys and values [b, m, d] and its weight, a tensor that broadcasts to [b, s, 1].
KeysValues = tuple[Tensor, ...]


@dataclass(frozen=True)
class UNetConfig:
    """Sizes of a UNet. The defaults are SD 1.x; tuples have one entry a level, from full resolution down."""

    in_channels: int = 4  # 9 for inpainting (+ mask, masked picture), 8 instruct-pix2pix, 5 depth, 7 for the upscaler
    out_channels: int = 4
    sample_size: int = 64  # side of the latents it was trained on
    channels: tuple[int, ...] = (320, 640, 1280, 1280)
    layers: int = 2  # residual blocks a level on the way down; one more on the way up
    depths: tuple[int, ...] = (1, 1, 1, 0)  # transformer layers behind each residual block; 0 means no attention here
    mid_depth: int = 1
    hollow: tuple[
        int, ...
    ] = ()  # levels of depth 0 that have transformers all the same, without layers (XL's ControlNet mid)
    heads: tuple[int, ...] = (8, 8, 8, 8)
    context_dim: int = 768  # width of the text
    linear_projection: bool = False  # around the transformers: linear layers (2.x, XL) or 1 x 1 convolutions (1.x)
    cross_only: tuple[bool, ...] = (False, False, False, False)  # the upscaler: the text in place of self-attention
    upcast_attention: bool = False  # SD 2.1: attention in fp32
    class_embeddings: int = 0  # the upscaler: how many noise levels of the small picture it knows
    added_time_dim: int = 0  # XL: sinusoid width of each size and crop number
    added_dim: int = 0  # XL: width of the pooled text and all those sinusoids together
    guidance_dim: int = 0  # latent consistency models: sinusoid width of the guidance scale that they were distilled at
    norm_groups: int = 32

    @property
    def time_dim(self) -> int:
        """Width of the time embedding."""
        return 4 * self.channels[0]


SD15 = UNetConfig()
SD15_INPAINT = UNetConfig(in_channels=9)
IP2P = UNetConfig(in_channels=8)
SD2 = UNetConfig(heads=(5, 10, 20, 20), context_dim=1024, linear_projection=True)
SD21_V = UNetConfig(
    heads=(5, 10, 20, 20), context_dim=1024, linear_projection=True, sample_size=96, upcast_attention=True
)
SD2_INPAINT = UNetConfig(in_channels=9, heads=(5, 10, 20, 20), context_dim=1024, linear_projection=True)
SD2_DEPTH = UNetConfig(in_channels=5, heads=(5, 10, 20, 20), context_dim=1024, linear_projection=True)
X4 = UNetConfig(
    in_channels=7,
    sample_size=128,
    channels=(256, 512, 512, 1024),
    depths=(0, 1, 1, 1),
    context_dim=1024,
    linear_projection=True,
    cross_only=(True, True, True, False),
    class_embeddings=1000,
)
SDXL = UNetConfig(
    sample_size=128,
    channels=(320, 640, 1280),
    depths=(0, 2, 10),
    mid_depth=10,
    heads=(5, 10, 20),
    context_dim=2048,
    linear_projection=True,
    cross_only=(False, False, False),
    added_time_dim=256,
    added_dim=2816,
)
SDXL_INPAINT = UNetConfig(**{**SDXL.__dict__, "in_channels": 9})
SDXL_REFINER = UNetConfig(
    sample_size=128,
    channels=(384, 768, 1536, 1536),
    depths=(0, 4, 4, 0),
    mid_depth=4,
    heads=(6, 12, 24, 24),
    context_dim=1280,
    linear_projection=True,
    added_time_dim=256,
    added_dim=2560,
)


def sinusoids(x: Tensor, dim: int) -> Tensor:
    """Numbers [n] -> [n, dim] in fp32: cosines, then sines, of dim / 2 frequencies from 1 down to 1/10000.

    Source: Vaswani et al. 2017, section 3.5, with the order that the released models were trained with.
    """
    half = dim // 2
    frequencies = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32, device=x.device) / half)
    angles = x[:, None].float() * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def scale_sinusoids(scale: Tensor, dim: int) -> Tensor:
    """Guidance scales [n] -> [n, dim] in fp32: sines, then cosines, of 1000 (scale - 1), by frequencies that reach 1/10000.

    Source: LCM (2310.04378), algorithm 1's embedding of omega, which is 0 where there is no guidance; in Kingma et al.'s order.
    """
    half = dim // 2
    frequencies = torch.exp(
        torch.arange(half, dtype=torch.float32, device=scale.device) * -(math.log(10000) / (half - 1))
    )
    angles = ((scale.float() - 1) * 1000)[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


def widen(x: Tensor, like: Tensor) -> Tensor:
    """`x` [b, ...] with the rows of `like` [n b, ...]: all of it, n times over. As it is where `like` has no more rows."""
    return (
        x if len(x) >= len(like) else torch.cat([x] * (len(like) // len(x)))
    )  # keeps channels last, `repeat` does not


def layout(x: Tensor) -> torch.memory_format:
    """How `x` [b, c, h, w] lies in memory: channel after channel as released, or channels last."""
    return torch.contiguous_format if x.is_contiguous() else torch.channels_last


class GroupNorm(nn.GroupNorm):
    """Group norm that runs through the seam of `ops`, with or without the SiLU that mostly follows."""

    def forward(self, x: Tensor, silu: bool = False) -> Tensor:
        norm = ops.group_norm_silu if silu else ops.group_norm
        return norm(x, self.num_groups, self.weight, self.bias, self.eps)


class LayerNorm(nn.LayerNorm):
    """Layer norm that runs through the seam of `ops`."""

    def forward(self, x: Tensor) -> Tensor:
        return ops.layer_norm(x, self.weight, self.bias, self.eps)


class Embedding(nn.Module):
    """Two linear layers that turn sinusoids into something to listen to."""

    def __init__(self, d_in: int, d_out: int, d_beside: int = 0):
        super().__init__()
        self.linear_1, self.linear_2 = nn.Linear(d_in, d_out), nn.Linear(d_out, d_out)
        if d_beside:
            self.cond_proj = nn.Linear(d_beside, d_in, bias=False)

    def forward(self, x: Tensor, beside: Tensor | None = None) -> Tensor:
        x = x if beside is None else x + self.cond_proj(beside)
        return self.linear_2(F.silu(self.linear_1(x)))


class Resnet(nn.Module):
    """Norm, SiLU, convolution, twice, around a shortcut; the time shifts every channel between the two."""

    def __init__(self, c_in: int, c_out: int, config: UNetConfig):
        super().__init__()
        self.norm1 = GroupNorm(config.norm_groups, c_in, eps=1e-5)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.time_emb_proj = nn.Linear(config.time_dim, c_out)
        self.norm2 = GroupNorm(config.norm_groups, c_out, eps=1e-5)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        if c_in != c_out:
            self.conv_shortcut = nn.Conv2d(c_in, c_out, 1)

    def shift(self, temb: Tensor) -> Tensor:
        """What this block hears of the time: embedding [b, d] -> [b, c, 1, 1]."""
        return self.time_emb_proj(F.silu(temb))[:, :, None, None]

    def forward(self, x: Tensor, shift: Tensor) -> Tensor:
        h = self.conv1(self.norm1(x, silu=True))
        h = self.conv2(self.norm2(widen(h, shift) + shift, silu=True))
        return widen(self.conv_shortcut(x) if hasattr(self, "conv_shortcut") else x, h) + h


class Attention(nn.Module):
    """Multi-head attention from the picture to itself, or to the text when `context_dim` is given."""

    def __init__(self, d: int, heads: int, context_dim: int | None, upcast: bool):
        super().__init__()
        self.heads, self.upcast, self.cross = heads, upcast, context_dim is not None
        self.to_q = nn.Linear(d, d, bias=False)
        self.to_k = nn.Linear(context_dim or d, d, bias=False)
        self.to_v = nn.Linear(context_dim or d, d, bias=False)
        self.to_out = nn.Sequential(nn.Linear(d, d))

    def keys_values(self, context: Tensor) -> KeysValues:
        """What is attended to: [b, k, context_dim] -> keys and values, both [b, k, d]."""
        return self.to_k(context), self.to_v(context)

    def forward(self, x: Tensor, keys_values: KeysValues | None = None) -> Tensor:
        q = self.to_q(x)
        k, v, *pictures = self.keys_values(x) if keys_values is None else keys_values
        q = widen(q, k)
        y = ops.attention(q, k, v, self.heads, upcast=self.upcast)
        for k, v, weight in zip(pictures[::3], pictures[1::3], pictures[2::3], strict=True):
            y = y + weight * ops.attention(q, k, v, self.heads, upcast=self.upcast)
        return self.to_out(y)


class GEGLU(nn.Module):
    """A linear layer to twice the hidden width, one half of which gates the other."""

    def __init__(self, d: int, hidden: int):
        super().__init__()
        self.proj = nn.Linear(d, 2 * hidden)

    def forward(self, x: Tensor) -> Tensor:
        return ops.geglu(self.proj(x))


class FeedForward(nn.Module):
    """Widen fourfold through GEGLU, narrow again."""

    def __init__(self, d: int):
        super().__init__()
        # The released names are net.0 and net.2: a dropout of 0, the identity, lay between.
        self.net = nn.Sequential(GEGLU(d, 4 * d), nn.Identity(), nn.Linear(4 * d, d))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class TransformerLayer(nn.Module):
    """The picture looks at itself, then at the text, then thinks about it."""

    def __init__(self, d: int, heads: int, cross_only: bool, config: UNetConfig):
        super().__init__()
        self.norm1 = LayerNorm(d)
        self.attn1 = Attention(d, heads, config.context_dim if cross_only else None, config.upcast_attention)
        self.norm2 = LayerNorm(d)
        self.attn2 = Attention(d, heads, config.context_dim, config.upcast_attention)
        self.norm3 = LayerNorm(d)
        self.ff = FeedForward(d)

    def forward(self, x: Tensor, kv: Iterator[KeysValues]) -> Tensor:
        y = self.attn1(self.norm1(x), next(kv) if self.attn1.cross else None)
        x = y + widen(x, y)
        y = self.attn2(self.norm2(x), next(kv))
        x = y + widen(x, y)
        return self.ff(self.norm3(x)) + x


class Transformer(nn.Module):
    """Transformer layers over the positions of the latent, around a shortcut."""

    def __init__(self, d: int, heads: int, depth: int, cross_only: bool, config: UNetConfig):
        super().__init__()
        self.linear = config.linear_projection
        self.norm = GroupNorm(config.norm_groups, d, eps=1e-6)  # 1e-6 here, 1e-5 in the residual blocks: as released
        self.proj_in = nn.Linear(d, d) if self.linear else nn.Conv2d(d, d, 1)
        self.transformer_blocks = nn.ModuleList(TransformerLayer(d, heads, cross_only, config) for _ in range(depth))
        self.proj_out = nn.Linear(d, d) if self.linear else nn.Conv2d(d, d, 1)

    def forward(self, x: Tensor, kv: Iterator[KeysValues]) -> Tensor:
        h, w = x.shape[-2:]
        tokens = self.norm(x)
        if self.linear:
            tokens = self.proj_in(rearrange(tokens, "b c h w -> b (h w) c"))
        else:
            tokens = rearrange(self.proj_in(tokens), "b c h w -> b (h w) c")
        for layer in self.transformer_blocks:
            tokens = layer(tokens, kv)
        if self.linear:
            y = rearrange(self.proj_out(tokens), "b (h w) c -> b c h w", h=h, w=w)
            y = y.contiguous(memory_format=layout(x))
        else:
            y = rearrange(tokens, "b (h w) c -> b c h w", h=h, w=w)
            y = self.proj_out(y.contiguous(memory_format=layout(x)))
        return y + widen(x, y)


class Downsample(nn.Module):
    """Halve the side."""

    def __init__(self, c: int):
        super().__init__()
        self.conv = nn.Conv2d(c, c, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class Upsample(nn.Module):
    """Double the side (or reach the side of the next kept result, where halving had rounded up), then smooth."""

    def __init__(self, c: int):
        super().__init__()
        self.conv = nn.Conv2d(c, c, 3, padding=1)

    def forward(self, x: Tensor, size: torch.Size) -> Tensor:
        return self.conv(F.interpolate(x, size=size, mode="nearest"))


class Down(nn.Module):
    """A level on the way down. Every result is kept for the way up."""

    def __init__(self, level: int, config: UNetConfig):
        super().__init__()
        c, depth = config.channels[level], config.depths[level]
        c_in = config.channels[max(level - 1, 0)]
        self.resnets = nn.ModuleList(Resnet(c_in if i == 0 else c, c, config) for i in range(config.layers))
        self.attentions = nn.ModuleList(
            Transformer(c, config.heads[level], depth, config.cross_only[level], config)
            for _ in range(config.layers if depth or level in config.hollow else 0)
        )
        if level < len(config.channels) - 1:
            self.downsamplers = nn.ModuleList([Downsample(c)])

    def forward(
        self,
        x: Tensor,
        skips: list[Tensor],
        shifts: Iterator[Tensor],
        kv: Iterator[KeysValues],
        feature: Tensor | None = None,
    ) -> tuple[Tensor, list[Tensor]]:
        """A T2I-Adapter's `feature` is added behind the last transformer; where there is none, to what leaves the level."""
        last = len(self.resnets) - 1 if self.attentions else None
        for i, resnet in enumerate(self.resnets):
            x = resnet(x, next(shifts))
            if self.attentions:
                x = self.attentions[i](x, kv)
            if feature is not None and i == last:
                x = widen(x, feature) + widen(feature, x)
            skips = [*skips, x]
        for downsample in getattr(self, "downsamplers", ()):
            x = downsample(x)
            skips = [*skips, x]
        if feature is not None and last is None:
            x = widen(x, feature) + widen(feature, x)
            skips = [*skips[:-1], x]
        return x, skips


class Middle(nn.Module):
    """The lowest level: residual block, transformer, residual block."""

    def __init__(self, config: UNetConfig):
        super().__init__()
        c = config.channels[-1]
        self.resnets = nn.ModuleList([Resnet(c, c, config), Resnet(c, c, config)])
        self.attentions = nn.ModuleList([Transformer(c, config.heads[-1], config.mid_depth, False, config)])

    def forward(self, x: Tensor, shifts: Iterator[Tensor], kv: Iterator[KeysValues]) -> Tensor:
        x = self.resnets[0](x, next(shifts))
        x = self.attentions[0](x, kv)
        return self.resnets[1](x, next(shifts))


class Up(nn.Module):
    """A level on the way up. Every residual block takes a kept result beside its input, the latest first."""

    def __init__(self, level: int, config: UNetConfig):
        super().__init__()
        channels, n = config.channels, config.layers + 1
        c, depth = channels[level], config.depths[level]
        below = channels[min(level + 1, len(channels) - 1)]
        # What the way down kept on this level: its residual blocks' results, and first of all what entered the level.
        kept = [c] * config.layers + [channels[max(level - 1, 0)]]
        self.resnets = nn.ModuleList(Resnet((below if i == 0 else c) + kept[i], c, config) for i in range(n))
        self.attentions = nn.ModuleList(
            Transformer(c, config.heads[level], depth, config.cross_only[level], config)
            for _ in range(n if depth else 0)
        )
        if level > 0:
            self.upsamplers = nn.ModuleList([Upsample(c)])

    def forward(
        self, x: Tensor, skips: list[Tensor], shifts: Iterator[Tensor], kv: Iterator[KeysValues]
    ) -> tuple[Tensor, list[Tensor]]:
        for i, resnet in enumerate(self.resnets):
            x = resnet(self.join(x, skips[-1]), next(shifts))
            skips = skips[:-1]
            if self.attentions:
                x = self.attentions[i](x, kv)
        for upsample in getattr(self, "upsamplers", ()):
            x = upsample(x, skips[-1].shape[-2:])
        return x, skips

    def join(self, x: Tensor, skip: Tensor) -> Tensor:
        """What comes from below beside what was kept."""
        return torch.cat([x, widen(skip, x)], dim=1)


class Encoder(nn.Module):
    """The half of the UNet up to the middle, which a ControlNet has a copy of."""

    def __init__(self, config: UNetConfig):
        super().__init__()
        self.config = config
        self.time_embedding = Embedding(config.channels[0], config.time_dim, config.guidance_dim)
        if config.class_embeddings:
            self.class_embedding = nn.Embedding(config.class_embeddings, config.time_dim)
        if config.added_dim:
            self.add_embedding = Embedding(config.added_dim, config.time_dim)
        self.conv_in = nn.Conv2d(config.in_channels, config.channels[0], 3, padding=1)
        self.down_blocks = nn.ModuleList(Down(level, config) for level in range(len(config.channels)))
        self.mid_block = Middle(config)

    # What depends on the time but not on the latent. Computed once a picture when the times are known beforehand.

    def embed_time(
        self,
        t: Tensor,
        added: tuple[Tensor, Tensor] | None = None,
        labels: Tensor | None = None,
        scale: Tensor | None = None,
    ) -> Tensor:
        """Timesteps [b], and what else the residual blocks hear, -> embedding [b, d].

        `added`, XL only: the pooled text [b, p] and the sizes and crops [b, 6] (refiner: [b, 5]) in the order of `time_ids`.
        `labels`, the upscaler only: noise level of the small picture, int64 [b]. `scale`, latent consistency models only: the
        guidance that they imitate in one answer [b] or [1]. ConfigError where one is missing.
        """
        config, dtype = self.config, self.conv_in.weight.dtype
        if config.guidance_dim and scale is None:
            raise ConfigError("this UNet hears the guidance scale: pass scale=, [b]")
        beside = (
            scale_sinusoids(scale, config.guidance_dim).to(dtype) if config.guidance_dim and scale is not None else None
        )
        temb = self.time_embedding(sinusoids(t, config.channels[0]).to(dtype), beside)
        told = self.embed_labels(labels)
        if told is not None:
            temb = temb + told
        if config.added_dim:
            if added is None:
                raise ConfigError("this UNet hears the pooled text and sizes: pass added=(pooled, time_ids)")
            pooled, time_ids = added
            numbers = sinusoids(time_ids.flatten(), config.added_time_dim).reshape(len(pooled), -1)
            temb = temb + self.add_embedding(torch.cat([pooled, numbers], dim=-1).to(dtype))
        return temb

    def embed_labels(self, labels: Tensor | None) -> Tensor | None:
        """Embedding [b, d] of `labels`; None where the network hears of none."""
        if not self.config.class_embeddings:
            return None
        if labels is None:
            raise ConfigError("this UNet hears a noise level: pass labels=, int64 [b]")
        return self.class_embedding(labels).to(self.conv_in.weight.dtype)

    def time_shifts(self, temb: Tensor) -> list[Tensor]:
        """What each residual block hears of a time embedding, in the order in which they run: list of [b, c, 1, 1]."""
        return [block.shift(temb) for block in self._in_order(Resnet)]

    # What depends on the text but not on the step. Computed once a picture.

    def keys_values(self, context: Tensor) -> list[KeysValues]:
        """Keys and values of the text for each attention to it, in the order in which they run: list of two [b, k, d]."""
        return [block.keys_values(context) for block in self._in_order(Attention) if block.cross]

    def _in_order(self, kind: type) -> Iterator:
        """Blocks of one kind in the order in which they run: down, middle, up."""
        for part in (self.down_blocks, self.mid_block, getattr(self, "up_blocks", None)):
            if part is not None:
                yield from (block for block in part.modules() if isinstance(block, kind))

    def down(
        self, x: Tensor, shifts: Iterator[Tensor], kv: Iterator[KeysValues], features: list[Tensor] | None = None
    ) -> tuple[Tensor, list[Tensor]]:
        """Everything before the way up: the middle's result, and every kept result; see `UNet.step` for `features`."""
        skips = [x]
        for level, block in enumerate(self.down_blocks):
            feature = None if features is None or level >= len(features) else features[level]
            x, skips = block(x, skips, shifts, kv, feature)
        x = self.mid_block(x, shifts, kv)
        if features is not None and len(features) > len(self.down_blocks):
            x = widen(x, features[-1]) + widen(features[-1], x)
        return x, skips


class UNet(Encoder):
    """The denoising network of SD 1.x, 2.x and XL."""

    def __init__(self, config: UNetConfig = SD15):
        super().__init__(config)
        self.up_blocks = nn.ModuleList(Up(level, config) for level in reversed(range(len(config.channels))))
        self.conv_norm_out = GroupNorm(config.norm_groups, config.channels[0], eps=1e-5)
        self.conv_out = nn.Conv2d(config.channels[0], config.out_channels, 3, padding=1)

    def step(
        self,
        x: Tensor,
        shifts: list[Tensor],
        keys_values: list[KeysValues],
        residuals: list[Tensor] | None = None,
        features: list[Tensor] | None = None,
    ) -> Tensor:
        """The once-a-step half: latent [b, c, h, w] -> prediction [b, c, h, w].

        `shifts` and `keys_values` come from `time_shifts` and `keys_values`. Where `keys_values` have n times the rows of `x`
        (one lot a branch of guidance), so has the prediction; `shifts` may have one row for all. `residuals`, from
        ControlNets, are added to the kept results and, the last one, to the middle: one more than there are kept results.
        `features`, from T2I-Adapters, are added inside the way down: one a level, and where there is one more, to the middle.
        """
        shift, kv = iter(shifts), iter(keys_values)
        x, skips = self.down(self.conv_in(x), shift, kv, features)
        if residuals is not None:
            skips = [widen(skip, residual) + residual for skip, residual in zip(skips, residuals, strict=False)]
            x = x + residuals[-1]
        for block in self.up_blocks:
            x, skips = block(x, skips, shift, kv)
        return self.conv_out(self.conv_norm_out(x, silu=True))

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        context: Tensor,
        added: tuple[Tensor, Tensor] | None = None,
        labels: Tensor | None = None,
        residuals: list[Tensor] | None = None,
        features: list[Tensor] | None = None,
        scale: Tensor | None = None,
    ) -> Tensor:
        """Latent [b, c, h, w], timesteps [b] or one for all, text [b, k, d] -> prediction [b, c, h, w].

        The two once-a-picture halves and the once-a-step half in a row; see `embed_time` for `added`, `labels` and `scale`.
        """
        temb = self.embed_time(t.expand(len(x)), added, labels, scale)
        return self.step(x, self.time_shifts(temb), self.keys_values(context), residuals, features)
