"""Rounding one matrix to MLX's quantized formats, to nearest or with error feedback.

A matrix here is as files hold it, (out, in); groups of weights that share a scale lie along its
inputs.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import mlx.core as mx
import numpy as np

BLOCK = 128  # inputs that are rounded one by one before the rest learns of their errors
ROWS = 1024  # of codes packed at a time
# Codes of 1 in the floating formats: of a weight by its bits, of a scale by its mode.
ONE = {4: 0x2, 8: 0x38}
WIDE = 128  # inputs, a whole number of groups, that MLX unpacks in every mode
UNIT_SCALE = {"mxfp4": 127, "mxfp8": 127, "nvfp4": 0x38}

Packed = dict[str, mx.array]  # "weight", "scales" and, in affine mode, "biases"


@dataclass(frozen=True)
class Format:
    """One of MLX's quantized formats; ``dtype`` is that of affine scales and biases."""

    bits: int
    group_size: int
    mode: str
    dtype: mx.Dtype = mx.float32

    def nearest(self, weight: mx.array) -> Packed:
        """The matrix (out, in) with each weight rounded to nearest, as ``mx.quantize`` does it."""
        parts = mx.quantize(weight.astype(self.dtype), self.group_size, self.bits, mode=self.mode)
        return dict(zip(("weight", "scales", "biases"), parts, strict=False))

    def dense(self, packed: Mapping[str, mx.array]) -> mx.array:
        """What a packed matrix stands for, (out, in), float32."""
        scales, biases = packed["scales"], packed.get("biases")
        if biases is not None:
            scales, biases = scales.astype(mx.float32), biases.astype(mx.float32)
        return mx.dequantize(
            packed["weight"], scales, biases, self.group_size, self.bits, self.mode,
            dtype=mx.float32,
        )  # fmt: skip

    def with_feedback(self, weight: np.ndarray, gram: np.ndarray, damping: float = 0.01) -> Packed:
        """The matrix rounded so that its outputs stay, rather than its weights.

        Inputs are rounded one after another; each one's error is made up for, as far as inputs
        are correlated, by those that follow (GPTQ: Frantar et al., arXiv 2210.17323, section 3). A
        group's scale is set when its turn comes.

        Args:
            weight: (out, in).
            gram: (in, in), the inputs' X^T X.
            damping: added to the diagonal, as a share of its mean.
        """
        n_in = weight.shape[1]
        follows = _feedback(gram, damping)
        target = np.ascontiguousarray(weight.T, dtype=np.float32)  # (in, out)
        error = np.zeros_like(target)
        codes = np.empty(target.shape, dtype=np.uint8)
        scales: list[mx.array] = []
        biases: list[mx.array] = []
        for start in range(0, n_in, max(BLOCK, self.group_size)):
            end = min(start + max(BLOCK, self.group_size), n_in)
            # What earlier blocks left to make up for, then what this block adds to it.
            due = follows[start:end, :start] @ error[:start]
            within = follows[start:end, start:end]
            for i in range(start, end):
                if (i - start) % self.group_size == 0:
                    # What the group would be, could it make up for all that came before it.
                    inner = slice(i - start, i - start + self.group_size)
                    change = np.linalg.solve(within[inner, inner], due[inner])
                    wanted = target[i : i + self.group_size] - change
                    parts = self.nearest(mx.array(np.ascontiguousarray(wanted.T)))
                    scales.append(parts["scales"])
                    biases += [parts["biases"]] if "biases" in parts else []
                    rounder = self._rounder(parts)
                codes[i], value = rounder(target[i] - due[i - start])
                error[i] = value - target[i]
                due[i - start + 1 :] += within[i - start + 1 :, i - start, None] * error[i]
        packed = {"weight": mx.array(_pack(codes.T, self.bits))}
        packed["scales"] = mx.concatenate(scales, axis=1)
        if biases:
            packed["biases"] = mx.concatenate(biases, axis=1)
        return packed

    def _rounder(self, parts: Packed):
        """For one group's scales, a function of weights (out,) to their codes and values."""
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
        scale = self._decoded(parts["scales"])
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

    def _decoded(self, scales: mx.array) -> np.ndarray:
        """A floating format's scales (out, 1) as numbers (out,)."""
        scales = mx.tile(scales, (1, WIDE // self.group_size))
        ones = np.full((scales.shape[0], WIDE), ONE[self.bits], dtype=np.uint8)
        packed = {"weight": mx.array(_pack(ones, self.bits)), "scales": scales}
        return np.array(self.dense(packed))[:, 0]


def plus_diagonal(gram: np.ndarray, added: float) -> np.ndarray:
    """A copy of a square matrix with a number added to its diagonal."""
    out = gram.copy()
    np.einsum("ii->i", out)[:] += added
    return out


def _feedback(gram: np.ndarray, damping: float) -> np.ndarray:
    """How much each input (row) makes up for the error of each earlier one (column).

    |D X^T|_F^2 = |D R|_F^2 for gram = R R^T with R upper triangular: column j of D R holds the
    error of input j and of those before it, and vanishes but for rounding if j makes up for them.
    """
    damped = plus_diagonal(gram, damping * np.mean(np.diag(gram)) or 1.0)
    upper = np.linalg.cholesky(damped[::-1, ::-1])[::-1, ::-1]
    return np.ascontiguousarray((upper / np.diag(upper)).T, dtype=np.float32)


def _pack(codes: np.ndarray, bits: int) -> np.ndarray:
    """Codes (out, in) as MLX stores them, (out, in * bits / 32): a row's bits, low ones first."""
    rows = []
    for start in range(0, len(codes), ROWS):
        spread = codes[start : start + ROWS, :, None] >> np.arange(bits, dtype=np.uint8) & 1
        stream = np.packbits(spread.reshape(len(spread), -1), axis=1, bitorder="little")
        rows.append(stream.view("<u4"))
    return np.concatenate(rows)
