"""Trains a quantized result's scales and biases to give the source's logits again.

The packed weights stay; each group's scale and bias moves a little, by the gradient of KL(source ||
result) on text, as in mlx-lm's DWQ. Nothing streams here: source and result are both in memory.
"""

from collections.abc import Callable, Mapping

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_map, tree_unflatten

from ..network.metrics import measure_kl
from ..network.parts import Arrays
from ..progress import Steps
from .formats import Format

LEARNING_RATE = 1e-2  # of a matrix's mean scale; a step of Adam is at most about that
WARM_UP = 20  # steps
LOGITS_BYTES = 1 << 28  # of one batch
MOST_ROWS = 8
JUDGE = 8  # one sequence in so many judges and is not trained on
JUDGE_EVERY = 50  # steps

Change = dict[str, dict[str, mx.array]]  # of each matrix's "width" and "centre", (out, groups)


def distill(
    teacher: nn.Module,
    student: nn.Module,
    packed: Arrays,
    forms: Mapping[str, Format],
    tokens: mx.array,
    *,
    steps: int,
    seed: int,
    progress: Steps = lambda done, total: None,
) -> dict[str, mx.array]:
    """Find the scales and biases of affine matrices that bring a network closest to its source.

    Args:
        teacher: the source, tokens (rows, length) to logits (rows, length, vocabulary).
        student: the result with dense matrices; their values are overwritten.
        packed: the matrices' parts by name, "X.weight", "X.scales" and "X.biases".
        forms: how they are packed, by module path X; all affine.
        tokens: (sequences, length) of text; the steps see it in random order.
        steps: of training.
        seed: of that order.
        progress: called with (steps done, all steps).

    Returns:
        The new scales and biases by name, float32: those of the step that did best on sequences
        that were not trained on, or the old ones.
    """
    groups = _Groups(packed, forms)

    def measure(change: Change, rows: mx.array, wanted: mx.array) -> mx.array:
        student.update(tree_unflatten([*groups.unpack(change).items()]))  # type: ignore[arg-type]
        return measure_kl(wanted, student(rows)).mean()

    judge, draw = _split_text(teacher, tokens, seed)
    change = groups.begin()
    best, least = change, _judge(measure, teacher, judge, change)
    adam = optim.Adam(learning_rate=_make_schedule(steps), bias_correction=True)  # type: ignore[arg-type]
    differentiate = mx.value_and_grad(measure)
    for step in range(1, steps + 1):
        progress(step - 1, steps)
        batch = draw()
        _, gradient = differentiate(change, batch, teacher(batch))
        change = adam.apply_gradients(gradient, change)
        mx.eval(change, adam.state)
        if step % JUDGE_EVERY == 0 or step == steps:
            now = _judge(measure, teacher, judge, change)
            if now < least:
                best, least = change, now
    progress(steps, steps)
    return groups.list_scales(best)


class _Groups:
    """Affine matrices as widths and centres of their groups, which can be trained.

    A weight of code c is scale c + bias = scale (c - m) + (bias + m scale), with m in the middle of
    the codes. The second sum is its group's centre. So the width (the scale) can change without
    shifting the group, and the two can be trained apart.
    """

    def __init__(self, packed: Arrays, forms: Mapping[str, Format]):
        self._forms = forms
        self._codes: dict[str, mx.array] = {}  # less their middle, (out, groups, group size)
        self._unit: dict[str, mx.array] = {}  # a matrix's mean scale
        self._start: Change = {}
        for where, form in forms.items():
            scales, biases = (
                packed[f"{where}.{part}"].astype(mx.float32) for part in ("scales", "biases")
            )
            # With scales of 1 and biases of 0 the weights are their codes.
            plain = {"weight": packed[f"{where}.weight"], "scales": mx.ones_like(scales)}
            values = form.dense(plain | {"biases": mx.zeros_like(biases)})
            middle = _find_middle(form)
            self._codes[where] = values.reshape(*scales.shape, form.group_size) - middle
            self._unit[where] = mx.abs(scales).mean()
            self._start[where] = {"width": scales, "centre": biases + middle * scales}
        mx.eval(self._codes, self._unit, self._start)

    def begin(self) -> Change:
        """Return the change that changes nothing."""
        return tree_map(mx.zeros_like, self._start)  # type: ignore[return-value]

    def unpack(self, change: Change) -> dict[str, mx.array]:
        """Return the dense matrices, (out, in) by name, after a change."""
        dense = {}
        for where, (width, centre) in self._apply(change).items():
            weight = self._codes[where] * width[..., None] + centre[..., None]
            dense[f"{where}.weight"] = weight.reshape(weight.shape[0], -1)
        return dense

    def list_scales(self, change: Change) -> dict[str, mx.array]:
        """Return the scales and biases, (out, groups) by name, after a change."""
        out: dict[str, mx.array] = {}
        for where, (width, centre) in self._apply(change).items():
            out[f"{where}.scales"] = width
            out[f"{where}.biases"] = centre - _find_middle(self._forms[where]) * width
        return out

    def _apply(self, change: Change) -> dict[str, tuple[mx.array, mx.array]]:
        """Width and centre of each group; in the same time a centre moves some widths."""
        return {
            where: (
                self._start[where]["width"] + self._unit[where] * by["width"],
                self._start[where]["centre"]
                + self._unit[where] * self._forms[where].bits * by["centre"],
            )
            for where, by in change.items()
        }


def _split_text(
    teacher: nn.Module, tokens: mx.array, seed: int
) -> tuple[mx.array, Callable[[], mx.array]]:
    """The sequences that judge, and what draws a batch of the others."""
    sequences, length = tokens.shape
    vocabulary = teacher(tokens[:1, :1]).shape[-1]  # type: ignore[operator]
    rows = max(1, min(MOST_ROWS, LOGITS_BYTES // (4 * length * vocabulary)))
    seen = np.flatnonzero(np.arange(sequences) % JUDGE)
    random = np.random.default_rng(seed)

    def draw() -> mx.array:
        return tokens[mx.array(random.choice(seen, min(rows, len(seen)), replace=False))]

    return tokens[::JUDGE], draw


def _judge(
    measure: Callable[[Change, mx.array, mx.array], mx.array],
    teacher: nn.Module,
    sequences: mx.array,
    change: Change,
) -> float:
    """Mean KL over sequences, one at a time."""
    found = 0.0
    for row in sequences:
        found += float(measure(change, row[None], teacher(row[None])).item())  # type: ignore[arg-type,operator]
    return found / len(sequences)


def _make_schedule(steps: int) -> Callable[[mx.array], mx.array]:
    return lambda step: LEARNING_RATE * mx.minimum(1, (step + 1) / WARM_UP) * (1 - step / steps)


def _find_middle(form: Format) -> float:
    return (2**form.bits - 1) / 2
