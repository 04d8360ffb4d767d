"""Measures how much a network minds a change: a rounded matrix, a removal, lost sub-layers.

Everything is measured where it matters, at the logits: KL(source || source with one change), in
nats per token. All changed copies of the stream go through the layers together, so that each layer
is read once. Only what a copy changes differs from the source's float32.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_map

from ..network.driver import (
    HELD_OUT,
    Driver,
    StreamedNetwork,
    Streams,
    find_ends,
    is_held_out,
    split_batches,
)
from ..network.metrics import measure_kl
from ..network.model import ModelArgs, Stream, take_stream
from ..network.names import EMBEDDING
from ..network.parts import Arrays, replace_at, tensors_of
from ..network.stock import StandIns, StockNetwork
from ..network.wiring import parse_layer
from ..progress import Steps, tell_part
from ..removal.merger import Merger
from ..removal.moments import Moments
from ..removal.plan import RemovalCost
from .calibration import CalibratedParts
from .coverage import find_widest
from .ends import round_rows, round_tied
from .formats import Format
from .layout import Layout
from .roles import Called, find_readers, is_expert

STREAMS_BYTES = 1 << 30  # of all changed copies together
MEASURED_TOKENS = 1024  # at most
CHOOSING_TOKENS = 512  # at most, that bits and sub-layers are chosen on: more choose no better
WEIGHING = 2  # times as much text as is measured on weighs errors there, at least
TRIAL_TOKENS = 8  # for each input of the widest matrix: as many tokens calibrate a trial
FormatOf = Callable[[str], Format | None]
DROP, REPLACE = "drop", "replace"
Choice = Mapping[tuple[str, int], str]  # DROP or REPLACE, by "attention" or "ffn" and layer


@dataclass(frozen=True)
class Trial:
    """A removal to measure, alone.

    Attributes:
        where: module path of the matrix that goes.
        around: module paths of the matrices that the removal's inverse mixes.
        merger: makes the tensors of the network without the matrix.
        layout: how these tensors lie on disk.
    """

    where: str
    around: tuple[str, ...]
    merger: Merger
    layout: Layout

    def layers(self) -> tuple[int, int]:
        """Return the first and the last layer that it changes; the embedding counts as -1."""
        found = [-1 if m == EMBEDDING else parse_layer(m) for m in (*self.around, self.where)]
        return min(found), max(found)


@dataclass(frozen=True)
class _Around(Layout):
    """A layout in which all but some matrices are dense."""

    only: Collection[str] = ()

    def format_of(self, path: str) -> Format | None:
        return super().format_of(path) if path in self.only else None


def measure_removals(
    network: StreamedNetwork,
    trials: Sequence[Trial],
    format_of: FormatOf,
    tokens: mx.array,
    progress: Steps = lambda done, total: None,
) -> dict[str, RemovalCost]:
    """Measure what each removal costs, by the matrix that goes.

    Args:
        network: the one that the removals start from, in float32.
        trials: the removals; none may reach the head.
        format_of: how a matrix of the network is packed.
        tokens: (sequences, length) of text; most calibrate, the rest measures.
        progress: called with (steps done, all).
    """
    tokens = _thin(tokens, network.args)
    batches = split_batches(tokens)
    rows = mx.concatenate([t for i, t in enumerate(batches) if is_held_out(i)])
    rows = limit_tokens(rows, 2 * len(trials), network.args)
    joined: dict[int, dict[str, Stream]] = {}

    def try_those_of(start: int, streams: Sequence[Stream]) -> None:
        for trial in trials:
            first, last = trial.layers()
            if first == start:
                held = _try_removal(network, trial, streams, tokens)
                joined.setdefault(last, {})[trial.where] = _join(held, rows.shape[0])

    try_those_of(-1, ())
    source = Streams(network, batches, ("source",))
    end = max((trial.layers()[0] for trial in trials), default=-1)
    for layer, block in network.walk(tell_part(progress, 0, 2)):
        if layer > end:
            break
        try_those_of(layer, source["source"])
        source.advance(layer, block)
    del source
    rounded = {f"rounded {t.where}": (*t.around, t.where) for t in trials}
    comparison = _Comparison(network, rows, rounded, format_of)
    kl = comparison.run(joined, tell_part(progress, 1, 2))
    return {t.where: RemovalCost(kl[t.where], kl[f"rounded {t.where}"]) for t in trials}


def measure_rounding(
    network: Driver,
    matrices: Iterable[str],
    format_of: FormatOf,
    tokens: mx.array,
    progress: Steps = lambda done, total: None,
) -> dict[str, float]:
    """Measure the KL of a network whose matrices are rounded with error feedback, one at a time.

    That weighs errors by other parts of the text than the KL is measured on. Experts, and matrices
    around the layers, are rounded to nearest, but for an embedding that is the head too. So is all
    where the text is short.

    Args:
        network: the one to compare with, in float32, with dense matrices.
        matrices: module paths.
        format_of: how a matrix of the network is packed.
        tokens: (sequences, length) of text, of which as much is used as memory is meant for.
        progress: called with (layers and rows of logits done, all).

    Returns:
        Nats per token by module path. Those of a chain that are outside its layers and neither make
        its stream nor read it are left out: what they cost cannot be seen there.
    """
    alone = {where: (where,) for where in matrices}
    rows = tokens[: max(1, CHOOSING_TOKENS // tokens.shape[1])]
    if isinstance(network, StreamedNetwork):
        rows = limit_tokens(rows, len(alone), network.args)
    elif network.is_chain:
        rows = _limit(rows, len(alone), network.embed(tokens[:1, :1]).shape[-1])
    else:  # every copy's logits are held
        rows = _limit(rows, len(alone), network.vocabulary)
    comparison = _Comparison(network, rows, alone, format_of)
    comparison.round_tied(split_batches(tokens))
    others = tokens[len(rows) :]
    enough = network.is_chain and len(others) >= WEIGHING * len(rows)
    found = comparison.run({}, progress, split_batches(others) if enough else ())
    all_seen = isinstance(network, StreamedNetwork) or not network.is_chain
    inside = ("",) if all_seen else tuple(f"{path}." for path in network.paths)
    return {where: cost for where, cost in found.items() if cost or where.startswith(inside)}


def measure_distances(
    network: StockNetwork,
    tokens: mx.array,
    choices: Sequence[Choice],
    stand_ins: StandIns,
    progress: Steps = lambda done, total: None,
) -> list[float]:
    """Measure the KL of a network that has lost sub-layers from itself, for each choice of these.

    Args:
        network: the whole one, in float32.
        tokens: (sequences, length) of text, of which ``CHOOSING_TOKENS`` are used.
        choices: what happens to which sub-layers.
        stand_ins: for those that are replaced.
        progress: called with (steps done, all).

    Returns:
        Nats per token.
    """
    rows = tokens[: max(1, CHOOSING_TOKENS // tokens.shape[1])]
    if not network.is_chain:
        return [*_measure_wholes(network, rows, choices, progress)]
    width = network.embed(rows[:1, :1])
    most = max(1, STREAMS_BYTES // (4 * take_stream(width).shape[-1] * rows.size) - 2)
    found: list[float] = []
    parts = -(-len(choices) // most)
    for part in range(parts):
        some = choices[part * most : (part + 1) * most]
        found += _measure_together(network, rows, some, stand_ins, tell_part(progress, part, parts))
    return found


def _measure_together(
    network: StockNetwork,
    rows: mx.array,
    choices: Sequence[Choice],
    stand_ins: StandIns,
    progress: Steps,
) -> list[float]:
    """The KL of a chain of layers with each choice, in one pass."""
    streams = Streams(network, [rows], (None, *range(len(choices))))
    total = len(network.paths) + len(rows)
    for layer, block in network.walk(lambda done, _: progress(done, total)):
        here = {
            i: frozenset((kind, way) for (kind, at), way in choice.items() if at == layer)
            for i, choice in enumerate(choices)
        }

        def make(
            ways: frozenset[tuple[str, str]], layer: int = layer, block: nn.Module = block
        ) -> nn.Module:
            put = {(k, layer): stand_ins[k, layer] for k, way in ways if way == REPLACE}
            return network.replace(put).without(layer, block, {kind for kind, _ in ways})

        streams.advance(layer, block, {i: ways for i, ways in here.items() if ways}, make)
    distinct = {id(stream): take_stream(stream[0]) for stream in streams.values()}
    found = dict.fromkeys(distinct, 0.0)
    for row in range(len(rows)):
        wanted = network.logits(take_stream(streams[None][0])[row : row + 1])
        for key, h in distinct.items():
            found[key] += _measure_mean_kl(wanted, network.logits(h[row : row + 1])) / len(rows)
        progress(len(network.paths) + row + 1, total)
    return [found[id(streams[i])] for i in range(len(choices))]


def _measure_wholes(
    network: StockNetwork, rows: mx.array, choices: Sequence[Choice], progress: Steps
) -> Iterator[float]:
    """The KL of a network that is no chain of layers with each choice, each run as a whole."""
    wanted = network.hidden(rows)
    for done, choice in enumerate(choices):
        progress(done, len(choices))
        dropped: dict[str, list[int]] = {}
        for kind, layer in choice:
            dropped.setdefault(kind, []).append(layer)
        yield _measure_mean_kl(wanted, network.drop(dropped).hidden(rows))
    progress(len(choices), len(choices))


def _thin(tokens: mx.array, args: ModelArgs) -> mx.array:
    """Take sequences from all over a text, as many as a trial needs."""
    step = min(tokens.size // (TRIAL_TOKENS * find_widest(args)), tokens.shape[0] // HELD_OUT)
    return tokens[:: max(1, step)]  # enough sequences for a batch that judges


def limit_tokens(tokens: mx.array, copies: int, args: ModelArgs) -> mx.array:
    """Return a text's first sequences, as many as so many copies of their stream have room for."""
    heads = args.num_attention_heads * args.head_dim if args.head_skip else 0
    return _limit(tokens, copies, args.hidden_size + heads)


def _limit(tokens: mx.array, copies: int, width: int) -> mx.array:
    one = 4 * width * tokens.shape[1] * (copies + 2)
    return tokens[: max(1, min(STREAMS_BYTES // one, MEASURED_TOKENS // tokens.shape[1]))]


def _try_removal(
    network: StreamedNetwork, trial: Trial, streams: Sequence[Stream], tokens: mx.array
) -> list[Stream]:
    """The streams behind a trial's last layer, of the text that judges.

    ``streams`` are the source's before its first layer; empty where that is the embedding.
    """
    layout = trial.layout
    layout = _Around(layout.args, layout.dtype, layout.quantization, trial.around)
    parts = CalibratedParts(network, trial.merger, layout, tokens)
    first, last = trial.layers()
    if first < 0:
        parts.embedding()
    else:
        parts.enter(streams)
    for layer in range(max(first, 0), last + 1):
        parts.layer(layer, ends=layer == last)
    return [h for i, h in enumerate(parts.streams) if is_held_out(i)]


def _join(streams: Sequence[Stream], rows: int) -> Stream:
    """Join streams of several batches, and keep their first rows."""
    joined: Stream = tree_map(lambda *parts: mx.concatenate([*parts])[:rows], *streams)
    return joined


def _measure_mean_kl(wanted: mx.array, got: mx.array) -> float:
    """Mean KL of logits; on a CPU NumPy's exponentials are several times as fast as MLX's."""
    if mx.default_device().type == mx.gpu:
        return float(measure_kl(wanted, got).mean().item())  # type: ignore[arg-type]
    return float(measure_kl(np.asarray(wanted), np.asarray(got)).mean())


class _Comparison:
    """Compares a network with changed copies of itself on tokens (rows, length).

    Args:
        network: in float32, with dense matrices.
        tokens: (rows, length).
        rounded: some copies by name, and the matrices that are rounded to nearest in each.
        format_of: how a matrix is packed.
    """

    def __init__(
        self,
        network: Driver,
        tokens: mx.array,
        rounded: Mapping[str, Collection[str]],
        format_of: FormatOf,
    ):
        self._network, self._tokens = network, tokens
        self._rounded, self._format_of = rounded, format_of
        self._known: dict[str, mx.array] = {}  # rounded tensors by name

    def round_tied(self, batches: Sequence[mx.array]) -> None:
        """Round an embedding that is the head too by what is read there of a text."""
        before, behind = find_ends(self._network) if self._network.is_chain else (set(), set())
        for path in before & behind & self._rounded.keys():
            if (form := self._format_of(path)) is not None:
                packed = round_tied(self._network, path, batches, form)
                self._known[f"{path}.weight"] = form.dense(packed)

    def run(
        self,
        joined: Mapping[int, Mapping[str, Stream]],
        progress: Steps = lambda done, total: None,
        weighing: Sequence[mx.array] = (),
    ) -> dict[str, float]:
        """Measure the mean KL(network || changed copy), by the copy's name.

        Args:
            joined: more copies by the layer that they come out of, each what that layer gives.
            progress: called with (layers and rows of logits done, all).
            weighing: tokens that weigh the errors of layers' matrices, which are rounded with
                feedback then; none: to nearest.
        """
        weighed = _Weighing(self._network, weighing)
        rows = len(self._tokens)
        streams = Streams(self._network, [self._tokens], (None, *self._rounded))
        before, behind = find_ends(self._network)
        embedding = self._list_outside(before)
        for name in self._rounded:
            if new := self._round(name, embedding):
                streams[name] = [self._network.embed(self._tokens, new)]
        mx.eval(dict(streams))
        for layer, block in self._network.walk(lambda done, total: progress(done, total + rows)):
            prefix = f"{self._network.paths[layer]}.".removeprefix(".")
            there = {f"{prefix}{name}": array for name, array in tensors_of(block).items()}
            changed = {name: name for name in self._rounded if self._find(name, there)}
            grams = weighed.advance(
                layer, block, [path for name in changed for path in self._rounded[name]]
            )

            def make(
                name: str,
                block: nn.Module = block,
                there: Arrays = there,
                prefix: str = prefix,
                grams: Mapping[str, np.ndarray] = grams,
            ) -> nn.Module:
                for path, weight in self._round(name, there, grams).items():
                    block = replace_at(block, path.removeprefix(prefix), weight)
                return block

            streams.advance(layer, block, changed, make)
            streams.update({name: [h] for name, h in joined.get(layer, {}).items()})
        layers = len(self._network.paths)
        return self._compare(
            {name: take_stream(h) for name, (h,) in streams.items()},
            behind,
            lambda done, total: progress(layers + done, layers + total),
        )

    def _compare(
        self, streams: Mapping[Any, mx.array], behind: Collection[str], progress: Steps
    ) -> dict[str, float]:
        """Mean KL at the logits; None is the stream that nothing changes."""
        self._network.load_head()
        head = self._list_outside(behind)
        changes = {name: self._round(name, head) for name in self._rounded}
        found = {name: 0.0 for name in streams if name is not None}
        rows = len(self._tokens)
        for row in range(rows):
            wanted = self._network.logits(streams[None][row : row + 1])
            for name in found:
                h = streams[name][row : row + 1]
                got = self._network.logits(h, changes.get(name))
                found[name] += _measure_mean_kl(wanted, got) / rows
            progress(row + 1, rows)
        return found

    def _list_outside(self, modules: Collection[str]) -> Arrays:
        """The tensors of modules outside of the layers."""
        tensors = tensors_of(self._network.model)
        return {name: a for name, a in tensors.items() if name.rpartition(".")[0] in modules}

    def _find(self, name: str, tensors: Arrays) -> list[tuple[str, Format]]:
        """The tensors, of those given, that are rounded in a copy, and their formats."""
        found = ((f"{where}.weight", self._format_of(where)) for where in self._rounded[name])
        return [(name, form) for name, form in found if form is not None and name in tensors]

    def _round(
        self, name: str, tensors: Arrays, grams: Mapping[str, np.ndarray] | None = None
    ) -> dict[str, mx.array]:
        """The tensors, of those given, that a copy rounds, as float32."""
        found = {}
        for tensor, form in self._find(name, tensors):
            gram = (grams or {}).get(tensor)
            if tensor in self._known:
                found[tensor] = self._known[tensor]
            elif gram is None:
                found[tensor] = form.dense(form.nearest(tensors[tensor]))
            else:
                found[tensor] = form.dense(round_rows(tensors[tensor], gram, form))
        return found


class _Weighing:
    """A text's way through a network's layers that weighs errors in the matrices there.

    Args:
        network: in float32, with dense matrices.
        batches: the text's tokens; with none nothing is weighed.
    """

    def __init__(self, network: Driver, batches: Sequence[mx.array]):
        self._network, self._batches = network, batches
        self._streams: list[Stream] = [network.embed(tokens) for tokens in batches]
        mx.eval(self._streams)

    def advance(
        self, layer: int, block: nn.Module, matrices: Sequence[str]
    ) -> dict[str, np.ndarray]:
        """Pass a layer; return X^T X (in, in) by the name of the tensor that reads X.

        The matrices that a fit would leave out, and experts, are not weighed.
        """
        if not self._batches:
            return {}
        network, streams, batches = self._network, self._streams, self._batches
        prefix = f"{network.paths[layer]}."
        paths = [path.removeprefix(prefix) for path in matrices]
        readers = find_readers(network, layer, block, streams[0], batches[0], paths)
        modules: dict[str, Any] = dict(block.named_modules())
        groups = [group for group in readers.groups if not is_expert(modules[group[0]])]
        recorders = [Called(modules[group[0]]) for group in groups]
        for group, recorder in zip(groups, recorders, strict=True):
            block = replace_at(block, group[0], recorder)
        moments = [Moments() for _ in groups]
        for i, tokens in enumerate(batches):
            streams[i] = network.run(layer, streams[i], tokens, block)
            for found, recorder in zip(moments, recorders, strict=True):
                found.add(recorder.x, {})
            mx.eval(streams[i])
        grams = zip(groups, moments, strict=True)
        return {f"{prefix}{path}.weight": m.gram for group, m in grams for path in group}
