"""Writing a model: all of it or nothing, in shards, with everything mlx-lm needs beside it."""

import fcntl
import glob
import json
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import mlx.core as mx

from ..errors import UserError
from . import files

SHARD_BYTES = 1 << 29  # two are in memory, one being written; mlx-lm reads any number of shards


class Writer:
    """A folder that appears under its name when it is whole, and not at all otherwise.

    Use as a context manager; ``commit`` makes it appear. Tensors go to a temporary folder beside
    it, which any failure removes. After a kill the next run to the same place does: the system has
    let go of the lock on it. A thread writes one shard while the next is computed, so a failure to
    write shows in a later call.

    Args:
        out: the folder.
        expected_bytes: of all weights.
        flag: that names the folder, for messages.

    Raises:
        UserError: if the path exists, its parent does not, the disk lacks room, or another run is
            writing the same.
    """

    def __init__(self, out: Path, expected_bytes: int, flag: str = "--mlx-path"):
        self._out, self._flag = out, flag
        check_free(out, flag)
        parent = out.absolute().parent
        self._prefix = f".{out.name}.partial-"
        self._remove_abandoned(parent)
        free = shutil.disk_usage(parent).free
        needed = int(expected_bytes * 1.01) + (64 << 20)
        if needed > free:
            raise UserError(
                f"{parent} has {free / 1e9:.2f} GB free, the result takes {needed / 1e9:.2f} GB: "
                f"make room or give another {flag}"
            )
        self._shards: list[list[str]] = []
        self._pending: dict[str, mx.array] = {}
        self._pending_bytes = self._total_bytes = 0
        self._worker = ThreadPoolExecutor(max_workers=1)
        self._writing: Future[None] | None = None

    def _remove_abandoned(self, parent: Path) -> None:
        for folder in parent.glob(f"{glob.escape(self._prefix)}*"):
            with _locked(folder) as ours:
                if ours is False:
                    raise UserError(
                        f"another run is writing {self._out}: wait for it, or give another "
                        f"{self._flag}"
                    )
                if ours:
                    shutil.rmtree(folder, ignore_errors=True)

    def __enter__(self) -> "Writer":
        self._held = ExitStack()
        try:
            self._make_folder()
            # A run that began at the same time may have taken it for abandoned: it was not locked.
            while not self._lock():
                self._make_folder()
        except BaseException:  # a signal in the middle of making it, too
            shutil.rmtree(self.folder, ignore_errors=True)
            raise
        return self

    def _lock(self) -> bool:
        return self._held.enter_context(_locked(self.folder)) is not False and self.folder.is_dir()

    def _make_folder(self) -> None:
        self.folder = self._out.absolute().parent / f"{self._prefix}{secrets.token_hex(8)}"
        try:
            self.folder.mkdir(0o700)
        except OSError as error:
            raise UserError(
                f"cannot write beside {self._out} ({error}): give another {self._flag}"
            ) from error

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        try:
            self._worker.shutdown(cancel_futures=True)
        finally:
            shutil.rmtree(self.folder, ignore_errors=True)
            self._held.close()

    def add(self, tensors: Mapping[str, mx.array]) -> None:
        """Take some tensors; they are written when a shard is full."""
        for name, array in tensors.items():
            if self._pending and self._pending_bytes + array.nbytes > SHARD_BYTES:
                self._flush()
            self._pending[name] = array
            self._pending_bytes += array.nbytes

    def _flush(self) -> None:
        if not self._pending:
            return
        shard = {name: mx.contiguous(array) for name, array in self._pending.items()}
        mx.eval(shard)  # MLX computes in one thread at a time; the worker only reads it
        self._wait()
        file = self.folder / f"shard-{len(self._shards)}.safetensors"
        self._writing = self._worker.submit(_save_shard, file, shard)
        self._shards.append(list(self._pending))
        self._total_bytes += self._pending_bytes
        self._pending, self._pending_bytes = {}, 0
        mx.clear_cache()

    def _wait(self) -> None:
        """Until no shard is being written."""
        writing, self._writing = self._writing, None
        if writing is None:
            return
        try:
            writing.result()
        except (RuntimeError, OSError) as error:
            raise self._failed(error) from error

    def discard_weights(self) -> None:
        """Forget all tensors taken so far, to take others."""
        self._wait()
        for file in self.folder.glob("*.safetensors"):
            file.unlink()
        self._shards, self._pending = [], {}
        self._pending_bytes = self._total_bytes = 0

    def finish_weights(self, weights: int) -> None:
        """Name the shards as mlx-lm does and write their index.

        Args:
            weights: how many there are, quantization aside.
        """
        self._flush()
        self._wait()
        index: dict[str, str] = {}
        for i, names in enumerate(self._shards):
            one = len(self._shards) == 1
            name = "model" if one else f"model-{i + 1:05d}-of-{len(self._shards):05d}"
            (self.folder / f"shard-{i}.safetensors").rename(self.folder / f"{name}.safetensors")
            index |= dict.fromkeys(names, f"{name}.safetensors")
        self.write_json(
            "model.safetensors.index.json",
            {
                "metadata": {"total_size": self._total_bytes, "total_parameters": weights},
                "weight_map": dict(sorted(index.items())),
            },
        )

    def write_json(self, name: str, content: Mapping[str, Any]) -> None:
        self.write_text(name, json.dumps(content, indent=4) + "\n")

    def write_text(self, name: str, text: str) -> None:
        try:
            (self.folder / name).write_text(text, encoding="utf-8")
        except OSError as error:
            raise self._failed(error) from error

    def _failed(self, error: Exception) -> UserError:
        return UserError(f"writing {self._out} failed ({error}): is the disk full?")

    def commit(self) -> None:
        """Make the folder appear."""
        check_free(self._out, self._flag)
        # It was private so far; a model is as readable as any other new folder.
        umask = os.umask(0)
        os.umask(umask)
        self.folder.chmod(0o777 & ~umask)
        try:
            os.rename(self.folder, self._out)
        except OSError as error:
            raise self._failed(error) from error


def check_free(out: Path, flag: str = "--mlx-path") -> None:
    """Raises UserError if ``out`` exists, its parent does not, or its name is none for a model."""
    files.check_name(out)
    if os.path.lexists(out):
        raise UserError(f"{out} exists already: remove it or give another {flag}")
    if not out.absolute().parent.is_dir():
        raise UserError(f"{out.absolute().parent} is no folder: create it first")


@contextmanager
def _locked(folder: Path) -> Iterator[bool | None]:
    """Lock a folder until the end of the block or of this process; False if another has.

    None if nobody can tell: the file system knows no locks, or the folder has gone.
    """
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        yield None
        return
    ours: bool | None = True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        ours = False
    except OSError:
        ours = None
    try:
        yield ours
    finally:
        os.close(descriptor)


def _save_shard(file: Path, tensors: dict[str, mx.array]) -> None:
    """Write a file and see it on the disk, so that a folder that appears is whole for good."""
    mx.save_safetensors(str(file), tensors, metadata={"format": "mlx"})
    with file.open("rb") as written:
        os.fsync(written.fileno())
