"""`python convert.py`: the same as `mlx-skipless convert`."""

import sys

from mlx_skipless.cli import command

if __name__ == "__main__":
    sys.exit(command("convert"))
