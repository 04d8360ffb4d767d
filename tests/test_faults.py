"""Faults that are done to conversions and training runs: nothing is lost, nothing is left."""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "tools/faults.py"
TRIES = {
    "SIGINT": 4,
    "SIGTERM": 3,
    "SIGKILL": 4,
    "disk-full": 3,
    "file-too-large": 3,
    "source-cut-short": 3,
    "three-at-once": 1,
    "other-file-system": 2,
    "training-killed": 1,
    "training-hung-up": 1,
}
MORE = 6  # times as many, thoroughly


def mounts() -> bool:
    """Whether a small file system can be had here, for root only."""
    with tempfile.TemporaryDirectory() as place:
        options = ["-t", "tmpfs", "-o", "size=1m", "none", place]
        if subprocess.run(["mount", *options], capture_output=True).returncode:
            return False
        return not subprocess.run(["umount", place]).returncode


@pytest.mark.examples
@pytest.mark.skipif(sys.platform != "linux", reason="runs are forked, which a Mac's GPU minds")
def test_nothing_is_lost(pytestconfig: pytest.Config) -> None:
    """All faults from one process, for what costs most is to start it."""
    more = MORE if pytestconfig.getoption("--thorough") else 1
    faults = {name: tries * more for name, tries in TRIES.items()}
    if more == 1:
        del faults["training-killed"]  # training/test_pretraining.py kills one too
    if not mounts():
        del faults["disk-full"]
    run = subprocess.run(
        [sys.executable, str(SCRIPT), "--json", *(f"{name}={n}" for name, n in faults.items())],
        capture_output=True,
        text=True,
    )
    assert run.stdout, run.stderr
    assert json.loads(run.stdout) == {fault: [] for fault in faults}
