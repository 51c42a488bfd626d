"""Layers that compute with prepared weights, and how they take their places in a model without touching it.

A model holds its weights as released: one matrix for q, one for k, one for v, taps in the order [o, c, 3, 3]. What runs faster is
often the same numbers laid out otherwise. A layer of this file stands in the place of a released one, holds it, and prepares what
it computes with from that layer's weights when first asked. `mirror` gives a copy of a model in which such layers stand; all
others are shared, not copied. The model itself stays as it is, and what is attached to it acts on both.

    Attention       q, k and v of the picture in one matrix product; k and v of the text in one
    FeedForward     the gate behind its first product and the shortcut behind its second handed over with them
    Resnet          the time's shift and the shortcut handed over with the convolutions
    Convolution     on a CPU by `winograd`; elsewhere with the weights channels last
    UpsampleConv    nearest upsampling and convolution in one: on a CPU by `winograd`, elsewhere as four parity convolutions

Who runs the products is a `products.Products`, one for a mirror.

Every prepared weight comes through `weight_of`, so adapters are in it. `refresh` has those layers prepare again whose weights or
adapters are others than before.

Legend: b batch, c input channels, o output channels, h w height and width, d width.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from sdcore.kernels import upsample_conv, winograd
from sdcore.kernels.products import PYTORCH, Products
from torch import Tensor, nn

from sdcore import lora, ops, unet, vae, variants
from sdcore.unet import KeysValues, widen

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

    def __init__(self, products: Products = PYTORCH):
        super().__init__()
        self.products = products
        self.ready: dict[str, Any] = {}
        self.made_of: list[Mark] = []

    def prepared(self, name: str, make: Callable[[], Any]) -> Any:
        """What `make` gives, made once."""
        if name not in self.ready:
            with torch.no_grad():
                self.ready[name] = make()
            self.made_of = self.marks()
        return self.ready[name]

    def linear(
        self, x: Tensor, name: str, *layers: nn.Module, residual: Tensor | None = None, gated: bool = False
    ) -> Tensor:
        """The outputs of linear layers, one after the other, in one product; `name` is that of their weight here."""

        def make() -> tuple[Any, Tensor | None]:
            weight, bias = side_by_side(*layers)
            return self.products.keep(weight), bias

        return self.products.linear(x, *self.prepared(name, make), residual, gated)

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
    if len(layers) == 1:
        return weight_of(layers[0]), bias_of(layers[0])
    biases = [bias_of(layer) for layer in layers]
    weights = [weight_of(layer) for layer in layers]
    if all(bias is None for bias in biases):
        return torch.cat(weights), None
    return torch.cat(weights), torch.cat(
        [w.new_zeros(len(w)) if b is None else b for b, w in zip(biases, weights, strict=True)]
    )


class Attention(unet.Attention, Prepared):
    """`unet.Attention` with its projections fused; `residual` [b, s, d] is added to what it gives."""

    def __init__(self, source: unet.Attention, products: Products = PYTORCH):
        Prepared.__init__(self, products)
        self.heads, self.upcast, self.cross = source.heads, source.upcast, source.cross
        self.to_q, self.to_k, self.to_v, self.to_out = source.to_q, source.to_k, source.to_v, source.to_out

    def keys_values(self, context: Tensor) -> KeysValues:
        k, v = F.linear(context, *self.prepared("kv", lambda: side_by_side(self.to_k, self.to_v))).chunk(2, dim=-1)
        return k.contiguous(), v.contiguous()  # once a picture; read in every step

    def forward(self, x: Tensor, keys_values: KeysValues | None = None, residual: Tensor | None = None) -> Tensor:
        if keys_values is None:
            q, k, v = self.linear(x, "qkv", self.to_q, self.to_k, self.to_v).chunk(3, dim=-1)
            pictures: list[Tensor] = []
        else:
            k, v, *pictures = keys_values
            q = widen(self.linear(x, "q", self.to_q), k)
        y = ops.attention(q, k, v, self.heads, upcast=self.upcast)
        for k, v, weight in zip(pictures[::3], pictures[1::3], pictures[2::3], strict=True):
            y = y + weight * ops.attention(q, k, v, self.heads, upcast=self.upcast)
        return self.linear(y, "out", self.to_out[0], residual=None if residual is None else widen(residual, y))


class Linear(Prepared):
    """A linear layer by itself."""

    source: nn.Linear

    def __init__(self, source: nn.Linear, products: Products = PYTORCH):
        super().__init__(products)
        self.source = source

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x, "weight", self.source)


class FeedForward(Prepared):
    """`unet.FeedForward`, and what it is added to."""

    net: nn.Sequential

    def __init__(self, source: unet.FeedForward, products: Products = PYTORCH):
        super().__init__(products)
        self.net = source.net

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        gate: unet.GEGLU = self.net[0]  # type: ignore[assignment]
        return self.linear(self.linear(x, "in", gate.proj, gated=True), "out", self.net[2], residual=residual)


class TransformerLayer(unet.TransformerLayer):
    """`unet.TransformerLayer` that hands its shortcuts over to the products before them."""

    ff: FeedForward  # type: ignore[assignment]

    def forward(self, x: Tensor, kv: Iterator[KeysValues]) -> Tensor:
        return self.behind(self.look(self.attn1, self.norm1(x), next(kv) if self.attn1.cross else None, x), kv)

    def behind(self, x: Tensor, kv: Iterator[KeysValues]) -> Tensor:
        """What comes after the first attention."""
        x = self.look(self.attn2, self.norm2(x), next(kv), x)
        return self.ff(self.norm3(x), residual=x)

    def look(self, attention: nn.Module, tokens: Tensor, keys_values: KeysValues | None, x: Tensor) -> Tensor:
        """An attention's answer on top of x."""
        if isinstance(attention, Attention):  # not where guidance has put another in its place
            return attention(tokens, keys_values, x)
        y = attention(tokens, keys_values)
        return y + widen(x, y)


class Convolution(Prepared):
    """A convolution of 3 x 3 taps with padding 1, or of one tap, and what is added behind it: a shift a channel, a picture.

    x [b, c, h, w] channels last, shift [b, o, 1, 1], residual [b, o, h', w'] -> [b, o, h', w'] channels last.
    """

    source: nn.Conv2d

    def __init__(self, source: nn.Conv2d, products: Products = PYTORCH):
        super().__init__(products if min(source.in_channels, source.out_channels) >= FEW else products.exact)
        self.source = source

    def forward(self, x: Tensor, shift: Tensor | None = None, residual: Tensor | None = None) -> Tensor:
        conv, keep = self.source, self.products.keep
        taps, stride = conv.kernel_size[0], conv.stride[0]
        bias = self.prepared("bias", lambda: bias_of(conv))
        few = min(conv.out_channels, conv.in_channels * taps**2) < FEW
        if taps == 1 and not few and shift is None:
            weight = self.prepared("one", lambda: keep(self.weight().flatten(1)))
            beside = None if residual is None else residual.permute(0, 2, 3, 1)
            return self.products.linear(x.permute(0, 2, 3, 1), weight, bias, beside).permute(0, 3, 1, 2)
        if few or not (self.products.winograd and multiplies_itself(x)):
            weight = self.prepared("last", lambda: keep(self.weight().contiguous(memory_format=torch.channels_last)))
            return self.products.conv(x, weight, bias, shift, residual, stride, taps // 2)
        if stride > 1 or conv.in_channels < FEW or tiles(x) <= SMALL_MAP:
            matrix = self.prepared("matrix", lambda: winograd.as_matrix(self.weight()))
            y = winograd.conv_as_product(x, matrix, bias, stride)
        else:
            transformed = self.prepared("transformed", lambda: winograd.transform(self.weight()))
            y = winograd.conv3x3(x, transformed, bias)
        y = y if shift is None else y + shift
        return y if residual is None else y + residual

    def weight(self) -> Tensor:
        return weight_of(self.source)


class Resnet(unet.Resnet):
    """`unet.Resnet` that hands shift and shortcut over to the convolutions before them."""

    def forward(self, x: Tensor, shift: Tensor) -> Tensor:
        h = self.norm1(x, silu=True)
        if len(shift) > len(x):  # the branches of guidance part here
            h = widen(self.conv1(h), shift) + shift
        else:
            h = self.conv1(h, shift.expand(len(x), -1, 1, 1).contiguous())
        beside = self.conv_shortcut(x) if hasattr(self, "conv_shortcut") else x
        return self.conv2(self.norm2(h, silu=True), None, widen(beside, h))


class DecoderResnet(vae.Resnet):
    """`vae.Resnet` that hands its shortcut over to the convolution before it."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(self.norm1(x, silu=True))
        beside = self.conv_shortcut(x) if hasattr(self, "conv_shortcut") else x
        return self.conv2(self.norm2(h, silu=True), None, beside)


class UpsampleConv(Prepared):
    """`unet.Upsample` and `vae.Upsample`: doubling by repetition and the convolution behind it. Channels last."""

    conv: Convolution

    def __init__(self, source: unet.Upsample | vae.Upsample, products: Products = PYTORCH):
        super().__init__(products)
        self.conv = Convolution(source.conv, products)

    def forward(self, x: Tensor, size: torch.Size | None = None) -> Tensor:
        if size is not None and tuple(size) != (2 * x.shape[-2], 2 * x.shape[-1]):  # halving had rounded up
            return self.conv(F.interpolate(x, size=size, mode="nearest"))
        bias = self.prepared("bias", lambda: bias_of(self.conv.source))
        if self.products.winograd and multiplies_itself(x):
            transformed = self.prepared("transformed", lambda: winograd.transform_upsampled(self.conv.weight()))
            return winograd.upsample_conv3x3(x, transformed, bias)
        return self.products.upsample(x, self.prepared("folded", self.folded), bias)

    def folded(self) -> Tensor:
        return upsample_conv.fold(self.conv.weight()).contiguous(memory_format=torch.channels_last)


def multiplies_itself(x: Tensor) -> bool:
    """Whether convolutions are made of matrix products: on a CPU in fp32, where that was measured to be faster."""
    return x.device.type == "cpu" and x.dtype == torch.float32


def tiles(x: Tensor) -> int:
    """How many 2 x 2 outputs there are."""
    return len(x) * -(-x.shape[-2] // 2) * -(-x.shape[-1] // 2)


# In the place of a block stands another that calls the same layers otherwise, with the layers in it replaced.
BLOCKS: dict[type, type] = {
    unet.Resnet: Resnet,
    unet.TransformerLayer: TransformerLayer,
    unet.Transformer: unet.Transformer,
    vae.Resnet: DecoderResnet,
}


def replacement(products: Products = PYTORCH) -> Callable[[nn.Module], nn.Module | None]:
    """Says of a released layer or block which faster one takes its place, None where it stays.

    Where the products are lossy, these keep their precision: convolutions that see or make fewer than 16 channels (the first and
    the last, which stand before the sampler); shortcuts, through which goes what no norm has touched; what doubles the side, four
    taps of which cost less than nine of half the width; and what is worked out once a picture (keys and values of the text) or
    hardly costs anything (the time).
    """

    def replace(module: nn.Module) -> nn.Module | None:
        if type(module) in BLOCKS:
            own = {"conv_shortcut": exact, "proj_in": projection, "proj_out": projection}
            return recast(module, BLOCKS[type(module)], own)
        if isinstance(module, unet.Attention):
            return Attention(module, products)
        if isinstance(module, unet.FeedForward):
            return FeedForward(module, products)
        if isinstance(module, (unet.Upsample, vae.Upsample)):
            return UpsampleConv(module, products.exact)
        return convolution(module, products)

    def projection(module: nn.Module) -> nn.Module | None:
        return Linear(module, products) if isinstance(module, nn.Linear) else replace(module)

    def exact(module: nn.Module) -> nn.Module | None:
        return convolution(module, products.exact)

    def recast(block: nn.Module, kind: type, own: dict[str, Callable]) -> nn.Module:
        children = {name: mirror(child, own.get(name, replace)) for name, child in block.named_children()}
        twin = variants.with_children(block, children)
        twin.__class__ = kind
        return twin

    return replace


def convolution(module: nn.Module, products: Products) -> Convolution | None:
    """The faster convolution for a released one; None where it stays, and for what is no convolution."""
    if isinstance(module, nn.Conv2d) and (module.kernel_size, module.padding) in (((3, 3), (1, 1)), ((1, 1), (0, 0))):
        return Convolution(module, products)
    return None


def mirror(module: nn.Module, replace: Callable[[nn.Module], nn.Module | None] | None = None) -> nn.Module:
    """A copy of a model that shares all its layers but those that `replace` (`replacement()`) gives another for."""
    return variants.mirror(module, replace or replacement())


def refresh(model: nn.Module) -> bool:
    """Have the layers of a mirror prepare again whose weights have changed. True where there were any."""
    return any([module.refresh() for module in model.modules() if isinstance(module, Prepared)])
