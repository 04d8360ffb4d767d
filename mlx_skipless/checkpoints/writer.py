"""Writing a model atomically, in shards, with everything that mlx-lm needs beside them."""

import json
import os
import shutil
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import mlx.core as mx

from ..errors import UserError
from . import files
from .output import hide_paths, remove_abandoned, sync_file, temporary_folder
from .safetensors import INDEX

SHARD_BYTES = 1 << 29  # at most; two are in memory, one being written
LEAST_SHARD_BYTES = 1 << 26
SHARDS = 16  # as many are welcome, so that small results take little memory


class Writer:
    """A folder that is written atomically: it appears under its name when ``commit`` is called.

    Use as a context manager. Tensors go to a temporary folder beside the final one, which is
    removed on any failure. After a kill the next run to the same place removes it: the system has
    released the lock on it. A thread writes one shard while the next is computed, so a failure to
    write shows in a later call.

    Args:
        out: the folder.
        expected_bytes: size of all weights.
        flag: the flag that names the folder, for messages.

    Raises:
        UserError: if the path exists, its parent does not, the disk lacks room, or another run is
            writing to it.
    """

    def __init__(self, out: Path, expected_bytes: int, flag: str = "--mlx-path"):
        self._out, self._flag = out, flag
        check_free(out, flag)
        remove_abandoned(out, flag)
        _check_space(out, expected_bytes, flag)
        self._shard_bytes = min(SHARD_BYTES, max(LEAST_SHARD_BYTES, expected_bytes // SHARDS))
        self._shards: list[list[str]] = []
        self._pending: dict[str, mx.array] = {}
        self._pending_bytes = self._total_bytes = 0
        self._worker = ThreadPoolExecutor(max_workers=1)
        self._writing: Future[None] | None = None

    def __enter__(self) -> "Writer":
        self._held = ExitStack()
        try:
            self.folder = self._held.enter_context(temporary_folder(self._out))
        except OSError as error:
            where, flag = self._out, self._flag
            raise UserError(
                f"cannot write beside {where} ({error}): give another {flag}"
            ) from error
        self._held.callback(self._worker.shutdown, cancel_futures=True)
        # MLX keeps freed buffers for reuse. Layers come one at a time here, so few are enough.
        limit = mx.set_cache_limit(2 * self._shard_bytes)
        self._held.callback(mx.set_cache_limit, limit)
        return self

    def __exit__(self, *error: object) -> None:
        self._held.close()

    def add(self, tensors: Mapping[str, mx.array]) -> None:
        """Add tensors; they are written when a shard is full."""
        for name, array in tensors.items():
            if self._pending and self._pending_bytes + array.nbytes > self._shard_bytes:
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

    def _wait(self) -> None:
        """Wait until no shard is being written."""
        writing, self._writing = self._writing, None
        if writing is None:
            return
        try:
            writing.result()
        except (RuntimeError, OSError) as error:
            raise self._make_error(error) from error

    def discard_weights(self) -> None:
        """Remove all tensors added so far, to begin anew."""
        self._wait()
        for file in self.folder.glob("*.safetensors"):
            file.unlink()
        self._shards, self._pending = [], {}
        self._pending_bytes = self._total_bytes = 0

    def finish_weights(self, weights: int) -> None:
        """Name the shards as mlx-lm does and write their index; ``weights`` is the model's size."""
        self._flush()
        self._wait()
        index: dict[str, str] = {}
        for i, names in enumerate(self._shards):
            one = len(self._shards) == 1
            name = "model" if one else f"model-{i + 1:05d}-of-{len(self._shards):05d}"
            (self.folder / f"shard-{i}.safetensors").rename(self.folder / f"{name}.safetensors")
            index |= dict.fromkeys(names, f"{name}.safetensors")
        self.write_json(
            INDEX,
            {
                "metadata": {"total_size": self._total_bytes, "total_parameters": weights},
                "weight_map": dict(sorted(index.items())),
            },
        )

    def write_json(self, name: str, content: Mapping[str, Any]) -> None:
        """Write a JSON file into the folder."""
        self.write_text(name, json.dumps(content, indent=4) + "\n")

    def write_text(self, name: str, text: str) -> None:
        """Write a text file into the folder."""
        try:
            (self.folder / name).write_text(text, encoding="utf-8", errors="backslashreplace")
        except OSError as error:
            raise self._make_error(error) from error

    def _make_error(self, error: Exception) -> UserError:
        return UserError(f"writing {self._out} failed ({error}): is the disk full?")

    def commit(self) -> None:
        """Make the folder appear under its name."""
        check_free(self._out, self._flag)
        try:
            hide_paths(self.folder)
        except OSError as error:
            raise self._make_error(error) from error
        # The temporary folder is private; a model is as readable as any other new folder.
        umask = os.umask(0)
        os.umask(umask)
        self.folder.chmod(0o777 & ~umask)
        try:
            os.rename(self.folder, self._out)
        except OSError as error:
            raise self._make_error(error) from error


def check_free(out: Path, flag: str = "--mlx-path") -> None:
    """Raise a UserError if ``out`` exists, its parent does not, or its name is not UTF-8."""
    files.check_name(out)
    if os.path.lexists(out):
        raise UserError(f"{out} exists already: remove it or give another {flag}")
    if not out.absolute().parent.is_dir():
        raise UserError(f"{out.absolute().parent} is no folder: create it first")


def _check_space(out: Path, expected_bytes: int, flag: str) -> None:
    parent = out.absolute().parent
    free = shutil.disk_usage(parent).free
    needed = int(expected_bytes * 1.01) + (64 << 20)
    if needed > free:
        raise UserError(
            f"{parent} has {free / 1e9:.2f} GB free, the result takes {needed / 1e9:.2f} GB: "
            f"make room or give another {flag}"
        )


def _save_shard(file: Path, tensors: dict[str, mx.array]) -> None:
    """Write a file and wait until it is on the disk; a folder that appears survives a power cut."""
    mx.save_safetensors(str(file), tensors, metadata={"format": "mlx"})
    sync_file(file)
