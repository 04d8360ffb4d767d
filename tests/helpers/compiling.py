"""MLX's compiled kernels, which the tests do without but where it matters."""

import fcntl
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import mlx.core as mx
import pytest

OFF = "MLX_DISABLE_COMPILE"


@contextmanager
def compiling() -> Iterator[None]:
    """Let MLX compile kernels, here and in processes that start, for as long as a block lasts.

    One test at a time, for MLX fails where two processes compile the same kernel at once.
    """
    off = OFF in os.environ
    with (
        (Path(tempfile.gettempdir()) / "mlx-skipless-kernels.lock").open("w") as lock,
        pytest.MonkeyPatch.context() as patch,
    ):
        fcntl.flock(lock, fcntl.LOCK_EX)
        patch.delenv(OFF, raising=False)
        mx.enable_compile()
        try:
            yield
        finally:
            if off:
                mx.disable_compile()
