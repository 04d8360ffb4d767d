"""The command line: one file a command, its output beside it.

Only here are arguments parsed and lines printed. Knows nothing of how anything is computed.
"""

from .main import COMMANDS, command, main

__all__ = ["COMMANDS", "command", "main"]
