"""TAESD: a tiny autoencoder that speaks the big one's latents, for previews while a picture is being drawn.

It has a fiftieth of the decoder's parameters, 64 channels everywhere, and neither norm nor attention: a plane of the picture is
decoded in a twentieth of the time, a little softer in its detail. TAESD was trained on the latents of SD 1.x and 2.x, TAESDXL on
those of SDXL; the architecture is one, and the files do not say which they are. Latents go in as the sampler has them,
already multiplied by the scaling factor.

Source: Bohan 2023 (github.com/madebyollin/taesd). The parameter names are those of the released files in the diffusers layout.

Legend: b pictures, z latent channels, h w latent height and width (pixels / 8), H W pixels.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sdcore.errors import ConfigError

if TYPE_CHECKING:
    from sdcore.pipeline import Pipeline


@dataclass(frozen=True)
class TAESDConfig:
    """Sizes. The defaults are those of TAESD and of TAESDXL."""

    channels: int = 64
    latent_channels: int = 4
    encoder_blocks: tuple[int, ...] = (
        1,
        3,
        3,
        3,
    )  # per level, from full resolution down; () where only the decoder is there
    decoder_blocks: tuple[int, ...] = (3, 3, 3, 1)  # from the latent's resolution up


class Block(nn.Module):
    """Three convolutions around a shortcut."""

    def __init__(self, c: int):
        super().__init__()
        self.conv = nn.Sequential(conv(c, c), nn.ReLU(), conv(c, c), nn.ReLU(), conv(c, c))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.conv(x) + x)


def conv(c_in: int, c_out: int, **options) -> nn.Conv2d:
    return nn.Conv2d(c_in, c_out, 3, padding=1, **options)


class Encoder(nn.Module):
    """Pixels [b, 3, H, W] in -1..1 -> latents [b, z, h, w]."""

    def __init__(self, config: TAESDConfig):
        super().__init__()
        c = config.channels
        layers: list[nn.Module] = []
        for level, blocks in enumerate(config.encoder_blocks):
            layers += [conv(c, c, stride=2, bias=False) if level else conv(3, c), *(Block(c) for _ in range(blocks))]
        self.layers = nn.Sequential(*layers, conv(c, config.latent_channels))

    def forward(self, pixels: Tensor) -> Tensor:
        return self.layers(pixels.add(1).div(2))  # trained on pictures in 0..1


class Decoder(nn.Module):
    """Latents [b, z, h, w] -> pixels [b, 3, H, W], about -1..1."""

    def __init__(self, config: TAESDConfig):
        super().__init__()
        c = config.channels
        layers: list[nn.Module] = [conv(config.latent_channels, c), nn.ReLU()]
        for level, blocks in enumerate(config.decoder_blocks):
            layers += [nn.Upsample(scale_factor=2), conv(c, c, bias=False)] if level else []
            layers += [Block(c) for _ in range(blocks)]
        self.layers = nn.Sequential(*layers, conv(c, 3))

    def forward(self, z: Tensor) -> Tensor:
        z = torch.tanh(z / 3) * 3  # nothing beyond 3: a latent on its way can be far out
        return self.layers(z).mul(2).sub(1)


class TAESD(nn.Module):
    """The tiny autoencoder."""

    def __init__(self, config: TAESDConfig = TAESDConfig()):  # noqa: B008 (frozen)
        super().__init__()
        self.config = config
        if config.encoder_blocks:
            self.encoder = Encoder(config)
        self.decoder = Decoder(config)

    def encode(self, pixels: Tensor) -> Tensor:
        """Pixels [b, 3, H, W] in -1..1 -> latents [b, z, h, w], as the sampler has them. ConfigError without an encoder."""
        if not self.config.encoder_blocks:
            raise ConfigError("TAESD: only its decoder was loaded; put the file of its encoder beside it")
        return self.encoder(pixels)

    def decode(self, latents: Tensor) -> Tensor:
        """Latents [b, z, h, w], as the sampler has them -> pixels [b, 3, H, W], about -1..1, not clamped."""
        return self.decoder(latents)


@torch.no_grad()
def preview(pipe: "Pipeline", x0: Tensor, taesd: TAESD | None = None) -> Tensor:
    """What a picture being drawn looks like: latents [b, z, h, w] (`Progress.x0`) -> pixels [b, 3, H, W] fp32, about -1..1.

    Without a TAESD the model's own decoder makes it, which takes twenty times as long. ConfigError for a TAESD of other latents.
    """
    if taesd is None:
        return pipe.decode(x0)
    if x0.shape[1] != taesd.config.latent_channels:
        raise ConfigError(
            f"TAESD: takes {taesd.config.latent_channels} latent channels, this model has {x0.shape[1]}; leave it out"
        )
    weight = next(taesd.parameters())
    return taesd.decode(x0.to(weight.device, weight.dtype)).float()
