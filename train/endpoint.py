"""Rewards that another program works out, asked over HTTP: any server that scores, or a vision-language model that answers.

`Server`, the reward `http://127.0.0.1:8000/score`: one request a batch, POST of JSON, answered by JSON

    {"prompts": ["a red circle", ...], "pictures": ["<PNG in base64>", ...]}   ->   {"rewards": [0.3, ...]}

`Questions`, the reward `ask:judge.json`: a chat as OpenAI's API has it (vLLM, llama.cpp, Ollama and SGLang speak it), one request
a picture and question. The file says whom and what to ask; of these only the first three must be there:

    {"url": "http://127.0.0.1:8000/v1/chat/completions", "model": "llava-1.6",
     "questions": ["Does this picture show {prompt}? Answer yes or no."],
     "answers": {"yes": 1, "no": 0}, "timeout": 60, "retries": 4, "pause": 1, "together": 8, "key_file": null}

`answers` are the worths of first words; [0, 10] instead says that a number from 0 to 10 is expected, which becomes 0..1. A
picture's worth is the mean over the questions. What fails, hangs beyond `timeout` seconds or cannot be understood is asked again
`retries` times, after `pause`, 2 `pause`, 4 `pause` ... seconds; then the run stops. `key_file` holds a key for the server.
"""

import base64
import http.client
import json
import re
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from sdcore import image
from sdcore.errors import ConfigError, TrainingError

from .rewards import Reward

LARGEST = 2**20  # bytes of an answer
T = TypeVar("T")


class Unusable(ValueError):
    """An answer that is not what was asked for; asking again may help."""


class Refused(TrainingError):
    """An answer that will be the same next time."""


# ------------------------------------------------------------------------------------------------------------------ one exchange


class Stay(urllib.request.HTTPRedirectHandler):
    """Goes nowhere else: a POST would become a GET, and the key would reach another server."""

    def redirect_request(self, *args: object) -> None:
        return None


# No proxy from the environment: the address given is the one that is asked.
OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}), Stay())


@dataclass(frozen=True)
class Patience:
    """How long one waits for an answer, and how often one asks."""

    timeout: float = 60.0  # seconds for a whole exchange
    retries: int = 4
    pause: float = 1.0  # seconds before the first retry; doubled from one to the next


def post(
    url: str, body: Mapping[str, object], read: Callable[[Any], T], patience: Patience, key: str | None = None
) -> T:
    """What `read` makes of the JSON that `url` answers to `body`; `read` raises Unusable where it makes nothing of it.

    TrainingError: refused, or no usable answer in all tries.
    """
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
    request = urllib.request.Request(url, json.dumps(body).encode(), headers)
    fault: object = None
    for attempt in range(patience.retries + 1):
        if attempt:
            time.sleep(patience.pause * 2 ** (attempt - 1))
        try:
            return read(json.loads(exchange(request, patience.timeout)))
        except (OSError, http.client.HTTPException, ValueError, RecursionError) as error:
            fault = f"{type(error).__name__}: {error}"
    raise TrainingError(
        f"{url}: no usable answer in {patience.retries + 1} tries, at last {' '.join(str(fault).split())}"
    )


def exchange(request: urllib.request.Request, timeout: float) -> bytes:
    """The body of the answer. Refused for what asking again cannot mend; OSError, HTTPException, Unusable for the rest."""
    deadline = time.monotonic() + timeout
    try:
        with OPENER.open(request, timeout=timeout) as response:
            body = b""
            while more := response.read1(2**16):  # what has come; a server that trickles is caught by the deadline
                body += more
                if len(body) > LARGEST:
                    raise Unusable(f"an answer of more than {LARGEST} bytes")
                if time.monotonic() > deadline:
                    raise TimeoutError(f"no whole answer in {timeout:g} s")
            return body
    except urllib.error.HTTPError as error:
        if error.code in (408, 425, 429) or error.code >= 500:
            raise
        said = " ".join(error.read(300).decode("utf-8", "replace").split())
        raise Refused(f"{request.full_url}: refused with {error.code} {error.reason}: {said}") from None


def encoded(picture: image.Picture) -> str:
    """A picture as PNG, in base64."""
    return base64.b64encode(picture.png()).decode()


# ----------------------------------------------------------------------------------------------------------- a server that scores


class Server(Reward):
    """Whatever the server at an address says of a batch."""

    def __init__(self, url: str, patience: Patience | None = None):
        self.name, self.patience = url, patience or Patience()

    def __call__(self, pictures: Tensor, prompts: list[str]) -> Tensor:
        drawn = [encoded(picture) for picture in image.to_pictures(pictures * 2 - 1)]

        def read(answer: Any) -> Tensor:
            found = answer.get("rewards") if isinstance(answer, dict) else None
            if not isinstance(found, list) or len(found) != len(prompts) or not all(map(is_number, found)):
                raise Unusable(
                    f"expected a table with {len(prompts)} numbers under 'rewards', found {str(answer)[:100]!r}"
                )
            return torch.tensor(found, dtype=torch.float32)

        return post(self.name, {"prompts": prompts, "pictures": drawn}, read, self.patience)


def is_number(value: object) -> bool:
    return type(value) in (int, float)


# ------------------------------------------------------------------------------------------------------- a model that answers


@dataclass(frozen=True)
class Judge(Patience):
    """What the JSON file says; see the top."""

    url: str = ""
    model: str = ""
    questions: tuple[str, ...] = ()
    answers: Mapping[str, float] | tuple[float, float] = (0.0, 10.0)
    together: int = 8
    key_file: str | None = None


def read_judge(path: Path) -> Judge:
    """The file, every value checked. ConfigError."""

    def wrong(what: str) -> ConfigError:
        return ConfigError(f"{path}: {what}; see docs/rewards.md")

    try:
        values = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise wrong(f"cannot be read as JSON ({error})") from None
    known = {field.name for field in fields(Judge)}
    if not isinstance(values, dict) or not set(values) <= known:
        raise wrong(f"expected a table of {', '.join(sorted(known))}")
    for name, check in {
        "url": lambda v: isinstance(v, str) and v.startswith(("http://", "https://")),
        "model": lambda v: isinstance(v, str),
        "questions": lambda v: isinstance(v, list) and v and all(isinstance(q, str) for q in v),
        "answers": lambda v: (
            is_table(v) or isinstance(v, list) and len(v) == 2 and all(map(is_number, v)) and v[0] < v[1]
        ),
        "timeout": lambda v: is_number(v) and v > 0,
        "retries": lambda v: type(v) is int and v >= 0,
        "pause": lambda v: is_number(v) and v >= 0,
        "together": lambda v: type(v) is int and v >= 1,
        "key_file": lambda v: v is None or isinstance(v, str),
    }.items():
        if name in values and not check(values[name]) or name in ("url", "model", "questions") and name not in values:
            raise wrong(f"{name} is {values.get(name)!r}")
    given: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
    return Judge(**{"answers": {"yes": 1.0, "no": 0.0}} | given)


def is_table(value: object) -> bool:
    return isinstance(value, dict) and len(value) > 0 and all(map(is_number, value.values()))


class Questions(Reward):
    """A vision-language model's answers to questions about each picture, as numbers."""

    def __init__(self, path: Path):
        self.name, self.judge = f"ask:{path}", read_judge(path)
        try:
            self.key = Path(self.judge.key_file).read_text().strip() if self.judge.key_file else None
        except OSError as error:
            raise ConfigError(f"{path}: key_file {self.judge.key_file}: {error.strerror}") from None

    def __call__(self, pictures: Tensor, prompts: list[str]) -> Tensor:
        judge, drawn = self.judge, [encoded(picture) for picture in image.to_pictures(pictures * 2 - 1)]
        asked = [
            (picture, question.replace("{prompt}", prompt))
            for picture, prompt in zip(drawn, prompts, strict=True)
            for question in judge.questions
        ]
        with ThreadPoolExecutor(judge.together) as pool:
            worths = list(pool.map(lambda one: self.ask(*one), asked))
        return torch.tensor(worths).view(len(prompts), len(judge.questions)).mean(dim=1)

    def ask(self, picture: str, question: str) -> float:
        """The worth of the answer to one question about one picture."""
        shown = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{picture}"}}
        message = {"role": "user", "content": [shown, {"type": "text", "text": question}]}
        body = {"model": self.judge.model, "messages": [message], "max_tokens": 32, "temperature": 0}
        return post(self.judge.url, body, lambda answer: worth(answer, self.judge.answers), self.judge, self.key)

    def identity(self) -> object:
        j = self.judge
        return [
            self.name,
            j.url,
            j.model,
            list(j.questions),
            dict(j.answers) if isinstance(j.answers, Mapping) else list(j.answers),
        ]


def worth(answer: Any, answers: Mapping[str, float] | tuple[float, float]) -> float:
    """What a chat's answer is worth. Unusable where it says nothing of the kind that was asked for."""
    try:
        text = answer["choices"][0]["message"]["content"]
    except (KeyError, IndexError, TypeError):
        raise Unusable(f"expected a chat completion, found {str(answer)[:100]!r}") from None
    if not isinstance(text, str):
        raise Unusable(f"expected a text, found {str(text)[:100]!r}")
    if isinstance(answers, Mapping):
        first = re.search(r"\w+", text.lower())
        table = {word.lower(): value for word, value in answers.items()}
        if first is None or first[0] not in table:
            raise Unusable(f"expected an answer that begins with one of {', '.join(table)}, found {text[:100]!r}")
        return float(table[first[0]])
    low, high = answers
    number = re.search(r"-?\d+(?:\.\d+)?", text)
    if number is None or not low <= float(number[0]) <= high:
        raise Unusable(f"expected a number from {low:g} to {high:g}, found {text[:100]!r}")
    return (float(number[0]) - low) / (high - low)
