"""Quantized tensors of other tools, read as dense ones: MLX, AWQ and GPTQ.

Weights come as Hugging Face stores them, (out, in), in float32, which holds every product of a
packed value and its scale. Lazy: nothing large is computed before it is used.
"""

from collections.abc import Mapping
from typing import Any

import mlx.core as mx

from ..constants import MODES
from ..errors import UserError

Arrays = Mapping[str, mx.array]
Shapes = Mapping[str, tuple[int, ...]]
Types = Mapping[str, mx.Dtype | None]
FLOATS = (mx.float16, mx.bfloat16, mx.float32)
WORDS = (mx.int32, mx.uint32)
AGAIN = "correct the quantization in config.json or download the checkpoint again"
AWQ_ORDER = [0, 4, 1, 5, 2, 6, 3, 7]


class Scheme:
    """How one checkpoint packs its matrices.

    ``marker`` is the suffix that only packed matrices have; ``parts`` are all suffixes of one.
    """

    name: str
    marker: str
    parts: tuple[str, ...]

    def shape(self, path: str, shapes: Shapes, types: Types) -> tuple[int, ...]:
        """(out, in) of the dense matrix at ``path``, from its parts' shapes; experts come first.

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

    def _layout(
        self, path: str, shapes: Shapes
    ) -> tuple[tuple[int, ...], dict[str, tuple[int, ...]]]:
        """(out, in) of the dense matrix, and the shapes that its parts have then."""
        raise NotImplementedError

    def _types(self, path: str, part: str) -> tuple[mx.Dtype, ...]:
        """The number types that a part of a matrix may have."""
        return FLOATS if part == ".scales" else WORDS

    def dense(self, path: str, arrays: Arrays) -> mx.array:
        """The dense matrix at ``path``, (out, in), float32."""
        raise NotImplementedError


class MLXScheme(Scheme):
    """MLX's own modes; a per-path entry in the config overrides the common setting."""

    marker = ".scales"
    parts = (".weight", ".scales", ".biases")

    def __init__(self, config: Mapping[str, Any]):
        self.config = config
        _, bits, mode = self.settings("")
        self.name = f"MLX {mode} {bits}-bit"

    def settings(self, path: str) -> tuple[int, int, str]:
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

    def _layout(
        self, path: str, shapes: Shapes
    ) -> tuple[tuple[int, ...], dict[str, tuple[int, ...]]]:
        group_size, bits, mode = self.settings(path)
        *out, groups = shapes[f"{path}.scales"]
        if not out:
            raise ValueError(out)
        n_in = groups * group_size
        expected: dict[str, tuple[int, ...]] = {".weight": (*out, n_in * bits // 32)}
        if mode == "affine":
            expected[".biases"] = (*out, groups)
        return (*out, n_in), expected

    def _types(self, path: str, part: str) -> tuple[mx.Dtype, ...]:
        if part == ".weight":
            return (mx.uint32,)
        return FLOATS if self.settings(path)[2] == "affine" else (mx.uint8,)

    def dense(self, path: str, arrays: Arrays) -> mx.array:
        group_size, bits, mode = self.settings(path)
        scales, biases = arrays[f"{path}.scales"], arrays.get(f"{path}.biases")
        if biases is not None:
            scales, biases = scales.astype(mx.float32), biases.astype(mx.float32)
        packed = arrays[f"{path}.weight"]
        return mx.dequantize(packed, scales, biases, group_size, bits, mode, dtype=mx.float32)


class AWQScheme(Scheme):
    """AutoAWQ's GEMM layout: 4 bits, eight outputs to a word in the order 0 4 1 5 2 6 3 7."""

    name = "AWQ 4-bit"
    marker = ".qweight"
    parts = (".qweight", ".qzeros", ".scales")

    def _layout(
        self, path: str, shapes: Shapes
    ) -> tuple[tuple[int, ...], dict[str, tuple[int, ...]]]:
        n_in, words = shapes[f"{path}.qweight"]
        groups, _ = shapes[f"{path}.scales"]
        if groups == 0 or n_in % groups:
            raise ValueError(groups)
        return (words * 8, n_in), {".qzeros": (groups, words), ".scales": (groups, words * 8)}

    def dense(self, path: str, arrays: Arrays) -> mx.array:
        scales = arrays[f"{path}.scales"].astype(mx.float32)  # (groups, out)
        values = _awq_values(arrays[f"{path}.qweight"])  # (in, out)
        zeros = _awq_values(arrays[f"{path}.qzeros"])  # (groups, out)
        n_in, n_out = values.shape
        values = values.reshape(scales.shape[0], -1, n_out)
        dense = (values - zeros[:, None]) * scales[:, None]
        return dense.reshape(n_in, n_out).T


def _awq_values(words: mx.array) -> mx.array:
    """(rows, n / 8) words to (rows, n) values."""
    shifts = mx.array(AWQ_ORDER, dtype=mx.uint32) * 4
    values = (words.view(mx.uint32)[..., None] >> shifts) & 0xF
    return values.reshape(words.shape[0], -1).astype(mx.int32)


class GPTQScheme(Scheme):
    """GPTQ at 2, 3, 4 or 8 bits, in any order of groups (``g_idx``, act-order).

    Values are a stream of bits along the input axis; zero points one along the output axis, stored
    less one in the original format and as they are in ``gptq_v2``.
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

    def _layout(
        self, path: str, shapes: Shapes
    ) -> tuple[tuple[int, ...], dict[str, tuple[int, ...]]]:
        words, n_out = shapes[f"{path}.qweight"]
        groups, _ = shapes[f"{path}.scales"]
        if words % self.bits or n_out % 32:
            raise ValueError(n_out)
        n_in = words // self.bits * 32
        expected: dict[str, tuple[int, ...]] = {
            ".qzeros": (groups, n_out // 32 * self.bits),
            ".scales": (groups, n_out),
        }
        if f"{path}.g_idx" in shapes:
            expected[".g_idx"] = (n_in,)
        return (n_out, n_in), expected

    def dense(self, path: str, arrays: Arrays) -> mx.array:
        scales = arrays[f"{path}.scales"].astype(mx.float32)  # (groups, out)
        values = _bit_stream(arrays[f"{path}.qweight"], self.bits)  # (in, out)
        zeros = _bit_stream(arrays[f"{path}.qzeros"].T, self.bits).T + self.zero_shift
        zeros = zeros & ((1 << self.bits) - 1)  # a stored zero of "all ones" stands for 0
        n_in = values.shape[0]
        group = arrays.get(f"{path}.g_idx")
        if group is None:
            size = self.group_size if type(self.group_size) is int else -1
            group = mx.arange(n_in) // (size if size > 0 else n_in)
        if mx.any((group < 0) | (group >= scales.shape[0])).item():
            raise UserError(f"{path} has inputs in groups that do not exist: {AGAIN}")
        return ((values - zeros[group]) * scales[group]).T


def _bit_stream(words: mx.array, bits: int) -> mx.array:
    """(words, columns) to (words * 32 / bits, columns): values end to end, low bits first."""
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


def find_scheme(config: Mapping[str, Any]) -> Scheme | None:
    """The packing that a config.json declares; None for dense weights.

    Raises:
        UserError: for a packing that cannot be read.
    """
    own, declared = config.get("quantization"), config.get("quantization_config")
    for key, value in (("quantization", own), ("quantization_config", declared)):
        if value is not None and not isinstance(value, Mapping):
            raise UserError(f'"{key}" in config.json is {value!r}; it must be an object')
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
