"""Textual inversion: words of one's own, each a few learned vectors that a text encoder reads in place of a token's.

    from sdcore.weights.embeddings import read_embeddings
    for embedding in read_embeddings("bad-hands.safetensors"):
        embeddings.attach(pipe, embedding)
    pipe("a portrait", negative="bad-hands")       # or embedding:bad-hands, or <bad-hands>

Attached embeddings are a table beside the pipeline, `pipe.embeddings`: the text encoder's own table is not grown, no token is
added to the tokenizer, nothing of the model changes, and `detach` has nothing to put back. In a prompt a name is found as it
is written, in any case, where no letter or digit touches it. A name of n vectors takes the room of n tokens.

The vector for a whole prompt that SDXL reads is taken at the real end token. (diffusers takes it at the largest token number,
which is the added token's own: with its SDXL pipelines the pooled vector differs as soon as an embedding is used.)

Source: Gal et al. 2022 (2208.01618). Legend: n vectors of an embedding, d width of the text encoder.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sdcore.errors import AdapterError

if TYPE_CHECKING:
    from sdcore.pipeline import Pipeline

SIGNS = r"()[]:|\<>,"  # of the prompt's grammar: a name with one of them could not be written there
WIDTHS = {(768,): "SD 1.x", (1024,): "SD 2.x", (768, 1280): "SDXL", (1280,): "the SDXL refiner"}


@dataclass(frozen=True)
class Embedding:
    """A word and its vectors."""

    name: str
    vectors: tuple[Tensor, ...]  # one [n, d] a text encoder, in the pipeline's order

    def __post_init__(self) -> None:
        """Raise AdapterError for what can be no embedding, whatever the model."""
        if not self.vectors:
            raise AdapterError(f"embedding {self.name!r:.80}: holds no vectors")
        for vectors in self.vectors:
            if (
                not isinstance(vectors, Tensor)
                or vectors.ndim != 2
                or not vectors.is_floating_point()
                or not len(vectors)
            ):
                found = (
                    f"{list(vectors.shape)} {vectors.dtype}" if isinstance(vectors, Tensor) else type(vectors).__name__
                )
                raise AdapterError(f"embedding {self.name!r:.80}: expected vectors [n, d] of floats, found {found}")
            if not vectors.isfinite().all():
                raise AdapterError(f"embedding {self.name!r:.80}: NaN or infinity in it; the file is damaged")

    @property
    def family(self) -> str:
        """The models whose text encoders have these widths."""
        return WIDTHS.get(self.widths, f"a model of width {self.widths}")

    @property
    def widths(self) -> tuple[int, ...]:
        return tuple(vectors.shape[1] for vectors in self.vectors)


def attach(pipe: Pipeline, embedding: Embedding, name: str | None = None) -> None:
    """Let prompts use the embedding, by `name` or else its own. `detach` undoes it without trace.

    Raises AdapterError, and changes nothing, where the widths are not those of the pipeline's text encoders, a row of tokens
    has no room for so many vectors, or the name cannot be written in a prompt, is taken, or is a word the model knows.
    """
    name = clean_name(embedding.name if name is None else name)
    wanted = tuple(encoder.config.width for encoder in pipe.text_encoders)
    if embedding.widths != wanted:
        raise AdapterError(
            f"embedding {name!r}: its vectors are {_widths(embedding.widths)} wide ({embedding.family}), this {pipe.family} "
            f"model's text encoders {_widths(wanted)}; it belongs to another model"
        )
    for vectors, tokenizer in zip(embedding.vectors, pipe.tokenizers, strict=True):
        if len(vectors) > tokenizer.max_length - 2:
            raise AdapterError(
                f"embedding {name!r}: {len(vectors)} vectors, a row of tokens has room for {tokenizer.max_length - 2}"
            )
        if len(tokenizer.encode(name)) == 1:
            raise AdapterError(
                f"embedding {name!r}: is a word that the model knows; attach it under another name (name=...)"
            )
    if name.lower() in (known.lower() for known in pipe.embeddings):
        raise AdapterError(f"embedding {name!r}: another one has this name; detach it first, or give name=...")
    pipe.embeddings[name] = embedding


def detach(pipe: Pipeline, name: str) -> Embedding:
    """Take an embedding away again, and return it. Raises AdapterError for a name that is not attached."""
    for known in pipe.embeddings:
        if known.lower() == clean_name(name).lower():
            return pipe.embeddings.pop(known)
    raise AdapterError(f"embedding {name!r:.80}: not attached; attached are: {', '.join(pipe.embeddings) or 'none'}")


def clean_name(name: str) -> str:
    """The name with white space squeezed. One in angle brackets, as diffusers' files have it, is only ever found in them."""
    if not isinstance(name, str):
        raise AdapterError(f"embedding: its name must be a text, found {type(name).__name__}")
    name = re.sub(r"\s+", " ", name).strip()
    bare = name[1:-1] if name.startswith("<") and name.endswith(">") else name
    if not bare.strip() or len(name) > 200 or not name.isprintable() or set(bare) & set(SIGNS):
        raise AdapterError(
            f"embedding {name!r:.80}: cannot be written in a prompt (empty, or has one of {' '.join(SIGNS)}); give name=..."
        )
    return name


def numbers(embeddings: dict[str, Embedding], encoder: int, vocab: int) -> dict[str, Sequence[int]]:
    """Name -> the token numbers of its vectors in one encoder: `vocab` and up, in the order of `table`."""
    found: dict[str, Sequence[int]] = {}
    at = vocab
    for name, embedding in embeddings.items():
        count = len(embedding.vectors[encoder])
        found[name] = range(at, at + count)
        at += count
    return found


def table(embeddings: dict[str, Embedding], encoder: int) -> Tensor | None:
    """All vectors of one encoder below each other [sum of n, d], for `CLIPText.forward(ids, extra)`."""
    if not embeddings:
        return None
    return torch.cat([embedding.vectors[encoder].float() for embedding in embeddings.values()])


def _widths(widths: Sequence[int]) -> str:
    return " and ".join(map(str, widths))
