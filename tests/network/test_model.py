"""The network at run time: caches of every kind, RoPE, windows, sharding, nothing dead."""

from dataclasses import fields
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import reference
from converted import made
from factory import make_checkpoint
from grids import thorough
from mlx.utils import tree_flatten
from mlx_lm.generate import batch_generate, generate_step
from mlx_lm.models.cache import (
    BatchKVCache,
    BatchRotatingKVCache,
    KVCache,
    RotatingKVCache,
    make_prompt_cache,
)
from mlx_lm.utils import load_model

import mlx_skipless
from mlx_skipless.conversion.convert import convert
from mlx_skipless.network.model import Model, ModelArgs

REMOVALS = ("qp", "kp", "vp", "none")
SKIPS = ("query", "head", "output")
SIZES = {"num_key_value_heads": 4, "norm": "qkv", "hidden_size": 128, "intermediate_size": 192}


@pytest.fixture(scope="module", params=REMOVALS)
def converted(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    """A converted model (heads of 32) with its source in float64."""
    folder = tmp_path_factory.mktemp(request.param)
    skips = {"kp": {"skips": SKIPS}, "qp": {"skips": SKIPS, "per_channel": True}}
    source = make_checkpoint(
        folder / "source", linear_paths=True, gains=True, **skips.get(request.param, {}), **SIZES
    )
    convert(folder / "source", folder / "out", remove=request.param, verify=False)
    return source, *mlx_skipless.load(folder / "out")


def stepwise(model: nn.Module, tokens: np.ndarray, cache: list[Any]) -> np.ndarray:
    steps = [model(mx.array(tokens[:, i : i + 1]), cache) for i in range(tokens.shape[1])]
    return np.array(mx.concatenate(steps, axis=1))


@pytest.mark.parametrize("chunks", [(1, 8), (5, 4), (9,)])
def test_prompt_in_chunks(converted, chunks: tuple[int, ...]) -> None:
    source, model, _ = converted
    tokens = np.random.default_rng(1).integers(0, 256, (3, sum(chunks)))
    cache, parts, start = model.make_cache(), [], 0
    for size in chunks:
        parts.append(model(mx.array(tokens[:, start : start + size]), cache))
        start += size
    got = np.array(mx.concatenate(parts, axis=1))
    assert reference.worst_relative_error(reference.logits(*source, tokens), got) <= 1e-5


def test_quantized_cache(converted) -> None:
    """8-bit keys and values move the logits a little, and only a little."""
    source, model, _ = converted
    tokens = np.random.default_rng(2).integers(0, 256, (1, 12))
    cache = [c.to_quantized(group_size=32, bits=8) for c in model.make_cache()]
    error = reference.worst_relative_error(
        reference.logits(*source, tokens), stepwise(model, tokens, cache)
    )
    assert 1e-6 < error < 5e-2


def test_rotating_cache(converted) -> None:
    """A rotating cache that is large enough changes nothing; a small one forgets."""
    source, model, _ = converted
    tokens = np.random.default_rng(3).integers(0, 256, (1, 12))
    expected = reference.logits(*source, tokens)
    layers = len(model.layers)
    large = [RotatingKVCache(max_size=16) for _ in range(layers)]
    assert reference.worst_relative_error(expected, stepwise(model, tokens, large)) <= 1e-5
    small = stepwise(model, tokens, [RotatingKVCache(max_size=4) for _ in range(layers)])
    assert reference.worst_relative_error(expected[:, :4], small[:, :4]) <= 1e-5
    assert reference.worst_relative_error(expected[:, 8:], small[:, 8:]) > 1e-3


def test_batched_cache_with_left_padding(converted) -> None:
    source, model, _ = converted
    rng = np.random.default_rng(4)
    short, long = rng.integers(0, 256, (1, 5)), rng.integers(0, 256, (1, 8))
    padded = np.concatenate([np.pad(short, ((0, 0), (3, 0))), long])
    cache = [BatchKVCache([3, 0]) for _ in model.layers]
    got = np.array(model(mx.array(padded), cache))
    expected_short = reference.logits(*source, short)
    assert reference.worst_relative_error(expected_short, got[:1, 3:]) <= 1e-5
    assert reference.worst_relative_error(reference.logits(*source, long), got[1:]) <= 1e-5


def test_batch_generation_equals_one_by_one(converted) -> None:
    _, model, tokenizer = converted
    prompts = [[5, 6, 7], [9, 3, 1, 4, 1, 5, 9, 2], [200]]
    together = batch_generate(model, tokenizer, prompts, max_tokens=6)
    alone = [batch_generate(model, tokenizer, [prompt], max_tokens=6) for prompt in prompts]
    assert together.texts == [one.texts[0] for one in alone]


@pytest.mark.parametrize(
    "name",
    [
        "qp",
        "skips",
        "table",
        "no attention 0",
        "no attention 1",
        "no attention 1, 2",
        "mixtral",
        pytest.param("growing queries", marks=thorough),
    ],
)
def test_batches_that_come_and_go_equal_one_by_one(name: str, tmp_path: Path) -> None:
    """Padded prompts, longer than a window too, join and leave a batch while it decodes."""
    model, tokenizer = mlx_skipless.load(made(tmp_path, name))
    rng = np.random.default_rng(5)
    prompts = [rng.integers(0, 256, length).tolist() for length in (3, 11, 1, 7, 6)]
    options = {"max_tokens": [9, 2, 5, 6, 3], "return_token_ids": True, "return_logprobs": True}
    few = {"completion_batch_size": 2, "prefill_batch_size": 2, "prefill_step_size": 4}
    together = batch_generate(model, tokenizer, prompts, **options, **few)
    for i, prompt in enumerate(prompts):
        one = {**options, "max_tokens": options["max_tokens"][i]}
        alone = batch_generate(model, tokenizer, [prompt], **one)
        assert together.token_ids[i] == alone.token_ids[0]
        assert np.allclose(together.logprobs[i], alone.logprobs[0], atol=1e-4)


def test_greedy_generation(converted) -> None:
    """mlx-lm's generator picks the reference's tokens, one by one."""
    source, model, _ = converted
    tokens = [3, 141, 59]
    for (token, _), _ in zip(generate_step(mx.array(tokens), model), range(5), strict=False):
        logits = reference.logits(*source, np.array([tokens]))[0, -1]
        assert token == int(logits.argmax())
        tokens.append(int(token))


@pytest.mark.parametrize(
    "scaling",
    [
        {"rope_type": "linear", "factor": 4.0},
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    ],
    ids=["linear", "llama3"],
)
@pytest.mark.parametrize("remove", ["qp", "kp"])
def test_rope_scaling(remove: str, scaling: dict[str, Any], tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "s", rope_scaling=scaling, rope_theta=500.0, **SIZES)
    convert(tmp_path / "s", tmp_path / "out", remove=remove, verify=False)
    model, _ = mlx_skipless.load(tmp_path / "out")
    tokens = np.random.default_rng(0).integers(0, 256, (1, 40))
    expected = reference.logits(*source, tokens)
    assert reference.worst_relative_error(expected, np.array(model(mx.array(tokens)))) <= 5e-5
    got = stepwise(model, tokens, model.make_cache())
    assert reference.worst_relative_error(expected, got) <= 5e-5


@pytest.mark.parametrize(
    "layer_types",
    [
        None,
        ["full_attention", "sliding_attention", "full_attention"],
        ["sliding_attention", "full_attention", "sliding_attention"],
    ],
)
@pytest.mark.parametrize("block", ["serial", "parallel"])
def test_sliding_window(block: str, layer_types: list[str] | None, tmp_path: Path) -> None:
    """Longer than the window: each layer sees what its type says, with a cache of that size."""
    source = make_checkpoint(
        tmp_path / "s", block=block, sliding_window=6, layer_types=layer_types, norm="qkv",
        linear_paths=True, skips=SKIPS,
    )  # fmt: skip
    convert(tmp_path / "s", tmp_path / "out", remove="q", verify=False)
    model, _ = mlx_skipless.load(tmp_path / "out")
    tokens = np.random.default_rng(0).integers(0, 256, (2, 20))
    expected = reference.logits(*source, tokens)
    assert reference.worst_relative_error(expected, np.array(model(mx.array(tokens)))) <= 1e-5
    cache = make_prompt_cache(model)
    got = stepwise(model, tokens, cache)
    assert reference.worst_relative_error(expected, got) <= 1e-5
    slides = [kind == "sliding_attention" for kind in layer_types or ["sliding_attention"] * 3]
    assert [isinstance(c, RotatingKVCache) for c in cache] == slides


@pytest.mark.parametrize("chunks", [(20,), (2, 9, 1, 8), (1,) * 20], ids=len)
def test_queries_that_grow(chunks: tuple[int, ...], tmp_path: Path) -> None:
    """With their positions, whatever the chunk, in a rotating cache and in a padded batch too."""
    sliding = "full" if len(chunks) == 4 else "sliding"  # mlx-lm rotates no padded chunks
    kinds = ["full_attention", *[f"{sliding}_attention"] * 2]
    source = make_checkpoint(
        tmp_path / "s", query_growth=0.8, query_step=3, linear_paths=True, sliding_window=6,
        layer_types=kinds, **SIZES,
    )  # fmt: skip
    convert(tmp_path / "s", tmp_path / "out", remove="qp", verify=False)
    model, _ = mlx_skipless.load(tmp_path / "out")
    rng = np.random.default_rng(len(chunks))
    tokens, short = rng.integers(0, 256, (2, 20)), rng.integers(0, 256, (1, 13))
    caches = model.make_cache()
    batch: list[Any] = [BatchKVCache([7, 0]) for _ in kinds]
    if sliding == "sliding":
        batch[1:] = [BatchRotatingKVCache(6, [7, 0]) for _ in kinds[1:]]
    padded = np.concatenate([np.pad(short, ((0, 0), (7, 0))), tokens[:1]])
    parts: list[list[mx.array]] = [[], []]
    for end, size in zip(np.cumsum(chunks), chunks, strict=True):
        for found, text, cache in zip(parts, (tokens, padded), (caches, batch), strict=True):
            found.append(model(mx.array(text[:, end - size : end]), cache))
    alone, together = (np.array(mx.concatenate(found, axis=1)) for found in parts)
    expected = reference.logits(*source, tokens)
    assert reference.worst_relative_error(expected, alone) <= 1e-5
    assert reference.worst_relative_error(expected[:1], together[1:]) <= 1e-5
    expected = reference.logits(*source, short)
    assert reference.worst_relative_error(expected, together[:1, 7:]) <= 1e-5


def test_a_layer_without_attention(tmp_path: Path) -> None:
    """It has no attention parameters and no cache; the FFN reads the stream."""
    config, weights = make_checkpoint(tmp_path / "s", norm="qkv", gains=True, linear_paths=True)
    kept = {name: w for name, w in weights.items() if "layers.1.self_attn" not in name}
    args = {**config, "removed": {"attention": [1]}, "gains": ["q", "k", "v", "hidden", "final"]}
    args |= dict.fromkeys(("gate_offset", "value_skip", "attention_gain", "uniform_gain"), True)
    model = Model(ModelArgs.from_dict(args))
    model.load_weights([(name, mx.array(w.astype(np.float32))) for name, w in kept.items()])
    assert len(model.make_cache()) == 2
    tokens = np.random.default_rng(0).integers(0, 256, (1, 9))
    x = kept["model.embed_tokens.weight"][tokens]
    for layer in range(3):
        if layer != 1:
            x = reference.attention(config, weights, layer, x)
        x = reference.feed_forward(config, weights, layer, x)
    x = reference.rms_norm(x, kept["model.norm.weight"], config["rms_norm_eps"])
    expected = x @ kept["lm_head.weight"].T
    got = stepwise(model, tokens, model.make_cache())
    assert reference.worst_relative_error(expected, got) <= 1e-5


@pytest.mark.parametrize("remove", REMOVALS)
def test_every_parameter_matters(remove: str, tmp_path: Path) -> None:
    """No dead parameters: each one has a gradient, and none stands for a removed matrix."""
    make_checkpoint(
        tmp_path / "s", gains=True, linear_paths=True, skips=SKIPS, per_channel=None, norm="qkv",
        num_key_value_heads=4,
    )  # fmt: skip
    convert(tmp_path / "s", tmp_path / "out", remove=remove, verify=False)
    model, _ = load_model(tmp_path / "out", trust_remote_code=True)
    tokens = mx.array(np.random.default_rng(0).integers(0, 256, (2, 9)))

    def loss(model: nn.Module) -> mx.array:
        return nn.losses.cross_entropy(model(tokens[:, :-1]), tokens[:, 1:], reduction="mean")

    _, gradients = nn.value_and_grad(model, loss)(model)
    for name, gradient in tree_flatten(gradients):
        assert mx.abs(gradient).max().item() > 0, name
    gone = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "p": "o_proj", "none": "-"}
    names = [name for name, _ in tree_flatten(model.parameters())]
    for letter in remove if remove != "none" else ():
        assert not any(gone[letter] in name for name in names)


def test_every_setting_is_documented() -> None:
    document = (Path(__file__).parents[2] / "docs/checkpoint.md").read_text()
    assert [key.name for key in fields(ModelArgs) if f"`{key.name}`" not in document] == []


def test_an_unknown_setting_is_named() -> None:
    with pytest.raises(ValueError, match="'sideways' is not supported"):
        ModelArgs("skipless", 8, 1, 8, 1, 8, block="sideways")


def test_plain_caches_are_mlx_lms(converted) -> None:
    assert all(type(cache) is KVCache for cache in converted[1].make_cache())
