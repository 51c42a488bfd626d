"""Models for the tests of weight files: the smallest complete one, and official sizes that take no memory."""

import torch
from sdcore.weights import checkpoint as ck
from sdcore.weights import convert
from sdcore.weights.assemble import skeleton
from torch import Tensor

from sdcore.clip import CLIPTextConfig
from sdcore.scheduler import SD15_SCHEDULER
from sdcore.unet import UNetConfig
from sdcore.vae import VAEConfig

SMALLEST = {
    "unet": UNetConfig(
        sample_size=4, channels=(8, 8), layers=1, depths=(1, 0), heads=(2, 2), context_dim=8, cross_only=(False, False),
        norm_groups=4,
    ),
    "vae": VAEConfig(channels=(8, 8), layers=1, sample_size=8, norm_groups=4),
    "text_encoder": CLIPTextConfig(8, 1, 2, 16, positions=8, vocab=40, eos_id=39),
    "scheduler": SD15_SCHEDULER,
}  # fmt: skip


def smallest(path) -> ck.Checkpoint:
    """The smallest complete SD 1.x, of random weights."""
    generator = torch.Generator().manual_seed(0)
    tensors = {
        part: {
            name: torch.randn(t.shape, generator=generator) for name, t in skeleton(part, config).state_dict().items()
        }
        for part, config in SMALLEST.items()
        if part != "scheduler"
    }
    return ck.Checkpoint(path, "diffusers", "sd1", dict(SMALLEST), tensors, {})


def single_tensors(checkpoint: ck.Checkpoint) -> dict[str, Tensor]:
    """The tensors of the original single-file layout."""
    single = {}
    for part, own in checkpoint.tensors.items():
        prefix, spelling = convert.prefix_of(part, checkpoint.family)
        for name, tensor in convert.to_single(part, spelling, own, checkpoint.configs[part]).items():
            single[prefix + name] = tensor
    return single


class Pool:
    """Tensors of any size, no two alike, as views of one block of random numbers: a 7 GB model in 50 MB."""

    def __init__(self, dtype: torch.dtype = torch.float16, size: int = 75_000_000, seed: int = 0):
        generator = torch.Generator().manual_seed(seed)
        block = torch.randn(1 << 20, generator=generator).to(dtype)
        self.numbers = block.repeat(-(-size // len(block)) + 1)[: size + 2**20]
        self.at = 0

    def tensor(self, shape) -> Tensor:
        self.at = (self.at + 7919) % 2**20
        count = torch.Size(shape).numel()
        return self.numbers[self.at : self.at + count].view(shape)

    def state(self, part: str, config) -> dict[str, Tensor]:
        return {name: self.tensor(t.shape) for name, t in skeleton(part, config).state_dict().items()}
