"""convert.py and generate.py as files, with a small model in place of the bundled one."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
RUN = """
import pathlib, runpy, sys
from mlx_skipless.conversion import convert
_, bundled, *sys.argv = sys.argv
convert.BUNDLED = pathlib.Path(bundled)
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def script(bundled: Path, name: str, *arguments: str) -> list[str]:
    """`python NAME ARGUMENTS` as a command line."""
    return [sys.executable, "-c", RUN, str(bundled), str(ROOT / name), *arguments]
