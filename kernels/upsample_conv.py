"""Nearest 2x upsampling followed by a 3 x 3 convolution, as 2 x 2 convolutions of the small picture: 4 taps in place of 9.

Behind a nearest upsampling the window of a 3 x 3 convolution covers only 2 x 2 different pixels, and which of its taps fall on
the same pixel depends on nothing but whether the row and the column are even or odd. Adding up those taps beforehand gives four
2 x 2 kernels, one a parity, and the upsampled picture is never made:

    out[2 i]     = W0 x[i - 1] + (W1 + W2) x[i]            W0 W1 W2: the taps of one axis; likewise for the other axis
    out[2 i + 1] = (W0 + W1) x[i] + W2 x[i + 1]

The zeros around the upsampled picture become zeros around the small one, so the borders need no care. Multiplications fall to
4/9. In exact arithmetic the result is the same. In floating point it differs by rounding: `fold` adds taps in fp64 and rounds
once to the dtype of the weight, half an ulp of a sum of up to four taps, and the convolution adds fewer, larger products.
Against fp64 the error is of the size of the plain convolution's own: the tests hold it to twice that.

This file is PyTorch and runs anywhere; `sdcore.kernels.conv` has the kernel that writes all four parities itself.

Source: Aitken et al. 2017 (1707.02937), section 3, where the same equality serves to initialise sub-pixel convolutions.

Legend: b batch, c input channels, o output channels, h w height and width of the small picture.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

# Which of the two taps of the small picture each of the three taps of the large one falls on: [parity, small tap, large tap].
TAPS = torch.tensor([[[1, 0, 0], [0, 1, 1]], [[1, 1, 0], [0, 0, 1]]], dtype=torch.float64)


def reference(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """What `upsample_conv` means: x [b, c, h, w], weight [o, c, 3, 3], bias [o] -> [b, o, 2 h, 2 w]."""
    return F.conv2d(F.interpolate(x, scale_factor=2.0, mode="nearest"), weight, bias, padding=1)


def fold(weight: Tensor) -> Tensor:
    """The four 2 x 2 kernels: weight [o, c, 3, 3] -> [4 o, c, 2, 2], parities (row, column) outermost.

    Summed in fp64, rounded once to the dtype of the weight. Differentiable.
    """
    taps = TAPS.to(weight.device)
    folded = torch.einsum("pik,qjl,ockl->pqocij", taps, taps, weight.double())
    return folded.flatten(0, 2).to(weight.dtype).contiguous()


def upsample_conv(x: Tensor, folded: Tensor, bias: Tensor | None = None) -> Tensor:
    """`reference` with the weights that `fold` made: x [b, c, h, w], folded [4 o, c, 2, 2], bias [o] -> [b, o, 2 h, 2 w].

    One convolution with the zeros of both sides gives all parities at (h + 1) (w + 1) places, of which every parity uses h w:
    the even ones those that look up and left, the odd ones those that look down and right. The layout of x stays.
    """
    (b, _, h, w), o = x.shape, len(folded) // 4
    wide = F.conv2d(x, folded, None if bias is None else bias.repeat(4), padding=1)
    last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    layout = torch.channels_last if last else torch.contiguous_format
    out = torch.empty((b, o, 2 * h, 2 * w), dtype=x.dtype, device=x.device, memory_format=layout)
    for parity, part in enumerate(wide.split(o, dim=1)):
        row, column = divmod(parity, 2)
        out[:, :, row::2, column::2] = part[:, :, row : row + h, column : column + w]
    return out
