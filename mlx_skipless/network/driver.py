"""Runs networks a layer at a time, so that no network has to fit in memory."""

from collections.abc import Callable, Mapping
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.base import create_attention_mask
from mlx_lm.models.cache import KVCache

from .magnitudes import Watch
from .model import Block, ModelArgs
from .names import EMBEDDING, FINAL_NORM, HEAD
from .parts import Arrays, Parts

RESIDENT_BYTES = 2 << 30  # of float32 weights that may stay in memory


def widen_experts(arrays: Arrays) -> Arrays:
    """A layer's tensors such that it runs: on a CPU, MLX multiplies dense experts in float32 only.

    The same numbers, in a wider type; nothing else has three axes.
    """
    if mx.default_device() != mx.cpu:
        return arrays
    halves = (mx.float16, mx.bfloat16)
    return {
        name: a.astype(mx.float32)
        if a.ndim == 3 and a.dtype in halves and name.endswith(".weight")
        else a
        for name, a in arrays.items()
    }


class StreamedNetwork:
    """A network that reads each layer when it runs and lets it go after.

    Args:
        args: the network.
        parts: its tensors.
        settings: the ``quantization`` entry of its config, None for dense weights.
        resident: keep the layers instead, for many passes.
    """

    def __init__(
        self,
        args: ModelArgs,
        parts: Parts,
        settings: Mapping[str, Any] | None = None,
        *,
        resident: bool = False,
    ):
        self.args, self._parts, self._settings = args, parts, settings
        self.resident = resident
        self._kept: dict[int, Block] = {}
        self._embedding = nn.Embedding(args.vocab_size, sum(args.row_widths().values()))
        self._embedding = self._filled(self._embedding, EMBEDDING, parts.embedding())
        head = parts.head()
        self._norm = None
        if args.final_norm:
            self._norm = self._filled(args.make_stream_norm("final"), FINAL_NORM, head)
        self._head: Callable[[mx.array], mx.array] = self._embedding.as_linear
        if not args.tie_word_embeddings:
            linear = nn.Linear(args.hidden_size, args.vocab_size, bias=args.head_bias)
            self._head = self._filled(linear, HEAD, head)

    def _filled(self, module: Any, prefix: str, arrays: Arrays) -> Any:
        own = {n.removeprefix(f"{prefix}."): a for n, a in arrays.items() if n.startswith(prefix)}
        if (settings := self._settings) is not None:
            root = nn.Module()
            root.part = module
            nn.quantize(
                root,
                settings["group_size"],
                settings["bits"],
                mode=settings.get("mode", "affine"),
                class_predicate=lambda where, m: (
                    f"{where}.scales".removeprefix("part.") in own
                    and settings.get(where.replace("part", prefix, 1), True)
                ),
            )
            module = root.part
        module.load_weights(list(own.items()))
        return module

    def _block(self, layer: int) -> Block:
        if layer in self._kept:
            return self._kept[layer]
        prefix = f"model.layers.{layer}"
        block = self._filled(
            Block(self.args, layer), prefix, widen_experts(self._parts.layer(layer))
        )
        if self.resident:
            self._kept[layer] = block
        return block

    def hidden(
        self,
        tokens: mx.array,
        caches: list[KVCache] | None = None,
        watch: Watch | None = None,
    ) -> mx.array:
        """The stream before the final norm, (batch, length, hidden), of tokens (batch, length)."""
        h = self.args.scale_embedding(self._embedding(tokens))
        for layer in range(self.args.num_hidden_layers):
            block = self._block(layer)
            cache = caches[layer] if caches is not None else None
            window = self.args.sliding_window if block.use_sliding else None
            mask = create_attention_mask(h, cache, window_size=window)
            if watch is None:
                h = block(h, mask, cache)
                mx.eval(h)
            else:
                h = watch.run(f"model.layers.{layer}", block, h, mask, cache)
        if not self.resident:
            mx.clear_cache()
        return h

    def logits(self, hidden: mx.array) -> mx.array:
        """float32 logits (batch, length, vocabulary) of the stream before the final norm."""
        h = hidden if self._norm is None else self._norm(hidden)
        return self.args.scale_logits(self._head(h)).astype(mx.float32)


def apply_final_norm(args: ModelArgs, h: mx.array, tensors: Mapping[str, mx.array]) -> mx.array:
    """The stream behind the final norm, if there is one, whose tensors are among those given."""
    if not args.final_norm:
        return h
    norm, prefix = args.make_stream_norm("final"), f"{FINAL_NORM}."
    own = [
        (n.removeprefix(prefix), a.astype(mx.float32))
        for n, a in tensors.items()
        if n.startswith(prefix)
    ]
    return norm.load_weights(own)(h)


def run_block(args: ModelArgs, block: Block, h: mx.array) -> mx.array:
    """One block on whole sequences (rows, length, hidden)."""
    window = args.sliding_window if block.use_sliding else None
    return block(h, create_attention_mask(h, None, window_size=window))


def fill_block(block: Block, tensors: Mapping[str, mx.array], prefix: str) -> Block:
    """The block with its tensors, in float32."""
    own = [(name.removeprefix(prefix), a.astype(mx.float32)) for name, a in tensors.items()]
    block.load_weights(own)
    return block


BATCH_TOKENS = 2048


HELD_OUT = 8  # every so manyth batch judges, the others are fitted


def split_batches(tokens: mx.array) -> list[mx.array]:
    """Text, tokens (sequences, length), in the batches that calibration takes it in."""
    rows = max(1, min(BATCH_TOKENS // tokens.shape[1], tokens.shape[0] // HELD_OUT))
    return [tokens[i : i + rows] for i in range(0, tokens.shape[0], rows)]


def is_held_out(batch: int) -> bool:
    """Whether a batch judges fits instead of being fitted."""
    return batch % HELD_OUT == HELD_OUT - 1
