"""A thousand damaged and hostile checkpoint files through `inspect`: each is refused in one line, or is a model and read right.

Half are safetensors, half .ckpt; the ways of damage are the functions below. What is accepted is compared with the whole file:
the same names, shapes and dtypes, and the same values except where the damage sits in a payload that nothing protects.
"""

import io
import json
import os
import random
import resource
import struct
import time
import zipfile

import pytest
import torch
from sdcore.weights import files
from sdcore.weights.report import inspect

from sdcore.errors import CheckpointError, NonFiniteError
from tests import weight_models

ABSURD = [0, -1, 1, 2**31, 2**62, 2**63, 10**30, 1e9, "8", None, [8], True]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Threads that wait for each other on a busy machine spend processor time, which is measured here."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The smallest model as both kinds of file: (safetensors bytes, ckpt bytes, tensors)."""
    folder = tmp_path_factory.mktemp("whole")
    checkpoint = weight_models.smallest(folder)
    from sdcore.weights import convert

    convert.write_single(checkpoint, folder / "m.safetensors")
    file = files.read(folder / "m.safetensors")
    torch.save({"state_dict": dict(file.tensors), **file.metadata}, folder / "m.ckpt")
    for name in ("m.safetensors", "m.ckpt"):
        report = inspect(folder / name)
        assert report.loads and report.family == "sd1"
    return (folder / "m.safetensors").read_bytes(), (folder / "m.ckpt").read_bytes(), file.tensors


# ---------------------------------------------------------------- ways of damage: (bytes, random) -> bytes


def truncated(data, rng):
    return data[: rng.randrange(len(data))]


def flipped(data, rng, low=0, high=None):
    broken = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 8])):
        broken[rng.randrange(low, high or len(data))] ^= 1 << rng.randrange(8)
    return bytes(broken)


def spliced(data, rng):
    at, size = rng.randrange(len(data)), rng.randrange(1, 64)
    return rng.choice([data[:at] + rng.randbytes(size) + data[at:], data[:at] + data[at + size :]])


def header_of(data):
    length = struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def with_header(header, body):
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


def header_flipped(data, rng):
    return flipped(data, rng, 0, 8 + struct.unpack("<Q", data[:8])[0])


def header_length(data, rng):
    return struct.pack("<Q", rng.choice([0, 1, 2**63, 2**64 - 1, 10**8, rng.randrange(10**6)])) + data[8:]


def entry_changed(data, rng):
    header, body = header_of(data)
    entry = header[rng.choice([name for name in header if name != "__metadata__"])]
    match rng.randrange(4):
        case 0:
            entry["shape"] = rng.choice(
                [[rng.choice(ABSURD)], [8] * 300, entry["shape"][::-1], [*entry["shape"], 1], "8", {}]
            )
        case 1:
            entry["data_offsets"][rng.randrange(2)] = rng.choice([*ABSURD, rng.randrange(len(body) + 9)])
        case 2:
            entry["dtype"] = rng.choice([*files.DTYPES, "F4", "C64", 7, None])
        case 3:
            other = header[rng.choice([name for name in header if name != "__metadata__"])]
            entry["data_offsets"] = other["data_offsets"]
    return with_header(header, body)


def keys_changed(data, rng):
    header, body = header_of(data)
    name = rng.choice([name for name in header if name != "__metadata__"])
    match rng.randrange(3):
        case 0:
            del header[name]
        case 1:
            header[rng.choice([f"{name}.more", "a" * 9999, "\0", "x" + name, name.upper()])] = header.pop(name)
        case 2:
            header["extra"] = {"dtype": "F32", "shape": [0], "data_offsets": [len(body), len(body)]}
    return with_header(header, body)


def metadata_changed(data, rng):
    """Our own configs travel in the metadata, so they are input like any other."""
    header, body = header_of(data)
    table = json.loads(header["__metadata__"]["sdcore.configs"])
    part = table[rng.choice(list(table))]
    key = rng.choice(list(part))
    part[key] = rng.choice([*ABSURD, [rng.choice(ABSURD)] * 2, 10**9, "os.system", {"a": 1}, float("nan")])
    header["__metadata__"]["sdcore.configs"] = json.dumps(table)
    return with_header(header, body)


def not_finite(data, rng):
    header, body = header_of(data)
    at = rng.randrange(len(body) // 4) * 4
    value = struct.pack("<f", rng.choice([float("nan"), float("inf"), float("-inf")]))
    return with_header(header, body[:at] + value + body[at + 4 :])


def archived(data, rng, change):
    """The same archive with its entries changed and sound checksums."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(out, "w", zipfile.ZIP_STORED) as new:
        for info in old.infolist():
            name, content = change(info.filename, old.read(info))
            new.writestr(name, content)
    return out.getvalue()


def pickle_changed(data, rng):
    """Random edits of the pickle's program: flips, spans, opcodes put in."""

    def change(name, content):
        if not name.endswith("data.pkl"):
            return name, content
        at = rng.randrange(len(content))
        match rng.randrange(3):
            case 0:
                return name, flipped(content, rng)
            case 1:
                return name, spliced(content, rng)
            case _:
                return name, content[:at] + bytes(
                    [rng.choice(b"().012NRabcdehiloqstu}]\x80\x81\x85\x86\x93\x94")]
                ) + content[at:]

    return archived(data, rng, change)


def pickle_hostile(data, rng):
    """A program that would leave a marker, at a random place."""
    attack = rng.choice([b"cos\nsystem\n(S'touch MARKER'\ntR0", b"c__builtin__\nexec\n(S'open(\"MARKER\",\"w\")'\ntR0",
                         b"(S'touch MARKER'\nios\nsystem\n0", b"cbuiltins\neval\n(S'1/0'\ntR"])  # fmt: skip

    def change(name, content):
        at = rng.choice([2, 3, len(content) - 1, rng.randrange(len(content))])
        return name, content[:at] + attack + content[at:] if name.endswith("data.pkl") else content

    return archived(data, rng, change)


def storages_changed(data, rng):
    chosen = f"m/data/{rng.randrange(100)}"

    def change(name, content):
        if name != chosen:
            return name, content
        return rng.choice([(name + "x", content), (name, content[:-4]), (name, content + b"1234"), (name, b"")])

    return archived(data, rng, change)


SAFETENSORS = [truncated, flipped, spliced, header_flipped, header_length, entry_changed, entry_changed, keys_changed,
               metadata_changed, not_finite]  # fmt: skip
CKPT = [truncated, flipped, spliced, pickle_changed, pickle_changed, pickle_changed, pickle_hostile, storages_changed]


# ---------------------------------------------------------------- the judge


def judge(path, data, tensors, damage):
    """One file through `inspect`. Returns "refused" or "accepted"; anything else that happens is a failure."""
    path.write_bytes(data)
    began = time.process_time()
    try:
        report = inspect(path)
    except CheckpointError as error:
        text = str(error)
        assert "\n" not in text and text.isprintable() and len(text) < 700, text
        assert path.name in text or damage is metadata_changed, text
        assert damage is not not_finite or isinstance(error, NonFiniteError)
        outcome = "refused"
    else:
        assert damage is not not_finite
        outcome = "accepted"
        if report.loads:
            read = files.read(path).tensors
            assert {k: (t.shape, t.dtype) for k, t in read.items()} == {
                k: (t.shape, t.dtype) for k, t in tensors.items()
            }
            if path.suffix == ".ckpt" and damage in (truncated, flipped, spliced):  # the checksums saw to that
                assert all(torch.equal(read[name], tensors[name]) for name in tensors)
    spent = time.process_time() - began  # of the processor: other work on the machine does not count
    assert spent < 5, (damage.__name__, spent)
    assert not os.path.exists("MARKER")
    return outcome


def sweep(folder, whole, count, seed):
    rng, outcomes = random.Random(seed), {"refused": 0, "accepted": 0}
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for i in range(count):
        kind = i % 2
        damage = rng.choice([SAFETENSORS, CKPT][kind])
        path = folder / ["m.safetensors", "m.ckpt"][kind]
        outcomes[judge(path, damage(whole[kind], rng), whole[2], damage)] += 1
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    assert grown < 300, f"memory grew by {grown:.0f} MB"
    return outcomes


@pytest.mark.timeout(1200)
def test_a_thousand_damaged_files(tmp_path, whole, monkeypatch):
    monkeypatch.chdir(tmp_path)
    outcomes = sweep(tmp_path, whole, 1000, seed=1)
    assert outcomes["refused"] > 700 and sum(outcomes.values()) == 1000, outcomes


@pytest.mark.check
@pytest.mark.timeout(7200)
def test_twenty_thousand_damaged_files(tmp_path, whole, monkeypatch):
    monkeypatch.chdir(tmp_path)
    outcomes = sweep(tmp_path, whole, 20_000, seed=2)
    print(f"fuzz: {outcomes}")
    assert sum(outcomes.values()) == 20_000
