"""DDPO: tune a model to any reward, which need not have gradients, by policy gradients over its own denoising.

    sdcore train ddpo --model sd15 --preset compressibility --out runs/small
    sdcore train ddpo --reward checker --prompts world --draw-steps 10 --guidance 3 --out runs/right

A sampler with noise is a policy of many small steps: given x it draws the next x from a Gaussian N(mean, std²) whose mean the
network decides. So the density of what was drawn is known, step by step, and a step can be made more or less likely:

    log p = mean over c h w of  - (x_next - mean)² / (2 std²) - log std - log(2 pi) / 2
    ratio = exp(log p now - log p when it was drawn)
    loss  = mean over pictures and steps of  max(- A ratio, - A clamp(ratio, 1 ± clip))
            + kl * mean over pictures, steps and c h w of  (mean - untuned mean)² / (2 std²)

(The mean over the latent, not the sum, as the authors have it: that is why the clip is as small as 1e-4.) A is the picture's
advantage: its reward less the mean of rewards of the same prompt, over their standard deviation (`Tracker`).

An *epoch* draws --batch x --updates pictures, asks the reward, and learns from each of them --inner times. A step of the loop is
one update: one gradient over --batch pictures and all their steps, summed step by step so that only one of them is in memory.
Steps that draw no noise (std 0) are decided already and are left out. Pictures are learnt from in the batches that they were
drawn in, so in an epoch's first update every ratio is exactly 1.

A resumed run is exact: what an epoch draws is a function of (seed, epoch, weights at its beginning), and `Memory` keeps these
weights, what the reward said and the advantages; the rest is drawn again. Over several processes each draws its own places, the
rewards are exchanged, and all see the same advantages.

Source: Black et al. 2023 (2305.13301), sections 4.2, 4.3 and appendix; Schulman et al. 2017 (PPO's clip); KL: Fan et al. 2023.
Legend: n pictures of a pass, s steps, u updates, b batch, c h w latent.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sdcore.errors import ConfigError
from sdcore.pipeline import Pipeline
from sdcore.samplers import Step, mean_std, sample

from .options import option, parse
from .policy import Policy, PolicyOptions, load
from .ranks import present
from .rewards import Handle, Rewards
from .task import Loss, Part, generator


@dataclass(frozen=True)
class DDPOOptions(PolicyOptions):
    """Tune a model to a reward by policy gradients over its own denoising."""

    weight_decay: float = option(1e-4, "decoupled weight decay, on matrices and kernels only")
    updates: int = option(1, "updates an epoch, each on --batch pictures of its own")
    inner: int = option(1, "times that an epoch's pictures are learnt from")
    repeat: int = option(1, "pictures in a row that are of the same prompt")
    until: float = option(
        1.0, "share of the way, from its noisy beginning, that is learnt from: at the end little is decided"
    )
    fraction: float = option(1.0, "share of these steps that an update learns from, drawn anew each time")
    clip_ratio: float = option(1e-4, "how far from 1 a ratio still counts; small, for log p is a mean over the latent")
    clip_advantage: float = option(5.0, "largest advantage")
    kl: float = option(
        0.0, "weight of the distance to the untuned model's steps; costs a further forward of the network"
    )
    tracked: int = option(16, "latest rewards of each prompt that its advantages are measured by")
    least: int = option(16, "of which there must be so many; until then those of the whole epoch stand in")


class Rollout(NamedTuple):
    """What a pass drew in all updates of an epoch."""

    x: Tensor  # [u, n, s + 1, c, h, w]: what each step began with, and the finished latent
    log_p: Tensor  # [u, n, s]; of steps without noise 0


# ------------------------------------------------------------------------------------------------------------------- the formulas


def log_probability(x: Tensor, mean: Tensor, std: float) -> Tensor:
    """log N(x; mean, std²) of each picture [n], as a mean over the latent's numbers; x, mean [n, c, h, w], fp32."""
    each = -((x - mean) ** 2) / (2 * std**2) - math.log(std) - math.log(2 * math.pi) / 2
    return each.flatten(1).mean(dim=1)


def clipped(ratio: Tensor, advantage: Tensor, clip: float) -> Tensor:
    """PPO's loss of each picture [n]: nothing is gained by a ratio beyond 1 ± clip."""
    return torch.maximum(-advantage * ratio, -advantage * ratio.clamp(1 - clip, 1 + clip))


def divergence(mean: Tensor, other: Tensor, std: float) -> Tensor:
    """KL of two Gaussians of the same std, of each picture [n], as a mean over the latent's numbers."""
    return ((mean - other) ** 2 / (2 * std**2)).flatten(1).mean(dim=1)


class Known(torch.autograd.Function):
    """A number whose gradient has been worked out already: `Known.apply(value, gradients, *parameters)`."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, gradients: Sequence[Tensor], *parameters: Tensor) -> Tensor:
        ctx.gradients = gradients
        return value.clone()

    @staticmethod
    def backward(ctx: Any, above: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return (None, None, *[above * gradient for gradient in ctx.gradients])


# ------------------------------------------------------------------------------------------------------------------ what is kept


class Tracker(nn.Module):
    """The latest rewards of every prompt, and advantages by them. Source: Black et al. 2023, section 5 and appendix D.1."""

    values: Tensor
    counts: Tensor

    def __init__(self, prompts: int, size: int, least: int):
        super().__init__()
        self.least = least
        self.register_buffer("values", torch.zeros(prompts, size, dtype=torch.float64))  # each row a ring
        self.register_buffer("counts", torch.zeros(prompts, dtype=torch.int64))  # rewards ever seen

    def advantages(self, which: Sequence[int], rewards: Tensor) -> Tensor:
        """Take note of rewards [n] of prompts `which`; return their advantages [n] fp32.

        A prompt with fewer rewards than `least` on record is measured by all rewards at hand.
        """
        rewards = rewards.double()
        size = self.values.shape[1]
        for prompt, reward in zip(which, rewards, strict=True):
            self.values[prompt, self.counts[prompt] % size] = reward
            self.counts[prompt] += 1
        found = []
        for prompt, reward in zip(which, rewards, strict=True):
            seen = self.values[prompt, : min(int(self.counts[prompt]), size)]
            pool = rewards if len(seen) < self.least else seen
            found.append((reward - pool.mean()) / (pool.std(correction=0) + 1e-6))
        return torch.stack(found).float()


class Memory(nn.Module):
    """What of the present epoch a checkpoint has to keep: the rewards, the advantages, and the weights that drew it.

    The weights are kept only where an epoch is more than one step, so that a run can be cut within it.
    """

    epoch: Tensor
    rewards: Tensor
    advantages: Tensor

    def __init__(self, pictures: int, parameters: Sequence[Tensor]):
        super().__init__()
        self.register_buffer("epoch", torch.tensor(-1))
        self.register_buffer("rewards", torch.zeros(pictures))
        self.register_buffer("advantages", torch.zeros(pictures))
        for i, p in enumerate(parameters):
            self.register_buffer(f"weights{i}", p.detach().clone())

    @property
    def weights(self) -> list[Tensor]:
        return [buffer for name, buffer in self.named_buffers() if name.startswith("weights")]

    @torch.no_grad()
    def begin(self, epoch: int, parameters: Sequence[Tensor]) -> None:
        """An epoch begins with these weights."""
        self.epoch.fill_(epoch)
        for kept, p in zip(self.weights, parameters, strict=False):
            kept.copy_(p)

    @contextmanager
    def weights_of_then(self, parameters: Sequence[Tensor]) -> Iterator[None]:
        """Inside the `with`, the parameters are what they were when the epoch began."""
        now = [p.detach().clone() for p in parameters]
        with torch.no_grad():
            for p, kept in zip(parameters, self.weights, strict=True):
                p.copy_(kept)
        try:
            yield
        finally:
            with torch.no_grad():
                for p, own in zip(parameters, now, strict=True):
                    p.copy_(own)


# --------------------------------------------------------------------------------------------------------------------- the method


class DDPO(Policy):
    """Policy gradients over denoising."""

    options: DDPOOptions

    def __init__(self, options: DDPOOptions, pipe: Pipeline):
        super().__init__(options, pipe)
        o = options
        for name, value in (("updates", o.updates), ("inner", o.inner), ("repeat", o.repeat), ("least", o.least)):
            if value < 1:
                raise ConfigError(f"--{name} {value}: expected a number from 1")
        if o.precision == "fp16":
            raise ConfigError(
                "--precision fp16: gradients are worked out step by step of the sampler, unscaled; take bf16"
            )
        if not (0 < o.fraction <= 1 and 0 < o.until <= 1):
            raise ConfigError(f"--fraction {o.fraction}, --until {o.until}: expected shares above 0, up to 1")
        if o.least > o.tracked:
            raise ConfigError(f"--least {o.least}: only --tracked {o.tracked} rewards of a prompt are kept")
        self.noisy = [step for step in self.steps[: round(o.until * len(self.steps))] if step.std > 0]
        if not self.noisy:
            raise ConfigError(
                f"--draw-steps {o.draw_steps}: no step draws noise, so there is nothing to learn from; use more"
            )
        self.tracker = Tracker(len(self.prompts), o.tracked, o.least)
        kept = self.trained if o.updates * o.inner > 1 else []
        self.memory = Memory(o.batch * o.updates, kept)
        self.modules |= {"tracker": self.tracker, "memory": self.memory}
        self.rollouts: dict[
            range, Rollout
        ] = {}  # of the present epoch, by the places of the pass: drawn again where lost
        self.drawn = -1  # the epoch that they are of

    # ------------------------------------------------------------------------------------------------------------ an epoch begins

    def prompt_of(self, epoch: int, picture: int) -> int:
        """The number of the prompt of a picture of an epoch."""
        rng = generator(self.options.seed, epoch, picture // self.options.repeat, 21)
        return int(torch.randint(len(self.prompts), (1,), generator=rng))

    def begin_epoch(self, epoch: int) -> None:
        """Draw this process's pictures, and unless that was done before the run was cut, ask the reward about them."""
        o, ranks = self.options, present()
        again = int(self.memory.epoch) == epoch
        self.rollouts = {}
        handles: list[tuple[list[int], Handle]] = []
        asked = nullcontext() if again else Rewards(self.reward, self.out, stop=self.stopping)
        then = self.memory.weights_of_then(self.trained) if again else nullcontext()
        with asked as judge, then, torch.no_grad():
            for places in ranks.shares(o.batch, o.accumulate):
                drawn = []
                for u in range(o.updates):
                    pictures = [u * o.batch + place for place in places]
                    drawn.append(self.roll(epoch, pictures))
                    if judge is not None:
                        seen = self.pictures(drawn[-1].x[0, :, -1])
                        handles.append((pictures, judge.submit(seen, self.words(epoch, pictures))))
                self.rollouts[places] = Rollout(*(torch.cat(parts) for parts in zip(*drawn, strict=True)))
            rewards = torch.zeros(o.batch * o.updates)
            for pictures, handle in handles:
                rewards[pictures] = handle.result()
        self.drawn = epoch
        if not again:
            ranks.add_up([rewards])
            self.memory.begin(epoch, self.trained)
            self.memory.rewards.copy_(rewards)
            which = [self.prompt_of(epoch, picture) for picture in range(len(rewards))]
            self.memory.advantages.copy_(self.tracker.advantages(which, rewards))

    def words(self, epoch: int, pictures: Sequence[int]) -> list[str]:
        return [self.prompts[self.prompt_of(epoch, picture)] for picture in pictures]

    def roll(self, epoch: int, pictures: Sequence[int]) -> Rollout:
        """Draw pictures of an epoch in one batch, and keep every step with its log-probability; u is 1."""
        noise = self.noise(*[(epoch, picture, 20) for picture in pictures])
        denoise = self.denoiser(self.words(epoch, pictures))
        x = self.start(noise)
        xs, log_ps = [x], []
        for step, new, x0 in sample(denoise, x, self.steps, noise=noise):
            mean, std = mean_std(xs[-1], x0, step)
            log_ps.append(log_probability(new, mean, std) if std else torch.zeros(len(new), device=new.device))
            xs.append(new)
        return Rollout(torch.stack(xs, dim=1)[None], torch.stack(log_ps, dim=1)[None])

    # ------------------------------------------------------------------------------------------------------------------ an update

    def loss(self, part: Part) -> Loss:
        """The loss of a pass, its gradient worked out here: one step of the sampler after the other."""
        o = self.options
        epoch, k = divmod(part.step, o.updates * o.inner)
        if self.drawn != epoch or part.places not in self.rollouts:
            self.begin_epoch(epoch)
        which = self.turn(epoch, k)[part.places.start : part.places.stop]  # of which update each place's picture is
        rows = torch.arange(len(which))
        x, log_p = (t[which, rows] for t in self.rollouts[part.places])  # [n, s + 1, c, h, w], [n, s]
        pictures = which * o.batch + torch.tensor(part.places)
        words = self.words(epoch, pictures.tolist())
        advantage = self.memory.advantages[pictures].to(x.device).clamp(-o.clip_advantage, o.clip_advantage)

        steps = self.chosen(part)
        totals: dict[str, float] = {}
        total = torch.zeros((), device=x.device)
        gradients = [torch.zeros_like(p) for p in self.trained]
        for step in steps:
            loss, figures = self.of_step(words, x[:, step.i], x[:, step.i + 1], log_p[:, step.i], advantage, step)
            found = torch.autograd.grad(loss / len(steps), self.trained, materialize_grads=True)
            torch._foreach_add_(gradients, list(found))
            total += loss.detach() / len(steps)
            for name, value in figures.items():
                totals[name] = totals.get(name, 0.0) + value / len(steps)
        rewards = self.memory.rewards
        totals |= {"reward": rewards.mean().item(), "reward_std": rewards.std(correction=0).item()}
        return Loss(Known.apply(total, gradients, *self.trained), len(part.places), totals)

    def turn(self, epoch: int, k: int) -> Tensor:
        """Of which update the picture at each place [b] is, in update k of an epoch: its own at first, then shuffled by place."""
        o = self.options
        inner, u = divmod(k, o.updates)
        if inner == 0:
            return torch.full((o.batch,), u)
        order = torch.rand(o.updates, o.batch, generator=generator(o.seed, epoch, inner, 22)).argsort(dim=0)
        return order[u]

    def chosen(self, part: Part) -> list[Step]:
        """The steps that an update learns from."""
        count = max(1, round(self.options.fraction * len(self.noisy)))
        if count == len(self.noisy):
            return self.noisy
        order = torch.randperm(len(self.noisy), generator=generator(part.seed, part.step, 0, 23))
        return [self.noisy[i] for i in sorted(order[:count].tolist())]

    def of_step(
        self, words: list[str], x: Tensor, new: Tensor, before: Tensor, advantage: Tensor, step: Step
    ) -> tuple[Tensor, dict[str, float]]:
        """The loss of one step from x to `new` [n, c, h, w], which had the log-probability `before` [n] when it was drawn."""
        o = self.options
        mean, std = mean_std(x, self.denoiser(words)(x, step), step)
        log_p = log_probability(new, mean, std)
        ratio = (log_p - before).exp()
        loss = clipped(ratio, advantage, o.clip_ratio).mean()
        figures = {
            "ratio": ratio.mean().item(),
            "clipped": ((ratio - 1).abs() > o.clip_ratio).float().mean().item(),
            "moved": 0.5 * (log_p - before).square().mean().item(),  # about the KL to the model that drew
        }
        if o.kl:
            with torch.no_grad(), self.untuned():
                base, _ = mean_std(x, self.denoiser(words)(x, step), step)
            distance = divergence(mean, base, std).mean()
            loss, figures["kl"] = loss + o.kl * distance, distance.item()
        return loss, figures


# The chapter's tasks on SD 1.5 with the settings of its configurations, and the same on SDXL. Two things are other ones: 45
# animals stand for the 398 of ImageNet, and bf16 for fp16. Rewards that need files are named as they are called where they are
# released: give yours with --reward. The chapter asked people on two pictures at a time of one prompt, for 10 epochs.
SETTINGS: dict[str, object] = dict(
    model="sd15", dtype="bfloat16", precision="bf16", rank=4, draw_steps=50, guidance=5.0, lr=3e-4, weight_decay=1e-4,
    beta2=0.999, clip=1.0, clip_ratio=1e-4, clip_advantage=5.0, inner=1, tracked=16, least=16, eval_every=20, save_every=20,
    watch="animals-held-out", stop=("diversity<0.3",),
)  # fmt: skip
JPEG: dict[str, object] = dict(prompts="animals", batch=64, updates=4, steps=400, accumulate=8)
TASKS: dict[str, dict[str, object]] = {
    "compressibility": JPEG | dict(reward="compressibility"),
    "incompressibility": JPEG | dict(reward="incompressibility"),
    "aesthetic": dict(
        reward="aesthetic:clip-vit-large-patch14,sac+logos+ava1-l14-linearMSE.pth", prompts="animals", batch=128, updates=2,
        steps=400, accumulate=16, tracked=32, watch_reward="incompressibility",
    ),
    "alignment": dict(
        reward="ask:questions.json", prompts="activities", batch=144, updates=2, steps=400, accumulate=18, tracked=32,
        watch="activities-held-out", watch_reward="incompressibility",
    ),
    "people": dict(reward="people", prompts="mountain", batch=8, steps=10, accumulate=1, least=4, eval_every=5, save_every=1),
}  # fmt: skip
PRESETS: dict[str, dict[str, object]] = {name: SETTINGS | task for name, task in TASKS.items()}
PRESETS |= {
    f"{name}-sdxl": preset | dict(model="sdxl", accumulate=int(str(preset["batch"])) // 2)
    for name, preset in PRESETS.items()
}


def main(argv: list[str] | None = None) -> int:
    """`sdcore train ddpo`."""
    from .loop import run

    options = parse(DDPOOptions, argv, prog="sdcore train ddpo", presets=PRESETS)
    return run(DDPO(options, load(options)), options)
