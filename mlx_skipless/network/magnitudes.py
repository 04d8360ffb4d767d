"""How large numbers become on their way through a network, and where the first is none.

A stream without norms grows or shrinks as its layers please, and a number type ends somewhere:
float16 at 65,504. So the check at the end of a conversion looks at what enters and leaves every
module, a layer at a time.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from .parts import dtype_name


@dataclass(frozen=True)
class Magnitude:
    """A largest absolute value.

    Attributes:
        where: a module and its side, "model.layers.3.mlp.down_proj's input".
        value: NaN or infinite if a number there is.
        dtype: that holds it.
        share: of the largest number that the type holds.
    """

    where: str
    value: float
    dtype: str
    share: float


class NotFinite(Exception):
    """NaN or infinity on the way through a network.

    Attributes:
        first: where it came up first.
    """

    def __init__(self, first: Magnitude):
        super().__init__(first.where)
        self.first = first


class Watch:
    """Runs layers and keeps the largest number that each of them meets, in ``layers``."""

    def __init__(self) -> None:
        self.layers: list[Magnitude] = []

    def run(self, name: str, layer: nn.Module, *inputs: Any) -> mx.array:
        """What a layer of that name gives, evaluated.

        Raises:
            NotFinite: if a number on the way is none.
        """
        seen: list[tuple[str, mx.array]] = []
        with _probed(layer, seen):
            out = layer(*inputs)
        seen.append(("", out))
        largest = [mx.abs(array).max().astype(mx.float32) for _, array in seen]
        mx.eval(out, largest)
        found = [
            _magnitude(f"{name}.{where}" if where else f"{name}'s output", array.dtype, most.item())
            for (where, array), most in zip(seen, largest, strict=True)
        ]
        for one in found:
            if not math.isfinite(one.value):
                raise NotFinite(one)
        self.layers.append(max(found, key=lambda one: one.share))
        return out


def _magnitude(where: str, dtype: mx.Dtype, value: Any) -> Magnitude:
    return Magnitude(where, value, dtype_name(dtype), value / float(mx.finfo(dtype).max))


class _Probe(nn.Module):
    """A module that tells what enters and leaves it."""

    def __init__(self, inner: nn.Module, name: str, seen: list[tuple[str, mx.array]]):
        super().__init__()
        self.inner, self._name, self._seen = inner, name, seen

    def __call__(self, x: Any, *others: Any, **options: Any) -> Any:
        arrays = [x] if isinstance(x, mx.array) else x  # an attention reads several of a table
        self._seen += [(f"{self._name}'s input", array) for array in arrays]
        out = self.inner(x, *others, **options)
        self._seen.append((f"{self._name}'s output", out))
        return out


@contextmanager
def _probed(layer: nn.Module, seen: list[tuple[str, mx.array]]) -> Iterator[None]:
    """Within, every module of a layer that has no others in it appends to ``seen``."""
    leaves: Any = tree_flatten(layer.leaf_modules(), is_leaf=nn.Module.is_module)
    owners = []
    for path, module in leaves:
        *parents, last = path.split(".")
        owner: Any = layer
        for parent in parents:
            owner = owner[parent]
        owners.append((owner, last, module))
        owner[last] = _Probe(module, path, seen)
    try:
        yield
    finally:
        for owner, last, module in owners:
            owner[last] = module
