"""Pipelines with controls and picture prompts equal diffusers', plain and accelerated.

Small random models of both families, ControlNets made of their UNets (every weight shaken, the zero convolutions too), saved by
diffusers and read by `load_control`. Both sides get the same seed; fp32, guidance 3, 5 steps: pixels within 1/255.
"""

from dataclasses import replace

import diffusers
import numpy as np
import pytest
import torch
from sdcore.weights.controls import load_control

import sdcore
from sdcore.controlnet import Control, ControlNet
from sdcore.errors import ConfigError
from sdcore.ip_adapter import ImagePrompt, IPAdapterConfig
from tests.test_ip_adapter import made, two_tables
from tests.test_tasks import SIZE, equal, half, peer, picture, pil_mask, seeded

XL = {"sd1": "", "sdxl": "XL"}
FAMILIES = ["sd1", "sdxl"]


@pytest.fixture(scope="module")
def nets(folders, pipes):
    """(family, number) -> diffusers' ControlNet and ours, of the same file."""
    known = {}

    def net(family: str, number: int = 0, **own):
        key = (family, number, *own.items())
        if key not in known:
            unet = diffusers.UNet2DConditionModel.from_pretrained(folders(family) / "unet")
            theirs = diffusers.ControlNetModel.from_unet(unet, load_weights_from_unet=True)
            theirs.register_to_config(**own)
            generator = torch.Generator().manual_seed(number)
            with torch.no_grad():
                for parameter in theirs.parameters():
                    parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.03)
            folder = folders(family).parent / f"control-{family}-{number}-{len(own)}"
            theirs.save_pretrained(folder)
            known[key] = theirs.eval(), load_control(folder, pipes(family))
        return known[key]

    return net


def unit(start) -> torch.Tensor:
    """A picture as controls take it."""
    return torch.from_numpy(start.pixels).permute(2, 0, 1)[None].float() / 255


def both_ways(pipe, want, *args, **options) -> None:
    """Plain and accelerated, the pipeline draws what diffusers drew; hints are encoded once a picture."""
    for one in (pipe, sdcore.accelerate(pipe)):
        encoded, embed = [], ControlNet.embed_hint
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                ControlNet, "embed_hint", lambda net, *a, embed=embed, n=encoded: n.append(1) or embed(net, *a)
            )
            equal(one(*args, **options).images, want)
        assert len(encoded) == sum(isinstance(c.net, ControlNet) for c in options.get("control", ()))


@pytest.mark.parametrize("family", FAMILIES)
def test_one_control(folders, pipes, nets, family):
    theirs, ours = nets(family)
    hint = picture(seed=5)
    want = peer(folders(family), f"StableDiffusion{XL[family]}ControlNetPipeline", controlnet=theirs)(
        ["cat", "a red circle"], image=hint.pil, num_inference_steps=5, guidance_scale=3.0, generator=seeded(1, 2),
        controlnet_conditioning_scale=0.7,
    ).images  # fmt: skip
    control = [Control(ours, unit(hint), scale=0.7)]
    both_ways(pipes(family), want, ["cat", "a red circle"], steps=5, guidance=3.0, seed=[1, 2], control=control)
    without = pipes(family)("cat", steps=5, guidance=3.0, seed=1).images[0].pixels.astype(int)
    assert np.abs(without - np.asarray(want[0])).max() > 8  # else this would say nothing


@pytest.mark.parametrize("family", FAMILIES)
def test_two_controls_each_for_a_part_of_the_way(folders, pipes, nets, family):
    (first, one), (second, two) = nets(family), nets(family, 1)
    hints = [picture(seed=5), picture(seed=6)]
    want = peer(folders(family), f"StableDiffusion{XL[family]}ControlNetPipeline", controlnet=[first, second])(
        "cat", image=[hint.pil for hint in hints], num_inference_steps=5, guidance_scale=3.0, generator=seeded(1),
        controlnet_conditioning_scale=[1.0, 0.8], control_guidance_start=[0.0, 0.3], control_guidance_end=[0.7, 1.0],
    ).images  # fmt: skip
    control = [Control(one, unit(hints[0]), end=0.7), Control(two, unit(hints[1]), 0.8, start=0.3)]
    both_ways(pipes(family), want, "cat", steps=5, guidance=3.0, seed=1, control=control)


@pytest.mark.parametrize("family", FAMILIES)
def test_guess_mode(folders, pipes, nets, family):
    theirs, ours = nets(family)
    want = peer(folders(family), f"StableDiffusion{XL[family]}ControlNetPipeline", controlnet=theirs)(
        "", image=picture(seed=5).pil, num_inference_steps=5, guidance_scale=3.0, generator=seeded(1), guess_mode=True
    ).images
    control = [Control(ours, unit(picture(seed=5)), guess=True)]
    both_ways(pipes(family), want, "", steps=5, guidance=3.0, seed=1, control=control)


def test_pooled(folders, pipes, nets):
    """Shuffle's ControlNet: what it says is averaged over the picture, and the negative branch hears nothing of it."""
    theirs, ours = nets("sd1", 2, global_pool_conditions=True)
    want = peer(folders("sd1"), "StableDiffusionControlNetPipeline", controlnet=theirs)(
        "cat", image=picture(seed=5).pil, num_inference_steps=5, guidance_scale=3.0, generator=seeded(1)
    ).images
    control = [Control(ours, unit(picture(seed=5)))]
    both_ways(pipes("sd1"), want, "cat", steps=5, guidance=3.0, seed=1, control=control)


@pytest.mark.parametrize("family", FAMILIES)
def test_image_to_image_with_control(folders, pipes, nets, family):
    theirs, ours = nets(family)
    start, hint = picture(), picture(seed=5)
    want = peer(folders(family), f"StableDiffusion{XL[family]}ControlNetImg2ImgPipeline", controlnet=theirs)(
        "cat", image=start.pil, control_image=hint.pil, strength=0.7, num_inference_steps=5, guidance_scale=3.0,
        generator=seeded(1), controlnet_conditioning_scale=0.8,
    ).images  # fmt: skip
    control = [Control(ours, unit(hint), scale=0.8)]
    both_ways(pipes(family), want, "cat", image=start, strength=0.7, steps=5, guidance=3.0, seed=1, control=control)


@pytest.mark.parametrize("family", FAMILIES)
def test_inpainting_with_control(folders, pipes, nets, family):
    theirs, ours = nets(family)
    start, hint, mask = picture(), picture(seed=5), half()
    want = peer(folders(family), f"StableDiffusion{XL[family]}ControlNetInpaintPipeline", controlnet=theirs)(
        "cat", image=start.pil, mask_image=pil_mask(mask), control_image=hint.pil, strength=0.7, num_inference_steps=5,
        guidance_scale=3.0, generator=seeded(1), height=SIZE, width=SIZE, controlnet_conditioning_scale=0.8,
    ).images[0]  # fmt: skip
    painted = mask[0, 0].bool().numpy()
    want = np.where(painted[..., None], np.asarray(want), start.pixels)
    options = dict(image=start, mask=mask, strength=0.7, control=[Control(ours, unit(hint), scale=0.8)])
    both_ways(pipes(family), [want], "cat", steps=5, guidance=3.0, seed=1, **options)


@pytest.mark.parametrize("family", FAMILIES)
def test_picture_prompt_with_control(folders, pipes, nets, family):
    theirs, ours = nets(family)
    pipe, hint = pipes(family), picture(seed=5)
    adapter = made(IPAdapterConfig(embed=40, unet=pipe.unet.config), seed=4)
    embeds = torch.randn(1, 40, generator=seeded(9))
    other = peer(folders(family), f"StableDiffusion{XL[family]}ControlNetPipeline", controlnet=theirs)
    other.load_ip_adapter(two_tables(adapter), subfolder=None, weight_name=None, image_encoder_folder=None)
    other.set_ip_adapter_scale(0.6)
    want = other(
        "cat", image=hint.pil, num_inference_steps=5, guidance_scale=3.0, generator=seeded(1),
        ip_adapter_image_embeds=[torch.stack([torch.zeros_like(embeds), embeds])],
    ).images  # fmt: skip
    options = dict(control=[Control(ours, unit(hint))], image_prompts=[ImagePrompt(adapter, embeds, scale=0.6)])
    both_ways(pipe, want, "cat", steps=5, guidance=3.0, seed=1, **options)
    without = pipe("cat", steps=5, guidance=3.0, seed=1, control=options["control"]).images[0].pixels.astype(int)
    assert np.abs(without - np.asarray(want[0])).max() > 4


@pytest.mark.parametrize("family, kind", [("sd1", "full_adapter"), ("sdxl", "full_adapter_xl")])
def test_features_of_a_t2i_adapter(folders, pipes, family, kind):
    """Its features are worked out once, and added on the way down."""
    unet = pipes(family).unet.config
    theirs = diffusers.T2IAdapter(
        in_channels=3, channels=(*unet.channels, unet.channels[-1])[:4], num_res_blocks=2, adapter_type=kind,
        downscale_factor=16 if kind.endswith("xl") else 8,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    theirs.save_pretrained(folder := folders(family).parent / kind)
    hint = picture(seed=5)
    want = peer(folders(family), f"StableDiffusion{XL[family]}AdapterPipeline", adapter=theirs.eval())(
        "cat", image=hint.pil, num_inference_steps=5, guidance_scale=3.0, generator=seeded(1),
        adapter_conditioning_scale=0.8, height=SIZE, width=SIZE,
    ).images  # fmt: skip
    control = [Control(load_control(folder, pipes(family)), unit(hint), scale=0.8)]
    both_ways(pipes(family), want, "cat", steps=5, guidance=3.0, seed=1, control=control)


def test_control_acts_where_its_mask_says(pipes, nets):
    """A mask of ones is none; one of zeros silences it."""
    pipe, (_, ours) = pipes("sd1"), nets("sd1")
    options, hint = dict(steps=3, guidance=3.0, seed=1, output="latent"), unit(picture(seed=5))

    def drawn(**own):
        return pipe("cat", control=[Control(ours, hint, **own)], **options).latents

    ones = torch.ones(1, 1, SIZE, SIZE)
    assert torch.equal(drawn(mask=ones), drawn())
    assert torch.equal(drawn(mask=0 * ones), pipe("cat", **options).latents)


def test_controls_that_do_not_fit(pipes, nets):
    """Another family, another size: one line before anything is drawn."""
    _, ours = nets("sd1")
    hint = unit(picture(seed=5))
    with pytest.raises(ConfigError, match="take the control of its family"):
        pipes("sdxl").steps("cat", control=[Control(ours, hint)])
    with pytest.raises(ConfigError, match="expected one .* in the size that is drawn, 64x64"):
        pipes("sd1").steps("cat", control=[Control(ours, hint[..., :32])])
    with pytest.raises(ConfigError, match="finite"):
        Control(ours, hint, scale=float("nan"))
    with pytest.raises(ConfigError, match="Control objects"):
        pipes("sd1").steps("cat", control=[hint])
    other = replace(IPAdapterConfig(embed=40), unet=pipes("sd1").unet.config)
    with pytest.raises(sdcore.errors.AdapterError, match="another UNet"):
        pipes("sdxl").steps("cat", image_prompts=[ImagePrompt(made(other), torch.zeros(1, 40))])
