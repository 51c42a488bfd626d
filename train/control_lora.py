"""A Control-LoRA: a ControlNet that borrows its matrices from the UNet and learns a LoRA beside each, instead of copies.

    net = borrow(ControlNet.from_unet(unet), unet, rank=64, seed=0)     # trains like any ControlNet
    write("control-lora.safetensors", net)                              # `load_control` reads it

What a ControlNet has of the UNet are matrices (linear layers and convolutions) and, small beside them, biases and norms. Borrowed
matrices are the UNet's own tensors: they take no memory, no gradient and no room in a checkpoint. Everything else trains in full:
the biases and norms, the stem, the zero convolutions. So it is in the released Control-LoRA files.

Source: the released files (stabilityai/control-lora, 2023); Hu et al. 2021 (LoRA; up begins as zero).
"""

from functools import partial
from pathlib import Path
from typing import Any

import torch
from sdcore.weights.controls import write_control_lora
from torch import Tensor, nn

from sdcore.changes import LowRank
from sdcore.controlnet import ControlNet
from sdcore.errors import ConfigError
from sdcore.unet import UNet

from .lora import Learned
from .task import generator


def borrow(net: ControlNet, unet: UNet, rank: int, seed: int) -> ControlNet:
    """Let `net`, a copy of the UNet's encoder, borrow every matrix that it has of the UNet and learn a LoRA beside it.

    The borrowed weight becomes a buffer that no checkpoint keeps; the layer gets a part `change` and computes with both. Gives
    `net` itself, with the answers that it had. ConfigError: a rank below 1, a UNet in another dtype than float32, other sizes.
    """
    if rank < 1:
        raise ConfigError(f"--control-lora {rank}: expected a rank of 1 or more")
    if unet.conv_in.weight.dtype != torch.float32:
        raise ConfigError("--control-lora: what is borrowed is computed with in float32; leave out --dtype")
    if (net.config.depths, net.config.mid_depth) != (unet.config.depths, unet.config.mid_depth):
        raise ConfigError("--control-lora: has the UNet's transformers; leave out --depths and --mid-depth")
    theirs = dict(unet.named_modules())
    for i, (name, layer) in enumerate(list(net.named_modules())):
        if name in theirs and isinstance(layer, nn.Linear | nn.Conv2d):
            learned = Learned(layer, "lora", rank, 1.0, False, generator(seed, i, 0, 11))
            del layer.weight
            layer.register_buffer("weight", theirs[name].get_parameter("weight").detach(), persistent=False)
            layer.change = learned  # type: ignore[assignment]
            vars(layer)["forward"] = partial(_forward, layer)
    return net


def _forward(layer: Any, x: Tensor) -> Tensor:
    return layer.change.act(layer, x)


def factors(net: ControlNet) -> dict[str, LowRank]:
    """What has been learned beside each borrowed matrix, by the name of its layer."""
    borrowed = {
        name: layer for name, layer in net.named_modules() if isinstance(getattr(layer, "change", None), Learned)
    }
    return {name: layer.change.change() for name, layer in borrowed.items()}  # type: ignore


def write(path: Path, net: ControlNet) -> None:
    """A Control-LoRA file in the released layout."""
    own = {name: tensor for name, tensor in net.state_dict().items() if ".change." not in name}
    write_control_lora(path, net.config, own, factors(net))
