"""Quantizes a model in all of mlx-lm's ways and in ours: a table and a figure of quantization.md.

    python tools/rivals_table.py MODEL CALIBRATION_TEXT TEST_TEXT --work DIR --plot docs/rivals.png

All see the same calibration text. KL and loss are measured against the model in float32 on another
text. DIR keeps every result, so a run that stopped goes on; --only NAME … takes some of the rows.

mlx-lm's own commands run as they are, but for what a CPU needs: the model that they read is in
float32, as is DWQ's training, and products of packed matrices are computed with the matrices
unpacked. Scales and whatever else is not packed are stored in bfloat16 afterwards, as of a model in
bfloat16.
"""

import argparse
import json
import os
import resource
import runpy
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm
import numpy as np
from mlx.utils import tree_flatten
from mlx_lm.quant import dwq
from mlx_lm.utils import dequantize_model

from mlx_skipless.cli.figures import add_figure_arguments, open_figure
from mlx_skipless.evaluation.plots import plot_curves
from mlx_skipless.inference.sizes import count_bytes_read
from mlx_skipless.network.metrics import measure_kl, measure_nll

TEST = (64, 128)  # sequences, tokens
PASSAGE = 2000  # characters of a text that DWQ trains on
AXIS = "KL, nats per token"


@dataclass(frozen=True)
class Row:
    """A way to quantize.

    Attributes:
        family: the curve that it is on.
        name: of the row.
        command: a program and its command.
        arguments: of the command, but for the model and the result.
    """

    family: str
    name: str
    command: tuple[str, str]
    arguments: tuple[str, ...]


def list_rows(weights: int, calibration: str, passages: str) -> list[Row]:
    """List the rows: mlx-lm's ways, at their defaults and tuned, and ours at the same sizes."""
    rows = []

    def add(name: str, command: str, *arguments: Any, family: str = "") -> None:
        program = "mlx_skipless.cli" if command == "convert.py" else "mlx_lm"
        own = (program, command.removesuffix(".py"))
        rows.append(Row(family or " ".join(own), name, own, tuple(map(str, arguments))))

    for bits in (3, 4, 5, 6, 8):
        add(f"nearest-{bits}", "convert", "-q", "--q-bits", bits)
    for recipe in ("mixed_2_6", "mixed_3_4", "mixed_3_6", "mixed_4_6"):
        add(recipe, "convert", "-q", "--quant-predicate", recipe, family="mlx_lm convert, recipes")
    for bits in (4, 8):
        add(f"gptq-{bits}", "gptq", "--bits", bits)
    for low, high, target in ((3, 4, 4), (3, 5, 4.5), (4, 5, 5), (4, 6, 5.5), (5, 6, 6)):
        sizes = ("--low-bits", low, "--high-bits", high, "--target-bpw", target)
        add(f"dynamic-{low}-{high}", "dynamic_quant", *sizes)
    text = ("--data-path", passages, "--num-samples", 128, "--max-seq-length", 513)
    for bits in (3, 4, 5, 6):
        for rate in ("1e-6", "1e-5", "1e-4"):
            add(f"dwq-{bits}-{rate}", "dwq", "--bits", bits, "--learning-rate", rate, *text)
        add(f"awq-{bits}", "awq", "--bits", bits, "--num-samples", 16)
    text = ("--calibration", calibration, "--dtype", "bfloat16", "--no-verify")
    for bits in (3, 4, 5, 6):
        add(f"fitted-{bits}", "convert.py", "-q", "--q-bits", bits, *text, family="ours, fitted")
    for size in (3.5, 4, 4.5, 5, 5.5, 6.5):
        target = ("--target-bytes", int(weights * size / 8), *text)
        add(f"mixed-{size}", "convert.py", *target, family="ours, mixed")
        family = "ours, mixed and distilled"
        add(f"distilled-{size}", "convert.py", *target, "--distill", 48, family=family)
    return rows


def multiply_unpacked(
    x: mx.array, w: mx.array, scales: mx.array, biases: mx.array | None = None, **form: Any
) -> mx.array:
    """Compute what ``mx.quantized_matmul`` does, with the matrix unpacked; scales get gradients."""
    transpose = form.pop("transpose", True)
    if biases is None:
        dense = mx.dequantize(w, scales, None, **form)
    else:
        codes = mx.dequantize(w, mx.ones_like(scales), mx.zeros_like(biases), **form)
        grouped = mx.stop_gradient(codes).reshape(*scales.shape, -1)
        dense = (grouped * scales[..., None] + biases[..., None]).reshape(codes.shape)
    return x @ (dense.T if transpose else dense)


class Bench:
    """The model, its texts, and the folder that keeps the results."""

    def __init__(self, model: str, calibration: Path, test: Path, work: Path):
        self.source, self.calibration, self.work = model, calibration, work
        self.passages = work / "passages"
        self.passages.mkdir(parents=True, exist_ok=True)
        text = calibration.read_text(encoding="utf-8")
        with open(self.passages / "train.jsonl", "w", encoding="utf-8") as file:
            for start in range(0, len(text) - PASSAGE, PASSAGE):
                print(json.dumps({"text": text[start : start + PASSAGE]}), file=file)
        given = work / ".cache/mlx-lm/calibration_v5.txt"  # what gptq, awq and dynamic_quant read
        given.parent.mkdir(parents=True, exist_ok=True)
        given.write_text(text, encoding="utf-8")
        self.floats = work / "float32"
        if not self.floats.exists():
            options = ("--hf-path", model, "--dtype", "float32")
            self.run(("mlx_lm", "convert"), options, to=self.floats)
        self.model, tokenizer = mlx_lm.load(str(self.floats))[:2]
        ids = tokenizer.encode(test.read_text(encoding="utf-8"))[: TEST[0] * TEST[1]]
        self.tokens = mx.array(ids).reshape(TEST)
        self.wanted: list[mx.array] = []

    def run(self, command: tuple[str, str], arguments: Sequence[str], to: Path) -> float:
        """Run a command, and return the seconds that all cores worked for it."""
        whole = [sys.executable, __file__, "--patched", *command, *arguments, "--mlx-path", str(to)]
        before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
        home = {"HOME": str(self.work), "HF_HUB_OFFLINE": "1"}
        subprocess.run(whole, env=os.environ | home, cwd=self.work, check=True)
        return resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before

    def take(self, row: Row) -> dict[str, float]:
        """Return a row's figures, made now unless they are there already."""
        folder, figures = self.work / row.name, self.work / f"{row.name}.json"
        if not figures.exists():
            program, command = row.command
            source = Path(self.floats if program == "mlx_lm" else self.source)
            flag = "--hf-path" if command == "convert" else "--model"
            arguments = (flag, str(source.resolve()), *row.arguments)
            shutil.rmtree(folder, ignore_errors=True)  # of a run that stopped
            seconds = self.run(row.command, arguments, to=folder)
            figures.write_text(json.dumps(self.measure(folder) | {"seconds": seconds}))
        return json.loads(figures.read_text())

    def measure(self, folder: Path) -> dict[str, float]:
        """Measure a quantized model: bytes, KL to the model in nats per token, loss."""
        model = mlx_lm.load(str(folder), lazy=True)[0]
        model.set_dtype(mx.bfloat16)
        size = sum(a.nbytes for _, a in tree_flatten(model.parameters()))
        read = count_bytes_read(model)
        model = dequantize_model(model)
        model.set_dtype(mx.float32)
        kl, loss = [], []
        for i, batch in enumerate(mx.split(self.tokens, len(self.tokens) // 4)):
            if i == len(self.wanted):
                self.wanted.append(self.model(batch))
                mx.eval(self.wanted[-1])
            got = model(batch)
            kl.append(measure_kl(self.wanted[i], got).mean().item())
            loss.append(measure_nll(got[:, :-1], batch[:, 1:]).mean().item())
        return {"bytes": size, "read": read, "kl": float(np.mean(kl)), "loss": float(np.mean(loss))}


def tabulate(figures: dict[str, dict[str, float]], weights: int, whole: float) -> list[str]:
    """Lay out the rows as Markdown, by bytes."""
    lines = [
        "| | bits per weight | MB | read for a token, MB | KL | loss | CPU minutes |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, row in sorted(figures.items(), key=lambda item: item[1]["bytes"]):
        bits, loss = 8 * row["bytes"] / weights, row["loss"] / whole
        lines.append(
            f"| {name} | {bits:.2f} | {row['bytes'] / 1e6:.1f} | {row['read'] / 1e6:.1f} "
            f"| {row['kl']:.4f} | x {loss:.4f} | {row['seconds'] / 60:.1f} |"
        )
    return lines


def find_frontier(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Keep the points than which no smaller one is better."""
    kept: list[tuple[float, float]] = []
    for size, kl in sorted(points):
        if not kept or kl < kept[-1][1]:
            kept.append((size, kl))
    return kept


def main() -> None:
    if sys.argv[1] == "--patched":
        sys.argv = sys.argv[2:]
        if mx.default_device().type == mx.cpu:
            mx.quantized_matmul = multiply_unpacked
            dwq.dwq_quantize = partial(dwq.dwq_quantize, dtype=mx.float32)
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
        return
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    for name in ("model", "calibration", "test"):
        parser.add_argument(name)
    parser.add_argument("--work", type=Path, required=True, metavar="DIR", help="keeps all results")
    parser.add_argument(
        "--only", nargs="*", metavar="ROW", help="rows to make; others are shown if they are there"
    )
    add_figure_arguments(parser, "--plot", "draw KL against bytes")
    options = parser.parse_args()
    paths = (Path(name).resolve() for name in (options.calibration, options.test, options.work))
    bench = Bench(options.model, *paths)
    weights = sum(a.size for _, a in tree_flatten(bench.model.parameters()))
    figures: dict[str, dict[str, float]] = {}
    curves: dict[str, list[tuple[float, float]]] = {}
    for row in list_rows(weights, str(bench.calibration), str(bench.passages)):
        made = (options.work / f"{row.name}.json").exists()
        if not made and options.only is not None and row.name not in options.only:
            continue
        figures[row.name] = found = bench.take(row)
        curves.setdefault(row.family, []).append((found["bytes"] / 1e6, found["kl"]))
        print(row.name, found, flush=True)
    whole = float(np.mean([
        measure_nll(bench.model(batch)[:, :-1], batch[:, 1:]).mean().item()
        for batch in mx.split(bench.tokens, len(bench.tokens) // 4)
    ]))  # fmt: skip
    print(
        f"the model itself: {whole:.4f} nats per token",
        *tabulate(figures, weights, whole),
        sep="\n",
    )
    with open_figure("--plot", options.plot, options.figure_size, options.figure_style) as draw:
        frontiers = {name: dict(find_frontier(points)) for name, points in curves.items()}
        draw(partial(plot_curves, xlabel="megabytes", ylabel=AXIS, yscale="log"), frontiers)


if __name__ == "__main__":
    main()
