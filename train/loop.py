"""The one training loop: options, a task, and `run`.

A method (`vae.py`, `text2image.py`, ...) is a `Task`: it says which parameters train, what a batch is and what the loss is.
`run` does the rest: warm-up, clipping, AdamW, the moving average (EMA), the log and its curve, saving, stopping and resuming.
Read `_run` first, then `State` and `Checkpoints`.

A run can be cut anywhere and goes on bit for bit. Two habits make that easy to see. Every random number of step k comes from
a generator that is seeded with (seed, k) alone, and the examples of step k are a function of k: so the position in the random
streams and in the data *is* the step number, and nothing else has to be kept. And a checkpoint is published whole or not at
all: written beside, flushed, hashed into a manifest, renamed, and only then is an older one retired.

A run stopped by Ctrl-C or SIGTERM finishes its step, saves once and ends with exit code 130 or 143; the same command with
--resume goes on from there.
"""

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import math
import os
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image, ImageDraw
from safetensors.torch import load_file, save_file
from sdcore.weights.files import replacing, sync_folder
from torch import Tensor, nn
from tqdm import tqdm

from sdcore.errors import CheckpointError, NonFiniteError, TrainingError

from .options import option

PATIENCE = 5  # steps in a row whose loss or gradient may be NaN or infinite before the run stops
FREE = {
    "out",
    "resume",
    "steps",
    "save_every",
    "keep",
    "log_every",
    "eval_every",
    "accept_changes",
}  # may change on resume


@dataclass(frozen=True)
class LoopOptions:
    """What every method shares."""

    out: str = option("runs/new", "folder of the run: checkpoints, log.jsonl, loss.png, and at the end the result")
    resume: bool = option(False, "go on from the newest checkpoint in --out that verifies")
    accept_changes: bool = option(False, "resume although options or data differ; the difference is written to the log")
    steps: int = option(1000, "steps of the whole run (may be changed on resume, before the cooldown has begun)")
    batch: int = option(64, "examples a step")
    lr: float = option(1e-3, "peak learning rate of AdamW")
    warmup: int = option(100, "steps in which the learning rate rises to its peak")
    cooldown: int = option(200, "last steps, in which it falls linearly to nearly nothing; constant in between")
    weight_decay: float = option(0.01, "decoupled weight decay, on matrices and kernels only")
    beta2: float = option(0.99, "AdamW's decay of the squared gradient")
    clip: float = option(1.0, "longest gradient that is applied unshortened")
    ema: float = option(0.999, "decay of the moving average of the weights, which is what is evaluated and exported")
    seed: int = option(0, "seed of everything")
    threads: int = option(2, "CPU threads; part of the result's last bits")
    save_every: int = option(500, "steps between checkpoints")
    keep: int = option(2, "checkpoints kept")
    log_every: int = option(20, "steps between lines of log.jsonl")
    eval_every: int = option(0, "steps between evaluations of the averaged weights; 0: never")


class Task:
    """One method. Subclasses set `modules` and fill in `loss`; the other methods have harmless defaults."""

    modules: dict[str, nn.Module]  # everything that is saved; what has requires_grad is trained

    def loss(self, step: int, rng: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        """The loss of step `step` and figures for the log. Draws every random number from `rng`, picks data by `step` alone."""
        raise NotImplementedError

    def identity(self) -> dict[str, object]:
        """What the data is; a resumed run must find the same."""
        return {}

    def evaluate(self, step: int, out: Path) -> dict[str, float]:
        """Figures of the averaged weights, which are in place during the call."""
        return {}

    def export(self, out: Path) -> None:
        """Write the result; the averaged weights are in place during the call."""


def channels_last(module: nn.Module) -> None:
    """Lay out convolution weights with the channels innermost, in place: the same numbers, a fifth faster on a CPU."""
    module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def generator(seed: int, step: int) -> torch.Generator:
    """The random stream of one step: seeded by a hash, so neighbouring steps and seeds share nothing."""
    digest = hashlib.sha256(f"{seed} {step}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def learning_rate(o: LoopOptions, step: int) -> float:
    """Linear warm-up, constant, linear cooldown. Before the cooldown it does not know the run's length, which can be extended."""
    rise = (step + 1) / max(o.warmup, 1)
    fall = (o.steps - step) / max(o.cooldown, 1)
    return o.lr * min(1.0, rise, fall)


class Average:
    """Exponential moving average of the trained parameters (EMA); young averages forget faster, so the start does not linger."""

    def __init__(self, parameters: dict[str, nn.Parameter], decay: float):
        self.parameters, self.decay = parameters, decay
        self.values = {name: p.detach().clone() for name, p in parameters.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(self.values.values()), [p.detach() for p in self.parameters.values()], 1 - decay)

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """The parameters hold the average inside the `with`, and their own values, bit for bit, after it."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for name, p in self.parameters.items():
            own = p.detach().clone()
            p.copy_(self.values[name])
            self.values[name].copy_(own)


class State:
    """What training changes: the weights, their moving average and the optimiser's memory of them."""

    def __init__(self, task: Task, options: LoopOptions):
        self.task, self.options = task, options
        self.modules = nn.ModuleDict(task.modules)
        self.trained = {name: p for name, p in self.modules.named_parameters() if p.requires_grad}
        decayed = [p for p in self.trained.values() if p.ndim > 1]
        plain = [p for p in self.trained.values() if p.ndim <= 1]
        self.optimiser = torch.optim.AdamW(
            [{"params": decayed, "weight_decay": options.weight_decay}, {"params": plain, "weight_decay": 0.0}],
            lr=options.lr, betas=(0.9, options.beta2), fused=True,
        )  # fmt: skip
        self.average = Average(self.trained, options.ema)

    def take(self, step: int, rate: float) -> dict[str, float]:
        """One step at learning rate `rate`. Its figures for the log; none, and nothing changed, where NaN appeared."""
        for group in self.optimiser.param_groups:
            group["lr"] = rate
        loss, figures = self.task.loss(step, generator(self.options.seed, step))
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.trained.values(), self.options.clip)
        finite = bool(torch.isfinite(loss) and torch.isfinite(norm))
        if finite:
            self.optimiser.step()
            self.average.update(step)
        self.optimiser.zero_grad(set_to_none=True)
        return {"loss": loss.item(), "norm": norm.item(), **figures} if finite else {}

    def collect(self) -> dict[str, Tensor]:
        """Every tensor under a flat name: weights/…, average/…, optimiser/…/exp_avg."""
        tensors = {f"weights/{k}": v for k, v in self.modules.state_dict().items()}
        tensors |= {f"average/{k}": v for k, v in self.average.values.items()}
        for name, p in self.trained.items():
            for key, value in self.optimiser.state[p].items():
                tensors[f"optimiser/{name}/{key}"] = value
        return tensors

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """The inverse of `collect`; the optimiser's tensors take the layout of their parameter, which files do not keep."""
        self.modules.load_state_dict(
            {k.removeprefix("weights/"): v for k, v in tensors.items() if k.startswith("weights/")}
        )
        for name, p in self.trained.items():
            self.average.values[name].copy_(tensors[f"average/{name}"])
            found = {key: tensors[f"optimiser/{name}/{key}"] for key in ("exp_avg", "exp_avg_sq", "step")
                     if f"optimiser/{name}/{key}" in tensors}  # fmt: skip
            self.optimiser.state[p] = {
                k: torch.empty_like(p).copy_(v) if v.shape == p.shape else v.clone() for k, v in found.items()
            }


class Log:
    """log.jsonl, one line a record. A resumed run writes the steps since its checkpoint again; readers keep the last line."""

    def __init__(self, path: Path):
        self.file = open(path, "a")
        self.sums: dict[str, list[float]] = {}  # since the last line of means
        self.clock = time.perf_counter()

    def write(self, **values: object) -> None:
        self.file.write(json.dumps(values) + "\n")
        self.file.flush()

    def add(self, figures: dict[str, float]) -> None:
        for name, value in figures.items():
            self.sums.setdefault(name, []).append(value)

    def means(self, **values: object) -> dict[str, float]:
        """Write the means of what was added since the last time, and the seconds a step."""
        seconds, self.clock = time.perf_counter() - self.clock, time.perf_counter()
        means = {name: round(sum(found) / len(found), 6) for name, found in self.sums.items()}
        count = max(map(len, self.sums.values()), default=1)
        self.write(**values, **means, seconds=round(seconds / count, 4))
        self.sums = {}
        return means


# ---------------------------------------------------------------------------------------------------------------- checkpoints


def sha256(path: Path) -> str:
    """Hex digest of a file's bytes."""
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


class Checkpoints:
    """The folder of checkpoints of one run: publishing, verifying, retiring.

    A checkpoint is a folder `step-00000500` with state.safetensors (weights, average, optimiser), state.json (step, options,
    identity of the data) and manifest.json (size and sha256 of the two). A folder whose manifest does not verify is none.
    """

    def __init__(self, folder: Path, keep: int):
        self.folder, self.keep = folder, keep
        folder.mkdir(parents=True, exist_ok=True)
        for stale in folder.glob(".writing-*"):  # left by a run that was killed; the lock says that nobody writes now
            shutil.rmtree(stale, ignore_errors=True)

    def save(self, step: int, tensors: dict[str, Tensor], state: dict) -> Path:
        """Publish a checkpoint. Raises TrainingError if it cannot be written; what was there before stays as it is."""
        final, beside = self.folder / f"step-{step:08d}", self.folder / f".writing-{step:08d}"
        if final.exists():
            if self.fault(final) is None:
                return final
            shutil.rmtree(final)  # damaged: it was passed over when the run was resumed
        try:
            shutil.rmtree(beside, ignore_errors=True)
            beside.mkdir()
            save_file({k: v.contiguous() for k, v in tensors.items()}, beside / "state.safetensors")
            (beside / "state.json").write_text(json.dumps(state, indent=1))
            files = {}
            for name in ("state.safetensors", "state.json"):
                with open(beside / name, "rb") as f:
                    os.fsync(f.fileno())
                files[name] = {"bytes": (beside / name).stat().st_size, "sha256": sha256(beside / name)}
            with replacing(beside / "manifest.json") as f:
                f.write(json.dumps({"step": step, "files": files}, indent=1).encode())
            os.rename(beside, final)
            sync_folder(self.folder)
        except (OSError, CheckpointError) as e:
            shutil.rmtree(beside, ignore_errors=True)
            raise TrainingError(
                f"{final}: the checkpoint could not be written ({e}); older checkpoints are intact. "
                "Make room or mend the folder, then run again with --resume"
            ) from e
        for old in self.all()[self.keep :]:
            shutil.rmtree(old)
        return final

    def all(self) -> list[Path]:
        """Published checkpoints, newest first, whether they verify or not."""
        return sorted(self.folder.glob("step-*"), reverse=True)

    def fault(self, checkpoint: Path) -> str | None:
        """What is wrong with a checkpoint, or None."""
        try:
            manifest = json.loads((checkpoint / "manifest.json").read_text())
            for name, promised in manifest["files"].items():
                size = (checkpoint / name).stat().st_size
                if size != promised["bytes"]:
                    return f"{name} has {size} bytes, its manifest says {promised['bytes']}"
                if sha256(checkpoint / name) != promised["sha256"]:
                    return f"{name} does not have the sha256 of its manifest"
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
            return f"manifest or file unreadable ({e})"
        return None

    def newest(self) -> tuple[dict[str, Tensor], dict]:
        """The newest checkpoint that verifies; those passed over are named on stderr. TrainingError if there is none."""
        for checkpoint in self.all():
            fault = self.fault(checkpoint)
            if fault is None:
                return load_file(checkpoint / "state.safetensors"), json.loads((checkpoint / "state.json").read_text())
            print(f"WARNING: checkpoint {checkpoint} is damaged and was passed over: {fault}", file=sys.stderr)
        raise TrainingError(
            f"{self.folder}: --resume was asked for but no checkpoint here verifies; "
            "leave --resume out to start anew, or name another --out"
        )


@contextlib.contextmanager
def sole_user(out: Path) -> Iterator[None]:
    """Hold the run's folder for this process. TrainingError if another process has it."""
    out.mkdir(parents=True, exist_ok=True)
    with open(out / "lock", "a+") as f:
        try:
            fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            f.seek(0)
            raise TrainingError(
                f"{out}: another run (process {f.read().strip() or 'unknown'}) writes here; "
                "wait for it or choose another --out"
            ) from None
        f.truncate(0)
        f.write(str(os.getpid()))
        f.flush()
        yield


def difference(old: dict, new: dict) -> list[str]:
    """Readable lines for every value that differs."""
    return [
        f"{k}: was {old.get(k)!r}, is {new.get(k)!r}" for k in sorted(set(old) | set(new)) if old.get(k) != new.get(k)
    ]


# ------------------------------------------------------------------------------------------------------------------- the loop


class Signals:
    """Inside the `with`, SIGINT and SIGTERM are noted (`caught`) instead of acted upon, however often they come."""

    def __init__(self) -> None:
        self.caught: int | None = None

    def __enter__(self) -> "Signals":
        def note(number: int, _frame: object) -> None:
            self.caught = self.caught or number

        try:
            self.before = {s: signal.signal(s, note) for s in (signal.SIGINT, signal.SIGTERM)}
        except ValueError:  # not in the main thread: signals go elsewhere
            self.before = {}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)


def run(task: Task, options: LoopOptions) -> int:
    """Train. Returns 0 when the run is complete, 130 after Ctrl-C and 143 after SIGTERM (saved, and may be resumed).

    Raises TrainingError (nothing to resume, changed options, a folder in use, a full disk), NonFiniteError (a loss of NaN).
    """
    out = Path(options.out)
    with sole_user(out), Signals() as signals:
        return _run(task, options, out, signals)


def _run(task: Task, options: LoopOptions, out: Path, signals: Signals) -> int:
    torch.set_num_threads(options.threads)
    state = State(task, options)
    checkpoints = Checkpoints(out / "checkpoints", options.keep)
    settings = json.loads(
        json.dumps({"options": dataclasses.asdict(options), "data": task.identity()})
    )  # as files have it
    log = Log(out / "log.jsonl")
    start = 0
    if options.resume:
        tensors, found = checkpoints.newest()
        _refuse_changes(settings, found, options, out)
        state.restore(tensors)
        start = found["step"]
        log.write(step=start, event="resumed", changed=difference(found["options"], settings["options"]))
    elif checkpoints.all():
        raise TrainingError(f"{out}: holds a run already; add --resume to go on with it, or choose another --out")

    skipped = []  # steps that were not applied
    steps = range(start, options.steps)
    bar = tqdm(steps, initial=start, total=options.steps, disable=None, desc=out.name, unit="step")
    for step in bar:
        rate = learning_rate(options, step)
        figures = state.take(step, rate)
        if not figures:
            skipped.append(step)
            log.write(step=step, event="not applied: loss or gradient is not finite")
            if skipped[-PATIENCE:] == list(range(step + 1 - PATIENCE, step + 1)):
                raise NonFiniteError(
                    f"{out}: loss or gradient was not finite in {PATIENCE} steps in a row, up to step {step}; "
                    "the last checkpoint is from before; resume it with a lower --lr"
                )
        log.add(figures)

        done = step + 1
        if done % options.log_every == 0:
            means = log.means(step=done, lr=rate)
            bar.set_postfix(loss=f"{means.get('loss', math.nan):.4f}")
        if options.eval_every and (done % options.eval_every == 0 or done == options.steps):
            with state.average.in_place(), torch.no_grad():
                log.write(step=done, event="evaluated", **task.evaluate(done, out))
            draw_curve(out / "log.jsonl", out / "loss.png")
            log.clock = time.perf_counter()  # the seconds of a step are those of training
        if done % options.save_every == 0 or done == options.steps or signals.caught:
            checkpoints.save(done, state.collect(), {"step": done, "torch": torch.__version__, **settings})
        if signals.caught and done < options.steps:
            log.write(step=done, event=f"stopped by {signal.Signals(signals.caught).name}, saved")
            print(f"stopped and saved at step {done}; add --resume to go on", file=sys.stderr)
            return 128 + signals.caught

    with state.average.in_place(), torch.no_grad():
        task.export(out)
    draw_curve(out / "log.jsonl", out / "loss.png")
    log.write(step=options.steps, event="complete", not_applied=len(skipped))
    return 0


def _refuse_changes(settings: dict, state: dict, options: LoopOptions, out: Path) -> None:
    """A resumed run must be the same run: TrainingError with the differences, unless they are accepted."""
    fixed = [{k: v for k, v in s["options"].items() if k not in FREE} for s in (state, settings)]
    changed = difference(*fixed) + difference(state["data"], settings["data"])
    if state["step"] > state["options"]["steps"] - options.cooldown and state["options"]["steps"] != options.steps:
        changed.append(f"steps: was {state['options']['steps']}, is {options.steps}, and the cooldown had begun")
    if changed and not options.accept_changes:
        raise TrainingError(
            f"{out}: cannot resume, this is not the same run ({'; '.join(changed)}); "
            "use the old values, or add --accept-changes to record the difference and go on"
        )


# ------------------------------------------------------------------------------------------------------------------ the curve


def draw_curve(log: Path, png: Path, key: str = "loss", size: tuple[int, int] = (800, 400)) -> None:
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
        smooth += 0.1 * (value - smooth)
        trace.append(place(step, smooth))
    draw.line(trace, fill="#1f4e99", width=2)
    draw.text((left + 5, 3), key, fill="#1f4e99")
    image.save(png)
