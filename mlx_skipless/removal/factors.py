"""Square matrices in factors: many systems are solved, and norms estimated, with one factorisation.

Everything is float64 but the 2-norm of a matrix as it is, to which rounding does not matter. MLX's
LAPACK factors, because NumPy's gives away solutions alone, and NumPy multiplies: see
``products.py``.
"""

from functools import cached_property
from typing import Any

import mlx.core as mx
import numpy as np

BLOCK = 64  # rows that a triangular system is solved for at a time
DENSE = 512  # rows up to which norms are computed and not estimated
COLUMNS = 16  # of a block of vectors
MOST_COLUMNS = 512  # of the space that the largest singular value is looked for in
PROBES = 32  # random vectors that the Frobenius norm is estimated with
CONVERGED = 1e-3  # growth of the largest singular value in a step that is the last


class Factors:
    """The factors P A = L U of a square matrix A, computed with partial pivoting when needed.

    Args:
        matrix: A, (n, n).
    """

    def __init__(self, matrix: np.ndarray):
        self._matrix: np.ndarray | None = matrix

    def factor(self) -> None:
        """Factor the matrix now.

        Raises:
            numpy.linalg.LinAlgError: if the matrix is singular.
        """
        assert self._parts

    def solve(self, wanted: np.ndarray) -> np.ndarray:
        """Solve A X = B for B of shape (n, m) or (n,).

        Raises:
            numpy.linalg.LinAlgError: if the matrix is singular.
        """
        factors, order, lower, upper = self._parts
        found = _substitute(factors, lower, wanted[order].astype(np.float64), ahead=True)
        return _substitute(factors, upper, found, ahead=False)

    def solve_transposed(self, wanted: np.ndarray) -> np.ndarray:
        """Solve A^T X = B for B of shape (n, m) or (n,).

        Raises:
            numpy.linalg.LinAlgError: if the matrix is singular.
        """
        factors, order, lower, upper = self._parts
        # A^T = U^T L^T P
        lower, upper = ([block.T for block in blocks] for blocks in (lower, upper))
        found = _substitute(factors.T, upper, wanted.astype(np.float64), ahead=True)
        found = _substitute(factors.T, lower, found, ahead=False)
        result = np.empty_like(found)
        result[order] = found
        return result

    @cached_property
    def _parts(self) -> tuple[np.ndarray, np.ndarray, list[np.ndarray], list[np.ndarray]]:
        """L and U in one matrix, the order of rows P, the inverses of their diagonal blocks."""
        assert self._matrix is not None
        factors, order = _factor(self._matrix)
        self._matrix = None
        if not factors.diagonal().all():
            raise np.linalg.LinAlgError("Singular matrix")
        starts = range(0, len(factors), BLOCK)
        inner = [factors[i : i + BLOCK, i : i + BLOCK] for i in starts]
        lower = [np.linalg.inv(np.tril(block, -1) + np.eye(len(block))) for block in inner]
        return factors, order, lower, [np.linalg.inv(np.triu(block)) for block in inner]


def _factor(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Compute L and U, in one matrix that is laid out by columns, and the order of rows P."""
    flipped = matrix.flags.f_contiguous
    rows = np.ascontiguousarray(matrix.T if flipped else matrix, dtype=np.float64)
    with mx.stream(mx.cpu):  # no GPU has float64
        array = mx.array(rows, dtype=mx.float64)
        factors, swaps = mx.linalg.lu_factor(array.T if flipped else array)
        mx.eval(factors, swaps)
    order = np.arange(len(matrix))
    for row, other in enumerate(np.array(swaps)):
        order[[row, other]] = order[[other, row]]
    return np.asarray(factors), order


def _substitute(
    factors: np.ndarray, inner: list[np.ndarray], x: np.ndarray, *, ahead: bool
) -> np.ndarray:
    """Solve a triangular system, in place.

    Args:
        factors: holds the matrix below or above its diagonal blocks.
        inner: the inverses of its diagonal blocks.
        x: what is wanted, (n, m) or (n,).
        ahead: whether the matrix is lower triangular, so that the first rows are solved first.
    """
    starts = range(0, len(x), BLOCK)
    for at in range(len(inner)) if ahead else reversed(range(len(inner))):
        rows = slice(starts[at], starts[at] + BLOCK)
        solved = slice(0, rows.start) if ahead else slice(rows.stop, None)
        x[rows] = inner[at] @ (x[rows] - factors[rows, solved] @ x[solved])
    return x


def measure_norms(matrix: Any, size: int) -> tuple[float, float, float]:
    """Measure the norms of a square matrix that can be multiplied with, as can its ``T``.

    Up to ``DENSE`` rows they are exact. Beyond, the 2-norm is that of the matrix within a block
    Krylov space (Musco and Musco, arXiv 1504.05477): never too large, and less than 1 % too small.
    The Frobenius norm is exact within that space and sampled outside it (Meyer et al., *Hutch++*,
    arXiv 2010.09649).

    Args:
        matrix: (n, n).
        size: n.

    Returns:
        The 2-norm, the Frobenius norm and the standard error of the latter.
    """
    if size <= DENSE:
        dense = matrix @ np.eye(size)
        return float(np.linalg.norm(dense, 2)), float(np.linalg.norm(dense)), 0.0
    rng = np.random.default_rng(0)
    basis, image, largest = _find_largest(matrix, rng.standard_normal((size, COLUMNS)))
    probes = rng.standard_normal((size, PROBES))
    outside = (np.square(matrix @ (probes - basis @ (basis.T @ probes)))).sum(0)
    square = float(np.square(image).sum() + outside.mean())
    # The error of a root is half that of the square.
    error = outside.std(ddof=1) / PROBES**0.5 / 2 / square**0.5
    return largest, square**0.5, float(error)


def measure_largest(matrix: np.ndarray) -> float:
    """Measure the 2-norm of a square matrix as ``measure_norms`` does, but in float32.

    Its rounding is a relative error of 1e-6 here; an inverse would magnify it.
    """
    size = len(matrix)
    if size <= DENSE:
        return float(np.linalg.norm(matrix, 2))
    scale = max(matrix.max(), -matrix.min())  # squares of what remains do not overflow
    narrow = np.empty_like(matrix, dtype=np.float32)
    np.divide(matrix, scale, out=narrow, casting="same_kind")
    start = np.random.default_rng(0).standard_normal((size, COLUMNS)).astype(np.float32)
    return float(scale) * _find_largest(narrow, start)[2]


def _find_largest(matrix: Any, start: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
    """Find a space that the largest singular value shows in.

    Returns:
        An orthonormal basis (n, k), what the matrix makes of it, and the singular value.
    """
    block = np.linalg.qr(start)[0]
    basis, image = block, matrix @ block
    largest = float(np.linalg.norm(image, 2))
    while basis.shape[1] + COLUMNS <= min(MOST_COLUMNS, len(basis)):
        block = matrix.T @ image[:, -COLUMNS:]
        for _ in range(2):  # rounding leaves something of the space in the first difference
            block = np.linalg.qr(block - basis @ (basis.T @ block))[0]
        basis, image = np.hstack([basis, block]), np.hstack([image, matrix @ block])
        # The small Gram matrix has the squares of the singular values.
        before, largest = largest, float(np.linalg.eigvalsh(image.T @ image)[-1]) ** 0.5
        if largest - before <= CONVERGED * largest:
            break
    return basis, image, largest
