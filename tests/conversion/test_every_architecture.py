"""Conversions of a tiny model of each of mlx-lm's architectures that only mlx-lm knows."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from grids import only
from mlx.utils import tree_flatten
from mlx_lm import convert as mlx_lm_convert
from mlx_lm.utils import load
from zoo import CONFIGS, make_model

import mlx_skipless
from mlx_skipless.architectures.wrappers import find_text_type

DROPS = {"drop_attention": 1, "drop_ffn": 1}
NO_FFN = "--drop-ffn 1: its block calls no module that is its ffn"
REFUSED = {
    "deepseek_v41": "--drop-attention 1: its self_attn keeps what only itself can write",
    "iquestloopcoder": "--drop-attention 1: its block calls no module that is its attention",
    "llama4_text": "mlx-lm cannot run the result",
    "mamba": NO_FFN,
    "mamba2": NO_FFN,
    "prism_hadamard_qwen35": "runs in the packing of this source alone",
}
FOREIGN = [
    name
    for name, config in CONFIGS.items()
    if find_text_type({"model_type": name, **config}) is None
]
SHOWN = {"exaone", "falcon_h1", "gemma4_text", "llama4_text"}
CASES = only(SHOWN, sorted({*FOREIGN, *REFUSED, *SHOWN}))


@pytest.mark.parametrize("name", CASES)
def test_it_drops_and_quantizes(name: str, tmp_path: Path) -> None:
    source, out, text = tmp_path / "source", tmp_path / "out", tmp_path / "text.txt"
    make_model(source, name)
    text.write_text("The quick brown fox jumps over the lazy dog. " * 60)
    options = {"quantize": True, "q_group_size": 32, "calibration": text, **DROPS}
    if name in REFUSED:
        with pytest.raises(mlx_skipless.UserError, match=REFUSED[name]):
            mlx_skipless.convert(source, out, **options)
        assert not out.exists()
        return
    report = mlx_skipless.convert(source, out, **options)
    assert {kind: len(layers) for kind, layers in report.removed.items()} == {
        "attention": 1,
        "ffn": 1,
    }
    assert report.cache_bytes_after <= report.cache_bytes_before
    assert report.verification is not None
    assert 1e-4 < report.verification.kl < 5 and math.isfinite(report.verification.perplexity)
    model, _ = load(str(out), trust_remote_code=True)  # type: ignore[misc]
    assert not mx.isnan(model(mx.array([[1, 2, 3]]))).any()


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (
            {"text_config": {"num_hidden_layers": "many"}, "model_type": "qwen3_5"},
            "num_hidden_layers",
        ),
        ({"num_hidden_layers": 10**8, "model_type": "olmo2"}, "num_hidden_layers"),
        ({"model_type": "olmo2"}, "missing 6 required"),
        ({"head_dim": "x", "model_type": "gemma3_text"}, "makes no network"),
        ({"architectures": [{}], "model_type": "qwen3_5"}, "not supported"),
        ({"model_type": "olmo"}, "not supported"),
        ({"model_type": "base"}, "not supported"),
        ({"model_type": "../llama"}, "not supported"),
        ({"model_type": ["olmo2"]}, "not supported"),
    ],
    ids=str,
)
def test_a_config_that_describes_no_network(
    config: dict[str, Any], said: str, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(mlx_skipless.UserError, match=said):
        mlx_skipless.convert(tmp_path, dry_run=True)


def test_infinities_as_transformers_writes_them(tmp_path: Path) -> None:
    """A plan and a result of a config with a tagged number, which is JSON where Infinity is not."""
    tagged = [0.0, {"__float__": "Infinity"}]
    make_model(tmp_path / "s", "mamba2", time_step_limit=[0.0, {"__float__": []}])
    with pytest.raises(mlx_skipless.UserError, match="cannot be loaded"):
        mlx_skipless.convert(tmp_path / "s", dry_run=True)
    shutil.rmtree(tmp_path / "s")
    make_model(tmp_path / "s", "mamba2", time_step_limit=tagged)
    (tmp_path / "plan").mkdir()
    config = (tmp_path / "s/config.json").read_text()
    (tmp_path / "plan/config.json").write_text(config)
    assert mlx_skipless.convert(tmp_path / "plan", dry_run=True).stock
    mlx_skipless.convert(tmp_path / "s", tmp_path / "o", quantize=True, q_group_size=32)
    assert json.loads((tmp_path / "o/config.json").read_text())["time_step_limit"] == tagged
    tokens = mx.array([[3, 1, 4]])
    got = load(str(tmp_path / "o"))[0](tokens)  # type: ignore[operator]
    assert bool(mx.isfinite(got).all())


@pytest.mark.parametrize(
    ("layers", "drops", "said"),
    [
        (1, {"drop_attention": 1}, "has one layer"),
        (1, {"drop_block": "auto"}, "has one layer"),
        (4, {"drop_attention": 4}, "1 to 3 can lose theirs"),
        (4, {"drop_block": 3, "drop_attention": 2}, "3 can lose their attention"),
        (4, {"drop_block": 2, "drop_attention": 2}, "3 can lose their attention"),
        (4, {"drop_block": 1, "drop_ffn": 3}, "3 can lose their ffn"),
    ],
)
def test_more_than_there_is(layers: int, drops: Any, said: str, tmp_path: Path) -> None:
    make_model(tmp_path / "s", "olmo2", num_hidden_layers=layers)
    with pytest.raises(mlx_skipless.UserError, match=said):
        mlx_skipless.convert(tmp_path / "s", tmp_path / "o", **drops)
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize("name", ["gpt_oss", "olmo3"])
def test_a_window_of_no_tokens(name: str, tmp_path: Path) -> None:
    make_model(tmp_path / "s", name)
    config = json.loads((tmp_path / "s/config.json").read_text()) | {"sliding_window": 0}
    (tmp_path / "s/config.json").write_text(json.dumps(config))
    with pytest.raises(mlx_skipless.UserError, match="is 0, and nothing can be seen in that"):
        mlx_skipless.convert(tmp_path / "s", tmp_path / "o")


@pytest.mark.parametrize("plan", [False, True])
def test_matrices_that_no_group_divides_are_told_of(plan: bool, tmp_path: Path) -> None:
    make_model(tmp_path / "s", "olmo2", num_hidden_layers=2, intermediate_size=96)
    asked: dict[str, Any] = {"quantize": True, "dry_run": plan, "verify": False}
    report = mlx_skipless.convert(tmp_path / "s", tmp_path / "o", **asked)
    told = [note for note in report.notes if "matrices stay" in note]
    assert told == [
        "2 of 16 matrices stay in float32, mlp.down_proj (96 inputs) of layers 0-1: groups of 64 "
        "do not divide 96 inputs (--q-group-size 32 does)"
    ]
    report = mlx_skipless.convert(tmp_path / "s", tmp_path / "p", q_group_size=32, **asked)
    assert not any("matrices stay" in note for note in report.notes)


def test_a_plan_says_what_will_go(tmp_path: Path) -> None:
    make_model(tmp_path, "olmo2")
    report = mlx_skipless.convert(tmp_path, dry_run=True, drop_attention=2)
    block = load(str(tmp_path))[0].layers[0]  # type: ignore[attr-defined]
    matrices = sum(array.size for _, array in tree_flatten(block.self_attn.parameters()))
    assert f"2 x attention, {2 * matrices:,} weights or more" in report.notes[-1]
    assert not report.stock and mlx_skipless.convert(tmp_path, dry_run=True, drop_block=1).stock


def test_only_weights_are_analysed(tmp_path: Path) -> None:
    """Not random ones in the place of a file that is none of safetensors."""
    make_model(tmp_path, "olmo2")
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(mlx_skipless.UserError, match="no weights in safetensors"):
        mlx_skipless.analyze(tmp_path)


@pytest.mark.parametrize("name", ["deepseek_v3", "afm7"])
def test_a_packed_source_is_dequantized_whole(name: str, tmp_path: Path) -> None:
    """Modules that mlx-lm's ``dequantize_model`` leaves packed or takes for others, too."""
    make_model(tmp_path / "dense", name)
    source, out, text = tmp_path / "source", tmp_path / "out", tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 60)

    def choose(path: str, module: Any, *config: Any) -> bool | dict[str, int]:
        if not hasattr(module, "to_quantized") or module.weight.shape[-1] % 32:
            return False
        return {"group_size": 32, "bits": 8 if "down_proj" in path else 4}

    mlx_lm_convert(
        str(tmp_path / "dense"), str(source), quantize=True, q_group_size=32, q_bits=4,
        quant_predicate=choose,
    )  # fmt: skip
    tokens = mx.arange(20)[None] + 5
    packed = load(str(source))[0]
    paths = {path for path, module in packed.named_modules() if "scales" in module}

    def run(**options: Any) -> dict[str, Any]:
        shutil.rmtree(out, ignore_errors=True)
        mlx_skipless.convert(source, out, **options)
        return dict(load(str(out))[0].named_modules())

    modules = run(dtype="float32")
    assert not [path for path, module in modules.items() if "scales" in module]
    expected, found = packed(tokens), modules[""](tokens)
    assert mx.allclose(found, expected, rtol=0, atol=1e-3 * mx.abs(expected).max().item()).item()
    fitted = {"calibration": text} | ({"distill": 1} if name == "afm7" else {})
    for options in ({}, fitted):
        modules = run(quantize=True, q_bits=6, q_group_size=32, **options)
        bits = {path: module.bits for path, module in modules.items() if "scales" in module}
        kept = {path for path in paths if "qkv_proj" in path}  # of afm7, fused
        assert bits.keys() == paths - kept and {*bits.values()} <= {6, 8}  # a router's
        assert min(bits.values()) == 6
