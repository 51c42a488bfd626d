"""The server of the rating page: who is served, what is kept, and what happens when it dies. No browser here."""

import http.client
import json
import os
import shutil
import signal
import socket
import stat
import threading

import numpy as np
import pytest
from sdcore.train import labels, rate
from sdcore.train.labels import Item, Pair, ask, home

from sdcore.errors import ConfigError, ImageError, TrainingError
from sdcore.image import Picture
from tests import serving


def plain(*colour: int) -> Picture:
    return Picture(np.full((16, 16, 3), colour, np.uint8))


@pytest.fixture(scope="module")
def asked(tmp_path_factory):
    """A run in which five pairs and a picture wait to be rated."""
    run = tmp_path_factory.mktemp("asked")
    ask(run, [Pair(f"prompt {i}", plain(i, 0, 0), plain(i, 255, 0)) for i in range(5)])
    ask(run, [Item("<b>one</b>", plain(9, 9, 9))])
    return run


@pytest.fixture
def run(asked, tmp_path):
    """The same for a single test."""
    return shutil.copytree(asked, tmp_path, dirs_exist_ok=True)


@pytest.fixture
def server(run):
    with rate.opened(run, None) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        yield server
        server.shutdown()


def request(server, method="GET", path="state", body=None, headers=(), token=None):
    """(status, headers, body) of a request as the page would make it, but for what is given."""
    sent = {"Host": f"127.0.0.1:{server.server_port}"}
    if method == "POST":
        sent |= {"Origin": f"http://127.0.0.1:{server.server_port}", "Sec-Fetch-Site": "same-origin"}
        sent |= {"Content-Type": "application/json"}
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=20)
    data = json.dumps(body) if isinstance(body, dict) else body
    path = path if path.startswith("//") else f"/{server.token if token is None else token}/{path}"
    headers = {name: value for name, value in (sent | dict(headers)).items() if value is not None}
    connection.putrequest(method, path, skip_host=True, skip_accept_encoding=True)
    if data is not None and "Content-Length" not in headers and "Transfer-Encoding" not in headers:
        headers["Content-Length"] = str(len(data))
    for name, value in headers.items():
        connection.putheader(name, value)
    connection.endheaders(data.encode() if data else None)
    reply = connection.getresponse()
    found = reply.status, reply.headers, reply.read()
    connection.close()
    return found


def key_of(server, place=0) -> str:
    return list(labels.questions(server.run))[place]


# --- what is served


def test_the_page_and_its_files(server):
    for path, kind, part in (
        ("", "text/html; charset=utf-8", b"<!doctype html>"), ("page.js", "text/javascript; charset=utf-8", b"outbox"),
        ("page.css", "text/css; charset=utf-8", b"color-scheme"), ("icon.svg", "image/svg+xml", b"<svg"),
    ):  # fmt: skip
        status, headers, body = request(server, path=path)
        assert (status, headers["Content-Type"]) == (200, kind) and part in body
        assert headers["Cache-Control"] == "no-store" and headers["Server"].strip() == "sdcore"


def test_everything_is_served_with_a_strict_policy(server):
    """Refusals too. Nothing may be loaded from elsewhere, nothing inline is run, nobody frames the page."""
    for path, token in (("", None), ("state", None), ("nothing", None), ("", "wrong")):
        headers = request(server, path=path, token=token)[1]
        policy = dict(part.strip().split(" ", 1) for part in headers["Content-Security-Policy"].split(";"))
        assert policy.pop("default-src") == policy.pop("frame-ancestors") == "'none'"
        assert set(policy.values()) == {"'self'", "'none'"}
        assert headers["X-Content-Type-Options"] == "nosniff" and headers["Referrer-Policy"] == "no-referrer"
        assert headers["Cross-Origin-Resource-Policy"] == "same-origin"


def test_the_page_names_nothing_outside(server):
    for path in ("", "page.js", "page.css"):
        text = request(server, path=path)[2].decode()
        assert "//" not in "".join(line.split("// ")[0] for line in text.splitlines() if not line.startswith("//"))
        assert "style=" not in text and "innerHTML" not in text and "eval(" not in text


def test_the_state_says_what_comes_next_with_the_left_picture_first(server):
    status, headers, body = request(server)
    found = json.loads(body)
    assert status == 200 and headers["Content-Type"] == "application/json"
    assert (found["asked"], found["rated"], found["recent"]) == (6, 0, [])
    asked = labels.questions(server.run)
    assert [question["key"] for question in found["next"]] == list(asked)
    sides = set()
    for shown in found["next"][:5]:
        question = asked[shown["key"]]
        assert shown["answers"][0] == question.left and sorted(shown["answers"]) == ["a", "b"]
        assert [question.pictures["ab".index(answer)] for answer in shown["answers"]] == shown["pictures"]
        sides.add(question.left)
    assert sides == {"a", "b"}
    assert found["next"][5]["answers"] == [1, 2, 3, 4, 5] and found["next"][5]["prompt"] == "<b>one</b>"


def test_a_picture_is_had_by_its_hash(server):
    name = labels.questions(server.run)[key_of(server)].pictures[0]
    status, headers, body = request(server, path=f"pictures/{name}")
    assert (status, headers["Content-Type"]) == (200, "image/png")
    assert (
        body == (home(server.run) / "pictures" / f"{name}.png").read_bytes() and "immutable" in headers["Cache-Control"]
    )


def test_an_answer_is_kept_and_the_state_after_it_returned(server):
    key = key_of(server, 1)
    status, _, body = request(server, "POST", "answer", {"key": key, "answer": "b"})
    found = json.loads(body)
    assert status == 200 and found["rated"] == 1 and [question["key"] for question in found["recent"]] == [key]
    assert key not in [question["key"] for question in found["next"]]
    assert [(label.key, label.answer) for label in labels.labels(server.run)] == [(key, "b")]
    assert json.loads(request(server, "POST", "answer", {"key": key, "answer": "undo"})[2])["rated"] == 0
    assert labels.labels(server.run) == []


def test_an_answer_sent_again_is_acknowledged_and_kept_once(server):
    body = {"key": key_of(server), "answer": "a"}
    first, second = request(server, "POST", "answer", body), request(server, "POST", "answer", body)
    assert first[0] == second[0] == 200 and first[2] == second[2]
    assert len((home(server.run) / "labels.jsonl").read_text().splitlines()) == 1


def test_one_connection_carries_many_requests(server):
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=20)
    headers = {"Content-Type": "application/json"}
    for place in range(5):
        body = json.dumps({"key": key_of(server, place), "answer": "skip"})
        connection.request("POST", f"/{server.token}/answer", body, headers)
        assert json.loads(connection.getresponse().read())["rated"] == place + 1
        assert connection.sock is not None  # not closed by the server


# --- what is refused


@pytest.mark.parametrize("host", [
    "evil.example", "evil.example:{port}", "127.0.0.1", "127.0.0.1:1", "127.0.0.1:{port}.evil.example", "localhost.:{port}",
    "0.0.0.0:{port}", "[::1]:{port}", "127.0.0.1:{port}:{port}", "user@127.0.0.1:{port}", "127.1:{port}", "", None,
])  # fmt: skip
def test_a_foreign_host_is_refused(server, host):
    """A name that somebody lets point to 127.0.0.1 (DNS rebinding) gets neither the page nor an answer kept."""
    headers = {"Host": host and host.format(port=server.server_port), "Origin": None}
    for method, path, body in (("GET", "", None), ("POST", "answer", {"key": key_of(server), "answer": "a"})):
        assert request(server, method, path, body, headers)[0] == 421
    assert labels.labels(server.run) == []


def test_two_hosts_in_one_request_are_refused(server):
    with socket.create_connection(("127.0.0.1", server.server_port), 20) as raw:
        host = f"127.0.0.1:{server.server_port}"
        raw.sendall(f"GET /{server.token}/ HTTP/1.1\r\nHost: {host}\r\nHost: evil.example\r\n\r\n".encode())
        assert b" 421 " in raw.recv(100)


def test_localhost_is_this_server_too(server):
    host = f"localhost:{server.server_port}"
    assert request(server, headers={"Host": host})[0] == 200
    body = {"key": key_of(server), "answer": "a"}
    assert request(server, "POST", "answer", body, {"Host": host, "Origin": f"http://{host}"})[0] == 200


def test_only_loopback_listens(server):
    assert server.server_address[0] == "127.0.0.1"
    with socket.socket(
        socket.AF_INET, socket.SOCK_DGRAM
    ) as probe:  # (sends nothing: it asks for this machine's own address)
        try:
            probe.connect(("192.0.2.1", 9))
        except OSError:
            pytest.skip("no network but loopback here")
        own = probe.getsockname()[0]
    with pytest.raises(OSError):
        socket.create_connection((own, server.server_port), 2)


@pytest.mark.parametrize("change", [
    lambda token: "", lambda token: token[:-1], lambda token: token + "x", lambda token: token.swapcase(), lambda token: "state",
    lambda token: token[:-1] + "%" + format(ord(token[-1]), "x"), lambda token: "é" * 32, lambda token: "x/" + token,
])  # fmt: skip
def test_without_the_token_nothing_is_served(server, change):
    token = change(server.token)
    path = "/" + "".join(c if ord(c) < 128 else "%E9" for c in token)
    for method, rest, body in (
        ("GET", "", None), ("GET", "state", None), ("GET", "page.js", None),
        ("GET", f"pictures/{labels.questions(server.run)[key_of(server)].pictures[0]}", None),
        ("POST", "answer", {"key": key_of(server), "answer": "a"}),
    ):  # fmt: skip
        status, _, sent = request(server, method, rest, body, token=path.removeprefix("/"))
        assert status == 403 and server.token.encode() not in sent
    assert labels.labels(server.run) == []


def test_the_token_is_compared_in_constant_time(server, monkeypatch):
    seen = []
    monkeypatch.setattr(rate.hmac, "compare_digest", lambda a, b: seen.append((a, b)) or a == b)
    assert request(server, token="guess")[0] == 403 and seen == [(b"guess", server.token.encode())]
    assert len(server.token) >= 32


@pytest.mark.parametrize("headers", [
    {"Origin": "http://evil.example"}, {"Origin": "null"}, {"Origin": "https://127.0.0.1:{port}"}, {"Origin": "http://127.0.0.1"},
    {"Origin": "http://localhost:{port}"}, {"Origin": "http://127.0.0.1:1"}, {"Sec-Fetch-Site": "cross-site"},
    {"Sec-Fetch-Site": "same-site"}, {"Sec-Fetch-Site": "none"},
])  # fmt: skip
def test_a_post_of_another_page_is_refused(server, headers):
    headers = {name: value.format(port=server.server_port) for name, value in headers.items()}
    assert request(server, "POST", "answer", {"key": key_of(server), "answer": "a"}, headers)[0] == 403
    assert labels.labels(server.run) == []


def test_a_post_of_a_program_with_the_token_needs_neither(server):
    headers = {"Origin": None, "Sec-Fetch-Site": None}
    assert request(server, "POST", "answer", {"key": key_of(server), "answer": "a"}, headers)[0] == 200


@pytest.mark.parametrize("site", ["cross-site", "same-site"])
def test_another_page_reads_neither_state_nor_pictures(server, site):
    name = labels.questions(server.run)[key_of(server)].pictures[0]
    for path in ("state", f"pictures/{name}"):
        assert request(server, path=path, headers={"Sec-Fetch-Site": site})[0] == 403
    assert request(server, path="", headers={"Sec-Fetch-Site": site})[0] == 200  # a link to the page may be followed


@pytest.mark.parametrize("kind", [
    None, "", "text/plain", "application/x-www-form-urlencoded", "multipart/form-data", "text/json", "application/jsonx",
])  # fmt: skip
def test_what_a_form_can_send_is_refused(server, kind):
    assert request(server, "POST", "answer", {"key": key_of(server), "answer": "a"}, {"Content-Type": kind})[0] == 415
    assert labels.labels(server.run) == []


@pytest.mark.parametrize("body", [
    "", "null", "[]", "3", '"x"', "{", "{}", '{"key": "KEY"}', '{"answer": "a"}', '{"key": 1, "answer": "a"}', "\0", "[" * 999,
    '{"key": ["KEY"], "answer": "a"}', '{"key": "KEY", "answer": "a", "more": 1}', '{"key": null, "answer": "a"}',
])  # fmt: skip
def test_a_body_that_is_no_answer_is_refused(server, body):
    assert request(server, "POST", "answer", body.replace("KEY", key_of(server)))[0] == 400
    assert labels.labels(server.run) == []


@pytest.mark.parametrize("sent", [
    {"key": "KEY", "answer": "c"}, {"key": "KEY", "answer": 1}, {"key": "KEY", "answer": None}, {"key": "KEY", "answer": {}},
    {"key": "0" * 20, "answer": "a"}, {"key": "../labels", "answer": "a"}, {"key": "KEY", "answer": True},
])  # fmt: skip
def test_an_answer_that_is_none_is_refused_with_its_reason(server, sent):
    status, headers, body = request(
        server, "POST", "answer", sent | {"key": sent["key"].replace("KEY", key_of(server))}
    )
    assert status == 409 and body and headers["Content-Type"].startswith("text/plain")
    assert labels.labels(server.run) == []


def test_an_answer_against_one_that_stands_is_refused(server):
    key = key_of(server)
    request(server, "POST", "answer", {"key": key, "answer": "a"})
    status, _, body = request(server, "POST", "answer", {"key": key, "answer": "b"})
    assert status == 409 and b"answered already" in body
    assert [label.answer for label in labels.labels(server.run)] == ["a"]


@pytest.mark.parametrize("headers, status", [
    ({"Content-Length": None, "Transfer-Encoding": "chunked"}, 411), ({"Content-Length": "-1"}, 411),
    ({"Content-Length": "1e3"}, 411), ({"Content-Length": "²"}, 411), ({"Content-Length": "1001"}, 413),
    ({"Content-Length": "9" * 30}, 413), ({"Content-Length": "2", "Transfer-Encoding": "chunked"}, 411),
])  # fmt: skip
def test_a_body_without_a_sound_length_is_refused_unread(server, headers, status):
    headers = {name: value and value.encode("latin-1") for name, value in headers.items()}
    assert request(server, "POST", "answer", None, headers)[0] == status


@pytest.mark.parametrize("path", [
    "../address.json", "pictures/../address.json", "pictures/..%2faddress.json", "pictures/%2e%2e/address.json",
    "address.json", "labels.jsonl", "pictures/", "pictures", "pictures/{name}.png", "pictures/{name}/", "pictures/{NAME}",
    "pictures/./{name}", "pictures//{name}", "pictures/{name}?", "pictures/{name}%00", "pictures/..\\..\\address.json",
    "//etc/passwd", "page.html", "page.css/..", "rate.py", "./page.js", "%2e/page.js", "p%61ge.js", "state/", "state?x=1",
    "answer", "pictures/" + "0" * 64, "pictures/" + "a" * 5000,
])  # fmt: skip
def test_path_tricks_find_nothing(server, path):
    name = labels.questions(server.run)[key_of(server)].pictures[0]
    status, _, body = request(server, path=path.format(name=name, NAME=name.upper()))
    assert status in (403, 404) and server.token.encode() not in body and b"root:" not in body


def test_a_link_among_the_pictures_is_not_followed(server):
    """Its content is not what its name says."""
    (home(server.run) / "pictures" / ("a" * 64 + ".png")).symlink_to(home(server.run) / "address.json")
    assert request(server, path="pictures/" + "a" * 64)[0] == 404


@pytest.mark.parametrize("method", ["HEAD", "PUT", "DELETE", "OPTIONS", "TRACE", "CONNECT", "PATCH", "get"])
def test_other_methods_are_not_there(server, method):
    assert request(server, method, "state")[0] == 501


@pytest.mark.parametrize("raw", [
    b"\r\n", b"GET\r\n\r\n", b"\0" * 100 + b"\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n", b"GET /\xff\xfe HTTP/1.1\r\n\r\n",
    b"GET /" + b"a" * 70000 + b" HTTP/1.1\r\n\r\n", b"GET / HTTP/1.1\r\n" + b"A: b\r\n" * 200 + b"\r\n",
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n",
])  # fmt: skip
def test_garbage_is_answered_or_hung_up_on_and_the_server_lives(server, raw, capfd):
    with socket.create_connection(("127.0.0.1", server.server_port), 20) as connection:
        connection.sendall(raw)
        connection.shutdown(socket.SHUT_WR)
        assert b" 200 " not in connection.recv(1000)
    assert request(server)[0] == 200
    assert "Traceback" not in capfd.readouterr().err


def test_a_silent_connection_holds_nobody_up(server):
    with socket.create_connection(("127.0.0.1", server.server_port), 20) as silent:
        silent.sendall(b"POST /")
        assert request(server)[0] == 200
    assert rate.Handler.timeout <= 60


def test_nothing_is_logged(server, capfd):
    """The path holds the token."""
    request(server)
    request(server, token="wrong")
    assert capfd.readouterr() == ("", "")


# --- what goes wrong


def test_a_full_disk_is_said_and_the_answer_kept_for_later(server, monkeypatch, capfd):
    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda handle: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    body = {"key": key_of(server), "answer": "a"}
    status, _, sent = request(server, "POST", "answer", body)
    assert status == 503 and b"No space left on device" in sent and b"No space" in capfd.readouterr().err.encode()
    assert labels.labels(server.run) == []
    monkeypatch.setattr(os, "fsync", fsync)
    assert request(server, "POST", "answer", body)[0] == 200 and len(labels.labels(server.run)) == 1


def test_a_second_server_for_the_run_names_the_first(server):
    with (
        pytest.raises(TrainingError, match="is being rated already; open http://127.0.0.1:"),
        rate.opened(server.run, None),
    ):
        pass
    assert request(server)[0] == 200


def test_port_and_token_stay_and_are_their_owners_alone(run):
    with rate.opened(run, None) as first:
        pass
    path = home(run) / "address.json"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    with rate.opened(run, None) as second:
        assert second.address == first.address


def test_a_token_that_others_could_read_is_replaced(run):
    with rate.opened(run, None) as first:
        pass
    (home(run) / "address.json").chmod(0o644)
    with rate.opened(run, None) as second:
        assert second.token != first.token and second.server_port == first.server_port
    assert stat.S_IMODE((home(run) / "address.json").stat().st_mode) == 0o600


@pytest.mark.parametrize("left", ["", '{"port": 5', "[]", "null", '{"port": "x", "token": 1, "address": 2}', "\0\0"])
def test_half_an_address_is_none(run, left):
    with rate.opened(run, None):
        pass
    (home(run) / "address.json").write_text(left)
    with rate.opened(run, None) as server:
        assert len(server.token) >= 32


def test_a_port_that_is_taken(run):
    with rate.opened(run, None) as first:
        pass
    with socket.create_server(("127.0.0.1", first.server_port)):
        with rate.opened(run, None) as other:  # the one it had before: another will do
            assert other.server_port != first.server_port and other.token == first.token
        with pytest.raises(ConfigError, match=f"--port {first.server_port}"), rate.opened(run, first.server_port):
            pass
    for port in (-1, 70000):
        with pytest.raises(ConfigError, match="--port"), rate.opened(run, port):
            pass


def test_killed_and_started_again_it_answers_at_the_same_address(run):
    """SIGKILL, SIGKILL, and Ctrl-C at the end."""
    found = []
    for place, kill in enumerate((signal.SIGKILL, signal.SIGKILL, signal.SIGINT)):
        process = serving.start(run)
        found.append(serving.address(run, process))
        assert json.loads(request(found[-1])[2])["rated"] == place
        assert request(found[-1], "POST", "answer", {"key": key_of(found[-1], place), "answer": "a"})[0] == 200
        os.kill(process.pid, kill)
        process.join(30)
    assert process.exitcode == 0 and found[0] == found[1] == found[2]
    assert (run / "out.txt").read_text() == f"http://127.0.0.1:{found[0].server_port}/{found[0].token}/\n"
    assert f"3 of 6 rated; go on with: sdcore rate {run}" in (run / "err.txt").read_text()
    assert len((home(run) / "labels.jsonl").read_text().splitlines()) == 3


# --- what is rated


def test_pairs_are_drawn_and_what_is_missing_of_them_later(tmp_path):
    (tmp_path / "prompts.txt").write_text("a star\n")
    rate.draw(tmp_path, serving.options(tmp_path, pairs=2, prompts=str(tmp_path / "prompts.txt")))
    first = list(labels.questions(tmp_path).values())
    assert [question.prompt for question in first] == ["a star"] * 2
    rate.draw(tmp_path, serving.options(tmp_path, pairs=3, prompts=str(tmp_path / "prompts.txt")))
    found = list(labels.questions(tmp_path).values())
    assert found[:2] == first and len(found) == 3
    assert len({name for question in found for name in question.pictures}) == 6  # all from seeds of their own


def test_pictures_of_a_folder_with_the_prompt_that_they_say(tmp_path):
    Picture(plain(1, 2, 3).pixels, {"prompt": "a star"}).save(tmp_path / "a.png")
    plain(4, 5, 6).save(tmp_path / "b.png")
    (tmp_path / "notes.txt").write_text("")
    rate.take(tmp_path / "run", tmp_path)
    assert [question.prompt for question in labels.questions(tmp_path / "run").values()] == ["a star", ""]
    (tmp_path / "empty").mkdir()
    with pytest.raises(ImageError, match="holds no PNG"):
        rate.take(tmp_path / "run", tmp_path / "empty")


def test_a_run_that_is_not_there(tmp_path):
    with pytest.raises(TrainingError, match="no such run"):
        rate.rate(serving.options(tmp_path / "none"))
    assert not (tmp_path / "none").exists()


def test_a_run_that_has_asked_nothing_yet(tmp_path):
    assert rate.state(tmp_path) == {"run": str(tmp_path), "asked": 0, "rated": 0, "next": [], "recent": []}


def test_what_a_run_asks_meanwhile_appears(server):
    ask(server.run, [Item("later", plain(77, 7, 7))])
    assert json.loads(request(server)[2])["asked"] == 7
