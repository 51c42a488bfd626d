"""The record of a run: log.jsonl, the curve drawn from it, and TensorBoard's files where they are asked for."""

import contextlib
import importlib.util
import json
import math
import os
import time
from pathlib import Path

from PIL import Image, ImageDraw

from sdcore.errors import TrainingError


class Log:
    """log.jsonl, one line a record. A resumed run writes the steps since its checkpoint again; readers keep the last line.

    `sums` is kept in checkpoints, so the lines that are written again are the same. A `silent` log writes nothing.
    """

    def __init__(self, out: Path, tensorboard: bool = False, start: int = 0, silent: bool = False):
        self.file = open(os.devnull if silent else out / "log.jsonl", "a")
        if not silent and (written := (out / "log.jsonl").read_bytes()) and not written.endswith(b"\n"):
            self.file.write("\n")  # after a line that was cut by a kill
        self.sums: dict[str, list[float]] = {}  # since the last line of means
        self.clock, self.timed = time.perf_counter(), 0  # of the steps since then, those of this process
        self.board = None
        if tensorboard and not silent:
            if importlib.util.find_spec("tensorboard") is None:
                raise TrainingError(
                    "--tensorboard: needs tensorboard, which is not installed; `pip install tensorboard`"
                )
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(out / "tensorboard", purge_step=start)

    def write(self, **values: object) -> None:
        self.file.write(json.dumps(values) + "\n")
        self.file.flush()
        if self.board is not None:
            kind = str(values.get("event", "train"))
            for name, value in values.items():
                if name != "step" and isinstance(value, int | float):
                    self.board.add_scalar(f"{kind}/{name}", value, values["step"])
            self.board.flush()

    def add(self, figures: dict[str, float]) -> None:
        self.timed += 1
        for name, value in figures.items():
            self.sums.setdefault(name, []).append(value)

    def means(self, **values: object) -> dict[str, float]:
        """Write the means of what was added since the last time, and the seconds a step."""
        seconds, self.clock = time.perf_counter() - self.clock, time.perf_counter()
        means = {name: round(sum(found) / len(found), 6) for name, found in self.sums.items()}
        self.write(**values, **means, seconds=round(seconds / max(self.timed, 1), 4))
        self.sums, self.timed = {}, 0
        return means

    def close(self) -> None:
        self.file.close()
        if self.board is not None:
            self.board.close()


def draw_curve(
    log: Path, png: Path, key: str = "loss", size: tuple[int, int] = (800, 400), smoothing: float = 0.9
) -> None:
    """Draw `key` over the steps, logarithmic upwards, from the lines of a log. Nothing is drawn from fewer than two points."""
    points: dict[int, float] = {}
    for line in log.read_text().splitlines():
        with contextlib.suppress(ValueError):  # a line cut by a kill
            entry = json.loads(line)
            if entry.get(key, 0) > 0:
                points[entry["step"]] = entry[key]
    if len(points) < 2:
        return
    steps, values = zip(*sorted(points.items()), strict=True)
    low, high = math.log10(min(values)), math.log10(max(values))
    (width, height), left, bottom = size, 70, 30
    image = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(image)

    def place(step: float, value: float) -> tuple[float, float]:
        x = left + (width - left - 15) * (step - steps[0]) / max(steps[-1] - steps[0], 1)
        return x, height - bottom - (height - bottom - 15) * (math.log10(value) - low) / max(high - low, 1e-9)

    for i in range(5):
        value, step = 10 ** (low + (high - low) * i / 4), steps[0] + (steps[-1] - steps[0]) * i / 4
        y, x = place(step, value)[1], place(step, value)[0]
        draw.line([(left, y), (width - 15, y)], fill="#dddddd")
        draw.text((5, y - 5), f"{value:.3g}", fill="#555555")
        draw.text((x - 15, height - bottom + 8), f"{step:.0f}", fill="#555555")
    draw.line([place(s, v) for s, v in zip(steps, values, strict=True)], fill="#c8d6ea")
    smooth, trace = values[0], []
    for step, value in zip(steps, values, strict=True):
        smooth += (1 - smoothing) * (value - smooth)
        trace.append(place(step, smooth))
    draw.line(trace, fill="#1f4e99", width=2)
    draw.text((left + 5, 3), key, fill="#1f4e99")
    image.save(png)
