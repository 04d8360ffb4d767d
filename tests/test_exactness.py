"""Every removal on every kind of block is the same function, against the float64 reference."""

import itertools
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import reference
from factory import ATTENTION_PROJECTIONS, MLP_PROJECTIONS, make_checkpoint, make_llama

import mlx_skipless
from mlx_skipless.checkpoint import SafetensorsStore
from mlx_skipless.conversion import convert

TOLERANCE = 5e-4  # worst token's relative logit error, float32
HEADS = {"MHA": 4, "GQA": 2, "MQA": 1}
ENDS = {
    "norm": {"final_norm": True, "tie_word_embeddings": False},
    "norm-tied": {"final_norm": True, "tie_word_embeddings": True},
    "bare": {"final_norm": False, "tie_word_embeddings": False},
    "bare-tied": {"final_norm": False, "tie_word_embeddings": True},
}
BIASES = {"plain": (), "biased": (*ATTENTION_PROJECTIONS, *MLP_PROJECTIONS)}
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


def check_same_function(
    source: tuple[dict[str, Any], dict[str, np.ndarray]], folder: Path, seed: int
) -> None:
    """A converted folder, prompt in one go and token by token, against the source in float64."""
    model, _ = mlx_skipless.load(folder)
    config, _ = source
    tokens = np.random.default_rng(seed).integers(0, config["vocab_size"], (2, 9))
    expected = reference.logits(*source, tokens)
    at_once = model(mx.array(tokens))
    assert reference.worst_relative_error(expected, np.array(at_once)) <= TOLERANCE
    cache = model.make_cache()
    steps = [model(mx.array(tokens[:, i : i + 1]), cache) for i in range(tokens.shape[1])]
    stepwise = np.array(mx.concatenate(steps, axis=1))
    assert reference.worst_relative_error(expected, stepwise) <= TOLERANCE


def stored_weights(folder: Path) -> int:
    return sum(int(np.prod(shape)) for shape in SafetensorsStore(folder).shapes.values())


@pytest.mark.parametrize("case", GRID, ids="-".join)
def test_removal(case: tuple[str, ...], tmp_path: Path) -> None:
    block, skip, norm, heads, ends, bias, remove = case
    seed = GRID.index(case)
    source = make_checkpoint(
        tmp_path / "source",
        seed=seed,
        block=block,
        skip=skip,
        norm=norm,
        gains=seed % 2 == 0,
        linear_paths=seed % 3 == 0,
        num_key_value_heads=HEADS[heads],
        bias=BIASES[bias],
        hidden_size=32,
        intermediate_size=48,
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


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("head_dim", [4, 8, 16])
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


def test_converting_twice(tmp_path: Path) -> None:
    """A converted model is a source too: Q goes first, P in a second run."""
    source = make_checkpoint(tmp_path / "source", norm="qkv", gains=True, bias=("q_proj", "o_proj"))
    convert(tmp_path / "source", tmp_path / "q", remove="q", verify=False)
    report = convert(tmp_path / "q", tmp_path / "qp", remove="p", verify=False)
    assert report.removed == {"p": [0, 1, 2]}
    check_same_function(source, tmp_path / "qp", 0)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("model_type", ["llama", "mistral"])
def test_folding_norms_is_exact_and_stock(model_type: str, tied: bool, tmp_path: Path) -> None:
    """A pretrained model keeps its architecture, loads without trust, and has gains of one."""
    from mlx_lm import load

    config, weights = make_llama(
        tmp_path / "source", model_type=model_type, tie_word_embeddings=tied, attention_bias=True
    )
    report = convert(tmp_path / "source", tmp_path / "out", verify=False)
    assert report.removed == {} and "attention" in report.folded
    model, _ = load(str(tmp_path / "out"))
    assert model.model.layers[0].input_layernorm.weight.tolist() == [1.0] * config["hidden_size"]
    tokens = np.random.default_rng(0).integers(0, 256, (2, 9))
    expected = reference.logits(reference.llama_config(config), weights, tokens)
    got = np.array(model(mx.array(tokens)))
    assert reference.worst_relative_error(expected, got) <= 1e-5


@pytest.mark.parametrize("remove", ["qp", "p", "none"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("model_type", ["llama", "mistral"])
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
