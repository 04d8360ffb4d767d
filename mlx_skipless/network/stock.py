"""Networks of mlx-lm's own, of whatever architecture, read a layer at a time.

Nothing here knows an architecture. Most networks are chains: what a layer gives is all that the
next one needs of it. Those that are not, of layers that run twice for instance, run as a whole.

What is a sub-layer is found by running each block once,
without computing anything, and looking at what it calls: a part of it that holds matrices and turns
a stream (batch, length, hidden) into another. If it is given more than that, such as a mask and a
cache, it is an attention, or what stands in the place of one, else an FFN.
"""

import re
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_reduce
from mlx_lm.models.cache import make_prompt_cache

from .driver import Changes, Driver, Recorder, _Reached, widen
from .magnitudes import Watch
from .model import Stream, take_stream
from .parts import replace_at, tensors_of
from .reduced import Dropped, Handed, drop_part

KINDS = ("attention", "ffn")
CHAIN_TOKENS, CHAIN_ERROR = 12, 1e-3
FFN_NAME = re.compile(r"mlp|ffn|feed_forward|moe|experts")
# Parts of a block that turn a stream into another and are no sub-layers of their own.
HELPERS = {"laurel": "gemma3n's low-rank path beside an attention"}


@dataclass(frozen=True)
class Sublayers:
    """What a block calls its sub-layers.

    Attributes:
        parts: the paths of the block's modules, by "attention" and "ffn".
        obstacles: why one of these cannot go, by the same names.
        handed: what parts return beside their output: arguments, by the parts' paths.
    """

    parts: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    obstacles: Mapping[str, str] = field(default_factory=dict)
    handed: Mapping[str, Handed] = field(default_factory=dict)


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

    def run(
        self, layer: int, h: Stream, tokens: mx.array, module: nn.Module | None = None
    ) -> Stream:
        """Run one layer on a stream, with what the model's forward passes to it for the tokens.

        Where layers hand on more than the stream, a stream is its array and what they handed on, by
        their number.
        """
        if self._sources is None:
            return super().run(layer, h, tokens, module)
        running: Any = self.layer(layer) if module is None else module
        stream = take_stream(h)
        handed: dict[int, Any] = {} if isinstance(h, mx.array) else h[1]  # type: ignore[assignment]

        def visit(at: int, x: mx.array, *args: Any, **options: Any) -> Any:
            if at < layer:
                return (stream, *handed.get(at, handed[layer - 1]))
            raise _Reached(running(stream, *args, **options))

        out, *more = self._forward(visit, tokens)
        kept = {at: one for at, one in handed.items() if at in self._sources}
        return out, kept | {layer: more}  # type: ignore[return-value]

    @cached_property
    def is_chain(self) -> bool:  # type: ignore[override]
        """Whether the layers, run one by one, make the network; tried on a few tokens."""
        tokens = mx.arange(CHAIN_TOKENS)[None] * 7 % self.vocabulary
        try:
            h: Stream = self.embed(tokens)
            for layer, block in self.walk():
                h = self.run(layer, h, tokens, block)
                mx.eval(h)
            by_layers = self._finish(h)
        except (AttributeError, KeyError, TypeError, ValueError):  # they need more than that
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
        return self._finish(h, changes) if self.is_chain else take_stream(h)

    def _finish(self, h: Stream, changes: Changes | None = None) -> mx.array:
        if self._sources is None:
            return super().logits(h, changes)
        nothing = [None] * self._trial.extras
        return super().logits((take_stream(h), *nothing), changes)  # type: ignore[arg-type]

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

    @property
    def _sources(self) -> frozenset[int] | None:
        return self._trial.sources

    @property
    def vocabulary(self) -> int:
        """How many logits there are."""
        return self._trial.vocabulary

    @property
    def context(self) -> int | None:
        """How many tokens in a row the model was made for; None where nothing says so."""
        return getattr(self.model, "context", None)

    @property
    def sublayers(self) -> list[Sublayers]:
        """What each layer's block calls its sub-layers."""
        return self._trial.sublayers

    @cached_property
    def _trial(self) -> "_Trial":
        """What a forward meets; nothing is computed and no weight is read."""
        met = [_Met(block) for block in self._own]

        def visit(layer: int, *args: Any, **options: Any) -> Any:
            return met[layer].run(*args, **options)

        tokens = mx.zeros((1, 2), mx.int32)
        logits = self._forward(visit, tokens, cache=make_prompt_cache(self.model))
        return _Trial(logits.shape[-1], met)

    def without(self, layer: int, block: nn.Module, kinds: Collection[str]) -> nn.Module:
        """Return a block without its attention, its FFN or both; the weights are shared."""
        own = self.sublayers[layer]
        for kind in kinds:
            for path in own.parts.get(kind, ()):
                gone = Dropped(_find_part(block, path), own.handed.get(path, ()))
                block = replace_at(block, path, gone)
        return block

    def drop(self, dropped: Mapping[str, Collection[int]]) -> "StockNetwork":
        """Return the network without some layers' "attention" or "ffn"."""

        def build() -> nn.Module:
            model: Any = self._build()
            for kind, layers in dropped.items():
                for layer in layers:
                    own = self.sublayers[layer]
                    for path in own.parts[kind]:
                        drop_part(model.layers[layer], path, own.handed.get(path, ()))
            return model

        return StockNetwork(build, self._dtype, resident=self.resident)

    def can_drop(self, layer: int, kind: str) -> bool:
        """Whether a layer can lose its "attention", its "ffn" or as a "block" both."""
        kinds = KINDS if kind == "block" else (kind,)
        return not any(one in self.sublayers[layer].obstacles for one in kinds)

    def count_weights(self, layer: int, kind: str) -> int:
        """Count what is stored of a layer's "attention" or "ffn", in bytes."""
        paths = self.sublayers[layer].parts.get(kind, ())
        parts = [_find_part(self._own[layer], path) for path in paths]
        return sum(a.nbytes for part in parts for a in tensors_of(part).values())


class _Spy(Recorder):
    """A module that keeps what it was given last and what it gave."""

    def __call__(self, *args: Any, **options: Any) -> Any:
        stream, *others = (*args, *options.values())
        keys = [*range(len(args)), *options][1:]  # by position or name
        self.__dict__["others"] = dict(zip(keys, others, strict=True))
        self.x, self.y = stream, self.inner(*args, **options)
        return self.y

    @property
    def turns_stream(self) -> bool:
        """Whether it was called on a stream and gave another."""
        out = self.y[0] if isinstance(self.y, tuple) else self.y
        return isinstance(out, mx.array) and out.shape == self.x.shape

    @property
    def caches(self) -> list[Any]:
        """The caches that it was given."""
        return [given for given in self.__dict__["others"].values() if hasattr(given, "state")]

    def tell_kind(self, path: str) -> str:
        """Tell an attention by what it is given."""
        others = self.__dict__["others"].values()
        given = any(one is not None for one in others)
        return "attention" if given and not FFN_NAME.search(path) else "ffn"

    @property
    def more(self) -> Sequence[Any]:
        """What it gave beside its output."""
        return self.y[1:] if isinstance(self.y, tuple) else ()

    @property
    def handed(self) -> Handed:
        """Which of its arguments it gave beside its output, by position or name."""
        others = self.__dict__["others"].items()
        same = [[key for key, one in others if _is_same(one, given)] for given in self.more]
        return [next(iter(keys), None) for keys in same]

    @property
    def made(self) -> set[int]:
        """The identities of arrays that it made and gave beside its output."""
        return _arrays(self.more) - _arrays([*self.__dict__["others"].values()])


class _Met:
    """A block, and what a forward did with it."""

    def __init__(self, block: nn.Module):
        self.given: set[int] = set()
        self.made: set[int] = set()
        self.out: Any = None
        paths = [
            path
            for path, part in block.named_modules()
            if path and path.count(".") < 2 and path not in HELPERS and _holds_matrices(part)
        ]
        self._spies: dict[str, _Spy] = {}
        self._block: Any = block
        for path in sorted(
            paths, key=lambda path: (-path.count("."), path)
        ):  # the inner ones first
            self._spies[path] = _Spy(_find_part(self._block, path))
            self._block = replace_at(self._block, path, self._spies[path])

    def run(self, x: mx.array, *args: Any, **options: Any) -> Any:
        """Run the block."""
        self.given |= _arrays([*args, *options.values()])
        self.out = self._block(x, *args, **options)
        self.made = _arrays(self.more) - self.given
        return self.out

    @property
    def more(self) -> Sequence[Any]:
        """What it gave beside the stream."""
        return self.out[1:] if isinstance(self.out, tuple) else ()

    @cached_property
    def parts(self) -> dict[str, _Spy]:
        """The parts that are sub-layers, by path.

        If a part is not called, or gives more than its output, its own parts may be sub-layers.
        """
        called = {path: spy for path, spy in self._spies.items() if "y" in spy}
        found: dict[str, _Spy] = {}
        for name in self._block.children():
            inside = {path: spy for path, spy in called.items() if path.startswith(f"{name}.")}
            if name in called:
                inside = {path: spy for path, spy in inside.items() if spy.caches}
            if name not in called or (called[name].more and inside):
                found |= inside
            else:
                found[name] = called[name]
        return {path: spy for path, spy in found.items() if spy.turns_stream}


class _Trial:
    """What a forward met.

    Args:
        vocabulary: how many logits it gave.
        met: the layers.

    Attributes:
        sublayers: each layer's.
        extras: what a layer gives besides the stream, how many.
        sources: the layers of which later ones than the next use these; None if there are none.
    """

    def __init__(self, vocabulary: int, met: list[_Met]):
        self.vocabulary, self._met = vocabulary, met
        self._uses = Counter(
            cache
            for one in met
            for cache in {id(cache) for spy in one.parts.values() for cache in spy.caches}
        )
        self._handed: dict[str, list[Any]] = {}
        for path, spy in (item for one in met for item in one.parts.items() if item[1].more):
            known = self._handed.get(path) or [None] * len(spy.more)
            both = zip(known, spy.handed, strict=True)
            self._handed[path] = [a if b is None else b for a, b in both]
        self.sublayers = [self._judge(layer, one) for layer, one in enumerate(met)]
        self.extras = len(met[0].more)
        used = (layer for layer, one in enumerate(met) if self._is_used(one.made, layer + 2))
        self.sources = frozenset(used) if self.extras else None

    def _is_used(self, made: set[int], start: int) -> bool:
        """Whether layers from one on are given any of these arrays."""
        return any(made & later.given for later in self._met[start:])

    def _judge(self, layer: int, met: _Met) -> Sublayers:
        parts: dict[str, tuple[str, ...]] = {}
        obstacles: dict[str, str] = {}
        for path, spy in met.parts.items():
            kind = spy.tell_kind(path)
            parts[kind] = (*parts.get(kind, ()), path)
            if self._is_used(spy.made, layer + 1):
                obstacles[kind] = f"later layers use what its {path} makes"
            elif any(self._uses[id(cache)] > 1 for cache in spy.caches):
                obstacles[kind] = f"layers share what its {path} keeps"
            elif not all(map(_counts_tokens, spy.caches)):
                obstacles[kind] = f"its {path} keeps what only itself can write"
        for kind in KINDS:
            if kind not in parts:
                obstacles[kind] = f"its block calls no module that is its {kind}"
        handed = {path: more for path, more in self._handed.items() if path in met.parts}
        return Sublayers(parts, obstacles, handed)


def _counts_tokens(cache: Any) -> bool:
    return any(hasattr(cache, name) for name in ("update_and_fetch", "advance", "caches"))


def _arrays(tree: Any) -> set[int]:
    """The identities of the arrays of a tree."""
    leaves: list[Any] = tree_reduce(lambda found, leaf: [*found, leaf], tree, [])
    return {id(leaf) for leaf in leaves if isinstance(leaf, mx.array)}


def _is_same(one: Any, other: Any) -> bool:
    """Whether two trees hold the same arrays, and any."""
    return bool(_arrays(one)) and _arrays(one) == _arrays(other)


def _find_part(block: nn.Module, path: str) -> Any:
    return dict(block.named_modules())[path]


def _holds_matrices(module: nn.Module) -> bool:
    """Whether a module has modules of its own and among their tensors matrices."""
    return bool(module.children()) and any(a.ndim > 1 for a in tensors_of(module).values())
