"""Rounding one matrix to MLX's quantized formats, to nearest or with error feedback.

A matrix here is as files hold it, (out, in); groups of weights that share a scale lie along its
inputs.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property

import mlx.core as mx
import numpy as np

from ..network.parts import unpack
from ..removal.moments import factor, ridged
from .scales import Search

BLOCK = 128  # inputs that are rounded one by one before the rest learns of their errors
ROWS = 1024  # of codes packed at a time
# Codes of 1 in the floating formats: of a weight by its bits, of a scale by its mode.
ONE = {4: 0x2, 8: 0x38}
WIDE = 128  # inputs, a whole number of groups, that MLX unpacks in every mode
EVEN = 32  # a multiple of so many numbers MLX quantizes in every mode, on a CPU too
UNIT_SCALE = {"mxfp4": 127, "mxfp8": 127, "nvfp4": 0x38}

Packed = dict[str, mx.array]  # "weight", "scales" and, in affine mode, "biases"
# Gives the codes and the values of weights.
Rounder = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]


@dataclass(frozen=True)
class Format:
    """One of MLX's quantized formats.

    ``dtype`` is the number type of affine mode's scales and biases.
    """

    bits: int
    group_size: int
    mode: str
    dtype: mx.Dtype = mx.float32

    def nearest(self, weight: mx.array) -> Packed:
        """Round each weight of a matrix (out, in) to nearest, as ``mx.quantize`` does."""
        weight = weight.astype(self.dtype)
        rows = len(weight)
        if weight.size % EVEN:
            weight = mx.concatenate([weight, weight[-1:]])
        parts = mx.quantize(weight, self.group_size, self.bits, mode=self.mode)
        cut = (part[:rows] for part in parts)
        return dict(zip(("weight", "scales", "biases"), cut, strict=False))

    def dense(self, packed: Mapping[str, mx.array]) -> mx.array:
        """Return what a packed matrix stands for, (out, in), in float32."""
        return unpack(
            packed["weight"], packed["scales"], packed.get("biases"),
            self.group_size, self.bits, self.mode,
        )  # fmt: skip

    def with_feedback(self, weight: np.ndarray, feedback: "Feedback") -> Packed:
        """Round the matrix so that its outputs stay, rather than its weights.

        Inputs are rounded one after another. Each one's error is made up for by those that follow,
        as far as inputs are correlated (GPTQ: Frantar et al., arXiv 2210.17323, section 3). A
        group's scale is set when its turn comes; in affine mode it is searched for.

        Args:
            weight: (out, in).
            feedback: of the inputs.
        """
        n_in = weight.shape[1]
        follows, matters = feedback.follows, feedback.costs
        target = np.ascontiguousarray(weight.T, dtype=np.float32)  # (in, out)
        error = np.zeros_like(target)
        codes = np.empty(target.shape, dtype=np.uint8)
        groups: list[Packed] = []
        for start in range(0, n_in, max(BLOCK, self.group_size)):
            end = min(start + max(BLOCK, self.group_size), n_in)
            # What this block's inputs have to make up for, due = F E (the paper's lazy batches,
            # step 2): here the errors of earlier blocks, in one product; then each new error.
            rows = np.ascontiguousarray(follows[start:end, :end])  # which NumPy multiplies fast
            due, within = rows[:, :start] @ error[:start], rows[:, start:]
            for i in range(start, end):
                if (i - start) % self.group_size == 0:
                    # The scale is that of the weights the group is about to have: those that
                    # follow in it will make up for errors, its first ones for all before it.
                    inner = slice(i - start, i - start + self.group_size)
                    change = np.linalg.solve(within[inner, inner], due[inner])
                    wanted = target[i : i + self.group_size] - change
                    groups.append(self._scale(wanted.T, matters[i : i + self.group_size]))
                    rounder = self._make_rounder(groups[-1])
                # quant(w - due), and its error beyond what the weight was to be (equation 2).
                codes[i], value = rounder(target[i] - due[i - start])
                error[i] = value - target[i]
                # The rest of the block learns of it (equation 3).
                due[i - start + 1 :] += within[i - start + 1 :, i - start, None] * error[i]
        packed = {"weight": mx.array(_pack(codes.T, self.bits))}
        for part in groups[0].keys() - packed.keys():
            packed[part] = mx.concatenate([group[part] for group in groups], axis=1)
        return packed

    def _scale(self, weights: np.ndarray, matters: np.ndarray) -> Packed:
        """Choose the scales of a group, (out, group); an error's square costs (group,) so much."""
        weights = np.ascontiguousarray(weights)
        parts = self.nearest(mx.array(weights))
        if self.mode != "affine":
            return parts
        scale, bias = (np.array(parts[name].astype(mx.float32)) for name in ("scales", "biases"))
        scale, bias = Search(weights, matters, self.bits, self._store).improve(scale, bias)
        return {
            name: mx.array(a).astype(self.dtype)
            for name, a in (("scales", scale), ("biases", bias))
        }

    def _store(self, numbers: np.ndarray) -> np.ndarray:
        """Round float32 numbers to the type of scales and biases."""
        return np.array(mx.array(numbers).astype(self.dtype).astype(mx.float32))

    def _make_rounder(self, parts: Packed) -> Rounder:
        """Make the function that rounds weights (out,) with one group's scales."""
        if self.mode == "affine":
            scale, bias = (
                np.array(parts[name].astype(mx.float32))[:, 0] for name in ("scales", "biases")
            )
            step = np.where(scale == 0, np.float32(1), scale)
            largest = 2**self.bits - 1

            def affine(weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
                code = np.clip(np.rint((weights - bias) / step), 0, largest)
                return code.astype(np.uint8), (code * scale + bias).astype(np.float32)

            return affine
        codes, values = self._levels
        between = (values[1:] + values[:-1]) / 2
        scale = self._decode(parts["scales"])
        step = np.where(scale == 0, np.float32(1), scale)

        def floating(weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            place = np.searchsorted(between, weights / step)
            return codes[place], values[place] * scale

        return floating

    @cached_property
    def _levels(self) -> tuple[np.ndarray, np.ndarray]:
        """A floating format's codes and what they stand for at scale 1, by increasing value."""
        codes = np.arange(2**self.bits, dtype=np.uint8)
        row = np.resize(codes, (1, max(codes.size, WIDE)))
        scales = mx.full((1, row.size // self.group_size), UNIT_SCALE[self.mode], dtype=mx.uint8)
        packed = {"weight": mx.array(_pack(row, self.bits)), "scales": scales}
        values = np.array(self.dense(packed))[0, : codes.size]
        # Two zeros, and in 8 bits two codes for NaN.
        order = [i for i in np.argsort(values, kind="stable") if np.isfinite(values[i])]
        order = [i for i in order if values[i] != 0 or i == 0]
        return codes[order], values[order]

    def _decode(self, scales: mx.array) -> np.ndarray:
        """Return a floating format's scales (out, 1) as numbers (out,)."""
        scales = mx.tile(scales, (1, WIDE // self.group_size))
        ones = np.full((scales.shape[0], WIDE), ONE[self.bits], dtype=np.uint8)
        packed = {"weight": mx.array(_pack(ones, self.bits)), "scales": scales}
        return np.array(self.dense(packed))[:, 0]


@dataclass(frozen=True)
class Feedback:
    """What rounding with error feedback needs of X^T X.

    Attributes:
        follows: how much each input (row) makes up for the error of each earlier one (column),
            F (in, in).
        costs: of the square of each input's error, what is left where those behind it make up for
            it, (in,), as a share of the largest.
    """

    follows: np.ndarray
    costs: np.ndarray


def solve_feedback(gram: np.ndarray, damping: float = 0.01) -> Feedback:
    """Solve for what rounding with feedback needs of X^T X (in, in).

    Errors D = W' - W (out, in) of the weights cost |D X^T|^2 = |D R|^2 for X^T X = R R^T with R
    upper triangular. Column j of D R is sum_{i <= j} d_i R_ij, the error of input j and of those
    before it. It vanishes if d_j = -sum_{i < j} d_i R_ij / R_jj, so F_ji = R_ij / R_jj. An error e
    by which d_j misses that costs e^2 R_jj^2. The paper finds the same numbers in the Cholesky
    factor of (X^T X)^-1 (section 3, step 3).

    Args:
        gram: (in, in), the inputs' X^T X.
        damping: added to its diagonal, as a share of its mean.
    """
    with ridged(gram, damping * np.mean(np.diag(gram)) or 1.0) as damped:
        # Cholesky's factor is lower triangular: of the reversed matrix it is R, reversed.
        try:
            lower = factor(damped[::-1, ::-1])
        except np.linalg.LinAlgError:  # of float32; in float64 it is positive definite
            lower = np.linalg.cholesky(damped[::-1, ::-1])
    own = np.diag(lower)
    costs = np.square(own / own.max())[::-1].astype(np.float32)
    return Feedback((lower / own).astype(np.float32, copy=False)[::-1, ::-1].T, costs)


def _pack(codes: np.ndarray, bits: int) -> np.ndarray:
    """Pack codes (out, in) as MLX does, (out, in * bits / 32): a row's bits, low ones first."""
    rows = []
    for start in range(0, len(codes), ROWS):
        spread = codes[start : start + ROWS, :, None] >> np.arange(bits, dtype=np.uint8) & 1
        stream = np.packbits(spread.reshape(len(spread), -1), axis=1, bitorder="little")
        rows.append(stream.view("<u4"))
    return np.concatenate(rows)
