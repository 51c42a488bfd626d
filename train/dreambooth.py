"""DreamBooth: teach a model a subject from three to five photos, without its forgetting what all the others look like.

    sdcore train dreambooth --data photos --captions "text:a photo of molly dog" --model sd15 --out runs/molly \\
        --prior prediction --class-prompt "a photo of a dog"

What trains: all weights of the UNet, or with `--adapter lora` a LoRA (train/lora.py, all its options); with --text-encoder
the text encoders as well. The loss is that of fine-tuning on the photos, plus --prior-weight times a second one, which keeps the
class:

    --prior pictures     the loss on pictures of --class-prompt that the model itself has drawn before it trains
    --prior prediction   the distance, on the photos' own noised latents and told of --class-prompt, between what the network
                         says and what it said before: no pictures to draw, half as much to remember
    --prior distillation that distance on pictures of the class which the model has drawn: neither their noise nor their faults
                         are learned, so few of them hold much

"Before" is a frozen copy of the UNet, or the same one with the LoRA off. Both terms are weighed alike (min-SNR, Huber). What is
kept is what --class-prompt names; a class of many kinds is kept better by several: "a photo of a dog|two dogs|a dog and a cat".

Source: Ruiz et al. 2022, section 3.2 (prior preservation), equation 2. The prior by prediction is distillation of the model into
itself (Li & Hoiem 2016, learning without forgetting).
Legend: b examples.
"""

import copy
import json
import shutil
import sys
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from sdcore.weights import checkpoint as ck
from sdcore.weights import convert, fetch
from torch import Tensor
from tqdm import tqdm

from sdcore import lora
from sdcore.errors import ConfigError, TrainingError
from sdcore.unet import UNet
from sdcore.voices import Conditions

from . import objectives
from .data import Pictures, Visit
from .loop import run
from .lora import LoRAOptions, TrainLoRA
from .objectives import Noisy
from .options import option, parse
from .task import Loss, Part, generator
from .tuning import Tune, load
from .twin import replaced_by

PRIORS = ("none", "pictures", "prediction", "distillation")
DRAWN = ("pictures", "distillation")  # the priors on drawn pictures


@dataclass(frozen=True)
class DreamBoothOptions(LoRAOptions):
    """Teach a model a subject from a few photos."""

    lr: float = option(5e-6, "peak learning rate; 1e-4 is usual for a LoRA")
    captions: str = option(
        "txt", "text:WORDS for all photos, the words that are to call the subject; or as other methods"
    )
    adapter: str = option("none", "none: all weights of the UNet train; lora: a LoRA beside them")
    prior: str = option("none", "what keeps the class: none, pictures, prediction or distillation")
    prior_weight: float = option(1.0, "weight of the prior's loss")
    class_prompt: str | None = option(
        None, "the subject's class in words, such as: a photo of a dog; or several, with | between them, each as often"
    )
    class_pictures: int = option(200, "how many pictures of the class")
    class_folder: str | None = option(None, "where they are kept, and drawn where they are missing; OUT/class")
    class_steps: int = option(25, "steps of the sampler for each of them")


PRESETS: dict[str, dict[str, object]] = {
    # The chapter's notebook 03, on SD 1.5 (add --model sdxl --resolution 1024). It took one step, at a rate that would
    # have spoilt the model in more, with prior preservation written but off: here the paper's rate, steps enough, and the prior.
    "chapter-dreambooth": dict(
        model="sd15", resolution=512, captions="text:a photo of molly dog", steps=400, batch=4, lr=5e-6, beta2=0.999, ema=0.0,
        prior="pictures", class_prompt="a photo of a dog",
    ),
    # Notebook 04, on SDXL (add --model sd15 --resolution 512 for the other). Its LoRA is on both attentions, as here, though its
    # text says on the one to the words; it had no prior.
    "chapter-dreambooth-lora": dict(
        model="sdxl", resolution=1024, captions="text:a photo of molly dog", adapter="lora", rank=4, steps=200, batch=4,
        accumulate=2, lr=1e-4, beta2=0.999, ema=0.0, prior="prediction", class_prompt="a photo of a dog",
    ),
}  # fmt: skip


class DreamBooth(TrainLoRA):
    """Fine-tuning on a subject, with a term that keeps its class."""

    options: DreamBoothOptions
    frozen: UNet  # the UNet as it was, where its own weights train

    def begin(self) -> None:
        o = self.options
        if o.adapter not in ("none", "lora") or o.prior not in PRIORS:
            raise ConfigError(
                f"--adapter {o.adapter}, --prior {o.prior}: expected none or lora, and one of {', '.join(PRIORS)}"
            )
        if o.prior != "none" and not o.class_prompt:
            raise ConfigError(f"--prior {o.prior}: needs --class-prompt, such as: a photo of a dog")
        if o.prior in DRAWN:
            folder = self.draw_class(Path(o.class_folder or Path(o.out) / "class"))
            words = "txt" if len(self.class_prompts) > 1 else f"text:{o.class_prompt}"
            seen = replace(o, data=str(folder), captions=words, masks=None, broken="refuse", repeats=1)
            self.of_class = Pictures(seen, o.seed + 1, o.batch)
        if o.prior not in ("none", "pictures"):
            self.told_before = {words: Tune.context(self, [words]) for words in (*self.class_prompts, "")}
        if o.adapter == "lora":
            super().begin()
            return
        if o.prior not in ("none", "pictures"):
            self.frozen = copy.deepcopy(self.pipe.unet)
        parts = lora.models(self.pipe)
        self.modules = {part: model for part, model in parts.items() if part == "unet" or o.text_encoder}
        for model in self.modules.values():
            model.float().requires_grad_(True)

    def rate_of(self, name: str) -> float:
        if self.options.adapter == "lora":
            return super().rate_of(name)
        return 1.0 if name.startswith("unet.") else self.options.text_rate

    @property
    def class_prompts(self) -> list[str]:
        """The words of the class."""
        return (self.options.class_prompt or "").split("|")

    # ------------------------------------------------------------------------------------------------------------- the loss

    def loss(self, part: Part) -> Loss:
        """The photos' loss plus the prior's. Both are means over the examples (over what masks show of the photos)."""
        own = super().loss(part)
        if self.options.prior == "none":
            return own
        prior = self.distance(part) if self.options.prior == "prediction" else self.loss_of_class(part)
        mean = own.mean + self.options.prior_weight * prior
        return Loss(mean, own.count, {"subject": own.mean.item(), "prior": prior.item()})

    def loss_of_class(self, part: Part) -> Tensor:
        """The loss on as many pictures of the class, or the distance there, at timesteps and with noise of their own."""
        o = self.options
        visits = self.of_class.visits(part.step, part.places)
        t = part.of(objectives.timesteps(o, part.batch, len(self.alpha_bar), generator(o.seed, part.step, 0, 11)))
        rngs = [generator(o.seed, part.step, place, 12) for place in part.places]
        if o.prior == "pictures":
            return self.loss_of(visits, t, rngs).mean
        return self.moved(visits, self.noised(visits, t, rngs)[0], [visit.caption for visit in visits])

    def distance(self, part: Part) -> Tensor:
        """How far from what it said before the network has come, told of the class, where the photos are noised to."""
        o = self.options
        visits = self.pictures.visits(part.step, part.places)
        t = part.of(objectives.timesteps(o, part.batch, len(self.alpha_bar), part.common()))
        turns = [part.step * part.batch + place for place in part.places]  # each prompt as often
        prompts = [self.class_prompts[turn % len(self.class_prompts)] for turn in turns]
        return self.moved(visits, self.noised(visits, t, part.own())[0], prompts)

    def moved(self, visits: list[Visit], noisy: Noisy, prompts: list[str]) -> Tensor:
        """The distance between what the network says of noised latents, told of prompts of the class, and what it said before."""
        told = [self.told_before[prompt] for prompt in prompts]
        pooled = [one.pooled for one in told if one.pooled is not None]
        before = Conditions(torch.cat([one.context for one in told]), torch.cat(pooled) if pooled else None)
        with torch.no_grad(), self.untuned():
            wanted = self.predict(noisy.x, noisy.t, before, visits)
        found = self.predict(noisy.x, noisy.t, self.context(prompts), visits)
        return objectives.weigh(replace(noisy, wanted=wanted.float()), found)[0]

    def untuned(self) -> AbstractContextManager[None]:
        """Inside the `with`, the pipeline's UNet is the one that it was."""
        return self.lora.off() if self.options.adapter == "lora" else replaced_by(self.pipe, self.frozen)

    # -------------------------------------------------------------------------------------------------- pictures of the class

    def draw_class(self, folder: Path) -> Path:
        """Draw what is missing of the pictures of the class. TrainingError where those that are there were drawn otherwise."""
        o = self.options
        recipe = {
            "model": self.model, "prompt": o.class_prompt, "side": o.resolution, "guidance": o.guidance, "steps": o.class_steps,
        }  # fmt: skip
        folder.mkdir(parents=True, exist_ok=True)
        note = folder / "recipe.json"
        if note.exists() and json.loads(note.read_text()) != recipe:
            raise TrainingError(
                f"{folder}: drawn of another prompt or model, or otherwise; choose another --class-folder"
            )
        note.write_text(json.dumps(recipe, indent=1) + "\n")
        names = [folder / f"{i:05d}.png" for i in range(o.class_pictures)]
        missing = [(i, path) for i, path in enumerate(names) if not path.exists()]
        for i, path in tqdm(missing, desc="drawing the class", disable=None):
            size, prompt = (o.resolution, o.resolution), self.class_prompts[i % len(self.class_prompts)]
            drawn = self.pipe(prompt, seed=i, size=size, guidance=o.guidance, steps=o.class_steps)
            path.with_suffix(".txt").write_text(prompt + "\n")
            drawn.images[0].save(path)
        return folder

    # --------------------------------------------------------------------------------------------------------------- the result

    def export(self, out: Path) -> None:
        """The LoRA's files; or model/, a folder as diffusers has it, in the precision of the model that it came from."""
        if self.options.adapter == "lora":
            super().export(out)
            return
        source = ck.read(fetch.resolve(self.options.model))
        for part, model in self.modules.items():
            before = source.tensors[part]
            source.tensors[part] = {name: p.detach().to(before[name].dtype) for name, p in model.state_dict().items()}
        told = self.scheduler
        source.configs["scheduler"] = replace(
            source.scheduler, prediction_type=told.prediction_type, zero_snr=told.zero_snr
        )
        shutil.rmtree(out / "model", ignore_errors=True)
        convert.write_folder(source, out / "model")
        print(f"the model is in {out / 'model'}", file=sys.stderr)


def main(argv: list[str] | None = None) -> int:
    """`sdcore train dreambooth`."""
    options = parse(DreamBoothOptions, argv, prog="sdcore train dreambooth", presets=PRESETS)
    return run(DreamBooth(options, load(options)), options)
