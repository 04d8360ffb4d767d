"""Runs modules on a CPU in the types in which MLX multiplies well there: float32, unpacked."""

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear

from .parts import unpack


class _WideLinear(nn.Linear):
    """A matrix of 16 bits that multiplies in float32, as a GPU's kernels add up."""

    def __call__(self, x: mx.array) -> mx.array:
        y = x.astype(mx.float32) @ self.weight.astype(mx.float32).T
        y = y + self["bias"] if "bias" in self else y
        return y.astype(mx.result_type(x, self.weight))


class _WideEmbedding(nn.Embedding):
    """An embedding of 16 bits whose tied head multiplies in float32."""

    def as_linear(self, x: mx.array) -> mx.array:
        y = x.astype(mx.float32) @ self.weight.astype(mx.float32).T
        return y.astype(mx.result_type(x, self.weight))


class _UnpackedLinear(nn.QuantizedLinear):
    """A quantized matrix that multiplies in float32, unpacked, as a GPU's kernels add up."""

    def __call__(self, x: mx.array) -> mx.array:
        y = (x.astype(mx.float32) @ _unpack(self).T).astype(x.dtype)
        return y + self["bias"] if "bias" in self else y


class _UnpackedEmbedding(nn.QuantizedEmbedding):
    """A quantized embedding whose tied head multiplies in float32."""

    def as_linear(self, x: mx.array) -> mx.array:
        return (x.astype(mx.float32) @ _unpack(self).T).astype(x.dtype)


class _UnpackedExperts(QuantizedSwitchLinear):
    """Experts' quantized matrices that multiply in float32."""

    def __call__(self, x: mx.array, indices: mx.array, sorted_indices: bool = False) -> mx.array:
        weight = _unpack(self).swapaxes(-1, -2)
        y = mx.gather_mm(
            x.astype(mx.float32), weight, rhs_indices=indices, sorted_indices=sorted_indices
        ).astype(x.dtype)
        return y + mx.expand_dims(self["bias"][indices], -2) if "bias" in self else y


NARROW = (mx.float16, mx.bfloat16)
WIDE: dict[Any, Any] = {nn.Linear: _WideLinear, nn.Embedding: _WideEmbedding}
UNPACKED: dict[Any, Any] = {
    nn.QuantizedLinear: _UnpackedLinear,
    nn.QuantizedEmbedding: _UnpackedEmbedding,
    QuantizedSwitchLinear: _UnpackedExperts,
}


def _unpack(module: Any) -> mx.array:
    settings = module.group_size, module.bits, module.mode
    return unpack(module.weight, module.scales, module.get("biases"), *settings)


def widen(module: nn.Module) -> nn.Module:
    """Make a module multiply in float32, in place, where MLX multiplies others badly: on a CPU.

    It has no product of dense experts in 16 bits. Its products in 16 bits take ten times as long as
    in float32. Those of packed matrices take 20 to 200 times as long as unpacked ones, and add up
    in 16 bits where the numbers have these. The numbers stay the same.
    """
    if mx.default_device() == mx.cpu:
        for part in module.modules():
            if isinstance(part, SwitchLinear) and part.weight.dtype in NARROW:
                part.weight = part.weight.astype(mx.float32)
            elif type(part) in UNPACKED:
                part.__class__ = UNPACKED[type(part)]
            elif type(part) in WIDE and part.weight.dtype in NARROW:
                part.__class__ = WIDE[type(part)]
    return module


_ATTEND: Any = mx.fast.scaled_dot_product_attention
_lock, _callers = threading.Lock(), 0  # of what ``attend_in_float32`` surrounds


@contextlib.contextmanager
def attend_in_float32() -> Iterator[None]:
    """On a CPU, let bfloat16 attention of any network called within multiply in float32.

    A network asks MLX for it, not one of its modules, and MLX takes four times as long in 16 bits.
    What it gives keeps its type. In float16 scores can overflow, and a check has to see that.
    """
    global _callers
    with _lock:
        _callers += 1
        if mx.default_device() == mx.cpu:
            mx.fast.scaled_dot_product_attention = _attend_widely
    try:
        yield
    finally:
        with _lock:
            _callers -= 1
            if not _callers:
                mx.fast.scaled_dot_product_attention = _ATTEND


def _attend_widely(
    q: mx.array, k: mx.array, v: mx.array, *, mask: Any = None, sinks: Any = None, **options: Any
) -> mx.array:
    arrays = (x for x in (q, k, v, mask, sinks) if isinstance(x, mx.array) and x.dtype != mx.bool_)
    if any(x.dtype != mx.bfloat16 for x in arrays):  # MLX's own, which refuses some of them
        return _ATTEND(q, k, v, mask=mask, sinks=sinks, **options)
    wide = [x.astype(mx.float32) for x in (q, k, v)]
    sinks = None if sinks is None else sinks.astype(mx.float32)
    return _ATTEND(*wide, mask=mask, sinks=sinks, **options).astype(mx.bfloat16)
