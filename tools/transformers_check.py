"""Holds conversions of a model against transformers, where torch is installed.

    python tools/transformers_check.py FOLDER … [--tokens 64]

Each folder is a Hugging Face model of a known family, also one of several parts. It is converted in
every way that is exact, and the table shows the worst token's relative logit error against what
transformers computes with the folder itself. A tiny model says as much as a large one:
``save_pretrained`` writes a random one in any published layout.
"""

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm
import numpy as np
import torch
import transformers

sys.path.insert(0, str(Path(__file__).parents[1] / "tests/helpers"))
import reference

import mlx_skipless

WAYS: dict[str, dict[str, Any]] = {
    "as it is": {"remove": "none"},
    "norms folded": {"fold_norms": True},
    "first layer a table": {"precompute_first_layer": "force"},
}


def compute_expected(folder: Path, tokens: np.ndarray) -> np.ndarray:
    """What transformers computes with a folder in float32."""
    config = transformers.AutoConfig.from_pretrained(folder)
    several = config.get_text_config() is not config
    kind = (
        transformers.AutoModelForImageTextToText if several else transformers.AutoModelForCausalLM
    )
    model = kind.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        return np.array(model(torch.tensor(tokens)).logits)


def compute_converted(folder: Path, options: dict[str, Any], tokens: np.ndarray) -> np.ndarray:
    """What mlx-lm computes with a folder's conversion."""
    with tempfile.TemporaryDirectory() as place:
        out = Path(place) / "out"
        mlx_skipless.convert(folder, out, verify=False, dtype="float32", **options)
        model, _ = mlx_lm.load(str(out), trust_remote_code=True)  # type: ignore[misc]
        return np.array(model(mx.array(tokens)))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--tokens", type=int, default=64, help="in a row (default: 64)")
    options = parser.parse_args()
    print("| |", " | ".join(WAYS), "|")
    print("|---" * (len(WAYS) + 1) + "|")
    for folder in options.folders:
        vocabulary = transformers.AutoConfig.from_pretrained(folder).get_text_config().vocab_size
        tokens = np.random.default_rng(0).integers(0, vocabulary, (2, options.tokens))
        expected = compute_expected(folder, tokens)
        found = (compute_converted(folder, way, tokens) for way in WAYS.values())
        errors = [f"{reference.worst_relative_error(expected, one):.0e}" for one in found]
        print(f"| {folder.name} |", " | ".join(errors), "|", flush=True)


if __name__ == "__main__":
    main()
