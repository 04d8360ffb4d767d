"""How checkpoints pack their matrices: what all ways have in common, and MLX's own."""

from collections import Counter
from collections.abc import Mapping
from typing import Any

import mlx.core as mx

from ..constants import MODES
from ..errors import UserError
from ..network.parts import Arrays, unpack
from .safetensors import FLOATS, Shape, is_float

Shapes = Mapping[str, Shape]
Kind = mx.Dtype | str | None  # safetensors' name of a number type that MLX has not
Kinds = Mapping[str, Kind]
WORDS = (mx.int32, mx.uint32)
SCALES = tuple(FLOATS.values())
AGAIN = "correct the quantization in config.json or download the checkpoint again"


class Scheme:
    """How a checkpoint packs its matrices.

    A packed matrix has a path, with which the names of all its tensors begin.

    Attributes:
        name: what a user calls it, e.g. "GPTQ 4-bit".
        marker: the suffix of a tensor that only packed matrices have.
        parts: the suffixes of all tensors that can belong to a packed matrix.
        ignored: the suffixes of tensors that say nothing about weights.
        pads_biases: whether a bias of zeros stands beside matrices that have none.
    """

    name: str
    marker: str
    parts: tuple[str, ...]
    ignored: tuple[str, ...] = ()
    pads_biases = False

    def find_paths(self, shapes: Shapes, types: Kinds) -> set[str]:
        """Find the paths of all packed matrices."""
        return {name.removesuffix(self.marker) for name in shapes if name.endswith(self.marker)}

    def name_dense(self, path: str) -> str:
        """Return what the dense matrix at ``path`` is called."""
        return f"{path}.weight"

    def find_shape(self, path: str, shapes: Shapes, types: Kinds) -> Shape:
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

    def find_dtype(self, path: str, types: Kinds) -> mx.Dtype:
        """The number type of the dense matrix at ``path``: its scales', or else most tensors'."""
        scales = types[f"{path}.scales"]
        if isinstance(scales, mx.Dtype) and is_float(scales):
            return scales
        floats = Counter(x for x in types.values() if isinstance(x, mx.Dtype) and is_float(x))
        return floats.most_common(1)[0][0] if floats else mx.bfloat16

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
