"""Variants of a UNet: twins that share every parameter with it and compute a little differently. The UNet itself stays as it is.

    blind = perturbed(pipe.unet)                                     # for perturbed-attention guidance
    pipe = dataclasses.replace(pipe, unet=freeu(pipe.unet))          # a pipeline that draws with FreeU

A twin is a copy of the tree of modules down to those that differ; layers, and the adapters on them, are the same objects.

Legend: b batch, c channels, h w height and width, s = h * w tokens, d width.
"""

import copy
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor, nn

from sdcore import lora
from sdcore.errors import ConfigError
from sdcore.unet import Attention, KeysValues, UNet, Up, widen

Model = TypeVar("Model", bound=nn.Module)


def mirror(module: Model, change: Callable[[nn.Module], nn.Module | None]) -> Model:
    """A copy of a model that shares all its modules but those that `change` gives another for, and what holds them."""
    changed = change(module)
    if changed is not None:
        return changed  # type: ignore[return-value]
    children = {name: mirror(child, change) for name, child in module.named_children()}
    return with_children(module, children) if any(c is not module._modules[n] for n, c in children.items()) else module


def with_children(module: Model, children: dict[str, nn.Module]) -> Model:
    """A copy of one module, parameters and all else shared, that holds these."""
    twin = copy.copy(module)
    twin._modules = dict(children)
    return twin


def twin_of(unet: UNet, **parts: nn.Module) -> UNet:
    """The UNet with other parts in the place of those of these names."""
    lora.version(unet)  # begins its list of adapters where there is none yet: the twin has the same one
    return with_children(unet, dict(unet.named_children()) | parts)


# ---------------------------------------------------------------- perturbed-attention guidance


class SelfSatisfied(Attention):
    """Self-attention in which every token looks at itself alone."""

    def forward(self, x: Tensor, keys_values: KeysValues | None = None) -> Tensor:
        return self.to_out(self.to_v(x))


def perturbed(unet: UNet) -> UNet:
    """The UNet with the self-attentions of its middle perturbed, whose answers lack structure: what `Guidance.pag` leads away
    from. Source: Ahn et al. 2024 (2403.17377), section 3.2, with the layers that diffusers takes where none are named."""

    def change(module: nn.Module) -> nn.Module | None:
        if not isinstance(module, Attention) or module.cross:
            return None
        twin = copy.copy(module)
        twin.__class__ = SelfSatisfied
        return twin

    return twin_of(unet, mid_block=mirror(unet.mid_block, change))


# ---------------------------------------------------------------- FreeU


class FreeUp(Up):
    """A level of the way up that trusts what comes from below more, and the lowest frequencies of what was kept less."""

    below: float
    kept: float

    def join(self, x: Tensor, skip: Tensor) -> Tensor:
        half = x.shape[1] // 2
        x = torch.cat([x[:, :half] * self.below, x[:, half:]], dim=1)
        return torch.cat([x, widen(damped(skip, self.kept), x)], dim=1)


def damped(x: Tensor, factor: float) -> Tensor:
    """x [b, c, h, w] with its frequencies of -1 and 0 cycles a side multiplied by `factor`, in fp32. Follows diffusers, and the
    authors' code: the circle of radius 1 in the paper's equation 4 is a square of 2 x 2 there."""
    spectrum = torch.fft.fft2(x.float())
    lowest = torch.ones(x.shape[-2:], device=x.device)
    for row in (-1, 0):
        lowest[row, [-1, 0]] = factor
    return torch.fft.ifft2(spectrum * lowest).real.to(x.dtype)


def freeu(unet: UNet, b1: float = 1.5, b2: float = 1.6, s1: float = 0.9, s2: float = 0.2) -> UNet:
    """The UNet with FreeU: on the way up, the lowest level multiplies half of what comes from below by b1 and damps what was
    kept by s1; the next level by b2 and s2. Defaults: the authors' for SD 1.x; 2.1: 1.4, 1.6, 0.9, 0.2; XL: 1.3, 1.4, 0.9, 0.2.
    Source: Si et al. 2023 (2309.11497). ConfigError for a factor that is not above 0."""
    factors = {"b1": b1, "b2": b2, "s1": s1, "s2": s2}
    for name, value in factors.items():
        if not 0 < value < 100:
            raise ConfigError(f"freeu: {name} must be a number above 0, such as 1.2, found {value!r}")
    levels = dict(unet.up_blocks.named_children())
    for name, below, kept in (("0", b1, s1), ("1", b2, s2)):
        level = copy.copy(levels[name])
        level.__class__ = FreeUp
        vars(level).update(below=below, kept=kept)
        levels[name] = level
    return twin_of(unet, up_blocks=with_children(unet.up_blocks, levels))
