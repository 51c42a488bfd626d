"""How long something takes, and how long it would take at best on this machine.

On a GPU a thing is recorded into a CUDA graph, over as many sets of inputs as it takes to leave the L2 cache behind (so that
each run finds its inputs in memory, as in a model that has just done something else), and the graph is replayed between two
events: the processor's own slowness is not measured. The median of many replays counts. On a CPU the clock is read around a run.

The roof is measured in the same run: a large matrix product on random numbers (zeros are up to an eighth faster) and a large
copy, bytes read plus bytes written.
"""

import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import torch

Thunk = Callable[[], Any]  # something to time

CACHES = 3  # the sets of inputs together fill the L2 cache so many times
MOST_SETS = 64


class Timing(NamedTuple):
    """Milliseconds of one run: the median, and half the distance between the quartiles."""

    ms: float
    spread: float


class Roof(NamedTuple):
    """What the machine does at best, as measured: TFLOP/s of a matrix product in one dtype, TB/s of a copy."""

    tflops: float
    tbs: float

    def floor(self, flop: float, size: float) -> float:
        """Milliseconds that so many floating-point operations and bytes take at least."""
        return 1e3 * max(flop / (self.tflops * 1e12), size / (self.tbs * 1e12))


def sets(size: int, device: torch.device) -> int:
    """How many sets of inputs of `size` bytes it takes to leave the cache behind; 1 on a CPU."""
    if device.type != "cuda":
        return 1
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return max(2, min(MOST_SETS, -(-CACHES * cache // max(size, 1))))


def milliseconds(thunks: Sequence[Thunk], device: torch.device, seconds: float = 0.2) -> Timing:
    """The time of one of the thunks, which do the same on different inputs."""
    return _graphed(thunks, seconds) if device.type == "cuda" else _clocked(thunks, seconds)


def _clocked(thunks: Sequence[Thunk], seconds: float, fewest: int = 3) -> Timing:
    thunks[0]()
    samples: list[float] = []
    end = time.perf_counter() + seconds
    while len(samples) < fewest or time.perf_counter() < end:
        start = time.perf_counter()
        thunks[len(samples) % len(thunks)]()
        samples.append(1e3 * (time.perf_counter() - start))
    return summary(samples)


def _graphed(thunks: Sequence[Thunk], seconds: float, fewest: int = 10) -> Timing:
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):  # whatever compiles or picks an algorithm does it here
        for _ in range(3):
            for thunk in thunks:
                thunk()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for thunk in thunks:
            thunk()
    graph.replay()
    return replayed(graph.replay, seconds, fewest, len(thunks))


def replayed(run: Thunk, seconds: float, fewest: int, parts: int = 1) -> Timing:
    """Time `run`, which does `parts` equal things on the GPU, by events."""
    run()
    torch.cuda.synchronize()
    samples: list[float] = []
    end = time.perf_counter() + seconds
    while len(samples) < fewest or time.perf_counter() < end:
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run()
        stop.record()
        stop.synchronize()
        samples.append(start.elapsed_time(stop) / parts)
    return summary(samples)


def once(run: Thunk, device: torch.device) -> float:
    """Milliseconds of one run, host and device together."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - start)


def side_by_side(thunks: dict[str, Thunk], device: torch.device, rounds: int = 5) -> dict[str, Timing]:
    """Time whole models: one run of each in turn, so that what the machine does besides falls on all of them alike."""
    samples: dict[str, list[float]] = {name: [] for name in thunks}
    for _ in range(rounds):
        for name, thunk in thunks.items():
            samples[name].append(once(thunk, device))
    return {name: summary(found) for name, found in samples.items()}


def summary(samples: Sequence[float]) -> Timing:
    low, middle, high = statistics.quantiles(samples, n=4)
    return Timing(middle, (high - low) / 2)


def roof(device: torch.device, dtype: torch.dtype, seconds: float = 0.3) -> Roof:
    """Measure it."""
    on_gpu = device.type == "cuda"
    n, size = (8192, 2**30) if on_gpu else (1024, 2**25)  # rows of a square matrix; bytes
    generator = torch.Generator(device).manual_seed(0)
    a, b = (torch.randn(n, n, generator=generator, device=device).to(dtype) for _ in range(2))
    source = torch.randn(size // 4, generator=generator, device=device)
    target = torch.empty_like(source)
    product = milliseconds([lambda: a @ b], device, seconds).ms
    copy = milliseconds([lambda: target.copy_(source)], device, seconds).ms
    return Roof(2 * n**3 / product / 1e9, 2 * size / copy / 1e9)


# ------------------------------------------------------------------------------------------------------------- on what machine


def header(device: torch.device) -> dict[str, Any]:
    """What a figure means nothing without: the machine, the versions, the state of the code."""
    return {
        "machine": machine(device),
        "versions": versions(),
        "commit": commit(),
        "date": time.strftime("%Y-%m-%d %H:%M", time.gmtime()),
    }


def machine(device: torch.device) -> dict[str, Any]:
    """Names and sizes of the device."""
    if device.type != "cuda":
        return {"name": _cpu(), "threads": torch.get_num_threads()}
    found = torch.cuda.get_device_properties(device)
    return {
        "name": found.name,
        "capability": f"{found.major}.{found.minor}",
        "multiprocessors": found.multi_processor_count,
        "memory_gib": round(found.total_memory / 2**30, 1),
        "l2_mib": round(found.L2_cache_size / 2**20, 1),
        "cpu": _cpu(),
    }


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    names = [line for line in info.read_text().splitlines() if line.startswith("model name")] if info.exists() else []
    return names[0].partition(":")[2].strip() if names else platform.processor() or platform.machine()


def versions() -> dict[str, str | None]:
    """Versions of everything that takes part; None for what is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version(), "cuda": torch.version.cuda}
    for name in ("torch", "triton", "diffusers", "xformers", "flash-attn"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


def commit() -> str | None:
    """The commit that the package was run from, with a + where files differ from it; None outside a repository."""

    def git(*words: str) -> str | None:
        try:
            done = subprocess.run(["git", *words], cwd=Path(__file__).parent, capture_output=True, text=True)
        except FileNotFoundError:
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    head = git("rev-parse", "--short=12", "HEAD")
    return head and head + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")
