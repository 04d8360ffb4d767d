"""GGUF's simple quantized types in MLX's packed form, without a new rounding.

A block of Q4_0 is 32 codes q and one float16 d, and means d (q - 8). MLX's affine form of groups
of 32 means scale q + bias, so d and -8 d say the same: a product with a power of two is exact.
Q5_0 and Q8_0 are alike, Q4_1 and Q5_1 have a bias of their own, and MXFP4 is the same in both.
Types whose scales have a scale (Q4_K, Q6_K, ...) have no such form and are read dense.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Protocol

import mlx.core as mx
import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from ..errors import UserError
from ..memory import format_bytes
from .safetensors import Shape

Type = GGMLQuantizationType
GROUP = 32  # numbers in a block of each of these types
# Bits, MLX's mode, and for types without a bias of their own the code that means zero.
FORMS: dict[Type, tuple[int, str, int | None]] = {
    Type.Q4_0: (4, "affine", 8),
    Type.Q4_1: (4, "affine", None),
    Type.Q5_0: (5, "affine", 16),
    Type.Q5_1: (5, "affine", None),
    Type.Q8_0: (8, "affine", 128),
    Type.MXFP4: (4, "mxfp4", None),
}


def repack(blocks: np.ndarray, kind: Type) -> dict[str, np.ndarray]:
    """Return the parts of a matrix in MLX's packed form.

    Args:
        blocks: (..., bytes of a row), as a file has them.
        kind: one of ``FORMS``.

    Raises:
        ArithmeticError: if a bias is beyond float16, or a scale is no number.
    """
    bits, mode, zero = FORMS[kind]
    blocks = blocks.reshape(*blocks.shape[:-1], -1, GGML_QUANT_SIZES[kind][1])  # a row of blocks
    if mode == "mxfp4":
        words = _pack(_split_nibbles(blocks[..., 1:]), bits)
        return {"weight": words, "scales": np.ascontiguousarray(blocks[..., 0])}
    scales = _read_halves(blocks[..., :2])
    rest = blocks[..., 2:]
    if zero is None:
        biases, rest = _read_halves(rest[..., :2]), rest[..., 2:]
    else:
        with np.errstate(over="ignore", invalid="ignore"):
            biases = (scales.astype(np.float32) * -zero).astype(np.float16)
    if not (np.isfinite(scales).all() and np.isfinite(biases).all()):
        raise ArithmeticError("its scales are beyond float16")
    return {"weight": _pack(_read_codes(rest, bits), bits), "scales": scales, "biases": biases}


def _read_halves(pairs: np.ndarray) -> np.ndarray:
    """The float16 that pairs of bytes (..., 2) are."""
    return np.ascontiguousarray(pairs).view(np.float16)[..., 0]


def _read_codes(rest: np.ndarray, bits: int) -> np.ndarray:
    """The codes (..., 32) of blocks without their scales and biases."""
    if bits == 8:
        return rest ^ np.uint8(128)  # signed bytes, here from 0 on
    if bits == 4:
        return _split_nibbles(rest)
    fifth = np.unpackbits(np.ascontiguousarray(rest[..., :4]), axis=-1, bitorder="little")
    return _split_nibbles(rest[..., 4:]) | fifth << np.uint8(4)


def _split_nibbles(pairs: np.ndarray) -> np.ndarray:
    """The lower halves of bytes (..., 16), and behind them the upper ones."""
    return np.concatenate([pairs & np.uint8(15), pairs >> np.uint8(4)], axis=-1)


def _pack(codes: np.ndarray, bits: int) -> np.ndarray:
    """Pack codes (..., groups, 32) into words, one behind the other from the lowest bit on."""
    if bits == 4:
        packed = codes[..., ::2] | codes[..., 1::2] << np.uint8(4)
    elif bits == 8:
        packed = np.ascontiguousarray(codes)
    else:
        stream = np.unpackbits(codes[..., None], axis=-1, count=bits, bitorder="little")
        packed = np.packbits(stream.reshape(*codes.shape[:-1], -1), axis=-1, bitorder="little")
    return packed.reshape(*codes.shape[:-2], -1).view(np.uint32)


class Blocks(Protocol):
    """A GGUF file's tensors, by Hugging Face's names."""

    @property
    def packing(self) -> str | None: ...
    @property
    def shapes(self) -> Mapping[str, Shape]: ...
    @property
    def kinds(self) -> Mapping[str, Type]: ...
    def decode(self, name: str, dtype: mx.Dtype) -> mx.array: ...
    def read_blocks(self, name: str) -> Iterator[np.ndarray]: ...
    def arrange(self, name: str, rows: Any) -> Any: ...
    def read_ahead(self, names: Iterable[str]) -> None: ...
    def check_unchanged(self) -> None: ...


class RepackedStore:
    """A GGUF file's tensors, those packed that can be; the others are dense, of one type.

    Attributes:
        packing: how they are quantized in the file.
        shapes: of the tensors.
        dtypes: their number types.
        entry: what config.json says of them as ``quantization``.
    """

    def __init__(self, source: Blocks, dtype: mx.Dtype):
        self.packing = source.packing
        self._source, self._dtype = source, dtype
        matrices = [n for n, s in source.shapes.items() if len(s) > 1 and n.endswith(".weight")]
        self._forms = {
            name.removesuffix(".weight"): FORMS[kind]
            for name in matrices
            if (kind := source.kinds[name]) in FORMS and _holds(dtype, FORMS[kind])
        }
        self._matrices = {name.removesuffix(".weight") for name in matrices}
        self.entry = make_entry(self._forms, self._matrices)
        self.shapes: dict[str, Shape] = {}
        self.dtypes: dict[str, mx.Dtype | None] = {}
        for name, shape in source.shapes.items():
            path = name.removesuffix(".weight")
            form = self._forms.get(path) if name.endswith(".weight") else None
            if form is None:
                self.shapes[name], self.dtypes[name] = shape, dtype
                continue
            bits, mode, _ = form
            self.shapes[name], self.dtypes[name] = (*shape[:-1], shape[-1] * bits // 32), mx.uint32
            for part in ("scales", "biases") if mode == "affine" else ("scales",):
                self.shapes[f"{path}.{part}"] = (*shape[:-1], shape[-1] // GROUP)
                self.dtypes[f"{path}.{part}"] = dtype if mode == "affine" else mx.uint8

    def read(self, names: Iterable[str]) -> dict[str, mx.array]:
        """Read the tensors of these names, packed or dense as ``dtypes`` says.

        Raises:
            UserError: if one cannot be read.
        """
        wanted = [*names]
        found: dict[str, mx.array] = {}
        for path in dict.fromkeys(name.rpartition(".")[0] for name in wanted):
            if path in self._forms:
                found |= self._read_packed(path)
        dense = {n: self._source.decode(n, self._dtype) for n in wanted if n not in found}
        return {name: found[name] if name in found else dense[name] for name in wanted}

    def _read_packed(self, path: str) -> dict[str, mx.array]:
        name = f"{path}.weight"
        pieces: dict[str, list[mx.array]] = {}
        try:
            for blocks in self._source.read_blocks(name):
                for part, rows in repack(blocks, self._source.kinds[name]).items():
                    pieces.setdefault(f"{path}.{part}", []).append(mx.array(rows))
        except ArithmeticError as error:
            raise UserError(f"{name} cannot be repacked, {error}: give --dtype float32") from error
        whole = {part: mx.concatenate(rows) for part, rows in pieces.items()}
        return {
            part: self._source.arrange(
                name, rows.reshape(self.shapes[part]).astype(self.dtypes[part] or rows.dtype)
            )
            for part, rows in whole.items()
        }

    def read_ahead(self, names: Iterable[str]) -> None:
        """Have the system fetch what these tensors are made of in the background."""
        paths = dict.fromkeys(name.rpartition(".")[0] for name in names)
        wanted = (f"{path}.weight" for path in paths)
        self._source.read_ahead(name for name in wanted if name in self._source.shapes)

    def check_unchanged(self) -> None:
        """Check that the file has not changed since it was opened.

        Raises:
            UserError: if it has.
        """
        self._source.check_unchanged()

    def describe(self) -> str:
        """Say how many matrices keep their values, in a sentence."""
        dense = self._matrices - self._forms.keys()
        size = sum(map(self._count_bytes, self._forms))
        said = (
            f"repacked without a new rounding: {len(self._forms)} of {len(self._matrices)} "
            f"matrices, {format_bytes(size)}"
        )
        if not dense:
            return said
        kinds = Counter(self._source.kinds[f"{path}.weight"].name for path in dense)
        size = sum(map(self._count_bytes, dense))
        listed = ", ".join(f"{count} of {kind}" for kind, count in kinds.most_common())
        return f"{said}; dense: {listed}, {format_bytes(size)}"

    def _count_bytes(self, path: str) -> int:
        names = [f"{path}.{part}" for part in ("weight", "scales", "biases")]
        return sum(
            int(np.prod(self.shapes[name])) * (self.dtypes[name] or mx.uint8).size
            for name in names
            if name in self.shapes
        )


def _holds(dtype: mx.Dtype, form: tuple[int, str, int | None]) -> bool:
    """Whether a network of this number type has exactly these scales: bfloat16 rounds float16."""
    return form[1] != "affine" or dtype in (mx.float16, mx.float32)


def make_entry(
    forms: Mapping[str, tuple[int, str, int | None]], matrices: Iterable[str]
) -> dict[str, Any]:
    """Make a config's ``quantization``: the commonest form, and every matrix that has another."""
    if not forms:
        return {}

    def describe(form: tuple[int, str, int | None]) -> dict[str, Any]:
        return {"group_size": GROUP, "bits": form[0], "mode": form[1]}

    settings = {path: describe(form) for path, form in forms.items()}
    counts = Counter(tuple(one.items()) for one in settings.values())
    usual = dict(counts.most_common(1)[0][0])
    own: dict[str, Any] = {p: one for p, one in settings.items() if one != usual}
    return usual | own | {path: False for path in sorted(matrices) if path not in forms}
