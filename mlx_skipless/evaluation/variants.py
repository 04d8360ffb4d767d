"""A shape's network and what this package makes of it, with weights that only have the right sizes.

Speed does not depend on what weights say. So networks that are measured in turn share them, and all
of them need little more memory than one.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten

from ..network.parts import tensors_of
from ..network.reduced import drop
from ..quantization.layout import quantize_nearest
from ..quantization.settings import Quantization
from ..removal.plan import make_plan
from .synthetic import (
    Shape,
    make_skipless_model,
    make_skipless_plan,
    make_stock_model,
    repeat_weights,
)

DROPPED_SHARE = 1 / 4  # of the attentions: 8 of 32
PLAIN = "plain mlx-lm"


def count_dropped(layers: int) -> int:
    """Count the attentions that go from a network of so many layers."""
    return max(1, round(DROPPED_SHARE * layers))


def make_plain(
    shape: Shape, dtype: mx.Dtype, quantization: Quantization | None = None
) -> nn.Module:
    """Make mlx-lm's own network of a shape, with lazy weights."""
    return make_stock_model(shape.stock, dtype, quantization, repeat_weights)


def make_variants(
    shape: Shape, dtype: mx.Dtype, quantization: Quantization | None = None
) -> dict[str, nn.Module]:
    """Make networks of a shape by their labels, the plain one first; no weight is evaluated.

    Args:
        shape: one with skips, norms on the stream and an untied head, which mlx-lm knows.
        dtype: the number type of weights that are not quantized.
        quantization: how to quantize the matrices; None: not at all.
    """
    made = {PLAIN: make_plain(shape, dtype, quantization)}
    removed = make_skipless_plan(shape.args, "qp", dtype, quantization is not None).after
    skips = replace(removed, norms=["q", "kv", "heads"], query_skip=True, head_skip=True)
    table = make_plan(shape.args, remove="none", dtype=dtype, precompute=True).after
    for label, args in (
        ("skipless, without Q and P", removed),
        ("the same with skips that merge", skips),
        ("first layer a table", table),
    ):
        made[label] = make_skipless_model(args, dtype, quantization, repeat_weights)
    layers = shape.args.num_hidden_layers
    count = count_dropped(layers)
    gone = [i * (layers // count) for i in range(count)]  # a prompt skips a last layer without one
    many = f"{len(gone)} attention{'s' if len(gone) > 1 else ''}"
    for label, width in (
        (f"{many} dropped", None),
        (f"{many} replaced by matrices", shape.args.hidden_size),
    ):
        made[label] = _drop_attentions(shape, dtype, quantization, gone, width)
    return made


def _drop_attentions(
    shape: Shape,
    dtype: mx.Dtype,
    quantization: Quantization | None,
    gone: Sequence[int],
    width: int | None,
) -> nn.Module:
    model = make_plain(shape, dtype)
    drop(model, {"self_attn": [*gone]}, {}, width)
    model.set_dtype(dtype)
    return model if quantization is None else quantize_nearest(model, quantization)[0]


class SharedWeights:
    """Arrays that networks share: each network's first one of a kind is the same, and so on."""

    def __init__(self) -> None:
        self._arrays: dict[tuple[str, tuple[int, ...], mx.Dtype, int], mx.array] = {}

    def share(self, model: nn.Module) -> None:
        """Put shared arrays in the place of a network's own, which are lazy."""
        seen: Counter[tuple[str, tuple[int, ...], mx.Dtype]] = Counter()
        found = []
        for name, array in tensors_of(model).items():
            kind = (name.rpartition(".")[2], array.shape, array.dtype)
            found.append((name, self._arrays.setdefault((*kind, seen[kind]), array)))
            seen[kind] += 1
        model.update(tree_unflatten(found))

    @property
    def nbytes(self) -> int:
        """The bytes of all arrays."""
        return sum(array.nbytes for array in self._arrays.values())

    def values(self) -> list[mx.array]:
        """Return all arrays."""
        return [*self._arrays.values()]
