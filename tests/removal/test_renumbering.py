"""Networks without whole layers, against mlx-lm's own with these layers' outputs times zero."""

import itertools
import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import zoo
from grids import only
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import load_model

from mlx_skipless.inference.loading import load_network
from mlx_skipless.network.stock import StockNetwork
from mlx_skipless.removal.renumbering import (
    Layers,
    delete_layers,
    passes_stream,
    shorten_network,
)

# Layers that go, one set a network, where mlx-lm's configs can say so of some of its layers only.
PATTERNS: dict[str, list[int]] = {
    "bailing_hybrid": [1, 2], "bailing_moe_linear": [1, 2], "bailing_moe_v3": [0, 1],
    "exaone4": [1, 2], "gemma3": [0, 1, 2], "gemma3_text": [3, 4, 5], "jamba": [3, 4],
    "kimi_linear": [1, 2], "plamo2": [2, 3], "plamo3": [0, 3],
    "qwen3_5": [0, 1], "qwen3_5_moe": [2, 3], "qwen3_next": [1, 2], "recurrent_gemma": [3],
    "laguna": [0, 2], "afmoe": [0, 2], "lfm2": [0, 3], "lfm2_moe": [0, 3], "lfm2-vl": [0, 3],
    "gpt_oss": [0, 3], "mellum": [0, 2], "mimo_v2_flash": [2, 3], "olmo3": [0, 2],
}  # fmt: skip
# What stays as it is, and why.
CANNOT = {
    "cohere2": "its last layer of four alone has no window",
    "gemma3n": "its layers share keys, and a tensor has a part for each layer",
    "gemma4": "its blocks hand on more than the stream",
    "gemma4_text": "its blocks hand on more than the stream",
    "minicpm": "its blocks are scaled by their number",
    "minicpm3": "its blocks are scaled by their number",
    "afm7": "its last layers read the keys of another",
    "hunyuan": "its blocks hand on more than the stream",
    "iquestloopcoder": "it runs its layers twice",
    "kimi_k3": "its blocks hand on more than the stream",
    "llama4": "its last layer of four alone has no window",
    "prism_hadamard_qwen35": "its config lists each matrix by its path",
    "rwkv7": "its blocks hand on more than the stream",
}
# This package's loader takes a constant in them, of whole numbers, for a tensor.
NOT_LOADED = {"deepseek_v41", "phi3small"}
FEW = ("deepseek_v3", "gemma3_text", "gpt_oss", "nemotron_h", "qwen3_5", "qwen3_moe", "smollm3")
NAMES = sorted(zoo.CONFIGS.keys() - CANNOT.keys() - NOT_LOADED)


class Silent(nn.Module):
    """A module whose output is nothing."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.__dict__.update(vars(inner))
        self.inner = inner

    def __call__(self, *args: Any, **options: Any) -> Any:
        out = self.inner(*args, **options)
        return (out[0] * 0, *out[1:]) if isinstance(out, tuple) else out * 0


def run(model: nn.Module) -> np.ndarray:
    """Logits of a text: in one go, in chunks and token by token."""
    text = mx.array(np.random.default_rng(0).integers(3, 260, (1, 24)))
    cache = make_prompt_cache(model)
    cuts = [0, 10, 19, *range(20, 25)]
    parts = [model(text[:, a:b], cache=cache) for a, b in itertools.pairwise(cuts)]
    whole = mx.concatenate([model(text), *parts], axis=1)
    return np.array(whole.astype(mx.float32))


def open_zoo(folder: Path, name: str, **changes: Any) -> StockNetwork:
    zoo.make_model(folder, name, **changes)
    return StockNetwork(lambda: load_network(folder, lazy=True)[0], resident=True)


def shorten(folder: Path, network: StockNetwork, gone: list[int]) -> Path | None:
    """Write a network without some layers as a conversion does."""
    total = len(network.paths)
    layers = Layers(tuple(i for i in range(total) if i not in gone), total)
    source = json.loads((folder / "config.json").read_text())
    if (config := delete_layers(source, layers)) is None:
        return None
    model, config = shorten_network(load_network(folder)[0], network.paths, config, layers)
    out = folder / "short"
    out.mkdir()
    (out / "config.json").write_text(json.dumps(config))
    mx.save_safetensors(str(out / "model.safetensors"), dict(tree_flatten(model.parameters())))
    return out


def silence(folder: Path, network: StockNetwork, gone: list[int]) -> nn.Module:
    model, _ = load_model(folder)
    for layer in gone:
        block = model.layers[layer]
        for names in network.sublayers[layer].parts.values():
            for name in names:
                silent = Silent(dict(block.named_modules())[name])
                block.update_modules(tree_unflatten([(name, silent)]))
    return model


@pytest.mark.parametrize("name", only(FEW, NAMES))
def test_the_same_network(name: str, tmp_path: Path) -> None:
    """Plain mlx-lm loads it, and every bit of every logit is the same."""
    network = open_zoo(tmp_path, name)
    total = len(network.paths)
    sets = [PATTERNS[name]] if name in PATTERNS else [[0], [total // 2], [total - 1], [0, 2]]
    for gone in sets:
        if not all(passes_stream(network, layer) for layer in gone):
            pytest.skip("without its sub-layers a block still changes the stream")
        out = shorten(tmp_path, network, gone)
        assert out is not None, gone
        short, config = load_model(out)
        assert len(short.layers) == total - len(gone) and "model_file" not in config
        wanted = silence(tmp_path, network, gone)
        # mlx-lm scales this one's head whenever it loads it.
        most = 1e-5 if name == "baichuan_m1" else 0
        np.testing.assert_allclose(run(short), run(wanted), rtol=0, atol=most)
        for file in out.iterdir():
            file.unlink()
        out.rmdir()


@pytest.mark.parametrize("name", only(["minicpm", "cohere2"], CANNOT))
def test_what_stays(name: str, tmp_path: Path) -> None:
    """Where a layer's place says what it does, it can have no other."""
    network = open_zoo(tmp_path, name)
    assert shorten(tmp_path, network, [1]) is None
