"""How much memory there is and what takes it."""

import os
import resource
import sys

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_reduce


def peak_memory_bytes() -> int:
    """The most memory this process has held so far, NumPy's and MLX's together.

    A GPU's share may not be resident: then MLX's own count, if it is the greater, is closer.
    """
    unit = 1 if sys.platform == "darwin" else 1024
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return max(resident, mx.get_peak_memory())


def machine_memory_bytes() -> int:
    """The memory of this machine."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def device_memory_bytes() -> int:
    """The memory that MLX's default device computes in; a Mac's GPU shares the machine's."""
    info = mx.device_info()
    known = (info[key] for key in ("memory_size", "total_memory") if key in info)
    return int(next(known, machine_memory_bytes()))


def weight_bytes(model: nn.Module) -> int:
    """Bytes of a model's weights."""
    return tree_reduce(lambda total, weight: total + weight.nbytes, model.parameters(), 0)


def format_bytes(nbytes: int) -> str:
    """Bytes for reading: "1.50 GB"."""
    if nbytes >= 1e9:
        return f"{nbytes / 1e9:.2f} GB"
    return f"{nbytes / 1e6:.1f} MB" if nbytes >= 1e5 else f"{nbytes / 1e3:.1f} kB"
