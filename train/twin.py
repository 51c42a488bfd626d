"""What the methods have in common that look back at the model they began with: `Twin`.

What trains is a LoRA (`--adapter lora`; train/lora.py and all its options) or the whole UNet (`--adapter none`). Either way the
model as it was stays at hand: inside `with self.untuned():` the UNet of the pipeline is the one from before, at no cost with the
LoRA, which is then off, or as a frozen copy.
"""

import copy
import shutil
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from sdcore.weights import checkpoint as ck
from sdcore.weights import convert, fetch
from torch import nn

from sdcore.errors import ConfigError
from sdcore.pipeline import Pipeline
from sdcore.scheduler import SchedulerConfig
from sdcore.unet import UNet

from .lora import LoRAOptions, TrainLoRA
from .options import option
from .tuning import Tune


@dataclass(frozen=True)
class TwinOptions(LoRAOptions):
    """What trains."""

    adapter: str = option("lora", "lora: a LoRA trains, the model stays as it is; none: all weights of the UNet train")


class Twin(TrainLoRA):
    """A UNet that trains, by a LoRA or itself, beside what it was."""

    options: TwinOptions

    def begin(self) -> None:
        o = self.options
        if o.adapter not in ("none", "lora"):
            raise ConfigError(f"--adapter: expected none or lora, found {o.adapter!r}")
        if o.adapter == "none" and o.text_encoder:
            raise ConfigError("--text-encoder: the text encoders learn by a LoRA only here; add --adapter lora")
        if o.adapter == "lora":
            super().begin()
            return
        Tune.begin(self)
        self.frozen = copy.deepcopy(self.pipe.unet).requires_grad_(False)

    def untuned(self) -> AbstractContextManager[None]:
        """Inside the `with`, the pipeline's UNet is the one that it was."""
        return self.lora.off() if self.options.adapter == "lora" else replaced_by(self.pipe, self.frozen)

    def export(self, out: Path) -> None:
        """The LoRA's files; or model/, a folder as diffusers has it, in the precision of the model that it came from."""
        if self.options.adapter == "lora":
            super().export(out)
            return
        write_model(out, self.options.model, {"unet": self.modules["unet"]}, self.scheduler)


@contextmanager
def replaced_by(pipe: Pipeline, unet: UNet) -> Iterator[None]:
    """Inside the `with`, a pipeline draws with another UNet."""
    own, pipe.unet = pipe.unet, unet
    try:
        yield
    finally:
        pipe.unet = own


def write_model(out: Path, model: str, parts: dict[str, nn.Module], told: SchedulerConfig | None = None) -> None:
    """`out`/model: the model folder or file `model` with these parts in the place of its own, in the precision of those.

    `told` is the schedule that they were trained on, where it is another one.
    """
    source = ck.read(fetch.resolve(model))
    for part, module in parts.items():
        before = source.tensors[part]
        source.tensors[part] = {name: p.detach().to(before[name].dtype) for name, p in module.state_dict().items()}
    if told is not None:
        source.configs["scheduler"] = replace(
            source.scheduler, prediction_type=told.prediction_type, zero_snr=told.zero_snr
        )
    shutil.rmtree(out / "model", ignore_errors=True)
    convert.write_folder(source, out / "model")
    print(f"the model is in {out / 'model'}", file=sys.stderr)
