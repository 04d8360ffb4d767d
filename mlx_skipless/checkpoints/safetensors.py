"""Safetensors files: what their headers say, and their tensors when these are asked for.

Every header is checked before any weight is read. Nothing is unpickled or mapped into memory.
"""

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeGuard

import mlx.core as mx
from safetensors import SafetensorError, safe_open

from ..errors import UserError
from . import files

FLOATS = {"F16": mx.float16, "BF16": mx.bfloat16, "F32": mx.float32}
TYPES = FLOATS | {
    "U8": mx.uint8, "U16": mx.uint16, "U32": mx.uint32, "U64": mx.uint64,
    "I8": mx.int8, "I16": mx.int16, "I32": mx.int32, "I64": mx.int64, "BOOL": mx.bool_,
}  # fmt: skip
BYTES = ("F8_E4M3", "F8_E8M0")  # number types that MLX has not; read as their bytes, uint8
WHOLE = "model.safetensors"
INDEX = f"{WHOLE}.index.json"
LARGEST = 1 << 31  # MLX's sizes along an axis are 32-bit

Shape = tuple[int, ...]


class Store(Protocol):
    """Named tensors on disk.

    ``shapes`` and ``dtypes`` are known before anything is read; a dtype is None if MLX has no such
    number type. ``packing`` says how the tensors are quantized on disk, None if they are not.
    ``read`` returns tensors, and ``read_ahead`` asks the system to fetch them early.
    ``check_unchanged`` raises a ``UserError`` if a file has changed since it was opened.
    """

    @property
    def packing(self) -> str | None: ...
    @property
    def shapes(self) -> Mapping[str, Shape]: ...
    @property
    def dtypes(self) -> Mapping[str, mx.Dtype | None]: ...
    def read(self, names: Iterable[str]) -> dict[str, mx.array]: ...
    def read_ahead(self, names: Iterable[str]) -> None: ...
    def check_unchanged(self) -> None: ...


def is_float(dtype: mx.Dtype | None) -> TypeGuard[mx.Dtype]:
    """Whether a tensor's number type is one that weights may have."""
    return dtype is not None and dtype in FLOATS.values()


def find_usual_dtype(
    shapes: Mapping[str, Shape], dtypes: Mapping[str, mx.Dtype | None]
) -> mx.Dtype:
    """The number type that most matrices have, whatever a config declares."""
    counts = Counter(d for n, d in dtypes.items() if is_float(d) and len(shapes[n]) > 1)
    return counts.most_common(1)[0][0] if counts else mx.float32


@dataclass(frozen=True)
class _Tensor:
    """Where a file has a tensor; ``dtype`` is None if MLX has no such number type as ``kind``."""

    file: Path
    offset: int
    nbytes: int
    shape: Shape
    dtype: mx.Dtype | None
    kind: str

    def read(self, name: str) -> mx.array:
        """The tensor's values. MLX's own reader reports no error when a read fails."""
        dtype = mx.uint8 if self.kind in BYTES else self.dtype
        if dtype is None:
            raise UserError(f"{name} in {self.file} has the number type {self.kind}, not read here")
        if self.nbytes == 0:
            return mx.zeros(self.shape, dtype)
        *rows, last = self.shape or (1,)
        array = mx.zeros((*rows, last * dtype.size), mx.uint8)
        mx.eval(array)
        files.fill(self.file, self.offset, array)
        return array.view(dtype).reshape(self.shape)


class SafetensorsStore:
    """The tensors of a folder's safetensors files.

    Attributes:
        files: the files that they are in, as ``find_weight_files`` lists them.
        kinds: the number types that MLX has not, by the tensor's name, as safetensors calls them.

    Raises:
        UserError: if there are no such files, if one is missing, truncated, corrupt or outside the
            folder, or if two have tensors of the same name.
    """

    packing = None

    def __init__(self, folder: Path):
        self._tensors: dict[str, _Tensor] = {}
        self.files = find_weight_files(folder)
        self._states = {file: files.take_state(file) for file in self.files}
        for file in self.files:
            for name, tensor in read_header(file).items():
                if name in self._tensors:
                    raise UserError(
                        f"{name} is in {file} and in {self._tensors[name].file.name}: "
                        "download the checkpoint again, into a new folder"
                    )
                self._tensors[name] = tensor
        self.shapes = {name: tensor.shape for name, tensor in self._tensors.items()}
        self.dtypes = {name: tensor.dtype for name, tensor in self._tensors.items()}
        self.kinds = {name: t.kind for name, t in self._tensors.items() if t.dtype is None}

    def check_unchanged(self) -> None:
        """Check that no file has changed since it was opened.

        Whoever has read the tensors calls this afterwards. What was read before and after a change
        is of two models, and MLX reports no error when a read of its own fails.

        Raises:
            UserError: if one has changed.
        """
        files.check_states(self._states)

    def read(self, names: Iterable[str]) -> dict[str, mx.array]:
        """Read the tensors of these names.

        Raises:
            UserError: if one cannot be read.
        """
        return {name: self._tensors[name].read(name) for name in names}

    def load(self) -> dict[str, mx.array]:
        """Return all tensors, lazily: MLX reads one when it is used."""
        return {name: array for file in self.files for name, array in _load(file).items()}

    def read_ahead(self, names: Iterable[str]) -> None:
        """Have the system fetch these tensors in the background."""
        found = (self._tensors[name] for name in names)
        files.read_ahead((tensor.file, tensor.offset, tensor.nbytes) for tensor in found)


def _load(file: Path) -> dict[str, mx.array]:
    loaded = mx.load(str(file))
    assert isinstance(loaded, dict)
    return loaded


def read_header(file: Path) -> dict[str, _Tensor]:
    """The tensors that the header of a safetensors file lists.

    The safetensors library checks the header, except for names that occur twice: parsers differ in
    which of the two they take.

    Raises:
        UserError: if the file is missing or its header contradicts itself or the file.
    """
    if not files.is_there(file):
        raise UserError(f"no {file.name} in {file.parent}: download the checkpoint again")
    try:
        with safe_open(str(file), framework="numpy"):
            pass
        with file.open("rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            header = json.loads(opened.read(length), object_pairs_hook=_refuse_duplicates)
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(
            f"{file} is truncated or corrupt ({error}): download or copy it again"
        ) from error
    header.pop("__metadata__", None)
    if any(size >= LARGEST for entry in header.values() for size in entry["shape"]):
        raise UserError(f"{file} has a tensor of an absurd shape: download or copy it again")
    found = {}
    for name, entry in header.items():
        start, end = entry["data_offsets"]
        kind, shape = entry["dtype"], tuple(entry["shape"])
        at, nbytes = 8 + length + start, end - start
        found[name] = _Tensor(file, at, nbytes, shape, TYPES.get(kind), kind)
    return found


def _refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("its header names something twice")
    return found


def find_weight_files(folder: Path) -> list[Path]:
    """List the files that a model's weights are in, by one rule for whatever reads them.

    A folder's index names them. Any other file is no part of the model then: a stray shard, or one
    of an earlier version. Without an index they are all that are called model*.safetensors. Every
    tensor in these files belongs to the model, also one that the index does not list.

    An index is left over from another version if a model.safetensors is there, which it does not
    name, and none of those that it names.

    Raises:
        UserError: if there is none, or if the index is malformed or names one that is missing.
    """
    index = folder / INDEX
    if files.is_there(index):
        named = [folder / name for name in read_index(index)]
        missing = [file.name for file in named if not files.is_there(file)]
        if not missing:
            return named
        if len(missing) < len(named) or not files.is_there(folder / WHOLE):
            raise UserError(_explain_missing(folder, missing, len(named)))
        return [folder / WHOLE]
    found = sorted(folder.glob("model*.safetensors"))
    if not found:
        pickled = any(folder.glob("*.bin")) or any(folder.glob("*.pt*"))
        why = " (pickled .bin and .pt files are never read)" if pickled else ""
        raise UserError(
            files.explain_other_formats(folder)
            or f"no model*.safetensors in {folder}{why}: give a safetensors checkpoint"
        )
    return found


def explain_second_model(folder: Path) -> Iterator[str]:
    """Say so where a folder has a model.safetensors beside the files that its index names."""
    there = (folder / INDEX).is_file() and (folder / WHOLE).is_file()
    if there and folder / WHOLE not in find_weight_files(folder):
        yield (
            f"{INDEX} names other files than {WHOLE}, which is there too and is not read: "
            "transformers reads it. Move one of the two models away"
        )


def _explain_missing(folder: Path, missing: list[str], named: int) -> str:
    """Say which of the files that an index names are missing, and what to do."""
    more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
    way_out = "download it again"
    if len(missing) == named and any(folder.glob("model*.safetensors")):
        way_out += f", or delete {INDEX} if it is left over from another version"
    return f"{folder} lacks {missing[0]}{more}, which its index names: {way_out}"


def read_index(index: Path) -> list[str]:
    """List the names of the files that an index names; they may be missing.

    Raises:
        UserError: if it is malformed, or names something outside its folder.
    """
    names = files.read_json(index).get("weight_map")
    if not isinstance(names, dict) or not {*map(type, names.values())} == {str}:
        raise UserError(f'{index} has no "weight_map": download the checkpoint again')
    found = sorted(set(names.values()))
    for name in found:
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise UserError(f"{index} names {name!r}, which is not a file of its folder: refused")
    return found
