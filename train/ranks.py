"""Several processes that train as one: `torchrun --nproc-per-node 2 -m sdcore train ...`.

Every process takes its own share of each batch (`shares`: consecutive places, none twice), works out the gradients of all its
passes, and adds them to those of the others (`add_up`); divided by the counts of all, that is the gradient of the whole batch,
so every process makes the same step. The first process alone writes: the log, checkpoints, evaluations, the result.

The sum is made after the last pass, in buckets of 25 MB. (torch's DDP wrapper would overlap it with the backward pass, but it
averages over processes as if all had looked at equally much, and wants to wrap the module whose forward is called.)
With --shard the networks are cut up over the processes instead (sharding.py), and gradients are added up where they arise.
"""

import atexit
import contextlib
import datetime
import os
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from sdcore.errors import TrainingError

BUCKET = 25 * 2**20  # bytes


@dataclass(frozen=True)
class Ranks:
    """Which of how many processes this is."""

    rank: int = 0
    world: int = 1

    @property
    def first(self) -> bool:
        """Whether this process is the one that writes."""
        return self.rank == 0

    def shares(self, batch: int, accumulate: int) -> list[range]:
        """The places 0..batch-1 that this process looks at, pass by pass: of all shares of all processes, each place is in one.

        TrainingError where there are more shares than examples.
        """
        parts = self.world * accumulate
        if not 1 <= accumulate <= parts <= batch:
            raise TrainingError(
                f"--batch {batch}: cannot be cut into {parts} parts ({self.world} processes x {accumulate} passes); "
                "raise --batch, or lower --accumulate"
            )
        edges = [batch * i // parts for i in range(parts + 1)]
        return [range(edges[i], edges[i + 1]) for i in range(self.rank * accumulate, (self.rank + 1) * accumulate)]

    def add_up(self, tensors: list[Tensor]) -> None:
        """Replace each tensor by its sum over all processes, in place."""
        if self.world == 1:
            return
        while tensors:
            take, size = 0, 0
            while take < len(tensors) and (take == 0 or size + tensors[take].nbytes <= BUCKET):
                size += tensors[take].nbytes
                take += 1
            bucket, tensors = tensors[:take], tensors[take:]
            flat = torch.cat([t.flatten() for t in bucket])
            dist.all_reduce(flat)
            for t, summed in zip(bucket, flat.split([t.numel() for t in bucket]), strict=True):
                t.copy_(summed.view(t.shape))

    def totals(self, values: list[float]) -> list[float]:
        """Each number's sum over all processes."""
        if self.world == 1:
            return values
        summed = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(summed)
        return summed.tolist()

    def largest(self, value: int) -> int:
        """The largest of all processes' numbers."""
        if self.world == 1:
            return value
        found = torch.tensor(int(value))
        dist.all_reduce(found, dist.ReduceOp.MAX)
        return int(found)


def present() -> Ranks:
    """Which process this is, of those that `joined`."""
    return Ranks(dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else Ranks()


@contextlib.contextmanager
def joined() -> Iterator[Ranks]:
    """Inside the `with`, this process is one of those that torchrun started; alone where none did."""
    if not dist.is_torchelastic_launched():
        yield Ranks()
        return
    # Numbers travel on the CPU beside the tensors, so both backends are needed where there are GPUs.
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    # Once a process, left at its end: a group that is joined anew through the same store can wait for itself for ever.
    if not dist.is_initialized():
        dist.init_process_group(
            backend, timeout=datetime.timedelta(hours=2)
        )  # the others wait while the first evaluates
        atexit.register(dist.destroy_process_group)
    yield Ranks(dist.get_rank(), dist.get_world_size())
