"""Learning rates, the optimizer of ``train``, and what keeps its Q matrices removable."""

from collections.abc import Callable, Mapping
from typing import Any

import mlx.core as mx
import mlx.optimizers as optim
from mlx.utils import tree_flatten, tree_map_with_path, tree_unflatten

from ..network.model import Model
from ..network.names import CHANNEL_PATHS, PROJECTIONS
from ..network.wiring import parse_layer
from ..removal.candidates import find_measurable
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


class StackedMuon(optim.Muon):
    """Muon (K. Jordan, 2024) that orthogonalizes all matrices of one shape at once.

    A deep, narrow network has so many small matrices that launches would take most of the time.
    """

    def apply_gradients(self, gradients: Any, parameters: Any) -> Any:
        """Return the parameters that have gradients, (out, in) each, after a step."""
        steps: Any = tree_flatten(super().apply_gradients(gradients, parameters))
        weights: Any = dict(tree_flatten(parameters))
        rate, new = self.learning_rate, {}
        for name, step in _orthogonalize_alike(dict(steps)).items():
            wide = max(1.0, step.shape[0] / step.shape[1]) ** 0.5
            new[name] = weights[name] - rate * wide * step
        return tree_unflatten([*new.items()])

    def apply_single(self, gradient: mx.array, parameter: mx.array, state: Any) -> mx.array:
        """Return the step's direction before it is orthogonalized: Nesterov's momentum."""
        moment = self.momentum * state["v"] + (1 - self.momentum) * gradient
        state["v"] = moment
        return (1 - self.momentum) * gradient + self.momentum * moment


def make_optimizer(recipe: Recipe) -> optim.Optimizer:
    """Make an optimizer: Muon for the matrices, AdamW for embeddings, norms and linear paths."""
    muon = StackedMuon(make_schedule(recipe, recipe.peak), weight_decay=0.0)
    adam = optim.AdamW(
        make_schedule(recipe, recipe.adam_learning_rate), betas=[0.9, 0.95], weight_decay=0.0
    )
    return optim.MultiOptimizer([muon, adam], [_is_matrix])


def _is_matrix(name: str, weight: mx.array) -> bool:
    return any(f"{p}.weight" in name for p in PROJECTIONS.values())


def hold_skips(gradients: Any, recipe: Recipe) -> Any:
    """Return the gradients, zero for alpha, beta, gamma and delta if these keep their starts."""
    own = recipe.resolve()
    if own.learn_skips or (own.learn_skips is None and not own.reads_queries):
        return gradients
    held = (*CHANNEL_PATHS, "attention_gain")
    return tree_map_with_path(
        lambda name, x: mx.zeros_like(x) if name.endswith(held) else x, gradients
    )


def pull_queries(model: Model, recipe: Recipe, step: mx.array) -> None:
    """Pull each Q that a merge would invert towards its orthogonal factor.

    Such a Q is redundant: what it loses its neighbours take over. Left alone, its smallest singular
    values wander through zero. Where K and V read the queries, few are inverted, or none.

    Args:
        model: after the optimizer's step.
        recipe: says how hard to pull at the highest rate; the pull follows the learning rate.
        step: how many steps came before it.
    """
    own = recipe.resolve()
    if not own.orthogonal_q or own.skip == "both" or own.norm == "pre":
        return
    rate = make_schedule(recipe, own.orthogonal_q)(step)
    modules = {i: layer.self_attn.q_proj for i, layer in enumerate(model.layers)}
    weights = {i: q.weight for i, q in modules.items() if q is not None}
    weights = {i: weight for i, weight in weights.items() if weight.shape[0] == weight.shape[1]}
    if own.reads_queries:
        inverted = {parse_layer(path) for path in find_measurable(model.args, "q")}
        weights = {i: weight for i, weight in weights.items() if i in inverted}
    for i, factor in _orthogonalize_alike(weights).items():
        modules[i].weight = weights[i] + rate * (factor - weights[i])


def _orthogonalize_alike(matrices: Mapping[Any, mx.array]) -> dict[Any, mx.array]:
    """Orthogonalize matrices, those of one shape together."""
    alike: dict[tuple[int, ...], list[Any]] = {}
    for name, matrix in matrices.items():
        alike.setdefault(matrix.shape, []).append(name)
    new: dict[Any, mx.array] = {}
    for names in alike.values():
        stacked = orthogonalize(mx.stack([matrices[name] for name in names]))
        new |= zip(names, stacked, strict=True)
    return new


def orthogonalize(x: mx.array) -> mx.array:
    """Return the orthogonal factor of matrices' polar decompositions, (..., n, m), to about 0.3.

    Newton and Schulz's iteration with Muon's coefficients (K. Jordan, 2024): singular values end
    between 0.7 and 1.2, the smallest ones too.
    """
    if x.shape[-2] > x.shape[-1]:
        return orthogonalize(x.swapaxes(-1, -2)).swapaxes(-1, -2)
    # The iteration needs singular values of at most 1.
    x = x / (mx.linalg.norm(x, axis=[-2, -1], keepdims=True) + 1e-7)
    for _ in range(5):
        gram = x @ x.swapaxes(-1, -2)
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x
