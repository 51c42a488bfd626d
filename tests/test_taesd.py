"""TAESD at full size is diffusers' AutoencoderTiny, bit for bit, from every layout of its files."""

import json

import diffusers
import pytest
import sdcore.weights
import torch
from sdcore.weights import files
from sdcore.weights.taesd import load_taesd

from sdcore.errors import CheckpointError, ConfigError
from sdcore.taesd import TAESD, TAESDConfig, preview
from tests import peers


@pytest.fixture(scope="module")
def theirs():
    with torch.device("meta"):
        model = diffusers.AutoencoderTiny()
    return peers.randomise(model).eval().requires_grad_(False)


def original(theirs, half: str) -> dict:
    """The state of one half as the original files have it: the decoder's row begins with a clamp."""
    state = getattr(theirs, half).layers.state_dict()
    return {f"{int(n.split('.')[0]) + (half == 'decoder')}.{n.split('.', 1)[1]}": t for n, t in state.items()}


@pytest.fixture(scope="module")
def folders(theirs, tmp_path_factory):
    """The diffusers layout, and original files as .safetensors and as .pth."""
    folder = tmp_path_factory.mktemp("taesd")
    theirs.save_pretrained(folder / "diffusers")
    for half in ("encoder", "decoder"):
        (folder / "original").mkdir(exist_ok=True)
        (folder / "pickled").mkdir(exist_ok=True)
        files.write(folder / "original" / f"taesdxl_{half}.safetensors", original(theirs, half))
        torch.save(original(theirs, half), folder / "pickled" / f"taesd_{half}.pth")
    return folder


def equal(taesd: TAESD, theirs, encoder: bool = True) -> None:
    g = torch.Generator().manual_seed(0)
    z = 2 * torch.randn(1, 4, 12, 20, generator=g)  # some beyond the clamp at 3
    assert torch.equal(taesd.decode(z), theirs.decode(z).sample)
    if encoder:
        pixels = torch.rand(1, 3, 96, 72, generator=g) * 2 - 1
        assert torch.equal(taesd.encode(pixels), theirs.encode(pixels).latents)


def test_names_and_shapes(theirs):
    with torch.device("meta"):
        ours = TAESD()
    assert {n: t.shape for n, t in ours.state_dict().items()} == {n: t.shape for n, t in theirs.state_dict().items()}
    assert sum(p.numel() for p in ours.parameters()) == 2_445_063  # the released files' size: 4.9 MB a half in fp32


@pytest.mark.parametrize("where", [
    "diffusers", "original", "original/taesdxl_decoder.safetensors", "original/taesdxl_encoder.safetensors", "pickled",
    "pickled/taesd_decoder.pth",
])  # fmt: skip
def test_as_diffusers_from_every_layout(folders, theirs, where):
    taesd = load_taesd(folders / where, "cpu")
    assert not taesd.training and not any(p.requires_grad for p in taesd.parameters())
    equal(taesd, theirs)


def test_decoder_alone(theirs, tmp_path):
    files.write(tmp_path / "taesd_decoder.safetensors", original(theirs, "decoder"))
    for where in (tmp_path, tmp_path / "taesd_decoder.safetensors"):
        taesd = load_taesd(where, "cpu")
        equal(taesd, theirs, encoder=False)
        with pytest.raises(ConfigError, match="only its decoder"):
            taesd.encode(torch.zeros(1, 3, 8, 8))


def test_half_precision(folders, theirs):
    taesd = load_taesd(folders / "original", "cpu", "bf16")
    z = torch.randn(1, 4, 2, 3, generator=torch.Generator().manual_seed(0))
    theirs = diffusers.AutoencoderTiny.from_pretrained(folders / "diffusers", torch_dtype=torch.bfloat16)
    assert torch.equal(taesd.decode(z.bfloat16()), theirs.decode(z.bfloat16()).sample)


def test_preview(folders, theirs):
    pipe = sdcore.load("tiny", device="cpu")
    x0 = torch.randn(2, 4, 4, 5, generator=torch.Generator().manual_seed(0))
    taesd = load_taesd(folders / "diffusers", "cpu")
    assert torch.equal(preview(pipe, x0, taesd), theirs.decode(x0).sample)
    assert torch.equal(preview(pipe, x0), pipe.decode(x0))
    assert preview(pipe, x0, taesd.double()).dtype == torch.float32
    with pytest.raises(ConfigError, match="takes 16 latent channels, this model has 4"):
        preview(pipe, x0, TAESD(TAESDConfig(latent_channels=16)))


# --- what is wrong is said


def config_with(folders, tmp_path, **values):
    config = json.loads((folders / "diffusers/config.json").read_text()) | values
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "diffusion_pytorch_model.safetensors").symlink_to(
        folders / "diffusers/diffusion_pytorch_model.safetensors"
    )
    return tmp_path


@pytest.mark.parametrize("values, says", [
    ({"_class_name": "AutoencoderKL"}, "_class_name is 'AutoencoderKL', supported: AutoencoderTiny"),
    ({"act_fn": "silu"}, "act_fn is 'silu'"),
    ({"upsampling_scaling_factor": 4}, "upsampling_scaling_factor is '4'"),
    ({"num_decoder_blocks": [3, 3, 1]}, "num_decoder_blocks"),
    ({"encoder_block_out_channels": [64, 64, 64, 32]}, "one width"),
    ({"latent_channels": 0}, "latent_channels is '0'"),
    ({"latent_channels": 16}, r"has shape \[64, 4, 3, 3\], expected \[64, 16, 3, 3\]"),
    ({"scaling_factor": 0.5}, "scaling_factor is '0.5'"),
    ({"surprise": 1}, "unknown here"),
])  # fmt: skip
def test_config_of_another_model(folders, tmp_path, values, says):
    with pytest.raises(CheckpointError, match=says) as error:
        load_taesd(config_with(folders, tmp_path, **values), "cpu")
    assert "\n" not in str(error.value)


def test_files_of_another_model(folders, theirs, tmp_path):
    decoder = original(theirs, "decoder")
    (tmp_path / "empty").mkdir()
    files.write(tmp_path / "a_decoder.safetensors", {"decoder.conv_in.weight": torch.zeros(1)})
    files.write(tmp_path / "b_decoder.safetensors", {name: t for name, t in decoder.items() if name != "1.weight"})
    files.write(tmp_path / "c_decoder.safetensors", original(theirs, "encoder"))
    files.write(tmp_path / "d_decoder.safetensors", decoder | {"1.bias": torch.full((64,), float("nan"))})
    files.write(tmp_path / "e_encoder.safetensors", original(theirs, "encoder"))
    for where, says in {
        "nowhere": "expected a TAESD's folder", "empty": "no TAESD decoder", ".": "more than one TAESD decoder",
        "nowhere_decoder.pth": "no such file", "a_decoder.safetensors": "no layer of a TAESD decoder",
        "b_decoder.safetensors": r"lacks 1 tensor \(decoder.layers.0.weight\)", "c_decoder.safetensors": "lacks",
        "d_decoder.safetensors": "NaN", "e_encoder.safetensors": "no TAESD decoder",
    }.items():  # fmt: skip
        with pytest.raises(CheckpointError, match=says) as error:
            load_taesd(tmp_path / where, "cpu")
        assert "\n" not in str(error.value)
