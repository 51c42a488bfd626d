"""Reading and writing weight files, safely: what a file is, and its tensors, mapped from disk and never copied.

A file is told apart by its first bytes, never by its name, and each format has one reader. Everything that a header claims is
checked against the bytes that are there before a tensor is made, so a tensor can only ever show bytes of its own. `.ckpt`
files are zip archives with a pickle inside; `pickles.py` reads those as data and runs nothing. Whatever is wrong with a file
is one `CheckpointError` of one line. Start at `read`; `write` is its counterpart.

A mapped file must not be changed or cut short while it is in use (the system would kill the process); `write` never does
that, it puts a new file in the old one's place.
"""

import contextlib
import json
import math
import os
import secrets
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sdcore.errors import CheckpointError

MAX_HEADER = 16 * 2**20  # bytes of safetensors header; SDXL's largest is 0.4 MB
MAX_TENSORS = 50_000  # SD with EMA and optimiser has 6,000
MAX_RANK = 8
MAX_NAME = 512

DTYPES = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16, "I32": torch.int32, "I64": torch.int64,
    "F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass
class WeightFile:
    """One weight file: its tensors by name (mapped), its text metadata, and the pickle's globals that were left inert."""

    path: Path
    format: str  # "safetensors" or "ckpt"
    tensors: dict[str, Tensor]
    metadata: dict[str, str] = field(default_factory=dict)
    inert: tuple[str, ...] = ()


def read(path: str | os.PathLike) -> WeightFile:
    """All tensors of a `.safetensors` or `.ckpt` file, memory-mapped. CheckpointError when it is anything else or damaged."""
    path = Path(path)
    data = map_bytes(path)
    kind = identify(path, data)
    suffix = path.suffix.lower()
    if kind == "safetensors":
        if suffix in (".ckpt", ".pt", ".pth", ".bin"):
            raise CheckpointError(f"{path}: is a safetensors file named {suffix}; rename it to .safetensors")
        tensors, metadata = read_safetensors(path, data)
        return WeightFile(path, kind, tensors, metadata)
    if suffix == ".safetensors":
        raise CheckpointError(f"{path}: is a torch .ckpt file (a pickle) named .safetensors; rename it to .ckpt")
    from .pickles import read_ckpt

    tensors, metadata, inert = read_ckpt(path, data)
    return WeightFile(path, kind, tensors, metadata, inert)


def map_bytes(path: Path) -> Tensor:
    """The file as a tensor of bytes: mapped, private (writing to it would not reach the file)."""
    try:
        if path.is_dir():
            raise CheckpointError(f"{path}: is a folder, expected a weight file")
        size = path.stat().st_size
        if not path.is_file():
            raise CheckpointError(f"{path}: is not a regular file")
        if size == 0:
            raise CheckpointError(f"{path}: empty file (0 bytes); download it again")
        return torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file") from None
    except (OSError, RuntimeError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be opened ({one_line(error)})") from None


def identify(path: Path, data: Tensor) -> str:
    """`safetensors` or `ckpt`, from the first bytes; CheckpointError that names what else the file is."""
    head = slice_bytes(data, 0, 1024)
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if head.startswith(b"PK\x03\x04"):
        return "ckpt"
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 2**63:
        return "safetensors"
    if text.startswith(b"version https://git-lfs"):
        fields = dict(line.split(" ", 1) for line in head.decode("utf-8", "replace").splitlines() if " " in line)
        oid, size = one_line(fields.get("oid", "?")), one_line(fields.get("size", "?"))
        raise CheckpointError(
            f"{path}: is a git-LFS pointer (oid {oid}, {size} bytes), not the weights; run `git lfs pull`"
        )
    if text.startswith((b"<!doctype", b"<html", b"<?xml")):
        raise CheckpointError(f"{path}: is an HTML page, not a weight file; the download probably needed a login")
    if head[:1] == b"\x80" and head[1:2] in b"\x02\x03\x04\x05" and len(head) > 2:
        raise CheckpointError(
            f"{path}: is a bare pickle (torch older than 1.6, or not torch at all), which is not read here; "
            "load it once where you trust it and save it as .safetensors"
        )
    if len(head) < 16:
        raise CheckpointError(
            f"{path}: truncated: have {len(data)} bytes, too few for any weight file; download it again"
        )
    for magic, name in MAGICS:
        if head.startswith(magic):
            raise CheckpointError(f"{path}: is {name}, expected a .safetensors or .ckpt weight file")
    if not any(head):
        raise CheckpointError(f"{path}: begins with zeros: an interrupted download; download it again")
    if text[:1] in (b"{", b"["):
        raise CheckpointError(f"{path}: is a JSON file, expected a .safetensors or .ckpt weight file")
    if all(byte >= 32 or byte in b"\t\r\n" for byte in head):
        raise CheckpointError(f"{path}: is a text file, expected a .safetensors or .ckpt weight file")
    raise CheckpointError(
        f"{path}: is neither safetensors nor a torch .ckpt (begins with {head[:8].hex(' ')}); download it again"
    )


MAGICS = [
    (b"GGUF", "a GGUF file (a quantised format that is not supported)"), (b"\x89PNG", "a PNG picture"),
    (b"\xff\xd8\xff", "a JPEG picture"), (b"RIFF", "a WebP picture"), (b"\x89HDF", "an HDF5 file"),
    (b"\x1f\x8b", "a gzip archive (unpack it first)"), (b"7z\xbc\xaf", "a 7-Zip archive (unpack it first)"),
    (b"%PDF", "a PDF document"), (b"#!", "a script"),
]  # fmt: skip


# ---------------------------------------------------------------- safetensors


def read_safetensors(path: Path, data: Tensor) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata. Layout: 8 bytes header length, JSON header, then the tensors' bytes without gap or overlap."""
    length = int.from_bytes(slice_bytes(data, 0, 8), "little")
    if length > MAX_HEADER:
        raise CheckpointError(
            f"{path}: header declares {length} bytes, more than the limit of {MAX_HEADER}; the file is damaged"
        )
    if 8 + length > len(data):
        raise CheckpointError(f"{path}: truncated: have {len(data)} bytes, the header alone declares {8 + length}")
    header = parse_header(path, slice_bytes(data, 8, 8 + length))
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointError(f"{path}: __metadata__ is not a table of texts; the file is damaged")
    if len(header) > MAX_TENSORS:
        raise CheckpointError(f"{path}: declares {len(header)} tensors, more than the limit of {MAX_TENSORS}")
    entries = sorted(
        ((*check_entry(path, name, entry), name) for name, entry in header.items()), key=lambda e: (e[0], e[1])
    )
    end = 0
    for begin, stop, *_, name in entries:  # in the order of the bytes: each must begin where the one before it ended
        if begin != end:
            what = "overlaps the tensor before it" if begin < end else f"leaves a hole of {begin - end} bytes before it"
            raise CheckpointError(
                f"{path}: tensor {name} {what} (begins at {begin}, expected {end}); the file is damaged"
            )
        end = stop
    body = len(data) - 8 - length
    if end > body:
        raise CheckpointError(
            f"{path}: truncated: have {len(data)} bytes, the header declares {8 + length + end}; download it again"
        )
    if end < body:
        raise CheckpointError(f"{path}: {body - end} bytes follow the last tensor; the file is damaged")
    base = 8 + length
    return {
        name: view(path, name, data, base + begin, dtype, shape)
        for begin, _, dtype, shape, name in sorted(entries, key=lambda e: e[-1])
    }, metadata


def parse_header(path: Path, text: bytes) -> dict:
    def no_duplicates(pairs: list[tuple[str, object]]) -> dict:
        table = dict(pairs)
        if len(table) != len(pairs):
            raise ValueError("a key occurs twice")
        return table

    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=no_duplicates)
    except (ValueError, RecursionError) as error:  # bad UTF-8 and bad JSON are ValueErrors
        raise CheckpointError(f"{path}: the safetensors header is damaged ({one_line(error)})") from None
    if not isinstance(header, dict):
        raise CheckpointError(f"{path}: the safetensors header is not a table; the file is damaged")
    return header


def check_entry(path: Path, name: str, entry: object) -> tuple[int, int, torch.dtype, tuple[int, ...]]:
    """Begin, end, dtype and shape of one header entry, after every check that does not need its neighbours."""
    check_name(path, name)
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(f"{path}: tensor {name}: expected dtype, shape and data_offsets; the file is damaged")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise CheckpointError(f"{path}: tensor {name}: dtype {one_line(dtype)} is not one of {', '.join(DTYPES)}")
    check_shape(path, name, shape)
    if not are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise CheckpointError(
            f"{path}: tensor {name}: data_offsets {one_line(offsets)} are no range; the file is damaged"
        )
    need, have = math.prod(shape) * DTYPES[dtype].itemsize, offsets[1] - offsets[0]
    if need != have:
        raise CheckpointError(
            f"{path}: tensor {name}: shape {shape} of {dtype} needs {need} bytes, the header gives {have}"
        )
    return offsets[0], offsets[1], DTYPES[dtype], tuple(shape)


def check_name(path: Path, name: object) -> None:
    if not isinstance(name, str) or not name or len(name) > MAX_NAME or not name.isprintable() or ".." in name:
        raise CheckpointError(f"{path}: a tensor is named {one_line(name)}, which is no name; the file is damaged")


def check_shape(path: Path, name: str, shape: Any) -> None:
    if not are_sizes(shape):
        raise CheckpointError(
            f"{path}: tensor {name}: shape {one_line(shape)} is no list of sizes; the file is damaged"
        )
    if len(shape) > MAX_RANK or any(size > 2**40 for size in shape):
        raise CheckpointError(
            f"{path}: tensor {name}: shape {one_line(shape)} exceeds the limit of {MAX_RANK} dimensions of 2^40"
        )


def are_sizes(value: object) -> bool:
    return isinstance(value, list | tuple) and all(type(item) is int and item >= 0 for item in value)


def view(path: Path, name: str, data: Tensor, begin: int, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    """Bytes of the map, from `begin`, as a tensor. Copied only where the file did not align them to their size."""
    raw = data[begin : begin + math.prod(shape) * dtype.itemsize]
    if begin % dtype.itemsize:
        raw = raw.clone()
    if dtype == torch.bool and raw.numel() and raw.max() > 1:
        raise CheckpointError(f"{path}: tensor {name}: a truth value is neither 0 nor 1; the file is damaged")
    return raw.view(dtype).view(shape) if raw.numel() else torch.empty(shape, dtype=dtype)


def slice_bytes(data: Tensor, begin: int, end: int) -> bytes:
    return data[begin:end].numpy().tobytes()


def one_line(value: object) -> str:
    """Any foreign text, safe to print: one line, printable, short."""
    text = "".join(c if c.isprintable() else "?" for c in str(value))
    return text if len(text) <= 80 else text[:77] + "..."


# ---------------------------------------------------------------- writing


def write(
    path: str | os.PathLike,
    tensors: dict[str, Tensor],
    metadata: dict[str, str] | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """A safetensors file, complete or not at all: an existing file stays as it was until the new one is on the disk.

    With `dtype`, floating-point tensors are written in it, one at a time. CheckpointError when the disk is full or the like.
    """
    kinds = {name: dtype if dtype and t.is_floating_point() else t.dtype for name, t in tensors.items()}
    names = sorted(tensors, key=lambda name: (-kinds[name].itemsize, name))  # wide first: every tensor is aligned
    header: dict[str, object] = {"__metadata__": metadata} if metadata else {}
    end = 0
    for name in names:
        begin, end = end, end + tensors[name].numel() * kinds[name].itemsize
        header[name] = {
            "dtype": DTYPE_NAMES[kinds[name]],
            "shape": list(tensors[name].shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with replacing(path) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            raw = tensors[name].detach().to("cpu", kinds[name]).contiguous().reshape(-1).view(torch.uint8)
            file.write(memoryview(raw.numpy()))


@contextlib.contextmanager
def replacing(path: str | os.PathLike):
    """A new binary file beside `path` that takes its place when the block ends well, and vanishes when it does not."""
    path = Path(path)
    part = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    try:
        with open(part, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
        sync_folder(path.parent)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be written ({one_line(error.strerror or error)})") from None
    finally:
        part.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Makes a rename inside `folder` survive a power cut (a folder can be synced on POSIX systems only)."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
