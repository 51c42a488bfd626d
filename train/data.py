"""Pictures with captions: a folder read and checked before the first step, then any batch of any step as a pure function.

    pictures = Pictures(options, seed=0, batch=4)       # lists every fault of every file first; then refuses, or leaves them out
    visits = pictures.visits(step, places)              # who is seen at these places of that step's batch, how, with which words
    pixels, mask = open_visit(visit)                    # [3, H, W] in -1..1, [1, H, W] in 0..1

Three layers. `scan` finds pictures and the captions that belong to them; `examine` opens each one and says what is wrong with
it; `Pictures` sorts them into buckets of like shape and answers, for a step and a place, with a `Visit`: picture, crop, flip,
caption. Nothing moves: there is no iterator whose position could be lost, a visit is worked out from (seed, step, place) alone.

A picture has `variants` ways to be cropped and flipped, worked out from its own bytes, and a visit takes one of them. So what is
worked out from pixels can be kept (train/caches.py) without losing augmentation: the cache simply holds every variant.

A step's examples have one size. An epoch goes through every picture `repeats` times; a bucket's last batch is filled up from
its own beginning, so that all batches are equally large.

Legend: W H pixels of a bucket.
"""

import csv
import hashlib
import json
import math
import sys
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from sdcore.errors import ImageError, TrainingError
from sdcore.image import open_picture

from .checkpoints import sha256
from .options import option
from .task import generator

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp"}
TABLES = {".json", ".jsonl", ".csv", ".parquet"}


@dataclass(frozen=True)
class DataOptions:
    """Which pictures, with which words, seen how."""

    data: str = option("pictures", "folder of pictures (PNG, JPEG, WebP), its subfolders included")
    captions: str = option(
        "txt",
        "txt: a .txt beside each picture, a caption a line; filename; a .json, .jsonl, .csv or .parquet table with file_name and "
        "text; or text:WORDS for all, text:WORDS|OTHER WORDS one of them at each visit",
    )
    broken: str = option(
        "refuse", "pictures that are damaged, animated, CMYK, too small or without caption: refuse or skip"
    )
    resolution: int = option(512, "pictures are seen at this many pixels squared")
    buckets: bool = option(True, "keep each picture's shape, as near as a bucket comes, rather than cut squares")
    bucket_step: int = option(64, "sides of buckets are multiples of this many pixels")
    longest: float = option(2.0, "the longest bucket is this many times as long as it is wide")
    repeats: int = option(1, "times that each picture is seen in an epoch")
    variants: int = option(1, "ways in which each picture is cropped and flipped, one of which is taken at each visit")
    crop: str = option("center", "where what does not fit a bucket is cut off: center or random")
    flip: bool = option(False, "every second variant is mirrored (needs --variants 2 or more)")
    shuffle_tags: bool = option(False, "shuffle what lies between a caption's commas")
    keep_tags: int = option(0, "tags at the beginning that stay where they are")
    dropout: float = option(
        0.0, "share of captions replaced by the empty one; 0.1 is usual, for classifier-free guidance"
    )
    masks: str | None = option(
        None,
        "folder of pictures of the same names: white counts in the loss, black not; where one is missing, all counts",
    )


# ------------------------------------------------------------------------------------------------------- finding and checking


@dataclass(frozen=True)
class Item:
    """A picture that can be used."""

    path: Path
    sha256: str  # of the file's bytes
    size: tuple[int, int]  # width, height as it is seen (EXIF turns applied)
    captions: tuple[str, ...]
    mask: Path | None = None
    mask_sha256: str = ""


@dataclass(frozen=True)
class Fault:
    """A picture that cannot be used, or only wrongly."""

    path: Path
    what: str


def scan(options: DataOptions) -> list[tuple[Path, tuple[str, ...]]]:
    """Every picture of the folder with its captions (none: missing), in the order of names. TrainingError: none, bad table."""
    folder = Path(options.data)
    if not folder.is_dir():
        raise TrainingError(f"--data {folder}: is no folder; name one that holds pictures")
    paths = sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
    if not paths:
        raise TrainingError(f"--data {folder}: holds no picture (.png, .jpg, .jpeg, .webp)")
    return list(zip(paths, _captions(options.captions, folder, paths), strict=True))


def _captions(source: str, folder: Path, paths: list[Path]) -> list[tuple[str, ...]]:
    """The captions of each path."""
    if source.startswith("text:"):
        return [tuple(source.removeprefix("text:").split("|"))] * len(paths)
    if source == "filename":
        return [(p.stem.replace("_", " ").strip(),) for p in paths]
    if source == "txt":
        return [_lines(p.with_suffix(".txt")) for p in paths]
    table = Path(source) if Path(source).exists() else folder / source
    if table.suffix.lower() not in TABLES:
        raise TrainingError(
            f"--captions {source}: expected txt, filename, text:WORDS, or a .json, .jsonl, .csv or .parquet table"
        )
    by_name = read_table(table)
    names = {p: p.relative_to(folder).as_posix() for p in paths}
    unknown = sorted(set(by_name) - set(names.values()))
    if unknown:
        raise TrainingError(f"{table}: {len(unknown)} rows name no picture of {folder}, such as {unknown[0]!r}")
    return [by_name.get(names[p], ()) for p in paths]


def _lines(path: Path) -> tuple[str, ...]:
    """The lines of a caption file that say something; none where there is no file or it is no text."""
    try:
        return tuple(line.strip() for line in path.read_text("utf-8-sig").splitlines() if line.strip())
    except (OSError, UnicodeDecodeError):
        return ()


def read_table(path: Path) -> dict[str, tuple[str, ...]]:
    """File name -> captions, from the columns `file_name` and `text`, which may hold several. TrainingError for anything else.

    A .json is a list of such rows, or one table {"name.png": "caption"}.
    """
    try:
        if path.suffix.lower() == ".csv":
            with open(path, newline="", encoding="utf-8-sig") as f:
                rows: Any = list(csv.DictReader(f))
        elif path.suffix.lower() == ".parquet":
            rows = _parquet(path)
        elif path.suffix.lower() == ".jsonl":
            rows = [json.loads(line) for line in path.read_text("utf-8-sig").splitlines() if line.strip()]
        else:
            rows = json.loads(path.read_text("utf-8-sig"))
        if isinstance(rows, dict):
            rows = [{"file_name": name, "text": text} for name, text in rows.items()]
        found: dict[str, tuple[str, ...]] = {}
        for row in rows:
            texts = [row["text"]] if isinstance(row["text"], str) else row["text"]
            if not isinstance(row["file_name"], str) or not all(isinstance(text, str) for text in texts):
                raise TypeError("file_name and text must be texts")
            found[row["file_name"]] = found.get(row["file_name"], ()) + tuple(text.strip() for text in texts)
    except (OSError, ValueError, KeyError, TypeError, csv.Error) as error:
        raise TrainingError(f"{path}: no table of file_name and text ({type(error).__name__}: {error})") from None
    return found


def _parquet(path: Path) -> list[dict]:
    try:
        from pyarrow import parquet
    except ImportError:
        raise TrainingError(
            f"{path}: parquet needs pyarrow, which is not installed; `pip install pyarrow`, or use .csv"
        ) from None
    return parquet.read_table(path, columns=["file_name", "text"]).to_pylist()


def examine(path: Path, captions: tuple[str, ...], options: DataOptions) -> Item | Fault:
    """Open a picture, decode all of it, and say whether it can be used."""
    try:
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            size = open_picture(path).size
        with Image.open(path) as file:
            mode = file.mode
        mask = None
        if options.masks is not None:
            masks = Path(options.masks) / path.relative_to(options.data)
            mask = next((m for s in sorted(SUFFIXES) if (m := masks.with_suffix(s)).exists()), None)
            if mask is not None and open_picture(mask).size != size:
                return Fault(path, f"its mask {mask} has another size")
    except ImageError as error:
        return Fault(path, str(error).removeprefix(f"{path}: "))
    if warned:
        return Fault(path, str(warned[0].message).removeprefix(f"{path}: "))
    if mode == "CMYK":
        return Fault(path, "CMYK, whose colours depend on a profile; convert it to RGB")
    bucket = nearest(size, shapes(options))
    if size[0] < bucket[0] or size[1] < bucket[1]:
        return Fault(path, f"{size[0]}x{size[1]}, smaller than the {bucket[0]}x{bucket[1]} at which it would be seen")
    if not captions:
        return Fault(path, f"without a caption (--captions {options.captions})")
    return Item(path, sha256(path), size, captions, mask, sha256(mask) if mask else "")


# ------------------------------------------------------------------------------------------------------------------- buckets


def shapes(options: DataOptions) -> list[tuple[int, int]]:
    """The sizes (W, H) of all buckets: multiples of the step, as many pixels as the resolution squared at most.

    For each width the greatest height that fits, and the other way round, between squares and the longest allowed.
    """
    side, step = options.resolution, options.bucket_step
    if not options.buckets:
        return [(side, side)]
    found = set()
    for w in range(step, int(side * math.sqrt(options.longest)) + step, step):
        h = side * side // w // step * step
        if h and 1 / options.longest <= w / h <= options.longest:
            found |= {(w, h), (h, w)}
    return sorted(found) or [(side, side)]


def nearest(size: tuple[int, int], buckets: Iterable[tuple[int, int]]) -> tuple[int, int]:
    """The bucket whose shape comes nearest (as a ratio); of two that are equally near, the larger."""
    ratio = math.log(size[0] / size[1])
    return min(buckets, key=lambda b: (abs(math.log(b[0] / b[1]) - ratio), -b[0] * b[1]))


# --------------------------------------------------------------------------------------------------------------------- visits


@dataclass(frozen=True)
class View:
    """How a picture is seen: resized, a window cut out, then perhaps mirrored."""

    resized: tuple[int, int]  # width, height
    left: int
    top: int
    size: tuple[int, int]  # W, H of the window
    flip: bool


@dataclass(frozen=True)
class Visit:
    """One example of one step."""

    item: Item
    variant: int
    view: View
    caption: str

    @property
    def sizes(self) -> tuple[int, int, int, int, int, int]:
        """What XL models hear of the size: original height, width, crop top, left, target height, width.

        The window's place is that in the picture as it is seen: in a mirrored one it is counted from the other edge.
        Source: Podell et al. 2023, section 2.2.
        """
        view, (w, h) = self.view, self.item.size
        left = view.resized[0] - view.left - view.size[0] if view.flip else view.left
        return h, w, view.top, left, view.size[1], view.size[0]


class Pictures:
    """The pictures of a run, and who is seen when. `faults` are those left out."""

    def __init__(self, options: DataOptions, seed: int, batch: int, found: Sequence[Item | Fault] | None = None):
        """`found` is what was examined already (train/dpo.py); without it, the folder of the options is."""
        _check(options)
        self.options, self.seed, self.batch = options, seed, batch
        if found is None:
            looked_at = tqdm(scan(options), desc="looking at pictures", disable=None)
            found = [examine(path, captions, options) for path, captions in looked_at]
        self.faults = [one for one in found if isinstance(one, Fault)]
        self.items = [one for one in found if isinstance(one, Item)]
        for fault in self.faults:
            print(f"{fault.path}: {fault.what}", file=sys.stderr)
        count = f"{len(self.faults)} of {len(found)} pictures cannot be used (listed above)"
        if self.faults and (options.broken == "refuse" or not self.items):
            raise TrainingError(f"--data {options.data}: {count}; mend them, or leave them out with --broken skip")
        if self.faults:
            print(f"WARNING: {count} and are left out", file=sys.stderr)
        sizes = shapes(options)
        self.bucket_of = [nearest(item.size, sizes) for item in self.items]
        self.buckets: dict[tuple[int, int], list[int]] = {}  # size -> items
        for i, size in enumerate(self.bucket_of):
            self.buckets.setdefault(size, []).append(i)
        self.epoch_length = sum(self._batches(members) for members in self.buckets.values())
        self._plan: tuple[int, list[list[int]]] = (-1, [])

    def identity(self) -> dict[str, object]:
        """What a resumed run must find again: every picture, mask and caption by content, and how many were left out."""
        digest = hashlib.sha256()
        for item in self.items:
            digest.update(json.dumps([item.path.name, item.sha256, item.mask_sha256, item.captions]).encode())
        return {"pictures": len(self.items), "left_out": len(self.faults), "content": digest.hexdigest()}

    def visits(self, step: int, places: Sequence[int]) -> list[Visit]:
        """Who is seen at these places (of 0..batch-1) of the batch of a step; all of one size."""
        return [self.visit(i, step, place) for i, place in zip(self.members(step, places), places, strict=True)]

    def members(self, step: int, places: Sequence[int]) -> list[int]:
        """The numbers of the items at these places of the batch of a step."""
        epoch, k = divmod(step, self.epoch_length)
        if self._plan[0] != epoch:
            self._plan = (epoch, self.epoch(epoch))
        return [self._plan[1][k][place] for place in places]

    def visit(self, index: int, step: int, place: int) -> Visit:
        """One picture as it is seen at a place of a step: its variant and its words are drawn from (seed, step, place)."""
        item, rng = self.items[index], generator(self.seed, step, place, 1)
        variant = int(torch.randint(self.options.variants, (1,), generator=rng))
        return Visit(item, variant, self.view(index, variant), self.words(item, rng))

    def epoch(self, number: int) -> list[list[int]]:
        """The batches of an epoch, as item numbers: buckets shuffled, cut into batches, and the batches shuffled."""
        rng, batches = generator(self.seed, number, 2**20), []
        for members in self.buckets.values():
            order = [i for _ in range(self.options.repeats) for i in _shuffled(members, rng)]
            while len(order) % self.batch:  # filled up from the beginning
                order += order[: self.batch - len(order) % self.batch]
            batches += [order[i : i + self.batch] for i in range(0, len(order), self.batch)]
        return _shuffled(batches, rng)

    def view(self, index: int, variant: int) -> View:
        """How variant k of a picture is cropped and flipped: of its bytes, the variant and the options alone."""
        item, (w, h) = self.items[index], self.bucket_of[index]
        scale = max(w / item.size[0], h / item.size[1])
        resized = max(w, round(item.size[0] * scale)), max(h, round(item.size[1] * scale))
        rng = generator(int(item.sha256[:14], 16), variant)
        left, top = (resized[0] - w) // 2, (resized[1] - h) // 2
        if self.options.crop == "random":
            across, down = torch.rand(2, generator=rng, dtype=torch.float64).tolist()
            left, top = int(across * (resized[0] - w + 1)), int(down * (resized[1] - h + 1))
        return View(resized, left, top, (w, h), flip=self.options.flip and variant % 2 == 1)

    def words(self, item: Item, rng: torch.Generator) -> str:
        """One of a picture's captions, its tags shuffled, now and then the empty one, as the options say."""
        o = self.options
        caption = item.captions[int(torch.randint(len(item.captions), (1,), generator=rng))]
        if o.shuffle_tags:
            tags = [tag.strip() for tag in caption.split(",")]
            caption = ", ".join(tags[: o.keep_tags] + _shuffled(tags[o.keep_tags :], rng))
        return "" if float(torch.rand(1, generator=rng)) < o.dropout else caption

    def _batches(self, members: list[int]) -> int:
        return math.ceil(len(members) * self.options.repeats / self.batch)


def _shuffled(values: list, rng: torch.Generator) -> list:
    return [values[i] for i in torch.randperm(len(values), generator=rng).tolist()]


def _check(o: DataOptions) -> None:
    """TrainingError for a choice that does not exist or is out of range."""
    for name, known in (("broken", ("refuse", "skip")), ("crop", ("center", "random"))):
        if getattr(o, name) not in known:
            raise TrainingError(f"--{name}: expected one of {', '.join(known)}, found {getattr(o, name)!r}")
    for name, low in (
        ("resolution", 8),
        ("bucket_step", 8),
        ("longest", 1),
        ("repeats", 1),
        ("variants", 1),
        ("keep_tags", 0),
    ):
        if getattr(o, name) < low:
            raise TrainingError(f"--{name.replace('_', '-')}: expected at least {low}, found {getattr(o, name)}")
    if o.flip and o.variants < 2:
        raise TrainingError("--flip: mirrors every second variant, and there is one; add --variants 2 or more")
    if not 0 <= o.dropout <= 1:
        raise TrainingError(f"--dropout: expected a share 0..1, found {o.dropout}")


# --------------------------------------------------------------------------------------------------------------------- pixels


def open_visit(visit: Visit) -> tuple[Tensor, Tensor | None]:
    """(pixels [3, H, W] in -1..1, mask [1, H, W] in 0..1 or None) of a visit. TrainingError: the file changed."""
    item = visit.item
    for path, promised in ((item.path, item.sha256), (item.mask, item.mask_sha256)):
        if path is not None and (not path.exists() or sha256(path) != promised):
            raise TrainingError(f"{path}: changed or removed since the run began; put it back, or start anew")
    pixels = seen(open_picture(item.path).pil, visit.view)
    mask = None if item.mask is None else seen(open_picture(item.mask).pil, visit.view)
    return pixels * 2 - 1, None if mask is None else mask.mean(dim=0, keepdim=True)


def seen(picture: Image.Image, view: View) -> Tensor:
    """The window of a picture [3, H, W] in 0..1."""
    w, h = view.size
    window = picture.resize(view.resized, Image.Resampling.LANCZOS).crop(
        (view.left, view.top, view.left + w, view.top + h)
    )
    if view.flip:
        window = window.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return torch.from_numpy(np.array(window)).permute(2, 0, 1).float() / 255
