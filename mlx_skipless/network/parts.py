"""A network's tensors, a part at a time: what gives them, and how modules take them."""

import copy
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

Arrays = Mapping[str, mx.array]


def dtype_name(dtype: mx.Dtype) -> str:
    """Return MLX's name of a number type, for instance "bfloat16" for ``mx.bfloat16``."""
    return str(dtype).removeprefix("mlx.core.")


def tensors_of(module: nn.Module) -> dict[str, mx.array]:
    """Return a module's parameters by name."""
    return dict(tree_flatten(module.parameters()))  # type: ignore[arg-type]


def replace_at(root: Any, path: str, value: Any) -> Any:
    """Return a copy of a module with another tensor or module at one path.

    Everything beside that path is shared with the original, which does not change.

    Args:
        root: a module, or a list or dict in one.
        path: in dots, as ``named_modules`` and ``parameters`` give it: "self_attn.q_proj.weight".
        value: what the copy holds there; None for a sub-module that is gone.
    """
    if not path:
        return value
    name, _, rest = path.partition(".")
    other = copy.copy(root)
    if isinstance(root, nn.Module):
        setattr(other, name, replace_at(getattr(root, name), rest, value))
    else:
        key: Any = int(name) if isinstance(root, list) else name
        other[key] = replace_at(root[key], rest, value)
    return other


def unpack(
    weight: mx.array,
    scales: mx.array,
    biases: mx.array | None,
    group_size: int,
    bits: int,
    mode: str,
) -> mx.array:
    """Return what a matrix that MLX packed stands for, (..., out, in), in float32.

    Float32 holds every product of a packed value and its scale exactly.
    """
    if biases is not None:  # affine: scales and biases may be of 16 bits
        scales, biases = scales.astype(mx.float32), biases.astype(mx.float32)
    return mx.dequantize(weight, scales, biases, group_size, bits, mode, dtype=mx.float32)


class Parts(Protocol):
    """A network's tensors, a part at a time, by their canonical names."""

    def embedding(self) -> Arrays: ...
    def layer(self, layer: int) -> Arrays: ...
    def head(self) -> Arrays: ...


class ChangedParts:
    """A network's tensors, changed as they are read.

    Args:
        parts: the tensors.
        change: makes the tensors of one part of those that it is given.
    """

    def __init__(self, parts: Parts, change: Callable[[Arrays], Arrays]):
        self._parts, self._change = parts, change

    def embedding(self) -> Arrays:
        """Return the embedding, changed."""
        return self._change(self._parts.embedding())

    def layer(self, layer: int) -> Arrays:
        """Return the tensors of a layer, changed."""
        return self._change(self._parts.layer(layer))

    def head(self) -> Arrays:
        """Return the final norm and the head, changed."""
        return self._change(self._parts.head())


class Merged(Parts, Protocol):
    """A result's dense tensors; ``Merger.rewrite`` explains ``rewrite``."""

    def rewrite(self, where: str, outputs: mx.array) -> mx.array: ...
