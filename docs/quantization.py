"""Draws KL against bytes for a skipless model quantized in several ways, as in quantization.md.

    python docs/quantization.py SRC CALIBRATION_TEXT TEST_TEXT docs/quantization.png

Prints a table too. SRC is a skipless checkpoint; the two texts should come from different books.
"""

import argparse
import tempfile
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import mlx.core as mx

import mlx_skipless
from mlx_skipless.calibrate import NearestParts
from mlx_skipless.checkpoint import open_checkpoint
from mlx_skipless.curve import COLOURS
from mlx_skipless.layout import Layout, Quantization
from mlx_skipless.merge import Merger
from mlx_skipless.plan import make_plan
from mlx_skipless.verify import StreamedNetwork, WrittenParts, compare

BITS = (3, 4, 5, 6, 8)
TEST = (64, 128)  # sequences, tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("source", "calibration", "test", "output"):
        parser.add_argument(name)
    options = parser.parse_args()
    checkpoint = open_checkpoint(options.source)
    tokenizer = mlx_skipless.load(options.source)[1]
    sequences, length = TEST
    ids = tokenizer.encode(Path(options.test).read_text(encoding="utf-8"))[: sequences * length]
    tokens = mx.array(ids).reshape(sequences, length)
    plain = make_plan(checkpoint.args, remove="none")
    source = StreamedNetwork(plain.after, Merger(checkpoint, plain, mx.float32), resident=True)
    weights = Layout(plain.after, mx.float32).count()

    def kl(network: StreamedNetwork) -> float:
        return compare(source, [network], tokens, options.test)[0].kl

    def nearest(remove: str, bits: int) -> tuple[int, float]:
        plan = make_plan(checkpoint.args, remove=remove, quantized=True)
        layout = Layout(plan.after, mx.float32, Quantization(bits))
        parts = NearestParts(Merger(checkpoint, plan, mx.float32), layout)
        return layout.nbytes(), kl(StreamedNetwork(plan.after, parts, layout.settings))

    def ours(**how) -> tuple[int, float]:
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "out"
            report = mlx_skipless.convert(
                options.source, out, calibration=options.calibration, **how
            )
            model = mlx_skipless.load(out)[0]
            network = StreamedNetwork(model.args, WrittenParts(out), report.quantization)
            return report.bytes_after, kl(network)

    sizes = {bits: nearest("none", bits)[0] for bits in BITS}
    curves = {
        "quantized alone (mlx-lm)": [nearest("none", bits) for bits in BITS],
        "Q and P removed, then rounded (naive)": [nearest("qp", bits) for bits in BITS],
        "-q --remove qp": [ours(quantize=True, q_bits=bits, remove="qp") for bits in BITS],
        "-q": [ours(quantize=True, q_bits=bits) for bits in BITS],
        "--target-bytes": [ours(target_bytes=sizes[bits]) for bits in BITS],
    }
    figure, axes = plt.subplots(figsize=(8, 5), facecolor="white")
    for (label, found), colour in zip(curves.items(), COLOURS, strict=False):
        for nbytes, value in found:
            print(f"{label:40} {nbytes:10,} {nbytes / weights:.3f} {value:.6f}")
        per_weight = [nbytes / weights for nbytes, _ in found]
        values = [value for _, value in found]
        axes.plot(per_weight, values, color=colour, marker="o", markersize=4, label=label)
    axes.set_yscale("log")
    axes.set_xlabel("bytes per weight of the source")
    axes.set_ylabel("KL(source || result), nats per token")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(options.output, dpi=120)


if __name__ == "__main__":
    main()
