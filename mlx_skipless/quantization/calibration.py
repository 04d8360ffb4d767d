"""Quantizes a result against text, so that what a removal magnifies is made up for.

Rounding the stream in a removed matrix's basis adds noise that its neighbours' inverses magnify.
So the layers are gone through in order, with the text as the layers quantized so far bring it.
Each matrix is fitted again, by least squares, so that from these inputs it gives the outputs that
the source gives from its own. Then it is rounded with error feedback. Only the source's outputs are
asked for, so it does not matter that an inverse stands between the two. Experts, which see few of
the text's tokens each, are rounded to nearest.

Two streams of activations (tokens, hidden) lie in memory, and for one matrix at a time the second
moments of its inputs (in, in) and their products with its outputs (in, out).
"""

from collections.abc import Mapping, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..network.driver import (
    Driver,
    Recorder,
    StreamedNetwork,
    Streams,
    is_held_out,
    load_block,
    split_batches,
)
from ..network.model import Model, Stream
from ..network.names import EMBEDDING, FINAL_NORM, HEAD, module_path
from ..network.parts import ChangedParts, Merged, Parts
from ..progress import Steps, tell_part
from ..removal.moments import Moments, to_float64
from .formats import Packed
from .layout import Layout
from .passage import OVERFLOWS, Passage, find_readers, fit_layer, fit_matrix

HEAD_TOKENS = 8  # for each number of the stream: as many tokens weigh a tied embedding
NO_NORMS = (
    f"{OVERFLOWS}: the stream has no norms to hold it. --remove none and --remove p need no text"
)

Arrays = dict[str, mx.array]


class NearestParts(ChangedParts):
    """Dense tensors in a layout's formats, each weight rounded to nearest."""

    def __init__(self, dense: Parts, layout: Layout):
        super().__init__(dense, self._pack)
        self._layout = layout

    def _pack(self, tensors: Mapping[str, mx.array]) -> Arrays:
        out: Arrays = {}
        for name, array in tensors.items():
            where = name.removesuffix(".weight")
            form = self._layout.format_of(where)
            out |= {name: array} if form is None else _name_parts(where, form.nearest(array))
        mx.eval(out)
        return out


class CalibratedParts:
    """A result's tensors, quantized against text; to be asked for in the order of the stream.

    Args:
        source: the network that the removals start from, in float32.
        merger: makes the result's dense tensors.
        layout: how the result's tensors lie on disk.
        tokens: (sequences, length) of text.
        progress: called with (steps done, all), ``STEPS`` for each part: embedding, layers, head.
    """

    def __init__(
        self,
        source: StreamedNetwork,
        merger: Merged,
        layout: Layout,
        tokens: mx.array,
        progress: Steps = lambda done, total: None,
    ):
        self._source, self._merger, self._layout = source, merger, layout
        self._result = Driver(Model(layout.args))  # what it needs around its layers is passed to it
        self._tokens = split_batches(tokens)
        self._wanted: list[Stream] = []  # the source's streams
        self._progress = progress
        self.streams: list[Stream] = []
        """What the result's layers so far made of ``split_batches``'s batches, a stream each."""

    def enter(self, streams: Sequence[Stream]) -> None:
        """Begin behind some layers, with the source's streams in the source's basis."""
        self._wanted, self.streams = [*streams], [*streams]

    def embedding(self) -> Arrays:
        """Quantize the embedding, and let the text enter both networks."""
        out = dict(self._merger.embedding())
        name = f"{EMBEDDING}.weight"
        actual = out[name]
        if (form := self._layout.format_of(EMBEDDING)) is not None:
            gram = weigh_embedding(self._source, self._merger, self._layout, actual, self._tokens)
            packed = form.nearest(actual)
            if gram is not None:
                packed = form.with_feedback(np.array(actual.astype(mx.float32)), gram)
            actual, out = form.dense(packed), _name_parts(EMBEDDING, packed)
        changed = {name: actual.astype(mx.float32)}
        self._wanted = [self._source.embed(tokens) for tokens in self._tokens]
        self.streams = [self._result.embed(tokens, changed) for tokens in self._tokens]
        mx.eval(self._wanted, self.streams)
        self._source.release()
        return out

    def layer(self, layer: int, *, ends: bool = False) -> Arrays:
        """Quantize every tensor of a layer; to be called once for each, first to last.

        ``ends`` says that no other layer will be asked for: then only the streams of the batches
        that judge go through this one.
        """
        out = dict(self._merger.layer(layer))
        dense = {name: array.astype(mx.float32) for name, array in out.items()}
        prefix = f"{self._source.paths[layer]}."
        forms = {}
        for name, array in dense.items():
            where, _, kind = name.rpartition(".")
            form = self._layout.format_of(where)
            if kind != "weight" or form is None:
                continue
            if array.ndim == 2:
                forms[where.removeprefix(prefix)] = form
            else:  # experts see few of the text's tokens each
                nearest = form.nearest(out.pop(name))
                out |= _name_parts(where, nearest)
                dense[name] = form.dense(nearest)
        result: nn.Module = load_block(self._layout.args, layer, dense)
        passage = self._enter(layer, result, forms)
        packed, result = fit_layer(
            passage,
            result,
            forms,
            rewrite=lambda path, y: self._merger.rewrite(prefix + path, y),
            progress=tell_part(self._progress, 1 + layer, 2 + len(self._source.paths)),
            overflows=NO_NORMS,
        )
        for path, parts in packed.items():
            del out[f"{prefix}{path}.weight"]
            out |= _name_parts(prefix + path, parts)
        passage.advance(result, ends)
        return out

    def head(self) -> Arrays:
        """Quantize the head, if the result has one of its own."""
        out = dict(self._merger.head())
        if self._layout.format_of(HEAD) is None:
            return out
        moments = Moments(), Moments()
        norm = {n: a.astype(mx.float32) for n, a in out.items() if n.startswith(FINAL_NORM)}
        for i, wanted in enumerate(self._wanted):
            y = _record_head(self._source, wanted).y - out.get(f"{HEAD}.bias", 0)
            read = _record_head(self._result, self.streams[i], norm)
            moments[is_held_out(i)].add(read.x, {HEAD: y})
        form = self._layout.format_of(HEAD)
        assert form is not None
        packed = fit_matrix(*moments, HEAD, out.pop(f"{HEAD}.weight"), form)
        return out | _name_parts(HEAD, packed)

    def _enter(self, layer: int, result: nn.Module, forms: Mapping[str, Any]) -> Passage:
        """Begin the text's way through a layer."""
        source, tokens, streams = self._source, self._tokens, self.streams
        readers = find_readers(source, layer, result, streams[0], tokens[0], [*forms])
        return Passage(source, layer, tokens, self._wanted, streams, readers)


def weigh_embedding(
    source: StreamedNetwork,
    merger: Merged,
    layout: Layout,
    embedding: mx.array,
    batches: Sequence[mx.array],
) -> np.ndarray | None:
    """Measure how much errors in an embedding's row matter, as a gram (hidden, hidden).

    An error e costs e G e^T with G = sum of W W^T / |X W|^2 over the matrices W that read the first
    block's input X: what W makes of the error, relative to what it makes of the text. Where the
    head is tied, X^T X / |X|^2 of the streams X that the rows are multiplied with there is added.

    Args:
        source: the network that the removals start from.
        merger: makes the result's dense tensors.
        layout: the result's.
        embedding: the result's, (vocabulary, hidden).
        batches: the text's tokens.

    Returns:
        The gram; None where more than these reads the embedding, or it is a table.
    """
    before = source.args
    if before.norm == "pre" or before.skip != "none" or layout.args.precomputed:
        return None
    rows = to_float64(embedding[mx.concatenate([tokens.reshape(-1) for tokens in batches])])
    seen = rows.T @ rows
    gram = np.zeros_like(seen)
    merged, readers = merger.layer(0), ["q_proj", "k_proj", "v_proj"]
    if before.block == "parallel":
        readers += before.ffn_readers
    for name in readers:
        stored = merged.get(f"{module_path(0, name)}.weight")  # none: it is the identity
        weight = np.eye(len(seen))
        if stored is not None:  # experts' count as one, all outputs behind one another
            weight = to_float64(stored).reshape(-1, len(seen)).T
        # |X W|^2 = tr(W^T X^T X W)
        gram += weight @ weight.T / np.sum(weight * (seen @ weight))
    gram /= np.trace(gram)
    if before.tie_word_embeddings:
        last = _read_head(source, merger, batches)
        gram += last.T @ last / np.sum(last**2)
    return gram


def _read_head(source: StreamedNetwork, merger: Merged, batches: Sequence[mx.array]) -> np.ndarray:
    """What the source's head reads on the text, in the result's basis, (tokens, hidden)."""
    enough = HEAD_TOKENS * source.args.hidden_size
    batches = batches[: 1 + (enough - 1) // batches[0].size]
    streams = Streams(source, batches, (None,))
    for layer, block in source.walk():
        streams.advance(layer, block)
    writer = module_path(source.args.num_hidden_layers - 1, "down_proj")
    read = [merger.rewrite(writer, _record_head(source, h).x) for h in streams[None]]
    return np.concatenate([to_float64(h.reshape(-1, h.shape[-1])) for h in read])


def _record_head(
    network: Driver, h: Stream, changes: Mapping[str, mx.array] | None = None
) -> Recorder:
    """Run what is behind the layers on a stream; record what the head reads and gives."""
    path = EMBEDDING if network.model.args.tie_word_embeddings else HEAD
    recorder = Recorder(dict(network.model.named_modules())[path])
    network.logits(h, {**(changes or {}), path: recorder})
    return recorder


def _name_parts(where: str, packed: Packed) -> Arrays:
    return {f"{where}.{part}": array for part, array in packed.items()}
