"""3 x 3 convolutions in fewer multiplications, out of matrix products: what the engine runs on a CPU. Plain PyTorch.

Two neighbouring outputs of a filter with three taps g read four inputs d and cost six multiplications. Four are enough:

    m0 = (d0 - d2) g0    m1 = (d1 + d2) (g0 + g1 + g2) / 2    m2 = (d2 - d1) (g0 - g1 + g2) / 2    m3 = (d1 - d3) g2
    y0 = m0 + m1 + m2    y1 = m1 - m2 - m3

In two dimensions 2 x 2 outputs cost 16 multiplications in place of 36. With channels, every multiplication is a matrix product
over all tiles of the picture: 16 of them, one for each place of the 4 x 4 tile. `conv3x3` does that.

Behind a nearest upsampling d1 = d2, so m2 is zero: with x the small picture, and D[i] = x[i - 1] - x[i],

    y[2 i] = D[i] g0 + x[i] (g0 + g1 + g2)        y[2 i + 1] = x[i] (g0 + g1 + g2) - D[i + 1] g2

which is nine products for the 2 x 2 outputs of a small pixel, in place of 36 (or of the 16 of four parity convolutions), and the
large picture is never made. `upsample_conv3x3` does that.

On maps too small for tiles one matrix product over all nine taps is fastest (`conv_as_product`): PyTorch's own convolution
reorders its weights at every call, which takes longer than the convolution itself. In fp32 all three are closer to fp64 than
PyTorch's convolution is, which adds 9 c products one after the other.

Source: Winograd 1980, Arithmetic Complexity of Computations; Lavin & Gray 2016 (1509.09308), equations 5 to 9 for the first.

Legend: b batch, c input channels, o output channels, h w height and width, s rows of tiles in work at once, t tiles in a row.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

TILES = 512  # in work at once: what they need should stay in the cache

# The two lines of equations above, for the taps and for the outputs; those of the inputs are `_across`.
TAPS = torch.tensor([[1, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]])
OUTPUTS = torch.tensor([[1.0, 1, 1, 0], [0, 1, -1, -1]])
UPSAMPLED_TAPS = torch.tensor([[1.0, 0, 0], [1, 1, 1], [0, 0, -1]])


# ------------------------------------------------------------------------------------------------ any 3 x 3 convolution


def transform(weight: Tensor) -> Tensor:
    """Taps [o, c, 3, 3] -> the 16 matrices [16, c, o] of `conv3x3`, column of the tile first; 16/9 of the memory."""
    o, c = weight.shape[:2]
    return (torch.kron(TAPS, TAPS).to(weight) @ _taps(weight)).view(16, c, o)


def conv3x3(x: Tensor, transformed: Tensor, bias: Tensor | None = None) -> Tensor:
    """A convolution with padding 1 and stride 1: x [b, c, h, w] -> [b, o, h, w], channels last; bias [o]."""
    (b, c, h, w), o = x.shape, transformed.shape[-1]
    rows, t = (h + 1) // 2, (w + 1) // 2
    padded = F.pad(x.permute(0, 2, 3, 1), (0, 0, 1, 1 + w % 2, 1, 1 + h % 2))  # b h w c, zeros around, sides even
    out = x.new_empty(b, rows, 2, t, 2, o)
    outputs = torch.kron(OUTPUTS, OUTPUTS).to(x)
    for n, i in chunks(b, rows, t):
        down = _differences(padded[n, 2 * i.start : 2 * i.stop + 2])  # 4 b s w c
        tiles = _differences(down.flatten(0, 2))  # 4 (4 b s) t c
        products = torch.bmm(tiles.view(16, -1, c), transformed)
        y = (outputs @ products.view(16, -1)).view(2, 2, -1, i.stop - i.start, t, o).permute(2, 3, 1, 4, 0, 5)
        torch.add(y, 0 if bias is None else bias, out=out[n, i])
    return out.view(b, 2 * rows, 2 * t, o)[:, :h, :w].contiguous().permute(0, 3, 1, 2)


def _taps(weight: Tensor) -> Tensor:
    """[o, c, 3, 3] -> [9, c o], column first."""
    return weight.permute(3, 2, 1, 0).reshape(9, -1)


def _differences(d: Tensor) -> Tensor:
    """d0 - d2, d1 + d2, d2 - d1, d1 - d3 of every tile: [m, 2 n + 2, ...] -> [4, m, n, ...]."""
    n = d.shape[1] // 2 - 1
    d0, d1, d2, d3 = (d[:, k : k + 2 * n : 2] for k in range(4))
    out = d.new_empty(4, *d0.shape)
    torch.sub(d0, d2, out=out[0])
    torch.add(d1, d2, out=out[1])
    torch.sub(d2, d1, out=out[2])
    torch.sub(d1, d3, out=out[3])
    return out


def chunks(b: int, rows: int, t: int) -> Iterator[tuple[slice, slice]]:
    """Which pictures and which rows of tiles to work on at once: about TILES tiles."""
    n, s = max(1, TILES // (rows * t)), max(1, TILES // t)
    for k in range(0, b, n):
        for i in range(0, rows, s):
            yield slice(k, k + n), slice(i, min(i + s, rows))


# ------------------------------------------------------------------------------------------------ behind an upsampling


def transform_upsampled(weight: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Taps [o, c, 3, 3] -> the matrices of `upsample_conv3x3`: [c, 4 o], [c, 2 o], [c, 2 o] and [c, o]; as large as the taps."""
    o, c = weight.shape[:2]
    g = (torch.kron(UPSAMPLED_TAPS, UPSAMPLED_TAPS).to(weight) @ _taps(weight)).view(3, 3, c, o)  # column, row

    def beside(*matrices: Tensor) -> Tensor:
        return torch.cat(matrices, dim=1).contiguous()

    return (
        beside(g[0, 0], g[2, 0], g[0, 2], g[2, 2]),
        beside(g[1, 0], g[1, 2]),
        beside(g[0, 1], g[2, 1]),
        g[1, 1].clone(),
    )


def upsample_conv3x3(
    x: Tensor, transformed: tuple[Tensor, Tensor, Tensor, Tensor], bias: Tensor | None = None
) -> Tensor:
    """Nearest upsampling by 2, then a convolution with padding 1: x [b, c, h, w] -> [b, o, 2 h, 2 w], channels last; bias [o]."""
    b, c, h, w = x.shape
    corner, vertical, horizontal, centre = transformed
    o = centre.shape[-1]
    padded = F.pad(x.permute(0, 2, 3, 1), (0, 0, 1, 1, 1, 1))  # b h w c, zeros around
    out = x.new_empty(b, h, 2, w, 2, o)
    for n, i in chunks(b, h, w):
        z = padded[n, i.start : i.stop + 2]
        s = i.stop - i.start
        d = z[:, :-1] - z[:, 1:]  # differences down: one row more than there are pixels
        both = ((d[:, :, :-1] - d[:, :, 1:]) @ corner).view(-1, s + 1, w + 1, 2, 2, o)
        down = (d[:, :, 1:-1] @ vertical).view(-1, s + 1, w, 2, o)
        right = ((z[:, 1:-1, :-1] - z[:, 1:-1, 1:]) @ horizontal).view(-1, s, w + 1, 2, o)
        middle = z[:, 1:-1, 1:-1] @ centre
        if bias is not None:
            middle += bias
        for p in (0, 1):  # row of the four outputs
            row = middle + down[:, p : p + s, :, p]
            for q in (0, 1):  # and column
                out[n, i, p, :, q] = row + right[:, :, q : q + w, q] + both[:, p : p + s, q : q + w, p, q]
    return out.view(b, 2 * h, 2 * w, o).permute(0, 3, 1, 2)


# ------------------------------------------------------------------------------------------------ small maps, and stride 2


def as_matrix(weight: Tensor) -> Tensor:
    """Taps [o, c, 3, 3] -> [o, 9 c]: for channels-last taps the same memory."""
    return weight.permute(0, 2, 3, 1).reshape(len(weight), -1)


def conv_as_product(x: Tensor, matrix: Tensor, bias: Tensor | None = None, stride: int = 1) -> Tensor:
    """A 3 x 3 convolution with padding 1: x [b, c, h, w] -> [b, o, h / stride, w / stride] rounded up; bias [o]."""
    h, w = x.shape[-2:]
    padded = F.pad(x.permute(0, 2, 3, 1), (0, 0, 1, 1, 1, 1))
    windows = torch.cat([padded[:, i : i + h : stride, j : j + w : stride] for i in range(3) for j in range(3)], dim=-1)
    return F.linear(windows, matrix, bias).permute(0, 3, 1, 2)
