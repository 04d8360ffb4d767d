"""`python generate.py`: the same as `mlx-skipless generate`."""

import sys

if __name__ == "__main__":
    try:
        from mlx_skipless.cli import command
    except KeyboardInterrupt:  # importing takes seconds
        sys.exit("error: interrupted")
    sys.exit(command("generate"))
