"""One update of DDPO at the real size of SD 1.5, on a CPU: two pictures of 128 pixels, two steps. Prints one JSON document."""

import json
import resource
import sys
import time

import torch
from sdcore.kernels import models
from sdcore.train.ddpo import DDPO, DDPOOptions
from sdcore.train.ranks import Ranks
from sdcore.train.state import State
from sdcore.weights import fetch

from sdcore.clip import CLIP_L, CLIPText
from sdcore.tokenizer import Tokenizer

if __name__ == "__main__":
    torch.set_num_threads(1)
    pipe = models.build("SD1.5 512", torch.device("cpu"), torch.float32)
    pipe.text_encoders = [CLIPText(CLIP_L)]
    pipe.tokenizers = [Tokenizer.from_folder(fetch.resolve("tiny") / "tokenizer")]  # other words, the same kind
    pipe.tokenizers[0].max_length = 77
    o = DDPOOptions(
        out=sys.argv[1], device="cpu", reward="compressibility", prompts="animals", draw_steps=2, guidance=5.0, batch=2, rank=4,
        resolution=128, least=2, tracked=2, threads=1,
    )  # fmt: skip
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    task = DDPO(o, pipe)
    state = State(task, o, Ranks())
    start, clock = time.process_time(), time.time()
    figures = state.take(0, o.lr)
    print(json.dumps({
        "model_GiB": round(before, 2), "peak_GiB": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
        "processor_s": round(time.process_time() - start, 1), "clock_s": round(time.time() - clock, 1),
        "trained": sum(p.numel() for p in task.trained), "steps_learnt_from": len(task.noisy), **figures,
    }))  # fmt: skip
