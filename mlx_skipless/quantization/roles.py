"""Finds out what the matrices of a layer do: which read the same array, which write the stream.

Nothing here knows an architecture: layers are run and watched.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, chain
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.switch_layers import SwitchLinear

from ..network.driver import Driver, Recorder
from ..network.model import Stream, take_stream
from ..network.parts import replace_at
from ..removal.moments import weigh_tokens

PROBED = 8  # tokens on which writers are looked for
TOLERANCE = 1e-2  # of a shift of the stream, by which a writer is known
FLOOR = 0.1  # of the gains' mean square: a gain near zero asks its channel for no more


@dataclass(frozen=True)
class Writer:
    """A matrix whose output is added to the stream, as it is or behind a norm.

    Attributes:
        scale: by which the output, or the norm's, is multiplied before.
        before: the layer's parts, by their paths, that run before the one with the matrix, or are
            that one.
        behind: those that run behind it.
        gains: of the RMS norm between, (width,), if there is one.
    """

    scale: float
    before: frozenset[str]
    behind: frozenset[str]
    gains: mx.array | None = None

    def aim(self, y: mx.array, stream: mx.array, wanted: mx.array) -> tuple[mx.array, mx.array]:
        """Find out what the matrix should give for the stream behind it to be another.

        Behind a norm, g y / |y| up to a constant, the stream changes with y as far as y turns. So
        a change c of the norm's output asks for c |y| / g, less its part along y.

        Args:
            y: what it gives now, (..., width).
            stream: what the stream is with that.
            wanted: what the stream should be.

        Returns:
            what it should give, and what an error of that counts for each token, (..., 1).
        """
        change, weights = (wanted - stream) / self.scale, weigh_tokens(wanted)
        if self.gains is None:
            return y + change, weights
        square = self.gains.square()
        inverse = weigh_tokens(y)  # of a root of a mean square
        change = change * self.gains / (square + FLOOR * square.mean()) / inverse
        along = (change * y).mean(-1, keepdims=True) * inverse.square()
        return y + change - along * y, weights * inverse

    def stop_behind(
        self, block: nn.Module, recorders: Mapping[str, Recorder], h: Stream
    ) -> nn.Module:
        """Return a layer that gives the stream as it is behind the matrix, and computes no more.

        Args:
            block: the layer.
            recorders: have what the children before gave for this stream.
            h: what enters the layer.
        """
        block = silence(block, self.behind, h)
        modules = dict(block.named_modules())
        for path in self.before:
            block = replace_at(block, path, Given(modules[path], recorders[path].y))
        return block


@dataclass(frozen=True)
class Readers:
    """The matrices of a layer that can be fitted.

    Attributes:
        groups: their paths in the layer, those together that read the same array.
        routed: the modules that give tokens to the experts among them.
        writers: those whose outputs are added to the stream, by their paths.
    """

    groups: Sequence[Sequence[str]]
    routed: frozenset[str] = frozenset()
    writers: Mapping[str, Writer] = field(default_factory=dict)

    @property
    def paths(self) -> list[str]:
        """All of the matrices' paths."""
        return [path for group in self.groups for path in group]


def find_readers(
    network: Driver, layer: int, block: nn.Module, h: Stream, tokens: mx.array, paths: Sequence[str]
) -> Readers:
    """Find out which matrices of a layer read the same array; nothing is computed.

    Those are left out that a forward never calls, or twice, or in a way of their own.

    Args:
        network: runs the layer.
        layer: its number.
        block: the layer, with dense matrices.
        h: what enters it.
        tokens: that the stream is of.
        paths: of the matrices in the layer.
    """
    modules = dict(block.named_modules())
    calls: list[tuple[str, Recorder]] = []
    parents = {path.rpartition(".")[0] for path in paths if is_expert(modules[path])}
    for path in sorted({*paths, *parents}, key=lambda path: -path.count(".")):
        inner = dict(block.named_modules())[path]
        block = replace_at(block, path, Called(inner, path, calls))
    network.run(layer, h, tokens, block)
    counts = Counter(path for path, _ in calls)
    once = {path: call for path, call in calls if counts[path] == 1}
    routed = {path for path in parents if path in once and once[path].indices is not None}
    groups: dict[int, list[str]] = {}  # the calls keep their arrays, whose numbers stay theirs
    for path, call in once.items():
        if path in paths and _is_plain(modules[path], call, path.rpartition(".")[0] in routed):
            if not is_expert(modules[path]) and call.x.size // call.x.shape[-1] % tokens.size:
                continue  # some tokens alone: which they are depends on a router that changes
            groups.setdefault(id(call.x), []).append(path)
    return Readers(tuple(groups.values()), frozenset(routed))


def find_writers(
    network: Driver, layer: int, block: nn.Module, h: Stream, tokens: mx.array, readers: Readers
) -> dict[str, Writer]:
    """Find out which matrices' outputs are added to the stream, times a number.

    What is added to such an output, the layer gives, if nothing behind it reads the stream: the
    layer's parts behind the matrix give nothing for the time. A part is the outermost module around
    a matrix that the layer calls. An RMS norm may stand between (Gemma 2, OLMo 2): then that holds
    of its output.

    Args:
        network: runs the layer.
        layer: its number.
        block: the layer, with dense matrices.
        h: what enters it; only plain streams are looked at.
        tokens: that the stream is of.
        readers: the matrices.
    """
    if not isinstance(h, mx.array) or not network.is_chain:
        return {}
    h, tokens = h[:1, :PROBED], tokens[:1, :PROBED]
    modules: dict[str, Any] = dict(block.named_modules())
    parts, outputs = _call_parts(network, layer, block, h, tokens, readers.paths)
    norms = _find_norms(network, layer, block, h, tokens, readers)
    names = [{parts[path] for path in group} for group in readers.groups]
    silent = {part for part, output in outputs.items() if _is_stream(output, h)}
    found = {}
    for at, group in enumerate(readers.groups):
        inner = modules[group[0]]
        if len(group) > 1 or is_expert(inner) or inner.weight.shape[0] != h.shape[-1]:
            continue
        before = frozenset(name for some in names[: at + 1] for name in some)
        behind = frozenset(name for some in names[at + 1 :] for name in some) - before
        if not behind <= silent:
            continue
        alone = silence(block, behind, h)
        last, gains = norms.get(group[0], (group[0], None))
        scale = _measure_scale(network, layer, alone, h, tokens, last)
        if scale is not None:
            found[group[0]] = Writer(scale, before, behind, gains)
    return found


def _measure_scale(
    network: Driver, layer: int, block: nn.Module, h: mx.array, tokens: mx.array, path: str
) -> float | None:
    """Find the number times which a module's output is added to the stream; None if it is not."""
    inner = dict(block.named_modules())[path]
    recorder = Called(inner)
    out = network.run(layer, h, tokens, replace_at(block, path, recorder))
    if not _is_stream(recorder.y, h):  # tokens flat, for instance
        return None
    # As large as the stream, beside which an output may be as small as its rounding errors.
    size = mx.abs(h).mean(-1, keepdims=True) + mx.abs(recorder.y).mean(-1, keepdims=True)
    shift = size * mx.random.normal(h.shape, key=mx.random.key(layer))
    moved = network.run(layer, h, tokens, replace_at(block, path, Given(inner, recorder.y + shift)))
    change, given = (np.array(a) for a in (take_stream(moved) - take_stream(out), shift))
    scale = float(np.vdot(change, given) / np.vdot(given, given))
    fits = np.abs(change - scale * given).max() < TOLERANCE * np.abs(scale * given).max()
    return scale if fits else None


def _find_norms(
    network: Driver, layer: int, block: nn.Module, h: mx.array, tokens: mx.array, readers: Readers
) -> dict[str, tuple[str, mx.array]]:
    """Find the RMS norms that read what a matrix gives: their paths and gains, by the matrix's."""
    modules = dict(block.named_modules())
    vectors = [p for p, m in modules.items() if m.get("weight", h).shape == h.shape[-1:]]
    matrices = [group[0] for group in readers.groups if len(group) == 1]
    recorders = {path: Called(modules[path]) for path in (*matrices, *vectors)}
    for path, recorder in recorders.items():
        block = replace_at(block, path, recorder)
    network.run(layer, h, tokens, block)
    givers = {id(recorders[path].y): path for path in matrices if "y" in recorders[path]}
    found = {}
    for path in vectors:
        if "y" not in (norm := recorders[path]) or (giver := givers.get(id(norm.x))) is None:
            continue
        gains = modules[path](mx.ones(h.shape[-1:]))
        expected = gains * norm.x * weigh_tokens(norm.x)
        error = mx.abs(norm.y - expected).max() / mx.abs(expected).max()
        if (error < TOLERANCE).item():
            found[giver] = path, gains
    return found


def _call_parts(
    network: Driver,
    layer: int,
    block: nn.Module,
    h: mx.array,
    tokens: mx.array,
    paths: Sequence[str],
) -> tuple[dict[str, str], dict[str, Any]]:
    """Run a layer, and find the outermost module around each matrix that it calls.

    Returns:
        these modules' paths, by the matrices', and what they gave.
    """
    names = {name for name, _ in block.named_modules()}
    around = {path: [*accumulate(path.split("."), "{}.{}".format)] for path in paths}
    recorders: dict[str, Called] = {}
    for part in sorted({*chain(*around.values())} & names, key=lambda part: -part.count(".")):
        recorders[part] = Called(dict(block.named_modules())[part])
        block = replace_at(block, part, recorders[part])
    network.run(layer, h, tokens, block)
    outputs = {part: recorder.y for part, recorder in recorders.items() if "y" in recorder}
    outermost = {path: next(p for p in some if p in outputs) for path, some in around.items()}
    return outermost, outputs


def silence(block: nn.Module, parts: frozenset[str], h: Stream) -> nn.Module:
    """Return a copy of a layer, some parts of which give zeros in the shape of the stream."""
    modules = dict(block.named_modules())
    for path in parts:
        block = replace_at(block, path, Given(modules[path], mx.zeros_like(take_stream(h))))
    return block


class Called(Recorder):
    """A module that keeps its latest input, output and whatever else it was called with.

    It appends each call to ``calls``, with its path.
    """

    def __init__(self, inner: Any, path: str = "", calls: list[Any] | None = None):
        super().__init__(inner)
        self.__dict__["path"], self.__dict__["calls"] = path, calls

    def __call__(self, *args: Any, **options: Any) -> Any:
        if not args:  # some architectures name all that they pass; what comes first is the input
            args = (options.pop(next(iter(options))),)
        x, *others = args
        self.__dict__["given"] = others, options
        y = super().__call__(x, *others, **options)
        if (calls := self.__dict__["calls"]) is not None:
            one = Called(None)
            one.x, one.y, one.__dict__["given"] = x, y, (others, options)
            calls.append((self.__dict__["path"], one))
        return y

    @property
    def has_cache(self) -> bool:
        """Whether it was called with a cache."""
        others, options = self.__dict__["given"]
        return any(hasattr(one, "state") for one in (*others, *options.values()))

    @property
    def indices(self) -> mx.array | None:
        """The experts that it was called with for its tokens, if there were any."""
        others, _ = self.__dict__["given"]
        first = others[0] if others else None
        integers = isinstance(first, mx.array) and mx.issubdtype(first.dtype, mx.integer)
        return first if integers else None


class Given(Recorder):
    """Stands in a module's place and gives what that gave."""

    def __init__(self, inner: nn.Module, value: Any):
        super().__init__(inner)
        self.y = value

    def __call__(self, *args: Any, **options: Any) -> Any:
        return self.y


class Routed(Recorder):
    """Calls experts with a choice of its own."""

    def __init__(self, inner: nn.Module, indices: mx.array):
        super().__init__(inner)
        self.__dict__["indices"] = indices

    def __call__(self, x: Any, indices: Any, *others: Any, **options: Any) -> Any:
        return self.inner(x, self.__dict__["indices"], *others, **options)


def _is_stream(value: Any, h: mx.array) -> bool:
    return isinstance(value, mx.array) and value.shape == h.shape


def is_expert(module: nn.Module) -> bool:
    """Whether a module is a matrix for each expert."""
    return isinstance(module, SwitchLinear)


def _is_plain(module: nn.Module, call: Recorder, routed: bool) -> bool:
    """Whether a call of a module was a product with its weight, plus its bias."""
    weight, y = module.get("weight"), call.y
    if not (isinstance(call.x, mx.array) and isinstance(y, mx.array) and weight is not None):
        return False
    fits = (y.shape[-1], call.x.shape[-1]) == weight.shape[-2:]
    if is_expert(module):
        return fits and routed and call.indices is not None and call.x.shape[-2] == 1
    return fits and isinstance(module, nn.Linear)
