"""Second moments of a text, and least squares by them, beside NumPy's in float64."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from mlx_skipless.quantization import formats
from mlx_skipless.quantization.formats import solve_feedback
from mlx_skipless.removal import moments
from mlx_skipless.removal.moments import BLOCK, Moments, factor, ridged, solve_factored


def draw_gram(width: int, dtype: type, seed: int = 0) -> np.ndarray:
    x = np.random.default_rng(seed).standard_normal((2 * width, width)).astype(dtype)
    return x.T @ x


@pytest.mark.parametrize(("dtype", "error"), [(np.float64, 1e-12), (np.float32, 1e-4)])
@pytest.mark.parametrize("width", [1, 7, BLOCK, 2 * BLOCK + 3])
def test_a_system_is_solved_by_its_factor(width: int, dtype: type, error: float) -> None:
    gram = draw_gram(width, dtype)
    right = np.random.default_rng(1).standard_normal((width, 5)).astype(dtype)
    kept = gram.copy(), right.copy()
    lower = factor(gram)
    found = solve_factored(lower, right)
    expected = np.linalg.solve(gram.astype(np.float64), right.astype(np.float64))
    assert lower.dtype == found.dtype == dtype and not np.triu(lower, 1).any()
    assert np.abs(found - expected).max() < error * np.abs(expected).max()
    assert np.array_equal(gram, kept[0]) and np.array_equal(right, kept[1])


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize("width", [3, 300])
def test_what_has_no_factor_is_refused(width: int, dtype: type) -> None:
    """Where the last number alone is at fault, too; MLX says nothing of it."""
    gram = draw_gram(width, dtype)
    gram[-1, -1] = -1
    with pytest.raises(np.linalg.LinAlgError):
        factor(gram)


def test_a_ridge_goes_again_whatever_happens() -> None:
    gram = draw_gram(9, np.float32)
    kept = gram.copy()
    with pytest.raises(ZeroDivisionError), ridged(gram, 1e30) as inside:
        assert inside is gram and np.array_equal(gram - kept, np.diag(gram.diagonal()))
        raise ZeroDivisionError
    assert np.array_equal(gram, kept)


@pytest.mark.parametrize("most_wide", [moments.MOST_WIDE, 0])
def test_moments_are_sums_and_add_up(most_wide: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In float64, or in float32 where they would be large."""
    monkeypatch.setattr(moments, "MOST_WIDE", most_wide)
    rng = np.random.default_rng(0)
    texts = [(rng.standard_normal((2, 5, 6)), rng.standard_normal((2, 5, 3))) for _ in range(5)]
    seen, judge, empty = Moments(), Moments(), Moments()
    for i, (x, y) in enumerate(texts):
        (judge if i == 2 else seen).add(mx.array(x), {"m": mx.array(y)})
    x, y = (np.concatenate(part).reshape(50, -1) for part in zip(*texts, strict=True))
    seen.absorb(empty)
    seen.absorb(judge)
    empty.absorb(seen)
    kind = np.float64 if most_wide else np.float32
    assert empty.gram.dtype == empty.cross["m"].dtype == kind and empty.count == 50
    for found, expected in (
        (empty.gram, x.T @ x), (empty.cross["m"], x.T @ y), (empty.energy["m"], (y**2).sum(0))
    ):  # fmt: skip
        assert np.abs(found - expected).max() < 1e-5 * np.abs(expected).max()
    for used in (seen, judge):
        assert not (used.count or used.gram.any() or used.cross or used.energy)


def test_feedback_is_the_same_in_both_types() -> None:
    gram = draw_gram(40, np.float64)
    found, expected = solve_feedback(gram.astype(np.float32)), solve_feedback(gram)
    assert np.abs(found.follows - expected.follows).max() < 1e-4
    assert np.abs(found.costs - expected.costs).max() < 1e-5


def test_feedback_where_float32_finds_no_factor(monkeypatch: pytest.MonkeyPatch) -> None:
    gram = draw_gram(40, np.float32)
    expected = solve_feedback(gram)

    def fail(_: np.ndarray) -> np.ndarray:
        raise np.linalg.LinAlgError

    monkeypatch.setattr(formats, "factor", fail)
    found = solve_feedback(gram)
    assert found.follows.dtype == found.costs.dtype == np.float32
    assert np.abs(found.follows - expected.follows).max() < 1e-4
