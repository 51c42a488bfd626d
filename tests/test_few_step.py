"""Few-step models: a UNet that hears the guidance scale; presets as the model cards have them; what is known of a model."""

import diffusers
import pytest
import torch
from sdcore.weights.configs import unet_config, unet_table

from sdcore.errors import ConfigError
from sdcore.unet import SD15, UNet, UNetConfig, scale_sinusoids
from tests.peers import inputs, randomise, small

# ------------------------------------------------------------------------------------------------ a UNet that hears the scale

LCM = UNetConfig(**{**small(SD15).__dict__, "guidance_dim": 24})


@pytest.fixture(scope="module")
def twins():
    """A UNet of LCM's kind, ours and diffusers', with the same weights."""
    with torch.device("meta"):
        theirs, ours = diffusers.UNet2DConditionModel.from_config(unet_table(LCM)), UNet(LCM)
    randomise(theirs)
    ours.load_state_dict(theirs.state_dict(), strict=True, assign=True)
    return ours.eval(), theirs.eval()


@torch.no_grad()
def test_a_unet_that_hears_the_guidance_scale_is_bit_equal_to_diffusers(twins):
    """LCM_Dreamshaper_v7's kind: sinusoids of scale - 1, through cond_proj, beside those of the time."""
    ours, theirs = twins
    (x, t, context, _, _), _ = inputs(LCM, size=(16, 16))
    scale = torch.tensor([8.0, 1.5])
    embed = diffusers.LatentConsistencyModelPipeline.get_guidance_scale_embedding
    want = theirs(x, t, encoder_hidden_states=context, timestep_cond=embed(None, scale - 1, LCM.guidance_dim)).sample
    assert torch.equal(ours(x, t, context, scale=scale), want)
    assert not torch.equal(ours(x, t, context, scale=scale.flip(0)), want)


def test_the_embedding_of_a_scale_is_diffusers():
    scale = torch.tensor([1.0, 1.7, 7.5, 8.0, 14.0])
    embed = diffusers.LatentConsistencyModelPipeline.get_guidance_scale_embedding
    assert torch.equal(scale_sinusoids(scale, 256), embed(None, scale - 1, 256))


def test_a_unet_that_hears_the_scale_says_so_when_it_is_not_told(twins):
    x, t, context, *_ = inputs(LCM)[0]
    with pytest.raises(ConfigError, match="scale"):
        twins[0](x, t, context)


def test_the_width_of_the_embedding_goes_round_through_config_json():
    assert unet_table(LCM)["time_cond_proj_dim"] == 24 and unet_config(unet_table(LCM)) == LCM
    assert "time_cond_proj_dim" not in unet_table(small(SD15))
