"""Key-value caches: whole, bounded or quantized, for one model or for two, or from a file.

mlx-lm's caches do the work. Ours is what chooses them for each layer, and says why one cannot be.
"""

import copy
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.models.cache import (
    ArraysCache,
    ChunkedKVCache,
    KVCache,
    QuantizedKVCache,
    RotatingKVCache,
    load_prompt_cache,
    make_prompt_cache,
)

from ..checkpoints.files import is_there
from ..errors import BadArgument, UserError, first_line
from ..options import check_whole, expand_path, name_folder
from .context import find_context, has_position_table

KV_BITS = (2, 3, 4, 6, 8)
KEEP = 4  # a rotating cache never drops the first tokens: attention leans on them


def check_shape(max_kv_size: int | None, kv_bits: int | None) -> None:
    """Check what ``make_cache`` takes, whatever the model.

    Raises:
        UserError: for sizes that cannot be, and for both at once.
    """
    check_whole("--max-kv-size", max_kv_size)
    if max_kv_size is not None and max_kv_size <= KEEP:
        raise BadArgument(
            f"--max-kv-size {max_kv_size}: must exceed {KEEP}, as the first {KEEP} tokens stay"
        )
    if kv_bits is not None and kv_bits not in KV_BITS:
        raise BadArgument(f"--kv-bits {kv_bits!r}: must be one of {', '.join(map(str, KV_BITS))}")
    if kv_bits is not None and max_kv_size is not None:
        raise BadArgument(
            "--kv-bits with --max-kv-size: mlx-lm cannot quantize a bounded cache; drop one"
        )


def make_cache(
    model: nn.Module, *, max_kv_size: int | None = None, kv_bits: int | None = None
) -> list[Any]:
    """Make a fresh cache for a model, a bounded or quantized one too.

    A bounded cache keeps the first 4 tokens and drops the oldest after them. A layer with a smaller
    sliding window keeps its own size. While a prompt is read, each chunk of it (2,048 tokens) is
    held on top. mlx-lm's ``make_prompt_cache`` ignores ``max_kv_size`` for models that define
    ``make_cache``; this does not.

    Args:
        model: whose layers the caches are for.
        max_kv_size: tokens that a layer keeps at most; None: all.
        kv_bits: bits a value, one of ``KV_BITS``; None: as computed.

    Raises:
        UserError: for sizes that cannot be, for both at once, and for layers that cannot have them.
    """
    check_shape(max_kv_size, kv_bits)
    cache = make_prompt_cache(model)
    if max_kv_size is not None:
        cache = [_bound(c, max_kv_size) for c in cache]
    if kv_bits is not None:
        cache = [_quantize(c, kv_bits) for c in cache]
        group_size = _find_group_size(model)
        for one in cache:
            if isinstance(one, QuantizedKVCache):
                one.group_size = group_size
        _check_quantized(model, copy.deepcopy(cache))
    return cache


def make_sliding_cache(model: nn.Module) -> list[Any]:
    """Make a cache that holds the model's context and no more, if it has one and that can be."""
    size = find_context(model)
    if size is None or size <= KEEP or has_position_table(model):
        return make_cache(model)
    try:
        return make_cache(model, max_kv_size=size)
    except UserError:  # of layers whose caches cannot be bounded
        return make_cache(model)


def cut_prompt(model: nn.Module, cache: list[Any], ids: list[int]) -> list[int]:
    """Cut a prompt down to what a sliding cache holds of it in the end: its first and last tokens.

    To read the rest, which may be any number of tokens, would only take time.

    Args:
        model: what reads.
        cache: that it starts with; one that does not slide, or a state, takes the prompt whole.
        ids: the prompt.
    """
    size = find_context(model)
    sliding = all(isinstance(one, RotatingKVCache) for one in cache)
    if size is None or not KEEP < size < len(ids) or not sliding:
        return ids
    return [*ids[:KEEP], *ids[KEEP - size :]]


def make_draft_caches(
    model: nn.Module, draft_model: nn.Module, tokens: int, kv_bits: int | None
) -> list[Any]:
    """Make the caches of a model and of its draft, in one list as mlx-lm wants them.

    Raises:
        UserError: if one cannot take back some of so many tokens.
    """
    own, draft = (make_cache(m, kv_bits=kv_bits) for m in (model, draft_model))
    for cache in (*own, *draft):
        # mlx-lm goes on without a word when it cannot take back what the model rejects.
        if not cache.is_trimmable() or tokens >= getattr(cache, "max_size", math.inf):
            raise UserError(
                f"--draft-model: the prompt and --max-tokens make {tokens:,} tokens, which a "
                f"{type(cache).__name__} of this model cannot take back; ask for fewer, or drop "
                "--draft-model"
            )
    # It parts the list by the number of layers, of which some may have no cache.
    unused = [KVCache() for _ in model.layers[len(own) :]]
    return [*own, *unused, *draft]


def check_cache(name: str, cache: Any, model: nn.Module) -> None:
    """Check that something is a list of caches, one for each that a model's layers need.

    Raises:
        BadArgument: if it is not; ``name`` begins the message.
    """
    layers = len(make_prompt_cache(model))
    if not (isinstance(cache, list) and all(hasattr(one, "state") for one in cache)):
        raise BadArgument(f"{name}: is no list of caches, as make_cache makes one")
    if len(cache) != layers:
        raise BadArgument(f"{name}: has {len(cache)} caches and the model needs {layers}")


def load_cache(
    file: str | Path,
    model: nn.Module,
    name: str | None = None,
    warn: Callable[[str], None] = lambda line: None,
) -> list[Any]:
    """Load a prompt cache that ``mlx_lm.cache_prompt`` wrote for this model.

    Args:
        file: the cache; a quantized or bounded one of ``--kv-bits`` or ``--max-kv-size``, too.
        model: of the same shapes as the one that it was made with.
        name: of the model; ``warn`` is called with a line if the cache names another.
        warn: called with a line.

    Raises:
        UserError: if there is none, or it is another model's.
    """
    path = expand_path(file)
    try:
        if not is_there(path):
            raise FileNotFoundError("there is no such file")
        cache, metadata = load_prompt_cache(str(path), return_metadata=True)
    except (OSError, RuntimeError, ValueError, KeyError, TypeError) as e:
        raise UserError(
            f"{file} is no prompt cache ({first_line(e)}): `mlx_lm.cache_prompt` makes one"
        ) from e
    fresh = make_prompt_cache(model)
    kinds = [type(one) for one in fresh]  # a layer without its attention changes its cache's
    _read_token(model, fresh)
    if len(cache) != len(fresh) or not all(map(_fits, cache, fresh, kinds)):
        raise UserError(f"{file} is the cache of another model: make one with this model")
    made_with = metadata.get("model", name)
    if name is not None and not _may_be(made_with, name):
        warn(f"{file} was made with {made_with}: with another model's weights it means nothing")
    return cache


def _may_be(stored: str, name: str) -> bool:
    """Whether what a cache names may be a model; a path from another folder has its name alone."""
    path = expand_path(name)
    if path.exists() and not os.path.isabs(stored) and not os.path.exists(stored):
        return os.path.basename(os.path.normpath(stored)) == name_folder(path)
    return os.path.realpath(stored) == os.path.realpath(path)


def _fits(stored: Any, own: Any, kind: type) -> bool:
    """Whether a stored cache is like a model's own, or was before it was quantized or bounded.

    ``kind`` is what the model's own was before the model read a token into it.
    """
    whole = kind is KVCache
    if whole and isinstance(stored, QuantizedKVCache):
        try:
            own = own.to_quantized(stored.group_size, stored.bits)
        except (TypeError, ValueError):  # heads of another width
            return False
    bounded = whole and isinstance(stored, RotatingKVCache)
    alike = bounded or type(stored) in (kind, type(own))
    return alike and _list_widths(stored) == _list_widths(own)


def _list_widths(cache: Any) -> list[Any]:
    """What a cache's arrays have beside tokens: heads and channels of keys, all of a state."""
    parts: Any = tree_flatten([cache.state])
    arrays = [array for _, array in parts if isinstance(array, mx.array)]
    if hasattr(cache, "keys") or hasattr(cache, "caches"):
        return [(array.shape[1:2], array.shape[-1:]) for array in arrays]
    return [array.shape[1:] for array in arrays]


def _bound(cache: Any, size: int) -> Any:
    if type(cache) is KVCache:
        return RotatingKVCache(max_size=size, keep=KEEP)
    if isinstance(cache, RotatingKVCache):
        return RotatingKVCache(max_size=min(size, cache.max_size), keep=cache.keep)
    if isinstance(cache, ArraysCache | ChunkedKVCache):  # do not grow
        return cache
    raise UserError(
        f"--max-kv-size: a {type(cache).__name__} cannot be bounded; drop --max-kv-size"
    )


def _quantize(cache: Any, bits: int) -> Any:
    if type(cache) is KVCache:
        return _QuantizedKVCache(bits=bits)
    if isinstance(cache, ArraysCache):  # a state, no keys and values
        return cache
    if isinstance(cache, RotatingKVCache):
        raise UserError(
            "--kv-bits: mlx-lm cannot quantize a sliding window's cache, which this model has; "
            "drop --kv-bits"
        )
    raise UserError(f"--kv-bits: a {type(cache).__name__} cannot be quantized; drop --kv-bits")


def _find_group_size(model: nn.Module) -> int:
    """The values along a head that share a scale; where no head is seen MLX decides."""
    cache = make_prompt_cache(model)
    _read_token(model, cache)
    held = [one for one in cache if type(one) is KVCache and one.keys is not None]
    sizes = {array.shape[-1] for one in held for array in (one.keys, one.values)}
    for size in (64, 32):
        if all(width % size == 0 for width in sizes):
            return size
    raise UserError(
        f"--kv-bits: heads of {min(sizes)} values cannot be quantized in groups of 64 or 32; "
        "drop --kv-bits"
    )


def _check_quantized(model: nn.Module, cache: list[Any]) -> None:
    """Check that a model can read a quantized cache; ``cache`` is used up.

    Raises:
        UserError: if it cannot.
    """
    try:
        _read_token(model, cache)
    except (AttributeError, TypeError, ValueError) as error:
        raise UserError(
            f"--kv-bits: mlx-lm's network of this model cannot read a quantized cache "
            f"({first_line(error)}); drop --kv-bits"
        ) from error


def _read_token(model: nn.Module, cache: list[Any]) -> None:
    """Have a model read a token into a cache, lazily: shapes without values."""
    model(mx.zeros((1, 1), mx.int32), cache=cache)


class _QuantizedKVCache(QuantizedKVCache):
    """mlx-lm's, starting from rows of the right width: its own are too wide for some bits.

    head_dim // (32 // bits) words a row is one too many for 6 bits and a head_dim of 128.
    """

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> Any:
        if self.keys is None:
            width, bits = self.group_size, self.bits
            self.keys = mx.quantize(keys[..., :0, :], width, bits)  # type: ignore[assignment]
            self.values = mx.quantize(values[..., :0, :], width, bits)  # type: ignore[assignment]
        return super().update_and_fetch(keys, values)


def try_forward(model: nn.Module) -> None:
    """Have a model's forward made, not computed: a config may describe one that cannot be."""
    model(mx.zeros((1, 2), mx.int32), cache=make_prompt_cache(model))
