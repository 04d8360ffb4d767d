"""What each sub-layer is worth on a text: importance, what its drop costs, and ever more drops."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import mlx.core as mx

from ..errors import UserError
from ..network.driver import Driver
from ..network.names import SUBLAYERS
from ..progress import Progress
from ..removal import sublayers
from ..text import corpus, samples
from .findings import Dropped

TEXT = (8, 256)  # sequences, tokens each
STREAMED_TEXT = (128, 16)  # where layers are read from disk for each sampled token
JUDGES = 2  # one sequence in so many measures the losses of all that could be dropped
OWN_TEXT = "sampled from the model"


@dataclass(frozen=True)
class TextChoice:
    """What to measure on: a text called ``name``, or text sampled from the model by ``seed``."""

    name: str
    content: Sequence[corpus.Document] | None
    seed: int


@dataclass(frozen=True)
class Measured:
    """What was measured of each layer and of ever more drops; None where it was not."""

    conditions: Sequence[dict[str, float] | None]
    importance: Sequence[dict[str, float | None] | None]
    costs: Sequence[dict[str, float] | None]
    drops: tuple[Dropped, ...] | None = None
    text: str | None = None


def measure_sublayers(
    network: Driver,
    tokens: mx.array,
    there: Mapping[str, Sequence[int]],
    judge: Callable[[int], mx.array],
    describe: Callable[[list[int], float], Dropped],
    progress: Progress,
) -> Measured:
    """Measure each sub-layer's importance, what its drop costs, and what ever more drops cost.

    Args:
        network: runs the layers.
        tokens: (sequences, length) of text.
        there: the layers that have an "attention", and an "ffn", that can go.
        judge: gives the tokens that losses are measured on, for so many copies of their stream.
        describe: describes the network without the attention of some layers, of that loss; these
            are ever more.
        progress: called with (stage, done, total).
    """
    found = sublayers.measure_importance(network, tokens, progress=partial(progress, "importance"))
    layers = range(len(network.paths))
    alone = [(n, part) for n in layers for part in SUBLAYERS if n in there[part]]
    order = sorted(there["attention"], key=lambda n: found["attention"][n])
    prefixes = [order[:count] for count in range(max(1, len(order)))]  # one keeps its attention
    variants: list[sublayers.Drops] = [{part: [n]} for n, part in alone]
    variants += [{"attention": prefix} for prefix in prefixes]
    tell = partial(progress, "losses")
    losses = sublayers.measure_losses(network, judge(len(variants)), variants, tell)
    curve = losses[len(alone) :]
    costs: list[dict[str, float]] = [{} for _ in layers]
    for (n, part), loss in zip(alone, losses, strict=False):
        costs[n][part] = loss - curve[0]
    blocks = [n for n in layers if network.can_drop(n, "block")]
    importance = [_select_layer({**there, "block": blocks}, found, n) for n in layers]
    drops = tuple(describe(*one) for one in zip(prefixes, curve, strict=True))
    return Measured([None for _ in layers], importance, costs, drops)


def take_rows(network: Driver, text: TextChoice, tokenizer: Any, progress: Progress) -> mx.array:
    """Take rows (sequences, length) of tokens to measure on: of the user's text, or sampled."""
    if text.content is not None:
        return _encode_rows(network.context, text.name, text.content, tokenizer)
    progress("sampling text", 0, 1)
    sequences, length = TEXT if network.resident else STREAMED_TEXT
    length = min(length, network.context or length)
    begin = None if tokenizer is None else tokenizer.bos_token_id
    tokens = samples.sample_text(network, sequences, length, seed=text.seed, start=begin)
    mx.eval(tokens)
    progress("sampling text", 1, 1)
    return tokens


def name_text(text: TextChoice) -> str:
    """Name what was measured on: the user's text, or the model's own."""
    return OWN_TEXT if text.content is None else text.name


def _encode_rows(
    longest: int | None, name: str, documents: Sequence[corpus.Document], tokenizer: Any
) -> mx.array:
    """Cut rows (sequences, length) of tokens from evenly spaced places of a user's text.

    Raises:
        UserError: without a tokenizer, or if the text is too short.
    """
    if tokenizer is None:
        raise UserError("--calibration needs a tokenizer and the source has none: drop it")
    text = corpus.join_documents(documents, tokenizer)
    sequences, length = TEXT
    step = len(text) // sequences
    size = min(step, samples.PIECE)
    pieces = [text[i * step : i * step + size] for i in range(sequences)]
    rows = [tokenizer.encode(piece, verbose=False) for piece in pieces]
    length = min(length, longest or length, *map(len, rows))
    if length < samples.SHORTEST:
        raise UserError(
            f"--calibration {name} has {length} tokens in an eighth of it; at least "
            f"{samples.SHORTEST} are needed: give more text"
        )
    return mx.array([row[:length] for row in rows])


def _select_layer(
    there: Mapping[str, Sequence[int]], importance: Mapping[str, Sequence[float]], layer: int
) -> dict[str, float | None]:
    """Select one layer's importance by kind, None for what it lacks or cannot lose."""
    gone = {kind for kind, layers in there.items() if layer not in layers}
    gone |= {"block"} if gone.issuperset(SUBLAYERS) else set()
    return {kind: None if kind in gone else values[layer] for kind, values in importance.items()}
