"""Inverses of matrices that are factored once, and the norms that are estimated with them."""

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from factory import make_checkpoint
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_skipless.checkpoints.checkpoint import open_checkpoint
from mlx_skipless.removal import factors
from mlx_skipless.removal.algebra import measure_conditioning
from mlx_skipless.removal.factors import Factors
from mlx_skipless.removal.merger import Merger
from mlx_skipless.removal.plan import make_plan

SPECTRA = {
    "even": lambda n, condition: np.linspace(1, 1 / condition, n),
    "steady": lambda n, condition: np.geomspace(1, 1 / condition, n),
    "one small": lambda n, condition: np.r_[np.ones(n - 1), 1 / condition],
    "one large": lambda n, condition: np.r_[1, np.full(n - 1, 1 / condition)],
}
CONDITIONS = [1.0, 1.5, 10.0, 1e3, 1e5, 1e8]


def draw_matrix(rng: np.random.Generator, values: np.ndarray) -> np.ndarray:
    """Draw a matrix of these singular values."""
    u, v = (np.linalg.qr(rng.standard_normal((len(values),) * 2))[0] for _ in "uv")
    return (u * values) @ v


@pytest.fixture
def small_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small matrices take more than one block, and their norms are estimated."""
    monkeypatch.setattr(factors, "BLOCK", 16)
    monkeypatch.setattr(factors, "DENSE", 64)


@settings(max_examples=25)
@given(
    st.integers(0, 2**32 - 1), st.integers(1, 70), st.sampled_from("CF"), st.booleans(),
    st.sampled_from([np.float32, np.float64]),
)  # fmt: skip
def test_systems_are_solved(
    seed: int, n: int, order: Any, vector: bool, kind: type[np.floating]
) -> None:
    """As NumPy solves them, whatever the layout of the matrix; and nothing given is changed."""
    rng = np.random.default_rng(seed)
    matrix = np.array(draw_matrix(rng, np.geomspace(1, 1e-3, n)), kind, order=order)
    wanted = rng.standard_normal(n if vector else (n, 3)).astype(kind)
    given_before = matrix.copy(), wanted.copy()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(factors, "BLOCK", 16)
        found = Factors(matrix)
        solutions = [(matrix, found.solve(wanted)), (matrix.T, found.solve_transposed(wanted))]
    for one, got in solutions:
        expected = np.linalg.solve(one.astype(np.float64), wanted.astype(np.float64))
        np.testing.assert_allclose(got, expected, rtol=0, atol=1e-9 * np.abs(expected).max())
    assert all(map(np.array_equal, (matrix, wanted), given_before))


@pytest.mark.parametrize("n", [1, 16, 40])
def test_a_singular_matrix_has_no_solution(n: int, small_is_large: None) -> None:
    with pytest.raises(np.linalg.LinAlgError):
        Factors(np.zeros((n, n))).solve(np.ones(n))


@pytest.mark.parametrize("condition", CONDITIONS)
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_estimates(spectrum: str, condition: float, small_is_large: None) -> None:
    """The condition number to a per cent, the amplification to what it is trusted to.

    Also of matrices whose numbers float32 has not.
    """
    for seed, (n, size) in enumerate(zip((20, 90, 150), (1.0, 1e60, 1e-60), strict=True)):
        matrix = size * draw_matrix(np.random.default_rng(seed), SPECTRA[spectrum](n, condition))
        measured = measure_conditioning(matrix)
        assert measured.condition == pytest.approx(np.linalg.cond(matrix), rel=0.01)
        exact = np.linalg.norm(matrix) * np.linalg.norm(np.linalg.inv(matrix)) / n
        assert measured.amplification == pytest.approx(exact, rel=0.05)


def test_estimates_of_a_random_matrix_as_large_as_they_are_for() -> None:
    matrix = np.random.default_rng(0).standard_normal((factors.DENSE + 100,) * 2)
    measured = measure_conditioning(matrix)
    assert measured.condition == pytest.approx(np.linalg.cond(matrix), rel=0.01)
    exact = np.linalg.norm(matrix) * np.linalg.norm(np.linalg.inv(matrix)) / len(matrix)
    assert measured.amplification == pytest.approx(exact, rel=0.01)


@pytest.mark.parametrize("condition", CONDITIONS[1:5])
def test_what_decides_is_no_estimate(condition: float, small_is_large: None) -> None:
    """The amplification near a limit."""
    rng = np.random.default_rng(0)
    matrix = draw_matrix(rng, SPECTRA["steady"](150, condition))
    exact = np.linalg.norm(matrix) * np.linalg.norm(np.linalg.inv(matrix)) / len(matrix)
    estimated = measure_conditioning(matrix, [2 * exact]).amplification
    assert estimated != pytest.approx(exact, rel=1e-8)
    near = measure_conditioning(matrix, [2 * exact, estimated])
    assert near.amplification == pytest.approx(exact, rel=1e-8)


def test_extra_bits_are_no_estimates(small_is_large: None) -> None:
    """Of matrices whose amplification is a little more or less than a half power of two."""
    wanted = set()
    for seed, condition in enumerate(np.linspace(4.38, 4.43, 8)):
        matrix = draw_matrix(np.random.default_rng(seed), SPECTRA["steady"](150, condition))
        exact = np.linalg.norm(matrix) * np.linalg.norm(np.linalg.inv(matrix)) / len(matrix)
        assert measure_conditioning(matrix).extra_bits == round(float(np.log2(exact)))
        wanted.add(round(float(np.log2(exact))))
    assert wanted == {0, 1}


@pytest.mark.parametrize(
    ("options", "inverses"),
    [({"remove": "qp"}, 2), ({"remove": "kp"}, 2), ({"remove": "p"}, 0), ({"remove": "none"}, 0)],
)
def test_a_matrix_is_factored_once_and_only_if_need_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], inverses: int
) -> None:
    """What reads it, what writes it and their biases take one factorisation."""
    make_checkpoint(tmp_path, num_hidden_layers=2, num_key_value_heads=4, bias=("q_proj",))
    made: list[tuple[int, ...]] = []
    factor = mx.linalg.lu_factor

    def lu_factor(matrix: mx.array, **where: Any) -> Any:
        made.append(matrix.shape)
        return factor(matrix, **where)

    monkeypatch.setattr(mx.linalg, "lu_factor", lu_factor)
    checkpoint = open_checkpoint(tmp_path)
    merger = Merger(checkpoint, make_plan(checkpoint.args, **options), mx.float32)
    merger.embedding()
    for layer in range(2):
        merger.layer(layer)
    merger.head()
    assert len(made) == inverses
