"""Products of matrices: in which precision, and by what.

A product with an inverse is a solution in float64, whatever its operands: an inverse magnifies what
rounding it meets by its condition number. Any other product runs in its operands' type, which
``working`` picks by the type that the result is stored in: float64 for float32, float32 for 16
bits. Vectors, which cost nothing, stay float64.

A float32 product's error is 1e-4 of what storing it in bfloat16 rounds away and 2e-3 of what
float16 does, at Mistral-7B's width (``docs/conversion.md``). A GPU may round its operands to 11
significant bits (TF32). Weights of 16 bits lose nothing by that; those that a gain was folded into
lose an eighth of what bfloat16 rounds away, and as much as float16 does.

NumPy multiplies on a CPU: its wheels bring the faster BLAS on Linux and Accelerate on a Mac. A GPU
knows no float64, so what is left for it is float32's products.
"""

from dataclasses import dataclass

import mlx.core as mx
import numpy as np


def choose_working_type(stored: mx.Dtype) -> type[np.floating]:
    """The type of matrices on the way to a result that is stored in another."""
    return np.float64 if stored == mx.float32 else np.float32


@dataclass(frozen=True)
class Inverse:
    """The inverse of a square matrix, never formed: ``@`` solves, in float64."""

    of: np.ndarray
    __array_ufunc__ = None  # so that NumPy leaves ``array @ inverse`` to this class

    @property
    def T(self) -> "Inverse":
        return Inverse(self.of.T)

    def __matmul__(self, other: np.ndarray) -> np.ndarray:
        found = np.linalg.solve(self.of.astype(np.float64), other.astype(np.float64))
        return found.astype(other.dtype, copy=False)

    def __rmatmul__(self, other: np.ndarray) -> np.ndarray:
        return (self.T @ other.T).T


def multiply(a: np.ndarray | Inverse, b: np.ndarray | Inverse) -> np.ndarray:
    """``a @ b``, laid out column by column, as files hold what this package calls (in, out)."""
    assert isinstance(a, np.ndarray) or isinstance(b, np.ndarray)
    if isinstance(a, Inverse) or isinstance(b, Inverse):
        return a @ b  # type: ignore[operator]
    if a.dtype == b.dtype == np.float32 and mx.default_device().type == mx.gpu:
        return by_mlx(b.T, a.T).T
    return (b.T @ a.T).T


def by_mlx(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """``a @ b`` in float32 on MLX's default device."""
    return np.array(mx.array(a) @ mx.array(b))
