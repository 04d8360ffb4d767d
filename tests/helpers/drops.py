"""Networks of mlx-lm's own that lose a sub-layer, beside the same whose sub-layer gives zeros.

`WAYS` are the ways in which users run a network. Each takes a network and returns the logits, or
logarithms of probabilities, of some tokens.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_unflatten
from mlx_lm.generate import BatchGenerator, generate_step
from mlx_lm.models.cache import (
    can_trim_prompt_cache,
    load_prompt_cache,
    make_prompt_cache,
    save_prompt_cache,
    trim_prompt_cache,
)
from mlx_lm.utils import load_model, save_model
from zoo import make_model

from mlx_skipless.network import reduced
from mlx_skipless.network.stock import StockNetwork, Sublayers

TOKENS = np.random.default_rng(0).integers(0, 264, 20)
LONG, SHORT = TOKENS[:13].tolist(), TOKENS[13:18].tolist()


class Cannot(Exception):
    """Tells that a network, even whole, does not run in a way."""


class Zeroed(nn.Module):
    """A sub-layer whose output is multiplied by zero."""

    def __init__(self, inner: Any):
        super().__init__()
        self.inner = inner

    def __call__(self, *args: Any, **options: Any) -> Any:
        out = self.inner(*args, **options)
        return (out[0] * 0, *out[1:]) if isinstance(out, tuple) else out * 0

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
def lacking(
    model: nn.Module, layer: int, kind: str, own: Sublayers, wrap: Callable[..., Any] | None = None
) -> Iterator[None]:
    """Let a network lack a sub-layer for a while, or have each part of it wrapped."""
    block = model.layers[layer]
    parts = {path: dict(block.named_modules())[path] for path in own.parts[kind]}
    for path, part in parts.items():
        if wrap is None:
            reduced.drop_part(block, path, own.handed.get(path, ()))
        else:
            block.update_modules(tree_unflatten([(path, wrap(part))]))
    try:
        yield
    finally:
        block.update_modules(tree_unflatten([*parts.items()]))


def differ(one: mx.array, other: mx.array) -> float:
    """The largest difference; infinite where one is no number."""
    if one.shape != other.shape or not bool(mx.isfinite(one).all()):
        return float("inf")
    return float(mx.abs(one - other).max())


@dataclass
class Case:
    """A network of which a sub-layer is dropped.

    Args:
        model: the network.
        config: its config.
        sublayers: its own, as `StockNetwork` finds them.
    """

    model: nn.Module
    config: dict[str, Any]
    sublayers: Sequence[Sublayers]

    def __post_init__(self) -> None:
        self._whole: dict[str, mx.array] = {}
        self._zeroed: dict[tuple[str, int, str], mx.array] = {}

    def run_whole(self, way: str) -> mx.array:
        """Run the whole network; raise Cannot if it does not run in this way."""
        if way not in self._whole:
            try:
                self._whole[way] = WAYS[way](self.model)
                mx.eval(self._whole[way])
            except Exception as error:
                raise Cannot(str(error)) from error
        return self._whole[way]

    def run_zeroed(self, way: str, layer: int, kind: str) -> mx.array:
        """Run the network with the sub-layer's output times zero."""
        key = way, layer, kind
        if key not in self._zeroed:
            with lacking(self.model, layer, kind, self.sublayers[layer], Zeroed):
                self._zeroed[key] = WAYS[way](self.model)
                mx.eval(self._zeroed[key])
        return self._zeroed[key]

    def compare(self, way: str, layer: int, kind: str) -> float:
        """How far the network without the sub-layer is from that with its output times zero."""
        self.run_whole(way)
        with lacking(self.model, layer, kind, self.sublayers[layer]):
            return differ(self.run_zeroed(way, layer, kind), WAYS[way](self.model))

    def compare_saved(self, folder: Path, layer: int, kind: str) -> float:
        """The same once written as `convert` does and loaded by mlx-lm alone."""
        own = self.sublayers[layer]
        with lacking(self.model, layer, kind, own):
            save_model(folder, self.model)
        entries = {
            reduced.DROPPED: {path: [layer] for path in own.parts[kind]},
            reduced.OUTPUTS: {path: own.handed[path] for path in own.handed},
            "model_file": "model.py",
        }
        (folder / "config.json").write_text(json.dumps(self.config | entries))
        (folder / "model.py").write_text(Path(str(reduced.__file__)).read_text())
        loaded = load_model(folder, trust_remote_code=True)[0]
        return differ(self.run_zeroed("chunks", layer, kind), run_chunks(loaded))


def open_case(folder: Path, model_type: str, *, packed: bool = False) -> Case:
    """Make a random network of a type; of 4 bits where that is asked for."""
    config = make_model(folder, model_type)
    model = load_model(folder)[0]
    if packed:
        nn.quantize(model, 32, 4, class_predicate=_can_pack)
    return Case(model, config, StockNetwork(lambda: load_model(folder, lazy=True)[0]).sublayers)


def _can_pack(path: str, module: nn.Module) -> bool:
    return hasattr(module, "to_quantized") and module.weight.shape[-1] % 32 == 0
