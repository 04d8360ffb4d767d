"""The first layer as a table: what it makes of a token depends on nothing but the token.

RoPE comes after the projections, so q, k and v of layer 0 (in a parallel block the FFN's output
too) can be read by token instead of computed (Graef, *Transformer tricks: Precomputing the first
layer*, arXiv 2402.13388). The table takes the embedding's place, a row a token.
"""

from dataclasses import dataclass

import mlx.core as mx
from mlx.utils import tree_flatten

from ..network.driver import fill_block
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
    """What a table saves and costs, in numbers; see section 1 of the paper.

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
        """Numbers that the projections read to decode a token for each of a batch."""
        return self.matrices + batch * self.hidden_size

    def reads_after(self, batch: int = 1) -> int:
        """Likewise of the table."""
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
    (matrices, vectors), (left, vectors_left) = map(_weights, (args, after))
    row = sum(after.row_widths().values())
    tied = args.tie_word_embeddings
    gone = matrices - left, vectors - vectors_left
    return FirstLayer(*gone, args.hidden_size, row, args.vocab_size, tied)


def _weights(args: ModelArgs) -> tuple[int, int]:
    """Numbers in layer 0: of its matrices, of all else."""
    arrays = tensors_of(Block(args, 0)).values()
    matrices = sum(array.size for array in arrays if array.ndim > 1)
    return matrices, sum(array.size for array in arrays) - matrices


def find_obstacle(args: ModelArgs) -> str | None:
    """Why a network cannot have a table; None if it can."""
    if args.precomputed:
        return "the first layer is a table already"
    if args.lacks("attention", 0):
        return "layer 0 has no attention"
    return None


def find_needed(args: ModelArgs) -> dict[str, list[int]]:
    """The sub-layers, layers by part, whose outputs or inputs are in the table."""
    parts = ("attention", "ffn") if args.block == "parallel" else ("attention",)
    return {part: [0] for part in parts}


def explain_price(growth: float, saved: float) -> str | None:
    """Why a table does not pay; None if it does.

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
        merger: makes the tensors of the network without it, in the result's type.
        exact: likewise in float32; the table is computed from these.
        args: that network.
        dtype: of the table.
    """

    def __init__(self, merger: Merged, exact: Merged, args: ModelArgs, dtype: mx.Dtype):
        self._merger, self._exact, self._args, self._dtype = merger, exact, args, dtype

    def embedding(self) -> dict[str, mx.array]:
        name = f"{EMBEDDING}.weight"
        block = fill_block(Block(self._args, 0), self._exact.layer(0), FIRST)
        rows = self._exact.embedding()[name]
        made = []
        for start in range(0, rows.shape[0], ROWS):
            x = self._args.scale_embedding(rows[start : start + ROWS].astype(mx.float32))
            row = _row(self._args, block, x)
            made.append(cast_finite(name, row, self._dtype))
        return {name: mx.concatenate(made)}

    def layer(self, layer: int) -> dict[str, mx.array]:
        tensors = dict(self._merger.layer(layer))
        if layer == 0:
            left = dict(tree_flatten(Block(add_table(self._args), 0).parameters()))
            tensors = {n: a for n, a in tensors.items() if n.removeprefix(FIRST) in left}
        return tensors

    def head(self) -> dict[str, mx.array]:
        tensors = dict(self._merger.head())
        if self._args.tie_word_embeddings:
            tensors[f"{HEAD}.weight"] = self._merger.embedding()[f"{EMBEDDING}.weight"]
        return tensors

    def rewrite(self, where: str, outputs: mx.array) -> mx.array:
        return self._merger.rewrite(where, outputs)


def _row(args: ModelArgs, block: Block, x: mx.array) -> mx.array:
    """The table's rows (tokens, row) of what enters the stream (tokens, hidden)."""
    attention = block.self_attn
    read = block.norm_attention_input(x)
    parts = {
        "q": read if attention.q_proj is None else attention.q_proj(read),
        "k": read if attention.k_proj is None else attention.k_proj(read),
        "v": read if attention.v_proj is None else attention.v_proj(read),
        "x": x,
    }
    if args.block == "parallel":
        ffn = block.mlp(block.norm_ffn_input(x)) if block.mlp is not None else mx.zeros_like(x)
        parts["x"] = x + ffn if block.skip_ffn else ffn
    row = mx.concatenate([parts[name] for name in add_table(args).row_widths()], axis=-1)
    mx.eval(row)
    return row
