"""ControlNet: teach a model to follow a picture of outlines, depth, poses, or whatever pairs it is shown.

    sdcore train controlnet --data pictures --model sd15 --out runs/canny               # Canny's edges, made on the fly
    sdcore train controlnet --data pictures --control depth_maps --model sd15 --out runs/depth

What trains: a copy of the UNet's encoder with a stem for the control picture, whose results reach the UNet through convolutions
that begin as zeros (sdcore/controlnet.py). So the first step starts from the UNet's own answer, to the bit, and the UNet stays as
it is. The loss is that of fine-tuning. Half of the captions are dropped: where the words say nothing, the control has to be read.
The control picture is cut and mirrored as its picture is; Canny looks at the picture after that.

The papers and everyone since see "sudden convergence": for a while nothing, then within a hundred steps the control is followed.
loss.png hardly shows it, the sheets of --prompts do: they are drawn with the controls of the first pictures.

Source: Zhang et al. 2023, section 3.1 (zero convolutions), 3.3 (prompt dropout, sudden convergence).
Legend: b examples, c h w latent, H W pixels.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch
from sdcore.weights.controls import write_control
from torch import Tensor

from sdcore import image
from sdcore.canny import canny
from sdcore.controlnet import Control, ControlNet
from sdcore.errors import TrainingError
from sdcore.image import open_picture
from sdcore.voices import Conditions

from .checkpoints import sha256
from .data import SUFFIXES, Item, Visit, open_visit, seen
from .loop import run
from .options import option, parse
from .tuning import Tune, TuneOptions, load


@dataclass(frozen=True)
class ControlNetOptions(TuneOptions):
    """Teach a model to follow control pictures."""

    lr: float = option(1e-5, "peak learning rate")
    dropout: float = option(0.5, "share of captions replaced by the empty one")
    control: str = option(
        "canny", "canny: the picture's own edges; or a folder of control pictures of the same names and sizes"
    )
    canny: tuple[float, float] = option((100.0, 200.0), "Canny's two thresholds")
    stem: tuple[int, ...] = option((16, 32, 96, 256), "widths of the stem that reads the control picture")


class TrainControlNet(Tune):
    """Fine-tuning in which a ControlNet is all that trains."""

    options: ControlNetOptions
    net: ControlNet | None = None

    def begin(self) -> None:
        self.controls = {} if self.options.control == "canny" else {i.path: self.found(i) for i in self.pictures.items}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.options.seed)  # the stem begins as random numbers
            self.net = ControlNet.from_unet(self.pipe.unet, stem=self.options.stem)
        self.net.float().requires_grad_(True)
        self.modules = {"controlnet": self.net}

    def predict(self, x: Tensor, t: Tensor, told: Conditions, visits: list[Visit]) -> Tensor:
        assert self.net is not None
        pixels = torch.stack([self.control(visit) for visit in visits]).to(x.device)
        added = self.added(told, visits)
        wide = None if added is None else (added[0].float(), added[1])
        residuals = [self.as_unet(r) for r in self.net(x, t, told.context.float(), pixels, wide)]
        return self.pipe.unet(self.as_unet(x), t, self.as_unet(told.context), added, residuals=residuals)

    # ------------------------------------------------------------------------------------------------------ control pictures

    def control(self, visit: Visit) -> Tensor:
        """The control picture of a visit [3, H, W], 0..1. TrainingError: its file changed."""
        if not self.controls:
            levels = ((open_visit(visit)[0] + 1) * 127.5).round().to(torch.uint8)
            edges = canny(levels.permute(1, 2, 0).contiguous().numpy(), *self.options.canny)
            return torch.from_numpy(edges).float().div(255).expand(3, -1, -1)
        path, promised = self.controls[visit.item.path]
        if not path.exists() or sha256(path) != promised:
            raise TrainingError(f"{path}: changed or removed since the run began; put it back, or start anew")
        return seen(open_picture(path).pil, visit.view)

    def found(self, item: Item) -> tuple[Path, str]:
        """The control picture that belongs to a picture, and its hash."""
        beside = Path(self.options.control) / item.path.relative_to(self.options.data)
        path = next((p for s in sorted(SUFFIXES) if (p := beside.with_suffix(s)).exists()), None)
        if path is None:
            raise TrainingError(f"--control {self.options.control}: has no {beside.stem} for {item.path}")
        if (size := open_picture(path).size) != item.size:
            raise TrainingError(
                f"{path}: is {size[0]}x{size[1]}, its picture {item.path} {item.size[0]}x{item.size[1]}"
            )
        return path, sha256(path)

    def identity(self) -> dict[str, object]:
        hashes = repr(sorted(hash_ for _, hash_ in self.controls.values())).encode()
        return super().identity() | {"controls": hashlib.sha256(hashes).hexdigest()}

    # --------------------------------------------------------------------------------------------------------------- the result

    def draw(self) -> list[image.Picture]:
        """The pictures of --prompts, each with the control of another of the pictures; before training without."""
        if self.net is None:
            return super().draw()
        drawn = []
        for i, text in enumerate(self.prompt_lines()):
            visit = self.pictures.visit(i % len(self.pictures.items), 0, 0)
            control = Control(self.net, self.control(visit)[None])
            size, guidance = visit.view.size, self.options.guidance
            drawn += self.pipe(text, control=[control], seed=i, steps=25, guidance=guidance, size=size).images
        return drawn

    def export(self, out: Path) -> None:
        """controlnet/, a folder as diffusers has it, which `--control` and `load_control` take."""
        assert self.net is not None
        write_control(out / "controlnet", self.net)


def main(argv: list[str] | None = None) -> int:
    """`sdcore train controlnet`."""
    options = parse(ControlNetOptions, argv, prog="sdcore train controlnet")
    return run(TrainControlNet(options, load(options)), options)
