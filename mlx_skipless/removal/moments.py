"""What least squares need to know of a text: second moments of what a matrix reads and should give.

A matrix here is (in, out), as ``x @ W`` reads it.
"""

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import numpy as np

from .products import ignore_overflow

MOST_WIDE = 1 << 25  # sums of a matrix that are kept in float64: beyond, they take gigabytes
BLOCK = 256  # of a triangular matrix's rows
SMALLEST = 1e-12  # mean square of a token's stream
JUDGED = 128  # outputs, spread over all, that choose the ridge


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
        self.gram = _add(self.gram if self.count else None, _multiply(x, x))
        for name, y in targets.items():
            y = y.reshape(-1, y.shape[-1])
            self.cross[name] = _add(self.cross.get(name), _multiply(x, y))
            self.energy[name] = self.energy.get(name, 0) + to_float64(y.square().sum(0))
        self.count += x.shape[0]

    def absorb(self, other: "Moments") -> None:
        """Take in all that another has seen, which forgets it."""
        if other.count:
            self.gram = _add(self.gram if self.count else None, other.gram)
            for name, cross in other.cross.items():
                self.cross[name] = _add(self.cross.get(name), cross)
                self.energy[name] = self.energy.get(name, 0) + other.energy[name]
            self.count += other.count
        other.__init__()  # type: ignore[misc]

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


def _add(sums: np.ndarray | None, others: np.ndarray) -> np.ndarray:
    """Add to sums in place, or begin them.

    In float64, but in float32 where that would take gigabytes; what comes of it is judged in any
    case.
    """
    if sums is None:
        return others.astype(np.float64 if others.size <= MOST_WIDE else np.float32, copy=False)
    sums += others
    return sums


@contextlib.contextmanager
def ridged(gram: np.ndarray, added: float) -> Iterator[np.ndarray]:
    """Add a number to a square matrix's diagonal for the time, in place: a copy may be large."""
    diagonal = np.einsum("ii->i", gram)
    kept = diagonal.copy()
    diagonal += added
    try:
        yield gram
    finally:
        diagonal[:] = kept


def factor(gram: np.ndarray) -> np.ndarray:
    """Compute Cholesky's factor L of a matrix, L L^T, in the matrix's own type.

    MLX does where that is float32: NumPy would in float64, which takes three times the memory.

    Raises:
        np.linalg.LinAlgError: if the matrix is not positive definite, as far as its type tells.
    """
    if gram.dtype != np.float32:
        return np.linalg.cholesky(gram)
    lower = np.asarray(mx.linalg.cholesky(mx.array(np.ascontiguousarray(gram)), stream=mx.cpu))
    if not (np.diag(lower) > 0).all():  # MLX does not say that it failed
        raise np.linalg.LinAlgError("not positive definite")
    return lower


def factor_ridged(gram: np.ndarray, added: float) -> np.ndarray | None:
    """Compute Cholesky's factor of X^T X + r I; None if rounding leaves it none."""
    with contextlib.suppress(np.linalg.LinAlgError), ridged(gram, added) as whole:
        return factor(whole)
    return None


def pick_outputs(count: int) -> np.ndarray:
    """Pick the outputs, of so many, that choose a ridge: each is a regression of its own."""
    return np.unique(np.linspace(0, count - 1, JUDGED).astype(int))


def solve_factored(lower: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Solve L L^T X = B for X, from Cholesky's factor L (in, in) and B (in, out).

    The substitutions go by blocks, so that nearly all is products.
    """
    starts = range(0, len(lower), BLOCK)
    x = right.astype(lower.dtype)
    for start in starts:  # L Z = B, from above
        own = slice(start, start + BLOCK)
        x[own] -= lower[own, :start] @ x[:start]
        x[own] = np.linalg.inv(lower[own, own]) @ x[own]
    for start in reversed(starts):  # L^T X = Z, from below
        own = slice(start, start + BLOCK)
        x[own] -= lower[start + BLOCK :, own].T @ x[start + BLOCK :]
        x[own] = np.linalg.inv(lower[own, own]).T @ x[own]
    return x


def to_float64(array: mx.array) -> np.ndarray:
    """Return an array of any float type as NumPy's float64."""
    return np.array(array.astype(mx.float32)).astype(np.float64)
