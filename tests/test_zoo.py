"""Tiny models of mlx-lm's architectures: each loads and runs as its published models would."""

import re
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from grids import only
from mlx.utils import tree_flatten
from mlx_lm import models
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import load
from zoo import CANNOT, CONFIGS, make_model

LENGTH = 24
# Where a prompt at once and token by token differ in mlx-lm itself, more than this, and why.
DIFFERENT = {
    "phi3small": (0.1, "its block-sparse layers add the mask's booleans to the scores"),
    "plamo3": (0.1, "a prompt's window is one token wider than what the cache keeps"),
}


def test_every_architecture_is_in_one_table() -> None:
    files = {file.stem: file.read_text() for file in Path(models.__path__[0]).glob("*.py")}
    classes = (r"^(class|from .* import) Model\b", r"^class ModelArgs\b")
    found = {name for name, text in files.items() if all(re.search(c, text, re.M) for c in classes)}
    assert CONFIGS.keys() | CANNOT.keys() == found
    assert not CONFIGS.keys() & CANNOT.keys()
    assert CONFIGS.keys() > DIFFERENT.keys()


def test_a_seed_gives_one_model(tmp_path: Path) -> None:
    stored = []
    for i, seed in enumerate((0, 0, 1)):
        mx.random.seed(i)
        make_model(tmp_path / str(i), "gemma4", seed=seed, dtype="bfloat16")
        stored.append(mx.load(str(tmp_path / str(i) / "model.safetensors")))
    assert all(array.dtype == mx.bfloat16 for array in stored[0].values())
    assert all(mx.array_equal(array, stored[1][name]) for name, array in stored[0].items())
    assert not any(mx.array_equal(array, stored[2][name]) for name, array in stored[0].items())


@pytest.mark.parametrize("model_type", only(("gemma3n", "gpt_oss", "qwen3", "qwen3_5"), CONFIGS))
def test_it_loads_and_runs(model_type: str, tmp_path: Path) -> None:
    make_model(tmp_path, model_type)
    model, tokenizer = load(str(tmp_path))
    assert tokenizer.decode(tokenizer.encode("a fox")) == "a fox"
    stored = mx.load(str(tmp_path / "model.safetensors"))
    for name, array in tree_flatten(model.parameters()):
        assert mx.allclose(array, stored[name], rtol=1e-6, atol=0), name

    def logits(tokens: np.ndarray, chunk: int) -> np.ndarray:
        cache = make_prompt_cache(model)
        chunks = [tokens[i : i + chunk] for i in range(0, len(tokens), chunk)]
        parts = [model(mx.array(one)[None], cache=cache).astype(mx.float32) for one in chunks]
        return np.array(mx.concatenate(parts, axis=1))[0, :, :256]

    tokens = np.random.default_rng(0).integers(0, 256, LENGTH)
    at_once = logits(tokens, LENGTH)
    assert np.isfinite(at_once).all() and 0.1 < at_once.std() < 10
    step_by_step = np.abs(logits(tokens, 1) - at_once).max()
    if model_type in DIFFERENT:
        assert step_by_step > DIFFERENT[model_type][0]
    else:
        assert step_by_step < 1e-4
    tokens[2] += 1
    change = np.abs(logits(tokens, LENGTH) - at_once).max(axis=-1)
    assert (change[:2] < 1e-4).all() or model_type == "phi3small"
    assert (change[2:] > 1e-2).all()
