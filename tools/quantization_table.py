"""Quantizes a skipless model in several ways: the table and the figure of quantization.md.

    python tools/quantization_table.py SRC CALIBRATION_TEXT TEST_TEXT docs/quantization.png

SRC is a skipless checkpoint; the two texts should come from different books.
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

import mlx.core as mx

import mlx_skipless
from mlx_skipless.architectures.families import FAMILIES
from mlx_skipless.checkpoints.checkpoint import open_checkpoint
from mlx_skipless.cli.figures import add_figure_arguments, check_suffix
from mlx_skipless.conversion.check import WrittenParts, compare_networks
from mlx_skipless.evaluation.plots import Look, plot_curves
from mlx_skipless.network.driver import StreamedNetwork
from mlx_skipless.quantization.calibration import CalibratedParts, NearestParts
from mlx_skipless.quantization.layout import Layout, Quantization
from mlx_skipless.removal.candidates import find_measurable
from mlx_skipless.removal.merger import Merger
from mlx_skipless.removal.plan import Plan, make_plan
from mlx_skipless.removal.source import SourceReader
from mlx_skipless.text import samples

BITS = (3, 4, 5, 6, 8)
FORMATS = {
    "4 bits": Quantization(4),
    "8 bits": Quantization(8),
    "mxfp4": Quantization(mode="mxfp4"),
}
TEST = (64, 128)  # sequences, tokens

Point = tuple[int, float]  # bytes, KL in nats per token


class InOrder:
    """Parts that can be asked for once, kept to be asked for again."""

    def __init__(self, parts: Any, layers: int):
        self._embedding = parts.embedding()
        self._layers = [parts.layer(layer) for layer in range(layers)]
        self._head = parts.head()

    def embedding(self):
        return self._embedding

    def layer(self, layer: int):
        return self._layers[layer]

    def head(self):
        return self._head


class Bench:
    """One source and its test text."""

    def __init__(self, source: str, calibration: str, test: str):
        self.name, self._text = source, calibration
        self.checkpoint = open_checkpoint(source)
        self.args = self.checkpoint.args
        tokenizer = mlx_skipless.load(source)[1]
        sequences, length = TEST
        ids = tokenizer.encode(Path(test).read_text(encoding="utf-8"))[: sequences * length]
        self._tokens = mx.array(ids).reshape(sequences, length)
        found = samples.cut_passages(
            calibration, samples.read_text(Path(calibration)), tokenizer.encode, calibrating=True
        )
        self._calibration = found.calibration
        self._dense = self.merger(self.plan("none"))
        self._source = StreamedNetwork(self.args, self._dense, resident=True)
        self.weights = Layout(self.args, mx.float32).count()

    def merger(self, plan: Plan) -> Merger:
        return Merger(self.checkpoint, plan, mx.float32)

    def plan(self, remove: str) -> Plan:
        source = SourceReader(self.checkpoint)
        paths = find_measurable(self.args, remove)
        conditioning = {path: source.measure_conditioning(path) for path in paths}
        return make_plan(self.args, remove=remove, quantized=True, conditioning=conditioning)

    def kl(self, network: StreamedNetwork) -> float:
        return compare_networks(self._source, [network], self._tokens, "")[0].kl

    def rounded(self, remove: str, how: Quantization, *, against_text: bool = False) -> Point:
        """All removed that can be, and every matrix in the same format."""
        plan = self.plan(remove)
        layout, merger = Layout(plan.after, mx.float32, how), self.merger(plan)
        parts: Any = NearestParts(merger, layout)
        if against_text:
            parts = CalibratedParts(self._source, merger, layout, self._calibration)
            parts = InOrder(parts, self.args.num_hidden_layers)
        return layout.nbytes(), self.kl(StreamedNetwork(plan.after, parts, layout.config_entry))

    def converted(self, **options: Any) -> Point:
        """What ``convert`` makes of it."""
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "out"
            report = mlx_skipless.convert(
                self.name, out, calibration=self._text, verify=False, **options
            )
            args = open_checkpoint(out).args
            network = StreamedNetwork(
                args, WrittenParts(out, args, FAMILIES["skipless"]), report.quantization
            )
            return report.bytes_after, self.kl(network)


def table(bench: Bench) -> None:
    """KL as multiples of that of quantization alone, which comes first in nats."""
    alone = {name: bench.rounded("none", how) for name, how in FORMATS.items()}
    print("alone, to nearest", *(f"{name} {kl:.5f}" for name, (_, kl) in alone.items()), sep=" | ")
    for label, remove, against_text in (
        ("removed, to nearest (naive)", "auto", False),
        ("removed, against text", "auto", True),
        ("P removed, to nearest", "p", False),
        ("P removed, against text", "p", True),
        ("nothing removed, against text", "none", True),
    ):
        for name, how in FORMATS.items():
            nbytes, kl = bench.rounded(remove, how, against_text=against_text)
            size, nearest = alone[name]
            print(f"{label} | {name} | {nbytes / size:.3f} | {kl / nearest:.3g} x", flush=True)
    for name, how in FORMATS.items():
        nbytes, kl = bench.converted(quantize=True, q_bits=how.bits, q_mode=how.mode)
        print(f"-q | {name} | {nbytes / alone[name][0]:.3f} | {kl / alone[name][1]:.3g} x")


def curves(bench: Bench) -> dict[str, list[Point]]:
    widths = [Quantization(bits) for bits in BITS]
    alone = [bench.rounded("none", how) for how in widths]
    return {
        "quantized alone, to nearest (mlx-lm)": alone,
        "removed, then to nearest (naive)": [bench.rounded("auto", how) for how in widths],
        "convert -q": [bench.converted(quantize=True, q_bits=bits) for bits in BITS],
        "convert --target-bytes": [bench.converted(target_bytes=size) for size, _ in alone[:-1]],
    }


def draw(found: dict[str, list[Point]], weights: int, file: str, look: Look) -> None:
    curves = {
        label: {nbytes / weights: kl for nbytes, kl in points} for label, points in found.items()
    }
    for label, curve in curves.items():
        for x, y in curve.items():
            print(f"{label} | {x:.3f} bytes per weight | {y:.6f} nats")
    plot_curves(
        curves, Path(file), look, yscale="log", xlabel="bytes per weight of the source",
        ylabel="KL(source || result), nats per token",
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    for name in ("source", "calibration", "test"):
        parser.add_argument(name)
    add_figure_arguments(parser, "output", "draw KL against bytes")
    options = parser.parse_args()
    look = Look(check_suffix("", options.output), options.figure_size, options.figure_style)
    bench = Bench(options.source, options.calibration, options.test)
    table(bench)
    draw(curves(bench), bench.weights, options.output, look)


if __name__ == "__main__":
    main()
