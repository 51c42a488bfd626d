"""The rating page in a real browser: Debian's Chromium, driven by playwright. Skipped, saying so, where one is missing."""

import http.server
import json
import os
import random
import shutil
import signal
import threading
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from sdcore.train import dpo, labels, rate, world
from sdcore.train.labels import Item, Pair, ask, home

from sdcore.image import Picture, open_picture
from tests import serving

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed; pip install playwright")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no browser here; apt-get install chromium")
DESKTOP, PHONE = {"width": 1280, "height": 800}, {"width": 360, "height": 640}


@pytest.fixture(scope="module")
def browser():
    arguments = ["--host-resolver-rules=MAP evil.example 127.0.0.1"]
    arguments += ["--no-sandbox"] if os.geteuid() == 0 else []  # Chromium's own demand of root
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=arguments)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def asked(tmp_path_factory):
    """Forty pairs of the bundled model's world."""
    run = tmp_path_factory.mktemp("asked")
    rng = np.random.default_rng(0)
    scenes = [world.training_scene(rng) for _ in range(80)]
    levels = np.rint((world.draw_batch(scenes).transpose(0, 2, 3, 1) + 1) * 127.5).astype(np.uint8)
    pictures = [Picture(np.ascontiguousarray(picture)) for picture in levels]
    ask(run, [Pair(world.caption(scenes[i], full=True), pictures[i], pictures[i + 1]) for i in range(0, 80, 2)])
    return run


@pytest.fixture
def run(asked, tmp_path):
    return shutil.copytree(asked, tmp_path, dirs_exist_ok=True)


@pytest.fixture
def servers():
    """Starts servers, and ends those that are left."""
    started = []

    def start(run: Path):
        started.append(serving.start(run))
        return serving.address(run, started[-1]), started[-1]

    yield start
    for process in started:
        process.kill()
        process.join()


@pytest.fixture
def page_of(browser):
    """Opens the page in a window of its own; what the browser complains about is in `page.complaints`."""
    contexts = []

    def open_page(address: str, **options):
        contexts.append(browser.new_context(**{"viewport": DESKTOP} | options))
        page = contexts[-1].new_page()
        page.complaints = []
        page.on(
            "console", lambda said: page.complaints.append(said.text) if said.type in ("error", "warning") else None
        )
        page.on("pageerror", lambda error: page.complaints.append(str(error)))
        page.on("dialog", lambda dialog: dialog.accept())
        page.goto(address)
        return page

    yield open_page
    for context in contexts:
        context.close()


def eventually(true) -> None:
    """Wait until it is, for as long as the slowest machine may take."""
    end = time.monotonic() + 60
    while not true():
        assert time.monotonic() < end
        time.sleep(0.01)


def shown(page, beside=()) -> list[str]:
    """The hashes of the pictures on the page, left first, as soon as they are others than `beside`."""

    def now() -> list[str]:
        return page.evaluate("[...document.querySelectorAll('.picture img')].map(i => i.src.split('/').pop())")

    eventually(lambda: now() not in ([], list(beside)))
    return now()


def until(page, selector: str, text: str) -> None:
    playwright.expect(page.locator(selector)).to_contain_text(text, timeout=60_000)


def leaving_is_free(page) -> bool:
    """Whether the browser would let the person go without asking."""
    return page.evaluate("dispatchEvent(new Event('beforeunload', {cancelable: true}))")


def lines(run: Path) -> list[dict]:
    return [json.loads(line) for line in (home(run) / "labels.jsonl").read_text().splitlines()]


def warmer(run: Path, names) -> int:
    """The rule that is followed here: which of the pictures has more red than blue."""
    means = [open_picture(labels.picture(run, name)).pixels.mean((0, 1)) for name in names]
    return int(np.argmax([mean[0] - mean[2] for mean in means]))


def press(run: Path, page, pictures: list[str], right: bool = True) -> list[str]:
    """Press the arrow of the picture that the rule prefers (or of the other); return what is shown then."""
    left = warmer(run, pictures) == 0
    page.keyboard.press("ArrowLeft" if left == right else "ArrowRight")
    return shown(page, beside=pictures)


def settle(page, run: Path, answered: int) -> None:
    """Wait until so many answers are kept, and the page has the pictures of the next three pairs."""
    eventually(lambda: len(labels.labels(run)) == answered)
    kept = {label.key for label in labels.labels(run)}
    coming = [question for key, question in labels.questions(run).items() if key not in kept][:3]
    fetched = "performance.getEntriesByType('resource').filter(one => one.decodedBodySize).map(one => one.name.split('/').pop())"
    eventually(lambda: {name for question in coming for name in question.pictures} <= set(page.evaluate(fetched)))


# --- forty pairs


def rate_all(run: Path, servers, page_of, kills: set[int], slip: int):
    """Follow the rule by keyboard, all pairs, and return the last server's process.

    At each of `kills` the server dies at the very key; two more pairs are rated while it is down, then it starts again. At `slip`
    the wrong key is pressed, and taken back.
    """
    server, process = servers(run)
    page = page_of(server.address)
    pictures, down, count = shown(page), 0, len(labels.questions(run))
    for place in range(count):
        assert page.inner_text("#count") == f"{place} of {count}"
        if place == slip:
            pictures = press(run, page, pictures, right=False)
            page.keyboard.press("ArrowUp")
            pictures = shown(page, beside=pictures)
        if place in kills:  # once the server has caught up, so that the page has the next pictures at hand
            settle(page, run, place)
        page.keyboard.press("ArrowLeft" if warmer(run, pictures) == 0 else "ArrowRight")
        if place in kills:
            process.kill()
            process.join()
            down = 2
        elif down:
            down -= 1
            if not down:
                until(page, "#trouble", "The server does not answer. Start it again: sdcore rate")
                assert "kept here and sent when it is back" in page.inner_text("#trouble")
                again, process = servers(run)
                assert again.address == server.address
                eventually(lambda: page.inner_text("#trouble") == "")
        if place < count - 1:
            pictures = shown(page, beside=pictures)
    until(page, "#pictures", f"All {count} are rated, and kept.")
    standing = labels.labels(run)
    assert Counter(label.key for label in standing) == Counter(labels.questions(run).keys())
    for label in standing:
        assert label.answer == "ab"[warmer(run, label.pictures)]
    kept = [line["answer"] for line in lines(run)]
    assert len(kept) == count + 2 and kept.count("undo") == 1  # the slip, and that it was taken back
    return process


def test_forty_pairs_by_keyboard_while_the_server_is_killed(run, servers, page_of):
    """Killed at three random pairs: of what was pressed none is lost, none is double."""
    rng = random.Random(0)
    process = rate_all(
        run, servers, page_of, {rng.randrange(3, 12), rng.randrange(12, 24), rng.randrange(24, 36)}, slip=5
    )
    assert {label.left for label in labels.labels(run)} == {"a", "b"}
    os.kill(process.pid, signal.SIGINT)
    process.join(30)
    assert process.exitcode == 0 and "40 of 40 rated" in (run / "err.txt").read_text()


@pytest.mark.check
def test_a_model_learns_what_was_preferred(tmp_path, servers, page_of):
    """Forty pairs that the bundled model drew, rated in the browser; then DPO, judged on sixty pairs that nobody rated."""
    things = [f"{size} {shape}" for shape in world.SHAPES for size in ("a", "a small", "a large")]
    (tmp_path / "prompts.txt").write_text("\n".join(things))
    run, held = tmp_path / "run", tmp_path / "held"
    for folder, count, seed in ((run, 40, 0), (held, 60, 1000)):
        words = serving.options(folder, pairs=count, seed=seed, steps=10, prompts=str(tmp_path / "prompts.txt"))
        rate.draw(folder, words)
    rate_all(run, servers, page_of, {20}, slip=30)
    rows = [
        {"prompt": question.prompt} | {
            role: f"rating/pictures/{question.pictures[place]}.png"
            for role, place in (("winner", warmer(held, question.pictures)), ("loser", 1 - warmer(held, question.pictures)))
        }
        for question in labels.questions(held).values()
    ]  # fmt: skip
    (held / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = f"--labels {run} --validation {held} --model tiny --resolution 64 --guidance 3 --device cpu --threads 1 "
    words += f"--batch 16 --steps 40 --lr 1e-3 --warmup 10 --beta 100 --eval-every 20 --cache {tmp_path}/cache --out {run}/dpo"
    assert dpo.main(words.split()) == 0
    log = [json.loads(line) for line in (run / "dpo" / "log.jsonl").read_text().splitlines()]
    prefers = [line["prefers"] for line in log if line.get("event") == "evaluated"]
    print(f"prefers what the rule prefers, of 60 held-out pairs, by steps of 20: {prefers}")
    assert prefers[-1] >= 0.65


def test_who_leaves_finds_everything_as_it_was(run, servers, page_of):
    server, process = servers(run)
    page = page_of(server.address)
    first = shown(page)
    second = press(run, page, first)
    until(page, "#count", "1 of 40")
    page.reload()
    assert shown(page) == second and page.inner_text("#count") == "1 of 40"
    other = page_of(server.address)  # from another window too
    assert shown(other) == second
    eventually(lambda: leaving_is_free(page))
    process.kill()
    process.join()
    third = press(run, page, second)  # not acknowledged by anybody
    assert not leaving_is_free(page)
    servers(run)
    page.reload()  # before it was sent, perhaps
    assert shown(page) == third
    until(page, "#count", "2 of 40")
    eventually(lambda: len(lines(run)) >= 2)
    assert len(lines(run)) == len(labels.labels(run)) == 2
    page.keyboard.press("u")  # what was rated before the page was opened can be taken back, too
    assert shown(page, beside=third) == second
    page.keyboard.press("Backspace")
    assert shown(page, beside=second) == first
    until(page, "#count", "0 of 40")
    assert page.is_disabled("#undo")


def test_two_windows_do_not_overrule_each_other(run, servers, page_of):
    server, _ = servers(run)
    one, other = page_of(server.address), page_of(server.address)
    first = shown(one)
    assert shown(other) == first
    second = press(run, one, first)
    until(one, "#count", "1 of 40")
    press(run, other, first, right=False)  # the second window does not know yet
    until(other, "#trouble", "is answered already")
    assert shown(other) == second and other.inner_text("#count") == "1 of 40"
    assert [label.answer for label in labels.labels(run)] == ["ab"[warmer(run, labels.labels(run)[0].pictures)]]
    press(run, other, second)
    eventually(lambda: other.inner_text("#trouble") == "")  # said until the next answer
    eventually(lambda: len(labels.labels(run)) == 2)


def test_an_answer_is_taken_back_while_the_server_is_away(run, servers, page_of):
    server, process = servers(run)
    page = page_of(server.address)
    first = shown(page)
    second = press(run, page, first)
    eventually(lambda: leaving_is_free(page))
    process.kill()
    process.join()
    page.keyboard.press("u")
    assert shown(page, beside=second) == first and page.inner_text("#count") == "0 of 40"
    press(run, page, first, right=False)
    servers(run)
    eventually(lambda: leaving_is_free(page))
    (label,) = labels.labels(run)
    assert label.answer == "ba"[warmer(run, label.pictures)]


def test_an_answer_goes_out_at_once_and_others_are_heard_of_within_ten_seconds(run, servers, page_of):
    """The page's clock stands still, but for these ten seconds."""
    server, _ = servers(run)
    page = page_of("about:blank")
    page.clock.install(time=0)
    page.clock.pause_at(1)
    page.goto(server.address)
    press(run, page, shown(page))
    eventually(lambda: len(labels.labels(run)) == 1)
    labels.append(run, list(labels.questions(run))[1], "skip")  # as another window does
    eventually(lambda: leaving_is_free(page))
    assert page.inner_text("#count") == "1 of 40"
    page.clock.fast_forward(10_000)
    until(page, "#count", "2 of 40")


def test_nobody_judges_what_is_not_to_be_seen(run, servers, page_of):
    """A picture that cannot be had is asked for again and again; until it is there the keys that judge do nothing."""
    name = list(labels.questions(run).values())[1].pictures[1]
    away = (home(run) / "pictures" / f"{name}.png").rename(run / "away.png")
    server, _ = servers(run)
    page = page_of(server.address)
    shown(page)
    page.keyboard.press("ArrowLeft")
    until(page, "#pictures", "Loading")
    for key in ("ArrowLeft", "ArrowRight", "1", "2"):
        page.keyboard.press(key)
    away.rename(home(run) / "pictures" / f"{name}.png")
    assert name in shown(page) and page.inner_text("#count") == "1 of 40"


def test_a_disk_that_is_full_is_said_and_the_answer_sent_again(run, servers, page_of):
    server, _ = servers(run)
    page = page_of(server.address)
    page.route("**/answer", lambda route: route.fulfill(status=503, body="no space left"), times=1)
    press(run, page, shown(page))
    until(page, "#trouble", "The server says: no space left. 1 answer is kept here and sent when it is back.")
    eventually(lambda: page.inner_text("#trouble") == "" and len(labels.labels(run)) == 1)


# --- mouse, touch, keys


def test_mouse_skip_and_a_double_click(run, servers, page_of):
    server, _ = servers(run)
    page = page_of(server.address)
    asked = list(labels.questions(run).values())
    pictures = shown(page)
    page.get_by_role("button", name="second picture is better").click()
    pictures = shown(page, beside=pictures)
    page.locator(".picture").first.dblclick()
    pictures = shown(page, beside=pictures)
    page.get_by_role("button", name="Skip").click()
    pictures = shown(page, beside=pictures)
    page.keyboard.press("s")
    pictures = shown(page, beside=pictures)
    until(page, "#count", "4 of 40")
    page.get_by_role("button", name="Undo").click()
    shown(page, beside=pictures)
    until(page, "#count", "3 of 40")
    other = {"a": "b", "b": "a"}
    found = [label.answer for label in labels.labels(run)]
    assert found == [other[asked[0].left], asked[1].left, "skip"]
    assert page.complaints == [] and page.is_hidden("#scores")
    eventually(lambda: leaving_is_free(page))
    labels.append(run, asked[3].key, "a")  # what was taken back here, somebody else answers
    page.reload()  # what has arrived is not sent again: it would take that back, too
    until(page, "#count", "4 of 40")
    assert len(labels.labels(run)) == 4


def test_a_key_held_down_answers_once_and_other_keys_nothing(run, servers, page_of):
    server, _ = servers(run)
    page = page_of(server.address)
    pictures = shown(page)
    for key in ("u", "3", "x", "Control+ArrowLeft", "Alt+ArrowLeft", "Meta+ArrowRight", "Escape", "Shift"):
        page.keyboard.press(key)
    assert shown(page) == pictures
    for _ in range(5):
        page.keyboard.down("ArrowLeft")
    page.keyboard.up("ArrowLeft")
    pictures = shown(page, beside=pictures)
    until(page, "#count", "1 of 40")
    page.keyboard.press("2")
    pictures = shown(page, beside=pictures)
    page.keyboard.press("S")
    shown(page, beside=pictures)
    eventually(lambda: len(labels.labels(run)) == 3)
    asked = list(labels.questions(run).values())
    assert [label.answer for label in labels.labels(run)] == [
        asked[0].left,
        {"a": "b", "b": "a"}[asked[1].left],
        "skip",
    ]


def test_with_the_tab_key_alone(run, servers, page_of):
    server, _ = servers(run)
    page = page_of(server.address)
    pictures = shown(page)
    names = []
    for _ in range(3):
        page.keyboard.press("Tab")
        names.append(page.evaluate("document.activeElement.getAttribute('aria-label') || document.activeElement.id"))
    assert names == ["first picture is better", "second picture is better", "skip"]  # (there is nothing to undo)
    page.keyboard.press("Shift+Tab")
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    page.keyboard.press("Enter")
    pictures = shown(page, beside=pictures)
    assert page.evaluate("document.activeElement.getAttribute('aria-label')") == names[1]  # it stays where it was
    page.keyboard.press("Space")
    shown(page, beside=pictures)
    until(page, "#count", "2 of 40")
    assert [label.answer for label in labels.labels(run)] == [
        {"a": "b", "b": "a"}[question.left] for question in list(labels.questions(run).values())[:2]
    ]


def test_single_pictures_are_scored(tmp_path, servers, page_of):
    server, process = servers(tmp_path)
    page = page_of(server.address)
    until(page, "#pictures", "Nothing to rate yet.")
    ask(tmp_path, [Item(f'<i>{i}</i> & "{i}"', Picture(np.full((64, 96, 3), 40 * i, np.uint8))) for i in range(4)])
    pictures = shown(page)
    assert page.locator("button.picture").count() == 0  # there is nothing to choose from
    assert page.inner_text("#prompt") == '<i>0</i> & "0"'  # a prompt is text, whatever it looks like
    for key in ("4", "ArrowLeft"):  # there is no left one
        page.keyboard.press(key)
    pictures = shown(page, beside=pictures)
    page.get_by_role("button", name="score 1 of 5").click()
    pictures = shown(page, beside=pictures)
    page.keyboard.press("ArrowDown")
    pictures = shown(page, beside=pictures)
    eventually(lambda: len(labels.labels(tmp_path)) == 3)
    assert page.complaints == []
    process.kill()
    process.join()
    page.keyboard.press("5")
    until(page, "#pictures", "Sending the last answers")
    servers(tmp_path)
    until(page, "#pictures", "All 4 are rated")
    assert [label.answer for label in labels.labels(tmp_path)] == [4, 1, "skip", 5]
    assert page.is_disabled("#skip") and page.is_hidden("#scores")
    ask(tmp_path, [Item("more", Picture(np.full((300, 64, 3), 7, np.uint8)))])  # as a run does, meanwhile
    until(page, "#prompt", "more")
    until(page, "#count", "4 of 5")
    shown(page, beside=pictures)
    assert page.evaluate(RENDERING) != "pixelated"


# --- how it looks

RENDERING = "getComputedStyle(document.querySelector('.picture img')).imageRendering"


@pytest.mark.parametrize("size", [PHONE, DESKTOP, {"width": 640, "height": 360}], ids=lambda size: f"{size['width']}")
def test_all_fits_on_one_screen(run, servers, page_of, size):
    server, _ = servers(run)
    page = page_of(server.address, viewport=size, has_touch=size == PHONE, is_mobile=size == PHONE)
    shown(page)
    assert page.evaluate(RENDERING) == "pixelated" and page.is_hidden("#scores")
    whole = page.evaluate("[document.documentElement.scrollWidth, document.documentElement.scrollHeight]")
    assert whole[0] <= size["width"] and whole[1] <= size["height"]
    boxes = [box.bounding_box() for box in page.locator("button:visible").all()]
    assert len(boxes) == 4
    for box in boxes:
        assert box["x"] >= 0 and box["y"] >= 0 and box["width"] >= 44 and box["height"] >= 44  # a fingertip
        assert box["x"] + box["width"] <= size["width"] and box["y"] + box["height"] <= size["height"]
    first, second = (page.locator(".picture img").nth(i).bounding_box() for i in range(2))
    assert min(first["width"], first["height"], second["width"], second["height"]) >= 0.3 * min(size.values())
    if size == PHONE:
        pictures = shown(page)
        page.locator(".picture").nth(1).tap()
        shown(page, beside=pictures)
        until(page, "#count", "1 of 40")


def test_dark_and_light_and_without_motion(run, servers, page_of):
    server, _ = servers(run)
    look = "[getComputedStyle(document.body).backgroundColor, getComputedStyle(document.querySelector('img')).animationName]"
    found = []
    for scheme, motion in (("light", "no-preference"), ("dark", "reduce")):
        page = page_of(server.address, color_scheme=scheme, reduced_motion=motion)
        shown(page)
        found.append(page.evaluate(look))
    light, dark = (sum(int(n) for n in colour[4:-1].split(",")) for colour, _ in found)
    assert light > 600 > 150 > dark and [name for _, name in found] == ["appear", "none"]


def test_what_is_said_to_those_who_do_not_see(run, servers, page_of):
    server, _ = servers(run)
    page = page_of(server.address)
    press(run, page, shown(page))
    prompt = list(labels.questions(run).values())[1].prompt
    until(page, "[role=status]", f"Pair 2 of 40: {prompt}")
    bar = page.get_by_role("progressbar", name="rated so far")
    assert bar.get_attribute("value") == "1" and bar.get_attribute("max") == "40"
    assert [image.get_attribute("alt") for image in page.locator("main img").all()] == [
        "first picture",
        "second picture",
    ]
    keys = [card.get_attribute("aria-keyshortcuts") for card in page.locator(".picture").all()]
    assert keys == ["ArrowLeft 1", "ArrowRight 2"]
    assert page.get_by_role("heading", level=1).inner_text() == "Which one is better?"
    assert page.get_attribute("html", "lang") == "en"


# --- other pages


def test_other_pages_neither_read_nor_answer(run, page_of, monkeypatch):
    """A page of another origin that even knows the address: whatever gets through the browser is refused by the server."""
    seen = []
    reply = rate.Handler.send_response
    monkeypatch.setattr(
        rate.Handler, "send_response", lambda self, *a: seen.append((self.command, int(a[0]))) or reply(self, *a)
    )
    key = next(iter(labels.questions(run)))
    with rate.opened(run, None) as server, http.server.ThreadingHTTPServer(("127.0.0.1", 0), Attacker) as attacker:
        for one in (server, attacker):
            threading.Thread(target=one.serve_forever, daemon=True).start()
        attacker.page = ATTACK % {"it": server.address, "key": key, "picture": labels.questions(run)[key].pictures[0]}
        page = page_of(f"http://127.0.0.1:{attacker.server_port}/")
        page.wait_for_function("document.title", timeout=60_000)
        eventually(lambda: seen.count(("POST", 403)) >= 5)  # three by fetch, a beacon, a form
        eventually(lambda: seen.count(("GET", 403)) >= 2)  # the state and a picture
        page.wait_for_function("document.images[0].complete", timeout=60_000)
        assert page.title() == "no no no no no" and page.evaluate("document.images[0].naturalWidth") == 0
        server.shutdown()
        attacker.shutdown()
    assert seen.count(("POST", 403)) == 5 and seen.count(("GET", 403)) == 2
    assert {status for _, status in seen} <= {403, 501}  # 501: the browser asks leave by OPTIONS
    assert labels.labels(run) == []


ATTACK = """<!doctype html><img src="%(it)spictures/%(picture)s"><script>
    const body = JSON.stringify({key: "%(key)s", answer: "a"});
    const attempt = (options) => fetch("%(it)sanswer", {method: "POST", body, ...options});
    const plain = {"Content-Type": "text/plain"}, json = {"Content-Type": "application/json"};
    const tried = [attempt({}), attempt({mode: "no-cors"}), attempt({headers: json}), attempt({mode: "no-cors", headers: plain}),
        fetch("%(it)sstate")];
    navigator.sendBeacon("%(it)sanswer", body);
    const [form, frame, field] = ["form", "iframe", "input"].map((name) => document.createElement(name));
    Object.assign(frame, {name: "frame"});
    Object.assign(form, {target: "frame", method: "post", action: "%(it)sanswer", enctype: "text/plain"});
    Object.assign(field, {name: body.slice(0, -1) + ', "x": "', value: '"}'});
    form.append(field);
    document.documentElement.append(frame, form);
    form.submit();
    Promise.allSettled(tried).then((all) => { document.title = all.map((one) => one.value ? "read" : "no").join(" "); });
</script>"""


class Attacker(http.server.BaseHTTPRequestHandler):
    """Serves its server's `page`."""

    def do_GET(self):
        self.send_response(200)
        self.send_header("Content-Type", "text/html")
        self.end_headers()
        self.wfile.write(self.server.page.encode())

    def log_message(self, *_):
        pass


def test_a_name_that_points_here_is_refused(run, servers, page_of):
    """DNS rebinding: to the browser evil.example is this machine, and its pages are of one origin with the server's."""
    server, _ = servers(run)
    page = page_of(server.address.replace("127.0.0.1", "evil.example"))
    assert "this server is no other's" in page.inner_text("body")
    status = page.evaluate("fetch('state').then((reply) => reply.status)")
    assert status == 421


def test_a_wrong_token_is_told_where_to_look(run, servers, page_of):
    server, _ = servers(run)
    page = page_of(server.address.replace(server.token, "x" * 32))
    assert "not the address that the server printed" in page.inner_text("body")
