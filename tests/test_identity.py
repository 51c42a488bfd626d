"""Every module at full official size is the released model: same keys, same shapes, bit-identical outputs on the CPU in fp32.

`python tests/test_identity.py` prints the table that stands in the README.
"""

import pytest
import torch

from sdcore import clip, unet, vae
from tests import peers

UNETS = {
    "UNet SD 1.5": unet.SD15,
    "UNet SD 1.5 inpainting": unet.SD15_INPAINT,
    "UNet SD 2.1 (768-v)": unet.SD21_V,
    "UNet SDXL base": unet.SDXL,
    "UNet SDXL refiner": unet.SDXL_REFINER,
}
MORE_UNETS = {  # keys and shapes at full size here; outputs at small size in test_small.py
    "UNet instruct-pix2pix": unet.IP2P,
    "UNet SD 2 base": unet.SD2,
    "UNet SD 2 inpainting": unet.SD2_INPAINT,
    "UNet SD 2 depth": unet.SD2_DEPTH,
    "UNet x4 upscaler": unet.X4,
    "UNet SDXL inpainting": unet.SDXL_INPAINT,
}
VAES = {"VAE SD": vae.SD_VAE, "VAE SDXL": vae.SDXL_VAE, "VAE x4 upscaler": vae.X4_VAE}
TEXTS = {"CLIP ViT-L/14 text": clip.CLIP_L, "OpenCLIP ViT-H/14 text": clip.OPEN_CLIP_H,
         "OpenCLIP ViT-bigG/14 text": clip.OPEN_CLIP_BIGG}  # fmt: skip
VISIONS = {"CLIP ViT-L/14 vision": clip.CLIP_L_VISION, "OpenCLIP ViT-H/14 vision": clip.CLIP_H_VISION}
ALL = {**UNETS, **MORE_UNETS, **VAES, **TEXTS, **VISIONS, "OpenCLIP ViT-bigG/14 vision": clip.CLIP_BIGG_VISION}


@pytest.mark.parametrize("name", ALL)
def test_keys_and_shapes(name):
    with torch.device("meta"):
        theirs = peers.theirs_of(ALL[name])
    want = {k: tuple(t.shape) for k, t in peers.released_names(theirs.state_dict(), ALL[name]).items()}
    assert {k: tuple(t.shape) for k, t in peers.ours_of(ALL[name]).state_dict().items()} == want


@pytest.mark.parametrize("name", UNETS)
def test_unet(name):
    assert unet_difference(UNETS[name]) == 0


@pytest.mark.parametrize("name", VAES)
def test_vae(name):
    assert vae_difference(VAES[name]) == 0


@pytest.mark.parametrize("name", TEXTS)
def test_text(name):
    assert text_difference(TEXTS[name]) == 0


@pytest.mark.parametrize("name", VISIONS)
def test_vision(name):
    assert vision_difference(VISIONS[name]) == 0


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    """Largest absolute difference; infinite where a value is not finite, so that NaN equals nothing."""
    assert a.shape == b.shape
    worst = (a - b).abs().max().item()
    return worst if worst == worst and a.isfinite().all() else float("inf")


@torch.no_grad()
def unet_difference(config: unet.UNetConfig) -> float:
    """Ours against diffusers' on one latent of 16 x 16, block by block, so that two copies of SDXL never lie in memory.

    Each block gets random weights that both share, and the input that the block before gave; every block's outputs are
    compared, and so is the whole: the last block's output is the model's.
    """
    with torch.device("meta"):
        theirs, ours = peers.theirs_of(config).eval(), unet.UNet(config).eval()
    (x, t, context, added, labels), peer = peers.inputs(config, batch=1)
    seeds = iter(range(1000))

    def share(name: str):
        """The part called `name` of both models, on the same random tensors."""
        mine, other = ours.get_submodule(name), theirs.get_submodule(name)
        peers.randomise(other, next(seeds))
        mine.load_state_dict(other.state_dict(), strict=True, assign=True)
        return mine, other

    def release(*names: str):
        for name in names:
            ours.get_submodule(name).to("meta")
            theirs.get_submodule(name).to("meta")

    worst = 0.0

    def compare(a, b):
        nonlocal worst
        worst = max(worst, difference(a, b))

    # time, and what else the residual blocks hear
    parts = ["time_embedding", "conv_in"]
    parts += ["add_embedding"] if config.added_dim else []
    for part in parts:
        share(part)
    temb = ours.embed_time(t, added, labels)
    their_temb = theirs.time_embedding(theirs.get_time_embed(sample=x, timestep=t))
    if config.added_dim:
        their_temb = their_temb + theirs.get_aug_embed(temb, context, peer["added_cond_kwargs"])
    compare(temb, their_temb)

    x = ours.conv_in(x)
    compare(x, theirs.conv_in(peers.inputs(config, batch=1)[0][0]))
    release(*parts)

    skips = [x]
    for i, depth in enumerate(config.depths):
        mine, other = share(f"down_blocks.{i}")
        extra = {"encoder_hidden_states": context} if depth else {}
        y, new = other(hidden_states=x, temb=temb, **extra)
        x, skips = mine(x, skips, *once(mine, temb, context))
        compare(x, y)
        for a, b in zip(skips[-len(new) :], new, strict=True):
            compare(a, b)
        release(f"down_blocks.{i}")

    mine, other = share("mid_block")
    y = other(x, temb, encoder_hidden_states=context)
    x = mine(x, *once(mine, temb, context))
    compare(x, y)
    release("mid_block")

    for i, depth in enumerate(config.depths[::-1]):
        mine, other = share(f"up_blocks.{i}")
        extra = {"encoder_hidden_states": context} if depth else {}
        kept = tuple(skips[-len(mine.resnets) :])
        y = other(hidden_states=x, temb=temb, res_hidden_states_tuple=kept, **extra)
        x, skips = mine(x, skips, *once(mine, temb, context))
        compare(x, y)
        release(f"up_blocks.{i}")
    assert not skips

    share("conv_norm_out"), share("conv_out")
    compare(ours.conv_out(ours.conv_norm_out(x, silu=True)), theirs.conv_out(theirs.conv_act(theirs.conv_norm_out(x))))
    return worst


def once(block, temb, context):
    """What one block of ours is handed besides its input: its time shifts and its keys and values."""
    shifts = [part.shift(temb) for part in block.modules() if isinstance(part, unet.Resnet)]
    kv = [part.keys_values(context) for part in block.modules() if isinstance(part, unet.Attention) and part.cross]
    return iter(shifts), iter(kv)


@torch.no_grad()
def vae_difference(config: vae.VAEConfig) -> float:
    ours, theirs = peers.twins(config)
    g = torch.Generator().manual_seed(1)
    pixels = torch.rand(1, 3, 128, 128, generator=g) * 2 - 1
    mine, other = ours.encode(pixels), theirs.encode(pixels).latent_dist
    z = torch.randn(1, config.latent_channels, 16, 16, generator=g)
    pairs = [(mine.mean, other.mean), (mine.logvar, other.logvar), (ours.decode(z), theirs.decode(z).sample)]
    return max(difference(a, b) for a, b in pairs)


@torch.no_grad()
def text_difference(config: clip.CLIPTextConfig) -> float:
    ours, theirs = peers.twins(config)
    ids = torch.randint(0, config.eos_id - 1, (2, 77), generator=torch.Generator().manual_seed(1))
    ids[0, 20:], ids[1, 76] = config.eos_id, config.eos_id  # one short prompt padded with the end token, one full
    mine, other = ours(ids), theirs(ids, output_hidden_states=True)
    pairs = [(mine.last, other.last_hidden_state), *zip(mine.states, other.hidden_states, strict=True)]
    pairs.append((mine.pooled, other.text_embeds if config.projection else other.pooler_output))
    return max(difference(a, b) for a, b in pairs)


@torch.no_grad()
def vision_difference(config: clip.CLIPVisionConfig) -> float:
    ours, theirs = peers.twins(config)
    pixels = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(1))
    mine, other = ours(pixels), theirs(pixels, output_hidden_states=True)
    pairs = [(mine.embedding, other.image_embeds), *zip(mine.states, other.hidden_states, strict=True)]
    return max(difference(a, b) for a, b in pairs)


if __name__ == "__main__":
    measures = [(UNETS, unet_difference, "diffusers `UNet2DConditionModel`"), (VAES, vae_difference, "diffusers `AutoencoderKL`"),
                (TEXTS, text_difference, "transformers `CLIPTextModel*`"),
                (VISIONS, vision_difference, "transformers `CLIPVisionModelWithProjection`")]  # fmt: skip
    print("| module, full official size | parameters | peer | max difference | test |\n|---|---|---|---|---|")
    for group, measure, peer in measures:
        for name, config in group.items():
            count = sum(p.numel() for p in peers.ours_of(config).parameters()) / 1e6
            print(f"| {name} | {count:,.0f} M | {peer} | {measure(config):g} | `{measure.__name__}` |", flush=True)
