"""Names: every parameter of every official family has exactly one in each spelling, and diffusers reads ours as its own."""

import pytest
import torch
from diffusers.loaders import single_file_utils as theirs
from sdcore.weights import detect, names
from sdcore.weights.assemble import skeleton

from sdcore import clip, unet, vae
from sdcore.errors import CheckpointError
from tests import peers

UNETS = {name: family.unet for name, family in detect.FAMILIES.items()}
VAES = {"sd": vae.SD_VAE, "sdxl": vae.SDXL_VAE, "x4": vae.X4_VAE}


def state(part, config):
    return skeleton(part, config).state_dict()


def stamped(tensors):
    """The same names and shapes with real values, no two tensors alike, at the memory of one number each."""
    return {name: torch.tensor(float(i)).expand(t.shape) for i, (name, t) in enumerate(tensors.items())}


def one_view(a, b):
    """Two views of the same stamped number in the same shape."""
    return a.shape == b.shape and a.data_ptr() == b.data_ptr()


@pytest.mark.parametrize("family", UNETS)
def test_unet_there_and_back(family):
    config, ours = UNETS[family], stamped(state("unet", UNETS[family]))
    ldm = names.unet_to_ldm(ours, config)
    prefixes = ("input_blocks.", "middle_block.", "output_blocks.", "time_embed.", "out.", "label_emb.")
    assert all(name.startswith(prefixes) for name in ldm)
    back = names.unet_from_ldm(ldm, config)
    assert back.keys() == ours.keys() and all(back[name] is ours[name] for name in ours)


@pytest.mark.parametrize("family", UNETS)
def test_unet_as_diffusers_reads_it(family):
    config = UNETS[family]
    with torch.device("meta"):
        peer = peers.theirs_of(config)
    ours = stamped(state("unet", config))
    single = {f"model.diffusion_model.{name}": t for name, t in names.unet_to_ldm(ours, config).items()}
    read = theirs.convert_ldm_unet_checkpoint(dict(single), dict(peer.config))
    assert read.keys() == ours.keys() == peer.state_dict().keys()
    assert all(read[name] is ours[name] for name in ours)


@pytest.mark.parametrize("family", VAES)
def test_vae_there_and_back_and_as_diffusers_reads_it(family):
    config = VAES[family]
    with torch.device("meta"):
        peer = peers.theirs_of(config)
    ours = stamped(state("vae", config))
    ldm = names.vae_to_ldm(ours, config)
    assert ldm["encoder.mid.attn_1.q.weight"].shape == (config.channels[-1], config.channels[-1], 1, 1)
    back = names.vae_from_ldm(ldm, config)
    assert back.keys() == ours.keys()
    assert all(one_view(back[name], ours[name]) for name in ours)
    read = theirs.convert_ldm_vae_checkpoint({f"first_stage_model.{k}": t for k, t in ldm.items()}, dict(peer.config))
    assert read.keys() == ours.keys()
    assert all(one_view(read[name], ours[name]) for name in ours)


@pytest.mark.parametrize("config", [clip.OPEN_CLIP_H, clip.OPEN_CLIP_BIGG], ids=["H", "bigG"])
def test_open_clip_official_names(config):
    """The names and shapes that the released files have (written down here from the files, not from our walk)."""
    ours = state("text_encoder", config)
    packed = names.clip_to_open(ours, config.layers)
    d = config.width
    assert packed["transformer.resblocks.22.attn.in_proj_weight"].shape == (3 * d, d)
    assert packed["transformer.resblocks.0.attn.in_proj_bias"].shape == (3 * d,)
    assert packed["transformer.resblocks.0.mlp.c_fc.weight"].shape == (4 * d, d)
    assert packed["positional_embedding"].shape == (77, d)
    assert packed["token_embedding.weight"].shape == (49408, d)
    assert {
        "ln_final.weight",
        "transformer.resblocks.1.ln_2.bias",
        "transformer.resblocks.1.attn.out_proj.bias",
    } <= set(packed)
    assert ("text_projection" in packed) == bool(config.projection)
    assert len(packed) == 12 * config.layers + 4 + bool(config.projection)
    assert names.clip_from_open(packed, config.layers).keys() == ours.keys()


@pytest.mark.parametrize("projection", [0, 24], ids=["SD2", "SDXL"])
def test_open_clip_values_as_diffusers_reads_them(projection):
    config = clip.CLIPTextConfig(32, 3, 4, 64, "gelu", positions=16, vocab=99, projection=projection, eos_id=98)
    ours = {name: torch.randn(t.shape) for name, t in state("text_encoder", config).items()}
    packed = names.clip_to_open(ours, config.layers)
    back = names.clip_from_open(packed, config.layers)
    assert back.keys() == ours.keys() and all(torch.equal(back[name], ours[name]) for name in ours)
    with torch.device("meta"):
        peer = peers.theirs_of(config)
    single = {f"conditioner.embedders.1.model.{k}": t for k, t in packed.items()}
    read = theirs.convert_open_clip_checkpoint(peer, single, prefix="conditioner.embedders.1.model.")
    assert read.keys() == ours.keys() and all(torch.equal(read[name], ours[name]) for name in ours)


def test_official_single_file_names():
    """Names that stand in the released SD 1.5 and SDXL files."""
    sd1 = set(names.unet_to_ldm(state("unet", unet.SD15), unet.SD15))
    assert len(sd1) == 686
    assert {
        "input_blocks.2.1.transformer_blocks.0.attn2.to_k.weight",
        "input_blocks.3.0.op.weight",
        "middle_block.1.proj_in.weight",
        "output_blocks.2.1.conv.weight",  # no attention at the lowest level: the upsampler is second
        "output_blocks.5.2.conv.weight",
        "output_blocks.11.0.skip_connection.weight",
        "output_blocks.11.1.transformer_blocks.0.norm1.bias",
        "time_embed.2.bias",
        "out.2.weight",
    } <= sd1
    xl = set(names.unet_to_ldm(state("unet", unet.SDXL), unet.SDXL))
    assert len(xl) == 1680
    assert {
        "input_blocks.4.1.transformer_blocks.1.attn2.to_k.weight",
        "middle_block.1.transformer_blocks.9.ff.net.0.proj.weight",
        "label_emb.0.0.weight",
        "output_blocks.2.2.conv.weight",
        "output_blocks.8.0.emb_layers.1.weight",
    } <= xl
    assert "label_emb.weight" in names.unet_to_ldm(state("unet", unet.X4), unet.X4)
    auto = set(names.vae_to_ldm(state("vae", vae.SD_VAE), vae.SD_VAE))
    assert {"encoder.down.0.downsample.conv.weight", "decoder.up.3.upsample.conv.weight", "decoder.up.0.block.2.norm1.weight",
            "encoder.mid.attn_1.proj_out.weight", "decoder.mid.block_2.conv2.bias", "encoder.down.1.block.0.nin_shortcut.weight",
            "decoder.norm_out.weight"} <= auto  # fmt: skip


def test_old_vae_attention_names():
    config = vae.VAEConfig(channels=(32, 32))
    ours = {name: torch.randn(t.shape) for name, t in state("vae", config).items()}
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    aged = {}
    for name, tensor in ours.items():
        for new, was in old.items():
            name = name.replace(f"attentions.0.{new}.", f"attentions.0.{was}.")
        aged[name] = tensor
    assert aged.keys() != ours.keys()
    read = names.vae_spelling(aged)
    assert read.keys() == ours.keys() and all(torch.equal(read[name], ours[name]) for name in ours)
    for extra in ((..., None), (..., None, None)):  # 1 x 1 convolutions under today's names
        wide = {k: t[extra] if ".attentions.0.to_" in k and t.ndim == 2 else t for k, t in ours.items()}
        read = names.vae_spelling(wide)
        assert all(read[name].shape == ours[name].shape and torch.equal(read[name], ours[name]) for name in ours)


def test_text_prefix_that_newer_transformers_omits():
    ours = state("text_encoder", clip.CLIP_L)
    with torch.device("meta"):
        theirs_keys = peers.theirs_of(clip.CLIP_L).state_dict()
    assert not any(key.startswith("text_model.") for key in theirs_keys)
    assert names.clip_spelling(theirs_keys).keys() == ours.keys()
    assert names.clip_spelling(ours).keys() == ours.keys()


def test_two_spellings_of_one_tensor_are_refused():
    t = torch.zeros(1)
    with pytest.raises(CheckpointError, match="twice"):
        names.rename({"conv_in.weight": t, "input_blocks.0.0.weight": t}, names.swap(names.unet_modules(unet.SD15)))
    with pytest.raises(CheckpointError, match="twice"):
        names.clip_from_open({"text_projection": torch.zeros(2, 2), "text_projection.weight": torch.zeros(2, 2)}, 1)


def test_foreign_names_pass_through():
    t = torch.zeros(1)
    assert names.unet_from_ldm({"somebody.else.weight": t}, unet.SD15) == {"somebody.else.weight": t}
    assert names.follow("conv_in_extra.weight", names.unet_modules(unet.SD15)) == "conv_in_extra.weight"


def test_only_a_1x1_convolution_becomes_a_matrix():
    """The old layouts' attention projections [o, i, 1] and [o, i, 1, 1] become matrices; others are left to be refused."""
    at = "encoder.mid_block.attentions.0.to_q.weight"
    assert names.vae_spelling({at: torch.zeros(8, 8, 1, 1)})[at].shape == (8, 8)
    for shape in ((8, 8, 1, 1, 1), (8, 8, 3, 3)):
        assert names.vae_spelling({at: torch.zeros(shape)})[at].shape == shape
