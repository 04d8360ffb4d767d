"""Drops attention from a pretrained model in several ways: the table of pretrained.md.

    python docs/pretrained.py SRC CALIBRATION_TEXT HEALING_TEXT TEST_TEXT

No book should be in both the last text and one of the others. Each row says what the loss on the
last text is, as a multiple of the whole model's: chosen in one shot, greedily, greedily and healed,
and ten times at random.
"""

import argparse
import tempfile
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np

import mlx_skipless
from mlx_skipless import corpus, evaluation, generation, healing
from mlx_skipless.healing import Treatment
from mlx_skipless.report import Report

COUNTS = (2, 4, 6, 8, 10)
DRAWS = 10
TOKENS, CONTEXT = 8192, 128  # that judge
HEALING = Treatment(steps=100, batch_size=2, context=CONTEXT, warmup=10)
QUESTION = "Tell me a tale about a fox, a crow and a piece of cheese."


class Nothing:
    """A sub-layer that is not there."""

    def __call__(self, *_: Any) -> float:
        return 0.0


class Judge:
    """The whole model and the text that no choice has seen."""

    def __init__(self, source: str, test: str):
        self.model, self.tokenizer = mlx_skipless.load(source)
        text = corpus.read_texts([], [Path(test)]).validation
        self._tokens = corpus.encode(text, self.tokenizer._tokenizer)
        self.whole = self.score(self.model)

    def score(self, model: Any) -> evaluation.Score:
        return evaluation.score(
            lambda batch: evaluation.nll(model, batch),
            self._tokens, self.tokenizer._tokenizer, CONTEXT, 16, TOKENS,
        )  # fmt: skip

    def without(self, layers: Collection[int]) -> evaluation.Score:
        blocks = [self.model.layers[layer] for layer in layers]
        kept = [(block.input_layernorm, block.self_attn) for block in blocks]
        for block in blocks:
            block.input_layernorm = block.self_attn = Nothing()
        found = self.score(self.model)
        for block, (norm, attention) in zip(blocks, kept, strict=True):
            block.input_layernorm, block.self_attn = norm, attention
        return found

    def times(self, score: evaluation.Score) -> str:
        times = score.loss / self.whole.loss
        return f"x {times:.3f}, {score.bits_per_character:.3f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    for name in ("source", "calibration", "healing", "test"):
        parser.add_argument(name)
    options = parser.parse_args()
    judge = Judge(options.source, options.test)
    whole = judge.whole
    print(
        f"whole: {whole.loss:.4f} nats per token, {whole.bits_per_character:.3f} bits per character"
    )
    with tempfile.TemporaryDirectory() as folder:
        rows(options, judge, Path(folder))


def rows(options: argparse.Namespace, judge: Judge, folder: Path) -> None:
    def reduced(count: int, *, greedy: bool) -> tuple[Path, Report]:
        out = folder / f"{count}{' greedy' if greedy else ''}"
        return out, mlx_skipless.convert(
            options.source, out, drop_attention=count, greedy=greedy, dtype="float32",
            calibration=options.calibration, verify=False,
        )  # fmt: skip

    random = np.random.default_rng(0)
    for count in COUNTS:
        _, one_shot = reduced(count, greedy=False)
        out, greedy = reduced(count, greedy=True)
        draws = sorted(
            judge.without(random.choice(len(judge.model.layers), count, replace=False)).loss
            / judge.whole.loss
            for _ in range(DRAWS)
        )
        print(
            f"| {count} | {greedy.params_after:,} | {greedy.cache_bytes_after:,} "
            f"| {judge.times(judge.without(one_shot.removed['attention']))} "
            f"| {judge.times(judge.without(greedy.removed['attention']))}",
            end=" ",
            flush=True,
        )
        against = generation.compare([out, (judge.model, judge.tokenizer)], QUESTION, temp=0.0)
        healed = folder / f"{count} healed"
        healing.heal(out, options.source, healed, HEALING, data=[options.healing])
        score = judge.score(mlx_skipless.load(healed)[0])
        print(
            f"| {judge.times(score)} | x {draws[0]:.3f} to {draws[-1]:.3f} "
            f"| x {against.generation_tps_ratio:.2f} of {against.second.generation_tps:.1f} |",
            one_shot.removed["attention"],
            greedy.removed["attention"],
            flush=True,
        )


if __name__ == "__main__":
    main()
