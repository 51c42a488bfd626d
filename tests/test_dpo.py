"""Diffusion-DPO: the loss and its gradient against the paper's formula in fp64, where pairs come from, what is held out, resume.

Everything runs on the bundled model and on pictures of its world; that it learns a rule is shown by the last test, a long proof.
"""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sdcore.train import chapter, dpo, labels, liking, loop, prompts, report, rewards, tuning, world
from sdcore.train.dpo import DPO, DPOOptions
from sdcore.train.options import parse
from sdcore.train.task import Part
from sdcore.weights import files
from sdcore.weights.adapters import write_adapter
from torch.func import functional_call

import sdcore
from sdcore import image, lora
from sdcore.changes import LowRank
from sdcore.errors import ConfigError, TrainingError
from sdcore.scheduler import alpha_bars
from tests.runs import Cut, assert_same_bits, cut_at, final

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """A folder with five pairs of pictures of the world; the first picture is in two of them."""
    folder, rng, rows = tmp_path_factory.mktemp("pairs"), np.random.default_rng(3), []
    for i in range(10):
        scene = world.training_scene(rng)
        image.to_pictures(torch.from_numpy(world.draw_batch([scene])))[0].save(folder / f"{i}.png")
        if i % 2:
            rows.append(
                {"prompt": world.caption(scene), "winner": f"{i}.png", "loser": f"{(i - 1) if i < 9 else 0}.png"}
            )
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    return folder


def options(out: Path, **changes) -> DPOOptions:
    """A run of a few steps of three pairs."""
    given = dict(
        out=str(out), model="tiny", device="cpu", cache="", resolution=64, batch=3, steps=3, warmup=0, cooldown=0, save_every=1,
        log_every=1, seed=7, threads=1, lr=1e-3, rank=2, hold_out=0.0, beta=300.0, guidance=3.0, sampler_steps=2,
    )  # fmt: skip
    return DPOOptions(**(given | changes))


def task_of(o: DPOOptions) -> DPO:
    return DPO(o, tuning.load(o))


def shaken(task: DPO) -> DPO:
    """With what trains moved away from where it begins, and everything in fp64."""
    rng = torch.Generator().manual_seed(1)
    for module in (*task.modules.values(), task.pipe.unet, *([task.frozen] if task.options.adapter == "none" else [])):
        module.double()
    with torch.no_grad():
        for p in task.modules.popitem()[1].parameters():
            p += 0.02 * torch.randn(p.shape, generator=rng, dtype=torch.float64)
    return task


# -------------------------------------------------------------------------------------------------------------- the loss


@pytest.mark.parametrize(
    ("adapter", "prediction"), [("lora", "epsilon"), ("none", "epsilon"), ("lora", "v_prediction")]
)
def test_loss_and_gradient_equal_the_formula_of_the_paper_in_fp64(pairs, tmp_path, adapter, prediction):
    """Equation 14 with its sums of squares, T = 1000 and omega, written out on plain weights; nothing of dpo.py is called.

    With v_prediction, min-SNR is on: the squared error of the clean latent is that of v times 1 / (snr + 1).
    """
    v = prediction == "v_prediction"
    o = options(tmp_path / "run", data=str(pairs), adapter=adapter, prediction=prediction, min_snr=5.0 if v else 0.0)
    task = task_of(o)
    trained = next(iter(task.modules.values()))
    shaken(task)
    part, noised = Part(7, 0, 3, range(3)), []
    task.noised = lambda *args, real=task.noised: noised.append(real(*args)) or noised[-1]
    loss = task.loss(part)
    loss.mean.backward()

    pipe = sdcore.load("tiny", device="cpu")
    unet, vae = pipe.unet.double(), pipe.vae.double()
    pairs_seen = task.pictures.duels(0, range(3))
    tuned = {name: p.detach().clone() for name, p in unet.named_parameters()}
    if adapter == "lora":
        leaves = {name: p.detach().clone().requires_grad_() for name, p in trained.named_parameters()}
        for name in {name.rpartition(".")[0] for name in leaves}:
            weight = name.removeprefix("unet.").replace("/", ".") + ".weight"
            tuned[weight] = (
                tuned[weight] + leaves[f"{name}.up"] @ leaves[f"{name}.down"]
            )  # alpha = rank: the scale is 1
    else:
        leaves = tuned = {name: p.detach().clone().requires_grad_() for name, p in trained.named_parameters()}
    alpha_bar = torch.as_tensor(alpha_bars(pipe.scheduler), dtype=torch.float64)
    D, T, inside = 4 * 8 * 8, 1000, []
    for place in range(3):
        change = []
        for half, (found, _) in zip(pairs_seen, noised, strict=True):
            visit, t = half[place], noised[0][0].t[place : place + 1]  # the winner's timestep is the loser's
            pixels = torch.from_numpy(np.array(image.open_picture(visit.item.path).pixels)).permute(2, 0, 1)[None] / 255
            moments, a = vae.encode(pixels.double() * 2 - 1), alpha_bar[t]
            rng = torch.Generator().set_state(part.own()[place].get_state())  # so is its stream
            draw, noise = torch.randn(4, 8, 8, generator=rng), torch.randn(4, 8, 8, generator=rng)
            x0 = (moments.mean[0] + (moments.logvar[0] / 2).exp() * draw) * vae.config.scaling_factor
            x, wanted = found.x[place].double(), found.wanted[place].double()
            assert (x - (a.sqrt() * x0 + (1 - a).sqrt() * noise)).abs().max() < 2e-5  # fp32 in the encoder
            assert (wanted - (a.sqrt() * noise - (1 - a).sqrt() * x0 if v else noise)).abs().max() < 2e-5
            told = pipe.text_encoders[0](pipe.tokenizers[0]([visit.caption])).last.double()
            before = (wanted - unet(x[None], t, told)).square().sum().detach()
            now = (wanted - functional_call(unet, tuned, (x[None], t, told))).square().sum()
            change.append(now - before)
        snr = a / (1 - a)
        omega = torch.minimum(snr, torch.tensor(5.0)) / (snr + 1) if v else 1.0
        beta = o.beta / (2 * T * D)  # the paper's, of sums of squares
        inside.append(-beta * T * omega * (change[0] - change[1]))
    inside = torch.cat([row.view(1) for row in inside])
    expected = -torch.log(torch.sigmoid(inside)).mean()
    expected.backward()
    assert inside.abs().max() > 0.05  # it says something
    exact = 1e-6 if v else 1e-10  # min-SNR's weights are worked out in fp32
    assert abs(loss.mean.item() / expected.item() - 1) < exact
    for name, p in trained.named_parameters():
        assert (p.grad - leaves[name].grad).abs().max() <= exact * leaves[name].grad.abs().max() + 1e-14, name
    assert loss.count == 3 and loss.figures["prefers"] == pytest.approx((inside > 0).double().mean().item())


@pytest.mark.parametrize("adapter", ["lora", "none"])
def test_a_run_begins_where_it_was(pairs, tmp_path, adapter):
    task = task_of(options(tmp_path / "run", data=str(pairs), adapter=adapter))
    loss = task.loss(Part(7, 0, 3, range(3)))
    assert loss.mean.item() == torch.tensor(2.0).log().item() and loss.figures == {"prefers": 0.0, "margin": 0.0}


def test_what_is_not_trained_stays(pairs, tmp_path):
    o = options(tmp_path / "run", data=str(pairs), adapter="none")
    task = task_of(o)
    before = {name: p.clone() for name, p in task.frozen.named_parameters()}
    assert loop.run(task, o) == 0
    after = dict(task.pipe.unet.named_parameters())
    assert all(torch.equal(p, before[name]) for name, p in task.frozen.named_parameters())
    assert any(not torch.equal(after[name], before[name]) for name in before)
    with task.untuned():
        assert task.pipe.unet is task.frozen
    assert task.pipe.unet is task.modules["unet"]
    written = sdcore.load(str(tmp_path / "run/model"), device="cpu").unet.state_dict()
    assert all(torch.equal(p, after[name].half().float()) for name, p in written.items())  # the bundled model is fp16


# ------------------------------------------------------------------------------------------------------------- the pairs


def test_pairs_keep_together_and_have_the_prompt_of_their_pair(pairs, tmp_path):
    rows = [json.loads(line) for line in (pairs / "pairs.jsonl").read_text().splitlines()]
    table = {(row["winner"], row["loser"]): row["prompt"] for row in rows}
    task = task_of(options(tmp_path / "run", data=str(pairs / "pairs.jsonl"), batch=2))
    met = set()
    for step in range(6):
        winners, losers = task.pictures.duels(step, range(2))
        for w, l in zip(winners, losers, strict=True):
            assert table[w.item.path.name, l.item.path.name] == w.caption == l.caption
            met.add((w.item.path.name, l.item.path.name))
    assert met == set(table)
    assert task.identity()["pictures"] == 5 and task.identity()["losers"] != task.identity()["content"]


@pytest.mark.parametrize(
    ("lines", "what"),
    [
        ("", "holds no pair"), ("nonsense", "line 1: expected"), ('{"prompt": "a", "winner": "0.png"}', "line 1: expected"),
        ('{"prompt": 3, "winner": "0.png", "loser": "1.png"}', "line 1: expected"), ("[]", "line 1: expected"),
    ],
)  # fmt: skip
def test_a_table_of_pairs_that_is_none(tmp_path, lines, what):
    (tmp_path / "pairs.jsonl").write_text(lines)
    with pytest.raises(TrainingError, match=what):
        dpo.read_pairs(tmp_path)
    with pytest.raises(TrainingError, match="cannot be read"):
        dpo.read_pairs(tmp_path / "none.jsonl")


def test_pictures_that_do_not_pair_are_refused_or_skipped(pairs, tmp_path):
    for i in (0, 1, 2, 3):
        picture = image.open_picture(pairs / f"{i}.png")
        (picture if i else image.Picture(np.zeros((64, 128, 3), np.uint8))).save(tmp_path / f"{i}.png")
    rows = [("0.png", "1.png"), ("2.png", "3.png"), ("2.png", "missing.png")]
    text = [json.dumps({"prompt": "a circle", "winner": w, "loser": l}) for w, l in rows]
    (tmp_path / "pairs.jsonl").write_text("\n".join(text))
    o = options(tmp_path / "run", data=str(tmp_path), bucket_step=16)
    with pytest.raises(TrainingError, match="2 of 3 pictures cannot be used"):
        task_of(o)
    task = task_of(replace(o, broken="skip"))
    assert [item.path.name for item in task.pictures.items] == ["2.png"]
    assert {str(fault.path.name) for fault in task.pictures.faults} == {"1.png", "missing.png"}


def test_what_people_chose_are_pairs(pairs, tmp_path):
    files = [pairs / f"{i}.png" for i in range(6)]
    keys = labels.ask(
        tmp_path, [labels.Pair("a star", *files[:2]), labels.Pair("a heart", *files[2:4]), labels.Pair("x", *files[4:])]
    )
    with pytest.raises(TrainingError, match="nobody has compared"):
        task_of(options(tmp_path / "run", labels=str(tmp_path)))
    for key, answer in zip(keys, ("b", "a", "skip"), strict=True):
        labels.append(tmp_path, key, answer)
    task = task_of(options(tmp_path / "run", labels=str(tmp_path)))
    found = {item.captions[0]: item.sha256 for item in task.pictures.items}
    assert found == {"a star": loop.sha256(files[1]), "a heart": loop.sha256(files[2])}
    assert {item.sha256 for item in task.pictures.losers.items} == {loop.sha256(files[0]), loop.sha256(files[3])}


def test_a_reward_makes_pairs_of_pictures_that_the_model_draws(tmp_path):
    (tmp_path / "bright.py").write_text(
        "def reward(pictures, prompts):\n    return pictures.mean(dim=(1, 2, 3)).round(decimals=2)\n"
    )
    o = options(
        tmp_path / "run", reward=str(tmp_path / "bright.py"), pairs=4, each=3, pair_prompts="world:one", batch=5
    )
    task = task_of(o)
    folder = tmp_path / "run" / "pairs"
    texts, first = prompts.prompts("world:one", 4, 7), {path.name: path.read_bytes() for path in folder.iterdir()}
    rows = {row["prompt"]: row for row in map(json.loads, (folder / "pairs.jsonl").read_text().splitlines())}
    for i, text in enumerate(texts):
        names = [f"{i:05d}-{k}.png" for k in range(3)]
        means = [np.round(np.float32(image.to_unit(image.open_picture(folder / name)).mean()), 2) for name in names]
        if max(means) == min(means):
            assert text not in rows
        else:
            best, worst = names[int(np.argmax(means))], names[int(np.argmin(means))]
            assert rows[text] == {"prompt": text, "winner": best, "loser": worst}
    assert len(task.pictures.items) == len(rows) > 0 and json.loads(first["recipe.json"])["drawn"] == 12
    alone = task.pipe(texts[1], seed=dpo.DRAWN * 8 + 4, size=(64, 64), steps=2, guidance=3.0).images[0].pixels
    kept = image.open_picture(folder / "00001-1.png").pixels
    assert np.abs(alone.astype(int) - kept).max() <= 1
    for name in ("00001-1.png", "00003-2.png", "pairs.jsonl"):  # as after a kill
        (folder / name).unlink()
    task_of(o)
    again = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert again == first
    with pytest.raises(TrainingError, match="drawn of other prompts"):
        task_of(replace(o, pair_prompts="world:two"))


def test_equal_pictures_make_no_pair(tmp_path):
    (tmp_path / "same.py").write_text("def reward(pictures, prompts):\n    return 0 * pictures.mean(dim=(1, 2, 3))\n")
    with pytest.raises(TrainingError, match="found all 2 pairs equal"):
        task_of(options(tmp_path / "run", reward=str(tmp_path / "same.py"), pairs=2))


def test_held_out_pairs_are_learned_from_never(tmp_path):
    duels = [dpo.Duel("a", Path(f"{i}.png"), Path(f"{i}-.png")) for i in range(400)]
    learned, aside = dpo.split(duels, 0.25)
    assert sorted(learned + aside) == sorted(duels) and 70 < len(aside) < 130
    assert dpo.split(duels[::-1], 0.25)[1] == aside[::-1]
    assert dpo.split([dpo.Duel(d.prompt, d.loser, d.winner) for d in aside], 0.25)[0] == []  # whoever won
    assert dpo.split(duels, 0.0) == (duels, [])


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        (dict(pairs=2), "need --reward"), (dict(trials=2), "need --reward"),
        (dict(labels="x", pairs=1, reward="checker"), "leave one"),
        (dict(huber=0.1), "no meaning for pairs"), (dict(beta=0.0), "beta above 0"), (dict(each=1), "at least 2"),
        (dict(hold_out=1.0), "below 1"), (dict(adapter="both"), "expected none or lora"),
        (dict(adapter="none", text_encoder=True), "--text-encoder"),
    ],
)  # fmt: skip
def test_options_that_mean_nothing(pairs, tmp_path, changes, what):
    with pytest.raises(ConfigError, match=what):
        task_of(options(tmp_path / "run", **({"data": str(pairs)} | changes)))


def test_presets_are_defaults_that_words_overrule():
    for name, values in dpo.PRESETS.items():
        found = parse(DPOOptions, ["--preset", name, "--steps", "7"], prog="t", presets=dpo.PRESETS)
        assert found.steps == 7 and all(getattr(found, k) == v for k, v in values.items() if k != "steps")
    tasks = {"compressibility", "incompressibility", "aesthetic", "alignment", "people"}
    assert set(dpo.PRESETS) == tasks | {f"{task}-sdxl" for task in tasks}
    assert all((values["model"] == "sdxl") == name.endswith("-sdxl") for name, values in dpo.PRESETS.items())


def test_prompts_of_files_and_of_the_world(tmp_path):
    (tmp_path / "p.txt").write_text("a\n\n b \nc\n")
    found = prompts.prompts(str(tmp_path / "p.txt"), 7, 0)
    assert (
        sorted(found[:3]) == sorted(found[3:6]) == ["a", "b", "c"]
        and prompts.prompts(str(tmp_path / "p.txt"), 5, 0) == found[:5]
    )
    held = prompts.prompts("held-out", 40, 20_000)
    assert held == [text for text, _ in world.held_out_prompts(40, 20_000)]
    two = [world.parse(text) for text in prompts.prompts("world:two", 40, 1)]
    assert all(len(scene.things) == 2 and not world.held_out(scene) for scene in two)
    assert all(len(world.parse(text).things) == 1 for text in prompts.prompts("held-out:one", 9, 1))
    for wrong, error in (("world:three", ConfigError), ("nowhere.txt", TrainingError)):
        with pytest.raises(error):
            prompts.prompts(wrong, 1, 0)


# --------------------------------------------------------------------------------------------------- evaluations, resume


def test_evaluations_look_at_held_out_pairs_and_noise(pairs, tmp_path):
    o = options(
        tmp_path / "run", data=str(pairs), hold_out=0.5, reward="compressibility", trials=3, trial_prompts="world:one",
        validation_draws=2,
    )  # fmt: skip
    task = task_of(o)
    aside = {item.path for item in task.held_out.items}
    assert (
        aside and not aside & {item.path for item in task.pictures.items} and len(task.pictures.items) + len(aside) == 5
    )
    with torch.no_grad():
        figures = task.evaluate(0, tmp_path)
    assert figures["prefers"] == 0 and figures["wins"] == 0.5 and figures["reward"] == figures["reward_before"] < 0
    assert figures["validation_loss"] == pytest.approx(np.log(2))
    shaken_lora = next(iter(task.modules.values()))
    with torch.no_grad():
        for p in shaken_lora.parameters():
            p += 0.05
        figures, again = task.evaluate(1, tmp_path), task.evaluate(2, tmp_path)
    assert (
        figures == again and figures["reward"] != figures["reward_before"] and figures["validation_loss"] != np.log(2)
    )
    held = [task.preferences([w], [l], torch.tensor([t]), [loop.generator(7, i, k, 2)])
            for i in range(len(aside)) for w, l in [task.held_out.duel(i, 0, 0)] for k, t in enumerate((250, 750))]  # fmt: skip
    assert figures["prefers"] == pytest.approx(float(np.mean([h.item() > 0 for h in held])))


def test_validation_names_other_pairs(pairs, tmp_path):
    task = task_of(options(tmp_path / "run", data=str(pairs), validation=str(pairs), hold_out=0.5))
    assert len(task.held_out.items) == len(task.pictures.items) == 5  # nothing is set aside then
    assert "validation" in task.identity()


@pytest.mark.parametrize("adapter", ["lora", "none"])
def test_a_cut_run_resumes_to_the_same_bits(pairs, tmp_path, adapter):
    whole = options(tmp_path / "a/run", data=str(pairs), adapter=adapter, accumulate=2)
    loop.run(task_of(whole), whole)
    cut = replace(whole, out=str(tmp_path / "b/run"))
    with pytest.raises(Cut):
        loop.run(cut_at(task_of(cut), 2), cut)
    rest = replace(cut, resume=True)
    loop.run(task_of(rest), rest)
    assert_same_bits(final(tmp_path / "a/run"), final(tmp_path / "b/run"))
    if adapter == "lora":
        one, other = (files.read(tmp_path / run / "run/run.safetensors").tensors for run in "ab")
        assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


# --------------------------------------------------------------------------------------------------------------- what it reaches


@pytest.mark.check
def test_dpo_learns_a_rule_and_from_the_checker(tmp_path):
    """The entry of `make chapter`, from the beginning: every aim met."""
    assert chapter.main(["--only", "dpo", "--out", str(tmp_path), "--threads", str(torch.get_num_threads())]) == 0
    found = report.load(tmp_path / "dpo")
    print(report.table([found]))
    assert all(row.met for row in found.rows), [row for row in found.rows if not row.met]


def test_rules_and_prompts_of_the_report(tmp_path):
    """The rule is what it says, its prompts leave the background free, and both models draw from the same noise."""
    (tmp_path / "warm.py").write_text(liking.RULE)
    warm = rewards.make(str(tmp_path / "warm.py"), tmp_path)
    assert warm(torch.tensor([0.75, 0.5, 0.25]).view(1, 3, 1, 1).expand(2, 3, 8, 8), ["a", "b"]).tolist() == [0.5, 0.5]
    scenes = [world.parse(text) for text in liking.vague()]
    assert len(set(liking.vague())) == len(scenes) == 36
    assert not any(scene.background or world.held_out(scene) or len(scene.things) > 1 for scene in scenes)
    pipe = sdcore.load("tiny", device="cpu")
    width = pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn1.to_q.weight.shape[0]
    layer = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    nothing = LowRank(torch.zeros(1, width), torch.ones(width, 1))
    write_adapter(tmp_path / "lora.safetensors", lora.Adapter("x", {"unet": {layer: nothing}}), "kohya", pipe)
    base, tuned = liking.both(SimpleNamespace(base=pipe), tmp_path / "lora.safetensors", liking.vague()[:3])
    assert torch.equal(base, tuned) and 0 <= base.min() < base.max() <= 1 and not torch.equal(base[0], base[1])
