"""Rounds the matrices around the layers: the embedding, which a tied head reads too.

A head multiplies what the last layer gives with every row of its matrix, so errors cost the less
the less of that lies in their direction. An embedding's rows enter the stream one at a time.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import mlx.core as mx
import numpy as np

from ..network.driver import Driver, Recorder, Streams
from ..network.model import ModelArgs, Stream, take_stream
from ..network.names import module_path
from ..network.wiring import LETTERS
from ..removal.moments import to_float64
from .formats import Format, Packed, solve_feedback

HEAD_TOKENS = 8  # for each number of the stream: as many tokens weigh a tied embedding
ENTERING = 0.1  # weight of an error that enters a residual stream; at the head it has 1
ROWS_BYTES = 1 << 28  # of rows, in float32, that are rounded at a time


def record(
    network: Driver, path: str, h: Stream, changes: Mapping[str, Any] | None = None
) -> Recorder:
    """Run what is behind the layers on a stream; record what a module there reads and gives.

    Args:
        network: the one to run.
        path: of the module; a tied embedding is recorded as the head that it is.
        h: what the last layer gives.
        changes: tensors or modules, by path, that stand in for the network's own.
    """
    recorder = Recorder(dict(network.model.named_modules())[path])
    network.logits(h, {**(changes or {}), path: recorder})
    return recorder


def read_head(network: Driver, path: str, batches: Sequence[mx.array]) -> list[mx.array]:
    """Return what a head reads on a text, (rows, length, hidden) each.

    Args:
        network: the one to run, all of it.
        path: of the head's module.
        batches: the text's tokens, of which as many are used as ``HEAD_TOKENS`` says.
    """
    width = take_stream(network.embed(batches[0][:1, :1])).shape[-1]
    batches = batches[: 1 + (HEAD_TOKENS * width - 1) // batches[0].size]
    streams = Streams(network, batches, (None,))
    for layer, block in network.walk():
        streams.advance(layer, block)
    read: list[mx.array] = [record(network, path, h).x for h in streams[None]]
    mx.eval(read)
    return read


def weigh_head(read: Sequence[mx.array]) -> np.ndarray:
    """Measure how much errors in a head's rows matter, as a gram (hidden, hidden) of trace 1.

    An error e of a row costs e G e^T with G = X^T X / |X|^2, where the head reads X.
    """
    gram, energy = np.zeros((1, 1)), np.float64(0)
    for x in read:
        rows = to_float64(x.reshape(-1, x.shape[-1]))
        gram, energy = gram + rows.T @ rows, energy + np.sum(rows**2)
    return gram / energy


def weigh_rows(hidden: int) -> np.ndarray:
    """Return how much errors in an embedding matter that enter a residual stream, as a gram.

    All directions count the same there: a norm and a layer's matrices read them, and the next
    layers once more. By how much, beside the head, was measured: docs/quantization.md.
    """
    return ENTERING / hidden * np.eye(hidden)


def weigh_entering(
    layer: Mapping[str, mx.array],
    args: ModelArgs,
    embedding: mx.array,
    batches: Sequence[mx.array],
) -> np.ndarray:
    """Measure how much errors in an embedding matter that only the first block reads.

    An error e costs e G e^T with G = sum of W W^T / |X W|^2 over the matrices W that read the
    block's input X: what W makes of the error, relative to what it makes of the text.

    Args:
        layer: the first layer's tensors, by name.
        args: of the network that the removals start from.
        embedding: (vocabulary, hidden).
        batches: the text's tokens.

    Returns:
        The gram (hidden, hidden), of trace 1.
    """
    rows = to_float64(embedding[mx.concatenate([tokens.reshape(-1) for tokens in batches])])
    seen = rows.T @ rows
    gram, readers = np.zeros_like(seen), [LETTERS[letter] for letter in args.stream_readers]
    if args.block == "parallel":
        readers += args.ffn_readers
    for name in readers:
        stored = layer.get(f"{module_path(0, name)}.weight")  # none: it is the identity
        weight = np.eye(len(seen))
        if stored is not None:  # experts' count as one, all outputs behind one another
            weight = to_float64(stored).reshape(-1, len(seen)).T
        # |X W|^2 = tr(W^T X^T X W)
        gram += weight @ weight.T / np.sum(weight * (seen @ weight))
    return gram / np.trace(gram)


def round_tied(network: Driver, path: str, batches: Sequence[mx.array], form: Format) -> Packed:
    """Round an embedding that begins a residual stream and is the head too.

    Args:
        network: the one to run, with dense matrices.
        path: of the embedding's module.
        batches: the tokens of a text.
        form: to round to.
    """
    gram = weigh_head(read_head(network, path, batches))
    weight = dict(network.model.named_modules())[path]["weight"]
    return round_rows(weight, gram + weigh_rows(len(gram)), form)


def round_rows(weight: mx.array, gram: np.ndarray, form: Format) -> Packed:
    """Round a matrix (out, in) with error feedback, some rows at a time.

    To nearest where the gram is not finite: activations overflow, and what fits layers says where.
    """
    if not np.isfinite(gram).all():
        return form.nearest(weight)
    rows = max(1, ROWS_BYTES // (4 * weight.shape[1]))
    parts, feedback = [], solve_feedback(gram)
    for start in range(0, weight.shape[0], rows):
        some = np.array(weight[start : start + rows].astype(mx.float32))
        parts.append(form.with_feedback(some, feedback))
    return {name: mx.concatenate([part[name] for part in parts]) for name in parts[0]}
