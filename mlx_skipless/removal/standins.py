"""Matrices that stand in for sub-layers, fitted to what these add to the stream.

A sub-layer reads a stream behind a norm and adds something to it. A matrix and a constant that read
the same and add the nearest thing keep part of what dropping it would lose, for a part of its
weights and none of its cache. They are fitted by ridge regressions to the stream of the whole
network. So a stand-in makes up for what those before it got wrong, too.

A token weighs one over the mean square of its stream behind the sub-layer, for the norms that read
the stream see an error in this proportion. Otherwise the few tokens whose stream is a thousand
times as large as that of others would be all that is fitted.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..errors import UserError
from ..network.driver import Recorder, is_held_out, split_batches
from ..network.model import Stream, take_stream
from ..network.parts import replace_at
from ..network.stock import StandIns, StockNetwork
from ..network.trial import KINDS, find_part
from ..progress import Steps, tell_part
from .moments import (
    SMALLEST,
    Moments,
    factor_ridged,
    pick_outputs,
    solve_factored,
    weigh_tokens,
)
from .sublayers import Drops, Step, Wish, choose_drops

ADDS = 1e-3  # by which a block's stream may differ from the sum of what its sub-layers give
OUTPUT = "y"
RIDGES = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1)  # tried, as shares of the inputs' mean square


@dataclass(frozen=True)
class Fit:
    """A stand-in for one sub-layer of a network that is whole but for that.

    Attributes:
        linear: the matrix, with a bias.
        error: mean square of what it gets wrong on text that it was not fitted to, as a share of
            the stream's.
    """

    linear: nn.Linear
    error: float


def choose_stand_ins(
    network: StockNetwork,
    tokens: mx.array,
    wishes: Sequence[Wish],
    *,
    greedy: bool,
    max_loss: float,
    spared: Drops,
    progress: Steps = lambda done, total: None,
) -> tuple[dict[str, list[int]], list[Step]]:
    """Choose the sub-layers that matrices stand in for, by the loss with each.

    Args:
        network: a chain of layers.
        tokens: (sequences, length) of text.
        wishes: how many "attention" and "ffn"; a count of None goes on until ``max_loss``.
        greedy: measure again after each one even where a count is given.
        max_loss: the share by which the loss, nats per token, may grow where no count is given.
        spared: sub-layers that must stay.
        progress: called with (done, total).

    Returns:
        The layers by part, and the steps of a greedy search.
    """
    wanted = {wish.kind for wish in wishes}
    layers = range(len(network.paths))
    free = {kind: {*layers} - {*spared.get(kind, ())} for kind in wanted}
    alone = fit_alone(network, tokens, free, tell_part(progress, 0, 2))
    errors = {kind: [0.0] * len(layers) for kind in KINDS}
    for (kind, layer), fit in alone.items():
        errors[kind][layer] = fit.error
    return choose_drops(
        network.replace({which: fit.linear for which, fit in alone.items()}),
        tokens,
        wishes,
        greedy=greedy,
        max_loss=max_loss,
        spared=spared,
        measure=lambda gone, progress: errors,
        progress=tell_part(progress, 1, 2),
    )


def fit_alone(
    network: StockNetwork,
    tokens: mx.array,
    layers: Drops,
    progress: Steps = lambda done, total: None,
) -> dict[tuple[str, int], Fit]:
    """Fit a stand-in for each of some sub-layers, as if it were the only one.

    Args:
        network: a chain of layers.
        tokens: (sequences, length) of text.
        layers: by "attention" and "ffn".
        progress: called with (layers done, all layers).
    """
    return _Fitting(network, network, tokens).run(layers, False, progress)


def fit_together(
    source: StockNetwork,
    network: StockNetwork,
    tokens: mx.array,
    layers: Drops,
    progress: Steps = lambda done, total: None,
) -> StandIns:
    """Fit the stand-ins of a result in the order of the stream, each behind the others.

    Args:
        source: the network that the result should be like.
        network: the result without its stand-ins; the source, if it has all other sub-layers.
        tokens: (sequences, length) of text.
        layers: by "attention" and "ffn".
        progress: called with (layers done, all layers).
    """
    fits = _Fitting(source, network, tokens).run(layers, True, progress)
    return {which: fit.linear for which, fit in fits.items()}


class _Fitting:
    """Fits stand-ins while a text passes through a network and its result side by side.

    Args:
        source: the network.
        result: the same without what is dropped.
        tokens: (sequences, length) of text.
    """

    def __init__(self, source: StockNetwork, result: StockNetwork, tokens: mx.array):
        self._source, self._result, self._batches = source, result, split_batches(tokens)

    def run(self, layers: Drops, together: bool, progress: Steps) -> dict[tuple[str, int], Fit]:
        """Fit all, each behind those before it or as if it were alone."""
        source, result, found = self._source, self._result, {}
        wanted: list[Stream] = [source.embed(batch) for batch in self._batches]
        streams = [*wanted]
        mx.eval(wanted)
        for layer, block in source.walk(progress):
            reduced = block if result is source else result.layer(layer)
            kinds = [kind for kind in KINDS if layer in layers.get(kind, ())]
            shares = self._find_shares(layer, block, kinds, wanted[0])
            for kind in kinds:
                fit = self._fit(layer, kind, (block, reduced), shares.get(kind), wanted, streams)
                found[kind, layer] = fit
                if together:
                    there = result.replace({(kind, layer): fit.linear})
                    reduced = there.without(layer, reduced, {kind})
            for i, batch in enumerate(self._batches):
                same = streams[i] is wanted[i] and reduced is block
                wanted[i] = source.run(layer, wanted[i], batch, block)
                mx.eval(wanted[i])
                streams[i] = wanted[i] if same else result.run(layer, streams[i], batch, reduced)
                mx.eval(streams[i])
        return found

    def _find_shares(
        self, layer: int, block: nn.Module, kinds: Collection[str], x: Stream
    ) -> dict[str, float]:
        """Find what each sub-layer's output is multiplied by when it is added to the stream.

        Those of which something else becomes, such as what a norm makes of them, are left out.
        """
        found = {}
        for kind in kinds:
            before, after, y, _ = _watch(self._source, layer, kind, block, x, self._batches[0])
            grown = after - before
            share = float((grown * y).sum() / mx.maximum(y.square().sum(), SMALLEST))
            off = float((grown - share * y).square().sum() / grown.square().sum())
            if share and off <= ADDS**2:
                found[kind] = share
        return found

    def _fit(
        self,
        layer: int,
        kind: str,
        blocks: tuple[nn.Module, nn.Module],
        share: float | None,
        wanted: Sequence[Stream],
        streams: Sequence[Stream],
    ) -> Fit:
        """Fit a stand-in for one sub-layer.

        Args:
            layer: its number.
            kind: of the sub-layer.
            blocks: the source's layer, and the result's, in which the sub-layer still is.
            share: what its output is multiplied by when it is added; None: more than that is done.
            wanted: the source's streams before the layer.
            streams: the result's.
        """
        moments = Moments(), Moments()
        block, reduced = blocks
        for i, batch in enumerate(self._batches):
            before, after, y, x = _watch(self._source, layer, kind, block, wanted[i], batch)
            if streams[i] is not wanted[i] or reduced is not block:
                now, _, _, x = _watch(self._result, layer, kind, reduced, streams[i], batch)
                if share is not None:  # so that it gives what the stream lacks by now, too
                    y = y + (before - now) / share
            weight = weigh_tokens(after)
            x = mx.concatenate([x, mx.ones_like(x[:, :1])], axis=-1) * weight
            moments[is_held_out(i)].add(x, {OUTPUT: y * weight})
        return _solve(*moments, scale=1.0 if share is None else share)


def _watch(
    network: StockNetwork, layer: int, kind: str, block: nn.Module, x: Stream, tokens: mx.array
) -> tuple[mx.array, mx.array, mx.array, mx.array]:
    """Run a block; return the stream before and behind a sub-layer, what that gave and read.

    All are (tokens, hidden), in float32.
    """
    (path,) = network.sublayers[layer].parts[kind]
    part = Recorder(find_part(block, path))
    watched = replace_at(block, path, part)
    if kind == "attention":
        alone = network.without(layer, watched, {"ffn"})
        before, after = x, network.run(layer, x, tokens, alone)
    else:
        before = network.run(layer, x, tokens, network.without(layer, block, {"ffn"}))
        after = network.run(layer, x, tokens, watched)
    given: Any = part.y
    four = (before, after, given[0] if isinstance(given, tuple) else given, part.x)
    flat = [take_stream(one).astype(mx.float32) for one in four]
    out = [one.reshape(-1, one.shape[-1]) for one in flat]
    mx.eval(out)
    return out[0], out[1], out[2], out[3]


def _solve(seen: Moments, judge: Moments, scale: float) -> Fit:
    """Fit a matrix and a bias: W = (X^T X + r I)^-1 X^T Y, with the r that errs least on ``judge``.

    Some of the outputs choose r. Then all text fits it.

    Raises:
        UserError: if the stream is no finite number.
    """
    if not (seen.finite and judge.finite):
        raise UserError("the source's stream overflows on this text: no matrix can stand in")
    width = seen.cross[OUTPUT].shape[1]

    def solve(moments: Moments, ridge: float, outputs: Any = slice(None)) -> np.ndarray | None:
        added = float(ridge * np.mean(np.diag(moments.gram))) or 1.0
        lower = factor_ridged(moments.gram, added)
        return None if lower is None else solve_factored(lower, moments.cross[OUTPUT][:, outputs])

    some = pick_outputs(width)
    tried = ((ridge, solve(seen, ridge, some)) for ridge in RIDGES)
    errors = {r: judge.error(OUTPUT, found, some) for r, found in tried if found is not None}
    ridge = min(errors, key=lambda one: errors[one])
    found = solve(seen, ridge)
    assert found is not None
    wrong = judge.error(OUTPUT, found) * judge.energy[OUTPUT].sum() / (judge.count * width)
    seen.absorb(judge)
    stronger = (solve(seen, one) for one in RIDGES if one >= ridge)
    weight = next(one for one in stronger if one is not None).astype(np.float32)
    linear = nn.Linear(width, width)
    linear.update({"weight": mx.array(weight[:-1].T), "bias": mx.array(weight[-1])})
    return Fit(linear, float(wrong * scale**2))
