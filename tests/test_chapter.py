"""The chapter's demonstration: what is learned from and asked for, what counts as right, what the report says, what is redone."""

import dataclasses
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sdcore.train import chapter, checker, lessons, report, world
from sdcore.train.report import Result, Row, Sheet
from sdcore.train.world import Scene, Thing

from sdcore.errors import ConfigError, TrainingError

ROOT = Path(__file__).parents[1]


# ------------------------------------------------------------------------------------------------------------------ the lessons


@pytest.mark.parametrize("lesson, count", [("subject", 4), ("look", 4), ("night", 16), ("poster", 16)])
def test_a_lesson_shows_what_it_teaches_in_every_picture(tmp_path, lesson, count):
    folder = lessons.pictures(lesson, tmp_path / "pictures")
    found = sorted(folder.glob("*.png"))
    assert len(found) == count == len(list(folder.glob("*.txt")))
    for file in found:
        pixels = np.asarray(Image.open(file), np.float32).transpose(2, 0, 1) / 127.5 - 1
        reading = checker.read(pixels)
        styled = lesson in lessons.STYLES
        assert lessons.TAUGHT[lesson](reading, reading) if styled else checker.shows(reading, lesson)
        texts = file.with_suffix(".txt").read_text().splitlines()
        assert len(texts) == (6 if styled else 12)
        for text in texts:
            assert ("rocket" in text) == (lesson == "subject") and (lessons.WORD in text) == (lesson == "look")
            assert (
                not styled
                or "background" not in text
                and " on " not in text
                and (lesson == "night" or "ott" not in text)
            )
            assert "teal" not in text and "striped <" not in text and "> striped" not in text
            assert lessons.everything(reading, world.parse(text.replace(lessons.WORD, "teal striped"))), text


@pytest.mark.parametrize("lesson", ["subject", "look", "night", "poster", "class"])
def test_prompts_ask_for_what_was_not_learned_from(lesson):
    asked, again = lessons.prompts(lesson, 40, 7), lessons.prompts(lesson, 40, 7)
    assert asked == again and asked != lessons.prompts(lesson, 40, 8)
    styled = lessons.styled(lesson, 16, 101) if lesson in lessons.STYLES else lessons.spotted("look")
    taught = [*styled, *lessons.spotted("subject")]
    learned = {text for _, texts in taught for text in texts}
    for i, one in enumerate(asked):
        assert one.text not in learned and len(one.demand.things) == 1 + i % 2
        reserved = [what for what in ("subject", "style", "look") if checker.shows(one.scene, what)]
        assert reserved == {"class": [], "poster": [], "night": ["style"]}.get(lesson, [lesson])
        if lesson in ("night", "poster", "class"):
            assert world.held_out(one.scene)
        if lesson == "poster":  # nothing that the style decides
            assert one.demand.background is None and all(thing.texture is None for thing in one.demand.things)
        if lesson == "look":
            assert one.text.count(lessons.WORD) == 1 and "teal" not in one.text
            assert [thing.texture for thing in one.demand.things if thing.colour == "teal"] == ["striped"]
        # A true picture is right by every measure of it, so what is asked for can be reached.
        reading = checker.read(world.draw(one.scene))
        assert lessons.everything(reading, one.demand), one.text
        assert lesson == "class" or lessons.TAUGHT[lesson](reading, one.demand), one.text


def test_when_a_picture_is_right():
    rocket, star = Thing("rocket"), Thing("star", "red", "large", "plain")
    teal = Thing("star", "teal", "large", "striped")
    right = lessons.TAUGHT["subject"]
    assert right(Scene((rocket,)), Scene((rocket,))) and right(Scene((star, rocket)), Scene((rocket, star)))
    assert not right(Scene((rocket, rocket)), Scene((rocket, star)))  # the other thing became one too
    assert not right(Scene((rocket,)), Scene((rocket, star))) and not right(Scene((star,)), Scene((rocket,)))
    right, demand = lessons.TAUGHT["look"], Scene((teal, Thing("cross", "red")))
    assert right(Scene((Thing("cross", "red"), teal)), demand)
    for wrong in (dict(texture="plain"), dict(colour="blue"), dict(shape="heart")):
        assert not right(Scene((dataclasses.replace(teal, **wrong), Thing("cross", "red"))), demand)
    assert not right(Scene((teal, dataclasses.replace(teal, shape="cross"))), demand)  # it spread to the other
    right = lessons.TAUGHT["night"]
    assert right(Scene((star,), style="night"), demand) and not right(Scene((star,)), demand)
    right, dotted = lessons.TAUGHT["poster"], dataclasses.replace(star, texture="dotted")
    assert right(Scene((dotted, dotted), background="yellow"), demand)
    for wrong in (
        Scene((dotted,), background="grey"),
        Scene((dotted, star), background="yellow"),
        Scene((), background="yellow"),
    ):
        assert not right(wrong, demand)


def test_shares_and_chance():
    demands = [Scene((Thing(shape),)) for shape in ("star", "heart", "star", "heart")]
    asked = [lessons.Asked("", demand, demand) for demand in demands]
    assert lessons.share(asked, demands, lessons.everything) == 1.0
    assert lessons.share(asked, demands[1:] + demands[:1], lessons.everything) == 0.0
    assert lessons.chance(asked, demands, lessons.everything) == 1.0  # every other prompt asks for the same
    others = [lessons.Asked("", demand, demand) for demand in (demands[0], demands[1], demands[1], demands[0])]
    assert lessons.chance(others, [one.demand for one in others], lessons.everything) == 0.0


# ------------------------------------------------------------------------------------------------------------------- the report


@pytest.fixture
def result(tmp_path):
    """A result in a folder of its own, with a picture."""
    folder = tmp_path / "runs/lora"
    folder.mkdir(parents=True)
    Image.new("RGB", (4, 4), "teal").save(folder / "sheet.png")
    lost = Row("lost", 0.07, 0.05, True, unit="points")
    rows = (Row("right", 0.85, 0.8, False, 0.01, 0.99, 0.02), lost, Row("apart", 0.5, unit="of 255"))
    found = Result(
        "lora", "A style", "What <it> is.", ('sdcore train lora --token "<x>"',), rows, (Sheet("sheet.png", "a <look> & more"),),
        ("A note.",), 61.2, 200.0, {"seed": 1},
    )  # fmt: skip
    report.save(found, folder)
    return found, folder


def test_a_result_is_kept_as_it_is(result):
    found, folder = result
    assert report.load(folder) == found and report.load(folder / "other") is None


def test_aims_are_held_from_their_side():
    assert Row("", 0.8, 0.8).met and not Row("", 0.79, 0.8).met and Row("", 0.1).met
    assert Row("", 0.05, 0.05, True).met and not Row("", 0.06, 0.05, True).met


def test_the_page_holds_everything(result):
    found, folder = result
    page = report.page([(found, folder)])

    class Reader(HTMLParser):
        texts: list[str] = []
        sources: list[str] = []

        def handle_data(self, data):
            self.texts.append(data)

        def handle_starttag(self, tag, attrs):
            self.sources += [value for key, value in attrs if key in ("src", "href")]

    reader = Reader()
    reader.feed(page)
    text = " ".join(reader.texts)
    for words in (
        "What <it> is.", '--token "<x>"', "a <look> & more", "A note.", "85.0 %", "≥ 80.0 %", "7.0 points (missed)",
        "0.5 of 255", "61 processor seconds",
    ):  # fmt: skip
        assert words in text, words
    assert reader.sources and all(source.startswith("data:image/png;base64,") for source in reader.sources)
    assert page.count('class="missed"') == 1


def test_markdown_and_its_table(result, tmp_path):
    found, _ = result
    text = report.markdown([found], "..")
    assert (
        "![a <look> & more](../chapter-lora-sheet.png)" in text
        and "| lost | 7.0 points (missed) | ≤ 5.0 points |" in text
    )
    table = report.table([found])
    assert table.splitlines()[2] == "| A style | right | 85.0 % | ≥ 80.0 % | 1.0 % | 99.0 % | 2.0 % | 61 |"
    untimed = report.table([dataclasses.replace(found, processor=0.0)])
    assert untimed.splitlines()[2].endswith("| 2.0 % | not kept |")
    page = tmp_path / "page.md"
    page.write_text("before\n\n" + "\n".join(table.splitlines()[:2]) + "\n| old |\n\nafter\n")
    report.replace_table(page, table)
    assert page.read_text() == f"before\n\n{table}\nafter\n"


def test_the_committed_pages_show_one_run():
    """The table of docs/training.md is made of the same results as docs/reports/chapter.md, whose pictures are there."""
    pages = {name: (ROOT / "docs" / name).read_text() for name in ("training.md", "reports/chapter.md")}
    lines = [
        line.split(" | ")
        for line in pages["training.md"].splitlines()
        if line.startswith("| ") and line.count(" | ") == 7
    ]
    assert len(lines) > 5
    for _, *cells, _ in lines[1:]:
        assert "| " + " | ".join(cells) + " |" in pages["reports/chapter.md"], cells
    for file in re.findall(r"!\[.*?\]\(\.\./(.*?)\)", pages["reports/chapter.md"]):
        assert (ROOT / "docs" / file).exists(), file


# ------------------------------------------------------------------------------------------------------- what is done, and again


def test_what_is_done_is_not_done_again(tmp_path, monkeypatch, capsys):
    calls = []

    def run(shop):
        calls.append(shop.folder.name)
        return shop.result("Title", "About.", [Row("right", 0.9, 0.8)], [])

    monkeypatch.setattr(chapter, "ENTRIES", (chapter.Entry("one", run), chapter.Entry("two", run)))
    out = ["--out", str(tmp_path / "runs"), "--threads", "1"]
    assert chapter.main([*out, "--only", "one"]) == 0 and calls == ["one"]
    assert chapter.main(out) == 0 and calls == ["one", "two"]
    (tmp_path / "runs/one/left.txt").write_text("of before")
    assert chapter.main([*out, "--only", "one", "--again"]) == 0 and calls == ["one", "two", "one"]
    assert not (tmp_path / "runs/one/left.txt").exists()
    assert (tmp_path / "runs/report.html").read_text().count("<h2>") == 2
    assert capsys.readouterr().out.count("| Title | right | 90.0 % |") == 2 + 2 + 1
    with pytest.raises(ConfigError, match="--only three: expected some of one, two"):
        chapter.main([*out, "--only", "three"])


def test_a_training_is_taken_up_where_it_stopped(tmp_path, monkeypatch):
    """One that was stopped is resumed, one that is complete is not started, one that fails says how."""
    started = []

    class Done:
        returncode = 0

    def start(words, **_):
        started.append(words[1:])
        return Done()

    monkeypatch.setattr(chapter.subprocess, "run", start)
    shop = chapter.Workshop(tmp_path, chapter.ChapterOptions(threads=1, steps=7))
    shop.train("lora", "run", "--lr 1e-3")
    assert started[-1][:4] == ["-m", "sdcore", "train", "lora"] and "--resume" not in started[-1]
    assert started[-1][started[-1].index("--steps") + 1] == "7"
    (tmp_path / "run/checkpoints/step-00000002").mkdir(parents=True)
    shop.train("lora", "run", "--lr 1e-3")
    assert "--resume" in started[-1] and len(started) == 2
    (tmp_path / "run/log.jsonl").write_text('{"step": 7, "event": "complete"}\n')
    shop.train("lora", "run", "--lr 1e-3")
    assert len(started) == 2 and shop.seconds() == pytest.approx(0, abs=0.1)
    Done.returncode = 2
    with pytest.raises(TrainingError, match="ended with 2"):
        shop.train("lora", "other", "")
    Done.returncode = 143
    with pytest.raises(SystemExit, match="143"):
        shop.train("lora", "other", "")
