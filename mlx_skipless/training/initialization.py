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
        "gains": [*NORMS[own.norm], *(["final"] if final_norm else [])],
        "gate_offset": own.gate_offset is not None,
        "value_skip": own.value_skip is not None or shaped,
        "attention_gain": shaped,
        "uniform_gain": shaped,
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
        _adjust_layer(new, f"model.layers.{layer}", recipe.resolve(), model.args)
    model.update(tree_unflatten(list(new.items())))


def _adjust_layer(weights: dict[str, mx.array], layer: str, own: Recipe, args: ModelArgs) -> None:
    """Scale a layer's random matrices in place, and add its norms and linear paths."""
    attention, mlp = f"{layer}.self_attn", f"{layer}.mlp"
    query, key = f"{attention}.q_proj.weight", f"{attention}.k_proj.weight"
    # With skips, what is added to the stream is scaled by 1 / sqrt(number of additions).
    additions = {"none": 0, "ffn": 1, "both": 2}[own.skip] * own.layers
    last = f"{attention}.{'v_proj' if 'p' in own.without else 'o_proj'}.weight"
    if own.skip == "both" and last in weights:
        weights[last] *= additions**-0.5
    if own.skip != "none":
        weights[f"{mlp}.down_proj.weight"] *= additions**-0.5
    if own.shaped_attention and own.norm != "qkv" and query in weights:
        # With Q = 0, beta A = gamma C at the start (He & Hofmann, section 4.1).
        weights[query] *= 0
    elif own.own_token and own.skip != "both" and key in weights:
        weights[key] = make_own_token_keys(weights.get(query), args)
    if own.norm == "qkv":
        width = args.num_attention_heads * args.head_dim
        weights[f"{attention}.q_norm.weight"] = mx.full((width,), own.temperature)
    if own.gate_offset is not None:
        weights[f"{mlp}.gate_offset"] = mx.full((own.intermediate_size,), own.gate_offset)
    if args.value_skip:
        alpha = 1.0 if own.value_skip is None else own.value_skip
        weights[f"{attention}.value_skip"] = mx.full((own.heads,), alpha)
    if own.shaped_attention:
        weights[f"{attention}.uniform_gain"] = mx.ones((own.heads,))


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
