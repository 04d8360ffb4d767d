"""The algebra alone, in float64: properties over random matrices, and the measured conditioning."""

from collections.abc import Iterable
from dataclasses import fields
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
import reference
from architectures import make as make_architecture
from exact import exact_tensors
from factory import make_checkpoint, make_llama
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_skipless.checkpoints.checkpoint import Checkpoint, open_checkpoint
from mlx_skipless.network.wiring import parse_layer
from mlx_skipless.removal import changer
from mlx_skipless.removal.algebra import (
    Linear,
    basis_without_reader,
    basis_without_writer,
    centre,
    change_basis,
    fold_norm,
    measure_condition_number,
    measure_conditioning,
    transpose_basis,
)
from mlx_skipless.removal.merger import Merger
from mlx_skipless.removal.plan import make_plan


def random_linear(rng: np.random.Generator, n_in: int, n_out: int, bias: bool) -> Linear:
    weight = rng.standard_normal((n_in, n_out))
    return Linear(weight, rng.standard_normal(n_out) if bias else None)


def apply(linear: Linear, x: np.ndarray) -> np.ndarray:
    return x @ linear.weight + (0 if linear.bias is None else linear.bias)


def assert_near(got: np.ndarray, expected: np.ndarray, condition: float = 1.0) -> None:
    """Equal to float64's rounding, magnified by an inverse of this condition number."""
    atol = 1e-12 * condition * max(1.0, float(np.abs(expected).max()))
    np.testing.assert_allclose(got, expected, rtol=0, atol=atol)


cases = st.tuples(st.integers(0, 2**32 - 1), st.integers(1, 12), st.integers(1, 12), st.booleans())


@given(cases)
@settings(deadline=None, max_examples=60)
def test_removing_a_reader(case: tuple[int, int, int, bool]) -> None:
    """x* = x Q + b: the writer makes it, K* reads it, and Q* is the identity without bias."""
    seed, d, width, bias = case
    rng = np.random.default_rng(seed)
    down, q = random_linear(rng, width, d, bias), random_linear(rng, d, d, bias)
    k = random_linear(rng, d, width, bias)
    basis, condition = basis_without_reader(q), float(np.linalg.cond(q.weight))
    x = rng.standard_normal((5, width))
    stream = apply(down, x)
    new_stream = apply(change_basis(down, writes=basis, shift_share=1.0), x)
    assert_near(new_stream, apply(q, stream), condition)
    assert_near(apply(change_basis(k, reads=basis), new_stream), apply(k, stream), condition**2)
    new_q = change_basis(q, reads=basis)
    assert_near(new_q.weight, np.eye(d), condition)
    assert_near(apply(new_q, np.zeros((1, d))), np.zeros((1, d)), condition)


@given(cases)
@settings(deadline=None, max_examples=60)
def test_removing_a_writer(case: tuple[int, int, int, bool]) -> None:
    """P alone may have any shape; beside another writer it is inverted."""
    seed, d, width, bias = case
    rng = np.random.default_rng(seed)
    p, gate = random_linear(rng, width, d, bias), random_linear(rng, d, 7, bias)
    heads = rng.standard_normal((5, width))
    alone = change_basis(gate, reads=basis_without_writer(p, alone=True))
    assert_near(apply(alone, heads), apply(gate, apply(p, heads)))

    square, down = random_linear(rng, d, d, bias), random_linear(rng, width, d, bias)
    basis = basis_without_writer(square, alone=False)
    x, y = rng.standard_normal((5, d)), rng.standard_normal((5, width))
    new_down, new_gate = change_basis(down, writes=basis), change_basis(gate, reads=basis)
    expected = apply(gate, apply(square, x) + apply(down, y))
    condition = float(np.linalg.cond(square.weight))
    assert_near(apply(new_gate, x + apply(new_down, y)), expected, condition**2)


def test_dual_keeps_the_tie() -> None:
    """y* E*^T = y E^T when E* = E T and y* = y T^-T."""
    rng = np.random.default_rng(0)
    embedding, y = rng.standard_normal((11, 6)), rng.standard_normal((4, 6))
    basis = basis_without_reader(random_linear(rng, 6, 6, False))
    other = transpose_basis(basis)
    assert_near((y @ other.matrix) @ (embedding @ basis.matrix).T, y @ embedding.T, 1e3)
    assert_near(other.matrix @ other.inverse, np.eye(6), 1e3)


@pytest.mark.parametrize("gained", [True, False])
@pytest.mark.parametrize("shifted", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_fold_norm(bias: bool, shifted: bool, gained: bool) -> None:
    rng = np.random.default_rng(0)
    linear = random_linear(rng, 6, 3, bias)
    gain = rng.standard_normal(6) if gained else None
    shift = rng.standard_normal(6) if shifted else None
    x = rng.standard_normal((4, 6))
    normed = x * (1 if gain is None else gain) + (0 if shift is None else shift)
    folded = fold_norm(gain, shift, linear)
    single = Linear(linear.weight.astype(np.float32), linear.bias)
    assert fold_norm(gain, shift, single).weight.dtype == np.float32
    assert_near(apply(folded, x), apply(linear, normed))
    assert (folded.bias is None) == (not bias and not shifted)


@pytest.mark.parametrize("bias", [True, False])
def test_centre(bias: bool) -> None:
    """A LayerNorm behind it sees no difference, an RMS norm does what the LayerNorm did."""
    rng = np.random.default_rng(0)
    linear, x = random_linear(rng, 6, 5, bias), rng.standard_normal((4, 6))
    before, after = apply(linear, x), apply(centre(linear), x)
    assert_near(after, before - before.mean(-1, keepdims=True))
    assert_near(np.sqrt((after**2).mean(-1)), before.std(-1))


@pytest.mark.parametrize("result", [mx.float32, mx.bfloat16])
@pytest.mark.parametrize("stored", ["float32", "bfloat16"])
def test_a_gain_alone_is_one_float32_product(tmp_path: Path, stored: str, result: mx.Dtype) -> None:
    """Of each element, rounded once more to the result's type; biases stay."""
    make_llama(tmp_path, dtype=stored, attention_bias=True)
    held = mx.load(str(tmp_path / "model.safetensors"))
    assert isinstance(held, dict)
    checkpoint = open_checkpoint(tmp_path)
    merger = Merger(checkpoint, make_plan(checkpoint.args, remove="none", fold_norms=True), result)
    made, before = merger.layer(1), "model.layers.1."
    for norm, matrix in (("input", "self_attn.k_proj"), ("post_attention", "mlp.up_proj")):
        gain, weight = (
            np.array(held[f"{before}{name}.weight"].astype(mx.float32))
            for name in (f"{norm}_layernorm", matrix)
        )
        expected = mx.array(weight * gain).astype(result)
        assert not np.array_equal(gain, np.ones_like(gain))
        assert mx.array_equal(made[f"{before}{matrix}.weight"], expected)
    bias = f"{before}self_attn.k_proj.bias"
    assert mx.array_equal(made[bias], held[bias].astype(result))


@pytest.mark.parametrize("n", [1, 2, 17, 64, 200])
def test_conditioning(n: int) -> None:
    matrix = np.random.default_rng(n).standard_normal((n, n))
    measured = measure_conditioning(matrix)
    assert measured.condition == pytest.approx(np.linalg.cond(matrix), rel=0.02)
    inverse = np.linalg.inv(matrix)
    frobenius = np.sqrt((matrix**2).sum() * (inverse**2).sum()) / n
    assert measured.amplification == pytest.approx(frobenius, rel=1e-6)


def test_conditioning_of_special_matrices() -> None:
    rotation, _ = np.linalg.qr(np.random.default_rng(0).standard_normal((32, 32)))
    assert measure_conditioning(rotation).condition == pytest.approx(1, rel=1e-3)
    assert measure_conditioning(rotation).extra_bits == 0
    assert measure_conditioning(np.diag([1.0, 1e-8])).condition == pytest.approx(1e8, rel=0.02)
    assert measure_conditioning(np.zeros((4, 4))).condition == np.inf


@pytest.mark.parametrize("shape", [(5, 5), (5, 9), (9, 5)])
def test_condition_number_of_any_shape(shape: tuple[int, int]) -> None:
    matrix = np.random.default_rng(0).standard_normal(shape)
    assert measure_condition_number(matrix) == pytest.approx(np.linalg.cond(matrix), rel=0.02)
    matrix[:, 1:] = matrix[:, :1]
    assert measure_condition_number(matrix) > 1e12


@pytest.mark.parametrize("spread", [0.3, 2.0])
@pytest.mark.parametrize("remove", ["qp", "kp", "vp"])
def test_float64_is_exact(remove: str, spread: float, tmp_path: Path) -> None:
    """Without storage's rounding the function is the same to 1e-10, however Q is conditioned."""
    config, weights = make_checkpoint(
        tmp_path,
        norm="qkv",
        linear_paths=True,
        num_key_value_heads=4,
        spread=spread,
        tie_word_embeddings=True,
        final_norm=False,
    )
    result = exact_tensors(tmp_path, remove=remove)
    tokens = np.random.default_rng(0).integers(0, 256, (2, 9))
    expected = reference.logits(config, weights, tokens)
    got = reference.logits(config, result, tokens)
    assert 0 < reference.worst_relative_error(expected, got) <= 1e-10


class Recorder(Checkpoint):
    """Notes which matrices are read, and which ahead."""

    def read(self, names: Iterable[str]) -> dict[str, mx.array]:
        found = super().read(names)
        noted.extend(name for name in found if name.endswith(("_proj.weight", "router.weight")))
        return found

    def read_ahead(self, names: Iterable[str]) -> None:
        ahead.extend(self._find_wanted(names))


noted: list[str] = []
ahead: list[str] = []


def recorder(folder: Path) -> Recorder:
    opened = open_checkpoint(folder)
    noted.clear()
    ahead.clear()
    return Recorder(**{f.name: getattr(opened, f.name) for f in fields(opened)})


def test_the_next_layer_is_read_ahead(tmp_path: Path) -> None:
    """Each matrix once."""
    make_checkpoint(tmp_path, norm="qkv", gains=True)
    checkpoint = recorder(tmp_path)
    merger = Merger(checkpoint, make_plan(checkpoint.args, remove="qp"), mx.float32)
    layers = range(checkpoint.args.num_hidden_layers)
    for layer in layers:
        merger.layer(layer)
        read = [name for name in ahead if name.startswith(f"model.layers.{layer + 1}.")]
        assert len(read) == (7 if layer + 1 in layers else 0)
    assert len(ahead) == len(set(ahead)) == 7 * (len(layers) - 1)
    assert len(noted) == len(set(noted)) == 7 * len(layers)


def test_experts_are_read_together(tmp_path: Path) -> None:
    make_architecture(tmp_path, "mixtral")
    checkpoint = recorder(tmp_path)
    plan = make_plan(checkpoint.args, remove="qp", skipless=True)
    Merger(checkpoint, plan, mx.float32).layer(1)
    read = [name for name in noted if name.startswith("model.layers.1.mlp.")]
    assert len(read) == len(set(read)) == 4


def test_layers_out_of_order_are_not_read_ahead(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, norm="qkv")
    checkpoint = recorder(tmp_path)
    merger = Merger(checkpoint, make_plan(checkpoint.args, remove="none"), mx.float32)
    for layer in (1, 0, 0):
        merger.layer(layer)
    assert ahead == []
    assert {parse_layer(name) for name in noted} == {0, 1}


@pytest.mark.parametrize("skipless", [True, False])
def test_an_embedding_and_a_head_in_parts(
    skipless: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cut into rows or not, they are the same: Phi's, whose final norm and head have biases."""
    make_architecture(tmp_path, "phi")
    checkpoint = open_checkpoint(tmp_path)
    remove = "q" if skipless else "none"
    plan = make_plan(checkpoint.args, remove=remove, skipless=skipless, fold_norms=True)
    assert "final" in plan.folded and plan.centred != skipless

    def make_ends() -> dict[str, mx.array]:
        merger = Merger(checkpoint, plan, mx.float32)
        return merger.embedding() | merger.head()

    whole = make_ends()
    assert "lm_head.bias" in whole
    monkeypatch.setattr(changer, "ROWS", 25)
    parts = make_ends()
    assert parts.keys() == whole.keys()
    for name, array in parts.items():
        np.testing.assert_allclose(np.array(array), np.array(whole[name]), rtol=1e-6, atol=1e-6)
