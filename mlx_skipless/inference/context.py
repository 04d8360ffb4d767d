"""How many tokens in a row a model was made for, and what happens beyond them.

Positions that training never saw make a model babble. Where a cache can be bounded, attention
slides over the text instead; where positions are rows of a table, there are no more of them.
"""

from collections.abc import Mapping, Sequence
from typing import Any, TypeGuard

import mlx.nn as nn
from mlx_lm.models.cache import ConcatenateKVCache, KVCache, QuantizedKVCache

from ..errors import UserError

LENGTHS = ("max_position_embeddings", "n_positions", "max_sequence_length", "seq_length", "n_ctx")
# Their layers all have a window, which mlx-lm's networks of these kinds do not know.
WINDOWED = ("mistral", "phi3", "starcoder2")


def read_context(config: Mapping[str, Any]) -> int | None:
    """Read from a config how many tokens in a row a model was made for; None where it is silent."""
    text = config.get("text_config")
    config = {**config, **text} if isinstance(text, Mapping) else config
    lengths = [config[key] for key in LENGTHS if _is_length(config.get(key))]
    if not lengths:
        return None
    scaling = config.get("rope_scaling") or config.get("rope_parameters")
    scaling = scaling if isinstance(scaling, Mapping) else {}
    original, factor = (scaling.get(k) for k in ("original_max_position_embeddings", "factor"))
    length = lengths[0]
    if _is_length(original) and isinstance(factor, int | float) and 1 <= factor <= 1 << 20:
        length = max(length, int(factor * original))  # some configs name the unscaled length
    window = config.get("sliding_window")
    uses = config.get("use_sliding_window", True) and config.get("layer_types") is None
    if config.get("model_type") in WINDOWED and _is_length(window) and uses:
        length = min(length, window)
    return length


def find_context(model: nn.Module) -> int | None:
    """Find how many tokens in a row a model was made for; None where nothing says so."""
    if (known := getattr(model, "context", None)) is not None:  # what ``load`` read
        return known
    args = getattr(model, "args", None)
    return read_context(vars(args)) if hasattr(args, "__dict__") else None


def has_position_table(model: nn.Module) -> bool:
    """Whether positions are rows of a table, which MLX reads beyond its end without a word."""
    return any(name.rpartition(".")[2] == "wpe" for name, _ in model.named_modules())


def count_cached(cache: Sequence[Any]) -> int:
    """Count the tokens that a cache has taken in."""
    return max((getattr(one, "offset", 0) for one in cache), default=0)


def slides(model: nn.Module, cache: Sequence[Any]) -> bool:
    """Whether attention with this cache leaves the oldest tokens behind when it is full."""
    growing = (KVCache, QuantizedKVCache, ConcatenateKVCache)
    return not has_position_table(model) and not any(isinstance(one, growing) for one in cache)


def limit_answer(
    model: nn.Module, cache: Sequence[Any], prompt_tokens: int, max_tokens: int
) -> int:
    """Cut ``max_tokens`` of an answer down to those for which positions are left.

    Raises:
        UserError: if there are none.
    """
    context = find_context(model)
    taken = count_cached(cache) + prompt_tokens
    if context is None or taken + max_tokens <= context or slides(model, cache):
        return max_tokens
    if taken >= context:
        raise UserError(
            f"the prompt has {taken:,} tokens and the model's context {context:,}: shorten it"
            + ("" if has_position_table(model) else ", or drop what keeps the cache from sliding")
        )
    return context - taken


def describe_overflow(
    model: nn.Module, tokens: int, *, max_kv_size: int | None = None, what: str = "the prompt has"
) -> str | None:
    """Say in a line if so many tokens are more than the model was made for."""
    context = find_context(model)
    if context is None or tokens <= context:
        return _describe_lost_window(model, f"{what} {tokens:,} tokens", tokens)
    seen = min(max_kv_size or context, tokens)
    told = f"{what} {tokens:,} tokens, more than the model's context of {context:,}"
    if seen == tokens:
        return told
    return f"{told}: it sees {seen:,} of them at a time, the first few and the last"


def check_windows(model: nn.Module, lengths: Sequence[int], what: str) -> str | None:
    """Say in a line if a model is made to read more tokens in a row than it was made for.

    Args:
        model: what reads.
        lengths: tokens in a row.
        what: what gives these lengths, before their number.

    Raises:
        UserError: if it has no positions for them.
    """
    context, longest = find_context(model), max(lengths, default=0)
    if context is None or longest <= context:
        return _describe_lost_window(model, f"{what} {longest:,} tokens", longest)
    told = f"{what} {longest:,} tokens, more than the model's context of {context:,}"
    if has_position_table(model):
        raise UserError(f"{told}, and it has no more positions: give fewer")
    return told


def _describe_lost_window(model: nn.Module, told: str, tokens: int) -> str | None:
    """Say in a line if tokens in a row outgrow a window that the network does not have."""
    window = getattr(model, "lost_window", None)  # what ``load`` found
    if window is None or tokens <= window:
        return None
    return (
        f"{told}, and some of the model's layers have a window of {window:,}: mlx-lm's own network "
        "shows them all tokens, and differs from the source"
    )


def _is_length(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and 1 < value < 1 << 40
