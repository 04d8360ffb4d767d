"""Checkpoints that other tools quantized: GPTQ, AWQ and MLX."""

from __future__ import annotations

import functools
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from factory import ATTENTION_PROJECTIONS, MLP_PROJECTIONS, make_llama
from packing import (
    Packer,
    Parts,
    awq,
    gptq,
    mlx,
    mlx_pack,
)
from reference import Config, Weights

from mlx_skipless.checkpoints.checkpoint import open_checkpoint
from mlx_skipless.conversion.convert import convert
from mlx_skipless.errors import UserError

LINEAR = tuple(f"{name}.weight" for name in (*ATTENTION_PROJECTIONS, *MLP_PROJECTIONS))
EVERY = (*LINEAR, "embed_tokens.weight", "lm_head.weight")


@functools.cache
def llama() -> tuple[Config, Weights]:
    with tempfile.TemporaryDirectory() as folder:
        return make_llama(Path(folder), hidden_size=128, intermediate_size=128, num_hidden_layers=2)


def write(
    folder: Path, settings: Config, pack: Packer, *, names: tuple[str, ...] = LINEAR
) -> Weights:
    """A Llama whose matrices ``names`` are packed; returns the values that it stands for."""
    config, weights = llama()
    stored: Parts = {}
    meant: Weights = {}
    for name, values in weights.items():
        path = name.removesuffix(".weight")
        if name.endswith(names):
            parts, meant[name] = pack(path, values)
            stored |= {f"{path}.{part}": array for part, array in parts.items()}
        else:
            array = mx.array(values.astype(np.float32)).astype(mx.float16)
            stored[name], meant[name] = array, np.array(array).astype(np.float64)
    save(folder, stored, config | settings)
    return meant


def save(folder: Path, arrays: Parts, config: Config) -> None:
    folder.mkdir(exist_ok=True)
    mx.save_safetensors(str(folder / "model.safetensors"), arrays, metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))


def rewrite(
    folder: Path, change: Callable[[Parts], Parts] = lambda arrays: arrays, **settings: Any
) -> None:
    """Change what a checkpoint's one file holds, and its config."""
    arrays = change(dict(mx.load(str(folder / "model.safetensors"))))
    mx.eval(arrays)  # before its file goes
    save(folder, arrays, json.loads((folder / "config.json").read_text()) | settings)


def assert_reads_as(folder: Path, meant: Weights) -> None:
    """Exactly: a packed value times its scale is a float32."""
    checkpoint = open_checkpoint(folder)
    read = checkpoint.read(checkpoint.store.shapes)
    assert read.keys() == meant.keys()
    for name, values in meant.items():
        found = np.array(read[name].astype(mx.float32))
        np.testing.assert_array_equal(found, values.astype(np.float32), err_msg=name)


# GPTQ


@pytest.mark.parametrize("v2", [False, True], ids=["v1", "v2"])
@pytest.mark.parametrize("act_order", [False, True], ids=["in order", "act order"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_gptq(tmp_path: Path, bits: int, act_order: bool, v2: bool):
    settings, pack = gptq(bits, act_order=act_order, v2=v2)
    meant = write(tmp_path, settings, pack)
    assert_reads_as(tmp_path, meant)
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.packing == f"GPTQ {bits}-bit" and checkpoint.dtype == mx.float16


@pytest.mark.parametrize(
    "options",
    [
        {"symmetric": True},
        {"symmetric": True, "act_order": True, "v2": True},
        {"group_size": -1},
        {"group_size": 128},
        {"g_idx": False},
        {"g_idx": False, "group_size": -1},
    ],
    ids=str,
)
@pytest.mark.parametrize("bits", [3, 4])
def test_gptq_groups(tmp_path: Path, bits: int, options: dict[str, Any]):
    assert_reads_as(tmp_path, write(tmp_path, *gptq(bits, **options)))


def test_the_last_group_may_be_short(tmp_path: Path):
    settings, pack = gptq(4, group_size=96, g_idx=False)  # 128 inputs: 96 and 32
    assert_reads_as(tmp_path, write(tmp_path, settings, pack))


@pytest.mark.parametrize("named", [None, "32", 32, ...])
def test_gptq_groups_that_only_the_scales_tell(tmp_path: Path, named: Any):
    settings, pack = gptq(4, g_idx=False)
    settings["quantization_config"] |= {"group_size": named}
    if named is ...:
        del settings["quantization_config"]["group_size"]
    assert_reads_as(tmp_path, write(tmp_path, settings, pack))


@pytest.mark.parametrize(("size", "named"), [(32, 64), (32, -1), (32, 0), (64, "128"), (-1, 32)])
def test_gptq_groups_of_another_size_are_refused(tmp_path: Path, size: int, named: Any):
    settings, pack = gptq(4, group_size=size, g_idx=False)
    settings["quantization_config"] |= {"group_size": named}
    write(tmp_path, settings, pack)
    with pytest.raises(UserError, match=r'groups of its .* inputs, "group_size" is '):
        open_checkpoint(tmp_path)


def test_gptq_groups_that_nothing_tells_are_refused(tmp_path: Path):
    settings, pack = gptq(4, group_size=56, g_idx=False)  # 128 inputs: 56, 56 and 16
    settings["quantization_config"]["group_size"] = None
    write(tmp_path, settings, pack)
    with pytest.raises(UserError, match='3 groups of its 128 inputs, "group_size" is None'):
        open_checkpoint(tmp_path)


def test_gptq_biases_of_zeros_are_dropped_and_others_kept(tmp_path: Path):
    settings, pack = gptq(4)
    meant = write(tmp_path, settings, pack)
    zero, other = "model.layers.0.self_attn.o_proj.bias", "model.layers.1.self_attn.q_proj.bias"
    biases = {zero: mx.zeros((128,), mx.float16), other: mx.ones((128,), mx.float16)}
    rewrite(tmp_path, lambda arrays: arrays | biases)
    assert_reads_as(tmp_path, meant | {other: np.ones(128)})
    assert open_checkpoint(tmp_path).args.biases == {"q_proj": [1]}


# AWQ


@pytest.mark.parametrize("group_size", [32, 128, -1])
def test_awq(tmp_path: Path, group_size: int):
    assert_reads_as(tmp_path, write(tmp_path, *awq(group_size)))
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.packing == "AWQ 4-bit" and checkpoint.dtype == mx.float16


@pytest.mark.parametrize("tool", ["AutoGPTQ", "AutoAWQ"])
def test_settings_in_a_file_of_the_tools_own(tmp_path: Path, tool: str):
    """As these tools wrote them before transformers knew of ``quantization_config``."""
    settings, pack = gptq(4) if tool == "AutoGPTQ" else awq(32)
    meant = write(tmp_path, settings, pack)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["quantization_config"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    own = {k: v for k, v in settings["quantization_config"].items() if k != "quant_method"}
    if tool == "AutoAWQ":
        own = {"w_bit": 4, "q_group_size": 32, "zero_point": True, "version": "GEMM"}
    name = "quantize_config.json" if tool == "AutoGPTQ" else "quant_config.json"
    (tmp_path / name).write_text(json.dumps(own))
    assert_reads_as(tmp_path, meant)


# MLX


def assert_close_to(folder: Path, meant: Weights) -> None:
    """As MLX computes scale * q + bias in float32: to a few units in the last place."""
    checkpoint = open_checkpoint(folder)
    read = checkpoint.read(checkpoint.store.shapes)
    assert read.keys() == meant.keys()
    for name, values in meant.items():
        found = np.array(read[name].astype(mx.float32))
        assert np.abs(found - values).max() <= 3e-7 * np.abs(values).max(), name


@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 6, 8])
def test_mlx_affine(tmp_path: Path, bits: int, group_size: int):
    dtype = mx.float16 if bits == 4 else mx.bfloat16
    meant = write(tmp_path, *mlx("affine", group_size, bits, dtype=dtype), names=EVERY)
    assert_close_to(tmp_path, meant)
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.packing == f"MLX affine {bits}-bit" and checkpoint.dtype == dtype


@pytest.mark.parametrize(
    ("mode", "group_size", "bits"), [("mxfp4", 32, 4), ("nvfp4", 16, 4), ("mxfp8", 32, 8)]
)
def test_mlx_floats(tmp_path: Path, mode: str, group_size: int, bits: int):
    meant = write(tmp_path, *mlx(mode, group_size, bits), names=EVERY)
    assert_reads_as(tmp_path, meant)
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.packing == f"MLX {mode} {bits}-bit" and checkpoint.dtype == mx.float16


def test_mlx_settings_of_single_matrices(tmp_path: Path):
    quantization: dict[str, Any] = {
        "group_size": 64,
        "bits": 4,
        "model.embed_tokens": {"group_size": 32, "bits": 8},
        "model.layers.0.self_attn.q_proj": {"group_size": 32, "bits": 4, "mode": "mxfp4"},
        "model.layers.0.self_attn.k_proj": {"group_size": 16, "bits": 4, "mode": "nvfp4"},
        "model.layers.1.mlp.down_proj": {"group_size": 128, "bits": 3, "mode": "affine"},
        "model.layers.1.mlp.up_proj": False,
        "lm_head": False,
    }

    def pack(path: str, values: np.ndarray) -> tuple[Parts, np.ndarray]:
        own = quantization.get(path, quantization)
        if own is False:
            array = mx.array(values.astype(np.float32)).astype(mx.bfloat16)
            return {"weight": array}, np.array(array.astype(mx.float32))
        return mlx_pack(own.get("mode", "affine"), own["group_size"], own["bits"])(values)

    meant = write(tmp_path, {"quantization": quantization}, pack, names=EVERY)
    assert_close_to(tmp_path, meant)


@pytest.mark.parametrize(
    ("mode", "group_size", "bits", "said"),
    [("affine", 64, 4, {}), ("mxfp8", 32, 8, {"mode": "mxfp8"})],
)
def test_mlx_modes_need_no_numbers(
    tmp_path: Path, mode: str, group_size: int, bits: int, said: Config
):
    settings, pack = mlx(mode, group_size, bits)
    meant = write(tmp_path, settings, pack)
    rewrite(tmp_path, quantization=said)
    assert_close_to(tmp_path, meant)
    assert open_checkpoint(tmp_path).packing == f"MLX {mode} {bits}-bit"


# Conversion


@pytest.mark.parametrize(
    ("scheme", "name"),
    [
        (gptq(4, act_order=True), "GPTQ 4-bit"),
        (gptq(3, v2=True), "GPTQ 3-bit"),
        (awq(), "AWQ 4-bit"),
        (mlx("affine", 64, 6), "MLX affine 6-bit"),
        (mlx("nvfp4", 16, 4), "MLX nvfp4 4-bit"),
    ],
    ids=["gptq4", "gptq3", "awq", "affine6", "nvfp4"],
)
def test_a_conversion_is_that_of_the_values_meant(
    tmp_path: Path, scheme: tuple[Config, Packer], name: str
):
    meant = write(tmp_path / "packed", *scheme)
    values = {n: mx.array(w.astype(np.float32)) for n, w in meant.items()}
    save(tmp_path / "plain", values, llama()[0])
    options: dict[str, Any] = {"skipless": True, "remove": "p", "dtype": "float32"}

    report = convert(tmp_path / "packed", tmp_path / "out", **options)
    convert(tmp_path / "plain", tmp_path / "plain_out", **options, verify=False)

    assert report.packing == name
    assert report.verification is not None and report.verification.max_rel_logit_error < 1e-4
    out, plain = (mx.load(str(tmp_path / f / "model.safetensors")) for f in ("out", "plain_out"))
    assert out.keys() == plain.keys() and not any("o_proj" in n for n in out)
    for n in out:
        assert mx.allclose(out[n], plain[n], rtol=1e-5, atol=1e-6), n
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())


def test_a_stock_conversion_declares_no_packing_left(tmp_path: Path):
    write(tmp_path / "packed", *mlx("affine", 64, 4))
    report = convert(tmp_path / "packed", tmp_path / "out", verify=False)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert report.stock and not config.keys() & {"quantization", "quantization_config"}


# What is refused


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "'bitsandbytes'.*supported"),
        ({"quant_method": "hqq"}, "'hqq'.*unquantized"),
        ({"bits": 4}, 'no "quant_method"'),
        ({"quant_method": "awq", "bits": 3}, "4-bit GEMM"),
        ({"quant_method": "awq", "bits": 4, "version": "gemv"}, "4-bit GEMM"),
        ({"quant_method": "awq", "bits": 4, "format": "llm-awq"}, "4-bit GEMM"),
        ({"quant_method": "gptq", "bits": 5}, "5 bits.*2, 3, 4, 8"),
        ({"quant_method": "gptq"}, "None bits"),
        ({"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"}, "'marlin'"),
        ({"quant_method": "gptq", "bits": 4, "is_marlin_format": True}, "'marlin'"),
        ({"quant_method": "gptq", "bits": 4, "pack_dtype": "int64"}, "int32"),
    ],
    ids=lambda value: "" if isinstance(value, str) else " ".join(map(str, value.values())),
)
def test_an_unknown_packing_is_refused(tmp_path: Path, settings: Config, complaint: str):
    write(tmp_path, {"quantization_config": settings}, gptq(4)[1])
    with pytest.raises(UserError, match=complaint):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    "quantization",
    [
        {"mode": "mxfp3"},
        {"bits": "4"},
        {"bits": 8},
        {"group_size": 32},
        {"bits": 7},
        {"group_size": 16},
        {"mode": "mxfp4", "bits": 8},
        {"bits": 4.0},
        {"bits": True},
        {"group_size": 64.0},
        {"bits": [4]},
    ],
    ids=str,
)
def test_wrong_settings_of_mlx_are_refused(tmp_path: Path, quantization: Config):
    settings, pack = mlx("affine", 64, 4)
    write(tmp_path, settings, pack)
    own = settings["quantization"] | quantization
    rewrite(tmp_path, quantization=own)
    with pytest.raises(UserError, match=r"config\.json|known: affine"):
        open_checkpoint(tmp_path)


PARTS = [
    *((gptq(4), part) for part in ("qweight", "qzeros", "scales", "g_idx")),
    *((awq(), part) for part in ("qweight", "qzeros", "scales")),
    *((mlx("affine", 64, 4), part) for part in ("weight", "scales", "biases")),
    *((mlx("mxfp4", 32, 4), part) for part in ("weight", "scales")),
]


@pytest.mark.parametrize(
    ("scheme", "part", "damage"),
    [
        (*of_tool, damage)
        for of_tool in PARTS
        for damage in ("lost", "short", "flat")
        if (of_tool[1], damage) != ("g_idx", "lost")  # it may be absent
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_missing_or_misshapen_part_is_named(
    tmp_path: Path, scheme: tuple[Config, Packer], part: str, damage: str
):
    write(tmp_path, *scheme)
    name = f"model.layers.1.mlp.up_proj.{part}"

    def harm(arrays: Parts) -> Parts:
        if damage == "lost":
            return {n: a for n, a in arrays.items() if n != name}
        cut = arrays[name][:-1] if damage == "short" else arrays[name].reshape(1, 1, -1)
        return arrays | {name: cut}

    rewrite(tmp_path, harm)
    with pytest.raises(UserError, match=r"model\.layers\.1\.mlp\.up_proj"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(("scheme", "part"), PARTS, ids=lambda v: v if isinstance(v, str) else "")
@pytest.mark.parametrize("kind", [mx.int64, mx.float16, mx.bool_, mx.uint8])
def test_a_part_of_another_number_type_is_named(
    tmp_path: Path, scheme: tuple[Config, Packer], part: str, kind: mx.Dtype
):
    write(tmp_path, *scheme)
    name = f"model.layers.1.mlp.up_proj.{part}"
    rewrite(tmp_path, lambda arrays: arrays | {name: arrays[name].astype(kind)})
    in_mxfp4 = scheme[0].get("quantization", {}).get("mode") == "mxfp4"
    fits = mx.uint8 if in_mxfp4 else mx.float16
    if part in ("scales", "biases") and kind == fits:
        open_checkpoint(tmp_path)
        return
    with pytest.raises(UserError, match=rf"{name} has a number type that"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("bits", [4.0, True, "4", None])
def test_bits_of_gptq_that_are_no_whole_number(tmp_path: Path, bits: Any):
    settings, pack = gptq(4)
    write(tmp_path, settings, pack)
    rewrite(tmp_path, quantization_config=settings["quantization_config"] | {"bits": bits})
    with pytest.raises(UserError, match="bits is not supported"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("rules", [{"+:.*self_attn.*": {"bits": 8}}, {"lm_head": {}}, ["x"]])
def test_gptq_with_settings_of_single_modules_is_refused(tmp_path: Path, rules: Any):
    settings, pack = gptq(4)
    write(tmp_path, settings, pack)
    own = settings["quantization_config"]
    rewrite(tmp_path, quantization_config=own | {"dynamic": {"-:.*lm_head": {}}})  # is dense
    assert open_checkpoint(tmp_path).packing == "GPTQ 4-bit"
    rewrite(tmp_path, quantization_config=own | {"dynamic": rules})
    with pytest.raises(UserError, match=r'"dynamic" in config\.json'):
        open_checkpoint(tmp_path)


def test_a_group_that_does_not_exist_is_refused(tmp_path: Path):
    write(tmp_path, *gptq(4))
    name = "model.layers.1.mlp.up_proj"
    wrong = mx.array(np.r_[np.zeros(127, np.int32), np.int32(4)])
    rewrite(tmp_path, lambda arrays: arrays | {f"{name}.g_idx": wrong})
    checkpoint = open_checkpoint(tmp_path)
    with pytest.raises(UserError, match="up_proj has inputs in groups that do not exist"):
        checkpoint.read([f"{name}.weight"])


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_result_in_a_float_mode_keeps_its_type_when_it_is_converted_again(
    tmp_path: Path, dtype: str
):
    """Its scales are bytes: the norms tell the type in which mlx-lm runs it."""
    make_llama(tmp_path / "source", head_dim=32, dtype=dtype)
    convert(tmp_path / "source", tmp_path / "once", quantize=True, q_mode="mxfp4", verify=False)
    again = convert(tmp_path / "once", tmp_path / "again", remove="none", verify=False)
    assert again.dtype == dtype
