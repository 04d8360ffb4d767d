"""Quantizing a result against text, so that what a removal magnifies is made up for.

Rounding the stream in a removed matrix's basis adds noise that its neighbours' inverses magnify.
So the layers are gone through in order, with the text as the layers quantized so far bring it.
Each matrix is fitted again, by least squares, so that from these inputs it gives the outputs that
the source gives from its own, and is then rounded with error feedback. Only the source's outputs
are asked for, so it does not matter that an inverse stands between the two. Experts, which see few
of the text's tokens each, are rounded to nearest.

Two streams of activations (tokens, hidden) lie in memory, and for one matrix at a time the second
moments of its inputs (in, in) and their products with its outputs (in, out).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..errors import UserError
from ..network.driver import (
    BATCH_TOKENS,
    apply_final_norm,
    fill_block,
    is_held_out,
    run_block,
    split_batches,
)
from ..network.model import Block, ModelArgs
from ..network.names import EMBEDDING, EXPERTS, HEAD, module_path
from ..network.parts import Merged, Parts
from .formats import Format, Packed, plus_diagonal
from .layout import Layout

WIDE = 4096  # inputs whose second moments are kept in float64
JUDGED = 512  # outputs, spread over all, that choose the ridge
# Tried as the ridge, a share of the inputs' mean square.
RIDGES = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
# Matrices that read the same place, in the order in which a block runs them.
READERS = (
    ("q_proj", "k_proj", "v_proj"),
    ("o_proj",),
    ("router", "gate_proj", "up_proj"),
    ("down_proj",),
)

Arrays = dict[str, mx.array]


@dataclass
class Moments:
    """Of inputs X (tokens, in) and the outputs Y (tokens, out) that matrices shall give from them.

    ``gram`` is X^T X; ``cross`` X^T Y and ``energy`` |y|^2 of each output, by the matrix's name.
    """

    gram: np.ndarray = field(default_factory=lambda: np.zeros((1, 1), dtype=np.float32))
    cross: dict[str, np.ndarray] = field(default_factory=dict)
    energy: dict[str, np.ndarray] = field(default_factory=dict)

    def add(self, x: mx.array, targets: Mapping[str, mx.array]) -> None:
        """Take in inputs (batch, length, in) and outputs (batch, length, out)."""
        x = x.reshape(-1, x.shape[-1]).astype(mx.float32)
        # In float32 where float64 would take gigabytes; what comes of it is judged in any case.
        kind = np.float64 if x.shape[-1] <= WIDE else np.float32
        self.gram = self.gram + np.array(x.T @ x).astype(kind, copy=False)
        for name, y in targets.items():
            y = y.reshape(-1, y.shape[-1])
            self.cross[name] = self.cross.get(name, 0) + np.array(x.T @ y).astype(kind, copy=False)
            self.energy[name] = self.energy.get(name, 0) + _float64(y.square().sum(0))

    def error(self, name: str, weight: np.ndarray, outputs: Any = slice(None)) -> float:
        """|X W - Y|^2 / |Y|^2 for a weight (in, out), or those of its outputs alone."""
        weight = weight.astype(self.gram.dtype, copy=False)
        cross, energy = self.cross[name][:, outputs], self.energy[name][outputs].sum()
        spread = np.vdot(weight, self.gram @ weight) - 2 * np.vdot(weight, cross)
        return float(1 + spread / max(energy, np.finfo(np.float64).tiny))


def estimate_memory(args: ModelArgs) -> int:
    """About the most memory that calibrating takes, beside a layer's weights."""
    hidden, width = args.hidden_size, args.num_attention_heads * args.head_dim
    widest = max(hidden, args.intermediate_size, width)
    moments = 6 * widest**2 + 20 * widest * hidden  # with a solver's and a rounding's copies
    return moments * (8 if widest <= WIDE else 4) + 8 * 4 * BATCH_TOKENS * widest


def fit_weight(
    seen: Moments, judge: Moments, name: str, prior: np.ndarray, form: Format
) -> np.ndarray:
    """The weight (in, out) that gives the wanted outputs best once it is rounded.

    Of ridge regressions on ``seen``, with several ridges, towards zero and towards ``prior``
    (in, out), and ``prior`` as it is, that which on ``judge`` errs least when rounded to nearest.
    """
    gram, cross = seen.gram, seen.cross[name]
    size = np.mean(np.diag(gram))
    some = np.unique(np.linspace(0, prior.shape[1] - 1, JUDGED).astype(int))
    best, least = None, judge.error(name, _rounded(prior[:, some], form), some)
    for ridge in RIDGES if size else ():
        added = ridge * size
        towards = (added * prior[:, some]).astype(gram.dtype)
        both = np.linalg.solve(plus_diagonal(gram, added), np.hstack([cross[:, some], towards]))
        to_zero, share = np.hsplit(both, 2)
        for candidate, pull in ((to_zero, 0.0), (to_zero + share, added)):
            error = judge.error(name, _rounded(candidate, form), some)
            if error < least:
                best, least = (added, pull), error
    if best is None:
        return prior
    added, pull = best
    wanted = cross + (pull * prior).astype(gram.dtype)
    return np.linalg.solve(plus_diagonal(gram, added), wanted)


def _rounded(weight: np.ndarray, form: Format) -> np.ndarray:
    stored = mx.array(np.ascontiguousarray(weight.T, dtype=np.float32))
    return np.array(form.dense(form.nearest(stored))).T


class _Recorder(nn.Module):
    """A linear layer that keeps its latest inputs and outputs."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner

    def __call__(self, x: mx.array) -> mx.array:
        self.x = x
        self.y = self.inner(x)
        return self.y


class NearestParts:
    """Dense tensors in a layout's formats, each weight rounded to nearest."""

    def __init__(self, dense: Parts, layout: Layout):
        self._dense, self._layout = dense, layout

    def embedding(self) -> Arrays:
        return self._packed(self._dense.embedding())

    def layer(self, layer: int) -> Arrays:
        return self._packed(self._dense.layer(layer))

    def head(self) -> Arrays:
        return self._packed(self._dense.head())

    def _packed(self, tensors: Mapping[str, mx.array]) -> Arrays:
        out: Arrays = {}
        for name, array in tensors.items():
            where = name.removesuffix(".weight")
            form = self._layout.format_of(where)
            out |= {name: array} if form is None else _named(where, form.nearest(array))
        mx.eval(out)
        return out


class CalibratedParts:
    """A result's tensors, quantized against text; to be asked for in the order of the stream.

    Args:
        before: the network that the removals start from.
        source: its tensors, in float32.
        merger: makes the result's dense tensors.
        layout: how the result's tensors lie on disk.
        tokens: (sequences, length) of text.
    """

    def __init__(
        self,
        before: ModelArgs,
        source: Parts,
        merger: Merged,
        layout: Layout,
        tokens: mx.array,
    ):
        self._before, self._source = before, source
        self._merger, self._layout = merger, layout
        self._tokens = split_batches(tokens)
        self._wanted: list[mx.array] = []  # the source's stream, a batch each
        self._actual: list[mx.array] = []  # the result's

    @property
    def streams(self) -> list[mx.array]:
        """What the result's layers so far made of ``split``'s batches, (rows, length, hidden)."""
        return self._actual

    def enter(self, streams: Sequence[mx.array]) -> None:
        """Begin behind some layers, with the source's streams in the source's basis."""
        self._wanted, self._actual = [*streams], [*streams]

    def embedding(self) -> Arrays:
        name = f"{EMBEDDING}.weight"
        wanted = self._source.embedding()[name]
        out = dict(self._merger.embedding())
        actual = out[name]
        if (form := self._layout.format_of(EMBEDDING)) is not None:
            gram = self._embedding_gram(actual)
            packed = form.nearest(actual)
            if gram is not None:
                packed = form.with_feedback(np.array(actual.astype(mx.float32)), gram)
            actual, out = form.dense(packed), _named(EMBEDDING, packed)
        after = self._layout.args
        self._wanted = [self._before.scale_embedding(wanted[tokens]) for tokens in self._tokens]
        self._actual = [
            after.scale_embedding(actual[tokens].astype(mx.float32)) for tokens in self._tokens
        ]
        return out

    def _embedding_gram(self, embedding: mx.array) -> np.ndarray | None:
        """How much errors in an embedding's row matter (hidden, hidden).

        By what the first block's matrices make of them, relative to what they make of the text,
        and at a tied head by the streams that rows are multiplied with there. None where the
        embedding is read by more than these, or is a table.
        """
        if self._before.norm == "pre" or self._before.skip != "none":
            return None
        if self._layout.args.precomputed:
            return None
        rows = _float64(embedding[self._tokens_in_a_row()])
        seen = rows.T @ rows
        merged, readers = self._merger.layer(0), [*READERS[0]]
        if self._before.block == "parallel":
            readers += READERS[2]
        gram = np.zeros_like(seen)
        for name in readers:
            stored = merged.get(f"{module_path(0, name)}.weight")  # none: it is the identity
            weight = np.eye(len(seen)) if stored is None else _float64(stored).T
            gram += weight @ weight.T / np.sum(weight * (seen @ weight))
        gram /= np.trace(gram)
        if self._before.tie_word_embeddings:
            last = self._last_streams()
            gram += last.T @ last / np.sum(last**2)
        return gram

    def _tokens_in_a_row(self) -> mx.array:
        return mx.concatenate([tokens.reshape(-1) for tokens in self._tokens])

    def _last_streams(self) -> np.ndarray:
        """What the source's head reads on the text, in the result's basis, (tokens, hidden)."""
        rows = self._source.embedding()[f"{EMBEDDING}.weight"]
        streams = [self._before.scale_embedding(rows[t]) for t in self._tokens]
        for layer in range(self._before.num_hidden_layers):
            prefix = f"model.layers.{layer}."
            block = fill_block(Block(self._before, layer), self._source.layer(layer), prefix)
            streams = [run_block(self._before, block, h) for h in streams]
            mx.eval(streams)
        writer = module_path(self._before.num_hidden_layers - 1, "down_proj")
        head = self._source.head()
        streams = [
            self._merger.rewrite(writer, apply_final_norm(self._before, h, head)) for h in streams
        ]
        return np.concatenate([_float64(h.reshape(-1, h.shape[-1])) for h in streams])

    def layer(self, layer: int) -> Arrays:
        """Every tensor of a layer; call it once for each, first to last."""
        prefix = f"model.layers.{layer}."
        out = dict(self._merger.layer(layer))
        source = fill_block(Block(self._before, layer), self._source.layer(layer), prefix)
        result = fill_block(Block(self._layout.args, layer), out, prefix)
        for readers in READERS:
            places = [module_path(layer, name) for name in readers]
            places = [where for where in places if self._layout.format_of(where) is not None]
            places = [where for where in places if out[f"{where}.weight"].ndim == 2]
            if not places:
                continue
            seen, judge = self._observe(places, source, result, out)
            for where in places:
                packed, dense = self._fitted(where, seen, judge, out.pop(f"{where}.weight"))
                out |= packed
                _owner(result, where.removeprefix(prefix)).weight = dense
        experts = EXPERTS if self._before.num_local_experts else ()
        for where in (module_path(layer, name) for name in experts):
            form = self._layout.format_of(where)
            if f"{where}.weight" in out and form is not None:
                nearest = form.nearest(out.pop(f"{where}.weight"))
                out |= _named(where, nearest)
                _owner(result, where.removeprefix(prefix)).weight = form.dense(nearest)
        for block, stream in ((source, self._wanted), (result, self._actual)):
            for i, h in enumerate(stream):
                stream[i] = run_block(self._before, block, h)
                mx.eval(stream[i])
        return out

    def head(self) -> Arrays:
        out = dict(self._merger.head())
        if self._layout.format_of(HEAD) is None:
            return out
        source = dict(self._source.head())
        if self._before.tie_word_embeddings:
            source[f"{HEAD}.weight"] = self._source.embedding()[f"{EMBEDDING}.weight"]
        moments = Moments(), Moments()
        for i, (wanted, actual) in enumerate(zip(self._wanted, self._actual, strict=True)):
            y = apply_final_norm(self._before, wanted, source) @ source[f"{HEAD}.weight"].T
            y = y + source.get(f"{HEAD}.bias", 0) - out.get(f"{HEAD}.bias", 0)
            x = apply_final_norm(self._layout.args, actual, out)
            moments[is_held_out(i)].add(x, {HEAD: y})
        packed, _ = self._fitted(HEAD, *moments, out.pop(f"{HEAD}.weight"))
        return out | packed

    def _observe(
        self, places: Sequence[str], source: Block, result: Block, merged: Arrays
    ) -> tuple[Moments, Moments]:
        """What reaches the matrices at ``places`` and what they should make of it."""
        names = [where.split(".", 3)[3] for where in places]
        wanted = [_record(source, name) for name in names]
        reader = _record(result, names[0])
        moments = Moments(), Moments()
        for i, (exact, actual) in enumerate(zip(self._wanted, self._actual, strict=True)):
            run_block(self._before, source, exact)
            run_block(self._before, result, actual)
            targets = {
                where: self._in_new_basis(where, recorder.y, merged)
                for where, recorder in zip(places, wanted, strict=True)
            }
            moments[is_held_out(i)].add(reader.x, targets)
        for found in moments:
            if not all(np.isfinite(m).all() for m in (found.gram, *found.cross.values())):
                raise UserError(
                    f"activations overflow float32 at {places[0]} on the text to quantize against: "
                    "the stream has no norms to hold it. --remove none and --remove p need no text"
                )
        for block, name, recorder in (
            *((source, name, recorder) for name, recorder in zip(names, wanted, strict=True)),
            (result, names[0], reader),
        ):
            _replace(block, name, recorder.inner)
        return moments

    def _fitted(
        self, where: str, seen: Moments, judge: Moments, merged: mx.array
    ) -> tuple[Arrays, mx.array]:
        """A matrix fitted and rounded: its packed parts by name, and what they stand for."""
        form = self._layout.format_of(where)
        assert form is not None
        weight = fit_weight(seen, judge, where, _float64(merged).T, form)
        packed = form.with_feedback(weight.T, seen.gram + judge.gram)
        return _named(where, packed), form.dense(packed)

    def _in_new_basis(self, where: str, y: mx.array, merged: Arrays) -> mx.array:
        """What a matrix writes in the source, as x @ weight should be in the result."""
        y = self._merger.rewrite(where, y)
        bias = merged.get(f"{where}.bias")
        return y if bias is None else y - bias


def _named(where: str, packed: Packed) -> Arrays:
    return {f"{where}.{part}": array for part, array in packed.items()}


def _owner(block: Block, name: str) -> Any:
    """The linear layer at a path inside a block."""
    parent, _, last = name.rpartition(".")
    return getattr(getattr(block, parent), last)


def _replace(block: Block, name: str, module: nn.Module) -> None:
    parent, _, last = name.rpartition(".")
    setattr(getattr(block, parent), last, module)


def _record(block: Block, name: str) -> _Recorder:
    recorder = _Recorder(_owner(block, name))
    _replace(block, name, recorder)
    return recorder


def _float64(array: mx.array) -> np.ndarray:
    return np.array(array.astype(mx.float32)).astype(np.float64)
