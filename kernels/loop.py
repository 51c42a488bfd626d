"""The denoising loop as a function of tensors alone, so that a CUDA graph can hold it.

`pipeline.Run` asks the host at every step: Python floats, `if`, a list that grows. Here everything that differs between two
pictures of the same kind lies in named tensors: the noise, the text's keys and values, the time's shifts, the sampler's numbers.
One function maps them to the result, and a graph of it is captured once; the next picture is new values in the same tensors and a
replay. Two such functions:

    whole     all steps: the finished latent, when nobody watches
    single    one step: replayed with the next row of the table, when the steps are iterated

Guidance and the sampler's move are `guidance_step`, one kernel a step, bit-equal to `guidance` and `samplers`. What this loop
cannot do stays with `pipeline.Run`: `fits` says what that is.

Checked on a CPU, where `Captured` runs its function as it is; capture and replay need an NVIDIA GPU.

Legend: b pictures, r rows of conditions, n steps, m noisy steps, p pairs (x, x0) that the sampler looks back to.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from sdcore.kernels import guidance_step as move
from torch import Tensor

from sdcore.pipeline import Progress, Run, check_finite
from sdcore.samplers import Step, memory
from sdcore.unet import KeysValues

Tensors = Mapping[str, Any]  # name -> tensor, or list of tensors
Predict = Callable[[Tensor, list[Tensor], list[KeysValues]], Tensor]  # `UNet.step`
WARM_UPS = 2  # runs before a capture: kernels are compiled and chosen there


class Captured:
    """A function of named tensors, as one CUDA graph. On a CPU it just runs.

    Called with new values of any of the tensors: they are copied in, the others stay. A list that was given before is not copied
    again, so a list is not to be changed. What it returns is overwritten by the next call.
    """

    def __init__(self, function: Callable[[Tensors], Any], tensors: Tensors):
        self.function = function
        self.lists = {name: x for name, x in tensors.items() if isinstance(x, list)}  # whose values `held` has
        self.held = {name: [t.clone() for t in x] if isinstance(x, list) else x.clone() for name, x in tensors.items()}
        self.graph = None
        first = next(t for x in self.held.values() for t in (x if isinstance(x, list) else [x]))
        if first.device.type == "cuda":
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream), torch.no_grad():
                for _ in range(WARM_UPS):
                    function(self.held)
            torch.cuda.current_stream().wait_stream(stream)
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph), torch.no_grad():
                self.out = function(self.held)

    @torch.no_grad()
    def __call__(self, **changed: Any) -> Any:
        for name, new in changed.items():
            if isinstance(new, list):
                if self.lists[name] is new:
                    continue
                self.lists[name] = new
            olds, news = (self.held[name], new) if isinstance(new, list) else ([self.held[name]], [new])
            for old, value in zip(olds, news, strict=True):
                old.copy_(value, non_blocking=True)
        if self.graph is None:
            return self.function(self.held)
        self.graph.replay()
        return self.out


class State(NamedTuple):
    """Where a picture is between two steps."""

    x: Tensor  # [b, c, h, w] fp32
    x0: Tensor  # the guess of the step before
    entry: Tensor  # what the network sees next, in its dtype, channels last
    history: Tensor  # [p, 2, b, c, h, w]


def begin(x: Tensor, scale: Tensor, dtype: torch.dtype, depth: int) -> State:
    """Before the first step, whose network input is `scale` x."""
    entry = (x * scale).to(dtype).contiguous(memory_format=torch.channels_last)
    return State(x, x, entry, x.new_zeros(depth, 2, *x.shape))


def advance(
    predict: Predict,
    state: State,
    row: Tensor,
    noise: Tensor | None,
    shifts: list[Tensor],
    kv: list[Tensor],
    guided: bool,
) -> State:
    """One step. `kv`: keys and values in turn, [r, k, d]; `shifts`: [r or 1, c, 1, 1] a block; `noise` [b, c, h, w]."""
    rows = len(kv[0]) if guided else len(state.x)  # both branches, or the positive one: it is the last
    pairs: list[KeysValues] = [(k[-rows:], v[-rows:]) for k, v in zip(kv[::2], kv[1::2], strict=True)]
    output = predict(state.entry, [shift[-rows:] for shift in shifts], pairs)
    step = move.guidance_step if move.accepts(output, state.x, row, state.history, noise) else move.reference
    return State(*step(output, state.x, row, state.history, noise))


def fits(run: Run) -> bool:
    """Whether a run can be drawn here: one text for all steps, no composing, no rescaling, no strength by step, no DeepCache."""
    guide: Any = run.denoise
    network = guide.network
    plain = guide.plain and run.edit is None
    return plain and network.constant and network.deep is None and network.scene.bare


@dataclass
class Loops:
    """The captured loops of one UNet, made when a kind of picture first comes up."""

    predict: Predict
    made: dict[tuple, Captured] = field(default_factory=dict)  # emptied when weights change: asked at every step

    def whole(self, run: Run) -> Tensor:
        """The finished latent of a run [b, c, h, w]."""
        guided, noisy, numbers = kind(run)
        heard = [times(run, step) for step in run.steps]
        shifts = [torch.stack(block) for block in zip(*heard, strict=True)]  # a block: [n, r, c, 1, 1]
        first = torch.tensor(run.steps[0].input_scale, device=run.start.device)
        given = {
            "x": run.start,
            "scale": first,
            "rows": numbers,
            "noise": noises(run),
            "shifts": shifts,
            "kv": texts(run),
        }
        dtype, depth = network_of(run).dtype, memory(run.steps)

        def function(t: Tensors) -> Tensor:
            state = begin(t["x"], t["scale"], dtype, depth)
            drawn = iter(t["noise"])
            for i, both in enumerate(guided):
                noise = next(drawn) if noisy[i] else None
                state = advance(
                    self.predict, state, t["rows"][i], noise, [shift[i] for shift in t["shifts"]], t["kv"], both
                )
            return state.x

        return self._get("whole", function, given, guided, noisy)(**given).clone()

    def single(self, run: Run) -> Iterator[tuple[Step, Tensor, Tensor]]:
        """Step by step: (step, x, x0), as `samplers.sample`."""
        guided, noisy, numbers = kind(run)
        drawn, network = iter(noises(run)), network_of(run)
        first = torch.tensor(run.steps[0].input_scale, device=run.start.device)
        state = begin(run.start, first, network.dtype, memory(run.steps))
        for i, step in enumerate(run.steps):
            if network.follow(i) or i == 0:
                kv = texts(run, i)
            given = {
                "x": state.x,
                "entry": state.entry,
                "history": state.history,
                "row": numbers[i],
                "shifts": times(run, step),
                "kv": kv,
            }
            given |= {"noise": next(drawn)} if noisy[i] else {}

            def function(t: Tensors, both: bool = guided[i]) -> State:
                state = State(t["x"], t["x"], t["entry"], t["history"])
                return advance(self.predict, state, t["row"], t.get("noise"), t["shifts"], t["kv"], both)

            graph = self._get("single", function, given, guided[i])
            state = State(*(t.clone() for t in graph(**given)))
            yield step, state.x, state.x0

    def _get(self, name: str, function: Callable, tensors: Tensors, *kind: Any) -> Captured:
        """The captured function for tensors of these shapes."""
        shapes = [tuple(t.shape) for x in tensors.values() for t in (x if isinstance(x, list) else [x])]
        key = (name, *kind, tuple(tensors), tuple(shapes), tensors["kv"][0].dtype)
        if key not in self.made:
            self.made[key] = Captured(function, tensors)
        return self.made[key]


@dataclass
class CapturedRun(Run):
    """A run that is drawn by captured loops. Only its end is looked at: that the numbers are finite.

    Adapters that change between `steps()` and the drawing, or on the way, are followed: no graph of before is replayed.
    """

    @property
    def loops(self) -> Loops:
        return network_of(self).mirror.loops()

    def __iter__(self) -> Iterator[Progress]:
        for step, x, x0 in self.loops.single(self):
            if step.i == len(self.steps) - 1:
                check_finite(x, "the UNet")
            yield Progress(step, len(self.steps), x, x0)

    def finish(self) -> Tensor:
        if network_of(self).follow(0):  # strengths may change by step now
            return super().finish()
        x = self.loops.whole(self)
        check_finite(x, "the UNet")
        return x


def kind(run: Run) -> tuple[tuple[bool, ...], tuple[bool, ...], Tensor]:
    """Of every step: does guidance act, is noise drawn; and the numbers of all steps [n, 7 + 2 p]."""
    guide: Any = run.denoise
    rows = move.rows(run.steps, guide.guide.scale).to(run.start.device)
    return tuple(map(guide.guided, run.steps)), tuple(bool(step.std) for step in run.steps), rows


def noises(run: Run) -> Tensor:
    """What all noisy steps draw, in their order [m, b, c, h, w]."""
    drawn = [run.noise(run.start) for step in run.steps if step.std]
    return torch.stack(drawn) if drawn else run.start.new_empty(0, *run.start.shape)


def texts(run: Run, i: int = 0) -> list[Tensor]:
    """Keys and values in turn, as step i reads them."""
    network = network_of(run)
    return [t for pair in network.heard(network.unet, run.steps[i], network.rows) for t in pair]


def times(run: Run, step: Step) -> list[Tensor]:
    """What the residual blocks hear of the time in a step."""
    network = network_of(run)
    return network.shifts(network.unet, step, network.rows)


def network_of(run: Run) -> Any:
    """The `engine.FastNetwork` of a run."""
    return run.denoise.network  # type: ignore[attr-defined]
