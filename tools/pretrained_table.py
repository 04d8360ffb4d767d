"""Drops attention from a pretrained model, chosen and at random: a table of pretrained.md.

    python tools/pretrained_table.py SRC CALIBRATION_TEXT TEST_TEXT

The texts should come from different books. Each row says what the loss on the second is, as a
multiple of the whole model's: with layers chosen on the first in one shot, chosen greedily, and
drawn ten times at random.
"""

import argparse
import re
import tempfile
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np

import mlx_skipless
from mlx_skipless.evaluation import perplexity
from mlx_skipless.text import corpus

COUNTS = (2, 4, 6, 8, 10)
DRAWS = 10
TOKENS, CONTEXT = 4096, 128  # that judge


class Nothing:
    """A sub-layer that is not there."""

    def __call__(self, *_: Any) -> float:
        return 0.0


class Judge:
    """The whole model and the text that no choice has seen."""

    def __init__(self, source: str, test: str):
        self.model, self._tokenizer = mlx_skipless.load(source)
        text = corpus.read_texts([], [Path(test)]).validation
        self._tokens = corpus.encode(text, self._tokenizer._tokenizer)
        self.whole = self._loss()

    def _loss(self) -> float:
        return perplexity.score_tokens(
            lambda batch: perplexity.sum_nll(self.model, batch),
            self._tokens, self._tokenizer._tokenizer, CONTEXT, 16, TOKENS,
        ).loss  # fmt: skip

    def times(self, layers: Collection[int]) -> float:
        """The loss without these layers' attention, as a multiple."""
        blocks = [self.model.layers[layer] for layer in layers]
        kept = [(block.input_layernorm, block.self_attn) for block in blocks]
        for block in blocks:
            block.input_layernorm = block.self_attn = Nothing()
        found = self._loss()
        for block, (norm, attention) in zip(blocks, kept, strict=True):
            block.input_layernorm, block.self_attn = norm, attention
        return found / self.whole


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    for name in ("source", "calibration", "test"):
        parser.add_argument(name)
    options = parser.parse_args()
    judge = Judge(options.source, options.test)
    random = np.random.default_rng(0)
    layers = len(judge.model.layers)
    print(f"whole: {judge.whole:.4f} nats per token")
    order = greedy(options.source, options.calibration, COUNTS[-1])
    print("greedy:", *order)
    for count in COUNTS:
        chosen = one_shot(options.source, options.calibration, count)
        draws = [random.choice(layers, count, replace=False) for _ in range(DRAWS)]
        losses = sorted(judge.times(draw.tolist()) for draw in draws)
        print(
            f"| {count} | x {judge.times(chosen):.3f} | x {judge.times(order[:count]):.3f} "
            f"| x {losses[0]:.3f} to {losses[-1]:.3f}, median {np.median(losses):.3f} |",
            chosen,
            flush=True,
        )


def one_shot(source: str, text: str, count: int) -> list[int]:
    with tempfile.TemporaryDirectory() as folder:
        report = mlx_skipless.convert(
            source, Path(folder) / "out", drop_attention=count, calibration=text, verify=False
        )
        return report.removed["attention"]


def greedy(source: str, text: str, count: int) -> list[int]:
    """In the order in which they go, so that the first of them are the choice of fewer."""
    with tempfile.TemporaryDirectory() as folder:
        report = mlx_skipless.convert(
            source, Path(folder) / "out", drop_attention=count, greedy=True, calibration=text,
            verify=False,
        )  # fmt: skip
        (note,) = (note for note in report.notes if "after each drop" in note)
        return [int(layer) for layer in re.findall(r"attention (\d+)", note)]


if __name__ == "__main__":
    main()
