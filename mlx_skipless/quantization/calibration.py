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
from dataclasses import replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..network.driver import (
    Driver,
    StreamedNetwork,
    is_held_out,
    load_block,
    split_batches,
)
from ..network.model import Model, Stream
from ..network.names import EMBEDDING, FINAL_NORM, HEAD, module_path
from ..network.parts import ChangedParts, Merged, Parts
from ..progress import Steps, tell_part
from ..removal.moments import Moments
from .ends import read_head, record, round_rows, weigh_entering, weigh_head, weigh_rows
from .fitting import fit_matrices
from .formats import Packed
from .layout import Layout
from .passage import OVERFLOWS, Passage, fit_layer
from .roles import find_readers, find_writers

NO_NORMS = (
    f"{OVERFLOWS}: the stream has no norms to hold it. --remove none and --remove p need no text"
)


class NearestParts(ChangedParts):
    """Dense tensors in a layout's formats, each weight rounded to nearest."""

    def __init__(self, dense: Parts, layout: Layout):
        super().__init__(dense, self._pack)
        self._layout = layout

    def _pack(self, tensors: Mapping[str, mx.array]) -> dict[str, mx.array]:
        out: dict[str, mx.array] = {}
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

    def embedding(self) -> dict[str, mx.array]:
        """Quantize the embedding, and let the text enter both networks."""
        out = dict(self._merger.embedding())
        name = f"{EMBEDDING}.weight"
        actual = out[name]
        if (form := self._layout.format_of(EMBEDDING)) is not None:
            gram = self._weigh_embedding(actual)
            packed = form.nearest(actual) if gram is None else round_rows(actual, gram, form)
            actual, out = form.dense(packed), _name_parts(EMBEDDING, packed)
        changed = {name: actual.astype(mx.float32)}
        self._wanted = [self._source.embed(tokens) for tokens in self._tokens]
        self.streams = [self._result.embed(tokens, changed) for tokens in self._tokens]
        mx.eval(self._wanted, self.streams)
        self._source.release()
        return out

    def layer(self, layer: int, *, ends: bool = False) -> dict[str, mx.array]:
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

    def head(self) -> dict[str, mx.array]:
        """Quantize the head, if the result has one of its own."""
        out = dict(self._merger.head())
        if self._layout.format_of(HEAD) is None:
            return out
        moments = Moments(), Moments()
        norm = {n: a.astype(mx.float32) for n, a in out.items() if n.startswith(FINAL_NORM)}
        own = EMBEDDING if self._source.args.tie_word_embeddings else HEAD
        for i, wanted in enumerate(self._wanted):
            y = record(self._source, own, wanted).y - out.get(f"{HEAD}.bias", 0)
            read = record(self._result, HEAD, self.streams[i], norm)
            moments[is_held_out(i)].add(read.x, {HEAD: y})
        form = self._layout.format_of(HEAD)
        assert form is not None
        packed = fit_matrices(*moments, {HEAD: out.pop(f"{HEAD}.weight")}, {HEAD: form})
        return out | _name_parts(HEAD, packed[HEAD])

    def _weigh_embedding(self, embedding: mx.array) -> np.ndarray | None:
        """Measure how much errors in the result's embedding matter, as a gram (hidden, hidden).

        None if nothing is known of them: a table of the first layer, or an embedding that is not
        the head, where more than the first block's matrices read the stream that it begins.
        """
        before, gram = self._source.args, None
        if self._layout.args.precomputed:
            return None
        if before.norm != "pre" and before.skip == "none":
            gram = weigh_entering(self._merger.layer(0), before, embedding, self._tokens)
        elif before.tie_word_embeddings:
            gram = weigh_rows(before.hidden_size)
        if before.tie_word_embeddings:
            writer = module_path(before.num_hidden_layers - 1, "down_proj")
            read = read_head(self._source, EMBEDDING, self._tokens)
            # In the result's basis, as what the last layer writes is.
            head = weigh_head([self._merger.rewrite(writer, x) for x in read])
            gram = head if gram is None else gram + head
        return gram

    def _enter(self, layer: int, result: nn.Module, forms: Mapping[str, Any]) -> Passage:
        """Begin the text's way through a layer."""
        source, tokens, streams = self._source, self._tokens, self.streams
        readers = find_readers(source, layer, result, streams[0], tokens[0], [*forms])
        if source.args.norm == "pre":  # both streams have the same basis
            writers = find_writers(source, layer, result, streams[0], tokens[0], readers)
            readers = replace(readers, writers=writers)
        return Passage(source, layer, tokens, self._wanted, streams, readers)


def _name_parts(where: str, packed: Packed) -> dict[str, mx.array]:
    return {f"{where}.{part}": array for part, array in packed.items()}
