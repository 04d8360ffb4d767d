"""Whether a device computes what a removal promises: a random network against float64.

The network has all that stands in a removal's way and must not matter: grouped queries, norms with
weights on its projections, and query, head and output skips. ``compute_logits`` is written after
docs/checkpoint.md, in NumPy and in float64. It shares no code with what converts and runs networks.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..inference.loading import load_network
from ..network.metrics import measure_error
from ..progress import Steps

HIDDEN, INNER, LAYERS, HEADS, KV_HEADS, VOCABULARY = 128, 256, 4, 8, 2, 256
CONFIG: dict[str, Any] = {
    "model_type": "skipless", "block": "serial", "skip": "none", "norm": "qkv",
    "norms": ["q", "k", "v", "heads"], "final_norm": False, "tie_word_embeddings": False,
    "hidden_size": HIDDEN, "intermediate_size": INNER, "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "vocab_size": VOCABULARY,
    "max_position_embeddings": 512, "rope_theta": 10000.0, "rms_norm_eps": 1e-5,
    "torch_dtype": "float32",
}  # fmt: skip
TOKENS = 32
SPREAD = 0.3  # of a matrix beside its orthogonal part
MORE_THAN_ROUNDING = 10  # times the error that the device makes in the source
MUCH = 0.01  # relative logit error that no rounding of float32 makes, on a GPU either

Weights = dict[str, np.ndarray]


@dataclass(frozen=True)
class Exactness:
    """How far networks on MLX's default device are from float64, on the same tokens.

    Errors are the worst token's max|a - b| / max|a| over the vocabulary.

    Attributes:
        removed: the layers of each matrix that is gone, by the paper's letter.
        source_error: of the source in float32.
        result_error: of the result in float32, all tokens at once.
        stepwise_error: the same, token by token with a cache.
        check_error: of the result as ``convert`` measured it, against the source in float32.
        same_tokens: whether the result prefers the same next tokens as float64.
    """

    removed: dict[str, list[int]]
    source_error: float
    result_error: float
    stepwise_error: float
    check_error: float
    same_tokens: bool

    @property
    def exact(self) -> bool:
        """Whether rounding explains all of the result's error."""
        errors = (self.result_error, self.stepwise_error, self.check_error)
        most = MORE_THAN_ROUNDING * self.source_error
        return self.source_error < MUCH and all(error <= most for error in errors)


def measure_exactness(
    convert: Callable[..., Any],
    folder: Path,
    seed: int = 0,
    progress: Steps = lambda done, total: None,
) -> Exactness:
    """Convert a small random network, and compare source and result with float64.

    Args:
        convert: what converts, as ``mlx_skipless.convert`` does.
        folder: where source and result are written; it must exist.
        seed: of the weights and the tokens.
        progress: called with (done, total).
    """
    source, result = folder / "source", folder / "result"
    weights = make_weights(np.random.default_rng(seed))
    _write_source(source, weights)
    progress(1, 4)
    report = convert(source, result, remove="qp")
    progress(2, 4)
    tokens = np.random.default_rng(seed + 1).integers(0, VOCABULARY, (1, TOKENS))
    wanted = compute_logits({name: w.astype(np.float64) for name, w in weights.items()}, tokens)
    model = load_network(result)[0]
    at_once, stepwise = _run(model, tokens), _run_stepwise(model, tokens)
    progress(3, 4)
    given = _run(load_network(source)[0], tokens)
    progress(4, 4)
    of_source, of_result, of_steps = (
        float(measure_error(wanted, got).max()) for got in (given, at_once, stepwise)
    )
    return Exactness(
        report.removed,
        of_source,
        of_result,
        of_steps,
        report.verification.max_rel_logit_error,
        bool((wanted.argmax(-1) == at_once.argmax(-1)).all()),
    )


def make_weights(rng: np.random.Generator) -> Weights:
    """Make the network's tensors in float32, (out, in); square matrices are well conditioned."""
    head_dim = HIDDEN // HEADS
    kv_width = KV_HEADS * head_dim

    def matrix(n_out: int, n_in: int) -> np.ndarray:
        tall = rng.standard_normal((max(n_out, n_in), min(n_out, n_in)))
        basis = np.linalg.qr(tall)[0]
        noise = rng.standard_normal((n_out, n_in)) / np.sqrt(n_in)
        return (basis if n_out >= n_in else basis.T) + SPREAD * noise

    def vector(size: int) -> np.ndarray:
        return rng.uniform(0.6, 1.4, size)

    made = {
        "model.embed_tokens.weight": rng.standard_normal((VOCABULARY, HIDDEN)),
        "lm_head.weight": matrix(VOCABULARY, HIDDEN),
    }
    for layer in range(LAYERS):
        attention, mlp = f"model.layers.{layer}.self_attn", f"model.layers.{layer}.mlp"
        for name, rows, columns in (
            (f"{attention}.q_proj", HIDDEN, HIDDEN), (f"{attention}.k_proj", kv_width, HIDDEN),
            (f"{attention}.v_proj", kv_width, HIDDEN), (f"{attention}.o_proj", HIDDEN, HIDDEN),
            (f"{mlp}.gate_proj", INNER, HIDDEN), (f"{mlp}.up_proj", INNER, HIDDEN),
            (f"{mlp}.down_proj", HIDDEN, INNER),
        ):  # fmt: skip
            made[f"{name}.weight"] = matrix(rows, columns)
        for norm, size in (("q", HIDDEN), ("k", kv_width), ("v", kv_width), ("heads", HIDDEN)):
            made[f"{attention}.{norm}_norm.weight"] = vector(size)
        for path in ("query_skip", "attention_gain", *(["head_skip"] if layer else [])):
            made[f"{attention}.{path}"] = vector(HEADS)
    made[f"model.layers.{LAYERS - 1}.self_attn.output_skip"] = vector(HEADS)
    return {name: array.astype(np.float32) for name, array in made.items()}


def compute_logits(weights: Weights, tokens: np.ndarray) -> np.ndarray:
    """Compute the logits (batch, length, vocabulary) of tokens (batch, length).

    Args:
        weights: the network's tensors, in the number type to compute with.
        tokens: ids.
    """
    x, heads = weights["model.embed_tokens.weight"][tokens], None
    for layer in range(LAYERS):
        own = {
            name.removeprefix(f"model.layers.{layer}."): array
            for name, array in weights.items()
            if name.startswith(f"model.layers.{layer}.")
        }
        heads = _attend(own, x, heads)
        read = _norm(heads, own["self_attn.heads_norm.weight"]) @ own["self_attn.o_proj.weight"].T
        gate, up = (read @ own[f"mlp.{name}_proj.weight"].T for name in ("gate", "up"))
        x = (gate / (1 + np.exp(-gate)) * up) @ own["mlp.down_proj.weight"].T
        if "self_attn.output_skip" in own:
            x = x + _widen(own["self_attn.output_skip"]) * heads
    return x @ weights["lm_head.weight"].T


def _attend(own: Weights, x: np.ndarray, before: np.ndarray | None) -> np.ndarray:
    """Compute a layer's heads side by side, (batch, length, hidden)."""
    q, k, v = (x @ own[f"self_attn.{name}_proj.weight"].T for name in "qkv")
    if before is not None:
        q = q + _widen(own["self_attn.head_skip"]) * before
    queries, keys, values = (
        _norm(_split(part, heads), own[f"self_attn.{name}_norm.weight"].reshape(heads, -1))
        for name, part, heads in (("q", q, HEADS), ("k", k, KV_HEADS), ("v", v, KV_HEADS))
    )
    queries, keys = _rotate(queries), np.repeat(_rotate(keys), HEADS // KV_HEADS, axis=2)
    values = np.repeat(values, HEADS // KV_HEADS, axis=2)
    scores = np.einsum("bihd,bjhd->bhij", queries, keys) / np.sqrt(queries.shape[-1])
    scores = np.where(np.tri(x.shape[1], dtype=bool), scores, -np.inf)
    share = np.exp(scores - scores.max(-1, keepdims=True))
    share = share / share.sum(-1, keepdims=True)
    out = np.einsum("bhij,bjhd->bihd", share, values).reshape(x.shape)
    return _widen(own["self_attn.attention_gain"]) * out + _widen(own["self_attn.query_skip"]) * q


def _split(x: np.ndarray, heads: int) -> np.ndarray:
    return x.reshape(*x.shape[:2], heads, -1)


def _widen(per_head: np.ndarray) -> np.ndarray:
    return np.repeat(per_head, HIDDEN // HEADS)


def _norm(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + CONFIG["rms_norm_eps"]) * weight


def _rotate(x: np.ndarray) -> np.ndarray:
    """Apply RoPE to heads, (batch, length, heads, head_dim)."""
    half = x.shape[-1] // 2
    angles = np.arange(x.shape[1])[:, None] * CONFIG["rope_theta"] ** (-np.arange(half) / half)
    cos, sin = np.cos(angles)[:, None], np.sin(angles)[:, None]
    a, b = x[..., :half], x[..., half:]
    return np.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1)


def _write_source(folder: Path, weights: Weights) -> None:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG), encoding="utf-8")
    arrays = {name: mx.array(array) for name, array in weights.items()}
    mx.save_safetensors(str(folder / "model.safetensors"), arrays)


def _run(model: nn.Module, tokens: np.ndarray) -> np.ndarray:
    return np.array(model(mx.array(tokens))).astype(np.float64)


def _run_stepwise(model: Any, tokens: np.ndarray) -> np.ndarray:
    cache = model.make_cache()
    rows = [model(mx.array(tokens[:, [i]]), cache) for i in range(tokens.shape[1])]
    return np.array(mx.concatenate(rows, axis=1)).astype(np.float64)
