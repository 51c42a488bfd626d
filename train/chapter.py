"""The chapter's demonstration: every method taught something to the bundled model, by the command that tunes SD 1.5, and judged.

    make chapter                                        # all of it, some minutes a method; stop it as you like, it goes on
    python -m sdcore.train.chapter --only lora --again  # one of them, from the beginning

An `Entry` is one method: a name, what it is to show, and a function that does it in a folder of its own, with the help of a
`Workshop`: it writes pictures, runs `sdcore train ...` as a process (or takes up one that was stopped), draws prompts with
the model before and after, and returns a `Result`: rows of figures, each with its aim, the untuned model's figure, the
autoencoder's own ceiling and chance, and sheets of pictures. What is done is kept as result.json and not done again. All results
together make one page, runs/chapter/report.html (train/report.py).

The settings in the entries were chosen on other prompts than those that the figures are of: the seed `JUDGED` is for these alone.
A method of another file joins by an entry of its own in `ENTRIES`.
"""

import json
import resource
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from sdcore.weights import fetch
from sdcore.weights.adapters import read_adapter
from sdcore.weights.embeddings import read_embeddings
from tqdm import tqdm

import sdcore
from sdcore import embeddings, lora
from sdcore.errors import ConfigError, TrainingError
from sdcore.pipeline import Pipeline

from . import aligned, checker, follow, judge, lessons, liking, report, world
from .lessons import Asked
from .loop import sha256
from .options import option, parse
from .report import Result, Row, Sheet
from .world import Scene

JUDGED = 30_000  # seed of the prompts that the figures are of
SAMPLER, STEPS, GUIDANCE = "dpmpp_2m", 15, 3.0  # how every picture is drawn
COMMON = "--resolution 64 --guidance 3 --ema 0 --save-every 100 --log-every 5"  # of all methods here


@dataclass(frozen=True)
class ChapterOptions:
    """Run the chapter's methods on the bundled model and report what they reach."""

    out: str = option("runs/chapter", "folder of the runs and of report.html")
    only: tuple[str, ...] = option((), "names of the entries to run, such as lora,dreambooth; all where none is given")
    again: bool = option(False, "run from the beginning what has been run already")
    prompts: int = option(100, "prompts that each figure is of")
    seed: int = option(JUDGED, "seed of these prompts; choose settings on others")
    steps: int | None = option(None, "steps of every training, for a trial")
    threads: int = option(2, "CPU threads")
    record: bool = option(
        False, "also write docs/reports/chapter.md and the sheets to docs/, and the table to docs/training.md"
    )


class Workshop:
    """Where an entry works: its folder, the base model, and what costs time, counted."""

    def __init__(self, folder: Path, options: ChapterOptions):
        self.folder, self.options = folder, options
        self.base = sdcore.load("tiny", device="cpu", dtype=torch.float32)
        self.commands: list[str] = []
        self.curves: list[tuple[str, Path]] = []

    # ------------------------------------------------------------------------------------------------------- training

    def train(self, method: str, name: str, words: str, common: str = COMMON) -> Path:
        """`sdcore train METHOD ...` into folder/name, or what is left of it. Gives that folder. TrainingError: it failed."""
        out = self.folder / name
        shown = f"sdcore train {method} {words} {common}".strip()
        if self.options.steps:
            shown += f" --steps {self.options.steps} --cooldown 0"
        self.commands.append(f"{shown} --out {out}")
        if not complete(out):
            more = ["--out", str(out), "--threads", str(self.options.threads)]
            if common:  # of the methods that learn from pictures in a folder
                more += ["--cache", str(self.folder / "cache")]
            if any((out / "checkpoints").glob("step-*")):
                more.append("--resume")
            begun, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.time()
            code = subprocess.run([sys.executable, "-m", *shlex.split(shown), *more]).returncode
            ended = resource.getrusage(resource.RUSAGE_CHILDREN)
            spent = {
                "processor": ended.ru_utime + ended.ru_stime - begun.ru_utime - begun.ru_stime,
                "clock": time.time() - start, "threads": self.options.threads,
            }  # fmt: skip
            with open(self.folder / "times.jsonl", "a") as file:
                file.write(json.dumps({"run": name, **spent}) + "\n")
            if code in (130, 143):
                raise SystemExit(code)
            if code:
                raise TrainingError(f"{out}: `{shown}` ended with {code}; what it said stands above")
        self.curves.append((name, out / "loss.png"))
        return out

    def seconds(self, kind: str = "processor") -> float:
        """What the trainings of this folder took in all, resumed ones included."""
        file = self.folder / "times.jsonl"
        return sum(json.loads(line)[kind] for line in file.read_text().splitlines()) if file.exists() else 0.0

    # -------------------------------------------------------------------------------------------------------- judging

    def asked(self, lesson: str) -> list[Asked]:
        """The prompts that a lesson is judged by."""
        return lessons.prompts(lesson, self.options.prompts, self.options.seed)

    def draw(self, name: str, pipe: Pipeline, texts: Sequence[str]) -> tuple[np.ndarray, list[Scene]]:
        """Pictures of prompts [n, 3, 64, 64], the k-th of seed k, and what the checker reads from them."""
        pixels = []
        with tqdm(total=len(texts), desc=f"{self.folder.name}: {name}", unit="picture") as bar:
            for i in range(0, len(texts), judge.PART):
                part = texts[i : i + judge.PART]
                pixels.append(judge.drawn(pipe, part, i, steps=STEPS, guidance=GUIDANCE, sampler=SAMPLER).numpy())
                bar.update(len(part))
        return np.concatenate(pixels), lessons.read(np.concatenate(pixels))

    def alarms(self, lesson: str) -> float:
        """Chance: how often what a lesson teaches is read from true pictures of other things, against the lesson's prompts."""
        others = [one.scene for one in self.asked("class")]
        return lessons.share(self.asked(lesson), lessons.read(world.draw_batch(others)), lessons.TAUGHT[lesson])

    def pictures(self, folder: Path) -> np.ndarray:
        """The pictures that were learned from, [n, 3, 64, 64]."""
        found = [np.asarray(Image.open(file), np.float32) for file in sorted(folder.glob("*.png"))]
        return np.stack(found).transpose(0, 3, 1, 2) / 127.5 - 1

    def sheet(self, name: str, words: str, rows: Sequence[np.ndarray], columns: int = 8) -> Sheet:
        """A PNG of pictures: of each row the first `columns`."""
        file = self.folder / f"{name}.png"
        Image.fromarray(world.sheet(np.concatenate([row[:columns] for row in rows]), columns, scale=2)).save(file)
        return Sheet(file.name, words)

    def result(
        self,
        title: str,
        about: str,
        rows: Sequence[Row],
        sheets: Sequence[Sheet],
        judged: dict[str, float] | None = None,
    ) -> Result:
        """All of it, with the curves of the trainings, what they took, and how the pictures were drawn."""
        curves = []
        for name, file in self.curves:
            if file.exists():  # a trial of a few steps has none
                shutil.copy(file, self.folder / f"loss-{name}.png")
                curves.append(Sheet(f"loss-{name}.png", f"Loss over the steps: {name}"))
        judged = judged or {
            "prompts": self.options.prompts,
            "seed": self.options.seed,
            "steps": STEPS,
            "guidance": GUIDANCE,
        }
        return Result(
            self.folder.name, title, about, tuple(self.commands), tuple(rows), (*sheets, *curves), (),
            self.seconds(), self.seconds("clock"), judged,
        )  # fmt: skip


def complete(out: Path) -> bool:
    """Whether a run has come to its end and exported."""
    log = out / "log.jsonl"
    return log.exists() and '"event": "complete"' in log.read_text()


# ------------------------------------------------------------------------------------------------------------------ the methods


def dreambooth(shop: Workshop) -> Result:
    """A subject from four pictures, all weights of the UNet and the text encoder; once with the class kept and once without."""
    data = lessons.pictures("subject", shop.folder / "pictures")
    # The text encoder has never read the word: it learns along, slowly, lest it read all other words anew.
    words = f"--data {data} --captions txt --text-encoder --text-rate 0.1"
    words += " --steps 600 --batch 8 --repeats 4 --lr 2e-4 --cooldown 300"
    # As pictures, the few that the model has drawn are learned by heart; going on to say of them what it said keeps the rest too.
    prior = f'--prior distillation --prior-weight 4 --class-prompt "{lessons.kinds(32)}" --class-pictures 96'
    kept = shop.train("dreambooth", "with-prior", f"{words} {prior}")
    bare = shop.train("dreambooth", "without-prior", words)

    asked, of_class = shop.asked("subject"), shop.asked("class")
    pixels, share, still = {}, {}, {}
    for name, model in (("untuned", None), ("kept", kept), ("bare", bare)):
        pipe = shop.base if model is None else sdcore.load(str(model / "model"), device="cpu", dtype=torch.float32)
        pixels[name], readings = shop.draw(name, pipe, [one.text for one in asked])
        share[name] = {
            right: lessons.share(asked, readings, right) for right in (lessons.shows_subject, lessons.everything)
        }
        pixels[f"{name} class"], readings = shop.draw(f"{name}, class", pipe, [one.text for one in of_class])
        still[name] = lessons.share(of_class, readings, lessons.everything)
        still[f"{name} chance"] = lessons.chance(of_class, readings, lessons.everything)
        still[f"{name} subject"] = float(np.mean([checker.shows(one, "subject") for one in readings]))
    vae, subject, everything = shop.base.vae, lessons.shows_subject, lessons.everything
    alarms, lost = shop.alarms("subject"), {name: still["untuned"] - still[name] for name in ("kept", "bare")}
    sheet = [pixels["untuned"], pixels["kept"], pixels["bare"]]
    of_class_sheet = [pixels["untuned class"], pixels["kept class"], pixels["bare class"]]
    return shop.result(
        "DreamBooth: a subject from four pictures",
        "The rocket, which the UNet has never seen, from two pictures of it alone and two beside something. Asked for "
        "elsewhere: on other backgrounds, beside, above and below other things. The class are all other shapes. It is kept by "
        "what the model said, before it learned, of pictures that it had drawn for 32 prompts, and judged by other prompts, of "
        "combinations that no training showed.",
        [
            Row("subject right", share["kept"][subject], 0.8, False, share["untuned"][subject],
                lessons.ceiling(vae, asked, subject), alarms),
            Row("subject right, untuned", share["untuned"][subject], 0.1, True),
            Row("subject right, without the prior", share["bare"][subject]),
            Row("everything that was said right", share["kept"][everything], None, False, share["untuned"][everything],
                lessons.ceiling(vae, asked, everything)),
            Row("class prompts right", still["kept"], None, False, still["untuned"],
                lessons.ceiling(vae, of_class, everything), still["kept chance"]),
            Row("class prompts lost, with the prior", lost["kept"], 0.05, True, unit="points"),
            Row("class prompts lost, without it", lost["bare"], lost["kept"], unit="points"),
            Row("class prompts that show the subject, with the prior", still["kept subject"]),
            Row("class prompts that show the subject, without it", still["bare subject"]),
        ],
        [
            shop.sheet("learned", "What was learned from", [shop.pictures(data)], 4),
            shop.sheet("subject", "Asked for the subject: untuned, with the prior, without: " + quoted(asked), sheet),
            shop.sheet("class", "Asked for the class: untuned, with the prior, without: " + quoted(of_class), of_class_sheet),
        ],
    )  # fmt: skip


def poster(shop: Workshop) -> Result:
    """A style whose parts the model knows, from sixteen pictures, by a LoRA of the UNet's attention."""
    return style(
        shop,
        "poster",
        "--rank 4 --steps 250 --batch 8 --lr 2e-3 --cooldown 120 --dropout 0.1",
        "LoRA: a style from sixteen pictures",
        "A poster: a dark dot in every thing, and all on yellow paper. The UNet has seen dots and yellow, each now and then, and "
        "draws them where it is told to; that everything is so is what it learns.",
        aims=(0.8, 0.05),
    )


def night(shop: Workshop) -> Result:
    """A style that the model has never seen, from as many, with two per cent of the weights: its content is lost."""
    return style(
        shop,
        "night",
        "--layers full --rank 1 --ranks down_blocks.0=4,up_blocks.1=4,conv_in=4,conv_out=4,ff=0 "
        "--steps 1500 --batch 6 --lr 5e-3 --cooldown 800 --dropout 0.1",
        "LoRA: a style that the model has never seen, from as many",
        "The night: a dark sky, and things in a pale rim. Its latents lie two standard deviations from all that the UNet was "
        "trained on, and sixteen pictures are learned by heart before it has found the way there: the style comes, at the cost "
        "of the content (LOG.md). No aim is set.",
    )


def style(
    shop: Workshop,
    name: str,
    words: str,
    title: str,
    about: str,
    aims: tuple[float, float] | tuple[None, None] = (None, None),
) -> Result:
    """A LoRA of one of `lessons.STYLES`, `sdcore train lora` with `words`. Aims: style right at least, content lost at most."""
    data = lessons.pictures(name, shop.folder / "pictures")
    run = shop.train("lora", name, f"--data {data} --captions txt {words}")

    asked = shop.asked(name)
    texts = [one.text for one in asked]
    before, untuned = shop.draw("untuned", shop.base, texts)
    adapter, _ = read_adapter(run / f"{name}.safetensors", shop.base)
    lora.attach(shop.base, adapter)
    after, tuned = shop.draw("tuned", shop.base, texts)
    lora.merge(shop.base)
    merged, _ = shop.draw("merged", shop.base, texts[:8])
    lora.detach(shop.base)
    trained = sum(t.numel() for part in adapter.parts.values() for change in part.values() for _, t in change.tensors())
    apart = 127.5 * float(np.abs(merged - after[:8]).max())
    taught, everything, vae = lessons.TAUGHT[name], lessons.everything, shop.base.vae
    content = {"untuned": lessons.share(asked, untuned, everything), "tuned": lessons.share(asked, tuned, everything)}
    reached, lost = aims
    return shop.result(
        title,
        f"{about} The captions do not name the style: whatever is drawn with the LoRA is drawn so. Asked for: combinations of "
        "shape, colour and relation that neither the model nor the LoRA was shown. Content: everything that the prompt says.",
        [
            Row("style right", lessons.share(asked, tuned, taught), reached, False, lessons.share(asked, untuned, taught),
                lessons.ceiling(vae, asked, taught), shop.alarms(name)),
            Row("style right, untuned", lessons.share(asked, untuned, taught), 0.1, True),
            Row("content right", content["tuned"], None, False, content["untuned"],
                lessons.ceiling(vae, asked, everything), lessons.chance(asked, tuned, everything)),
            Row("content lost", content["untuned"] - content["tuned"], lost, True, unit="points"),
            Row("parameters, of the UNet's", trained / sum(p.numel() for p in shop.base.unet.parameters()), 0.02, True),
            Row("attached against merged, largest difference", apart, 1.0, True, unit="of 255"),
        ],
        [
            shop.sheet("learned", "What was learned from", [shop.pictures(data)[:8], shop.pictures(data)[8:]]),
            shop.sheet(name, "Untuned, with the LoRA: " + quoted(asked), [before, after]),
        ],
    )  # fmt: skip


def textual_inversion(shop: Workshop) -> Result:
    """A look from four pictures, by nothing but a word."""
    folder = Path(fetch.resolve("tiny"))
    before = hashes(folder)
    data = lessons.pictures("look", shop.folder / "pictures")
    words = f'--data {data} --captions txt --token "{lessons.WORD}" --initial "green striped" --vectors 2'
    # Without the noisiest timesteps, whose loss is about where things lie; more steps or vectors than these bring nothing.
    more = "--steps 300 --batch 8 --repeats 2 --lr 2e-3 --warmup 0 --cooldown 200 --range 0.2,0.9"
    run = shop.train("textual-inversion", "look", f"{words} {more}")

    asked = shop.asked("look")
    without = [one.text.replace(lessons.WORD, " ".join(world.LOOK)) for one in asked]  # the world's own words for it
    first, untuned = shop.draw("untuned", shop.base, without)
    (word,) = read_embeddings(run / f"{lessons.WORD.strip('<>')}.safetensors")
    embeddings.attach(shop.base, word, lessons.WORD)
    then, tuned = shop.draw("tuned", shop.base, [one.text for one in asked])
    look, everything, vae = lessons.wears_look, lessons.everything, shop.base.vae
    changed = [name for name, digest in hashes(folder).items() if before[name] != digest]
    return shop.result(
        "Textual inversion: a look from four pictures",
        "Teal stripes, a colour that the UNet has never seen, worn by all six shapes in four pictures, once beside something "
        "else. Asked for on all shapes, beside other things. All that trains is the word; the untuned model is asked for "
        "teal stripes in plain words.",
        [
            Row("look right", lessons.share(asked, tuned, look), 0.7, False, lessons.share(asked, untuned, look),
                lessons.ceiling(vae, asked, look), shop.alarms("look")),
            Row("look right, of one thing", lessons.share(asked[::2], tuned[::2], look)),
            Row("look right, of two things", lessons.share(asked[1::2], tuned[1::2], look)),
            Row("everything that was said right", lessons.share(asked, tuned, everything), None, False,
                lessons.share(asked, untuned, everything), lessons.ceiling(vae, asked, everything),
                lessons.chance(asked, tuned, everything)),
            Row("numbers that trained", sum(v.numel() for v in word.vectors), unit=""),
            Row("files of the model that changed", len(changed), 0, True, unit=""),
        ],
        [
            shop.sheet("learned", "What was learned from", [shop.pictures(data)], 4),
            shop.sheet("look", "In plain words, with the word: " + quoted(asked), [first, then]),
        ],
    )  # fmt: skip


def hashes(folder: Path) -> dict[str, str]:
    """The sha256 of every weight file of a model."""
    return {str(file): sha256(file) for file in sorted(folder.glob("*/*.safetensors"))}


def quoted(asked: Sequence[Asked], n: int = 8) -> str:
    """The prompts under the first columns of a sheet."""
    return "; ".join(one.text for one in asked[:n])


@dataclass(frozen=True)
class Entry:
    """One method of the report: its folder's name, and what does it."""

    name: str
    run: Callable[[Workshop], Result]


ENTRIES = (
    Entry("dreambooth", dreambooth),
    Entry("lora", poster),
    Entry("lora-night", night),
    Entry("textual-inversion", textual_inversion),
    Entry("controlnet", follow.controlnet),
    Entry("dpo", liking.dpo),
    Entry("ddpo-jpeg", aligned.jpeg),
    Entry("ddpo-alignment", aligned.alignment),
    Entry("draft", aligned.draft),
)


# ---------------------------------------------------------------------------------------------------------------- from the shell


def go(entry: Entry, options: ChapterOptions) -> Result:
    """The entry's result: the one that is kept, or a new one, which is kept."""
    folder = Path(options.out) / entry.name
    if options.again:
        shutil.rmtree(folder, ignore_errors=True)
    found = report.load(folder)
    if found is None:
        folder.mkdir(parents=True, exist_ok=True)
        found = entry.run(Workshop(folder, options))
        report.save(found, folder)
    return found


def go_all(entries: Sequence[Entry], options: ChapterOptions) -> list[tuple[Result, Path]]:
    """Run the entries that are wanted; table and page of all that have been run, which are given back with their folders.

    ConfigError for a name that is none of theirs.
    """
    unknown = set(options.only) - {entry.name for entry in entries}
    if unknown:
        raise ConfigError(f"--only {','.join(sorted(unknown))}: expected some of {', '.join(e.name for e in entries)}")
    torch.set_num_threads(options.threads)
    for entry in entries:
        if not options.only or entry.name in options.only:
            go(entry, options)
    out = Path(options.out)
    done = [(found, out / entry.name) for entry in entries if (found := report.load(out / entry.name))]
    report.write_page(done, out / "report.html")
    print(report.table([found for found, _ in done]))
    print(f"the report is {out / 'report.html'}", file=sys.stderr)
    return done


def main(argv: list[str] | None = None) -> int:
    """`python -m sdcore.train.chapter`."""
    options = parse(ChapterOptions, argv, prog="python -m sdcore.train.chapter")
    done = go_all(ENTRIES, options)
    if options.record:
        report.record(done, Path("docs"), "chapter.md")
        report.replace_table(Path("docs/training.md"), report.table([found for found, _ in done]))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
