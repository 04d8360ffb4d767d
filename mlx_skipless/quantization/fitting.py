"""Fits a matrix to the outputs that it should give, by least squares on what a text brings it.

A matrix here is (in, out), as ``x @ W`` reads it. Two streams of numbers are enough to fit one: the
second moments of its inputs and their products with the outputs that are wanted.
"""

import mlx.core as mx
import numpy as np

from ..network.driver import BATCH_TOKENS
from ..network.model import ModelArgs
from ..removal.moments import RIDGES, WIDE, Moments, add_to_diagonal
from .formats import Format

TEXT_TOKENS = 1 << 14  # that calibrate, at most
JUDGED = 128  # outputs, spread over all, that choose the ridge


def estimate_memory(args: ModelArgs) -> int:
    """Estimate the bytes that calibrating takes at most, beside a layer's weights."""
    width = args.num_attention_heads * args.head_dim
    widest = max(args.hidden_size, args.intermediate_size, width)
    return estimate_moments(widest, args.hidden_size)


def estimate_moments(widest: int, hidden: int) -> int:
    """Estimate the same for a stream's width and the inputs of the widest matrix."""
    moments = 6 * widest**2 + 20 * widest * hidden  # with a solver's and a rounding's copies
    held = 4 * TEXT_TOKENS * (widest + 4 * hidden)  # what matrices read and give in one layer
    return moments * (8 if widest <= WIDE else 4) + 8 * 4 * BATCH_TOKENS * widest + held


def fit_weight(
    seen: Moments, judge: Moments, name: str, prior: np.ndarray, form: Format
) -> np.ndarray:
    """Fit the weight that gives the wanted outputs best once it is rounded.

    Ridge regressions are tried with several ridges r, towards zero and towards a prior W0:

        W = argmin |X W - Y|^2 + r |W|^2         = (X^T X + r I)^-1 X^T Y
        W = argmin |X W - Y|^2 + r |W - W0|^2    = (X^T X + r I)^-1 (X^T Y + r W0)

    The one that errs least on ``judge`` when it is rounded to nearest wins, or the prior itself.

    Args:
        seen: what the regressions fit.
        judge: what chooses among them.
        name: of the matrix in both.
        prior: W0, (in, out).
        form: how the matrix will be rounded.

    Returns:
        The weight (in, out), not rounded yet.
    """
    gram, cross = seen.gram, seen.cross[name]
    size = np.mean(np.diag(gram))
    # Some of the outputs choose: each is a regression of its own, with the same X^T X.
    some = np.unique(np.linspace(0, prior.shape[1] - 1, JUDGED).astype(int))
    best, least = None, judge.error(name, _round(prior[:, some], form), some)
    for ridge in RIDGES if size else ():
        added = ridge * size
        # One solve for both: the second regression is the first plus (X^T X + r I)^-1 r W0.
        pulled = (added * prior[:, some]).astype(gram.dtype)
        both = np.linalg.solve(add_to_diagonal(gram, added), np.hstack([cross[:, some], pulled]))
        to_zero, share = np.hsplit(both, 2)
        for candidate, pull in ((to_zero, 0.0), (to_zero + share, added)):
            error = judge.error(name, _round(candidate, form), some)
            if error < least:
                best, least = (added, pull), error
    if best is None:
        return prior
    added, pull = best
    wanted = cross + (pull * prior).astype(gram.dtype)
    return np.linalg.solve(add_to_diagonal(gram, added), wanted)


def _round(weight: np.ndarray, form: Format) -> np.ndarray:
    stored = mx.array(np.ascontiguousarray(weight.T, dtype=np.float32))
    return np.array(form.dense(form.nearest(stored))).T
