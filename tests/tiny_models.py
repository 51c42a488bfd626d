"""Small random models of every official family, in the folder layout of the released ones.

`write_folder(path, "sdxl", seed=0)` builds each part with the peers' own classes (diffusers, transformers), shakes
every parameter so that no bias is zero and no norm scale is one (a swapped or forgotten one must show), and writes
`model_index.json`, `unet/`, `vae/`, `text_encoder/`, `tokenizer/`, `scheduler/` (and `_2` for the XL kin) as a released
repository has them. diffusers' own pipeline of the family loads the folder. What a family is known by is kept (block
pattern, heads, prediction type, conditioning, pad token, scheduler); widths, depths, vocabulary and prompt length are
small. Nothing here imports sdcore.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch

POSITIONS = 24  # tokens of a prompt: not 77, so that a 77 written into the code shows
WORDS = """a an the red green blue small large circle square triangle above below left right of on background
photo cat dog and in""".split()

FAMILIES = (
    "sd1",
    "sd1-inpaint",
    "ip2p",
    "sd2-base",
    "sd2",
    "sd2-inpaint",
    "sd2-depth",
    "x4",
    "sdxl",
    "sdxl-turbo",
    "sdxl-inpaint",
    "refiner",
)
PIPELINES = {  # the diffusers class that runs the folder
    "sd1": "StableDiffusionPipeline",
    "sd1-inpaint": "StableDiffusionInpaintPipeline",
    "ip2p": "StableDiffusionInstructPix2PixPipeline",
    "sd2-base": "StableDiffusionPipeline",
    "sd2": "StableDiffusionPipeline",
    "sd2-inpaint": "StableDiffusionInpaintPipeline",
    "sd2-depth": "StableDiffusionDepth2ImgPipeline",
    "x4": "StableDiffusionUpscalePipeline",
    "sdxl": "StableDiffusionXLPipeline",
    "sdxl-turbo": "StableDiffusionXLPipeline",
    "sdxl-inpaint": "StableDiffusionXLInpaintPipeline",
    "refiner": "StableDiffusionXLImg2ImgPipeline",
}
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}


def write_folder(
    path: str | Path, family: str = "sd1", seed: int = 0, sample_size: int = 8, positions: int = POSITIONS
) -> Path:
    """Write a random model of `family` to `path`, return it. `sample_size`: latent side, 8 draws 64 x 64 pixels."""
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    vocab, merges = vocabulary()
    sdxl, refiner, x4 = family.startswith("sdxl"), family == "refiner", family == "x4"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        _save(_unet(family, sample_size), path / "unet")
        _save(_vae(family, sample_size), path / "vae")
        if not refiner:
            _save(_text(family, len(vocab), positions), path / "text_encoder")
            write_tokenizer(
                path / "tokenizer", vocab, merges, "!" if family.startswith("sd2") or x4 else "<|endoftext|>", positions
            )
        if sdxl or refiner:
            _save(_text(family, len(vocab), positions, second=True), path / "text_encoder_2")
            write_tokenizer(path / "tokenizer_2", vocab, merges, "!", positions)
    _scheduler(family).save_pretrained(path / "scheduler")
    if x4:
        _low_res_scheduler().save_pretrained(path / "low_res_scheduler")
    _write_json(path / "model_index.json", _index(family, path))
    return path


def vocabulary() -> tuple[dict[str, int], list[str]]:
    """A CLIP-style vocabulary of 588: 256 byte symbols ("!" is 0), the same ending a word, merges, start, end."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    symbols = [chr(b) for b in printable] + [chr(256 + i) for i in range(256 - len(printable))]
    merges: list[str] = []
    for word in WORDS:  # each word becomes one token by merging from the left
        left = word[0]
        for i, char in enumerate(word[1:], 1):
            right = char + ("</w>" if i == len(word) - 1 else "")
            if f"{left} {right}" not in merges:
                merges.append(f"{left} {right}")
            left += right
    tokens = (
        symbols
        + [s + "</w>" for s in symbols]
        + [m.replace(" ", "") for m in merges]
        + ["<|startoftext|>", "<|endoftext|>"]
    )
    assert len(set(tokens)) == len(tokens)
    return {token: i for i, token in enumerate(tokens)}, merges


def write_tokenizer(folder: Path, vocab: dict[str, int], merges: list[str], pad: str, positions: int) -> None:
    """The four files of a released `tokenizer/` folder, as transformers 4 wrote them."""
    folder.mkdir(parents=True, exist_ok=True)
    _write_json(folder / "vocab.json", vocab)
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n", encoding="utf-8")

    def special(token: str) -> dict:
        return {"content": token, "lstrip": False, "normalized": True, "rstrip": False, "single_word": False}

    start, end = special("<|startoftext|>"), special("<|endoftext|>")
    _write_json(
        folder / "special_tokens_map.json", {"bos_token": start, "eos_token": end, "pad_token": pad, "unk_token": end}
    )
    _write_json(
        folder / "tokenizer_config.json",
        {
            "add_prefix_space": False,
            "bos_token": start,
            "eos_token": end,
            "pad_token": pad,
            "unk_token": end,
            "errors": "replace",
            "do_lower_case": True,
            "model_max_length": positions,
            "tokenizer_class": "CLIPTokenizer",
        },
    )


def _unet(family: str, sample_size: int):
    from diffusers import UNet2DConditionModel

    channels_in = {"sd1-inpaint": 9, "ip2p": 8, "sd2-inpaint": 9, "sd2-depth": 5, "x4": 7, "sdxl-inpaint": 9}.get(
        family, 4
    )
    ca, plain = "CrossAttnDownBlock2D", "DownBlock2D"
    if family.startswith("sdxl"):
        shape = dict(
            block_out_channels=(32, 64, 64),
            down_block_types=(plain, ca, ca),
            transformer_layers_per_block=[1, 2, 3],
            attention_head_dim=[1, 2, 4],
            cross_attention_dim=32 + 64,
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=48 + 6 * 8,
        )
    elif family == "refiner":
        shape = dict(
            block_out_channels=(32, 64, 64, 64),
            down_block_types=(plain, ca, ca, plain),
            transformer_layers_per_block=2,
            attention_head_dim=[1, 2, 4, 4],
            cross_attention_dim=64,
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=48 + 5 * 8,
        )
    elif family == "x4":
        shape = dict(
            block_out_channels=(32, 64, 64, 64),
            down_block_types=(plain, ca, ca, ca),
            attention_head_dim=8,
            cross_attention_dim=32,
            use_linear_projection=True,
            num_class_embeds=1000,
            only_cross_attention=[True, True, True, False],
        )
    else:
        shape = dict(block_out_channels=(32, 64, 64, 64), down_block_types=(ca, ca, ca, plain), cross_attention_dim=32)
        shape |= (
            dict(attention_head_dim=[1, 2, 4, 4], use_linear_projection=True, upcast_attention=family == "sd2")
            if family.startswith("sd2")
            else dict(attention_head_dim=8)
        )
    up = {ca: "CrossAttnUpBlock2D", plain: "UpBlock2D"}
    shape["up_block_types"] = tuple(up[block] for block in reversed(shape["down_block_types"]))
    return UNet2DConditionModel(sample_size=sample_size, in_channels=channels_in, out_channels=4, **shape)


def _vae(family: str, sample_size: int):
    from diffusers import AutoencoderKL

    channels = (32, 64, 64) if family == "x4" else (32, 32, 64, 64)
    scale = {"sdxl": 0.13025, "refiner": 0.13025, "x4": 0.08333}.get(
        family.removesuffix("-inpaint").removesuffix("-turbo"), 0.18215
    )
    force = {"force_upcast": True} if "sdxl" in family or family == "refiner" else {"force_upcast": False}
    return AutoencoderKL(
        block_out_channels=channels,
        down_block_types=("DownEncoderBlock2D",) * len(channels),
        up_block_types=("UpDecoderBlock2D",) * len(channels),
        layers_per_block=2,
        latent_channels=4,
        sample_size=sample_size * 2 ** (len(channels) - 1),
        scaling_factor=scale,
        **force,
    )


def _text(family: str, vocab: int, positions: int, second: bool = False):
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    quick = not (
        second or family.startswith("sd2") or family == "x4"
    )  # ViT-L has quick_gelu, the OpenCLIP towers the exact one
    config = CLIPTextConfig(
        vocab_size=vocab,
        max_position_embeddings=positions,
        hidden_size=64 if second else 32,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        hidden_act="quick_gelu" if quick else "gelu",
        projection_dim=48 if second else 32,
        bos_token_id=0,
        eos_token_id=2,
        pad_token_id=1,  # the released files say 2, which means: pool at the largest id
    )
    return (CLIPTextModelWithProjection if second else CLIPTextModel)(config)


def _scheduler(family: str):
    from diffusers import DDIMScheduler, EulerAncestralDiscreteScheduler, EulerDiscreteScheduler, PNDMScheduler

    if family == "x4":
        return DDIMScheduler(
            **BETAS | {"beta_start": 0.0001, "beta_end": 0.02},
            prediction_type="v_prediction",
            clip_sample=False,
            set_alpha_to_one=False,
            steps_offset=1,
        )
    if family == "sdxl-turbo":
        return EulerAncestralDiscreteScheduler(**BETAS, timestep_spacing="trailing")
    if family.startswith("sdxl") or family == "refiner":
        return EulerDiscreteScheduler(**BETAS, timestep_spacing="leading", steps_offset=1)
    if family in ("sd2", "sd1-inpaint"):
        return DDIMScheduler(
            **BETAS,
            prediction_type="v_prediction" if family == "sd2" else "epsilon",
            clip_sample=False,
            set_alpha_to_one=False,
            steps_offset=1,
        )
    return PNDMScheduler(**BETAS, skip_prk_steps=True, set_alpha_to_one=False, steps_offset=1)


def _low_res_scheduler():
    from diffusers import DDPMScheduler

    return DDPMScheduler(**BETAS | {"beta_start": 0.0001, "beta_end": 0.02}, clip_sample=False)


def _index(family: str, path: Path) -> dict:
    text_2 = ["transformers", "CLIPTextModelWithProjection"]
    index: dict = {
        "_class_name": PIPELINES[family],
        "_diffusers_version": "0.30.0",
        "scheduler": ["diffusers", type(_scheduler(family)).__name__],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    xl = family.startswith("sdxl") or family == "refiner"
    for part, kind in (
        ("text_encoder", ["transformers", "CLIPTextModel"]),
        ("tokenizer", ["transformers", "CLIPTokenizer"]),
        ("text_encoder_2", text_2),
        ("tokenizer_2", ["transformers", "CLIPTokenizer"]),
    ):
        if (path / part).exists():
            index[part] = kind
        elif xl:
            index[part] = [None, None]
    if family == "x4":
        index |= {"low_res_scheduler": ["diffusers", "DDPMScheduler"], "max_noise_level": 350}
    elif family == "sd2-depth":
        index |= {"depth_estimator": [None, None], "feature_extractor": [None, None]}
    elif xl:
        index |= {"force_zeros_for_empty_prompt": family != "refiner"} | (
            {"requires_aesthetics_score": True} if family == "refiner" else {}
        )
        index |= {"image_encoder": [None, None], "feature_extractor": [None, None]} if family != "refiner" else {}
    else:
        index |= {"safety_checker": [None, None], "feature_extractor": [None, None], "requires_safety_checker": False}
    return index


def _save(model, folder: Path) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * (0.1 if parameter.ndim == 1 else 0.02))
    model.save_pretrained(folder)


def _write_json(file: Path, value: dict) -> None:
    file.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
