"""DRaFT: tune a model to a reward that has gradients, by sending them back through the sampler into the weights.

    sdcore train draft --model sd15 --reward aesthetic:CLIP,HEAD --prompts animals --keep-last 1 --out runs/pretty

Pictures are drawn, the reward looks at them, and its gradient goes back through the decoder and through the last steps of the
sampler. How many steps, is what the kinds differ in:

    draft       the last --last steps (DRaFT-K; all of them is DRaFT)
    lv          the last step alone, --copies times: the finished latent is given fresh noise, as much as the last step begins
                with, and that step is taken again; the mean of their gradients has less variance (DRaFT-LV)
    alignprop   a number of steps drawn anew for each update, from 1 to all

    loss = - mean over pictures of the reward

Steps before are drawn without gradients. Of each step that has them, and of each picture's decoder, only the beginning is kept
and the rest worked out again on the way back (checkpointing), so memory hardly grows with their number.

Such gradients find what the reward is blind to much faster than DDPO does: watch the guards (train/guards.py), and stop early.

Source: Clark et al. 2023 (2309.17400), algorithm 1; Prabhudesai et al. 2023 (2310.03739), section 4.1.
Legend: n pictures of a pass, c h w latent.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from sdcore.errors import ConfigError
from sdcore.pipeline import Pipeline
from sdcore.samplers import Noise, Step, add_noise, advance

from .options import option, parse
from .policy import Policy, PolicyOptions, load
from .rewards import judged
from .task import Loss, Part, generator

KINDS = ("draft", "lv", "alignprop")


@dataclass(frozen=True)
class DRaFTOptions(PolicyOptions):
    """Tune a model to a reward that has gradients, through the sampler."""

    approach: str = option("lv", "draft: through the last --last steps; lv: the last one, on several copies; alignprop")
    last: int = option(1, "draft: steps at the end that gradients go through")
    copies: int = option(2, "lv: times that the last step is taken")
    eta: float = option(0.0, "how random the sampler is: 0 is ddim, 1 as random as ddpm")


class DRaFT(Policy):
    """Reward gradients through the sampler."""

    options: DRaFTOptions

    def __init__(self, options: DRaFTOptions, pipe: Pipeline):
        o = options
        if o.approach not in KINDS:
            raise ConfigError(f"--approach: expected one of {', '.join(KINDS)}, found {o.approach!r}")
        if not 1 <= o.last <= o.draw_steps or o.copies < 1:
            raise ConfigError(
                f"--last {o.last}, --copies {o.copies}: expected 1 to --draw-steps {o.draw_steps}, and from 1"
            )
        self.eta = o.eta
        super().__init__(options, pipe)
        if not self.reward.differentiable:
            raise ConfigError(f"--reward {self.reward.name}: has no gradients; tune to it by `sdcore train ddpo`")

    def loss(self, part: Part) -> Loss:
        """Minus the mean reward of the pictures of a pass."""
        words = [self.prompts[self.prompt_of(part.step, place)] for place in part.places]
        noise = self.noise(*[(part.step, place, 20) for place in part.places])
        latents = self.draw(words, noise, self.learnt(part.step))
        pictures = torch.cat([checkpoint(self.decode, one, use_reentrant=False) for one in latents.split(1)])
        words = words * (len(latents) // len(words))
        with torch.autocast(pictures.device.type, enabled=False):
            worth = judged(self.reward, pictures, words, self.out)
        figures = {"reward": worth.mean().item(), "reward_std": worth.std(correction=0).item()}
        return Loss(-worth.mean(), len(part.places), figures)

    def prompt_of(self, step: int, place: int) -> int:
        """The number of the prompt at a place of a step's batch."""
        return int(torch.randint(len(self.prompts), (1,), generator=generator(self.options.seed, step, place, 21)))

    def learnt(self, step: int) -> Sequence[Step]:
        """The steps at the end that gradients go through in an update."""
        count = {"draft": self.options.last, "lv": 1, "alignprop": self.truncation(step)}[self.options.approach]
        return self.steps[len(self.steps) - count :]

    def truncation(self, step: int) -> int:
        """AlignProp's number of steps, for all pictures of an update."""
        return 1 + int(torch.randint(len(self.steps), (1,), generator=generator(self.options.seed, step, 0, 24)))

    def draw(self, words: list[str], noise: Noise, learnt: Sequence[Step]) -> Tensor:
        """Finished latents [n, c, h, w], of lv [copies n, c, h, w], with gradients through the steps `learnt` at the end."""
        x = self.start(noise)
        with torch.no_grad():
            for step in self.steps[: len(self.steps) - len(learnt)]:
                x = self.move(x, step, words, noise(x))
        if self.options.approach != "lv":
            for step in learnt:
                x = checkpoint(self.move, x, step, words, noise(x), use_reentrant=False)
            return x
        step, found = learnt[0], []
        for _ in range(self.options.copies):
            found.append(checkpoint(self.move, x, step, words, noise(x), use_reentrant=False))
            finished = found[0].detach()
            x = add_noise(finished, noise(finished), step)
        return torch.cat(found)

    def move(self, x: Tensor, step: Step, words: list[str], fresh: Tensor) -> Tensor:
        """One step of the sampler, told of these words; `fresh` noise is used where the step draws any."""
        return advance(x, self.denoiser(words)(x, step), step, noise=fresh)

    def decode(self, latents: Tensor) -> Tensor:
        """Finished latents [1, c, h, w] -> a picture [1, 3, H, W] in 0..1, with gradients."""
        with torch.autocast(latents.device.type, enabled=False):
            return (self.pipe.vae.decode(latents / self.pipe.vae.config.scaling_factor) / 2 + 0.5).clamp(0, 1)


# The chapter's aesthetic task on SD 1.5 and SDXL, by reward gradients. Give your files with --reward.
SETTINGS: dict[str, object] = dict(
    model="sd15", dtype="bfloat16", precision="bf16", draw_steps=50, guidance=7.5, prompts="animals", weight_decay=0.1,
    reward="aesthetic:clip-vit-large-patch14,sac+logos+ava1-l14-linearMSE.pth", watch="animals-held-out", eval_every=20,
    save_every=20, watch_reward="incompressibility", stop=("diversity<0.3",),
)  # fmt: skip
PRESETS: dict[str, dict[str, object]] = {
    "aesthetic": SETTINGS | dict(approach="lv", rank=8, lr=4e-4, batch=16, accumulate=4, steps=200),
    "aesthetic-alignprop": SETTINGS | dict(approach="alignprop", rank=4, lr=1e-3, batch=128, accumulate=32, steps=20),
}  # fmt: skip
PRESETS |= {
    f"{name}-sdxl": preset | dict(model="sdxl", accumulate=int(str(preset["batch"])))
    for name, preset in PRESETS.items()
}


def main(argv: list[str] | None = None) -> int:
    """`sdcore train draft`."""
    from .loop import run

    options = parse(DRaFTOptions, argv, prog="sdcore train draft", presets=PRESETS)
    return run(DRaFT(options, load(options)), options)
