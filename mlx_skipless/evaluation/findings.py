"""What ``analyze`` finds out about a model."""

import math
from dataclasses import asdict, dataclass
from typing import Any

from ..removal.table import FirstLayer

CONFIG_ALONE = "a config alone: nothing could be measured"
LARGEST_LOSS = 700.0  # whose perplexity a float holds


@dataclass(frozen=True)
class Removal:
    """What an exact removal would save, or why it is impossible.

    Attributes:
        letters: as ``--remove`` takes them.
        skipless: whether the skips would have to go first, and the model be trained again.
        weights: how many would go.
        share: their share of all weights.
        bytes: how many would go, of dense weights in the source's number type.
        bytes_per_token: how many fewer bytes decoding a token would read.
        speedup: weights before / after, the paper's speed-up at batch 1 (arXiv 2404.12362).
        reads: bytes read to decode a token, before / after; one row of an embedding is read.
        obstacle: why the removal is impossible; the figures are None then.
    """

    letters: str
    skipless: bool
    weights: int | None = None
    share: float | None = None
    bytes: int | None = None
    bytes_per_token: int | None = None
    speedup: float | None = None
    reads: float | None = None
    obstacle: str | None = None


@dataclass(frozen=True)
class Layer:
    """What one layer holds and what it is worth.

    Attributes:
        layer: its number, from 0.
        weights: how many are in its "attention" and in its "ffn".
        importance: 1 - cosine of its "attention", "ffn" and "block", None for what is gone
            already or cannot go; None for a model without skips and for a config without weights.
        drop_cost: how much the loss, in nats per token, rises without its "attention" or "ffn".
        condition: largest over smallest singular value of its Q, K, V and P, by letter; None where
            this package does not know the architecture, and for a config without weights.
    """

    layer: int
    weights: dict[str, int]
    importance: dict[str, float | None] | None
    drop_cost: dict[str, float] | None
    condition: dict[str, float] | None


@dataclass(frozen=True)
class Dropped:
    """A network without the attention of some layers.

    Attributes:
        layers: numbers of these layers, in the order in which their attentions go.
        loss: nats per token.
        perplexity: of the same tokens; infinite beyond what a float holds.
        weights: how many are left; the dropped attentions' norms are gone too.
        bytes_per_token: bytes of them, dense in the source's number type, that decoding a token
            reads.
        cache_bytes: bytes of KV cache per token.
    """

    layers: tuple[int, ...]
    loss: float
    perplexity: float
    weights: int
    bytes_per_token: int
    cache_bytes: int


@dataclass(frozen=True)
class Analysis:
    """What ``analyze`` finds out about a model.

    Attributes:
        source: the model, as the user named it.
        weights: how many the whole network has.
        parts: weights by part: embedding, q, k, v, p, ffn, head, norms and vectors; embedding,
            attention, ffn and rest where this package does not know the architecture.
        removals: one for each choice of letters; none where it does not.
        first_layer: what a table of the first layer's projections would save; None if there can be
            none.
        first_layer_reads: the numbers that the first layer reads, as a multiple of what it reads
            from such a table, by batch size.
        cache_bytes: bytes of KV cache per token and layer with attention; per token, of all layers,
            of a network that only mlx-lm knows, whose layers may differ.
        layers: one for each layer.
        drops: ever more attentions dropped, the least important first; None where ``importance``
            of a layer is None.
        text: what importance and losses were measured on.
        notes: what the figures do not say.
    """

    source: str
    weights: int
    parts: dict[str, int]
    removals: tuple[Removal, ...]
    first_layer: FirstLayer | None
    first_layer_reads: dict[int, float] | None
    cache_bytes: int
    layers: tuple[Layer, ...]
    drops: tuple[Dropped, ...] | None
    text: str | None
    notes: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def find_perplexity(loss: float) -> float:
    """Find the perplexity of a loss in nats per token; infinite beyond what a float holds."""
    return math.exp(loss) if loss < LARGEST_LOSS else math.inf
