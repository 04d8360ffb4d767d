"""How well logits predict tokens and each other: negative log likelihood, KL and relative error.

The first two are in nats and take MLX's arrays and NumPy's. MLX's are computed in float32: they can
be differentiated and stay on the device. NumPy's keep their type, because the check after a
conversion needs float64, which MLX cannot exponentiate.
"""

from typing import TypeVar

import mlx.core as mx
import numpy as np

Array = TypeVar("Array", mx.array, np.ndarray)

# For a logit of -inf, which is that of a token that a network forbids: its probability is 0 still,
# and 0 times a difference of two such logits is no longer NaN.
LOWEST = -1e30


def measure_nll(logits: Array, tokens: Array) -> Array:
    """Return -log p of tokens (...), of logits (..., vocabulary)."""
    xp = mx if isinstance(logits, mx.array) else np
    logits, total = _normalize(logits)
    return (total - xp.take_along_axis(logits, tokens[..., None], axis=-1))[..., 0]


def measure_kl(wanted: Array, got: Array) -> Array:
    """Return KL(p || q) (...), of the logits of p and of q, both (..., vocabulary).

    It is the sum of q - p - p log(q / p), as p and q both sum to 1. No term is negative, so small
    ones do not cancel: float32 is good for a KL of 1e-8.
    """
    xp = mx if isinstance(wanted, mx.array) else np
    (wanted, p_total), (got, q_total) = _normalize(wanted), _normalize(got)
    log_p, log_q = wanted - p_total, got - q_total
    p, log_ratio = xp.exp(log_p), log_q - log_p
    # q - p = p (q / p - 1): exact where q is close to p, but it overflows where p is nearly 0.
    close = p * xp.expm1(xp.minimum(log_ratio, 1))
    difference = xp.where(log_ratio < 1, close, xp.exp(log_q) - p)
    return (difference - p * log_ratio).sum(-1)


def measure_error(wanted: np.ndarray, got: np.ndarray) -> np.ndarray:
    """Return max|a - b| / max|a| (...), of logits a and b (..., vocabulary)."""
    largest = np.abs(wanted).max(-1)
    return np.abs(wanted - got).max(-1) / np.where(largest > 0, largest, 1)


def _normalize(logits: Array) -> tuple[Array, Array]:
    """Logits in the type to compute in, and log sum exp of them, (..., 1)."""
    if isinstance(logits, mx.array):
        logits = logits.astype(mx.float32)
        total = mx.logsumexp(logits, axis=-1, keepdims=True)  # -inf where all tokens are forbidden
        return mx.maximum(logits, LOWEST), total
    largest = logits.max(-1, keepdims=True)
    total = largest + np.log(np.exp(logits - largest).sum(-1, keepdims=True))
    return np.maximum(logits, logits.dtype.type(LOWEST)), total
