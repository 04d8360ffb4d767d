"""What of a network is trained: low-rank changes to its matrices (LoRA), or all weights."""

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten
from mlx_lm.tuner.utils import linear_to_lora_layers

from ..errors import UserError, first_line
from .recipe import Treatment

LORA_SCALE = 2.0
PROBE = [[0, 1]]  # tokens that any vocabulary has


def make_trainable(student: nn.Module, treatment: Treatment) -> None:
    """Add low-rank changes that are trained alone, or make all weights trainable.

    Raises:
        UserError: for all weights of a quantized network, and for one that has no gradient.
    """
    try:
        _choose_trained(student, treatment)

        def touch(network: Any) -> mx.array:
            return network(mx.array(PROBE)).astype(mx.float32).mean()

        nn.value_and_grad(student, touch)(student)  # builds the graph and computes nothing
    except (AttributeError, ValueError, RuntimeError, TypeError) as error:
        raise UserError(
            f"mlx-lm's network of this model cannot be trained ({first_line(error)})"
        ) from error


def _choose_trained(student: nn.Module, treatment: Treatment) -> None:
    student.train()
    if treatment.fine_tune_type == "full":
        if any(hasattr(module, "bits") for module in student.modules()):
            raise UserError(
                "--fine-tune-type full: packed weights cannot be trained; heal the model before it "
                "is quantized, or use lora"
            )
        student.set_dtype(mx.float32)  # steps smaller than a narrow type's rounding add up
        student.unfreeze()
        return
    student.freeze()
    lora = {"rank": treatment.rank, "scale": LORA_SCALE, "dropout": 0.0}
    layers: Any = student.layers
    before = [dict(layer.named_modules()) for layer in layers]

    def add(keys: set[str] | None = None) -> bool:
        """Adapt these modules of all layers, or all; tell whether the network still runs."""
        mx.random.seed(treatment.seed)
        linear_to_lora_layers(student, len(layers), lora | ({} if keys is None else {"keys": keys}))
        try:
            student(mx.array(PROBE))  # type: ignore[operator]
        except AttributeError:
            return False
        return True

    if add():
        return
    # Some networks read a matrix's weight themselves (Gemma 3n, Kimi K3), which an adapter has not.
    adapted = [{k for k, m in layer.named_modules() if hasattr(m, "fuse")} for layer in layers]
    fit = set()
    for key in sorted(set().union(*adapted)):
        _put_back(layers, before, adapted)
        if add({key}):
            fit.add(key)
    _put_back(layers, before, adapted)
    add(fit)


def _put_back(layers: Any, modules: Sequence[dict[str, Any]], names: Sequence[set[str]]) -> None:
    for layer, own, changed in zip(layers, modules, names, strict=True):
        layer.update_modules(tree_unflatten([(name, own[name]) for name in changed]))
