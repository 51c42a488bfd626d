"""What a weight file is, from the names and shapes in it alone.

`kind_of` tells complete models from LoRAs, ControlNets and the rest. For a complete model in the original single-file layout,
`unet_from_shapes` reads the UNet's sizes off its tensors and `family_of` looks for the released family that has them;
`prediction_of` finds what the network predicts, which shapes do not show. `FAMILIES` is the list of what can be loaded.
`ip_adapter_from_shapes` and `ip_adapter_family` do the same for IP-Adapters.
"""

import re
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sdcore import clip, ip_adapter, scheduler, unet, vae
from sdcore.errors import AdapterError, CheckpointError

from .files import WeightFile
from .names import join

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Family:
    """A released family: its name for people, its parts, and the architecture name that modelspec gives it."""

    title: str
    unet: unet.UNetConfig
    vae: vae.VAEConfig
    text: dict[str, clip.CLIPTextConfig]  # by the name of the folder
    scheduler: scheduler.SchedulerConfig
    spec: str
    pipeline: str = "StableDiffusionPipeline"  # the class that model_index.json names


L, H, XL = {"text_encoder": clip.CLIP_L}, {"text_encoder": clip.OPEN_CLIP_H}, {"text_encoder_2": clip.OPEN_CLIP_BIGG}
SD, V1, V2 = vae.SD_VAE, "stable-diffusion-v1", "stable-diffusion-v2"
FAMILIES = {
    "sd1": Family("Stable Diffusion 1.x", unet.SD15, SD, L, scheduler.SD15_SCHEDULER, V1),
    "sd1-inpaint": Family(
        "Stable Diffusion 1.x inpainting", unet.SD15_INPAINT, SD, L, scheduler.SD15_INPAINT_SCHEDULER, f"{V1}-inpainting",
        "StableDiffusionInpaintPipeline",
    ),
    "ip2p": Family(
        "instruct-pix2pix", unet.IP2P, SD, L, scheduler.SD15_SCHEDULER, f"{V1}/ip2p", "StableDiffusionInstructPix2PixPipeline"
    ),
    "sd2-base": Family("Stable Diffusion 2.x base", unet.SD2, SD, H, scheduler.SD2_SCHEDULER, f"{V2}-512"),
    "sd2": Family("Stable Diffusion 2.x 768-v", unet.SD21_V, SD, H, scheduler.SD2_V_SCHEDULER, f"{V2}-768-v"),
    "sd2-inpaint": Family(
        "Stable Diffusion 2 inpainting", unet.SD2_INPAINT, SD, H, scheduler.SD2_SCHEDULER, f"{V2}-inpainting",
        "StableDiffusionInpaintPipeline",
    ),
    "sd2-depth": Family(
        "Stable Diffusion 2 depth", unet.SD2_DEPTH, SD, H, scheduler.SD2_SCHEDULER, f"{V2}-depth",
        "StableDiffusionDepth2ImgPipeline",
    ),
    "x4": Family(
        "Stable Diffusion x4 upscaler", unet.X4, vae.X4_VAE, H, scheduler.X4_SCHEDULER, f"{V2}-x4-upscaler",
        "StableDiffusionUpscalePipeline",
    ),
    "sdxl": Family(
        "Stable Diffusion XL base", unet.SDXL, vae.SDXL_VAE, L | XL, scheduler.SDXL_SCHEDULER, "stable-diffusion-xl-v1-base",
        "StableDiffusionXLPipeline",
    ),
    "sdxl-inpaint": Family(
        "Stable Diffusion XL inpainting", unet.SDXL_INPAINT, vae.SDXL_VAE, L | XL, scheduler.SDXL_SCHEDULER,
        "stable-diffusion-xl-v1-inpainting", "StableDiffusionXLInpaintPipeline",
    ),
    "refiner": Family(
        "Stable Diffusion XL refiner", unet.SDXL_REFINER, vae.SDXL_VAE, XL, scheduler.SDXL_SCHEDULER,
        "stable-diffusion-xl-v1-refiner", "StableDiffusionXLImg2ImgPipeline",
    ),
}  # fmt: skip

# ---------------------------------------------------------------- kinds of file

# The first pattern that any name matches decides, so what can sit inside other files comes first. The second entry says what
# the file is, the third what to do with it.
KINDS = [
    ("ip-adapter", r"^ip_adapter\.|^image_proj\.", "an IP-Adapter",
     "load a model, then load_ip_adapter(this file, pipe, image_encoder=...)"),
    ("lora", r"lora_(down|up|A|B|unet|te\d?)\b|lora_(unet|te\d?)_|[._]lora\.(down|up)\.|lora_linear_layer|hada_w1|lokr_w[12]"
     r"|dora_scale|lora_magnitude_vector|oft_(blocks|diag)|^(lycoris|oft_unet)_|^(unet|text_encoder):\d+:(up|down)$|^\d+$",
     "a LoRA or one of its kin", "load a model and give this file with --lora"),
    ("peft", r"\.(ia3_l|oft_R|boft_[Rs]|vera_lambda_[bd]|hra_u)(\.|$)", "an IA3, OFT, BOFT or other adapter as PEFT writes it",
     "of PEFT's adapters LoRA, LoHa and LoKr are read; merge this one into its model with PEFT"),
    ("lllite", r"lllite_unet", "a ControlNet-LLLite", "it is not supported: take a ControlNet or a Control-LoRA"),
    ("controlnet", r"^control_model\.|input_hint_block|controlnet_cond_embedding|^lora_controlnet$|instantx",
     "a ControlNet", "load a model and give this file with --control"),
    ("t2i-adapter", r"^(adapter\.)?body\.\d+\.(in_conv|block1|resnets|body)", "a T2I-Adapter",
     "load a model and give this file with --control"),
    ("embedding", r"^emb_params$|^string_to_param\.|^clip_[lg]$|^text_encoders_[01]$|^<.*>$", "a textual-inversion embedding",
     "load a model and give this file with --embedding"),
    ("unclip", r"^noise_augmentor\.|^embedder\.model\.visual", "a Stable Diffusion 2.1 unCLIP model", "unCLIP is not supported"),
    ("playground", r"^edm_mean$", "Playground 2.5", "its EDM sampling is not supported"),
    ("cosxl", r"^edm_vpred\.sigma_max$", "CosXL", "its EDM v-prediction is not supported"),
    ("model", r"^(model\.diffusion_model|model_ema)\.(diffusion_model)?input_blocks",
     "a model in the original single-file layout", "load it"),
    ("sd3", r"joint_blocks\.", "Stable Diffusion 3", "only 1.x, 2.x and XL are supported"),
    ("flux", r"double_blocks\.|single_transformer_blocks\.", "a Flux model",
     "only Stable Diffusion 1.x, 2.x and XL are supported"),
    ("dit", r"(^|\.)(transformer_blocks|blocks|layers)\.\d+\.(attn|adaLN|self_attn|cross_attn)", "a diffusion transformer",
     "only Stable Diffusion 1.x, 2.x and XL are supported"),
    ("bare-unet", r"^input_blocks\.\d+\.", "a UNet alone, in LDM's names without their prefix", "merge it into a complete model"),
    ("unet", r"^(unet\.)?down_blocks\.\d+\.(resnets|attentions)", "a UNet alone, in diffusers' names",
     "put it into a model's unet/ folder and load that folder"),
    ("vae", r"^(first_stage_model\.|vae\.)?(encoder|decoder)\.(down|up|down_blocks|up_blocks|mid)\b", "an autoencoder alone",
     "load a model, then pipe.vae = load_vae(this file)"),
    ("taesd", r"^(encoder|decoder)\.layers\.\d+|^\d+\.(conv|weight)", "a tiny autoencoder (TAESD) or a bare list of layers",
     "not supported"),
    ("vision", r"(^|\.)vision_model\.(?!.*text)", "a CLIP vision tower or a safety checker",
     "a tower goes with an IP-Adapter, as image_encoder="),
    ("text-encoder", r"(^|\.)text_model\.|^encoder\.layers\.|resblocks\.|^embeddings\.token_embedding", "a text encoder alone",
     "put it into a model's text_encoder/ folder and load that folder"),
]  # fmt: skip


@dataclass(frozen=True)
class Kind:
    name: str
    what: str
    advice: str


UNKNOWN = Kind("unknown", "weights of no kind that is known here", "expected a Stable Diffusion 1.x, 2.x or XL model")


def kind_of(names) -> Kind:
    """What a file with these tensor names is."""
    names = list(names)
    for name, pattern, what, advice in KINDS:
        if any(re.search(pattern, key) for key in names):
            return Kind(name, what, advice)
    return UNKNOWN


# ---------------------------------------------------------------- the original single-file layout

PREFIXES = [  # prefix, part, spelling of the names behind it
    ("model.diffusion_model.", "unet", "ldm"),
    ("first_stage_model.", "vae", "ldm"),
    ("vae.", "vae", "ldm"),
    ("cond_stage_model.transformer.", "text_encoder", "clip"),
    ("cond_stage_model.model.", "text_encoder", "open_clip"),
    ("conditioner.embedders.0.transformer.", "text_encoder", "clip"),
    ("conditioner.embedders.0.model.", "text_encoder_2", "open_clip"),  # the refiner
    ("conditioner.embedders.1.model.", "text_encoder_2", "open_clip"),
]
# Known to ride along unused: noise schedules, EMA copies, buffers of the text towers, and what SD 2.x does not read of its own.
UNUSED = re.compile(
    r"^(betas|logvar|scale_factor|lvlb_weights|posterior_\w+|(sqrt_|log_)?(one_minus_|recip_|recipm1_)?alphas_cumprod(_prev)?)$"
    r"|^(denoiser\.(log_)?sigmas|v_pred|ztsnr)$"
    r"|^(model_ema|depth_model|low_scale_model|first_stage_model\.loss)\."
    r"|(^|\.)(position_ids|logit_scale|attn_mask)$"
    r"|^cond_stage_model\.model\.(text_projection|transformer\.resblocks\.23\..*)$"
)


def split(tensors: Tensors) -> tuple[dict[tuple[str, str], Tensors], list[str], list[str]]:
    """Tensors by (part, spelling) with their prefixes off; the names that are known to be unused; the names that are unknown."""
    parts: dict[tuple[str, str], Tensors] = {}
    unused: list[str] = []
    unknown: list[str] = []
    for name, tensor in tensors.items():
        for prefix, part, spelling in PREFIXES:
            if name.startswith(prefix) and not UNUSED.search(name):
                join(parts.setdefault((part, spelling), {}), {name.removeprefix(prefix): tensor})
                break
        else:
            (unused if UNUSED.search(name) else unknown).append(name)
    return parts, unused, unknown


def averaged(tensors: Tensors) -> Tensors:
    """The same file with the UNet's EMA weights (LDM drops their dots) in place of its own; CheckpointError if there are none."""
    prefix = "model.diffusion_model."
    inner = {name: name.removeprefix(prefix) for name in tensors if name.startswith(prefix)}
    ema = {name: f"model_ema.diffusion_model{rest.replace('.', '')}" for name, rest in inner.items()}
    missing = [name for name in ema.values() if name not in tensors]
    if missing or not ema:
        raise CheckpointError(f"it has no complete EMA weights ({len(missing)} are missing); load it without ema")
    copies = set(ema.values())
    return {name: tensors[ema.get(name, name)] for name in tensors if name not in copies}


def unet_from_shapes(tensors: Tensors) -> unet.UNetConfig:
    """The sizes of a UNet in LDM's names. Heads are not visible in shapes: 8, or one for every 64 channels (2.x and XL)."""
    shape = {name: tuple(tensor.shape) for name, tensor in tensors.items()}

    def at(name: str, axis: int, default: int | None = None) -> int:
        if name not in shape or len(shape[name]) <= axis:
            if default is not None:
                return default
            raise CheckpointError(f"its UNet lacks {name} (or that is no matrix)")
        return shape[name][axis]

    def depth(block: str) -> int:
        blocks = {
            int(m[1])
            for name in shape
            if (m := re.match(rf"{re.escape(block)}\.1\.transformer_blocks\.(\d{{1,3}})\.", name))
        }
        return len(blocks)

    channels, depths, layers, n = [], [], [0], 1
    while f"input_blocks.{n}.0.in_layers.2.weight" in shape or f"input_blocks.{n}.0.op.weight" in shape:
        if f"input_blocks.{n}.0.op.weight" in shape:
            layers.append(0)
        else:
            if layers[-1] == 0:
                channels.append(at(f"input_blocks.{n}.0.in_layers.2.weight", 0))
                depths.append(depth(f"input_blocks.{n}"))
            layers[-1] += 1
        n += 1
    if not channels or len(set(layers)) != 1:
        raise CheckpointError("its UNet's blocks are not those of Stable Diffusion 1.x, 2.x or XL")
    first = next(
        (f"input_blocks.{i}.1" for i in range(n) if f"input_blocks.{i}.1.proj_in.weight" in shape), "middle_block.1"
    )
    inner = first + ".transformer_blocks.0"
    context = at(f"{inner}.attn2.to_k.weight", 1)
    linear = len(shape.get(f"{first}.proj_in.weight", ())) == 2
    classes = at("label_emb.weight", 0, 0)
    attends = [
        f"input_blocks.{1 + (layers[0] + 1) * i}.1.transformer_blocks.0.attn1.to_k.weight" for i in range(len(channels))
    ]
    return unet.UNetConfig(
        in_channels=at("input_blocks.0.0.weight", 1),
        out_channels=at("out.2.weight", 0),
        channels=tuple(channels),
        layers=layers[0],
        depths=tuple(depths),
        mid_depth=depth("middle_block"),
        heads=tuple(max(1, c // 64) if linear and not classes else 8 for c in channels),
        context_dim=context,
        linear_projection=linear,
        cross_only=tuple(context != c and at(name, 1, 0) == context for name, c in zip(attends, channels, strict=True)),
        class_embeddings=classes,
        added_dim=at("label_emb.0.0.weight", 1, 0),
    )


def visible(config: unet.UNetConfig) -> unet.UNetConfig:
    """A config with everything dropped that no shape shows."""
    cross = tuple(only and depth > 0 for only, depth in zip(config.cross_only, config.depths, strict=True))
    return replace(
        config, heads=(), cross_only=cross, sample_size=0, upcast_attention=False, added_time_dim=0, norm_groups=0
    )


DERIVED: dict[tuple[int, ...], str] = {  # XL with fewer transformers a level
    (0, 2, 4): "SSD-1B (distilled XL)", (0, 1, 2): "Vega (distilled XL)", (0, 2, 5): "KOALA-700M (distilled XL)",
    (0, 2, 6): "KOALA-1B (distilled XL)",
}  # fmt: skip


def family_of(config: unet.UNetConfig, prediction: str | None = None) -> str:
    """The released family that has this UNet. CheckpointError that names what it is instead, as far as that is known."""
    names = [name for name, family in FAMILIES.items() if visible(family.unet) == visible(config)]
    if set(names) == {"sd2", "sd2-base"}:
        return "sd2" if prediction == "v_prediction" else "sd2-base"
    if names:
        return names[0]
    if config.added_dim in (2048, 1536):
        raise CheckpointError("it is a Stable Diffusion 2.1 unCLIP model, which is not supported")
    if config.context_dim == 2048 and config.added_dim:
        what = DERIVED.get(config.depths) or (
            f"an XL model with {config.in_channels} input channels" if config.depths == (0, 2, 10) else None
        )
        raise CheckpointError(
            f"it is {what or f'an XL model with {config.depths} transformers a level'}, which is not supported"
        )
    raise CheckpointError(
        f"its UNet (input channels {config.in_channels}, widths {config.channels}, text width {config.context_dim}) is none of "
        f"the families {', '.join(FAMILIES)}"
    )


def prediction_of(file: WeightFile, unet_tensors: Tensors, config: unet.UNetConfig) -> tuple[str, str]:
    """`epsilon` or `v_prediction`, and how that is known. Markers first, then metadata, then (2.x only) a statistic.

    Source of the statistic: ComfyUI's model detection; the 768-v models' last norm biases spread visibly wider (0.09).
    """
    if "v_pred" in file.tensors:
        return "v_prediction", "marker tensor v_pred"
    said = file.metadata.get("modelspec.prediction_type", "").lower()
    if said in ("v", "v_prediction", "v-prediction", "epsilon", "eps"):
        return ("v_prediction" if said.startswith("v") else "epsilon"), "metadata modelspec.prediction_type"
    if config.class_embeddings:
        return "v_prediction", "all x4 upscalers"
    bias = unet_tensors.get("output_blocks.11.1.transformer_blocks.0.norm1.bias")
    if config.context_dim == 1024 and config.in_channels == 4 and bias is not None:
        spread = torch.std(bias.float(), unbiased=False).item()
        return (
            "v_prediction" if spread > 0.09 else "epsilon"
        ), f"2.x statistic: spread {spread:.3f} of the last norm's bias (v above 0.09)"
    return "epsilon", "default of the family"


# ---------------------------------------------------------------- IP-Adapters


def ip_adapter_from_shapes(tensors: Tensors, unet_config: unet.UNetConfig) -> ip_adapter.IPAdapterConfig:
    """The sizes of an IP-Adapter for a UNet. AdapterError where it is one of the kinds that are not supported, or none."""
    names = {name.removeprefix("image_proj.") for name in tensors if name.startswith("image_proj.")}

    def at(name: str, axis: int) -> int:
        shape = tensors[f"image_proj.{name}"].shape if name in names else ()
        if axis >= len(shape) or not 1 <= shape[axis] <= 2**16:
            raise AdapterError(
                f"it is an IP-Adapter whose image_proj.{name} is missing, or has no {axis + 1} axes of 1 to 65536"
            )
        return shape[axis]

    face = "perceiver_resampler.proj_in.weight" in names or {"proj.0.weight", "norm.weight"} <= names
    if face or any(".to_k_lora." in name for name in tensors):
        raise AdapterError(
            "it is an IP-Adapter FaceID, which looks at a face recogniser's numbers, not at pictures; that is not supported, "
            "take a base, Plus or full-face one"
        )
    if "proj.weight" in names:
        tokens = at("proj.weight", 0) // unet_config.context_dim
        return ip_adapter.IPAdapterConfig("base", at("proj.weight", 1), tokens, unet=unet_config)
    if "proj.3.weight" in names:
        return ip_adapter.IPAdapterConfig("full", at("proj.0.weight", 1), 257, unet=unet_config)
    if "latents" in names:
        layers = {found[1] for name in names if (found := re.match(r"layers\.(\d{1,3})\.", name))}
        return ip_adapter.IPAdapterConfig(
            "plus",
            embed=at("proj_in.weight", 1),
            tokens=at("latents", 1),
            width=at("latents", 2),
            layers=len(layers),
            heads=at("layers.0.0.to_q.weight", 0) // ip_adapter.HEAD,
            unet=unet_config,
        )
    raise AdapterError("it is an IP-Adapter of no kind that is known here; expected a base, Plus or full-face one")


def ip_adapter_family(tensors: Tensors) -> str | None:
    """The family whose UNet an IP-Adapter's layers fit; None where there is none."""
    keys = {name: tuple(t.shape) for name, t in tensors.items() if name.endswith(".to_k_ip.weight")}
    for family in ("sd1", "sd2-base", "sdxl"):
        config = FAMILIES[family].unet
        places = ip_adapter.places(config)
        if keys == {f"ip_adapter.{p.number}.to_k_ip.weight": (p.width, config.context_dim) for p in places}:
            return family
    return None


def ip_adapter_title(tensors: Tensors) -> str:
    """What an IP-Adapter is, for people: its kind, its family, and what it is shown."""
    family = ip_adapter_family(tensors)
    try:
        config = ip_adapter_from_shapes(tensors, FAMILIES[family or "sd1"].unet)
    except AdapterError as error:
        return str(error).removeprefix("it is ")
    made_for = FAMILIES[family].title if family else "a UNet that is not known here"
    sees = "the whole picture" if config.kind == "base" else "every patch"
    return f"an IP-Adapter{ip_adapter.KINDS[config.kind]} for {made_for}, which sees {sees} as {config.embed} numbers"
