"""Bytes that decoding a token reads and keeps, of any network that mlx-lm runs."""

from collections.abc import Mapping
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear

from ..constants import CHOSEN
from ..memory import weight_bytes


def count_bytes_read(model: nn.Module, batch_size: int = 1) -> int:
    """Count the bytes of weights that a step of decoding reads, for a token of each sequence.

    An embedding that is not the head too gives a row for each sequence. Experts are read if they
    are picked; several sequences pick as many of them as random choices would.
    """
    modules: dict[str, Any] = dict(model.named_modules())
    unread = (
        weight_bytes(modules[path]) * (1 - share)
        for path, share in find_shares_read(model, batch_size).items()
    )
    return round(float(weight_bytes(model)) - sum(unread))


def find_shares_read(model: nn.Module, batch_size: int = 1) -> dict[str, float]:
    """Find the modules of which a step of decoding reads a share alone, by module path.

    See ``count_bytes_read``.
    """
    modules = {path: m for path, m in model.named_modules() if "weight" in m}
    found = {}
    for path, module in modules.items():
        rows = module.weight.shape[0]
        if isinstance(module, nn.Embedding | nn.QuantizedEmbedding):
            if any(m.weight.shape[0] == rows for m in modules.values() if m is not module):
                found[path] = batch_size / rows
        elif isinstance(module, SwitchLinear | QuantizedSwitchLinear):
            found[path] = 1 - (1 - _count_picked(model, rows) / rows) ** batch_size
    return found


def _count_picked(model: nn.Module, experts: int) -> int:
    """Count the experts that a token is given to, of so many; all where no config says it."""
    own = _list_settings(getattr(model, "args", None))
    inner = [_list_settings(own.get(key)) for key in ("text_config", "ffn_config")]
    found = (place.get(key) for place in (*inner, own) for key in CHOSEN)
    return next((count for count in found if isinstance(count, int)), experts)


def _list_settings(args: Any) -> Mapping[str, Any]:
    return args if isinstance(args, Mapping) else getattr(args, "__dict__", {})


def begin_cache(model: nn.Module, batch_size: int) -> list[Any]:
    """Make a cache that holds a token of each sequence, lazily: shapes without values."""
    cache = make_prompt_cache(model)
    model(mx.zeros((batch_size, 1), mx.int32), cache=cache)
    return cache


def count_cache_bytes(model: nn.Module, tokens: float) -> int:
    """Count the bytes of a sequence's keys and values; a window keeps its last tokens only."""
    total = 0.0
    begun = begin_cache(model, 1)
    for one in (part for cache in begun for part in getattr(cache, "caches", (cache,))):
        if isinstance(getattr(one, "keys", None), mx.array):
            kept = min(tokens, getattr(one, "max_size", tokens))
            total += one.nbytes / one.keys.shape[2] * kept
    return round(total)
