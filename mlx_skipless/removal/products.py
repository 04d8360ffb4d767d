"""Precision: in which types matrices are read, multiplied and stored.

A product with an inverse is a solution in float64, whatever its operands: an inverse magnifies the
rounding that it meets by its condition number. Any other product runs in its operands' type, which
``choose_working_type`` picks by the type that the result is stored in: float64 for float32, float32
for 16 bits. Vectors cost nothing and stay float64.

A float32 product's error is 1e-4 of what storing it in bfloat16 rounds away and 2e-3 of what
float16 does, at Mistral-7B's width (``docs/conversion.md``). A GPU may round its operands to 11
significant bits (TF32). Weights of 16 bits lose nothing by that. Weights that a norm's weight was
folded into lose an eighth of what bfloat16 rounds away, and as much as float16 does.

NumPy multiplies on a CPU: its wheels bring the faster BLAS on Linux and Accelerate on a Mac. A GPU
has no float64, so it is used for products in float32 only.
"""

from collections.abc import Mapping

import mlx.core as mx
import numpy as np

from ..checkpoints.safetensors import is_float
from ..errors import UserError
from ..network.parts import dtype_name
from .factors import Factors

# Half the distance from 1 to the next number: the largest relative error of rounding.
UNIT_ROUNDOFF = {mx.float32: 2.0**-24, mx.bfloat16: 2.0**-8, mx.float16: 2.0**-11}
# Silences NumPy's warnings: what overflows is refused by name when it is stored.
ignore_overflow = np.errstate(over="ignore", invalid="ignore")


def choose_working_type(stored: mx.Dtype) -> type[np.floating]:
    """Choose the NumPy type to compute matrices in that will be stored in an MLX type."""
    return np.float64 if stored == mx.float32 else np.float32


class Inverse:
    """The inverse of a square matrix, never formed: ``@`` solves a linear system in float64.

    The matrix is factored once, when first needed. The result has the other operand's type.

    Args:
        of: the matrix.
        transposed: whether this is the inverse of its transpose.
    """

    __array_ufunc__ = None  # so that NumPy leaves ``array @ inverse`` to this class

    def __init__(self, of: np.ndarray | Factors, transposed: bool = False):
        self._factors = of if isinstance(of, Factors) else Factors(of)
        self._transposed = transposed

    @property
    def T(self) -> "Inverse":
        return Inverse(self._factors, not self._transposed)

    def factor(self) -> None:
        """Factor the matrix now, before several threads solve with it.

        Raises:
            numpy.linalg.LinAlgError: if the matrix is singular.
        """
        self._factors.factor()

    def __matmul__(self, other: np.ndarray) -> np.ndarray:
        factors = self._factors
        found = (factors.solve_transposed if self._transposed else factors.solve)(other)
        return found.astype(other.dtype, copy=False)

    def __rmatmul__(self, other: np.ndarray) -> np.ndarray:
        return (self.T @ other.T).T


def multiply(a: np.ndarray | Inverse, b: np.ndarray | Inverse) -> np.ndarray:
    """Compute ``a @ b``; at most one of the two is an ``Inverse``.

    The result is laid out row by row if ``a`` is, else column by column, so that its transpose is
    contiguous: files hold that, but for the embedding.
    """
    assert isinstance(a, np.ndarray) or isinstance(b, np.ndarray)
    if isinstance(a, Inverse) or isinstance(b, Inverse):
        return a @ b  # type: ignore[operator]
    if a.dtype == b.dtype == np.float32 and mx.default_device().type == mx.gpu:
        return multiply_with_mlx(b.T, a.T).T
    return a @ b if a.flags.c_contiguous else (b.T @ a.T).T


def multiply_with_mlx(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Compute ``a @ b`` in float32 on MLX's default device."""
    return np.array(mx.array(a) @ mx.array(b))


def multiply_rows(rows: mx.array, matrix: np.ndarray | Inverse) -> mx.array:
    """Compute ``rows @ matrix`` in float32, rows of shape (..., n) and the matrix (n, m)."""
    if isinstance(matrix, Inverse):
        product = np.asarray(rows).reshape(-1, rows.shape[-1]) @ matrix
        return mx.array(product).reshape(rows.shape)
    return rows @ mx.array(matrix.astype(np.float32))


def subtract_mean(values: np.ndarray) -> np.ndarray:
    """Subtract the mean of the last axis, which is taken in float64."""
    mean = values.mean(-1, keepdims=True, dtype=np.float64)
    return values - mean.astype(values.dtype)


def to_numpy(name: str, array: mx.array, kind: type[np.floating]) -> np.ndarray:
    """Convert a tensor of a checkpoint into a NumPy array.

    Raises:
        UserError: if it holds NaN or infinity.
    """
    values = np.asarray(array.astype(mx.float32))
    if not np.isfinite(values).all():
        _refuse_not_finite(name)
    return values.astype(kind, copy=False)


def to_stored(name: str, values: np.ndarray, dtype: mx.Dtype) -> mx.array:
    """Round a tensor of a result to the type that it is stored in.

    Raises:
        UserError: if it holds NaN or infinity, or numbers that the type cannot hold.
    """
    largest = float(max(values.max(initial=0), -values.min(initial=0)))
    if largest > float(np.finfo(np.float32).max):
        raise UserError(f"{name} does not fit float32 (largest value {largest:.3g})")
    return cast_finite(name, mx.array(np.ascontiguousarray(values, dtype=np.float32)), dtype)


def cast_finite(name: str, array: mx.array, dtype: mx.Dtype) -> mx.array:
    """Cast a tensor to another type.

    Raises:
        UserError: if it holds NaN or infinity, before or because the type is too narrow.
    """
    cast = array.astype(dtype)
    if not is_finite(cast):
        if is_finite(array):
            wider = "bfloat16 or float32" if dtype == mx.float16 else "float32"
            raise UserError(
                f"{name} does not fit {dtype_name(dtype)} (largest value "
                f"{mx.abs(array).max().item():.3g}): use --dtype {wider}"
            )
        _refuse_not_finite(name)
    return cast


def check_finite(tensors: Mapping[str, mx.array]) -> None:
    """Check a checkpoint's tensors, of which those that are no floats are packed.

    Raises:
        UserError: if one holds NaN or infinity.
    """
    for name, array in tensors.items():
        if is_float(array.dtype) and not is_finite(array):
            _refuse_not_finite(name)


def is_finite(array: mx.array) -> bool:
    """Whether no element is NaN or infinite; several times faster than MLX's own on a CPU.

    NumPy has no bfloat16, so types of 16 bits are tested by the bits of their exponent.
    """
    if array.dtype == mx.float32:
        return bool(np.isfinite(np.asarray(array)).all())
    exponent = {mx.bfloat16: 0x7F80, mx.float16: 0x7C00}[array.dtype]
    return bool((np.asarray(array.view(mx.uint16)) & 0x7FFF).max(initial=0) < exponent)


def _refuse_not_finite(name: str) -> None:
    raise UserError(f"{name} holds NaN or infinity: the checkpoint is broken, download it again")
