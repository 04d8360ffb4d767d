"""A network of mlx-lm's own without some of its sub-layers; needs mlx and mlx-lm alone.

A result of a drop carries this file as its model.py. Its config.json is that of the whole network
and says what is gone, by the names that mlx-lm's blocks have for their parts:
``"dropped_sublayers": {"self_attn": [3, 5], "mlp": [2]}``.
"""

from functools import lru_cache
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.utils import _get_classes

DROPPED = "dropped_sublayers"


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
    kind, kind_args = _get_classes(args.config)
    model = kind(kind_args.from_dict(args.config))
    drop(model, args.config[DROPPED])
    return model


def drop(model: nn.Module, dropped: dict[str, list[int]]) -> None:
    """Take sub-layers out of a network, in place: layers by the name that their blocks have."""
    for part, layers in dropped.items():
        for layer in layers:
            setattr(model.layers[layer], part, Dropped(model.layers[layer][part]))


class Dropped(nn.Module):
    """Stands in a sub-layer's place: gives zeros, and lets the sub-layer's cache count tokens.

    Networks read masks and positions from the caches of some of their layers, whatever these
    layers do. So a cache takes in a zero for each token.

    Args:
        inner: the sub-layer, whose settings some blocks ask for.
    """

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.__dict__.update(vars(inner))

    def __call__(self, x: mx.array, *args: Any, **options: Any) -> mx.array:
        """Return zeros like ``x``, (batch, length, hidden)."""
        for given in (*args, *options.values()):
            for cache in getattr(given, "caches", (given,)):
                _count_tokens(cache, x)
        return mx.zeros_like(x)


def _count_tokens(cache: Any, x: mx.array) -> None:
    if hasattr(cache, "update_and_fetch"):
        if not isinstance(cache, _StaysDense) and hasattr(cache, "to_quantized"):
            cache.__class__ = _make_dense(type(cache))  # type: ignore[arg-type]
        width = getattr(cache, "group_size", 1)  # a quantized cache takes whole groups
        zeros = mx.zeros((x.shape[0], 1, x.shape[1], width), dtype=x.dtype)
        cache.update_and_fetch(zeros, zeros)
    elif hasattr(cache, "advance"):
        cache.advance(x.shape[1])


class _StaysDense:
    """A cache whose single zeros cannot be quantized in groups."""

    def to_quantized(self, *args: Any, **options: Any) -> Any:
        return self


@lru_cache
def _make_dense(kind: Any) -> type:
    return type(kind.__name__, (_StaysDense, kind), {})  # caches are saved by their class's name
