"""`python generate.py`: the same as `mlx-skipless generate`."""

import sys

from mlx_skipless.cli import command

if __name__ == "__main__":
    sys.exit(command("generate"))
