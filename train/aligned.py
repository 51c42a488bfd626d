"""What reward tuning does to the bundled model: the chapter's runs of DDPO and DRaFT, judged on prompts and noises of their own.

    make chapter                                                           # with all other methods (train/chapter.py)
    python -m sdcore.train.chapter --only ddpo-jpeg,ddpo-alignment,draft   # these alone

All judge the untuned and the tuned model on the same prompts from the same noises, so differences are taken picture by picture;
an interval is the mean difference ± 1.96 standard errors.

    jpeg        JPEG size is lowered by one run and raised by another: prompts trained on, and prompts that were not
    alignment   the world's checker is the reward; judged on 500 prompts for two things, combinations never shown in training
    draft       the same by gradients of a network that reads pictures (train/eye.py); judged by the checker on the same prompts

The sampler is DDIM of 4 steps, as random as DDPM, without guidance: a twelfth of the work of 25 steps with guidance, and it
leaves the untuned model something to learn.
"""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from sdcore.weights import files
from sdcore.weights.adapters import read_adapter
from torch import Tensor

from sdcore import lora
from sdcore.changes import LowRank
from sdcore.pipeline import Pipeline

from . import guards, judge, liking, rewards
from .dpo import TRIED
from .report import Result, Row, Sheet

if TYPE_CHECKING:
    from .chapter import Workshop

NOTED = {"steps": 4, "guidance": 1.0, "eta": 1.0}
COMMON = "--draw-steps 4 --guidance 1 --layers all --rank 8 --beta2 0.98 --device cpu"
DDPO_PICTURES = 7680  # that DDPO learnt from to gain 12.8 points
PAIRS = ("a green cross and a pink circle", "an orange square and a blue triangle", "a red star and a green square",
         "a pink heart and a yellow cross", "a red circle above a blue square", "a purple cross left of a yellow circle",
         "a blue star right of a pink triangle", "a yellow heart below a red square")  # fmt: skip
OTHERS = ("a blue circle and a red cross", "a pink square above a green star", "a yellow triangle left of a purple square",
          "an orange heart right of a green circle")  # fmt: skip


def pictures(pipe: Pipeline, texts: Sequence[str], seed: int) -> Tensor:
    """Pictures [n, 3, 64, 64] in 0..1, the k-th of noise seed + k."""
    return judge.drawn(pipe, texts, seed, **liking.WAY) / 2 + 0.5


def tuned(shop: "Workshop", run: Path, texts: Sequence[str], seed: int) -> Tensor:
    """Pictures by the model with what a run has learnt."""
    adapter, _ = read_adapter(run / f"{run.name}.safetensors", shop.base)
    with lora.using(shop.base, adapter):
        return pictures(shop.base, texts, seed)


def learnt(checkpoint: Path) -> lora.Adapter:
    """The LoRA that a checkpoint holds, whose alpha is its rank."""
    layers: dict[str, dict[str, Tensor]] = {}
    for name, tensor in files.read(checkpoint / "state.safetensors").tensors.items():
        if name.startswith("weights/lora.unet."):
            layer, _, factor = name.removeprefix("weights/lora.unet.").rpartition(".")
            layers.setdefault(layer.replace("/", "."), {})[factor] = tensor
    return lora.Adapter(
        "then", {"unet": {layer: LowRank(factors["down"], factors["up"]) for layer, factors in layers.items()}}, {}
    )


def sheet(shop: "Workshop", name: str, words: str, rows: Sequence[Tensor]) -> Sheet:
    """A PNG of rows of pictures in 0..1."""
    return shop.sheet(name, words, [(row * 2 - 1).numpy() for row in rows])


def curves(shop: "Workshop", run: Path, words: str) -> Sheet:
    """The run's own picture of its reward and guards."""
    shutil.copy(run / "curves.png", shop.folder / f"curves-{run.name}.png")
    shop.curves.clear()  # the loss of a policy gradient goes nowhere
    return Sheet(f"curves-{run.name}.png", words)


def drawn_by(run: Path, batch: int) -> int:
    """How many pictures a run learnt from."""
    trained, _ = guards.read_log(run / "log.jsonl")
    return batch * max(trained)


def jpeg(shop: "Workshop") -> Result:
    """JPEG size down, and up."""
    for name, texts in (("prompts", PAIRS), ("watched", OTHERS)):
        with files.replacing(shop.folder / f"{name}.txt") as file:
            file.write("".join(f"{text}\n" for text in texts).encode())
    words = (
        f"--prompts {shop.folder / 'prompts.txt'} --watch {shop.folder / 'watched.txt'} --watch-pictures 4 "
        f"--watch-reward checker --until 0.5 --batch 48 --repeat 4 --tracked 16 --least 8 --lr 4e-3 --save-every 5 {COMMON}"
    )
    seen, new = ([text for text in texts for _ in range(96 // len(texts))] for texts in (PAIRS, OTHERS))
    size = rewards.JPEG(+1)
    before = {"seen": pictures(shop.base, seen, 0), "new": pictures(shop.base, new, 1000)}
    rows, sheets, shown = [], [], [before["seen"][::12]]
    lengths = "--steps 28 --cooldown 12 --eval-every 7", "--steps 40 --cooldown 10 --eval-every 10"
    for run_name, sign, length in (("compressibility", -1, lengths[0]), ("incompressibility", +1, lengths[1])):
        run = shop.train("ddpo", run_name, f"--reward {run_name} {length} {words}", common="")
        for kind, asked, seed in (("seen", seen, 0), ("new", new, 1000)):
            after = tuned(shop, run, asked, seed)
            base, found = (size(x, asked) for x in (before[kind], after))
            mean, margin = liking.interval((found - base) / base.mean())
            which = "prompts trained on" if kind == "seen" else "other prompts"
            aim = 0.3 if kind == "seen" else None
            rows.append(Row(f"{run_name}: JPEG kB, {which}", found.mean().item(), base=base.mean().item(), unit="kB"))
            rows.append(
                Row(f"{run_name}: {'smaller' if sign < 0 else 'larger'} by, {which} (± {margin:.1%})", sign * mean, aim)
            )
            if kind == "seen":
                shown.append(after[::12])
        _, evaluated = guards.read_log(run / "log.jsonl")
        last = evaluated[max(evaluated)]
        rows.append(Row(f"{run_name}: diversity of a prompt's pictures", last["diversity"], base=1.0))
        rows.append(Row(f"{run_name}: right of what the prompt says", last["other"]))
        rows.append(Row(f"{run_name}: pictures learnt from", drawn_by(run, 48), unit=""))
        sheets.append(curves(shop, run, f"{run_name}: reward over the updates, and the guards"))
    pair = "Untuned; JPEG size lowered; raised. " + "; ".join(PAIRS)
    return shop.result(
        "DDPO: pictures that compress well, and badly",
        "The reward is the size of the picture as a JPEG of quality 95, which has no gradient: minus it in one run, plus it in "
        "the other. Same prompts, same noises, untuned and tuned. The guards show what it costs.",
        rows,
        [sheet(shop, "jpeg", pair, shown), *sheets],
        {"pictures": len(seen) + len(new), **NOTED},
    )


def on_the_way(shop: "Workshop", run: Path, batch: int, texts: list[str], before: Tensor) -> list[Row]:
    """What a run of `batch` pictures an update had gained at its checkpoints; `before` [n]: what was right, untuned."""
    rows = []
    for step in (20, 40):
        with lora.using(shop.base, learnt(run / "checkpoints" / f"step-{step:08d}")):
            then = judge.drawn(shop.base, texts, TRIED, **liking.WAY) / 2 + 0.5
        mean, half = liking.interval(liking.correct(then, texts) - before)
        rows.append(Row(f"gain after {batch * step} pictures (± {half:.1%})", mean, unit="points"))
    return rows


def alignment(shop: "Workshop") -> Result:
    """More of what the prompt says.

    What a picture shows is decided in the first of the four steps. Later ones draw so little noise that their gradients, which go
    with 1 / std, are many times as large and hold nothing about it (docs/alignment.md has the measurement).
    """
    words = (
        "--reward checker --prompts world:two --until 0.25 --batch 128 --accumulate 2 --repeat 4 --tracked 4 --least 4 --lr 2e-3 "
        "--steps 60 --cooldown 15 --watch held-out:two --watch-prompts 24 --watch-pictures 2 --watch-reward checker:all "
        f"--eval-every 15 --save-every 20 --keep 3 {COMMON}"
    )
    run = shop.train("ddpo", "checker", words, common="")
    texts, (before, after), right = liking.told(shop, run)
    share = rewards.Checker(whole=False)
    shares = [share(x, texts) for x in (before, after)]
    gain, margin = liking.interval(right[1] - right[0])
    return shop.result(
        "DDPO: more of what the prompt says",
        f"The reward is the share right of what the prompt says, read by the world's checker. Judged on {len(texts)} prompts for "
        "two things, each a combination that neither the model nor the tuning was shown; same noises, untuned and tuned.",
        [
            Row("everything right", right[1].mean().item(), base=right[0].mean().item()),
            Row(f"gain (± {margin:.1%})", gain, 0.10, unit="points"),
            Row("lower end of the gain's interval", gain - margin, 0.0, unit="points"),
            *on_the_way(shop, run, 128, texts, right[0]),
            Row("share right", shares[1].mean().item(), base=shares[0].mean().item()),
            Row("pictures learnt from", drawn_by(run, 128), unit=""),
        ],
        [
            sheet(shop, "alignment", "Untuned, tuned: " + "; ".join(texts[:8]), [before[:8], after[:8]]),
            curves(shop, run, "reward over the updates, and the guards"),
        ],
        {"prompts": len(texts), "seed": liking.SEED, **NOTED},
    )


def draft(shop: "Workshop") -> Result:
    """More of what the prompt says, through the sampler.

    Of the four steps, the last two have gradients: what comes back through more of them is mostly noise (docs/alignment.md).
    """
    eye = shop.train("eye", "eye", "--steps 1200", common="") / "eye.safetensors"
    words = (
        f"--reward eye:{eye} --prompts world:two --approach draft --last 2 --eta 1 --batch 32 --lr 2e-3 --steps 80 --cooldown 30 "
        "--watch held-out:two --watch-prompts 24 --watch-pictures 2 --watch-reward checker:all --eval-every 20 --save-every 20 "
        f"--keep 4 {COMMON}"
    )
    run = shop.train("draft", "seen", words, common="")
    texts, (before, after), right = liking.told(shop, run)
    gain, margin = liking.interval(right[1] - right[0])
    seen = rewards.make(f"eye:{eye}", run)
    likes = [seen(x, texts) for x in (before, after)]
    return shop.result(
        "DRaFT: more of what the prompt says",
        "The reward is a network's that learnt to read pictures which the world itself drew; its gradients go back through the "
        f"decoder and the last two of four steps. Judged by the checker, on the same {len(texts)} prompts and noises as DDPO.",
        [
            Row("everything right", right[1].mean().item(), base=right[0].mean().item()),
            Row(f"gain (± {margin:.1%})", gain, 0.128, unit="points"),
            Row("lower end of the gain's interval", gain - margin, 0.0, unit="points"),
            *on_the_way(shop, run, 32, texts, right[0]),
            Row("pictures learnt from", drawn_by(run, 32), DDPO_PICTURES, True, unit=""),
            Row("the eye prefers a right picture to a wrong one, untuned", ranked(likes[0], right[0]), chance=0.5),
            Row("the same, tuned", ranked(likes[1], right[1]), chance=0.5),
        ],
        [
            sheet(shop, "draft", "Untuned, tuned: " + "; ".join(texts[:8]), [before[:8], after[:8]]),
            curves(shop, run, "reward over the updates, and the guards"),
        ],
        {"prompts": len(texts), "seed": liking.SEED, **NOTED},
    )


def ranked(worth: Tensor, right: Tensor) -> float:
    """How often a right picture is worth more than a wrong one, over all pairs of them; worth [n], right [n] of 0 and 1."""
    good, bad = worth[right == 1], worth[right == 0]
    return (good[:, None] > bad).float().mean().item()
