"""Several processes of one script over MLX's ring, on this machine alone."""

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest


def launch(processes: int, script: Path, *arguments: str | Path, timeout: float = 240) -> None:
    """Run ``script`` so often; all must end well within ``timeout`` seconds.

    mlx.launch sets the same two variables, but takes a core of its own to wait and hides how the
    processes ended.
    """
    with tempfile.TemporaryDirectory() as folder:
        hosts = Path(folder, "hosts.json")
        port = _free_port(processes)
        hosts.write_text(json.dumps([[f"127.0.0.1:{port + rank}"] for rank in range(processes)]))
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "MLX_HOSTFILE": str(hosts)}
        logs = [Path(folder, f"{rank}.log") for rank in range(processes)]
        started: list[subprocess.Popen[bytes]] = []
        try:
            for rank, log in enumerate(logs):
                with log.open("wb") as output:
                    started.append(
                        subprocess.Popen(
                            [sys.executable, str(script), *map(str, arguments)],
                            stdout=output,
                            stderr=subprocess.STDOUT,
                            env=environment | {"MLX_RANK": str(rank)},
                        )
                    )
            _wait(started, timeout)
        finally:
            for process in started:
                process.kill()
                process.wait()
        codes = [process.returncode for process in started]
        if any(codes):
            said = "\n".join(log.read_text(errors="replace") for log in logs)
            pytest.fail(f"ended with {codes}\n{said}")


def _wait(started: list["subprocess.Popen[bytes]"], timeout: float) -> None:
    """Until all have ended, one has failed, for whom the others might wait, or time is up."""
    until = time.monotonic() + timeout
    while time.monotonic() < until:
        codes = [process.poll() for process in started]
        if None not in codes or any(codes):
            return
        time.sleep(0.05)


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
