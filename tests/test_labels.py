"""What people answered is kept: once, in order, over kills, full disks and second copies of the same receipt."""

import json
import multiprocessing
import os
import random
import resource
import signal
import threading
import time
from collections import Counter

import numpy as np
import pytest
from PIL import Image
from sdcore.train import labels
from sdcore.train.labels import Item, Pair, append, ask, home, wait

from sdcore.errors import ImageError, TrainingError
from sdcore.image import Picture


def plain(*colour: int) -> Picture:
    return Picture(np.full((16, 16, 3), colour, np.uint8))


def pairs(n: int) -> list[Pair]:
    return [Pair(f"prompt {i}", plain(i, 0, 0), plain(i, 255, 0)) for i in range(n)]


def lines(run, name="labels.jsonl") -> list[dict]:
    return [json.loads(line) for line in (home(run) / name).read_text().splitlines()]


# --- what is asked


def test_a_question_keeps_prompt_and_pictures_by_content(tmp_path):
    plain(1, 2, 3).save(tmp_path / "one.png")
    keys = ask(tmp_path, [Pair("a star\nor two", tmp_path / "one.png", plain(4, 5, 6)), Item("ü", plain(1, 2, 3))])
    asked = labels.questions(tmp_path)
    assert list(asked) == keys
    assert [q.prompt for q in asked.values()] == ["a star\nor two", "ü"]
    assert asked[keys[0]].pictures[0] == asked[keys[1]].pictures[0] and len(asked[keys[0]].pictures) == 2
    for question in asked.values():
        for name in question.pictures:
            assert Image.open(labels.picture(tmp_path, name)).size == (16, 16)
    assert np.array(Image.open(labels.picture(tmp_path, asked[keys[0]].pictures[1])))[0, 0].tolist() == [4, 5, 6]


def test_asking_again_is_asking_once(tmp_path):
    first = ask(tmp_path, pairs(3))
    again = ask(tmp_path, [*pairs(4), pairs(1)[0]])
    assert again[:3] == first and again[4] == first[0] and len(lines(tmp_path, "pairs.jsonl")) == 4
    assert len(list((home(tmp_path) / "pictures").iterdir())) == 8


def test_pictures_are_kept_as_people_see_them(tmp_path):
    """Turned as EXIF says, transparency on white: the person and the trainer look at the same pixels."""
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (24, 16), "red").save(tmp_path / "turned.jpg", exif=exif)
    Image.new("RGBA", (16, 16), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    (key,) = ask(tmp_path, [Pair("", tmp_path / "turned.jpg", tmp_path / "clear.png")])
    turned, clear = (Image.open(labels.picture(tmp_path, name)) for name in labels.questions(tmp_path)[key].pictures)
    assert turned.size == (16, 24) and np.array(clear).min() == 255


def test_a_file_that_is_no_picture_asks_nothing(tmp_path):
    (tmp_path / "x.png").write_text("no")
    with pytest.raises(ImageError, match="x.png"):
        ask(tmp_path, [*pairs(1), Item("x", tmp_path / "x.png")])
    assert labels.questions(tmp_path) == {}


def test_sides_are_even_and_stay(tmp_path):
    ask(tmp_path, pairs(60))
    sides = [question.left for question in labels.questions(tmp_path).values()]
    # Of 60 fair coins, fewer than 15 heads or tails come with a chance of 1e-4; the hashes are what they are.
    assert 15 <= sides.count("a") <= 45 and sides == [q.left for q in labels.questions(tmp_path).values()]


@pytest.mark.parametrize("name", ["", "../x", "0" * 63 + "/../../x", "0" * 64, "..", "A" * 64, "0" * 63 + "\n"])
def test_a_picture_is_had_by_its_hash_alone(tmp_path, name):
    ask(tmp_path, pairs(1))
    plain(1, 1, 1).save(home(tmp_path) / "x.png")  # there, but no picture of a pair
    (home(tmp_path) / "pictures" / ("0" * 63)).mkdir()
    with pytest.raises(ImageError, match="no picture"):
        labels.picture(tmp_path, name)


def test_a_changed_picture_is_refused(tmp_path):
    (key,) = ask(tmp_path, pairs(1))
    name = labels.questions(tmp_path)[key].pictures[0]
    plain(9, 9, 9).save(labels.picture(tmp_path, name))
    with pytest.raises(ImageError, match="changed since"):
        labels.picture(tmp_path, name)


# --- what is answered


def test_answers_stand_in_order_with_all_that_was_asked(tmp_path):
    keys = ask(tmp_path, [*pairs(2), Item("good", plain(7, 7, 7))])
    for key, answer in zip(keys, ("b", "skip", 4), strict=True):
        assert append(tmp_path, key, answer)
    found = labels.labels(tmp_path)
    assert [label.answer for label in found] == ["b", "skip", 4]
    asked = labels.questions(tmp_path)
    for label in found:
        question = asked[label.key]
        assert (label.prompt, label.pictures, label.left) == (question.prompt, question.pictures, question.left)
        time.strptime(label.time, "%Y-%m-%dT%H:%M:%SZ")
    a, b = asked[keys[0]].pictures
    assert [label.preference for label in found] == [(b, a), None, None]
    assert [label.score for label in found] == [None, None, 4]


def test_undo_is_a_line_and_the_answer_may_be_another(tmp_path):
    keys = ask(tmp_path, pairs(2))
    steps = [(0, "a"), (1, "b"), (0, "undo"), (0, "b"), (1, "undo")]
    assert all(append(tmp_path, keys[i], answer) for i, answer in steps)
    assert [(label.key, label.answer) for label in labels.labels(tmp_path)] == [(keys[0], "b")]
    assert [line["answer"] for line in lines(tmp_path)] == ["a", "b", "undo", "b", "undo"]


def test_what_is_sent_twice_is_kept_once(tmp_path):
    (key,) = ask(tmp_path, pairs(1))
    assert [append(tmp_path, key, answer) for answer in ("undo", "a", "a", "undo", "undo", "b")] == [
        False, True, False, True, False, True,
    ]  # fmt: skip
    assert [line["answer"] for line in lines(tmp_path)] == ["a", "undo", "b"]


def test_an_answer_against_another_is_refused(tmp_path):
    (key,) = ask(tmp_path, pairs(1))
    append(tmp_path, key, "a")
    with pytest.raises(labels.Refused, match="answered already, with 'a'"):
        append(tmp_path, key, "b")
    assert len(lines(tmp_path)) == 1


@pytest.mark.parametrize("answer", ["c", 1, "", None, True, "A", ["a"], {"a": 1}])
def test_a_pair_has_no_such_answer(tmp_path, answer):
    (key,) = ask(tmp_path, pairs(1))
    with pytest.raises(labels.Refused, match="expected one of a, b, skip, undo"):
        append(tmp_path, key, answer)
    assert labels.labels(tmp_path) == []


@pytest.mark.parametrize("answer", [0, 6, 3.0, "3", True, "a"])
def test_a_single_picture_has_no_such_score(tmp_path, answer):
    (key,) = ask(tmp_path, [Item("x", plain(1, 1, 1))])
    with pytest.raises(labels.Refused, match="expected one of 1, 2, 3, 4, 5, skip, undo"):
        append(tmp_path, key, answer)


def test_what_was_never_asked_is_not_answered(tmp_path):
    ask(tmp_path, pairs(1))
    for key in ("0" * 20, "../x"):
        with pytest.raises(labels.Refused, match="nothing was asked"):
            append(tmp_path, key, "a")


def test_answers_of_many_threads_and_processes_are_all_kept_once(tmp_path):
    """Four processes of two threads send the same forty answers."""
    keys = ask(tmp_path, pairs(40))
    context = multiprocessing.get_context("fork")
    crowd = [context.Process(target=_crowd, args=(tmp_path, keys, seed)) for seed in range(4)]
    [process.start() for process in crowd]
    [process.join() for process in crowd]
    assert [process.exitcode for process in crowd] == [0] * 4
    assert Counter(line["key"] for line in lines(tmp_path)) == Counter(keys)


def _crowd(run, keys, seed):
    def answer(seed):
        for key in random.Random(seed).sample(keys, len(keys)):
            append(run, key, "a")

    threads = [threading.Thread(target=answer, args=(10 * seed + i,)) for i in range(2)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]


def test_nobody_writes_between_another_writers_look_and_its_line(tmp_path, monkeypatch):
    (key,) = ask(tmp_path, pairs(1))
    standing = labels._standing
    monkeypatch.setattr(labels, "_standing", lambda records: time.sleep(0.1) or standing(records))
    threads = [threading.Thread(target=append, args=(tmp_path, key, "a")) for _ in range(4)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert len(lines(tmp_path)) == 1


# --- what goes wrong


@pytest.mark.parametrize("left", ['{"key": "0', '{"key": 1}', "\0\0\0\0", "ü"])
def test_half_a_line_is_passed_over_by_readers_and_cut_off_by_writers(tmp_path, capsys, left):
    keys = ask(tmp_path, pairs(3))
    append(tmp_path, keys[0], "a")
    with open(home(tmp_path) / "labels.jsonl", "a") as file:
        file.write(left)
    assert [label.key for label in labels.labels(tmp_path)] == keys[:1]
    assert capsys.readouterr().err == ""
    append(tmp_path, keys[1], "b")
    assert "labels.jsonl: half a line at its end" in capsys.readouterr().err
    append(tmp_path, keys[2], "b")
    assert capsys.readouterr().err == ""
    assert [line["key"] for line in lines(tmp_path)] == keys


@pytest.mark.parametrize(
    "bad", ["", "null", "[]", "{}", '{"key": "a"}', "\0\0", '{"key": "a", "prompt": "", "pictures": []}']
)
def test_a_damaged_line_is_named_and_nothing_is_guessed(tmp_path, bad):
    keys = ask(tmp_path, pairs(2))
    append(tmp_path, keys[0], "a")
    with open(home(tmp_path) / "labels.jsonl", "a") as file:
        file.write(bad + "\n")
    before = (home(tmp_path) / "labels.jsonl").read_bytes()
    for use in (lambda: labels.labels(tmp_path), lambda: append(tmp_path, keys[1], "a")):
        with pytest.raises(TrainingError, match="labels.jsonl, line 2: expected"):
            use()
    assert (home(tmp_path) / "labels.jsonl").read_bytes() == before


def test_a_full_disk_leaves_no_part_of_an_answer(tmp_path):
    """The file may not grow beyond so many bytes: an answer that does not fit leaves none of itself, and comes later."""
    keys = ask(tmp_path, pairs(3))
    append(tmp_path, keys[0], "a")
    path = home(tmp_path) / "labels.jsonl"
    whole = path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        for room in (0, 20):
            resource.setrlimit(resource.RLIMIT_FSIZE, (len(whole) + room, limits[1]))
            with pytest.raises(TrainingError, match="labels.jsonl: cannot be written"):
                append(tmp_path, keys[1], "b")
            assert path.read_bytes() == whole
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
    append(tmp_path, keys[1], "b")
    assert [line["key"] for line in lines(tmp_path)] == keys[:2]


def test_an_answer_is_on_the_disk_before_it_is_acknowledged(tmp_path, monkeypatch):
    """One write of one line, then fsync of that file; the first answer also syncs the folder that names the file."""
    keys = ask(tmp_path, pairs(2))
    calls = []
    write, fsync = os.write, os.fsync
    monkeypatch.setattr(
        os, "write", lambda f, data: calls.append(("write", _name(f), data.count(b"\n"))) or write(f, data)
    )
    monkeypatch.setattr(os, "fsync", lambda f: calls.append(("fsync", _name(f))) or fsync(f))
    append(tmp_path, keys[0], "a")
    assert calls == [("fsync", "rating"), ("write", "labels.jsonl", 1), ("fsync", "labels.jsonl")]
    calls.clear()
    append(tmp_path, keys[1], "a")
    assert calls == [("write", "labels.jsonl", 1), ("fsync", "labels.jsonl")]


def _name(handle: int) -> str:
    return os.path.basename(os.readlink(f"/proc/self/fd/{handle}"))


def test_killed_writers_lose_nothing_they_acknowledged(tmp_path):
    """A process answers and says so; killed within a write, at any moment of it, over and over, until all is answered.

    It goes on to the next answer only when told to, so that however fast the machine is, it is alive when the kill
    comes: a few answers in peace, and then one that the kill falls into, or just before, or just after. How long to wait
    for that is what the last one in peace took, more or less.
    """
    keys = ask(tmp_path, pairs(60))
    rng, said, kills = random.Random(0), [], 0
    context = multiprocessing.get_context("fork")
    while len(labels.labels(tmp_path)) < len(keys):
        (told, tell), (heard, say) = context.Pipe(duplex=False), context.Pipe(duplex=False)
        process = context.Process(target=_answer_when_told, args=(tmp_path, keys, told, say))
        process.start()
        say.close()
        left = len(keys) - len(labels.labels(tmp_path))
        for _ in range(min(rng.randrange(1, 5), left)):
            began = time.monotonic()
            tell.send("go on")
            said.append(heard.recv())
            took = time.monotonic() - began
        tell.send("go on")
        time.sleep(rng.random() * 2 * took)
        process.kill()
        process.join()
        kills += process.exitcode == -signal.SIGKILL
        while heard.poll():
            try:
                said.append(heard.recv())
            except EOFError:
                break
        standing = [label.key for label in labels.labels(tmp_path)]
        assert set(said) <= set(standing) and len(standing) == len(set(standing))
    assert kills >= 12 and Counter(line["key"] for line in lines(tmp_path)) == Counter(keys)


def _answer_when_told(run, keys, told, say):
    done = {label.key for label in labels.labels(run)}
    for key in keys:
        if key not in done:
            told.recv()
            if append(run, key, "a"):
                say.send(key)
    signal.pause()  # all is answered: until killed


# --- waiting


def test_wait_returns_when_all_are_answered_and_says_how_far_it_is(tmp_path, capsys):
    keys = ask(tmp_path, pairs(3))
    to_come = list(zip(reversed(keys), ("a", "skip", "b"), strict=True))

    def person() -> bool:  # answers once between two looks
        append(tmp_path, *to_come.pop(0))
        return False

    found = wait(tmp_path, keys, stop=person, seconds=0.01)
    assert list(found) == keys and [label.answer for label in found.values()] == ["b", "skip", "a"]
    err = capsys.readouterr().err
    assert f"sdcore rate {tmp_path}" in err and [f"{n}/3" in err for n in range(4)] == [True] * 4


def test_wait_for_what_is_answered_returns_at_once(tmp_path, capsys):
    keys = ask(tmp_path, pairs(2))
    [append(tmp_path, key, "a") for key in keys]
    assert list(wait(tmp_path, keys[:1], seconds=99)) == keys[:1]
    assert "sdcore rate" not in capsys.readouterr().err


def test_wait_ends_when_told_and_for_what_nobody_was_asked(tmp_path):
    keys = ask(tmp_path, pairs(2))
    append(tmp_path, keys[1], "a")
    with pytest.raises(TrainingError, match="stopped when 1 of 2 were rated"):
        wait(tmp_path, keys, stop=lambda: True, seconds=99)
    with pytest.raises(TrainingError, match="nothing was asked"):
        wait(tmp_path, ["0" * 20], seconds=99)


def test_ctrl_c_ends_waiting(tmp_path):
    context = multiprocessing.get_context("fork")
    receive, send = context.Pipe(duplex=False)
    process = context.Process(target=_wait_until_interrupted, args=(tmp_path, ask(tmp_path, pairs(1)), send))
    process.start()
    assert receive.poll(30) and receive.recv() == "waiting"
    os.kill(process.pid, signal.SIGINT)
    assert receive.poll(30) and receive.recv() == "clean"
    process.join(30)
    assert process.exitcode == 0


def _wait_until_interrupted(run, keys, send):
    signal.signal(signal.SIGINT, signal.default_int_handler)
    looks = []  # at the second look it has slept once
    try:
        wait(run, keys, stop=lambda: looks.append(0) or (len(looks) == 2 and send.send("waiting")), seconds=0.05)
    except KeyboardInterrupt:
        send.send("clean")
