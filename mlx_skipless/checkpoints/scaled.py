"""Matrices of small numbers beside their scales, as FP8, compressed-tensors and ModelOpt pack them.

A number is a byte (an 8-bit float, or a whole number), some bits of a 32-bit word, or four bits of
a float. A scale belongs to a block of the matrix: all of it, a row, a group along the inputs, or a
rectangle, whose last ones may be cut off at the edge. What a checkpoint's tensors are called, and
of which shapes and types they are, tells these apart; its config says how large a block is.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import mlx.core as mx

from ..errors import UserError
from ..network.parts import dtype_name
from .safetensors import FLOATS, Shape
from .schemes import AGAIN, WORDS, Arrays, Kind, Kinds, Scheme, Shapes

E4M3, E8M0 = "F8_E4M3", "F8_E8M0"
POWERS = (mx.uint8, E8M0)  # a scale is 2 ** (byte - 127)
WEIGHT, PACKED = "", "_packed"
SCALE = ("_scale_inv", "_scale")  # two spellings of a factor
DIVISOR, FACTOR = "_global_scale", "_scale_2"  # of all scales of a matrix
ZERO, SHAPE, GROUP = "_zero_point", "_shape", "_g_idx"
PARTS = (WEIGHT, PACKED, *SCALE, DIVISOR, FACTOR, ZERO, SHAPE, GROUP)
BITS = (2, 4, 8)  # of whole numbers in words

Block = tuple[int, int]
ByPart = Mapping[str, mx.array]


@dataclass(frozen=True)
class Settings:
    """What a config says of a matrix.

    Attributes:
        bits: of a whole number.
        block: rows and columns that have one scale; None: as many as the shapes say.
    """

    bits: int = 8
    block: Block | None = None


@dataclass(frozen=True)
class _Matrix:
    """A packed matrix: its shape when it is dense, and what makes that of its parts."""

    shape: Shape
    decode: Callable[[ByPart], mx.array]


class ScaledScheme(Scheme):
    """Small numbers beside scales; a path is the dense matrix's full name.

    Args:
        name: what a user calls it.
        dtype: the number type that the matrices had before they were quantized.
        find_settings: what the config says of the matrix of a name; more than one if it leaves
            open which of them is meant.
    """

    parts = PARTS
    ignored = (
        "activation_scale", "input_scale", ".output_scale", ".k_scale", ".v_scale", ".q_scale",
        ".kv_scale", "input_global_scale", "input_zero_point", "output_zero_point",
    )  # fmt: skip

    def __init__(self, name: str, dtype: mx.Dtype, find_settings: Callable[[str], list[Settings]]):
        self.name, self._dtype, self._find_settings = name, dtype, find_settings
        self._matrices: dict[str, _Matrix] = {}

    def find_paths(self, shapes: Shapes, types: Kinds) -> set[str]:
        """Find the names of all packed matrices, also of those that lack a part."""

        def is_number(name: str) -> bool:
            return name in types and types[name] not in FLOATS.values()

        found = set()
        for name, shape in shapes.items():
            for suffix in (*SCALE, PACKED):
                path = name.removesuffix(suffix)
                if path == name or name.endswith(self.ignored):
                    continue
                lone = path.endswith("weight") and path not in shapes
                if is_number(path) or f"{path}{PACKED}" in shapes or lone:
                    found.add(path)
            if name.endswith("weight") and len(shape) > 1 and is_number(name):
                found.add(name)
        return found

    def name_dense(self, path: str) -> str:
        """Return the path, which is the name."""
        return path

    def find_shape(self, path: str, shapes: Shapes, types: Kinds) -> Shape:
        """The shape of the dense matrix of a name: (out, in), or (experts, out, in).

        Raises:
            UserError: if a part is missing, does not fit the others or has another number type.
        """
        own = {part: shapes[path + part] for part in PARTS if path + part in shapes}
        kinds = {part: types[path + part] for part in own}
        try:
            matrix = _read_matrix(own, kinds, self._find_settings(path))
        except KeyError as missing:
            raise UserError(
                f"{path} is no complete {self.name} matrix, it lacks {path}{missing.args[0]}: "
                f"{AGAIN}"
            ) from missing
        except ValueError as error:
            raise UserError(f"{path}{error}: {AGAIN}") from error
        self._matrices[path] = matrix
        return matrix.shape

    def find_dtype(self, path: str, types: Kinds) -> mx.Dtype:
        """The number type that the matrices had before they were quantized."""
        return self._dtype

    def unpack(self, path: str, arrays: Arrays) -> mx.array:
        """Compute the dense matrix of a name, (out, in), float32.

        Raises:
            UserError: if its parts contradict each other.
        """
        own = {part: arrays[path + part] for part in PARTS if path + part in arrays}
        try:
            return self._matrices[path].decode(own)
        except ValueError as error:
            raise UserError(f"{path}{error}: {AGAIN}") from error


def _read_matrix(
    shapes: Mapping[str, Shape], kinds: Mapping[str, Kind], settings: list[Settings]
) -> _Matrix:
    """Tell how a matrix is packed, by its parts' names, shapes and number types.

    Raises:
        KeyError: with the name of a part that is missing.
        ValueError: if the parts do not fit each other, or have other number types.
    """
    weight = PACKED if PACKED in shapes else WEIGHT
    kind = kinds[weight]
    shape, scale = shapes[weight], next((p for p in SCALE if p in shapes), None)
    if len(shape) < 2 or 0 in shape:
        raise ValueError(f"{weight} has shape {shape}, which no packed matrix has")
    if scale is None:
        raise KeyError(SCALE[1])
    if kind in WORDS and weight == PACKED:
        return _read_words(shapes, kinds, settings)
    if kind == mx.uint8:
        return _read_nibbles(weight, scale, shapes, kinds)
    if kind in (E4M3, mx.int8) and weight == WEIGHT:
        return _read_bytes(scale, shapes, kinds, settings)
    raise ValueError(f"{weight} has the number type {_describe(kind)}, which cannot be read here")


def _read_bytes(
    scale: str, shapes: Mapping[str, Shape], kinds: Mapping[str, Kind], settings: list[Settings]
) -> _Matrix:
    """Read of a matrix of 8-bit floats or whole numbers what its parts' names and shapes say."""
    shape = shapes[WEIGHT]
    _check_kind(scale, kinds, (*FLOATS.values(), *POWERS))
    block = _find_block(scale, shapes, shape, [s.block for s in settings])
    if ZERO in shapes:
        _check_kind(ZERO, kinds, (mx.int8, mx.uint8, E4M3))
        _check_shape(ZERO, shapes, shapes[scale])

    def decode(parts: ByPart) -> mx.array:
        zero = _to_float(parts[ZERO], kinds[ZERO]) if ZERO in parts else None
        values = _to_float(parts[WEIGHT], kinds[WEIGHT])
        return _scale_blocks(values, block, _to_scale(parts[scale], kinds[scale]), zero)

    return _Matrix(shape, decode)


def _read_words(
    shapes: Mapping[str, Shape], kinds: Mapping[str, Kind], settings: list[Settings]
) -> _Matrix:
    """Read the same of whole numbers of few bits, low bits first, in words along the inputs."""
    (scale,) = (part for part in SCALE if part in shapes)
    *out, words = shapes[PACKED]
    fits: dict[int, Block] = {}
    for one in settings:
        if one.bits in BITS:
            block = _fit_block(shapes[scale], (*out, words * 32 // one.bits), [one.block])
            if block and (one.block is None or one.block == block):
                fits.setdefault(one.bits, block)
    if len(fits) != 1:
        several = "two formats" if fits else "no format"
        raise ValueError(f"{scale} has shape {shapes[scale]}, which fits {several} of config.json")
    ((bits, block),) = fits.items()
    shape = (*out, words * 32 // bits)
    _check_kind(scale, kinds, FLOATS.values())
    if SHAPE not in shapes:
        raise KeyError(SHAPE)
    _check_kind(SHAPE, kinds, (mx.int32, mx.int64))
    if ZERO in shapes:
        _check_kind(ZERO, kinds, (*WORDS, mx.int8))
        *lead, rows = out
        in_words = (*lead, -(-rows * bits // 32), *shapes[scale][len(out) :])
        _check_shape(ZERO, shapes, in_words if kinds[ZERO] in WORDS else shapes[scale])
    if GROUP in shapes:
        _check_kind(GROUP, kinds, (mx.int32, mx.int64))
        _check_shape(GROUP, shapes, shape[-1:])

    def decode(parts: ByPart) -> mx.array:
        if tuple(parts[SHAPE].tolist()) != shape:  # type: ignore[arg-type]
            raise ValueError(f"{SHAPE} is {parts[SHAPE].tolist()}, and its numbers make {shape}")
        middle = 1 << (bits - 1)
        values = _split_words(parts[PACKED], bits) - middle
        scales = parts[scale].astype(mx.float32)
        zero = parts.get(ZERO)
        if zero is not None and kinds[ZERO] in WORDS:
            split = _split_words(zero.swapaxes(-1, -2), bits).swapaxes(-1, -2)
            zero = split[..., : out[-1], :] - middle
        if GROUP in parts and not mx.any(parts[GROUP] < 0).item():
            group = _check_groups(parts[GROUP], scales.shape[-1])
            values = values if zero is None else values - zero[..., group]
            return values * scales[..., group]
        return _scale_blocks(values, block, scales, zero)

    return _Matrix(shape, decode)


def _read_nibbles(
    weight: str, scale: str, shapes: Mapping[str, Shape], kinds: Mapping[str, Kind]
) -> _Matrix:
    """Read the same of floats of four bits, two to a byte, with one scale for each 16 or 32."""
    *out, half = shapes[weight]
    _check_kind(scale, kinds, (E4M3, *POWERS))
    mode, group_size = ("nvfp4", 16) if kinds[scale] == E4M3 else ("mxfp4", 32)
    if 2 * half % group_size:
        raise ValueError(
            f"{weight} has shape {shapes[weight]}, which no groups of {group_size} fit"
        )
    _check_shape(scale, shapes, (*out, 2 * half // group_size))
    common = next((part for part in (DIVISOR, FACTOR) if part in shapes), None)
    if common is not None:
        _check_kind(common, kinds, FLOATS.values())
        lead, count = out[:-1], math.prod(shapes[common])
        if count not in (1, math.prod(lead)):
            raise ValueError(f"{common} has shape {shapes[common]}, and one number is meant")

    def decode(parts: ByPart) -> mx.array:
        words = mx.contiguous(parts[weight]).view(mx.uint32)
        dense = mx.dequantize(words, parts[scale], None, group_size, 4, mode, dtype=mx.float32)
        if common is None:
            return dense
        one = parts[common].astype(mx.float32)
        one = one.reshape(()) if one.size == 1 else one.reshape(*out[:-1], 1, 1)
        return dense / one if common == DIVISOR else dense * one

    return _Matrix((*out, 2 * half), decode)


def _find_block(
    part: str, shapes: Mapping[str, Shape], shape: Shape, blocks: list[Block | None]
) -> Block:
    """Find the rows and columns of a matrix that have one scale of ``part``."""
    block = _fit_block(shapes[part], shape, blocks)
    if block is None:
        raise ValueError(f"{part} has shape {shapes[part]}, which fits no blocks of {shape}")
    return block


def _fit_block(scales: Shape, shape: Shape, blocks: list[Block | None]) -> Block | None:
    """The rows and columns of a matrix that have one of its scales; None if these do not fit.

    Args:
        scales: the scales' shape.
        shape: the matrix's.
        blocks: those that the config names. If None is among them, whatever divides the matrix.
    """
    *lead, rows, columns = shape
    if len(scales) == len(shape) + 2 and scales[-3::2] == (1, 1):  # as ModelOpt may write them
        scales = (*scales[:-4], *scales[-4::2])
    if math.prod(scales) == 1 or (lead and scales in ((*lead,), (*lead, 1), (*lead, 1, 1))):
        return rows, columns
    if scales == (*lead, rows):
        return 1, columns
    if len(scales) != len(shape) or scales[:-2] != (*lead,) or 0 in scales:
        return None
    for block in blocks:
        if block and scales[-2:] == (-(-rows // block[0]), -(-columns // block[1])):
            return min(block[0], rows), min(block[1], columns)
    high, wide = scales[-2:]
    divide = None in blocks and not (rows % high or columns % wide)
    return (rows // high, columns // wide) if divide else None


def _scale_blocks(
    values: mx.array, block: Block, scale: mx.array, zero: mx.array | None
) -> mx.array:
    """Return (values - zero) * scale, (..., out, in); both have a number for each block."""
    *lead, rows, columns = values.shape
    high, wide = block
    below, right = -rows % high, -columns % wide
    if below or right:
        values = mx.pad(values, [(0, 0)] * len(lead) + [(0, below), (0, right)])
    down, across = (rows + below) // high, (columns + right) // wide
    blocks = values.reshape(*lead, down, high, across, wide)

    def spread(numbers: mx.array) -> mx.array:
        if numbers.size == 1:
            return numbers.reshape(())
        return numbers.reshape(*lead, down, 1, across, 1)

    if zero is not None:
        blocks = blocks - spread(zero)
    blocks = blocks * spread(scale)
    return blocks.reshape(*lead, rows + below, columns + right)[..., :rows, :columns]


def _split_words(words: mx.array, bits: int) -> mx.array:
    """Split words (..., n) into whole numbers (..., n * 32 / bits), low bits first, as float32."""
    shifts = mx.arange(0, 32, bits, dtype=mx.uint32)
    values = (mx.contiguous(words).view(mx.uint32)[..., None] >> shifts) & ((1 << bits) - 1)
    return values.reshape(*words.shape[:-1], -1).astype(mx.float32)


def _to_float(array: mx.array, kind: Kind) -> mx.array:
    """Return the numbers of 8-bit floats or of whole numbers, in float32."""
    return mx.from_fp8(array, dtype=mx.float32) if kind == E4M3 else array.astype(mx.float32)


def _to_scale(array: mx.array, kind: Kind) -> mx.array:
    """Return scales in float32, also of those that are stored as exponents."""
    if kind not in POWERS:
        return array.astype(mx.float32)
    # The exponent's place in a float32; 0 stands for 2^-127, which has no exponent there, 255 is
    # no number.
    bits = mx.where(array == 0, 1 << 22, array.astype(mx.uint32) << 23)
    return mx.where(array == 255, mx.nan, bits.astype(mx.uint32).view(mx.float32))


def _check_groups(group: mx.array, count: int) -> mx.array:
    if mx.any(group >= count).item():
        raise ValueError(" has inputs in groups that do not exist")
    return group


def _check_shape(part: str, shapes: Mapping[str, Shape], expected: Shape) -> None:
    if shapes[part] != expected:
        raise ValueError(f"{part} has shape {shapes[part]}, the other parts ask for {expected}")


def _check_kind(part: str, kinds: Mapping[str, Kind], expected: object) -> None:
    if kinds[part] not in expected:  # type: ignore[operator]
        raise ValueError(
            f"{part} has the number type {_describe(kinds[part])}, which cannot be read here"
        )


def _describe(kind: Kind) -> str:
    return dtype_name(kind) if isinstance(kind, mx.Dtype) else str(kind)
