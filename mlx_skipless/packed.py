"""Quantized tensors of other tools, read as dense ones: MLX, AWQ and GPTQ.

Every function is lazy MLX and returns weights as Hugging Face stores them, (out, in).
"""

from collections.abc import Mapping
from typing import Any

import mlx.core as mx

from .errors import UserError

Arrays = Mapping[str, mx.array]
MODES = {"mxfp4": (32, 4), "mxfp8": (32, 8), "nvfp4": (16, 4)}  # mode: group size, bits
AWQ_ORDER = [0, 4, 1, 5, 2, 6, 3, 7]


class Scheme:
    """How one checkpoint packs its matrices.

    ``marker`` is the suffix that only packed matrices have; ``parts`` are all suffixes of one.
    """

    name: str
    marker: str
    parts: tuple[str, ...]

    def shape(self, path: str, shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, int]:
        """(out, in) of the dense matrix at ``path``, from its parts' shapes."""
        raise NotImplementedError

    def dense(self, path: str, arrays: Arrays) -> mx.array:
        """The dense matrix at ``path``, (out, in), in its scales' type or float32."""
        raise NotImplementedError


class MLXScheme(Scheme):
    """MLX's own modes; a per-path entry in the config overrides the common setting."""

    marker = ".scales"
    parts = (".weight", ".scales", ".biases", ".global_scale")

    def __init__(self, config: Mapping[str, Any]):
        self.config = config
        mode, bits = config.get("mode", "affine"), config.get("bits")
        self.name = f"MLX {mode} {bits}-bit"

    def settings(self, path: str) -> tuple[int, int, str]:
        own = self.config.get(path)
        own = own if isinstance(own, Mapping) else self.config
        mode = own.get("mode", "affine")
        group_size, bits = MODES.get(mode, (64, 4))
        return own.get("group_size") or group_size, own.get("bits") or bits, mode

    def shape(self, path: str, shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, int]:
        out, groups = shapes[f"{path}.scales"]
        return out, groups * self.settings(path)[0]

    def dense(self, path: str, arrays: Arrays) -> mx.array:
        group_size, bits, mode = self.settings(path)
        return mx.dequantize(
            arrays[f"{path}.weight"],
            arrays[f"{path}.scales"],
            arrays.get(f"{path}.biases"),
            group_size=group_size,
            bits=bits,
            mode=mode,
            global_scale=arrays.get(f"{path}.global_scale"),
        )


class AWQScheme(Scheme):
    """AutoAWQ's GEMM layout: 4 bits, eight outputs to a word in the order 0 4 1 5 2 6 3 7."""

    name = "AWQ 4-bit"
    marker = ".qweight"
    parts = (".qweight", ".qzeros", ".scales")

    def shape(self, path: str, shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, int]:
        n_in, words = shapes[f"{path}.qweight"]
        return words * 8, n_in

    def dense(self, path: str, arrays: Arrays) -> mx.array:
        scales = arrays[f"{path}.scales"]  # (groups, out)
        values = _awq_values(arrays[f"{path}.qweight"])  # (in, out)
        zeros = _awq_values(arrays[f"{path}.qzeros"]) if f"{path}.qzeros" in arrays else 8
        n_in, n_out = values.shape
        values = values.reshape(scales.shape[0], -1, n_out)
        zeros = zeros[:, None] if isinstance(zeros, mx.array) else zeros
        dense = (values - zeros).astype(mx.float32) * scales[:, None].astype(mx.float32)
        return dense.reshape(n_in, n_out).T.astype(scales.dtype)


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
        if bits not in (2, 3, 4, 8):
            raise UserError(f"GPTQ with {bits!r} bits is not supported; known: 2, 3, 4, 8")
        self.bits: int = bits
        self.zero_shift = 0 if config.get("checkpoint_format") == "gptq_v2" else 1
        self.name = f"GPTQ {self.bits}-bit"

    def shape(self, path: str, shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, int]:
        words, n_out = shapes[f"{path}.qweight"]
        return n_out, words * 32 // self.bits

    def dense(self, path: str, arrays: Arrays) -> mx.array:
        scales = arrays[f"{path}.scales"]  # (groups, out)
        values = _bit_stream(arrays[f"{path}.qweight"], self.bits)  # (in, out)
        zeros = _bit_stream(arrays[f"{path}.qzeros"].T, self.bits).T + self.zero_shift
        zeros = zeros & ((1 << self.bits) - 1)  # a stored zero of "all ones" stands for 0
        n_in = values.shape[0]
        group = arrays.get(f"{path}.g_idx")
        if group is None:
            group = mx.arange(n_in) // (n_in // scales.shape[0])
        dense = (values - zeros[group]).astype(mx.float32) * scales[group].astype(mx.float32)
        return dense.T.astype(scales.dtype)


def _bit_stream(words: mx.array, bits: int) -> mx.array:
    """(words, columns) to (words * 32 / bits, columns); values lie end to end, low bits first."""
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


def scheme_of(config: Mapping[str, Any]) -> Scheme | None:
    """The packing that a config.json declares; None for dense weights.

    Raises:
        UserError: for a packing that cannot be read.
    """
    if isinstance(own := config.get("quantization"), Mapping):
        return MLXScheme(own)
    declared = config.get("quantization_config")
    if not isinstance(declared, Mapping):
        return None
    method = declared.get("quant_method")
    if method == "awq":
        if declared.get("bits", 4) != 4 or declared.get("version", "gemm").lower() != "gemm":
            raise UserError("only AWQ's 4-bit GEMM layout can be read; use another export")
        return AWQScheme()
    if method == "gptq":
        return GPTQScheme(declared)
    raise UserError(
        f"the checkpoint is quantized as {method!r}, which cannot be read; supported: MLX, AWQ, "
        "GPTQ and GGUF. Use the unquantized model"
    )
