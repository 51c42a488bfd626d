"""Rewards: what is to become more, as a function from pictures and prompts to numbers.

    reward = make("0.7*aesthetic:clip-l,sac+logos+ava1-l14-linearMSE.pth+0.3*compressibility", out="runs/x")
    reward(pictures, prompts)       # [n, 3, H, W] in 0..1, n texts -> [n], fp32

    compressibility, incompressibility      minus, plus the kB of the picture as a JPEG of quality 95
    checker, checker:all                    the bundled world's exact checker: share right of what the prompt says; 1 if all is
    eye:FILE                                a network that learned to read the bundled world, with gradients (train/eye.py)
    aesthetic:CLIP,HEAD                     the LAION aesthetic predictor, with gradients (train/clip_rewards.py, and the next)
    clip:CLIP                               cosine of picture and prompt, with gradients
    pick:CLIP                               logit scale times that cosine, as PickScore, with gradients
    hps:FILE,TOKENIZER                      the cosine of a CLIP in OpenCLIP's layout, as HPSv2, with gradients
    ask:FILE.json                           a vision-language model that answers questions about a picture (train/endpoint.py)
    http://..., https://...                 any server that scores (the same file)
    people[:RUN]                            people, on the rating page of this run or another; waits for them
    FILE.py                                 your own: a file with a function `reward(pictures, prompts)`

A reward is larger where a picture is better. `differentiable` says whether gradients go from its numbers to the pictures. Any sum
of weighted rewards is a reward. `judged` asks one and makes sure that what comes back is a finite number a picture;
`Rewards` does so in threads, while the next pictures are being drawn. A reward that raises, or says NaN, stops the run; the
prompts and pictures that it was asked about are kept under OUT/rewards-failed/.

Source: Black et al. 2023 (DDPO), section 5 (compressibility, kB of 1000 bytes). Legend: n pictures, H W their size.
"""

import functools
import importlib.util
import io
import json
import re
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path

import torch
from torch import Tensor

from sdcore import image
from sdcore.errors import ConfigError, TrainingError

from . import checker, labels, world
from .checkpoints import sha256


class Reward:
    """One reward. Subclasses set `name`, and `differentiable` where gradients go through, and say what it is worth."""

    name: str
    differentiable: bool = False
    waits: bool = False  # for people: it may take hours, and is given up when the run is to stop

    def __call__(self, pictures: Tensor, prompts: list[str]) -> Tensor:
        """The worth [n] of pictures [n, 3, H, W] in 0..1 as answers to n prompts."""
        raise NotImplementedError

    def identity(self) -> object:
        """What a resumed run must find the same: the name, and the content of files where there are any."""
        return self.name

    def cancel(self) -> None:
        """Give up whatever is being waited for."""


# ----------------------------------------------------------------------------------------------- what is measured in the pixels


class JPEG(Reward):
    """Plus or minus the kB (1000 bytes) that the picture has as a JPEG of quality 95."""

    def __init__(self, sign: int):
        self.name, self.sign = ("incompressibility" if sign > 0 else "compressibility"), sign

    def __call__(self, pictures: Tensor, prompts: list[str]) -> Tensor:
        return self.sign * torch.tensor([kilobytes(picture) for picture in image.to_pictures(pictures * 2 - 1)])


def kilobytes(picture: image.Picture) -> float:
    """The size in kB of a picture as a JPEG of quality 95."""
    file = io.BytesIO()
    picture.pil.save(file, "JPEG", quality=95)
    return len(file.getvalue()) / 1000


class Checker(Reward):
    """What the world's checker says: the share right of what the prompt demands, or `whole`: 1 if all of it is, else 0."""

    def __init__(self, whole: bool):
        self.name, self.whole = ("checker:all" if whole else "checker"), whole

    def __call__(self, pictures: Tensor, prompts: list[str]) -> Tensor:
        if pictures.shape[1:] != (3, world.SIDE, world.SIDE):
            raise ConfigError(
                f"checker: reads pictures of the bundled world, {world.SIDE} pixels square, found {list(pictures.shape)}"
            )
        seen = (pictures.detach().float().cpu() * 2 - 1).numpy()
        return torch.tensor([self.worth(picture, prompt) for picture, prompt in zip(seen, prompts, strict=True)])

    def worth(self, picture: world.Array, prompt: str) -> float:
        verdict = checker.matches(checker.read(picture), world.parse(prompt))
        return float(all(verdict.values())) if self.whole else sum(verdict.values()) / len(verdict)


class People(Reward):
    """What people say on the rating page (`sdcore rate RUN`): 1 to 5, as 0..1; 0.5 where they skip a picture. Waits for them."""

    waits = True

    def __init__(self, run: Path):
        self.name, self.run, self.given_up = f"people:{run}", run, threading.Event()

    def __call__(self, pictures: Tensor, prompts: list[str]) -> Tensor:
        drawn = image.to_pictures(pictures * 2 - 1)
        items = [labels.Item(prompt, picture) for prompt, picture in zip(prompts, drawn, strict=True)]
        keys = labels.ask(self.run, items)
        said = labels.wait(self.run, keys, self.given_up.is_set)
        return torch.tensor([0.5 if (score := said[key].score) is None else (score - 1) / 4 for key in keys])

    def identity(self) -> object:
        return "people"

    def cancel(self) -> None:
        self.given_up.set()


class Own(Reward):
    """The function `reward` of somebody's own file; differentiable where the file says `differentiable = True`."""

    def __init__(self, path: Path):
        self.name, self.path = str(path), path
        if not path.is_file():
            raise ConfigError(f"reward {path}: no such file")
        spec = importlib.util.spec_from_file_location(path.stem, path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        if not callable(getattr(module, "reward", None)):
            raise ConfigError(f"reward {path}: has no function reward(pictures, prompts); see docs/rewards.md")
        self.function: Callable[[Tensor, list[str]], Tensor] = module.reward
        self.differentiable = bool(getattr(module, "differentiable", False))

    def __call__(self, pictures: Tensor, prompts: list[str]) -> Tensor:
        return torch.as_tensor(self.function(pictures, prompts))

    def identity(self) -> object:
        return [self.name, sha256(self.path)]


class Mix(Reward):
    """A weighted sum of rewards."""

    def __init__(self, parts: Sequence[tuple[float, Reward]]):
        self.parts = list(parts)
        self.name = "+".join(f"{weight:g}*{reward.name}" for weight, reward in self.parts)
        self.differentiable = all(reward.differentiable for _, reward in self.parts)
        self.waits = any(reward.waits for _, reward in self.parts)

    def __call__(self, pictures: Tensor, prompts: list[str]) -> Tensor:
        total = torch.zeros(len(prompts))
        for weight, reward in self.parts:
            total = total + weight * checked(reward, reward(pictures, prompts), len(prompts)).to(total)
        return total

    def identity(self) -> object:
        return [[weight, reward.identity()] for weight, reward in self.parts]

    def cancel(self) -> None:
        for _, reward in self.parts:
            reward.cancel()


# ------------------------------------------------------------------------------------------------------------- from words to one


def jpeg(rest: str, out: Path, device: str | torch.device, sign: int) -> Reward:
    if rest:
        raise ConfigError(f"reward compressibility:{rest}: takes nothing behind a colon")
    return JPEG(sign)


def aesthetic(rest: str, out: Path, device: str | torch.device) -> Reward:
    from .clip_rewards import Aesthetic

    return Aesthetic(*pair("aesthetic:CLIP,HEAD", rest), device)


def clip(rest: str, out: Path, device: str | torch.device, name: str = "clip") -> Reward:
    from .clip_rewards import alignment

    return alignment(name, Path(rest), device)


def hps(rest: str, out: Path, device: str | torch.device) -> Reward:
    from .clip_rewards import open_alignment

    return open_alignment(*pair("hps:FILE,TOKENIZER", rest), device)


def ask(rest: str, out: Path, device: str | torch.device) -> Reward:
    from .endpoint import Questions

    return Questions(Path(rest))


def eye(rest: str, out: Path, device: str | torch.device) -> Reward:
    from .eye import Seen

    return Seen(Path(rest), device)


def server(url: str, out: Path, device: str | torch.device) -> Reward:
    from .endpoint import Server

    return Server(url)


def whole_or_share(rest: str, out: Path, device: str | torch.device) -> Reward:
    if rest not in ("", "all"):
        raise ConfigError(f"reward checker:{rest}: expected checker or checker:all")
    return Checker(rest == "all")


MAKERS: dict[str, Callable[[str, Path, str | torch.device], Reward]] = {  # what stands behind the colon, OUT, device
    "compressibility": functools.partial(jpeg, sign=-1),
    "incompressibility": functools.partial(jpeg, sign=+1),
    "checker": whole_or_share,
    "people": lambda rest, out, device: People(Path(rest) if rest else out),
    "aesthetic": aesthetic,
    "clip": clip,
    "pick": functools.partial(clip, name="pick"),
    "hps": hps,
    "ask": ask,
    "eye": eye,
}
ALONE = ("compressibility", "incompressibility", "checker", "people")  # need nothing behind a colon
# A mix is cut at a plus behind which a reward begins, for file names have pluses too.
WEIGHT = r"-?(?:\d+\.?\d*|\.\d+)(?:e-?\d+)?"
CUT = (
    rf"\+(?=(?:{WEIGHT}\*)?(?:(?:{'|'.join(ALONE)})(?:[+:]|$)|(?:{'|'.join(MAKERS)}):|https?://|[\w./-]+\.py(?:\+|$)))"
)


def make(spec: str, out: Path | str, device: str | torch.device = "cpu") -> Reward:
    """The reward of a spec, such as `checker` or `0.5*clip:FOLDER+0.5*compressibility`; see the top of the file.

    `out` is the run's folder, `device` where networks run. ConfigError: no such reward; CheckpointError: a file of it is no good.
    """
    parts = []
    for word in re.split(CUT, spec):
        found = re.fullmatch(rf"(?:({WEIGHT})\*)?(.+)", word)
        if found is None:
            raise ConfigError(f"reward {word!r}: expected NAME or WEIGHT*NAME, such as 0.5*compressibility")
        parts.append((float(found[1] or 1), one(found[2], Path(out), device)))
    return parts[0][1] if len(parts) == 1 and parts[0][0] == 1 else Mix(parts)


def one(word: str, out: Path, device: str | torch.device) -> Reward:
    """A single reward, without a weight."""
    if word.startswith(("http://", "https://")):
        return server(word, out, device)
    if word.endswith(".py"):
        return Own(Path(word))
    name, colon, rest = word.partition(":")
    if name not in MAKERS:
        raise ConfigError(f"reward {word!r}: expected one of {', '.join(MAKERS)}, an http address or a FILE.py")
    if name not in ALONE and not rest:
        raise ConfigError(f"reward {word!r}: {name} needs files behind a colon; see docs/rewards.md")
    return MAKERS[name](rest, out, device)


def pair(form: str, rest: str) -> tuple[Path, Path]:
    """The two paths of a spec."""
    first, comma, second = rest.partition(",")
    if not first or not second:
        raise ConfigError(f"reward {form.partition(':')[0]}:{rest}: expected {form}")
    return Path(first), Path(second)


# --------------------------------------------------------------------------------------------------------- asking, and being sure


def checked(reward: Reward, values: object, n: int) -> Tensor:
    """What a reward gave, if it is n numbers; TrainingError."""
    if not isinstance(values, Tensor) or values.shape != (n,) or not values.dtype.is_floating_point:
        found = f"{values.dtype} {list(values.shape)}" if isinstance(values, Tensor) else type(values).__name__
        raise TrainingError(f"reward {reward.name}: expected {n} floating-point numbers [{n}], found {found}")
    return values


def judged(reward: Reward, pictures: Tensor, prompts: list[str], out: Path) -> Tensor:
    """What a reward says [n], fp32, with gradients where it has them.

    TrainingError where it raises or says NaN or infinity; prompts and pictures are then under `out`/rewards-failed/.
    """
    try:
        values = checked(reward, reward(pictures, prompts), len(prompts)).float()
    except Exception as error:
        what = " ".join(f"{type(error).__name__}: {error}".split())
        where = keep(pictures, prompts, what, out)
        raise TrainingError(f"reward {reward.name}: {what}; prompts and pictures are in {where}") from error
    bad = [i for i, value in enumerate(values.tolist()) if not abs(value) < float("inf")]
    if bad:
        what = f"gave {values[bad[0]].item()}"
        where = keep(pictures[bad], [prompts[i] for i in bad], what, out)
        raise TrainingError(
            f"reward {reward.name}: {what} for {len(bad)} of {len(prompts)} pictures, the first of {prompts[bad[0]]!r}; "
            f"prompts and pictures are in {where}"
        )
    return values


def keep(pictures: Tensor, prompts: list[str], what: str, out: Path) -> Path:
    """Write pictures, and prompts.json with the reason, to `out`/rewards-failed/; return that folder."""
    folder = out / "rewards-failed"
    folder.mkdir(parents=True, exist_ok=True)
    finite = pictures.detach().nan_to_num(0, 1, 0) * 2 - 1
    for i, picture in enumerate(image.to_pictures(finite)):
        picture.save(folder / f"{i:04d}.png")
    table = {"why": what, "prompts": {f"{i:04d}.png": prompt for i, prompt in enumerate(prompts)}}
    image.write_whole(folder / "prompts.json", (json.dumps(table, indent=1) + "\n").encode())
    return folder


class Rewards:
    """Asks a reward in threads, while the caller draws the next pictures. `threads` batches are looked at at once.

    with Rewards(reward, out) as rewards:
        handles = [rewards.submit(pictures, prompts) for ...]
        values = [handle.result() for handle in handles]

    `stop` says whether the run is to end: a reward that waits for people is then given up.
    """

    def __init__(self, reward: Reward, out: Path, threads: int = 2, stop: Callable[[], bool] = lambda: False):
        self.reward, self.out, self.stop = reward, out, stop
        self.pool = ThreadPoolExecutor(threads, "reward")

    def submit(self, pictures: Tensor, prompts: list[str]) -> "Handle":
        """Begin to judge pictures [n, 3, H, W] in 0..1; they are copied, so the caller may go on to use their memory."""
        return Handle(self, self.pool.submit(self.work, pictures.detach().clone(), list(prompts)))

    @torch.no_grad()
    def work(self, pictures: Tensor, prompts: list[str]) -> Tensor:
        return judged(self.reward, pictures, prompts, self.out).cpu()

    def __enter__(self) -> "Rewards":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            self.reward.cancel()
        self.pool.shutdown(cancel_futures=True)


class Handle:
    """Numbers that are being worked out."""

    def __init__(self, asked: Rewards, future: Future):
        self.asked, self.future = asked, future

    def result(self) -> Tensor:
        """Wait for them: [n] fp32, on the CPU. TrainingError as of `judged`, and where people are no longer waited for."""
        while self.asked.reward.waits and not wait([self.future], timeout=0.5).done:
            if self.asked.stop():
                raise TrainingError(
                    f"reward {self.asked.reward.name}: stopped while people were rating; what they said is kept, resume to go on"
                )
        return self.future.result()
