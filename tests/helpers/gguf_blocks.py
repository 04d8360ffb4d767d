"""GGUF's quantized blocks, by the format's definition: what they mean, and random ones."""

from __future__ import annotations

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Type


def half(blocks: np.ndarray, at: int) -> np.ndarray:
    """The float16 at a byte of every block, (blocks, 1)."""
    return blocks[:, at : at + 2].copy().view(np.float16).astype(np.float32)


def nibbles(blocks: np.ndarray) -> np.ndarray:
    """Low halves of the bytes, then the high ones."""
    return np.concatenate([blocks & 15, blocks >> 4], axis=1).astype(np.float32)


def fifth_bits(blocks: np.ndarray) -> np.ndarray:
    return np.unpackbits(blocks, axis=1, bitorder="little").astype(np.float32) * 16


def q4_0(b: np.ndarray) -> np.ndarray:
    return half(b, 0) * (nibbles(b[:, 2:]) - 8)


def q4_1(b: np.ndarray) -> np.ndarray:
    return half(b, 0) * nibbles(b[:, 4:]) + half(b, 2)


def q5_0(b: np.ndarray) -> np.ndarray:
    return half(b, 0) * (nibbles(b[:, 6:]) + fifth_bits(b[:, 2:6]) - 16)


def q5_1(b: np.ndarray) -> np.ndarray:
    return half(b, 0) * (nibbles(b[:, 8:]) + fifth_bits(b[:, 4:8])) + half(b, 2)


def q8_0(b: np.ndarray) -> np.ndarray:
    return half(b, 0) * b[:, 2:].view(np.int8)


def six_bit_pairs(b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Eight scales and eight minima from the twelve bytes of a Q4_K or Q5_K block."""
    low, high, mixed = b[:, :4], b[:, 4:8], b[:, 8:]
    scales = np.concatenate([low & 63, mixed & 15 | low >> 6 << 4], axis=1)
    minima = np.concatenate([high & 63, mixed >> 4 | high >> 6 << 4], axis=1)
    return scales.astype(np.float32)[..., None], minima.astype(np.float32)[..., None]


def q4_k(b: np.ndarray) -> np.ndarray:
    scales, minima = six_bit_pairs(b[:, 4:16])
    values = np.stack([nibbles(part) for part in np.split(b[:, 16:], 4, axis=1)], axis=1)
    values = values.reshape(-1, 8, 32)
    return half(b, 0)[..., None] * scales * values - half(b, 2)[..., None] * minima


def q5_k(b: np.ndarray) -> np.ndarray:
    scales, minima = six_bit_pairs(b[:, 4:16])
    fifth = np.stack([b[:, 16:48] >> i & 1 for i in range(8)], axis=1) * 16
    values = np.stack([nibbles(part) for part in np.split(b[:, 48:], 4, axis=1)], axis=1)
    values = values.reshape(-1, 8, 32) + fifth
    return half(b, 0)[..., None] * scales * values - half(b, 2)[..., None] * minima


def q6_k(b: np.ndarray) -> np.ndarray:
    values = np.empty((len(b), 256), np.float32)
    for i in range(256):
        part, quarter, column = i // 128, i % 128 // 32, i % 32
        low = b[:, part * 64 + quarter % 2 * 32 + column] >> quarter // 2 * 4 & 15
        high = b[:, 128 + part * 32 + column] >> quarter * 2 & 3
        values[:, i] = (low | high << 4).astype(np.float32) - 32
    scales = b[:, 192:208].view(np.int8).repeat(16, axis=1).astype(np.float32)
    return half(b, 208) * scales * values


def mxfp4(b: np.ndarray) -> np.ndarray:
    """Codes of a sign and 0, 0.5, 1, 1.5, 2, 3, 4 or 6, times a power of two."""
    positive = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
    values = np.concatenate([positive, -positive])[nibbles(b[:, 1:]).astype(int)]
    return values * np.exp2(b[:, :1].astype(np.float32) - 127)


# Where a block has float16 numbers; all its other bytes may be anything.
BLOCKS = {
    Type.Q4_0: (q4_0, [0]),
    Type.Q4_1: (q4_1, [0, 2]),
    Type.Q5_0: (q5_0, [0]),
    Type.Q5_1: (q5_1, [0, 2]),
    Type.Q8_0: (q8_0, [0]),
    Type.Q4_K: (q4_k, [0, 2]),
    Type.Q5_K: (q5_k, [0, 2]),
    Type.Q6_K: (q6_k, [208]),
    Type.MXFP4: (mxfp4, []),
}


def draw_blocks(kind: Type, size: int, rng: np.random.Generator, scale: float = 1.0) -> np.ndarray:
    """Blocks of ``size`` numbers, (blocks, bytes), with scales up to ``scale``."""
    numbers, length = gguf.GGML_QUANT_SIZES[kind]
    blocks = rng.integers(0, 256, (size // numbers, length), dtype=np.uint8)
    for at in BLOCKS[kind][1]:
        halves = rng.uniform(-scale, scale, (len(blocks), 1)).astype(np.float16)
        blocks[:, at : at + 2] = halves.view(np.uint8)
    if kind == Type.MXFP4:
        blocks[:, 0] = rng.integers(110, 128, len(blocks))
    return blocks
