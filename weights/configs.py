"""Configuration files: diffusers' and transformers' config.json to our dataclasses, and back.

The schemas are closed. A key is either read, with a range; or it must have the one value that every released model has
(`..._FIXED`); or it is known to change nothing here (`IRRELEVANT`); anything else that is set is an error that names the key,
what was found and what is supported. Sizes are bounded and the number of parameters is estimated before anything is built. No
value ever becomes an import, a class or a path: where a file names a class, the name is looked up in a table of this file.
"""

import json
from pathlib import Path

from sdcore.clip import CLIPTextConfig, CLIPVisionConfig
from sdcore.controlnet import ControlNetConfig
from sdcore.errors import CheckpointError
from sdcore.scheduler import PREDICTIONS, SPACINGS, SchedulerConfig
from sdcore.unet import UNetConfig
from sdcore.vae import VAEConfig

from .files import one_line

MAX_PARAMETERS = 8 * 10**9  # SDXL's UNet has 2.6
MAX_CONFIG = 2**20  # bytes of a config.json
MAX_WIDTH, MAX_LEVELS, MAX_LAYERS, MAX_DEPTH = 16384, 6, 4, 24

IRRELEVANT = {
    "addition_embed_type_num_heads", "architectures", "attention_dropout", "bad_words_ids", "bos_token_id",
    "chunk_size_feed_forward", "diversity_penalty", "do_sample", "dropout", "dtype", "early_stopping",
    "encoder_no_repeat_ngram_size", "id2label", "initializer_factor", "initializer_range", "is_decoder",
    "is_encoder_decoder", "label2id", "length_penalty", "max_length", "min_length", "model_type", "no_repeat_ngram_size",
    "num_beam_groups", "num_beams", "num_return_sequences", "output_attentions", "output_hidden_states", "pad_token_id",
    "prefix", "problem_type", "repetition_penalty", "return_dict", "temperature", "tie_word_embeddings", "top_k", "top_p",
    "torch_dtype", "torchscript", "transformers_version", "typical_p", "use_cache",
}  # fmt: skip
UNET_FIXED = {
    "act_fn": "silu", "attention_type": "default", "center_input_sample": False, "class_embed_type": None,
    "class_embeddings_concat": False, "conv_in_kernel": 3, "conv_out_kernel": 3, "cross_attention_norm": None,
    "downsample_padding": 1, "dual_cross_attention": False, "encoder_hid_dim": None, "encoder_hid_dim_type": None,
    "flip_sin_to_cos": True, "freq_shift": 0, "mid_block_only_cross_attention": None, "mid_block_scale_factor": 1,
    "mid_block_type": "UNetMidBlock2DCrossAttn", "norm_eps": 1e-5, "num_attention_heads": None, "resnet_out_scale_factor": 1.0,
    "resnet_skip_time_act": False, "resnet_time_scale_shift": "default", "reverse_transformer_layers_per_block": None,
    "time_embedding_act_fn": None, "time_embedding_dim": None, "time_embedding_type": "positional",
    "timestep_post_act": None,
}  # fmt: skip
VAE_FIXED = {
    "act_fn": "silu", "in_channels": 3, "latents_mean": None, "latents_std": None, "mid_block_add_attention": True,
    "out_channels": 3, "shift_factor": None, "use_post_quant_conv": True, "use_quant_conv": True,
}  # fmt: skip
CLIP_FIXED = {"layer_norm_eps": 1e-5, "num_channels": 3}
SAMPLERS = {  # the classes that a scheduler_config.json may name, and our sampler of that kind
    "PNDMScheduler": "pndm", "DDIMScheduler": "ddim", "DDPMScheduler": "ddpm", "LMSDiscreteScheduler": "lms",
    "EulerDiscreteScheduler": "euler", "EulerAncestralDiscreteScheduler": "euler_a", "HeunDiscreteScheduler": "heun",
    "KDPM2DiscreteScheduler": "dpm2", "KDPM2AncestralDiscreteScheduler": "dpm2_a", "DPMSolverSDEScheduler": "dpmpp_sde",
    "DPMSolverMultistepScheduler": "dpmpp_2m", "UniPCMultistepScheduler": "unipc", "DEISMultistepScheduler": "deis",
    "LCMScheduler": "lcm", "TCDScheduler": "tcd",
}  # fmt: skip
CLASSES = {sampler: name for name, sampler in SAMPLERS.items()} | {"dpmpp_2m_sde": "DPMSolverMultistepScheduler"}
SCHEDULER_FIXED = {
    "euler_at_final": False, "final_sigmas_type": "zero", "interpolation_type": "linear", "lower_order_final": True,
    "predict_x0": True, "shift_terminal": None, "sigma_max": None, "sigma_min": None, "solver_order": 2, "solver_p": None,
    "thresholding": False, "timestep_type": "discrete", "trained_betas": None, "use_beta_sigmas": False,
    "use_dynamic_shifting": False, "use_exponential_sigmas": False, "use_flow_sigmas": False, "use_karras_sigmas": False,
    "use_lu_lambdas": False,
}  # fmt: skip
SCHEDULER_IRRELEVANT = {  # of options that are off, or (clip_sample) that pipelines of latents turn off, as diffusers' do
    "clip_sample", "clip_sample_range", "disable_corrector", "dynamic_thresholding_ratio", "flow_shift", "lambda_min_clipped",
    "noise_sampler_seed", "sample_max_value", "solver_type", "time_shift_type", "variance_type",
}  # fmt: skip


def read_json(path: Path) -> dict:
    """A JSON table from a file of at most 1 MiB. CheckpointError when it is anything else."""
    try:
        if path.stat().st_size > MAX_CONFIG:
            raise CheckpointError(f"{path}: is larger than the limit of {MAX_CONFIG} bytes for a configuration")
        table = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file") from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be opened ({one_line(error.strerror)})") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: is not JSON ({one_line(error)})") from None
    if not isinstance(table, dict):
        raise CheckpointError(f"{path}: holds a {type(table).__name__}, expected a table")
    return table


class Table:
    """A foreign table, read key by key; `close` then accounts for every key that was not asked for."""

    def __init__(self, values: object, where: str | Path):
        if not isinstance(values, dict):
            raise CheckpointError(f"{where}: holds a {type(values).__name__}, expected a table")
        self.values, self.where = values, where
        self.asked: set[str] = set()

    def wrong(self, key: str, supported: object) -> CheckpointError:
        return CheckpointError(f"{self.where}: {key} is {one_line(self.values.get(key))!r}, supported: {supported}")

    def get(self, key: str, default=None):
        self.asked.add(key)
        value = self.values.get(key, default)
        return default if value is None else value

    def whole(self, key: str, default: int, low: int, high: int) -> int:
        value = self.get(key, default)
        if type(value) is not int or not low <= value <= high:
            raise self.wrong(key, f"a whole number from {low} to {high}")
        return value

    def number(self, key: str, default: float, low: float, high: float) -> float:
        value = self.get(key, default)
        if type(value) not in (int, float) or not low <= value <= high:
            raise self.wrong(key, f"a number from {low} to {high}")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        value = self.get(key, default)
        if type(value) is not bool:
            raise self.wrong(key, "true or false")
        return value

    def choice(self, key: str, default, choices):
        value = self.get(key, default)
        if value is not default and (not isinstance(value, str) or value not in choices):
            raise self.wrong(key, ", ".join(choices))
        return value

    def levels(self, key: str, default, count: int | None, check) -> tuple:
        """One entry a level: a list of `count`, or one value for all levels."""
        value = self.get(key, default)
        value = value if isinstance(value, list | tuple) else [value] * (count or 0)
        if not 1 <= len(value) <= MAX_LEVELS or (count and len(value) != count) or not all(check(v) for v in value):
            raise self.wrong(key, f"{count or f'1 to {MAX_LEVELS}'} entries (one a level) in range")
        return tuple(value)

    def close(self, fixed: dict, irrelevant=frozenset()) -> None:
        for key, value in self.values.items():
            if key in self.asked or key.startswith("_") or key in IRRELEVANT or key in irrelevant:
                continue
            if key in fixed and not same(value, fixed[key]):
                raise self.wrong(key, f"{fixed[key]!r} only")
            if key not in fixed and value not in (None, False, [], {}, ""):
                raise self.wrong(one_line(key), "nothing: this key is unknown here")


def same(found: object, wanted: object) -> bool:
    if isinstance(wanted, bool) or wanted is None or isinstance(wanted, str):
        return type(found) is type(wanted) and found == wanted
    return type(found) in (int, float) and found == wanted


def between(low: int, high: int):
    return lambda value: type(value) is int and low <= value <= high


# ---------------------------------------------------------------- UNet

DOWN = {"CrossAttnDownBlock2D": True, "DownBlock2D": False}
UP = {"CrossAttnUpBlock2D": True, "UpBlock2D": False}


def unet_config(values: dict, where: str | Path = "config.json") -> UNetConfig:
    """UNet2DConditionModel's config.json. CheckpointError for what no model here can be."""
    table = Table(values, where)
    channels = table.levels("block_out_channels", (320, 640, 1280, 1280), None, between(1, MAX_WIDTH))
    n = len(channels)
    down = table.levels(
        "down_block_types",
        ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
        n,
        lambda v: isinstance(v, str) and v in DOWN,
    )
    up = table.levels(
        "up_block_types", ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3, n, lambda v: isinstance(v, str) and v in UP
    )
    if [DOWN[block] for block in down] != [UP[block] for block in reversed(up)]:
        raise table.wrong("up_block_types", "the mirror image of down_block_types")
    depths = table.levels("transformer_layers_per_block", 1, n, between(1, MAX_DEPTH))
    added = table.choice("addition_embed_type", None, ["text_time"])
    size = table.get("sample_size", 64)
    config = UNetConfig(
        in_channels=table.whole("in_channels", 4, 1, 64),
        out_channels=table.whole("out_channels", 4, 1, 64),
        sample_size=size[0] if isinstance(size, list) and size else size,
        channels=channels,
        layers=table.whole("layers_per_block", 2, 1, MAX_LAYERS),
        depths=tuple(depth if DOWN[block] else 0 for depth, block in zip(depths, down, strict=True)),
        mid_depth=depths[-1],
        heads=table.levels("attention_head_dim", 8, n, between(1, 1024)),  # diffusers' name is wrong: it counts heads
        context_dim=table.whole("cross_attention_dim", 1280, 1, MAX_WIDTH),
        linear_projection=table.flag("use_linear_projection", False),
        cross_only=table.levels("only_cross_attention", False, n, lambda v: type(v) is bool),
        upcast_attention=table.flag("upcast_attention", False),
        class_embeddings=table.whole("num_class_embeds", 0, 0, 10**5),
        added_time_dim=table.whole("addition_time_embed_dim", 0, 0, 8192) if added else 0,
        added_dim=table.whole("projection_class_embeddings_input_dim", 0, 1, MAX_WIDTH) if added else 0,
        guidance_dim=table.whole("time_cond_proj_dim", 0, 0, 8192),
        norm_groups=table.whole("norm_num_groups", 32, 1, 1024),
    )
    table.close(UNET_FIXED, () if added else ("addition_time_embed_dim", "projection_class_embeddings_input_dim"))
    if not between(1, 1024)(config.sample_size):
        raise table.wrong("sample_size", "a whole number from 1 to 1024")
    for width, heads in zip(channels, config.heads, strict=True):
        if width % heads or width % config.norm_groups:
            raise table.wrong(
                "block_out_channels", f"multiples of the heads ({heads}) and norm groups ({config.norm_groups})"
            )
    check_size(where, unet_parameters(config))
    return config


def unet_parameters(config: UNetConfig) -> int:
    """About how many parameters: 3 x 3 convolutions of the residual blocks, and 16 d^2 a transformer layer."""
    per_level = zip(config.channels, config.depths, strict=True)
    blocks = sum(
        (2 * config.layers + 1) * (24 * c * c + d * (14 * c * c + 2 * c * config.context_dim)) for c, d in per_level
    )
    return blocks + config.mid_depth * 16 * config.channels[-1] ** 2 + config.class_embeddings * config.time_dim


def check_size(where: str | Path, parameters: int) -> None:
    if parameters > MAX_PARAMETERS:
        raise CheckpointError(
            f"{where}: describes about {parameters:.1e} parameters, more than the limit of {MAX_PARAMETERS:.0e}"
        )


def unet_table(config: UNetConfig) -> dict:
    """The config.json with which diffusers builds the same UNet."""
    depths = [depth or config.mid_depth for depth in config.depths]
    if depths[-1] != config.mid_depth:
        raise CheckpointError(
            f"a UNet with {depths[-1]} transformers in its last level and {config.mid_depth} in the middle has no config.json"
        )
    table = {
        "_class_name": "UNet2DConditionModel",
        "_diffusers_version": "0.30.0",
        "sample_size": config.sample_size,
        "in_channels": config.in_channels,
        "out_channels": config.out_channels,
        "down_block_types": ["CrossAttnDownBlock2D" if depth else "DownBlock2D" for depth in config.depths],
        "up_block_types": ["CrossAttnUpBlock2D" if depth else "UpBlock2D" for depth in reversed(config.depths)],
        "only_cross_attention": list(config.cross_only) if any(config.cross_only) else False,
        "block_out_channels": list(config.channels),
        "layers_per_block": config.layers,
        "norm_num_groups": config.norm_groups,
        "cross_attention_dim": config.context_dim,
        "transformer_layers_per_block": depths[0] if len(set(depths)) == 1 else depths,
        "attention_head_dim": config.heads[0] if len(set(config.heads)) == 1 else list(config.heads),
        "use_linear_projection": config.linear_projection,
        "upcast_attention": config.upcast_attention,
    }
    if config.guidance_dim:
        table["time_cond_proj_dim"] = config.guidance_dim
    if config.class_embeddings:
        table["num_class_embeds"] = config.class_embeddings
    if config.added_dim:
        table |= {"addition_embed_type": "text_time", "addition_time_embed_dim": config.added_time_dim}
        table["projection_class_embeddings_input_dim"] = config.added_dim
    return table


def control_table(config: ControlNetConfig) -> dict:
    """The config.json with which diffusers builds the same ControlNet."""
    table = unet_table(config)
    for name in ("sample_size", "out_channels", "up_block_types"):  # of the way up
        del table[name]
    return table | {
        "_class_name": "ControlNetModel",
        "conditioning_channels": config.hint_channels,
        "conditioning_embedding_out_channels": list(config.stem),
        "controlnet_conditioning_channel_order": "rgb",
        "global_pool_conditions": config.pooled,
    }


# ---------------------------------------------------------------- autoencoder


def vae_config(values: dict, where: str | Path = "config.json") -> VAEConfig:
    """AutoencoderKL's config.json. A file that does not name `force_upcast` (SD 1.x, 2.x) needs none."""
    table = Table(values, where)
    channels = table.levels("block_out_channels", (64,), None, between(1, 4096))
    n = len(channels)
    table.levels("down_block_types", "DownEncoderBlock2D", n, lambda v: v == "DownEncoderBlock2D")
    table.levels("up_block_types", "UpDecoderBlock2D", n, lambda v: v == "UpDecoderBlock2D")
    size = table.get("sample_size", 512)
    config = VAEConfig(
        channels=channels,
        layers=table.whole("layers_per_block", 1, 1, MAX_LAYERS),
        latent_channels=table.whole("latent_channels", 4, 1, 64),
        scaling_factor=table.number("scaling_factor", 0.18215, 1e-4, 1e4),
        force_upcast=table.flag("force_upcast", False),
        sample_size=size[0] if isinstance(size, list) and size else size,
        norm_groups=table.whole("norm_num_groups", 32, 1, 1024),
    )
    table.close(VAE_FIXED)
    if not between(1, 8192)(config.sample_size):
        raise table.wrong("sample_size", "a whole number from 1 to 8192")
    if any(width % config.norm_groups for width in channels):
        raise table.wrong("block_out_channels", f"multiples of the norm groups ({config.norm_groups})")
    check_size(where, sum(c * c * 24 * (2 * config.layers + 1) for c in channels))
    return config


def vae_table(config: VAEConfig) -> dict:
    """The config.json with which diffusers builds the same autoencoder."""
    n = len(config.channels)
    return {
        "_class_name": "AutoencoderKL",
        "_diffusers_version": "0.30.0",
        "in_channels": 3,
        "out_channels": 3,
        "down_block_types": ["DownEncoderBlock2D"] * n,
        "up_block_types": ["UpDecoderBlock2D"] * n,
        "block_out_channels": list(config.channels),
        "layers_per_block": config.layers,
        "latent_channels": config.latent_channels,
        "norm_num_groups": config.norm_groups,
        "sample_size": config.sample_size,
        "scaling_factor": config.scaling_factor,
        "force_upcast": config.force_upcast,
    }


# ---------------------------------------------------------------- text and vision towers


def text_config(values: dict, where: str | Path = "config.json") -> CLIPTextConfig:
    """CLIPTextModel's or CLIPTextModelWithProjection's config.json; only the second has a projection."""
    table = Table(values, where)
    vocab = table.whole("vocab_size", 49408, 3, 10**6)
    end = table.whole("eos_token_id", 49407, 0, 10**6)
    classes = table.get("architectures", [])
    projected = isinstance(classes, list) and "CLIPTextModelWithProjection" in classes
    projection = table.whole("projection_dim", 512, 0, MAX_WIDTH)
    config = CLIPTextConfig(
        **tower(table, 512, 2048, 8),
        positions=table.whole("max_position_embeddings", 77, 3, 4096),
        vocab=vocab,
        projection=projection if projected else 0,
        eos_id=vocab - 1 if end == 2 else end,  # the released files say 2 and mean "the largest id"
    )
    table.close(CLIP_FIXED)
    if config.eos_id >= vocab:
        raise table.wrong("eos_token_id", f"2, or a number below vocab_size ({vocab})")
    check_size(where, vocab * config.width + config.layers * (4 * config.width**2 + 2 * config.width * config.mlp))
    return config


def text_table(config: CLIPTextConfig) -> dict:
    """The config.json with which transformers builds the same tower."""
    return {
        "architectures": ["CLIPTextModelWithProjection" if config.projection else "CLIPTextModel"],
        "model_type": "clip_text_model",
        "vocab_size": config.vocab,
        "hidden_size": config.width,
        "intermediate_size": config.mlp,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "hidden_act": config.activation,
        "max_position_embeddings": config.positions,
        "projection_dim": config.projection or config.width,
        "layer_norm_eps": 1e-5,
        "bos_token_id": 0,
        "pad_token_id": 1,
        "eos_token_id": 2 if config.eos_id == config.vocab - 1 else config.eos_id,
    }


def vision_values(values: dict) -> dict:
    """The vision tower's part of a whole CLIP's config.json, else the values themselves; the projection's width is the whole's.

    (LAION's CLIPs have transformers' default of 512 in the part, and 1024, the truth, at the top.)
    """
    part = values.get("vision_config")
    if not isinstance(part, dict):
        return values
    return part | {"projection_dim": values.get("projection_dim", 512)}


def vision_config(values: dict, where: str | Path = "config.json") -> CLIPVisionConfig:
    """CLIPVisionModelWithProjection's config.json."""
    table = Table(values, where)
    config = CLIPVisionConfig(
        **tower(table, 768, 3072, 12),
        image_size=table.whole("image_size", 224, 1, 4096),
        patch=table.whole("patch_size", 32, 1, 4096),
        projection=table.whole("projection_dim", 512, 1, MAX_WIDTH),
    )
    table.close(CLIP_FIXED)
    check_size(where, config.layers * (4 * config.width**2 + 2 * config.width * config.mlp))
    return config


def vision_table(config: CLIPVisionConfig) -> dict:
    """The config.json with which transformers builds the same tower."""
    return {
        "architectures": ["CLIPVisionModelWithProjection"],
        "model_type": "clip_vision_model",
        "hidden_size": config.width,
        "intermediate_size": config.mlp,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "hidden_act": config.activation,
        "image_size": config.image_size,
        "patch_size": config.patch,
        "projection_dim": config.projection,
        "layer_norm_eps": 1e-5,
    }


def tower(table: Table, width: int, mlp: int, heads: int) -> dict:
    """What the two kinds of tower have in common; the defaults are transformers'."""
    fields = {
        "width": table.whole("hidden_size", width, 1, MAX_WIDTH),
        "mlp": table.whole("intermediate_size", mlp, 1, 4 * MAX_WIDTH),
        "layers": table.whole("num_hidden_layers", 12, 1, 96),
        "heads": table.whole("num_attention_heads", heads, 1, 256),
        "activation": table.choice("hidden_act", "quick_gelu", ["quick_gelu", "gelu"]),
    }
    if fields["width"] % fields["heads"]:
        raise table.wrong("num_attention_heads", f"a divisor of hidden_size ({fields['width']})")
    return fields


# ---------------------------------------------------------------- scheduler


def scheduler_config(values: dict, where: str | Path = "scheduler_config.json") -> SchedulerConfig:
    """A scheduler_config.json of any class that has a sampler here; keys that are missing have that class's own defaults."""
    table = Table(values, where)
    name = table.get("_class_name")
    sampler = SAMPLERS.get(name) if isinstance(name, str) else None
    if sampler is None:
        raise table.wrong("_class_name", ", ".join(SAMPLERS))
    late = name in ("LCMScheduler", "TCDScheduler")  # written when everybody used latents: their defaults are SD's
    near = late or name in (
        "HeunDiscreteScheduler",
        "KDPM2DiscreteScheduler",
        "KDPM2AncestralDiscreteScheduler",
        "DPMSolverSDEScheduler",
    )
    if sampler == "dpmpp_2m":
        algorithm = table.choice("algorithm_type", "dpmsolver++", ["dpmsolver++", "sde-dpmsolver++"])
        sampler = "dpmpp_2m_sde" if algorithm.startswith("sde") else sampler
    elif sampler == "deis":
        table.choice("algorithm_type", "deis", ["deis"])
    config = SchedulerConfig(
        beta_start=table.number("beta_start", 0.00085 if near else 0.0001, 1e-8, 0.999),
        beta_end=table.number("beta_end", 0.012 if near else 0.02, 1e-8, 0.999),
        beta_schedule=table.choice(
            "beta_schedule", "scaled_linear" if late else "linear", ["linear", "scaled_linear", "squaredcos_cap_v2"]
        ),
        train_steps=table.whole("num_train_timesteps", 1000, 2, 10**5),
        prediction_type=table.choice("prediction_type", "epsilon", PREDICTIONS),
        spacing=table.choice("timestep_spacing", None, SPACINGS),
        steps_offset=table.whole("steps_offset", 0, 0, 1000),
        set_alpha_to_one=table.flag("set_alpha_to_one", name != "PNDMScheduler"),
        zero_snr=table.flag("rescale_betas_zero_snr", False),
        sampler=sampler,
        skip_prk_steps=table.flag("skip_prk_steps", False),
        original_steps=table.whole("original_inference_steps", 50, 1, 10**5),
        timestep_scaling=table.number("timestep_scaling", 10.0, 1e-6, 1e6),
    )
    table.close(SCHEDULER_FIXED, SCHEDULER_IRRELEVANT)
    return config


def scheduler_table(config: SchedulerConfig) -> dict:
    """The scheduler_config.json with which diffusers builds the same scheduler."""
    if config.sampler not in CLASSES:
        raise CheckpointError(
            f"sampler {config.sampler} has no scheduler class in diffusers; choose one of {', '.join(CLASSES)}"
        )
    table = {
        "_class_name": CLASSES[config.sampler],
        "_diffusers_version": "0.30.0",
        "num_train_timesteps": config.train_steps,
        "beta_start": config.beta_start,
        "beta_end": config.beta_end,
        "beta_schedule": config.beta_schedule,
        "prediction_type": config.prediction_type,
        "steps_offset": config.steps_offset,
        "clip_sample": False,
        "set_alpha_to_one": config.set_alpha_to_one,
        "skip_prk_steps": config.skip_prk_steps,
    }
    if config.sampler == "dpmpp_2m_sde":
        table["algorithm_type"] = "sde-dpmsolver++"
    if config.spacing is not None:
        table["timestep_spacing"] = config.spacing
    if config.zero_snr:
        table["rescale_betas_zero_snr"] = True
    if config.sampler in ("lcm", "tcd"):
        table |= {"original_inference_steps": config.original_steps, "timestep_scaling": config.timestep_scaling}
    return table
