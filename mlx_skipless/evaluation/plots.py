"""Loss curves of training runs, as a PNG. Knows events of a log and nothing of training."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

# Okabe and Ito's colours, told apart by most colour-blind readers.
COLOURS = (
    "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999933",
    "#882255", "#44AA99", "#AA4499", "#6699CC",
)  # fmt: skip


def plot(runs: Mapping[str, Sequence[Mapping[str, Any]]], file: Path) -> None:
    """Draw the loss of some runs against the tokens they saw.

    Args:
        runs: events of each run's log by the name it gets in the figure; training losses are drawn
            as lines, validation losses as dots on them.
        file: the PNG to write.
    """
    figure, axes = plt.subplots(figsize=(8, 5), facecolor="white")
    lowest = []
    for i, (name, events) in enumerate(runs.items()):
        colour = COLOURS[i % len(COLOURS)]
        tokens = {e["step"]: e["tokens"] / 1e6 for e in events if "tokens" in e}
        losses = [(tokens[e["step"]], e["loss"]) for e in events if "loss" in e]
        held_out = [
            (tokens[e["step"]], e["validation_loss"])
            for e in events
            if "validation_loss" in e and e["step"] in tokens
        ]
        label = name.replace("$", r"\$")  # else matplotlib takes it for mathematics
        if held_out:
            label += f": {held_out[-1][1]:.3f}"
        axes.plot(*zip(*losses, strict=True) if losses else ([], []), color=colour, alpha=0.35)
        axes.plot(
            *zip(*held_out, strict=True) if held_out else ([], []),
            color=colour, marker="o", markersize=4, label=label,
        )  # fmt: skip
        lowest += [loss for _, loss in losses + held_out]
    axes.set_xlabel("tokens, millions")
    axes.set_ylabel("loss, nats per token (dots: held-out text)")
    if lowest:
        span = sorted(lowest)
        # The first steps would flatten all that follows.
        axes.set_ylim(span[0] - 0.05, max(span[int(0.9 * (len(span) - 1))], span[0] + 0.5))
    axes.grid(alpha=0.3)
    if runs:
        axes.legend()
    figure.tight_layout()
    figure.savefig(file, format="png", dpi=120)
    plt.close(figure)
