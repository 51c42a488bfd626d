"""ControlNets and T2I-Adapters: the released modules at full size, bit for bit; every layout of file; what is refused."""

import types
from dataclasses import replace

import diffusers
import pytest
import torch
from sdcore.weights import controls, detect, files, names
from sdcore.weights.report import inspect

from sdcore import controlnet as cn
from sdcore import lora, t2i_adapter, unet
from sdcore.errors import AdapterError, CheckpointError, ConfigError, SdcoreError
from tests import peers

NETS = {
    "SD 1.5": cn.SD15_CONTROL, "SD 1.5 shuffle": cn.SD15_SHUFFLE, "SD 2.x": cn.SD2_CONTROL, "SDXL": cn.SDXL_CONTROL,
    "SDXL mid": cn.SDXL_CONTROL_MID, "SDXL small": cn.SDXL_CONTROL_SMALL, "SDXL Union": cn.SDXL_UNION,
    "SDXL Union promax": cn.SDXL_UNION_PROMAX,
}  # fmt: skip
PARAMETERS = {"SD 1.5": 361_279_120, "SDXL": 1_251_014_160, "SDXL mid": 272_586_000, "SDXL small": 160_111_120}
ADAPTERS = {
    "SD 1.5": t2i_adapter.SD15_ADAPTER, "SD 1.5 grey": t2i_adapter.SD15_ADAPTER_GREY,
    "SD 1.5 light": t2i_adapter.SD15_ADAPTER_LIGHT, "SDXL": t2i_adapter.SDXL_ADAPTER,
}  # fmt: skip
UNETS = {"sd1": unet.SD15, "sdxl": unet.SDXL}


# ---------------------------------------------------------------- the peers


def controlnet_of(c: cn.ControlNetConfig):
    """diffusers' module of one of our configurations, on the current default device."""
    options = dict(
        block_out_channels=c.channels,
        down_block_types=[
            "CrossAttnDownBlock2D" if d or i in c.hollow else "DownBlock2D" for i, d in enumerate(c.depths)
        ],
        transformer_layers_per_block=(*c.depths[:-1], c.mid_depth),
        attention_head_dim=c.heads,
        cross_attention_dim=c.context_dim,
        use_linear_projection=c.linear_projection,
        norm_num_groups=c.norm_groups,
        conditioning_embedding_out_channels=c.stem,
        global_pool_conditions=c.pooled,
    )
    if c.added_dim:
        options |= dict(
            addition_embed_type="text_time",
            addition_time_embed_dim=c.added_time_dim,
            projection_class_embeddings_input_dim=c.added_dim,
        )
    if c.kinds:
        width = c.channels[0]
        return diffusers.ControlNetUnionModel(
            **options, num_control_type=c.kinds, num_trans_channel=width, num_proj_channel=width
        )
    return diffusers.ControlNetModel(**options)


def adapter_of(c: t2i_adapter.T2IAdapterConfig):
    kind = "light_adapter" if c.light else "full_adapter_xl" if c.patch == 16 else "full_adapter"
    return diffusers.T2IAdapter(
        c.hint_channels, list(c.channels[:3] if c.light else c.channels), c.layers, c.patch, kind
    )


def ours_of(c):
    if isinstance(c, t2i_adapter.T2IAdapterConfig):
        return t2i_adapter.T2IAdapter(c)
    return cn.ControlNetUnion(c) if c.kinds else cn.ControlNet(c)


def twins(c):
    """Ours and theirs, sharing random weights: no zero convolution is zero."""
    with torch.device("meta"):
        ours, theirs = ours_of(c), (adapter_of if isinstance(c, t2i_adapter.T2IAdapterConfig) else controlnet_of)(c)
    peers.randomise(theirs)
    ours.load_state_dict(theirs.state_dict(), strict=True, assign=True)
    return ours.eval(), theirs.eval()


@torch.no_grad()
def difference(c: cn.ControlNetConfig, batch: int = 1) -> float:
    """Largest difference of any residual between ours and diffusers', at latents of 16 x 16."""
    ours, theirs = twins(c)
    (x, t, context, added, _), peer = peers.inputs(c, batch=batch)
    pixels = torch.rand(batch, 3, 128, 128, generator=torch.Generator().manual_seed(3))
    down, mid = theirs(x, t, context, pixels, return_dict=False, **peer)
    return worst(ours(x, t, context, pixels, added), [*down, mid])


def worst(mine, other) -> float:
    pairs = list(zip(mine, other, strict=True))
    assert all(a.shape == b.shape and a.isfinite().all() for a, b in pairs)
    return max((a - b).abs().max().item() for a, b in pairs)


@pytest.mark.parametrize("name", NETS)
def test_keys_and_shapes_at_full_size(name):
    with torch.device("meta"):
        ours, theirs = ours_of(NETS[name]), controlnet_of(NETS[name])
    assert {k: t.shape for k, t in ours.state_dict().items()} == {k: t.shape for k, t in theirs.state_dict().items()}
    count = sum(p.numel() for p in ours.parameters())
    assert count == PARAMETERS.get(name, count)  # the released files of XL small are of 640.4 and 320.2 MB


@pytest.mark.parametrize("name", ["SD 1.5", "SDXL mid", "SDXL small"])
def test_controlnet_at_full_size(name):
    assert difference(NETS[name]) == 0


@pytest.mark.check
@pytest.mark.parametrize("name", ["SDXL", "SD 2.x"])
def test_large_controlnet_at_full_size(name):
    assert difference(NETS[name]) == 0


@pytest.mark.parametrize("name", [name for name in NETS if "Union" not in name])
def test_small_controlnet_of_each_family(name):
    assert difference(peers.small(NETS[name]), batch=2) == 0


@torch.no_grad()
@pytest.mark.parametrize("scales", [(1.0,), (0.7, 0.4)])
def test_union(scales):
    """One map and two, in fp64: diffusers' transformer multiplies several tokens at once, and fp32 would round otherwise."""
    c = peers.small(cn.SDXL_UNION_PROMAX)
    ours, theirs = (net.double() for net in twins(c))
    (x, t, context, added, _), peer = peers.inputs(c, batch=2)
    x, context, added = x.double(), context.double(), tuple(a.double() for a in added)
    peer = {"added_cond_kwargs": dict(text_embeds=added[0], time_ids=added[1])}
    kinds = ["canny", "tile"][: len(scales)]
    maps = [torch.rand(1, 3, 128, 128, generator=torch.Generator().manual_seed(i)).double() for i in range(len(scales))]
    numbers = [cn.UNION_KINDS[kind] for kind in kinds]
    shown = ours.shown([cn.Control(ours, m.float(), kind=kind) for m, kind in zip(maps, kinds, strict=True)]).expand(
        2, -1
    )
    assert shown.sum() == 2 * len(kinds)
    down, mid = theirs(
        x,
        t,
        context,
        [m.expand(2, -1, -1, -1) for m in maps],
        shown.double(),
        numbers,
        list(scales),
        return_dict=False,
        **peer,
    )
    shifts = ours.time_shifts(ours.embed_time(t, added, shown))
    inside = scales if len(scales) > 1 else (1.0,)  # a map alone is scaled by its residuals
    hint = sum(ours.embed_hint(m, kind, scale) for m, kind, scale in zip(maps, kinds, inside, strict=True))
    mine = ours.step(x, shifts, ours.keys_values(context), hint)
    assert worst(mine, [*down, mid]) < 1e-6 * max(r.abs().max() for r in mine)  # sinusoids are fp32 in both
    without = ours.step(x, shifts, ours.keys_values(context), torch.zeros_like(hint))
    assert worst(mine, without) > 1e-2


@torch.no_grad()
@pytest.mark.parametrize("name", ADAPTERS)
def test_t2i_adapter_at_full_size(name):
    c = ADAPTERS[name]
    ours, theirs = twins(c)
    pixels = torch.rand(1, c.hint_channels, 96, 160, generator=torch.Generator().manual_seed(1))
    assert worst(ours(pixels), theirs(pixels)) == 0
    with pytest.raises(ConfigError, match="expected multiples of"):
        ours(pixels[:, :, :-4])


@torch.no_grad()
@pytest.mark.parametrize("config", [unet.SD15, unet.SD21_V, unet.SDXL], ids=["SD 1.5", "SD 2.1", "SDXL"])
def test_unet_adds_features_and_residuals_where_diffusers_does(config):
    c = peers.small(config)
    ours, theirs = peers.twins(c)
    (x, t, context, added, labels), peer = peers.inputs(c, batch=2)
    g = torch.Generator().manual_seed(2)
    _, skips = ours.down(
        ours.conv_in(x), iter(ours.time_shifts(ours.embed_time(t, added))), iter(ours.keys_values(context))
    )
    sides = (8, 8, 4, 4) if config.added_dim else (16, 8, 4, 2)
    widths = (*c.channels, c.channels[-1])[:4]
    features = [torch.randn(2, w, s, s, generator=g) for w, s in zip(widths, sides, strict=True)]
    residuals = [torch.randn(s.shape, generator=g) for s in skips]
    residuals.append(torch.randn(skips[-1].shape, generator=g))
    for said, seen in ((residuals, None), (None, features), (residuals, features)):
        mine = ours(x, t, context, added, labels, residuals=said, features=seen)
        kw = (
            {}
            if said is None
            else dict(down_block_additional_residuals=said[:-1], mid_block_additional_residual=said[-1])
        )
        kw |= {} if seen is None else dict(down_intrablock_additional_residuals=[f.clone() for f in seen])
        assert worst([mine], [theirs(x, t, context, **peer, **kw).sample]) == 0
        assert worst([mine], [ours(x, t, context, added, labels)]) > 0.1


@torch.no_grad()
def test_a_controlnet_made_of_a_unet_changes_nothing_at_first():
    c = peers.small(unet.SDXL)
    model, _ = peers.twins(c)
    net = cn.ControlNet.from_unet(model)
    (x, t, context, added, _), _ = peers.inputs(c, batch=1)
    residuals = net(x, t, context, torch.rand(1, 3, 128, 128), added)
    assert all(not r.any() for r in residuals)
    assert torch.equal(model(x, t, context, added, residuals=residuals), model(x, t, context, added))
    assert (
        net.embed_hint(torch.rand(1, 3, 128, 128)).abs().max() == 0 and net.conv_in.weight is not model.conv_in.weight
    )
    assert torch.equal(net.conv_in.weight, model.conv_in.weight)


@torch.no_grad()
def test_scales_of_guess_mode_and_rows():
    """Guess mode's scales are diffusers'; a hint of one row serves all rows, and a latent handed in once serves both branches."""
    c = peers.small(cn.SD15_CONTROL)
    ours, theirs = twins(c)
    (x, t, context, _, _), _ = peers.inputs(c, batch=2)
    x, pixels = x[:1], torch.rand(1, 3, 128, 128, generator=torch.Generator().manual_seed(3))
    control = cn.Control(ours, pixels, scale=0.6, guess=True)
    shifts, kv, hint = ours.time_shifts(ours.embed_time(t)), ours.keys_values(context), ours.embed_hint(pixels)
    made = control.weigh(ours.step(x, shifts, kv, hint))
    down, mid = theirs(
        x.expand(2, -1, -1, -1), t, context, pixels, conditioning_scale=0.6, guess_mode=True, return_dict=False
    )
    assert all(r.shape[0] == 2 for r in made)
    assert worst(made, [*down, mid]) < 1e-5  # the first convolution of one row and of two may round otherwise
    assert [control.active(i, 4) for i in range(4)] == [True] * 4
    late = replace(control, start=0.25, end=0.75)
    assert [late.active(i, 4) for i in range(4)] == [False, True, True, False]


@pytest.mark.parametrize(
    "options, says",
    [
        (dict(scale=float("nan")), "scale is nan, expected a finite number"),
        (dict(scale=True), "scale is True"),
        (dict(start=0.6, end=0.5), "expected 0 <= start < end <= 1"),
        (dict(image=torch.zeros(3, 8, 8)), r"image is \[3, 8, 8\], expected a tensor \[b, 3, H, W\]"),
        (dict(image=torch.full((1, 3, 8, 8), 255.0)), "values from 255 to 255, expected 0 to 1"),
        (dict(image=torch.full((1, 3, 8, 8), float("nan"))), "expected 0 to 1"),
        (dict(mask=torch.zeros(1, 3, 8, 8)), "mask is"),
        (dict(kind="canny"), "only a ControlNet Union is told of a kind"),
    ],
)
def test_a_control_that_means_nothing_is_refused(options, says):
    with torch.device("meta"):
        net = cn.ControlNet(peers.small(cn.SD15_CONTROL))
    with pytest.raises(ConfigError, match=says):
        cn.Control(**{"net": net, "image": torch.zeros(1, 3, 8, 8), **options})
    with torch.device("meta"):
        union = cn.ControlNetUnion(peers.small(cn.SDXL_UNION))
    with pytest.raises(ConfigError, match="has to be told which of openpose"):
        cn.Control(union, torch.zeros(1, 3, 8, 8), kind="tile")  # promax's alone


# ---------------------------------------------------------------- files


def pipe_of(family: str, dtype=torch.float32):
    """As much of a pipeline as the loader asks for: a small UNet of the family, with random weights."""
    model, _ = peers.twins(peers.small(UNETS[family]))
    return types.SimpleNamespace(unet=model.to(dtype).requires_grad_(False), family=family)


def net_of(pipe, **own):
    net, _ = twins(cn.of_unet(pipe.unet.config, **own))
    return net


def original(net) -> dict:
    return names.rename(net.state_dict(), names.controlnet_modules(net.config))


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("family", UNETS)
@pytest.mark.parametrize("layout", ["folder", "file", "original", "bare original"])
def test_layouts(tmp_path, family, layout):
    pipe = pipe_of(family)
    net = net_of(pipe)
    path, tensors = tmp_path / "control.safetensors", net.state_dict()
    if layout == "folder":
        controlnet_of(net.config).save_pretrained(tmp_path / "net")
        path = tmp_path / "net"
        files.write(path / "diffusion_pytorch_model.safetensors", tensors)
    else:
        prefix = "control_model." if layout == "original" else ""
        own = original(net) if "original" in layout else tensors
        assert ("zero_convs.0.0.weight" in own) == ("original" in layout)
        files.write(path, {prefix + key: t for key, t in own.items()})
    loaded = controls.load_control(path, pipe)
    assert loaded.config == net.config and same(loaded.state_dict(), tensors)


def test_original_names_are_those_of_the_released_files():
    """By the released code: a stem of convolutions with an activation between two, one exit per block, one behind the middle."""
    with torch.device("meta"):
        tensors = original(cn.ControlNet(cn.SD15_CONTROL))
    widths = [(16, 3), (16, 16), (32, 16), (32, 32), (96, 32), (96, 96), (256, 96), (320, 256)]
    for i, (c_out, c_in) in enumerate(widths):
        assert tensors[f"input_hint_block.{2 * i}.weight"].shape == (c_out, c_in, 3, 3)
    exits = [320] * 4 + [640] * 3 + [1280] * 5
    assert [tensors[f"zero_convs.{i}.0.weight"].shape[0] for i in range(12)] == exits
    blocks = {"input_hint_block", "zero_convs", "middle_block_out", "input_blocks", "middle_block", "time_embed"}
    assert {key.split(".")[0] for key in tensors} == blocks and "middle_block_out.0.bias" in tensors


@pytest.mark.parametrize("kind", ["mid", "small", "union", "shuffle"])
def test_kin_are_told_apart(tmp_path, kind):
    pipe = pipe_of("sdxl")
    own = {
        "mid": dict(depths=(0, 0, 1), hollow=(1,), mid_depth=1), "small": dict(depths=(0, 0, 0), mid_depth=0),
        "union": dict(kinds=6), "shuffle": dict(pooled=True),
    }[kind]  # fmt: skip
    net = net_of(pipe, **own)
    path = tmp_path / f"{kind}.safetensors"
    files.write(path, net.state_dict())
    loaded = controls.load_control(path, pipe)
    assert loaded.config == net.config and type(loaded) is type(net) and same(loaded.state_dict(), net.state_dict())


@pytest.mark.parametrize("merged", [False, True])
def test_difference_is_added_to_the_base(tmp_path, merged):
    """base + delta for each tensor that the base has, rounded once; what is merged into the UNet is no part of the base."""
    pipe = pipe_of("sd1")
    net = net_of(pipe)
    base = {k: t.clone() for k, t in names.unet_to_ldm(pipe.unet.state_dict(), pipe.unet.config).items()}
    file = {f"control_model.{key}": t for key, t in original(net).items()}
    files.write(tmp_path / "delta.safetensors", file | {"difference": torch.zeros(1)})
    if merged:
        lora.attach({"unet": pipe.unet}, style(pipe.unet))
        lora.merge({"unet": pipe.unet})
        assert not torch.equal(names.unet_to_ldm(pipe.unet.state_dict(), pipe.unet.config)[KEY], base[KEY])
    loaded = original(controls.load_control(tmp_path / "delta.safetensors", pipe))
    assert KEY in base and "zero_convs.0.0.weight" not in base
    for key, t in original(net).items():
        assert torch.equal(loaded[key], base[key] + t if key in base else t)


KEY = "input_blocks.1.1.transformer_blocks.0.attn1.to_q.weight"


def style(model, rank: int = 2):
    layer = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    o, n = model.get_submodule(layer).weight.shape
    return lora.Adapter("style", {"unet": {layer: lora.LowRank(torch.randn(rank, n), torch.randn(o, rank))}})


def control_lora(net, base: dict, rank: int = 4, seed: int = 0) -> dict:
    """A Control-LoRA as its makers write one: matrices of the base as .up and .down, everything else as it is."""
    g = torch.Generator().manual_seed(seed)
    file = {"lora_controlnet": torch.zeros(0)}
    for key, t in original(net).items():
        if key in base and t.ndim > 1:
            name = key.removesuffix(".weight")
            file[f"{name}.up"] = torch.randn(t.shape[0], rank, *[1] * (t.ndim - 2), generator=g) * 0.1
            file[f"{name}.down"] = torch.randn(rank, *t.shape[1:], generator=g) * 0.1
        else:
            file[key] = t
    return file


@torch.no_grad()
@pytest.mark.parametrize("family", UNETS)
def test_control_lora_is_the_base_and_a_lora(tmp_path, family):
    """W = W_base + up @ down, and the base's tensors are the UNet's own."""
    pipe = pipe_of(family)
    whole = net_of(pipe)
    base = names.unet_to_ldm(pipe.unet.state_dict(), pipe.unet.config)
    file = control_lora(whole, base)
    files.write(tmp_path / "lora.safetensors", file)
    before = {k: t.clone() for k, t in pipe.unet.state_dict().items()}
    net = controls.load_control(tmp_path / "lora.safetensors", pipe)
    wanted = {}
    for key in original(whole):
        name = key.removesuffix(".weight")
        wanted[key] = file[key] if key in file else (
            base[key] + (file[f"{name}.up"].flatten(1) @ file[f"{name}.down"].flatten(1)).reshape(base[key].shape)
        )  # fmt: skip
    whole.load_state_dict(names.rename(wanted, names.swap(names.controlnet_modules(whole.config))))
    for name, module in net.named_modules():
        if lora.is_attached(module):
            assert module.weight.data_ptr() == pipe.unet.get_submodule(name).weight.data_ptr()
            torch.testing.assert_close(
                lora.effective_weight(module), whole.get_submodule(name).weight, rtol=0, atol=1e-6
            )
    (x, t, context, added, _), _ = peers.inputs(pipe.unet.config)
    pixels = torch.rand(2, 3, 128, 128)
    mine, other = (n.double()(x.double(), t, context.double(), pixels.double(), added) for n in (net, whole))
    assert worst(mine, other) < 1e-5 * max(r.abs().max() for r in mine)
    assert same(pipe.unet.state_dict(), before)


def test_memory_of_a_control_lora_beside_its_base(tmp_path, capsys):
    """At the real widths of SD 1.5 and rank 128, without making the numbers: bytes that are not the UNet's."""
    with torch.device("meta"):
        whole, model = cn.ControlNet(cn.SD15_CONTROL), unet.UNet(unet.SD15)
    base = names.unet_to_ldm(model.state_dict(), unet.SD15)
    held = 0
    for key, t in original(whole).items():
        held += 128 * (t.shape[0] + t.shape[1:].numel()) if key in base and t.ndim > 1 else t.numel()
    full = sum(t.numel() for t in whole.state_dict().values())
    with capsys.disabled():
        print(
            f"\nControl-LoRA of rank 128, SD 1.5: {held * 2e-6:.0f} MB beside its base, ControlNet {full * 2e-6:.0f} MB (fp16)"
        )
    assert held < full / 2
    # and that loading holds no more than that, on small widths
    pipe = pipe_of("sd1")
    small = net_of(pipe)
    file = control_lora(small, names.unet_to_ldm(pipe.unet.state_dict(), pipe.unet.config))
    files.write(tmp_path / "lora.safetensors", file)
    net = controls.load_control(tmp_path / "lora.safetensors", pipe)
    owned = {t.untyped_storage().data_ptr() for t in pipe.unet.state_dict().values()}
    beside = sum(t.numel() for t in (*net.parameters(), *net.buffers()) if t.untyped_storage().data_ptr() not in owned)
    assert beside == sum(t.numel() for t in file.values())


@pytest.mark.parametrize("name", ADAPTERS)
@pytest.mark.parametrize("layout", ["diffusers", "original"])
def test_t2i_adapter_files(tmp_path, name, layout):
    family = "sdxl" if name == "SDXL" else "sd1"
    pipe = pipe_of(family)
    widths = (*pipe.unet.config.channels, pipe.unet.config.channels[-1])[:4]
    net, _ = twins(replace(ADAPTERS[name], channels=widths))
    tensors = net.state_dict()
    if layout == "original":
        tensors = {as_original(key.removeprefix("adapter."), net.config.light): t for key, t in tensors.items()}
    files.write(tmp_path / "adapter.safetensors", tensors)
    loaded = controls.load_control(tmp_path / "adapter.safetensors", pipe)
    assert loaded.config == net.config and same(loaded.state_dict(), net.state_dict())


def as_original(key: str, light: bool) -> str:
    """body.1.resnets.0.block1 -> body.2.block1, of the light kind body.1.body.0.block1; body.1.in_conv -> body.2.in_conv."""
    if light:
        return key.replace("resnets", "body")
    parts = key.split(".")
    if parts[0] != "body":
        return key
    if parts[2] == "in_conv":
        return f"body.{2 * int(parts[1])}.in_conv.{parts[3]}"
    return f"body.{2 * int(parts[1]) + int(parts[3])}.{parts[4]}.{parts[5]}"


BAD = {
    "truncated": (CheckpointError, "truncated"),
    "missing": (CheckpointError, "lacks 1 tensor"),
    "extra": (CheckpointError, "has no place for 1 tensor"),
    "shape": (CheckpointError, "expected"),
    "nan": (CheckpointError, "holds NaN or infinity"),
    "other family": (AdapterError, "is a ControlNet for .*and this model is Stable Diffusion 1.x"),
    "lllite": (AdapterError, "is a ControlNet-LLLite"),
    "lora": (AdapterError, "is a LoRA or one of its kin, expected a ControlNet"),
    "heads": (AdapterError, "heads of attention"),
    "config": (CheckpointError, "act_fn is 'relu'"),
}


@pytest.mark.parametrize("fault", BAD)
def test_bad_files_get_one_line_and_change_nothing(tmp_path, fault):
    pipe = pipe_of("sd1")
    tensors = dict(net_of(pipe_of("sdxl") if fault == "other family" else pipe).state_dict())
    path = tmp_path / "control.safetensors"
    if fault == "missing":
        del tensors["mid_block.resnets.0.norm1.bias"]
    elif fault == "extra":
        tensors["mid_block.surprise.weight"] = torch.zeros(2)
    elif fault == "shape":
        tensors["mid_block.resnets.0.norm1.bias"] = torch.zeros(3)
    elif fault == "nan":
        tensors["mid_block.resnets.0.norm1.bias"] = torch.full((64,), float("nan"))
    elif fault == "lllite":
        tensors = {"lllite_unet_input_blocks_1_1_transformer_blocks_0_attn1_to_q.depth1.0.weight": torch.zeros(1)}
    elif fault == "lora":
        tensors = {"lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight": torch.zeros(4, 4)}
    elif fault in ("heads", "config"):
        told = '"attention_head_dim": 5' if fault == "heads" else '"act_fn": "relu"'
        (tmp_path / "config.json").write_text(f'{{"_class_name": "ControlNetModel", {told}}}')
    files.write(path, tensors)
    if fault == "truncated":
        path.write_bytes(path.read_bytes()[:-100])
    before = {k: t.clone() for k, t in pipe.unet.state_dict().items()}
    error, says = BAD[fault]
    with pytest.raises(SdcoreError, match=says) as caught:
        controls.load_control(path, pipe)
    assert isinstance(caught.value, error) and "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)
    assert same(pipe.unet.state_dict(), before) and not lora.version(pipe.unet)


@pytest.mark.parametrize("fault", ["half a pair", "rank", "nan", "NaN of its own"])
def test_bad_control_loras(tmp_path, fault):
    pipe = pipe_of("sd1")
    file = control_lora(net_of(pipe), names.unet_to_ldm(pipe.unet.state_dict(), pipe.unet.config))
    name = KEY.removesuffix(".weight")
    if fault == "half a pair":
        del file[f"{name}.up"]
    elif fault == "NaN of its own":
        file["zero_convs.0.0.bias"] = file["zero_convs.0.0.bias"] * float("nan")
    else:
        file[f"{name}.up"] = torch.zeros(32, 3) if fault == "rank" else file[f"{name}.up"] * float("nan")
    files.write(tmp_path / "lora.safetensors", file)
    with pytest.raises(
        CheckpointError, match={"half a pair": "one of .up and", "rank": "ranks differ"}.get(fault, "NaN")
    ):
        controls.load_control(tmp_path / "lora.safetensors", pipe)


def test_a_name_that_is_not_known(tmp_path):
    with pytest.raises(CheckpointError, match="no control known here; known are canny-tiny, canny-sd15"):
        controls.resolve("cany")
    with pytest.raises(CheckpointError, match="no such file"):
        controls.resolve(str(tmp_path / "none.safetensors"))


@pytest.mark.parametrize("name", ["SD 1.5", "SDXL small", "SDXL Union"])
def test_inspect_says_what_a_control_is(name):
    """From the names and shapes of the released sizes, which take no memory."""
    with torch.device("meta"):
        tensors = ours_of(NETS[name]).state_dict()
    source = controls.sort_out(controls.Path("net.safetensors"), tensors, {})
    family = detect.FAMILIES["sd1" if name == "SD 1.5" else "sdxl"].title
    assert source.title().startswith("a ControlNet") and family in source.title()
    assert ("Union of 6 kinds" in source.title()) == ("Union" in name)


def test_inspect_a_file(tmp_path):
    net, _ = twins(t2i_adapter.T2IAdapterConfig(layers=1, hint_channels=1, channels=(8, 8, 8, 8)))
    files.write(tmp_path / "adapter.safetensors", net.state_dict())
    report = inspect(tmp_path / "adapter.safetensors")
    assert report.kind == "t2i-adapter" and "shades of grey" in report.what and not report.loads
