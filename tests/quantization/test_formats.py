"""Rounding a matrix, against MLX's own rounding and a literal GPTQ."""

import mlx.core as mx
import numpy as np
import pytest

from mlx_skipless.quantization.formats import Format, solve_feedback

FORMATS = [
    *(("affine", bits, size) for bits in (2, 3, 4, 5, 6, 8) for size in (32, 64, 128)),
    ("mxfp4", 4, 32),
    ("nvfp4", 4, 16),
    ("mxfp8", 8, 32),
]
all_formats = pytest.mark.parametrize(("mode", "bits", "size"), FORMATS)


def correlated(rng: np.random.Generator, width: int) -> np.ndarray:
    """The Gram matrix of inputs that share most of their variance."""
    basis = np.linalg.qr(rng.standard_normal((width, width)))[0]
    x = rng.standard_normal((4 * width, width)) * np.logspace(0, -1.5, width) @ basis
    return x.T @ x


def output_error(change: np.ndarray, gram: np.ndarray) -> float:
    return float(np.sum(change * (change @ gram)))


def dense(form: Format, packed: dict[str, mx.array]) -> np.ndarray:
    """What mlx's own quantized matmul sees."""
    parts = (packed["scales"], packed.get("biases"))
    n_in = packed["weight"].shape[1] * 32 // form.bits
    eye = mx.eye(n_in).astype(form.dtype)
    out = mx.quantized_matmul(
        eye, packed["weight"], *parts, transpose=True, group_size=form.group_size,
        bits=form.bits, mode=form.mode,
    )  # fmt: skip
    return np.array(out.astype(mx.float32)).T


@all_formats
def test_uncorrelated_inputs_give_nearest(mode: str, bits: int, size: int) -> None:
    """To the same scales, or in affine mode to scales that err less in every group."""
    form = Format(bits, size, mode)
    weight = np.random.default_rng(bits).standard_normal((25, 256)).astype(np.float32)
    nearest = form.nearest(mx.array(weight))
    for gram in (np.eye(256), np.zeros((256, 256))):
        packed = form.with_feedback(weight, solve_feedback(gram))
        assert packed.keys() == nearest.keys()
        for name, array in packed.items():
            assert array.dtype == nearest[name].dtype and array.shape == nearest[name].shape
        got, plain = dense(form, packed), dense(form, nearest)
        if mode == "affine":
            errors = [np.square(a - weight).reshape(25, -1, size).sum(-1) for a in (got, plain)]
            assert (errors[0] <= errors[1] * (1 + 1e-5)).all()
            assert errors[0].sum() < (0.97 if bits <= 4 else 1) * errors[1].sum()
        else:
            assert mx.array_equal(packed["scales"], nearest["scales"]).item()
            assert np.abs(got - plain).max() < 1e-6


@all_formats
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_correlated_inputs_keep_their_outputs(
    mode: str, bits: int, size: int, dtype: mx.Dtype
) -> None:
    """Far less output error than to nearest, by values that the packed parts really hold."""
    rng = np.random.default_rng(size)
    form, gram = Format(bits, size, mode, dtype), correlated(rng, 256)
    weight = rng.standard_normal((24, 256)).astype(np.float32)
    packed = form.with_feedback(weight, solve_feedback(gram))
    got = np.array(form.dense(packed))
    nearest = np.array(form.dense(form.nearest(mx.array(weight))))
    assert output_error(got - weight, gram) < 0.5 * output_error(nearest - weight, gram)
    assert np.abs(got - dense(form, packed)).max() < (1e-6 if dtype == mx.float32 else 3e-2)


def search_line(row: np.ndarray, costs: np.ndarray, bits: int) -> tuple[float, float]:
    """The best scale and bias of a group (size,): shares of MLX's range, then fitted lines."""
    top = 2**bits - 1

    def codes(scale: float, bias: float) -> np.ndarray:
        return np.clip(np.round((row - bias) / scale), 0, top)

    def cost(line: tuple[float, float]) -> float:
        scale, bias = line
        return float(np.sum(costs * (codes(*line) * scale + bias - row) ** 2))

    _, scales, biases = mx.quantize(mx.array(row[None].astype(np.float32)), len(row), bits)
    scale, bias = scales.item(), biases.item()
    centre = bias + scale * top / 2
    lines = [(s * scale, centre - s * scale * top / 2) for s in np.arange(100, 69, -5) / 100]
    best = min(lines, key=cost)
    for _ in range(2):
        slope, offset = np.polyfit(codes(*best), row, 1, w=np.sqrt(costs))
        best = min(best, (slope, offset), key=cost)
    return best


def literal_gptq(weight: np.ndarray, gram: np.ndarray, bits: int, size: int) -> np.ndarray:
    """GPTQ's algorithm 1 column by column: by the Cholesky factor of the inverse Hessian."""
    n = len(gram)
    damped = gram + 0.01 * np.mean(np.diag(gram)) * np.eye(n)
    upper = np.linalg.cholesky(np.linalg.inv(damped)).T
    left, done = weight.astype(np.float64).copy(), np.zeros_like(weight, dtype=np.float64)
    for i in range(n):
        if i % size == 0:
            costs = 1 / np.diag(upper)[i : i + size] ** 2
            lines = [search_line(row, costs, bits) for row in left[:, i : i + size]]
            scale, bias = np.array(lines).T
        code = np.clip(np.round((left[:, i] - bias) / scale), 0, 2**bits - 1)
        done[:, i] = code * scale + bias
        error = (left[:, i] - done[:, i]) / upper[i, i]
        left[:, i:] -= np.outer(error, upper[i, i:])
    return done


@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize(("n_in", "size"), [(64, 32), (192, 64), (384, 128), (320, 32)])
def test_feedback_is_gptq(bits: int, n_in: int, size: int) -> None:
    """The same codes as the textbook's, but for weights that lie between two of them."""
    rng = np.random.default_rng(n_in)
    gram = correlated(rng, n_in)
    weight = rng.standard_normal((16, n_in)).astype(np.float32)
    form = Format(bits, size, "affine")
    got = np.array(form.dense(form.with_feedback(weight, solve_feedback(gram))))
    expected = literal_gptq(weight, gram, bits, size)
    assert np.mean(np.abs(got - expected) > 1e-5) < 0.02
    assert output_error(got - weight, gram) == pytest.approx(
        output_error(expected - weight, gram), rel=0.02
    )


@pytest.mark.parametrize("mode", ["affine", "mxfp4"])
def test_rows_of_nothing(mode: str) -> None:
    form = Format(4, 32, mode)
    weight = np.zeros((3, 64), dtype=np.float32)
    weight[1] = 1.0
    got = np.array(form.dense(form.with_feedback(weight, solve_feedback(np.eye(64)))))
    assert np.array_equal(got, weight)
