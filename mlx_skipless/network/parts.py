"""A network's tensors, a part at a time: what gives them, and what they are called and made of."""

from collections.abc import Mapping
from typing import Protocol

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

Arrays = Mapping[str, mx.array]


def dtype_name(dtype: mx.Dtype) -> str:
    """ "bfloat16" for ``mx.bfloat16``."""
    return str(dtype).removeprefix("mlx.core.")


def tensors_of(module: nn.Module) -> dict[str, mx.array]:
    """A module's parameters by name."""
    return dict(tree_flatten(module.parameters()))  # type: ignore[arg-type]


class Parts(Protocol):
    """A network's tensors, a part at a time, by their canonical names."""

    def embedding(self) -> Arrays: ...
    def layer(self, layer: int) -> Arrays: ...
    def head(self) -> Arrays: ...


class Merged(Parts, Protocol):
    """A result's dense tensors; ``rewritten`` as in ``Merger``."""

    def rewrite(self, where: str, outputs: mx.array) -> mx.array: ...
