"""Reading ControlNets and T2I-Adapters in every layout that goes round, for the UNet of a pipeline.

    net = load_control("lllyasviel/control_v11p_sd15_canny", pipe)     # an alias, a hub id, a folder or a file
    pipe("a house", control=[Control(net, edges)])

| layout | told by | |
|---|---|---|
| diffusers | `controlnet_cond_embedding.*` | a folder with config.json, or its weight file; full, mid, small, Union |
| original | `input_hint_block.*`, with or without `control_model.` | SD's own files (`.pth`) |
| original, `difference` | a tensor of that name | what differs from the base: the base's weights are added |
| Control-LoRA | `lora_controlnet`, `.up`, `.down` | a LoRA on the base's encoder, whose tensors it shares |
| T2I-Adapter | `body.*`, with or without `adapter.` | original or diffusers |

Sizes are read off the tensors and have to fit the UNet. What no tensor shows is said by config.json beside the file, and where
there is none by the name: what is called shuffle is averaged over the picture. What is wrong is said before anything is made.
"""

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from sdcore import lora
from sdcore.changes import LowRank
from sdcore.controlnet import ControlNet, ControlNetConfig, of_unet
from sdcore.errors import AdapterError, CheckpointError
from sdcore.pipeline import Pipeline
from sdcore.t2i_adapter import T2IAdapter, T2IAdapterConfig
from sdcore.unet import UNetConfig

from . import checkpoint as ck
from . import configs, detect, fetch, files, names
from .assemble import check_names, check_values, fill, skeleton

Tensors = dict[str, Tensor]
PREFIX = "control_model."
MARKERS = {"difference", "lora_controlnet"}  # tensors that say what the others are
SIZES = 2**16  # the largest size that a tensor's axis may give a module
SEEN = {  # what a config.json says that the tensors show, or that the UNet has to have as well
    "addition_embed_type", "addition_time_embed_dim", "block_out_channels", "conditioning_channels", "cross_attention_dim",
    "conditioning_embedding_out_channels", "down_block_types", "in_channels", "layers_per_block", "norm_num_groups",
    "num_class_embeds", "num_control_type", "num_proj_channel", "num_trans_channel", "num_trans_head", "num_trans_layer",
    "only_cross_attention", "projection_class_embeddings_input_dim", "transformer_layers_per_block", "upcast_attention",
    "use_linear_projection",
}  # fmt: skip


def load_control(name: str | Path, pipe: Pipeline) -> ControlNet | T2IAdapter:
    """The ControlNet or T2I-Adapter of a name, hub id, folder or file, in the dtype and on the device of the pipeline's UNet.

    CheckpointError where the file is damaged or incomplete; AdapterError where it is something else, or made for another family.
    `pipe` stays as it is. A Control-LoRA shares the tensors that the UNet has now: its own, without adapters.
    """
    source = read(resolve(name))
    weight = next(pipe.unet.parameters())
    if source.kind == "t2i-adapter":
        sizes = adapter_config(source, pipe.unet.config, pipe.family)
        tensors = adapter_names(source.tensors, sizes)
        return fill("t2i_adapter", sizes, tensors, source.path, weight.device, weight.dtype)  # type: ignore
    config = control_config(source, pipe.unet.config, pipe.family)
    part = "controlnet_union" if config.kinds else "controlnet"
    tensors = source.named(config)
    if "lora_controlnet" in source.markers:
        return on_base(source, part, config, tensors, pipe.unet)
    if "difference" in source.markers:
        base = lora.base_weights(pipe.unet)
        tensors = {key: add(base[key], t) if key in base else t for key, t in tensors.items()}
    return fill(part, config, tensors, source.path, weight.device, weight.dtype)  # type: ignore


def add(base: Tensor, delta: Tensor) -> Tensor:
    """Their sum in fp32 where the shapes agree. Where not, `fill` says what is wrong with this tensor."""
    return base.float() + delta.to(base.device).float() if base.shape == delta.shape else delta


@torch.no_grad()
def on_base(source: "Source", part: str, config: ControlNetConfig, tensors: Tensors, unet: nn.Module) -> ControlNet:
    """A Control-LoRA: the UNet's own tensors (themselves), the file's in place of some of them, and LoRAs on others."""
    weight, where = next(unet.parameters()), source.path
    thin = {key: t for key, t in tensors.items() if key.endswith((".up", ".down"))}
    layers = {key.rpartition(".")[0] for key in thin}
    alone = [layer for layer in layers if not {f"{layer}.up", f"{layer}.down"} <= set(thin)]
    if alone:
        raise CheckpointError(f"{where}: {alone[0]} has one of .up and .down; download it again")
    check_values(part, tensors, where)
    own = {key: t.to(weight.device, weight.dtype) for key, t in tensors.items() if key not in thin}
    net = skeleton(part, config)
    wanted = net.state_dict()
    shared = {key: t for key, t in lora.base_weights(unet).items() if key in wanted}
    check_names(part, wanted, shared | own, where)
    net.load_state_dict(shared | own, strict=True, assign=True)
    changes = {layer: LowRank(thin[f"{layer}.down"], thin[f"{layer}.up"]) for layer in sorted(layers)}
    try:
        lora.attach({"controlnet": net}, lora.Adapter("control-lora", {"controlnet": changes}))
    except AdapterError as error:
        raise CheckpointError(f"{where}: {error}") from None
    return net.eval().requires_grad_(False)  # type: ignore


# ---------------------------------------------------------------- where it is


def resolve(name: str | Path) -> Path:
    """The folder or file that `name` means, downloaded if it is an alias or hub id. CheckpointError that says what to do."""
    text = str(name)
    if isinstance(name, Path) or Path(name).exists() or text.lower().endswith(fetch.WEIGHT_SUFFIXES):
        return fetch.resolve(name)
    known = fetch.manifest()["control"].get(text)
    if known and "folder" in known:
        return fetch.HERE / known["folder"]
    repo = known["repo"] if known else text
    if not known and not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", text):
        raise CheckpointError(
            f"{files.one_line(text)}: no such folder or file, and no control known here; "
            f"known are {', '.join(fetch.manifest()['control'])}"
        )
    if known and "file" in known:
        return fetch.download(f"{repo}/{known['file']}", None, None)
    fetch.download(f"{repo}/config.json", None, None)
    return fetch.download(f"{repo}/diffusion_pytorch_model.safetensors", None, None)


# ---------------------------------------------------------------- what it is


@dataclass
class Source:
    """A file of weights that control, before anything is made of it."""

    path: Path
    kind: str  # "controlnet" or "t2i-adapter"
    layout: str  # "diffusers" or "original"
    tensors: Tensors
    markers: set[str]
    config: configs.Table  # of config.json; empty where there is none

    @property
    def widths(self) -> list[int]:
        """Of the zero convolutions, first to last: what every layout of a ControlNet shows of the UNet that it is for."""
        pattern = (
            r"controlnet_down_blocks\.(\d+)\.weight" if self.layout == "diffusers" else r"zero_convs\.(\d+)\.0\.weight"
        )
        found = {
            int(m[1]): t.shape[0] for key, t in self.tensors.items() if (m := re.fullmatch(pattern, key)) and t.ndim
        }
        return [found[i] for i in sorted(found)]

    @property
    def context(self) -> int | None:
        """Width of the text that it reads; None where it reads none, as the smallest of XL's."""
        for key, t in self.tensors.items():
            if key.endswith((".attn2.to_k.weight", ".attn2.to_k.down")) and t.ndim > 1:
                return t.shape[1]
        return None

    @property
    def added(self) -> int | None:
        """Width of the numbers that XL hears beside the time; None where the file does not say."""
        for key in ("add_embedding.linear_1.weight", "label_emb.0.0.weight", "label_emb.0.0.down"):
            if key in self.tensors and self.tensors[key].ndim > 1:
                return self.tensors[key].shape[1]
        return None

    def named(self, config: UNetConfig) -> Tensors:
        """The tensors under our names."""
        if self.layout == "diffusers":
            return self.tensors
        return names.rename(self.tensors, names.swap(names.controlnet_modules(config)))

    def family(self) -> str | None:
        """The released family that it was made for; None for another."""
        for family in ("sd1", "sd2-base", "sdxl"):
            if not misfit(self, detect.FAMILIES[family].unet):
                return family
        return None

    def title(self) -> str:
        """What it is, for people."""
        family = self.family()
        made_for = detect.FAMILIES[family].title if family else "a UNet that is not known here"
        if self.kind == "t2i-adapter":
            patch = self.tensors.get("conv_in.weight", self.tensors.get("body.0.in_conv.weight"))
            grey = patch is not None and patch.ndim > 1 and patch.shape[1] in (64, 256)
            return f"a T2I-Adapter for {made_for}, which sees {'shades of grey' if grey else 'three channels'}"
        if "lora_controlnet" in self.markers:
            ranks = {t.shape[0] for key, t in self.tensors.items() if key.endswith(".down") and t.ndim}
            return f"a Control-LoRA of rank {max(ranks, default=0)} for {made_for}"
        kinds = self.tensors.get("task_embedding")
        union = f" Union of {kinds.shape[0]} kinds of map" if kinds is not None and kinds.ndim else ""
        difference = ", as what differs from its base" if "difference" in self.markers else ""
        return f"a ControlNet{union} for {made_for}, {self.layout} layout{difference}"


def read(path: Path) -> Source:
    """The control in a file or folder. AdapterError where it holds something else."""
    if path.is_dir():
        tensors, beside = ck.read_weights(path, None), path / "config.json"
    else:
        tensors, beside = files.read(path).tensors, path.parent / "config.json"
    return sort_out(path, tensors, configs.read_json(beside) if beside.exists() else {})


def sort_out(path: Path, tensors: Tensors, values: dict) -> Source:
    """Which kind and layout these tensors are, their prefix taken off."""
    kind = detect.kind_of(tensors)
    if kind.name not in ("controlnet", "t2i-adapter"):
        raise AdapterError(f"{path}: is {kind.what}, expected a ControlNet or T2I-Adapter; {kind.advice}")
    markers = MARKERS & {key.removeprefix(PREFIX) for key in tensors}
    prefix = (
        PREFIX if any(key.startswith(PREFIX) for key in tensors) else "adapter." if kind.name == "t2i-adapter" else ""
    )
    bare = {key.removeprefix(prefix): t for key, t in tensors.items() if key.removeprefix(PREFIX) not in MARKERS}
    original = any(re.match(r"input_hint_block\.|zero_convs\.|body\.\d+\.(block1|body)\.", key) for key in bare)
    told = values if not original and str(values.get("_class_name")).startswith("ControlNet") else {}
    table = configs.Table(told, (path if path.is_dir() else path.parent) / "config.json")
    return Source(path, kind.name, "original" if original else "diffusers", bare, markers, table)


def misfit(source: Source, unet: UNetConfig) -> str:
    """What tells a control from the UNet that it would go with; empty where it fits."""
    if source.kind == "t2i-adapter":
        widths, side = adapter_channels(source.tensors)
        taken = (*unet.channels, unet.channels[-1]) if unet.added_dim else unet.channels
        patch = 16 if unet.added_dim else 8
        if widths != taken or side != patch:
            return (
                f"features of {widths} channels from patches of {side}, the model takes {taken} from patches of {patch}"
            )
        return ""
    levels = [[c] * (unet.layers + (i < len(unet.channels) - 1)) for i, c in enumerate(unet.channels)]
    wanted_widths = [unet.channels[0], *(c for level in levels for c in level)]
    for what, found, wanted in (
        ("residuals of widths", source.widths, wanted_widths),
        ("a text of width", source.context, unet.context_dim),
        ("added numbers", source.added, unet.added_dim),
    ):
        if found is not None and found != wanted:
            return f"{what} {found}, the model has {wanted}"
    return ""


def check_family(source: Source, unet: UNetConfig, family: str) -> None:
    """AdapterError that names both where a control is for another UNet."""
    wrong = misfit(source, unet)
    if wrong:
        title = detect.FAMILIES[family].title if family in detect.FAMILIES else family
        raise AdapterError(
            f"{source.path}: is {source.title()}, and this model is {title} ({wrong}); take one made for it"
        )


# ---------------------------------------------------------------- sizes


def at(source: Source, tensors: Tensors, name: str, axis: int) -> int:
    shape = tensors[name].shape if name in tensors else ()
    if axis >= len(shape) or not 1 <= shape[axis] <= SIZES:
        raise CheckpointError(
            f"{source.path}: lacks {name}, or it is no {axis + 1}-dimensional tensor; download it again"
        )
    return shape[axis]


def count(keys: Iterable[str], pattern: str) -> int:
    """How many different numbers the pattern's group takes."""
    return len({m[1] for key in keys if (m := re.match(pattern, key))})


def control_config(source: Source, unet: UNetConfig, family: str) -> ControlNetConfig:
    """The sizes of a ControlNet: its UNet's, and what its own tensors and config.json say. AdapterError for another family's."""
    check_family(source, unet, family)
    tensors = source.named(unet)
    told = source.config
    told.choice("controlnet_conditioning_channel_order", "rgb", ["rgb"])
    heads = told.levels("attention_head_dim", list(unet.heads), len(unet.heads), lambda v: type(v) is int)
    pooled = told.flag("global_pool_conditions", not told.values and "shuffle" in source.path.stem)
    told.close(configs.UNET_FIXED, SEEN)
    config = of_unet(unet, pooled=pooled)
    if heads != unet.heads:
        raise AdapterError(f"{source.path}: has {heads} heads of attention a level, this model has {unet.heads}")
    stem = "controlnet_cond_embedding"
    halvings = count(tensors, rf"{stem}\.blocks\.(\d+)\.weight") // 2
    widths = [at(source, tensors, f"{stem}.blocks.{2 * i + 1}.weight", 0) for i in range(halvings)]
    config = replace(
        config,
        in_channels=at(source, tensors, "conv_in.weight", 1) if "conv_in.weight" in tensors else unet.out_channels,
        hint_channels=at(source, tensors, f"{stem}.conv_in.weight", 1),
        stem=(at(source, tensors, f"{stem}.conv_in.weight", 0), *widths),
        kinds=at(source, tensors, "task_embedding", 0) if "task_embedding" in tensors else 0,
    )
    if config.in_channels != unet.out_channels:
        raise AdapterError(
            f"{source.path}: takes latents of {config.in_channels} channels, expected {unet.out_channels}; it is for another task"
        )
    if source.markers and unet.in_channels != unet.out_channels:
        raise AdapterError(
            f"{source.path}: is {source.title()}, which needs its base: this UNet takes {unet.in_channels} channels, "
            f"its base {unet.out_channels}"
        )
    if "lora_controlnet" in source.markers:
        return config  # its transformers are the UNet's
    attention = [f"down_blocks.{i}.attentions.0" for i in range(len(unet.channels))]
    depths = [count(tensors, rf"{re.escape(place)}\.transformer_blocks\.(\d+)\.") for place in attention]
    there = [f"{place}.norm.weight" in tensors for place in attention]
    return replace(
        config,
        depths=tuple(depths),
        hollow=tuple(i for i, depth in enumerate(depths) if there[i] and not depth),
        mid_depth=count(tensors, r"mid_block\.attentions\.0\.transformer_blocks\.(\d+)\."),
    )


def adapter_channels(tensors: Tensors) -> tuple[tuple[int, ...], int]:
    """Channels of a T2I-Adapter's features, and the side of its patches; (), 0 where that cannot be seen."""
    tensors = adapter_numbers(tensors)
    ends = "out_conv" if "body.0.out_conv.weight" in tensors else "resnets.0.block1"
    found = [t.shape[0] for i in range(8) if (t := tensors.get(f"body.{i}.{ends}.weight")) is not None and t.ndim]
    first = tensors.get("conv_in.weight", tensors.get("body.0.in_conv.weight"))
    inputs = first.shape[1] if first is not None and first.ndim > 1 else 0
    return tuple(found), {64: 8, 192: 8, 256: 16, 768: 16}.get(inputs, 0)


def adapter_numbers(tensors: Tensors) -> Tensors:
    """A T2I-Adapter's names in the diffusers layout, without prefix. The original counts residual blocks, two a feature."""
    if any(key.startswith("body.0.resnets.") for key in tensors):
        return tensors
    if any(key.startswith("body.0.body.") for key in tensors):  # the light kind
        return {re.sub(r"^(body\.\d+)\.body\.", r"\1.resnets.", key): t for key, t in tensors.items()}

    def own(key: str) -> str:
        m = re.fullmatch(r"body\.(\d{1,3})\.(.*)", key)
        if m is None:
            return key
        feature, resnet = divmod(int(m[1]), 2)
        return f"body.{feature}.{m[2]}" if m[2].startswith("in_conv") else f"body.{feature}.resnets.{resnet}.{m[2]}"

    return {own(key): t for key, t in tensors.items()}


def adapter_config(source: Source, unet: UNetConfig, family: str) -> T2IAdapterConfig:
    """The sizes of a T2I-Adapter. AdapterError for another family's, and for the first release's kind."""
    if any(key.endswith((".skep.weight", ".down_opt.op.weight")) for key in source.tensors):
        raise AdapterError(
            f"{source.path}: is a T2I-Adapter of the first release (sd14v1), which is not supported; take an sd15v2 one"
        )
    check_family(source, unet, family)
    tensors = adapter_numbers(source.tensors)
    channels, patch = adapter_channels(source.tensors)
    light = "conv_in.weight" not in tensors
    first = at(source, tensors, "body.0.in_conv.weight" if light else "conv_in.weight", 1)
    return T2IAdapterConfig(
        hint_channels=first // patch**2,
        channels=channels,
        halved=tuple(i == 2 if patch == 16 else i > 0 for i in range(len(channels))),
        layers=count(tensors, r"body\.0\.resnets\.(\d+)\."),
        patch=patch,
        light=light,
    )


def adapter_names(tensors: Tensors, config: T2IAdapterConfig) -> Tensors:
    return {f"adapter.{key}": t for key, t in adapter_numbers(tensors).items()}


# ---------------------------------------------------------------- writing


def write_control(folder: str | Path, net: ControlNet, dtype: torch.dtype | None = None) -> None:
    """A ControlNet in the diffusers layout: a folder with config.json and weights, in `dtype` or as they are.

    CheckpointError where it cannot be written; AdapterError for a Union, whose layout is its makers'.
    """
    folder = Path(folder)
    if net.config.kinds:
        raise AdapterError(f"{folder}: a ControlNet Union is not written")
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(configs.control_table(net.config), indent=2) + "\n"
    (folder / "config.json").write_text(text, encoding="utf-8")
    files.write(folder / "diffusion_pytorch_model.safetensors", net.state_dict(), {"format": "pt"}, dtype)


def write_control_lora(
    path: str | Path, config: ControlNetConfig, tensors: Tensors, changes: Mapping[str, LowRank]
) -> None:
    """A Control-LoRA in the released layout: a LoRA of scale 1 on each layer of `changes`, every other tensor under our name.

    The matrices of the base are not written. CheckpointError where it cannot be written.
    """
    thin = {f"{layer}.{side}": t for layer, c in changes.items() for side, t in (("up", c.up), ("down", c.down))}
    renamed = names.rename(tensors | thin, names.controlnet_modules(config))
    files.write(path, {"lora_controlnet": torch.zeros(0)} | renamed, {"format": "pt"})
