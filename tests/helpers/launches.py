"""Counts the kernels that a network launches on Metal, on a machine that need not have it.

A token is decoded here, piece by piece. For a norm, RoPE and attention MLX has one kernel on Metal
and many operations on a CPU. Such a call ends a piece, and so does one that may have to copy what
it reads. What a piece's arrays wait for by then are operations in MLX's graph, and each is a kernel
but those that only look at numbers in another way. Whether a call copies depends on strides, which
are alike on all machines: the rules are those of MLX 0.32's Metal backend. docs/performance.md says
what this cannot see.
"""

import io
import re
from collections import Counter
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_lm.models.cache import make_prompt_cache

from mlx_skipless.architectures.config import read_model_args
from mlx_skipless.evaluation.synthetic import (
    make_skipless_model,
    make_stock_model,
    make_vanilla_shape,
)
from mlx_skipless.quantization.settings import Quantization
from mlx_skipless.removal.plan import make_plan
from mlx_skipless.training.initialization import make_model_args
from mlx_skipless.training.recipe import Recipe

SIZES: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 128, "vocab_size": 64, "num_attention_heads": 4,
    "tie_word_embeddings": False,
}  # fmt: skip
LLAMA: dict[str, Any] = {"norm": "pre", "skip": "both", "final_norm": True}
FIRST_BUNDLED: dict[str, Any] = {
    "norm": "qkv", "gains": ["q", "k", "v", "hidden"], "gate_offset": True, "value_skip": True
}  # fmt: skip
BUNDLED: dict[str, Any] = {
    "norm": "qkv", "norms": ["q", "k", "v", "heads"], "gains": ["q", "k", "v", "heads"],
    "gate_offset": True, "attention_gain": True, "query_skip": True, "head_skip": True,
    "output_skip": True,
}  # fmt: skip
# Networks of this package, but the first, which is mlx-lm's, and that of `train`'s recipe (None).
NETWORKS: dict[str, dict[str, Any] | None] = {
    "mlx-lm's Llama": LLAMA,
    "Llama's blocks": LLAMA,
    "Llama's blocks, parallel": LLAMA | {"block": "parallel"},
    "skipless": {"norm": "qkv"},
    "skipless, parallel": {"norm": "qkv", "block": "parallel"},
    "query and head skip": {"norm": "qkv", "query_skip": True, "head_skip": True},
    "as `train` makes it": None,
    "as the bundled model": BUNDLED,
    "as the first bundled model": FIRST_BUNDLED,
}


def make_network(name: str, remove: str, layers: int, bits: int | None, kv_heads: int = 2) -> Any:
    """Make one of `NETWORKS` without some of its matrices, with random weights.

    Args:
        name: of the network.
        remove: letters as ``convert`` takes them.
        layers: how many.
        bits: of packed matrices; None: all is float32.
        kv_heads: of four heads.
    """
    config = NETWORKS[name]
    quantization = Quantization(bits, 32) if bits else None
    if config is None:
        args = make_model_args(Recipe(layers=layers, hidden_size=64, heads=4, kv_heads=kv_heads))
    else:
        sizes = SIZES | {"num_hidden_layers": layers, "num_key_value_heads": kv_heads}
        args = read_model_args({"model_type": "skipless"} | sizes | config)
    if name == "mlx-lm's Llama":
        return make_stock_model(make_vanilla_shape(args), mx.float32, quantization)
    plan = make_plan(args, remove=remove, quantized=bits is not None)
    return make_skipless_model(plan.after, mx.float32, quantization)


# Operations that make no kernel. Reshaping may copy, which is looked at where it is called.
VIEWS = {
    *("AsStrided", "Broadcast", "BroadcastAxes", "Copy", "Depends", "ExpandDims", "Flatten"),
    *("NumberOfElements", "Reshape", "Slice", "Split", "Squeeze", "StopGradient", "Transpose"),
    *("Unflatten", "View"),
}
RESHAPES = ("reshape", "flatten")
OPERATION = re.compile(r'label ="(Compiled|\w+)\w*", shape=rectangle')


def count_launches(model: nn.Module, batch: int = 1) -> Counter[str]:
    """Count the kernels of decoding one token behind a short prompt, by name.

    Args:
        model: of float32 numbers, maybe with quantized matrices.
        batch: sequences that decode side by side.
    """
    cache: Any = make_prompt_cache(model)
    mx.eval(model(mx.zeros((batch, 2), mx.int32), cache=cache))
    token = mx.zeros((batch, 1), mx.int32)
    mx.eval(token)
    count: Counter[str] = Counter()
    with pytest.MonkeyPatch.context() as patch:
        for place, name, copies in ENDS:
            function = getattr(place, name)
            patch.setattr(place, name, _end_piece(count, function, name, copies))
        _add_piece(count, model(token, cache=cache))
    return +count


def count_layer(make: Callable[[int], nn.Module], batch: int = 1) -> Counter[str]:
    """Count the kernels of a layer that is neither the first nor the last.

    Args:
        make: makes a network of so many layers.
        batch: sequences that decode side by side.
    """
    return count_launches(make(3), batch) - count_launches(make(2), batch)


def _add_piece(count: Counter[str], *arrays: mx.array) -> None:
    """Count what arrays wait for, and compute it."""
    graph = io.StringIO()
    mx.export_to_dot(graph, *arrays)
    count.update(name for name in OPERATION.findall(graph.getvalue()) if name not in VIEWS)
    mx.eval(arrays)


def _end_piece(
    count: Counter[str], function: Callable[..., Any], name: str, copies: Callable[..., int]
) -> Callable[..., Any]:
    def call(*args: Any, **options: Any) -> Any:
        arrays = [x for x in (*args, *options.values()) if isinstance(x, mx.array)]
        _add_piece(count, *arrays)
        out = function(*args, **options)
        mx.eval(out)
        count[name] += name not in RESHAPES
        count["copy"] += copies(out, *args, **options)
        return out

    return call


def _strides(x: mx.array) -> tuple[int, ...]:
    return tuple(stride // x.itemsize for stride in memoryview(x).strides or ())  # type: ignore


def _is_row_contiguous(x: mx.array) -> bool:
    expected = 1
    for size, stride in zip(x.shape[::-1], _strides(x)[::-1], strict=True):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True


def _copy_norm(out: mx.array, x: mx.array, *args: Any, **options: Any) -> int:
    return not _is_row_contiguous(x)


def _copy_rope(out: mx.array, x: mx.array, dims: int, **options: Any) -> int:
    batch, heads, length, width = x.shape
    if dims < width:
        return 1
    transposed = _strides(x) == (length * heads * width, width, heads * width, 1)
    return not (_is_row_contiguous(x) or batch == 1 or transposed)


def _copy_attention(out: mx.array, q: mx.array, k: mx.array, v: mx.array, **options: Any) -> int:
    batch, heads, _, width = q.shape
    strides, one = _strides(q), 1 if batch == 1 else 0
    fits = _is_row_contiguous(q) or (
        1 in (batch, heads) and strides[one:] == (width, width * q.shape[one], 1)
    )
    return not fits


def _copy_packed(out: mx.array, x: mx.array, *args: Any, **options: Any) -> int:
    return _strides(x)[-2:] != (x.shape[-1], 1)


def _copy_reshape(out: mx.array, x: mx.array, *args: Any, **options: Any) -> int:
    first, second = (np.array(a, copy=False).__array_interface__["data"][0] for a in (out, x))
    return first != second


ENDS: tuple[tuple[Any, str, Callable[..., int]], ...] = (
    (mx.fast, "rms_norm", _copy_norm),
    (mx.fast, "layer_norm", _copy_norm),
    (mx.fast, "rope", _copy_rope),
    (mx.fast, "scaled_dot_product_attention", _copy_attention),
    (mx, "quantized_matmul", _copy_packed),
    (mx, "dequantize", lambda *args, **options: 0),
    *((mx.array, name, _copy_reshape) for name in RESHAPES),
)
