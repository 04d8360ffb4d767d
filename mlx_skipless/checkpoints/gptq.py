"""Matrices as AutoAWQ and GPTQ pack them: whole numbers in 32-bit words, along either axis."""

import re
from collections.abc import Mapping
from typing import Any

import mlx.core as mx

from ..errors import UserError
from .safetensors import Shape
from .schemes import AGAIN, Arrays, Scheme, Shapes

AWQ_ORDER = [0, 4, 1, 5, 2, 6, 3, 7]


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
    pads_biases = True

    def __init__(self, config: Mapping[str, Any]):
        bits = config.get("bits")
        if type(bits) is not int or bits not in (2, 3, 4, 8):
            raise UserError(f"GPTQ with {bits!r} bits is not supported; known: 2, 3, 4, 8")
        self.bits = bits
        rules = config.get("dynamic") or {}
        if not isinstance(rules, Mapping) or any(not str(key).startswith("-:") for key in rules):
            raise UserError(
                'GPTQ with settings of single modules ("dynamic" in config.json) cannot be read: '
                "use another export"
            )
        layout = str(config.get("checkpoint_format") or config.get("format") or "gptq").lower()
        layout = "marlin" if config.get("is_marlin_format") else layout
        if layout not in ("gptq", "gptq_v2") or config.get("pack_dtype", "int32") != "int32":
            raise UserError(
                f"GPTQ in the layout {layout!r} cannot be read; known: gptq and gptq_v2 in int32. "
                "Use another export"
            )
        self.zero_shift = 0 if layout == "gptq_v2" else 1
        self.group_size: Any = config.get("group_size")
        self.name = f"GPTQ {self.bits}-bit"

    def _layout(self, path: str, shapes: Shapes) -> tuple[Shape, dict[str, Shape]]:
        words, n_out = shapes[f"{path}.qweight"]
        groups, _ = shapes[f"{path}.scales"]
        if words % self.bits or n_out % 32 or not groups:
            raise ValueError(n_out)
        n_in = words // self.bits * 32
        expected: dict[str, Shape] = {
            ".qzeros": (groups, n_out // 32 * self.bits),
            ".scales": (groups, n_out),
        }
        if f"{path}.g_idx" in shapes:
            expected[".g_idx"] = (n_in,)
        else:
            self._find_group_size(path, n_in, groups)
        return (n_out, n_in), expected

    def _find_group_size(self, path: str, n_in: int, groups: int) -> int:
        """Find how many inputs share a scale where no ``g_idx`` says it.

        The last group may be shorter than the size that the config names. Without one all are
        alike.

        Raises:
            UserError: if the groups are others than the config says, or cannot be alike.
        """
        named = None
        if re.fullmatch(r"-?\d+", str(self.group_size)):
            named = int(self.group_size)
        if named is None:
            size = n_in // groups
            fits = size * groups == n_in
        else:
            size = named if named > 0 else n_in
            fits = -(-n_in // size) == groups
        if not fits:
            raise UserError(
                f"{path} has {groups} groups of its {n_in} inputs, "
                f'"group_size" is {self.group_size!r}: {AGAIN}'
            )
        return size

    def unpack(self, path: str, arrays: Arrays) -> mx.array:
        scales = arrays[f"{path}.scales"].astype(mx.float32)  # (groups, out)
        values = _unpack_bits(arrays[f"{path}.qweight"], self.bits)  # (in, out)
        zeros = _unpack_bits(arrays[f"{path}.qzeros"].T, self.bits).T + self.zero_shift
        zeros = zeros & ((1 << self.bits) - 1)  # stored less one, 0 is all ones
        n_in = values.shape[0]
        group = arrays.get(f"{path}.g_idx")
        if group is None:
            group = mx.arange(n_in) // self._find_group_size(path, n_in, scales.shape[0])
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
