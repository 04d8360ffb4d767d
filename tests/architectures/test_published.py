"""Public models of 2024 to 2026: what their configs mean, and that each can be converted."""

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
import reference
from grids import only
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import load_model
from published import PUBLISHED, TYPES, read, write_today
from zoo import write_model

import mlx_skipless
from mlx_skipless.architectures.wrappers import find_text_type
from mlx_skipless.checkpoints.checkpoint import open_checkpoint
from mlx_skipless.inference.loading import load_network
from mlx_skipless.inference.stock import find_stock
from mlx_skipless.network.model import Model
from mlx_skipless.network.parts import tensors_of

# What asks for more than the exact part knows, and is mlx-lm's alone.
STOCK_ALONE = {"c4ai-command-r-plus": "use_qk_norm"}
KNOWN = [name for name in TYPES if find_text_type(read(name)) and name not in STOCK_ALONE]
FOREIGN = [name for name in PUBLISHED if name not in KNOWN]
OLD_ROPE = [name for name in FOREIGN if write_today(read(name)) != read(name)]
ONE_OF_A_TYPE = [*{TYPES[name]: name for name in FOREIGN}.values()][::2]
# mlx-lm has no network of theirs: their windows are in all layers, or of a type of its own.
WINDOWED = ("Mistral-7B-v0.1", "Ministral-8B-Instruct-2410", "Ministral, by its transformers class")
TOKENS = np.random.default_rng(0).integers(3, 250, (2, 40))


def run(model: Any) -> tuple[np.ndarray, np.ndarray]:
    """Logits of all tokens at once, and of one after the other."""
    cache = make_prompt_cache(model)
    steps = [model(mx.array(TOKENS[:, i : i + 1]), cache=cache) for i in range(TOKENS.shape[1])]
    return np.array(model(mx.array(TOKENS))), np.array(mx.concatenate(steps, 1))


def draw(folder: Path, name: str) -> np.ndarray:
    """Write a random model of a published config; return what it should compute."""
    config = read(name)
    as_llama = config | {"model_type": "llama"} | config.get("rope_parameters", {})
    write_model(folder, as_llama if name in WINDOWED else config)
    if name not in WINDOWED:
        model = load_model(folder, model_config=config.get("rope_parameters", {}))[0]
        return run(model)[0]
    (folder / "config.json").write_text(json.dumps(config))
    tensors: Any = mx.load(str(folder / "model.safetensors"))
    weights = {key: np.array(array, np.float64) for key, array in tensors.items()}
    return reference.logits(reference.llama_config(as_llama | config), weights, TOKENS)


@pytest.mark.parametrize("name", only({"Mistral-7B-v0.1", "Llama-3.1-8B-Instruct"}, KNOWN))
def test_a_known_architecture(name: str, tmp_path: Path) -> None:
    """It is read as what mlx-lm's own class computes of it, in both ways to write its config."""
    expected = draw(tmp_path, name)
    for config in (read(name), write_today(read(name))):
        (tmp_path / "config.json").write_text(json.dumps(config))
        assert find_stock(tmp_path) is None
        checkpoint = open_checkpoint(tmp_path)
        model = Model(checkpoint.args)
        model.load_weights([*checkpoint.read(tensors_of(model)).items()])
        for found in run(model):
            assert reference.worst_relative_error(expected, found) < 1e-5


@pytest.mark.parametrize("name", only({"Phi-4-mini-instruct"}, OLD_ROPE))
def test_where_transformers_5_writes_rope(name: str, tmp_path: Path) -> None:
    """mlx-lm's network finds it, here and as a result's config.json has it."""
    expected = draw(tmp_path, name)
    (tmp_path / "config.json").write_text(json.dumps(write_today(read(name))))
    assert np.array_equal(load_network(tmp_path)[0](mx.array(TOKENS)), expected)
    source = find_stock(tmp_path)
    assert source is not None
    found = load_model(tmp_path, model_config=dict(source.config))[0](mx.array(TOKENS))
    assert np.array_equal(found, expected)


@pytest.mark.parametrize("name", only(STOCK_ALONE, sorted({*STOCK_ALONE, *ONE_OF_A_TYPE})))
def test_another_architecture(name: str, tmp_path: Path) -> None:
    """It loses an attention, and mlx-lm loads what is left."""
    source, out = tmp_path / "source", tmp_path / "out"
    expected = draw(source, name)
    report = mlx_skipless.convert(source, out, dtype="float32", drop_attention=1, verify=False)
    assert len(report.removed["attention"]) == 1
    model = mlx_lm.load(str(out), trust_remote_code=True)[0]
    whole, steps = run(model)
    assert reference.worst_relative_error(whole, steps) < 1e-4
    assert reference.worst_relative_error(expected, whole) > 1e-3
    asked = STOCK_ALONE.get(name)
    assert asked is None or any(f'with "{asked}"' in note for note in report.notes)


def test_attentions_go_from_a_scaled_llama(tmp_path: Path) -> None:
    """What is left is of a type that transformers does not know; mlx-lm loads it all the same."""
    source, out = tmp_path / "source", tmp_path / "out"
    draw(source, "Llama-3.2-1B-Instruct")
    (source / "config.json").write_text(json.dumps(write_today(read("Llama-3.2-1B-Instruct"))))
    report = mlx_skipless.convert(source, out, dtype="float32", drop_attention=1, verify=False)
    assert report.stock and json.loads((out / "config.json").read_text())["rope_scaling"]
    model, tokenizer = mlx_lm.load(str(out))[:2]
    assert tokenizer.encode("a") and not np.isnan(run(model)[0]).any()


@pytest.mark.parametrize("flag", ["fold_norms", "skipless"])
def test_what_is_exact_is_refused(flag: str, tmp_path: Path) -> None:
    """Where mlx-lm alone knows what a config of a known architecture asks."""
    (tmp_path / "config.json").write_text(json.dumps(read("c4ai-command-r-plus")))
    with pytest.raises(mlx_skipless.UserError, match='not known of a cohere with "use_qk_norm"'):
        mlx_skipless.convert(tmp_path, dry_run=True, **{flag: True})
