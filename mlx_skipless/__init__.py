"""Makes language models smaller and faster by removing weights, on MLX and inside mlx-lm."""

from .conversion.convert import convert
from .errors import UserError
from .evaluation.analysis import analyze
from .evaluation.benchmark import benchmark
from .evaluation.perplexity import evaluate
from .evaluation.tasks import compare_tasks
from .inference.generation import generate
from .inference.loading import load
from .training.healing import Treatment, heal
from .training.pretraining import train
from .training.recipe import Recipe

__version__ = "0.1.0"
__all__ = [
    "Recipe",
    "Treatment",
    "UserError",
    "analyze",
    "benchmark",
    "compare_tasks",
    "convert",
    "evaluate",
    "generate",
    "heal",
    "load",
    "train",
]
