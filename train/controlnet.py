"""ControlNet: teach a model to follow a picture of outlines, depth, poses, or whatever pairs it is shown.

    sdcore train controlnet --data pictures --model sd15 --out runs/canny               # Canny's edges, made on the fly
    sdcore train controlnet --data pictures --control depth_maps --model sd15 --out runs/depth
    sdcore train controlnet --data pictures --model sdxl --control-lora 128 --out runs/canny      # a LoRA beside borrowed weights

What trains: a copy of the UNet's encoder with a stem for the control picture, whose results reach the UNet through convolutions
that begin as zeros (sdcore/controlnet.py). So the first step starts from the UNet's own answer, to the bit, and the UNet stays as
it is. The loss is that of fine-tuning. Half of the captions are dropped: where the words say nothing, the control has to be read.
The control picture is cut and mirrored as its picture is; Canny looks at the picture after that.

The papers and everyone since see "sudden convergence": for a while nothing, then within a hundred steps the control is followed.
loss.png hardly shows it. What does: each evaluation draws pictures of --validation anew, from their captions and controls. The
sheets samples/controls-….png have columns control, drawn with it, drawn without; and with Canny the log says how well the edges
of what was drawn follow the control (`edge_f1`, train/edges.py) and how well they would by chance (`edge_f1_uncontrolled`).

A ControlNet may be smaller than the encoder that it copies: --depths and --mid-depth leave out transformers, as the released
small ones for XL do. With --control-lora it borrows the UNet's matrices (train/control_lora.py).

Source: Zhang et al. 2023, section 3.1 (zero convolutions), 3.3 (prompt dropout, sudden convergence).
Legend: b examples, c h w latent, H W pixels.
"""

import hashlib
from dataclasses import asdict, dataclass
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

from . import control_lora
from .caches import Kept
from .checkpoints import sha256
from .data import SUFFIXES, Item, Visit, open_visit, seen
from .edges import edge_f1
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
    depths: tuple[int, ...] | None = option(
        None,
        "transformer layers a level, where they are not to be the UNet's: 0,0,0 has none, as XL's small ControlNet",
    )
    mid_depth: int | None = option(None, "transformer layers in the middle, where they are not to be the UNet's")
    control_lora: int = option(
        0,
        "rank: train a Control-LoRA, which borrows the UNet's matrices and learns a LoRA of this rank beside each; 0: copy all",
    )
    judged: int = option(
        24, "of the validation pictures, how many each evaluation draws with and without their control"
    )


class TrainControlNet(Tune):
    """Fine-tuning in which a ControlNet is all that trains."""

    options: ControlNetOptions
    net: ControlNet | None = None
    reads = ("texts", "control")

    def begin(self) -> None:
        self.controls: dict[Path, tuple[Path, str]] = {}  # of a picture: its control's file and hash; empty with Canny
        if self.options.control != "canny":
            self.controls = {i.path: self.found(i, self.options.data) for i in self.pictures.items}
            if self.held_out and self.options.validation:
                self.controls |= {i.path: self.found(i, self.options.validation) for i in self.held_out.items}
        self.edges = Kept(Path(self.options.cache) if self.options.cache else None)
        self.examples = self.held_out.items[: self.options.judged] if self.held_out else []
        self.uncontrolled = [self.drawn(i) for i in range(len(self.examples))]
        sizes = {"stem": self.options.stem, "depths": self.options.depths, "mid_depth": self.options.mid_depth}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.options.seed)  # the stem begins as random numbers
            self.net = ControlNet.from_unet(self.pipe.unet, **{k: v for k, v in sizes.items() if v is not None})
        if self.options.control_lora:
            control_lora.borrow(self.net, self.pipe.unet, self.options.control_lora, self.options.seed)
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
            origin = {"picture": visit.item.sha256, "view": asdict(visit.view), "canny": self.options.canny}
            edges = self.edges.get(origin, lambda: self.outlines(visit))["edges"]
            return edges.float().div(255).expand(3, -1, -1)
        path, promised = self.controls[visit.item.path]
        if not path.exists() or sha256(path) != promised:
            raise TrainingError(f"{path}: changed or removed since the run began; put it back, or start anew")
        return seen(open_picture(path).pil, visit.view)

    def outlines(self, visit: Visit) -> dict[str, Tensor]:
        """Canny's edges of what is seen at a visit, "edges" [H, W] uint8, 0 or 255."""
        seen_pixels = image.to_pictures(open_visit(visit)[0][None])[0].pixels
        return {"edges": torch.from_numpy(canny(seen_pixels, *self.options.canny))}

    def found(self, item: Item, folder: str) -> tuple[Path, str]:
        """The control picture that belongs to a picture of this folder, and its hash."""
        beside = Path(self.options.control) / item.path.relative_to(folder)
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

    # ----------------------------------------------------------------------------------------------------------------- judgement

    def evaluate(self, step: int, out: Path) -> dict[str, float]:
        """Beside --prompts: validation pictures drawn anew from caption and control. Figures: see `edge_f1` above."""
        super().evaluate(step, out)
        if not self.held_out or not self.examples:
            return {}
        visits = [self.held_out.visit(i, 0, 0) for i in range(len(self.examples))]
        controls = [self.control(visit) for visit in visits]
        drawn = [self.drawn(i, control) for i, control in enumerate(controls)]
        rows = zip([image.to_pictures(c[None] * 2 - 1)[0] for c in controls], drawn, self.uncontrolled, strict=True)
        (out / "samples").mkdir(exist_ok=True)
        image.grid([picture for row in rows for picture in row], columns=3).save(
            out / f"samples/controls-{step:08d}.png"
        )
        if self.controls:
            return {}
        return {
            "edge_f1": self.follows(drawn, controls),
            "edge_f1_uncontrolled": self.follows(self.uncontrolled, controls),
        }

    def drawn(self, i: int, control: Tensor | None = None) -> image.Picture:
        """The i-th validation picture's caption drawn, with its control [3, H, W] or without; its seed is its number."""
        assert self.held_out is not None
        visit = self.held_out.visit(i, 0, 0)
        controls = [] if control is None or self.net is None else [Control(self.net, control[None])]
        said, size = visit.caption, visit.view.size
        return self.pipe(said, control=controls, seed=i, steps=25, guidance=self.options.guidance, size=size).images[0]

    def follows(self, pictures: list[image.Picture], controls: list[Tensor]) -> float:
        """The mean F1 of the pictures' edges against their controls'."""
        pairs = zip(pictures, controls, strict=True)
        found = [edge_f1(canny(p.pixels, *self.options.canny), c[0].numpy()) for p, c in pairs]
        return round(sum(found) / len(found), 4)

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
        """controlnet/, a folder as diffusers has it; or control-lora.safetensors. `--control` and `load_control` take either."""
        assert self.net is not None
        if self.options.control_lora:
            control_lora.write(out / "control-lora.safetensors", self.net)
        else:
            write_control(out / "controlnet", self.net)


def main(argv: list[str] | None = None) -> int:
    """`sdcore train controlnet`."""
    options = parse(ControlNetOptions, argv, prog="sdcore train controlnet")
    return run(TrainControlNet(options, load(options)), options)
