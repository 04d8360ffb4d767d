"""Every removal on every kind of block is the same function, against the float64 reference."""

import itertools
import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import reference
import zoo
from exact import TOLERANCE, check_same_function
from factory import ATTENTION_PROJECTIONS, MLP_PROJECTIONS, make_checkpoint, make_llama, write
from grids import pairs, product, thin

import mlx_skipless
from mlx_skipless.checkpoints.safetensors import SafetensorsStore
from mlx_skipless.conversion.convert import convert
from mlx_skipless.removal import changer

HEADS = {"MHA": 4, "GQA": 2, "MQA": 1}
ENDS = {
    "norm": {"final_norm": True, "tie_word_embeddings": False},
    "norm-tied": {"final_norm": True, "tie_word_embeddings": True},
    "bare": {"final_norm": False, "tie_word_embeddings": False},
    "bare-tied": {"final_norm": False, "tie_word_embeddings": True},
}
BIASES = {"plain": (), "biased": (*ATTENTION_PROJECTIONS, *MLP_PROJECTIONS)}
LINEAR_PATHS = ("gate_offset", "value_skip", "attention_gain", "uniform_gain")
REMOVALS = ("qp", "kp", "vp", "q", "k", "v", "p", "auto", "none")
GRID = [
    case
    for case in itertools.product(
        ("serial", "parallel"), ("none", "ffn"), ("none", "qkv"), HEADS, ENDS, BIASES, REMOVALS
    )
    if case[:2] != ("parallel", "ffn")  # the same block as with both skips: nothing can go
]


def possible(block: str, skip: str, heads: str, remove: str) -> bool:
    """DESIGN's table: K and V need MHA; parallel blocks and an FFN skip give up one matrix only."""
    if remove in ("auto", "none"):
        return True
    if set(remove) & {"k", "v"} and heads != "MHA":
        return False
    return len(remove) == 1 or (block, skip) == ("serial", "none")


def has_gains(seed: int) -> bool:
    return seed % 2 == 0


def has_linear_paths(seed: int) -> bool:
    """With every removal."""
    return (seed // len(REMOVALS) + seed) % 3 == 0


def grows(seed: int) -> bool:
    """Whether queries grow with their positions."""
    return (seed // 4 + seed // len(REMOVALS)) % 2 == 0


def shows(case: tuple[str, ...]) -> set[Any]:
    """Each pair of what a case is made of, apart for what can and what cannot be.

    And each three or four of those that stand in each other's way, or meet in one matrix.
    """
    block, skip, norm, heads, ends, bias, remove = case
    if not possible(block, skip, heads, remove):
        return pairs("impossible", block, skip, heads, remove)
    seed = GRID.index(case)
    gains = norm == "qkv" and has_gains(seed)
    together = {(ends, bias, remove), (block, skip, bias, remove), (block, skip, ends, remove)}
    together |= {(gains, heads, remove), (gains, block, remove), (grows(seed), heads, remove)}
    return pairs(*case, gains, has_linear_paths(seed)) | together


def stored_weights(folder: Path) -> int:
    return sum(int(np.prod(shape)) for shape in SafetensorsStore(folder).shapes.values())


def store(folder: Path, weights: dict[str, np.ndarray], dtype: mx.Dtype = mx.float32) -> None:
    arrays = {name: mx.array(w.astype(np.float32)).astype(dtype) for name, w in weights.items()}
    mx.save_safetensors(str(folder / "model.safetensors"), arrays)


@pytest.mark.parametrize("case", thin(GRID, shows, whole=True), ids="-".join)
def test_removal(case: tuple[str, ...], tmp_path: Path) -> None:
    block, skip, norm, heads, ends, bias, remove = case
    seed = GRID.index(case)
    source = make_checkpoint(
        tmp_path / "source",
        seed=seed,
        block=block,
        skip=skip,
        norm=norm,
        gains=has_gains(seed),
        linear_paths=has_linear_paths(seed),
        num_key_value_heads=HEADS[heads],
        bias=BIASES[bias],
        hidden_size=32,
        intermediate_size=48,
        query_growth=0.7 if grows(seed) else 0.0,
        query_step=2,
        **ENDS[ends],
    )
    out = tmp_path / "out"
    if not possible(block, skip, heads, remove):
        with pytest.raises(mlx_skipless.UserError, match="--remove"):
            convert(tmp_path / "source", out, remove=remove, verify=False)
        assert not out.exists()
        return
    report = convert(tmp_path / "source", out, remove=remove, verify=False)
    check_same_function(source, out, seed)

    assert stored_weights(out) == report.params_after
    square = source[0]["hidden_size"] ** 2  # Q, P, and K and V of MHA
    if bias == "plain" and not report.folded:
        gone = sum(len(layers) for layers in report.removed.values())
        assert report.params_before - report.params_after == gone * square
    if remove not in ("auto", "none"):
        assert set(report.removed) == set(remove)
        for layers in report.removed.values():
            assert len(layers) >= source[0]["num_hidden_layers"] - 1
    if (block, skip, remove) == ("serial", "none", "auto") and (ends, bias) != (
        "bare-tied",
        "biased",
    ):
        first = 1 if ends == "norm-tied" else 0
        assert report.removed == {"q": [0, 1, 2][first:], "p": [0, 1, 2]}


@pytest.mark.parametrize(
    ("heads", "head_dim"), thin([*itertools.product(HEADS, [4, 8, 16])], lambda case: case)
)
def test_non_square_p(heads: str, head_dim: int, tmp_path: Path) -> None:
    """P of any shape goes; M's rows follow the heads (Nemo narrows, Gemma-7B widens)."""
    source = make_checkpoint(
        tmp_path / "source",
        seed=head_dim,
        hidden_size=32,
        intermediate_size=48,
        head_dim=head_dim,
        num_key_value_heads=HEADS[heads],
    )
    report = convert(tmp_path / "source", tmp_path / "out", remove="p", verify=False)
    check_same_function(source, tmp_path / "out", head_dim)
    width = 4 * head_dim
    saved = 3 * (width * 32 - 2 * (width - 32) * 48)
    assert report.params_before - report.params_after == saved


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("remove", ["p", "none"])
def test_half_precision_stays_near(dtype: str, remove: str, tmp_path: Path) -> None:
    """Rounding alone is left: the error is that of the number type, not more."""
    source = make_checkpoint(tmp_path / "source", dtype=dtype, norm="qkv", gains=True)
    convert(tmp_path / "source", tmp_path / "out", remove=remove, verify=False)
    model, _ = mlx_skipless.load(tmp_path / "out")
    tokens = np.random.default_rng(0).integers(0, 256, (2, 9))
    got = np.array(model(mx.array(tokens)).astype(mx.float32))
    limit = {"float16": 1e-2, "bfloat16": 8e-2}[dtype]
    assert reference.worst_relative_error(reference.logits(*source, tokens), got) <= limit


@pytest.mark.parametrize(
    ("bias", "steps", "kind", "ends"),
    product(
        [(), ("q_proj", "o_proj")],
        [("q", "auto"), ("p", "auto"), ("auto", "auto"), ("q", "p")],
        [("serial", "none"), ("serial", "ffn"), ("parallel", "none")],
        ENDS,
    ),
    ids=str,
)
def test_converting_twice(
    bias: tuple[str, ...], steps: tuple[str, str], kind: tuple[str, str], ends: str, tmp_path: Path
) -> None:
    """A converted model is a source too: what is gone pins its point, at both ends of a tie."""
    source = make_checkpoint(
        tmp_path / "source", norm="qkv", gains=True, bias=bias,
        block=kind[0], skip=kind[1], **ENDS[ends],
    )  # fmt: skip
    first = convert(tmp_path / "source", tmp_path / "first", remove=steps[0], verify=False)
    try:
        second = convert(tmp_path / "first", tmp_path / "second", remove=steps[1], verify=False)
    except mlx_skipless.UserError:
        assert steps == ("q", "p") and kind != ("serial", "none")
        return
    for letter, layers in second.removed.items():
        assert not set(layers) & set(first.removed.get(letter, []))
    check_same_function(source, tmp_path / "second", 0)


@pytest.mark.parametrize("block", ["serial", "parallel"])
@pytest.mark.parametrize("how", [{"remove": "q"}, {"remove": "none", "fold_norms": True}])
def test_a_model_trained_without_p(how: dict[str, Any], block: str, tmp_path: Path) -> None:
    """The value gain has no P to go into, and stays."""
    config, weights = make_checkpoint(tmp_path / "s", norm="qkv", gains=True, block=block)
    weights = {name: w for name, w in weights.items() if "o_proj" not in name}
    store(tmp_path / "s", weights)
    removed = {"removed": {"p": [0, 1, 2]}}
    (tmp_path / "s/config.json").write_text(json.dumps(config | removed))
    convert(tmp_path / "s", tmp_path / "out", verify=False, **how)
    check_same_function((config, weights), tmp_path / "out", 0)


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("remove", ["none", "q"])
def test_gains_of_projections_fold(
    remove: str, heads: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of the values as their query heads meet them; and embedding and head in parts."""
    monkeypatch.setattr(changer, "ROWS", 25)
    source = make_checkpoint(
        tmp_path / "s", norm="qkv", gains=True, num_key_value_heads=HEADS[heads]
    )
    report = convert(tmp_path / "s", tmp_path / "out", remove=remove, fold_norms=True, verify=False)
    assert {"v", "hidden", "final"} <= {*report.folded}
    check_same_function(source, tmp_path / "out", 0)


@pytest.mark.parametrize("norm", ["none", "pre"])
@pytest.mark.parametrize("gains", ["", "q", "k", "qk"])
def test_norms_of_q_and_k_may_lack_gains(norm: str, gains: str, tmp_path: Path) -> None:
    """They are ones then. Another architecture's checkpoint without them is incomplete."""
    skip = "both" if norm == "pre" else "none"
    config, weights = make_checkpoint(tmp_path / "s", norm=norm, skip=skip, qk_norm=True)
    rng = np.random.default_rng(0)
    for layer, name in itertools.product(range(config["num_hidden_layers"]), gains):
        gain = rng.uniform(0.5, 2, config["head_dim"]).astype(np.float32)
        weights[f"model.layers.{layer}.self_attn.{name}_norm.weight"] = gain
    write(tmp_path / "s", config, weights, "float32", shards=1)
    mlx_skipless.convert(tmp_path / "s", tmp_path / "o", verify=False)
    tokens = np.arange(20)[None] + 5
    found = np.array(mlx_skipless.load(tmp_path / "o")[0](mx.array(tokens)))
    expected = reference.logits(config, weights, tokens)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize("rotary_dim", [4, 8, None])
def test_yarn_scales_the_part_of_a_head_that_it_turns(rotary_dim: int | None, tmp_path: Path):
    rope = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
    source = make_checkpoint(tmp_path / "s", rope_scaling=rope, rotary_dim=rotary_dim)
    convert(tmp_path / "s", tmp_path / "out", remove="qp", verify=False)
    for folder in ("s", "out"):
        check_same_function(source, tmp_path / folder, 0)


def test_a_qwen3_without_its_norms_is_incomplete(tmp_path: Path) -> None:
    zoo.make_model(tmp_path / "s", "qwen3")
    loaded: Any = mx.load(str(tmp_path / "s/model.safetensors"))
    mx.eval(loaded)
    kept = {name: array for name, array in loaded.items() if "q_norm" not in name}
    mx.save_safetensors(str(tmp_path / "s/model.safetensors"), kept, {"format": "mlx"})
    with pytest.raises(mlx_skipless.UserError, match=r"has no tensor .*q_norm"):
        mlx_skipless.convert(tmp_path / "s", tmp_path / "o")


def test_gains_and_paths_of_some_layers(tmp_path: Path) -> None:
    """A layer without a gain or a linear path has a gain of one and no path; loading knows."""
    config, weights = make_checkpoint(tmp_path / "s", norm="qkv", gains=True, linear_paths=True)
    ends = ("q_norm.weight", "hidden_norm.weight", *LINEAR_PATHS)
    weights = {
        name: w for name, w in weights.items() if "layers.1." not in name or not name.endswith(ends)
    }
    store(tmp_path / "s", weights)
    check_same_function((config, weights), tmp_path / "s", 0)
    convert(tmp_path / "s", tmp_path / "out", remove="qp", verify=False)
    check_same_function((config, weights), tmp_path / "out", 0)


def test_paths_beside_a_layer_without_attention(tmp_path: Path) -> None:
    """It has the FFN's path alone."""
    config, weights = make_checkpoint(tmp_path / "s", linear_paths=True)
    weights = {name: w for name, w in weights.items() if "layers.1.self_attn" not in name}
    store(tmp_path / "s", weights)
    config |= {"removed": {"attention": [1]}}
    (tmp_path / "s/config.json").write_text(json.dumps(config))
    convert(tmp_path / "s", tmp_path / "out", remove="qp", verify=False)
    for folder in (tmp_path / "s", tmp_path / "out"):
        check_same_function((config, weights), folder, 0)


@pytest.mark.parametrize("path", LINEAR_PATHS)
def test_one_path_of_one_layer(path: str, tmp_path: Path) -> None:
    """It needs none of the others, and the other layers are as without it."""
    config, weights = make_checkpoint(tmp_path / "s", linear_paths=True)
    kept = f"model.layers.1.{'mlp' if path == 'gate_offset' else 'self_attn'}.{path}"
    weights = {n: w for n, w in weights.items() if n == kept or not n.endswith(LINEAR_PATHS)}
    store(tmp_path / "s", weights)
    convert(tmp_path / "s", tmp_path / "out", remove="qp", verify=False)
    for folder in (tmp_path / "s", tmp_path / "out"):
        check_same_function((config, weights), folder, 0)
    written = json.loads((tmp_path / "out/config.json").read_text())
    assert {name: written[name] for name in LINEAR_PATHS} == {n: n == path for n in LINEAR_PATHS}


@pytest.mark.parametrize("path", LINEAR_PATHS)
def test_an_absent_path_keeps_the_number_type(path: str, tmp_path: Path) -> None:
    """What stands in for it has its type, or all layers behind it would compute in float32."""
    _, weights = make_checkpoint(tmp_path / "s", dtype="bfloat16", linear_paths=True)
    gone = f"model.layers.1.{'mlp' if path == 'gate_offset' else 'self_attn'}.{path}"
    del weights[gone]
    store(tmp_path / "s", weights, mx.bfloat16)
    model, _ = mlx_skipless.load(tmp_path / "s")
    assert model(mx.array([[1, 2, 3]])).dtype == mx.bfloat16


STOCK = {
    "tied by default": ({}, ("tie_word_embeddings",)),
    "new rope key": ({"rope_parameters": {"rope_theta": 333.0}}, ("rope_theta",)),
    "scaled": ({"rope_scaling": {"rope_type": "linear", "factor": 4.0}}, ()),
    "bias without a flag": ({"attention_bias": True}, ("attention_bias",)),
    "window": ({"sliding_window": 5}, ()),
    "activation": ({"hidden_act": "gelu"}, ()),
    "some slide": (
        {"sliding_window": 5, "layer_types": ["sliding_attention", *["full_attention"] * 2]},
        (),
    ),
}


@pytest.mark.parametrize(
    ("case", "model_type"),
    thin(
        [*itertools.product(STOCK, ("llama", "mistral"))],
        lambda x: [x if x[0] in ("window", "some slide") else x[0]],  # which mean another thing
    ),
)
def test_pretrained_results_are_right_in_plain_mlx_lm(
    case: str, model_type: str, tmp_path: Path
) -> None:
    """Where configs are silent mlx-lm has defaults of its own; the result must not lean on them."""
    from mlx_lm import load

    options, silent = STOCK[case]
    make = {"rope_theta": 333.0} if "rope_parameters" in options else options
    config, weights = make_llama(tmp_path / "s", model_type=model_type, **make)
    written = {k: v for k, v in (config | options).items() if k not in silent}
    (tmp_path / "s/config.json").write_text(json.dumps(written))
    report = convert(tmp_path / "s", tmp_path / "out")
    model, _ = load(str(tmp_path / "out"), trust_remote_code=True)
    tokens = np.random.default_rng(0).integers(0, 256, (2, 9))
    expected = reference.logits(reference.llama_config(config), weights, tokens)
    got = np.array(model(mx.array(tokens)))
    assert reference.worst_relative_error(expected, got) <= 1e-5
    own = case == "activation" or (case == "window" and model_type == "mistral")
    assert report.stock != own and (tmp_path / "out/model.py").exists() == own
    assert report.verification is not None and report.verification.max_rel_logit_error <= 1e-5


@pytest.mark.parametrize(
    ("tied", "model_type"),
    thin([*itertools.product([True, False], ["llama", "mistral"])], lambda case: case),
)
def test_folding_norms_is_exact_and_stock(model_type: str, tied: bool, tmp_path: Path) -> None:
    """A pretrained model keeps its architecture, loads without trust, and has gains of one."""
    from mlx_lm import load

    config, weights = make_llama(
        tmp_path / "source", model_type=model_type, tie_word_embeddings=tied, attention_bias=True
    )
    report = convert(tmp_path / "source", tmp_path / "out", fold_norms=True, verify=False)
    assert report.removed == {} and "attention" in report.folded
    model, _ = load(str(tmp_path / "out"))
    assert model.model.layers[0].input_layernorm.weight.tolist() == [1.0] * config["hidden_size"]
    tokens = np.random.default_rng(0).integers(0, 256, (2, 9))
    expected = reference.logits(reference.llama_config(config), weights, tokens)
    got = np.array(model(mx.array(tokens)))
    assert reference.worst_relative_error(expected, got) <= 1e-5


@pytest.mark.parametrize(
    ("remove", "tied", "model_type"),
    product(["qp", "p", "none"], [True, False], ["llama", "mistral"]),
)
def test_skipless_of_a_pretrained_model(
    model_type: str, remove: str, tied: bool, tmp_path: Path
) -> None:
    """Skips and stream norms dropped, gains folded, weightless norms on the projections.

    A window without layer types holds for every layer of Mistral, for none of Llama.
    """
    config, weights = make_llama(
        tmp_path / "source", model_type=model_type, tie_word_embeddings=tied, sliding_window=5
    )
    report = convert(tmp_path / "source", tmp_path / "out", skipless=True, remove=remove)
    stripped = {name: w for name, w in weights.items() if "layernorm" not in name}
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        for norm, names in (
            ("input_layernorm", ("self_attn.q", "self_attn.k", "self_attn.v")),
            ("post_attention_layernorm", ("mlp.gate", "mlp.up")),
        ):
            gain = weights[f"{prefix}.{norm}.weight"]
            for name in names:
                full = f"{prefix}.{name}_proj.weight"
                stripped[full] = weights[full] * gain
    mapped = reference.llama_config(config) | {"skip": "none", "norm": "qkv"}
    check_same_function((mapped, stripped), tmp_path / "out", 0)
    assert any("NOT a language model" in warning for warning in report.warnings)
    assert report.verification is not None
    assert report.verification.max_rel_logit_error <= TOLERANCE
    assert report.params_before == sum(w.size for w in stripped.values())
