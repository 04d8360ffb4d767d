"""Networks without whole layers, against mlx-lm's own with these layers' outputs times zero."""

import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import zoo
from factory import make_llama
from grids import only, thin, thorough
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.gguf import convert_to_gguf
from mlx_lm.models import llama
from mlx_lm.models.base import create_attention_mask
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import load_model, quantize_model, save_config, save_model

from mlx_skipless import convert
from mlx_skipless.conversion import stock
from mlx_skipless.inference.loading import load_network
from mlx_skipless.network.stock import StockNetwork
from mlx_skipless.removal import renumbering
from mlx_skipless.removal.renumbering import (
    Layers,
    delete_layers,
    passes_stream,
    shorten_config,
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
FEW = ("deepseek_v3", "gemma3_text", "nemotron_h", "qwen3_5")
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


def choose(monkeypatch: pytest.MonkeyPatch, **dropped: list[int]) -> None:
    """Have these sub-layers go, whatever a text says."""
    monkeypatch.setattr(stock, "choose_drops", lambda *args, **options: (dropped, []))


def make_packed(folder: Path, name: str) -> Path:
    """A model of mixed precision, as mlx-lm packs it."""
    zoo.make_model(folder / "dense", name)
    model, config = load_model(folder / "dense")

    def mix(path: str, module: nn.Module) -> bool | dict[str, Any]:
        if not hasattr(module, "to_quantized") or "embed" in path:
            return False
        return {"group_size": 32, "bits": 8} if "2.mlp" in path else True

    model, config = quantize_model(model, config, 32, 4, quant_predicate=mix)
    shutil.copytree(folder / "dense", folder / "s")
    save_model(folder / "s", model)
    save_config(config, folder / "s/config.json")
    return folder / "s"


# By default one of each.
SHOWN = {"gemma3_text", "gpt_oss", True, False}
CHOSEN = [
    ("gemma3_text", [0, 1, 2], [], False), ("gpt_oss", [1], [0, 2], True),
    ("smollm3", [3], [], False), ("smollm3", [3], [], True), ("gpt_oss", [1], [0, 2], False),
    ("gemma3_text", [0, 1, 2], [], True), ("qwen3_moe", [1], [], False),
    ("olmo2", [0, 2], [3], False), ("olmo2", [0, 2], [3], True),
]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "blocks", "attentions", "packed"),
    thin(CHOSEN, lambda case: {case[0], case[3]} & SHOWN),
)
def test_converted(
    name: str,
    blocks: list[int],
    attentions: list[int],
    packed: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The folder holds no more than what stays, each tensor bit for bit the source's."""
    source = make_packed(tmp_path, name) if packed else tmp_path / "s"
    if not packed:
        zoo.make_model(source, name)
    choose(monkeypatch, attention=sorted(blocks + attentions), ffn=blocks)
    report = convert(source, tmp_path / "o", drop_block=len(blocks))
    code = bool(attentions)
    assert report.stock == (not code) == (not (tmp_path / "o/model.py").exists())
    assert report.removed == {"attention": sorted(blocks + attentions), "ffn": blocks}
    config = json.loads((tmp_path / "o/config.json").read_text())
    whole = json.loads((source / "config.json").read_text())
    left = whole["num_hidden_layers"] - len(blocks)
    assert config["num_hidden_layers"] == left
    result, _ = load_model(tmp_path / "o", trust_remote_code=code)
    network = StockNetwork(lambda: load_network(source, lazy=True)[0])
    wanted = silence(source, network, blocks)
    for layer in attentions:
        wanted.layers[layer].self_attn = Silent(wanted.layers[layer].self_attn)
    np.testing.assert_array_equal(run(result), run(wanted))
    written = mx.load(str(tmp_path / "o/model.safetensors"))
    assert {n.split(".")[2] for n in written if ".layers." in n} == {*map(str, range(left))}
    assert sum(array.nbytes for array in written.values()) == report.bytes_after  # type: ignore[union-attr]
    rows = {row.name: row.weights_after for row in report.rows}
    assert all((rows[f"layers.{i}"] == 0) == (i in blocks) for i in range(left + len(blocks)))


@pytest.mark.parametrize("name", ["gemma3_text", "talkie"])
def test_what_no_config_says(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Then the result has stand-ins in a network that it brings, and the report says so.

    The one has layers of two kinds in a fixed order. What is left of the other's blocks still
    scales the stream.
    """
    zoo.make_model(tmp_path / "s", name)
    choose(monkeypatch, attention=[1], ffn=[1])
    report = convert(tmp_path / "s", tmp_path / "o", drop_block=1)
    assert not report.stock and any("leave out just blocks 1:" in note for note in report.notes)
    result, _ = load_model(tmp_path / "o", trust_remote_code=True)
    network = StockNetwork(lambda: load_network(tmp_path / "s", lazy=True)[0])
    np.testing.assert_array_equal(run(result), run(silence(tmp_path / "s", network, [1])))


class WindowsByPlace(llama.LlamaModel):
    """A llama of which each second layer looks back a few tokens; no layer knows of that."""

    def __call__(self, inputs: mx.array, cache: Any = None, *others: Any) -> mx.array:
        h = self.embed_tokens(inputs)
        for i, (layer, own) in enumerate(zip(self.layers, cache or [None] * 9, strict=False)):
            h = layer(h, create_attention_mask(h, own, window_size=4 if i % 2 else None), own)
        return self.norm(h)


@pytest.mark.parametrize(("gone", "same"), [([1], False), ([3], True), ([1, 2], True)])
def test_masks_alone_differ(gone: list[int], same: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def build(args: Any) -> nn.Module:
        model: Any = llama.Model(args)
        model.model = WindowsByPlace(args)
        return model

    monkeypatch.setattr(renumbering, "_get_classes", lambda config: (build, llama.ModelArgs))
    layers = Layers(tuple({*range(4)} - {*gone}), 4)
    config = {"model_type": "llama"} | zoo.CONFIGS["llama"]
    assert (delete_layers(config, layers) is not None) == same


# An index list, flags, a pattern, thresholds, counts from 1, and what is no list of layers.
CONFIG: dict[str, Any] = {
    "num_hidden_layers": 4, "max_window_layers": 4, "mlp_only_layers": [0, 3],
    "no_rope_layers": [1, 1, 1, 0], "hybrid_override_pattern": "M-*E", "eos_token_id": [5, 6, 7, 8],
    "rope_scaling": {"long_factor": [1.0, 2.0, 3.0, 4.0]}, "first_k_dense_replace": 1,
    "text_config": {"n_layers": 4, "layer_types": ["a", "b", "c", "d"]}, "vocab_size": 4,
    "linear_attn_config": {"kda_layers": [1, 3], "full_attn_layers": [2, 4]},
    "moe_layers_enum": "1,2,3",
}  # fmt: skip


def test_what_a_config_says_of_layers() -> None:
    short = shorten_config(CONFIG, Layers((0, 2, 3), 4))
    changed = {key: value for key, value in short.items() if value != CONFIG[key]}
    assert changed == {
        "num_hidden_layers": 3, "max_window_layers": 3, "mlp_only_layers": [0, 2],
        "no_rope_layers": [1, 1, 0], "hybrid_override_pattern": "M*E",
        "text_config": {"n_layers": 3, "layer_types": ["a", "c", "d"]},
        "linear_attn_config": {"kda_layers": [1, 2], "full_attn_layers": [3]},
        "moe_layers_enum": "1,2",
    }  # fmt: skip


@pytest.mark.parametrize("hidden", [64, pytest.param(96, marks=thorough)])
def test_through_gguf(hidden: int, tmp_path: Path) -> None:
    """What mlx-lm exports of a llama with a block less says the same tokens when read again."""
    make_llama(tmp_path / "s", hidden_size=hidden, num_hidden_layers=4)
    report = convert(tmp_path / "s", tmp_path / "o", drop_block=1)
    assert report.stock and report.removed["ffn"] == report.removed["attention"]
    model, config = load_model(tmp_path / "o")
    assert config["num_hidden_layers"] == len(model.layers) == 3
    weights = dict(tree_flatten(model.parameters()))
    convert_to_gguf(tmp_path / "o", weights, config, str(tmp_path / "o.gguf"))
    convert(tmp_path / "o.gguf", tmp_path / "back", remove="none")
    back, _ = load_model(tmp_path / "back")
    np.testing.assert_allclose(run(back), run(model), atol=1e-4)
    np.testing.assert_array_equal(run(back).argmax(-1), run(model).argmax(-1))
