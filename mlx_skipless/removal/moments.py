"""What least squares need to know of a text: second moments of what a matrix reads and should give.

A matrix here is (in, out), as ``x @ W`` reads it.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import numpy as np

from .products import ignore_overflow

WIDE = 4096  # inputs whose second moments are kept in float64
SMALLEST = 1e-12  # mean square of a token's stream
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


def weigh_tokens(stream: mx.array) -> mx.array:
    """Return what errors of a stream (..., width) count for the norms that read it, (..., 1).

    A norm divides by the root of a token's mean square. Without these weights the few tokens whose
    stream is a thousand times as large as that of others would be all that is fitted.
    """
    square = stream.astype(mx.float32).square().mean(-1, keepdims=True)
    return mx.rsqrt(mx.maximum(square, SMALLEST))


@ignore_overflow
def _multiply(x: mx.array, y: mx.array) -> np.ndarray:
    """Compute X^T Y in float32; on a CPU NumPy does, whose BLAS is the faster one."""
    if mx.default_device().type == mx.gpu:
        return np.array(x.T @ y)
    return np.asarray(x).T @ np.asarray(y)


def add_to_diagonal(gram: np.ndarray, added: float) -> np.ndarray:
    """Return a copy of a square matrix with a number added to its diagonal."""
    out = gram.copy()
    np.einsum("ii->i", out)[:] += added
    return out


def to_float64(array: mx.array) -> np.ndarray:
    """Return an array of any float type as NumPy's float64."""
    return np.array(array.astype(mx.float32)).astype(np.float64)
