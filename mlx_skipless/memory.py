"""How much memory this process takes."""

import resource
import sys

import mlx.core as mx


def peak_memory_bytes() -> int:
    """The most memory this process has held so far, NumPy's and MLX's together.

    A GPU's share may not be resident: then MLX's own count, if it is the greater, is closer.
    """
    unit = 1 if sys.platform == "darwin" else 1024
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return max(resident, mx.get_peak_memory())
