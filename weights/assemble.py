"""From tensors to a module, without a copy: built on the meta device, compared name by name, then given the tensors.

On the meta device a parameter has a shape and no memory, so a module of any size is built at once and its state dict says what
the file must hold. `fill` ends in `load_state_dict(strict=True, assign=True)`, but the comparison before it gives the messages.
"""

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from sdcore.clip import CLIPText, CLIPVision
from sdcore.controlnet import ControlNet, ControlNetUnion
from sdcore.errors import CheckpointError, NonFiniteError
from sdcore.ip_adapter import IPAdapter
from sdcore.t2i_adapter import T2IAdapter
from sdcore.taesd import TAESD
from sdcore.unet import UNet
from sdcore.vae import VAE

from .files import one_line

Tensors = dict[str, Tensor]
MODULES = {"unet": UNet, "vae": VAE, "text_encoder": CLIPText, "text_encoder_2": CLIPText,
           "image_encoder": CLIPVision, "ip_adapter": IPAdapter, "taesd": TAESD,
           "controlnet": ControlNet, "controlnet_union": ControlNetUnion, "t2i_adapter": T2IAdapter}  # fmt: skip


class NonFiniteWeights(CheckpointError, NonFiniteError):
    """A weight is NaN or infinite."""


def fill(part: str, config, tensors: Tensors, where: Path, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """The part's module in evaluation mode, its parameters being `tensors` (themselves, where device and dtype agree)."""
    model = skeleton(part, config)
    check_names(part, model.state_dict(), tensors, where)
    check_values(part, tensors, where)
    model.load_state_dict(
        {name: tensor.to(device, dtype) for name, tensor in tensors.items()}, strict=True, assign=True
    )
    return model.eval().requires_grad_(False)


class SkipInit(TorchFunctionMode):
    """Leaves out the random first values, which nobody would see (and which on the meta device pull in the compiler: 3 s)."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if getattr(function, "__name__", "") in (
            "kaiming_uniform_",
            "uniform_",
            "normal_",
            "zeros_",
            "ones_",
            "fill_",
            "zero_",
        ):
            return args[0] if args else kwargs["tensor"]
        return function(*args, **kwargs)


def skeleton(part: str, config) -> nn.Module:
    """The part's module, with shapes and no memory."""
    with torch.device("meta"), SkipInit():
        return MODULES[part](config)


def check_names(part: str, wanted: Tensors, found: Tensors, where: Path) -> None:
    """Exactly the module's tensors, each in its shape, all of them floating-point. CheckpointError."""
    missing, extra = sorted(set(wanted) - set(found)), sorted(set(found) - set(wanted))
    if missing:
        raise CheckpointError(f"{where}: {part} lacks {listed(missing)}; download it again, or it is another model")
    if extra:
        raise CheckpointError(
            f"{where}: {part} has no place for {listed(extra)}; it is another model than its config says"
        )
    for name, tensor in found.items():
        if tensor.shape != wanted[name].shape:
            raise CheckpointError(
                f"{where}: {part} tensor {name} has shape {list(tensor.shape)}, expected {list(wanted[name].shape)}"
                f"{hint(name, tensor)}"
            )
        if not tensor.is_floating_point():
            raise CheckpointError(f"{where}: {part} tensor {name} is {tensor.dtype}, expected floating-point numbers")


INPUTS = {
    4: "a text-to-image UNet", 5: "a depth UNet", 7: "an upscaler's UNet", 8: "an instruct-pix2pix UNet", 9: "an inpainting UNet",
}  # fmt: skip


def hint(name: str, tensor: Tensor) -> str:
    if name == "conv_in.weight" and tensor.ndim == 4 and tensor.shape[1] in INPUTS:
        return f": conv_in has {tensor.shape[1]} input channels: {INPUTS[tensor.shape[1]]}"
    return "; it is of another family or size than its config says"


LOOK = 2**14  # numbers of each tensor that loading looks at: a mapped file need not be read to be loaded


def check_values(part: str, tensors: Tensors, where: Path, thorough: bool = False) -> None:
    """The weights are finite: all of them with `thorough` (`sdcore inspect`), else the first 16,384 of each tensor.

    Training that broke leaves NaN everywhere in a tensor; a single bad number further back shows when it is used,
    since the pipeline stops at the stage where NaN appears and names `sdcore inspect`. A sum is NaN when any term is.
    """
    for name, tensor in tensors.items():
        seen = tensor if thorough or not tensor.is_contiguous() else tensor.view(-1)[:LOOK]
        seen = seen.float() if seen.dtype.itemsize == 1 else seen  # eight-bit floats cannot be summed
        if not torch.isfinite(seen.sum(dtype=torch.float32)) and not torch.isfinite(seen.float()).all():
            raise NonFiniteWeights(
                f"{where}: {part} tensor {name} holds NaN or infinity; the file is damaged or its training broke"
            )


def listed(keys: list[str]) -> str:
    """At most five names, and how many there are."""
    shown = ", ".join(one_line(key) for key in sorted(keys)[:5])
    return f"{len(keys)} tensor{'s' if len(keys) > 1 else ''} ({shown}{', ...' if len(keys) > 5 else ''})"
