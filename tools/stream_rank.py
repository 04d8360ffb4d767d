"""Shows what a network's stream still tells apart, by depth, at the start and after training.

    python tools/stream_rank.py vanilla=RUN1 'three skips=RUN2' --text book.txt --output rank.png

Each RUN is a folder of ``mlx-skipless train``; its start is made again from its recipe. Two figures
a layer, of the first tokens of the text, 512 at most:

- the effective rank of the stream: exp of the entropy of its squared singular values, each as its
  share of their sum (Roy & Vetterli, 2007);
- the mean cosine of two places that hold the same token.

The stream is what enters a layer. Where the layer has a head skip it is the query, x Q + gamma a,
which carries all that the layers before have said, in Q's basis.
"""

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_skipless.checkpoints.files import read_json
from mlx_skipless.checkpoints.tokenizer import fetch_tokenizer
from mlx_skipless.cli.figures import WIDTHS, add_figure_arguments, check_suffix
from mlx_skipless.evaluation.plots import Look, draw_curves, open_panels
from mlx_skipless.inference.loading import load_network
from mlx_skipless.network.driver import Driver
from mlx_skipless.network.model import Model, Stream, take_stream
from mlx_skipless.options import read_options
from mlx_skipless.text.samples import read_text
from mlx_skipless.training.initialization import initialize, make_model_args
from mlx_skipless.training.recipe import Recipe

TOKENS = 512  # more than the width of the ladder's networks

Curves = dict[str, list[tuple[float, float]]]  # (effective rank, cosine) a layer, by network


def measure_stream(model: Any, tokens: Sequence[int]) -> list[tuple[float, float]]:
    """Measure what enters each layer: its effective rank and its same-token cosine."""
    return [
        (measure_rank(stream), measure_similarity(stream, tokens))
        for stream in list_streams(model, tokens)
    ]


def list_streams(model: Any, tokens: Sequence[int]) -> Iterator[np.ndarray]:
    """Give what enters each layer, (tokens, width), float64."""
    driver, ids = Driver(model), mx.array([tokens])
    h: Stream = driver.embed(ids)
    for layer, block in driver.walk():
        yield np.array(choose_stream(block, h)[0].astype(mx.float32), np.float64)
        h = driver.run(layer, h, ids)


def choose_stream(block: Any, h: Stream) -> mx.array:
    """Take what carries all that was said: the query where it has a head skip, else the stream."""
    attention: Any = block.self_attn
    if isinstance(h, mx.array) or "head_skip" not in attention:
        return take_stream(h)
    return attention.project(*h)["q"].flatten(-2)


def measure_rank(stream: np.ndarray) -> float:
    """Compute exp of the entropy of the squared singular values' shares."""
    shares = np.linalg.svd(stream, compute_uv=False) ** 2
    shares = shares[shares > 0] / shares.sum()
    return float(np.exp(-(shares * np.log(shares)).sum()))


def measure_similarity(stream: np.ndarray, tokens: Sequence[int]) -> float:
    """Compute the mean cosine over pairs of places of one token, each token counting once."""
    units = stream / np.linalg.norm(stream, axis=-1, keepdims=True)
    means = []
    for token in set(tokens):
        same = units[np.array(tokens) == token]
        count = len(same)
        if count > 1:
            # The sum of all cosines is the squared length of the sum; a place's with itself is 1.
            means.append(((same.sum(axis=0) ** 2).sum() - count) / (count * (count - 1)))
    return float(np.mean(means))


def measure_run(run: Path, text: str) -> tuple[list[Any], list[Any]]:
    """Measure a run's network at its start and as it is now."""
    tokens = fetch_tokenizer(str(run)).encode(text, add_special_tokens=False)[:TOKENS]
    recipe = read_options(Recipe, "recipe", read_json(run / "training" / "run.json")["recipe"])
    start = Model(make_model_args(recipe))
    initialize(start, recipe)
    trained, _, _ = load_network(run)
    return measure_stream(start, tokens), measure_stream(trained, tokens)


def draw(starts: Curves, ends: Curves, file: Path, look: Look) -> None:
    """Draw both figures against depth, at the start and after training."""
    names = "effective rank of the stream", "cosine of two places of a token"
    panels = [(row, when) for row in (0, 1) for when in ("at the start", "trained")]
    with open_panels(file, look, [3.5] * 4, 2.6) as (_, axes):
        for panel, (row, when) in zip(axes, panels, strict=True):
            curves = starts if when == "at the start" else ends
            of_row = {name: dict(enumerate(v[row] for v in c)) for name, c in curves.items()}
            draw_curves(
                panel, of_row, look, title=when, ylabel=names[row],
                xlabel="layer that reads the stream",
            )  # fmt: skip


def describe(starts: Curves, ends: Curves) -> str:
    """Make a Markdown table of what enters the last layer."""
    lines = [
        "| network | rank at the start | trained | cosine at the start | trained |",
        "|---|---:|---:|---:|---:|",
    ]
    for name in starts:
        (rank, cosine), (end_rank, end_cosine) = starts[name][-1], ends[name][-1]
        lines.append(f"| {name} | {rank:.0f} | {end_rank:.0f} | {cosine:.2f} | {end_cosine:.2f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("runs", nargs="+", metavar="NAME=RUN", help="networks and their folders")
    parser.add_argument("--text", required=True, help="a text file")
    add_figure_arguments(parser, "--output", "draw both figures", "rank.png")
    parser.set_defaults(figure_size=WIDTHS["page"])
    options = parser.parse_args()
    look = Look(check_suffix("--output", options.output), options.figure_size, options.figure_style)
    text, starts, ends = "\n".join(read_text(options.text)), {}, {}
    for name, _, run in (one.rpartition("=") for one in options.runs):
        starts[name], ends[name] = measure_run(Path(run), text)
    print(describe(starts, ends))
    draw(starts, ends, Path(options.output), look)


if __name__ == "__main__":
    main()
