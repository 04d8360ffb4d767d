"""Faults that are done to conversions and training runs: nothing is lost, nothing is left."""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "tools/faults.py"
TRIES = {
    "SIGINT": 20,
    "SIGTERM": 10,
    "SIGKILL": 20,
    "disk-full": 8,
    "file-too-large": 8,
    "source-cut-short": 10,
    "three-at-once": 4,
    "other-file-system": 4,
    "training-killed": 3,
}


def mounts() -> bool:
    """Whether a small file system can be had here, for root only."""
    with tempfile.TemporaryDirectory() as place:
        options = ["-t", "tmpfs", "-o", "size=1m", "none", place]
        if subprocess.run(["mount", *options], capture_output=True).returncode:
            return False
        return not subprocess.run(["umount", place]).returncode


@pytest.mark.skipif(sys.platform != "linux", reason="runs are forked, which a Mac's GPU minds")
@pytest.mark.parametrize("fault", TRIES)
def test_nothing_is_lost(fault: str) -> None:
    if fault == "disk-full" and not mounts():
        pytest.skip("no file system can be mounted here")
    run = subprocess.run(
        [sys.executable, str(SCRIPT), fault, "--tries", str(TRIES[fault]), "--json"],
        capture_output=True,
        text=True,
    )
    assert run.stdout, run.stderr
    assert json.loads(run.stdout) == {fault: []}
