"""Adapter files: every format gives the numbers that its own writer means, and what does not fit is named and refused."""

import copy
import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from sdcore.weights import adapter_names as an
from sdcore.weights import adapters, detect, files, report

from sdcore import changes, lora
from sdcore.cli import main
from sdcore.errors import AdapterError, CheckpointError, ConfigError
from tests import adapter_files as af

# PEFT says which patterns a part of the model has no use for.
pytestmark = pytest.mark.filterwarnings("ignore:The following (alpha|rank)_pattern keys")

FORMATS = [
    *((format, family) for format in (*af.LYCORIS, *af.RULED, *af.PEFT) for family in ("sd1", "sdxl")),
    *((format, "sd1") for format in (*af.ONLY_SD1, *af.FOLDERS)),
    ("kohya", "sd2-base"),
    ("peft", "sd2-base"),
]


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A file of each format and family, made when first asked for."""
    made = {}

    def get(format, family):
        if (format, family) not in made:
            folder = tmp_path_factory.mktemp(f"{format}-{family}")
            made[format, family] = af.write(format, folder / "adapter.safetensors", family)
        return made[format, family]

    return get


def weights_of(family, where):
    module = af.parts_of(family)[where[0]].get_submodule(where[1])
    return module.weight.detach(), None if module.bias is None else module.bias.detach()


def flat(adapter):
    return {(part, module): change for part, own in adapter.parts.items() for module, change in own.items()}


# ---------------------------------------------------------------- the numbers


@pytest.mark.parametrize(("format", "family"), FORMATS)
def test_every_format_means_what_its_writer_means(format, family, written):
    """Each touched weight and bias changes by what the writer says, to 1e-6; nothing else is touched, nothing left out."""
    file = written(format, family)
    adapter, loaded = adapters.read_adapter(file.path, af.pipe_of(family))
    found_changes = flat(adapter)
    assert found_changes.keys() == file.deltas.keys()
    assert loaded.fits and loaded.matched == len(file.deltas)
    for where, (delta, bias) in file.deltas.items():
        weight, own_bias = weights_of(family, where)
        change = found_changes[where]
        found, found_bias = change.delta(weight), change.bias_delta(own_bias)
        assert found.shape == weight.shape
        assert delta.abs().max() > 1e-4, "the writer's change is nothing"
        assert (found - delta).abs().max() <= 1e-6 * max(1, delta.abs().max()), where
        assert (bias is None) == (found_bias is None), where
        if bias is not None:
            assert (found_bias - bias).abs().max() <= 1e-6 * max(1, bias.abs().max()), where


@pytest.mark.parametrize(
    ("format", "family"), [("kohya", "sdxl"), ("norm", "sdxl"), ("peft-dora", "sd1"), ("peft-bias", "sd1")]
)
def test_attached_it_is_the_weight_that_acts(format, family, written):
    """And it comes off without trace."""
    pipe, file = af.pipe_of(family), written(format, family)
    before = {name: t.clone() for name, t in pipe.unet.state_dict().items()}
    lora.attach(pipe, adapters.read_adapter(file.path, pipe)[0])
    for (part, name), (delta, _) in file.deltas.items():
        module = af.parts_of(family)[part].get_submodule(name)
        assert (lora.effective_weight(module) - (module.weight.detach() + delta)).abs().max() <= 2e-6, name
    lora.detach(pipe)
    assert all(torch.equal(t, before[name]) for name, t in pipe.unet.state_dict().items())


def test_touched_modules_are_those_of_official_files():
    """An XL LoRA of kohya's touches 722 modules of the UNet, one of 1.x 192; each name is found in its spelling."""
    for family, count, prefixes in (
        ("sdxl", 722, {"lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q", "lora_unet_middle_block_1_proj_in",
                       "lora_unet_output_blocks_0_1_transformer_blocks_9_ff_net_0_proj", "lora_unet_input_blocks_3_0_op",
                       "lora_unet_output_blocks_2_2_conv", "lora_unet_input_blocks_4_0_skip_connection",
                       "lora_unet_label_emb_0_0",
                       "lora_unet_input_blocks_1_0_emb_layers_1", "lora_unet_input_blocks_1_0_in_layers_2", "lora_unet_out_2",
                       "lora_unet_middle_block_2_out_layers_3", "lora_unet_time_embed_2",
                       "lora_te1_text_model_encoder_layers_11_mlp_fc2",
                       "lora_te2_text_model_encoder_layers_31_self_attn_out_proj", "lora_te2_text_projection",
                       "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q"}),
        ("sd1", 192, {"lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_out_0", "lora_unet_conv_in",
                      "lora_unet_up_blocks_3_attentions_2_transformer_blocks_0_ff_net_2",
                      "lora_unet_mid_block_attentions_0_proj_in",
                      "lora_unet_down_blocks_1_resnets_0_conv_shortcut", "lora_unet_down_blocks_0_downsamplers_0_conv",
                      "lora_unet_down_blocks_0_resnets_0_time_emb_proj", "lora_unet_time_embedding_linear_1",
                      "lora_te_text_model_encoder_layers_0_self_attn_q_proj",
                      "down_blocks.0.attentions.0.transformer_blocks.0.attn2.processor.to_out",
                      "unet.up_blocks.1.attentions.2.transformer_blocks.0.attn1.processor.to_k"}),
    ):  # fmt: skip
        target = adapters.released(family)
        in_transformers = [n for n, (w, _) in target.weights["unet"].items() if ".attentions." in n and w.ndim > 1]
        assert len(in_transformers) == count
        assert prefixes <= set(target.places)


def test_a_path_that_means_two_modules_is_refused():
    with pytest.raises(ValueError, match="names both"):
        an.places({"unet": ["a.b", "a_b"]}, af.CONFIGS["sd1"]["unet"])


# Not "peft-patterns" as kohya: where alphas differ, diffusers 0.42 drops those of a kohya file (its pattern matches nothing).
@pytest.mark.parametrize(("format", "layout"), [("peft", "kohya"), ("peft-patterns", "peft")])
@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_diffusers_reads_what_we_write(format, layout, family, written, tmp_path):
    """What we write is to diffusers and PEFT the change that it is to us."""
    from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline

    pipeline = StableDiffusionXLPipeline if family == "sdxl" else StableDiffusionPipeline
    pipe, source, path = af.pipe_of(family), written(format, family), tmp_path / "x.safetensors"
    adapters.write_adapter(path, adapters.read_adapter(source.path, pipe)[0], layout, pipe)
    model = copy.deepcopy(af.twins(family)[1]["unet"])
    state, alphas, metadata = pipeline.lora_state_dict(str(path), unet_config=model.config, return_lora_metadata=True)
    pipeline.load_lora_into_unet(state, alphas, model, metadata=metadata)
    found = af.peft_deltas(model, "unet")
    wanted = {where: delta for where, (delta, _) in source.deltas.items() if where[0] == "unet"}
    assert found.keys() == wanted.keys()
    for where, delta in wanted.items():
        assert (found[where][0] - delta).abs().max() <= 1e-6, where


# ---------------------------------------------------------------- there and back


@pytest.mark.parametrize(
    ("format", "family"),
    [
        pytest.param(*one, marks=[pytest.mark.check] if one[1] == "sdxl" and one[0] != "kohya" else [])
        for one in FORMATS
    ],
)
def test_written_as_kohya_and_read_again_it_is_the_same(format, family, written, tmp_path):
    """Bit-equal tensors, equal scales."""
    pipe = af.pipe_of(family)
    adapter, _ = adapters.read_adapter(written(format, family).path, pipe)
    adapters.write_adapter(tmp_path / "k.safetensors", adapter, "kohya", pipe)
    again, loaded = adapters.read_adapter(tmp_path / "k.safetensors", pipe)
    before, after = flat(adapter), flat(again)
    assert loaded.fits and before.keys() == after.keys()
    for where, change in before.items():
        if (
            isinstance(change, changes.Kronecker)
            and change.w1 is not None
            and change.w2 is not None
            and change.scale != 1
        ):
            weight, _ = weights_of(family, where)  # PEFT's: its scale has to go into the factors
            assert (change.delta(weight) - after[where].delta(weight)).abs().max() <= 1e-6
        else:
            same(change, after[where])


THERE_AND_BACK = [("kohya", "sd1"), ("kohya", "sdxl"), ("peft", "sd1"), ("peft-rslora", "sdxl"), ("peft-dora", "sd1"),
                  ("peft-patterns", "sd1"), ("attn-procs", "sd1")]  # fmt: skip


@pytest.mark.parametrize(("format", "family"), THERE_AND_BACK)
def test_peft_and_kohya_there_and_back_is_bit_equal(format, family, written, tmp_path):
    pipe = af.pipe_of(family)
    first = adapter = adapters.read_adapter(written(format, family).path, pipe)[0]
    tensors = []
    for i, layout in enumerate(("peft", "kohya", "peft", "kohya")):
        path = tmp_path / f"{i}.safetensors"
        adapters.write_adapter(path, adapter, layout, pipe)
        adapter, _ = adapters.read_adapter(path, pipe)
        tensors.append(files.read(path).tensors)
        for (where, change), (there, again) in zip(sorted_flat(first), sorted_flat(adapter), strict=True):
            assert where == there
            same(change, again)
    for one, other in ((tensors[0], tensors[2]), (tensors[1], tensors[3])):
        assert sorted(one) == sorted(other)
        assert all(torch.equal(tensor, other[key]) and tensor.dtype == other[key].dtype for key, tensor in one.items())


def sorted_flat(adapter):
    return sorted(flat(adapter).items(), key=lambda item: item[0])


def same(one, other):
    """Equal kinds, bit-equal tensors (whatever axes of length one they have), equal numbers."""
    assert type(one) is type(other)
    left, right = dict(one.tensors()), dict(other.tensors())
    assert left.keys() == right.keys()
    assert all(torch.equal(tensor.flatten(), right[name].flatten()) for name, tensor in left.items())
    for field in ("scale", "constraint"):
        assert getattr(one, field, 0) == pytest.approx(getattr(other, field, 0), rel=1e-7), field
    for field in ("boft", "cayley", "rule", "on_input"):
        assert getattr(one, field, None) == getattr(other, field, None), field
    if isinstance(one, changes.DoRA):
        same(one.change, other.change)
    if isinstance(one, changes.Sum):
        for left_one, right_one in zip(one.changes, other.changes, strict=True):
            same(left_one, right_one)


def test_what_a_layout_cannot_say_is_refused(written, tmp_path):
    target = tmp_path / "x.safetensors"
    for format, words in (("loha", "LoHa"), ("tucker", "middle"), ("dora", "ComfyUI"), ("full", "full difference")):
        adapter, _ = adapters.read_adapter(written(format, "sd1").path, af.pipe_of("sd1"))
        with pytest.raises(AdapterError, match=words):
            adapters.write_adapter(target, adapter, "peft", af.pipe_of("sd1"))
    with pytest.raises(ConfigError, match="kohya or peft"):
        adapters.write_adapter(target, adapter, "ldm", af.pipe_of("sd1"))
    with pytest.raises(ConfigError, match="safetensors"):
        adapters.write_adapter(tmp_path / "x.pt", adapter, "kohya", af.pipe_of("sd1"))
    with pytest.raises(AdapterError, match="write it for the family"):
        adapters.write_adapter(
            target, adapters.read_adapter(written("peft", "sdxl").path, af.pipe_of("sdxl"))[0], "kohya", "sd1"
        )
    assert not target.exists()


# ---------------------------------------------------------------- the rules of alpha


def one_lora(alpha=None, scale=None, dtype=torch.float32, rank=4):
    path = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
    generator = torch.Generator().manual_seed(0)
    tensors = {
        f"{path}.lora_down.weight": torch.randn(rank, 1280, generator=generator).to(dtype),
        f"{path}.lora_up.weight": torch.randn(1280, rank, generator=generator).to(dtype),
    }
    tensors |= {} if alpha is None else {f"{path}.alpha": torch.as_tensor(alpha, dtype=torch.float32)}
    return tensors | ({} if scale is None else {f"{path}.scale": torch.tensor(scale)})


Q = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"


def read(tmp_path, tensors, model="sd1", metadata=None, strict=True):
    path = tmp_path / "one.safetensors"
    files.write(path, tensors, metadata)
    return adapters.read_adapter(path, model, strict)


@pytest.mark.parametrize(
    ("alpha", "scale", "wanted", "said"),
    [
        (None, None, 1.0, "no alpha: taken as the rank 4"),
        (8.0, None, 2.0, "alpha 8 / rank 4"),
        ([1.0], None, 0.25, "alpha 1 / rank 4"),
        (8.0, 0.125, 0.125, "given as it is"),
    ],
)
def test_alpha_rules(tmp_path, alpha, scale, wanted, said):
    """A missing alpha is scale 1, and the report says so."""
    adapter, loaded = read(tmp_path, one_lora(alpha, scale))
    assert adapter.parts["unet"][Q].scale == wanted
    assert said in loaded.to_text()


def test_lokr_of_whole_factors_has_no_scale(tmp_path):
    """alpha counts only where a factor is a product."""
    path = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
    whole = {
        f"{path}.lokr_w1": torch.ones(32, 32),
        f"{path}.lokr_w2": torch.ones(40, 40),
        f"{path}.alpha": torch.tensor(2.0),
    }
    assert read(tmp_path, whole)[0].parts["unet"][Q].scale == 1
    del whole[f"{path}.lokr_w2"]
    product = whole | {f"{path}.lokr_w2_a": torch.ones(40, 8), f"{path}.lokr_w2_b": torch.ones(8, 40)}
    assert read(tmp_path, product)[0].parts["unet"][Q].scale == 0.25


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2])
def test_precisions(tmp_path, dtype):
    tensors = one_lora(8.0, dtype=dtype)
    adapter, _ = read(tmp_path, tensors)
    down, up = (tensor.double() for key, tensor in tensors.items() if "lora_" in key and "alpha" not in key)
    weight = torch.zeros(1280, 1280)
    assert (
        adapter.parts["unet"][Q].delta(weight) - 2 * up @ down
    ).abs().max() <= 1e-5  # sums of 4 products of up to 20


def test_alpha_pattern_that_is_a_regular_expression_is_refused(tmp_path):
    tensors = {key.replace("lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q", f"unet.{Q}")
               .replace("lora_down", "lora_A").replace("lora_up", "lora_B"): t for key, t in one_lora().items()}  # fmt: skip
    table = {"unet.r": 4, "unet.lora_alpha": 8}
    settings = {"lora_adapter_metadata": json.dumps(table)}
    assert read(tmp_path, tensors, metadata=settings)[0].parts["unet"][Q].scale == 2
    settings = {"lora_adapter_metadata": json.dumps(table | {"unet.alpha_pattern": {"^attn1.to_q$": 1}})}
    assert read(tmp_path, tensors, metadata=settings)[0].parts["unet"][Q].scale == 0.25
    for broken in (
        {"unet.alpha_pattern": {"(.*)+to_q": 1}},
        {"unet.lora_alpha": "many"},
        {"unet.lora_alpha": float("nan")},
    ):
        with pytest.raises(AdapterError, match="alpha"):
            read(tmp_path, tensors, metadata={"lora_adapter_metadata": json.dumps(table | broken)})
    whole = {f"unet.{Q}.lokr_w1": torch.ones(32, 32), f"unet.{Q}.lokr_w2": torch.ones(40, 40)}
    for r in ("four", -4):
        with pytest.raises(AdapterError, match="has rank"):
            read(tmp_path, whole, metadata={"lora_adapter_metadata": json.dumps({"unet.r": r})})
    with pytest.raises(AdapterError, match="PEFT configuration"):
        read(tmp_path, tensors, metadata={"lora_adapter_metadata": "[" * 100_000})


# ---------------------------------------------------------------- refusals


def path_of(key):
    return key.split(".")[0]


def broken_files():
    good = one_lora(8.0)
    down, up, alpha = good
    other = path_of(down).replace("to_q", "to_k")
    nan = good[up].clone()
    nan[7, 1] = torch.nan
    foreign = {
        f"transformer.single_transformer_blocks.{i}.attn.to_q.lora_A.weight": torch.zeros(4, 64) for i in range(100)
    }
    k_text = path_of(down).replace("attn1_to_q", "attn2_to_k")
    return {
        "unknown key": (good | {"lora_unet_no_such_block.lora_down.weight": good[down]}, "lora_unet_no_such_block"),
        "unknown ending": (good | {f"{other}.lora_sideways": good[down]}, "lora_sideways"),
        "rank mismatch": (good | {up: good[up][:, :3].clone()}, "ranks differ"),
        "NaN": (good | {up: nan}, "NaN"),
        "infinite alpha": (good | {alpha: torch.tensor(torch.inf)}, "expected one number"),
        "two alphas": (good | {alpha: torch.ones(2)}, "expected one number"),
        "2 matching and 100 foreign": (good | foreign, "100 of its modules or keys do not fit"),
        "half a LoRA": ({down: good[down]}, "lacks up"),
        "alpha alone": ({alpha: good[alpha]} | {f"{other}.lora_down.weight": good[down]}, "nothing that it belongs to|lacks up"),
        "rank 0": ({down: good[down][:0], up: good[up][:, :0], alpha: good[alpha]}, "which is no change"),
        "a vector for a matrix": (good | {down: good[down][0]}, "expected a matrix"),
        "wrong width": (good | {down: good[down][:, :64].clone()}, "weight of"),
        "two spellings": (
            good | {f"unet.{Q}.lora_A.weight": good[down], f"unet.{Q}.lora_B.weight": good[up]},
            "two adapters in one file",
        ),
        "enlarged": (good | {f"{path_of(down)}.reshape_weight": torch.tensor([1280, 2560])}, "enlarges"),
        "bias of none": (good | {f"{path_of(down)}.diff_b": torch.ones(1280)}, "has none"),
        "IA3 without its side": ({f"{path_of(down)}.weight": torch.ones(1280)} | good, "on_input"),
        "SD 2's": ({f"{k_text}.lora_down.weight": torch.ones(4, 1024), f"{k_text}.lora_up.weight": torch.ones(1280, 4)},
                   "is made for Stable Diffusion 2.x base, the model is Stable Diffusion 1.x"),
        "XL's": ({"lora_unet_middle_block_1_proj_in.lora_down.weight": torch.ones(4, 1280),
                  "lora_unet_middle_block_1_proj_in.lora_up.weight": torch.ones(1280, 4),
                  "lora_te2_text_projection.lora_down.weight": torch.ones(4, 1280),
                  "lora_te2_text_projection.lora_up.weight": torch.ones(1280, 4)},
                 "is made for Stable Diffusion XL base, the model is Stable Diffusion 1.x"),
    }  # fmt: skip


BROKEN = broken_files()


@pytest.mark.parametrize("name", BROKEN)
def test_what_does_not_fit_is_named_and_refused(name, tmp_path):
    tensors, words = BROKEN[name]
    with pytest.raises(AdapterError, match=words) as error:
        read(tmp_path, tensors)
    assert str(tmp_path / "one.safetensors") in str(error.value) and "\n" not in str(error.value)


def test_refusal_changes_no_weight(tmp_path):
    """Nothing of a pipeline changes when a file for it is refused."""
    pipe = af.pipe_of("sd1")
    before = {name: t.clone() for name, t in pipe.unet.state_dict().items()}
    for name in ("unknown key", "XL's", "NaN"):
        files.write(tmp_path / "bad.safetensors", BROKEN[name][0])
        with pytest.raises(AdapterError):
            lora.attach(pipe, adapters.read_adapter(tmp_path / "bad.safetensors", pipe)[0])
    assert all(torch.equal(t, before[name]) for name, t in pipe.unet.state_dict().items())
    assert lora.strengths(pipe) == {}


def test_not_strict_says_aloud_what_is_left_out(tmp_path):
    tensors, _ = BROKEN["2 matching and 100 foreign"]
    adapter, loaded = read(tmp_path, tensors, strict=False)
    assert list(adapter.parts["unet"]) == [Q] and len(loaded.unmatched) == 100 and not loaded.fits
    assert "NO PLACE for 100 keys: transformer.single" in loaded.to_text()
    with pytest.raises(AdapterError, match="is made for"):  # of another family nothing fits, strict or not
        read(tmp_path, BROKEN["XL's"][0], strict=False)
    with pytest.raises(AdapterError, match="none of its 100 keys"):
        read(tmp_path, {key: t for key, t in tensors.items() if "single" in key}, strict=False)


def test_other_files_are_named(tmp_path):
    for tensors, words in (
        ({"emb_params": torch.ones(1, 768)}, "textual-inversion"),
        ({"control_model.zero_convs.0.0.weight": torch.ones(1)}, "ControlNet"),
        ({f"base_model.model.{Q}.ia3_l": torch.ones(1280, 1)}, "IA3, OFT, BOFT or other adapter as PEFT writes it"),
        (
            {f"base_model.model.{Q}.oft_R.weight": torch.ones(40, 496)},
            "of PEFT's adapters LoRA, LoHa and LoKr are read",
        ),
        ({"first_stage_model.encoder.down.0.block.0.norm1.weight": torch.ones(1)}, "autoencoder"),
    ):
        with pytest.raises(AdapterError, match=words):
            read(tmp_path, tensors)
    with pytest.raises(AdapterError, match="expected one of sd1"):
        read(tmp_path, one_lora(), model="sd7")
    (tmp_path / "empty").mkdir()
    with pytest.raises(AdapterError, match="holds 0 weight files"):
        adapters.read_adapter(tmp_path / "empty")


def test_damaged_files_are_one_line(tmp_path, written):
    """Cut anywhere, or with any byte changed: read, or refused in one line; never anything else."""
    good = written("cloneofsimo", "sd1").path.read_bytes()
    target = tmp_path / "damaged.safetensors"
    generator = torch.Generator().manual_seed(0)
    header = int.from_bytes(good[:8], "little")
    for i in range(40):
        data = bytearray(good)
        at = int(torch.randint(0, header + 8 if i % 2 else len(good), (), generator=generator))
        if i % 4 < 2:
            data = data[:at]
        else:
            data[at] ^= 1 << int(torch.randint(0, 8, (), generator=generator))
        target.write_bytes(data)
        try:
            adapters.read_adapter(target, af.pipe_of("sd1"))
        except (AdapterError, CheckpointError) as error:
            assert "\n" not in str(error)
    target.write_bytes(b"not a weight file at all")
    with pytest.raises(CheckpointError):
        adapters.read_adapter(target)


@pytest.mark.parametrize("kind", an.KINDS, ids=lambda kind: kind.title)
def test_any_shapes_are_read_or_refused(kind, tmp_path):
    """Tensors of random shapes and types under a kind's names: an AdapterError, or a change that can be worked out."""
    generator = torch.Generator().manual_seed(0)
    target, module = adapters.target_of(af.pipe_of("sd1")), "mid_block.attentions.0.proj_in"
    weight, bias = target.weights["unet"][module]
    sizes = (0, 1, 2, len(weight), 3)
    for _ in range(60):
        tensors = {}
        for role, endings in (kind.endings | {role: endings for role, (endings, _) in an.BESIDE.items()}).items():
            if torch.rand((), generator=generator) < (0.8 if role in kind.endings else 0.15):
                ndim = int(torch.randint(0, 5, (), generator=generator))
                shape = [sizes[int(torch.randint(0, 5, (), generator=generator))] for _ in range(ndim)]
                dtype = (torch.float32, torch.float16, torch.int32)[
                    int(torch.randint(0, 12, (), generator=generator)) // 5
                ]
                tensors[f"unet.{module}{endings[0]}"] = torch.ones(shape, dtype=dtype)
        if not tensors:
            continue
        files.write(tmp_path / "odd.safetensors", tensors)
        match = adapters.Match(files.read(tmp_path / "odd.safetensors"), {}, target)
        for change in match.parts.get("unet", {}).values():
            change.delta(weight), change.bias_delta(bias)
        assert match.parts or "\n" not in match.complaint()


def test_oft_without_alpha_has_no_constraint(tmp_path, written):
    tensors = files.read(written("oft-constraint", "sd1").path).tensors
    without = {key: tensor for key, tensor in tensors.items() if not key.endswith(".alpha")}
    one, other = (read(tmp_path, table, af.pipe_of("sd1"))[0].parts["unet"]["conv_in"] for table in (tensors, without))
    assert one.constraint == pytest.approx(0.001 * 16) and other.constraint == 0


def test_numbered_files_count_their_modules(tmp_path, written):
    """cloneofsimo's numbers mean something only when the whole walk is there."""
    tensors = dict(files.read(written("cloneofsimo", "sd1").path).tensors)
    del tensors["unet:17:up"], tensors["unet:17:down"], tensors["<sks>"]
    with pytest.raises(AdapterError, match="numbers 143 modules up to 143"):
        read(tmp_path, tensors, af.pipe_of("sd1"))
    whole = files.read(written("cloneofsimo", "sd1").path)
    with pytest.raises(AdapterError, match="another rank than the metadata"):
        read(tmp_path, whole.tensors, af.pipe_of("sd1"), whole.metadata | {"unet:9:rank": "8"})
    tensors = {key: t for key, t in tensors.items() if not key.startswith("unet:143")}
    tensors |= {f"unet:200:{role}": torch.ones(3, 3) for role in ("up", "down")}
    with pytest.raises(AdapterError, match="extended"):
        read(tmp_path, tensors, af.pipe_of("sd1"))


# ---------------------------------------------------------------- what the file is for


@pytest.mark.parametrize(
    ("family", "key", "down", "up"),
    [
        ("sd1", "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k", (4, 768), (320, 4)),
        ("sd2-base", "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k", (4, 1024), (320, 4)),
        ("sdxl", "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k", (4, 2048), (640, 4)),
        ("refiner", "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k", (4, 1280), (768, 4)),
        ("sdxl", "lora_te2_text_model_encoder_layers_31_mlp_fc1", (4, 1280), (5120, 4)),
        ("sd1", "lora_te_text_model_encoder_layers_3_mlp_fc1", (4, 768), (3072, 4)),
        ("sd2-base", "lora_te_text_model_encoder_layers_22_mlp_fc1", (4, 1024), (4096, 4)),
    ],
)
def test_family_from_names_and_shapes(tmp_path, family, key, down, up):
    endings = (".lora_A.weight", ".lora_B.weight") if "." in key else (".lora_down.weight", ".lora_up.weight")
    _, loaded = read(tmp_path, {key + endings[0]: torch.ones(down), key + endings[1]: torch.ones(up)}, model=None)
    assert loaded.family == family


def test_bundled_embeddings_are_handed_on(written):
    for family, widths in (("sd1", (16,)), ("sdxl", (16, 32))):
        _, loaded = adapters.read_adapter(written("bundled", family).path, af.pipe_of(family))
        assert [(one.name, one.widths, len(one.vectors[0])) for one in loaded.embeddings] == [("sks", widths, 2)]
    _, loaded = adapters.read_adapter(written("cloneofsimo", "sd1").path, af.pipe_of("sd1"))
    assert [(one.name, one.widths) for one in loaded.embeddings] == [("<sks>", (16,))]


def test_dora_rule_by_ending(written):
    """`dora_scale` is ComfyUI's rule, `lora_magnitude_vector` PEFT's, and the two differ."""
    for format, rule in (("dora", "comfy"), ("dora-inputs", "comfy"), ("peft-dora", "peft")):
        adapter, _ = adapters.read_adapter(written(format, "sd1").path, af.pipe_of("sd1"))
        assert {change.rule for change in flat(adapter).values()} == {rule}
    where, change = next((w, c) for w, c in flat(adapter).items())
    weight, _ = weights_of("sd1", where)
    comfy = changes.DoRA(change.change, change.magnitude.reshape(-1, *[1] * (weight.ndim - 1)), "comfy")
    assert (comfy.delta(weight) - change.delta(weight)).abs().max() > 1e-3


# ---------------------------------------------------------------- inspect, convert, the page

LOCON = {"LoRA", "LoCon"}
INSPECTED = {  # format -> what it is, the rank, where its scale comes from, and whose spelling where that is not kohya's
    "kohya": (LOCON, 4, "0.5 (alpha 2 / rank 4)"),
    "tucker": ({"LoRA", "LoCon (Tucker)"}, 4, "0.75 (alpha 3 / rank 4)"),
    "rslora": (LOCON, 4, "1.5 (alpha 6 / rank 4)"),
    "loha": ({"LoHa"}, 2, "0.5 (alpha 1 / rank 2)"),
    "loha-tucker": ({"LoHa"}, 2, "0.5 (alpha 1 / rank 2)"),
    "lokr": ({"LoKr"}, 4, "0.25 (alpha 1 / rank 4)"),
    "lokr-both": ({"LoKr"}, 2, "0.5 (alpha 1 / rank 2)"),
    "lokr-whole": ({"LoKr"}, None, None),
    "dora-inputs": ({f"{kind} with DoRA (ComfyUI's rule)" for kind in LOCON}, 4, "0.5 (alpha 2 / rank 4)"),
    "full": ({"full difference"}, None, None),
    "norm": ({"norm"}, None, None),
    "ia3": ({"IA3"}, None, None),
    "glora": ({"GLoRA"}, 4, "0.5 (alpha 2 / rank 4)"),
    "oft": ({"OFT"}, None, None),
    "oft-constraint": ({"OFT"}, None, None),
    "boft": ({"BOFT"}, None, None),
    "simpletuner": ({"LoKr"}, 4, "0.25 (alpha 1 / rank 4)", "SimpleTuner (LyCORIS)"),
    "no-alpha": (LOCON, 3, "1 (no alpha: taken as the rank 3)"),
    "scale": (LOCON, 3, "0.25 (given as it is)"),
    "kohya-diffusers-names": (LOCON, 3, "0.5 (alpha 1.5 / rank 3)", "kohya"),
    "dora": ({f"{kind} with DoRA (ComfyUI's rule)" for kind in LOCON}, 3, "2 (alpha 6 / rank 3)"),
    "set-weight": ({"replacement"}, None, None),
    "glora-old": ({"GLoRA"}, 4, "0.5 (alpha 2 / rank 4)"),
    "oft-diag": ({"OFT"}, None, None),
    "oft-diag-zero": ({"OFT"}, None, None),
    "oft-kohya": ({"OFT"}, None, None, "kohya (its own OFT)"),
    "attn-procs": ({"LoRA"}, 3, "1 (no alpha: taken as the rank 3)", "old diffusers"),
    "attn-procs-bare": ({"LoRA"}, 3, "1 (no alpha: taken as the rank 3)", "old diffusers"),
    "old-diffusers": (LOCON, 3, "1 (no alpha: taken as the rank 3)", "PEFT / diffusers"),
    "peft-default": (LOCON, 3, "1 (no alpha: taken as the rank 3)", "PEFT / diffusers"),
    "peft-bare": (LOCON, 3, "1 (no alpha: taken as the rank 3)", "PEFT / diffusers"),
    "peft-prefix": (LOCON, 3, "1 (no alpha: taken as the rank 3)", "PEFT / diffusers"),
    "peft-no-text-model": (LOCON, 3, "1 (no alpha: taken as the rank 3)", "PEFT / diffusers"),
    "peft-bias": ({"LoRA", "LoRA + bias", "LoCon + bias"}, 3, "1 (no alpha: taken as the rank 3)", "PEFT / diffusers"),
    "bundled": (LOCON, 3, "1 (no alpha: taken as the rank 3)"),
    "peft": (LOCON, 4, "0.5 (alpha 2 / rank 4)", "PEFT / diffusers"),
    "peft-rslora": (LOCON, 4, "1 (alpha 2 / √rank 4, rsLoRA)", "PEFT / diffusers"),
    "peft-dora": ({f"{kind} with DoRA (PEFT's rule)" for kind in LOCON}, 4, "2 (alpha 8 / rank 4)", "PEFT / diffusers"),
    "peft-patterns": (LOCON, 6, "0.5 (alpha 3 / rank 6): 1 module", "PEFT / diffusers"),
    "peft-folder": (LOCON, 4, "1 (alpha 2 / √rank 4, rsLoRA)", "PEFT / diffusers"),
    "peft-folder-loha": ({"LoHa"}, 4, "0.5 (alpha 2 / rank 4)", "PEFT / diffusers"),
    "peft-folder-lokr": ({"LoKr"}, 4, "0.5 (alpha 2 / rank 4)", "PEFT / diffusers"),
    "peft-folder-lokr-whole": ({"LoKr"}, None, "0.125 (alpha 64 / rank 512)", "PEFT / diffusers"),
    "cloneofsimo": ({"LoRA"}, 1, "1 (no alpha: taken as the rank 1)", "cloneofsimo (numbered)"),
    "cloneofsimo-pt": ({"LoRA"}, 1, "1 (no alpha: taken as the rank 1)", "cloneofsimo (numbered)"),
}
WORDS = {
    "modelspec.trigger_phrase": "sks",
    "ss_tag_frequency": '{"10_dog": {"sks dog": 20, "grass": 3}}',
    "ss_output_name": "rex",
}


def test_every_format_is_inspected():
    assert set(INSPECTED) == {*af.LYCORIS, *af.RULED, *af.PEFT, *af.FOLDERS, *af.ONLY_SD1}


@pytest.fixture
def real_sizes(monkeypatch):
    """Files are written for the real sizes, by which `sdcore inspect`, which has no model at hand, knows the family."""
    monkeypatch.setattr(af, "twins", af.official)
    monkeypatch.setattr(af, "CONFIGS", af.OFFICIAL_CONFIGS)


@pytest.mark.parametrize(
    ("format", "family"), [*((f, "sd1") for f in INSPECTED), *((f, "sdxl") for f in INSPECTED if f not in af.ONLY_SD1)]
)
def test_inspect_says_what_a_person_wants_to_know(format, family, real_sizes, tmp_path, capsys):
    """What it is, for which models, what it touches and how strongly, in whose spelling, which words it knows; and as JSON."""
    kinds, rank, scale, *spelling = INSPECTED[format]
    if format == "tucker" and family == "sdxl":
        kinds = kinds - {"LoRA"}  # of 1 x 1 convolutions, which XL has not
    write = af.official_simo if format in af.ONLY_SD1 else lambda *where: af.write(*where, family)
    written = write(format, tmp_path / "adapter.safetensors")
    file = files.read(written.path / "adapter_model.safetensors" if written.path.is_dir() else written.path)
    if file.path.suffix == ".safetensors":
        files.write(tmp_path / "new", file.tensors, {**file.metadata, **WORDS})
        (tmp_path / "new").replace(file.path)
    capsys.readouterr()
    assert main(["inspect", str(written.path)]) == 0
    text = capsys.readouterr().out
    first, *lines = text.splitlines()
    title = {"sd1": "Stable Diffusion 1.x", "sdxl": "Stable Diffusion XL base"}[family]
    found = re.fullmatch(
        rf"{re.escape(str(file.path))}: (.+) for {title}; load a model and give this file with --lora", first
    )
    assert found and set(found[1].split(", ")) == kinds, first
    for part, modules in Counter(part for part, _ in written.deltas).items():
        (line,) = (line for line in lines if line.startswith(f"  {part}: "))
        assert line.startswith(f"  {part}: {modules} module{'s' * (modules > 1)}"), line
        assert (rank is None) == ("rank" not in line), line
    assert rank is None or f"rank {rank} (" in text, text
    assert f"  scale {scale}" in text or f"; {scale}" in text if scale else "scale" not in text, text
    usual = ({"kohya (sgm names)"} if family == "sdxl" else set()) | {"kohya"}
    (line,) = (line for line in lines if line.startswith("  spelling "))
    shown = set(line.removeprefix("  spelling ").removesuffix("; float32").split(", "))
    assert shown <= usual and shown if not spelling else shown == set(spelling), line
    if file.path.suffix == ".safetensors":
        assert "words of its captions: sks, sks dog (20), grass (3)" in text and "named: rex" in text
    if format == "bundled":
        assert f"with the embedding sks: 2 vectors, for {'SDXL' if family == 'sdxl' else 'SD 1.x'}" in text
    assert "FIT" not in text and "NO PLACE" not in text
    assert main(["inspect", str(written.path), "--json"]) == 0
    table = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (table["family"], table["adapter"]["matched"], table["adapter"]["fits"]) == (
        family,
        len(written.deltas),
        True,
    )


def test_report_of_official_sizes_and_metadata(tmp_path):
    metadata = {
        "ss_tag_frequency": json.dumps({"10_sks dog": {"sks dog": 20, "grass": 3}, "5_x": {"sks dog": 1}}),
        "modelspec.trigger_phrase": "sks", "ss_base_model_version": "sd_v1", "ss_output_name": "dog",
    }  # fmt: skip
    files.write(tmp_path / "dog.safetensors", one_lora(2.0, dtype=torch.float16), metadata)
    found = report.inspect(tmp_path / "dog.safetensors")
    text = found.to_text()
    for words in (
        "dog.safetensors: LoRA for Stable Diffusion 1.x", "rank 4 (1)", "scale 0.5 (alpha 2 / rank 4): 1 module",
        "self-attention 1", "sks, sks dog (21), grass (3)", "base: sd_v1", "float16", "spelling kohya", "--lora",
    ):  # fmt: skip
        assert words in text, text
    table = json.loads(found.to_json())
    assert table["family"] == "sd1" and table["adapter"]["modules"] == {"unet": [Q]}
    broken = {"ss_tag_frequency": "[" * 50_000, "ss_output_name": "a\nb\x1b[31m"}
    files.write(tmp_path / "dog.safetensors", BROKEN["unknown key"][0], broken)
    text = report.inspect(tmp_path / "dog.safetensors").to_text()
    assert "does not fit" in text and "NO PLACE for 1 key: lora_unet_no_such_block" in text and "\x1b" not in text


def test_command_line_converts_and_inspects(tmp_path):
    files.write(tmp_path / "k.safetensors", one_lora(2.0))

    def sdcore(*words):
        return subprocess.run([sys.executable, "-m", "sdcore", *map(str, words)], capture_output=True, text=True)

    done = sdcore("convert", tmp_path / "k.safetensors", tmp_path / "p.safetensors", "--layout", "peft")
    assert done.returncode == 0, done.stderr
    assert set(files.read(tmp_path / "p.safetensors").tensors) == {f"unet.{Q}.lora_A.weight", f"unet.{Q}.lora_B.weight"}
    adapter, _ = adapters.read_adapter(tmp_path / "p.safetensors")
    assert adapter.parts["unet"][Q].scale == 0.5
    done = sdcore("inspect", tmp_path / "p.safetensors")
    assert done.returncode == 0 and "Stable Diffusion 1.x" in done.stdout and "PEFT" in done.stdout


def test_the_page_is_up_to_date():
    """docs/adapters.md is what the tables say; `python -m sdcore.weights.adapter_names > docs/adapters.md` writes it."""
    page = (Path(__file__).parents[1] / "docs" / "adapters.md").read_text()
    assert page == an.page()
    for ending in an.ENDINGS:
        assert f"`{ending}`" in page
    for spelling in an.SPELLINGS:
        assert spelling.title in page and f"`{spelling.prefix}`" in page or not spelling.prefix


def test_every_kind_has_a_builder_and_is_detected():
    assert set(adapters.BUILDERS) == {kind.title for kind in an.KINDS}
    marks = ("down", "up", "w1", "w1_a", "w1_b", "w2", "blocks", "turns", an.DORA, an.MAGNITUDE)
    for ending, (_, role) in an.ENDINGS.items():
        if role in marks:
            assert detect.kind_of([f"unet.{Q}{ending.replace('*', 'default')}"]).name == "lora", ending
    for spelling in an.SPELLINGS:
        if spelling.prefix.endswith("_"):
            assert detect.kind_of([f"{spelling.prefix}x.a1.weight"]).name == "lora", spelling
