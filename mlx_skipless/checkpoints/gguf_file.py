"""GGUF files: metadata as a Hugging Face config, tensors in Hugging Face's names."""

import re
import struct
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import gguf
import mlx.core as mx
import numpy as np
from transformers import PreTrainedTokenizerFast

from ..errors import UserError, first_line
from ..network.names import EMBEDDING, HEAD
from . import files, gguf_config, gguf_tokenizer
from .gguf_architectures import find_architecture
from .gguf_metadata import Metadata
from .gguf_packed import RepackedStore
from .safetensors import FLOATS, find_usual_dtype

# The metadata of a vocabulary of a quarter of a million, with its merges, has a million values.
MOST_VALUES, MOST_KEYS, MOST_TENSORS = 3 << 20, 1 << 12, 1 << 14
AT_ONCE = 1 << 24  # numbers that are decoded at once
PICTURES = ("v.", "mm.")  # tensors of the tower that sees pictures, which is left out


class _Reader(gguf.GGUFReader):
    """A reader that notices where a file ends, and reads arrays as a whole.

    The original reads on for as long as the header says, and takes an array value by value. It maps
    the file, so only metadata is read through it, and only when the file is opened.
    """

    _values = _keys = 0

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


ROTATED = {".q_proj.": "num_attention_heads", ".k_proj.": "num_key_value_heads"}


class GGUFStore:
    """The tensors of a GGUF file.

    Attributes:
        config: the config.json that the model would have.
        packing: how its weights are quantized; None for dense ones.
        shapes: of its tensors, by Hugging Face's names.
        dtypes: the types that dense copies of its tensors would have. The values that ``read``
            returns are float32, which holds every type exactly.
        kinds: GGUF's types of them.
        packed: the tensors with those packed as MLX does that can be without a new rounding.
        runs: whether there are any of these.

    Raises:
        UserError: for an unknown architecture, a corrupt file, or a key that changes the network
            and is not understood.
    """

    def __init__(self, path: Path):
        self.path, self._state = path, files.take_state(path)
        try:
            with np.errstate(over="raise", divide="raise", invalid="raise"):
                self._reader = _Reader(path)
                self._parse({t.name: t for t in self._reader.tensors})
        except (
            OSError, ValueError, TypeError, LookupError, ArithmeticError, RecursionError,
        ) as error:  # fmt: skip
            raise UserError(
                f"{path} is truncated or no GGUF file ({error}): download it again"
            ) from error

    def _parse(self, stored: dict[str, gguf.ReaderTensor]) -> None:
        self._metadata = Metadata(self._field, tuple(self._reader.fields), str(self.path))
        gguf_config.check_support(self._metadata)
        self._architecture = find_architecture(self._metadata)
        gguf_config.check_keys(self._metadata, self._architecture)
        if self._reader.byte_order == "S":
            raise UserError(f"{self.path} is of the other byte order, which is not supported")
        for tensor in stored.values():
            block = np.zeros(gguf.GGML_QUANT_SIZES[tensor.tensor_type][1], np.uint8)
            self._dequantize(tensor, block)
        tables = {name: stored.pop(name) for name in self._architecture.tables if name in stored}
        self._tensors: dict[str, gguf.ReaderTensor] = {}
        modules = self._architecture.name_modules()
        for original, tensor in stored.items():
            if original.startswith(PICTURES):
                continue
            name = _to_hugging_face(original, modules, self._architecture.bare)
            if name in self._tensors:
                raise ValueError(f"{original} comes twice, under two names")
            self._tensors[name] = tensor
        self.shapes = {
            name: tuple(int(n) for n in reversed(tensor.shape))
            for name, tensor in self._tensors.items()
        }
        if f"{EMBEDDING}.weight" not in self.shapes:
            raise UserError(f"{self.path} has no tensor token_embd.weight: download it again")
        self.config = gguf_config.make_config(
            self._metadata,
            self._architecture,
            self.shapes[f"{EMBEDDING}.weight"][0],
            f"{HEAD}.weight" not in self.shapes,
            {name: partial(self._decode, table) for name, table in tables.items()},
        )
        self.kinds = {name: tensor.tensor_type for name, tensor in self._tensors.items()}
        packed = sorted({kind.name for kind in self.kinds.values()} - FLOATS.keys())
        self.packing = f"GGUF {', '.join(packed)}" if packed else None
        self.dtypes: dict[str, mx.Dtype | None] = {
            name: FLOATS.get(kind.name, mx.float16) for name, kind in self.kinds.items()
        }
        self.packed = RepackedStore(self, find_usual_dtype(self.shapes, self.dtypes))
        self.runs = bool(self.packed.entry)
        if self.runs:
            self.config["quantization"] = self.packed.entry

    def _field(self, key: str) -> Any:
        """The metadata's value of a key; None if it has none."""
        field = self._reader.get_field(key)
        if field is None:
            return None
        value = field.contents()
        if field.types == [gguf.GGUFValueType.FLOAT32]:
            return float(str(np.float32(value)))  # 1e-05 rather than 9.999999747378752e-06
        return value

    def _read_rows(self, tensor: gguf.ReaderTensor, start: int, stop: int | None) -> np.ndarray:
        """Read rows of a tensor, (rows, columns or bytes), in the file's order."""
        mapped = tensor.data  # reading through the map would end this process if the file shrank
        rows = mapped.reshape(-1, mapped.shape[-1])[start:stop]
        data = np.empty(rows.shape, mapped.dtype)
        files.fill(self.path, tensor.data_offset + start * rows.strides[0], data.view(np.uint8))
        return data

    def _decode_rows(self, tensor: gguf.ReaderTensor) -> Iterator[np.ndarray]:
        """Read a tensor's rows in float32, some at a time."""
        columns = int(tensor.shape[0])
        rows, step = int(tensor.n_elements) // columns, max(1, AT_ONCE // columns)
        for start in range(0, rows, step):
            yield self._dequantize(tensor, self._read_rows(tensor, start, start + step))

    def _decode(self, tensor: gguf.ReaderTensor) -> np.ndarray:
        """Read a tensor's values in float32, flat."""
        return np.concatenate([*self._decode_rows(tensor)]).reshape(-1)

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

    def tokenizer(self) -> PreTrainedTokenizerFast | None:
        """Make the tokenizer that the metadata describe; None if they describe none.

        Raises:
            UserError: if it is broken or of an unknown kind.
        """
        if self.path.stat().st_size < self._state[0]:  # the map, which this reads, ends early, too
            raise UserError(f"{self.path} has become shorter: copy or download it again")
        try:
            tokenizer = gguf_tokenizer.make_tokenizer(
                self._field, self._reader.fields, str(self.path)
            )
        except UserError:
            raise
        except Exception as error:  # transformers and tokenizers raise whatever they like
            raise UserError(
                f"{self.path} has a broken tokenizer ({first_line(error)}): download it again"
            ) from error
        if tokenizer is not None and len(tokenizer) > self.config["vocab_size"]:
            raise UserError(
                f"{self.path} has {len(tokenizer)} tokens and {self.config['vocab_size']} "
                "embeddings: download it again"
            )
        return tokenizer

    def read(self, names: Iterable[str]) -> dict[str, mx.array]:
        """Read the tensors of these names, dense, float32.

        Raises:
            UserError: if one cannot be read.
        """
        return {name: self.decode(name, mx.float32) for name in names}

    def read_ahead(self, names: Iterable[str]) -> None:
        """Have the system fetch these tensors in the background."""
        found = (self._tensors[name] for name in names)
        files.read_ahead((self.path, int(t.data_offset), int(t.n_bytes)) for t in found)

    def check_unchanged(self) -> None:
        """Check that the file has not changed since it was opened.

        Raises:
            UserError: if it has.
        """
        files.check_states({self.path: self._state})

    def decode(self, name: str, dtype: mx.Dtype) -> mx.array:
        """Read a tensor, dense, as a number type."""
        tensor, offset = self._tensors[name], 0.0
        if name.endswith("norm.weight"):
            offset = self._architecture.gain_offset
        parts = [mx.array(rows - offset).astype(dtype) for rows in self._decode_rows(tensor)]
        mx.eval(parts)
        whole = mx.concatenate(parts) if len(parts) > 1 else parts[0]
        return self.arrange(name, whole.reshape(self.shapes[name]))

    def read_blocks(self, name: str) -> np.ndarray:
        """Read a quantized tensor's blocks: (..., bytes of a row)."""
        tensor = self._tensors[name]
        rows = self._read_rows(tensor, 0, None)
        return rows.reshape(*self.shapes[name][:-1], -1)

    def arrange(self, name: str, rows: Any) -> Any:
        """Put the rows of a tensor, or of a part of it, into Hugging Face's order."""
        key = next((key for part, key in ROTATED.items() if part in name), None)
        if key is None or not self._architecture.paired:
            return rows
        return _split_rotary_pairs(rows, self.config[key])


def _to_hugging_face(name: str, modules: Mapping[str, str], bare: tuple[str, ...]) -> str:
    """A tensor's name in Hugging Face's terms; an unknown one as it is."""
    module, _, part = name.rpartition(".")
    layer = re.fullmatch(r"blk\.([^.]+)\.([^.]+)", module)
    path = modules.get(f"blk.0.{layer[2]}" if layer else module)
    if path is None:
        return name
    path = path.replace(".0.", f".{layer[1]}.") if layer else path
    return path if part == "weight" and path.endswith(bare) else f"{path}.{part}"


def _split_rotary_pairs(rows: Any, heads: int) -> Any:
    """Reorder rows (heads * head_dim, …) from rotary pairs side by side to halves of each head.

    GGUF keeps the two channels of a pair next to each other, Hugging Face half a head apart.
    """
    pairs = rows.shape[0] // heads // 2
    return rows.reshape(heads, pairs, 2, -1).swapaxes(1, 2).reshape(rows.shape)
