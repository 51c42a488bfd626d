"""Reading weight files: what is right is read exactly and without a copy; what is wrong is one line that says what it is."""

import collections
import io
import json
import os
import pickle
import stat
import struct
import zipfile

import pytest
import safetensors.torch
import torch
from sdcore.weights import files, pickles

from sdcore.errors import CheckpointError

DTYPES = [
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float64,
    torch.int64,
    torch.int32,
    torch.uint8,
    torch.bool,
]


def tensors_of_every_dtype():
    generator = torch.Generator().manual_seed(0)
    made = {
        f"block.{i}.weight": (torch.randn(3, 5, generator=generator) * 9).to(dtype) for i, dtype in enumerate(DTYPES)
    }
    return made | {"scalar": torch.tensor(2.5), "empty": torch.zeros(0, 4)}


def same(a, b):
    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)


def safe(header, body=b""):
    """The bytes of a safetensors file with this header, right or wrong."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


def entry(begin, end, shape=(1,), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


def refused(path, data, *words):
    """The file is refused with one line that names it and says all these words. Returns the line."""
    path.write_bytes(data)
    with pytest.raises(CheckpointError) as caught:
        files.read(path)
    text = str(caught.value)
    assert text.startswith(str(path)) and "\n" not in text and len(text) < 500 and text.isprintable()
    for word in words:
        assert word in text, text
    return text


# ---------------------------------------------------------------- safetensors


def test_reads_what_the_library_wrote(tmp_path):
    tensors = tensors_of_every_dtype()
    safetensors.torch.save_file(tensors, tmp_path / "a.safetensors", {"k": "v"})
    file = files.read(tmp_path / "a.safetensors")
    assert same(file.tensors, tensors) and file.metadata == {"k": "v"} and file.format == "safetensors"


def test_the_library_reads_what_we_wrote(tmp_path):
    tensors = tensors_of_every_dtype() | {"strided": torch.arange(12.0).view(3, 4).T}
    files.write(tmp_path / "a.safetensors", tensors, {"k": "v"})
    assert same(safetensors.torch.load_file(tmp_path / "a.safetensors"), tensors)
    assert same(files.read(tmp_path / "a.safetensors").tensors, tensors)


def test_written_in_another_precision(tmp_path):
    files.write(tmp_path / "a.safetensors", {"w": torch.tensor([1 / 3]), "n": torch.tensor([7])}, dtype=torch.float16)
    read = files.read(tmp_path / "a.safetensors").tensors
    assert torch.equal(read["w"], torch.tensor([1 / 3]).half()) and read["n"].dtype == torch.int64


def test_tensors_are_mapped_not_copied(tmp_path):
    files.write(tmp_path / "a.safetensors", {"a": torch.zeros(1000), "b": torch.ones(1000)})
    read = files.read(tmp_path / "a.safetensors").tensors
    assert read["a"].untyped_storage().data_ptr() == read["b"].untyped_storage().data_ptr()
    before = (tmp_path / "a.safetensors").read_bytes()
    read["a"].add_(1)  # private: the file does not see it
    assert (tmp_path / "a.safetensors").read_bytes() == before


def test_unaligned_tensors_are_read_right(tmp_path):
    body = b"\x07" + struct.pack("<2f", 1.5, -2.0)
    path = tmp_path / "a.safetensors"
    path.write_bytes(safe({"a": entry(0, 1, (1,), "U8"), "b": entry(1, 9, (2,))}, body))
    assert files.read(path).tensors["b"].tolist() == [1.5, -2.0]


A, AB = {"a": entry(0, 4)}, {"a": entry(0, 4), "b": entry(4, 8)}
WRONG = {
    "empty": (b"", "empty file"),
    "short": (b"\x01\x02", "truncated", "have 2 bytes"),
    "header cut": (safe(AB, b"x" * 8)[:40], "truncated", "have 40 bytes", "header alone declares"),
    "body cut": (safe(AB, b"x" * 5), "truncated", f"have {len(safe(AB, b'x' * 5))} bytes", f"declares {len(safe(AB, b'x' * 8))}"),
    "html": (b"\n<!DOCTYPE html><html><body>Sign in</body></html>", "HTML page", "login"),
    "lfs": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 4265146304\n",
        "git-LFS pointer", "sha256:4d7a", "4265146304", "git lfs pull",
    ),
    "json": (b'{"error": "Repository not found"}', "JSON file"),
    "text": (b"You need to agree to share your contact information", "text file"),
    "png": (b"\x89PNG\r\n\x1a\n" + bytes(40), "PNG picture"),
    "gguf": (b"GGUF" + bytes(40), "GGUF"),
    "zeros": (bytes(4096), "zeros"),
    "noise": (bytes(i * 37 % 256 for i in range(1, 300)), "neither safetensors nor"),
    "bare pickle": (pickle.dumps({"a": list(range(50))}, 2), "bare pickle", "1.6"),
    "huge header": (struct.pack("<Q", 2**62) + b"{" + bytes(40), "limit"),
    "header of 100 MB": (struct.pack("<Q", 10**8) + b"{}" + bytes(40), "limit"),
    "overlap": (safe({"a": entry(0, 4), "b": entry(2, 6)}, b"x" * 6), "tensor b", "overlaps"),
    "same range twice": (safe({"a": entry(0, 4), "b": entry(0, 4)}, b"x" * 4), "tensor b", "overlaps"),
    "hole": (safe({"a": entry(0, 4), "b": entry(8, 12)}, b"x" * 12), "tensor b", "hole of 4"),
    "trailing bytes": (safe(A, b"x" * 9), "5 bytes follow"),
    "reversed": (safe({"a": entry(4, 0)}, b"x" * 4), "tensor a", "no range"),
    "negative": (safe({"a": entry(-4, 0)}, b"x" * 4), "tensor a", "no range"),
    "fraction": (safe({"a": entry(0, 4.0)}, b"x" * 4), "tensor a", "no range"),
    "truth for a number": (safe({"a": entry(False, 4)}, b"x" * 4), "tensor a"),
    "text offsets": (safe({"a": entry("0", "4")}, b"x" * 4), "tensor a"),
    "shape too large": (safe({"a": entry(0, 4, (2,))}, b"x" * 4), "tensor a", "needs 8 bytes", "gives 4"),
    "shape overflows": (safe({"a": entry(0, 4, (2**33, 2**33))}, b"x" * 4), "tensor a", "needs"),
    "shape is astronomic": (safe({"a": entry(0, 0, (0, 2**62))}), "tensor a", "limit"),
    "rank 3000": (safe({"a": entry(0, 4, (1,) * 3000)}, b"x" * 4), "tensor a", "limit"),
    "negative size": (safe({"a": entry(0, 4, (-1, -1))}, b"x" * 4), "tensor a", "sizes"),
    "unknown dtype": (safe({"a": entry(0, 4, (1,), "F33")}, b"x" * 4), "tensor a", "F33", "BF16"),
    "dtype is a list": (safe({"a": {"dtype": ["F32"], "shape": [1], "data_offsets": [0, 4]}}, b"x" * 4), "tensor a"),
    "extra field": (safe({"a": entry(0, 4) | {"stride": [0]}}, b"x" * 4), "tensor a"),
    "duplicate key": (safe(b'{"a":%b,"a":%b}' % ((json.dumps(entry(0, 4)).encode(),) * 2), b"x" * 4), "twice"),
    "name with NUL": (safe({"a\0b": entry(0, 4)}, b"x" * 4), "no name"),
    "name climbs": (safe({"../../x": entry(0, 4)}, b"x" * 4), "no name"),
    "name with newline": (safe({"a\nb": entry(0, 4)}, b"x" * 4), "no name"),
    "no name": (safe({"": entry(0, 4)}, b"x" * 4), "no name"),
    "bad UTF-8": (safe(b'{"\xff\xfe": 1}', b""), "header is damaged"),
    "deep JSON": (safe(b'{"a":' + b"[" * 200_000 + b"]" * 200_000 + b"}"), "header is damaged"),
    "not a table": (safe(b'{"a": 3}'), "tensor a"),
    "metadata of numbers": (safe({"__metadata__": {"a": 1}}), "__metadata__"),
    "truth value of 7": (safe({"a": entry(0, 1, (1,), "BOOL")}, b"\x07"), "truth value"),
    "300,000 tensors": (safe({f"t{i}": entry(0, 0, (0,)) for i in range(300_000)}), "limit"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
@pytest.mark.timeout(20, func_only=True)
def test_refused(tmp_path, case):
    data, *words = WRONG[case]
    refused(tmp_path / "m.safetensors", data, *words)


def test_every_truncation_says_so(tmp_path):
    path = tmp_path / "a.safetensors"
    files.write(path, {"a": torch.randn(4, 4), "b": torch.randn(7)})
    whole = path.read_bytes()
    for size in range(1, len(whole)):
        assert "truncated" in refused(path, whole[:size], f"have {size} bytes")


def test_the_name_does_not_decide(tmp_path):
    torch.save({"a": torch.ones(2)}, tmp_path / "x")
    safetensors.torch.save_file({"a": torch.ones(2)}, tmp_path / "y")
    refused(tmp_path / "m.safetensors", (tmp_path / "x").read_bytes(), ".ckpt file", "named .safetensors")
    refused(tmp_path / "m.SAFETENSORS", (tmp_path / "x").read_bytes(), ".ckpt file")
    refused(tmp_path / "m.ckpt", (tmp_path / "y").read_bytes(), "is a safetensors file named .ckpt")
    assert files.read(tmp_path / "x").tensors["a"].tolist() == [1, 1]


def test_missing_file_and_folder(tmp_path):
    for path, word in [(tmp_path / "no.safetensors", "no such file"), (tmp_path, "is a folder")]:
        with pytest.raises(CheckpointError, match=word):
            files.read(path)


# ---------------------------------------------------------------- .ckpt


class Runs:
    """Unpickling this runs a shell command: the marker file shows whether anything did."""

    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


def ckpt(program: bytes, entries=None, deflate=False, twice=False, crc=True) -> bytes:
    """A torch archive with this pickle, right or wrong."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED if deflate else zipfile.ZIP_STORED) as archive:
        archive.writestr("m/data.pkl", program)
        archive.writestr("m/version", b"3\n")
        for name, data in (entries or {}).items():
            archive.writestr(f"m/data/{name}", data)
            if twice:
                archive.writestr(f"m/data/{name}", data)
    return buffer.getvalue()


def claim(count=4, offset=0, shape=(4,), stride=(1,), kind="FloatStorage", key="0"):
    """The pickle of {"a": tensor} with this claim about its storage."""
    body = io.BytesIO()

    class Pickler(pickle._Pickler):
        def save(self, value, *rest):
            if isinstance(value, str) and value.startswith("global:"):
                self.write(b"c" + value[7:].replace(" ", "\n").encode() + b"\n")
            elif value == "storage-here":
                self.save_tuple_items(("storage", f"global:torch {kind}", key, "cpu", count))
                self.write(pickle.BINPERSID)
            else:
                super().save(value, *rest)

        def save_tuple_items(self, items):
            self.write(pickle.MARK)
            for item in items:
                self.save(item)
            self.write(pickle.TUPLE)

    p = Pickler(body, 2)
    p.write(pickle.PROTO + b"\x02" + pickle.EMPTY_DICT)
    p.save("a")
    p.save("global:torch._utils _rebuild_tensor_v2")
    p.save_tuple_items(("storage-here", offset, shape, stride, False, None))
    p.write(pickle.REDUCE + pickle.SETITEM + pickle.STOP)
    return body.getvalue()


FLOATS = {"0": struct.pack("<4f", 1, 2, 3, 4)}


def test_reads_what_torch_wrote(tmp_path):
    tensors = {k: t for k, t in tensors_of_every_dtype().items()}
    tensors["parameter"] = torch.nn.Parameter(torch.ones(3).bfloat16())
    tensors["strided"] = torch.arange(12.0).view(3, 4).T
    tensors["shared"] = tensors["strided"][1:]
    torch.save({"state_dict": collections.OrderedDict(tensors), "global_step": 7}, tmp_path / "a.ckpt")
    file = files.read(tmp_path / "a.ckpt")
    assert same(file.tensors, {k: t.detach() for k, t in tensors.items()}) and file.metadata["global_step"] == "7"
    torch.save(torch.nn.Linear(3, 2).state_dict(), tmp_path / "b.pth")  # with torch's _metadata attribute
    assert files.read(tmp_path / "b.pth").tensors.keys() == {"weight", "bias"}


def test_handmade_archive_is_read(tmp_path):
    (tmp_path / "a.ckpt").write_bytes(ckpt(claim(), FLOATS))
    assert files.read(tmp_path / "a.ckpt").tensors["a"].tolist() == [1, 2, 3, 4]
    (tmp_path / "a.ckpt").write_bytes(ckpt(claim(shape=(2, 2), stride=(1, 2)), FLOATS))
    assert files.read(tmp_path / "a.ckpt").tensors["a"].tolist() == [[1, 3], [2, 4]]


def test_code_beside_the_weights_stays_inert(tmp_path):
    """Official files carry Lightning's callbacks: data is loaded, nothing is run, and what was left is named."""
    marker = tmp_path / "marker"
    content = {"callbacks": {"x": Runs(f"touch {marker}")}, "state_dict": {"a": torch.ones(2)}}
    torch.save(content, tmp_path / "a.ckpt")
    file = files.read(tmp_path / "a.ckpt")
    assert file.tensors["a"].tolist() == [1, 1] and not marker.exists()
    assert any(name.endswith(".system") for name in file.inert)
    import pytest_timeout  # a class of some library as a key, as Lightning has it

    torch.save({"callbacks": {pytest_timeout.Settings: 1}, "state_dict": {"a": torch.ones(2)}}, tmp_path / "b.ckpt")
    assert files.read(tmp_path / "b.ckpt").tensors["a"].tolist() == [1, 1]


def test_code_among_the_weights_is_refused(tmp_path):
    marker = tmp_path / "marker"
    for content in (
        {"state_dict": {"a": Runs(f"touch {marker}")}},
        {"a": Runs(f"touch {marker}")},
        Runs(f"touch {marker}"),
    ):
        torch.save(content, tmp_path / "x")
        assert "system" in refused(tmp_path / "m.ckpt", (tmp_path / "x").read_bytes(), "expected a")
        assert not marker.exists()


HOSTILE = {
    "os.system": b"cos\nsystem\n(S'touch MARKER'\ntR.",
    "eval": b'c__builtin__\neval\n(S\'open("MARKER","w")\'\ntR.',
    "inst": b"(S'touch MARKER'\nios\nsystem\n.",
    "obj": b"(cos\nsystem\nS'touch MARKER'\no.",
    "stack global": b"\x80\x04\x8c\x05posix\x8c\x06system\x93\x8c\x0ctouch MARKER\x85R.",
    "newobj": b"\x80\x02csubprocess\nPopen\nX\x0c\x00\x00\x00touch MARKER\x85\x81.",
    "build": b"cbuiltins\nobject\n)\x81}X\x01\x00\x00\x00aX\x01\x00\x00\x00bsb.",
    "extension": b"\x80\x02\x82\x01.",
    "setitem on a tuple": b"\x80\x02)K\x01K\x02s.",
    "append to a number": b"\x80\x02K\x01K\x02a.",
    "no stop": b"\x80\x02}",
    "nothing": b"",
    "empty stack": b"\x80\x02.",
    "pop of nothing": b"\x80\x0200.",
    "memo of nothing": b"\x80\x02h\x05.",
    "unknown opcode": b"\x80\x02\xff.",
    "protocol 9": b"\x80\x09.",
    "persistent id of text": b"Pabc\n.",
    "keys that take for ever to hash": b"\x80\x02}" + b")" + b"2\x86" * 60 + b"K\x01s.",
    "number of a million digits": b"I" + b"9" * 10**6 + b"\n.",
    "a million marks": b"(" * 10**6 + b".",
    "dup bomb": b"\x80\x02]" + b"2" * 900_000 + b".",
    "a table that holds itself": b"\x80\x02}q\x00X\x01\x00\x00\x00ah\x00s.",
    "huge declared string": b"\x80\x04\x8d" + struct.pack("<Q", 2**62) + b"x.",
}


@pytest.mark.parametrize("case", HOSTILE)
@pytest.mark.timeout(20, func_only=True)
def test_hostile_pickle(tmp_path, case):
    marker = tmp_path / "marker"
    program = HOSTILE[case].replace(b"MARKER", str(marker).encode())
    if case in ("stack global", "newobj"):  # lengths are part of these programs
        program = HOSTILE[case]
        marker = tmp_path / "MARKER"
    (tmp_path / "cwd").mkdir()
    path = tmp_path / "m.ckpt"
    path.write_bytes(ckpt(program))
    try:
        read = files.read(path)
    except CheckpointError as error:
        assert "\n" not in str(error) and str(error).startswith(str(path))
    else:
        assert read.tensors == {}
    assert not marker.exists() and not os.path.exists("MARKER")


BAD_ARCHIVES = {
    "short storage": (ckpt(claim(count=5, shape=(5,)), FLOATS), "declares 20 bytes, 16 are there"),
    "long storage": (ckpt(claim(count=3, shape=(3,)), FLOATS), "declares 12 bytes, 16 are there"),
    "missing storage": (ckpt(claim(key="7"), FLOATS), "is missing"),
    "stride 0": (ckpt(claim(shape=(2**40,), stride=(0,)), FLOATS), "claims 1099511627776 elements", "storage of 4"),
    "overlapping": (ckpt(claim(shape=(3, 3), stride=(1, 0)), FLOATS), "claims 9 elements"),
    "out of its storage": (ckpt(claim(offset=2), FLOATS), "claims 4 elements"),
    "negative offset": (ckpt(claim(offset=-1), FLOATS), "without a storage"),
    "rank 9": (ckpt(claim(shape=(1,) * 9, stride=(1,) * 9), FLOATS), "limit"),
    "unknown storage": (ckpt(claim(kind="QUInt8Storage"), FLOATS), "not supported"),
    "deflated": (ckpt(claim(), FLOATS, deflate=True), "compressed or encrypted"),
    "an entry twice": (ckpt(claim(), FLOATS, twice=True), "twice"),
    "no pickle": (ckpt(claim(), FLOATS).replace(b"data.pkl", b"data.pkx"), "without one data.pkl"),
    "cut": (ckpt(claim(), FLOATS)[:-30], "truncated or damaged"),
}


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("case", BAD_ARCHIVES)
def test_bad_archive(tmp_path, case):
    data, *words = BAD_ARCHIVES[case]
    refused(tmp_path / "m.ckpt", data, *words)


def test_every_flipped_bit_of_a_storage_is_noticed(tmp_path):
    whole = ckpt(claim(), FLOATS)
    at = whole.index(FLOATS["0"])
    for bit in range(16 * 8):
        broken = bytearray(whole)
        broken[at + bit // 8] ^= 1 << bit % 8
        refused(tmp_path / "m.ckpt", bytes(broken), "CRC")


def test_two_directories_that_disagree(tmp_path):
    """The directory at the end says where an entry lies; the entry itself must say the same name there."""
    whole = ckpt(claim(), FLOATS | {"1": struct.pack("<4f", 9, 9, 9, 9)})
    first = whole.index(b"m/data/1")
    refused(tmp_path / "m.ckpt", whole[:first] + b"m/data/7" + whole[first + 8 :], "does not lie where")


def test_limits_are_in_the_message(tmp_path, monkeypatch):
    monkeypatch.setattr(pickles, "MAX_STEPS", 10)
    refused(tmp_path / "m.ckpt", ckpt(claim(), FLOATS), "more than 10 steps")


# ---------------------------------------------------------------- writing


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a.safetensors"
    files.write(path, {"a": torch.ones(2)})
    before = path.read_bytes()

    def full(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(CheckpointError, match="No space left"):
        files.write(path, {"a": torch.zeros(2000)})
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]


def test_an_interrupted_write_leaves_nothing(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        with files.replacing(tmp_path / "a.bin") as file:
            file.write(b"half")
            raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_written_files_are_as_readable_as_any(tmp_path):
    files.write(tmp_path / "a.safetensors", {"a": torch.ones(2)})
    (tmp_path / "plain").write_bytes(b"")
    assert stat.S_IMODE(os.stat(tmp_path / "a.safetensors").st_mode) == stat.S_IMODE(
        os.stat(tmp_path / "plain").st_mode
    )
