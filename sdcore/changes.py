"""What an adapter says about one weight: every way in use to write a small change of a large matrix.

A LoRA file holds, for each layer it touches, a few small tensors; what they mean for the layer's weight W depends on the format.
Each format is one dataclass here, and its `delta` is its definition: the number to add to W. Nothing here knows of files (their
names are read in `weights/adapters.py`) or of modules (`sdcore/lora.py` attaches).

    W' = W + change.delta(W, strength)          b' = b + change.bias_delta(b, strength)

`strength` is what the user asks for: 1 is the adapter as trained, 0 is W itself. Most changes are linear in it; where one is not,
its docstring says so. Several adapters on one weight each see the original W, and their deltas are added: the order does not
matter. Linear layers and 1 x 1 convolutions are the same thing: [r, in] fits [out, in, 1, 1] and the other way round.

Sources: Hu et al. 2021 (LoRA), Yeh et al. 2023 (LyCORIS: LoCon, LoHa, LoKr, Tucker), Liu et al. 2024 (DoRA), Liu et al. 2022
(IA3), Chavan et al. 2023 (GLoRA), Qiu et al. 2023 (OFT), Liu et al. 2023 (BOFT).

Legend: o output channels, n input channels, k k kernel (absent in linear layers), r rank; [o, n, k, k] is the shape of W.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Literal

import torch
from torch import Tensor

from sdcore.errors import AdapterError


class Change:
    """What all kinds have in common."""

    @property
    def on_weight(self) -> bool:
        """Whether it changes the weight."""
        return True

    @property
    def on_bias(self) -> bool:
        """Whether it changes the bias."""
        return False

    def delta(self, weight: Tensor, strength: float = 1.0) -> Tensor | None:
        """What to add to `weight`, in its shape, in fp32 (fp64 for an fp64 weight); None where the weight stays as it is."""
        raise NotImplementedError

    def bias_delta(self, bias: Tensor | None, strength: float = 1.0) -> Tensor | None:
        """What to add to the bias [o], in fp32 or fp64; None where it stays as it is."""
        return None

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor of the change, by the name of its field."""
        for field in fields(self):  # type: ignore[arg-type]
            value = getattr(self, field.name)
            if isinstance(value, Tensor):
                yield field.name, value
            elif isinstance(value, Change):
                yield from ((f"{field.name}.{name}", tensor) for name, tensor in value.tensors())
            elif isinstance(value, tuple):
                for i, part in enumerate(value):
                    yield from ((f"{field.name}.{i}.{name}", tensor) for name, tensor in part.tensors())

    def check(self, weight: Tensor, bias: Tensor | None) -> None:
        """AdapterError, in a few words without the place, where the change does not fit the shape of `weight` or holds NaN.

        The formula itself is run on tensors that have a shape but no memory, so nothing is computed.
        """
        self._check_shapes(weight.shape, None if bias is None else bias.shape)
        for name, tensor in self.tensors():
            if not tensor.numel():
                raise AdapterError(f"{name} is empty: {list(tensor.shape)}")
            if tensor.device.type != "meta" and not all(torch.isfinite(edge) for edge in torch.aminmax(tensor)):
                raise AdapterError(f"{name} holds NaN or infinity")

    def _check_shapes(self, weight: torch.Size, bias: torch.Size | None) -> None:
        raise NotImplementedError


@dataclass(frozen=True)
class LowRank(Change):
    """LoRA, and LoCon on convolutions: ΔW = scale · up @ down.

    With `mid` (Tucker, or CP, form of a convolution): ΔW[o, n] = scale · Σ_ij up[o, i] · mid[i, j] · down[j, n], at every place
    of the kernel. `scale` is alpha / r, or alpha / √r for rsLoRA, or 1 in a file that says no alpha.
    Source: Hu et al. 2021, section 4.1.
    """

    down: Tensor  # [r, n], [r, n, k, k]; with `mid` [r, n, 1, 1]
    up: Tensor  # [o, r] or [o, r, 1, 1]
    mid: Tensor | None = None  # [r, r, k, k]
    scale: float = 1.0

    @property
    def rank(self) -> int:
        return self.up.shape[1]

    def factors(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """(down [r, n, k, k] or [r, n], up [o, r] times scale), in fp32 or fp64; a Tucker middle is multiplied into down."""
        down, up = _wide(self.down, weight).flatten(1), _wide(self.up, weight).flatten(1) * self.scale
        if self.mid is not None:
            down = torch.einsum("ij...,jn->in...", _wide(self.mid, weight), down)
        return down.reshape(-1, *weight.shape[1:]), up

    def delta(self, weight: Tensor, strength: float = 1.0) -> Tensor:
        down, up = self.factors(weight)
        return strength * (up @ down.flatten(1)).reshape(weight.shape)

    def _check_shapes(self, weight: torch.Size, bias: torch.Size | None) -> None:
        down, up = self.down.shape, self.up.shape
        if len(down) < 2 or len(up) < 2 or up[1] != (down if self.mid is None else self.mid.shape)[0]:
            raise AdapterError(f"the ranks differ: down {list(down)}, up {list(up)}")
        inner = _inner(down)
        if self.mid is not None:
            if self.mid.ndim != 4 or self.mid.shape[1] != down[0]:
                raise AdapterError(f"the ranks differ: down {list(down)}, mid {list(self.mid.shape)}")
            inner *= _inner(self.mid.shape[1:])
        _fits((up[0], inner), weight, self.mid.shape[2:] if self.mid is not None else down[2:])
        if _inner(up[1:]) != 1:
            raise AdapterError(f"up is {list(up)}, expected a kernel of 1 x 1")


@dataclass(frozen=True)
class Hadamard(Change):
    """LoHa: ΔW = scale · (w1_a @ w1_b) ∘ (w2_a @ w2_b), ∘ entry by entry.

    With `t1`, `t2` (Tucker form of a convolution) each factor is Σ_ij t[i, j] · w_a[i, o] · w_b[j, n], and w_a is [r, o].
    `scale` is alpha / r, r = w1_b.shape[0]. Source: Yeh et al. 2023, section 3.2.
    """

    w1_a: Tensor  # [o, r]
    w1_b: Tensor  # [r, n] or [r, n * k * k]
    w2_a: Tensor
    w2_b: Tensor
    t1: Tensor | None = None  # [r, r, k, k]
    t2: Tensor | None = None
    scale: float = 1.0

    def delta(self, weight: Tensor, strength: float = 1.0) -> Tensor:
        one = _product(self.w1_a, self.w1_b, self.t1, weight)
        two = _product(self.w2_a, self.w2_b, self.t2, weight)
        return strength * self.scale * (one * two).reshape(weight.shape)

    def _check_shapes(self, weight: torch.Size, bias: torch.Size | None) -> None:
        for which, a, b, t in (("w1", self.w1_a, self.w1_b, self.t1), ("w2", self.w2_a, self.w2_b, self.t2)):
            _fits(_product_shape(which, a, b, t), weight, () if t is None else t.shape[2:])


@dataclass(frozen=True)
class Kronecker(Change):
    """LoKr: ΔW = scale · w1 ⊗ w2, the Kronecker product over outputs and over inputs; the kernel belongs to w2.

    Each factor is whole (w1, w2) or a product (w1_a @ w1_b, w2_a @ w2_b; with `t2` in Tucker form, where w2_a is [r, o2]).
    `scale` is alpha / r where a factor is a product, and 1 where both are whole. Source: Yeh et al. 2023, section 3.3.
    """

    w1: Tensor | None = None  # [o1, n1]
    w2: Tensor | None = None  # [o2, n2] or [o2, n2, k, k], o = o1 * o2, n = n1 * n2
    w1_a: Tensor | None = None
    w1_b: Tensor | None = None
    w2_a: Tensor | None = None
    w2_b: Tensor | None = None
    t2: Tensor | None = None
    scale: float = 1.0

    def delta(self, weight: Tensor, strength: float = 1.0) -> Tensor:
        w1 = _wide(self.w1, weight) if self.w1 is not None else _product(self.w1_a, self.w1_b, None, weight)
        w2 = _wide(self.w2, weight) if self.w2 is not None else _product(self.w2_a, self.w2_b, self.t2, weight)
        # Rows are (o1, o2) and columns (n1, n2, k, k): flattening the kernel into w2's columns changes nothing.
        return strength * self.scale * torch.kron(w1.flatten(1), w2.flatten(1)).reshape(weight.shape)

    def _check_shapes(self, weight: torch.Size, bias: torch.Size | None) -> None:
        shapes = []
        for which, whole, a, b, t in (
            ("w1", self.w1, self.w1_a, self.w1_b, None),
            ("w2", self.w2, self.w2_a, self.w2_b, self.t2),
        ):
            if whole is None and (a is None or b is None):
                raise AdapterError(f"{which} is missing: neither {which} nor both of {which}_a and {which}_b")
            shapes.append(
                (whole.shape[0], _inner(whole.shape)) if whole is not None else _product_shape(which, a, b, t)
            )
        (o1, n1), (o2, n2) = shapes
        _fits((o1 * o2, n1 * n2), weight, self.w2.shape[2:] if self.w2 is not None else ())


@dataclass(frozen=True)
class Full(Change):
    """A difference written out: ΔW = diff, Δb = bias. Also the scale and shift of a norm."""

    diff: Tensor | None = None  # shape of the weight
    bias: Tensor | None = None  # [o]

    @property
    def on_weight(self) -> bool:
        return self.diff is not None

    @property
    def on_bias(self) -> bool:
        return self.bias is not None

    def delta(self, weight: Tensor, strength: float = 1.0) -> Tensor | None:
        return None if self.diff is None else strength * _wide(self.diff, weight).reshape(weight.shape)

    def bias_delta(self, bias: Tensor | None, strength: float = 1.0) -> Tensor | None:
        return None if self.bias is None else strength * _wide(self.bias, bias).flatten()

    def _check_shapes(self, weight: torch.Size, bias: torch.Size | None) -> None:
        if self.diff is not None:
            _fits((self.diff.shape[0], _inner(self.diff.shape)), weight, self.diff.shape[2:])
        if self.bias is not None:
            _bias_fits(self.bias, bias)


@dataclass(frozen=True)
class Replace(Change):
    """A weight to be put in place of W: ΔW = weight - W, Δb = bias - b (`set_weight`, PEFT's `modules_to_save`)."""

    weight: Tensor | None = None
    bias: Tensor | None = None

    @property
    def on_weight(self) -> bool:
        return self.weight is not None

    @property
    def on_bias(self) -> bool:
        return self.bias is not None

    def delta(self, weight: Tensor, strength: float = 1.0) -> Tensor | None:
        return (
            None
            if self.weight is None
            else strength * (_wide(self.weight, weight).reshape(weight.shape) - _wide(weight, weight))
        )

    def bias_delta(self, bias: Tensor | None, strength: float = 1.0) -> Tensor | None:
        if self.bias is None or bias is None:
            return None
        return strength * (_wide(self.bias, bias).flatten() - _wide(bias, bias))

    def _check_shapes(self, weight: torch.Size, bias: torch.Size | None) -> None:
        Full(self.weight, self.bias)._check_shapes(weight, bias)


@dataclass(frozen=True)
class IA3(Change):
    """A factor for every input or output channel: ΔW = W · vector, along n (`on_input`) or o.

    The vector is the distance from 1, as LyCORIS writes it (PEFT writes 1 + vector). With `bias` (PEFT, on outputs): Δb = b ·
    vector.
    Source: Liu et al. 2022, section 3.3.
    """

    vector: Tensor  # n or o numbers
    on_input: bool
    bias: bool = False

    @property
    def on_bias(self) -> bool:
        return self.bias

    def delta(self, weight: Tensor, strength: float = 1.0) -> Tensor:
        vector, kernel = _wide(self.vector, weight).flatten(), [1] * (weight.ndim - 2)
        return (
            strength * _wide(weight, weight) * vector.reshape([1, -1, *kernel] if self.on_input else [-1, 1, *kernel])
        )

    def bias_delta(self, bias: Tensor | None, strength: float = 1.0) -> Tensor | None:
        if not self.bias or bias is None:
            return None
        return strength * _wide(bias, bias) * _wide(self.vector, bias).flatten()

    def _check_shapes(self, weight: torch.Size, bias: torch.Size | None) -> None:
        axis = 1 if self.on_input else 0
        if len(weight) < 2 or self.vector.numel() != weight[axis]:
            which = "inputs" if self.on_input else "outputs"
            raise AdapterError(f"a factor for each of {self.vector.numel()} {which} does not fit {list(weight)}")
        if self.bias and self.on_input:
            raise AdapterError("factors for the inputs cannot be those of the bias")


@dataclass(frozen=True)
class GLoRA(Change):
    """ΔW = scale · (W @ a1 @ a2 + b1 @ b2): a change before the layer and one beside it.

    With `bm` [r, r, k, k] the second is in Tucker form. Old files number each pair the other way round; the reader turns them.
    Source: Chavan et al. 2023, equation 10, with the two matrices that LyCORIS keeps of it.
    """

    a1: Tensor  # [n, r]
    a2: Tensor  # [r, n]
    b1: Tensor  # [o, r]
    b2: Tensor  # [r, n] or [r, n, k, k]
    bm: Tensor | None = None
    scale: float = 1.0

    def delta(self, weight: Tensor, strength: float = 1.0) -> Tensor:
        a1, a2 = _wide(self.a1, weight).flatten(1), _wide(self.a2, weight).flatten(1)
        before = torch.einsum("on...,nr,rm->om...", _wide(weight, weight), a1, a2)
        return strength * self.scale * (before + LowRank(self.b2, self.b1, self.bm).delta(weight))

    def _check_shapes(self, weight: torch.Size, bias: torch.Size | None) -> None:
        LowRank(self.b2, self.b1, self.bm)._check_shapes(weight, bias)
        a1, a2 = self.a1.flatten(1).shape, self.a2.flatten(1).shape
        if a1 != (weight[1], a2[0]) or a2[1] != weight[1]:
            raise AdapterError(f"a1 {list(a1)} and a2 {list(a2)} do not fit {weight[1]} inputs")


@dataclass(frozen=True)
class Orthogonal(Change):
    """OFT and BOFT: the outputs are turned, W' = rescale · R W, R from blocks Q = blocks - blocksᵀ by Cayley: (I + Q)(I - Q)⁻¹.

    OFT (`boft` False, blocks [m, s, s]): outputs in m runs of s, each turned by the transpose of its block.
    BOFT (`boft` True, blocks [stages, m, s, s]): stage i turns, by its blocks, outputs that lie 2^i · s/2 apart (a butterfly).
    `constraint` bounds the norm of all Q together: an OFT file's alpha times o, 0 is none. Without `cayley` (early files) the
    blocks are the turns R themselves. Strength s takes each factor to
    I + s (factor - I), also each number of `rescale`: linear for OFT without `rescale`, not for the others.
    Source: Qiu et al. 2023, equation 3; Liu et al. 2023, section 4; the layout is LyCORIS'.
    """

    blocks: Tensor
    rescale: Tensor | None = None  # o numbers
    constraint: float = 0.0
    boft: bool = False
    cayley: bool = True

    def delta(self, weight: Tensor, strength: float = 1.0) -> Tensor:
        blocks, w = _wide(self.blocks, weight), _wide(weight, weight)
        eye = torch.eye(blocks.shape[-1], dtype=blocks.dtype, device=blocks.device)
        q = blocks - blocks.mT
        if self.constraint > 0:
            q = q * (self.constraint / (q.norm() + 1e-8)).clamp(max=1)
        turns = (eye + q) @ torch.linalg.inv(eye - q) if self.cayley else blocks
        turns = eye + strength * (turns - eye)
        turned = w.flatten(1)
        if self.boft:
            for i, stage in enumerate(turns):
                turned = _butterfly(turned, stage, 2**i * (eye.shape[0] // 2))
        else:
            turned = (turns.mT @ turned.unflatten(0, (len(turns), -1))).flatten(0, 1)
        if self.rescale is not None:
            turned = turned * (1 + strength * (_wide(self.rescale, weight).flatten() - 1))[:, None]
        return turned.reshape(w.shape) - w

    def _check_shapes(self, weight: torch.Size, bias: torch.Size | None) -> None:
        blocks = self.blocks.shape
        if len(blocks) != (4 if self.boft else 3) or blocks[-1] != blocks[-2] or (self.boft and blocks[-1] % 2):
            raise AdapterError(f"blocks {list(blocks)} are no {'stages of ' * self.boft}square blocks")
        if blocks[-3] * blocks[-1] != weight[0]:
            raise AdapterError(f"blocks {list(blocks)} turn {blocks[-3] * blocks[-1]} outputs, there are {weight[0]}")
        if self.boft and 2 ** (blocks[0] - 1) * blocks[-1] > weight[0]:
            raise AdapterError(f"{blocks[0]} stages of {blocks[-1]} reach over more than {weight[0]} outputs")
        if self.rescale is not None and self.rescale.numel() != weight[0]:
            raise AdapterError(f"rescale has {self.rescale.numel()} numbers for {weight[0]} outputs")


@dataclass(frozen=True)
class DoRA(Change):
    """A change of direction, with the lengths learnt apart. ‖·‖ is the length of each row of W (or column: see below).

    rule "comfy", for files with `dora_scale` (kohya, LyCORIS): W' = (W + Δ) · magnitude / norm, as ComfyUI computes it, in which
    these files are made to be used. The magnitude has one number an output, [o, 1...], and the norm is that of each row of **W**;
    or one an input, [1, n...], and the norm is that of each column of **W + Δ**. Strength s: W + s (W' - W).

    rule "peft", for files with `lora_magnitude_vector` (PEFT, diffusers): W' = (W + s Δ) · magnitude / ‖W + s Δ‖, rows. It is
    also what LyCORIS trains at strength 1 with a number an output. Not linear in the strength; 0 is W itself here. In
    training the norm counts as a constant (section 4.3).

    Both are the same only where Δ changes no length. Source: Liu et al. 2024, equation 5.
    """

    change: Change
    magnitude: Tensor
    rule: Literal["comfy", "peft"] = "comfy"

    @property
    def on_bias(self) -> bool:
        return self.change.on_bias

    def delta(self, weight: Tensor, strength: float = 1.0) -> Tensor:
        w, magnitude = _wide(weight, weight), _wide(self.magnitude, weight)
        if self.rule == "peft":
            if strength == 0:
                return torch.zeros_like(w)
            new = w + _or_zero(self.change.delta(weight, strength), w)
            return new * (magnitude.flatten() / _lengths(new, 0).detach()).reshape(-1, *[1] * (w.ndim - 1)) - w
        new = w + _or_zero(self.change.delta(weight), w)
        axis = 0 if magnitude.shape[0] == w.shape[0] else 1
        norm = _lengths(w if axis == 0 else new, axis) + torch.finfo(weight.dtype).eps
        shape = [1] * w.ndim
        shape[axis] = -1
        return strength * (new * (magnitude.flatten() / norm).reshape(shape) - w)

    def bias_delta(self, bias: Tensor | None, strength: float = 1.0) -> Tensor | None:
        return self.change.bias_delta(bias, strength)

    def _check_shapes(self, weight: torch.Size, bias: torch.Size | None) -> None:
        self.change._check_shapes(weight, bias)
        count, found = self.magnitude.numel(), list(self.magnitude.shape)
        outputs = self.rule == "peft" or (self.magnitude.ndim > 0 and found[0] == weight[0])
        if count != weight[0 if outputs else 1]:
            raise AdapterError(f"the magnitude {found} fits neither the outputs nor the inputs of {list(weight)}")


@dataclass(frozen=True)
class Sum(Change):
    """Several changes of one weight in one file, such as a LoRA with a difference of the bias: their deltas are added."""

    changes: tuple[Change, ...]

    @property
    def on_weight(self) -> bool:
        return any(change.on_weight for change in self.changes)

    @property
    def on_bias(self) -> bool:
        return any(change.on_bias for change in self.changes)

    def delta(self, weight: Tensor, strength: float = 1.0) -> Tensor | None:
        return _total(change.delta(weight, strength) for change in self.changes)

    def bias_delta(self, bias: Tensor | None, strength: float = 1.0) -> Tensor | None:
        return _total(change.bias_delta(bias, strength) for change in self.changes)

    def _check_shapes(self, weight: torch.Size, bias: torch.Size | None) -> None:
        for change in self.changes:
            change._check_shapes(weight, bias)


# ---------------------------------------------------------------- the arithmetic


def _wide(x: Tensor | None, like: Tensor | None) -> Tensor:
    """Onto the device of `like`, in fp32, or fp64 where `like` is: half precision is for storing, not for multiplying out.

    Gradients pass: in training (train/lora.py) the tensors of a change are parameters.
    """
    assert x is not None
    dtype = torch.float64 if like is not None and like.dtype == torch.float64 else torch.float32
    return x.to(like.device if like is not None else x.device, dtype)


def _product(a: Tensor | None, b: Tensor | None, t: Tensor | None, like: Tensor) -> Tensor:
    """a @ b; with a Tucker core Σ_ij t[i, j] a[i, o] b[j, n]. Two axes: what lies behind the first is flattened."""
    a, b = _wide(a, like).flatten(1), _wide(b, like).flatten(1)
    return a @ b if t is None else torch.einsum("ij...,io,jn->on...", _wide(t, like), a, b).flatten(1)


def _product_shape(which: str, a: Tensor | None, b: Tensor | None, t: Tensor | None) -> tuple[int, int]:
    """The two sizes of `_product`, or AdapterError where the factors do not meet."""
    assert a is not None and b is not None
    ranks = (a.shape[1], b.shape[0]) if t is None else (a.shape[0], b.shape[0])
    core = (ranks[0], ranks[0]) if t is None else tuple(t.shape[:2])
    if ranks != core:
        raise AdapterError(f"the ranks differ: {which}_a {list(a.shape)}, {which}_b {list(b.shape)}")
    return (a.shape[0], _inner(b.shape)) if t is None else (a.shape[1], _inner(b.shape) * _inner(t.shape[1:]))


def _butterfly(x: Tensor, blocks: Tensor, reach: int) -> Tensor:
    """One stage of BOFT on [o, ...]: pairs `reach` apart lie side by side, are turned by the blocks [m, s, s], and go back."""
    o, size = len(x), blocks.shape[-1]
    together = x.reshape(o // (2 * reach), 2, reach, -1).transpose(1, 2)  # c (2 reach) -> c reach 2
    turned = blocks @ together.reshape(o // size, size, -1)
    return turned.reshape(o // (2 * reach), reach, 2, -1).transpose(1, 2).reshape(o, -1)


def _lengths(x: Tensor, axis: int) -> Tensor:
    """The length of every row (axis 0) or column (axis 1) of a weight, over everything else."""
    return x.transpose(0, axis).flatten(1).norm(dim=1)


def _total(deltas: Iterator[Tensor | None]) -> Tensor | None:
    """The sum of those that are there; None where none is."""
    total: Tensor | None = None
    for delta in deltas:
        if delta is not None:
            total = delta if total is None else total + delta
    return total


def _or_zero(delta: Tensor | None, like: Tensor) -> Tensor:
    return torch.zeros_like(like) if delta is None else delta


# ---------------------------------------------------------------- the shapes


def _inner(shape: Sequence[int]) -> int:
    """How many numbers lie behind each index of the first axis."""
    size = 1
    for side in shape[1:]:
        size *= side
    return size


def _fits(found: tuple[int, int], weight: torch.Size, kernel: Sequence[int]) -> None:
    """AdapterError unless (outputs, everything behind) and the kernel, where one is written, are those of the weight."""
    expected = weight[2:] or (1, 1)
    if found != (weight[0], _inner(weight)) or (len(kernel) and tuple(kernel) != tuple(expected)):
        raise AdapterError(
            f"changes a weight of {[*found, *kernel]} (kernel counted in), the weight here is {list(weight)}"
        )


def _bias_fits(bias: Tensor, expected: torch.Size | None) -> None:
    if expected is None:
        raise AdapterError("changes a bias, and this layer has none")
    if bias.numel() != expected.numel():
        raise AdapterError(f"changes a bias of {bias.numel()} numbers, here there are {expected.numel()}")
