"""GGUF files: metadata as a Hugging Face config, tensors dense and in Hugging Face's names."""

import re
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import gguf
import mlx.core as mx
import numpy as np
from transformers import PreTrainedTokenizerFast

from ..errors import UserError, first_line
from ..network.names import EMBEDDING, FINAL_NORM, HEAD, NORMS, PROJECTIONS
from . import files, gguf_config, gguf_tokenizer
from .safetensors import FLOATS

ROPE_FACTORS = "rope_freqs.weight"
# The metadata of a vocabulary of a quarter of a million, with its merges, has a million values.
MOST_VALUES, MOST_KEYS, MOST_TENSORS = 3 << 20, 1 << 12, 1 << 14


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


class GGUFStore:
    """The tensors of a GGUF file of the llama architecture (Llama, Mistral, SmolLM2, …).

    Attributes:
        config: the config.json that the model would have.
        packing: how its weights are quantized; None for dense ones.
        shapes: of its tensors, by Hugging Face's names.
        dtypes: the types that dense copies of its tensors would have. The values that ``read``
            returns are float32, which holds every type exactly.

    Raises:
        UserError: for another architecture, a corrupt file or an unknown RoPE scaling.
    """

    def __init__(self, path: Path):
        self._path, self._state = path, files.take_state(path)
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
        gguf_config.check_support(self._field, self._reader.fields, str(self._path))
        if self._reader.byte_order == "S":
            raise UserError(f"{self._path} is of the other byte order, which is not supported")
        for tensor in stored.values():
            block = np.zeros(gguf.GGML_QUANT_SIZES[tensor.tensor_type][1], np.uint8)
            self._dequantize(tensor, block)
        factors = stored.pop(ROPE_FACTORS, None)
        self._tensors: dict[str, gguf.ReaderTensor] = {}
        for original, tensor in stored.items():
            if (name := _to_hugging_face(original)) in self._tensors:
                raise ValueError(f"{original} comes twice, under two names")
            self._tensors[name] = tensor
        self.shapes = {
            name: tuple(int(n) for n in reversed(tensor.shape))
            for name, tensor in self._tensors.items()
        }
        if f"{EMBEDDING}.weight" not in self.shapes:
            raise UserError(f"{self._path} has no tensor token_embd.weight: download it again")
        self.config = gguf_config.make_config(
            self._field,
            str(self._path),
            self.shapes[f"{EMBEDDING}.weight"][0],
            f"{HEAD}.weight" not in self.shapes,
            None if factors is None else lambda: self._read(factors),
        )
        kinds = {name: tensor.tensor_type.name for name, tensor in self._tensors.items()}
        packed = sorted({*kinds.values()} - FLOATS.keys())
        self.packing = f"GGUF {', '.join(packed)}" if packed else None
        self.dtypes: dict[str, mx.Dtype | None] = {
            name: FLOATS.get(kind, mx.float16) for name, kind in kinds.items()
        }

    def _field(self, key: str) -> Any:
        """The metadata's value of a key; None if it has none."""
        field = self._reader.get_field(key)
        if field is None:
            return None
        value = field.contents()
        if field.types == [gguf.GGUFValueType.FLOAT32]:
            return float(str(np.float32(value)))  # 1e-05 rather than 9.999999747378752e-06
        return value

    def _read(self, tensor: gguf.ReaderTensor) -> np.ndarray:
        """A tensor's values in float32, in the file's layout."""
        mapped = tensor.data  # reading through the map would end this process if the file shrank
        data = np.empty(mapped.nbytes, np.uint8)
        files.fill(self._path, tensor.data_offset, data)
        return self._dequantize(tensor, data.view(mapped.dtype).reshape(mapped.shape))

    def _dequantize(self, tensor: gguf.ReaderTensor, data: np.ndarray) -> np.ndarray:
        """Data of a tensor's type in float32."""
        try:
            dense = gguf.quants.dequantize(data, tensor.tensor_type)
        except NotImplementedError as error:
            raise UserError(
                f"{tensor.name} in {self._path} is of the type {tensor.tensor_type.name}, which "
                "cannot be read: use another export"
            ) from error
        return dense.astype(np.float32)

    def tokenizer(self) -> PreTrainedTokenizerFast | None:
        """Make the tokenizer that the metadata describe; None if they describe none.

        Raises:
            UserError: if it is broken or of an unknown kind.
        """
        if self._path.stat().st_size < self._state[0]:  # the map, which this reads, ends early, too
            raise UserError(f"{self._path} has become shorter: copy or download it again")
        try:
            tokenizer = gguf_tokenizer.make_tokenizer(
                self._field, self._reader.fields, str(self._path)
            )
        except UserError:
            raise
        except Exception as error:  # transformers and tokenizers raise whatever they like
            raise UserError(
                f"{self._path} has a broken tokenizer ({first_line(error)}): download it again"
            ) from error
        if tokenizer is not None and len(tokenizer) > self.config["vocab_size"]:
            raise UserError(
                f"{self._path} has {len(tokenizer)} tokens and {self.config['vocab_size']} "
                "embeddings: download it again"
            )
        return tokenizer

    def read(self, names: Iterable[str]) -> dict[str, mx.array]:
        """Read the tensors of these names, dense, float32.

        Raises:
            UserError: if one cannot be read.
        """
        return {name: self._read_as_hugging_face(name) for name in names}

    def read_ahead(self, names: Iterable[str]) -> None:
        """Have the system fetch these tensors in the background."""
        found = (self._tensors[name] for name in names)
        files.read_ahead((self._path, int(t.data_offset), int(t.n_bytes)) for t in found)

    def check_unchanged(self) -> None:
        """Check that the file has not changed since it was opened.

        Raises:
            UserError: if it has.
        """
        files.check_states({self._path: self._state})

    def _read_as_hugging_face(self, name: str) -> mx.array:
        values = self._read(self._tensors[name]).reshape(self.shapes[name])
        if ".q_proj." in name:
            values = _split_rotary_pairs(values, self.config["num_attention_heads"])
        elif ".k_proj." in name:
            values = _split_rotary_pairs(values, self.config["num_key_value_heads"])
        return mx.array(values)


def _name_modules() -> dict[str, str]:
    """Hugging Face's module paths of layer 0 and beyond the layers, by GGUF's."""
    layer = [name for name in PROJECTIONS.values() if name != PROJECTIONS["router"]]
    layer += NORMS["pre"].values()
    paths = [EMBEDDING, FINAL_NORM, HEAD, *(f"model.layers.0.{name}" for name in layer)]
    known = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 1)
    return {known[path]: path for path in paths}


MODULES = _name_modules()


def _to_hugging_face(name: str) -> str:
    """A tensor's name in Hugging Face's terms; an unknown one as it is."""
    module, _, part = name.rpartition(".")
    layer = re.fullmatch(r"blk\.([^.]+)\.([^.]+)", module)
    path = MODULES.get(f"blk.0.{layer[2]}" if layer else module)
    if path is None:
        return name
    return f"{path.replace('.0.', f'.{layer[1]}.') if layer else path}.{part}"


def _split_rotary_pairs(rows: np.ndarray, heads: int) -> np.ndarray:
    """Reorder rows (heads * head_dim, …) from rotary pairs side by side to halves of each head.

    GGUF keeps the two channels of a pair next to each other, Hugging Face half a head apart.
    """
    pairs = rows.shape[0] // heads // 2
    return rows.reshape(heads, pairs, 2, -1).swapaxes(1, 2).reshape(rows.shape)
