"""Adapter files of every format, each made by its own writer (PEFT, diffusers, LyCORIS) or by the format's rule.

A `Written` is a file and what it must add to each weight, worked out by the writer or here, never by the code under test. The
models are small in width and official in everything else: every block, so that every official name occurs.
"""

import copy
import logging
import re
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import torch
from sdcore.weights import adapters, detect, files, names
from torch import Tensor, nn

from sdcore.clip import CLIPTextConfig
from sdcore.unet import SD2, SD15, SDXL
from tests import peers

logging.getLogger("LyCORIS").setLevel(logging.ERROR)

Deltas = dict[tuple[str, str], tuple[Tensor | None, Tensor | None]]  # (part, module) -> of its weight, of its bias

L = CLIPTextConfig(16, 12, 2, 64, positions=16, vocab=60, eos_id=59)
BIGG = CLIPTextConfig(32, 32, 2, 128, "gelu", positions=16, vocab=60, eos_id=59, projection=64)
H = replace(L, layers=23, activation="gelu")
SMALL = dict(channels=(16, 32, 64, 64), heads=(2, 4, 4, 4), norm_groups=8, context_dim=16)
CONFIGS = {  # outputs are powers of two: BOFT wants it
    "sd1": {"unet": replace(SD15, **SMALL), "text_encoder": L},
    "sd2-base": {"unet": replace(SD2, **SMALL), "text_encoder": H},
    "sdxl": {
        "unet": replace(SDXL, channels=(16, 32, 64), heads=(2, 4, 4), norm_groups=8, context_dim=48, added_time_dim=8,
                        added_dim=64 + 48),
        "text_encoder": L,
        "text_encoder_2": BIGG,
    },
}  # fmt: skip


@dataclass
class Written:
    path: Path
    deltas: Deltas


@cache
def twins(family: str) -> tuple[SimpleNamespace, dict[str, nn.Module]]:
    """Something like our pipeline, and the peers' modules by part, on the same random weights."""
    both = {part: peers.twins(config, seed) for seed, (part, config) in enumerate(CONFIGS[family].items())}
    ours = SimpleNamespace(
        unet=both["unet"][0], text_encoders=[own for part, (own, _) in both.items() if part != "unet"], family=family
    )
    return ours, {part: theirs for part, (_, theirs) in both.items()}


def pipe_of(family: str) -> SimpleNamespace:
    return twins(family)[0]


def parts_of(family: str) -> dict[str, nn.Module]:
    pipe = pipe_of(family)
    return dict(zip(CONFIGS[family], [pipe.unet, *pipe.text_encoders], strict=True))


OFFICIAL = re.compile(
    r"down_blocks\.0\.resnets\.0\.(conv1|norm1)|down_blocks\.[01]\.attentions\.0\.(norm|proj_in)|"
    r"down_blocks\.[01]\.attentions\.0\.transformer_blocks\.0\.(norm1|attn1\.to_q|attn2\.to_k)|"
    r"text_model\.encoder\.layers\.0\.(layer_norm1|self_attn\.q_proj)"
)


OFFICIAL_CONFIGS = {
    family: {"unet": release.unet, **release.text} for family, release in detect.FAMILIES.items() if family in CONFIGS
}


@cache
def official(family: str) -> tuple[SimpleNamespace, dict[str, nn.Module]]:
    """In the place of `twins`: a few layers of every part of the released family, in their real sizes, on random weights."""
    parts = {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for part, weights in adapters.released(family).weights.items():
            parts[part] = nn.Module()
            for name, (weight, bias) in weights.items():
                if OFFICIAL.fullmatch(name) and not name.startswith(f"down_blocks.{int(family != 'sdxl')}.attentions"):
                    put(parts[part], name, layer_of(name, weight, bias is not None))
    return SimpleNamespace(
        unet=parts["unet"], text_encoders=[model for part, model in parts.items() if part != "unet"], family=family
    ), parts


def layer_of(name: str, weight: Tensor, bias: bool) -> nn.Module:
    """A layer of the peers' kind with a weight of this shape."""
    if weight.ndim == 1:
        of_layer = "transformer_blocks" in name or "layer_norm" in name
        return nn.LayerNorm(len(weight)) if of_layer else nn.GroupNorm(32, len(weight))
    o, n, *kernel = weight.shape
    return nn.Conv2d(n, o, tuple(kernel), padding=kernel[0] // 2) if kernel else nn.Linear(n, o, bias)


def put(model: nn.Module, name: str, module: nn.Module) -> None:
    *path, last = name.split(".")
    for step in path:
        if step not in dict(model.named_children()):
            model.add_module(step, nn.Module())
        model = getattr(model, step)
    model.add_module(last, module)


def layers(
    family: str, kinds: tuple[type, ...] = (nn.Linear, nn.Conv2d), parts=None
) -> dict[tuple[str, str], nn.Module]:
    """Every layer of these kinds, by part and full name."""
    return {
        (part, name): module
        for part, model in parts_of(family).items()
        for name, module in model.named_modules()
        if isinstance(module, kinds) and (parts is None or part in parts)
    }


def kohya_path(part: str, name: str, family: str) -> str:
    """kohya's spelling; of XL's UNet that of the original names, by the renaming of the weights themselves."""
    if part == "unet":
        if family == "sdxl":
            (renamed,) = names.unet_to_ldm({f"{name}.weight": torch.empty(0)}, SDXL)
            name = renamed.removesuffix(".weight")
        return "lora_unet_" + name.replace(".", "_")
    prefix = {"sdxl": {"text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_"}}.get(family, {}).get(
        part, "lora_te_"
    )
    return prefix + name.replace(".", "_")


# ---------------------------------------------------------------- LyCORIS, with its own modules


def lycoris(path: Path, family: str, make, kinds=(nn.Linear, nn.Conv2d), spell=kohya_path, merged=False, parts=None):
    """A file of `make(name, module)` on every layer, with random numbers, and what LyCORIS itself adds to the weights."""
    generator = torch.Generator().manual_seed(7)
    network, deltas = nn.Module(), {}
    for (part, name), module in layers(family, kinds, parts).items():
        one = make(spell(part, name, family), module)
        if one is None:
            continue
        with torch.no_grad():
            for parameter in one.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
            if merged:
                weight, bias = one.get_merged_weight(1.0)[0] - module.weight, None
            elif hasattr(
                one, "get_weight"
            ):  # LoHa, LoKr: what training acts with; `get_diff_weight` has the scale in it twice
                weight, bias = one.get_weight(module.weight.shape), None
            else:
                weight, bias = one.get_diff_weight(1.0)
        deltas[part, name] = (weight.detach().reshape(module.weight.shape), None if bias is None else bias.detach())
        network.add_module(spell(part, name, family), one)
    tensors = {key: tensor.detach() for key, tensor in network.state_dict().items()}
    files.write(path, tensors)
    return Written(path, deltas)


def lycoris_format(format: str, path: Path, family: str) -> Written:
    from lycoris.modules import boft, diag_oft, full, glora, ia3, locon, loha, lokr, norms

    def tucker(module: nn.Module) -> bool:
        return isinstance(module, nn.Conv2d) and module.kernel_size != (1, 1)

    def size(module: nn.Module) -> int:  # of OFT's blocks: two or more
        return 4 if len(module.weight) > 4 else 2

    def odd(count: int) -> int:
        return count // (count & -count)

    def whole(path: str, module: nn.Module):
        one = full.FullModule(path, copy.deepcopy(module), 1.0)
        one.apply_to()  # it takes the weight over, and only then writes the difference from it
        return one

    match format:
        case "kohya":  # with LoCon: linear layers and convolutions
            return lycoris(path, family, lambda n, m: locon.LoConModule(n, m, 1.0, lora_dim=4, alpha=2))
        case "tucker":
            return lycoris(
                path,
                family,
                lambda n, m: locon.LoConModule(n, m, 1.0, lora_dim=4, alpha=3, use_tucker=True),
                kinds=(nn.Conv2d,),
            )
        case "rslora":
            return lycoris(path, family, lambda n, m: locon.LoConModule(n, m, 1.0, lora_dim=4, alpha=3, rs_lora=True))
        case "loha":
            return lycoris(path, family, lambda n, m: loha.LohaModule(n, m, 1.0, lora_dim=2, alpha=1))
        case "loha-tucker":
            return lycoris(
                path,
                family,
                lambda n, m: loha.LohaModule(n, m, 1.0, lora_dim=2, alpha=1, use_tucker=True) if tucker(m) else None,
            )
        case "lokr":  # w1 whole, w2 a product, or whole where the layer is small
            return lycoris(path, family, lambda n, m: lokr.LokrModule(n, m, 1.0, lora_dim=4, alpha=1, factor=4))
        case "lokr-both":
            return lycoris(
                path, family,
                lambda n, m: lokr.LokrModule(n, m, 1.0, lora_dim=2, alpha=1, decompose_both=True, use_tucker=True, factor=8),
            )  # fmt: skip
        case "lokr-whole":
            return lycoris(path, family, lambda n, m: lokr.LokrModule(n, m, 1.0, alpha=1, full_matrix=True))
        case "dora-inputs":
            return lycoris(
                path, family,
                lambda n, m: locon.LoConModule(n, m, 1.0, lora_dim=4, alpha=2, weight_decompose=True, wd_on_out=False),
                merged=True,
            )  # fmt: skip
        case "full":
            return lycoris(path, family, whole)
        case "norm":
            return lycoris(path, family, lambda n, m: norms.NormModule(n, m, 1.0), kinds=(nn.LayerNorm, nn.GroupNorm))
        case "ia3":
            return lycoris(path, family, lambda n, m: ia3.IA3Module(n, m, 1.0, train_on_input="to_k" not in n))
        case "glora":
            return lycoris(path, family, lambda n, m: glora.GLoRAModule(n, m, 1.0, lora_dim=4, alpha=2))
        case "oft":
            return lycoris(path, family, lambda n, m: diag_oft.DiagOFTModule(n, m, 1.0, size(m), rescaled="attn" in n))
        case "oft-constraint":
            return lycoris(path, family, lambda n, m: diag_oft.DiagOFTModule(n, m, 1.0, size(m), constraint=0.001))
        case "boft":  # halves of blocks are exchanged a power of two apart: a block holds what else divides the outputs
            return lycoris(
                path, family,
                lambda n, m: boft.ButterflyOFTModule(n, m, 1.0, lora_dim=max(4, 2 * odd(len(m.weight))), rescaled="attn" in n),
            )  # fmt: skip
        case "simpletuner":
            return lycoris(
                path, family, lambda n, m: lokr.LokrModule(n, m, 1.0, lora_dim=4, alpha=1, factor=4),
                spell=lambda part, name, family: "lycoris_" + name.replace(".", "_"), parts=("unet",),
            )  # fmt: skip
    raise ValueError(format)


LYCORIS = (
    "kohya", "tucker", "rslora", "loha", "loha-tucker", "lokr", "lokr-both", "lokr-whole", "dora-inputs", "full", "norm", "ia3",
    "glora", "oft", "oft-constraint", "boft", "simpletuner",
)  # fmt: skip

# ---------------------------------------------------------------- by the rule of the format

ATTENTION = re.compile(r"(.+\.attn[12])\.(to_[qkv]|to_out)(\.0)?")


def random_lora(family: str, chosen, rank: int = 3, seed: int = 3):
    """(part, name), module, down, up and up @ down of every chosen layer."""
    generator = torch.Generator().manual_seed(seed)
    for (part, name), module in layers(family).items():
        if chosen(part, name):
            w = module.weight
            down = torch.randn(rank, *w.shape[1:], generator=generator) * 0.1
            up = torch.randn(w.shape[0], rank, *[1] * (w.ndim - 2), generator=generator) * 0.1
            delta = (up.flatten(1).double() @ down.flatten(1).double()).reshape(w.shape)
            yield (part, name), module, down, up, delta


def ruled(format: str, path: Path, family: str) -> Written:
    """A file whose keys and numbers follow the format's documented rule."""
    tensors: dict[str, Tensor] = {}
    deltas: Deltas = {}
    metadata: dict[str, str] = {}
    everything = lambda part, name: True  # noqa: E731
    match format:
        case "no-alpha":
            for (part, name), _, down, up, delta in random_lora(family, everything):
                spelled = kohya_path(part, name, family)
                tensors |= {f"{spelled}.lora_down.weight": down, f"{spelled}.lora_up.weight": up}
                deltas[part, name] = (delta, None)
        case "scale":  # overrides alpha
            for (part, name), _, down, up, delta in random_lora(family, everything):
                spelled = kohya_path(part, name, family)
                tensors |= {f"{spelled}.lora_down.weight": down, f"{spelled}.lora_up.weight": up}
                tensors |= {f"{spelled}.alpha": torch.tensor(8.0), f"{spelled}.scale": torch.tensor(0.25)}
                deltas[part, name] = (0.25 * delta, None)
        case "kohya-diffusers-names":  # for XL too
            for (part, name), _, down, up, delta in random_lora(family, everything):
                spelled = kohya_path(part, name, family if part != "unet" else "sd1")
                tensors |= {f"{spelled}.lora_down.weight": down, f"{spelled}.lora_up.weight": up}
                tensors[f"{spelled}.alpha"] = torch.tensor(1.5)
                deltas[part, name] = (delta * 1.5 / 3, None)
        case "dora":  # ComfyUI's rule, on outputs
            for (part, name), module, down, up, delta in random_lora(family, everything):
                spelled, w = kohya_path(part, name, family), module.weight.detach().double()
                rows = w.flatten(1).norm(dim=1)
                magnitude = (rows * 1.1).float().reshape(-1, *[1] * (w.ndim - 1))
                tensors |= {f"{spelled}.lora_down.weight": down, f"{spelled}.lora_up.weight": up}
                tensors |= {f"{spelled}.alpha": torch.tensor(6.0), f"{spelled}.dora_scale": magnitude}
                lengths = (rows + torch.finfo(torch.float32).eps).reshape(magnitude.shape)
                deltas[part, name] = ((w + 2 * delta) * magnitude.double() / lengths - w, None)
        case "set-weight":
            generator = torch.Generator().manual_seed(5)
            for (part, name), module in layers(family).items():
                new = torch.randn(module.weight.shape, generator=generator)
                tensors[f"{kohya_path(part, name, family)}.set_weight"] = new
                deltas[part, name] = (new.double() - module.weight.detach().double(), None)
        case "glora-old":  # each pair the other way round
            written = lycoris_format("glora", path, family)
            swap = {"a1": "a2", "a2": "a1", "b1": "b2", "b2": "b1"}
            for key, tensor in files.read(path).tensors.items():
                tensors[re.sub(r"\.([ab][12])\.weight$", lambda m: f".{swap[m[1]]}.weight", key)] = tensor
            deltas = written.deltas
        case "oft-diag" | "oft-diag-zero":  # early files: the turn itself, or its distance from the identity
            generator = torch.Generator().manual_seed(5)
            for (part, name), module in layers(family).items():
                w = module.weight.detach().double()
                skew = torch.randn(len(w) // 4, 4, 4, generator=generator) * 0.1
                turns = torch.matrix_exp(skew - skew.mT)
                written = turns - torch.eye(4) if format == "oft-diag-zero" else turns
                tensors[f"{kohya_path(part, name, family)}.oft_diag"] = written
                turned = torch.block_diag(*turns.double()).T @ w.flatten(1)
                deltas[part, name] = (turned.reshape(w.shape) - w, None)
        case "oft-kohya":  # kohya's own trainer: its prefix, its clamp
            generator = torch.Generator().manual_seed(5)
            for (part, name), module in layers(family, parts=("unet",)).items():
                w = module.weight.detach().double()
                blocks = torch.randn(len(w) // 4, 4, 4, generator=generator) * 0.1
                q = (blocks - blocks.mT).double()
                q = q * min(1.0, 0.01 * len(w) / q.norm().item())
                turn = torch.block_diag(*((torch.eye(4) + q) @ torch.linalg.inv(torch.eye(4) - q)))
                spelled = kohya_path(part, name, family).replace("lora_unet_", "oft_unet_")
                tensors |= {f"{spelled}.oft_blocks": blocks, f"{spelled}.alpha": torch.tensor(0.01)}
                deltas[part, name] = ((turn.T @ w.flatten(1)).reshape(w.shape) - w, None)
        case "attn-procs" | "attn-procs-bare":
            for (part, name), _, down, up, delta in random_lora(family, lambda part, name: ATTENTION.fullmatch(name)):
                found = ATTENTION.fullmatch(name)
                spelled = f"{'unet.' if format == 'attn-procs' else ''}{found[1]}.processor.{found[2]}_lora"
                tensors |= {f"{spelled}.down.weight": down, f"{spelled}.up.weight": up}
                deltas[part, name] = (delta, None)
        case "old-diffusers":  # the years between: `.lora.`, and for text encoders `.lora_linear_layer.`
            for (part, name), _, down, up, delta in random_lora(family, everything):
                middle = "lora" if part == "unet" else "lora_linear_layer"
                tensors |= {f"{part}.{name}.{middle}.down.weight": down, f"{part}.{name}.{middle}.up.weight": up}
                deltas[part, name] = (delta, None)
        case "peft-default" | "peft-bare" | "peft-prefix" | "peft-no-text-model" | "peft-bias":
            for (part, name), module, down, up, delta in random_lora(family, everything):
                spelled = f"{part}.{name}"
                if format == "peft-prefix":
                    spelled = f"{part}.base_model.model.{name}"
                if format == "peft-no-text-model":
                    spelled = f"{part}.{name.removeprefix('text_model.')}"
                tail = {"peft-default": ".default.weight", "peft-bare": ""}.get(format, ".weight")
                tensors |= {f"{spelled}.lora_A{tail}": down, f"{spelled}.lora_B{tail}": up}
                bias = None
                if format == "peft-bias" and module.bias is not None:
                    tensors[f"{spelled}.lora_B.bias"] = bias = up.flatten(1).sum(dim=1)
                deltas[part, name] = (delta, bias)
        case "cloneofsimo":
            pairs, metadata = simo_pairs(family), {}
            for part, index, name, down, up, delta in pairs:
                tensors |= {f"{part}:{index}:down": down, f"{part}:{index}:up": up}
                metadata[f"{part}:{index}:rank"] = "3"
                deltas[part, name] = (delta, None)
            tensors["<sks>"] = torch.randn(16)
            metadata |= {"<sks>": "<embed>", "unet": '["CrossAttention", "Attention", "GEGLU"]'}
        case "cloneofsimo-pt":
            flat = []
            for part, _, name, down, up, delta in simo_pairs(family):
                if part == "unet":
                    flat += [nn.Parameter(up), nn.Parameter(down)]
                    deltas[part, name] = (delta, None)
            torch.save(flat, path.with_suffix(".pt"))
            return Written(path.with_suffix(".pt"), deltas)
        case "bundled":
            written = ruled("no-alpha", path, family)
            tensors, deltas = files.read(path).tensors, written.deltas
            widths = [config.width for part, config in CONFIGS[family].items() if part != "unet"]
            named = ("clip_l", "clip_g") if family == "sdxl" else ("string_to_param.*",)
            tensors |= {
                f"bundle_emb.sks.{key}": torch.randn(2, width) for key, width in zip(named, widths, strict=True)
            }
        case _:
            raise ValueError(format)
    files.write(path.with_name("new.safetensors"), tensors, metadata)
    path.with_name("new.safetensors").replace(path)
    return Written(path, deltas)


RULED = (
    "no-alpha", "scale", "kohya-diffusers-names", "dora", "set-weight", "glora-old", "oft-diag", "oft-diag-zero", "oft-kohya",
    "attn-procs", "attn-procs-bare", "old-diffusers", "peft-default", "peft-bare", "peft-prefix", "peft-no-text-model",
    "peft-bias", "bundled",
)  # fmt: skip
ONLY_SD1 = ("cloneofsimo", "cloneofsimo-pt")  # the format is older than XL


def simo_order() -> list[tuple[str, str]]:
    """The layers in the order in which diffusers 0.11 listed them, written out."""
    order: list[tuple[str, str]] = []
    blocks = [f"down_blocks.{i}.attentions.{j}" for i in range(3) for j in range(2)]
    blocks += [f"up_blocks.{i}.attentions.{j}" for i in (1, 2, 3) for j in range(3)]
    blocks += ["mid_block.attentions.0"]
    for block in blocks:
        inner = f"{block}.transformer_blocks.0"
        order += [("unet", f"{inner}.attn1.to_{x}") for x in ("q", "k", "v", "out.0")]
        order += [("unet", f"{inner}.ff.net.0.proj")]
        order += [("unet", f"{inner}.attn2.to_{x}") for x in ("q", "k", "v", "out.0")]
    for i in range(12):
        order += [("text_encoder", f"text_model.encoder.layers.{i}.self_attn.{x}_proj") for x in ("k", "v", "q", "out")]
    return order


def simo_pairs(family: str):
    """part, index, name, down, up, delta in that order."""
    order = simo_order()
    made = {where: rest for where, _, *rest in random_lora(family, lambda part, name: (part, name) in order)}
    count = {"unet": 0, "text_encoder": 0}
    for part, name in order:
        yield part, count[part], name, *made[part, name]
        count[part] += 1


def official_simo(format: str, path: Path) -> Written:
    """A numbered file for the real sizes of 1.x. It goes over all layers, so their changes (1.5 GB) are not worked out."""
    weights, order = adapters.released("sd1").weights, simo_order()
    pairs: list[tuple[str, Tensor, Tensor]] = []  # part, up, down
    for part, name in order:
        o, n = weights[part][name][0].shape[:2]
        pairs.append((part, torch.ones(o, 1), torch.ones(1, n)))
    if format == "cloneofsimo-pt":
        torch.save(
            [tensor for part, up, down in pairs if part == "unet" for tensor in (up, down)], path.with_suffix(".pt")
        )
        return Written(path.with_suffix(".pt"), {where: (None, None) for where in order if where[0] == "unet"})
    tensors, count = {}, {"unet": 0, "text_encoder": 0}
    for part, up, down in pairs:
        tensors |= {f"{part}:{count[part]}:up": up, f"{part}:{count[part]}:down": down}
        count[part] += 1
    files.write(path, tensors)
    return Written(path, dict.fromkeys(order, (None, None)))


# ---------------------------------------------------------------- PEFT and diffusers, with their own savers


def peft_model(family: str, part: str, config):
    """A copy of the peer's module with PEFT's adapter on it, its numbers random."""
    from peft import inject_adapter_in_model

    model = inject_adapter_in_model(config, copy.deepcopy(twins(family)[1][part]))
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if re.search(r"lora_|hada_|lokr_", name):
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


def peft_deltas(model: nn.Module, part: str) -> Deltas:
    """What PEFT's own merge adds to every weight."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    deltas = {}
    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer) and hasattr(module, "get_delta_weight"):
            before = module.get_base_layer().weight.detach().clone()
            module.merge()
            own = name if part == "unet" or name.startswith("text_") else f"text_model.{name}"
            deltas[part, own] = (module.get_base_layer().weight.detach() - before, None)
            module.get_base_layer().weight.data.copy_(before)
    return deltas


TARGETS = r".*\.(to_[qkv]|to_out\.0|proj|net\.2|proj_in|proj_out|conv1|time_emb_proj|conv|[qkv]_proj|out_proj|fc1|fc2)"


def peft_format(format: str, path: Path, family: str) -> Written:
    """`save_lora_weights` of diffusers, with PEFT's configuration in the metadata."""
    from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
    from peft import LoraConfig, get_peft_model_state_dict

    options = {
        "peft": dict(lora_alpha=2),
        "peft-rslora": dict(lora_alpha=2, use_rslora=True),
        "peft-dora": dict(lora_alpha=8, use_dora=True),
        "peft-patterns": dict(lora_alpha=2, rank_pattern={"attn2.to_k": 6}, alpha_pattern={"attn2.to_k": 3, "fc1": 5}),
    }[format]
    saved, deltas = {}, {}
    for part in CONFIGS[family]:
        config = LoraConfig(r=4, target_modules=TARGETS, init_lora_weights=False, **options)
        model = peft_model(family, part, config)
        saved[f"{part}_lora_layers"] = get_peft_model_state_dict(model)
        saved[f"{part}_lora_adapter_metadata"] = config.to_dict() | {"target_modules": ["x"]}
        deltas |= peft_deltas(model, part)
    pipeline = StableDiffusionXLPipeline if family == "sdxl" else StableDiffusionPipeline
    pipeline.save_lora_weights(path.parent, weight_name=path.name, **saved)
    return Written(path, deltas)


def peft_folder(format: str, path: Path, family: str) -> Written:
    """PEFT's own `save_pretrained` of the UNet: a folder with adapter_config.json; the alpha is there and nowhere else."""
    from peft import LoHaConfig, LoKrConfig, LoraConfig

    config = {
        "peft-folder": LoraConfig(r=4, lora_alpha=2, use_rslora=True, target_modules=TARGETS, init_lora_weights=False),
        "peft-folder-loha": LoHaConfig(r=4, alpha=2, target_modules=TARGETS, init_weights=False),
        "peft-folder-lokr": LoKrConfig(r=4, alpha=2, target_modules=TARGETS, init_weights=False),
        "peft-folder-lokr-whole": LoKrConfig(r=512, alpha=64, target_modules=TARGETS, init_weights=False),
    }[format]
    from peft import get_peft_model

    model = get_peft_model(copy.deepcopy(twins(family)[1]["unet"]), config)
    model.save_pretrained(path.with_suffix(""))
    return Written(path.with_suffix(""), peft_deltas(model.base_model.model, "unet"))


PEFT = ("peft", "peft-rslora", "peft-dora", "peft-patterns")
FOLDERS = ("peft-folder", "peft-folder-loha", "peft-folder-lokr", "peft-folder-lokr-whole")


def write(format: str, path: Path, family: str) -> Written:
    """A file of any of the formats."""
    if format in FOLDERS:
        return peft_folder(format, path, family)
    make = lycoris_format if format in LYCORIS else peft_format if format in PEFT else ruled
    return make(format, path, family)
