"""Text to token ids: the byte-pair tokenizer of CLIP, which every Stable Diffusion text encoder reads.

A prompt is cleaned, cut into words, and every word is spelled in bytes, the last one marked `</w>` (the word ends).
Then neighbours that the `merges` table lists are glued together, the highest listed first, until nothing more can be
glued; what is left are the tokens, and `vocab` numbers them. One row for the text encoder is `start, tokens..., end,
pad, pad...`, always `max_length` long. Read `clean`, then `Tokenizer.encode_batch`, then how a folder is read.

The cleaning is that of OpenAI's original (CLIP, `simple_tokenizer.py`): HTML entities are resolved twice, white space
is squeezed, letters are lowered. Of its first step, the ftfy library's repair of mis-decoded text ("Ã©" for "é", curly
quotes), only the Unicode composition (NFC) is done. transformers' fast tokenizer composes too, but leaves HTML entities
as they are.

Legend: b prompts in a batch, s = max_length tokens in a row.
"""

from __future__ import annotations

import html
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import tokenizers
import torch
from tokenizers import Regex, models, normalizers, pre_tokenizers
from torch import Tensor

from .errors import CheckpointError, PromptError

START, END, WORD_END = "<|startoftext|>", "<|endoftext|>", "</w>"
CLIP_LENGTH = 77  # rows of every released model; used only where a tokenizer folder does not say its own length
MAX_PROMPT_BYTES = 64 * 1024  # a longer prompt is a mistake (only the first 75 tokens count) and costs time
MAX_FILE_BYTES = 16 * 1024 * 1024  # the released vocab.json has 1.1 MB

# A word: the tail of an English contraction, a run of letters, one digit (numbers are spelled), a run of other signs.
WORDS = r"'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"
_compose = normalizers.NFC()  # not unicodedata's: that one sorts long runs of accents in quadratic time


class Tokens(NamedTuple):
    """What the text encoder reads, and what did not fit."""

    ids: Tensor  # [b, s] int64
    dropped: list[str]  # per prompt: the end of the cleaned text that was cut off, "" where everything fitted


def clean(text: str) -> str:
    """Return the text as the byte-pair merges see it: entities resolved, composed, squeezed, lower case.

    Raises PromptError for what is no text, is longer than 64 KiB, or has half a surrogate pair (not writable as UTF-8).
    """
    if not isinstance(text, str):
        raise PromptError(f"prompt: expected a text (str), found {type(text).__name__}; pass str(...)")
    size = len(text)
    if size <= MAX_PROMPT_BYTES:  # a cheap look first: do not encode a gigabyte to find that it is too long
        try:
            size = len(text.encode())
        except UnicodeEncodeError as error:
            raise PromptError(
                f"prompt: character {error.start} (U+{ord(text[error.start]):04X}) is half of a surrogate pair, "
                "no letter; remove it, or decode the text again as UTF-8"
            ) from None
    if size > MAX_PROMPT_BYTES:
        raise PromptError(f"prompt: at most {MAX_PROMPT_BYTES} bytes, found {size}; a model reads only the first words")
    text = html.unescape(html.unescape(_compose.normalize_str(text)))  # &#xD800; gives U+FFFD, no half pair
    return re.sub(r"\s+", " ", text).strip().lower()


class Tokenizer:
    """CLIP's byte-pair tokenizer over any vocabulary: `tok(["a red circle"])` -> ids [b, s]."""

    def __init__(
        self, vocab: dict[str, int], merges: Sequence[tuple[str, str]], pad: str = END, max_length: int = CLIP_LENGTH
    ):
        """`vocab` numbers the tokens, `merges` lists the pairs to glue, the strongest first; `pad` fills a row up.

        Raises CheckpointError: start, end or pad are missing, a merge makes an unknown token, the ids are not 0..n-1.
        """
        for token in (START, END, pad):
            if token not in vocab:
                raise CheckpointError(
                    f"tokenizer: no {token!r} among the {len(vocab)} tokens; is it CLIP's vocabulary?"
                )
        if sorted(vocab.values()) != list(range(len(vocab))):
            raise CheckpointError(
                f"tokenizer: vocab.json must number its {len(vocab)} tokens 0..{len(vocab) - 1}, each once"
            )
        if max_length < 3:
            raise CheckpointError(
                f"tokenizer: rows of {max_length} tokens cannot hold start, a word and end; at least 3"
            )
        self.max_length, self.vocab_size = max_length, len(vocab)
        self.bos_id, self.eos_id, self.pad_id = vocab[START], vocab[END], vocab[pad]
        try:
            # A byte that a small vocabulary lacks becomes the end token, as in transformers.
            bpe = models.BPE(vocab=vocab, merges=list(merges), end_of_word_suffix=WORD_END, unk_token=END)
        except Exception as error:  # the library raises a bare Exception that names the token
            raise CheckpointError(f"tokenizer: vocabulary and merges are not of one model ({error})") from None
        self._bpe = tokenizers.Tokenizer(bpe)
        self._bpe.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(
                    Regex(WORDS), behavior="removed", invert=True
                ),  # the words, without what is between
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),  # spelled in stand-ins for bytes
            ]
        )
        self._bpe.add_special_tokens([START, END])  # written out in a prompt they mean themselves, as in the original

    def encode(self, text: str) -> list[int]:
        """Return the ids of the whole text, however long, without start and end. Raises PromptError as `clean` does."""
        return self._bpe.encode(clean(text), add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> Tokens:
        """Return rows [b, s] = start, ids, end, padding, and per prompt the text cut off behind s - 2 tokens.

        Raises PromptError for an empty list and as `clean` does; an empty text is fine (the usual negative prompt).
        """
        if isinstance(texts, str) or not isinstance(texts, Sequence) or not texts:
            raise PromptError(f"prompts: expected a list of at least one text, found {type(texts).__name__}")
        room = self.max_length - 2
        ids = torch.full((len(texts), self.max_length), self.pad_id, dtype=torch.int64)
        dropped = []
        for row, text in zip(ids, map(clean, texts), strict=True):
            found = self._bpe.encode(text, add_special_tokens=False)
            kept = [self.bos_id, *found.ids[:room], self.eos_id]
            row[: len(kept)] = torch.tensor(kept)
            dropped.append(text[found.offsets[room][0] :] if len(found.ids) > room else "")
        return Tokens(ids, dropped)

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """Return `encode_batch(texts).ids`, for callers who have no use for the notice."""
        return self.encode_batch(texts).ids

    @classmethod
    def from_files(
        cls, vocab_json: str | Path, merges_txt: str | Path, pad: str = END, max_length: int = CLIP_LENGTH
    ) -> Tokenizer:
        """Read `vocab.json` (token -> id) and `merges.txt` (a pair a line). Raises CheckpointError."""
        lines = _read_text(Path(merges_txt)).split("\n")
        if "#version" in lines[0]:
            lines = lines[1:]
        merges = [tuple(line.split(" ")) for line in lines if line]
        return cls(_vocab(_read_json(Path(vocab_json)), vocab_json), _merges(merges, merges_txt), pad, max_length)

    @classmethod
    def from_folder(cls, folder: str | Path, max_length: int | None = None) -> Tokenizer:
        """Read a `tokenizer/` folder of the diffusers layout, with vocab.json and merges.txt or tokenizer.json alone.

        The pad token is that of special_tokens_map.json, else of tokenizer_config.json, else END: ViT-L (SD 1)
        pads with END, the OpenCLIP towers (SD 2, SDXL's second) with "!", id 0. `max_length`, unless given, is that of
        tokenizer_config.json. Raises CheckpointError naming the file that is missing or damaged.
        """
        folder = Path(folder)
        config = _read_json(folder / "tokenizer_config.json", optional=True)
        special = _read_json(folder / "special_tokens_map.json", optional=True)
        pad = special.get("pad_token") or config.get("pad_token") or END
        pad = pad.get("content") if isinstance(pad, dict) else pad
        if max_length is None:
            max_length = config.get("model_max_length", CLIP_LENGTH)
        if not isinstance(pad, str) or not isinstance(max_length, int) or not 3 <= max_length <= 65536:
            raise CheckpointError(
                f"{folder}/tokenizer_config.json: pad_token {pad!r:.40}, model_max_length {max_length!r:.40}; "
                "expected a token and a number from 3 to 65536"
            )
        if (folder / "vocab.json").exists() or not (folder / "tokenizer.json").exists():
            return cls.from_files(folder / "vocab.json", folder / "merges.txt", pad, max_length)
        file = folder / "tokenizer.json"  # what transformers 5 writes instead of the two
        model = _read_json(file).get("model")
        if not isinstance(model, dict) or model.get("type") != "BPE" or model.get("end_of_word_suffix") != WORD_END:
            raise CheckpointError(f"{file}: expected a byte-pair model whose words end in {WORD_END!r}, as CLIP's")
        merges = [m.split(" ") if isinstance(m, str) else m for m in model.get("merges") or []]
        return cls(_vocab(model.get("vocab"), file), _merges(merges, file), pad, max_length)


def clip_vocabulary(merges: Sequence[tuple[str, str]]) -> dict[str, int]:
    """Return the vocabulary that merges imply: 256 bytes, the same ending a word, one token a merge, start, end.

    With the 48,894 merges of OpenAI's file this is the released vocabulary of 49,408.
    """
    # A byte is written as a printable character: itself where it is one, else the next free one from U+0100 on.
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    symbols = [chr(b) for b in printable] + [chr(256 + i) for i in range(256 - len(printable))]
    tokens = [*symbols, *(s + WORD_END for s in symbols), *(a + b for a, b in merges), START, END]
    return {token: i for i, token in enumerate(tokens)}


def _vocab(found: Any, file: str | Path) -> dict[str, int]:
    if not isinstance(found, dict) or not all(type(i) is int for i in found.values()):
        raise CheckpointError(f"{file}: expected a table of tokens and their numbers, as in CLIP's vocab.json")
    return found


def _merges(found: Sequence, file: str | Path) -> list[tuple[str, str]]:
    for i, pair in enumerate(found):
        if not isinstance(pair, (list, tuple)) or len(pair) != 2 or not all(isinstance(part, str) for part in pair):
            raise CheckpointError(f"{file}: merge {i} is {str(pair)[:60]!r}; expected two tokens")
    return [(left, right) for left, right in found]


def _read_json(file: Path, optional: bool = False) -> dict:
    if optional and not file.exists():
        return {}
    try:
        found = json.loads(_read_text(file))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file}: not valid JSON ({error}); copy the folder again") from None
    if not isinstance(found, dict):
        raise CheckpointError(f"{file}: expected a JSON object, found {type(found).__name__}; copy the folder again")
    return found


def _read_text(file: Path) -> str:
    try:
        if file.stat().st_size > MAX_FILE_BYTES:
            raise CheckpointError(f"{file}: larger than {MAX_FILE_BYTES} bytes; no tokenizer has such a file")
        return file.read_text(encoding="utf-8")
    except OSError as error:
        problem = error.strerror or error
        raise CheckpointError(f"{file}: {problem}; a tokenizer needs vocab.json and merges.txt") from None
    except UnicodeDecodeError:
        raise CheckpointError(f"{file}: not a UTF-8 text; copy the tokenizer folder again") from None
