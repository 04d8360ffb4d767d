"""Networks of mlx-lm's own, of whatever architecture, read a layer at a time.

Nothing here knows an architecture. Most networks are chains: what a layer gives is all that the
next one needs of it. Those that are not, of layers that share keys for instance, run as a whole.

What is a sub-layer is found by running each block once,
without computing anything, and looking at what it calls: a part of it that holds matrices and turns
a stream (batch, length, hidden) into another. If it is given a cache it is an attention, or
what stands in the place of one, else an FFN.
"""

import re
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import make_prompt_cache

from .driver import Changes, Driver, Recorder, widen
from .magnitudes import Watch
from .model import Stream, take_stream
from .parts import replace_at, tensors_of
from .reduced import Dropped

CHAIN_TOKENS, CHAIN_ERROR = 12, 1e-3
FFN_NAME = re.compile(r"mlp|ffn|feed_forward|moe|experts")
# Parts of a block that turn a stream into another and are no sub-layers of their own.
HELPERS = {
    "laurel": "gemma3n's low-rank path beside an attention",
    "altup": "gemma3n's mixing of its streams",
    "per_layer_input_gate": "gemma3n's and gemma4's embeddings by layer",
    "router": "what chooses experts",
}


@dataclass(frozen=True)
class Sublayers:
    """What a block calls its sub-layers.

    Attributes:
        parts: the names of the block's modules, by "attention" and "ffn".
        obstacles: why one of these cannot go, by the same names.
    """

    parts: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    obstacles: Mapping[str, str] = field(default_factory=dict)


class StockNetwork(Driver):
    """A network that mlx-lm builds, whose layers are read when they run and let go after.

    Args:
        build: builds it with lazy weights, anew at each call.
        dtype: of the numbers that it computes with; None: as they are stored. Packed matrices stay.
        resident: keep the layers instead, for many passes.
    """

    def __init__(
        self,
        build: Callable[[], nn.Module],
        dtype: mx.Dtype | None = None,
        *,
        resident: bool = False,
    ):
        self._build, self._dtype = build, dtype
        self._unread: dict[int, nn.Module] = {}
        super().__init__(self._cast(build()), resident=resident)

    def _cast(self, model: nn.Module) -> nn.Module:
        if self._dtype is not None:
            model.set_dtype(self._dtype)
        return model

    def load_layer(self, layer: int) -> nn.Module:
        """Read a layer's tensors; they go when the layer that is returned goes."""
        if layer not in self._unread:
            self._unread = dict(enumerate(self._cast(self._build()).layers))
        return self._unread.pop(layer)

    @property
    def vocabulary(self) -> int:
        """How many logits there are."""
        return self._trial[0]

    @property
    def context(self) -> int | None:
        """How many tokens in a row the model was made for; None where nothing says so."""
        return getattr(self.model, "context", None)

    @property
    def sublayers(self) -> list[Sublayers]:
        """What each layer's block calls its sub-layers."""
        return self._trial[1]

    @cached_property
    def is_chain(self) -> bool:  # type: ignore[override]
        """Whether the layers, run one by one, make the network; tried on a few tokens."""
        tokens = mx.arange(CHAIN_TOKENS)[None] * 7 % self.vocabulary
        try:
            h: Stream = self.embed(tokens)
            for layer, block in self.walk():
                h = self.run(layer, h, tokens, block)
                mx.eval(h)
            by_layers = Driver.logits(self, h)
        except (AttributeError, TypeError, ValueError):  # they need more than that
            return False
        whole = self._run_whole(tokens)
        return bool(mx.abs(by_layers - whole).max() <= CHAIN_ERROR * mx.abs(whole).max())

    def hidden(
        self, tokens: mx.array, caches: list[Any] | None = None, watch: Watch | None = None
    ) -> mx.array:
        """Return what the last layer gives; of what is no chain, the logits."""
        if self.is_chain:
            return super().hidden(tokens, caches, watch)
        return self._run_whole(tokens, caches)

    def logits(self, h: Stream, changes: Changes | None = None) -> mx.array:
        """Return float32 logits (batch, length, vocabulary) of what ``hidden`` gave."""
        return super().logits(h, changes) if self.is_chain else take_stream(h)

    def _run_whole(self, tokens: mx.array, caches: list[Any] | None = None) -> mx.array:
        """Return float32 logits (batch, length, vocabulary) by the model's own forward."""
        widen(self.model)

        def visit(layer: int, *args: Any, **options: Any) -> Any:
            block: Any = self.layer(layer)
            return block(*args, **options)

        caches = make_prompt_cache(self.model) if caches is None else caches
        logits = self._forward(visit, tokens, cache=caches).astype(mx.float32)
        mx.eval(logits)
        return logits

    def drop(self, dropped: Mapping[str, Collection[int]]) -> "StockNetwork":
        """Return the network without some layers' "attention" or "ffn"."""

        def build() -> nn.Module:
            model: Any = self._build()
            for kind, layers in dropped.items():
                for layer in layers:
                    for name in self.sublayers[layer].parts[kind]:
                        setattr(model.layers[layer], name, Dropped(model.layers[layer][name]))
            return model

        return StockNetwork(build, self._dtype, resident=self.resident)

    @cached_property
    def _trial(self) -> tuple[int, list[Sublayers]]:
        """What a forward meets; nothing is computed and no weight is read."""
        spied = [_Spied(block) for block in self._own]

        def visit(layer: int, x: mx.array, *args: Any, **options: Any) -> Any:
            return spied[layer].run(x, *args, **options)

        cache = make_prompt_cache(self.model)
        logits = self._forward(visit, mx.zeros((1, 2), mx.int32), cache=cache)
        uses = Counter(cache for one in spied for cache in one.caches)
        return logits.shape[-1], [one.judge(uses) for one in spied]

    def without(self, layer: int, block: nn.Module, kinds: Collection[str]) -> nn.Module:
        """Return a block without its attention, its FFN or both; the weights are shared."""
        for kind in kinds:
            for name in self.sublayers[layer].parts.get(kind, ()):
                block = replace_at(block, name, Dropped(block[name]))
        return block

    def can_drop(self, layer: int, kind: str) -> bool:
        """Whether a layer can lose its "attention", its "ffn" or as a "block" both."""
        kinds = ("attention", "ffn") if kind == "block" else (kind,)
        return not any(one in self.sublayers[layer].obstacles for one in kinds)

    def count_weights(self, layer: int, kind: str) -> int:
        """Count what is stored of a layer's "attention" or "ffn", in bytes."""
        block = self._own[layer]
        parts = self.sublayers[layer].parts.get(kind, ())
        return sum(a.nbytes for name in parts for a in tensors_of(block[name]).values())


class WholeNetwork(Driver):
    """A network that is no chain of layers, run as one layer: it takes tokens and gives logits.

    Args:
        model: with its weights.
    """

    is_chain = False

    def __init__(self, model: nn.Module):
        self.model, self.resident, self.paths = widen(model), True, [""]

    def layer(self, layer: int) -> nn.Module:
        """Return the model."""
        return self.model

    def embed(self, tokens: mx.array, changes: Changes | None = None) -> mx.array:
        """Return the tokens."""
        return tokens

    def run(
        self, layer: int, h: Stream, tokens: mx.array, module: nn.Module | None = None
    ) -> Stream:
        """Return float32 logits (batch, length, vocabulary) of tokens (batch, length)."""
        running: Any = self.model if module is None else module
        logits: mx.array = running(tokens, cache=make_prompt_cache(self.model))
        return logits.astype(mx.float32)

    def logits(self, h: Stream, changes: Changes | None = None) -> mx.array:
        """Return what ``run`` gave."""
        return take_stream(h)

    @property
    def vocabulary(self) -> int:
        """How many logits there are."""
        return take_stream(self.run(0, mx.zeros(1), mx.zeros((1, 1), mx.int32))).shape[-1]


class _Spy(Recorder):
    """A module that keeps its latest input and output, and the caches that it was given."""

    def __call__(self, x: Any, *others: Any, **options: Any) -> Any:
        given = [one for one in (*others, *options.values()) if _is_cache(one)]
        self.__dict__["caches"] = given
        return super().__call__(x, *others, **options)


class _Spied:
    """A block whose parts with matrices are spied on."""

    def __init__(self, block: nn.Module):
        self._spies: dict[str, _Spy] = {}
        self._block: Any = block
        for name, part in block.children().items():
            if isinstance(part, nn.Module) and _holds_matrices(part) and name not in HELPERS:
                self._spies[name] = _Spy(part)
                self._block = replace_at(self._block, name, self._spies[name])

    def run(self, *args: Any, **options: Any) -> Any:
        """Run the block."""
        return self._block(*args, **options)

    @property
    def caches(self) -> set[int]:
        """The identities of the caches that the block's parts were given."""
        called = (spy for spy in self._spies.values() if "y" in spy)
        return {id(cache) for spy in called for cache in spy.__dict__["caches"]}

    def judge(self, uses: Mapping[int, int]) -> Sublayers:
        """Tell the sub-layers; ``uses`` counts the blocks that were given each cache."""
        parts: dict[str, tuple[str, ...]] = {}
        obstacles: dict[str, str] = {}
        for name, spy in self._spies.items():
            if "y" not in spy:
                continue
            caches = spy.__dict__["caches"]
            kind = "attention" if caches and not FFN_NAME.search(name) else "ffn"
            parts[kind] = (*parts.get(kind, ()), name)
            if not (isinstance(spy.y, mx.array) and spy.y.shape == spy.x.shape):
                obstacles[kind] = f"its {name} hands on more than its output"
            elif any(uses[id(cache)] > 1 for cache in caches):
                obstacles[kind] = f"layers share what its {name} keeps"
        for kind in ("attention", "ffn"):
            if kind not in parts:
                obstacles[kind] = f"its block calls no module that is its {kind}"
        return Sublayers(parts, obstacles)


def _is_cache(given: Any) -> bool:
    return any(hasattr(given, name) for name in ("update_and_fetch", "advance", "caches"))


def _holds_matrices(module: nn.Module) -> bool:
    """Whether a module has modules of its own and among their tensors matrices."""
    return bool(module.children()) and any(a.ndim > 1 for a in tensors_of(module).values())
