"""The autoencoder: pictures to latents an eighth of their side, and back.

Diffusion happens on latents because a 512 x 512 picture is 48 times more numbers than its 4 x 64 x 64 latent. The encoder halves
the side between levels and ends in the mean and log-variance of a Gaussian for every latent value; the decoder mirrors it.
Read `Resnet`, `Attention`, then `Encoder` and `Decoder`, which are the figure; `VAE` joins them.

Source: Rombach et al. 2022, appendix G, and Kingma & Welling 2014. The parameter names are those of the released files in the
diffusers layout, so a released folder loads with `load_state_dict(strict=True)`.

Legend: b batch, c channels, h w height and width (of whatever level), z latent channels.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from sdcore import ops

EPS = 1e-6  # of every group norm here; the UNet's residual blocks have 1e-5


@dataclass(frozen=True)
class VAEConfig:
    """Sizes of an autoencoder. The defaults are those of SD 1.x and 2.x."""

    channels: tuple[int, ...] = (128, 256, 512, 512)  # width per level, from full resolution down
    layers: int = 2  # residual blocks per level of the encoder; the decoder has one more
    latent_channels: int = 4
    scaling_factor: float = 0.18215  # latents are multiplied by this so that diffusion sees unit variance
    force_upcast: bool = False  # the first SDXL autoencoder overflows fp16 and must run in fp32 or bf16
    sample_size: int = 512  # side of the training pictures
    norm_groups: int = 32

    @property
    def factor(self) -> int:
        """How many pixels one latent value is wide."""
        return 2 ** (len(self.channels) - 1)


SD_VAE = VAEConfig()
SDXL_VAE = VAEConfig(scaling_factor=0.13025, force_upcast=True, sample_size=1024)
X4_VAE = VAEConfig(channels=(128, 256, 512), scaling_factor=0.08333, sample_size=256)


class Moments(NamedTuple):
    """The Gaussian that the encoder gives for a picture, both [b, z, h/f, w/f], not yet scaled."""

    mean: Tensor
    logvar: Tensor

    def sample(self, noise: Tensor) -> Tensor:
        """A draw from it, with unit normal `noise` of the same shape."""
        return self.mean + (0.5 * self.logvar).exp() * noise


class GroupNorm(nn.GroupNorm):
    """Group norm that runs through the seam of `ops`, with or without the SiLU that mostly follows."""

    def forward(self, x: Tensor, silu: bool = False) -> Tensor:
        norm = ops.group_norm_silu if silu else ops.group_norm
        return norm(x, self.num_groups, self.weight, self.bias, self.eps)


class Resnet(nn.Module):
    """Norm, SiLU, convolution, twice, around a shortcut (He et al. 2016, pre-activation)."""

    def __init__(self, c_in: int, c_out: int, groups: int):
        super().__init__()
        self.norm1 = GroupNorm(groups, c_in, EPS)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.norm2 = GroupNorm(groups, c_out, EPS)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        if c_in != c_out:
            self.conv_shortcut = nn.Conv2d(c_in, c_out, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(self.norm1(x, silu=True))
        h = self.conv2(self.norm2(h, silu=True))
        return (self.conv_shortcut(x) if hasattr(self, "conv_shortcut") else x) + h


class Attention(nn.Module):
    """One head as wide as the channels, over all positions: every latent value may look at the whole picture."""

    def __init__(self, c: int, groups: int):
        super().__init__()
        self.group_norm = GroupNorm(groups, c, EPS)
        self.to_q, self.to_k, self.to_v = nn.Linear(c, c), nn.Linear(c, c), nn.Linear(c, c)
        self.to_out = nn.Sequential(nn.Linear(c, c))

    def forward(self, x: Tensor) -> Tensor:
        tokens = rearrange(self.group_norm(x), "b c h w -> b (h w) c")
        tokens = self.to_out(ops.attention(self.to_q(tokens), self.to_k(tokens), self.to_v(tokens), heads=1))
        return rearrange(tokens, "b s c -> b c s").reshape(x.shape) + x


class Downsample(nn.Module):
    """Halve the side. Zeros are padded at the right and the bottom only, as in the original."""

    def __init__(self, c: int):
        super().__init__()
        self.conv = nn.Conv2d(c, c, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Double the side by repeating pixels, then smooth by a convolution."""

    def __init__(self, c: int):
        super().__init__()
        self.conv = nn.Conv2d(c, c, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Level(nn.Module):
    """Residual blocks at one resolution, then a change of resolution (the last level has none)."""

    def __init__(self, c_in: int, c_out: int, layers: int, groups: int, resample: str | None):
        super().__init__()
        self.resnets = nn.ModuleList(Resnet(c_in if i == 0 else c_out, c_out, groups) for i in range(layers))
        if resample == "down":
            self.downsamplers = nn.ModuleList([Downsample(c_out)])
        elif resample == "up":
            self.upsamplers = nn.ModuleList([Upsample(c_out)])

    def forward(self, x: Tensor) -> Tensor:
        for resnet in self.resnets:
            x = resnet(x)
        for name in ("downsamplers", "upsamplers"):
            for resample in getattr(self, name, ()):
                x = resample(x)
        return x


class Middle(nn.Module):
    """The lowest resolution: a residual block, attention, a residual block."""

    def __init__(self, c: int, groups: int):
        super().__init__()
        self.resnets = nn.ModuleList([Resnet(c, c, groups), Resnet(c, c, groups)])
        self.attentions = nn.ModuleList([Attention(c, groups)])

    def forward(self, x: Tensor) -> Tensor:
        return self.resnets[1](self.attentions[0](self.resnets[0](x)))


class Encoder(nn.Module):
    """Picture [b, 3, h, w] -> twice the latent channels [b, 2 z, h/f, w/f]."""

    def __init__(self, config: VAEConfig):
        super().__init__()
        channels, groups = config.channels, config.norm_groups
        last = len(channels) - 1
        self.conv_in = nn.Conv2d(3, channels[0], 3, padding=1)
        self.down_blocks = nn.ModuleList(
            Level(channels[max(i - 1, 0)], c, config.layers, groups, "down" if i < last else None)
            for i, c in enumerate(channels)
        )
        self.mid_block = Middle(channels[-1], groups)
        self.conv_norm_out = GroupNorm(groups, channels[-1], EPS)
        self.conv_out = nn.Conv2d(channels[-1], 2 * config.latent_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for level in self.down_blocks:
            x = level(x)
        x = self.mid_block(x)
        return self.conv_out(self.conv_norm_out(x, silu=True))


class Decoder(nn.Module):
    """Latent [b, z, h/f, w/f] -> picture [b, 3, h, w]."""

    def __init__(self, config: VAEConfig):
        super().__init__()
        channels, groups = config.channels[::-1], config.norm_groups
        last = len(channels) - 1
        self.conv_in = nn.Conv2d(config.latent_channels, channels[0], 3, padding=1)
        self.mid_block = Middle(channels[0], groups)
        self.up_blocks = nn.ModuleList(
            Level(channels[max(i - 1, 0)], c, config.layers + 1, groups, "up" if i < last else None)
            for i, c in enumerate(channels)
        )
        self.conv_norm_out = GroupNorm(groups, channels[-1], EPS)
        self.conv_out = nn.Conv2d(channels[-1], 3, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        x = self.mid_block(self.conv_in(z))
        for level in self.up_blocks:
            x = level(x)
        return self.conv_out(self.conv_norm_out(x, silu=True))


class VAE(nn.Module):
    """The autoencoder with its two 1 x 1 convolutions around the latent."""

    def __init__(self, config: VAEConfig = SD_VAE):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quant_conv = nn.Conv2d(2 * config.latent_channels, 2 * config.latent_channels, 1)
        self.post_quant_conv = nn.Conv2d(config.latent_channels, config.latent_channels, 1)

    def encode(self, pixels: Tensor) -> Moments:
        """Pixels [b, 3, h, w] in -1..1 -> mean and log-variance [b, z, h/f, w/f], not yet multiplied by the scaling factor."""
        mean, logvar = self.quant_conv(self.encoder(pixels)).chunk(2, dim=1)
        return Moments(mean, logvar.clamp(-30.0, 20.0))

    def decode(self, z: Tensor) -> Tensor:
        """Latents [b, z, h, w], divided by the scaling factor -> pixels [b, 3, f h, f w], about -1..1, not clamped."""
        return self.decoder(self.post_quant_conv(z))

    def forward(self, pixels: Tensor, noise: Tensor) -> tuple[Tensor, Moments]:
        """Encode, draw with `noise`, decode: what training needs, (reconstruction, moments)."""
        moments = self.encode(pixels)
        return self.decode(moments.sample(noise)), moments
