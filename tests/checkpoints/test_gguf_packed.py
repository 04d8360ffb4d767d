"""GGUF's simple types in MLX's packed form: the same values, and results that mlx-lm runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type
from gguf_blocks import BLOCKS, draw_blocks
from gguf_zoo import ARCHITECTURES, write_zoo_gguf
from grids import only
from test_gguf_architectures import load, make

import mlx_skipless
from mlx_skipless.checkpoints.gguf_file import GGUFStore
from mlx_skipless.checkpoints.gguf_packed import FORMS, repack
from mlx_skipless.conversion.convert import convert

AFFINE = [kind for kind in FORMS if kind != Type.MXFP4]
# Scales: ordinary ones, subnormal ones, the least, zeros of both signs, the largest with a bias.
HALVES = [0x3C00, 0xB123, 0x03FF, 0x8001, 0x0001, 0x0000, 0x8000, 0x5FFF]


def dequantize(parts: dict[str, Any], kind: Type, dtype: mx.Dtype) -> np.ndarray:
    bits, mode, _ = FORMS[kind]
    arrays = {part: mx.array(values) for part, values in parts.items()}
    if mode == "affine":
        arrays |= {part: arrays[part].astype(dtype) for part in ("scales", "biases")}
    weight = arrays.pop("weight")
    form: Any = {"group_size": 32, "bits": bits, "mode": mode}
    return np.array(mx.dequantize(weight, **arrays, **form, dtype=dtype))


@pytest.mark.parametrize("kind", FORMS, ids=lambda kind: kind.name)
def test_values_are_identical(kind: Type) -> None:
    decode, halves = BLOCKS[kind]
    rng = np.random.default_rng(0)
    blocks = draw_blocks(kind, 64 * 128 * 32, rng)
    for at in halves:
        chosen = rng.choice(np.array(HALVES, np.uint16), (len(blocks) // 2, 1))
        blocks[::2, at : at + 2] = chosen.view(np.uint8)
    if kind == Type.Q8_0:  # beyond 511 a bias is beyond float16
        blocks[::2, :2] = np.minimum(blocks[::2, :2].view(np.uint16) & 0x7FFF, 0x5BFF).view(
            np.uint8
        )
    expected = decode(blocks).reshape(64, -1)

    parts = repack(blocks.reshape(64, -1), kind)

    np.testing.assert_array_equal(dequantize(parts, kind, mx.float32), expected)
    if kind != Type.MXFP4:
        assert parts["scales"].dtype == parts["biases"].dtype == np.float16


@pytest.mark.parametrize("kind", AFFINE, ids=lambda kind: kind.name)
def test_computing_in_16_bits_rounds_as_that_does(kind: Type) -> None:
    """What a Mac computes with: a product and a sum, each rounded to the type."""
    rng = np.random.default_rng(1)
    blocks = draw_blocks(kind, 64 * 64, rng)
    exact = BLOCKS[kind][0](blocks).reshape(64, -1)
    parts = repack(blocks.reshape(64, -1), kind)
    largest = np.abs(exact).max(axis=1, keepdims=True)
    found = dequantize(parts, kind, mx.float16)
    assert (np.abs(found - exact) / largest).max() < 2**-10


@pytest.mark.parametrize("halves", [0x7C00, 0x7E00, 0x7BFF], ids=["inf", "nan", "large"])
def test_a_scale_that_float16_does_not_hold_is_refused(tmp_path: Path, halves: int) -> None:
    make(tmp_path / "hf", "qwen3")
    name = "model.layers.1.mlp.up_proj.weight"
    blocks = draw_blocks(Type.Q8_0, 96 * 64, np.random.default_rng(0))
    blocks[7, :2] = np.array([halves], np.uint16).view(np.uint8)
    raw = {name: blocks.reshape(96, -1)}
    write_zoo_gguf(tmp_path / "m.gguf", tmp_path / "hf", lambda _: Type.Q8_0, raw=raw)
    with pytest.raises(mlx_skipless.UserError, match=f"{name} .*beyond float16: give --dtype"):
        convert(tmp_path / "m.gguf", tmp_path / "out", verify=False)
    assert [file.name for file in tmp_path.iterdir()] == ["hf", "m.gguf"]


@pytest.mark.parametrize("kind", [Type.Q4_0, Type.Q4_1, Type.Q8_0], ids=lambda kind: kind.name)
def test_mlx_reads_the_same_words(kind: Type, tmp_path: Path) -> None:
    """MLX has a reader of its own for these types, which knows no architecture."""
    make(tmp_path / "hf", "qwen3")
    names = write_zoo_gguf(tmp_path / "m.gguf", tmp_path / "hf", lambda _: kind)
    theirs, config = mx.load(str(tmp_path / "m.gguf"), return_metadata=True)
    store = GGUFStore(tmp_path / "m.gguf")

    ours = store.packed.read(store.packed.shapes)

    assert len(ours) == len(theirs) and "qwen3.block_count" in config
    for name, own in names.items():
        for part in ("weight", "scales", "biases"):
            key = own.replace("weight", part)
            if key in theirs:
                found = ours[name.replace("weight", part)]
                assert mx.array_equal(found, theirs[key].astype(found.dtype)), key


def dense_twin(folder: Path, file: Path, twin: Path) -> None:
    """A folder's model with the values that its GGUF file has, as gguf reads them."""
    twin.mkdir()
    (twin / "config.json").write_text((folder / "config.json").read_text())
    store = GGUFStore(file)
    mx.save_safetensors(str(twin / "model.safetensors"), store.read(store.shapes))


def pick(kind: Type) -> Any:
    """Types as files have them: the head better than the rest, the embedding too."""

    def kinds(name: str) -> Type:
        if name in ("output.weight", "token_embd.weight"):
            return Type.Q8_0
        return Type.MXFP4 if "_exps" in name and kind == Type.Q5_0 else kind

    return kinds


SHOWN = ["gpt_oss 2", "llama 0"]
CASES = [f"{name} {turn}" for name in sorted(ARCHITECTURES) for turn in range(4)]


@pytest.mark.parametrize("case", only(SHOWN, sorted({*CASES[::2], *SHOWN})))
def test_a_result_runs_packed_in_mlx_lm(case: str, tmp_path: Path) -> None:
    name, turn = case.split()
    kind = [Type.Q8_0, Type.Q4_0, Type.Q5_0, Type.Q4_1][int(turn)]
    make(tmp_path / "hf", name, dtype="float16")
    write_zoo_gguf(tmp_path / "m.gguf", tmp_path / "hf", pick(kind))
    dense_twin(tmp_path / "hf", tmp_path / "m.gguf", tmp_path / "twin")

    report = convert(tmp_path / "m.gguf", tmp_path / "out", verify=False)

    assert report.kept_packed and report.stock and report.packing.startswith("GGUF ")
    assert any("repacked without a new rounding" in note for note in report.notes)
    result, twin = load(tmp_path / "out"), load(tmp_path / "twin")
    for path, module in result.named_modules():
        spared = "scales" in module or "weight" not in module or module.weight.ndim == 1
        assert spared or path.endswith(("gate", "router")), path
    tokens = mx.array(np.random.default_rng(0).integers(0, 258, (1, 40)))
    expected, found = twin(tokens), result(tokens)
    assert mx.abs(expected - found).max().item() < 1e-4 * mx.abs(expected).max().item()
    assert not [f for f in tmp_path.iterdir() if "unpacked" in f.name]


def test_a_mixed_file_says_what_stays_and_runs_in_mlx_lm(tmp_path: Path) -> None:
    """Types as llama.cpp mixes them, with K-quants for some; they are dense afterwards."""
    make(tmp_path / "hf", "gemma3_text", dtype="float16", hidden_size=256, intermediate_size=256)
    weights = mx.load(str(tmp_path / "hf" / "model.safetensors"))
    rng, raw = np.random.default_rng(0), {}
    kinds = {"self_attn.v_proj": Type.Q6_K, "mlp.down_proj": Type.Q4_K, "embed_tokens": Type.Q6_K}
    for name, array in weights.items():
        for part, kind in kinds.items():
            if part in name:
                scale = 2e-4 if kind == Type.Q6_K else 1e-3
                blocks = draw_blocks(kind, array.size, rng, scale=scale)
                raw[name] = blocks.reshape(len(array), -1)
                weights[name] = mx.array(BLOCKS[kind][0](blocks).reshape(array.shape))
    types = {"attn_v.": Type.Q6_K, "ffn_down.": Type.Q4_K, "token_embd.": Type.Q6_K}

    def type_of(name: str) -> Type:
        return next((kind for part, kind in types.items() if part in name), Type.Q4_0)

    (tmp_path / "twin").mkdir()
    (tmp_path / "twin" / "config.json").write_text((tmp_path / "hf" / "config.json").read_text())
    for name, array in weights.items():
        if array.ndim > 1 and name not in raw:
            packed = gguf.quants.quantize(np.array(array.astype(mx.float32)), Type.Q4_0)
            raw[name] = packed
            values = BLOCKS[Type.Q4_0][0](packed.reshape(-1, 18)).reshape(array.shape)
            weights[name] = mx.array(values)
    mx.save_safetensors(str(tmp_path / "twin" / "model.safetensors"), weights)
    write_zoo_gguf(
        tmp_path / "m.gguf",
        tmp_path / "hf",
        type_of,
        raw=raw,
    )

    report = convert(tmp_path / "m.gguf", tmp_path / "out", verify=False)

    assert report.notes[0] == (
        "repacked without a new rounding: 30 of 43 matrices, 0.8 MB; "
        "dense: 7 of Q6_K, 6 of Q4_K, 1.1 MB"
    )
    settings = json.loads((tmp_path / "out" / "config.json").read_text())["quantization"]
    assert {"group_size": 32, "bits": 4, "mode": "affine"}.items() <= settings.items()
    dense = {path for path, own in settings.items() if own is False}
    assert dense == {name.removesuffix(".weight") for name in raw if any(k in name for k in kinds)}
    twin, result = load(tmp_path / "twin"), load(tmp_path / "out")
    tokens = mx.array(rng.integers(0, 258, (1, 40)))
    expected, found = twin(tokens), result(tokens)
    assert mx.abs(expected - found).max().item() < 5e-3 * mx.abs(expected).max().item()
    model, tokenizer = mlx_lm.load(str(tmp_path / "out"))[:2]
    assert mlx_lm.generate(model, tokenizer, "ab", max_tokens=3) is not None
