"""Fits a matrix to the outputs that it should give, by least squares on what a text brings it.

A matrix here is (in, out), as ``x @ W`` reads it. Two streams of numbers are enough to fit one: the
second moments of its inputs and their products with the outputs that are wanted.
"""

from collections.abc import Mapping
from typing import Any

import mlx.core as mx
import numpy as np

from ..network.driver import BATCH_TOKENS
from ..network.model import ModelArgs
from ..removal.moments import (
    MOST_WIDE,
    Moments,
    factor_ridged,
    pick_outputs,
    solve_factored,
    to_float64,
)
from .coverage import find_widest
from .formats import Format, Packed, solve_feedback

TEXT_TOKENS = 1 << 14  # that calibrate, at most
RIDGES = (1e-4, 1e-2, 0.1, 0.3, 1.0, 3.0)  # tried, as shares of the inputs' mean square
STACKED = 1 << 22  # weights of a matrix that is rounded together with others, at most


def estimate_memory(args: ModelArgs) -> int:
    """Estimate the bytes that calibrating takes at most, beside a layer's weights."""
    return estimate_moments(find_widest(args), args.hidden_size)


def estimate_moments(widest: int, hidden: int) -> int:
    """Estimate the same for a stream's width and the inputs of the widest matrix."""
    squares, products = (n * (8 if n <= MOST_WIDE else 4) for n in (widest**2, widest * hidden))
    moments = 5 * squares + 20 * products  # with a factor's and a rounding's copies
    held = 4 * TEXT_TOKENS * (widest + 4 * hidden)  # what matrices read and give in one layer
    return moments + 8 * 4 * BATCH_TOKENS * widest + held


def fit_matrices(
    seen: Moments, judge: Moments, priors: Mapping[str, mx.array], forms: Mapping[str, Format]
) -> dict[str, Packed]:
    """Fit matrices that read the same, and round them with error feedback.

    Args:
        seen: what the fits see; all text afterwards.
        judge: what chooses among them; empty afterwards.
        priors: what is known of the matrices, (out, in) each, by their names in both.
        forms: how each is rounded, by name.
    """
    weights = fit_weights(seen, judge, priors, forms)
    seen.absorb(judge)
    return round_together(weights, seen.gram, forms)


def round_together(
    weights: Mapping[str, np.ndarray], gram: np.ndarray, forms: Mapping[str, Format]
) -> dict[str, Packed]:
    """Round matrices (out, in), by name, whose inputs have the same X^T X, with error feedback."""
    stacks: dict[Any, list[str]] = {}
    for name, weight in weights.items():
        # A row's rounding does not depend on others: small matrices go one below the other.
        alone = name if weight.size > STACKED else None
        stacks.setdefault((forms[name], alone), []).append(name)
    packed: dict[str, Packed] = {}
    feedback = solve_feedback(gram)
    for (form, _), names in stacks.items():
        parts = form.with_feedback(np.concatenate([weights[name] for name in names]), feedback)
        ends = np.cumsum([len(weights[name]) for name in names]).tolist()
        for part, array in parts.items():
            for name, rows in zip(names, mx.split(array, ends[:-1]), strict=True):
                packed.setdefault(name, {})[part] = rows
    return {name: packed[name] for name in weights}


def fit_weights(
    seen: Moments, judge: Moments, priors: Mapping[str, mx.array], forms: Mapping[str, Format]
) -> dict[str, np.ndarray]:
    """Fit the weights that give the wanted outputs best once they are rounded.

    Ridge regressions towards a prior W0 are tried with several ridges r:

        W = argmin |X W - Y|^2 + r |W - W0|^2    = (X^T X + r I)^-1 (X^T Y + r W0)

    The one that errs least on ``judge`` when it is rounded to nearest wins, or the prior itself. A
    pull towards zero would err less still by making all outputs smaller, which adds up over layers.

    Args:
        seen: what the regressions fit.
        judge: what chooses among them, for each matrix alone.
        priors: W0^T of each matrix, (out, in), by its name in both; all read the same X.
        forms: how each will be rounded, by name.

    Returns:
        W^T (out, in) by name, in float32, not rounded yet.
    """
    gram = seen.gram
    size = np.mean(np.diag(gram))
    searches = {name: _Search(judge, name, prior, forms[name]) for name, prior in priors.items()}
    for added in (ridge * size for ridge in RIDGES if size):
        if (lower := factor_ridged(gram, added)) is None:
            continue
        sides = [
            seen.cross[name][:, search.some] + added * search.prior
            for name, search in searches.items()
        ]
        solved = solve_factored(lower, np.hstack(sides))  # for all at once
        del lower  # as large as the sums
        ends = np.cumsum([side.shape[1] for side in sides])[:-1]
        for search, weight in zip(searches.values(), np.split(solved, ends, axis=1), strict=True):
            search.judge(weight, added)
    weights = {name: np.array(prior.astype(mx.float32)) for name, prior in priors.items()}
    for added in {search.best for search in searches.values()} - {0.0}:
        lower = factor_ridged(gram, added)
        assert lower is not None
        for name, search in searches.items():
            if search.best == added:
                wanted = seen.cross[name] + added * weights[name].T
                weights[name] = solve_factored(lower, wanted).T.astype(np.float32)
    return weights


class _Search:
    """The search for one matrix's ridge.

    Attributes:
        some: the outputs that choose.
        prior: what is known of these, (in, some outputs).
        best: what is added to the diagonal; 0: the prior itself.
    """

    def __init__(self, judge: Moments, name: str, prior: mx.array, form: Format):
        self._judge, self._name, self._form = judge, name, form
        self.some = pick_outputs(len(prior))
        self.prior = to_float64(prior[mx.array(self.some)]).T
        self.best = 0.0
        self._least = self._measure(self.prior)

    def judge(self, weight: np.ndarray, added: float) -> None:
        """Take a candidate (in, some outputs) if it errs less than all before."""
        error = self._measure(weight)
        if error < self._least:
            self.best, self._least = added, error

    def _measure(self, weight: np.ndarray) -> float:
        return self._judge.error(self._name, _round(weight, self._form), self.some)


def _round(weight: np.ndarray, form: Format) -> np.ndarray:
    stored = mx.array(np.ascontiguousarray(weight.T, dtype=np.float32))
    return np.array(form.dense(form.nearest(stored))).T
