"""Kernels of a decoded token: how many there are, and that those of many steps compute the same."""

from collections.abc import Callable
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import reference
from grids import only, thorough
from launches import NETWORKS, count_launches, count_layer, make_network
from mlx.utils import tree_flatten

from mlx_skipless.network.parts import tensors_of

pytestmark = pytest.mark.usefixtures("compiled")
LLAMA = "mlx-lm's Llama"
# Of a layer without some matrices, decoding one sequence: products with matrices, norms, weights
# of q's norm behind it, RoPEs, and compiled kernels or additions. Attention and its two writes into
# the cache come on top.
Case = tuple[str, str]
LAYERS: dict[Case, tuple[int, int, int, int, int]] = {
    (LLAMA, "none"): (7, 2, 0, 2, 3),
    ("Llama's blocks", "none"): (4, 2, 0, 1, 3),
    ("Llama's blocks, parallel", "none"): (4, 2, 0, 1, 2),
    ("skipless", "none"): (4, 2, 0, 1, 1),
    ("skipless", "qp"): (3, 3, 0, 2, 1),
    ("skipless, parallel", "q"): (4, 3, 0, 2, 2),
    ("skipless, parallel", "p"): (3, 2, 0, 1, 2),
    ("query and head skip", "none"): (4, 3, 0, 2, 3),
    ("query and head skip", "qp"): (3, 3, 0, 2, 3),
    ("as `train` makes it", "none"): (5, 3, 1, 2, 3),
    ("as `train` makes it", "qp"): (3, 3, 1, 2, 3),
    ("as the bundled model", "none"): (4, 3, 1, 2, 4),
    ("as the bundled model", "qp"): (3, 3, 1, 2, 4),
    ("as the first bundled model", "none"): (4, 3, 1, 2, 3),
    ("as the first bundled model", "qp"): (3, 3, 1, 2, 3),
}
FEW = [(LLAMA, "none", None), ("skipless", "none", 4), ("as `train` makes it", "qp", None)]
GRID = [(*case, bits) for case in LAYERS for bits in (None, 4)]


@pytest.mark.parametrize(
    ("name", "remove", "bits"),
    [pytest.param(*case, marks=() if case in FEW else thorough) for case in GRID],
)
def test_kernels_of_a_layer(name: str, remove: str, bits: int | None) -> None:
    """No more than the network's arithmetic needs, no copy among them, and no more than Llama's."""
    found = count_layer(partial(make_network, name, remove, bits=bits))
    matrices, norms, weights, ropes, others = LAYERS[name, remove]
    assert found == {
        "Matmul" if bits is None else "quantized_matmul": matrices,
        "rms_norm": norms,
        "rope": ropes,
        "scaled_dot_product_attention": 1,
        "SliceUpdate": 2,
        **({"Multiply": weights} if weights else {}),
        "Compiled": others - found["Add"],
        **({"Add": found["Add"]} if found["Add"] else {}),
    }
    assert found.total() <= sum(LAYERS[LLAMA, "none"]) + 3


class Step(nn.Module):
    """A network that does one thing with numbers (batch, 1, 4, 32)."""

    def __init__(self, do: Callable[[mx.array], mx.array]):
        super().__init__()
        self._do, self.layers = do, []

    def __call__(self, tokens: mx.array, cache: Any) -> mx.array:
        return self._do(mx.ones((*tokens.shape, 4, 32)))


def multiply(x: mx.array) -> mx.array:
    packed, *scales = mx.quantize(mx.ones((32, 64)), 32, 4)
    mx.eval(packed, scales)
    return mx.quantized_matmul(x, packed, *scales, group_size=32, bits=4)


def halve(x: mx.array, axis: int) -> mx.array:
    halves = x.reshape(*x.shape[:2], 128) if axis == -1 else x.reshape(*x.shape[:2], 2, 64)
    return mx.split(halves, 2, axis=axis)[1]


@pytest.mark.parametrize(
    ("do", "batch", "kernels"),
    [
        (lambda x: mx.split(x, 2, axis=2)[1].transpose(0, 2, 1, 3), 4, {}),
        (lambda x: mx.exp(x) + 1, 1, {"Exp": 1, "Add": 1}),
        (lambda x: x[:, :, 1:3].reshape(1, -1), 1, {}),
        (lambda x: x[:, :, 1:3].reshape(-1, 64), 4, {}),
        (lambda x: x[:, :, 1:3].reshape(-1), 4, {"copy": 1}),
        (lambda x: x.transpose(0, 1, 3, 2).flatten(-2), 1, {"copy": 1}),
        (lambda x: multiply(halve(x, -2)), 1, {"quantized_matmul": 1}),
        (lambda x: multiply(halve(x, -1)), 1, {"quantized_matmul": 1, "copy": 1}),
        (lambda x: mx.fast.rms_norm(x[:, :, 1:3], None, 1e-5), 1, {"rms_norm": 1}),
        (lambda x: mx.fast.rms_norm(x[:, :, 1:3], None, 1e-5), 4, {"rms_norm": 1, "copy": 1}),
        (lambda x: nn.RoPE(32)(x.transpose(0, 2, 1, 3)), 4, {"rope": 1}),
        (lambda x: nn.RoPE(32)(x[:, :, 1:3].transpose(0, 2, 1, 3)), 1, {"rope": 1}),
        (lambda x: nn.RoPE(32)(x[:, :, 1:3].transpose(0, 2, 1, 3)), 4, {"rope": 1, "copy": 1}),
        (lambda x: nn.RoPE(16)(x.transpose(0, 2, 1, 3)), 1, {"rope": 1, "copy": 1}),
    ],
)
def test_what_is_counted(
    do: Callable[[mx.array], mx.array], batch: int, kernels: dict[str, int]
) -> None:
    """Looking at numbers in another way is no kernel; a copy is where MLX needs rows in a row."""
    assert count_launches(Step(do), batch) == {"Full": 1} | kernels


def run(model: nn.Module, tokens: np.ndarray) -> list[np.ndarray]:
    """Logits token by token and all at once, and the sum of each gradient's squares."""

    def measure(parameters: Any) -> mx.array:
        model.update(parameters)
        return model(mx.array(tokens)).square().mean()

    cache = model.make_cache()
    steps = [model(mx.array(tokens[:, i : i + 1]), cache=cache) for i in range(tokens.shape[1])]
    gradients = mx.grad(measure)(model.trainable_parameters())
    sums = [gradient.square().sum() for _, gradient in tree_flatten(gradients)]
    found = (mx.concatenate(steps, axis=1), model(mx.array(tokens)), mx.stack(sums))
    return [np.array(array) for array in found]


@pytest.mark.parametrize("name", only(["as `train` makes it"], [*NETWORKS][1:]))
def test_fused_kernels_compute_what_their_steps_do(name: str) -> None:
    """One token and many, in a network behind another of other sizes: kernels know no shapes."""
    tokens = np.random.default_rng(0).integers(0, 64, (2, 3))
    for kv_heads in (4, 2):
        model = make_network(name, "none", 2, None, kv_heads)
        rng = np.random.default_rng(1)
        vectors = [
            (key, mx.array(rng.uniform(0.5, 1.5, w.shape).astype(np.float32)))
            for key, w in tensors_of(model).items()
            if w.ndim == 1
        ]
        model.load_weights(vectors, strict=False)
        together = run(model, tokens)
        mx.disable_compile()
        apart = run(model, tokens)
        mx.enable_compile()
        for one, other in zip(together, apart, strict=True):
            assert reference.worst_relative_error(other, one) < 1e-5
