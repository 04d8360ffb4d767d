"""A conversion held against the reference: its tensors in float64, and what its folder computes."""

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import reference

import mlx_skipless
from mlx_skipless.checkpoints.checkpoint import open_checkpoint
from mlx_skipless.removal.merger import Merger
from mlx_skipless.removal.plan import make_plan

TOLERANCE = 5e-4  # worst token's relative logit error, float32


class ExactMerger(Merger):
    """Keeps what it merges as it is computed, a gain that is folded alone in float64, too."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._source.scale = lambda *_: None  # type: ignore[method-assign]
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
    # Rows of a matrix that was merged in parts, or experts one by one.
    return whole | {
        name: np.concatenate(parts).reshape(whole[name].shape)
        for name, parts in merger.exact.items()
    }


def check_same_function(
    source: tuple[dict[str, Any], dict[str, np.ndarray]], folder: Path, seed: int
) -> None:
    """A converted folder, prompt in one go and token by token, against the source in float64."""
    model, _ = mlx_skipless.load(folder)
    config, _ = source
    tokens = np.random.default_rng(seed).integers(0, config["vocab_size"], (2, 9))
    expected = reference.logits(*source, tokens)
    at_once = model(mx.array(tokens))
    assert reference.worst_relative_error(expected, np.array(at_once)) <= TOLERANCE
    cache = model.make_cache()
    steps = [model(mx.array(tokens[:, i : i + 1]), cache) for i in range(tokens.shape[1])]
    stepwise = np.array(mx.concatenate(steps, axis=1))
    assert reference.worst_relative_error(expected, stepwise) <= TOLERANCE
