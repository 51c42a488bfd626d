"""ControlNet: a copy of the UNet's encoder looks at a control picture and says what to add to the UNet's kept results.

The picture goes through a small stem of convolutions (`embed_hint`, once a picture) and is added to the latent behind the first
convolution. From there the copy runs as the UNet's own encoder does; every result it keeps, and the middle's, leaves through a
1 x 1 convolution. These began as zeros, so an untrained ControlNet changes nothing. `step` returns the list of what is to be
added, which `UNet.step` takes as `residuals`; several ControlNets are summed by the caller.

`Control` is what a user hands in: a network, a picture, and how strongly and when it acts. A `ControlNetUnion` knows several
kinds of map and hears which it is shown; shown several at once, it still runs once.

Source: Zhang et al. 2023 (ControlNet); the released checkpoints for XL, its smaller kin (mid, small) and Union. The parameter
names are those of the released files in the diffusers layout: a released folder loads with `strict=True`.

Legend: b batch, c channels, H W pixels, h w latent height and width, k text tokens, d width.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sdcore.errors import ConfigError
from sdcore.unet import SD2, SDXL, Embedding, Encoder, KeysValues, LayerNorm, UNet, UNetConfig, sinusoids, widen

if TYPE_CHECKING:
    from sdcore.t2i_adapter import T2IAdapter


@dataclass(frozen=True)
class ControlNetConfig(UNetConfig):
    """Sizes of a ControlNet: those of the UNet whose encoder it copies, and its own. The defaults are SD 1.x."""

    hint_channels: int = 3
    stem: tuple[int, ...] = (16, 32, 96, 256)  # widths on the way from pixels to the latent's side, halving between two
    pooled: bool = False  # shuffle: what it says is averaged over the picture; it tells of style, not of place
    kinds: int = 0  # Union: how many kinds of map it knows


def of_unet(config: UNetConfig, **own) -> ControlNetConfig:
    """The sizes of a ControlNet for a UNet of these sizes."""
    return ControlNetConfig(**{**config.__dict__, "guidance_dim": 0, **own})


SD15_CONTROL = ControlNetConfig()
SD15_SHUFFLE = ControlNetConfig(pooled=True)
SD2_CONTROL = of_unet(SD2)
SDXL_CONTROL = of_unet(SDXL)
# The small kin have transformers in fewer places. Some that remain have lost their layers and kept the projections around them.
SDXL_CONTROL_MID = of_unet(SDXL, depths=(0, 0, 1), hollow=(1,), mid_depth=1)
SDXL_CONTROL_SMALL = of_unet(SDXL, depths=(0, 0, 0), mid_depth=0)
SDXL_UNION = of_unet(SDXL, kinds=6)
SDXL_UNION_PROMAX = of_unet(SDXL, kinds=8)

# What a Union may be shown, by the number that it was trained with; the last two are promax's alone.
UNION_KINDS = {
    "openpose": 0, "depth": 1, "softedge": 2, "scribble": 2, "canny": 3, "lineart": 3, "mlsd": 3, "normal": 4, "segment": 5,
    "tile": 6, "inpaint": 7,
}  # fmt: skip


@dataclass(frozen=True)
class Control:
    """A control picture, who looks at it, and how strongly and when it acts. ConfigError where that means nothing."""

    net: "ControlNet | T2IAdapter"
    image: Tensor  # [1 or b, 3, H, W], 0..1; what Canny or a depth network made of a picture, or the picture itself
    scale: float = 1.0
    start: float = 0.0  # share of the steps that are over when it begins
    end: float = 1.0
    guess: bool = False  # the negative branch hears nothing of it, and the upper levels less than the lower ones
    mask: Tensor | None = None  # [1 or b, 1, H, W]: 1 where it acts, 0 where it does not
    kind: str | None = None  # what a Union is shown: one of UNION_KINDS

    def __post_init__(self):
        for name in ("scale", "start", "end"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
                raise ConfigError(f"control: {name} is {value!r}, expected a finite number")
        if not 0 <= self.start < self.end <= 1:
            raise ConfigError(f"control: acts from {self.start} to {self.end}, expected 0 <= start < end <= 1")
        check_pixels("image", self.image, (self.net.config.hint_channels, 3))
        if self.mask is not None:
            check_pixels("mask", self.mask, (1,))
        kinds = getattr(self.net.config, "kinds", 0)
        if kinds and UNION_KINDS.get(self.kind or "", kinds) >= kinds:
            known = ", ".join(name for name, number in UNION_KINDS.items() if number < kinds)
            raise ConfigError(f"control: kind is {self.kind!r}; this Union has to be told which of {known} it is shown")
        if self.kind is not None and not kinds:
            raise ConfigError(
                f"control: kind is {self.kind!r}, and only a ControlNet Union is told of a kind; leave it out"
            )

    @property
    def guesses(self) -> bool:
        """Whether the negative branch hears nothing of it. So it is with every ControlNet that is averaged over the picture."""
        return self.guess or getattr(self.net.config, "pooled", False)

    def active(self, i: int, steps: int) -> bool:
        """Whether it acts in step `i` of so many: the whole step has to lie between `start` and `end`."""
        return i / steps >= self.start and (i + 1) / steps <= self.end

    def weigh(self, residuals: Sequence[Tensor], scale: float | None = None) -> list[Tensor]:
        """Residuals times the scale: this control's, or another; guessing, from a tenth of it at the top to all in the middle."""
        scale = self.scale if scale is None else scale
        if self.guess and not getattr(self.net.config, "pooled", False):
            scales = (torch.logspace(-1, 0, len(residuals)) * scale).tolist()
        else:
            scales = [scale] * len(residuals)
        return [residual * s for residual, s in zip(residuals, scales, strict=True)]


def check_pixels(name: str, x: Tensor, channels: Iterable[int]) -> None:
    """ConfigError unless x is [b, c, H, W] with one of these numbers of channels, in 0..1."""
    if not isinstance(x, Tensor) or x.ndim != 4 or x.shape[1] not in channels or not x.numel():
        found = list(x.shape) if isinstance(x, Tensor) else type(x).__name__
        raise ConfigError(f"control: {name} is {found}, expected a tensor [b, {max(channels)}, H, W]")
    low, high = x.min().item(), x.max().item()
    if not (low >= 0 and high <= 1):
        raise ConfigError(f"control: {name} has values from {low:g} to {high:g}, expected 0 to 1")


class Stem(nn.Module):
    """From the control picture to something that can be added to the latent behind its first convolution."""

    def __init__(self, c_in: int, widths: Sequence[int], c_out: int):
        super().__init__()
        self.conv_in = nn.Conv2d(c_in, widths[0], 3, padding=1)
        self.blocks = nn.ModuleList()
        for width, wider in zip(widths, widths[1:], strict=False):
            self.blocks.append(nn.Conv2d(width, width, 3, padding=1))
            self.blocks.append(nn.Conv2d(width, wider, 3, padding=1, stride=2))
        self.conv_out = zeros(nn.Conv2d(widths[-1], c_out, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        x = F.silu(self.conv_in(x))
        for conv in self.blocks:
            x = F.silu(conv(x))
        return self.conv_out(x)


def zeros(conv: nn.Conv2d) -> nn.Conv2d:
    """The convolution as training begins with it: it gives zeros, whatever it is given."""
    for parameter in conv.parameters():
        nn.init.zeros_(parameter)
    return conv


class ControlNet(Encoder):
    """A copy of the UNet's encoder that listens to a picture."""

    config: ControlNetConfig

    def __init__(self, config: ControlNetConfig = SD15_CONTROL):
        super().__init__(config)
        self.controlnet_cond_embedding = Stem(config.hint_channels, config.stem, config.channels[0])
        widths = [config.channels[0]]  # of what the encoder keeps: what enters it, and every result of its blocks
        for level, width in enumerate(config.channels):
            widths += [width] * (config.layers + (level < len(config.channels) - 1))
        self.controlnet_down_blocks = nn.ModuleList(zeros(nn.Conv2d(width, width, 1)) for width in widths)
        self.controlnet_mid_block = zeros(nn.Conv2d(widths[-1], widths[-1], 1))

    @classmethod
    @torch.no_grad()
    def from_unet(cls, unet: UNet, **own) -> "ControlNet":
        """A ControlNet to be trained: the UNet's encoder copied, the stem random, the rest zeros. At first it changes nothing.

        `own` are sizes of a ControlNet that a UNet has not (see `ControlNetConfig`).
        """
        net = cls(of_unet(unet.config, **own)).to(unet.conv_in.weight)
        new, copied = net.state_dict(), unet.state_dict()
        net.load_state_dict({name: copied.get(name, tensor) for name, tensor in new.items()})
        return net

    def embed_hint(self, pixels: Tensor) -> Tensor:
        """The control picture [b, c, H, W], 0..1 -> hint [b, c, h, w]. Once a picture."""
        return self.controlnet_cond_embedding(pixels)

    def step(self, x: Tensor, shifts: list[Tensor], keys_values: list[KeysValues], hint: Tensor) -> list[Tensor]:
        """The once-a-step half: latent [b, c, h, w] -> what to add to each kept result, first to last, and to the middle's.

        Rows are as in `UNet.step`; the residuals have as many as `keys_values`. A hint of one row is for all.
        """
        x = self.conv_in(x)
        x, skips = self.down(x + widen(hint, x), iter(shifts), iter(keys_values))
        said = [conv(skip) for conv, skip in zip(self.controlnet_down_blocks, skips, strict=True)]
        said = [widen(one, x) for one in (*said, self.controlnet_mid_block(x))]
        return [one.mean(dim=(2, 3), keepdim=True) for one in said] if self.config.pooled else said

    def forward(
        self, x: Tensor, t: Tensor, context: Tensor, pixels: Tensor, added: tuple[Tensor, Tensor] | None = None
    ) -> list[Tensor]:
        """Latent [b, c, h, w], timesteps [b] or one for all, text [b, k, d], control picture -> residuals; see `step`."""
        temb = self.embed_time(t.expand(len(x)), added)
        return self.step(x, self.time_shifts(temb), self.keys_values(context), self.embed_hint(pixels))


# ---------------------------------------------------------------- several kinds of map


class RowAttention(nn.Module):
    """The attention of a Union's transformer, which is left with its values alone.

    The released network was built with the axes of rows and tokens exchanged: each token attends to itself in the other rows of
    the batch. They show the same map, so what it attends to is all the same: its own value. Queries and keys are in the files
    and change nothing.
    """

    def __init__(self, d: int):
        super().__init__()
        self.in_proj_weight, self.in_proj_bias = (
            nn.Parameter(torch.randn(3 * d, d) / d**0.5),
            nn.Parameter(torch.zeros(3 * d)),
        )
        self.out_proj = nn.Linear(d, d)

    def forward(self, x: Tensor) -> Tensor:
        return self.out_proj(F.linear(x, self.in_proj_weight, self.in_proj_bias).chunk(3, dim=-1)[2])


class MLP(nn.Module):
    """Widen fourfold, narrow again."""

    def __init__(self, d: int):
        super().__init__()
        self.c_fc, self.c_proj = nn.Linear(d, 4 * d), nn.Linear(4 * d, d)

    def forward(self, x: Tensor) -> Tensor:
        x = self.c_fc(x)
        return self.c_proj(x * torch.sigmoid(1.702 * x))


class RowLayer(nn.Module):
    """The layer of a Union's transformer: token [b, d] -> [b, d]."""

    def __init__(self, d: int):
        super().__init__()
        self.attn = RowAttention(d)
        self.ln_1, self.ln_2 = LayerNorm(d), LayerNorm(d)
        self.mlp = MLP(d)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class ControlNetUnion(ControlNet):
    """One ControlNet for many kinds of map. It hears beside the time which kinds it is shown; several maps' hints are summed."""

    def __init__(self, config: ControlNetConfig = SDXL_UNION):
        super().__init__(config)
        d = config.channels[0]
        self.task_embedding = nn.Parameter(torch.randn(config.kinds, d) * d**0.5)
        self.transformer_layes = nn.ModuleList([RowLayer(d)])  # as released
        self.spatial_ch_projs = nn.Linear(d, d)
        nn.init.zeros_(self.spatial_ch_projs.weight), nn.init.zeros_(self.spatial_ch_projs.bias)
        self.control_add_embedding = Embedding(config.added_time_dim * config.kinds, config.time_dim)

    def embed_labels(self, labels: Tensor | None) -> Tensor:
        """Which kinds of map are shown, 0 or 1 [b, kinds], -> embedding [b, d]. ConfigError where that is missing."""
        if labels is None:
            raise ConfigError(
                f"a ControlNet Union hears what it is shown: pass labels=, 0 or 1 [b, {self.config.kinds}]"
            )
        numbers = sinusoids(labels.flatten(), self.config.added_time_dim).reshape(len(labels), -1)
        return self.control_add_embedding(numbers.to(self.conv_in.weight.dtype))

    def shown(self, controls: Sequence[Control]) -> Tensor:
        """`labels` [1, kinds] for these controls together."""
        numbers = [UNION_KINDS[control.kind or ""] for control in controls]
        return torch.tensor([[float(number in numbers) for number in range(self.config.kinds)]])

    def embed_hint(self, pixels: Tensor, kind: str = "", scale: float = 1.0) -> Tensor:
        """A map of this kind [b, c, H, W], 0..1 -> hint [b, c, h, w]. Once a picture; hints of several maps are summed.

        `scale` is how strongly a map acts among several. A map alone is scaled by its residuals, as that of any ControlNet.
        """
        hint = self.controlnet_cond_embedding(pixels)
        token = (hint.mean(dim=(2, 3)) + self.task_embedding[UNION_KINDS[kind]]) * scale
        for layer in self.transformer_layes:
            token = layer(token)
        return hint * scale + self.spatial_ch_projs(token)[:, :, None, None] * scale
