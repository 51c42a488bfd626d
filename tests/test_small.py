"""Every family at small size against its peer: whole models, odd sizes, and the seams (residuals, halves, swapped operations).

Small enough to run once for every planted fault of test_mutations.py.
"""

from dataclasses import replace

import pytest
import torch

from sdcore import ops, unet, vae
from sdcore.clip import CLIPTextConfig, CLIPVisionConfig
from tests import peers

FAMILIES = ["SD15", "SD15_INPAINT", "IP2P", "SD2", "SD21_V", "SD2_INPAINT", "SD2_DEPTH", "X4", "SDXL", "SDXL_INPAINT",
            "SDXL_REFINER"]  # fmt: skip


@pytest.mark.parametrize("size", [(16, 16), (10, 14)], ids=["even", "odd"])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_unet(family, size):
    config = peers.small(getattr(unet, family))
    ours, theirs = peers.twins(config)
    (x, t, context, added, labels), peer = peers.inputs(config, size, tokens=9)
    assert torch.equal(ours(x, t, context, added, labels), theirs(x, t, context, **peer).sample)


@torch.no_grad()
def test_unet_one_timestep_for_all():
    ours, theirs = peers.twins(peers.small(unet.SD15))
    (x, _, context, _, _), _ = peers.inputs(ours.config, tokens=9)
    assert torch.equal(ours(x, torch.tensor(41), context), theirs(x, 41, context).sample)


@pytest.mark.parametrize("family", ["SD15", "SDXL"])
@torch.no_grad()
def test_unet_residuals(family):
    """What ControlNets add: to every kept result, and the last one to the middle."""
    config = peers.small(getattr(unet, family))
    ours, theirs = peers.twins(config)
    (x, t, context, added, labels), peer = peers.inputs(config, tokens=9)
    kv, shifts = ours.keys_values(context), ours.time_shifts(ours.embed_time(t, added, labels))
    middle, skips = ours.down(ours.conv_in(x), iter(shifts), iter(kv))
    g = torch.Generator().manual_seed(2)
    residuals = [torch.randn(s.shape, generator=g) for s in [*skips, middle]]
    want = theirs(x, t, context, down_block_additional_residuals=residuals[:-1],
                  mid_block_additional_residual=residuals[-1], **peer).sample  # fmt: skip
    assert torch.equal(ours(x, t, context, added, labels, residuals), want)


@pytest.mark.parametrize("family", ["SD15", "SDXL", "X4"])
@torch.no_grad()
def test_once_per_picture_and_once_per_step(family):
    """`forward` is the two halves in a row, and keys and values may be computed long before."""
    config = peers.small(getattr(unet, family))
    ours, _ = peers.twins(config)
    (x, t, context, added, labels), _ = peers.inputs(config, tokens=9)
    kv = ours.keys_values(context)
    shifts = ours.time_shifts(ours.embed_time(t, added, labels))
    assert torch.equal(ours.step(x, shifts, kv), ours(x, t, context, added, labels))


@torch.no_grad()
def test_vae():
    ours, theirs = peers.twins(vae.VAEConfig(channels=(32, 32, 64, 64), layers=1, norm_groups=8))
    g = torch.Generator().manual_seed(1)
    for batch, size in [(1, (32, 32)), (2, (48, 32))]:
        pixels, z = torch.randn(batch, 3, *size, generator=g), torch.randn(batch, 4, 6, 4, generator=g)
        mine, other = ours.encode(pixels), theirs.encode(pixels).latent_dist
        assert torch.equal(mine.mean, other.mean) and torch.equal(mine.logvar, other.logvar)
        assert torch.equal(ours.decode(z), theirs.decode(z).sample)


@pytest.mark.parametrize("projection", [0, 24])
@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
@torch.no_grad()
def test_text(activation, projection):
    config = CLIPTextConfig(width=64, layers=3, heads=4, mlp=128, activation=activation, positions=20, vocab=100,
                            projection=projection, eos_id=99)  # fmt: skip
    ours, theirs = peers.twins(config)
    ids = torch.randint(0, 98, (3, 20), generator=torch.Generator().manual_seed(1))
    ids[0, 5:], ids[1, 19], ids[2, 9] = 99, 99, 99
    mine, other = ours(ids), theirs(ids, output_hidden_states=True)
    assert torch.equal(mine.last, other.last_hidden_state)
    assert all(torch.equal(a, b) for a, b in zip(mine.states, other.hidden_states, strict=True))
    assert torch.equal(mine.pooled, other.text_embeds if projection else other.pooler_output)


@torch.no_grad()
def test_vision():
    config = CLIPVisionConfig(width=64, layers=2, heads=4, mlp=128, image_size=56, projection=24)
    ours, theirs = peers.twins(config)
    pixels = torch.randn(2, 3, 56, 56, generator=torch.Generator().manual_seed(1))
    assert torch.equal(ours(pixels).embedding, theirs(pixels).image_embeds)


@torch.no_grad()
def test_operations_can_be_swapped():
    """`ops.using` reaches every call, asks `accepts`, and leaves no trace."""
    ours, _ = peers.twins(peers.small(unet.SD15))
    (x, t, context, _, _), _ = peers.inputs(ours.config, tokens=9)
    want, seen = ours(x, t, context), []

    def counting(name):
        def kernel(*args, **kwargs):
            seen.append(name)
            return ops.REFERENCES[name](*args, **kwargs)

        return kernel

    with ops.using(**{name: counting(name) for name in ops.REFERENCES}):
        assert torch.equal(ours(x, t, context), want)
    transformers = sum(isinstance(m, unet.TransformerLayer) for m in ours.modules())
    assert seen.count("attention") == 2 * transformers and seen.count("geglu") == transformers
    assert seen.count("layer_norm") == 3 * transformers and "group_norm_silu" in seen and "group_norm" in seen

    choosy = counting("geglu")
    choosy.accepts = lambda x: False
    seen.clear()
    with ops.using(geglu=choosy):
        assert torch.equal(ours(x, t, context), want)
    assert not seen
    assert not ops._in_use
    with pytest.raises(KeyError, match="no such operation: gelu"):
        with ops.using(gelu=choosy):
            pass


@torch.no_grad()
def test_compiles_and_exports_whole():
    """No graph break in the UNet, with and without a replaced operation."""
    few = replace(peers.small(unet.SDXL), depths=(0, 1, 1), mid_depth=1, layers=1)  # ten of a kind trace no otherwise
    ours, _ = peers.twins(few)
    (x, t, context, added, _), _ = peers.inputs(ours.config, tokens=9)
    want = ours(x, t, context, added)
    exported = torch.export.export(ours, (x, t, context, added)).module()
    torch.testing.assert_close(exported(x, t, context, added), want, rtol=0, atol=0)
    compiled = torch.compile(ours, fullgraph=True, backend="eager")
    assert torch.equal(compiled(x, t, context, added), want)
    with ops.using(geglu=lambda x: ops.REFERENCES["geglu"](x)):
        assert torch.equal(torch.compile(ours, fullgraph=True, backend="eager")(x, t, context, added), want)
