"""Fine-tuning: every weight of a UNet goes on learning, from a folder of captioned pictures.

    sdcore train finetune --data pictures --model sd15 --out runs/tuned      # `text2image --data pictures` is the same
    sdcore generate "a lighthouse" --model runs/tuned/model

This is how the model came to be, gone on with: the loss is train/tuning.py's with nothing overridden, and the whole UNet trains,
in fp32. That takes much memory: with gradients, AdamW and the average 20 bytes a weight, 16 GiB for SD 1.5, and what is computed
comes on top. `--ema 0`, `--optimiser adafactor`, `--fused-step` and `--memory` each take less.

Source: Rombach et al. 2022, equation 3; one caption in ten is dropped for guidance, Ho & Salimans 2022.
"""

from dataclasses import dataclass
from pathlib import Path

from .loop import run
from .options import option, parse
from .tuning import Tune, TuneOptions, load
from .twin import write_model


@dataclass(frozen=True)
class FinetuneOptions(TuneOptions):
    """Train all weights of a model's UNet on a folder of captioned pictures."""

    lr: float = option(1e-5, "peak learning rate; about a third of it for lion, 1 for prodigy, which finds it itself")
    dropout: float = option(0.1, "share of captions replaced by the empty one, for classifier-free guidance")


class Finetune(Tune):
    """Fine-tuning as train/tuning.py has it, and the whole model as its result."""

    def export(self, out: Path) -> None:
        """model/, a folder as diffusers has it, in the precision of the model that it came from."""
        write_model(out, self.options.model, self.modules, self.scheduler)


def main(argv: list[str] | None = None) -> int:
    """`sdcore train finetune`."""
    options = parse(FinetuneOptions, argv, prog="sdcore train finetune")
    return run(Finetune(options, load(options)), options)
