"""Two networks, the same text: how far apart they are.

Both are run a layer at a time, so that neither has to fit in memory.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten
from mlx_lm.models.base import create_attention_mask
from mlx_lm.utils import load_model

from ..architectures.family import Family
from ..architectures.tensors import arrange, find_places, restore_gains, to_source_module
from ..checkpoints.safetensors import SafetensorsStore
from ..errors import UserError
from ..network.driver import widen_experts
from ..network.magnitudes import Magnitude, NotFinite, Watch
from ..network.model import ModelArgs
from ..network.names import EMBEDDING, FINAL_NORM, HEAD

Arrays = Mapping[str, mx.array]
HEAD_TOKENS = 128  # whose logits are in memory at a time
SOURCE_OVERFLOWS = (
    "the source itself overflows {} on the check's text, at {}: its stream has no norms to hold "
    "it; --no-verify converts it all the same"
)
RESULT_OVERFLOWS = (
    "the result overflows {} on the check's text, at {}: use --dtype bfloat16 or float32"
)


class Network(Protocol):
    """A language model in two steps: tokens to the stream, the stream to logits."""

    def hidden(self, tokens: mx.array, *, watch: Watch) -> mx.array: ...
    def logits(self, hidden: mx.array) -> mx.array: ...


class StockNetwork:
    """A folder of one of mlx-lm's own architectures, in mlx-lm's own code; good for one pass.

    ``args`` says what mlx-lm does outside its layers, ``family`` what its modules are called.
    """

    def __init__(self, folder: Path, args: ModelArgs, family: Family):
        self._model: Any = load_model(folder, lazy=True)[0]
        self._args = args
        self._names = {
            ours: to_source_module(family, ours, args).rpartition(".")[2]
            for ours in (EMBEDDING, FINAL_NORM, HEAD)
        }

    def _module(self, ours: str) -> Any:
        name = self._names[ours]
        return getattr(self._model if hasattr(self._model, name) else self._model.model, name)

    def hidden(self, tokens: mx.array, *, watch: Watch) -> mx.array:
        """The stream before the final norm; each layer is let go once it has run."""
        h = self._args.scale_embedding(self._module(EMBEDDING)(tokens))
        layers = self._model.layers
        for i, layer in enumerate(layers):
            slides = getattr(layer, "use_sliding", False)  # most networks know no windows
            window = self._model.model.sliding_window if slides else None
            if self._args.num_local_experts:
                layer.load_weights([*widen_experts(dict(tree_flatten(layer.parameters()))).items()])
            mask = create_attention_mask(h, None, window_size=window)
            h = watch.run(f"model.layers.{i}", layer, h, mask, None)
            layers[i] = layer = None
        return h

    def logits(self, hidden: mx.array) -> mx.array:
        """float32 logits (batch, length, vocabulary)."""
        h = self._module(FINAL_NORM)(hidden)
        tied = self._args.tie_word_embeddings
        head = self._module(EMBEDDING).as_linear if tied else self._module(HEAD)
        return self._args.scale_logits(head(h)).astype(mx.float32)


class WrittenParts:
    """The parts of a folder of a family that this package wrote, packed matrices as they are."""

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
        return self._under(EMBEDDING)

    def layer(self, layer: int) -> Arrays:
        return self._under(f"model.layers.{layer}")

    def head(self) -> Arrays:
        return self._under(FINAL_NORM, HEAD)


@dataclass(frozen=True)
class Verification:
    """How far a result is from its source on the same text.

    Attributes:
        max_rel_logit_error: the worst token's max|a - b| / max|a| over the vocabulary.
        kl: mean KL(source || result), nats per token.
        greedy_match: share of tokens where both prefer the same next token.
        perplexity: of the result, over each sequence's tokens but the first.
        source_perplexity: likewise.
        tokens: how many were compared.
        text: where the text came from.
        magnitudes: the largest number that each layer of the result met.
        quantized_only: of a quantized result, the same for its source quantized in the same way,
            to nearest, without removals.
        kl_ratio: ``kl`` as a multiple of that of ``quantized_only``.
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

    def beside(self, quantized_only: "Verification") -> "Verification":
        """With the figures of the source quantized alone."""
        ratio = self.kl / quantized_only.kl if quantized_only.kl > 0 else None
        return replace(self, quantized_only=quantized_only, kl_ratio=ratio)


def compare_networks(
    source: Network, results: Sequence[Network], tokens: mx.array, text: str
) -> list[Verification]:
    """Run networks on tokens (batch, length), each ``result`` against the source.

    ``text`` says where the tokens came from.

    Raises:
        UserError: if a network overflows.
    """
    rows = np.array(tokens)
    wanted = _hidden(source, tokens, Watch(), SOURCE_OVERFLOWS)
    outcomes = []
    for result in results:
        watch = Watch()
        given = _hidden(result, tokens, watch, RESULT_OVERFLOWS)
        pairs = zip(_logits(source, wanted), _logits(result, given), strict=True)
        outcome = compare_logits(pairs, rows, text)
        outcomes.append(replace(outcome, magnitudes=tuple(watch.layers)))
    return outcomes


def _hidden(network: Network, tokens: mx.array, watch: Watch, complaint: str) -> mx.array:
    try:
        return network.hidden(tokens, watch=watch)
    except NotFinite as error:
        raise UserError(complaint.format(error.first.dtype, error.first.where)) from error


def _logits(network: Network, hidden: mx.array) -> Iterator[np.ndarray]:
    rows = max(1, HEAD_TOKENS // hidden.shape[1])
    for start in range(0, hidden.shape[0], rows):
        yield from np.array(network.logits(hidden[start : start + rows]))


@np.errstate(over="ignore")  # a perplexity may be infinite
def compare_logits(
    pairs: Iterable[tuple[np.ndarray, np.ndarray]], tokens: np.ndarray, text: str
) -> Verification:
    """Compare the logits (length, vocabulary) of source and result, a pair a row of tokens.

    Raises:
        UserError: if either overflows.
    """
    errors, divergences, matches, nll, source_nll = [], [], [], [], []
    for (a, b), row in zip(pairs, tokens, strict=True):
        if not np.isfinite(a).all():
            raise UserError(SOURCE_OVERFLOWS.format("float32", "the head"))
        if not np.isfinite(b).all():
            raise UserError(RESULT_OVERFLOWS.format("its number type", "the head"))
        a, b = a.astype(np.float64), b.astype(np.float64)
        largest = np.abs(a).max(-1)
        errors.append(np.abs(a - b).max(-1) / np.where(largest > 0, largest, 1))
        log_p, log_q = _log_softmax(a), _log_softmax(b)
        divergences.append((np.exp(log_p) * (log_p - log_q)).sum(-1))
        matches.append(a.argmax(-1) == b.argmax(-1))
        places = np.arange(len(row) - 1)
        source_nll.append(-log_p[places, row[1:]])
        nll.append(-log_q[places, row[1:]])
    return Verification(
        max_rel_logit_error=float(np.max(errors)),
        kl=float(np.mean(divergences)),
        greedy_match=float(np.mean(matches)),
        perplexity=float(np.exp(np.mean(nll))),
        source_perplexity=float(np.exp(np.mean(source_nll))),
        tokens=int(np.size(errors)),
        text=text,
    )


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
