"""Diffusion-DPO: teach a model which of two pictures of a prompt is the better one, without a reward in between.

    sdcore train dpo --data pairs --model sd15 --out runs/better            # pairs/pairs.jsonl: prompt, winner, loser a line
    sdcore train dpo --labels runs/x --model sd15 --out runs/better         # what people said on the rating page of runs/x
    sdcore train dpo --reward compressibility --pairs 500 --resolution 64 --guidance 3      # pairs that the model draws itself

Winner and loser are noised to the same timestep with the same noise. Over what it was before (the UNet with the LoRA off, or a
frozen copy), the model is to gain more on the winner than on the loser:

    loss = -log sigmoid( -beta/2 ( (e(winner) - e_before(winner)) - (e(loser) - e_before(loser)) ) )

e is the mean squared error of what the network says of the noised latent. Equation 14 of the paper has beta T omega(lambda) and
sums of squares; here beta/2 and means over the latent's numbers, as in the released code, so that its beta means the same.
Min-SNR weights (--min-snr) are an omega(lambda); with a v-model the error is that of v, which is one too.

Pairs come from a file, from people, or from a reward: of --each pictures that the model draws of a prompt, the best against the
worst, none where they are equal. A tenth of the pairs is held out, and each evaluation says on what share of it, at fixed noise,
the tuned model prefers the winner (`prefers`), and with --trials how often a picture that it draws from held-out noise beats the
one that the untuned model draws from the same (`wins`, of which equals count half).

Source: Wallace et al. 2023, equation 14 and section 5.1. Legend: b pairs, n pictures, c h w latent.
"""

import hashlib
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from sdcore import image
from sdcore.errors import ConfigError, TrainingError

from . import objectives
from . import prompts as sources
from .data import DataOptions, Fault, Pictures, Visit, examine, nearest, shapes
from .objectives import Noisy
from .options import option, parse
from .rewards import Rewards, make
from .task import Loss, Part, generator
from .tuning import TuneOptions, load
from .twin import Twin, TwinOptions

DRAWN, TRIED = 1_000_000, 100_000  # first seeds of the pictures of pairs and of trials


@dataclass(frozen=True)
class DPOOptions(TwinOptions):
    """Teach a model which of two pictures is the better one (Diffusion-DPO)."""

    data: str = option(
        "pairs", "folder with pairs.jsonl, or such a file: prompt, winner, loser (names of pictures) a line"
    )
    labels: str | None = option(None, "run whose pictures people compared (sdcore rate): their labels are the pairs")
    reward: str | None = option(None, "what pairs are made by, and trials judged; see docs/rewards.md")
    pairs: int = option(0, "prompts for which the model draws pictures that --reward makes a pair of")
    each: int = option(2, "pictures of each of them; the best and the worst become the pair")
    pair_prompts: str = option("world:two", "file with a prompt a line; world, world:two: the bundled model's")
    sampler: str | None = option(None, "sampler of these pictures and of trials; the model's own where it is not given")
    sampler_steps: int = option(25, "its steps")
    eta: float | None = option(None, "of ddim: how random its way is, 0 to 1; the sampler's own where it is not given")
    beta: float = option(5000.0, "how strongly the model is held to what it was; the paper's range is 2000 to 5000")
    hold_out: float = option(0.1, "share of the pairs that is not learned from, where --validation names no pairs")
    trials: int = option(0, "pictures drawn by each evaluation from held-out noise, judged by --reward")
    trial_prompts: str = option("held-out:two", "the prompts of these, as --pair-prompts")
    ema: float = option(0.0, "decay of the moving average of what trains; 0: no average")


CHAPTER = dict(
    model="sd15", resolution=512, pairs=1000, each=4, pair_prompts="animals", guidance=5.0, sampler="ddim", sampler_steps=50,
    rank=8, steps=2000, batch=16, accumulate=4, lr=1e-4, warmup=50, trials=64, trial_prompts="animals-held-out",
)  # fmt: skip
CLIP = "models/clip-vit-large-patch14"  # where these files are looked for
ACTIVE = dict(pair_prompts="activities", trial_prompts="activities-held-out")
TASKS: dict[str, dict[str, object]] = {
    "compressibility": CHAPTER | dict(reward="compressibility"),
    "incompressibility": CHAPTER | dict(reward="incompressibility"),
    "aesthetic": CHAPTER | dict(reward=f"aesthetic:{CLIP},models/sac+logos+ava1-l14-linearMSE.pth"),
    "alignment": CHAPTER | dict(reward=f"clip:{CLIP}") | ACTIVE,
    "people": CHAPTER | dict(pairs=0, trials=0),  # add --labels RUN
}
PRESETS = TASKS | {f"{name}-sdxl": values | dict(model="sdxl", resolution=1024) for name, values in TASKS.items()}


# --------------------------------------------------------------------------------------------------------------------- the pairs


class Duel(NamedTuple):
    """Two pictures of one prompt, and which is the better one."""

    prompt: str
    winner: Path
    loser: Path


def read_pairs(path: Path) -> list[Duel]:
    """The pairs of a folder's pairs.jsonl, or of a file; names of pictures count from the file's folder. TrainingError."""
    path = path / "pairs.jsonl" if path.is_dir() else path
    found = []
    try:
        lines = path.read_text("utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise TrainingError(f"{path}: cannot be read ({error}); expected lines of prompt, winner and loser") from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            texts = [row[key] for key in ("prompt", "winner", "loser")]
        except (ValueError, KeyError, TypeError, RecursionError):
            texts = [None]
        if not all(isinstance(text, str) for text in texts):
            raise TrainingError(
                f"{path}: line {number}: expected a table of prompt, winner and loser, found {line[:80]!r}"
            )
        found.append(Duel(texts[0], path.parent / texts[1], path.parent / texts[2]))
    if not found:
        raise TrainingError(f"{path}: holds no pair")
    return found


def rated_pairs(run: Path) -> list[Duel]:
    """The pairs of which people said which is the better one. TrainingError: none."""
    from . import labels

    liked = [(label.prompt, label.preference) for label in labels.labels(run) if label.preference]
    if not liked:
        raise TrainingError(f"{run}: nobody has compared pictures yet; run `sdcore rate {run}`")
    return [Duel(prompt, *(labels.picture(run, name) for name in pair)) for prompt, pair in liked]


class Pairs(Pictures):
    """Pairs of pictures, checked before the first step: the winners, and beside them `losers`, the same numbers."""

    def __init__(self, options: DataOptions, seed: int, batch: int, duels: Sequence[Duel]):
        prompts = {path: duel.prompt for duel in duels for path in duel[1:]}
        seen = {
            path: examine(path, (prompts[path],), options)
            for path in tqdm(prompts, "looking at pictures", disable=None)
        }
        winners, losers, faults = [], [], [one for one in seen.values() if isinstance(one, Fault)]
        for prompt, *paths in duels:
            winner, loser = (seen[path] for path in paths)
            if isinstance(winner, Fault) or isinstance(loser, Fault):
                continue
            buckets = [nearest(item.size, shapes(options)) for item in (winner, loser)]
            if buckets[0] != buckets[1]:
                faults.append(Fault(loser.path, f"{loser.size}, of another shape than {winner.path}, {winner.size}"))
                continue
            winners.append(replace(winner, captions=(prompt,)))
            losers.append(replace(loser, captions=(prompt,)))
        super().__init__(options, seed, batch, [*winners, *faults])
        self.losers = Pictures(options, seed, batch, losers)

    def duels(self, step: int, places: Sequence[int]) -> tuple[list[Visit], list[Visit]]:
        """Winners and losers at these places of the batch of a step."""
        pairs = [self.duel(i, step, place) for i, place in zip(self.members(step, places), places, strict=True)]
        return [winner for winner, _ in pairs], [loser for _, loser in pairs]

    def duel(self, index: int, step: int, place: int) -> tuple[Visit, Visit]:
        """One pair as it is seen at a place of a step; both with the same words."""
        return self.visit(index, step, place), self.losers.visit(index, step, place)

    def identity(self) -> dict[str, object]:
        return super().identity() | {"losers": self.losers.identity()["content"]}


def split(duels: list[Duel], share: float) -> tuple[list[Duel], list[Duel]]:
    """(learned from, held out): by the names of the two pictures, so that it does not depend on the order or on other pairs."""

    def place(duel: Duel) -> float:
        names = " ".join(sorted(path.name for path in duel[1:]))
        return int(hashlib.sha256(f"{duel.prompt} {names}".encode()).hexdigest()[:12], 16) / 16**12

    return [d for d in duels if place(d) >= share], [d for d in duels if place(d) < share]


# -------------------------------------------------------------------------------------------------------------------- the loss


def preference(winner: Tensor, loser: Tensor, beta: float) -> Tensor:
    """What is in the sigmoid [b]: how much more the model has gained on winners than on losers.

    winner, loser [b]: the error of the model less that of the model before, by mean squares. Equation 14.
    """
    return -beta / 2 * (winner - loser)


def errors(noisy: Noisy, found: Tensor) -> Tensor:
    """The mean squared error of each example [n], weighed by its timestep; in fp32 at least."""
    found = found.to(torch.promote_types(found.dtype, torch.float32))
    return noisy.weights * objectives.squared(found, noisy.wanted).mean(dim=(1, 2, 3))


def both(one: Noisy, other: Noisy) -> Noisy:
    """Two halves of a batch as one."""
    x, t, wanted, weights = (
        torch.cat([getattr(one, name), getattr(other, name)]) for name in ("x", "t", "wanted", "weights")
    )
    return Noisy(x, t, wanted, weights, delta=None)


class DPO(Twin):
    """Learning from pairs."""

    options: DPOOptions
    pictures: Pairs
    held_out: Pairs | None

    def gather(self, options: TuneOptions, batch: int) -> Pairs:
        """The pairs of --validation; or those that are learned from, of which some are set aside."""
        o = self.options
        if options is not o:
            return Pairs(options, o.seed, batch, read_pairs(Path(options.data)))
        self.check()
        if o.labels:
            duels = rated_pairs(Path(o.labels))
        elif o.pairs:
            duels = read_pairs(self.draw_pairs(Path(o.out) / "pairs"))
        else:
            duels = read_pairs(Path(o.data))
        learned, aside = (duels, []) if o.validation else split(duels, o.hold_out)
        if not learned:
            raise TrainingError(f"--hold-out {o.hold_out}: leaves none of {len(duels)} pairs to learn from; lower it")
        self.aside = aside
        return Pairs(options, o.seed, batch, learned)

    def check(self) -> None:
        """ConfigError for options that mean nothing."""
        o = self.options
        if o.labels and o.pairs:
            raise ConfigError("--labels, --pairs: pairs come from people or from a reward; leave one of them out")
        if bool(o.pairs or o.trials) > bool(o.reward):
            raise ConfigError("--pairs, --trials: need --reward, by which pictures are compared")
        if o.masks or o.huber:
            raise ConfigError("--masks, --huber: have no meaning for pairs; leave them out")
        if not (o.beta > 0 and 0 <= o.hold_out < 1 and o.each >= 2 and o.pairs >= 0 and o.trials >= 0):
            raise ConfigError(
                f"--beta {o.beta}, --hold-out {o.hold_out}, --each {o.each}, --pairs {o.pairs}, --trials {o.trials}: expected "
                "beta above 0, a share from 0 to below 1, at least 2 pictures each, numbers from 0"
            )

    def begin(self) -> None:
        o = self.options
        if self.aside:
            plain = replace(o, variants=1, crop="center", flip=False, dropout=0.0, shuffle_tags=False, repeats=1)
            self.held_out = Pairs(plain, o.seed, 1, self.aside)
        self.before = self.tried() if o.trials else torch.zeros(0)  # by the untuned model
        super().begin()

    def loss(self, part: Part) -> Loss:
        t = part.of(objectives.timesteps(self.options, part.batch, len(self.alpha_bar), part.common()))
        inside = self.preferences(*self.pictures.duels(part.step, part.places), t, part.own())
        figures = {"prefers": (inside > 0).float().mean().item(), "margin": inside.mean().item()}
        return Loss(-F.logsigmoid(inside).mean(), len(inside), figures)

    def preferences(self, winners: list[Visit], losers: list[Visit], t: Tensor, rngs: list[torch.Generator]) -> Tensor:
        """What is in the sigmoid [b] of pairs at timesteps t [b]; both of a pair get the same noise, from its stream."""
        again = [torch.Generator().set_state(rng.get_state()) for rng in rngs]
        noisy = both(self.noised(winners, t, rngs)[0], self.noised(losers, t, again)[0])
        visits = [*winners, *losers]
        captions = [visit.caption for visit in visits]
        with torch.no_grad(), self.untuned():
            before = errors(noisy, self.predict(noisy.x, noisy.t, self.context(captions), visits))
        now = errors(noisy, self.predict(noisy.x, noisy.t, self.context(captions), visits))
        winner, loser = (now - before).chunk(2)
        return preference(winner, loser, self.options.beta)

    # --------------------------------------------------------------------------------------------------------------- evaluations

    def validate(self) -> float | None:
        """Part of `evaluate`, which goes through the held-out pairs once for all figures."""
        return None

    def evaluate(self, step: int, out: Path) -> dict[str, float]:
        figures = super().evaluate(step, out)
        if self.held_out is not None:
            inside = self.held_out_preferences(self.held_out)
            figures["validation_loss"] = -F.logsigmoid(inside).mean().item()
            figures["prefers"] = (inside > 0).float().mean().item()
        if self.options.trials:
            now = self.tried()
            figures["reward"], figures["reward_before"] = now.mean().item(), self.before.mean().item()
            figures["wins"] = ((now > self.before).float() + 0.5 * (now == self.before)).mean().item()
        return figures

    def held_out_preferences(self, pairs: Pairs) -> Tensor:
        """What is in the sigmoid, of every held-out pair at --validation-draws timesteps, with the same noise every time."""
        draws, found = self.options.validation_draws, []
        t = ((torch.arange(draws) + 0.5) / draws * len(self.alpha_bar)).long()
        for i in range(len(pairs.items)):
            winner, loser = pairs.duel(i, 0, 0)
            rngs = [generator(self.options.seed, i, k, 2) for k in range(draws)]
            found.append(self.preferences([winner] * draws, [loser] * draws, t, rngs))
        return torch.cat(found)

    def tried(self) -> Tensor:
        """What --reward says of the pictures of --trials, as the pipeline draws them now [trials]."""
        o = self.options
        texts = sources.prompts(o.trial_prompts, o.trials, o.seed + 1)
        with Rewards(make(o.reward or "", o.out, self.pipe.device), Path(o.out)) as rewards:
            handles = []
            for i in range(0, o.trials, o.batch):
                part = texts[i : i + o.batch]
                drawn = self.sampled(part, [TRIED + i + k for k in range(len(part))])
                handles.append(rewards.submit(image.to_unit(drawn), part))
            return torch.cat([handle.result() for handle in handles])

    # --------------------------------------------------------------------------------------------------- pairs drawn by the model

    def sampled(self, texts: list[str], seeds: list[int]) -> list[image.Picture]:
        """Pictures of these prompts, from noise of these seeds."""
        o = self.options
        size = (o.resolution, o.resolution)
        eta: dict[str, Any] = {} if o.eta is None else {"eta": o.eta}
        return self.pipe(
            texts, seed=seeds, size=size, steps=o.sampler_steps, sampler=o.sampler, guidance=o.guidance, **eta
        ).images

    def draw_pairs(self, folder: Path) -> Path:
        """Draw what is missing of the pictures, ask the reward, write pairs.jsonl. TrainingError: the folder is another run's."""
        o = self.options
        recipe = {
            "model": self.model, "reward": o.reward, "prompts": o.pair_prompts, "pairs": o.pairs, "each": o.each,
            "seed": o.seed, "side": o.resolution, "guidance": o.guidance, "sampler": o.sampler,
            "steps": o.sampler_steps, "eta": o.eta, "drawn": o.pairs * o.each,
        }  # fmt: skip
        folder.mkdir(parents=True, exist_ok=True)
        note, table = folder / "recipe.json", folder / "pairs.jsonl"
        if note.exists() and json.loads(note.read_text()) != recipe:
            raise TrainingError(
                f"{folder}: drawn of other prompts or another model, or otherwise; choose another --out"
            )
        if table.exists():
            return table
        image.write_whole(note, (json.dumps(recipe, indent=1) + "\n").encode())
        texts = [text for text in sources.prompts(o.pair_prompts, o.pairs, o.seed) for _ in range(o.each)]
        names = [f"{i // o.each:05d}-{i % o.each}.png" for i in range(len(texts))]
        with Rewards(make(o.reward or "", o.out, self.pipe.device), Path(o.out)) as rewards:
            handles = []
            for i in tqdm(range(0, len(texts), o.batch), "drawing pairs", disable=None):
                now = range(i, min(i + o.batch, len(texts)))
                if not all(
                    (folder / names[k]).exists() for k in now
                ):  # whole batches, whose last bits are the same again
                    drawn = self.sampled([texts[k] for k in now], [DRAWN * (o.seed + 1) + k for k in now])
                    for k, picture in zip(now, drawn, strict=True):
                        picture.save(folder / names[k])
                shown = image.to_unit([image.open_picture(folder / names[k]) for k in now])
                handles.append(rewards.submit(shown, [texts[k] for k in now]))
            worth = torch.cat([handle.result() for handle in handles]).view(o.pairs, o.each)
        rows = [
            {"prompt": texts[p * o.each], "winner": names[p * o.each + best], "loser": names[p * o.each + worst]}
            for p, (best, worst) in enumerate(zip(worth.argmax(1).tolist(), worth.argmin(1).tolist(), strict=True))
            if worth[p, best] > worth[p, worst]
        ]
        if not rows:
            raise TrainingError(
                f"--reward {o.reward}: found all {o.pairs} pairs equal; draw more, or take a finer reward"
            )
        print(f"{len(texts)} pictures drawn, {len(rows)} pairs of {o.pairs} prompts", file=sys.stderr)
        image.write_whole(table, "".join(json.dumps(row) + "\n" for row in rows).encode())
        return table


def main(argv: list[str] | None = None) -> int:
    """`sdcore train dpo`."""
    from .loop import run

    options = parse(DPOOptions, argv, prog="sdcore train dpo", presets=PRESETS)
    return run(DPO(options, load(options)), options)
