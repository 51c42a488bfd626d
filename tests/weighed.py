"""A task whose examples weigh differently, in fp64: what passes and processes must be averaged by. Run by torchrun, it trains."""

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from sdcore.train import loop, ranks, state


class Weighed(loop.Task):
    """A weighted mean over examples that are drawn each from its own stream. Dies without warning before step `dies`."""

    def __init__(self, dies: int = -1):
        torch.manual_seed(0)
        self.modules = {
            "net": torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.Tanh(), torch.nn.Linear(5, 1)).double()
        }
        self.dies = dies

    def loss(self, part):
        if part.step == self.dies:
            raise InterruptedError
        rows = torch.stack([torch.randn(4, generator=rng, dtype=torch.float64) for rng in part.own()])
        x, weights = rows[:, :3], rows[:, 3].exp()
        error = (self.modules["net"](x)[:, 0] - x.sum(dim=1)).square()
        return loop.Loss((weights * error).sum() / weights.sum(), weights.sum().item())


def options(out: Path, **changes) -> loop.LoopOptions:
    defaults = dict(steps=8, batch=7, warmup=2, cooldown=2, save_every=3, log_every=4, ema=0.9, threads=1)
    return loop.LoopOptions(out=str(out), **(defaults | changes))


def gradients(o: loop.LoopOptions, processes: ranks.Ranks) -> dict[str, torch.Tensor]:
    """The gradients of the first step, and its loss."""
    now = state.State(Weighed(), o, processes)
    figures = now.gradients(0)
    return {name: p.grad.clone() for name, p in now.trained.items()} | {"loss": torch.tensor(figures["loss"]).double()}


if __name__ == "__main__":
    out = Path(sys.argv[1])
    with ranks.joined() as processes:
        assert processes.world == 2
        save_file(gradients(options(out, accumulate=2), processes), out / f"gradients-{processes.rank}.safetensors")
    try:
        loop.run(Weighed(dies=5), options(out / "run"))
    except InterruptedError:
        sys.exit(loop.run(Weighed(), options(out / "run", resume=True)))
