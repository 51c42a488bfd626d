"""Reading `.ckpt` (torch's zip of a pickle and raw storages) as data: no import, no call, nothing in it can run.

A pickle is a program for a small stack machine. `walk` is that machine with the dangerous half missing: a global is an
`Inert` with a name, calling one gives another `Inert`, and only three calls mean something (an ordered dict, a tensor, a
parameter), each checked and carried out here. Official checkpoints carry Lightning's callbacks and numpy scalars; those stay
inert and are listed. Storages are stored plainly in the archive, so tensors are views of the mapped file; their CRC is
checked, and no tensor may claim more elements than its storage has.
"""

import pickletools
import zipfile
import zlib
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from sdcore.errors import CheckpointError

from .files import MAX_TENSORS, check_name, check_shape, one_line, slice_bytes, view

MAX_PICKLE = 32 * 2**20  # bytes; v1-5-pruned.ckpt has 0.3 MB
MAX_STEPS = 600_000  # opcodes; v1-5-pruned.ckpt has 0.1 million
STORAGES = {
    "DoubleStorage": torch.float64, "FloatStorage": torch.float32, "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16, "LongStorage": torch.int64, "IntStorage": torch.int32, "ShortStorage": torch.int16,
    "CharStorage": torch.int8, "ByteStorage": torch.uint8, "BoolStorage": torch.bool,
}  # fmt: skip


@dataclass(eq=False, repr=False)
class Inert:
    """A global, or the result of calling one: a name that does nothing. Lightning uses classes as keys, so it can be one.

    It has no repr of its parts: a hostile state can hold itself a thousandfold, and printing it would take for ever.
    """

    name: str
    state: object = None


@dataclass(eq=False, repr=False)
class Storage:
    key: str
    dtype: torch.dtype
    count: int


@dataclass(eq=False, repr=False)
class LazyTensor:
    """What a tensor of the pickle claims; nothing of it is believed before `Archive.tensor`."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


def read_ckpt(path: Path, data: Tensor) -> tuple[dict[str, Tensor], dict[str, str], tuple[str, ...]]:
    """Tensors by name, plain values of the top level as text, and the names of what it would have called."""
    archive = Archive(path, data)
    root, inert = walk(path, archive.pickle())
    if isinstance(root, list) and root and all(isinstance(item, LazyTensor) for item in root):
        root = {str(i): item for i, item in enumerate(root)}  # cloneofsimo's LoRA: nothing but tensors, in order
    if not isinstance(root, dict):
        raise CheckpointError(f"{path}: holds {describe(root)}, expected a table of tensors")
    chosen = next((root[key] for key in ("state_dict", "model", "params") if isinstance(root.get(key), dict)), None)
    plain = {k: v for k, v in root.items() if isinstance(k, str) and isinstance(v, str | int | float)}
    metadata = {k: str(v) for k, v in plain.items() if not isinstance(v, int) or abs(v) < 2**63}
    lazy = dict(flatten(path, root if chosen is None else chosen, strict=chosen is not None))
    if len(lazy) > MAX_TENSORS:
        raise CheckpointError(f"{path}: declares {len(lazy)} tensors, more than the limit of {MAX_TENSORS}")
    return {name: archive.tensor(name, claim) for name, claim in lazy.items()}, metadata, tuple(sorted(inert))


def flatten(path: Path, table: dict, strict: bool, prefix: str = ""):
    """Named tensors of a state dict; embeddings (.pt) keep theirs one table deeper. Anything that is no data is refused."""
    for key, value in table.items():
        if isinstance(value, Inert) and value.name == "torch.nn.modules.container.ParameterDict":
            value = value.state.get("_parameters") if isinstance(value.state, dict) else None
        name = f"{prefix}{key}" if isinstance(key, str | int) else ""
        if isinstance(value, LazyTensor):
            check_name(path, name)
            yield name, value
        elif isinstance(value, dict) and not prefix and not strict:
            yield from flatten(path, value, True, f"{name}.")
        elif isinstance(value, Inert | Storage | bytes):
            raise CheckpointError(
                f"{path}: entry {one_line(name) or '?'} is {describe(value)}, expected a tensor; refused"
            )


def describe(value: object) -> str:
    return (
        f"the object {one_line(value.name)}" if isinstance(value, Inert) else f"a value of type {type(value).__name__}"
    )


# ---------------------------------------------------------------- the archive


class Archive:
    """The zip around the pickle: plain (not deflated, not encrypted) entries, each named once, none overlapping another."""

    def __init__(self, path: Path, data: Tensor):
        self.path, self.data = path, data
        try:
            with zipfile.ZipFile(path) as archive:
                infos = archive.infolist()
        except Exception as error:  # zipfile raises a dozen types on damaged archives; each means this one thing
            raise CheckpointError(
                f"{path}: truncated or damaged: have {len(data)} bytes and no readable zip directory ({one_line(error)})"
            ) from None
        if len(infos) > 2 * MAX_TENSORS:
            raise CheckpointError(
                f"{path}: the archive has {len(infos)} entries, more than the limit of {2 * MAX_TENSORS}"
            )
        self.entries: dict[str, tuple[int, int, int]] = {}  # name inside the archive -> begin, size, crc
        end = 0
        for info in sorted(infos, key=lambda info: info.header_offset):
            begin = self.check(info, end)
            end = begin + info.file_size
            self.entries[info.filename] = (begin, info.file_size, info.CRC)
        pickles = [name for name in self.entries if name.split("/")[1:] == ["data.pkl"]]
        if len(pickles) != 1:
            raise CheckpointError(f"{path}: is a zip archive without one data.pkl: not a torch checkpoint")
        self.root = pickles[0].removesuffix("data.pkl")
        if f"{self.root}byteorder" in self.entries and self.content(f"{self.root}byteorder") != b"little":
            raise CheckpointError(f"{path}: was written on a big-endian machine; save it again on a little-endian one")

    def check(self, info: zipfile.ZipInfo, end: int) -> int:
        """Where the entry's bytes begin, by its own header, which must agree with the directory."""
        name = one_line(info.filename)
        if info.filename in self.entries:
            raise CheckpointError(f"{self.path}: archive entry {name} occurs twice")
        if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1 or info.compress_size != info.file_size:
            raise CheckpointError(f"{self.path}: archive entry {name} is compressed or encrypted; torch writes neither")
        header = slice_bytes(self.data, info.header_offset, info.header_offset + 30)
        begin = (
            info.header_offset + 30 + int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
        )
        written = slice_bytes(
            self.data, info.header_offset + 30, info.header_offset + 30 + len(info.orig_filename.encode())
        )
        if header[:4] != b"PK\x03\x04" or written != info.orig_filename.encode() or info.header_offset < end:
            raise CheckpointError(
                f"{self.path}: archive entry {name} does not lie where the directory says; the file is damaged"
            )
        if begin + info.file_size > len(self.data):
            raise CheckpointError(
                f"{self.path}: truncated: have {len(self.data)} bytes, entry {name} needs {begin + info.file_size}"
            )
        return begin

    def content(self, name: str) -> bytes:
        begin, size, _ = self.checked(name)
        return slice_bytes(self.data, begin, begin + size)

    def pickle(self) -> bytes:
        if self.entries[f"{self.root}data.pkl"][1] > MAX_PICKLE:
            raise CheckpointError(f"{self.path}: its pickle is larger than the limit of {MAX_PICKLE} bytes")
        return self.content(f"{self.root}data.pkl")

    def checked(self, name: str) -> tuple[int, int, int]:
        """The entry, once its CRC has been found right (entries are marked so that shared storages are read once)."""
        begin, size, crc = self.entries[name]
        if crc >= 0:
            if zlib.crc32(self.data[begin : begin + size].numpy()) != crc:
                raise CheckpointError(
                    f"{self.path}: archive entry {one_line(name)} is damaged (CRC differs); download it again"
                )
            self.entries[name] = (begin, size, -1)
        return self.entries[name]

    def tensor(self, name: str, claim: LazyTensor) -> Tensor:
        """The claimed view of its storage, after every number in the claim has been checked against the bytes there."""
        storage, shape, stride = claim.storage, claim.shape, claim.stride
        check_shape(self.path, name, shape)
        entry = f"{self.root}data/{storage.key}"
        if entry not in self.entries:
            raise CheckpointError(
                f"{self.path}: tensor {name}: its storage {one_line(entry)} is missing; the file is damaged"
            )
        begin, size, _ = self.entries[entry]
        if storage.count * storage.dtype.itemsize != size:
            raise CheckpointError(
                f"{self.path}: tensor {name}: storage {one_line(entry)} declares "
                f"{storage.count * storage.dtype.itemsize} bytes, {size} are there"
            )
        check_shape(self.path, name, stride)
        elements = torch.Size(shape).numel()
        last = (
            claim.offset + sum((n - 1) * s for n, s in zip(shape, stride, strict=True))
            if elements
            else claim.offset - 1
        )
        if (
            elements > storage.count
            or last >= storage.count
            or any(n > 1 and s == 0 for n, s in zip(shape, stride, strict=True))
        ):
            raise CheckpointError(
                f"{self.path}: tensor {name}: claims {elements} elements (shape {list(shape)}, stride {list(stride)}) "
                f"from a storage of {storage.count}"
            )
        self.checked(entry)
        flat = view(self.path, name, self.data, begin, storage.dtype, (storage.count,))
        return (
            flat.as_strided(shape, stride, flat.storage_offset() + claim.offset) if elements else flat.new_empty(shape)
        )


# ---------------------------------------------------------------- the pickle


def walk(path: Path, program: bytes) -> tuple[object, set[str]]:
    """The pickle's value as plain data with `Inert` and `LazyTensor` in it, and the names of what it would have called."""
    machine = Machine()
    try:
        for step, (opcode, argument, _) in enumerate(pickletools.genops(program)):
            if step > MAX_STEPS:
                raise ValueError(f"more than {MAX_STEPS} steps")
            if opcode.name == "STOP":
                return machine.stack[-1], machine.inert
            machine.step(opcode.name, argument)
        raise ValueError("it has no end")
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError, OverflowError) as error:
        raise CheckpointError(f"{path}: its pickle is damaged or hostile ({one_line(error)})") from None


@dataclass
class Machine:
    """The stack machine of pickle (pickletools.py documents every opcode), with data opcodes only."""

    stack: list = field(default_factory=list)
    marks: list[int] = field(default_factory=list)
    memo: dict[int, object] = field(default_factory=dict)
    inert: set[str] = field(default_factory=set)

    def step(self, op: str, argument) -> None:
        stack = self.stack
        match op:
            case "PROTO" | "FRAME":
                pass
            case "NONE" | "NEWTRUE" | "NEWFALSE":
                stack.append({"NONE": None, "NEWTRUE": True, "NEWFALSE": False}[op])
            case "INT" | "BININT" | "BININT1" | "BININT2" | "LONG" | "LONG1" | "LONG4" | "FLOAT" | "BINFLOAT":
                stack.append(argument)
            case "UNICODE" | "BINUNICODE" | "SHORT_BINUNICODE" | "BINUNICODE8":
                stack.append(argument)
            case (
                "STRING" | "BINSTRING" | "SHORT_BINSTRING" | "BINBYTES" | "SHORT_BINBYTES" | "BINBYTES8" | "BYTEARRAY8"
            ):
                stack.append(argument)
            case "EMPTY_DICT" | "EMPTY_LIST" | "EMPTY_TUPLE" | "EMPTY_SET":
                stack.append({"EMPTY_DICT": {}, "EMPTY_TUPLE": ()}.get(op, []))  # a set stays a list: nothing is hashed
            case "MARK":
                self.marks.append(len(stack))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                count = int(op[-1])
                stack.append(tuple(self.pop() for _ in range(count))[::-1])
            case "TUPLE":
                stack.append(tuple(self.since_mark()))
            case "LIST" | "FROZENSET":
                stack.append(self.since_mark())
            case "DICT":
                items = self.since_mark()
                stack.append({})
                self.set_items(items)
            case "APPEND":
                self.extend([self.pop()])
            case "APPENDS" | "ADDITEMS":
                self.extend(self.since_mark())
            case "SETITEM":
                value, key = self.pop(), self.pop()
                self.set_items([key, value])
            case "SETITEMS":
                self.set_items(self.since_mark())
            case "POP":
                self.pop()
            case "POP_MARK":
                self.since_mark()
            case "DUP":
                stack.append(stack[-1])
            case "PUT" | "BINPUT" | "LONG_BINPUT":
                self.memo[argument] = stack[-1]
            case "MEMOIZE":
                self.memo[len(self.memo)] = stack[-1]
            case "GET" | "BINGET" | "LONG_BINGET":
                stack.append(self.memo[argument])
            case "GLOBAL":
                stack.append(Inert(argument.replace(" ", ".")))
            case "STACK_GLOBAL":
                name, module = self.pop(), self.pop()
                stack.append(Inert(f"{text(module)}.{text(name)}"))
            case "BINPERSID":
                stack.append(storage(self.pop()))
            case "REDUCE" | "NEWOBJ":
                arguments, function = self.pop(), self.pop()
                stack.append(self.call(function, arguments))
            case "BUILD":
                state, target = self.pop(), self.stack[-1]
                if isinstance(target, Inert):
                    target.state = state  # on a dict it is torch's `_metadata`: not needed
            case _:
                raise ValueError(f"opcode {op} has no place in a checkpoint")

    def pop(self):
        if self.marks and len(self.stack) <= self.marks[-1]:
            raise ValueError("the stack is empty")
        return self.stack.pop()

    def since_mark(self) -> list:
        at = self.marks.pop()
        items = self.stack[at:]
        del self.stack[at:]
        return items

    def extend(self, items: list) -> None:
        if not isinstance(self.stack[-1], list):
            raise ValueError("append to something that is no list")
        self.stack[-1].extend(items)

    def set_items(self, items: list) -> None:
        table = self.stack[-1]
        if isinstance(table, Inert):  # an object that fills itself: its items stay unknown
            return
        if not isinstance(table, dict) or len(items) % 2:
            raise ValueError("set items of something that is no table")
        for key, value in zip(items[::2], items[1::2], strict=True):
            if not isinstance(key, str | int | Inert):  # tuples in tuples would take for ever to hash
                raise ValueError(f"a key of type {type(key).__name__}")
            table[key] = value

    def call(self, function, arguments):
        if not isinstance(function, Inert) or not isinstance(arguments, tuple):
            raise ValueError("a call of something that is no function")
        if function.name == "collections.OrderedDict" and not arguments:
            return {}
        if function.name == "torch._utils._rebuild_tensor_v2":
            return lazy_tensor(*arguments[:4])
        if function.name == "torch._utils._rebuild_parameter" and isinstance(arguments[0], LazyTensor):
            return arguments[0]
        self.inert.add(one_line(function.name))
        return Inert(function.name)


def storage(reference) -> Storage:
    kind, cls, key, _, count = reference
    if kind != "storage" or not isinstance(cls, Inert) or type(count) is not int or count < 0:
        raise ValueError("a reference to something that is no storage")
    module, _, name = cls.name.rpartition(".")
    if module != "torch" or name not in STORAGES:
        raise ValueError(f"storage type {cls.name} is not supported")
    return Storage(text(key), STORAGES[name], count)


def lazy_tensor(where, offset, shape, stride) -> LazyTensor:
    if not isinstance(where, Storage) or type(offset) is not int or offset < 0:
        raise ValueError("a tensor without a storage")
    if not isinstance(shape, tuple) or not isinstance(stride, tuple) or len(shape) != len(stride):
        raise ValueError("a tensor without a shape")
    return LazyTensor(where, offset, shape, stride)


def text(value) -> str:
    if not isinstance(value, str):
        raise ValueError("a name that is no text")
    return value
