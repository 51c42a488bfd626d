"""Textual-inversion files: every format that people have, read into `sdcore.embeddings.Embedding`.

| written by | file | content |
|---|---|---|
| A1111 | `.pt` | a pickle: `string_to_param: {"*": [n, d]}`, `name`, and `string_to_token`, `step`, ... which are not needed |
| A1111 | `.png` | the same as base64 of JSON in a text chunk `sd-ti-embedding` |
| diffusers | `learned_embeds.bin`, `.safetensors` | `{"<token>": [d] or [n, d]}`; several tokens are several embeddings |
| kohya and others, SD 1.x and 2.x | `.safetensors`, `.pt` | `emb_params: [n, d]` |
| SDXL | `.safetensors` | `clip_l: [n, 768]` and `clip_g: [n, 1280]` |
| pivotal tuning | `.safetensors` | `text_encoders_0: [n, 768]` and `text_encoders_1: [n, 1280]` |
| some trainers | `.pt`, `.bin` | a list of tables: all vectors of a width below each other |
| LoRA with its own word | `.safetensors` | `bundle_emb.<name>.` before `string_to_param.*`, or `clip_l` and `clip_g` |

Where the format has no name inside, the file's own, without its ending, is the name. Pickles are read as data
(`pickles.py`): nothing in them runs. Pictures that hide the numbers in their pixels are not read.
"""

import base64
import binascii
import json
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from sdcore.embeddings import Embedding
from sdcore.errors import AdapterError, CheckpointError, ConfigError

from . import files, pickles

MAX_JSON = 32 * 2**20  # bytes of a picture's text chunk; 75 vectors of 1280 numbers have 2 MB
# How formats call the vectors of the first and the second text encoder.
PAIRS = (("clip_l", "clip_g"), ("text_encoders_0", "text_encoders_1"))
BUNDLED = re.compile(r"^bundle_emb\.(?P<name>.+)\.(?P<key>string_to_param\.\*|emb_params|clip_l|clip_g)$")


def read_embeddings(path: str | Path) -> list[Embedding]:
    """All embeddings of a file: mostly one; of a LoRA file those that came bundled with it.

    Raises CheckpointError where the file cannot be read or is damaged, AdapterError where it is no embedding.
    """
    path = Path(path)
    data = files.map_bytes(path)
    if files.slice_bytes(data, 0, 8) == b"\x89PNG\r\n\x1a\n":
        return [from_picture(path)]
    if files.identify(path, data) == "safetensors":
        return from_tensors(files.read(path).tensors, path)
    archive = pickles.Archive(path, data)
    root, _ = pickles.walk(path, archive.pickle())
    return from_pickle(root, archive, path)


def from_tensors(tensors: Mapping[str, Tensor], path: Path, name: str = "") -> list[Embedding]:
    """Embeddings out of named tensors. `name` is for formats without one; the file's own is taken where it is not given."""
    name = name or path.stem
    bundled = {key: found for key in tensors if (found := BUNDLED.match(key))}
    if bundled:
        tables: dict[str, dict[str, Tensor]] = {}
        for key, found in bundled.items():
            tables.setdefault(found["name"], {})[found["key"]] = tensors[key]
        return [one for inner, table in tables.items() for one in from_tensors(table, path, inner)]
    keys = set(tensors)
    for pair in PAIRS:
        if keys == set(pair):
            return [Embedding(name, tuple(rows(tensors[key], key, path) for key in pair))]
        if keys & set(pair):
            extra = keys - set(pair)
            problem = f"also holds {files.one_line(min(extra))}" if extra else f"lacks {min(set(pair) - keys)}"
            raise AdapterError(f"{path}: an embedding for two text encoders ({' and '.join(pair)}) that {problem}")
    for key in ("emb_params", "string_to_param.*"):
        if key in keys:
            if extra := keys - {key}:
                raise AdapterError(f"{path}: an embedding ({key}) that also holds {files.one_line(min(extra))}")
            return [Embedding(name, (rows(tensors[key], key, path),))]
    if not keys or any("." in key or len(key) > 200 for key in keys) or len(keys) > 64:
        raise AdapterError(
            f"{path}: is no textual-inversion embedding; expected emb_params, clip_l and clip_g, text_encoders_0 and _1, "
            f"or tokens, found {len(keys)} tensors such as {files.one_line(min(keys, default='none'))}"
        )
    return [Embedding(token, (rows(vectors, token, path),)) for token, vectors in tensors.items()]


def from_pickle(root: object, archive: pickles.Archive, path: Path) -> list[Embedding]:
    """Embeddings out of what a `.pt` or `.bin` holds: A1111's table, a table of tensors, or a list of such tables."""
    if isinstance(root, dict) and "string_to_param" in root:
        found = tensors_of(root["string_to_param"], archive, path)
        if len(found) != 1:
            raise AdapterError(
                f"{path}: string_to_param holds {len(found)} tensors, expected one; its word would be unclear"
            )
        name = root.get("name")
        return from_tensors({"emb_params": next(iter(found.values()))}, path, name if isinstance(name, str) else "")
    if isinstance(root, dict):
        return from_tensors(tensors_of(root, archive, path), path)
    if isinstance(root, list) and root and all(isinstance(item, dict) for item in root):
        by_width: dict[int, list[Tensor]] = {}
        for item in root:
            for key, vectors in tensors_of(item, archive, path).items():
                vectors = rows(vectors, key, path)
                by_width.setdefault(vectors.shape[1], []).append(vectors)
        if by_width:  # the narrower one is the first encoder's
            return [Embedding(path.stem, tuple(torch.cat(by_width[width]) for width in sorted(by_width)))]
    raise AdapterError(f"{path}: holds {pickles.describe(root)}, expected a textual-inversion embedding")


def tensors_of(table: object, archive: pickles.Archive, path: Path) -> dict[str, Tensor]:
    """The tensors of one table. Plain numbers and texts beside them (step, name) say nothing about the vectors."""
    if isinstance(table, pickles.Inert) and isinstance(table.state, dict):  # torch's ParameterDict
        table = table.state.get("_parameters")
    if not isinstance(table, dict):
        raise AdapterError(f"{path}: holds {pickles.describe(table)} where a table of vectors was expected")
    found = {}
    for key, value in table.items():
        if isinstance(value, pickles.LazyTensor):
            name = str(key) if isinstance(key, str | int) else "?"
            files.check_name(path, name)
            found[name] = archive.tensor(name, value)
        elif isinstance(value, pickles.Inert):
            raise CheckpointError(f"{path}: entry {files.one_line(key)} is {pickles.describe(value)}; refused")
    return found


def from_picture(path: Path) -> Embedding:
    """An embedding that A1111 wrote into a PNG's text."""
    from PIL import Image

    try:
        with Image.open(path, formats=["PNG"]) as file:
            text = file.info.get("sd-ti-embedding", "")
    except Exception as error:  # Pillow raises half a dozen types on damaged files
        raise CheckpointError(f"{path}: a PNG that is damaged ({files.one_line(error)})") from None
    if not isinstance(text, str) or not text:
        raise AdapterError(
            f"{path}: a picture without an embedding in its text (sd-ti-embedding); pixels are not searched"
        )
    if len(text) > MAX_JSON:
        raise AdapterError(f"{path}: an embedding of {len(text)} bytes of text, more than the limit of {MAX_JSON}")
    try:
        table = json.loads(base64.b64decode(text, validate=True))
        (vectors,) = table["string_to_param"].values()
        tensor = torch.tensor(vectors["TORCHTENSOR"], dtype=torch.float32)
        name = table.get("name")
    except (binascii.Error, ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError) as error:
        raise AdapterError(f"{path}: the embedding in its text is damaged ({files.one_line(error)})") from None
    return Embedding(name if isinstance(name, str) and name else path.stem, (rows(tensor, "TORCHTENSOR", path),))


def rows(vectors: Tensor, key: str, path: Path) -> Tensor:
    """One vector [d] or several [n, d] -> [n, d]; AdapterError for another shape or whole numbers."""
    if vectors.ndim not in (1, 2) or not vectors.is_floating_point() or not vectors.numel():
        raise AdapterError(
            f"{path}: {files.one_line(key)} is {list(vectors.shape)} of {str(vectors.dtype).removeprefix('torch.')}; "
            "expected vectors [n, d] of floats"
        )
    return vectors.reshape(-1, vectors.shape[-1])


# ---------------------------------------------------------------- writing


def write_embedding(path: str | Path, embedding: Embedding, layout: str) -> None:
    """An embedding as a `.safetensors` file; for one text encoder named as A1111's kin ("a1111") or "diffusers" name it.

    In A1111's the file's own name is the word. For two text encoders both read `clip_l` and `clip_g`. ConfigError for an unknown
    layout, AdapterError for three encoders or more.
    """
    if layout not in ("a1111", "diffusers"):
        raise ConfigError(f"layout {layout!r}: expected a1111 or diffusers for an embedding")
    count = len(embedding.vectors)
    if count > 2:
        raise AdapterError(f"embedding {embedding.name!r}: for {count} text encoders, and files are for one or two")
    keys = PAIRS[0] if count == 2 else ("emb_params" if layout == "a1111" else embedding.name,)
    files.write(Path(path), dict(zip(keys, embedding.vectors, strict=True)), {"format": "pt", "name": embedding.name})
