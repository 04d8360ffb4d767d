"""Quantized tensors of MLX and of other tools, read as dense ones.

Weights come as Hugging Face stores them, (out, in), in float32, which holds every product of a
packed value and its scale exactly. They are lazy: nothing large is computed before it is used.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import mlx.core as mx

from ..architectures.config import read_dtype
from ..errors import UserError
from .declared import read_compressed, read_fp8, read_modelopt, read_undeclared
from .gptq import AWQScheme, GPTQScheme
from .safetensors import SafetensorsStore, Shape, Store, is_float
from .scaled import E4M3
from .schemes import Kind, MLXScheme, Scheme

READERS = {
    "fp8": read_fp8,
    "fbgemm_fp8": read_fp8,
    "modelopt": read_modelopt,
    "compressed-tensors": read_compressed,
}


def is_packed(store: Store) -> bool:
    """Whether a checkpoint has packed matrices: of whatever kind, they are no float numbers."""
    return any(len(store.shapes[n]) > 1 and not is_float(kind) for n, kind in store.dtypes.items())


def find_scheme(config: Mapping[str, Any], store: Store | None = None) -> Scheme | None:
    """Find the packing that a config.json declares; None for dense weights.

    Tools leave the declaration in the config of what they have made dense, so the tensors have the
    last word.

    Args:
        config: a model's config.json.
        store: its tensors; None: the config alone is believed.

    Raises:
        UserError: for a packing that cannot be read.
    """
    own, declared = config.get("quantization"), config.get("quantization_config")
    for key, value in (("quantization", own), ("quantization_config", declared)):
        if value is not None and not isinstance(value, Mapping):
            raise UserError(f'"{key}" in config.json is {value!r}; it must be an object')
    if store is not None and not is_packed(store):
        return None
    if own is not None:
        return MLXScheme(own)
    if declared is None:
        found = isinstance(store, SafetensorsStore) and E4M3 in store.kinds.values()
        return read_undeclared(read_dtype(config)) if found else None
    method = declared.get("quant_method")
    if method == "awq":
        version = str(declared.get("version") or declared.get("format") or "gemm").lower()
        if declared.get("bits", 4) != 4 or version != "gemm":
            raise UserError("only AWQ's 4-bit GEMM layout can be read; use another export")
        return AWQScheme()
    if method == "gptq":
        return GPTQScheme(declared)
    if isinstance(method, str) and method in READERS:
        return READERS[method](declared, read_dtype(config))
    if method is None and "bits" in declared:
        raise UserError(
            'the "quantization_config" in config.json has no "quant_method": if MLX has quantized '
            'the checkpoint, call it "quantization"'
        )
    raise UserError(
        f"the checkpoint is quantized as {method!r}, which cannot be read; supported: MLX, AWQ, "
        "GPTQ, FP8, compressed-tensors, ModelOpt and GGUF. Use the unquantized model"
    )


class UnpackedStore:
    """A store whose packed matrices are read as dense ones, under the name ``X.weight``.

    Attributes:
        packed: the store that it reads.
        packing: how the matrices are packed, e.g. "GPTQ 4-bit".
        runs: whether mlx-lm runs the matrices packed as they are.
    """

    def __init__(self, store: Store, scheme: Scheme):
        self.packed, self._scheme = store, scheme
        self.packing = scheme.name
        self.runs = isinstance(scheme, MLXScheme)
        types: dict[str, Kind] = dict(store.dtypes)
        if isinstance(store, SafetensorsStore):
            types |= store.kinds
        self.shapes: dict[str, Shape] = {}
        self.dtypes: dict[str, mx.Dtype | None] = {}
        self._paths: dict[str, str] = {}  # of packed matrices, by their dense names
        self._empty_biases: list[str] = []
        parts: set[str] = set()
        for path in sorted(scheme.find_paths(store.shapes, types)):
            name = scheme.name_dense(path)
            self.shapes[name] = scheme.find_shape(path, store.shapes, types)
            self.dtypes[name] = scheme.find_dtype(path, types)
            self._paths[name] = path
            parts |= {path + part for part in scheme.parts}
        for name in store.shapes.keys() - parts:
            if scheme.ignored and name.endswith(scheme.ignored):
                continue
            if scheme.pads_biases and self._is_empty_bias(name):
                self._empty_biases.append(name)
                continue
            self.shapes[name], self.dtypes[name] = store.shapes[name], store.dtypes[name]

    def _is_empty_bias(self, name: str) -> bool:
        """Whether it is a bias of zeros beside a packed matrix."""
        beside = name.endswith(".bias") and f"{name.removesuffix('bias')}weight" in self._paths
        return beside and not mx.any(self.packed.read([name])[name] != 0).item()

    def _find_parts(self, name: str) -> list[str]:
        """The tensors on disk that a dense one is made of: itself, if it is not packed."""
        path = self._paths.get(name)
        if path is None:
            return [name]
        return [path + p for p in self._scheme.parts if path + p in self.packed.shapes]

    def _make(self, name: str, arrays: Mapping[str, mx.array]) -> mx.array:
        """Make a dense tensor of those on disk."""
        path = self._paths.get(name)
        return arrays[name] if path is None else self._scheme.unpack(path, arrays)

    def read(self, names: Iterable[str]) -> dict[str, mx.array]:
        """Read the tensors of these names, dense.

        Raises:
            UserError: if one cannot be read.
        """
        parts = {name: self._find_parts(name) for name in names}
        arrays = self.packed.read(part for group in parts.values() for part in group)
        return {name: self._make(name, arrays) for name in parts}

    def load(self) -> dict[str, mx.array]:
        """Return all tensors, dense and in their number types, lazily.

        Biases of zeros are among them: some networks have them.

        Raises:
            UserError: if parts of a matrix contradict each other.
        """
        assert isinstance(self.packed, SafetensorsStore), "no other file is read lazily"
        arrays = self.packed.load()
        made = {name: self._make(name, arrays) for name in (*self.shapes, *self._empty_biases)}
        types = {name: self.dtypes[name] for name in self._paths}
        return made | {name: made[name].astype(dtype) for name, dtype in types.items() if dtype}

    def read_ahead(self, names: Iterable[str]) -> None:
        """Have the system fetch these tensors' parts in the background."""
        self.packed.read_ahead(part for name in names for part in self._find_parts(name))

    def check_unchanged(self) -> None:
        """Check that no file has changed since it was opened.

        Raises:
            UserError: if one has changed.
        """
        self.packed.check_unchanged()
