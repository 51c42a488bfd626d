"""diffusers' own pipeline on our weights, for the same run: eager, or compiled as its documentation says is fastest.

Only the bench and the tests use this, and only where diffusers is installed.

Legend: b pictures, k text tokens, d text width, c h w latent.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sdcore.pipeline import Conditions, Pipeline
from sdcore.unet import UNetConfig
from sdcore.vae import VAEConfig


class Contestant(NamedTuple):
    """Somebody's way to draw."""

    draw: Callable[[int], Tensor]  # steps -> latents [b, c, h, w]
    decode: Callable[[Tensor], Tensor]  # latents -> pixels [b, 3, H, W]
    chosen: Callable[[], str] = str  # which implementation was measured to be fastest for each shape, a line a shape


def unet_of(c: UNetConfig) -> Any:
    """diffusers' UNet for one of our configurations, on the current default device."""
    import diffusers

    last = len(c.channels) - 1
    options: dict[str, Any] = {"num_class_embeds": c.class_embeddings} if c.class_embeddings else {}
    if c.added_dim:
        options |= {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": c.added_time_dim,
            "projection_class_embeddings_input_dim": c.added_dim,
        }
    return diffusers.UNet2DConditionModel(
        in_channels=c.in_channels,
        out_channels=c.out_channels,
        sample_size=c.sample_size,
        block_out_channels=c.channels,
        layers_per_block=c.layers,
        down_block_types=["CrossAttnDownBlock2D" if d else "DownBlock2D" for d in c.depths],
        up_block_types=["CrossAttnUpBlock2D" if d else "UpBlock2D" for d in c.depths[::-1]],
        transformer_layers_per_block=[d or (c.mid_depth if i == last else 1) for i, d in enumerate(c.depths)],
        attention_head_dim=list(c.heads),
        cross_attention_dim=c.context_dim,
        use_linear_projection=c.linear_projection,
        upcast_attention=c.upcast_attention,
        only_cross_attention=list(c.cross_only),
        norm_num_groups=c.norm_groups,
        **options,
    )


def vae_of(c: VAEConfig) -> Any:
    """diffusers' autoencoder for one of our configurations, on the current default device."""
    import diffusers

    levels = len(c.channels)
    return diffusers.AutoencoderKL(
        block_out_channels=c.channels,
        down_block_types=["DownEncoderBlock2D"] * levels,
        up_block_types=["UpDecoderBlock2D"] * levels,
        layers_per_block=c.layers,
        latent_channels=c.latent_channels,
        norm_num_groups=c.norm_groups,
        scaling_factor=c.scaling_factor,
        force_upcast=False,
    )


def twin(module: nn.Module, make: Callable[[Any], nn.Module]) -> nn.Module:
    """diffusers' module for ours, sharing the weights."""
    with torch.device("meta"):
        theirs = make(module.config)
    theirs.load_state_dict(module.state_dict(), strict=True, assign=True)
    return theirs.eval().requires_grad_(False)


def pipeline(pipe: Pipeline, conditions: Conditions, negative: Conditions, noise: Tensor, fastest: bool) -> Contestant:
    """diffusers' pipeline on our weights, Euler steps, from given noise and encoded texts.

    `fastest`: channels last, projections fused, UNet and decoder under `torch.compile(mode="max-autotune")`.
    """
    import diffusers

    unet: Any = twin(pipe.unet, unet_of)
    vae: Any = twin(pipe.vae, vae_of)
    if fastest:
        unet.fuse_qkv_projections()
        vae.fuse_qkv_projections()
        unet, vae = unet.to(memory_format=torch.channels_last), vae.to(memory_format=torch.channels_last)
        unet = torch.compile(unet, mode="max-autotune", fullgraph=True)
        vae.decode = torch.compile(vae.decode, mode="max-autotune", fullgraph=True)
    config = pipe.scheduler
    scheduler = diffusers.EulerDiscreteScheduler(
        beta_start=config.beta_start,
        beta_end=config.beta_end,
        beta_schedule=config.beta_schedule,
        prediction_type=config.prediction_type,
        timestep_spacing="leading",
        steps_offset=config.steps_offset,
    )
    told: dict[str, Any] = {"prompt_embeds": conditions.context, "negative_prompt_embeds": negative.context}
    whole: Any
    if conditions.pooled is None:
        whole = diffusers.StableDiffusionPipeline(
            vae, None, None, unet, scheduler, None, None, requires_safety_checker=False
        )
    else:
        whole = diffusers.StableDiffusionXLPipeline(vae, None, None, None, None, unet, scheduler, add_watermarker=False)
        told |= {"pooled_prompt_embeds": conditions.pooled, "negative_pooled_prompt_embeds": negative.pooled}
    whole.set_progress_bar_config(disable=True)
    dtype = next(pipe.unet.parameters()).dtype
    told = {name: tensor.to(dtype) for name, tensor in told.items()}

    @torch.no_grad()
    def draw(steps: int) -> Tensor:
        return whole(
            **told, num_inference_steps=steps, guidance_scale=7.5, latents=noise.to(dtype), output_type="latent"
        ).images

    @torch.no_grad()
    def decode(latents: Tensor) -> Tensor:
        return vae.decode(latents.to(dtype) / vae.config.scaling_factor, return_dict=False)[0]

    return Contestant(draw, decode)
