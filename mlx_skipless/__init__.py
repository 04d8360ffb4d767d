"""Makes language models smaller and faster by removing weights, on MLX and inside mlx-lm."""

from .analysis import analyze
from .bench import benchmark
from .conversion import convert
from .errors import UserError
from .evaluation import evaluate
from .generation import generate
from .healing import Treatment, heal
from .loading import load
from .recipe import Recipe
from .tasks import compare_tasks
from .training import train

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
