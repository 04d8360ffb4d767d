"""How much a network minds: its matrices being rounded, one at a time, or a removal's inverse.

Everything is measured where it matters, at the logits: KL(source || source with one change), in
nats per token. All changed copies of the stream go through the layers together, so that each layer
is read once; only what a copy changes differs from the source's float32.
"""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from ..network.driver import apply_final_norm, fill_block, is_held_out, run_block, split_batches
from ..network.model import Block, ModelArgs
from ..network.names import EMBEDDING, HEAD
from ..network.parts import Parts
from ..network.wiring import parse_layer
from ..progress import Steps
from ..removal.merger import Merger
from ..removal.plan import RemovalCost
from .calibration import CalibratedParts
from .formats import Format
from .layout import Layout

STREAMS_BYTES = 1 << 30  # of all changed copies together
MEASURED_TOKENS = 2048  # at most
FormatOf = Callable[[str], Format | None]


@dataclass(frozen=True)
class Trial:
    """A removal to measure: of the matrix at ``where``, alone.

    ``merger`` makes the tensors without it, ``layout`` is theirs and ``around`` names the matrices
    that the removal's inverse mixes.
    """

    where: str
    around: tuple[str, ...]
    merger: Merger
    layout: Layout

    def layers(self) -> tuple[int, int]:
        """The first and last layer that it changes; the embedding counts as -1."""
        found = [-1 if m == EMBEDDING else parse_layer(m) for m in self.around]
        return min(found), max(found)


@dataclass(frozen=True)
class _Around(Layout):
    """A layout in which all but some matrices are dense."""

    only: Collection[str] = ()

    def format_of(self, path: str) -> Format | None:
        return super().format_of(path) if path in self.only else None


def measure_removals(
    before: ModelArgs,
    source: Parts,
    trials: Sequence[Trial],
    format_of: FormatOf,
    tokens: mx.array,
    progress: Steps = lambda done, total: None,
) -> dict[str, RemovalCost]:
    """What each removal costs, by the matrix that goes.

    Args:
        before: the network that the removals start from.
        source: its tensors, in float32.
        trials: the removals; none may reach the head.
        format_of: how a matrix of ``before`` is packed.
        tokens: (sequences, length) of text; most calibrate, the rest measures.
    """
    batches = split_batches(tokens)
    rows = mx.concatenate([t for i, t in enumerate(batches) if is_held_out(i)])
    rows = limit_tokens(rows, 2 * len(trials), before.hidden_size)
    starts: dict[int, list[Trial]] = {}
    for trial in trials:
        starts.setdefault(trial.layers()[0], []).append(trial)
    joined: dict[int, dict[str, mx.array]] = {}
    streams: list[mx.array] = []  # the source's, behind the layers so far
    for layer in range(-1, max(starts, default=-1) + 1):
        progress(layer + 1, before.num_hidden_layers)
        for trial in starts.get(layer, ()):
            held = mx.concatenate(_tried(before, source, trial, streams, tokens))
            joined.setdefault(trial.layers()[1], {})[trial.where] = held[: rows.shape[0]]
        if layer < 0:
            embedding = source.embedding()[f"{EMBEDDING}.weight"].astype(mx.float32)
            streams = [before.scale_embedding(embedding[t]) for t in batches]
        else:
            block = fill_block(Block(before, layer), source.layer(layer), f"model.layers.{layer}.")
            for i, h in enumerate(streams):
                streams[i] = run_block(before, block, h)
                mx.eval(streams[i])
    rounded = {f"rounded {t.where}": (*t.around, t.where) for t in trials}
    kl = _divergences(before, source, rows, rounded, format_of, joined)
    return {t.where: RemovalCost(kl[t.where], kl[f"rounded {t.where}"]) for t in trials}


def measure_rounding(
    before: ModelArgs,
    source: Parts,
    matrices: Iterable[str],
    format_of: FormatOf,
    tokens: mx.array,
    progress: Steps = lambda done, total: None,
) -> dict[str, float]:
    """KL of the source with one matrix rounded to nearest, by module path; see ``removal_costs``.

    Args:
        matrices: module paths.
        tokens: (sequences, length) of text, of which as much is used as memory is meant for.
    """
    alone = {where: (where,) for where in matrices}
    rows = limit_tokens(tokens, len(alone), before.hidden_size)
    return _divergences(before, source, rows, alone, format_of, {}, progress)


def limit_tokens(tokens: mx.array, copies: int, hidden: int) -> mx.array:
    """The first sequences of a text, as many as so many copies of their stream have room for."""
    one = 4 * hidden * tokens.shape[1] * (copies + 2)
    return tokens[: max(1, min(STREAMS_BYTES // one, MEASURED_TOKENS // tokens.shape[1]))]


def _tried(
    before: ModelArgs, source: Parts, trial: Trial, streams: Sequence[mx.array], tokens: mx.array
) -> list[mx.array]:
    """The streams behind a trial's last layer, of the text that judges.

    ``streams`` are the source's before its first layer, none where that is the embedding.
    """
    layout = trial.layout
    layout = _Around(layout.args, layout.dtype, layout.quantization, trial.around)
    parts = CalibratedParts(before, source, trial.merger, layout, tokens)
    first, last = trial.layers()
    if first < 0:
        parts.embedding()
    else:
        parts.enter(streams)
    for layer in range(max(first, 0), last + 1):
        parts.layer(layer)
    return [h for i, h in enumerate(parts.streams) if is_held_out(i)]


def _divergences(
    before: ModelArgs,
    source: Parts,
    tokens: mx.array,
    rounded: Mapping[str, Collection[str]],
    format_of: FormatOf,
    joined: Mapping[int, Mapping[str, mx.array]],
    progress: Steps = lambda done, total: None,
) -> dict[str, float]:
    """Mean KL(source || changed copy) over tokens (rows, length), by the copy's name.

    Args:
        rounded: for some copies, the matrices that are rounded to nearest in them.
        joined: other copies, as they come out of a layer, (rows, length, hidden).
    """

    def changed(tensors: Mapping[str, mx.array], names: Collection[str]) -> dict[str, mx.array]:
        """The tensors with matrices of these names rounded; empty if they have none of them."""
        found = {}
        for where in names:
            form, name = format_of(where), f"{where}.weight"
            if form is not None and name in tensors:
                found[name] = form.dense(form.nearest(tensors[name]))
        return found

    embedding = dict(source.embedding())
    exact = before.scale_embedding(embedding[f"{EMBEDDING}.weight"][tokens].astype(mx.float32))
    copies: dict[str, mx.array] = {}
    for name, names in rounded.items():
        if new := changed(embedding, names):
            copies[name] = before.scale_embedding(new[f"{EMBEDDING}.weight"][tokens])
    for layer in range(before.num_hidden_layers):
        progress(layer, before.num_hidden_layers)
        prefix, tensors = f"model.layers.{layer}.", dict(source.layer(layer))
        block = fill_block(Block(before, layer), tensors, prefix)
        for name, names in rounded.items():
            if new := changed(tensors, names):
                other = fill_block(Block(before, layer), tensors | new, prefix)
                copies[name] = run_block(before, other, copies.get(name, exact))
            elif name in copies:
                copies[name] = run_block(before, block, copies[name])
            if name in copies:
                mx.eval(copies[name])
        for name in copies.keys() - rounded.keys():
            copies[name] = run_block(before, block, copies[name])
            mx.eval(copies[name])
        exact = run_block(before, block, exact)
        mx.eval(exact)
        copies |= joined.get(layer, {})
    progress(before.num_hidden_layers, before.num_hidden_layers)

    tail = dict(source.head())
    where = EMBEDDING if before.tie_word_embeddings else HEAD
    if before.tie_word_embeddings:
        tail |= embedding
    exact_head = tail[f"{where}.weight"].astype(mx.float32)
    bias = tail.get(f"{HEAD}.bias", mx.zeros(1))

    def logits(h: mx.array, head: mx.array) -> mx.array:
        return before.scale_logits(apply_final_norm(before, h, tail) @ head.T + bias)

    names = [*rounded, *(copies.keys() - rounded.keys())]
    heads = {
        name: changed(tail, rounded.get(name, ())).get(f"{where}.weight", exact_head)
        for name in names
    }
    found = dict.fromkeys(names, 0.0)
    for row in range(exact.shape[0]):
        wanted = logits(exact[row], exact_head)
        for name in names:
            got = logits(copies.get(name, exact)[row], heads[name])
            found[name] += _kl(wanted, got) / exact.shape[0]
    return found


def _kl(a: mx.array, b: mx.array) -> float:
    """Mean KL(a || b) of logits (length, vocabulary).

    That is log E_a[exp(-d)] for d = a - b less its mean E_a[d]; as the sum of terms that are all
    positive, float32 is good for KL of 1e-8.
    """
    p = mx.softmax(a, axis=-1, precise=True)
    d = a - b
    d = d - (p * d).sum(-1, keepdims=True)
    kl: Any = mx.log1p((p * (d + mx.expm1(-d))).sum(-1)).mean().item()
    return float(kl)
