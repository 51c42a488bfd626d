"""What tests of training share: a task that is worked out by hand, a run that is cut off, and what a run left behind."""

from pathlib import Path

import torch
from safetensors.torch import load_file
from sdcore.train import loop

from tests import tiny_models


def final(out: Path) -> dict[str, torch.Tensor]:
    """The state of a run's newest checkpoint, out of the file's reach."""
    tensors = load_file(sorted((out / "checkpoints").glob("step-*"))[-1] / "state.safetensors")
    return {name: tensor.clone() for name, tensor in tensors.items()}


def assert_same_bits(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys() and len(a) > 3
    assert [k for k in a if not torch.equal(a[k], b[k])] == []


class Line(loop.Task):
    """Fit y = 2 x: what the loop does to it can be worked out by hand."""

    def __init__(self, poison: range = range(0)):
        torch.manual_seed(0)
        self.modules = {"line": torch.nn.Linear(3, 1)}
        self.poison = poison

    def loss(self, part):
        x = part.of(torch.randn(part.batch, 3, generator=part.common()))
        loss = (self.modules["line"](x) - 2 * x.sum(dim=1, keepdim=True)).square().mean()
        return loop.Loss(loss * (float("nan") if part.step in self.poison else 1.0), len(x))


def line_options(out: Path, **changes) -> loop.LoopOptions:
    defaults = dict(steps=40, batch=4, warmup=4, cooldown=10, save_every=5, log_every=4, ema=0.9, threads=1)
    return loop.LoopOptions(out=str(out), **(defaults | changes))


class Cut(Exception):
    """The run ends without warning, as by a power cut."""


def cut_at(task, step: int):
    """The task, which ends so at a step."""
    whole = task.loss

    def loss(part):
        if part.step == step:
            raise Cut
        return whole(part)

    task.loss = loss
    return task


PROMPTS = ["a red circle", "a green square above a blue circle", "photo of a cat"]


def rewarded(folder: Path, reward: str) -> Path:
    """What tuning to a reward takes: small random models sd1 and sdxl, prompts.txt, and red.py, which holds the reward."""
    for family in ("sd1", "sdxl"):
        tiny_models.write_folder(folder / family, family, seed=3)
    (folder / "prompts.txt").write_text("\n".join(PROMPTS))
    (folder / "red.py").write_text(reward)
    return folder
