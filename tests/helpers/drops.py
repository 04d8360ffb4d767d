"""Networks of mlx-lm's own that lose a sub-layer, beside the same whose sub-layer gives zeros.

`WAYS` are the ways in which users run a network. Each takes a network and returns the logits, or
logarithms of probabilities, of some tokens.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
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
from mlx_lm.utils import load_model, quantize_model, save_model
from zoo import make_model

from mlx_skipless.network import reduced
from mlx_skipless.network.stock import StockNetwork

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
        raise Cannot("its caches forget nothing")
    return mx.concatenate([found, run(model, cache, 3, 1, start=3)])


WAYS: dict[str, Callable[[nn.Module], mx.array]] = {
    "chunks": run_chunks,
    "tokens": run_tokens,
    "batch": run_batch,
    "kv-bits": run_kv_bits,
    "4 bits": run_chunks,
    "saved": run_chunks,
    "saved cache": run_saved_cache,
    "trimmed": run_trimmed,
}


def differ(one: mx.array, other: mx.array) -> float:
    """The largest difference; infinite where one is no number."""
    if one.shape != other.shape or bool(mx.isnan(one).any()):
        return float("inf")
    return float(mx.where(one == other, 0.0, mx.abs(one - other)).max())


@dataclass
class Case:
    """A network of which sub-layers are dropped.

    Args:
        folder: holds it, and gets what is written of it.
        config: its config.
    """

    folder: Path
    config: dict[str, Any]

    def __post_init__(self) -> None:
        self.model = load_model(self.folder)[0]
        self.sublayers = StockNetwork(lambda: load_model(self.folder, lazy=True)[0]).sublayers
        self._kept: dict[tuple[Any, ...], mx.array] = {}

    @cached_property
    def packed(self) -> nn.Module:
        """The network in 4 bits."""
        model = load_model(self.folder)[0]
        return quantize_model(model, dict(self.config), 32, 4)[0]

    @cached_property
    def saved(self) -> nn.Module:
        """The network written and read again, which some change a little."""
        folder = self.folder / "whole"
        save_model(folder, self.model)
        (folder / "config.json").write_text(json.dumps(self.config))
        return load_model(folder)[0]

    def _choose(self, way: str) -> nn.Module:
        return getattr(self, {"4 bits": "packed", "saved": "saved"}.get(way, "model"))

    @contextmanager
    def lacking(
        self,
        model: nn.Module,
        layer: int,
        kind: str,
        wrap: Callable[..., Any] | None = None,
        linear: nn.Linear | None = None,
    ) -> Iterator[None]:
        """Let a network lack a sub-layer for a while, or have each part of it wrapped.

        ``linear`` stands in for what is lacking.
        """
        own, block = self.sublayers[layer], model.layers[layer]
        parts = {path: dict(block.named_modules())[path] for path in own.parts[kind]}
        for path, part in parts.items():
            if wrap is None:
                reduced.drop_part(block, path, own.handed.get(path, ()), linear)
            else:
                block.update_modules(tree_unflatten([(path, wrap(part))]))
        try:
            yield
        finally:
            block.update_modules(tree_unflatten([*parts.items()]))

    def run(self, way: str, layer: int | None = None, kind: str = "") -> mx.array:
        """Run the network in a way, whole or with a sub-layer's output times zero.

        Raises:
            Cannot: if the whole network does not run in this way.
        """
        key = way, layer, kind
        if key not in self._kept:
            try:
                model = self._choose(way)
                with nullcontext() if layer is None else self.lacking(model, layer, kind, Zeroed):
                    self._kept[key] = WAYS[way](model)
                    mx.eval(self._kept[key])
            except Exception as error:
                if layer is None:
                    raise Cannot((str(error) or "it says no").splitlines()[0]) from error
                raise
        return self._kept[key]

    def find_obstacle(self, way: str) -> str | None:
        """Why the whole network does not run in a way; None if it does."""
        try:
            self.run(way)
        except Cannot as error:
            return str(error)
        return None

    def compare(self, way: str, layer: int, kind: str) -> float:
        """How far the network without a sub-layer is from that with its output times zero."""
        if way == "saved":
            return differ(self.run(way, layer, kind), WAYS[way](self._save(layer, kind)))
        model = self._choose(way)
        with self.lacking(model, layer, kind):
            return differ(self.run(way, layer, kind), WAYS[way](model))

    def change(self, way: str, layer: int, kind: str) -> float:
        """How far the network with a sub-layer's output times zero is from the whole."""
        return differ(self.run(way), self.run(way, layer, kind))

    def _save(self, layer: int, kind: str) -> nn.Module:
        """Write the network without a sub-layer, as `convert` does; load it by mlx-lm alone."""
        own, folder = self.sublayers[layer], self.folder / f"{kind}{layer}"
        with self.lacking(self.model, layer, kind):
            save_model(folder, self.model)
        entries = {
            reduced.DROPPED: {path: [layer] for path in own.parts[kind]},
            reduced.OUTPUTS: own.handed,
            "model_file": "model.py",
        }
        (folder / "config.json").write_text(json.dumps(self.config | entries))
        (folder / "model.py").write_text(Path(str(reduced.__file__)).read_text())
        return load_model(folder, trust_remote_code=True)[0]

    def droppable(self, kind: str) -> list[int]:
        """The first, a middle and the last layer whose sub-layer can go."""
        can = [i for i, own in enumerate(self.sublayers) if kind not in own.obstacles]
        return sorted({can[0], can[len(can) // 2], can[-1]}) if can else []


def open_case(folder: Path, model_type: str) -> Case:
    """Make a random network of a type."""
    return Case(folder, make_model(folder, model_type))
