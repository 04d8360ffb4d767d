"""Fits a matrix to the outputs that it should give, by least squares on what a text brings it.

A matrix here is (in, out), as ``x @ W`` reads it. Two streams of numbers are enough to fit one: the
second moments of its inputs and their products with the outputs that are wanted.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import numpy as np

from ..network.driver import BATCH_TOKENS
from ..network.model import ModelArgs
from ..removal.products import ignore_overflow
from .formats import Format, add_to_diagonal

WIDE = 4096  # inputs whose second moments are kept in float64
TEXT_TOKENS = 1 << 14  # that calibrate, at most
JUDGED = 128  # outputs, spread over all, that choose the ridge
# Tried as the ridge, a share of the inputs' mean square.
RIDGES = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1)


@dataclass
class Moments:
    """Sums over inputs X (tokens, in) and the outputs Y (tokens, out) that matrices should give.

    Attributes:
        gram: X^T X, (in, in).
        cross: X^T Y, (in, out), by the matrix's name.
        energy: |y|^2 of each output, (out,), by the matrix's name.
        count: of the inputs.
    """

    gram: np.ndarray = field(default_factory=lambda: np.zeros((1, 1), dtype=np.float32))
    cross: dict[str, np.ndarray] = field(default_factory=dict)
    energy: dict[str, np.ndarray] = field(default_factory=dict)
    count: int = 0

    def add(self, x: mx.array, targets: Mapping[str, mx.array]) -> None:
        """Take in inputs (batch, length, in) and, by name, outputs (batch, length, out)."""
        x = x.reshape(-1, x.shape[-1]).astype(mx.float32)
        self.count += x.shape[0]
        # In float32 where float64 would take gigabytes; what comes of it is judged in any case.
        kind = np.float64 if x.shape[-1] <= WIDE else np.float32
        self.gram = self.gram + _multiply(x, x).astype(kind, copy=False)
        for name, y in targets.items():
            y = y.reshape(-1, y.shape[-1])
            self.cross[name] = self.cross.get(name, 0) + _multiply(x, y).astype(kind, copy=False)
            self.energy[name] = self.energy.get(name, 0) + to_float64(y.square().sum(0))

    def error(self, name: str, weight: np.ndarray, outputs: Any = slice(None)) -> float:
        """Return |X W - Y|^2 / |Y|^2 for a weight W (in, out), over all outputs or some.

        The squares are multiplied out: tr(W^T X^T X W) - 2 tr(W^T X^T Y) + |Y|^2.
        """
        weight = weight.astype(self.gram.dtype, copy=False)
        cross, energy = self.cross[name][:, outputs], self.energy[name][outputs].sum()
        spread = np.vdot(weight, self.gram @ weight) - 2 * np.vdot(weight, cross)
        return float(1 + spread / max(energy, np.finfo(np.float64).tiny))

    @property
    def finite(self) -> bool:
        """Whether no sum overflowed."""
        return all(np.isfinite(sums).all() for sums in (self.gram, *self.cross.values()))


@ignore_overflow
def _multiply(x: mx.array, y: mx.array) -> np.ndarray:
    """Compute X^T Y in float32; on a CPU NumPy does, whose BLAS is the faster one."""
    if mx.default_device().type == mx.gpu:
        return np.array(x.T @ y)
    return np.asarray(x).T @ np.asarray(y)


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


def to_float64(array: mx.array) -> np.ndarray:
    """Return an array of any float type as NumPy's float64."""
    return np.array(array.astype(mx.float32)).astype(np.float64)
