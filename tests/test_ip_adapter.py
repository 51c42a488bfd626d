"""IP-Adapters against diffusers' and image encoders against transformers': modules at full official size, files, masks, scales.

Where the same operations run, outputs are bit-equal. `test_unet_with_a_picture` walks block by block, as test_identity.py does.
"""

import json
import types
from dataclasses import replace

import diffusers
import numpy as np
import pytest
import torch
import transformers
from diffusers.image_processor import IPAdapterMaskProcessor
from diffusers.loaders.unet import UNet2DConditionLoadersMixin as Loader
from PIL import Image
from sdcore.weights import detect, files
from sdcore.weights.ip_adapters import load_image_encoder, load_ip_adapter
from sdcore.weights.load import load
from sdcore.weights.report import inspect

from sdcore import clip, ip_adapter, unet
from sdcore.errors import AdapterError, CheckpointError, ConfigError, ImageError, NonFiniteError
from sdcore.ip_adapter import ImagePrompt, IPAdapter, IPAdapterConfig, places
from sdcore.voices import Conditions
from tests import peers
from tests.test_identity import difference, vision_difference
from tests.tiny_models import write_folder

ADAPTERS = {
    "SD 1.5": ip_adapter.IP_SD15,
    "SD 1.5 Plus": ip_adapter.IP_PLUS_SD15,
    "SD 1.5 full face": ip_adapter.IP_FULL_FACE_SD15,
    "SDXL bigG": ip_adapter.IP_SDXL,
    "SDXL ViT-H": ip_adapter.IP_SDXL_H,
    "SDXL Plus ViT-H": ip_adapter.IP_PLUS_SDXL_H,
}
UNETS = {"SD 1.5": unet.SD15, "SD 2": unet.SD2, "SDXL": unet.SDXL}


def made(config: IPAdapterConfig, seed: int = 0) -> IPAdapter:
    """An adapter of random weights."""
    with torch.device("meta"):
        adapter = IPAdapter(config)
    return peers.randomise(adapter, seed).eval()


def embeds_of(config: IPAdapterConfig, pictures: int, patches: int = 257, seed: int = 3) -> torch.Tensor:
    """Random numbers in the place of what an encoder says."""
    shape = (pictures, config.embed) if config.kind == "base" else (pictures, patches, config.embed)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def eye(config: IPAdapterConfig) -> clip.CLIPVision:
    """An image encoder of one layer, as wide as the adapter was trained with."""
    base = config.kind == "base"
    sizes = clip.CLIPVisionConfig(
        width=64 if base else config.embed, layers=1, heads=2, mlp=64, projection=config.embed if base else 64
    )
    with torch.device("meta"):
        encoder = clip.CLIPVision(sizes)
    return peers.randomise(encoder, 9).eval()


def two_tables(adapter: IPAdapter) -> dict[str, dict[str, torch.Tensor]]:
    """The adapter as the released .bin files hold it, which is how diffusers' own converters take it."""
    state = adapter.state_dict()
    return {
        table: {name.removeprefix(f"{table}."): t for name, t in state.items() if name.startswith(f"{table}.")}
        for table in ("image_proj", "ip_adapter")
    }


# ------------------------------------------------------------------------------------------------ full official size


@pytest.mark.parametrize("name", ADAPTERS)
@torch.no_grad()
def test_projection(name):
    """Tokens bit-equal to diffusers' module, into which its own converter loads our names, strictly."""
    config = ADAPTERS[name]
    projection = peers.randomise(torch.nn.ModuleDict({"image_proj": ip_adapter.PROJECTIONS[config.kind](config)}))
    state = {key.removeprefix("image_proj."): t for key, t in projection.state_dict().items()}
    self = types.SimpleNamespace(device="cpu", dtype=torch.float32)
    theirs = Loader._convert_ip_adapter_image_proj_to_diffusers(self, state, low_cpu_mem_usage=False)
    embeds = embeds_of(config, 2)
    tokens = projection["image_proj"](embeds)
    assert tokens.shape == (2, config.tokens, config.unet.context_dim)
    assert difference(tokens, theirs(embeds)) == 0


@pytest.mark.parametrize("name", UNETS)
def test_numbers(name):
    """The number of a place is where diffusers' UNet lists it among all its attentions; the order is that of our UNet."""
    config = UNETS[name]
    with torch.device("meta"):
        theirs, ours = peers.theirs_of(config), unet.UNet(config)
    listed = [key.removesuffix(".processor") for key in theirs.attn_processors]
    assert [listed[place.number] for place in places(config)] == [place.name for place in places(config)]
    assert sorted(place.name for place in places(config)) == sorted(key for key in listed if key.endswith("attn2"))
    run = ours.keys_values(torch.empty(1, 7, config.context_dim, device="meta"))
    assert [place.width for place in places(config)] == [k.shape[-1] for k, _ in run]
    names = {id(module): key for key, module in ours.named_modules()}
    walked = [names[id(block)] for block in ours._in_order(unet.Attention) if block.cross]
    assert walked == [place.name for place in places(config)]


@pytest.mark.parametrize("name", ["SD 1.5", "SD 1.5 Plus"])
def test_unet_with_a_picture(name):
    assert unet_difference(ADAPTERS[name]) == 0


@pytest.mark.check
@pytest.mark.parametrize("name", ["SDXL ViT-H", "SDXL Plus ViT-H", "SDXL bigG"])
def test_unet_with_a_picture_xl(name):
    assert unet_difference(ADAPTERS[name]) == 0


@pytest.mark.check
def test_big_vision():
    assert vision_difference(clip.CLIP_BIGG_VISION) == 0


@torch.no_grad()
def unet_difference(config: IPAdapterConfig) -> float:
    """The UNet of `config` at full size with a picture, ours against diffusers', on a latent of 16 x 16, block by block.

    Each block has random weights that both share, and the input that the block before gave. The second row is the negative one.
    """
    adapter, sizes = made(config), config.unet
    with torch.device("meta"):
        theirs, ours = peers.theirs_of(sizes).eval(), unet.UNet(sizes).eval()
    # The converter asks the UNet for the names of its attentions, in its order, and for its widths: nothing is on meta then.
    processors = Loader._convert_ip_adapter_attn_to_diffusers(theirs, [two_tables(adapter)], low_cpu_mem_usage=False)
    (_, _, context, _, _), _ = peers.inputs(sizes, batch=2)
    g = torch.Generator().manual_seed(5)
    temb = torch.randn(2, sizes.time_dim, generator=g)
    x = torch.randn(2, sizes.channels[0], 16, 16, generator=g)

    adapter.image_encoder = eye(config)
    embeds = embeds_of(config, 1)
    seen = ImagePrompt(adapter, embeds, 0.7).keys_values(2, 1)
    kv = dict(zip([place.name for place in adapter.places], seen, strict=True))
    for processor in processors.values():
        if hasattr(processor, "to_k_ip"):
            processor.scale = [0.7]
    told = (context, [torch.stack([adapter.tokens(adapter.unseen(embeds)), adapter.tokens(embeds)])])

    worst, seeds = 0.0, iter(range(100))

    def both(name: str):
        mine, other = ours.get_submodule(name), theirs.get_submodule(name)
        peers.randomise(other, next(seeds))
        mine.load_state_dict(other.state_dict(), strict=True, assign=True)
        for key, processor in processors.items():
            if key.startswith(f"{name}."):
                theirs.get_submodule(key.removesuffix(".processor")).set_processor(processor)
        shifts = iter([part.shift(temb) for part in mine.modules() if isinstance(part, unet.Resnet)])
        cross = [key for key, part in mine.named_modules() if isinstance(part, unet.Attention) and part.cross]
        text = [mine.get_submodule(key).keys_values(context) for key in cross]
        return mine, other, shifts, iter([(*own, *kv[f"{name}.{key}"]) for key, own in zip(cross, text, strict=True)])

    def release(name: str):
        ours.get_submodule(name).to("meta")
        theirs.get_submodule(name).to("meta")

    skips = [x]
    for i, depth in enumerate(sizes.depths):
        mine, other, shifts, entries = both(f"down_blocks.{i}")
        y, _ = other(hidden_states=x, temb=temb, **({"encoder_hidden_states": told} if depth else {}))
        x, skips = mine(x, skips, shifts, entries)
        worst = max(worst, difference(x, y))
        release(f"down_blocks.{i}")
    mine, other, shifts, entries = both("mid_block")
    y = other(x, temb, encoder_hidden_states=told)
    x = mine(x, shifts, entries)
    worst = max(worst, difference(x, y))
    release("mid_block")
    for i, depth in enumerate(sizes.depths[::-1]):
        mine, other, shifts, entries = both(f"up_blocks.{i}")
        kept = tuple(skips[-len(mine.resnets) :])
        extra = {"encoder_hidden_states": told} if depth else {}
        y = other(hidden_states=x, temb=temb, res_hidden_states_tuple=kept, **extra)
        x, skips = mine(x, skips, shifts, entries)
        worst = max(worst, difference(x, y))
        release(f"up_blocks.{i}")
    return worst


# ------------------------------------------------------------------------------------------------ attention


SMALL = peers.small(unet.SD15)
KINDS = {
    "base": IPAdapterConfig(embed=20, tokens=4),
    "plus": IPAdapterConfig("plus", embed=24, tokens=6, width=40, layers=4, heads=2),
    "full": IPAdapterConfig("full", embed=24, tokens=10),
}


@pytest.fixture(scope="module")
def small():
    return peers.twins(SMALL)[0]


def small_prompt(kind: str = "base", **options) -> ImagePrompt:
    adapter = made(replace(KINDS[kind], unet=SMALL))
    return ImagePrompt(adapter, embeds_of(adapter.config, 1, 10), **options)


def parts(model, rows: int = 2):
    """A latent of one row; shifts; keys and values of `rows` texts."""
    (x, t, context, _, _), _ = peers.inputs(SMALL, batch=rows, tokens=7)
    with torch.no_grad():
        return x[:1], model.time_shifts(model.embed_time(t[:1])), model.keys_values(context)


def beside(kv, *prompts, rows: int = 2, latent=(16, 16)):
    seen = [prompt.keys_values(rows, 1, latent) for prompt in prompts]
    return [sum(entries, ()) for entries in zip(kv, *seen, strict=True)]


@torch.no_grad()
def test_attention_looks_at_pictures_beside_the_text():
    """The formula itself, in fp64: text + sum of weight times picture, before the last projection; queries widened."""
    layer = peers.randomise(unet.Attention(16, 2, 8, False)).double()
    g = torch.Generator().manual_seed(0)
    x, (k, v, k2, v2, k3, v3) = (
        torch.randn(1, 5, 16, generator=g).double(),
        torch.randn(6, 3, 4, 16, generator=g).double(),
    )
    w2, w3 = torch.randn(1, 5, 1, generator=g).double(), torch.full((1, 1, 1), 0.3).double()
    got = layer(x, (k, v, k2, v2, w2, k3, v3, w3))
    q, want = layer.to_q(x), 0
    for keys, values, weight in ((k, v, 1), (k2, v2, w2), (k3, v3, w3)):
        heads = []
        for h in (slice(0, 8), slice(8, 16)):
            scores = (q[..., h] @ keys[..., h].transpose(1, 2) / 8**0.5).softmax(-1)
            heads.append(scores @ values[..., h])
        want = want + weight * torch.cat(heads, -1)
    assert (got - layer.to_out(want)).abs().max() < 1e-12
    assert torch.equal(layer(x, (k, v)), layer.to_out(unet.ops.attention(q.expand(3, -1, -1), k, v, 2)))
    with pytest.raises(ValueError):
        layer(x, (k, v, k2, v2))


@torch.no_grad()
def test_no_weight_no_trace(small):
    """Scale 0 leaves nothing to compute; a weight of 0 leaves the plain prediction, bit for bit."""
    x, shifts, kv = parts(small)
    plain = small.step(x, shifts, kv)
    assert all(entry == () for entry in small_prompt(scale=0).keys_values(2, 1))
    seen = beside(kv, small_prompt())
    assert (small.step(x, shifts, seen) - plain).abs().max() > 0.01
    zero = [(*entry[:4], torch.zeros(1, 1, 1)) for entry in seen]
    assert torch.equal(small.step(x, shifts, zero), plain)


@torch.no_grad()
def test_negative_branch_sees_nothing(small):
    """Of two rows the first sees no picture: zeros for the base kind; alone, the last sees what it sees in the batch."""
    x, shifts, kv = parts(small)
    prompt = small_prompt()
    both = prompt.keys_values(2, 1)
    nothing = prompt.adapter.keys_values(prompt.adapter.tokens(torch.zeros(1, 20)))
    alone = prompt.keys_values(1, 1)
    for (k, v, w), (k0, v0), (k1, v1, _) in zip(both, nothing, alone, strict=True):
        assert w.shape == (1, 1, 1) and w.item() == 1
        for mine, zero, one in ((k, k0, k1), (v, v0, v1)):
            torch.testing.assert_close(mine, torch.cat([zero, one]), rtol=1e-5, atol=1e-6)
    assert [len(k) for k, _, _ in prompt.keys_values(6, 2)] == [6] * len(both)


def test_traces_as_a_whole():
    """One graph with pictures too: `torch.compile(fullgraph=True)` and `torch.export` give what eager gives."""
    smaller = replace(
        SMALL, channels=SMALL.channels[:2], depths=(1, 0), heads=SMALL.heads[:2], cross_only=(False, False), layers=1
    )
    small = peers.twins(smaller)[0]  # tracing takes its time, a level more or less says nothing new

    def prompt(**options) -> ImagePrompt:
        adapter = made(replace(KINDS["base"], unet=smaller))
        return ImagePrompt(adapter, embeds_of(adapter.config, 1), **options)

    class Step(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = small

        def forward(self, x, shifts, kv):
            return self.model.step(x, shifts, kv)

    x, shifts, kv = parts(small)
    seen = beside(kv, prompt(), prompt(mask=torch.ones(1, 1, 128, 128)))
    with torch.no_grad():
        want = small.step(x, shifts, seen)
        torch._dynamo.reset()
        assert torch.equal(torch.compile(small.step, fullgraph=True, backend="eager")(x, shifts, seen), want)
        assert torch.equal(torch.export.export(Step(), (x, shifts, seen)).module()(x, shifts, seen), want)


# ------------------------------------------------------------------------------------------------ scales and masks


@torch.no_grad()
def test_scales_by_part():
    """The longest name decides, what is not named has 0; names end at dots."""
    style = {"up_blocks.1": 0.5, "up_blocks.1.attentions.1": 1.0, "mid_block": 0.25}
    prompt = small_prompt(scale=style)
    weights = {
        place.name: entry[2].item() if entry else 0
        for place, entry in zip(prompt.adapter.places, prompt.keys_values(1, 1), strict=True)
    }
    for name, weight in weights.items():
        up = 1.0 if name.startswith("up_blocks.1.attentions.1.") else 0.5 if name.startswith("up_blocks.1.") else 0
        assert weight == (0.25 if name.startswith("mid_block.") else up), name
    assert set(weights.values()) == {0, 0.25, 0.5, 1.0}
    assert not ip_adapter.within("up_blocks.10.attentions.0", "up_blocks.1")


@pytest.mark.parametrize("latent", [(16, 16), (8, 24), (16, 8)])
@torch.no_grad()
def test_mask(latent):
    """Weights by place are those of diffusers' processor, at every level."""
    g = torch.Generator().manual_seed(0)
    mask = (torch.nn.functional.interpolate(torch.rand(1, 1, 3, 3, generator=g), [8 * s for s in latent]) > 0.5).float()
    prompt = small_prompt(scale=0.5, mask=mask)
    for place, (k, _, weight) in zip(prompt.adapter.places, prompt.keys_values(2, 1, latent), strict=True):
        h, w = latent[0] // 2**place.level, latent[1] // 2**place.level
        theirs = IPAdapterMaskProcessor.downsample(mask[:, 0], 2, h * w, k.shape[-1])
        assert weight.shape == (1, h * w, 1)
        torch.testing.assert_close(weight.expand(2, -1, k.shape[-1]), 0.5 * theirs, rtol=0, atol=1e-6)
    assert 0 < mask.mean() < 1


@torch.no_grad()
def test_mask_on_odd_sizes(small):
    """Halving rounds up in the UNet, so it does in the mask: 9 x 13 runs, and outside the mask's half nothing is added."""
    (x, t, context, _, _), _ = peers.inputs(SMALL, (9, 13), batch=1, tokens=7)
    mask = torch.zeros(1, 1, 72, 104)
    mask[..., 52:] = 1
    kv, shifts = small.keys_values(context), small.time_shifts(small.embed_time(t))
    seen = beside(kv, small_prompt(mask=mask), rows=1, latent=(9, 13))
    assert small.step(x, shifts, seen).shape == x.shape
    first = seen[0][4].view(9, 13)
    assert first[:, :5].abs().max() == 0 and (first[:, 8:] == 1).all()


BAD = {
    "NaN scale": (dict(scale=float("nan")), ConfigError, "scale: .*nan for all parts"),
    "unknown part": (dict(scale={"up_blocks.7": 1.0}), ConfigError, "scale: up_blocks.7 is no part"),
    "infinite part": (dict(scale={"mid_block": float("inf")}), ConfigError, "scale: .*inf for mid_block"),
    "image of one axis": (dict(image=torch.zeros(5)), ImageError, r"image: expected .* found \[5\]"),
    "embeds of another width": (
        dict(image=torch.zeros(1, 21)),
        ImageError,
        r"embeds \[pictures, 20\], found \[1, 21\]",
    ),
    "no pictures": (dict(image=torch.zeros(0, 3, 8, 8)), ImageError, "image: expected"),
    "black mask": (dict(mask=torch.zeros(1, 1, 8, 8)), ImageError, "mask: all black"),
    "mask of bytes": (dict(mask=torch.full((1, 1, 8, 8), 255)), ImageError, "mask: expected numbers from 0 to 1"),
    "NaN mask": (dict(mask=torch.full((1, 1, 8, 8), float("nan"))), ImageError, "mask: expected numbers from 0 to 1"),
    "two masks": (dict(mask=torch.ones(2, 1, 8, 8)), ImageError, "mask: expected"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_prompts_are_one_line(case):
    options, error, message = BAD[case]
    good = small_prompt()
    with pytest.raises(error, match=message) as raised:
        ImagePrompt(**{"adapter": good.adapter, "image": good.image} | options)
    assert "\n" not in str(raised.value)


def test_bad_uses_are_one_line():
    masked = small_prompt(mask=torch.ones(1, 1, 64, 64))
    with pytest.raises(ImageError, match="64x64 has not the proportions of what is drawn .24x16."):
        masked.keys_values(2, 1, (16, 24))
    with pytest.raises(ConfigError, match="latent"):
        masked.keys_values(2, 1)
    with pytest.raises(AdapterError, match="no image encoder"):
        small_prompt("plus").keys_values(2, 1)  # embeds are given, but not what the negative branch sees
    with pytest.raises(AdapterError, match="no image encoder"):
        ImagePrompt(masked.adapter, torch.zeros(1, 3, 8, 8)).keys_values(2, 1)
    with pytest.raises(AdapterError, match="text width 48 and 16 attentions to it; this one has 48 and"):
        masked.adapter.check(peers.small(unet.SDXL))
    masked.adapter.check(SMALL)


# ------------------------------------------------------------------------------------------------ pictures as CLIP sees them


def photo(width: int, height: int, seed: int = 0) -> Image.Image:
    """A smooth random picture with noise on one half."""
    g = np.random.default_rng(seed)
    small = Image.fromarray(g.integers(0, 256, (9, 7, 3), dtype=np.uint8))
    levels = np.array(small.resize((width, height), Image.Resampling.BICUBIC))
    levels[: height // 2] = g.integers(0, 256, (height // 2, width, 3))
    return Image.fromarray(levels)


def pixels_of(picture: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None] / 255


@pytest.mark.parametrize(
    "size", [(224, 224), (512, 512), (640, 480), (97, 181), (64, 100), (1021, 333), (3, 40), (1, 1)]
)
def test_preparation(size):
    """CLIPImageProcessor's numbers: at most one value in 10,000 is off, by one level of 255 (a tie in Pillow's rounding)."""
    picture = photo(*size)
    processor = transformers.CLIPImageProcessor()
    want = torch.as_tensor(np.array(processor(picture)["pixel_values"]))
    got = clip.prepare_pixels(pixels_of(picture), 224)
    assert got.shape == want.shape == (1, 3, 224, 224) and got.dtype == torch.float32
    levels = (got - want).abs() * torch.tensor(clip.DEVIATION)[:, None, None] * 255
    assert levels.max() < 1.01 and (levels > 1e-3).float().mean() <= 1e-4


@pytest.mark.parametrize("pixels", [torch.zeros(3, 8, 8), torch.zeros(1, 4, 8, 8), torch.full((1, 3, 8, 8), 2.0),
                                    torch.full((1, 3, 8, 8), float("nan")), torch.zeros(1, 3, 1, 50_000),
                                    torch.zeros(1, 3, 0, 8)])  # fmt: skip
def test_preparation_refuses(pixels):
    with pytest.raises(ImageError, match="pixels: ") as raised:
        clip.prepare_pixels(pixels, 224)
    assert "\n" not in str(raised.value)


# ------------------------------------------------------------------------------------------------ files


def write_encoder(folder, width: int = 24, projection: int = 20, seed: int = 7):
    """A small CLIPVisionModelWithProjection as transformers writes it."""
    config = transformers.CLIPVisionConfig(
        hidden_size=width, intermediate_size=48, num_hidden_layers=3, num_attention_heads=2, image_size=28, patch_size=14,
        projection_dim=projection, hidden_act="gelu",
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        transformers.CLIPVisionModelWithProjection(config).save_pretrained(folder)
    return folder


class Released:
    """A small model of a family, and for every kind an adapter and its encoder in the released layout."""

    def __init__(self, path, family: str):
        self.path, self.folder = path, write_folder(path / "model", family)
        self.pipe = load(self.folder, "cpu", torch.float32)
        write_encoder(path / "models" / "image_encoder")
        for kind, config in KINDS.items():
            adapter = made(replace(config, tokens=5 if kind == "full" else config.tokens, unet=self.pipe.unet.config))
            state = adapter.state_dict()
            files.write(path / "models" / f"{kind}.safetensors", state)
            torch.save(two_tables(adapter), path / "models" / f"{kind}.bin")

    @property
    def encoder(self):
        return self.path / "models" / "image_encoder"

    def ours(self, name: str, image_encoder="released") -> IPAdapter:
        encoder = self.encoder if image_encoder == "released" else image_encoder
        return load_ip_adapter(self.path / "models" / name, self.pipe, image_encoder=encoder)

    def theirs(self, name: str):
        pipe = diffusers.DiffusionPipeline.from_pretrained(self.folder)
        pipe.load_ip_adapter(str(self.path), subfolder="models", weight_name=name)
        return pipe


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    found = {}

    def of(family: str) -> Released:
        if family not in found:
            found[family] = Released(tmp_path_factory.mktemp(family), family)
        return found[family]

    return of


@torch.no_grad()
def predictions(model: Released, theirs, prompt: ImagePrompt, pictures, mask=None):
    """Ours and theirs of the same latent, text and pictures, under guidance."""
    config = model.pipe.unet.config
    g = torch.Generator().manual_seed(2)
    x, context = torch.randn(1, 4, 8, 8, generator=g), torch.randn(2, 7, config.context_dim, generator=g)
    t, extra, added = torch.tensor([500]), {}, None
    if config.added_dim:
        pooled = torch.randn(2, config.added_dim - 6 * config.added_time_dim, generator=g)
        added = (pooled, torch.tensor([[64.0, 64, 0, 0, 64, 64]] * 2))
        extra = {"text_embeds": added[0], "time_ids": added[1]}
    seen = theirs.prepare_ip_adapter_image_embeds([pictures], None, "cpu", 1, True)
    want = theirs.unet(
        torch.cat([x, x]), t, context, added_cond_kwargs={**extra, "image_embeds": seen},
        cross_attention_kwargs=None if mask is None else {"ip_adapter_masks": [mask]},
    ).sample  # fmt: skip
    shifts = model.pipe.unet.time_shifts(model.pipe.unet.embed_time(t.expand(2), added))
    kv = beside(model.pipe.unet.keys_values(context), prompt, latent=(8, 8))
    return model.pipe.unet.step(x, shifts, kv), want


def close(got: torch.Tensor, want: torch.Tensor):
    """Equal but for the order of sums: 1e-5 of the largest value, some 100 roundings of fp32."""
    assert (got - want).abs().max() <= 1e-5 * want.abs().max()


@pytest.mark.parametrize("family,name", [("sd1", "base.safetensors"), ("sd1", "plus.bin"), ("sd1", "full.safetensors"),
                                         ("sd2-base", "base.bin"), ("sdxl", "base.safetensors"),
                                         ("sdxl", "plus.safetensors")])  # fmt: skip
def test_file_loads_as_in_diffusers(released, family, name):
    """Picture, encoder, projection, numbering, scale: their own loader and preparation against ours, from the same files."""
    model, picture = released(family), photo(40, 50)
    theirs = model.theirs(name)
    theirs.set_ip_adapter_scale(0.6)
    got, want = predictions(model, theirs, ImagePrompt(model.ours(name), pixels_of(picture), 0.6), picture)
    close(got, want)
    without, _ = predictions(model, theirs, ImagePrompt(model.ours(name), pixels_of(picture), 0), picture)
    assert (got - without).abs().max() > 0.01 * want.abs().max()


def test_several_pictures_scales_and_mask_as_in_diffusers(released):
    model, pictures = released("sd1"), [photo(40, 50), photo(40, 50, 1)]
    theirs, adapter = model.theirs("plus.safetensors"), model.ours("plus.safetensors")
    pixels = torch.cat([pixels_of(picture) for picture in pictures])
    theirs.set_ip_adapter_scale({"down": {"block_2": [0.0, 0.8]}, "up": {"block_1": [0.0, 0.5, 1.0]}})
    scale = {"down_blocks.2.attentions.1": 0.8, "up_blocks.1.attentions.1": 0.5, "up_blocks.1.attentions.2": 1.0}
    close(*predictions(model, theirs, ImagePrompt(adapter, pixels, scale), pictures))
    theirs.set_ip_adapter_scale(0.7)
    mask = torch.zeros(1, 1, 64, 64)
    mask[..., :32, :40] = 1
    prompt = ImagePrompt(adapter, pixels[:1], 0.7, mask)
    close(*predictions(model, theirs, prompt, pictures[:1], IPAdapterMaskProcessor().preprocess(mask)))


def test_loading_leaves_the_pipeline_alone(released):
    model = released("sd1")
    before = {name: t.clone() for name, t in model.pipe.unet.state_dict().items()}
    adapter = model.ours("base.safetensors")
    assert model.ours("plus.safetensors", adapter.image_encoder).image_encoder is adapter.image_encoder
    assert model.ours("base.bin", None).image_encoder is None
    after = model.pipe.unet.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert not any(p.requires_grad for p in adapter.parameters())


def test_variations(released, tmp_path):
    """What an image-variations UNet is told is what diffusers' pipeline of that name tells it; the UNet takes it."""
    model, picture = released("sd1"), photo(40, 50)
    encoder = load_image_encoder(write_encoder(tmp_path, projection=model.pipe.unet.config.context_dim), "cpu")
    tower = transformers.CLIPVisionModelWithProjection.from_pretrained(tmp_path)
    self = types.SimpleNamespace(
        image_encoder=tower, feature_extractor=transformers.CLIPImageProcessor(size=28, crop_size=28)
    )
    with torch.no_grad():
        want = diffusers.StableDiffusionImageVariationPipeline._encode_image(self, picture, "cpu", 1, True)
        context, nothing = clip.variation_context(encoder, pixels_of(picture))
        told = torch.cat([nothing, context])
        torch.testing.assert_close(told, want, rtol=1e-5, atol=1e-6)
        x, t = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1)), torch.tensor([10, 10])
        theirs = diffusers.UNet2DConditionModel.from_pretrained(model.folder / "unet")
        assert difference(model.pipe.unet(x, t, told), theirs(x, t, told).sample) == 0


def test_variations_from_picture_to_pixels(released, tmp_path):
    """The public call, told the one vector in the place of a text, draws what diffusers' pipeline of that name draws."""
    model, picture = released("sd1"), photo(40, 50)
    encoder = load_image_encoder(write_encoder(tmp_path, projection=model.pipe.unet.config.context_dim), "cpu")
    theirs = diffusers.StableDiffusionImageVariationPipeline(
        vae=diffusers.AutoencoderKL.from_pretrained(model.folder / "vae"),
        image_encoder=transformers.CLIPVisionModelWithProjection.from_pretrained(tmp_path),
        unet=diffusers.UNet2DConditionModel.from_pretrained(model.folder / "unet"),
        scheduler=diffusers.DDIMScheduler.from_pretrained(model.folder / "scheduler", clip_sample=False),
        safety_checker=None, feature_extractor=transformers.CLIPImageProcessor(size=28, crop_size=28),
        requires_safety_checker=False,
    )  # fmt: skip
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    options = dict(height=64, width=64, guidance_scale=3.0, num_inference_steps=4, latents=noise, output_type="pt")
    want = theirs(picture, **options).images
    told, nothing = (Conditions(each, None) for each in clip.variation_context(encoder, pixels_of(picture)))
    got = model.pipe(told, nothing, steps=4, guidance=3.0, sampler="ddim", noise=noise).pixels
    assert got.shape == want.shape and difference((got / 2 + 0.5).clamp(0, 1), want) <= 1 / 255


# --- image encoders


def test_image_encoder_layouts(tmp_path):
    """The released folder, and that of a complete CLIP, whose text tower is left out; both give transformers' numbers."""
    folder = write_encoder(tmp_path / "eye")
    tower = transformers.CLIPVisionModelWithProjection.from_pretrained(folder)
    pixels = torch.randn(2, 3, 28, 28, generator=torch.Generator().manual_seed(0))
    whole = transformers.CLIPModel(
        transformers.CLIPConfig(
            vision_config=tower.config.to_dict(),
            text_config=dict(
                hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=9
            ),
            projection_dim=20,
        )
    )
    whole.vision_model.load_state_dict(tower.vision_model.state_dict())
    whole.visual_projection.load_state_dict(tower.visual_projection.state_dict())
    whole.save_pretrained(tmp_path / "whole")
    with torch.no_grad():
        want = tower(pixels).image_embeds
        for name in ("eye", "whole"):
            encoder = load_image_encoder(tmp_path / name, "cpu", torch.float32)
            assert difference(encoder(pixels).embedding, want) == 0
            assert encoder.config == clip.CLIPVisionConfig(24, 3, 2, 48, encoder.config.activation, 28, 14, 20)


def test_image_encoder_alone_has_the_released_sizes(tmp_path):
    """A file without config: the tower of its width is chosen, and a file that is short of a layer is refused by name."""
    with torch.device("meta"):
        shapes = clip.CLIPVision(clip.CLIP_L_VISION).state_dict()
    short = {name: t for name, t in shapes.items() if ".layers." not in name}
    files.write(tmp_path / "l.safetensors", {name: torch.zeros(t.shape) for name, t in short.items()})
    with pytest.raises(CheckpointError, match="image_encoder lacks 384 tensors") as raised:
        load_image_encoder(tmp_path / "l.safetensors", "cpu")
    assert "\n" not in str(raised.value)
    files.write(tmp_path / "x.safetensors", {"vision_model.embeddings.class_embedding": torch.zeros(12)})
    with pytest.raises(CheckpointError, match="a vision tower of width 12, expected .* 1024, 1280, 1664"):
        load_image_encoder(tmp_path / "x.safetensors", "cpu")


# --- what does not fit


def faulty(state: dict[str, torch.Tensor], case: str) -> dict[str, torch.Tensor]:
    if case == "NaN":
        state["ip_adapter.5.to_k_ip.weight"][0, 0] = float("nan")
    elif case == "an attention is missing":
        state = {name: t for name, t in state.items() if not name.startswith("ip_adapter.7.")}
    elif case == "values are missing":
        del state["ip_adapter.7.to_v_ip.weight"]
    elif case == "norm is missing":
        del state["image_proj.norm.weight"]
    elif case == "one tensor too many":
        state["image_proj.more.weight"] = torch.zeros(3)
    elif case == "FaceID":
        state |= {
            "image_proj.proj.0.weight": torch.zeros(8, 512),
            "ip_adapter.0.to_k_lora.down.weight": torch.zeros(4, 8),
        }
    elif case == "FaceID Plus":
        state["image_proj.perceiver_resampler.proj_in.weight"] = torch.zeros(8, 8)
    elif case == "unknown kind":
        state = {name: t for name, t in state.items() if not name.startswith("image_proj.")} | {
            "image_proj.x": torch.zeros(2)
        }
    elif case == "a vector for a matrix":
        state["image_proj.proj.weight"] = torch.zeros(80)
    elif case == "a LoRA":
        state = {"lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight": torch.zeros(4, 8)}
    return state


CASES = {
    "NaN": (NonFiniteError, "ip_adapter tensor ip_adapter.5.to_k_ip.weight holds NaN"),
    "an attention is missing": (AdapterError, "layers for 15 attentions.; this sd1 model has 16"),
    "values are missing": (CheckpointError, "ip_adapter lacks 1 tensor .ip_adapter.7.to_v_ip.weight."),
    "norm is missing": (CheckpointError, "ip_adapter lacks 1 tensor .image_proj.norm.weight."),
    "one tensor too many": (CheckpointError, "ip_adapter has no place for 1 tensor .image_proj.more.weight."),
    "FaceID": (AdapterError, "is an IP-Adapter FaceID, .* not supported"),
    "FaceID Plus": (AdapterError, "is an IP-Adapter FaceID, .* not supported"),
    "unknown kind": (AdapterError, "an IP-Adapter of no kind that is known here"),
    "a vector for a matrix": (AdapterError, "image_proj.proj.weight is missing, or has no 2 axes"),
    "a LoRA": (AdapterError, "is a LoRA or one of its kin, expected an IP-Adapter"),
}


@pytest.mark.parametrize("case", CASES)
def test_bad_files_are_one_line(released, tmp_path, case):
    model, (error, message) = released("sd1"), CASES[case]
    state = {name: t.clone() for name, t in model.ours("base.safetensors", None).state_dict().items()}
    path = tmp_path / "bad.safetensors"
    files.write(path, faulty(state, case))
    with pytest.raises(error, match=message) as raised:
        load_ip_adapter(path, model.pipe)
    assert "\n" not in str(raised.value) and str(path) in str(raised.value)


def test_wrong_family_and_wrong_encoder(released, tmp_path):
    sd1, sdxl = released("sd1"), released("sdxl")
    with pytest.raises(AdapterError, match="this sdxl model has .* that look at a text of width 96"):
        load_ip_adapter(sd1.path / "models" / "base.safetensors", sdxl.pipe)
    other = write_encoder(tmp_path / "other", width=32, projection=16)
    with pytest.raises(AdapterError, match="sees pictures as 20 numbers, this image encoder gives 16;"):
        sd1.ours("base.safetensors", other)
    with pytest.raises(AdapterError, match="sees pictures as 24 numbers, this image encoder gives 32;"):
        sd1.ours("plus.safetensors", other)
    with pytest.raises(CheckpointError, match="no such file"):
        sd1.ours("none.safetensors")
    (tmp_path / "cut.safetensors").write_bytes((sd1.path / "models" / "base.safetensors").read_bytes()[:-9])
    with pytest.raises(CheckpointError, match="truncated"):
        load_ip_adapter(tmp_path / "cut.safetensors", sd1.pipe)


SEES = {
    "SD 1.5": "an IP-Adapter for Stable Diffusion 1.x, which sees the whole picture as 1024 numbers",
    "SD 1.5 full face": "an IP-Adapter (full face) for Stable Diffusion 1.x, which sees every patch as 1280 numbers",
    "SDXL Plus ViT-H": "an IP-Adapter Plus for Stable Diffusion XL base, which sees every patch as 1280 numbers",
}


def test_inspect_says_what_it_is(released, tmp_path):
    """Kind, family and what it is shown, from shapes alone."""
    for name, sees in SEES.items():
        with torch.device("meta"):
            assert detect.ip_adapter_title(IPAdapter(ADAPTERS[name]).state_dict()) == sees
    report = inspect(released("sd1").path / "models" / "plus.bin")
    assert report.kind == "ip-adapter" and json.loads(report.to_json())["loads"] is False
    assert "an IP-Adapter Plus for a UNet that is not known here, which sees every patch as 24" in report.to_text()
    files.write(tmp_path / "x.safetensors", {"image_proj.perceiver_resampler.proj_in.weight": torch.zeros(2, 2)})
    assert "IP-Adapter FaceID" in inspect(tmp_path / "x.safetensors").what
