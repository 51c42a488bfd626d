"""Which of several implementations of an operation runs: for every shape the one that was measured to be fastest there.

    attention = Choice("attention", {"kernel": our_attention, "flash": sdpa_with(SDPBackend.FLASH_ATTENTION)}, clock)
    with ops.using(attention=attention):
        ...
    print(table([attention]))

A shape is measured when it first comes up, on the tensors that it came with, and stays decided: before a graph is captured the
same must have run once uncaptured. What an implementation does not accept is not measured. Nothing is caught: one that raises is
a defect.
"""

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from sdcore import ops

Clock = Callable[[Callable[[], Any]], float]  # runs something a few times -> median milliseconds


def event_clock(run: Callable[[], Any], rounds: int = 7) -> float:
    """Median milliseconds on the current CUDA stream, after two runs to warm up. Not yet run: it needs a GPU."""
    for _ in range(2):
        run()
    times = []
    for _ in range(rounds):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        run()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return sorted(times)[rounds // 2]


class Choice:
    """An operation that runs by whichever of `candidates` is fastest for the shape at hand. Put it into `ops.using`."""

    def __init__(self, name: str, candidates: Mapping[str, Callable], clock: Clock = event_clock):
        self.name, self.candidates, self.clock = name, dict(candidates), clock
        self.measured: dict[str, dict[str, float]] = {}  # shape -> candidate -> milliseconds

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        key = describe(args, kwargs)
        if key not in self.measured:
            runs = {
                name: run
                for name, run in self.candidates.items()
                if not hasattr(run, "accepts") or run.accepts(*args, **kwargs)
            }
            self.measured[key] = {name: self.clock(partial(run, *args, **kwargs)) for name, run in runs.items()}
        return self.candidates[self.chosen(key)](*args, **kwargs)

    def chosen(self, key: str) -> str:
        """The fastest for a shape that was measured."""
        return min(self.measured[key], key=self.measured[key].__getitem__)


def describe(args: tuple, kwargs: Mapping[str, Any]) -> str:
    """What decides how fast a call is, as a line: `2x4096x320:bfloat16 ... heads=8`, with strides where they are unusual."""

    def one(x: Any) -> str:
        if not isinstance(x, Tensor):
            return f"{x:g}" if isinstance(x, float) else str(x)
        shape = "x".join(map(str, x.shape))
        strides = "" if x.is_contiguous() else "/" + ",".join(map(str, x.stride()))
        return f"{shape}:{str(x.dtype).removeprefix('torch.')}{strides}"

    return " ".join([*map(one, args), *(f"{name}={one(x)}" for name, x in kwargs.items())])


def table(choices: Iterable[Choice]) -> str:
    """Everything measured so far, a line a shape: who runs it, and the milliseconds of all."""
    lines = []
    for choice in choices:
        for key, times in choice.measured.items():
            best = choice.chosen(key)
            others = "  ".join(f"{name} {ms:.3f}" for name, ms in sorted(times.items(), key=lambda item: item[1]))
            lines.append(f"{choice.name:16} {best:10} {others:50} {key}")
    return "\n".join(lines)


def sdpa_with(backend: SDPBackend) -> Callable:
    """`ops.attention` in PyTorch with one backend of its attention, and the predicate that says where that backend runs."""
    can = {
        SDPBackend.FLASH_ATTENTION: torch.backends.cuda.can_use_flash_attention,
        SDPBackend.CUDNN_ATTENTION: torch.backends.cuda.can_use_cudnn_attention,
        SDPBackend.EFFICIENT_ATTENTION: torch.backends.cuda.can_use_efficient_attention,
    }[backend]

    def attention(q: Tensor, k: Tensor, v: Tensor, heads: int, causal: bool = False, upcast: bool = False) -> Tensor:
        with sdpa_kernel(backend):
            return ops.REFERENCES["attention"](q, k, v, heads, causal, upcast)

    def accepts(q: Tensor, k: Tensor, v: Tensor, heads: int, causal: bool = False, upcast: bool = False) -> bool:
        if q.device.type != "cuda":
            return False
        q, k, v = (x.float() if upcast else x for x in (q, k, v))
        q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
        return can(torch.backends.cuda.SDPAParams(q, k, v, None, 0.0, causal, False), False)

    attention.accepts = accepts  # type: ignore[attr-defined]
    return attention
