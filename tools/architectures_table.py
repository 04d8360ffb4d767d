"""Converts small random checkpoints of every family in every way: the errors of architectures.md.

    python tools/architectures_table.py

The checkpoints and the float64 reference are those of the tests.
"""

import argparse
import contextlib
import io
import sys
import tempfile
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm
import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "tests/helpers"))
import reference
from architectures import ARCHITECTURES, STOCK, as_mlx_lm, make, skipless, without

import mlx_skipless

WAYS: dict[str, list[dict[str, Any]]] = {
    "in mlx-lm's own network": [{"remove": "none"}],
    "norms folded": [{"fold_norms": True}],
    "first layer a table": [{"precompute_first_layer": "force"}],
    "attention or FFN dropped": [{"drop_attention": 1}, {"drop_ffn": 1}],
    "skipless": [{"skipless": True, "remove": "none"}],
    "skipless, removed": [
        {"skipless": True, "remove": letters} for letters in ("qp", "kp", "vp", "q", "p")
    ],
}
SEEDS = range(3)


def error(name: str, seed: int, options: dict[str, Any]) -> float | None:
    """The worst token's relative logit error against the reference; None if it is refused."""
    tokens = np.random.default_rng(seed).integers(0, 256, (2, 12))
    with tempfile.TemporaryDirectory() as folder:
        source, out = Path(folder) / "source", Path(folder) / "out"
        config, weights = make(source, name, seed=seed, **as_mlx_lm(name))
        try:
            report = mlx_skipless.convert(source, out, verify=False, **options)
        except mlx_skipless.UserError:
            return None
        if "skipless" in options:
            expected = reference.logits(*skipless(config, weights), tokens)
        else:
            expected = reference.logits(config, without(weights, report.removed), tokens)
        model, _ = mlx_lm.load(str(out), trust_remote_code=True)  # type: ignore[misc]
        return reference.worst_relative_error(expected, np.array(model(mx.array(tokens))))


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    print("| |", " | ".join(WAYS), "|")
    print("|---" * (len(WAYS) + 1) + "|")
    for name in ARCHITECTURES:
        cells = []
        for way, choices in WAYS.items():
            with contextlib.redirect_stderr(io.StringIO()):
                found = [error(name, seed, options) for seed in SEEDS for options in choices]
            errors = [one for one in found if one is not None]
            cells.append(
                f"{max(errors):.0e}" if way != "in mlx-lm's own network" or name in STOCK else ""
            )
        print(f"| {name} |", " | ".join(cells), "|", flush=True)


if __name__ == "__main__":
    main()
