"""Bytes that decoding a token reads and keeps, of any network that mlx-lm runs."""

from collections.abc import Mapping
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear

from ..constants import CHOSEN
from ..errors import UserError
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
    modules: dict[str, Any] = {p: m for p, m in model.named_modules() if "weight" in m}
    found = {path: batch_size / len(modules[path].weight) for path in _find_lookups(model, modules)}
    for path, module in modules.items():
        if isinstance(module, SwitchLinear | QuantizedSwitchLinear):
            experts = module.weight.shape[0]
            found[path] = 1 - (1 - _count_picked(model, experts) / experts) ** batch_size
    return found


def _find_lookups(model: nn.Module, modules: Mapping[str, Any]) -> list[str]:
    """Find the embeddings that give rows and are no head, by a forward, which is not computed.

    Where no embedding is asked for logits and no other matrix has as many rows as there are, the
    embedding of that size is taken for the head: some networks read its weight themselves.
    """
    kinds = nn.Embedding, nn.QuantizedEmbedding
    embeddings = {path: m for path, m in modules.items() if isinstance(m, kinds)}
    called: set[str] = set()
    heads: set[str] = set()
    own = {path: type(m) for path, m in embeddings.items()}
    try:
        for path, module in embeddings.items():
            module.__class__ = _watch(own[path], path, called, heads)
        cache = make_prompt_cache(model)
        vocabulary = model(mx.zeros((1, 1), mx.int32), cache=cache).shape[-1]
    finally:
        for path, module in embeddings.items():
            module.__class__ = own[path]
    others = (m.weight.shape[0] for path, m in modules.items() if path not in embeddings)
    if not heads and vocabulary not in others:
        heads = {path for path, m in embeddings.items() if m.weight.shape[0] == vocabulary}
    return sorted(called - heads)


def _watch(kind: Any, path: str, called: set[str], heads: set[str]) -> type:
    """Make a class of modules that note that they give rows, or logits."""

    class Watched(kind):  # type: ignore[misc]
        def __call__(self, ids: mx.array) -> mx.array:
            called.add(path)
            return super().__call__(ids)

        def as_linear(self, x: mx.array) -> mx.array:
            heads.add(path)
            return super().as_linear(x)

    return Watched


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
    """Count the bytes of a sequence's keys and values; a window keeps its last tokens only.

    Raises:
        UserError: for a window of no tokens.
    """
    total = 0.0
    begun = begin_cache(model, 1)
    for one in (part for cache in begun for part in getattr(cache, "caches", (cache,))):
        if isinstance(getattr(one, "keys", None), mx.array):
            kept = min(tokens, getattr(one, "max_size", tokens))
            if not one.keys.shape[2]:
                raise UserError(
                    '"sliding_window" in config.json is 0, and nothing can be seen in that: '
                    "correct it, or take it out"
                )
            total += one.nbytes / one.keys.shape[2] * kept
    return round(total)
