"""What can be chosen by name, for flags, configs and files alike.

Imports no library, so that a command's help does not wait for MLX.
"""

import re
from pathlib import Path

REMOVALS = ("auto", "qp", "kp", "vp", "q", "k", "v", "p", "none")
DRAFTS = 3  # tokens that a draft model proposes at a time
FLOAT_NAMES = ("float16", "bfloat16", "float32")
# MLX's quantization modes: group sizes and bits, its own choice first.
MODES: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "affine": ((64, 32, 128), (4, 1, 2, 3, 5, 6, 8)),
    "mxfp4": ((32,), (4,)),
    "nvfp4": ((16,), (4,)),
    "mxfp8": ((32,), (8,)),
}
# What configs call the number of experts that a token is given to.
CHOSEN = (
    "num_experts_per_tok", "num_experts_per_token", "moe_topk", "top_k_experts", "moe_k",
    "moe_top_k",
)  # fmt: skip
BUNDLED = Path(__file__).parent / "assets" / "tales"  # a source checkpoint that tells tales
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
LARGEST_REAL = 1e12  # that a config may have, RoPE's base for one
HELD_OUT_SHARE = 0.03  # of each file's lines, where no text is named
