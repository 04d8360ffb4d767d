"""The algebra of removals: changes of basis between a network's matrices.

Letters are those of Graef, *KV-weights are all you need for skipless transformers*, arXiv
2404.12362: Q, K, V, P (``o_proj``), M (``gate_proj`` and ``up_proj``) and O (``down_proj``). In
this file a matrix is (in, out) and acts on rows, ``x @ W``; files hold its transpose.

Between two nonlinearities the stream x is only linear, so its basis there is free. A basis at a
point of the stream is x* = (x + s) T, with T invertible. Each matrix that writes the point becomes
W T, each matrix that reads it becomes T^-1 W, and the function of the network stays what it was.
Each exact removal is one choice of T:

    point                  writers             readers            T       what goes
    ---------------------  ------------------  -----------------  ------  --------------------------
    block input, serial    O of the layer      Q, K, V            Q       Q: O* = O Q,
                           before, or the                                 K* = Q^-1 K, V* = Q^-1 V
                           embedding                              K or V  K or V, where it is square
                           the same            Q alone            Q       Q: O* = O Q, no inverse is
                                                                          needed
    attention's output,    P                   M (and a           P^-1    P: M* = P M, no inverse is
    serial                                     mixture's router)          needed, P has any shape
    block input, parallel  P and O of the      Q, K, V, M; the    Q, or   one of Q and P
                           layer before, or    head behind the    P^-1
                           the embedding       last block
    behind an RMS norm     none                what reads it      1 / g   the norm's weight g:
                                                                          W* = diag(g) W
    any, behind LayerNorm  what writes it      none changes       C       the norm's mean: W* = W C,
                                                                          C = I - 1 1^T / n

Q alone reads the stream where K and V read a norm of the queries.

A query skip adds alpha q to what P reads, and a head skip adds gamma times what P read in the layer
before to q. No T acts on q or on what P reads, so both vectors stay what they are.

A bias b is a row that W adds. With T = Q, s = b Q^-1, so that the readers see (x + s) Q = x Q + b;
with T = P^-1, s = -b. One writer of the point adds s, and each reader subtracts s W from its bias.
Where a network multiplies what W writes by a number c before that is the point, as it may do with
the embedding, W adds s / c.

The functions below are these equations. ``products.py`` says in which precision they run.
"""

import math
from collections.abc import Collection
from dataclasses import dataclass, replace

import mlx.core as mx
import numpy as np

from .factors import measure_largest, measure_norms
from .products import Inverse, multiply, multiply_rows, subtract_mean

SURE = 4  # standard errors that an estimate is trusted to


@dataclass(frozen=True)
class Linear:
    """The map y = x @ weight + bias; weight (in, out), bias (out,) in float64."""

    weight: np.ndarray
    bias: np.ndarray | None = None


@dataclass(frozen=True)
class Basis:
    """The basis x* = (x + shift) @ matrix, T and s in this file's first lines.

    Attributes:
        matrix: T, (n, n); None where nothing is left that writes the point.
        inverse: T^-1, (n, n); of any shape where nothing is left that writes the point.
        shift: s, (n,).
    """

    matrix: np.ndarray | Inverse | None
    inverse: np.ndarray | Inverse
    shift: np.ndarray | None = None

    def split(self, columns: int) -> list["Basis"]:
        """Split T into so many columns each, for parts of what writes the point.

        An inverse stays whole.
        """
        matrix = self.matrix
        if not isinstance(matrix, np.ndarray):
            return [self]
        starts = range(0, matrix.shape[1], columns)
        return [replace(self, matrix=matrix[:, i : i + columns]) for i in starts]


def basis_without_reader(q: Linear) -> Basis:
    """Make the basis in which a reader of the point (Q, K or V) is the identity, without bias."""
    # T = Q and s = b Q^-1: what was x Q + b is x* itself.
    inverse = Inverse(q.weight)
    return Basis(q.weight, inverse, None if q.bias is None else q.bias @ inverse)


def basis_without_writer(p: Linear, *, alone: bool) -> Basis:
    """Make the basis in which a writer of the point (P) is the identity, without bias.

    Args:
        p: the writer.
        alone: whether no other matrix writes the point; P needs no inverse then.
    """
    # T = P^-1 and s = -b: what was h P + b is h itself.
    matrix = None if alone else Inverse(p.weight)
    return Basis(matrix, p.weight, None if p.bias is None else -p.bias)


def transpose_basis(basis: Basis) -> Basis:
    """Make the basis at the other end of a tied embedding, from that at one end.

    The logits x E^T stay if E* = E T and x* = x T^-T.
    """
    assert basis.matrix is not None
    return Basis(basis.inverse.T, basis.matrix.T)


def change_basis(
    linear: Linear,
    *,
    reads: Basis | None = None,
    writes: Basis | None = None,
    shift_share: float = 0.0,
) -> Linear:
    """Express a matrix in new bases of the points that it reads and writes.

    Args:
        linear: the matrix in the old bases.
        reads: the new basis of its input; None where it is the old one.
        writes: the new basis of its output; None where it is the old one.
        shift_share: times the shift of ``writes`` that this writer adds. One of a point's writers
            must add it once, as it arrives at the point; the others add nothing.
    """
    weight, bias = linear.weight, linear.bias
    if reads is not None:
        # x W + b = (x* T^-1 - s) W + b = x* (T^-1 W) + (b - s W)
        if reads.shift is not None:
            bias = (0 if bias is None else bias) - reads.shift @ weight
        weight = multiply(reads.inverse, weight)
    if writes is not None:
        # c (x W + b + s / c) T = c (x (W T) + (b + s / c) T)
        assert writes.matrix is not None
        if shift_share and writes.shift is not None:
            bias = (0 if bias is None else bias) + shift_share * writes.shift
        weight = multiply(weight, writes.matrix)
        bias = None if bias is None else bias @ writes.matrix
    return Linear(weight, bias)


def rewrite_stream(outputs: mx.array, basis: Basis, *, shift_share: float) -> mx.array:
    """Express what one writer of a point gave, (..., n), in the point's new basis, in float32."""
    # (x + s / c) T, s by the writer that adds it
    assert basis.matrix is not None
    if shift_share and basis.shift is not None:
        outputs = outputs + mx.array((shift_share * basis.shift).astype(np.float32))
    return multiply_rows(outputs, basis.matrix)


def fold_norm(
    norm_weight: np.ndarray | None, norm_bias: np.ndarray | None, linear: Linear
) -> Linear:
    """Put a norm's weight and bias, both (in,), into the matrix that reads the norm.

    See Graef et al., *FlashNorm*, arXiv 2407.09577, sections 2 and 3.
    """
    weight, bias = linear.weight, linear.bias
    # (x g + c) W + b = x (diag(g) W) + (b + c W)
    if norm_bias is not None:
        bias = (0 if bias is None else bias) + norm_bias @ weight
    if norm_weight is not None:
        weight = norm_weight[:, None].astype(weight.dtype) * weight
    return Linear(weight, bias)


def centre(linear: Linear) -> Linear:
    """Take the mean out of a matrix's outputs, so that a LayerNorm behind it can be an RMS norm.

    See Ashkboos et al., *SliceGPT*, arXiv 2401.15024, section 3.2.
    """
    # W C and b C, with C = I - 1 1^T / n
    bias = linear.bias
    return Linear(subtract_mean(linear.weight), None if bias is None else subtract_mean(bias))


@dataclass(frozen=True)
class Conditioning:
    """How much a change of basis by one matrix X magnifies noise.

    Attributes:
        condition: the condition number in the 2-norm.
        amplification: |X|_F |X^-1|_F / n. White noise on the stream in the new basis grows by this
            factor, relative to white signal, on its way back; 1 for an orthogonal matrix.
    """

    condition: float
    amplification: float

    @property
    def extra_bits(self) -> int:
        """Bits that the matrices around this basis need on top when quantized, for equal noise."""
        return max(0, round(math.log2(min(self.amplification, 2.0**32))))


def measure_conditioning(matrix: np.ndarray, limits: Collection[float] = ()) -> Conditioning:
    """Measure the conditioning of a square matrix; infinite if it is singular.

    Of a large matrix it is estimated: the condition number to about a per cent, the amplification
    to a few tenths of one. Where an error of four standard errors could move the amplification
    across a limit, or change the extra bits, it is computed.

    Args:
        matrix: (n, n).
        limits: amplifications that decide something.
    """
    size, inverse = len(matrix), Inverse(matrix)
    try:
        largest, frobenius, error = measure_norms(inverse, size)
    except np.linalg.LinAlgError:
        return Conditioning(math.inf, math.inf)
    scale = float(np.linalg.norm(matrix)) / size
    low = Conditioning(1, scale * max(frobenius - SURE * error, frobenius / 2))
    high = Conditioning(1, scale * (frobenius + SURE * error))
    near = any(low.amplification <= limit <= high.amplification for limit in limits)
    if error and (near or low.extra_bits != high.extra_bits):
        frobenius = float(np.linalg.norm(inverse @ np.eye(size)))
    condition = measure_largest(matrix) * largest
    return Conditioning(condition, scale * frobenius)


def measure_condition_number(matrix: np.ndarray) -> float:
    """Measure the ratio of the largest to the smallest singular value; infinite if singular.

    The matrix has any shape; of (n, m), the min(n, m) largest singular values count.
    """
    rows, columns = matrix.shape
    if rows == columns:
        return measure_conditioning(matrix).condition
    # The eigenvalues of the smaller of W W^T and W^T W are the squared singular values.
    gram = matrix @ matrix.T if rows < columns else matrix.T @ matrix
    squares = np.linalg.eigvalsh(gram)
    # Below this ratio the squares hold nothing but rounding.
    return math.sqrt(squares[-1] / squares[0]) if squares[0] > 1e-14 * squares[-1] else math.inf
