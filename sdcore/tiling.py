"""The autoencoder in hard conditions: pictures too large for the memory, and numbers too large for fp16.

Decoded whole, a picture of 2048 x 2048 needs planes of 256 numbers a pixel, several at once: 4 GB each in fp32. Cutting the
picture into tiles would be easy if a layer looked only at its neighbourhood, as a convolution does. Two layers look further:
group norm takes the mean and variance of the whole picture, and the attention in the middle compares every place with every
other. So there are two ways, with the same module and without seams:

exact   Layer by layer. Every plane is a row of horizontal strips; a convolution goes down them, borrowing one row from the
        strip above and one from the strip below. Each strip is measured as it is made, so that when the last one is there the
        group norm that comes next knows the whole plane's mean and variance. The next layer uses strips up as it goes, so that
        there is never much more than one plane. Strips may wait in main memory while one of them is on the device. The
        attention, at an eighth of the side, is done whole. What comes out is the full decode, up to rounding.
fast    Overlapping tiles are decoded as if each were a picture, and blended where they overlap. No seams, but every tile has
        a mean and variance of its own: colours and contrast drift a little from tile to tile.

Some decoders (the first SDXL's) make numbers beyond 65,504, the largest of fp16, and then a black picture. `decode_safely` and
`encode_safely` notice, do the work again in fp32, and say so. bf16 reaches as far as fp32.

Legend: b pictures, c channels, h w height and width (of whatever level), z latent channels, f the factor between them (8).
"""

import copy
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from sdcore import ops
from sdcore.errors import ConfigError, ImageError
from sdcore.vae import VAE, GroupNorm, Moments

ROWS = 4  # latent rows of a strip: 32 rows of pixels
SIDE, OVERLAP = 64, 16  # of a tile, in latent values: 512 and 128 pixels
QUERIES = 4096  # places that look at all others at once

Layer = Any  # the class is in the function's docstring: what is in a ModuleList mypy takes for any module
Pointwise = Callable[[Tensor], Tensor]  # what is done to every pixel of a strip before a convolution looks at it


def decode(vae: VAE, z: Tensor, tiling: str | None = None) -> Tensor:
    """Latents [b, z, h, w], divided by the scaling factor -> pixels [b, 3, f h, f w]: whole (None), "exact" or "fast".

    Raises ConfigError for another word.
    """
    if _known(tiling) == "exact":
        return decode_exact(vae, z, park=parking(vae, z))
    return decode_fast(vae, z) if tiling == "fast" else vae.decode(z)


def encode(vae: VAE, pixels: Tensor, tiling: str | None = None) -> Moments:
    """Pixels [b, 3, f h, f w] in -1..1 -> mean and log-variance [b, z, h, w]: whole (None), "exact" or "fast".

    Raises ConfigError for another word; ImageError where tiles are asked for and a side is no multiple of f.
    """
    if _known(tiling) == "exact":
        return encode_exact(vae, pixels, park=parking(vae, pixels))
    return encode_fast(vae, pixels) if tiling == "fast" else vae.encode(pixels)


# ---------------------------------------------------------------- never a black picture


def decode_safely(vae: VAE, z: Tensor, tiling: str | None = None) -> tuple[Tensor, str]:
    """Latents [b, z, h, w] fp32, divided by the scaling factor -> (pixels [b, 3, f h, f w] fp32, what to tell the user or "").

    One picture after the other, to spare memory. An fp16 decoder that is known to overflow, or does, is run in fp32.
    """
    return _safely(vae, z, lambda model, one: decode(model, one, tiling).float(), "decoder")


def encode_safely(vae: VAE, pixels: Tensor, tiling: str | None = None) -> tuple[Moments, str]:
    """Pixels [b, 3, f h, f w] fp32 in -1..1 -> (mean and log-variance [b, z, h, w], what to tell the user or "")."""

    def work(model: VAE, one: Tensor) -> Tensor:
        return _wide(torch.cat(encode(model, one, tiling), dim=1))

    moments, notice = _safely(vae, pixels, work, "encoder")
    return Moments(*moments.chunk(2, dim=1)), notice


def _safely(vae: VAE, x: Tensor, work: Callable[[VAE, Tensor], Tensor], what: str) -> tuple[Tensor, str]:
    dtype = next(vae.parameters()).dtype
    known = vae.config.force_upcast and dtype == torch.float16
    if not known:
        y = torch.cat([work(vae, one) for one in x.to(dtype).split(1)])
        if dtype != torch.float16 or y.isfinite().all():
            return y, ""
    wide = copy.deepcopy(vae).float()  # 0.3 GB for as long as this takes; the model itself stays as it was
    notice = f"the {what} {'is known to overflow' if known else 'overflowed'} in float16: done in float32 instead"
    return torch.cat([work(wide, one) for one in x.float().split(1)]), notice


# ---------------------------------------------------------------- exact


class Plane:
    """All activations of one layer, as strips from top to bottom that wait for the next, and what group norm must know."""

    def __init__(self, park: torch.device):
        self.park = park  # where the strips wait
        self.strips: deque[Tensor] = deque()  # [b, c, rows, w] each
        self.means: list[Tensor] = []  # of every strip made so far: the mean of each channel [b, c], fp64 on the CPU
        self.squares: list[Tensor] = []  # and the mean of its square
        self.sizes: list[int] = []  # how many pixels it has

    def add(self, strip: Tensor) -> None:
        """Put a strip below those that are there."""
        variance, mean = (m.cpu().double() for m in torch.var_mean(_wide(strip), dim=(2, 3), correction=0))
        self.means.append(mean)
        self.squares.append(variance + mean**2)
        self.sizes.append(strip.shape[2] * strip.shape[3])
        self.strips.append(strip.to(self.park))

    def norm(self, norm: GroupNorm) -> Pointwise:
        """The group norm of the whole plane, and the SiLU after it, as a function of one strip."""
        n = torch.tensor(self.sizes, dtype=torch.float64)
        mean, square = (
            torch.einsum("s,sbc->bc", n / n.sum(), torch.stack(of_strips)).unflatten(1, (norm.num_groups, -1)).mean(2)
            for of_strips in (self.means, self.squares)
        )  # [b, groups]
        spread = (square - mean**2 + norm.eps).rsqrt()
        weight, bias = (_wide(p)[:, None, None] for p in (norm.weight, norm.bias))
        channels = norm.num_channels // norm.num_groups  # of a group
        mean, spread = (m.repeat_interleave(channels, 1)[..., None, None].to(weight) for m in (mean, spread))
        scale, shift = spread * weight, bias - mean * spread * weight  # [b, c, 1, 1]
        return lambda strip: F.silu(torch.addcmul(shift, _wide(strip), scale).to(strip.dtype))


def _wide(x: Tensor) -> Tensor:
    """In fp32 at least: half precision is too coarse for sums."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def decode_exact(vae: VAE, z: Tensor, rows: int = ROWS, park: torch.device | None = None) -> Tensor:
    """Latents [b, z, h, w], divided by the scaling factor -> pixels [b, 3, f h, f w]: `vae.decode`, up to rounding.

    A strip has `rows` latent rows; strips wait at `park`, the latents' own device if that is None.
    """
    decoder = vae.decoder
    x = middle(decoder.mid_block, decoder.conv_in(vae.post_quant_conv(z)))
    plane = cut(x, rows, park)
    del x
    for block in decoder.up_blocks:
        plane = level(block, plane, z.device)
    last = sweep(decoder.conv_out, plane, plane.norm(decoder.conv_norm_out), z.device)
    return torch.cat([y.to(z.device) for _, y in last], dim=2)


def encode_exact(vae: VAE, pixels: Tensor, rows: int = ROWS, park: torch.device | None = None) -> Moments:
    """Pixels [b, 3, f h, f w] in -1..1 -> mean and log-variance [b, z, h, w]: `vae.encode`, up to rounding.

    Raises ImageError where a side is no multiple of f.
    """
    check_sides(vae, pixels)
    encoder = vae.encoder
    plane = cut(pixels, rows * vae.config.factor, park)
    plane = convolved(encoder.conv_in, plane, None, pixels.device)
    for block in encoder.down_blocks:
        plane = level(block, plane, pixels.device)
    x = middle(encoder.mid_block, torch.cat([strip.to(pixels.device) for strip in plane.strips], dim=2))
    mean, logvar = vae.quant_conv(encoder.conv_out(encoder.conv_norm_out(x, silu=True))).chunk(2, dim=1)
    return Moments(mean, logvar.clamp(-30.0, 20.0))


def cut(x: Tensor, rows: int, park: torch.device | None) -> Plane:
    """A whole plane in strips of so many rows; the last may have fewer."""
    plane = Plane(park or x.device)
    for strip in x.split(rows, dim=2):
        plane.add(strip)
    return plane


def sweep(conv: nn.Conv2d, x: Plane, before: Pointwise | None, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """Convolve a plane from top to bottom, and use it up: (its strip, what becomes of it), one after the other.

    `before` is done to every strip first. Around the picture lie zeros, at the left and the top as many as the convolution has
    (none where it halves the side), at the right and the bottom one.
    """
    before = before or (lambda strip: strip)
    edge = int(conv.padding[0])
    above = None  # the last row of the strip before
    while x.strips:
        strip = x.strips.popleft().to(device)
        rows = [before(strip)]
        if x.strips:
            rows.append(before(x.strips[0][:, :, :1].to(device))[:, :, :1])
        bottom = rows[0][:, :, -1:]
        if above is not None:
            rows.insert(0, above)
        padding = (edge, 1, edge if above is None else 0, 0 if x.strips else 1)
        yield strip, F.conv2d(F.pad(torch.cat(rows, dim=2), padding), conv.weight, conv.bias, conv.stride)
        above = bottom if edge else None


def convolved(conv: nn.Conv2d, x: Plane, before: Pointwise | None, device: torch.device) -> Plane:
    """The plane that a convolution makes of another one."""
    out = Plane(x.park)
    for _, y in sweep(conv, x, before, device):
        out.add(y)
    return out


def resnet(block: Layer, x: Plane, device: torch.device) -> Plane:
    """`vae.Resnet.forward`. While the first convolution goes down the plane, the shortcut takes the strips it leaves behind."""
    shortcut = block.conv_shortcut if hasattr(block, "conv_shortcut") else lambda strip: strip
    h, beside = Plane(x.park), deque[Tensor]()
    for strip, y in sweep(block.conv1, x, x.norm(block.norm1), device):
        h.add(y)
        beside.append(shortcut(strip).to(x.park))
    out = Plane(x.park)
    for _, y in sweep(block.conv2, h, h.norm(block.norm2), device):
        out.add(beside.popleft().to(device) + y)
    return out


def doubled(strip: Tensor) -> Tensor:
    """Every pixel four times."""
    return F.interpolate(strip, scale_factor=2.0, mode="nearest")


def level(block: Layer, x: Plane, device: torch.device) -> Plane:
    """`vae.Level.forward`."""
    for one in block.resnets:
        x = resnet(one, x, device)
    for down in getattr(block, "downsamplers", ()):
        x = convolved(down.conv, x, None, device)
    for up in getattr(block, "upsamplers", ()):
        x = convolved(up.conv, x, doubled, device)
    return x


def middle(block: Layer, x: Tensor) -> Tensor:
    """`vae.Middle.forward`, whole: at the latent's size there are 512 numbers a value, which is 8 a pixel."""
    return block.resnets[1](attend(block.attentions[0], block.resnets[0](x)))


def attend(attention: Layer, x: Tensor) -> Tensor:
    """`vae.Attention.forward`, some queries at a time: some implementations hold all their scores in memory."""
    tokens = rearrange(attention.group_norm(x), "b c h w -> b (h w) c")
    k, v = attention.to_k(tokens), attention.to_v(tokens)
    parts = [ops.attention(attention.to_q(part), k, v, heads=1) for part in tokens.split(QUERIES, dim=1)]
    return rearrange(attention.to_out(torch.cat(parts, dim=1)), "b s c -> b c s").reshape(x.shape) + x


# ---------------------------------------------------------------- fast


def decode_fast(vae: VAE, z: Tensor, side: int = SIDE, overlap: int = OVERLAP) -> Tensor:
    """Latents [b, z, h, w], divided by the scaling factor -> pixels [b, 3, f h, f w] of blended tiles: nearly `vae.decode`."""
    return blended(vae.decode, z, 1, vae.config.factor, side, overlap)


def encode_fast(vae: VAE, pixels: Tensor, side: int = SIDE, overlap: int = OVERLAP) -> Moments:
    """Pixels [b, 3, f h, f w] in -1..1 -> mean and log-variance [b, z, h, w] of blended tiles: nearly `vae.encode`.

    Raises ImageError where a side is no multiple of f.
    """
    check_sides(vae, pixels)
    moments = blended(lambda tile: torch.cat(vae.encode(tile), dim=1), pixels, vae.config.factor, 1, side, overlap)
    return Moments(*moments.chunk(2, dim=1))


def blended(model: Callable[[Tensor], Tensor], x: Tensor, a: int, b: int, side: int, overlap: int) -> Tensor:
    """What a model makes of x [n, c, a h, a w], tile by tile: [n, c', b h, b w]. A tile's side and overlap are in h and w.

    Where tiles overlap each counts the more the farther a place is from its border.
    """
    h, w = x.shape[2] // a, x.shape[3] // a
    total = torch.zeros(b * h, b * w, device=x.device)
    out = None
    for top in starts(h, side, overlap):
        for left in starts(w, side, overlap):
            y = model(x[:, :, a * top : a * (top + side), a * left : a * (left + side)])
            weight = ramp(y.shape[2], b * overlap)[:, None] * ramp(y.shape[3], b * overlap)
            weight = weight.to(x.device)
            if out is None:
                out = torch.zeros(*y.shape[:2], b * h, b * w, device=x.device)
            there = (..., slice(b * top, b * top + y.shape[2]), slice(b * left, b * left + y.shape[3]))
            out[there] += weight * y
            total[there] += weight
    assert out is not None  # there is a tile at least
    return (out / total).to(x.dtype)


def starts(length: int, side: int, overlap: int) -> list[int]:
    """Where tiles begin so that they cover a length, each whole, each over the next by `overlap` or (the last) more."""
    return [*range(0, length - side, side - overlap), max(length - side, 0)]


def ramp(n: int, overlap: int) -> Tensor:
    """1, 2, 3 ... up to the overlap, and at the end down again [n]."""
    up = torch.arange(1.0, n + 1)
    return torch.minimum(up, up.flip(0)).clamp(max=overlap)


# ---------------------------------------------------------------- arguments


def _known(tiling: str | None) -> str | None:
    if tiling not in (None, "exact", "fast"):
        raise ConfigError(f"tiling: expected exact, fast or None, found {tiling!r:.80}")
    return tiling


def check_sides(vae: VAE, pixels: Tensor) -> None:
    """Raise ImageError where a side is no multiple of f."""
    h, w = pixels.shape[2:]
    if h % vae.config.factor or w % vae.config.factor:
        raise ImageError(f"pixels: expected sides that are multiples of {vae.config.factor}, found {w} x {h}")


def parking(vae: VAE, x: Tensor) -> torch.device:
    """Where strips wait: main memory, if a GPU's free memory does not hold the largest plane of latents or pixels x twice."""
    if x.device.type != "cuda":
        return x.device
    sides = x.shape[2] * x.shape[3] * (1 if x.shape[1] == 3 else vae.config.factor**2)
    plane = len(x) * max(vae.config.channels[:2]) * sides * x.element_size()
    return x.device if 2 * plane < torch.cuda.mem_get_info(x.device)[0] else torch.device("cpu")
