"""Which precision a merge computes in: below what storing its result rounds away."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from exact import exact_tensors
from factory import make_checkpoint
from hypothesis import given
from hypothesis import strategies as st

from mlx_skipless.checkpoints.checkpoint import open_checkpoint
from mlx_skipless.network.parts import dtype_name
from mlx_skipless.removal import products
from mlx_skipless.removal.algebra import Linear, basis_without_reader, change_basis
from mlx_skipless.removal.merger import Merger
from mlx_skipless.removal.plan import make_plan
from mlx_skipless.removal.products import UNIT_ROUNDOFF, Inverse, choose_working_type, multiply

NARROW = [mx.bfloat16, mx.float16]


def stored(values: np.ndarray, dtype: mx.Dtype) -> np.ndarray:
    rounded = mx.array(values.astype(np.float32)).astype(dtype).astype(mx.float32)
    return np.array(rounded).astype(np.float64)


def ill_conditioned(rng: np.random.Generator, n: int, condition: float) -> np.ndarray:
    u, _, v = np.linalg.svd(rng.standard_normal((n, n)))
    return (u * np.geomspace(1, 1 / condition, n)) @ v


sizes = st.integers(16, 300)


@given(st.integers(0, 2**32 - 1), sizes, sizes, sizes, st.sampled_from(NARROW))
def test_a_product_adds_next_to_nothing(seed: int, n: int, m: int, k: int, dtype: mx.Dtype):
    """To what storing rounds away."""
    rng = np.random.default_rng(seed)
    a, b = (
        rng.standard_normal(shape).astype(choose_working_type(dtype)) for shape in ((n, m), (m, k))
    )
    exact = a.astype(np.float64) @ b.astype(np.float64)
    rounding = np.linalg.norm(stored(exact, dtype) - exact)
    assert np.linalg.norm(multiply(a, b) - exact) <= rounding / 100


def test_float32_results_come_from_float64():
    rng = np.random.default_rng(0)
    a, b = (rng.standard_normal((64, 64)).astype(choose_working_type(mx.float32)) for _ in "ab")
    assert multiply(a, b).dtype == np.float64


@pytest.mark.parametrize("kind", [np.float32, np.float64])
def test_an_inverse_is_float64_whatever_it_meets(kind: type[np.floating]):
    """Only its result is rounded to the other operand's type."""
    rng = np.random.default_rng(0)
    matrix = ill_conditioned(rng, 40, 1e6).astype(kind)
    rows = rng.standard_normal((5, 40)).astype(kind)
    expected = np.linalg.inv(matrix.astype(np.float64))
    bound = 1e-9 if kind == np.float64 else 2.0**-23
    for got, wanted in (
        (rows @ Inverse(matrix), rows @ expected),
        (Inverse(matrix) @ rows.T, expected @ rows.T),
        (rows @ Inverse(matrix).T, rows @ expected.T),
        (multiply(rows, Inverse(matrix)), rows @ expected),
        (rows[0] @ Inverse(matrix), rows[0] @ expected),
    ):
        assert got.dtype == kind
        assert np.abs(got - wanted).max() <= bound * np.abs(wanted).max()


def test_a_bias_that_an_inverse_magnified_comes_back_whole():
    """(0 + b Q^-1) Q = b, to float64: vectors are never float32."""
    rng = np.random.default_rng(0)
    q = Linear(ill_conditioned(rng, 40, 1e6).astype(np.float32), rng.standard_normal(40))
    writer = Linear(np.zeros((3, 40), dtype=np.float32), np.zeros(40))
    written = change_basis(writer, writes=basis_without_reader(q), shift_share=1.0)
    np.testing.assert_allclose(written.bias, q.bias, rtol=0, atol=1e-8)


def test_a_gpu_multiplies_float32_and_nothing_else(monkeypatch: pytest.MonkeyPatch):
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((5, 8)), rng.standard_normal((8, 3))
    taken = []
    real: Callable[..., np.ndarray] = products.multiply_with_mlx

    def multiply_with_mlx(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        taken.append(x.dtype)
        return real(x, y)

    monkeypatch.setattr(products, "multiply_with_mlx", multiply_with_mlx)
    multiply(a.astype(np.float32), b.astype(np.float32))
    assert taken == []
    gpu = SimpleNamespace(type=mx.gpu)
    monkeypatch.setattr(mx, "default_device", lambda: gpu)
    assert np.array_equal(multiply(a, b), a @ b)
    got = multiply(a.astype(np.float32), b.astype(np.float32))
    assert taken == [np.float32]
    np.testing.assert_allclose(got, a @ b, rtol=0, atol=1e-5)


def spoil(folder: Path) -> None:
    """Give Q of layer 1 a condition number of 1e7, in numbers that any type has."""
    file = str(folder / "model.safetensors")
    loaded: Any = mx.load(file)
    tensors: dict[str, mx.array] = dict(loaded)
    mx.eval(tensors)
    q = tensors["model.layers.1.self_attn.q_proj.weight"]
    block = np.pad(2 * np.eye(20) - np.triu(np.ones((20, 20))), (0, len(q) - 20))
    block[range(20, len(q)), range(20, len(q))] = 1
    tensors["model.layers.1.self_attn.q_proj.weight"] = mx.array(block).astype(q.dtype)
    mx.save_safetensors(file, tensors)


@pytest.mark.parametrize(
    ("dtype", "remove", "spread", "spoilt"),
    [
        *((d, r, s, False) for d in NARROW for r in ("qp", "kp") for s in (0.3, 2.0)),
        (mx.bfloat16, "qp", 0.3, True),
    ],
)
def test_a_result_is_the_exact_one_rounded(
    dtype: mx.Dtype, remove: str, spread: float, spoilt: bool, tmp_path: Path
):
    """Each element to within half a unit of its last place, and a hundredth of its row's."""
    make_checkpoint(
        tmp_path, norm="qkv", gains=True, linear_paths=True, num_key_value_heads=4,
        bias=("q_proj", "k_proj", "o_proj", "down_proj"), spread=spread,
        dtype=dtype_name(dtype), tie_word_embeddings=False, final_norm=False,
    )  # fmt: skip
    if spoilt:
        spoil(tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    exact = exact_tensors(tmp_path, remove=remove)
    merger = Merger(checkpoint, make_plan(checkpoint.args, remove=remove), dtype)
    got = merger.embedding() | merger.head()
    for layer in range(checkpoint.args.num_hidden_layers):
        got |= merger.layer(layer)
    assert got.keys() == exact.keys()
    for name, array in got.items():
        wanted = exact[name]
        error = np.abs(np.array(array.astype(mx.float32)) - wanted)
        largest = np.abs(wanted).max(-1, keepdims=True)
        assert (error <= UNIT_ROUNDOFF[dtype] * (np.abs(wanted) + 0.01 * largest)).all(), name
