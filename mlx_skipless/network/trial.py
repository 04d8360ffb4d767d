"""Finds what the blocks of a network of mlx-lm's own call their attention and their FFN.

Nothing here knows an architecture. Each block is run once, without computing anything, and watched:
a sub-layer is a part of it that holds matrices and turns a stream (batch, length, hidden) into
another. If it is given more than that, such as a mask and a cache, it is an attention, or what
stands in the place of one, else an FFN.
"""

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_reduce

from .driver import Recorder
from .parts import replace_at, tensors_of
from .reduced import Dropped, Handed, StandIn

KINDS = ("attention", "ffn")
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
        inner_first = sorted(paths, key=lambda path: (-path.count("."), path))
        for path in inner_first:
            self._spies[path] = _Spy(find_part(self._block, path))
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


class Trial:
    """What forwards of a network meet; nothing is computed and no weight is read.

    Args:
        forward: runs the network's forward on any tokens with new caches; calls what it is given
            with each layer's number and what the layer is given, and returns the logits.
        blocks: the layers.

    Attributes:
        vocabulary: how many logits there are.
        sublayers: each layer's.
        extras: what a layer gives besides the stream, how many.
        sources: the layers of which later ones than the next use these; None if there are none.
    """

    def __init__(self, forward: Callable[[Callable[..., Any]], mx.array], blocks: list[nn.Module]):
        self._forward, self._blocks = forward, blocks
        self._met = met = [_Met(block) for block in blocks]
        logits = forward(lambda layer, *args, **options: met[layer].run(*args, **options))
        self.vocabulary = logits.shape[-1]
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
        self.sublayers = [*map(self._judge, met)]
        self.extras = len(met[0].more)
        used = (layer for layer, one in enumerate(met) if self._is_used(one.made, layer + 2))
        self.sources = frozenset(used) if self.extras else None
        if any(one.given for one in met):  # which may be what other layers keep
            self.sublayers = [*map(self._try_without, range(len(met)))]
        del self._met  # and with it all that the forward would have computed

    def _try_without(self, layer: int) -> Sublayers:
        """A layer's sub-layers, if forwards go on without them."""
        own, block = self.sublayers[layer], self._blocks[layer]
        why = "later layers need what it keeps or hands on"
        stay = {
            kind: own.obstacles.get(kind, why) for kind in KINDS
            if kind in own.obstacles or not self._runs_with(layer, drop_sublayer(block, own, kind))
        }  # fmt: skip
        return replace(own, obstacles=stay)

    def _runs_with(self, layer: int, block: Any) -> bool:
        def visit(at: int, *args: Any, **options: Any) -> Any:
            running: Any = block if at == layer else self._blocks[at]
            return running(*args, **options)

        try:
            self._forward(visit)
        except (AttributeError, TypeError, ValueError):
            return False
        return True

    def _is_used(self, made: set[int], start: int) -> bool:
        """Whether layers from one on are given any of these arrays."""
        return any(made & later.given for later in self._met[start:])

    def _judge(self, met: _Met) -> Sublayers:
        parts: dict[str, tuple[str, ...]] = {}
        obstacles: dict[str, str] = {}
        for path, spy in met.parts.items():
            kind = spy.tell_kind(path)
            parts[kind] = (*parts.get(kind, ()), path)
            if any(self._uses[id(cache)] > 1 for cache in spy.caches):
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


def drop_sublayer(
    block: nn.Module, own: Sublayers, kind: str, linear: nn.Linear | None = None
) -> nn.Module:
    """Return a block without its "attention" or "ffn"; ``linear`` stands in for it, if given."""
    for path in own.parts.get(kind, ()):
        inner, handed = find_part(block, path), own.handed.get(path, ())
        gone = Dropped(inner, handed) if linear is None else StandIn(inner, handed, linear)
        block = replace_at(block, path, gone)
    return block


def find_part(block: nn.Module, path: str) -> Any:
    """Return the module at a path of a block."""
    return dict(block.named_modules())[path]


def _holds_matrices(module: nn.Module) -> bool:
    """Whether a module has modules of its own and among their tensors matrices."""
    return bool(module.children()) and any(a.ndim > 1 for a in tensors_of(module).values())
