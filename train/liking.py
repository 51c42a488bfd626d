"""DPO on the bundled model, for the report of train/chapter.py: a rule that it learns to please, and the exact checker.

Pairs are drawn by the untuned model and labelled by a rule. Then the tuned model and the untuned one draw from noise that no pair
was drawn from, and each time the rule says which of the two it prefers. By the checker, the prompts are of two objects; the pairs
have no combination that training never showed, the prompts of the figures have one each.
"""

import math
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from sdcore.weights.adapters import read_adapter

from sdcore import lora

from . import judge, rewards, world
from .dpo import TRIED
from .prompts import of_world

if TYPE_CHECKING:
    from .chapter import Workshop
    from .report import Result

RULE = '''"""Warm pictures: how much more red than blue there is."""


def reward(pictures, prompts):
    return (pictures[:, 0] - pictures[:, 2]).mean(dim=(1, 2))
'''
WAY = dict(sampler="ddim", steps=4, guidance=1.0, eta=1.0)  # few steps and no guidance: something is left to be mended
COMMON = "--resolution 64 --guidance 1 --sampler ddim --sampler-steps 4 --eta 1 --beta 100 --warmup 10 --save-every 40"
SEED = 20_000  # of the judged prompts, as train/judge.py has them
COUNT = 500  # of them
PAIRS = 1500  # drawn to learn from


def dpo(shop: "Workshop") -> "Result":
    """Two LoRAs: one that learnt to please a rule, one that learnt from the checker to draw what the prompt says."""
    from .report import Row

    (shop.folder / "warm.py").write_text(RULE)
    (shop.folder / "prompts.txt").write_text("\n".join(vague()) + "\n")
    words = f"--reward {shop.folder / 'warm.py'} --pair-prompts {shop.folder / 'prompts.txt'} --pairs 160"
    rule = shop.train("dpo", "rule", f"{words} --steps 40 --batch 16 --lr 1e-3", COMMON)
    words = f"--reward checker --pair-prompts world:two --pairs {PAIRS}"
    words += " --layers all --steps 240 --batch 16 --lr 5e-4 --cooldown 100"  # the attentions alone gain less
    right = shop.train("dpo", "checker", words, COMMON)

    warm, texts = rewards.make(str(shop.folder / "warm.py"), shop.folder), (vague() * 6)[:200]
    base, tuned = both(shop, rule / "rule.safetensors", texts)
    worth = [warm(pictures, texts) for pictures in (base, tuned)]
    wins = (worth[1] > worth[0]).float() + 0.5 * (worth[1] == worth[0])

    texts, (before, after), verdicts = told(shop, right)
    gain, half = interval(verdicts[1] - verdicts[0])
    return shop.result(
        "DPO: what a rule, or the checker, prefers",
        "From 160 pairs labelled by how much more red than blue they hold; and from the pictures of "
        f"{PAIRS} prompts of two things, two of each, of which those pairs count that the checker finds unlike. Everything is "
        "drawn in 4 steps of ddim, without guidance, eta 1. "
        f"The rule is judged on 200 noises, the checker on {COUNT} prompts.",
        [
            Row("tuned preferred by the rule, held-out noises", wins.mean().item(), 0.7, chance=0.5),
            Row("two objects: everything right", verdicts[1].mean().item(), None, False, verdicts[0].mean().item()),
            Row("gain", gain, half, unit="points"),
            Row("half of the gain's 95 % interval", half, unit="points"),
            Row("pictures generated", 2 * PAIRS, unit=""),
        ],
        [
            shop.sheet("rule", "Untuned, tuned to warmth: " + "; ".join(vague()[:8]), [as_drawn(base), as_drawn(tuned)]),
            shop.sheet("checker", "Untuned, tuned by the checker: " + "; ".join(texts[:8]), [as_drawn(before), as_drawn(after)]),
        ],
        {"prompts": COUNT, "seed": SEED, "steps": WAY["steps"], "guidance": WAY["guidance"]},  # type: ignore[dict-item]
    )  # fmt: skip


def vague() -> list[str]:
    """Prompts that leave the background, the place, the size and the texture free."""
    pairs = [(colour, shape) for colour in world.COLOURS for shape in world.SHAPES if shape != world.SUBJECT]
    return [f"{world.article(c)} {c} {s}" for c, s in pairs if (c, s) not in world.HELD_OUT_PAIRS]


def both(shop: "Workshop", file, texts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Pictures [n, 3, 64, 64] in 0..1 of the untuned and the tuned model, from the same held-out noise."""
    base = judge.drawn(shop.base, texts, TRIED, **WAY)
    adapter, _ = read_adapter(file, shop.base)
    lora.attach(shop.base, adapter)
    tuned = judge.drawn(shop.base, texts, TRIED, **WAY)
    lora.detach(shop.base)
    return base / 2 + 0.5, tuned / 2 + 0.5


def told(shop: "Workshop", run: Path) -> tuple[list[str], tuple[torch.Tensor, torch.Tensor], list[torch.Tensor]]:
    """The prompts that all are judged on, their pictures untuned and tuned by a run, and which of these are right [n]."""
    texts = of_world((2,), COUNT, SEED, held_out=True)
    drawn = both(shop, run / f"{run.name}.safetensors", texts)
    return texts, drawn, [correct(pictures, texts) for pictures in drawn]


def interval(differences: torch.Tensor) -> tuple[float, float]:
    """The mean of differences [n], and what is to be added on both sides for 95 %."""
    return differences.mean().item(), 1.96 * differences.std().item() / math.sqrt(len(differences))


def correct(pictures: torch.Tensor, texts: list[str]) -> torch.Tensor:
    """1 for each picture that shows everything its prompt says, else 0 [n]."""
    return rewards.Checker(whole=True)(pictures, texts)


def as_drawn(pictures: torch.Tensor) -> np.ndarray:
    """In -1..1, as sheets want them."""
    return (pictures * 2 - 1).numpy()
