"""How much memory there is and what takes it."""

import ctypes
import os
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_reduce

# Of glibc's mallopt, with the values that it starts with.
M_TRIM_THRESHOLD, TRIM_THRESHOLD = -1, 128 << 10
M_MMAP_MAX, MMAP_MAX = -4, 65536


@contextmanager
def reuse_memory() -> Iterator[None]:
    """Have the C library keep what is freed, for large arrays that come and go.

    MLX on a CPU gives their memory back each time, and the system gives new memory page by page,
    more slowly than BLAS reads it. Where the library is not glibc, nothing changes. At the end all
    that is free goes back to the system.
    """
    library = ctypes.CDLL(None)
    if not (hasattr(library, "mallopt") and hasattr(library, "malloc_trim")):
        yield
        return
    library.mallopt(M_MMAP_MAX, 0)
    library.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
    try:
        yield
    finally:
        library.mallopt(M_MMAP_MAX, MMAP_MAX)
        library.mallopt(M_TRIM_THRESHOLD, TRIM_THRESHOLD)
        library.malloc_trim(ctypes.c_size_t(0))


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
