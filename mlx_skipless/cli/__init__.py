"""The command line: one file a command, its output beside it.

Only here are arguments parsed and lines printed. Knows nothing of how anything is computed.
"""

import sys

try:
    from .main import COMMANDS, command, main
except KeyboardInterrupt:  # where the imports of the installed command are interrupted
    sys.exit("error: interrupted")

__all__ = ["COMMANDS", "command", "main"]
