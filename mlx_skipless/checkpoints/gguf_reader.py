"""GGUF files as they lie on disk: metadata, and the rows of tensors. Knows no architecture."""

import math
import struct
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from ..errors import UserError, first_line
from . import files
from .gguf_metadata import Metadata

# The metadata of a vocabulary of a quarter of a million, with its merges, has a million values.
MOST_VALUES, MOST_KEYS, MOST_TENSORS = 3 << 20, 1 << 12, 1 << 14
UNKNOWN = "GGMLQuantizationType", "appears to be version"  # in what gguf says of new files
AT_ONCE = 1 << 23  # bytes that are decoded at once


class _Reader(gguf.GGUFReader):
    """A reader that notices where a file ends, and reads arrays as a whole.

    The original reads on for as long as the header says, and takes an array value by value. It maps
    the file, so only metadata is read through it, and only when the file is opened.
    """

    _values = 0

    def _get(self, offset: int, dtype: Any, count: int = 1, override_order: Any = None) -> Any:
        if offset + count > len(self.data):  # before a count overflows
            raise ValueError("it ends early")
        found = super()._get(offset, dtype, count, override_order)
        if len(found) < count:
            raise ValueError("it ends early")
        return found

    def _build_fields(self, offs: int, count: int) -> int:
        _check_count(count, MOST_KEYS, "keys")
        return super()._build_fields(offs, count)

    def _build_tensor_info(self, offs: int, count: int) -> tuple[int, list[gguf.ReaderField]]:
        _check_count(count, MOST_TENSORS, "tensors")
        return super()._build_tensor_info(offs, count)

    def _get_field_parts(self, orig_offs: int, raw_type: int) -> tuple[int, list, list, list]:
        """Read a value; an array of numbers is one part, one of strings a part for each."""
        if raw_type != gguf.GGUFValueType.ARRAY:
            return super()._get_field_parts(orig_offs, raw_type)
        raw_kind = self._get(orig_offs, np.uint32)
        length = self._get(orig_offs + 4, np.uint64)
        start, count = orig_offs + 12, int(length[0])
        self._values += count
        _check_count(self._values, MOST_VALUES, "values")
        kind = gguf.GGUFValueType(raw_kind[0])
        types = [gguf.GGUFValueType.ARRAY, *([kind] if count else [])]
        if kind in self.gguf_scalar_to_np:
            values = self._get(start, self.gguf_scalar_to_np[kind], count)
            return 12 + values.nbytes, [raw_kind, length, values], [2], types
        if kind != gguf.GGUFValueType.STRING:
            raise ValueError("it has arrays of arrays")
        parts = self._read_strings(start, count)
        size = 12 + 8 * count + sum(map(len, parts))
        return size, [raw_kind, length, *parts], list(range(2, 2 + count)), types

    def _read_strings(self, offset: int, count: int) -> list[np.ndarray]:
        """The bytes of strings that follow each other."""
        data: Any = np.asarray(self.data)
        order = ">" if self.byte_order == "S" else "<"
        length_at = struct.Struct(f"{order}Q").unpack_from
        parts = []
        for _ in range(count):
            start = offset + 8
            if start > len(data):
                raise ValueError("it ends early")
            offset = start + length_at(data, offset)[0]
            parts.append(data[start:offset])
        if offset > len(data):
            raise ValueError("it ends early")
        return parts


def _check_count(count: int, most: int, what: str) -> None:
    if count > most:
        raise ValueError(f"it has {count:,} {what} or more, and no model has {most:,}")


class GGUFFile:
    """A GGUF file.

    Attributes:
        path: where it is.
        metadata: its keys and values.
        tensors: what its header says of its tensors, by name.

    Raises:
        ValueError, LookupError, ArithmeticError, TypeError: for a corrupt file.
        UserError: for a type of tensors that cannot be read, the other byte order, or a file that
            the gguf package does not know.
    """

    def __init__(self, path: Path):
        self.path, self._state = path, files.take_state(path)
        try:
            self._reader = _Reader(path)
        except ValueError as error:
            if any(said in str(error) for said in UNKNOWN):
                raise UserError(
                    f"{path} has what this version of the gguf package does not know "
                    f"({first_line(error)}): update gguf, use another export, or download it again"
                ) from error
            raise
        self.metadata = Metadata(self._field, tuple(self._reader.fields), str(path))
        self.tensors = {tensor.name: tensor for tensor in self._reader.tensors}

    def check_readable(self) -> None:
        """Raise a UserError for a type of tensors that cannot be read, or the other byte order."""
        if self._reader.byte_order == "S":
            raise UserError(f"{self.path} is of the other byte order, which is not supported")
        for tensor in self.tensors.values():
            block = np.zeros(gguf.GGML_QUANT_SIZES[tensor.tensor_type][1], np.uint8)
            self._dequantize(tensor, block)

    def _field(self, key: str) -> Any:
        """The metadata's value of a key; None if it has none."""
        field = self._reader.get_field(key)
        if field is None:
            return None
        value = field.contents()
        if field.types == [gguf.GGUFValueType.FLOAT32]:
            return float(str(np.float32(value)))  # 1e-05 rather than 9.999999747378752e-06
        return value

    def read_parts(self, tensor: gguf.ReaderTensor) -> Iterator[np.ndarray]:
        """Read a tensor as it lies, (rows, columns or bytes), some rows at a time."""
        mapped = tensor.data  # touching the map would end this process if the file shrank
        *outer, width = mapped.shape
        rows, length = math.prod(outer), width * mapped.itemsize
        step = max(1, AT_ONCE // max(1, length))
        for start in range(0, rows, step):
            data = np.empty((min(step, rows - start), width), mapped.dtype)
            files.fill(self.path, tensor.data_offset + start * length, data.view(np.uint8))
            yield data

    def decode(self, tensor: gguf.ReaderTensor) -> Iterator[np.ndarray]:
        """Read a tensor's values in float32, (rows, columns), some rows at a time."""
        return (self._dequantize(tensor, data) for data in self.read_parts(tensor))

    def _dequantize(self, tensor: gguf.ReaderTensor, data: np.ndarray) -> np.ndarray:
        """Data of a tensor's type in float32."""
        try:
            dense = gguf.quants.dequantize(data, tensor.tensor_type)
        except NotImplementedError as error:
            raise UserError(
                f"{tensor.name} in {self.path} is of the type {tensor.tensor_type.name}, which "
                "cannot be read: use another export"
            ) from error
        return dense.astype(np.float32)

    def read_ahead(self, tensors: Iterable[gguf.ReaderTensor]) -> None:
        """Have the system fetch tensors in the background."""
        files.read_ahead((self.path, int(t.data_offset), int(t.n_bytes)) for t in tensors)

    def check_unchanged(self) -> None:
        """Check that the file has not changed since it was opened.

        Raises:
            UserError: if it has.
        """
        files.check_states({self.path: self._state})

    def check_length(self) -> None:
        """Check that the file is as long as when it was opened; reading its map would fail.

        Raises:
            UserError: if it is not.
        """
        if self.path.stat().st_size < self._state[0]:
            raise UserError(f"{self.path} has become shorter: copy or download it again")
