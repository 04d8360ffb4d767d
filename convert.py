"""`python convert.py`: the same as `mlx-skipless convert`."""

import sys

if __name__ == "__main__":
    try:
        from mlx_skipless.cli import command
    except KeyboardInterrupt:  # importing takes seconds
        sys.exit("error: interrupted")
    sys.exit(command("convert"))
