"""Words of the command line: what a user may type and what it means, and what is said back in one line."""

from __future__ import annotations

import argparse
import logging
import re

from sdcore.errors import ConfigError


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, without the usage."""

    def error(self, message: str):
        raise ConfigError(f"{message}; see {self.prog} --help")


def share(text: str) -> tuple[float, float]:
    """`0.25-0.75` -> (0.25, 0.75), shares of a whole."""
    low, _, high = text.partition("-")
    try:
        begin, end = float(low), float(high)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected A-B such as 0.25-0.75, found {text!r}") from None
    if not 0 <= begin < end <= 1:
        raise argparse.ArgumentTypeError(f"expected 0 <= A < B <= 1, found {text!r}")
    return begin, end


def margins(text: str) -> tuple[int, ...]:
    """`64,0,64,0` -> (64, 0, 64, 0)."""
    try:
        sides = tuple(int(side) for side in text.split(","))
    except ValueError:
        sides = ()
    if len(sides) != 4 or min(sides) < 0:
        raise argparse.ArgumentTypeError(f"expected four whole numbers of pixels such as 64,0,64,0, found {text!r}")
    return sides


def assigned(text: str, option: str) -> tuple[str, str, list[str]]:
    """`NET=picture.png:0.8:0-0.5` -> (NET, picture.png, [0.8, 0-0.5]): what follows the last colons, as far as it is numbers."""
    net, equals, rest = text.partition("=")
    if not net or not rest:
        raise ConfigError(f"{option}: expected NET=PICTURE such as canny-sd15=edges.png:0.8, found {text!r:.200}")
    numbers: list[str] = []
    while ":" in rest and len(numbers) < 2:
        path, _, last = rest.rpartition(":")
        if not path or not re.fullmatch(r"[-+.\deE]+|nan|inf", last):
            break
        numbers, rest = [last, *numbers], path
    return net, rest, numbers


def number(text: str, option: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ConfigError(f"{option}: expected a number, found {text!r:.80}") from None


def weighted(text: str) -> tuple[str, float | None]:
    """`style.safetensors:0.8` or `style.safetensors` -> (file, strength or None)."""
    path, colon, weight = text.rpartition(":")
    try:
        return (path, float(weight)) if colon else (text, None)
    except ValueError:  # a colon in the file's name
        return text, None


def size(text: str) -> tuple[int, int]:
    """`512x768` or `512` -> (width, height)."""
    width, _, height = text.lower().partition("x")
    try:
        return int(width), int(height or width)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected WIDTHxHEIGHT such as 512x768, found {text!r}") from None


def one_line(text: str) -> str:
    """No line breaks, and nothing that a terminal would obey: prompts and file names come from strangers."""
    return "".join(c if c.isprintable() else " " if c in "\n\t" else repr(c)[1:-1] for c in text)


def tell(message: str) -> None:
    logging.getLogger("sdcore").warning(one_line(message))
