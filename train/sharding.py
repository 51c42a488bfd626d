"""Networks cut up over processes (FSDP2): `torchrun --nproc-per-node 8 -m sdcore train text2image --shard ...`.

Each process keeps its share of every weight, of its moving average and of the optimiser's memory: with n processes, an n-th of
each. A layer's weights are gathered from all just before it computes and let go after it; its gradients are summed over all and
cut up again as soon as they are there. The gradient and the step are those of the whole network (train/ranks.py), since an
optimiser of ENTRYWISE looks at each number by itself.

    cut      the networks, in place: every large linear layer or convolution by itself, and what is left of a network as one
    whole    for as long as it takes to evaluate or export, ordinary networks again, in every process
    ShardedCheckpoints   each process writes its own file, the first publishes; published and verified as ever (checkpoints.py)

Layers are cut, not blocks, because a layer's `forward` is what everything calls: the UNet's keys and values of a text, for
instance, are worked out apart from the block that uses them. The files are safetensors that know which part of a tensor they
hold (torch.distributed.checkpoint's own format would be pickles), so another number of processes can read them as well.

Source: Rajbhandari et al. 2020 (ZeRO, stage 3); Zhao et al. 2023 (FSDP).
"""

import contextlib
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint import CheckpointException, HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from sdcore.errors import TrainingError

from .checkpoints import Checkpoints
from .ranks import Ranks

LARGE = 2**18  # numbers in a layer that is gathered by itself
ENTRYWISE = ("adamw", "lion", "sgd")  # optimisers to which a piece of a weight is as good as the whole


def cut(modules: nn.ModuleDict, world: int, optimiser: str) -> None:
    """Cut up the networks of a task over `world` processes, in place. TrainingError where that cannot be done."""
    if world == 1:
        raise TrainingError(
            "--shard: cuts up over several processes; start them by `torchrun --nproc-per-node N -m sdcore`"
        )
    if optimiser not in ENTRYWISE:
        raise TrainingError(
            f"--shard: goes with --optimiser {', '.join(ENTRYWISE)}; {optimiser} has to see weights whole"
        )
    for name, network in modules.items():
        if type(network).forward is nn.Module.forward:
            raise TrainingError(f"--shard: {name} is small and acts within another network; leave --shard out")
    # Nothing here works in place on what a layer gives, against which torch warns at each.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
    for network in modules.values():
        mesh = init_device_mesh(next(network.parameters()).device.type, (world,))
        layers = [m for m in network.modules() if isinstance(m, nn.Linear | nn.Conv2d) and size(m) >= LARGE]
        for module in [*(layer for layer in layers if layer is not network), network]:
            unit = fully_shard(module, mesh=mesh, reshard_after_forward=True)
            # Gradients are summed over processes: `State.gradients` divides by what they are a mean over. (gloo can only sum.)
            unit.set_gradient_divide_factor(1.0)
            unit.set_force_sum_reduction_for_comms(True)


def size(layer: nn.Module) -> int:
    return sum(p.numel() for p in layer.parameters())


def full(tensor: Tensor) -> Tensor:
    """The tensor itself, gathered where it is in shards."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@contextlib.contextmanager
def whole(modules: nn.ModuleDict) -> Iterator[None]:
    """Inside the `with`, the networks are whole in every process, with ordinary parameters, and need no other process.

    All enter together. What is done to the parameters inside is lost.
    """
    units = [module for module in modules.modules() if isinstance(module, FSDPModule)]
    for unit in units:
        unit.set_reshard_after_forward(False, recurse=False)
        unit.unshard()
    kept = [(module, module._state_dict_pre_hooks, dict(module._parameters)) for module in modules.modules()]
    for module, hooks, parameters in kept:
        module._state_dict_pre_hooks = type(hooks)()  # FSDP's would cut up again before a state_dict
        for name, p in parameters.items():
            if (
                p is not None and p.device.type == "cpu"
            ):  # what was lent to numpy (to write a file) could not be let go again
                module._parameters[name] = nn.Parameter(p.detach().clone(), requires_grad=p.requires_grad)
    try:
        yield
    finally:
        for module, hooks, parameters in kept:
            module._state_dict_pre_hooks = hooks
            module._parameters.update(parameters)
        for unit in units:
            unit.reshard()
            unit.set_reshard_after_forward(True, recurse=False)


class ShardedCheckpoints(Checkpoints):
    """Checkpoints that all processes write together: rank by rank a file shard-0000N-....safetensors in the place of one."""

    def __init__(
        self, folder: Path, keep: int, processes: Ranks, like: Callable[[str, torch.Size, torch.dtype], Tensor]
    ):
        """`like(name, shape, dtype)` gives the empty tensor, in shards or not, that a tensor of a checkpoint is read into."""
        super().__init__(folder, keep)
        self.processes, self.like = processes, like

    def save(self, step: int, tensors: dict[str, Tensor], state: dict) -> Path:
        """As of `Checkpoints.save`; all processes come here, and an error of one is an error of all."""
        final, beside = self.places(step)
        begun = self.processes.largest(self.processes.first and self.begin(final, beside))
        if begun:
            with self.intact(final, beside):
                try:
                    dcp.save(tensors, storage_writer=HuggingFaceStorageWriter(str(beside), save_distributed=True))
                except CheckpointException as error:
                    raise OSError("; ".join(str(fault[0]) for fault in error.failures.values())) from error
                if self.processes.first:
                    self.publish(final, beside, step, state)
        if self.processes.first:
            self.retire()
        return final

    def tensors(self, checkpoint: Path) -> dict[str, Tensor]:
        """This process's shards, whichever number of processes wrote the checkpoint."""
        listed = HuggingFaceStorageReader(str(checkpoint)).read_metadata().state_dict_metadata
        found = {
            name: self.like(name, entry.size, entry.properties.dtype)
            for name, entry in listed.items()
            if isinstance(entry, TensorStorageMetadata)
        }
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")  # each reads by itself
            dcp.load(found, storage_reader=HuggingFaceStorageReader(str(checkpoint)), no_dist=True)
        return found
