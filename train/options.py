"""From a frozen dataclass to a command line.

A training method describes its options once, as a dataclass whose fields carry a type, a default and a sentence of help
(`option(default, "help")`). `parse` turns the class into an argparse parser and the words of the command line into an instance,
so no method writes argparse blocks of its own. `--no-NAME` switches a boolean off; a tuple is written `96,160`.
"""

import argparse
import dataclasses
import types
import typing
from collections.abc import Mapping, Sequence

T = typing.TypeVar("T")


def option(default: object, help: str, free: bool = False) -> typing.Any:
    """A dataclass field with a default and a sentence of help. `free`: a run may be resumed with another value."""
    return dataclasses.field(default=default, metadata={"help": help, "free": free})


def free_names(options: object) -> set[str]:
    """The options that may change on resume: those marked `free`, also where a subclass has another default."""
    classes = [c for c in type(options).__mro__ if dataclasses.is_dataclass(c)]
    return {field.name for c in classes for field in dataclasses.fields(c) if field.metadata.get("free")}


def _reader(kind: typing.Any) -> typing.Callable[[str], object]:
    """What reads one word into a value of type `kind`: int, float, str, X | None or tuple[X, ...]."""
    if typing.get_origin(kind) is tuple:
        item = _reader(typing.get_args(kind)[0])
        return lambda word: tuple(item(part) for part in word.split(","))
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        return _reader(typing.get_args(kind)[0])
    return kind


def parse(
    options: type[T],
    argv: Sequence[str] | None,
    prog: str,
    description: str | None = None,
    presets: Mapping[str, Mapping[str, object]] | None = None,
) -> T:
    """Command line words -> an instance of the dataclass `options`. A wrong word exits with 2 and a line, as argparse does.

    `presets`: name -> values by field, which `--preset NAME` puts in the place of the defaults.
    """
    summary = (description or options.__doc__ or "").strip().split("\n")[0]
    parser = argparse.ArgumentParser(
        prog=prog, description=summary, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    kinds = typing.get_type_hints(options)
    for field in dataclasses.fields(options):  # type: ignore[arg-type]
        flag, text = "--" + field.name.replace("_", "-"), field.metadata.get("help", "")
        if kinds[field.name] is bool:
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, default=field.default, help=text)
        else:
            parser.add_argument(flag, type=_reader(kinds[field.name]), default=field.default, help=text, metavar="X")
    if presets:
        parser.add_argument("--preset", choices=sorted(presets), help="other defaults, for all that is not given here")
        preset = parser.parse_args(argv).preset
        parser.set_defaults(**presets.get(preset, {}))
    words = vars(parser.parse_args(argv))
    words.pop("preset", None)
    return options(**words)
