"""A network of mlx-lm's own without some of its sub-layers; needs mlx and mlx-lm alone.

A result of a drop carries this file as its model.py. Its config.json is that of the whole network
and says what is gone, by the names that mlx-lm's blocks have for their parts:
``"dropped_sublayers": {"self_attn": [3, 5], "mlp": [2]}``. Parts of parts are named by their path:
``"attn.attention"``. A part that returns more than its output hands on what it is given instead,
by position or name: ``"dropped_outputs": {"self_attn": ["shared_kv", null]}``.

``"replaced_sublayers"`` has the same form. There a matrix as wide as the stream,
``"replaced_width": 576``, stands in the part's place: ``model.layers.3.self_attn.linear``.
"""

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.utils import _get_classes

DROPPED, OUTPUTS = "dropped_sublayers", "dropped_outputs"
REPLACED, WIDTH = "replaced_sublayers", "replaced_width"

Handed = Sequence[int | str | None]


class ModelArgs:
    """What mlx-lm makes of a config.json: here the config itself."""

    def __init__(self, config: dict[str, Any]):
        self.config = config

    @classmethod
    def from_dict(cls, config: dict[str, Any]) -> "ModelArgs":
        """Keep a config."""
        return cls(config)


def Model(args: ModelArgs) -> nn.Module:
    """Build the network of a config, without the sub-layers that it says are gone."""
    config = args.config
    kind, kind_args = _get_classes(config)
    model = kind(kind_args.from_dict(config))
    outputs = config.get(OUTPUTS, {})
    gone = drop(model, config.get(DROPPED, {}), outputs)
    gone |= drop(model, config.get(REPLACED, {}), outputs, config.get(WIDTH))
    sanitize = getattr(model, "sanitize", lambda weights: weights)

    def sanitize_rest(weights: dict[str, mx.array]) -> dict[str, mx.array]:
        """Show mlx-lm's code for these weights all that it may look for."""
        return {k: a for k, a in sanitize({**gone, **weights}).items() if k not in gone}

    model.sanitize = sanitize_rest
    return model


def drop(
    model: nn.Module,
    dropped: dict[str, list[int]],
    outputs: Mapping[str, Handed],
    width: int | None = None,
) -> dict[str, mx.array]:
    """Take sub-layers out of a network, in place; return their parameters by name.

    Args:
        model: the network.
        dropped: the layers, by the path that their blocks have for the part.
        outputs: what the part hands on beside its output, by the same.
        width: of the matrices that stand in for them; None: nothing does.
    """
    whole = dict(tree_flatten(model.parameters()))
    for path, layers in dropped.items():
        for layer in layers:
            linear = None if width is None else nn.Linear(width, width)
            drop_part(model.layers[layer], path, outputs.get(path, ()), linear)
    left = dict(tree_flatten(model.parameters()))
    return {name: array for name, array in whole.items() if name not in left}


def drop_part(
    block: nn.Module, path: str, handed: Handed = (), linear: nn.Linear | None = None
) -> None:
    """Take a part out of a block, in place; ``linear`` stands in for it, if given."""
    inner = dict(block.named_modules())[path]
    gone = Dropped(inner, handed) if linear is None else StandIn(inner, handed, linear)
    block.update_modules(tree_unflatten([(path, gone)]))


class Dropped(nn.Module):
    """Stands in a sub-layer's place: gives zeros, and lets the sub-layer's cache count tokens.

    Networks read masks and positions from the caches of some of their layers, whatever these
    layers do. So a cache takes in a zero for each token.

    Args:
        inner: the sub-layer, whose settings some blocks ask for.
        handed: what it returns beside its output: arguments, by their position or name.
    """

    def __init__(self, inner: nn.Module, handed: Handed = ()):
        super().__init__()
        self.__dict__.update(vars(inner))
        self._handed = tuple(handed)

    def __call__(self, *args: Any, **options: Any) -> Any:
        """Return what stands in for the output of a first argument, (batch, length, hidden)."""
        x, *others = (*args, *options.values())
        for given in others:
            for cache in getattr(given, "caches", (given,)):
                _count_tokens(cache, x)
        out = self.stand_in(x)
        if not self._handed:
            return out
        named: dict[Any, Any] = {**dict(enumerate(args)), **options}
        return (out, *(named.get(key) for key in self._handed))

    def stand_in(self, x: mx.array) -> mx.array:
        """Return what comes in the place of the sub-layer's output."""
        return mx.zeros_like(x)


class StandIn(Dropped):
    """Gives a matrix's product with what the sub-layer would read, and a constant.

    Args:
        inner: the sub-layer.
        handed: what it returns beside its output.
        linear: the matrix, as wide as the stream.
    """

    def __init__(self, inner: nn.Module, handed: Handed, linear: nn.Linear):
        super().__init__(inner, handed)
        self.linear = linear

    def stand_in(self, x: mx.array) -> mx.array:
        """Return what comes in the place of the sub-layer's output."""
        return self.linear(x)


def _count_tokens(cache: Any, x: mx.array) -> None:
    if hasattr(cache, "update_and_fetch"):
        if not isinstance(cache, _StaysDense) and hasattr(cache, "to_quantized"):
            cache.__class__ = _make_dense(type(cache))  # type: ignore[arg-type]
        width = getattr(cache, "group_size", 1)  # a quantized cache takes whole groups
        zeros = mx.zeros((x.shape[0], 1, x.shape[1], width), dtype=x.dtype)
        cache.update_and_fetch(zeros, zeros)
    elif hasattr(cache, "advance"):
        for i, state in enumerate(cache.cache):
            if state is None:  # mlx-lm cuts batches out of whatever states there are
                cache[i] = mx.zeros_like(x[:, :1])
        cache.advance(x.shape[1])


class _StaysDense:
    """A cache whose single zeros cannot be quantized in groups."""

    def to_quantized(self, *args: Any, **options: Any) -> Any:
        return self


@lru_cache
def _make_dense(kind: Any) -> type:
    return type(kind.__name__, (_StaysDense, kind), {})  # caches are saved by their class's name
