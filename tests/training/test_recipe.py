"""Recipes: what network each rung of the ladder is, its starting weights, rates and optimizer."""

import dataclasses
import itertools
import json
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest
import reference
from grids import product
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx.utils import tree_flatten, tree_map, tree_unflatten

from mlx_skipless import UserError
from mlx_skipless.network.model import ACTIVATIONS as NETWORK_ACTIVATIONS
from mlx_skipless.network.model import PROJECTION_NORMS as NETWORK_NORMS
from mlx_skipless.network.model import Model
from mlx_skipless.options import read_options
from mlx_skipless.training.initialization import initialize, make_model_args, make_orthogonal
from mlx_skipless.training.optimizer import (
    hold_skips,
    make_optimizer,
    make_schedule,
    orthogonalize,
    pull_queries,
)
from mlx_skipless.training.recipe import ACTIVATIONS, PROJECTION_NORMS, Recipe

SMALL: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "layers": 2,
    "heads": 4,
    "kv_heads": 2,
    "vocab_size": 300,
    "context": 16,
}
# The recipe without the skips that merge.
FORMER: dict[str, Any] = {
    "query_skip": None,
    "head_skip": None,
    "output_skip": None,
    "norms": "q,k,v,hidden",
    "embedding_scale": 1.0,
}
# The recipe whose K and V read the stream.
OF_STREAM: dict[str, Any] = {"norms": "q,k,v,heads"}
BLOCKS, SKIPS, NORMS = ("serial", "parallel"), ("none", "ffn", "both"), ("none", "qkv", "pre")
WITHOUT = ("", "q", "p", "qp", "v", "vp", "k", "kp")
MATRIX = {
    "q": "self_attn.q_proj.weight",
    "k": "self_attn.k_proj.weight",
    "v": "self_attn.v_proj.weight",
    "p": "self_attn.o_proj.weight",
}
ONE = np.ones(1)
TOKENS = np.random.default_rng(0).integers(0, 300, (2, 8))


def read_recipe(options: Mapping[Any, Any]) -> Recipe:
    return read_options(Recipe, "recipe", options)


def made(**options: Any) -> tuple[Recipe, Model]:
    recipe = Recipe(**SMALL | options)
    model = Model(make_model_args(recipe))
    initialize(model, recipe)
    return recipe, model


def weights_of(model: Model) -> dict[str, np.ndarray]:
    return {name: np.array(w, np.float64) for name, w in flat(model.parameters()).items()}


def flat(tree: Mapping[str, Any]) -> dict[str, mx.array]:
    return dict(tree_flatten(tree))  # type: ignore[arg-type]


def own_logits(model: Model, tokens: np.ndarray) -> np.ndarray:
    return np.array(model(mx.array(tokens)))


def check_rung(**options: Any) -> dict[str, np.ndarray]:
    """A rung computes what the reference does, and all its weights can learn; its weights."""
    _, model = made(**options)
    weights = weights_of(model)
    logits = own_logits(model, TOKENS)
    config = dataclasses.asdict(model.args)
    if options.get("block") in BLOCKS:
        config |= {key: options[key] for key in ("block", "skip", "norm")}
    config |= {key: options[key] for key in ("hidden_act", "rope_theta") if key in options}
    expected = reference.logits(config, weights, TOKENS)
    assert np.isfinite(logits).all(), options
    assert reference.worst_relative_error(expected, logits) < 2e-3, options

    def loss(tokens: mx.array) -> mx.array:
        return nn.losses.cross_entropy(model(tokens[:, :-1]), tokens[:, 1:]).mean()

    value, gradients = nn.value_and_grad(model, loss)(mx.array(TOKENS))
    assert np.isfinite(value.item()), options
    for name, gradient in flat(gradients).items():
        g = np.array(gradient)
        asleep = "k_proj" in name and not weights.get(name.replace("k_proj", "q_proj"), ONE).any()
        assert np.isfinite(g).all() and g.any() != asleep, (name, options)
    return weights


@pytest.mark.parametrize(
    ("block", "skip", "norm", "without"), product(BLOCKS, SKIPS, NORMS, WITHOUT)
)
def test_every_rung_runs_and_can_learn(block: str, skip: str, norm: str, without: str):
    kv_heads = 4 if set(without) & {"k", "v"} else 2
    ways = (
        (False, 1.0, None, {}), (False, 1.0, None, OF_STREAM),
        (False, None, 0.5, {"head_skip": None, "skip_width": "channel"} | OF_STREAM),
        (False, None, None, FORMER), (False, 1.0, 0.5, FORMER), (True, None, 0.5, FORMER),
        (True, 1.0, None, FORMER),
    )  # fmt: skip
    for shaped, gate, value, skips in ways:
        weights = check_rung(
            block=block, skip=skip, norm=norm, without=without, kv_heads=kv_heads,
            shaped_attention=shaped, gate_offset=gate, value_skip=value, **skips,
        )  # fmt: skip
        for layer in range(2):
            prefix = f"model.layers.{layer}."
            has = {name.removeprefix(prefix) for name in weights if name.startswith(prefix)}
            assert {part for part, name in MATRIX.items() if name not in has} == set(without)
            assert ("mlp.gate_offset" in has) == (gate is not None)
            assert ("self_attn.value_skip" in has) == (value is not None or shaped)
            plain = not skips and norm == "qkv"  # V alone is the attention's weight
            assert ("self_attn.kv_norm.weight" in has) == plain
            gain = shaped or (skips is not FORMER and not plain)
            assert ("self_attn.attention_gain" in has) == gain
            assert ("self_attn.query_skip" in has) == (skips is not FORMER)
            all_skips = skips in ({}, OF_STREAM)
            assert ("self_attn.head_skip" in has) == (all_skips and layer > 0)
            assert ("self_attn.output_skip" in has) == (all_skips and layer == 1)
            assert ("self_attn.uniform_gain" in has) == shaped
            assert ("self_attn.q_norm.weight" in has) == (norm == "qkv")
            assert ("input_layernorm.weight" in has) == (norm == "pre")
        assert ("model.norm.weight" in weights) == (norm != "qkv" or skip != "none")


@pytest.mark.parametrize(
    "options",
    [{"block": "sas"}, {"block": "sas-p"}, {"tie": False}, {"heads": 2, "kv_heads": 1},
     {"layers": 1}, {"own_token": False}, {"rope_theta": 500.0}, {"hidden_act": "gelu"},
     {"hidden_act": "gelu_pytorch_tanh"}, {"hidden_act": "relu"}],
)  # fmt: skip
def test_other_rungs_run_and_can_learn(options: dict[str, Any]):
    check_rung(**options)


@pytest.mark.parametrize("final_norm", [True, False])
@pytest.mark.parametrize("norm", NORMS)
def test_a_final_norm_as_asked(norm: str, final_norm: bool):
    weights = check_rung(norm=norm, final_norm=final_norm)
    assert ("model.norm.weight" in weights) == final_norm


# He & Hofmann's simplified blocks (2311.01906, figure 1 and equation 10)


@pytest.mark.parametrize(
    ("name", "block", "skip"), [("sas", "serial", "ffn"), ("sas-p", "parallel", "none")]
)
def test_simplified_blocks(name: str, block: str, skip: str):
    options = SMALL | {"block": name, "layers": 3}
    args = make_model_args(Recipe(**options))
    assert (args.block, args.skip, args.norm, args.final_norm) == (block, skip, "pre", True)
    assert args.removed == {"v": [0, 1, 2], "p": [0, 1, 2]}
    assert args.num_key_value_heads == args.num_attention_heads == 4
    assert args.attention_gain and args.uniform_gain and args.value_skip
    assert set(args.gains) == {"attention", "ffn", "final"}


@pytest.mark.parametrize("options", [{"block": "sas"}, {"block": "sas-p"},
                                     {"shaped_attention": True, "norm": "none"}])  # fmt: skip
@pytest.mark.parametrize("value_skip", [None, 1.0])
def test_shaped_attention_starts_as_the_identity(options: dict[str, Any], value_skip: float | None):
    """alpha I + beta A - gamma C, all three one and A uniform as C: no token sees another."""
    model = made(value_skip=value_skip, **FORMER | options)[1]
    for layer in model.layers:
        for gain in ("value_skip", "attention_gain", "uniform_gain"):
            assert (np.array(layer.self_attn[gain]) == 1).all()
    mixed = own_logits(model, TOKENS)
    alone = own_logits(model, TOKENS.reshape(-1, 1)).reshape(mixed.shape)
    assert reference.worst_relative_error(alone, mixed) < 1e-4
    for layer in model.layers:
        layer.self_attn.q_proj.weight += 1
    assert reference.worst_relative_error(alone[:, 1:], own_logits(model, TOKENS)[:, 1:]) > 1e-3


# Starting weights

SHAPES = st.tuples(st.integers(1, 40), st.integers(1, 40))


@settings(max_examples=60, deadline=None)
@given(SHAPES, st.integers(0, 2**63 - 1))
def test_orthogonal_matrices(shape: tuple[int, int], seed: int):
    n_out, n_in = shape
    w = np.array(make_orthogonal(n_out, n_in, key=mx.random.key(seed)), np.float64)
    assert w.shape == shape
    gram = w.T @ w if n_out >= n_in else w @ w.T
    assert np.allclose(gram, gram[0, 0] * np.eye(min(shape)), atol=1e-4 * gram[0, 0])
    # The mean square of W x over directions of x is |W|² / n_out times that of x.
    assert np.sum(w**2) / n_out == pytest.approx(1, rel=1e-4)


def test_orthogonal_matrices_point_everywhere():
    """The mean over keys vanishes, the mean square is the same at each place (Haar)."""
    many = np.array([np.array(make_orthogonal(6, 4, key=mx.random.key(i))) for i in range(600)])
    assert np.abs(many.mean(axis=0)).max() < 0.12
    assert np.allclose((many**2).mean(axis=0), 1 / 4, atol=0.06)


@pytest.mark.parametrize("tie", [True, False])
def test_the_same_seed_gives_the_same_weights(tie: bool):
    options = OF_STREAM | {"tie": tie}  # else K is no random matrix
    first, second, third = (weights_of(made(seed=s, **options)[1]) for s in (7, 7, 8))
    assert first.keys() == second.keys()
    assert all(np.array_equal(first[name], second[name]) for name in first)
    matrices = [name for name, w in first.items() if w.ndim == 2]
    assert not any(np.array_equal(first[name], third[name]) for name in matrices)
    for a, b in itertools.combinations(matrices, 2):
        assert first[a].shape != first[b].shape or not np.allclose(first[a], first[b])


def test_the_global_random_state_is_not_asked():
    mx.random.seed(1)
    first = weights_of(made()[1])
    mx.random.seed(2)
    assert all(np.array_equal(w, first[name]) for name, w in weights_of(made()[1]).items())


@pytest.mark.parametrize("skip", SKIPS)
@pytest.mark.parametrize("layers", [1, 4])
@pytest.mark.parametrize(("without", "last"), [("", "o_proj"), ("p", "v_proj"), ("k", "o_proj")])
def test_what_is_added_to_the_stream_is_scaled_down(
    skip: str, layers: int, without: str, last: str
):
    additions = {"none": 1, "ffn": layers, "both": 2 * layers}[skip]
    options = FORMER | {"skip": skip, "norm": "pre", "layers": layers, "without": without}
    weights = weights_of(made(kv_heads=4, **options)[1])
    for name, w in weights.items():
        if "_proj" not in name or "k_proj" in name:
            continue
        added = "down_proj" in name or (last in name and skip == "both")
        expected = 1 / additions if added else 1
        assert np.sum(w**2) / len(w) == pytest.approx(expected, rel=1e-4), name


def test_a_skipless_stream_neither_grows_nor_shrinks():
    """Through ten layers, where a factor of two in each would be a thousand."""
    _, model = made(layers=10, hidden_size=32, intermediate_size=64, **FORMER)
    weights, config = weights_of(model), dataclasses.asdict(model.args)
    x = weights["model.embed_tokens.weight"][TOKENS]
    for layer in range(10):
        x = reference.block(config, weights, layer, x)
        assert 0.5 < np.sqrt(np.mean(x**2)) < 2


@pytest.mark.parametrize("width", ["head", "channel"])
@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("inner", [8, 16, 24])
@pytest.mark.parametrize("output", [1.25, None])
def test_where_the_skips_that_merge_start(
    width: str, layers: int, inner: int, output: float | None
):
    """Blocks that heads go past start as small additions, another last FFN near the identity."""
    options = OF_STREAM | {"layers": layers, "skip_width": width, "intermediate_size": inner}
    options |= {"output_skip": output, "query_skip": 0.5, "head_skip": 0.75, "gate_offset": 0.9}
    weights = weights_of(made(**options)[1])
    size = 16 if width == "channel" else 4
    for layer in range(layers):
        attention, mlp = (f"model.layers.{layer}.{part}." for part in ("self_attn", "mlp"))
        assert np.array_equal(weights[f"{attention}query_skip"], np.full(size, 0.5))
        assert np.array_equal(weights[f"{attention}attention_gain"], np.full(4, 2))
        assert (f"{attention}head_skip" in weights) == (layer > 0)
        if layer:
            assert np.array_equal(weights[f"{attention}head_skip"], np.full(size, 0.75))
        up, down, gate = (weights[f"{mlp}{name}_proj.weight"] for name in ("up", "down", "gate"))
        has_output = output is not None and layer == layers - 1
        assert (f"{attention}output_skip" in weights) == has_output
        if has_output:
            assert np.array_equal(weights[f"{attention}output_skip"], np.full(size, 1.25))
        last = layer == layers - 1 and output is None
        assert (weights[f"{mlp}gate_offset"] == (np.float32(0.9) if last else 0)).all()
        if last:
            x = np.random.default_rng(layer).standard_normal(16)
            y = down @ up @ x  # the linear path alone
            assert y == pytest.approx(x, abs=1e-4) or inner < 16
            assert np.sum(gate**2) / inner == pytest.approx(0.3**2, rel=1e-4)
            assert np.allclose(down, up.T * min(1, 16 / inner))
        else:
            assert np.sum(down**2) / 16 == pytest.approx(1 / (2 * layers), rel=1e-4)
            assert np.sum(gate**2) / inner == pytest.approx(1, rel=1e-4)


@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("norms", ["q,kv,heads", "q,k,kv"])
def test_values_start_small_where_the_skips_carry_what_k_and_v_read(layers: int, norms: str):
    """As many attentions and FFNs are added to it as there are, each with an equal share."""
    weights = weights_of(made(layers=layers, norms=norms, hidden_size=32, heads=8)[1])
    for layer in range(layers):
        attention = f"model.layers.{layer}.self_attn."
        assert f"{attention}attention_gain" not in weights
        value, key = (weights[f"{attention}{name}_proj.weight"] for name in "vk")
        assert np.sum(value**2) / 8 == pytest.approx(1 / (2 * layers), rel=1e-4)
        # Key head g is the mean of its group's queries, as long as one of them.
        rows = np.zeros((2, 4, 8, 4))
        rows[np.arange(8) // 4 * np.ones(8, int), :, np.arange(8), :] = np.eye(4) / 2
        assert np.allclose(key, rows.reshape(8, 32))


def test_a_norm_behind_v_leaves_its_start_and_the_attention_its_weight():
    weights = weights_of(made(norms="q,kv,v,heads")[1])
    attention = "model.layers.1.self_attn."
    assert np.array_equal(weights[f"{attention}attention_gain"], np.full(4, 2))
    value = weights[f"{attention}v_proj.weight"]
    assert np.sum(value**2) / len(value) == pytest.approx(1, rel=1e-4)


HELD = ("query_skip", "head_skip", "output_skip", "attention_gain")


@pytest.mark.parametrize(
    ("options", "held"),
    [({}, True), ({"learn_skips": True}, False), ({"learn_skips": False} | OF_STREAM, True),
     (OF_STREAM, False), ({"norm": "none"}, False), ({"attention_gain": 0.5}, True)],
)  # fmt: skip
def test_skips_are_held_or_learned(options: dict[str, Any], held: bool):
    """Held ones get gradients of zero, and no other weight does."""
    recipe, model = made(**options)

    def loss(tokens: mx.array) -> mx.array:
        return nn.losses.cross_entropy(model(tokens[:, :-1]), tokens[:, 1:]).mean()

    _, gradients = nn.value_and_grad(model, loss)(mx.array(TOKENS))
    kept = flat(hold_skips(gradients, recipe))
    for name, gradient in flat(gradients).items():
        zero = held and name.endswith(HELD)
        assert np.array_equal(kept[name], mx.zeros_like(gradient) if zero else gradient), name
    assert any(name.endswith(HELD) for name in kept)


@pytest.mark.parametrize("layers", [1, 2, 6])
def test_a_query_skip_alone_starts_near_the_identity_in_every_layer(layers: int):
    options = OF_STREAM | {"layers": layers, "head_skip": None}
    weights = weights_of(made(gate_offset=0.9, **options)[1])
    for layer in range(layers):
        attention, mlp = (f"model.layers.{layer}.{part}." for part in ("self_attn", "mlp"))
        assert weights[f"{attention}attention_gain"] == pytest.approx(layers**-0.5)
        assert (weights[f"{mlp}gate_offset"] == np.float32(0.9)).all()
        up, down = (weights[f"{mlp}{name}_proj.weight"] for name in ("up", "down"))
        assert np.allclose(down @ up, np.eye(16), atol=1e-4)
    far = weights_of(made(near_identity=False, **options)[1])
    name = "model.layers.0.mlp."
    assert not np.allclose(
        far[f"{name}down_proj.weight"] @ far[f"{name}up_proj.weight"], np.eye(16)
    )


def test_embeddings_are_small():
    weights = weights_of(made(tie=False, vocab_size=2000)[1])
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert np.std(weights[name]) == pytest.approx(0.02, rel=0.03)
        assert abs(np.mean(weights[name])) < 0.001


def test_linear_paths_and_temperature_start_where_told():
    options = FORMER | {"gate_offset": 0.25, "value_skip": 0.75, "temperature": 3.0}
    weights = weights_of(made(**options)[1])
    for layer in range(2):
        prefix = f"model.layers.{layer}."
        assert (weights[f"{prefix}mlp.gate_offset"] == 0.25).all()
        assert (weights[f"{prefix}self_attn.value_skip"] == 0.75).all()
        assert (weights[f"{prefix}self_attn.q_norm.weight"] == 3).all()
        for gain in ("self_attn.k_norm", "self_attn.v_norm", "mlp.hidden_norm"):
            assert (weights[f"{prefix}{gain}.weight"] == 1).all()


def attention_weights(model: Model, layer: int, x: np.ndarray) -> np.ndarray:
    """Softmax weights (heads, length, length) of a stream (length, hidden) with norm qkv."""
    weights, args = weights_of(model), model.args
    read = {"q": x, "k": x}
    if "kv" in args.norms:
        queries = x @ weights.get(f"model.layers.{layer}.{MATRIX['q']}", np.eye(x.shape[1])).T
        read["k"] = queries / np.sqrt(np.mean(queries**2, axis=-1, keepdims=True))

    def project(part: str, count: int) -> np.ndarray:
        matrix = weights.get(f"model.layers.{layer}.{MATRIX[part]}", np.eye(args.hidden_size))
        y = (read[part] @ matrix.T).reshape(len(x), count, args.head_dim)
        if part in args.norms:
            y = y / np.sqrt(np.mean(y**2, axis=-1, keepdims=True))
            gain = weights[f"model.layers.{layer}.self_attn.{part}_norm.weight"]
            y = y * gain.reshape(count, -1)
        return reference.rotate(
            y.transpose(1, 0, 2)[None], reference.rope_frequencies(dataclasses.asdict(args))
        )[0]

    heads, kv_heads = args.num_attention_heads, args.num_key_value_heads
    q, k = project("q", heads), np.repeat(project("k", kv_heads), heads // kv_heads, axis=0)
    scores = q @ k.swapaxes(-1, -2) / np.sqrt(args.head_dim)
    scores = np.where(np.tri(len(x), dtype=bool), scores, -np.inf)
    e = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


@pytest.mark.parametrize("without", ["", "q", "p", "qp"])
@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (4, 2), (4, 1)])
@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize(("skip", "norms"), [("none", {}), ("none", OF_STREAM), ("ffn", OF_STREAM)])
def test_attention_starts_on_the_own_token(
    block: str, skip: str, norms: dict[str, Any], heads: int, kv_heads: int, without: str
):
    options = norms | {"block": block, "skip": skip, "without": without, "temperature": 20.0,
               "hidden_size": 64, "heads": heads, "kv_heads": kv_heads}  # fmt: skip
    x = np.random.default_rng(1).standard_normal((12, 64))

    def own(**more: Any) -> float:
        model = made(**options, **more)[1]
        means = [
            np.diagonal(attention_weights(model, i, x), axis1=1, axis2=2)[:, 1:].mean()
            for i in range(2)
        ]
        return min(means)

    assert own() > {1: 0.95, 2: 0.8, 4: 0.6}[heads // kv_heads]
    assert own(own_token=False) < 0.4


def test_with_both_skips_attention_starts_anywhere():
    weights, other = (
        weights_of(made(skip="both", own_token=own)[1]) for own in (True, False)
    )  # fmt: skip
    assert all(np.array_equal(w, other[name]) for name, w in weights.items())


def test_keys_are_as_long_as_queries():
    weights = weights_of(made(hidden_size=64, heads=8, kv_heads=2)[1])
    q, k = (weights[f"model.layers.0.{MATRIX[part]}"] for part in "qk")
    assert k.shape == (16, 64)
    assert np.linalg.norm(k, axis=1) == pytest.approx(np.linalg.norm(q, axis=1)[:16], rel=1e-4)


# Rates


def formula(step: int, peak: float, steps: int, warmup: int, decay: float) -> float:
    falling_from = steps - decay * steps
    points = [(0, peak / warmup), (warmup - 1, peak)] if warmup else [(0, peak)]
    rising = np.interp(step, *zip(*points, strict=True))
    if decay * steps < 1 or step <= falling_from:
        return float(rising)
    return float(min(rising, np.interp(step, [falling_from, steps], [peak, 0])))


@pytest.mark.parametrize("steps", [1, 7, 50])
@pytest.mark.parametrize("warmup", [0, 1, 5, 80])
@pytest.mark.parametrize("decay", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("peak", [0.02, 3.0])
def test_rates_rise_stay_and_fall(steps: int, warmup: int, decay: float, peak: float):
    recipe = Recipe(steps=steps, warmup=warmup, decay=decay, learning_rate=peak)
    schedule = make_schedule(recipe, peak)
    for step in range(steps):
        expected = formula(step, peak, steps, warmup, decay)
        assert schedule(mx.array(step)).item() == pytest.approx(expected, rel=1e-5)
    assert min(schedule(mx.array(step)).item() for step in range(steps)) > 0
    if decay == 1:
        assert schedule(mx.array(steps)).item() == 0


# The optimizer


@pytest.mark.parametrize(
    "options",
    [{}, {"tie": False}, {"without": "qp"}, {"norm": "pre", "skip": "both"}, {"block": "sas"}],
)
def test_muon_gets_the_projections_and_adam_the_rest(options: dict[str, Any]):
    _, model = made(**options)
    optimizer = make_optimizer(Recipe(**SMALL | options))
    parameters = model.trainable_parameters()
    optimizer.init(parameters)
    muon, adam = (
        {name.removesuffix(".v") for name in flat(state) if name.endswith(".v")}
        for state in optimizer.state["states"]
    )
    names = set(flat(parameters))
    assert muon == {name for name in names if name.endswith("_proj.weight")}
    assert adam == names - muon
    assert {"model.embed_tokens.weight", *(("lm_head.weight",) if "tie" in options else ())} <= adam
    moments = {name for name in flat(optimizer.state["states"][1]) if name.endswith(".m")}
    assert moments == {f"{name}.m" for name in adam}


def test_a_step_of_the_optimizer():
    """Muon moves a matrix by its rate along an orthogonal one; AdamW moves all else by its own."""
    recipe, model = made(learning_rate=0.5, adam_learning_rate=0.25, warmup=4, steps=100, decay=0.0)
    optimizer = make_optimizer(recipe)
    optimizer.init(model.trainable_parameters())
    before = weights_of(model)

    def loss(tokens: mx.array) -> mx.array:
        return nn.losses.cross_entropy(model(tokens[:, :-1]), tokens[:, 1:]).mean()

    _, gradients = nn.value_and_grad(model, loss)(mx.array(TOKENS))
    optimizer.update(model, gradients)
    after = weights_of(model)
    for name, gradient in flat(gradients).items():
        move, g = after[name] - before[name], np.array(gradient)
        if name.endswith("_proj.weight"):
            size = max(1, move.shape[0] / move.shape[1]) ** 0.5
            values = np.linalg.svd(move, compute_uv=False) / (0.5 / 4 * size)
            rank = np.linalg.matrix_rank(g, tol=1e-3 * np.linalg.norm(g, 2))
            assert (values[:rank] > 0.3).all() and (values < 1.3).all(), name
            assert np.sum(move * g) < 0
        else:
            big = np.abs(g) > 1e-5
            first = (1 - 0.9) / np.sqrt(1 - 0.95)  # of betas without bias correction
            assert move[big] == pytest.approx(-0.25 / 4 * first * np.sign(g[big]), rel=0.02), name


@pytest.mark.parametrize("options", [{}, {"layers": 3, "without": "q"}, {"heads": 2}])
def test_stacked_matrices_move_as_mlx_moves_each(options: dict[str, Any]):
    recipe, model = made(learning_rate=0.3, warmup=3, **options)
    schedule = make_schedule(recipe, 0.3)
    ours, theirs = make_optimizer(recipe).optimizers[0], optim.Muon(schedule, weight_decay=0.0)
    named = [(n, w) for n, w in flat(model.parameters()).items() if n.endswith("_proj.weight")]
    weights = expected = tree_unflatten(named)
    rng = np.random.default_rng(5)
    for _ in range(4):
        gradients = tree_map(lambda w: mx.array(rng.standard_normal(w.shape, np.float32)), weights)
        weights = ours.apply_gradients(gradients, weights)
        expected = theirs.apply_gradients(gradients, expected)
    for name, weight in flat(expected).items():
        assert np.allclose(np.array(flat(weights)[name]), np.array(weight), atol=2e-5), name


@pytest.mark.parametrize(
    ("options", "peak"),
    [({"layers": 24}, 0.02), ({"layers": 12, "without": "qp"}, 0.02),
     ({"layers": 24, "norm": "none"}, 0.0066), ({"layers": 12, **OF_STREAM}, 0.01),
     ({"layers": 24, **OF_STREAM}, 0.0066), ({"layers": 6, **OF_STREAM}, 0.0152),
     ({"layers": 12, "without": "qp", **OF_STREAM}, 0.02),
     ({"layers": 24, "without": "p", **OF_STREAM}, 0.0066),
     ({"layers": 12, "head_skip": None, "without": "qp", **OF_STREAM}, 0.005),
     ({"layers": 12, "head_skip": None, **OF_STREAM}, 0.005),
     ({"layers": 24, "learning_rate": 0.3}, 0.3),
     ({"layers": 24, **FORMER}, 0.02), ({"layers": 24, "block": "sas"}, 0.02)],
)  # fmt: skip
def test_the_rate_goes_with_depth_and_wiring(options: dict[str, Any], peak: float):
    recipe = Recipe(**SMALL | options)
    assert recipe.peak == pytest.approx(peak, rel=5e-3)
    rate = make_optimizer(recipe).optimizers[0]
    rate.init({"x_proj": {"weight": mx.zeros((2, 2))}})
    schedule = make_schedule(recipe, recipe.peak)
    rate.apply_gradients(
        {"x_proj": {"weight": mx.ones((2, 2))}}, {"x_proj": {"weight": mx.ones((2, 2))}}
    )
    assert rate.learning_rate.item() == pytest.approx(schedule(mx.array(0)).item())


# What keeps Q removable


@settings(max_examples=40, deadline=None)
@given(
    st.integers(2, 24), st.integers(-8, 8), st.floats(1, 30), st.floats(1e-3, 1e3),
    st.integers(0, 2**32),
)  # fmt: skip
def test_orthogonal_factors(n: int, wider: int, condition: float, scale: float, seed: int):
    """The singular vectors of each of two matrices with all singular values near one."""
    rng = np.random.default_rng(seed)
    m = max(2, n + wider)
    k = min(n, m)
    us, vs = ([np.linalg.qr(rng.standard_normal((size, k)))[0] for _ in "ab"] for size in (n, m))
    values = np.geomspace(1, condition, k)
    stacked = [(scale * (u * values) @ v.T).astype(np.float32) for u, v in zip(us, vs, strict=True)]
    found = np.array(orthogonalize(mx.array(np.stack(stacked))), np.float64)
    for u, v, one in zip(us, vs, found, strict=True):
        factor = u.T @ one @ v
        assert np.allclose(factor, np.diag(np.diag(factor)), atol=1e-3)
        assert np.allclose(u @ factor @ v.T, one, atol=1e-3)
        assert np.diag(factor).min() > 0.65 and np.diag(factor).max() < 1.25


@pytest.mark.parametrize("step", [0, 2, 5, 9])
@pytest.mark.parametrize("pull", [0.3, 1.0])
@pytest.mark.parametrize("others", [OF_STREAM, {"block": "parallel", "tie": False}], ids=str)
def test_queries_are_pulled_towards_their_factor(step: int, pull: float, others: dict[str, Any]):
    """Where others read the stream beside them: K and V, or an FFN."""
    options = others | {"orthogonal_q": pull, "steps": 10, "warmup": 4, "decay": 0.5}
    recipe, model = made(**options)
    rng = np.random.default_rng(3)
    for layer in model.layers:
        layer.self_attn.q_proj.weight = mx.array(rng.standard_normal((16, 16)).astype(np.float32))
    before = weights_of(model)
    pull_queries(model, recipe, mx.array(step))
    rate = formula(step, pull, 10, 4, 0.5)
    for name, after in weights_of(model).items():
        if "q_proj" not in name:
            assert np.array_equal(after, before[name]), name
            continue
        u, values, v = np.linalg.svd(before[name])
        rest = u.T @ (after - (1 - rate) * before[name]) @ v.T
        assert np.allclose(rest, np.diag(np.diag(rest)), atol=1e-3)
        large = values > values[0] / 30
        assert (np.abs(np.diag(rest) / rate - 0.95)[large] < 0.3).all()


@pytest.mark.parametrize(
    ("options", "pulled"),
    [
        ({}, []),  # a tied embedding and an output skip
        ({"output_skip": None}, [0]),  # the head reads the first one's inverse
        ({"skip": "ffn", "tie": False}, [1]),  # an FFN reads it
        ({"block": "parallel", "tie": False}, [0, 1]),
        ({"skip": "both"}, []),
    ],
    ids=str,
)
def test_queries_that_k_and_v_read_are_pulled_where_another_reads_the_stream(
    options: dict[str, Any], pulled: list[int]
):
    recipe, model = made(orthogonal_q=0.5, **options)
    before = weights_of(model)
    for layer in model.layers:
        layer.self_attn.q_proj.weight = layer.self_attn.q_proj.weight * 2
    pull_queries(model, recipe, mx.array(30))
    moved = [
        name
        for name, after in weights_of(model).items()
        if not np.array_equal(after, before[name] * (2 if "q_proj" in name else 1))
    ]
    assert moved == [f"model.layers.{layer}.self_attn.q_proj.weight" for layer in pulled]


@pytest.mark.parametrize(
    "options",
    [{"orthogonal_q": 0.0} | OF_STREAM, {"skip": "both"}, {"norm": "pre"}, {"block": "sas"},
     {"without": "q"} | OF_STREAM, {}],
)  # fmt: skip
def test_other_queries_are_left(options: dict[str, Any]):
    recipe, model = made(**options)
    before = weights_of(model)
    pull_queries(model, recipe, mx.array(10))
    assert all(np.array_equal(w, before[name]) for name, w in weights_of(model).items())


# Recipes as data


def test_the_activations_are_the_networks():
    assert tuple(NETWORK_ACTIVATIONS) == ACTIVATIONS


def test_the_norms_are_the_networks():
    assert NETWORK_NORMS == PROJECTION_NORMS


@pytest.mark.parametrize("norms", ["", "q,x", "q, k", "q,,v"])
def test_norms_that_there_are_not_are_refused_before_any_text_is_read(norms: str):
    with pytest.raises(UserError, match=r"--norms .* choose one of q, k, v, kv, heads, hidden"):
        Recipe(norms=norms)


def test_what_flags_are_made_of_needs_no_mlx():
    """So ``train --help`` and ``heal --help`` are quick."""
    code = (
        "import sys; from mlx_skipless.training import recipe; "
        "print({'mlx', 'mlx_lm', 'transformers', 'numpy', 'matplotlib'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout == "set()\n", done.stderr


def test_a_recipe_goes_through_json():
    recipe = Recipe(**SMALL, gate_offset=None, value_skip=0.5, final_norm=False, block="sas")
    assert read_recipe(json.loads(json.dumps(dataclasses.asdict(recipe)))) == recipe
    assert read_recipe({}) == Recipe()
    assert read_recipe({"learning_rate": 1, "final_norm": None}).learning_rate == 1
    drawn = Recipe(layers=np.int64(4), clip=np.float32(0.5))  # type: ignore[arg-type]
    assert json.loads(json.dumps(dataclasses.asdict(drawn)))["layers"] == 4
    assert read_recipe({"learning_rate": "2e-2"}).learning_rate == 0.02  # as YAML reads 2e-2


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"depth": 3}, "'depth' is no part of a recipe"),
        ({1: 2}, "1 is no part of a recipe"),
        ({"layers": "4"}, "--layers '4': must be a whole number"),
        ({"layers": 4.0}, "--layers 4.0: must be a whole number"),
        ({"layers": True}, "--layers True: must be a whole number"),
        ({"layers": None}, "--layers None: must be a whole number"),
        ({"learning_rate": "fast"}, "--learning-rate 'fast': must be a number"),
        ({"learning_rate": False}, "--learning-rate False: must be a number"),
        ({"gate_offset": "off"}, "--gate-offset 'off': must be a number"),
        ({"heads": 3}, "--heads 3: must divide --hidden-size 256"),
        ({"heads": 256}, "--heads 256: of --hidden-size 256 each gets 1, an odd number"),
        ({"kv_heads": 3}, "--kv-heads 3: must divide --heads 8"),
        ({"kv_heads": 16}, "--kv-heads 16: must divide --heads 8"),
        ({"rope_theta": 0.0}, "--rope-theta 0.0: must be above 0"),
        ({"rope_theta": 1e30}, r"--rope-theta 1e\+30: must be below 1e\+12"),
        ({"without": "kp"}, "--without kp: .* give --kv-heads 8"),
        ({"without": "v", "kv_heads": 4}, "--without v: .* give --kv-heads 8"),
        ({"gate_offset": True}, "--gate-offset True: must be a number"),
        ({"tie": 1}, "--tie 1: must be true or false"),
        ({"final_norm": 0.5}, "--final-norm 0.5: must be true or false"),
        ({"block": 3}, "--block 3: must be text"),
        ({"block": "ring"}, "--block 'ring': choose one of serial, parallel, sas, sas-p"),
        ({"block": "sas", "skip": "both"}, "--skip both: --block sas has --skip ffn of its own"),
        ({"block": "sas-p", "without": "q"}, "--without q: --block sas-p has --without vp"),
        ({"block": "sas", "head_skip": 0.5}, "--head-skip 0.5: .* has --head-skip none of its own"),
        ({"skip": "some"}, "--skip 'some': choose one of none, ffn, both"),
        ({"norm": "post"}, "--norm 'post': choose one of none, qkv, pre"),
        ({"without": "qk"}, "--without 'qk': choose one of q, p"),
        ({"learning_rate": 0.0}, "--learning-rate 0.0: must be above 0"),
        ({"learning_rate": float("nan")}, "--learning-rate nan: must be a number"),
        ({"learning_rate": float("inf")}, "--learning-rate inf: must be a finite number"),
        ({"steps": 10**30}, "--steps 1000.*: must be below 2,147,483,648"),
        ({"adam_learning_rate": -1.0}, "--adam-learning-rate -1.0: must be above 0"),
        ({"clip": 0.0}, "--clip 0.0: must be above 0"),
        ({"temperature": 0.0}, "--temperature 0.0: must be above 0"),
        ({"heads": 0}, "--heads 0: must be at least 1"),
        ({"layers": 0}, "--layers 0: must be at least 1"),
        ({"hidden_size": -16}, "--hidden-size -16: must be at least 1"),
        ({"intermediate_size": 0}, "--intermediate-size 0: must be at least 1"),
        ({"vocab_size": 0}, "--vocab-size 0: must be at least 1"),
        ({"steps": 0}, "--steps 0: must be at least 1"),
        ({"batch_size": 0}, "--batch-size 0: must be at least 1"),
        ({"context": 0}, "--context 0: must be at least 1"),
        ({"warmup": -1}, "--warmup"),
        ({"decay": 1.5}, "--decay"),
        ({"decay": float("nan")}, "--decay nan: must be a number"),
        ({"orthogonal_q": -0.1}, "--orthogonal-q"),
        ({"orthogonal_q": 1.1}, "--orthogonal-q"),
        ({"hidden_act": "sin"}, "--hidden-act 'sin': choose one of silu"),
        ({"seed": -1}, "--seed -1"),
    ],
)
def test_options_that_cannot_be(options: dict[Any, Any], says: str):
    with pytest.raises(UserError, match=says) as refusal:
        read_recipe(options)
    assert "\n" not in str(refusal.value)


def test_none_is_spelt_in_a_file_as_in_a_flag() -> None:
    recipe = read_recipe({"query_skip": "none", "learning_rate": "1e-3", "skip": "none"})
    assert (recipe.query_skip, recipe.learning_rate, recipe.skip) == (None, 1e-3, "none")


def test_sizes_that_fit_no_network():
    with pytest.raises(UserError, match="these sizes make no network: ") as refusal:
        make_model_args(Recipe(hidden_size=2**20))
    assert "\n" not in str(refusal.value)
