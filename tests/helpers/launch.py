"""Several processes of one script over MLX's ring, on this machine alone."""

import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

needs_launch = pytest.mark.skipif(
    shutil.which("mlx.launch") is None, reason="mlx.launch is not on the path"
)


def launch(processes: int, script: Path, *arguments: str | Path, timeout: float = 240) -> str:
    """Run ``script`` so often; what they print. All end within ``timeout`` seconds, come what may.

    mlx.launch hides how they ended: see to it that they did what they should.
    """
    command = ["mlx.launch", "-n", str(processes), "--backend", "ring"]
    command += ["--starting-port", str(_free_port(processes)), "--", sys.executable, str(script)]
    run = subprocess.Popen(
        [*command, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    try:
        printed, _ = run.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(run.pid, signal.SIGKILL)
        printed, _ = run.communicate()
        pytest.fail(f"still running after {timeout} seconds:\n{printed}")
    return printed


def _free_port(count: int) -> int:
    """The first of so many ports in a row on which nobody listens."""
    while True:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        try:
            for other in range(port, port + count):
                with socket.socket() as free:
                    free.bind(("127.0.0.1", other))
        except (OSError, OverflowError):
            continue
        return port
