"""Matrices that read the same, in one: written so, read back, and the same function."""

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import numpy as np
import pytest
import reference
from factory import make_checkpoint, make_llama, stored
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import quantize_model

import mlx_skipless
from mlx_skipless.architectures.config import read_model_args
from mlx_skipless.checkpoints.checkpoint import open_checkpoint
from mlx_skipless.network.model import FUSED, Model
from mlx_skipless.network.parts import tensors_of

TOKENS = np.random.default_rng(0).integers(0, 256, (2, 11))
EVERYWHERE, BEHIND_FIRST = [0, 1, 2], [1, 2]
MHA = {"num_key_value_heads": 4}


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


def names(folder: Path) -> list[str]:
    return list(mx.load(str(folder / "model.safetensors")))  # type: ignore[arg-type]


def run(folder: Path) -> np.ndarray:
    """Logits of mlx-lm, prompt at once; token by token they are the same."""
    model, _ = mlx_lm.load(str(folder), trust_remote_code=True)  # type: ignore[misc]
    cache: list[Any] = make_prompt_cache(model)
    steps = [model(mx.array(TOKENS[:, i : i + 1]), cache=cache) for i in range(TOKENS.shape[1])]
    at_once = np.array(model(mx.array(TOKENS)))
    assert reference.worst_relative_error(at_once, np.array(mx.concatenate(steps, 1))) < 1e-4
    return at_once


CASES: list[tuple[dict[str, Any], str, dict[str, list[int]]]] = [
    ({}, "none", {"qkv_proj": EVERYWHERE, "gate_up_proj": EVERYWHERE}),
    ({}, "qp", {"kv_proj": EVERYWHERE, "gate_up_proj": EVERYWHERE}),
    ({"block": "parallel"}, "q", {"kv_proj": EVERYWHERE, "gate_up_proj": EVERYWHERE}),
    ({"num_key_value_heads": 1, "skips": ("head",)}, "p",
     {"qkv_proj": EVERYWHERE, "gate_up_proj": EVERYWHERE}),
    (MHA | {"skips": ("query", "head", "output")}, "kp",
     {"qv_proj": EVERYWHERE, "gate_up_proj": EVERYWHERE}),
    (MHA, "v", {"qk_proj": EVERYWHERE, "gate_up_proj": EVERYWHERE}),
    ({"tie_word_embeddings": True}, "q",
     {"qkv_proj": [0], "kv_proj": BEHIND_FIRST, "gate_up_proj": EVERYWHERE}),
    ({"bias": ("q_proj", "k_proj", "v_proj"), "skips": ("query",), "per_channel": True}, "none",
     {"qkv_proj": EVERYWHERE, "gate_up_proj": EVERYWHERE}),
    ({"bias": ("k_proj", "up_proj")}, "none", {}),
]  # fmt: skip


@pytest.mark.parametrize("norm", ["none", "qkv"])
@pytest.mark.parametrize(("changes", "remove", "fused"), CASES, ids=str)
def test_what_is_fused(
    changes: dict[str, Any], remove: str, fused: dict[str, list[int]], norm: str, tmp_path: Path
) -> None:
    """One matrix for all that a layer has of them, if they have biases all or none."""
    source = make_checkpoint(tmp_path / "s", norm=norm, **changes)
    report = mlx_skipless.convert(tmp_path / "s", tmp_path / "o", remove=remove, verify=False)
    assert config_of(tmp_path / "o")["fused"] == fused
    for name in names(tmp_path / "o"):
        part = name.split(".")[-2]
        layer = int(name.split(".")[2]) if ".layers." in name else None
        for whole, layers in fused.items():
            assert (part in FUSED[whole] and layer in layers) is False, name
    assert sum(array.size for array in stored(tmp_path / "o").values()) == report.params_after
    assert reference.worst_relative_error(
        reference.logits(*source, TOKENS), run(tmp_path / "o")
    ) < (5e-4)


@pytest.mark.parametrize("remove", ["none", "qp"])
def test_q_stays_apart_where_k_and_v_read_the_queries(remove: str, tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "s", norm="qkv", norms=["q", "kv"], gains=True)
    mlx_skipless.convert(tmp_path / "s", tmp_path / "o", remove=remove, verify=False)
    assert config_of(tmp_path / "o")["fused"] == {
        "kv_proj": EVERYWHERE, "gate_up_proj": EVERYWHERE
    }  # fmt: skip
    expected = reference.logits(*source, TOKENS)
    assert reference.worst_relative_error(expected, run(tmp_path / "o")) < 5e-4


@pytest.mark.parametrize("changes", [{}, MHA, {"bias": ("q_proj", "k_proj", "v_proj")}], ids=str)
def test_read_back(changes: dict[str, Any], tmp_path: Path) -> None:
    """As a source it has the matrices that it was made of, and none is called fused."""
    make_checkpoint(tmp_path / "s", norm="qkv", **changes)
    mlx_skipless.convert(tmp_path / "s", tmp_path / "o", remove="none", verify=False)
    source, again = open_checkpoint(tmp_path / "s"), open_checkpoint(tmp_path / "o")
    assert again.args.fused == {} and again.args.biases == source.args.biases
    expected = tensors_of(Model(source.args)).keys()
    before, after = source.read(expected), again.read(expected)
    assert before.keys() == after.keys() == expected
    for name, array in before.items():
        assert mx.array_equal(array, after[name]).item(), name
    mlx_skipless.convert(tmp_path / "o", tmp_path / "p", remove="qp", verify=False)
    mlx_skipless.convert(tmp_path / "s", tmp_path / "q", remove="qp", verify=False)
    twice, once = stored(tmp_path / "p"), stored(tmp_path / "q")
    assert twice.keys() == once.keys()
    assert all(mx.array_equal(twice[name], array).item() for name, array in once.items())


@pytest.mark.parametrize("mode", ["affine", "mxfp4"])
def test_packed_rows_are_the_same(mode: str, tmp_path: Path) -> None:
    """Quantizing before fusing or behind it is the same, and bytes stay as planned."""
    make_checkpoint(tmp_path / "s", norm="qkv")
    bits = 4
    options: dict[str, Any] = {"quantize": True, "q_bits": bits, "q_mode": mode, "q_group_size": 32}
    report = mlx_skipless.convert(
        tmp_path / "s", tmp_path / "o", remove="none", verify=False, **options
    )
    mlx_skipless.convert(tmp_path / "s", tmp_path / "f", remove="none", verify=False)
    model, _ = mlx_skipless.load(tmp_path / "f")
    model, _ = quantize_model(model, {}, 32, bits, mode=mode)
    theirs = tensors_of(model)
    ours: Any = mx.load(str(tmp_path / "o/model.safetensors"))
    assert ours.keys() == theirs.keys()
    for name, array in ours.items():
        assert mx.array_equal(array, theirs[name]).item(), name
    assert sum(array.nbytes for array in ours.values()) == report.bytes_after


def test_bits_of_their_own_keep_matrices_apart(tmp_path: Path) -> None:
    """What is packed otherwise than its neighbour stays by itself; the rest is in one."""
    make_llama(tmp_path / "s", head_dim=32, num_key_value_heads=4)
    model, tokenizer = mlx_lm.load(str(tmp_path / "s"))  # type: ignore[misc]

    def own(where: str, _: nn.Module) -> bool | dict[str, Any]:
        odd = "layers.1." in where and ("gate" in where or "k_proj" in where)
        odd |= "layers.2.mlp" in where
        return {"group_size": 32, "bits": 8, "mode": "affine"} if odd else True

    model, config = quantize_model(model, config_of(tmp_path / "s"), 32, 4, quant_predicate=own)
    mlx_lm.utils.save(tmp_path / "q", tmp_path / "s", model, tokenizer, config)
    report = mlx_skipless.convert(
        tmp_path / "q", tmp_path / "o", drop_attention=1, precompute_first_layer="force"
    )
    assert report.kept_packed and not report.stock
    left = [i for i in EVERYWHERE if i not in report.removed["attention"]]
    written = config_of(tmp_path / "o")
    assert written["fused"] == {
        whole: layers
        for whole, layers in (
            ("qkv_proj", [i for i in left if i not in (0, 1)]), ("gate_up_proj", [0, 2]),
        )
        if layers
    }  # fmt: skip
    assert written["quantization"]["model.layers.1.mlp.gate_proj"]["bits"] == 8
    assert written["quantization"]["model.layers.2.mlp.gate_up_proj"]["bits"] == 8
    source, result = stored(tmp_path / "q"), stored(tmp_path / "o")
    for name in result.keys() & source.keys():
        if "embed" not in name:
            assert mx.array_equal(result[name], source[name]).item(), name
    run(tmp_path / "o")


@pytest.mark.parametrize(
    ("fused", "complaint"),
    [
        ({"vk_proj": [0]}, '"fused"'),
        ({"kv_proj": [7]}, '"fused"'),
        (["kv_proj"], '"fused"'),
        ({"kv_proj": [0, 1, 2]}, "cannot be loaded"),
    ],
    ids=str,
)
def test_what_config_says_is_checked(fused: Any, complaint: str, tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "s", norm="qkv")
    mlx_skipless.convert(tmp_path / "s", tmp_path / "o", remove="none", verify=False)
    config = config_of(tmp_path / "o") | {"fused": fused}
    (tmp_path / "o/config.json").write_text(json.dumps(config))
    with pytest.raises(mlx_skipless.UserError, match=complaint):
        mlx_skipless.load(tmp_path / "o")
    if complaint == '"fused"':
        with pytest.raises(mlx_skipless.UserError, match=complaint):
            read_model_args(config)


def test_a_fused_matrix_of_another_height(tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "s", norm="qkv")
    mlx_skipless.convert(tmp_path / "s", tmp_path / "o", remove="qp", verify=False)
    arrays: Any = mx.load(str(tmp_path / "o/model.safetensors"))
    name = "model.layers.1.self_attn.kv_proj.weight"
    arrays[name] = mx.concatenate([arrays[name], arrays[name][:2]])
    mx.eval(arrays)
    mx.save_safetensors(str(tmp_path / "o/model.safetensors"), arrays)
    with pytest.raises(mlx_skipless.UserError, match=r"from model.layers.1.self_attn.kv_proj"):
        mlx_skipless.convert(tmp_path / "o", tmp_path / "p")
