"""Matrices packed as GPTQ, AWQ and MLX pack them, by these formats' definitions.

A packer returns a matrix's parts as the tool stores them and the values that these stand for.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np
from reference import Config

Parts = dict[str, mx.array]
Packer = Callable[[str, np.ndarray], tuple[Parts, np.ndarray]]


def round_groups(
    values: np.ndarray, group: np.ndarray, bits: int, symmetric: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Round (in, out) values to ``bits``, with a scale and a zero point for each group and output.

    Returns whole numbers (in, out), scales and zeros (groups, out); two zero points are 0.
    """
    top = 2**bits - 1
    groups = group.max() + 1
    low = np.stack([values[group == g].min(axis=0) for g in range(groups)])
    high = np.stack([values[group == g].max(axis=0) for g in range(groups)])
    if symmetric:
        scales = 2 * np.maximum(np.abs(low), np.abs(high)) / top
        zeros = np.full(scales.shape, 2 ** (bits - 1))
    else:
        scales = (high - low) / top
        zeros = np.clip(np.round(-low / scales), 0, top).astype(int)
        zeros[0, :2] = 0
    scales = scales.astype(np.float16).astype(np.float64)
    return (
        np.clip(np.round(values / scales[group] + zeros[group]), 0, top).astype(int),
        scales,
        zeros,
    )


def to_dense(
    whole: np.ndarray, scales: np.ndarray, zeros: np.ndarray, group: np.ndarray
) -> np.ndarray:
    return ((whole - zeros[group]) * scales[group]).T


def gptq_words(values: np.ndarray, bits: int) -> np.ndarray:
    """AutoGPTQ's packing of whole numbers (rows, columns) along the rows, 32 at a time."""
    rows = values.astype(np.uint64).reshape(-1, 32, values.shape[1]).swapaxes(0, 1)
    if bits == 3:
        # Two of 32 values lie across words: the eleventh as 2 + 1 bits, the 22nd as 1 + 2.
        words = [
            sum(rows[i] << np.uint64(3 * i) for i in range(10)) + ((rows[10] & 3) << 30),
            (rows[10] >> 2)
            + sum(rows[i] << np.uint64(3 * (i - 11) + 1) for i in range(11, 21))
            + ((rows[21] & 1) << 31),
            (rows[21] >> 1) + sum(rows[i] << np.uint64(3 * (i - 22) + 2) for i in range(22, 32)),
        ]
    else:
        fit = 32 // bits
        words = [
            sum(rows[start + i] << np.uint64(bits * i) for i in range(fit))
            for start in range(0, 32, fit)
        ]
    return np.stack(words, axis=1).reshape(-1, values.shape[1]).astype(np.uint32).view(np.int32)


def gptq(
    bits: int,
    *,
    group_size: int = 32,
    act_order: bool = False,
    symmetric: bool = False,
    v2: bool = False,
    g_idx: bool = True,
) -> tuple[Config, Packer]:
    rng = np.random.default_rng(bits)

    def pack(path: str, values: np.ndarray) -> tuple[Parts, np.ndarray]:
        n_in = values.shape[1]
        group = np.arange(n_in) // (group_size if group_size > 0 else n_in)
        group = rng.permutation(group) if act_order else group
        whole, scales, zeros = round_groups(values.T, group, bits, symmetric)
        stored_zeros = zeros if v2 else (zeros - 1) % 2**bits
        parts = {
            "qweight": mx.array(gptq_words(whole, bits)),
            "qzeros": mx.array(np.ascontiguousarray(gptq_words(stored_zeros.T, bits).T)),
            "scales": mx.array(scales.astype(np.float16)),
        }
        if g_idx:
            parts["g_idx"] = mx.array(group.astype(np.int32))
        return parts, to_dense(whole, scales, zeros, group)

    declared = {
        "quant_method": "gptq",
        "bits": bits,
        "group_size": group_size,
        "desc_act": act_order,
        "sym": symmetric,
    }
    declared |= {"checkpoint_format": "gptq_v2"} if v2 else {}
    return {"quantization_config": declared}, pack


def awq_words(values: np.ndarray) -> np.ndarray:
    """AutoAWQ's GEMM packing of 4-bit whole numbers (rows, columns) along the columns."""
    columns = values.astype(np.uint32).reshape(len(values), -1, 8)
    order = (0, 2, 4, 6, 1, 3, 5, 7)
    return sum(columns[..., o] << np.uint32(4 * i) for i, o in enumerate(order)).view(np.int32)


def awq(group_size: int = 32) -> tuple[Config, Packer]:
    def pack(path: str, values: np.ndarray) -> tuple[Parts, np.ndarray]:
        n_in = values.shape[1]
        group = np.arange(n_in) // (group_size if group_size > 0 else n_in)
        whole, scales, zeros = round_groups(values.T, group, 4, symmetric=False)
        parts = {
            "qweight": mx.array(awq_words(whole)),
            "qzeros": mx.array(awq_words(zeros)),
            "scales": mx.array(scales.astype(np.float16)),
        }
        return parts, to_dense(whole, scales, zeros, group)

    declared = {
        "quant_method": "awq",
        "bits": 4,
        "group_size": group_size,
        "version": "GEMM",
        "zero_point": True,
    }
    return {"quantization_config": declared}, pack


def stream(values: np.ndarray, bits: int) -> mx.array:
    """Whole numbers (rows, columns) as one row of bits each, low ones first, in 32-bit words."""
    places = (values[..., None] >> np.arange(bits)) & 1
    packed = np.packbits(
        places.reshape(len(values), -1).astype(np.uint8), axis=1, bitorder="little"
    )
    return mx.array(packed.view(np.uint32))


E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
E4M3 = np.array([(m / 8 * 2**-6) if e == 0 else (1 + m / 8) * 2.0 ** (e - 7)
                 for e in range(16) for m in range(8)])[:-1]  # fmt: skip # the last is NaN


def nearest(values: np.ndarray, grid: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Codes, sign in the highest bit, and what they stand for."""
    code = np.abs(np.abs(values)[..., None] - grid).argmin(axis=-1)
    negative = values < 0
    bit = 8 if len(grid) == 8 else 128
    return code + bit * negative, np.where(negative, -grid[code], grid[code])


def mlx_pack(
    mode: str, group_size: int, bits: int, dtype: mx.Dtype = mx.bfloat16
) -> Callable[[np.ndarray], tuple[Parts, np.ndarray]]:
    def pack(values: np.ndarray) -> tuple[Parts, np.ndarray]:
        rows = len(values)
        groups = values.reshape(rows, -1, group_size)
        if mode == "affine":
            low, high = groups.min(axis=-1), groups.max(axis=-1)
            exact = ((high - low) / (2**bits - 1), low)
            stored = [mx.array(x.astype(np.float32)).astype(dtype) for x in exact]
            scale, bias = (np.array(x.astype(mx.float32), np.float64)[..., None] for x in stored)
            whole = np.clip(np.round((groups - bias) / scale), 0, 2**bits - 1).astype(int)
            meant = (whole * scale + bias).reshape(values.shape)
            parts = {"scales": stored[0], "biases": stored[1]}
        else:
            grid = E4M3 if mode == "mxfp8" else E2M1
            wanted = np.abs(groups).max(axis=-1) / grid.max()
            if mode == "nvfp4":
                code, scale = nearest(wanted, E4M3)
            else:
                code = np.round(np.log2(wanted)).astype(int) + 127
                scale = 2.0 ** (code - 127)
            whole, numbers = nearest(groups / scale[..., None], grid)
            meant = (numbers * scale[..., None]).reshape(values.shape)
            parts = {"scales": mx.array(code.astype(np.uint8))}
        return {"weight": stream(whole.reshape(values.shape), bits), **parts}, meant

    return pack


def mlx(mode: str, group_size: int, bits: int, **options: Any) -> tuple[Config, Packer]:
    pack = mlx_pack(mode, group_size, bits, **options)
    quantization = {"group_size": group_size, "bits": bits, "mode": mode}
    settings = {"quantization": quantization, "quantization_config": quantization}
    return settings, lambda path, values: pack(values)
