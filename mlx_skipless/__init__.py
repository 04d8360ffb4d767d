"""Makes language models smaller and faster by removing weights, on MLX and inside mlx-lm."""

from .conversion import convert
from .errors import UserError
from .generation import generate
from .loading import load

__version__ = "0.1.0"
__all__ = ["UserError", "convert", "generate", "load"]
