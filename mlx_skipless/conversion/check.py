"""Measures how far apart two networks are on the same text.

Both run a layer at a time, so that neither has to fit in memory.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import mlx.core as mx
import numpy as np

from ..architectures.family import Family
from ..architectures.tensors import arrange, find_places, restore_gains
from ..checkpoints.safetensors import SafetensorsStore
from ..errors import UserError
from ..network.driver import Driver, StreamedNetwork
from ..network.magnitudes import Magnitude, NotFinite, Watch
from ..network.metrics import measure_error, measure_kl, measure_nll
from ..network.model import ModelArgs
from ..network.names import EMBEDDING, FINAL_NORM, HEAD
from ..network.parts import Arrays, ChangedParts, Parts, tensors_of
from ..progress import Steps, tell_part
from ..removal.products import UNIT_ROUNDOFF, check_finite

HEAD_TOKENS = 128  # whose logits are in memory at a time
CERTAIN = 1e-5  # relative logit error of a float32 result that nobody asks about
CHAOS = 0.5  # relative logit error from which two networks could be any two
COARSER = 100  # times as large as rounding's errors may the errors of its weights seem
SOURCE_OVERFLOWS = (
    "the source itself overflows {} on the check's text, at {}: its stream has no norms to hold "
    "it; --no-verify converts it all the same"
)
COPY_OVERFLOWS = (
    "the source itself overflows {} on the check's text, at {}, and so does its copy: use --dtype "
    "bfloat16 or float32; --no-verify converts it all the same"
)
RESULT_OVERFLOWS = (
    "the result overflows {} on the check's text, at {}: use --dtype bfloat16 or float32"
)


class WrittenParts:
    """Reads the tensors of a folder that this package wrote; packed matrices stay packed."""

    def __init__(self, folder: Path, args: ModelArgs, family: Family):
        self._store, self._args = SafetensorsStore(folder), args
        self._places = find_places(family, self._store.shapes)
        self._gain_offset = family.gain_offset

    def _under(self, *prefixes: str) -> Arrays:
        starts = tuple(f"{prefix}." for prefix in prefixes)
        wanted = {n: place for n, place in self._places.items() if n.startswith(starts)}
        arrays = self._store.read({own for place in wanted.values() for own in place.names})
        found = {n: arrange(place, arrays, self._args) for n, place in wanted.items()}
        return restore_gains(found, self._gain_offset)

    def embedding(self) -> Arrays:
        """Read the embedding."""
        return self._under(EMBEDDING)

    def layer(self, layer: int) -> Arrays:
        """Read one layer."""
        return self._under(f"model.layers.{layer}")

    def head(self) -> Arrays:
        """Read the final norm and the head."""
        return self._under(FINAL_NORM, HEAD)


@dataclass(frozen=True)
class Verification:
    """How far a result is from its source on the same text.

    Attributes:
        max_rel_logit_error: the worst token's max|a - b| / max|a| over the vocabulary.
        kl: mean KL(source || result), nats per token.
        greedy_match: share of tokens where both prefer the same next token.
        perplexity: of the result, over each sequence's tokens but the first.
        source_perplexity: of the source, over the same tokens.
        tokens: how many were compared.
        text: where the text came from.
        magnitudes: the largest number that each layer of the result met.
        quantized_only: for a quantized result, what comes of its source if that is quantized in
            the same way, to nearest, without removals.
        kl_ratio: ``kl`` as a multiple of the one in ``quantized_only``.
        rounding_ratio: the error as a multiple of what weights rounded a hundred times as coarsely
            as float32's would make; above 1 it is more than rounding. None where that was not
            measured: the error is next to none, or the result is no exact one in float32.
    """

    max_rel_logit_error: float
    kl: float
    greedy_match: float
    perplexity: float
    source_perplexity: float
    tokens: int
    text: str
    magnitudes: tuple[Magnitude, ...] = ()
    quantized_only: "Verification | None" = None
    kl_ratio: float | None = None
    rounding_ratio: float | None = None

    def beside(self, quantized_only: "Verification") -> "Verification":
        """Add the figures of the source that is quantized alone."""
        ratio = self.kl / quantized_only.kl if quantized_only.kl > 0 else None
        return replace(self, quantized_only=quantized_only, kl_ratio=ratio)


class ShakenParts(ChangedParts):
    """A network's tensors with random errors.

    Args:
        parts: the tensors, in float32.
        size: of the errors, relative to each number.
    """

    def __init__(self, parts: Parts, size: float):
        super().__init__(parts, self._shake)
        self._size, self._key = size, mx.random.key(0)

    def _shake(self, tensors: Arrays) -> Arrays:
        return {name: array * (1 + self._draw(array)) for name, array in tensors.items()}

    def _draw(self, array: mx.array) -> mx.array:
        self._key, key = mx.random.split(self._key)
        return self._size * mx.random.normal(array.shape, key=key)


def measure_roundoff() -> float:
    """Measure the relative error of float32 products on MLX's default device.

    It is that of storing float32 or, where a GPU rounds what it multiplies (TF32), more.
    """
    a, b = np.random.default_rng(0).standard_normal((2, 256, 256)).astype(np.float32)
    exact = a.astype(np.float64) @ b.astype(np.float64)
    error = np.linalg.norm(np.array(mx.array(a) @ mx.array(b)) - exact) / np.linalg.norm(exact)
    return max(UNIT_ROUNDOFF[mx.float32], float(error))


def compare_with_rounding(
    source: Driver, args: ModelArgs, parts: Parts, tokens: mx.array
) -> float | None:
    """Compare the error of a float32 result with the error that rounding could make in it.

    What conditioning and the network itself make of rounding is measured: every number of the
    result gets an error ``COARSER`` times as large as rounding's.

    Args:
        source: the network that the result should be like.
        args: the result's network, as this package runs it.
        parts: the result's tensors.
        tokens: (batch, length).

    Returns:
        The result's worst relative logit error as a multiple of that; above 1 rounding does not
        explain it. None if such errors leave so little of the network that nothing can be said.
    """
    result = StreamedNetwork(args, parts)
    shaken = StreamedNetwork(args, ShakenParts(parts, COARSER * measure_roundoff()))
    try:
        error, explained = compare_networks(result, [source, shaken], tokens, "")
    except UserError:
        return None
    if explained.max_rel_logit_error > CHAOS:
        return None
    least = float(np.finfo(np.float64).tiny)
    return error.max_rel_logit_error / max(explained.max_rel_logit_error, least)


def compare_networks(
    source: Driver,
    results: Sequence[Driver],
    tokens: mx.array,
    text: str,
    progress: Steps = lambda done, total: None,
) -> list[Verification]:
    """Run networks on the same tokens, and compare each result with the source.

    Args:
        source: the network that the others should be like.
        results: the others.
        tokens: (batch, length).
        text: where the tokens came from.
        progress: called with (layers and rows of logits done, all).

    Raises:
        UserError: if a network overflows.
    """
    rows = np.array(tokens)
    layers = len(source.paths)

    def tell(network: int, done: int) -> None:
        tell_part(progress, network, 1 + len(results))(done, layers + len(rows))

    wanted = _run_layers(source, tokens, Watch(partial(tell, 0)), SOURCE_OVERFLOWS)
    outcomes = []
    for i, result in enumerate(results, start=1):
        watch = Watch(partial(tell, i))
        given = _run_layers(result, tokens, watch, RESULT_OVERFLOWS)
        pairs = zip(_list_logits(source, wanted), _list_logits(result, given), strict=True)
        outcome = compare_logits(_count(pairs, partial(tell, i), layers), rows, text)
        outcomes.append(replace(outcome, magnitudes=tuple(watch.layers)))
        tell(i, layers + len(rows))
    return outcomes


def _count(
    pairs: Iterable[tuple[np.ndarray, np.ndarray]], tell: Callable[[int], None], first: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    for done, pair in enumerate(pairs, start=first):
        tell(done)
        yield pair


def _run_layers(network: Driver, tokens: mx.array, watch: Watch, complaint: str) -> mx.array:
    try:
        return network.hidden(tokens, watch=watch)
    except NotFinite as error:
        if complaint == SOURCE_OVERFLOWS:
            for layer, block in network.walk():
                inside = tensors_of(block).items()
                check_finite({f"{network.paths[layer]}.{name}": array for name, array in inside})
            if error.first.dtype == "float16":
                complaint = COPY_OVERFLOWS
        raise UserError(complaint.format(error.first.dtype, error.first.where)) from error


def _list_logits(network: Driver, hidden: mx.array) -> Iterator[np.ndarray]:
    rows = max(1, HEAD_TOKENS // hidden.shape[1])
    for start in range(0, hidden.shape[0], rows):
        yield from np.array(network.logits(hidden[start : start + rows]))


@np.errstate(over="ignore")  # a perplexity may be infinite
def compare_logits(
    pairs: Iterable[tuple[np.ndarray, np.ndarray]], tokens: np.ndarray, text: str
) -> Verification:
    """Compare the logits of a source and a result.

    Args:
        pairs: for each row of tokens the source's logits (length, vocabulary) and the result's.
        tokens: (rows, length).
        text: where the tokens came from.

    Raises:
        UserError: if either overflows.
    """
    errors, divergences, matches, nll, source_nll = [], [], [], [], []
    for (a, b), row in zip(pairs, tokens, strict=True):
        forbidden = (np.isneginf(a) & np.isneginf(b)).all(0)  # tokens, as Phi-3-small has some
        forbidden &= not forbidden.all()  # all of them is no choice
        if not np.isfinite(a[:, ~forbidden]).all():
            raise UserError(SOURCE_OVERFLOWS.format("float32", "the head"))
        if not np.isfinite(b[:, ~forbidden]).all():
            raise UserError(RESULT_OVERFLOWS.format("its number type", "the head"))
        a, b = a.astype(np.float64), b.astype(np.float64)
        errors.append(measure_error(a[:, ~forbidden], b[:, ~forbidden]))
        divergences.append(measure_kl(a, b))
        matches.append(a.argmax(-1) == b.argmax(-1))
        source_nll.append(measure_nll(a[:-1], row[1:]))
        nll.append(measure_nll(b[:-1], row[1:]))
    return Verification(
        max_rel_logit_error=float(np.max(errors)),
        kl=float(np.mean(divergences)),
        greedy_match=float(np.mean(matches)),
        perplexity=float(np.exp(np.mean(nll))),
        source_perplexity=float(np.exp(np.mean(source_nll))),
        tokens=int(np.size(errors)),
        text=text,
    )
