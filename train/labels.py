"""What people are asked about pictures, and what they answered: the folder RUN/rating behind `sdcore rate RUN`.

    pairs.jsonl              which of two pictures shows the prompt better? a line each: key, prompt, pictures [a, b]
    items.jsonl              how good is a single picture, 1 to 5? the same with one picture
    pictures/<sha256>.png    every picture, named by its content and never changed
    labels.jsonl             the answers, in the order in which they were given: the question again, `answer`, `left`, `time`

    keys = ask(run, [Pair("a red circle", "one.png", "two.png"), Item("a star", picture)])   # asking twice is asking once
    append(run, keys[0], "b")                 # what the page does; people answer "a", "b" or 1 to 5, "skip", and "undo"
    answers = wait(run, keys)                 # key -> Label, once all of them are answered
    for label in labels(run): ...             # all there is; `label.preference` is (better, other) where one was chosen

An answer is one line, written at once and synced before anybody is told that it is kept, so a kill or a power cut costs none;
half a line that was never acknowledged is cut off by the next writer, who says so. Nothing is ever rewritten: an undo is a line
too. The key of a question is a hash of its prompt and pictures. So a run that is resumed, and draws the same pictures again,
finds them answered; and an answer that is sent twice, because the first receipt was lost, is kept once.
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from sdcore.weights.files import sync_folder
from tqdm import tqdm

from sdcore.errors import ImageError, TrainingError
from sdcore.image import Picture, open_picture, write_whole

from .checkpoints import sha256

FILES = {2: "pairs.jsonl", 1: "items.jsonl"}  # by how many pictures a question shows
ANSWERS: dict[int, tuple[str | int, ...]] = {2: ("a", "b", "skip"), 1: (1, 2, 3, 4, 5, "skip")}
FIELDS = {"key", "prompt", "pictures"}  # of a question; labels hold LABELLED beside
LABELLED = {"answer", "left", "time"}


class Refused(TrainingError):
    """An answer that cannot be kept, now or later: to no question, none of the possible ones, or against one that stands."""


@dataclass(frozen=True)
class Pair:
    """Two pictures of one prompt, to be compared. Files, or pictures that were just drawn."""

    prompt: str
    a: str | Path | Picture
    b: str | Path | Picture


@dataclass(frozen=True)
class Item:
    """One picture of a prompt, to be scored."""

    prompt: str
    picture: str | Path | Picture


@dataclass(frozen=True)
class Question:
    """A pair or an item as it stands in the folder."""

    key: str
    prompt: str
    pictures: tuple[str, ...]  # sha256 of a and b, or of the one

    @property
    def left(self) -> str:
        """Which picture of a pair is shown on the left: a bit of the hash, so sides are even and stay as they are."""
        return "ab"[int(self.key, 16) % 2] if len(self.pictures) == 2 else ""


@dataclass(frozen=True)
class Label:
    """An answer that stands (was not undone)."""

    key: str
    prompt: str
    pictures: tuple[str, ...]
    answer: str | int  # "a" or "b"; 1 to 5; or "skip"
    left: str  # which of a pair was shown on the left
    time: str  # UTC

    @property
    def preference(self) -> tuple[str, str] | None:
        """The sha256 of the better picture and of the other one; None where none was chosen."""
        return {"a": self.pictures, "b": self.pictures[::-1]}.get(str(self.answer))  # type: ignore[return-value]

    @property
    def score(self) -> int | None:
        """1 (bad) to 5 (good) of a single picture; None for pairs, and where it was skipped."""
        return self.answer if isinstance(self.answer, int) else None


def home(run: str | Path) -> Path:
    """The folder of questions and answers of a run."""
    return Path(run) / "rating"


def picture(run: str | Path, name: str) -> Path:
    """The file of the picture with this sha256. ImageError if there is none, or if its content is another."""
    path = home(run) / "pictures" / f"{name}.png"
    if not re.fullmatch(r"[0-9a-f]{64}", name) or not path.is_file():
        raise ImageError(f"{home(run)}: there is no picture {name!r:.80}; expected the sha256 of one in pictures/")
    if sha256(path) != name:
        raise ImageError(f"{path}: changed since it was rated; restore it, or leave its labels out")
    return path


def ask(run: str | Path, questions: Sequence[Pair | Item]) -> list[str]:
    """Put pairs and items up for rating and return their keys; what was asked before is not asked again.

    Raises ImageError for a picture that cannot be read, TrainingError where the folder cannot be written.
    """
    (home(run) / "pictures").mkdir(parents=True, exist_ok=True)
    made = [_question(run, question) for question in questions]
    for count, name in FILES.items():
        with _writing(home(run) / name) as (known, write):
            new = {q.key: q for q in made if len(q.pictures) == count and q.key not in {r["key"] for r in known}}
            write([{"key": q.key, "prompt": q.prompt, "pictures": q.pictures} for q in new.values()])
    return [question.key for question in made]


def questions(run: str | Path) -> dict[str, Question]:
    """Everything that was asked, by key: pairs, then items, each in the order in which they were asked."""
    records = [record for name in FILES.values() for record in _records(home(run) / name)]
    return {r["key"]: Question(r["key"], r["prompt"], tuple(r["pictures"])) for r in records}


def labels(run: str | Path) -> list[Label]:
    """The answers that stand, skips included, oldest first. TrainingError if a line is damaged."""
    return list(_standing(_records(home(run) / "labels.jsonl")).values())


def append(run: str | Path, key: str, answer: str | int) -> bool:
    """Keep an answer, or take it back with "undo"; on return it is on the disk. False if that stood there already.

    Refused: nothing was asked under this key; no such answer; another answer stands. TrainingError: the disk does not take it.
    """
    question = questions(run).get(key)
    if question is None:
        raise Refused(f"{home(run)}: nothing was asked under the key {key!r:.80}; reload the page")
    allowed = (*ANSWERS[len(question.pictures)], "undo")
    if type(answer) not in (str, int) or answer not in allowed:  # `in` alone would take True and 1.0 for 1
        raise Refused(f"answer: expected one of {', '.join(map(str, allowed))}, found {answer!r:.80}")
    with _writing(home(run) / "labels.jsonl") as (known, write):
        stands = _standing(known).get(key)
        if answer == "undo":
            if stands is None:
                return False
        elif stands is not None:
            if stands.answer == answer:
                return False
            raise Refused(f"{key}: is answered already, with {stands.answer!r}; undo that first")
        record = {"key": key, "prompt": question.prompt, "pictures": question.pictures, "answer": answer}
        write([record | {"left": question.left, "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}])
    return True


def wait(
    run: str | Path, keys: Sequence[str], stop: Callable[[], bool] = lambda: False, seconds: float = 0.5
) -> dict[str, Label]:
    """Block until every key has an answer (a skip is one), and return them; progress goes to stderr.

    The folder is looked at every `seconds`. TrainingError: a key that was never asked; `stop()` came true, as after Ctrl-C.
    """
    if unknown := set(keys) - questions(run).keys():
        raise TrainingError(
            f"{home(run)}: nothing was asked under the key {min(unknown)!r:.80}, so nobody will answer it"
        )
    wanted = dict.fromkeys(keys)
    with tqdm(total=len(wanted), desc="rated by people", unit="", file=sys.stderr, leave=False, mininterval=0) as bar:
        said = False
        while True:
            found = {label.key: label for label in labels(run) if label.key in wanted}
            bar.n = len(found)
            bar.refresh()
            if len(found) == len(wanted):
                return {key: found[key] for key in wanted}
            if not said:
                bar.write(f"waiting for people; let them run: sdcore rate {run}", file=sys.stderr)
                said = True
            if stop():
                raise TrainingError(
                    f"{home(run)}: stopped when {len(found)} of {len(wanted)} were rated; these are kept, resume to go on"
                )
            time.sleep(seconds)


# --- the files


def _question(run: str | Path, asked: Pair | Item) -> Question:
    """Keep the pictures as everybody will see them, upright and without transparency, and name the question."""
    names = []
    for shown in (asked.a, asked.b) if isinstance(asked, Pair) else (asked.picture,):
        data = (shown if isinstance(shown, Picture) else open_picture(shown)).png()
        names.append(hashlib.sha256(data).hexdigest())
        path = home(run) / "pictures" / f"{names[-1]}.png"
        if not path.exists():
            write_whole(path, data)
    key = hashlib.sha256(json.dumps([asked.prompt, *names]).encode()).hexdigest()[:20]
    return Question(key, asked.prompt, tuple(names))


def _standing(records: Sequence[dict]) -> dict[str, Label]:
    """The labels that these lines leave standing, oldest first."""
    standing: dict[str, Label] = {}
    for r in records:
        standing.pop(r["key"], None)
        if r["answer"] != "undo":
            standing[r["key"]] = Label(**r | {"pictures": tuple(r["pictures"])})
    return standing


def _records(path: Path) -> list[dict]:
    """The whole lines of a file, none if there is no file. TrainingError for a line that is no record."""
    with contextlib.suppress(FileNotFoundError):
        return _parse(path, path.read_bytes())
    return []


def _parse(path: Path, data: bytes) -> list[dict]:
    """Records of all whole lines; behind the last newline there is nothing, or half a line."""
    fields = FIELDS | (LABELLED if path.name == "labels.jsonl" else set())
    records = []
    for number, line in enumerate(data.split(b"\n")[:-1], 1):
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        if not isinstance(record, dict) or record.keys() != fields:
            raise TrainingError(
                f"{path}, line {number}: expected a record of {', '.join(sorted(fields))}; restore the file, or take it out"
            )
        records.append(record)
    return records


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[tuple[list[dict], Callable[[Sequence[dict]], None]]]:
    """A file for this writer alone: what it holds, and what adds records to it in one write, synced.

    Half a line at its end, left by a writer who was killed, is cut off. Where the disk does not take all that is written, none
    stays. Raises TrainingError.
    """

    def write(records: Sequence[dict]) -> None:
        data = "".join(json.dumps(record) + "\n" for record in records).encode()
        size = os.fstat(handle).st_size
        try:
            if data and os.write(handle, data) < len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(handle)
        except OSError:
            os.ftruncate(handle, size)
            raise

    try:
        handle = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)  # gives way when the file is closed, or the process killed
            data = path.read_bytes()
            whole = data.rfind(b"\n") + 1
            if whole < len(data):
                print(f"{path}: half a line at its end, never acknowledged, was cut off", file=sys.stderr)
                os.ftruncate(handle, whole)
            if not data:
                sync_folder(path.parent)  # its name, too, is to survive a power cut
            yield _parse(path, data[:whole]), write
        finally:
            os.close(handle)
    except OSError as error:
        raise TrainingError(
            f"{path}: cannot be written ({error.strerror}); nothing was added. Mend it and try again"
        ) from None
