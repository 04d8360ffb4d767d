"""Training a quantized result's scales and biases, to give the source's logits again.

The packed weights stay; each group's scale and bias moves a little, by the gradient of KL(source ||
result) on text, as in mlx-lm's DWQ. Nothing streams here: source and result are both in memory.
"""

from collections.abc import Mapping

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_unflatten

from ..progress import Steps
from .formats import Format

LEARNING_RATE = 1e-2  # of a matrix's mean scale; a step of Adam is at most about that
WARM_UP = 20  # steps
LOGITS_BYTES = 1 << 28  # of one batch
MOST_ROWS = 8
JUDGE = 8  # one sequence in so many judges and is not trained on
JUDGE_EVERY = 50  # steps

Arrays = Mapping[str, mx.array]


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
    """The scales and biases of affine matrices that bring a network closest to its source.

    Args:
        teacher: the source, tokens (rows, length) to logits (rows, length, vocabulary).
        student: the result with dense matrices; their values are overwritten.
        packed: the matrices' parts by name, "X.weight", "X.scales" and "X.biases".
        forms: how they are packed, by module path X; all affine.
        tokens: (sequences, length) of text; the steps see it in random order.
        steps: of training.
        seed: of that order.

    Returns:
        The new scales and biases by name, float32: those of the step that did best on sequences
        that were not trained on, or the old ones.
    """
    codes: dict[str, mx.array] = {}  # (out, groups, group size), about their middle
    unit: dict[str, mx.array] = {}
    start: dict[str, dict[str, mx.array]] = {}
    for where, form in forms.items():
        scales, biases = (packed[f"{where}.{p}"].astype(mx.float32) for p in ("scales", "biases"))
        plain = {"weight": packed[f"{where}.weight"], "scales": mx.ones_like(scales)}
        values = form.dense(plain | {"biases": mx.zeros_like(biases)})
        # So that a scale widens its group without shifting it.
        middle = _middle(form)
        codes[where] = values.reshape(*scales.shape, form.group_size) - middle
        unit[where] = mx.abs(scales).mean()
        start[where] = {"width": scales, "centre": biases + middle * scales}
    mx.eval(codes, unit, start)

    def moved(change: dict[str, dict[str, mx.array]]) -> dict[str, tuple[mx.array, mx.array]]:
        """Width and centre of each group; in the same time a centre moves some widths."""
        return {
            where: (
                start[where]["width"] + unit[where] * by["width"],
                start[where]["centre"] + unit[where] * forms[where].bits * by["centre"],
            )
            for where, by in change.items()
        }

    def loss(change: dict[str, dict[str, mx.array]], rows: mx.array, wanted: mx.array) -> mx.array:
        dense = []
        for where, (width, centre) in moved(change).items():
            weight = codes[where] * width[..., None] + centre[..., None]
            dense.append((f"{where}.weight", weight.reshape(weight.shape[0], -1)))
        student.update(tree_unflatten(dense))  # type: ignore[arg-type]
        got = nn.log_softmax(student(rows).astype(mx.float32), axis=-1)
        wanted = nn.log_softmax(wanted.astype(mx.float32), axis=-1)
        return (mx.exp(wanted) * (wanted - got)).sum(-1).mean()

    sequences, length = tokens.shape
    vocabulary = teacher(tokens[:1, :1]).shape[-1]
    rows = max(1, min(MOST_ROWS, LOGITS_BYTES // (4 * length * vocabulary)))
    judge, seen = tokens[::JUDGE], np.flatnonzero(np.arange(sequences) % JUDGE)

    def judged(change: dict[str, dict[str, mx.array]]) -> float:
        found = 0.0
        for row in judge:
            value = loss(change, row[None], teacher(row[None]))
            found += float(value.item())  # type: ignore[arg-type]
        return found / len(judge)

    change = {
        where: {key: mx.zeros_like(value) for key, value in of.items()}
        for where, of in start.items()
    }
    best, least = change, judged(change)

    def rate(step: mx.array) -> mx.array:
        return LEARNING_RATE * mx.minimum(1, (step + 1) / WARM_UP) * (1 - step / steps)

    adam = optim.Adam(learning_rate=rate, bias_correction=True)  # type: ignore[arg-type]
    gradient_of = mx.value_and_grad(loss)
    random = np.random.default_rng(seed)
    for step in range(1, steps + 1):
        progress(step - 1, steps)
        picked = random.choice(seen, min(rows, len(seen)), replace=False)
        batch = tokens[mx.array(picked)]
        _, gradient = gradient_of(change, batch, teacher(batch))
        change = adam.apply_gradients(gradient, change)
        mx.eval(change, adam.state)
        if step % JUDGE_EVERY == 0 or step == steps:
            now = judged(change)
            if now < least:
                best, least = change, now
    progress(steps, steps)
    out: dict[str, mx.array] = {}
    for where, (width, centre) in moved(best).items():
        out[f"{where}.scales"] = width
        out[f"{where}.biases"] = centre - _middle(forms[where]) * width
    return out


def _middle(form: Format) -> float:
    return (2**form.bits - 1) / 2
