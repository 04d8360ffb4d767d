"""The driver against plain calls of the models that it drives: mlx-lm's own and ours."""

import gc
import importlib
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from factory import make_llama
from mlx.utils import tree_flatten
from mlx_lm.models.cache import make_prompt_cache

import mlx_skipless
from mlx_skipless.inference.loading import load_network
from mlx_skipless.network.driver import Driver, Recorder, StreamedNetwork, Streams
from mlx_skipless.network.magnitudes import Watch
from mlx_skipless.network.parts import replace_at, tensors_of
from mlx_skipless.network.stock import StockNetwork

SHARED: dict[str, Any] = {
    "hidden_size": 32, "num_hidden_layers": 4, "intermediate_size": 48, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "rms_norm_eps": 1e-5, "vocab_size": 50,
    "rope_theta": 10000.0, "max_position_embeddings": 64, "tie_word_embeddings": True,
}  # fmt: skip
WINDOWS = {
    "layer_types": ["sliding_attention", "full_attention"] * 2, "sliding_window": 4,
}  # fmt: skip
# What each does that a loop of ours would have to know.
MODELS: list[tuple[str, dict[str, Any]]] = [
    ("llama", WINDOWS),  # two masks
    ("gemma2", {"query_pre_attn_scalar": 8}),  # a scaled embedding, capped logits
    ("gemma3_text", {"sliding_window": 4, "sliding_window_pattern": 2}),  # masks by number
    ("cohere2", {"sliding_window": 4, "sliding_window_pattern": 2, "layer_norm_eps": 1e-5}),
    ("qwen3", {}),
    ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    ("minicpm", {"dim_model_base": 16, "scale_depth": 1.4, "scale_emb": 3.0}),  # other scales
    ("gptj", {"n_embd": 32, "n_head": 4, "n_inner": 48, "n_layer": 4, "n_positions": 64,
              "rotary_dim": 4, "layer_norm_epsilon": 1e-5}),  # names what it passes
    ("mamba", {"state_size": 8, "conv_kernel": 4, "use_bias": False, "use_conv_bias": True,
               "time_step_rank": 4}),  # no attention, another kind of cache
]  # fmt: skip


def build(kind: str, options: dict[str, Any]) -> Any:
    module = importlib.import_module(f"mlx_lm.models.{kind}")
    mx.random.seed(1)
    model = module.Model(module.ModelArgs.from_dict({"model_type": kind, **SHARED, **options}))
    mx.eval(model.parameters())
    return model


def text(rows: int, length: int = 9, seed: int = 0) -> mx.array:
    return mx.array(np.random.default_rng(seed).integers(0, 50, (rows, length)))


@pytest.mark.parametrize(("kind", "options"), MODELS, ids=[kind for kind, _ in MODELS])
def test_any_model_of_mlx_lm(kind: str, options: dict[str, Any]) -> None:
    """Whole, a layer at a time, and token by token: the same as a plain call."""
    plain, driver = build(kind, options), Driver(build(kind, options))
    tokens = text(2)
    expected = plain(tokens)
    watch = Watch()
    h = driver.hidden(tokens, watch=watch)
    assert len(watch.layers) == len(driver.paths) == 4
    assert mx.allclose(driver.logits(h), expected, atol=1e-5).item()

    one = driver.embed(tokens)
    for layer, module in driver.walk():
        one = driver.run(layer, one, tokens, module)
    assert mx.allclose(driver.logits(one), expected, atol=1e-5).item()

    caches = make_prompt_cache(driver.model)
    h = driver.hidden(tokens[:, :5], caches)
    for i in range(5, tokens.shape[1]):
        h = driver.hidden(tokens[:, i : i + 1], caches)
    assert mx.allclose(driver.logits(h)[:, -1], expected[:, -1], atol=1e-4).item()


class Loaded(Driver):
    """Counts what it loads."""

    def __init__(self, model: Any, *, resident: bool):
        super().__init__(model, resident=resident)
        self.count: list[int] = []

    def load_layer(self, layer: int) -> nn.Module:
        self.count.append(layer)
        return super().load_layer(layer)


@pytest.mark.parametrize("resident", [True, False])
def test_layers_are_loaded_once_if_they_stay(resident: bool) -> None:
    driver = Loaded(build("llama", {}), resident=resident)
    for _ in range(2):
        driver.hidden(text(1))
    assert driver.count == [0, 1, 2, 3] * (1 if resident else 2)


@pytest.mark.parametrize("options", [{}, WINDOWS], ids=["full", "windows"])
def test_copies_share_what_they_have_in_common(options: dict[str, Any]) -> None:
    """Each is a model with these changes; those that met the same are computed once."""
    model = build("llama", options)
    batches = [text(3, seed=1), text(1, length=6, seed=2)]
    driver = Driver(build("llama", options))
    changes: dict[str, dict[int, float]] = {
        "none": {}, "late": {3: 0.0}, "twice": {1: 2.0, 3: 0.0}, "again": {1: 2.0, 3: 0.0},
        "half": {1: 2.0},
    }  # fmt: skip
    ran = []

    def change(module: Any, factor: float) -> Any:
        path = "mlp.down_proj.weight"
        return replace_at(module, path, tensors_of(module)[path] * factor)

    streams = Streams(driver, batches, [*changes])
    for layer, module in driver.walk():
        variants = {name: by[layer] for name, by in changes.items() if layer in by}

        def make(factor: float, module: Any = module) -> Any:
            ran.append(factor)
            return change(module, factor)

        streams.advance(layer, module, variants, make)
        assert len({id(stream) for stream in streams.values()}) == [1, 2, 2, 4][layer]
    assert ran == [2.0, 0.0, 0.0] and streams["twice"] is streams["again"]
    for name, by in changes.items():
        changed = model
        for layer, factor in by.items():
            changed = replace_at(
                changed, f"model.layers.{layer}", change(model.layers[layer], factor)
            )
        for tokens, h in zip(batches, streams[name], strict=True):
            assert mx.allclose(driver.logits(h), changed(tokens), atol=1e-5).item(), name


def test_changes_are_for_one_call(network: Any) -> None:
    """Tensors and modules stand in for the model's own, on both ends, and are gone after."""
    driver = network[1]
    tokens = text(2)
    h, logits = driver.embed(tokens), driver.logits(driver.hidden(tokens))
    name = "model.embed_tokens.weight"
    doubled = driver.embed(tokens, {name: 2 * tensors_of(driver.model)[name]})
    assert mx.allclose(doubled, 2 * h).item()
    recorder = Recorder(driver.model.lm_head)
    got = driver.logits(driver.hidden(tokens), {"lm_head": recorder})
    assert mx.array_equal(recorder.y, got).item() and mx.array_equal(got, logits).item()
    assert mx.allclose(driver.model.model.norm(driver.hidden(tokens)), recorder.x).item()
    assert mx.array_equal(driver.embed(tokens), h).item()


def test_what_is_streamed_is_let_go(network: Any) -> None:
    """Nothing but the ends stays behind, and after ``release`` not even these."""
    driver = network[1]
    if driver.resident:
        return
    tokens = text(2)
    before = driver.logits(driver.hidden(tokens))
    mx.eval(before)
    gc.collect()
    held = mx.get_active_memory()
    ends = sum(a.nbytes for _, a in tree_flatten(driver.model.parameters()))
    for _, block in driver.walk():
        del block
    gc.collect()
    assert held - mx.get_active_memory() > 0.9 * ends
    assert mx.array_equal(driver.logits(driver.hidden(tokens)), before).item()


def test_a_stock_folder_can_be_run_again(tmp_path: Path) -> None:
    """Read anew each time, and as mlx-lm runs it."""
    make_llama(tmp_path, num_hidden_layers=2)
    model, _ = mlx_skipless.load(tmp_path)
    network = StockNetwork(lambda: load_network(tmp_path, lazy=True)[0])
    for _ in range(2):
        got = network.logits(network.hidden(text(2)))
        assert mx.allclose(got, model(text(2)), atol=1e-4).item()


def test_an_error_in_a_layer_leaves_the_model_usable(network: Any) -> None:
    driver: StreamedNetwork = network[1]
    with pytest.raises(ValueError, match="broken"):
        driver.run(0, driver.embed(text(1)), text(1), _Broken())
    assert mx.isfinite(driver.hidden(text(1))).all().item()


class _Broken(nn.Module):
    def __call__(self, *args: Any) -> None:
        raise ValueError("broken")
