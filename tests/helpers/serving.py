"""mlx_lm.server, with nothing of this package importable, for as long as a block lasts."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

WITHOUT_US = (
    "import runpy, sys; sys.modules['mlx_skipless'] = None; "
    "sys.argv = sys.argv[1:]; "
    "runpy.run_module(sys.argv[0], run_name='__main__', alter_sys=True)"
)


@contextmanager
def serving(
    model: Path, log: Path, python: str = sys.executable, *, trust: bool = True
) -> Iterator[tuple[str, int]]:
    """The address for OpenAI's client, and the server's process id."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [python, "-c", WITHOUT_US, "mlx_lm", "server"]
    options = ["--model", str(model), "--port", str(port), "--host", "127.0.0.1"]
    options += ["--trust-remote-code"] if trust else []
    with log.open("w") as lines:
        process = subprocess.Popen(
            [*command, *options],
            stdout=lines,
            stderr=lines,
            cwd=log.parent,
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
        )
        try:
            for _ in range(240):
                assert process.poll() is None, log.read_text()
                try:
                    socket.create_connection(("127.0.0.1", port), 1).close()
                    break
                except OSError:
                    time.sleep(0.25)
            yield f"http://127.0.0.1:{port}/v1", process.pid
        finally:
            process.terminate()
            process.wait(30)
