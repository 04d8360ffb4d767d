"""Checkpoints of LLM-Drop, whose config.json lists the layers without attention or FFN.

Its key is explained in its README (https://github.com/CASE-Lab-UMD/LLM-Drop): numbers of layers in
any order; its configs keep a flag for each layer.
"""

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import reference
from architectures import without
from factory import make_llama, stored
from grids import only, product
from mlx_lm.utils import load_model
from reference import Config, Weights

import mlx_skipless
from mlx_skipless.errors import UserError

TOKENS = np.random.default_rng(1).integers(3, 60, (1, 12))
# Attentions and FFNs that are gone, by layer, and whether plain mlx-lm can run what is left.
DROPS: list[tuple[list[int], list[int], int]] = [([3, 1], [], 4), ([], [2], 4), ([2], [1, 2], 4),
                                                 ([2, 0], [0, 2], 2)]  # fmt: skip


def make(
    folder: Path, kind: str, attention: list[int], ffn: list[int], *, flags: bool, whole: bool
) -> tuple[Config, Weights]:
    """Write a checkpoint of theirs; return its config and what is left of its weights."""
    config, weights = make_llama(folder, model_type=kind, num_hidden_layers=4,
                                 intermediate_size=256)  # fmt: skip
    path = folder / "config.json"
    written = json.loads(path.read_text())
    for key, gone in (("drop_attn_list", attention), ("drop_mlp_list", ffn)):
        written[key] = [layer in gone for layer in range(4)] if flags else gone
    written["auto_map"] = {"AutoConfig": f"configuration_dropped_{kind}.Config"}
    path.write_text(json.dumps(written))
    parts = {"self_attn": attention, "input_layernorm": attention, "mlp": ffn,
             "post_attention_layernorm": ffn}  # fmt: skip
    gone = [f"layers.{i}.{part}." for part, layers in parts.items() for i in layers]
    if not whole:
        kept = {k: a for k, a in stored(folder).items() if not any(g in k for g in gone)}
        mx.eval(kept)
        for file in folder.glob("*.safetensors*"):
            file.unlink()
        mx.save_safetensors(str(folder / "model.safetensors"), kept)
    return config, without(weights, {"attention": attention, "ffn": ffn})


def check(model: nn.Module, config: Config, weights: Weights) -> None:
    expected = reference.logits(reference.llama_config(config), weights, TOKENS)
    assert reference.worst_relative_error(expected, np.array(model(mx.array(TOKENS)))) < 1e-5


@pytest.mark.parametrize(
    ("kind", "drops", "flags", "whole"),
    product(["llama", "mistral"], DROPS, [False, True], [False, True]),
)
def test_what_is_dropped(
    kind: str, drops: tuple[list[int], list[int], int], flags: bool, whole: bool, tmp_path: Path
) -> None:
    """The result is the network without these, and stock; their weights may be there or not."""
    attention, ffn, layers = drops
    config, weights = make(tmp_path / "s", kind, attention, ffn, flags=flags, whole=whole)
    report = mlx_skipless.convert(tmp_path / "s", tmp_path / "o")
    result, written = load_model(tmp_path / "o")
    check(result, config, weights)
    assert report.stock and len(result.layers) == layers
    assert not written.keys() & {"drop_attn_list", "drop_mlp_list", "auto_map", "model_file"}
    assert report.params_after == sum(array.size for array in stored(tmp_path / "o").values())


def test_more_can_go(tmp_path: Path) -> None:
    """And a result may be quantized, or carry its network."""
    config, weights = make(tmp_path / "s", "llama", [1], [], flags=False, whole=False)
    report = mlx_skipless.convert(tmp_path / "s", tmp_path / "o", drop_ffn=1, fold_norms=True)
    result, _ = mlx_skipless.load(tmp_path / "o")
    check(result, config, without(weights, report.removed))


@pytest.mark.parametrize(
    "value",
    only(["3", [True, False]], ["3", [4], [-1], [True, False], [0.5], {"0": True}]),
    ids=str,
)
def test_lists_that_cannot_be(value: Any, tmp_path: Path) -> None:
    make(tmp_path / "s", "llama", [], [], flags=False, whole=True)
    path = tmp_path / "s/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"drop_attn_list": value}))
    with pytest.raises(UserError, match=r'"drop_attn_list" in config.json is .* must list layers'):
        mlx_skipless.convert(tmp_path / "s", tmp_path / "o")


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_mlx_lm_would_not_notice(kind: str, tmp_path: Path) -> None:
    """So loading such a model says what to do."""
    make(tmp_path / "s", "llama", [1], [], flags=True, whole=True)
    path = tmp_path / "s/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_type": kind}))
    with pytest.raises(UserError, match=r"lacks sub-layers .drop_attn_list"):
        mlx_skipless.load(tmp_path / "s")
