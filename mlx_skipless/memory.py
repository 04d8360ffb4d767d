"""How much memory there is and what takes it, and how sizes are read and written."""

import os
import re
import resource
import sys

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_reduce

from .errors import UserError

UNITS = {"": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9}


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
    return f"{nbytes / 1e9:.2f} GB" if nbytes >= 1e9 else f"{nbytes / 1e6:.1f} MB"


def parse_bytes(text: str) -> int:
    """Bytes of a size such as "900000", "1.6MB" or "4 GB" (decimal units).

    Raises:
        UserError: if it is none.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmg]?b)?", text.strip().lower())
    value = round(float(found[1]) * UNITS[found[2] if found[2] in UNITS else ""]) if found else 0
    if value < 1:
        raise UserError(f"{text!r} is no size: give bytes, or for instance 1.6MB or 4GB")
    return value
