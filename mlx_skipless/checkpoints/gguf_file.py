"""GGUF files: metadata as a Hugging Face config, tensors in Hugging Face's names."""

import re
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
from . import gguf_config, gguf_tokenizer
from .gguf_architectures import find_architecture
from .gguf_packed import RepackedStore
from .gguf_reader import GGUFFile
from .safetensors import FLOATS, find_usual_dtype

PICTURES = ("v.", "mm.")  # tensors of the tower that sees pictures, which is left out
PICTURES_NOTE = "what sees pictures is left out: the result reads text alone"
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
        notes: what there is to know of it, a sentence each.

    Raises:
        UserError: for an unknown architecture, a corrupt file, or a key that changes the network
            and is not understood.
    """

    def __init__(self, path: Path):
        self.path = path
        try:
            with np.errstate(over="raise", divide="raise", invalid="raise"):
                self._file = GGUFFile(path)
                self._parse(dict(self._file.tensors))
        except (
            OSError, ValueError, TypeError, LookupError, ArithmeticError, RecursionError,
        ) as error:  # fmt: skip
            raise UserError(
                f"{path} is truncated or no GGUF file ({error}): download it again"
            ) from error

    def _parse(self, stored: dict[str, gguf.ReaderTensor]) -> None:
        metadata = self._file.metadata
        gguf_config.check_support(metadata)
        self._architecture = find_architecture(metadata)
        gguf_config.check_keys(metadata, self._architecture)
        self._file.check_readable()
        tables = {name: stored.pop(name) for name in self._architecture.tables if name in stored}
        self.notes = (PICTURES_NOTE,) if any(n.startswith(PICTURES) for n in stored) else ()
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
            metadata,
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

    def _decode(self, tensor: gguf.ReaderTensor) -> np.ndarray:
        """Read a tensor's values in float32, flat."""
        return np.concatenate([*self._file.decode(tensor)]).reshape(-1)

    def tokenizer(self) -> PreTrainedTokenizerFast | None:
        """Make the tokenizer that the metadata describe; None if they describe none.

        Raises:
            UserError: if it is broken or of an unknown kind.
        """
        self._file.check_length()
        try:
            metadata = self._file.metadata
            tokenizer = gguf_tokenizer.make_tokenizer(metadata.field, metadata.keys, str(self.path))
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
        self._file.read_ahead(self._tensors[name] for name in names)

    def check_unchanged(self) -> None:
        """Check that the file has not changed since it was opened.

        Raises:
            UserError: if it has.
        """
        self._file.check_unchanged()

    def decode(self, name: str, dtype: mx.Dtype) -> mx.array:
        """Read a tensor, dense, as a number type."""
        tensor, offset = self._tensors[name], 0.0
        if name.endswith("norm.weight"):
            offset = self._architecture.gain_offset
        parts = [(mx.array(rows) - offset).astype(dtype) for rows in self._file.decode(tensor)]
        mx.eval(parts)
        whole = mx.concatenate(parts) if len(parts) > 1 else parts[0]
        return self.arrange(name, whole.reshape(self.shapes[name]))

    def read_blocks(self, name: str) -> Iterator[np.ndarray]:
        """Read a quantized tensor's blocks, (rows, bytes), some rows at a time."""
        return self._file.read_parts(self._tensors[name])

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
