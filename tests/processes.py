"""A method in two processes, whole in each and in shards: run by torchrun for tests/test_sharding.py.

torchrun --nproc-per-node 2 -m tests.processes FOLDER       FOLDER/options.json holds DreamBooth's options
"""

import json
import sys
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from sdcore.train import loop, ranks, sharding, state, tuning
from sdcore.train.dreambooth import DreamBooth, DreamBoothOptions

from sdcore.errors import TrainingError

sharding.LARGE = 20_000  # so that layers of a small network are gathered by themselves


class Watched(DreamBooth):
    """DreamBooth that notes which examples it is shown, and dies without warning before step `dies`."""

    dies = -1

    def loss(self, part):
        if part.step == self.dies:
            raise InterruptedError
        self.__dict__.setdefault("shown", []).append([part.step, list(part.places)])
        return super().loss(part)


def gradients(o: DreamBoothOptions, processes: ranks.Ranks) -> dict[str, torch.Tensor]:
    """The gradients of the first step, whole, and its loss."""
    now = state.State(Watched(o, tuning.load(o)), o, processes)
    figures = now.gradients(0)
    found = {name: sharding.full(p.grad).clone() for name, p in now.trained.items() if p.grad is not None}
    return found | {"loss": torch.tensor(figures["loss"])}


def train(o: DreamBoothOptions, dies: int = -1) -> Watched:
    task = Watched(o, tuning.load(o))
    task.dies = dies
    loop.run(task, o)
    return task


def main(folder: Path) -> None:
    o = DreamBoothOptions(**json.loads((folder / "options.json").read_text()))
    with ranks.joined() as processes:
        rank = processes.rank
        for name, shard in (("whole", False), ("shards", True)):
            found = gradients(replace(o, shard=shard), processes)
            if processes.first:
                save_file(found, folder / f"gradients-{name}.safetensors")
    for name, shard in (("whole", False), ("shards", True)):
        task = train(replace(o, shard=shard, out=str(folder / name)))
        (folder / f"shown-{name}-{rank}.json").write_text(json.dumps(task.shown))
    a = replace(o, shard=True, optimiser="adamw", accumulate=2, resolution=64, eval_every=0, best=None)
    train(replace(a, out=str(folder / "adamw")))
    b = replace(a, out=str(folder / "cut"))
    try:
        train(b, dies=1)
    except InterruptedError:
        train(replace(b, resume=True))

    # A disk without room for the second process is an error of both, and what was there stays.
    write = sharding.HuggingFaceStorageWriter.write_data

    def full(self, plan, planner):
        if rank == 1:
            raise OSError(28, "No space left on device")
        return write(self, plan, planner)

    sharding.HuggingFaceStorageWriter.write_data = full
    try:
        train(replace(b, resume=True, steps=3, accept_changes=True))
    except TrainingError as error:
        (folder / f"error-{rank}.txt").write_text(str(error))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
