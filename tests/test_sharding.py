"""Two processes as one (must be the same step), each with the whole networks or with its share of them (FSDP2)."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from sdcore.train import loop, ranks, sharding, state, tuning
from sdcore.train.dreambooth import DreamBooth, DreamBoothOptions
from sdcore.train.lora import LoRAOptions, TrainLoRA

from sdcore.errors import TrainingError
from tests.runs import Line, assert_same_bits, final, line_options
from tests.test_methods import options, place  # noqa: F401  (a fixture)

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


@pytest.fixture(scope="module")
def done(place, tmp_path_factory):  # noqa: F811
    """The folder in which two processes have trained UNet and text encoder, and the options they had."""
    folder = tmp_path_factory.mktemp("processes")
    o = options(
        DreamBoothOptions, place, folder / "alone", captions="text:photo of a dog",
        text_encoder=True, batch=4, steps=2, optimiser="sgd", lr=0.05, weight_decay=0.0, ema=0.5, save_every=1, keep=2,
        eval_every=2, validation=place.pictures, validation_draws=1, best="validation_loss:min",
    )  # fmt: skip
    (folder / "options.json").write_text(json.dumps(o.__dict__))
    run = [*TORCHRUN, "-m", "tests.processes", str(folder)]
    found = subprocess.run(run, cwd=Path(__file__).parents[1], capture_output=True, text=True, timeout=800)
    assert found.returncode == 0, found.stderr[-4000:]
    return folder, o


@pytest.fixture(scope="module")
def alone(done):
    """One process, the same batch: the gradients of the first step, and where two steps of SGD lead."""
    _, o = done
    now = state.State(DreamBooth(o, tuning.load(o)), o, ranks.Ranks())
    figures = now.gradients(0)
    gradients = {name: p.grad.clone() for name, p in now.trained.items()} | {"loss": torch.tensor(figures["loss"])}
    loop.run(DreamBooth(o, tuning.load(o)), o)
    return gradients, final(Path(o.out))


def whole(checkpoint: Path) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint in shards, put together by hand from the offsets that its files give."""
    from safetensors import safe_open

    found: dict[str, torch.Tensor] = {}
    pieces: dict[str, dict[int, torch.Tensor]] = {}
    for path in checkpoint.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            offsets = json.loads(file.metadata()["DCP_SHARDING_INFO"])
            for name in file.keys():
                place_ = offsets[name]["saved_offsets"]
                assert not any(place_[1:])
                pieces.setdefault(name, {})[place_[0] if place_ else 0] = file.get_tensor(name)
    for name, rows in pieces.items():
        found[name] = torch.cat([rows[i] for i in sorted(rows)]) if rows[0].ndim else rows[0]
    return found


@pytest.mark.parametrize("mode", ["whole", "shards"])
def test_two_processes_have_the_gradients_and_the_weights_of_one(done, alone, mode):
    """Gradients within 1e-5 (and four roundings of the whole, where a norm cancels terms as large); weights within 1e-6."""
    folder, o = done
    found, (wanted, weights) = load_file(folder / f"gradients-{mode}.safetensors"), alone
    assert found.keys() == wanted.keys() and len(wanted) > 300
    length = sum(g.square().sum() for g in wanted.values()).sqrt()
    for name, want in wanted.items():
        assert (found[name] - want).norm() <= 1e-5 * want.norm() + 4 * 2**-24 * length, name
    newest = folder / mode / "checkpoints/step-00000002"
    tensors = whole(newest) if mode == "shards" else load_file(newest / "state.safetensors")
    assert tensors.keys() == weights.keys()
    for name, want in weights.items():
        assert (tensors[name].float() - want.float()).abs().max() <= 1e-6, name
    start = tuning.load(o).unet.state_dict()
    assert max((weights[f"weights/unet.{name}"] - start[name]).abs().max() for name in start) > 1e-3


def test_shares_of_the_data_never_overlap(done):
    folder, o = done
    for mode in ("whole", "shards"):
        shown = [json.loads((folder / f"shown-{mode}-{rank}.json").read_text()) for rank in (0, 1)]
        for step in range(o.steps):
            first, second = (sum((places for s, places in seen if s == step), []) for seen in shown)
            assert sorted(first + second) == list(range(o.batch)) and len(first) == len(second)


def test_shards_resume_to_the_same_bits_and_say_what_went_wrong(done):
    folder, _ = done
    one, other = (whole(folder / run / "checkpoints/step-00000002") for run in ("adamw", "cut"))
    assert_same_bits(one, other)
    assert {name.split("/")[0] for name in one} == {"weights", "average", "optimiser"}
    files = sorted((folder / "cut/checkpoints/step-00000002").glob("*.safetensors"))
    sizes = [path.stat().st_size for path in files]
    assert len(files) == 2 and abs(sizes[0] - sizes[1]) < 0.05 * sum(sizes)  # each has written its half
    for rank in (0, 1):
        words = (folder / f"error-{rank}.txt").read_text()
        assert "No space left" in words and "older checkpoints are intact" in words
    assert sorted(c.name for c in (folder / "cut/checkpoints").iterdir()) == ["step-00000001", "step-00000002"]


def test_shards_are_evaluated_and_exported_whole(done, alone):
    """The same validation losses, the same best checkpoint, the same model folder as of one process."""
    folder, o = done
    lines = {
        run: [json.loads(line) for line in (folder / run / "log.jsonl").read_text().splitlines()]
        for run in ("alone", "whole", "shards")
    }
    for run in ("whole", "shards"):
        for line, want in zip(lines[run], lines["alone"], strict=True):
            assert line.keys() == want.keys()
            for name in {"loss", "norm", "validation_loss"} & want.keys():
                assert line[name] == pytest.approx(want[name], rel=1e-4, abs=2e-6)
        assert lines[run][-1] == lines["alone"][-1]
        for part in ("unet", "text_encoder"):
            file = next((folder / "alone/model" / part).glob("*.safetensors")).name
            found, want = (load_file(folder / name / "model" / part / file) for name in (run, "alone"))
            assert found.keys() == want.keys()
            assert max((found[name] - want[name]).abs().max() for name in want) <= 1e-6


def test_a_run_in_shards_is_not_taken_for_another(done, place, tmp_path):  # noqa: F811
    folder, o = done
    given = o.__dict__ | dict(
        optimiser="adamw", accumulate=2, resolution=64, eval_every=0, best=None, out=str(folder / "cut"), resume=True
    )
    with pytest.raises(TrainingError, match="processes: was 2, is 1"):
        loop.run(DreamBooth(p := DreamBoothOptions(**given), tuning.load(p)), p)
    with pytest.raises(TrainingError, match="written in shards; resume it by torchrun with --shard"):
        loop.run(DreamBooth(p := DreamBoothOptions(**given | dict(accept_changes=True)), tuning.load(p)), p)
    with pytest.raises(TrainingError, match="--shard: cuts up over several processes"):
        loop.run(Line(), line_options(tmp_path / "alone", shard=True))
    with pytest.raises(TrainingError, match="--optimiser adamw, lion, sgd; adafactor"):
        sharding.cut(torch.nn.ModuleDict(Line().modules), 2, "adafactor")
    q = options(LoRAOptions, place, tmp_path / "lora", rank=2)
    with pytest.raises(TrainingError, match="lora is small and acts within another network"):
        sharding.cut(torch.nn.ModuleDict(TrainLoRA(q, tuning.load(q)).modules), 2, "adamw")


def test_another_number_of_processes_reads_shards(done):
    """Whoever reads them gets the tensors whole, from files that two processes have written."""
    folder, _ = done
    kept = folder / "adamw/checkpoints"
    reader = sharding.ShardedCheckpoints(
        kept, 2, ranks.Ranks(), lambda name, shape, dtype: torch.empty(shape, dtype=dtype)
    )
    found, numbers = reader.newest()
    assert_same_bits(found, whole(kept / "step-00000002"))
    assert numbers["step"] == 2 and numbers["processes"] == 2
