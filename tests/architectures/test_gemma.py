"""Gemma: gains stored less one, a scaled and tied embedding, a GELU of its own."""

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
import reference
from architectures import logits, text
from factory import make_gemma, stored
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import quantize_model
from reference import Weights

import mlx_skipless
from mlx_skipless.conversion.convert import convert
from mlx_skipless.evaluation import analysis
from mlx_skipless.text import samples

SIZES: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3}
SHAPES: list[dict[str, Any]] = [
    {},
    {"num_key_value_heads": 4, "head_dim": 16, "hidden_activation": "gelu_pytorch_tanh"},
]


@pytest.fixture(autouse=True)
def less_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(samples, "CALIBRATION", (16, 16))
    monkeypatch.setattr(samples, "LONG_CHECK", (4, 32))


def gains_of(weights: Any) -> list[str]:
    return [name for name in weights if "norm" in name]


def without(weights: Weights, dropped: dict[str, Any]) -> Weights:
    module = {"attention": "self_attn", "ffn": "mlp"}
    gone = [f"layers.{i}.{module[part]}." for part, layers in dropped.items() for i in layers]
    return {name: w for name, w in weights.items() if not any(g in name for g in gone)}


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_folding_keeps_gemma(shape: dict[str, Any], dtype: str, tmp_path: Path) -> None:
    """Folded gains are written as zeros; the tied head's final one stays as it was."""
    make_gemma(tmp_path / "s", dtype=dtype, **SIZES | shape)
    report = convert(tmp_path / "s", tmp_path / "o", fold_norms=True)
    assert report.stock and set(report.folded) == {"attention", "ffn"}
    source, result = stored(tmp_path / "s"), stored(tmp_path / "o")
    assert {k: (a.shape, a.dtype) for k, a in source.items()} == {
        k: (a.shape, a.dtype) for k, a in result.items()
    }
    for name in gains_of(result):
        final = name == "model.norm.weight"
        expected = source[name] if final else mx.zeros_like(source[name])
        assert mx.allclose(result[name], expected, atol=1e-7, rtol=0).item()
    before, after = (logits(tmp_path / name, text()) for name in "so")
    limit = 1e-5 if dtype == "float32" else 0.05
    assert reference.worst_relative_error(before, after) < limit
    assert report.verification is not None and report.verification.kl < 1e-3


@pytest.mark.parametrize("remove", ["auto", "none"])
def test_nothing_asked_nothing_changed(remove: str, tmp_path: Path) -> None:
    make_gemma(tmp_path / "s", **SIZES)
    convert(tmp_path / "s", tmp_path / "o", remove=remove)
    source, result = stored(tmp_path / "s"), stored(tmp_path / "o")
    for name, array in source.items():
        assert mx.allclose(result[name], array, atol=1e-7, rtol=0).item(), name


OURS: list[dict[str, Any]] = [
    {"drop_attention": 1},
    {"drop_ffn": 1, "fold_norms": True, "remove": "none"},
    {"precompute_first_layer": "force"},
    {"precompute_first_layer": "force", "drop_attention": 1, "remove": "none"},
]


@pytest.mark.parametrize("options", OURS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_our_network_is_gemma(
    options: dict[str, Any], shape: dict[str, Any], tmp_path: Path
) -> None:
    """Where mlx-lm's own architecture cannot be kept; with and without a cache."""
    config, weights = make_gemma(tmp_path / "s", **SIZES | shape)
    report = convert(tmp_path / "s", tmp_path / "o", **options)
    assert not report.stock
    tokens = text()
    expected = reference.logits(config, without(weights, report.removed), tokens)
    assert reference.worst_relative_error(expected, logits(tmp_path / "o", tokens)) < 1e-5
    model, _ = mlx_skipless.load(tmp_path / "o")
    cache: list[Any] = make_prompt_cache(model)
    steps = [model(mx.array(tokens[:, i : i + 1]), cache=cache) for i in range(tokens.shape[1])]
    assert reference.worst_relative_error(expected, np.array(mx.concatenate(steps, axis=1))) < 1e-5
    assert report.verification is not None
    if not report.removed:
        assert report.verification.kl < 1e-10
    # And it is a source again.
    report = convert(tmp_path / "o", tmp_path / "p", remove="none")
    assert reference.worst_relative_error(expected, logits(tmp_path / "p", tokens)) < 1e-5


def test_a_packed_source_gets_a_table_of_scaled_rows(tmp_path: Path) -> None:
    make_gemma(tmp_path / "f", **SIZES)
    convert(tmp_path / "f", tmp_path / "s", quantize=True, q_bits=8, q_group_size=32, verify=False)
    report = convert(tmp_path / "s", tmp_path / "o", precompute_first_layer="force")
    assert report.kept_packed and report.verification is not None
    assert report.verification.kl < 1e-4


@pytest.mark.parametrize("options", [{"drop_attention": 1}, {"precompute_first_layer": "auto"}])
def test_a_packed_source(options: dict[str, Any], tmp_path: Path) -> None:
    """Packed tensors bit for bit; gains whole in our network, as they were in mlx-lm's."""
    make_gemma(tmp_path / "f", vocab_size=4096, **SIZES)
    model, tokenizer = mlx_lm.load(str(tmp_path / "f"))  # type: ignore[misc]
    config = json.loads((tmp_path / "f/config.json").read_text())
    model, config = quantize_model(model, config, 32, 8)
    mlx_lm.utils.save(tmp_path / "s", tmp_path / "f", model, tokenizer, config)
    report = convert(tmp_path / "s", tmp_path / "o", **options)
    assert report.kept_packed
    source, result = stored(tmp_path / "s"), stored(tmp_path / "o")
    assert report.stock == (not report.removed)
    for name, array in result.items():
        offset = 1 if "norm" in name and not report.stock else 0
        assert array.dtype == source[name].dtype
        assert mx.array_equal(array, source[name] + offset if offset else source[name]).item()
    assert sum(array.nbytes for array in result.values()) == report.bytes_after
    before, _ = mlx_lm.load(str(tmp_path / "s"))  # type: ignore[misc]
    for layer in report.removed.get("attention", []):
        before.model.layers[layer].self_attn.o_proj.scales *= 0
        before.model.layers[layer].self_attn.o_proj.biases *= 0
    wanted = np.array(before(mx.array(text())))
    # mlx-lm's gemma has the exact GELU, the other its tanh form.
    assert reference.softmax_kl(wanted, logits(tmp_path / "o", text())) < 1e-5


@pytest.mark.parametrize("calibrated", [False, True])
def test_quantized(calibrated: bool, tmp_path: Path) -> None:
    config, weights = make_gemma(tmp_path / "s", **SIZES)
    (tmp_path / "t.txt").write_text("once upon a time there was a king " * 200)
    options: dict[str, Any] = {"calibration": tmp_path / "t.txt"} if calibrated else {}
    bits = 4 if calibrated else 8
    report = convert(
        tmp_path / "s", tmp_path / "o", quantize=True, q_bits=bits, q_group_size=32, **options
    )
    check = report.verification
    assert report.stock and check is not None and check.kl_ratio is not None
    if calibrated:
        assert check.kl_ratio < 1
    else:
        assert check.kl < 2e-3
        expected = reference.logits(config, weights, text())
        assert reference.softmax_kl(expected, logits(tmp_path / "o", text())) < 2e-3


def test_its_skipless_network(tmp_path: Path) -> None:
    """The scale stays where it is when Q goes: it commutes with a change of basis."""
    config, weights = make_gemma(
        tmp_path / "s", **SIZES | {"num_key_value_heads": 4, "head_dim": 16}
    )
    for name, options in (("n", {"remove": "none"}), ("qp", {"remove": "qp"})):
        convert(tmp_path / "s", tmp_path / name, skipless=True, **options)  # type: ignore[arg-type]
    without_norms = {n: w for n, w in weights.items() if "layernorm" not in n}
    for layer in range(3):
        for norm, matrices in (
            ("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
            ("post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj")),
        ):
            gain = weights[f"model.layers.{layer}.{norm}.weight"]
            for matrix in matrices:
                without_norms[f"model.layers.{layer}.{matrix}.weight"] = (
                    weights[f"model.layers.{layer}.{matrix}.weight"] * gain
                )
    expected = reference.logits(config | {"skip": "none", "norm": "qkv"}, without_norms, text())
    for name, limit in (("n", 1e-5), ("qp", 1e-4)):
        assert reference.worst_relative_error(expected, logits(tmp_path / name, text())) < limit


def test_a_widening_q(tmp_path: Path) -> None:
    """Gemma-7B's: 16 heads of 256 in a stream of 3,072."""
    make_gemma(tmp_path / "s", **SIZES | {"head_dim": 32})
    with pytest.raises(mlx_skipless.UserError, match="Q widens the stream from 64 to 128"):
        convert(tmp_path / "s", tmp_path / "o", skipless=True, remove="q")


def test_a_config_alone_is_tied(tmp_path: Path) -> None:
    make_gemma(tmp_path / "s", **SIZES)
    found = analysis.analyze(tmp_path / "s/config.json")
    assert found.parts["head"] == 0
    assert found.weights == sum(array.size for array in stored(tmp_path / "s").values())


def test_importance_sees_the_scaled_stream(tmp_path: Path) -> None:
    config, weights = make_gemma(tmp_path / "s", **SIZES)
    (tmp_path / "t.txt").write_text("once upon a time there was a goose. " * 6)
    found = analysis.analyze(tmp_path / "s", calibration=tmp_path / "t.txt")
    _, tokenizer = mlx_skipless.load(tmp_path / "s")
    ids = tokenizer.encode((tmp_path / "t.txt").read_text())
    step = len(ids) // 8
    rows = np.array([ids[i * step : (i + 1) * step] for i in range(8)])
    x = weights["model.embed_tokens.weight"][rows] * config["embedding_scale"]
    a = x + reference.attention(config, weights, 0, x)
    cosine = (x * a).sum(-1) / np.linalg.norm(x, axis=-1) / np.linalg.norm(a, axis=-1)
    assert found.layers[0].importance is not None
    assert found.layers[0].importance["attention"] == pytest.approx(1 - cosine.mean(), rel=2e-3)
    assert found.drops is not None
    full = reference.logits(config, weights, rows[::2])[:, :-1]
    log_p = full - np.log(np.exp(full).sum(-1, keepdims=True))
    loss = -np.take_along_axis(log_p, rows[::2, 1:, None], axis=-1).mean()
    assert found.drops[0].loss == pytest.approx(loss, rel=1e-4)
