"""Triton kernels for the operations of `sdcore.ops`, the engine that runs pipelines on them, and the bench that judges them.

    from sdcore import kernels, ops

    with ops.using(**kernels.for_ops()):        # every operation that has a kernel; what a kernel refuses runs in PyTorch
        picture = pipe("a red circle")

    kernels.accelerate(pipe)("a red circle")    # the same, and everything else that makes the loop fast

Nothing is imported before it is asked for: `import sdcore.kernels` needs no Triton.
"""

from collections.abc import Callable, Iterator, Mapping
from importlib import import_module
from typing import Any

# What is launched -> its file. The first five are operations of `sdcore.ops`; the others take weights and belong to the engine.
FILES = {
    "attention": "attention",
    "group_norm": "group_norm_silu",
    "group_norm_silu": "group_norm_silu",
    "layer_norm": "layer_norm",
    "geglu": "geglu",
    "add_layer_norm": "layer_norm",
    "vae_attention": "vae_attention",
    "upsample_conv": "upsample_conv",
    "conv": "conv",
    "gemm": "gemm",
    "lora_linear": "lora_linear",
    "guidance_step": "guidance_step",
    "fp8_linear": "fp8",
    "fp8_conv": "fp8",
}


class Kernels(Mapping[str, Callable]):
    """Name -> launcher; the file is imported when its kernel is first asked for."""

    def __getitem__(self, name: str) -> Callable:
        return getattr(import_module(f"{__name__}.{FILES[name]}"), name)

    def __iter__(self) -> Iterator[str]:
        return iter(FILES)

    def __len__(self) -> int:
        return len(FILES)


KERNELS = Kernels()


def for_ops() -> dict[str, Callable]:
    """The kernels of the operations of `sdcore.ops`, as `ops.using` takes them."""
    from sdcore import ops

    return {name: KERNELS[name] for name in FILES if name in ops.REFERENCES}


def accelerate(pipe: Any, **options: Any) -> Any:
    """A pipeline that draws the same pictures faster; see `engine.accelerate`."""
    from sdcore.kernels import engine

    return engine.accelerate(pipe, **options)
