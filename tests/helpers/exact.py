"""A conversion's tensors in float64, before storage rounds them."""

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_skipless.checkpoints.checkpoint import open_checkpoint
from mlx_skipless.removal.merger import Merger
from mlx_skipless.removal.plan import make_plan


class ExactMerger(Merger):
    """Keeps what it merges as it is computed."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.exact: dict[str, list[np.ndarray]] = {}

    def _store(self, name: str, values: np.ndarray) -> mx.array:
        self.exact.setdefault(name, []).append(values)
        return super()._store(name, values)


def exact_tensors(folder: Path, **plan: Any) -> dict[str, np.ndarray]:
    """Every tensor of the result in float64; one that no merge touches is the source's."""
    checkpoint = open_checkpoint(folder)
    merger = ExactMerger(checkpoint, make_plan(checkpoint.args, **plan), mx.float32)
    stored = merger.embedding() | merger.head()
    for layer in range(checkpoint.args.num_hidden_layers):
        stored |= merger.layer(layer)
    whole = {name: np.array(array).astype(np.float64) for name, array in stored.items()}
    return whole | {name: np.concatenate(parts) for name, parts in merger.exact.items()}
