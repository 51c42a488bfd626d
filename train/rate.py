"""`sdcore rate RUN`: a page on which a person compares pairs of pictures or scores single ones, by mouse, touch or keys.

    sdcore rate runs/x                                                  # what `ddpo --reward people` asks while it runs
    sdcore rate runs/y --model tiny --prompts world:two --pairs 40      # 40 pairs, drawn first; for `dpo --labels runs/y`
    sdcore rate runs/z --pictures FOLDER                                # pictures that are there, 1 to 5

The page (rating/page.html, .css, .js; served as they lie) is for one person at this machine. The server listens on 127.0.0.1
alone, and its address holds a token that only its starter knows:

    GET  /TOKEN/                     the page, and its files beside it
    GET  /TOKEN/pictures/SHA256      one picture
    GET  /TOKEN/state                how many are asked and rated, what comes next, what was answered last
    POST /TOKEN/answer               {"key": ..., "answer": ...} in JSON; on 200 it is on the disk (labels.py); returns the state

A web page open in the same browser can neither read nor answer: it does not know the token; a name of its own that it lets point
here is not in `hosts`; a POST must come from this page, as the browser itself says in Origin and Sec-Fetch-Site. Paths are looked
up, never opened: a picture is had by its hash alone.

Port and token stay in RUN/rating/address.json, which is its owner's alone (0600) and locked while the server runs. So a second
server refuses to start, and after a kill the next one answers at the same address: the open page goes on, and sends what was
not acknowledged. A lost receipt does no harm: an answer that stands already is acknowledged again, and not kept twice.
"""

import argparse
import contextlib
import errno
import fcntl
import hmac
import json
import os
import secrets
import sys
from collections.abc import Callable, Iterator
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TextIO

from sdcore.errors import ConfigError, ImageError, TrainingError
from sdcore.image import read_metadata

from . import labels

FOLDER = Path(__file__).parent / "rating"
PAGE = {
    "": ("page.html", "text/html; charset=utf-8"),
    "page.css": ("page.css", "text/css; charset=utf-8"),
    "page.js": ("page.js", "text/javascript; charset=utf-8"),
    "icon.svg": ("icon.svg", "image/svg+xml"),
}
JSON = "application/json"
AHEAD, RECENT = 8, 20  # questions that the page knows beforehand, and answers that it can take back without asking
MAX_BODY = 1000  # bytes of an answer; it needs some 50
SECURITY = {
    "Content-Security-Policy": "default-src 'none'; img-src 'self'; style-src 'self'; script-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",  # the address is a secret
    "X-Content-Type-Options": "nosniff",
}


class Denied(Exception):
    """A request that is not served: the status and a sentence for whoever sent it."""

    def __init__(self, status: HTTPStatus, why: str):
        self.status, self.why = status, why


def state(run: Path) -> dict:
    """What the page shows: numbers, the next questions, and the last answered ones, which it may undo."""
    asked = labels.questions(run)
    places = {key: place for place, key in enumerate(asked)}
    rated = [label.key for label in labels.labels(run) if label.key in asked]
    waiting = asked.keys() - set(rated)

    def shown(key: str) -> dict:
        question = asked[key]
        swap = -1 if question.left == "b" else 1  # the left one first
        return {"key": key, "place": places[key], "prompt": question.prompt, "pictures": question.pictures[::swap],
                "answers": labels.ANSWERS[len(question.pictures)][:-1][::swap]}  # fmt: skip

    return {
        "run": str(run),
        "asked": len(asked),
        "rated": len(rated),
        "next": [shown(key) for key in sorted(waiting, key=places.__getitem__)[:AHEAD]],
        "recent": [shown(key) for key in rated[-RECENT:]],
    }


class Handler(BaseHTTPRequestHandler):
    """One connection."""

    server: "Server"
    protocol_version = "HTTP/1.1"
    server_version, sys_version = "sdcore", ""
    timeout = 60  # seconds that a connection may stay silent

    def do_GET(self) -> None:
        self.reply(self.get)

    def do_POST(self) -> None:
        self.reply(self.post)

    def get(self) -> tuple[str, bytes]:
        """Type and content of what was asked for."""
        path = self.admitted()
        if path in PAGE:
            name, kind = PAGE[path]
            return kind, (FOLDER / name).read_bytes()
        if self.headers.get("Sec-Fetch-Site", "none") not in ("none", "same-origin"):
            raise Denied(HTTPStatus.FORBIDDEN, "asked for by another page")
        if path == "state":
            return JSON, json.dumps(state(self.server.run)).encode()
        folder, _, name = path.partition("/")
        if folder != "pictures":
            raise Denied(HTTPStatus.NOT_FOUND, "nothing here")
        try:
            return "image/png", labels.picture(self.server.run, name).read_bytes()
        except ImageError:
            raise Denied(HTTPStatus.NOT_FOUND, "no such picture, or it was changed") from None

    def post(self) -> tuple[str, bytes]:
        """Keep an answer, and return the state after it."""
        path = self.admitted()
        if path != "answer":
            raise Denied(HTTPStatus.NOT_FOUND, "nothing here")
        if self.headers.get("Sec-Fetch-Site", "same-origin") != "same-origin":
            raise Denied(HTTPStatus.FORBIDDEN, "sent by another page")
        if self.headers.get("Origin", f"http://{self.headers['Host']}") != f"http://{self.headers['Host']}":
            raise Denied(HTTPStatus.FORBIDDEN, "sent by another page")
        if self.headers.get_content_type() != JSON:
            raise Denied(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, f"expected {JSON}")
        length = self.headers.get("Content-Length", "")
        if "Transfer-Encoding" in self.headers or not (length.isascii() and length.isdigit()):
            raise Denied(HTTPStatus.LENGTH_REQUIRED, "expected a Content-Length")
        if int(length) > MAX_BODY:
            raise Denied(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"expected at most {MAX_BODY} bytes")
        try:
            sent = json.loads(self.rfile.read(int(length)))
        except (ValueError, RecursionError):
            sent = None
        if not isinstance(sent, dict) or sent.keys() != {"key", "answer"} or not isinstance(sent["key"], str):
            raise Denied(HTTPStatus.BAD_REQUEST, 'expected {"key": ..., "answer": ...}')
        try:
            labels.append(self.server.run, sent["key"], sent["answer"])
        except labels.Refused as error:
            raise Denied(HTTPStatus.CONFLICT, str(error)) from None
        return JSON, json.dumps(state(self.server.run)).encode()

    def admitted(self) -> str:
        """The path behind the token, as it was sent, of a request that may be served at all."""
        hosts = self.headers.get_all("Host", [])
        if len(hosts) != 1 or hosts[0] not in self.server.hosts:
            raise Denied(HTTPStatus.MISDIRECTED_REQUEST, "this server is no other's; open the address that it printed")
        token, _, path = self.path.removeprefix("/").partition("/")
        if not hmac.compare_digest(token.encode("latin-1"), self.server.token.encode()):
            raise Denied(HTTPStatus.FORBIDDEN, "not the address that the server printed; open that one")
        return path

    def reply(self, work: Callable[[], tuple[str, bytes]]) -> None:
        """Send what `work` returns, or why it does not."""
        status = HTTPStatus.OK
        try:
            kind, body = work()
        except Denied as denied:
            status, kind, body = denied.status, "text/plain; charset=utf-8", denied.why.encode()
            self.close_connection = True  # what was sent along is not read
        except TrainingError as error:  # the disk is full, or a file damaged: it may be mended while the page waits
            print(error, file=sys.stderr)
            status, kind, body = HTTPStatus.SERVICE_UNAVAILABLE, "text/plain; charset=utf-8", str(error).encode()
        self.send_response(status)
        headers = {"Content-Type": kind, "Content-Length": str(len(body))} | SECURITY
        headers["Cache-Control"] = "private, max-age=86400, immutable" if kind == "image/png" else "no-store"
        if self.close_connection:
            headers["Connection"] = "close"
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Nothing: the path holds the token."""


class Server(ThreadingHTTPServer):
    """The server of one run's questions; `address` is where the page is."""

    daemon_threads = True
    allow_reuse_port = False  # another program's listener beside ours would get half of the requests

    def __init__(self, run: Path, port: int, token: str):
        super().__init__(("127.0.0.1", port), Handler)
        self.run, self.token = run, token
        self.hosts = {f"{name}:{self.server_port}" for name in ("127.0.0.1", "localhost")}
        self.address = f"http://127.0.0.1:{self.server_port}/{token}/"

    def handle_error(self, request: object, client_address: object) -> None:
        """A page that goes away in the middle of an answer is no defect."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)  # type: ignore[arg-type]


@contextlib.contextmanager
def opened(run: Path, port: int | None) -> Iterator[Server]:
    """A server for this run, the only one, at the address that it had before if that is to be had.

    Raises TrainingError where another server has the run, ConfigError for a port that is taken.
    """
    path = labels.home(run) / "address.json"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as error:
        raise TrainingError(f"{path}: cannot be written ({error.strerror}); mend it, or name another run") from None
    with open(handle, "r+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # gives way with the process, however it ends
        except BlockingIOError:
            raise TrainingError(
                f"{run}: is being rated already; open {_kept(file).get('address', 'its page')}"
            ) from None
        kept = _kept(file)
        if os.fstat(file.fileno()).st_mode & 0o077:  # others may have read the token
            os.fchmod(file.fileno(), 0o600)
            kept.pop("token", None)
        token = kept.get("token") or secrets.token_urlsafe(24)
        try:
            server = Server(run, kept.get("port", 0) if port is None else port, token)
        except (OSError, OverflowError) as error:
            if port is not None:
                reason = os.strerror(error.errno or errno.EINVAL) if isinstance(error, OSError) else error
                raise ConfigError(f"--port {port}: {reason}; choose another, or leave it out") from None
            server = Server(run, 0, token)
        with server:
            file.seek(0)
            file.truncate()
            json.dump({"port": server.server_port, "token": token, "address": server.address}, file)
            file.flush()
            yield server


def _kept(file: TextIO) -> dict:
    """What an earlier server left in its file; {} if that is nothing, half of it, or something else."""
    file.seek(0)
    with contextlib.suppress(ValueError, LookupError, TypeError):
        found = json.load(file)
        return {"port": int(found["port"]), "token": str(found["token"]), "address": str(found["address"])}
    return {}


# --- what is rated


def draw(run: Path, args: argparse.Namespace) -> None:
    """Draw what is missing of `args.pairs` pairs, each two pictures of one prompt from two seeds, and ask about them."""
    import sdcore

    from .prompts import prompts

    asked = sum(len(question.pictures) == 2 for question in labels.questions(run).values())
    if asked >= args.pairs:
        return
    texts = prompts(args.prompts, args.pairs, args.seed)
    pipe = sdcore.load(args.model)
    for i in range(asked, args.pairs):
        drawn = pipe(texts[i], count=2, seed=args.seed + 2 * i, steps=args.steps, guidance=args.guidance).images
        labels.ask(run, [labels.Pair(texts[i], *drawn)])
        print(f"\rdrawn: {i + 1} of {args.pairs} pairs", end="", file=sys.stderr)
    print(file=sys.stderr)


def take(run: Path, folder: Path) -> None:
    """Ask about every picture of a folder, with the prompt that its file says, if it does."""
    paths = sorted(p for p in folder.glob("*") if p.suffix.lower() in (".png", ".jpg", ".jpeg", ".webp"))
    if not paths:
        raise ImageError(f"--pictures {folder}: holds no PNG, JPEG or WebP")
    labels.ask(run, [labels.Item(str(read_metadata(path).get("prompt", "")), path) for path in paths])


def rate(args: argparse.Namespace) -> int:
    """`sdcore rate`: draw and take what is to be rated, then serve the page until Ctrl-C. Options: see sdcore/cli."""
    run = Path(args.folder)
    if not (run.is_dir() or args.pairs or args.pictures):
        raise TrainingError(f"{run}: no such run; name one, or say --pairs N or --pictures FOLDER")
    with opened(run, args.port) as server:  # first: two that draw for one run would be in each other's way
        if args.pictures:
            take(run, Path(args.pictures))
        if args.pairs:
            draw(run, args)
        print(server.address, flush=True)
        print("open this address in a browser on this machine; Ctrl-C ends", file=sys.stderr)
        with contextlib.suppress(KeyboardInterrupt):
            server.serve_forever()
        now = state(run)
        print(f"\n{now['rated']} of {now['asked']} rated; go on with: sdcore rate {run}", file=sys.stderr)
    return 0
