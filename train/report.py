"""One page of what methods reached: HTML that holds its own pictures, and the same in Markdown for docs/.

    save(Result(...), folder)           # result.json, beside the pictures it names
    write_page(results, path)           # one self-contained file
    markdown(results, pictures)         # headings, tables, pictures

A row is one figure with what it is measured against: the aim, the untuned model's figure, the ceiling (true pictures behind the
autoencoder) and chance. A figure without an aim is shown and judges nothing.
"""

import base64
import dataclasses
import html
import json
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from sdcore.weights import files


@dataclass(frozen=True)
class Row:
    """A figure and what it is to be seen beside."""

    what: str
    got: float
    aim: float | None = None  # None: shown beside the others, without one
    at_most: bool = False  # the figure is not to exceed the aim, rather than to reach it
    base: float | None = None  # of the untuned model
    ceiling: float | None = None
    chance: float | None = None
    unit: str = "%"  # %: shares of 1, shown as per cents; points: differences of such shares; else as it is

    @property
    def met(self) -> bool:
        """Whether the aim is reached; True where there is none."""
        return self.aim is None or (self.got <= self.aim if self.at_most else self.got >= self.aim)


@dataclass(frozen=True)
class Sheet:
    """A PNG in the folder of the result, and what it shows."""

    file: str
    words: str


@dataclass(frozen=True)
class Result:
    """What one method did and reached."""

    name: str
    title: str
    about: str
    commands: tuple[str, ...]
    rows: tuple[Row, ...]
    sheets: tuple[Sheet, ...] = ()
    notes: tuple[str, ...] = ()
    processor: float = 0.0  # seconds of all trainings of it
    clock: float = 0.0
    judged: dict[str, float] = field(default_factory=dict)  # how: prompts, seed, steps, guidance


def save(result: Result, folder: Path) -> None:
    """Write folder/result.json, whole or not at all."""
    with files.replacing(folder / "result.json") as file:
        file.write((json.dumps(dataclasses.asdict(result), indent=1) + "\n").encode())


def load(folder: Path) -> Result | None:
    """What `save` wrote; None where there is nothing."""
    if not (folder / "result.json").exists():
        return None
    found = json.loads((folder / "result.json").read_text())
    rows = tuple(Row(**row) for row in found.pop("rows"))
    sheets = tuple(Sheet(**sheet) for sheet in found.pop("sheets"))
    commands, notes = tuple(found.pop("commands")), tuple(found.pop("notes"))
    return Result(rows=rows, sheets=sheets, commands=commands, notes=notes, **found)


def shown(value: float | None, unit: str) -> str:
    """A figure for a person; nothing for None."""
    if value is None:
        return ""
    if unit in ("%", "points"):
        return f"{100 * value:.1f} {unit}"
    return f"{value:.4g} {unit}".strip()


HEAD = ("", "got", "aim", "untuned", "ceiling", "chance")


def cells(row: Row) -> tuple[str, ...]:
    """A row's cells, under HEAD."""
    aim = "" if row.aim is None else ("≤ " if row.at_most else "≥ ") + shown(row.aim, row.unit)
    mark = "" if row.met else " (missed)"
    return (
        row.what, shown(row.got, row.unit) + mark, aim,
        *(shown(value, row.unit) for value in (row.base, row.ceiling, row.chance)),
    )  # fmt: skip


def spent(result: Result) -> str:
    """What it took and how it was judged, in a sentence."""
    judged = ", ".join(f"{key} {value}" for key, value in result.judged.items())
    took = f"Trained in {result.processor:.0f} processor seconds ({result.clock:.0f} s by the clock)."
    return f"{took if result.processor else 'What training took was not kept.'} Judged with {judged}."


# --------------------------------------------------------------------------------------------------------------------- Markdown


def table(results: Sequence[Result]) -> str:
    """All rows of all results as one Markdown table, with the method before each and its processor seconds behind."""
    lines = ["| method | " + " | ".join(("figure", *HEAD[1:])) + " | processor s |", "|---" * (len(HEAD) + 2) + "|"]
    for result in results:
        for i, row in enumerate(result.rows):
            took = f"{result.processor:.0f}" if result.processor else "not kept"
            first, last = (result.title, took) if i == 0 else ("", "")
            lines.append("| " + " | ".join((first, *cells(row), last)) + " |")
    return "\n".join(lines) + "\n"


def replace_table(path: Path, text: str) -> None:
    """Put the table `text` in the place of the one with the same head in a Markdown file. ValueError where it has none."""
    before = path.read_text()
    start = before.index(text.splitlines()[0])
    end = start + len(re.match(r"(\|.*\n)+", before[start:])[0])  # type: ignore[index]
    with files.replacing(path) as file:
        file.write((before[:start] + text + before[end:]).encode())


CHAPTER = (
    "# The chapter's methods on the bundled model\n\nWritten by `make chapter`; every figure is the exact checker's "
    "(`train/checker.py`). Untuned: the model as it ships, on the same prompts and seeds. Ceiling: true pictures behind the "
    "autoencoder. Chance: the same reading held against other demands.\n"
)


def markdown(results: Sequence[Result], pictures: str, head: str = CHAPTER, prefix: str = "chapter") -> str:
    """The report for docs/: a head, then a section a method. `pictures` is where its sheets lie, as the page's links have it."""
    parts = [head]
    for result in results:
        lines = ["| " + " | ".join(HEAD) + " |", "|---" * len(HEAD) + "|"]
        lines += ["| " + " | ".join(cells(row)) + " |" for row in result.rows]
        commands = "\n".join(f"    {command}" for command in result.commands)
        text = f"## {result.title}\n\n{result.about}\n\n{commands}\n\n" + "\n".join(lines) + f"\n\n{spent(result)}\n"
        text += "".join(f"\n{note}\n" for note in result.notes)
        for sheet in result.sheets:
            text += f"\n![{sheet.words}]({pictures}/{named(result, sheet, prefix)})\n\n{sheet.words}\n"
        parts.append(text)
    return "\n".join(parts)


def named(result: Result, sheet: Sheet, prefix: str = "chapter") -> str:
    """What a sheet is called where those of all methods lie together."""
    return f"{prefix}-{result.name}-{sheet.file}"


def record(
    done: Sequence[tuple[Result, Path]], docs: Path, page: str, head: str = CHAPTER, prefix: str = "chapter"
) -> None:
    """Put results, each with the folder that its sheets lie in, into docs/, which is committed: sheets, and reports/`page`."""
    (docs / "reports").mkdir(parents=True, exist_ok=True)
    for result, folder in done:
        for sheet in result.sheets:
            shutil.copy(folder / sheet.file, docs / named(result, sheet, prefix))
    with files.replacing(docs / "reports" / page) as file:
        file.write(markdown([result for result, _ in done], "..", head, prefix).encode())


# ------------------------------------------------------------------------------------------------------------------------- HTML

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
table { border-collapse: collapse; } td, th { padding: .2rem .8rem; border-bottom: 1px solid #ddd; text-align: left; }
td:not(:first-child) { font-variant-numeric: tabular-nums; white-space: nowrap; } .missed { color: #b00020; }
pre { background: #f5f5f5; padding: .6rem; overflow-x: auto; } figure { margin: 1rem 0; } figcaption { color: #555; }
img { max-width: 100%; image-rendering: pixelated; }
"""


def page(results: Sequence[tuple[Result, Path]]) -> str:
    """The report as one HTML file that needs no other: each result with the folder of its pictures."""
    parts = [
        "<!doctype html><html lang=en><meta charset=utf-8><title>sdcore: the chapter</title>",
        f"<style>{STYLE}</style>",
    ]
    parts.append("<h1>The chapter's methods on the bundled model</h1>")
    for result, folder in results:
        parts.append(f"<h2>{html.escape(result.title)}</h2><p>{html.escape(result.about)}</p>")
        parts.append("<pre>" + html.escape("\n".join(result.commands)) + "</pre><table><tr>")
        parts += [f"<th>{head}</th>" for head in HEAD]
        for row in result.rows:
            kind = "" if row.met else ' class="missed"'
            parts.append(f"</tr><tr{kind}>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in cells(row)))
        parts.append(f"</tr></table><p>{html.escape(spent(result))}</p>")
        parts += [f"<p>{html.escape(note)}</p>" for note in result.notes]
        for sheet in result.sheets:
            data = base64.b64encode((folder / sheet.file).read_bytes()).decode()
            words = html.escape(sheet.words)
            parts.append(
                f'<figure><img alt="{words}" src="data:image/png;base64,{data}"><figcaption>{words}</figcaption></figure>'
            )
    return "\n".join(parts) + "\n</html>\n"


def write_page(results: Sequence[tuple[Result, Path]], path: Path) -> None:
    """Write `page`, whole or not at all."""
    with files.replacing(path) as file:
        file.write(page(results).encode())
