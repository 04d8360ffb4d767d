"""Memory that is kept for reuse, and given back."""

import ctypes
import resource
from pathlib import Path

import mlx.core as mx
import pytest

from mlx_skipless.memory import reuse_memory

ROWS = 12 << 20  # of float32: 48 MB, which glibc never keeps by itself
pytestmark = pytest.mark.skipif(
    not hasattr(ctypes.CDLL(None), "mallopt") or mx.default_device().type != mx.cpu,
    reason="another C library, or memory of a GPU",
)


def count_new_pages() -> int:
    """Count the pages that the system gives for some large arrays, one after another."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(4):
        mx.eval(mx.ones(ROWS))
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def measure_resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def test_large_arrays_reuse_memory_and_give_it_back_at_the_end() -> None:
    """Also if an error ends it."""
    usual = count_new_pages()
    with pytest.raises(ValueError), reuse_memory():
        count_new_pages()
        kept, held = count_new_pages(), measure_resident()
        raise ValueError
    assert kept < usual / 10
    assert held - measure_resident() > 3 * ROWS  # bytes: most of an array
    assert count_new_pages() > usual / 2
