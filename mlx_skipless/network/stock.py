"""Networks of mlx-lm's own, of whatever architecture, read a layer at a time.

Nothing here knows an architecture. What is a sub-layer is found by running each block once,
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

from .driver import Driver, Recorder
from .parts import replace_at, tensors_of
from .reduced import Dropped

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
    def _trial(self) -> tuple[int, list[Sublayers]]:
        """What a forward meets; nothing is computed and no weight is read."""
        spied: list[_Spied] = []

        def visit(layer: int, x: mx.array, *args: Any, **options: Any) -> Any:
            spied.append(_Spied(self._own[layer]))
            return spied[-1].run(x, *args, **options)

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

    def count_weights(self, layer: int, kind: str) -> int:
        """Count what is stored of a layer's "attention" or "ffn", in bytes."""
        block = self._own[layer]
        parts = self.sublayers[layer].parts.get(kind, ())
        return sum(a.nbytes for name in parts for a in tensors_of(block[name]).values())


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
        self._plain = True
        for name, part in block.children().items():
            if isinstance(part, nn.Module) and _holds_matrices(part) and name not in HELPERS:
                self._spies[name] = _Spy(part)
                self._block = replace_at(self._block, name, self._spies[name])

    def run(self, *args: Any, **options: Any) -> Any:
        """Run the block."""
        out = self._block(*args, **options)
        self._plain = isinstance(out, mx.array)
        return out

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
            if not self._plain:
                obstacles[kind] = "its block hands on more than the stream"
            elif kind not in parts:
                obstacles[kind] = f"its block calls no module that is its {kind}"
        return Sublayers(parts, obstacles)


def _is_cache(given: Any) -> bool:
    return any(hasattr(given, name) for name in ("update_and_fetch", "advance", "caches"))


def _holds_matrices(module: nn.Module) -> bool:
    """Whether a module has modules of its own and among their tensors matrices."""
    return bool(module.children()) and any(a.ndim > 1 for a in tensors_of(module).values())
