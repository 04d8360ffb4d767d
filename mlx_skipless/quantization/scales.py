"""Chooses the scales of a group of weights in affine mode, so that what matters of them stays.

The usual scale spans all of the group's weights. A narrower range cuts off a few of them and rounds
all others more finely; where that errs less, it is better.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

# Shares of the weights' own range that are tried.
SHARES = (0.95, 0.9, 0.85, 0.8, 0.75, 0.7)
REFITS = 2  # of the line through the codes that the weights have


@dataclass
class Search:
    """A search for the lines value = scale * code + bias, one for each row of a group.

    Attributes:
        weights: (rows, group).
        matters: what an error of each weight's square costs, (group,).
        bits: codes are 0 to 2^bits - 1.
        store: rounds numbers to the type that scales and biases are stored in.
    """

    weights: np.ndarray
    matters: np.ndarray
    bits: int
    store: Callable[[np.ndarray], np.ndarray]

    def improve(self, scale: np.ndarray, bias: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return lines (rows, 1) that err no more in any row than the given ones do."""
        self._best = scale, bias
        self._least = self._measure(self._encode(scale, bias), scale, bias)
        middle = (2**self.bits - 1) / 2
        for share in SHARES:  # narrower about the centre
            self._try(share * scale, bias + (1 - share) * middle * scale)
        for _ in range(REFITS):
            self._try(*self._fit(self._encode(*self._best)))
        return self._best

    def _try(self, scale: np.ndarray, bias: np.ndarray) -> None:
        """Keep a line in the rows where it errs less than the best so far."""
        scale, bias = self.store(scale), self.store(bias)
        error = self._measure(self._encode(scale, bias), scale, bias)
        better = error < self._least
        best_scale, best_bias = self._best
        self._best = np.where(better, scale, best_scale), np.where(better, bias, best_bias)
        self._least = np.where(better, error, self._least)

    def _encode(self, scale: np.ndarray, bias: np.ndarray) -> np.ndarray:
        step = np.where(scale == 0, np.float32(1), scale)
        return np.clip(np.rint((self.weights - bias) / step), 0, 2**self.bits - 1)

    def _measure(self, codes: np.ndarray, scale: np.ndarray, bias: np.ndarray) -> np.ndarray:
        return (np.square(codes * scale + bias - self.weights) @ self.matters)[:, None]

    def _fit(self, codes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Fit the lines from codes (rows, group) to their weights by weighted least squares."""
        share = (self.matters / self.matters.sum())[:, None]
        code, weight = codes @ share, self.weights @ share  # means, (rows, 1)
        off = codes - code
        spread = np.square(off) @ share
        scale = (off * (self.weights - weight)) @ share / np.where(spread == 0, 1, spread)
        return scale, weight - scale * code
