"""Figures of a bench document: bars as a PNG, and the README's table, made from the committed results alone.

    sdcore bench kernels --plot kernels.png
    python -m sdcore.kernels.chart              prints the README's section from kernels/results/*.json

Nothing here measures, and nothing that was not measured is printed.
"""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

RESULTS = Path(__file__).parent / "results"
INK, PALE, OURS, OTHERS = "#222222", "#dddddd", "#1f4e99", "#b9c4d6"
BAR, LEFT, RIGHT, WIDTH = 16, 420, 90, 1000
NOT_MEASURED = "No GPU has run `make gpu` on this version: speed on a GPU is not measured yet."
Row = dict[str, Any]


def bars(rows: Iterable[Row]) -> list[tuple[str, list[tuple[str, float, str]]]]:
    """(group, [(whose, length, what to write)]) of the rows that were timed: percent of the roof, or a rate."""
    groups: dict[str, list[tuple[str, float, str]]] = {}
    for row in rows:
        if row.get("ms") is None:
            continue
        name = f"{row['op']} {row['shape']}" if "op" in row else row["model"]
        rate = row.get("its", row.get("samples_s", 1e3 / row["ms"]))
        length, text = (row["percent"], f"{row['percent']:.0f} %") if "op" in row else (rate, f"{rate:.4g} a second")
        groups.setdefault(name, []).append((row["by"], length, text))
    return list(groups.items())


def draw(document: dict[str, Any], path: Path) -> None:
    """Draw the rows of a document as bars, ours dark; kernels by percent of the measured roof, models by their rate."""
    groups = bars(document["rows"])
    height = 50 + sum(BAR * len(found) + 10 for _, found in groups)
    picture = Image.new("RGB", (WIDTH, max(height, 80)), "white")
    pen = ImageDraw.Draw(picture)
    pen.text((10, 10), f"{document['what']}, {document['dtype']}: {document['machine']['name']}", fill=INK)
    kernels = document["what"] == "kernels"
    longest = 100.0 if kernels else max((length for _, found in groups for _, length, _ in found), default=1.0)
    y = 40
    for name, found in groups:
        pen.text((10, y + 1), name[:44], fill=INK)
        for by, length, text in found:
            end = LEFT + (WIDTH - LEFT - RIGHT) * min(length / longest, 1.0)
            pen.text((LEFT - 8, y + 1), by, fill=INK, anchor="ra")
            pen.rectangle((LEFT, y + 2, max(end, LEFT + 1), y + BAR - 2), fill=OURS if is_ours(by) else OTHERS)
            pen.text((end + 5, y + 1), text, fill=INK)
            y += BAR
        y += 5
        pen.line((10, y, WIDTH - 10, y), fill=PALE)
        y += 5
    picture.save(path)


def is_ours(by: str) -> bool:
    return by.startswith(("sdcore", "yours"))


# -------------------------------------------------------------------------------------------------------------- the README


def results(folder: Path = RESULTS) -> list[dict[str, Any]]:
    """The committed results, newest last; each the parts of one run of `make gpu`."""
    return [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"), key=lambda p: p.stem[-10:])]


def readme(folder: Path = RESULTS) -> str:
    """The README's section on speed, in Markdown: what the newest run on every GPU measured, or that none has."""
    newest = {document["machine"]["name"]: document for document in results(folder)}
    if not newest:
        return NOT_MEASURED + "\n"
    return "\n".join(table(document) for document in newest.values())


def table(document: dict[str, Any]) -> str:
    """One run as Markdown tables: models, then each kernel against its fastest rival."""
    parts, versions = document["parts"], document["versions"]
    lines = [
        f"{document['machine']['name']}, torch {versions['torch']}, triton {versions['triton']}, commit {document['commit']}, "
        f"{document['date'][:10]}.",
        "",
    ]
    for part, head in (
        ("unet", "steps a second"),
        ("pipeline", "ms a picture"),
        ("train", "samples a second"),
        ("train-lora", "steps a second"),
    ):
        found = [row for row in parts.get(part, {}).get("rows", []) if row.get("ms") is not None]
        if found:
            lines += [f"| {part} | by | {head} | times sdcore as written |", "|---|---|---|---|"]
            lines += [model_line(row, found) for row in found] + [""]
    kernels = [row for part in ("attention", "norms") for row in parts.get(part, {}).get("rows", [])]
    if kernels:
        lines += [
            "| kernel | shape | ms | of the roof | error | fastest other | ratio |",
            "|---|---|---|---|---|---|---|",
        ]
        lines += kernel_lines(kernels) + [""]
    return "\n".join(lines)


def model_line(row: Row, rows: Sequence[Row]) -> str:
    """One contestant of a model."""
    figure = row.get("its", row.get("samples_s", row["ms"]))
    plain = [other["ms"] for other in rows if other["model"] == row["model"] and other["by"] == "sdcore"]
    ratio = f"{plain[0] / row['ms']:.2f}" if plain else "-"
    return f"| {row['model']} | {row['by']} | {figure:.4g} | {ratio} |"


def kernel_lines(rows: Sequence[Row]) -> list[str]:
    """One line a kernel and shape, forward."""
    lines = []
    keys = dict.fromkeys((row["op"], row["shape"]) for row in rows if not row["training"])
    for op, shape in keys:
        these = [row for row in rows if (row["op"], row["shape"]) == (op, shape) and not row["training"]]
        ours = next(row for row in these if is_ours(row["by"]))
        if ours["ms"] is None:
            lines.append(f"| {op} | {shape} | {ours['why']} | | | | |")
            continue
        others = sorted((row["ms"], row["by"]) for row in these if not is_ours(row["by"]) and row["ms"] is not None)
        best, ratio = (others[0][1], f"{others[0][0] / ours['ms']:.2f}") if others else ("-", "-")
        lines.append(
            f"| {op} | {shape} | {ours['ms']:.4f} | {ours['percent']:.0f} % | {ours['ratio']:.2f} | {best} | {ratio} |"
        )
    return lines


if __name__ == "__main__":
    print(readme(), end="")
