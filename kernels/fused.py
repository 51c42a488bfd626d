"""Layers that compute with prepared weights, and how they take their places in a model without touching it.

A model holds its weights as released: one matrix for q, one for k, one for v, taps in the order [o, c, 3, 3]. What runs faster is
often the same numbers laid out otherwise. A layer of this file stands in the place of a released one, holds it, and prepares what
it computes with from that layer's weights when first asked. `mirror` gives a copy of a model in which such layers stand; all
others are shared, not copied. The model itself stays as it is, and what is attached to it acts on both.

    Attention       q, k and v of the picture in one matrix product; k and v of the text in one
    Convolution     on a CPU by `winograd`; elsewhere PyTorch's, with the weights channels last
    UpsampleConv    nearest upsampling and convolution in one: on a CPU by `winograd`, elsewhere as four parity convolutions

Every prepared weight comes through `weight_of`, so adapters are in it. `refresh` has those layers prepare again whose weights or
adapters are others than before.

Legend: b batch, c input channels, o output channels, h w height and width, d width.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from sdcore.kernels import upsample_conv, winograd
from torch import Tensor, nn

from sdcore import lora, ops, unet, vae, variants

SMALL_MAP = 16  # tiles of 2 x 2 outputs; on fewer, nine taps at once are as fast as Winograd and need less memory
FEW = 16  # channels; with fewer a matrix product is not worth its preparation


def weight_of(module: nn.Module) -> Tensor:
    """The weight that a layer acts with, adapters included; without any, the parameter itself."""
    return lora.effective_weight(module)


def bias_of(module: nn.Module) -> Tensor | None:
    """The bias that a layer acts with, or None."""
    return lora.effective_bias(module)


class Prepared(nn.Module):
    """A layer that works with tensors made of the weights of the layers it holds, made when first asked and kept."""

    def __init__(self):
        super().__init__()
        self.ready: dict[str, Any] = {}
        self.made_of: list[Mark] = []

    def prepared(self, name: str, make: Callable[[], Any]) -> Any:
        """What `make` gives, made once."""
        if name not in self.ready:
            with torch.no_grad():
                self.ready[name] = make()
            self.made_of = self.marks()
        return self.ready[name]

    def marks(self) -> list["Mark"]:
        """All tensors that the held layers compute with now, the adapters' included, and their states."""
        return [(t, t._version, t.data_ptr()) for t in (*self.parameters(), *self.buffers())]

    def refresh(self) -> bool:
        """Prepare again when next asked, if the weights are others now; True then.

        Exchanged tensors and changes in place are noticed, but not what is written past autograd, through `.data`.
        """
        now = self.marks()
        same = len(now) == len(self.made_of) and all(
            a is b and i == j and p == q for (a, i, p), (b, j, q) in zip(now, self.made_of, strict=True)
        )
        if self.ready and not same:
            self.ready.clear()
            return True
        return False


Mark = tuple[Tensor, int, int]  # a tensor (kept, so that no other can take its place), its version and its address


def side_by_side(*layers: nn.Module) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of the one linear layer that gives the outputs of all of these, one after the other."""
    biases = [bias_of(layer) for layer in layers]
    weights = [weight_of(layer) for layer in layers]
    if all(bias is None for bias in biases):
        return torch.cat(weights), None
    return torch.cat(weights), torch.cat(
        [w.new_zeros(len(w)) if b is None else b for b, w in zip(biases, weights, strict=True)]
    )


class Attention(unet.Attention, Prepared):
    """`unet.Attention` with its projections fused."""

    def __init__(self, source: unet.Attention):
        Prepared.__init__(self)
        self.heads, self.upcast, self.cross = source.heads, source.upcast, source.cross
        self.to_q, self.to_k, self.to_v, self.to_out = source.to_q, source.to_k, source.to_v, source.to_out

    def keys_values(self, context: Tensor) -> unet.KeysValues:
        k, v = F.linear(context, *self.prepared("kv", lambda: side_by_side(self.to_k, self.to_v))).chunk(2, dim=-1)
        return k.contiguous(), v.contiguous()  # once a picture; read in every step

    def forward(self, x: Tensor, keys_values: unet.KeysValues | None = None) -> Tensor:
        if keys_values is not None:
            return super().forward(x, keys_values)
        layers = (self.to_q, self.to_k, self.to_v)
        q, k, v = F.linear(x, *self.prepared("qkv", lambda: side_by_side(*layers))).chunk(3, dim=-1)
        return self.to_out(ops.attention(q, k, v, self.heads, upcast=self.upcast))


class Convolution(Prepared):
    """A convolution of 3 x 3 taps with padding 1, or of one tap. x [b, c, h, w] channels last -> [b, o, h', w'] channels last."""

    source: nn.Conv2d

    def __init__(self, source: nn.Conv2d):
        super().__init__()
        self.source = source

    def forward(self, x: Tensor) -> Tensor:
        taps, stride = self.source.kernel_size[0], self.source.stride[0]
        bias = self.prepared("bias", lambda: bias_of(self.source))
        if not multiplies_itself(x) or min(self.source.out_channels, self.source.in_channels * taps**2) < FEW:
            weight = self.prepared("last", lambda: self.weight().contiguous(memory_format=torch.channels_last))
            return F.conv2d(x, weight, bias, stride, taps // 2)
        if taps == 1:
            weight = self.prepared("one", lambda: self.weight().flatten(1))
            return F.linear(x.permute(0, 2, 3, 1), weight, bias).permute(0, 3, 1, 2)
        if stride > 1 or self.source.in_channels < FEW or tiles(x) <= SMALL_MAP:
            matrix = self.prepared("matrix", lambda: winograd.as_matrix(self.weight()))
            return winograd.conv_as_product(x, matrix, bias, stride)
        return winograd.conv3x3(x, self.prepared("transformed", lambda: winograd.transform(self.weight())), bias)

    def weight(self) -> Tensor:
        return weight_of(self.source)


class UpsampleConv(Prepared):
    """`unet.Upsample` and `vae.Upsample`: doubling by repetition and the convolution behind it. Channels last."""

    conv: Convolution

    def __init__(self, source: unet.Upsample | vae.Upsample):
        super().__init__()
        self.conv = Convolution(source.conv)

    def forward(self, x: Tensor, size: torch.Size | None = None) -> Tensor:
        if size is not None and tuple(size) != (2 * x.shape[-2], 2 * x.shape[-1]):  # halving had rounded up
            return self.conv(F.interpolate(x, size=size, mode="nearest"))
        bias = self.prepared("bias", lambda: bias_of(self.conv.source))
        if multiplies_itself(x):
            transformed = self.prepared("transformed", lambda: winograd.transform_upsampled(self.conv.weight()))
            return winograd.upsample_conv3x3(x, transformed, bias)
        return upsample_conv.upsample_conv(x, self.prepared("folded", self.folded), bias)

    def folded(self) -> Tensor:
        return upsample_conv.fold(self.conv.weight()).contiguous(memory_format=torch.channels_last)


def multiplies_itself(x: Tensor) -> bool:
    """Whether convolutions are made of matrix products: on a CPU in fp32, where that was measured to be faster."""
    return x.device.type == "cpu" and x.dtype == torch.float32


def tiles(x: Tensor) -> int:
    """How many 2 x 2 outputs there are."""
    return len(x) * -(-x.shape[-2] // 2) * -(-x.shape[-1] // 2)


def replacement(module: nn.Module) -> Prepared | None:
    """The faster layer for a released one; None where it stays."""
    if isinstance(module, unet.Attention):
        return Attention(module)
    if isinstance(module, (unet.Upsample, vae.Upsample)):
        return UpsampleConv(module)
    if isinstance(module, nn.Conv2d) and (module.kernel_size, module.padding) in (((3, 3), (1, 1)), ((1, 1), (0, 0))):
        return Convolution(module)
    return None


def mirror(module: nn.Module, replace: Callable[[nn.Module], nn.Module | None] = replacement) -> nn.Module:
    """A copy of a model that shares all its layers but those that `replace` gives another for."""
    return variants.mirror(module, replace)


def refresh(model: nn.Module) -> bool:
    """Have the layers of a mirror prepare again whose weights have changed. True where there were any."""
    return any([module.refresh() for module in model.modules() if isinstance(module, Prepared)])
