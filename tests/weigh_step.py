"""Training steps in a process of their own: the memory that they were said to take beside what they took.

    python -m tests.weigh_step '{"size": "sd15", "method": "lora", "memory": "all"}'

Prints one line of JSON. A model of official (or small) size, random weights, one picture; `memory` is "none" (every block is
kept), "all" (every block is recomputed) or "between" (a budget half-way). What was taken is the highest resident memory of two
steps (the second one has the optimiser's memory from its beginning), less what the process had before the model was made. glibc
is told to fetch every block above 64 KiB from the system and to give it back at once: its own hoard is not the step's.
"""

import json
import math
import os
import re
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

HOARD_NOTHING = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}
MiB = 2**20


def resident(which: str = "VmRSS") -> float:
    """MiB of this process: VmRSS now, VmHWM at most since the last `reset`."""
    found = re.search(rf"{which}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return int(found[1]) / 1024


def reset() -> None:
    """Have VmHWM count from now on."""
    Path("/proc/self/clear_refs").write_text("5")


def model(size: str):
    """A pipeline of SD 1.5's sizes, or of a small one's; every weight is a number of its own page."""
    import torch
    from sdcore.weights.assemble import skeleton
    from sdcore.weights.load import load

    from sdcore.clip import CLIP_L
    from sdcore.pipeline import Pipeline
    from sdcore.scheduler import SD15_SCHEDULER
    from sdcore.unet import SD15
    from sdcore.vae import SD_VAE

    tiny = load("tiny", device="cpu")
    narrow = replace(SD15, channels=(96, 192, 192, 192), heads=(4, 4, 4, 4), context_dim=192)
    sizes = {
        "sd15": {"unet": SD15, "vae": SD_VAE, "text_encoder": CLIP_L},
        "small": {
            "unet": narrow, "vae": replace(SD_VAE, channels=(32, 32, 64, 64)),
            "text_encoder": replace(CLIP_L, width=192, heads=4, layers=2, mlp=384),
        },
    }[size]  # fmt: skip
    block, parts = torch.randn(1 << 20, generator=torch.Generator().manual_seed(0)), {}
    for name, config in sizes.items():
        part = skeleton(name, config).to_empty(device="cpu").eval().requires_grad_(False)
        for p in (*part.parameters(), *part.buffers()):
            flat, bound = p.data.view(-1), 0.5 / math.sqrt(max(p[0].numel(), 1))
            for start in range(0, len(flat), len(block)):
                flat[start : start + len(block)] = block[: len(flat) - start] * bound
        parts[name] = part
    return Pipeline(parts["unet"], parts["vae"], [parts["text_encoder"]], tiny.tokenizers, SD15_SCHEDULER)


def weigh(size: str, method: str, memory: str, pixels: int = 256, batch: int = 1, **more) -> dict:
    """MiB that two steps were said to take and took, the part of it that is not held throughout, processor seconds."""
    import numpy as np
    import torch
    import torch._dynamo  # what a rehearsal imports is part of the process, not of the step
    from PIL import Image
    from sdcore.train import memory as planner
    from sdcore.train import ranks
    from sdcore.train.finetune import Finetune, FinetuneOptions
    from sdcore.train.lora import LoRAOptions, TrainLoRA
    from sdcore.train.state import State

    torch.set_num_threads(1)
    warm = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.Flatten(), torch.nn.LazyLinear(4))
    warm(torch.randn(1, 3, 32, 32)).sum().backward()
    method_of, options_of = {"lora": (TrainLoRA, LoRAOptions), "full": (Finetune, FinetuneOptions)}[method]
    before = resident()
    with tempfile.TemporaryDirectory() as folder:
        picture = np.random.default_rng(0).integers(0, 256, (pixels, pixels, 3)).astype(np.uint8)
        Image.fromarray(picture).save(f"{folder}/0.png")
        o = options_of(
            data=folder, captions="text:a red circle", out=f"{folder}/run", cache="", device="cpu", resolution=pixels,
            buckets=False, batch=batch, threads=1, **more,
        )  # fmt: skip
        task = method_of(o, model(size))
        began = time.process_time()
        alone = ranks.Ranks()
        kept = planner.rehearse(task, alone, set())
        everything = {name for name, block in kept.blocks.items() if block.saved}
        if memory in ("none", "all"):
            chosen = everything if memory == "all" else set()
            found = planner.Plan(chosen, kept, planner.rehearse(task, alone, chosen) if chosen else kept)
        else:  # "between": a budget half-way between the two
            least = planner.rehearse(task, alone, everything)
            found = planner.plan(task, alone, (kept.peak + least.peak) // 2)
        planner.apply(task, found.recomputed)
        planned = time.process_time() - began
        state = State(task, o, alone)
        reset()
        began = time.process_time()
        figures = [state.take(step, 1e-5) for step in range(2)]
        assert all(figures), "a step was not applied"
        took = resident("VmHWM") - before
    held = sum(found.planned.held.values()) / MiB
    return {
        "size": size, "method": method, "memory": memory, "blocks": len(kept.blocks), "recomputed": len(found.recomputed),
        "held": held, "planned": found.planned.peak / MiB, "took": took, "seconds": (time.process_time() - began) / 2,
        "planning": planned,
    }  # fmt: skip


if __name__ == "__main__":
    if any(os.environ.get(name) != value for name, value in HOARD_NOTHING.items()):  # read when a process begins
        os.execve(sys.executable, [sys.executable, "-m", "tests.weigh_step", *sys.argv[1:]], os.environ | HOARD_NOTHING)
    print(json.dumps(weigh(**json.loads(sys.argv[1]))))
