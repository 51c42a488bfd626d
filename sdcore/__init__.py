"""sdcore: Stable Diffusion from scratch in PyTorch, readable, and provably the released model.

    import sdcore
    pipe = sdcore.load("tiny")
    pipe("a red circle above a blue square").images[0].save("out.png")

Importing this does nothing else. `load` reaches for the folder `weights`, which knows files and names; where `sdcore/` was
copied alone into another runtime, build the modules yourself: `sdcore.unet.UNet(config)` and `load_state_dict`.
`accelerate` likewise reaches for the folder `kernels`: `sdcore.accelerate(pipe)` draws the same pictures sooner.
"""

from typing import Any

__version__ = "0.1.0"


def load(name: str, **options: Any):
    """A model by name, folder, file or hub id -> Pipeline. See `sdcore.weights.load.load` for `options` (device, dtype, ...)."""
    try:
        from sdcore.weights.load import load as load_
    except ModuleNotFoundError as error:
        if error.name not in ("sdcore.weights", "sdcore.weights.load"):
            raise
        raise ModuleNotFoundError(
            "sdcore.load needs the folder weights/, which is not installed beside this copy of sdcore: install the "
            "package (pip install -e .), or build the modules yourself with load_state_dict",
            name=error.name,
        ) from None
    return load_(name, **options)


def accelerate(pipe, **options: Any):
    """A pipeline with the same call that draws the same pictures sooner. See `sdcore.kernels.engine.accelerate`."""
    try:
        from sdcore.kernels.engine import accelerate as accelerate_
    except ModuleNotFoundError as error:
        if error.name not in ("sdcore.kernels", "sdcore.kernels.engine"):
            raise
        raise ModuleNotFoundError(
            "sdcore.accelerate needs the folder kernels/, which is not installed beside this copy of sdcore: install the "
            "package (pip install -e .); the pipeline draws the same pictures without it",
            name=error.name,
        ) from None
    return accelerate_(pipe, **options)
