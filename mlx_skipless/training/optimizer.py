"""Learning rates, the optimizer of ``train``, and what keeps its Q matrices removable."""

from collections.abc import Callable

import mlx.core as mx
import mlx.optimizers as optim

from ..network.model import Model
from ..network.names import PROJECTIONS
from .recipe import Recipe, Treatment

Schedule = Callable[[mx.array], mx.array]


def make_schedule(recipe: Recipe, peak: float) -> Schedule:
    """Make ``train``'s learning rate at a step: it falls in the last ``decay`` of the steps."""
    return _make_ramps(peak, recipe.steps, recipe.warmup, max(1.0, recipe.decay * recipe.steps))


def make_healing_schedule(treatment: Treatment) -> Schedule:
    """Make ``heal``'s learning rate at a step: it falls as soon as it has risen."""
    steps, warmup = treatment.steps, treatment.warmup
    return _make_ramps(treatment.peak, steps, warmup, max(1, steps - warmup))


def _make_ramps(peak: float, steps: int, warmup: int, decay_steps: float) -> Schedule:
    """A linear rise to ``peak``, and a linear fall to zero in the last ``decay_steps``."""

    def rate(step: mx.array) -> mx.array:
        up = (step + 1) / max(1, warmup)
        down = (steps - step) / decay_steps
        return peak * mx.clip(mx.minimum(up, down), 0.0, 1.0)

    return rate


def make_optimizer(recipe: Recipe) -> optim.Optimizer:
    """Make an optimizer: Muon for the matrices, AdamW for embeddings, norms and linear paths."""
    muon = optim.Muon(make_schedule(recipe, recipe.learning_rate), weight_decay=0.0)
    adam = optim.AdamW(
        make_schedule(recipe, recipe.adam_learning_rate), betas=[0.9, 0.95], weight_decay=0.0
    )
    return optim.MultiOptimizer([muon, adam], [_is_matrix])


def _is_matrix(name: str, weight: mx.array) -> bool:
    return any(f"{p}.weight" in name for p in PROJECTIONS.values())


def pull_queries(model: Model, recipe: Recipe, step: mx.array) -> None:
    """Pull each Q that a merge would invert towards its orthogonal factor.

    Such a Q is redundant: what it loses its neighbours take over. Left alone, its smallest singular
    values wander through zero.

    Args:
        model: after the optimizer's step.
        recipe: says how hard to pull at the highest rate; the pull follows the learning rate.
        step: how many steps came before it.
    """
    own = recipe.resolve()
    if not own.orthogonal_q or own.skip == "both" or own.norm == "pre":
        return
    rate = make_schedule(recipe, own.orthogonal_q)(step)
    for layer in model.layers:
        q = layer.self_attn.q_proj
        if q is not None and q.weight.shape[0] == q.weight.shape[1]:
            q.weight = q.weight + rate * (orthogonalize(q.weight) - q.weight)


def orthogonalize(x: mx.array) -> mx.array:
    """Return the orthogonal factor of a square matrix's polar decomposition, to about 0.3.

    Newton and Schulz's iteration with Muon's coefficients (K. Jordan, 2024): singular values end
    between 0.7 and 1.2, the smallest ones too.
    """
    x = x / (mx.linalg.norm(x) + 1e-7)  # the iteration needs singular values of at most 1
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x
