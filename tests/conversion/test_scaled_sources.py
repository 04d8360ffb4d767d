"""Models in FP8 and other published packings, converted and run like what they stand for."""

from __future__ import annotations

import gc
import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from factory import make_llama
from grids import only, thorough
from packing import awq, gptq
from scaled_packing import (
    Config,
    Packer,
    Stored,
    as_stored,
    declare,
    declare_compressed,
    fp4,
    fp8,
    pack_folder,
    packed_int,
    publish_gpt_oss,
    read,
    save,
)
from zoo import make_model

from mlx_skipless.conversion.convert import convert
from mlx_skipless.errors import UserError
from mlx_skipless.inference.loading import load_network
from mlx_skipless.network.parts import tensors_of

TOKENS = mx.array([[1, 2, 3, 4, 5]])
PROJECTIONS = ("proj.weight",)
SMALL: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}


FORMATS: dict[str, tuple[Config, Packer]] = {
    "fp8": (declare("fp8", activation_scheme="static"), fp8(flat=True)),
    "blocks": (declare("fp8", weight_block_size=[32, 48]), fp8((32, 48))),
    "words": (
        declare_compressed("pack-quantized", {"num_bits": 4, "group_size": 32}),
        packed_int(4, 32, zeros=True),
    ),
    "nvfp4": (declare("modelopt", quant_algo="NVFP4"), fp4("nvfp4", tool="modelopt")),
}
for name, (settings, pack) in (("gptq", gptq(4, act_order=True)), ("awq", awq())):
    FORMATS[name] = settings, as_stored(pack)
OPTIONS: dict[str, dict[str, Any]] = {
    "as it is": {},
    "folded": {"fold_norms": True},
    "skipless": {"skipless": True, "remove": "p"},
    "quantized": {"quantize": True, "q_group_size": 32},
    "dropped": {"drop_attention": 1},
    "renumbered": {"drop_block": 1},
}
EXACT = ("folded", "skipless")  # what only known families can


def read_config(folder: Path) -> Config:
    return json.loads((folder / "config.json").read_text())


def assert_converts_alike(packed: Path, plain: Path, out: Path, options: dict[str, Any]) -> None:
    """A packed model becomes, bit for bit, what the model becomes that it stands for."""
    report = convert(packed, out / "a", **options, verify=False)
    convert(plain, out / "b", **options, verify=False)
    found, expected = (mx.load(str(out / name / "model.safetensors")) for name in "ab")
    assert found.keys() == expected.keys()
    for name, array in found.items():
        assert array.dtype == expected[name].dtype, name
        assert mx.array_equal(array, expected[name]).item(), name
    assert report.packing is not None and not report.kept_packed
    assert read_config(out / "a") == read_config(out / "b")


@pytest.mark.parametrize("kind", only({"fp8"}, ["fp8", "blocks", "words", "nvfp4"]))
@pytest.mark.parametrize("way", only({"folded"}, OPTIONS))
def test_a_known_family(tmp_path: Path, kind: str, way: str):
    make_llama(tmp_path / "source", **SMALL)
    settings, pack = FORMATS[kind]
    plain = pack_folder(tmp_path / "source", tmp_path / "packed", settings, pack, PROJECTIONS)
    assert_converts_alike(tmp_path / "packed", plain, tmp_path, OPTIONS[way])


STOCK = [
    ("olmo2", "fp8"),
    pytest.param("qwen3_moe", "blocks", marks=thorough),
    pytest.param("smollm3", "nvfp4", marks=thorough),
    pytest.param("olmo2", "words", marks=thorough),
]


@pytest.mark.parametrize(("model_type", "kind"), STOCK)
@pytest.mark.parametrize("way", only({"dropped"}, [way for way in OPTIONS if way not in EXACT]))
def test_any_other_architecture(tmp_path: Path, model_type: str, kind: str, way: str):
    make_model(tmp_path / "source", model_type)
    settings, pack = FORMATS[kind]
    plain = pack_folder(tmp_path / "source", tmp_path / "packed", settings, pack, PROJECTIONS)
    assert_converts_alike(tmp_path / "packed", plain, tmp_path, OPTIONS[way])


RUN = ["fp8", "words", "gptq", "awq"]


@pytest.mark.parametrize("kind", only({"fp8"}, RUN))
@pytest.mark.parametrize("model_type", only({"mistral3"}, ["llama", "olmo2", "mistral3"]))
def test_it_runs_as_it_is(tmp_path: Path, model_type: str, kind: str):
    """Also in a wrapper: names begin with the text model's, and the vision tower is left out."""
    make_model(tmp_path / "source", model_type)
    settings, pack = FORMATS[kind]
    plain = pack_folder(tmp_path / "source", tmp_path / "packed", settings, pack, PROJECTIONS)
    if model_type == "mistral3":
        tensors = read(tmp_path / "packed" / "model.safetensors")
        tensors = {publish_name(name): stored for name, stored in tensors.items()}
        tensors["model.vision_tower.patch.weight"] = Stored("F32", np.ones((2, 2), np.float32))
        save(tmp_path / "packed" / "model.safetensors", tensors)
    network = load_network(tmp_path / "packed")[0]
    found, expected = network(TOKENS), load_network(plain)[0](TOKENS)
    assert mx.allclose(found, expected, rtol=1e-3, atol=1e-3 * mx.abs(expected).max().item()).item()
    exact = kind not in ("gptq", "awq")  # whose scales of 16 bits make a network of 16 bits
    assert not exact or mx.array_equal(found, expected).item()


def test_a_bias_of_zeros_that_the_network_has_not(tmp_path: Path):
    """GPTQ's exporters write one beside each matrix; some networks have it, most do not."""
    make_model(tmp_path / "source", "olmo2")
    pack_folder(tmp_path / "source", tmp_path / "packed", *FORMATS["gptq"], PROJECTIONS)
    expected = load_network(tmp_path / "packed")[0](TOKENS)
    file = tmp_path / "packed" / "model.safetensors"
    bias = Stored("F16", np.zeros(64, np.float16))
    save(file, read(file) | {"model.layers.0.self_attn.o_proj.bias": bias})
    assert mx.array_equal(load_network(tmp_path / "packed")[0](TOKENS), expected).item()


@pytest.mark.parametrize("zeros", only({True}, [False, True]))
def test_what_mlx_lm_runs_packed_stays_so(tmp_path: Path, zeros: bool):
    """Its deepseek_v3 takes 4 bits as they are, but knows of no zero points."""
    make_model(tmp_path / "source", "deepseek_v3")
    settings, pack = FORMATS["words"][0], packed_int(4, 32, zeros=zeros)
    experts = tuple(f"{i}.{name}_proj.weight" for i in range(4) for name in ("gate", "up", "down"))
    plain = pack_folder(tmp_path / "source", tmp_path / "packed", settings, pack, experts)
    network = load_network(tmp_path / "packed")[0]
    assert any("scales" in module for module in network.modules()) is not zeros
    found, expected = network(TOKENS), load_network(plain)[0](TOKENS)
    assert mx.allclose(found, expected, rtol=1e-5, atol=1e-5).item()


def publish_name(name: str) -> str:
    inner = name.removeprefix("language_model.")
    return inner.replace("model.", "model.language_model.", 1) if "lm_head" not in inner else inner


def test_nothing_is_read_before_it_is_used(tmp_path: Path):
    make_model(tmp_path / "source", "olmo2", intermediate_size=512)
    pack_folder(tmp_path / "source", tmp_path / "packed", *FORMATS["fp8"], PROJECTIONS)
    gc.collect()
    before = mx.get_active_memory()
    network = load_network(tmp_path / "packed", lazy=True)[0]
    whole = sum(array.nbytes for array in tensors_of(network).values())
    assert mx.get_active_memory() - before < 0.01 * whole
    mx.eval(network.parameters())
    assert mx.get_active_memory() - before > 0.9 * whole


# gpt-oss


OSS: dict[str, dict[str, Any]] = {
    "attention": {"drop_attention": 1},
    "ffn": {"drop_ffn": 1},
    "block": {"drop_block": 2},
}


@pytest.mark.parametrize("way", only({"attention"}, OSS))
def test_what_is_left_of_gpt_oss_stays_as_it_is(tmp_path: Path, way: str):
    make_model(tmp_path / "source", "gpt_oss")
    publish_gpt_oss(tmp_path / "source", tmp_path / "packed")
    before = tensors_of(load_network(tmp_path / "packed")[0])
    report = convert(tmp_path / "packed", tmp_path / "out", **OSS[way], verify=False)
    assert report.packing == "MLX mxfp4 4-bit" and report.kept_packed
    config = read_config(tmp_path / "out")
    assert config["quantization"] == {"group_size": 32, "bits": 4, "mode": "mxfp4"}
    assert config["quantization_config"] == config["quantization"]
    after = tensors_of(load_network(tmp_path / "out")[0])
    assert len(after) < len(before)
    kept = {name: name for name in after}
    if way == "block":  # layers are renumbered
        gone = report.removed["attention"]
        left = [n for n in range(4) if n not in gone]
        kept = {n: n.replace(f".{new}.", f".{old}.", 1) for new, old in enumerate(left)
                for n in after if f"layers.{new}." in n}  # fmt: skip
    assert kept
    for name, own in kept.items():
        assert mx.array_equal(after[name], before[own]).item(), name


@thorough
def test_gpt_oss_is_quantized_again(tmp_path: Path):
    make_model(tmp_path / "source", "gpt_oss")
    publish_gpt_oss(tmp_path / "source", tmp_path / "packed")
    report = convert(
        tmp_path / "packed", tmp_path / "out", quantize=True, q_group_size=32, q_bits=8
    )
    assert report.packing == "MLX mxfp4 4-bit" and not report.kept_packed
    found, expected = (load_network(tmp_path / n)[0](TOKENS) for n in ("out", "packed"))
    assert mx.allclose(found, expected, rtol=0.05, atol=0.05 * mx.abs(expected).max().item()).item()
    modules = [m for m in load_network(tmp_path / "out")[0].modules() if "scales" in m]
    assert {(m.mode, m.bits) for m in modules} == {("affine", 8)}


# What is broken


@pytest.mark.parametrize("model_type", ["llama", "olmo2"])
@pytest.mark.parametrize("code", only({0x7F}, [0x7F, 0xFF]))
def test_a_byte_that_is_no_number(tmp_path: Path, model_type: str, code: int):
    make_model(tmp_path / "source", model_type)
    pack_folder(tmp_path / "source", tmp_path / "packed", *FORMATS["fp8"], PROJECTIONS)
    file = tmp_path / "packed" / "model.safetensors"
    tensors = read(file)
    name = "model.layers.1.mlp.up_proj.weight"
    codes = tensors[name].array.view(np.uint8).copy()
    codes[3, 5] = code
    save(file, tensors | {name: Stored("F8_E4M3", codes)})
    for options in ({}, {"quantize": True, "q_group_size": 32}, {"verify": False}):
        with pytest.raises(UserError, match=rf"{name} holds NaN or infinity"):
            convert(tmp_path / "packed", tmp_path / "out", **options)
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("model_type", ["llama", "olmo2"])
def test_a_scale_that_is_missing(tmp_path: Path, model_type: str):
    make_model(tmp_path / "source", model_type)
    pack_folder(tmp_path / "source", tmp_path / "packed", *FORMATS["fp8"], PROJECTIONS)
    file = tmp_path / "packed" / "model.safetensors"
    tensors = read(file)
    name = "model.layers.1.mlp.up_proj.weight"
    del tensors[f"{name}_scale_inv"]
    save(file, tensors)
    for use in (load_network, lambda folder: convert(folder, tmp_path / "out")):
        with pytest.raises(UserError, match=f"{name} is no complete FP8 matrix"):
            use(tmp_path / "packed")
