"""Quantized tensors of MLX, AWQ and GPTQ, read as dense ones.

Weights come as Hugging Face stores them, (out, in), in float32, which holds every product of a
packed value and its scale exactly. They are lazy: nothing large is computed before it is used.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import mlx.core as mx

from ..constants import MODES
from ..errors import UserError
from ..network.parts import unpack
from .safetensors import FLOATS, Shape, Store, is_float

Arrays = Mapping[str, mx.array]
Shapes = Mapping[str, Shape]
Types = Mapping[str, mx.Dtype | None]
WORDS = (mx.int32, mx.uint32)
SCALES = tuple(FLOATS.values())
AGAIN = "correct the quantization in config.json or download the checkpoint again"
AWQ_ORDER = [0, 4, 1, 5, 2, 6, 3, 7]


class Scheme:
    """How a checkpoint packs its matrices.

    Attributes:
        name: what a user calls it, e.g. "GPTQ 4-bit".
        marker: the suffix of a tensor that only packed matrices have.
        parts: the suffixes of all tensors that can belong to a packed matrix.
    """

    name: str
    marker: str
    parts: tuple[str, ...]

    def find_shape(self, path: str, shapes: Shapes, types: Types) -> Shape:
        """The shape of the dense matrix at ``path``: (out, in), or (experts, out, in).

        Raises:
            UserError: if a part is missing, does not fit the others or has another number type.
        """
        try:
            dense, expected = self._layout(path, shapes)
        except (KeyError, ValueError) as error:
            raise UserError(f"{path} is no complete {self.name} matrix: {AGAIN}") from error
        for part, shape in expected.items():
            found = shapes.get(path + part)
            if found != shape:
                raise UserError(
                    f"{path}{part} has shape {found}, {self.name} asks for {shape}: {AGAIN}"
                )
        kinds = {part: types[path + part] for part in self.parts if path + part in types}
        for part, kind in kinds.items():
            if kind is None or kind not in self._types(path, part):
                raise UserError(f"{path}{part} has a number type that {self.name} has not: {AGAIN}")
        return dense

    def _layout(self, path: str, shapes: Shapes) -> tuple[Shape, dict[str, Shape]]:
        """The dense matrix's shape, and the shapes that its parts must have for that."""
        raise NotImplementedError

    def _types(self, path: str, part: str) -> tuple[mx.Dtype, ...]:
        """The number types that a part of a matrix may have."""
        return SCALES if part == ".scales" else WORDS

    def unpack(self, path: str, arrays: Arrays) -> mx.array:
        """Compute the dense matrix at ``path``, (out, in), float32."""
        raise NotImplementedError


class MLXScheme(Scheme):
    """The packing of MLX; an entry for a matrix in the config overrides the common settings."""

    marker = ".scales"
    parts = (".weight", ".scales", ".biases")

    def __init__(self, config: Mapping[str, Any]):
        self.config = config
        _, bits, mode = self.find_settings("")
        self.name = f"MLX {mode} {bits}-bit"

    def find_settings(self, path: str) -> tuple[int, int, str]:
        """Group size, bits and mode of the matrix at ``path``."""
        own = self.config.get(path)
        own = own if isinstance(own, Mapping) else self.config
        mode = own.get("mode", "affine")
        if not isinstance(mode, str) or mode not in MODES:
            raise UserError(f"MLX's mode {mode!r} cannot be read; known: {', '.join(MODES)}")
        sizes, widths = MODES[mode]
        group_size, bits = own.get("group_size") or sizes[0], own.get("bits") or widths[0]
        whole = type(group_size) is type(bits) is int
        if not whole or group_size not in sizes or bits not in widths:
            raise UserError(
                f"MLX's mode {mode} has no groups of {group_size} at {bits} bits: correct the "
                "quantization in config.json"
            )
        return group_size, bits, mode

    def _layout(self, path: str, shapes: Shapes) -> tuple[Shape, dict[str, Shape]]:
        group_size, bits, mode = self.find_settings(path)
        *out, groups = shapes[f"{path}.scales"]
        if not out:
            raise ValueError(out)
        n_in = groups * group_size
        expected: dict[str, Shape] = {".weight": (*out, n_in * bits // 32)}
        if mode == "affine":
            expected[".biases"] = (*out, groups)
        return (*out, n_in), expected

    def _types(self, path: str, part: str) -> tuple[mx.Dtype, ...]:
        if part == ".weight":
            return (mx.uint32,)
        return SCALES if self.find_settings(path)[2] == "affine" else (mx.uint8,)

    def unpack(self, path: str, arrays: Arrays) -> mx.array:
        weight, scales = arrays[f"{path}.weight"], arrays[f"{path}.scales"]
        return unpack(weight, scales, arrays.get(f"{path}.biases"), *self.find_settings(path))


class AWQScheme(Scheme):
    """AutoAWQ's GEMM layout: 4 bits, eight outputs to a word in the order 0 4 1 5 2 6 3 7."""

    name = "AWQ 4-bit"
    marker = ".qweight"
    parts = (".qweight", ".qzeros", ".scales")

    def _layout(self, path: str, shapes: Shapes) -> tuple[Shape, dict[str, Shape]]:
        n_in, words = shapes[f"{path}.qweight"]
        groups, _ = shapes[f"{path}.scales"]
        if groups == 0 or n_in % groups:
            raise ValueError(groups)
        return (words * 8, n_in), {".qzeros": (groups, words), ".scales": (groups, words * 8)}

    def unpack(self, path: str, arrays: Arrays) -> mx.array:
        scales = arrays[f"{path}.scales"].astype(mx.float32)  # (groups, out)
        values = _unpack_awq(arrays[f"{path}.qweight"])  # (in, out)
        zeros = _unpack_awq(arrays[f"{path}.qzeros"])  # (groups, out)
        n_in, n_out = values.shape
        values = values.reshape(scales.shape[0], -1, n_out)
        dense = (values - zeros[:, None]) * scales[:, None]
        return dense.reshape(n_in, n_out).T


def _unpack_awq(words: mx.array) -> mx.array:
    """Unpack words (rows, n / 8) to values (rows, n)."""
    shifts = mx.array(AWQ_ORDER, dtype=mx.uint32) * 4
    values = (words.view(mx.uint32)[..., None] >> shifts) & 0xF
    return values.reshape(words.shape[0], -1).astype(mx.int32)


class GPTQScheme(Scheme):
    """GPTQ at 2, 3, 4 or 8 bits, in any order of groups (``g_idx``, act-order).

    The values are a stream of bits along the input axis, the zero points a stream along the output
    axis. The original format stores zero points less one, ``gptq_v2`` as they are.
    """

    marker = ".qweight"
    parts = (".qweight", ".qzeros", ".scales", ".g_idx")

    def __init__(self, config: Mapping[str, Any]):
        bits = config.get("bits")
        if type(bits) is not int or bits not in (2, 3, 4, 8):
            raise UserError(f"GPTQ with {bits!r} bits is not supported; known: 2, 3, 4, 8")
        self.bits = bits
        layout = str(config.get("checkpoint_format") or config.get("format") or "gptq").lower()
        layout = "marlin" if config.get("is_marlin_format") else layout
        if layout not in ("gptq", "gptq_v2") or config.get("pack_dtype", "int32") != "int32":
            raise UserError(
                f"GPTQ in the layout {layout!r} cannot be read; known: gptq and gptq_v2 in int32. "
                "Use another export"
            )
        self.zero_shift = 0 if layout == "gptq_v2" else 1
        self.group_size = config.get("group_size")
        self.name = f"GPTQ {self.bits}-bit"

    def _layout(self, path: str, shapes: Shapes) -> tuple[Shape, dict[str, Shape]]:
        words, n_out = shapes[f"{path}.qweight"]
        groups, _ = shapes[f"{path}.scales"]
        if words % self.bits or n_out % 32:
            raise ValueError(n_out)
        n_in = words // self.bits * 32
        expected: dict[str, Shape] = {
            ".qzeros": (groups, n_out // 32 * self.bits),
            ".scales": (groups, n_out),
        }
        if f"{path}.g_idx" in shapes:
            expected[".g_idx"] = (n_in,)
        return (n_out, n_in), expected

    def unpack(self, path: str, arrays: Arrays) -> mx.array:
        scales = arrays[f"{path}.scales"].astype(mx.float32)  # (groups, out)
        values = _unpack_bits(arrays[f"{path}.qweight"], self.bits)  # (in, out)
        zeros = _unpack_bits(arrays[f"{path}.qzeros"].T, self.bits).T + self.zero_shift
        zeros = zeros & ((1 << self.bits) - 1)  # stored less one, 0 is all ones
        n_in = values.shape[0]
        group = arrays.get(f"{path}.g_idx")
        if group is None:
            size = self.group_size if type(self.group_size) is int else -1
            group = mx.arange(n_in) // (size if size > 0 else n_in)
        if mx.any((group < 0) | (group >= scales.shape[0])).item():
            raise UserError(f"{path} has inputs in groups that do not exist: {AGAIN}")
        return ((values - zeros[group]) * scales[group]).T


def _unpack_bits(words: mx.array, bits: int) -> mx.array:
    """Unpack words (words, columns) to values (words * 32 / bits, columns).

    The values of a column lie end to end, low bits first.
    """
    start = [i * bits for i in range(32)]
    word = mx.array([s // 32 for s in start])
    offset = mx.array([s % 32 for s in start], dtype=mx.uint32)[:, None]
    next_word = mx.minimum(word + 1, bits - 1)
    words = mx.contiguous(words).view(mx.uint32).reshape(-1, bits, words.shape[-1])
    low = words[:, word] >> offset
    # A value that crosses into the next word; a shift by 32 is undefined, so none is made.
    crosses = offset + bits > 32
    high = mx.where(crosses, words[:, next_word] << ((32 - offset) % 32), 0)
    values = (low | high) & ((1 << bits) - 1)
    return values.reshape(-1, words.shape[-1]).astype(mx.int32)


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
        return None
    method = declared.get("quant_method")
    if method == "awq":
        version = str(declared.get("version") or declared.get("format") or "gemm").lower()
        if declared.get("bits", 4) != 4 or version != "gemm":
            raise UserError("only AWQ's 4-bit GEMM layout can be read; use another export")
        return AWQScheme()
    if method == "gptq":
        return GPTQScheme(declared)
    raise UserError(
        f"the checkpoint is quantized as {method!r}, which cannot be read; supported: MLX, AWQ, "
        "GPTQ and GGUF. Use the unquantized model"
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
        self._paths = {
            name.removesuffix(scheme.marker)
            for name in store.shapes
            if name.endswith(scheme.marker)
        }
        self.shapes: dict[str, Shape] = {}
        self.dtypes: dict[str, mx.Dtype | None] = {}
        for name in store.shapes:
            path = name.rpartition(".")[0]
            if path in self._paths and name.endswith(scheme.parts):
                self.shapes[f"{path}.weight"] = scheme.find_shape(path, store.shapes, store.dtypes)
                scales = store.dtypes[f"{path}.scales"]
                self.dtypes[f"{path}.weight"] = scales if is_float(scales) else mx.bfloat16
            elif path in self._paths and name.endswith(".bias") and self._is_zero(name):
                continue  # GPTQ exporters write a bias of zeros beside matrices that have none
            else:
                self.shapes[name] = store.shapes[name]
                self.dtypes[name] = store.dtypes[name]

    def _is_zero(self, name: str) -> bool:
        return not mx.any(self.packed.read([name])[name] != 0).item()

    def _find_parts(self, name: str) -> list[str]:
        """The tensors on disk that a dense one is made of: itself, if it is not packed."""
        path = name.removesuffix(".weight")
        if path not in self._paths or not name.endswith(".weight"):
            return [name]
        return [path + p for p in self._scheme.parts if path + p in self.packed.shapes]

    def read(self, names: Iterable[str]) -> dict[str, mx.array]:
        """Read the tensors of these names, dense.

        Raises:
            UserError: if one cannot be read.
        """
        parts = {name: self._find_parts(name) for name in names}
        arrays = self.packed.read(part for group in parts.values() for part in group)
        return {
            name: arrays[name]
            if group == [name]
            else self._scheme.unpack(name.removesuffix(".weight"), arrays)
            for name, group in parts.items()
        }

    def read_ahead(self, names: Iterable[str]) -> None:
        """Have the system fetch these tensors' parts in the background."""
        self.packed.read_ahead(part for name in names for part in self._find_parts(name))

    def check_unchanged(self) -> None:
        """Check that no file has changed since it was opened.

        Raises:
            UserError: if one has changed.
        """
        self.packed.check_unchanged()
