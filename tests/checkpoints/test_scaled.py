"""FP8, compressed-tensors and ModelOpt, as Hugging Face publishes them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from grids import product
from scaled_packing import (
    Config,
    Packer,
    Parts,
    Stored,
    bfloat16,
    declare,
    declare_compressed,
    float32,
    fp4,
    fp8,
    from_bfloat16,
    int8,
    packed_int,
    save,
)

from mlx_skipless.checkpoints.files import read_config
from mlx_skipless.checkpoints.packed import UnpackedStore, find_scheme
from mlx_skipless.checkpoints.safetensors import SafetensorsStore
from mlx_skipless.errors import UserError

NAME = "model.layers.0.mlp.up_proj.weight"
PREFIXES = ("", "language_model.", "model.language_model.")
BLOCKS = [(128, 128), (32, 64), (40, 24)]


def write(folder: Path, config: Config, tensors: dict[str, Stored]) -> Path:
    folder.mkdir(exist_ok=True)
    save(folder / "model.safetensors", tensors)
    (folder / "config.json").write_text(json.dumps({"dtype": "bfloat16"} | config))
    return folder


def open_store(folder: Path) -> UnpackedStore:
    config, store = read_config(folder), SafetensorsStore(folder)
    scheme = find_scheme(config, store)
    assert scheme is not None
    return UnpackedStore(store, scheme)


def named(parts: Parts, name: str = NAME) -> dict[str, Stored]:
    return {name + part: stored for part, stored in parts.items()}


def draw(shape: tuple[int, ...]) -> np.ndarray:
    rng = np.random.default_rng(sum(shape))
    return rng.standard_normal(shape) * rng.choice([0.02, 1.0], (*shape[:-1], 1))


def assert_reads(
    folder: Path, config: Config, pack: Packer, shape: tuple[int, ...], name: str = NAME
) -> np.ndarray:
    """Both ways of reading a matrix give what the format's definition gives, bit for bit."""
    values = draw(shape)
    parts, meant = pack(values)
    norm = bfloat16(np.ones(shape[-1]))
    others = {"model.norm.weight": norm, f"{name.removesuffix('weight')}input_scale": float32(1)}
    store = open_store(write(folder, config, named(parts, name) | others))
    assert store.shapes == {name: shape, "model.norm.weight": norm.array.shape}
    assert store.dtypes == dict.fromkeys(store.shapes, mx.bfloat16)
    found = store.read([name])[name]
    assert found.dtype == mx.float32
    np.testing.assert_array_equal(np.array(found), meant)
    lazy = store.load()
    assert lazy.keys() == store.shapes.keys() and lazy[name].dtype == mx.bfloat16
    rounded = from_bfloat16(bfloat16(meant).array)
    np.testing.assert_array_equal(np.array(lazy[name].astype(mx.float32)), rounded)
    return np.linalg.norm(meant - values) / np.linalg.norm(values)


# FP8

IGNORED = ("input_scale", "output_scale", "k_scale", "activation_scale")
SHAPES = [(96, 64), (128, 256), (130, 100), (1, 32), (3, 48, 64), (2, 130, 70)]


@pytest.mark.parametrize(
    ("shape", "block", "suffix", "scales"),
    product(
        SHAPES,
        ["tensor", "channel", *BLOCKS],
        ["_scale_inv", "_scale"],
        [float32, bfloat16, "powers"],
    ),
)
def test_fp8(tmp_path: Path, shape: tuple[int, ...], block: Any, suffix: str, scales: Any):
    size = [*block] if isinstance(block, tuple) else None
    config = declare("fp8", weight_block_size=size, activation_scheme="static")
    error = assert_reads(tmp_path, config, fp8(block, suffix=suffix, scales=scales), shape)
    assert error < 0.03


@pytest.mark.parametrize("shape", [(96, 64), (3, 48, 64)])
@pytest.mark.parametrize("block", ["tensor", "channel"])
def test_fp8_scales_without_axes_of_one(tmp_path: Path, shape: tuple[int, ...], block: str):
    assert_reads(tmp_path, declare("fp8"), fp8(block, flat=True), shape)


@pytest.mark.parametrize("shape", [(256, 128), (128, 300), (130, 64), (3, 256, 256)])
def test_fp8_scales_with_axes_of_one(tmp_path: Path, shape: tuple[int, ...]):
    """As ModelOpt exports them: of a block's rows, 1, of its columns, 1."""
    plain = fp8((128, 128), suffix="_scale")

    def pack(values: np.ndarray) -> tuple[Parts, np.ndarray]:
        parts, meant = plain(values)
        scale = parts["_scale"]
        *lead, high, wide = scale.array.shape
        wider = Stored(scale.kind, scale.array.reshape(*lead, high, 1, wide, 1))
        return parts | {"_scale": wider}, meant

    assert_reads(tmp_path, declare("modelopt", quant_algo="FP8_PB_WO"), pack, shape)


@pytest.mark.parametrize("kind", ["F8_E8M0", "U8"])
def test_exponents_at_their_ends(tmp_path: Path, kind: str):
    codes = np.array([[0], [1], [254], [255]], np.uint8)
    ones = Stored("F8_E4M3", np.full((4, 8), 0x38, np.uint8))
    tensors = named({"": ones, "_scale_inv": Stored(kind, codes)})
    store = open_store(write(tmp_path, declare("fp8"), tensors))
    found = store.read([NAME])[NAME].view(mx.uint32)[:, 0].tolist()
    assert found[:3] == np.array([2.0**-127, 2.0**-126, 2.0**127], np.float32).view("u4").tolist()
    assert np.isnan(np.uint32(found[3]).view(np.float32))


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("leaf", ["self_attn.q_proj.weight", "mlp.experts.gate_up_proj"])
def test_names_of_wrappers(tmp_path: Path, prefix: str, leaf: str):
    """Stacked experts are no module with a weight: their scales' names begin with their own."""
    shape = (2, 64, 96) if "experts" in leaf else (64, 96)
    assert_reads(tmp_path, declare("fp8"), fp8(), shape, f"{prefix}model.layers.0.{leaf}")


def test_a_block_that_only_the_config_tells(tmp_path: Path):
    """192 rows in two blocks: of 128 and 64, and not of 96."""
    settings = declare("fp8", weight_block_size=[128, 128])
    assert_reads(tmp_path, settings, fp8((128, 128)), (192, 192))
    assert_reads(tmp_path, {}, fp8((128, 128)), (192, 192))  # nothing declared: the usual size


def test_what_is_not_converted_stays(tmp_path: Path):
    parts, _ = fp8()(draw((32, 32)))
    head = bfloat16(draw((64, 32)))
    vision = "model.vision_tower.patch_conv.weight"
    tensors = {"lm_head.weight": head, vision: bfloat16(draw((4, 3, 2, 2)))}
    config = declare("fp8", modules_to_not_convert=["lm_head", "model.vision_tower"])
    store = open_store(write(tmp_path, config, named(parts) | tensors))
    found = store.read(["lm_head.weight"])["lm_head.weight"]
    assert found.dtype == mx.bfloat16
    np.testing.assert_array_equal(np.array(found.view(mx.uint16)), head.array)
    assert store.shapes[vision] == (4, 3, 2, 2)


def test_parameters_whose_names_end_as_a_scale_s_stay(tmp_path: Path):
    """Gemma 3n's; those of a module itself are left out."""
    own = "model.layers.0.altup.correct_output_scale"
    left_out = {f"model.layers.0.self_attn.o_proj.{part}": float32(1) for part in IGNORED}
    parts, _ = fp8()(draw((32, 32)))
    tensors = named(parts) | {own: bfloat16(draw((1, 32)))} | left_out
    store = open_store(write(tmp_path, declare("fp8"), tensors))
    assert store.shapes == {NAME: (32, 32), own: (1, 32)}


@pytest.mark.parametrize("place", ["config.json", "text_config", "hf_quant_config.json"])
def test_where_it_is_declared(tmp_path: Path, place: str):
    config = declare("modelopt", quant_algo="FP8")
    if place == "text_config":
        config = {"text_config": config}
    elif place == "hf_quant_config.json":
        nested = {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "FP8"}}
        (tmp_path / place).write_text(json.dumps(nested))
        config = {}
    assert_reads(tmp_path, config, fp8(suffix="_scale"), (96, 64))
    assert open_store(tmp_path).packing == "ModelOpt FP8"


def test_the_number_type_is_the_configs(tmp_path: Path):
    parts, _ = fp8()(draw((32, 32)))
    for config, dtype in (
        ({"dtype": "float16"}, mx.float16),
        ({"dtype": None, "text_config": {"dtype": "float16"}}, mx.float16),
        ({"dtype": None}, mx.bfloat16),
        ({"dtype": "float8_e4m3fn"}, mx.bfloat16),
    ):
        store = open_store(write(tmp_path, declare("fp8") | config, named(parts)))
        assert store.dtypes[NAME] == dtype


# compressed-tensors


@pytest.mark.parametrize(
    ("style", "block", "shape"),
    product(["float-quantized", "naive-quantized"], ["tensor", "channel", *BLOCKS], SHAPES),
)
def test_compressed_fp8(tmp_path: Path, style: str, block: Any, shape: tuple[int, ...]):
    weights: Config = {"num_bits": 8, "type": "float", "strategy": "block"}
    weights |= {"block_structure": [*block]} if isinstance(block, tuple) else {"strategy": block}
    config = declare_compressed(style, weights, ignore=["lm_head"])
    packer = fp8(block, suffix="_scale", scales=bfloat16)
    assert_reads(tmp_path, config, packer, shape)


@pytest.mark.parametrize(
    ("block", "zeros", "shape"),
    product(["tensor", "channel", (1, 32)], [False, True], [(96, 64), (3, 48, 64), (1, 32)]),
)
def test_compressed_int8(tmp_path: Path, block: Any, zeros: bool, shape: tuple[int, ...]):
    size = block[1] if isinstance(block, tuple) else None
    weights = {"num_bits": 8, "type": "int", "group_size": size, "symmetric": not zeros}
    config = declare_compressed("int-quantized", weights)
    assert_reads(tmp_path, config, int8(block, zeros=zeros), shape)


@pytest.mark.parametrize(
    ("bits", "group_size", "zeros", "order", "shape"),
    product(
        [2, 4, 8],
        [32, 64, 128, None],
        [False, True],
        [False, True],
        [(96, 128), (33, 256), (3, 40, 128)],
    ),
)
def test_compressed_words(
    tmp_path: Path,
    bits: int,
    group_size: int | None,
    zeros: bool,
    order: bool,
    shape: tuple[int, ...],
):
    weights = {"num_bits": bits, "type": "int", "group_size": group_size, "symmetric": not zeros}
    packer = packed_int(bits, group_size, zeros=zeros, order=order)
    assert_reads(tmp_path, declare_compressed("pack-quantized", weights), packer, shape)


def test_an_order_that_is_not_used(tmp_path: Path):
    """llm-compressor writes -1 where the inputs are in their order."""

    def pack(values: np.ndarray) -> tuple[Parts, np.ndarray]:
        parts, meant = packed_int(4, 32)(values)
        none = np.full(values.shape[-1:], -1, np.int32)
        return parts | {"_g_idx": Stored("I32", none)}, meant

    weights = {"num_bits": 4, "group_size": 32, "actorder": "weight"}
    assert_reads(tmp_path, declare_compressed("pack-quantized", weights), pack, (40, 128))


@pytest.mark.parametrize(
    ("mode", "tool", "common", "shape"),
    product(
        ["nvfp4", "mxfp4"],
        ["compressed", "modelopt"],
        [False, True],
        [(96, 64), (1, 32), (3, 48, 96)],
    ),
)
def test_floats_of_four_bits(
    tmp_path: Path, mode: str, tool: str, common: bool, shape: tuple[int, ...]
):
    weights = {"num_bits": 4, "type": "float", "strategy": "tensor_group"}
    config = declare_compressed(f"{mode}-pack-quantized", weights)
    if tool == "modelopt":
        config = declare("modelopt", quant_algo=mode.upper())
    error = assert_reads(tmp_path, config, fp4(mode, tool=tool, common=common), shape)
    assert error < 0.2


def test_groups_of_several_formats(tmp_path: Path):
    """Only the config tells 4 bits from 8 where each row has one scale."""
    groups = [
        {"targets": ["Linear"], "weights": {"num_bits": 4, "strategy": "channel"}},
        {"targets": ["re:.*down_proj"], "weights": {"num_bits": 8, "strategy": "channel"}},
        {
            "targets": ["model.layers.0.self_attn.o_proj"],
            "weights": {"num_bits": 8, "type": "float", "strategy": "tensor"},
            "format": "float-quantized",
        },
    ]
    packers = {
        "model.layers.0.mlp.up_proj.weight": packed_int(4),
        "model.layers.0.mlp.down_proj.weight": packed_int(8),
        "model.layers.0.self_attn.o_proj.weight": fp8(suffix="_scale", scales=bfloat16),
    }
    tensors, meant = {}, {}
    for name, pack in packers.items():
        parts, meant[name] = pack(draw((64, 64)))
        tensors |= named(parts, name)
    config = declare_compressed("mixed-precision", *groups)
    store = open_store(write(tmp_path, config, tensors))
    for name, array in store.read(packers).items():
        np.testing.assert_array_equal(np.array(array), meant[name], err_msg=name)


# What is refused


def refuse(folder: Path) -> str:
    with pytest.raises(UserError) as refused:
        store = open_store(folder)
        mx.eval(store.read(store.shapes))
    assert "\n" not in str(refused.value)
    return str(refused.value)


WORDS = {"num_bits": 4, "group_size": 32}
SOUND: dict[str, tuple[Config, Packer]] = {
    "FP8": (declare("fp8", weight_block_size=[32, 32]), fp8((32, 32))),
    "words": (declare_compressed("pack-quantized", WORDS), packed_int(4, 32, zeros=True)),
    "int8": (declare_compressed("int-quantized", {"num_bits": 8}), int8(zeros=True)),
    "nvfp4": (declare("modelopt", quant_algo="NVFP4"), fp4("nvfp4", tool="modelopt")),
    "fp4": (
        declare_compressed("nvfp4-pack-quantized", {"num_bits": 4, "type": "float"}),
        fp4("nvfp4"),
    ),
}
PARTS = [(kind, part) for kind, (_, pack) in SOUND.items() for part in pack(draw((64, 96)))[0]]
OPTIONAL = ("_zero_point", "_scale_2", "_global_scale")


@pytest.mark.parametrize(("damage", "where"), product(["lost", "short", "flat", "type"], PARTS))
def test_a_broken_part_is_named(tmp_path: Path, damage: str, where: tuple[str, str]):
    kind, part = where
    config, pack = SOUND[kind]
    parts, _ = pack(draw((64, 96)))
    sound = named(parts, NAME.replace("up", "down"))
    stored = parts.pop(part)
    array = stored.array
    if damage == "short":
        short = np.stack([array, array]) if array.size == 1 else array[: len(array) // 2]
        parts[part] = Stored(stored.kind, short)
    elif damage == "flat":
        parts[part] = Stored(stored.kind, array.reshape(1, 1, 1, -1))
    elif damage == "type":
        parts[part] = Stored("F8_E5M2", np.zeros(array.shape, np.uint8))
    folder = write(tmp_path, config, sound | named(parts))
    if (damage == "lost" and part in OPTIONAL) or (damage == "flat" and array.size == 1):
        open_store(folder)
        return
    assert NAME in refuse(folder)


@pytest.mark.parametrize("code", [0x7F, 0xFF])
def test_no_number_stays_none(tmp_path: Path, code: int):
    """What is no number is told by whoever computes with it; it never becomes one."""
    parts, _ = fp8()(draw((32, 32)))
    codes = parts[""].array.copy()
    codes[3, 5] = code
    store = open_store(
        write(tmp_path, declare("fp8"), named(parts | {"": Stored("F8_E4M3", codes)}))
    )
    assert np.argwhere(np.isnan(np.array(store.read([NAME])[NAME]))).tolist() == [[3, 5]]


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (declare("fp8", weight_block_size=[128]), "weight_block_size"),
        (declare("fp8", weight_block_size=[0, 1]), "weight_block_size"),
        (declare("fp8", weight_block_size=128), "weight_block_size"),
        (declare("fp8", fmt="e5m2"), "e5m2"),
        (declare("modelopt", quant_algo="W4A8_AWQ"), "W4A8_AWQ"),
        (declare("modelopt", quantization=5), "None"),
        (declare("compressed-tensors"), "config_groups"),
        (declare("compressed-tensors", config_groups={"a": 5}), "config_groups"),
        (declare_compressed("marlin-24", WORDS), "marlin-24"),
        (declare_compressed("pack-quantized", {"num_bits": 3}), "3 bits"),
        (declare_compressed("pack-quantized", {"num_bits": "4"}), "'4' bits"),
        (declare_compressed("pack-quantized", WORDS | {"group_size": "x"}), "group_size"),
        (declare_compressed("pack-quantized", {"targets": "x", "weights": WORDS}), "targets"),
        (declare_compressed("pack-quantized", {"targets": ["re:("], "weights": WORDS}), "pattern"),
        (
            declare_compressed("dense", WORDS, sparsity_config={"format": "sparse-24-bitmask"}),
            "sparse",
        ),
        (
            declare_compressed("dense", WORDS, transform_config={"config_groups": {"R3": {}}}),
            "transform_config",
        ),
        (declare("quark"), "'quark'"),
        (declare("bitsandbytes"), "FP8, compressed-tensors, ModelOpt"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_config_that_is_not_read(tmp_path: Path, config: Config, said: str):
    parts, _ = packed_int(4, 32)(draw((64, 96)))
    assert said in refuse(write(tmp_path, config, named(parts)))


def test_words_of_another_width(tmp_path: Path):
    parts, _ = packed_int(4, 32)(draw((64, 96)))
    config = declare_compressed("pack-quantized", {"num_bits": 8, "group_size": 32})
    assert "_scale has shape (64, 3)" in refuse(write(tmp_path, config, named(parts)))
    config = declare_compressed("pack-quantized", WORDS)
    wrong = parts | {"_shape": Stored("I64", np.array([64, 95]))}
    assert "_shape is [64, 95]" in refuse(write(tmp_path, config, named(wrong)))
    order = parts | {"_g_idx": Stored("I32", np.arange(96, dtype=np.int32))}
    assert "groups that do not exist" in refuse(write(tmp_path, config, named(order)))
