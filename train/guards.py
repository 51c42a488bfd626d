"""Guards: what a reward does not see while a model is tuned to it, and rules that stop the run.

A model can earn more of a reward by drawing the same picture every time, or noise, or what only its training prompts ask for. At
each evaluation the guards draw pictures of prompts of their own (--watch), always from the same noises, and report

    held_out         the run's own reward on them: does it hold beyond the prompts trained on?
    other            another reward (--watch-reward), which nothing is tuned to
    diversity        how far apart the pictures of one prompt are (root mean square over all pairs), the untuned model's being 1
    distance         how far the latents are from the untuned model's of the same noise; 1: as far as another of its pictures

beside the same figures of the untuned model. `--stop "diversity<0.5,held_out<0.2"` ends the run when one of them holds. The
sheets samples/step-....png show the first pictures, below the untuned model's; curves.png the run's reward, and the guards.

Legend: k prompts, m pictures of each, c h w latent, H W pixels.
"""

import contextlib
import json
import operator
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from sdcore import image
from sdcore.errors import ConfigError
from sdcore.samplers import sample

from . import rewards

if TYPE_CHECKING:
    from .policy import Policy

FIGURES = ("held_out", "other", "diversity", "distance")
RULE = re.compile(r"(\w+)(<|>)(-?[\d.]+(?:e-?\d+)?)")
SHOWN = 8  # prompts on a sheet
PART = 16  # pictures drawn together


class Guards:
    """Pictures of held-out prompts by the model as it is, against those by the model as it was when this was made."""

    def __init__(self, policy: "Policy"):
        from .policy import WATCHED, read_prompts

        o = policy.options
        self.policy, self.m = policy, o.watch_pictures
        texts = read_prompts(o.watch or "", o.watch_prompts, WATCHED)
        self.prompts = [text for text in texts for _ in range(self.m)]
        # People are asked about what the model learns from, not about what it is watched by.
        self.asked: dict[str, rewards.Reward] = {} if policy.reward.waits else {"held_out": policy.reward}
        if o.watch_reward:
            self.asked["other"] = rewards.make(o.watch_reward, policy.out, policy.pipe.device)
        self.before, self.pictures = self.draw()
        self.spread = spread(self.pictures, self.m)
        self.step = spread(self.before, self.m)  # from a picture to another one of its prompt
        self.base = self.worth(self.pictures) | {"diversity": 1.0, "distance": 0.0}
        if why := broken(o.stop, self.base):
            raise ConfigError(f"--stop {why}, of the untuned model already; choose another limit")

    @torch.no_grad()
    def draw(self) -> tuple[Tensor, Tensor]:
        """Latents [k m, c, h, w] and pictures [k m, 3, H, W] in 0..1, from the noises that are the same every time."""
        policy, found = self.policy, []
        for i in range(0, len(self.prompts), PART):
            prompts = self.prompts[i : i + PART]
            noise = policy.noise(*[(i + j, 0, 30) for j in range(len(prompts))])
            *_, (_, x, _) = sample(policy.denoiser(prompts), policy.start(noise), policy.steps, noise=noise)
            found.append(x)
        latents = torch.cat(found)
        return latents.cpu(), policy.pictures(latents).cpu()

    def worth(self, pictures: Tensor) -> dict[str, float]:
        """The mean of each reward."""
        out = self.policy.out
        return {
            name: rewards.judged(reward, pictures.to(self.policy.pipe.device), self.prompts, out).mean().item()
            for name, reward in self.asked.items()
        }

    def figures(self, step: int, out: Path) -> dict[str, float]:
        """All figures of the model as it is; a sheet of pictures goes to `out`/samples."""
        latents, pictures = self.draw()
        (out / "samples").mkdir(parents=True, exist_ok=True)
        first = [i * self.m for i in range(min(SHOWN, len(self.prompts) // self.m))]
        shown = image.to_pictures(torch.cat([self.pictures[first], pictures[first]]) * 2 - 1)
        image.grid(shown, columns=len(first)).save(out / "samples" / f"step-{step:08d}.png")
        moved = (latents - self.before).square().flatten(1).mean(dim=1).sqrt().mean().item()
        return {
            **self.worth(pictures),
            "diversity": spread(pictures, self.m) / max(self.spread, 1e-12),
            "distance": moved / max(self.step, 1e-12),
            **{f"{name}_untuned": self.base[name] for name in self.asked},
        }


def spread(x: Tensor, m: int) -> float:
    """The mean distance (root mean square) between the m tensors of one prompt, over all pairs and prompts; x [k m, ...]."""
    groups = x.flatten(1).unflatten(0, (-1, m))  # k m pixels
    apart = (groups[:, :, None] - groups[:, None]).square().mean(dim=-1).sqrt()  # k m m
    return (apart.sum() / (len(groups) * m * (m - 1))).item()


# ---------------------------------------------------------------------------------------------------------------- the rules


def check(rules: Sequence[str]) -> None:
    """ConfigError for a rule that cannot be read."""
    for rule in rules:
        found = RULE.fullmatch(rule.replace(" ", ""))
        if not found or found[1] not in FIGURES:
            raise ConfigError(
                f"--stop {rule}: expected FIGURE<NUMBER or FIGURE>NUMBER, figures being {', '.join(FIGURES)}"
            )


def broken(rules: Sequence[str], figures: dict[str, float]) -> str | None:
    """The first rule that holds, with the figure; None where none does. ConfigError: a figure that these guards do not have."""
    for rule in rules:
        name, sign, limit = RULE.fullmatch(rule.replace(" ", "")).groups()  # type: ignore[union-attr]
        if name not in figures:
            raise ConfigError(
                f"--stop {rule}: {name} is not watched here (held_out, unless people are asked; --watch-reward)"
            )
        if (operator.lt if sign == "<" else operator.gt)(figures[name], float(limit)):
            return f"{rule}: {name} is {figures[name]:.4g}"
    return None


# --------------------------------------------------------------------------------------------------------------- the curves


def read_log(log: Path) -> tuple[dict[int, dict], dict[int, dict]]:
    """The lines of a run's log by step, the last of each: of training, and of evaluations."""
    trained: dict[int, dict] = {}
    evaluated: dict[int, dict] = {}
    for line in log.read_text().splitlines() if log.exists() else []:
        with contextlib.suppress(ValueError):  # a line cut by a kill
            entry = json.loads(line)
            if entry.get("event") == "evaluated":
                evaluated[entry["step"]] = entry
            elif "reward" in entry:
                trained[entry["step"]] = entry
    return trained, evaluated


def draw_curves(out: Path, base: dict[str, float], last: dict[str, float]) -> None:
    """OUT/curves.png: the reward of the run over its steps, and beside it each guard, which begins with the untuned model."""
    trained, evaluated = read_log(out / "log.jsonl")
    evaluated = {0: base} | evaluated | {int(last["step"]): last}
    panels = {"reward": [(step, line["reward"]) for step, line in sorted(trained.items())]}
    for name in FIGURES:
        if name in base:
            panels[name] = [(step, line[name]) for step, line in sorted(evaluated.items()) if name in line]
    draw_panels(out / "curves.png", panels)


def draw_panels(
    png: Path, panels: Mapping[str, Sequence[tuple[float, float]]], size: tuple[int, int] = (300, 220)
) -> None:
    """Curves side by side, each with its own scale upwards."""
    width, height = size
    sheet = Image.new("RGB", (width * len(panels), height), "white")
    draw = ImageDraw.Draw(sheet)
    for k, (name, points) in enumerate(panels.items()):
        left, right, top, bottom = k * width + 48, (k + 1) * width - 12, 24, height - 26
        draw.text((left, 6), name, fill="#1f4e99")
        if not points:
            continue
        xs, ys = zip(*points, strict=True)
        low, high = min(ys), max(ys)
        low, high = (low - 0.5, high + 0.5) if high == low else (low, high)
        end = max(xs) or 1
        for i in range(5):
            y = bottom + (top - bottom) * i / 4
            draw.line([(left, y), (right, y)], fill="#dddddd")
            draw.text((k * width + 4, y - 6), f"{low + (high - low) * i / 4:.3g}", fill="#555555")
        for share in (0, 0.5, 1):
            draw.text((left + (right - left) * share - 10, bottom + 8), f"{end * share:.0f}", fill="#555555")
        trace = [
            (left + (right - left) * x / end, bottom + (top - bottom) * (y - low) / (high - low)) for x, y in points
        ]
        draw.line(trace, fill="#1f4e99", width=2)
    sheet.save(png)
