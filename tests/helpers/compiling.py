"""MLX's compiled kernels, which the tests do without but where it matters."""

import fcntl
import os
import subprocess
import sys
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
        _compile_what_all_kernels_include()
        patch.delenv(OFF, raising=False)
        mx.enable_compile()
        try:
            yield
        finally:
            if off:
                mx.disable_compile()


def _compile_what_all_kernels_include() -> None:
    """A kernel is three lines behind a long header, which GCC reads once, compiled, beside them.

    GCC looks for a header beside the file that includes it first, and there for a compiled one,
    which it leaves alone where it is another compiler's. Without it all works, in thrice the time.
    """
    name = "mlx/backend/cpu/compiled_preamble.h"
    found = Path(mx.__file__).parent / "include"
    compiled = Path(tempfile.gettempdir(), "mlx", mx.__version__, "cpu", f"{name}.gch")
    if sys.platform != "linux" or compiled.exists():
        return
    compiled.parent.mkdir(parents=True, exist_ok=True)
    part = compiled.with_suffix(".partial")
    command = ["g++", "-std=c++17", "-O3", "-Wall", "-fPIC", "-x", "c++-header"]
    run = subprocess.run([*command, found / name, "-I", found, "-o", part], capture_output=True)
    if run.returncode == 0:
        part.replace(compiled)
