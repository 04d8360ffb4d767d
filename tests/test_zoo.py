"""Tiny models of mlx-lm's architectures: each loads and runs as its published models would."""

import importlib
import pkgutil
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
# At once and token by token differ in mlx-lm itself: how far at most, and why.
DIFFERENT: dict[str, tuple[float, str]] = {}


def model_types() -> set[str]:
    """The files of the installed mlx-lm that hold a model and its arguments."""
    names = [file.name for file in pkgutil.iter_modules(models.__path__)]
    modules = {name: importlib.import_module(f"mlx_lm.models.{name}") for name in names}
    return {
        name
        for name, module in modules.items()
        if hasattr(module, "Model") and hasattr(module, "ModelArgs")
    }


def test_names_are_of_architectures() -> None:
    assert CONFIGS.keys() | CANNOT.keys() <= model_types()
    assert not CONFIGS.keys() & CANNOT.keys()


@pytest.mark.parametrize("model_type", only(("gemma3n", "gpt_oss", "qwen3", "qwen3_5"), CONFIGS))
def test_it_loads_and_runs(model_type: str, tmp_path: Path) -> None:
    make_model(tmp_path, model_type)
    model, tokenizer = load(str(tmp_path))
    assert tokenizer.decode(tokenizer.encode("a fox")) == "a fox"
    stored = mx.load(str(tmp_path / "model.safetensors"))
    for name, array in tree_flatten(model.parameters()):
        assert mx.array_equal(array, stored[name]), name

    def logits(tokens: np.ndarray, chunk: int) -> np.ndarray:
        cache = make_prompt_cache(model)
        chunks = [tokens[i : i + chunk] for i in range(0, len(tokens), chunk)]
        parts = [model(mx.array(one)[None], cache=cache).astype(mx.float32) for one in chunks]
        return np.array(mx.concatenate(parts, axis=1))[0]

    tokens = np.random.default_rng(0).integers(0, 256, LENGTH)
    at_once = logits(tokens, LENGTH)
    assert np.isfinite(at_once).all() and 0.1 < at_once.std() < 10
    most, _ = DIFFERENT.get(model_type, (1e-4, ""))
    assert np.abs(logits(tokens, 1) - at_once).max() < most
    tokens[2] += 1
    change = np.abs(logits(tokens, LENGTH) - at_once).max(axis=-1)
    assert (change[:2] < most).all() and (change[2:] > 1e-2).all()
