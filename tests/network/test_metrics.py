"""KL and negative log likelihood against NumPy's in float64, also where they are very small."""

import math
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import reference

from mlx_skipless.network.metrics import measure_kl, measure_nll


@pytest.mark.parametrize("scale", [1e-4, 1e-2, 1.0])
def test_kl_of_small_differences(scale: float) -> None:
    rng = np.random.default_rng(0)
    a = rng.standard_normal((40, 300)).astype(np.float32) * 4
    b = (a + scale * rng.standard_normal(a.shape) + 5).astype(np.float32)
    expected = reference.softmax_kl(a[None], b[None])
    got = measure_kl(mx.array(a), mx.array(b)).mean().item()
    assert got == pytest.approx(expected, rel=2e-3, abs=1e-10)
    exact = measure_kl(a.astype(np.float64), b.astype(np.float64)).mean()
    assert exact == pytest.approx(expected, rel=1e-7)  # the sum there cancels in part


@pytest.mark.parametrize("far", [30.0, 1e3, 1e5])
def test_kl_of_networks_that_have_nothing_in_common(far: float) -> None:
    """No overflow, neither of the value nor of its gradient, which is q - p."""
    a, b = mx.array([[far, 0.0, 1.0]]), mx.array([[0.0, far, 2.0]])
    assert measure_kl(a, b).item() == pytest.approx(far, rel=0.01)
    gradient = mx.grad(lambda q: measure_kl(a, q).sum())(b)
    assert mx.allclose(gradient, mx.softmax(b) - mx.softmax(a), atol=1e-6).item()
    assert measure_kl(np.array(a), np.array(b)).item() == pytest.approx(far, rel=0.01)


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, np.float64])
def test_tokens_that_a_network_forbids(dtype: Any) -> None:
    """Their logits are -inf; it is as if they were not in the vocabulary."""
    rng = np.random.default_rng(3)
    a, b = rng.normal(0, 4, (2, 4, 30))
    wanted = reference.softmax_kl(a, b)
    both = np.full((2, 4, 33), -np.inf)
    both[..., 2:32] = a, b
    given = both if dtype is np.float64 else [mx.array(one).astype(dtype) for one in both]
    exact = dtype is np.float64
    assert float(measure_kl(*given).mean()) == pytest.approx(wanted, rel=1e-7 if exact else 2e-2)
    tokens = np.full(4, 5) if exact else mx.full(4, 5, mx.int32)
    nll = -np.log(np.exp(a[:, 3]) / np.exp(a).sum(-1))
    assert np.allclose(np.array(measure_nll(given[0], tokens)), nll, rtol=2e-2)
    if not exact:
        gradient = mx.grad(lambda q: measure_kl(given[0], q).sum())(given[1])
        assert bool(mx.isfinite(gradient).all())
    none = [np.full((4, 33), -np.inf), both[1]]  # which is no distribution
    none = none if exact else [mx.array(one).astype(dtype) for one in none]
    with np.errstate(invalid="ignore"):
        for pair in (none, none[::-1]):
            assert not math.isfinite(float(measure_kl(*pair).mean()))
    alone = np.where(np.arange(33) == 4, -np.inf, both)  # forbidden by the second only
    assert float(measure_kl(both[0], alone[1]).mean()) > 1e3
    assert float(measure_kl(alone[0], both[1]).mean()) == pytest.approx(
        reference.softmax_kl(np.delete(a, 2, -1), np.delete(b, 2, -1))
        - np.log1p(-np.exp(b[:, 2]) / np.exp(b).sum(-1)).mean(),
        rel=1e-6,
    )


def test_the_gradient_of_kl_is_the_difference_of_the_probabilities() -> None:
    rng = np.random.default_rng(1)
    a, b = (mx.array(rng.normal(0, 4, (3, 5, 50)).astype(np.float32)) for _ in range(2))
    gradient = mx.grad(lambda q: measure_kl(a, q).sum())(b)
    expected = mx.softmax(b, axis=-1) - mx.softmax(a, axis=-1)
    assert mx.allclose(gradient, expected, atol=1e-5).item()


@pytest.mark.parametrize("shape", [(7,), (3, 7), (2, 3, 50)])
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_nll(shape: tuple[int, ...], dtype: mx.Dtype) -> None:
    rng = np.random.default_rng(2)
    logits = mx.array(rng.normal(0, 4, shape).astype(np.float32)).astype(dtype)
    wide = np.array(logits.astype(mx.float32)).astype(np.float64)
    tokens = rng.integers(0, shape[-1], shape[:-1])
    p = np.exp(wide) / np.exp(wide).sum(-1, keepdims=True)
    expected = -np.log(np.take_along_axis(p, np.asarray(tokens)[..., None], axis=-1))[..., 0]
    got = measure_nll(logits, mx.array(tokens))
    assert got.dtype == mx.float32 and got.shape == shape[:-1]
    assert np.allclose(np.array(got), expected, rtol=1e-5)
    assert np.allclose(measure_nll(wide, np.asarray(tokens)), expected, rtol=1e-12)


@pytest.mark.parametrize("shape", [(7,), (3, 5), (2, 4, 11)])
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_divergence(shape: tuple[int, ...], dtype: mx.Dtype) -> None:
    rng = np.random.default_rng(len(shape))
    a, b = (mx.array(rng.normal(0, 4, shape).astype(np.float32)).astype(dtype) for _ in range(2))
    got = measure_kl(a, b)
    assert got.shape == shape[:-1] and got.dtype == mx.float32
    a64, b64 = (np.array(x.astype(mx.float32)).astype(np.float64) for x in (a, b))
    assert float(got.mean().item()) == pytest.approx(reference.softmax_kl(a64, b64), rel=1e-5)
