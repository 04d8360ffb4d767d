"""GGUF files of many architectures: what they hold, converted, runs in mlx-lm as it was."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm.utils
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type
from gguf_zoo import ARCHITECTURES, write_zoo_gguf
from zoo import make_model

from mlx_skipless.conversion.convert import convert

# What GGUF files of an architecture always are, or what mlx-lm's class cannot tell.
YARN = {
    "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "beta_fast": 16.0,
    "beta_slow": 1.0,
}  # fmt: skip
CHANGES: dict[str, dict[str, Any]] = {
    "gemma3_text": {"rope_scaling": {"rope_type": "linear", "factor": 8.0}},
    "llama": {"rope_scaling": None},
    "mistral": {"rope_scaling": YARN},
    "ministral3": {"tie_word_embeddings": False},
    "qwen3_moe": {"mlp_only_layers": []},
}


def make(folder: Path, name: str, **changes: Any) -> None:
    """A random model of an architecture; a Mistral is a Llama by another name."""
    changes = CHANGES.get(name, {}) | {"vocab_size": 258} | changes
    make_model(folder, "llama" if name == "mistral" else name, **changes)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": name}))


def load(folder: Path) -> Any:
    model = mlx_lm.utils.load_model(folder)[0]
    model.set_dtype(mx.float32)
    return model


@pytest.mark.parametrize("name", sorted(ARCHITECTURES))
def test_float16_comes_back_bit_for_bit(name: str, tmp_path: Path) -> None:
    make(tmp_path / "hf", name, dtype="float16")
    write_zoo_gguf(tmp_path / "model.gguf", tmp_path / "hf", lambda _: Type.F16)

    report = convert(tmp_path / "model.gguf", tmp_path / "out", verify=False)

    assert report.stock and not report.notes[1:]
    before, after = (mx.load(str(tmp_path / f / "model.safetensors")) for f in ("hf", "out"))
    assert before.keys() == after.keys()
    for key, array in before.items():
        assert after[key].dtype == mx.float16
        slack = 2**-24 if name.startswith("gemma") and key.endswith("norm.weight") else 0
        assert mx.abs(array.astype(mx.float32) - after[key]).max().item() <= slack, key
    source, result = load(tmp_path / "hf"), load(tmp_path / "out")
    tokens = mx.array(np.random.default_rng(0).integers(0, 258, (1, 40)))
    difference = mx.abs(source(tokens) - result(tokens)).max().item()
    assert difference <= (1e-3 if name.startswith("gemma") else 0)
