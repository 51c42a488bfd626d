r"""Prompts: from what a person types to rows of tokens, each with a weight, for every step of the picture.

The grammar is that of A1111's web UI, which most shared prompts are written in. Read from the outside in:

    <lora:name:0.8>      asks for an adapter at that strength; no words          `parse`
    one AND two :0.5     two prompts, each with its weight, composed             `parse`
    [one:two:0.3]        "one" for 30 % of the steps, then "two"                 `schedule`
    [two:7]  [one::7]    from step 8 on;  up to step 7
    [one|two]            in turns, a step each
    (words) (words:1.3)  weight 1.1, or the one given                            `weigh`
    [words]              weight 1 / 1.1
    \( \) \[ \] \\       the sign itself
    one BREAK two        "two" begins a new row                                  `chunk`

The order matters and is A1111's: first it is settled what stands in the text at a step, then that text is weighted. So a
schedule may hold weights, and even a weight may be scheduled: `(words:[1:1.3:0.5])`. Brackets that do not close are no error,
they reach to the end; what is meant as a sign wants a backslash. A number with a point is a share of the steps, one without
counts steps. Where this differs from A1111: a trailing `:9` is a weight only in prompts that have an AND ("16:9" stays what it
is), a `|` outside of brackets does not switch schedules off, and BREAK works inside brackets.

Text encoders read rows of 77 tokens (75 and two marks). A longer prompt goes into several rows, which the UNet sees side by
side; words are not torn from the comma before them if it is at most 20 tokens back. How a weight acts on the encoded tokens
is a matter of taste with four well-known answers: `EMPHASIS`. All work here is one pass over the text.

Legend: r rows, s tokens a row (77), d text width.
"""

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor

from sdcore.errors import PromptError
from sdcore.tokenizer import MAX_PROMPT_BYTES, Tokenizer

MAX_CHANGES = 256  # schedules and turns in one prompt; a step's text is put together in that many pieces
MAX_DEPTH = 32  # schedules in schedules
MAX_WEIGHT = 100.0  # beyond it nothing is left of a picture
COMMA_REACH = 20  # tokens that may be carried over to the next row to keep them behind their comma
ROUND, SQUARE = 1.1, 1 / 1.1

NUMBER = r"[-+]?(?:\d+(?:\.\d*)?|\.\d+)"

# ------------------------------------------------------------------------------------------ the whole prompt: AND, adapters


class LoraTag(NamedTuple):
    """`<lora:name:0.8>`: an adapter that the prompt asks for."""

    name: str
    unet: float
    text: float  # strength in the text encoders


class Part(NamedTuple):
    """One of the prompts that AND joins."""

    weight: float
    texts: list[str]  # one a step, schedules settled, weights still in it


@dataclass(frozen=True)
class Prompt:
    """A prompt taken apart."""

    parts: list[Part]  # at least one
    loras: list[LoraTag]


def parse(text: str, steps: int, compose: bool = True) -> Prompt:
    """Take a prompt apart for a run of `steps` steps. `compose=False` leaves AND alone: it means nothing in a negative prompt.

    Raises PromptError for no text, more than 64 Ki characters, more changes or deeper ones than any picture needs, a LoRA tag
    that is none.
    """
    check(text)
    loras: list[LoraTag] = []

    def take(found: re.Match) -> str:
        loras.append(lora_tag(*found.groups()))
        return ""

    text = re.sub(r"<(?:lora|lyco):([^<>:]+)((?::[^<>:]*)*)>", take, text)
    if found := re.search(r"<hypernet:[^<>]*>", text):
        raise PromptError(f"prompt: {found[0]!r:.80}: hypernetworks are not supported; leave it out")
    texts = re.split(r"\bAND\b", text) if compose else [text]
    if len(texts) == 1:
        return Prompt([Part(1.0, schedule(text, steps))], loras)
    parts = []
    for one in texts:
        found = re.search(rf":\s*({NUMBER})\s*$", one)
        weight = checked_weight(float(found[1])) if found else 1.0
        parts.append(Part(weight, schedule(one[: found.start()] if found else one, steps)))
    return Prompt(parts, loras)


def check(text: str) -> None:
    """Raise PromptError for what is no text or is too long to be meant: at once, before anything reads it."""
    if not isinstance(text, str):
        raise PromptError(f"prompt: expected a text (str), found {type(text).__name__}; pass str(...)")
    if len(text) > MAX_PROMPT_BYTES:
        raise PromptError(
            f"prompt: at most {MAX_PROMPT_BYTES} bytes, found {len(text)} characters; no picture needs so many words"
        )
    if (size := len(text.encode(errors="surrogatepass"))) > MAX_PROMPT_BYTES:
        raise PromptError(f"prompt: at most {MAX_PROMPT_BYTES} bytes, found {size}; no picture needs so many words")


def lora_tag(name: str, rest: str) -> LoraTag:
    """`:0.8` is both strengths, `:0.5:0.8` text encoder and UNet, and `:te=0.5:unet=0.8` says which is which."""
    values: dict[str, float] = {}
    for place, word in zip(("te", "unet"), filter(None, rest.split(":")), strict=False):
        key, _, number = word.rpartition("=")
        if not re.fullmatch(rf"\s*{NUMBER}\s*", number) or key not in ("", "te", "unet"):
            raise PromptError(
                f"prompt: <lora:{name}{rest}>: expected a strength such as 0.8, te=0.5 or unet=0.8, found {word!r}"
            )
        values[key or place] = float(number)
    if len(list(filter(None, rest.split(":")))) > 2:
        raise PromptError(f"prompt: <lora:{name}{rest}>: expected at most two strengths, of text encoder and UNet")
    text = values.get("te", 1.0)
    return LoraTag(name.strip(), unet=values.get("unet", text), text=text)


# ------------------------------------------------------------------------------------------ what stands there at a step


@dataclass(frozen=True)
class Switch:
    """`[before:after:when]`: `before` in the first `when` steps, then `after`."""

    before: list
    after: list
    when: float
    share: bool  # whether `when` is a share of the steps


@dataclass(frozen=True)
class Turns:
    """`[one|two|three]`: a step each, over and over."""

    options: list[list]


class Bracket(NamedTuple):
    """One that is open: where it stands, and the `:` and `|` that are directly inside."""

    sign: str
    at: int
    marks: list[int]


def schedule(text: str, steps: int) -> list[str]:
    """The text as it stands at each of `steps` steps. Raises PromptError for too many changes, or too deep ones."""
    tree = tree_of(text)
    if all(isinstance(node, str) for node in tree):
        return [text] * steps
    return [at_step(tree, i, steps) for i in range(steps)]


def tree_of(text: str) -> list:
    """The text as a list of strings, `Switch` and `Turns`, which hold such lists themselves.

    One pass with a stack of open brackets. A closing bracket that does not fit the innermost open one is a mere sign, and so
    are square brackets around what is neither a schedule nor a choice: their weights are `weigh`'s business.
    """
    nodes: list = []
    stack: list[Bracket] = []
    changes = 0
    for sign in re.findall(r"\\.?|[\[\]():|]|[^\\\[\]():|]+", text, re.S):
        nodes.append(sign)
        if sign in ("(", "["):
            stack.append(Bracket(sign, len(nodes) - 1, []))
        elif sign in (":", "|") and stack:
            stack[-1].marks.append(len(nodes) - 1)
        elif (sign == ")" and stack and stack[-1].sign == "(") or (sign == "]" and stack and stack[-1].sign == "["):
            opened = stack.pop()
            change = change_of(nodes, opened) if sign == "]" and opened.marks else None
            if change is not None:
                nodes[opened.at :] = [change]
                changes += 1
                if changes > MAX_CHANGES:
                    raise PromptError(
                        f"prompt: at most {MAX_CHANGES} schedules such as [a:b:0.5] or [a|b] in one prompt"
                    )
    tree = joined(nodes)
    if depth(tree) > MAX_DEPTH:
        raise PromptError(f"prompt: at most {MAX_DEPTH} schedules such as [a:b:0.5] inside of each other")
    return tree


def change_of(nodes: list, opened: Bracket) -> Switch | Turns | None:
    """What the bracket that just closed means, or None where it is no change."""
    colons = [at for at in opened.marks if nodes[at] == ":"]
    end = len(nodes) - 1
    if 1 <= len(colons) <= 2 and colons[-1] == end - 2 and isinstance(nodes[-2], str):
        when = nodes[-2]
        if re.fullmatch(rf"\s*{NUMBER}\s*", when):
            start, middle = opened.at + 1, colons[0]
            before = nodes[start:middle] if len(colons) == 2 else []
            after = nodes[middle + 1 : colons[1]] if len(colons) == 2 else nodes[start:middle]
            return Switch(joined(before), joined(after), float(when), share="." in when)
    bars = [at for at in opened.marks if nodes[at] == "|"]
    if bars:
        edges = [opened.at, *bars, end]
        return Turns([joined(nodes[a + 1 : b]) for a, b in zip(edges, edges[1:], strict=False)])
    return None


def joined(nodes: list) -> list:
    """Neighbouring strings made one, so that a tree has few nodes."""
    found: list = []
    for is_text, run in groupby(nodes, key=lambda node: isinstance(node, str)):
        together = list(run)
        found += ["".join(together)] if is_text else together
    return found


def depth(tree: list) -> int:
    """How deep changes are nested, without recursion: the text may be hostile."""
    deepest, level = 0, [node for node in tree if not isinstance(node, str)]
    while level:
        deepest += 1
        inner = [
            branch
            for node in level
            for branch in ([node.before, node.after] if isinstance(node, Switch) else node.options)
        ]
        level = [node for branch in inner for node in branch if not isinstance(node, str)]
    return deepest


def at_step(tree: list, i: int, steps: int) -> str:
    """The text at step i (0 the first) of `steps`."""
    said = []
    for node in tree:
        if isinstance(node, Switch):
            last = int(
                min(steps, max(0, node.when * steps if node.share else node.when))
            )  # of `before`, counted from 1
            said.append(at_step(node.before if i + 1 <= last else node.after, i, steps))
        elif isinstance(node, Turns):
            said.append(at_step(node.options[i % len(node.options)], i, steps))
        else:
            said.append(node)
    return "".join(said)


# ------------------------------------------------------------------------------------------ weights


class Piece(NamedTuple):
    """Words that share a weight, or a BREAK (text None)."""

    text: str | None
    weight: float


BREAK = Piece(None, 1.0)
SIGNS = re.compile(rf"\\[()\[\]\\]|\\|[()\[\]]|:\s*({NUMBER})\s*\)|[^\\()\[\]:]+|:")


def weigh(text: str) -> list[Piece]:
    """Read the brackets of a text without schedules. Round and square ones are matched each for themselves, as in A1111.

    First every opening bracket learns its factor, which stands at its end; then the text is walked with the product of those
    that are open. Raises PromptError for a weight beyond 100.
    """
    signs = list(SIGNS.finditer(text))
    factors, closing = match_brackets(signs)
    open_round, open_square = [1.0], [1.0]  # products, the innermost last
    said: list[tuple[str | None, float]] = []
    for at, found in enumerate(signs):
        sign = found[0]
        if at in factors:
            products = open_round if sign == "(" else open_square
            products.append(products[-1] * factors[at])
        elif at in closing:
            (open_square if sign == "]" else open_round).pop()
        else:
            weight = checked_weight(open_round[-1] * open_square[-1])
            if sign[0] == "\\":  # an escaped sign, or a lone backslash, which vanishes
                said.append((sign[1:], weight))
                continue
            for i, words in enumerate(re.split(r"\bBREAK\b", sign)):
                said += [BREAK, (words, weight)] if i else [(words, weight)]
    return merged(said) or [Piece("", 1.0)]


def match_brackets(signs: Sequence[re.Match]) -> tuple[dict[int, float], set[int]]:
    """Opening bracket -> its factor, and the closing ones that belong to one. What never closes reaches to the end."""
    factors: dict[int, float] = {}
    closing: set[int] = set()
    waiting: dict[str, list[int]] = {"(": [], "[": []}
    for at, found in enumerate(signs):
        sign = found[0]
        if sign in waiting:
            waiting[sign].append(at)
            factors[at] = ROUND if sign == "(" else SQUARE
        elif sign == "]" and waiting["["]:
            waiting["["].pop()
            closing.add(at)
        elif (sign == ")" or found[1]) and waiting["("]:
            opened = waiting["("].pop()
            factors[opened] = float(found[1]) if found[1] else ROUND
            closing.add(at)
    return factors, closing


def merged(said: Sequence[tuple[str | None, float]]) -> list[Piece]:
    """Neighbours of one weight as one piece: "a \\(b\\)" is read as a whole."""
    pieces: list[Piece] = []
    for (is_break, weight), run in groupby(said, key=lambda item: (item[0] is None, item[1])):
        texts = [text for text, _ in run]
        if is_break:
            pieces += [BREAK] * len(texts)
        elif any(texts):
            pieces.append(Piece("".join(text or "" for text in texts), weight))
    return pieces


def checked_weight(weight: float) -> float:
    if abs(weight) > MAX_WEIGHT:
        raise PromptError(
            f"prompt: a weight of {weight:.4g}; expected -{MAX_WEIGHT:g} to {MAX_WEIGHT:g} (brackets multiply)"
        )
    return weight


# ------------------------------------------------------------------------------------------ rows of tokens


@dataclass
class Chunk:
    """One row for the text encoder."""

    ids: list[int]  # start, tokens, end, padding: s of them
    weights: list[float]  # 1.0 for the marks and the padding
    pieces: list[int]  # which piece of the prompt a token came from; -1 for the marks and the padding


def chunk(pieces: Sequence[Piece], tokenizer: Tokenizer, named: Mapping[str, Sequence[int]] = {}) -> list[Chunk]:
    """Spell the pieces and lay the tokens out in rows; at least one.

    `named` are embeddings: name -> the token numbers that stand for its vectors, which always share a row. A row that is full
    gives the tokens behind its last comma to the next one, if they are at most 20.
    """
    room = tokenizer.max_length - 2
    comma = tokenizer.encode(",")
    rows: list[Chunk] = []
    row: list[tuple[int, float, int]] = []  # (token, weight, piece)
    last_comma = -1

    def close(carried: int = 0) -> None:
        nonlocal row, last_comma
        rows.append(framed(row[: len(row) - carried], tokenizer))
        row = row[len(row) - carried :]
        last_comma = -1

    for index, (text, weight) in enumerate(pieces):
        if text is None:
            close()
            continue
        for ids, whole in spell(text, tokenizer, named):
            if whole:  # an embedding
                if len(row) + len(ids) > room:
                    close()
                row += [(token, weight, index) for token in ids]
                continue
            for token in ids:
                if [token] == comma:
                    last_comma = len(row)
                elif len(row) == room and last_comma >= 0 and room - last_comma <= COMMA_REACH:
                    close(carried=room - last_comma - 1)
                if len(row) == room:
                    close()
                row.append((token, weight, index))
    if row or not rows:
        close()
    return rows


def filled(rows: Sequence[Chunk], count: int, tokenizer: Tokenizer) -> list[Chunk]:
    """As many rows as asked for: those, and then rows without words."""
    return [*rows, *[framed([], tokenizer)] * (count - len(rows))]


def cut(text: str, tokenizer: Tokenizer, named: Mapping[str, Sequence[int]] = {}) -> tuple[Chunk, str]:
    """One row without a grammar, and what did not fit into it ("" where everything did)."""
    if not named:
        found = tokenizer.encode_batch([text])
        length = tokenizer.max_length
        return Chunk(found.ids[0].tolist(), [1.0] * length, [-1] * length), found.dropped[0]
    tokens = [token for ids, _ in spell(text, tokenizer, named) for token in ids]
    room = tokenizer.max_length - 2
    dropped = f"the last {len(tokens) - room} tokens" if len(tokens) > room else ""
    return framed([(token, 1.0, -1) for token in tokens[:room]], tokenizer), dropped


def framed(row: Sequence[tuple[int, float, int]], tokenizer: Tokenizer) -> Chunk:
    """Start before it, end and padding behind it."""
    ids, weights, pieces = [t for t, _, _ in row], [w for _, w, _ in row], [p for _, _, p in row]
    behind = tokenizer.max_length - 1 - len(row)
    return Chunk(
        [tokenizer.bos_id, *ids, tokenizer.eos_id, *[tokenizer.pad_id] * (behind - 1)],
        [1.0, *weights, *[1.0] * behind],
        [-1, *pieces, *[-1] * behind],
    )


def spell(text: str, tokenizer: Tokenizer, named: Mapping[str, Sequence[int]]) -> list[tuple[Sequence[int], bool]]:
    """Token numbers of the text, cut where an embedding is named (True): as `name`, `embedding:name` or `<name>`, in any case."""
    if not named:
        return [(tokenizer.encode(text), False)]
    by_name = {name.lower(): ids for name, ids in named.items()}
    found: list[tuple[Sequence[int], bool]] = []
    at = 0
    for match in names_pattern(by_name).finditer(text):
        name = re.sub(r"\s+", " ", match[0]).lower().removeprefix("embedding:")
        name = name if name in by_name else name[1:-1]
        found += [(tokenizer.encode(text[at : match.start()]), False), (by_name[name], True)]
        at = match.end()
    return [*found, (tokenizer.encode(text[at:]), False)]


def names_pattern(names: Iterable[str]) -> re.Pattern:
    """Any of the names, the longest first, where no letter or digit touches it; in angle brackets anything may."""

    def spelled(name: str) -> str:
        words = r"\s+".join(map(re.escape, name.split(" ")))
        before, after = (r"(?<!\w)" if name[0].isalnum() else ""), (r"(?!\w)" if name[-1].isalnum() else "")
        return words if name[0] == "<" else f"<{words}>|{before}{words}{after}"

    longest_first = sorted(names, key=len, reverse=True)
    return re.compile(f"(?:embedding:)?(?:{'|'.join(map(spelled, longest_first))})", re.IGNORECASE)


# ------------------------------------------------------------------------------------------ what a weight does

Encode = Callable[[Tensor], Tensor]  # token numbers [r, s] -> encoded tokens [r, s, d]


def a1111(z: Tensor, weights: Tensor) -> Tensor:
    """z w, then all of the row scaled so that its mean is what it was. Source: A1111's "Original" emphasis."""
    weighted = z * weights
    return weighted * (z.mean(dim=(1, 2), keepdim=True) / weighted.mean(dim=(1, 2), keepdim=True))


def no_norm(z: Tensor, weights: Tensor) -> Tensor:
    """z w. Source: A1111's "No norm"; SDXL likes it better, whose means are near zero."""
    return z * weights


def from_empty(z: Tensor, weights: Tensor, empty: Tensor) -> Tensor:
    """empty + (z - empty) w, where `empty` is the encoding of "". Source: ComfyUI."""
    return torch.where(weights == 1, z, (z - empty) * weights + empty)


def compel(z: Tensor, row: Chunk, empty: Tensor, encode: Encode, tokenizer: Tokenizer) -> Tensor:
    """As `from_empty`; and every piece of weight w < 1 draws the row toward its encoding without that piece.

    z_0 with, z_k without the k-th such piece, each weighted from empty: (z_0 + sum tan_k z_k) / (1 + sum tan_k), where
    tan_k = tan((1 - w_k) pi / 2): half way at 0.5, all the way at 0. One row: z [1, s, d].
    Source: Compel with DownweightMode.REMOVE, row by row.
    """
    lowered = {piece: w for piece, w in zip(row.pieces, row.weights, strict=True) if piece >= 0 and w < 1}
    total, shares = from_empty(z, column([row], z), empty), 1.0
    for piece, weight in lowered.items():
        kept = [item for item in zip(row.ids, row.weights, row.pieces, strict=True) if item[2] not in (-1, piece)]
        rest = framed(kept, tokenizer)
        share = math.tan((1 - max(weight, 1e-5)) * math.pi / 2)
        without = encode(torch.tensor([rest.ids], device=z.device))
        total = total + share * from_empty(without, column([rest], z), empty)
        shares += share
    return total / shares


EMPHASIS = ("a1111", "no-norm", "comfyui", "compel", "none")  # "none": brackets are signs like any other


def emphasise(z: Tensor, rows: Sequence[Chunk], how: str, encode: Encode, tokenizer: Tokenizer) -> Tensor:
    """Encoded rows [r, s, d] with the weights of `rows` applied; those without weights come out bit for bit as they were."""
    if all(weight == 1 for row in rows for weight in row.weights):
        return z
    if how == "a1111":
        return a1111(z, column(rows, z))
    if how == "no-norm":
        return no_norm(z, column(rows, z))
    empty = encode(torch.tensor([framed([], tokenizer).ids], device=z.device))
    if how == "comfyui":
        return from_empty(z, column(rows, z), empty)
    weighted = [any(weight != 1 for weight in row.weights) for row in rows]
    return torch.cat(
        [
            compel(one, row, empty, encode, tokenizer) if bent else one
            for one, row, bent in zip(z.split(1), rows, weighted, strict=True)
        ]
    )


def column(rows: Sequence[Chunk], z: Tensor) -> Tensor:
    """The rows' weights, ready to multiply z [r, s, 1]."""
    return torch.tensor([row.weights for row in rows], dtype=z.dtype, device=z.device)[..., None]
