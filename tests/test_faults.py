"""Faults that are done to conversions and training runs: nothing is lost, nothing is left."""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "tools/faults.py"
TRIES = {
    "SIGINT": 12,
    "SIGTERM": 9,
    "SIGKILL": 12,
    "disk-full": 9,
    "file-too-large": 9,
    "source-cut-short": 9,
    "three-at-once": 3,
    "other-file-system": 6,
    "training-killed": 3,
    "training-hung-up": 3,
}


def mounts() -> bool:
    """Whether a small file system can be had here, for root only."""
    with tempfile.TemporaryDirectory() as place:
        options = ["-t", "tmpfs", "-o", "size=1m", "none", place]
        if subprocess.run(["mount", *options], capture_output=True).returncode:
            return False
        return not subprocess.run(["umount", place]).returncode


@pytest.mark.thorough
@pytest.mark.skipif(sys.platform != "linux", reason="runs are forked, which a Mac's GPU minds")
def test_nothing_is_lost() -> None:
    """All faults from one process, for what costs most is to start it."""
    faults = dict(TRIES)
    if not mounts():
        del faults["disk-full"]
    run = subprocess.run(
        [sys.executable, str(SCRIPT), "--json", *(f"{name}={n}" for name, n in faults.items())],
        capture_output=True,
        text=True,
    )
    assert run.stdout, run.stderr
    assert json.loads(run.stdout) == {fault: [] for fault in faults}
