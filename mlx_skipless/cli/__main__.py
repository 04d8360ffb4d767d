"""``python -m mlx_skipless.cli``: the same as ``mlx-skipless``."""

import sys

from .main import main

sys.exit(main())
