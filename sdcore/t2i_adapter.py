"""T2I-Adapter: a small network, run once a picture, that adds what it sees in a control picture to the UNet's way down.

Each pixel of its input is a patch of the control picture, as large as what a value of the latent covers (for XL, what two by two
of them cover). Residual blocks of convolutions without norms make one feature a level; `UNet.step` takes the list as `features`
and adds each behind the last transformer of its level. Nothing here depends on the step, so it costs next to nothing.

Source: Mou et al. 2023. The parameter names are those of the released files in the diffusers layout.

Legend: b batch, c channels, H W pixels, h w side of the first level.
"""

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from sdcore.errors import ConfigError


@dataclass(frozen=True)
class T2IAdapterConfig:
    """Sizes of a T2I-Adapter; the defaults are SD 1.x. Tuples have one entry a feature."""

    hint_channels: int = 3  # 1: pictures of lines and sketches in shades of grey
    channels: tuple[int, ...] = (320, 640, 1280, 1280)
    halved: tuple[bool, ...] = (False, True, True, True)  # whether a feature has half the side of the one before
    layers: int = 2
    patch: int = 8  # side of the patch that becomes a pixel of the first feature
    light: bool = False  # colours: narrow blocks between two 1 x 1 convolutions


SD15_ADAPTER = T2IAdapterConfig()
SD15_ADAPTER_GREY = T2IAdapterConfig(hint_channels=1)
SD15_ADAPTER_LIGHT = T2IAdapterConfig(layers=4, light=True)
SDXL_ADAPTER = T2IAdapterConfig(halved=(False, False, True, False), patch=16)  # the last feature is for the middle


class Resnet(nn.Module):
    """Convolution, ReLU, convolution around a shortcut."""

    def __init__(self, c: int, light: bool):
        super().__init__()
        self.block1 = nn.Conv2d(c, c, 3, padding=1)
        self.block2 = nn.Conv2d(c, c, 3, padding=1) if light else nn.Conv2d(c, c, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.block2(F.relu(self.block1(x))) + x


class Block(nn.Module):
    """What makes one feature of the one before."""

    def __init__(self, c_in: int, c_out: int, halve: bool, config: T2IAdapterConfig):
        super().__init__()
        self.halve = halve
        width = c_out // 4 if config.light else c_out
        if config.light or c_in != c_out:
            self.in_conv = nn.Conv2d(c_in, width, 1)
        self.resnets = nn.Sequential(*(Resnet(width, config.light) for _ in range(config.layers)))
        if config.light:
            self.out_conv = nn.Conv2d(width, c_out, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.avg_pool2d(x, 2, ceil_mode=True) if self.halve else x
        x = self.in_conv(x) if hasattr(self, "in_conv") else x
        x = self.resnets(x)
        return self.out_conv(x) if hasattr(self, "out_conv") else x


class Body(nn.Module):
    """Patches of pixels to features."""

    def __init__(self, config: T2IAdapterConfig):
        super().__init__()
        patch, channels = config.hint_channels * config.patch**2, config.channels
        if not config.light:
            self.conv_in = nn.Conv2d(patch, channels[0], 3, padding=1)
        entries = (patch if config.light else channels[0], *channels)
        self.body = nn.ModuleList(map(Block, entries, channels, config.halved, [config] * len(channels)))

    def forward(self, x: Tensor) -> list[Tensor]:
        x = self.conv_in(x) if hasattr(self, "conv_in") else x
        features: list[Tensor] = []
        for block in self.body:
            x = block(x)
            features = [*features, x]
        return features


class T2IAdapter(nn.Module):
    """A control picture's features for the UNet's way down."""

    def __init__(self, config: T2IAdapterConfig = SD15_ADAPTER):
        super().__init__()
        self.config = config
        self.adapter = Body(config)

    def forward(self, pixels: Tensor) -> list[Tensor]:
        """Control picture [b, c, H, W], 0..1 -> features [b, c, h, w], one a level (XL: and one for the middle).

        An adapter that sees shades of grey takes the mean of three channels. ConfigError unless H and W are whole patches.
        """
        config = self.config
        if any(side % config.patch for side in pixels.shape[-2:]):
            raise ConfigError(
                f"control picture {pixels.shape[-1]}x{pixels.shape[-2]}: expected multiples of {config.patch}"
            )
        if config.hint_channels == 1:
            pixels = pixels.mean(dim=1, keepdim=True)
        return self.adapter(F.pixel_unshuffle(pixels, config.patch))
