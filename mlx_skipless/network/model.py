"""The network: every mix of blocks, skips, norms and missing matrices that this package writes.

This file is copied into every converted checkpoint and runs there on mlx and mlx-lm alone, so it
must import nothing else. What a layer lacks is data in ``ModelArgs`` and costs nothing at run time.

Built and tested for mlx-lm 0.32.
"""

# No `from __future__ import annotations`: mlx-lm runs this file without registering it as a module,
# and dataclass could not resolve string annotations then.
import math
import re
import warnings
from dataclasses import dataclass, field
from functools import partial, reduce
from itertools import accumulate
from operator import add, mul
from typing import Any, Dict, List, Optional, Sequence, Tuple, Union

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
from mlx.nn.layers.distributed import shard_inplace, shard_linear
from mlx.utils import tree_flatten
from mlx_lm.models.base import BaseModelArgs, create_attention_mask, scaled_dot_product_attention
from mlx_lm.models.cache import KVCache, RotatingKVCache
from mlx_lm.models.pipeline import PipelineMixin
from mlx_lm.models.rope_utils import initialize_rope
from mlx_lm.models.switch_layers import SwitchGLU, SwitchLinear, SwitchMLP

MLX_LM_RANGE = ((0, 32), (0, 33))  # versions from the first up to, but not including, the second

if (
    not MLX_LM_RANGE[0]
    <= tuple(int(n) for n in mlx_lm.__version__.split(".")[:2])
    < MLX_LM_RANGE[1]
):
    warnings.warn(
        f"this model was written for mlx-lm >=0.32,<0.33 and meets mlx-lm {mlx_lm.__version__}; "
        "if it fails, install that range or convert the model again",
        stacklevel=2,
    )

# Matrices that read the same input and may be stored as one, with their rows in this order.
FUSED = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "kv_proj": ("k_proj", "v_proj"),
    "qv_proj": ("q_proj", "v_proj"),
    "qk_proj": ("q_proj", "k_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
}

ACTIVATIONS = {
    "silu": nn.silu,
    "swish": nn.silu,
    "gelu": nn.gelu,
    "gelu_new": nn.gelu_approx,
    "gelu_fast": nn.gelu_approx,
    "gelu_pytorch_tanh": nn.gelu_approx,
    "relu": nn.relu,
}

# The norms of "norm": "qkv": of each head's q, k and v, of all heads' queries side by side, which K
# and V then read in place of the stream ("kv"), of all heads' outputs side by side as P reads them,
# and of the FFN's hidden numbers. Without "norms" a network has USUAL_NORMS.
PROJECTION_NORMS = ("q", "k", "v", "kv", "heads", "hidden")
USUAL_NORMS = ("q", "k", "v", "hidden")

# What one block gives the next: the stream (batch, length, hidden), and with head skips the heads'
# outputs (batch, length, heads * head_dim) beside it.
Stream = Union[mx.array, Tuple[mx.array, mx.array]]

# Heads, (batch, length, n, head_dim), by the letters of those side by side: {"qkv": ...}, or
# {"q": ..., "kv": ...}, or {"q": ..., "k": ..., "v": ...}. One kernel norms all heads of an array.
Heads = Dict[str, mx.array]


@dataclass
class ModelArgs(BaseModelArgs):
    """What ``config.json`` says; ``docs/checkpoint.md`` explains each key."""

    model_type: str
    hidden_size: int
    num_hidden_layers: int
    intermediate_size: int
    num_attention_heads: int
    vocab_size: int
    num_key_value_heads: int = 0  # 0: as many as query heads
    head_dim: int = 0  # 0: hidden_size / num_attention_heads
    block: str = "serial"  # serial: attention, then FFN; parallel: their sum
    skip: str = "none"  # none, ffn (around the FFN only), both
    norm: str = "none"  # none, qkv (on the projections' outputs), pre (on the stream)
    # With norm "qkv", which of PROJECTION_NORMS; none: USUAL_NORMS.
    norms: List[str] = field(default_factory=list)
    final_norm: bool = False
    norm_type: str = "rms"  # kind of the norms on the stream, final one too: rms, layer (LayerNorm)
    rms_norm_eps: float = 1e-6
    shared_norm: bool = False  # a parallel block's FFN reads what its attention reads
    qk_norm: bool = False  # RMS norm of each head's q and k, with a weight that all heads share
    hidden_act: str = "silu"
    gated: bool = True  # the FFN is down(act(gate) * up), else down(act(up))
    num_local_experts: int = 0  # FFNs of a layer, of which a router picks some; 0: one for all
    num_experts_per_tok: int = 0
    rope_theta: float = 10000.0
    rotary_dim: int = 0  # numbers of a head that are rotated; 0: all
    rope_traditional: bool = False  # pairs are neighbours, not the halves of what is rotated
    # RoPE scaling; not "rope_scaling", which transformers checks without knowing this architecture.
    rope: Optional[Dict[str, Any]] = None
    # With a growth behind RoPE: query * (1 + query_growth * log(1 + floor(position / query_step))).
    query_growth: float = 0.0
    query_step: int = 0
    max_position_embeddings: int = 2048
    sliding_window: Optional[int] = None
    layer_types: List[str] = field(default_factory=list)  # full_attention or sliding_attention
    tie_word_embeddings: bool = False
    embedding_scale: float = 1.0  # times the embedding where it enters the stream
    logit_scale: float = 1.0
    head_bias: bool = False
    # Which layers lack "q", "k", "v", "p", their whole "attention" or their whole "ffn".
    removed: Dict[str, List[int]] = field(default_factory=dict)
    # Which layers' matrices ("q_proj", "down_proj", ...) have a bias.
    biases: Dict[str, List[int]] = field(default_factory=dict)
    # Norms with a weight: PROJECTION_NORMS' (norm: qkv), "attention", "ffn" (pre), "final".
    gains: List[str] = field(default_factory=list)
    # Which layers store several matrices as one ("kv_proj", "gate_up_proj", ...: see FUSED).
    fused: Dict[str, List[int]] = field(default_factory=dict)
    shifts: List[str] = field(default_factory=list)  # LayerNorms with a bias, by the same names
    gate_offset: bool = False  # (act(gate) + c) * up
    value_skip: bool = False  # attention + alpha * the token's own value
    attention_gain: bool = False  # attention times beta
    uniform_gain: bool = False  # attention - gamma * the mean of the values that it may see
    query_skip: bool = False  # a head's output + alpha * its query before norm and RoPE
    head_skip: bool = False  # query + gamma * the heads' outputs of the layer before
    output_skip: bool = False  # what the last layer gives + delta * its heads' outputs
    channel_skips: bool = False  # the numbers of these three are per channel, not per head
    # The outputs of layer 0's Q, K and V, in a parallel block of its FFN too, are a table by token,
    # which lies in the embedding's rows.
    precomputed: bool = False
    # Matrices that need more bits than the rest when quantized, and how many more.
    extra_bits: Dict[str, int] = field(default_factory=dict)

    def __post_init__(self):
        if not self.num_key_value_heads:
            self.num_key_value_heads = self.num_attention_heads
        if not self.head_dim:
            self.head_dim = self.hidden_size // self.num_attention_heads
        if not self.rotary_dim:
            self.rotary_dim = self.head_dim
        if not self.layer_types:
            kind = "sliding_attention" if self.sliding_window else "full_attention"
            self.layer_types = [kind] * self.num_hidden_layers
        if self.norm == "qkv" and not self.norms:
            self.norms = [*USUAL_NORMS]
        for key, value, known in (
            ("block", self.block, ("serial", "parallel")),
            ("skip", self.skip, ("none", "ffn", "both")),
            ("norm", self.norm, ("none", "qkv", "pre")),
            ("norm_type", self.norm_type, ("rms", "layer")),
            ("hidden_act", self.hidden_act, tuple(ACTIVATIONS)),
        ):
            if value not in known:
                raise ValueError(f'"{key}": {value!r} is not supported; known: {", ".join(known)}')

    def lacks(self, part: str, layer: int) -> bool:
        """Tell whether a layer has no ``part``: "q", "k", "v", "p", "attention" or "ffn"."""
        whole = part if part == "ffn" else "attention"
        gone = layer in self.removed.get(part, ()) or layer in self.removed.get(whole, ())
        return gone or (layer == 0 and self.reads_table(part))

    def passes_heads(self, layer: int) -> bool:
        """Tell whether a layer gives the next one its heads' outputs beside the stream."""
        return self.head_skip and not self.lacks("attention", layer)

    def has_head_skip(self, layer: int) -> bool:
        """Tell whether a layer adds the heads' outputs of the layer before to its query."""
        return layer > 0 and self.passes_heads(layer) and self.passes_heads(layer - 1)

    def has_output_skip(self, layer: int) -> bool:
        """Tell whether a layer, the last one, adds its heads' outputs to what it gives."""
        last = layer == self.num_hidden_layers - 1
        return self.output_skip and last and not self.lacks("attention", layer)

    @property
    def stream_readers(self) -> str:
        """Letters of the attention's matrices that read the stream."""
        return "q" if "kv" in self.norms else "qkv"

    @property
    def ffn_readers(self) -> List[str]:
        """Names of the matrices that read what enters the FFN."""
        router = ["router"] if self.num_local_experts else []
        return [*router, *(["gate_proj"] if self.gated else []), "up_proj"]

    def scale_embedding(self, rows: mx.array) -> mx.array:
        """Scale rows of the embedding, (..., hidden), to what enters the stream."""
        return rows if self.embedding_scale == 1 else rows * self.embedding_scale

    def scale_logits(self, logits: mx.array) -> mx.array:
        """Scale the head's outputs, (..., vocabulary), to logits."""
        return logits if self.logit_scale == 1 else logits * self.logit_scale

    def reads_table(self, part: str) -> bool:
        """Tell whether layer 0 reads the outputs of ``part`` from the embedding's rows."""
        return self.precomputed and (
            part in ("q", "k", "v") or (part == "ffn" and self.block == "parallel")
        )

    def row_widths(self) -> Dict[str, int]:
        """Return the widths of what lies side by side in an embedding's row, by name.

        "x" is the stream. With a precomputed first layer it is what goes past the attention, if
        anything does, in a parallel block with the FFN's output added; "q", "k" and "v" follow it.
        """
        width, kv_width = (
            n * self.head_dim for n in (self.num_attention_heads, self.num_key_value_heads)
        )
        if not self.precomputed:
            return {"x": self.hidden_size}
        passes = self.block == "parallel" or self.skip == "both"
        heads = {"q": width, "k": kv_width, "v": kv_width}
        return {"x": self.hidden_size, **heads} if passes else heads

    def count_rows(self, name: str) -> int:
        """Count the outputs of a matrix that FUSED names."""
        heads = {"q_proj": self.num_attention_heads}
        heads |= dict.fromkeys(("k_proj", "v_proj"), self.num_key_value_heads)
        return heads[name] * self.head_dim if name in heads else self.intermediate_size

    def find_fused(self, layer: int, kind: str) -> Optional[str]:
        """Find the name of a layer's matrix that holds several of those in FUSED[kind]."""
        names = (name for name in self.fused if {*FUSED[name]} <= {*FUSED[kind]})
        return next((name for name in names if layer in self.fused[name]), None)

    def make_linear(self, name: str, layer: int, n_in: int, n_out: int) -> nn.Module:
        """Make a layer's matrix with these inputs and outputs, or one such matrix per expert."""
        bias = layer in self.biases.get(FUSED.get(name, (name,))[0], ())
        if self.num_local_experts and name in ("gate_proj", "up_proj", "down_proj"):
            return SwitchLinear(n_in, n_out, self.num_local_experts, bias=bias)
        return nn.Linear(n_in, n_out, bias=bias)

    def make_stream_norm(self, part: str) -> nn.Module:
        """Make the norm before the "attention" or the "ffn", or the "final" one."""
        weight, bias = part in self.gains, part in self.shifts
        if self.norm_type == "layer":
            return LayerNorm(self.hidden_size, self.rms_norm_eps, weight, bias)
        return RMSNorm(self.hidden_size if weight else None, self.rms_norm_eps)


class RMSNorm(nn.Module):
    """RMS norm of the last axis, with or without a weight."""

    def __init__(self, dims: Optional[int], eps: float):
        super().__init__()
        if dims is not None:
            self.weight = mx.ones((dims,))
        self.eps = eps

    def __call__(self, x: mx.array) -> mx.array:
        return mx.fast.rms_norm(x, self.get("weight"), self.eps)


class LayerNorm(nn.Module):
    """LayerNorm of the last axis, with or without a weight and a bias."""

    def __init__(self, dims: int, eps: float, weight: bool, bias: bool):
        super().__init__()
        if weight:
            self.weight = mx.ones((dims,))
        if bias:
            self.bias = mx.zeros((dims,))
        self.eps = eps

    def __call__(self, x: mx.array) -> mx.array:
        return mx.fast.layer_norm(x, self.get("weight"), self.get("bias"), self.eps)


class ShardedRMSNorm(nn.Module):
    """RMS norm of an axis that is spread over a group of machines."""

    def __init__(self, norm: nn.Module, group: mx.distributed.Group):
        super().__init__()
        if "weight" in norm:
            self.weight = mx.contiguous(mx.split(norm.weight, group.size())[group.rank()])
        self.eps = norm.eps
        self.group = group

    def __call__(self, x: mx.array) -> mx.array:
        square = x.astype(mx.float32).square().mean(-1, keepdims=True)
        square = mx.distributed.all_sum(square, group=self.group) / self.group.size()
        x = (x * mx.rsqrt(square + self.eps)).astype(x.dtype)
        return x * self.weight if "weight" in self else x


def take_stream(h: Stream) -> mx.array:
    """Take the stream out of what a block gives."""
    return h if isinstance(h, mx.array) else h[0]


@partial(mx.compile, shapeless=True)
def add_products(*terms: Tuple[mx.array, ...]) -> mx.array:
    """Add up terms, each the product of its arrays, in one kernel."""
    return reduce(add, (reduce(mul, factors) for factors in terms))


@partial(mx.compile, shapeless=True)
def scale_two(pair: mx.array, first: mx.array, second: mx.array) -> mx.array:
    """Multiply the first of two, (..., 2, n, width), by one scale and the second by another."""
    return pair * mx.where(mx.array([[[True]], [[False]]]), first, second)


@partial(mx.compile, shapeless=True)
def apply_gate(kind: str, gate: mx.array, up: mx.array, offset: Optional[mx.array]) -> mx.array:
    """Compute (act(gate) + offset) * up in one kernel."""
    gate = ACTIVATIONS[kind](gate)
    return (gate if offset is None else gate + offset) * up


@partial(mx.compile, shapeless=True)
def grow(queries: mx.array, positions: mx.array, growth: float, step: int) -> mx.array:
    """Scale queries (batch, heads, length, head_dim) by their positions, (..., length, 1)."""
    steps = mx.maximum(positions, 0) // step  # padding on the left has none
    return queries * (1 + growth * mx.log(1 + steps)).astype(queries.dtype)


def gather_last_axis(x: mx.array, group: mx.distributed.Group) -> mx.array:
    """Join the last axis of ``x``, which is spread over a group of machines in rank order."""
    parts = mx.distributed.all_gather(x[None], group=group)
    return mx.concatenate([*parts], axis=-1)


class Attention(nn.Module):
    """A layer's attention, without the matrices that the layer lacks."""

    def __init__(self, args: ModelArgs, layer: int):
        super().__init__()
        self.n_heads = args.num_attention_heads
        self.n_kv_heads = args.num_key_value_heads
        self.head_dim = args.head_dim
        self.scale = args.head_dim**-0.5
        self.growth, self.step = args.query_growth, args.query_step
        self.group: Optional[mx.distributed.Group] = None
        width, kv_width = self.n_heads * self.head_dim, self.n_kv_heads * self.head_dim

        self._fused = args.find_fused(layer, "qkv_proj")
        parts = FUSED[self._fused] if self._fused else ()
        if self._fused is not None:
            self._ends = [*accumulate(args.count_rows(name) for name in parts)]
            whole = args.make_linear(self._fused, layer, args.hidden_size, self._ends[-1])
            setattr(self, self._fused, whole)
        for name, part, n_in, n_out in (
            ("q_proj", "q", args.hidden_size, width),
            ("k_proj", "k", args.hidden_size, kv_width),
            ("v_proj", "v", args.hidden_size, kv_width),
            ("o_proj", "p", width, args.hidden_size),
        ):
            present = not args.lacks(part, layer) and name not in parts
            setattr(self, name, args.make_linear(name, layer, n_in, n_out) if present else None)

        if args.value_skip:
            self.value_skip = mx.zeros((self.n_heads,))
        if args.attention_gain:
            self.attention_gain = mx.ones((self.n_heads,))
        if args.uniform_gain:
            self.uniform_gain = mx.zeros((self.n_heads,))
        skip_width = width if args.channel_skips else self.n_heads
        if args.query_skip:
            self.query_skip = mx.zeros((skip_width,))
        if args.has_head_skip(layer):
            self.head_skip = mx.zeros((skip_width,))
        if args.has_output_skip(layer):
            self.output_skip = mx.zeros((skip_width,))
        self.gives_heads = args.passes_heads(layer) or args.has_output_skip(layer)
        table = args.precomputed and layer == 0
        self.make_norms(args, table)
        self._runs = self.find_runs(table)
        self.rope = initialize_rope(
            args.rotary_dim,
            args.rope_theta,
            args.rope_traditional,
            args.rope,
            args.max_position_embeddings,
        )

    def make_norms(self, args: ModelArgs, table: bool):
        """Make the norms of q, k and v, of the queries for K and V, and of the heads' outputs."""
        # A weight that all heads share is as wide as one of them, and in the norm's kernel. One per
        # head and channel follows the norm.
        self.shared_gains = args.qk_norm
        self._weighted = ""  # letters of the latter
        for letter in "qkv":
            shared, weighted = args.qk_norm and letter != "v", letter in args.gains
            dims = self.head_dim if shared else args.count_rows(f"{letter}_proj")
            norm = RMSNorm(dims if weighted else None, args.rms_norm_eps)
            normed = shared or letter in args.norms
            setattr(self, f"{letter}_norm", norm if normed else None)
            self._weighted += letter if normed and weighted and not shared else ""
        self.kv_norm: Any = None
        self.heads_norm: Any = None
        for name in ("kv", "heads"):  # all heads together
            if name in args.norms and not (table and name == "kv"):
                width = args.count_rows("q_proj") if name in args.gains else None
                setattr(self, f"{name}_norm", RMSNorm(width, args.rms_norm_eps))

    def find_runs(self, table: bool) -> Tuple[Tuple[str, Tuple[str, ...]], ...]:
        """Find which heads one matrix gives side by side, and how they are cut at once.

        Heads of k and v stay together if the same kernel can norm them, and those of q with them if
        nothing else is done to q and k before RoPE.
        """
        kinds: Dict[str, Any] = {}
        for letter in "qkv":
            norm = getattr(self, f"{letter}_norm")
            own = norm is not None and "weight" in norm and letter not in self._weighted
            kinds[letter] = letter if own else norm is not None
        alike = "."
        if kinds["k"] == kinds["v"]:
            untouched = not self._weighted and "head_skip" not in self
            alike = "qkv|kv|." if untouched and kinds["q"] == kinds["k"] else "kv|."
        fused = "qkv" if table else (self._fused or "").partition("_")[0]
        runs = [fused, *(letter for letter in "qkv" if letter not in fused)]
        runs.sort(key=lambda run: "q" not in run)  # K and V may read the queries
        return tuple((run, tuple(re.findall(alike, run))) for run in runs if run)

    def split_heads(self, x: mx.array, pieces: Sequence[str]) -> List[mx.array]:
        """Split heads side by side, (batch, length, n, any), into pieces with these letters."""
        if len(pieces) == 1:
            return [x]
        counts = {"q": self.n_heads, "k": self.n_kv_heads, "v": self.n_kv_heads}
        ends = [*accumulate(sum(counts[letter] for letter in piece) for piece in pieces)]
        return [*mx.split(x, ends[:-1], axis=2)]

    def project(self, x: mx.array, heads_before: Optional[mx.array] = None) -> Heads:
        """Compute q, with its head skip, k and v before their norms and RoPE.

        ``x`` is the stream, (batch, length, hidden), or a table's rows for all three, and
        ``heads_before`` what a head skip reads. A matrix that is not there was the identity.
        """
        heads: Heads = {}
        for run, pieces in self._runs:
            proj = getattr(self, f"{run}_proj", None)
            given = (x if proj is None else proj(x)).reshape(*x.shape[:2], -1, self.head_dim)
            if proj is None and self.group is not None:
                given = self.take_share(given, run, self.group)
            heads |= zip(pieces, self.split_heads(given, pieces), strict=True)
            if "q" in run and heads_before is not None and "head_skip" in self:
                skipped = (self.separate_heads(heads_before), self.separate_heads(self.head_skip))
                heads["q"] = add_products((heads["q"],), skipped)
            if run == "q" and self.kv_norm is not None:
                x = self.norm_queries(heads["q"])
        return heads

    def norm_queries(self, q: mx.array) -> mx.array:
        """Make what K and V read of the queries, (batch, length, heads, head_dim), of all heads."""
        q = q.flatten(-2)
        return self.kv_norm(q if self.group is None else gather_last_axis(q, self.group))

    def take_share(self, x: mx.array, letters: str, group: mx.distributed.Group) -> mx.array:
        """Take this machine's share of all machines' heads, (batch, length, n, head_dim)."""
        size, rank = group.size(), group.rank()
        wide = x.reshape(*x.shape[:2], -1, size * self.head_dim)
        shares = [
            part.reshape(*x.shape[:2], size, -1, self.head_dim)[:, :, rank]
            for part in self.split_heads(wide, letters)
        ]
        return mx.concatenate(shares, axis=2)

    def norm_heads(self, x: mx.array, letters: str) -> mx.array:
        """Norm each of the heads that lie side by side, if they are normed."""
        norm = getattr(self, f"{letters[0]}_norm")
        if norm is None or (self.shared_gains and letters in "qk"):
            return x if norm is None else norm(x)
        return mx.fast.rms_norm(x, None, norm.eps)

    def rotate(self, heads: Heads, offset: Union[int, mx.array]) -> Tuple[mx.array, ...]:
        """Norm heads and apply RoPE: q, k and v, each (batch, n, length, head_dim)."""
        heads = {letters: self.norm_heads(x, letters) for letters, x in heads.items()}
        if "qkv" in heads:
            qk, v = self.split_heads(heads["qkv"], ("qk", "v"))
            qk = self.rope(qk.transpose(0, 2, 1, 3), offset=offset)
            return (*mx.split(qk, [self.n_heads], axis=1), v.transpose(0, 2, 1, 3))
        scales = {
            letter: getattr(self, f"{letter}_norm").weight.reshape(-1, self.head_dim)
            for letter in self._weighted
        }
        if "kv" in heads:
            kv = heads["kv"]
            if "k" in scales and "v" in scales:
                pair = kv.reshape(*kv.shape[:2], 2, -1, self.head_dim)
                kv = scale_two(pair, scales.pop("k"), scales.pop("v")).reshape(kv.shape)
            heads |= zip("kv", mx.split(kv, 2, axis=2), strict=True)
        heads |= {letter: heads[letter] * scale for letter, scale in scales.items()}
        q, k, v = (heads[letter].transpose(0, 2, 1, 3) for letter in "qkv")
        return self.rope(q, offset=offset), self.rope(k, offset=offset), v

    def grow_queries(
        self, queries: mx.array, offset: Union[int, mx.array]
    ) -> Tuple[mx.array, float]:
        """Let queries (batch, heads, length, head_dim) grow with their positions from ``offset``.

        Returns queries and the scale of their scores: where all grow alike, that alone changes.
        """
        if not self.growth:
            return queries, self.scale
        length = queries.shape[2]
        if isinstance(offset, int) and offset % self.step + length <= self.step:
            return queries, self.scale * (1 + self.growth * math.log(1 + offset // self.step))
        positions = offset.reshape(-1, 1, 1, 1) if isinstance(offset, mx.array) else offset
        positions = positions + mx.arange(length)[:, None]
        return grow(queries, positions, self.growth, self.step), self.scale

    def separate_heads(self, x: mx.array) -> mx.array:
        """Give heads side by side, (..., heads * head_dim), or a number for each, an axis each.

        The result is (..., heads, head_dim), or (heads, 1) of a number for each.
        """
        return x.reshape(*x.shape[:-1], self.n_heads, -1)

    def add_scaled(self, terms: List[Tuple[mx.array, ...]]) -> mx.array:
        """Add up heads (batch, length, n, head_dim), each times its scales, in one kernel.

        A scale is (n, head_dim) or (n, 1). As many heads as there are of keys count for each query
        head that shares them.
        """

        def group(x: mx.array) -> mx.array:
            return x.reshape(*x.shape[:-2], self.n_kv_heads, -1, x.shape[-1])

        added = add_products(*(tuple(map(group, term)) for term in terms))
        return added.reshape(terms[0][0].shape)

    def __call__(
        self,
        x: mx.array,
        mask=None,
        cache: Optional[Any] = None,
        heads_before: Optional[mx.array] = None,
    ) -> Stream:
        """Attend: (batch, length, hidden) of the stream, or a table's rows for q, k and v.

        ``heads_before`` are the heads' outputs of the layer before, which a head skip reads. Gives
        (batch, length, hidden), or the heads side by side where the layer lacks P; where a head
        skip or an output skip reads the heads, these side by side beside that.
        """
        projected = self.project(x, heads_before)
        offset = cache.offset if cache is not None else 0
        queries, keys, values = self.rotate(projected, offset)
        own = values
        queries, scale = self.grow_queries(queries, offset)
        if cache is not None:
            keys, values = cache.update_and_fetch(keys, values)

        def attend(queries: mx.array) -> mx.array:
            out = scaled_dot_product_attention(
                queries, keys, values, cache=cache, scale=scale, mask=mask
            )
            return out.transpose(0, 2, 1, 3)

        # Terms of the heads' outputs, each with what scales it.
        beta = (self.attention_gain[:, None],) if "attention_gain" in self else ()
        terms = [(attend(queries), *beta)]
        if "query_skip" in self:
            q = projected["q"] if "q" in projected else projected["qkv"][:, :, : self.n_heads]
            terms.append((q, self.separate_heads(self.query_skip)))
        if "uniform_gain" in self:
            terms.append((attend(mx.zeros_like(queries)), -self.uniform_gain[:, None]))
        if "value_skip" in self:
            terms.append((own.transpose(0, 2, 1, 3), self.value_skip[:, None]))
        plain = len(terms) == len(terms[0]) == 1
        heads = (terms[0][0] if plain else self.add_scaled(terms)).reshape(*x.shape[:2], -1)

        out = heads if self.heads_norm is None else self.heads_norm(heads)
        if self.o_proj is not None:
            out = self.o_proj(out)
        elif self.group is not None:
            out = gather_last_axis(out, self.group)
        return (out, heads) if self.gives_heads else out

    def add_heads(self, x: mx.array, heads: mx.array) -> mx.array:
        """Add the output skip of the heads to what the layer gives, (batch, length, hidden)."""
        delta = self.separate_heads(self.output_skip)
        if self.group is None:
            x, heads = self.separate_heads(x), self.separate_heads(heads)
            return add_products((x,), (heads, delta)).flatten(-2)
        scaled = (self.separate_heads(heads) * delta).flatten(-2)
        return x + gather_last_axis(scaled, self.group)

    def shard(self, group: mx.distributed.Group):
        """Keep this machine's share of the heads."""
        N = group.size()
        if self.n_kv_heads % N:
            raise ValueError(f"{self.n_kv_heads} key-value heads cannot be split over {N} machines")
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            if (linear := getattr(self, name)) is not None:
                how = "sharded-to-all" if name == "o_proj" else "all-to-sharded"
                setattr(self, name, shard_linear(linear, how, group=group))
        if self._fused is not None:
            ends, linear = self._ends[:-1], self[self._fused]
            linear = shard_linear(linear, "all-to-sharded", segments=ends, group=group)
            setattr(self, self._fused, linear)
        for name in ("q_norm", "k_norm", "v_norm"):
            whole = self.shared_gains and name != "v_norm"
            if (norm := getattr(self, name)) is not None and not whole:
                shard_inplace(norm, lambda path, w: 0, group=group)
        if self.heads_norm is not None:
            self.heads_norm = ShardedRMSNorm(self.heads_norm, group)
        skips = ("value_skip", "query_skip", "head_skip", "output_skip")
        for name in ("attention_gain", "uniform_gain", *skips):
            if name in self:
                setattr(self, name, mx.split(getattr(self, name), N)[group.rank()])
        self.n_heads //= N
        self.n_kv_heads //= N
        self.group = group


class MLP(nn.Module):
    """A layer's FFN: down(act(gate) * up), or down(act(up)) without a gate."""

    def __init__(self, args: ModelArgs, layer: int):
        nn.Module.__init__(self)
        # Without P the FFN reads the heads themselves, wider or narrower than the stream.
        heads = (
            args.block == "serial" and args.lacks("p", layer) and not args.lacks("attention", layer)
        )
        n_in = args.num_attention_heads * args.head_dim if heads else args.hidden_size
        inner = args.intermediate_size
        self.router: Any = None
        if args.num_local_experts:
            self.router = args.make_linear("router", layer, n_in, args.num_local_experts)
        self.gate_up_proj: Any = None
        self.gate_proj: Any = None
        self.up_proj: Any = None
        if args.find_fused(layer, "gate_up_proj"):
            self.gate_up_proj = args.make_linear("gate_up_proj", layer, n_in, 2 * inner)
        else:
            self.gate_proj = (
                args.make_linear("gate_proj", layer, n_in, inner) if args.gated else None
            )
            self.up_proj = args.make_linear("up_proj", layer, n_in, inner)
        self.down_proj: Any = args.make_linear("down_proj", layer, inner, args.hidden_size)
        if args.gate_offset:
            self.gate_offset = mx.zeros((inner,))
        self.hidden_norm: Optional[nn.Module] = None
        if "hidden" in args.norms:
            dims = inner if "hidden" in args.gains else None
            self.hidden_norm = RMSNorm(dims, args.rms_norm_eps)
        self.hidden_act = args.hidden_act

    def activation(self, up: mx.array, gate: Optional[mx.array] = None) -> mx.array:
        """Compute what the last matrix reads; mlx-lm's experts call it by this name."""
        if gate is None:
            hidden = ACTIVATIONS[self.hidden_act](up)
        else:
            hidden = apply_gate(self.hidden_act, gate, up, self.get("gate_offset"))
        return hidden if self.hidden_norm is None else self.hidden_norm(hidden)

    def __call__(self, x: mx.array) -> mx.array:
        if self.gate_up_proj is not None:
            # Each on its own row: Metal copies half a row before it multiplies by packed numbers.
            rows = mx.unflatten(self.gate_up_proj(x), -1, (2, -1))
            halves = mx.split(rows, 2, axis=-2)
            return self.down_proj(self.activation(*halves[::-1]).flatten(-2))
        gate = None if self.gate_proj is None else self.gate_proj(x)
        return self.down_proj(self.activation(self.up_proj(x), gate))

    def shard(self, group: mx.distributed.Group):
        """Keep this machine's share of the hidden numbers."""
        for name, parts in (("gate_up_proj", 2), ("gate_proj", 1), ("up_proj", 1)):
            if (linear := getattr(self, name)) is not None:
                sharded = shard_linear(linear, "all-to-sharded", segments=parts, group=group)
                setattr(self, name, sharded)
        self.down_proj = shard_linear(self.down_proj, "sharded-to-all", group=group)
        self.shard_hidden(group)

    def shard_hidden(self, group: mx.distributed.Group):
        """Keep this machine's share of the vectors that act on the hidden numbers."""
        if "gate_offset" in self:
            self.gate_offset = mx.split(self.gate_offset, group.size())[group.rank()]
        if self.hidden_norm is not None:
            self.hidden_norm = ShardedRMSNorm(self.hidden_norm, group)


class Experts(MLP):
    """Mixtral's mixture of FFNs: a router picks a few for each token and weighs their outputs."""

    def __init__(self, args: ModelArgs, layer: int):
        super().__init__(args, layer)
        self.picked = args.num_experts_per_tok
        self.group: Optional[mx.distributed.Group] = None

    @property
    def fc1(self) -> nn.Module:
        """What mlx-lm's experts without a gate call their first matrix."""
        return self.up_proj

    @property
    def fc2(self) -> nn.Module:
        """What mlx-lm's experts without a gate call their last matrix."""
        return self.down_proj

    def __call__(self, x: mx.array) -> mx.array:
        scores = self.router(x)
        experts = mx.argpartition(-scores, kth=self.picked - 1, axis=-1)[..., : self.picked]
        experts = mx.stop_gradient(experts)
        weights = mx.softmax(mx.take_along_axis(scores, experts, axis=-1), axis=-1, precise=True)
        kind: Any = SwitchMLP if self.gate_proj is None else SwitchGLU
        out = kind.__call__(self, x, experts)
        out = (out * weights[..., None]).sum(axis=-2)
        return out if self.group is None else mx.distributed.all_sum(out, group=self.group)

    def shard(self, group: mx.distributed.Group):
        """Keep this machine's share of each expert's hidden numbers."""
        for name in ("gate_proj", "up_proj", "down_proj"):
            if (linear := getattr(self, name)) is None:
                continue
            if "bias" in linear:
                raise ValueError("experts with biases cannot be spread over machines")
            how = "sharded-to-all" if name == "down_proj" else "all-to-sharded"
            shard_inplace(linear, how, group=group)
        self.shard_hidden(group)
        self.group = group


class Block(nn.Module):
    """A layer: attention and FFN, one after the other or side by side, as far as it has them."""

    def __init__(self, args: ModelArgs, layer: int):
        super().__init__()
        attention = not args.lacks("attention", layer)
        self.self_attn: Any = Attention(args, layer) if attention else None
        self._row = args.row_widths() if args.precomputed and layer == 0 else {}
        ffn = not args.lacks("ffn", layer)
        kind = Experts if args.num_local_experts else MLP
        self.mlp: Any = kind(args, layer) if ffn else None
        self.input_layernorm: Optional[nn.Module] = None
        self.post_attention_layernorm: Optional[nn.Module] = None
        self.shared_norm = args.shared_norm
        if args.norm == "pre":
            if (attention or (ffn and args.shared_norm)) and not self._row:
                self.input_layernorm = args.make_stream_norm("attention")
            if ffn and not args.shared_norm:
                self.post_attention_layernorm = args.make_stream_norm("ffn")
        self.parallel = args.block == "parallel"
        self.passes_heads = args.passes_heads(layer)
        self.has_output_skip = args.has_output_skip(layer)
        self.skip_attention = args.skip == "both"
        self.skip_ffn = args.skip != "none"
        self.use_sliding = args.layer_types[layer] == "sliding_attention"

    def norm_attention_input(self, x: mx.array) -> mx.array:
        """Apply the norm before the attention, if there is one."""
        return x if self.input_layernorm is None else self.input_layernorm(x)

    def norm_ffn_input(self, x: mx.array) -> mx.array:
        """Apply the norm before the FFN, if there is one."""
        if self.shared_norm:
            return self.norm_attention_input(x)
        return x if self.post_attention_layernorm is None else self.post_attention_layernorm(x)

    def attend(
        self,
        x: mx.array,
        mask,
        cache: Optional[Any],
        heads_before: Optional[mx.array] = None,
    ) -> Tuple[mx.array, Optional[mx.array]]:
        """Run the attention; return what it gives the stream, and the heads if they are read."""
        out = self.self_attn(x, mask, cache, heads_before)
        return (out, None) if isinstance(out, mx.array) else out

    def read_table(self, row: mx.array, mask, cache) -> Tuple[mx.array, Optional[mx.array]]:
        """Run the attention on a table's rows, (batch, length, row).

        Returns the stream behind it, and the heads if they are read.
        """
        passed = self._row.get("x", 0)
        h, heads = self.attend(row[..., passed:], mask, cache)
        return (row[..., :passed] + h if passed else h), heads

    def run_parallel(
        self, x: mx.array, mask, cache: Optional[Any], heads_before: Optional[mx.array]
    ) -> Tuple[mx.array, Optional[mx.array]]:
        """Run attention and FFN side by side."""
        read, parts, heads = self.norm_attention_input(x), [], None
        if self.mlp is not None:
            parts.append(self.mlp(read if self.shared_norm else self.norm_ffn_input(x)))
        if self.self_attn is not None:
            h, heads = self.attend(read, mask, cache, heads_before)
            parts.append(h)
        if self.skip_ffn:
            parts.append(x)
        return add_products(*((part,) for part in parts or [mx.zeros_like(x)])), heads

    def run_serial(
        self, x: mx.array, mask, cache: Optional[Any], heads_before: Optional[mx.array]
    ) -> Tuple[mx.array, Optional[mx.array]]:
        """Run the attention, then the FFN."""
        heads = None
        if self._row:
            x, heads = self.read_table(x, mask, cache)
        elif self.self_attn is not None:
            h, heads = self.attend(self.norm_attention_input(x), mask, cache, heads_before)
            x = x + h if self.skip_attention else h
        if self.mlp is not None:
            h = self.mlp(self.norm_ffn_input(x))
            x = x + h if self.skip_ffn else h
        return x, heads

    def __call__(self, x: Stream, mask=None, cache: Optional[Any] = None) -> Stream:
        x, heads_before = (x, None) if isinstance(x, mx.array) else x
        run = self.run_parallel if self.parallel and not self._row else self.run_serial
        out, heads = run(x, mask, cache, heads_before)
        if heads is None:
            return out
        if self.has_output_skip:
            out = self.self_attn.add_heads(out, heads)
        return (out, heads) if self.passes_heads else out


class SkiplessModel(PipelineMixin, nn.Module):
    """The network without its head."""

    def __init__(self, args: ModelArgs):
        super().__init__()
        self.args = args
        self.sliding_window = args.sliding_window
        self.embed_tokens: Any = nn.Embedding(args.vocab_size, sum(args.row_widths().values()))
        self.layers = [Block(args, layer) for layer in range(args.num_hidden_layers)]
        self.norm = args.make_stream_norm("final") if args.final_norm else None

    def pipeline(self, group: mx.distributed.Group, split: Optional[List[int]] = None):
        """Keep this machine's layers, and the embedding if it feeds the first or is a tied head."""
        super().pipeline(group, split)
        # The type of a weight that is loaded here; other machines' weights may stay on the Hub.
        parts = [part.parameters() for part in (*self.pipeline_layers, self)]
        dtypes = (w.dtype for w in dict(tree_flatten(parts)).values())  # type: ignore[union-attr]
        self.stream_dtype = next((t for t in dtypes if mx.issubdtype(t, mx.floating)), mx.bfloat16)
        if self.start_idx and not self.args.tie_word_embeddings:
            self.embed_tokens = None

    def make_masks(self, h: mx.array, caches: List[Any]) -> Dict[bool, Any]:
        """Make a mask for layers with a sliding window (True) and one for the others (False)."""
        made: Dict[bool, Any] = {}
        for layer, cache in zip(self.pipeline_layers, caches, strict=True):
            if layer.self_attn is not None and layer.use_sliding not in made:
                window = self.sliding_window if layer.use_sliding else None
                made[layer.use_sliding] = create_attention_mask(h, cache, window_size=window)
        return made

    def align_caches(self, cache: Optional[List[Any]]) -> List[Any]:
        """Give each layer with attention its cache, and None to the others."""
        layers = self.pipeline_layers
        needed = sum(layer.self_attn is not None for layer in layers)
        if cache is not None and len(cache) < needed:
            raise ValueError(
                f"{len(cache)} caches for {needed} layers with attention; use make_cache()"
            )
        left = iter(cache or ())
        return [None if layer.self_attn is None else next(left, None) for layer in layers]

    def enter_stream(self, inputs: mx.array, input_embeddings: Optional[mx.array]) -> Stream:
        """Return what the first layer of this machine reads."""
        if input_embeddings is not None and self.args.precomputed:
            raise ValueError("the first layer is a table by token: there is no use for embeddings")
        if self.start_idx:
            shape = (inputs if input_embeddings is None else input_embeddings).shape[:2]
            d, heads = self.args.hidden_size, self.args.num_attention_heads * self.args.head_dim
            passed = d + heads if self.args.passes_heads(self.start_idx - 1) else d
            like = mx.zeros((*shape, passed), self.stream_dtype)
            h = mx.distributed.recv_like(like, self.pipeline_rank + 1)
            return h if passed == d else (h[..., :d], h[..., d:])
        h = self.embed_tokens(inputs) if input_embeddings is None else input_embeddings
        return self.args.scale_embedding(h)

    def pass_on(self, stream: Stream, caches: List[Any]) -> mx.array:
        """Send what the next layers read to their machine; return the last machine's output."""
        h = take_stream(stream)
        if self.pipeline_rank:
            sent = h if isinstance(stream, mx.array) else mx.concatenate([*stream], axis=-1)
            sent = mx.distributed.send(sent, self.pipeline_rank - 1)
            h = sent[..., : h.shape[-1]]
        # A prompt's chunks are evaluated through the caches alone, and must arrive all the same.
        own = [cache for cache in caches if cache is not None]
        if not own:
            mx.async_eval(h)
        elif self.pipeline_rank:
            own[-1].keys = mx.depends(own[-1].keys, h)
        return mx.distributed.all_gather(h)[: h.shape[0]]

    def __call__(
        self,
        inputs: mx.array,
        cache: Optional[List[Any]] = None,
        input_embeddings: Optional[mx.array] = None,
    ) -> mx.array:
        stream = self.enter_stream(inputs, input_embeddings)
        caches = self.align_caches(cache)
        masks = self.make_masks(take_stream(stream), caches)
        for layer, c in zip(self.pipeline_layers, caches, strict=True):
            stream = layer(stream, masks.get(layer.use_sliding), c)
        h = self.pass_on(stream, caches) if self.pipeline_size > 1 else take_stream(stream)
        return h if self.norm is None else self.norm(h)


class Model(nn.Module):
    """The whole network, as mlx-lm loads it."""

    def __init__(self, args: ModelArgs):
        super().__init__()
        self.args = args
        self.model_type = args.model_type
        self.model = SkiplessModel(args)
        if not args.tie_word_embeddings:
            self.lm_head = nn.Linear(args.hidden_size, args.vocab_size, bias=args.head_bias)

    def __call__(
        self,
        inputs: mx.array,
        cache: Optional[List[Any]] = None,
        input_embeddings: Optional[mx.array] = None,
    ) -> mx.array:
        """Compute logits (batch, length, vocabulary) of token ids (batch, length)."""
        return self.head(self.model(inputs, cache, input_embeddings))

    def head(self, h: mx.array) -> mx.array:
        """Compute logits of what the final norm gives, (..., hidden)."""
        tied = self.args.tie_word_embeddings
        return self.args.scale_logits(
            self.model.embed_tokens.as_linear(h) if tied else self.lm_head(h)
        )

    def sanitize(self, weights: Dict[str, mx.array]) -> Dict[str, mx.array]:
        """Bring a checkpoint's tensors into this network's names and complete them."""
        if self.args.tie_word_embeddings:
            weights.pop("lm_head.weight", None)
        weights = self.stack_experts(weights)
        # A layer may lack a norm's weight (then ones) or a linear path that others have.
        norms = tuple(f"{norm}_norm.weight" for norm in PROJECTION_NORMS)
        skips = ("query_skip", "head_skip", "output_skip")
        paths = ("gate_offset", "value_skip", "attention_gain", "uniform_gain", *skips)
        known = (w.dtype for k, w in weights.items() if k.endswith((*norms, *paths)))
        dtype = next(known, mx.float32)
        for name, own in dict(tree_flatten(self.parameters())).items():
            if name.endswith((*norms, *paths)) and name not in weights:
                weights[name] = own.astype(dtype)  # type: ignore[union-attr]
            elif name.endswith(skips) and weights[name].size * self.args.head_dim == own.size:
                # One per head where other layers have one per channel.
                weights[name] = mx.repeat(weights[name], self.args.head_dim)
        return {k: v for k, v in weights.items() if "rotary_emb.inv_freq" not in k}

    def stack_experts(self, weights: Dict[str, mx.array]) -> Dict[str, mx.array]:
        """Stack the experts of each layer where a checkpoint, Mixtral's, has them one by one."""
        matrices = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
        experts: Dict[str, Dict[int, mx.array]] = {}
        out = {}
        for name, array in weights.items():
            prefix, moe, rest = name.partition(".block_sparse_moe.")
            if rest.startswith("experts."):
                _, number, matrix, part = rest.split(".")
                found = experts.setdefault(f"{prefix}.mlp.{matrices[matrix]}.{part}", {})
                found[int(number)] = array
            else:
                out[f"{prefix}.mlp.{rest.replace('gate', 'router')}" if moe else name] = array
        return out | {name: mx.stack([by[i] for i in sorted(by)]) for name, by in experts.items()}

    @property
    def layers(self):
        """The layers: in a pipeline this machine's, else all."""
        return self.model.pipeline_layers

    def make_cache(self) -> List[Union[KVCache, RotatingKVCache]]:
        """Make a cache for each of these layers that has attention."""
        return [
            RotatingKVCache(max_size=self.args.sliding_window) if layer.use_sliding else KVCache()
            for layer in self.layers
            if layer.self_attn is not None
        ]

    @property
    def quant_predicate(self):
        """What mlx-lm asks how to quantize each matrix; see ``quant_predicate`` below.

        The bits of the other matrices are not known here.
        """
        return quant_predicate(self.args.extra_bits)

    def shard(self, group: Optional[mx.distributed.Group] = None):
        """Spread heads and FFNs over a group of machines.

        Without P the heads are gathered before the FFN.
        """
        group = group or mx.distributed.init()
        for layer in self.layers:
            if layer.self_attn is not None:
                layer.self_attn.shard(group)
            if layer.mlp is not None:
                layer.mlp.shard(group)


def quant_predicate(extra_bits: Dict[str, int], bits: Optional[int] = None):
    """Make what ``mlx_lm.utils.quantize_model`` asks how to quantize each matrix.

    It answers True (like the others), False (not at all) or the matrix's own settings. A matrix
    beside a removed one gets its extra bits, or is left as it is where no format has so many.

    Args:
        extra_bits: extra bits by module path.
        bits: of the other matrices; None if unknown, and then at least 8 for those with extra bits.
    """

    def predicate(path: str, module: nn.Module, *_) -> Union[bool, Dict[str, Any]]:
        name = path.rpartition(".")[2]
        parts = [path.replace(name, part) for part in FUSED.get(name, (name,))]
        extra = max(extra_bits.get(part, 0) for part in parts)
        if not hasattr(module, "to_quantized") or not extra:
            return hasattr(module, "to_quantized")
        group_size = next((g for g in (64, 32) if module.weight.shape[-1] % g == 0), None)
        least = bits + extra if bits else max(8, 4 + extra)
        enough = next((b for b in (3, 4, 5, 6, 8) if b >= least), None)
        if group_size is None or enough is None:
            return False
        return {"group_size": group_size, "bits": enough, "mode": "affine"}

    return predicate
