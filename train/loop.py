"""The one training loop: `run` takes a task from its first step, or from a checkpoint, to its result.

A method (`vae.py`, `text2image.py`, ...) is a `Task` (task.py): it says which parameters train and what the loss of a part of a
batch is. The loop does the rest, a file each: one step with its passes, precision, clipping and moving average (state.py),
optimisers and schedules (optimisers.py), several processes (ranks.py) and networks cut up over them (sharding.py), checkpoints
that are whole or not there (checkpoints.py), the record (log.py). Here is the order of things: read `_run`.

A run can be cut anywhere and goes on bit for bit: all randomness and data are functions of the step (see task.py), and
everything else is in the checkpoint. Stopped by Ctrl-C or SIGTERM it finishes its step, saves once and ends with exit code 130
or 143; the same command with --resume goes on from there.
"""

import contextlib
import dataclasses
import json
import math
import signal
import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm

from sdcore.errors import NonFiniteError, TrainingError

from . import ranks
from .checkpoints import Checkpoints, difference, sha256, sole_user
from .log import Log, draw_curve
from .optimisers import learning_rate
from .options import free_names
from .ranks import Ranks
from .state import State
from .task import LoopOptions, Loss, Part, Task, channels_last, generator

__all__ = ["LoopOptions", "Loss", "Part", "Task", "channels_last", "generator", "run", "sha256"]  # what methods import

PATIENCE = 5  # steps in a row whose loss or gradient may be NaN or infinite before the run stops
HALVINGS = 16  # more of them with fp16: its scaler finds down from 65536 what the gradients admit


class Signals:
    """Inside the `with`, SIGINT and SIGTERM are noted (`caught`) instead of acted upon, however often they come."""

    def __init__(self) -> None:
        self.caught = 0

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
    with Signals() as signals, ranks.joined() as processes:
        with sole_user(out) if processes.first else contextlib.nullcontext():
            return _run(task, options, out, signals, processes)


def _run(task: Task, options: LoopOptions, out: Path, signals: Signals, processes: Ranks) -> int:
    torch.set_num_threads(options.threads)
    task.stopping = lambda: bool(signals.caught)
    task.prepare(processes)
    state = State(task, options, processes)
    checkpoints = state.checkpoints(out / "checkpoints", options.keep)
    settings = json.loads(  # as files have it
        json.dumps({"options": dataclasses.asdict(options), "data": task.identity(), "processes": processes.world})
    )
    start, changed, sums = 0, [], {}
    if options.resume:
        newest = checkpoints.verified()
        found = checkpoints.numbers(newest)
        _refuse_changes(settings, found, options, out)
        state.restore(checkpoints.tensors(newest), found["numbers"])
        start, changed = found["step"], difference(found["options"], settings["options"])
        sums = found.get("sums", {})
    elif checkpoints.all():
        raise TrainingError(f"{out}: holds a run already; add --resume to go on with it, or choose another --out")
    writer = Writer(state, settings, checkpoints, start, out)
    writer.log.sums = sums
    if options.resume:
        writer.log.write(step=start, event="resumed", changed=changed)

    skipped: list[int] = []  # steps that were not applied
    patience = PATIENCE + HALVINGS * (options.precision == "fp16")
    steps, done = range(start, options.steps), options.steps
    hidden = None if processes.first else True  # None: where stderr is no terminal
    bar = tqdm(steps, initial=start, total=options.steps, disable=hidden, desc=out.name, unit="step")
    for step in bar:
        rate = learning_rate(options, step)
        figures = state.take(step, rate)
        caught = processes.largest(signals.caught)  # all of them stop at the same step
        if not figures:
            skipped.append(step)
            writer.log.write(step=step, event="not applied: loss or gradient is not finite")
            if skipped[-patience:] == list(range(step + 1 - patience, step + 1)):
                raise NonFiniteError(
                    f"{out}: loss or gradient was not finite in {patience} steps in a row, up to step {step}; "
                    "the last checkpoint is from before; resume it with a lower --lr"
                )
        if means := writer.after(step, rate, figures, stopping=bool(caught)):
            bar.set_postfix(loss=f"{means.get('loss', math.nan):.4f}")
        if caught and step + 1 < options.steps:
            writer.log.write(step=step + 1, event=f"stopped by {signal.Signals(caught).name}, saved")
            if processes.first:
                print(f"stopped and saved at step {step + 1}; add --resume to go on", file=sys.stderr)
            return 128 + caught
        if writer.ended:
            done = step + 1
            break
    writer.finish(len(skipped), done)
    return 0


class Writer:
    """What is done between steps: log, evaluate, save; at the end, the result.

    All processes come here together, since networks in shards take all of them to gather and to save; the first alone looks at
    them and writes.
    """

    def __init__(self, state: State, settings: dict, checkpoints: Checkpoints, start: int, out: Path):
        self.state, self.settings, self.checkpoints, self.out = state, settings, checkpoints, out
        self.task, self.options, self.first = state.task, state.options, state.ranks.first
        self.best = Best(state.checkpoints(out / "best", 1), self.options.best) if self.options.best else None
        self.log = Log(out, self.options.tensorboard, start, silent=not self.first)
        self.ended = False  # the task wants no further step
        if self.first:
            for folder in (checkpoints, *([self.best.checkpoints] if self.best else [])):
                folder.clear()

    def after(self, step: int, rate: float, figures: dict[str, float], stopping: bool) -> dict[str, float]:
        """Everything that is due once step `step` has been taken; the means, where a line of the log was."""
        o, done, means = self.options, step + 1, {}
        self.log.add(figures)
        if done % o.log_every == 0:
            means = self.log.means(step=done, lr=rate)
        if o.eval_every and (done % o.eval_every == 0 or done == o.steps):
            self.evaluate(done)
        self.ended = bool(self.state.ranks.largest(self.task.ended is not None))
        if done % o.save_every == 0 or done == o.steps or stopping or self.ended:
            self.save(self.checkpoints, done)
        return means

    def evaluate(self, done: int) -> None:
        """The validation loss and the method's own figures; the best checkpoint so far is kept."""
        figures: dict[str, float] = {}
        with self.state.averaged():
            if self.first:
                loss = self.task.validate()
                figures = ({} if loss is None else {"validation_loss": loss}) | self.task.evaluate(done, self.out)
        if self.first:
            self.log.write(step=done, event="evaluated", **figures)
            draw_curve(self.out / "log.jsonl", self.out / "loss.png")
        if self.best and self.state.ranks.largest(self.first and self.best.beaten_by(figures)):
            self.save(self.best.checkpoints, done, figures=figures)
        self.log.clock = time.perf_counter()  # the seconds of a step are those of training

    def save(self, checkpoints: Checkpoints, done: int, **more: object) -> None:
        tensors, kept = self.state.collect()
        about = {"step": done, "torch": torch.__version__, **self.settings, "numbers": kept, "sums": self.log.sums}
        if self.first or self.options.shard:
            checkpoints.save(done, tensors, about | more)

    def finish(self, skipped: int, done: int) -> None:
        """Export the averaged weights: of the best checkpoint where --best was asked for, else of the last step, `done`."""
        exported = done
        if self.best:
            tensors, found = self.best.checkpoints.newest()
            self.state.restore(tensors, found["numbers"])
            exported = found["step"]
        with self.state.averaged():
            if self.first:
                self.task.export(self.out)
        if self.first:
            draw_curve(self.out / "log.jsonl", self.out / "loss.png")
        why = {"ended": self.task.ended} if self.task.ended else {}
        self.log.write(step=done, event="complete", not_applied=skipped, exported=exported, **why)
        self.log.close()


class Best:
    """The checkpoint whose evaluation gave the best figure so far, in a folder beside the newest ones.

    A resumed run finds it there. Steps that are taken again come out the same, so they beat nothing.
    """

    def __init__(self, checkpoints: Checkpoints, wanted: str):
        self.name, _, which = wanted.partition(":")
        if which not in ("min", "max"):
            raise TrainingError(f"--best {wanted}: expected a figure and min or max, such as validation_loss:min")
        self.sign = 1 if which == "max" else -1
        self.checkpoints = checkpoints

    def beaten_by(self, figures: dict[str, float]) -> bool:
        """Whether these figures are better than those of the checkpoint that is kept. TrainingError where there is none such."""
        if self.name not in figures:
            raise TrainingError(
                f"--best {self.name}: the evaluation has no such figure, only {', '.join(figures) or 'none'}"
            )
        if not self.checkpoints.all():
            return True
        kept = self.checkpoints.numbers(self.checkpoints.verified())["figures"]
        return self.sign * figures[self.name] > self.sign * kept[self.name]


def _refuse_changes(settings: dict, state: dict, options: LoopOptions, out: Path) -> None:
    """A resumed run must be the same run: TrainingError with the differences, unless they are accepted."""
    free = free_names(options)
    fixed = [{k: v for k, v in s["options"].items() if k not in free} for s in (state, settings)]
    changed = difference(*fixed) + difference(state["data"], settings["data"])
    changed += difference(*({"processes": s["processes"]} for s in (state, settings)))
    before = state["options"]["steps"]
    if before != options.steps and options.schedule != "constant":
        changed.append(f"steps: was {before}, is {options.steps}, and the {options.schedule} schedule depends on it")
    elif before != options.steps and state["step"] > before - options.cooldown:
        changed.append(f"steps: was {before}, is {options.steps}, and the cooldown had begun")
    if changed and not options.accept_changes:
        raise TrainingError(
            f"{out}: cannot resume, this is not the same run ({'; '.join(changed)}); "
            "use the old values, or add --accept-changes to record the difference and go on"
        )
