"""Checkpoints that other tools quantized: GPTQ, AWQ and MLX, packed here by their definitions.

A packer returns a matrix's parts as the tool stores them and the values that these stand for.
"""

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
from reference import Config, Weights

from mlx_skipless.checkpoints.checkpoint import open_checkpoint
from mlx_skipless.conversion.convert import convert
from mlx_skipless.errors import UserError

Parts = dict[str, mx.array]
Packer = Callable[[str, np.ndarray], tuple[Parts, np.ndarray]]
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
    assert checkpoint.store is not None
    read = checkpoint.read(checkpoint.store.shapes)
    assert read.keys() == meant.keys()
    for name, values in meant.items():
        found = np.array(read[name].astype(mx.float32))
        np.testing.assert_array_equal(found, values.astype(np.float32), err_msg=name)


def rounded(
    values: np.ndarray, group: np.ndarray, bits: int, symmetric: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Round (in, out) values to ``bits``, with a scale and a zero point for each group and output.

    Returns whole numbers (in, out), scales and zeros (groups, out); two zero points are 0.
    """
    top = 2**bits - 1
    groups = group.max() + 1
    low = np.stack([values[group == g].min(axis=0) for g in range(groups)])
    high = np.stack([values[group == g].max(axis=0) for g in range(groups)])
    if symmetric:
        scales = 2 * np.maximum(np.abs(low), np.abs(high)) / top
        zeros = np.full(scales.shape, 2 ** (bits - 1))
    else:
        scales = (high - low) / top
        zeros = np.clip(np.round(-low / scales), 0, top).astype(int)
        zeros[0, :2] = 0
    scales = scales.astype(np.float16).astype(np.float64)
    return (
        np.clip(np.round(values / scales[group] + zeros[group]), 0, top).astype(int),
        scales,
        zeros,
    )


def dense(
    whole: np.ndarray, scales: np.ndarray, zeros: np.ndarray, group: np.ndarray
) -> np.ndarray:
    return ((whole - zeros[group]) * scales[group]).T


# GPTQ


def gptq_words(values: np.ndarray, bits: int) -> np.ndarray:
    """AutoGPTQ's packing of whole numbers (rows, columns) along the rows, 32 at a time."""
    rows = values.astype(np.uint64).reshape(-1, 32, values.shape[1]).swapaxes(0, 1)
    if bits == 3:
        # Two of 32 values lie across words: the eleventh as 2 + 1 bits, the 22nd as 1 + 2.
        words = [
            sum(rows[i] << np.uint64(3 * i) for i in range(10)) + ((rows[10] & 3) << 30),
            (rows[10] >> 2)
            + sum(rows[i] << np.uint64(3 * (i - 11) + 1) for i in range(11, 21))
            + ((rows[21] & 1) << 31),
            (rows[21] >> 1) + sum(rows[i] << np.uint64(3 * (i - 22) + 2) for i in range(22, 32)),
        ]
    else:
        fit = 32 // bits
        words = [
            sum(rows[start + i] << np.uint64(bits * i) for i in range(fit))
            for start in range(0, 32, fit)
        ]
    return np.stack(words, axis=1).reshape(-1, values.shape[1]).astype(np.uint32).view(np.int32)


def gptq(
    bits: int,
    *,
    group_size: int = 32,
    act_order: bool = False,
    symmetric: bool = False,
    v2: bool = False,
    g_idx: bool = True,
) -> tuple[Config, Packer]:
    rng = np.random.default_rng(bits)

    def pack(path: str, values: np.ndarray) -> tuple[Parts, np.ndarray]:
        n_in = values.shape[1]
        group = np.arange(n_in) // (group_size if group_size > 0 else n_in)
        group = rng.permutation(group) if act_order else group
        whole, scales, zeros = rounded(values.T, group, bits, symmetric)
        stored_zeros = zeros if v2 else (zeros - 1) % 2**bits
        parts = {
            "qweight": mx.array(gptq_words(whole, bits)),
            "qzeros": mx.array(np.ascontiguousarray(gptq_words(stored_zeros.T, bits).T)),
            "scales": mx.array(scales.astype(np.float16)),
        }
        if g_idx:
            parts["g_idx"] = mx.array(group.astype(np.int32))
        return parts, dense(whole, scales, zeros, group)

    declared = {
        "quant_method": "gptq",
        "bits": bits,
        "group_size": group_size,
        "desc_act": act_order,
        "sym": symmetric,
    }
    declared |= {"checkpoint_format": "gptq_v2"} if v2 else {}
    return {"quantization_config": declared}, pack


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


def test_gptq_biases_of_zeros_are_dropped_and_others_kept(tmp_path: Path):
    settings, pack = gptq(4)
    meant = write(tmp_path, settings, pack)
    zero, other = "model.layers.0.self_attn.o_proj.bias", "model.layers.1.self_attn.q_proj.bias"
    biases = {zero: mx.zeros((128,), mx.float16), other: mx.ones((128,), mx.float16)}
    rewrite(tmp_path, lambda arrays: arrays | biases)
    assert_reads_as(tmp_path, meant | {other: np.ones(128)})
    assert open_checkpoint(tmp_path).args.biases == {"q_proj": [1]}


# AWQ


def awq_words(values: np.ndarray) -> np.ndarray:
    """AutoAWQ's GEMM packing of 4-bit whole numbers (rows, columns) along the columns."""
    columns = values.astype(np.uint32).reshape(len(values), -1, 8)
    order = (0, 2, 4, 6, 1, 3, 5, 7)
    return sum(columns[..., o] << np.uint32(4 * i) for i, o in enumerate(order)).view(np.int32)


def awq(group_size: int = 32) -> tuple[Config, Packer]:
    def pack(path: str, values: np.ndarray) -> tuple[Parts, np.ndarray]:
        n_in = values.shape[1]
        group = np.arange(n_in) // (group_size if group_size > 0 else n_in)
        whole, scales, zeros = rounded(values.T, group, 4, symmetric=False)
        parts = {
            "qweight": mx.array(awq_words(whole)),
            "qzeros": mx.array(awq_words(zeros)),
            "scales": mx.array(scales.astype(np.float16)),
        }
        return parts, dense(whole, scales, zeros, group)

    declared = {
        "quant_method": "awq",
        "bits": 4,
        "group_size": group_size,
        "version": "GEMM",
        "zero_point": True,
    }
    return {"quantization_config": declared}, pack


@pytest.mark.parametrize("group_size", [32, 128, -1])
def test_awq(tmp_path: Path, group_size: int):
    assert_reads_as(tmp_path, write(tmp_path, *awq(group_size)))
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.packing == "AWQ 4-bit" and checkpoint.dtype == mx.float16


# MLX


def stream(values: np.ndarray, bits: int) -> mx.array:
    """Whole numbers (rows, columns) as one row of bits each, low ones first, in 32-bit words."""
    places = (values[..., None] >> np.arange(bits)) & 1
    packed = np.packbits(
        places.reshape(len(values), -1).astype(np.uint8), axis=1, bitorder="little"
    )
    return mx.array(packed.view(np.uint32))


E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
E4M3 = np.array([(m / 8 * 2**-6) if e == 0 else (1 + m / 8) * 2.0 ** (e - 7)
                 for e in range(16) for m in range(8)])[:-1]  # fmt: skip # the last is NaN


def nearest(values: np.ndarray, grid: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Codes, sign in the highest bit, and what they stand for."""
    code = np.abs(np.abs(values)[..., None] - grid).argmin(axis=-1)
    negative = values < 0
    bit = 8 if len(grid) == 8 else 128
    return code + bit * negative, np.where(negative, -grid[code], grid[code])


def mlx_pack(
    mode: str, group_size: int, bits: int, dtype: mx.Dtype = mx.bfloat16
) -> Callable[[np.ndarray], tuple[Parts, np.ndarray]]:
    def pack(values: np.ndarray) -> tuple[Parts, np.ndarray]:
        rows = len(values)
        groups = values.reshape(rows, -1, group_size)
        if mode == "affine":
            low, high = groups.min(axis=-1), groups.max(axis=-1)
            exact = ((high - low) / (2**bits - 1), low)
            stored = [mx.array(x.astype(np.float32)).astype(dtype) for x in exact]
            scale, bias = (np.array(x.astype(mx.float32), np.float64)[..., None] for x in stored)
            whole = np.clip(np.round((groups - bias) / scale), 0, 2**bits - 1).astype(int)
            meant = (whole * scale + bias).reshape(values.shape)
            parts = {"scales": stored[0], "biases": stored[1]}
        else:
            grid = E4M3 if mode == "mxfp8" else E2M1
            wanted = np.abs(groups).max(axis=-1) / grid.max()
            if mode == "nvfp4":
                code, scale = nearest(wanted, E4M3)
            else:
                code = np.round(np.log2(wanted)).astype(int) + 127
                scale = 2.0 ** (code - 127)
            whole, numbers = nearest(groups / scale[..., None], grid)
            meant = (numbers * scale[..., None]).reshape(values.shape)
            parts = {"scales": mx.array(code.astype(np.uint8))}
        return {"weight": stream(whole.reshape(values.shape), bits), **parts}, meant

    return pack


def mlx(mode: str, group_size: int, bits: int, **options: Any) -> tuple[Config, Packer]:
    pack = mlx_pack(mode, group_size, bits, **options)
    quantization = {"group_size": group_size, "bits": bits, "mode": mode}
    settings = {"quantization": quantization, "quantization_config": quantization}
    return settings, lambda path, values: pack(values)


def assert_close_to(folder: Path, meant: Weights) -> None:
    """As MLX computes scale * q + bias in float32: to a few units in the last place."""
    checkpoint = open_checkpoint(folder)
    assert checkpoint.store is not None
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
    assert checkpoint.packing == f"MLX {mode} {bits}-bit" and checkpoint.dtype == mx.bfloat16


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
        ({"quant_method": "compressed-tensors"}, "'compressed-tensors'.*unquantized"),
        ({"quant_method": "fp8"}, "'fp8'"),
        ({"bits": 4}, "None"),
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


def test_a_group_that_does_not_exist_is_refused(tmp_path: Path):
    write(tmp_path, *gptq(4))
    name = "model.layers.1.mlp.up_proj"
    wrong = mx.array(np.r_[np.zeros(127, np.int32), np.int32(4)])
    rewrite(tmp_path, lambda arrays: arrays | {f"{name}.g_idx": wrong})
    checkpoint = open_checkpoint(tmp_path)
    with pytest.raises(UserError, match="up_proj has inputs in groups that do not exist"):
        checkpoint.read([f"{name}.weight"])
