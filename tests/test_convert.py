"""Converting: our single files are original single files (diffusers reads them as such), and there and back nothing changes."""

import json
import socket
from dataclasses import replace

import diffusers
import pytest
import torch
from diffusers.loaders import single_file_utils
from sdcore.weights import checkpoint as ck
from sdcore.weights import configs, convert, detect, files, load

from sdcore import clip, unet, vae
from sdcore.errors import CheckpointError, ConfigError
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


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("the network was used")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)


def equal(a, b):
    assert sorted(a) == sorted(b)
    for name in a:
        assert a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]), name


def parts_of(path):
    return ck.read(path).tensors


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_there_and_back_is_bit_equal(family, folders, tmp_path, no_network):
    source = folders(family)
    single = convert.convert(source, tmp_path / "m.safetensors")
    back = convert.convert(single, tmp_path / "back")
    again = convert.convert(back, tmp_path / "again.safetensors")
    first, second, third = parts_of(source), parts_of(single), parts_of(back)
    assert first.keys() == second.keys() == third.keys()
    for part in first:
        equal(first[part], second[part])
        equal(first[part], third[part])
    equal(files.read(single).tensors, files.read(again).tensors)
    one, other = ck.read(source), ck.read(back)
    assert (one.family, one.configs, one.zero_negative) == (other.family, other.configs, other.zero_negative)
    assert not ck.read(single).unused and ck.read(single).family == one.family


SINGLE_FILE_PIPELINES = ["sd1", "sd1-inpaint", "sd2-base", "sd2", "sd2-inpaint", "sdxl", "sdxl-inpaint", "refiner"]


@pytest.mark.parametrize("family", SINGLE_FILE_PIPELINES)
def test_diffusers_reads_our_single_file(family, folders, tmp_path):
    source = folders(family)
    single = convert.convert(source, tmp_path / "m.safetensors")
    pipeline = getattr(diffusers, tiny_models.PIPELINES[family])
    options = {} if "xl" in family or family == "refiner" else {"safety_checker": None, "feature_extractor": None}
    read = pipeline.from_single_file(str(single), config=str(source), local_files_only=True, **options)
    wanted = pipeline.from_pretrained(source, **options)
    for part in parts_of(source):
        equal(getattr(read, part).state_dict(), getattr(wanted, part).state_dict())


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl", "refiner"])
def test_diffusers_reads_the_folder_we_write(family, folders, tmp_path):
    source = folders(family)
    back = convert.convert(convert.convert(source, tmp_path / "m.safetensors"), tmp_path / "back")
    pipeline = getattr(diffusers, tiny_models.PIPELINES[family])
    one, other = pipeline.from_pretrained(source), pipeline.from_pretrained(back)
    for part in parts_of(source):
        equal(getattr(one, part).state_dict(), getattr(other, part).state_dict())
    prompt = ["a red circle"]
    for name in ("tokenizer", "tokenizer_2"):
        if getattr(one, name, None) is not None:
            rows = [getattr(p, name)(prompt, padding="max_length").input_ids for p in (one, other)]
            assert rows[0] == rows[1]
    same = {"beta_start", "beta_end", "beta_schedule", "prediction_type", "steps_offset", "timestep_spacing"}
    assert type(one.scheduler) is type(other.scheduler)
    assert all(one.scheduler.config[key] == other.scheduler.config[key] for key in same)


# ---------------------------------------------------------------- official sizes, whole key sets

OFFICIAL = {"sd1": "SD 1.5", "sd2": "SD 2.1", "sdxl": "SDXL base", "refiner": "SDXL refiner"}


@pytest.mark.parametrize("family", OFFICIAL)
def test_diffusers_reads_official_sizes(family):
    """UNet and autoencoder at full size, through diffusers' own from_single_file, every tensor compared."""
    pool, release = weight_models.Pool(), detect.FAMILIES[family]
    ours = {"unet": pool.state("unet", release.unet), "vae": pool.state("vae", release.vae)}
    checkpoint = ck.Checkpoint(None, "diffusers", family, {"unet": release.unet, "vae": release.vae}, ours, {})
    single = weight_models.single_tensors(checkpoint)
    for part, name in (("unet", "UNet2DConditionModel"), ("vae", "AutoencoderKL")):
        with torch.device("meta"):
            peer = peers.theirs_of(getattr(release, part))
        prefix = "model.diffusion_model." if part == "unet" else "first_stage_model."
        reader = getattr(
            single_file_utils, {"unet": "convert_ldm_unet_checkpoint", "vae": "convert_ldm_vae_checkpoint"}[part]
        )
        read = reader({k: t for k, t in single.items() if k.startswith(prefix)}, dict(peer.config))
        want = {key: tensor.shape for key, tensor in peer.state_dict().items()}
        assert read.keys() == want.keys() == ours[part].keys(), name
        for key, tensor in read.items():  # views of one pool: same start and shape means same numbers
            assert tensor.data_ptr() == ours[part][key].data_ptr() and tensor.shape == want[key]


@pytest.mark.check
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("family", OFFICIAL)
def test_official_files_through_diffusers(family, tmp_path):
    """Whole files of official size and key set (fp16, up to 7 GB): written by convert, read by diffusers' from_single_file."""
    import gc

    source = official_folder(tmp_path / "folder", family)
    single = convert.convert(source, tmp_path / "m.safetensors")
    pipeline = getattr(diffusers, detect.FAMILIES[family].pipeline)
    options = {} if "xl" in family or family == "refiner" else {"safety_checker": None, "feature_extractor": None}
    read = pipeline.from_single_file(
        str(single), config=str(source), torch_dtype=torch.float16, local_files_only=True, **options
    )
    ours = ck.read(source).tensors
    for part, own in ours.items():
        config = ck.read(source).configs[part]
        theirs = peers.released_names(getattr(read, part).state_dict(), config)
        equal({k: t for k, t in theirs.items() if not k.endswith("position_ids")}, own)
    del read, theirs
    gc.collect()
    stripped = files.read(single)
    stripped.metadata = {}  # nothing of ours to go by: shapes alone
    found = ck.single(stripped, ema=False)
    assert found.family == {"sd2": "sd2-base"}.get(family, family)  # random numbers are no v-prediction model's
    loaded = load.load_parts(
        single, "cpu", torch.float16, tokenizer=source / "tokenizer_2" if family == "refiner" else None
    )
    assert not loaded.unused and loaded.family == family
    back = convert.convert(single, tmp_path / "back")
    for part, own in ck.read(back).tensors.items():
        equal(own, ours[part])


def official_folder(folder, family):
    """A model folder of official sizes, from the official configurations, fp16, with numbers that repeat far apart."""
    release, pool = detect.FAMILIES[family], weight_models.Pool()
    parts = {"unet": release.unet, "vae": release.vae, **release.text}
    vocab, merges = tiny_models.vocabulary()
    for part, config in parts.items():
        (folder / part).mkdir(parents=True)
        convert.write_json(folder / part / "config.json", ck.WRITERS[part](config))
        files.write(folder / part / ck.weight_names(part, None)[0], pool.state(part, config), {"format": "pt"})
        if part in release.text:
            tiny_models.write_tokenizer(folder / part.replace("text_encoder", "tokenizer"), vocab, merges, "!", 77)
    convert.write_json(folder / "scheduler" / "scheduler_config.json", configs.scheduler_table(release.scheduler))
    tokenizers = {part.replace("text_encoder", "tokenizer"): folder for part in release.text}
    checkpoint = ck.Checkpoint(
        folder, "diffusers", family, {**parts, "scheduler": release.scheduler}, dict.fromkeys(parts, {}), tokenizers,
        family.startswith("sdxl"),
    )  # fmt: skip
    convert.write_json(folder / "model_index.json", convert.index(checkpoint))
    return folder


# ---------------------------------------------------------------- options and errors


def test_fp16(folders, tmp_path):
    single = convert.convert(folders("sd1"), tmp_path / "m.safetensors", dtype=torch.float16)
    wanted = parts_of(folders("sd1"))
    for part, tensors in parts_of(single).items():
        equal(tensors, {name: t.half() for name, t in wanted[part].items()})
    assert single.stat().st_size < 0.52 * convert.convert(folders("sd1"), tmp_path / "n.safetensors").stat().st_size


def test_metadata_and_tokenizer_travel(folders, tmp_path):
    single = convert.convert(folders("sd2"), tmp_path / "m.safetensors")
    metadata = files.read(single).metadata
    assert (
        metadata["modelspec.architecture"] == "stable-diffusion-v2-768-v"
        and metadata["modelspec.prediction_type"] == "v"
    )
    assert json.loads(metadata[ck.CONFIG_KEY])["unet"]["_class_name"] == "UNet2DConditionModel"
    assert (tmp_path / "m.tokenizer" / "vocab.json").exists()


def test_nothing_half_done(folders, tmp_path, monkeypatch):
    source = folders("sd1")
    target = tmp_path / "m.safetensors"
    target.write_bytes(b"old")

    def full(handle):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as m:
        m.setattr(files.os, "fsync", full)
        with pytest.raises(CheckpointError, match="No space left"):
            convert.convert(source, target)
        with pytest.raises(CheckpointError, match="No space left"):
            convert.convert(source, tmp_path / "folder", "diffusers")
    assert target.read_bytes() == b"old" and [p.name for p in tmp_path.iterdir()] == ["m.safetensors"]


def test_refusals(folders, tmp_path):
    source = folders("sd1")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("mine")
    with pytest.raises(CheckpointError, match="exists"):
        convert.convert(source, tmp_path / "full", "diffusers")
    with pytest.raises(ConfigError, match="layout 'kohya'"):
        convert.convert(source, tmp_path / "m.safetensors", "kohya")
    with pytest.raises(ConfigError, match="ending"):
        convert.convert(source, tmp_path / "m.ckpt")
    single = convert.convert(source, tmp_path / "m.safetensors")
    for file in (tmp_path / "m.tokenizer").iterdir():
        file.unlink()
    with pytest.raises(CheckpointError, match="tokenizer="):
        convert.convert(single, tmp_path / "back")
    assert convert.convert(single, tmp_path / "back", tokenizer=source / "tokenizer").is_dir()


def test_parts_that_do_not_fit_are_not_written(folders, tmp_path):
    checkpoint = ck.read(folders("sd1"))
    files.write(tmp_path / "m.safetensors", weight_models.single_tensors(checkpoint) | {
        "model.diffusion_model.input_blocks.0.0.more": torch.zeros(1)}, {ck.CONFIG_KEY: json.dumps(
            {part: ck.WRITERS[part](config) for part, config in checkpoint.configs.items()})})  # fmt: skip
    with pytest.raises(CheckpointError, match="no place for 1 tensor"):
        convert.convert(tmp_path / "m.safetensors", tmp_path / "back")
    assert not (tmp_path / "back").exists()


def test_known_sizes():
    """The released constants through config.json and back."""
    for config in (unet.SD15, unet.SD21_V, unet.X4, unet.SDXL, unet.SDXL_REFINER):
        assert configs.unet_config(configs.unet_table(config)) == config
    for config in (vae.SD_VAE, vae.SDXL_VAE, vae.X4_VAE):
        assert configs.vae_config(configs.vae_table(config)) == config
    for config in (clip.CLIP_L, clip.OPEN_CLIP_H, clip.OPEN_CLIP_BIGG):
        assert configs.text_config(configs.text_table(config)) == config
    for config in (clip.CLIP_L_VISION, clip.CLIP_H_VISION, clip.CLIP_BIGG_VISION):
        assert configs.vision_config(configs.vision_table(config)) == config
    for release in detect.FAMILIES.values():
        assert configs.scheduler_config(configs.scheduler_table(release.scheduler)) == replace(
            release.scheduler, ays="sd"
        )
