"""Checkpoints: published whole or not at all, verified before they are read, and one process a folder.

A checkpoint is written beside, flushed, hashed into a manifest and renamed; only then is an older one retired. So a run that is
killed at any moment, or whose disk is full, finds the last one whole. Tensors are safetensors and the rest is JSON: nothing in
a checkpoint is ever executed.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

from sdcore.weights import files
from torch import Tensor

from sdcore.errors import CheckpointError, TrainingError


def sha256(path: Path) -> str:
    """Hex digest of a file's bytes."""
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


class Checkpoints:
    """A folder of checkpoints: publishing, verifying, retiring.

    A checkpoint is a folder `step-00000500` with state.safetensors (weights, average, optimiser), state.json (step, options,
    identity of the data, numbers of the optimiser) and manifest.json (size and sha256 of the two). A folder whose manifest does
    not verify is none. Of networks in shards there is a file a process instead of the first (sharding.py).
    """

    def __init__(self, folder: Path, keep: int):
        self.folder, self.keep = folder, keep
        folder.mkdir(parents=True, exist_ok=True)

    def clear(self) -> None:
        """Remove what a run that was killed left half written. Only for the process that holds the run's lock."""
        for stale in self.folder.glob(".writing-*"):
            shutil.rmtree(stale, ignore_errors=True)

    def save(self, step: int, tensors: dict[str, Tensor], state: dict) -> Path:
        """Publish a checkpoint. Raises TrainingError if it cannot be written; what was there before stays as it is."""
        final, beside = self.places(step)
        with self.intact(final, beside):
            if self.begin(final, beside):
                files.write(beside / "state.safetensors", tensors)
                self.publish(final, beside, step, state)
        self.retire()
        return final

    def places(self, step: int) -> tuple[Path, Path]:
        """Where the checkpoint of a step will stand, and where it is written."""
        return self.folder / f"step-{step:08d}", self.folder / f".writing-{step:08d}"

    def begin(self, final: Path, beside: Path) -> bool:
        """An empty folder to write in; False where the checkpoint is there already, whole."""
        if final.exists():
            if self.fault(final) is None:
                return False
            shutil.rmtree(final)  # damaged: it was passed over when the run was resumed
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir()
        return True

    def publish(self, final: Path, beside: Path, step: int, state: dict) -> None:
        """Write the numbers beside the tensors, hash everything, rename."""
        with files.replacing(beside / "state.json") as f:
            f.write(json.dumps(state, indent=1).encode())
        listed = {}
        for path in sorted(beside.iterdir()):
            listed[path.name] = {"bytes": path.stat().st_size, "sha256": sha256(path)}
        with files.replacing(beside / "manifest.json") as f:
            f.write(json.dumps({"step": step, "files": listed}, indent=1).encode())
        os.rename(beside, final)
        files.sync_folder(self.folder)

    def retire(self) -> None:
        """Remove the checkpoints beyond `keep`."""
        for old in self.all()[self.keep :]:
            shutil.rmtree(old)

    @contextlib.contextmanager
    def intact(self, final: Path, beside: Path) -> Iterator[None]:
        """Inside the `with`, what the disk refuses is a TrainingError, and nothing half written is left."""
        try:
            yield
        except (OSError, CheckpointError) as e:
            shutil.rmtree(beside, ignore_errors=True)
            raise TrainingError(
                f"{final}: the checkpoint could not be written ({e}); older checkpoints are intact. "
                "Make room or mend the folder, then run again with --resume"
            ) from e

    def all(self) -> list[Path]:
        """Published checkpoints, newest first, whether they verify or not."""
        return sorted(self.folder.glob("step-*"), reverse=True)

    def fault(self, checkpoint: Path) -> str | None:
        """What is wrong with a checkpoint, or None."""
        try:
            manifest = json.loads((checkpoint / "manifest.json").read_text())
            for name, promised in manifest["files"].items():
                size = (checkpoint / name).stat().st_size
                if size != promised["bytes"]:
                    return f"{name} has {size} bytes, its manifest says {promised['bytes']}"
                if sha256(checkpoint / name) != promised["sha256"]:
                    return f"{name} does not have the sha256 of its manifest"
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
            return f"manifest or file unreadable ({e})"
        return None

    def newest(self) -> tuple[dict[str, Tensor], dict]:
        """Tensors and numbers of the newest checkpoint that verifies. TrainingError if there is none."""
        checkpoint = self.verified()
        return self.tensors(checkpoint), self.numbers(checkpoint)

    def verified(self) -> Path:
        """The newest checkpoint that verifies; those passed over are named on stderr. TrainingError if there is none."""
        for checkpoint in self.all():
            fault = self.fault(checkpoint)
            if fault is None:
                return checkpoint
            print(f"WARNING: checkpoint {checkpoint} is damaged and was passed over: {fault}", file=sys.stderr)
        raise TrainingError(
            f"{self.folder}: --resume was asked for but no checkpoint here verifies; "
            "leave --resume out to start anew, or name another --out"
        )

    def tensors(self, checkpoint: Path) -> dict[str, Tensor]:
        """Weights, average and optimiser. TrainingError where processes have written them in shards."""
        file = checkpoint / "state.safetensors"
        if not file.exists():
            raise TrainingError(f"{checkpoint}: was written in shards; resume it by torchrun with --shard")
        return files.read(file).tensors

    def numbers(self, checkpoint: Path) -> dict:
        """Step, options, identity of the data, and what the optimiser keeps beside its tensors."""
        return json.loads((checkpoint / "state.json").read_text())


@contextlib.contextmanager
def sole_user(out: Path) -> Iterator[None]:
    """Hold the run's folder for this process. TrainingError if another process has it."""
    out.mkdir(parents=True, exist_ok=True)
    with open(out / "lock", "a+") as f:
        try:
            fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            f.seek(0)
            raise TrainingError(
                f"{out}: another run (process {f.read().strip() or 'unknown'}) writes here; "
                "wait for it or choose another --out"
            ) from None
        f.truncate(0)
        f.write(str(os.getpid()))
        f.flush()
        yield


def difference(old: dict, new: dict) -> list[str]:
    """Readable lines for every value that differs."""
    return [
        f"{k}: was {old.get(k)!r}, is {new.get(k)!r}" for k in sorted(set(old) | set(new)) if old.get(k) != new.get(k)
    ]
