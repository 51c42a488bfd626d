"""The peers' classes (diffusers, transformers) in the sizes of our configurations, with shared random weights.

`twins(config)` gives (ours, theirs): both on the same tensors, so that SDXL fits in memory and any difference is arithmetic.
"""

import math
from dataclasses import replace

import numpy as np
import torch
import transformers
from sdcore.kernels.peers import unet_of, vae_of
from torch import nn

from sdcore.clip import CLIPText, CLIPTextConfig, CLIPVision, CLIPVisionConfig
from sdcore.unet import UNet, UNetConfig
from sdcore.vae import VAE, VAEConfig


def theirs_of(config) -> nn.Module:
    """The peer's module for one of our configurations, on the current default device."""
    return {UNetConfig: unet_of, VAEConfig: vae_of, CLIPTextConfig: _text, CLIPVisionConfig: _vision}[type(config)](
        config
    )


def ours_of(config) -> nn.Module:
    """Our module for one of our configurations, on the meta device: its weights come from the peer."""
    module = {UNetConfig: UNet, VAEConfig: VAE, CLIPTextConfig: CLIPText, CLIPVisionConfig: CLIPVision}[type(config)]
    with torch.device("meta"):
        return module(config)


def twins(config, seed: int = 0) -> tuple[nn.Module, nn.Module]:
    """Ours and theirs, in eval mode, sharing random weights."""
    with torch.device("meta"):
        theirs = theirs_of(config)
    randomise(theirs, seed)
    ours = ours_of(config)
    ours.load_state_dict(released_names(theirs.state_dict(), config), strict=True, assign=True)
    return ours.eval(), theirs.eval()


def randomise(module: nn.Module, seed: int = 0) -> nn.Module:
    """Materialise a module from the meta device: weights of the size that keeps activations near 1, no two norms alike."""
    module.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        if name.endswith("position_ids"):
            tensor.data.copy_(torch.arange(tensor.shape[-1]).expand_as(tensor))
            continue
        fan_in = math.prod(tensor.shape[1:]) if tensor.ndim > 1 else 1
        bound = 0.1 if tensor.ndim == 1 else math.sqrt(3 / fan_in)
        tensor.data.uniform_(-bound, bound, generator=generator)
        if tensor.ndim == 1 and name.endswith("weight"):  # the scale of a norm
            tensor.data.add_(1)
    return module


def released_names(state: dict, config) -> dict:
    """State of a peer's module under the names of the released files: transformers >= 5.6 drops one prefix."""
    if isinstance(config, CLIPTextConfig) and not config.projection:
        return {name if name.startswith("text_model.") else f"text_model.{name}": t for name, t in state.items()}
    return state


def small(config: UNetConfig, width: int = 32) -> UNetConfig:
    """A config of the same family with few and narrow layers."""
    levels = len(config.channels)
    added = {}
    if config.added_dim:
        added = dict(added_time_dim=16, added_dim=24 + 16 * time_ids(config))
    return replace(
        config,
        channels=(width, *[2 * width] * (levels - 1)),
        heads=(4,) * levels,
        depths=tuple(min(d, 2) for d in config.depths),
        mid_depth=min(config.mid_depth, 2),
        context_dim=48,
        norm_groups=8,
        **added,
    )


def time_ids(config: UNetConfig) -> int:
    """How many sizes and crops an XL model hears: the refiner (four levels) five, the others (three levels) six."""
    return 5 if len(config.channels) == 4 else 6


def inputs(config: UNetConfig, size: tuple[int, int] = (16, 16), batch: int = 2, tokens: int = 77, seed: int = 1):
    """Random inputs of a UNet: (x, t, context, added, labels), and the last two as the peer's keyword arguments."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, config.in_channels, *size, generator=g)
    t = torch.tensor([951, 7, 500, 33])[:batch]
    context = torch.randn(batch, tokens, config.context_dim, generator=g)
    added = labels = None
    peer = {}
    if config.added_dim:
        sizes = time_ids(config)
        pooled = torch.randn(batch, config.added_dim - sizes * config.added_time_dim, generator=g)
        added = (pooled, torch.tensor([1024.0, 768, 0, 64, 1024, 768])[:sizes].repeat(batch, 1))
        peer["added_cond_kwargs"] = {"text_embeds": added[0], "time_ids": added[1]}
    if config.class_embeddings:
        labels = torch.tensor([20, 300, 0, 999])[:batch]
        peer["class_labels"] = labels
    return (x, t, context, added, labels), peer


def _text(c: CLIPTextConfig) -> nn.Module:
    config = transformers.CLIPTextConfig(
        vocab_size=c.vocab,
        hidden_size=c.width,
        intermediate_size=c.mlp,
        num_hidden_layers=c.layers,
        num_attention_heads=c.heads,
        max_position_embeddings=c.positions,
        hidden_act=c.activation,
        projection_dim=c.projection or 512,
        bos_token_id=c.eos_id - 1,
        eos_token_id=c.eos_id,
    )
    return (transformers.CLIPTextModelWithProjection if c.projection else transformers.CLIPTextModel)(config)


def _vision(c: CLIPVisionConfig) -> nn.Module:
    return transformers.CLIPVisionModelWithProjection(
        transformers.CLIPVisionConfig(
            hidden_size=c.width,
            intermediate_size=c.mlp,
            num_hidden_layers=c.layers,
            num_attention_heads=c.heads,
            hidden_act=c.activation,
            projection_dim=c.projection,
            image_size=c.image_size,
            patch_size=c.patch,
        )
    )


def bytes_of(pictures) -> np.ndarray:
    """Levels of pictures [n, h, w, c], of a type whose differences have a sign."""
    return np.stack([np.asarray(p, dtype=np.int16) for p in pictures])
