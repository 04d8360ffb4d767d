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

from ..errors import UserError
from ..network.driver import (
    Driver,
    Recorder,
    StreamedNetwork,
    Streams,
    is_held_out,
    load_block,
    split_batches,
)
from ..network.model import Block, Model, Stream
from ..network.names import EMBEDDING, EXPERTS, FINAL_NORM, HEAD, module_path
from ..network.parts import ChangedParts, Merged, Parts, replace_at
from ..progress import Steps, tell_part
from .fitting import Moments, fit_weight, to_float64
from .formats import Packed
from .layout import Layout

# Matrices that read the same place, in the order in which a block runs them.
READERS = (
    ("q_proj", "k_proj", "v_proj"),
    ("o_proj",),
    ("router", "gate_proj", "up_proj"),
    ("down_proj",),
)
STEPS = len(READERS)  # that progress tells of for each part of a network
HEAD_TOKENS = 8  # for each number of the stream: as many tokens weigh a tied embedding
OVERFLOWS = (
    "activations overflow float32 at {} on the text to quantize against: the stream has no norms "
    "to hold it. --remove none and --remove p need no text"
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
        result = load_block(self._layout.args, layer, dense)
        groups = [[module_path(layer, name) for name in readers] for readers in READERS]
        groups = [[where for where in places if self._is_fitted(where, out)] for places in groups]
        places_to_fit = [where for places in groups for where in places]
        passage = _Passage(
            self._source, layer, self._tokens, self._wanted, self.streams, places_to_fit
        )
        for done, places in enumerate(groups):
            tell_part(self._progress, 1 + layer, 2 + len(self._source.paths))(done, STEPS)
            if not places:
                continue
            seen, judge = self._observe(passage, places, result, out)
            for where in places:
                packed, weight = self._fit(where, seen, judge, out.pop(f"{where}.weight"))
                out |= packed
                # What comes behind is fitted to what this matrix gives from now on.
                result = replace_at(result, f"{_shorten(where)}.weight", weight)
            passage.settle(result, places)
        experts = EXPERTS if self._layout.args.num_local_experts else ()
        for where in (module_path(layer, name) for name in experts):
            form = self._layout.format_of(where)
            if f"{where}.weight" in out and form is not None:
                nearest = form.nearest(out.pop(f"{where}.weight"))
                out |= _name_parts(where, nearest)
                result = replace_at(result, f"{_shorten(where)}.weight", form.dense(nearest))
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
        packed, _ = self._fit(HEAD, *moments, out.pop(f"{HEAD}.weight"))
        return out | packed

    def _is_fitted(self, where: str, tensors: Arrays) -> bool:
        """Whether a matrix is packed and one for all tokens, as experts are not."""
        return self._layout.format_of(where) is not None and tensors[f"{where}.weight"].ndim == 2

    def _observe(
        self, passage: "_Passage", places: Sequence[str], result: Block, merged: Arrays
    ) -> tuple[Moments, Moments]:
        """Run the text; collect what reaches the matrices at ``places`` and what they should give.

        The second moments are those of the batches that judge.
        """
        first = _shorten(places[0])  # they all read the same
        ffn = first.startswith("mlp.")
        moments = Moments(), Moments()
        passage.inputs = []
        for i, tokens in enumerate(self._tokens):
            block, reader = _record(passage.resume(result, i), first)
            attends = ffn and block.self_attn is not None and "self_attn" not in passage.given[i]
            if attends:
                block, attention = _record(block, "self_attn")
            self._source.run(passage.layer, self.streams[i], tokens, block)
            wanted = {where: passage.wanted[i].pop(where) for where in places}
            if attends:  # its matrices are final, and what it gives is needed again
                passage.given[i] = {"self_attn": attention.y}
            if ffn:  # so that the source's inner numbers can go, which are the widest
                mx.eval(self._wanted[i], passage.wanted[i])
            mx.eval(reader.x, wanted, passage.given[i])
            passage.inputs.append(reader.x)
            targets = {where: self._rewrite(where, y, merged) for where, y in wanted.items()}
            moments[is_held_out(i)].add(reader.x, targets)
        if not all(found.finite for found in moments):
            raise UserError(OVERFLOWS.format(places[0]))
        return moments

    def _fit(
        self, where: str, seen: Moments, judge: Moments, merged: mx.array
    ) -> tuple[Arrays, mx.array]:
        """Fit and round a matrix; return its packed parts by name, and what they stand for."""
        form = self._layout.format_of(where)
        assert form is not None
        weight = fit_weight(seen, judge, where, to_float64(merged).T, form)
        packed = form.with_feedback(weight.T, seen.gram + judge.gram)
        return _name_parts(where, packed), form.dense(packed)

    def _rewrite(self, where: str, y: mx.array, merged: Arrays) -> mx.array:
        """What a matrix writes in the source, as x @ weight should be in the result."""
        y = self._merger.rewrite(where, y)
        bias = merged.get(f"{where}.bias")
        return y if bias is None else y - bias


class _Passage:
    """A text's way through one layer while the layer's matrices become final, group by group.

    The source's layer runs once, and only as far as is asked for: MLX computes late. The result's
    runs as often as there are groups, each time from where it changed last.

    Args:
        source: the network of the layer.
        layer: its number.
        batches: the text's tokens.
        ahead: the source's streams, a batch each; they pass the layer at once, to be computed.
        streams: the result's streams; they pass it in ``advance``.
        places: module paths of the matrices to fit.

    Attributes:
        layer: see there.
        wanted: of each batch, what the source's matrices give, by module path.
        given: of each batch, what the result's final modules give, by path in the layer.
        inputs: of each batch, what the latest group reads in the result.
    """

    def __init__(
        self,
        source: StreamedNetwork,
        layer: int,
        batches: Sequence[mx.array],
        ahead: list[Stream],
        streams: list[Stream],
        places: Sequence[str],
    ):
        self._source, self._batches, self._ahead, self._streams = source, batches, ahead, streams
        self.layer = layer
        self.wanted: list[dict[str, mx.array]] = []
        self.given: list[dict[str, Any]] = [{} for _ in batches]
        self.inputs: list[mx.array] = []
        block: Any = source.layer(layer)
        recorders: dict[str, Recorder] = {}
        for where in places:
            block, recorders[where] = _record(block, _shorten(where))
        for i, tokens in enumerate(batches):
            ahead[i] = source.run(layer, ahead[i], tokens, block)
            self.wanted.append({where: found.y for where, found in recorders.items()})

    def advance(self, result: Block, ends: bool) -> None:
        """Let the result's streams pass the layer, all matrices of which are final.

        If the text's way ends here, only the streams of the batches that judge pass it.
        """
        for i, tokens in enumerate(self._batches):
            if ends and not is_held_out(i):
                continue
            block = self.resume(result, i)
            self._streams[i] = self._source.run(self.layer, self._streams[i], tokens, block)
            mx.eval(self._streams[i], [] if ends else self._ahead[i])
            self.given[i].clear()

    def settle(self, result: Block, places: Sequence[str]) -> None:
        """Take down that the matrices at ``places``, which were observed last, are final."""
        modules = dict(result.named_modules())
        for given, x in zip(self.given, self.inputs, strict=True):
            given |= {path: modules[path](x) for path in map(_shorten, places)}
        self.inputs = []

    def resume(self, result: Block, batch: int) -> Block:
        """Return a copy of a layer that does not compute again what is final."""
        modules = dict(result.named_modules())
        for path, value in self.given[batch].items():
            result = replace_at(result, path, _Given(modules[path], value))
        return result


class _Given(Recorder):
    """Stands in a module's place and gives what that gave."""

    def __init__(self, inner: nn.Module, value: Any):
        super().__init__(inner)
        self.y = value

    def __call__(self, *args: Any, **options: Any) -> Any:
        return self.y


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
    merged, readers = merger.layer(0), [*READERS[0]]
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


def _record(block: Block, path: str) -> tuple[Block, Recorder]:
    """Return a copy of a block that records what one of its matrices reads and gives."""
    recorder = Recorder(dict(block.named_modules())[path])
    return replace_at(block, path, recorder), recorder


def _name_parts(where: str, packed: Packed) -> Arrays:
    return {f"{where}.{part}": array for part, array in packed.items()}


def _shorten(where: str) -> str:
    """A module's path inside its layer."""
    return where.split(".", 3)[3]
