"""Guidance and the sampler's move in one kernel: from the network's output to the next x and the next network input.

Whatever the sampler, the next x is a weighted sum of the x's and x0's seen so far (see `sdcore.solvers`), so one kernel serves
all of them. What changes from step to step is a row of numbers that lies on the device: a captured graph is replayed with the
next row, and the host is never asked. Written in PyTorch the same is some fifteen launches on tensors of a few kilobytes.

    output = negative + guidance (positive - negative)          where the batch holds both, negative first
    x0     = from_x x + from_out output
    next   = w x + w0 x0 + w' x' + w0' x0' + ... + std noise      primes: one step ago, two steps ago, ...
    entry  = next_scale next                                    what the network sees next, in its dtype and layout

Multiplications and additions stay separate and in the order of `guidance.denoiser` and `samplers.mean_std`, so x is bit-equal to
theirs where all weights are used (a weight of 0 is multiplied here and left out there: equal too, unless x is infinite).

Source: Ho & Salimans 2022 (2207.12598), equation 6; the weights: `sdcore.solvers`.

Legend: b images, c channels, s positions, p pairs (x, x0) remembered; a row is [guidance, from_x, from_out, std, next_scale,
w, w0, w', w0', ...], fp32 [7 + 2 p].
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from sdcore.kernels.common import FLOATS, Build, build, can_run, empty, empty_like, name_of
from torch import Tensor

from sdcore.samplers import Step, memory

BLOCK = 512
WARPS = 4
HEAD = 5  # numbers of a row before the weights
DEEPEST = 4  # pairs that a sampler may look back to


def rows(steps: Sequence[Step], guidance: float = 1.0) -> Tensor:
    """The numbers of every step, [steps, 7 + 2 p] in fp32: what `guidance_step` takes a row of."""
    depth = memory(steps) + 1
    table = []
    for step, after in zip(steps, [*steps[1:], None], strict=True):
        weights = [w for pair in step.weights for w in pair]
        next_scale = after.input_scale if after is not None else 1.0
        head = [guidance, step.x0_from_x, step.x0_from_out, step.std, next_scale]
        table.append(head + weights + [0.0] * (2 * depth - len(weights)))
    return torch.tensor(table, dtype=torch.float32)


def reference(
    output: Tensor, x: Tensor, row: Tensor, history: Tensor, noise: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One step: (next x, x0, the next network input, the next history).

    output [b or 2 b, c, h, w], what the network said, in its dtype; negative first where there are 2 b
    x, noise [b, c, h, w] in fp32; noise where the step draws some
    row [7 + 2 p], a row of `rows`
    history [p, 2, b, c, h, w] in fp32, pairs (x, x0), the latest first; the next one begins with this step's pair
    """
    guidance, from_x, from_out, std, next_scale, w, w0, *older = row.unbind()
    guided = output.to(x.dtype)
    if len(output) == 2 * len(x):
        negative, positive = guided.chunk(2)
        guided = negative + guidance * (positive - negative)
    x0 = x * from_x + guided * from_out
    new = x * w + x0 * w0
    for weight, seen in zip(older, history.flatten(0, 1), strict=True):
        new = new + seen * weight
    if noise is not None:
        new = new + noise * std
    entry = torch.empty_like(output[: len(x)]).copy_(new * next_scale)
    pair = torch.stack([x, x0])[None]
    return new, x0, entry, torch.cat([pair, history])[: len(history)]


@triton.jit
def guidance_step_forward(
    output, x, row, history, noise, new, x0, entry, new_history, n, c, s, stride_c, stride_s,
    GUIDED: tl.constexpr, NOISY: tl.constexpr, PAIRS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """All of it for a block of the n = b c s numbers. x and its kin are contiguous; output and entry have strides."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < n
    image, channel, position = at // (c * s), at // s % c, at % s
    there = image * (c * s) + channel * stride_c + position * stride_s
    now = tl.load(x + at, inside, 0.0)
    said = tl.load(output + there, inside, 0.0).to(tl.float32)
    if GUIDED:
        positive = tl.load(output + n + there, inside, 0.0).to(tl.float32)
        said = said + tl.load(row) * (positive - said)
    guess = now * tl.load(row + 1) + said * tl.load(row + 2)
    moved = now * tl.load(row + 5) + guess * tl.load(row + 6)
    for k in tl.static_range(2 * PAIRS):
        seen = tl.load(history + k * n + at, inside, 0.0)
        moved = moved + seen * tl.load(row + 7 + k)
        if k < 2 * PAIRS - 2:
            tl.store(new_history + (k + 2) * n + at, seen, inside)
    if NOISY:
        moved = moved + tl.load(noise + at, inside, 0.0) * tl.load(row + 3)
    if PAIRS:
        tl.store(new_history + at, now, inside)
        tl.store(new_history + n + at, guess, inside)
    tl.store(new + at, moved, inside)
    tl.store(x0 + at, guess, inside)
    tl.store(entry + there, moved * tl.load(row + 4), inside)


def strides(output: Tensor) -> tuple[int, int] | None:
    """How far apart channels and positions of the network's output lie; None where it is neither contiguous nor channels last."""
    c, s = output.shape[1], output.shape[2:].numel()
    if output.is_contiguous():
        return s, 1
    if output.ndim == 4 and output.is_contiguous(memory_format=torch.channels_last):
        return 1, c
    return None


@torch.library.custom_op("sdcore::guidance_step", mutates_args=())
def forward(
    output: Tensor, x: Tensor, row: Tensor, history: Tensor, noise: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    n, c, s = x.numel(), x.shape[1], x.shape[2:].numel()
    apart = strides(output)
    assert apart is not None, "accepts() says which layouts there are"
    new, x0, new_history = empty(x.shape, x), empty(x.shape, x), empty(history.shape, x)
    entry = empty_like(output[: len(x)])
    guidance_step_forward[(triton.cdiv(n, BLOCK),)](
        output, x, row, history, x if noise is None else noise, new, x0, entry, new_history, n, c, s, *apart,
        GUIDED=len(output) == 2 * len(x), NOISY=noise is not None, PAIRS=len(history), BLOCK=BLOCK,
        num_warps=WARPS, enable_fp_fusion=False,
    )  # fmt: skip
    return new, x0, entry, new_history


@forward.register_fake
def _(output, x, row, history, noise):
    return torch.empty_like(x), torch.empty_like(x), torch.empty_like(output[: len(x)]), torch.empty_like(history)


def keep(ctx, inputs, output) -> None:
    """What the backward needs: the row. Everything else enters linearly."""
    said, _, row, _, noise = inputs
    ctx.save_for_backward(row)
    ctx.guided, ctx.noisy, ctx.dtype = len(said) == 2 * len(inputs[1]), noise is not None, said.dtype


def differentiate(ctx, d_new, d_x0, d_entry, d_history):
    """Gradients of output, x, row (none), history, noise: the transposed weights, in PyTorch, since nothing that trains is in a
    hurry here."""
    (row,) = ctx.saved_tensors
    guidance, from_x, from_out, std, next_scale, w, w0, *older = row.unbind()
    d_new = d_new + d_entry.to(d_new.dtype) * next_scale
    d_x0, d_x = d_x0 + d_new * w0, d_new * w
    d_seen = [d_new * weight for weight in older]
    if older:
        d_x, d_x0 = d_x + d_history[0, 0], d_x0 + d_history[0, 1]
        d_seen = [d + later for d, later in zip(d_seen, d_history.flatten(0, 1)[2:], strict=False)] + d_seen[-2:]
    d_x = d_x + d_x0 * from_x
    d_out = d_x0 * from_out
    if ctx.guided:
        d_out = torch.cat([d_out * (1 - guidance), d_out * guidance])
    d_seen = torch.stack(d_seen).view(d_history.shape) if older else torch.zeros_like(d_history)
    return d_out.to(ctx.dtype), d_x, None, d_seen, d_new * std if ctx.noisy else None


forward.register_autograd(differentiate, setup_context=keep)


def guidance_step(
    output: Tensor, x: Tensor, row: Tensor, history: Tensor, noise: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`reference` in one kernel; shapes and dtypes as there. No gradient for the row."""
    return forward(output, x, row, history, noise)


def accepts(output: Tensor, x: Tensor, row: Tensor, history: Tensor, noise: Tensor | None = None) -> bool:
    """fp32 contiguous x, history and noise, an output contiguous or channels last, a device where Triton runs."""
    contiguous = [x, row, history, *([] if noise is None else [noise])]
    return (
        can_run(output, *contiguous)
        and output.dtype in FLOATS
        and all(t.dtype == torch.float32 and t.is_contiguous() for t in contiguous)
        and x.ndim >= 3
        and output.shape[1:] == x.shape[1:]
        and len(output) in (len(x), 2 * len(x))
        and history.shape[1:] == (2, *x.shape)
        and len(history) <= DEEPEST
        and len(row) == HEAD + 2 + 2 * len(history)
        and (noise is None or noise.shape == x.shape)
        and strides(output) is not None
        and 0 < output.numel() < 2**31
    )


guidance_step.accepts = accepts  # type: ignore[attr-defined]


def builds() -> list[Build]:
    """What may be launched: any depth of any sampler, guided or not, noisy or not."""
    found = []
    others = ("x", "row", "history", "noise", "new", "x0", "new_history")
    for dtype in FLOATS:
        t = name_of(dtype)
        types = {**dict.fromkeys(others, "*fp32"), **dict.fromkeys(("output", "entry"), f"*{t}")}
        for guided in (False, True):
            for noisy in (False, True):
                for pairs in range(DEEPEST + 1):
                    name = f"guidance_step {t}{' guided' * guided}{' noisy' * noisy} {pairs} pairs"
                    constants = {"GUIDED": guided, "NOISY": noisy, "PAIRS": pairs, "BLOCK": BLOCK}
                    odd = ["row", "c", "stride_c", "stride_s"]
                    found.append(build(name, guidance_step_forward, constants, odd=odd, warps=WARPS, **types))
    return found


if __name__ == "__main__":
    from sdcore.kernels import bench

    bench.show("guidance_step")
