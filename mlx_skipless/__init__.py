"""Makes language models smaller and faster by removing weights, on MLX and inside mlx-lm."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .errors import UserError
    from .evaluation.analysis import analyze
    from .evaluation.benchmark import benchmark
    from .evaluation.perplexity import measure_perplexity
    from .evaluation.tasks import evaluate
    from .inference.generation import generate
    from .inference.loading import load
    from .training.converting import convert
    from .training.healing import heal
    from .training.pretraining import train
    from .training.recipe import Recipe, Treatment

__version__ = "0.1.0"
__all__ = [
    "Recipe",
    "Treatment",
    "UserError",
    "analyze",
    "benchmark",
    "convert",
    "evaluate",
    "generate",
    "heal",
    "load",
    "measure_perplexity",
    "train",
]
_HOMES = {
    "Recipe": "training.recipe",
    "Treatment": "training.recipe",
    "UserError": "errors",
    "analyze": "evaluation.analysis",
    "benchmark": "evaluation.benchmark",
    "convert": "training.converting",
    "evaluate": "evaluation.tasks",
    "generate": "inference.generation",
    "heal": "training.healing",
    "load": "inference.loading",
    "measure_perplexity": "evaluation.perplexity",
    "train": "training.pretraining",
}


def __getattr__(name: str) -> Any:
    """A public name, from its home, which is imported when it is first asked for."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
