"""Loading: every family from a folder and from a single file, nothing used silently, everything wrong named in one line."""

import json
import logging
import os
import re
import shutil
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import diffusers
import pytest
import torch
from sdcore.weights import checkpoint as ck
from sdcore.weights import configs, convert, detect, fetch, files, load
from sdcore.weights.assemble import skeleton
from sdcore.weights.report import inspect

import sdcore
from sdcore import scheduler, unet
from sdcore.errors import CheckpointError, ConfigError, NonFiniteError
from tests import peers, tiny_models, weight_models


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """One small model of each family as diffusers wrote it, made when first asked for."""
    made = {}

    def folder(family):
        if family not in made:
            made[family] = tiny_models.write_folder(tmp_path_factory.mktemp("models") / family, family)
        return made[family]

    return folder


@pytest.fixture(scope="module")
def smallest(tmp_path_factory):
    """The smallest SD 1.x as a folder, quick to copy and to spoil."""
    folder = tmp_path_factory.mktemp("smallest")
    checkpoint = weight_models.smallest(folder)
    tiny_models.write_tokenizer(folder / "vocab", *tiny_models.vocabulary(), "!", 8)
    checkpoint.tokenizers = {"tokenizer": folder / "vocab"}
    checkpoint.configs["text_encoder"] = replace(checkpoint.configs["text_encoder"], vocab=600, eos_id=599)
    table = checkpoint.tensors["text_encoder"]
    table["text_model.embeddings.token_embedding.weight"] = torch.randn(600, 8)
    convert.write_folder(checkpoint, folder / "model")
    return folder / "model"


@pytest.fixture
def model(smallest, tmp_path):
    """A copy of it that a test may spoil."""
    return Path(shutil.copytree(smallest, tmp_path / "model"))


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("the network was used")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)


def refused(path, *words, error=CheckpointError, **options):
    """Loading and inspecting both fail with one line that says all these words."""
    with pytest.raises(error) as caught:
        load.load_parts(path, "cpu", **options)
    text = str(caught.value)
    assert "\n" not in text and len(text) < 600
    for word in words:
        assert word in text, text
    return text


def spoil(model, part, change):
    """Rewrite one part's weights."""
    file = model / part / ck.weight_names(part, None)[0]
    tensors = {name: t.clone() for name, t in files.read(file).tensors.items()}
    change(tensors)
    files.write(file, tensors)
    return model


def edit(path, **changes):
    table = json.loads(path.read_text())
    path.write_text(json.dumps({key: value for key, value in (table | changes).items() if value != "remove"}))


# ---------------------------------------------------------------- what loads


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_folder_and_single_file(family, folders, tmp_path, no_network):
    source = folders(family)
    single = convert.convert(source, tmp_path / "m.safetensors")
    parts, other = load.load_parts(source, "cpu"), load.load_parts(single, "cpu")
    assert parts.family == other.family == {"sdxl-turbo": "sdxl"}.get(family, family)
    assert parts.scheduler == other.scheduler and parts.zero_negative == other.zero_negative
    assert not other.unused
    pairs = [
        (parts.unet, other.unet),
        (parts.vae, other.vae),
        *zip(parts.text_encoders, other.text_encoders, strict=True),
    ]
    for one, two in pairs:
        assert one.config == two.config and not one.training
        assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), two.state_dict().values(), strict=True))
        assert not any(p.is_meta or p.requires_grad for p in one.parameters())
    prompt = ["a red circle left of x"]
    for one, two in zip(parts.tokenizers, other.tokenizers, strict=True):
        assert torch.equal(one(prompt), two(prompt)) and one.max_length == tiny_models.POSITIONS


def test_folder_equals_diffusers(folders):
    source = folders("sdxl")
    parts, theirs = load.load_parts(source, "cpu"), diffusers.StableDiffusionXLPipeline.from_pretrained(source)
    for ours, peer in [
        (parts.unet, theirs.unet),
        (parts.vae, theirs.vae),
        (parts.text_encoders[1], theirs.text_encoder_2),
    ]:
        assert ours.state_dict().keys() == peer.state_dict().keys()
        assert all(torch.equal(t, peer.state_dict()[name]) for name, t in ours.state_dict().items())


def test_a_pipeline_that_draws(smallest):
    pipe = sdcore.load(str(smallest), device="cpu")
    assert pipe.family == "sd1" and pipe("a red circle", steps=2, seed=0).latents.isfinite().all()


def test_parameters_are_the_mapped_file(smallest):
    parts = load.load_parts(smallest, "cpu")
    assert len({p.untyped_storage().data_ptr() for p in parts.unet.parameters()}) == 1


def test_dtype_and_device(smallest, monkeypatch):
    assert next(load.load_parts(smallest, "cpu", "bf16").unet.parameters()).dtype == torch.bfloat16
    assert next(load.load_parts(smallest, "cpu", torch.float16).vae.parameters()).dtype == torch.float16
    assert load.default_dtype(torch.device("cpu")) == torch.float32
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert load.default_dtype(torch.device("cuda")) == torch.float16
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert load.default_dtype(torch.device("cuda")) == torch.bfloat16
    refused(smallest, "dtype 'int4'", error=ConfigError, dtype="int4")
    with pytest.raises(ConfigError, match="device"):
        load.load_parts(smallest, "gpu")


def test_ckpt_and_ema_and_known_unused(folders, tmp_path):
    """A training file as CompVis wrote them: pickle, EMA copies, schedule buffers, position ids."""
    source = folders("sd1")
    tensors = weight_models.single_tensors(ck.read(source))
    ema = {
        f"model_ema.diffusion_model{name.removeprefix('model.diffusion_model.').replace('.', '')}": t + 1
        for name, t in tensors.items() if name.startswith("model.diffusion_model.")
    }  # fmt: skip
    unused = {"alphas_cumprod": torch.ones(9), "sqrt_one_minus_alphas_cumprod": torch.ones(9), "betas": torch.ones(9),
              "posterior_variance": torch.ones(9), "model_ema.decay": torch.ones(()), "model_ema.num_updates": torch.ones(()),
              "cond_stage_model.transformer.text_model.embeddings.position_ids": torch.arange(9)[None]}  # fmt: skip
    own = {part: ck.WRITERS[part](config) for part, config in ck.read(source).configs.items()}
    torch.save({"state_dict": tensors | ema | unused, "epoch": 3}, tmp_path / "m.ckpt")
    files.write(tmp_path / "m.safetensors", tensors | ema | unused, {ck.CONFIG_KEY: json.dumps(own)})
    parts = load.load_parts(tmp_path / "m.safetensors", "cpu", tokenizer=source / "tokenizer")
    assert set(parts.unused) == {*ema, *unused}
    averaged = load.load_parts(tmp_path / "m.safetensors", "cpu", ema=True, tokenizer=source / "tokenizer")
    assert torch.equal(averaged.unet.conv_in.weight, parts.unet.conv_in.weight + 1)
    assert torch.equal(averaged.vae.quant_conv.weight, parts.vae.quant_conv.weight)
    read = files.read(tmp_path / "m.ckpt")
    assert all(torch.equal(read.tensors[name], t) for name, t in tensors.items())
    del tensors["model.diffusion_model.out.2.bias"]
    some = {k: t for k, t in ema.items() if not k.endswith("out2bias")}
    files.write(tmp_path / "m.safetensors", tensors | some, {ck.CONFIG_KEY: json.dumps(own)})
    refused(tmp_path / "m.safetensors", "unet lacks 1 tensor (conv_out.bias)", tokenizer=source / "tokenizer")


def test_old_names_bin_shards_and_fp16(model):
    """What released folders have had over the years: pickles, shards, fp16 only, old names, buffers."""

    def aged(tensors):
        for name in list(tensors):
            for new, old in {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}.items():
                if f"attentions.0.{new}." in name:
                    tensors[name.replace(new, old)] = tensors.pop(name)

    want = load.load_parts(model, "cpu")
    spoil(model, "vae", aged)
    text = model / "text_encoder" / "model.safetensors"
    tensors = {k.removeprefix("text_model."): t.clone() for k, t in files.read(text).tensors.items()}
    text.unlink()
    torch.save(
        tensors | {"embeddings.position_ids": torch.arange(8)[None]}, model / "text_encoder" / "pytorch_model.bin"
    )
    file = model / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = {k: t.clone() for k, t in files.read(file).tensors.items()}
    file.unlink()
    names = sorted(tensors)
    shards = [names[::2], names[1::2]]
    for i, shard in enumerate(shards):
        files.write(model / "unet" / f"diffusion_pytorch_model-{i}-of-2.safetensors", {n: tensors[n] for n in shard})
    index = {
        "weight_map": {n: f"diffusion_pytorch_model-{i}-of-2.safetensors" for i, s in enumerate(shards) for n in s}
    }
    (model / "unet" / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    got = load.load_parts(model, "cpu")
    assert got.unused == ["text_encoder: text_model.embeddings.position_ids"]
    for one, two in [(want.unet, got.unet), (want.vae, got.vae), (want.text_encoders[0], got.text_encoders[0])]:
        assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), two.state_dict().values(), strict=True))
    index["weight_map"][names[0]] = "../../secret.safetensors"
    (model / "unet" / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    refused(model, "plain file names")


def test_variants(model):
    file = model / "unet" / "diffusion_pytorch_model.safetensors"
    half = {k: t.half() for k, t in files.read(file).tensors.items()}
    files.write(model / "unet" / "diffusion_pytorch_model.fp16.safetensors", half)
    refused(model, "vae", "diffusion_pytorch_model.fp16.safetensors", variant="fp16")
    file.unlink()
    assert torch.equal(load.load_parts(model, "cpu").unet.conv_in.weight, half["conv_in.weight"].float())


def test_safety_checker_is_left_out_and_said_once(model, caplog):
    (model / "safety_checker").mkdir()
    (model / "safety_checker" / "model.safetensors").write_bytes(b"not looked at")
    with caplog.at_level(logging.WARNING, logger="sdcore"):
        for _ in range(2):
            load.load_parts(model, "cpu")
    assert [record.message.count("safety_checker left out") for record in caplog.records] == [1]


# ---------------------------------------------------------------- detection from shapes alone


def official(family, **extra):
    """An original single file of official size, of names and shapes alone."""
    release = detect.FAMILIES[family]
    parts = {"unet": release.unet, "vae": release.vae, **release.text}
    states = {part: skeleton(part, config).state_dict() for part, config in parts.items()}
    checkpoint = ck.Checkpoint(Path("m"), "diffusers", family, parts, states, {})
    return files.WeightFile(Path("m.safetensors"), "safetensors", weight_models.single_tensors(checkpoint) | extra)


LAST_NORM = "model.diffusion_model.output_blocks.11.1.transformer_blocks.0.norm1.bias"


@pytest.mark.parametrize("family", detect.FAMILIES)
def test_family_from_shapes(family):
    extra = {}
    if family in ("sd2", "sd2-base"):
        extra = {LAST_NORM: torch.linspace(-1, 1, 320) * (0.3 if family == "sd2" else 0.1)}
    found = ck.single(official(family, **extra), ema=False)
    release = detect.FAMILIES[family]
    assert found.family == family and not found.unused
    assert found.configs == {"unet": release.unet, "vae": release.vae, **release.text, "scheduler": release.scheduler}
    for part, tensors in found.tensors.items():
        want = skeleton(part, found.configs[part]).state_dict()
        assert {k: t.shape for k, t in tensors.items()} == {k: t.shape for k, t in want.items()}


def test_what_open_clip_files_hold_more():
    """SD 2.x files hold a 24th block and a projection that nobody reads; XL ones a logit scale."""
    block = {
        f"cond_stage_model.model.transformer.resblocks.23.{n}": torch.ones(1)
        for n in ("ln_1.weight", "attn.in_proj_bias")
    }
    more = block | {
        "cond_stage_model.model.text_projection": torch.ones(1),
        "cond_stage_model.model.logit_scale": torch.ones(()),
    }
    found = ck.single(official("sd2-inpaint", **more), ema=False)
    assert sorted(found.unused) == sorted(more)
    found = ck.single(official("sdxl", **{"conditioner.embedders.1.model.logit_scale": torch.ones(())}), ema=False)
    assert found.unused == ["conditioner.embedders.1.model.logit_scale"]


def test_prediction_type():
    file = official("sdxl", v_pred=torch.zeros(0), ztsnr=torch.zeros(0))
    found = ck.single(file, ema=False).scheduler
    assert found.prediction_type == "v_prediction" and found.zero_snr
    file = official("sd1")
    file.metadata["modelspec.prediction_type"] = "v"
    assert ck.single(file, ema=False).scheduler.prediction_type == "v_prediction"
    file = official("sd2", **{LAST_NORM: torch.zeros(320)})
    assert ck.single(file, ema=False).family == "sd2-base"


DERIVED = {
    "SSD-1B": replace(unet.SDXL, depths=(0, 2, 4), mid_depth=0),
    "Vega": replace(unet.SDXL, depths=(0, 1, 2), mid_depth=1),
    "KOALA-700M": replace(unet.SDXL, depths=(0, 2, 5), mid_depth=5),
    "8 input channels": replace(unet.SDXL, in_channels=8),
    "unCLIP": replace(unet.SD21_V, added_dim=2048),
    "widths": replace(unet.SD15, channels=(64, 128, 256, 256)),
}


@pytest.mark.parametrize("name", DERIVED)
def test_kin_that_are_not_supported_are_named(name):
    with pytest.raises(CheckpointError, match=name):
        detect.family_of(DERIVED[name])


KINDS = {
    "lora": ["lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight", "lora_te_text_model.alpha"],
    "controlnet": ["control_model.input_blocks.0.0.weight", "control_model.zero_convs.0.0.weight"],
    "t2i-adapter": ["body.0.in_conv.weight"],
    "ip-adapter": ["image_proj.proj.weight", "ip_adapter.1.to_k_ip.weight"],
    "embedding": ["emb_params"],
    "sd3": ["model.diffusion_model.joint_blocks.0.context_block.attn.qkv.weight"],
    "flux": ["double_blocks.0.img_attn.norm.key_norm.scale"],
    "unclip": ["noise_augmentor.betas", "model.diffusion_model.input_blocks.0.0.weight"],
    "cosxl": ["edm_vpred.sigma_max", "model.diffusion_model.input_blocks.0.0.weight"],
    "playground": ["edm_mean", "model.diffusion_model.input_blocks.0.0.weight"],
    "vae": ["decoder.conv_in.weight", "encoder.down.0.block.0.conv1.weight"],
    "unet": ["conv_in.weight", "down_blocks.0.resnets.0.conv1.weight"],
    "text-encoder": ["text_model.encoder.layers.0.layer_norm1.weight"],
    "vision": ["vision_model.encoder.layers.0.layer_norm1.weight"],
    "unknown": ["some.weight"],
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_other_files_are_named_and_not_loaded(kind, tmp_path):
    path = tmp_path / "x.safetensors"
    files.write(path, {name: torch.zeros(4, 4) for name in KINDS[kind]}, {"ss_base_model_version": "sd_v1\x1b[31m"})
    report = inspect(path)
    assert report.kind == kind and not report.loads and json.loads(report.to_json())["kind"] == kind
    assert report.what in report.to_text() and "\x1b" not in report.to_text()
    refused(path, re.split("; | that does not fit| for a UNet", report.what)[0])  # of adapters, inspect says more


def test_inspect_a_model(folders, tmp_path):
    single = convert.convert(folders("sdxl"), tmp_path / "m.safetensors")
    report = inspect(single)
    table = json.loads(report.to_json())
    assert (
        table["family"] == "sdxl" and table["loads"] and table["prediction"] == "epsilon" and table["layout"] == "ldm"
    )
    assert {name: part["into"] for name, part in table["parts"].items()} == {
        "unet": "UNet", "vae": "VAE", "text_encoder": "CLIPText", "text_encoder_2": "CLIPText"}  # fmt: skip
    assert "float32" in report.to_text() and "Stable Diffusion XL base" in report.to_text()
    assert inspect(folders("sd2")).prediction == "v_prediction"


def test_vae_alone(folders, tmp_path):
    source = folders("sd1")
    state = ck.read(source).tensors["vae"]
    ours = load.load_vae(source / "vae", "cpu")
    assert torch.equal(ours.quant_conv.weight, state["quant_conv.weight"])
    with pytest.raises(CheckpointError, match="expected an autoencoder"):
        load.load_vae(source / "unet" / "diffusion_pytorch_model.safetensors", "cpu")


# ---------------------------------------------------------------- what is wrong with weights (faults B1-B6)


def test_missing_keys(model):
    def drop(tensors):
        for name in [n for n in tensors if ".attn" in n]:
            del tensors[name]

    text = refused(
        spoil(model, "unet", drop), "unet lacks", "attentions.0.transformer_blocks.0.attn1.to_k.weight", "..."
    )
    assert text.count("attn") <= 6


def test_extra_keys(model):
    refused(
        spoil(model, "unet", lambda t: t.update({"extra.weight": torch.zeros(1)})),
        "no place for 1 tensor (extra.weight)",
    )


def test_wrong_shape_names_the_kind(model):
    def nine(tensors):
        tensors["conv_in.weight"] = torch.zeros(8, 9, 3, 3)

    refused(
        spoil(model, "unet", nine),
        "conv_in.weight",
        "[8, 9, 3, 3]",
        "[8, 4, 3, 3]",
        "9 input channels: an inpainting UNet",
    )


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_not_finite(model, value):
    def break_one(tensors):
        tensors["decoder.conv_out.weight"].view(-1)[7] = value

    text = refused(
        spoil(model, "vae", break_one), "vae", "decoder.conv_out.weight", "NaN or infinity", error=NonFiniteError
    )
    with pytest.raises(CheckpointError):
        inspect(model)
    assert text


def test_large_but_finite_is_accepted(model):
    def large(tensors):
        tensors["decoder.conv_out.weight"].fill_(3e38)  # its sum overflows

    load.load_parts(spoil(model, "vae", large), "cpu")


def test_whole_numbers_for_weights(model):
    refused(
        spoil(model, "vae", lambda t: t.update({"quant_conv.bias": torch.zeros(8, dtype=torch.int64)})),
        "int64",
        "floating-point",
    )


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder", "scheduler", "tokenizer"])
def test_a_part_is_missing(model, part):
    shutil.rmtree(model / part)
    refused(model, f"{part}")


def test_weights_of_a_part_are_missing(model):
    (model / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    refused(model, "vae: no diffusion_pytorch_model.safetensors in it", "config.json")


def test_parts_of_two_families(folders, tmp_path):
    mixed = Path(shutil.copytree(folders("sd1"), tmp_path / "mixed"))
    shutil.rmtree(mixed / "text_encoder")
    shutil.copytree(folders("sdxl") / "text_encoder_2", mixed / "text_encoder")
    refused(mixed, "different families", "unet reads text of width 32", "text_encoder 64")
    mixed = Path(shutil.copytree(folders("sdxl"), tmp_path / "mixed2"))
    shutil.rmtree(mixed / "unet")
    shutil.copytree(folders("sd1") / "unet", mixed / "unet")
    refused(mixed, "different families")


def test_tokenizer_of_another_model(model):
    vocab, merges = tiny_models.vocabulary()
    tiny_models.write_tokenizer(
        model / "tokenizer", {**vocab, **{f"x{i}": len(vocab) + i for i in range(99)}}, merges, "!", 8
    )
    refused(model, "knows 687 tokens", "room for 600")


def test_single_file_without_a_tokenizer(folders, tmp_path, monkeypatch):
    single = convert.convert(folders("sd1"), tmp_path / "m.safetensors")
    shutil.rmtree(tmp_path / "m.tokenizer")
    refused(single, "no tokenizer", "tokenizer=", "hf download openai/clip-vit-large-patch14")
    shutil.copytree(folders("sd1") / "tokenizer", tmp_path / "tokenizer")
    assert load.load_parts(single, "cpu").tokenizers[0].vocab_size == 588


def test_hidden_second_text_encoder(folders, tmp_path):
    checkpoint = ck.read(folders("sd1"))
    own = json.dumps({part: ck.WRITERS[part](config) for part, config in checkpoint.configs.items()})
    tensors = weight_models.single_tensors(checkpoint)
    files.write(
        tmp_path / "m.safetensors",
        tensors | {"cond_stage_model.model.ln_final.bias": torch.zeros(4)},
        {ck.CONFIG_KEY: own},
    )
    refused(tmp_path / "m.safetensors", "two spellings")
    files.write(tmp_path / "m.safetensors", tensors | {"who.knows": torch.zeros(4)}, {ck.CONFIG_KEY: own})
    refused(tmp_path / "m.safetensors", "1 tensor (who.knows)", "no part")
    some = {k: t for k, t in tensors.items() if not k.startswith("first_stage_model.")}
    files.write(tmp_path / "m.safetensors", some, {ck.CONFIG_KEY: own})
    refused(tmp_path / "m.safetensors", "holds no vae")


# ---------------------------------------------------------------- configurations

BAD_CONFIGS = {
    "a billion layers": ("unet", {"layers_per_block": 10**9}, "layers_per_block", "1 to 4"),
    "a billion channels": ("unet", {"block_out_channels": [10**9, 10**9]}, "block_out_channels"),
    "large within range": (
        "unet",
        {"block_out_channels": [16384, 16384], "attention_head_dim": 8, "norm_num_groups": 4},
        "parameters",
    ),
    "text for a number": ("unet", {"in_channels": "4"}, "in_channels", "'4'"),
    "truth for a number": ("unet", {"in_channels": True}, "in_channels"),
    "negative heads": ("unet", {"attention_head_dim": -8}, "attention_head_dim"),
    "heads that do not divide": ("unet", {"attention_head_dim": 3}, "block_out_channels", "3"),
    "uneven levels": ("unet", {"block_out_channels": [8, 8, 8]}, "down_block_types"),
    "another block": ("unet", {"down_block_types": ["os.system", "DownBlock2D"]}, "down_block_types"),
    "up is no mirror": ("unet", {"up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"]}, "up_block_types", "mirror"),
    "another activation": ("unet", {"act_fn": "gelu"}, "act_fn", "'gelu'", "'silu'"),
    "another eps": ("unet", {"norm_eps": 1e-6}, "norm_eps", "1e-06", "1e-05"),
    "guidance embedding": ("unet", {"time_cond_proj_dim": -1}, "time_cond_proj_dim", "-1"),
    "unknown key": ("unet", {"frobnicate": 3}, "frobnicate", "3", "unknown"),
    "latents_mean": ("vae", {"latents_mean": [0.1]}, "latents_mean"),
    "NaN": ("vae", {"scaling_factor": float("nan")}, "scaling_factor"),
    "another text activation": ("text_encoder", {"hidden_act": "relu"}, "hidden_act", "quick_gelu"),
    "another class": ("scheduler", {"_class_name": "os.system"}, "_class_name", "EulerDiscreteScheduler"),
    "other betas": ("scheduler", {"trained_betas": [0.1]}, "trained_betas"),
    "thresholding": ("scheduler", {"thresholding": True}, "thresholding", "False only"),
    "prediction": ("scheduler", {"prediction_type": "flow"}, "prediction_type", "v_prediction"),
}


@pytest.mark.parametrize("case", BAD_CONFIGS)
@pytest.mark.timeout(30, func_only=True)
def test_bad_config(model, case):
    part, changes, *words = BAD_CONFIGS[case]
    edit(ck.config_file(model / part), **changes)
    refused(model, str(ck.config_file(model / part)), *words)


def test_config_that_is_no_json(model):
    (model / "unet" / "config.json").write_text("<html>")
    refused(model, "unet/config.json", "not JSON")
    (model / "unet" / "config.json").write_text("[1]")
    refused(model, "expected a table")
    (model / "unet" / "config.json").write_text(" " * 2**21)
    refused(model, "limit")


def test_released_config_files():
    """The configs as they stand in the released folders, with the keys of their time."""
    old = {"_class_name": "UNet2DConditionModel", "_diffusers_version": "0.6.0", "act_fn": "silu", "attention_head_dim": 8,
           "block_out_channels": [320, 640, 1280, 1280], "center_input_sample": False, "cross_attention_dim": 768,
           "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"], "downsample_padding": 1, "flip_sin_to_cos": True,
           "freq_shift": 0, "in_channels": 4, "layers_per_block": 2, "mid_block_scale_factor": 1, "norm_eps": 1e-05,
           "norm_num_groups": 32, "out_channels": 4, "sample_size": 64,
           "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3}  # fmt: skip
    assert configs.unet_config(old) == unet.SD15
    xl = old | {"addition_embed_type": "text_time", "addition_embed_type_num_heads": 64, "addition_time_embed_dim": 256,
                "attention_head_dim": [5, 10, 20], "block_out_channels": [320, 640, 1280], "class_embed_type": None,
                "cross_attention_dim": 2048, "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
                "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"], "num_class_embeds": None,
                "mid_block_type": "UNetMidBlock2DCrossAttn", "only_cross_attention": False, "sample_size": 128,
                "projection_class_embeddings_input_dim": 2816, "transformer_layers_per_block": [1, 2, 10],
                "upcast_attention": None, "use_linear_projection": True, "dual_cross_attention": False}  # fmt: skip
    assert configs.unet_config(xl) == unet.SDXL
    text = {"_name_or_path": "openai/clip-vit-large-patch14", "architectures": ["CLIPTextModel"], "attention_dropout": 0.0,
            "bos_token_id": 0, "dropout": 0.0, "eos_token_id": 2, "hidden_act": "quick_gelu", "hidden_size": 768,
            "initializer_factor": 1.0, "initializer_range": 0.02, "intermediate_size": 3072, "layer_norm_eps": 1e-05,
            "max_position_embeddings": 77, "model_type": "clip_text_model", "num_attention_heads": 12, "num_hidden_layers": 12,
            "pad_token_id": 1, "projection_dim": 768, "torch_dtype": "float32", "vocab_size": 49408}  # fmt: skip
    assert configs.text_config(text) == detect.FAMILIES["sd1"].text["text_encoder"]
    pndm = {"_class_name": "PNDMScheduler", "_diffusers_version": "0.6.0", "beta_end": 0.012, "beta_schedule": "scaled_linear",
            "beta_start": 0.00085, "num_train_timesteps": 1000, "set_alpha_to_one": False, "skip_prk_steps": True,
            "steps_offset": 1, "trained_betas": None, "clip_sample": False}  # fmt: skip
    assert configs.scheduler_config(pndm) == scheduler.SD15_SCHEDULER
    euler = {"_class_name": "EulerDiscreteScheduler", "_diffusers_version": "0.19.0.dev0", "beta_end": 0.012,
             "beta_schedule": "scaled_linear", "beta_start": 0.00085, "clip_sample": False, "interpolation_type": "linear",
             "num_train_timesteps": 1000, "prediction_type": "epsilon", "sample_max_value": 1.0, "set_alpha_to_one": False,
             "skip_prk_steps": True, "steps_offset": 1, "timestep_spacing": "leading", "trained_betas": None,
             "use_karras_sigmas": False}  # fmt: skip
    assert replace(configs.scheduler_config(euler), ays="sdxl") == scheduler.SDXL_SCHEDULER


@pytest.mark.parametrize("sampler", sorted(configs.CLASSES))
def test_every_scheduler_class_and_its_defaults(sampler):
    """A config that names the class alone has the class's own defaults, as diffusers fills them in."""
    name = configs.CLASSES[sampler]
    bare = {"_class_name": name} | ({"algorithm_type": "sde-dpmsolver++"} if sampler == "dpmpp_2m_sde" else {})
    ours, peer = configs.scheduler_config(bare), getattr(diffusers, name)()
    theirs_names = {"train_steps": "num_train_timesteps"}
    for mine in ("beta_start", "beta_end", "beta_schedule", "train_steps", "prediction_type", "steps_offset",
                 "set_alpha_to_one", "skip_prk_steps"):  # fmt: skip
        theirs = theirs_names.get(mine, mine)
        if theirs in peer.config:
            assert getattr(ours, mine) == peer.config[theirs], theirs
    assert ours.spacing is None and ours.sampler == sampler
    written = getattr(diffusers, name).from_config(
        configs.scheduler_table(replace(ours, prediction_type="v_prediction"))
    )
    assert written.config.prediction_type == "v_prediction"
    full = dict(peer.config) | {"_class_name": name}  # every key that save_pretrained writes is known
    full |= {"algorithm_type": "sde-dpmsolver++"} if sampler == "dpmpp_2m_sde" else {}
    assert configs.scheduler_config(full).sampler == sampler


@pytest.mark.parametrize("family", ["sd1", "sd2", "x4", "sdxl", "refiner"])
def test_our_configs_build_the_peers_models(family):
    release = detect.FAMILIES[family]
    with torch.device("meta"):
        for config, table in [(release.unet, configs.unet_table), (release.vae, configs.vae_table)]:
            cls = diffusers.UNet2DConditionModel if config is release.unet else diffusers.AutoencoderKL
            peer, want = cls.from_config(table(config)), peers.theirs_of(config)
            assert {k: t.shape for k, t in peer.state_dict().items()} == {
                k: t.shape for k, t in want.state_dict().items()
            }
            read = (
                configs.unet_config(dict(peer.config))
                if config is release.unet
                else configs.vae_config(dict(peer.config))
            )
            assert read == config


# ---------------------------------------------------------------- names, aliases, the hub (no network: the hub is a stand-in)


class Hub:
    """A repository of a few files, and what was asked of it."""

    def __init__(self, monkeypatch, listing, folder):
        self.asked = []

        def listed(repo, revision=None):
            self.asked.append(("list", repo, revision))
            if isinstance(listing, Exception):
                raise listing
            return listing

        def snapshot(repo, revision=None, allow_patterns=None, local_files_only=False):
            self.asked.append(("get", repo, allow_patterns, local_files_only))
            if isinstance(folder, Exception):
                raise folder
            return str(folder)

        import huggingface_hub

        monkeypatch.setattr(huggingface_hub, "list_repo_files", listed)
        monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)


LISTING = ["model_index.json", "README.md", "run_me.py", "unet/config.json", "unet/diffusion_pytorch_model.bin",
           "unet/diffusion_pytorch_model.safetensors", "unet/diffusion_pytorch_model.fp16.safetensors", "vae/config.json",
           "unet/diffusion_pytorch_model.non_ema.safetensors", "vae/diffusion_pytorch_model.fp16.safetensors",
           "vae/diffusion_pytorch_model.safetensors", "text_encoder/config.json", "text_encoder/pytorch_model.bin",
           "text_encoder/model.fp16.safetensors", "tokenizer/vocab.json", "tokenizer/merges.txt", "safety_checker/config.json",
           "scheduler/scheduler_config.json", "v1-5-pruned.ckpt"]  # fmt: skip


def test_hub_id_fetches_only_what_is_needed(monkeypatch, smallest, no_network):
    hub = Hub(monkeypatch, LISTING, smallest)
    assert load.load_parts("owner/name", "cpu", revision="abc").family == "sd1"
    (_, repo, revision), (_, _, wanted, _) = hub.asked
    assert (repo, revision) == ("owner/name", "abc")
    assert wanted == sorted([
        "model_index.json", "unet/config.json", "unet/diffusion_pytorch_model.safetensors", "vae/config.json",
        "vae/diffusion_pytorch_model.safetensors", "text_encoder/config.json", "text_encoder/pytorch_model.bin",
        "tokenizer/vocab.json", "tokenizer/merges.txt", "scheduler/scheduler_config.json"])  # fmt: skip
    assert "text_encoder/model.fp16.safetensors" in fetch.choose(LISTING, "r", "fp16")
    with pytest.raises(CheckpointError, match="bf16"):
        fetch.choose(LISTING, "r", "bf16")
    with pytest.raises(CheckpointError, match="owner/name/m.safetensors"):
        fetch.choose(["m.safetensors", "README.md"], "owner/name", None)


def test_aliases(monkeypatch, tmp_path):
    hub = Hub(monkeypatch, LISTING, tmp_path)
    assert fetch.resolve("sd15") == tmp_path and hub.asked[0][1] == "stable-diffusion-v1-5/stable-diffusion-v1-5"
    for name, known in fetch.manifest()["model"].items():
        assert known["repo"].count("/") == 1 and known["licence"], name
        assert known["repo"] not in fetch.manifest()["moved"]
    assert fetch.aliases()[0] == "tiny"


def test_hub_refusals(monkeypatch, tmp_path):
    from huggingface_hub import errors

    def failing(kind):
        error = kind.__new__(kind)
        Exception.__init__(error, "said by the hub")
        return error

    cases = {
        errors.GatedRepoError: ("licence", "https://huggingface.co/owner/name", "hf auth login"),
        errors.RepositoryNotFoundError: ("no such repository", "private"),
        errors.RevisionNotFoundError: ("no revision 'abc'",),
    }
    for kind, words in cases.items():
        Hub(monkeypatch, failing(kind), tmp_path)
        refused("owner/name", *words, revision="abc")
    Hub(monkeypatch, failing(errors.GatedRepoError), tmp_path)
    refused("sd15", "the same model is at botp/")
    Hub(monkeypatch, ConnectionError("no route"), failing(errors.LocalEntryNotFoundError))
    refused("owner/name", "not in the cache", "offline")
    refused("runwayml/stable-diffusion-v1-5", "removed", "stable-diffusion-v1-5/stable-diffusion-v1-5")


def test_offline_uses_the_cache(monkeypatch, smallest, caplog):
    from huggingface_hub import errors

    hub = Hub(monkeypatch, errors.OfflineModeIsEnabled("offline"), smallest)
    with caplog.at_level(logging.WARNING, logger="sdcore"):
        assert load.load_parts("owner/name", "cpu").family == "sd1"
    assert hub.asked[-1][3] is True and "cannot be reached" in caplog.text


def test_names_that_mean_nothing(no_network):
    refused("sdlx", "did you mean", "sdxl")
    refused("qqqq", "names: tiny, sd14")
    refused("missing/model.safetensors", "no such file")
    refused("../../nowhere", "no such folder")
    refused("", "expected a name")
    refused(None, "expected a name")


def test_other_kinds_of_pipeline_are_refused(model):
    edit(model / "model_index.json", _class_name="FluxPipeline", transformer=["diffusers", "FluxTransformer2DModel"])
    refused(model, "FluxPipeline")


# ---------------------------------------------------------------- time and memory


def run(code, **environment):
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | environment, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


OURS = """
import json, sys, time, torch
import sdcore
from sdcore.weights import load
begin = time.perf_counter()
parts = load.load_parts(sys.argv[1] if len(sys.argv) > 1 else PATH, "cpu")
seconds = time.perf_counter() - begin
status = open("/proc/self/status").read()  # not ru_maxrss, which a child inherits
peak = int(status.split("VmHWM:")[1].split()[0])
print(json.dumps([seconds, peak]))
"""
THEIRS = """
import json, sys, time, torch
import diffusers
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTokenizer
begin = time.perf_counter()
pipe = StableDiffusionPipeline.from_pretrained(PATH, local_files_only=True)
seconds = time.perf_counter() - begin
status = open("/proc/self/status").read()  # not ru_maxrss, which a child inherits
peak = int(status.split("VmHWM:")[1].split()[0])
print(json.dumps([seconds, peak]))
"""


@pytest.mark.check
@pytest.mark.timeout(3600)
def test_sd15_fp32_memory_and_time(tmp_path):
    """3.4 GB of SD 1.5 in fp32: peak resident memory at most 1.1 times the file, no slower than diffusers' from_pretrained."""
    from tests.test_convert import official_folder

    half = official_folder(tmp_path / "half", "sd1")
    single = convert.convert(half, tmp_path / "m.safetensors", dtype=torch.float32)
    folder = convert.convert(single, tmp_path / "folder", "diffusers")
    shutil.rmtree(half)
    size = single.stat().st_size / 1024
    assert 4.0e6 < size < 4.4e6  # UNet 3.4 GB, text encoder 0.5, autoencoder 0.3
    runs = {"ours, file": [], "ours, folder": [], "diffusers, folder": []}
    for _ in range(3):
        runs["ours, file"].append(run(OURS.replace("PATH", repr(str(single)))))
        runs["ours, folder"].append(run(OURS.replace("PATH", repr(str(folder)))))
        runs["diffusers, folder"].append(run(THEIRS.replace("PATH", repr(str(folder)))))
    best = {name: (min(r[0] for r in those), min(r[1] for r in those)) for name, those in runs.items()}
    for name, (seconds, peak) in best.items():
        print(f"{name}: {seconds:.2f} s, peak {peak / 1e6:.2f} GB = {peak / size:.3f} x the file")
    for name in ("ours, file", "ours, folder"):
        assert best[name][1] <= 1.1 * size, best
        assert best[name][0] <= best["diffusers, folder"][0], best
