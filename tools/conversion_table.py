"""Measures what each choice of precision costs: the tables of conversion.md.

    python tools/conversion_table.py

Relative errors in the Frobenius norm, on random weights as a checkpoint holds them.
"""

import argparse
from collections.abc import Callable

import mlx.core as mx
import numpy as np

from mlx_skipless.network.parts import dtype_name
from mlx_skipless.removal.products import Inverse, multiply

INPUTS, OUTPUTS = (512, 2048, 4096, 8192), 512
CONDITIONS = (1e1, 1e3, 1e5, 1e7)
SIZE = 1024  # of a matrix that is inverted
NARROW = (mx.bfloat16, mx.float16)
TF32 = 13  # bits of a float32 that a GPU may leave out


def stored(values: np.ndarray, dtype: mx.Dtype) -> np.ndarray:
    rounded = mx.array(values.astype(np.float32)).astype(dtype).astype(mx.float32)
    return np.array(rounded).astype(np.float64)


def tf32(values: np.ndarray) -> np.ndarray:
    """float32 rounded to the 11 significant bits that a GPU's matrix units may keep."""
    bits = values.astype(np.float32).view(np.uint32)
    half = np.uint32((1 << (TF32 - 1)) - 1) + (bits >> np.uint32(TF32) & np.uint32(1))
    return ((bits + half) & np.uint32(0xFFFFFFFF << TF32 & 0xFFFFFFFF)).view(np.float32)


def single(q: np.ndarray, k: np.ndarray) -> np.ndarray:
    """Solved in float32, by MLX: NumPy solves in float64 whatever it is given."""
    a, b = (mx.array(matrix.astype(np.float32)) for matrix in (q, k))
    return np.array(mx.linalg.solve(a, b, stream=mx.cpu)).astype(np.float64)


def error(got: np.ndarray, exact: np.ndarray) -> float:
    return float(np.linalg.norm(got - exact) / np.linalg.norm(exact))


def products(rng: np.random.Generator) -> None:
    print("\n| inputs | stored in | storing | float32 | TF32 | TF32, a gain folded in |")
    print("|---|---|---|---|---|---|")
    for n in INPUTS:
        for dtype in NARROW:
            p, m = (
                stored(rng.standard_normal(shape) / n**0.5, dtype)
                for shape in ((n, n), (n, OUTPUTS))
            )
            gained = np.exp(0.3 * rng.standard_normal((n, 1))) * m
            row = [error(stored(p @ m, dtype), p @ m)]
            for weight, rounder in ((m, None), (m, tf32), (gained, tf32)):
                a, b = (x.astype(np.float32) for x in (p, weight))
                rounded: Callable[[np.ndarray], np.ndarray] = rounder or (lambda x: x)
                row.append(error(multiply(rounded(a), rounded(b)), p @ weight))
            figures = " | ".join(f"{figure:.1e}" for figure in row)
            print(f"| {n} | {dtype_name(dtype)} | {figures} |")


def solutions(rng: np.random.Generator) -> None:
    """K* = Q^-1 K, and x* K* against k."""
    print("\n| condition | of | bfloat16 | float32 | float64 | float64, inverse formed |")
    print("|---|---|---|---|---|---|")
    u, v = (np.linalg.qr(rng.standard_normal((SIZE, SIZE)))[0] for _ in "uv")
    for condition in CONDITIONS:
        q = ((u * np.geomspace(1, 1 / condition, SIZE)) @ v).astype(np.float32).astype(np.float64)
        k, x = rng.standard_normal((SIZE, OUTPUTS)), rng.standard_normal((64, SIZE))
        solution = Inverse(q) @ k
        exact = solution + Inverse(q) @ (k - q @ solution)  # refined once
        tried = [
            stored(exact, mx.bfloat16),
            single(q, k),
            solution,
            np.linalg.inv(q) @ k,
        ]
        for of, errors in (
            ("K*", [error(got, exact) for got in tried]),
            ("k", [error(x @ q @ got, x @ k) for got in tried]),
        ):
            print(f"| {condition:.0e} | {of} | {' | '.join(f'{e:.1e}' for e in errors)} |")


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__).parse_args()
    products(np.random.default_rng(0))
    solutions(np.random.default_rng(0))
