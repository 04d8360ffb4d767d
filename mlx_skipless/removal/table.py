"""The first layer as a table: what it makes of a token depends on nothing but the token.

RoPE comes after the projections, so q, k and v of layer 0 (in a parallel block the FFN's output
too) can be read by token instead of computed (Graef, *Transformer tricks: Precomputing the first
layer*, arXiv 2402.13388). The table takes the embedding's place, a row a token.
"""

from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from ..network.driver import StreamedNetwork
from ..network.model import Block, ModelArgs
from ..network.names import EMBEDDING, HEAD
from ..network.parts import Merged, tensors_of
from .networks import add_table
from .products import cast_finite

FIRST = "model.layers.0."
ROWS = 4096  # of the table at a time
# How many per cent of memory one per cent fewer bytes read for a token may cost.
WORTH = 10


@dataclass(frozen=True)
class FirstLayer:
    """What a table saves and costs, in numbers (arXiv 2402.13388, section 1).

    Attributes:
        matrices: weights of the projections that it takes the place of.
        vectors: numbers of their norms and biases.
        hidden_size: width of an embedding's row.
        row: width of the table's row.
        vocab_size: rows.
        untied: whether a tied head has to be stored on its own.
    """

    matrices: int
    vectors: int
    hidden_size: int
    row: int
    vocab_size: int
    untied: bool

    def reads_before(self, batch: int = 1) -> int:
        """Numbers that are read to decode a token for each of a batch, with the projections."""
        return self.matrices + batch * self.hidden_size

    def reads_after(self, batch: int = 1) -> int:
        """Numbers that are read to decode a token for each of a batch, from the table."""
        return batch * self.row

    @property
    def growth(self) -> int:
        """Numbers that the network has more than before, negative if fewer."""
        head = self.vocab_size * self.hidden_size if self.untied else 0
        gone = self.matrices + self.vectors
        return self.vocab_size * (self.row - self.hidden_size) + head - gone


def measure_table(args: ModelArgs) -> FirstLayer:
    """The figures of a network's table; ``args`` is the network without it."""
    after = add_table(args)
    (matrices, vectors), (left, vectors_left) = map(_count_weights, (args, after))
    row = sum(after.row_widths().values())
    tied = args.tie_word_embeddings
    gone = matrices - left, vectors - vectors_left
    return FirstLayer(*gone, args.hidden_size, row, args.vocab_size, tied)


def _count_weights(args: ModelArgs) -> tuple[int, int]:
    """Count the numbers in layer 0: those of its matrices, and all others."""
    arrays = tensors_of(Block(args, 0)).values()
    matrices = sum(array.size for array in arrays if array.ndim > 1)
    return matrices, sum(array.size for array in arrays) - matrices


def find_obstacle(args: ModelArgs) -> str | None:
    """Say why a network cannot have a table; return None if it can."""
    if args.precomputed:
        return "the first layer is a table already"
    if args.lacks("attention", 0):
        return "layer 0 has no attention"
    return None


def find_needed(args: ModelArgs) -> dict[str, list[int]]:
    """List the sub-layers that a table needs, layers by part: it holds what they read or give."""
    parts = ("attention", "ffn") if args.block == "parallel" else ("attention",)
    return {part: [0] for part in parts}


def explain_price(growth: float, saved: float) -> str | None:
    """Say why a table does not pay; return None if it does.

    Args:
        growth: share by which it adds to the weights in memory.
        saved: share of the bytes that decoding a token no longer reads.
    """
    if growth <= WORTH * saved:
        return None
    return (
        f"a table would add {growth:.1%} to the weights in memory and save {saved:.2%} of the "
        "bytes that decoding a token reads"
    )


class TabledParts:
    """A network's tensors with the table in the place of layer 0's projections.

    Args:
        merger: makes the tensors of the network without the table, in the result's type.
        exact: makes them in float32; the table is computed from these.
        args: the network without the table.
        dtype: the table's number type.
    """

    def __init__(self, merger: Merged, exact: Merged, args: ModelArgs, dtype: mx.Dtype):
        self._merger, self._exact, self._args, self._dtype = merger, exact, args, dtype

    def embedding(self) -> dict[str, mx.array]:
        """The table, (vocabulary, row): what the first layer's projections make of each token."""
        name = f"{EMBEDDING}.weight"
        network = StreamedNetwork(self._args, self._exact)
        block = network.layer(0)
        made = []
        for start in range(0, self._args.vocab_size, ROWS):
            tokens = mx.arange(start, min(start + ROWS, self._args.vocab_size))
            row = _make_rows(self._args, block, network.embed(tokens[None])[0])
            made.append(cast_finite(name, row, self._dtype))
        return {name: mx.concatenate(made)}

    def layer(self, layer: int) -> dict[str, mx.array]:
        """Every tensor of a layer; layer 0 lacks those that the table replaces."""
        tensors = dict(self._merger.layer(layer))
        if layer == 0:
            left = tensors_of(Block(add_table(self._args), 0))
            tensors = {n: a for n, a in tensors.items() if n.removeprefix(FIRST) in left}
        return tensors

    def head(self) -> dict[str, mx.array]:
        """The final norm and the head, which the table unties."""
        tensors = dict(self._merger.head())
        if self._args.tie_word_embeddings:
            tensors[f"{HEAD}.weight"] = self._merger.embedding()[f"{EMBEDDING}.weight"]
        return tensors

    def rewrite(self, where: str, outputs: mx.array) -> mx.array:
        """What a matrix wrote before, in the result's basis: see ``Merger.rewrite``."""
        return self._merger.rewrite(where, outputs)


def _make_rows(args: ModelArgs, block: Any, x: mx.array) -> mx.array:
    """Compute the table's rows (tokens, row) of what enters the stream (tokens, hidden)."""
    heads = block.self_attn.project(block.norm_attention_input(x)[None])
    letters = sorted(heads, key="qkv".index)  # some lie side by side already
    parts = [heads[some][0].flatten(-2) for some in letters]
    if "x" in add_table(args).row_widths():
        passed = x
        if args.block == "parallel":
            ffn = block.mlp(block.norm_ffn_input(x)) if block.mlp is not None else mx.zeros_like(x)
            passed = x + ffn if block.skip_ffn else ffn
        parts = [passed, *parts]
    row = mx.concatenate(parts, axis=-1)
    mx.eval(row)
    return row
