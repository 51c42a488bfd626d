"""The names of parameters: ours, which are those of the diffusers layout, and the other spellings that go round.

Nothing here is a table of keys. A model is walked once by its config, giving the name of each *module* in both spellings
(`unet_modules`, `vae_modules`, `open_clip_modules`); a parameter follows its module, and the way back is the same walk with the
two columns swapped, so there and back is the identity by construction. Four things are more than a name: OpenCLIP packs the
query, key and value projections into one matrix and keeps its text projection transposed; LDM's autoencoder keeps its attention
projections as 1 x 1 convolutions. Names that belong to none are passed through, and the loader's strict comparison finds them.

    ours (diffusers folder)                    LDM (original single file)
    down_blocks.1.resnets.0.conv1.weight       input_blocks.4.0.in_layers.2.weight
    mid_block.attentions.0.to_q.weight         mid.attn_1.q.weight             (autoencoder)
    ...encoder.layers.0.self_attn.q_proj       ...resblocks.0.attn.in_proj     (OpenCLIP)
"""

import torch
from torch import Tensor

from sdcore.errors import CheckpointError

Tensors = dict[str, Tensor]
Modules = dict[str, str]

# ---------------------------------------------------------------- UNet

UNET_ENDS = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",  # SDXL: pooled text and sizes
    "add_embedding.linear_2": "label_emb.0.2",
    "class_embedding": "label_emb",  # x4: the noise level, one embedding each
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
UNET_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}


def unet_modules(config) -> Modules:
    """Our modules -> LDM's, which numbers every block of the way down, and of the way up, in one list."""
    modules = dict(UNET_ENDS)

    def block(ours: str, layer: int, theirs: str, attention: bool) -> None:
        modules.update({f"{ours}.resnets.{layer}.{a}": f"{theirs}.0.{b}" for a, b in UNET_RESNET.items()})
        if attention:
            modules[f"{ours}.attentions.{layer}"] = f"{theirs}.1"

    last = len(config.channels) - 1
    n = 1  # input_blocks.0 is conv_in
    for level, depth in enumerate(config.depths):
        for layer in range(config.layers):
            block(f"down_blocks.{level}", layer, f"input_blocks.{n}", depth > 0)
            n += 1
        if level < last:
            modules[f"down_blocks.{level}.downsamplers.0.conv"] = f"input_blocks.{n}.0.op"
            n += 1
    modules.update(
        {f"mid_block.resnets.{i}.{a}": f"middle_block.{2 * i}.{b}" for i in (0, 1) for a, b in UNET_RESNET.items()}
    )
    modules["mid_block.attentions.0"] = "middle_block.1"
    n = 0
    for level, depth in enumerate(reversed(config.depths)):
        for layer in range(config.layers + 1):
            block(f"up_blocks.{level}", layer, f"output_blocks.{n}", depth > 0)
            n += 1
        if level < last:  # the upsampler comes last in the level's last block: after its attention where there is one
            modules[f"up_blocks.{level}.upsamplers.0.conv"] = f"output_blocks.{n - 1}.{2 if depth else 1}.conv"
    return modules


def controlnet_modules(config) -> Modules:
    """Our modules of a ControlNet -> the original's: a UNet's, with a stem for the picture and a convolution at every exit."""
    modules = unet_modules(config) | {"controlnet_mid_block": "middle_block_out.0"}
    exits = 1 + len(config.channels) * (config.layers + 1)
    modules |= {f"controlnet_down_blocks.{i}": f"zero_convs.{i}.0" for i in range(exits)}
    stem = ["conv_in", *(f"blocks.{i}" for i in range(6)), "conv_out"]  # an activation lies between two in the original
    return modules | {f"controlnet_cond_embedding.{name}": f"input_hint_block.{2 * i}" for i, name in enumerate(stem)}


def unet_to_ldm(tensors: Tensors, config) -> Tensors:
    return rename(tensors, unet_modules(config))


def unet_from_ldm(tensors: Tensors, config) -> Tensors:
    return rename(tensors, swap(unet_modules(config)))


# ---------------------------------------------------------------- autoencoder

VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
VAE_OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}  # diffusers before 0.18


def vae_modules(config) -> Modules:
    """Our modules -> LDM's. LDM numbers the decoder's levels by resolution, so its `up` runs backwards."""
    modules = {"quant_conv": "quant_conv", "post_quant_conv": "post_quant_conv"}
    last = len(config.channels) - 1
    for half, way, theirs, layers in (
        ("encoder", "down", "down", config.layers),
        ("decoder", "up", "up", config.layers + 1),
    ):
        modules |= {f"{half}.conv_in": f"{half}.conv_in", f"{half}.conv_out": f"{half}.conv_out"}
        modules[f"{half}.conv_norm_out"] = f"{half}.norm_out"
        blocks = {f"{half}.mid_block.resnets.{i}": f"{half}.mid.block_{i + 1}" for i in (0, 1)}
        for level in range(last + 1):
            number = level if way == "down" else last - level
            for layer in range(layers):
                blocks[f"{half}.{way}_blocks.{level}.resnets.{layer}"] = f"{half}.{theirs}.{number}.block.{layer}"
            modules[f"{half}.{way}_blocks.{level}.{way}samplers.0"] = f"{half}.{theirs}.{number}.{way}sample"
        for ours, ldm in blocks.items():
            modules |= {f"{ours}.{part}": f"{ldm}.{part}" for part in ("norm1", "conv1", "norm2", "conv2")}
            modules[f"{ours}.conv_shortcut"] = f"{ldm}.nin_shortcut"
        modules |= {f"{half}.mid_block.attentions.0.{a}": f"{half}.mid.attn_1.{b}" for a, b in VAE_ATTENTION.items()}
    return modules


def vae_to_ldm(tensors: Tensors, config) -> Tensors:
    return {
        name: tensor[:, :, None, None] if ".attn_1." in name and tensor.ndim == 2 else tensor
        for name, tensor in rename(tensors, vae_modules(config)).items()
    }


def vae_from_ldm(tensors: Tensors, config) -> Tensors:
    return vae_spelling(rename(tensors, swap(vae_modules(config))))


def vae_spelling(tensors: Tensors) -> Tensors:
    """The names that diffusers gives the attention today, its projections as matrices, from any age of the layout."""
    where = ("encoder.mid_block.attentions.0", "decoder.mid_block.attentions.0")
    tensors = rename(tensors, {f"{at}.{old}": f"{at}.{new}" for at in where for old, new in VAE_OLD_ATTENTION.items()})
    return {
        name: tensor.flatten(1)
        if name.startswith(where) and tensor.ndim in (3, 4) and tensor.shape[2:].numel() == 1
        else tensor
        for name, tensor in tensors.items()
    }


# ---------------------------------------------------------------- text encoders

CLIP_LAYER = {
    "layer_norm1": "ln_1",
    "self_attn.out_proj": "attn.out_proj",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}
QKV = ("q_proj", "k_proj", "v_proj")  # the order in which OpenCLIP stacks them


def open_clip_modules(layers: int) -> Modules:
    """Our modules (those of transformers' CLIP) -> OpenCLIP's, without the packed projections."""
    modules = {"text_model.embeddings.token_embedding": "token_embedding", "text_model.final_layer_norm": "ln_final"}
    for i in range(layers):
        ours, theirs = f"text_model.encoder.layers.{i}", f"transformer.resblocks.{i}"
        modules |= {f"{ours}.{a}": f"{theirs}.{b}" for a, b in CLIP_LAYER.items()}
    return modules


def clip_to_open(tensors: Tensors, layers: int) -> Tensors:
    """Packs q, k, v of every layer into one matrix (copied), and transposes the text projection."""
    tensors = dict(tensors)
    packed = {"positional_embedding": tensors.pop("text_model.embeddings.position_embedding.weight")}
    if "text_projection.weight" in tensors:
        packed["text_projection"] = tensors.pop("text_projection.weight").T
    for i in range(layers):
        for kind in ("weight", "bias"):
            three = [tensors.pop(f"text_model.encoder.layers.{i}.self_attn.{name}.{kind}") for name in QKV]
            packed[f"transformer.resblocks.{i}.attn.in_proj_{kind}"] = torch.cat(three)
    return join(rename(tensors, open_clip_modules(layers)), packed)


def clip_from_open(tensors: Tensors, layers: int) -> Tensors:
    """Unpacks q, k, v (as views), and transposes the text projection. A layer beyond `layers` is passed through."""
    tensors, unpacked = dict(tensors), {}
    if "positional_embedding" in tensors:
        unpacked["text_model.embeddings.position_embedding.weight"] = tensors.pop("positional_embedding")
    if "text_projection" in tensors and tensors["text_projection"].ndim == 2:
        unpacked["text_projection.weight"] = tensors.pop("text_projection").T.contiguous()
    for i in range(layers):
        for kind in ("weight", "bias"):
            packed = f"transformer.resblocks.{i}.attn.in_proj_{kind}"
            if packed in tensors and tensors[packed].ndim and len(tensors[packed]) % 3 == 0 < len(tensors[packed]):
                own = [f"text_model.encoder.layers.{i}.self_attn.{name}.{kind}" for name in QKV]
                unpacked |= dict(zip(own, tensors.pop(packed).chunk(3), strict=True))
    return join(rename(tensors, swap(open_clip_modules(layers))), unpacked)


def clip_spelling(tensors: Tensors) -> Tensors:
    """The prefix `text_model.` that transformers wrote before 5.6 and omits since for towers without a projection."""
    inside = ("embeddings.", "encoder.", "final_layer_norm.")
    return {f"text_model.{name}" if name.startswith(inside) else name: tensor for name, tensor in tensors.items()}


# ---------------------------------------------------------------- the rule


def rename(tensors: Tensors, modules: Modules) -> Tensors:
    """Every tensor under the name that its module has in the other spelling; CheckpointError when two would share one."""
    renamed: Tensors = {}
    for name, tensor in tensors.items():
        renamed = join(renamed, {follow(name, modules): tensor})
    return renamed


def join(one: Tensors, other: Tensors) -> Tensors:
    """`one` with the tensors of `other` added to it; CheckpointError when they share a name."""
    for name in other:
        if name in one:
            raise CheckpointError(f"tensor {name}: the file has it twice, in two spellings; it was merged wrongly")
    one.update(other)
    return one


def follow(name: str, modules: Modules) -> str:
    """A parameter's name in the other spelling: the longest known module in front changes, the rest stays."""
    head, tail = name, ""
    while head:
        if head in modules:
            return modules[head] + tail
        head, _, rest = head.rpartition(".")
        tail = f".{rest}{tail}"
    return name


def swap(modules: Modules) -> Modules:
    return {theirs: ours for ours, theirs in modules.items()}
