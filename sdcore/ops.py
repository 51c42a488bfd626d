"""The operations that a kernel may replace, each written as the PyTorch that defines it.

This file is the seam between the models and the kernels. A model calls `ops.geglu(x)`; the body below is what that means, and is
at once the CPU path, the shape function, the backward that is recomputed and the oracle of the kernel's tests. `using` puts
another implementation with the same signature in its place for the length of a `with` block:

    with ops.using(geglu=my_geglu):
        picture = pipe("a red circle")

Operations take activations (a norm's scale and shift excepted), never the weight of a projection: a LoRA on that projection
therefore cannot be lost. A replacement that has an `accepts(...)` predicate is asked first; what it refuses runs as written here.

Legend: b batch, c channels, h w height and width, s query tokens, k key tokens, d width of all heads together.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

_in_use: dict[str, Callable] = {}  # name of an operation -> what replaces it just now
REFERENCES: dict[str, Callable] = {}  # name of an operation -> its definition, without the seam


def _operation(reference: Callable) -> Callable:
    """Make a definition replaceable."""
    name = reference.__name__
    REFERENCES[name] = reference

    @wraps(reference)
    def call(*args, **kwargs):
        kernel = _in_use.get(name)
        if kernel is None:
            return reference(*args, **kwargs)
        accepts = getattr(kernel, "accepts", None)
        if accepts is not None and not accepts(*args, **kwargs):
            return reference(*args, **kwargs)
        return kernel(*args, **kwargs)

    return call


@contextmanager
def using(**kernels: Callable) -> Iterator[None]:
    """Replace operations by name inside a `with` block; the former choice returns when it ends.

    Raises KeyError for a name that is no operation.
    """
    unknown = sorted(set(kernels) - set(REFERENCES))
    if unknown:
        raise KeyError(f"no such operation: {', '.join(unknown)}; there are {', '.join(REFERENCES)}")
    before = dict(_in_use)
    _in_use.update(kernels)
    try:
        yield
    finally:
        _in_use.clear()
        _in_use.update(before)


@_operation
def attention(q: Tensor, k: Tensor, v: Tensor, heads: int, causal: bool = False, upcast: bool = False) -> Tensor:
    """Scaled dot-product attention, heads side by side in the width.

    q [b, s, d], k and v [b, k, d] -> [b, s, d]; every head is d / heads wide and scaled by the root of that.
    `upcast` works in fp32: the heads of SD2.1 overflow fp16. Source: Vaswani et al. 2017, equation 1.
    """
    dtype = q.dtype
    if upcast:
        q, k, v = q.float(), k.float(), v.float()
    q, k, v = (rearrange(x, "b s (n d) -> b n s d", n=heads) for x in (q, k, v))
    x = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
    return rearrange(x, "b n s d -> b s (n d)").to(dtype)


@_operation
def group_norm(x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Normalise every group of channels of every picture to mean 0 and variance 1, then scale and shift.

    x [b, c, ...]; weight and bias [c]. Source: Wu & He 2018, equation 1.
    """
    return F.group_norm(x, groups, weight, bias, eps)


@_operation
def group_norm_silu(x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Group norm followed by SiLU, x * sigmoid(x): the pair stands before almost every convolution.

    x [b, c, h, w]; weight and bias [c].
    """
    return F.silu(F.group_norm(x, groups, weight, bias, eps))


@_operation
def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Normalise every token to mean 0 and variance 1, then scale and shift.

    x [..., d]; weight and bias [d]. Source: Ba et al. 2016.
    """
    return F.layer_norm(x, weight.shape, weight, bias, eps)


@_operation
def geglu(x: Tensor) -> Tensor:
    """The first half of the width, gated by the GELU of the second half.

    x [..., 2 d] -> [..., d]. GELU is the exact one (erf), not the tanh approximation. Source: Shazeer 2020, equation 6.
    """
    value, gate = x.chunk(2, dim=-1)
    return value * F.gelu(gate)
