"""Products that MLX computes badly on a CPU, against float64."""

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mlx_skipless.network.parts import unpack
from mlx_skipless.network.widening import attend_in_float32, widen


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
@pytest.mark.parametrize(("mode", "size"), [("affine", 64), ("mxfp4", 32), ("nvfp4", 16)])
def test_packed_matrices_are_multiplied_well(mode: str, size: int, dtype: mx.Dtype) -> None:
    """As float64 does with the numbers that they stand for, also an embedding's and experts'."""
    from mlx_lm.models.switch_layers import SwitchLinear

    rng = np.random.default_rng(0)
    x = mx.array(rng.standard_normal((3, 5, 128))).astype(dtype)
    kinds = {
        "linear": nn.Linear(128, 64), "embedding": nn.Embedding(64, 128),
        "experts": SwitchLinear(128, 64, 4),
    }  # fmt: skip
    picked = mx.array(rng.integers(0, 4, (3, 5, 2)))
    for kind, module in kinds.items():
        module.set_dtype(dtype)
        holder = nn.Sequential(module)
        nn.quantize(holder, size, 8 if mode == "mxfp8" else 4, mode=mode)
        packed: Any = widen(holder).layers[0]
        weight = np.array(unpack_module(packed)).astype(np.float64)
        exact = np.array(x.astype(mx.float32)).astype(np.float64)
        if kind == "experts":
            got = packed(x[..., None, None, :], picked)[..., 0, :]
            exact = np.einsum("btd,btkod->btko", exact, weight[np.array(picked)])
        else:
            got = packed(x) if kind == "linear" else packed.as_linear(x)
            exact = exact @ weight.T
        if "bias" in packed:
            bias = np.array(packed.bias.astype(mx.float32))
            exact = exact + (bias[np.array(picked)] if kind == "experts" else bias)
        assert got.dtype == dtype
        error = np.abs(np.array(got.astype(mx.float32)) - exact).max() / np.abs(exact).max()
        assert error < (1e-5 if dtype == mx.float32 else 6e-3), (kind, error)


@pytest.mark.parametrize("read", [mx.float32, mx.bfloat16, mx.float16])
@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16])
def test_matrices_of_16_bits_are_multiplied_well(dtype: mx.Dtype, read: mx.Dtype) -> None:
    """As float64 does, rounded once to the type that MLX's own product has."""
    rng = np.random.default_rng(0)
    x = mx.array(rng.standard_normal((3, 5, 1024))).astype(read)
    kinds = {
        "biased": nn.Linear(1024, 64), "linear": nn.Linear(1024, 64, bias=False),
        "embedding": nn.Embedding(64, 1024),
    }  # fmt: skip
    for kind, module in kinds.items():
        module.set_dtype(dtype)
        own = x @ module.weight.T
        wide: Any = widen(nn.Sequential(module)).layers[0]
        got = wide.as_linear(x) if kind == "embedding" else wide(x)
        numbers = {"x": x, "weight": wide.weight, "bias": wide.get("bias", mx.zeros(64))}
        x64, weight, bias = (
            np.array(array.astype(mx.float32)).astype(np.float64) for array in numbers.values()
        )
        exact = x64 @ weight.T + bias
        assert got.dtype == own.dtype and wide.weight.dtype == dtype
        rounding = {mx.float32: 0, mx.bfloat16: 2.0**-9, mx.float16: 2.0**-12}[got.dtype]
        errors = np.abs(np.array(got.astype(mx.float32)) - exact)
        assert (errors <= 2 * rounding * np.abs(exact) + 1e-5 * np.abs(exact).max()).all(), kind


@pytest.mark.parametrize("with_sinks", [False, True])
@pytest.mark.parametrize("mask", [None, "causal", "added"])
@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float32])
def test_attention_is_multiplied_well(dtype: mx.Dtype, mask: str | None, with_sinks: bool) -> None:
    """As float64 does, rounded once; MLX's own function is back afterwards, whatever happened."""
    rng = np.random.default_rng(0)
    shapes = {"q": (2, 4, 7, 64), "k": (2, 2, 9, 64), "v": (2, 2, 9, 64), "sinks": (4,)}
    given = {name: mx.array(rng.standard_normal(n)).astype(dtype) for name, n in shapes.items()}
    added = mx.array(rng.standard_normal((7, 9))).astype(dtype)
    q, k, v, sinks = (
        np.array(array.astype(mx.float32)).astype(np.float64) for array in given.values()
    )
    k, v = (np.repeat(x, 2, axis=1) for x in (k, v))
    scores = q @ k.swapaxes(-1, -2) / 8
    if mask == "causal":
        scores = np.where(np.tri(7, 9, 2, dtype=bool), scores, -np.inf)
    elif mask == "added":
        scores = scores + np.array(added.astype(mx.float32))
    shares = np.exp(scores)
    whole = shares.sum(-1, keepdims=True)
    exact = shares @ v / (whole + np.exp(sinks)[:, None, None] if with_sinks else whole)
    options = {"scale": 1 / 8, "mask": added if mask == "added" else mask}
    if with_sinks:
        options["sinks"] = given["sinks"]
    before = mx.fast.scaled_dot_product_attention
    with attend_in_float32():
        got = mx.fast.scaled_dot_product_attention(given["q"], given["k"], given["v"], **options)
    assert got.dtype == dtype
    rounding = {mx.float32: 0, mx.bfloat16: 2.0**-9}[dtype]
    errors = np.abs(np.array(got.astype(mx.float32)) - exact)
    assert (errors <= 2 * rounding * np.abs(exact) + 1e-5 * np.abs(exact).max()).all()
    with pytest.raises(ZeroDivisionError), attend_in_float32():
        _ = 1 / 0
    assert mx.fast.scaled_dot_product_attention is before


def test_attention_refuses_what_mlx_refuses() -> None:
    """Also where two threads come and go, the first one first."""
    before = mx.fast.scaled_dot_product_attention
    heads = mx.ones((1, 1, 4, 64), mx.bfloat16)
    first, second = attend_in_float32(), attend_in_float32()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert mx.fast.scaled_dot_product_attention is not before
    with pytest.raises(ValueError, match="promote"):  # a mask of float32
        mx.fast.scaled_dot_product_attention(heads, heads, heads, scale=1.0, mask=mx.zeros((4, 4)))
    second.__exit__(None, None, None)
    assert mx.fast.scaled_dot_product_attention is before


def unpack_module(module: Any) -> mx.array:
    """What a packed module stands for."""
    parts = module.weight, module.scales, module.get("biases")
    return unpack(*parts, module.group_size, module.bits, module.mode)
