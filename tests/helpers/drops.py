"""Networks of mlx-lm's own that lose a sub-layer, beside the same whose sub-layer gives zeros.

`WAYS` are the ways in which users run a network. Each takes a network and returns the logits, or
logarithms of probabilities, of some tokens.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.generate import BatchGenerator, generate_step
from mlx_lm.models.cache import (
    can_trim_prompt_cache,
    load_prompt_cache,
    make_prompt_cache,
    save_prompt_cache,
    trim_prompt_cache,
)
from mlx_lm.utils import load_model, save_model

from mlx_skipless.network import reduced

TOKENS = np.random.default_rng(0).integers(0, 264, 20)
LONG, SHORT = TOKENS[:13].tolist(), TOKENS[13:18].tolist()


class Cannot(Exception):
    """Tells that a network, even whole, does not run in a way."""


class Zeroed(nn.Module):
    """A sub-layer whose output is multiplied by zero."""

    def __init__(self, inner: Any):
        super().__init__()
        self.inner = inner

    def __call__(self, *args: Any, **options: Any) -> mx.array:
        return self.inner(*args, **options) * 0

    def __getattr__(self, name: str) -> Any:
        if name in self or "inner" not in self:
            return super().__getattr__(name)
        return getattr(self.inner, name)


def run(model: nn.Module, cache: list[Any], *lengths: int, start: int = 0) -> mx.array:
    """Run on chunks of tokens of these lengths; return each chunk's last logits."""
    found = []
    for length in lengths:
        tokens = mx.array(TOKENS[None, start : start + length])
        found.append(model(tokens, cache=cache)[:, -1].astype(mx.float32))
        start += length
    return mx.concatenate(found)


def run_chunks(model: nn.Module) -> mx.array:
    """A prompt in two chunks, then token by token beyond what windows hold."""
    return run(model, make_prompt_cache(model), 11, 3, 1, 1, 1, 1)


def run_tokens(model: nn.Module) -> mx.array:
    """Token by token."""
    return run(model, make_prompt_cache(model), *[1] * 12)


def run_batch(model: nn.Module) -> mx.array:
    """Two prompts of unequal length at once, in chunks, by mlx-lm's generator of batches."""
    batch = BatchGenerator(model, max_tokens=3, prefill_step_size=4)
    batch.insert([LONG, SHORT])
    found = []
    while replies := batch.next_generated():
        found += [reply.logprobs for reply in replies]
    batch.close()
    return mx.stack(found).astype(mx.float32)


def run_kv_bits(model: nn.Module) -> mx.array:
    """As ``mlx_lm.generate --kv-bits 8`` does it."""
    steps = generate_step(
        mx.array(LONG), model, max_tokens=4, kv_bits=8, kv_group_size=32, prefill_step_size=5,
        quantized_kv_start=0,
    )  # fmt: skip
    return mx.stack([logits for _, logits in steps]).astype(mx.float32)


def run_saved_cache(model: nn.Module) -> mx.array:
    """A prompt whose cache is saved and loaded before it goes on."""
    cache = make_prompt_cache(model)
    found = run(model, cache, 7, 2)
    with tempfile.TemporaryDirectory() as folder:
        file = f"{folder}/cache.safetensors"
        save_prompt_cache(file, cache)
        cache = load_prompt_cache(file)
        mx.eval([one.state for one in cache])
    return mx.concatenate([found, run(model, cache, 3, 1, 1, start=9)])


def run_trimmed(model: nn.Module) -> mx.array:
    """A prompt of which the cache forgets tokens before it goes on."""
    cache = make_prompt_cache(model)
    found = run(model, cache, 4, 2)
    if not can_trim_prompt_cache(cache) or trim_prompt_cache(cache, 3) != 3:
        raise Cannot
    return mx.concatenate([found, run(model, cache, 3, 1, start=3)])


WAYS: dict[str, Callable[[nn.Module], mx.array]] = {
    "chunks": run_chunks,
    "tokens": run_tokens,
    "batch": run_batch,
    "kv-bits": run_kv_bits,
    "saved cache": run_saved_cache,
    "trimmed": run_trimmed,
}


@contextmanager
def replaced(
    model: nn.Module, layer: int, parts: Sequence[str], wrap: Callable[[Any], Any]
) -> Iterator[None]:
    """Let a network have other modules in the place of some parts of a layer."""
    block = model.layers[layer]
    own = {part: block[part] for part in parts}
    for part in parts:
        setattr(block, part, wrap(own[part]))
    try:
        yield
    finally:
        for part in parts:
            setattr(block, part, own[part])


def differ(one: mx.array, other: mx.array) -> float:
    """The largest difference; infinite where one is no number."""
    if one.shape != other.shape or not bool(mx.isfinite(one).all()):
        return float("inf")
    return float(mx.abs(one - other).max())


def compare(model: nn.Module, way: str, layer: int, parts: Sequence[str]) -> tuple[float, float]:
    """Drop parts of a layer.

    Returns:
        how far that is from the parts' output times zero, and from the whole network.

    Raises:
        Cannot: if the whole network does not run in this way.
    """
    try:
        whole = WAYS[way](model)
        mx.eval(whole)
    except Exception as error:
        raise Cannot from error
    with replaced(model, layer, parts, Zeroed):
        expected = WAYS[way](model)
        mx.eval(expected)
    with replaced(model, layer, parts, reduced.Dropped):
        found = WAYS[way](model)
    return differ(expected, found), differ(expected, whole)


def save_without(
    folder: Path, model: nn.Module, config: dict[str, Any], layer: int, parts: Sequence[str]
) -> None:
    """Write a network without parts of a layer as `convert` does: with its code, for mlx-lm."""
    with replaced(model, layer, parts, reduced.Dropped):
        save_model(folder, model)
    entries = {reduced.DROPPED: {part: [layer] for part in parts}, "model_file": "model.py"}
    (folder / "config.json").write_text(json.dumps(config | entries))
    (folder / "model.py").write_text(Path(str(reduced.__file__)).read_text())


def compare_saved(
    folder: Path, model: nn.Module, config: dict[str, Any], layer: int, parts: Sequence[str]
) -> float:
    """How far a network is that mlx-lm loads without parts of a layer from their times zero."""
    save_without(folder, model, config, layer, parts)
    loaded = load_model(folder, trust_remote_code=True)[0]
    with replaced(model, layer, parts, Zeroed):
        return differ(run_chunks(model), run_chunks(loaded))
