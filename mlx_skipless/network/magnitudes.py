"""Finds how large numbers become on their way through a network, and the first that is none.

A stream without norms grows or shrinks as its layers please, and a number type ends somewhere:
float16 at 65,504. So the check at the end of a conversion looks at what enters and leaves every
module, a layer at a time.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from .parts import dtype_name, replace_at


@dataclass(frozen=True)
class Magnitude:
    """The largest absolute value that was seen.

    Attributes:
        where: a module and its side, "model.layers.3.mlp.down_proj's input".
        value: the number; NaN or infinite if one of those was seen.
        dtype: the type that holds it.
        share: the number as a share of the largest that the type holds.
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
    """Runs layers and keeps the largest number that each of them meets, in ``layers``.

    Args:
        tell: called with the number of layers done.
    """

    def __init__(self, tell: Callable[[int], None] = lambda done: None):
        self.layers: list[Magnitude] = []
        self._tell = tell

    def run(self, name: str, layer: nn.Module, *inputs: Any, **options: Any) -> Any:
        """Run a layer of that name, and evaluate what it gives.

        Raises:
            NotFinite: for NaN or infinity in what enters or leaves one of its modules.
        """
        seen: list[tuple[str, mx.array]] = []
        out = _add_probes(layer, seen)(*inputs, **options)
        seen += [("", array) for array in _list_floats(out)]
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
        self._tell(len(self.layers))
        return out


def _magnitude(where: str, dtype: mx.Dtype, value: Any) -> Magnitude:
    return Magnitude(where, value, dtype_name(dtype), value / float(mx.finfo(dtype).max))


class _Probe(nn.Module):
    """Stands in a module's place and appends what enters and leaves it to ``seen``."""

    def __init__(self, inner: nn.Module, name: str, seen: list[tuple[str, mx.array]]):
        super().__init__()
        self.inner, self._name = inner, name
        self.__dict__["_seen"] = seen  # beside the module's items, which are tensors

    def __call__(self, *args: Any, **options: Any) -> Any:
        # An attention may give two arrays.
        self._tell("input", next(iter((*args, *options.values()))))
        out = self.inner(*args, **options)
        self._tell("output", out)
        return out

    def __getattr__(self, name: str) -> Any:
        if name in self or "inner" not in self:
            return super().__getattr__(name)
        return getattr(self.inner, name)  # what a layer asks of the module inside it

    def _tell(self, side: str, arrays: Any) -> None:
        self._seen.extend((f"{self._name}'s {side}", array) for array in _list_floats(arrays))


def _list_floats(tree: Any) -> list[mx.array]:
    leaves: Any = tree_flatten([tree])
    arrays = (leaf for _, leaf in leaves if isinstance(leaf, mx.array))
    return [array for array in arrays if mx.issubdtype(array.dtype, mx.floating)]


def _add_probes(layer: nn.Module, seen: list[tuple[str, mx.array]]) -> nn.Module:
    """Return a copy of a layer whose modules, those without others in them, tell ``seen``."""
    leaves: Any = tree_flatten(layer.leaf_modules(), is_leaf=nn.Module.is_module)
    for path, module in leaves:
        layer = replace_at(layer, path, _Probe(module, path, seen))
    return layer
