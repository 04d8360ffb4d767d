"""From a recipe to a network: its sizes, and its starting weights."""

import math

import mlx.core as mx
from mlx.utils import tree_unflatten

from ..architectures.config import read_model_args
from ..errors import UserError
from ..network.model import Model, ModelArgs
from ..network.names import NORMS
from ..network.parts import tensors_of
from .recipe import Recipe

EMBEDDING_SCALE = 0.02
NEAR_IDENTITY_GATES = 0.3


def make_model_args(recipe: Recipe) -> ModelArgs:
    """Make the description of a recipe's network.

    Raises:
        UserError: for sizes that fit no network.
    """
    own = recipe.resolve()
    final_norm = own.final_norm
    if final_norm is None:
        final_norm = own.norm != "qkv" or own.skip != "none"
    shaped = own.shaped_attention
    norms = own.norms.split(",") if own.norm == "qkv" else []
    config = {
        "model_type": "skipless",
        "hidden_size": own.hidden_size,
        "intermediate_size": own.intermediate_size,
        "num_hidden_layers": own.layers,
        "num_attention_heads": own.heads,
        "num_key_value_heads": own.kv_heads,
        "vocab_size": own.vocab_size,
        "max_position_embeddings": own.context,
        "hidden_act": own.hidden_act,
        "rope_theta": own.rope_theta,
        "block": own.block,
        "skip": own.skip,
        "norm": own.norm,
        "final_norm": final_norm,
        "tie_word_embeddings": own.tie,
        "embedding_scale": own.embedding_scale,
        "norms": norms,
        "gains": [*(norms or NORMS[own.norm]), *(["final"] if final_norm else [])],
        "gate_offset": own.gate_offset is not None,
        "value_skip": own.value_skip is not None or shaped,
        "attention_gain": shaped or find_attention_gain(own) is not None,
        "uniform_gain": shaped,
        "query_skip": own.query_skip is not None,
        "head_skip": own.head_skip is not None,
        "output_skip": own.output_skip is not None,
        "channel_skips": own.skip_width == "channel",
        "removed": {letter: list(range(own.layers)) for letter in own.without},
    }
    try:
        return read_model_args(config)
    except UserError as error:
        raise UserError(f"these sizes make no network: {error}") from error


def initialize(model: Model, recipe: Recipe) -> None:
    """Fill a network with starting weights, which depend on the recipe's ``seed`` alone.

    Matrices are orthogonal and keep the root mean square of what they multiply, so that a stream
    without skips neither grows nor shrinks.
    """
    keys = iter(mx.random.split(mx.random.key(recipe.seed), 8 * recipe.layers + 2))
    new: dict[str, mx.array] = {}
    for name, old in tensors_of(model).items():
        if name.endswith(("embed_tokens.weight", "lm_head.weight")):
            new[name] = EMBEDDING_SCALE * mx.random.normal(old.shape, key=next(keys))
        elif old.ndim == 2:
            new[name] = make_orthogonal(*old.shape, key=next(keys))
    for layer in range(recipe.layers):
        _adjust_layer(new, layer, recipe.resolve(), model.args)
    model.update(tree_unflatten(list(new.items())))


def find_attention_gain(own: Recipe) -> float | None:
    """Find the start of beta, a head's weight on its attention; None where there is no beta.

    With a query skip alone, attention is one of so many additions to what goes past the blocks. It
    starts at 1 / sqrt(number of additions). With a head skip too, 1 was better by 0.1 nats, and 2
    by 0.02 more (``docs/training.md``). Where V itself is the attention's weight there is no beta.
    """
    if own.attention_gain is not None or own.query_skip is None or own.weighs_by_values:
        return own.attention_gain
    return 2.0 if own.head_skip is not None else own.layers**-0.5


def _adjust_layer(weights: dict[str, mx.array], layer: int, own: Recipe, args: ModelArgs) -> None:
    """Scale a layer's random matrices in place, and add its norms and linear paths."""
    prefix = f"model.layers.{layer}"
    attention, mlp = f"{prefix}.self_attn", f"{prefix}.mlp"
    query, key = f"{attention}.q_proj.weight", f"{attention}.k_proj.weight"
    # With skips, what is added to the stream is scaled by 1 / sqrt(number of additions).
    additions = {"none": 0, "ffn": 1, "both": 2}[own.skip] * own.layers
    last = f"{attention}.{'v_proj' if 'p' in own.without else 'o_proj'}.weight"
    if own.skip == "both" and last in weights:
        weights[last] *= additions**-0.5
    value = f"{attention}.v_proj.weight"
    adds = own.skip == "none" and own.query_skip is not None
    if own.weighs_by_values and adds and value in weights:
        # Attention and FFN add to what the skips carry, and no norm stands behind V.
        weights[value] *= (2 * own.layers) ** -0.5
    if own.skip != "none":
        weights[f"{mlp}.down_proj.weight"] *= additions**-0.5
    if own.shaped_attention and own.norm != "qkv" and query in weights:
        # With Q = 0, beta A = gamma C at the start (He & Hofmann, section 4.1).
        weights[query] *= 0
    elif own.own_token and own.skip != "both" and key in weights:
        queries = None if own.reads_queries else weights.get(query)
        weights[key] = make_own_token_keys(queries, args)
    if "q" in args.norms:
        width = args.num_attention_heads * args.head_dim
        weights[f"{attention}.q_norm.weight"] = mx.full((width,), own.temperature)
    _start_ffn(weights, mlp, layer, own)
    _start_head_paths(weights, attention, own, args)
    if args.has_head_skip(layer) and own.head_skip is not None:
        weights[f"{attention}.head_skip"] = mx.full((_count_skips(own, args),), own.head_skip)
    if args.has_output_skip(layer) and own.output_skip is not None:
        weights[f"{attention}.output_skip"] = mx.full((_count_skips(own, args),), own.output_skip)


def _start_ffn(weights: dict[str, mx.array], mlp: str, layer: int, own: Recipe) -> None:
    """Start an FFN near the identity, or, where a skip of the heads goes past it, as an addition.

    Without an output skip the head reads the last FFN alone, so that one starts near the identity.
    """
    past = own.head_skip if layer < own.layers - 1 else own.output_skip
    bypassed = past is not None and own.skip == "none"
    gate, up, down = (f"{mlp}.{name}_proj.weight" for name in ("gate", "up", "down"))
    if own.gate_offset is not None:
        offset = 0.0 if bypassed else own.gate_offset
        weights[f"{mlp}.gate_offset"] = mx.full((own.intermediate_size,), offset)
    if bypassed:
        weights[down] *= (2 * own.layers) ** -0.5
    elif own.near_identity and own.query_skip is not None and own.skip == "none":
        inner, width = weights[up].shape
        if weights[down].shape == (width, inner):
            weights[gate] *= NEAR_IDENTITY_GATES
            # up^T up = inner / width for orthogonal columns: this keeps the mean square.
            weights[down] = weights[up].T * (width / inner if inner >= width else 1)


def _start_head_paths(
    weights: dict[str, mx.array], attention: str, own: Recipe, args: ModelArgs
) -> None:
    """Fill what a head adds to its attention, and the attention's weight."""
    starts = {
        "query_skip": (own.query_skip, _count_skips(own, args)),
        "attention_gain": (find_attention_gain(own), own.heads),
    }
    if args.value_skip:
        starts["value_skip"] = (1.0 if own.value_skip is None else own.value_skip, own.heads)
    if own.shaped_attention:
        starts["uniform_gain"] = (1.0, own.heads)
        starts["attention_gain"] = (1.0, own.heads)
    for name, (start, size) in starts.items():
        if start is not None:
            weights[f"{attention}.{name}"] = mx.full((size,), start)


def _count_skips(own: Recipe, args: ModelArgs) -> int:
    return own.heads * (args.head_dim if own.skip_width == "channel" else 1)


def make_orthogonal(n_out: int, n_in: int, *, key: mx.array) -> mx.array:
    """Make a random (n_out, n_in) matrix with orthogonal rows or columns.

    It is scaled so that it keeps the mean square of what it multiplies.
    """
    tall = mx.random.normal((max(n_out, n_in), min(n_out, n_in)), key=key)
    q, r = mx.linalg.qr(tall, stream=mx.cpu)
    # QR leaves the signs of Q's columns to the algorithm; those of R's diagonal make Q uniform.
    q = q * mx.sign(mx.diag(r))
    q = q if n_out >= n_in else q.T
    return q * math.sqrt(max(n_out, n_in) / n_in)


def make_own_token_keys(queries: mx.array | None, args: ModelArgs) -> mx.array:
    """Make K the mean of its group's Q, so that each token attends to itself first.

    Args:
        queries: (heads * head_dim, hidden), or None where Q is left out: the identity.

    Returns:
        (kv_heads * head_dim, hidden); its rows have the length that Q's have.
    """
    if queries is None:
        queries = mx.eye(args.hidden_size)
    groups = queries.reshape(args.num_key_value_heads, -1, args.head_dim, args.hidden_size)
    mean = groups.mean(axis=1).reshape(-1, args.hidden_size)
    return mean * math.sqrt(groups.shape[1])
